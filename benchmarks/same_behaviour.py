"""Do two checkouts of this project compute the same? For changes that must not change behaviour, such as moving code.

    python benchmarks/same_behaviour.py OTHER_CHECKOUT                    about ten minutes on two cores
    python benchmarks/same_behaviour.py OTHER_CHECKOUT --runs sft lora    only these; the results page is not written

Each run in RUNS is started in both checkouts from the command line, on the CPU with one thread. What the two wrote must be
equal to the last bit: every row of metrics.jsonl, summary.json, the ledger's answers and the trained weights. Only what
measures time or memory is left out (NOT_COMPARED). A metric that only one of the two writes counts as a difference.

For the quickstart, each checkout builds the toy task itself. All other runs use a tiny random model and pairs that are
labelled by the gold reward of runtime/toy.py; both checkouts read the same files.

Writes benchmarks/results/same_behaviour.md. Exit code 0: all runs are the same; 1: one differs or failed, and the table says
where; 2: wrong arguments.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TINY = dict(model_name_or_path="FOLDER/model", dataset_mixer={"FOLDER/pairs": 1.0}, learning_rate=5e-3,
            per_device_train_batch_size=16, max_prompt_length=16, max_length=64, logging_steps=1, eval_strategy="steps",
            eval_steps=5, eval_on_start=True, save_strategy="no", num_threads=1)
RESUME = 15  # the step that dpo-resumed goes on from, inside the first of two epochs
DPO = dict(data_selection="false", num_train_epochs=2, save_strategy="steps", save_steps=RESUME)
RUNS = {  # name: its keys, besides those of TINY
    "two-processes": dict(gamma=0.1, deepspeed="ds_config.json", per_device_train_batch_size=4, max_steps=12,
                          gradient_accumulation_steps=2),
    "calibrated-gate": dict(gate="calibrated", audit_fraction=0.2, gamma=0.1, pseudo_labels="replay", num_train_epochs=2),
    "budget": dict(target_query_fraction=0.33, pseudo_labels="replay", num_train_epochs=2),
    "lora": dict(gamma=0.1, use_peft="true", lora_r=4, lora_alpha=8, lora_target_modules="all-linear"),
    "sft": dict(objective="sft", dataset_mixer="{FOLDER/texts: 1.0}"),
    "dpo": DPO,
    "dpo-resumed": DPO,
    "quickstart": dict(config="configs/quickstart.yaml", toy_dir="OUTPUT-toy"),
}
NOT_COMPARED = {"tokens_per_second", "wall_seconds", "peak_memory_bytes"}  # fields of metrics.jsonl and summary.json
ANSWER = ("pair", "label", "step", "audit", "source", "margin")  # columns of the ledger


class Failed(Exception):
    """A run ended with an error or did not write what it should; the message says what."""


def write_task(folder):
    """The tiny task: model/, pairs/ for ADPO, texts/ for SFT, and tiny.yaml."""
    from runtime import toy
    toy.write_untrained(folder, {"pairs/train.jsonl": 480, "pairs/test.jsonl": 40})
    (folder / "texts").mkdir()
    for file in (folder / "pairs").iterdir():
        rows = map(json.loads, file.read_text().splitlines())
        (folder / "texts" / file.name).write_text("".join(
            json.dumps({"prompt": row["prompt"], "completion": row["response_a"]}) + "\n" for row in rows))
    (folder / "tiny.yaml").write_text(json.dumps(TINY).replace("FOLDER", str(folder)))  # JSON is YAML


def command_of(name):
    """The command of a run, with FOLDER and OUTPUT in place of paths."""
    launcher = ["deepspeed", "--num_gpus", "2"] if name == "two-processes" else ["python"]
    keys = {"config": "FOLDER/tiny.yaml", **RUNS[name], "output_dir": "OUTPUT"}
    return [*launcher, "train.py", *(f"--{key}={value}" for key, value in keys.items())]


def copy_stopped_run(source, target):
    """A finished run without its results and later checkpoints: as a kill after checkpoint-RESUME leaves it, but with all
    its answers."""
    if not (source / f"checkpoint-{RESUME}").is_dir():
        raise Failed(f"dpo left no checkpoint-{RESUME}")
    shutil.copytree(source, target, ignore=lambda _, names: {
        name for name in names if name in ("summary.json", "model.safetensors")
        or name.startswith("checkpoint-") and name != f"checkpoint-{RESUME}"})


def launch(name, checkout, home):
    """Run it in a checkout, with all that it writes under `home`. Returns its output folder. Raises Failed."""
    output, kept, binaries = home / name, home / name / f"checkpoint-{RESUME}", Path(sys.executable).parent
    if name == "dpo-resumed":
        copy_stopped_run(home / "dpo", output)
        copied = kept.stat().st_ino
    command = [part.replace("FOLDER", str(home.parent)).replace("OUTPUT", str(output)) for part in command_of(name)]
    command[0] = str(binaries / "deepspeed") if command[0] == "deepspeed" else sys.executable
    if name == "two-processes":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            command[1:1] = ["--master_port", str(probe.getsockname()[1])]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}  # the launcher starts the first `python` on the path
    done = subprocess.run(command, cwd=checkout, env=environment, text=True, capture_output=True)
    if done.returncode:
        lines = done.stderr.splitlines() or ["nothing on stderr"]
        reason = next((line for line in lines if line.startswith("error: ")), lines[-1])
        for path, word in ((output, "OUTPUT"), (home.parent, "FOLDER"), (checkout, "CHECKOUT")):
            reason = reason.replace(str(path), word)
        raise Failed(f"exit code {done.returncode}: {reason}")
    if name == "dpo-resumed" and kept.stat().st_ino != copied:  # it was written again
        raise Failed(f"it began anew instead of going on from checkpoint-{RESUME}")
    return output


def values_of(output, name):
    """{where a value is: the value} of all that is compared; the weights' are tensors. Raises Failed."""
    values = {}
    try:
        for n, line in enumerate((output / "metrics.jsonl").read_text().splitlines(), 1):
            row = json.loads(line)
            values |= {f"metrics, row {n} ({row['split']}, step {row['step']}), {key}": row[key] for key in row}
        values |= {f"summary, {key}": value for key, value in json.loads((output / "summary.json").read_text()).items()}
        values = {place: value for place, value in values.items() if place.rpartition(", ")[2] not in NOT_COMPARED}
        weights = load_file(output / ("adapter_model.safetensors" if name == "lora" else "model.safetensors"))
        values |= {f"weights, {key}": weights[key] for key in weights}
        if name != "sft":
            ledger = sqlite3.connect(f"file:{output / 'labels.sqlite'}?mode=ro", uri=True)
            for answer in ledger.execute(f"SELECT {', '.join(ANSWER)} FROM answers ORDER BY step, pair"):
                values |= {f"ledger, pair {answer[0]}, {key}": value for key, value in zip(ANSWER, answer)}
            ledger.close()
    except (OSError, sqlite3.Error) as error:
        raise Failed(f"its outputs cannot be read: {str(error).replace(str(output), 'OUTPUT')}")
    return values


