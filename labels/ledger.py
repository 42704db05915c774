"""The ledger: every question a run asks and every answer it gets, in one SQLite file (OUTPUT_DIR/labels.sqlite).

    Ledger.add(source, answers)     commit answers; a pair keeps its first one
    Ledger.take(ids)                the labels of these pairs, as far as they are answered; 0: without a preference
    Ledger.put_questions, lease, answer_question, retract      what people and their tools use
    Ledger.add_verdict              everything an annotator said, including what did not become the answer

The run, the labelling page and the tools share this file and nothing else. The run uses a label only after the ledger
has committed it, so the number of queries it reports is the number of rows here, and a crash never loses a paid label.

Departure from the paper and the official code: they keep no answers. Here a pair is asked once; later epochs use the
answer from the ledger for free.

An answer may have no preference (label 0: a tie, both bad, cannot be judged). It settles its pair like any other: it was
paid for, counts as a query, and the pair is never asked again. But it is no label: nothing trains on it, and no audit,
calibration or replay reads it.

To look at a ledger: `python tools/ledger.py OUTPUT_DIR`.
"""

import contextlib
import sqlite3
import time
from dataclasses import dataclass

from runtime.errors import UsageError


class LedgerError(UsageError):
    """The ledger cannot be used. The message names its file and says what to do."""


@dataclass(frozen=True)
class Question:
    """A pair to be labelled.

    margin: the policy's, in units of reward; None if unknown.  step: the optimiser step that asks, from 0.
    audit: whether it is asked although the policy is confident.
    """
    pair: str
    margin: float
    step: int
    audit: bool = False


VERSION = 3  # of the schema, kept in the file as user_version; a file of version 2 is brought up to date when it is opened

TABLES = """
    CREATE TABLE IF NOT EXISTS answers (
        pair TEXT PRIMARY KEY,                            -- hash of the pair's content, so no pair is paid for twice
        label INTEGER NOT NULL CHECK (label IN (1, 0, -1)),  -- 1: y1 preferred, -1: y2 preferred, 0: no preference
        source TEXT NOT NULL,                             -- dataset, human, judge, reused
        annotator TEXT NOT NULL DEFAULT '',               -- who, within the source
        margin REAL,                                      -- the policy's margin when it asked, in units of reward
        step INTEGER NOT NULL,                            -- optimiser step that asked, from 0; -1: from another run
        audit INTEGER NOT NULL DEFAULT 0,                 -- asked although the policy was confident
        answered_at REAL NOT NULL,                        -- seconds since 1970
        seconds REAL,                                     -- how long the annotator took
        cost REAL,                                        -- what it cost, if known
        used INTEGER NOT NULL DEFAULT 0,                  -- the run has used it, so it can no longer be retracted
        detail TEXT                                       -- JSON: how it came about, from an annotator who can tell
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS audits ON answers (step, margin, label, audit) WHERE audit;
    CREATE INDEX IF NOT EXISTS without_preference ON answers (step, label) WHERE label = 0;
    CREATE INDEX IF NOT EXISTS details ON answers (detail, step) WHERE detail IS NOT NULL;
    CREATE TABLE IF NOT EXISTS questions (                -- for people; open until the pair has an answer
        pair TEXT PRIMARY KEY,
        prompt TEXT NOT NULL, first TEXT NOT NULL, second TEXT NOT NULL,  -- JSON: a string or a list of messages
        margin REAL, step INTEGER NOT NULL, audit INTEGER NOT NULL, asked_at REAL NOT NULL,
        leased_to TEXT, leased_until REAL                 -- who is looking at it, and until when
    ) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS verdicts (                 -- everything said: both orders of a judge, second opinions
        id INTEGER PRIMARY KEY,
        pair TEXT NOT NULL, annotator TEXT NOT NULL,
        verdict INTEGER NOT NULL CHECK (verdict IN (1, 0, -1)),           -- 0: no preference, or an unusable reply
        seconds REAL, cost REAL, detail TEXT, at REAL NOT NULL
    );
    CREATE INDEX IF NOT EXISTS verdicts_by_pair ON verdicts (pair);
"""

