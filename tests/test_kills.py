"""`kill -9` of the run, of the labelling page and of both, at random moments, while a person labels; and of a run inside the
reference pass, an evaluation, the writing of a checkpoint and the final save.

    python -m pytest tests/test_kills.py -m slow               2 kills at random moments, 1 of each kind (as in CI)
    python -m pytest tests/test_kills.py --kills 20 -m slow    20, and 5 of each kind; writes benchmarks/results/kills*.md

No answer is lost, none is given twice, and the run ends with the labels, losses and weights of one that nobody killed.
"""

import http.client
import json
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
import urllib.request
from collections import Counter

import pytest
from helpers import ROOT, assert_same_run, free_port, launcher_environment, prepared_train, wait_until

from runtime import toy

pytest.importorskip("fastapi", reason="the page needs tests/requirements.txt")

pytestmark = pytest.mark.slow
COMMAND = "python -m pytest tests/test_kills.py --kills 20 -m slow"


class Page:
    """tools/label.py in a process that can be killed and started again."""

    def __init__(self, output):
        self.output, self.port, self.process = output, free_port(), None

    def start(self, run):
        wait_until((self.output / "labels.sqlite").exists, run)
        self.process = subprocess.Popen([sys.executable, "tools/label.py", str(self.output), "--port", str(self.port)],
                                        cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)

    def post(self, action, **message):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/ask/{action}", json.dumps({"annotator": "ann", "view": "v", **message}).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as reply:
            return json.load(reply)


class Person(threading.Thread):
    """Labels by the gold reward through the page.

    acknowledged: {pair: response} that the page has confirmed.  limit: how many to label for now. The test raises it after
    each kill, so that the run cannot end before the last one.
    """

    def __init__(self, page):
        super().__init__(daemon=True)
        self.page, self.acknowledged, self.limit, self.done = page, {}, 0, threading.Event()

    def run(self):
        while not self.done.is_set():
            if len(self.acknowledged) >= self.limit:
                time.sleep(0.02)
                continue
            try:
                question = self.page.post("next")["question"]
                if question is None:
                    time.sleep(0.05)
                    continue
                best = max(question["sides"], key=lambda side: toy.gold_reward(side["turns"][0]["text"]))
                self.page.post("answer", pair=question["pair"], choice=best["choice"], seconds=0.1)
                self.acknowledged[question["pair"]] = best["turns"][0]["text"]
            except (OSError, http.client.HTTPException, json.JSONDecodeError):  # the page is dead: come back later
                time.sleep(0.1)


def wait_for_a_random_moment(rng, run, person):
    """Some moments are in the middle of labelling; at others the run may be starting, training or waiting."""
    before = len(person.acknowledged)
    person.limit = before + rng.randint(1, 12)
    if rng.random() < 0.5:
        few = rng.randint(1, person.limit - before)
        wait_until(lambda: len(person.acknowledged) >= before + few, run)
        time.sleep(rng.uniform(0, 0.5))
    else:
        time.sleep(rng.uniform(1, 12))


