"""Runs that wait for people, through the command line: `python -m pytest tests/test_waiting_runs.py`.

A thread plays the people (helpers.Person). Real browsers are in test_people_label_a_run.py.
"""

import math
import shutil
import signal
import sqlite3

import pytest
from helpers import Person, wait_until

from labels.annotators import HumanAnnotator
from labels.oracle import Oracle


@pytest.fixture(autouse=True)
def fast_polling(monkeypatch):
    monkeypatch.setattr(HumanAnnotator, "poll_seconds", 0.02)


@pytest.mark.parametrize("processes", [None, 2])
def test_people_label_what_a_data_set_would_have(processes, train, unlabelled, by_dataset, tmp_path):
    """The same queries, labels and losses as with `oracle: dataset`, although all questions of a step, over all ranks, are
    asked at once."""
    with Person(tmp_path / "run") as person:
        run = train("human", processes, output_dir=tmp_path / "run", oracle="human", dataset_mixer=f"{{{unlabelled}: 1.0}}",
                    per_device_train_batch_size=4 if processes else 8)
    assert run.ledger() == by_dataset.ledger()
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)
    assert person.answered == run.summary()["queries"] == len(run.ledger())
    answers = sqlite3.connect(run.output / "labels.sqlite")
    assert answers.execute("SELECT DISTINCT source, annotator FROM answers").fetchall() == [("human", "ann")]


def test_all_questions_of_a_step_are_asked_together(train, unlabelled, by_dataset, tmp_path, monkeypatch):
    """A step has four micro-batches, but people are asked once a step."""
    asked, answer = [], HumanAnnotator.answer
    monkeypatch.setattr(HumanAnnotator, "answer", lambda self, questions, ledger: asked.append(
        [question.step for question in questions]) or answer(self, questions, ledger))
    with Person(tmp_path / "run"):
        run = train("together", output_dir=tmp_path / "run", oracle="human", dataset_mixer=f"{{{unlabelled}: 1.0}}",
                    per_device_train_batch_size=2, gradient_accumulation_steps=4)
    steps = [step for _, _, step in by_dataset.ledger()]
    assert asked == [[step] * steps.count(step) for step in sorted(set(steps))]
    assert run.ledger() == by_dataset.ledger()


@pytest.mark.parametrize("processes", [None, pytest.param(2, marks=pytest.mark.slow)])
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
        run = train("goes-on", processes, **keys | {"oracle_wait_minutes": 60})
    assert f"at step {steps[10]} of 4" in run.stdout
    assert run.ledger() == by_dataset.ledger()
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)


def test_ties_can_be_trained_towards_one_half(train, unlabelled, tmp_path):
    """Where nobody ever prefers one, the policy that is pushed towards one half stays near where it began, at log 2.

    That is this loss's minimum. Rounding makes the first gradient not quite 0, and AdamW makes a full step of it, however
    small it is, so the second step is only near.
    """
    runs = []
    for ties in ("none", "half"):
        with Person(tmp_path / ties, undecided=lambda pair: True):
            runs.append(train(ties, output_dir=tmp_path / ties, oracle="human", dataset_mixer=f"{{{unlabelled}: 1.0}}",
                              ties=ties, max_steps=2))
    assert runs[0].losses() == [0, 0]
    first, second = runs[1].losses()
    assert first == pytest.approx(math.log(2), abs=1e-6) and -1e-6 < second - math.log(2) < 0.01
    assert all(run.summary()["queries_without_preference"] == run.summary()["queries"] > 0 for run in runs)


