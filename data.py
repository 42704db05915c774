"""Preference pairs: load, mix, template, tokenise, truncate, order, collate.

    rows (hub id, folder, file)  → read_rows      dicts, one after the other, each with its place for error messages
    row                          → parse_row      prompt, two responses, label or none: one form for every format
    pair                         → Renderer       token ids: the chat template on the whole conversation, one BOS, one EOS
    all                          → load_pairs     Pairs (no label inside) and the labels, which go to the oracle alone
    epoch                        → epoch_order    which pairs each step takes
    step                         → split_batch    which pairs each rank takes in each micro-step
    pairs                        → collate        PairBatch, one row a pair: [prompt | y1 | y2]

Departures from the official code: the label is taken off here, before anything else sees the pair; the prompt is what
both sides share, and is refused where they do not; a response is what follows the prompt in the templated conversation,
not a conversation of its own; nothing is dropped without being counted.

Which response is y1 is drawn by a hash of the pair's content: independent of the label, and the same in every run, so
that a label in a ledger means the same for ever.

Legend: B pairs, T tokens of a row, N response tokens of a batch.  Try it: `python data.py FILE_OR_FOLDER MODEL_DIR`
prints the first pairs as the model will see them.
"""

import contextlib
import csv
import gzip
import hashlib
import json
import os
import re
import zlib
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import datasets
import jinja2
import pyarrow
import torch

from runtime.ranks import rank_0_first, say

# Raise it with any change to what a row becomes: it is part of every cache key.
VERSION = 3
# Put into special-token text inside a message, so that the tokeniser does not take it for the token. Private-use
# characters that nobody types; `Renderer.encode` cuts there and removes it.
SENTINEL = "\ue0f7\ue0a1\ue0f7"
# Pairs among which those of like length meet in a step.
LENGTH_WINDOW = 2048
# Strings shorter than this say nothing about where a text came from ("return x + y").
DECONTAMINATION_MIN_CHARS = 30

csv.field_size_limit(2**31 - 1)  # a response may be longer than the library's 128 KB


class DataError(Exception):
    """A row or a source that cannot be used; the message names source, row and field, and what to do."""


# ----------------------------------------------------------------------------------------------------------------------
# Rows from files, folders and the hub

TEXT_SUFFIXES = (".jsonl", ".json", ".csv")
SUFFIXES = tuple(s + z for s in TEXT_SUFFIXES for z in ("", ".gz")) + (".parquet",)


@contextlib.contextmanager
def reading(what):
    """Whatever a library says about a file that it cannot read becomes a DataError that names the file."""
    try:
        yield
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{what}: damaged gzip file ({error})")
    except json.JSONDecodeError as error:
        raise DataError(f"{what}: not valid JSON ({error.msg} at character {error.pos})")
    except (OSError, ValueError, LookupError, TypeError, RecursionError, pyarrow.ArrowException,
            datasets.exceptions.DatasetsError) as error:
        error = error.__cause__ or error  # the library wraps what went wrong
        raise DataError(f"{what}: cannot be read ({type(error).__name__}: {shortened(error, 200)})")


def shortened(value, limit=80):
    """A value from the data inside a message: one line, cut, without control characters."""
    text = " ".join(str(value)[:4 * limit].split())
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
    return text if len(text) <= limit else text[:limit] + "…"


def find_file(source, split):
    """The file that holds `split` of a local source (a folder or one file), or None where the folder has no such split.

    A single file is the "train" split. Returns None for a `save_to_disk` folder too: `read_rows` handles it.
    """
    path = Path(source)
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise DataError(f"{source}: a file must end in one of {', '.join(SUFFIXES)}")
        return path if "train" in split else None
    for suffix in SUFFIXES:
        file = path / (split + suffix)
        if os.path.lexists(file):
            if not file.is_file():
                raise DataError(f"{file}: is no file, but a folder or a link that leads nowhere")
            return file
    return None


def has_split(source, split, config_name=None):
    """Whether the source has this split (a hub id is asked; a local one is looked at)."""
    path = Path(source)
    if os.path.islink(source) and not os.path.exists(source):
        raise DataError(f"{source}: a link that leads nowhere")
    if not os.path.exists(source):
        try:
            return split in datasets.get_dataset_split_names(source, config_name)
        except (OSError, ValueError) as error:
            raise DataError(f"{source}: neither a file or folder here nor a data set of the hub ({shortened(error, 400)})")
    if (path / "dataset_dict.json").is_file():
        with reading(path / "dataset_dict.json"):
            return split in json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
    if (path / "state.json").is_file():  # one saved Dataset: like one file, it is the train split
        return "train" in split
    return find_file(source, split) is not None


