"""tools/label.py over HTTP: `python -m pytest tests/test_label_page.py -n 0`. test_label_browser.py uses it in a browser."""

import asyncio
import base64
import contextlib
import hashlib
import json
import random
import re
import signal
import socket
import sys
import threading
import time

import pytest
from helpers import JSON, ROOT, Site

from labels.ledger import Ledger, Panel, Question

pytest.importorskip("fastapi", reason="needs tests/requirements.txt")

from tools import label, reading, serving  # noqa: E402
from tools.serving import Refused  # noqa: E402


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("label"))
    yield made
    made.stop()


@pytest.fixture
def site(server):
    server.clear()
    return server


def choice(question, start):
    """What chooses the response that begins with `start`."""
    return next(side["choice"] for side in question["sides"] if side["turns"][0]["text"].startswith(start))


def test_a_label_means_the_chosen_response_and_is_committed_before_the_reply(site):
    site.put(20)
    _, reply = site.ask("next", "ann")
    chosen, left = {}, set()
    while question := reply["question"]:
        word = random.choice(("first", "second"))
        chosen[question["pair"]] = 1 if word == "first" else -1
        left.add(question["sides"][0]["turns"][0]["text"].split()[0])
        status, reply = site.ask("answer", "ann", pair=question["pair"], choice=choice(question, word), seconds=1.5)
        assert status == 200 and site.answers() == chosen
    assert len(chosen) == 20 and left == {"first", "second"}
    assert site.query("SELECT DISTINCT source, annotator, seconds, step FROM answers") == [("human", "ann", 1.5, 3)]
    assert reply["left"] == 0 and reply["mine"] == 20 and reply["rates"][0] == reply["rates"][1] > 0


def test_the_draw_of_sides_differs_between_annotators(site):
    site.put(1)
    drawn = set()
    for n in range(40):
        _, reply = site.ask("next", f"viewer {n}")
        drawn.add(reply["question"]["sides"][0]["turns"][0]["text"])
        assert site.ask("next", f"viewer {n}")[1]["question"] == reply["question"]  # a second look shows the same
        site.query("DELETE FROM leases")
    assert drawn == {"first of p00", "second of p00"}


def test_prompts_are_shown_as_conversations(site):
    site.put({"a": ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:", " Yes", " No"),
              "b": ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tea?"}],
                    [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}])})
    shown = {}
    for who in ("ann", "bob"):
        question = site.ask("next", who)[1]["question"]
        shown[question["pair"]] = [(turn["role"], turn["text"]) for turn in question["prompt"]]
        assert {side["turns"][0]["text"].strip() for side in question["sides"]} == {"Yes", "No"}
    assert shown == {"a": [("user", "Hi"), ("assistant", "Hello"), ("user", "Tea?")],
                     "b": [("system", "Be kind."), ("user", "Tea?")]}


def test_annotators_at_once_answer_each_question_once(site):
    site.put({f"q{n:03}": ("p", f"first {n}", f"second {n}") for n in range(150)})
    held, lock, wrong = {}, threading.Lock(), []

    def work(who):
        _, reply = site.ask("next", who)
        while question := reply["question"]:
            with lock:
                held[who] = question["pair"]
                wrong.extend([held] if len(set(held.values())) < len(held) else [])
            with lock:
                del held[who]  # before it is answered, since the reply leases another
            _, reply = site.ask("answer", who, pair=question["pair"], choice=choice(question, "first"))

    people = [threading.Thread(target=work, args=(f"person {n}",)) for n in range(6)]
    for person in people:
        person.start()
    for person in people:
        person.join()
    assert not wrong and set(site.answers().values()) == {1}
    assert len(site.answers()) == 150 == site.query("SELECT COUNT(*) FROM verdicts")[0][0]


def test_what_is_sent_again_counts_once(site):
    site.put(3)
    question = site.ask("next", "again")[1]["question"]
    answer = {"pair": question["pair"], "choice": choice(question, "second")}
    replies = [site.ask("answer", "again", **answer) for _ in range(3)]
    assert [status for status, _ in replies] == [200] * 3 and len({r["question"]["pair"] for _, r in replies}) == 1
    assert site.answers() == {"p00": -1} and site.query("SELECT COUNT(*) FROM verdicts") == [(1,)]
    for _ in range(2):  # both show the question again
        status, reply = site.ask("undo", "again", pair="p00")
        assert status == 200 and reply["question"]["pair"] == "p00" and site.answers() == {}
    assert site.query("SELECT COUNT(*) FROM verdicts") == [(0,)]
    for _ in range(2):
        assert site.ask("skip", "again", pair="p00")[1]["question"]["pair"] == "p01"


def test_an_answer_that_the_run_has_used_cannot_be_undone(site):
    site.put(2)
    question = site.ask("next", "late")[1]["question"]
    _, reply = site.ask("answer", "late", pair="p00", choice=choice(question, "first"))
    ledger = Ledger(site.folder / "labels.sqlite")
    ledger.take(["p00"])
    ledger.close()
    status, after = site.ask("undo", "late", pair=reply["last"])
    assert status == 200 and "used" in after["note"] and site.answers() == {"p00": 1}
    assert after["question"]["pair"] == "p01"


