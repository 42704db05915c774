"""Log-probs of the reference policy, computed once and cached on disk, so that no second model is ever resident.

The reference is the policy before its first step, scored by the policy's own engine. A reference that is another model
(ref_model_name_or_path) is loaded, scored and freed before the policy is loaded.
"""

import gc
import hashlib
import json
import os
import tempfile
import zlib
from functools import partial
from inspect import getclosurevars
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import transformers
from deepspeed.runtime.zero import parameter_offload
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runtime.engine import SERVICES, check_against_plain_forward, make_optimizer, no_backward, starting
from runtime.errors import one_line
from runtime.files import replacing, writing
from runtime.model import load_policy
from runtime.ranks import all_gather, bar, from_rank_0, rank, say
from runtime.sources import hash_of_code

# The code that computes log-probs. Whoever changes it must not train against a reference that the old code has scored.
CODE = hash_of_code("adpo.py", "data.py", "runtime/model.py", "runtime/reference.py")


def add_other_reference(config, ds, scoring):
    """Fill `.ref_logps` of the splits from the model ref_model_name_or_path.  ds: the engine's config.  Returns the hash of
    its weights."""
    def use(engine):
        add_reference(engine, scoring)
        return engine.module.fingerprint

    stage = 3 if ds["zero_optimization"].get("stage") == 3 else 0  # without an optimiser, stages 1 and 2 make no sense
    ds = {**ds, "zero_optimization": {"stage": stage}}
    return in_engine(use, config, ds, scoring, name=config.ref_model_name_or_path, trained=False)


def in_engine(use, config, ds, scoring, trained=True, **model):
    """Load a model, check it, call `use(engine)`, free the model, and return what `use` returned: for models that are needed
    only before the policy is loaded.

    ds: the engine's config.  scoring: [(pairs, anything)], the splits that it reads.  trained: whether it has an optimiser.
    model: more arguments of load_policy.
    """
    ds = {name: value for name, value in ds.items() if name not in SERVICES}  # they hold the metrics of the run alone
    module = load_policy(config, trained=trained, **model)
    share_prompts(module, scoring)
    with starting(config, module, ds):
        optimizer = make_optimizer(config, module, ds) if trained else None
        engine = deepspeed.initialize(model=module, optimizer=optimizer, config=ds)[0]
    check_against_plain_forward(engine, *(pairs for pairs, _ in scoring))
    result = use(engine)
    destroy(engine)
    del engine, module, optimizer
    gc.collect()
    return result


def destroy(engine):
    """Destroy an engine so that its memory can be freed. After ZeRO-3, DeepSpeed would keep the module, and with it the
    engine, in a global list and in the cache of a method."""
    engine.destroy()
    parameter_offload.FWD_MODULE_STACK.clear()
    method = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    getclosurevars(method).nonlocals["func"].cache_clear()


def share_prompts(policy, scoring):
    """Let each row hold both responses of a pair, if this model can do that; otherwise report why it cannot."""
    reason = policy.why_not_shared()
    if reason:
        say(f"two rows per pair: {type(policy.lm).__name__} cannot share a prompt, because {reason}")
    for pairs, _ in scoring:
        pairs.shared = reason is None


def add_reference(engine, scoring):
    """Fill `.ref_logps`, log π_ref of all pairs of the splits, from the cache or by scoring them.

    scoring: [(pairs, batches)], Schedule.scoring_batches. The batches are those that training and evaluation will use, and
    they are part of the cache's key: padding changes the last bits of a log-prob, and so does another kernel, but at step 0
    every margin has to be 0, not nearly 0.
    """
    for pairs, batches in scoring:
        depends = [engine.module.fingerprint, pairs.fingerprint, pairs.shared, all_gather(batches),
                   str(next(engine.module.parameters()).dtype), *kernels(engine)]
        compute = partial(score, engine, pairs, batches, f"reference log-probs ({pairs.kind})")
        pairs.ref_logps = cached("reference", depends, compute)


def cached(kind, depends, compute):
    """The tensor that `compute` returns, on the CPU: read from the disk, or computed and written there. All ranks call it
    together.

    kind: how the file's name begins.  depends: everything but CODE that decides the result, as JSON can hold it.
    """
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "adpo"
    path = cache / f"{kind}-{hashlib.sha256(json.dumps([CODE, *depends]).encode()).hexdigest()[:32]}.safetensors"
    found = from_rank_0(read(path) if rank() == 0 else None)  # rank 0's disk decides for all hosts
    if found is None:
        if rank() == 0:
            with writing(path):  # what cannot be written is refused now, before hours are spent
                cache.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=cache).close()
        found = compute()
        if rank() == 0:
            with writing(path), replacing(path) as temporary:
                save_file({"values": found, "crc": crc(found)}, temporary)
    return found


def kernels(engine):
    """What decides which kernels compute a log-prob: the attention, with a mask or without, the compiler, the size of the
    head's products, whether they have to repeat, the versions, the device."""
    module, repeat = engine.module, torch.are_deterministic_algorithms_enabled()
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else engine.device.type
    versions = torch.__version__, transformers.__version__
    attention = module.lm.config._attn_implementation, module.takes_rows
    return *attention, module.compiled, module.chunk_size, repeat, *versions, device


def score(engine, pairs, batches, what):
    """What the engine returns for all pairs, log-probs or rewards, over all ranks: (pairs, 2) fp32 on the CPU; NaN for a
    pair that is in no batch.  batches: this rank's.  what: for the progress bar."""
    logps = torch.zeros(len(pairs), 2, device=engine.device)
    seen = torch.zeros(len(pairs), 1, device=engine.device)
    with bar(len(batches), what) as progress:
        for rows in batches:
            batch = pairs.batch(rows, engine.device)
            with no_backward(engine):
                scored = engine(batch).detach()  # (B, 2)
            if rows:
                logps[batch.rows], seen[batch.rows] = scored, 1.0
            progress.update()
    dist.all_reduce(logps)
    dist.all_reduce(seen)
    return logps.where(seen > 0, torch.nan).cpu()


def crc(tensor):
    """CRC-32 of a tensor's bytes, as a tensor."""
    return torch.tensor(zlib.crc32(tensor.numpy().tobytes()))


def read(path):
    """Read the tensor from a file that `cached` wrote. Returns None if the file is missing, or damaged, which it reports."""
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        if found["crc"] != crc(found["values"]):
            raise ValueError("its checksum differs")
        return found["values"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        say(f"{path} is damaged ({one_line(error)}): the values in it are computed again")
        return None
