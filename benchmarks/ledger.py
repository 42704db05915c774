"""What a million labels cost in time and on disk, and what ten million pairs cost a run before its first step.

    python benchmarks/ledger.py                             a million answers, 100,000 tiny pairs: ten minutes on two cores
    python benchmarks/ledger.py --answers N --pairs N --outputs DIR --results FILE

Answers arrive in two ways. A run adds them with `Oracle.answer`, 64 or 128 questions per step to the data set's annotator,
and commits each step to the disk. `tools/ledger.py --reuse` copies all of them at once. At each size, every answer is looked
up again, one step's questions at a time, and the queries that a logged step makes are timed: `count`, `cost` and the audit
(5 % of the answers are audits).

The pairs come from the grammar of the built-in task and are loaded with data.load_pairs. Sizes in memory are those of the
objects themselves, each counted once.

Writes benchmarks/results/ledger.md, which says what was measured and what is extrapolated.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
import timeit
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FAR = 10_000_000  # answers, and pairs, that the results are extrapolated to
AUDITED = 0.05  # share of the answers that are audits


def pair_id(n):
    return hashlib.blake2b(str(n).encode(), digest_size=16).hexdigest()


def seconds(work):
    """Seconds that one call of `work` takes, the fastest of five."""
    return min(timeit.repeat(work, number=1, repeat=5))


def file_bytes(path):
    """Size of a ledger, including the files that SQLite keeps beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(path.name + "*"))


