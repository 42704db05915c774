"""Log-probs of the reference policy, computed once and cached on disk, so that no second model is ever resident.

With them come the features that the reward head reads (labels/head.py), if the config asks for one.

The reference is the policy before its first step, scored by the policy's own engine. A reference that is another model
(ref_model_name_or_path) is loaded, scored and freed before the policy is loaded.
"""

import gc
import hashlib
import json
import os
import zlib
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import data
from labels import head
from runtime.engine import check_against_plain_forward, no_backward, starting
from runtime.errors import one_line
from runtime.files import replacing, writing
from runtime.model import load_policy
from runtime.ranks import all_gather, bar, from_rank_0, gather_to_rank_0, rank, say


def add_other_reference(config, ds, scoring):
    """Fill `.ref_logps` of the splits from the model ref_model_name_or_path.  ds: the engine's config."""
    stage = 3 if ds["zero_optimization"].get("stage") == 3 else 0  # without an optimiser, stages 1 and 2 make no sense
    module = load_policy(config, config.ref_model_name_or_path, trained=False)
    share_prompts(module, scoring)
    ds = {**ds, "zero_optimization": {"stage": stage}}
    with starting(config, module, ds):
        engine, *_ = deepspeed.initialize(model=module, config=ds)
    check_against_plain_forward(engine, *(pairs for pairs, _ in scoring))
    add_reference(engine, scoring, config.pseudo_labels == "head")
    engine.destroy()
    del engine, module
    gc.collect()


def share_prompts(policy, scoring):
    """Let each row hold both responses of a pair, if this model can do that; otherwise report why it cannot."""
    reason = policy.why_not_shared()
    if reason:
        say(f"two rows per pair: {type(policy.lm).__name__} cannot share a prompt, because {reason}")
    for pairs, _ in scoring:
        pairs.shared = reason is None


def add_reference(engine, scoring, with_features=False):
    """Fill `.ref_logps`, log π_ref of all pairs of the splits, from the cache or by scoring them.

    with_features: fill `.features` of the training split too, on rank 0.

    scoring: [(pairs, batches)], Schedule.scoring_batches. The batches are those that training and evaluation will use, and
    they are part of the cache's key: padding changes the last bits of a log-prob, and so does another kernel, but at step 0
    every margin has to be 0, not nearly 0.
    """
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "adpo"
    for pairs, batches in scoring:
        depends = [data.VERSION, engine.module.fingerprint, pairs.fingerprint, pairs.shared, all_gather(batches),
                   str(next(engine.module.parameters()).dtype), *kernels(engine)]
        wanted = with_features and pairs.kind == "train"
        if wanted:
            depends += ["features", head.FEATURES, head.WIDTH, head.COMPONENTS]
        path = cache / f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]}.safetensors"
        found = (read(path) if rank() == 0 else None) or {}
        logps = from_rank_0(found.get("logps"))  # rank 0's disk decides for all hosts
        if logps is None:
            logps, features = score(engine, pairs, batches, f"reference log-probs ({pairs.kind})", wanted)
            if rank() == 0:
                found = {"logps": logps} | ({"features": features} if wanted else {})
                with writing(path):
                    cache.mkdir(parents=True, exist_ok=True)
                    with replacing(path) as temporary:
                        save_file(found | {"crc": crc(found)}, temporary)
        pairs.ref_logps, pairs.features = logps, found.get("features")


def kernels(engine):
    """What decides which kernels compute a log-prob: the attention, the compiler, the version, the device."""
    device = torch.cuda.get_device_name() if engine.device.type == "cuda" else engine.device.type
    return engine.module.lm.config._attn_implementation, engine.module.compiled, torch.__version__, device


def score(engine, pairs, batches, what, with_features=False):
    """(log-probs of all pairs, their features), over all ranks and on the CPU.

    Log-probs: (pairs, 2) fp32; NaN for a pair that is in no batch. Features: the principal components of
    head.pair_features, (pairs, COMPONENTS) fp32 on rank 0, zeros for a pair that is in no batch; else None.
    """
    logps = torch.zeros(len(pairs), 2, device=engine.device)
    seen = torch.zeros(len(pairs), 1, device=engine.device)
    features = []  # (rows, their features) of this rank's batches
    with bar(len(batches), what) as progress:
        for rows in batches:
            batch = pairs.batch(rows, engine.device)
            with no_backward(engine):
                scored = engine(batch, **({"features": head.pair_features} if with_features else {}))  # (B, 2)
            if with_features:
                scored, found = scored
                features += [(batch.rows.cpu(), found.detach().cpu())] if rows else []
            if rows:
                logps[batch.rows], seen[batch.rows] = scored.detach(), 1.0
            progress.update()
    dist.all_reduce(logps)
    dist.all_reduce(seen)
    return logps.where(seen > 0, torch.nan).cpu(), gather_features(features, len(pairs)) if with_features else None


def gather_features(mine, pairs):
    """All ranks' features, compressed, in the order of the pairs: (pairs, COMPONENTS) on rank 0, None on the others.

    mine: [(rows (B,), features (B, FEATURES))]."""
    gathered = gather_to_rank_0(mine)
    if gathered is None:
        return None
    rows, features = map(torch.cat, zip(*(part for parts in gathered for part in parts)))
    compressed = head.principal(features, head.COMPONENTS)
    return torch.zeros(pairs, compressed.shape[1]).index_copy_(0, rows, compressed)


def crc(tensors):
    """CRC-32 of the bytes of these tensors, as a tensor.  tensors: {name: tensor}."""
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].numpy().tobytes(), found)
    return torch.tensor(found)


def read(path):
    """The tensors in a file of the cache, or None if there is none or it is damaged; the latter is reported."""
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        if found.pop("crc") != crc(found):
            raise ValueError("its checksum differs")
        found["logps"]  # a KeyError where they are missing
        return found
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        say(f"{path} is damaged ({one_line(error)}): the log-probs of the reference are computed again")
        return None
