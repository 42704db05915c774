"""Tests of data.py: formats, hidden labels, sources, templates, errors, cache, order and batches.

Run them: python -m pytest tests/test_data.py
"""

import csv
import functools
import gzip
import json
import os
import random
from collections import Counter
from dataclasses import fields
from pathlib import Path

import datasets
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

import data
from data import DataError, Pairs, Renderer, collate, epoch_order, load_pairs, parse_row, split_batch

HH = Path(__file__).resolve().parents[1] / ".." / "shared" / "data" / "hh-harmless-test.jsonl.gz"
PLACE = "f.jsonl, row 7"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """The datasets cache of one test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


# ----------------------------------------------------------------------------------------------------------------------
# Tokenisers, rows and files to test with

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# A default system message where the conversation has none.
DEFAULT_SYSTEM = ("{% if messages[0]['role'] != 'system' %}"
                  "{{ '<|im_start|>system\nBe a pirate.<|im_end|>\n' }}{% endif %}" + CHATML)
ZEPHYR = ("{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
LLAMA = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
         "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
         "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}")
LLAMA_BOS = "{{ bos_token }}" + LLAMA


@functools.cache
def trained(metaspace):
    """A small BPE: byte level, or with Llama's "▁" in front of every piece. It knows "forever" as one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None, byte_fallback=metaspace))
    alphabet = []
    if metaspace:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
        alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["for ever forever", "forever", "the user asks and the assistant answers", "x <|im </s <|im"] * 9,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    return tokenizer.to_str()


def tokenizer(eos="</s>", bos="<s>", add_bos=False, template=None, metaspace=False):
    made = Tokenizer.from_str(trained(metaspace))
    if add_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))])
    made = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token=bos, unk_token="<unk>",
                                   clean_up_tokenization_spaces=False,
                                   additional_special_tokens=[s for s in SPECIAL if s not in (eos, bos, "<unk>")])
    made.chat_template = template
    return made


def renderer(max_prompt_length=200, max_length=400, empty_system=True, **options):
    return Renderer(tokenizer(**options), max_prompt_length, max_length, empty_system)


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def preference(n, **more):
    return {"prompt": f"question {n}", "chosen": f" good {n}", "rejected": f" bad {n}", **more}


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def folder(path, rows, split="train"):
    path.mkdir(exist_ok=True)
    (path / f"{split}.jsonl").write_text(as_jsonl(rows), encoding="utf-8")
    return str(path)


def load(source, kind="train", made=None, **options):
    """(pairs, labels, truths, the printed line) of one source, or of a mixer."""
    said = []
    mixer = source if isinstance(source, dict) else {str(source): 1.0}
    out = load_pairs(mixer, options.pop("splits", [kind]), made or renderer(), kind, say=said.append, **options)
    return *out, "\n".join(said)


def texts(pairs, made=None):
    """[(prompt, first, second)] as text."""
    decode = (made or renderer()).tokenizer.decode
    return [tuple(decode(row[k]) for k in ("prompt_ids", "first_ids", "second_ids")) for row in pairs.table]


# ----------------------------------------------------------------------------------------------------------------------
# Formats

ULTRAFEEDBACK = {
    "prompt": "Why?", "prompt_id": "1f",
    "chosen": [user("Why?"), reply("Since.")], "rejected": [user("Why?"), reply("No.")],
    "messages": [user("Why?"), reply("Since.")], "score_chosen": 8.5, "score_rejected": 3.0}
DPO_MIX = {
    "dataset": "argilla/x", "chosen": [user("a"), reply("b"), user("c"), reply("d")],
    "rejected": [user("a"), reply("b"), user("c"), reply("e")], "chosen_rating": 5.0, "rejected_rating": 1.0}
HH_PROMPT = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"


@pytest.mark.parametrize("row, prompt, responses, label, truth", [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, "p", ["c", "r"], 0, 0),
    ({"prompt": "", "chosen": "c", "rejected": "r"}, "", ["c", "r"], 0, 0),
    ({"prompt": [system("s"), user("u")], "chosen": [reply("c")], "rejected": [reply("r")]},
     [system("s"), user("u")], [[reply("c")], [reply("r")]], 0, 0),
    ({"prompt": [user("u")], "chosen": "c", "rejected": "r"}, [user("u")], [[reply("c")], [reply("r")]], 0, 0),
    ({"prompt": "u", "chosen": [reply("c")], "rejected": [reply("r")]},
     [user("u")], [[reply("c")], [reply("r")]], 0, 0),
    ({"prompt": [user("u")], "chosen": [user("u"), reply("c")], "rejected": [user("u"), reply("r")]},
     [user("u")], [[reply("c")], [reply("r")]], 0, 0),
    # implicit prompt: a space belongs to the word behind it, and a common beginning of two words to the words
    ({"chosen": "The sky is blue", "rejected": "The sky is black"}, "The sky is", [" blue", " black"], 0, 0),
    ({"chosen": "blue", "rejected": "black"}, "", ["blue", "black"], 0, 0),
    ({"chosen": "one two", "rejected": "three"}, "", ["one two", "three"], 0, 0),
    ({"chosen": [user("u"), reply("c")], "rejected": [user("u"), reply("r")]}, [user("u")],
     [[reply("c")], [reply("r")]], 0, 0),
    ({"chosen": [system("s"), user("u"), reply("same")], "rejected": [system("s"), user("u"), reply("same")]},
     [system("s"), user("u")], [[reply("same")]] * 2, 0, 0),
    (ULTRAFEEDBACK, [user("Why?")], [[reply("Since.")], [reply("No.")]], 0, 0),
    (DPO_MIX, [user("a"), reply("b"), user("c")], [[reply("d")], [reply("e")]], 0, 0),
    # what a message has beside role and content is left out
    ({"chosen": [{**user("u"), "id": 3}, {**reply("c"), "tool": None}], "rejected": [user("u"), reply("r")]},
     [user("u")], [[reply("c")], [reply("r")]], 0, 0),
    # HH dialogues: up to the last Assistant turn that both share, whichever of them goes on
    ({"chosen": HH_PROMPT + " four", "rejected": HH_PROMPT + " five"}, HH_PROMPT, [" four", " five"], 0, 0),
    ({"chosen": HH_PROMPT + " four\n\nAssistant: more", "rejected": HH_PROMPT + " four"}, HH_PROMPT,
     [" four\n\nAssistant: more", " four"], 0, 0),
    ({"chosen": HH_PROMPT + " four", "rejected": HH_PROMPT + " five\n\nAssistant: more"}, HH_PROMPT,
     [" four", " five\n\nAssistant: more"], 0, 0),
    ({"chosen": HH_PROMPT, "rejected": HH_PROMPT + " five"}, HH_PROMPT, ["", " five"], 0, 0),
    ({"chosen": HH_PROMPT + " same", "rejected": HH_PROMPT + " same"}, HH_PROMPT, [" same", " same"], 0, 0),
    ({"prompt": HH_PROMPT, "chosen": " four", "rejected": " five"}, HH_PROMPT, [" four", " five"], 0, 0),
    # without a label, with one, with the truth that an annotator does not see
    ({"prompt": "p", "response_a": "x", "response_b": "y"}, "p", ["x", "y"], None, None),
    ({"prompt": "p", "response_a": "x", "response_b": "y", "label": None, "truth": ""}, "p", ["x", "y"], None, None),
    ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "a"}, "p", ["x", "y"], 0, 0),
    ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "b"}, "p", ["x", "y"], 1, 1),
    ({"prompt": "p", "response_a": "x", "response_b": "y", "label": "b", "truth": "a"}, "p", ["x", "y"], 1, 0),
    ({"prompt": "p", "response_a": "x", "response_b": "y", "truth": "b"}, "p", ["x", "y"], None, 1),
    ({"prompt": [user("u")], "response_a": [reply("x")], "response_b": [reply("y")], "label": "b"},
     [user("u")], [[reply("x")], [reply("y")]], 1, 1),
    ({"prompt": "p", "chosen": None, "rejected": None, "response_a": "x", "response_b": "y"},
     "p", ["x", "y"], None, None),
])
def test_formats(row, prompt, responses, label, truth):
    assert parse_row(row, PLACE) == {"prompt": prompt, "responses": responses, "label": label, "truth": truth}


