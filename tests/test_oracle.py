"""oracle.py: the ledger, the annotator, and answers over several ranks: `python -m pytest tests/test_oracle.py`."""

import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from oracle import (
    DatasetAnnotator,
    HumanAnnotator,
    Interrupt,
    Ledger,
    LedgerError,
    Oracle,
    Question,
    Waiting,
    is_audited,
    wilson,
)

LABELS = {"a": 1, "b": -1, "c": 1, "d": -1}


def answers(**labels):
    """What Ledger.add takes, for these labels."""
    return [(Question(pair, 0.0, 0), label, "", None, None) for pair, label in labels.items()]


@pytest.fixture
def asker(tmp_path):
    oracle = Oracle(DatasetAnnotator(LABELS), tmp_path / "labels.sqlite")
    yield oracle
    oracle.close()


def test_only_asked_pairs_get_a_label(asker):
    assert asker.answer(["a", "b", "c"], [0.1, 2.0, -0.2], [True, False, True], step=0) == [1, 0, 1]
    assert asker.queries() == asker.annotator.calls == 2


def test_a_label_is_paid_for_once_and_then_used_whatever_the_gate_says(asker):
    asker.answer(["a", "b"], [0.1, 0.1], [True, True], step=0)
    assert asker.answer(["a", "b"], [0.1, 5.0], [True, False], step=1) == [1, -1]
    assert asker.queries() == asker.annotator.calls == 2


def test_a_pair_that_stands_twice_in_a_batch_is_asked_once(asker):
    assert asker.answer(["a", "a"], [0.1, 0.1], [True, True], step=0) == [1, 1]
    assert asker.annotator.calls == 1


def test_a_filler_is_never_asked(asker):
    assert asker.answer([None], [0.0], [True], step=0) == [0]
    assert asker.queries() == 0


def test_queries_are_counted_up_to_a_step(asker):
    asker.answer(["a", "b"], [0, 0], [True, True], step=0)
    asker.answer(["c"], [0], [True], step=3)
    assert [asker.queries(step) for step in (0, 2, 3)] == [2, 2, 3]


def test_the_ledger_outlives_the_process_and_is_used_for_free(tmp_path):
    first = Oracle(DatasetAnnotator(LABELS), tmp_path / "labels.sqlite")
    first.answer(["a", "b"], [0, 0], [True, True], step=0)
    first.close()
    second = Oracle(DatasetAnnotator({}), tmp_path / "labels.sqlite")  # it has no label of its own
    assert second.answer(["b", "a"], [9.0, 0], [False, True], step=0) == [-1, 1]


def test_an_answer_is_committed_before_it_is_used(tmp_path):
    """Another connection sees the row as soon as `answer` returns, with what it was asked for."""
    oracle = Oracle(DatasetAnnotator(LABELS), tmp_path / "labels.sqlite")
    oracle.answer(["d"], [0.25], [True], step=7)
    rows = sqlite3.connect(tmp_path / "labels.sqlite").execute(
        "SELECT pair, label, source, margin, step FROM answers").fetchall()
    assert rows == [("d", -1, "dataset", 0.25, 7)]


def test_of_two_answers_the_first_stands_and_a_label_is_one_of_two(tmp_path):
    ledger = Ledger(tmp_path / "labels.sqlite")
    ledger.add("x", answers(a=1))
    ledger.add("x", answers(b=1, a=-1))
    assert ledger.take(["a", "b"]) == {"a": 1, "b": 1} and ledger.count() == 2
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add("x", answers(d=1, c=0))
    assert ledger.take(["c", "d"]) == {}  # all or none


