"""Supervised fine-tuning, `objective: sft`: the loop of train.py without reference, gate and ledger, so that a recipe can
start from a base model.

Legend: N response tokens of a batch.
"""

import deepspeed
import torch

import data
from runtime import report
from runtime.engine import backward, check_against_plain_forward, make_optimizer, norm_to_log, starting
from runtime.model import load_policy
from runtime.ranks import bar, peak_memory, reduced, say
from runtime.schedule import Schedule, set_learning_rate


def sft(config, run, tokenizer):
    """A whole run of supervised fine-tuning, as train.main is one of ADPO. The loss of a step is the mean of
    −log π(y_t | x, y_<t) over its response tokens, however they are cut into micro-batches and ranks."""
    train, _, _ = data.load_split(config, tokenizer, "train", config.max_train_samples)
    test = data.load_split(config, tokenizer, "test", config.max_eval_samples)[0] if config.do_eval else None
    if test:
        data.warn_of_overlap(train, test, "examples")
    elif config.do_eval:
        say("no test split: evaluation is skipped")
    for split in filter(None, (train, test)):
        split.shared = False  # one row [prompt | y] an example
    schedule = Schedule(config, train, test)
    ds = run.engine_config | schedule.engine_batches()  # DeepSpeed's config

    policy = load_policy(config)
    with starting(config, policy, ds):
        engine, *_ = deepspeed.initialize(model=policy, optimizer=make_optimizer(config, policy, ds), config=ds)
    check_against_plain_forward(engine, train, test)
    run.write_config()
    run.resume(engine, schedule, columns=3, unit="examples")
    if test and config.eval_on_start and run.step == 0:
        evaluate(engine, run, schedule)

    with run.stoppable(engine):
        for step in run.steps():
            engine.train()
            lr = set_learning_rate(engine, step, schedule.total_steps, config)
            rows = schedule.rows(step)
            tokens = sum(map(len, train.table[rows]["first_ids"]))  # response tokens of the step
            micro_batches = schedule.micro_batches(rows)
            for n, micro_batch in enumerate(micro_batches, 1):
                losses, batch = token_losses(engine, train, micro_batch)  # (N,)
                norm = backward(engine, losses.sum(), tokens, last=n == len(micro_batches))
                run.add(sums_of(losses, micro_batch, batch.tokens))

            run.end_step(engine, norm, [train.ids[row] for row in rows])
            if run.is_due("logging"):
                (loss, counted, all_tokens), seconds = run.take_sums()
                run.progress.set_postfix_str(f"loss {loss / counted:.3f}", refresh=False)
                run.log("train", {"loss": loss / counted, "learning_rate": lr, "grad_norm": norm_to_log(engine, norm),
                                  "tokens_per_second": all_tokens / seconds})
            if test and run.is_due("eval"):
                evaluate(engine, run, schedule)
            if run.is_due("save"):
                run.save(engine)

    run.finish(engine, tokenizer, {"examples": len(train), "eval_loss": run.evaluation,
                                   "peak_memory_bytes": peak_memory(engine.device),
                                   **report.adapter_summary(config, engine.module.lm)})


def token_losses(engine, examples, rows):
    """(−log π(y_t | x, y_<t) of each response token (N,), 0 for those of a filler; the batch)."""
    batch = examples.batch(rows, engine.device)
    logps = engine(batch, per_token="ours")  # (N,)
    return -logps * batch.weights.repeat_interleave(batch.lengths, output_size=len(logps)), batch


def sums_of(losses, rows, tokens):
    """Sums over a micro-batch, (3,) fp64: loss, response tokens, all tokens."""
    counts = losses.new_ones(2, dtype=torch.float64)
    counts[0], counts[1] = len(losses) * bool(rows), tokens
    return torch.cat([losses.detach().sum().double()[None], counts])


@torch.no_grad()
def evaluate(engine, run, schedule):
    """Log the mean loss over the response tokens of the test split, in nats."""
    engine.eval()
    sums, batches = torch.zeros(3, dtype=torch.float64, device=engine.device), schedule.test_batches()
    with bar(len(batches), "evaluate", leave=False) as progress:
        for rows in batches:
            losses, batch = token_losses(engine, schedule.test, rows)
            sums += sums_of(losses, rows, batch.tokens)
            progress.update()
        loss, counted, _ = reduced(sums)
    run.evaluation = loss / counted
    run.log("eval", {"loss": run.evaluation})
    say(f"step {run.step:,}: held-out loss {run.evaluation:.4f}")
