"""labels/oracle.py and labels/annotators.py: `python -m pytest tests/test_oracle.py`.

The ledger itself is tested in test_ledger.py, judges in test_judge.py.
"""

import contextlib
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
import types

import pytest
import torch

from labels import annotators
from labels import oracle as module
from labels.annotators import Annotator, DatasetAnnotator, HumanAnnotator, Waiting
from labels.ledger import Ledger, Panel
from labels.oracle import ANNOTATORS, JUDGES, Oracle, annotator_class, is_audited, wilson
from runtime.config import Config
from runtime.errors import Stopped, UsageError
from runtime.run import Interrupt

LABELS = {"a": 1, "b": -1, "c": 1, "d": -1}
TEXTS = {pair: ('"prompt"', f'"{pair} one"', f'"{pair} two"') for pair in "abcd"}


def make(annotator, folder, run=None, **keys):
    return Oracle(annotator, folder / "labels.sqlite", Config(**keys), run)


def ask(oracle, ids, margins, asked, step=0):
    """Oracle.answer, from and to lists."""
    return oracle.answer(ids, torch.tensor(margins), torch.tensor(asked), step).tolist()


@pytest.fixture
def oracle(tmp_path):
    oracle = make(DatasetAnnotator(LABELS), tmp_path)
    yield oracle
    oracle.close()


def test_only_asked_pairs_get_a_label(oracle):
    assert ask(oracle, ["a", "b", "c"], [0.1, 2.0, -0.2], [True, False, True]) == [1, 0, 1]
    assert oracle.queries() == oracle.annotator.calls == 2


def test_a_label_is_paid_for_once_and_then_used_whatever_the_gate_says(oracle):
    ask(oracle, ["a", "b"], [0.1, 0.1], [True, True])
    assert ask(oracle, ["a", "b"], [0.1, 5.0], [True, False], step=1) == [1, -1]
    assert oracle.queries() == oracle.annotator.calls == 2


class Undecided(DatasetAnnotator):
    """Prefers neither response of a pair whose label is 0."""

    def answer(self, questions, ledger):
        ledger.add("dataset", [(q, self.labels[q.pair], "", None, None) for q in questions])
        self.calls += len(questions)


def test_an_answer_without_a_preference_is_told_from_no_answer(tmp_path):
    """It is bought once and counts against the budget."""
    oracle = make(Undecided({"a": 0, "b": -1}), tmp_path, max_queries=2)
    answers = oracle.answer(["a", "b"], torch.tensor([0.1, 0.1]), torch.tensor([True, True]), 0)
    assert answers.isnan().tolist() == [True, False] and answers[1] == -1
    answers = oracle.answer(["a", "b", "c"], torch.tensor([9.0, 0.1, 0.1]), torch.tensor([False, True, True]), 1)
    assert answers.isnan().tolist() == [True, False, False] and answers[1:].tolist() == [-1, 0]
    assert oracle.queries() == oracle.annotator.calls == 2


def test_no_audit_counts_an_answer_without_a_preference(tmp_path):
    oracle = make(Undecided({"a": 0, "b": -1}), tmp_path, audit_fraction=1.0)
    oracle.answer(["a", "b"], torch.tensor([5.0, 5.0]), torch.tensor([False, False]), 0)
    assert oracle.audit()["audited"] == 1 and oracle.audit()["accuracy"] == 0
    assert oracle.queries() == 2 and oracle.without_preference() == 1


def test_a_pair_that_is_twice_in_a_batch_is_asked_once(oracle):
    assert ask(oracle, ["a", "a"], [0.1, 0.1], [True, True]) == [1, 1]
    assert oracle.annotator.calls == 1


def test_a_filler_is_never_asked(oracle):
    assert ask(oracle, [None], [0.0], [True]) == [0]
    assert oracle.queries() == 0


