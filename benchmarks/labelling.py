"""Fifty people at the labelling page: a live run that is labelled while the page is killed, and 10,000 labels in a row.

    python benchmarks/labelling.py [--before OTHER_CHECKOUT]      two minutes on two cores; --before may take twenty
    python benchmarks/labelling.py --people N --labels N --outputs DIR --results FILE

The people are threads of one process. Each keeps one connection to the page (tools/label.py in a process of its own) and
sends what the page's script would send, and if no reply comes, it sends the same request again.

1. A live run (the built-in task without labels, --oracle human) asks 64 questions a step, two people answer each
   (--annotators-per-pair 2), and the page is killed with SIGKILL twice and started again. People think for 0.2 to 1 s, which
   is far less than real ones. Afterwards every opinion that was acknowledged has to be in the ledger once, every question
   must have two of two different people, and every label must be what the opinions say.
2. 10,000 labels without a pause for thought, for as many questions that are open at once: the latency of a request at the
   beginning and at the end, and what a run would wait for the ledger meanwhile.
3. Rows a second of the ledger: a run's commits of 64 labels, and people's answers.

--before measures 2 and 3 with another checkout too. Writes benchmarks/results/labelling.md, which also gives the load of the
machine, because the page shares its cores with fifty annotators and a training run.
"""

import argparse
import collections
import http.client
import json
import math
import os
import platform
import random
import shutil
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: with --measure, another checkout comes first


class Page:
    """tools/label.py of a checkout in a process of its own, on one port from beginning to end."""

    def __init__(self, checkout, folder, *flags):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self.port = probe.getsockname()[1]
        self.command = [sys.executable, "tools/label.py", str(folder), "--port", str(self.port), *flags]
        self.checkout = checkout
        self.start()

    def start(self):
        self.process = subprocess.Popen(self.command, cwd=self.checkout, stdout=subprocess.PIPE, text=True)
        assert "http://" in self.process.stdout.readline()

    def kill(self):
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class Person(threading.Thread):
    """Answers whatever the page asks, at random, until told to stop. think: seconds before an answer, drawn between these.

    took: (seconds of a request, when it ended), of requests that came through at once.  given: {pair: choice} that the page
    has acknowledged.  again: requests that had to be sent more than once.
    """

    def __init__(self, page, name, think, seed):
        super().__init__(daemon=True)
        self.page, self.name, self.think, self.rng = page, name, think, random.Random(seed)
        self.took, self.given, self.again, self.refused, self.sides = [], {}, 0, 0, []
        self.link, self.done = None, threading.Event()

    def post(self, action, **message):
        """(status, reply), sent again until there is one."""
        body = json.dumps({"annotator": self.name, "view": self.name, **message})
        for attempt in range(10**6):
            start = time.perf_counter()
            try:
                self.link = self.link or http.client.HTTPConnection("127.0.0.1", self.page.port, timeout=60)
                self.link.request("POST", f"/ask/{action}", body, {"Content-Type": "application/json"})
                response = self.link.getresponse()
                reply = json.loads(response.read())
                if response.status < 500:
                    if not attempt:
                        self.took.append((time.perf_counter() - start, time.perf_counter()))
                    return response.status, reply
            except (OSError, http.client.HTTPException):
                self.link = None
            self.again += 1
            time.sleep(0.2)

    def run(self):
        _, reply = self.post("next")
        while not self.done.is_set():
            question = reply.get("question")
            if question is None:
                time.sleep(0.5 if self.think[1] else 0.02)
                _, reply = self.post("next")
                continue
            time.sleep(self.rng.uniform(*self.think))
            side = self.rng.randrange(2)
            choice = question["sides"][side]["choice"]
            status, reply = self.post("answer", pair=question["pair"], choice=choice, seconds=0.1)
            if status == 200:
                assert question["pair"] not in self.given
                self.given[question["pair"]] = choice
                self.sides.append(min(question["sides"], key=lambda side: side["choice"]) is question["sides"][0])
            else:
                self.refused += 1
                _, reply = self.post("next")


