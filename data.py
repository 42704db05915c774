"""Preference pairs: from rows to token ids to batches.

    parsed row                   → canonical      its id, and which of the two responses is y1
    pair                         → Renderer       token ids: chat template on the whole conversation, one BOS, one end
    sources                      → load_pairs     Pairs (no label inside), and the labels, which only the oracle gets
    epoch                        → epoch_order    which pairs each step takes
    step                         → split_batch    which pairs each rank takes in each micro-step
    pairs                        → collate        PairBatch, one row per pair: [prompt | y1 | y2]

Files, folders, the hub, mixing and decontamination are in runtime/sources.py, the formats of rows in runtime/formats.py.

Departures from the official code: the label is removed here, before anything else sees the pair. The prompt is what both
conversations share, token for token what the model is given at inference, and a row whose prompts differ is refused. A
response is what follows the prompt in the templated conversation, not a conversation of its own. Nothing is dropped or cut
without being counted.

A hash of the pair's content decides which response is y1. That does not depend on the label and is the same in every
run, so a label in a ledger keeps its meaning.

Legend: B pairs, T tokens of a row, N response tokens of a batch.  Try it: `python data.py --config configs/quickstart.yaml`,
with the flags of train.py, prints three pairs as the model will see them.
"""

import hashlib
import json
import os
import re
from collections import Counter
from dataclasses import dataclass
from itertools import chain, groupby, pairwise

import datasets
import jinja2
import numpy as np
import torch

from runtime.errors import DataError, UsageError
from runtime.formats import (
    SENTINEL,
    function_name,
    hh_messages,
    message_text,
    parse_example,
    parse_row,
    squeezed,
    template_input,
)
from runtime.ranks import all_gather, rank_0_first, say
from runtime.sources import decontaminate, hash_of, mix, processes, read_rows

# Increase this with any change to what a row becomes: it is part of every cache key.
VERSION = 7
# epoch_order groups pairs of similar length within windows of this many pairs.
LENGTH_WINDOW = 2048


# ----------------------------------------------------------------------------------------------------------------------
# Parsed rows

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
        raise DataError(f"{source}: its split {split} has no rows: add some, or take it out of dataset_splits")


def parsed_examples(source, split, config_name):
    """Yield the SFT examples of a split in the same columns, with None as the second response."""
    place = None
    for place, row in read_rows(source, split, config_name):
        for prompt, response in parse_example(row, place):
            id, _ = canonical({"prompt": prompt, "responses": [response]})
            yield {"id": id, "prompt": json.dumps(prompt), "first": json.dumps(response), "second": None, "place": place,
                   "label": 0, "truth": 0}
    if place is None:
        raise DataError(f"{source}: its split {split} has no rows: add some, or take it out of dataset_splits")


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens

# What happened to a pair on its way to tokens, counted and said by load_pairs.
PROMPT_CUT, RESPONSE_CUT = "with the prompt cut to max_prompt_length", "with a response cut to max_length"
SHORTENED = "with an earlier reply that the chat template shortens, as at inference"
KEPT_AS_TEXT = "with the text of a special token inside a message, kept as text"
UNTEMPLATED = "of plain strings, used as they are, without the chat template"
LATER_TURNS = "with a later turn of the user in a response, scored as if the model had written it"


