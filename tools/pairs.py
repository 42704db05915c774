"""Write two responses to each prompt, as pairs that somebody can label: tools/generate.py --pairs.

    python tools/generate.py MODEL [MODEL2] --pairs --prompts FILE
    python tools/generate.py --pairs --prompts FILE --endpoint http://HOST/v1 --endpoint_model NAME [NAME2] --output FILE

MODEL is a model folder, a hub id or `toy`. With a second model, response_a comes from the first and response_b from the
second. --endpoint asks an OpenAI-compatible server instead; its key is in the environment variable --endpoint_key_env.

FILE has rows with a prompt, a text or messages, as in training (runtime/formats.py; responses that a row has already are not
read), in JSON Lines, a JSON list, csv or parquet; or it is a .txt with one prompt a line; or `toy`, the training prompts of
the built-in task. Where a model chats, a text becomes the user's message, and a dialogue of Anthropic's HH its messages.
What train.py takes with --oracle human or --oracle judge is written to MODEL/pairs.jsonl, or to --output:

    {"prompt", "response_a", "response_b", "finish_a", "finish_b", "draws", "number"}, and "tools" where there are some

finish is "length" for a response that was cut off at --max_new_tokens; number is the prompt's in FILE. Without a chat
template a response begins with the space that follows the prompt, if the model wrote one. A pair with an empty response, one
that a server's content filter broke off, or two that are equal is drawn again, up to five times in all; `draws` says how
often. A prompt without a usable pair after that, or one that the server refuses, goes into pairs.left_out.jsonl with the
reason. The last line counts all of this.

Pairs are appended as they come, and put into the order of FILE at the end. The same command again goes on where it stopped,
even after kill -9: a model on this machine then writes what it would have written undisturbed, because a draw depends only
on --seed, the prompt's number, the side and the draw. pairs.settings.json records what made the file, and other settings
are refused. The temperature is 1 unless --temperature says otherwise; to a server, only flags that are given are sent.

The paper takes its pairs from UltraFeedback, and the official code does not generate.
"""

import json
import math
import os
import random
import time
from collections import Counter
from pathlib import Path

import torch

from labels.endpoint import Endpoint, Exchange, GaveUp, Refused, TextRefused
from runtime import toy
from runtime.config import Config
from runtime.errors import DataError, Stopped, UsageError, one_line
from runtime.formats import hh_messages, parse_prompt, template_input
from runtime.parse import convert
from runtime.ranks import bar, say
from runtime.sources import hash_of
from tools.compare import rows_of
from tools.exchange import replace_file
from tools.generate import (
    OTHER,
    Draw,
    EvalQuestion,
    Model,
    check_settings,
    columns_of,
    draw_tokens,
    longest_first,
    output_path,
    settings_path,
    uniforms,
)

DRAWS = 5  # of a pair, before its prompt is left out
# How a server says that a response did not come to its end; the last two are vLLM's and OpenRouter's.
FINISHES = {"length": "length", **dict.fromkeys(("content_filter", "abort", "error"), "broken off")}
# Flags of tools/generate.py that mean nothing to other commands than these.
ONLY_ANSWERS = {"questions", "format", "name"}
ONLY_PAIRS = {"prompts", "endpoint", "endpoint_model", "endpoint_key_env", "concurrency"}
ONLY_ENDPOINT = {"endpoint_model", "endpoint_key_env", "concurrency"}
ONLY_MODEL = {"model", "top_k", "batch_size", "bf16", "chat_template", "auto_insert_empty_system_msg", "model_revision",
              "trust_remote_code"}


