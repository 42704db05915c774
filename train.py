"""Train a language model with Active DPO: one visible loop around `deepspeed.initialize`.

    deepspeed train.py --config configs/quickstart.yaml [--key value | --key=value] …
    python train.py --config …                            the same in one process, without the launcher
    python train.py --help                                every key

`main` is the whole run; what it calls in this file follows it. The maths is in adpo.py, the pairs in data.py, who answers
and whom to ask in labels/, and what any run stands on in runtime/.

Departures from the paper: none in the loop. Departures from the official code: no Trainer and no trl; an unknown key ends
the run; the reference is scored once and cached, so that no second model is resident; evaluation uses true labels and
never the gate; metrics are those of all ranks; a run is resumed exactly.

Legend: B pairs of a micro-batch, T tokens of a row, N response tokens, V vocabulary, H hidden size.
"""

import math

from runtime.launch import launch  # first: it sets what DeepSpeed reads when it is imported

# isort: split
import deepspeed
import torch

import adpo
import data
from labels.committee import add_soft_labels
from labels.oracle import Oracle, annotator_class
from runtime import report
from runtime.engine import backward, check_against_plain_forward, make_optimizer, no_backward, norm_to_log, starting
from runtime.errors import UsageError
from runtime.model import check_models, load_policy, load_tokenizer
from runtime.ranks import bar, rank, reduced, say
from runtime.reference import add_other_reference, add_reference, share_prompts
from runtime.run import Run
from runtime.schedule import Schedule, set_learning_rate
from runtime.sft import sft


def main(config, command_line=None):
    """The run.  command_line: what started it, for the model card."""
    run = Run.open(config, command_line)  # Is it finished? The same run? Which checkpoint does it go on from?
    if run.finished:
        return
    tokenizer = load_tokenizer(config)
    check_models(config, tokenizer)
    if config.objective == "sft":
        return sft(config, run, tokenizer)

    # The training pairs hold no labels: those go to the annotator, on rank 0 alone.
    train, test, annotator = load_data(config, tokenizer)
    schedule = Schedule(config, train, test)
    ds = run.engine_config | schedule.engine_batches()  # DeepSpeed's config
    if config.label_budget:  # buys all labels, and gives every pair a soft label, or keeps only the pairs with a label
        add_soft_labels(run, annotator, schedule, ds)

    # The reference is the policy before its first step, unless the config names another model.
    scoring = schedule.scoring_batches()
    if config.ref_model_name_or_path:
        run.start["reference"] = add_other_reference(config, ds, scoring)
    policy = load_policy(config)  # adpo.PairLogps around a causal LM
    share_prompts(policy, scoring)
    with starting(config, policy, ds):
        engine, *_ = deepspeed.initialize(model=policy, optimizer=make_optimizer(config, policy, ds), config=ds)
    check_against_plain_forward(engine, train, test)  # or refuse to train
    if not config.ref_model_name_or_path:
        add_reference(engine, scoring)  # fills .ref_logps, from the cache where it can

    run.write_config()
    oracle = Oracle(annotator, run.output / "labels.sqlite", config, run)
    if not config.label_budget:  # the committee has checked them
        oracle.check_ledger(train.ids)
    gamma = threshold(config)
    run.resume(engine, schedule, columns=COLUMNS, oracle=oracle)
    if test and config.eval_on_start and run.step == 0:
        evaluate(engine, run, schedule, oracle)

    with run.stoppable(engine):  # Ctrl-C or a missing answer writes a checkpoint, and the same command goes on
        for step in run.steps():
            rows = schedule.rows(step)
            micro_batches = schedule.micro_batches(rows)
            if oracle.asks_ahead(len(rows)):
                ask_ahead(engine, oracle, gamma, train, micro_batches, step)
            engine.train()
            lr = set_learning_rate(engine, step, schedule.total_steps, config)

            for n, micro_batch in enumerate(micro_batches, 1):
                batch = train.batch(micro_batch, engine.device)

                # Algorithm 2
                logps = engine(batch)  # (B, 2)  log π_θ(y|x)
                rewards = adpo.implicit_rewards(logps, batch.ref_logps, config.beta)  # (B, 2)  r(x, y)
                margin = adpo.margins(rewards)  # (B,)  m = r(x, y1) − r(x, y2)
                margin_cpu = margin.detach().cpu()  # (B,)  the only wait for the device in a micro-step
                ask = adpo.gate(margin_cpu, gamma, batch.ids)  # (B,)  |m| ≤ γ
                answers = oracle.answer(batch.ids, margin_cpu, ask, step)  # (B,)  +1, −1; NaN: no preference; 0: not asked
                labels = adpo.choose_labels(margin_cpu, answers, ask, config.pseudo_labels, config.after_budget,
                                            config.ties, batch.soft_labels)  # (B,)  o

                oracle.count_pseudo_labels(batch.ids, labels, answers)
                labels = data.to_device(labels, engine.device)
                losses = adpo.preference_loss(margin, labels, config.loss_type, config.beta,
                                              config.label_smoothing)  # (B,)  −log σ(o · m)
                norm = backward(engine, (losses * batch.weights).sum(), len(rows), last=n == len(micro_batches))
                run.add(metric_sums(losses, rewards, logps, labels, batch.weights, batch.tokens))

            oracle.end_step()
            run.end_step(engine, norm, [train.ids[row] for row in rows])
            if run.is_due("logging"):
                log_training(run, engine, schedule, oracle, lr, norm)
            if test and run.is_due("eval"):
                evaluate(engine, run, schedule, oracle)
            if run.is_due("save"):
                run.save(engine)

    summary = report.summarise(schedule, oracle, run, engine)
    oracle.close()
    run.finish(engine, tokenizer, summary)


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop

