"""What several test files share. Fixtures are in conftest.py; the recipes' models and data sets are in miniature.py.

conftest.py imports this file before it has set the number of threads and the folders of the caches, which torch,
transformers and datasets read when they are imported. So functions that need them import them when they are called.
"""

import contextlib
import functools
import http.client
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from labels.ledger import Ledger, Question

ROOT = Path(__file__).resolve().parent.parent


# ----------------------------------------------------------------------------------------------------------------------
# Runs

def launcher(processes):
    return ["deepspeed", "--num_gpus", str(processes), "--master_port", str(free_port()), "train.py"]


def launcher_environment():
    """The launcher starts its children with the `python` that it finds on PATH."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(argv):
    """The command line in this process. Returns the exit code."""
    import train
    from runtime import launch
    return launch.command(argv, train.main)


def prepared_train(path, code):
    """Write a script in which each rank first runs some code, and then train.py unchanged. The code has the `rank`, and
    `at(n)`, which is true at its n-th call. Returns the script's path as text."""
    path.write_text(textwrap.dedent(f"""
        import itertools, os, runpy, signal, sys
        sys.path.insert(0, {str(ROOT)!r})
        rank, calls = int(os.environ.get("RANK", 0)), itertools.count(1)
        def at(n):
            return next(calls) == n
        """) + textwrap.dedent(code) + f"\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    return str(path)


class Run:
    """A run that has ended, and what it left in its output folder."""

    def __init__(self, output, stdout, stderr, code):
        self.output, self.stdout, self.stderr, self.code = output, stdout, stderr, code

    def rows(self, split="train"):
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["split"] == split]

    def losses(self):
        return [row["loss"] for row in self.rows()]

    def summary(self):
        return json.loads((self.output / "summary.json").read_text())

    def weights(self):
        from safetensors.torch import load_file
        return load_file(self.output / "model.safetensors")

    def ledger(self):
        return sqlite3.connect(self.output / "labels.sqlite").execute(
            "SELECT pair, label, step FROM answers ORDER BY pair").fetchall()


def errors(run):
    """The `error:` lines of a run; it must not show a traceback."""
    assert "Traceback" not in run.stdout + run.stderr, run.stderr[-3000:]
    return [line for line in run.stderr.splitlines() if line.startswith("error: ")]


def timeless(run):
    """All rows of metrics.jsonl, without how fast they were computed."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in run.rows() + run.rows("eval")]


def assert_same_run(one, other):
    """Metrics, answers and weights agree to the last bit."""
    assert timeless(one) == timeless(other) and one.ledger() == other.ledger()
    weights = one.weights(), other.weights()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def copy_without(run, folder, *names):
    """Copy a run's output folder without these files and folders: what a run that was stopped earlier left."""
    shutil.copytree(run.output, folder, ignore=shutil.ignore_patterns(*names))
    return folder


def wait_until(condition, process=None, seconds=600):
    """Wait until something has happened.  process: a Popen that must not end before.  The deadline only guards against
    hanging: a busy machine does not reach it."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, condition
        time.sleep(0.02)


def flip_byte(path, at=None):
    """Change one byte of a file: in the middle, or at the start of the bytes `at`."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2 if at is None else content.index(at)
    content[place] ^= 1
    path.write_bytes(content)


def cut(path, size=None):
    """Leave the first half of a file, or this many bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2 if size is None else size])


def assert_refused(train, match, **keys):
    """The command ends with exit code 2 and one line that says why; nothing is trained."""
    run = train("refused", check=2, **keys)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and re.search(match, errors[0]), run.stderr
    assert len(errors[0]) < 900 and errors[0].isprintable() and "Traceback" not in run.stderr
    assert not run.output.exists()
    return run


def assert_same_weights(one, other, tolerance):
    """The norm of the difference of all weights, relative to the norm of the weights. (Not element by element: where a
    gradient is nearly 0, AdamW turns a rounding error into a step of full size.)"""
    import torch
    assert one.keys() == other.keys()
    one, other = (torch.cat([weights[name].double().flatten() for name in sorted(weights)]) for weights in (one, other))
    assert (one - other).norm() <= tolerance * one.norm()


# ----------------------------------------------------------------------------------------------------------------------
# Recipes

# The official recipes, as in their files (paths and values are facts of that repository).
OFFICIAL_BETA = """
model_name_or_path: alignment-handbook/zephyr-7b-sft-full
torch_dtype: null
dataset_mixer:
  HuggingFaceH4/ultrafeedback_binarized: 1.0
