"""Do two checkouts of this project compute the same? For changes that must not change behaviour, such as moving code.

    python benchmarks/same_behaviour.py OTHER_CHECKOUT                    about ten minutes on two cores
    python benchmarks/same_behaviour.py OTHER_CHECKOUT --runs sft lora    only these; writes no page

Each run in RUNS is started in both checkouts from the command line, on the CPU with one thread. All that the two wrote to
metrics.jsonl, summary.json, the ledger's answers and the trained weights must be equal to the last bit, except what measures
time or memory (NOT_COMPARED). A metric that only one of them writes is a difference. Each checkout builds the toy task
of the quickstart itself; in all other runs both read the same tiny random model and the same pairs.

Writes benchmarks/results/same_behaviour.md. Exit code 0: all is equal; 1: a run differs or failed; 2: wrong arguments.
"""

import argparse
import json
import math
import os
import platform
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from importlib.metadata import version
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
    "two-processes": dict(gamma=0.1, deepspeed="ds_config.json", gradient_accumulation_steps=2, max_steps=8),
    "audits": dict(audit_fraction=0.2, gamma=0.1, num_train_epochs=2),
    "committee": dict(dataset_mixer="{FOLDER/easy: 1.0}", label_budget=0.33, num_train_epochs=2),
    "lora": dict(gamma=0.1, use_peft="true", lora_r=4, lora_alpha=8, lora_target_modules="all-linear"),
    "sft": dict(objective="sft", dataset_mixer="{FOLDER/texts: 1.0}"),
    "dpo": DPO, "dpo-resumed": DPO,
    "quickstart": dict(config="configs/quickstart.yaml", toy_dir="OUTPUT-toy"),
}
NOT_COMPARED = {"tokens_per_second", "wall_seconds", "peak_memory_bytes"}  # fields of metrics.jsonl and summary.json
ANSWER = ("pair", "label", "step", "audit", "source", "margin")  # columns of the ledger


def write_task(folder):
    """The tiny task: model/, tiny.yaml, pairs/, texts/ for SFT, and easy/: pairs whose longer response is the better one,
    which a committee learns in seconds."""
    from runtime import toy
    toy.write_untrained(folder, {"pairs/train.jsonl": 480, "pairs/test.jsonl": 40})
    for name, convert in (
            ("texts", lambda row: {"prompt": row["prompt"], "completion": row["response_a"]}),
            ("easy", lambda row: {**row, "label": "a" if len(row["response_a"]) >= len(row["response_b"]) else "b"})):
        (folder / name).mkdir()
        for file in (folder / "pairs").iterdir():
            toy.write_jsonl(folder / name / file.name, map(convert, toy.read_jsonl(file)))
    (folder / "tiny.yaml").write_text(json.dumps(TINY).replace("FOLDER", str(folder)))  # JSON is YAML


def command_of(name):
    """The command of a run, with FOLDER and OUTPUT in place of paths."""
    launcher = ["deepspeed", "--num_gpus", "2"] if name == "two-processes" else ["python"]
    keys = {"config": "FOLDER/tiny.yaml"} | RUNS[name] | {"output_dir": "OUTPUT"}
    return [*launcher, "train.py", *(f"--{key}={value}" for key, value in keys.items())]


def launch(name, checkout, home):
    """Run it in a checkout, with all that it writes under `home`. Returns its output folder. Raises RuntimeError."""
    output, kept, binaries = home / name, home / name / f"checkpoint-{RESUME}", Path(sys.executable).parent
    if name == "dpo-resumed":  # from what a kill after that checkpoint leaves, but with all the answers
        shutil.copytree(home / "dpo", output, ignore=lambda _, names: {
            entry for entry in names if entry in ("summary.json", "model.safetensors")
            or entry.startswith("checkpoint-") and entry != kept.name})
        copied = kept.stat().st_ino
    command = [part.replace("FOLDER", str(home.parent)).replace("OUTPUT", str(output)) for part in command_of(name)]
    port = ["--master_port", str(20000 + os.getpid() % 10000)]  # one of its own: two of these may run at once
    command[:1] = [str(binaries / "deepspeed"), *port] if command[0] == "deepspeed" else [sys.executable]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {
        "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu",
        "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"}  # the launcher starts the first `python` on the path
    done = subprocess.run(command, cwd=checkout, env=environment, text=True, capture_output=True)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(next((line for line in lines if line.startswith("error: ")), lines[-1]))
    if name == "dpo-resumed" and kept.stat().st_ino != copied:  # it was written again
        raise RuntimeError(f"it started over instead of going on from {kept.name}")
    return output


