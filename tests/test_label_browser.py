"""tools/label.py in a real browser: `python -m pytest tests/test_label_browser.py -n 0 -m slow`.

The browser is Debian's (`apt-get install chromium`), driven by Playwright for Python. Without either, these tests are
skipped.
"""

import json
import random
import signal
import threading
import time

import pytest
from helpers import Site

pytest.importorskip("fastapi", reason="needs tests/requirements.txt")

from tools import label  # noqa: E402

pytestmark = pytest.mark.slow
PATIENCE = 600_000  # ms; only so that a test cannot hang


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    made = Site(tmp_path_factory.mktemp("label"))
    yield made
    made.stop()


@pytest.fixture
def site(server):
    server.clear()
    return server


@pytest.fixture
def person(browser, server):
    """person(name) → their page, in their own browser profile. An error in a script or against the policy fails the test."""
    contexts, errors = [], []

    def come(name, **options):
        contexts.append(browser.new_context(**options))
        page = contexts[-1].new_page()
        page.set_default_timeout(PATIENCE)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: "Security Policy" in message.text and errors.append(message.text))
        begin(page, server.url, name)
        return page

    yield come
    for context in contexts:
        context.close()
    assert errors == []


def begin(page, url, name):
    """Open the page and say who one is."""
    page.goto(url)
    page.fill("#name", name)
    page.click("text=Begin")


def ready(page, after=None):
    """(pair, [left text, right text]) of the made-up question that the page shows, as soon as it takes a choice."""
    if after:
        page.locator("#prompt .content", has_not_text=after).wait_for()
    page.wait_for_selector('#actions:not([hidden]) .choose[aria-disabled="false"]')
    pair = page.locator("#prompt").text_content().split()[-1]
    texts = page.locator(".side .text").all_text_contents()
    assert sorted(texts) == [f"first of {pair}", f"second of {pair}"]
    return pair, texts


def choose(page, side, texts):
    """Press a key. Returns the label that this must mean."""
    page.keyboard.press(("ArrowLeft", "ArrowRight")[side])
    return 1 if texts[side].startswith("first") else -1


def test_two_annotators_at_once_and_position_is_drawn(site, person):
    start = time.monotonic()
    site.put(40)
    pages = {name: person(name) for name in ("Ann", "Bob")}
    expected, held, first_is_left = {}, {}, []
    while True:
        for name, page in pages.items():
            held[name] = ready(page, after=held.get(name, [None])[0])
        (pair, texts), (other, _) = held["Ann"], held["Bob"]
        assert pair != other  # nobody sees what another person holds
        if len(expected) == 38:
            break
        for name, page in pages.items():
            pair, texts = held[name]
            assert pair not in expected
            first_is_left.append(texts[0].startswith("first"))
            expected[pair] = choose(page, random.randrange(2), texts)
    assert site.answers() == expected and set(expected.values()) == {1, -1}
    assert 5 <= sum(first_is_left) <= 33  # for 38 fair draws this fails one time in a million
    assert site.query("SELECT annotator, COUNT(*) FROM answers GROUP BY annotator") == [("Ann", 19), ("Bob", 19)]
    assert all(0.2 < seconds < time.monotonic() - start for seconds, in site.query("SELECT seconds FROM answers"))
    counts = [[page.text_content(place) for place in ("#left", "#mine")] for page in pages.values()]
    assert ["2", "19"] in counts  # the page whose reply came first counts one more, until it renews its lease
    assert all(count in (["2", "19"], ["3", "19"]) for count in counts)


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
    pair, texts = ready(page, after="p02")  # the skipped one, because nothing else is left
    expected[pair] = choose(page, 0, texts)
    page.wait_for_selector("#wait:not([hidden])")
    assert site.answers() == expected and len(expected) == 3
    assert "they appear here by themselves" in page.text_content("#why")
    site.put({"p50": ("prompt of p50", "first of p50", "second of p50")}, step=4)  # the run asks about more
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
    lease = "SELECT annotator, until FROM leases ORDER BY until DESC LIMIT 1"
    (holder, until), = site.query(lease)
    assert holder == "Fay"
    page.close(run_before_unload=True)
    assert ready(other)[0] == "p00"
    (holder, then), = site.query(lease)
    assert holder == "Gil" and then - label.LEASE < until  # Gil got it before Fay's lease would have run out


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
    # On a small phone, prompt and responses scroll as one text, and the buttons stay in view.
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".choose").nth(0).bounding_box()["y"] < 600
    assert page.evaluate("(task => task.scrollHeight > task.clientHeight + 99)(document.getElementById('task'))")


