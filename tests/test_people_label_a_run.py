"""A whole run labelled by people in real browsers: `python -m pytest tests/test_people_label_a_run.py -n 0 -m slow`.

Two annotators label at the same time, with keys, skip, undo and a reload in between; one response is hostile. Then the run
ends, and the labels it bought are the rows of the ledger. With one process, and with two that the launcher starts.
"""

import json
import random
import time

import pytest
from helpers import Site, wait_until

from runtime import toy

pytest.importorskip("fastapi", reason="the page needs tests/requirements.txt")

pytestmark = pytest.mark.slow

HOSTILE = " the staff was perfect <img src=x onerror=\"window.owned=1\"><script>window.owned=1</script> ."


def ready(page):
    return page.locator('#actions:not([hidden]) .choose[aria-disabled="false"]').count() == 2


def look(page):
    """(prompt, [left text, right text])."""
    return page.locator("#prompt").text_content(), page.locator(".side .text").all_text_contents()


def choose(page):
    """Press the key of the response with the higher gold reward. Returns its text."""
    texts = look(page)[1]
    side = int(toy.gold_reward(texts[1]) > toy.gold_reward(texts[0]))
    page.keyboard.press(("ArrowLeft", "ArrowRight")[side])
    return texts[side]


@pytest.mark.parametrize("processes", [None, 2])
def test_a_run_is_labelled_by_two_people_in_their_browsers(processes, train, tmp_path, browser):
    rng, best = random.Random(1), {}
    with open(tmp_path / "train.jsonl", "w") as file:
        for n in range(24):
            a, b = HOSTILE if n == 5 else toy.write_response(rng), toy.write_response(rng)
            while toy.gold_reward(a) == toy.gold_reward(b):
                b = toy.write_response(rng)
            best[f"review {n} of the hotel :"] = max(a, b, key=toy.gold_reward)
            file.write(json.dumps({"prompt": f"review {n} of the hotel :", "response_a": a, "response_b": b}) + "\n")
    output = tmp_path / "run"
    run = train.start(processes, output_dir=output, oracle="human", dataset_mixer=f"{{{tmp_path}: 1.0}}", max_steps=3,
                      gamma=100, do_eval=False, per_device_train_batch_size=8 // (processes or 1))
    output.mkdir(exist_ok=True)
    site = Site(output)
    contexts = [browser.new_context() for _ in "ab"]
    pages = [context.new_page() for context in contexts]
    for page, name in zip(pages, ("Ann", "Bob")):
        page.goto(site.url)
        page.fill("#name", name)
        page.click("text=Begin")
    ann, bob = pages

    wait_until(lambda: ready(ann) and ready(bob))
    assert look(ann) != look(bob)  # each has their own question
    skipped = look(ann)
    ann.keyboard.press("s")
    wait_until(lambda: ready(ann) and look(ann) != skipped)
    undone = look(bob)
    choose(bob)
    wait_until(lambda: ready(bob) and look(bob) != undone)
    bob.keyboard.press("u")
    wait_until(lambda: ready(bob) and look(bob) == undone)
    before = look(ann)
    ann.reload()
    wait_until(lambda: ready(ann))
    assert look(ann)[0] == before[0]

    deadline, shown = time.monotonic() + 600, [None, None]  # the deadline only guards against hanging
    while run.poll() is None and time.monotonic() < deadline:
        for n, page in enumerate(pages):
            if ready(page) and (now := look(page)) != shown[n]:
                shown[n] = now
                choose(page)
        time.sleep(0.02)
    out, err = run.communicate(timeout=600)
    assert run.returncode == 0, out[-2000:] + err[-2000:]
    assert all(page.evaluate("window.owned") is None for page in pages)
    for context in contexts:
        context.close()

    summary = json.loads((output / "summary.json").read_text())
    assert summary["queries"] == 24 == site.query("SELECT COUNT(*) FROM answers")[0][0]
    assert site.query("SELECT COUNT(*), COUNT(DISTINCT pair) FROM verdicts") == [(24, 24)]  # the undone one is gone
    assert {name for name, in site.query("SELECT DISTINCT annotator FROM answers")} == {"Ann", "Bob"}
    for prompt, first, second, label in site.query(
            "SELECT prompt, first, second, label FROM questions JOIN answers USING (pair)"):
        assert json.loads(first if label == 1 else second) == best[json.loads(prompt)]
    site.stop()