def test_what_is_no_ledger_of_ours_is_refused_and_left_alone(tmp_path):
    (tmp_path / "text").write_text("not a database, but long enough to look like a file of some kind" * 20)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE answers (pair TEXT)")
    other.close()
    before = [(tmp_path / name).read_bytes() for name in ("text", "other")]
    with pytest.raises(LedgerError, match="text: cannot be used as a ledger .*not a database.*move it away"):
        Ledger(tmp_path / "text")
    with pytest.raises(LedgerError, match="other: not a ledger of this version"):
        Ledger(tmp_path / "other")
    assert before == [(tmp_path / name).read_bytes() for name in ("text", "other")]
    held = sqlite3.connect(tmp_path / "held", isolation_level=None)
    held.execute("BEGIN EXCLUSIVE")
    with pytest.raises(LedgerError, match="held: cannot be used as a ledger .*locked.*another process holds it"):
        Ledger(tmp_path / "held", timeout=0.1)


def test_lookup_of_many_ids(tmp_path):
    ledger = Ledger(tmp_path / "labels.sqlite")
    ids = [str(n) for n in range(40_000)]
    ledger.add("x", answers(**{id: 1 for id in ids[::2]}))
    assert set(ledger.take(ids)) == set(ids[::2])


def test_a_pair_without_a_label_is_named(asker):
    with pytest.raises(LookupError, match="pair e has no label"):
        asker.answer(["a", "e"], [0, 0], [True, True], step=0)
    assert asker.queries() == 0


def test_pseudo_labels_are_graded_by_the_truth_and_nothing_comes_back(tmp_path):
    oracle = Oracle(DatasetAnnotator(LABELS, truths={"a": 1, "b": 1}), tmp_path / "labels.sqlite")
    assert oracle.report_pseudo([("a", 1), ("b", -1), ("c", 1)]) is None
    assert (oracle.state["pseudo_labels"], oracle.state["pseudo_right"], oracle.state["pseudo_known"]) == (3, 1, 2)


def test_several_ranks_ask_at_once(tmp_path):
    """Three processes: one ledger, rank 0's; a pair that two ranks ask for is asked once; each gets its own answers. The
    annotator may take longer than a collective's usual timeout, here a second."""
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent("""
        import datetime, sys, time
        import torch.distributed as dist, torch.multiprocessing as mp
        from oracle import DatasetAnnotator, Oracle

        class Slow(DatasetAnnotator):
            def answer(self, *args):
                time.sleep(3)
                super().answer(*args)

        def work(rank, folder):
            dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=3)
            dist.distributed_c10d.default_pg_timeout = datetime.timedelta(seconds=1)
            annotator = Slow({"a": 1, "b": -1, "c": 1, "d": -1}) if rank == 0 else None
            oracle = Oracle(annotator, f"{folder}/labels.sqlite")
            ids = [["a", "b"], ["b", "c", "d"], [None]][rank]
            ask = [[True, True], [True, False, True], [True]][rank]
            assert oracle.answer(ids, [0.0] * len(ids), ask, 0) == [[1, -1], [-1, 0, -1], [0]][rank]
            oracle.report_pseudo([[("a", 1)], [("c", -1)], []][rank])
            if rank == 0:
                assert oracle.queries() == annotator.calls == 3
                assert oracle.state["pseudo_labels"] == 2
            else:
                assert oracle.ledger is None and oracle.queries() == 0
            oracle.close()
            dist.barrier()
            dist.destroy_process_group()

        if __name__ == "__main__":
            mp.spawn(work, (sys.argv[1],), nprocs=3)
        """))
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": "."})
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.fixture
def handlers():
    """Signal handlers are afterwards what they were before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_comes_twice_interrupts_once_and_does_not_cut_the_stop_short(handlers):
    """The launcher's SIGTERM follows the one, or the Ctrl-C, that its ranks have had already."""
    interrupt, raised = Interrupt(), []
    interrupt.install()
    interrupt.inside = True
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            interrupt(number, None)
        except KeyboardInterrupt:
            raised.append(number)
    interrupt.remove()
    assert raised == [signal.SIGINT] and interrupt.asked and signal.getsignal(signal.SIGTERM) is interrupt


