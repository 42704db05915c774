"""labels/ledger.py, the file of questions and answers: `python -m pytest tests/test_ledger.py`."""

import os
import random
import re
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from helpers import ROOT, do_anything

from labels.ledger import VERSION, Ledger, LedgerError, Opinion, Panel, Question


def answers(**labels):
    """What Ledger.add takes, for these labels."""
    return [(Question(pair, 0.0, 0), label, "", None, None) for pair, label in labels.items()]


def test_of_two_answers_the_first_is_kept_and_a_label_is_one_of_two(tmp_path):
    ledger = Ledger(tmp_path / "labels.sqlite")
    ledger.add("x", answers(a=1))
    ledger.add("x", answers(b=1, a=-1))
    assert ledger.take(["a", "b"]) == {"a": 1, "b": 1} and ledger.count() == 2
    with pytest.raises(sqlite3.IntegrityError):
        ledger.add("x", answers(d=1, c=2))
    assert ledger.take(["c", "d"]) == {}  # all or none


def test_an_answer_without_a_preference_settles_its_pair_and_is_no_label(ledger):
    """It is kept, counted and paid for like any other; audits and what learns from labels never see it."""
    ledger.put_questions([Question("a", 2.0, 1, audit=True), Question("b", 2.0, 1, audit=True)], TEXTS)
    assert ledger.answer_question("a", 0, "ann", cost=0.5) and ledger.answer_question("b", -1, "ann")
    assert not ledger.answer_question("a", 1, "ben")  # the first answer stays
    assert ledger.take(["a", "b"]) == {"a": 0, "b": -1}
    assert ledger.open_questions() == [] and ledger.unanswered(["a", "b"]) == [] and ledger.lease("ben", 60) is None
    assert ledger.count() == 2 and ledger.without_preference() == ledger.without_preference(1) == 1
    assert ledger.without_preference(0) == 0 and ledger.cost() == (0.5, 1)
    assert ledger.audits() == [(2.0, -1)]


def test_an_answer_without_a_preference_can_be_taken_back(ledger):
    ask(ledger, "a")
    ledger.answer_question("a", 0, "ann")
    assert ledger.retract("a", "ann") and ledger.without_preference() == 0 and ledger.lease("ann", 60)[0] == "a"


def test_details_are_counted_by_step(ledger):
    for step, (pair, detail) in enumerate([("a", "x"), ("b", "y"), ("c", None), ("d", "x")]):
        ledger.add("judge", [(Question(pair, 0.0, step), 1, "m", None, None)], detail=detail)
    ledger.add("reused", [(Question("e", None, -1), 1, "m", None, None)], detail="x")
    assert ledger.details() == [("x", 2), ("y", 1)] and ledger.details(2) == [("x", 1), ("y", 1)]


# ----------------------------------------------------------------------------------------------------------------------
# A ledger of version 2. ledger_2.sql is what that version's code wrote, dumped by sqlite3.

@pytest.fixture
def old(tmp_path):
    path = tmp_path / "labels.sqlite"
    db = sqlite3.connect(path)
    db.execute("PRAGMA journal_mode = WAL")
    db.executescript((ROOT / "tests" / "ledger_2.sql").read_text())
    db.execute("PRAGMA user_version = 2")
    db.close()
    return path


def schema(ledger):
    return {name: sql for name, sql in ledger.db.execute("SELECT name, sql FROM sqlite_master")}