def same(a, b):
    """Whether two values are equal; tensors, to the last bit."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.dtype, a.shape) == (b.dtype, b.shape) and torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (a, b)))
    return type(a) is type(b) and a == b


def differences(ours, theirs):
    """"equal", or how many entries differ and the first of them; a tensor is one entry."""
    absent = object()
    places = [place for place in ours | theirs if not same(ours.get(place, absent), theirs.get(place, absent))]
    if not places:
        return "equal"
    a, b = (values.get(places[0], "absent") for values in (ours, theirs))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        first = f"{(a != b).sum():,} of {a.numel():,} numbers"
    else:
        first = "{} here, {} in the other".format(*(tuple(v.shape) if isinstance(v, torch.Tensor) else v for v in (a, b)))
    return f"{len(places):,} differ; the first: {places[0]}: {first}"


def compare(name, checkouts, folder, progress):
    """(the run's row of the table, whether all is equal). checkouts: {"this": path, "other": path}."""
    found, failures, counts = {}, [], [""] * 9
    for side, checkout in checkouts.items():
        progress.set_description(f"{name}, {side} checkout")
        try:
            found[side] = values_of(launch(name, checkout, folder / side), name)
        except Failed as failure:
            failures.append(f"failed in {side} checkout: {failure}")
        progress.update()
    if not failures:
        ours = found["this"]
        counts = [max(value for place, value in ours.items() if place.startswith("metrics") and place.endswith(", step"))]
        counts += [sum(value.numel() if kind == "weights" else 1 for place, value in ours.items() if place.startswith(kind))
                   for kind in ("metrics", "summary", "ledger", "weights")]
        counts += [ours.get(f"summary, {key}") for key in ("pairs", "queries", "pseudo_labels", "audited")]
    verdict = "; ".join(failures) or differences(ours, found["other"])
    tqdm.write(f"{name}: {verdict}")
    cells = [name, f"`{shlex.join(command_of(name))}`", *(f"{n:,}" if n else "" for n in counts), verdict.replace("|", "/")]
    return f"| {' | '.join(cells)} |", verdict == "equal"


def commit_of(checkout):
    """Its short commit, and whether its code differs from that commit."""
    head, changed = (subprocess.run(["git", "-C", checkout, *words], text=True, stdout=subprocess.PIPE, check=True).stdout
                     for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "*.py", "*.json", "*.yaml"]))
    return head.strip() + (" with uncommitted changes" if changed else "")


