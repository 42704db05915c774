"""DeepSpeed's engine: its config made from ds_config.json and the YAML, its optimiser, its start, and the gradients that are
no finite numbers.
"""

import copy
import json
import math
import os
from pathlib import Path

import deepspeed
import pydantic
import torch
from safetensors import SafetensorError

import data
from runtime.config import HERE, REFUSED, UsageError
from runtime.model import load_model, weights_fingerprint
from runtime.ranks import one_line, say


def engine_config(config, world):
    """DeepSpeed's config: ds_config.json with each "auto" filled in from the YAML, which owns that number."""
    path = Path(config.deepspeed)
    path = path if path.exists() else HERE / path  # configs/ name their engine from here
    try:
        ds = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=data.unique_keys)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"deepspeed {config.deepspeed}: cannot be read ({getattr(error, 'strerror', None) or error})")
    except json.JSONDecodeError as error:
        raise UsageError(f"{config.deepspeed}, line {error.lineno}: not JSON ({error.msg})")
    except ValueError as error:
        raise UsageError(f"{config.deepspeed}: {error}")
    if not isinstance(ds, dict) or not isinstance(ds.get("zero_optimization", {}), dict):
        raise UsageError(f"{config.deepspeed}: expected an engine config, an object whose zero_optimization is one too")
    micro, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    owned = {"train_batch_size": micro * steps * world, "train_micro_batch_size_per_gpu": micro,
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
    zero = ds.setdefault("zero_optimization", {})
    offloads = any(zero.get(f"offload_{what}", {}).get("device", "none") != "none" for what in ("optimizer", "param"))
    if world == 1 and not config.bf16 and zero.get("stage", 0) in (1, 2) and not offloads:
        zero["stage"] = 0  # one process has nobody to share its optimiser with, only a second copy of all weights to keep
    if config.bf16 and zero.get("stage", 0) == 0:
        say("ZeRO 0 with bf16 would update bf16 weights, where a small step is lost: running as ZeRO 1, with fp32 weights")
        zero["stage"] = 1
    if config.optim == "rmsprop":
        ds["zero_allow_untested_optimizer"] = True  # DeepSpeed vouches for Adam under ZeRO alone, but treats them alike
    ds.setdefault("steps_per_print", 10**9)  # the run prints its own lines
    output = {"enabled": True, "output_path": config.output_dir}
    services = {"tensorboard": {**output, "job_name": "tensorboard"}, "csv_monitor": {**output, "job_name": "csv"},
                "wandb": {"enabled": True, "project": os.environ.get("WANDB_PROJECT", "adpo")}}
    ds.update({name: services[name] for name in config.report_to if name != "none"})
    return ds


def check_engine_config(ds, config):
    """Refuse, in one line, an engine config that DeepSpeed itself cannot read, and settings that would make a check of this
    program blind or that it cannot honour; as DeepSpeed reads them, so that "no" counts as false."""
    place = config.deepspeed
    try:
        sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # what they are is not known yet
        read = deepspeed.DeepSpeedConfig(copy.deepcopy({k: v for k, v in ds.items() if k != "train_batch_size"} | sizes))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UsageError(f"{place}: {f'field {field} of ' if field else ''}{error.title}: {one_line(first['msg'])}, found "
                         f"{first['input']!r:.80}")
    except Exception as error:  # DeepSpeed asserts, compares and looks up; whatever it says, it is about this file
        raise UsageError(f"{place}: DeepSpeed cannot read it ({type(error).__name__}: {one_line(error)[:300]})")
    bf16, zero = read.bfloat16_config, read.zero_config
    taken = "a step whose gradient is no finite number would be taken"
    for name, refused, reason in (
            ("fp16", read.float16_config.enabled, REFUSED["fp16"]),
            ("torch_autocast", read.torch_autocast_enabled, "the YAML's bf16 says what is computed in"),
            ("bf16.check_grad_overflow false", config.bf16 and not bf16.check_grad_overflow, taken),
            ("zero_optimization.compute_grad_norm false", not zero.compute_grad_norm, taken),
            ("bf16.bf16_master_weights_and_grads", bf16.bf16_master_weights_and_grads, "small steps would be lost"),
            ("zero_optimization.offload_optimizer.device nvme",
             zero.offload_optimizer and zero.offload_optimizer.device == "nvme",
             "checkpoints do not hold what lies there; offload to the cpu")):
        if refused:
            raise UsageError(f"{place}: {name} cannot be honoured: {reason}")
    if bf16.enabled != config.bf16:
        raise UsageError(f"{place}: bf16 is {bf16.enabled}, but the YAML says {config.bf16}; write "
                         "\"bf16\": {\"enabled\": \"auto\"}")


def decisive(ds):
    """What of an engine config the result depends on: all but how the work is shared out and what is printed."""
    free = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization",
            "steps_per_print", "tensorboard", "csv_monitor", "wandb", "comet", "wall_clock_breakdown", "memory_breakdown",
            "dump_state", "comms_logger", "flops_profiler", "activation_checkpointing", "aio"}
    return {name: value for name, value in ds.items() if name not in free}