def test_an_old_ledger_is_brought_up_to_date_and_keeps_all_that_was_paid_for(old, tmp_path):
    before = {table: sqlite3.connect(old).execute(f"SELECT * FROM {table}").fetchall()
              for table in ("answers", "questions", "verdicts", "totals", "money")}
    ledger = Ledger(old)
    after = {table: ledger.db.execute(f"SELECT * FROM {table}").fetchall() for table in before}
    assert [row[:11] for row in after.pop("answers")] == before.pop("answers")
    asked = [row[:8] for row in before.pop("questions")]
    assert after.pop("questions") == [(*row, row[0] == "h2") for row in asked]
    assert [row[:8] for row in after["verdicts"]] == before.pop("verdicts")
    assert {row[1] for row in after.pop("verdicts") if row[8]} == {"h1"} and after == before
    assert schema(ledger) == schema(Ledger(tmp_path / "new.sqlite"))  # the tables of a new one, and nothing besides
    assert totals(ledger) == counted(ledger) and ledger.count() == 5 and ledger.cost() == (0.77, 2)
    assert dict(ledger.details()) == {'{"rubric": null}': 1, '{"rubric": null, "coin": true}': 1}
    assert ledger.answer_question("h2", 0, "ann") and ledger.take(["h1", "h2", "r1"]) == {"h1": 1, "h2": 0, "r1": -1}
    assert totals(ledger) == counted(ledger) and ledger.count() == 6
    ledger.close()
    assert Ledger(old).without_preference() == 1  # opened a second time, nothing is done again


def test_an_old_ledger_that_cannot_be_brought_up_to_date_stays_as_it_is(old, monkeypatch):
    before = list(sqlite3.connect(old).iterdump())
    monkeypatch.setattr("labels.ledger.AFTER_TABLES", "INSERT INTO answers SELECT * FROM nowhere;")
    with pytest.raises(LedgerError, match="no such table: nowhere"):
        Ledger(old)
    db = sqlite3.connect(old)
    assert list(db.iterdump()) == before and db.execute("PRAGMA user_version").fetchone() == (2,)


def test_two_processes_bring_an_old_ledger_up_to_date_once(old):
    failed, together = [], threading.Barrier(6)

    def open_it():
        together.wait()
        try:
            Ledger(old).close()
        except (LedgerError, sqlite3.Error) as error:
            failed.append(error)

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ledger = Ledger(old)
    assert not failed and ledger.count() == 5 and totals(ledger) == counted(ledger)


def test_what_is_not_a_ledger_of_ours_is_refused_and_left_alone(tmp_path):
    (tmp_path / "text").write_text("not a database, but long enough to look like a file of some kind" * 20)
    other = sqlite3.connect(tmp_path / "other")
    other.execute("CREATE TABLE answers (pair TEXT)")
    other.execute("PRAGMA user_version = 1")
    other.close()
    before = [(tmp_path / name).read_bytes() for name in ("text", "other")]
    with pytest.raises(LedgerError, match="text: cannot be used as a ledger .*not a database.*move it away"):
        Ledger(tmp_path / "text")
    with pytest.raises(LedgerError, match=rf"other: not a ledger of this version \(1, not {VERSION}\): move it away"):
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


# ----------------------------------------------------------------------------------------------------------------------
# The totals, against sums over all rows

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


def test_totals_are_those_of_the_rows_whatever_is_done_by_whom(tmp_path):
    draw = random.Random(0)
    ledgers = [Ledger(tmp_path / "labels.sqlite") for _ in range(2)]  # as in two processes
    for _ in range(400):
        do_anything(draw.choice(ledgers), draw)
        assert totals(ledgers[0]) == counted(ledgers[0])
    assert ledgers[0].count() > 5 and ledgers[0].cost()[0] > 5  # something was left to count
    ledgers[1].close()
    assert totals(Ledger(tmp_path / "labels.sqlite")) == counted(ledgers[0])


def test_totals_hold_while_several_processes_write(tmp_path):
    script = ("import random, sys; from helpers import Ledger, do_anything; draw = random.Random(sys.argv[2])\n"
              "ledger = Ledger(sys.argv[1])\n"
              "for _ in range(150): do_anything(ledger, draw)\n")
    writers = [subprocess.Popen([sys.executable, "-c", script, tmp_path / "labels.sqlite", str(n)],
                                env={**os.environ, "PYTHONPATH": f".{os.pathsep}tests"}) for n in range(2)]
    assert [writer.wait(timeout=600) for writer in writers] == [0, 0]
    ledger = Ledger(tmp_path / "labels.sqlite")
    assert ledger.count() and totals(ledger) == counted(ledger)


