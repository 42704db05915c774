"""A real chat model on real human labels, on a CPU: SmolLM2-135M-Instruct and Anthropic's HH (harmless, test split).

    python benchmarks/hh_smollm2.py MODEL_DIR HH_FILE [--key value …]

MODEL_DIR: a folder with the model.  HH_FILE: jsonl(.gz) of {"chosen", "rejected"} dialogues; a seeded tenth is held out.
Trains 80 optimiser steps of 8 pairs through the real command line (further flags go to train.py) and writes
benchmarks/results/hh_smollm2.md. The texts of HH are often offensive; none of them is written anywhere here but into
outputs/hh/.
"""

import gzip
import json
import platform
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS, OUTPUT = ROOT / "outputs" / "hh" / "pairs", ROOT / "outputs" / "hh" / "run"
FLAGS = {"max_steps": 80, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-5,
         "gamma": 0.5, "max_prompt_length": 96, "max_length": 160, "max_eval_samples": 128, "eval_strategy": "steps",
         "eval_steps": 20, "eval_on_start": "true", "logging_steps": 5, "save_strategy": "no",
         "dataset_splits": "train,test"}


def split(source):
    """Write train.jsonl and test.jsonl: a seeded shuffle, the last tenth for the test."""
    opened = gzip.open if str(source).endswith(".gz") else open
    with opened(source, "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    random.Random(0).shuffle(lines)
    PAIRS.mkdir(parents=True, exist_ok=True)
    cut = len(lines) * 9 // 10
    for name, part in (("train", lines[:cut]), ("test", lines[cut:])):
        (PAIRS / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")


def cpu_name():
    names = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return f"{names[0]}, {len(names)} cores" if names else platform.machine()


def report(flags):
    """The results file, from what the run left in its output folder."""
    rows = [json.loads(line) for line in (OUTPUT / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((OUTPUT / "summary.json").read_text())
    train, held_out = ([row for row in rows if row["split"] == split] for split in ("train", "eval"))
    lines = ["# SmolLM2-135M-Instruct on HH (harmless), on a CPU", "",
             "    python benchmarks/hh_smollm2.py MODEL_DIR HH_FILE", "",
             f"{cpu_name()}; flags of train.py: `{' '.join(flags)}`.", "",
             "Held-out accuracy is that of the implicit reward's sign against the human label, on 128 pairs (one standard "
             "error is about 0.044); at step 0 every margin is 0, which counts as half right.", "",
             "| step | held-out loss | held-out accuracy | labels bought | pseudo-labels |",
             "| --: | --: | --: | --: | --: |"]
    lines += [f"| {row['step']} | {row['loss']:.4f} | {row['rewards/accuracies']:.3f} | {row['queries']} | "
              f"{row['pseudo_labels']} |" for row in held_out]
    lines += ["", "| step | loss | margin | by the labels used, right | gradient norm | tokens a second |",
              "| --: | --: | --: | --: | --: | --: |"]
    lines += [f"| {row['step']} | {row['loss']:.4f} | {row['rewards/margins']:.3f} | {row['rewards/accuracies']:.3f} | "
              f"{row['grad_norm']:.1f} | {row['tokens_per_second']:.0f} |" for row in train]
    right = summary["pseudo_label_accuracy"]
    lines += ["", f"{summary['queries']} of {summary['pairs']} labels bought ({summary['query_fraction']:.0%}); "
              + (f"of {summary['pseudo_labels']} pseudo-labels {right:.1%} agree with the human label; " if right else "")
              + f"{summary['wall_seconds']:.0f} s, {summary['peak_memory_bytes'] / 1e9:.1f} GB at the peak.", ""]
    (ROOT / "benchmarks" / "results" / "hh_smollm2.md").write_text("\n".join(lines), encoding="utf-8")


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: python benchmarks/hh_smollm2.py MODEL_DIR HH_FILE [--key value …]")
    split(sys.argv[2])
    flags = [f"--{key}={value}" for key, value in FLAGS.items()] + sys.argv[3:]
    subprocess.run(["deepspeed", "train.py", "--config", "configs/smollm2-135m.yaml", f"--model_name_or_path={sys.argv[1]}",
                    f"--dataset_mixer={{{PAIRS}: 1.0}}", f"--output_dir={OUTPUT}", *flags], cwd=ROOT, check=True)
    report(flags)


if __name__ == "__main__":
    main()