def test_queries_are_counted_up_to_a_step(oracle):
    ask(oracle, ["a", "b"], [0, 0], [True, True])
    ask(oracle, ["c"], [0], [True], step=3)
    assert [oracle.queries(step) for step in (0, 2, 3)] == [2, 2, 3]
    ask(oracle, ["a", "b"], [0, 0], [True, True])  # by a run that has gone back: c is not an answer that it has used
    oracle.end_step()
    assert oracle.state["answers"] == 2


def test_the_ledger_outlives_the_process_and_is_used_for_free(tmp_path):
    first = make(DatasetAnnotator(LABELS), tmp_path)
    ask(first, ["a", "b"], [0, 0], [True, True])
    first.close()
    second = make(DatasetAnnotator({}), tmp_path)  # which holds no labels
    assert ask(second, ["b", "a"], [9.0, 0], [False, True]) == [-1, 1]


def test_an_answer_is_committed_before_it_is_used(tmp_path):
    """Another connection sees the row as soon as `answer` returns, with what it was asked for."""
    oracle = make(DatasetAnnotator(LABELS), tmp_path)
    ask(oracle, ["d"], [0.25], [True], step=7)
    rows = sqlite3.connect(tmp_path / "labels.sqlite").execute(
        "SELECT pair, label, source, margin, step FROM answers").fetchall()
    assert rows == [("d", -1, "dataset", 0.25, 7)]


def commits(wal):
    """The number of commits in a write-ahead log: the last frame of each holds the size of the file, the others hold 0."""
    content = wal.read_bytes()
    frame = 24 + int.from_bytes(content[8:12], "big")  # a header and a page
    return sum(content[at + 4:at + 8] != bytes(4) for at in range(32, len(content), frame))


def test_a_question_that_is_answered_at_once_costs_one_commit(oracle, tmp_path):
    ask(oracle, ["a"], [0.1], [True])
    before = commits(tmp_path / "labels.sqlite-wal")
    ask(oracle, ["b", "c"], [0.1, 0.1], [True, True], step=1)
    assert commits(tmp_path / "labels.sqlite-wal") == before + 1
    ask(oracle, ["a", "b", "c"], [0.1] * 3, [True] * 3, step=2)  # known, and marked as used
    assert commits(tmp_path / "labels.sqlite-wal") == before + 1


def test_a_pair_that_can_never_be_answered_is_an_error_of_the_user_and_is_named(oracle):
    with pytest.raises(UsageError, match="^pair e has no label in the data set"):
        ask(oracle, ["a", "e"], [0, 0], [True, True])
    oracle.annotator.answer = lambda *_: int("a judge raises ValueError")
    with pytest.raises(UsageError, match="a judge raises ValueError"):
        ask(oracle, ["a"], [0], [True])
    assert oracle.queries() == 0


def test_pseudo_labels_are_graded_by_the_truth_and_nothing_comes_back(tmp_path):
    oracle = make(DatasetAnnotator(LABELS, truths={"a": 1, "b": 1}), tmp_path)
    # d has been asked, e too, without a preference, and f has no label, because the budget is spent.
    labels, answers = torch.tensor([1.0, -1.0, 0.0, 1.0, 1.0, 0.0, 0.0]), torch.tensor([0, 0, 0, 0, 1, math.nan, 0])
    assert oracle.count_pseudo_labels(["a", "b", None, "c", "d", "e", "f"], labels, answers) is None
    assert oracle.state["pseudo_labels"] == 0  # before the step has ended
    assert oracle.end_step() is None
    assert (oracle.state["pseudo_labels"], oracle.state["pseudo_right"], oracle.state["pseudo_known"]) == (3, 1, 2)
    oracle.end_step()
    assert oracle.state["pseudo_labels"] == 3  # each counts once


def test_every_annotator_of_the_tables_has_what_the_program_reads():
    for name, kind in (ANNOTATORS | JUDGES).items():
        config = Config(oracle=name) if name in ANNOTATORS else Config(oracle="judge", judge=name)
        assert annotator_class(config) is kind and issubclass(kind, Annotator)
        assert kind.asks_together is (name != "dataset") and all(hasattr(config, key) for key in kind.needs)
        assert kind.name == ("judge" if name in JUDGES else name)