def tree_bytes(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------------------------
# The ledger

def insert_in_steps(folder, sizes, step_pairs):
    """Fill a ledger as a run does, and measure it at each size: [{"answers", "insert", "lookup", …}].

    insert: answers per second since the previous size, including all commits.  lookup: answers per second.  bytes: of the
    file.  The rest: seconds.
    """
    import torch

    from labels.annotators import DatasetAnnotator
    from labels.oracle import Oracle, is_audited
    from runtime.config import Config
    config = Config(audit_fraction=AUDITED)
    oracle = Oracle(DatasetAnnotator({}), folder / "labels.sqlite", config)
    found, done, spent = [], 0, 0.0
    for size in sizes:
        start_at = done
        while done < size:
            ids = [pair_id(n) for n in range(done, min(done + step_pairs, size))]
            oracle.annotator.labels = dict.fromkeys(ids, 1)
            # The gate asks about every pair that is not audited, so all of them are asked.
            ask = torch.tensor([not is_audited(id, AUDITED, config.seed) for id in ids])
            margin = torch.full((len(ids),), 0.5)
            start = time.perf_counter()
            oracle.answer(ids, margin, ask, done // step_pairs)
            spent += time.perf_counter() - start
            done += len(ids)
        every = [pair_id(n) for n in range(size)]
        start = time.perf_counter()
        looked_up = sum(len(oracle.ledger.take(every[at:at + step_pairs])) for at in range(0, size, step_pairs))
        lookup = time.perf_counter() - start
        start = time.perf_counter()
        oracle.ledger.check_pairs(every)
        check = time.perf_counter() - start
        assert looked_up == size == oracle.ledger.count() == oracle.ledger.cost()[1]
        found.append({"answers": size, "step": step_pairs, "insert": (size - start_at) / spent, "lookup": size / lookup,
                      "count": seconds(oracle.ledger.count), "cost": seconds(oracle.ledger.cost),
                      "audit": seconds(oracle.audit), "check": check, "bytes": file_bytes(folder / "labels.sqlite")})
        print(json.dumps(found[-1]), flush=True)
        spent = 0.0
    oracle.close()
    return found


def tool(*arguments):
    """(seconds, peak memory in bytes) of tools/ledger.py in its own process."""
    script = ("import json, resource, sys, time; sys.argv = sys.argv[1:]; start = time.time()\n"
              "from tools.ledger import main\n"
              "code = main(); print(json.dumps([time.time() - start, "
              "1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss])); sys.exit(code)")
    done = subprocess.run([sys.executable, "-c", script, "tools/ledger.py", *map(str, arguments)], cwd=ROOT, text=True,
                          capture_output=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# The pairs

def deep_bytes(value, seen):
    """Bytes of a list, tuple or dict and everything in it, without the objects whose id is in `seen` already."""
    if id(value) in seen:
        return 0
    seen.add(id(value))
    size = sys.getsizeof(value)
    if isinstance(value, dict):
        size += sum(deep_bytes(k, seen) + deep_bytes(v, seen) for k, v in value.items())
    elif isinstance(value, (list, tuple)):
        size += sum(deep_bytes(v, seen) for v in value)
    return size


def measure_pairs(count):
    """{what: bytes or seconds} for `count` tiny pairs, measured in this process. Its $HF_HOME must be its own."""
    import torch
    from safetensors.torch import save_file

    import data
    from runtime import toy
    from runtime.parse import parse_config
    from runtime.schedule import Schedule
    home = Path(os.environ["HF_HOME"])
    rng = random.Random(0)
    home.mkdir(parents=True, exist_ok=True)
    with open(home / "train.jsonl", "w") as file:
        for n in range(count):
            file.write(json.dumps({"prompt": f"review {n} of the {rng.choice(toy.PLACES)} :", "label": "a",
                                   "response_a": toy.write_response(rng), "response_b": toy.write_response(rng)}) + "\n")
    renderer = data.Renderer(toy.make_tokenizer(), 32, 96)
    start = time.perf_counter()
    pairs, labels, truths = data.load_pairs({str(home / "train.jsonl"): 1.0}, ["train"], renderer, "train", workers=1,
                                            say=lambda line: None)
    found, seen = {"pairs": count, "load": time.perf_counter() - start, "text": (home / "train.jsonl").stat().st_size}, set()
    config = parse_config(["--config", str(ROOT / "configs" / "quickstart.yaml"), "--num_train_epochs=1"])
    schedule = Schedule(config, pairs)
    start = time.perf_counter()
    schedule.engine_batches()
    (_, batches), = schedule.scoring_batches()
    found["plan"] = time.perf_counter() - start
    found |= {"ids": deep_bytes(pairs.ids, seen), "lengths": deep_bytes(pairs.lengths, seen),
              "labels": deep_bytes(labels, seen) + deep_bytes(truths, seen),
              "order": deep_bytes(schedule._order[1], seen), "batches": deep_bytes(batches, seen)}
    logps = torch.zeros(len(pairs), 2)
    save_file({"logps": logps}, home / "reference.safetensors")
    found |= {"reference": logps.numel() * 4, "reference file": (home / "reference.safetensors").stat().st_size,
              "caches": tree_bytes(home / "datasets"), "tokens": sum(pairs.lengths) / len(pairs),
              "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    return found


def pairs_in_a_process(count, outputs):
    """What measure_pairs finds, in a fresh process."""
    home = outputs / f"pairs-{count}"
    done = subprocess.run([sys.executable, __file__, "--measure", str(count)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          env={**os.environ, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"}, check=True)
    shutil.rmtree(home)
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found), flush=True)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The results

def line(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def size(number):
    return f"{number / 1e9:,.2f} GB" if number >= 1e9 else f"{number / 1e6:,.1f} MB"


def duration(number):
    return f"{number:,.1f} s" if number >= 1 else f"{1000 * number:,.3f} ms"


def ledger_part(runs, tools):
    out = ["## The ledger", "", line("answers", "questions per step", "inserts per second", "look-ups per second", "`count`",
                                     "`cost`", "audit", "check at start-up", "file"), line("--:", *["--:"] * 8)]
    out += [line(f"{r['answers']:,}", r["step"], f"{r['insert']:,.0f}", f"{r['lookup']:,.0f}", duration(r["count"]),
                 duration(r["cost"]), duration(r["audit"]), duration(r["check"]), size(r["bytes"])) for r in runs]
    out += ["", line("tools/ledger.py, in its own process", "answers", "time", "peak memory"), line("---", *["--:"] * 3)]
    out += [line(name, f"{n:,}", duration(took), size(peak)) for name, n, took, peak in tools]
    last = [max((r for r in runs if r["step"] == step), key=lambda r: r["answers"]) for step in (64, 128)]
    factor = FAR / last[0]["answers"]
    out += ["", f"**Extrapolated** to {FAR:,} answers, linearly from the largest size: "
            + "; ".join(f"in steps of {r['step']}, {duration(FAR / r['insert'])} for all inserts, "
                        f"{size(factor * r['bytes'])} on disk, `count` {duration(factor * r['count'])}, audit "
                        f"{duration(factor * r['audit'])}" for r in last)
            + f"; `tools/ledger.py --reuse` {duration(factor * tools[0][2])}, with at most {size(factor * tools[0][3])} of "
            "memory. `count` and `cost` add up one row per step, an audit one row per audited pair. A pair's id is a hash, "
            "so answers land on random pages and inserts become slower as the file grows: expect longer times than these."]
    return out


def pairs_part(measured):
    names = {"ids": "ids, on every rank", "lengths": "lengths, on every rank",
             "labels": "labels and truths, on every rank while loading, then on rank 0 alone",
             "order": "order of an epoch, on every rank", "batches": "batches that score the reference, on every rank",
             "reference": "reference log-probs, on every rank", "peak": "the whole process at its peak",
             "text": "the file of pairs, on disk", "caches": "caches of `datasets`, on disk",
             "reference file": "the cache of reference log-probs, on disk"}
    small, large = measured

    def far(name, value):
        slope = (large[name] - small[name]) / (large["pairs"] - small["pairs"])
        return value(large[name] + slope * (FAR - large["pairs"]))
    out = ["", f"## Pairs, of {large['tokens']:.0f} tokens", "",
           line("", *(f"{m['pairs']:,} pairs" for m in measured), f"{FAR:,}, extrapolated"), line("---", *["--:"] * 3)]
    out += [line(words, *(size(m[name]) for m in measured), far(name, size)) for name, words in names.items()]
    times = {"load": "load_pairs, no caches, one process", "plan": "planning the batches of an epoch"}
    out += [line(words, *(duration(m[name]) for m in measured), far(name, duration)) for name, words in times.items()]
    return [*out, "", "The right column extends the straight line through the two sizes. The caches grow with the length of "
            "the texts. They are memory-mapped: their pages count as memory of the process, but the system can drop them. "
            "The other rows do not depend on the length of the texts."]


def main(options):
    options.outputs.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=options.outputs))
    sizes = [n for n in (1_000, 10_000, 100_000, 1_000_000) if n < options.answers] + [options.answers]
    runs = []
    for step_pairs in (64, 128):
        (work / str(step_pairs)).mkdir()
        runs += insert_in_steps(work / str(step_pairs), sizes, step_pairs)
    tools = [("`--reuse`, everything into a new ledger", options.answers, *tool(work / "reused", "--reuse", work / "64")),
             ("the report", options.answers, *tool(work / "64"))]
    with sqlite3.connect(work / "reused" / "labels.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM answers WHERE step = -1").fetchone()[0] == options.answers
    measured = [pairs_in_a_process(n, work) for n in (options.pairs // 10, options.pairs)]
    shutil.rmtree(work)
    text = ["# A million labels, ten million pairs", "", "Made by `python benchmarks/ledger.py "
            f"--answers {options.answers} --pairs {options.pairs}` on {os.cpu_count()} cores "
            f"({platform.machine()}), Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}. "
            f"Load of the machine at the end: {os.getloadavg()[1]:.1f} (the benchmark by itself makes 1.0; with a higher "
            "load the times are too long).", ""]
    options.results.write_text("\n".join([*text, *ledger_part(runs, tools), *pairs_part(measured)]) + "\n")
    print(options.results.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--answers", type=int, default=1_000_000)
    parser.add_argument("--pairs", type=int, default=100_000)
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "ledger")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "ledger.md")
    parser.add_argument("--measure", type=int, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(measure_pairs(chosen.measure)))
    else:
        main(chosen)
