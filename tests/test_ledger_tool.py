"""tools/ledger.py on real ledgers: the report, the export and the reuse of another run's answers.

    python -m pytest tests/test_ledger_tool.py -n 0
"""

import contextlib
import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from labels.annotators import DatasetAnnotator
from labels.ledger import Ledger, Panel, Question
from labels.oracle import Oracle, wilson
from runtime.config import Config
from runtime.sources import read_file
from tools import ledger


@pytest.fixture
def run(tmp_path):
    """A folder with a small ledger.

    dataset: d1 +1, d2 −1 audited.  human: ann h1 +1 audited (10 s, 0.25) and h2 +1 (20 s, 0.25), bob h3 −1 (60 s).
    judge: j1 −1 (3 s, 0.01).  reused: r1 +1.  Questions: h1–h3, q1 leased, q2 leased until long ago, q3.
    Verdicts beyond the answers': bob agrees on h1 and contradicts on h2; the judge's orders agree on j1, contradict on
    j2, and have no preference on j3.
    """
    folder = tmp_path / "run"
    folder.mkdir()
    store = Ledger(folder / "labels.sqlite")
    store.add("dataset", [(Question("d1", 0.5, 0), 1, "", None, None),
                          (Question("d2", 2.0, 1, audit=True), -1, "", None, None)])
    questions = [Question("h1", 1.5, 2, audit=True), *(Question(f"h{n}", 0.1, 2) for n in (2, 3)),
                 *(Question(f"q{n}", 0.1, 4) for n in (1, 2, 3))]
    store.put_questions(questions, {q.pair: ('"p"', '"a"', '"b"') for q in questions})
    assert store.answer_question("h1", 1, "ann", 10, 0.25) and store.answer_question("h2", 1, "ann", 20, 0.25)
    assert store.answer_question("h3", -1, "bob", 60)
    store.take(["h1", "h2", "h3"])  # so that bob's second opinions leave these answers as they are
    assert not store.answer_question("h1", 1, "bob", 5) and not store.answer_question("h2", -1, "bob", 5)
    store.add("judge", [(Question("j1", 0.1, 5), -1, "model", 3, 0.01)])
    for pair, verdict in (("j1", -1), ("j1", -1), ("j2", 1), ("j2", -1), ("j3", 0), ("j3", 1)):
        store.add_verdict(pair, "model", verdict, cost=0.005)
    store.add("reused", [(Question("r1", None, -1), 1, "old\x1b[31m", None, None)])
    store.lease("eve", 1000)
    store.db.execute("INSERT INTO leases VALUES ('q2', 'eve', 5)")
    store.close()
    return folder


def call(*args):
    """The command line, called from another folder."""
    return subprocess.run([sys.executable, ROOT / "tools/ledger.py", *args], capture_output=True, text=True, cwd="/")


def words_of(text, start):
    """The words of the first line that begins with `start`, without it."""
    return " ".join(next(line for line in text.splitlines() if line.startswith(start))[len(start):].split())


def test_the_report(run):
    done = call(run)
    assert done.returncode == 0 and done.stderr == ""
    text = done.stdout
    assert text.splitlines()[0] == str(run / "labels.sqlite")
    assert words_of(text, "answers  ") == "7: 6 bought by this run, 1 reused"
    assert words_of(text, "y1 preferred  ") == "4 of 7, 57.1% (95 % interval 25.0% to 84.2%)"
    assert f"{wilson(4, 7)[0]:.1%} {wilson(4, 7)[1]:.1%}" == "25.0% 84.2%"
    assert words_of(text, "audited  ") == ("1 of 2, 50.0% (95 % interval 9.5% to 90.5%) have the label that the "
                                           "margin's sign predicts")
    assert words_of(text, "open questions") == "3, of which leased: 1"
    assert words_of(text, "cost  ") == "0.5100 (3 without a known cost)"
    assert words_of(text, "verdicts") == "11 on 6 pairs, cost 0.5300 (3 without a known cost)"
    assert words_of(text, "two annotators").startswith("1 of 2, 50.0% ")
    # source: answers, no preference, y1 preferred, median seconds, labels an hour (3600 / mean seconds), cost, cost unknown
    sources = text.split("\n\n")[2]
    assert words_of(sources, "dataset") == "2 0 50.0% – – – 2"
    assert words_of(sources, "human") == "3 0 66.7% 20.0 120 0.5000 1"
    assert words_of(sources, "judge") == "1 0 0.0% 3.0 1,200 0.0100 0"
    assert words_of(sources, "reused") == "1 0 100.0% – – – 0"
    assert words_of(sources, "all") == "7 0 57.1% 15.0 155 0.5100 3"  # 4 in 93 s
    annotators = text.split("\n\n")[3]
    assert words_of(annotators, "human    ann") == "2 0 100.0% 15.0 240 0.5000 0"
    assert words_of(annotators, "human    bob") == "1 0 0.0% 60.0 60 – 1"
    assert words_of(annotators, "reused   old?[31m") == "1 0 100.0% – – – 0"
    assert words_of(text, "model") == "3 1 1 1 33.3%"
    for block in text.split("\n\n")[2:4]:  # aligned: numbers end in one column
        assert len({len(line) for line in block.splitlines()}) == 1


