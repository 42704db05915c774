"""What belongs to which optimiser step: its pairs, on which rank and in which micro-batch, and its learning rate.

Legend: a step takes per_device_train_batch_size × gradient_accumulation_steps × ranks pairs, in that many micro-batches or,
where they are long, in more.
"""

import math
from functools import cached_property
from itertools import accumulate

from deepspeed.accelerator import get_accelerator

import data
from runtime.ranks import rank


def pairs_a_step(config, world):
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world


class Schedule:
    """Which pairs each optimiser step takes, and how they are dealt out to ranks and micro-steps."""

    def __init__(self, config, pairs, world):
        self.pairs, self.world, self.config = pairs, world, config
        self.step_pairs = pairs_a_step(config, world)
        self.epoch_steps = math.ceil(len(pairs) / self.step_pairs)
        self.total_steps = (config.max_steps if config.max_steps > 0
                            else math.ceil(config.num_train_epochs * self.epoch_steps))
        self._order = (None, None)

    def rows(self, step):
        """Indices of the pairs of a step. The last step of an epoch takes what is left: each pair once an epoch."""
        epoch, within = divmod(step, self.epoch_steps)
        if self._order[0] != epoch:
            self._order = (epoch, data.epoch_order(self.pairs.lengths, epoch, self.config.seed, self.step_pairs,
                                                   self.config.group_by_length))
        return self._order[1][within * self.step_pairs:(within + 1) * self.step_pairs]

    def micro_batches(self, step, rows=None):
        """This rank's micro-batches of a step (or of these rows): lists of indices, some empty; as many on each rank."""
        rows = self.rows(step) if rows is None else rows
        return my_batches(rows, self.pairs, self.config.per_device_train_batch_size, self.world, self.config)

    def pairs_seen(self):
        """How many different pairs the run comes to."""
        return min(len(self.pairs), self.total_steps * self.step_pairs)

    @cached_property
    def label_worth(self):
        """What a label that is bought at each step is worth: the learning rates of the steps that train on it, which are its
        own and with replay all to come."""
        rates = [learning_rate(step, self.total_steps, self.config) for step in range(self.total_steps)]
        worth = list(accumulate(rates[::-1]))[::-1] if self.config.pseudo_labels == "replay" else rates
        return [max(w, 1e-9 * max(rates)) for w in worth]  # none is 0: a warm-up starts there

    @cached_property
    def _worth_left(self):
        """Σ label_worth over the pairs of each step and of all behind it."""
        pairs = [min(self.step_pairs, len(self.pairs) - step % self.epoch_steps * self.step_pairs)
                 for step in range(self.total_steps)]
        return list(accumulate((w * n for w, n in zip(self.label_worth[::-1], pairs[::-1])), initial=0.0))[::-1]

    def unlabelled_left(self, step, bought):
        """About how many pairs without a label are to come from this step on, each counted by what its label would be worth,
        with one of this step's being 1. bought: labels so far."""
        second_epoch = min(max(step, self.epoch_steps), self.total_steps)
        first, later = self._worth_left[step] - self._worth_left[second_epoch], self._worth_left[second_epoch]
        return (first + later * (1 - bought / len(self.pairs))) / self.label_worth[step]

    def engine_batches(self):
        """The batch sizes as the engine is to know them: a long step has more micro-steps than the config says."""
        most = max(len(self.micro_batches(step)) for step in range(self.total_steps))
        if self.config.pseudo_labels == "replay":  # any pairs may meet in a step
            longest = sorted(range(len(self.pairs)), key=lambda row: -self.pairs.lengths[row])[:self.step_pairs]
            most = max(most, len(self.micro_batches(None, longest)))
        micro = self.config.per_device_train_batch_size
        return {"gradient_accumulation_steps": most, "train_batch_size": micro * most * self.world}

    def training_batches(self):
        """This rank's micro-batches of one pass over all the pairs that the run will see."""
        return [rows for step in range(min(self.total_steps, self.epoch_steps)) for rows in self.micro_batches(step)]


def my_batches(rows, pairs, batch_size, world, config):
    """This rank's share of these pairs, in batches of at most batch_size pairs and as many tokens as the config allows."""
    most_tokens = config.micro_batch_tokens or (1024 if get_accelerator().device_name() == "cpu" else 16384)
    return [ranks[rank()] for ranks in data.split_batch(rows, pairs.lengths, world, batch_size, most_tokens)]


def learning_rate(step, total, config):
    """Learning rate of optimiser step `step` (from 0) of `total`, as transformers' schedules have it."""
    warmup = math.ceil(total * config.warmup_ratio) if config.lr_scheduler_type != "constant" else 0
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}.get(config.lr_scheduler_type, 1.0)
    return config.learning_rate * factor


def set_learning_rate(engine, step, total, config):
    """Give the engine the learning rate of a step. Returns it."""
    lr = learning_rate(step, total, config)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


def due(strategy, every, step, epoch_end):
    return strategy == "steps" and step % every == 0 or strategy == "epoch" and epoch_end
