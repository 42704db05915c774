"""Train a language model with Active DPO: one visible loop around `deepspeed.initialize`.

    deepspeed train.py --config configs/quickstart.yaml [--key value | --key=value] …
    python train.py --config …                            the same in one process, without the launcher
    python train.py --help                                every key

`main` comes first: data, policy and reference, oracle, loop, end. The maths is in adpo.py, the gate's threshold in gate.py,
the keys in config.py, DeepSpeed's engine in engine.py.

Departures from the paper: none in the loop. Departures from the official code: no Trainer and no trl; an unknown key ends
the run; the reference is scored once and cached, so that no second model is resident; evaluation uses true labels and
never the gate; metrics are those of all ranks; a run is resumed exactly.

Legend: B pairs of a micro-batch, T tokens of a row, N response tokens, V vocabulary, H hidden size.
"""

import ctypes
import errno
import gc
import hashlib
import json
import os
import shlex
import signal
import sqlite3
import sys
import tempfile
import time
import zlib
from pathlib import Path

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # `map` forks; threads in the tokeniser would be lost there
os.environ.setdefault("DEEPSPEED_TIMEOUT", "60")  # minutes: ranks wait while rank 0 tokenises, or uploads the model
if torch.accelerator.current_accelerator() is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed's search for one, and its warnings
    # oneDNN keeps what it compiled for its last 1,024 shapes of products, hundreds of MB; few micro-batches share one.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")

import deepspeed
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import adpo
from runtime import checkpoint
import data
from labels import threshold
from labels import judge
from labels import oracle
from runtime import report
from runtime import toy
from runtime.config import UsageError, help_text, parse_config
from runtime.engine import decisive, engine_config, gradient_norm, no_step_if_infinite, norm_for_log, skipped_in_a_row, start_engine
from runtime.model import check_models, load_tokenizer, save_model
from runtime.ranks import all_gather, bar, is_shared, one_line, rank, rank_0_first, reduced, say, several_hosts, writing
from runtime.schedule import Schedule, due, my_batches, pairs_a_step, set_learning_rate
from runtime.sft import sft


