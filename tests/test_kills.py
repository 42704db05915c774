"""`kill -9` of the run, of the labelling page and of both, at random moments, while a person labels; and of a run in the
reference pass, in an evaluation, in the middle of writing a checkpoint, and in the final save.

    python -m pytest tests/test_kills.py               2 kills at random moments, 1 of each kind (what CI runs)
    python -m pytest tests/test_kills.py --kills 20    20 kills, 5 of each kind; writes benchmarks/results/kills*.md

No answer is lost, none is given twice, and the run ends with the labels, losses and weights of one that nobody killed.
"""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter

import pytest
from conftest import ROOT, free_port

from runtime import toy

pytest.importorskip("fastapi", reason="the page needs requirements-extra.txt")


class Page:
    """tools/label.py as a process that can be killed and started again."""

    def __init__(self, output):
        self.output, self.port, self.process = output, free_port(), None

    def start(self):
        while not (self.output / "labels.sqlite").exists():
            time.sleep(0.1)
        self.process = subprocess.Popen([sys.executable, "tools/label.py", str(self.output), "--port", str(self.port)],
                                        cwd=ROOT, stdout=subprocess.DEVNULL, start_new_session=True)

    def post(self, action, **message):
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/ask/{action}", json.dumps({"annotator": "ann", "view": "v", **message}).encode(),
            {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=5) as reply:
            return json.load(reply)


class Person(threading.Thread):
    """Labels by the gold reward through the page. `acknowledged`: what the page has said it took."""

    def __init__(self, page, pause):
        super().__init__(daemon=True)
        self.page, self.pause, self.acknowledged, self.done = page, pause, {}, threading.Event()

    def run(self):
        while not self.done.is_set():
            try:
                question = self.page.post("next")["question"]
                if question is None:
                    time.sleep(0.05)
                    continue
                best = max(question["sides"], key=lambda side: toy.gold_reward(side["turns"][0]["content"]))
                self.page.post("answer", pair=question["pair"], choice=best["choice"], seconds=0.1)
                self.acknowledged[question["pair"]] = best["turns"][0]["content"]
                time.sleep(self.pause)
            except (OSError, urllib.error.URLError, json.JSONDecodeError):  # the page is dead: come back
                time.sleep(0.1)


