"""Preference pairs: from rows to token ids to batches.

    row                          → parse_row      prompt, two responses, and a label or none: one form for all formats
    pair                         → Renderer       token ids: chat template on the whole conversation, one BOS, one EOS
    sources                      → load_pairs     Pairs (no label inside), and the labels, which only the oracle gets
    epoch                        → epoch_order    which pairs each step takes
    step                         → split_batch    which pairs each rank takes in each micro-step
    pairs                        → collate        PairBatch, one row per pair: [prompt | y1 | y2]

Files, folders, the hub, mixing and decontamination are in runtime/sources.py.

Departures from the official code: the label is removed here, before anything else sees the pair. The prompt is what both
conversations share, and a row whose prompts differ is refused. A response is what follows the prompt in the templated
conversation, not a conversation of its own. Nothing is dropped without being counted.

A hash of the pair's content decides which response is y1. That does not depend on the label and is the same in every
run, so a label in a ledger keeps its meaning.

Legend: B pairs, T tokens of a row, N response tokens of a batch.  Try it: `python data.py FILE_OR_FOLDER MODEL_DIR`
prints the first pairs as the model will see them.
"""

import hashlib
import json
import os
import re
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise

import datasets
import jinja2
import numpy as np
import torch

from runtime.errors import one_line
from runtime.ranks import rank_0_first, say
from runtime.sources import DataError, decontaminate, hash_of, mix, parse_source, processes, read_rows

# Increase this with any change to what a row becomes: it is part of every cache key.
VERSION = 3
# Goes into special-token text inside a message, so that the tokeniser does not read it as the token. These are
# private-use characters that nobody types; `Renderer.encode` splits the text there and removes them.
SENTINEL = "\ue0f7\ue0a1\ue0f7"
# epoch_order groups pairs of similar length within windows of this many pairs.
LENGTH_WINDOW = 2048


# ----------------------------------------------------------------------------------------------------------------------
# One form for every format

def parse_row(row, place):
    """Bring a preference row of any supported format into one form.

    Formats (TRL's preference types and the columns of the usual data sets):
      {prompt, chosen, rejected} and {chosen, rejected}, each value a string or a list of {"role", "content"} messages;
      whole HH dialogues ("\\n\\nHuman: … \\n\\nAssistant: …");
      {prompt, response_a, response_b} with an optional label "a" or "b", and an optional truth "a" or "b", which no
      annotator sees: it only grades their labels (toy.py).
    Returns {"prompt", "responses": [2], "label", "truth"}. Prompt and responses are strings or lists of messages; label
    and truth are 0 or 1 (the index of the better response) or None.
    Raises DataError with `place` and the field.
    """
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with fields, found {type(row).__name__}")
    if row.get("chosen") is not None or row.get("rejected") is not None:
        fields, label, truth = ("chosen", "rejected"), 0, 0
    elif row.get("response_a") is not None or row.get("response_b") is not None:
        fields = ("response_a", "response_b")
        label, truth = (_letter(row, name, place) for name in ("label", "truth"))
    else:
        raise DataError(f"{place}: needs chosen and rejected, or response_a and response_b; it has {_fields_of(row)}")
    sides = [text_or_messages(row.get(field), f"{place}, field {field}") for field in fields]
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise DataError(f"{place}: {fields[0]} and {fields[1]} must both be strings or both be lists of messages")
    prompt = row.get("prompt")
    if prompt is not None:
        prompt = text_or_messages(prompt, f"{place}, field prompt")

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
    elif isinstance(prompt, list):
        sides = [[{"role": "assistant", "content": side}] for side in sides]
    return {"prompt": prompt, "responses": sides, "label": label, "truth": label if truth is None else truth}


