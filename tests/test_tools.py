"""tools/ledger.py and tools/exchange.py, on real ledgers: `python -m pytest tests/test_tools.py`."""

import csv
import json
import os
import signal
import sqlite3
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace

import pytest

from labels.oracle import DatasetAnnotator, Ledger, Oracle, Question, wilson
from tools import exchange, ledger
from tools.exchange import ExchangeError, as_text, drawn_sides, export_questions, import_answers

ROOT = Path(__file__).resolve().parent.parent
HOSTILE = [  # each is the first response of a pair
    "line one\nline two\r\n\tindented\n\n", "</script><script>alert(1)</script> <b>&amp;</b> $prompt {{x}}",
    "עברית ואז English \u202eRTL\u202c", "👩‍👩‍👧 e\u0301 \ufeff \u2028 \u2029 \x85 \x0b",
    "\"quotes\" 'and' \\n \\\\", "\x00\x01", "https://example.org/a.txt", "", " ", "=1+1"]
FORMATS = ("jsonl", "label-studio")


@pytest.fixture
def store(tmp_path):
    made = Ledger(tmp_path / "labels.sqlite")
    yield made
    made.close()


def ask(store, texts):
    """Put questions. texts: {pair: (prompt, y1, y2)}."""
    store.put_questions([Question(pair, 0.1, 3) for pair in texts],
                        {pair: tuple(map(json.dumps, three)) for pair, three in texts.items()})


def simple(count):
    return {f"pair{n}": (f"prompt {n}", f"first {n}", f"second {n}") for n in range(count)}


def hostile():
    texts = {f"h{n}": (text, text, f"other {n}") for n, text in enumerate(HOSTILE)}
    texts["messages"] = ([{"role": "system", "content": HOSTILE[1]}, {"role": "user", "content": HOSTILE[3]}],
                         [{"role": "assistant", "content": HOSTILE[2]}], [{"role": "assistant", "content": HOSTILE[0]}])
    texts["turns"] = ("p", [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}], "c")
    return texts


def answers(store):
    return dict(store.db.execute("SELECT pair, label FROM answers"))


def everything(store):
    return [store.db.execute(f"SELECT * FROM {table}").fetchall() for table in ("answers", "questions", "verdicts")]


def fill_in(path, format, wanted, annotator="ann", swap=False):
    """What another tool would do: label an exported file by its texts. wanted: {pair: text of the better response}, the
    others are skipped. swap: with the sides the other way round."""
    if format == "jsonl":
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    else:
        rows = [task["data"] for task in json.loads(path.read_text(encoding="utf-8"))]
    tasks = []
    for n, row in enumerate(rows):
        if swap:
            row["response_a"], row["response_b"] = row["response_b"], row["response_a"]
        better = wanted.get(row["pair"])
        side = None if better is None else [row["response_a"], row["response_b"]].index(better)
        row |= {"label": side if side is None else "ab"[side], "annotator": annotator, "seconds": 2 + n}
        tasks.append({"id": n + 7, "data": row, "predictions": [], "annotations": [annotation(
            n, None if side is None else ["left", "right"][side], completed_by={"id": 4, "email": annotator},
            lead_time=2.0 + n, was_cancelled=side is None, created_at="2024-03-09T22:16:08.728353Z")]})
    if format == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        path.write_text(json.dumps(tasks), encoding="utf-8")
    return path


def annotation(id, side, **more):
    """One of Label Studio's; side: "left", "right", or None where nothing was chosen."""
    result = [{"id": "x", "type": "pairwise", "from_name": "preference", "to_name": "preference", "origin": "manual",
               "value": {"selected": side}}]
    return {"id": id, "completed_by": id, "lead_time": 1.5, "was_cancelled": False, "result": result if side else [],
            **more}


# Exchange.

