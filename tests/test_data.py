"""data.py and runtime/rendering.py, from parsed rows to tokens: hidden labels, templates, what is dropped, errors.

The formats of rows are in test_formats.py, files and the hub in test_sources.py, order and batches in test_batches.py.
"""

import functools
import json
import random
import re
import subprocess
import sys
from dataclasses import fields

import datasets
import pytest
from helpers import (
    CHATML,
    DEFAULT_SYSTEM,
    HH_PROMPT,
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
from data import Pairs
from runtime import rendering, sources
from runtime.config import Config
from runtime.errors import DataError, UsageError
from runtime.formats import hh_messages, parse_row
from runtime.rendering import Renderer

HH = ROOT / ".." / "shared" / "data" / "hh-harmless-test.jsonl.gz"
pytestmark = pytest.mark.usefixtures("cache")


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


def test_ids_and_orders_are_those_that_ledgers_hold():
    """With another id, a label that was paid for would be lost; with another order, it would mean the other response."""
    text, chat = {"prompt": "p", "responses": ["x", "y"]}, {"prompt": [user("p")], "responses": [[reply("x")], [reply("y")]]}
    assert data.canonical(text) == ("93098ea27acfbbc13e88dcf0f3314c5f", [1, 0])
    assert data.canonical(chat) == ("a19994b052d67ee42169005ea0a0f45c", [0, 1])


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
    # a template that ends a turn with a token of its own, one that does not, and one that writes EOS twice
    (dict(template=CHATML, empty_system=False), TALK[:1],
     "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "A b<|im_end|>"),
    (dict(template=LLAMA.replace(" + eos_token", "")), TALK[:1], "[INST] Hi [/INST]", " A b</s>"),
    (dict(template=LLAMA.replace("+ eos_token", "+ eos_token + eos_token + '\n'")), TALK[:1],
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
        assert sum(id in made.ends for id in ids) == 1 and ids[-1] in made.ends
    bos = made.tokenizer.convert_tokens_to_ids("<s>")
    assert prompt_ids.count(bos) == given.count("<s>") and not any(bos in ids for ids in responses)


def test_multi_turn_responses():
    """Responses of several turns are scored as a whole and end in one EOS."""
    made = renderer(**BARE, template=CHATML, empty_system=False)
    _, responses = made([user("u")], [[reply("x"), user("more"), reply("y")], [reply("z")]])
    assert [made.tokenizer.decode(ids) for ids in responses] == [
        "x<|im_end|>\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\ny<|im_end|>", "z<|im_end|>"]


@pytest.mark.parametrize("row, later", [
    ({"chosen": [user("u"), reply("x"), user("v"), reply("y")], "rejected": [user("u"), reply("z")]}, True),
    ({"chosen": HH_PROMPT + " four\n\nHuman: sure?\n\nAssistant: yes", "rejected": HH_PROMPT + " five"}, True),
    ({"chosen": HH_PROMPT + " four\n\nHuman: thanks", "rejected": HH_PROMPT + " five\n\nHuman: thanks"}, True),
    ({"chosen": [user("u"), reply("x"), user("v"), reply("y")], "rejected": [user("u"), reply("x"), user("v"), reply("z")]},
     False)])
def test_turns_of_the_user_in_a_response_are_counted(row, later):
    parsed = parse_row(row, "row")
    [(*_, notes)] = renderer(**BARE, template=CHATML).render([(parsed["prompt"], parsed["responses"])])
    assert (rendering.LATER_TURNS in notes) == later


def test_the_majority_of_a_pairs_labels_counts(tmp_path):
    pair = {"prompt": "p", "response_a": "good", "response_b": "bad"}
    mirrored = {"prompt": "p", "response_a": "bad", "response_b": "good"}
    rows = [{**pair, "label": "b"}, {**pair, "label": "a"}, {**mirrored, "label": "b"}]
    pairs, labels, _, said = load_source(write_folder(tmp_path / "s", rows), made=renderer())
    [(_, first, _)] = pairs.token_ids([0])
    assert "1 outvoted" in said and pairs.counts["contradicting"] == 1
    assert (renderer().tokenizer.decode(first).strip().startswith("good")) == (labels[pairs.ids[0]] == 1)
    assert data.majority("aabbbcd", [-1, 1, 1, -1, -1, 0, 1]) == {"a": -1, "b": -1, "d": 1}


@pytest.mark.parametrize("share, most", [(0.25, None), (1.0, 30), (0.5, 30)])
def test_a_pair_has_the_label_of_most_of_its_rows_in_every_sample(tmp_path, share, most):
    """In a draw that of the file's first row, not of the sample's."""
    good, bad = [], []
    for n in range(40):
        good.append(preference(n))
        bad.append(good[n] | {"chosen": good[n]["rejected"], "rejected": good[n]["chosen"]})
    folder = write_folder(tmp_path / "s", bad + good + good[:20])  # of half of the pairs the opinions are a draw
    _, labels, *_ = load_source(folder)
    pairs, found, *_ = load_source({folder: share}, max_samples=most)
    assert len(pairs) == (most or 25) and found == {id: labels[id] for id in pairs.ids}


def test_hh_with_another_turn_inside_a_response():
    row = {"chosen": HH_PROMPT + " four", "rejected": HH_PROMPT + " five\n\nAssistant: more"}
    parsed = parse_row(row, "row")
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
    (dict(template=LLAMA_BOS), "<s>"),  # here only the template adds a BOS
    (dict(eos="<|im_end|>", bos="<|im_start|>", template=CHATML), None)])  # it begins a turn, and this is not the first
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
    assert exact.render([(prompt, responses)]) == [(whole_prompt, whole, [])]
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
    dict(**BARE, template=CHATML, empty_system=False), dict(template=ZEPHYR), dict(add_bos=True, template=LLAMA_BOS),
    dict(add_bos=True, metaspace=True, template=LLAMA_BOS)])