dataset_splits:
- train_prefs
- test_prefs
preprocessing_num_workers: 12
bf16: true
beta: 0.01
do_eval: true
eval_strategy: steps
eval_steps: 100
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: zephyr-7b-dpo-full
learning_rate: 5.0e-7
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 1
optim: adamw_torch
output_dir: data/zephyr-7b-dpo-full
per_device_train_batch_size: 4
per_device_eval_batch_size: 8
push_to_hub: true
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""
OFFICIAL_GEMMA = """
model_name_or_path: HuggingFaceH4/zephyr-7b-gemma-sft-v0.1
torch_dtype: bfloat16
dataset_mixer:
  argilla/dpo-mix-7k: 1.0
dataset_splits:
- train
- test
preprocessing_num_workers: 12
bf16: true
beta: 0.05
do_eval: true
data_selection: true
eval_strategy: steps
eval_steps: 100
gamma: 2.0
gradient_accumulation_steps: 4
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: zephyr-7b-gemma-dpo
learning_rate: 5.0e-7
log_level: info
logging_steps: 10
lr_scheduler_type: cosine
max_length: 1024
max_prompt_length: 512
num_train_epochs: 2
optim: adamw_torch
output_dir: data/zephyr-7b-gemma-dpo
per_device_train_batch_size: 2
per_device_eval_batch_size: 4
push_to_hub: false
report_to:
- tensorboard
- wandb
save_strategy: "no"
seed: 42
warmup_ratio: 0.1
"""


