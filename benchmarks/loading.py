"""How long does a run take to reach its first step? Loads 60,000 pairs of UltraFeedback's length, and starts the quickstart.

    python benchmarks/loading.py MODEL_DIR                        text from the docstrings of the standard library
    python benchmarks/loading.py MODEL_DIR --text HH_FILE         text from a jsonl(.gz) of {"chosen", "rejected"} dialogues
    python benchmarks/loading.py MODEL_DIR --pairs N --outputs DIR --results FILE

MODEL_DIR: a folder with a tokenizer that has a chat template; it needs no weights. A pair is a user message of 40 to 280
tokens and two responses of 80 to 520 tokens, drawn uniformly. Real sentences, in a random order with a fixed seed, make up
the text, because the time to tokenise a text depends on what it says.

Every time is measured in a fresh process on two cores, first without any cache, then with the caches that the first process
left: load_pairs from its call to its return, and train.py from the command to its first row of metrics and its first step.

Writes benchmarks/results/loading.md. Exit code 0: every time is within its limit; 1: one is not; 2: it could not run.
"""

import argparse
import ast
import importlib.metadata
import json
import os
import platform
import random
import re
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
CORES = 2
PROMPT_TOKENS, RESPONSE_TOKENS = (40, 280), (80, 520)
MAX_PROMPT_LENGTH, MAX_LENGTH = 512, 1024
LIMITS = {"load": (60, 5), "start": (20, 20)}  # seconds: without caches, with them


class Stop(Exception):
    """The benchmark cannot run; the message says why. Exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Pairs to load

def docstrings():
    """The docstrings of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                yield ast.get_docstring(node) or ""


def dialogues(file):
    """The texts of an HH file, without the speakers' names."""
    from runtime.sources import read_file
    for _, row in read_file(Path(file)):
        yield from (re.sub(r"\n\n(Human|Assistant):", " ", row[side]) for side in ("chosen", "rejected"))


def write_pairs(path, texts, tokenizer, count):
    """Write `count` pairs as messages, put together from random sentences of the texts (with a fixed seed)."""
    sentences = sorted({s for text in texts for s in re.split(r"(?<=[.!?])\s+", text) if len(s.split()) > 3})
    lengths = [len(ids) for ids in tokenizer(sentences, add_special_tokens=False).input_ids]
    draw = random.Random(0)

    def text(tokens):
        out, wanted, n = [], draw.randint(*tokens), draw.randrange(len(sentences))
        while not out or wanted > lengths[n] / 2:  # stop where the length is nearest to the one drawn
            out.append(sentences[n])
            wanted, n = wanted - lengths[n], draw.randrange(len(sentences))
        return " ".join(out)

    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(count):
            prompt = text(PROMPT_TOKENS)
            sides = ([{"role": "user", "content": prompt}, {"role": "assistant", "content": text(RESPONSE_TOKENS)}]
                     for _ in range(2))
            file.write(json.dumps({"prompt": prompt} | dict(zip(("chosen", "rejected"), sides))) + "\n")


# ----------------------------------------------------------------------------------------------------------------------
# What is measured; `measure_load` runs in its own process

