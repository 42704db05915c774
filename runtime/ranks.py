"""Many processes, one run: who they are, what they say to the user and to each other, what they write together.

Every rank runs the same program. Rank 0 alone speaks, and writes what all need once.
"""

import contextlib
import os
import resource
import shutil
import sys

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from tqdm import tqdm

from runtime.config import UsageError


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def say(message):
    """One line from rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


def bar(total, what, **kwargs):
    """A progress bar on rank 0; in a log file, a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(total=total, desc=what, disable=rank() != 0 or not terminal and not kwargs.get("leave", True),
                dynamic_ncols=True, mininterval=0.5 if terminal else 20, **kwargs)


def all_gather(value):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def reduced(sums):
    """Metric sums over all ranks, as a list."""
    sums = sums.clone()
    dist.all_reduce(sums)
    return sums.tolist()


def rank_0_first(work):
    """Run `work` on rank 0, then on the first rank of each other host, whose caches may be its own, then on the others, who
    find its result in a cache."""
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for n in range(3):
        if n == turn:
            result = work()
        dist.barrier()
    return result


def several_hosts():
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return here < int(os.environ.get("WORLD_SIZE", "1"))


def is_shared(output):
    """Whether output_dir is one folder for all ranks: what rank 0 writes there, they all see. Makes it."""
    if not several_hosts():
        return True
    probe = output / all_gather(f".seen-by-all-{os.getpid()}")[0]
    if rank() == 0:
        with writing(probe):
            output.mkdir(parents=True, exist_ok=True)
            probe.touch()
    dist.barrier()
    seen = all(all_gather(probe.exists()))
    if rank() == 0:
        probe.unlink()
    return seen


def peak_memory(device):
    """Bytes at the peak, of the rank with most: of the GPU, or of the process."""
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    peak = torch.tensor(peak, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


def one_line(error):
    return " ".join(str(error).split())


@contextlib.contextmanager
def writing(path, scrap=None):
    """Around what writes a file or a folder. On a disk that takes no more, UsageError in one line; whatever goes wrong, the
    half-written `scrap`, a file or a folder, is removed."""
    try:
        yield
    except BaseException as error:
        if scrap and scrap.is_dir():
            shutil.rmtree(scrap, ignore_errors=True)
        elif scrap and scrap.exists():
            scrap.unlink()
        if "inline_container" in str(error):  # torch.save's way to say so
            reason = "the disk took only a part"
        elif isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or one_line(error)
        else:
            raise
        raise UsageError(f"{path}: cannot be written ({reason}): make room, or make it writable; then the same command goes "
                         "on from the last checkpoint")


def replace_text(path, text):
    """Write a file so that it is the old one or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, temporary):
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