# The run reports its queries and their cost at every step. Triggers keep both sums up to date, whichever process
# writes, so that reporting never reads a million rows.
TOTALS = """
    CREATE TABLE IF NOT EXISTS totals (step INTEGER PRIMARY KEY, answers INTEGER NOT NULL, unpriced INTEGER NOT NULL);
    CREATE TRIGGER IF NOT EXISTS answer_counted AFTER INSERT ON answers WHEN NEW.step >= 0 BEGIN
        INSERT INTO totals VALUES (NEW.step, 1, NEW.cost IS NULL)
            ON CONFLICT (step) DO UPDATE SET answers = answers + 1, unpriced = unpriced + excluded.unpriced;
    END;
    CREATE TRIGGER IF NOT EXISTS answer_uncounted AFTER DELETE ON answers WHEN OLD.step >= 0 BEGIN
        UPDATE totals SET answers = answers - 1, unpriced = unpriced - (OLD.cost IS NULL) WHERE step = OLD.step;
    END;

    CREATE TABLE IF NOT EXISTS money (id INTEGER PRIMARY KEY CHECK (id = 1), spent REAL NOT NULL);
    INSERT OR IGNORE INTO money VALUES (1, 0);
    CREATE VIEW IF NOT EXISTS own_costs AS                -- answers without verdicts; otherwise the verdicts hold the cost
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
"""

# From version 2, whose answers had to be 1 or -1, and had no details. The totals stay as they are: these rows are counted.
BEFORE_TABLES = """
    DROP TRIGGER answer_counted;
    DROP TRIGGER answer_uncounted;
    DROP TRIGGER answer_paid;
    DROP TRIGGER answer_refunded;
    DROP TRIGGER verdict_paid;
    DROP TRIGGER verdict_refunded;
    DROP VIEW own_costs;
    DROP INDEX audits;
    ALTER TABLE answers RENAME TO answers_2;
"""
AFTER_TABLES = """
    INSERT INTO answers SELECT *, CASE WHEN source = 'judge' THEN
        CASE WHEN annotator LIKE '% (coin)' THEN '{"rubric": null, "coin": true}' ELSE '{"rubric": null}' END END
        FROM answers_2;
    DROP TABLE answers_2;
"""


