"""The ledger: every question a run asks and every answer it gets, in one SQLite file (OUTPUT_DIR/labels.sqlite).

    Ledger.add(source, answers)     commit answers; a pair keeps its first one
    Ledger.take(ids)                the labels of these pairs, as far as they are answered; 0: without a preference
    Ledger.put_questions, lease, answer_question, retract      what people and their tools use; Panel says how many are asked
    Ledger.add_verdict              everything an annotator said, including what did not become the answer

The run, the labelling page and the tools share this file and nothing else. The run uses a label only after the ledger
has committed it, so the number of queries it reports is the number of rows here, and a crash never loses a paid label.

An answer may have no preference (label 0: a tie, both bad, cannot be judged). It settles its pair like any other: it was
paid for, counts as a query, and the pair is never asked again. But it is not a label: nothing trains on it, and no audit
counts it.

To look at a ledger: `python tools/ledger.py OUTPUT_DIR`.
"""

import contextlib
import json
import sqlite3
import time
from collections import Counter
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


EVER = 2**62  # later than any optimiser step
LONGEST_LEASE = 3600  # seconds; a lease that has longer to go is from before the clock was set back
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
        open INTEGER NOT NULL DEFAULT 1                   -- the pair has no answer; triggers keep it so
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS open_questions ON questions (step, pair, open) WHERE open;  -- with all that a count reads
    CREATE INDEX IF NOT EXISTS questions_by_step ON questions (step);
    CREATE TABLE IF NOT EXISTS leases (                   -- who is looking at an open question, and until when
        pair TEXT NOT NULL, annotator TEXT NOT NULL, until REAL NOT NULL, PRIMARY KEY (pair, annotator)
    ) WITHOUT ROWID;
    CREATE INDEX IF NOT EXISTS leases_by_annotator ON leases (annotator);
    CREATE TABLE IF NOT EXISTS verdicts (                 -- everything said: both orders of a judge, second opinions
        id INTEGER PRIMARY KEY,
        pair TEXT NOT NULL, annotator TEXT NOT NULL,
        verdict INTEGER NOT NULL CHECK (verdict IN (1, 0, -1)),           -- 0: no preference, or an unusable reply
        seconds REAL, cost REAL, detail TEXT, at REAL NOT NULL,
        person INTEGER NOT NULL DEFAULT 0                 -- the opinion of a person, which counts towards the label
    );
    CREATE INDEX IF NOT EXISTS verdicts_by_pair ON verdicts (pair);
    CREATE INDEX IF NOT EXISTS opinions_by_annotator ON verdicts (annotator) WHERE person;
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

    CREATE TRIGGER IF NOT EXISTS question_closed AFTER INSERT ON answers
        WHEN EXISTS (SELECT 1 FROM questions WHERE pair = NEW.pair) BEGIN
        UPDATE questions SET open = 0 WHERE pair = NEW.pair;
        DELETE FROM leases WHERE pair = NEW.pair;
    END;
    CREATE TRIGGER IF NOT EXISTS question_opened AFTER DELETE ON answers BEGIN
        UPDATE questions SET open = 1 WHERE pair = OLD.pair;
    END;
"""

# From version 2, whose answers had to be 1 or -1, and had no details. Each question could be leased to one annotator, and
# only people's verdicts had no detail. The totals stay as they are: these rows are counted.
BEFORE_TABLES = """
    DROP TRIGGER answer_counted;
    DROP TRIGGER answer_uncounted;
    DROP TRIGGER answer_paid;
    DROP TRIGGER answer_refunded;
    DROP TRIGGER verdict_paid;
    DROP TRIGGER verdict_refunded;
    DROP VIEW own_costs;
    DROP INDEX audits;
    DROP INDEX verdicts_by_pair;
    ALTER TABLE answers RENAME TO answers_2;
    ALTER TABLE questions RENAME TO questions_2;
    ALTER TABLE verdicts RENAME TO verdicts_2;
