"""Answers of a trained model, in the files that evaluation harnesses read; and two models' answers side by side.

    python tools/generate.py DIR --questions FILE                          {"prompt", "response"} lines
    python tools/generate.py DIR --questions FILE --format alpaca_eval     AlpacaEval's model_outputs.json
    python tools/generate.py DIR --questions FILE --format mt_bench        FastChat's model_answer/NAME.jsonl
    python tools/generate.py --compare A B [--questions FILE]              two answer files (or folders with one)

DIR is a model folder or hub id; nothing is downloaded but for a hub id. What FILE holds (JSON Lines, a JSON list, csv or
parquet), and where the answers go unless --output says otherwise:

    jsonl          {"prompt"}: text, taken as it is, or messages, as in training   DIR/responses.jsonl
    alpaca_eval    {"instruction"}, and "dataset", which is kept                   DIR/model_outputs.json
    mt_bench       {"question_id", "category", "turns"}, FastChat's               DIR/data/mt_bench/model_answer/NAME.jsonl

Instructions and turns go through the chat template as in training (Renderer of data.py, with the empty system message that
config.yaml beside the model asks for). Without a template they are plain text, a later turn behind the earlier ones, a
blank line between. An answer ends at EOS or where the template ends a turn; it is stripped.

The temperature is 0 (greedy), of MT-Bench that of the category in FastChat's common.py; --temperature is for all. A draw
depends on --seed, the question and the turn alone, so that neither --batch_size nor a resumed run changes an answer, but
where floating point decides a tie. Of the model's generation_config.json only the end tokens count; FastChat's and
AlpacaEval's own generation also take top_p, top_k and repetition_penalty from there.

The file is replaced as a whole after each batch. The same command again keeps its answers and goes on, also after kill -9;
FILE.settings.json says what made it, and other settings or weights are refused. Exit code 75: stopped, the same command goes
on; 2: something has to be changed, one line says what.
"""

import argparse
import hashlib
import json
import signal
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, for the imports below

import torch  # noqa: E402
from transformers import GenerationConfig, LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper  # noqa: E402

import data  # noqa: E402
from runtime.config import Config, UsageError, convert, load_yaml  # noqa: E402
from tools import compare  # noqa: E402
from tools.compare import rows_of  # noqa: E402
from tools.exchange import ExchangeError, replace_file  # noqa: E402

# fastchat/llm_judge/common.py and gen_model_answer.py (0.2.36): of a category that is not there, 0.7.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
                "stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0}
OTHER_TEMPERATURE = 0.7
ALL = 10**9  # tokens: nothing is cut


# ----------------------------------------------------------------------------------------------------------------------
# The formats: a row of questions → Question, its answers → a row of the file

@dataclass
class Question:
    """key: tells it from the others.  turns: texts of the user, in order, or one list of messages.  row: as it was read.
    place: where."""
    key: tuple
    turns: list
    row: dict
    place: str
    temperature: float = 0.0
    chat: bool = True  # whether a text is a user's message, for the chat template


def text_field(row, name, place):
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise data.DataError(f"{place}, field {name}: expected a text, found {data.shortened(repr(value))}")
    return data.checked_text(value, f"{place}, field {name}")


class Jsonl:
    """{"prompt", "response"} lines."""

    @staticmethod
    def path(folder, name):
        return folder / "responses.jsonl"

    @staticmethod
    def key(row):
        return json.dumps(row.get("prompt"))

    @staticmethod
    def question(row, place):
        prompt = data.text_or_messages(row.get("prompt"), f"{place}, field prompt")
        return Question(Jsonl.key({"prompt": prompt}), [prompt], {"prompt": prompt}, place, chat=False)

    @staticmethod
    def answer(question, turns, name):
        return {"prompt": question.row["prompt"], "response": turns[0]}

    @staticmethod
    def text(rows):
        return "".join(json.dumps(row) + "\n" for row in rows)