def test_a_pair_without_a_preference_releases_its_step_and_never_gets_a_label(train, unlabelled, tmp_path, monkeypatch):
    """A third of the pairs, over two epochs: each is asked once, and has no loss, although the policy gets sure of it."""
    used, note = [], Oracle.count_pseudo_labels
    monkeypatch.setattr(Oracle, "count_pseudo_labels", lambda self, ids, labels, answers: used.extend(
        zip(ids, labels.tolist())) or note(self, ids, labels, answers))
    with Person(tmp_path / "run", undecided=lambda pair: int(pair, 16) % 3 == 0) as person:
        run = train("undecided", output_dir=tmp_path / "run", oracle="human", dataset_mixer=f"{{{unlabelled}: 1.0}}",
                    max_steps=-1, num_train_epochs=2)
    labels = {pair: label for pair, label, _ in run.ledger()}
    neither = {pair for pair, label in labels.items() if label == 0}
    assert neither == {pair for pair in labels if int(pair, 16) % 3 == 0} and 3 < len(neither) < len(labels)
    assert len(used) == 240 and person.answered == run.summary()["queries"] == len(labels)
    assert all(label == labels.get(pair, label) for pair, label in used)
    assert all(label for pair, label in used if pair not in neither)
    assert run.summary()["queries_without_preference"] == run.rows()[-1]["queries_without_preference"] == len(neither)
    assert f"{len(neither)} of them without a preference" in run.stdout
    assert f"{len(neither)} without a preference" in run.stderr  # the progress bar
    assert f"| of them without a preference | {len(neither)} |" in (run.output / "README.md").read_text()


LONG = dict(max_steps=40, logging_steps=5)


@pytest.fixture(scope="module")
def undisturbed(train):
    return train("undisturbed", **LONG)


@pytest.mark.parametrize("number, kind", [
    pytest.param(signal.SIGINT, "dataset", marks=pytest.mark.slow),
    pytest.param(signal.SIGTERM, "dataset", marks=pytest.mark.slow), (signal.SIGINT, "human")])
def test_ctrl_c_and_sigterm_stop_a_run_that_the_same_command_resumes(number, kind, train, unlabelled, tiny, undisturbed,
                                                                     tmp_path):
    """In the middle of training, and while it waits for people: it ends with exit code 75 and a checkpoint, and the resumed
    run is the undisturbed one."""
    mixer, output = unlabelled if kind == "human" else tiny / "pairs", tmp_path / "run"
    keys = dict(oracle=kind, dataset_mixer=f"{{{mixer}: 1.0}}", output_dir=output, **LONG)
    metrics = output / "metrics.jsonl"
    process = train.start(**keys)
    if kind == "human":
        with Person(output, limit=10) as person:  # the 8 of step 0 and two more
            wait_until(lambda: person.answered == 10 or process.poll() is not None)
    else:
        wait_until(lambda: metrics.exists() and metrics.read_text().count("\n") >= 2 or process.poll() is not None)
    process.send_signal(number)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 75, out[-2000:] + err[-2000:]
    assert "stopped: interrupted" in out and list(output.glob("checkpoint-*/trainer_state.json"))
    if kind == "human":
        with Person(output):
            again = train("again", **keys)
    else:
        again = train("again", **keys)
    assert "resumed from" in again.stdout
    assert again.losses() == pytest.approx(undisturbed.losses(), rel=1e-6) and again.ledger() == undisturbed.ledger()


def test_unlabelled_pairs_are_refused_where_nobody_could_answer(train, unlabelled):
    run = train("refused", check=2, dataset_mixer=f"{{{unlabelled}: 1.0}}")
    assert f"{unlabelled}/train.jsonl, row 1: no label, and oracle is dataset (120 of 120 pairs have none)" in run.stderr
    assert "--oracle=human" in run.stderr


def test_a_test_split_without_labels_is_skipped_and_reported(train, unlabelled, tmp_path):
    shutil.copy(unlabelled / "train.jsonl", tmp_path / "test.jsonl")
    shutil.copy(unlabelled / "train.jsonl", tmp_path / "train.jsonl")
    with Person(tmp_path / "run"):
        run = train("no-eval", oracle="human", dataset_mixer=f"{{{tmp_path}: 1.0}}", output_dir=tmp_path / "run",
                    max_steps=1)
    assert "no labels in the test split: evaluation is skipped" in run.stdout and run.summary()["eval_accuracy"] is None
