"""Who answers the run's questions: the labels that came with the data set, or people. Judges are in labels/judge.py.

An annotator is a subclass of Annotator; labels/oracle.py lists them by the names that the config uses.

    Annotator.from_config(config, pairs, labels, truths)     how the run makes one, on rank 0
    annotator.answer(questions, ledger)                      commit the answers to the ledger, or raise Waiting
    annotator.grade(labelled)                                how many of the pseudo-labels are right, if it knows

    deepspeed train.py --config … --oracle dataset
    deepspeed train.py --config … --oracle human --oracle_wait_minutes 60      people answer through tools/label.py
"""

import abc
import shlex
import time
from pathlib import Path

from labels.ledger import LedgerError
from runtime.errors import Stopped


class Waiting(Stopped):
    """The annotator has not answered everything yet; the message says why. What it has answered is in the ledger."""


class Annotator(abc.ABC):
    """The interface of an annotator. The class attributes are read on every rank; an instance exists on rank 0 alone."""

    name = None  # the source of its answers in the ledger
    asks_together = True  # ask all questions of an optimiser step at once, before training on it
    needs = ()  # config keys that have to be set
    about = {}  # what summary.json says about it
    # Called with the number of missing answers and, for people, with the command that opens the page; the run shows both.
    show = staticmethod(lambda missing, how="": None)
    check = staticmethod(lambda ledger: None)  # raises LedgerError if its answers must not be mixed with those in the ledger

    @classmethod
    @abc.abstractmethod
    def from_config(cls, config, pairs, labels, truths):
        """Make an annotator for a run.

        pairs: the training pairs (data.Pairs).  labels: {pair id: ±1} that came with the data.  truths: the same without
        noise, where the data has it. Raises UsageError if the config does not work.
        """

    @abc.abstractmethod
    def answer(self, questions, ledger):
        """Commit an answer to the ledger for every Question, or raise Waiting. Raises ValueError, naming the pair, for a
        question that can never be answered."""

    def grade(self, labelled):
        """(right, known) of [(pair id, label)]: labels that are right, pairs whose true label is known. Most know none."""
        return 0, 0


class DatasetAnnotator(Annotator):
    """Answers with the labels that the data set came with. Nothing else in the run holds them.

    labels: {pair id: +1 (y1 preferred) or −1}.  truths: the same without label noise, where the data has it
    (runtime/toy.py); used to grade pseudo-labels, never to answer.
    """

    name = "dataset"
    asks_together = False  # it answers at once, so a question need not wait for the rest of its step

    def __init__(self, labels, truths=None):
        self.labels, self.truths, self.calls = labels, truths or {}, 0

    @classmethod
    def from_config(cls, config, pairs, labels, truths):
        return cls(labels, truths)

    def check(self, ledger):
        """Refuse to go on from labels that the data set no longer has: it would be a run on both."""
        bought = ledger.labels(self.name)
        if changed := [pair for pair, label in bought.items() if self.labels.get(pair, label) != label]:
            raise LedgerError(f"{ledger.path}: {len(changed):,} of its {len(bought):,} answers are not the labels that the "
                              f"data set has now ({changed[0]} is the first): put the data set back as it was, or choose "
                              "another output_dir")

    def answer(self, questions, ledger):
        """Raises LookupError, naming the pair, if one has no label."""
        self.calls += len(questions)
        missing = [q.pair for q in questions if q.pair not in self.labels]
        if missing:
            raise LookupError(f"pair {missing[0]} has no label in the data set ({len(missing)} of {len(questions)} asked)")
        ledger.add(self.name, [(q, self.labels[q.pair], "", None, None) for q in questions], used=True)

    def grade(self, labelled):
        known = [label == self.truths[id] for id, label in labelled if id in self.truths]
        return sum(known), len(known)


class HumanAnnotator(Annotator):
    """People, who answer through the ledger (tools/label.py) whenever they get to it.

    texts: function from a pair id to (prompt, first, second) as JSON, for the page.  wait_minutes: how long to wait for
    the next answer.
    """

    name = "human"
    poll_seconds = 0.5

    def __init__(self, texts, wait_minutes):
        self.texts, self.wait_seconds = texts, 60 * wait_minutes

    @classmethod
    def from_config(cls, config, pairs, labels, truths):
        return cls(pairs.text_by_id(), config.oracle_wait_minutes)

    def answer(self, questions, ledger):
        """Ask the questions and wait until all are answered. Raises Waiting after wait_minutes in which nobody has answered
        any question, or on Ctrl-C; the questions stay open."""
        ids, last, since = [q.pair for q in questions], None, time.monotonic()
        missing, page = len(ids), f"python tools/label.py {shlex.quote(str(Path(ledger.path).parent))}"
        try:
            ledger.put_questions(questions, {q.pair: self.texts(q.pair) for q in questions})
            while missing := len(ledger.unanswered(ids)):
                # Where several people are asked about each pair, they may work for hours before one is settled.
                if (news := (missing, ledger.last_opinion())) != last:
                    last, since = news, time.monotonic()
                    self.show(missing, page)
                if time.monotonic() - since >= self.wait_seconds:
                    raise Waiting(f"no answer for {self.wait_seconds / 60:g} minutes, {missing} of {len(ids)} are missing; "
                                  f"people answer with `{page}`")
                time.sleep(self.poll_seconds)
        except KeyboardInterrupt:
            raise Waiting(f"interrupted, {missing} of {len(ids)} answers are missing; people answer with `{page}`")
        self.show(0)