@pytest.mark.parametrize("processes", [None, 2])
def test_nothing_is_lost_and_nothing_doubled(processes, request, train, tiny, tmp_path):
    kills, rng = request.config.getoption("--kills"), random.Random(processes or 0)
    with open(tmp_path / "train.jsonl", "w") as labelled, open(tmp_path / "unlabelled.jsonl", "w") as unlabelled:
        for n in range(30 * (kills + 1)):
            a, b = toy.write_response(rng), toy.write_response(rng)
            while toy.gold_reward(a) == toy.gold_reward(b):  # a tie has no label of its own
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
    run = train.start(processes, **keys)
    page.start()
    person = Person(page, pause=0.1 if kills < 10 else 0.35)  # slow enough that all the kills come before the end
    person.start()
    try:
        for _ in range(kills):
            time.sleep(rng.uniform(1, 12))
            if run.poll() is not None:
                break
            victim = rng.choice(["run", "page", "both"])
            for process in [run] * (victim != "page") + [page.process] * (victim != "run"):
                os.killpg(process.pid, signal.SIGKILL)  # with the launcher, its ranks too
                process.wait()
            killed.append((victim, count(output)))
            if victim != "run":
                page.start()
            if victim != "page":
                run = train.start(processes, **keys)
        out, err = run.communicate(timeout=120 + 10 * kills)
    finally:
        person.done.set()
        person.join()
        for process in (page.process, run):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    assert run.returncode == 0, out[-2000:] + err[-2000:]
    assert len(killed) == kills

    again = type(whole)(output, out, err, 0)
    ledger = sqlite3.connect(output / "labels.sqlite")
    verdicts = ledger.execute("SELECT pair, COUNT(*) FROM verdicts GROUP BY pair").fetchall()
    lost = set(person.acknowledged) - {pair for pair, _, _ in again.ledger()}
    doubled = [pair for pair, n in verdicts if n > 1]
    assert not lost and not doubled
    assert again.ledger() == whole.ledger() and again.summary()["queries"] == len(again.ledger())
    unlike = {"tokens_per_second", "pseudo_label_accuracy"}  # the data set knows how right they are, the person does not
    rows = [[{k: v for k, v in row.items() if k not in unlike} for row in r.rows()] for r in (whole, again)]
    assert rows[0] == rows[1]
    weights = [r.weights() for r in (whole, again)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    if kills >= 20:
        write_report(killed, again, processes or 1)


# ----------------------------------------------------------------------------------------------------------------------
# Kinds of moments, seen by what the run has on disk and in its output

def in_the_reference_pass(output, log, home):
    return "reference log-probs (train)" in log.read_text() and not list(home.glob("adpo/reference-*.safetensors"))


def in_an_evaluation(output, log, home):
    """The row of step 4, 8, … is written, that of its evaluation is not."""
    path = output / "metrics.jsonl"
    last = path.read_text().splitlines()[-1:] if path.exists() else []
    row = json.loads(last[0]) if last and last[0].endswith("}") else {"split": None}
    return row["split"] == "train" and row["step"] % 4 == 0


def in_the_middle_of_a_checkpoint(output, log, home):
    """Not that of the start: the run is to come further from kill to kill."""
    try:
        parts = list(output.glob(".checkpoint/checkpoint-*/rank-*.pt"))
    except FileNotFoundError:  # the folder was put in its place while it was looked into
        return False
    return bool(parts) and bool(list(output.glob("checkpoint-*")))


def in_the_final_save(output, log, home):
    return (output / ".model").exists()


MOMENTS = [in_the_reference_pass, in_an_evaluation, in_the_middle_of_a_checkpoint, in_the_final_save]


def kill_at(moment, process):
    """`kill -9` when the moment has come; the run is held while that is made sure of, so that it cannot be over. Returns
    whether it came: on a busy machine a run may be through before it is looked at."""
    deadline = time.monotonic() + 240
    while process.poll() is None:
        assert time.monotonic() < deadline, moment
        if moment():
            os.killpg(process.pid, signal.SIGSTOP)
            time.sleep(0.02)
            if moment():
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return True
            os.killpg(process.pid, signal.SIGCONT)
    assert process.returncode == 0, moment
    return False


@pytest.fixture(scope="module")
def killed_at(request):
    """{moment: kills}, for the report of the long form."""
    kills = {}
    yield kills
    if request.config.getoption("--kills") >= 20 and len(kills) == len(MOMENTS):
        lines = ["# kill -9 at moments of each kind", "", "    python -m pytest tests/test_kills.py --kills 20", "",
                 "Each kill was followed by the same command again. Metrics, labels and final weights are those of a run "
                 "that nobody killed, to the last bit.", "", "| moment | kills |", "| --- | --: |",
                 *(f"| {moment.__name__.replace('_', ' ')} | {n} |" for moment, n in kills.items()), ""]
        (ROOT / "benchmarks" / "results" / "kills_by_kind.md").write_text("\n".join(lines))


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_kind_of_moment_ends_as_if_nobody_had(moment, request, train, tmp_path, monkeypatch, killed_at):
    keys = dict(max_steps=12, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=4, save_total_limit=2)
    whole = train("whole", **keys)
    output, log, home = tmp_path / "run", tmp_path / "log", tmp_path / "home"
    monkeypatch.setenv("HF_HOME", str(home))  # a cache of its own, or there would be no reference pass
    for _ in range(max(1, request.config.getoption("--kills") // len(MOMENTS))):
        for _ in range(5):
            with open(log, "w") as file:
                run = train.start(stderr=file, output_dir=output, **keys)
            came = kill_at(lambda: moment(output, log, home), run)
            run.communicate()
            if came:
                break
            for folder in (output, home):  # or there is nothing left to be killed at
                shutil.rmtree(folder)
        assert came, moment
        killed_at[moment] = killed_at.get(moment, 0) + 1
    again = train("again", output_dir=output, **keys)
    assert again.ledger() == whole.ledger()
    rows = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in r.rows() + r.rows("eval")]
            for r in (whole, again)]
    assert rows[0] == rows[1] and len(rows[0]) == 12 + 3
    weights = [r.weights() for r in (whole, again)]
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


# ----------------------------------------------------------------------------------------------------------------------

def count(output):
    """Answers in the ledger at the moment."""
    if not (output / "labels.sqlite").exists():
        return 0
    return sqlite3.connect(output / "labels.sqlite", timeout=30).execute("SELECT COUNT(*) FROM answers").fetchone()[0]


def write_report(killed, run, processes):
    counts = Counter(victim for victim, _ in killed)
    lines = ["# kill -9 while a person labels" + ("" if processes == 1 else f", {processes} processes"), "",
             "    python -m pytest tests/test_kills.py --kills 20", "",
             f"{len(killed)} kills at random moments: {counts['run']} of the run, {counts['page']} of the page, "
             f"{counts['both']} of both. Each was followed by the same command again.", "",
             f"{len(run.ledger())} answers in the ledger at the end. Answers that the page had acknowledged and that were "
             "lost: 0. Questions answered twice: 0. Labels, metrics and final weights are those of a run that nobody "
             "killed, to the last bit.", "", "| kill | of | answers in the ledger then |", "| --: | --- | --: |",
             *(f"| {n} | {victim} | {answers} |" for n, (victim, answers) in enumerate(killed, 1)), ""]
    name = "kills.md" if processes == 1 else f"kills_{processes}_processes.md"
    (ROOT / "benchmarks" / "results" / name).write_text("\n".join(lines))