class AlpacaEval:
    """The list of {"instruction", "output", "generator", "dataset"} that `alpaca_eval --model_outputs` reads."""

    @staticmethod
    def path(folder, name):
        return folder / "model_outputs.json"

    @staticmethod
    def key(row):
        return row.get("instruction")

    @staticmethod
    def question(row, place):
        instruction = text_field(row, "instruction", place)
        if row.get("input"):
            raise data.DataError(f"{place}, field input: AlpacaEval asks by the instruction alone; put the input into it")
        return Question(instruction, [instruction], row, place)

    @staticmethod
    def answer(question, turns, name):
        kept = {field: question.row[field] for field in ("dataset", "instruction") if field in question.row}
        return kept | {"output": turns[0], "generator": name}

    @staticmethod
    def text(rows):
        return json.dumps(rows, indent=2) + "\n"


class MtBench:
    """The lines that FastChat's load_model_answers reads; its question.jsonl goes in."""

    @staticmethod
    def path(folder, name):
        return folder / "data" / "mt_bench" / "model_answer" / f"{name}.jsonl"

    @staticmethod
    def key(row):
        return row.get("question_id")

    @staticmethod
    def question(row, place):
        id, turns = row.get("question_id"), row.get("turns")
        if type(id) not in (int, str) or id == "":
            raise data.DataError(f"{place}, field question_id: expected a number or a text, found "
                                 f"{data.shortened(repr(id))}")
        category = text_field(row, "category", place)
        if not isinstance(turns, list) or not turns:
            raise data.DataError(f"{place}, field turns: expected a list of texts, found {data.shortened(repr(turns))}")
        turns = [text_field({"turns": turn}, "turns", place) for turn in turns]
        return Question(id, turns, row, place, TEMPERATURES.get(category, OTHER_TEMPERATURE))

    @staticmethod
    def answer(question, turns, name):
        return {"question_id": question.row["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
                "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}

    text = Jsonl.text


FORMATS = {"jsonl": Jsonl, "alpaca_eval": AlpacaEval, "mt_bench": MtBench}


def read_questions(format, path):
    """The Questions of a file. One that stands there twice is asked twice, but ids of MT-Bench are of one question."""
    questions, seen = [], Counter()
    for place, row in rows_of(path):
        question = format.question(row, place)
        if format is MtBench and seen[question.key]:
            raise data.DataError(f"{place}, field question_id: {question.key!r} stands there twice")
        seen[question.key] += 1
        question.key = question.key, seen[question.key]
        questions.append(question)
    if not questions:
        raise data.DataError(f"{path}: holds no question")
    return questions


def read_answers(format, path, settings, questions):
    """{key: row} of the answers that an earlier run left. Raises UsageError where they are those of other settings or
    questions."""
    beside, other = settings_path(path), "choose another --output, or delete it"
    if not path.exists():
        return {}
    if not beside.is_file():
        raise UsageError(f"{path} exists and was not made by this command ({beside.name} is not there): {other}")
    before = dict(row for _, line in rows_of(beside) for row in line.items())
    for name in settings:
        if before.get(name) != settings[name]:
            raise UsageError(f"{path} holds answers of another {name} ({data.shortened(before.get(name))}; now "
                             f"{data.shortened(settings[name])}): {other}")
    found, seen, known = {}, Counter(), {question.key for question in questions}
    for place, row in rows_of(path):
        key = format.key(row)
        key = key if isinstance(key, (str, int)) else None  # of no question
        seen[key] += 1
        if (key, seen[key]) not in known:
            raise UsageError(f"{place}: answers a question that is not asked: {other}")
        found[key, seen[key]] = row
    return found


def settings_path(path):
    return path.with_suffix(".settings.json")


# ----------------------------------------------------------------------------------------------------------------------
# From a conversation to tokens, and on

class Prompts:
    """Conversations as token ids, as the model saw prompts in training.

    tokenizer: with or without a chat template.  room: tokens of a prompt; it is cut from the left.
    """

    def __init__(self, tokenizer, room, empty_system):
        self.tokenizer, self.room, self.cut = tokenizer, room, set()
        self.renderer = data.Renderer(tokenizer, ALL, ALL, empty_system)

    def __call__(self, question, answers):
        """Token ids of the question's next turn, behind its answers so far."""
        turns = question.turns[:len(answers) + 1]
        if not question.chat:
            prompt = turns[0]
        elif self.tokenizer.chat_template:
            prompt = [{"role": "user", "content": turns[0]}]
            for answer, turn in zip(answers, turns[1:]):
                prompt += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        else:
            prompt = "\n\n".join([text for pair in zip(turns, answers) for text in pair] + turns[-1:])
        reply = "a" if isinstance(prompt, str) else [{"role": "assistant", "content": "a"}]
        try:
            ids, _ = self.renderer(prompt, [reply, reply])
        except data.DataError as error:
            raise data.DataError(f"{question.place}: {error}")
        except Exception as error:  # a template's own raise_exception, among others
            raise data.DataError(f"{question.place}: the chat template failed ({type(error).__name__}: {error})")
        if len(ids) > self.room:
            self.cut.add((question.key, len(answers)))
            first = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = first + ids[len(ids) - self.room + len(first):]
        return ids

    def ends(self, lm):
        """Ids of the tokens that end an answer: EOS of model and tokenizer, and what the template puts behind a reply."""
        ends = lm.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}
        if self.tokenizer.chat_template:
            talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": data.SENTINEL}]
            behind = self.tokenizer.apply_chat_template(talk, tokenize=False).rpartition(data.SENTINEL)[2].lstrip()
            first = self.tokenizer(behind, add_special_tokens=False).input_ids[:1]
            ends |= {id for id in first if (token := self.tokenizer.added_tokens_decoder.get(id)) and token.special}
        return sorted(ends)


class Draw(LogitsProcessor):
    """Leaves of each row's logits one token, which greedy search then takes: the most likely one where the row's temperature
    is 0, else the one on which its uniform number falls. So a row's draws are its own, whatever else is in the batch.

    temperatures: (B,).  uniforms: (B, new tokens) in [0, 1).
    """

    def __init__(self, temperatures, uniforms, top_p=1.0, top_k=0):
        self.temperatures, self.uniforms, self.step = temperatures[:, None], uniforms, 0
        self.cuts = ([TopKLogitsWarper(top_k)] if top_k else []) + ([TopPLogitsWarper(top_p)] if top_p < 1 else [])

    def __call__(self, input_ids, scores):
        chosen = scores.argmax(-1, keepdim=True)  # (B, 1)
        if (self.temperatures > 0).any():
            warm = scores / self.temperatures.clamp(min=1e-4)  # (B, V)
            for cut in self.cuts:
                warm = cut(input_ids, warm)
            mass = warm.softmax(-1).cumsum(-1)
            aim = self.uniforms[:, self.step, None] * mass[:, -1:] * (1 - 1e-6)  # never behind the last likely token
            drawn = torch.searchsorted(mass, aim, right=True)
            chosen = torch.where(self.temperatures > 0, drawn, chosen)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def uniforms(seed, key, turn, count):
    """(count,) numbers in [0, 1) that belong to one turn of one question."""
    digest = hashlib.blake2b(json.dumps([seed, key, turn]).encode(), digest_size=8).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1))