class Renderer:
    """Turns pairs into token ids: chat template, one BOS if the model uses one, exactly one end, truncation.

    tokenizer: a transformers tokeniser.  max_prompt_length, max_length: in tokens.
    empty_system: begin with an empty system message if a conversation has none and the template takes one.
    ends: ids of the tokens that end a reply: EOS, and what the template writes after a reply.
    """

    def __init__(self, tokenizer, max_prompt_length, max_length, empty_system=False):
        self.tokenizer, self.max_prompt_length, self.max_length = tokenizer, max_prompt_length, max_length
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token: set one, or responses never end")
        self.eos, self.blank = tokenizer.eos_token_id, {}  # {token: whether it is white space}
        # The model uses a BOS if its tokeniser adds one. Qwen and GPT-2 name a BOS but never use it.
        ids = tokenizer("a").input_ids
        self.bos = tokenizer.bos_token_id if ids and ids[0] == tokenizer.bos_token_id else None
        self.line = tokenizer("\n", add_special_tokens=False).input_ids
        template = str(tokenizer.chat_template or "")
        self.border = self._border(template)
        self.empty_system = empty_system and ("system" in template or "<|im_start|>" in template) and (
            self._rendered([{"role": "system", "content": ""}, {"role": "user", "content": "a"}]) is not None)
        self.ends = self._ends()
        self.end_texts = {tokenizer.convert_ids_to_tokens(id) for id in self.ends}
        self.protected = self._protected(template)

    def fingerprint(self):
        """Hash of everything that decides which tokens a text becomes."""
        content = repr(self.tokenizer)
        if self.tokenizer.is_fast:  # padding and truncation are left over from its last call and do not matter
            content = {**json.loads(self.tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
        return hash_of(VERSION, content, self.tokenizer.chat_template, self.tokenizer.special_tokens_map, self.bos, self.eos,
                       self.max_prompt_length, self.max_length, self.empty_system)

    # The chat template.

    def chat(self, messages, ask=False):
        """The text that the chat template makes of messages. ask: as a prompt, so that a reply can follow."""
        messages, tools = template_input(messages)
        return self.tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=ask)

    def _rendered(self, messages, ask=False):
        """Render with `chat`. Returns None without a template, or if the template rejects these messages."""
        try:
            return self.chat(messages, ask) if self.tokenizer.chat_template else None
        except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
            return None

    def _protected(self, template):
        """{role: pattern of the tokens whose text inside a message is text}; None for any role but the assistant's.

        Those are the special tokens, and what the template writes around turns. An assistant may write the other special
        tokens that the template knows (Magistral's [THINK]).
        """
        talk = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
        turns = self._rendered(talk) or self._rendered(talk[1:]) or ""
        added = self.tokenizer.added_tokens_decoder.values()
        texts = {token.content for token in added if (token.special or token.content in turns) and token.content[1:]}
        kept = self.end_texts | {self.tokenizer.bos_token, self.tokenizer.pad_token, self.tokenizer.unk_token}
        writable = {text for text in texts - kept if text in template and text not in turns}
        return {"assistant": _any_of(texts - writable), None: _any_of(texts)}

    def _ends(self):
        """Ids of the tokens that end a reply: EOS, and the special token that the template writes after a reply."""
        asked = [{"role": "user", "content": "a"}]
        call = {"type": "function", "id": "abcdefghi", "function": {"name": "look_up", "arguments": {"a": "b"}}}
        plain = self._rendered([*asked, {"role": "assistant", "content": SENTINEL}])
        after = self._special(plain.rpartition(SENTINEL)[2].lstrip())[:1] if plain else []
        if not after or after[0] is None:
            return {self.eos}
        calling = self._rendered([*asked, {"role": "assistant", "content": "", "tool_calls": [call]}])
        last = self._special(calling.rstrip())[-1:] if calling and "look_up" in calling else []  # gpt-oss's <|call|>
        return {self.eos, *after, *last} - {None}

    def _special(self, text):
        """Ids of a text's tokens, with None for those that are not special."""
        added = self.tokenizer.added_tokens_decoder
        return [id if id in added and added[id].special else None
                for id in self.tokenizer(text, add_special_tokens=False).input_ids]

    def _protect(self, messages):
        """Messages in which special-token text is plain text: it gets a sentinel after its first character."""
        def protect(value, pattern):
            if isinstance(value, str):
                return pattern.sub(lambda found: found[0][0] + SENTINEL + found[0][1:], value)
            if isinstance(value, dict):
                return {name: protect(item, pattern) for name, item in value.items()}
            return [protect(item, pattern) for item in value]
        return [protect(m, self.protected.get(m["role"], self.protected[None])) for m in messages]

    def texts(self, prompt, responses):
        """(prompt text, [prompt and response text] * 2, notes) as the model will read them. Raises DataError."""
        later = [LATER_TURNS] * any("\n\nHuman:" in response if isinstance(response, str) else
                                    any(message["role"] == "user" for message in response) for response in responses)
        messages = hh_messages(prompt) if self.tokenizer.chat_template else None
        if messages:
            responses = [[{"role": "assistant", "content": response.strip()}] for response in responses]
            prompt = messages
        if isinstance(prompt, str):  # the user's own text, in which a special token is that token
            notes = later + [UNTEMPLATED] * bool(self.tokenizer.chat_template)
            return prompt, [prompt + response for response in responses], notes
        prompt, start, notes = self._prompt_text(prompt)
        notes, full = later + notes, []
        for response in map(self._protect, responses):
            full.append(self._whole_text(prompt, start, response))
            notes += [KEPT_AS_TEXT] * (SENTINEL in full[-1])
        return start, full, notes

    def _prompt_text(self, prompt):
        """(protected messages, the text that the model is given at inference, notes) of a prompt of messages."""
        if not self.tokenizer.chat_template:
            raise DataError("messages need a chat template and the tokenizer has none: set chat_template")
        first = next((n for n, message in enumerate(prompt) if message["role"] != "tools"), len(prompt))
        if self.empty_system and prompt[first:] and prompt[first]["role"] != "system":
            prompt = [*prompt[:first], {"role": "system", "content": ""}, *prompt[first:]]
        prompt = self._protect(prompt)
        start = self.chat(prompt, ask=True)
        return prompt, start, [SHORTENED] * self._is_shortened(prompt, start)

    def _is_shortened(self, prompt, text):
        """Whether the template leaves out part of an earlier reply, such as its reasoning. Raises DataError where it leaves
        out something that the reply depends on."""
        shortened = False
        for n, message in enumerate(prompt):
            lost, role = left_out(message, text), message["role"]
            if "content" in lost and role != "tools":  # does the template rewrite it, or is it not there at all?
                marked = self.chat([*prompt[:n], {**message, "content": SENTINEL}, *prompt[n + 1:]], ask=True)
                if SENTINEL in marked:
                    lost.remove("content")
                    shortened |= role == "assistant"
            if {"content", "tool_calls"} & set(lost):
                what = "the tools" if role == "tools" else f"the {lost[0]} of a message of role {role}"
                raise DataError(f"the chat template leaves out {what}: set another chat_template, or take it out of the row")
            shortened |= bool(lost)
        return shortened

    def _whole_text(self, prompt, start, response):
        """The text of prompt and response. It begins with `start`, the text of the prompt, as at inference."""
        text = self.chat(prompt + response)
        goes_on = text.startswith(start)
        lost = [field for message in response for field in left_out(message, text[len(start) * goes_on:])]
        if goes_on and not lost:
            return text
        # The template rewrites a finished reply (R1's removes the reasoning), or the prompt that it writes for inference
        # begins the reply (<think>). What the model generates after that prompt is the rest of the content, and an end.
        content = response[0]["content"]
        around = self._around_reply(prompt, start, response[0]) if len(response) == 1 and set(lost) <= {"content"} else None
        if around:
            begun, end = around
            if not begun.strip():
                return start + content + end
            if content.lstrip().startswith(begun.strip()):
                content = content.lstrip()[len(begun.strip()):].removeprefix(begun[len(begun.rstrip()):])
                return start + content + end
            raise DataError(f"the chat template ends a prompt with {begun.strip()!r:.80}, and a response does not begin so: "
                            "put it there, with what the model should think, or set another chat_template")
        if lost:
            raise DataError(f"the chat template leaves out the {lost[0]} of a response: set another chat_template, or write "
                            "it into content as the model would")
        advice = ", or put the system message into the user's" if any(m["role"] == "system" for m in prompt) else ""
        raise DataError("the chat template does not render a conversation as the continuation of its prompt: set another "
                        f"chat_template{advice}")

    def _around_reply(self, prompt, start, message):
        """(what `start`, the text of the prompt, has begun of a reply, what the template writes after the reply's content),
        or None if the template does not continue the prompt.  prompt: protected messages."""
        marked = self._rendered([*prompt, {**message, "content": SENTINEL}])
        if marked is None or not marked.startswith(self.chat(prompt)):
            return None
        return start[len(os.path.commonprefix([start, marked])):], marked.rpartition(SENTINEL)[2]

    def begun(self, prompt):
        """What the template writes of a reply when it asks for one (R1's "<think>"), or "".  prompt: messages."""
        prompt, start, _ = self._prompt_text(prompt)
        begun, _ = self._around_reply(prompt, start, {"role": "assistant"}) or ("", "")
        return begun if begun.strip() else ""

    # Token ids.

    def _border(self, template):
        """Pattern of the places where a text can be cut without changing its tokens.

        Those are the places before each special token that the template writes, because a fast tokeniser splits there
        before it does anything else. Some special tokens do not qualify, because they affect their surroundings: one that
        takes the space on its left, that may not touch a word, that is matched in normalised text only, or that overlaps
        with another added token.
        """
        if not self.tokenizer.is_fast or self.tokenizer.split_special_tokens:
            return _any_of(())
        added = self.tokenizer.added_tokens_decoder.values()
        contents = {token.content for token in added}

        def overlaps(text):
            starts = tuple(text[:n] for n in range(1, len(text)))
            return text[0].isspace() or any(other.endswith(starts) or text in other and text != other for other in contents)

        written = [token.content for token in added
                   if token.special and not (token.lstrip or token.single_word or token.normalized)
                   and (token.content in template or token.content == self.tokenizer.eos_token)]
        return _any_of(text for text in written if not overlaps(text))

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

    def one_end(self, ids):
        """`ids` up to the first of the ends that they close with, or with an EOS. What a template writes after the end of a
        turn (a newline, an EOS of its own) is never generated."""
        end = None
        for n in range(len(ids) - 1, -1, -1):
            if ids[n] in self.ends:
                end = n
            elif not self._is_blank(ids[n]):
                break
        return ids + [self.eos] if end is None else ids[:end + 1]

    def _is_blank(self, id):
        if id not in self.blank:
            self.blank[id] = not self.tokenizer.decode([id]).strip()
        return self.blank[id]

    def __call__(self, prompt, responses):
        """(prompt_ids, [response_ids, response_ids]) of one pair."""
        return self.render([(prompt, responses)])[0][:2]

    def prompt_ids(self, prompt):
        """Token ids of a prompt as the model is given it at inference."""
        if not isinstance(prompt, str) or self.tokenizer.chat_template and hh_messages(prompt):
            _, prompt, _ = self._prompt_text(hh_messages(prompt) or prompt)
        return self.cut(self.encode([prompt])[prompt], [], [])[0]

    def render(self, pairs):
        """Token ids of pairs (prompt, [response, response]), each part a string or messages. Many at once is faster.

        A prompt keeps its last max_prompt_length tokens, a response its first max_length − len(prompt). A response comes
        back as [] if its text is empty or if no room is left for it.
        Returns [(prompt_ids, [response_ids, response_ids], notes)].
        """
        texts = [self.texts(*pair) for pair in pairs]
        ids = self.encode({text for prompt, full, _ in texts for text in (prompt, *full)})
        # The prompt's tokens are the ones that the model sees at inference. The response's tokens are those that follow
        # them; if the tokeniser merges across the border, the response is tokenised on its own.
        apart = {(prompt, f): (SENTINEL if prompt else "") + f[len(prompt):] for prompt, full, _ in texts for f in full
                 if ids[f][:len(ids[prompt])] != ids[prompt]}
        own = self.encode(set(apart.values()))
        out = []
        for (_, responses), (prompt, full, notes) in zip(pairs, texts):
            response_ids = [own[apart[prompt, f]] if (prompt, f) in apart else ids[f][len(ids[prompt]):] for f in full]
            prompt_ids, response_ids, cuts = self.cut(ids[prompt], responses, response_ids)
            out.append((prompt_ids, response_ids, [*dict.fromkeys(notes + cuts)]))
        return out

    def cut(self, prompt_ids, responses, response_ids):
        """(prompt_ids, response_ids, notes) with one BOS and one end, cut to max_prompt_length and max_length."""
        while self.bos is not None and prompt_ids[:1] == [self.bos]:
            prompt_ids = prompt_ids[1:]
        bos = [] if self.bos is None else [self.bos]
        if not bos and prompt_ids[:1] == [self.tokenizer.bos_token_id] and "bos_token" in str(self.tokenizer.chat_template):
            bos, prompt_ids = prompt_ids[:1], prompt_ids[1:]  # the template adds the BOS, not the tokeniser (OLMo 2)
        keep = self.max_prompt_length - len(bos)
        notes = [PROMPT_CUT] * (len(prompt_ids) > keep)
        prompt_ids = bos + prompt_ids[max(len(prompt_ids) - keep, 0):]
        if not prompt_ids:
            if self.tokenizer.bos_token_id is None:
                raise DataError("the prompt is empty and the tokenizer has no bos_token to predict the first token from: "
                                "write a prompt, or set a bos_token")
            prompt_ids = [self.tokenizer.bos_token_id]
        room = max(self.max_length - len(prompt_ids), 0)
        whole = [[] if self._is_empty(response) else self.one_end(ids) for response, ids in zip(responses, response_ids)]
        return prompt_ids, [ids[:room] for ids in whole], notes + [RESPONSE_CUT] * any(len(ids) > room for ids in whole)

    def _is_empty(self, response):
        """Whether a response says nothing. The end of a turn in a string is not something that is said."""
        if not isinstance(response, str):
            return not any(message_text(message).strip() for message in response)
        for end in self.end_texts:
            response = response.replace(end, "")
        return not response.strip()


def _any_of(texts):
    """Pattern that finds any of these texts, the longest first; nothing if there is none."""
    return re.compile("|".join(map(re.escape, sorted(filter(None, texts), key=len, reverse=True))) or "(?!)")


def left_out(message, text):
    """The fields of a message that are not in a text. White space does not count."""
    tools = json.loads(message["content"]) if message["role"] == "tools" else None
    parts = {"content": [message["content"]] if tools is None else map(function_name, tools),
             "tool_calls": map(function_name, message.get("tool_calls", ())),
             "reasoning_content": [message.get("reasoning_content", "")]}
    return [field for field, values in parts.items() if not all(
        value.strip() in text or squeezed(value) in squeezed(text) for value in values)]


def tokenize_rows(rows, renderer):
    """For a batch of parsed rows (in the columns of parse_source): token ids, number of tokens, why to drop each row ("":
    keep it), and what happened to it (notes, one a line). Raises DataError, which names the row."""
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
                raise DataError(f"{place}: the chat template failed ({type(error).__name__}: {error}): set another "
                                "chat_template, or change the row")
        raise
    prompts, notes = [prompt for prompt, _, _ in tokens], ["\n".join(notes) for *_, notes in tokens]
    firsts, seconds = [responses[0] for _, responses, _ in tokens], [responses[-1] for _, responses, _ in tokens]
    if rows["second"][0] is None:  # SFT examples
        drops, seconds = ["" if first else "empty response" for first in firsts], [[] for _ in firsts]
    else:
        drops = ["empty response" if not (first and second) else "equal responses" if first == second else ""
                 for first, second in zip(firsts, seconds)]
    return {"prompt_ids": prompts, "first_ids": firsts, "second_ids": seconds,
            "tokens": [sum(map(len, parts)) for parts in zip(prompts, firsts, seconds)],
            "drop": drops, "notes": notes}


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
    soft_labels: (pairs,) between −1 and 1, from a committee (labels/committee.py), where there is one.
    """
    table: datasets.Dataset
    fingerprint: str
    counts: dict
    texts: datasets.Dataset | None = None
    kind: str = "train"
    shared: bool = True
    ref_logps: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    soft_labels: torch.Tensor | None = None

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
        """The PairBatch of these rows on `device`, with what is known of the pairs: reference log-probs, (soft) labels."""
        assert self.labels is None or self.kind == "test", "training pairs must not hold labels"
        batch = collate(self, rows, self.shared)
        if self.ref_logps is not None:  # (B, 2); a filler's pair may not be one of those that were scored
            batch.ref_logps = self.ref_logps[batch.rows] if rows else torch.zeros(1, 2)
        batch.labels = None if self.labels is None else self.labels[batch.rows]  # (B,)
        batch = batch.to(device)
        if self.soft_labels is not None:  # (B,), on the CPU, where labels are chosen
            batch.soft_labels = self.soft_labels[rows] if rows else torch.zeros(1)
        return batch


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
    parse, version = (parsed_examples, [VERSION, "examples"]) if examples else (parsed_rows, [VERSION])
    rows = mix(mixer, splits, kind, parse, version, configs, max_samples, seed)
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
    counts.update(Counter(note for notes in rows["notes"][:] for note in notes.splitlines()))
    say(f"{kind}: {_plain(counts)}")
    return pairs, labels, truths


def hash_of_tokens(rows):
    """Hash of the token ids of all rows, in order. A template may print today's date, so the rows and the template alone do
    not decide the tokens."""
    digest, columns = hashlib.blake2b(digest_size=16), ["prompt_ids", "first_ids", "second_ids"]
    for table in rows.select_columns(columns).with_format("arrow").iter(batch_size=1000):
        for name in columns:
            column = table[name].combine_chunks()
            for values in (column.value_lengths(), column.flatten()):
                digest.update(values.to_numpy(zero_copy_only=False).astype(np.int64).tobytes())
    return digest.hexdigest()


def load_split(config, tokenizer, kind, limit):
    """(Pairs or None, labels, truths) of the run's "train" or "test" splits, as load_pairs returns them.

    All ranks call it together. Raises UsageError if they do not find the same pairs.
    """
    renderer = Renderer(tokenizer, config.max_prompt_length, config.max_length, config.auto_insert_empty_system_msg)
    if renderer.empty_system and kind == "train":
        say("conversations without a system message begin with an empty one (auto_insert_empty_system_msg)")
    names = dict(zip(config.dataset_mixer, config.dataset_configs or ()))
    splits = [split for split in config.dataset_splits if ("train" in split) == (kind == "train")]
    pairs, labels, truths = rank_0_first(lambda: load_pairs(
        config.dataset_mixer, splits, renderer, kind, names, config.preprocessing_num_workers,
        config.decontaminate_with if kind == "train" else None, limit, config.seed, say, config.objective == "sft"))
    if len(set(all_gather(pairs and pairs.fingerprint))) > 1:  # hosts may have files of their own
        raise UsageError(f"the {kind} pairs are not the same on all hosts: copy data set and tokenizer from one to the "
                         "others, or put them on a file system that all share")
    return pairs, labels, truths


def _drop_unusable(rows, counts):
    """Tokenised rows without those that have a reason to be dropped. Adds to counts."""
    drops = rows["drop"][:]
    for reason in ("empty response", "equal responses"):
        counts[reason] = drops.count(reason)
    keep = [i for i, drop in enumerate(drops) if not drop]
    counts["pairs"] = len(keep)
    return rows.select(keep) if len(keep) < len(rows) else rows


def _answers(rows):
    """({id: label}, {id: truth}, number of rows whose label is not the pair's).

    Where the rows of a pair disagree, as those of several annotators do, the majority counts, and in a draw the first row.
    """
    ids, labels, truths = (rows[name][:] for name in ("id", "label", "truth"))  # whole columns: one by one is slow
    found = majority(ids, labels)
    return found, majority(ids, truths), sum(label != 0 and label != found[id] for id, label in zip(ids, labels))


def majority(ids, votes):
    """{id: what most of its votes say, in a draw the first}.  votes: +1, −1, or 0 for none."""
    found, disputed = {}, {}  # disputed: {id: sum of its votes}, usually of few pairs
    for id, vote in zip(ids, votes):
        if vote and found.setdefault(id, vote) != vote:
            disputed[id] = 0
    for id, vote in zip(ids, votes) if disputed else ():
        if id in disputed:
            disputed[id] += vote
    return found | {id: 1 if total > 0 else -1 for id, total in disputed.items() if total}


def _plain(counts):
    """The counts in words. Zeros are left out, except those of rows and pairs."""
    words = {"rows": "rows read", "contaminated": "dropped as contaminated",
             "empty response": "dropped for an empty response", "equal responses": "dropped for equal responses",
             "pairs": "pairs", "repeated": "of them repeated",
             "contradicting": "outvoted (the label of most of a pair's rows counts, in a draw the first)"}
    return ", ".join(f"{n:,} {words.get(key, key)}" for key, n in counts.items() if n or key in ("rows", "pairs"))


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
    longest: tokens of the longest prompt with one response.
    ref_logps: (B, 2) log π_ref(y|x), labels: (B,) ±1.0, soft_labels: (B,), filled by Pairs.batch where they are known.
    """
    ids: list
    shared: bool
    tokens: int
    longest: int
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
    soft_labels: torch.Tensor | None = None

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
        longest=int(positions.max()) + 1, rows=torch.tensor(rows), weights=torch.full((len(rows),), 0.0 if filler else 1.0),
        input_ids=torch.from_numpy(input_ids), segments=torch.from_numpy(segments), positions=torch.from_numpy(positions),
        sources=torch.from_numpy(np.concatenate(sources)), targets=torch.from_numpy(np.concatenate(targets, dtype=np.int64)),
        lengths=torch.tensor([len(ids) for ids in targets]))


def preview(config, command_line=None):
    """Print three training pairs of a run as the model will see them: special tokens in ⟦ ⟧, what is cut off in ⟪ ⟫. To be
    quick, it tokenises no more than 1,000 pairs, drawn at random, and counts what happens to these."""
    from runtime import toy
    from runtime.model import load_tokenizer

    if config.objective != "adpo":
        raise UsageError("data.py shows preference pairs, and objective is sft: say --objective=adpo")
    toy.put_in_place(config)
    tokenizer = load_tokenizer(config)
    uncut = Renderer(tokenizer, 2**31, 2**31, config.auto_insert_empty_system_msg)
    pairs, _, _ = load_split(config, tokenizer, "train", min(1000, config.max_train_samples or 1000))
    for row in range(min(3, len(pairs))):
        prompt, *responses = (json.loads(pairs.texts[row][name]) for name in ("prompt", "first", "second"))
        whole_prompt, whole_responses = uncut(prompt, responses)
        prompt_ids, *response_ids = pairs.token_ids([row])[0]
        print(f"\n--- pair {pairs.ids[row]} ({pairs.texts[row]['place']})")
        cut = len(whole_prompt) - len(prompt_ids)
        bos = int(cut > 0 and prompt_ids[0] == whole_prompt[0] == tokenizer.bos_token_id)
        print(f"prompt, {len(prompt_ids)} tokens: {marked(tokenizer, whole_prompt[:bos])}"
              f"{marked(tokenizer, whole_prompt[bos:bos + cut], 'cut')}{marked(tokenizer, whole_prompt[bos + cut:])}")
        for name, ids, whole in zip(("y1", "y2"), response_ids, whole_responses):
            print(f"{name}, {len(ids)} tokens: {marked(tokenizer, ids)}{marked(tokenizer, whole[len(ids):], 'cut')}")


def marked(tokenizer, ids, cut=None):
    """Token ids as text on one line, special tokens as ⟦name⟧. cut: in ⟪ ⟫, with their number, if there are any."""
    special, parts = set(tokenizer.all_special_ids), []
    for is_special, some in groupby(ids, lambda id: id in special):
        parts += [f"⟦{token}⟧" for token in tokenizer.convert_ids_to_tokens(list(some))] if is_special else [
            tokenizer.decode(list(some)).replace("\n", "↵")]
    text = "".join(parts)
    return f"⟪{len(ids)} tokens cut off: {text}⟫" if cut and len(ids) else text


if __name__ == "__main__":
    from runtime.launch import launch

    launch(preview)
