"""Write a model's answers, for evaluation harnesses or as pairs to label, or show two models' answers side by side.

    python tools/generate.py DIR --questions FILE                          {"prompt", "response"} lines
    python tools/generate.py DIR --questions FILE --format alpaca_eval     AlpacaEval's model_outputs.json
    python tools/generate.py DIR --questions FILE --format mt_bench        FastChat's model_answer/NAME.jsonl
    python tools/generate.py --compare A B [--questions FILE]              two answer files (or folders with one)
    python tools/generate.py DIR --pairs --prompts FILE                    two responses a prompt, to label: tools/pairs.py

DIR is a model folder or hub id; only a hub id is downloaded. FILE is JSON Lines, a JSON list, csv or parquet. What its rows
hold, and where the answers go unless --output says otherwise:

    jsonl          {"prompt"}: a text, used as it is, or messages, as in training  DIR/responses.jsonl
    alpaca_eval    {"instruction"}, and "dataset", which is kept                   DIR/model_outputs.json
    mt_bench       {"question_id", "category", "turns"}, as FastChat has them      DIR/data/mt_bench/model_answer/NAME.jsonl

A jsonl row may also have what goes with a prompt in training: `system`, `tools`, or the user's turn in another column
(runtime/formats.py, parse_prompt). Instructions and turns go through the chat template as in training
(runtime/rendering.py, with the empty system message that the config.yaml beside the model asks for). Without a template they
are plain text; a later turn follows the earlier ones and their answers, separated by blank lines. An answer ends at EOS or
where the template ends a turn, and is stripped.

The temperature is 0 (greedy), or for MT-Bench that of the category in FastChat's common.py; --temperature overrides both. A
draw depends only on --seed, the question and the turn, so in fp32 neither --batch_size nor resuming changes an answer. In
bf16, the default on a GPU, the other questions of a batch change how logits are rounded, and now and then an answer. Of the
model's generation_config.json only the end tokens count; FastChat's and AlpacaEval's own generation also take top_p, top_k
and repetition_penalty from there.

The file is replaced as a whole after each batch. The same command again keeps its answers and goes on, even after kill -9;
FILE.settings.json records what made it, and other settings or weights are refused. Exit code 75: stopped, the same command
goes on; 2: something has to be changed, and one line says what. The official code does not generate.
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
from transformers import AutoConfig, GenerationConfig, LogitsProcessor, TopKLogitsWarper, TopPLogitsWarper  # noqa: E402

from runtime.config import Config  # noqa: E402
from runtime.errors import DataError, Stopped, UsageError, one_line  # noqa: E402
from runtime.formats import checked_text, parse_prompt  # noqa: E402
from runtime.parse import convert, load_yaml, wants_empty_system  # noqa: E402
from runtime.ranks import bar, say  # noqa: E402
from runtime.rendering import Renderer  # noqa: E402
from runtime.sources import hash_of, reading  # noqa: E402
from tools import compare  # noqa: E402
from tools.compare import rows_of  # noqa: E402
from tools.exchange import filled, replace_file  # noqa: E402

# From fastchat/llm_judge/common.py and gen_model_answer.py (0.2.36), which use 0.7 for any other category.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
                "stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0}
OTHER_TEMPERATURE = 0.7
OTHER = "choose another --output, or delete it"  # what to do about a file that is in the way
ALL = 10**9  # more tokens than any text has, so nothing is cut


# ----------------------------------------------------------------------------------------------------------------------
# The formats: how a row of questions becomes an EvalQuestion, and its answers a row of the file

@dataclass
class EvalQuestion:
    """One question of a file.

    key: tells it from the others.  turns: the user's texts, in order, or one list of messages.  row: as it was read.
    place: where it was read, "FILE, row N".
    """
    key: tuple
    turns: list
    row: dict
    place: str
    temperature: float = 0.0
    chat: bool = True  # whether a text is a user's message, so that the chat template applies


def text_field(row, name, place):
    """The text in a field of a row. Raises DataError if there is none."""
    value = row.get(name)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}, field {name}: expected a text, found {one_line(repr(value), 80)}")
    return checked_text(value, f"{place}, field {name}")


def columns_of(prompt):
    """The columns in which a row has this prompt, as training reads them: a conversation's tools have one of their own."""
    if isinstance(prompt, list) and prompt[0]["role"] == "tools":
        return {"prompt": prompt[1:], "tools": json.loads(prompt[0]["content"])}
    return {"prompt": prompt}


class Jsonl:
    """{"prompt", "response"} lines, with "tools" where there are some."""

    @staticmethod
    def path(folder, name):
        return folder / "responses.jsonl"

    @staticmethod
    def key(row):
        return json.dumps([row.get("prompt"), row["tools"]] if "tools" in row else row.get("prompt"))

    @staticmethod
    def question(row, place):
        prompt = parse_prompt(row, place)
        asked = columns_of(prompt)
        return EvalQuestion(Jsonl.key(asked), [prompt], asked, place, chat=False)

    @staticmethod
    def answer(question, turns, name):
        return question.row | {"response": turns[0]}

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
            raise DataError(f"{place}, field input: AlpacaEval asks with the instruction alone; put the input into it")
        return EvalQuestion(instruction, [instruction], row, place)

    @staticmethod
    def answer(question, turns, name):
        kept = {field: question.row[field] for field in ("dataset", "instruction") if field in question.row}
        return kept | {"output": turns[0], "generator": name}

    @staticmethod
    def text(rows):
        return json.dumps(rows, indent=2) + "\n"


class MtBench:
    """The lines that FastChat's load_model_answers reads, made from its question.jsonl."""

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
            raise DataError(f"{place}, field question_id: expected a number or a text, found "
                                 f"{one_line(repr(id), 80)}")
        category = text_field(row, "category", place)
        if not isinstance(turns, list) or not turns:
            raise DataError(f"{place}, field turns: expected a list of texts, found {one_line(repr(turns), 80)}")
        turns = [text_field({"turns": turn}, "turns", place) for turn in turns]
        return EvalQuestion(id, turns, row, place, TEMPERATURES.get(category, OTHER_TEMPERATURE))

    @staticmethod
    def answer(question, turns, name):
        return {"question_id": question.row["question_id"], "answer_id": uuid.uuid4().hex, "model_id": name,
                "choices": [{"index": 0, "turns": turns}], "tstamp": time.time()}

    text = Jsonl.text


FORMATS = {"jsonl": Jsonl, "alpaca_eval": AlpacaEval, "mt_bench": MtBench}


def read_questions(format, path):
    """The Questions of a file. A question that appears twice is asked twice; in MT-Bench an id may appear only once."""
    questions, seen = [], Counter()
    for place, row in rows_of(path):
        question = format.question(row, place)
        if format is MtBench and seen[question.key]:
            raise DataError(f"{place}, field question_id: {question.key!r} appears twice; keep one")
        seen[question.key] += 1
        question.key = question.key, seen[question.key]
        questions.append(question)
    if not questions:
        raise DataError(f"{path}: has no questions")
    return questions


def read_answers(format, path, settings, questions):
    """{key: row} of the answers that an earlier run left. Raises UsageError if they are of other settings or questions."""
    if not path.exists():
        return {}
    check_settings(path, settings)
    found, seen, known = {}, Counter(), {question.key for question in questions}
    for place, row in rows_of(path):
        key = format.key(row)
        key = key if isinstance(key, (str, int)) else None  # belongs to no question
        seen[key] += 1
        if (key, seen[key]) not in known:
            raise UsageError(f"{place}: answers a question that is not asked: {OTHER}")
        found[key, seen[key]] = row
    return found


def check_settings(path, settings):
    """Raise UsageError unless the file that is there was made with these settings."""
    beside = settings_path(path)
    if not beside.is_file():
        raise UsageError(f"{path} exists and was not made by this command ({beside.name} does not exist): {OTHER}")
    before = dict(row for _, line in rows_of(beside) for row in line.items())
    for name in settings:
        if before.get(name) != settings[name]:
            raise UsageError(f"{path} holds answers made with another {name} ({one_line(before.get(name), 80)}; now "
                             f"{one_line(settings[name], 80)}): {OTHER}")