def read_rows(source, split, config_name=None):
    """Yield (place, row) for each row of a split; place is "FILE, row N", N counted from 1."""
    path = Path(source)
    if not path.exists():
        for n, row in enumerate(datasets.load_dataset(source, config_name, split=split), 1):
            yield f"{source} [{split}], row {n}", row
    elif (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        with reading(f"{source} [{split}]"):
            loaded = datasets.load_from_disk(str(path))
            loaded = loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
            for n, row in enumerate(loaded, 1):
                yield f"{source} [{split}], row {n}", row
    else:
        yield from read_file(find_file(source, split))


def read_file(path):
    """Yield (place, row) from one jsonl, json, csv (each also gzipped) or parquet file."""
    with reading(path):
        if path.name.endswith(".parquet"):
            rows = enumerate(datasets.Dataset.from_parquet(str(path)), 1)
        else:
            rows = read_text(path)
        for n, row in rows:
            yield f"{path}, row {n}", row


def read_text(path):
    """Yield (number, row) of a text file. What is not UTF-8 inside a row is left to checked_text, which names the field."""
    opened = gzip.open if path.name.endswith(".gz") else open
    is_csv = path.name.endswith((".csv", ".csv.gz"))
    with opened(path, "rt", encoding="utf-8-sig", errors="surrogateescape", newline="" if is_csv else None) as file:
        start = file.read(2)
        file.seek(0)
        if "\0" in start or any("\udc80" <= c <= "\udcff" for c in start):
            raise DataError(f"{path}: not UTF-8 text (it begins like UTF-16 or a binary file): save it as UTF-8")
        if is_csv:
            yield from read_csv(path, file)
        elif start[:1] == "[":  # one JSON array instead of one object a line
            yield from enumerate(json.load(file, object_pairs_hook=unique_keys), 1)
        else:
            for n, line in enumerate(file, 1):
                if line.strip():
                    yield n, read_line(path, n, line)


def unique_keys(items):
    """An object of JSON. A key that stands there twice is a ValueError: Python would take the last without a word."""
    found = dict(items)
    if len(found) < len(items):
        names = [name for name, _ in items]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shortened(twice)} stands there twice; keep one")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=unique_keys)  # made once: json.loads would make one a line


