"""What a million labels cost in time and disk, and what ten million pairs cost a run before its first step.

    python benchmarks/ledger.py                             a million answers, 100,000 tiny pairs: ten minutes on two cores
    python benchmarks/ledger.py --answers N --pairs N --outputs DIR --results FILE

Answers come in as a run brings them, `Oracle.answer` of a step of 64 or 128 questions to the data set's annotator, each step
committed to the disk; and in bulk, as `tools/ledger.py --reuse` copies them. At each size all are looked up again, a step's
questions at a time, and what a logged step asks is timed: `count`, `cost`, `audits` (5 % of the answers are audits).
The pairs are those of the toy task's grammar, loaded by data.load_pairs; sizes in memory are those of the objects
themselves, each counted once.

Writes benchmarks/results/ledger.md, which says what is measured and what is extrapolated.
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
FAR = 10_000_000  # pairs that the results are extrapolated to


def pair_id(n):
    return hashlib.blake2b(str(n).encode(), digest_size=16).hexdigest()


def seconds(work):
    """Seconds of one call of `work`, the fastest of five."""
    return min(timeit.repeat(work, number=1, repeat=5))


def file_bytes(path):
    """Bytes of a ledger, with what stands beside it."""
    return sum(part.stat().st_size for part in path.parent.glob(path.name + "*"))


def tree_bytes(folder):
    return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())


# ----------------------------------------------------------------------------------------------------------------------
# The ledger

def insert_in_steps(folder, sizes, step_pairs):
    """Fill a ledger as a run does, and measure it at each size: [{"answers", "insert", "lookup", …}].

    insert: answers a second since the size before, all commits included.  lookup: answers a second.  The rest: seconds."""
    from labels.oracle import DatasetAnnotator, Oracle
    asker = Oracle(DatasetAnnotator({}), folder / "labels.sqlite")
    found, done, spent = [], 0, 0.0
    for size in sizes:
        start_at = done
        while done < size:
            ids = [pair_id(n) for n in range(done, min(done + step_pairs, size))]
            asker.annotator.labels = dict.fromkeys(ids, 1)
            audit = [n % 20 == 0 for n in range(len(ids))]
            start = time.perf_counter()
            asker.answer(ids, [0.5] * len(ids), [True] * len(ids), done // step_pairs, audit)
            spent += time.perf_counter() - start
            done += len(ids)
        every = [pair_id(n) for n in range(size)]
        start = time.perf_counter()
        looked_up = sum(len(asker.ledger.take(every[at:at + step_pairs])) for at in range(0, size, step_pairs))
        lookup = time.perf_counter() - start
        start = time.perf_counter()
        asker.ledger.check_pairs(every)
        check = time.perf_counter() - start
        assert looked_up == size == asker.ledger.count() == asker.ledger.cost()[1]
        found.append({"answers": size, "step": step_pairs, "insert": (size - start_at) / spent, "lookup": size / lookup,
                      "count": seconds(asker.ledger.count), "cost": seconds(asker.ledger.cost),
                      "audit": seconds(asker.audit), "check": check, "bytes": file_bytes(folder / "labels.sqlite")})
        print(json.dumps(found[-1]), flush=True)
        spent = 0.0
    asker.close()
    return found


def tool(*arguments):
    """(seconds, bytes at the peak) of tools/ledger.py in a process of its own."""
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
    """Bytes of lists, tuples and dicts and of all that is in them, what was seen already left out."""
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
    """{what: bytes or seconds} of `count` tiny pairs, in this process, whose caches are in a folder of its own."""
    import torch
    from safetensors.torch import save_file

    import data
    from runtime import toy
    from runtime.config import parse_config
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
    schedule = Schedule(config, pairs, 1)
    start = time.perf_counter()
    schedule.engine_batches()
    batches = schedule.training_batches()
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
    out = ["## The ledger", "", line("answers", "questions a step", "inserted a second", "looked up a second", "`count`",
                                     "`cost`", "audit", "check at the start", "file"), line("--:", *["--:"] * 8)]
    out += [line(f"{r['answers']:,}", r["step"], f"{r['insert']:,.0f}", f"{r['lookup']:,.0f}", duration(r["count"]),
                 duration(r["cost"]), duration(r["audit"]), duration(r["check"]), size(r["bytes"])) for r in runs]
    out += ["", line("a process of tools/ledger.py", "answers", "time", "memory at the peak"), line("---", *["--:"] * 3)]
    out += [line(name, f"{n:,}", duration(took), size(peak)) for name, n, took, peak in tools]
    last = [max((r for r in runs if r["step"] == step), key=lambda r: r["answers"]) for step in (64, 128)]
    factor = FAR / last[0]["answers"]
    out += ["", f"**Extrapolated** to {FAR:,} answers, linearly from the largest size: "
            + "; ".join(f"in steps of {r['step']} {duration(FAR / r['insert'])} of inserts in all, "
                        f"{size(factor * r['bytes'])} on disk, `count` {duration(factor * r['count'])}, audit "
                        f"{duration(factor * r['audit'])}" for r in last)
            + f"; `tools/ledger.py --reuse` {duration(factor * tools[0][2])} with at most {size(factor * tools[0][3])} of "
            "memory. `count` and `cost` add up one row a step, an audit one row an audited pair. A pair's id is a hash, so "
            "each answer lands on a page of its own and the rate of inserts falls with the size: expect more, not less."]
    return out


def pairs_part(measured):
    names = {"ids": "ids, on every rank", "lengths": "lengths, on every rank",
             "labels": "labels and truths, on every rank while it loads, then on the first",
             "order": "an epoch's order, on every rank", "batches": "batches of the reference's pass, on every rank",
             "reference": "log-probs of the reference, on the rank's device", "peak": "all of the process at its peak",
             "text": "the file of pairs, on disk", "caches": "datasets' caches, on disk",
             "reference file": "the reference's cache, on disk"}
    small, large = measured
    def far(name, value):
        slope = (large[name] - small[name]) / (large["pairs"] - small["pairs"])
        return value(large[name] + slope * (FAR - large["pairs"]))
    out = ["", f"## Pairs, of {large['tokens']:.0f} tokens", "",
           line("", *(f"{m['pairs']:,} pairs" for m in measured), f"{FAR:,}, extrapolated"), line("---", *["--:"] * 3)]
    out += [line(words, *(size(m[name]) for m in measured), far(name, size)) for name, words in names.items()]
    out += [line(words, *(duration(m[name]) for m in measured), far(name, duration))
            for name, words in (("load", "load_pairs, nothing cached, one process"), ("plan", "batches of an epoch"))]
    return [*out, "", "The right column is the line through the two sizes. The caches grow with the length of the texts and "
            "are memory-mapped, so their pages count in the process but can be dropped; the other rows do not depend on it."]


def main(options):
    options.outputs.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(dir=options.outputs))
    sizes = [n for n in (1_000, 10_000, 100_000, 1_000_000) if n < options.answers] + [options.answers]
    runs = []
    for step_pairs in (64, 128):
        (work / str(step_pairs)).mkdir()
        runs += insert_in_steps(work / str(step_pairs), sizes, step_pairs)
    tools = [("`--reuse`, all into a new ledger", options.answers, *tool(work / "reused", "--reuse", work / "64")),
             ("the report", options.answers, *tool(work / "64"))]
    with sqlite3.connect(work / "reused" / "labels.sqlite") as db:
        assert db.execute("SELECT COUNT(*) FROM answers WHERE step = -1").fetchone()[0] == options.answers
    measured = [pairs_in_a_process(n, work) for n in (options.pairs // 10, options.pairs)]
    shutil.rmtree(work)
    text = ["# A million labels, ten million pairs", "", "Made by `python benchmarks/ledger.py "
            f"--answers {options.answers} --pairs {options.pairs}` on {os.cpu_count()} cores "
            f"({platform.machine()}), Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}. "
            f"Load of the machine at the end: {os.getloadavg()[1]:.1f} (the benchmark "
            "alone is 1.0; where it is higher, times are too long).", ""]
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
