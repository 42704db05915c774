"""Accuracy and reward for the labels bought: DPO, random subsets, the paper's ADPO, and what labels/threshold.py adds.

    python benchmarks/query_efficiency.py             5 to 20 seeds, two levels of label noise; two hours on two cores
    python benchmarks/query_efficiency.py --short     2 seeds of a smaller task, under five minutes; writes only to outputs/

Each run is `python train.py` on one thread, on the built-in task (runtime/toy.py) with 16,384 training pairs and 4,096 test
pairs whose labels have no noise. Runs go side by side. Every seed has its own model, pairs, labels and order. The learning
rate was chosen for DPO on all labels, with two seeds, before these runs; the rows "DPO, learning rate …" show half and twice
that rate. "Equal compute" trains on a random subset for as many steps as DPO takes on all pairs. Gold reward is the mean
over 512 responses, one to each of 512 test prompts.

The paper trains 7B models on pairs ranked by people or by a judge. Here the model is tiny, but the true label of every pair
is known.

A run that has finished is not run again; --report runs nothing and writes the results of the runs that have finished. Writes
benchmarks/results/query_efficiency.md, .json and .png.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from runtime import toy  # noqa: E402

NOISES = (0.05, 0.2)
BASE = {"max_length": 96, "max_prompt_length": 32, "beta": 0.1, "per_device_train_batch_size": 64,
        "per_device_eval_batch_size": 256, "learning_rate": 2e-3, "num_threads": 1, "save_strategy": "no",
        "logging_steps": 16, "preprocessing_num_workers": 1}
DPO = {"data_selection": "false"}
BUDGET = {"pseudo_labels": "replay"}
CALIBRATED = {"gate": "calibrated", "audit_fraction": 0.05}

# method: (line of the figure, or None; flags), in the order in which they run: what `targets` needs comes first.
METHODS = {
    "DPO, all labels": ("DPO, random subset, one epoch", DPO),
    "DPO, random 50 %, equal compute": ("DPO, random subset, equal compute", DPO | {"share": 0.5}),
    "budget 33 %, replay": ("budget, replay", BUDGET | {"target_query_fraction": 0.33}),
    "budget 25 %, replay": ("budget, replay", BUDGET | {"target_query_fraction": 0.25}),
    "DPO, random 25 %, equal compute": ("DPO, random subset, equal compute", DPO | {"share": 0.25}),
    "budget 50 %, replay": ("budget, replay", BUDGET | {"target_query_fraction": 0.5}),
    "calibrated gate, γ = 1.3, replay": ("calibrated gate, replay", CALIBRATED | BUDGET | {"gamma": 1.3}),
    "paper, γ = 1.3": ("ADPO as in the paper", {"gamma": 1.3}),
    "paper, γ = 0.7": ("ADPO as in the paper", {"gamma": 0.7}),
    "calibrated gate, γ = 0.3, replay": ("calibrated gate, replay", CALIBRATED | BUDGET | {"gamma": 0.3}),
    "calibrated gate, γ = 3, replay": ("calibrated gate, replay", CALIBRATED | BUDGET | {"gamma": 3.0}),
    "calibrated gate, γ = 1, replay": ("calibrated gate, replay", CALIBRATED | BUDGET | {"gamma": 1.0}),
    "calibrated gate, γ = 0.7, replay": ("calibrated gate, replay", CALIBRATED | BUDGET | {"gamma": 0.7}),
    "DPO, random 12.5 %, equal compute": ("DPO, random subset, equal compute", DPO | {"share": 0.125}),
    "paper, γ = 3": ("ADPO as in the paper", {"gamma": 3.0}),
    "paper without pseudo-labels, γ = 1.3": ("ADPO without pseudo-labels", {"gamma": 1.3, "pseudo_labels": "false"}),
    "paper without pseudo-labels, γ = 0.7": ("ADPO without pseudo-labels", {"gamma": 0.7, "pseudo_labels": "false"}),
    "DPO, random 50 %, one epoch": ("DPO, random subset, one epoch", DPO | {"share": 0.5, "num_train_epochs": 1}),
    "DPO, random 25 %, one epoch": ("DPO, random subset, one epoch", DPO | {"share": 0.25, "num_train_epochs": 1}),
    "DPO, random 12.5 %, one epoch": ("DPO, random subset, one epoch", DPO | {"share": 0.125, "num_train_epochs": 1}),
    "budget 33 %, no pseudo-labels": (None, {"target_query_fraction": 0.33, "pseudo_labels": "false"}),
    "calibrated gate, γ = 1.3, pseudo-labels": (None, CALIBRATED | {"gamma": 1.3}),
    "calibrated gate, γ = 1.3, no pseudo-labels": (None, CALIBRATED | {"gamma": 1.3, "pseudo_labels": "false"}),
    "DPO, learning rate 4e-3": (None, DPO | {"learning_rate": 4e-3}),
    "DPO, learning rate 1e-3": (None, DPO | {"learning_rate": 1e-3}),
}
# By noise: how many times as many seeds the methods get whose results are close. (Four times was decided after twice had
# left two intervals overlapping by 0.0013.)
TWICE = dict.fromkeys(["DPO, all labels", "DPO, random 50 %, equal compute", "budget 33 %, replay",
                       "calibrated gate, γ = 1, replay"], 2)
MORE = {0.05: TWICE | {"DPO, random 50 %, equal compute": 4, "calibrated gate, γ = 1, replay": 4}, 0.2: TWICE}
SHORT = ["DPO, all labels", "DPO, random 50 %, equal compute", "budget 33 %, replay", "paper, γ = 1.3"]
STYLES = {"DPO, random subset, one epoch": ("0.6", "o", ":"), "DPO, random subset, equal compute": ("0.35", "s", "--"),
          "ADPO as in the paper": ("tab:red", "v", "-."), "ADPO without pseudo-labels": ("tab:orange", "^", "-."),
          "calibrated gate, replay": ("tab:blue", "D", "-"), "budget, replay": ("black", "*", "-")}
STUDENT = dict(enumerate([12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
                          2.131, 2.120, 2.110, 2.101, 2.093], 2))  # 95 %, by number of values
MOST_SEEDS = max(STUDENT)


def run_folder(folder, noise, name, seed):
    return folder / f"noise-{noise:g}" / "".join(c if c.isalnum() or c in ".-" else "_" for c in name) / f"seed-{seed}"


def run(folder, task, noise, name, seed, train_pairs):
    """{"labels", "accuracy", "reward"} of one run, which is started unless it has finished before."""
    output = run_folder(folder, noise, name, seed)
    result = output / "result.json"
    if not result.exists():
        flags = dict(METHODS[name][1])
        share = flags.pop("share", 1)
        if share < 1:
            flags = {"max_train_samples": round(share * train_pairs), "num_train_epochs": 1 / share} | flags
        config = output.with_suffix(".yaml")
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(BASE | flags | {
            "model_name_or_path": str(task / "model"), "dataset_mixer": {str(task / f"pairs-noise-{noise:g}"): 1.0},
            "seed": seed, "output_dir": str(output)}))
        done = subprocess.run([sys.executable, "train.py", "--config", config], cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{config}: exit code {done.returncode}: {done.stderr[-1000:]}")
        summary = json.loads((output / "summary.json").read_text())
        prompts = [row["prompt"] for row in toy.read_jsonl(task / f"pairs-noise-{noise:g}" / "test.jsonl")][:512]
        found = {"labels": summary["queries"] / train_pairs, "accuracy": summary["eval_accuracy"],
                 "reward": toy.mean_gold_reward(output, prompts)}
        result.write_text(json.dumps(found))
    return json.loads(result.read_text())


def interval(values):
    """(mean, half the width of its 95 % interval by Student's t)."""
    if len(values) < 2:
        return values[0], math.nan
    return statistics.mean(values), STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))


