"""A committee of reward models, which learns from the labels bought and gives every pair a soft label.  label_budget

    add_soft_labels    buys the run's labels, in two rounds before the first step, and fills `.soft_labels` of the pairs

Each member is the model that the run starts from, with a head that reads a reward (adpo.PairRewards), trained on the labels
bought as a policy is trained by DPO, each in an order of its own. A policy's own sign(m) tells it what it believes already.
What several other models agree on tells it something new, and averaging cancels much of their individual error.

The first half of the labels goes to random pairs, the second to those on which the members disagree most. Where they agree
that a pair is a toss-up, annotators disagree too, and one more label would tell little.

Departures from the paper: all of it; docs/method.md tells why, and what it brings. Ensembles of reward models: Coste et al.,
arXiv 2310.02743. Training a policy on what they say: Fisch et al., arXiv 2405.19316. Choosing by disagreement (BALD):
Houlsby et al., arXiv 1112.5745. Whatever is learned is a function of the ledger, so a resumed run goes on as it was.
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

ROUNDS = 2


def add_soft_labels(config, run, annotator, schedule, ds):
    """Buy the labels of a run and fill `.soft_labels` of its training pairs, (pairs,) between −1 and 1: twice the mean
    chance that its members give to y1 being preferred, less 1. Where the first round's members cannot tell what annotators
    will prefer in the second, the run trains on the labels bought instead, and on no other pair.

    All ranks call it together, before the policy is loaded, because each member takes as much memory.
    annotator: on rank 0.  ds: the engine's config.
    """
    pairs, rows = schedule.pairs, schedule.rows_seen()
    about = what_counts(config, run, schedule, ds)
    run.write_config()
    oracle = Oracle(annotator, run.output / "labels.sqlite", config, run)
    oracle.check_pairs(pairs.ids)
    wanted = labels_to_have(config.label_budget, schedule.considered)
    margins, knows, seen = None, True, None
    with run.interruptible(ROUNDS * config.committee_size, "committee"):
        for part in range(ROUNDS):
            labels = buy(oracle, pairs, rows, math.ceil(wanted * (part + 1) / ROUNDS), margins, part, config)
            if margins is not None:
                knows = knows_something(margins.mean(0), labels.masked_fill(seen, 0.0))
                if not knows:
                    break
            seen = labels != 0  # (pairs,)
            margins = torch.stack([member_margins(config, run, schedule, ds, labels, n, about)
                                   for n in range(config.committee_size)])  # (members, pairs)
            adpo.gate(margins.mean(0)[rows], math.inf, [pairs.ids[row] for row in rows])  # raises where one is not finite
    oracle.close()
    if knows:
        pairs.soft_labels = 2 * margins.sigmoid().mean(0) - 1
        return
    trained_on = adpo.choose_labels(torch.zeros(len(pairs)), labels, pseudo_labels=False, ties=config.ties)  # (pairs,)
    kept = [row for row in rows if trained_on[row]]
    if not kept:
        raise UsageError(f"none of the {wanted:,} answers prefers a response, so there is nothing to learn: look at them "
                         "with tools/ledger.py, or raise label_budget in another output_dir")
    schedule.keep_only(kept)


def labels_to_have(budget, pairs):
    """The number of labels that label_budget means for so many pairs: at least 2, one to learn from and one to be graded by.
    """
    return max(2, min(pairs, round(budget * pairs) if budget <= 1 else int(budget)))


def buy(oracle, pairs, rows, wanted, margins, part, config):
    """Ask until `wanted` pairs have been asked about: those on which the members disagree most, or at first random ones.

    rows: the pairs to choose from.  margins: (members, pairs), or None at first.  part: the round, from 0, which the ledger
    keeps as the step.
    Labels from other runs count like those bought, but half of them wait for the second round, to grade the members by.
    Returns the labels of all pairs, (pairs,): +1, −1, NaN for no preference, 0 where this round and those before it asked
    nobody. So a run that is resumed in a round makes the same choice again.
    """
    def draw(id):
        return drawn(f"committee {config.seed} {id}")
    row_of = {pairs.ids[row]: row for row in rows}  # a pair that is repeated is asked about once
    new = from_rank_0(oracle.ledger.unanswered([*row_of], before=part) if oracle.ledger else None)
    waiting = {id for id in row_of if draw(id) % 2}.difference(new) if part == 0 else set()
    worth = torch.zeros(len(pairs)) if margins is None else bald(margins)  # (pairs,)
    new.sort(key=lambda id: (-worth[row_of[id]].item(), draw(id)))
    left = max(0, wanted - (len(row_of) - len(new) - len(waiting)))
    chosen, later = set(new[:left]), waiting.union(new[left:])
    margin = torch.zeros(len(pairs)) if margins is None else margins.mean(0)
    answers = oracle.answer(pairs.ids, margin, torch.tensor([id in chosen for id in pairs.ids]), step=part)
    return answers.masked_fill(torch.tensor([id in later for id in pairs.ids]), 0.0)


def bald(margins):
    """BALD: how much a label would tell about which member is right, in nats: H(mean p) − mean H(p), where p = σ(m) and
    H(p) = −p log p − (1 − p) log(1 − p).  margins: (members, pairs).  Returns (pairs,) fp64."""
    p = margins.double().sigmoid()

    def entropy(p):
        return torch.special.entr(p) + torch.special.entr(1 - p)
    return entropy(p.mean(0)) - entropy(p).mean(0)


def knows_something(margin, labels):
    """Whether a committee tells which response is preferred in pairs that it had not seen. Says how often it is right.

    If labels were coins, Σ m·o would have mean 0 and variance Σ m², so a sum of over 1.96 standard deviations is knowledge.
    (This is the score test of a = 0, where σ(a·m) is the chance that the annotator prefers y1.)

    margin: (pairs,), NaN for a pair that the run does not come to.  labels: (pairs,), 0 for a pair that was not asked about,
    or whose label the committee had learned from.
    """
    known = (labels.abs() == 1) & ~margin.isnan()
    z = (margin * labels)[known].double()  # (n,)  m·o
    knows = bool(z.sum() > 1.96 * z.square().sum().sqrt())
    grade = f"right about {(z > 0).double().mean():.1%} of" if len(z) else "graded on"
    say(f"committee: {grade} {len(z):,} labels that it had not learned from, bought where its members disagree"
        + ("" if knows else ": no better than a coin, so it is not listened to; only the pairs with a label are trained on"))
    return knows


def in_member(use, config, schedule, ds):
    """What `use(engine)` returns, with the engine of a member before its first step."""
    return in_engine(use, config, ds, [(schedule.pairs, None)], kind=adpo.PairRewards)


def what_counts(config, run, schedule, ds):
    """All that decides what a member learns from the labels that it is given, for JSON.

    Loads a member, so that a model that cannot be trained is refused before a label is paid for.
    """
    others = {"beta", "label_budget", "committee_size", "max_steps", "num_train_epochs"}
    if config.committee_learning_rate is not None:
        others.add("learning_rate")
    keys = {name: value for name, value in vars(config).items() if name not in FREE_ON_RESUME | others}

    def look(engine):
        return [data.VERSION, engine.module.fingerprint, schedule.pairs.fingerprint, schedule.pairs.shared, *kernels(engine),
                schedule.step_pairs, schedule.rows_seen(), settings_that_count(run.engine_config), keys]
    return in_member(look, config, schedule, ds)


def member_margins(config, run, schedule, ds, labels, n, about):
    """m = r(x, y1) − r(x, y2) by member n, trained on these labels: (pairs,) on the CPU, NaN for a pair that the run does
    not come to.

    They are cached, so that a run that was stopped goes on with the next member, and that one with another β or (where
    committee_learning_rate is set) learning rate for its policy need not train them again.  about: of `what_counts`.
    """
    def learn(engine):
        train(engine, config, run, schedule, labels, n)
        batches = my_batches(schedule.rows_seen(), schedule.pairs, config.per_device_eval_batch_size, config)
        return adpo.margins(score(engine, schedule.pairs, batches, f"rewards by member {n + 1}"))

    run.stop_if_asked()
    margins = cached("committee", [n, labels.tolist(), about], lambda: in_member(learn, config, schedule, ds))
    run.progress.update()
    return margins


def train(engine, config, run, schedule, labels, n):
    """Train a member: DPO's loss −log σ(o·m) on the pairs that have a label.  labels: (pairs,).  n: which member."""
    pairs, rows, rate = schedule.pairs, labels.nonzero().flatten(), config.committee_learning_rate
    labels = adpo.choose_labels(torch.zeros(len(pairs)), labels, pseudo_labels=False, ties=config.ties)
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + n)
    epoch_steps = math.ceil(len(rows) / schedule.step_pairs)
    total, skipped = math.ceil(config.committee_epochs * epoch_steps), 0
    for step in range(total):
        run.stop_if_asked()
        if step % epoch_steps == 0:
            order = rows[torch.randperm(len(rows), generator=generator)].tolist()
        start = step % epoch_steps * schedule.step_pairs
        chosen = order[start:start + schedule.step_pairs]
        engine.train()
        set_learning_rate(engine, step, total, config, rate)
        micro_batches = schedule.micro_batches(chosen)
        for k, micro_batch in enumerate(micro_batches, 1):
            batch = pairs.batch(micro_batch, engine.device)
            margin = adpo.margins(engine(batch))  # (B,)
            answers = labels[micro_batch] if micro_batch else torch.zeros(1)  # (B,); a filler has none
            answers = data.to_device(answers, engine.device)
            losses = adpo.preference_loss(margin, answers, label_smoothing=config.label_smoothing)
            norm = backward(engine, (losses * batch.weights).sum(), len(chosen), last=k == len(micro_batches))
        skipped = skipped_in_a_row(skipped, engine, norm, step, [pairs.ids[row] for row in chosen])
