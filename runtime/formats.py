"""Row formats: rows of anybody's preference or SFT data, brought into one form.

    preference row   → parse_row       prompt, two responses, and a label or none
    SFT row          → parse_example   prompts with one response each
    any row          → parse_prompt    its prompt alone, for a model to answer
    HH dialogue      → hh_messages     the same text as messages
    message          → message_text    all that a reader has to see of it, for people and judges
    messages         → template_input  the same as a chat template takes them, and the tools

A prompt or a response is a string, which is used as it is, or a list of messages. A message has a role and a content, and
may have reasoning_content, tool_calls, tool_call_id and name. The tools that a conversation may call are its first message,
of role "tools", so that they are part of the pair's id and everybody who reads the prompt sees them.

A column or a field that would change what the model reads is used, or the row is refused by its name. What else a row holds
(scores, ids, the name of a generator) is ignored.
"""

import ast
import json
import os
import re
import warnings

from runtime.errors import DataError, one_line

# Goes into special-token text inside a message, so that the tokeniser does not read it as the token. These are
# private-use characters that nobody types; `Renderer.encode` splits the text there and removes them.
SENTINEL = "\ue0f7\ue0a1\ue0f7"

# Columns that can be the prompt, the first that a row has. A string under another name than `prompt` is a user's turn.
PROMPTS = ("prompt", "question", "instruction", "input", "conversations", "conversation", "messages")
SYSTEMS = ("system", "system_prompt", "system_message")
# Columns that change what the model is asked: they are used, or their text is in the prompt already, or the row is refused.
ASKING = (*PROMPTS, *SYSTEMS, "tools", "context", "history", "chat_history", "dialogue", "trajectory", "query",
          "user_prompt", "post", "article", "passage", "document", "documents", "images", "image", "videos", "video",
          "audio", "chat_template_kwargs")
# Columns of other data sets that say which response is better. Beside response_a and response_b they would go unread.
VERDICTS = ("winner", "winner_model_a", "preference", "preferred", "choice", "better_response_id", "overall_preference",
            "preference_strength")
# Those of ASKING that often hold the name of a text instead of the text.
NAMED = ("post", "article", "passage", "document", "documents", "dialogue", "trajectory")
WRITTEN_OUT = ("is a list of messages written as text; read it with json.loads (or ast.literal_eval, if it has single "
               "quotes) and save the row as JSON Lines or parquet")