def main(config, command_line=None):
    """The run.  command_line: what started it, for the model card."""
    start_time = time.time()
    setup(config)
    toy_prompts = resolve_toy(config)
    world = dist.get_world_size()
    ds = engine_config(config, world)
    output = Path(config.output_dir)
    shared_output = is_shared(output)
    checkpoint.check_same_run(config, output, pairs_a_step(config, world))
    if all_gather((output / "summary.json").is_file())[0]:
        if rank() == 0:
            say(f"{output} is finished: {report.closing_line(report.read_summary(output / 'summary.json'))}")
        return say("to train again, choose another --output_dir or move that one away")
    checkpoint.check_writable(output)
    if not shared_output and config.save_strategy != "no":
        raise UsageError(f"output_dir {output}: is not the same folder on all hosts, and each rank writes its part of a "
                         "checkpoint there: put it on a file system that all share, or say --save_strategy=no")
    resume = checkpoint.find(config, output) if shared_output else None

    # Data, policy, reference.
    tokenizer = load_tokenizer(config)
    check_models(config, tokenizer)
    if config.objective == "sft":
        return sft(config, ds, tokenizer, output, resume, start_time, command_line)
    train, test, annotator, test_labels = load_data(config, tokenizer)
    check_same_pairs(train, test)
    schedule = Schedule(config, train, world)
    parts = {"train": (train, schedule.training_batches())}
    ds |= schedule.engine_batches()
    if test:
        test_batches = my_batches(range(len(test)), test, config.per_device_eval_batch_size, world, config)
        parts["test"] = (test, test_batches)
    engine, weights, reference, shared = policy_and_reference(config, ds, parts)
    device = engine.device

    # The run's folder, its ledger, and where it stands.
    checkpoint.write_config(config, output, schedule)
    asker = oracle.Oracle(annotator, output / "labels.sqlite", config.max_queries, config.oracle != "dataset")
    if asker.ledger:
        reused, of_ours = asker.ledger.check_pairs(train.ids)
        if reused:
            say(f"{reused:,} answers of other runs are in the ledger, {of_ours:,} of them of pairs of this run")
    start = {"pairs a step": schedule.step_pairs, "pairs": train.fingerprint, "model": weights,
             "engine settings": decisive(ds)}
    state = checkpoint.resume(engine, resume, start, schedule.total_steps)
    step, skipped, seconds_before, evaluation = (state[k] for k in ("step", "skipped", "wall_seconds", "evaluation"))
    asker.state = state.get("oracle", asker.state)
    # Of the metrics since the last log.
    sums = torch.tensor(state.get("sums", [0.0] * 10), dtype=torch.float64, device=device) * (rank() == 0)
    log = report.Log(output, engine, step if resume else -1)
    say(f"{len(train):,} pairs, {schedule.total_steps:,} steps of {schedule.step_pairs} pairs, "
        f"{sum(getattr(p, 'ds_numel', p.numel()) for p in engine.module.parameters()):,} parameters, "
        f"{world} process{'es' if world > 1 else ''} on {device.type}, ZeRO {ds['zero_optimization'].get('stage', 0)}")

    def labels_so_far():
        state = asker.state
        return {"pairs_seen": min(step * schedule.step_pairs, len(train)), "queries": asker.queries(step - 1),
                "pseudo_labels": state["pseudo_labels"], "pseudo_label_accuracy": report.pseudo_label_accuracy(state),
                **report.audit_metrics(asker, step - 1, config)}

    def run_evaluation():
        metrics = evaluate(engine, test, test_batches, reference["test"], test_labels.to(device), config, shared)
        log.write(row := {"step": step, "epoch": step / schedule.epoch_steps, "split": "eval", **metrics, **labels_so_far()})
        say(f"step {step:,}: held-out accuracy {metrics['rewards/accuracies']:.3f}, loss {metrics['loss']:.4f}, "
            f"{row['queries']:,} labels bought")
        return metrics

    def keep_checkpoint():
        state = {"step": step, "start": start, "skipped": skipped, "wall_seconds": seconds_before + time.time() - start_time,
                 "oracle": asker.state, "evaluation": evaluation, "sums": reduced(sums)}
        checkpoint.save(engine, output, state, config.save_total_limit)

    # The loop.
    threshold = gate.Gate(config, asker, train.ids, schedule, step)
    if test and config.eval_on_start and step == 0:
        evaluation = run_evaluation()
    progress = bar(schedule.total_steps, "train", initial=step)
    if annotator:
        annotator.show = lambda missing: progress.set_description_str(
            f"waiting for {missing} labels" if missing else "train")
    asker.interrupt.install()
    window_start = time.time()
    while step < schedule.total_steps:
        try:
            asker.stop_if_asked()
            if notice := threshold.advance(step):
                say(f"WARNING: {notice}")
            rows = schedule.rows(step)
            if threshold.looks_ahead:
                ask_ahead(engine, asker, threshold, train, schedule.micro_batches(step), reference["train"], step, config,
                          shared)
                rows = threshold.rows_to_train(rows, step)
        except oracle.Waiting:
            progress.close()
            if step and shared_output and step not in checkpoint.complete(output):
                keep_checkpoint()
            asker.interrupt.remove()
            asker.close()
            raise
        engine.train()
        lr = set_learning_rate(engine, step, schedule.total_steps, config)
        unasked = []  # (pair id, pseudo-label)

        micro_batches = schedule.micro_batches(step, rows)
        for n, micro_batch in enumerate(micro_batches, 1):
            engine.set_gradient_accumulation_boundary(n == len(micro_batches))
            batch = data.collate(train, micro_batch, shared).to(device)
            logps = engine(batch)  # (B, 2)  log π_θ(y|x)
            rewards = adpo.implicit_rewards(logps, reference["train"][batch.rows], config.beta)  # (B, 2)
            margin = adpo.margins(rewards)  # (B,)

            # Algorithm 2: ask where |m| ≤ γ, else o = sign(m). The one wait for the device in a micro-step.
            m, unsure, audited = consult_gate(margin, batch.ids, threshold, config)
            answers = torch.tensor(asker.answer(batch.ids, m.tolist(), (unsure | audited).tolist(), step, audited.tolist()))
            o = adpo.choose_labels(m, answers, unsure if config.after_budget == "none" else None, config.pseudo_labels,
                                   threshold.scale)
            unasked += [(id, 1 if label > 0 else -1)
                        for id, label, answer in zip(batch.ids, o, answers) if id and label and not answer]

            o = o.to(device)
            losses = adpo.preference_loss(margin, o, config.loss_type, config.beta, config.label_smoothing)  # (B,)
            losses = no_step_if_infinite(losses)
            # The step's loss is the mean over its pairs, however they are cut; DeepSpeed divides by micro-steps and ranks.
            engine.backward((losses * batch.weights).sum() * (engine.gradient_accumulation_steps() * world / len(rows)))
            if engine.is_gradient_accumulation_boundary():
                grad_norm = gradient_norm(engine)
            engine.step()
            sums += metric_sums(losses, rewards, logps, o, batch.weights, batch.tokens)

        asker.report_pseudo(unasked)
        skipped = skipped_in_a_row(skipped, engine, grad_norm, step, [train.ids[row] for row in rows])
        step += 1
        epoch_end, last = step % schedule.epoch_steps == 0, step == schedule.total_steps
        if step % config.logging_steps == 0 or last or (step == 1 and config.logging_first_step):
            metrics, tokens = means(reduced(sums))
            row = {"step": step, "epoch": step / schedule.epoch_steps, "split": "train", **metrics, "learning_rate": lr,
                   "grad_norm": norm_for_log(engine, grad_norm),
                   **labels_so_far(), **threshold.metrics(), "tokens_per_second": tokens / (time.time() - window_start)}
            log.write(row)
            report.warn_of_wrong_pseudo_labels(asker, step - 1, config)
            progress.set_postfix_str(report.bar_text(row, evaluation, report.cost(asker, config)), refresh=False)
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
    asker.interrupt.remove()

    # The end: model, card, summary; then the hub.
    summary = report.summarise(train, schedule, asker, evaluation, device, config, engine.module.lm)
    names = save_model(engine, tokenizer, output, config)
    asker.close()
    engine.destroy()
    if rank() == 0 and toy_prompts:
        summary |= {f"gold_reward_{when}": toy.mean_gold_reward(folder, toy_prompts)
                    for when, folder in (("before", config.model_name_or_path), ("after", output))}
    report.finish(config, summary, output, names, command_line, seconds_before + time.time() - start_time)


