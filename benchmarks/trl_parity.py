"""Do plain DPO and SFT here compute the same as TRL? Compares train.py (data_selection: false, or objective: sft) with the
DPOTrainer and SFTTrainer of TRL 1.16, step by step, on the same model and the same rows in the same order.

    python benchmarks/trl_parity.py                      makes TRL's environment in outputs/trl-env on the first run
    python benchmarks/trl_parity.py --trl-python PATH    uses a Python that already has TRL
    python benchmarks/trl_parity.py --outputs DIR --results FILE    works in DIR and writes FILE

A few minutes on one CPU thread. It makes the built-in task (runtime/toy.py), asks Schedule which rows each micro-batch
takes, and gives TRL those rows in that order, as {prompt, chosen, rejected} or {prompt, completion}. Both run for 20 steps,
and what they log at each step is compared. Token ids are compared too, because both sides start from the text.

TRL's trainers are not modified. Their sampler is set to sequential, and the log is read from the trainer's state, where
numbers are not rounded. Two losses are special, as results/trl_parity.md explains: TRL's sigmoid loss has no label
smoothing, and its ipo loss is a different one.

Plain DPO is the paper's baseline, so there is nothing to depart from. Writes benchmarks/results/trl_parity.md. Exit code 0:
every loss is within 1e-4 of TRL's, relative to it; 1: one is not, or token ids differ; 2: the benchmark could not run.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TRL = "1.16.0"
PEER_PACKAGES = (["torch==2.13.0"], ["transformers==5.23.0", f"trl=={TRL}"])  # torch first: nothing else chooses it
TOLERANCE = 1e-4  # of each loss, relative to TRL's
# 256 pairs in steps of 16: the 20 steps reach into a second epoch, with another order. Some labels are wrong.
TASK = {"train_pairs": 256, "test_pairs": 16, "label_noise": 0.05}
# For both sides. The model has 128 positions and no pair is longer, so nothing is truncated.
COMMON = {"max_length": 128, "max_steps": 20, "learning_rate": 1e-3, "lr_scheduler_type": "cosine",
          "weight_decay": 0.0, "max_grad_norm": 1.0, "bf16": False, "logging_steps": 1, "save_strategy": "no"}
BETA = 0.1
WARMUP = 0.1  # share of the steps; TRL's key for it, warmup_steps, takes a share too

# name: (loss_type, label_smoothing, pairs per micro-batch, micro-batches per step) for us, and the same for TRL
CASES = {
    "sigmoid": (("sigmoid", 0.0, 16, 1), ("sigmoid", 0.0, 16, 1)),
    "sigmoid, accumulation 2": (("sigmoid", 0.0, 8, 2), ("sigmoid", 0.0, 8, 2)),
    # TRL's `sigmoid` has no label smoothing (1.16 accepts the key and ignores it), but its `aot` does. `aot` sorts the
    # log-ratios of a micro-batch; a micro-batch of one pair has nothing to sort, so there it is the smoothed sigmoid loss.
    "sigmoid, label smoothing 0.1": (("sigmoid", 0.1, 16, 1), ("aot", 0.1, 1, 16)),
    "hinge": (("hinge", 0.0, 16, 1), ("hinge", 0.0, 16, 1)),
    "SFT": (("sft", 0.0, 16, 1), ("sft", 0.0, 16, 1)),
    "SFT, accumulation 2": (("sft", 0.0, 8, 2), ("sft", 0.0, 8, 2)),
}
METRICS = ("loss", "grad_norm", "learning_rate", "logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected",
           "rewards/margins", "rewards/accuracies")
SFT_METRICS = METRICS[:3]
NOTES = """\
- `sigmoid, label smoothing 0.1`: TRL's `sigmoid` loss ignores `label_smoothing`, so TRL runs `aot` instead, which applies
  it. `aot` sorts each micro-batch; with micro-batches of one pair, 16 to a step, the sort changes nothing.
- `ipo` is not compared: TRL divides each log-ratio by the number of tokens in its response; here `ipo` uses the sum, as
  equation 17 of its paper does.
- `rewards/accuracies`: a margin of 0 counts as half right here and as wrong in TRL. In the first two steps every margin is
  0 (the first update has learning rate 0), so this metric is compared from step 3 on.
- Rewards are differences of log-probs and pass through 0; close to 0 their relative differences are large."""


class Stop(Exception):
    """The comparison cannot run; the message says why. Exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# TRL's side. `peer` runs in TRL's environment, so it imports only TRL and what TRL needs.