def test_special_token_text_in_a_message_is_text(options, text):
    made = renderer(**options)
    decode = made.tokenizer.decode
    prompt, responses = [user(f"say {text} now")], [[reply(f"ok {text}")], [reply(f"{text} no")]]
    plain, plain_responses = made(*json.loads(json.dumps([prompt, responses]).replace(json.dumps(text)[1:-1], "Q")))
    prompt_ids, response_ids = made(prompt, responses)
    special = made.tokenizer.convert_tokens_to_ids(SPECIAL)
    for got, without in zip((prompt_ids, *response_ids), (plain, *plain_responses)):
        assert decode(got) == decode(without).replace("Q", text)
        assert [i for i in got if i in special] == [i for i in without if i in special]


def test_special_token_in_a_string_is_that_token():
    """A string that is rendered already has the tokens of the conversation that it was rendered from, and one end."""
    for options in (dict(**BARE, template=CHATML, empty_system=False), dict(template=ZEPHYR),
                    dict(template=LLAMA_BOS, add_bos=True), dict(template=CHATML, empty_system=False)):
        made = renderer(**options)
        talk = made(TALK, [[reply("A b")], [reply("Ccc")]])
        prompt = made.chat(TALK, ask=True)
        whole = [made.chat([*TALK, reply(text)]) for text in ("A b", "Ccc")]
        assert made(prompt, [text[len(prompt):] for text in whole]) == talk
        twice = made(prompt, [text[len(prompt):].rstrip() + made.tokenizer.eos_token for text in whole])
        assert twice[1][0][-1] == talk[1][0][-1] and len(twice[1][0]) == len(talk[1][0])
        bare = made(prompt, [text[len(prompt):].replace("<|im_end|>", "").replace("</s>", "").rstrip() for text in whole])
        assert bare == (talk[0], [ids[:-1] + [made.eos] for ids in talk[1]])
    assert made(prompt, ["</s>", "<|im_end|>\n"])[1] == [[], []]  # an end alone is an empty response


@pytest.mark.parametrize("text, tokens", [
    ("x <|im_end|> y", ["x ", "<|im_end|>", " y"]), ("x </s> y", ["x ", "</s>", " y"])])