# Roles that templates know, and other names for them.
ROLES = {role: role for role in ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")}
ROLES |= {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "chatbot": "assistant"}
# Fields of a message that change what is said but cannot be used.
UNUSABLE = ("function_call", "images", "image", "audio", "videos", "weight")
# Data sets in a form of their own: their columns, and the row that we read.
CONVERSIONS = (
    ("prompt response_a response_b winner_model_a winner_model_b", '{f"response_{s}": [m for q, r in '
     'zip(json.loads(row["prompt"]), json.loads(row[f"response_{s}"])) for m in ({"role": "user", "content": q}, '
     '{"role": "assistant", "content": r})] for s in "ab"} | {"label": "a" if int(row["winner_model_a"]) else "b" if '
     'int(row["winner_model_b"]) else None}'),
    ("response_0 response_1 better_response_id", '{"question": row["prompt"], "response_a": row["response_0"], '
     '"response_b": row["response_1"], "label": "ab"[row["better_response_id"]]}'),
    ("history human_ref_A human_ref_B labels", '{"question": row["history"], "response_a": row["human_ref_A"], '
     '"response_b": row["human_ref_B"], "label": "ba"[row["labels"]]}'),
    ("conversation_a conversation_b winner turn", '{"response_a": row["conversation_a"][:2 * row["turn"]], "response_b": '
     'row["conversation_b"][:2 * row["turn"]], "label": {"model_a": "a", "model_b": "b"}.get(row["winner"])}'),
    ("conversation_a conversation_b winner", '{"response_a": row["conversation_a"], "response_b": row["conversation_b"], '
     '"label": {"model_a": "a", "model_b": "b"}.get(row["winner"])}'),
    ("context response1 response2 overall_preference", '{"prompt": row["context"], "response_a": row["response1"], '
     '"response_b": row["response2"], "label": "b" if row["overall_preference"] > 0 else '
     '"a" if row["overall_preference"] < 0 else None}'),
    ("prompt response_1 response_2 preference_strength", '{"question": row["prompt"], "response_a": row["response_1"], '
     '"response_b": row["response_2"], "label": "b" if row["preference_strength"] > 0 else '
     '"a" if row["preference_strength"] < 0 else None}'),
    ("question answer_0 answer_1 score_0 score_1", '{"question": row["question"]["full_text"], "response_a": '
     'row["answer_0"], "response_b": row["answer_1"], "label": "a" if row["score_0"] > row["score_1"] else '
     '"b" if row["score_0"] < row["score_1"] else None}'),
    ("info summaries choice", '{"prompt": (row["info"]["post"] or row["info"]["article"]) + "\\n\\nTL;DR:", "response_a": '
     'row["summaries"][0]["text"], "response_b": row["summaries"][1]["text"], "label": "ab"[row["choice"]]}'),
    ("input preferred_output non_preferred_output", '{"prompt": row["input"]["messages"], '
     '"tools": row["input"].get("tools"), "chosen": row["preferred_output"], "rejected": row["non_preferred_output"]}'),
    ("instruction chosen_response rejected_response", '{"instruction": row["instruction"], '
     '"chosen": row["chosen_response"], "rejected": row["rejected_response"]}'),
    ("question response_j response_k", '{"question": row["question"], "chosen": row["response_j"], '
     '"rejected": row["response_k"]}'),
    ("instruction output", '{"prompt": [{"role": "user", "content": "\\n\\n".join(filter(None, [row["instruction"], '
     'row.get("input")]))}], "completion": row["output"]}'),
)


# ----------------------------------------------------------------------------------------------------------------------
# Rows

def parse_row(row, place):
    """Bring a preference row of any supported format into one form.

    Formats (TRL's preference types and the columns of the usual data sets):
      {prompt, chosen, rejected} and {chosen, rejected}, each value a string or a list of messages;
      whole HH dialogues ("\\n\\nHuman: … \\n\\nAssistant: …");
      {prompt, response_a, response_b} with an optional label "a" or "b", and an optional truth "a" or "b", which no
      annotator sees: it only grades their labels (toy.py).
    The prompt may also be a user's turn in `question`, `instruction` or `input`, or messages in `conversations`. A column
    `system` is the conversation's system message, and `tools` are its tools.
    Returns {"prompt", "responses": [2], "label", "truth"}. Prompt and responses are strings or lists of messages; label
    and truth are 0 or 1 (the index of the better response) or None.
    Raises DataError with `place` and the field.
    """
    _check_is_object(row, place)
    ranked = row.get("chosen") is not None or row.get("rejected") is not None
    side_by_side = row.get("response_a") is not None or row.get("response_b") is not None
    if ranked and side_by_side:
        raise DataError(f"{place}: has chosen or rejected and response_a or response_b; keep one of the two forms")
    if ranked:
        fields, label, truth = ("chosen", "rejected"), 0, 0
    elif side_by_side:
        _check_verdict_is_read(row, place)
        fields = ("response_a", "response_b")
        label, truth = (_letter(row, name, place) for name in ("label", "truth"))
    else:
        raise _unknown_columns(row, place, "chosen and rejected, or response_a and response_b")
    sides = [text_or_messages(row.get(field), f"{place}, field {field}") for field in fields]
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise DataError(f"{place}: {fields[0]} and {fields[1]} must both be strings or both be lists of messages")
    used, prompt = _given_prompt(row, sides, place)
    if all(map(_is_written_out, sides)):
        raise DataError(f"{place}, field {fields[0]}: {WRITTEN_OUT}")

    if isinstance(sides[0], list):
        prompt, sides = _split_messages(prompt, sides, fields, place)
        for field, side in zip(fields, sides):
            if side[-1]["role"] != "assistant":
                raise DataError(f"{place}, field {field}: must end with an assistant message, but ends with one from "
                                f"{one_line(side[-1]['role'], 80)}")
    elif prompt is None:
        if fields[0] == "response_a":
            raise DataError(f"{place}, field prompt: expected a string or a list of messages, found nothing")
        prompt, sides = _split_strings(sides, fields, place)
        others = [name for name in row if name not in fields and _is_prose(row[name])] if not prompt.strip() else []
        if others:
            raise _no_prompt(fields, others, place)
    elif isinstance(prompt, list):
        sides = [[{"role": "assistant", "content": side}] for side in sides]
    elif sides[0].lstrip().startswith("Human:") and "\n\nAssistant:" in os.path.commonprefix(sides):  # whole, as in HH
        if not (hh_messages(prompt) and all(side.startswith(prompt) for side in sides)):
            raise DataError(f"{place}, field prompt: is not how {fields[0]} and {fields[1]} begin, which are whole "
                            "dialogues; leave it out")
        sides = [side[len(prompt):] for side in sides]
    prompt, sides = _with_system(row, prompt, sides, place)
    _check_all_is_used(row, used, [prompt, *sides], place)
    return {"prompt": _with_tools(row, prompt, place), "responses": sides, "label": label,
            "truth": label if truth is None else truth}


def parse_example(row, place):
    """The SFT examples of a row: [(prompt, response)], each a string or a list of messages.

    Formats: {messages} (or {conversations}), and {prompt, completion} with strings or lists of messages. In a conversation,
    every assistant message that answers something is an example: it is the response, and all messages before it are the
    prompt. A column `system` is the system message, and `tools` are the tools.
    Raises DataError with `place` and the field.
    """
    _check_is_object(row, place)
    field = next((name for name in ("messages", "conversations", "completion") if row.get(name) is not None), None)
    if field is None:
        raise _unknown_columns(row, place, "messages, or prompt and completion")
    completion = text_or_messages(row[field], f"{place}, field {field}")
    if field == "completion":
        prompt = _prompt(row.get("prompt"), f"{place}, field prompt")
    elif isinstance(completion, str):
        raise DataError(f"{place}, field {field}: expected a list of messages, found a string")
    else:
        prompt = []
    prompt, [completion] = _with_system(row, prompt, [completion], place)
    _check_all_is_used(row, field, [prompt, completion], place)
    if isinstance(prompt, str) and isinstance(completion, str):
        _with_tools(row, prompt, place)
        return [(prompt, completion)]
    prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    examples = [(_with_tools(row, prompt + completion[:n], place), [message]) for n, message in enumerate(completion)
                if message["role"] == "assistant" and prompt + completion[:n]]
    if not examples:
        raise DataError(f"{place}, field {field}: has no assistant message that answers another message")
    return examples


def parse_prompt(row, place):
    """The prompt of a row, a string or messages, for a model to answer. Responses that the row has already are not read.

    It is in the first column of PROMPTS that the row has; `system` and `tools` are read as in parse_row. Raises DataError
    with `place` and the field.
    """
    _check_is_object(row, place)
    field = next((name for name in PROMPTS if row.get(name) not in (None, [])), None)
    if field is None:
        raise _unknown_columns(row, place, "a prompt")
    prompt = _prompt(row[field], f"{place}, field {field}")
    if isinstance(prompt, str) and not prompt.strip():
        raise DataError(f"{place}, field {field}: is empty; remove the row")
    if isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        raise DataError(f"{place}, field {field}: ends with the assistant's message; leave that one to the model")
    if isinstance(prompt, str) and field != "prompt":
        prompt = [{"role": "user", "content": prompt}]
    prompt, _ = _with_system(row, prompt, [], place)
    answered = {"conversations", "conversation", "messages"}  # beside a prompt: the same, with a response
    _check_all_is_used({name: value for name, value in row.items() if name not in answered}, field, [prompt], place)
    return _with_tools(row, prompt, place)


def _check_is_object(row, place):
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with fields, found {type(row).__name__}")


def _unknown_columns(row, place, needed):
    """The DataError for a row without the columns that are needed, with the line that converts it if we know its form."""
    if line := _conversion(row):
        return DataError(f"{place}: needs {needed}; turn each row into {line}")
    return DataError(f"{place}: needs {needed}; it has {one_line(', '.join(map(str, row)), 80) or 'no fields'}")


def _conversion(row):
    """The line that converts a row of a known form, or None."""
    return next((line for columns, line in CONVERSIONS
                 if all(row.get(name) is not None for name in columns.split())), None)


def _check_verdict_is_read(row, place):
    """Refuse a row without a label in which another column says which response is better: that column would go unread."""
    name = next((name for name in filter(row.__contains__, VERDICTS) if row[name] not in (None, "", [])), None)
    if name is None or "label" in row:
        return
    line = _conversion(row)
    raise DataError(f"{place}, field {name}: says which response is better, and is not read; " + (
        f"turn each row into {line}" if line else 'write the label, "a" or "b", into a column label, or remove the column'))


def _no_prompt(fields, others, place):
    """The DataError for responses that share no beginning.  others: columns that are not read; one may be the prompt."""
    return DataError(f"{place}: has no prompt: no column has that name, and {fields[0]} and {fields[1]} share no beginning; "
                     f"call the column that holds it prompt ({one_line(', '.join(map(repr, others)), 80)}?), or say that "
                     'there is none with "prompt": ""')


def _letter(row, name, place):
    """Index of the response that a field with "a" or "b" names, or None if the field is empty."""
    value = row.get(name)
    if value in (None, ""):
        return None
    if value not in ("a", "b"):
        raise DataError(f"{place}, field {name}: expected \"a\" or \"b\", found {value!r:.80}")
    return "ab".index(value)


def _prompt(value, place):
    """A prompt: a string or a list of messages."""
    if _is_written_out(value):
        raise DataError(f"{place}: {WRITTEN_OUT}")
    return text_or_messages(value, place)


def _given_prompt(row, sides, place):
    """(the column, the prompt) that a row gives beside its responses, or (None, None)."""
    if row.get("prompt") is not None:
        return "prompt", _prompt(row["prompt"], f"{place}, field prompt")
    if isinstance(sides[0], list) and not sides[0][0]["role"] == sides[1][0]["role"] == "assistant":
        return None, None  # the responses are whole conversations
    for name in PROMPTS:
        if row.get(name) not in (None, "", []):
            prompt = _prompt(row[name], f"{place}, field {name}")
            prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            if prompt[-1]["role"] != "assistant":  # else it is a whole conversation
                return name, prompt
    return None, None


def _with_system(row, prompt, sides, place):
    """Prompt and responses with the row's system message. A row that has a column for it is a conversation, even if the
    column is empty, as it is for some rows of such data sets."""
    name = next((name for name in SYSTEMS if name in row), None)
    if name is None:
        return prompt, sides
    system = "" if row[name] is None else row[name]
    if not isinstance(system, str):
        raise DataError(f"{place}, field {name}: expected a string, found {type(system).__name__}")
    checked_text(system, f"{place}, field {name}")
    if isinstance(prompt, str):
        dialogue = hh_messages(prompt)
        if row.get("prompt") is None and not dialogue:
            raise DataError(f"{place}, field {name}: goes with a prompt, and the row has none")
        prompt = dialogue or [{"role": "user", "content": prompt}]
        sides = [[{"role": "assistant", "content": side.strip() if dialogue else side}] if isinstance(side, str) else side
                 for side in sides]
    if not system.strip():
        return prompt, sides
    talk = prompt or sides[0]
    if talk[0]["role"] in ("system", "developer"):
        if talk[0]["content"].strip() != system.strip():
            raise DataError(f"{place}, field {name}: the conversation has another system message; keep one of the two")
        return prompt, sides
    return [{"role": "system", "content": system}, *prompt], sides


def _with_tools(row, prompt, place):
    """The prompt with the row's tools as its first message."""
    tools = without_none(row.get("tools"))
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise DataError(f"{place}, field tools: not valid JSON ({one_line(error, 80)})")
    if tools in (None, "", []):
        return prompt
    if not isinstance(tools, list) or not all(isinstance(tool, dict) and function_name(tool) for tool in tools):
        raise DataError(f"{place}, field tools: expected a list of functions with a name, found {one_line(repr(tools), 80)}")
    if isinstance(prompt, str):
        raise DataError(f"{place}, field tools: goes with a prompt of messages, and this one is a string")
    return [{"role": "tools", "content": _json(tools, f"{place}, field tools")}, *prompt]


def function_name(call):
    """The name of the function of a tool or a tool call, or None."""
    inner = call.get("function", call)
    return inner.get("name") if isinstance(inner, dict) and isinstance(inner.get("name"), str) else None


def _check_all_is_used(row, used, parts, place):
    """Refuse a row with a column, other than the one `used`, that asks for something which is in none of its parts."""
    said = None
    for name in filter(row.__contains__, ASKING):
        value = row[name]
        if name in (used, "tools") or value in (None, "", [], {}) or isinstance(value, (bool, int, float)):
            continue
        if name in NAMED and not _is_prose(value):
            continue
        if said is None:
            said = squeezed("\n".join(text for part in parts for text in _strings(part)))
        texts = [squeezed(text) for text in _strings(value)]
        if not texts or not all(text in said for text in texts):
            raise DataError(f"{place}, field {name}: would be left out; put it into the prompt, or remove the column")


def _strings(value):
    """Every text in a value of a row, however deep, except the names of roles and kinds."""
    if isinstance(value, str):
        return [value]
    items = value.items() if isinstance(value, dict) else ((None, item) for item in value) if isinstance(value, list) else ()
    return [text for name, item in items if name not in ("role", "from", "type") for text in _strings(item)]


def squeezed(text):
    """A text without its white space."""
    return "".join(text.split())


# ----------------------------------------------------------------------------------------------------------------------
# Messages

def text_or_messages(value, place):
    """Check a prompt or response: a string, a list of messages, or one message. Returns a string or a list."""
    if isinstance(value, str):
        return checked_text(value, place)
    if isinstance(value, dict) and {"role", "from"} & value.keys():
        value = [value]
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: expected a string or a list of messages, found "
                        f"{'nothing' if value is None else 'an empty list' if value == [] else type(value).__name__}")
    return [_message(message, f"{place}, message {n}") for n, message in enumerate(value, 1)]