def test_a_ledger_that_many_create_at_once_loses_nothing(tmp_path):
    failed, together = [], threading.Barrier(8)

    def open_and_add(n):
        together.wait()
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
    assert not failed and totals(ledger) == counted(ledger) and ledger.count() == 8


def test_counting_reads_no_answers(tmp_path):
    """What is done at every step does not grow with the ledger: SQLite's own plan names only the totals."""
    ledger = Ledger(tmp_path / "labels.sqlite")
    asked = []
    ledger.db.set_trace_callback(asked.append)
    ledger.count(3), ledger.cost(), ledger.audits(3), ledger.without_preference(3), ledger.details(3)
    ledger.db.set_trace_callback(None)
    assert len(asked) == 5
    for query in asked:
        plan = " ".join(row[3] for row in ledger.db.execute(f"EXPLAIN QUERY PLAN {query}"))
        assert "totals" in plan or "USING COVERING INDEX" in plan
        assert "answers" not in re.sub("answers USING COVERING INDEX (audits|without_preference|details)", "", plan)
        assert "verdicts" not in plan


# ----------------------------------------------------------------------------------------------------------------------
# Questions for people

TEXTS = {pair: ('"prompt"', f'"{pair} one"', f'"{pair} two"') for pair in "abcd"}


def ask(ledger, *pairs):
    ledger.put_questions([Question(pair, 0.1, 0) for pair in pairs], TEXTS)


def test_a_question_is_leased_to_one_annotator_and_comes_back(ledger):
    ask(ledger, "a", "b")
    assert ledger.lease("ann", 60)[0] == "a" and ledger.lease("ben", 60)[0] == "b"
    assert ledger.lease("cat", 60) is None  # others hold both
    assert ledger.lease("ann", 60)[0] == "a"  # a reload shows the same one
    ledger.release("ann")
    assert ledger.lease("cat", -1)[0] == "a"  # a lease that runs out at once
    assert ledger.lease("dan", 60)[0] == "a"


def test_a_clock_that_is_set_back_locks_no_question(ledger, monkeypatch):
    """Ann's machine was off, and its clock a day ahead until it was set."""
    ask(ledger, "a")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    assert ledger.lease("ann", 60)[0] == "a"
    monkeypatch.setattr(time, "time", lambda: now)
    assert ledger.lease("ben", 60)[0] == "a" and ledger.lease("ann", 60) is None


def test_a_question_that_is_asked_again_stays_as_it_is(ledger):
    """And one whose pair has an answer is not open."""
    ask(ledger, "a")
    ledger.add("judge", answers(b=1))
    ledger.put_questions([Question(pair, 0.9, 5) for pair in "ab"], TEXTS)
    assert ledger.db.execute("SELECT pair, margin, step, open FROM questions ORDER BY pair").fetchall() == [
        ("a", 0.1, 0, 1), ("b", 0.9, 5, 0)]


def test_the_oldest_question_comes_first_and_progress_is_that_of_the_open_steps(ledger):
    ledger.put_questions([Question(pair, 0.1, step) for pair, step in (("d", 0), ("c", 1), ("b", 1), ("a", 2))], TEXTS)
    for pair, progress in (("d", (3, 3)), ("b", (2, 3)), ("c", (1, 1))):
        assert ledger.lease("ann", 60)[0] == ledger.open_questions()[0][0] == pair
        ledger.answer_question(pair, 1, "ann")
        assert ledger.progress() == progress
    assert ledger.given_by("ann") == (3, "c") and ledger.given_by("ben") == (0, None)