def settings_path(path):
    return path.with_suffix(".settings.json")


# ----------------------------------------------------------------------------------------------------------------------
# From a conversation to tokens, and to an answer

class Prompts:
    """Turns conversations into token ids, the way the model saw prompts in training.

    tokenizer: with or without a chat template.  room: most tokens of a prompt; it is cut on the left.
    empty_system: as in Renderer.  cut: what had to be cut so far.
    """

    def __init__(self, tokenizer, room, empty_system):
        self.tokenizer, self.room, self.cut = tokenizer, room, set()
        self.renderer = Renderer(tokenizer, ALL, ALL, empty_system)

    def __call__(self, question, answers):
        """Token ids of the question's next turn, after its answers so far."""
        turns = question.turns[:len(answers) + 1]
        if not question.chat:
            prompt = turns[0]
        elif self.tokenizer.chat_template:
            prompt = [{"role": "user", "content": turns[0]}]
            for answer, turn in zip(answers, turns[1:]):
                prompt += [{"role": "assistant", "content": answer}, {"role": "user", "content": turn}]
        else:
            prompt = "\n\n".join([text for pair in zip(turns, answers) for text in pair] + turns[-1:])
        try:
            ids = self.renderer.prompt_ids(prompt)
        except DataError as error:
            raise DataError(f"{question.place}: {error}")
        except Exception as error:  # such as a template's own raise_exception
            raise DataError(f"{question.place}: the chat template failed ({type(error).__name__}: {error}): "
                            "set another --chat_template, or change the row")
        if len(ids) > self.room:
            self.cut.add((question.key, len(answers)))
            first = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
            ids = first + ids[len(ids) - self.room + len(first):]
        return ids

    def cut_in_words(self):
        return f"; {len(self.cut):,} prompts were cut to their last {self.room:,} tokens" if self.cut else ""

    def ends(self, lm):
        """Ids of the tokens that end an answer: the model's EOS, and those that end a reply in training."""
        from runtime.model import own_ends
        return sorted(self.renderer.ends | own_ends(lm))


class Draw(LogitsProcessor):
    """Leaves one token of each row's logits, which greedy search then takes: the most likely one if the row's temperature is
    0, otherwise the one that the row's uniform number selects. So a draw does not depend on what else is in the batch.

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
            aim = self.uniforms[:, self.step, None] * mass[:, -1:] * (1 - 1e-6)  # never past the last likely token
            drawn = torch.searchsorted(mass, aim, right=True)
            chosen = torch.where(self.temperatures > 0, drawn, chosen)
        self.step += 1
        return torch.full_like(scores, -torch.inf).scatter(1, chosen, 0.0)


def uniforms(seed, key, turn, count):
    """(count,) numbers in [0, 1) that belong to one turn of one question."""
    digest = hashlib.blake2b(json.dumps([seed, key, turn]).encode(), digest_size=8).digest()
    return torch.rand(count, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1))


def respond(lm, tokenizer, prompts, draw, ends):
    """Answer prompts of token ids. Returns [(text, whether it came to its end)]."""
    return [(tokenizer.decode(ids, skip_special_tokens=True).strip(), ended)
            for ids, ended in draw_tokens(lm, tokenizer, prompts, draw, ends)]


@torch.inference_mode()
def draw_tokens(lm, tokenizer, prompts, draw, ends):
    """Continue prompts of token ids, padded on the left. Returns [(new ids up to the end token, whether one came)]."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=lm.device)  # (B, T)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=lm.device)
    lm.generation_config = GenerationConfig(max_new_tokens=draw.uniforms.size(1), eos_token_id=ends, pad_token_id=pad)
    try:
        rows = lm.generate(input_ids=ids, attention_mask=mask, logits_processor=[draw])[:, width:].tolist()
    except torch.OutOfMemoryError:
        raise UsageError("out of memory: lower --batch_size, with which the same command goes on, or --max_new_tokens")
    cuts = [next((n for n, id in enumerate(new) if id in ends), None) for new in rows]
    return [(new[:cut], cut is not None) for new, cut in zip(rows, cuts)]