@torch.inference_mode()
def respond(lm, tokenizer, prompts, draw, ends):
    """Answers to token ids `prompts`, padded on the left. Returns [(text, whether it came to its end)]."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=lm.device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=lm.device)
    lm.generation_config = GenerationConfig(max_new_tokens=draw.uniforms.size(1), eos_token_id=ends, pad_token_id=pad)
    answers = []
    for new in lm.generate(input_ids=ids, attention_mask=mask, logits_processor=[draw])[:, width:].tolist():
        end = next((n for n, id in enumerate(new) if id in ends), None)
        answers.append((tokenizer.decode(new[:end], skip_special_tokens=True).strip(), end is not None))
    return answers


# ----------------------------------------------------------------------------------------------------------------------
# The run

def generate(options):
    """Answer the questions of the command line, from where an earlier run stopped."""
    import train  # here, for --compare does without DeepSpeed; before model, as it prepares DeepSpeed's surroundings
    from runtime import model  # isort: skip
    format, name = FORMATS[options.format], options.name or Path(options.model).resolve().name
    folder = Path(options.model)
    if not folder.is_dir() and not options.output:
        raise UsageError(f"{options.model}: is no folder here; for a model of the hub say --output FILE too")
    usual = format.path(folder, name)
    path = Path(options.output) if options.output else usual
    if path.suffix != usual.suffix:
        raise UsageError(f"--output {path}: a file of the format {options.format} ends in {usual.suffix}")
    questions = read_questions(format, options.questions)
    if options.temperature is not None:
        for question in questions:
            question.temperature = options.temperature
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    config = model_config(options, folder, device)
    tokenizer = model.load_tokenizer(config)
    model.check_models(config, tokenizer)
    longest, new = lengths(config, options.max_new_tokens)
    prompts = Prompts(tokenizer, longest - new, config.auto_insert_empty_system_msg)
    settings = {"format": options.format, "name": name, "weights": weights(config, folder),
                "bf16": config.bf16, "prompts": prompts.renderer.fingerprint(), "max_new_tokens": new,
                "temperature": options.temperature, "top_p": options.top_p, "top_k": options.top_k, "seed": config.seed}
    answers = read_answers(format, path, settings, questions)
    kept, todo = len(answers), [question for question in questions if question.key not in answers]
    if todo:
        first = {question.key: len(prompts(question, [])) for question in todo}
        todo.sort(key=lambda question: -first[question.key])  # what does not fit into memory is known at once
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(settings_path(path), json.dumps(settings) + "\n")
        lm = model.load_model(config, options.model).lm.eval().to(device)
        ends = prompts.ends(lm)
        train.say(f"{len(todo):,} questions to {options.model} on {device} in {'bf16' if config.bf16 else 'fp32'}, "
                  f"{said(prompts, questions)}")
    unfinished = 0
    with train.bar(len(questions), "answers", initial=kept) as bar:
        for start in range(0, len(todo), options.batch_size):
            batch = todo[start:start + options.batch_size]
            for question, turns, open_ends in answer_batch(lm, tokenizer, prompts, batch, ends, new, options, config.seed):
                answers[question.key] = format.answer(question, turns, name)
                unfinished += open_ends
            replace_file(path, format.text([answers[q.key] for q in questions if q.key in answers]))
            bar.update(len(batch))
    train.say(f"{len(answers):,} answers in {path}" + (f", of which {kept:,} were there" if kept else "")
              + (f"; {unfinished:,} did not end within {new:,} tokens" if unfinished else "")
              + (f"; {len(prompts.cut):,} prompts were cut to their last {prompts.room:,} tokens" if prompts.cut else ""))


def answer_batch(lm, tokenizer, prompts, batch, ends, new, options, seed):
    """[(question, its answers, how many of them did not come to their end)] of a batch, turn by turn."""
    turns, open_ends = [[] for _ in batch], [0] * len(batch)
    for turn in range(max(len(question.turns) for question in batch)):
        rows = [n for n, question in enumerate(batch) if turn < len(question.turns)]
        draw = Draw(torch.tensor([batch[n].temperature for n in rows], device=lm.device),
                    torch.stack([uniforms(seed, batch[n].key, turn, new) for n in rows]).to(lm.device),
                    options.top_p, options.top_k)
        try:
            found = respond(lm, tokenizer, [prompts(batch[n], turns[n]) for n in rows], draw, ends)
        except torch.OutOfMemoryError:
            raise UsageError(f"out of memory at batch_size {options.batch_size}: say --batch_size with less, or "
                             "--max_new_tokens; with less of the former, the same command goes on")
        for n, (text, ended) in zip(rows, found):
            turns[n].append(text)
            open_ends[n] += not ended
    return zip(batch, turns, open_ends)


def model_config(options, folder, device):
    """The Config by which model.py loads it; keys that are not given, as the run had them."""
    keys = ("bf16", "seed", "chat_template", "auto_insert_empty_system_msg", "model_revision", "trust_remote_code")
    given = {key: convert(getattr(options, key), key, f"command line, --{key}") for key in keys
             if getattr(options, key) is not None}
    saved = folder / "config.yaml"
    if saved.is_file():
        with data.reading(saved):
            trained = load_yaml(saved.read_text(encoding="utf-8"), saved)
        key = "auto_insert_empty_system_msg"
        if isinstance(trained, dict) and key in trained:
            given.setdefault(key, convert(trained[key], key, f"{saved}, {key}"))
    return Config(model_name_or_path=options.model, **{"bf16": device.type != "cpu"} | given)


def lengths(config, wanted):
    """(tokens of a prompt and an answer together, tokens of an answer). wanted: or None."""
    from runtime import model
    try:
        shape = model.transformers.AutoConfig.from_pretrained(
            config.model_name_or_path, revision=config.model_revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a damaged file may raise anything
        raise model.cannot_load("model", config.model_name_or_path, error)
    longest = getattr(shape.get_text_config(), "max_position_embeddings", None) or ALL
    if wanted and wanted >= longest:
        raise UsageError(f"--max_new_tokens {wanted:,}: the model has {longest:,} positions; leave some to the prompt")
    return longest, wanted or min(1024, longest // 2)


def weights(config, folder):
    """What tells the weights of a folder from those that stood there before, or the hub's revision."""
    if not folder.is_dir():
        return f"{config.model_name_or_path} {config.model_revision}"
    files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in sorted(folder.glob("*.safetensors"))]
    return data.hash_of(*files)


