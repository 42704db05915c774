"""What only a GPU can show, proved by one command without a network.

    python benchmarks/gpu.py                          what fits into nine minutes, the most valuable first
    python benchmarks/gpu.py --limit 1500             every check
    python benchmarks/gpu.py --only 4,6 --limit 300   checks by number; start none that would not end within 300 seconds
    python benchmarks/gpu.py --small                  rehearsal on a CPU with tiny sizes; what needs CUDA is skipped

A machine without a network needs packages brought along: benchmarks/gpu_carry.sh collects their wheels in .whl/, and there

    python3 -m pip install -q --no-index --no-deps --no-compile --target /tmp/site .whl/*.whl
    PYTHONPATH=/tmp/site python3 benchmarks/gpu.py --output $OUT

Every check runs the real command line (python train.py --config …) in a process of its own, on random weights and 512 random
pairs as long as UltraFeedback's. It says what it aims for and gives verdicts. Results go to gpu.md in --output as they come,
so that a run that is cut off keeps what it has; what the runs printed goes to gpu.log.

How speed is counted. Tokens a second are real tokens, without padding, the prompt counted once for each response, as
metrics.jsonl has them. The share of the card's matrix rate is model FLOPs (6 a weight and token; 4 where only an adapter is
trained; attention added; recomputed activations not) over what an 8192³ bf16 product reaches on the same card. "Prompt once"
counts the work that is needed when both responses share the prompt and only their tokens reach the head: the aims are for
this one. "Prompt twice" counts every token of two ordinary rows, as plain DPO would run them.

Exit code 0: no check failed; 1: one did; 2: nothing could be run.
"""

import argparse
import collections
import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
NO_TIME = "no time left"
VERDICTS = {True: "pass", False: "FAIL", None: "for the record"}
TINY = dict(vocab_size=1000, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, tie_word_embeddings=True)
RATES_HEAD = ("| run | tokens/s, steps 2 to 8 | steps 9 to 16 | share of the card, prompt once | prompt twice | peak GB | "
              "by tools/fit.py | margin of step 1 |\n| --- |" + " --: |" * 7)


@dataclasses.dataclass
class Ran:
    """A finished process.  rows: of metrics.jsonl, training only.  gone_after: seconds from its error line to its end."""
    code: int
    log: str
    rows: list
    summary: dict
    seconds: float
    gone_after: float
    output: Path

    def why(self):
        """The end of what it printed, for a verdict."""
        return f"exit {self.code}: {' '.join(self.log.split())[-300:].replace('|', '/')}"