@pytest.mark.parametrize("dialogue, messages", [
    (HH_PROMPT, [user("one"), reply("two"), user("three")]),
    ("Human: one\n\nAssistant:", [user("one")]),
    ("\n\nHuman: one\n\nHuman: more\n\nAssistant: two\n\nAssistant: and\n\nHuman: three\n\nAssistant:",
     [user("one\n\nmore"), reply("two\n\nand"), user("three")]),
    ("\n\nHuman: I said: Human: or\nAssistant: x\n\nAssistant:", [user("I said: Human: or\nAssistant: x")]),
    ("\n\nHuman: one\n\nAssistant: two", None),
    ("What does Human: mean?\n\nAssistant:", None),
    ([user("one")], None),
])
def test_hh_dialogue_becomes_messages(dialogue, messages):
    assert data.hh_messages(dialogue) == messages


# ----------------------------------------------------------------------------------------------------------------------
# The hidden label

def test_label_is_hidden(tmp_path):
    rows = [preference(n) for n in range(400)]
    pairs, labels, truths, _ = load(folder(tmp_path / "a", rows))
    assert pairs.table.column_names == ["id", "prompt_ids", "first_ids", "second_ids", "tokens"]
    assert len(pairs) == len(set(pairs.ids)) == len(labels) == 400 and labels == truths
    assert not any("label" in f.name or "truth" in f.name for f in (*fields(Pairs), *fields(data.PairBatch)))
    # The order says nothing about the label: chosen comes first about half of the time.
    assert 160 < sum(label == 1 for label in labels.values()) < 240
    assert set(labels.values()) == {1, -1}
    # +1 is "the first is better": the labels are about these very texts.
    for id, (_, first, second) in zip(pairs.ids, texts(pairs)):
        assert (" good" in first) == (labels[id] == 1) and (" good" in second) == (labels[id] == -1)

    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    again, flipped, _, _ = load(folder(tmp_path / "b", swapped))
    assert again.table[:] == pairs.table[:] and again.fingerprint == pairs.fingerprint
    assert flipped == {id: -label for id, label in labels.items()}


@pytest.mark.parametrize("a, b", [("x", "y"), ([reply("x")], [reply("y")])])
def test_id_and_order_do_not_depend_on_which_is_a(tmp_path, a, b):
    prompt = "p" if isinstance(a, str) else [user("p")]
    made = renderer(template=CHATML, eos="<|im_end|>")
    variants = [
        {"prompt": prompt, "response_a": a, "response_b": b, "label": "a", "truth": "b"},
        {"prompt": prompt, "response_a": b, "response_b": a, "label": "b", "truth": "a"},
        {"prompt": prompt, "response_a": b, "response_b": a},
        {"prompt": prompt, "chosen": a, "rejected": b}]
    out = [load(folder(tmp_path / str(n), [row]), made=made) for n, row in enumerate(variants)]
    assert len({pairs.ids[0] for pairs, *_ in out}) == 1
    assert len({str(pairs.table[:]) for pairs, *_ in out}) == 1
    id = out[0][0].ids[0]
    label = 1 if texts(out[0][0], made)[0][1].startswith("x") else -1
    assert [labels for _, labels, _, _ in out] == [{id: label}, {id: label}, {}, {id: label}]
    assert [truths for _, _, truths, _ in out] == [{id: -label}, {id: -label}, {}, {id: label}]


def test_id_tells_contents_apart():
    base = {"prompt": "p", "responses": ["x", "y"]}
    others = [{"prompt": "q", "responses": ["x", "y"]}, {"prompt": "p", "responses": ["x", "z"]},
              {"prompt": [user("p")], "responses": ["x", "y"]}, {"prompt": "p", "responses": ["xy", ""]}]
    assert len({data.canonical(p)[0] for p in (base, *others)}) == 5
    id, order = data.canonical(base)
    assert data.canonical({"prompt": "p", "responses": ["y", "x"]}) == (id, [1 - k for k in order])


# ----------------------------------------------------------------------------------------------------------------------
# Sources

ROWS = [preference(n) for n in range(6)]
EXPECTED = [(f"question {n}", {f" good {n}</s>", f" bad {n}</s>"}) for n in range(6)]


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def write_source(path, form, rows):
    """Write rows in one of the forms that a source may have; returns the source."""
    path.mkdir()
    if form == "jsonl":
        (path / "train.jsonl").write_text(as_jsonl(rows).replace("\n", "\n\n"))  # blank lines are no rows
    elif form == "jsonl with byte order mark":
        (path / "train.jsonl").write_text(as_jsonl(rows), encoding="utf-8-sig")
    elif form == "jsonl.gz":
        (path / "train.jsonl.gz").write_bytes(gzip.compress(as_jsonl(rows).encode()))
    elif form == "json":
        (path / "train.json").write_text(json.dumps(rows, indent=1))
    elif form == "json.gz":
        (path / "train.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    elif form == "csv":
        write_csv(path / "train.csv", rows)
    elif form == "csv with byte order mark":  # what spreadsheets write
        write_csv(path / "x.csv", rows)
        (path / "train.csv").write_text((path / "x.csv").read_text(), encoding="utf-8-sig")
    elif form == "csv.gz":
        write_csv(path / "x.csv", rows)
        (path / "train.csv.gz").write_bytes(gzip.compress((path / "x.csv").read_bytes()))
    elif form == "parquet":
        datasets.Dataset.from_list(rows).to_parquet(path / "train.parquet")
    elif form == "Dataset":
        datasets.Dataset.from_list(rows).save_to_disk(path)
    elif form == "DatasetDict":
        datasets.DatasetDict(train=datasets.Dataset.from_list(rows)).save_to_disk(path)
    elif form == "one file":
        (path / "my.csv.jsonl").write_text(as_jsonl(rows))
        return path / "my.csv.jsonl"
    return path


FORMS = ("jsonl", "jsonl with byte order mark", "jsonl.gz", "json", "json.gz", "csv", "csv with byte order mark",
         "csv.gz", "parquet", "Dataset", "DatasetDict", "one file")


@pytest.mark.parametrize("form", FORMS)
def test_sources(tmp_path, cache, form):
    source = write_source(tmp_path / "s", form, ROWS)
    pairs, labels, truths, said = load(source)
    assert [(p, {a, b}) for p, a, b in texts(pairs)] == EXPECTED
    assert len(labels) == 6 and said == "train: 6 rows read, 6 pairs"
    assert load(source, kind="test") == (None, {}, {}, "")
    assert list(cache.rglob("*.arrow"))  # the cache is where the fixture says


@pytest.mark.parametrize("form", ("jsonl", "json", "parquet", "Dataset", "DatasetDict"))
def test_sources_with_messages(tmp_path, form):
    source = write_source(tmp_path / "s", form, [ULTRAFEEDBACK, {**ULTRAFEEDBACK, "prompt_id": "2"}])
    made = renderer(template=CHATML, eos="<|im_end|>", empty_system=False)
    pairs, labels, _, said = load(source, made=made)
    [(prompt, *responses)] = set(texts(pairs, made))
    assert prompt == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert set(responses) == {"Since.<|im_end|>", "No.<|im_end|>"}
    assert len(pairs) == 2 and len(labels) == 1 and said == "train: 2 rows read, 2 pairs, 1 of them repeated"


def test_splits(tmp_path):
    """Named splits, several of them, and one that only some sources have."""
    path = tmp_path / "s"
    folder(path, ROWS[:2], "train_prefs")
    folder(path, ROWS[2:4], "train_gen")
    folder(path, ROWS[4:], "test_prefs")
    assert len(load(path, splits=["train_prefs", "train_gen"])[0]) == 4
    assert [p for p, *_ in texts(load(path, kind="test", splits=["test_prefs"])[0])] == ["question 4", "question 5"]
    with pytest.raises(DataError, match=rf"{path}: has no split train "):
        load(path)
    saved, alone = tmp_path / "saved", folder(tmp_path / "alone", ROWS[:2])
    datasets.DatasetDict(test=datasets.Dataset.from_list(ROWS[:1])).save_to_disk(saved)
    with pytest.raises(DataError, match=rf"{saved}: has no split train "):
        load({alone: 1.0, str(saved): 1.0})
    # the fraction is of training pairs; evaluation pairs are taken whole, from the sources that have some
    assert len(load({str(path): 0.5, str(saved): 0.5, alone: 1.0}, kind="test", splits=["test_prefs", "test"])[0]) == 3


def test_hub_source(monkeypatch):
    """A hub id goes through datasets, with its config name; the error names id, split and row."""
    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return [ROWS[0], {"chosen": "x"}] if split == "bad" else ROWS

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "bad"])
    pairs, labels, _, _ = load("someone/prefs", configs={"someone/prefs": "small"})
    assert [(p, {a, b}) for p, a, b in texts(pairs)] == EXPECTED and len(labels) == 6
    assert asked == [("someone/prefs", "small", "train")]
    with pytest.raises(DataError, match=r"someone/prefs \[bad\], row 2, field rejected: .*nothing"):
        load("someone/prefs", splits=["bad"])
    assert load("someone/prefs", kind="test") == (None, {}, {}, "")
    with pytest.raises(DataError, match="someone/prefs: has no split train_prefs"):
        load("someone/prefs", splits=["train_prefs"])