def load_data(config, tokenizer):
    """(training Pairs, test Pairs or None, annotator or None). The training labels go to the annotator, on rank 0 alone.

    Only the test pairs hold their labels. Raises UsageError where a label is missing that the run needs.
    """
    train, labels, truths = data.load_split(config, tokenizer, "train", config.max_train_samples)
    missing = [id for id in train.ids if id not in labels]
    if config.oracle == "dataset" and missing:
        raise UsageError(f"{train.place(missing[0])}: no label, and oracle is dataset ({len(missing)} of {len(train)} pairs "
                         "have none): label them, leave them out, or say --oracle=human or --oracle=judge")
    annotator = annotator_class(config).from_config(config, train, labels, truths) if rank() == 0 else None
    test = load_test_pairs(config, tokenizer) if config.do_eval else None
    if test:
        data.warn_of_overlap(train, test)
    return train, test, annotator


def load_test_pairs(config, tokenizer):
    """The test pairs with their true labels, or None if there are none."""
    test, _, truths = data.load_split(config, tokenizer, "test", config.max_eval_samples)
    missing = [id for id in test.ids if id not in truths] if test else []
    if test is None or len(missing) == len(test):
        say(f"no {'labels in the ' if test else ''}test split: evaluation is skipped")
        return None
    if missing:
        raise UsageError(f"{test.place(missing[0])}: no label ({len(missing)} of {len(test)} pairs of the test split have "
                         "none): label them, leave them out, or say --do_eval=false")
    test.labels = torch.tensor([float(truths[id]) for id in test.ids])
    return test


def threshold(config):
    """γ of the gate, in units of reward. Plain DPO asks about every pair: γ = ∞. Where a committee has bought all labels,
    γ = −1 asks about none, because no |m| is that small."""
    if not config.data_selection:
        return math.inf
    return -1.0 if config.label_budget else config.gamma


# ----------------------------------------------------------------------------------------------------------------------
# In the loop

def scored(engine, pairs, batches, beta):
    """Yield (batch, logps (B, 2), rewards (B, 2), margin (B,)) of each batch, without gradients."""
    for rows in batches:
        batch = pairs.batch(rows, engine.device)
        with no_backward(engine):
            logps = engine(batch).detach()
        rewards = adpo.implicit_rewards(logps, batch.ref_logps, beta)
        yield batch, logps, rewards, adpo.margins(rewards)