class Model:
    """A model on this machine that answers. Its weights are read only once they are needed, by `load`.

    prompts: its Prompts.  new: most tokens of an answer.
    """

    def __init__(self, name, options):
        # Here, because --compare does without DeepSpeed.
        import runtime.launch  # noqa: F401  first: it sets what DeepSpeed reads when it is imported
        from runtime.model import check_models, load_tokenizer  # isort: skip
        self.name = name
        self.device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
        self.config = model_config(name, options, self.device)
        self.tokenizer = load_tokenizer(self.config)
        check_models(self.config, self.tokenizer)
        longest, self.new = lengths(self.config, options.max_new_tokens)
        self.prompts = Prompts(self.tokenizer, longest - self.new, self.config.auto_insert_empty_system_msg)

    def load(self):
        from runtime.model import load_policy
        self.lm = load_policy(self.config).lm.eval().to(self.device)
        self.ends = self.prompts.ends(self.lm)

    def settings(self):
        """What, besides the flags, decides what it answers."""
        return {"weights": weights(self.config), "bf16": self.config.bf16,
                "prompts": self.prompts.renderer.fingerprint(), "max_new_tokens": self.new, "seed": self.config.seed}

    def __str__(self):
        return f"{self.name} on {self.device} in {'bf16' if self.config.bf16 else 'fp32'}"


# ----------------------------------------------------------------------------------------------------------------------
# The run

def generate(options):
    """Answer the questions of the command line, from where an earlier run stopped."""
    folder, = options.model
    format, name = FORMATS[options.format], options.name or Path(folder).resolve().name
    path = output_path(folder, options.output, format.path(Path(folder), name))
    questions = read_questions(format, options.questions)
    if options.temperature is not None:
        for question in questions:
            question.temperature = options.temperature
    model = Model(folder, options)
    prompts = model.prompts
    settings = {"format": options.format, "name": name, **model.settings(), "temperature": options.temperature,
                "top_p": options.top_p, "top_k": options.top_k}
    answers = read_answers(format, path, settings, questions)
    kept, todo = len(answers), [question for question in questions if question.key not in answers]
    if todo:
        todo = longest_first(todo, prompts)
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(settings_path(path), json.dumps(settings) + "\n")
        model.load()
        say(f"{len(todo):,} questions to {model}, {how_asked(prompts, questions)}")
    unfinished = 0
    with bar(len(questions), "answers", initial=kept) as progress:
        for start in range(0, len(todo), options.batch_size):
            batch = todo[start:start + options.batch_size]
            for question, turns, open_ends in answer_batch(model, batch, options):
                answers[question.key] = format.answer(question, turns, name)
                unfinished += open_ends
            replace_file(path, format.text([answers[q.key] for q in questions if q.key in answers]))
            progress.update(len(batch))
    say(f"{len(answers):,} answers in {path}" + (f", {kept:,} of them from before" if kept else "")
        + (f"; {unfinished:,} did not end within {model.new:,} tokens" if unfinished else "") + prompts.cut_in_words())


def output_path(model, wanted, usual):
    """Where the answers go. Raises UsageError if --output is missing where it is needed, or has the wrong ending.

    wanted: what --output says, or None.  usual: the place in the model's folder."""
    if not wanted and not Path(model).is_dir():
        raise UsageError(f"{model}: not a local folder; for a model on the hub, say --output FILE too")
    path = Path(wanted) if wanted else usual
    if path.suffix != usual.suffix:
        raise UsageError(f"--output {path}: this command writes a file that ends in {usual.suffix}")
    return path


