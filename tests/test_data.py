"""data.py, from rows to tokens: formats, hidden labels, templates, what is dropped, errors.

Files and the hub are in test_sources.py, order and batches in test_batches.py.
"""

import functools
import json
import random
from dataclasses import fields

import pytest
from helpers import (
    CHATML,
    DEFAULT_SYSTEM,
    LLAMA,
    LLAMA_BOS,
    ROOT,
    SPECIAL,
    ULTRAFEEDBACK,
    ZEPHYR,
    decoded,
    load_source,
    preference,
    renderer,
    reply,
    system,
    tokenizer,
    user,
    write_folder,
)
from tokenizers import AddedToken
from transformers import ByT5Tokenizer

import data
from data import DataError, Pairs, Renderer, parse_row
from runtime import sources

HH = ROOT / ".." / "shared" / "data" / "hh-harmless-test.jsonl.gz"
PLACE = "f.jsonl, row 7"
pytestmark = pytest.mark.usefixtures("cache")


# ----------------------------------------------------------------------------------------------------------------------
# Formats

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
    # implicit prompt: a space belongs to the word that follows it, and a common beginning of two words to the words
    ({"chosen": "The sky is blue", "rejected": "The sky is black"}, "The sky is", [" blue", " black"], 0, 0),
    ({"chosen": "blue", "rejected": "black"}, "", ["blue", "black"], 0, 0),
    ({"chosen": "one two", "rejected": "three"}, "", ["one two", "three"], 0, 0),
    ({"chosen": [user("u"), reply("c")], "rejected": [user("u"), reply("r")]}, [user("u")],
     [[reply("c")], [reply("r")]], 0, 0),
    ({"chosen": [system("s"), user("u"), reply("same")], "rejected": [system("s"), user("u"), reply("same")]},
     [system("s"), user("u")], [[reply("same")]] * 2, 0, 0),
    (ULTRAFEEDBACK, [user("Why?")], [[reply("Since.")], [reply("No.")]], 0, 0),
    (DPO_MIX, [user("a"), reply("b"), user("c")], [[reply("d")], [reply("e")]], 0, 0),
    # everything in a message except role and content is dropped
    ({"chosen": [{**user("u"), "id": 3}, {**reply("c"), "tool": None}], "rejected": [user("u"), reply("r")]},
     [user("u")], [[reply("c")], [reply("r")]], 0, 0),
    # HH dialogues: up to the last Assistant turn that both share, no matter which of them goes on
    ({"chosen": HH_PROMPT + " four", "rejected": HH_PROMPT + " five"}, HH_PROMPT, [" four", " five"], 0, 0),
    ({"chosen": HH_PROMPT + " four\n\nAssistant: more", "rejected": HH_PROMPT + " four"}, HH_PROMPT,
     [" four\n\nAssistant: more", " four"], 0, 0),
    ({"chosen": HH_PROMPT + " four", "rejected": HH_PROMPT + " five\n\nAssistant: more"}, HH_PROMPT,
     [" four", " five\n\nAssistant: more"], 0, 0),
    ({"chosen": HH_PROMPT, "rejected": HH_PROMPT + " five"}, HH_PROMPT, ["", " five"], 0, 0),
    ({"chosen": HH_PROMPT + " same", "rejected": HH_PROMPT + " same"}, HH_PROMPT, [" same", " same"], 0, 0),
    ({"prompt": HH_PROMPT, "chosen": " four", "rejected": " five"}, HH_PROMPT, [" four", " five"], 0, 0),
    # without a label, with one, with the truth, which no annotator sees
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
    pairs, labels, truths, _ = load_source(write_folder(tmp_path / "a", rows))
    assert pairs.table.column_names == ["id", "prompt_ids", "first_ids", "second_ids", "tokens"]
    assert len(pairs) == len(set(pairs.ids)) == len(labels) == 400 and labels == truths
    assert pairs.labels is None and pairs.batch([0, 1], "cpu").labels is None
    assert not any("truth" in f.name for f in (*fields(Pairs), *fields(data.PairBatch)))
    # The order says nothing about the label: chosen comes first about half of the time.
    assert 160 < sum(label == 1 for label in labels.values()) < 240
    assert set(labels.values()) == {1, -1}
    # +1 means that the first is better: the labels belong to these texts.
    for id, (_, first, second) in zip(pairs.ids, decoded(pairs)):
        assert (" good" in first) == (labels[id] == 1) and (" good" in second) == (labels[id] == -1)

    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    again, flipped, _, _ = load_source(write_folder(tmp_path / "b", swapped))
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
    out = [load_source(write_folder(tmp_path / str(n), [row]), made=made) for n, row in enumerate(variants)]
    assert len({pairs.ids[0] for pairs, *_ in out}) == 1
    assert len({str(pairs.table[:]) for pairs, *_ in out}) == 1
    id = out[0][0].ids[0]
    label = 1 if decoded(out[0][0], made)[0][1].startswith("x") else -1
    assert [labels for _, labels, _, _ in out] == [{id: label}, {id: label}, {}, {id: label}]
    assert [truths for _, _, truths, _ in out] == [{id: -label}, {id: -label}, {}, {id: label}]


