"""DeepSpeed's engine: its config, made from ds_config.json and the YAML; its optimiser; the check at start-up; the backward
pass; and steps whose gradient is not finite.
"""

import contextlib
import copy
import io
import json
import math
import os
from pathlib import Path

import deepspeed
import pydantic
import torch
from deepspeed.accelerator import get_accelerator

import data
from runtime.config import ROOT
from runtime.errors import UsageError, one_line
from runtime.model import tolerance
from runtime.parse import UNSUPPORTED
from runtime.ranks import all_gather, barrier, lost_peer, say, world_size
from runtime.sources import unique_keys

# What a model's code may raise on rows that it cannot take.
FROM_MODELS = ValueError, RuntimeError, LookupError, TypeError, AttributeError, AssertionError
# The services that DeepSpeed's monitor reports to, as the engine's config names them.
SERVICES = "tensorboard", "csv_monitor", "wandb", "comet"


def engine_config(config):
    """DeepSpeed's config: ds_config.json with each "auto" filled in from the YAML, which owns that number."""
    ds = read_engine_file(config)
    micro, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    owned = {"train_batch_size": micro * steps * world_size(), "train_micro_batch_size_per_gpu": micro,
             "gradient_accumulation_steps": steps, "gradient_clipping": config.max_grad_norm, "bf16.enabled": config.bf16}

    def fill(node, prefix):
        for name, value in node.items():
            path = prefix + name
            if isinstance(value, dict):
                fill(value, path + ".")
            elif value == "auto":
                if path not in owned:
                    raise UsageError(f"{config.deepspeed}: {path} is \"auto\", but no key of the YAML owns it; give a value")
                node[name] = owned[path]
            elif path in owned and value != owned[path]:
                raise UsageError(f"{config.deepspeed}: {path} is {value}, but the YAML says {owned[path]}; write \"auto\"")
    fill(ds, "")
    check_engine_config(ds, config)
    choose_stage(ds.setdefault("zero_optimization", {}), config)
    if config.optim == "rmsprop":
        ds["zero_allow_untested_optimizer"] = True  # DeepSpeed has tested only Adam under ZeRO, but treats RMSprop the same
    ds.setdefault("steps_per_print", 10**9)  # the run prints its own lines
    ds.setdefault("timers", {"throughput": {"enabled": False}})  # it would wait for the device twice a micro-step
    output = {"enabled": True, "output_path": config.output_dir}
    services = {"tensorboard": {**output, "job_name": "tensorboard"}, "csv_monitor": {**output, "job_name": "csv"},
                "wandb": {"enabled": True, "project": os.environ.get("WANDB_PROJECT", "adpo")}}
    ds.update({name: services[name] for name in config.report_to if name != "none"})
    return ds


def read_engine_file(config):
    """The content of the file that the key `deepspeed` names."""
    path = Path(config.deepspeed)
    path = path if path.exists() else ROOT / path  # the YAML files name their engine's file from the repository's root
    try:
        ds = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"deepspeed {config.deepspeed}: cannot be read ({getattr(error, 'strerror', None) or error})")
    except json.JSONDecodeError as error:
        raise UsageError(f"{config.deepspeed}, line {error.lineno}: not JSON ({error.msg})")
    except ValueError as error:
        raise UsageError(f"{config.deepspeed}: {error}")
    if not isinstance(ds, dict) or not isinstance(ds.get("zero_optimization", {}), dict):
        raise UsageError(f"{config.deepspeed}: expected an engine config, an object whose zero_optimization is one too")
    for name, ours in (("optimizer", "optim, learning_rate and weight_decay"),
                       ("scheduler", "lr_scheduler_type and warmup_ratio")):
        if name in ds:
            raise UsageError(f"{config.deepspeed}: {name} cannot be honoured: the YAML's {ours} decide that; take it out")
    return ds


def offloads(zero):
    """Whether the optimiser is on the host.  zero: zero_optimization of the config."""
    return (zero.get("offload_optimizer") or {}).get("device", "none") != "none"


def choose_stage(zero, config):
    """Change the ZeRO stage where another one computes the same and is better.  zero: zero_optimization of the config."""
    stage = zero.get("stage", 0)
    if world_size() == 1 and stage in (1, 2) and not offloads(zero):  # alone, a process has nobody to share with
        # fp32: ZeRO would only keep a second copy of the weights. bf16: a fifth faster on an H100 (results/gpu.md).
        zero["stage"] = 1 if config.bf16 else 0
    elif config.bf16 and stage == 0:
        say("ZeRO 0 with bf16 would update bf16 weights, which loses small steps: running as ZeRO 1, with fp32 weights")
        zero["stage"] = 1
    elif offloads(zero) and stage == 0:
        say("ZeRO 0 would leave the optimiser on the device, despite offload_optimizer: running as ZeRO 1")
        zero["stage"] = 1