def misuse(options, given):
    """What is wrong with the command line, or None.  given: the flags that do not have their default."""
    if not options.pairs:
        wrong = given & ONLY_PAIRS
        return f"--{min(wrong)} belongs to --pairs" if wrong else None
    wrong = given & (ONLY_ANSWERS | (ONLY_MODEL if options.endpoint else ONLY_ENDPOINT))
    if wrong:
        name = min(wrong)
        return (f"{'MODEL' if name == 'model' else f'--{name}'} does not go with --pairs"
                f"{' and' if options.endpoint else ' without' if name in ONLY_ENDPOINT else ''}"
                f"{' --endpoint' if options.endpoint or name in ONLY_ENDPOINT else ''}")
    models = options.endpoint_model if options.endpoint else options.model
    if not options.prompts or len(models or ()) not in (1, 2):
        return "--pairs needs --prompts FILE and one model or two: MODEL [MODEL2], or --endpoint_model NAME [NAME2]"
    if options.endpoint and not options.output:
        return "--endpoint needs --output FILE"
    if options.temperature == 0 and len(set(models)) == 1:
        return "--temperature 0 gives both responses the same text: take more than 0, or two models"
    return None


# ----------------------------------------------------------------------------------------------------------------------
# Prompts

def read_prompts(path):
    """[(place, prompt)] of a file: texts or messages, checked. Raises DataError."""
    if path == "toy":
        return [(f"toy, row {n}", prompt) for n, prompt in enumerate(toy.split_prompts(seed=0)[0], 1)]
    rows = lines_of(path) if Path(path).suffix == ".txt" else rows_of(path)
    prompts = [(place, parse_prompt(row, place)) for place, row in rows]
    if not prompts:
        raise DataError(f"{path}: has no prompts")
    return prompts


def lines_of(path):
    """[(place, {"prompt": line})] of a text file; blank lines are no prompts."""
    if not Path(path).is_file():
        raise DataError(f"{path}: there is no such file")
    # Bytes that are not UTF-8 become surrogates, which parse_prompt refuses with their row.
    with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
        return [(f"{path}, row {n}", {"prompt": line.rstrip("\n")}) for n, line in enumerate(file, 1) if line.strip()]


def as_messages(prompt):
    return prompt if isinstance(prompt, list) else hh_messages(prompt) or [{"role": "user", "content": prompt}]


# ----------------------------------------------------------------------------------------------------------------------
# Pairs

def outcome(question, responses, draws):
    """A row of pairs.jsonl, or if the pair cannot be used, a row of pairs.left_out.jsonl, with the reason.

    responses: [(text, "stop", "length" or "broken off")] of both sides.  draws: which draw of this pair it is."""
    (a, finish_a), (b, finish_b) = responses
    row = columns_of(question.turns[0])
    if "broken off" in (finish_a, finish_b):
        reason = "response broken off by the server"
    elif not (a.strip() and b.strip()):
        reason = "empty response"
    elif a.strip() == b.strip():
        reason = "equal responses"
    else:
        return row | {"response_a": a, "response_b": b, "finish_a": finish_a, "finish_b": finish_b, "draws": draws,
                      "number": question.key}
    return row | {"reason": f"{reason}, in draw {draws} too" if draws > 1 else reason, "number": question.key}


