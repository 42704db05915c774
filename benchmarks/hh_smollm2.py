"""A real chat model on real human labels, on a CPU: SmolLM2-135M-Instruct on Anthropic's HH (harmless, test split).

    python benchmarks/hh_smollm2.py MODEL_DIR HH_FILE [--key value …]

MODEL_DIR: a folder with the model.  HH_FILE: jsonl(.gz) of {"chosen", "rejected"} dialogues. A random tenth of them, drawn
with a fixed seed, is held out. Further flags go to train.py.

Each method trains for 60 optimiser steps of 8 pairs through the real command line, which takes about ten minutes on two
cores. A method that has finished is not run again. The paper trains 7B models on far more pairs; a run this small can show
that everything works on real text, but hardly which method is better.

Writes benchmarks/results/hh_smollm2.md after each method. HH's texts are often offensive; they are copied into outputs/hh/
and nowhere else.
"""

import gzip
import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import trl_parity

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "outputs" / "hh"
STEPS, PAIRS = 60, 480
FLAGS = {"max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 5e-5,
         "max_prompt_length": 96, "max_length": 160, "eval_strategy": "steps", "eval_steps": 20, "logging_steps": 5,
         "save_strategy": "no", "dataset_splits": "train,test", "auto_insert_empty_system_msg": "true"}
DPO = {"data_selection": "false"}
METHODS = {
    "DPO, all labels": DPO | {"max_train_samples": PAIRS},
    "ADPO as in the paper, γ = 0.5": {"max_train_samples": PAIRS, "gamma": 0.5},
    "DPO, a random third, three epochs": DPO | {"max_train_samples": PAIRS // 3},
}


def split(source):
    """Shuffle the dialogues with a fixed seed; write nine tenths as train.jsonl and the rest as test.jsonl. Returns their
    folder."""
    opened = gzip.open if str(source).endswith(".gz") else open
    with opened(source, "rt", encoding="utf-8") as file:
        lines = [line for line in file if line.strip()]
    random.Random(0).shuffle(lines)
    folder = FOLDER / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    cut = len(lines) * 9 // 10
    for name, part in (("train", lines[:cut]), ("test", lines[cut:])):
        (folder / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    return folder


def output(name):
    return FOLDER / "".join(c if c.isalnum() else "-" for c in name)


def read(name):
    """(summary, training rows of the metrics, evaluation rows) of a finished run."""
    rows = [json.loads(line) for line in (output(name) / "metrics.jsonl").read_text().splitlines()]
    return (json.loads((output(name) / "summary.json").read_text()),
            *([row for row in rows if row["split"] == split] for split in ("train", "eval")))


def report(flags, held_out):
    """Write the results page for the methods that have finished.  flags: of train.py.  held_out: number of test pairs."""
    finished = [name for name in METHODS if (output(name) / "summary.json").is_file()]
    error = math.sqrt(0.25 / held_out)
    lines = ["# SmolLM2-135M-Instruct on HH (harmless), on a CPU", "",
             "    python benchmarks/hh_smollm2.py MODEL_DIR HH_FILE", "",
             f"{trl_parity.cpu_name()}, {os.cpu_count()} cores. One run per method: {STEPS} steps of 8 pairs, taken "
             f"from {PAIRS} pairs. Flags of train.py: `{' '.join(flags)}`.", "",
             f"Held-out accuracy: how often the sign of the margin agrees with the human label, on {held_out} pairs. Its "
             f"standard error is {error:.3f}, so a difference under {2 * math.sqrt(2) * error:.2f} means nothing.", "",
             "| method | labels bought | " + " | ".join(f"held-out accuracy, step {n}" for n in (20, 40, 60))
             + " | held-out loss | pseudo-labels, share right | seconds | peak GB |", "| --- |" + " --: |" * 8]
    for name in finished:
        summary, _, evaluations = read(name)
        right = summary["pseudo_label_accuracy"]
        lines.append(f"| {name} | {summary['queries']} | "
                     + " | ".join(f"{row['rewards/accuracies']:.3f}" for row in evaluations)
                     + f" | {summary['eval_loss']:.4f} | {summary['pseudo_labels']}{f', {right:.1%}' if right else ''} | "
                     f"{summary['wall_seconds']:.0f} | {summary['peak_memory_bytes'] / 1e9:.1f} |")
    for name in finished:
        lines += ["", f"## {name}", "",
                  "| step | labels bought | loss | margin | accuracy by the labels used | gradient norm |",
                  "| --: | --: | --: | --: | --: | --: |"]
        lines += [f"| {row['step']} | {row['queries']} | {row['loss']:.4f} | {row['rewards/margins']:.3f} | "
                  f"{row['rewards/accuracies']:.3f} | {row['grad_norm']:.1f} |" for row in read(name)[1]]
    (ROOT / "benchmarks" / "results" / "hh_smollm2.md").write_text("\n".join([*lines, ""]), encoding="utf-8")


def main():
    if len(sys.argv) < 3:
        sys.exit("usage: python benchmarks/hh_smollm2.py MODEL_DIR HH_FILE [--key value …]")
    pairs = split(sys.argv[2])
    flags = [f"--{key}={value}" for key, value in FLAGS.items()] + sys.argv[3:]
    for name, own in METHODS.items():
        subprocess.run(["deepspeed", "train.py", "--config", "configs/smollm2-135m.yaml",
                        f"--model_name_or_path={sys.argv[1]}", f"--dataset_mixer={json.dumps({str(pairs): 1.0})}",
                        f"--output_dir={output(name)}", *flags, *(f"--{key}={value}" for key, value in own.items())],
                       cwd=ROOT, check=True)
        report(flags, len((pairs / "test.jsonl").read_text().splitlines()))


if __name__ == "__main__":
    main()
