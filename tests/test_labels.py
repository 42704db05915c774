"""Labels that do not exist yet, budgets and audits, through train.py: `python -m pytest tests/test_labels.py`.

People are played by a thread that answers through a connection of its own, as tools/label.py does.
"""

import contextlib
import json
import re
import shutil
import signal
import sqlite3
import threading
import time

import pytest
import torch
import transformers
from test_judge import Server, completion

from labels import judge, oracle
from runtime import toy


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


def test_all_questions_of_a_step_are_asked_together(train, unlabelled, by_dataset, tmp_path, monkeypatch):
    """Four micro-batches a step, but people are asked once a step."""
    asked, answer = [], oracle.HumanAnnotator.answer
    monkeypatch.setattr(oracle.HumanAnnotator, "answer", lambda self, questions, ledger: asked.append(
        [question.step for question in questions]) or answer(self, questions, ledger))
    with Person(tmp_path / "run"):
        run = train("together", output_dir=tmp_path / "run", oracle="human", dataset_mixer=f"{{{unlabelled}: 1.0}}",
                    per_device_train_batch_size=2, gradient_accumulation_steps=4)
    steps = [step for _, _, step in by_dataset.ledger()]
    assert asked == [[step] * steps.count(step) for step in sorted(set(steps))]
    assert run.ledger() == by_dataset.ledger()


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


@pytest.mark.parametrize("number, kind", [(signal.SIGINT, "dataset"), (signal.SIGTERM, "dataset"), (signal.SIGINT, "human")])
def test_ctrl_c_and_sigterm_stop_a_run_that_the_same_command_resumes(number, kind, train, unlabelled, tiny, tmp_path):
    """In the middle of training, and while it waits for people: exit code 75 with a checkpoint; then it ends as an
    undisturbed run does."""
    mixer = unlabelled if kind == "human" else tiny / "pairs"
    keys = dict(oracle=kind, dataset_mixer=f"{{{mixer}: 1.0}}", max_steps=40, logging_steps=5)
    whole = train("whole", **keys | {"oracle": "dataset", "dataset_mixer": f"{{{tiny}/pairs: 1.0}}"})
    output = tmp_path / "run"
    with Person(output, limit=10) if kind == "human" else contextlib.nullcontext():
        process = train.start(output_dir=output, **keys)
        deadline = time.time() + 120
        while time.time() < deadline and process.poll() is None:
            rows = (output / "metrics.jsonl").read_text().count("\n") if (output / "metrics.jsonl").exists() else 0
            if rows >= (1 if kind == "human" else 2):
                break
            time.sleep(0.01)
        time.sleep(2 if kind == "human" else 0)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 75, out[-2000:] + err[-2000:]
    assert "stopped: interrupted" in out and list(output.glob("checkpoint-*/trainer_state.json"))
    with Person(output) if kind == "human" else contextlib.nullcontext():
        again = train("again", output_dir=output, **keys)
    assert "resumed from" in again.stdout
    assert again.losses() == pytest.approx(whole.losses(), rel=1e-6) and again.ledger() == whole.ledger()


def test_unlabelled_pairs_are_refused_where_nobody_could_answer(train, unlabelled):
    run = train("refused", check=2, dataset_mixer=f"{{{unlabelled}: 1.0}}")
    assert f"{unlabelled}/train.jsonl, row 1: no label, and oracle is dataset (120 of 120 pairs have none)" in run.stderr
    assert "--oracle=human" in run.stderr


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


# ----------------------------------------------------------------------------------------------------------------------
# Judges

def by_gold_reward(prompt, n):
    """A chat model that judges as the tiny pairs are labelled."""
    a, b = (re.search(rf"response {side} begins\n(.*)\n=== \w+ response {side} ends", prompt, re.DOTALL)[1] for side in "AB")
    a, b = toy.gold_reward(a), toy.gold_reward(b)
    return completion("[[C]]" if a == b else "[[A]]" if a > b else "[[B]]")


@pytest.fixture
def endpoint():
    servers = []

    def serve(behave):
        servers.append(Server(behave))
        return servers[-1]

    yield serve
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.mark.parametrize("processes", [None, 2])
def test_a_chat_judge_labels_what_a_data_set_would_have(processes, train, unlabelled, by_dataset, endpoint, tmp_path):
    server = endpoint(by_gold_reward)
    run = train("judge", processes, output_dir=tmp_path / "run", oracle="judge", judge_url=server.url, judge_model="m",
                dataset_mixer=f"{{{unlabelled}: 1.0}}", per_device_train_batch_size=4 if processes else 8,
                judge_prompt_price=10, judge_completion_price=100)
    assert run.ledger() == by_dataset.ledger()
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)
    queries = run.summary()["queries"]
    assert len(server.bodies) == 2 * queries  # both orders, nothing twice
    assert run.summary()["cost"] == pytest.approx(2 * queries * (100 * 10e-6 + 5 * 100e-6))


def test_a_judge_that_breaks_down_stops_the_run_resumable_and_no_label_is_invented(train, unlabelled, by_dataset, endpoint,
                                                                                   tmp_path, monkeypatch):
    monkeypatch.setattr(judge.ChatJudge, "backoff_seconds", 0.01)
    steps = sorted(step for _, _, step in by_dataset.ledger())
    working = 2 * steps.count(0)
    broken = endpoint(lambda prompt, n: by_gold_reward(prompt, n) if len(broken.bodies) <= working else (500, {}, "down"))
    keys = dict(oracle="judge", judge_model="m", dataset_mixer=f"{{{unlabelled}: 1.0}}", output_dir=tmp_path / "run")
    stopped = train("down", check=75, judge_url=broken.url, **keys)
    assert "answers are missing" in stopped.stdout and "Resume with" in stopped.stdout
    assert len(stopped.ledger()) == steps.count(0)
    run = train("up", judge_url=endpoint(by_gold_reward).url, **keys)
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