def random_accuracy(runs, labels):
    """Accuracy of a random subset of this size at equal compute, interpolated over the logarithm of the size; None if no
    subset that small was measured."""
    points = sorted((interval([r["labels"] for r in runs[name].values()])[0],
                     interval([r["accuracy"] for r in runs[name].values()])[0])
                    for name in runs if "equal compute" in name or name == "DPO, all labels")
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if x0 <= labels <= x1:
            return y0 + (y1 - y0) * math.log(labels / x0) / math.log(x1 / x0)
    return None if labels < points[0][0] else points[-1][1]


def targets(runs, noise):
    """[(aim, whether it is reached, numbers)] for this level of noise.  runs: {method: {seed: result}}. An aim is left out
    until its runs have finished."""
    def of(name, key="accuracy"):
        return interval([r[key] for r in runs[name].values()])

    def text(name):
        mean, half = of(name)
        return f"{mean:.4f} ± {half:.4f}"

    half, everything = "DPO, random 50 %, equal compute", "DPO, all labels"
    share = 33 if noise < 0.1 else 50
    best = f"budget {share} %, replay"
    found = []
    if {best, everything} <= runs.keys():
        found.append((f"{share} % of the labels: within 1 point of DPO on all labels",
                      of(best)[0] >= of(everything)[0] - 0.01, f"{text(best)} against {text(everything)}"))
    if noise >= 0.1 and {best, half} <= runs.keys():
        found.append(("50 % of the labels: no worse than a random half at equal compute", of(best)[0] >= of(half)[0],
                      f"{text(best)} against {text(half)}"))
    for ours, random, what in (
            (best, half, "33 % of the labels: better than a random half"),
            ("budget 33 %, no pseudo-labels", half, "33 % of the labels, without replay: better than a random half"),
            ("calibrated gate, γ = 1, replay", half, "calibrated gate, γ = 1: better than a random half"),
            ("budget 25 %, replay", "DPO, random 25 %, equal compute", "25 % of the labels: better than a random quarter")):
        if noise < 0.1 and {ours, random} <= runs.keys():
            (a, da), (b, db) = of(ours), of(random)
            mean, wide = interval([runs[ours][seed]["accuracy"] - runs[random][seed]["accuracy"]
                                   for seed in runs[ours] if seed in runs[random]])
            found.append((f"{what} at equal compute, by more than both intervals", a - da > b + db,
                          f"{text(ours)} against {text(random)}; seed by seed {mean:+.4f} ± {wide:.4f}"))
    for name in runs:
        if name.startswith("calibrated") and name.endswith("replay"):
            labels, expected = of(name, "labels")[0], random_accuracy(runs, of(name, "labels")[0])
            if expected is not None:
                found.append((f"{name}: no worse than a random subset of its size", of(name)[0] >= expected,
                              f"{text(name)} against {expected:.4f} with {labels:.1%} of the labels"))
    for name in runs:
        if name.startswith("budget"):
            asked, worst = METHODS[name][1]["target_query_fraction"], [r["labels"] for r in runs[name].values()]
            off = max(abs(labels / asked - 1) for labels in worst)
            found.append((f"{name}: buys within 10 % of its target", off <= 0.1, f"at most {off:.1%} off"))
    return found


