"""Budgets and audits through the command line: `python -m pytest tests/test_budget_runs.py`."""

import json
import random
import sqlite3


def test_a_budget_is_never_passed(train, by_dataset):
    """12 labels: 8 at step 0, the rest for the least sure pairs; after that an unsure pair gets no label."""
    run = train("budget", max_queries=12, price_per_label=0.25)
    summary = run.summary()
    assert summary["queries"] == len(run.ledger()) == 12 < by_dataset.summary()["queries"]
    assert summary["cost"] == 3.0 and "3.00 spent on labels" in run.stdout
    assert summary["budget_spent_at_step"] in (1, 2, 3) and "the budget was spent at step" in run.stdout
    assert summary["queries"] + summary["pseudo_labels"] < 32  # some pairs got neither
    assert "| spent on labels | 3.00 |" in (run.output / "README.md").read_text()
    cut = train("budget-cut", max_queries=12, micro_batch_tokens=64)  # a pair a micro-batch
    assert sorted(cut.ledger()) == sorted(run.ledger())
    pseudo = train("budget-pseudo", max_queries=12, after_budget="pseudo_label").summary()
    assert pseudo["queries"] == 12 and pseudo["queries"] + pseudo["pseudo_labels"] == 32


def test_an_audit_asks_confident_pairs_too_and_says_how_right_they_are(train, by_dataset):
    run = train("audit", audit_fraction=1.0)
    summary = run.summary()
    assert summary["queries"] == 32 and summary["pseudo_labels"] == 0  # with 1.0, every pair is asked
    assert summary["audited"] == 32 - len([1 for _, _, step in run.ledger() if step == 0]) - unsure_later(run)
    low, high = summary["audit_interval"]
    assert 0 <= low <= summary["audit_accuracy"] <= high <= 1
    row = run.rows()[-1]
    assert (row["audited"], row["audit_accuracy"]) == (summary["audited"], summary["audit_accuracy"])
    assert (row["audit_low"], row["audit_high"]) == (low, high)
    assert f"{summary['audited']} audited" in run.stdout


def unsure_later(run):
    """Answers after step 0 whose margin was inside γ."""
    return sqlite3.connect(run.output / "labels.sqlite").execute(
        "SELECT COUNT(*) FROM answers WHERE step > 0 AND ABS(margin) <= 0.2").fetchone()[0]


def test_a_policy_that_is_surer_than_it_is_right_is_warned_of_once(train, tiny, tmp_path):
    """Random labels, a high learning rate and many steps: the policy is sure, and wrong about half of the pairs."""
    rng = random.Random(0)
    with open(tmp_path / "train.jsonl", "w") as file:
        for line in (tiny / "pairs" / "train.jsonl").read_text().splitlines():
            file.write(json.dumps({**json.loads(line), "label": rng.choice("ab")}) + "\n")
    run = train("wrong", dataset_mixer=f"{{{tmp_path}: 1.0}}", audit_fraction=1.0, max_steps=15, learning_rate=0.02,
                gamma=0.1)
    assert run.stdout.count("WARNING: of ") == 1 and "it is overconfident. Raise gamma" in run.stdout