@pytest.mark.parametrize("format", FORMATS)
def test_hostile_texts_come_out_exactly(store, tmp_path, format):
    texts = hostile()
    ask(store, texts)
    path = tmp_path / "out"
    assert export_questions(store, path, format) == len(texts)
    lines = path.read_bytes().decode("utf-8").splitlines()  # splits at more than \n: none of that may be in a text
    if format == "jsonl":
        assert len(lines) == len(texts)
        rows, form = [json.loads(line) for line in lines], lambda value: value
    else:
        rows, form = [task["data"] for task in json.loads(path.read_bytes())], as_text
    assert {row["pair"] for row in rows} == set(texts)
    for row in rows:
        prompt, y1, y2 = map(form, texts[row["pair"]])
        assert row["prompt"] == prompt and list(row) == ["pair", "prompt", "response_a", "response_b"]
        assert [row["response_a"], row["response_b"]] == ([y1, y2] if drawn_sides(row["pair"])[0] == 1 else [y2, y1])
    assert not list(tmp_path.glob("*.tmp"))


def test_sides_are_drawn_apart_from_y1_and_y2():
    drawn = [drawn_sides(f"pair{n}") for n in range(1000)]
    assert 440 < drawn.count((1, -1)) < 560  # 500 ± 3.8 standard deviations
    assert set(drawn) == {(1, -1), (-1, 1)}


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("format", FORMATS)
def test_round_trip_maps_each_label_back_by_its_text(store, tmp_path, format, swap):
    texts = hostile()
    ask(store, texts)
    export_questions(store, tmp_path / "out", format)
    form = as_text if format == "label-studio" else lambda value: value
    labels = {pair: 1 if n % 3 else -1 for n, pair in enumerate(texts)}
    wanted = {pair: form(texts[pair][1 if label == 1 else 2]) for pair, label in labels.items()}
    path = fill_in(tmp_path / "out", format, wanted, swap=swap)
    assert import_answers(store, path, format) == {
        "answered": len(texts), "second_opinions": 0, "already_there": 0, "skipped": 0}
    assert answers(store) == labels
    assert store.db.execute("SELECT DISTINCT annotator, source, step FROM answers").fetchall() == [("ann", "human", 3)]
    assert store.db.execute("SELECT seconds FROM answers ORDER BY seconds").fetchall() == [
        (2 + n,) for n in range(len(texts))]
    assert store.open_questions() == []

    before = everything(store)
    assert import_answers(store, path, format)["already_there"] == len(texts)
    assert everything(store) == before


@pytest.mark.parametrize("format", FORMATS)
def test_partial_import_and_second_opinions(store, tmp_path, format):
    ask(store, simple(4))
    anns, bobs = tmp_path / "anns", tmp_path / "bobs"
    for path in (anns, bobs):
        export_questions(store, path, format)
    fill_in(anns, format, {"pair0": "first 0", "pair2": "second 2"})
    fill_in(bobs, format, {"pair0": "second 0", "pair1": "first 1"}, annotator="bob")

    def counts(path):
        return list(import_answers(store, path, format).values())  # answered, second opinions, already there, skipped

    assert counts(anns) == [2, 0, 0, 2]
    assert answers(store) == {"pair0": 1, "pair2": -1}
    assert counts(bobs) == [1, 1, 0, 2]
    assert answers(store) == {"pair0": 1, "pair1": 1, "pair2": -1}
    assert counts(bobs) == counts(anns) == [0, 0, 2, 2]
    assert store.db.execute("SELECT annotator, verdict FROM verdicts WHERE pair = 'pair0' ORDER BY id").fetchall() == [
        ("ann", 1), ("bob", -1)]
    assert export_questions(store, anns, format) == 1  # what is open still


def test_several_annotations_of_a_task(store, tmp_path):
    """The oldest answers, the others are second opinions; a cancelled one and one without a choice are skipped."""
    ask(store, simple(1))
    data = {"pair": "pair0", "response_a": "second 0", "response_b": "first 0"}
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"id": 1, "data": data, "annotations": [
        annotation(3, "left", created_at="2024-03-09T12:00:00Z"),
        annotation(2, "right", created_at="2024-03-08T12:00:00Z"),
        annotation(5, "left", was_cancelled=True), annotation(6, None), annotation(2, "right", lead_time=None)]}]))
    # the last has no time, so it counts as the oldest
    assert import_answers(store, path, "label-studio") == {
        "answered": 1, "second_opinions": 1, "already_there": 1, "skipped": 2}
    assert store.db.execute("SELECT label, annotator FROM answers").fetchall() == [(1, "label-studio-2")]
    assert store.db.execute("SELECT verdict, annotator FROM verdicts ORDER BY id").fetchall() == [
        (1, "label-studio-2"), (-1, "label-studio-3")]


