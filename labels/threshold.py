"""Whom to ask: the threshold γ of the gate, and which labelled pairs fill the places of those that are not asked.

    FixedGamma    gate: paper        ask where |m| ≤ γ                                   Algorithm 2
    Calibrated    gate: calibrated   ask where a·|m| ≤ γ: where the annotator would agree with a chance of at most σ(γ)
    Budget        target_queries,    ask so many pairs of each step that the budget lasts to the end: the least sure ones or,
                  target_query_fraction   with budget_selection: random, any
    Nobody        pseudo_labels:     ask about no pair: a committee has bought all labels before (labels/committee.py)
                  committee
    Replay        pseudo_labels:     with any of them: a pair that is not asked gives its place in the step to the labelled
                  replay             pair that was trained on longest ago

A new way to choose is one class like these and its name in THRESHOLDS.

Departures from the paper and from the official code: everything but FixedGamma; docs/method.md tells why, and what it
brings. Whatever is learned comes from the ledger and is a function of the optimiser step, so a resumed run decides as an
undisturbed one does.
"""

import math
from collections import OrderedDict, deque
from itertools import accumulate, groupby, islice

import torch

from labels.oracle import drawn
from runtime.ranks import from_rank_0, gather_to_rank_0, say
from runtime.schedule import learning_rate

WINDOW = 1024  # labels that the scale is fitted to
FEWEST = 64  # with fewer labels than this, everything is asked
AUDITS = 20  # with fewer audited pairs than this, the collapse guard is silent


def bought(oracle, schedule, first, last):
    """[(step, [(pair, label, margin, step, audit)])] of the labels bought at the steps from `first` to `last`, in an order
    that does not depend on when they arrived. Step −1 holds the labels that came from other runs. Rank 0 only."""
    ids = None
    if first == last >= 0:  # naming the step's pairs spares reading the whole ledger
        ids = [schedule.pairs.ids[row] for row in schedule.rows(last)]
    by_step = {step: list(rows) for step, rows in groupby(oracle.ledger.labels(first, last, ids), lambda row: row[3])}
    return [(step, by_step.get(step, [])) for step in range(first, last + 1)]


class FixedGamma:
    """The paper's rule: γ is a constant. All ranks make one and call its methods together.

    gamma: for adpo.gate, in units of reward, the same on all ranks.  state: what a checkpoint keeps.
    looks_ahead: whether a step's questions are asked together, before its first micro-batch.
    """

    plans = False  # whether γ is set again at each step, from the margins of all its pairs

    def __init__(self, config, oracle, schedule):
        self.config, self.oracle, self.schedule = config, oracle, schedule
        self.gamma = config.gamma if config.data_selection else float("inf")  # plain DPO asks for every pair
        replays = config.data_selection and (
            config.pseudo_labels == "replay" or config.pseudo_labels == "committee" and schedule.pairs.opinions is None)
        self.replay = Replay(oracle, schedule) if replays else None
        self.looks_ahead = oracle.asks_together or self.plans or replays
        self.state = {}

    def advance(self, step):
        """Before a step: learn from the labels bought up to the step before."""

    def scores(self, margin, ids, step):
        """What the gate reads of each pair: its margin.  margin: (B,).  ids: None for a filler.  Returns (B,)."""
        return margin

    def plan(self, ids, scores, step):
        """When all scores of a step are known: set γ for it.  ids, scores: this rank's pairs, None for a filler."""

    def rows_to_train(self, rows, step):
        """The rows to train on, once the step's answers are known."""
        return self.replay.fill(step) if self.replay else rows

    def opinions(self, rows):
        """What the committee says about these pairs, (B,), with 0 for a filler. None if the run does not use one."""
        every = self.schedule.pairs.opinions
        return None if every is None else every[rows] if rows else torch.zeros(1)

    def metrics(self):
        """What a row of metrics reports about a threshold that is not the paper's."""
        return {}


class Nobody(FixedGamma):
    """Asks about no pair: a committee has bought all labels before the first step (labels/committee.py)."""

    def __init__(self, config, oracle, schedule):
        super().__init__(config, oracle, schedule)
        self.gamma = -1.0