def ask_ahead(engine, oracle, gamma, pairs, micro_batches, step):
    """Ask all questions of a step at once, over all micro-batches and ranks, so that the run waits once for people or a
    judge, and a budget that ends in this step is spent on its least sure pairs. The loop then finds the answers in the
    ledger.

    This costs one more forward pass of the step. Nothing changes between the two passes, so they agree on whom to ask, as
    long as both call the same gate.
    """
    ids, margins = [], []
    for batch, _, _, margin in scored(engine, pairs, micro_batches, oracle.config.beta):
        ids += batch.ids
        margins.append(margin)
    margin = torch.cat(margins).cpu()
    oracle.answer(ids, margin, adpo.gate(margin, gamma, ids), step)


METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")
COLUMNS = 3 + len(METRICS)  # of metric_sums


def metric_sums(losses, rewards, logps, labels, weights, tokens):
    """Sums over a micro-batch, (COLUMNS,) fp64: pairs, labelled pairs, tokens, then one for each of METRICS.

    losses, labels, weights: (B,).  rewards, logps: (B, 2).  tokens: a number.  "Chosen" is the response that the label of
    the loss prefers; a margin of exactly 0 counts as half right.
    """
    labelled = weights * ((labels != 0) & ~labels.isnan())  # (B,)
    rewards, logps, y1_chosen = rewards.detach(), logps.detach(), (labels > 0)[:, None]  # (B, 2), (B, 2), (B, 1)
    chosen, rejected = torch.where(y1_chosen, rewards, rewards.flip(-1)).unbind(-1)  # (B,) each
    chosen_logps, rejected_logps = torch.where(y1_chosen, logps, logps.flip(-1)).unbind(-1)  # (B,) each
    margin = chosen - rejected
    right = (margin > 0).float() + 0.5 * (margin == 0)
    of_pairs = torch.stack([chosen, rejected, margin, right, chosen_logps, rejected_logps])  # (6, B), as in METRICS
    tokens = weights.new_full((), tokens)  # filled on the device: copying it there would wait
    sums = torch.stack([weights.sum(), labelled.sum(), tokens, (losses.detach() * weights).sum()])
    return torch.cat([sums, (of_pairs * labelled).sum(-1)]).double()


def means(sums):
    """({metric: mean}, tokens) from sums over all ranks: the loss over all pairs, the others over those with a label."""
    pairs, labelled, tokens, loss, *rest = sums
    return {"loss": loss / max(pairs, 1)} | {k: v / max(labelled, 1) for k, v in zip(METRICS[1:], rest)}, tokens


def log_training(run, engine, schedule, oracle, lr, norm):
    """A row of metrics.jsonl about the steps since the last one, and the text of the progress bar."""
    sums, seconds = run.take_sums()
    metrics, tokens = means(sums)
    row = {**metrics, "learning_rate": lr, "grad_norm": norm_to_log(engine, norm),
           **report.label_metrics(oracle, schedule, run.step), "tokens_per_second": tokens / seconds}
    report.warn_of_wrong_pseudo_labels(oracle, run.step - 1)
    report.warn_of_judge(oracle, row)
    run.progress.set_postfix_str(report.bar_text(row, run.evaluation, report.cost(oracle)), refresh=False)
    run.log("train", row)


def evaluate(engine, run, schedule, oracle):
    """Write loss and accuracy on the test split into the log, by its true labels and never through the gate."""
    config, batches = run.config, schedule.test_batches()
    sums = torch.zeros(COLUMNS, dtype=torch.float64, device=engine.device)
    with bar(len(batches), "evaluate", leave=False) as progress:
        for batch, logps, rewards, margin in scored(engine, schedule.test, batches, config.beta):
            losses = adpo.preference_loss(margin, batch.labels, config.loss_type, config.beta, config.label_smoothing)
            sums += metric_sums(losses, rewards, logps, batch.labels, batch.weights, batch.tokens)
            progress.update()
        run.evaluation = means(reduced(sums))[0]
    labels = report.label_metrics(oracle, schedule, run.step)
    run.log("eval", {**run.evaluation, **labels})
    say(f"step {run.step:,}: held-out accuracy {run.evaluation['rewards/accuracies']:.3f}, "
        f"loss {run.evaluation['loss']:.4f}, {labels['queries']:,} labels bought")


if __name__ == "__main__":
    launch(main)