def said(prompts, questions):
    """What becomes of the questions, in words."""
    if not questions[0].chat:
        return "as in training: text as it is, messages through the chat template"
    if not prompts.tokenizer.chat_template:
        return ("as plain text, for the model has no chat template"
                + ("; a later turn stands behind the earlier ones and their answers" if
                   any(len(question.turns) > 1 for question in questions) else ""))
    return ("through the model's chat template"
            + (", with an empty system message as in training" if prompts.renderer.empty_system else ""))


def main(argv=None):
    parser = argparse.ArgumentParser(prog="tools/generate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", metavar="DIR", help="model folder or hub id")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="print two answer files side by side")
    parser.add_argument("--questions", metavar="FILE", help="what is asked")
    parser.add_argument("--format", choices=FORMATS, default="jsonl", help="default: jsonl")
    parser.add_argument("--output", metavar="FILE", help="where the answers go")
    parser.add_argument("--name", help="the model's name in the file; default: the folder's")
    parser.add_argument("--max_new_tokens", type=int, help="of an answer; default: 1024, or half of the model's positions")
    parser.add_argument("--temperature", type=float, help="0: greedy; default: 0, of mt_bench that of the category")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the most likely tokens of this mass; default: 1")
    parser.add_argument("--top_k", type=int, default=0, help="draw from so many likeliest tokens; default: 0, which is all")
    parser.add_argument("--batch_size", type=int, default=16, help="questions at once; default: 16")
    for key in ("seed", "bf16", "chat_template", "auto_insert_empty_system_msg", "model_revision", "trust_remote_code"):
        parser.add_argument(f"--{key}", nargs="?", const="true", help="as of train.py"
                            + ("; default: true where there is a GPU" if key == "bf16" else ""))
    options = parser.parse_args(argv)
    if options.compare:
        return compare.main(*options.compare, options.questions)
    if not options.model or not options.questions:
        parser.error("say DIR and --questions FILE, or --compare A B")
    for flag, right, what in (("temperature", (options.temperature or 0) >= 0, "0 or more"),
                              ("top_p", 0 < options.top_p <= 1, "more than 0 and at most 1"),
                              ("top_k", options.top_k >= 0, "0 or more"),
                              ("batch_size", options.batch_size > 0, "1 or more"),
                              ("max_new_tokens", (options.max_new_tokens or 1) > 0, "1 or more")):
        if not right:
            parser.error(f"--{flag} {getattr(options, flag)}: expected {what}")
    if options.name and not (options.name.isprintable() and "/" not in options.name):
        parser.error(f"--name {options.name!r}: is no name of a file")
    try:
        generate(options)
    except KeyboardInterrupt:
        print("tools/generate.py: stopped; the same command goes on with the answers that are there", file=sys.stderr)
        return 75
    except (UsageError, data.DataError, ExchangeError, OSError) as error:
        print(f"tools/generate.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter shows ? for it
    sys.exit(main())