def peer(job_path):
    """Train with DPOTrainer or SFTTrainer on the job's rows, in their order, and write its log and its token ids."""
    import datasets
    import torch
    import transformers
    import trl

    job = json.loads(Path(job_path).read_text(encoding="utf-8"))
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    loss_type, label_smoothing, micro_pairs, micro_steps = job["case"]
    arguments = {
        **job["common"], "output_dir": job["output"], "per_device_train_batch_size": micro_pairs,
        "gradient_accumulation_steps": micro_steps, "warmup_steps": job["warmup"], "optim": "adamw_torch",
        "train_sampling_strategy": "sequential", "gradient_checkpointing": False, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True}
    both = {"model": transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32),
            "processing_class": transformers.AutoTokenizer.from_pretrained(job["model"]),
            "train_dataset": datasets.Dataset.from_list(job["rows"])}
    if loss_type == "sft":
        trainer = trl.SFTTrainer(args=trl.SFTConfig(**arguments), **both)
        cuts = [(row["input_ids"], row["labels"].count(-100)) for row in trainer.train_dataset]  # −100: a prompt token
        tokens = [(ids[:cut], ids[cut:]) for ids, cut in cuts]
    else:
        arguments |= {"beta": job["beta"], "loss_type": [loss_type], "label_smoothing": label_smoothing}
        trainer = trl.DPOTrainer(args=trl.DPOConfig(**arguments), **both)
        tokens = list(zip(*(trainer.train_dataset[name][:] for name in ("prompt_ids", "chosen_ids", "rejected_ids"))))
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    Path(job["result"]).write_text(json.dumps({
        "log": log, "tokens": tokens, "dtype": str(trainer.model.dtype)}), encoding="utf-8")


def peer_python(outputs, given):
    """The Python that has TRL; makes its environment if needed. Raises Stop."""
    return environment(outputs / "trl-env", PEER_PACKAGES, {"trl": TRL}, given, "--trl-python")


def environment(folder, installs, needed, given, flag):
    """The Python of a peer's environment: the one given, or one in `folder`, which is made if it is missing. Raises Stop.

    installs: arguments of each `pip install`.  needed: {package: version}.  flag: the option that names another Python.
    """
    python = Path(given) if given else folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not given and not python.exists():
        print(f"making {folder}", flush=True)
        venv.create(folder, with_pip=True)
    if not given and versions_of(python, needed) != needed:
        for packages in installs:
            if subprocess.run([python, "-m", "pip", "install", *packages]).returncode:
                raise Stop(f"pip could not install {' '.join(packages)}; give a Python that has them with {flag}")
    found = versions_of(python, needed)
    for name, version in needed.items():
        if found.get(name) != version:
            raise Stop(f"{python}: needs {name} {version}, found {found.get(name) or 'none'}")
    return python


def versions_of(python, names=("torch", "transformers", "trl", "accelerate", "datasets")):
    """{package: version} of those of the packages that a Python has, in the given order. Raises Stop."""
    code = ("import importlib.metadata as m, json; "
            "have = {d.metadata['Name'].replace('-', '_').lower(): d.version for d in m.distributions()}; "
            f"print(json.dumps({{n: have[n] for n in {list(names)} if n in have}}))")
    try:
        return json.loads(subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError, json.JSONDecodeError) as error:
        raise Stop(f"{python}: not a Python that runs ({type(error).__name__})")


# ----------------------------------------------------------------------------------------------------------------------
# Our side

def our_config(case, model_dir, rows_dir, output):
    """The keys of train.py for one case."""
    loss_type, label_smoothing, micro_pairs, micro_steps = case
    objective = {"objective": "sft"} if loss_type == "sft" else {
        "beta": BETA, "data_selection": False, "loss_type": loss_type, "label_smoothing": label_smoothing}
    return COMMON | objective | {
        "model_name_or_path": str(model_dir), "dataset_mixer": {str(rows_dir): 1.0}, "dataset_splits": ["train"],
        "do_eval": False, "per_device_train_batch_size": micro_pairs, "gradient_accumulation_steps": micro_steps,
        "warmup_ratio": WARMUP, "max_prompt_length": 64, "num_threads": 1, "output_dir": str(output)}