def read_line(path, n, line):
    try:
        return DECODER.decode(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, row {n}: not a JSON object ({error.msg} at character {error.pos})")
    except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets, a key twice
        raise DataError(f"{path}, row {n}: not a JSON object ({shortened(error)})")


def read_csv(path, file):
    """Yield (number, row). Strict: a quote that is never closed would else swallow the rows behind it, and a comma without
    quotes would move the text behind it into the next column."""
    reader = csv.reader(file, strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{path}: two columns of the same name ({shortened(', '.join(header))})")
        for n, cells in enumerate(filter(None, reader), 1):  # a blank line is no row
            if len(cells) > len(header):
                raise DataError(f"{path}, row {n}: {len(cells)} cells, but the header has {len(header)}; put quotes around "
                                "a text with commas")
            if len(cells) < len(header):
                raise DataError(f"{path}, row {n}, field {header[len(cells)]}: found nothing, the row ends before it")
            yield n, dict(zip(header, cells))
    except csv.Error as error:
        raise DataError(f"{path}, line {reader.line_num}: not valid CSV ({error})")


# ----------------------------------------------------------------------------------------------------------------------
# One form for every format

def parse_row(row, place):
    """Bring a row of any supported format into one form.

    Formats (TRL's preference types and the columns of the usual datasets):
      {prompt, chosen, rejected} and {chosen, rejected}, each value a string or a list of {"role", "content"} messages,
      whole HH dialogues ("\\n\\nHuman: … \\n\\nAssistant: …"),
      {prompt, response_a, response_b} with an optional label "a" or "b", and an optional truth "a" or "b" that no
      annotator sees: it serves to grade labels (toy.py).
    Returns {"prompt", "responses": [2], "label", "truth"}: prompt and responses are strings or lists of messages; label
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
        raise DataError(f"{place}: needs chosen and rejected, or response_a and response_b; "
                        f"it has {shortened(', '.join(map(str, row))) or 'no field'}")
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
                raise DataError(f"{place}, field {field}: must end with a message of the assistant, ends with one of "
                                f"{shortened(side[-1]['role'])}")
    elif prompt is None:
        if fields[0] == "response_a":
            raise DataError(f"{place}, field prompt: expected a string or a list of messages, found nothing")
        prompt, sides = _split_strings(sides, fields, place)
    elif isinstance(prompt, list):
        sides = [[{"role": "assistant", "content": side}] for side in sides]
    return {"prompt": prompt, "responses": sides, "label": label, "truth": label if truth is None else truth}


def parse_example(row, place):
    """The examples of a row for SFT: [(prompt, response)], each a string or a list of messages.

    Formats: {messages}, and {prompt, completion}, each a string or a list of messages. Of messages, every turn of the
    assistant that answers something is an example: the response is that turn, the prompt all that stands before it.
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
        raise DataError(f"{place}: needs messages, or prompt and completion; it has "
                        f"{shortened(', '.join(map(str, row))) or 'no field'}")
    examples = [(prompt + completion[:n], [message]) for n, message in enumerate(completion)
                if message["role"] == "assistant" and prompt + completion[:n]]
    if not examples:
        raise DataError(f"{place}, field {field}: no message of the assistant that answers another one")
    return examples


def _letter(row, name, place):
    value = row.get(name)
    if value in (None, ""):
        return None
    if value not in ("a", "b"):
        raise DataError(f"{place}, field {name}: expected \"a\" or \"b\", found {value!r:.80}")
    return "ab".index(value)


def text_or_messages(value, place):
    """Check a prompt or response: a string, or a list of messages, of which role and content alone are kept."""
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
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: not valid Unicode (a lone surrogate or a byte that is not UTF-8, at character "
                        f"{error.start}); repair the text")
    if SENTINEL in text:
        raise DataError(f"{place}: holds the characters U+E0F7 U+E0A1 U+E0F7, which this program uses as a mark of its own")
    return text


def _split_messages(prompt, sides, fields, place):
    """Prompt and responses of conversational rows.

    Sides are whole conversations, or the reply alone where they begin with the assistant. A string prompt beside whole
    conversations (ultrafeedback_binarized) repeats a user message of theirs.
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
                        f"({shortened(' against '.join(ends))}); both responses must answer the same prompt")
    if isinstance(prompt, list) and shared[:len(prompt)] != prompt:
        raise DataError(f"{place}, field prompt: is not how {fields[0]} and {fields[1]} begin")
    if isinstance(prompt, str) and prompt.strip() not in [m["content"].strip() for m in shared]:
        raise DataError(f"{place}, field prompt: is no message of the conversation that {fields[0]} and {fields[1]} share")
    return shared, [side[common:] for side in sides]


def _begins_with(sides, prompt):
    """Whether a conversation that begins with the assistant (a greeting) is a whole one, with the prompt inside."""
    if isinstance(prompt, list):
        return any(side[:len(prompt)] == prompt for side in sides)
    return any({"role": "user", "content": prompt.strip()} in [{**m, "content": m["content"].strip()} for m in side]
               for side in sides)


def _split_strings(sides, fields, place):
    """Implicit prompt of two strings: what both begin with, up to the last Assistant turn or the last whole word."""
    prompt = os.path.commonprefix(sides)
    if all(side.lstrip().startswith("Human:") for side in sides):
        if "\n\nAssistant:" not in prompt:
            raise DataError(f"{place}: the prompts of {fields[0]} and {fields[1]} differ; both must answer the same prompt")
        end = prompt.rfind("\n\nAssistant:") + len("\n\nAssistant:")
    elif len(prompt) == min(map(len, sides)) and sides[0] != sides[1]:  # one side goes on from the other: that is the prompt
        end = len(prompt)
    else:  # a space belongs to the word behind it
        end = max(prompt.rfind(space) for space in " \n\t")
    return prompt[:max(end, 0)], [side[max(end, 0):] for side in sides]


def hh_messages(prompt):
    """The messages of an HH dialogue string, or None where it is none. Turns of one speaker in a row are joined."""
    if not (isinstance(prompt, str) and prompt.lstrip().startswith("Human:") and prompt.endswith("\n\nAssistant:")):
        return None
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", "\n\n" + prompt.strip())[1:-2]  # the last turn is the response
    messages = []
    for speaker, text in zip(parts[::2], parts[1::2]):
        role = "user" if speaker == "Human" else "assistant"
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += "\n\n" + text.strip()
        else:
            messages.append({"role": role, "content": text.strip()})
    return messages


def canonical(parsed):
    """(id, order): the hash of a pair's content, the same whichever way round its responses come, and which of them is
    y1, drawn from the same hash."""
    texts = [json.dumps(r, sort_keys=True) for r in parsed["responses"]]
    prompt = json.dumps(parsed["prompt"], sort_keys=True)
    digest = hashlib.blake2b("\0".join([prompt, *sorted(texts)]).encode(), digest_size=16)
    order = sorted(range(len(texts)), key=lambda k: texts[k])
    if hashlib.blake2b(digest.digest(), digest_size=1).digest()[0] & 1:
        order.reverse()
    return digest.hexdigest(), order


# ----------------------------------------------------------------------------------------------------------------------
# Text to tokens

class Renderer:
    """Pairs to token ids: template, exactly one BOS where the model has one, exactly one EOS, truncation.

    tokenizer: a transformers tokeniser.  max_prompt_length, max_length: in tokens.
    """

    def __init__(self, tokenizer, max_prompt_length, max_length, auto_insert_empty_system_msg=True):
        self.tokenizer, self.max_prompt_length, self.max_length = tokenizer, max_prompt_length, max_length
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no eos_token: set one, or no response has an end")
        self.eos = tokenizer.eos_token_id
        # "Where the model has one": where its own tokeniser puts one. Qwen and GPT-2 name a BOS but never use it.
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
            except jinja2.TemplateError:  # Gemma's speaks of system messages only to refuse them
                self.empty_system = False

    def fingerprint(self):
        """Hash of all that decides what a text becomes."""
        content = repr(self.tokenizer)
        if self.tokenizer.is_fast:  # its padding and truncation are state of the last call, not of the tokeniser
            content = {**json.loads(self.tokenizer.backend_tokenizer.to_str()), "padding": None, "truncation": None}
        return hash_of(VERSION, content, self.tokenizer.chat_template, self.tokenizer.special_tokens_map, self.bos, self.eos,
                       self.max_prompt_length, self.max_length, self.empty_system)

    def protect(self, text):
        """Make special-token text inside a message plain text."""
        if self.special is None:
            return text
        return self.special.sub(lambda m: m[0][0] + SENTINEL + m[0][1:], text)

    def _border(self, template):
        """Where a text can be cut and no token is another one: in front of each special token that the template writes,
        for there the fast tokenisers cut, before they look at anything else.

        Not in front of one that reaches out: that takes the space on its left, wants no word beside it, is looked for in
        normalised text only, or of which another added token may have taken a part.
        """
        if not self.tokenizer.is_fast or self.tokenizer.split_special_tokens:
            return re.compile("(?!)")  # nowhere
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
        """{text: its token ids, nothing added}, in one call. What stands between the same borders is tokenised once: the
        prompt, which three texts of a pair share."""
        cut = {}
        for text in texts:
            bounds = [0, *(border.start() for border in self.border.finditer(text)), len(text)]
            cut[text] = [text[a:b] for a, b in zip(bounds, bounds[1:]) if a < b]
        pieces = list(dict.fromkeys(chain.from_iterable(cut.values())))
        ids = self.tokenizer(pieces, add_special_tokens=False, return_attention_mask=False).input_ids if pieces else []
        ids = dict(zip(pieces, ids))
        return {text: list(chain.from_iterable(ids[piece] for piece in parts)) for text, parts in cut.items()}

    def encode(self, texts):
        """{text: its token ids}, each text tokenised apart on both sides of each sentinel, nothing added."""
        split = {text: text.split(SENTINEL) for text in texts}
        first = self.tokenise(pieces[0] for pieces in split.values())
        # Behind a line break, which is taken off: no "▁" in front of what is no beginning.
        others = {piece for pieces in split.values() for piece in pieces[1:]}
        behind = {text[1:]: ids for text, ids in self.tokenise("\n" + piece for piece in others).items()}
        n = len(self.line)
        joined = [piece for piece, ids in behind.items() if ids[:n] != self.line]
        behind = {piece: ids[n:] for piece, ids in behind.items()} | self.tokenise(joined)
        return {text: sum((behind[piece] for piece in pieces[1:]), first[pieces[0]]) for text, pieces in split.items()}

    def texts(self, prompt, responses):
        """(prompt text, two texts of prompt and response) as the model will read them, special-token text protected."""
        messages = hh_messages(prompt) if self.tokenizer.chat_template else None
        if messages:
            responses = [[{"role": "assistant", "content": response.strip()}] for response in responses]
            prompt = messages
        if isinstance(prompt, str):
            start = self.protect(prompt)
            full = [self.protect(prompt + response) for response in responses]
            # Special-token text that stands across the border is protected side by side.
            return start, [f if f.startswith(start) else start + SENTINEL + self.protect(r)
                           for f, r in zip(full, responses)]
        if not self.tokenizer.chat_template:
            raise DataError("messages need a chat template and the tokenizer has none: set chat_template")
        if self.empty_system and prompt[:1] and prompt[0]["role"] != "system":
            prompt = [{"role": "system", "content": ""}] + prompt
        protected = [[{k: self.protect(v) for k, v in m.items()} for m in part] for part in (prompt, *responses)]
        full = [self.tokenizer.apply_chat_template(protected[0] + r, tokenize=False) for r in protected[1:]]
        # What a model is given when it is to answer, if the conversation goes on from there; else the conversation so
        # far (templates without a generation prompt).
        for ask in (True, False):
            text = self.tokenizer.apply_chat_template(protected[0], tokenize=False, add_generation_prompt=ask)
            if all(f.startswith(text) for f in full):
                return text, full
        raise DataError("the chat template does not render a conversation as the continuation of its prompt: "
                        "set another chat_template")

    def one_eos(self, ids):
        """End in exactly one EOS: what a template writes behind its own (a newline) is never generated."""
        behind = ids[::-1].index(self.eos) if self.eos in ids else None  # tokens behind the last one
        if behind is not None and not self.tokenizer.decode(ids[len(ids) - behind:]).strip():
            ids = ids[:len(ids) - behind]
            while ids and ids[-1] == self.eos:
                ids = ids[:-1]
        return ids + [self.eos]

    def __call__(self, prompt, responses):
        """(prompt_ids, [response_ids, response_ids]) of one pair."""
        return self.render([(prompt, responses)])[0]

    def render(self, pairs):
        """Token ids of pairs (prompt, [response, response]), each part a string or messages. Many at once are faster.

        The prompt keeps its last max_prompt_length tokens, a response its first max_length − len(prompt). A response
        that is empty before truncation or has no room after it comes back as [].
        Returns [(prompt_ids, [response_ids, response_ids])].
        """
        texts = [self.texts(*pair) for pair in pairs]
        ids = self.encode({text for prompt, full in texts for text in (prompt, *full)})
        # The prompt's tokens are those that the model will see at inference, so the response is what follows them,
        # or, where the tokeniser merges across the border, its own tokens.
        apart = {(prompt, f): (SENTINEL if prompt else "") + f[len(prompt):] for prompt, full in texts for f in full
                 if ids[f][:len(ids[prompt])] != ids[prompt]}
        own = self.encode(set(apart.values()))
        return [self.cut(ids[prompt], responses, [own[apart[prompt, f]] if (prompt, f) in apart else
                                                  ids[f][len(ids[prompt]):] for f in full])
                for (_, responses), (prompt, full) in zip(pairs, texts)]

    def cut(self, prompt_ids, responses, response_ids):
        """One BOS, one EOS, and no more tokens than there is room for."""
        while self.bos is not None and prompt_ids[:1] == [self.bos]:
            prompt_ids = prompt_ids[1:]
        bos = [] if self.bos is None else [self.bos]
        if not bos and prompt_ids[:1] == [self.tokenizer.bos_token_id] and "bos_token" in str(self.tokenizer.chat_template):
            bos, prompt_ids = prompt_ids[:1], prompt_ids[1:]  # the template alone puts one (OLMo 2)
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


# ----------------------------------------------------------------------------------------------------------------------
# The data set of a run

@dataclass
class Pairs:
    """Tokenised pairs of one split, without labels.

    table: a datasets.Dataset with columns id, prompt_ids, first_ids, second_ids, tokens (of the whole pair).
    fingerprint: hash of all ids and tokens, in order.  counts: what was read, dropped and why.
    texts: the columns prompt, first, second of the same rows, each JSON (a string or messages), for people and judges, and
    place, the row's file and number.
    """
    table: datasets.Dataset
    fingerprint: str
    counts: dict
    texts: datasets.Dataset | None = None

    def __len__(self):
        return len(self.table)

    def __post_init__(self):
        self.ids = self.table["id"][:]
        self.lengths = self.table["tokens"][:]

    def place(self, id):
        """Where a pair stands: "FILE, row N"."""
        return self.texts[self.ids.index(id)]["place"]

    def text_by_id(self):
        """A function pair id → (prompt, first, second), each JSON."""
        rows = {id: row for row, id in enumerate(self.ids)}
        return lambda id: tuple(self.texts[rows[id]][name] for name in ("prompt", "first", "second"))


def load_pairs(mixer, splits, renderer, kind, configs=None, workers=None, decontaminate_with=None, max_samples=None,
               seed=42, say=print, examples=False):
    """Load one kind of split ("train" or "test") of a mix of sources.

    mixer: {source: fraction}; a source is a hub id, a `save_to_disk` folder, a folder with SPLIT.jsonl (parquet, csv,
    json), or one file (its rows are for training). A fraction takes a random share of the source's training pairs;
    evaluation pairs are taken whole.  splits: names of this kind.  configs: {source: config name}.
    max_samples: a random share of at most so many pairs.  examples: of rows for SFT; an example is a pair whose second
    response is not there, and has no label.
    Returns (Pairs, labels, truths); labels and truths are {pair id: +1 (y1 is better) or −1}, for the oracle alone; a
    pair without a label is not in them.  (None, {}, {}) where no source has such a split.
    Raises DataError.
    """
    parts, found = [], False
    for source, fraction in mixer.items():
        config_name = (configs or {}).get(source)
        here = [split for split in splits if has_split(source, split, config_name)]
        found |= bool(here)
        if kind == "train" and not here:
            raise DataError(f"{source}: has no split {' or '.join(splits)} (a folder holds SPLIT{{{','.join(SUFFIXES)}}})")
        for split in here:
            part = parse_source(source, split, config_name, examples)
            if kind == "train" and fraction < 1:
                part = part.shuffle(seed=seed).select(range(round(fraction * len(part))))
            parts.append(part)
    if not found:
        return None, {}, {}
    rows = datasets.concatenate_datasets(parts)
    counts = {"rows": len(rows)}
    if max_samples is not None and max_samples < len(rows):
        rows = rows.shuffle(seed=seed).select(range(max_samples))
        counts["rows"] = len(rows)
    if decontaminate_with:
        rows = decontaminate(rows, decontaminate_with, workers)
        counts["contaminated"] = counts["rows"] - len(rows)

    if not len(rows):
        raise DataError(f"{', '.join(mixer)}: no {kind} pair is left ({_plain(counts)})")
    rendering = renderer.fingerprint()
    table = rows.map(
        tokenize_rows, fn_kwargs={"renderer": renderer}, batched=True, batch_size=256,
        num_proc=_processes(workers, len(rows)), desc=f"tokenising {kind} pairs",
        new_fingerprint=hash_of(rows._fingerprint, rendering))
    drops = table["drop"][:]
    for reason in ("empty response", "equal responses"):
        counts[reason] = drops.count(reason)
    keep = [i for i, drop in enumerate(drops) if not drop]
    counts["pairs"] = len(keep)
    if not keep:
        raise DataError(f"{', '.join(mixer)}: no {kind} pair is left ({_plain(counts)})")
    if len(keep) < len(table):
        table = table.select(keep)

    labels, truths, conflicts = {}, {}, 0
    for id, label, truth in zip(table["id"], table["label"], table["truth"]):
        if label:
            conflicts += labels.setdefault(id, label) != label
        if truth:
            truths.setdefault(id, truth)
    pairs = Pairs(table.select_columns(["id", "prompt_ids", "first_ids", "second_ids", "tokens"]),
                  hash_of(rendering, table["id"][:]), counts,
                  table.select_columns(["prompt", "first", "second", "place"]))
    counts["repeated"] = len(pairs) - len(set(pairs.ids))
    counts["contradicting"] = conflicts
    say(f"{kind}: {_plain(counts)}")
    return pairs, labels, truths


def load_split(config, tokenizer, kind, limit):
    """(pairs or None, labels, truths) of the splits to train on or to test on, as load_pairs has them."""
    renderer = Renderer(tokenizer, config.max_prompt_length, config.max_length, config.auto_insert_empty_system_msg)
    names = dict(zip(config.dataset_mixer, config.dataset_configs or ()))
    splits = [split for split in config.dataset_splits if ("train" in split) == (kind == "train")]
    return rank_0_first(lambda: load_pairs(
        config.dataset_mixer, splits, renderer, kind, names, config.preprocessing_num_workers,
        config.decontaminate_with if kind == "train" else None, limit, config.seed, say, config.objective == "sft"))


def parse_source(source, split, config_name=None, examples=False):
    """All rows of one split in the one form, cached on disk: columns id, prompt, first, second (JSON), label, truth, place.

    label and truth: +1 (first is better), −1, or 0 where unknown.
    """
    path = find_file(source, split) if Path(source).exists() else None
    state = [path.stat().st_size, path.stat().st_mtime_ns] if path else []
    if not path and Path(source).exists():
        state = sorted((str(p), p.stat().st_mtime_ns) for p in Path(source).rglob("*.arrow"))
    columns = {name: datasets.Value("string") for name in ("id", "prompt", "first", "second", "place")}
    columns |= {name: datasets.Value("int8") for name in ("label", "truth")}
    where = os.path.abspath(source) if Path(source).exists() else source
    try:
        return datasets.Dataset.from_generator(
            parsed_examples if examples else parsed_rows,
            gen_kwargs={"source": source, "split": split, "config_name": config_name}, features=datasets.Features(columns),
            fingerprint=hash_of(VERSION, where, split, config_name, state, *(["examples"] if examples else [])))
    except datasets.exceptions.DatasetGenerationError as error:  # the library's wrapping of what went wrong in a row
        raise error.__cause__ or error


def parsed_rows(source, split, config_name):
    place = None
    for place, row in read_rows(source, split, config_name):
        parsed = parse_row(row, place)
        id, order = canonical(parsed)
        sign = {None: 0, order[0]: 1, order[1]: -1}
        first, second = (json.dumps(parsed["responses"][k]) for k in order)
        yield {"id": id, "prompt": json.dumps(parsed["prompt"]), "first": first, "second": second, "place": place,
               "label": sign[parsed["label"]], "truth": sign[parsed["truth"]]}
    if place is None:
        raise DataError(f"{source}: its split {split} holds no row")


def parsed_examples(source, split, config_name):
    """Rows for SFT in the form of parsed_rows: the second response is None."""
    place = None
    for place, row in read_rows(source, split, config_name):
        for prompt, response in parse_example(row, place):
            id, _ = canonical({"prompt": prompt, "responses": [response]})
            yield {"id": id, "prompt": json.dumps(prompt), "first": json.dumps(response), "second": None, "place": place,
                   "label": 0, "truth": 0}
    if place is None:
        raise DataError(f"{source}: its split {split} holds no row")


def tokenize_rows(rows, renderer):
    """Rows in the one form → token ids, their number, and why a pair is to be dropped ("" where it is not)."""
    pairs = [(json.loads(prompt), [json.loads(response) for response in (first, second) if response is not None])
             for prompt, first, second in zip(rows["prompt"], rows["first"], rows["second"])]
    try:
        tokens = renderer.render(pairs)
    except Exception:
        for place, pair in zip(rows["place"], pairs):  # which of them was it?
            try:
                renderer(*pair)
            except DataError as error:
                raise DataError(f"{place}: {error}")
            except Exception as error:  # a template's own raise_exception, among others
                raise DataError(f"{place}: the chat template failed ({type(error).__name__}: {error})")
        raise
    prompts = [prompt for prompt, _ in tokens]
    firsts, seconds = [responses[0] for _, responses in tokens], [responses[-1] for _, responses in tokens]
    if rows["second"][0] is None:  # examples for SFT
        drops, seconds = ["" if first else "empty response" for first in firsts], [[] for _ in firsts]
    else:
        drops = ["empty response" if not (first and second) else "equal responses" if first == second else ""
                 for first, second in zip(firsts, seconds)]
    return {"prompt_ids": prompts, "first_ids": firsts, "second_ids": seconds,
            "tokens": [sum(map(len, parts)) for parts in zip(prompts, firsts, seconds)],
            "drop": drops}


def decontaminate(rows, source, workers):
    """Drop pairs whose text contains a string of the benchmark `source`.

    source: a text file (one string a line), or a data set; of openai_humaneval the docstrings and solutions, of any other
    every text column. White space and case are folded; strings under DECONTAMINATION_MIN_CHARS characters are left out.
    """
    if Path(source).is_file() and not source.endswith(SUFFIXES):
        with reading(source):
            strings = Path(source).read_text(encoding="utf-8").splitlines()
    else:
        split = next((s for s in ("test", "train") if has_split(source, s)), None)
        if split is None:
            raise DataError(f"decontaminate_with {source}: has no split test or train")
        strings = [text for _, row in read_rows(source, split) for text in benchmark_strings(row)]
    strings = sorted({folded for s in strings if len(folded := _fold(s)) >= DECONTAMINATION_MIN_CHARS})
    if not strings:
        raise DataError(f"decontaminate_with {source}: holds no string of {DECONTAMINATION_MIN_CHARS} characters or more")
    return rows.filter(is_clean, fn_kwargs={"strings": strings}, num_proc=_processes(workers, len(rows)),
                       desc=f"removing pairs that contain {source}",
                       new_fingerprint=hash_of("clean", rows._fingerprint, *strings))


def benchmark_strings(row):
    """The strings of one benchmark row that betray it: HumanEval's docstring and solution, or every text."""
    if "canonical_solution" in row and "prompt" in row:
        docstrings = re.findall(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', row["prompt"], flags=re.DOTALL)
        # Examples (">>> f(1)") are left out: texts quote the description, not the doctests.
        return [d.split(">>>")[0] for pair in docstrings for d in pair if d] + [row["canonical_solution"]]
    return [value for value in row.values() if isinstance(value, str)]


def is_clean(row, strings):
    text = _fold(" ".join(_flat(json.loads(row[name])) for name in ("prompt", "first", "second") if row[name] is not None))
    return not any(string in text for string in strings)


def _flat(value):
    return value if isinstance(value, str) else " ".join(m["content"] for m in value)


def _fold(text):
    return " ".join(text.lower().split())


def hash_of(*parts):
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _processes(workers, rows):
    """Processes for `map`: None (this one) where starting more would take longer than the work."""
    workers = min(workers or os.cpu_count(), os.cpu_count(), rows // 1000)
    return workers if workers > 1 else None


def _plain(counts):
    """The counts in plain words; zeros are left out."""
    words = {"rows": "rows read", "contaminated": "dropped as contaminated",
             "empty response": "dropped for an empty response", "equal responses": "dropped for equal responses",
             "pairs": "pairs", "repeated": "of them repeated",
             "contradicting": "with opposite labels (the first counts)"}
    return ", ".join(f"{n:,} {words[key]}" for key, n in counts.items() if n or key in ("rows", "pairs"))


# ----------------------------------------------------------------------------------------------------------------------
# Order and batches

def epoch_order(lengths, epoch, seed, step_pairs=1, group_by_length=False):
    """Order of the pairs in an epoch: a permutation drawn from (seed, epoch), so that a resume knows it.

    lengths: tokens of every pair.  group_by_length: within windows of LENGTH_WINDOW pairs of that permutation, pairs are
    ordered by length, cut into steps, and the steps put in random order; so a step's pairs are of like length and little is
    padding. What is left for the epoch's smaller last step stays a random draw. The order does not depend on how a step is
    cut into micro-batches or ranks.
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
    """Deal pairs out: [micro_step][rank] -> pairs, at most `most_pairs` a rank and, padding included, `most_tokens`.

    rows: indices of the pairs.  lengths: tokens of every pair; one that is longer than most_tokens is alone.  Pairs of like
    length meet in a micro-step, so that little is padding and no rank waits long for another; the longest come first, so
    that what does not fit into memory is known at once. The gradient of a step does not depend on how it is cut. Where the
    pairs do not go round, the last micro-step has smaller micro-batches, some of them empty.
    """
    rows = sorted(rows, key=lambda i: (-lengths[i], i))
    micro_steps = []
    while rows:
        pairs = ranks * max(1, min(most_pairs, most_tokens // lengths[rows[0]]))
        taken, rows = rows[:pairs], rows[pairs:]
        bounds = [len(taken) * r // ranks for r in range(ranks + 1)]
        micro_steps.append([taken[a:b] for a, b in zip(bounds, bounds[1:])])
    return micro_steps


@dataclass
class PairBatch:
    """B pairs as the model reads them. `shared`: one row a pair, [prompt | y1 | y2]; otherwise two, [prompt | y].

    ids: B pair ids, None for a filler.  rows: (B,) indices into the data set.  weights: (B,) 1, or 0 for a filler.
    input_ids, segments (0 prompt, 1 y1, 2 y2, −1 padding), positions: (B, T), or (2B, T) in two rows a pair.
    sources: (N,) flat index of the state that predicts each response token.  targets: (N,) those tokens.
    lengths: (2B,) tokens of each response.  tokens: real tokens, the prompt counted once for each response.
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

    def to(self, device):
        """The batch on `device`; pinned on the way to a GPU, or the copy would wait for the work that is under way there."""
        def move(tensor):
            return (tensor.pin_memory() if torch.device(device).type == "cuda" else tensor).to(device, non_blocking=True)
        return PairBatch(**{k: move(v) if torch.is_tensor(v) else v for k, v in vars(self).items()})


def collate(pairs, rows, shared=True, pad=0):
    """PairBatch of the pairs with these indices; of examples for SFT, one row [prompt | y] each and (B,) lengths.
    No index makes a batch of one filler: pair 0 with weight 0, so that a rank without work still takes part in what all
    ranks do together."""
    filler = not rows
    rows = rows or [0]
    lines, sources, targets, lengths, tokens = [], [], [], [], 0
    for row in rows:
        pair = pairs.table[row]
        prompt, responses = pair["prompt_ids"], [ids for ids in (pair["first_ids"], pair["second_ids"]) if ids]
        p = len(prompt)
        if shared:
            lines.append([(t, 0, i) for i, t in enumerate(prompt)])
        for k, response in enumerate(responses):
            if not shared:
                lines.append([(t, 0, i) for i, t in enumerate(prompt)])
            start = len(lines[-1])
            lines[-1] += [(t, k + 1, p + i) for i, t in enumerate(response)]
            # The prompt's last state predicts the first token of both responses, each token's state the next one.
            sources += [(len(lines) - 1, i) for i in (p - 1, *range(start, start + len(response) - 1))]
            targets += response
            lengths.append(len(response))
            tokens += p + len(response)
    width = max(map(len, lines))
    grid = torch.tensor([line + [(pad, -1, 0)] * (width - len(line)) for line in lines])  # (B or 2B, T, 3)
    return PairBatch(
        ids=[None] if filler else [pairs.ids[row] for row in rows], shared=shared, tokens=0 if filler else tokens,
        rows=torch.tensor(rows), weights=torch.full((len(rows),), 0.0 if filler else 1.0),
        input_ids=grid[..., 0].contiguous(), segments=grid[..., 1].contiguous(), positions=grid[..., 2].contiguous(),
        sources=torch.tensor([line * width + i for line, i in sources]), targets=torch.tensor(targets),
        lengths=torch.tensor(lengths))


if __name__ == "__main__":
    import sys

    from transformers import AutoTokenizer

    if len(sys.argv) != 3:
        sys.exit("usage: python data.py FILE_OR_FOLDER MODEL_DIR")
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
    pairs, _, _ = load_pairs({sys.argv[1]: 1.0}, ["train"], Renderer(tokenizer, 512, 1024), "train", max_samples=1000)
    for pair in pairs.table.select(range(min(3, len(pairs)))):
        print(f"\n--- pair {pair['id']}")
        for name in ("prompt_ids", "first_ids", "second_ids"):
            print(f"{name:>10} ({len(pair[name])}): {tokenizer.decode(pair[name])!r}")