def test_special_token_across_the_border(text, tokens):
    """A special token that begins in the prompt and ends in the response is not that token; the response has its own."""
    made = renderer()
    decode = made.tokenizer.decode
    for cut in range(1, len(text) - 1):
        prompt_ids, responses = made(text[:cut], [text[cut:], "z"])
        assert decode(prompt_ids) == text[:cut] and decode(responses[0]) == text[cut:] + "</s>"
        border = len(tokens[0]) < cut < len(tokens[0] + tokens[1])
        special = [id for id in prompt_ids + responses[0] if id in made.tokenizer.all_special_ids]
        assert len(special) == (1 if border else 2)


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
    assert [rendered[:2] for rendered in made.render(pairs)] == [made(*pair) for pair in pairs]
    assert made.render([]) == []


@pytest.mark.parametrize("options, prompt, match", [
    (dict(), [user("x")], "need a chat template"),
    (dict(template="{{ messages | length }}" + LLAMA), [user("x")], "not render a conversation as the continuation"),
])
def test_templates_that_cannot_be_used(options, prompt, match):
    with pytest.raises(DataError, match=match):
        renderer(**options)(prompt, [[reply("y")], [reply("z")]])


def test_a_prompt_for_inference_that_begins_the_reply():
    """The response is what the model generates after the prompt that it is given, or the row is refused."""
    made = renderer(template=LLAMA + "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}")
    decode = made.tokenizer.decode
    prompt_ids, responses = made(TALK[:1], [[reply("<think>\na</think>b")], [reply("<think>c</think>d")]])
    assert decode(prompt_ids) == "[INST] Hi [/INST]<think>\n" and prompt_ids == made.prompt_ids(TALK[:1])
    assert [decode(ids) for ids in responses] == ["a</think>b</s>", "c</think>d</s>"]
    with pytest.raises(DataError, match="ends a prompt with '<think>', and a response does not begin so"):
        made(TALK[:1], [[reply("<think>\na</think>b")], [reply("d")]])


def test_a_template_that_removes_reasoning():
    """A response keeps what the model generates; an earlier reply loses what it loses at inference, and that is counted."""
    made = renderer(template=LLAMA.replace("m['content'] + eos", "m['content'].split('</think>')[-1] + eos"))
    talk = [user("Hi"), reply("<think>a</think>b"), user("Go")]
    prompt_ids, responses, notes = made.render([(talk, [[reply("<think>c</think>d")], [reply("e")]])])[0]
    decode = made.tokenizer.decode
    assert decode(prompt_ids) == "[INST] Hi [/INST] b</s>[INST] Go [/INST]"
    assert [decode(ids) for ids in responses] == ["<think>c</think>d</s>", " e</s>"]
    assert notes == [rendering.SHORTENED]
    with pytest.raises(DataError, match="leaves out the content of a response"):
        made(talk, [[reply("<think>c</think>d"), user("and"), reply("x")], [reply("e")]])