def check_engine_config(ds, config):
    """Refuse, in one line, an engine config that DeepSpeed cannot read, and settings that would blind one of our checks or
    that we cannot honour. They are taken as DeepSpeed reads them, so that "no" counts as false."""
    place = config.deepspeed
    try:
        sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # the real ones are not known yet
        read = deepspeed.DeepSpeedConfig(copy.deepcopy({k: v for k, v in ds.items() if k != "train_batch_size"} | sizes))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UsageError(f"{place}: {f'field {field} of ' if field else ''}{error.title}: {one_line(first['msg'])}, found "
                         f"{first['input']!r:.80}")
    except Exception as error:  # DeepSpeed raises many kinds; whatever it says is about this file
        raise UsageError(f"{place}: DeepSpeed cannot read it ({type(error).__name__}: {one_line(error)[:300]})")
    bf16, zero = read.bfloat16_config, read.zero_config
    if config.torch_compile and zero.stage == 3:
        raise UsageError(f"{place}: torch_compile cannot be honoured: ZeRO-3 gathers the weights of a layer while it runs, "
                         "which compiled layers do not allow; use ZeRO-2, or say --torch_compile=false")
    taken = "a step whose gradient is not finite would be taken"
    for name, refused, reason in (
            ("fp16", read.float16_config.enabled, UNSUPPORTED["fp16"]),
            ("torch_autocast", read.torch_autocast_enabled, "the YAML's bf16 says what is computed in"),
            ("bf16.check_grad_overflow false", config.bf16 and not bf16.check_grad_overflow, taken),
            ("zero_optimization.compute_grad_norm false", not zero.compute_grad_norm, taken),
            ("bf16.bf16_master_weights_and_grads", bf16.bf16_master_weights_and_grads, "small steps would be lost"),
            ("zero_optimization.offload_optimizer.device nvme",
             zero.offload_optimizer and zero.offload_optimizer.device == "nvme",
             "checkpoints do not hold what is stored there; offload to the cpu"),
            ("zero_optimization.offload_param",
             zero.stage != 3 and zero.offload_param and zero.offload_param.device != "none",
             f"ZeRO {zero.stage} keeps the weights on the device; use ZeRO-3, or take it out"),
            *((name, getattr(read.monitor_config, name).enabled and name not in config.report_to,
               f"a run rewrites its folder, which may hold other runs; say --report_to={name}, which writes into output_dir")
              for name in ("tensorboard", "csv_monitor"))):
        if refused:
            raise UsageError(f"{place}: {name} cannot be honoured: {reason}")
    if bf16.enabled != config.bf16:
        raise UsageError(f"{place}: bf16 is {bf16.enabled}, but the YAML says {config.bf16}; write "
                         "\"bf16\": {\"enabled\": \"auto\"}")


def settings_that_count(ds):
    """The engine settings that affect results: all but how the work is shared out, timed and printed."""
    free = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization",
            "steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "comms_logger", "flops_profiler",
            "activation_checkpointing", "aio", "timers", *SERVICES}
    return {name: value for name, value in ds.items() if name not in free}


def make_optimizer(config, module, ds):
    """AdamW with weight decay on matrices alone. Where the optimiser is offloaded to the host, DeepSpeed's own Adam."""
    def dims(parameter):
        return len(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 only ds_shape knows the whole

    matrices = [p for p in module.parameters() if p.requires_grad and dims(p) >= 2]
    others = [p for p in module.parameters() if p.requires_grad and dims(p) < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.learning_rate)
    if offloads(ds["zero_optimization"]):
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        try:
            return DeepSpeedCPUAdam(groups, lr=config.learning_rate)
        except RuntimeError as error:
            raise UsageError(f"{config.deepspeed}: offload_optimizer needs DeepSpeed's Adam for the host, which cannot be "
                             f"compiled ({one_line(error.__cause__ or error, 200)}): put a C++ compiler and ninja on PATH, "
                             "where activating Python's environment puts ninja")
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


@contextlib.contextmanager
def starting(config, policy, ds):
    """Around deepspeed.initialize: what it only now finds wrong with the settings becomes one line. Under ZeRO-3, first give
    each rank its part of the weights.

    DeepSpeed alone would move the whole model to each device and part it there. This moves one weight at a time, so that a
    model need not fit on one device. In host memory, the weights are files mapped by transformers, which all ranks share.
    """
    barrier()  # a rank may read its model, or a judge's, for longer than DeepSpeed's groups wait: 10 minutes under NCCL
    try:
        if ds["zero_optimization"].get("stage") == 3:
            deepspeed.zero.Init(module=policy, config_dict_or_path=ds)
            for buffer in policy.buffers():
                buffer.data = buffer.data.to(get_accelerator().current_device_name())
        # With bf16, DeepSpeed prints a dozen lines about memory, whatever log_level says.
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"{config.deepspeed}: DeepSpeed cannot start with it ({type(error).__name__}: "
                         f"{one_line(error)[:300]})")


