"""What belongs to which optimiser step: its pairs, which rank takes them in which micro-batch, and its learning rate.

A step takes per_device_train_batch_size × gradient_accumulation_steps × ranks pairs. Only micro_batch_tokens decides how it
is cut into micro-batches: full ones keep a GPU busy, and the gradient of the step does not depend on the cut.
"""

import math

import torch

import data
from runtime.ranks import rank, world_size


class Schedule:
    """Which pairs each optimiser step takes, and how they are dealt out to ranks and micro-batches.

    pairs: the training split.  test: the test split, or None.  step_pairs: pairs of a step, over all ranks.
    epoch_steps, total_steps: optimiser steps of an epoch and of the run.  considered: with label_budget, from how many
    different pairs those to label are drawn; otherwise None.
    """

    def __init__(self, config, pairs, test=None):
        self.config, self.pairs, self.test, self.world = config, pairs, test, world_size()
        self.step_pairs = pairs_a_step(config)
        self.keep_only(range(len(pairs)))
        self.total_steps = (config.max_steps if config.max_steps > 0
                            else math.ceil(config.num_train_epochs * self.epoch_steps))
        self.considered = len(self.ids_seen()) if config.label_budget else None

    def keep_only(self, rows):
        """Take only the pairs with these indices from now on. The number of steps does not change."""
        self.kept, self._order = rows, (None, None)
        self.epoch_steps = math.ceil(len(rows) / self.step_pairs)

    def rows(self, step):
        """Indices of the pairs of a step. The last step of an epoch takes what is left: each pair comes once an epoch."""
        epoch, within = divmod(step, self.epoch_steps)
        if self._order[0] != epoch:
            order = data.epoch_order([self.pairs.lengths[row] for row in self.kept], epoch, self.config.seed,
                                     self.step_pairs, self.config.group_by_length)
            self._order = (epoch, [self.kept[n] for n in order])
        return self._order[1][within * self.step_pairs:(within + 1) * self.step_pairs]

    def micro_batches(self, rows):
        """This rank's micro-batches of these rows: lists of indices, some of them empty; equally many on each rank."""
        return my_batches(rows, self.pairs, len(rows), self.config)

    def test_batches(self):
        """This rank's batches of the test split."""
        return my_batches(range(len(self.test)), self.test, self.config.per_device_eval_batch_size, self.config)

    def scoring_batches(self):
        """[(split, this rank's batches)] of one pass over all the pairs that the run will see, cut as it will cut them."""
        train = [(self.pairs, [rows for step in self.first_epoch() for rows in self.micro_batches(self.rows(step))])]
        return train + ([(self.test, self.test_batches())] if self.test else [])

    def first_epoch(self):
        """Its steps, or those of them that the run has."""
        return range(min(self.total_steps, self.epoch_steps))

    def rows_seen(self):
        """Indices of the pairs that the run comes to."""
        return sorted(row for step in self.first_epoch() for row in self.rows(step))

    def ids_seen(self):
        """The ids of the pairs that the run comes to; one that the data repeats is there once."""
        return {self.pairs.ids[row] for row in self.rows_seen()}

    def pairs_seen(self, steps):
        """How many pairs the run has come to after this many steps; one that the data repeats counts each time. With a
        committee it is `considered` from the start."""
        return self.considered or min(len(self.pairs), steps * self.step_pairs)

    def engine_batches(self):
        """The batch sizes that the engine is told: as many micro-steps as the longest step needs. DeepSpeed divides by that
        number and `backward` multiplies by it, so it decides no result."""
        most = max(len(self.micro_batches(self.rows(step))) for step in range(self.total_steps))
        if self.config.label_budget:  # the members of a committee train on any pairs together
            longest = sorted(range(len(self.pairs)), key=lambda row: -self.pairs.lengths[row])
            longest = longest[:self.config.committee_batch_size]
            most = max(most, len(self.micro_batches(longest)))
        micro = self.config.per_device_train_batch_size
        return {"gradient_accumulation_steps": most, "train_batch_size": micro * most * self.world}


def pairs_a_step(config):
    """Pairs of an optimiser step, over all ranks."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world_size()


def my_batches(rows, pairs, batch_size, config):
    """This rank's share of these rows, in batches of at most batch_size pairs and as many tokens as the config allows."""
    most_tokens = config.micro_batch_tokens or (16384 if torch.accelerator.is_available() else 1024)
    return [ranks[rank()] for ranks in data.split_batch(rows, pairs.lengths, world_size(), batch_size, most_tokens)]


def learning_rate(step, total, config, peak=None):
    """Learning rate of optimiser step `step` (from 0) of `total`, by the schedules of transformers.  peak: the highest rate;
    None: the config's learning_rate."""
    peak = config.learning_rate if peak is None else peak
    warmup = math.ceil(total * config.warmup_ratio) if config.lr_scheduler_type != "constant" else 0
    if step < warmup:
        return peak * step / warmup
    progress = (step - warmup) / (total - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}.get(config.lr_scheduler_type, 1.0)
    return peak * factor


def set_learning_rate(engine, step, total, config, peak=None):
    """Give the engine the learning rate of a step. Returns it."""
    lr = learning_rate(step, total, config, peak)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr
