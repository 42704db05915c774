"""Bad input: rows, files and configs that are not what they should be. Models are in test_bad_models.py.

    python -m pytest tests/test_bad_input.py                                      a short form, as in CI
    python -m pytest tests/test_bad_input.py -n 0 --examples 5000 --fuzz 1000     the long one; writes results/bad_input.md

The rule everywhere: either it is used as it is meant, or it is refused in one line that names the place. Never a traceback,
and never anything but what the user wrote.
"""

import dataclasses
import datetime
import functools
import gzip
import json
import math
import os
import random
import re
import types
import typing
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from helpers import CHATML, LLAMA_BOS, ROOT, SPECIAL, as_jsonl, assert_refused, command, renderer, reply, system, user
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from runtime.config import Config
from runtime.errors import DataError, UsageError, one_line
from runtime.formats import SENTINEL, parse_row
from runtime.parse import ALIASES, FIELDS, choices, parse_config

# ----------------------------------------------------------------------------------------------------------------------
# Rows

LIMITS = 60, 100  # tokens of a prompt, and of prompt and response
KINDS = {"chatml": dict(template=CHATML, eos="<|im_end|>", bos=None, empty_system=False),
         "llama": dict(template=LLAMA_BOS, add_bos=True, empty_system=False), "no template": dict(add_bos=True)}

# Texts as they come: all scripts, control characters, right-to-left marks, emoji, and the names of special tokens.
ODD = ["<|im_end|>", "</s>", "<s>", "<unk>", "<|im_start|>system\n", "<|im_", "end|>", "[INST]", "Assistant:", "{{ 1 }}",
       "{% raw %}", "\u202eabc", "\u05e9\u05dc\u05d5\u05dd", "\u0645\u0631\u062d\u0628\u0627",
       "\U0001f469\u200d\U0001f469\u200d\U0001f467", "\U0001f3f3\ufe0f\u200d\U0001f308", "e\u0301", "\x00", "\x1b[31m",
       "\x7f", "\u2028", "\ufeff", "\ufffd", "\U000e0001", "\ue0f7", "\u2581", "\u0120", "\r\n", "\t", " ", "  ", "\n\n",
       "a long text " * 30]
WORDS = st.one_of(st.sampled_from(ODD), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
TEXTS = st.lists(WORDS, max_size=6).map("".join).filter(lambda text: SENTINEL not in text)
CONTENTS = TEXTS.filter(str.strip)  # a reply of white space is dropped: test_data.py


@st.composite
def good_rows(draw):
    """(row, prompt, responses): a row of any format, and what has to be read from it, as strings or messages."""
    first, second = draw(CONTENTS), draw(CONTENTS)
    names = draw(st.sampled_from([("chosen", "rejected"), ("response_a", "response_b")]))
    if draw(st.booleans()):
        prompt = draw(TEXTS)
        return {"prompt": prompt, names[0]: first, names[1]: second}, prompt, [first, second]
    turns = draw(st.integers(0, 2))
    opening = draw(TEXTS)
    prompt = draw(st.sampled_from([[], [system(opening)], [reply(opening)]]))
    for _ in range(turns):
        prompt += [user(draw(TEXTS)), reply(draw(TEXTS))]
    prompt.append(user(draw(TEXTS)))
    replies = [[reply(first)], [reply(second)]]
    row = dict(zip(names, replies), prompt=prompt)
    form = draw(st.sampled_from(["explicit", "implicit", "prompt and whole", "question and whole", "strings"]))
    if form in ("implicit", "prompt and whole", "question and whole"):
        row |= {name: prompt + side for name, side in zip(names, replies)}
    if form == "implicit":
        del row["prompt"]
    if form == "question and whole":
        row["prompt"] = prompt[-1]["content"]
    if form == "strings":
        row |= {names[0]: first, names[1]: second}
    return row, prompt, replies


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-10, 10**20) | st.floats() | TEXTS | st.just("\ud800") | st.just(SENTINEL),
    lambda inner: (st.lists(inner, max_size=3)
                   | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner, max_size=3)),
    max_leaves=6)


def places(value, path=()):
    """The path of every value inside a row."""
    yield path
    for k, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, k))


@st.composite
def bad_rows(draw):
    """A good row in which one to three values, at any depth, are replaced, removed, doubled, moved or renamed."""
    row = json.loads(json.dumps(draw(good_rows())[0]))
    for _ in range(draw(st.integers(1, 3))):
        *path, last = draw(st.sampled_from([p for p in places(row) if p] or [("chosen",)]))
        holder = functools.reduce(lambda value, k: value[k], path, row)
        what = draw(st.sampled_from(["replace", "replace", "remove", "copy", "reverse", "rename", "wrap"]))
        if isinstance(holder, list) and what in ("copy", "reverse"):
            holder.insert(last, holder[last]) if what == "copy" else holder.reverse()
        elif what == "remove":
            holder.pop(last, None) if isinstance(holder, dict) else holder.pop(last)
        elif what == "copy":
            holder[last] = json.loads(json.dumps(row))[draw(st.sampled_from(sorted(row)))]
        elif what == "rename" and isinstance(holder, dict) and last in holder:
            name = draw(st.sampled_from(["role", "content", "from", "label", "truth", "prompt", "chosen", ""]))
            holder[name] = holder.pop(last)
        elif what == "wrap" and last in (holder if isinstance(holder, dict) else range(len(holder))):
            holder[last] = draw(st.sampled_from([lambda v: [v], lambda v: {"content": v}, json.dumps, str]))(holder[last])
        else:
            holder[last] = draw(JSON)
    return row


def read(path, row):
    """The parsed row, read from a file in which it is the second."""
    path.write_text("\n" + json.dumps(row) + "\n")
    [parsed] = data.parsed_rows(str(path), "train", None)
    return parsed


@functools.cache
def made(kind, *limits):
    return renderer(*limits, **KINDS[kind])


def render(made, parsed):
    """(prompt ids, the ids of both responses, why it is dropped) of a parsed row."""
    out = data.tokenize_rows({name: [value] for name, value in parsed.items()}, made)
    return out["prompt_ids"][0], [out["first_ids"][0], out["second_ids"][0]], out["drop"][0]


def plain_messages(value):
    """A string, or messages with a role and a content alone."""
    if not isinstance(value, (list, dict)):
        return value
    value = value if isinstance(value, list) else [value]
    return [{k: m.get(k, m.get(other)) for k, other in (("role", "from"), ("content", "value"))} for m in value]


def meaning(row):
    """The whole text or conversation of both sides of a row: the README's formats, without runtime/formats.py."""
    names = ("chosen", "rejected") if row.get("chosen") is not None else ("response_a", "response_b")
    prompt = plain_messages(row.get("prompt"))
    for side in (plain_messages(row[name]) for name in names):
        if isinstance(side, str) and isinstance(prompt, list):
            side = [reply(side)]
        if isinstance(side, str):
            yield (prompt or "") + side
            continue
        if isinstance(prompt, list):
            yield side if side[:len(prompt)] == prompt else prompt + side
        else:
            told = prompt is None or prompt.strip() in [m["content"].strip() for m in side if m["role"] != "assistant"]
            yield side if told else [user(prompt), *side]


def spell(kind, whole):
    """What the model has to read of a conversation, up to its EOS: the templates of KINDS, implemented without Jinja."""
    if kind == "chatml":
        return "\n".join("<|im_start|>{role}\n{content}<|im_end|>".format(**m) for m in whole)
    return "".join({"user": "[INST] {} [/INST]", "assistant": " {}</s>"}[m["role"]].format(m["content"]) for m in whole)


def spell_string(kind, prompt, response):
    """What the model has to read of strings: as they are, but with one BOS and one end."""
    end = KINDS[kind].get("eos", "</s>")
    while KINDS[kind].get("add_bos") and prompt.startswith("<s>"):
        prompt = prompt[3:]
    tail = re.search(rf"(?:{re.escape(end)}|[ \t\n\r\x0b\x0c\x1c-\x1f])*$", response)
    response = response[:tail.start() + tail[0].index(end)] if end in tail[0] else response
    return prompt, response + end


def harmless(whole):
    """A conversation with the same turns that contains no name of a special token."""
    return [{"content": "x", "role": m["role"] if m["role"] in ("user", "assistant") else "r"} for m in whole]


def expected(kind, wholes, parsed):
    """[(text, the text in which special tokens are tokens)] of the first and the second response."""
    prompt, *responses = (json.loads(parsed[name]) for name in ("prompt", "first", "second"))
    found = [prompt + response for response in responses]
    assert sorted(map(json.dumps, found)) == sorted(map(json.dumps, wholes))
    if isinstance(prompt, list):
        return [(spell(kind, whole), spell(kind, harmless(whole))) for whole in found]
    spelled = [spell_string(kind, prompt, response) for response in responses]
    return [(a + b, f"{a}\0{b}") for a, b in spelled]  # no token crosses the border


def check(kind, row, parsed):
    """What becomes of a row: "trained", or why it is dropped. Checks that its tokens spell the row's text, prompt before
    response, that the special tokens are the template's, and that with limits they are the same tokens, cut."""
    prompt_ids, responses, drop = render(made(kind, 10**8, 10**9), parsed)
    end = KINDS[kind].get("eos", "</s>")
    if drop == "empty response":
        assert [] in responses
        sides = [json.loads(parsed[name]) for name in ("first", "second")]
        said = [s.replace(end, "") if isinstance(s, str) else "".join(m["content"] for m in s) for s in sides]
        assert not all(map(str.strip, said))
        return drop
    tokenizer, eos = made(kind, *LIMITS).tokenizer, made(kind, *LIMITS).eos
    bos = [tokenizer.bos_token_id] if KINDS[kind].get("add_bos") else []
    assert prompt_ids[:len(bos)] == bos
    wholes = list(meaning(row))
    texts = expected(kind, wholes, parsed)
    assert [tokenizer.decode(prompt_ids[len(bos):] + ids) for ids in responses] == [text for text, _ in texts]
    if parsed["label"]:
        better = json.loads(parsed["first" if parsed["label"] > 0 else "second"])
        assert json.loads(parsed["prompt"]) + better == wholes[1 if "chosen" not in row and row["label"] == "b" else 0]
    for ids, (_, names) in zip(responses, texts):
        assert ids[-1] == eos
        named = re.findall("|".join(map(re.escape, SPECIAL)), names)
        for name in SPECIAL:
            wanted = named.count(name) + (name == "<s>" and len(bos))
            assert (prompt_ids + ids).count(tokenizer.convert_tokens_to_ids(name)) == wanted, name
    assert drop == ("equal responses" if responses[0] == responses[1] else "")

    cut_prompt, cut, cut_drop = render(made(kind, *LIMITS), parsed)
    assert len(cut_prompt) <= LIMITS[0]
    kept = min(len(prompt_ids), LIMITS[0]) - len(bos)
    assert cut_prompt == bos + prompt_ids[len(prompt_ids) - kept:]
    assert cut == [ids[:LIMITS[1] - len(cut_prompt)] for ids in responses]
    assert cut_drop == ("equal responses" if cut[0] == cut[1] else "")
    return drop or "trained"


@pytest.fixture(scope="module")
def counted(pytestconfig):
    """{what: Counter of what became of it}. A long run writes it to benchmarks/results/bad_input.md."""
    found = {}
    yield found
    if pytestconfig.getoption("--examples") >= 1000 and pytestconfig.getoption("--fuzz") >= 1000:
        lines = ["# Bad rows and bad configs", "",
                 "    python -m pytest tests/test_bad_input.py -n 0 --examples 5000 --fuzz 1000", "",
                 "Each is used as it is written or refused in one line that names the place; none ended in a traceback.", "",
                 "| what | tried | |", "| --- | --: | --- |"]
        lines += [f"| {what} | {seen.total():,} | {', '.join(f'{n:,} {how}' for how, n in seen.most_common())} |"
                  for what, seen in found.items()]
        (ROOT / "benchmarks" / "results" / "bad_input.md").write_text("\n".join([*lines, ""]))


def for_all(pytestconfig, strategy, holds, times=1):
    """Run `holds` on --examples values of the strategy, the same ones each time."""
    settings(max_examples=times * pytestconfig.getoption("--examples"), derandomize=True, database=None, deadline=None,
             suppress_health_check=list(HealthCheck))(given(strategy)(holds))()


@pytest.mark.parametrize("kind", KINDS)
def test_good_rows_with_any_text_are_trained_on_as_they_are(kind, tmp_path, pytestconfig, counted):
    seen = counted[f"good rows with odd texts, {kind}"] = Counter()

    def holds(drawn):
        row, prompt, responses = drawn
        parsed = read(tmp_path / "f.jsonl", row)
        assert json.loads(parsed["prompt"]) == prompt
        assert sorted([parsed["first"], parsed["second"]]) == sorted(json.dumps(r) for r in responses)
        refused = isinstance(prompt, list) and (kind == "no template" or kind == "llama" and prompt[0]["role"] == "system")
        if refused or kind == "chatml" and prompt == "":
            with pytest.raises(DataError, match=r"f\.jsonl, row 2: (messages need a|the chat|the prompt is empty)"):
                render(made(kind, *LIMITS), parsed)
            seen["refused"] += 1
        else:
            seen[check(kind, row, parsed)] += 1

    for_all(pytestconfig, good_rows(), holds)
    assert seen["trained"] > 20


@pytest.mark.parametrize("kind", KINDS)
def test_rows_with_anything_wrong_are_trained_on_correctly_or_refused(kind, tmp_path, pytestconfig, counted):
    seen = counted[f"rows with something wrong, {kind}"] = Counter()

    def holds(row):
        try:
            parsed = read(tmp_path / "f.jsonl", row)
            seen[check(kind, row, parsed)] += 1
        except DataError as error:
            seen["refused"] += 1
            assert str(error).startswith(f"{tmp_path}/f.jsonl, row 2") and len(str(error)) < 700 and str(error).isprintable()

    for_all(pytestconfig, bad_rows(), holds, times=2)
    assert seen["trained"] > 9 and seen["refused"] > 50


def test_a_row_of_megabytes(tmp_path):
    words = ("</s>" + "a \u05d0 \U0001f469 word " * 200) * 300  # 1.2 MB
    for row in ({"prompt": "p", "chosen": words, "rejected": "r"}, {"prompt": words, "chosen": "c", "rejected": "r"}):
        assert check("chatml", row, read(tmp_path / "f.jsonl", row)) == "trained"


@pytest.mark.parametrize("line, match", [
    ('{"prompt": ' + "7" * 5000 + "}", "not a JSON object .*digits"), ("[" * 100_000, "not a JSON object .*recursion"),
    ('{"prompt": "p", "chosen": "c", "rejected": "r", "chosen": "d"}', "the key chosen appears twice; keep one"),
    ('{"prompt": "p", "chosen": "c", "rejected": "r"', "not a JSON object"), ('"text"', "expected an object .* found str"),
    (json.dumps({"prompt": "p", "chosen": [user("u"), {"role": "\ud800", "content": "c"}], "rejected": "r"}),
     r"field chosen, message 2: its role is '.ud800'; expected one of system, "),
    (json.dumps({"chosen": [user("u"), {"role": "bot\n\x1b[31m", "content": "c"}], "rejected": [user("u"), reply("r")]}),
     r"field chosen, message 2: its role is 'bot.n.x1b\[31m'; expected one of system, "),
    (json.dumps({"prompt": "p", "chosen": SENTINEL, "rejected": "r"}), r"field chosen: holds the characters U\+E0F7"),
])
def test_lines_that_cannot_be_read(line, match, tmp_path):
    (tmp_path / "f.jsonl").write_text(as_jsonl([{"prompt": "p", "chosen": "c", "rejected": "r"}]) + line)
    with pytest.raises(DataError, match=rf"f\.jsonl, row 2\b.*{match}") as caught:
        list(data.parsed_rows(str(tmp_path / "f.jsonl"), "train", None))
    assert str(caught.value).isprintable()


def test_a_greeting_is_not_a_reply():
    """A conversation that begins with the assistant is given whole, and its prompt too: the prompt must not appear twice."""
    talk = [reply("Hi"), user("q")]
    for prompt in (talk, "q", None):
        parsed = parse_row({"prompt": prompt, "chosen": talk + [reply("c")], "rejected": talk + [reply("r")]}, "row")
        assert parsed["prompt"] == talk and parsed["responses"] == [[reply("c")], [reply("r")]]


# ----------------------------------------------------------------------------------------------------------------------
# Files

ROW = {"prompt": "p", "chosen": " good", "rejected": " bad"}
CSV = "prompt,chosen,rejected\r\n"
LINES = as_jsonl([ROW] * 200)


def saved(folder, damage):
    """A `save_to_disk` folder, as a DatasetDict, with one file damaged: `damage` is (file, a function of its bytes)."""
    datasets.DatasetDict(train=datasets.Dataset.from_list([ROW] * 50)).save_to_disk(folder)
    file, change = damage
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if change:
        (folder / file).write_bytes(change(content))


def parquet(folder, table, change=lambda content: content):
    path = folder / "train.parquet"
    pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.table(table), path)
    path.write_bytes(change(path.read_bytes()))


def link(folder, name, target):
    (folder / name).symlink_to(target)