# ----------------------------------------------------------------------------------------------------------------------
# Before the loop

def setup(config):
    """Threads, log levels and the process group."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-8, 1)  # M_ARENA_MAX: one heap; that of another thread keeps what it once held
    transformers.logging.set_verbosity(getattr(transformers.logging, config.log_level.upper()))
    data.datasets.logging.set_verbosity(getattr(data.datasets.logging, config.log_level.upper()))
    deepspeed.utils.logging.logger.setLevel(config.log_level.upper())
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)  # one process, where no launcher has set them
    if os.environ["WORLD_SIZE"] == "1":
        os.environ["MASTER_PORT"] = "0"  # any free port: nobody else has to find it, and runs side by side do not collide
    # On a CPU it would compile an op here, half a minute with a C++ compiler, that only its inference engine calls and that
    # leaves 69 MB a rank in /dev/shm for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_init_required=True, auto_mpi_discovery=False)
    except dist.DistNetworkError as error:
        raise UsageError(f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                         f"({one_line(error)}): is another run on? Say `deepspeed --master_port PORT train.py …`")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # or ranks that exchange objects would all take GPU 0
    if rank() != 0:
        transformers.utils.logging.disable_progress_bar()
        data.datasets.disable_progress_bars()


def resolve_toy(config):
    """Build the built-in task where the config names it, and put its folders in place of `toy`.

    Returns the prompts of its test split, to generate from, or None.
    """
    if "toy" not in (config.model_name_or_path, *config.dataset_mixer):
        return None
    try:
        model, pairs = rank_0_first(lambda: toy.build(config.toy_dir, label_noise=config.toy_label_noise))
    except ValueError as error:
        raise UsageError(f"toy: {error}")
    config.dataset_mixer = {str(pairs) if source == "toy" else source: share
                            for source, share in config.dataset_mixer.items()}
    if config.model_name_or_path == "toy":
        config.model_name_or_path = str(model)
    return [row["prompt"] for _, row in data.read_rows(str(pairs), "test")]


def load_data(config, tokenizer):
    """(train pairs, test pairs or None, annotator, test labels (pairs,) or None).

    The labels go to the annotator, on rank 0 alone; what the loop gets has none.
    """
    train, labels, truths = data.load_split(config, tokenizer, "train", config.max_train_samples)
    missing = [id for id in train.ids if id not in labels]
    if config.oracle == "dataset" and missing:
        raise UsageError(f"{train.place(missing[0])}: no label, and oracle is dataset ({len(missing)} of {len(train)} pairs "
                         "have none): label them, or say --oracle=human or --oracle=judge")
    annotator = make_annotator(config, train, labels, truths) if rank() == 0 else None
    test, truths = None, {}
    if config.do_eval:
        test, _, truths = data.load_split(config, tokenizer, "test", config.max_eval_samples)
    missing = [id for id in test.ids if id not in truths] if test else []
    if test is None or len(missing) == len(test):
        if config.do_eval:
            say(f"no {'labels in the ' if test else ''}test split: evaluation is skipped")
        return train, None, annotator, None
    if missing:
        raise UsageError(f"{test.place(missing[0])}: no label ({len(missing)} of {len(test)} pairs of the test split have "
                         "none): label them, or say --do_eval=false")
    return train, test, annotator, torch.tensor([float(truths[id]) for id in test.ids])


def make_annotator(config, train, labels, truths):
    """Who answers."""
    if config.oracle == "dataset":
        return oracle.DatasetAnnotator(labels, truths)
    texts = train.text_by_id()
    if config.oracle == "human":
        return oracle.HumanAnnotator(texts, config.oracle_wait_minutes)
    try:
        if config.judge == "reward_model":
            return judge.RewardModelJudge(texts, config.judge_model, seed=config.seed)
        price = None
        if config.judge_prompt_price is not None:
            price = config.judge_prompt_price / 1e6, config.judge_completion_price / 1e6
        return judge.ChatJudge(texts, config.judge_url, config.judge_model, os.environ.get(config.judge_api_key_env),
                               config.judge_concurrency, config.judge_timeout, seed=config.seed, price=price)
    except (OSError, ValueError) as error:
        raise UsageError(f"oracle judge: {one_line(error)}")


def check_same_pairs(*splits):
    """Refuse to train where the ranks have read different pairs, as hosts with files of their own may."""
    for name, found in zip(("train", "test"), splits):
        if found and len(set(all_gather(found.fingerprint))) > 1:
            raise UsageError(f"the {name} pairs are not the same on all hosts: copy data set and tokenizer from one to the "
                             "others, or put them on a file system that all share")


def policy_and_reference(config, ds, parts):
    """(engine of the policy, fingerprint of its weights, {part: reference log-probs (pairs, 2)}, whether a row holds both
    responses).

    The reference is the policy before its first step, scored by its own engine. One that is another model is loaded, scored
    and freed before the policy is loaded. parts: {"train": (pairs, batches), …}.
    """
    train, reference = parts["train"][0], None
    if config.ref_model_name_or_path:
        stage = 3 if ds["zero_optimization"].get("stage") == 3 else 0  # without an optimiser, stages 1 and 2 have no sense
        engine, weights, shared = start_engine(config, {**ds, "zero_optimization": {"stage": stage}},
                                               config.ref_model_name_or_path, train, with_optimizer=False)
        reference = reference_logps(engine, parts, weights, shared)
        engine.destroy()
        del engine
        gc.collect()
    engine, weights, shared = start_engine(config, ds, config.model_name_or_path, train)
    if not shared:
        say(f"two rows a pair: {type(engine.module.lm).__name__} cannot share a prompt, {engine.module.why_not_shared()}")
    if reference is None:
        reference = reference_logps(engine, parts, weights, shared)
    return engine, weights, {name: logps.to(engine.device) for name, logps in reference.items()}, shared


def reference_logps(engine, parts, weights, shared):
    """log π_ref of all pairs of the run, from the cache on disk or computed once. `parts`: {name: (pairs, batches)}.

    The batches are those that training and evaluation will use, and part of the cache's key: how a batch is padded shows
    in the last bits of a log-prob, and at step 0 every margin is to be 0, not nearly 0.
    """
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "adpo"
    scores = {}
    for name, (pairs, batches) in parts.items():
        depends = [data.VERSION, weights, pairs.fingerprint, str(next(engine.module.parameters()).dtype), shared,
                   engine.module.lm.config._attn_implementation, all_gather(batches)]
        path = cache / f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]}.safetensors"
        found = [cached_logps(path) if rank() == 0 else None]
        dist.broadcast_object_list(found, src=0, device=engine.device)  # rank 0's disk decides for all hosts
        if found[0] is None:
            found[0] = score(engine, pairs, batches, shared, f"reference log-probs ({name})")
            if rank() == 0:
                with writing(path, temporary := path.with_suffix(f".{os.getpid()}.tmp")):
                    cache.mkdir(parents=True, exist_ok=True)
                    save_file({"logps": found[0], "crc": crc(found[0])}, temporary)
                    os.replace(temporary, path)
        scores[name] = found[0]
    return scores


@torch.no_grad()
def score(engine, pairs, batches, shared, what):
    """Log-probs of all pairs, over all ranks: (pairs, 2) fp32 on the CPU, NaN for a pair that no batch holds."""
    engine.eval()
    logps = torch.zeros(len(pairs), 2, device=engine.device)
    seen = torch.zeros(len(pairs), 1, device=engine.device)
    with bar(len(batches), what) as progress:
        for rows in batches:
            batch = data.collate(pairs, rows, shared).to(engine.device)
            scored = engine(batch)  # (B, 2)
            if rows:
                logps[batch.rows], seen[batch.rows] = scored, 1.0
            progress.update()
    dist.all_reduce(logps)
    dist.all_reduce(seen)
    return logps.where(seen > 0, torch.nan).cpu()


def crc(tensor):
    """CRC-32 of a tensor's bytes, as a tensor."""
    return torch.tensor(zlib.crc32(tensor.numpy().tobytes()))


