"""One run of benchmarks/query_efficiency.py: train a policy in this process, then measure it against the truth.

A worker process imports this module once and then trains one policy after the other, so that a run does not pay for the
imports again. Nothing here decides what is run; benchmarks/query_efficiency.py does.
"""

from runtime.launch import command  # first: it sets what DeepSpeed reads when it is imported

# isort: split
import contextlib
import json
import os
import shutil
import time
from pathlib import Path

import torch

import data
import train
from benchmarks import movies
from labels.ledger import Ledger
from runtime import toy
from runtime.model import load_tokenizer
from runtime.parse import parse_config

LAMBDAS = (0.25, 0.5, 1.0)
PROMPTS = 256  # one response to each, for each λ
TASKS = {"toy": (toy.build, toy.MAX_NEW_TOKENS), "movies": (movies.build, movies.MAX_NEW_TOKENS)}


def build(task, root, noise, seed, train_pairs, test_pairs):
    """Build one seed of a task, where it is not there yet.  root: the folder of the task.  noise: as "noise-0.2" or
    "flips-0.2"."""
    kind, level = noise.split("-")
    torch.set_num_threads(1)
    folder = root / f"seed-{seed}" if task == "toy" else root  # movies.build adds the seed's folder by itself
    TASKS[task][0](folder, float(level), train_pairs, test_pairs, seed=seed, flips=kind == "flips", quiet=True)


def run(task, keys, root):
    """Train with these keys of train.py and write what was measured to result.json in its output_dir.

    root: the folder of the task.  Raises RuntimeError where the run fails; its output is in the .log file beside its folder.
    """
    started, output = time.time(), Path(keys["output_dir"])
    shutil.rmtree(output, ignore_errors=True)  # a run that was cut short begins again
    output.parent.mkdir(parents=True, exist_ok=True)
    config, log = (output.with_name(f"{output.name}.{kind}") for kind in ("yaml", "log"))
    config.write_text(json.dumps(keys), encoding="utf-8")  # JSON is YAML
    with open(log, "w", encoding="utf-8") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        code = command(["--config", str(config)], train.main)
        found = {} if code else measure(task, config, output, root)
    if code:
        raise RuntimeError(f"{config}: exit code {code}: {log.read_text(encoding='utf-8').strip().splitlines()[-1]}")
    found["seconds"] = time.time() - started
    (output / "result.tmp").write_text(json.dumps(found), encoding="utf-8")
    os.replace(output / "result.tmp", output / "result.json")


def measure(task, path, output, root):
    """What a finished run is judged by, as a dictionary for JSON.  path: of its config."""
    config, summary = parse_config(["--config", str(path)]), json.loads((output / "summary.json").read_text())
    pairs = Path(next(iter(config.dataset_mixer)))
    rows = toy.read_jsonl(pairs / "test.jsonl")
    return {"queries": summary["queries"], "wrong": wrong_share(config, output),
            "accuracy": summary["eval_accuracy"], "log_loss": summary["eval_loss"],
            "pseudo_label_accuracy": summary["pseudo_label_accuracy"],
            "mixtures": mixtures(task, config.model_name_or_path, output, [row["prompt"] for row in rows[:PROMPTS]], root)}


def wrong_share(config, output):
    """Share of wrong labels among those that a run bought."""
    truths = data.load_split(config, load_tokenizer(config), "train", None)[2]  # {pair id: ±1}
    ledger = Ledger(output / "labels.sqlite")
    labels = ledger.db.execute("SELECT pair, label FROM answers WHERE label != 0").fetchall()
    ledger.close()
    return sum(label != truths[pair] for pair, label in labels) / len(labels)


def mixtures(task, reference, policy, prompts, root):
    """[[λ, KL(π_λ ‖ π_ref) in nats a response, mean gold reward]] of the mixtures of a policy with its reference.

    reference, policy: folders.  Different policies are compared at the same KL, and the mixtures between a policy and its
    reference pass through all values up to the policy's own.
    """
    with toy.seeded_and_silent(0):
        (base, tokenizer), (tuned, _) = toy.load(reference), toy.load(policy)
        texts, kl = sample_mixtures(tuned, base, tokenizer, prompts, TASKS[task][1])
    every = prompts * len(LAMBDAS)
    rewards = toy.gold_rewards_of(every, texts) if task == "toy" else movies.Reward(root)(every, texts)
    rewards = torch.tensor(rewards, dtype=torch.float64).view(len(LAMBDAS), -1).mean(1)
    return [[*row] for row in zip(LAMBDAS, kl.view(len(LAMBDAS), -1).mean(1).tolist(), rewards.tolist())]


@torch.no_grad()
def sample_mixtures(policy, reference, tokenizer, prompts, max_new_tokens):
    """A response to each prompt from each π_λ ∝ π_ref^(1−λ) π^λ, token by token, with the global random state.

    Policies that agree get the same samples, which takes most of the noise out of their difference.
    Returns (texts, one for each λ and prompt; KL(π_λ ‖ π_ref) of each in nats, the sum of those of its tokens).
    """
    batch = tokenizer(prompts * len(LAMBDAS), padding=True, padding_side="left", return_tensors="pt")
    mask, new, caches = batch.attention_mask, batch.input_ids, [None, None]
    weight = torch.tensor(LAMBDAS).repeat_interleave(len(prompts))[:, None]  # (R, 1)
    kl, alive, tokens = torch.zeros(len(new)), torch.ones(len(new), dtype=torch.bool), []
    for _ in range(max_new_tokens):
        logits, positions = [], (mask.cumsum(1) - 1)[:, -new.shape[1]:].clamp(min=0)
        for n, model in enumerate((reference, policy)):
            out = model(input_ids=new, attention_mask=mask, position_ids=positions, past_key_values=caches[n],
                        use_cache=True)
            logits.append(out.logits[:, -1])  # (R, V)
            caches[n] = out.past_key_values
        mixed = torch.lerp(*logits, weight).log_softmax(-1)  # (R, V)  log π_λ
        chances = mixed.exp()
        kl += alive * (chances * (mixed - logits[0].log_softmax(-1))).sum(-1)
        draws = torch.rand(len(chances), 1)
        new = torch.searchsorted(chances.cumsum(-1), draws).clamp(max=chances.shape[1] - 1)  # (R, 1)
        new[~alive] = tokenizer.pad_token_id
        tokens.append(new)
        alive &= new[:, 0] != tokenizer.eos_token_id
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if not alive.any():
            break
    starts = tokenizer.batch_decode(batch.input_ids, skip_special_tokens=True)
    wholes = tokenizer.batch_decode(torch.cat([batch.input_ids, *tokens], 1), skip_special_tokens=True)
    return [whole[len(start):] for start, whole in zip(starts, wholes)], kl