MARKDOWN = """Use **one** of [these](javascript:owned=1) &amp; ![that](https://example.org/x.png):

1. one
1. again

```python <b>not bold</b>
def f(x):
    return "<i>" + x
```

| a | b |
| --- | --: |
| `1` | 2 |
"""


def test_markdown_is_rendered_and_can_be_seen_as_it_was_written(site, person):
    hides = "| a |\n| --- |\n| 1 | this cell is beyond the table |"
    site.put({"m": ("# Prompt", MARKDOWN, MARKDOWN.replace("**one**", "**two**")), "n": ("hides", hides, hides + "!")})
    page = person("Lea", viewport={"width": 1280, "height": 900})
    page.wait_for_selector("#task:not([hidden]) table")
    assert page.evaluate("getComputedStyle(document.querySelector('pre code')).fontFamily").endswith("monospace")
    assert page.locator("pre code").first.text_content() == 'def f(x):\n    return "<i>" + x\n'
    assert page.locator("pre small").first.text_content() == "python <b>not bold</b>"
    assert page.locator(".text").first.locator("td").all_text_contents() == ["1", "2"]
    assert page.locator("li").first.get_attribute("value") == page.locator("li").nth(1).get_attribute("value") == "1"
    assert page.locator("#task a, #task img, #task b, #task i").count() == 0  # a link stays as it is written
    for words in ("[these](javascript:owned=1) &amp; ![that](https://example.org/x.png)",):
        assert words in page.locator(".text p").first.text_content()
    page.keyboard.press("r")
    assert MARKDOWN.strip() in page.locator(".text").all_text_contents()
    page.keyboard.press("d")  # the switch says that the two are nearly equal
    page.wait_for_selector(".text mark")
    assert sorted(page.locator(".text mark").all_text_contents()) == ["one", "two"]
    assert MARKDOWN.strip() in page.locator(".text").all_text_contents()
    assert "hint" in page.locator("[data-view=difference]").get_attribute("class")
    page.keyboard.press("d")
    page.wait_for_selector(".text table")
    page.wait_for_selector('#actions:not([hidden]) .choose[aria-disabled="false"]')  # an answer may not come too soon
    page.keyboard.press("ArrowLeft")  # what a table would drop is shown
    page.locator("#prompt .content", has_text="hides").wait_for()
    assert all("beyond the table" in text and "Markdown would hide" in text
               for text in page.locator(".text").all_text_contents())


def test_third_answers_and_comments(site, person):
    site.put(4)
    page = person("Mia")
    for key, said in (("e", "equal"), ("x", "both bad"), ("c", "cannot judge")):
        pair, _ = ready(page)
        page.keyboard.press("m")
        page.keyboard.type(f"seuxc {key}")  # none of these is a key here
        page.keyboard.press("Enter")
        page.keyboard.press(key)
        ready(page, after=pair)
        (label, detail), = site.query("SELECT verdict, detail FROM verdicts WHERE pair = ?", pair)
        assert label == 0 and json.loads(detail) == {"said": said, "comment": f"seuxc {key}"}
        assert page.input_value("#comment") == ""
    page.click("text=Cannot judge")
    page.wait_for_selector("#wait:not([hidden])")
    assert set(site.answers().values()) == {0} and len(site.answers()) == 4


