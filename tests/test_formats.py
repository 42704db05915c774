"""runtime/formats.py: rows of every format, messages, and what is refused by name."""

import json

import pytest
from helpers import HH_PROMPT, ROOT, ULTRAFEEDBACK, preference, reply, system, user

import data
from runtime import sources
from runtime.errors import DataError
from runtime.formats import SENTINEL, hh_messages, message_text, parse_example, parse_row

HH = ROOT / ".." / "shared" / "data" / "hh-harmless-test.jsonl.gz"
PLACE = "f.jsonl, row 7"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def calling(name, arguments, content="", **more):
    """An assistant's message that calls a tool."""
    call = {"type": "function", "id": "abcdefghi", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": content, "tool_calls": [call], **more}


# ----------------------------------------------------------------------------------------------------------------------
# Formats

DEVELOPER = {"role": "developer", "content": "s"}
DPO_MIX = {
    "dataset": "argilla/x", "chosen": [user("a"), reply("b"), user("c"), reply("d")],
    "rejected": [user("a"), reply("b"), user("c"), reply("e")], "chosen_rating": 5.0, "rejected_rating": 1.0}


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
    ({"chosen": "one\ntwo", "rejected": "one\nten"}, "one", ["\ntwo", "\nten"], 0, 0),
    ({"chosen": [user("u"), reply("c")], "rejected": [user("u"), reply("r")]}, [user("u")],
     [[reply("c")], [reply("r")]], 0, 0),
    ({"chosen": [system("s"), user("u"), reply("same")], "rejected": [system("s"), user("u"), reply("same")]},
     [system("s"), user("u")], [[reply("same")]] * 2, 0, 0),
    # whole conversations that begin with a greeting
    *(({"prompt": prompt, "chosen": [reply("Hi"), user("q"), reply("c")], "rejected": [reply("Hi"), user("q"), reply("r")]},
       [reply("Hi"), user("q")], [[reply("c")], [reply("r")]], 0, 0) for prompt in ("q", [reply("Hi"), user("q")])),
    (ULTRAFEEDBACK, [user("Why?")], [[reply("Since.")], [reply("No.")]], 0, 0),
    (DPO_MIX, [user("a"), reply("b"), user("c")], [[reply("d")], [reply("e")]], 0, 0),
    # what says nothing in a message is dropped
    ({"chosen": [{**user("u"), "id": 3}, {**reply("c"), "tool_calls": None, "weight": 1}],
      "rejected": [user("u"), reply("r")]},
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
    ({"prompt": HH_PROMPT, "chosen": HH_PROMPT + " four", "rejected": HH_PROMPT + " five"}, HH_PROMPT,
     [" four", " five"], 0, 0),
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
    # orca_dpo_pairs: some rows have an empty system message, and all of them are conversations
    ({"system": "s", "question": "q", "chosen": "c", "rejected": "r"},
     [system("s"), user("q")], [[reply("c")], [reply("r")]], 0, 0),
    ({"system": "", "question": "q", "chosen": "c", "rejected": "r"}, [user("q")], [[reply("c")], [reply("r")]], 0, 0),
    ({"system": None, "prompt": "q", "chosen": "c", "rejected": "r"}, [user("q")], [[reply("c")], [reply("r")]], 0, 0),
    ({"system": "s", "chosen": HH_PROMPT + " four", "rejected": HH_PROMPT + " five"},
     [system("s"), user("one"), reply("two"), user("three")], [[reply("four")], [reply("five")]], 0, 0),
    ({"system": "s", "chosen": [system("s"), user("q"), reply("c")], "rejected": [system("s"), user("q"), reply("r")]},
     [system("s"), user("q")], [[reply("c")], [reply("r")]], 0, 0),
    ({"system": "s", "prompt": [DEVELOPER, user("q")], "chosen": "c", "rejected": "r"},
     [DEVELOPER, user("q")], [[reply("c")], [reply("r")]], 0, 0),
    ({"instruction": "q", "input": "", "chosen": "c", "rejected": "r"}, [user("q")], [[reply("c")], [reply("r")]], 0, 0),
    ({"question": "", "input": "q", "chosen": "c", "rejected": "r"}, [user("q")], [[reply("c")], [reply("r")]], 0, 0),
    # a number asks for nothing, and messages may be the chosen conversation once more
    ({"prompt": "p", "context": 3, "chosen": "c", "rejected": "r"}, "p", ["c", "r"], 0, 0),
    ({"prompt": "p", "messages": [user("p"), reply("c")], "chosen": "c", "rejected": "r"}, "p", ["c", "r"], 0, 0),
    # a column whose text the prompt has already
    ({"prompt": "Answer: why?", "question": "why?", "context": "Answer:", "chosen": "c", "rejected": "r"},
     "Answer: why?", ["c", "r"], 0, 0),
    # ShareGPT's form, and one message instead of a list
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}],
      "chosen": {"from": "gpt", "value": "c"}, "rejected": {"from": "gpt", "value": "r"}},
     [system("s"), user("q")], [[reply("c")], [reply("r")]], 0, 0),
    ({"messages": [user("q")], "chosen": reply("c"), "rejected": reply("r")},
     [user("q")], [[reply("c")], [reply("r")]], 0, 0),
    ({"prompt": [user([{"type": "text", "text": "q"}])], "chosen": "c", "rejected": "r"},
     [user("q")], [[reply("c")], [reply("r")]], 0, 0),
    # tools and reasoning; arguments as JSON text, and the empty fields that Arrow adds
    ({"prompt": [user("q")], "chosen": [calling("f", '{"a": 1}')], "rejected": [{**reply("r"), "thinking": "t"}],
      "tools": json.dumps([TOOL])},
     [{"role": "tools", "content": json.dumps([TOOL])}, user("q")],
     [[calling("f", {"a": 1})], [{**reply("r"), "reasoning_content": "t"}]], 0, 0),
    ({"prompt": [user("q")], "chosen": [calling("f", "")], "rejected": [reply("r")]},
     [user("q")], [[calling("f", {})], [reply("r")]], 0, 0),
    ({"prompt": [{**user("q"), "tool_calls": None}], "chosen": [calling("f", {"a": 1, "b": None}, content=None)],
      "rejected": [{**reply("r"), "tool_calls": None, "reasoning_content": None}]},
     [user("q")], [[calling("f", {"a": 1})], [reply("r")]], 0, 0),
])
def test_formats(row, prompt, responses, label, truth):
    assert parse_row(row, PLACE) == {"prompt": prompt, "responses": responses, "label": label, "truth": truth}