class Bench:
    """Models, pairs and runs. All of them live in one folder under the system's temporary one."""

    def __init__(self, options):
        import torch
        self.options, self.small, self.started = options, options.small, time.time()
        self.cuda = torch.cuda.is_available()
        self.output = Path(options.output)
        self.output.mkdir(parents=True, exist_ok=True)
        for name in ("gpu.md", "gpu.log"):
            (self.output / name).write_text("")
        self.folder = Path(tempfile.gettempdir()) / f"adpo-gpu{'-small' * options.small}"
        self.lock, self.done, self.rate, self.running = threading.RLock(), {}, None, []
        # A rerun keeps models, but neither runs nor cached log-probs, which may come from other code.
        for name in ("runs", "cache"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / name).mkdir(parents=True)
        self.environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "cache"),
                                         "TOKENIZERS_PARALLELISM": "false", "PYTHONUNBUFFERED": "1"}
        self.write_pairs()

    def say(self, text):
        with self.lock, open(self.output / "gpu.md", "a", encoding="utf-8") as file:
            print(text, flush=True)
            file.write(text + "\n")

    def card(self):
        import torch
        if not self.cuda:
            return f"no CUDA device ({platform.machine()})"
        return f"{torch.cuda.get_device_name()}, {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"

    def left(self):
        return self.options.limit - (time.time() - self.started)

    def steps(self, steps):
        return max(6, steps // 5) if self.small else steps

    def write_pairs(self):
        """Random words, as many as UltraFeedback's prompts and responses have tokens. self.lengths: [(prompt, y1, y2)]."""
        rng = random.Random(0)
        size = min(self.shape(name).vocab_size for name, *_ in RATES.values())  # no model lacks embeddings for a word
        self.words = [f"w{i}" for i in range(size - 4)]
        self.pairs, self.lengths = self.folder / "pairs", []
        self.pairs.mkdir(exist_ok=True)

        def length(median, spread, low, high):
            return int(min(high, max(low, rng.lognormvariate(math.log(median / 8 if self.small else median), spread))))
        with open(self.pairs / "train.jsonl", "w") as file:
            for _ in range(96 if self.small else 512):
                prompt = length(130, 0.9, 8, 500)
                sizes = prompt, *(length(260, 0.75, 5, 1000 - prompt) for _ in range(2))
                self.lengths.append(sizes)
                texts = (" ".join(rng.choices(self.words, k=n)) for n in sizes)
                file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts))) + "\n")

    def shape(self, name):
        """transformers config of a shape in tools/fit.py; "Zephyr-7B:8" has 8 of its layers."""
        import transformers

        from tools.fit import SHAPES
        name, _, layers = name.partition(":")
        keys = TINY if self.small else SHAPES[name] | ({"num_hidden_layers": int(layers)} if layers else {})
        return transformers.LlamaConfig(max_position_embeddings=2048, pad_token_id=0, bos_token_id=2, eos_token_id=3, **keys)

    def model(self, name):
        """Folder of a model of this shape with random weights in bf16; they are drawn on the card, which is quicker."""
        import torch
        import transformers
        from tokenizers import Tokenizer, models, pre_tokenizers
        transformers.utils.logging.disable_progress_bar()
        folder = self.folder / name.replace(":", "-")
        with self.lock:
            if not (folder / "tokenizer.json").exists():
                words = ["<pad>", "<unk>", "<s>", "</s>", *self.words]
                tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
                tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
                torch.manual_seed(0)
                with torch.device("cuda" if self.cuda else "cpu"):
                    lm = transformers.AutoModelForCausalLM.from_config(self.shape(name), dtype=torch.bfloat16)
                lm.save_pretrained(folder)
                del lm
                torch.cuda.empty_cache()  # what this process holds is missing to the runs
                transformers.PreTrainedTokenizerFast(
                    tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                    ).save_pretrained(folder)
        return folder

    def train(self, name, shape, steps, until=None, stop=signal.SIGKILL, worker=None, timeout=200, **keys):
        """Run train.py on a model of this shape. Called again with the same name, it goes on where the run was.

        until: function of (output folder, rows so far); once it says True, the process gets the signal `stop`.
        worker: a function of this file that runs instead of train.py.  keys: of the config, beside the usual ones.
        """
        config = self.config(name, shape, steps, **keys)
        command = ["benchmarks/gpu.py", "--work", worker] if worker else ["train.py", "--config"]
        return self.process([*command, str(config)], config.with_suffix(""), until, stop, timeout)

    def config(self, name, shape, steps, **keys):
        """The file of a config for these steps on a model of this shape.  keys: of the config, beside the usual ones."""
        output = self.folder / "runs" / name
        output.parent.mkdir(exist_ok=True)
        config = output.with_suffix(".yaml")
        steps = self.steps(steps)
        config.write_text(json.dumps({  # JSON is YAML
            "model_name_or_path": str(self.model(shape)), "dataset_mixer": {str(self.pairs): 1.0},
            "dataset_splits": ["train"], "do_eval": False, "max_length": 1024, "max_prompt_length": 512, "bf16": True,
            "beta": 0.1, "gamma": 1.3, "learning_rate": 1e-6, "per_device_train_batch_size": 16 if self.small else 64,
            "micro_batch_tokens": 16384, "max_steps": steps, "logging_steps": max(1, steps // 6), "eval_strategy": "no",
            "save_strategy": "no", "output_dir": str(output)} | keys))
        return config

    def process(self, command, output, until=None, stop=signal.SIGKILL, timeout=200):
        """Run a Python command in the repository's root, and read what it leaves in `output`."""
        started, printed, error_at = time.time(), output.with_suffix(".out"), None
        deadline = started + max(20, min(timeout, self.left() + 30))
        with open(printed, "wb") as file:
            process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=self.environment, stdout=file,
                                       stderr=subprocess.STDOUT)
        self.running.append(process)
        while process.poll() is None:
            if not error_at and re.search(rb"(^|[\r\n])error: ", printed.read_bytes()):
                error_at = time.time()
            if until and until(output, read_rows(output)):
                process.send_signal(stop)
                until = None
            if time.time() > deadline:
                process.kill()
            time.sleep(0.02)
        ended, late = time.time(), "\nkilled by benchmarks/gpu.py: it took too long" if time.time() > deadline else ""
        lines = printed.read_text(errors="replace").replace("\r\n", "\n").split("\n")
        log = "\n".join(line.rpartition("\r")[2] for line in lines) + late  # of a progress bar, only how it ended
        with self.lock, open(self.output / "gpu.log", "a", encoding="utf-8") as file:
            file.write(f"\n===== {' '.join(map(str, command))}: exit {process.returncode}, {ended - started:.0f} s\n")
            file.write(log[-20000:])
        summary = output / "summary.json"
        return Ran(process.returncode, log, read_rows(output), json.loads(summary.read_text()) if summary.exists() else {},
                   ended - started, ended - (error_at or ended), output)

    def end(self, number, frame):
        """On Ctrl-C or SIGTERM: end at once, with what runs; it would go on, and slow down whatever uses the card next."""
        for process in self.running:
            process.kill()
        os._exit(128 + number)

    def once(self, name, *arguments, **keys):
        """`train`, or its result if a run of this name is done already."""
        with self.lock:
            lock = self.done.setdefault(name, [threading.Lock(), None])
        with lock[0]:
            lock[1] = lock[1] or self.train(name, *arguments, **keys)
            return lock[1]

    def matrix_rate(self):
        """FLOP/s of a bf16 product of two random 8192 × 8192 matrices."""
        import torch
        from torch.utils.benchmark import Timer
        if self.rate is None:
            n, device = (8192, "cuda") if self.cuda else (512, "cpu")
            a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
            best = min(Timer("a @ b", globals={"a": a, "b": b}).timeit(10).mean for _ in range(4))  # waits for the device
            self.rate = 2 * n**3 / best
            del a, b
            torch.cuda.empty_cache()
        return self.rate


def read_rows(output):
    with contextlib.suppress(OSError, ValueError):  # not there yet, or half a line
        rows = map(json.loads, (output / "metrics.jsonl").read_text().splitlines())
        return [row for row in rows if row["split"] == "train"]
    return []


# ----------------------------------------------------------------------------------------------------------------------
# The checks: each yields lines of text, and verdicts as (passed, text); passed is None where there is no aim, or no card

def environment(bench):
    import torch
    yield (f"{bench.card()}; {os.cpu_count()} CPU cores; Python {platform.python_version()}; CUDA {torch.version.cuda}, "
           f"cuDNN {torch.backends.cudnn.version()}")
    names = "torch", "transformers", "tokenizers", "datasets", "deepspeed", "accelerate", "peft", "trl"
    yield ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if importlib.util.find_spec(name))
    yield bench.cuda or None, f"a large bf16 product runs at {bench.matrix_rate() / 1e12:,.3g} TFLOP/s"