def longest_first(questions, prompts):
    """Questions by their length, so that it shows at once if the longest do not fit into memory."""
    lengths = {}
    with bar(len(questions), "reading prompts", leave=False) as progress:
        for question in questions:
            lengths[question.key] = len(prompts(question, []))
            progress.update()
    return sorted(questions, key=lambda question: -lengths[question.key])


def answer_batch(model, batch, options):
    """Answer a batch, turn by turn. Returns (question, its answers, how many of them did not come to their end) of each."""
    turns, open_ends = [[] for _ in batch], [0] * len(batch)
    for turn in range(max(len(question.turns) for question in batch)):
        rows = [n for n, question in enumerate(batch) if turn < len(question.turns)]
        draw = Draw(torch.tensor([batch[n].temperature for n in rows], device=model.device),
                    torch.stack([uniforms(model.config.seed, batch[n].key, turn, model.new) for n in rows]).to(model.device),
                    options.top_p, options.top_k)
        asked = [model.prompts(batch[n], turns[n]) for n in rows]
        for n, (text, ended) in zip(rows, respond(model.lm, model.tokenizer, asked, draw, model.ends)):
            turns[n].append(text)
            open_ends[n] += not ended
    return zip(batch, turns, open_ends)


def model_config(name, options, device):
    """The Config with which runtime/model.py loads the model. If auto_insert_empty_system_msg is not given, it is as the
    training run had it, which wrote config.yaml."""
    keys = ("bf16", "seed", "chat_template", "auto_insert_empty_system_msg", "model_revision", "trust_remote_code")
    given = {key: convert(getattr(options, key), key, f"command line, --{key}") for key in keys
             if getattr(options, key) is not None}
    saved, key = Path(name) / "config.yaml", "auto_insert_empty_system_msg"
    if saved.is_file():
        with reading(saved):
            written = load_yaml(saved.read_text(encoding="utf-8"), saved)
        trained = written.get("config") if isinstance(written, dict) else None
        if isinstance(trained, dict) and key in trained:
            given.setdefault(key, convert(trained[key], key, f"{saved}, {key}"))
    given.setdefault(key, wants_empty_system(name))
    return Config(model_name_or_path=name, **{"bf16": device.type != "cpu"} | given)