def test_ctrl_c_leaves_an_annotator_that_answers_at_once_to_its_end(asker, monkeypatch, handlers):
    """A step of which some micro-batches are done is not broken off: the run stops at its end."""
    add = asker.ledger.add

    def pressed_meanwhile(*args):
        os.kill(os.getpid(), signal.SIGINT)
        add(*args)

    monkeypatch.setattr(asker.ledger, "add", pressed_meanwhile)
    asker.interrupt.install()
    assert asker.answer(["a", "b"], [0.1, 0.1], [True, True], step=0) == [1, -1]
    with pytest.raises(Waiting, match="interrupted"):
        asker.stop_if_asked()


@pytest.mark.parametrize("behind", [False, True])
def test_ctrl_c_just_before_or_behind_an_annotators_work_stops_the_run_as_one_within_does(behind, tmp_path, handlers):
    class Pressed(DatasetAnnotator):
        def answer(self, questions, ledger):
            if behind:
                super().answer(questions, ledger)
            os.kill(os.getpid(), signal.SIGINT)

    oracle = Oracle(Pressed(LABELS), tmp_path / "labels.sqlite", asks_together=True)
    oracle.interrupt.install()
    with pytest.raises(Waiting, match="interrupted"):
        oracle.answer(["a"], [0.1], [True], step=0)
    assert oracle.answer(["a"], [0.1], [False], step=0) == [int(behind)]  # what was answered stands, and is free


# ----------------------------------------------------------------------------------------------------------------------
# People

TEXTS = {pair: ('"prompt"', f'"{pair} one"', f'"{pair} two"') for pair in "abcd"}


def ask(ledger, *pairs):
    ledger.put_questions([Question(pair, 0.1, 0) for pair in pairs], TEXTS)


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(tmp_path / "labels.sqlite")
    yield ledger
    ledger.close()


def test_a_question_is_leased_to_one_annotator_and_comes_back(ledger):
    ask(ledger, "a", "b")
    assert ledger.lease("ann", 60)[0] == "a" and ledger.lease("ben", 60)[0] == "b"
    assert ledger.lease("cat", 60) is None  # all are held
    assert ledger.lease("ann", 60)[0] == "a"  # a reload shows the same one
    ledger.release("ann")
    assert ledger.lease("cat", -1)[0] == "a"  # a lease that has run out at once
    assert ledger.lease("dan", 60)[0] == "a"


def test_what_an_annotator_skipped_comes_last(ledger):
    ask(ledger, "a", "b")
    ledger.lease("ann", 60)
    ledger.release("ann", "a")
    assert ledger.lease("ann", 60, not_these=["a"])[0] == "b"
    ledger.answer_question("b", 1, "ann")
    assert ledger.lease("ann", 60, not_these=["a", "b"])[0] == "a"


def test_an_answer_stands_once_and_the_second_is_an_opinion(ledger):
    ask(ledger, "a")
    assert ledger.answer_question("a", -1, "ann", seconds=3.5) is True
    assert ledger.answer_question("a", 1, "ben") is False
    assert ledger.take(["a"]) == {"a": -1}
    assert ledger.db.execute("SELECT annotator, verdict FROM verdicts ORDER BY id").fetchall() == [("ann", -1), ("ben", 1)]
    with pytest.raises(KeyError):
        ledger.answer_question("z", 1, "ann")


def test_undo_works_until_the_run_has_used_the_answer(ledger):
    ask(ledger, "a")
    ledger.answer_question("a", 1, "ann")
    assert ledger.retract("a", "ben") is False  # not theirs
    assert ledger.retract("a", "ann") is True and [row[0] for row in ledger.open_questions()] == ["a"]
    ledger.answer_question("a", -1, "ann")
    assert ledger.take(["a"]) == {"a": -1}
    assert ledger.retract("a", "ann") is False and ledger.take(["a"]) == {"a": -1}


