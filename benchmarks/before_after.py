"""Is this checkout slower than another one? Times both in turn: a batch, the start of a run, and a whole epoch.

    python benchmarks/before_after.py OTHER_CHECKOUT [--repeats 3]

Batch: data.collate of 8 pairs with 16,000 tokens. Start: from the command to the first row of metrics of the quickstart,
whose task has been built. Epoch: the same command to its end. Each number is the median of runs that took turns, so that
whatever else the machine does falls on both. Writes benchmarks/results/before_after.md.
"""

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "benchmarks")]
import trl_parity  # noqa: E402  knows the machine's name

COLLATE = """
import json, pathlib, sys, time, transformers
sys.path.insert(0, sys.argv[1])
import data
folder = pathlib.Path(sys.argv[2])
texts = [" ".join(["hotel"] * n) for n in (300, 850, 849)]
folder.mkdir(exist_ok=True)
(folder / "train.jsonl").write_text("".join(json.dumps(
    {"prompt": f"{texts[0]} {n}", "chosen": " " + texts[1], "rejected": " " + texts[2]}) + "\\n" for n in range(8)))
tokenizer = transformers.AutoTokenizer.from_pretrained(sys.argv[3])
pairs, _, _ = data.load_pairs({str(folder): 1.0}, ["train"], data.Renderer(tokenizer, 1000, 2000), "train", say=lambda _: 0)
assert sum(pairs.lengths) > 15_900
times = []
for _ in range(30):
    started = time.perf_counter()
    data.collate(pairs, range(8))
    times.append(time.perf_counter() - started)
print("seconds", sorted(times)[len(times) // 2])
"""


def collate_seconds(checkout, folder, model):
    done = subprocess.run([sys.executable, "-c", COLLATE, checkout, folder / "long", model], cwd=checkout, text=True,
                          capture_output=True, check=True)
    return float(done.stdout.rpartition("seconds")[2])


def run_seconds(checkout, folder, *flags):
    """(seconds to the first row of metrics, seconds to the end) of the quickstart's command."""
    output = folder / "run"
    shutil.rmtree(output, ignore_errors=True)
    started, first = time.monotonic(), None
    process = subprocess.Popen(
        [sys.executable, "train.py", "--config", "configs/quickstart.yaml", f"--output_dir={output}",
         f"--toy_dir={folder / 'toy'}", "--logging_steps=1", *flags], cwd=checkout, env=os.environ | {
             "HF_HOME": str(folder / "cache")}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if first is None and (output / "metrics.jsonl").exists() and (output / "metrics.jsonl").stat().st_size:
            first = time.monotonic() - started
        time.sleep(0.02)
    if process.returncode:
        sys.exit(f"{checkout}: the quickstart ended with exit code {process.returncode}")
    return first, time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "before_after")
    options = parser.parse_args()
    sides = {"before": options.other.resolve(), "now": ROOT}
    found = {side: {"batch of 16,000 tokens, ms": [], "command to first step, s": [], "command to end of epoch, s": []}
             for side in sides}
    folders = {side: (options.outputs / side).resolve() for side in sides}
    for side, checkout in sides.items():
        folders[side].mkdir(parents=True, exist_ok=True)
        run_seconds(checkout, folders[side], "--max_steps=1", "--do_eval=false")  # builds the task and warms the disk
    for _ in range(options.repeats):
        for side, checkout in sides.items():
            batch, start, epoch = found[side].values()
            batch.append(1e3 * collate_seconds(checkout, folders[side], next((folders[side] / "toy").glob("model"))))
            for times, seconds in zip((start, epoch), run_seconds(checkout, folders[side])):
                times.append(seconds)
            print(side, {name: f"{values[-1]:.2f}" for name, values in found[side].items()}, flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=sides["before"], text=True, capture_output=True)
    lines = ["# Before and after", "",
             f"Made by `python benchmarks/before_after.py OTHER_CHECKOUT`, with a checkout of {commit.stdout.strip()}; "
             f"{trl_parity.cpu_name()}, {os.cpu_count()} cores, Python {platform.python_version()}. Medians of "
             f"{options.repeats} runs that took turns.", "", "| | before | now | ratio |", "| --- | --: | --: | --: |"]
    for name in found["now"]:
        before, now = (statistics.median(found[side][name]) for side in sides)
        lines.append(f"| {name} | {before:.2f} | {now:.2f} | {now / before:.2f} |")
    (ROOT / "benchmarks" / "results" / "before_after.md").write_text("\n".join([*lines, ""]))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
