"""tools/label.py in a real browser: `python -m pytest tests/test_label_browser.py -n 0 -m slow`.

The browser is Debian's (`apt-get install chromium`), driven by Playwright for Python. Without either, these tests are
skipped.
"""

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
        page.goto(server.url)
        page.fill("#name", name)
        page.click("text=Begin")
        return page

    yield come
    for context in contexts:
        context.close()
    assert errors == []


def ready(page, after=None):
    """(pair, [left text, right text]) of the made-up question that the page shows, as soon as it takes a choice."""
    if after:
        page.locator("#prompt .content", has_not_text=after).wait_for()
    page.wait_for_selector('#task:not([hidden]) .choose[aria-disabled="false"]')
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
    lease = "SELECT annotator, until FROM leases"
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
    # Long texts scroll inside their cards, and the buttons stay in view on a small phone.
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    assert page.locator(".choose").nth(0).bounding_box()["y"] < 600
    assert page.evaluate("[...document.querySelectorAll('.text')].some(t => t.scrollHeight > t.clientHeight + 99)")


def test_a_token_in_the_address_goes_into_a_cookie(tmp_path, browser):
    site = Site(tmp_path, "--token", "secret-0123456789")
    site.put(2)
    context = browser.new_context()
    page = context.new_page()
    page.set_default_timeout(PATIENCE)
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
    page.set_default_timeout(PATIENCE)
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