def _is_prose(value):
    """Whether a value can be a prompt: several words, a list or a dict. A single word is usually an id or a name."""
    return isinstance(value, (list, dict)) and bool(value) or isinstance(value, str) and len(value.split(maxsplit=1)) > 1


def _is_written_out(value):
    """Whether it is a list of messages as text, in JSON or as Python prints it, which is what a CSV file makes of one."""
    if not (isinstance(value, str) and re.match(r"\s*\[\s*\{", value)):
        return False
    for read in (json.loads, ast.literal_eval):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's, about a text's backslashes
                items = read(value.strip())
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            continue
        return all(isinstance(item, dict) and ({"role", "content"} <= item.keys() or {"from", "value"} <= item.keys())
                   for item in items)
    return False


def _message(message, place):
    """One message with the fields that we use. Role and content may also be called from and value, as in ShareGPT's form."""
    given = without_none(message) if isinstance(message, dict) else {}
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if isinstance(content, list) and len(content) == 1 and isinstance(content[0], dict) and content[0].get("type") == "text":
        content = content[0].get("text")
    if content is None and given.get("tool_calls"):
        content = ""
    if not isinstance(role, str) or not isinstance(content, str):
        raise DataError(f"{place}: expected {{\"role\": text, \"content\": text}}, found {message!r:.80}")
    if role not in ROLES:
        raise DataError(f"{place}: its role is {one_line(repr(role), 80)}; expected one of {', '.join(ROLES)}")
    for name in UNUSABLE:
        if given.get(name) not in (None, "", [], {}, 1):  # a weight of 1 is no weight
            raise DataError(f"{place}: its field {name} cannot be used; take it out"
                            + (", or write it as tool_calls" if name == "function_call" else ""))
    made = {"role": ROLES[role], "content": checked_text(content, place)}
    reasoning = next((given[name] for name in ("reasoning_content", "reasoning", "thinking") if given.get(name)), None)
    if reasoning is not None:
        if not isinstance(reasoning, str):
            raise DataError(f"{place}: its reasoning must be a text, found {reasoning!r:.80}")
        made["reasoning_content"] = checked_text(reasoning, place)
    if given.get("tool_calls"):
        made["tool_calls"] = _tool_calls(given["tool_calls"], place)
    if made["role"] not in ("system", "user", "assistant"):
        made |= {name: checked_text(str(given[name]), place) for name in ("name", "tool_call_id") if given.get(name)}
    return made