@pytest.mark.parametrize("dialogue, messages", [
    (HH_PROMPT, [user("one"), reply("two"), user("three")]),
    ("Human: one\n\nAssistant:", [user("one")]),
    ("\n\nHuman: one\n\nAssistant: ", [user("one")]),  # Nectar's
    ("\n\nHuman: one\n\nHuman: more\n\nAssistant: two\n\nAssistant: and\n\nHuman: three\n\nAssistant:",
     [user("one\n\nmore"), reply("two\n\nand"), user("three")]),
    ("\n\nHuman: I said: Human: or\nAssistant: x\n\nAssistant:", [user("I said: Human: or\nAssistant: x")]),
    ("\n\nHuman: one\n\nAssistant: two", None),
    ("What does Human: mean?\n\nAssistant:", None),
    ([user("one")], None),
])
def test_hh_dialogue_becomes_messages(dialogue, messages):
    assert hh_messages(dialogue) == messages


CONVERTED = [
    ({"prompt": "p", "response_0": "x", "response_1": "y", "better_response_id": 1},
     [user("p")], [[reply("x")], [reply("y")]], 1),
    ({"history": "p", "human_ref_A": "x", "human_ref_B": "y", "labels": 1}, [user("p")], [[reply("x")], [reply("y")]], 0),
    ({"conversation_a": [user("p"), reply("x")], "conversation_b": [user("p"), reply("y")], "winner": "model_b"},
     [user("p")], [[reply("x")], [reply("y")]], 1),
    # mt_bench_human_judgments: both turns are in the row, and one of them was judged
    ({"conversation_a": [user("p"), reply("x"), user("q"), reply("z")], "turn": 1, "winner": "model_a",
      "conversation_b": [user("p"), reply("y"), user("q"), reply("z")]}, [user("p")], [[reply("x")], [reply("y")]], 0),
    ({"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": 2},
     [user("p")], [[reply("x")], [reply("y")]], 1),
    *(({"prompt": "p", "response_1": "x", "response_2": "y", "preference_strength": strength},
       [user("p")], [[reply("x")], [reply("y")]], label) for strength, label in ((0, None), (-1, 0))),
    *(({"question": {"dataset": "eli5", "full_text": "p"}, "answer_0": "x", "answer_1": "y", "score_0": -score,
        "score_1": score}, [user("p")], [[reply("x")], [reply("y")]], label)
      for score, label in ((0.5, 1), (-0.5, 0), (0, None))),
    ({"info": {"post": "p", "article": None}, "summaries": [{"text": " x"}, {"text": " y"}], "choice": 1},
     "p\n\nTL;DR:", [" x", " y"], 1),
    *(({"context": [user("p")], "response1": "x", "response2": "y", "overall_preference": preference},
       [user("p")], [[reply("x")], [reply("y")]], label) for preference, label in ((0, None), (-2, 0), (1, 1))),
    ({"input": {"messages": [user("p")]}, "preferred_output": [reply("x")], "non_preferred_output": [reply("y")]},
     [user("p")], [[reply("x")], [reply("y")]], 0),
    ({"instruction": "p", "chosen_response": "x", "rejected_response": "y"}, [user("p")], [[reply("x")], [reply("y")]], 0),
    ({"question": "p", "response_j": "x", "response_k": "y"}, [user("p")], [[reply("x")], [reply("y")]], 0)]