def make_optimizer(config, module, ds):
    """AdamW with decay on matrices alone. DeepSpeed's own Adam where the optimiser lives in host memory."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.learning_rate)
    if ds["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        return DeepSpeedCPUAdam(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def initialize(module, optimizer, ds, place):
    """DeepSpeed's engine. What it finds wrong with the settings only now, together with this optimiser, is one line too."""
    try:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=ds)[0]
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"{place}: DeepSpeed cannot start with it ({type(error).__name__}: {one_line(error)[:300]})")


def start_engine(config, ds, name, pairs, with_optimizer=True):
    """(engine of a model, fingerprint of its weights, whether a row holds both responses), its rows checked on `pairs`."""
    try:
        module = load_model(config, name, trained=with_optimizer)
    except SafetensorError as error:
        raise UsageError(f"model {name}: a file of its weights is damaged ({one_line(error)}): fetch it again")
    shared = module.why_not_shared() is None and config.objective != "sft"
    optimizer = make_optimizer(config, module, ds) if with_optimizer else None
    weights = weights_fingerprint(config, name)
    engine = initialize(module, optimizer, ds, config.deepspeed)
    check_rows(engine, pairs, shared)
    return engine, weights, shared


@torch.no_grad()
def check_rows(engine, pairs, shared):
    """Refuse to train where a row's log-probs are not those of a plain forward: compare them on one real pair.

    The pair of median length; root mean square over its response tokens, in nats.
    """
    engine.eval()
    row = sorted(range(len(pairs)), key=lambda i: pairs.lengths[i])[len(pairs) // 2]
    plain = engine(data.collate(pairs, [row], shared=False).to(engine.device), per_token="plain")
    ours = engine(data.collate(pairs, [row], shared).to(engine.device), per_token="ours")
    error = (ours - plain).pow(2).mean().sqrt().item()
    limit = 0.15 if next(engine.module.parameters()).dtype == torch.bfloat16 else 1e-3
    if not error <= limit:
        raise UsageError(f"{type(engine.module.lm).__name__}: log-probs of pair {pairs.ids[row]} differ from a plain "
                         f"forward by {error:.2g} nats a token (limit {limit:.2g}): this architecture, version of "
                         "transformers or attn_implementation is not supported; try --attn_implementation=eager")


def no_step_if_infinite(losses):
    """The losses, times 1: an infinite one gets a gradient of NaN, so that the engine does not take the step."""
    return losses * (1 + 0 * losses.detach())


def gradient_norm(engine):
    """Norm of the step's gradient, before clipping, where the engine itself keeps no account of it (fp32 without ZeRO);
    else None, and `engine.get_global_grad_norm()` says it after the step. One that is not finite keeps the engine from
    taking the step; under ZeRO it does so by itself."""
    if engine.zero_optimization():
        return None
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
    if not math.isfinite(norm):
        engine.zero_grad()
        engine.set_gradient_accumulation_boundary(False)
    return norm


def norm_for_log(engine, grad_norm):
    """The gradient's norm, behind the step: what gradient_norm said before it, or else the engine."""
    return float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)


def skipped_in_a_row(before, engine, grad_norm, step, ids):
    """How many steps in a row were not taken because their gradient was no finite number, up to this one: 0 where it was
    taken. Names the pairs of one that was not, and raises FloatingPointError at the third.

    before: that number, up to the step before.  grad_norm: what gradient_norm said.  ids: the step's pairs, over all ranks.
    """
    if not (engine.optimizer.overflow if grad_norm is None else not math.isfinite(grad_norm)):
        return 0
    what = f"step {step + 1:,}: the loss or its gradient is not a finite number, so the step is not taken; its pairs are"
    if before + 1 < 3:
        say(f"{what} {', '.join(ids)}")
        return before + 1
    raise FloatingPointError(f"{what} {', '.join(ids)}; it is the third in a row: lower learning_rate, or look at the "
                             "model's weights and at these pairs. The checkpoints are as they were")