BAD_FILES = {
    # encodings
    "UTF-16": ("train.jsonl", LINES.encode("utf-16"), r"train\.jsonl: not UTF-8 text"),
    "UTF-16, no mark": ("train.jsonl", LINES.encode("utf-16-le"), r"train\.jsonl: not UTF-8 text"),
    "UTF-16 CSV": ("train.csv", (CSV + "p,c,r").encode("utf-16"), r"train\.csv: not UTF-8 text"),
    "latin-1": ("train.jsonl", b"\n" + '{"prompt": "é", "chosen": "c", "rejected": "r"}'.encode("latin-1"),
                r"train\.jsonl, row 2, field prompt: not valid Unicode"),
    "latin-1 CSV": ("train.csv", (CSV + "p,c,r\r\np,café,r").encode("latin-1"), r"csv, row 2, field chosen: not valid"),
    "a picture": ("train.jsonl", b"\x89PNG\r\n\x1a\n" + bytes(range(256)), r"train\.jsonl: not UTF-8 text"),
    # JSON
    "empty": ("train.jsonl", b"", r"its split train has no rows"),
    "blank lines": ("train.jsonl", b"\n\n  \n", r"its split train has no rows"),
    "empty array": ("train.json", b"[]", r"its split train has no rows"),
    "array of arrays": ("train.json", json.dumps([[ROW]]).encode(), r"train\.json, row 1: expected an object .* found list"),
    "array cut off": ("train.json", json.dumps([ROW, ROW])[:-9].encode(), r"train\.json: not valid JSON \(.* at character"),
    "object over lines": ("train.json", json.dumps({"data": [ROW]}, indent=1).encode(), r"json, row 1: not a JSON ob"),
    "object around all": ("train.json", json.dumps({"data": [ROW]}).encode(), r"json, row 1: needs .*has data"),
    "deep array": ("train.json", b"[" * 10**5, r"train\.json: cannot be read \(RecursionError"),
    # gzip
    "gzip cut off": ("train.jsonl.gz", gzip.compress(LINES.encode())[:-30], r"train\.jsonl\.gz: damaged gzip file"),
    "gzip only by name": ("train.jsonl.gz", LINES.encode(), r"train\.jsonl\.gz: damaged gzip file"),
    "gzip only by content": ("train.jsonl", gzip.compress(LINES.encode()), r"train\.jsonl: not UTF-8 text"),
    # CSV
    "quote never closed": ("train.csv", (CSV + 'p,c,r\r\np,c,"r\r\np,c,r\r\n').encode(), r"csv, line 4: not valid CSV"),
    "text after a quote": ("train.csv", (CSV + 'p,c,"r"x\r\n').encode(), r"train\.csv, line 2: not valid CSV"),
    "comma without quotes": ("train.csv", (CSV + "p,c, and more,r\r\n").encode(), r"csv, row 1: 4 cells, but .* has 3"),
    "cell missing": ("train.csv", (CSV + "p,c,r\r\np,c\r\n").encode(), r"train\.csv, row 2, field rejected: found nothing"),
    "column twice": ("train.csv", b"prompt,chosen,rejected,chosen\np,c,r,d\n", r"csv: two columns have the same name"),
    "no header": ("train.csv", b"p,c,r\np,c,r\n", r"train\.csv, row 1: needs chosen and rejected.* it has p, c, r"),
    "semicolons": ("train.csv", b"prompt;chosen;rejected\np;c;r\n", r"train\.csv, row 1: needs chosen and rejected"),
    "empty CSV": ("train.csv", b"", r"its split train has no rows"),
    "only a header": ("train.csv", CSV.encode(), r"its split train has no rows"),
    # parquet
    "empty parquet": ("train.parquet", b"", r"train\.parquet: cannot be read"),
    "not parquet": ("train.parquet", LINES.encode(), r"train\.parquet: cannot be read"),
    "parquet cut off": (parquet, {"prompt": ["p"] * 9, "chosen": ["c"] * 9, "rejected": ["r"] * 9}, lambda b: b[:-40],
                        r"train\.parquet: cannot be read"),
    "parquet damaged inside": (parquet, {k: [k + str(n) * 99 for n in range(99)] for k in ROW},
                               lambda b: b[:50] + b"\xff" * 200 + b[250:], r"train\.parquet: cannot be read"),
    "parquet of ints": (parquet, {"prompt": [1], "chosen": [2], "rejected": [3]}, r"parquet, row 1, field .* found int"),
    "parquet of bytes": (parquet, {"prompt": ["p"], "chosen": [b"\xff"], "rejected": ["r"]}, r"row 1, field chosen.* bytes"),
    "parquet of structs": (parquet, {"prompt": [{"text": "p"}], "chosen": ["c"], "rejected": ["r"]}, r"prompt.* dict"),
    "parquet of other structs": (parquet, {k: [[{"from": "a", "value": "b"}]] for k in ("chosen", "rejected")},
                                 r"train\.parquet, row 1, field chosen, message 1: its role is 'a'; expected one of"),
    "parquet with a null column": (parquet, {"prompt": ["p"], "chosen": ["c"], "rejected": pyarrow.nulls(1)},
                                   r"train\.parquet, row 1, field rejected: .* found nothing"),
    "parquet without UTF-8": (parquet, pyarrow.table({k: pyarrow.array([b"\xe9"]).view("string") for k in ROW}),
                              r"train\.parquet: cannot be read \(UnicodeDecodeError"),
    # folders
    "no split": ("readme.txt", b"hello", r"has no split train"),
    "a folder of the file's name": (lambda folder: (folder / "train.jsonl").mkdir(),
                                    r"jsonl: is not a file but a folder or a broken link"),
    "a link in a circle": (link, "train.jsonl", "train.jsonl", r"jsonl: is not a file but a folder or a broken link"),
    "a link to nothing": (link, "train.csv", "nothing.csv", r"train\.csv: is not a file but a folder or a broken link"),
    # save_to_disk
    "index damaged": (saved, ("dataset_dict.json", lambda b: b[:5]), r"dataset_dict\.json: not valid JSON"),
    "index of something else": (saved, ("dataset_dict.json", lambda b: b"[1]"), r"dataset_dict\.json: cannot be read"),
    "state damaged": (saved, ("train/state.json", lambda b: b"{}"), r"\[train\]: cannot be read"),
    "state missing": (saved, ("train/state.json", None), r"\[train\]: cannot be read"),
    "info damaged": (saved, ("train/dataset_info.json", lambda b: b"{"), r"\[train\]: (cannot be read|not valid JSON)"),
    "rows missing": (saved, ("train/data-00000-of-00001.arrow", None), r"\[train\]: cannot be read .*00000-of-00001\.arrow"),
    "rows cut off": (saved, ("train/data-00000-of-00001.arrow", lambda b: b[:300]), r"\[train\]: cannot be read"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_are_one_line_that_names_them(name, train, tmp_path):
    first, *values, match = BAD_FILES[name]
    (tmp_path / "data").mkdir()
    if callable(first):
        first(tmp_path / "data", *values)
    else:
        (tmp_path / "data" / first).write_bytes(*values)
    assert_refused(train, rf"data\b.*{match}", dataset_mixer=f"{{{tmp_path}/data: 1.0}}")


@pytest.mark.parametrize("name, match", [
    ("circle", r"circle: is a broken link"), ("script.py", r"script\.py: a file must end in"),
    ("n" * 300, r"nnn: neither a file or folder here nor a data set on the hub"),
    ("nowhere/train.jsonl", r"nowhere/train\.jsonl: neither a file or folder"),
    ("train.jsonl/deeper", r"deeper: neither a file or folder"), ("no-such-data-set", r"-data-set: neither a file or"),
])
def test_sources_that_are_not_there(name, match, train, tmp_path):
    link(tmp_path, "circle", "circle")
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "script.py").write_text("")
    assert_refused(train, match, dataset_mixer=json.dumps({name if "data-set" in name else f"{tmp_path}/{name}": 1.0}))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(train, tmp_path):
    (tmp_path / "train.jsonl").write_text(LINES)
    (tmp_path / "train.jsonl").chmod(0)
    assert_refused(train, r"train\.jsonl: cannot be read \(PermissionError", dataset_mixer=f"{{{tmp_path}: 1.0}}")


# ----------------------------------------------------------------------------------------------------------------------
# Configs and command lines

KNOWN = [*FIELDS]
ODD_VALUES = [
    None, True, False, 0, -1, 1, 7, 0.5, 1.5, 10**9, -10**30, 10**400, 1e300, 5e-324, float("nan"), float("inf"), "", " ",
    "x", "null", "None", "none", "true", "FALSE", "no", "1e-3", "1e999", "1_000", "0x10", "-0", "\uff11", "9" * 5000,
    "\xe9", "a\nb", "\U0001f469", "\x1b[31m", "\0", "\u2028", "a,b", ",", "[", "{", "{a: 1", "{a: 1, a: 2}", "{a: 1}",
    "[a, b]", "{? [a] : 1}", "[" * 3000, "&a [*a]", "!!python/name:os.system", "x" * 10**5, "../.." * 50, "--beta",
    "configs", "/dev/null", [], [1], ["a"], ["a", None], [["a"]], ["train"], ["train", "train"], {}, {"a": 1}, {"a": None},
    {"a": {"b": 1}}, {None: 1}, {"": 0.5}, {"a": 10**400}, {"use_reentrant": 3}, datetime.date(2024, 1, 1), b"bytes",
    {"a", "b"}]
FITTING = {int: [1, 2000, "3"], float: [0.25, "1e-3", 1], bool: [True, "FALSE", 0], str: ["x", "none"]}
ODD_TEXTS = [
    ":", "{", "}", "[", "]", "&a ", "*a", "!", "!!python/object/apply:os.system ['false']\n", "%", "@", "`", '"', "'", "|",
    ">", "#", "?", "- ", "\t", "\x00", "\x07", "\ufeff", "---\n", "...\n", "<<: ", "!!bool maybe", "!!int x",
    "!!timestamp x", "2024-99-99", "!!binary ?", "\u2028", "x", "0", " "]


def field_of(name):
    return FIELDS[ALIASES.get(name, name)]


def misspelt(name, rng):
    at = rng.randrange(len(name))
    return rng.choice([name[:at] + name[at + 1:], name[:at] + rng.choice("xé_- A") + name[at:], name.upper(), name + "s",
                       name.replace("_", "-"), name[::-1]])


def change_values(values, rng):
    """One change of a config's keys and values, in place."""
    name, what = rng.choice(sorted(values)), rng.choice(["value"] * 3 + ["new", "spelling", "remove", "nest", "alias"])
    if what in ("value", "new"):
        name = name if what == "value" else rng.choice(sorted(KNOWN))
        values[name] = rng.choice(rng.choice([ODD_VALUES, FITTING.get(field_of(name).type, ["1", "x", None])]))
    elif what == "remove":
        del values[name]
    elif what == "nest":
        values[name] = {name: values[name]}
    elif what == "alias":
        values |= {"gamma": 1.0, "Gamma": 1.0}
    else:
        values[misspelt(name, rng)] = values.pop(name)


def impossible(values):
    """Whether a config has to be refused: an unknown key, one key twice, a mapping where one value belongs, or nothing."""
    return (not values or any(ALIASES.get(name, name) not in FIELDS for name in values) or {"gamma", "Gamma"} <= set(values)
            or any(isinstance(v, dict) and field_of(name).type in (int, float, bool, str) for name, v in values.items()))


def change_text(text, rng):
    """One change of the file itself. Returns (bytes, whether it has to be refused)."""
    lines, at = text.splitlines(keepends=True), rng.randrange(len(text) + 1)
    what = rng.choice(["insert", "insert", "cut", "line twice", "line away", "indent", "encoding", "shuffle"])
    line = rng.choice([n for n, line in enumerate(lines) if line[0].isalpha()])
    if what == "insert":
        return (text[:at] + rng.choice(ODD_TEXTS) + text[at:]).encode(), False
    if what == "cut":
        return text[:at].encode(), False
    if what == "encoding":
        latin = ("# é\n" + text).encode("latin-1", "replace")
        return rng.choice([text.encode("utf-16"), latin, b"\0" + text.encode()]), True
    if what == "shuffle":
        rng.shuffle(lines)
    elif what == "line away":
        del lines[line]
    else:
        lines.insert(line, lines[line] if what == "line twice" else " " * rng.randint(1, 3))
    return "".join(lines).encode(), what == "line twice"


def odd_flags(rng):
    """Arguments of every form, good and bad. Returns (arguments, whether they have to be refused)."""
    name, value = rng.choice(sorted(KNOWN)), str(rng.choice(ODD_VALUES))[:200]
    forms = [
        ([f"--{name}={value}"], 0), ([f"--{name}", value], 0), ([f"--{name}"], 0), ([f"--{name}="], 0), (["--seed=1.0"], 0),
        ([f"--{name}=1", f"--{name}={value}"], 0), ([f"--{misspelt(name, rng)}={value}"], 0), ([f"-{name}={value}"], 1),
        ([f"{name}={value}"], 1), (["--"], 1), (["--=1"], 1), ([""], 1), (["--Gamma=1", "--gamma=1"], 1), (["--config"], 1),
        (["--config="], 1), ([f"--{name}\n={value}"], 1), (["--gamma==1"], 1), (["---gamma=1"], 1)]
    return rng.choice(forms)


def assert_valid(config, values):
    """Every field has the right type, is in its range and among its choices, and is what the file says."""
    for field in dataclasses.fields(Config):
        name = field.name
        value, hint = getattr(config, name), field.type
        options = [hint] if not isinstance(hint, types.UnionType) else typing.get_args(hint)
        assert any(type(value) is (typing.get_origin(t) or t) for t in options), (name, value)
        assert not isinstance(value, float) or math.isfinite(value)
        assert not isinstance(value, str) or value.strip() and "\0" not in value
        assert choices(name) is None or value in choices(name)
        assert value is None or field.metadata["low"] is None or value >= field.metadata["low"]
        assert value is None or field.metadata["high"] is None or value <= field.metadata["high"]
        written = values.get(name)
        if isinstance(written, (int, float)) or isinstance(written, str) and isinstance(value, str):
            assert value == written or str(value).lower() == str(written).lower()
    assert all(0 < share <= 1 for share in config.dataset_mixer.values())
    assert config.max_prompt_length < config.max_length and any("train" in split for split in config.dataset_splits)


def test_mutated_configs_parse_or_are_refused_in_one_line(tmp_path, pytestconfig, capsys, counted):
    recipes = sorted((ROOT / "configs").glob("*.yaml"))
    path, again = tmp_path / "c.yaml", tmp_path / "again.yaml"
    seen = {kind: counted.setdefault(f"mutated configs: {kind}", Counter()) for kind in ("values", "text", "flags")}
    for n in range(pytestconfig.getoption("--fuzz")):
        rng = random.Random(n)
        text = rng.choice(recipes).read_text()
        values, flags, must_refuse = yaml.safe_load(text), [], False
        kind = rng.choice(["values", "text", "flags"])
        if kind == "values":
            for _ in range(rng.randint(1, 2)):
                change_values(values, rng)
            must_refuse = impossible(values)
            path.write_text(yaml.safe_dump(values, allow_unicode=rng.random() < 0.5))
        elif kind == "text":
            content, must_refuse = change_text(text, rng)
            path.write_bytes(content)
            values = {}
        else:
            path.write_text(text)
            flags, must_refuse = odd_flags(rng)
            values = {}
        argv = ["--config", str(path), *flags]
        try:
            config = parse_config(argv)
        except UsageError as error:
            seen[kind]["refused"] += 1
            assert str(error).isprintable() and 20 < len(str(error)) < 700, (n, error)
            assert command(argv) == 2 and capsys.readouterr().err == f"error: {one_line(error)}\n", (n, error)
            continue
        seen[kind]["parsed"] += 1
        assert not must_refuse, (n, argv)
        assert_valid(config, values)
        again.write_text(yaml.safe_dump(dataclasses.asdict(config)))
        assert parse_config(["--config", str(again)]) == config
    assert all(min(seen[kind]["refused"], seen[kind]["parsed"]) > 1 for kind in seen), seen


# Values of the right type, for keys without choices.
PLAUSIBLE = {int: [0, 1, 3, 40], float: [0.0, 0.25, 1.0, 3.0], bool: [True, False], str: ["x", "none"]}
# These would wait for somebody, take long, or write to other places.
NOT_TRIED = {"max_steps", "oracle", "push_to_hub", "num_threads", "preprocessing_num_workers", "output_dir", "toy_dir"}


def test_configs_of_plausible_values_run_or_end_in_one_line(train, pytestconfig, counted):
    """A tenth of --fuzz: a real, tiny run is started with one to three keys changed."""
    seen = counted["runs with plausible values"] = Counter()
    keys = sorted({*KNOWN} - NOT_TRIED)
    for n in range(pytestconfig.getoption("--fuzz") // 10):
        rng, chosen = random.Random(n), {}
        for name in rng.sample(keys, rng.randint(1, 3)):
            hint = FIELDS[name].type
            hint = next((t for t in typing.get_args(hint) if t is not types.NoneType), hint)
            values = list(choices(name) or PLAUSIBLE.get(hint, ["x"]))
            chosen[name] = rng.choice(values)
        run = train("fuzzed", check=None, **{"max_steps": 2} | chosen)
        errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in run.stdout + run.stderr, (n, chosen)
        assert (run.code, len(errors)) in ((0, 0), (2, 1)), (n, chosen, run.code, errors)
        assert all(error.isprintable() and len(error) < 900 for error in errors), (n, chosen)
        assert (run.output / "summary.json").is_file() == (run.code == 0), (n, chosen)
        seen["trained" if run.code == 0 else "refused"] += 1
    assert min(seen["trained"], seen["refused"]) > 1, seen


GOOD_YAML = "model_name_or_path: m\ndataset_mixer: {d: 1.0}\noutput_dir: o\n"
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 9)}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize("text, message", [
    (BOMB + "beta: *a29\n", "c.yaml, line 2: not YAML (*a0 repeats a list or mapping; write it out)"),
    (MERGES, "c.yaml, line 2: not YAML (*a0 repeats"), ("beta: &a [*a]\n", "line 4: not YAML (*a repeats"),
    ("beta: *b\n", "line 4: not YAML (found undefined alias 'b'"),
    ("beta: " + "[" * 5000, "not YAML (maximum recursion depth"),
    ("beta: 1\ngamma: 1\nbeta: 2\n", "c.yaml, line 6: not YAML (beta is already set in line 4; keep one)"),
    ("dataset_configs: {a: 1, a: 2}\n", "line 4: not YAML (a is already set in line 4; keep one"),
    ("beta: !!python/object/apply:os.mkdir [made]\n", "line 4: not YAML (could not determine a constructor for the tag"),
    ("beta: !!python/name:os.system\n", "could not determine a constr"), ("!!python/object:os.x {}: 1\n", "constructor"),
    ("beta: 2024-99-99\n", "not YAML (month must be in 1..12"), ("beta: !!bool maybe\n", "not YAML"),
    ("beta: !!timestamp x\n", "not YAML"), ("? [a, b]\n: 1\n", "unhashable key"), ("---\na: 1\n", "found another document"),
    ("output-dir: o\n", "unknown key 'output-dir'; the nearest known key is 'output_dir'"),
    ("SEED: 1\n", "unknown key 'SEED'; the nearest known key is 'seed'"), ("5: 1\n", "unknown key '5'"),
    ("hub_model_revision: 0123\n", "hub_model_revision: expected text, found 83; put it in quotes"),
    ("hub_model_id: 2024-01-01\n", "hub_model_id: expected text, found datetime.date(2024, 1, 1); put it in quotes"),
    ("hub_model_id: ''\n", "hub_model_id: expected text, found ''"),
    ('hub_model_id: "a\\0"\n', "text, found 'a\\x00'"),
    ("optim: none\n", "optim: expected one of adamw_torch, rmsprop, found 'none'"),
    (f"seed: {10**400}\n", "seed: expected a whole number, found 1000"),
    ("seed: 1e30\n", "seed: expected a whole number of at most"),
    ("max_length: 9007199254740993\n", "max_length: expected a whole number of at most 2147483647"),
    ("beta: 1.0e300\n", "beta: expected a number of at most"),
    ("num_threads: 100000\n", "num_threads: expected a whole number of"),
    ("dataset_splits: [train, train]\n", "dataset_splits: 'train' is listed twice, so its pairs would count twice"),
    ("dataset_splits: [train, '']\n", "dataset_splits: expected a list of names"),
    ("gradient_checkpointing_kwargs: {use_renentrant: false}\n", "expected use_reentrant or preserve_rng_state"),
])
def test_yaml_that_cannot_work(text, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(GOOD_YAML + text if not text.startswith("a0") else text)
    assert command(["--config", "c.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 400
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("flag, message", [
    ("--dataset_mixer={a: !!python/object/apply:os.mkdir [made]}", "command line, dataset_mixer, line 1: not YAML"),
    ("--dataset_mixer={a: 1, a: 0.5}", "dataset_mixer, line 1: not YAML (a is already set in line 1; keep one"),
    ("--dataset_mixer={a: &a {b: *a}}", "*a repeats"),
    ("--dataset_mixer={a: .nan}", "expected a mapping of names to numbers"),
    ("--beta=" + "9" * 10**5, "beta: expected a number, found '9999"),
    ("--output_dir=", "output_dir: expected text, found ''"),
    ("--judge_timeout=1e10", "judge_timeout: expected a number of at most 86400"),
    ("--output_dir=\udcff", "found '\\udcff'"),
])
def test_flags_that_cannot_work(flag, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(GOOD_YAML)
    assert command(["--config", "c.yaml", flag]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and len(error) < 400
    assert not (tmp_path / "made").exists()


def test_what_yaml_allows_is_still_allowed(tmp_path):
    more = "beta: &b 0.25\ngamma: *b\nresume_from_checkpoint: false\n"
    (tmp_path / "c.yaml").write_text("\ufeff# comment\n" + GOOD_YAML + more)
    config = parse_config(["--config", str(tmp_path / "c.yaml"), "--output_dir=0123", "--hub_model_id=none"])
    assert (config.beta, config.gamma, config.resume_from_checkpoint) == (0.25, 0.25, "false")
    assert config.output_dir == "0123" and config.hub_model_id is None


@pytest.mark.parametrize("content, message", [
    (b"[]", "expected an engine config"), (b'{"zero_optimization": 3}', "expected an engine config"),
    (b"\xff\xfe{", "cannot be read"), (b'{"gradient_clipping": 7}', "gradient_clipping is 7, but the YAML says 1.0"),
    (b"", "line 1: not JSON"),
    (b'{"bf16": {"enabled": "auto"}, "bf16": {}}', "the key bf16 appears twice; keep one"),
    (b'{"zero_optimization": {"stage": 7}}', "field stage of DeepSpeedZeroConfig: Input should be .*, found 7"),
    (b'{"zero_optimization": {"stage": 2, "buckets": 3}}', "field buckets of DeepSpeedZeroConfig: Extra inputs"),
    (b'{"zero_optimization": {"offload_optimizer": 3}}', "field offload_optimizer of DeepSpeedZeroConfig: .*, found 3"),
    (b'{"data_types": []}', "DeepSpeed cannot read it"),
    (b'{"data_types": {"grad_accum_dtype": "fp8"}}', "DeepSpeed cannot start with it"),
    (b'{"fp16": {"enabled": true}}', "fp16 cannot be honoured"),
    (b'{"bfloat16": {"enabled": true}}', "bf16 is True, but the YAML says False"),
    (b'{"torch_autocast": {"enabled": true}}', "torch_autocast cannot be honoured"),
    (b'{"zero_optimization": {"stage": 2, "compute_grad_norm": "no"}}', "compute_grad_norm false cannot be honoured"),
    (b'{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}', "device nvme cannot be honoured"),
    (b'{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "offload_param cannot .*: ZeRO 2 keeps"),
    (b'{"csv_monitor": {"enabled": true, "output_path": "x"}}', "csv_monitor cannot .*; say --report_to=csv_monitor, which"),
])
def test_engine_files_that_cannot_work(content, message, train, tmp_path):
    (tmp_path / "engine.json").write_bytes(content)
    assert_refused(train, f"engine\\.json.*{message}", deepspeed=tmp_path / "engine.json")


@pytest.mark.parametrize("section, message", [
    ({"enabled": "auto", "check_grad_overflow": "no"}, "bf16.check_grad_overflow false cannot be honoured: a step whose"),
    ({"enabled": "auto", "bf16_master_weights_and_grads": True}, "bf16_master_weights_and_grads cannot be honoured"),
    ({}, "bf16 is False, but the YAML says True; write"),
])
def test_engine_files_that_would_blind_a_check(section, message, train, tmp_path):
    (tmp_path / "engine.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "bf16": section}))
    assert_refused(train, f"engine\\.json.*{message}", deepspeed=tmp_path / "engine.json", bf16=True)