def values_of(output, name):
    """{where a value is: the value} of all that is compared; a tensor is (dtype, *shape, bytes). Raises OSError."""
    values = {}
    for n, row in enumerate(map(json.loads, (output / "metrics.jsonl").read_text().splitlines()), 1):
        values |= {f"metrics, row {n} ({row['split']}, step {row['step']}), {key}": row[key] for key in row}
    values |= {f"summary, {key}": value for key, value in json.loads((output / "summary.json").read_text()).items()}
    values = {place: value for place, value in values.items() if place.rpartition(", ")[2] not in NOT_COMPARED}
    weights = load_file(output / ("adapter_model.safetensors" if name == "lora" else "model.safetensors"))
    values |= {f"weights, {key}": (str(tensor.dtype), *tensor.shape, tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
               for key, tensor in weights.items()}
    if name != "sft":
        ledger = sqlite3.connect(f"file:{output / 'labels.sqlite'}?mode=ro", uri=True)
        for answer in ledger.execute(f"SELECT {', '.join(ANSWER)} FROM answers ORDER BY step, pair"):
            values |= {f"ledger, pair {answer[0]}, {key}": value for key, value in zip(ANSWER, answer)}
    return values


def differences(ours, theirs):
    """"equal", or how many entries differ and the first of them; a tensor is one entry."""
    sides = [{place: (type(value), value) for place, value in values.items()} for values in (ours, theirs)]  # 1 is not 1.0
    places = [place for place in ours | theirs if sides[0].get(place) != sides[1].get(place)]
    if not places:
        return "equal"
    here, there = ("other bytes" if places[0].startswith("weights") else x.get(places[0], "absent") for x in (ours, theirs))
    return f"{len(places):,} differ; the first: {places[0]}: {here} here, {there} in the other"


def compare(name, checkouts, folder, progress):
    """(the run's row of the table, whether all is equal). checkouts: {"this": path, "other": path}."""
    found, failures, counts = {}, [], [""] * 9
    for side, checkout in checkouts.items():
        progress.set_description(f"{name}, {side} checkout")
        try:
            found[side] = values_of(launch(name, checkout, folder / side), name)
        except (RuntimeError, OSError, ValueError, sqlite3.Error) as error:
            reason = f"the {side} checkout failed: {error}".replace("|", "/")
            failures.append(reason.replace(str(folder), "FOLDER").replace(str(checkout), "CHECKOUT"))
        progress.update()
    if not failures:
        ours = found["this"]
        counts = [max(ours[place] for place in ours if place.startswith("metrics") and place.endswith(", step"))]
        counts += [sum(place.startswith(kind) for place in ours) for kind in ("metrics", "summary", "ledger")]
        counts += [sum(math.prod(value[1:-1]) for place, value in ours.items() if place.startswith("weights"))]
        counts += [ours.get(f"summary, {key}") for key in ("pairs", "queries", "pseudo_labels", "audited")]
    verdict = "; ".join(failures) or differences(ours, found["other"])
    tqdm.write(f"{name}: {verdict}")
    cells = [name, f"`{shlex.join(command_of(name))}`", *(f"{n:,}" if n else "" for n in counts), verdict]
    return f"| {' | '.join(cells)} |", verdict == "equal"


def commit_of(checkout):
    """Its short commit, and whether its code differs from that commit."""
    head, changed = (subprocess.check_output(["git", "-C", checkout, *words.split()], text=True).strip()
                     for words in ("rev-parse --short HEAD", "status --porcelain *.py *.json *.yaml"))
    return f"{head} with uncommitted changes" if changed else head


def page_of(rows, good, commits):
    """The results page."""
    cpu = [line.split(": ")[1] for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed", "datasets", "peft"))
    return f"""\
# The same behaviour in two checkouts

Made by

    python benchmarks/same_behaviour.py OTHER_CHECKOUT

**Verdict: {'the same' if all(good) else 'NOT the same'}.** {sum(good)} of {len(good)} runs are equal to the last bit.

- {commits}
- {cpu[0] if cpu else platform.machine()}, CPU only, one thread a process; Python {platform.python_version()}, {versions}
- compared: all fields of metrics.jsonl and summary.json but {', '.join(sorted(NOT_COMPARED))};
  {', '.join(ANSWER)} of each answer in the ledger; the trained weights, bit for bit. The columns count the values
- dpo-resumed: the outputs of dpo without its results and its checkpoints after step {RESUME}; then the same command
- pairs, asked, pseudo-labels and audited are of the summary, to show what the run exercised
- tiny.yaml: `{json.dumps(TINY)}`

| run | command | steps | metrics | summary | ledger | weights | pairs | asked | pseudo-labels | audited | result |
| --- | --- {'| --: ' * 9}| --- |
""" + "\n".join(rows) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--this", type=Path, default=ROOT, help="a checkout in place of this one; writes no page")
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=list(RUNS), help="only these; dpo-resumed goes after dpo")
    options = parser.parse_args()
    checkouts = {"this": options.this.resolve(), "other": options.other.resolve()}
    if not all((path / ".git").exists() for path in checkouts.values()):
        parser.error("expected the folder of a checkout")
    print(commits := "this checkout: {}; the other: {}".format(*map(commit_of, checkouts.values())))
    with tempfile.TemporaryDirectory() as folder, tqdm(total=2 * len(options.runs)) as progress:
        write_task(Path(folder))
        rows, good = zip(*[compare(name, checkouts, Path(folder), progress) for name in options.runs])
    if options.runs == list(RUNS) and options.this == ROOT:
        (ROOT / "benchmarks" / "results" / "same_behaviour.md").write_text(page_of(rows, good, commits), encoding="utf-8")
    sys.exit(not all(good))


if __name__ == "__main__":
    main()
