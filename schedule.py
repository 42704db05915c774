"""What belongs to which optimiser step: its pairs, on which rank and in which micro-batch, and its learning rate.

Legend: a step takes per_device_train_batch_size × gradient_accumulation_steps × ranks pairs, in that many micro-batches or,
where they are long, in more.
"""

import math

from deepspeed.accelerator import get_accelerator

import data
from ranks import rank


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

    def visits(self, step):
        """How many pairs come before a step, each as often as it comes."""
        epoch, within = divmod(step, self.epoch_steps)
        return epoch * len(self.pairs) + within * self.step_pairs

    def pairs_seen(self):
        """How many different pairs the run comes to."""
        return min(len(self.pairs), self.total_steps * self.step_pairs)

    def unlabelled_left(self, step, bought):
        """About how often the run still comes to a pair without a label. bought: labels so far."""
        end, total = (step // self.epoch_steps + 1) * self.epoch_steps, self.total_steps
        here = self.visits(min(end, total)) - self.visits(step)
        later = self.visits(total) - self.visits(min(end, total))
        unlabelled = 1 - bought / len(self.pairs)
        return here * (1 if step < self.epoch_steps else unlabelled) + later * unlabelled

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