def parse_example(row, place):
    """The SFT examples of a row: [(prompt, response)], each a string or a list of messages.

    Formats: {messages}, and {prompt, completion} with strings or lists of messages. In a conversation, every assistant
    message that answers something is an example: it is the response, and all messages before it are the prompt.
    Raises DataError with `place` and the field.
    """
    if not isinstance(row, dict):
        raise DataError(f"{place}: expected an object with fields, found {type(row).__name__}")
    if row.get("messages") is not None:
        field, prompt, completion = "messages", [], text_or_messages(row["messages"], f"{place}, field messages")
        if isinstance(completion, str):
            raise DataError(f"{place}, field messages: expected a list of messages, found a string")
    elif row.get("completion") is not None:
        field = "completion"
        prompt, completion = (text_or_messages(row.get(name), f"{place}, field {name}") for name in ("prompt", field))
        if isinstance(prompt, str) and isinstance(completion, str):
            return [(prompt, completion)]
        prompt = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        completion = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    else:
        raise DataError(f"{place}: needs messages, or prompt and completion; it has {_fields_of(row)}")
    examples = [(prompt + completion[:n], [message]) for n, message in enumerate(completion)
                if message["role"] == "assistant" and prompt + completion[:n]]
    if not examples:
        raise DataError(f"{place}, field {field}: has no assistant message that answers another message")
    return examples


def _fields_of(row):
    return one_line(", ".join(map(str, row)), 80) or "no fields"


def _letter(row, name, place):
    """Index of the response that a field with "a" or "b" names, or None if the field is empty."""
    value = row.get(name)
    if value in (None, ""):
        return None
    if value not in ("a", "b"):
        raise DataError(f"{place}, field {name}: expected \"a\" or \"b\", found {value!r:.80}")
    return "ab".index(value)


def text_or_messages(value, place):
    """Check a prompt or response: a string, or a list of messages. Keeps only the role and content of a message."""
    if isinstance(value, str):
        return checked_text(value, place)
    if not isinstance(value, list) or not value:
        raise DataError(f"{place}: expected a string or a list of messages, found "
                        f"{'nothing' if value is None else 'an empty list' if value == [] else type(value).__name__}")
    messages = []
    for n, message in enumerate(value, 1):
        if not isinstance(message, dict) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise DataError(f"{place}, message {n}: expected {{\"role\": text, \"content\": text}}, found {message!r:.80}")
        messages.append({k: checked_text(message[k], f"{place}, message {n}") for k in ("role", "content")})
    return messages


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


def _split_messages(prompt, sides, fields, place):
    """Prompt and responses of a conversational row.

    Each side is a whole conversation, or just the reply if it begins with the assistant. A string prompt next to whole
    conversations (as in ultrafeedback_binarized) repeats one of their messages.
    """
    replies = sides[0][0]["role"] == sides[1][0]["role"] == "assistant"
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
    if not (isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and prompt.endswith("\n\nAssistant:")):
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


def canonical(parsed):
    """(id, order) of a parsed row. Neither depends on the order in which the row gives its responses.

    id: hash of the pair's content.  order: indices of the responses that become y1 and y2, drawn from that hash.
    """
    texts = [json.dumps(r, sort_keys=True) for r in parsed["responses"]]
    prompt = json.dumps(parsed["prompt"], sort_keys=True)
    digest = hashlib.blake2b("\0".join([prompt, *sorted(texts)]).encode(), digest_size=16)
    order = sorted(range(len(texts)), key=lambda k: texts[k])
    if hashlib.blake2b(digest.digest(), digest_size=1).digest()[0] & 1:
        order.reverse()
    return digest.hexdigest(), order


def parsed_rows(source, split, config_name):
    """Yield the pairs of a split in the columns of parse_source."""
    place = None
    for place, row in read_rows(source, split, config_name):
        parsed = parse_row(row, place)
        id, order = canonical(parsed)
        sign = {None: 0, order[0]: 1, order[1]: -1}
        first, second = (json.dumps(parsed["responses"][k]) for k in order)
        yield {"id": id, "prompt": json.dumps(parsed["prompt"]), "first": first, "second": second, "place": place,
               "label": sign[parsed["label"]], "truth": sign[parsed["truth"]]}
    if place is None:
        raise DataError(f"{source}: its split {split} has no rows")


def parsed_examples(source, split, config_name):
    """Yield the SFT examples of a split in the same columns, with None as the second response."""
    place = None
    for place, row in read_rows(source, split, config_name):
        for prompt, response in parse_example(row, place):
            id, _ = canonical({"prompt": prompt, "responses": [response]})
            yield {"id": id, "prompt": json.dumps(prompt), "first": json.dumps(response), "second": None, "place": place,
                   "label": 0, "truth": 0}
    if place is None:
        raise DataError(f"{source}: its split {split} has no rows")


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens

class Renderer:
    """Turns pairs into token ids: chat template, one BOS if the model uses one, exactly one EOS, truncation.

    tokenizer: a transformers tokeniser.  max_prompt_length, max_length: in tokens.
    auto_insert_empty_system_msg: begin with an empty system message if a conversation has none and the template takes one.
    """

    def __init__(self, tokenizer, max_prompt_length, max_length, auto_insert_empty_system_msg=True):
        self.tokenizer, self.max_prompt_length, self.max_length = tokenizer, max_prompt_length, max_length
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token: set one, or responses never end")
        self.eos = tokenizer.eos_token_id
        # The model uses a BOS if its tokeniser adds one. Qwen and GPT-2 name a BOS but never use it.
        ids = tokenizer("a").input_ids
        self.bos = tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None
        special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        self.special = re.compile("|".join(map(re.escape, sorted(filter(lambda s: len(s) > 1, special), key=len,
                                                                 reverse=True)))) if special else None
        template = str(tokenizer.chat_template or "")
        self.border = self._border(template)
        self.line = tokenizer("\n", add_special_tokens=False).input_ids
        self.empty_system = auto_insert_empty_system_msg and ("system" in template or "<|im_start|>" in template)
        if self.empty_system:
            try:
                tokenizer.apply_chat_template([{"role": "system", "content": ""}, {"role": "user", "content": "a"}],
                                              tokenize=False)
            except jinja2.TemplateError:  # Gemma's template mentions system messages only to refuse them
                self.empty_system = False

    def fingerprint(self):
        """Hash of everything that decides which tokens a text becomes."""
        content = repr(self.tokenizer)
        if self.tokenizer.is_fast:  # padding and truncation are left over from its last call and do not matter
            content = {**json.loads(self.tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
        return hash_of(VERSION, content, self.tokenizer.chat_template, self.tokenizer.special_tokens_map, self.bos, self.eos,
                       self.max_prompt_length, self.max_length, self.empty_system)

    def protect(self, text):
        """Make special-token text inside a message plain text, by putting a sentinel after its first character."""
        if self.special is None:
            return text
        return self.special.sub(lambda m: m[0][0] + SENTINEL + m[0][1:], text)

    def _border(self, template):
        """Pattern of the places where a text can be cut without changing its tokens.

        Those are the places before each special token that the template writes, because a fast tokeniser splits there
        before it does anything else. Some special tokens do not qualify, because they affect their surroundings: one that
        takes the space on its left, that may not touch a word, that is matched in normalised text only, or that overlaps
        with another added token.
        """
        if not self.tokenizer.is_fast or self.tokenizer.split_special_tokens:
            return re.compile("(?!)")  # matches nowhere
        added = self.tokenizer.added_tokens_decoder.values()
        contents = {token.content for token in added}

        def overlaps(text):
            starts = tuple(text[:n] for n in range(1, len(text)))
            return text[0].isspace() or any(other.endswith(starts) or text in other and text != other for other in contents)

        written = [token.content for token in added
                   if token.special and not (token.lstrip or token.single_word or token.normalized)
                   and (token.content in template or token.content == self.tokenizer.eos_token)]
        return re.compile("|".join(re.escape(text) for text in written if not overlaps(text)) or "(?!)")

    def tokenise(self, texts):
        """{text: its token ids, nothing added}, in one call.

        Texts are cut at their borders and each distinct piece is tokenised once. The three texts of a pair share a prompt.
        """
        cut = {}
        for text in texts:
            bounds = [0, *(border.start() for border in self.border.finditer(text)), len(text)]
            cut[text] = [text[a:b] for a, b in pairwise(bounds) if a < b]
        pieces = list(dict.fromkeys(chain.from_iterable(cut.values())))
        ids = self.tokenizer(pieces, add_special_tokens=False, return_attention_mask=False).input_ids if pieces else []
        ids = dict(zip(pieces, ids))
        return {text: list(chain.from_iterable(ids[piece] for piece in parts)) for text, parts in cut.items()}

    def encode(self, texts):
        """{text: its token ids, nothing added}. A text with sentinels is split there and its pieces tokenised separately."""
        split = {text: text.split(SENTINEL) for text in texts}
        first = self.tokenise(pieces[0] for pieces in split.values())
        # Tokenise each later piece after a newline, then drop the newline, so that a mid-text piece gets no leading "▁".
        later = {piece for pieces in split.values() for piece in pieces[1:]}
        after_line = {text[1:]: ids for text, ids in self.tokenise("\n" + piece for piece in later).items()}
        n = len(self.line)
        merged = [piece for piece, ids in after_line.items() if ids[:n] != self.line]  # newline inside a longer token
        later = {piece: ids[n:] for piece, ids in after_line.items()} | self.tokenise(merged)
        return {text: sum((later[piece] for piece in pieces[1:]), first[pieces[0]]) for text, pieces in split.items()}

    def texts(self, prompt, responses):
        """(prompt text, [prompt and response text] * 2) as the model will read them, special-token text protected."""
        messages = hh_messages(prompt) if self.tokenizer.chat_template else None
        if messages:
            responses = [[{"role": "assistant", "content": response.strip()}] for response in responses]
            prompt = messages
        if isinstance(prompt, str):
            start = self.protect(prompt)
            full = [self.protect(prompt + response) for response in responses]
            # If special-token text spans the border between prompt and response, protect the two separately.
            return start, [f if f.startswith(start) else start + SENTINEL + self.protect(r)
                           for f, r in zip(full, responses)]
        if not self.tokenizer.chat_template:
            raise DataError("messages need a chat template and the tokenizer has none: set chat_template")
        if self.empty_system and prompt[:1] and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": ""}] + prompt
        protected = [[{k: self.protect(v) for k, v in m.items()} for m in part] for part in (prompt, *responses)]
        full = [self.tokenizer.apply_chat_template(protected[0] + r, tokenize=False) for r in protected[1:]]
        # The prompt is what the model is given at inference, if the conversation continues from there. Otherwise (a template
        # without a generation prompt) it is the conversation so far.
        for ask in (True, False):
            text = self.tokenizer.apply_chat_template(protected[0], tokenize=False, add_generation_prompt=ask)
            if all(f.startswith(text) for f in full):
                return text, full
        raise DataError("the chat template does not render a conversation as the continuation of its prompt: "
                        "set another chat_template")

    def one_eos(self, ids):
        """End in exactly one EOS. What a template writes after it (a newline) is never generated, so it goes."""
        after = ids[::-1].index(self.eos) if self.eos in ids else None  # number of tokens after the last EOS
        if after is not None and not self.tokenizer.decode(ids[len(ids) - after:]).strip():
            ids = ids[:len(ids) - after]
            while ids and ids[-1] == self.eos:
                ids = ids[:-1]
        return ids + [self.eos]

    def __call__(self, prompt, responses):
        """(prompt_ids, [response_ids, response_ids]) of one pair."""
        return self.render([(prompt, responses)])[0]

    def render(self, pairs):
        """Token ids of pairs (prompt, [response, response]), each part a string or messages. Many at once is faster.

        A prompt keeps its last max_prompt_length tokens, a response its first max_length − len(prompt). A response comes
        back as [] if its text is empty or if no room is left for it.
        Returns [(prompt_ids, [response_ids, response_ids])].
        """
        texts = [self.texts(*pair) for pair in pairs]
        ids = self.encode({text for prompt, full in texts for text in (prompt, *full)})
        # The prompt's tokens are the ones that the model sees at inference. The response's tokens are those that follow
        # them; if the tokeniser merges across the border, the response is tokenised on its own.
        apart = {(prompt, f): (SENTINEL if prompt else "") + f[len(prompt):] for prompt, full in texts for f in full
                 if ids[f][:len(ids[prompt])] != ids[prompt]}
        own = self.encode(set(apart.values()))
        return [self.cut(ids[prompt], responses, [own[apart[prompt, f]] if (prompt, f) in apart else
                                                  ids[f][len(ids[prompt]):] for f in full])
                for (_, responses), (prompt, full) in zip(pairs, texts)]

    def cut(self, prompt_ids, responses, response_ids):
        """(prompt_ids, response_ids) with one BOS and one EOS, truncated to max_prompt_length and max_length."""
        while self.bos is not None and prompt_ids[:1] == [self.bos]:
            prompt_ids = prompt_ids[1:]
        bos = [] if self.bos is None else [self.bos]
        if not bos and prompt_ids[:1] == [self.tokenizer.bos_token_id] and "bos_token" in str(self.tokenizer.chat_template):
            bos, prompt_ids = prompt_ids[:1], prompt_ids[1:]  # the template adds the BOS, not the tokeniser (OLMo 2)
        keep = self.max_prompt_length - len(bos)
        prompt_ids = bos + prompt_ids[max(len(prompt_ids) - keep, 0):]
        if not prompt_ids:
            if self.tokenizer.bos_token_id is None:
                raise DataError("the prompt is empty and the tokenizer has no bos_token to predict the first token from")
            prompt_ids = [self.tokenizer.bos_token_id]
        room = max(self.max_length - len(prompt_ids), 0)
        empty = [not self._content(r).strip() for r in responses]
        return prompt_ids, [[] if e else self.one_eos(ids)[:room] for e, ids in zip(empty, response_ids)]

    @staticmethod
    def _content(response):
        return response if isinstance(response, str) else "".join(m["content"] for m in response)


def tokenize_rows(rows, renderer):
    """Parsed rows (columns of parse_source) → their token ids, number of tokens, and why to drop each, or ""."""
    pairs = [(json.loads(prompt), [json.loads(response) for response in (first, second) if response is not None])
             for prompt, first, second in zip(rows["prompt"], rows["first"], rows["second"])]
    try:
        tokens = renderer.render(pairs)
    except Exception:
        for place, pair in zip(rows["place"], pairs):  # find the row that failed
            try:
                renderer(*pair)
            except DataError as error:
                raise DataError(f"{place}: {error}")
            except Exception as error:  # such as a template's own raise_exception
                raise DataError(f"{place}: the chat template failed ({type(error).__name__}: {error})")
        raise
    prompts = [prompt for prompt, _ in tokens]
    firsts, seconds = [responses[0] for _, responses in tokens], [responses[-1] for _, responses in tokens]
    if rows["second"][0] is None:  # SFT examples
        drops, seconds = ["" if first else "empty response" for first in firsts], [[] for _ in firsts]
    else:
        drops = ["empty response" if not (first and second) else "equal responses" if first == second else ""
                 for first, second in zip(firsts, seconds)]
    return {"prompt_ids": prompts, "first_ids": firsts, "second_ids": seconds,
            "tokens": [sum(map(len, parts)) for parts in zip(prompts, firsts, seconds)],
            "drop": drops}


# ----------------------------------------------------------------------------------------------------------------------
# The data set of a run

@dataclass
class Pairs:
    """Tokenised pairs of one split. The training split never holds a label.

    table: a datasets.Dataset with columns id, prompt_ids, first_ids, second_ids, tokens (of the whole pair).
    fingerprint: changes with any id or token, and with their order.  counts: what was read, what was dropped and why.
    texts: the columns prompt, first, second of the same rows as JSON (a string or messages), for people and judges; and
    place, the row's file and number.
    kind: "train" or "test".  shared: whether a row of a batch holds both responses, or one (see PairBatch).
    ref_logps: (pairs, 2) fp32, log π_ref(y|x), once it is known.  labels: (pairs,) ±1.0, of the test split alone.
    """
    table: datasets.Dataset
    fingerprint: str
    counts: dict
    texts: datasets.Dataset | None = None
    kind: str = "train"
    shared: bool = True
    ref_logps: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def __post_init__(self):
        self.ids = self.table["id"][:]
        self.lengths = self.table["tokens"][:]
        self._arrow = self.table.with_format("arrow")

    def __len__(self):
        return len(self.table)

    def place(self, id):
        """Where a pair was read: "FILE, row N"."""
        return self.texts[self.ids.index(id)]["place"]

    def text_by_id(self):
        """A function from a pair's id to (prompt, first, second), each JSON."""
        rows = {id: row for row, id in enumerate(self.ids)}
        return lambda id: tuple(self.texts[rows[id]][name] for name in ("prompt", "first", "second"))

    def token_ids(self, rows):
        """[(prompt, first, second)] of these rows: integer arrays, straight from the memory-mapped Arrow table."""
        table, columns = self._arrow[rows], []
        for name in ("prompt_ids", "first_ids", "second_ids"):
            column = table[name].combine_chunks()  # one flat array of tokens, and the offsets at which rows begin and end
            tokens = column.values.to_numpy(zero_copy_only=False)
            columns.append([tokens[start:end] for start, end in pairwise(column.offsets.tolist())])
        return list(zip(*columns))

    def batch(self, rows, device):
        """The PairBatch of these rows on `device`, with reference log-probs and labels where the pairs have them."""
        assert self.labels is None or self.kind == "test", "training pairs must not hold labels"
        batch = collate(self, rows, self.shared)
        if self.ref_logps is not None:  # (B, 2); a filler's pair may not be one of those that were scored
            batch.ref_logps = self.ref_logps[batch.rows] if rows else torch.zeros(1, 2)
        batch.labels = None if self.labels is None else self.labels[batch.rows]  # (B,)
        return batch.to(device)


def load_pairs(mixer, splits, renderer, kind, configs=None, workers=None, decontaminate_with=None, max_samples=None,
               seed=42, say=print, examples=False):
    """Load one kind of split ("train" or "test") from a mix of sources.

    mixer: {source: fraction}; a source is a hub id, a `save_to_disk` folder, a folder with SPLIT.jsonl (parquet, csv,
    json), or one file, which is training data. A fraction takes a random share of the source's training pairs; test pairs
    are always taken whole.  splits: names of splits of this kind.  configs: {source: config name}.  workers: processes.
    decontaminate_with: drop the pairs that contain text of this benchmark.  max_samples: keep a random sample of at most
    this many pairs.  examples: read SFT examples; each is a pair with an empty second response and no label.
    Returns (Pairs, labels, truths). labels and truths, {pair id: +1 (y1 is better) or −1}, are for the oracle alone and
    leave out pairs without one.  Returns (None, {}, {}) if no source has such a split.
    Raises DataError.
    """
    load = partial(parse_source, parse=parsed_examples if examples else parsed_rows, version=VERSION,
                   variant=["examples"] if examples else [])
    rows = mix(mixer, splits, kind, load, configs, max_samples, seed)
    if rows is None:
        return None, {}, {}
    counts = {"rows": len(rows)}
    if decontaminate_with:
        rows = decontaminate(rows, decontaminate_with, workers)
        counts["contaminated"] = counts["rows"] - len(rows)

    rendering = renderer.fingerprint()
    if len(rows):
        rows = rows.map(
            tokenize_rows, fn_kwargs={"renderer": renderer}, batched=True, batch_size=256,
            num_proc=processes(workers, len(rows)), desc=f"tokenising {kind} pairs",
            new_fingerprint=hash_of(rows._fingerprint, rendering))
        rows = _drop_unusable(rows, counts)
    if not len(rows):
        raise DataError(f"{', '.join(mixer)}: no {kind} pair is left ({_plain(counts)})")

    labels, truths, conflicts = _answers(rows)
    pairs = Pairs(rows.select_columns(["id", "prompt_ids", "first_ids", "second_ids", "tokens"]),
                  hash_of(rendering, rows["id"][:], hash_of_tokens(rows)), counts,
                  rows.select_columns(["prompt", "first", "second", "place"]), kind)
    counts.update(repeated=len(pairs) - len(set(pairs.ids)), contradicting=conflicts)
    say(f"{kind}: {_plain(counts)}")
    return pairs, labels, truths


def hash_of_tokens(rows):
    """Hash of the token ids of all rows, in order. A template may print the date, so its text does not decide the tokens."""
    digest, columns = hashlib.blake2b(digest_size=16), ["prompt_ids", "first_ids", "second_ids"]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            column = table[name].combine_chunks()
            for values in (column.value_lengths(), column.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def load_split(config, tokenizer, kind, limit):
    """(Pairs or None, labels, truths) of the run's "train" or "test" splits, as load_pairs returns them."""
    renderer = Renderer(tokenizer, config.max_prompt_length, config.max_length, config.auto_insert_empty_system_msg)
    names = dict(zip(config.dataset_mixer, config.dataset_configs or ()))
    splits = [split for split in config.dataset_splits if ("train" in split) == (kind == "train")]
    return rank_0_first(lambda: load_pairs(
        config.dataset_mixer, splits, renderer, kind, names, config.preprocessing_num_workers,
        config.decontaminate_with if kind == "train" else None, limit, config.seed, say, config.objective == "sft"))


def _drop_unusable(rows, counts):
    """Tokenised rows without those that have a reason to be dropped. Adds to counts."""
    drops = rows["drop"][:]
    for reason in ("empty response", "equal responses"):
        counts[reason] = drops.count(reason)
    keep = [i for i, drop in enumerate(drops) if not drop]
    counts["pairs"] = len(keep)
    return rows.select(keep) if len(keep) < len(rows) else rows


def _answers(rows):
    """({id: label}, {id: truth}, number of labels that contradict an earlier row of the same pair)."""
    labels, truths, conflicts = {}, {}, 0
    for id, label, truth in zip(rows["id"], rows["label"], rows["truth"]):
        if label:
            conflicts += labels.setdefault(id, label) != label
        if truth:
            truths.setdefault(id, truth)
    return labels, truths, conflicts


def _plain(counts):
    """The counts in words, without zeros."""
    words = {"rows": "rows read", "contaminated": "dropped as contaminated",
             "empty response": "dropped for an empty response", "equal responses": "dropped for equal responses",
             "pairs": "pairs", "repeated": "of them repeated",
             "contradicting": "with opposite labels (the first counts)"}
    return ", ".join(f"{n:,} {words[key]}" for key, n in counts.items() if n or key in ("rows", "pairs"))


# ----------------------------------------------------------------------------------------------------------------------
# Order and batches

def epoch_order(lengths, epoch, seed, step_pairs=1, group_by_length=False):
    """Order of the pairs in an epoch: a permutation drawn from (seed, epoch), which a resumed run can draw again.

    lengths: tokens of every pair.  group_by_length: take windows of about LENGTH_WINDOW pairs of that permutation, sort
    each by length, cut it into steps, and shuffle the steps, so that the pairs of a step are of similar length and need
    little padding. The pairs that do not fill the epoch's last step stay a random draw. The order does not depend on how
    a step is cut into micro-batches or ranks.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    if not group_by_length:
        return order
    whole = len(order) - len(order) % step_pairs
    order, rest = order[:whole], order[whole:]
    window_pairs = max(1, LENGTH_WINDOW // step_pairs) * step_pairs
    grouped = []
    for start in range(0, whole, window_pairs):
        window = sorted(order[start:start + window_pairs], key=lambda i: (lengths[i], i))
        for step in torch.randperm(len(window) // step_pairs, generator=generator).tolist():
            grouped += window[step * step_pairs:(step + 1) * step_pairs]
    return grouped + rest


def split_batch(rows, lengths, ranks, most_pairs, most_tokens):
    """Deal pairs out: [micro_step][rank] -> pairs, at most `most_pairs` per rank and `most_tokens` including padding.

    rows: indices of the pairs.  lengths: tokens of every pair; a pair longer than most_tokens gets a micro-batch alone.
    Pairs are sorted by length, so that a micro-step has little padding and no rank waits long for another. The longest
    come first, so that a run that does not fit into memory fails at once. How a step is cut does not change its gradient.
    If there are too few pairs for the last micro-step, its micro-batches are smaller, and some may be empty.
    """
    rows = sorted(rows, key=lambda i: (-lengths[i], i))
    micro_steps = []
    while rows:
        pairs = ranks * max(1, min(most_pairs, most_tokens // lengths[rows[0]]))
        taken, rows = rows[:pairs], rows[pairs:]
        bounds = [len(taken) * r // ranks for r in range(ranks + 1)]
        micro_steps.append([taken[a:b] for a, b in pairwise(bounds)])
    return micro_steps


@dataclass
class PairBatch:
    """B pairs as the model reads them: one row per pair, [prompt | y1 | y2], if `shared`; else two, [prompt | y].

    ids: B pair ids, None for a filler.  rows: (B,) indices into the Pairs.  weights: (B,) 1, or 0 for a filler.
    input_ids, segments (0 prompt, 1 y1, 2 y2, −1 padding), positions: (B, T), or (2B, T) with two rows per pair.
    sources: (N,) flat index of the state that predicts each response token.  targets: (N,) those tokens.
    lengths: (2B,) tokens of each response.  tokens: number of real tokens; the prompt counts once per response.
    ref_logps: (B, 2) log π_ref(y|x), labels: (B,) ±1.0, both filled by Pairs.batch where they are known.
    """
    ids: list
    shared: bool
    tokens: int
    rows: torch.Tensor
    weights: torch.Tensor
    input_ids: torch.Tensor
    segments: torch.Tensor
    positions: torch.Tensor
    sources: torch.Tensor
    targets: torch.Tensor
    lengths: torch.Tensor
    ref_logps: torch.Tensor | None = None
    labels: torch.Tensor | None = None

    def to(self, device):
        """The batch on `device`."""
        return PairBatch(**{k: to_device(v, device) if torch.is_tensor(v) else v for k, v in vars(self).items()})


def to_device(tensor, device):
    """A tensor of the host on `device`. On its way to a GPU it is pinned first, so that the copy does not wait for the work
    that is queued there."""
    pin = torch.device(device).type == "cuda" and tensor.device.type == "cpu"
    return (tensor.pin_memory() if pin else tensor).to(device, non_blocking=True)


def collate(pairs, rows, shared=True, pad=0):
    """The PairBatch of the pairs with these indices, on the CPU. SFT examples get one row [prompt | y] each, (B,) lengths.

    Without indices, the batch is one filler: pair 0 with weight 0, so that a rank that has no pairs still takes part in
    what all ranks do together.
    """
    filler = not rows
    rows = list(rows) or [0]
    layout = []  # one list of (segment, token ids) per row of the batch
    for prompt, *responses in pairs.token_ids(rows):
        spans = list(enumerate(filter(len, responses), 1))
        layout += [[(0, prompt), *spans]] if shared else [[(0, prompt), span] for span in spans]
    width = max(sum(len(ids) for _, ids in spans) for spans in layout)  # T
    input_ids = np.full((len(layout), width), pad, np.int64)  # (B or 2B, T)
    segments, positions = np.full_like(input_ids, -1), np.zeros_like(input_ids)
    sources, targets, tokens = [], [], 0
    for n, spans in enumerate(layout):
        prompt_length, start = len(spans[0][1]), 0
        for segment, ids in spans:
            end = start + len(ids)
            input_ids[n, start:end], segments[n, start:end] = ids, segment
            # Positions of both responses continue from the prompt.
            positions[n, start:end] = np.arange(len(ids)) + (prompt_length if segment else 0)
            if segment:
                # Each state predicts the next token; the prompt's last state predicts the first token of both responses.
                source = np.arange(start - 1, end - 1)
                source[0] = prompt_length - 1
                sources.append(n * width + source)
                targets.append(ids)
                tokens += prompt_length + len(ids)
            start = end
    return PairBatch(
        ids=[None] if filler else [pairs.ids[row] for row in rows], shared=shared, tokens=0 if filler else tokens,
        rows=torch.tensor(rows), weights=torch.full((len(rows),), 0.0 if filler else 1.0),
        input_ids=torch.from_numpy(input_ids), segments=torch.from_numpy(segments), positions=torch.from_numpy(positions),
        sources=torch.from_numpy(np.concatenate(sources)), targets=torch.from_numpy(np.concatenate(targets, dtype=np.int64)),
        lengths=torch.tensor([len(ids) for ids in targets]))


def preview(source, model_dir):
    """Print the first pairs of a source as the model will see them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    pairs, _, _ = load_pairs({source: 1.0}, ["train"], Renderer(tokenizer, 512, 1024), "train", max_samples=1000)
    for pair in pairs.table.select(range(min(3, len(pairs)))):
        print(f"\n--- pair {pair['id']}")
        for name in ("prompt_ids", "first_ids", "second_ids"):
            print(f"{name:>10} ({len(pair[name])}): {tokenizer.decode(pair[name])!r}")


if __name__ == "__main__":
    import sys

    if len(sys.argv) != 3:
        sys.exit("usage: python data.py FILE_OR_FOLDER MODEL_DIR")
    try:
        preview(*sys.argv[1:])
    except DataError as error:
        sys.exit(f"error: {error}")