def test_the_buttons_stay_and_the_keys_scroll(site, person):
    long = "\n\n".join(f"Paragraph {n} of a long text, with some words." for n in range(90))
    site.put({"a": (long, long, "short"), "b": ("prompt of b", "first of b", "second of b")})
    page = person("Noa", viewport={"width": 1200, "height": 800})
    page.locator("#prompt .content", has_text="Paragraph 0").wait_for()

    def tops(*places):
        return [page.evaluate("place => document.querySelector(place).scrollTop", place) for place in places]

    def boxes():
        return [button.bounding_box() for button in page.locator("#actions button").all()]

    page.wait_for_selector('#actions:not([hidden]) .choose[aria-disabled="false"]')
    before = boxes()
    assert tops("#prompt") == [0] and page.locator(".asked .more").is_visible()
    page.click("[data-view=written]")  # after a click on a button, space still scrolls
    page.keyboard.press("Space")
    page.keyboard.press("ArrowDown")
    at, = tops("#prompt")
    assert at > 100
    page.keyboard.press("ArrowUp")
    assert tops("#prompt")[0] == at - 60
    while page.locator(".asked .more").is_visible():
        page.keyboard.press("PageDown")
    text = "#sides .text" if page.locator(".text").first.text_content() != "short" else "#sides .side:nth-child(2) .text"
    assert tops(text) == [0]
    page.keyboard.press("PageDown")  # the prompt has ended, so the responses follow
    assert tops(text)[0] > 100
    page.keyboard.press("Home")
    assert tops("#prompt", text) == [0, 0]
    assert site.answers() == {} and boxes() == before
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")  # too soon, or while the first is being stored: it has a sign and no effect
    page.wait_for_selector("#note:not([hidden])")
    assert page.text_content("#note").startswith(("Too soon", "Not yet"))
    ready(page)
    assert len(site.answers()) == 1 and boxes() == before


def test_an_arrow_that_scrolls_code_is_no_answer(site, person):
    """Whoever uses the keyboard comes to a wide block of code with Tab, and reads on with an arrow."""
    code = f"```\n{'wide = 1; ' * 90}\n```"
    site.put({"a": ("Why?", f"One:\n\n{code}", f"Two:\n\n{code}")})
    page = person("Noa")
    page.wait_for_selector('#actions:not([hidden]) .choose[aria-disabled="false"]')
    while page.evaluate("document.activeElement.tagName") != "PRE":
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    while not page.evaluate("document.activeElement.scrollLeft"):
        assert site.answers() == {}
        page.wait_for_timeout(20)
    assert site.answers() == {} and page.locator(".chosen").count() == 0
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#wait:not([hidden])")
    assert len(site.answers()) == 1


@pytest.mark.parametrize("width, height", [(844, 340), (667, 300), (1280, 400), (320, 256)])
def test_in_a_low_window_every_text_can_be_read_and_every_button_pressed(site, person, width, height):
    """A phone that lies down, and a page at 400 %."""
    long = "\n\n".join(f"Paragraph {n} of a long text." for n in range(30))
    site.put({"a": ("Why?", f"{long} Here the first ends.", f"{long} Here the second ends.")})
    page = person("Noa", viewport={"width": width, "height": height})
    page.wait_for_selector('#actions:not([hidden]) .choose[aria-disabled="false"]')
    for place in page.locator(".side .text p:last-child, #actions button").all():
        place.scroll_into_view_if_needed()
        assert place.evaluate("""place => {
            const {left, right, top, bottom} = place.getBoundingClientRect();
            return place.contains(document.elementFromPoint((left + right) / 2, (top + bottom) / 2));
        }"""), place
    assert page.locator("#task").bounding_box()["height"] > height / 3


def test_guidelines_statistics_and_a_hint_at_a_break(tmp_path, browser):
    (tmp_path / "guide.md").write_text("# How to judge\n\nPrefer what is **right**. <script>owned=1</script>")
    site = Site(tmp_path, "--guidelines", str(tmp_path / "guide.md"))
    site.put(5)
    context = browser.new_context(viewport={"width": 1400, "height": 900})
    page = context.new_page()
    page.clock.install()
    begin(page, site.url, "Oda")
    pair, texts = ready(page)
    assert "<script>owned=1</script>" in page.text_content("#guide") and page.locator("#guide strong").count() == 1
    right = page.locator(".side").nth(1).bounding_box()
    assert right["x"] + right["width"] < page.locator("#guide").bounding_box()["x"]  # beside the task, not above it
    page.keyboard.press("g")
    assert not page.is_visible("#guide")
    for n in range(4):
        page.clock.fast_forward(240_000)
        choose(page, 0, texts)
        if n < 3:
            page.clock.run_for(1000)
            pair, texts = ready(page, after=pair)
    page.locator("#session", has_text="session: 4 in 16 min").wait_for()
    assert "A short break" not in page.text_content("#note")
    for _ in range(9):
        page.clock.fast_forward(240_000)
    pair, texts = ready(page)
    choose(page, 0, texts)
    page.locator("#note", has_text="A short break").wait_for()
    context.close()
    site.stop()