def smollm2(bench):
    """As a user would start it."""
    ran, steps = bench.once("smollm2", "SmolLM2-135M", 30), bench.steps(30)
    yield ran.code == 0, "the check at the start passed and the run ended" if ran.code == 0 else ran.why()
    if not ran.rows:
        return
    skipped = ran.log.count("so the step is not taken")
    yield skipped == 0 and ran.rows[-1]["step"] == steps, f"{steps} steps, {skipped} of them skipped"
    margin, loss = ran.rows[0]["rewards/margins"], ran.rows[0]["loss"]
    yield margin == 0.0 and abs(loss - math.log(2)) < 1e-6, f"(8) step 1: margin {margin}, loss {loss:.7f}"
    if ran.summary:
        peak, fit = ran.summary["peak_memory_bytes"], fitted(bench, "SmolLM2-135M", 16384, False)
        yield abs(fit / peak - 1) <= 0.2 if bench.cuda else None, (
            f"peak memory {peak / 1e9:.1f} GB; tools/fit.py says {fit / 1e9:.1f} GB, {fit / peak - 1:+.0%}")


def fitted(bench, shape, tokens, checkpointing):
    """Bytes by tools/fit.py."""
    from tools.fit import rank_memory
    return sum(rank_memory(bench.shape(shape), tokens=tokens, checkpointing=checkpointing).values())


# name: (shape, least share of the card's rate, [(title, keys of the config)])
FULL = {"gradient_checkpointing": True, "per_device_train_batch_size": 32}
ADAPTER = {"use_peft": True, "lora_target_modules": ["all-linear"]}
RATES = {
    "135M": ("SmolLM2-135M", 0.30, [
        ("16,384 tokens, as shipped", {}),
        ("16,384 tokens, compiled", {"torch_compile": True}),
        ("98,304 tokens, compiled, 192 pairs a step",
         {"micro_batch_tokens": 98304, "torch_compile": True, "per_device_train_batch_size": 192})]),
    "1B": ("Llama-3.2-1B", None, [
        ("16,384 tokens, compiled", {"torch_compile": True}),
        ("16,384 tokens", {}),
        ("32,768 tokens, checkpointing", {"micro_batch_tokens": 32768, "gradient_checkpointing": True})]),
    "7B": ("Zephyr-7B:8", 0.40, [
        ("8 of the 32 layers, all weights, 16,384 tokens, checkpointing", FULL)]),
    "7B-compiled": ("Zephyr-7B:8", 0.40, [("8 of the 32 layers, as in 7B, compiled", FULL | {"torch_compile": True})]),
    "LoRA": ("Zephyr-7B", 0.40, [
        ("adapter on all linear layers, 16,384 tokens, checkpointing", FULL | ADAPTER),
        ("8,192 tokens, without checkpointing",
         FULL | ADAPTER | {"gradient_checkpointing": False, "micro_batch_tokens": 8192})])}


def measured(bench, name):
    """[(title, keys, rows of metrics.jsonl, peak memory in bytes)] of the runs of RATES[name], in one process. The rows are
    those of steps 1, 8 and 16. Where a run failed or there was no time, some are missing, and the peak is 0."""
    shape, _, runs = RATES[name]
    if name not in bench.done:
        jobs = []
        for n, (_, keys) in enumerate(runs):
            config = bench.config(f"rates-{name}-{n}", shape, 16, max_steps=16, logging_steps=8, **keys)
            jobs.append({"config": str(config), "peak": str(config.with_suffix(".peak"))})
        path = bench.folder / "runs" / f"rates-{name}.json"
        path.write_text(json.dumps(jobs))
        bench.process(["benchmarks/gpu.py", "--work", "rates", str(path)], path.with_suffix(""),
                      timeout=min(200, bench.left()))
        bench.done[name] = []
        for job, (title, keys) in zip(jobs, runs):
            peak = Path(job["peak"])
            rows = read_rows(Path(job["config"]).with_suffix(""))
            bench.done[name].append((title, keys, rows, int(peak.read_text()) if peak.exists() else 0))
    return bench.done[name]


def rates(bench, name):
    """A table of speeds, one run a line."""
    from speed import unique_flops
    shape, aim, _ = RATES[name]
    two_rows = [(0, prompt + first, prompt + second) for prompt, first, second in bench.lengths]
    best, failed, margins = 0.0, [], []
    yield RATES_HEAD
    for title, keys, rows, peak in measured(bench, name):
        margins += [row["rewards/margins"] for row in rows[:1]]
        if not peak:  # how far it came counts all the same
            failed.append(title)
            cold, warm = ([f"{row['tokens_per_second']:,.0f}" for row in rows[1:]] + ["", ""])[:2]
            yield f"| {title} | {cold} | {warm} | | | | | {margins[-1] if rows else ''} |"
            continue
        cold, warm = (row["tokens_per_second"] for row in rows[1:])
        (once, tokens), (twice, _) = (unique_flops(bench.shape(shape), pairs, 4 if "use_peft" in keys else 6)
                                      for pairs in (bench.lengths, two_rows))
        share = warm / tokens / bench.matrix_rate()
        best = max(best, share * once)
        fit = fitted(bench, shape, keys.get("micro_batch_tokens", 16384), keys.get("gradient_checkpointing", False))
        yield (f"| {title} | {cold:,.0f} | {warm:,.0f} | {share * once:.3f} | {share * twice:.3f} | {peak / 1e9:.1f} | "
               f"{'' if 'use_peft' in keys else f'{fit / 1e9:.1f}'} | {margins[-1]} |")
    if failed:
        yield False, f"failed, or no time was left: {', '.join(failed)}: see gpu.log"
    if margins:
        yield all(margin == 0 for margin in margins), "(8) the margin of step 1 is 0" + " in each run" * (len(margins) > 1)
    if best and aim:
        yield best >= aim if bench.cuda else None, f"the best share of the card's rate is {best:.3f} (aim: {aim:.2f})"