def test_skipped_questions_come_again_in_turn(site):
    site.put(3)
    seen = [site.ask("next", "skipper")[1]["question"]["pair"]]
    for _ in range(7):
        seen.append(site.ask("skip", "skipper", pair=seen[-1])[1]["question"]["pair"])
    assert set(seen[:3]) == set(seen[3:6]) == {"p00", "p01", "p02"}
    assert all(a != b for a, b in zip(seen, seen[1:]))


def test_a_label_for_a_question_that_is_not_the_annotators_is_refused(site):
    site.put(3)
    mine = site.ask("next", "ann")[1]["question"]
    theirs = site.ask("next", "bob")[1]["question"]
    assert mine["pair"] != theirs["pair"]
    body = {"pair": theirs["pair"], "choice": choice(theirs, "first")}
    assert site.ask("answer", "ann", **body)[0] == 409  # leased to another
    assert site.ask("answer", "ann", pair="p02", choice=body["choice"])[0] == 400  # of another question
    free = site.query("SELECT first FROM questions WHERE pair = 'p02'")[0][0]
    assert site.ask("answer", "ann", pair="p02", choice=label.digest(free))[0] == 409  # leased to nobody
    assert site.ask("answer", "ann", pair="p99", choice=body["choice"])[0] == 409  # never asked
    assert site.answers() == {}
    assert site.ask("answer", "bob", **body)[0] == 200
    assert site.ask("answer", "ann", **body)[0] == 409  # answered
    assert site.ask("answer", "bob", pair=theirs["pair"], choice=choice(theirs, "second"))[0] == 409  # the other response
    assert site.ask("undo", "ann", pair=theirs["pair"])[0] == 409
    assert site.answers() == {theirs["pair"]: 1} and site.query("SELECT COUNT(*) FROM verdicts") == [(1,)]


def test_a_lease_that_ran_out_goes_to_whoever_comes(site):
    site.put(1)
    question = site.ask("next", "slow")[1]["question"]
    assert site.ask("next", "quick")[1]["question"] is None
    site.query("UPDATE leases SET until = ?", time.time() - 1)
    assert site.ask("next", "quick")[1]["question"]["pair"] == "p00"
    assert site.ask("answer", "slow", pair="p00", choice=choice(question, "first"))[0] == 409
    assert site.answers() == {}


def test_leaving_gives_back_unless_the_page_is_there_again(tmp_path, monkeypatch):
    """In this process, with leases of so many seconds that a busy machine does not let one run out."""
    monkeypatch.setattr(label, "LEASE", 10_000)
    monkeypatch.setattr(label, "LEAVING", 1000)
    ledger = Ledger(tmp_path / "labels.sqlite")
    ledger.put_questions([Question("p00", 0.1, 3)], {"p00": ('"prompt"', '"first"', '"second"')})
    desk = label.Desk(ledger.path)

    def come(annotator, view):
        question = desk("next", {"annotator": annotator, "view": view})["question"]
        return question and question["pair"]

    def leave(annotator, view):
        assert desk("leave", {"annotator": annotator, "view": view, "pair": "p00"}) == {}

    def given_back():
        (until,), = ledger.db.execute("SELECT until FROM leases")
        return until - time.time() < 1000

    assert come("lee", "one") == "p00"
    leave("lee", "one")  # a reload: the old page goes …
    assert given_back() and come("max", "m") is None  # … nobody takes the question in between …
    assert come("lee", "two") == "p00"  # … and the new page comes
    assert not given_back()
    leave("lee", "one")  # the old page's message comes late
    come("lee", "three")
    leave("lee", "three")  # one of two pages
    leave("max", "two")  # another person's
    assert not given_back()
    leave("lee", "two")
    assert given_back()
    ledger.close()


def test_leaving_over_http_shortens_the_lease(site):
    site.put(1)
    site.ask("next", "lee", view="one")
    (before,), = site.query("SELECT until FROM leases")
    assert site.ask("leave", "lee", view="one", pair="p00") == (200, {})
    (after,), = site.query("SELECT until FROM leases")
    assert after < before


@pytest.mark.parametrize("status, headers", [
    (403, {"Origin": "https://evil.example"}), (403, {"Origin": "null"}), (403, {"Origin": "http://127.0.0.1:1"}),
    (403, {"Sec-Fetch-Site": "cross-site"}), (403, {"Sec-Fetch-Site": "same-site"}), (403, {"Sec-Fetch-Site": "none"}),
    (403, {"Content-Type": "text/plain"}), (403, {"Content-Type": "application/x-www-form-urlencoded"}),
    (403, {"Host": "evil.example"}), (403, {"Host": "127.0.0.1.evil.example:8642"}), (403, {"Host": "["}),
    (200, {"Content-Type": "application/json; charset=utf-8"}), (200, {"Host": "localhost:9000"}),
    (200, {"Host": "[::1]:1"}),
])
def test_posts_from_elsewhere_are_refused(site, status, headers):
    site.put(1)
    assert site.ask("next", "ann", headers)[0] == status
    assert bool(site.query("SELECT * FROM leases")) == (status == 200)