def measure_load(model_dir, source):
    """Print how long load_pairs takes and what it returns, as one line of JSON."""
    import transformers

    import data
    renderer = data.Renderer(transformers.AutoTokenizer.from_pretrained(model_dir), MAX_PROMPT_LENGTH, MAX_LENGTH)
    data.datasets.disable_progress_bars()
    start, before = time.time(), sum(os.times()[:4])
    pairs, _, _ = data.load_pairs({source: 1.0}, ["train"], renderer, "train", workers=CORES, say=lambda _: None)
    seconds, cpu = time.time() - start, sum(os.times()[:4]) - before
    memory = [resource.getrusage(who).ru_maxrss / 1024 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    rows = pairs.table.select(range(0, len(pairs), max(1, len(pairs) // 1000)))
    mean = {name: sum(map(len, rows[name][:])) / len(rows) for name in ("prompt_ids", "first_ids", "second_ids")}
    print(json.dumps({"seconds": seconds, "cpu": cpu, "memory": max(memory), "pairs": len(pairs),
                      "tokens": sum(pairs.lengths), "mean": mean, "fingerprint": pairs.fingerprint}))


def load(model_dir, source, env):
    """What measure_load prints, in a fresh process."""
    done = subprocess.run([sys.executable, __file__, model_dir, "--load", str(source)], env=env, capture_output=True,
                          text=True, cwd=ROOT)
    if done.returncode:
        raise Stop(f"load_pairs failed: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def start(toy_dir, output, env):
    """Seconds from the quickstart's command to its first row of metrics (step 0), and to the row of its first step."""
    shutil.rmtree(output, ignore_errors=True)
    output.mkdir(parents=True)
    command = [sys.executable, "train.py", "--config", "configs/quickstart.yaml", f"--toy_dir={toy_dir}",
               f"--output_dir={output / 'run'}", "--logging_first_step=true"]
    with open(output / "log.txt", "w", encoding="utf-8") as log:
        begin, times = time.time(), {}
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT)
        while len(times) < 2:
            if process.poll() is not None:
                raise Stop(f"{' '.join(command)} ended with exit code {process.returncode}; see {output / 'log.txt'}")
            time.sleep(0.02)
            metrics = output / "run" / "metrics.jsonl"
            rows = metrics.read_text().splitlines() if metrics.exists() else []
            for step in {json.loads(row)["step"] for row in rows} & {0, 1} - times.keys():
                times[step] = time.time() - begin
        process.terminate()
        process.wait()
    return times[0], times[1]


# ----------------------------------------------------------------------------------------------------------------------

def document(options, loads, starts, load_average):
    """(the results page, whether every time is within its limit)."""
    from trl_parity import cpu_name

    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in
                         ("torch", "transformers", "tokenizers", "datasets", "deepspeed"))
    times = {"load": [found["seconds"] for found in loads], "start": [first_step for _, first_step in starts]}
    held = all(seconds <= limit for what in LIMITS for seconds, limit in zip(times[what], LIMITS[what]))
    names = ["no cache", "second start"]
    table = [f"| load_pairs, {loads[0]['pairs']:,} pairs | {name} | {found['seconds']:.1f} | {limit} |"
             for name, found, limit in zip(names, loads, LIMITS["load"])]
    table += [f"| quickstart, from the command to its first step | {name} | {step:.1f} | {limit} |"
              for name, (_, step), limit in zip(names, starts, LIMITS["start"])]
    mean = loads[0]["mean"]
    text = "HH dialogues" if options.text else "docstrings of the standard library"
    return "\n".join([
        "# Loading and starting", "", "Made by", "",
        f"    python benchmarks/loading.py MODEL_DIR{' --text HH_FILE' if options.text else ''}", "",
        f"**Verdict: every time is {'' if held else 'NOT '}within its limit.**", "",
        "| what | caches | seconds | limit |", "| --- | --- | --: | --: |", *table, "",
        f"- {loads[0]['pairs']:,} pairs of messages made of sentences ({text}); on average the prompt has "
        f"{mean['prompt_ids']:.0f} tokens, those of the template included, and the responses {mean['first_ids']:.0f} and "
        f"{mean['second_ids']:.0f}; {loads[0]['tokens'] / 1e6:.1f} million tokens, or "
        f"{loads[0]['tokens'] / loads[0]['seconds'] / 1e3:,.0f} thousand per second",
        f"- load_pairs takes {loads[0]['cpu']:.0f} seconds of CPU time; its largest process needs {loads[0]['memory']:,.0f} "
        f"MB at its peak ({loads[1]['memory']:,.0f} MB at the second start)",
        f"- both starts read the same pairs (fingerprint {loads[0]['fingerprint']}): "
        f"{'yes' if loads[0]['fingerprint'] == loads[1]['fingerprint'] else 'NO'}",
        f"- quickstart: the task has been built before; the first row of metrics (step 0, held-out pairs) is written after "
        f"{starts[0][0]:.1f} and {starts[1][0]:.1f} seconds. Without a cache the run tokenises 16,384 pairs and computes "
        "their reference log-probs",
        f"- CPU: {cpu_name()}, {CORES} cores; Python {platform.python_version()}, {versions}",
        f"- load average before each measurement: {', '.join(f'{load:.1f}' for load in load_average)}", ""]), held


def main(options):
    import transformers
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:CORES])  # every process started here inherits it
    work = Path(options.outputs).resolve() / "loading"
    for cache in ("cache", "compiled"):
        shutil.rmtree(work / cache, ignore_errors=True)
    env = os.environ | {"HF_HOME": str(work / "cache"), "TORCH_EXTENSIONS_DIR": str(work / "compiled"),
                        "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    print("writing pairs and building the toy task", flush=True)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(options.model_dir)
    except (OSError, ValueError) as error:
        raise Stop(f"{options.model_dir}: no tokenizer there ({' '.join(str(error).split())})")
    write_pairs(work / "pairs" / "train.jsonl", dialogues(options.text) if options.text else docstrings(), tokenizer,
                options.pairs)
    subprocess.run([sys.executable, "-m", "runtime.toy", str(work / "toy"), "0.05"], cwd=ROOT, env=env, check=True,
                   stdout=subprocess.DEVNULL)
    loads, starts, load_average = [], [], []
    for name in ("no cache", "second start"):
        load_average.append(os.getloadavg()[0])
        loads.append(load(options.model_dir, work / "pairs", env))
        print(f"load_pairs, {name}: {loads[-1]['seconds']:.1f} s", flush=True)
    for name in ("no cache", "second start"):
        load_average.append(os.getloadavg()[0])
        starts.append(start(work / "toy", work / "quickstart", env))
        print(f"quickstart, {name}: first row after {starts[-1][0]:.1f} s, first step after {starts[-1][1]:.1f} s",
              flush=True)
    text, held = document(options, loads, starts, load_average)
    results = Path(options.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(text, encoding="utf-8")
    return 0 if held else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model_dir", metavar="MODEL_DIR", help="a folder with a tokenizer that has a chat template")
    parser.add_argument("--text", metavar="HH_FILE", help="where the sentences come from; default: docstrings")
    parser.add_argument("--pairs", type=int, default=60_000, help="default: 60,000")
    parser.add_argument("--outputs", metavar="DIR", default=ROOT / "outputs", help="folder to work in; default: outputs")
    parser.add_argument("--results", metavar="FILE", default=ROOT / "benchmarks" / "results" / "loading.md",
                        help="file to write; default: benchmarks/results/loading.md")
    parser.add_argument("--load", metavar="SOURCE", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        sys.exit(measure_load(options.model_dir, options.load) if options.load else main(options))
    except Stop as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