@pytest.mark.parametrize("processes", [None, 2])
def test_nothing_is_lost_and_nothing_doubled(processes, request, train, tiny, tmp_path):
    kills, rng = request.config.getoption("--kills"), random.Random(processes or 0)
    with open(tmp_path / "train.jsonl", "w") as labelled, open(tmp_path / "unlabelled.jsonl", "w") as unlabelled:
        for n in range(30 * (kills + 1)):
            a, b = toy.write_response(rng), toy.write_response(rng)
            while toy.gold_reward(a) == toy.gold_reward(b):  # a tie has no label
                b = toy.write_response(rng)
            row = {"prompt": f"review of the {toy.PLACES[n % len(toy.PLACES)]} in {rng.choice(toy.CITIES)} :",
                   "response_a": a, "response_b": b}
            unlabelled.write(json.dumps(row) + "\n")
            labelled.write(json.dumps(row | {"label": "a" if toy.gold_reward(a) > toy.gold_reward(b) else "b"}) + "\n")
    keys = dict(max_steps=-1, gamma=0.5, do_eval=False, save_strategy="steps", save_steps=2, save_total_limit=2,
                learning_rate=5e-4, logging_steps=5)
    keys["per_device_train_batch_size"] = 8 // (processes or 1)
    whole = train("whole", processes, dataset_mixer=f"{{{tmp_path}/train.jsonl: 1.0}}", **keys)

    output = tmp_path / "run"
    keys |= dict(output_dir=output, oracle="human", dataset_mixer=f"{{{tmp_path}/unlabelled.jsonl: 1.0}}")
    page, killed = Page(output), []
    run, person = train.start(processes, **keys), Person(page)
    page.start(run)
    person.start()
    try:
        for _ in range(kills):
            wait_for_a_random_moment(rng, run, person)
            victim = rng.choice(["run", "page", "both"])
            for process in [run] * (victim != "page") + [page.process] * (victim != "run"):
                os.killpg(process.pid, signal.SIGKILL)  # with the launcher, its ranks too
                process.wait()
            killed.append((victim, count(output)))
            if victim != "page":
                run = train.start(processes, **keys)
            if victim != "run":
                page.start(run)
        person.limit = math.inf
        out, err = run.communicate(timeout=600 + 60 * kills)
    finally:
        person.done.set()
        person.join()
        for process in (page.process, run):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert run.returncode == 0, out[-2000:] + err[-2000:]

    again = type(whole)(output, out, err, 0)
    ledger = sqlite3.connect(output / "labels.sqlite")
    verdicts = ledger.execute("SELECT pair, COUNT(*) FROM verdicts GROUP BY pair").fetchall()
    lost = set(person.acknowledged) - {pair for pair, _, _ in again.ledger()}
    doubled = [pair for pair, n in verdicts if n > 1]
    assert not lost and not doubled
    assert again.ledger() == whole.ledger() and again.summary()["queries"] == len(again.ledger())
    unlike = {"tokens_per_second", "pseudo_label_accuracy"}  # the data set knows how many are right, the person does not
    rows = [[{k: v for k, v in row.items() if k not in unlike} for row in r.rows()] for r in (whole, again)]
    assert rows[0] == rows[1]
    weights = [r.weights() for r in (whole, again)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    if kills >= 20:
        write_report(killed, again, processes or 1)


# ----------------------------------------------------------------------------------------------------------------------
# Moments of each kind. Code inside the run kills it there, so that a busy machine cannot miss the moment.

DIE = """
    def die():
        os.kill(os.getpid(), signal.SIGKILL)
    """
# The code of a moment, and how many there are of its kind: N is drawn from 1 to that number.
MOMENTS = {
    "in the reference pass": (10, """
        import runtime.launch, runtime.reference as reference
        class Dying(list):
            def __iter__(self):
                for rows in super().__iter__():
                    if at(N):
                        die()
                    yield rows
        score = reference.score
        reference.score = lambda engine, pairs, batches, *more: score(engine, pairs, Dying(batches), *more)
        """),
    "in an evaluation": (5, """
        import adpo
        loss = adpo.preference_loss
        def dying(margin, *args):
            if not margin.requires_grad and at(N):
                die()
            return loss(margin, *args)
        adpo.preference_loss = dying
        """),
    # Each in the second checkpoint that the run writes, so that it comes further from kill to kill: within the file of a
    # rank, before the checksums, before the state, and before the checkpoint gets its name.
    "in the middle of a checkpoint": (4, """
        import runtime.launch, torch
        from runtime import checkpoint
        def save(content, path, save=torch.save):
            save(content, path)
            if N == 1 and at(2):
                os.truncate(path, os.path.getsize(path) // 2)
                die()
        def dying(what, n, call_of_the_second):
            def call(*args):
                if N == n and ".checkpoint" in str(args) and at(call_of_the_second):
                    die()
                return what(*args)
            return call
        torch.save = save
        checkpoint.checksums = dying(checkpoint.checksums, 2, 2)
        checkpoint.replace_text = dying(checkpoint.replace_text, 3, 2)
        os.replace = dying(os.replace, 4, 4)  # each checkpoint replaces its state, then gets its name
        """),
    "in the final save": (4, """
        replace = os.replace
        def dying(source, target):
            if "/.model/" in str(source) and at(N):
                die()
            replace(source, target)
        os.replace = dying
        """)}


@pytest.fixture(scope="module")
def killed_at(request):
    """{moment: kills}, for the report of the long form."""
    kills = {}
    yield kills
    if request.config.getoption("--kills") >= 20 and len(kills) == len(MOMENTS):
        lines = ["# kill -9 at moments of each kind", "", f"    {COMMAND}", "",
                 "Each kill was followed by the same command again. Metrics, labels and final weights are those of a run "
                 "that nobody killed, to the last bit.", "", "| moment | kills |", "| --- | --: |",
                 *(f"| {moment} | {n} |" for moment, n in kills.items()), ""]
        (ROOT / "benchmarks" / "results" / "kills_by_kind.md").write_text("\n".join(lines))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_kind_of_moment_ends_as_if_nobody_had(moment, request, train, tiny, tmp_path, monkeypatch,
                                                                  killed_at):
    config, rng = tmp_path / "run.json", random.Random(moment)  # JSON is YAML
    config.write_text(json.dumps(dict(
        model_name_or_path=f"{tiny}/model", dataset_mixer={f"{tiny}/pairs": 1.0}, gamma=0.2, learning_rate=2e-3,
        warmup_ratio=0, per_device_train_batch_size=8, max_prompt_length=16, max_length=64, max_steps=12, logging_steps=1,
        save_strategy="steps", save_steps=1, save_total_limit=2, eval_strategy="steps", eval_steps=4, num_threads=1)))
    whole = train("whole", config=config)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))  # its own caches; otherwise there would be no reference pass
    count, code = MOMENTS[moment]
    for _ in range(max(1, request.config.getoption("--kills") // len(MOMENTS))):
        script = prepared_train(tmp_path / "dying.py", f"\nN = {rng.randint(1, count)}\n" + textwrap.dedent(DIE)
                                + textwrap.dedent(code))
        run = subprocess.run([sys.executable, script, "--config", config, f"--output_dir={tmp_path}/run"], cwd=ROOT,
                             env=launcher_environment(), text=True, capture_output=True, timeout=600)
        assert run.returncode == -signal.SIGKILL, run.stdout[-2000:] + run.stderr[-2000:]
        killed_at[moment] = killed_at.get(moment, 0) + 1
    again = train("again", config=config, output_dir=tmp_path / "run")
    assert_same_run(again, whole)
    assert len(again.rows()) == 12 and len(again.rows("eval")) == 3


# ----------------------------------------------------------------------------------------------------------------------

def count(output):
    """Answers in the ledger at the moment."""
    if not (output / "labels.sqlite").exists():
        return 0
    return sqlite3.connect(output / "labels.sqlite", timeout=30).execute("SELECT COUNT(*) FROM answers").fetchone()[0]


def write_report(killed, run, processes):
    counts = Counter(victim for victim, _ in killed)
    lines = ["# kill -9 while a person labels" + ("" if processes == 1 else f", {processes} processes"), "",
             f"    {COMMAND}", "",
             f"{len(killed)} kills at random moments: {counts['run']} of the run, {counts['page']} of the page, "
             f"{counts['both']} of both. Each was followed by the same command again.", "",
             f"{len(run.ledger())} answers in the ledger at the end. Answers that the page had acknowledged and that were "
             "lost: 0. Questions answered twice: 0. Labels, metrics and final weights are those of a run that nobody "
             "killed, to the last bit.", "", "| kill | of | answers in the ledger then |", "| --: | --- | --: |",
             *(f"| {n} | {victim} | {answers} |" for n, (victim, answers) in enumerate(killed, 1)), ""]
    name = "kills.md" if processes == 1 else f"kills_{processes}_processes.md"
    (ROOT / "benchmarks" / "results" / name).write_text("\n".join(lines))
