"""A committee of reward models, which learns from the labels bought and gives every pair a soft label: key label_budget.

    add_soft_labels    buys the run's labels before the first step, and fills `.soft_labels` of the training pairs

Each member is the model that the run starts from, with a head that reads a reward (adpo.PairRewards), trained on the labels
bought as a policy is trained by DPO, each in an order of its own. A policy's own sign(m) tells it what it believes already.
What several other models agree on tells it something new, and averaging cancels much of their individual error.

The labels are those of random pairs. Choosing the pairs on which the members disagree gained up to a point on the built-in
task and nothing on real text, for a third more compute (benchmarks/results/query_efficiency_3.md).

None of this is in the paper; docs/method.md says why it is here, and what it brings. Ensembles of reward models: Coste et
al., arXiv 2310.02743. Training a policy on what they say: Fisch et al., arXiv 2405.19316. What the members learn is a
function of the ledger, so a resumed run goes on as it was.

    deepspeed train.py --config … --label_budget 0.25
"""

import math

import torch

import adpo
import data
from labels.oracle import Oracle, drawn
from runtime.config import FREE_ON_RESUME
from runtime.engine import backward, settings_that_count, skipped_in_a_row
from runtime.errors import UsageError
from runtime.ranks import from_rank_0, say
from runtime.reference import cached, in_engine, kernels, score
from runtime.schedule import my_batches, set_learning_rate
from runtime.sources import hash_of_code

# The code that trains a member, besides reference.CODE, for the key of the cache.
CODE = hash_of_code("labels/committee.py", "runtime/engine.py", "runtime/schedule.py")


def add_soft_labels(run, annotator, schedule, ds):
    """Buy the labels of a run and fill `.soft_labels` of its training pairs, (pairs,) between −1 and 1: 2p − 1, where p is
    the mean probability of the members that y1 is preferred, σ(m). First, one member learns from half of the labels. If it
    does not know the other half better than a coin, the run trains only on the pairs whose labels it has bought.

    All ranks call it together, before the policy is loaded, because each member takes as much memory.
    annotator: on rank 0.  ds: the engine's config.  Raises UsageError, and FloatingPointError where a margin is not finite.
    """
    config, pairs, rows = run.config, schedule.pairs, schedule.rows_seen()
    about = what_counts(run, schedule, ds)
    run.write_config()
    oracle = Oracle(annotator, run.output / "labels.sqlite", config, run)
    oracle.check_ledger(pairs.ids)
    with run.interruptible(1 + config.committee_size, "committee"):
        labels = buy(oracle, schedule)  # (pairs,)
        held_out = torch.tensor([drawn(f"half {config.seed} {id}") % 2 == 1 for id in pairs.ids])  # (pairs,)
        # Each pair once: rows that repeat it would make a guess look sure of itself.
        held_out_rows = [*{pairs.ids[row]: row for row in rows if held_out[row] and labels[row] != 0}.values()]
        graded = member_margins(run, schedule, ds, labels.masked_fill(held_out, 0.0), 0, held_out_rows, about)
        if knows_something(graded[held_out_rows], labels[held_out_rows]):
            margins = torch.stack([member_margins(run, schedule, ds, labels, n, rows, about)
                                   for n in range(config.committee_size)])  # (members, pairs)
            pairs.soft_labels = 2 * margins.sigmoid().mean(0) - 1
        else:
            trained_on = adpo.choose_labels(torch.zeros(len(pairs)), labels, pseudo_labels=False, ties=config.ties)
            schedule.keep_only([row for row in rows if trained_on[row]])
    oracle.close()


def buy(oracle, schedule):
    """Ask about random pairs until as many have an answer as label_budget says. Answers from other runs count.

    Returns the labels of all pairs, (pairs,): +1, −1, NaN for no preference, 0 where nobody has been asked. A resumed run
    draws the same pairs again.  Raises UsageError where no answer prefers a response.
    """
    config, pairs = oracle.config, schedule.pairs
    ids = sorted(schedule.ids_seen(), key=lambda id: drawn(f"committee {config.seed} {id}"))
    new = from_rank_0(oracle.ledger.unanswered(ids, before=0) if oracle.ledger else None)  # without another run's answer
    left = labels_to_have(config.label_budget, len(ids)) - (len(ids) - len(new))
    chosen = set(new[:max(0, left)])
    labels = oracle.answer(pairs.ids, torch.zeros(len(pairs)), torch.tensor([id in chosen for id in pairs.ids]), step=0)
    seen = labels[schedule.rows_seen()]  # another run's answers may be about pairs that this one does not come to
    if not (seen.abs() == 1).any():
        raise UsageError(f"none of the {int((seen != 0).sum()):,} answers prefers a response, so there is nothing to "
                         "learn: look at them with tools/ledger.py, or raise label_budget in another output_dir")
    return labels