@pytest.mark.parametrize("row, prompt, responses, label", CONVERTED)
def test_known_sets_are_refused_with_the_line_that_converts_them(row, prompt, responses, label):
    with pytest.raises(DataError, match=r"row 7: needs chosen .*; turn each row into (\{.*\})$") as error:
        parse_row(row, PLACE)
    converted = eval(str(error.value).partition("turn each row into ")[2], {"row": row})
    assert parse_row(converted, PLACE) == {"prompt": prompt, "responses": responses, "label": label, "truth": label}


def test_the_arena_of_55k_rows_holds_lists_as_text():
    row = {"prompt": '["p", "q"]', "response_a": '["x", "z"]', "response_b": '["y", "z"]', "winner_model_a": "0",
           "winner_model_b": "1", "winner_tie": "0"}
    with pytest.raises(DataError, match="row 7, field winner_model_a: .* is not read; turn each row into ") as error:
        parse_row(row, PLACE)
    parsed = parse_row(eval(str(error.value).partition("turn each row into ")[2], {"row": row, "json": json}), PLACE)
    rest = [user("q"), reply("z")]
    assert parsed == {"prompt": [user("p")], "responses": [[reply("x"), *rest], [reply("y"), *rest]], "label": 1, "truth": 1}


def test_sft_rows():
    tools, result = {"role": "tools", "content": json.dumps([TOOL])}, {"role": "tool", "content": "1", "name": "f"}
    for row, examples in [
            ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
             [([user("q")], [reply("a")])]),
            ({"system": "s", "messages": [user("q"), reply("a")]}, [([system("s"), user("q")], [reply("a")])]),
            ({"system": "s", "prompt": "q", "completion": "a"}, [([system("s"), user("q")], [reply("a")])]),
            ({"tools": [TOOL], "messages": [user("q"), calling("f", {}), result, reply("a")]},
             [([tools, user("q")], [calling("f", {})]), ([tools, user("q"), calling("f", {}), result], [reply("a")])])]:
        assert parse_example(row, PLACE) == examples
    with pytest.raises(DataError, match="turn each row into") as error:
        parse_example(row := {"instruction": "p", "input": "q", "output": "a"}, PLACE)
    assert parse_example(eval(str(error.value).partition("turn each row into ")[2], {"row": row}), PLACE) == [
        ([user("p\n\nq")], [reply("a")])]
    with pytest.raises(DataError, match="field images: would be left out"):
        parse_example({"prompt": "q", "completion": "a", "images": ["i.png"]}, PLACE)