class PairFile:
    """pairs.jsonl and pairs.left_out.jsonl.  done: {number of a prompt: its row, in either of them}.

    Raises UsageError if the files were made with other settings or for other prompts.
    """

    def __init__(self, path, settings, questions):
        self.path, self.left_out = path, path.with_suffix(".left_out.jsonl")
        self.settings, self.questions, self.done = settings, questions, {}
        if path.exists() or self.left_out.exists():
            check_settings(path, settings)
            for file in filter(Path.exists, (path, self.left_out)):
                self.read(file)
        self.before = len(self.done)

    def read(self, path):
        content = path.read_bytes()
        whole = content[:content.rfind(b"\n") + 1]
        if len(whole) < len(content):  # the last line was cut short, by a full disk perhaps
            os.truncate(path, len(whole))
        prompts = {question.key: columns_of(question.turns[0]) for question in self.questions}
        for place, row in rows_of(path) if whole else ():
            number = row.get("number")
            prompt = {name: row[name] for name in ("prompt", "tools") if name in row}
            if prompts.get(number) != prompt:
                raise UsageError(f"{place}: does not answer prompt {one_line(number, 20)} of --prompts: {OTHER}")
            self.done.setdefault(number, row)  # two commands that ran at once may both have written it

    def add(self, rows):
        """Append rows. After the first of them, only the same settings go on with the file."""
        try:
            if not self.done:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(settings_path(self.path), json.dumps(self.settings) + "\n")
            for path, out in ((self.path, False), (self.left_out, True)):
                lines = "".join(json.dumps(row) + "\n" for row in rows if ("reason" in row) == out)
                if lines:
                    with open(path, "ab", buffering=0) as file:  # one write, so that a kill leaves all of it or nothing
                        if file.write(lines.encode()) < len(lines):
                            raise OSError(0, "the disk took only a part")
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written ({error.strerror}): make room, or make it writable; then the "
                             "same command goes on")
        self.done.update((row["number"], row) for row in rows)

    def finish(self):
        """Put the rows into the order of the prompts."""
        for path, rows in ((self.path, self.pairs()), (self.left_out, self.others())):
            text = "".join(json.dumps(row) + "\n" for row in rows)
            if path.exists() and path.read_text() != text:
                replace_file(path, text)

    def pairs(self):
        return [row for _, row in sorted(self.done.items()) if "reason" not in row]

    def others(self):
        return [row for _, row in sorted(self.done.items()) if "reason" in row]

    def in_words(self):
        pairs, others = self.pairs(), self.others()
        cut = sum(row[f"finish_{side}"] == "length" for row in pairs for side in "ab")
        again = sum(row["draws"] > 1 for row in pairs)
        reasons = Counter(row["reason"].partition(",")[0].partition(":")[0] for row in others)
        return (f"{len(pairs):,} pairs in {self.path}" + (f", {self.before:,} prompts done before" if self.before else "")
                + (f"; {again:,} drawn again, because a response was empty or broken off, or both equal" if again else "")
                + (f"; {cut:,} of {2 * len(pairs):,} responses were cut off at their greatest length" if cut else "")
                + (f"; {len(others):,} prompts left out ("
                   + ", ".join(f"{count:,} {reason}" for reason, count in reasons.most_common(3)) + f"), in {self.left_out}"
                   if others else ""))


# ----------------------------------------------------------------------------------------------------------------------
# Who writes the responses