def statements(script):
    """Yield the statements of a script, each of which ends its line: sqlite3's own executescript would commit the
    transaction that it is called in."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


class Ledger:
    """Every question and answer of a run, in SQLite.

    Label 1 means that y1 is preferred, −1 that y2 is, 0 that neither is. Which response of a pair is y1 depends only on the
    pair's content (data.canonical), so a label means the same in every run.
    """

    def __init__(self, path, timeout=60):
        """path: the file, created if missing.  timeout: seconds to wait while another process holds it."""
        self.path = path
        try:
            self.db = sqlite3.connect(path, timeout=timeout, isolation_level=None)  # transactions are explicit, see below
            self.db.execute("BEGIN")  # version and tables from the same moment: another process may be creating the file
            version = self._version()
            tables = {name for name, in self.db.execute("SELECT name FROM sqlite_master")}
            self.db.execute("COMMIT")
            if tables and (version not in (2, VERSION) or not tables >= {"answers", "questions", "verdicts"}):
                raise LedgerError(f"{path}: not a ledger of this version ({version}, not {VERSION}): move it away")
            self.db.execute("PRAGMA synchronous = FULL")  # a committed answer survives a power cut
            self.db.execute("PRAGMA cache_size = -100000")  # at most 100 MB: ids are hashes, so lookups hit random pages
            if not tables:
                self._keep_trying("PRAGMA journal_mode = WAL", timeout)  # others can read and write while a run is on
            if version != VERSION:
                self._make_tables()
        except sqlite3.Error as error:
            raise LedgerError(in_words(path, error))

    def _version(self):
        return self.db.execute("PRAGMA user_version").fetchone()[0]

    def _make_tables(self):
        """Make what is missing, or bring a file of version 2 up to date, all or nothing. Two processes may get here at once;
        the second changes nothing."""
        with self.transaction():
            old = self._version() == 2
            for script in (old * BEFORE_TABLES, TABLES, old * AFTER_TABLES, TOTALS, f"PRAGMA user_version = {VERSION};"):
                for statement in statements(script):
                    self.db.execute(statement)

    def _keep_trying(self, statement, seconds):
        """Execute a statement, repeating it while the file is locked. SQLite's own timeout does not cover a change of
        journal mode, and two processes that create a ledger at once collide there."""
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
        """Commit everything done inside, or nothing. Inside another transaction it joins that one.

        Takes the write lock at the start, so what is read inside is still true when the result is written.
        """
        if self.db.in_transaction:
            yield
            return
        try:  # Ctrl-C can strike during any of the three
            self.db.execute("BEGIN IMMEDIATE")
            yield
            self.db.execute("COMMIT")
        except BaseException:
            if self.db.in_transaction:  # on a full disk SQLite has already rolled back
                self.db.execute("ROLLBACK")
            raise

    # For the run.

    def take(self, ids):
        """{pair id: label} for those of the ids that have an answer; the label is 0 for one without a preference. From now
        on these answers cannot be retracted."""
        found = {}
        for some, marks in portions(ids):
            with self.transaction():
                found.update(self.db.execute(f"SELECT pair, label FROM answers WHERE pair IN ({marks})", some))
                self.db.execute(f"UPDATE answers SET used = 1 WHERE used = 0 AND pair IN ({marks})", some)
        return found

    def unanswered(self, ids, before=2**62):
        """Those of the ids that have no answer, in the given order. Unlike `take`, this leaves answers retractable.

        before: count only answers to questions of steps before this one.
        """
        answered = set()
        for some, marks in portions(ids):
            answered.update(pair for pair, in self.db.execute(
                f"SELECT pair FROM answers WHERE step < ? AND pair IN ({marks})", (before, *some)))
        return [id for id in ids if id not in answered]

    def add(self, source, labelled, used=False, detail=None):
        """Commit answers, each (Question, label, annotator, seconds, cost). A pair that already has one keeps it.

        used: mark them as used right away, which saves `take` a second commit.  detail: JSON that says how they came about,
        with few different values: they are counted (`details`). Returns how many were new.
        """
        now = time.time()
        rows = [(q.pair, label, source, annotator, q.margin, q.step, q.audit, now, seconds, cost, used, detail)
                for q, label, annotator, seconds, cost in labelled]
        with self.transaction():
            return self.db.executemany(
                "INSERT INTO answers (pair, label, source, annotator, margin, step, audit, answered_at, seconds, cost, "
                "used, detail) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (pair) DO NOTHING", rows).rowcount

    def check_pairs(self, ids):
        """Check that this ledger belongs to the run's data. ids: every pair that the run can ask about.

        Returns (answers copied from other runs by `tools/ledger.py --reuse`, how many of them are about these pairs).
        Raises LedgerError if an answer bought here is about any other pair: then this is the ledger of a run on other
        data, and its counts would be wrong for this one.
        """
        ids = set(ids)
        bought, reused = ([pair for pair, in self.db.execute(f"SELECT pair FROM answers WHERE step {here}")]
                          for here in (">= 0", "< 0"))
        foreign = [pair for pair in bought if pair not in ids]
        if foreign:
            raise LedgerError(
                f"{self.path}: {len(foreign):,} of its {len(bought):,} answers are about pairs that this run does not have "
                f"({foreign[0]} is the first): it is the ledger of a run on other data. Choose another output_dir; `python "
                "tools/ledger.py NEW --reuse OLD` takes over the labels of the pairs that both runs have")
        return len(reused), len(ids.intersection(reused))

    def count(self, step=None):
        """Answers bought up to and including an optimiser step (None: all). Counting by step makes a run that resumes from
        an earlier step report the same numbers again."""
        return self.db.execute("SELECT COALESCE(SUM(answers), 0) FROM totals WHERE step <= ?",
                               (2**62 if step is None else step,)).fetchone()[0]

    def without_preference(self, step=None):
        """How many of the answers that `count` counts have no preference."""
        return self.db.execute("SELECT COUNT(*) FROM answers WHERE label = 0 AND step BETWEEN 0 AND ?",
                               (2**62 if step is None else step,)).fetchone()[0]

    def details(self, step=None, first=0):
        """[(detail, how many)] of the answers, to questions of optimiser steps from `first` to `step` (None: all), that say
        how they came about. Step −1 holds what came from other runs."""
        return self.db.execute("SELECT detail, COUNT(*) FROM answers WHERE detail IS NOT NULL AND step BETWEEN ? AND ? "
                               "GROUP BY detail", (first, 2**62 if step is None else step)).fetchall()

    def audits(self, step=None, first=0):
        """[(margin, label)] of the audited pairs from optimiser step `first` up to and including `step` (None: all). An
        answer without a preference is no outcome."""
        return self.db.execute("SELECT margin, label FROM answers WHERE audit AND label != 0 AND step BETWEEN ? AND ?",
                               (first, 2**62 if step is None else step)).fetchall()

    def labels(self, first, last, ids=None):
        """[(pair, label, margin, step, audit)] of the labels, ±1, of questions of optimiser steps `first` to `last`, ordered
        by step and pair, whenever they arrived. Step −1 holds what came from other runs; its margins are None.

        ids: return only these pairs, without reading the whole ledger.
        """
        query = "SELECT pair, label, margin, step, audit FROM answers WHERE label != 0 AND step BETWEEN ? AND ?"
        if ids is None:
            return self.db.execute(f"{query} ORDER BY step, pair", (first, last)).fetchall()
        found = []
        for some, marks in portions(ids):
            found += self.db.execute(f"{query} AND pair IN ({marks})", (first, last, *some))
        return sorted(found, key=lambda row: (row[3], row[0]))

    def cost(self):
        """(money spent, number of answers whose cost is unknown). Every verdict of a judge is paid for, whether or not it
        settled its pair; an answer that came from verdicts adds nothing to them."""
        return self.db.execute("SELECT spent, (SELECT COALESCE(SUM(unpriced), 0) FROM totals) FROM money").fetchone()

    # For people and their tools. A question is open while its pair has no answer.

    def put_questions(self, questions, texts):
        """Ask questions; those already asked stay as they are. texts: {pair id: (prompt, first, second) as JSON}."""
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
        nobody holds. not_these: pairs that the annotator has skipped; they return when nothing else is left.
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
        """Give back an annotator's lease of a pair, or all of their leases."""
        self.db.execute("UPDATE questions SET leased_to = NULL, leased_until = NULL WHERE leased_to = ? "
                        "AND pair = COALESCE(?, pair)", (annotator, pair))

    def answer_question(self, pair, label, annotator, seconds=None, cost=None, source="human"):
        """Answer a question; label 0 means no preference. Returns True if this is now the pair's answer; False if it already
        had one, and this label is kept as a second opinion, a verdict. Raises KeyError if the pair was never asked."""
        with self.transaction():
            asked = self.db.execute("SELECT margin, step, audit FROM questions WHERE pair = ?", (pair,)).fetchone()
            if asked is None:
                raise KeyError(pair)
            self.add_verdict(pair, annotator, label, seconds, cost)
            return self.add(source, [(Question(pair, *asked), label, annotator, seconds, cost)]) == 1

    def retract(self, pair, annotator):
        """Take back an annotator's own answer, which opens the question again. Returns False if the run has used it, or if
        the annotator has no answer there."""
        with self.transaction():
            done = self.db.execute("DELETE FROM answers WHERE pair = ? AND annotator = ? AND source = 'human' AND used = 0",
                                   (pair, annotator))
            if done.rowcount:
                self.db.execute("DELETE FROM verdicts WHERE id = (SELECT MAX(id) FROM verdicts WHERE pair = ? "
                                "AND annotator = ?)", (pair, annotator))
            return done.rowcount == 1

    # Verdicts: what annotators said, whether or not it became the answer.

    def add_verdict(self, pair, annotator, verdict, seconds=None, cost=None, detail=None):
        """Keep what an annotator said: 1, −1, or 0 for no preference. detail: JSON with what led to it."""
        self.db.execute("INSERT INTO verdicts (pair, annotator, verdict, seconds, cost, detail, at) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?)", (pair, annotator, verdict, seconds, cost, detail, time.time()))

    def verdicts(self, pair, annotator):
        """[(verdict, detail)] of an annotator's verdicts on a pair that have a detail, oldest first."""
        return self.db.execute("SELECT verdict, detail FROM verdicts WHERE pair = ? AND annotator = ? "
                               "AND detail IS NOT NULL ORDER BY id", (pair, annotator)).fetchall()

    def last_verdicts(self, annotator, count):
        """[detail] of an annotator's last verdicts that have one, newest first."""
        return [detail for detail, in self.db.execute(
            "SELECT detail FROM verdicts WHERE annotator = ? AND detail IS NOT NULL ORDER BY id DESC LIMIT ?",
            (annotator, count))]

    def spent(self, pair, annotator):
        """(seconds, cost) of all of an annotator's verdicts on a pair together; None where none of them is known."""
        return self.db.execute("SELECT SUM(seconds), SUM(cost) FROM verdicts WHERE pair = ? AND annotator = ?",
                               (pair, annotator)).fetchone()

    def close(self):
        self.db.close()


def in_words(path, error):
    """An error of SQLite as a message to the user: the file, what is wrong and what to do."""
    advice = {"locked": "another process holds it: close that one", "full": "make room on its disk",
              "readonly": "make it and its folder writable", "unable to open": "look at its folder and its permissions",
              "not a database": "move it away", "malformed": "it is damaged: restore a copy, or move it away"}
    todo = next((todo for word, todo in advice.items() if word in str(error)), "look at its disk, or move it away")
    return f"{path}: cannot be used as a ledger ({error}): {todo}"


def portions(ids, size=10_000):
    """Yield the ids in portions, each with its question marks for SQL: SQLite takes at most 32,766 parameters."""
    for start in range(0, len(ids), size):
        some = ids[start:start + size]
        yield some, ",".join("?" * len(some))