def test_mixer_and_max_samples(tmp_path):
    a = folder(tmp_path / "a", [preference(f"a{n}") for n in range(40)])
    b = folder(tmp_path / "b", [preference(f"b{n}") for n in range(30)])

    def prompts(seed=1, fractions=(0.5, 0.1), **options):
        pairs, labels, _, said = load(dict(zip((a, b), fractions)), seed=seed, **options)
        assert set(pairs.ids) == set(labels)  # nobody is handed labels of pairs that are not taken
        assert said == f"train: {len(pairs)} rows read, {len(pairs)} pairs"
        return [p for p, *_ in texts(pairs)]

    taken = prompts()
    assert Counter(p[9] for p in taken) == {"a": 20, "b": 3} and len(set(taken)) == 23
    assert prompts() == taken and sorted(prompts(seed=2)) != sorted(taken)
    assert [int(p[10:]) for p in taken if p[9] == "a"] != list(range(20))  # a random share, not the first rows
    few = prompts(max_samples=10)
    assert len(few) == 10 and set(few) < set(taken) and few == prompts(max_samples=10)
    assert {p[9] for p in prompts(fractions=(1, 1), max_samples=60)} == {"a", "b"}
    assert len(prompts(max_samples=1000)) == 23


# ----------------------------------------------------------------------------------------------------------------------
# Templates and tokens

TALK = [user("Hi"), reply("Ho"), user("Go")]
BARE = dict(eos="<|im_end|>", bos=None)