def test_what_a_reader_sees_of_a_message():
    assert message_text(reply("a")) == "a"
    assert message_text({**calling("f", {"a": "é"}, "c"), "reasoning_content": "r"}) == (
        '<think>\nr\n</think>\n\nc\n\nf({"a": "é"})')


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
    ({"prompt": "p", "chosen": "c\ud800", "rejected": "r"}, r"field chosen: not valid Unicode \(.*at character 1\b"),
    ({"prompt": "\ud800", "chosen": "c", "rejected": "r"}, r"field prompt: not valid Unicode"),
    ({"chosen": CONVERSATION, "rejected": [user("u"), reply("r\udfff")]}, r"field rejected, message 2: not valid"),
    ({"prompt": "p", "chosen": f"c{SENTINEL}", "rejected": "r"}, r"field chosen: holds the characters U\+E0F7"),
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
    # columns and fields that would be left out
    ({"prompt": "p", "context": "z", "chosen": "c", "rejected": "r"}, r"field context: would be left out; put it into"),
    ({"prompt": "p", "instruction": "q", "chosen": "c", "rejected": "r"}, r"field instruction: would be"),
    ({"instruction": "p", "input": "q", "chosen": "c", "rejected": "r"}, r"field input: would be"),
    ({"messages": CONVERSATION, "chosen": "c d", "rejected": "c e"}, r"field messages: would be left out"),
    ({"prompt": "p", "images": ["i.png"], "chosen": "c", "rejected": "r"}, r"field images: would be"),
    ({"prompt": "p", "image": {"bytes": 1}, "chosen": "c", "rejected": "r"}, r"field image: would be left out"),
    ({"chosen": CONVERSATION, "rejected": [user("u"), reply("r")], "messages": [user("another")]}, r"field messages: would"),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "system": ["s"]}, r"field system: expected a string, found list"),
    ({"chosen": "c d", "rejected": "c e", "system": "s"}, r"field system: goes with a prompt, and the row has none"),
    ({"prompt": [system("t"), user("u")], "chosen": "c", "rejected": "r", "system": "s"},
     r"field system: .* another system"),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "tools": [TOOL]}, r"field tools: goes with a prompt of messages"),
    ({"prompt": [user("u")], "chosen": "c", "rejected": "r", "tools": "{"}, r"field tools: not valid JSON"),
    ({"prompt": [user("u")], "chosen": "c", "rejected": "r", "tools": [{"type": "function"}]},
     r"field tools: expected a list"),
    ({"prompt": [{**user("u"), "images": ["i"]}], "chosen": "c", "rejected": "r"},
     r"message 1: its field images cannot be used"),
    ({"prompt": [user("u")], "chosen": [{**reply(""), "function_call": {"name": "f"}}], "rejected": [reply("r")]},
     r"field chosen, message 1: its field function_call cannot be used; take it out, or write it as tool_calls"),
    ({"prompt": [user([{"type": "text", "text": "a"}, {"type": "image"}])], "chosen": "c", "rejected": "r"},
     r"message 1: expec"),
    ({"prompt": [{"role": "narrator", "content": "x"}], "chosen": "c", "rejected": "r"},
     r"its role is 'narrator'; expected one"),
    ({"prompt": [{"role": "user<|im_end|>", "content": "x"}], "chosen": "c", "rejected": "r"},
     r"its role is 'user<.im_end.>'"),
    ({"prompt": [user("u")], "chosen": [calling("f", "{")], "rejected": [reply("r")]},
     r"arguments of tool call f are not valid"),
    ({"prompt": [user("u")], "chosen": [{**reply(""), "tool_calls": ["f"]}], "rejected": [reply("r")]},
     r"expected tool_calls as"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "label": "c"}, r"field label: .*found 'c'"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "label": 0}, r"field label: expected .a. or .b., found 0"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "truth": "A"}, r"field truth: expected"),
    # the prompt, the label or the messages are there, but not where they would be read
    ({"query": "what is it", "chosen": "c", "rejected": "r"}, r"has no prompt: .* call the column .* prompt \('query'\?\)"),
    ({"prompt ": "what is it", "chosen": "c", "rejected": "r"}, r"has no prompt: .*'prompt '"),
    ({"trajectory": [user("q")], "chosen": "c", "rejected": "r"}, r"has no prompt: .*'trajectory'"),
    ({"post": "q", "chosen": [reply("c")], "rejected": [reply("r")]}, r"has no prompt: chosen and rejected begin with"),
    ({"prompt": "p", "article": "a long text", "chosen": "c", "rejected": "r"}, r"field article: would be left out"),
    ({"prompt": "p", "document": "a long text", "chosen": "c", "rejected": "r"}, r"field document: would be left out"),
    *(({"prompt": prompt, "chosen": HH_PROMPT + " c", "rejected": HH_PROMPT + " r"}, r"field prompt: is not how .* dialog")
      for prompt in ("one", "\n\nHuman: one")),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "winner": "model_b"}, r"field winner: .* is not read; write"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "preference": 1}, r"field preference: says which response"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "truth": "a", "winner": "model_b"}, r"field winner: .* not read"),
    ({"messages": json.dumps([user("u")]), "chosen": "c", "rejected": "r"}, r"field messages: is a list of messages"),
    ({"prompt": "p", "response_a": "c", "response_b": "d", "chosen": "response_b", "rejected": "response_a"}, r"keep one"),
    ({"chosen": json.dumps(CONVERSATION), "rejected": json.dumps(CONVERSATION)}, r"field chosen: is a list of messages wri"),
    ({"chosen": str(CONVERSATION), "rejected": str(CONVERSATION)}, r"field chosen: is a list of messages written as text"),
    ({"prompt": json.dumps([user("u")]), "chosen": "c", "rejected": "r"}, r"field prompt: is a list of messages written"),
    (["prompt", "chosen"], r"expected an object with fields, found list"),
    ("text", r"expected an object with fields, found str"),
    (None, r"expected an object with fields, found NoneType"),
])
def test_malformed_rows(tmp_path, row, match):
    path = tmp_path / "f.jsonl"
    path.write_text(f"{GOOD}\n{GOOD}\n{json.dumps(row)}\n")
    with pytest.raises(DataError, match=rf"f\.jsonl, row 3\b.*{match}"):
        list(data.parsed_rows(str(path), "train", None))