def _tool_calls(calls, place):
    """Tool calls with their arguments as an object. OpenAI's API has them as JSON text, which templates would quote."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) and function_name(call) for call in calls):
        raise DataError(f"{place}: expected tool_calls as a list of functions with a name, found {calls!r:.80}")
    calls = json.loads(_json(calls, place))
    for call in calls:
        inner = call.get("function", call)
        if isinstance(inner.get("arguments"), str):
            try:
                inner["arguments"] = json.loads(inner["arguments"] or "{}")
            except ValueError as error:
                raise DataError(f"{place}: the arguments of tool call {function_name(call)} are not valid JSON ({error})")
    return calls


def _json(value, place):
    try:
        return checked_text(json.dumps(value, ensure_ascii=False), place)
    except TypeError as error:
        raise DataError(f"{place}: cannot be written as JSON ({error})")


def without_none(value):
    """A value without the fields that are None, however deep: Arrow gives every object the fields of all the others."""
    if isinstance(value, dict):
        return {name: without_none(item) for name, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list) else value


def checked_text(text, place):
    """The text itself. Raises DataError if it is not valid Unicode or contains our SENTINEL."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: not valid Unicode (a lone surrogate or a byte that is not UTF-8, at character "
                        f"{error.start}); repair the text")
    if SENTINEL in text:
        raise DataError(f"{place}: holds the characters U+E0F7 U+E0A1 U+E0F7, which this program uses as a marker; "
                        "remove them")
    return text