class Writers:
    """One model on this machine, or two: the writers of response_a and response_b."""

    def __init__(self, options):
        made = {name: Model(name, options) for name in options.model}
        self.models, self.options = [made[options.model[0]], made[options.model[-1]]], options
        self.temperature = 1.0 if options.temperature is None else options.temperature
        with_template = [model for model in made.values() if model.tokenizer.chat_template]
        self.chat = bool(with_template)
        if self.chat and len(with_template) < len(made):
            raise UsageError(f"{with_template[0].name} has a chat template, the other model has none: set --chat_template")
        ask = [{"role": "user", "content": "a"}]
        self.begun = {model: model.prompts.renderer.begun(ask) if self.chat else "" for model in self.distinct()}

    def distinct(self):
        """The models, each once."""
        return list(dict.fromkeys(self.models))

    def settings(self):
        each = [model.settings() for model in self.distinct()]
        both = {name: [settings[name] for settings in each] for name in each[0]} if len(each) > 1 else each[0]
        return both | {"temperature": self.temperature, "top_p": self.options.top_p, "top_k": self.options.top_k}

    def __str__(self):
        return " and ".join(map(str, self.distinct())) + (", as chat" if self.chat else ", as plain text")

    def notes(self):
        return "".join(model.prompts.cut_in_words() for model in self.distinct())

    def pairs(self, questions, done):
        """Yield the rows of a batch at a time. How prompts are put into batches does not depend on what is done, so that a
        resumed run rounds as an undisturbed one."""
        plan, *_ = [longest_first(questions, model.prompts) for model in self.distinct()]  # each refuses what it cannot read
        if len(done) < len(questions):
            for model in self.distinct():
                model.load()
        for start in range(0, len(plan), self.options.batch_size):
            batch = [question for question in plan[start:start + self.options.batch_size] if question.key not in done]
            if batch:
                yield self.rows(batch)

    def rows(self, questions):
        """The rows of a batch. What gives no pair is drawn again, together."""
        rows, left = {}, questions
        for draw in range(1, DRAWS + 1):
            rows |= {question.key: outcome(question, pair, draw) for question, pair in zip(left, self.draw(left, draw))}
            left = [question for question in left if "reason" in rows[question.key]]
            if not left:
                break
        return list(rows.values())

    def draw(self, questions, draw):
        """[[(text, finish), (text, finish)]]: both responses to each question."""
        drawn = [[None, None] for _ in questions]
        for model in self.distinct():
            rows = [(n, side) for n in range(len(questions)) for side in (0, 1) if self.models[side] is model]
            prompts = [model.prompts(questions[n], []) for n, _ in rows]
            numbers = [uniforms(model.config.seed, [questions[n].key, draw], side, model.new) for n, side in rows]
            drawing = Draw(torch.full((len(rows),), self.temperature, device=model.device),
                           torch.stack(numbers).to(model.device), self.options.top_p, self.options.top_k)
            new = draw_tokens(model.lm, model.tokenizer, prompts, drawing, model.ends)
            for (n, side), prompt, (ids, ended) in zip(rows, prompts, new):
                drawn[n][side] = self.text(model, prompt, ids), "stop" if ended else "length"
        return drawn

    def text(self, model, prompt, ids):
        """A response as text. As plain text it continues the prompt, so it keeps the space between the two. In a chat it
        begins with what the template has written of it."""
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        if self.chat:
            return (self.begun[model] + text).strip() if text.strip() else ""
        start, whole = (model.tokenizer.decode(part, skip_special_tokens=True) for part in (prompt, prompt + ids))
        return whole[len(start):] if whole.startswith(start) else text


