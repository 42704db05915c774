"""The threshold of the gate, where it is not the paper's fixed γ: calibrated by the labels bought, or led by a budget.

    gate: paper                 ask where |m| ≤ γ                                       Algorithm 2; nothing here is used
    gate: calibrated            ask where a·|m| ≤ γ: where the annotator would agree with a chance of at most σ(γ)
    target_query_fraction,      ask the least sure pairs of each step, so many that the budget lasts to the end
    target_queries
    pseudo_labels: replay       a pair that is not asked gives its place in the step to one whose label is there already,
                                the one that was trained on longest ago

A step's share of a budget is in proportion to what a label is worth then (Schedule.label_worth): the learning rates of the
steps that train on it.

a is fitted online (adpo.fit_scale) to the last 1,024 labels that the run bought. Audited pairs, the random share of the
confident ones that is asked anyway, count for all that were not asked; a is taken one standard error lower than the fit.
Where the audited pairs agree clearly less than σ(a·|m|) says (the collapse guard), γ is raised by half and the run says so.

Departures from the paper and from the official code: all of it; docs/method.md tells why, and what it brings. Every number
comes from the ledger and is a function of the optimiser step, so that a resumed run decides as the undisturbed one did.
"""

from collections import OrderedDict, deque
from itertools import groupby, islice

import torch

import adpo

WINDOW = 1024  # labels that the scale is fitted to
FEWEST = 64  # labels before which everything is asked
AUDITS = 20  # audited pairs before which the guard says nothing


class Gate:
    """All ranks make one and call its methods together; what it learns from is on rank 0.

    scale, gamma: of adpo.gate, the same on all ranks, set by `advance` and `follow`.
    """

    def __init__(self, config, asker, pairs, schedule, step):
        """pairs: ids of the training pairs.  step: optimiser step that the run begins with."""
        self.config, self.asker, self.schedule = config, asker, schedule
        self.calibrated = config.data_selection and config.gate == "calibrated"
        self.budget = None  # labels to buy in all
        if config.data_selection and config.target_query_fraction is not None:
            self.budget = round(config.target_query_fraction * schedule.pairs_seen())
        elif config.data_selection:
            self.budget = config.target_queries
        self.replays = config.pseudo_labels == "replay" and config.data_selection
        self.looks_ahead = asker.asks_together or self.budget is not None or self.replays
        self.scale, self.gamma = 1.0, config.gamma if config.data_selection else float("inf")
        self.ids, self.rows = pairs, {id: row for row, id in enumerate(pairs)}
        self.recent = deque(maxlen=WINDOW)  # (margin, label, audited)
        self.pool = OrderedDict()  # rows that have a label, the one trained on longest ago first
        self.learned = step - 1  # the last step whose labels are in both
        if asker.ledger and (self.calibrated or self.replays):
            bought = {at: list(those) for at, those in groupby(asker.ledger.labels(-1, step - 1), lambda row: row[3])}
            for at in range(-1, step):
                self._learn(bought.get(at, ()))
                if at >= 0 and self.replays:
                    self._take_turns(schedule.rows(at))

    def _learn(self, bought):
        for pair, label, margin, step, audit in bought:
            if pair in self.rows:
                self.pool[self.rows[pair]] = None
            if step >= 0:
                self.recent.append((margin, label, audit))

    def _learn_until(self, step):
        """Learn from the labels bought up to a step, that one included; where it is the run's rank 0."""
        for at in range(self.learned + 1, step + 1):
            self._learn(self.asker.ledger.labels(at, at, [self.ids[row] for row in self.schedule.rows(at)]))
        self.learned = max(self.learned, step)

    def advance(self, step):
        """Before a step: learn from what the step before bought. Returns what is to be said of it, or None."""
        notice = None
        if self.asker.ledger and (self.calibrated or self.replays):
            self._learn_until(step - 1)
        if self.calibrated:
            if self.asker.ledger:
                self.scale = self._fit()
                notice = self._guard(step)
                self.gamma = self.config.gamma * self.asker.state["guard"]
            self.scale, self.gamma = self.asker.from_rank_0((self.scale, self.gamma))
        return notice

    def _fit(self):
        """a, one standard error lower than the fit; 0, so that everything is asked, while there is too little to fit."""
        if len(self.recent) < FEWEST:
            return 0.0
        margin, label, audit = (torch.tensor(column) for column in zip(*self.recent))
        weights = torch.where(audit > 0, 1 / self.config.audit_fraction, 1.0)
        a, error = adpo.fit_scale(margin, label, weights)
        return max(0.0, a - error)

    def _guard(self, step):
        """The collapse guard: raise γ by half where the pairs audited since the last time agree less than the gate expects,
        beyond their 95 % interval."""
        state = self.asker.state
        audit = self.asker.audit(step - 1, state["guarded_until"], self.scale)
        if not self.scale or not audit or audit["audited"] < AUDITS or audit["interval"][1] >= audit["predicted"]:
            return None
        state["guard"], state["guarded_until"] = 1.5 * state["guard"], step
        return (f"step {step:,}: of {audit['audited']} audited pairs {audit['accuracy']:.1%} agree with the annotator, "
                f"where the gate expects {audit['predicted']:.1%}: gamma is raised to "
                f"{self.config.gamma * state['guard']:.3g}")

    def follow(self, ids, margins, step):
        """With a budget: set γ so that this step's share of what is left of it is asked.

        ids, margins: this rank's pairs of the step.
        """
        if self.budget is None:
            return
        gathered = self.asker.gather(list(zip(ids, margins)))
        if gathered is not None:
            items = {pair: abs(margin) for part in gathered for pair, margin in part if pair is not None}
            unsure = sorted(items[pair] for pair in self.asker.ledger.unanswered(list(items), before=step))
            bought = self.asker.queries(step - 1)
            share = min(1.0, (self.budget - bought) / max(1.0, self.schedule.unlabelled_left(step, bought)))
            audited = self.config.audit_fraction  # of those that are not asked, which costs too
            asked = round((share - audited) / (1 - audited) * len(unsure)) if audited < 1 else 0
            asked = max(asked, 1) if not bought else asked  # a step needs something to train on
            self.gamma = unsure[asked - 1] if unsure and asked > 0 else -1.0
        self.gamma = self.asker.from_rank_0(self.gamma)

    def rows_to_train(self, rows, step):
        """The step's rows, those without a label replaced by others that have one."""
        if not self.replays:
            return rows
        chosen = None
        if self.asker.ledger:
            self._learn_until(step)
            chosen = self._take_turns(rows)
        return self.asker.from_rank_0(chosen)

    def _take_turns(self, rows):
        """Of these rows those that have a label; then, up to as many, the pairs that were trained on longest ago."""
        chosen = {row: None for row in rows if row in self.pool}
        waiting = (row for row in self.pool if row not in chosen)
        chosen = [*chosen, *islice(waiting, len(rows) - len(chosen))]
        for row in chosen:
            self.pool.move_to_end(row)
        return chosen

    def metrics(self):
        """What a row of metrics says of the threshold, where it is not the paper's."""
        if not self.calibrated and self.budget is None:
            return {}
        return {"gate_gamma": self.gamma, "gate_scale": self.scale}
