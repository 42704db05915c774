"""oracle.py: the ledger, the annotator, and answers over several ranks: `python -m pytest tests/test_oracle.py`."""

import contextlib
import math
import os
import random
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from labels.oracle import (
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
    other.execute("PRAGMA user_version = 1")
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


def commits(wal):
    """How many commits that changed something a write-ahead log holds: its frames that end one say how long the file is."""
    content = wal.read_bytes()
    frame = 24 + int.from_bytes(content[8:12], "big")  # a header and a page
    return sum(content[at + 4:at + 8] != bytes(4) for at in range(32, len(content), frame))


def test_a_question_that_is_answered_at_once_costs_one_commit(asker, tmp_path):
    asker.answer(["a"], [0.1], [True], step=0)
    before = commits(tmp_path / "labels.sqlite-wal")
    asker.answer(["b", "c"], [0.1, 0.1], [True, True], step=1)
    assert commits(tmp_path / "labels.sqlite-wal") == before + 1
    asker.answer(["a", "b", "c"], [0.1] * 3, [True] * 3, step=2)  # known, and taken for good
    assert commits(tmp_path / "labels.sqlite-wal") == before + 1


# The totals, against sums over all rows.

def counted(ledger):
    """(answers up to each step, (money spent, answers of unknown cost)) as the ledger's rows say."""
    def one(query, *values):
        return ledger.db.execute(query, values).fetchone()[0]
    counts = [one("SELECT COUNT(*) FROM answers WHERE step BETWEEN 0 AND ?", step) for step in range(5)]
    spent = one("SELECT TOTAL(cost) FROM verdicts") + one(
        "SELECT TOTAL(cost) FROM answers WHERE step >= 0 AND pair NOT IN (SELECT pair FROM verdicts)")
    return counts, (pytest.approx(spent), one("SELECT COUNT(*) FROM answers WHERE step >= 0 AND cost IS NULL"))


def totals(ledger):
    assert ledger.count() == ledger.count(4)
    return [ledger.count(step) for step in range(5)], ledger.cost()


def do_anything(ledger, draw):
    """One random deed of a run, a judge, an annotator or an import; the same pair over and over."""
    pair, step, cost = f"p{draw.randrange(40)}", draw.randrange(-1, 5), draw.choice([None, 0.25, 3.0])
    question, label, who = Question(pair, 0.5, step), draw.choice([1, -1]), draw.choice(["ann", "bob"])
    kind = draw.randrange(6)
    if kind == 0:
        ledger.add("x", [(question, label, who, None, cost), (Question(pair + "'", 0.5, step), label, who, None, None)])
    elif kind == 1:
        ledger.add_verdict(pair, who, label, cost=cost)
    elif kind == 2:
        ledger.put_questions([Question(pair, 0.5, max(step, 0))], {pair: ("", "", "")})
        ledger.answer_question(pair, label, who, cost=cost)
    elif kind == 3:
        for done in ledger.db.execute("SELECT pair, annotator FROM answers WHERE source = 'human' LIMIT 1").fetchall():
            ledger.retract(*done)
    elif kind == 4:  # by hand
        ledger.db.execute(f"DELETE FROM {draw.choice(['answers', 'verdicts'])} WHERE pair = ?", (pair,))
    else:
        with contextlib.suppress(KeyboardInterrupt), ledger.transaction():
            ledger.add("x", [(question, label, who, None, cost)])
            raise KeyboardInterrupt


def test_totals_are_those_of_the_rows_whatever_is_done_by_whom(tmp_path):
    draw = random.Random(0)
    ledgers = [Ledger(tmp_path / "labels.sqlite") for _ in range(2)]  # as two processes have them
    for _ in range(400):
        do_anything(draw.choice(ledgers), draw)
        assert totals(ledgers[0]) == counted(ledgers[0])
    assert ledgers[0].count() > 5 and ledgers[0].cost()[0] > 5  # something was left to count
    ledgers[1].close()
    assert totals(Ledger(tmp_path / "labels.sqlite")) == counted(ledgers[0])


def test_totals_hold_while_several_processes_write(tmp_path):
    script = ("import random, sys; from test_oracle import Ledger, do_anything; draw = random.Random(sys.argv[2])\n"
              "ledger = Ledger(sys.argv[1])\n"
              "for _ in range(150): do_anything(ledger, draw)\n")
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "labels.sqlite", str(n)],
                                env={**os.environ, "PYTHONPATH": f".{os.pathsep}tests"}) for n in range(2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
    ledger = Ledger(tmp_path / "labels.sqlite")
    assert ledger.count() and totals(ledger) == counted(ledger)


def version_1(path):
    """A connection to a ledger as version 1 of the schema made it."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript("""
        CREATE TABLE answers (
            pair TEXT PRIMARY KEY, label INTEGER NOT NULL CHECK (label IN (1, -1)), source TEXT NOT NULL,
            annotator TEXT NOT NULL DEFAULT '', margin REAL, step INTEGER NOT NULL, audit INTEGER NOT NULL DEFAULT 0,
            answered_at REAL NOT NULL, seconds REAL, cost REAL, used INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID;
        CREATE INDEX answers_by_step ON answers (step);
        CREATE TABLE questions (
            pair TEXT PRIMARY KEY, prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL, margin REAL,
            step INTEGER NOT NULL, audit INTEGER NOT NULL, asked_at REAL NOT NULL, leased_to TEXT,
            leased_until REAL) WITHOUT ROWID;
        CREATE TABLE verdicts (
            id INTEGER PRIMARY KEY, pair TEXT NOT NULL, annotator TEXT NOT NULL,
            verdict INTEGER NOT NULL CHECK (verdict IN (1, 0, -1)), seconds REAL, cost REAL, detail TEXT, at REAL NOT NULL);
        CREATE INDEX verdicts_by_pair ON verdicts (pair);
        PRAGMA user_version = 1;""")
    return db


def test_a_ledger_of_version_1_is_brought_up_to_date_in_place(tmp_path):
    """Even under a process of the version before that still has it open."""
    old = version_1(tmp_path / "labels.sqlite")
    insert = ("INSERT INTO answers (pair, label, source, step, cost, answered_at, margin, audit) "
              "VALUES (?, 1, 'x', ?, ?, 0, 1, ?)")
    old.executemany(insert, [("a", 0, None, 1), ("b", 3, 0.5, 0), ("c", -1, 7.0, 0), ("d", 3, 0.5, 1)])
    old.execute("INSERT INTO verdicts (pair, annotator, verdict, cost, at) VALUES ('d', 'j', 1, 0.25, 0)")
    rows = old.execute("SELECT * FROM answers").fetchall()
    ledgers = [Ledger(tmp_path / "labels.sqlite") for _ in range(2)]
    assert ledgers[0].db.execute("SELECT * FROM answers").fetchall() == rows
    assert totals(ledgers[1]) == counted(ledgers[0]) == ([1, 1, 1, 3, 3], (0.75, 1)) and ledgers[0].audits(2) == [(1, 1)]
    old.execute(insert, ("e", 1, None, 0))
    assert totals(ledgers[0]) == counted(ledgers[0])
    assert ledgers[0].take(["e", "a"]) == {"e": 1, "a": 1}


def test_a_ledger_that_many_bring_up_to_date_at_once_loses_nothing(tmp_path):
    version_1(tmp_path / "labels.sqlite").execute(
        "INSERT INTO answers (pair, label, source, step, answered_at) VALUES ('a', 1, 'x', 0, 0)")
    failed = []

    def open_and_add(n):
        try:
            ledger = Ledger(tmp_path / "labels.sqlite")
            ledger.add("x", answers(**{str(n): 1}))
            ledger.close()
        except (LedgerError, sqlite3.Error) as error:
            failed.append(error)

    threads = [threading.Thread(target=open_and_add, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger = Ledger(tmp_path / "labels.sqlite")
    assert not failed and totals(ledger) == counted(ledger) and ledger.count() == 9


def test_counting_reads_no_answers(tmp_path):
    """What is done at every step does not grow with the ledger: SQLite's own plan names no table but the totals."""
    ledger = Ledger(tmp_path / "labels.sqlite")
    asked = []
    ledger.db.set_trace_callback(asked.append)
    ledger.count(3), ledger.cost(), ledger.audits(3)
    ledger.db.set_trace_callback(None)
    assert len(asked) == 3
    for query in asked:
        plan = " ".join(row[3] for row in ledger.db.execute(f"EXPLAIN QUERY PLAN {query}"))
        assert "totals" in plan or "USING COVERING INDEX audits" in plan
        assert "answers" not in plan.replace("answers USING COVERING INDEX audits", "") and "verdicts" not in plan


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
        from labels.oracle import DatasetAnnotator, Oracle

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

    def pressed_meanwhile(*args, **how):
        os.kill(os.getpid(), signal.SIGINT)
        add(*args, **how)

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
