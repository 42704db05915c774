"""Runs whose labels come from judges, through the command line: `python -m pytest tests/test_judge_runs.py`.

The judges themselves are tested in test_judge.py and test_reward_model.py.
"""

import re

import pytest
import torch
import transformers
from helpers import completion

from labels.endpoint import Endpoint
from runtime import toy


def by_gold_reward(prompt, n):
    """The reply of a chat model that agrees with the labels of the tiny pairs."""
    a, b = (re.search(rf"response {side} begins\n(.*)\n=== \w+ response {side} ends", prompt, re.DOTALL)[1] for side in "AB")
    a, b = toy.gold_reward(a), toy.gold_reward(b)
    return completion("[[C]]" if a == b else "[[A]]" if a > b else "[[B]]")


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
def test_a_chat_judge_labels_what_a_data_set_would_have(processes, train, unlabelled, by_dataset, serve, tmp_path):
    server = serve(by_gold_reward)
    run = train("judge", processes, output_dir=tmp_path / "run", oracle="judge", judge_url=server.url, judge_model="m",
                dataset_mixer=f"{{{unlabelled}: 1.0}}", per_device_train_batch_size=4 if processes else 8,
                judge_prompt_price=10, judge_completion_price=100)
    assert run.ledger() == by_dataset.ledger()
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)
    queries = run.summary()["queries"]
    assert len(server.bodies) == 2 * queries  # both orders, and nothing twice
    assert run.summary()["cost"] == pytest.approx(2 * queries * (100 * 10e-6 + 5 * 100e-6))


def test_a_judge_that_breaks_down_stops_the_run_resumable_and_no_label_is_invented(train, unlabelled, by_dataset, serve,
                                                                                   tmp_path, monkeypatch):
    monkeypatch.setattr(Endpoint, "backoff_seconds", 0.01)
    steps = sorted(step for _, _, step in by_dataset.ledger())
    working = 2 * steps.count(0)
    broken = serve(lambda prompt, n: by_gold_reward(prompt, n) if len(broken.bodies) <= working else (500, {}, "down"))
    keys = dict(oracle="judge", judge_model="m", dataset_mixer=f"{{{unlabelled}: 1.0}}", output_dir=tmp_path / "run")
    stopped = train("down", check=75, judge_url=broken.url, **keys)
    assert "answers are missing" in stopped.stdout and "Resume with" in stopped.stdout
    assert len(stopped.ledger()) == steps.count(0)
    run = train("up", judge_url=serve(by_gold_reward).url, **keys)
    assert run.ledger() == by_dataset.ledger()


def test_a_reward_model_is_the_offline_judge(train, unlabelled, tiny, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    torch.manual_seed(1)
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                      num_attention_heads=2, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
    tokenizer.save_pretrained(tmp_path / "reward")
    run = train("reward", oracle="judge", judge="reward_model", judge_model=tmp_path / "reward",
                dataset_mixer=f"{{{unlabelled}: 1.0}}", output_dir=tmp_path / "run")
    assert len(run.ledger()) == run.summary()["queries"] > 8
    assert {label for _, label, _ in run.ledger()} == {1, -1}


def test_a_judge_needs_its_keys(train, unlabelled):
    run = train("keys", check=2, oracle="judge", dataset_mixer=f"{{{unlabelled}: 1.0}}")
    assert "oracle judge (chat) needs judge_url" in run.stderr