def test_a_reply_without_a_verdict_is_no_verdict_of_no_preference(tmp_path):
    """Nor is a text that the endpoint refused, about which a person may have been asked, nor a reply that never came."""
    store = Ledger(tmp_path / "labels.sqlite")
    for verdict, detail in ((0, {"said": None, "reply": "hm"}), (0, {"lost": "timed out"}), (1, {"said": "A"}),
                            (1, {"said": "B"})):
        store.add_verdict("a", "model", verdict, detail=json.dumps(detail))
    for detail in ({"said": None, "reply": "hm"}, {"unanswerable": "HTTP 400"}, {"unanswerable": "HTTP 413"}):
        store.add_verdict("b", "model", 0, detail=json.dumps(detail))
    for detail in ({"said": "C"}, {"said": "C"}):
        store.add_verdict("c", "model", 0, detail=json.dumps(detail))
    store.close()
    assert words_of(ledger.report(tmp_path), "model") == "2 1 0 1 50.0%"


def test_an_audited_label_agrees_with_the_sign_of_its_margin(tmp_path):
    store = Ledger(tmp_path / "labels.sqlite")
    store.add("dataset", [(Question(f"p{n}", margin, 0, audit=True), label, "", None, None)
                          for n, (margin, label) in enumerate([(-2.0, -1), (1.0, 1), (-1.0, 1)])])
    store.close()
    assert words_of(ledger.report(tmp_path), "audited  ").startswith("2 of 3, 66.7% ")


def test_answers_without_a_preference_are_counted_apart(run, tmp_path, capsys):
    """They are no label of either side, agree with no margin, and contradict no label."""
    store = Ledger(run / "labels.sqlite")
    store.add("human", [(Question("n1", 2.0, 2, audit=True), 0, "ann", 30, None)])
    store.close()
    text = call(run).stdout
    assert words_of(text, "no preference  ").startswith("1 of 8, 12.5% ")
    assert words_of(text, "y1 preferred  ").startswith("4 of 7, ") and words_of(text, "audited  ").startswith("1 of 2, ")
    assert words_of(text.split("\n\n")[3], "human    ann") == "3 1 100.0% 20.0 180 0.5000 1"
    other = tmp_path / "other"
    other.mkdir()
    store = Ledger(other / "labels.sqlite")
    store.add("human", [(Question("n1", 0.1, 0), 1, "eve", 1, None), (Question("h1", 0.1, 0), 0, "eve", 1, None)])
    store.close()
    assert "6 answers copied" in main(capsys, other, "--reuse", run)[1]
    assert "other label" not in main(capsys, other, "--reuse", run)[1]


def test_a_ledger_of_version_2_can_be_read_and_reused(tmp_path, capsys):
    """Reading does not bring it up to date."""
    old = tmp_path / "old"
    old.mkdir()
    with contextlib.closing(sqlite3.connect(old / "labels.sqlite")) as db:
        db.executescript((ROOT / "tests" / "ledger_2.sql").read_text() + "PRAGMA user_version = 2;")
    before = (old / "labels.sqlite").read_bytes()
    assert words_of(call(old).stdout, "answers  ") == "6: 5 bought by this run, 1 reused"
    assert main(capsys, old, "--csv", tmp_path / "answers.csv")[0] == 0
    assert main(capsys, tmp_path / "new", "--reuse", old)[1].startswith("6 answers copied")
    assert (old / "labels.sqlite").read_bytes() == before


