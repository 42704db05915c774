"""Who answers a query, and the ledger that remembers every answer.

    Oracle.answer(ids, margins, ask, step)    what the loop calls; over all ranks together
        annotator.answer(questions, ledger)   who is asked; gets the answers into the ledger, or raises Waiting
        Ledger                                SQLite: one row an answer, unique by pair, committed before it is used

Annotators: DatasetAnnotator (the labels that the data came with) and HumanAnnotator (people, through tools/label.py) here; a
judge model in judge.py. Another one is a class with `name`, `asks_together`, `answer` and `grade`.

A label that is not in the ledger does not exist for the loop: what a run reports as queries is the number of rows there.

Departures from the official code: there, each batch carries its labels and nobody is asked. Departure from the paper: an
answer is remembered, so that in a second epoch no pair is asked twice; a share of the confident pairs can be asked as well
(audit), so that the error of pseudo-labels is known.

Look at a ledger with `python tools/ledger.py OUTPUT_DIR`.
"""

import contextlib
import hashlib
import math
import os
import signal
import sqlite3
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist


class LedgerError(Exception):
    """The ledger cannot be used; the message names its file and says what to do."""


class Waiting(Exception):
    """The annotator has not answered all that it was asked; the message says why. What is answered is in the ledger."""


@dataclass(frozen=True)
class Question:
    """A pair that is to be labelled. margin: the policy's, in units of reward.  step: optimiser step that asks, from 0.
    audit: asked although the policy is confident."""
    pair: str
    margin: float
    step: int
    audit: bool = False