def test_posts_of_the_page_itself_are_not_refused(site):
    for headers in ({"Origin": f"http://127.0.0.1:{site.port}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert site.ask("next", "ann", headers)[0] == 200


@pytest.mark.parametrize("status, message", [
    (400, "["), (400, "[]"), (400, "["*5000), (400, "{}"), (400, '{"annotator": "  "}'), (400, '{"annotator": 3}'),
    (400, '{"annotator": "a\\nb"}'), (400, '{"annotator": "a\\u200bb"}'),
    (400, '{"annotator": "\\ud800"}'), (400, json.dumps({"annotator": "a" * 41})),
    (409, '{"annotator": "a", "pair": ""}'), (400, '{"annotator": "a", "pair": ["p00"]}'),
    (400, '{"annotator": "a", "pair": "p00", "choice": {}}'), (400, '{"annotator": "a", "pair": "p00", "choice": "1"}'),
    (413, json.dumps({"annotator": "a" * 17_000})), (413, iter([b"x" * 9000, b"x" * 9000])),
])
def test_bodies_that_make_no_sense_are_refused(site, status, message):
    site.put(1)
    assert site.request("POST", "/ask/answer", message, JSON)[0] == status
    assert site.answers() == {}


@pytest.mark.parametrize("seconds", ["9", True, 1e30, 10**400, float("nan"), [1]])
def test_seconds_must_be_a_number(site, seconds):
    site.put(1)
    question = site.ask("next", "ann")[1]["question"]
    assert site.ask("answer", "ann", pair="p00", choice=choice(question, "first"), seconds=seconds)[0] == 400
    assert site.answers() == {}


@pytest.mark.parametrize("seconds, kept", [(3599, 3599), (-1, None), (0, None), (4000, None), (1e8, None), (None, None)])
def test_times_that_cannot_be_are_unknown(site, seconds, kept):
    site.put(1)  # asked an hour ago
    question = site.ask("next", "ann")[1]["question"]
    assert site.ask("answer", "ann", pair="p00", choice=choice(question, "first"), seconds=seconds)[0] == 200
    assert site.query("SELECT seconds FROM answers") == [(kept,)]


def test_third_answers_settle_a_question(site):
    site.put(3)
    _, reply = site.ask("next", "ann")
    for said in ("equal", "both bad", "cannot judge"):
        pair = reply["question"]["pair"]
        for _ in range(2):  # sent again, it counts once
            status, reply = site.ask("answer", "ann", pair=pair, choice=said, comment="because")
            assert status == 200
        assert site.ask("answer", "ann", pair=pair, choice="equal" if said != "equal" else "both bad")[0] == 409
    assert reply["question"] is None and site.answers() == dict.fromkeys(("p00", "p01", "p02"), 0)
    details = [json.loads(detail) for detail, in site.query("SELECT detail FROM verdicts ORDER BY id")]
    assert details == [{"said": said, "comment": "because"} for said in ("equal", "both bad", "cannot judge")]
    assert site.ask("undo", "ann", pair="p02")[1]["question"]["pair"] == "p02" and len(site.answers()) == 2


@pytest.mark.parametrize("comment", ["c\u2019est faux\u202f: \u00ab\u00a0oui\u00a0\u00bb",
                                     "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
                                     "\U0001f469\u200d\U0001f4bb \u200ftext\u200e"])
def test_comments_may_be_in_any_language(site, comment):
    site.put(1)
    site.ask("next", "ann")
    assert site.ask("answer", "ann", pair="p00", choice="equal", comment=comment)[0] == 200
    assert json.loads(site.query("SELECT detail FROM verdicts")[0][0])["comment"] == comment


@pytest.mark.parametrize("comment", ["x" * 2001, "a\nb", "a\x1b[0mb", "a\u2028b", "a\u2029b", "\ud800", 3])
def test_comments_are_a_line_of_text(site, comment):
    site.put(1)
    site.ask("next", "ann")
    assert site.ask("answer", "ann", pair="p00", choice="equal", comment=comment)[0] == 400 and site.answers() == {}


def test_one_person_has_one_name(site):
    site.put(3)
    question = site.ask("next", "Zoë Ann")[1]["question"]
    site.ask("answer", "Zoë Ann", pair="p00", choice=choice(question, "first"))
    status, reply = site.ask("next", "zoe\u0308  ANN")
    assert reply["mine"] == 1 and reply["last"] == "p00" and reply["question"]["pair"] == "p01"
    assert site.ask("undo", "ＺＯË ann", pair="p00")[1]["question"]["pair"] == "p00" and site.answers() == {}


def test_each_question_goes_to_as_many_people_as_asked(tmp_path):
    site = Site(tmp_path, "--annotators-per-pair", "3")
    site.put({f"q{n:02}": ("p", f"first {n}", f"second {n}") for n in range(20)})
    people = [f"person {n}" for n in range(7)]
    votes, left = {}, set(people)
    wish = {pair: random.Random(pair).choice(("first", "second")) for pair, in site.query("SELECT pair FROM questions")}

    def work(who):
        _, reply = site.ask("next", who)
        while question := reply["question"]:
            pair = question["pair"]
            word = wish[pair] if who[-1] in "0246" else ("first" if wish[pair] == "second" else "second")
            assert (pair, who) not in votes
            votes[pair, who] = 1 if word == "first" else -1
            status, reply = site.ask("answer", who, pair=pair, choice=choice(question, word))
            assert status == 200

    threads = [threading.Thread(target=work, args=(who,)) for who in people]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for who in people:  # what was leased to somebody else when they looked
        work(who)
    assert left and len(votes) == 60 and site.query("SELECT COUNT(*) FROM verdicts") == [(60,)]
    for pair, answer in site.answers().items():
        of_pair = [vote for (asked, _), vote in votes.items() if asked == pair]
        assert len(of_pair) == 3 and answer == (1 if sum(of_pair) > 0 else -1)
    assert len(site.answers()) == 20
    last = site.ask("next", people[0])[1]["last"]
    before = site.answers()
    reply = site.ask("undo", people[0], pair=last)[1]
    assert reply["question"]["pair"] == last and last not in site.answers()
    word = "first" if votes[last, people[0]] == 1 else "second"
    site.ask("answer", people[0], pair=last, choice=choice(reply["question"], word))
    assert site.answers() == before
    site.stop()


def test_a_page_for_fewer_people_settles_what_is_there(tmp_path):
    site = Site(tmp_path, "--annotators-per-pair", "2")
    site.put(2)
    question = site.ask("next", "ann")[1]["question"]
    site.ask("answer", "ann", pair="p00", choice=choice(question, "second"))
    assert site.answers() == {}
    site.stop()
    site.flags = ()
    site.start()
    assert site.answers() == {"p00": -1}
    said = "1 open questions had the opinions that --annotators-per-pair 1 asks for, and are settled\n"
    assert site.stop(signal.SIGTERM) == (0, said)


def test_files_settle_only_the_questions_that_they_answer(tmp_path, capsys):
    """A page asks three people; the files come without --annotators-per-pair."""
    site = Site(tmp_path, "--annotators-per-pair", "3")
    site.put(3)
    for who in ("ann", "bob"):
        for pair in ("p00", "p01"):
            site.ask("answer", who, pair=pair, choice=choice(site.ask("next", who)[1]["question"], "second"))
    file = tmp_path / "questions.jsonl"
    assert label.main([str(tmp_path), "--export", str(file)]) == 0 and site.answers() == {}
    rows = {row["pair"]: row for row in map(json.loads, file.read_text().splitlines())}
    assert list(rows) == ["p00", "p01", "p02"]

    def give(pair, *flags):
        side = "a" if rows[pair]["response_a"].startswith("second") else "b"
        file.write_text(json.dumps({**rows[pair], "label": side, "annotator": "cleo"}))
        assert label.main([str(tmp_path), "--import", str(file), *flags]) == 0
    give("p02", "--annotators-per-pair", "3")
    assert site.answers() == {}
    give("p00", "--annotators-per-pair", "3")
    assert site.answers() == {"p00": -1}
    give("p01")
    assert site.answers() == {"p00": -1, "p01": -1}
    site.stop()


def test_an_opinion_can_be_taken_back_also_where_an_adjudicator_has_decided(tmp_path):
    site = Site(tmp_path, "--annotators-per-pair", "2", "--adjudicator", "Eve")
    site.put(2)
    for who, word in (("ann", "first"), ("bob", "second"), ("EVE", "second")):
        question = site.ask("next", who)[1]["question"]
        assert question["pair"] == "p00" and len(question["opinions"]) == (2 if who == "EVE" else 0)
        assert site.answers() == {}
        assert site.ask("answer", who, pair="p00", choice=choice(question, word), round=question["round"])[0] == 200
    assert site.query("SELECT pair, label, annotator FROM answers") == [("p00", -1, "Eve")]
    status, reply = site.ask("undo", "ann", pair="p00")
    assert status == 200 and "without you" in reply["note"] and reply["question"]["pair"] == "p01"
    assert site.answers() == {"p00": -1} and site.query("SELECT COUNT(*) FROM verdicts") == [(2,)]
    status, reply = site.ask("undo", "eve", pair="p00", round="adjudicate")
    assert status == 200 and site.answers() == {} and reply["question"]["pair"] == "p00"  # only bob's opinion is left
    site.stop()


def test_undo_says_that_an_opinion_before_it_counts_again(tmp_path):
    """Ann's, which a second file had changed. She is not asked again, because her answer would be refused."""
    site = Site(tmp_path, "--annotators-per-pair", "2")
    site.put(1)
    with contextlib.closing(Ledger(tmp_path / "labels.sqlite")) as ledger:
        for label in (1, -1):
            ledger.answer_question("p00", label, "ann", panel=Panel(2))
    for note in ("What you had said before counts again", "Here is the question again"):
        status, reply = site.ask("undo", "ann", pair="p00")
        assert status == 200 and note in reply["note"] and bool(reply["question"]) == ("question" in note)
    assert site.ask("answer", "ann", pair="p00", choice=choice(reply["question"], "second"))[0] == 200
    site.stop()


def test_an_adjudicator_with_nothing_to_decide_any_more_gives_no_opinion(tmp_path):
    """They have seen what the others said, and nobody asked for one more opinion."""
    site = Site(tmp_path, "--annotators-per-pair", "2", "--adjudicator", "Eve")
    site.put(1)
    for who, word in (("ann", "first"), ("bob", "second")):
        site.ask("answer", who, pair="p00", choice=choice(site.ask("next", who)[1]["question"], word))
    question = site.ask("next", "Eve")[1]["question"]
    assert len(question["opinions"]) == 2
    assert site.ask("undo", "bob", pair="p00")[1]["question"]["pair"] == "p00"
    for round in question["round"], "":
        assert site.ask("answer", "Eve", pair="p00", choice=choice(question, "first"), round=round)[0] == 409
    assert site.ask("next", "Eve")[1]["question"] is None
    assert site.ask("answer", "bob", pair="p00", choice=choice(question, "first"))[0] == 200
    assert site.query("SELECT annotator, label FROM answers") == [("ann, bob", 1)]
    site.stop()


def test_what_the_adjudicator_thinks_is_not_yet_the_label(tmp_path):
    """One of two people who disagree is also the one who decides; each of their requests is sent twice."""
    site = Site(tmp_path, "--annotators-per-pair", "2", "--adjudicator", "Ann")
    site.put(1)
    asked = {who: site.ask("next", who)[1]["question"] for who in ("Bob", "Ann")}
    site.ask("answer", "Bob", pair="p00", choice=choice(asked["Bob"], "first"), round="")
    first, second = (choice(asked["Ann"], word) for word in ("first", "second"))

    def twice(action, **message):
        (status, reply), (again, same) = (site.ask(action, "Ann", pair="p00", **message) for _ in range(2))
        assert status == again == 200 and reply["question"] == same["question"]
        return reply

    def opinions():
        return site.query("SELECT COUNT(*) FROM verdicts")[0][0]

    assert asked["Ann"]["round"] == ""
    reply = twice("answer", choice=second, round=asked["Ann"]["round"])
    assert site.answers() == {} and opinions() == 2
    assert reply["question"]["round"] == "adjudicate" and len(reply["question"]["opinions"]) == 2
    assert site.ask("answer", "Ann", pair="p00", choice=first, round="")[0] == 409 and site.answers() == {}
    reply = twice("answer", choice=second, round="adjudicate")
    assert site.answers() == {"p00": -1} and opinions() == 3 and reply["last_round"] == "adjudicate"
    assert site.ask("answer", "Ann", pair="p00", choice=first, round="adjudicate")[0] == 409
    reply = twice("undo", round=reply["last_round"])
    assert site.answers() == {} and opinions() == 2
    assert reply["question"]["round"] == "adjudicate" and reply["last_round"] == ""
    reply = twice("undo", round=reply["last_round"])
    assert opinions() == 1 and reply["question"]["round"] == ""
    assert site.ask("answer", "Ann", pair="p00", choice=second, round="adjudicate")[0] == 409  # nobody disagrees any more
    assert site.answers() == {} and opinions() == 1
    site.stop()


def test_the_same_words_in_both_responses_are_not_said_to_differ(site):
    site.put({"d": ("p", "one two three four five six", "one two THREE four five six")})
    question = site.ask("next", "ann")[1]["question"]
    assert question["nearly_equal"]
    sides = site.ask("difference", "ann", pair="d")[1]["sides"]
    shown = {side["turns"][0]["text"]: sides[side["choice"]] for side in question["sides"]}
    for text, parts in shown.items():
        assert "".join(part for part, _ in parts) == text
        assert [part for part, differs in parts if differs] == ["THREE" if "THREE" in text else "three"]
    assert site.ask("difference", "ann", pair="nothing")[0] == 409
    site.put({"e": ("p", "word " * 4000, "other " * 4000)})
    assert site.ask("difference", "ann", pair="e")[0] == 413


@pytest.mark.parametrize("text", [
    "5*3*2 = 30", "2**3**2 is 512", "a~~b~~c", "def __init__(self): pass", "Use __all__ here.", "Let \\(x\\) be", "a\\_b",
    "for x in y:\n    print(x)", "if x:\n\ty()", "if x:\n  \ty()", "- if x:\n          y()", "> if x:\n    y()",
    "***a*b*c***", "x*y, z*w", "line\\\nline", "5*3**2*4**1"])
def test_what_markdown_would_change_is_shown_as_written(text):
    assert reading.rendered(text) is None


@pytest.mark.parametrize("text, html", [
    ("*one* and **two**, _three_.", "<p><em>one</em> and <strong>two</strong>, <em>three</em>.</p>"),
    ("***both***: ~~gone~~", "<p><em><strong>both</strong></em>: <s>gone</s></p>"),
    ("5 * 3 * 2, snake_case_name, *args, **kwargs", "<p>5 * 3 * 2, snake_case_name, *args, **kwargs</p>"),
    ("这是**重点**内容", "<p>这是<strong>重点</strong>内容</p>"),
    ("データー**表**", "<p>データー<strong>表</strong></p>"),
    ("`5*3*2` and `__init__` and `\\(x\\)`", "<p><code>5*3*2</code> and <code>__init__</code> and <code>\\(x\\)</code></p>"),
    ("```\nif x:\n    y*z*w\n```", "<pre><code>if x:\n    y*z*w\n</code></pre>"),
    ("so:\n\n    if x:\n        y()", "<p>so:</p>\n<pre><code>if x:\n    y()\n</code></pre>"),
    ("1. *one*\n   more\n    - two", '<ol>\n<li value="1"><em>one</em><br>\nmore\n<ul>\n<li>two</li>\n</ul>\n</li>\n</ol>')])
def test_ordinary_markdown_is_rendered(text, html):
    assert reading.rendered(text) == html


@pytest.mark.parametrize("path", ["/labels.sqlite", "/label.html", "/../train.py", "/%2e%2e/train.py", "/ask", "//",
                                  "/docs", "/openapi.json", "/ask/../../etc/passwd"])
def test_there_are_no_other_paths(site, path):
    assert site.request("GET", path)[0] == 404
    assert site.request("POST", path, '{"annotator": "a"}', JSON)[0] == 404


def test_methods_and_actions_that_do_not_exist(site):
    assert site.ask("__init__", "ann")[0] == site.ask("question", "ann")[0] == 404
    assert site.request("GET", "/ask/next")[0] == site.request("DELETE", "/")[0] == 405


def test_every_reply_has_the_security_headers(site):
    status, headers, page = site.request("GET", "/")
    policy = headers["Content-Security-Policy"]
    script = re.search("<script>(.*?)</script>", page, re.S)[1]
    assert f"script-src 'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    addresses = re.sub("http://www.w3.org/2000/svg|^ *//.*|  //.*", "", page, flags=re.M)  # without comments
    assert "//" not in addresses  # nothing is loaded from elsewhere
    for path in ("/", "/nothing"):
        headers = site.request("GET", path)[1]
        assert headers["X-Frame-Options"] == "DENY"
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store" and headers["Content-Security-Policy"] == policy


def check_token(site, token):
    """Nothing works without it. With it in the address there comes a cookie, and with the cookie everything works."""
    for path, headers in (("/", {}), ("/?token=wrong", {}), ("/?token=", {}), ("/?token=%ff", {}), ("/nothing", {}),
                          ("/", {"Cookie": f"label-{site.port}=wrong"})):
        assert site.request("GET", path, headers=headers)[0] == 401
    assert site.ask("next", "ann")[0] == 401
    status, headers, _ = site.request("GET", f"/?token={token}")
    cookie = headers["Set-Cookie"]
    assert status == 200 and "HttpOnly" in cookie and "samesite=strict" in cookie.lower()
    cookie = {"Cookie": cookie.split(";")[0]}
    assert site.request("GET", "/", headers=cookie)[0] == 200
    assert site.ask("next", "ann", cookie)[1]["question"]["pair"] == "p00"
    assert site.ask("next", "ann", {**cookie, "Origin": "https://evil.example"})[0] == 403


def test_hosts_other_than_loopback_get_a_token(tmp_path):
    site = Site(tmp_path, "--host", "0.0.0.0")
    site.put(1)
    check_token(site, re.search(r"token=([\w-]{20,})", site.url)[1])
    code, errors = site.stop(signal.SIGTERM)
    assert code == 0 and errors == ""


def test_a_token_can_be_chosen_and_ctrl_c_stops(tmp_path):
    site = Site(tmp_path, "--token", "my-own_token-0123")
    site.put(1)
    check_token(site, "my-own_token-0123")
    code, errors = site.stop(signal.SIGINT)
    assert code == 0 and errors == ""


def links(site, count):
    """{person: token} that a page printed."""
    lines = [site.first] + [site.process.stdout.readline() for _ in range(count - 1)]
    return dict(re.match(r"(.+) labels at http://\S+\?token=([\w-]{22})", line).groups() for line in lines)


def test_a_link_for_each_person_says_who_they_are(tmp_path):
    site = Site(tmp_path, "--annotator", "Ann", "--annotator", "Bob", "--adjudicator", "Eve")
    tokens = links(site, 3)
    assert set(tokens) == {"Ann", "Bob", "Eve"} and len(set(tokens.values())) == 3
    assert (tmp_path / "label.key").stat().st_mode & 0o777 == 0o600
    cookies = {who: {"Cookie": f"label-{site.port}={token}"} for who, token in tokens.items()}
    assert site.ask("next", "Ann")[0] == 401
    site.put(3)
    for who, pair in (("Ann", "p00"), ("Bob", "p02")):  # Ann has p01 by then
        assert site.ask("hello", "", cookies[who])[1]["you"] == who
        question = site.ask("next", "", cookies[who])[1]["question"]
        site.ask("answer", f" {who.upper()}", cookies[who], pair=question["pair"], choice=choice(question, "first"))
        assert site.query("SELECT annotator FROM answers WHERE pair = ?", pair) == [(who,)]
    assert site.ask("undo", "Bob", cookies["Bob"], pair="p00")[0] == 409  # another's answer
    question = site.ask("next", "Ann", cookies["Ann"])[1]["question"]
    for name in ("Ann", "Somebody else"):  # Ann's page, after Bob's link was opened in the same browser
        status, reply = site.ask("answer", name, cookies["Bob"], pair=question["pair"], choice=choice(question, "first"))
        assert status == 409 and reply["error"].startswith("Another person's link")
    assert site.ask("next", 3, cookies["Bob"])[0] == 409
    assert len(site.answers()) == 2
    port, site.port = site.port, 0
    site.stop()
    site.flags, site.port = ("--annotator", "ANN"), port
    site.start()
    assert links(site, 1) == {"Ann": tokens["Ann"]}  # the same after a restart, and whoever is not named cannot come in
    assert site.ask("next", "", cookies["Ann"])[0] == 200 and site.ask("next", "", cookies["Bob"])[0] == 401
    site.stop()
    (tmp_path / "label.key").unlink()
    site.start()
    assert links(site, 1)["Ann"] != tokens["Ann"]
    site.stop()


def test_guesses_are_limited_and_cost_others_nothing(tmp_path):
    site = Site(tmp_path, "--token", "correct-horse-battery")
    site.put(1)
    cookie = {"Cookie": f"label-{site.port}=correct-horse-battery"}
    assert site.ask("next", "ann", cookie)[0] == 200  # has come in before
    said = [site.request("GET", f"/?token=guess-number-{n:04}")[0] for n in range(serving.GUESSES + 3)]
    assert said == [401] * serving.GUESSES + [429] * 3
    assert site.ask("next", "ann", cookie)[0] == 200
    site.stop()
    door = serving.Door({"right": None})
    for n in range(serving.GUESSES):
        with pytest.raises(Refused):
            door.enter(f"wrong {n}", "10.0.0.1")
    with pytest.raises(Refused) as refused:  # even the right one, which would tell a guesser
        door.enter("right", "10.0.0.1")
    assert refused.value.args[0] == 429 and door.enter("right", "10.0.0.2") is None


@pytest.mark.parametrize("flags, words", [
    (("--token", "short-token"), "at least 16"), (("--token", "0123456789abcde!"), "letters, digits"),
    (("--token", "0123456789abcdef", "--annotator", "Ann"), "say one of them"),
    (("--annotators-per-pair", "0"), "expected 1 to 100")])
def test_flags_that_make_no_sense_are_refused(flags, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        label.main([str(tmp_path), *flags])
    assert ended.value.code == 2 and words in capsys.readouterr().err.splitlines()[-1]


def test_behind_a_proxy_with_tls(tmp_path):
    site = Site(tmp_path, "--public-url", "https://label.example.org:8443/team/")
    site.put(1)
    assert site.first.startswith("label at https://label.example.org:8443/team/?token=")
    token = re.search(r"token=([\w-]{22})", site.first)[1]
    for host in ("label.example.org:8443", f"localhost:{site.port}"):  # proxies pass the host on, or not
        status, headers, _ = site.request("GET", f"/?token={token}", headers={"Host": host})
        assert status == 200 and "; secure" in headers["Set-Cookie"].lower()
        cookie = {"Cookie": headers["Set-Cookie"].split(";")[0], "Host": host}
        assert site.ask("next", "ann", {**cookie, "Origin": "https://label.example.org:8443"})[0] == 200
        for origin in ("https://label.example.org", "http://label.example.org:8443", "https://evil.example"):
            expected = 200 if origin.partition("//")[2] == host else 403
            assert site.ask("next", "ann", {**cookie, "Origin": origin})[0] == expected
    assert site.request("GET", f"/?token={token}", headers={"Host": "evil.example"})[0] == 403
    assert site.request("GET", "/")[0] == 401  # nobody comes in without a token, also on loopback
    site.stop()


def test_replies_on_a_connection_are_not_held_back():
    """Nagle's algorithm would hold the second part of a reply until the first is acknowledged, 40 ms later."""
    listening = serving.listen("127.0.0.1", 0)
    seen = []

    class Look(asyncio.Protocol):
        def connection_made(self, transport):
            seen.append(transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            transport.close()

    async def one():
        server = await asyncio.get_running_loop().create_server(Look, sock=listening)
        reader, writer = await asyncio.open_connection(*listening.getsockname())
        await reader.read()
        writer.close()
        server.close()
    asyncio.run(one())
    assert seen == [1]


SHORT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({files}, {files}))
sys.path.insert(0, {root!r})
from tools import label, serving
serving.REQUEST_SECONDS = serving.BODY_SECONDS = {seconds}
sys.exit(label.main(sys.argv[1:]))
"""


def half_sent(site, text):
    link = socket.create_connection(("127.0.0.1", site.port))
    link.sendall(text.encode())
    return link


def test_a_request_has_to_arrive_in_time(tmp_path):
    (tmp_path / "short.py").write_text(SHORT.format(root=str(ROOT), seconds=1, files=1024))
    site = Site(tmp_path, program=tmp_path / "short.py")
    links = [half_sent(site, text) for text in (
        "", "GET / HT", "GET / HTTP/1.1\r\nHost: local", "POST /ask/next HTTP/1.1\r\nHost: localhost\r\n"
        "Content-Type: application/json\r\nContent-Length: 50\r\n\r\n{")]
    for link in links:
        link.settimeout(60)
        reply = b""
        with contextlib.suppress(ConnectionResetError):  # closed without a word
            while part := link.recv(4096):
                reply += part
        assert (b" 408 " in reply) == (link is links[-1])
        link.close()
    assert site.request("GET", "/")[0] == 200
    site.stop()


def test_a_client_that_hangs_up_is_not_a_bug(tmp_path):
    site = Site(tmp_path)
    for _ in range(20):
        half_sent(site, "POST /ask/next HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                        "Content-Length: 50\r\n\r\n{").close()
    assert site.request("GET", "/")[0] == 200
    assert "Traceback" not in site.stop()[1]


def test_half_sent_requests_do_not_make_the_page_unreachable(tmp_path):
    (tmp_path / "short.py").write_text(SHORT.format(root=str(ROOT), seconds=600, files=128))
    site = Site(tmp_path, program=tmp_path / "short.py")
    site.put(1)
    links = [half_sent(site, "GET / HTTP/1.1\r\nHost: local") for _ in range(200)]
    assert site.request("GET", "/")[0] == 200 and site.ask("next", "ann")[1]["question"]["pair"] == "p00"
    for link in links:
        link.close()
    site.stop()


def test_one_line_says_why_it_cannot_start(tmp_path, capsys, monkeypatch):
    def said(*flags):
        assert label.main([str(tmp_path), *flags]) == 2
        line = capsys.readouterr().err
        assert line.startswith("tools/label.py: ") and line.count("\n") == 1
        return line

    assert f"{tmp_path}/labels.sqlite does not exist" in said()
    (tmp_path / "labels.sqlite").write_text("this is not a database, but long enough to look like one " * 20)
    assert f"{tmp_path}/labels.sqlite" in said()
    (tmp_path / "labels.sqlite").unlink()
    Ledger(tmp_path / "labels.sqlite").close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in said("--port", str(taken.getsockname()[1]))
    assert "cannot listen" in said("--host", "203.0.113.7") and "cannot listen" in said("--port", "70000")
    assert "No such file" in said("--guidelines", str(tmp_path / "absent"))
    (tmp_path / "guide").write_bytes(b"\xff")
    assert "is not UTF-8" in said("--guidelines", str(tmp_path / "guide"))
    assert "expected an address" in said("--public-url", "label.example.org")
    assert "is named twice" in said("--annotator", "Ann", "--annotator", "ann ")
    assert "a name needs" in said("--annotator", "a\nb")
    assert "at least 3 --annotator names are needed" in said("--annotators-per-pair", "3", "--annotator", "Ann",
                                                             "--adjudicator", "Bob")
    (tmp_path / "label.key").write_text("mine")
    assert "label.key: is damaged" in said("--annotator", "Ann")
    monkeypatch.setattr(label, "PATIENCE", 0.1)
    with contextlib.closing(Ledger(tmp_path / "labels.sqlite")) as another, another.transaction():
        assert f"{tmp_path}/labels.sqlite: cannot be used as a ledger (database is locked): another process holds" in said()
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install -r tools/requirements.txt" in said("--port", "0")


def test_questions_and_answers_go_through_files(site, tmp_path, capsys):
    site.put(3)
    file = tmp_path / "questions.jsonl"
    assert label.main([str(site.folder), "--export", str(file)]) == 0
    assert capsys.readouterr().out == f"3 open questions written to {file}\n"
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    file.write_text("".join(json.dumps({**row, "label": "a" if row["response_a"].startswith("first") else "b"}) + "\n"
                            for row in rows))
    assert label.main([str(site.folder), "--import", str(file)]) == 0
    assert capsys.readouterr().out.startswith(f"{file}: 3 answered")
    assert site.answers() == {"p00": 1, "p01": 1, "p02": 1}
    studio = str(tmp_path / "tasks.json")
    site.put({"p03": ("prompt of p03", "first of p03", "second of p03")})
    assert label.main([str(site.folder), "--export", studio, "--format", "label-studio"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"1 open questions written to {studio}"
    assert f"{studio}.xml" in said[1] and "Labeling Interface, Code" in said[1] and (tmp_path / "tasks.json.xml").exists()
    assert label.main([str(site.folder), "--import", str(tmp_path / "absent")]) == 2
    assert str(tmp_path / "absent") in capsys.readouterr().err