def cached_logps(path):
    """The log-probs in a file of the cache, or None where there is none that is whole, said so where it is damaged."""
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        if "crc" in found and found["crc"] != crc(found["logps"]):  # files of before have none
            raise ValueError("its checksum differs")
        return found["logps"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        say(f"{path} is damaged ({one_line(error)}): the log-probs of the reference are computed again")
        return None


# ----------------------------------------------------------------------------------------------------------------------
# In the loop

def consult_gate(margin, ids, threshold, config):
    """(margins, who is unsure, who is audited), each (B,) on the CPU. ids: None for a filler."""
    m = margin.detach().cpu()
    unsure = adpo.gate(m, threshold.gamma, ids, threshold.scale)
    drawn = [id is not None and oracle.is_audited(id, config.audit_fraction, config.seed) for id in ids]
    return m, unsure, torch.tensor(drawn) & ~unsure


@torch.no_grad()
def ask_ahead(engine, asker, threshold, pairs, micro_batches, reference, step, config, shared):
    """Put all questions of a step at once, over all micro-steps and ranks: so that people and judges are not waited for
    again and again, and so that a budget can go to the least sure pairs of the step. The loop then finds the answers in the
    ledger. Costs one more forward pass of the step; nothing changes between the two, so that they agree on who is asked."""
    engine.eval()
    ids, margins = [], []
    for rows in micro_batches:
        batch = data.collate(pairs, rows, shared).to(engine.device)
        margins.append(adpo.margins(adpo.implicit_rewards(engine(batch), reference[batch.rows], config.beta)))
        ids += batch.ids
    margins = torch.cat(margins)
    threshold.follow(ids, margins.tolist(), step)
    m, unsure, audited = consult_gate(margins, ids, threshold, config)
    asker.answer(ids, m.tolist(), (unsure | audited).tolist(), step, audited.tolist())


METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")


def metric_sums(losses, rewards, logps, labels, weights, tokens):
    """Sums over a micro-batch, (10,) fp64: pairs, labelled pairs, tokens, then one for each of METRICS.

    losses, labels, weights: (B,).  rewards, logps: (B, 2).  "Chosen" is by the label that the loss used; a margin of
    exactly 0 counts as half right.
    """
    labelled = weights * (labels != 0)  # (B,)
    first = (labels > 0)[:, None]  # (B, 1)
    ordered = [torch.where(first, x, x.flip(-1)) for x in (rewards.detach(), logps.detach())]  # (B, 2): chosen, rejected
    margin = ordered[0][:, 0] - ordered[0][:, 1]
    right = (margin > 0).float() + 0.5 * (margin == 0)
    columns = torch.stack([ordered[0][:, 0], ordered[0][:, 1], margin, right, ordered[1][:, 0], ordered[1][:, 1]])  # (6, B)
    sums = torch.stack([weights.sum(), labelled.sum(), weights.new_tensor(float(tokens)), (losses.detach() * weights).sum()])
    return torch.cat([sums, (columns * labelled).sum(-1)]).double()


def means(sums):
    """({metric: mean}, tokens) of reduced sums. The loss is over all pairs, the rest over those with a label."""
    pairs, labelled, tokens, loss, *rest = sums
    return {"loss": loss / max(pairs, 1)} | {k: v / max(labelled, 1) for k, v in zip(METRICS[1:], rest)}, tokens


@torch.no_grad()
def evaluate(engine, pairs, batches, reference, labels, config, shared):
    """Loss and accuracy on the test split, by its true labels, never by the gate.  labels: (pairs,), ±1."""
    engine.eval()
    sums = torch.zeros(10, dtype=torch.float64, device=engine.device)
    with bar(len(batches), "evaluate", leave=False) as progress:
        for rows in batches:
            batch = data.collate(pairs, rows, shared).to(engine.device)
            logps = engine(batch)
            rewards = adpo.implicit_rewards(logps, reference[batch.rows], config.beta)
            o = labels[batch.rows]
            losses = adpo.preference_loss(adpo.margins(rewards), o, config.loss_type, config.beta, config.label_smoothing)
            sums += metric_sums(losses, rewards, logps, o, batch.weights, batch.tokens)
            progress.update()
    return means(reduced(sums))[0]


# ----------------------------------------------------------------------------------------------------------------------
# The command

def same_command(argv):
    """The command line that started this run."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    where = ["--hostfile", "HOSTFILE"] if several_hosts() else ["--num_gpus", str(local)] if local > 1 else []
    launcher = ["deepspeed", *where] if local else ["python"]
    return shlex.join([*launcher, "train.py", *(arg for arg in argv if not arg.startswith("--local_rank"))])


def lost_peer(error):
    """Whether a collective failed because another rank is gone, which is what has to be looked at."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def leave_the_word_to_the_other(error):
    """Wait for the launcher to end this rank: it looks once a second for a rank that has ended and takes the exit code of
    the first that it finds, which is to be that of the rank that has something to say. Returns the exit code without it."""
    reason = one_line(error)
    reason = reason.partition("] ")[2].partition(". ")[0] or reason  # gloo's has the place in its source, and advice
    tqdm.write(f"rank {rank()}: stopped, another rank is gone ({reason})", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10)
    return 1


def let_rank_0_speak_first():
    """Before an error that all ranks may have alike is printed: rank 0 says it at once and ends, and its launcher then ends
    the others while they wait here. What one of them has alone it says a little later."""
    place = {name: int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK")}
    if place["RANK"]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30 if place["LOCAL_RANK"] else 20)  # seconds; on each other host its first rank is the first


def command(argv):
    """The command line. Returns the exit code: 0; 75 where answers are missing and the same command resumes; 2 where the
    user has to change something; 1 where training broke down. Behind 1 and 2 stands one line that says what is wrong."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    try:
        main(config := parse_config(argv), same_command(argv))
    except oracle.Waiting as waiting:
        answers = f" All answers so far are in {config.output_dir}/labels.sqlite." if config.objective == "adpo" else ""
        say(f"stopped: {waiting}.{answers} Resume with\n    {same_command(argv)}")
        return 75
    except sqlite3.Error as error:
        what = oracle.in_words(Path(config.output_dir) / "labels.sqlite", error)
        tqdm.write(f"error: {what}; then the same command goes on from the last checkpoint", file=sys.stderr)
        return 2
    except (UsageError, data.DataError, oracle.LedgerError, FloatingPointError) as error:
        let_rank_0_speak_first()
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)  # a line of its own, whatever bar stands there
        return 1 if isinstance(error, FloatingPointError) else 2
    except OSError as error:  # what is not written here but by libraries: their caches
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and "Not enough disk space" not in str(error):
            raise
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        tqdm.write(f"error: {one_line(error)}: make room under $HF_HOME ({home}) and $TMPDIR ({tempfile.gettempdir()}), or "
                   "make them writable; then the same command goes on", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        return leave_the_word_to_the_other(error)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(command(sys.argv[1:]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