class Ledger:
    """Every question and answer of a run, in SQLite; the run, labelling pages and tools meet here and nowhere else.

    Label 1 means that y1 is preferred, −1 that y2 is. Which response of a pair is y1 follows from its content alone
    (data.canonical), so that a label means the same in every run.
    """

    SCHEMA = """
        CREATE TABLE IF NOT EXISTS answers (
            pair TEXT PRIMARY KEY,                            -- hash of the pair's content; so none is paid for twice
            label INTEGER NOT NULL CHECK (label IN (1, -1)),  -- 1: y1 preferred, -1: y2 preferred
            source TEXT NOT NULL,                             -- dataset, human, judge, reused
            annotator TEXT NOT NULL DEFAULT '',               -- who, within the source
            margin REAL,                                      -- the policy's margin when it asked, in units of reward
            step INTEGER NOT NULL,                            -- optimiser step that asked, from 0; -1: from another run
            audit INTEGER NOT NULL DEFAULT 0,                 -- asked although the policy was confident
            answered_at REAL NOT NULL,                        -- seconds since 1970
            seconds REAL,                                     -- that the annotator took
            cost REAL,                                        -- what it cost, where that is known
            used INTEGER NOT NULL DEFAULT 0                   -- the run has taken it: it cannot be taken back
        ) WITHOUT ROWID;
        DROP INDEX IF EXISTS answers_by_step;                 -- of version 1
        CREATE INDEX IF NOT EXISTS audits ON answers (step, margin, label, audit) WHERE audit;
        CREATE TABLE IF NOT EXISTS questions (                -- for people: open where there is no answer of the pair
            pair TEXT PRIMARY KEY,
            prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL,  -- JSON: a string or a list of messages
            margin REAL, step INTEGER NOT NULL, audit INTEGER NOT NULL, asked_at REAL NOT NULL,
            leased_to TEXT, leased_until REAL                 -- who is looking at it, and until when
        ) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS verdicts (                 -- all that was said: both orders of a judge, second opinions
            id INTEGER PRIMARY KEY,
            pair TEXT NOT NULL, annotator TEXT NOT NULL,
            verdict INTEGER NOT NULL CHECK (verdict IN (1, 0, -1)),           -- 0: no preference, or nothing usable
            seconds REAL, cost REAL, detail TEXT, at REAL NOT NULL
        );
        CREATE INDEX IF NOT EXISTS verdicts_by_pair ON verdicts (pair);
    """

    # What is counted at every step, so that nobody has to read a million rows for it. Kept by triggers, for whichever
    # process writes; the statements behind them count a ledger of version 1 anew.
    TOTALS = """
        CREATE TABLE IF NOT EXISTS totals (step INTEGER PRIMARY KEY, answers INTEGER NOT NULL, unpriced INTEGER NOT NULL);
        CREATE TRIGGER IF NOT EXISTS answer_counted AFTER INSERT ON answers WHEN NEW.step >= 0 BEGIN
            INSERT INTO totals VALUES (NEW.step, 1, NEW.cost IS NULL)
                ON CONFLICT (step) DO UPDATE SET answers = answers + 1, unpriced = unpriced + excluded.unpriced;
        END;
        CREATE TRIGGER IF NOT EXISTS answer_uncounted AFTER DELETE ON answers WHEN OLD.step >= 0 BEGIN
            UPDATE totals SET answers = answers - 1, unpriced = unpriced - (OLD.cost IS NULL) WHERE step = OLD.step;
        END;
        INSERT OR REPLACE INTO totals SELECT step, COUNT(*), SUM(cost IS NULL) FROM answers WHERE step >= 0 GROUP BY step;

        CREATE TABLE IF NOT EXISTS money (id INTEGER PRIMARY KEY CHECK (id = 1), spent REAL NOT NULL);
        CREATE VIEW IF NOT EXISTS own_costs AS                -- of answers whose cost is not that of verdicts
            SELECT pair, cost FROM answers WHERE step >= 0 AND cost IS NOT NULL
            AND NOT EXISTS (SELECT 1 FROM verdicts WHERE verdicts.pair = answers.pair);
        CREATE TRIGGER IF NOT EXISTS answer_paid AFTER INSERT ON answers WHEN NEW.cost IS NOT NULL BEGIN
            UPDATE money SET spent = spent + (SELECT TOTAL(cost) FROM own_costs WHERE pair = NEW.pair);
        END;
        CREATE TRIGGER IF NOT EXISTS answer_refunded BEFORE DELETE ON answers WHEN OLD.cost IS NOT NULL BEGIN
            UPDATE money SET spent = spent - (SELECT TOTAL(cost) FROM own_costs WHERE pair = OLD.pair);
        END;
        CREATE TRIGGER IF NOT EXISTS verdict_paid BEFORE INSERT ON verdicts BEGIN
            UPDATE money SET spent = spent + COALESCE(NEW.cost, 0)
                - (SELECT TOTAL(cost) FROM own_costs WHERE pair = NEW.pair);
        END;
        CREATE TRIGGER IF NOT EXISTS verdict_refunded AFTER DELETE ON verdicts BEGIN
            UPDATE money SET spent = spent - COALESCE(OLD.cost, 0)
                + (SELECT TOTAL(cost) FROM own_costs WHERE pair = OLD.pair);
        END;
        INSERT OR REPLACE INTO money SELECT 1, (SELECT TOTAL(cost) FROM verdicts) + (SELECT TOTAL(cost) FROM own_costs);
    """

    VERSION = 2  # of the schema; 1 had no totals

    def __init__(self, path, timeout=60):
        """path: the file, made where there is none.  timeout: seconds to wait for another process that holds it."""
        self.path = path
        try:
            self.db = sqlite3.connect(path, timeout=timeout, isolation_level=None)  # transactions are written out below
            version = self.db.execute("PRAGMA user_version").fetchone()[0]
            tables = {name for name, in self.db.execute("SELECT name FROM sqlite_master")}
            if tables and (version not in (1, self.VERSION) or not tables >= {"answers", "questions", "verdicts"}):
                raise LedgerError(f"{path}: not a ledger of this version ({version}, not {self.VERSION}): move it away")
            self.db.execute("PRAGMA synchronous = FULL")  # a committed answer survives a power cut
            self.db.execute("PRAGMA cache_size = -100000")  # 100 MB at most: a pair's id is a hash, and may be on any page
            if version != self.VERSION:  # made, or brought up to date; a second process that does so too changes nothing
                self._keep_trying("PRAGMA journal_mode = WAL", timeout)  # others may read and write while a run is on
                self.db.executescript(f"BEGIN IMMEDIATE; {self.SCHEMA} {self.TOTALS} PRAGMA user_version = {self.VERSION}; "
                                      "COMMIT;")
        except sqlite3.Error as error:
            raise LedgerError(in_words(path, error))

    def _keep_trying(self, statement, seconds):
        """SQLite does not wait for another process when it changes the journal's mode, as two that make a ledger do."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                return self.db.execute(statement)
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
                time.sleep(0.02)

    @contextlib.contextmanager
    def transaction(self):
        """All or none of what is done inside; joins one that is open. Takes the write lock at once, so that what is read
        inside still holds when it is written."""
        if self.db.in_transaction:
            yield
            return
        try:  # Ctrl-C may come behind any of the three
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # on a full disk SQLite has rolled back already
                self.db.execute("ROLLBACK")
            raise

    # For the run.

    def take(self, ids):
        """{pair id: label} of those of the ids that have an answer; from now on these answers cannot be taken back."""
        found = {}
        for some, marks in portions(ids):
            with self.transaction():
                found.update(self.db.execute(f"SELECT pair, label FROM answers WHERE pair IN ({marks})", some))
                self.db.execute(f"UPDATE answers SET used = 1 WHERE used = 0 AND pair IN ({marks})", some)
        return found

    def unanswered(self, ids, before=2**62):
        """Those of the ids that have no answer (to a question of a step before `before`), in order. Unlike `take` it leaves
        the answers free to be taken back."""
        answered = set()
        for some, marks in portions(ids):
            answered.update(pair for pair, in self.db.execute(
                f"SELECT pair FROM answers WHERE step < ? AND pair IN ({marks})", (before, *some)))
        return [id for id in ids if id not in answered]

    def add(self, source, labelled, used=False):
        """Commit answers: (Question, label, annotator, seconds, cost) each. Where a pair has one already, that stands.
        used: whether they count as taken at once, which spares `take` a second commit. Returns how many were new."""
        now = time.time()
        rows = [(q.pair, label, source, annotator, q.margin, q.step, q.audit, now, seconds, cost, used)
                for q, label, annotator, seconds, cost in labelled]
        with self.transaction():
            return self.db.executemany(
                "INSERT INTO answers (pair, label, source, annotator, margin, step, audit, answered_at, seconds, cost, "
                "used) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (pair) DO NOTHING", rows).rowcount

    def check_pairs(self, ids):
        """(answers that came from other runs by `tools/ledger.py --reuse`, how many of them are of these pairs).

        ids: all pairs that the run can ask for.  Raises LedgerError where an answer that was bought here is of none of them:
        then the ledger is that of a run on other data, and counts of it would say nothing.
        """
        ids = set(ids)
        bought, reused = ([pair for pair, in self.db.execute(f"SELECT pair FROM answers WHERE step {here}")]
                          for here in (">= 0", "< 0"))
        foreign = [pair for pair in bought if pair not in ids]
        if foreign:
            raise LedgerError(
                f"{self.path}: {len(foreign):,} of its {len(bought):,} answers are of pairs that this run does not have "
                f"({foreign[0]} is the first): it is the ledger of a run on other data. Choose another output_dir; `python "
                "tools/ledger.py NEW --reuse OLD` takes over the labels of pairs in both")
        return len(reused), len(ids.intersection(reused))

    def count(self, step=None):
        """Answers bought up to and including an optimiser step (or all). Counted by step, not by row, so that a run that
        is resumed from an earlier step reports again what it reported then."""
        return self.db.execute("SELECT COALESCE(SUM(answers), 0) FROM totals WHERE step <= ?",
                               (2**62 if step is None else step,)).fetchone()[0]

    def audits(self, step=None, first=0):
        """[(margin, label)] of the audited pairs from optimiser step `first` up to and including `step` (or all)."""
        return self.db.execute("SELECT margin, label FROM answers WHERE audit AND step BETWEEN ? AND ?",
                               (first, 2**62 if step is None else step)).fetchall()

    def labels(self, first, last, ids=None):
        """[(pair, label, margin, step, audit)] of the answers to questions of the optimiser steps from `first` to `last`, in
        an order that does not depend on when they came. Step −1 is what came from other runs, without a margin.
        ids: the pairs that it may be, which spares reading the whole ledger."""
        query = "SELECT pair, label, margin, step, audit FROM answers WHERE step BETWEEN ? AND ?"
        if ids is None:
            return self.db.execute(f"{query} ORDER BY step, pair", (first, last)).fetchall()
        found = []
        for some, marks in portions(ids):
            found += self.db.execute(f"{query} AND pair IN ({marks})", (first, last, *some))
        return sorted(found, key=lambda row: (row[3], row[0]))

    def cost(self):
        """(money spent, number of answers whose cost is not known). A judge's verdicts cost, whether or not they settled
        their pair; an answer's own cost is that of its verdicts."""
        return self.db.execute("SELECT spent, (SELECT COALESCE(SUM(unpriced), 0) FROM totals) FROM money").fetchone()

    # For people and their tools. A question is open while its pair has no answer.

    def put_questions(self, questions, texts):
        """Open questions, those that stand already left as they are. texts: {pair id: (prompt, first, second) as JSON}."""
        now = time.time()
        rows = [(q.pair, *texts[q.pair], q.margin, q.step, q.audit, now) for q in questions]
        with self.transaction():
            self.db.executemany(
                "INSERT OR IGNORE INTO questions (pair, prompt, first, second, margin, step, audit, asked_at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)", rows)

    def open_questions(self):
        """[(pair, prompt, first, second)], oldest first; the texts are JSON."""
        return self.db.execute(
            "SELECT pair, prompt, first, second FROM questions WHERE pair NOT IN (SELECT pair FROM answers) "
            "ORDER BY step, pair").fetchall()

    def lease(self, annotator, seconds, not_these=()):
        """Lease one open question to an annotator for some seconds: (pair, prompt, first, second), or None.

        The annotator's own unexpired lease comes first (a reload shows the same question), then the oldest question that
        nobody holds. not_these: pairs that the annotator has skipped; they come again when nothing else is left.
        """
        now = time.time()
        with self.transaction():
            pairs = [pair for pair, in self.db.execute(
                "SELECT pair FROM questions WHERE pair NOT IN (SELECT pair FROM answers) "
                "AND (leased_to IS NULL OR leased_until < ? OR leased_to = ?) "
                "ORDER BY leased_to IS NOT ? OR leased_until < ?, step, pair", (now, annotator, annotator, now))]
            wanted = [pair for pair in pairs if pair not in not_these] or pairs
            if not wanted:
                return None
            self.db.execute("UPDATE questions SET leased_to = ?, leased_until = ? WHERE pair = ?",
                            (annotator, now + seconds, wanted[0]))
            return self.db.execute("SELECT pair, prompt, first, second FROM questions WHERE pair = ?",
                                   (wanted[0],)).fetchone()

    def release(self, annotator, pair=None):
        """Give back an annotator's lease of a pair, or all of them."""
        self.db.execute("UPDATE questions SET leased_to = NULL, leased_until = NULL WHERE leased_to = ? "
                        "AND pair = COALESCE(?, pair)", (annotator, pair))

    def answer_question(self, pair, label, annotator, seconds=None, cost=None, source="human"):
        """Answer an open question. True where the answer now stands; False where the pair has one already: then this one is
        kept as a verdict, a second opinion. Raises KeyError where the pair was never asked."""
        with self.transaction():
            asked = self.db.execute("SELECT margin, step, audit FROM questions WHERE pair = ?", (pair,)).fetchone()
            if asked is None:
                raise KeyError(pair)
            self.add_verdict(pair, annotator, label, seconds, cost)
            return self.add(source, [(Question(pair, *asked), label, annotator, seconds, cost)]) == 1

    def retract(self, pair, annotator):
        """Take back an annotator's own answer, which opens its question again. False where the run has used it, or there is
        none of theirs."""
        with self.transaction():
            done = self.db.execute("DELETE FROM answers WHERE pair = ? AND annotator = ? AND source = 'human' AND used = 0",
                                   (pair, annotator))
            if done.rowcount:
                self.db.execute("DELETE FROM verdicts WHERE id = (SELECT MAX(id) FROM verdicts WHERE pair = ? "
                                "AND annotator = ?)", (pair, annotator))
            return done.rowcount == 1

    def add_verdict(self, pair, annotator, verdict, seconds=None, cost=None, detail=None):
        """Keep what an annotator said, answer or not: 1, −1, or 0 for no preference."""
        self.db.execute("INSERT INTO verdicts (pair, annotator, verdict, seconds, cost, detail, at) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?)", (pair, annotator, verdict, seconds, cost, detail, time.time()))

    def close(self):
        self.db.close()


