"""tools/label.py, over HTTP and in a real browser: `python -m pytest tests/test_label.py`.

The browser is Debian's (`apt-get install chromium`), driven by Playwright for Python; where either is absent, those
tests are skipped.
"""

import base64
import hashlib
import http.client
import json
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from labels.oracle import Ledger, Question

pytest.importorskip("fastapi", reason="needs requirements-extra.txt")

from tools import label  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = shutil.which("chromium") or "/usr/bin/chromium"
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync"]
JSON = {"Content-Type": "application/json"}


class Site:
    """A labelling page in a process of its own, over a ledger in `folder`."""

    def __init__(self, folder, *flags, port=0):
        self.folder, self.flags, self.port = folder, flags, port
        Ledger(folder / "labels.sqlite").close()
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            [sys.executable, "tools/label.py", str(self.folder), "--port", str(self.port), *self.flags], cwd=ROOT,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line = self.process.stdout.readline()
        assert "http://" in line, line + self.process.stderr.read()
        self.url = line.split()[2]
        self.port = int(re.search(r":(\d+)/", self.url)[1])

    def stop(self, sign=signal.SIGKILL):
        """(exit code, stderr)."""
        self.process.send_signal(sign)
        errors = self.process.communicate(timeout=20)[1]
        return self.process.returncode, errors

    def clear(self):
        """No question, no answer."""
        self.query("DELETE FROM questions")
        self.query("DELETE FROM answers")
        self.query("DELETE FROM verdicts")

    def put(self, texts, step=3):
        """Open questions. texts: {pair: (prompt, y1, y2)}, or how many made-up ones."""
        if isinstance(texts, int):
            texts = {f"p{n:02}": tuple(f"{what} of p{n:02}" for what in ("prompt", "first", "second"))
                     for n in range(texts)}
        ledger = Ledger(self.folder / "labels.sqlite")
        ledger.put_questions([Question(pair, 0.1, step) for pair in texts],
                             {pair: tuple(map(json.dumps, three)) for pair, three in texts.items()})
        ledger.close()

    def query(self, sql, *values):
        ledger = Ledger(self.folder / "labels.sqlite")
        rows = ledger.db.execute(sql, values).fetchall()
        ledger.close()
        return rows

    def answers(self):
        return dict(self.query("SELECT pair, label FROM answers"))

    def request(self, method, path, body=None, headers=None):
        """(status, headers, body)."""
        link = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        link.request(method, path, body, headers or {}, encode_chunked=not isinstance(body, (str, bytes, type(None))))
        response = link.getresponse()
        try:
            return response.status, response.headers, response.read().decode()
        finally:
            link.close()

    def ask(self, action, annotator, headers=None, **message):
        """(status, reply)."""
        body = json.dumps({"annotator": annotator, "view": annotator, **message})
        status, _, text = self.request("POST", f"/ask/{action}", body, {**JSON, **(headers or {})})
        return status, json.loads(text) if text.startswith("{") else text


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
    """The choice of the response that begins with `start`."""
    return next(side["choice"] for side in question["sides"] if side["turns"][0]["content"].startswith(start))


# Over HTTP.

def test_a_label_means_the_response_that_was_chosen_and_stands_before_the_reply(site):
    site.put(20)
    _, reply = site.ask("next", "ann")
    chosen, left = {}, set()
    while question := reply["question"]:
        word = random.choice(("first", "second"))
        chosen[question["pair"]] = 1 if word == "first" else -1
        left.add(question["sides"][0]["turns"][0]["content"].split()[0])
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
        drawn.add(reply["question"]["sides"][0]["turns"][0]["content"])
        assert site.ask("next", f"viewer {n}")[1]["question"] == reply["question"]  # a second look shows the same
        site.query("UPDATE questions SET leased_to = NULL")
    assert drawn == {"first of p00", "second of p00"}