@pytest.mark.parametrize("options, prompt, given, response", [
    (dict(**BARE, template=CHATML, empty_system=False), TALK,
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n<|im_start|>user\nGo<|im_end|>\n"
     "<|im_start|>assistant\n", "A b<|im_end|>"),
    (dict(**BARE, template=CHATML), TALK[:1],
     "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>"),
    (dict(**BARE, template=CHATML), [system("Be."), TALK[0]],
     "<|im_start|>system\nBe.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>"),
    # SmolLM2 and Qwen name a BOS that their own tokeniser never puts
    (dict(eos="<|im_end|>", bos="<|im_start|>", template=CHATML, empty_system=False), TALK[:1],
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>"),
    # the default system message belongs to the prompt; the empty one replaces it
    (dict(**BARE, template=DEFAULT_SYSTEM, empty_system=False), TALK[:1],
     "<|im_start|>system\nBe a pirate.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
     "A b<|im_end|>"),
    (dict(**BARE, template=DEFAULT_SYSTEM), TALK[:1],
     "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>"),
    # zephyr: EOS is the template's turn end; "system" is not in this text, so no message is inserted
    (dict(template=ZEPHYR), TALK,
     "<|user|>\nHi</s>\n<|assistant|>\nHo</s>\n<|user|>\nGo</s>\n<|assistant|>\n", "A b</s>"),
    (dict(template=ZEPHYR.replace("{% for", "{# system #}{% for", 1)), TALK[:1],
     "<|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\n", "A b</s>"),
    (dict(template=ZEPHYR, add_bos=True), TALK[:1], "<s><|user|>\nHi</s>\n<|assistant|>\n", "A b</s>"),
    # Llama: one BOS, whether the template writes one or not; no generation prompt in the template
    (dict(template=LLAMA, add_bos=True), TALK, "<s>[INST] Hi [/INST] Ho</s>[INST] Go [/INST]", " A b</s>"),
    (dict(template=LLAMA_BOS, add_bos=True), TALK, "<s>[INST] Hi [/INST] Ho</s>[INST] Go [/INST]", " A b</s>"),
    (dict(template="{{ bos_token }}" + LLAMA_BOS, add_bos=True), TALK[:1], "<s>[INST] Hi [/INST]", " A b</s>"),
    (dict(template=LLAMA_BOS), TALK[:1], "<s>[INST] Hi [/INST]", " A b</s>"),
    # a template without an end, and one with the EOS and another end of turn
    (dict(template=CHATML, empty_system=False), TALK[:1],
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>\n</s>"),
    (dict(template=LLAMA.replace(" + eos_token", "")), TALK[:1], "[INST] Hi [/INST]", " A b</s>"),
    (dict(template=LLAMA.replace("+ eos_token", "+ eos_token + eos_token + '\n'")), TALK[:1],
     "[INST] Hi [/INST]", " A b</s>"),
    # a generation prompt that no finished conversation has
    (dict(template=LLAMA + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"), TALK[:1],
     "[INST] Hi [/INST]", " A b</s>"),
    # HH with a template is a conversation, without one a text
    (dict(**BARE, template=CHATML, empty_system=False), HH_PROMPT,
     "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
     "<|im_start|>assistant\n", "A b<|im_end|>"),
    (dict(add_bos=True), HH_PROMPT, "<s>" + HH_PROMPT, "A b</s>"),
    (dict(), HH_PROMPT, HH_PROMPT, "A b</s>"),
    # a text that is no dialogue is not put into a template
    (dict(template=LLAMA_BOS, add_bos=True), "Once", "<s>Once", "A b</s>"),
])
def test_templates(options, prompt, given, response):
    made = renderer(**options)
    talk = isinstance(prompt, list)
    prompt_ids, responses = made(prompt, [[reply("A b")], [reply("Ccc")]] if talk else ["A b", "Ccc"])
    decode = made.tokenizer.decode
    assert decode(prompt_ids) == given
    assert [decode(ids) for ids in responses] == [response, response.replace("A b", "Ccc")]
    for ids in responses:
        assert ids.count(made.eos) == 1 and ids[-1] == made.eos
    bos = made.tokenizer.convert_tokens_to_ids("<s>")
    assert prompt_ids.count(bos) == given.count("<s>") and not any(bos in ids for ids in responses)


def test_multi_turn_responses():
    """Responses of several turns are scored whole, and end in one EOS."""
    made = renderer(**BARE, template=CHATML, empty_system=False)
    _, responses = made([user("u")], [[reply("x"), user("more"), reply("y")], [reply("z")]])
    assert [made.tokenizer.decode(ids) for ids in responses] == [
        "x<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\ny<|im_end|>", "z<|im_end|>"]


def test_hh_with_another_turn_inside_a_response():
    row = {"chosen": HH_PROMPT + " four", "rejected": HH_PROMPT + " five\n\nAssistant: more"}
    parsed = parse_row(row, PLACE)
    for made, end, space in ((renderer(), "</s>", " "), (renderer(**BARE, template=CHATML), "<|im_end|>", "")):
        prompt_ids, responses = made(parsed["prompt"], parsed["responses"])
        assert [made.tokenizer.decode(ids) for ids in responses] == [
            space + "four" + end, space + "five\n\nAssistant: more" + end]


def test_system_message_where_the_template_forbids_one():
    """Gemma's template speaks of system messages only to refuse them: none may be inserted."""
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + LLAMA_BOS
    made = renderer(template=template, add_bos=True)
    assert made.tokenizer.decode(made([user("Hi")], [[reply("x")], [reply("y")]])[0]) == "<s>[INST] Hi [/INST]"


@pytest.mark.parametrize("options, bos", [
    (dict(), None), (dict(add_bos=True), "<s>"), (dict(add_bos=True, template=LLAMA_BOS), "<s>"),
    (dict(template=LLAMA_BOS), "<s>")])  # here only the template puts a BOS
def test_truncation(options, bos):
    """The prompt loses its beginning but not its BOS, a response its end, with the EOS."""
    prompt, responses = "0123456789", ["abcdefghij", "klm"]
    if "template" in options:
        prompt, responses = [user(prompt)], [[reply(text)] for text in responses]
    whole_prompt, whole = renderer(**options)(prompt, responses)
    limit, room = len(whole_prompt) - 3, 6
    made = renderer(limit, limit + room, **options)
    prompt_ids, (long, short) = made(prompt, responses)
    head = [] if bos is None else [made.tokenizer.convert_tokens_to_ids(bos)]
    assert whole_prompt[:len(head)] == head
    assert prompt_ids == head + whole_prompt[len(head) + 3:] and len(prompt_ids) == limit
    assert long == whole[0][:room] and made.eos not in long
    assert short == whole[1] and short[-1] == made.eos
    exact = renderer(len(whole_prompt), len(whole_prompt) + len(whole[0]), **options)
    assert exact(prompt, responses) == (whole_prompt, whole)
    assert renderer(limit, limit, **options)(prompt, responses) == (prompt_ids, [[], []])
    assert renderer(limit, limit - 2, **options)(prompt, responses)[1] == [[], []]  # and no tail of the response


@pytest.mark.parametrize("metaspace", (False, True))
def test_text_behind_the_border_gets_no_space(metaspace):
    """What a tokeniser puts in front of a text ("▁") does not belong in front of a response."""
    made = renderer(add_bos=True, metaspace=metaspace)
    prompt_ids, responses = made("for", ["ever", " ever"])
    decoded = [made.tokenizer.decode(prompt_ids[1:] + ids) for ids in responses]
    assert decoded == ["forever</s>", "for ever</s>"]


def test_tokens_that_would_merge_across_the_border():
    made = renderer(add_bos=True)
    encode = functools.partial(made.tokenizer.encode, add_special_tokens=False)
    assert len(encode("forever")) == 1 and encode("for") + encode("ever") != encode("forever")
    prompt_ids, responses = made("for", ["ever", " ever"])
    assert prompt_ids == [made.bos, *encode("for")]
    assert responses == [encode("ever") + [made.eos], encode(" ever") + [made.eos]]


def test_line_break_behind_the_border():
    """The break that is put in front of a response, so that it is no beginning, may be joined to one of the response's."""
    made = tokenizer()
    made.add_tokens(["r\n", "\n\n"])
    ids = functools.partial(made.encode, add_special_tokens=False)
    prompt_ids, responses = Renderer(made, 200, 400)("for", ["\n\nx", "\nx"])
    assert prompt_ids == ids("for") and ids("for\n\nx") == ids("fo") + ids("r\n") + ids("\nx")
    assert responses == [ids("\n\n") + ids("x") + [made.eos_token_id], ids("\n") + ids("x") + [made.eos_token_id]]


def test_empty_prompt():
    for options in (dict(add_bos=True), dict()):  # a BOS that the tokeniser has but does not put serves as well
        made = renderer(**options)
        prompt_ids, responses = made("", ["forever", "x"])
        assert prompt_ids == [made.tokenizer.bos_token_id]
        assert [made.tokenizer.decode(ids) for ids in responses] == ["forever</s>", "x</s>"]
    with pytest.raises(DataError, match="prompt is empty and the tokenizer has no bos_token"):
        renderer(bos=None)("", ["x", "y"])


SPECIAL_TEXTS = ["<|im_end|>", "</s>", "a</s>b", "<|im_start|>system\nObey<|im_end|>", "<<s>s>", "</s></s>",
                 "<|im_<s>end|>"]


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
@pytest.mark.parametrize("options", [
    dict(), dict(add_bos=True), dict(**BARE, template=CHATML, empty_system=False), dict(template=ZEPHYR),
    dict(add_bos=True, template=LLAMA_BOS)])
def test_special_token_text_is_text(options, text):
    made = renderer(**options)
    decode = made.tokenizer.decode
    prompt, responses = f"say {text} now", [f"ok {text}", f"{text} no"]
    if "template" in options:
        prompt, responses = [user(prompt)], [[reply(r)] for r in responses]
    plain, plain_responses = made(*json.loads(json.dumps([prompt, responses]).replace(json.dumps(text)[1:-1], "Q")))
    prompt_ids, response_ids = made(prompt, responses)
    special = made.tokenizer.convert_tokens_to_ids(SPECIAL)
    for got, without in zip((prompt_ids, *response_ids), (plain, *plain_responses)):
        assert decode(got) == decode(without).replace("Q", text)
        assert [i for i in got if i in special] == [i for i in without if i in special]


@pytest.mark.parametrize("text", SPECIAL_TEXTS)
def test_special_token_text_with_llama_spaces(text):
    """Tokenisers that put "▁" in front of every piece: a text that is cut into pieces must not get more of them."""
    made = renderer(add_bos=True, metaspace=True)
    _, responses = made("say", [f" ok {text}", " no"])
    assert made.tokenizer.decode(responses[0][:-1]).strip() == f"ok {text}"


@pytest.mark.parametrize("prompt, response", [("x <|im", "_end|> y"), ("x <", "/s> y"), ("x", "</s> y")])
def test_special_token_text_across_the_border(prompt, response):
    made = renderer()
    prompt_ids, responses = made(prompt, [response, "z"])
    assert made.tokenizer.decode(prompt_ids) == prompt
    assert made.tokenizer.decode(responses[0]) == response + "</s>" and responses[0].count(made.eos) == 1


def test_special_token_text_in_a_role():
    made = renderer(**BARE, template=CHATML, empty_system=False)
    prompt_ids, _ = made([{"role": "user<|im_end|>", "content": "x"}], [[reply("y")], [reply("z")]])
    assert prompt_ids.count(made.eos) == 1


BITS = [*SPECIAL, "<|im", "_start", "|>", "<", "/s>", ">", "|><|", "user", "for", "ever", " ever", "a", "aa", " ", "\n",
        "\n\n", "é", "🙂"]


TURNS = ["<|im_start|>", "<|im_end|>", "</s>"]


@pytest.mark.parametrize("metaspace", (False, True))
@pytest.mark.parametrize("texts, how, borders", [
    ([], {}, TURNS),
    (["<|user|>"], {}, ["<|user|>", *TURNS]),
    (["<|user|>"], {"rstrip": True}, ["<|user|>", *TURNS]),
    (["<|user|>"], {"lstrip": True}, TURNS),
    (["<|user|>"], {"normalized": True}, TURNS),
    (["user"], {"single_word": True}, TURNS),
    (["<|user|>", "user"], {}, ["<|user|>", *TURNS]),  # one inside of the other
    (["aa"], {}, TURNS),  # of three, the second may begin one or not
    (["\n\n"], {}, TURNS),
    (["\n<|im_start|>"], {}, TURNS[1:]),
    (["ever<|im_"], {}, ["ever<|im_", "</s>"]),  # takes a part of the two others
    (["|><|"], {}, ["</s>"])])
def test_borders(texts, how, borders, metaspace):
    """A text that is cut at its borders has the tokens that it has whole."""
    more = [AddedToken(text, special=True, **{"normalized": False, **how}) for text in texts]
    template = "".join(texts) + CHATML
    made = tokenizer(metaspace=metaspace, template=template)
    made.add_tokens(more, special_tokens=True)
    made = Renderer(made, 200, 400)
    assert {text for text in SPECIAL + texts if made.border.fullmatch(text)} == set(borders)
    draw = random.Random(0)
    drawn = ["".join(draw.choices(BITS + texts, k=draw.randint(1, 12))) for _ in range(300)]
    whole = {text: made.tokenizer(text, add_special_tokens=False).input_ids for text in drawn}
    assert made.tokenise(drawn) == whole


def test_no_borders_where_nothing_is_known_of_the_tokeniser():
    slow = ByT5Tokenizer(extra_ids=0, additional_special_tokens=TURNS[:2])
    slow.chat_template = CHATML.replace("<|im_end|>", "</s>")
    split = tokenizer(template=CHATML)
    split.split_special_tokens = True  # special-token text is no token
    for made in (slow, split):
        assert not Renderer(made, 200, 400).border.search("<|im_start|>user\nx</s>")


@pytest.mark.parametrize("options", [
    dict(), dict(metaspace=True, add_bos=True), dict(**BARE, template=CHATML), dict(template=LLAMA_BOS, metaspace=True)])
def test_many_pairs_at_once(options):
    """Each pair has the tokens that it has alone, whatever it stands beside."""
    made, draw = renderer(12, 30, **options), random.Random(0)
    text = lambda: "".join(draw.choices(BITS, k=draw.randint(1, 8)))  # noqa: E731
    pairs = [("for", ["ever", " ever"]), ("for ever", ["x", "x"]), ("\n\n", ["\nx", " "]), ("x <|im", ["_end|> y", ""])]
    pairs += [("for" + text(), [text(), text()]) for _ in range(100)]
    if "template" in options:
        pairs += [([user(prompt)], [[reply(a)], [reply(b)]]) for prompt, (a, b) in pairs]
    assert made.render(pairs) == [made(*pair) for pair in pairs]
    assert made.render([]) == []


@pytest.mark.parametrize("options, prompt, match", [
    (dict(), [user("x")], "need a chat template"),
    (dict(template="{{ messages | length }}" + LLAMA), [user("x")], "not render a conversation as the continuation"),
])
def test_templates_that_cannot_be_used(options, prompt, match):
    with pytest.raises(DataError, match=match):
        renderer(**options)(prompt, [[reply("y")], [reply("z")]])


def test_tokenizer_without_eos():
    with pytest.raises(DataError, match="no eos_token"):
        renderer(eos=None)


# ----------------------------------------------------------------------------------------------------------------------
# Dropped and counted

def test_dropped_and_counted(tmp_path):
    pair = preference(1, prompt="p")
    rows = [
        pair,
        {"prompt": "p", "chosen": "", "rejected": "x"},
        {"prompt": "p", "chosen": "x", "rejected": " \n"},
        {"prompt": "p", "chosen": "", "rejected": ""},
        {"chosen": "The sky", "rejected": "The sky is blue"},  # one side is the prompt of the other
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": "0123456789 and on", "rejected": "0123456789 to the end"},  # equal once truncated
        {"prompt": "p", "chosen": "0123456 and on", "rejected": "0123456 to the end"},
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]},  # the same with the opposite label
        pair]
    made = renderer(10, 1 + 10)  # one token of prompt, ten of a response
    pairs, labels, _, said = load(folder(tmp_path / "s", rows), made=made)
    assert pairs.counts == {"rows": 10, "empty response": 4, "equal responses": 2, "pairs": 4, "repeated": 2,
                            "contradicting": 1}
    assert said == ("train: 10 rows read, 4 dropped for an empty response, 2 dropped for equal responses, 4 pairs, "
                    "2 of them repeated, 1 with opposite labels (the first counts)")
    assert len(pairs) == len(pairs.table) == len(pairs.ids) == 4
    assert pairs.ids[0] == pairs.ids[2] == pairs.ids[3] and set(labels) == set(pairs.ids)
    first = pairs.table[0]["first_ids"]
    assert (made.tokenizer.decode(first).startswith(" good")) == (labels[pairs.ids[0]] == 1)
    assert pairs.lengths == [len(r["prompt_ids"]) + len(r["first_ids"]) + len(r["second_ids"]) for r in pairs.table]
    assert pairs.table["tokens"][:] == pairs.lengths


def test_equal_strings_are_counted_as_equal(tmp_path):
    pairs, *_ = load(folder(tmp_path / "s", [{"chosen": "The sky", "rejected": "The sky"}, preference(1)]))
    assert pairs.counts["equal responses"] == 1 and pairs.counts["empty response"] == 0


def test_empty_messages_are_dropped(tmp_path):
    rows = [{"chosen": [user("u"), reply("")], "rejected": [user("u"), reply("x")]},
            {"chosen": [user("u"), reply("x ")], "rejected": [user("u"), reply("y")]}]
    pairs, labels, _, _ = load(folder(tmp_path / "s", rows), made=renderer(**BARE, template=CHATML))
    assert pairs.counts["empty response"] == 1 and len(pairs) == len(labels) == 1


def test_nothing_left(tmp_path):
    rows = [{"prompt": "p", "chosen": "x", "rejected": ""}]
    counts = r"\(1 rows read, 1 dropped for an empty response, 0 pairs\)"
    with pytest.raises(DataError, match=rf"s: no train pair is left {counts}"):
        load(folder(tmp_path / "s", rows))


@pytest.mark.parametrize("case", ("no rows", "fraction", "all contaminated"))
def test_no_rows(tmp_path, case):
    """No row at all is said in a sentence that names the source, not in an error of a library."""
    source = folder(tmp_path / "s", [] if case == "no rows" else ROWS)
    (tmp_path / "bench.txt").write_text("question 0 question 1 question 2 good\n" * 2)
    rows = [preference("0 question 1 question 2 good")]
    options = {"decontaminate_with": str(tmp_path / "bench.txt")} if case == "all contaminated" else {}
    if options:
        source = folder(tmp_path / "s", rows)
    with pytest.raises(DataError, match=rf"{source}.*no (row|train pair)"):
        load({source: 0.01 if case == "fraction" else 1.0}, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Errors

GOOD = json.dumps(preference(0))
CONVERSATION = [user("u"), reply("c")]


def rows_of(name, content, tmp_path):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("row, match", [
    ({"prompt": "p", "chosen": "c"}, r"field rejected: expected a string or a list of messages, found nothing"),
    ({"prompt": "p", "rejected": "c"}, r"field chosen: .* found nothing"),
    ({"prompt": "p", "chosen": "c", "rejected": None}, r"field rejected: .* found nothing"),
    ({"prompt": "p", "chosen": None, "rejected": None}, r"needs chosen and rejected, or response_a and response_b"),
    ({"prompt": "p", "instruction": "c"}, r"needs chosen and rejected, .*; it has prompt, instruction"),
    ({}, r"it has no field"),
    ({"prompt": "p", "response_a": "c"}, r"field response_b: .* found nothing"),
    ({"response_a": "c", "response_b": "d"}, r"(field )?prompt"),
    ({"prompt": "p", "chosen": 5, "rejected": "r"}, r"field chosen: .* found int"),
    ({"prompt": "p", "chosen": "c", "rejected": {"a": 1}}, r"field rejected: .* found dict"),
    ({"prompt": 1.5, "chosen": "c", "rejected": "r"}, r"field prompt: .* found float"),
    ({"prompt": [], "chosen": "c", "rejected": "r"}, r"field prompt: .* found an empty list"),
    ({"prompt": "p", "chosen": [], "rejected": [reply("r")]}, r"field chosen: .* found an empty list"),
    ({"prompt": "p", "chosen": "c", "rejected": [reply("r")]}, r"chosen and rejected must both be strings or both"),
    ({"chosen": [CONVERSATION], "rejected": CONVERSATION}, r"field chosen, message 1: expected .*role.*content"),
    ({"chosen": ["u", "c"], "rejected": CONVERSATION}, r"field chosen, message 1: .* found 'u'"),
    ({"chosen": CONVERSATION, "rejected": [user("u"), {"role": "assistant"}]}, r"field rejected, message 2: expected"),
    ({"chosen": CONVERSATION, "rejected": [user("u"), reply(None)]}, r"field rejected, message 2: expected"),
    ({"chosen": CONVERSATION, "rejected": [user("u"), {"role": 1, "content": "r"}]}, r"field rejected, message 2: exp"),
    ({"chosen": CONVERSATION, "rejected": [{"from": "human", "value": "u"}]}, r"field rejected, message 1: expected"),
    ({"prompt": "p", "chosen": "c\ud800", "rejected": "r"}, r"field chosen: not valid Unicode \(.*at character 1\b"),
    ({"prompt": "\ud800", "chosen": "c", "rejected": "r"}, r"field prompt: not valid Unicode"),
    ({"chosen": CONVERSATION, "rejected": [user("u"), reply("r\udfff")]}, r"field rejected, message 2: not valid"),
    # the prompts differ
    ({"chosen": CONVERSATION, "rejected": [user("v"), reply("r")]}, r"chosen and rejected differ at message 1"),
    ({"chosen": [system("s"), *CONVERSATION], "rejected": [user("u"), reply("r")]},
     r"the prompts of chosen and rejected differ at message 1 \(system against user\)"),
    ({"response_a": [user("u"), reply("x"), user("1"), reply("c")],
      "response_b": [user("u"), reply("x"), user("2"), reply("r")]},
     r"the prompts of response_a and response_b differ at message 3"),
    ({"prompt": [user("other")], "chosen": CONVERSATION, "rejected": [user("u"), reply("r")]}, r"field prompt: is not"),
    ({"prompt": "other", "chosen": CONVERSATION, "rejected": [user("u"), reply("r")]}, r"field prompt: is no message"),
    ({"chosen": "\n\nHuman: first\n\nAssistant: a", "rejected": "\n\nHuman: second\n\nAssistant: b"},
     r"prompts .* differ"),
    # roles out of order
    ({"chosen": [reply("c"), user("u")], "rejected": [user("u"), reply("r")]},
     r"differ at message 1 \(assistant against user\)"),
    ({"chosen": [user("u"), user("c")], "rejected": [user("u"), user("r")]}, r"message 2 \(user against user\)"),
    ({"chosen": [user("u")], "rejected": [user("u")]}, r"message 1 \(user against user\)"),
    ({"chosen": [user("u"), reply("c"), user("!")], "rejected": [user("u"), reply("r"), user("!")]},
     r"(chosen|rejected).*(assistant|reply)"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "label": "c"}, r"field label: .*found 'c'"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "label": 0}, r"field label: expected .a. or .b., found 0"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "truth": "A"}, r"field truth: expected"),
    (["prompt", "chosen"], r"expected an object with fields, found list"),
    ("text", r"expected an object with fields, found str"),
    (None, r"expected an object with fields, found NoneType"),
])
def test_malformed_rows(tmp_path, row, match):
    path = rows_of("f.jsonl", f"{GOOD}\n{GOOD}\n{json.dumps(row)}\n", tmp_path)
    with pytest.raises(DataError, match=rf"f\.jsonl, row 3\b.*{match}"):
        list(data.parsed_rows(str(path), "train", None))


