"""The one way to a label: the loop asks here, and what comes back has been paid for.

    Oracle.answer(ids, margin, ask, step)     called by the loop, on all ranks together
        annotator.answer(questions, ledger)   the annotator gets the answers into the ledger, or raises Waiting
        Ledger                                SQLite: one row an answer, unique by pair, committed before it is used

A label that is not in the ledger does not exist for the loop. The oracle draws the audits and keeps the budget
`max_queries`, so the loop knows of neither.

A new annotator is a class like those in annotators.py and a name in ANNOTATORS (for a judge, in JUDGES).

Departures from the official code: there, each batch carries its labels and nobody is asked. Departures from the paper: an
answer is remembered, so in a second epoch no pair is asked twice; a share of the confident pairs can be asked as well
(audit_fraction), so that the error of the pseudo-labels is known.
"""

import contextlib
import hashlib
import math

import torch

from labels.annotators import DatasetAnnotator, HumanAnnotator, Waiting
from labels.judge import ChatJudge, judge_metrics
from labels.ledger import EVER, Ledger, LedgerError, Question
from labels.reward_model import RewardModelJudge
from runtime.errors import Stopped, UsageError
from runtime.ranks import from_rank_0, gather_to_rank_0, rank, say, scatter_from_rank_0, world_size

ANNOTATORS = {"dataset": DatasetAnnotator, "human": HumanAnnotator}  # by the key `oracle`
JUDGES = {"chat": ChatJudge, "reward_model": RewardModelJudge}  # by the key `judge`, where `oracle` is judge


def annotator_class(config):
    """The class that answers under this config."""
    return JUDGES[config.judge] if config.oracle == "judge" else ANNOTATORS[config.oracle]


def drawn(what):
    """A random whole number under 2**64 that depends on this text alone, so that a resumed run draws the same."""
    return int.from_bytes(hashlib.blake2b(what.encode(), digest_size=8).digest(), "big")


def is_audited(pair, fraction, seed):
    """Whether a pair belongs to the random share that is asked however confident the policy is."""
    return drawn(f"audit {seed} {pair}") < fraction * 2**64