def people_at(page, count, think):
    people = [Person(page, f"person {n:02}", think, n) for n in range(count)]
    for person in people:
        person.start()
    return people


def stop(people):
    for person in people:
        person.done.set()
    for person in people:
        person.join()


def percentiles(times):
    """(p50, p95) in milliseconds."""
    cuts = statistics.quantiles(times, n=20)
    return 1000 * cuts[9], 1000 * cuts[18]


# ----------------------------------------------------------------------------------------------------------------------
# 1. A live run

def start_run(folder, steps):
    """A run of the built-in task whose pairs have no labels."""
    from runtime import toy
    rng = random.Random(0)
    (folder / "data").mkdir()
    with open(folder / "data" / "train.jsonl", "w") as file:
        for n in range(64 * steps):
            file.write(json.dumps({"prompt": f"review {n} of the {rng.choice(toy.PLACES)} :",
                                   "response_a": toy.write_response(rng), "response_b": toy.write_response(rng)}) + "\n")
    return subprocess.Popen(
        [sys.executable, "train.py", "--config", "configs/quickstart.yaml", "--oracle", "human", "--gamma", "1000",
         "--dataset_mixer", f"{{{folder}/data: 1.0}}", "--dataset_splits", "train", "--do_eval", "false", "--eval_strategy",
         "no", "--eval_on_start", "false", "--toy_label_noise", "0", "--output_dir", str(folder / "run")], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def live_run(folder, count, steps, opinions=2, kills=2):
    """What happened, as {what: number}; raises AssertionError where an opinion is lost, doubled or turned round."""
    run = start_run(folder, steps)
    ledger = folder / "run" / "labels.sqlite"
    while not ledger.exists():
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    page = Page(ROOT, folder / "run", "--annotators-per-pair", str(opinions))
    people = people_at(page, count, (0.2, 1.0))
    start = time.perf_counter()
    for kill in range(1, kills + 1):
        while sum(len(person.given) for person in people) < opinions * 64 * steps * kill / (kills + 1):
            time.sleep(0.05)
        page.kill()
        time.sleep(1)
        page.start()
    out, _ = run.communicate(timeout=3600)
    seconds = time.perf_counter() - start
    stop(people)
    page.kill()
    assert run.returncode == 0, out[-3000:]
    return {"steps": steps, "questions": 64 * steps, "seconds": seconds, **check(ledger, people, opinions)}


def check(path, people, opinions):
    """Compare what people sent with what the ledger has."""
    from tools.label import digest
    db = sqlite3.connect(path)
    questions = {pair: {digest(first): 1, digest(second): -1} for pair, first, second in
                 db.execute("SELECT pair, first, second FROM questions")}
    sent = {(pair, person.name): questions[pair][choice] for person in people for pair, choice in person.given.items()}
    kept = db.execute("SELECT pair, annotator, verdict FROM verdicts").fetchall()
    assert len(kept) == len({row[:2] for row in kept}), "an opinion is there twice"
    assert {row[:2]: row[2] for row in kept} == sent, "an opinion is lost, or turned round"
    votes = collections.defaultdict(list)
    for (pair, _), label in sent.items():
        votes[pair].append(label)
    assert set(votes) == set(questions) and all(len(found) == opinions for found in votes.values())
    labels = dict(db.execute("SELECT pair, label FROM answers"))
    assert labels == {pair: 1 if sum(found) > 0 else -1 if sum(found) < 0 else 0 for pair, found in votes.items()}
    each = [len(person.given) for person in people]
    left = sum(sum(person.sides) for person in people)
    expected = math.sqrt(sum(each)) / 2
    return {"opinions": len(kept), "labels": len(labels),
            "without a preference": sum(not label for label in labels.values()),
            "fewest of one person": min(each), "most of one person": max(each), "left": left / sum(each),
            "left z": (left - sum(each) / 2) / expected, "sent again": sum(person.again for person in people),
            "refused": sum(person.refused for person in people), "requests": sum(len(person.took) for person in people),
            "p50": percentiles([took for person in people for took, _ in person.took])[0],
            "p95": percentiles([took for person in people for took, _ in person.took])[1]}


# ----------------------------------------------------------------------------------------------------------------------
# 2. Many labels in a row. This part and the next also run in other checkouts, so they use only what all of these have.

def fill(path, count):
    from labels.ledger import Ledger, Question
    ledger = Ledger(path)
    text = [json.dumps(f"{what} {'some words of a response ' * 40}") for what in ("prompt", "first", "second")]
    pairs = [f"{n:032x}" for n in range(count)]
    ledger.put_questions([Question(pair, 0.1, n // 64) for n, pair in enumerate(pairs)],
                         {pair: (text[0], text[1], text[2]) for pair in pairs})
    ledger.close()


def in_a_row(checkout, folder, count, labels):
    """Latencies in the first and last tenth of the labels, and how long a run's look at the ledger takes meanwhile."""
    from labels.ledger import Ledger
    fill(folder / "labels.sqlite", labels)
    page = Page(checkout, folder)
    ledger = Ledger(folder / "labels.sqlite")
    people = people_at(page, count, (0, 0))
    start, looks = time.perf_counter(), []
    asked = [f"{n:032x}" for n in range(labels - 64, labels)]
    while (done := sum(len(person.given) for person in people)) < labels:
        before = time.perf_counter()
        ledger.unanswered(asked)
        looks.append(time.perf_counter() - before)
        time.sleep(0.1)
        assert any(person.is_alive() for person in people), done
    seconds = time.perf_counter() - start
    stop(people)
    page.kill()
    took = sorted((ended, took) for person in people for took, ended in person.took if ended - start < seconds)
    tenth = len(took) // 10
    first, last = ([took for _, took in part] for part in (took[:tenth], took[-tenth:]))
    assert ledger.count() == labels == sum(len(person.given) for person in people)
    ledger.close()
    return {"labels": labels, "seconds": seconds, "first": percentiles(first), "last": percentiles(last),
            "all": percentiles([took for _, took in took]), "looks": percentiles(looks),
            "refused": sum(person.refused for person in people)}


# 3. Rows a second.

def rows(folder):
    from labels.ledger import Ledger, Question
    ledger = Ledger(folder / "labels.sqlite")
    found = {}
    for size in (64, 128):
        best = 0
        for turn in range(3):
            batches = [[(Question(os.urandom(16).hex(), 0.1, n), 1, "", None, None) for _ in range(size)]
                       for n in range(300)]
            start = time.perf_counter()
            for batch in batches:
                ledger.add("dataset", batch)
            best = max(best, 300 * size / (time.perf_counter() - start))
        found[f"commits of {size} labels"] = best
    fill(folder / "labels.sqlite", 3000)
    best = 0
    for turn in range(3):
        start = time.perf_counter()
        for n in range(1000 * turn, 1000 * turn + 1000):
            ledger.answer_question(f"{n:032x}", 1, "ann", 1.0)
        best = max(best, 1000 / (time.perf_counter() - start))
    found["answers of people, one commit each"] = best
    ledger.close()
    return found


def measured(checkout, what, outputs, options):
    """Part 2 or 3 in a process of its own, whose modules are those of the checkout."""
    folder = Path(tempfile.mkdtemp(dir=outputs))
    script = (f"import runpy, sys; sys.path.insert(0, {str(checkout)!r}); sys.argv = sys.argv[1:]\n"
              f"runpy.run_path({__file__!r}, run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", script, "labelling.py", "--measure", what, "--outputs", str(folder),
                           "--before", str(checkout), "--people", str(options.people), "--labels", str(options.labels)],
                          stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# ----------------------------------------------------------------------------------------------------------------------
# The results

def write(options, live, checkouts, flags):
    def ms(pair):
        return f"{pair[0]:,.0f} / {pair[1]:,.0f}"
    lines = [
        "# Fifty people at the labelling page", "",
        f"Made by `python benchmarks/labelling.py{flags}` on {os.cpu_count()} cores ({platform.machine()}), "
        f"Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}; the annotators, the page and the run share "
        f"them. Load of the machine at the end: {os.getloadavg()[1]:.1f}.", "",
        "## A live run, two opinions a pair, the page killed twice", "",
        f"{options.people} people answered {live['questions']:,} questions of {live['steps']} optimiser steps in "
        f"{live['seconds']:,.0f} s. Every opinion that the page had acknowledged was in the ledger once "
        f"({live['opinions']:,} opinions); every question had two, of different people; every label was what the opinions "
        f"say ({live['labels']:,} labels, {live['without a preference']:,} of them without a preference, because the two "
        "disagreed, as people who choose at random do half of the time). The run ended by itself.", "",
        "| | |", "| --- | --: |", f"| a request, p50 / p95 | {live['p50']:,.0f} / {live['p95']:,.0f} ms |",
        f"| requests | {live['requests']:,} |", f"| sent again, because the page was down | {live['sent again']:,} |",
        f"| answers refused | {live['refused']:,} |",
        f"| opinions of one person, fewest and most | {live['fewest of one person']:,} and {live['most of one person']:,} |",
        f"| one and the same response was on the left | {live['left']:.1%}, {live['left z']:+.1f} standard deviations |",
        "", f"## {options.labels:,} labels without a pause for thought", "",
        "As many questions are open at once, and every person answers at once: the page is always busy, so a request waits "
        f"for those of the {options.people - 1} others. Milliseconds, p50 / p95.", "",
        "| | labels a second | first tenth | last tenth | all requests | a run's look at the ledger | refused |",
        "| --- | --: | --: | --: | --: | --: | --: |"]
    lines += [f"| {name} | {row['labels'] / row['seconds']:,.0f} | {ms(row['first'])} | {ms(row['last'])} | "
              f"{ms(row['all'])} | {row['looks'][0]:,.1f} / {row['looks'][1]:,.1f} | {row['refused']:,} |"
              for name, (row, _) in checkouts.items()]
    kinds = list(next(iter(checkouts.values()))[1])
    lines += ["", "## The ledger, rows a second (the best of three)", "", "| | " + " | ".join(kinds) + " |",
              "| --- |" + " --: |" * len(kinds)]
    lines += [f"| {name} | " + " | ".join(f"{found[kind]:,.0f}" for kind in kinds) + " |"
              for name, (_, found) in checkouts.items()]
    options.results.write_text("\n".join(lines) + "\n")
    print(options.results.read_text())


def main(options):
    options.outputs.mkdir(parents=True, exist_ok=True)
    if options.measure:
        work = {"row": lambda: in_a_row(options.before, options.outputs, options.people, options.labels),
                "rows": lambda: rows(options.outputs)}
        print(json.dumps(work[options.measure]()))
        return
    folder = Path(tempfile.mkdtemp(dir=options.outputs))
    live = live_run(folder, options.people, options.steps)
    print(json.dumps(live), flush=True)
    checkouts = {}
    for name, checkout in (("before", options.before), ("now", ROOT)):
        if checkout:
            checkouts[name] = [measured(checkout, what, folder, options) for what in ("row", "rows")]
            print(name, json.dumps(checkouts[name]), flush=True)
    shutil.rmtree(folder)
    flags = "".join(f" --{name} {getattr(options, name)}" for name in ("people", "labels", "steps")
                    if getattr(options, name) != parser.get_default(name))
    flags += " --before OTHER_CHECKOUT" * bool(options.before)
    write(options, live, checkouts, flags)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--people", type=int, default=50)
    parser.add_argument("--labels", type=int, default=10_000)
    parser.add_argument("--steps", type=int, default=12, help="of the live run")
    parser.add_argument("--before", type=Path, help="another checkout, to compare with")
    parser.add_argument("--outputs", type=Path, default=ROOT / "outputs" / "labelling")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "labelling.md")
    parser.add_argument("--measure", choices=("row", "rows"), help=argparse.SUPPRESS)
    main(parser.parse_args())