@torch.no_grad()
def check_against_plain_forward(engine, *splits):
    """Refuse to train where our rows do not give the log-probs of a plain forward. If attention without a mask is to blame,
    use a mask; if rows that share a prompt are, give each response a row of its own (Pairs.shared).

    In each split the longest, the median and the shortest pair are compared, ours in one micro-batch and in training mode.
    That shows a window that counts indices instead of positions, positions scaled by the longest row, and noise other than
    dropout. The measure is the root mean square over a pair's response tokens, in nats.  splits: Pairs, or None.
    """
    model = type(engine.module.lm).__name__
    limit = tolerance(engine.module.lm)
    for pairs in filter(None, splits):
        by_length = sorted(range(len(pairs)), key=lambda i: pairs.lengths[i])
        rows = list(dict.fromkeys([by_length[-1], by_length[len(pairs) // 2], by_length[0]]))
        check_positions(engine, pairs, rows[0])
        plain = plain_logps(engine, data.collate(pairs, rows, shared=False))  # (N,)
        check_causal(engine, pairs, rows[-1], limit)
        error, what = largest_error(engine, pairs, rows, plain)
        if not error <= limit and pairs.shared and engine.module.takes_rows:  # heads of 512, which the kernel refuses, say
            without, engine.module.takes_rows = what, False
            error, what = largest_error(engine, pairs, rows, plain)
            if error <= limit:
                say(f"attention with a mask, which is slower: without one, {without}")
        if not error <= limit and pairs.shared:
            say(f"two rows per pair: {model} cannot share a prompt, {what}")
            for split in filter(None, splits):
                split.shared = False
            error, what = largest_error(engine, pairs, rows, plain)
        if not error <= limit:
            raise UsageError(f"{model}: {what} (limit {limit:.2g}): this architecture, version of transformers, or "
                             f"attn_implementation is not supported; {advice(engine.module.lm)}")


def plain_logps(engine, batch):
    """Log-prob of each response token by the model's own forward, row by row: (N,).  batch: in two rows a pair."""
    engine.eval()
    try:
        with torch.compiler.set_stance("force_eager"):  # plain includes: not compiled
            return engine(batch.to(engine.device), per_token="plain")
    except FROM_MODELS as error:
        reraise_if_not_the_models(error)
        raise UsageError(f"{type(engine.module.lm).__name__}: its own forward fails on text "
                         f"({type(error).__name__}: {one_line(error, 200)}): this model or version of transformers is not "
                         "supported")


def reraise_if_not_the_models(error):
    """Raise an error again that does not come from the model's own code: no memory, or another rank is gone."""
    if isinstance(error, torch.OutOfMemoryError) or lost_peer(error):
        raise error


def largest_error(engine, pairs, rows, plain):
    """(the largest difference of a pair from a plain forward, in nats a token; the same in words, for the user).

    plain: (N,), from plain_logps. If the model fails on our rows, the difference is infinite.
    """
    batch = pairs.batch(rows, engine.device)
    try:
        with no_backward(engine):
            engine.train()
            squares = (engine(batch, per_token="ours").detach() - plain).pow(2)  # (N,)
    except FROM_MODELS as error:
        reraise_if_not_the_models(error)
        return all_ranks(math.inf, f"its forward fails on such rows ({type(error).__name__}: {one_line(error, 200)})")
    counts = batch.lengths.view(len(rows), -1).sum(-1).tolist()  # response tokens of each pair
    errors = [part.mean().sqrt().item() for part in squares.split(counts)]
    error, row = max((error if math.isfinite(error) else math.inf, row) for error, row in zip(errors, rows))
    return all_ranks(error, f"log-probs of pair {pairs.ids[row]} differ from a plain forward by {error:.2g} nats a token")


def all_ranks(error, what):
    """The largest error of all ranks, and its words: what it decides, cards of different kinds must decide together."""
    return max(all_gather((error, what))) if world_size() > 1 else (error, what)


def advice(lm):
    """What the user may try if a model's rows are wrong."""
    text = lm.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings") or getattr(text, "original_max_position_embeddings", None)
    if rope.get("rope_type") in ("longrope", "dynamic"):  # scaled by the longest row of a batch
        return f"its positions depend on the longest row of a micro-batch: keep max_length within {limit or 'its limit'}"
    return "try --attn_implementation=eager"


def check_positions(engine, pairs, row):
    """Refuse a pair that is longer than the model's table of positions."""
    longest = data.collate(pairs, [row]).longest
    for name, module in engine.module.lm.named_modules():
        of_text = not any(word in name for word in ("vision", "visual", "image", "audio"))
        if isinstance(module, torch.nn.Embedding) and ("position" in name or name.endswith("wpe")) and of_text:
            size = module.num_embeddings - getattr(module, "offset", 0)
            if longest > size:
                raise UsageError(f"{pairs.place(pairs.ids[row])}: has {longest:,} tokens, but "
                                 f"{type(engine.module.lm).__name__} has positions for {size:,}: lower max_length to {size}")


def check_causal(engine, pairs, row, limit):
    """Refuse a model in which a later token changes the log-probs of earlier ones."""
    batch, changed = (data.collate(pairs, [row], shared=False) for _ in range(2))
    last = torch.arange(len(batch.segments)), (batch.segments >= 0).sum(-1) - 1  # each row's last token
    changed.input_ids[last] = torch.where(changed.input_ids[last] == 0, 1, 0)
    ends = batch.lengths.cumsum(0) - 1  # the changed token's own log-prob does change
    difference = (plain_logps(engine, batch) - plain_logps(engine, changed)).cpu().index_fill(0, ends, 0.0)
    if not difference.abs().max().item() <= limit:
        raise UsageError(f"{type(engine.module.lm).__name__}: a later token changes the log-probs of earlier ones, by "
                         f"{difference.abs().max().item():.2g} nats: it is not a causal language model")


@contextlib.contextmanager
def no_backward(engine):
    """Around forward passes without a backward pass: evaluation mode, and torch.no_grad().

    Without gradients, compiled layers would be compiled once more, into kernels whose last bits differ, but at step 0 every
    margin has to be 0. So they run as in training, and what they save for a backward pass is dropped at once.
    """
    compiled = engine.module.compiled
    engine.train(compiled)
    dropping = torch.autograd.graph.saved_tensors_hooks(lambda saved: None, lambda nothing: None)
    with torch.set_grad_enabled(compiled), dropping if compiled else contextlib.nullcontext():
        yield


def backward(engine, loss, whole, last):
    """Backward of one micro-batch and, if it is the last one of its step, the optimiser's step.

    loss: the sum over this rank's pairs (or tokens) of the micro-batch.  whole: the number of pairs (or tokens) of the whole
    step over all ranks. The step's loss is the mean over them, however it is cut into micro-batches and ranks.
    Returns the norm of the step's gradient after the last micro-batch where DeepSpeed does not compute it, else None.
    """
    engine.set_gradient_accumulation_boundary(last)
    loss = loss * (1 + 0 * loss.detach())  # an infinite loss gets a gradient of NaN, so that the engine skips the step
    # DeepSpeed divides by the accumulation steps and averages over the ranks.
    engine.backward(loss * (engine.gradient_accumulation_steps() * world_size() / whole))
    norm = gradient_norm(engine) if last else None
    engine.step()
    return norm


def gradient_norm(engine):
    """Norm of the step's gradient, before clipping; where it is not finite, the engine is kept from stepping. None under
    ZeRO, where the engine does both itself; engine.get_global_grad_norm() has the norm after the step."""
    if engine.zero_optimization():
        return None
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
    if not math.isfinite(norm):
        engine.zero_grad()
        engine.set_gradient_accumulation_boundary(False)
    return norm


def norm_to_log(engine, norm):
    """Gradient norm to log: ours if computed, otherwise DeepSpeed's."""
    return float(engine.get_global_grad_norm() if norm is None else norm)


def skipped_in_a_row(before, engine, norm, step, ids):
    """How many steps in a row, up to this one, were skipped because their gradient was not finite: 0 if this one was taken.

    Names the pairs of a skipped step; raises FloatingPointError at the third in a row.
    before: what this function returned at the step before.  norm: what `backward` returned.  ids: the step's pairs, over all
    ranks.
    """
    if not (engine.optimizer.overflow if norm is None else not math.isfinite(norm)):
        return 0
    what = f"step {step + 1:,}: the loss or its gradient is not a finite number, so the step is not taken; its pairs are"
    if before + 1 < 3:
        say(f"{what} {', '.join(ids)}")
        return before + 1
    raise FloatingPointError(f"{what} {', '.join(ids)}; it is the third in a row: lower learning_rate, or look at the "
                             "model's weights and at these pairs. The checkpoints are as they were")