def test_the_id_depends_on_the_content():
    base = {"prompt": "p", "responses": ["x", "y"]}
    others = [{"prompt": "q", "responses": ["x", "y"]}, {"prompt": "p", "responses": ["x", "z"]},
              {"prompt": [user("p")], "responses": ["x", "y"]}, {"prompt": "p", "responses": ["xy", ""]}]
    assert len({data.canonical(p)[0] for p in (base, *others)}) == 5
    id, order = data.canonical(base)
    assert data.canonical({"prompt": "p", "responses": ["y", "x"]}) == (id, [1 - k for k in order])


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
    # SmolLM2 and Qwen name a BOS that their tokeniser never adds
    (dict(eos="<|im_end|>", bos="<|im_start|>", template=CHATML, empty_system=False), TALK[:1],
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>"),
    # the default system message belongs to the prompt; the empty one replaces it
    (dict(**BARE, template=DEFAULT_SYSTEM, empty_system=False), TALK[:1],
     "<|im_start|>system\nBe a pirate.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
     "A b<|im_end|>"),
    (dict(**BARE, template=DEFAULT_SYSTEM), TALK[:1],
     "<|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>"),
    # zephyr: the template ends a turn with EOS; "system" is not in its text, so no message is inserted
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
    # a template that does not end a response, and one with EOS and another end of turn
    (dict(template=CHATML, empty_system=False), TALK[:1],
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>\n</s>"),
    (dict(template=LLAMA.replace(" + eos_token", "")), TALK[:1], "[INST] Hi [/INST]", " A b</s>"),
    (dict(template=LLAMA.replace("+ eos_token", "+ eos_token + eos_token + '\n'")), TALK[:1],
     "[INST] Hi [/INST]", " A b</s>"),
    # a generation prompt that finished conversations do not have
    (dict(template=LLAMA + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"), TALK[:1],
     "[INST] Hi [/INST]", " A b</s>"),
    # with a template HH is a conversation, without one a text
    (dict(**BARE, template=CHATML, empty_system=False), HH_PROMPT,
     "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n<|im_start|>user\nthree<|im_end|>\n"
     "<|im_start|>assistant\n", "A b<|im_end|>"),
    (dict(add_bos=True), HH_PROMPT, "<s>" + HH_PROMPT, "A b</s>"),
    (dict(), HH_PROMPT, HH_PROMPT, "A b</s>"),
    # a text that is not a dialogue is not put into a template
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
    """Responses of several turns are scored as a whole and end in one EOS."""
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
    """Gemma's template mentions system messages only to refuse them: none may be inserted."""
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + LLAMA_BOS
    made = renderer(template=template, add_bos=True)
    assert made.tokenizer.decode(made([user("Hi")], [[reply("x")], [reply("y")]])[0]) == "<s>[INST] Hi [/INST]"


@pytest.mark.parametrize("options, bos", [
    (dict(), None), (dict(add_bos=True), "<s>"), (dict(add_bos=True, template=LLAMA_BOS), "<s>"),
    (dict(template=LLAMA_BOS), "<s>")])  # here only the template adds a BOS
def test_truncation(options, bos):
    """A prompt loses its beginning but not its BOS; a response loses its end, with the EOS."""
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
    assert renderer(limit, limit - 2, **options)(prompt, responses)[1] == [[], []]  # nor the end of the response


@pytest.mark.parametrize("metaspace", (False, True))
def test_text_after_the_border_gets_no_space(metaspace):
    """The "▁" that a tokeniser adds in front of a text must not be added in front of a response."""
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


def test_line_break_after_the_border():
    """A response is tokenised after a newline, so that it gets no leading "▁". That newline may merge with its own."""
    made = tokenizer()
    made.add_tokens(["r\n", "\n\n"])
    ids = functools.partial(made.encode, add_special_tokens=False)
    prompt_ids, responses = Renderer(made, 200, 400)("for", ["\n\nx", "\nx"])
    assert prompt_ids == ids("for") and ids("for\n\nx") == ids("fo") + ids("r\n") + ids("\nx")
    assert responses == [ids("\n\n") + ids("x") + [made.eos_token_id], ids("\n") + ids("x") + [made.eos_token_id]]


def test_empty_prompt():
    for options in (dict(add_bos=True), dict()):  # a BOS that the tokeniser has but does not add will do too
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
    """With a tokeniser that adds "▁" in front of every text, a text that is cut into pieces must not get more of them."""
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
    (["<|user|>", "user"], {}, ["<|user|>", *TURNS]),  # one contains the other
    (["aa"], {}, TURNS),  # in "aaa", one may begin at the first or the second
    (["\n\n"], {}, TURNS),
    (["\n<|im_start|>"], {}, TURNS[1:]),
    (["ever<|im_"], {}, ["ever<|im_", "</s>"]),  # overlaps two of the others
    (["|><|"], {}, ["</s>"])])
def test_borders(texts, how, borders, metaspace):
    """A text that is cut at its borders has the same tokens as the whole."""
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


def test_a_tokeniser_that_we_do_not_know_has_no_borders():
    slow = ByT5Tokenizer(extra_ids=0, additional_special_tokens=TURNS[:2])
    slow.chat_template = CHATML.replace("<|im_end|>", "</s>")
    split = tokenizer(template=CHATML)
    split.split_special_tokens = True  # the text of a special token is not a token
    for made in (slow, split):
        assert not Renderer(made, 200, 400).border.search("<|im_start|>user\nx</s>")


@pytest.mark.parametrize("options", [
    dict(), dict(metaspace=True, add_bos=True), dict(**BARE, template=CHATML), dict(template=LLAMA_BOS, metaspace=True)])
def test_many_pairs_at_once(options):
    """Each pair has the same tokens as by itself, whatever comes before and after it."""
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
        {"chosen": "The sky", "rejected": "The sky is blue"},  # one side is the other's prompt
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"prompt": "p", "chosen": "0123456789 and on", "rejected": "0123456789 to the end"},  # equal once truncated
        {"prompt": "p", "chosen": "0123456 and on", "rejected": "0123456 to the end"},
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]},  # the same pair with the opposite label
        pair]
    made = renderer(10, 1 + 10)  # one token of prompt, ten of a response
    pairs, labels, _, said = load_source(write_folder(tmp_path / "s", rows), made=made)
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
    pairs, *_ = load_source(write_folder(tmp_path / "s", [{"chosen": "The sky", "rejected": "The sky"}, preference(1)]))
    assert pairs.counts["equal responses"] == 1 and pairs.counts["empty response"] == 0