def draw(results, path):
    import matplotlib
    matplotlib.use("Agg")
    from matplotlib import pyplot
    figure, axes = pyplot.subplots(2, len(results), figsize=(6.4 * len(results), 8.4), sharex=True, squeeze=False)
    for column, (noise, runs) in enumerate(results.items()):
        for row, (key, label) in enumerate((("accuracy", "held-out accuracy"), ("reward", "gold reward of generations"))):
            axis = axes[row][column]
            for line, (colour, marker, style) in STYLES.items():
                points = sorted((interval([r["labels"] for r in runs[name].values()])[0],
                                 *interval([r[key] for r in runs[name].values()]))
                                for name in runs if METHODS[name][0] == line or
                                (line == "DPO, random subset, equal compute" and name == "DPO, all labels"))
                if points:
                    x, y, wide = zip(*points)
                    axis.errorbar([100 * v for v in x], y, wide, color=colour, marker=marker, linestyle=style, capsize=2,
                                  markersize=8 if marker == "*" else 5, label=line)
            middles = [interval([r[key] for r in runs[name].values()])[0] for name in runs if METHODS[name][0]]
            spare = 0.2 * (max(middles) - min(middles)) or 1  # every mean is in the picture; a wide interval may reach out
            axis.set_ylim(min(middles) - spare, max(middles) + spare)
            axis.set_ylabel(label)
            axis.grid(alpha=0.3)
        axes[0][column].set_title(f"{float(noise):.0%} of the labels wrong")
        axes[1][column].set_xlabel("labels bought, % of the pairs")
    axes[1][0].legend(fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def write_up(results, path, version):
    lines = ["# Query efficiency", "", "Made by `python benchmarks/query_efficiency.py`.", "",
             "![Accuracy and gold reward against labels bought](query_efficiency.png)", "",
             f"The built-in task (runtime/toy.py, version {version}). Each seed has its own model, pairs, labels and order. "
             "Numbers are means ± 95 % intervals (Student's t). β = 0.1, AdamW, 256 steps of 64 pairs, and a learning rate "
             "of 2e-3 unless the method names another. Accuracy: how often the implicit reward ranks the two responses of "
             "a test pair correctly, by the noiseless labels of 4,096 test pairs.", ""]
    for noise, runs in results.items():
        lines += [f"## {float(noise):.0%} of the labels wrong", "",
                  "| method | seeds | labels | accuracy | gold reward |", "| --- | --: | --: | --: | --: |"]
        for name in METHODS:
            if name in runs:
                cells = []
                for key, form in (("labels", "{:.1%}"), ("accuracy", "{:.4f}"), ("reward", "{:.2f}")):
                    mean, wide = interval([r[key] for r in runs[name].values()])
                    cells.append(form.format(mean) + ("" if key == "labels" else f" ± {form.format(wide)}"))
                lines.append(f"| {name} | {len(runs[name])} | {' | '.join(cells)} |")
        lines += ["", "| aim | reached | |", "| --- | --- | --- |"]
        lines += [f"| {what} | {'yes' if reached else '**no**'} | {numbers} |"
                  for what, reached, numbers in targets(runs, float(noise))]
        lines.append("")
    path.write_text("\n".join(lines), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="2 seeds of a smaller task, with some of the methods")
    parser.add_argument("--report", action="store_true", help="run nothing; write the results of the finished runs")
    parser.add_argument("--seeds", type=int, default=5, choices=range(1, MOST_SEEDS + 1), metavar="N",
                        help="default: 5; methods whose results are close get up to four times as many")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs side by side; default: one per core")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs", help="folder to work in; default: outputs")
    args = parser.parse_args()
    torch.set_num_threads(1)
    seeds, names, sizes = args.seeds, list(METHODS), (16384, 4096)
    if args.short:
        seeds, names, sizes = 2, SHORT, (4096, 1024)
    folder = args.outputs / ("query_efficiency_short" if args.short else "query_efficiency")
    results = {f"{noise:g}": {} for noise in NOISES}
    jobs = [(noise, name, seed) for name in names for noise in NOISES
            for seed in range(min(MOST_SEEDS, seeds * (1 if args.short else MORE[noise].get(name, 1))))]

    def work(job):
        noise, name, seed = job
        return job, run(folder.resolve(), folder.resolve() / f"task-{seed}", noise, name, seed, sizes[0])

    if args.report:
        done = [(job, json.loads(path.read_text())) for job in jobs
                for path in run_folder(folder, *job).glob("result.json")]
    else:
        for noise, seed in sorted({(noise, seed) for noise, _, seed in jobs}):
            toy.build(folder / f"task-{seed}", noise, *sizes, seed=seed)
        with ThreadPoolExecutor(args.jobs) as pool:
            done = list(tqdm(pool.map(work, jobs), total=len(jobs), desc="runs"))
    for (noise, name, seed), found in done:
        results[f"{noise:g}"].setdefault(name, {})[str(seed)] = found
    target = folder if args.short else ROOT / "benchmarks" / "results"
    (target / "query_efficiency.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(results, target / "query_efficiency.png")
    version = json.loads((folder / "task-0" / "model" / "toy.json").read_text())["version"]
    write_up(results, target / "query_efficiency.md", version)
    print((target / "query_efficiency.md").read_text())


if __name__ == "__main__":
    main()