def test_a_run_waits_for_people_and_gets_their_answers(tmp_path):
    """A thread answers as an annotator would, through a connection of its own, while the run waits."""
    annotator = HumanAnnotator(TEXTS.get, wait_minutes=1)
    annotator.poll_seconds = 0.02
    waiting = []
    annotator.show = waiting.append
    oracle = Oracle(annotator, tmp_path / "labels.sqlite", asks_together=True)

    def person():
        mine = Ledger(tmp_path / "labels.sqlite")
        answered = 0
        while answered < 3:
            if question := mine.lease("ann", 60):
                mine.answer_question(question[0], -1 if question[0] == "b" else 1, "ann", seconds=1.0)
                answered += 1
            time.sleep(0.05)
        mine.close()

    thread = threading.Thread(target=person)
    thread.start()
    assert oracle.answer(["a", "b", "d"], [0.1, 0.2, 0.3], [True] * 3, step=2) == [1, -1, 1]
    thread.join()
    assert waiting[0] == 3 and waiting[-1] == 0 and waiting == sorted(waiting, reverse=True)
    assert oracle.queries() == 3 == oracle.queries(2) and oracle.queries(1) == 0


def test_an_answer_that_is_taken_back_before_it_is_used_is_waited_for_again(tmp_path):
    """Undo strikes between the moment that nothing is missing and the moment that the run takes the answers."""
    class Undone(HumanAnnotator):
        times = 0

        def answer(self, questions, ledger):
            ledger.put_questions(questions, {q.pair: TEXTS[q.pair] for q in questions})
            for question in questions:
                ledger.answer_question(question.pair, 1, "ann")
            self.times += 1
            if self.times == 1:
                assert ledger.retract("b", "ann")

    oracle = Oracle(Undone(TEXTS.get, 1), tmp_path / "labels.sqlite", asks_together=True)
    assert oracle.answer(["a", "b"], [0.1, 0.1], [True, True], step=0) == [1, 1]
    assert oracle.annotator.times == 2 and oracle.queries() == 2


def test_without_an_answer_the_run_stops_and_the_questions_stay_open(tmp_path):
    annotator = HumanAnnotator(TEXTS.get, wait_minutes=0.001)
    annotator.poll_seconds = 0.01
    oracle = Oracle(annotator, tmp_path / "labels.sqlite", asks_together=True)
    with pytest.raises(Waiting, match="no answer for 0.001 minutes, 2 of 2 are missing"):
        oracle.answer(["a", "b"], [0.1, 0.1], [True, True], step=0)
    assert len(oracle.ledger.open_questions()) == 2 and oracle.queries() == 0
    for pair in "ab":
        oracle.ledger.answer_question(pair, 1, "ann")
    assert oracle.answer(["a", "b"], [0.1, 0.1], [True, True], step=0) == [1, 1]  # what came in meanwhile is used


# ----------------------------------------------------------------------------------------------------------------------
# Budget and audit

def test_the_budget_goes_to_the_least_sure_and_is_never_passed(tmp_path):
    oracle = Oracle(DatasetAnnotator(LABELS), tmp_path / "labels.sqlite", max_queries=3)
    assert oracle.answer(["a", "b"], [0.9, 0.1], [True, True], step=0) == [1, -1]
    assert oracle.state["budget_spent_at_step"] is None
    assert oracle.answer(["c", "d"], [0.9, -0.1], [True, True], step=1) == [0, -1]
    assert oracle.state["budget_spent_at_step"] == 1
    assert oracle.answer(["c", "a"], [0.0, 0.0], [True, True], step=2) == [0, 1]  # what was bought stays free
    assert oracle.queries() == oracle.annotator.calls == 3


def test_audited_pairs_tell_how_right_pseudo_labels_are(asker):
    asker.answer(["a", "b", "c", "d"], [2.0, 3.0, 0.1, -2.5], [True] * 4, step=0, audit=[True, True, False, True])
    audit = asker.audit()
    assert audit["audited"] == 3 and audit["accuracy"] == 2 / 3  # a and d are labelled as their margins say, b is not
    assert audit["interval"] == wilson(2, 3)
    assert audit["predicted"] == pytest.approx(sum(1 / (1 + math.exp(-m)) for m in (2, 3, 2.5)) / 3)
    assert asker.audit(-1) is None


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