def test_a_personal_link_says_who_somebody_is(tmp_path, browser):
    site = Site(tmp_path, "--annotator", "Ann", "--annotator", "Bob")
    site.put(3)  # one more than they answer: Ann's browser may be gone before it gives her next question back
    urls = [site.url] + [site.process.stdout.readline().split()[-1]]
    seen = []
    for url in (urls[0].strip(), urls[1]):
        context = browser.new_context()
        page = context.new_page()
        page.goto(url)
        pair, texts = ready(page)
        seen.append((page.text_content("#who"), pair))
        page.click("#who")  # a name cannot be changed
        assert page.is_visible("#task")
        choose(page, 0, texts)
        page.locator("#mine", has_text="1").wait_for()
        context.close()
    assert [who for who, _ in seen] == ["Ann", "Bob"]
    assert sorted(site.query("SELECT annotator, pair FROM answers")) == sorted(seen)
    site.stop()


def test_an_adjudicator_sees_who_said_what(tmp_path, browser):
    site = Site(tmp_path, "--annotators-per-pair", "2", "--adjudicator", "Eve")
    site.put(1)
    for who, said, comment in (("Ann", "first", "it is first"), ("Bob", None, "")):
        question = site.ask("next", who)[1]["question"]
        choice = next((side["choice"] for side in question["sides"] if said and side["turns"][0]["text"].startswith(said)),
                      "both bad")
        assert site.ask("answer", who, pair="p00", choice=choice, comment=comment)[0] == 200
    assert site.answers() == {}
    page = browser.new_page()
    begin(page, site.url, "eve")
    texts = ready(page)[1]
    side = next(side for side, text in enumerate(texts) if text.startswith("first"))
    assert page.locator(".side h2").nth(side).text_content().endswith("· Ann (“it is first”)")
    assert page.locator(".side h2 span").nth(1 - side).text_content() == ""
    assert page.locator(".third.hint").text_content().startswith("Both bad") and "disagree" in page.text_content("#note")
    expected = choose(page, 1 - side, texts)
    page.wait_for_selector("#wait:not([hidden])")
    assert site.answers() == {"p00": expected}
    page.close()
    site.stop()


def test_an_adjudicator_who_disagrees_is_asked_again_in_words(tmp_path, browser):
    site = Site(tmp_path, "--annotators-per-pair", "2", "--adjudicator", "Ann")
    site.put(1)
    question = site.ask("next", "Bob")[1]["question"]
    first = next(side["choice"] for side in question["sides"] if side["turns"][0]["text"].startswith("first"))
    site.ask("answer", "Bob", pair="p00", choice=first)
    page = browser.new_page()
    begin(page, site.url, "Ann")
    texts = ready(page)[1]
    other = next(side for side, text in enumerate(texts) if text.startswith("second"))
    choose(page, other, texts)
    page.locator("#note", has_text="disagree").wait_for()
    assert page.locator(".side h2").nth(other).text_content().endswith("· Ann") and site.answers() == {}
    choose(page, other, ready(page)[1])
    page.wait_for_selector("#wait:not([hidden])")
    assert site.answers() == {"p00": -1}
    page.keyboard.press("u")  # only the decision
    page.locator("#note", has_text="disagree").wait_for()
    assert site.answers() == {} and site.query("SELECT COUNT(*) FROM verdicts") == [(2,)]
    page.close()
    site.stop()


def test_a_token_in_the_address_goes_into_a_cookie(tmp_path, browser):
    site = Site(tmp_path, "--token", "secret-0123456789")
    site.put(2)
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
    assert page.goto(site.url.split("?")[0]).status == 401
    begin(page, site.url, "Ida")
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
    page.set_default_timeout(PATIENCE)
    begin(page, site.url, "Kay")
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