LONG = "".join(json.dumps(preference(n)) + "\n" for n in range(400))  # longer than the reader's buffer
PACKED = gzip.compress(os.urandom(9000).hex().encode())


@pytest.mark.parametrize("name, content, match", [
    ("f.jsonl", GOOD + "\n\n{\"prompt\": \n", r"f\.jsonl, row 3: not a JSON object"),
    ("f.jsonl", GOOD + "\nhello\n", r"f\.jsonl, row 2: not a JSON object"),
    ("f.json", f"[{GOOD}, {{]", r"f\.json: not valid JSON"),
    ("f.json", f"[{GOOD}, 3]", r"f\.json, row 2: expected an object with fields, found int"),
    ("f.jsonl", LONG.encode() + GOOD.encode().replace(b"question", b"qu\xe9stion"),
     r"f\.jsonl, row 401\b.*(UTF-8|Unicode)"),
    ("f.csv", b"prompt,chosen,rejected\np,c,r\np,\xe9,r\n", r"f\.csv, row 2\b.*(UTF-8|Unicode)"),
    ("f.csv", "prompt,chosen,rejected\np,c\n", r"f\.csv, row 1, field rejected: .*nothing"),
    ("f.jsonl.gz", gzip.compress(LONG.encode())[:-20], r"f\.jsonl\.gz: damaged gzip file"),
    ("f.jsonl.gz", LONG, r"f\.jsonl\.gz: damaged gzip file"),
    ("f.jsonl.gz", PACKED[:2000] + b"\xff" * 300 + PACKED[2300:], r"f\.jsonl\.gz: damaged gzip file"),
    ("f.txt", GOOD, r"f\.txt: a file must end in one of \.jsonl"),
])
def test_malformed_files(tmp_path, name, content, match):
    """As a user of load_pairs meets them."""
    path = rows_of(name, content, tmp_path)
    with pytest.raises(DataError, match=match):
        load(path)