def wilson(successes, trials, z=1.96):
    """Wilson's interval of a share (95 % at z = 1.96), which also holds for few trials and for shares near 0 and 1
    (Wilson 1927; Brown, Cai, DasGupta 2001). Without trials, (0, 1)."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / (1 + z * z / trials)
    return max(0.0, centre - half), min(1.0, centre + half)


class Oracle:
    """Answers the questions of all ranks. Every rank makes one; only rank 0 holds the annotator and the ledger.

    annotator: None on ranks other than 0.  path: the ledger's file.  run: the Run whose progress bar shows missing answers,
    whose Ctrl-C ends at once the wait for an annotator who can take hours, and whose tokens_per_second leave out that wait;
    None outside of a run.
    state: the counts that a checkpoint keeps.
    """

    def __init__(self, annotator, path, config, run=None):
        self.annotator = annotator if rank() == 0 else None
        self.ledger = Ledger(path) if rank() == 0 else None
        self.config, self.run = config, run
        self.untimed = run.untimed if run else contextlib.nullcontext
        self.about = self.annotator.about if self.annotator else {}  # for the summary
        if run and self.annotator:
            self.annotator.show = run.show_missing
        self.asks_together = annotator_class(config).asks_together
        # Ctrl-C ends a wait for people or a judge. An annotator who answers at once is left to finish the step.
        self.waiting = run.interrupt.at_once if run and self.asks_together else contextlib.nullcontext
        self.unasked = []  # (pair id, pseudo-label) of this rank and step
        self.step = -1  # the last one that has asked
        self.state = {"answers": 0, "pseudo_labels": 0, "pseudo_right": 0, "pseudo_known": 0, "budget_spent_at_step": None,
                      "warned_of_audit": False}

    def check_ledger(self, ids):
        """Report answers that came from other runs; raise LedgerError where the ledger belongs to a run on other pairs, or
        to an annotator that was asked something else, or has lost answers since the checkpoint.
        ids: all pairs that the run can ask for."""
        if self.ledger and self.run.before:
            self.check_nothing_is_lost(self.run.before)
        reused, of_ours = self.ledger.check_pairs(ids) if self.ledger else (0, 0)
        if reused:
            say(f"{reused:,} answers of other runs are in the ledger, {of_ours:,} of them of pairs of this run")
        if self.annotator:
            self.annotator.check(self.ledger)

    def check_nothing_is_lost(self, before):
        """A run that went on without the answers that it has used would count too few, and pay for them again.
        before: the state in the checkpoint that it goes on from."""
        bought, there = before["oracle"].get("answers", 0), self.ledger.count(before["step"] - 1)
        if there < bought:
            self.close()  # so that nothing of it lies beside the file that is brought back
            raise LedgerError(
                f"{self.ledger.path}: holds {there:,} of the {bought:,} answers that {self.run.checkpoint} was trained on: "
                "bring back the whole ledger (labels.sqlite and, if there is one, labels.sqlite-wal), or choose another "
                "output_dir to pay for all labels again")

    def asks_ahead(self, pairs):
        """Whether to ask all questions of a step at once, before the loop trains on any of its pairs: for people and judges,
        and where the budget may end within the step, because its last labels go to the least sure pairs. All ranks call it
        together.  pairs: how many the step has."""
        if self.config.label_budget:  # everything has been asked
            return False
        if self.asks_together or self.config.max_queries is None:
            return self.asks_together
        return 0 < from_rank_0(self.budget_left() if self.ledger else None) < pairs

    def budget_left(self):
        """How many labels max_queries still allows, on rank 0. Those bought after a resumed run's checkpoint count too."""
        return max(0, self.config.max_queries - self.ledger.count())

    def answer(self, ids, margin, ask, step):
        """Algorithm 2, the answers. All ranks call it together, each with its own pairs.

        ids: B pair ids, None for a filler.  margin, ask: (B,) on the CPU.  step: the optimiser step, from 0.
        Besides the pairs in `ask`, the audited ones are asked.
        Returns (B,): +1 or −1 where the pair has been asked, now or ever, and NaN where the answer was that neither response
        is preferred; 0 where it has not been asked, or where the budget is spent.
        Raises Waiting, on all ranks, where the annotator has not answered, UsageError where it never can.
        """
        self.step, fraction, seed = step, self.config.audit_fraction, self.config.seed
        audit = torch.tensor([id is not None and is_audited(id, fraction, seed) for id in ids]) & ~ask
        gathered = gather_to_rank_0(list(zip(ids, margin.tolist(), (ask | audit).tolist(), audit.tolist())))
        answers = None
        if rank() == 0:
            try:
                known = self._answers([item for part in gathered for item in part if item[0] is not None], step)
                answers = [[known.get(item[0], 0.0) for item in part] for part in gathered]
            except KeyboardInterrupt:  # just before or after the annotator's own work, which reports how far it got
                answers = [Stopped("interrupted")] * world_size()
            except Waiting as waiting:  # the other ranks have to hear of it too
                answers = [waiting] * world_size()
            except (ValueError, LookupError) as error:  # a pair that can never be answered
                answers = [UsageError(str(error))] * world_size()
        mine = scatter_from_rank_0(answers)
        if isinstance(mine, Exception):
            raise mine
        return torch.tensor(mine)

    def _answers(self, items, step):
        """{pair: label} of the pairs that have an answer, after asking about those in `items` that are to be asked; NaN: no
        preference.  items: [(pair, margin, whether to ask, whether as an audit)].

        A run that resumes from an earlier checkpoint meets pairs about which it once asked at a later step. Such a label is
        not bought again, but unless the gate asks for it, it is only used from that step on, as in an undisturbed run.
        """
        known = self.ledger.take([pair for pair, _, ask, _ in items if ask])
        known |= self.ledger.take([pair for pair, _, ask, _ in items if not ask], step)
        new = {pair: Question(pair, margin, step, audit) for pair, margin, ask, audit in items if ask and pair not in known}
        questions = list(new.values())
        if self.config.max_queries is not None:
            left = self.budget_left()
            if left < len(questions):  # the least sure pairs are worth most
                questions = sorted(questions, key=lambda q: (q.audit, abs(q.margin), q.pair))[:left]
                if self.state["budget_spent_at_step"] is None:
                    self.state["budget_spent_at_step"] = step
            elif questions:  # it was spent once, and the run went on with a larger one
                self.state["budget_spent_at_step"] = None
        while questions:  # more than once where somebody takes an answer back just before it is used
            with self.untimed(), self.waiting():
                self.annotator.answer(questions, self.ledger)
            known |= self.ledger.take([q.pair for q in questions])
            questions = [q for q in questions if q.pair not in known]
        return {pair: label or math.nan for pair, label in known.items()}

    def count_pseudo_labels(self, ids, labels, answers):
        """Note which pairs of a micro-batch are trained on with a pseudo-label.  labels, answers: (B,)."""
        self.unasked += [(id, 1 if label > 0 else -1)
                         for id, label, answer in zip(ids, labels.tolist(), answers.tolist()) if id and label and not answer]

    def end_step(self):
        """Count the answers so far, and count and grade the step's pseudo-labels. All ranks call it together. It returns
        nothing, so that the loop learns no label from it."""
        for part in gather_to_rank_0(self.unasked) or ():
            right, known = self.annotator.grade(part)
            self.state["pseudo_labels"] += len(part)
            self.state["pseudo_right"] += right
            self.state["pseudo_known"] += known
        self.state["answers"] = self.queries(self.step)
        self.unasked = []

    def queries(self, step=EVER):
        """Labels bought up to and including a step, over all ranks. Known to rank 0; 0 on the others."""
        return self.ledger.count(step) if self.ledger else 0

    def without_preference(self, step=EVER):
        """How many of the answers that `queries` counts have no preference."""
        return self.ledger.without_preference(step) if self.ledger else 0

    def judge_metrics(self, step=EVER):
        """judge.judge_metrics of the answers that `queries` counts. Empty without a judge, and on ranks other than 0."""
        return judge_metrics(self.ledger.details(step)) if self.ledger and self.config.oracle == "judge" else {}

    def audit(self, step=EVER):
        """What the audited pairs up to a step say about the pseudo-labels. Known to rank 0.

        Returns None without audits, else {"audited": how many, "accuracy": on which share sign(margin) agrees with the
        annotator, "interval": its 95 % interval, "predicted": the share that confidence predicts, the mean of σ(|m|)}.
        """
        pairs = self.ledger.audits(step) if self.ledger else []
        if not pairs:
            return None
        right = sum((margin > 0) == (label > 0) for margin, label in pairs)
        predicted = sum(1 / (1 + math.exp(-min(abs(margin), 700))) for margin, _ in pairs) / len(pairs)
        return {"audited": len(pairs), "accuracy": right / len(pairs), "interval": wilson(right, len(pairs)),
                "predicted": predicted}

    def close(self):
        if self.ledger:
            self.ledger.close()