def in_words(path, error):
    """What SQLite's error means for the user: the file, what is wrong and what to do."""
    advice = {"locked": "another process holds it: close that one", "full": "make room on its disk",
              "readonly": "make it and its folder writable", "unable to open": "look at its folder and its permissions",
              "not a database": "move it away", "malformed": "it is damaged: put back a copy, or move it away"}
    todo = next((todo for word, todo in advice.items() if word in str(error)), "look at its disk, or move it away")
    return f"{path}: cannot be used as a ledger ({error}): {todo}"


def portions(ids, size=10_000):
    """The ids in portions, each with its question marks: SQLite takes at most 32,766 parameters."""
    for start in range(0, len(ids), size):
        some = ids[start:start + size]
        yield some, ",".join("?" * len(some))


class Interrupt:
    """Ctrl-C and SIGTERM (as schedulers send it) ask the run to stop where it can go on later; a second Ctrl-C kills it.

    asked: whether it was asked to stop; the loop looks at it between steps. inside: while an annotator is asked who may take
    hours, KeyboardInterrupt is raised at once.
    """

    def __init__(self):
        self.asked = self.inside = self.pressed = False

    def install(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self)

    def remove(self):
        """Not where a stop is under way: the launcher's SIGTERM, which follows, would cut it short."""
        if not self.asked:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def __call__(self, number, frame):
        if number == signal.SIGINT and self.pressed:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self.pressed |= number == signal.SIGINT  # the launcher sends SIGTERM behind a Ctrl-C: that is no second one
        self.asked = True
        if self.inside:
            self.inside = False  # once: under the launcher a second signal follows on the heels of the first
            raise KeyboardInterrupt