class Server(Endpoint):
    """An OpenAI-compatible server as the writer of both responses. A pair is one piece of work, so a kill loses at most
    --concurrency of them."""

    chat = True
    patience = 20  # prompts in a row that may stay without a pair before we stop asking

    def __init__(self, options):
        try:
            super().__init__(options.endpoint, " and ".join(options.endpoint_model),
                             os.environ.get(options.endpoint_key_env), timeout=600.0, max_tokens=options.max_new_tokens,
                             extra={} if options.top_p == 1 else {"top_p": options.top_p})
        except ValueError as error:
            raise UsageError(f"--endpoint: {str(error).removeprefix('judge ')}")
        self.models, self.concurrency = [options.endpoint_model[0], options.endpoint_model[-1]], options.concurrency
        self.temperature, self.has_temperature = options.temperature, options.temperature is not None
        self.length_field = "max_tokens" if options.max_new_tokens else None
        self.seed = None if options.seed is None else convert(options.seed, "seed", "command line, --seed")

    def settings(self):
        return {"endpoint_model": self.models, "temperature": self.temperature, "max_new_tokens": self.max_tokens,
                "seed": self.seed, "top_p": self.extra.get("top_p")}

    def __str__(self):
        return f"{self.model} at {self.where}"

    def notes(self):
        return ""

    def pairs(self, questions, done):
        """Yield rows as they arrive. Raises UsageError if the server gives no usable pair, Stopped if it does not answer;
        either way only once the replies to what was sent before have come, because they are paid for."""
        todo, last_reply_at, left_out, problem, useless = len(questions) - len(done), -math.inf, [], "", ""
        with Exchange(self.write, self.concurrency) as exchange:
            for question in questions:
                if question.key not in done:
                    exchange.put(question)
            for question, found in exchange:
                while self.news:
                    say(f"{self.model}: {self.news.pop(0)}")
                if isinstance(found, Refused):
                    useless = useless or f"{self.where}: {found}; check the url, the model and the key"
                    exchange.stop.set()
                    continue
                if isinstance(found, GaveUp):
                    if not exchange.stop.is_set():  # what fails after the stop is not the reason for it
                        problem = f"{question.place}: {found}"
                    if last_reply_at < found.started:  # no other request got through either: the server is down
                        exchange.stop.set()
                    continue
                last_reply_at = time.monotonic()
                if isinstance(found, TextRefused):
                    found = columns_of(question.turns[0]) | {"reason": f"refused: {found}", "number": question.key}
                if "reason" in found:  # kept back, as it may be the server's fault
                    left_out.append(found)
                    if len(left_out) == self.patience:
                        useless = useless or (f"{self.where}: {self.patience} prompts in a row without a usable pair; the "
                                              f"last, {question.place}: {found['reason']}: look at what the server writes, "
                                              "or raise --temperature")
                        exchange.stop.set()
                elif len(left_out) >= self.patience:
                    yield [found]
                else:
                    yield [found, *left_out]
                    todo -= 1 + len(left_out)
                    left_out = []
        if useless:
            raise UsageError(useless)
        if left_out:
            yield left_out
        if todo > len(left_out):
            raise Stopped(f"{self.where}: {todo - len(left_out):,} prompts have no pair yet; the same command goes on once "
                          f"the server answers again ({problem})")

    def write(self, question, stop):
        """The row of a question, in a thread of the Exchange. Raises Refused, TextRefused or GaveUp."""
        for draw in range(1, DRAWS + 1):
            if draw > 1 and stop.is_set():
                raise GaveUp("stopped", time.monotonic())
            replies = [self.ask(self.fields(question, side, draw), stop, random.Random(f"{question.key} {draw} {side}"),
                                self.temperature) for side in (0, 1)]
            row = outcome(question, [(reply.content.strip(), FINISHES.get(reply.finish, "stop")) for reply in replies], draw)
            if "reason" not in row:
                break
        return row

    def fields(self, question, side, draw):
        """What a request has of its own. Each has another seed, if the user gave one."""
        messages, tools = template_input(question.turns[0])
        seed = None if self.seed is None else int(hash_of(self.seed, question.key, side, draw)[:7], 16)
        return {"model": self.models[side], "messages": messages, "tools": tools, "seed": seed}

    def body(self, asked, temperature):
        """The fields of a request.  asked: its own, or the text with which Endpoint tries whether the server works."""
        if isinstance(asked, str):
            return super().body(asked, self.temperature) | {"model": self.models[0]}
        return {name: value for name, value in (super().body("", temperature) | asked).items() if value is not None}


# ----------------------------------------------------------------------------------------------------------------------
# The run

def generate(options):
    """Write the pairs of the command line, from where an earlier run stopped."""
    if not options.endpoint and "toy" in options.model:
        model, _ = toy.build(Config().toy_dir)
        options.model = [str(model) if name == "toy" else name for name in options.model]
    prompts = read_prompts(options.prompts)
    if options.endpoint:
        writers, path = Server(options), output_path(None, options.output, Path("pairs.jsonl"))
    else:
        path = output_path(options.model[0], options.output, Path(options.model[0]) / "pairs.jsonl")
        writers = Writers(options)
    questions = [EvalQuestion(n, [as_messages(prompt) if writers.chat else prompt], {}, place, chat=False)
                 for n, (place, prompt) in enumerate(prompts, 1)]
    file = PairFile(path, writers.settings(), questions)
    if file.before < len(questions):
        say(f"{len(questions) - file.before:,} prompts to {writers}")
    with bar(len(questions), "pairs", initial=file.before) as progress:
        for rows in writers.pairs(questions, file.done):
            file.add(rows)
            progress.update(len(rows))
    file.finish()
    say(file.in_words() + writers.notes())
