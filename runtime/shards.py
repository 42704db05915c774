"""Weights and optimiser state of a run as files that any number of ranks and any ZeRO stage can go on from.

    save(engine, folder)      each rank writes what it holds, rank-00000.pt, and which part of which parameter that is
    load(engine, folder)      each rank takes what it needs, from whichever files have it

Why not DeepSpeed's own checkpoints: they are tied to the ranks and the stage that wrote them, its universal ones do not
support ZeRO 0, and both are pickles. These files hold only tensors, numbers and text, so loading them runs no code.

A rank holds flat tensors: the fp32 weights that the optimiser updates and, for each, optimiser state of the same shape
(AdamW's moments). A flat tensor consists of pieces of parameters: one whole parameter (ZeRO 0), or the rank's share of many
(ZeRO 1 to 3). Frozen weights are not saved: they come from the model's folder.
"""

import pickle

import deepspeed
import torch
import torch.distributed as dist

from runtime.errors import UsageError, one_line


def flat_tensors(engine):
    """[(flat fp32 tensor, {parameter: (offset in the flat tensor, offset in the parameter, elements)})] of this rank."""
    optimizer, names = engine.optimizer, {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [(p, {names[p]: (0, 0, p.numel())}) for group in optimizer.param_groups for p in group["params"]]
    if stage == 3:
        flats = [(flat, {}) for flat in optimizer.fp32_partitioned_groups_flat]
        for p in (p for group in optimizer.fp16_groups for p in group):
            i, offset, share = optimizer.grad_position[optimizer.get_param_id(p)]  # all ranks' shares are of one size
            start = share * dist.get_rank(p.ds_process_group)
            flats[i][1][names[p]] = (offset, start, max(0, min(share, p.ds_numel - start)))
        return flats
    # ZeRO 1 in bf16 is another class of DeepSpeed's than ZeRO 1 in fp32 and ZeRO 2.
    flats = getattr(optimizer, "fp32_groups_flat_partition", None) or optimizer.single_partition_of_fp32_groups
    flats = [(flat, {}) for flat in flats]
    for p, name in names.items():
        if mapping := getattr(p, "_hp_mapping", None):  # None where this rank has no part of it
            here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
            flats[mapping.param_group_index][1][name] = (here.start, there.start, here.numel)
    return flats


def torch_optimizer(engine):
    """The optimiser inside of DeepSpeed's, whose state has one entry a flat tensor."""
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def save(engine, folder):
    """Write this rank's part of a checkpoint. Raises OSError or RuntimeError where the disk takes no more."""
    folder.mkdir(parents=True, exist_ok=True)
    if engine.zero_optimization_stage() == 0 and dist.get_rank() != 0:
        return  # it holds the same as rank 0
    content = {"counts": [engine.global_steps, engine.global_samples, engine.skipped_steps], "flats": []}
    for flat, pieces in flat_tensors(engine):
        state = torch_optimizer(engine).state.get(flat, {})
        if not state and engine.global_steps > engine.skipped_steps:
            raise UsageError("this engine config cannot be checkpointed: DeepSpeed keeps no optimiser state beside its "
                             "weights; offload to the CPU or not at all, or say --save_strategy=no")
        tensors = {key: value.detach().view(-1) for key, value in state.items() if torch.is_tensor(value) and value.dim()}
        content["flats"].append({"pieces": pieces, "step": int(state.get("step", 0)),
                                 "tensors": {"weights": flat.detach().view(-1), **tensors}})
    torch.save(content, folder / f"rank-{dist.get_rank():05d}.pt")


def read_file(path):
    """What `save` wrote. Its tensors stay on the disk until they are used; anything but plain data is refused."""
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(f"{path}: holds more than tensors, numbers and text ({one_line(error)[:200]}): it is not what a "
                         "run wrote; do not use it")


class Pieces:
    """The files of a checkpoint. A tensor is only read from the disk when `read` asks for it.

    found: {parameter: [(piece, flat)]}, as `save` writes them.
    """

    def __init__(self, folder):
        self.folder, self.found, self.counts = folder, {}, None
        for path in sorted(folder.glob("rank-*.pt")):
            content = read_file(path)
            self.counts = content["counts"]
            for flat in content["flats"]:
                for name, piece in flat["pieces"].items():
                    self.found.setdefault(name, []).append((piece, flat))

    def check(self, sizes):
        """Refuse files that do not hold each parameter once. sizes: {parameter: elements}."""
        for name, size in sizes.items():
            held = sum(count for (_, _, count), _ in self.found.get(name, ()))
            if held != size:
                raise UsageError(f"{self.folder}: its files rank-*.pt hold {held:,} of the {size:,} elements of {name}: "
                                 "it belongs to another model or version; choose another output_dir, or move it away")

    def read(self, name, key, start, into):
        """Fill a 1-D tensor with the elements of a parameter from `start` on."""
        end = start + into.numel()
        for (offset, first, count), flat in self.found[name]:
            a, b = max(first, start), min(first + count, end)
            if a < b:
                into[a - start:b - start].copy_(flat["tensors"][key][offset + a - first:offset + b - first])


@torch.no_grad()
def load(engine, folder):
    """Put weights and optimiser state of a checkpoint into a fresh engine. All ranks call it together.

    Raises UsageError where the files are not of this model.
    """
    pieces, inner = Pieces(folder), torch_optimizer(engine)
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    pieces.check({name: getattr(p, "ds_numel", p.numel()) for name, p in trained.items()})
    for flat, mine in flat_tensors(engine):
        for name, (offset, start, count) in mine.items():
            saved = pieces.found[name][0][1]  # all that hold a part of a parameter have the same state of the optimiser
            for key in saved["tensors"]:
                if key != "weights" and key not in inner.state[flat]:
                    inner.state[flat][key] = torch.zeros_like(flat)
                whole = flat if key == "weights" else inner.state[flat][key]
                pieces.read(name, key, start, whole.view(-1)[offset:offset + count])
            if len(saved["tensors"]) > 1:
                inner.state[flat]["step"] = step_of(inner, flat, saved["step"])  # which its bias correction needs
    for name, p in trained.items():  # the copy that forward uses: in bf16, or partitioned
        partitioned = hasattr(p, "ds_id")
        with deepspeed.zero.GatheredParameters([p], modifier_rank=0, enabled=partitioned):
            if not partitioned or dist.get_rank() == 0:
                pieces.read(name, "weights", 0, whole := torch.empty(p.numel()))
                p.copy_(whole.view_as(p))
    engine.global_steps, engine.global_samples, engine.skipped_steps = pieces.counts


def step_of(inner, flat, step):
    """The count of steps as this optimiser keeps it: DeepSpeed's Adam a number, torch's a tensor."""
    if isinstance(inner, deepspeed.ops.adam.DeepSpeedCPUAdam):
        return step
    return torch.tensor(float(step), device=flat.device if inner.defaults.get("fused") else "cpu")