def test_the_oracle_asks_together_where_its_annotator_does(tmp_path):
    assert not make(None, tmp_path).asks_together and make(None, tmp_path, oracle="human").asks_together
    assert make(None, tmp_path, oracle="judge", judge="reward_model").asks_together


def test_what_an_annotator_shows_goes_to_the_progress_of_the_run(tmp_path):
    shown, annotator = [], HumanAnnotator(TEXTS.get, wait_minutes=1)
    annotator.show(7)  # outside of a run, nowhere
    run = types.SimpleNamespace(interrupt=Interrupt(), show_missing=shown.append, untimed=contextlib.nullcontext)
    make(annotator, tmp_path, run, oracle="human")
    annotator.show(3)
    assert shown == [3]


@pytest.mark.parametrize("waits", [False, True])
def test_the_time_that_an_annotator_takes_is_not_time_of_training(waits, tmp_path):
    """Also where the run stops, because nobody answers: its checkpoint keeps the seconds of training."""
    run, events = types.SimpleNamespace(interrupt=Interrupt(), show_missing=None, untimed=None), []

    class Asked(DatasetAnnotator):
        def answer(self, questions, ledger):
            events.append(run.interrupt.inside)
            if waits:
                raise Waiting("nobody answers")
            super().answer(questions, ledger)

    @contextlib.contextmanager
    def untimed():
        try:
            yield events.append("begun")
        finally:
            events.append("ended")
    run.untimed = untimed
    oracle = make(Asked(LABELS), tmp_path, run, oracle="human")
    with pytest.raises(Waiting) if waits else contextlib.nullcontext():
        ask(oracle, ["a"], [0.1], [True])
    assert events == ["begun", True, "ended"]