def test_what_an_annotator_skipped_comes_last(ledger):
    ask(ledger, "a", "b")
    ledger.lease("ann", 60)
    ledger.release("ann", "a")
    assert ledger.lease("ann", 60, not_these=["a"])[0] == "b" == ledger.lease("ann", 60)[0]  # also after a reload
    ledger.release("ann")
    assert ledger.lease("ann", 60, not_these=["b", "a"])[0] == "a"
    ledger.answer_question("b", 1, "ann")
    assert ledger.lease("ann", 60, not_these=["a", "b"])[0] == "a"


def test_a_second_opinion_counts_until_the_run_has_used_the_answer(ledger):
    ask(ledger, "a", "b")
    assert ledger.answer_question("a", -1, "ann", seconds=3.5) is True
    # It does not settle anything, but now nobody has more than half.
    assert ledger.answer_question("a", 1, "ben", seconds=2.0) is False
    assert ledger.db.execute("SELECT label, annotator, seconds, detail FROM answers").fetchall() == [
        (0, "ann, ben", 5.5, '{"split": true}')]
    assert ledger.take(["a"]) == {"a": 0}
    assert ledger.answer_question("a", 1, "cat") is False and ledger.take(["a"]) == {"a": 0}
    assert ledger.db.execute("SELECT annotator, verdict FROM verdicts ORDER BY id").fetchall() == [
        ("ann", -1), ("ben", 1), ("cat", 1)]
    with pytest.raises(KeyError):
        ledger.answer_question("z", 1, "ann")


def test_an_answer_from_elsewhere_ends_the_leases_of_its_question(ledger):
    ask(ledger, "a", "b")
    assert ledger.lease("ann", 60)[0] == "a"
    ledger.add("judge", answers(a=1))
    assert not ledger.renew("ann", "a", 60) and ledger.lease("ann", 60)[0] == "b"


def test_the_last_verdicts_come_newest_first(ledger):
    for detail in ("1", "2", None, "3"):
        ledger.add_verdict("a", "model", 0, detail=detail)
    ledger.add_verdict("a", "other", 0, detail="4")
    assert ledger.last_verdicts("model", 2) == ["3", "2"]
    assert ledger.verdicts("a", "model") == ["1", "2", "3"]


def test_a_judges_verdicts_are_no_opinions_and_its_answer_stays(ledger):
    ask(ledger, "a", "b")
    for _ in range(2):
        ledger.add_verdict("a", "model", -1, 9.0, 0.5, detail="{}")
        ledger.add_verdict("b", "model", -1, detail="{}")
    ledger.add("judge", [(Question("b", 0.1, 0), -1, "model", None, None)])
    assert ledger.lease("ann", 60)[0] == "a"  # where the judge had no answer, a person is asked
    assert ledger.answer_question("a", 1, "ann") and not ledger.answer_question("b", 1, "ann")
    assert ledger.db.execute("SELECT seconds, cost FROM answers WHERE pair = 'a'").fetchall() == [(None, None)]
    assert not ledger.retract("b", "ann") and list(ledger.opinions("b")) == ["ann"]
    assert ledger.take(["a", "b"]) == {"a": 1, "b": -1}


OPINIONS = {"a": 1, "b": -1, "=": 0}


@pytest.mark.parametrize("said, plain, adjudicated", [
    ("a", None, None), ("ab", None, None), ("aab", 1, 1), ("baa", 1, 1), ("bb=", -1, -1), ("a==", 0, 0), ("===", 0, 0),
    ("ab=", 0, None), ("aabb", 0, None), ("aab=", 0, None), ("aaab=", 1, 1), ("aabb=", 0, None)])
def test_what_more_than_half_say_is_the_label(said, plain, adjudicated):
    """Of panels of three people or more, without an adjudicator and with one. None: the question stays open."""
    opinions = {f"p{n}": Opinion(OPINIONS[one], "equal" if one == "=" else None) for n, one in enumerate(said)}
    for panel, expected in ((Panel(3), plain), (Panel(3, "eve"), adjudicated)):
        decided = panel.decide(opinions)
        assert (decided and decided[0]) == expected
    decided = Panel(3, "eve").decide({**opinions, "eve": Opinion(-1, adjudicates=True)})
    assert decided == (-1, "eve", {"adjudicated": True})