def test_empty_messages_are_dropped(tmp_path):
    rows = [{"chosen": [user("u"), reply("")], "rejected": [user("u"), reply("x")]},
            {"chosen": [user("u"), reply("x ")], "rejected": [user("u"), reply("y")]}]
    pairs, labels, _, _ = load_source(write_folder(tmp_path / "s", rows), made=renderer(**BARE, template=CHATML))
    assert pairs.counts["empty response"] == 1 and len(pairs) == len(labels) == 1


def test_nothing_left(tmp_path):
    rows = [{"prompt": "p", "chosen": "x", "rejected": ""}]
    counts = r"\(1 rows read, 1 dropped for an empty response, 0 pairs\)"
    with pytest.raises(DataError, match=rf"s: no train pair is left {counts}"):
        load_source(write_folder(tmp_path / "s", rows))


@pytest.mark.parametrize("case", ("no rows", "fraction", "all contaminated"))
def test_no_rows(tmp_path, case):
    """If there are no rows at all, the error is a sentence that names the source and does not come from a library."""
    source = write_folder(tmp_path / "s", [] if case == "no rows" else [preference(n) for n in range(6)])
    (tmp_path / "bench.txt").write_text("question 0 question 1 question 2 good\n" * 2)
    rows = [preference("0 question 1 question 2 good")]
    options = {"decontaminate_with": str(tmp_path / "bench.txt")} if case == "all contaminated" else {}
    if options:
        source = write_folder(tmp_path / "s", rows)
    with pytest.raises(DataError, match=rf"{source}.*no (row|train pair)"):
        load_source({source: 0.01 if case == "fraction" else 1.0}, **options)


