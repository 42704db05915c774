"""Many processes, one run: who they are, and what they tell the user and each other.

Every rank runs the same program. Rank 0 alone prints, and writes the files that all of them need once.
"""

import functools
import os
import resource
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from tqdm import tqdm

from runtime.files import writing


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def say(message):
    """Print one line from rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


def bar(total, what, **kwargs):
    """A progress bar on rank 0; in a log file, a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(total=total, desc=what, disable=rank() != 0 or not terminal and not kwargs.get("leave", True),
                dynamic_ncols=True, mininterval=0.5 if terminal else 20, **kwargs)


def all_gather(value):
    """Every rank's value as a list, on every rank."""
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def reduced(sums):
    """A tensor's sums over all ranks, as a list; the tensor itself stays as it is."""
    sums = sums.clone()
    dist.all_reduce(sums)
    return sums.tolist()


# Pair ids, answers and signals are host data: they travel over gloo, past the GPUs.

@functools.cache
def host_group():
    """The ranks as a gloo group. They wait in it while people label, for days if need be. A rank that has died is noticed
    without a timeout, because its connections close."""
    return dist.new_group(backend="gloo", timeout=timedelta(days=365))


def gather_to_rank_0(value):
    """Every rank's value as a list on rank 0; None on the others."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered, dst=0, group=host_group())
    return gathered


def scatter_from_rank_0(values):
    """Each rank's own item of the list that rank 0 has."""
    if world_size() == 1:
        return values[0]
    box = [None]
    dist.scatter_object_list(box, values, src=0, group=host_group())
    return box[0]


def from_rank_0(value):
    """Rank 0's value, on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=host_group())
    return box[0]


def on_any_rank(flag):
    """Whether the flag is set on at least one rank."""
    flag = torch.tensor(int(flag))
    if world_size() > 1:
        dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=host_group())
    return bool(flag)


def barrier():
    """Wait for all ranks, in the same way: rank 0 may tokenise or upload for hours."""
    if world_size() > 1:
        dist.barrier(group=host_group())


def rank_0_first(work):
    """Run `work` on rank 0, then on the first rank of each other host, whose caches may be its own, then on the others, who
    find its result in a cache."""
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for n in range(3):
        if n == turn:
            result = work()
        barrier()
    return result


def lost_peer(error):
    """Whether a collective failed because another rank is gone; that rank's error is the one to look at."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def several_hosts():
    """Whether the launcher has started more ranks than those of this host."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return here < int(os.environ.get("WORLD_SIZE", "1"))


def is_shared(output):
    """Whether output_dir is one folder for all ranks, so that they all see what rank 0 writes there. Makes the folder."""
    if not several_hosts():
        return True
    probe = output / all_gather(f".seen-by-all-{os.getpid()}")[0]
    if rank() == 0:
        with writing(probe):
            output.mkdir(parents=True, exist_ok=True)
            probe.touch()
    barrier()
    seen = all(all_gather(probe.exists()))
    if rank() == 0:
        probe.unlink()
    return seen


def peak_memory(device):
    """Peak memory in bytes of the rank that used most: of its GPU, or on a CPU of the process."""
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    peak = torch.tensor(peak, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()