# ----------------------------------------------------------------------------------------------------------------------
# Tokenisers, rows and files

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = ("{% for m in messages %}"
          "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
# Adds a default system message to a conversation that has none.
DEFAULT_SYSTEM = ("{% if messages[0]['role'] != 'system' %}"
                  "{{ '<|im_start|>system\nBe a pirate.<|im_end|>\n' }}{% endif %}" + CHATML)
ZEPHYR = ("{% for m in messages %}\n{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
LLAMA = ("{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
         "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
         "{% else %}{{ raise_exception('Only user and assistant roles') }}{% endif %}{% endfor %}")
LLAMA_BOS = "{{ bos_token }}" + LLAMA


@functools.cache
def trained(metaspace):
    """A small BPE: byte level, or with Llama's "▁" for spaces and at the beginning. It knows "forever" as one token."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>" if metaspace else None, byte_fallback=metaspace))
    alphabet = []
    if metaspace:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                               decoders.Strip(" ", 1, 0)])
        alphabet = [chr(i) for i in range(32, 127)] + ["\n"]
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        ["for ever forever", "forever", "the user asks and the assistant answers", "x <|im </s <|im"] * 9,
        trainers.BpeTrainer(vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False))
    return tokenizer.to_str()


def tokenizer(eos="</s>", bos="<s>", add_bos=False, template=None, metaspace=False):
    made = Tokenizer.from_str(trained(metaspace))
    if add_bos:
        made.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", made.token_to_id("<s>"))])
    from transformers import PreTrainedTokenizerFast
    made = PreTrainedTokenizerFast(tokenizer_object=made, eos_token=eos, bos_token=bos, unk_token="<unk>",
                                   clean_up_tokenization_spaces=False,
                                   additional_special_tokens=[s for s in SPECIAL if s not in (eos, bos, "<unk>")])
    made.chat_template = template
    return made


def renderer(max_prompt_length=200, max_length=400, empty_system=True, **options):
    from runtime.rendering import Renderer
    return Renderer(tokenizer(**options), max_prompt_length, max_length, empty_system)


def user(text):
    return {"role": "user", "content": text}


def reply(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def preference(n, **more):
    return {"prompt": f"question {n}", "chosen": f" good {n}", "rejected": f" bad {n}", **more}


HH_PROMPT = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant:"
ULTRAFEEDBACK = {
    "prompt": "Why?", "prompt_id": "1f",
    "chosen": [user("Why?"), reply("Since.")], "rejected": [user("Why?"), reply("No.")],
    "messages": [user("Why?"), reply("Since.")], "score_chosen": 8.5, "score_rejected": 3.0}


def as_jsonl(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def write_folder(path, rows, split="train"):
    path.mkdir(exist_ok=True)
    (path / f"{split}.jsonl").write_text(as_jsonl(rows), encoding="utf-8")
    return str(path)


def load_source(source, kind="train", made=None, **options):
    """(pairs, labels, truths, the printed line) of one source, or of a mixer."""
    from data import load_pairs
    said = []
    mixer = source if isinstance(source, dict) else {str(source): 1.0}
    out = load_pairs(mixer, options.pop("splits", [kind]), made or renderer(), kind, say=said.append, **options)
    return *out, "\n".join(said)


def decoded(pairs, made=None):
    """[(prompt, first, second)] as text."""
    decode = (made or renderer()).tokenizer.decode
    return [tuple(decode(row[k]) for k in ("prompt_ids", "first_ids", "second_ids")) for row in pairs.table]


# ----------------------------------------------------------------------------------------------------------------------
# Ledgers

def do_anything(ledger, draw):
    """One random action of a run, a judge, a person or a tool, on one of a few pairs."""
    pair, step, cost = f"p{draw.randrange(40)}", draw.randrange(-1, 5), draw.choice([None, 0.25, 3.0])
    question, label, who = Question(pair, 0.5, step), draw.choice([1, 0, -1]), draw.choice(["ann", "bob"])
    kind = draw.randrange(6)
    if kind == 0:
        ledger.add("x", [(question, label, who, None, cost), (Question(pair + "'", 0.5, step), label, who, None, None)])
    elif kind == 1:
        ledger.add_verdict(pair, who, label, cost=cost)
    elif kind == 2:
        ledger.put_questions([Question(pair, 0.5, max(step, 0))], {pair: ("", "", "")})
        ledger.answer_question(pair, label, who, cost=cost)
    elif kind == 3:
        for done in ledger.db.execute("SELECT pair, annotator FROM answers WHERE source = 'human' LIMIT 1").fetchall():
            ledger.retract(*done)
    elif kind == 4:  # by hand
        ledger.db.execute(f"DELETE FROM {draw.choice(['answers', 'verdicts'])} WHERE pair = ?", (pair,))
    else:
        with contextlib.suppress(KeyboardInterrupt), ledger.transaction():
            ledger.add("x", [(question, label, who, None, cost)])
            raise KeyboardInterrupt


# ----------------------------------------------------------------------------------------------------------------------
# People

class Person(threading.Thread):
    """A person who answers every open question of a run by the gold reward, through a connection of their own, as
    tools/label.py does. limit: how many to answer at most.  undecided: of which pairs to prefer neither response."""

    def __init__(self, output, limit=None, undecided=lambda pair: False):
        super().__init__(daemon=True)
        self.undecided = undecided
        self.path, self.limit, self.stopped, self.answered = output / "labels.sqlite", limit, threading.Event(), 0

    def run(self):
        while not self.path.exists() and not self.stopped.is_set():
            time.sleep(0.05)
        from runtime import toy
        ledger = Ledger(self.path)
        while not self.stopped.is_set() and self.answered != self.limit:
            question = ledger.lease("ann", 60)
            if question is None:
                time.sleep(0.02)
                continue
            pair, _, first, second = question
            better = toy.gold_reward(json.loads(first)) >= toy.gold_reward(json.loads(second))
            label = 0 if self.undecided(pair) else 1 if better else -1
            ledger.answer_question(pair, label, "ann", seconds=0.5)
            self.answered += 1
        ledger.close()

    def __exit__(self, *error):
        self.stopped.set()
        self.join()

    def __enter__(self):
        self.start()
        return self


# ----------------------------------------------------------------------------------------------------------------------
# A judge on loopback

PROMPT = "Which is better?"


def question(pair):
    return Question(pair, margin=0.1, step=0)


def texts(pair):
    """(prompt, y1, y2) of a pair, for a judge. The better response says so; it is y1 if the pair's number is even."""
    good, bad = f"good response of {pair}", f"bad response of {pair}"
    pair = [good, bad] if int(pair[1:]) % 2 == 0 else [bad, good]
    return tuple(json.dumps(text) for text in (PROMPT, *pair))


def truth(pair):
    return 1 if int(pair[1:]) % 2 == 0 else -1


def completion(text, finish="stop", usage=(100, 5)):
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}],
                     "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]}}


def right(prompt, n):
    """The reply of an honest judge: it finds the good response between the fences. To anything else it says yes."""
    a = re.search(r"=== \w+ response A begins\n(.*)\n=== \w+ response A ends", prompt, re.DOTALL)
    return completion("yes" if a is None else "[[A]]" if "good" in a[1] else "[[B]]")