def rows_in_order(config_path, rows_dir):
    """The rows that a run takes, in order: as text for TRL, and as our token ids."""
    import data
    import train
    from runtime import toy
    from runtime.parse import parse_config
    config = parse_config(["--config", str(config_path)])
    data.datasets.disable_progress_bars()
    renderer = data.Renderer(train.load_tokenizer(config), config.max_prompt_length, config.max_length)
    pairs, labels, _ = data.load_pairs(config.dataset_mixer, config.dataset_splits, renderer, "train", say=lambda _: None,
                                       examples=config.objective == "sft")
    rows = toy.read_jsonl(rows_dir / "train.jsonl")
    if len(pairs) != len(rows):
        raise Stop(f"{len(rows) - len(pairs)} of {len(rows)} toy pairs were dropped, so the index of a pair is not its row")
    schedule = train.Schedule(config, pairs)
    steps = map(schedule.rows, range(schedule.total_steps))
    order = [i for rows_of_step in steps for micro_batch in schedule.micro_batches(rows_of_step) for i in micro_batch]
    texts, tokens = [], []
    for i in order:
        row, ids = rows[i], pairs.table[i]
        if config.objective == "sft":
            texts.append(row)
            tokens.append([ids["prompt_ids"], ids["first_ids"]])
            continue
        chosen, rejected = ("response_a", "response_b") if row["label"] == "a" else ("response_b", "response_a")
        texts.append({"prompt": row["prompt"], "chosen": row[chosen], "rejected": row[rejected]})
        both = ids["first_ids"], ids["second_ids"]
        tokens.append([ids["prompt_ids"], *(both if labels[ids["id"]] > 0 else both[::-1])])
    return texts, tokens


def write_examples(pairs_dir, folder):
    """Write the first response of each toy pair as {prompt, completion}, for SFT."""
    from runtime import toy
    folder.mkdir()
    toy.write_jsonl(folder / "train.jsonl", [{"prompt": row["prompt"], "completion": row["response_a"]}
                                             for row in toy.read_jsonl(pairs_dir / "train.jsonl")])


# ----------------------------------------------------------------------------------------------------------------------
# Comparison