def test_several_ranks_ask_at_once(tmp_path):
    """Three processes: there is one ledger, on rank 0; a pair that two ranks ask for is asked once; each rank gets its own
    answers. The annotator may take longer than a collective's usual timeout, here a second."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent("""
        import datetime, sys, time
        import torch, torch.distributed as dist, torch.multiprocessing as mp
        from labels.annotators import DatasetAnnotator
        from labels.oracle import Oracle
        from runtime.config import Config
        from runtime.errors import UsageError

        class Slow(DatasetAnnotator):
            def answer(self, *args):
                time.sleep(2)
                super().answer(*args)

        def work(rank, folder):
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
            dist.distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=1)
            annotator = Slow({"a": 1, "b": -1, "c": 1, "d": -1}) if rank == 0 else None
            oracle = Oracle(annotator, f"{folder}/labels.sqlite", Config())
            ids = [["a", "b"], ["b", "c", "d"], [None]][rank]
            ask = torch.tensor([[True, True], [True, False, True], [True]][rank])
            answers = oracle.answer(ids, torch.zeros(len(ids)), ask, 0)
            assert answers.tolist() == [[1, -1], [-1, 0, -1], [0]][rank]
            labels = torch.tensor([[1.0, -1.0], [-1.0, -1.0, -1.0], [0.0]][rank])
            oracle.count_pseudo_labels(ids, labels, torch.tensor([[0, -1], [-1, 0, -1], [0]][rank]))
            oracle.end_step()
            if rank == 0:
                assert oracle.queries() == annotator.calls == 3
                assert oracle.state["pseudo_labels"] == 2
            else:
                assert oracle.ledger is None and oracle.queries() == 0
            try:  # every rank hears of an error of the annotator
                oracle.answer(["e"] if rank == 0 else [None], torch.zeros(1), torch.tensor([True]), 1)
                raise AssertionError("nothing was raised")
            except UsageError as error:
                assert "pair e has no label" in str(error)
            oracle.close()
            dist.barrier()
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.start_processes(work, (sys.argv[1],), nprocs=3, start_method="fork")
        """))
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=600,
                          env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-2000:]


# ----------------------------------------------------------------------------------------------------------------------
# Ctrl-C

@pytest.fixture
def run():
    """What the oracle uses of a Run."""
    return types.SimpleNamespace(interrupt=Interrupt(), show_missing=lambda *missing: None, untimed=contextlib.nullcontext)


def test_ctrl_c_lets_an_annotator_who_answers_at_once_finish(run, tmp_path, monkeypatch, handlers):
    """A step is not left half done: the run stops after it (test_run.py)."""
    oracle = make(DatasetAnnotator(LABELS), tmp_path, run)
    add = oracle.ledger.add

    def pressed_meanwhile(*args, **how):
        os.kill(os.getpid(), signal.SIGINT)
        add(*args, **how)

    monkeypatch.setattr(oracle.ledger, "add", pressed_meanwhile)
    run.interrupt.install()
    assert ask(oracle, ["a", "b"], [0.1, 0.1], [True, True]) == [1, -1]
    assert run.interrupt.asked and not run.interrupt.inside


@pytest.mark.parametrize("after", [False, True])
def test_ctrl_c_just_before_or_after_an_annotators_work_stops_the_run_like_one_within_it(after, run, tmp_path, handlers):
    class Pressed(DatasetAnnotator):
        def answer(self, questions, ledger):
            if after:
                super().answer(questions, ledger)
            os.kill(os.getpid(), signal.SIGINT)

    oracle = make(Pressed(LABELS), tmp_path, run, oracle="human")
    run.interrupt.install()
    with pytest.raises(Stopped, match="^interrupted$"):
        ask(oracle, ["a"], [0.1], [True])
    assert not run.interrupt.inside
    assert ask(oracle, ["a"], [0.1], [False]) == [int(after)]  # what was answered is kept, and free


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_came_while_the_step_was_scored_does_not_wait_for_people(number, run, tmp_path, handlers):
    oracle = make(annotator := DatasetAnnotator(LABELS), tmp_path, run, oracle="human")
    run.interrupt.install()
    os.kill(os.getpid(), number)
    with pytest.raises(Stopped, match="^interrupted$"):
        ask(oracle, ["a"], [0.1], [True])
    assert annotator.calls == 0 and not run.interrupt.inside


# ----------------------------------------------------------------------------------------------------------------------
# People

def test_a_run_waits_for_people_and_gets_their_answers(tmp_path):
    """While the run waits, a thread answers as a person would, through its own connection."""
    annotator = HumanAnnotator(TEXTS.get, wait_minutes=60)
    annotator.poll_seconds = 0.02
    waiting = []
    annotator.show = lambda missing, how="": waiting.append(missing)
    oracle = make(annotator, tmp_path, oracle="human")

    def person():
        mine = Ledger(tmp_path / "labels.sqlite")
        answered = 0
        while answered < 3:
            if question := mine.lease("ann", 60):
                mine.answer_question(question[0], -1 if question[0] == "b" else 1, "ann", seconds=1.0)
                answered += 1
            time.sleep(0.02)
        mine.close()

    thread = threading.Thread(target=person)
    thread.start()
    assert ask(oracle, ["a", "b", "d"], [0.1, 0.2, 0.3], [True] * 3, step=2) == [1, -1, 1]
    thread.join()
    assert waiting[0] == 3 and waiting[-1] == 0 and waiting == sorted(waiting, reverse=True)
    assert oracle.queries() == 3 == oracle.queries(2) and oracle.queries(1) == 0


def test_an_answer_that_is_taken_back_before_it_is_used_is_waited_for_again(tmp_path):
    """Undo strikes after the last answer has come and before the run takes the answers."""
    class Undone(HumanAnnotator):
        times = 0

        def answer(self, questions, ledger):
            ledger.put_questions(questions, {q.pair: TEXTS[q.pair] for q in questions})
            for question in questions:
                ledger.answer_question(question.pair, 1, "ann")
            self.times += 1
            if self.times == 1:
                assert ledger.retract("b", "ann")

    oracle = make(Undone(TEXTS.get, 1), tmp_path, oracle="human")
    assert ask(oracle, ["a", "b"], [0.1, 0.1], [True, True]) == [1, 1]
    assert oracle.annotator.times == 2 and oracle.queries() == 2


def test_without_an_answer_the_run_stops_and_the_questions_stay_open(tmp_path):
    annotator = HumanAnnotator(TEXTS.get, wait_minutes=0.001)
    annotator.poll_seconds = 0.01
    oracle = make(annotator, tmp_path, oracle="human")
    with pytest.raises(Waiting, match="no answer for 0.001 minutes, 2 of 2 are missing; people answer with "
                                      f"`python tools/label.py {tmp_path}`"):
        ask(oracle, ["a", "b"], [0.1, 0.1], [True, True])
    assert len(oracle.ledger.open_questions()) == 2 and oracle.queries() == 0
    for pair in "ab":
        oracle.ledger.answer_question(pair, 1, "ann")
    assert ask(oracle, ["a", "b"], [0.1, 0.1], [True, True]) == [1, 1]  # answers given in the meantime are used


def test_an_opinion_that_settles_nothing_yet_restarts_the_wait_too(tmp_path, monkeypatch):
    """Three people are asked about each pair. On this clock each poll takes a minute, and one opinion comes every 40."""
    annotator = HumanAnnotator(TEXTS.get, wait_minutes=60)
    oracle = make(annotator, tmp_path, oracle="human")
    minutes, opinions = [0], [("b", who) for who in ("ann", "bob")] + [("a", who) for who in ("ann", "bob", "cat")]

    def sleep(_):
        minutes[0] += 1
        if minutes[0] % 40 == 0 and opinions:
            pair, who = opinions.pop(0)
            oracle.ledger.answer_question(pair, 1, who, panel=Panel(3))
        elif minutes[0] % 40 == 20 and minutes[0] < 400:
            oracle.ledger.add_verdict("c", "model", 1)  # a judge's verdict is nobody's answer

    monkeypatch.setattr(annotators, "time", types.SimpleNamespace(monotonic=lambda: 60 * minutes[0], sleep=sleep))
    with pytest.raises(Waiting, match="no answer for 60 minutes, 1 of 2 are missing"):
        ask(oracle, ["a", "b"], [0.1, 0.1], [True, True])
    assert not opinions and minutes[0] == 5 * 40 + 60


# ----------------------------------------------------------------------------------------------------------------------
# Budget and audit

def test_the_budget_goes_to_the_least_sure_and_is_never_passed(tmp_path):
    oracle = make(DatasetAnnotator(LABELS), tmp_path, max_queries=3)
    assert ask(oracle, ["a", "b"], [0.9, 0.1], [True, True]) == [1, -1]
    assert oracle.state["budget_spent_at_step"] is None
    assert ask(oracle, ["c", "d"], [-0.9, 0.1], [True, True], step=1) == [0, -1]
    assert oracle.state["budget_spent_at_step"] == 1
    assert ask(oracle, ["c", "a"], [0.0, 0.0], [True, True], step=2) == [0, 1]  # a label once bought is free
    assert ask(oracle, ["a"], [0.0], [True], step=3) == [1] and oracle.state["budget_spent_at_step"] == 1
    assert oracle.queries() == oracle.annotator.calls == 3

    again = make(oracle.annotator, tmp_path, max_queries=5)
    again.state = oracle.state
    assert ask(again, ["c", "a"], [0.0, 0.0], [True, True], step=3) == [1, 1]
    assert again.state["budget_spent_at_step"] is None  # one label is left
    again.close()


def test_a_run_that_goes_back_sees_a_label_from_the_step_at_which_it_asked(tmp_path):
    """Pair b is sure in the first epoch and unsure in the second. So is the run that starts again from a checkpoint of the
    first; one whose margins have become others may use the label at once, because it is paid for."""
    oracle = make(DatasetAnnotator(LABELS), tmp_path, max_queries=2)
    steps = [(["a", "b"], [0.1, 2.0], [True, False]), (["c"], [3.0], [False]), (["b", "a"], [0.1, 4.0], [True, False])]
    first = [ask(oracle, *step, n) for n, step in enumerate(steps)]
    assert first == [[1, 0], [0], [-1, 1]] and oracle.state["budget_spent_at_step"] is None
    again = make(oracle.annotator, tmp_path, max_queries=2)
    assert [ask(again, *step, n) for n, step in enumerate(steps)] == first and again.state["budget_spent_at_step"] is None
    assert ask(again, ["a", "b"], [0.1, 0.2], [True, True], 0) == [1, -1] and again.queries() == oracle.annotator.calls == 2
    assert ask(again, ["c"], [0.1], [True], 1) == [0] and again.queries() == 2  # the budget holds for all steps together
    oracle.close()
    again.close()


def test_audited_pairs_tell_how_right_pseudo_labels_are(oracle, monkeypatch):
    monkeypatch.setattr(module, "is_audited", lambda pair, fraction, seed: pair in "abd")
    assert ask(oracle, ["a", "b", "c", None, "d"], [2.0, 3.0, 0.1, 0.0, -2.5],
               [False, False, True, False, False]) == [1, -1, 1, 0, -1]
    audit = oracle.audit()
    assert audit["audited"] == 3 and audit["accuracy"] == 2 / 3  # a and d are labelled as their margins say, b is not
    assert audit["interval"] == wilson(2, 3)
    assert audit["predicted"] == pytest.approx(sum(1 / (1 + math.exp(-m)) for m in (2, 3, 2.5)) / 3)
    assert oracle.audit(-1) is None


def test_a_pair_that_is_asked_anyway_is_not_an_audit(tmp_path):
    oracle = make(DatasetAnnotator(LABELS), tmp_path, audit_fraction=1.0)
    assert ask(oracle, ["a", "b"], [0.1, 5.0], [True, False]) == [1, -1]
    assert oracle.audit()["audited"] == 1 and oracle.ledger.audits() == [(5.0, -1)]


def test_a_step_is_asked_ahead_where_the_budget_may_end_in_it(tmp_path):
    oracle = make(DatasetAnnotator(LABELS), tmp_path, max_queries=3)
    assert not oracle.asks_ahead(3) and oracle.asks_ahead(4)
    ask(oracle, ["a", "b"], [0.1, 0.1], [True, True])
    assert oracle.asks_ahead(2) and not oracle.asks_ahead(1)
    ask(oracle, ["c"], [0.1], [True])
    assert not oracle.asks_ahead(4)  # nothing is left
    people = make(None, tmp_path, oracle="human")
    assert people.asks_ahead(1) and not make(None, tmp_path, oracle="human", label_budget=0.5).asks_ahead(1)


def test_audits_come_last_where_the_budget_is_short(tmp_path):
    oracle = make(DatasetAnnotator(LABELS), tmp_path, audit_fraction=1.0, max_queries=2)
    assert ask(oracle, ["a", "b", "c"], [0.2, 0.1, 5.0], [True, False, True]) == [1, 0, 1]  # whatever the margins


@pytest.mark.parametrize("successes, trials, low, high", [(0, 10, 0.0, 0.27753), (5, 10, 0.23659, 0.76341),
                                                          (97, 100, 0.91548, 0.98974)])
def test_wilsons_interval_against_published_values(successes, trials, low, high):
    assert wilson(successes, trials) == pytest.approx((low, high), abs=2e-4)


def test_the_audited_share_is_seeded_and_as_large_as_asked():
    drawn = [is_audited(str(n), 0.05, seed=1) for n in range(20_000)]
    assert abs(sum(drawn) / 20_000 - 0.05) < 0.005
    assert drawn == [is_audited(str(n), 0.05, seed=1) for n in range(20_000)]
    assert drawn != [is_audited(str(n), 0.05, seed=2) for n in range(20_000)]
    assert not any(is_audited(str(n), 0.0, 1) for n in range(1000)) and all(is_audited(str(n), 1.0, 1) for n in range(99))