class Calibrated(FixedGamma):
    """γ on a scale that is learned: σ(a·|m|) is the chance that the annotator agrees with the policy, and a pair is asked
    where that is at most σ(γ).

    a is fitted online to the last WINDOW labels and taken one standard error below the fit; audited pairs count for all
    those that were not asked. Where audited pairs agree clearly less than σ(a·|m|) predicts, the collapse guard raises γ
    by half.
    """

    def __init__(self, config, oracle, schedule):
        super().__init__(config, oracle, schedule)
        self.scale, self.scaled_gamma = 1.0, config.gamma  # a·|m| ≤ scaled_gamma
        self.recent, self.learned = deque(maxlen=WINDOW), -1  # (margin, label, audit); the last step in it
        self.state = {"guard": 1.0, "guarded_until": 0}  # γ's factor; the step from which audits count

    def advance(self, step):
        if self.oracle.ledger:
            for at, labels in bought(self.oracle, self.schedule, self.learned + 1, step - 1):
                self.recent.extend((margin, label, audit) for _, label, margin, _, audit in labels)
                self.learned = at
            self.scale = self._fit()
            self._guard(step)
        self.scale, self.state = from_rank_0((self.scale, self.state))
        self.scaled_gamma = self.config.gamma * self.state["guard"]
        self.gamma = self.scaled_gamma / self.scale if self.scale else float("inf")

    def _fit(self):
        """a, one standard error below the fit; 0, so that everything is asked, while there are too few labels."""
        if len(self.recent) < FEWEST:
            return 0.0
        margin, label, audit = (torch.tensor(column) for column in zip(*self.recent))
        weights = torch.where(audit > 0, 1 / self.config.audit_fraction, 1.0)
        a, error = fit_scale(margin, label, weights)
        return max(0.0, a - error)

    def _guard(self, step):
        """Raise γ by half where the pairs audited since the last time agree less than predicted, past the 95 % interval."""
        audit = self.oracle.audit(step - 1, self.state["guarded_until"], self.scale)
        if not self.scale or not audit or audit["audited"] < AUDITS or audit["interval"][1] >= audit["predicted"]:
            return
        self.state |= {"guard": 1.5 * self.state["guard"], "guarded_until": step}
        say(f"WARNING: step {step:,}: of {audit['audited']} audited pairs {audit['accuracy']:.1%} agree with the annotator, "
            f"where the gate expects {audit['predicted']:.1%}: gamma is raised to "
            f"{self.config.gamma * self.state['guard']:.3g}")

    def metrics(self):
        return {"gate_gamma": self.scaled_gamma, "gate_scale": self.scale}


def fit_scale(margin, answers, weights):
    """Calibration: (a, its standard error), where σ(a·m) is the chance that the annotator prefers y1.

    a ≥ 0 maximises Σ w log σ(a·m·o), the weighted log-likelihood of the labels bought (logistic regression through the
    origin). An overconfident policy gets a < 1, a timid one a > 1.

    margin: (n,), the policy's when it asked.  answers: (n,), ±1.  weights: (n,), one over the chance with which such a pair
    was asked, so that the audited pairs count for all the confident ones.
    """
    z, w = (margin * answers).double(), weights.double()  # (n,)  m·o
    a = torch.zeros((), dtype=torch.float64)
    for _ in range(50):  # Newton's method; the likelihood is concave
        wrong = torch.sigmoid(-a * z)  # (n,)
        slope, curvature = (w * z * wrong).sum(), (w * z * z * wrong * (1 - wrong)).sum() + 1e-9
        step = (slope / curvature).clamp(-1, 1)
        a = (a + step).clamp(min=0)
        if step.abs() < 1e-6:
            break
    wrong = torch.sigmoid(-a * z)
    curvature = (w * z * z * wrong * (1 - wrong)).sum() + 1e-9
    return a.item(), ((w * z * wrong).square().sum().sqrt() / curvature).item()  # sandwich estimate: w are not counts


def labels_to_buy(config, schedule):
    """The number of labels that a budget asks for."""
    return config.target_queries or round(config.target_query_fraction * schedule.pairs_seen())


