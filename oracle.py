"""Who answers a query, and the ledger that remembers every answer.

    Oracle.answer(ids, margins, ask)      what the loop calls; over all ranks together
        Ledger                            SQLite: one row an answer, unique by pair, committed before it is used
        annotator.label(ids)              who is asked: here DatasetAnnotator; anything with its two methods will do

A label that is not in the ledger does not exist for the loop: what a run reports as queries is the number of rows here.

Departures from the official code: there, each batch carries its labels and nobody is asked. Departure from the paper: an
answer is remembered, so that in a second epoch no pair is asked twice.

Look at a ledger with `sqlite3 OUTPUT_DIR/labels.sqlite 'select * from answers limit 5'`.
"""

import sqlite3
import time

import torch.distributed as dist


class DatasetAnnotator:
    """Answers from labels that the data set came with. It alone holds them.

    labels: {pair id: +1 (y1 preferred) or −1}.  truths: the same without an annotator's mistakes, where the data has it
    (toy.py); used to grade pseudo-labels, never to answer.
    """

    name = "dataset"

    def __init__(self, labels, truths=None):
        self.labels, self.truths, self.calls = labels, truths or {}, 0

    def label(self, ids):
        """One label (+1 or −1) for each pair id, in order. Raises LookupError, naming the pair, for one without a label."""
        self.calls += len(ids)
        missing = [id for id in ids if id not in self.labels]
        if missing:
            raise LookupError(f"pair {missing[0]} has no label in the data set ({len(missing)} of {len(ids)} asked)")
        return [self.labels[id] for id in ids]

    def grade(self, labelled):
        """(right, known): of these (pair id, label), how many agree with the truth, and of how many the truth is known."""
        known = [label == self.truths[id] for id, label in labelled if id in self.truths]
        return sum(known), len(known)


class Ledger:
    """Every answer of a run, in SQLite. One row a pair: the primary key makes paying twice impossible."""

    SCHEMA = """
        CREATE TABLE IF NOT EXISTS answers (
            pair TEXT PRIMARY KEY,                            -- pair id: hash of the pair's content
            label INTEGER NOT NULL CHECK (label IN (1, -1)),  -- 1: y1 preferred, -1: y2 preferred
            source TEXT NOT NULL,                             -- who answered
            margin REAL,                                      -- the policy's margin when it asked, in units of reward
            step INTEGER NOT NULL,                            -- optimiser step that asked, from 0
            answered_at REAL NOT NULL                         -- seconds since 1970
        ) WITHOUT ROWID;
        CREATE INDEX IF NOT EXISTS answers_by_step ON answers (step);
    """

    def __init__(self, path):
        self.path = path
        self.db = sqlite3.connect(path, timeout=60)
        self.db.execute("PRAGMA journal_mode = WAL")  # others may read and write while a run is on
        self.db.execute("PRAGMA synchronous = FULL")  # a committed answer survives a power cut
        self.db.executescript(self.SCHEMA)

    def lookup(self, ids):
        """{pair id: label} of those of the ids that have an answer."""
        found = {}
        for start in range(0, len(ids), 10_000):  # SQLite takes at most 32,766 parameters
            some = ids[start:start + 10_000]
            marks = ",".join("?" * len(some))
            found.update(self.db.execute(f"SELECT pair, label FROM answers WHERE pair IN ({marks})", some))
        return found

    def add(self, rows):
        """Commit answers: (pair, label, source, margin, step) each. All or none."""
        now = time.time()
        with self.db:
            self.db.executemany("INSERT INTO answers VALUES (?, ?, ?, ?, ?, ?)", [(*row, now) for row in rows])

    def count(self, step=None):
        """Answers bought up to and including an optimiser step (or all). Counted by step, not by row, so that a run that
        is resumed from an earlier step reports again what it reported then."""
        where, args = ("", ()) if step is None else (" WHERE step <= ?", (step,))
        return self.db.execute("SELECT COUNT(*) FROM answers" + where, args).fetchone()[0]

    def close(self):
        self.db.close()


class Oracle:
    """The one way to a label. Every rank makes one; rank 0 alone holds the annotator and the ledger.

    annotator: has `name`, `label(ids)` and `grade(labelled)`; None on ranks other than 0.  path: the ledger's file.
    """

    def __init__(self, annotator, path):
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world = dist.get_world_size() if dist.is_initialized() else 1
        # Pair ids are host data: they go over gloo, past the GPUs.
        self.group = dist.new_group(backend="gloo") if self.world > 1 else None
        self.annotator = annotator if self.rank == 0 else None
        self.ledger = Ledger(path) if self.rank == 0 else None
        self.pseudo = {"labels": 0, "right": 0, "known": 0}  # what was trained on unasked, and how much of it was right

    def answer(self, ids, margins, ask, step):
        """Labels of one micro-batch. All ranks call it together, each with pairs of its own.

        ids: pair ids, None for a filler.  margins: floats.  ask: bools, the gate's verdict.  step: optimiser step.
        Returns a list: +1 or −1 where the pair was asked, now or ever; 0 where it was not.
        """
        mine = list(zip(ids, margins, ask))
        if self.world == 1:
            return self._answer(mine, step)
        gathered = [None] * self.world if self.rank == 0 else None
        dist.gather_object(mine, gathered, dst=0, group=self.group)
        answers = None
        if self.rank == 0:
            flat = self._answer([item for part in gathered for item in part], step)
            starts = [sum(map(len, gathered[:r])) for r in range(self.world)]
            answers = [flat[start:start + len(part)] for start, part in zip(starts, gathered)]
        received = [None]
        dist.scatter_object_list(received, answers, src=0, group=self.group)
        return received[0]

    def _answer(self, items, step):
        margin_of = {id: margin for id, margin, _ in items if id is not None}
        known = self.ledger.lookup(list(margin_of))
        new = list(dict.fromkeys(id for id, _, ask in items if ask and id is not None and id not in known))
        if new:
            labels = self.annotator.label(new)
            self.ledger.add([(id, label, self.annotator.name, margin_of[id], step) for id, label in zip(new, labels)])
            known.update(zip(new, labels))
        return [known.get(id, 0) for id, _, _ in items]

    def report_pseudo(self, unasked):
        """Tell the oracle which pairs are trained on with a pseudo-label, so that it can count and grade them.

        unasked: [(pair id, ±1)]. All ranks call it together, once an optimiser step. Nothing comes back: the loop learns
        no label by it.
        """
        parts = [unasked]
        if self.world > 1:
            parts = [None] * self.world if self.rank == 0 else None
            dist.gather_object(unasked, parts, dst=0, group=self.group)
        for part in parts or ():
            right, known = self.annotator.grade(part)
            self.pseudo["labels"] += len(part)
            self.pseudo["right"] += right
            self.pseudo["known"] += known

    def queries(self, step=None):
        """Labels bought, over all ranks (rank 0; elsewhere None)."""
        return self.ledger.count(step) if self.ledger else None

    def close(self):
        if self.ledger:
            self.ledger.close()