def profile(bench):
    """Two steps of the fastest run of SmolLM2's shape under torch.profiler, which slows the host down."""
    _, _, runs = RATES["135M"]
    title, keys = runs[-1]
    ran = bench.train("profile", "SmolLM2-135M", 12, worker="profile", **keys | {"torch_compile": bench.cuda})
    found = ran.output.with_suffix(".profile")
    if ran.code or not found.exists():
        return (yield False, ran.why())
    found = json.loads(found.read_text())
    yield (f"{title}: in {found['seconds']:.2f} s the card was busy for {sum(found['kernels'].values()):.2f} s, with "
           f"{found['count']:,} kernels.")
    for what, column in (("It was busy with", "kernels"), ("It was idle while the host was in", "idle")):
        yield f"{what}:"
        yield "| | seconds |\n| --- | --: |"
        for name, seconds in sorted(found[column].items(), key=lambda item: -item[1]):
            yield f"| {name} | {seconds:.3f} |"
    yield None, "where the time goes"


def waits(bench):
    ran = bench.train("waits", "SmolLM2-135M", 6, worker="waits")
    found = ran.output.with_suffix(".json")
    if ran.code or not found.exists():
        return (yield False, ran.why())
    found = json.loads(found.read_text())
    for where, count in (("micro", found["micro_steps"]), ("step", found["steps"])):
        yield f"In {'a micro-step' if where == 'micro' else 'the rest of an optimiser step'}, {count} of them counted:"
        yield "| waits in each | where |\n| --: | --- |"
        for place, n in sorted(found[where].items(), key=lambda item: -item[1]):
            yield f"| {n / max(count, 1):.2f} | {place} |"
    each = sum(found["micro"].values()) / max(found["micro_steps"], 1)
    yield each <= 1 if bench.cuda else None, f"{each:.2f} waits for the device a micro-step (aim: 1, the gate's)"


def errors(bench):
    if bench.cuda:  # the whole epoch in one micro-batch: hundreds of GB of activations
        ran = bench.train("oom", "SmolLM2-135M", 6, per_device_train_batch_size=512, micro_batch_tokens=10**7)
        yield from ends_at_once("out of memory", ran, "out of memory")
    else:
        yield None, "out of memory: needs CUDA, skipped"
    # Weights of 1e12 after the first step: the margins of the second are not numbers.
    ran = bench.train("error", "SmolLM2-135M", 6, learning_rate=1e12, warmup_ratio=0)
    yield from ends_at_once("error inside a step", ran, "finite number")


def ends_at_once(what, ran, words):
    """Verdict on a run that has to end with exit code 1 and one line that holds these words."""
    lines = [line for line in ran.log.splitlines() if line.startswith("error: ")]
    if ran.code != 1 or len(lines) != 1 or words not in lines[0] or "Traceback" in ran.log:
        return (yield False, f"{what}: {ran.why()}")
    yield ran.gone_after < 10, f"{what}: one line, gone {ran.gone_after:.1f} s after it, exit 1: `{lines[0][:160]}`"


# Small micro-batches, so that several of these runs fit on the card at once; a learning rate that moves the weights.
EXACT = dict(learning_rate=1e-4, logging_steps=1, num_threads=4, micro_batch_tokens=4096)


def uninterrupted(bench, **keys):
    return bench.once(f"uninterrupted{'-deterministic' if keys else ''}", "SmolLM2-135M", 12, **EXACT, **keys)


def killed(bench, **keys):
    """kill -9 after a checkpoint, resume, and compare with a run that nobody killed."""
    whole, half = uninterrupted(bench, **keys), bench.steps(12) // 2
    settings = EXACT | keys | {"save_strategy": "steps", "save_steps": half}
    name = f"killed{'-deterministic' if keys else ''}"
    first = bench.train(name, "SmolLM2-135M", 12, **settings,
                        until=lambda output, _: (output / f"checkpoint-{half}").exists())
    second = bench.train(name, "SmolLM2-135M", 12, **settings)
    if whole.code or second.code or first.code != -signal.SIGKILL:
        return (yield False, f"runs ended with {whole.code}, {first.code} (killed) and {second.code}: {second.why()}")
    yield f"at step {half} of " in second.log, f"killed at step {first.rows[-1]['step']}, resumed from step {half}"
    same = [a["loss"] == b["loss"] for a, b in zip(whole.rows, second.rows)]
    apart = f"; losses differ from step {same.index(False) + 1} on" if False in same else ""
    different, largest, _ = compare(whole.output, second.output)
    text = f"{different} of the weights' tensors differ, by at most {largest:.2g}{apart}"
    yield different == 0 if keys or not bench.cuda else None, f"{'deterministic' if keys else 'plain'}: {text}"


def compare(one, other, start=None):
    """(tensors that differ, largest difference, distance between the models as a share of the way from `start`)."""
    from safetensors.torch import load_file
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    gaps = {name: (one[name].float() - other[name].float()) for name in one}
    share = None
    if start:
        start = load_file(start / "model.safetensors")
        way = sum((one[name].float() - start[name].float()).square().sum() for name in one)
        share = math.sqrt(sum(gap.square().sum() for gap in gaps.values()) / way)
    return sum(bool(gap.any()) for gap in gaps.values()), max(gap.abs().max().item() for gap in gaps.values()), share