def page_of(rows, good, commits):
    """The results page."""
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    packages = ("torch", "transformers", "deepspeed", "datasets", "peft")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    return f"""\
# The same behaviour in two checkouts

Made by

    python benchmarks/same_behaviour.py OTHER_CHECKOUT

**Verdict: {'the same' if all(good) else 'NOT the same'}.** {sum(good)} of {len(good)} runs are equal to the last bit.

- {commits}
- {cpu[0] if cpu else platform.machine()}, CPU only, one thread a process; Python {platform.python_version()}, {versions}
- compared: all fields of metrics.jsonl and summary.json but {', '.join(sorted(NOT_COMPARED))}; {', '.join(ANSWER)} of each
  answer in the ledger; the trained weights, bit for bit. The columns count the values
- dpo-resumed: the outputs of dpo without its results and its checkpoints after step {RESUME}; then the same command
- pairs, asked, pseudo-labels, audited: from the summary, to show what the run exercised
- tiny.yaml: `{json.dumps(TINY)}`

| run | command | steps | metrics | summary | ledger | weights | pairs | asked | pseudo-labels | audited | result |
| --- | --- {'| --: ' * 9}| --- |
""" + "\n".join(rows) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--this", type=Path, default=ROOT, help="a checkout in place of this one")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="only these")
    options = parser.parse_args()
    if "dpo-resumed" in options.runs and "dpo" not in options.runs[:options.runs.index("dpo-resumed")]:
        parser.error("--runs: dpo-resumed needs dpo before it")
    checkouts = {"this": options.this.resolve(), "other": options.other.resolve()}
    for path in checkouts.values():
        if not ((path / "train.py").is_file() and (path / ".git").exists()):
            parser.error(f"{path} is not a checkout of this project")
    commits = "this checkout: {}; the other: {}".format(*map(commit_of, checkouts.values()))
    print(commits)
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * len(options.runs)) as progress:
        write_task(Path(folder))
        rows, good = zip(*[compare(name, checkouts, Path(folder), progress) for name in options.runs])
    if options.runs == list(RUNS):
        (ROOT / "benchmarks" / "results" / "same_behaviour.md").write_text(page_of(rows, good, commits), encoding="utf-8")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