# ----------------------------------------------------------------------------------------------------------------------
# Real data

def test_hh_parses():
    if not HH.is_file():
        pytest.skip("../shared/data/hh-harmless-test.jsonl.gz is not here")
    hh_rows = [row for _, row in sources.read_file(HH)]
    assert len(hh_rows) == 2312
    differing, mark = 0, "\n\nAssistant:"
    for n, row in enumerate(hh_rows, 1):
        parsed = parse_row(row, f"row {n}")
        prompt, sides = parsed["prompt"], (row["chosen"], row["rejected"])
        assert parsed["label"] == 0 and [prompt + r for r in parsed["responses"]] == list(sides)
        assert prompt.endswith(mark)
        messages = hh_messages(prompt)
        assert messages[0]["role"] == "user" and all(a["role"] != b["role"] for a, b in zip(messages, messages[1:]))
        own = [side[:side.rfind(mark) + len(mark)] for side in sides]
        differing += own[0] != own[1]
        if own[0] == own[1]:
            assert prompt == own[0]
        else:
            assert all(end.startswith(prompt) for end in own)
    assert differing == 5




@pytest.mark.parametrize("row", [
    {"prompt": "Power set", "chosen": "[{{}, {1}}]", "rejected": "[{{}}]"},  # neither JSON nor Python
    {"prompt": "[{[1, 2]}]", "chosen": "c", "rejected": r"[{'re': '\d+'}]"},
    {"prompt": "Write a dialogue of a human and an AI.", "chosen": "Human: Hi\nAI: Hi", "rejected": "Human: Cats?\nAI: Yes"},
    {"prompt": "p", "document": "doc-17.pdf", "chosen": "c", "rejected": "r"},
    {"chosen": "The cat sat", "rejected": "A dog ran", "id": "7"},  # text that nothing asked for, as a base model writes it
    {"prompt": "p", "response_a": "c", "response_b": "r", "label": None, "winner": "tie"},
    {"prompt": "p", "response_a": "c", "response_b": "r", "choice": []}])
@pytest.mark.filterwarnings("error")
def test_rows_that_look_like_something_else_are_read(row):
    parsed = parse_row(row, PLACE)
    texts = [row[name] for name in (("chosen", "rejected") if "chosen" in row else ("response_a", "response_b"))]
    assert parsed["prompt"] == row.get("prompt", "") and parsed["responses"] == texts