class DatasetAnnotator:
    """Answers from labels that the data set came with. It alone holds them.

    labels: {pair id: +1 (y1 preferred) or −1}.  truths: the same without an annotator's mistakes, where the data has it
    (toy.py); used to grade pseudo-labels, never to answer.
    """

    name = "dataset"
    asks_together = False  # it answers at once, so a question need not wait for the others of its step

    def __init__(self, labels, truths=None):
        self.labels, self.truths, self.calls = labels, truths or {}, 0

    def answer(self, questions, ledger):
        """Raises LookupError, naming the pair, for one without a label."""
        self.calls += len(questions)
        missing = [q.pair for q in questions if q.pair not in self.labels]
        if missing:
            raise LookupError(f"pair {missing[0]} has no label in the data set ({len(missing)} of {len(questions)} asked)")
        ledger.add(self.name, [(q, self.labels[q.pair], "", None, None) for q in questions], used=True)

    def grade(self, labelled):
        """(right, known): of these (pair id, label), how many agree with the truth, and of how many the truth is known."""
        known = [label == self.truths[id] for id, label in labelled if id in self.truths]
        return sum(known), len(known)


class HumanAnnotator:
    """People, who answer through the ledger (tools/label.py) when they come to it.

    texts: pair id → (prompt, first, second) as JSON, for the page.  wait_minutes: how long to wait for the next answer.
    show: called with the number of answers that are missing, while waiting.
    """

    name = "human"
    asks_together = True
    poll_seconds = 0.5

    def __init__(self, texts, wait_minutes, show=lambda missing: None):
        self.texts, self.wait_seconds, self.show = texts, 60 * wait_minutes, show

    def answer(self, questions, ledger):
        """Put the questions and wait until all are answered. Raises Waiting where no answer came in for wait_minutes, or on
        Ctrl-C; the questions stay open."""
        ids, last, since = [q.pair for q in questions], None, time.monotonic()
        missing = len(ids)
        try:
            ledger.put_questions(questions, {q.pair: self.texts(q.pair) for q in questions})
            while missing := len(ledger.unanswered(ids)):
                if missing != last:
                    last, since = missing, time.monotonic()
                    self.show(missing)
                if time.monotonic() - since >= self.wait_seconds:
                    raise Waiting(f"no answer for {self.wait_seconds / 60:g} minutes, {missing} of {len(ids)} are missing")
                time.sleep(self.poll_seconds)
        except KeyboardInterrupt:
            raise Waiting(f"interrupted, {missing} of {len(ids)} answers are missing")
        self.show(0)

    def grade(self, labelled):
        return 0, 0  # nobody knows