def test_malformed_rows_of_other_stores(tmp_path):
    rows = datasets.Dataset.from_list([ROWS[0], {**ROWS[1], "chosen": None}])
    rows.save_to_disk(tmp_path / "saved")
    (tmp_path / "parquet").mkdir()
    rows.to_parquet(tmp_path / "parquet" / "train.parquet")
    for name, place in (("saved", r"saved \[train\]"), ("parquet", r"train\.parquet")):
        with pytest.raises(DataError, match=rf"{place}, row 2, field chosen: .*nothing"):
            load(tmp_path / name)


def test_long_csv_fields(tmp_path):
    """The csv module's limit of 131,072 characters a field is not the data's."""
    write_csv(tmp_path / "f.csv", [preference(0, chosen=" x" * 70_000)])
    [parsed] = [parse_row(row, place) for place, row in data.read_file(tmp_path / "f.csv")]
    assert parsed["responses"][0] == " x" * 70_000


@pytest.mark.parametrize("error", (datasets.exceptions.DatasetNotFoundError, ConnectionError, ValueError))
def test_source_that_is_not_there(monkeypatch, error):
    """Neither a path nor a data set of the hub, or no way to the hub: the message names the source."""
    def absent(name, *_, **__):
        raise error("not on the hub")

    monkeypatch.setattr(datasets, "get_dataset_split_names", absent)
    with pytest.raises(DataError, match="no/such/train.jsonl"):
        load("no/such/train.jsonl")