class HTTPServer(ThreadingHTTPServer):
    request_queue_size = 128  # the default is 5, and a connection that finds the queue full waits a second
    daemon_threads = True


class Prompt(str):
    """The text of a request. body: all of its fields."""


class Server:
    """A chat endpoint on loopback.

    behave(prompt, n): returns (status, headers, body), or the bytes of a body, or a list or an iterator of them to send
    slowly, or None to close the connection. prompt: a Prompt.  n: how often it came before.
    """

    def __init__(self, behave, port=0):
        self.behave, self.bodies, self.headers, self.paths, self.lock = behave, [], [], [], threading.Lock()
        self.http = HTTPServer(("127.0.0.1", port), self.handler())
        self.port = self.http.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def handler(server):
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                prompt = Prompt(body["messages"][0]["content"])
                prompt.body = body
                with server.lock:
                    n = sum(b["messages"][0]["content"] == prompt for b in server.bodies)
                    server.bodies.append(body)
                    server.headers.append(self.headers)
                    server.paths.append(self.path)
                answer = server.behave(prompt, n)
                if answer is None:
                    return
                if isinstance(answer, (list, Iterator)):
                    self.send_response(200)
                    self.end_headers()
                    for piece in answer:
                        self.wfile.write(piece)
                        time.sleep(0.1)
                    return
                status, headers, content = (200, {}, answer) if isinstance(answer, bytes) else answer
                content = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

            def handle(self):
                try:
                    super().handle()
                except ConnectionError:  # the judge was killed
                    pass

        return Handler

    def prompts(self):
        return [body["messages"][0]["content"] for body in self.bodies]


# ----------------------------------------------------------------------------------------------------------------------
# The labelling page

JSON = {"Content-Type": "application/json"}


class Site:
    """A labelling page (tools/label.py) in a process of its own, over a ledger in `folder`."""

    def __init__(self, folder, *flags, port=0, program="tools/label.py"):
        self.folder, self.flags, self.port, self.program = folder, flags, port, str(program)
        Ledger(folder / "labels.sqlite").close()
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, self.program, str(self.folder), "--port", str(self.port), *self.flags], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.first = self.process.stdout.readline()
        assert "http" in self.first, self.first + self.process.stderr.read()
        self.url = re.search(r"http\S+", self.first)[0]
        self.port = int((re.search(r"listening on port (\d+)", self.first) or re.search(r":(\d+)/", self.url))[1])

    def stop(self, sign=signal.SIGKILL):
        """(exit code, stderr)."""
        self.process.send_signal(sign)
        errors = self.process.communicate(timeout=300)[1]
        return self.process.returncode, errors

    def clear(self):
        """Remove all questions and answers."""
        for table in ("questions", "answers", "verdicts", "leases"):
            self.query(f"DELETE FROM {table}")

    def put(self, texts, step=3):
        """Put questions, as if an hour ago. texts: {pair: (prompt, y1, y2)}, or the number of made-up ones."""
        if isinstance(texts, int):
            texts = {f"p{n:02}": tuple(f"{what} of p{n:02}" for what in ("prompt", "first", "second"))
                     for n in range(texts)}
        ledger = Ledger(self.folder / "labels.sqlite")
        ledger.put_questions([Question(pair, 0.1, step) for pair in texts],
                             {pair: tuple(map(json.dumps, three)) for pair, three in texts.items()})
        ledger.db.execute("UPDATE questions SET asked_at = asked_at - 3600")
        ledger.close()

    def query(self, sql, *values):
        ledger = Ledger(self.folder / "labels.sqlite")
        rows = ledger.db.execute(sql, values).fetchall()
        ledger.close()
        return rows

    def answers(self):
        return dict(self.query("SELECT pair, label FROM answers"))

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body)."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        link.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, (str, bytes, type(None))))
        response = link.getresponse()
        try:
            return response.status, response.headers, response.read().decode()
        finally:
            link.close()

    def ask(self, action, annotator, headers=None, **message):
        """(status, reply)."""
        body = json.dumps({"annotator": annotator, "view": annotator, **message})
        status, _, text = self.request("POST", f"/ask/{action}", body, {**JSON, **(headers or {})})
        return status, json.loads(text) if text.startswith("{") else text