def is_audited(pair, fraction, seed):
    """Whether a pair belongs to the random share of pairs that are asked however confident the policy is. By hash, so that
    a resumed run draws the same."""
    draw = int.from_bytes(hashlib.blake2b(f"audit {seed} {pair}".encode(), digest_size=8).digest(), "big")
    return draw < fraction * 2**64


def wilson(successes, trials, z=1.96):
    """Wilson's interval of a share (95 % at z = 1.96), which holds for few trials and for shares near 0 and 1 too
    (Wilson 1927; Brown, Cai, DasGupta 2001). (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


class Oracle:
    """The one way to a label. Every rank makes one; rank 0 alone holds the annotator and the ledger.

    annotator: None on ranks other than 0.  path: the ledger's file.  max_queries: labels that may be bought in all, or None.
    asks_together: the annotator's, on all ranks.
    """

    def __init__(self, annotator, path, max_queries=None, asks_together=False):
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        # Pair ids are host data: they go over gloo, past the GPUs. Ranks wait there while people are asked, for days if need
        # be; that a rank has died shows without a timeout, because its connections close.
        self.group = dist.new_group(backend="gloo", timeout=timedelta(days=365)) if self.world > 1 else None
        self.annotator = annotator if self.rank == 0 else None
        self.ledger = Ledger(path) if self.rank == 0 else None
        self.max_queries, self.asks_together = max_queries, asks_together
        self.interrupt = Interrupt()
        # What was trained on unasked and how much of it was right; the step at which the budget was first too small; whether
        # the audit has been complained of.
        # What a calibrated gate's γ is multiplied by, and the step whose audits it counts from (gate.py).
        self.state = {"pseudo_labels": 0, "pseudo_right": 0, "pseudo_known": 0, "budget_spent_at_step": None,
                      "warned": False, "guard": 1.0, "guarded_until": 0}

    def answer(self, ids, margins, ask, step, audit=None):
        """Labels of some pairs. All ranks call it together, each with pairs of its own.

        ids: pair ids, None for a filler.  margins: floats.  ask: bools, who is to be asked.  step: optimiser step.
        audit: bools, who of them is asked although the policy is confident.
        Returns a list: +1 or −1 where the pair was asked, now or ever; 0 where it was not, or the budget is spent.
        Raises Waiting, on all ranks, where the annotator has not answered.
        """
        mine = list(zip(ids, margins, ask, audit or [False] * len(ids)))
        gathered = self.gather(mine)
        answers = None
        if self.rank == 0:
            try:
                known = self._answers([item for part in gathered for item in part if item[0] is not None], step)
                answers = [[known.get(item[0], 0) for item in part] for part in gathered]
            except (Waiting, ValueError) as problem:  # unanswered, or cannot be: the other ranks have to hear of it too
                answers = [Waiting(str(problem))] * self.world
            except KeyboardInterrupt:  # just before or behind the annotator's own work, which says how far it came
                answers = [Waiting("interrupted")] * self.world
        received = answers or [None]
        if self.world > 1:
            received = [None]
            dist.scatter_object_list(received, answers, src=0, group=self.group)
        if isinstance(received[0], Waiting):
            raise received[0]
        return received[0]

    def gather(self, value):
        """Every rank's value, on rank 0; elsewhere None."""
        if self.world == 1:
            return [value]
        gathered = [None] * self.world if self.rank == 0 else None
        dist.gather_object(value, gathered, dst=0, group=self.group)
        return gathered

    def from_rank_0(self, value):
        """Rank 0's value, on every rank."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def _answers(self, items, step):
        known = self.ledger.take([item[0] for item in items])
        new = {pair: Question(pair, margin, step, audit) for pair, margin, ask, audit in items if ask and pair not in known}
        questions = list(new.values())
        if self.max_queries is not None:
            left = max(0, self.max_queries - self.ledger.count(step))
            if left < len(questions):  # the least sure are worth most
                questions = sorted(questions, key=lambda q: (q.audit, abs(q.margin), q.pair))[:left]
                if self.state["budget_spent_at_step"] is None:
                    self.state["budget_spent_at_step"] = step
        while questions:  # more than once where somebody took an answer back just before it was used
            self.interrupt.inside = self.asks_together  # one that answers at once is not worth leaving a step half done
            try:
                self.annotator.answer(questions, self.ledger)
            finally:
                self.interrupt.inside = False
            known |= self.ledger.take([q.pair for q in questions])
            questions = [q for q in questions if q.pair not in known]
        return known

    def stop_if_asked(self):
        """Raise Waiting on all ranks where one of them was asked to stop. All ranks call it together, once a step."""
        asked = torch.tensor(int(self.interrupt.asked))
        if self.world > 1:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self.group)
        if asked:
            raise Waiting("interrupted")

    def report_pseudo(self, unasked):
        """Tell the oracle which pairs are trained on with a pseudo-label, so that it can count and grade them.

        unasked: [(pair id, ±1)]. All ranks call it together, once an optimiser step. Nothing comes back: the loop learns
        no label by it.
        """
        for part in self.gather(unasked) or ():
            right, known = self.annotator.grade(part)
            self.state["pseudo_labels"] += len(part)
            self.state["pseudo_right"] += right
            self.state["pseudo_known"] += known

    def queries(self, step=None):
        """Labels bought, over all ranks (rank 0; elsewhere 0)."""
        return self.ledger.count(step) if self.ledger else 0

    def audit(self, step=None, first=0, scale=1.0):
        """What the audited pairs of the steps from `first` to `step` say of pseudo-labels (rank 0; elsewhere None): how many
        there are, the share of them on which sign(margin) agrees with the annotator, its 95 % interval, and the share that
        is predicted, the mean of σ(a·|m|): by the policy itself, or with a as `scale` by a calibrated gate."""
        pairs = self.ledger.audits(step, first) if self.ledger else []
        if not pairs:
            return None
        right = sum((margin > 0) == (label > 0) for margin, label in pairs)
        predicted = sum(1 / (1 + math.exp(-min(scale * abs(margin), 700))) for margin, _ in pairs) / len(pairs)
        return {"audited": len(pairs), "accuracy": right / len(pairs), "interval": wilson(right, len(pairs)),
                "predicted": predicted}

    def close(self):
        if self.ledger:
            self.ledger.close()