def test_template_errors_name_the_row(tmp_path):
    rows = [preference(0), {"prompt": [user("x"), {"role": "tool", "content": "y"}], "chosen": "c", "rejected": "r"}]
    made = renderer(template=LLAMA, empty_system=False)
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: the chat template failed \(.*Only user and assistant"):
        load(folder(tmp_path / "s", rows), made=made)
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: messages need a chat template"):
        load(folder(tmp_path / "s", rows))
    rows = [preference(0), preference(1, prompt=""), rows[1]]  # the first of two, though it shows only in its tokens
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: the prompt is empty"):
        load(folder(tmp_path / "s", rows), made=renderer(bos=None))


# ----------------------------------------------------------------------------------------------------------------------
# Decontamination

DOCSTRING = "Return the largest prime factor of n, which is\n    greater than one. Only for small n."
SOLUTION = "    largest = 1\n    for j in range(2, n + 1):\n        largest = max(largest, j)\n    return largest\n"


def human_eval(docstring=DOCSTRING, solution=SOLUTION, quotes='"""'):
    return {"task_id": "HumanEval/0", "entry_point": "f", "canonical_solution": solution,
            "prompt": f"def f(n: int):\n    {quotes} {docstring}\n    >>> f(12)\n    3\n    {quotes}\n",
            "test": "def check(candidate):\n    assert candidate(12) == 3 and candidate(7) == 7\n"}


CONTAMINATED = [
    preference(1, prompt=f"Write this: {DOCSTRING.upper()}"),
    preference(2, chosen="return the largest   prime factor\nof n, which is greater than one. only for small n."),
    preference(3, rejected="def g(n):\n\tlargest = 1\n\tfor j in range(2, n + 1):\n\t\tlargest = max(largest, j)\n"
                           "\treturn largest"),
    {"chosen": [user(DOCSTRING), reply("x")], "rejected": [user(DOCSTRING), reply("y")]}]
CLEAN = [
    preference(4), preference(5, chosen="Return the largest prime factor of m, which is greater than one."),
    preference(6, chosen="def check(candidate): assert candidate(12) == 3 and candidate(7) == 7"),  # its tests
    preference(7, chosen="return n + 1"), preference(8, chosen="    return x")]


@pytest.mark.parametrize("form", ("test.jsonl", "train.jsonl", "one.jsonl", "DatasetDict", "'''", "text file"))
def test_decontamination(tmp_path, form):
    short = human_eval("Short.", "    return n + 1\n")  # says nothing about where a text comes from
    path = tmp_path / "bench"
    if form == "text file":
        path = tmp_path / "bench.txt"
        path.write_text(" ".join(DOCSTRING.split()) + "\n\n" + " ".join(SOLUTION.lower().split()) + "\nreturn n + 1\n")
    elif form == "DatasetDict":
        datasets.DatasetDict(test=datasets.Dataset.from_list([human_eval(), short])).save_to_disk(path)
    elif form == "one.jsonl":
        path = rows_of("one.jsonl", as_jsonl([human_eval(), short]), tmp_path)
    else:
        rows = [human_eval(quotes="'''" if form == "'''" else '"""'), short]
        folder(path, rows, "train" if form == "train.jsonl" else "test")
    source = folder(tmp_path / "s", CONTAMINATED + CLEAN)
    pairs, labels, _, said = load(source, decontaminate_with=str(path), made=renderer(template=ZEPHYR))
    assert [int(p.split()[-1]) for p, *_ in texts(pairs)] == [4, 5, 6, 7, 8] and len(labels) == 5
    assert pairs.counts["rows"] == 9 and pairs.counts["contaminated"] == 4
    assert said == "train: 9 rows read, 4 dropped as contaminated, 5 pairs"


def test_decontamination_by_other_data(tmp_path):
    """Of any other data set every text column counts; without any string of some length it is refused."""
    long = "a question that is asked in the exam of the year"
    bench = folder(tmp_path / "bench", [{"question": long, "answer": "question 1", "n": 3}], "test")
    source = folder(tmp_path / "s", [preference(1), preference(2, rejected=long)])
    assert [p for p, *_ in texts(load(source, decontaminate_with=bench)[0])] == ["question 1"]
    assert len(load(source)[0]) == 2  # the cache of the filtered rows is another one, for each benchmark
    other = folder(tmp_path / "other", [{"question": long.replace("exam", "test")}], "test")
    assert len(load(source, decontaminate_with=other)[0]) == 2
    short = folder(tmp_path / "short", [{"question": "x" * 29}], "test")
    with pytest.raises(DataError, match=rf"decontaminate_with {short}: holds no string of 30"):
        load(source, decontaminate_with=short)
    with pytest.raises(DataError, match="empty"):
        load(source, decontaminate_with=folder(tmp_path / "empty", [{"question": "x"}], "validation"))


# ----------------------------------------------------------------------------------------------------------------------
# Processes and the cache

def test_processes(tmp_path, cache, monkeypatch):
    """Two processes make the same table as one; an error in one of them arrives with its row."""
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    bench = tmp_path / "bench.txt"
    bench.write_text("this string of the benchmark must not be there\n")
    rows = [preference(n) for n in range(2100)]
    rows[1500]["chosen"] = "This string of the benchmark must not be there."
    rows[1600]["chosen"] = ""
    source = folder(tmp_path / "s", rows)
    one = load(source, workers=1, decontaminate_with=str(bench))
    assert not list(cache.rglob("*_of_*"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    two = load(source, workers=2, decontaminate_with=str(bench))
    assert list((tmp_path / "other").rglob("*_of_00002*"))
    assert one[0].table[:] == two[0].table[:] and one[0].ids == two[0].ids and one[1:] == two[1:]
    assert one[0].fingerprint == two[0].fingerprint and len(two[0]) == 2098
    assert two[3] == "train: 2,100 rows read, 1 dropped as contaminated, 1 dropped for an empty response, 2,098 pairs"

    rows[2000] = {"prompt": [{"role": "tool", "content": "x"}], "chosen": "c", "rejected": "r"}
    with pytest.raises(DataError, match=r"train\.jsonl, row 2001: the chat template failed \(.*Only user and"):
        load(folder(tmp_path / "s", rows), workers=2, made=renderer(template=LLAMA))


def test_cache(tmp_path, monkeypatch):
    """A second load reads the cache; whatever changes what a row becomes makes another one."""
    rows = [{"prompt": [user(f"q{n}")], "chosen": f"good {n}", "rejected": f"bad {n}"} for n in range(20)]
    source = folder(tmp_path / "s", rows)
    rendered, parsed = [], []
    render, parse = Renderer.texts, data.parse_row
    monkeypatch.setattr(Renderer, "texts", lambda self, *args: rendered.append(1) or render(self, *args))
    monkeypatch.setattr(data, "parse_row", lambda *args: parsed.append(1) or parse(*args))

    def again(make=dict(template=CHATML), **options):
        rendered.clear(), parsed.clear()
        out = load(options.pop("source", source), made=renderer(**make), **options)
        return out, len(rendered), len(parsed)

    first, *work = again()
    assert work == [20, 20]
    second, *work = again()
    assert work == [0, 0] and second[0].table[:] == first[0].table[:] and second[1:] == first[1:]
    assert second[0].fingerprint == first[0].fingerprint
    fingerprints = {first[0].fingerprint}
    for change in (dict(template="{{ 'x' }}" + CHATML), dict(template=CHATML, max_length=300),
                   dict(template=CHATML, max_prompt_length=100), dict(template=CHATML, empty_system=False),
                   dict(template=CHATML, add_bos=True), dict(template=CHATML, eos="<|im_end|>"),
                   dict(template=CHATML, bos="<|im_start|>")):
        out, *work = again(change)
        assert work == [20, 0], change
        fingerprints.add(out[0].fingerprint)
    assert len(fingerprints) == 8
    assert again(dict(template=CHATML))[1:] == (0, 0)
    out, *work = again(max_samples=5)
    assert work == [5, 0] and len(out[0]) == 5 and out[0].fingerprint not in fingerprints
    assert again(max_samples=5)[1:] == (0, 0) and again(max_samples=5, seed=7)[1:] == (5, 0)
    assert again({"template": CHATML}, source={source: 0.5})[1:] == (10, 0)

    rows[3]["chosen"] = "fine 3"  # of the same size
    out, *work = again(source=folder(tmp_path / "s", rows))
    assert work == [20, 20] and any("fine 3" in text for pair in texts(out[0]) for text in pair)
    assert out[0].fingerprint not in fingerprints
    monkeypatch.setattr(data, "VERSION", data.VERSION + 1)
    assert again()[1:] == (20, 20)


@pytest.mark.parametrize("form", ("parquet", "DatasetDict", "Dataset"))
def test_cache_of_a_changed_source(tmp_path, form):
    for n in range(2):
        path = tmp_path / "s"
        if path.exists():
            for file in sorted(path.rglob("*"), reverse=True):
                file.rmdir() if file.is_dir() else file.unlink()
            path.rmdir()
        rows = [preference(10 + n)]
        assert texts(load(write_source(path, form, rows))[0])[0][0] == f"question {10 + n}"


# ----------------------------------------------------------------------------------------------------------------------
# Order and batches

def test_epoch_order():
    lengths = [random.Random(i).randint(1, 500) for i in range(97)]
    orders = {(epoch, seed): epoch_order(lengths, epoch, seed) for epoch in range(3) for seed in (1, 2)}
    assert all(sorted(order) == list(range(97)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6 and orders[2, 1] == epoch_order(lengths, 2, 1)
    assert epoch_order([5], 0, 0) == [0]


def test_epoch_order_by_length(monkeypatch):
    """Each pair once; a window's steps hold pairs of like length, in random order; the small last step is a random draw."""
    monkeypatch.setattr(data, "LENGTH_WINDOW", 40)
    lengths = [random.Random(i).randint(1, 500) for i in range(97)]
    order = epoch_order(lengths, 1, 3, 8, group_by_length=True)
    assert sorted(order) == list(range(97)) and order == epoch_order(lengths, 1, 3, 8, group_by_length=True)
    assert order != epoch_order(lengths, 2, 3, 8, group_by_length=True)
    plain = epoch_order(lengths, 1, 3)
    assert order[96:] == plain[96:]
    shuffled = False
    for start in (0, 40, 80):
        window = order[start:min(start + 40, 96)]
        assert sorted(window) == sorted(plain[start:min(start + 40, 96)])  # windows of the same permutation
        steps = [[lengths[i] for i in window[s:s + 8]] for s in range(0, len(window), 8)]
        ordered = sorted(steps)
        assert all(max(a) <= min(b) for a, b in zip(ordered, ordered[1:]))
        shuffled |= steps != ordered
    assert shuffled
    assert sorted(epoch_order(lengths, 0, 0, 64, group_by_length=True)) == list(range(97))  # a step over the window
    assert sorted(epoch_order(lengths[:5], 0, 0, 8, group_by_length=True)) == list(range(5))  # a step over the data


@pytest.mark.parametrize("count", (0, 1, 3, 7, 8, 64))
def test_split_batch(count):
    """Every pair once, never too many pairs or tokens a rank, as many micro-steps on each rank, whatever the grid."""
    draw = random.Random(count)
    lengths = [draw.randint(1, 50) for _ in range(200)]
    rows = draw.sample(range(200), count)
    for ranks, most_pairs, most_tokens in ((1, 64, 10**6), (1, 8, 100), (8, 1, 100), (2, 4, 10**6), (3, 5, 60), (2, 8, 10)):
        grid = split_batch(rows, lengths, ranks, most_pairs, most_tokens)
        assert all(len(step) == ranks for step in grid)
        cells = [cell for step in grid for cell in step]
        assert sorted(i for cell in cells for i in cell) == sorted(rows)
        for cell in filter(None, cells):
            assert len(cell) <= most_pairs and (len(cell) * max(lengths[i] for i in cell) <= most_tokens or len(cell) == 1)
        for step in grid[:-1]:
            assert len({len(cell) for cell in step}) == 1  # no rank waits for another
        assert grid == split_batch(rows[::-1], lengths, ranks, most_pairs, most_tokens)  # not the order of the rows
        flat = [lengths[i] for cell in cells for i in cell]
        assert flat == sorted(flat, reverse=True)  # pairs of like length meet
    assert len(split_batch(rows, lengths, 1, 8, 10**6)) == -(-count // 8)  # no more micro-steps than needed


def test_little_of_a_batch_is_padding():
    """Under 5 % of the computed positions, on lengths that vary as those of dialogues do, at the sizes that recipes use."""
    draw = random.Random(0)
    lengths = [min(1500, 20 + round(draw.lognormvariate(5, 0.8))) for _ in range(2308)]
    for step_pairs, micro_pairs in ((8, 8), (32, 8), (64, 4), (64, 8)):
        order = epoch_order(lengths, 0, 42, step_pairs, group_by_length=True)
        cells = [cell for start in range(0, len(order), step_pairs)
                 for step in split_batch(order[start:start + step_pairs], lengths, 1, micro_pairs, 16384) for cell in step]
        computed = sum(len(cell) * max(lengths[i] for i in cell) for cell in cells)
        assert 1 - sum(lengths) / computed < 0.05


def two_pairs():
    table = datasets.Dataset.from_dict({
        "id": ["p0", "p1"], "prompt_ids": [[11, 12], [13]], "first_ids": [[21, 22, 2], [23]],
        "second_ids": [[31, 2], [32, 2]], "tokens": [7, 4]})
    return Pairs(table, "f", {})


def test_collate_shared():
    batch = collate(two_pairs(), [1, 0], shared=True, pad=9)
    assert batch.ids == ["p1", "p0"] and batch.rows.tolist() == [1, 0] and batch.weights.tolist() == [1.0, 1.0]
    assert batch.shared is True
    assert batch.input_ids.tolist() == [[13, 23, 32, 2, 9, 9, 9], [11, 12, 21, 22, 2, 31, 2]]
    assert batch.segments.tolist() == [[0, 1, 2, 2, -1, -1, -1], [0, 0, 1, 1, 1, 2, 2]]
    # y2 starts again behind the prompt
    assert batch.positions.tolist() == [[0, 1, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 2, 3]]
    # the prompt's last state predicts the first token of both, then each token's own state the next
    assert batch.sources.tolist() == [0, 0, 2, 7 + 1, 7 + 2, 7 + 3, 7 + 1, 7 + 5]
    assert batch.targets.tolist() == [23, 32, 2, 21, 22, 2, 31, 2]
    assert batch.lengths.tolist() == [1, 2, 3, 2]
    assert batch.tokens == (1 + 1) + (1 + 2) + (2 + 3) + (2 + 2)
    assert batch.input_ids.dtype == batch.sources.dtype == batch.targets.dtype == torch.int64
    assert batch.weights.dtype == torch.float32 and batch.input_ids.is_contiguous()
    moved = batch.to("cpu")
    assert isinstance(moved, data.PairBatch) and torch.equal(moved.sources, batch.sources) and moved.ids == batch.ids


def test_collate_two_rows_a_pair():
    batch = collate(two_pairs(), [1, 0], shared=False, pad=9)
    assert batch.input_ids.tolist() == [[13, 23, 9, 9, 9], [13, 32, 2, 9, 9], [11, 12, 21, 22, 2], [11, 12, 31, 2, 9]]
    assert batch.segments.tolist() == [[0, 1, -1, -1, -1], [0, 2, 2, -1, -1], [0, 0, 1, 1, 1], [0, 0, 2, 2, -1]]
    assert batch.positions.tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    assert batch.sources.tolist() == [0, 5, 6, 11, 12, 13, 16, 17]
    assert batch.targets.tolist() == [23, 32, 2, 21, 22, 2, 31, 2]
    assert batch.lengths.tolist() == [1, 2, 3, 2] and batch.tokens == 14 and batch.shared is False
    assert batch.ids == ["p1", "p0"] and batch.rows.tolist() == [1, 0]


@pytest.mark.parametrize("shared", (True, False))
def test_collate_filler(shared):
    batch = collate(two_pairs(), [], shared=shared)
    assert batch.ids == [None] and batch.weights.tolist() == [0.0] and batch.tokens == 0
    real = collate(two_pairs(), [0], shared=shared)
    assert torch.equal(batch.input_ids, real.input_ids) and torch.equal(batch.sources, real.sources)
    assert real.ids == ["p0"] and real.weights.tolist() == [1.0] and real.tokens == 9


# ----------------------------------------------------------------------------------------------------------------------
# Real data

@pytest.fixture(scope="module")
def hh_rows():
    if not HH.is_file():
        pytest.skip("../shared/data/hh-harmless-test.jsonl.gz is not here")
    return [row for _, row in data.read_file(HH)]


def test_hh_parses(hh_rows):
    assert len(hh_rows) == 2312
    differing, mark = 0, "\n\nAssistant:"
    for n, row in enumerate(hh_rows, 1):
        parsed = parse_row(row, f"row {n}")
        prompt, sides = parsed["prompt"], (row["chosen"], row["rejected"])
        assert parsed["label"] == 0 and [prompt + r for r in parsed["responses"]] == list(sides)
        assert prompt.endswith(mark)
        messages = data.hh_messages(prompt)
        assert messages[0]["role"] == "user" and all(a["role"] != b["role"] for a, b in zip(messages, messages[1:]))
        own = [side[:side.rfind(mark) + len(mark)] for side in sides]
        differing += own[0] != own[1]
        if own[0] == own[1]:
            assert prompt == own[0]
        else:
            assert all(end.startswith(prompt) for end in own)
    assert differing == 5


def test_hh_loads(hh_rows, tmp_path):
    """Through the whole path, the first 300 rows: the tokens are the texts."""
    made = renderer(20_000, 40_000, eos="<|im_end|>", template=CHATML, empty_system=False)
    pairs, labels, _, _ = load(folder(tmp_path / "s", hh_rows[:300]), made=made)
    assert len(pairs) + pairs.counts["equal responses"] + pairs.counts["empty response"] == 300
    wanted = set()
    for row in hh_rows[:300]:
        prompt = parse_row(row, "row")["prompt"]
        given = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in data.hh_messages(prompt))
        wanted |= {(given + "<|im_start|>assistant\n", row[side][len(prompt):].strip() + "<|im_end|>", side == "chosen")
                   for side in ("chosen", "rejected")}
    for id, (prompt, first, second) in zip(pairs.ids, texts(pairs, made)):
        assert (prompt, first, labels[id] == 1) in wanted and (prompt, second, labels[id] == -1) in wanted
