"""Supervised fine-tuning, `objective: sft`: the loop of train.py without reference, gate and ledger, so that a recipe can
begin with a base model.

Legend: N response tokens of a batch.
"""

import time

import torch
import torch.distributed as dist

from runtime import checkpoint
import data
from labels import oracle
from runtime import report
from runtime.engine import decisive, gradient_norm, no_step_if_infinite, norm_for_log, skipped_in_a_row, start_engine
from runtime.model import save_model
from runtime.ranks import all_gather, bar, peak_memory, rank, reduced, say
from runtime.schedule import Schedule, due, my_batches, set_learning_rate


def sft(config, ds, tokenizer, output, resume, start_time, command_line):
    """Supervised fine-tuning: the loop of `main` without reference, gate and ledger. The loss of a step is the mean of
    −log π(y_t | x, y_<t) over its response tokens, however they are cut into micro-batches and ranks."""
    world = dist.get_world_size()
    train, _, _ = data.load_split(config, tokenizer, "train", config.max_train_samples)
    test = data.load_split(config, tokenizer, "test", config.max_eval_samples)[0] if config.do_eval else None
    if config.do_eval and not test:
        say("no test split: evaluation is skipped")
    schedule = Schedule(config, train, world)
    ds |= schedule.engine_batches()
    engine, weights, _ = start_engine(config, ds, config.model_name_or_path, train)
    device = engine.device

    checkpoint.write_config(config, output, schedule)
    start = {"examples a step": schedule.step_pairs, "examples": train.fingerprint, "model": weights,
             "engine settings": decisive(ds)}
    state = checkpoint.resume(engine, resume, start, schedule.total_steps)
    step, skipped, seconds_before, evaluation = (state[k] for k in ("step", "skipped", "wall_seconds", "evaluation"))
    # Loss, response tokens and all tokens since the last log.
    sums = torch.tensor(state.get("sums", [0.0] * 3), dtype=torch.float64, device=device) * (rank() == 0)
    log = report.Log(output, engine, step if resume else -1)
    say(f"{len(train):,} examples, {schedule.total_steps:,} steps of {schedule.step_pairs}, {world} "
        f"process{'es' if world > 1 else ''} on {device.type}, ZeRO {ds['zero_optimization'].get('stage', 0)}")

    def run_evaluation():
        loss = sft_evaluate(engine, test, config)
        log.write({"step": step, "epoch": step / schedule.epoch_steps, "split": "eval", "loss": loss})
        say(f"step {step:,}: held-out loss {loss:.4f}")
        return loss

    def keep_checkpoint():
        state = {"step": step, "start": start, "skipped": skipped, "wall_seconds": seconds_before + time.time() - start_time,
                 "evaluation": evaluation, "sums": reduced(sums)}
        checkpoint.save(engine, output, state, config.save_total_limit)

    if test and config.eval_on_start and step == 0:
        evaluation = run_evaluation()
    progress = bar(schedule.total_steps, "train", initial=step)
    interrupt = oracle.Interrupt()
    interrupt.install()
    window_start = time.time()
    while step < schedule.total_steps:
        if max(all_gather(interrupt.asked)):  # one rank's signal stops all
            progress.close()
            if step and step not in checkpoint.complete(output):
                keep_checkpoint()
            interrupt.remove()
            raise oracle.Waiting("interrupted")
        engine.train()
        lr = set_learning_rate(engine, step, schedule.total_steps, config)
        step_tokens = sum(map(len, train.table[schedule.rows(step)]["first_ids"]))

        micro_batches = schedule.micro_batches(step)
        for n, rows in enumerate(micro_batches, 1):
            engine.set_gradient_accumulation_boundary(n == len(micro_batches))
            losses, batch = sft_losses(engine, train, rows)  # (N,)
            engine.backward(losses.sum() * (engine.gradient_accumulation_steps() * world / step_tokens))
            if engine.is_gradient_accumulation_boundary():
                grad_norm = gradient_norm(engine)
            engine.step()
            sums += torch.stack([losses.detach().sum().double(), losses.new_tensor(len(losses) * bool(rows)).double(),
                                 losses.new_tensor(batch.tokens).double()])

        skipped = skipped_in_a_row(skipped, engine, grad_norm, step, [train.ids[row] for row in schedule.rows(step)])
        step += 1
        epoch_end, last = step % schedule.epoch_steps == 0, step == schedule.total_steps
        if step % config.logging_steps == 0 or last or (step == 1 and config.logging_first_step):
            loss, counted, tokens = reduced(sums)
            log.write({"step": step, "epoch": step / schedule.epoch_steps, "split": "train", "loss": loss / counted,
                       "learning_rate": lr, "grad_norm": norm_for_log(engine, grad_norm),
                       "tokens_per_second": tokens / (time.time() - window_start)})
            progress.set_postfix_str(f"loss {loss / counted:.3f}", refresh=False)
            sums.zero_()
            window_start = time.time()
        progress.update()
        if test and (last or due(config.eval_strategy, config.eval_steps, step, epoch_end)):
            evaluation = run_evaluation()
            window_start = time.time()
        if due(config.save_strategy, config.save_steps, step, epoch_end):
            keep_checkpoint()
            window_start = time.time()
    progress.close()
    interrupt.remove()

    summary = {"examples": len(train), "eval_loss": evaluation, "peak_memory_bytes": peak_memory(device),
               **report.adapter_summary(config, engine.module.lm)}
    names = save_model(engine, tokenizer, output, config)
    engine.destroy()
    report.finish(config, summary, output, names, command_line, seconds_before + time.time() - start_time)


def sft_losses(engine, examples, rows):
    """(−log π(y_t | x, y_<t) of each response token (N,), 0 for those of a filler; the batch)."""
    batch = data.collate(examples, rows, shared=False).to(engine.device)
    logps = engine(batch, per_token="ours")  # (N,)
    return no_step_if_infinite(-logps * batch.weights.repeat_interleave(batch.lengths, output_size=len(logps))), batch


@torch.no_grad()
def sft_evaluate(engine, examples, config):
    """Mean loss over the response tokens of the test split, in nats."""
    engine.eval()
    batches = my_batches(range(len(examples)), examples, config.per_device_eval_batch_size, dist.get_world_size(), config)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    with bar(len(batches), "evaluate", leave=False) as progress:
        for rows in batches:
            losses, _ = sft_losses(engine, examples, rows)
            sums += torch.stack([losses.sum().double(), losses.new_tensor(len(losses) * bool(rows)).double()])
            progress.update()
    loss, tokens = reduced(sums)
    return loss / tokens