def zero3(bench):
    whole, steps = uninterrupted(bench), bench.steps(12)
    first = bench.train("zero3", "SmolLM2-135M", 12, **EXACT, deepspeed="configs/zero3.json", stop=signal.SIGINT,
                        until=lambda output, rows: rows and rows[-1]["step"] >= steps // 2)
    if first.code != 75 or ", ZeRO 3" not in first.log:
        return (yield False, f"under ZeRO-3: {first.why()}")
    yield True, "ZeRO-3 by itself trains, and stops at Ctrl-C with a checkpoint"
    second = bench.train("zero3", "SmolLM2-135M", 12, **EXACT, deepspeed="ds_config.json")
    resumed = re.search(r"resumed from \S+ at step (\d+)", second.log)
    if second.code or not resumed or whole.code:
        return (yield False, f"under ZeRO-2: {second.why()}")
    # One process alone runs ZeRO-2 as ZeRO-1.
    yield ", ZeRO 1" in second.log, f"loaded under ZeRO-2 at step {resumed[1]}, trained to step {steps}"
    gap = max(abs(a["loss"] - b["loss"]) for a, b in zip(whole.rows, second.rows))
    share = compare(whole.output, second.output, bench.model("SmolLM2-135M"))[2]
    yield gap < 0.02 and share < 0.2, (
        f"compared with ZeRO-2 throughout: losses within {gap:.2g}; the final weights are {share:.3f} of the way apart that "
        "training moved them (aim: under 0.2)")


def quickstart(bench):
    output = bench.folder / "runs" / "quickstart"
    ran = bench.process(["train.py", "--config", "configs/quickstart.yaml", "--output_dir", str(output), "--toy_dir",
                         str(bench.folder / "toy"), *(["--max_steps=8"] if bench.small else [])], output, timeout=170)
    if ran.code:
        return (yield False, f"{ran.why()} ({ran.seconds:.0f} s)")
    accuracy = ran.summary["eval_accuracy"]
    yield None if bench.small else accuracy >= 0.91, (
        f"{ran.seconds:.0f} s, {ran.summary['query_fraction']:.0%} of the labels bought, held-out accuracy {accuracy:.3f} "
        "(aim: 0.91; on six base models a CPU had 0.918 to 0.947)")


def attention(bench):
    """Scaled dot-product attention with our kind of mask: what a new shape costs, and whether gradients are finite."""
    import torch
    if not bench.cuda:
        return (yield None, "needs CUDA: skipped")

    def once(T, value=None):
        """(seconds of forward and backward, whether all gradients are finite); value: every score's, before scaling."""
        q, k, v = (torch.randn(8, 9, T, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
        if value is not None:
            q, k = torch.full_like(q, value), torch.full_like(k, -value)
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        lowest = torch.finfo(torch.bfloat16).min
        mask = torch.full((8, 1, T, T), lowest, device="cuda", dtype=torch.bfloat16).triu(1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).float().square().sum().backward()
        torch.cuda.synchronize()
        return time.perf_counter() - start, all(bool(x.grad.isfinite().all()) for x in (q, k, v))
    yield "| cuDNN's attention | a new shape, ms | the same shape again, ms | gradients finite | at log-sum-exp −512 |"
    yield "| --- | --: | --: | --- | --- |"
    before = torch.backends.cuda.cudnn_sdp_enabled()
    for cudnn in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        once(256)  # what is set up once, whatever the shape
        found = [once(T) + once(T) for T in (448, 500, 640, 777, 832, 960)]
        low = once(448, value=8.0)[1]
        new, again = (sorted(row[i] for row in found)[len(found) // 2] * 1e3 for i in (0, 2))
        finite = all(row[1] and row[3] for row in found)
        yield f"| {'on' if cudnn else 'off, as runtime/launch.py sets it'} | {new:.1f} | {again:.2f} | {finite} | {low} |"
        if not cudnn:
            verdict = finite and low and new < 20
    torch.backends.cuda.enable_cudnn_sdp(before)
    torch.cuda.empty_cache()
    yield verdict, "off: gradients are finite, and a new shape costs less than 20 ms"


def rows_attention(bench):
    """adpo.pair_attention, whose kernel torch has for GPUs alone, against attention with a mask in fp32."""
    import torch

    import adpo
    if not bench.cuda:
        return (yield None, "needs CUDA: skipped")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as runtime/launch.py sets it
    lengths = bench.lengths[:24]
    segments = torch.full((len(lengths), max(map(sum, lengths))), -1)  # (B, T)
    for row, (prompt, first, second) in zip(segments, lengths):
        row[:prompt + first + second] = torch.tensor([0] * prompt + [1] * first + [2] * second)
    segments = segments.cuda()
    real = (segments >= 0)[..., None, None]  # (B, T, 1, 1)
    rows = adpo.two_rows(segments, sum(prompt for prompt, *_ in lengths))

    def found(q, k, v, weights, mask=None):
        """Attention's output and the gradients of q, k and v, without a mask or with this one, in its dtype."""
        q, k, v = (x.to(x.dtype if mask is None else mask.dtype).detach().requires_grad_() for x in (q, k, v))
        if mask is None:
            out = adpo.pair_attention(q, k, v, *rows, None)
        else:
            k_all, v_all = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
            out = torch.nn.functional.scaled_dot_product_attention(q, k_all, v_all, mask).transpose(1, 2)
        return [out.detach() * real, *torch.autograd.grad((out.float() * weights).sum(), (q, k, v))]
    passed = True
    yield "| heads, of keys, size | relative error of output, ∂q, ∂k, ∂v | with a mask in bf16 | deterministic: same bits |"
    yield "| --- | --- | --- | --- |"
    masks = [adpo.attention_mask(segments, segments, dtype) for dtype in (torch.float32, torch.bfloat16)]
    for heads, kv, size in ((9, 3, 64), (32, 8, 128), (8, 8, 20), (8, 1, 256)):
        q, k, v = (torch.randn(*segments.shape, n, size).cuda().bfloat16().transpose(1, 2) for n in (heads, kv, kv))
        weights = torch.randn(*segments.shape, heads, size).cuda() * real
        exact, masked = (found(q, k, v, weights, mask) for mask in masks)
        torch.use_deterministic_algorithms(True)
        ours, again = (found(q, k, v, weights) for _ in range(2))
        torch.use_deterministic_algorithms(False)
        errors, least = ([float((x.float() - y).norm() / y.norm()) for x, y in zip(some, exact)] for some in (ours, masked))
        same = all(map(torch.equal, ours, again))
        passed &= same and all(error < 2 * other for error, other in zip(errors, least))
        numbers = (", ".join(f"{error:.4f}" for error in some) for some in (errors, least))
        yield f"| {heads}, {kv}, {size} | {' | '.join(numbers)} | {same} |"
    torch.cuda.empty_cache()
    yield passed, "as near to fp32 as a mask in bf16 is, and with deterministic kernels the same to the last bit"


def trl(bench):
    if not all(importlib.util.find_spec(name) for name in ("trl", "accelerate", "datasets")):
        return (yield None, "TRL is not installed: skipped")
    folder, ours = bench.folder / "runs" / "trl", [run for run in measured(bench, "135M") if run[3]]
    if not ours:
        return (yield False, "train.py: failed, or no time was left: see gpu.log")
    job = {"model": str(bench.model("SmolLM2-135M")), "pairs": str(bench.pairs), "output": str(folder), "reference": None,
           "bf16": True, "checkpointing": False, "precompute": True, "threads": max(1, os.cpu_count() // 2)}
    folder.with_suffix(".json").write_text(json.dumps(job))
    ran = bench.process(["benchmarks/gpu.py", "--work", "trl", str(folder.with_suffix(".json"))], folder)
    found = [json.loads(line[4:]) for line in ran.log.splitlines() if line.startswith("TRL ")]
    if not found:
        return (yield False, f"TRL: {ran.why()}")
    best = max(found, key=lambda row: row["warm"])
    ratios = []  # (times TRL's speed, share of its memory, title) of each of our runs
    yield "| | tokens/s, steps 2 to 8 | later | peak GB |\n| --- | --: | --: | --: |"
    for title, _, rows, peak in ours:
        cold, warm = (row["tokens_per_second"] for row in rows[1:])
        ratios.append((warm / best["warm"], peak / best["memory"], title))
        yield f"| train.py, {title} | {cold:,.0f} | {warm:,.0f} | {peak / 1e9:.1f} |"
    for row in found:
        yield "| TRL, {title} | {cold:,.0f} | {warm:,.0f} | {gb:.1f} |".format(**row, gb=row["memory"] / 1e9)
    passed = any(speed >= 2 and memory <= 0.5 for speed, memory, _ in ratios)
    yield passed if bench.cuda else None, (
        "next to TRL's faster setting (aim: 2.0 times its tokens a second at 0.5 of its memory): "
        + "; ".join(f"{title}: {speed:.2f} times at {memory:.2f}" for speed, memory, title in ratios))


# ----------------------------------------------------------------------------------------------------------------------
# What runs in a process of its own instead of train.py

def count_waits(path):
    """Run train.py's main, and count by place what waits for the device, from the third step on.

    Two kinds: what torch.cuda.set_sync_debug_mode reports (.item(), .cpu(), copies from memory that is not pinned, …), and
    calls of torch.cuda.synchronize and of an event's or a stream's synchronize. A micro-step is the loop's body up to
    Run.add; the boundary's engine.step and all that follows until the next step are the optimiser step's.
    """
    import warnings

    import deepspeed
    import torch

    import train
    from runtime.launch import command
    from runtime.run import Run
    found = {"micro": collections.Counter(), "step": collections.Counter(), "micro_steps": 0, "steps": 0}
    state = {"where": None}

    def count(*_, **__):
        if state["where"]:
            frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
            ours = [f for f in frames if f.filename.startswith(str(ROOT)) and "site-packages" not in f.filename] or frames
            place = f"{os.path.relpath(ours[-1].filename, ROOT)}:{ours[-1].lineno} `{ours[-1].line}`"
            engine = [f for f in frames if f"{os.sep}deepspeed{os.sep}" in f.filename][-1:]
            place += "".join(f", in DeepSpeed's {Path(f.filename).name}:{f.lineno} `{f.line}`" for f in engine)
            found[state["where"]][place.replace("|", "/")] += 1

    def counted(owner, name):
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            count()
            return function(*args, **kwargs)
        setattr(owner, name, wrapper)

    def steps(run, original=Run.steps):
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("warn")
        for step in original(run):
            state["where"] = "micro" if step >= 2 else None
            yield step
        state["where"] = None  # what follows is not counted

    def add(run, sums, original=Run.add):
        found["micro_steps"] += state["where"] == "micro"
        return original(run, sums)

    def end_step(run, *args, original=Run.end_step, **kwargs):
        if state["where"]:
            state["where"], found["steps"] = "step", found["steps"] + 1
        return original(run, *args, **kwargs)

    def engine_step(engine, *args, original=deepspeed.runtime.engine.DeepSpeedEngine.step, **kwargs):
        before = state["where"]
        if before and engine.is_gradient_accumulation_boundary():
            state["where"] = "step"
        result = original(engine, *args, **kwargs)
        state["where"] = before
        return result
    Run.steps, Run.add, Run.end_step = steps, add, end_step
    deepspeed.runtime.engine.DeepSpeedEngine.step = engine_step
    for owner in (torch.cuda, torch.cuda.Event, torch.cuda.Stream):
        counted(owner, "synchronize")
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_, **__: count() if "synchroniz" in str(message) else None
    code = command(["--config", path], train.main)
    Path(path).with_suffix(".json").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(code)


# What a kernel does, by words of its name; the first that fits counts.
KERNELS = {"compiled element-wise work": "^triton", "attention": "flash|fmha|attention",
           "matrix products": "nvjet|gemm|cutlass|gemv|splitK", "gathers and scatters": "index|scatter",
           "copies": "memcpy|memset|copy", "everything else": ""}


def profile_run(path):
    """Run train.py's main, two steps of it under torch.profiler, and write what the card did and where it waited."""
    import deepspeed
    import torch

    import train
    from runtime.launch import command
    from runtime.run import Run
    engine = deepspeed.runtime.engine.DeepSpeedEngine
    names = {f"{owner.__name__}.{name}": (owner, name)
             for owner, name in ((engine, "forward"), (engine, "backward"), (engine, "step"), (train.data.Pairs, "batch"))}
    for label, (owner, name) in names.items():
        def ranged(*args, function=getattr(owner, name), label=label, **kwargs):
            with torch.profiler.record_function(label):
                return function(*args, **kwargs)
        setattr(owner, name, ranged)
    profiler = torch.profiler.profile()

    def steps(run, original=Run.steps):
        total = run.total_steps
        for step in original(run):
            if step in (total - 3, total - 1) and torch.cuda.is_available():
                torch.cuda.synchronize()
            if step == total - 3:
                profiler.start()
            elif step == total - 1:
                profiler.stop()
            yield step
    Run.steps = steps
    Run.finish = lambda run, engine, tokenizer, summary: engine.destroy()
    code = command(["--config", path], train.main)
    events = [(event, event.time_range.start / 1e6, event.time_range.end / 1e6) for event in profiler.events()]
    on_card, on_host = [], []
    for event, start, end in events:
        if event.name in names:
            if event.device_type == torch.autograd.DeviceType.CPU:
                on_host.append((event.name, start, end))
        elif event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation:
            on_card.append((event.name, start, end))
    begin, end = min(start for _, start, _ in events), max(end for _, _, end in events)
    found = {"seconds": end - begin, "count": len(on_card), "kernels": collections.Counter(), "idle": collections.Counter()}
    gaps, last = [], begin
    for name, start, stop in sorted(on_card, key=lambda kernel: kernel[1]):  # one stream does the work of one process
        group = next(group for group, words in KERNELS.items() if re.search(words, name, re.IGNORECASE))
        found["kernels"][group] += max(0, stop - max(start, last))
        gaps.append((last, start))
        last = max(last, stop)
    for start, stop in [*gaps, (last, end)]:
        rest = max(0, stop - start)
        for name, begun, ended in on_host:
            shared = max(0, min(stop, ended) - max(start, begun))
            found["idle"][name] += shared
            rest -= shared
        found["idle"]["the rest of the loop"] += max(0, rest)
    Path(path).with_suffix(".profile").write_text(json.dumps(found))
    sys.stdout.flush()
    os._exit(code)


def time_runs(path):
    """Run train.py's main for each of these configs, one after the other, without saving a model."""
    import gc

    import torch

    import train
    from runtime.launch import command
    from runtime.ranks import peak_memory
    from runtime.run import Run
    peaks = []

    def finish(run, engine, tokenizer, summary):
        peaks.append(peak_memory(engine.device))
        engine.destroy()
    Run.finish = finish
    for job in json.loads(Path(path).read_text()):
        torch.compiler.reset()
        if command(["--config", job["config"]], train.main) == 0:
            Path(job["peak"]).write_text(str(peaks[-1]))
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()


def trl_speed(path):
    """benchmarks/speed.py's run of TRL on one epoch of the pairs, at two sizes of a step; prints a line of JSON for each.

    TRL trains fp32 weights under bf16 autocast, which is its counterpart of our bf16 weights with an fp32 copy in the
    optimiser. Its steps are micro-batches: an optimiser's step of this model takes about a millisecond. By default torch
    takes cuDNN's attention; TRL is also measured without it, as train.py always is, and compared by its faster setting.
    """
    import speed
    import torch
    job = json.loads(Path(path).read_text())
    for job["micro"], cudnn in ((32, False), (32, True), (8, False)):
        title = f"{job['micro']} pairs a step" + ", cuDNN's attention" * cudnn
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        try:
            found = speed.trl(job)
        except torch.OutOfMemoryError:
            print(f"{title}: out of memory", flush=True)
            continue
        steps = list(zip(found["speeds"], found["seconds"]))
        cold, warm = (sum(s * t for s, t in part) / sum(t for _, t in part)  # tokens by seconds, as metrics.jsonl has them
                      for part in (steps[1:8], steps[-(-len(steps) * 2 // 3):]))
        print("TRL " + json.dumps({"title": title, "cold": cold, "warm": warm, "memory": found["memory"]}), flush=True)


# ----------------------------------------------------------------------------------------------------------------------
# In which order, and how long each takes on an H100

# (numbers in issue order and names for --only, title, aim, seconds, function)
CHECKS = [
    ("1", "The machine", "a CUDA device, and what its matrix products reach", 5, environment),
    ("2 rows", "Attention without a mask", "what attention with a mask gives", 15, rows_attention),
    ("4 8", "SmolLM2-135M's shape in bf16, 30 steps",
     "starts, skips no step, step 1 has margin 0 and loss log 2 (0.6931472), memory within 20 % of tools/fit.py", 62,
     smollm2),
    ("6 135M", "Speed of SmolLM2-135M's shape", "0.30 of the card's matrix rate", 138, partial(rates, name="135M")),
    ("5", "Waits for the device", "one a micro-step", 31, waits),
    ("10", "Errors", "one line, and the process is gone within ten seconds", 50, errors),
    # These measure no speed, so they run at the same time.
    [("9 plain", "kill -9 and resume", "the same weights, on a CPU to the last bit", 170, killed),
     ("9 deterministic", "kill -9 and resume with deterministic: true", "the same weights to the last bit", 181,
      partial(killed, deterministic=True)),
     ("11", "ZeRO-3 alone, loaded under ZeRO-2", "stops, resumes, trains on as ZeRO-2 does", 212, zero3),
     ("3", "Quickstart", "ends with a held-out accuracy of 0.91", 123, quickstart)],
    # Each of the checks of large models writes 3 to 14 GB of weights first. Several runs are one after the other in one
    # process, so a check that is short of time still has its first ones.
    ("6 7B", "Speed of a 7B model's layers", "0.40 of the card's matrix rate", 45, partial(rates, name="7B")),
    ("7", "TRL on the same pairs", "2.0 times its tokens a second at 0.5 of its peak memory", 80, trl),
    ("6 7B-compiled", "Speed of a 7B model's layers, compiled", "0.40 of the card's matrix rate", 90,
     partial(rates, name="7B-compiled")),
    ("6 LoRA", "Speed of a 7B model with an adapter", "0.40 of the card's matrix rate", 220, partial(rates, name="LoRA")),
    ("2", "Attention with a mask", "finite gradients, and no plan to build for each new shape", 15, attention),
    ("6 1B", "Speed of Llama-3.2-1B's shape", "none", 70, partial(rates, name="1B")),
    ("6 profile", "Where the time goes", "none", 60, profile)]


def groups():
    """CHECKS, each in a list with those that run beside it."""
    return [group if isinstance(group, list) else [group] for group in CHECKS]


def perform(bench, check, say):
    """Run a check and say what it finds. Returns [(numbers, verdict, text)]."""
    numbers, title, aim, _, function = check
    say(f"\n## {numbers}. {title}\n\nAim: {aim}.")
    started, verdicts, in_table = time.time(), [], False
    try:
        for line in function(bench):
            if not isinstance(line, str):
                verdicts.append((numbers, *line))
                line = f"**{VERDICTS[line[0]]}**: {line[1]}"
            say(line if in_table and line.startswith("|") else f"\n{line}")
            in_table = line.startswith("|")
    except Exception as error:  # of the check itself; the others still count
        traceback.print_exc()
        verdicts.append((numbers, False, f"the check broke: {type(error).__name__}: {' '.join(str(error).split())[:300]}"))
        say(f"\n**FAIL**: {verdicts[-1][-1]}")
    say(f"\n{time.time() - started:.0f} s; {bench.options.limit - bench.left():.0f} s since the start.")
    return verdicts


def perform_together(bench, group):
    """Run checks at the same time (one after the other in a rehearsal), each written as a whole when it ends."""
    def one(check):
        lines = []
        verdicts = perform(bench, check, lines.append)
        bench.say("\n".join(lines))
        return verdicts
    with ThreadPoolExecutor(1 if bench.small else len(group)) as pool:
        return [verdict for verdicts in pool.map(one, group) for verdict in verdicts]


def main(options):
    bench = Bench(options)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, bench.end)
    bench.say(f"# What a GPU shows: {bench.card()}\n\n`python benchmarks/gpu.py {' '.join(sys.argv[1:])}`, "
              f"{time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC; {bench.options.limit - bench.left():.0f} s to start.")
    verdicts = []
    for group in groups():
        group = [check for check in group if not options.only or set(check[0].split()) & set(options.only)]
        late = [check for check in group if check[3] > bench.left()]
        for numbers, title, *_ in late:
            bench.say(f"\n## {numbers}. {title}\n\nNo time left.")
            verdicts.append((numbers, None, NO_TIME))
        group = [check for check in group if check not in late]
        if len(group) == 1:
            verdicts += perform(bench, group[0], bench.say)
        elif group:
            verdicts += perform_together(bench, group)
        if (base := bench.done.get("smollm2")) and base[1] and base[1].code:
            bench.say("\nThe plain run failed, so nothing else would run: stopped. gpu.log has what it printed.")
            break
    bench.say("\n## All verdicts\n\n| check | verdict | |\n| --- | --- | --- |\n" + "\n".join(
        f"| {numbers} | {VERDICTS[passed]} | {text.replace('|', '/')} |" for numbers, passed, text in verdicts))
    if any(passed is False for _, passed, _ in verdicts):
        return 1
    return 0 if any(text != NO_TIME for *_, text in verdicts) else 2


def check_names(text):
    """The names of --only."""
    known = dict.fromkeys(name for group in groups() for check in group for name in check[0].split())
    for name in text.split(","):
        if name not in known:
            raise argparse.ArgumentTypeError(f"{name!r} is not a check; choose from {', '.join(known)}")
    return text.split(",")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        workers = {"waits": count_waits, "profile": profile_run, "rates": time_runs, "trl": trl_speed}
        sys.exit(workers[sys.argv[2]](sys.argv[3]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="CHECKS", type=check_names, default=[],
                        help="numbers or names, such as 1,4,6 or 135M,plain")
    parser.add_argument("--limit", type=float, default=540, metavar="SECONDS", help="default: 540")
    parser.add_argument("--output", metavar="FOLDER", default=os.environ.get("OUT") or ROOT / "outputs" / "gpu",
                        help="default: $OUT, or outputs/gpu")
    parser.add_argument("--small", action="store_true", help="tiny sizes, for a rehearsal on a CPU")
    sys.exit(main(parser.parse_args()))