def test_prompts_are_shown_as_conversations(site):
    site.put({"a": ("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Tea?\n\nAssistant:", " Yes", " No"),
              "b": ([{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tea?"}],
                    [{"role": "assistant", "content": "Yes"}], [{"role": "assistant", "content": "No"}])})
    shown = {}
    for who in ("ann", "bob"):
        question = site.ask("next", who)[1]["question"]
        shown[question["pair"]] = [(turn["role"], turn["content"]) for turn in question["prompt"]]
        assert {side["turns"][0]["content"].strip() for side in question["sides"]} == {"Yes", "No"}
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


def test_an_answer_that_the_run_has_used_stands(site):
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
    assert site.ask("answer", "bob", pair=theirs["pair"], choice=choice(theirs, "second"))[0] == 409  # the other way
    assert site.ask("undo", "ann", pair=theirs["pair"])[0] == 409
    assert site.answers() == {theirs["pair"]: 1} and site.query("SELECT COUNT(*) FROM verdicts") == [(1,)]


def test_a_lease_that_ran_out_goes_to_whoever_comes(site):
    site.put(1)
    question = site.ask("next", "slow")[1]["question"]
    assert site.ask("next", "quick")[1]["question"] is None
    site.query("UPDATE questions SET leased_until = ?", time.time() - 1)
    assert site.ask("next", "quick")[1]["question"]["pair"] == "p00"
    assert site.ask("answer", "slow", pair="p00", choice=choice(question, "first"))[0] == 409
    assert site.answers() == {}


def test_leaving_gives_back_unless_the_page_is_there_again(site):
    site.put(1)

    def leased():
        return site.query("SELECT leased_until FROM questions")[0][0] - time.time()

    site.ask("next", "lee", view="one")
    assert site.ask("leave", "lee", view="one", pair="p00") == (200, {})  # a reload: the old page goes …
    assert leased() < 3 and site.ask("next", "max")[1]["question"] is None  # … nobody comes in between …
    assert site.ask("next", "lee", view="two")[1]["question"]["pair"] == "p00"  # … and the new one comes
    assert leased() > 60
    site.ask("leave", "lee", view="one", pair="p00")  # the old page's message comes late
    site.ask("next", "lee", view="three")
    site.ask("leave", "lee", view="three", pair="p00")  # one of two pages
    site.ask("leave", "max", view="two", pair="p00")  # another person's
    assert leased() > 60
    site.ask("leave", "lee", view="two", pair="p00")
    assert leased() < 3


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
    leased = site.query("SELECT leased_to FROM questions") != [(None,)]
    assert leased == (status == 200)


def test_posts_of_the_page_itself_are_not_refused(site):
    for headers in ({"Origin": f"http://127.0.0.1:{site.port}"}, {"Sec-Fetch-Site": "same-origin"}):
        assert site.ask("next", "ann", headers)[0] == 200


@pytest.mark.parametrize("status, message", [
    (400, "["), (400, "[]"), (400, "["*5000), (400, "{}"), (400, '{"annotator": "  "}'), (400, '{"annotator": 3}'),
    (400, '{"annotator": "a\\nb"}'), (400, '{"annotator": "\\ud800"}'), (400, json.dumps({"annotator": "a" * 41})),
    (409, '{"annotator": "a", "pair": ""}'), (400, '{"annotator": "a", "pair": ["p00"]}'),
    (400, '{"annotator": "a", "pair": "p00", "choice": {}}'), (400, '{"annotator": "a", "pair": "p00", "choice": "1"}'),
    (413, json.dumps({"annotator": "a" * 17_000})), (413, iter([b"x" * 9000, b"x" * 9000])),
])
def test_bodies_that_make_no_sense_are_refused(site, status, message):
    site.put(1)
    assert site.request("POST", "/ask/answer", message, JSON)[0] == status
    assert site.answers() == {}


@pytest.mark.parametrize("seconds", [-1, "9", True, 1e30, 10**400, float("nan"), [1]])
def test_seconds_must_be_a_number(site, seconds):
    site.put(1)
    question = site.ask("next", "ann")[1]["question"]
    assert site.ask("answer", "ann", pair="p00", choice=choice(question, "first"), seconds=seconds)[0] == 400
    assert site.answers() == {}


@pytest.mark.parametrize("path", ["/labels.sqlite", "/label.html", "/../oracle.py", "/%2e%2e/oracle.py", "/ask", "//",
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
    addresses = re.sub("http://www.w3.org/2000/svg|^ *//.*|  //.*", "", page, flags=re.M)  # comments are none
    assert "//" not in addresses  # nothing comes from elsewhere
    for path in ("/", "/nothing"):
        headers = site.request("GET", path)[1]
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Referrer-Policy"] == "no-referrer"
        assert headers["Cache-Control"] == "no-store" and headers["Content-Security-Policy"] == policy


def check_token(site, token):
    """Without it nothing; with it in the address a cookie; with the cookie everything."""
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


def test_a_token_is_made_for_other_hosts_than_loopback(tmp_path):
    site = Site(tmp_path, "--host", "0.0.0.0")
    site.put(1)
    check_token(site, re.search(r"token=([\w-]{20,})", site.url)[1])
    code, errors = site.stop(signal.SIGTERM)
    assert code == 0 and errors == ""


def test_a_token_can_be_chosen_and_ctrl_c_stops(tmp_path):
    site = Site(tmp_path, "--token", "my-own_token")
    site.put(1)
    check_token(site, "my-own_token")
    code, errors = site.stop(signal.SIGINT)
    assert code == 0 and errors == ""


def test_one_line_says_why_it_cannot_start(tmp_path, capsys, monkeypatch):
    def said(*flags):
        assert label.main([str(tmp_path), *flags]) == 2
        line = capsys.readouterr().err
        assert line.startswith("tools/label.py: ") and line.count("\n") == 1
        return line

    assert f"{tmp_path}/labels.sqlite does not exist" in said()
    (tmp_path / "labels.sqlite").write_text("this is no database, but long enough to be taken for one " * 20)
    assert f"{tmp_path}/labels.sqlite" in said()
    (tmp_path / "labels.sqlite").unlink()
    Ledger(tmp_path / "labels.sqlite").close()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "in use" in said("--port", str(taken.getsockname()[1]))
    assert "cannot listen" in said("--host", "203.0.113.7") and "cannot listen" in said("--port", "70000")
    monkeypatch.setitem(sys.modules, "fastapi", None)
    assert "pip install -r requirements-extra.txt" in said("--port", "0")


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
    assert label.main([str(site.folder), "--import", str(tmp_path / "absent")]) == 2
    assert str(tmp_path / "absent") in capsys.readouterr().err


# In a browser.

@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="needs requirements-extra.txt")
    if not Path(CHROMIUM).exists():
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        made.close()


@pytest.fixture
def person(browser, server):
    """person(name) → their page, in a browser profile of their own. Errors of scripts or of the policy fail."""
    contexts, errors = [], []

    def come(name, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(15_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: "Security Policy" in message.text and errors.append(message.text))
        page.goto(server.url)
        page.fill("#name", name)
        page.click("text=Begin")
        return page

    yield come
    for context in contexts:
        context.close()
    assert errors == []


def ready(page, after=None):
    """(pair, [left text, right text]) of the made-up question that the page shows, once it takes a choice."""
    if after:
        page.locator("#prompt .content", has_not_text=after).wait_for()
    page.wait_for_selector('#task:not([hidden]) .choose[aria-disabled="false"]')
    pair = page.locator("#prompt").text_content().split()[-1]
    texts = page.locator(".side .text").all_text_contents()
    assert sorted(texts) == [f"first of {pair}", f"second of {pair}"]
    return pair, texts


def choose(page, side, texts):
    """Press a key; returns the label that it must mean."""
    page.keyboard.press(("ArrowLeft", "ArrowRight")[side])
    return 1 if texts[side].startswith("first") else -1


def test_two_annotators_at_once_and_position_is_drawn(site, person):
    site.put(40)
    pages = {name: person(name) for name in ("Ann", "Bob")}
    expected, held, first_is_left = {}, {}, []
    while True:
        for name, page in pages.items():
            held[name] = ready(page, after=held.get(name, [None])[0])
        (pair, texts), (other, _) = held["Ann"], held["Bob"]
        assert pair != other  # what one holds the other never sees
        if len(expected) == 38:
            break
        for name, page in pages.items():
            pair, texts = held[name]
            assert pair not in expected
            first_is_left.append(texts[0].startswith("first"))
            expected[pair] = choose(page, random.randrange(2), texts)
    assert site.answers() == expected and set(expected.values()) == {1, -1}
    assert 5 <= sum(first_is_left) <= 33  # of 38 fair draws, one time in a million it is not
    assert site.query("SELECT annotator, COUNT(*) FROM answers GROUP BY annotator") == [("Ann", 19), ("Bob", 19)]
    assert all(0.2 < seconds < 30 for seconds, in site.query("SELECT seconds FROM answers"))
    counts = {name: [page.text_content(place) for place in ("#left", "#mine")] for name, page in pages.items()}
    assert ["2", "19"] in counts.values() and ["3", "19"] in counts.values()  # whose reply came first knows of one less


def test_keys_buttons_skip_undo_and_the_wait(site, person):
    site.put(3)
    page = person("Cleo")
    assert ready(page)[0] == "p00"
    page.keyboard.press("s")
    pair, texts = ready(page, after="p00")
    assert pair == "p01" and site.answers() == {}
    expected = choose(page, 0, texts)
    assert ready(page, after="p01")[0] == "p02" and site.answers() == {"p01": expected}
    page.keyboard.press("u")
    pair, texts = ready(page, after="p02")
    assert pair == "p01" and site.answers() == {} and "Undone" in page.text_content("#note")
    page.locator(".choose").nth(1).click()
    expected = {"p01": 1 if texts[1].startswith("first") else -1}
    pair, texts = ready(page, after="p01")
    assert pair == "p02" and site.answers() == expected
    expected["p02"] = choose(page, 1, texts)
    pair, texts = ready(page, after="p02")  # the skipped one, since nothing else is left
    expected[pair] = choose(page, 0, texts)
    page.wait_for_selector("#wait:not([hidden])")
    assert site.answers() == expected and len(expected) == 3
    assert "goes on by itself" in page.text_content("#why")
    site.put({"p50": ("prompt of p50", "first of p50", "second of p50")}, step=4)  # the run asks more
    assert ready(page)[0] == "p50"


def test_a_reload_shows_the_same_question(site, person):
    site.put(4)
    page, other = person("Dora"), person("Emil")
    shown, elsewhere = ready(page), ready(other)[0]
    choose(other, 0, ready(other)[1])
    elsewhere = ready(other, after=elsewhere)[0]
    for _ in range(3):
        page.reload()
        assert ready(page) == shown  # the sides as well
    assert elsewhere != shown[0] and ready(other)[0] == elsewhere
    expected = choose(page, 1, shown[1])
    ready(page, after=shown[0])
    assert site.answers()[shown[0]] == expected


def test_leaving_gives_the_question_back(site, person):
    site.put(1)
    page = person("Fay")
    ready(page)
    other = person("Gil")
    other.wait_for_selector("#wait:not([hidden])")
    assert "with other people" in other.text_content("#why")
    page.close(run_before_unload=True)
    start = time.monotonic()
    assert ready(other)[0] == "p00" and time.monotonic() - start < 10  # not the 90 seconds of the lease


def test_a_hostile_response_is_shown_as_text(site, person):
    hostile = ("<img src=x onerror=\"window.owned=1\"><script>window.owned=1</script></div></main>"
               "<iframe srcdoc='<script>parent.owned=1</script>'></iframe>{{7*7}} "
               "<a href=\"javascript:owned=1\">x</a> \u202e")
    rtl = "שלום, מה שלומך?"
    long = "x" * 20_000
    site.put({"h": ([{"role": "user", "content": hostile}, {"role": hostile, "content": rtl}], hostile, long)})
    page = person("<b onclick=owned=1>Hal</b>", viewport={"width": 360, "height": 640})
    page.wait_for_selector("#task:not([hidden])")
    assert sorted(page.locator(".side .text").all_text_contents(), key=len) == [hostile, long]
    assert page.locator("#prompt .content").all_text_contents() == [hostile, rtl]
    assert page.locator("main img, main script, main iframe, main a, header b:not([id])").count() == 0
    assert page.evaluate("window.owned") is None
    assert page.evaluate("getComputedStyle(document.querySelectorAll('#prompt .content')[1]).direction") == "rtl"
    # Long texts scroll inside their cards; the buttons stay in view on a small phone.
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".choose").nth(0).bounding_box()["y"] < 600
    assert page.evaluate("[...document.querySelectorAll('.text')].some(t => t.scrollHeight > t.clientHeight + 99)")


def test_a_token_in_the_address_goes_into_a_cookie(tmp_path, browser):
    site = Site(tmp_path, "--token", "secret-1")
    site.put(2)
    context = browser.new_context()
    page = context.new_page()
    assert page.goto(site.url.split("?")[0]).status == 401
    page.goto(site.url)
    page.fill("#name", "Ida")
    page.click("text=Begin")
    pair, texts = ready(page)
    assert "secret" not in page.url and "secret" not in page.evaluate("document.cookie")
    page.reload()
    assert ready(page)[0] == pair
    context.close()
    site.stop()


def test_kill_9_of_the_server_loses_and_doubles_nothing(tmp_path, browser):
    site = Site(tmp_path)
    site.put(90)
    context = browser.new_context()
    page = context.new_page()
    page.goto(site.url)
    page.fill("#name", "Kay")
    page.click("text=Begin")
    stopped = []

    def kill():
        for _ in range(6):
            time.sleep(random.uniform(0.05, 0.7))
            site.stop()
            site.start()
        stopped.append(True)

    killer, expected, pair = threading.Thread(target=kill), {}, None
    pair, texts = ready(page)
    killer.start()
    while not stopped or len(expected) < 10:
        assert pair not in expected
        expected[pair] = choose(page, random.randrange(2), texts)
        pair, texts = ready(page, after=pair)
    killer.join()
    assert site.answers() == expected
    assert site.query("SELECT COUNT(*), COUNT(DISTINCT pair) FROM verdicts") == [(len(expected), len(expected))]
    context.close()
    assert site.stop(signal.SIGTERM) == (0, "")
