"""Does the way a run is divided change its result? The same run under ZeRO 0 to 3, in fp32 and bf16, with 1 and 2 processes,
with and without accumulation and checkpointing: 96 runs.

    python benchmarks/scale.py                                    about ten minutes on two cores
    python benchmarks/scale.py --outputs DIR --results FILE       continues with the runs that are missing in DIR

Each run trains a tiny random model through the real launcher, for two epochs of 42 pairs in steps of 8, so that the last
step of an epoch has 2 pairs. It is compared with the baseline of its dtype: one process, no accumulation, no checkpointing,
ZeRO 0 (which runs as ZeRO 1 in bf16; one process in fp32 runs ZeRO 1 and 2 as ZeRO 0). Compared are the loss and margin of
each step, every answer in the ledger, and the final weights. The answers and pseudo-labels of the first epoch must add up to
the number of pairs.

A run may differ from its baseline as far as the precision of its dtype allows. In fp32 the limits are those below. In bf16
the limit is twice the distance between the baselines of bf16 and fp32, because rounding may move either of two bf16 runs
that far from the exact result.

Writes benchmarks/results/scale.md. Exit code 0: every run is within the limits; 1: one is not, and the table says which; 2:
it could not run.
"""

import argparse
import contextlib
import importlib.metadata
import io
import itertools
import json
import os
import platform
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
STEP_PAIRS, PAIRS, EPOCHS = 8, 42, 2
LONGEST = 48  # tokens of the longest pair
STEPS_AN_EPOCH = -(-PAIRS // STEP_PAIRS)
ASPECTS = ("bf16", "processes", "stage", "accumulation", "checkpointing")
RUNS = list(itertools.product((False, True), (1, 2), range(4), (1, 2, 4), (False, True)))
BASELINE = {bf16: (bf16, 1, 0, 1, False) for bf16 in (False, True)}
FP32_LIMITS = {"loss": 1e-5, "margins": 1e-4, "answers": 0, "weights": 1e-5}


class Stop(Exception):
    """The benchmark cannot run; the message says why. Exit code 2."""


def output_of(folder, run):
    return folder / "runs" / "-".join(f"{name}_{int(value)}" for name, value in zip(ASPECTS, run))


def missing(folder, processes):
    """The runs with this number of processes that have not finished."""
    return [run for run in RUNS if run[1] == processes and not (output_of(folder, run) / "summary.json").exists()]


def argv_of(folder, run):
    """The command line of a run."""
    bf16, processes, stage, accumulation, checkpointing = run
    pairs = STEP_PAIRS // processes // accumulation  # of a micro-batch on each rank
    keys = dict(output_dir=output_of(folder, run), deepspeed=folder / f"zero{stage}.json", bf16=bf16,
                gradient_checkpointing=checkpointing, gradient_accumulation_steps=accumulation,
                per_device_train_batch_size=pairs, micro_batch_tokens=pairs * LONGEST)
    return ["--config", str(folder / "run.json"), *(f"--{name}={value}" for name, value in keys.items())]


def write_configs(folder):
    """Write the engine's config for each ZeRO stage, and the keys that all runs share."""
    engine = json.loads((ROOT / "ds_config.json").read_text(encoding="utf-8"))
    for stage in range(4):
        engine["zero_optimization"]["stage"] = stage
        (folder / f"zero{stage}.json").write_text(json.dumps(engine), encoding="utf-8")
    (folder / "run.json").write_text(json.dumps(dict(  # JSON is YAML
        model_name_or_path=str(folder / "model"), dataset_mixer={str(folder / "train.jsonl"): 1.0},
        num_train_epochs=EPOCHS, learning_rate=2e-3, warmup_ratio=0.0, gamma=0.2, max_prompt_length=16, max_length=64,
        logging_steps=1, save_strategy="no", do_eval=False, num_threads=1)), encoding="utf-8")


def launch(folder, processes):
    """Start the missing runs with this number of processes, all under one launcher, which saves most of their start-up
    time. Raises Stop if one fails."""
    for run in missing(folder, processes):
        shutil.rmtree(output_of(folder, run), ignore_errors=True)
    if not missing(folder, processes):
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(["deepspeed", "--num_gpus", str(processes), "--master_port", str(port), __file__, "--outputs",
                           str(folder), "--rank"], cwd=ROOT, env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"})
    if done.returncode or missing(folder, processes):
        raise Stop(f"{processes} processes: exit code {done.returncode}")


def work(folder):
    """What each rank does: train.py's own command line, one run after another. Returns the first exit code that is not 0."""
    import train  # first: it sets what DeepSpeed reads when it is imported
    from runtime.launch import command
    todo = missing(folder, int(os.environ["WORLD_SIZE"]))
    for run in tqdm(todo, desc=f"runs of {os.environ['WORLD_SIZE']}", disable=os.environ["RANK"] != "0"):
        with contextlib.redirect_stdout(io.StringIO()):
            code = command(argv_of(folder, run), train.main)
        if code:
            return code
    return 0


def result(output):
    """A run's rows of metrics, answers and weights, and how many pairs had a label or pseudo-label in its first epoch."""
    from safetensors.torch import load_file
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    ledger = sqlite3.connect(output / "labels.sqlite")
    answers = dict(ledger.execute("SELECT pair, label * (step + 1) FROM answers"))
    ledger.close()
    epoch = rows[STEPS_AN_EPOCH - 1]
    return {"rows": rows, "answers": answers, "labelled": epoch["queries"] + epoch["pseudo_labels"],
            "weights": load_file(output / "model.safetensors")}


def difference(one, other):
    """{what: largest difference} between two results. Losses and margins: absolute.  answers: how many pairs only one of
    the two asked, or both at different steps.  weights: norm of the difference, divided by the norm of the weights."""
    import torch
    flat = [torch.cat([r["weights"][name].double().flatten() for name in sorted(r["weights"])]) for r in (one, other)]

    def largest(name):
        return max(abs(a[name] - b[name]) for a, b in zip(one["rows"], other["rows"], strict=True))
    return {"loss": largest("loss"), "margins": largest("rewards/margins"),
            "answers": sum(one["answers"].get(pair) != other["answers"].get(pair)
                           for pair in one["answers"] | other["answers"]),
            "weights": ((flat[0] - flat[1]).norm() / flat[1].norm()).item()}


def outside(found, limits, labelled):
    """Names of what differs by more than the limits.  labelled: pairs with a label or pseudo-label in the first epoch."""
    return [name for name, value in found.items() if value > limits[name]] + ["pairs"] * (labelled != PAIRS)


def report(found, limits, labelled):
    """(the results page, whether every run is within the limits).  found: {run: differences}."""
    bad = {run: out for run in found if (out := outside(found[run], limits[run[0]], labelled[run]))}
    verdict = (f"**Verdict: the same.** All {len(found)} runs are within the precision of their dtype, and in each of them "
               f"the answers and pseudo-labels of the first epoch add up to {PAIRS}." if not bad else
               f"**Verdict: not the same.** {len(bad)} of {len(found)} runs are outside the precision of their dtype: "
               + "; ".join(f"{describe(run)} ({', '.join(out)})" for run, out in bad.items()) + ".")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed"))
    lines = ["# One run, divided in every way", "", "Made by", "", "    python benchmarks/scale.py", "", verdict, "",
             "Largest difference from the baseline of the dtype, over all runs:", "",
             "| | loss | margins | answers that differ | weights, relative |", "| --- | --: | --: | --: | --: |"]
    for bf16, dtype in ((False, "fp32"), (True, "bf16")):
        worst = {name: max(found[run][name] for run in found if run[0] == bf16) for name in FP32_LIMITS}
        lines += [f"| {dtype}, largest | {cells(worst)} |", f"| {dtype}, limit | {cells(limits[bf16])} |"]
    lines += ["", f"- {PAIRS} pairs in steps of {STEP_PAIRS}, {EPOCHS} epochs: the last step of an epoch has "
              f"{PAIRS % STEP_PAIRS} pairs", "- the baseline: one process, no accumulation, no checkpointing, ZeRO 0 (which "
              "runs as ZeRO 1 in bf16; one process in fp32 runs ZeRO 1 and 2 as ZeRO 0)",
              "- the limit in bf16 is twice the distance between the baselines of bf16 and fp32, because either of two bf16 "
              "runs may be that far from the exact result",
              "- answers that differ: pairs that only one of the two runs asked, or both at different steps; this happens "
              "where a margin is close to γ",
              f"- {versions}; CPU, one thread per process; Python {platform.python_version()}", "",
              "| dtype | processes | ZeRO | accumulation | checkpointing | loss | margins | answers that differ | weights, "
              "relative | |", "| --- | --: | --: | --: | --- | --: | --: | --: | --: | --- |"]
    for run, differences in found.items():
        bf16, processes, stage, accumulation, checkpointing = run
        lines.append(f"| {'bf16' if bf16 else 'fp32'} | {processes} | {stage} | {accumulation} | "
                     f"{'on' if checkpointing else 'off'} | {cells(differences)} | {', '.join(bad.get(run, ()))} |")
    return "\n".join([*lines, ""]), not bad


def cells(differences):
    return " | ".join(f"{value}" if name == "answers" else f"{value:.1e}" for name, value in differences.items())


def describe(run):
    bf16, processes, stage, accumulation, checkpointing = run
    return (f"{'bf16' if bf16 else 'fp32'}, ZeRO {stage}, {processes} process{'es' * (processes > 1)}, accumulation "
            f"{accumulation}, checkpointing {'on' if checkpointing else 'off'}")


def main(options):
    folder = Path(options.outputs).resolve()
    (folder / "runs").mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("HF_HOME", str(folder / "hf"))
    if not (folder / "train.jsonl").exists():
        from runtime import toy
        toy.write_untrained(folder, {"train.jsonl": PAIRS})
    write_configs(folder)
    for processes in (1, 2):
        launch(folder, processes)
    results = {run: result(output_of(folder, run)) for run in RUNS}
    rounding = difference(results[BASELINE[True]], results[BASELINE[False]])
    limits = {False: FP32_LIMITS, True: {name: 2 * value for name, value in rounding.items()}}
    found = {run: difference(results[run], results[BASELINE[run[0]]]) for run in RUNS}
    text, well = report(found, limits, {run: results[run]["labelled"] for run in RUNS})
    Path(options.results).write_text(text, encoding="utf-8")
    print(text.partition("\n- ")[0])
    return 0 if well else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--outputs", default=str(ROOT / "outputs" / "scale"), help="folder for the runs")
    parser.add_argument("--results", default=str(ROOT / "benchmarks" / "results" / "scale.md"))
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)  # set for the ranks that the launcher starts
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # added by the launcher
    options = parser.parse_args()
    try:
        sys.exit(work(Path(options.outputs)) if options.rank else main(options))
    except Stop as stop:
        print(f"error: {stop}", file=sys.stderr)
        sys.exit(2)