def lengths(config, wanted):
    """(most tokens of a prompt and its answer, most tokens of an answer).  wanted: the latter, or None."""
    from runtime.model import loading, resolve_model
    name, revision, _ = resolve_model(config, config.model_name_or_path)  # of an adapter, the model that it changes
    with loading("model", name):
        shape = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    longest = getattr(shape.get_text_config(), "max_position_embeddings", None) or ALL
    if wanted and wanted >= longest:
        raise UsageError(f"--max_new_tokens {wanted:,}: the model has {longest:,} positions; leave some for the prompt")
    return longest, wanted or min(1024, longest // 2)


def weights(config):
    """What tells a folder's weights from others that were there before; for a hub model, its revision; for an adapter, both
    its own weights and those of the model that it changes."""
    from runtime.model import resolve_model
    base, revision, adapter = resolve_model(config, config.model_name_or_path)
    local = Path(base).is_dir()
    folders = [Path(base)] * local + [adapter] * bool(adapter)
    files = [[file.name, file.stat().st_size, file.stat().st_mtime_ns]
             for folder in folders for file in sorted(folder.glob("*.safetensors"))]
    return hash_of(*files) if local else f"{base} {revision}" + (f" {hash_of(*files)}" if adapter else "")


def how_asked(prompts, questions):
    """How the questions reach the model, in words."""
    if not questions[0].chat:
        return "as in training: text as it is, messages through the chat template"
    if not prompts.tokenizer.chat_template:
        several = any(len(question.turns) > 1 for question in questions)
        return ("as plain text, because the model has no chat template"
                + ("; a later turn follows the earlier ones and their answers" if several else ""))
    return ("through the model's chat template"
            + (", with an empty system message as in training" if prompts.renderer.empty_system else ""))


def main(argv=None):
    from tools import pairs  # here, because it imports this file
    parser = argparse.ArgumentParser(prog="tools/generate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="*", default=[], metavar="DIR", help="model folder or hub id; for pairs one or two")
    parser.add_argument("--compare", nargs=2, metavar=("A", "B"), help="print two answer files side by side")
    parser.add_argument("--questions", metavar="FILE", type=filled, help="what to ask")
    parser.add_argument("--format", choices=FORMATS, default="jsonl", help="default: jsonl")
    parser.add_argument("--pairs", action="store_true", help="write two responses a prompt, to label (tools/pairs.py)")
    parser.add_argument("--prompts", metavar="FILE", type=filled, help="of the pairs: rows with a prompt, a .txt with one a "
                                                                       "line, or toy")
    parser.add_argument("--endpoint", metavar="URL", help="of the pairs: an OpenAI-compatible server that writes them")
    parser.add_argument("--endpoint_model", nargs="+", metavar="NAME", help="its model, or two")
    parser.add_argument("--endpoint_key_env", metavar="VARIABLE", default="OPENAI_API_KEY", help="environment variable with "
                        "its API key, if it needs one; default: OPENAI_API_KEY")
    parser.add_argument("--concurrency", type=int, default=8, help="pairs that it writes at the same time; default: 8")
    parser.add_argument("--output", metavar="FILE", type=filled, help="where the answers or pairs go")
    parser.add_argument("--name", help="the model's name in the file; default: the folder's")
    parser.add_argument("--max_new_tokens", type=int, help="of an answer; default: 1024, or half the model's positions")
    parser.add_argument("--temperature", type=float, help="0: greedy; default: 0, for mt_bench that of the category, for "
                                                          "pairs 1")
    parser.add_argument("--top_p", type=float, default=1.0, help="draw from the likeliest tokens of this mass; default: 1")
    parser.add_argument("--top_k", type=int, default=0, help="draw from this many likeliest tokens; default: 0, from all")
    parser.add_argument("--batch_size", type=int, default=16, help="questions at a time; default: 16")
    for key in ("seed", "bf16", "chat_template", "auto_insert_empty_system_msg", "model_revision", "trust_remote_code"):
        parser.add_argument(f"--{key}", nargs="?", const="true", help="as in train.py"
                            + ("; default: true if there is a GPU" if key == "bf16" else ""))
    options = parser.parse_intermixed_args(argv)
    wrong = misuse(options) or pairs.misuse(options, {name for name in vars(options)
                                                      if getattr(options, name) != parser.get_default(name)})
    if wrong:
        parser.error(wrong)
    if options.compare:
        return compare.main(*options.compare, options.questions)
    try:
        (pairs.generate if options.pairs else generate)(options)
    except KeyboardInterrupt:
        print("tools/generate.py: stopped; the same command goes on with the answers that are there", file=sys.stderr)
        return 75
    except Stopped as stop:
        print(f"tools/generate.py: {one_line(stop)}", file=sys.stderr)
        return 75
    except (UsageError, OSError) as error:
        print(f"tools/generate.py: {one_line(error)}", file=sys.stderr)
        return 2
    return 0


def misuse(options):
    """What is wrong with the command line, or None."""
    if not (options.compare or options.pairs or options.questions and len(options.model) == 1):
        return "say DIR and --questions FILE, or DIR --pairs --prompts FILE, or --compare A B"
    for flag, right, what in (("temperature", (options.temperature or 0) >= 0, "0 or more"),
                              ("top_p", 0 < options.top_p <= 1, "more than 0 and at most 1"),
                              ("top_k", options.top_k >= 0, "0 or more"),
                              ("batch_size", options.batch_size > 0, "1 or more"),
                              ("concurrency", options.concurrency > 0, "1 or more"),
                              ("max_new_tokens", (options.max_new_tokens or 1) > 0, "1 or more")):
        if not right:
            return f"--{flag} {getattr(options, flag)}: expected {what}"
    if options.name and not (options.name.isprintable() and "/" not in options.name):
        return f"--name {options.name!r}: cannot be the name of a file"
    return None


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show some letters shows ? instead
    sys.exit(main())