def run(command, log_path):
    """Run a command on one CPU thread, offline, with caches beside its log, which are therefore empty when a case begins.
    Raises Stop with its last line of output if it fails."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu",
                        "HF_HUB_OFFLINE": "1", "HF_HOME": str(log_path.parent / "cache")}
    with open(log_path, "w", encoding="utf-8") as log:
        code = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        lines = log_path.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no output")
        raise Stop(f"{log_path}: exit code {code}, {last}")


def run_case(name, folder, python, model_dir, rows_dir):
    """Run both sides of one case. Returns (our log, TRL's log), one row per step, and how many rows differ in token ids.
    Raises Stop."""
    folder.mkdir()
    ours, theirs = CASES[name]
    config_path = folder / "config.yaml"  # JSON is YAML
    config = our_config(ours, model_dir, rows_dir, folder / "ours")
    config_path.write_text(json.dumps(config, indent=1), encoding="utf-8")
    texts, tokens = rows_in_order(config_path, rows_dir)
    job = {"case": theirs, "common": COMMON, "beta": BETA, "warmup": WARMUP, "model": str(model_dir),
           "output": str(folder / "trl"), "result": str(folder / "trl.json"), "rows": texts}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    print(f"{name}: train.py", flush=True)
    run([sys.executable, "train.py", "--config", str(config_path)], folder / "ours.log")
    print(f"{name}: TRL", flush=True)
    run([str(python), str(Path(__file__).resolve()), "--peer", str(folder / "job.json")], folder / "trl.log")

    result = json.loads((folder / "trl.json").read_text(encoding="utf-8"))
    lines = (folder / "ours" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    logs = [row for row in map(json.loads, lines) if row["split"] == "train"], result["log"]
    for side, log in zip(("train.py", "TRL"), logs):
        if [row["step"] for row in log] != list(range(1, COMMON["max_steps"] + 1)):
            raise Stop(f"{name}: {side} logged {len(log)} steps, expected {COMMON['max_steps']}")
    if result["dtype"] != "torch.float32":
        raise Stop(f"{name}: TRL trained in {result['dtype']}, expected torch.float32")
    longest = max(len(prompt) + max(map(len, responses)) for prompt, *responses in result["tokens"])
    if longest > COMMON["max_length"]:
        raise Stop(f"{name}: a row of {longest} tokens would be cut at max_length {COMMON['max_length']}")
    different = sum(a != b for a, b in zip(tokens, result["tokens"], strict=True))
    return logs, different


def difference(ours, theirs):
    """(absolute difference, the same relative to TRL's value: 0 if both are 0)."""
    gap = abs(ours - theirs)
    return gap, gap / abs(theirs) if theirs else float("inf") if gap else 0.0


def report_case(name, logs, different):
    """(the section about a case, its largest relative difference of a loss)."""
    steps = list(zip(*logs))
    lines = [f"## {name}", "",
             "| step | loss, train.py | loss, TRL | relative difference |", "| --: | --: | --: | --: |"]
    for a, b in steps:
        lines.append(f"| {a['step']} | {a['loss']:.8f} | {b['loss']:.8f} | {difference(a['loss'], b['loss'])[1]:.1e} |")
    lines += ["", "| largest difference over all steps | absolute | relative to TRL |", "| --- | --: | --: |"]
    worst = {}
    for metric in SFT_METRICS if CASES[name][0][0] == "sft" else METRICS:
        compared = steps[2:] if metric == "rewards/accuracies" else steps
        gaps = [difference(a[metric], b[metric]) for a, b in compared]
        worst[metric] = max(relative for _, relative in gaps)
        lines.append(f"| {metric} | {max(gap for gap, _ in gaps):.1e} | {worst[metric]:.1e} |")
    total = len(steps) * CASES[name][0][2] * CASES[name][0][3]
    lines += ["", f"Rows with the same token ids on both sides: {total - different} of {total}.", ""]
    return "\n".join(lines), worst["loss"]


def cpu_name():
    """The name of the CPU, as the kernel reports it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def document(reports, worst, different, peer_versions):
    """The results page."""
    ours = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "deepspeed", "datasets")}
    listed = [", ".join(f"{name} {version}" for name, version in found.items()) for found in (ours, peer_versions)]
    held = max(worst.values()) <= TOLERANCE and not different
    table = "\n".join(f"| {name} | {value:.1e} |" for name, value in worst.items())
    verdict = (f"**Verdict: {'the same' if held else 'NOT the same'}.** Largest relative difference of a loss over "
               f"{len(worst)} settings and {COMMON['max_steps']} steps each: {max(worst.values()):.1e} (limit "
               f"{TOLERANCE:.0e}); rows with different token ids: {different}.")
    return f"""\
# Plain DPO and SFT against TRL's trainers

Made by

    python benchmarks/trl_parity.py

{verdict}

| setting | largest relative difference of a loss |
| --- | --: |
{table}

- train.py (`data_selection: false`, or `objective: sft` on the first response of each pair): {listed[0]}
- TRL: {listed[1]}
- CPU: {cpu_name()}, one thread, fp32, Python {platform.python_version()}
- the toy model and {TASK['train_pairs']} of its pairs, {TASK['label_noise']:.0%} of the labels wrong; \
{COMMON['max_steps']} steps of 16 pairs, which reach into a second epoch
- both: β {BETA}, AdamW, learning rate {COMMON['learning_rate']:g} (cosine, {WARMUP:.0%} linear warm-up), \
weight decay {COMMON['weight_decay']:g}, gradients clipped at {COMMON['max_grad_norm']:g}

Known differences:

{NOTES}

""" + "\n".join(reports)


def main(options):
    outputs = Path(options.outputs).resolve()
    outputs.mkdir(parents=True, exist_ok=True)
    python = peer_python(outputs, options.trl_python)
    sys.path.insert(0, str(ROOT))
    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch

    from runtime import toy
    torch.set_num_threads(1)
    work = outputs / "trl-parity"
    shutil.rmtree(work, ignore_errors=True)  # or the toy task of an earlier version would be reused
    try:
        model_dir, pairs_dir = toy.build(work / "toy", **TASK)
    except ValueError as error:
        raise Stop(str(error))
    write_examples(pairs_dir, examples := work / "examples")
    reports, worst, different = [], {}, 0
    for name in CASES:
        folder = work / name.replace(", ", "-").replace(" ", "-")
        rows_dir = examples if CASES[name][0][0] == "sft" else pairs_dir
        logs, other_tokens = run_case(name, folder, python, model_dir, rows_dir)
        report, worst[name] = report_case(name, logs, other_tokens)
        reports.append(report)
        different += other_tokens
        print("\n" + report, flush=True)
    text = document(reports, worst, different, versions_of(python))
    results = Path(options.results)
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(text, encoding="utf-8")
    print(text[text.index("**Verdict"):text.index("- train.py")], end="")
    return 0 if max(worst.values()) <= TOLERANCE and not different else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--trl-python", metavar="PATH",
                        help="a Python that has TRL; default: one made in outputs/trl-env")
    parser.add_argument("--outputs", metavar="DIR", default=ROOT / "outputs", help="folder to work in; default: outputs")
    parser.add_argument("--results", metavar="FILE", default=Path(__file__).parent / "results" / "trl_parity.md",
                        help="file to write; default: benchmarks/results/trl_parity.md")
    parser.add_argument("--peer", metavar="JOB", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        sys.exit(peer(options.peer) if options.peer else main(options))
    except Stop as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