# ----------------------------------------------------------------------------------------------------------------------
# Errors

GOOD = json.dumps(preference(0))
CONVERSATION = [user("u"), reply("c")]


@pytest.mark.parametrize("row, match", [
    ({"prompt": "p", "chosen": "c"}, r"field rejected: expected a string or a list of messages, found nothing"),
    ({"prompt": "p", "rejected": "c"}, r"field chosen: .* found nothing"),
    ({"prompt": "p", "chosen": "c", "rejected": None}, r"field rejected: .* found nothing"),
    ({"prompt": "p", "chosen": None, "rejected": None}, r"needs chosen and rejected, or response_a and response_b"),
    ({"prompt": "p", "instruction": "c"}, r"needs chosen and rejected, .*; it has prompt, instruction"),
    ({}, r"it has no fields"),
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
    ({"prompt": "other", "chosen": CONVERSATION, "rejected": [user("u"), reply("r")]},
     r"field prompt: is not one of the messages that chosen and rejected share"),
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
    path = tmp_path / "f.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=rf"f\.jsonl, row 3\b.*{match}"):
        list(data.parsed_rows(str(path), "train", None))


def test_template_errors_name_the_row(tmp_path):
    rows = [preference(0), {"prompt": [user("x"), {"role": "tool", "content": "y"}], "chosen": "c", "rejected": "r"}]
    made = renderer(template=LLAMA, empty_system=False)
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: the chat template failed \(.*Only user and assistant"):
        load_source(write_folder(tmp_path / "s", rows), made=made)
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: messages need a chat template"):
        load_source(write_folder(tmp_path / "s", rows))
    rows = [preference(0), preference(1, prompt=""), rows[1]]  # the first of two errors, although only its tokens show it
    with pytest.raises(DataError, match=r"train\.jsonl, row 2: the prompt is empty"):
        load_source(write_folder(tmp_path / "s", rows), made=renderer(bos=None))


# ----------------------------------------------------------------------------------------------------------------------
# Real data

@pytest.fixture(scope="module")
def hh_rows():
    if not HH.is_file():
        pytest.skip("../shared/data/hh-harmless-test.jsonl.gz is not here")
    return [row for _, row in sources.read_file(HH)]


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
    """The first 300 rows, from file to tokens: the tokens spell the texts."""
    made = renderer(20_000, 40_000, eos="<|im_end|>", template=CHATML, empty_system=False)
    pairs, labels, _, _ = load_source(write_folder(tmp_path / "s", hh_rows[:300]), made=made)
    assert len(pairs) + pairs.counts["equal responses"] + pairs.counts["empty response"] == 300
    wanted = set()
    for row in hh_rows[:300]:
        prompt = parse_row(row, "row")["prompt"]
        given = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in data.hh_messages(prompt))
        wanted |= {(given + "<|im_start|>assistant\n", row[side][len(prompt):].strip() + "<|im_end|>", side == "chosen")
                   for side in ("chosen", "rejected")}
    for id, (prompt, first, second) in zip(pairs.ids, decoded(pairs, made)):
        assert (prompt, first, labels[id] == 1) in wanted and (prompt, second, labels[id] == -1) in wanted


def test_a_template_that_prints_the_date_changes_the_fingerprint(tmp_path, monkeypatch):
    """The cache of the reference and a resumed run depend on the tokens, not on the template that wrote them."""
    import datetime

    from transformers.utils import chat_template_utils

    def loaded(name, day, template):
        monkeypatch.setattr(chat_template_utils, "datetime", type("Clock", (), {
            "now": staticmethod(lambda: datetime.datetime(2026, 1, day))}))
        return load_source(write_folder(tmp_path / name, [ULTRAFEEDBACK]), made=renderer(template=template))[0]
    dated = "{{ strftime_now('%d') }}" + CHATML
    plain = loaded("a", 1, CHATML), loaded("b", 2, CHATML)
    assert plain[0].fingerprint == plain[1].fingerprint
    today, tomorrow = loaded("c", 1, dated), loaded("d", 2, dated)
    assert today.ids == tomorrow.ids == plain[0].ids and today.fingerprint != tomorrow.fingerprint