def test_reading_changes_nothing_in_the_folder(run, tmp_path):
    """Neither when nobody else has it open, nor while a run has, nor after a run was killed."""
    def state():
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in run.iterdir()
                if not path.name.endswith("-shm")}

    before = state()
    text = ledger.report(run, now=0)
    assert state() == before
    assert "of which leased: 2" in text
    open_one = Ledger(run / "labels.sqlite")
    open_one.add("dataset", [(Question("new", 0.1, 9), 1, "", None, None)])
    before = state()
    assert "8: 7 bought" in ledger.report(run) and state() == before
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / "labels.sqlite").symlink_to(run / "labels.sqlite")
    assert "8: 7 bought" in ledger.report(tmp_path / "link")
    open_one.close()

    script = ("import os, signal, sys; from labels.ledger import Ledger, Question; store = Ledger(sys.argv[1])\n"
              "store.add('dataset', [(Question('last', 0.1, 9), 1, '', None, None)])\n"
              "os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", script, run / "labels.sqlite"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    before = state()
    assert "9: 8 bought" in ledger.report(run)
    assert state() == before


@pytest.mark.parametrize("changes", [1, 100])
def test_what_is_read_is_of_one_moment_although_a_page_is_in_use(run, changes, monkeypatch):
    """Each of its requests opens the ledger, writes and closes it again, perhaps all of that between two tables."""
    numbers, connect = iter(range(changes)), sqlite3.connect

    class Disturbed(sqlite3.Connection):
        def execute(self, sql, *values):
            if "FROM verdicts" in sql and (n := next(numbers, None)) is not None:
                with contextlib.closing(Ledger(run / "labels.sqlite")) as page:
                    page.put_questions([Question(f"new{n}", 0.1, 9)], {f"new{n}": ('"?"', '"yes"', '"no"')})
                    page.answer_question(f"new{n}", 1, "ann")
            return super().execute(sql, *values)

    monkeypatch.setattr(ledger.sqlite3, "connect", lambda path, uri=False, **options: connect(
        path, uri=uri, factory=Disturbed if uri else sqlite3.Connection, **options))
    tables = ledger.read_ledger(run)
    new = [{row["pair"] for row in tables[name] if row["pair"].startswith("new")} for name in ("answers", "verdicts")]
    assert new[0] == new[1] and len(new[0]) == min(changes, 5)


def test_an_empty_ledger(tmp_path):
    Ledger(tmp_path / "labels.sqlite").close()
    text = ledger.report(tmp_path)
    assert words_of(text, "answers  ").startswith("0:") and words_of(text, "audited") == "none"


def main(capsys, *args):
    code = ledger.main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def fails(capsys, words, *args):
    code, out, err = main(capsys, *args)
    assert code == 2 and out == "" and err.count("\n") == 1 and words in err, (code, out, err)


def test_errors_are_one_line(run, tmp_path, capsys, monkeypatch):
    fails(capsys, "no ledger: ", tmp_path / "absent")
    fails(capsys, "no ledger: ", run, "--reuse", tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    other = tmp_path / "other"
    other.mkdir()
    with contextlib.closing(Ledger(tmp_path / "live.sqlite")):  # its tables are still in live.sqlite-wal
        without_wal = (tmp_path / "live.sqlite").read_bytes()
    for content in (b"", b"garbage " * 500, without_wal):
        (other / "labels.sqlite").write_bytes(content)
        fails(capsys, "cannot be used as a ledger (", other)
        fails(capsys, "cannot be used as a ledger (", other, "--reuse", run)
        assert (other / "labels.sqlite").read_bytes() == content
    os.unlink(other / "labels.sqlite")
    with sqlite3.connect(other / "labels.sqlite") as db:
        db.execute("CREATE TABLE answers (pair TEXT)")
    db.close()
    fails(capsys, "cannot be used as a ledger (no such column: label): it is another file", other)
    assert ledger.in_words("x", sqlite3.OperationalError("disk I/O error")).endswith(": look at its disk, which may be full")
    done = call(tmp_path / "absent")  # the same from the command line
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1

    monkeypatch.setattr(ledger, "PATIENCE", 0.05)
    holder = sqlite3.connect(run / "labels.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")  # others may read
    old = tmp_path / "old"
    assert ledger.reuse(old, run) == (7, 0, 0)
    fails(capsys, "(database is locked): another process holds it: wait for that one", run, "--reuse", old)
    assert main(capsys, run)[0] == 0
    holder.execute("ROLLBACK")
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("DELETE FROM questions")
    fails(capsys, "(database is locked): another process holds it: wait for that one", run)
    fails(capsys, "(database is locked): another process holds it: wait for that one", run, "--reuse", old)
    holder.close()


def test_a_reader_that_stops_reading_is_no_error(run):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, ROOT / "tools/ledger.py", run], stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("flags", [[""], ["RUN", "--csv", ""], ["RUN", "--reuse", ""]])
def test_a_shell_variable_that_was_never_set_is_refused(flags, run, capsys):
    """Or an empty --csv would print the report, and an empty folder be the one we are in."""
    with pytest.raises(SystemExit) as end:
        ledger.main([str(run) if flag == "RUN" else flag for flag in flags])
    assert end.value.code == 2 and "is empty; name a file or folder" in capsys.readouterr().err


def test_csv(run, tmp_path, capsys):
    path = tmp_path / "answers.csv"
    assert main(capsys, run, "--csv", path) == (0, f"7 answers written to {path}\n", "")
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = {row["pair"]: row for row in csv.DictReader(file)}
    store = Ledger(run / "labels.sqlite")
    columns = [row[1] for row in store.db.execute("PRAGMA table_info(answers)")]
    store.close()
    assert list(rows["h1"]) == [*columns, "prompt", "y1", "y2", "opinions"] and len(rows) == 7
    assert {name: rows["h1"][name] for name in columns if name != "answered_at"} == {
        "pair": "h1", "label": "1", "source": "human", "annotator": "ann", "margin": "1.5", "step": "2", "audit": "1",
        "seconds": "10.0", "cost": "0.25", "used": "1", "detail": ""}
    assert [rows["h1"][name] for name in ("prompt", "y1", "y2")] == ["p", "a", "b"]
    assert json.loads(rows["h2"]["opinions"]) == [{"annotator": "ann", "verdict": 1, "seconds": 20},
                                                  {"annotator": "bob", "verdict": -1, "seconds": 5}]
    assert [rows["j1"][name] for name in ("prompt", "opinions")] == ["", ""]  # nobody was shown it
    assert rows["r1"]["annotator"] == "old\x1b[31m" and rows["r1"]["margin"] == ""
    path.write_text("mine")
    fails(capsys, "--force", run, "--csv", path)
    assert path.read_text() == "mine"
    assert main(capsys, run, "--csv", path, "--force")[0] == 0 and path.read_text() != "mine"
    fails(capsys, "is the ledger", run, "--csv", run / "labels.sqlite", "--force")
    fails(capsys, "No such file", run, "--csv", tmp_path / "absent" / "a.csv")
    assert not list(tmp_path.rglob("*.tmp")) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_no_cell_of_the_csv_is_a_formula(tmp_path, capsys, start):
    """A spreadsheet would run it; numbers stay numbers. The byte order mark is what Excel reads é by."""
    store = Ledger(tmp_path / "labels.sqlite")
    store.put_questions([Question("q", -0.5, 0)], {"q": tuple(map(json.dumps, (start + "HYPERLINK(1)", "é", "a =1")))})
    store.answer_question("q", -1, start + "ann", 5.0)
    store.close()
    assert main(capsys, tmp_path, "--csv", tmp_path / "out.csv")[0] == 0
    assert (tmp_path / "out.csv").read_bytes().startswith(b"\xef\xbb\xbfpair,")
    (place, row), = read_file(tmp_path / "out.csv")  # as training reads a file
    assert [row[name] for name in ("prompt", "y1", "y2", "annotator")] == [f"'{start}HYPERLINK(1)", "é", "a =1",
                                                                           f"'{start}ann"]
    assert (row["label"], row["margin"]) == ("-1", "-0.5")


def test_reused_answers_are_free_and_not_counted(run, tmp_path, capsys):
    new = tmp_path / "deep" / "new"
    assert main(capsys, new, "--reuse", run) == (0, f"7 answers copied from {run}; 0 were there already\n", "")
    oracle = Oracle(DatasetAnnotator({"x": -1}), new / "labels.sqlite", Config(max_queries=1))
    try:
        assert oracle.ledger.count() == oracle.queries() == 0
        margin, ask = torch.tensor([0.0, 9.0, 0.0]), torch.tensor([True, False, True])
        assert oracle.answer(["h1", "d2", "x"], margin, ask, 0).tolist() == [1, -1, -1]
        assert oracle.annotator.calls == oracle.queries() == 1
        assert oracle.audit() is None and oracle.ledger.cost() == (0, 1)
        assert oracle.ledger.db.execute(
            "SELECT label, source, annotator, step, audit, margin, seconds, cost FROM answers WHERE pair = 'h1'"
        ).fetchone() == (1, "reused", "ann", -1, 0, None, None, None)
    finally:
        oracle.close()
    assert words_of(ledger.report(new), "answers  ") == "8: 1 bought by this run, 7 reused"


def test_reuse_leaves_what_is_there(run, tmp_path, capsys):
    new = tmp_path / "new"
    new.mkdir()
    store = Ledger(new / "labels.sqlite")
    store.add("human", [(Question(pair, 0.1, 0), label, "eve", 1, None) for pair, label in (("h1", -1), ("h2", 1))])
    store.put_questions([Question("h3", 0.1, 3)], {"h3": ('"p"', '"a"', '"b"')})  # open, and the old answer answers it
    before = (run / "labels.sqlite").read_bytes()
    code, out, _ = main(capsys, new, "--reuse", run)
    assert code == 0 and out == (f"5 answers copied from {run}; 2 were there already, 1 of them with the other label "
                                 "(kept as they are)\n")
    assert store.db.execute("SELECT label FROM answers WHERE pair = 'h1'").fetchone() == (-1,)
    assert store.count() == 2 and store.open_questions() == []
    assert main(capsys, new, "--reuse", run)[1].startswith("0 answers copied")
    store.close()
    assert (run / "labels.sqlite").read_bytes() == before
    assert [path.name for path in run.iterdir()] == ["labels.sqlite"]
    fails(capsys, "is the same run", run, "--reuse", run)


def test_reuse_keeps_how_each_answer_came_about(run, tmp_path, capsys):
    """Some answers say it and some do not, as where people answer what a judge could not."""
    store = Ledger(run / "labels.sqlite")
    store.add("judge", [(Question("j4", 0.1, 6), 0, "model", 3, 0.01)], detail='{"coin": true}')
    store.close()
    new = tmp_path / "new"
    assert main(capsys, new, "--reuse", run)[1].startswith("8 answers copied")
    store = Ledger(new / "labels.sqlite")
    assert dict(store.db.execute("SELECT detail, COUNT(*) FROM answers GROUP BY detail")) == {None: 7, '{"coin": true}': 1}
    store.close()
    assert words_of(main(capsys, run)[1], "judge  ") == "1 by coin"
    assert words_of(main(capsys, new)[1], "judge  ") == "none"  # it has asked none


def alpha(units):
    """Krippendorff's alpha for nominal values, by its definition: 1 − observed / expected disagreement.  units: lists of
    values, two or more each."""
    values = [value for unit in units for value in unit]
    observed = sum(sum(a != b for a in unit for b in unit) / (len(unit) - 1) for unit in units) / len(values)
    expected = sum(a != b for a in values for b in values) / (len(values) * (len(values) - 1))
    return 1 - observed / expected


@pytest.fixture
def panel(tmp_path):
    """A folder whose questions have several opinions, and {pair: {person: what they said}}."""
    pytest.importorskip("krippendorff", reason="needs tools/requirements.txt")
    said = {"a": {"ann": 1, "bob": 1, "cat": 1}, "b": {"ann": 1, "bob": -1, "cat": 1},
            "c": {"ann": -1, "bob": -1, "cat": "equal"},
            "d": {"ann": "both bad", "bob": "equal", "cat": 1}, "e": {"ann": 1, "bob": "cannot judge", "cat": -1},
            "f": {"ann": 1}, "g": {"ann": 1, "bob": "cannot judge"}}
    store = Ledger(tmp_path / "labels.sqlite")
    texts = (json.dumps([{"role": "user", "content": "Why\nis =1+1 so?"}]), '"yes, \\"so\\""', '"no"')
    store.put_questions([Question(pair, 0.1, 0) for pair in said], dict.fromkeys(said, texts))
    for pair, opinions in said.items():
        for who, one in opinions.items():
            third = isinstance(one, str)
            store.answer_question(pair, 0 if third else one, who, 5.0, panel=Panel(3),
                                  detail={"said": one} if third else {"comment": "x"} if pair == "b" else None)
    store.add_verdict("a", "model", -1, detail="{}")  # a judge is not one of the people
    store.close()
    return tmp_path, said


def test_the_agreement_of_people(panel, capsys):
    folder, said = panel
    units = [[0 if isinstance(one, str) else one for one in opinions.values() if one != "cannot judge"]
             for opinions in said.values()]
    units = [unit for unit in units if len(unit) > 1]
    text = main(capsys, folder)[1]
    assert words_of(text, "people") == (f"5 pairs with two or more opinions, 4 with a disagreement (--disagreements lists "
                                        f"them); Krippendorff's alpha {alpha(units):.3f}")
    assert words_of(text, "judge  ") == "none"  # what people say is no judge's agreement
    people = text[text.index("People, and"):]
    # opinions, no preference, on pairs with others that are settled, of which they say the label, median seconds, an hour.
    # The labels are y1, y1, y2, 0, 0 (a split); f and g are open.
    assert words_of(people, "ann") == "7 1 5 80.0% 5.0 720" and words_of(people, "bob") == "6 3 5 80.0% 5.0 720"
    assert words_of(people, "cat") == "5 1 5 40.0% 5.0 720"
    store = Ledger(folder / "labels.sqlite")
    assert store.settle_all(Panel()) == 2  # ann alone decides f, and nobody g
    store.close()
    text = main(capsys, folder)[1]
    people = text[text.index("People, and"):]
    assert words_of(people, "ann") == "7 1 6 66.7% 5.0 720" and words_of(people, "bob") == "6 3 6 83.3% 5.0 720"


def test_who_decides_between_the_others_has_no_independent_opinion(panel, tmp_path, capsys):
    """An adjudicator has seen what the others said, and what they say becomes the label, so it tells nothing about
    agreement. What they said before that still counts."""
    folder = panel[0]
    before = ledger.report(folder)
    store = Ledger(folder / "labels.sqlite")
    for pair, who in (("c", "cat"), ("d", "eve"), ("e", "ann"), ("g", "eve")):
        store.answer_question(pair, -1, who, 9.0, panel=Panel(3, "eve"), detail={"adjudicates": True})
    labels = dict(store.db.execute("SELECT pair, label FROM answers"))
    store.close()
    assert [labels[pair] for pair in "deg"] == [-1, -1, -1]
    text = main(capsys, folder)[1]
    assert words_of(text, "people") == words_of(before, "people")
    people = text[text.index("People, and"):]
    # The labels of a to e and g are y1, y1, y2, y2, y2, y2, and ann's own opinions agree with the first three.
    assert words_of(people, "ann") == "7 1 6 50.0% 5.0 720"
    assert not any(line.startswith("eve") for line in people.splitlines())
    listed = " ".join(main(capsys, folder, "--disagreements")[1].split())
    assert "d y2 ann: both bad, bob: equal, cat: y1, eve decides: y2 user" in listed
    assert "e y2 ann: y1, bob: cannot judge, cat: y2, ann decides: y2 user" in listed
    assert "c y2 ann: y2, bob: y2, cat: equal, cat decides: y2 user" in listed  # although all say the same by now
    assert main(capsys, folder, "--csv", tmp_path / "out.csv")[0] == 0
    with open(tmp_path / "out.csv", newline="", encoding="utf-8-sig") as file:
        opinions = {row["pair"]: json.loads(row["opinions"]) for row in csv.DictReader(file)}
    assert [(one["annotator"], one["verdict"], "adjudicates" in one) for one in opinions["e"]] == [
        ("ann", 1, False), ("bob", 0, False), ("cat", -1, False), ("ann", -1, True)]


def test_two_annotators_agree_by_what_each_says_last(tmp_path):
    """Ann agrees with bob since she changed her mind. Eve, who has seen what ann said and decides, agrees with nobody."""
    store = Ledger(tmp_path / "labels.sqlite")
    store.put_questions([Question(pair, 0.1, 0) for pair in "ab"], dict.fromkeys("ab", ('"?"', '"yes"', '"no"')))
    for pair, who, label in (("a", "ann", 1), ("a", "ann", -1), ("a", "bob", -1), ("b", "ann", 1), ("b", "bob", 0)):
        store.answer_question(pair, label, who, panel=Panel(3, "eve"))
    store.answer_question("b", 1, "eve", panel=Panel(3, "eve"), detail={"adjudicates": True})
    assert words_of(ledger.report(tmp_path), "two annotators") == "1 of 1, 100.0% (95 % interval 20.7% to 100.0%) agree"
    store.answer_question("a", 1, "bob", panel=Panel(3, "eve"))
    assert words_of(ledger.report(tmp_path), "two annotators") == "0 of 1, 0.0% (95 % interval 0.0% to 79.3%) agree"
    store.close()


def test_disagreements_are_listed(panel, capsys):
    code, out, _ = main(capsys, panel[0], "--disagreements")
    lines = out.splitlines()
    assert code == 0 and [line.split()[0] for line in lines[1:]] == ["b", "c", "d", "e", "g"]
    assert " ".join(lines[1].split()) == "b y1 ann: y1, bob: y2, cat: y1 user: Why is =1+1 so?"
    assert "no preference" in lines[4] and "bob: cannot judge" in lines[4] and lines[5].split()[1] == "open"


def test_the_csv_has_texts_and_opinions(panel, tmp_path, capsys):
    main(capsys, panel[0], "--csv", tmp_path / "out.csv")
    with open(tmp_path / "out.csv", newline="", encoding="utf-8-sig") as file:
        rows = {row["pair"]: row for row in csv.DictReader(file)}
    assert [rows["b"][name] for name in ("prompt", "y1", "y2")] == ["user:\nWhy\nis =1+1 so?", 'yes, "so"', "no"]
    opinions = json.loads(rows["b"]["opinions"])
    assert [(one["annotator"], one["verdict"], one["comment"]) for one in opinions] == [
        ("ann", 1, "x"), ("bob", -1, "x"), ("cat", 1, "x")]
    assert json.loads(rows["e"]["opinions"])[1]["said"] == "cannot judge" and rows["e"]["label"] == "0"


def test_a_ledger_of_version_2_is_read_as_it_is(tmp_path, capsys):
    db = sqlite3.connect(tmp_path / "labels.sqlite")
    db.executescript((ROOT / "tests" / "ledger_2.sql").read_text())
    db.execute("UPDATE questions SET leased_to = 'eve', leased_until = 9e12 WHERE pair = 'h2'")
    db.execute("PRAGMA user_version = 2")
    db.commit()
    db.close()
    before = (tmp_path / "labels.sqlite").read_bytes()
    text = main(capsys, tmp_path)[1]
    assert words_of(text, "answers  ") == "6: 5 bought by this run, 1 reused"
    assert words_of(text, "open questions") == "1, of which leased: 1"
    assert words_of(text, "people") == "no pair has two opinions"
    assert main(capsys, tmp_path, "--csv", tmp_path / "out.csv")[0] == main(capsys, tmp_path, "--disagreements")[0] == 0
    assert (tmp_path / "labels.sqlite").read_bytes() == before