def test_of_several_kinds_of_no_preference_the_most_common_is_kept():
    opinions = {who: Opinion(0, said) for who, said in zip("abc", ("equal", "both bad", "both bad"))}
    assert Panel(3).decide(opinions) == (0, "a, b, c", {"opinions": 3, "agree": 3, "no_preference": "both bad"})


def test_two_people_for_each_question_and_nobody_twice(ledger):
    ask(ledger, "a", "b")
    panel = Panel(2)

    def lease(who):
        row = ledger.lease(who, 60, panel=panel)
        return row and row[0]

    assert [lease(who) for who in ("ann", "ben", "cat", "dan", "eve")] == ["a", "a", "b", "b", None]
    assert not ledger.answer_question("a", 1, "ann", panel=panel) and ledger.unanswered(["a"])
    assert lease("ann") is None and lease("eve") is None  # ann has given hers, and ben is about to
    ledger.release("ben")
    assert lease("eve") == "a"
    assert not ledger.renew("ben", "a", 60, panel)  # given back
    assert ledger.answer_question("a", 1, "eve", panel=panel) and ledger.take(["a"]) == {"a": 1}
    ledger.db.execute("UPDATE leases SET until = 0")
    assert ledger.renew("cat", "b", 60, panel)  # run out, but nobody has taken the place
    assert lease("ann") == "b" and not ledger.renew("dan", "b", 60, panel)  # somebody has
    ledger.answer_question("b", 1, "ann", panel=panel)
    ledger.release("cat")
    assert lease("ann") is None and lease("dan") == "b"


def test_an_adjudicator_decides_where_people_split(ledger):
    ask(ledger, "a", "b")
    panel = Panel(2, "eve")
    for label in (-1, 1):  # ann changes her mind, and is still one person
        ledger.answer_question("b", label, "ann", panel=panel)
    assert not ledger.is_split("b", panel) and ledger.lease("eve", 60, panel=panel)[0] == "a"
    ledger.release("eve")
    assert not ledger.answer_question("b", -1, "ben", panel=panel) and ledger.is_split("b", panel)
    assert ledger.lease("cat", 60, panel=panel)[0] == "a" and ledger.lease("eve", 60, panel=panel)[0] == "b"
    assert ledger.answer_question("b", 0, "eve", panel=panel, detail={"said": "equal", "adjudicates": True})
    assert ledger.db.execute("SELECT pair, label, annotator, detail FROM answers").fetchall() == [
        ("b", 0, "eve", '{"adjudicated": true, "no_preference": "equal"}')]
    before = ledger.db.execute("SELECT * FROM answers").fetchall()
    ledger.answer_question("b", 1, "cat", panel=panel)  # too late, it changes nothing
    assert ledger.db.execute("SELECT * FROM answers").fetchall() == before and ledger.retract("b", "cat", panel)
    assert ledger.retract("b", "eve", panel) and ledger.is_split("b", panel)
    ledger.answer_question("a", 1, "ann", panel=panel)  # one opinion, which settles nothing
    assert ledger.settle_all(Panel(2)) == 1 and ledger.take(["b"]) == {"b": 0}  # without an adjudicator


def test_undo_works_until_the_run_has_used_the_answer(ledger):
    ask(ledger, "a")
    ledger.answer_question("a", 1, "ann")
    assert ledger.retract("a", "ben") is False  # not theirs
    assert ledger.retract("a", "ann") is True and [row[0] for row in ledger.open_questions()] == ["a"]
    for label in (-1, 1):
        ledger.answer_question("a", label, "ann")
    assert ledger.retract("a", "ann") is True  # what ann said last
    assert ledger.take(["a"]) == {"a": -1}
    assert ledger.retract("a", "ann") is False and ledger.take(["a"]) == {"a": -1}