def test_the_labelling_configuration_shows_what_the_tasks_have(store, tmp_path):
    ask(store, simple(2))
    export_questions(store, tmp_path / "tasks.json", "label-studio")
    view = ET.fromstring((tmp_path / "tasks.json.xml").read_text())
    pairwise = view.find(".//Pairwise")
    shown = {text.get("name"): text.get("value") for text in view.iter("Text")}
    assert [shown[name] for name in pairwise.get("toName").split(",")] == ["$response_a", "$response_b"]
    data = json.loads((tmp_path / "tasks.json").read_text())[0]["data"]
    assert all(value[1:] in data for value in shown.values())


def test_a_line_without_texts_means_the_exported_sides(store, tmp_path):
    ask(store, simple(6))
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(json.dumps({"pair": pair, "label": "a"}) for pair in simple(6)) + "\r\n \n")
    assert import_answers(store, path, "jsonl")["answered"] == 6
    assert answers(store) == {pair: drawn_sides(pair)[0] for pair in simple(6)}
    assert store.db.execute("SELECT DISTINCT annotator, seconds FROM answers").fetchall() == [("import", None)]


def test_two_responses_that_read_alike_mean_the_exported_sides(store, tmp_path):
    drawn = {pair: drawn_sides(pair)[0] for pair in "abcdef"}
    assert set(drawn.values()) == {1, -1}
    ask(store, {pair: ("q", "same", [{"role": "assistant", "content": "same"}]) for pair in drawn})
    export_questions(store, tmp_path / "out", "label-studio")
    tasks = json.loads((tmp_path / "out").read_text())
    (tmp_path / "out").write_text(json.dumps([task | {"annotations": [annotation(1, "left")]} for task in tasks]))
    import_answers(store, tmp_path / "out", "label-studio")
    assert answers(store) == drawn


GOOD = '{"pair": "pair0", "label": "a"}\n'


@pytest.mark.parametrize("line, words", [
    ('{"pair": "nowhere", "label": "a"}', "line 2, field pair: 'nowhere' was never asked"),
    ('{"pair": "\\ud800", "label": "a"}', "line 2, field pair: .* was never asked"),
    ('{"label": "a"}', "line 2, field pair: expected a pair's id, found None"),
    ('{"pair": "pair1", "label": "A"}', "line 2, field label: expected \"a\", \"b\" or null, found 'A'"),
    ('{"pair": "pair1", "label": 1}', "line 2, field label"),
    ('{"pair": "pair1", "label": ["a"]}', "line 2, field label"),
    ('{"pair": "pair1", "label": "a", "annotator": 7}', "line 2, field annotator: expected a name, found 7"),
    ('{"pair": "pair1", "label": "a", "annotator": "\\udfff"}', "line 2, field annotator"),
    ('{"pair": "pair1", "label": "a", "seconds": "3"}', "line 2, field seconds: expected a number of seconds"),
    ('{"pair": "pair1", "label": "a", "seconds": -1}', "line 2, field seconds"),
    ('{"pair": "pair1", "label": "a", "seconds": NaN}', "line 2, field seconds"),
    ('{"pair": "pair1", "label": "a", "seconds": true}', "line 2, field seconds"),
    ('{"pair": "pair1", "label": "a", "response_a": "first 1"}', "line 2, field response_b: is neither response"),
    ('{"pair": "pair1", "label": "a", "response_a": "first 1 ", "response_b": "second 1"}',
     "line 2, field response_a: is neither response of the pair pair1"),
    ('{"pair": "pair1", "label": "a", "response_a": "first 1", "response_b": "first 1"}',
     "line 2, field response_b: is the same response"),
    ('{"pair": "pair1", "label"', "line 2: not JSON"),
    ("[" * 100_000, "line 2: not usable JSON"),
    ('["pair1", "a"]', "line 2: expected an object"),
    (b'{"pair": "pair1", "label": "\xff"}', "line 2: not UTF-8"),
])
def test_a_line_that_is_wrong_is_named_and_nothing_is_imported(store, tmp_path, line, words):
    ask(store, simple(2))
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD.encode() + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    before = everything(store)
    with pytest.raises(ExchangeError, match=f"in.jsonl, {words}"):
        import_answers(store, path, "jsonl")
    assert everything(store) == before