class Budget(FixedGamma):
    """A number of labels in place of γ: each step asks its least sure pairs, so many that the labels last to the end.

    A step's share is in proportion to what a label is worth then: the learning rates of the steps that train on it, its own
    and, with replay, all later ones. With budget_selection random, a step asks as many pairs, whatever their margins: the
    gate reads random numbers.
    """

    plans = True

    def __init__(self, config, oracle, schedule):
        super().__init__(config, oracle, schedule)
        self.labels = labels_to_buy(config, schedule)
        rates = [learning_rate(step, schedule.total_steps, config) for step in range(schedule.total_steps)]
        worth = list(accumulate(rates[::-1]))[::-1] if config.pseudo_labels == "replay" else rates
        self.worth = [max(w, 1e-9 * max(rates)) for w in worth]  # never 0, although a warm-up starts there
        pairs = [min(schedule.step_pairs, len(schedule.pairs) - step % schedule.epoch_steps * schedule.step_pairs)
                 for step in range(schedule.total_steps)]
        # Σ worth over the pairs of each step and all later ones.
        self.worth_left = list(accumulate((w * n for w, n in zip(self.worth[::-1], pairs[::-1])), initial=0.0))[::-1]

    def unlabelled_left(self, step, bought):
        """About how many pairs without a label will come from this step on, each weighted by what its label would be worth
        compared with one of this step.  bought: labels so far."""
        second_epoch = min(max(step, self.schedule.epoch_steps), self.schedule.total_steps)
        first, later = self.worth_left[step] - self.worth_left[second_epoch], self.worth_left[second_epoch]
        return (first + later * (1 - bought / len(self.schedule.pairs))) / self.worth[step]

    def scores(self, margin, ids, step):
        if self.config.budget_selection == "least_sure":
            return margin
        draws = [drawn(f"budget {self.config.seed} {step} {pair}") % 2**24 for pair in ids]  # fp32 tells them apart
        return 0 * margin + torch.tensor(draws)  # not a number where the margin is none

    def plan(self, ids, scores, step):
        gathered = gather_to_rank_0(list(zip(ids, scores)))
        if gathered is not None:
            items = {pair: abs(score) for part in gathered for pair, score in part if pair is not None}
            unasked = sorted(items[pair] for pair in self.oracle.ledger.unanswered(list(items), before=step))
            bought = self.oracle.queries(step - 1)
            share = min(1.0, (self.labels - bought) / max(1.0, self.unlabelled_left(step, bought)))
            audited = self.config.audit_fraction  # of the pairs that are not asked; audits cost too
            asked = round((share - audited) / (1 - audited) * len(unasked)) if audited < 1 else 0
            asked = max(asked, 1) if not bought else asked  # the first step needs something to train on
            self.gamma = unasked[asked - 1] if unasked and asked > 0 else -1.0
        self.gamma = from_rank_0(self.gamma)

    def metrics(self):
        return {"gate_gamma": self.gamma if self.config.budget_selection == "least_sure" else math.nan, "gate_scale": 1.0}


THRESHOLDS = {"paper": FixedGamma, "calibrated": Calibrated}  # by the key `gate`


def make_threshold(config, oracle, schedule):
    """The threshold under this config. A target of labels means a budget; plain DPO needs none of this."""
    if not config.data_selection:
        kind = FixedGamma
    elif config.pseudo_labels == "committee":
        kind = Nobody
    elif config.target_queries is not None or config.target_query_fraction is not None:
        kind = Budget
    else:
        kind = THRESHOLDS[config.gate]
    return kind(config, oracle, schedule)


class Replay:
    """Labelled pairs take turns: those trained on longest ago fill the places of a step's pairs that have no label.

    What it remembers lives on rank 0.
    """

    def __init__(self, oracle, schedule):
        self.oracle, self.schedule = oracle, schedule
        self.row_of = {id: row for row, id in enumerate(schedule.pairs.ids)}
        self.pool, self.turned = OrderedDict(), -2  # labelled rows, longest ago first; the last step that took its turn

    def fill(self, step):
        """The rows to train on at a step whose labels have been bought: its labelled pairs, then others from the pool."""
        chosen = None
        if self.oracle.ledger:  # a resumed run catches up on all earlier steps here
            for at, labels in bought(self.oracle, self.schedule, self.turned + 1, step):
                self.pool.update((self.row_of[pair], None) for pair, *_ in labels if pair in self.row_of)
                chosen = self._take_turns(self.schedule.rows(at)) if at >= 0 else None
                self.turned = at
        return from_rank_0(chosen)

    def _take_turns(self, rows):
        """Of these rows, those that have a label; then, up to as many, the pairs that were trained on longest ago."""
        chosen = {row: None for row in rows if row in self.pool}
        waiting = (row for row in self.pool if row not in chosen)
        chosen = [*chosen, *islice(waiting, len(rows) - len(chosen))]
        for row in chosen:
            self.pool.move_to_end(row)
        return chosen