CALL = {"type": "function", "id": "abcdefghi", "function": {"name": "look", "arguments": {"a": "</s>"}}}
TOOLS = {"role": "tools", "content": json.dumps([{"type": "function", "function": {"name": "look", "description": "<s>"}}])}
THINKING = ("{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
            "{% if m.thinking and loop.last %}[{{ m.thinking }}]{% endif %}{{ m.content }}"
            "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
            "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def test_tools_and_reasoning():
    """They go to a template that takes them, as text, and a reply that is a tool call alone is not empty."""
    made = renderer(**BARE, template=THINKING, empty_system=False)
    past = [TOOLS, user("Hi"), {**reply(""), "tool_calls": [CALL], "reasoning_content": "why"},
            {"role": "tool", "name": "look", "content": "1"}]
    answers = [[{**reply(""), "tool_calls": [CALL]}], [{**reply("x"), "reasoning_content": "so"}]]
    prompt_ids, responses, notes = made.render([(past, answers)])[0]
    decode = made.tokenizer.decode
    shown = '{"name": "look", "arguments": {"a": "</s>"}}<|im_end|>'
    assert decode(prompt_ids) == (
        '[{"type": "function", "function": {"name": "look", "description": "<s>"}}]<|im_start|>user\nHi<|im_end|>\n'
        f'<|im_start|>assistant\n{shown}\n<|im_start|>tool\n1<|im_end|>\n<|im_start|>assistant\n')
    assert [decode(ids) for ids in responses] == [shown, "[so]x<|im_end|>"]
    assert sorted(notes) == sorted([rendering.SHORTENED, rendering.KEPT_AS_TEXT])
    both = decode(renderer(**BARE, template=THINKING).prompt_ids(past))  # the empty system message is not the tools' place
    assert both == decode(prompt_ids).replace("<|im_start|>", "<|im_start|>system\n<|im_end|>\n<|im_start|>", 1)
    assert sum(id in made.tokenizer.all_special_ids for id in responses[0]) == 1
    assert rendering.left_out(reply("a\n\nb"), "<|im_start|>a b") == []  # white space does not count
    for part, lost in (
            (TOOLS, "the tools"), ({**reply("b"), "tool_calls": [CALL]}, "the tool_calls of a message of role assistant"),
            (system("be kind"), "the content of a message of role system")):
        template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
        with pytest.raises(DataError, match=f"chat template leaves out {lost}"):
            renderer(**BARE, template=template, empty_system=False)([part, user("Hi")], [[reply("x")], [reply("y")]])
    for response, lost in ((answers[0], "tool_calls"), (answers[1], "reasoning_content")):
        with pytest.raises(DataError, match=f"leaves out the {lost} of a response"):
            renderer(**BARE, template=CHATML)([user("look so")], [response, [reply("y")]])  # the prompt's own does not count


def test_special_tokens_that_an_assistant_may_write():
    """Those of the template that do not begin or end a turn: in a reply they are tokens, in a question they are text."""
    made = tokenizer(eos="<|im_end|>", bos=None, template=CHATML + "{# reason in <think> and </think>, not <unk> <pad> #}")
    made.add_tokens([AddedToken(text, special=True, normalized=False)
                     for text in ("<think>", "</think>", "<other>", "<pad>")], special_tokens=True)
    made.pad_token = "<pad>"
    made = Renderer(made, 200, 400)
    think = made.tokenizer.convert_tokens_to_ids("<think>")
    prompt_ids, (first, second) = made([user("<think>")], [[reply("<think>a</think>")],
                                                            [reply("<other><unk><pad><|im_start|>")]])
    assert think not in prompt_ids and first[0] == think
    assert [id for id in second if id in made.tokenizer.all_special_ids] == [made.eos]


def test_what_happened_to_pairs_is_counted(tmp_path):
    rows = [{"prompt": "0123456789", "chosen": "a", "rejected": "b"},
            {"prompt": "p", "chosen": "0123456789" * 2, "rejected": "b"},
            {"prompt": [user("</s>")], "chosen": "a", "rejected": "b"}]
    made = renderer(8, 8 + 10, template="{% for m in messages %}{{ m['content'] }}{% endfor %}", empty_system=False)
    pairs, *_, said = load_source(write_folder(tmp_path / "s", rows), made=made)
    assert said == (f"train: 3 rows read, 3 pairs, 2 {rendering.UNTEMPLATED}, 1 {rendering.PROMPT_CUT}, "
                    f"1 {rendering.RESPONSE_CUT}, 1 {rendering.KEPT_AS_TEXT}")


def test_preview_shows_what_is_easy_to_miss(tmp_path):
    """Token counts, special tokens as such, where responses begin and end, what is cut, all by the run's own keys; a bad row
    is one line."""
    model, rows, config = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    tokenizer(**BARE, template=CHATML).save_pretrained(model)
    config.write_text(json.dumps({"model_name_or_path": str(model), "dataset_mixer": {str(rows): 1.0}, "max_length": 1000,
                                  "output_dir": str(tmp_path / "run")}))

    def shown(*lines, keys=()):
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        done = subprocess.run([sys.executable, "data.py", "--config", str(config), *keys], cwd=ROOT, capture_output=True,
                              text=True, timeout=600)
        texts = dict(line.split(" tokens: ", 1) for line in done.stdout.splitlines() if " tokens: " in line)
        return done, {name.partition(",")[0]: text for name, text in texts.items()}
    pair = {"prompt": [user("say </s>\nnow")], "response_a": "A", "response_b": "B" * 2000}
    done, texts = shown(pair)
    assert texts.pop("prompt") == "⟦<|im_start|>⟧user↵say </s>↵now⟦<|im_end|>⟧↵⟦<|im_start|>⟧assistant↵"
    short, long = sorted(texts.values())
    assert short == "A⟦<|im_end|>⟧" and re.fullmatch(r"B+⟪\d+ tokens cut off: B+⟦<.im_end.>⟧⟫", long)
    assert re.search(r"^y[12], 2 tokens", done.stdout, re.M) and "1 with a response cut to max_length" in done.stdout
    done, texts = shown(pair, keys=["--max_length=3000", "--auto_insert_empty_system_msg=true"])
    assert texts["prompt"].startswith("⟦<|im_start|>⟧system↵⟦<|im_end|>⟧") and "cut off" not in done.stdout
    bad, _ = shown({"prompt": "p", "chosen": 5, "rejected": "r"})
    assert bad.returncode == 2 and bad.stderr.splitlines()[-1].startswith(f"error: {rows}, row 1, field chosen: expected")
    assert "Traceback" not in bad.stderr
    sft, _ = shown(pair, keys=["--objective=sft"])
    assert sft.returncode == 2 and sft.stderr.startswith("error: data.py shows preference pairs")


def test_tokenizer_without_eos():
    with pytest.raises(DataError, match="no eos_token"):
        renderer(eos=None)


@pytest.mark.parametrize("hosts", [["here", "there"], ["here", None]])
def test_hosts_with_other_pairs_are_refused(hosts, tmp_path, monkeypatch):
    """Also where one of them has no such split. (Two hosts, as far as one process can play them.)"""
    monkeypatch.setattr(data, "all_gather", lambda value: hosts)
    monkeypatch.setattr(data, "rank_0_first", lambda work: work())
    config = Config(dataset_mixer={str(write_folder(tmp_path / "s", [preference(1, prompt="p")])): 1.0}, output_dir="o",
                    model_name_or_path="m")
    with pytest.raises(UsageError, match="the train pairs are not the same on all hosts"):
        data.load_split(config, tokenizer(), "train", None)


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
                            "contradicting": 1, rendering.RESPONSE_CUT: 1}
    assert said == ("train: 10 rows read, 4 dropped for an empty response, 2 dropped for equal responses, 4 pairs, "
                    "2 of them repeated, 1 outvoted (the label of most of a pair's rows counts, in a draw the first), "
                    "1 with a response cut to max_length")
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


