"""The rounds of docs/rounds.md, run on the built-in task with a reward model as the judge. About three minutes.

    python -m pytest tests/test_rounds.py -n 0 -m slow -s      prints the table of that page
"""

import random
import re
import shlex
import subprocess
import sys

import pytest
import torch
from helpers import ROOT, Run, launcher_environment
from test_generate import lines
from transformers import LlamaConfig, LlamaForSequenceClassification

from runtime import toy

PAGE = (ROOT / "docs" / "rounds.md").read_text()
ROUNDS = [[shlex.split(line) for line in block.splitlines()] for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)]


def test_a_round_has_four_commands():
    programs = [[next(word for word in words if word.endswith(".py")) for words in commands] for commands in ROUNDS]
    assert programs == [["tools/generate.py", "train.py", "tools/label.py", "tools/generate.py"],
                        ["tools/generate.py", "tools/ledger.py", "train.py", "tools/label.py"]]


def train_reward_model(folder, steps=200):
    """A sequence classifier that has learned the gold reward. Returns how often it prefers the better of two responses."""
    torch.manual_seed(0)
    rng, tokenizer = random.Random(0), toy.make_tokenizer()
    model = LlamaForSequenceClassification(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=128, num_labels=1, pad_token_id=tokenizer.pad_token_id))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        texts = [toy.write_response(rng) for _ in range(256)]
        gold = torch.tensor([toy.gold_reward(text) for text in texts])
        batch = tokenizer([f"review of the {rng.choice(toy.PLACES)} :{text}" for text in texts], padding=True,
                          padding_side="right", return_tensors="pt")
        scores = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0]
        optimizer.zero_grad()
        (scores - gold).square().mean().backward()
        optimizer.step()
        schedule.step()
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    right = (scores[::2] > scores[1::2]) == (gold[::2] > gold[1::2])
    return right.float().mean().item()


def on_the_built_in_task(words, judge):
    """A command of the page as it is run here, or None for the page that people use."""
    if "tools/label.py" in words or "held_out.jsonl" in words:
        return None
    words = ["toy" if word in ("MODEL", "prompts.jsonl") else word for word in words if word not in ("python", "deepspeed")]
    words = ["configs/quickstart.yaml" if word.startswith("configs/") else "48" if word == "512" else word for word in words]
    words = [str(ROOT / word) if (ROOT / word).is_file() else word for word in words]
    if "human" in words:
        at = words.index("human")
        words[at:at + 1] = ["judge", "--judge", "reward_model", "--judge_model", str(judge)]
    elif "--pairs" in words:
        words += ["--batch_size", "256"]
    return [sys.executable, *words]


@pytest.mark.slow
def test_two_rounds_raise_the_gold_reward(tmp_path):
    agreement = train_reward_model(tmp_path / "reward")
    assert agreement > 0.9
    for words in ROUNDS[0] + ROUNDS[1]:
        command = on_the_built_in_task(words, tmp_path / "reward")
        if command:
            done = subprocess.run(command, cwd=tmp_path, env=launcher_environment(), text=True, capture_output=True,
                                  timeout=1800)
            assert done.returncode == 0, done.stderr[-2000:]

    prompts = toy.split_prompts(0)[1]  # none of them was trained on
    folders = [tmp_path / "outputs" / name for name in ("toy/model", "round-1", "round-2")]
    rewards = [toy.mean_gold_reward(folder, prompts) for folder in folders]
    ended = [share_that_ends(folder, prompts) for folder in folders]
    runs = [Run(folder, "", "", 0) for folder in folders[1:]]
    bought = [0, *(run.summary()["queries"] for run in runs)]
    print(f"\nthe reward model agrees with the gold reward on {agreement:.1%} of the pairs")
    for row in zip(("before", "after round 1", "after round 2"), rewards, ended, bought):
        print("| {} | {:+.2f} | {:.1%} | {:,} |".format(*row))
    assert rewards[1] > rewards[0] + 0.4 and rewards[2] > rewards[1] + 0.4
    assert min(ended) > 0.9  # not by talking without an end

    # Round 2 had the labels of round 1 for free, and pairs that the model of round 1 wrote.
    first, second = (dict((pair, label) for pair, label, _ in run.ledger()) for run in runs)
    reused = [pair for pair, _, step in runs[1].ledger() if step == -1]
    assert set(reused) == set(first) and all(second[pair] == first[pair] for pair in first)
    assert len(second) == len(first) + bought[2] > len(first)
    written = [lines(folder / "pairs.jsonl") for folder in folders[1:]]
    assert [row["prompt"] for row in written[0][:99]] == [row["prompt"] for row in written[1][:99]]
    gold = [sum(toy.gold_reward(row[f"response_{side}"]) for row in rows for side in "ab") / (2 * len(rows))
            for rows in written]
    assert gold[1] > gold[0] + 0.4


def share_that_ends(folder, prompts):
    with toy.seeded_and_silent(0):
        _, ended = toy.sample(*toy.load(folder), prompts)
    return sum(ended) / len(ended)