def labels_to_have(budget, pairs):
    """How many of the pairs get a label. budget: the key label_budget, a share up to 1, or a number of labels above 1."""
    return max(1, min(pairs, round(budget * pairs) if budget <= 1 else int(budget)))


def knows_something(margin, labels):
    """Whether a member knows which response is preferred in pairs whose labels it has not seen. Says how often it is right.

    If the labels were drawn by a coin, Σ m·o would have mean 0 and variance Σ m², so it would rarely be above 1.96 standard
    deviations. (This is the score test of a = 0, where σ(a·m) is the probability that the annotator prefers y1.)

    margin, labels: (pairs,), of pairs that the member has not learned from. Those without a preference do not count.
    """
    z = (margin * labels)[labels.abs() == 1].double()  # (n,)  m·o
    knows = bool(z.sum() > 1.96 * z.square().sum().sqrt())
    grade = f" is right about {(z > 0).double().mean():.1%} of" if len(z) else " was graded on"
    say(f"committee: a member that learned from half of the labels{grade} {len(z):,} others"
        + ("" if knows else "; it does not beat guessing, so the run trains only on the labelled pairs"))
    return knows


def in_member(use, run, schedule, ds):
    """What `use(engine)` returns, with the engine of a member before its first step."""
    return in_engine(use, run.config, ds, [(schedule.pairs, None)], kind=adpo.PairRewards)


def what_counts(run, schedule, ds):
    """All that decides what a member learns from the labels that it is given, for JSON.

    Loads a member, so that a model that cannot be trained is refused before a label is paid for.
    """
    others = {"beta", "label_budget", "committee_size", "max_steps", "num_train_epochs"}
    if run.config.committee_learning_rate is not None:
        others.add("learning_rate")
    keys = {name: value for name, value in vars(run.config).items() if name not in FREE_ON_RESUME | others}

    def look(engine):
        return [CODE, engine.module.fingerprint, schedule.pairs.fingerprint, schedule.pairs.shared, *kernels(engine),
                settings_that_count(run.engine_config), keys]
    return in_member(look, run, schedule, ds)


def member_margins(run, schedule, ds, labels, n, rows, about):
    """m = r(x, y1) − r(x, y2) of the pairs in these rows by member n, trained on these labels: (pairs,) on the CPU, NaN for
    the other pairs. Raises FloatingPointError where a margin is not finite.

    They are cached, so that a run that was stopped goes on with the next member, and so that a run with another β or (where
    committee_learning_rate is set) another learning_rate need not train them again.
    n: which member, from 0.  about: what `what_counts` returns.
    """
    def learn(engine):
        train(engine, run, schedule, labels, n)
        batches = my_batches(rows, schedule.pairs, run.config.per_device_eval_batch_size, run.config)
        return adpo.margins(score(engine, schedule.pairs, batches, f"rewards by member {n + 1}"))

    run.stop_if_asked()
    margins = cached("committee", [n, labels.tolist(), rows, about], lambda: in_member(learn, run, schedule, ds))
    run.progress.update()
    adpo.gate(margins[rows], math.inf, [schedule.pairs.ids[row] for row in rows])  # raises where a margin is not finite
    return margins


def train(engine, run, schedule, labels, n):
    """Train a member: DPO's loss −log σ(o·m) on the pairs that have a label.  labels: (pairs,).  n: which member."""
    config, pairs, rows = run.config, schedule.pairs, labels.nonzero().flatten()
    labels = adpo.choose_labels(torch.zeros(len(pairs)), labels, pseudo_labels=False, ties=config.ties)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + n)
    epoch_steps = math.ceil(len(rows) / config.committee_batch_size)
    total, skipped = math.ceil(config.committee_epochs * epoch_steps), 0
    for step in range(total):
        run.stop_if_asked()
        if step % epoch_steps == 0:
            order = rows[torch.randperm(len(rows), generator=generator)].tolist()
        start = step % epoch_steps * config.committee_batch_size
        chosen = order[start:start + config.committee_batch_size]
        engine.train()
        set_learning_rate(engine, step, total, config, config.committee_learning_rate)
        micro_batches = schedule.micro_batches(chosen)
        for k, micro_batch in enumerate(micro_batches, 1):
            batch = pairs.batch(micro_batch, engine.device)
            margin = adpo.margins(engine(batch))  # (B,)  m = r(x, y1) − r(x, y2)
            answers = labels[micro_batch] if micro_batch else torch.zeros(1)  # (B,); a filler pair has none
            answers = data.to_device(answers, engine.device)
            losses = adpo.preference_loss(margin, answers, label_smoothing=config.label_smoothing)  # (B,)  −log σ(o · m)
            norm = backward(engine, (losses * batch.weights).sum(), len(chosen), last=k == len(micro_batches))
        skipped = skipped_in_a_row(skipped, engine, norm, step, [pairs.ids[row] for row in chosen])