def message_text(message):
    """All that a reader has to see of a message: its reasoning, its content and the tools that it calls."""
    reasoning = message.get("reasoning_content")
    calls = [f"{function_name(call)}({json.dumps(call.get('function', call).get('arguments', {}), ensure_ascii=False)})"
             for call in message.get("tool_calls", ())]
    return "\n\n".join(filter(None, [reasoning and f"<think>\n{reasoning}\n</think>", message["content"], *calls]))


def template_input(messages):
    """(messages, tools) as a chat template takes them. The reasoning goes under all the names that templates have for it."""
    tools = None
    if messages and messages[0]["role"] == "tools":
        tools, messages = json.loads(messages[0]["content"]), messages[1:]
    names = "reasoning_content", "reasoning", "thinking"
    return [{**message, **dict.fromkeys(names, message["reasoning_content"])} if "reasoning_content" in message else message
            for message in messages], tools


# ----------------------------------------------------------------------------------------------------------------------
# Where the prompt ends

def _split_messages(prompt, sides, fields, place):
    """Prompt and responses of a conversational row.

    Each side is a whole conversation, or just the reply if it begins with the assistant. A string prompt next to whole
    conversations (as in ultrafeedback_binarized) repeats one of their messages.
    """
    replies = sides[0][0]["role"] == sides[1][0]["role"] == "assistant"
    if prompt is None and replies and sides[0][0] != sides[1][0]:
        raise DataError(f"{place}: has no prompt: {fields[0]} and {fields[1]} begin with the assistant's message; put what "
                        "it answers into a column prompt")
    if prompt is not None and replies and not _begins_with(sides, prompt):
        return ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt), sides
    common = 0
    while common < min(map(len, sides)) - 1 and sides[0][common] == sides[1][common]:
        common += 1
    shared = sides[0][:common]
    ends = [side[common]["role"] for side in sides]
    if ends != ["assistant", "assistant"]:
        raise DataError(f"{place}: the prompts of {fields[0]} and {fields[1]} differ at message {common + 1} "
                        f"({one_line(' against '.join(ends), 80)}); both responses must answer the same prompt")
    if isinstance(prompt, list) and shared[:len(prompt)] != prompt:
        raise DataError(f"{place}, field prompt: is not how {fields[0]} and {fields[1]} begin")
    if isinstance(prompt, str) and prompt.strip() not in [m["content"].strip() for m in shared]:
        raise DataError(f"{place}, field prompt: is not one of the messages that {fields[0]} and {fields[1]} share")
    return shared, [side[common:] for side in sides]


def _begins_with(sides, prompt):
    """Whether sides that begin with the assistant (a greeting) are whole conversations that include the prompt."""
    if isinstance(prompt, list):
        return any(side[:len(prompt)] == prompt for side in sides)
    return any({"role": "user", "content": prompt.strip()} in [{**m, "content": m["content"].strip()} for m in side]
               for side in sides)


def _split_strings(sides, fields, place):
    """The implicit prompt of two strings: what both begin with, up to the last Assistant turn or the last whole word."""
    prompt = os.path.commonprefix(sides)
    if all(side.lstrip().startswith("Human:") for side in sides):
        if "\n\nAssistant:" not in prompt:
            raise DataError(f"{place}: the prompts of {fields[0]} and {fields[1]} differ; both must answer the same prompt")
        end = prompt.rfind("\n\nAssistant:") + len("\n\nAssistant:")
    elif len(prompt) == min(map(len, sides)) and sides[0] != sides[1]:  # one side continues the other, which is the prompt
        end = len(prompt)
    else:  # a space belongs to the word that follows it
        end = max(prompt.rfind(space) for space in " \n\t")
    return prompt[:max(end, 0)], [side[max(end, 0):] for side in sides]


def hh_messages(prompt):
    """The messages of an HH dialogue string, or None if it is not one. Consecutive turns of one speaker are joined."""
    if not (isinstance(prompt, str) and prompt.lstrip().startswith("Human:")
            and prompt.rstrip().endswith("\n\nAssistant:")):
        return None
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", "\n\n" + prompt.strip())[1:-2]  # the last turn is the response's
    messages = []
    for speaker, text in zip(parts[::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def unique_keys(items):
    """A JSON object as a dict. Raises ValueError if a key appears twice; Python silently keeps the last."""
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {one_line(twice, 80)} appears twice; keep one")
    return found