"""
AFTER_TABLES = """
    INSERT INTO answers SELECT *, CASE WHEN source = 'judge' THEN
        CASE WHEN annotator LIKE '% (coin)' THEN '{"rubric": null, "coin": true}' ELSE '{"rubric": null}' END END
        FROM answers_2;
    INSERT INTO questions SELECT pair, prompt, first, second, margin, step, audit, asked_at,
        pair NOT IN (SELECT pair FROM answers) FROM questions_2;
    INSERT INTO verdicts SELECT id, pair, annotator, verdict, seconds, cost, detail, at, detail IS NULL FROM verdicts_2;
    DROP TABLE answers_2;
    DROP TABLE questions_2;
    DROP TABLE verdicts_2;
"""


# How many opinions on the question `asked` are given, or about to be given.
SEATS = """SELECT COUNT(*) FROM (
    SELECT annotator FROM verdicts WHERE pair = asked.pair AND person
    UNION SELECT annotator FROM leases WHERE pair = asked.pair AND until >= :now)"""


def statements(script):
    """Yield the statements of a script, one at a time; each ends at the end of a line.

    sqlite3 has executescript, but that commits the transaction it is called in.
    """
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


@dataclass(frozen=True)
class Opinion:
    """What one person said about a pair.

    label: 1, −1, or 0 for no preference.  said: which kind of no preference (tools/exchange.THIRD_ANSWERS), else None.
    adjudicates: whether it decides between the others.
    """
    label: int
    said: str = None
    comment: str = ""
    adjudicates: bool = False


@dataclass(frozen=True)
class Panel:
    """How the opinions of people become the label of a pair.

    needed: people that are asked about each pair.  adjudicator: who decides where they split; None: then the pair has no
    preference.
    """
    needed: int = 1
    adjudicator: str = None

    def decide(self, opinions):
        """(label, who says so, detail) for {annotator: Opinion}, or None while the pair is not settled.

        The label is what more than half of them say. An opinion without a preference is one against both responses, so a
        label always has more than half of the people behind it.
        """
        for who, opinion in opinions.items():
            if opinion.adjudicates:
                return opinion.label, who, {"adjudicated": True, **({"no_preference": opinion.said} if opinion.said else {})}
        if not opinions or len(opinions) < self.needed:
            return None
        votes = Counter(opinion.label for opinion in opinions.values())
        label, most = votes.most_common(1)[0]
        if 2 * most <= len(opinions):
            return None if self.adjudicator else (0, ", ".join(sorted(opinions)), {"split": True})
        agreeing = {who: opinion for who, opinion in opinions.items() if opinion.label == label}
        detail = {"opinions": len(opinions), "agree": most} if len(opinions) > 1 else {}
        kinds = Counter(opinion.said for opinion in agreeing.values() if opinion.said)
        if kinds:
            detail["no_preference"] = max(kinds, key=lambda said: (kinds[said], said))
        return label, ", ".join(sorted(agreeing)), detail


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
        """Make what is missing, or bring version 2 up to date, all or nothing. Doing it twice changes nothing."""
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

    def take(self, ids, step=EVER):
        """{pair id: label} for those of the ids that have an answer; the label is 0 for one without a preference. From now
        on these answers cannot be retracted.  step: without the answers to questions of later steps."""
        found = {}
        for some, marks in portions(ids):
            which, values = f"step <= ? AND pair IN ({marks})", (step, *some)
            with self.transaction():
                found.update(self.db.execute(f"SELECT pair, label FROM answers WHERE {which}", values))
                self.db.execute(f"UPDATE answers SET used = 1 WHERE used = 0 AND {which}", values)
        return found

    def unanswered(self, ids, before=EVER):
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

    def labels(self, source):
        """{pair: label} of the answers from a source."""
        return dict(self.db.execute("SELECT pair, label FROM answers WHERE source = ?", (source,)))

    def count(self, step=EVER):
        """Answers bought up to and including an optimiser step. Counting by step makes a run that resumes from an earlier
        step report the same numbers again."""
        return self.db.execute("SELECT COALESCE(SUM(answers), 0) FROM totals WHERE step <= ?", (step,)).fetchone()[0]

    def without_preference(self, step=EVER):
        """How many of the answers that `count` counts have no preference."""
        return self.db.execute("SELECT COUNT(*) FROM answers WHERE label = 0 AND step BETWEEN 0 AND ?",
                               (step,)).fetchone()[0]

    def details(self, step=EVER, first=0):
        """[(detail, how many)] of the answers, to questions of optimiser steps from `first` to `step`, that say how they
        came about. What came from other runs has step −1."""
        return self.db.execute("SELECT detail, COUNT(*) FROM answers WHERE detail IS NOT NULL AND step BETWEEN ? AND ? "
                               "GROUP BY detail", (first, step)).fetchall()

    def audits(self, step=EVER):
        """[(margin, label)] of the audited pairs up to and including an optimiser step, where there is a preference."""
        return self.db.execute("SELECT margin, label FROM answers WHERE audit AND label != 0 AND step BETWEEN 0 AND ?",
                               (step,)).fetchall()

    def cost(self):
        """(money spent, number of answers whose cost is unknown). Every verdict of a judge is paid for, whether or not it
        settled its pair; an answer that came from verdicts adds nothing to them."""
        return self.db.execute("SELECT spent, (SELECT COALESCE(SUM(unpriced), 0) FROM totals) FROM money").fetchone()

    # For people and their tools. A question is open while its pair has no answer.

    def put_questions(self, questions, texts):
        """Ask questions; those already asked stay as they are. texts: {pair id: (prompt, first, second) as JSON}."""
        now = time.time()
        rows = [(q.pair, *texts[q.pair], q.margin, q.step, q.audit, now, q.pair) for q in questions]
        with self.transaction():
            self.db.executemany(
                "INSERT OR IGNORE INTO questions (pair, prompt, first, second, margin, step, audit, asked_at, open) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, NOT EXISTS (SELECT 1 FROM answers WHERE pair = ?))", rows)

    def open_questions(self):
        """[(pair, prompt, first, second)], oldest first; the texts are JSON."""
        return self.db.execute("SELECT pair, prompt, first, second FROM questions WHERE open ORDER BY step, pair").fetchall()

    def progress(self):
        """(open questions, all questions of the steps that still have an open one)."""
        return tuple(self.db.execute(f"SELECT COUNT(*) FROM questions WHERE {which}").fetchone()[0] for which in (
            "open", "step IN (SELECT DISTINCT step FROM questions WHERE open)"))

    def lease(self, annotator, seconds, not_these=(), panel=Panel()):
        """Lease one open question to an annotator for some seconds: (pair, prompt, first, second), or None.

        The annotator's own unexpired lease comes first (a reload shows the same question), then, for the adjudicator, the
        oldest split, then the oldest question that lacks an opinion, that nobody else is about to give, and on which this
        annotator has given none. not_these: pairs that the annotator has skipped; they return when nothing else is left.
        """
        with self.transaction():
            self.db.execute("DELETE FROM leases WHERE until > ?", (time.time() + LONGEST_LEASE,))
            skipped = None
            for pair in self._leasable(annotator, panel):
                if pair not in not_these:
                    break
                skipped = skipped or pair
            else:
                pair = skipped
            if pair is None:
                return None
            self.hold(annotator, pair, seconds)
            return self.db.execute("SELECT pair, prompt, first, second FROM questions WHERE pair = ?", (pair,)).fetchone()

    def _leasable(self, annotator, panel):
        """Yield the pairs that an annotator may look at, in the order in which they should."""
        values = {"me": annotator, "now": time.time(), "needed": panel.needed}
        yield from (pair for pair, in self.db.execute(
            "SELECT pair FROM leases WHERE annotator = :me AND until >= :now", values))
        if annotator == panel.adjudicator:
            yield from (pair for pair, in self.db.execute(
                "SELECT pair FROM questions AS asked WHERE open AND (SELECT COUNT(DISTINCT annotator) FROM verdicts "
                "WHERE pair = asked.pair AND person) >= :needed ORDER BY step, pair", values))
        yield from (pair for pair, in self.db.execute(
            f"SELECT pair FROM questions AS asked WHERE open AND ({SEATS}) < :needed AND NOT EXISTS (SELECT 1 FROM verdicts "
            "WHERE pair = asked.pair AND annotator = :me AND person) ORDER BY step, pair", values))

    def hold(self, annotator, pair, seconds):
        """Lease this question to an annotator, whoever else has it."""
        self.db.execute("INSERT OR REPLACE INTO leases VALUES (?, ?, ?)", (pair, annotator, time.time() + seconds))

    def renew(self, annotator, pair, seconds, panel=Panel()):
        """Make an annotator's lease of an open question last this many seconds from now. Returns False if it is not their
        lease. A lease that has expired is still theirs until somebody else takes their place."""
        now = time.time()
        return self.db.execute(
            "UPDATE leases SET until = :until WHERE pair = :pair AND annotator = :me AND EXISTS (SELECT 1 FROM questions AS "
            f"asked WHERE pair = :pair AND (leases.until >= :now OR ({SEATS}) < :needed))",
            {"until": now + seconds, "pair": pair, "me": annotator, "now": now, "needed": panel.needed}).rowcount == 1

    def release(self, annotator, pair=None):
        """Give back an annotator's lease of a pair, or all of their leases."""
        self.db.execute("DELETE FROM leases WHERE annotator = ? AND pair = COALESCE(?, pair)", (annotator, pair))

    def answer_question(self, pair, label, annotator, seconds=None, cost=None, panel=Panel(), detail=None):
        """Keep what a person says about a question; label 0: without a preference. detail: "said", "comment" and
        "adjudicates" as in Opinion, each optional.

        The answer is what the panel decides by all opinions, until the run has used it: a second opinion that comes before
        that may change it. Returns whether this settled an open question. Raises KeyError if the pair was never asked.
        """
        with self.transaction():
            asked = self.db.execute("SELECT open FROM questions WHERE pair = ?", (pair,)).fetchone()
            if asked is None:
                raise KeyError(pair)
            self.add_verdict(pair, annotator, label, seconds, cost, json.dumps(detail) if detail else None, person=True)
            self.release(annotator, pair)
            self._settle(pair, panel)
            return bool(asked[0]) and pair not in self.unanswered([pair])

    def retract(self, pair, annotator, panel=Panel()):
        """Take back an annotator's own opinion, which may open the question again. Returns False if the run has used the
        answer, or if the annotator has given no opinion."""
        with self.transaction():
            if self.db.execute("SELECT 1 FROM answers WHERE pair = ? AND (used OR source != 'human')", (pair,)).fetchone():
                return False
            split = self.is_split(pair, panel)
            done = self.db.execute("DELETE FROM verdicts WHERE id = (SELECT MAX(id) FROM verdicts WHERE pair = ? "
                                   "AND annotator = ? AND person)", (pair, annotator))
            if done.rowcount:
                if split:  # who was about to decide is not one more of those that are asked
                    self.release(panel.adjudicator, pair)
                self._settle(pair, panel)
            return done.rowcount == 1

    def _settle(self, pair, panel):
        """Make the pair's answer what the panel decides, unless it comes from elsewhere or the run has used it."""
        there = self.db.execute("SELECT label, annotator, detail, used OR source != 'human' FROM answers WHERE pair = ?",
                                (pair,)).fetchone()
        if there and there[3]:
            return
        decided = panel.decide(self.opinions(pair))
        label, who, detail = decided or (None, None, None)
        detail = json.dumps(detail, sort_keys=True) if detail else None
        if there and decided and there[:3] == (label, who, detail):
            return
        if there:
            self.db.execute("DELETE FROM answers WHERE pair = ?", (pair,))
        if decided:
            asked = self.db.execute("SELECT margin, step, audit FROM questions WHERE pair = ?", (pair,)).fetchone()
            spent = self.db.execute("SELECT SUM(seconds), SUM(cost) FROM verdicts WHERE pair = ? AND person",
                                    (pair,)).fetchone()
            self.add("human", [(Question(pair, *asked), label, who, *spent)], detail=detail)

    def settle_all(self, panel):
        """Settle the open questions that have opinions, as another panel may have left them. Returns how many it settled."""
        with self.transaction():
            pairs = [pair for pair, in self.db.execute("SELECT pair FROM questions AS asked WHERE open AND EXISTS (SELECT 1 "
                                                       "FROM verdicts WHERE pair = asked.pair AND person)")]
            for pair in pairs:
                self._settle(pair, panel)
            return len(pairs) - len(self.unanswered(pairs))

    def last_opinion(self):
        """The number of the latest opinion of a person, whether or not it settled its question; None if there is none."""
        return self.db.execute("SELECT MAX(id) FROM verdicts WHERE person").fetchone()[0]

    def opinions(self, pair, decisions=True):
        """{annotator: Opinion} of the people who said something about a pair; of each, what they said last. decisions: take
        what an adjudicator decided for such, or go by what they had said on their own."""
        found = {}
        for who, label, detail in self.db.execute(
                "SELECT annotator, verdict, detail FROM verdicts WHERE pair = ? AND person ORDER BY id", (pair,)):
            opinion = Opinion(label, **json.loads(detail or "{}"))
            if decisions or not opinion.adjudicates:
                found[who] = opinion
        return found

    def is_split(self, pair, panel):
        """Whether a question waits for the adjudicator."""
        return (panel.adjudicator is not None and bool(self.unanswered([pair]))
                and len(self.opinions(pair)) >= panel.needed)

    def given_by(self, annotator):
        """(how many opinions a person has given, the pair of the last one or None)."""
        mine = "FROM verdicts WHERE annotator = ? AND person"
        last = self.db.execute(f"SELECT pair {mine} ORDER BY id DESC LIMIT 1", (annotator,)).fetchone()
        return self.db.execute(f"SELECT COUNT(*) {mine}", (annotator,)).fetchone()[0], last and last[0]

    # Verdicts: what annotators said, whether or not it became the answer.

    def add_verdict(self, pair, annotator, verdict, seconds=None, cost=None, detail=None, person=False):
        """Keep what an annotator said: 1, −1, or 0 for no preference. detail: JSON with what led to it.  person: whether it
        is a person's opinion, which counts towards the label."""
        self.db.execute("INSERT INTO verdicts (pair, annotator, verdict, seconds, cost, detail, at, person) "
                        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                        (pair, annotator, verdict, seconds, cost, detail, time.time(), person))

    def verdicts(self, pair, annotator):
        """[detail] of an annotator's verdicts on a pair that have one, oldest first."""
        return [detail for detail, in self.db.execute(
            "SELECT detail FROM verdicts WHERE pair = ? AND annotator = ? AND detail IS NOT NULL ORDER BY id",
            (pair, annotator))]

    def last_verdicts(self, annotator, count):
        """[detail] of an annotator's last verdicts that have one, newest first."""
        return [detail for detail, in self.db.execute(
            "SELECT detail FROM verdicts WHERE annotator = ? AND detail IS NOT NULL ORDER BY id DESC LIMIT ?",
            (annotator, count))]

    def spent(self, pair, annotator):
        """(seconds, cost) of all of an annotator's verdicts on a pair together. seconds is None if none of them is known,
        cost is None unless all are. A verdict with neither is not a request: it may say that a text was refused."""
        return self.db.execute(
            "SELECT SUM(seconds), CASE WHEN COUNT(cost) = COUNT(*) THEN SUM(cost) END FROM verdicts "
            "WHERE pair = ? AND annotator = ? AND COALESCE(seconds, cost) IS NOT NULL", (pair, annotator)).fetchone()

    def close(self):
        self.db.close()


def in_words(path, error):
    """An error of SQLite as a message to the user: the file, what is wrong and what to do."""
    advice = {"locked": "another process holds it: wait for that one, or close it", "full": "make room on its disk",
              "readonly": "make it and its folder writable", "unable to open": "look at its folder and its permissions",
              "not a database": "move it away", "malformed": "it is damaged: restore a copy, or move it away",
              "no such": "it is another file, or a copy without its labels.sqlite-wal: copy both"}
    todo = next((todo for word, todo in advice.items() if word in str(error)), "look at its disk, which may be full")
    return f"{path}: cannot be used as a ledger ({error}): {todo}"


def portions(ids, size=10_000):
    """Yield the ids in portions, each with its question marks for SQL: SQLite takes at most 32,766 parameters."""
    for start in range(0, len(ids), size):
        some = ids[start:start + size]
        yield some, ",".join("?" * len(some))