def test_hh_loads(hh_rows, tmp_path):
    """The first 300 rows, from file to tokens: the tokens spell the texts."""
    made = renderer(20_000, 40_000, eos="<|im_end|>", template=CHATML, empty_system=False)
    pairs, labels, _, _ = load_source(write_folder(tmp_path / "s", hh_rows[:300]), made=made)
    assert len(pairs) + pairs.counts["equal responses"] + pairs.counts["empty response"] == 300
    wanted = set()
    for row in hh_rows[:300]:
        prompt = parse_row(row, "row")["prompt"]
        given = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in hh_messages(prompt))
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


def test_the_fingerprint_changes_with_every_id_and_token(tmp_path):
    columns = {"prompt_ids": [[1, 2], [3]], "first_ids": [[4], [5]], "second_ids": [[6], [7]]}
    changes = ({}, {"prompt_ids": [[1], [2, 3]]}, {"first_ids": [[4], [6]]}, {"second_ids": [[6], [8]]})
    assert len({data.hash_of_tokens(datasets.Dataset.from_dict(columns | change)) for change in changes}) == 4
    rows = [{"prompt": prompt, "chosen": "x", "rejected": "y"} for prompt in ([user("t")], "\n\nHuman: t\n\nAssistant:")]
    chat, dialogue = (load_source(write_folder(tmp_path / str(n), [row]), made=renderer(template=CHATML))[0]
                      for n, row in enumerate(rows))
    assert decoded(chat) == decoded(dialogue) and chat.ids != dialogue.ids and chat.fingerprint != dialogue.fingerprint
