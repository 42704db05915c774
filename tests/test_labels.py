"""Labels that do not exist yet, budgets and audits, through train.py: `python -m pytest tests/test_labels.py`.

People are played by a thread that answers through a connection of its own, as tools/label.py does.
"""

import json
import shutil
import sqlite3
import threading
import time

import pytest

import oracle
import toy


@pytest.fixture(scope="module")
def unlabelled(tiny, tmp_path_factory):
    """The tiny pairs without their labels; a test split with labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    with open(folder / "train.jsonl", "w") as file:
        for line in (tiny / "pairs" / "train.jsonl").read_text().splitlines():
            row = json.loads(line)
            file.write(json.dumps({key: row[key] for key in ("prompt", "response_a", "response_b")}) + "\n")
    shutil.copy(tiny / "pairs" / "test.jsonl", folder)
    return folder


class Person(threading.Thread):
    """Answers every open question of a ledger by the gold reward, until told to stop."""

    def __init__(self, output, limit=None):
        super().__init__(daemon=True)
        self.path, self.limit, self.stopped, self.answered = output / "labels.sqlite", limit, threading.Event(), 0

    def run(self):
        while not self.path.exists() and not self.stopped.is_set():
            time.sleep(0.05)
        ledger = oracle.Ledger(self.path)
        while not self.stopped.is_set() and self.answered != self.limit:
            question = ledger.lease("ann", 60)
            if question is None:
                time.sleep(0.02)
                continue
            pair, _, first, second = question
            better = toy.gold_reward(json.loads(first)) >= toy.gold_reward(json.loads(second))
            ledger.answer_question(pair, 1 if better else -1, "ann", seconds=0.5)
            self.answered += 1
        ledger.close()

    def __exit__(self, *error):
        self.stopped.set()
        self.join()

    def __enter__(self):
        self.start()
        return self


@pytest.fixture(autouse=True)
def fast_polling(monkeypatch):
    monkeypatch.setattr(oracle.HumanAnnotator, "poll_seconds", 0.02)


@pytest.fixture(scope="module")
def by_dataset(train):
    """The run that all others must equal: the labels came with the data."""
    return train("by-dataset")


@pytest.mark.parametrize("processes", [None, 2])
def test_people_label_what_a_data_set_would_have(processes, train, unlabelled, by_dataset, tmp_path):
    """The same queries, labels and losses as with `oracle: dataset`; all questions of a step at once, over all ranks."""
    with Person(tmp_path / "run") as person:
        run = train("human", processes, output_dir=tmp_path / "run", oracle="human", dataset_mixer=f"{{{unlabelled}: 1.0}}",
                    per_device_train_batch_size=4 if processes else 8)
    assert run.ledger() == by_dataset.ledger()
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)
    assert person.answered == run.summary()["queries"] == len(run.ledger())
    answers = sqlite3.connect(run.output / "labels.sqlite")
    assert answers.execute("SELECT DISTINCT source, annotator FROM answers").fetchall() == [("human", "ann")]


@pytest.mark.parametrize("processes", [None, 2])
def test_a_run_that_nobody_answers_stops_and_the_same_command_goes_on(processes, train, unlabelled, by_dataset, tmp_path):
    keys = dict(oracle="human", dataset_mixer=f"{{{unlabelled}: 1.0}}", output_dir=tmp_path / "run",
                oracle_wait_minutes=0.02, per_device_train_batch_size=4 if processes else 8)
    steps = sorted(step for _, _, step in by_dataset.ledger())
    with Person(tmp_path / "run", limit=10):  # the 8 of step 0 and two more
        stopped = train("waits", processes, check=75, **keys)
    assert "stopped: no answer for 0.02 minutes" in stopped.stdout
    assert "labels.sqlite. Resume with" in stopped.stdout and "--oracle=human" in stopped.stdout
    assert (tmp_path / "run" / f"checkpoint-{steps[10]}" / "trainer_state.json").exists()  # where the 11th is asked
    assert len(stopped.ledger()) == 10 and not (tmp_path / "run" / "summary.json").exists()
    with Person(tmp_path / "run"):
        run = train("goes-on", processes, **keys | {"oracle_wait_minutes": 1})
    assert f"at step {steps[10]} of 4" in run.stdout
    assert run.ledger() == by_dataset.ledger()
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)


def test_unlabelled_pairs_are_refused_where_nobody_could_answer(train, unlabelled):
    run = train("refused", check=2, dataset_mixer=f"{{{unlabelled}: 1.0}}")
    assert "has no label (120 of 120 have none)" in run.stderr and "--oracle=human" in run.stderr


def test_a_test_split_without_labels_is_skipped_and_said_so(train, unlabelled, tmp_path):
    shutil.copy(unlabelled / "train.jsonl", tmp_path / "test.jsonl")
    shutil.copy(unlabelled / "train.jsonl", tmp_path / "train.jsonl")
    with Person(tmp_path / "run"):
        run = train("no-eval", oracle="human", dataset_mixer=f"{{{tmp_path}: 1.0}}", output_dir=tmp_path / "run",
                    max_steps=1)
    assert "no labels in the test split: evaluation is skipped" in run.stdout and run.summary()["eval_accuracy"] is None


def test_a_budget_is_never_passed(train, by_dataset):
    """12 labels: 8 at step 0, the rest go to the least sure; after that an unsure pair gets no label."""
    run = train("budget", max_queries=12, price_per_label=0.25)
    summary = run.summary()
    assert summary["queries"] == len(run.ledger()) == 12 < by_dataset.summary()["queries"]
    assert summary["cost"] == 3.0 and "3.00 spent on labels" in run.stdout
    assert summary["budget_spent_at_step"] in (1, 2, 3) and "the budget was spent at step" in run.stdout
    assert summary["queries"] + summary["pseudo_labels"] < 32  # some pairs had neither
    assert "| spent on labels | 3.00 |" in (run.output / "README.md").read_text()
    pseudo = train("budget-pseudo", max_queries=12, after_budget="pseudo_label").summary()
    assert pseudo["queries"] == 12 and pseudo["queries"] + pseudo["pseudo_labels"] == 32


def test_an_audit_asks_confident_pairs_too_and_says_how_right_they_are(train, by_dataset):
    run = train("audit", audit_fraction=1.0)
    summary = run.summary()
    assert summary["queries"] == 32 and summary["pseudo_labels"] == 0  # at 1.0, each pair is asked
    assert summary["audited"] == 32 - len([1 for _, _, step in run.ledger() if step == 0]) - unsure_later(run)
    low, high = summary["audit_interval"]
    assert 0 <= low <= summary["audit_accuracy"] <= high <= 1
    row = run.rows()[-1]
    assert (row["audited"], row["audit_accuracy"]) == (summary["audited"], summary["audit_accuracy"])
    assert f"{summary['audited']} audited" in run.stdout


def unsure_later(run):
    """Answers behind step 0 whose margin was inside γ."""
    return sqlite3.connect(run.output / "labels.sqlite").execute(
        "SELECT COUNT(*) FROM answers WHERE step > 0 AND ABS(margin) <= 0.2").fetchone()[0]


def test_pseudo_labels_that_are_wrong_beyond_their_confidence_are_complained_of_once(train, tiny, tmp_path):
    """Labels at random, a high learning rate, many steps: the policy is sure and half wrong."""
    import random
    rng = random.Random(0)
    with open(tmp_path / "train.jsonl", "w") as file:
        for line in (tiny / "pairs" / "train.jsonl").read_text().splitlines():
            file.write(json.dumps({**json.loads(line), "label": rng.choice("ab")}) + "\n")
    run = train("wrong", dataset_mixer=f"{{{tmp_path}: 1.0}}", audit_fraction=1.0, max_steps=15, learning_rate=0.02,
                gamma=0.1)
    assert run.stdout.count("WARNING: of ") == 1 and "surer than it has a right to be" in run.stdout
