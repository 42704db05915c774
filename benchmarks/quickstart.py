"""Does the quickstart hold on other base models than the one that this machine's rounding makes? Six, beside plain DPO.

    python benchmarks/quickstart.py [--outputs FOLDER]     half an hour on two cores; what has finished is not run again

Each base model, its pairs and their labels come from another seed of the built-in task. On each, the quickstart's config
runs as it is, as plain DPO, and with the values that it had before, which let the policy drift further. A sentence of the
task has 20 words at most. Writes benchmarks/results/quickstart.md.
"""

import argparse
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import mean

import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.trl_parity import cpu_name  # noqa: E402
from runtime import toy  # noqa: E402

SEEDS = range(6)
METHODS = {"ADPO": {}, "DPO": {"data_selection": False},
           "ADPO as it was before": {"beta": 0.5, "gamma": 1.3, "learning_rate": 1e-3}}


def run(folder, model, pairs, keys):
    """Train into `folder`, unless that has been done. Returns its summary and the log-probs of the preferred held-out
    responses, in nats, [before, after]."""
    if not (folder / "summary.json").exists():
        quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
        toy.run_train(quickstart | keys | {"model_name_or_path": str(model), "dataset_mixer": {str(pairs): 1.0},
                                           "output_dir": str(folder)}, folder.with_suffix(".yaml"), str(folder), quiet=True)
    rows = toy.read_jsonl(folder / "metrics.jsonl")
    logps = [row["logps/chosen"] for row in rows if row["split"] == "eval"]
    return json.loads((folder / "summary.json").read_text()), [logps[0], logps[-1]]


def generations(model, prompts):
    """(mean gold reward, mean number of words) of one response a prompt."""
    words = []

    def rewards(prompts, texts):
        words.extend(len(text.split()) for text in texts)
        return toy.gold_rewards_of(prompts, texts)
    return toy.mean_gold_reward(model, prompts, rewards=rewards), mean(words)


def results_of(seed, outputs):
    """{method: [share of labels bought, accuracy, change of the log-prob, gold reward, words]}, and "base": the last two."""
    model, pairs = toy.build(outputs / f"task-{seed}", seed=seed, quiet=True)
    prompts = [row["prompt"] for row in toy.read_jsonl(pairs / "test.jsonl")]
    found = {"base": generations(model, prompts)}
    for number, (method, keys) in enumerate(METHODS.items()):
        folder = outputs / f"run-{seed}-{number}"
        summary, (before, after) = run(folder, model, pairs, keys)
        found[method] = [summary["query_fraction"], summary["eval_accuracy"], after - before, *generations(folder, prompts)]
        print(f"seed {seed}, {method}:", *(f"{value:.3f}" for value in found[method]), flush=True)
    return found


def page(found):
    lines = ["# The quickstart on six base models", "", "    python benchmarks/quickstart.py", "",
             f"{cpu_name()}, Python {platform.python_version()}. Drift: by how many nats the log-prob of the preferred "
             "held-out response has changed. Gold reward and words are those of a generated response; the base models' own: "
             f"{mean(each['base'][0] for each in found):+.2f} and {mean(each['base'][1] for each in found):.1f}.", ""]
    for method, keys in METHODS.items():
        changed = ", ".join(f"`{key}: {value}`" for key, value in keys.items())
        lines += [f"## {method}", "", changed or "The config as it is.", "",
                  "| seed of the task | labels bought | held-out accuracy | drift | gold reward | words |",
                  "| --: | --: | --: | --: | --: | --: |"]
        rows = [(seed, each[method]) for seed, each in zip(SEEDS, found)]
        rows.append(("mean", [mean(values) for values in zip(*(values for _, values in rows))]))
        lines += [f"| {seed} | {100 * bought:.0f} % | {accuracy:.3f} | {drift:+.1f} | {gold:+.2f} | {words:.1f} |"
                  for seed, (bought, accuracy, drift, gold, words) in rows] + [""]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "quickstart-check")
    outputs = parser.parse_args().outputs.resolve()
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HOME": str(outputs / "cache")}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:  # not threads: sampling uses the global random state
        found = list(pool.map(partial(results_of, outputs=outputs), SEEDS))
    text = page(found)
    (ROOT / "benchmarks" / "results" / "quickstart.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
