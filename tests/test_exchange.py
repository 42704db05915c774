"""tools/exchange.py on real ledgers: questions go out to other tools and answers come back.

    python -m pytest tests/test_exchange.py -n 0
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET

import pytest
from helpers import ROOT

from labels.ledger import Ledger, Panel, Question
from tools import exchange
from tools.exchange import ExchangeError, as_text, drawn_sides, export_questions, import_answers

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
    """Put questions, as if an hour ago. texts: {pair: (prompt, y1, y2)}."""
    store.put_questions([Question(pair, 0.1, 3) for pair in texts],
                        {pair: tuple(map(json.dumps, three)) for pair, three in texts.items()})
    store.db.execute("UPDATE questions SET asked_at = asked_at - 3600")


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
    """Label an exported file by its texts, as another tool would. wanted: {pair: text of the better response}; the others
    are skipped. swap: exchange the sides."""
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
    """An annotation as Label Studio has it. side: "left", "right", or None if nothing was chosen."""
    result = [{"id": "x", "type": "pairwise", "from_name": "preference", "to_name": "preference", "origin": "manual",
               "value": {"selected": side}}]
    return {"id": id, "completed_by": id, "lead_time": 1.5, "was_cancelled": False, "result": result if side else [],
            **more}


@pytest.mark.parametrize("format", FORMATS)
def test_hostile_texts_come_out_exactly(store, tmp_path, format):
    texts = hostile()
    ask(store, texts)
    path = tmp_path / "out"
    assert export_questions(store, path, format) == len(texts)
    lines = path.read_bytes().decode("utf-8").splitlines()  # splits at more than \n; a text must contain none of that
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
    assert not list(tmp_path.glob("*.tmp")) and not list(tmp_path.glob(".*"))


def test_sides_do_not_depend_on_which_response_is_y1():
    drawn = [drawn_sides(f"pair{n}") for n in range(1000)]
    assert 440 < drawn.count((1, -1)) < 560  # 500 ± 3.8 standard deviations
    assert set(drawn) == {(1, -1), (-1, 1)}
    assert [side for side, _ in drawn[:6]] == [-1, 1, 1, -1, -1, -1]  # files that are out now come back with these sides


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
        "answered": len(texts), "second_opinions": 0, "already_there": 0, "replaced": 0, "skipped": 0}
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
        return list(import_answers(store, path, format).values())  # answered, second, already there, replaced, skipped

    assert counts(anns) == [2, 0, 0, 0, 2]
    assert answers(store) == {"pair0": 1, "pair2": -1}
    assert counts(bobs) == [1, 1, 0, 0, 2]
    assert answers(store) == {"pair0": 0, "pair1": 1, "pair2": -1}  # ann and bob disagree, so the first has no preference
    assert counts(bobs) == counts(anns) == [0, 0, 2, 0, 2]
    assert store.db.execute("SELECT annotator, verdict FROM verdicts WHERE pair = 'pair0' ORDER BY id").fetchall() == [
        ("ann", 1), ("bob", -1)]
    assert export_questions(store, tmp_path / "left", format) == 1  # what is still open


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_does_not_replace_answers(store, tmp_path, format):
    ask(store, simple(3))
    path = tmp_path / "questions"
    assert export_questions(store, path, format) == export_questions(store, path, format) == 3
    fill_in(path, format, {"pair0": "first 0"})
    content = path.read_bytes()
    with pytest.raises(ExchangeError, match="--export .*questions: there is a file that holds more than questions"):
        export_questions(store, path, format)
    assert path.read_bytes() == content
    import_answers(store, path, format)
    path.write_text("notes")
    with pytest.raises(ExchangeError, match="choose another file"):
        export_questions(store, path, format)
    path.unlink()
    assert export_questions(store, path, format) == 2


def test_an_export_with_a_single_answer_in_it_is_not_replaced_either(store, tmp_path):
    """Nor is it where a question is skipped, which an import takes for what it is."""
    ask(store, simple(3))
    path = tmp_path / "questions"
    export_questions(store, path, "jsonl")
    questions = path.read_text().splitlines(keepends=True)
    for n, label in enumerate(("a", "skip", "")):
        content = [line.replace("{", f'{{"label": "{label}", ', 1) if k == n else line for k, line in enumerate(questions)]
        path.write_text("".join(content))
        with pytest.raises(ExchangeError, match="holds more than questions"):
            export_questions(store, path, "jsonl")
        assert path.read_text() == "".join(content)
        assert import_answers(store, path, "jsonl") == {"answered": int(n == 0), "second_opinions": 0, "already_there": 0,
                                                        "replaced": 0, "skipped": 3 - int(n == 0)}


def test_several_annotations_of_a_task(store, tmp_path):
    """Each is an opinion. A cancelled one and one without a choice are skipped, and what is there twice counts once."""
    ask(store, simple(1))
    data = {"pair": "pair0", "response_a": "second 0", "response_b": "first 0"}
    path = tmp_path / "in.json"
    path.write_text(json.dumps([{"id": 1, "data": data, "annotations": [
        annotation(3, "left", created_at="2024-03-09T12:00:00Z"),
        annotation(2, "right", created_at="2024-03-08T12:00:00Z"),
        annotation(5, "left", was_cancelled=True), annotation(6, None), annotation(2, "right", lead_time=None)]}]))
    # the last has no time, so it counts as the oldest
    assert import_answers(store, path, "label-studio") == {
        "answered": 1, "second_opinions": 1, "already_there": 0, "replaced": 1, "skipped": 2}
    assert store.db.execute("SELECT label, annotator FROM answers").fetchall() == [(0, "label-studio-2, label-studio-3")]
    assert store.db.execute("SELECT verdict, annotator FROM verdicts ORDER BY id").fetchall() == [
        (1, "label-studio-2"), (-1, "label-studio-3")]


@pytest.mark.parametrize("said", [("a", "b", "a"), ("equal", "cannot judge", "equal"), ("a", "both bad", "a")], ids=str)
def test_a_person_may_change_their_mind(store, tmp_path, said):
    """In files one after the other, and then in one file, which changes nothing when it is imported again."""
    ask(store, simple(1))
    path = tmp_path / "in"

    def give(*labels):
        path.write_text("".join(json.dumps({"pair": "pair0", "label": label, "annotator": who}) + "\n"
                                for label, who in zip(labels, ("ann", "ANN", "Ann"))))
        return list(import_answers(store, path, "jsonl").values())  # answered, second, already there, replaced, skipped

    def kept():
        assert answers(store) == {"pair0": store.opinions("pair0")["ann"].label}
        opinion = store.opinions("pair0")["ann"]
        return opinion.said or "ab"[drawn_sides("pair0").index(opinion.label)]
    for n, label in enumerate(said):
        assert give(label) == [n == 0, 0, 0, n > 0, 0] and kept() == label
        assert give(label) == [0, 0, 1, 0, 0] and kept() == label
    assert give(*said[:2]) == [0, 0, 0, 2, 0] and kept() == said[1]
    before = everything(store)
    assert give(*said[:2]) == [0, 0, 1, 1, 0] and everything(store) == before


def test_a_file_that_is_imported_again_leaves_what_one_of_its_people_has_decided_since(store, tmp_path):
    """As with the exports of Label Studio, which hold all answers each time."""
    ask(store, simple(1))
    path, panel = tmp_path / "in", Panel(2, "ann")
    path.write_text("".join(json.dumps({"pair": "pair0", "label": label, "annotator": who}) + "\n"
                            for who, label in (("ann", "a"), ("bob", "b"))))
    import_answers(store, path, "jsonl", panel=panel)
    b = drawn_sides("pair0")[1]
    store.answer_question("pair0", b, "ann", panel=panel, detail={"adjudicates": True})
    before = everything(store)
    assert answers(store) == {"pair0": b}
    assert import_answers(store, path, "jsonl", panel=panel)["already_there"] == 2 and everything(store) == before


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("order", ["baa", "aba", "aab"])
def test_the_majority_is_the_label_in_whatever_order_opinions_come(store, tmp_path, order, format):
    ask(store, simple(2))
    said = [("pair0", letter, f"p{n}") for n, letter in enumerate(order)] + [("pair1", "b", "p0")]
    path = tmp_path / "in"
    if format == "jsonl":
        path.write_text("".join(json.dumps(dict(zip(("pair", "label", "annotator"), row))) + "\n" for row in said))
    else:
        sides = {"a": "left", "b": "right"}
        path.write_text(json.dumps([{"data": {"pair": pair}, "annotations": [
            annotation(1, sides[letter], completed_by={"email": who})]} for pair, letter, who in said]))
    import_answers(store, path, format)
    assert answers(store) == {"pair0": drawn_sides("pair0")[0], "pair1": drawn_sides("pair1")[1]}
    voters = ", ".join(who for pair, letter, who in said if (pair, letter) == ("pair0", "a"))
    assert store.db.execute("SELECT annotator, detail FROM answers WHERE pair = 'pair0'").fetchall() == [
        (voters, '{"agree": 2, "opinions": 3}')]


def test_an_answer_that_the_run_has_used_stays_whatever_comes_later(store, tmp_path):
    ask(store, simple(1))
    path = tmp_path / "in"
    for who, letter in (("ann", "b"), ("bob", "a"), ("cleo", "a")):
        path.write_text(json.dumps({"pair": "pair0", "label": letter, "annotator": who}))
        import_answers(store, path, "jsonl")
        store.take(["pair0"])
    assert answers(store) == {"pair0": drawn_sides("pair0")[1]} and len(store.opinions("pair0")) == 3


@pytest.mark.parametrize("format", FORMATS)
def test_a_third_answer_settles_a_pair_without_a_preference(store, tmp_path, format):
    ask(store, simple(3))
    path = tmp_path / "in"
    thirds = {f"pair{n}": third for n, third in enumerate(exchange.THIRD_ANSWERS)}
    if format == "jsonl":
        path.write_text("".join(json.dumps({"pair": pair, "label": third, "comment": "why"}) + "\n"
                                for pair, third in thirds.items()))
    else:
        export_questions(store, path, format)
        choices = [choice.get("value") for choice in ET.fromstring((tmp_path / "in.xml").read_text()).iter("Choice")]
        assert [choice.lower() for choice in choices] == list(thirds.values())
        path.write_text(json.dumps([{"data": {"pair": pair}, "annotations": [annotation(1, "left")]} for pair in thirds]))
        tasks = json.loads(path.read_text())
        # Beside a click on a response, which cannot be taken back there, and what the team asks about the prompt.
        for task, choice in zip(tasks, choices):
            task["annotations"][0]["result"] += [
                {"type": "choices", "from_name": "topic", "value": {"choices": ["Science", "Medicine"]}},
                {"type": "choices", "from_name": "no_preference", "value": {"choices": [choice]}}]
        path.write_text(json.dumps(tasks))
    assert import_answers(store, path, format) == {"answered": 3, "second_opinions": 0, "already_there": 0, "replaced": 0,
                                                      "skipped": 0}
    assert answers(store) == dict.fromkeys(thirds, 0) and store.open_questions() == []
    opinions = {pair: next(iter(store.opinions(pair).values())) for pair in thirds}
    assert {pair: opinion.said for pair, opinion in opinions.items()} == thirds
    assert {opinion.comment for opinion in opinions.values()} == {"why" if format == "jsonl" else ""}
    assert [json.loads(detail) for detail, in store.db.execute("SELECT detail FROM answers ORDER BY pair")] == [
        {"no_preference": third} for third in thirds.values()]


def test_what_a_team_asks_beside_our_questions_is_no_answer_to_them(store, tmp_path):
    """Another comparison, and another choice with the value Equal; the second task has no answer to ours."""
    ask(store, simple(2))
    others = [{"type": "pairwise", "from_name": "safety", "value": {"selected": "left"}},
              {"type": "choices", "from_name": "length", "value": {"choices": ["Equal"]}}]
    tasks = [{"data": {"pair": f"pair{n}"}, "annotations": [annotation(1, side)]} for n, side in ((0, "right"), (1, None))]
    for task in tasks:
        task["annotations"][0]["result"] += others
    path = tmp_path / "in"
    path.write_text(json.dumps(tasks))
    assert import_answers(store, path, "label-studio") == {"answered": 1, "second_opinions": 0, "already_there": 0,
                                                           "replaced": 0, "skipped": 1}
    assert answers(store) == {"pair0": drawn_sides("pair0")[1]}
    del tasks[0]["annotations"][0]["result"][1:], tasks[1]["annotations"][0]["result"][1:]
    tasks[0]["annotations"][0]["result"][0]["from_name"] = "mine"  # an interface of the team's own, with one comparison
    path.write_text(json.dumps(tasks))
    assert import_answers(store, path, "label-studio")["answered"] == 1 and len(answers(store)) == 2


def test_opinions_until_there_are_enough(store, tmp_path):
    ask(store, simple(1))
    for n, expected in enumerate(({}, {}, {"pair0": drawn_sides("pair0")[0]})):
        (tmp_path / "in").write_text(json.dumps({"pair": "pair0", "label": "aba"[n], "annotator": f"p{n}"}))
        import_answers(store, tmp_path / "in", "jsonl", panel=Panel(3))
        assert answers(store) == expected


def test_one_person_has_one_name_and_impossible_times_are_unknown(store, tmp_path):
    ask(store, simple(4))
    people, path = ["Zoë Ann", "zoe\u0308  ANN", "ＺＯË Ann", "Zoe Ann"], tmp_path / "in"
    path.write_text("".join(json.dumps({"pair": f"pair{n}", "label": "a", "annotator": who, "seconds": seconds}) + "\n"
                            for n, (who, seconds) in enumerate(zip(people, (30, 9e11, 0, 4000)))))
    import_answers(store, path, "jsonl")
    assert store.db.execute("SELECT annotator, seconds FROM answers ORDER BY pair").fetchall() == [
        ("Zoë Ann", 30), ("Zoë Ann", None), ("Zoë Ann", None), ("Zoe Ann", None)]  # the question is an hour old
    path.write_text(json.dumps({"pair": "pair0", "label": "a", "annotator": "ZOË ANN"}))
    assert import_answers(store, path, "jsonl")["already_there"] == 1  # in another file she is the same person
    assert exchange.fold("\u0390") == exchange.fold("\u0390".upper())  # which has three characters


@pytest.mark.parametrize("format, words", [("label-studio", 'export from Label Studio as "JSON"'),
                                           ("jsonl", "the format is JSON Lines")])
def test_a_csv_file_gets_advice(store, tmp_path, format, words):
    (tmp_path / "in.csv").write_text("annotation_id,annotator,pair\n1,1,pair0\n")
    with pytest.raises(ExchangeError, match=f"in.csv.*: not JSON .*{words}"):
        import_answers(store, tmp_path / "in.csv", format)


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
    path.write_text("\n".join(json.dumps({"pair": pair, "label": "a"}) for pair in simple(6)) + "\r\n \n",
                    encoding="utf-8-sig")
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
    ('{"pair": "pair1", "label": "A"}', "line 2, field label: expected \"a\", \"b\", \"equal\", \"both bad\", "
     "\"cannot judge\" or null, found 'A'"),
    ('{"pair": "pair1", "label": 1}', "line 2, field label"),
    ('{"pair": "pair1", "label": ["a"]}', "line 2, field label"),
    ('{"pair": "pair1", "label": "a", "annotator": 7}', "line 2, field annotator: expected a name .*, found 7"),
    ('{"pair": "pair1", "label": "a", "annotator": "\\udfff"}', "line 2, field annotator"),
    ('{"pair": "pair1", "label": "a", "comment": "x \\udfff"}', "line 2, field comment: expected a text, found 'x "),
    ('{"pair": "pair1", "label": "a", "comment": 7}', "line 2, field comment: expected a text, found 7"),
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
    ('{"pair": "pair1", "label": "a", "label": "b"}', "line 2: not usable JSON .the key label appears twice; keep one"),
    ('{"pair": "pair1", "label": "a", "annotator": "a \\u001b[2J"}', "line 2, field annotator: expected a name of 1 to 200"),
    ('[{"data": {}}]', "line 2: expected an object, found .* Label Studio's. say --format label-studio"),
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
    ({"annotations": [{"result": [{"type": "choices", "value": {"choices": ["Maybe"]}}]}]},
     "task 2, annotation 1, field choices: expected one \"Equal\", \"Both bad\" or \"Cannot judge\", found"),
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


def test_files_that_cannot_be_used_are_refused(store, tmp_path):
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


def test_an_export_replaces_neither_a_pipe_nor_a_link(store, tmp_path):
    """Root would have lost /dev/null and /dev/stdout, a link to the pipe that stdout is."""
    ask(store, simple(2))
    os.mkfifo(tmp_path / "fifo")
    reading, writing = os.pipe()
    (tmp_path / "stdout").symlink_to(f"/proc/self/fd/{writing}")
    for name in ("fifo", "stdout"):
        with pytest.raises(ExchangeError, match=f"{name}: is not a file that can be replaced"):
            export_questions(store, tmp_path / name, "jsonl")
    assert (tmp_path / "fifo").is_fifo() and (tmp_path / "stdout").is_symlink()
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert export_questions(store, tmp_path / "link", "jsonl") == 2
    assert (tmp_path / "link").is_symlink() and len((tmp_path / "there").read_text().splitlines()) == 2
    os.close(reading)
    os.close(writing)


def test_an_import_that_is_interrupted_leaves_nothing(store, tmp_path, monkeypatch):
    ask(store, simple(3))
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"pair": pair, "label": "a"}) + "\n" for pair in simple(3)))
    already_there, seen = exchange._already_there, []

    def interrupted(*args):
        seen.append(args)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return already_there(*args)

    monkeypatch.setattr(exchange, "_already_there", interrupted)
    with pytest.raises(KeyboardInterrupt):
        import_answers(store, path, "jsonl")
    assert answers(store) == {} and everything(store)[2] == []
    assert import_answers(store, path, "jsonl")["already_there"] == 0  # interrupted() lets all pass from now on
    assert len(answers(store)) == 3


def test_an_import_that_is_stopped_does_not_end_like_one_that_is_done(store, tmp_path):
    """Or a script would go on, as if the answers were there. It waits for its file here, a pipe that nobody writes to."""
    os.mkfifo(tmp_path / "in.jsonl")
    for number in (signal.SIGINT, signal.SIGTERM):
        process = subprocess.Popen([sys.executable, ROOT / "tools/label.py", tmp_path, "--import", tmp_path / "in.jsonl"])
        while not (opened := writer(tmp_path / "in.jsonl")):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(300) == 130
        os.close(opened)


def writer(pipe):
    """The end of a named pipe that writes, or None while nobody reads."""
    with contextlib.suppress(OSError):
        return os.open(pipe, os.O_WRONLY | os.O_NONBLOCK)


def test_two_processes_import_at_once(store, tmp_path):
    """They import the same file, and each label becomes an answer once. A line on their pipes starts them together."""
    ask(store, simple(300))
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f'{{"pair": "{pair}", "label": "a", "annotator": "ann"}}\n' for pair in simple(300)))
    script = ("import sys, json; from labels.ledger import Ledger; from tools.exchange import import_answers\n"
              "store = Ledger(sys.argv[1]); print('ready', flush=True); input()\n"
              "print(json.dumps(import_answers(store, sys.argv[2], 'jsonl')))")
    both = [subprocess.Popen([sys.executable, "-c", script, store.path, path], cwd=ROOT, text=True,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE) for _ in range(2)]
    for process in both:
        assert process.stdout.readline() == "ready\n"
    for process in both:
        process.stdin.write("\n")
        process.stdin.flush()
    counts = [json.loads(process.communicate(timeout=600)[0]) for process in both]
    assert sum(count["answered"] for count in counts) == sum(count["already_there"] for count in counts) == 300
    assert answers(store) == {pair: drawn_sides(pair)[0] for pair in simple(300)}
    assert store.db.execute("SELECT COUNT(*) FROM verdicts").fetchone() == (300,)