@pytest.mark.parametrize("change, words", [
    ({"data": {"pair": "nowhere"}}, "task 2, field data, field pair: 'nowhere' was never asked"),
    ({"data": None}, "task 2, field data: is missing"),
    ({"annotations": None}, "task 2, field annotations: is missing"),
    ({"annotations": [annotation(1, "middle")]}, "task 2, annotation 1, field selected"),
    ({"annotations": [annotation(1, ["left"])]}, "task 2, annotation 1, field selected"),
    ({"annotations": [annotation(1, "left", result=None)]}, "task 2, annotation 1, field result"),
    ({"annotations": [annotation(1, "left", result=["x"])]}, "task 2, annotation 1, field result"),
    ({"annotations": [annotation(1, "left", lead_time="x")]}, "task 2, annotation 1, field lead_time"),
    ({"annotations": [annotation(1, "left", completed_by=[])]}, "task 2, annotation 1, field completed_by"),
    ({"annotations": [annotation(1, "left"), 3]}, "task 2, annotation 2: expected an object"),
])
def test_a_task_that_is_wrong_is_named_and_nothing_is_imported(store, tmp_path, change, words):
    ask(store, simple(2))
    tasks = [{"id": 1, "data": {"pair": f"pair{n}"}, "annotations": [annotation(1, "left")]} for n in range(2)]
    path = tmp_path / "in.json"
    path.write_text(json.dumps([tasks[0], tasks[1] | change]))
    before = everything(store)
    with pytest.raises(ExchangeError, match=f"in.json, {words}"):
        import_answers(store, path, "label-studio")
    assert everything(store) == before


def test_files_that_cannot_be_used(store, tmp_path):
    (tmp_path / "in.json").write_text('{"a": 1}')
    with pytest.raises(ExchangeError, match="expected a list of tasks"):
        import_answers(store, tmp_path / "in.json", "label-studio")
    (tmp_path / "in.json").write_text('[\n{"a": 1,}]')
    with pytest.raises(ExchangeError, match=r"in.json: not JSON \(line 2, column"):
        import_answers(store, tmp_path / "in.json", "label-studio")
    with pytest.raises(ExchangeError, match="No such file"):
        import_answers(store, tmp_path / "absent", "jsonl")
    with pytest.raises(ExchangeError, match="No such file"):
        export_questions(store, tmp_path / "absent" / "out", "jsonl")
    with pytest.raises(ExchangeError, match="Is a directory"):
        export_questions(store, tmp_path, "jsonl")
    with pytest.raises(ExchangeError, match="is the ledger"):
        export_questions(store, store.path, "jsonl")
    with pytest.raises(ValueError, match="expected"):
        export_questions(store, tmp_path / "out", "xml")
    assert not list(tmp_path.parent.glob("*.tmp")) and not list(tmp_path.glob("*.tmp"))


def test_an_import_that_is_interrupted_leaves_nothing(store, tmp_path, monkeypatch):
    ask(store, simple(3))
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"pair": pair, "label": "a"}) + "\n" for pair in simple(3)))
    stands, seen = exchange._stands, []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return stands(*args)

    monkeypatch.setattr(exchange, "_stands", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_answers(store, path, "jsonl")
    assert answers(store) == {} and everything(store)[2] == []
    assert import_answers(store, path, "jsonl")["already_there"] == 0  # interrupted() lets all pass from now on
    assert len(answers(store)) == 3


def test_two_processes_import_at_once(store, tmp_path):
    """The same file: each label once, as the answer. The processes start together, at a signal through a pipe."""
    ask(store, simple(300))
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"pair": "{pair}", "label": "a", "annotator": "ann"}}\n' for pair in simple(300)))
    script = ("import sys, json; from oracle import Ledger; from tools.exchange import import_answers\n"
              "store = Ledger(sys.argv[1]); print('ready', flush=True); input()\n"
              "print(json.dumps(import_answers(store, sys.argv[2], 'jsonl')))")
    both = [subprocess.Popen([sys.executable, "-c", script, store.path, path], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    counts = [json.loads(process.communicate(timeout=60)[0]) for process in both]
    assert sum(count["answered"] for count in counts) == sum(count["already_there"] for count in counts) == 300
    assert answers(store) == {pair: drawn_sides(pair)[0] for pair in simple(300)}
    assert store.db.execute("SELECT COUNT(*) FROM verdicts").fetchone() == (300,)


# The ledger's report, export and seed.

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
    assert not store.answer_question("h1", 1, "bob", 5) and not store.answer_question("h2", -1, "bob", 5)
    store.add("judge", [(Question("j1", 0.1, 5), -1, "model", 3, 0.01)])
    for pair, verdict in (("j1", -1), ("j1", -1), ("j2", 1), ("j2", -1), ("j3", 0), ("j3", 1)):
        store.add_verdict(pair, "model", verdict, cost=0.005)
    store.add("reused", [(Question("r1", None, -1), 1, "old\x1b[31m", None, None)])
    store.lease("eve", 1000)
    store.db.execute("UPDATE questions SET leased_to = 'eve', leased_until = 5 WHERE pair = 'q2'")
    store.close()
    return folder


def call(*args):
    """The command line, from elsewhere."""
    return subprocess.run([sys.executable, ROOT / "tools/ledger.py", *args], capture_output=True, text=True, cwd="/")


def words_of(text, start):
    """The words of the first line that begins so, without its beginning."""
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
    # source: answers, y1 preferred, median seconds, labels an hour (3600 / mean seconds), cost, cost unknown
    sources = text.split("\n\n")[2]
    assert words_of(sources, "dataset") == "2 50.0% – – – 2"
    assert words_of(sources, "human") == "3 66.7% 20.0 120 0.5000 1"
    assert words_of(sources, "judge") == "1 0.0% 3.0 1,200 0.0100 0"
    assert words_of(sources, "reused") == "1 100.0% – – – 0"
    assert words_of(sources, "all") == "7 57.1% 15.0 155 0.5100 3"  # 4 in 93 s
    annotators = text.split("\n\n")[3]
    assert words_of(annotators, "human    ann") == "2 100.0% 15.0 240 0.5000 0"
    assert words_of(annotators, "human    bob") == "1 0.0% 60.0 60 – 1"
    assert words_of(annotators, "reused   old?[31m") == "1 100.0% – – – 0"
    assert words_of(text, "model") == "3 1 1 1 33.3%"
    for block in text.split("\n\n")[2:4]:  # aligned: numbers end in one column
        assert len({len(line) for line in block.splitlines()}) == 1


def test_reading_changes_nothing_in_the_folder(run):
    """Neither alone, nor while a run holds the ledger open, nor after a run was killed."""
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
    open_one.close()

    script = ("import os, signal, sys; from oracle import Ledger, Question; store = Ledger(sys.argv[1])\n"
              "store.add('dataset', [(Question('last', 0.1, 9), 1, '', None, None)])\n"
              "os.kill(os.getpid(), signal.SIGKILL)")
    killed = subprocess.run([sys.executable, "-c", script, run / "labels.sqlite"], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    before = state()
    assert "9: 8 bought" in ledger.report(run)
    assert state() == before


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
    for content in (b"", b"garbage " * 500):
        (other / "labels.sqlite").write_bytes(content)
        fails(capsys, "is not a ledger", other)
        fails(capsys, "is not a ledger", other, "--reuse", run)
        assert (other / "labels.sqlite").read_bytes() == content
    os.unlink(other / "labels.sqlite")
    with sqlite3.connect(other / "labels.sqlite") as db:
        db.execute("CREATE TABLE answers (pair TEXT)")
    db.close()
    fails(capsys, "is not a ledger, or of another version (no such column", other)
    done = call(tmp_path / "absent")  # the same from the command line
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1

    monkeypatch.setattr(ledger, "PATIENCE", 0.05)
    holder = sqlite3.connect(run / "labels.sqlite", isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")  # others may read
    old = tmp_path / "old"
    assert ledger.reuse(old, run) == (7, 0, 0)
    fails(capsys, "is locked", run, "--reuse", old)
    assert main(capsys, run)[0] == 0
    holder.execute("ROLLBACK")
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    holder.execute("DELETE FROM questions")
    fails(capsys, "is locked", run)
    fails(capsys, "is locked", run, "--reuse", old)
    holder.close()


def test_csv(run, tmp_path, capsys):
    path = tmp_path / "answers.csv"
    assert main(capsys, run, "--csv", path) == (0, f"7 answers written to {path}\n", "")
    with open(path, newline="", encoding="utf-8") as file:
        rows = {row["pair"]: row for row in csv.DictReader(file)}
    store = Ledger(run / "labels.sqlite")
    columns = [row[1] for row in store.db.execute("PRAGMA table_info(answers)")]
    store.close()
    assert list(rows["h1"]) == columns and len(rows) == 7
    assert {name: rows["h1"][name] for name in columns if name != "answered_at"} == {
        "pair": "h1", "label": "1", "source": "human", "annotator": "ann", "margin": "1.5", "step": "2", "audit": "1",
        "seconds": "10.0", "cost": "0.25", "used": "0"}
    assert rows["r1"]["annotator"] == "old\x1b[31m" and rows["r1"]["margin"] == ""
    path.write_text("mine")
    fails(capsys, "--force", run, "--csv", path)
    assert path.read_text() == "mine"
    assert main(capsys, run, "--csv", path, "--force")[0] == 0 and path.read_text() != "mine"
    fails(capsys, "is the ledger", run, "--csv", run / "labels.sqlite", "--force")
    fails(capsys, "No such file", run, "--csv", tmp_path / "absent" / "a.csv")
    assert not list(tmp_path.glob("*.tmp"))


def test_reused_answers_are_free_and_not_counted(run, tmp_path, capsys):
    new = tmp_path / "deep" / "new"
    assert main(capsys, new, "--reuse", run) == (0, f"7 answers copied from {run}; 0 were there already\n", "")
    oracle = Oracle(DatasetAnnotator({"x": -1}), new / "labels.sqlite", max_queries=1)
    try:
        assert oracle.ledger.count() == oracle.queries() == 0
        assert oracle.answer(["h1", "d2", "x"], [0.0, 9.0, 0.0], [True, False, True], 0) == [1, -1, -1]
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
    ask(store, {"h3": ("p", "a", "b")})  # open: the old answer answers it
    before = (run / "labels.sqlite").read_bytes()
    code, out, _ = main(capsys, new, "--reuse", run)
    assert code == 0 and out == (f"5 answers copied from {run}; 2 were there already, 1 of them with the other label "
                                 "(kept as they are)\n")
    assert answers(store)["h1"] == -1 and store.count() == 2 and store.open_questions() == []
    assert main(capsys, new, "--reuse", run)[1].startswith("0 answers copied")
    store.close()
    assert (run / "labels.sqlite").read_bytes() == before
    assert [path.name for path in run.iterdir()] == ["labels.sqlite"]
    fails(capsys, "is the same run", run, "--reuse", run)


# ----------------------------------------------------------------------------------------------------------------------
# fit.py

def test_fit_counts_a_model_as_it_is(tiny):
    import transformers

    from tools import fit
    config = transformers.AutoConfig.from_pretrained(tiny / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model")
    n = sum(p.numel() for p in model.parameters())
    assert fit.parameters(config) == n
    alone, shared = (fit.rank_memory(config, gpus, 3) for gpus in (1, 8))
    assert alone["weights"] == 2 * n and alone["gradients"] == 4 * n and alone["optimiser"] == 12 * n
    assert all(shared[part] == alone[part] / 8 for part in ("weights", "gradients", "optimiser"))
    two = fit.rank_memory(config, 8, 2)
    assert two["weights"] == 2 * n and two["optimiser"] == 12 * n / 8
    plain = fit.rank_memory(config, 1, 2, bf16=False)  # one process in fp32 runs as ZeRO 0: no second copy of the weights
    assert plain["optimiser"] == 8 * n and plain["buffers"] == 0


def test_fit_counts_the_activations_that_autograd_keeps(tiny):
    """What one token more leaves for the backward, counted in the graph of a real model."""
    import torch
    import transformers

    import adpo
    import data
    from tools import fit
    config = transformers.LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2)
    lm = transformers.LlamaForCausalLM(config)
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def kept(tokens):
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (tensor, storage.nbytes())
            return tensor
        pair = {"prompt_ids": [5] * (tokens - 2), "first_ids": [6], "second_ids": [7]}
        batch = data.collate(SimpleNamespace(table=[pair], ids=["a"]), [0])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            adpo.PairLogps(lm)(batch)
        return sum(size for _, size in storages.values())
    # The mask grows with the square of the tokens; its part is taken off.
    grown = kept(400) - kept(200) - 4 * (400 ** 2 - 200 ** 2)
    assert grown / 200 == pytest.approx(fit.activation_bytes(config, 4, False), rel=0.15)


def test_the_readmes_table_of_what_fits_is_fits_own():
    from tools import fit
    assert fit.table() in (ROOT / "README.md").read_text()


COUNTING = """
import json, os, sys
import torch.distributed as dist

sent, marks = [0.0], []
for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "all_gather", "reduce_scatter"):
    def counted(*args, name=name, collective=getattr(dist, name), **kwargs):
        tensors = [*args, *kwargs.values()]
        world, parts = dist.get_world_size(), tensors[1 if name in ("reduce_scatter_tensor", "reduce_scatter") else 0]
        size = sum(part.numel() * part.element_size() for part in (parts if isinstance(parts, list) else [parts]))
        sent[0] += size * (world - 1) / world * (2 if name == "all_reduce" else 1)  # as a ring passes it on
        return collective(*args, **kwargs)
    setattr(dist, name, counted)

import deepspeed
import train

step = deepspeed.DeepSpeedEngine.step
def marked(engine, *args):
    step(engine, *args)
    marks.append(sent[0])
deepspeed.DeepSpeedEngine.step = marked

code = train.command([arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")])
if os.environ["RANK"] == "0":
    output, = (arg.partition("=")[2] for arg in sys.argv if arg.startswith("--output_dir="))
    n = train.load_file(output + "/model.safetensors")
    print("COUNTED", json.dumps([sum(p.numel() for p in n.values()), (marks[-1] - marks[1]) / (len(marks) - 2)]), flush=True)
sys.exit(code)
"""


def test_fit_counts_the_bytes_that_two_ranks_send_under_zero_3(tiny, tmp_path):
    """Of collectives of a real run that keeps no gathered weight, as a model that is large does not."""
    from conftest import free_port, launcher_environment

    from tools import fit
    ds = json.loads((ROOT / "configs" / "zero3.json").read_text())
    ds["zero_optimization"] |= {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
                                "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
    (tmp_path / "zero3.json").write_text(json.dumps(ds))
    (tmp_path / "count.py").write_text(COUNTING)
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), str(tmp_path / "count.py"),
               f"--output_dir={tmp_path}/run", "--config", str(ROOT / "configs" / "quickstart.yaml"),
               f"--model_name_or_path={tiny}/model", f"--dataset_mixer={{{tiny}/pairs: 1.0}}", "--max_steps=5",
               "--per_device_train_batch_size=8", "--logging_steps=5", "--do_eval=false", "--save_strategy=no",
               "--num_threads=1", "--max_prompt_length=16", "--max_length=64", f"--deepspeed={tmp_path}/zero3.json"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=240,
                          env={**launcher_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    parameters, sent = json.loads(done.stdout.partition("COUNTED ")[2].splitlines()[0])
    assert sent == pytest.approx(fit.wire_bytes(parameters, 2, width=4), rel=0.15)


def test_a_plan_is_made_of_the_tables_memory_and_of_what_is_assumed():
    from tools import fit
    config = fit.transformers.LlamaConfig(**fit.SHAPES["Zephyr-7B"])
    assumed = dict(fp32=False, no_checkpointing=False, tokens=8192, micro_steps=2, gpus_a_host=8, tflops=400, nvlink=200,
                   wire=25, pcie=25, host_memory=200)
    found = fit.plan(config, 8, SimpleNamespace(**assumed))
    assert found["GPU memory"] == sum(fit.rank_memory(config, 8, 3, offload=True).values())
    n = fit.parameters(config)
    assert n == 7_241_732_096 and found["host memory"] == 2 * n
    assert found["compute"] == pytest.approx(8 * n * 2 * 8192 / 400e12)
    across = fit.plan(config, 16, SimpleNamespace(**assumed))  # two hosts: the slower wire
    assert across["wire"] / found["wire"] == pytest.approx(8 * (15 / 16) / (7 / 8))
    assert found["least"] < found["most"] <= found["least"] + min(found["compute"], found["wire"]) + 1e-9
    once = fit.plan(config, 8, SimpleNamespace(**assumed | {"micro_steps": 1}))
    assert found["bytes on the wire"] == 2 * once["bytes on the wire"] and found["Adam"] == once["Adam"]
