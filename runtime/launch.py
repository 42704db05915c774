"""The command line: what is set up before a run, and with which exit code and which message it ends.

    0     finished
    75    stopped on purpose (Ctrl-C, SIGTERM, missing answers); the same command resumes
    2     the user has to change something; one line says what
    1     training broke down; one line says why, or a traceback if it is a bug

Import this module before DeepSpeed and transformers: it sets what they read when they are imported. It also turns off an
attention kernel.
"""

import ctypes
import errno
import os
import shlex
import signal
import sqlite3
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # `map` forks, and a tokenizer's threads do not survive that
os.environ.setdefault("DEEPSPEED_TIMEOUT", "60")  # minutes that a collective waits for a rank
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed's search for one, and its warnings
    # oneDNN caches what it compiled for its last 1,024 shapes of products, hundreds of MB; few micro-batches share a shape.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")
else:  # a run has hundreds of shapes, and segments that can grow leave fewer holes between them
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import datasets
import deepspeed
import torch.distributed as dist
import transformers
from deepspeed.accelerator import get_accelerator
from tqdm import tqdm

from labels.ledger import in_words
from runtime import checkpoint
from runtime.errors import Stopped, UsageError, one_line
from runtime.files import printing
from runtime.parse import help_text, parse_config
from runtime.ranks import host_group, lost_peer, rank, say, several_hosts, world_size

# With an explicit mask, cuDNN's attention takes 100 to 140 ms to plan for each new shape; a run has hundreds of shapes, and
# each token that tools/generate.py writes is one. On rows of low scores its gradients are NaN (H100, cuDNN 9.19:
# benchmarks/results/gpu.md). The memory-efficient kernel is as fast and does neither.
torch.backends.cuda.enable_cudnn_sdp(False)


def launch(main):
    """Run the command line around `main(config, command_line)` and end the process with its exit code."""
    sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show some letters shows ? instead
    try:
        code = command(sys.argv[1:], main)
    except Exception:
        traceback.print_exc()
        code = 1
    if code in (0, 75):  # all ranks end together
        if dist.is_initialized():
            dist.destroy_process_group()
        sys.exit(code)
    # This rank may be alone with its error, and under NCCL destroying the group would wait for the others for ever.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def command(argv, main):
    """The command line. Returns the exit code; before 1 and 2 it prints one line that says what is wrong."""
    if "--help" in argv or "-h" in argv:
        with printing():
            print(help_text())
        return 0
    try:
        config = parse_config(argv)
        set_up(config)
        main(config, same_command(argv))
    except Stopped as stopped:
        answers = f" All answers so far are in {config.output_dir}/labels.sqlite." if config.objective == "adpo" else ""
        newest = " --resume_from_checkpoint=null" if config.resume_from_checkpoint is not None else ""
        say(f"stopped: {stopped}.{answers} Resume with\n    {same_command(argv)}{newest}")
        return 75
    except KeyboardInterrupt:  # before the first step or after the last; in between, Run asks for a stop
        say("stopped: interrupted; the same command goes on")
        return 75
    except sqlite3.Error as error:
        what = in_words(Path(config.output_dir) / "labels.sqlite", error)
        tqdm.write(f"error: {what}; then the same command goes on from the last checkpoint", file=sys.stderr)
        return 2
    except (UsageError, FloatingPointError) as error:
        let_rank_0_speak_first()
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)  # on its own line, even where a progress bar is
        return 1 if isinstance(error, FloatingPointError) else 2
    except torch.OutOfMemoryError as error:
        tqdm.write(f"error: rank {rank()}: out of memory ({one_line(error, 150)}): lower micro_batch_tokens, "
                   "say --gradient_checkpointing=true, or share the model out with --deepspeed=configs/zero3.json",
                   file=sys.stderr)
        return 1
    except OSError as error:  # raised by libraries, about their caches
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and "Not enough disk space" not in str(error):
            raise
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        tqdm.write(f"error: {one_line(error)}: make room under $HF_HOME ({home}) and $TMPDIR ({tempfile.gettempdir()}), or "
                   "make them writable; then the same command goes on", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        return wait_to_be_ended(error)
    finally:
        checkpoint.unlock()
    return 0


def set_up(config):
    """Threads, log levels, deterministic kernels and the process group."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-8, 1)  # M_ARENA_MAX: a single heap; other threads' heaps would keep whatever they once held
    transformers.logging.set_verbosity(getattr(transformers.logging, config.log_level.upper()))
    datasets.logging.set_verbosity(getattr(datasets.logging, config.log_level.upper()))
    deepspeed.utils.logging.logger.setLevel(config.log_level.upper())
    # DeepSpeed does not bind a process that is alone to its GPU, and torch then warns at each barrier.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device under current context")
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS is not deterministic
        torch.use_deterministic_algorithms(True)
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)  # one process, started without a launcher
    if os.environ["WORLD_SIZE"] == "1":
        os.environ["MASTER_PORT"] = "0"  # any free port: nobody else has to find it, and parallel runs do not collide
    # On a CPU DeepSpeed would spend half a minute compiling this op, which only its inference engine calls and which leaves
    # 69 MB a rank in /dev/shm.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_init_required=True, auto_mpi_discovery=False)
    except dist.DistNetworkError as error:
        raise UsageError(f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                         f"({one_line(error)}): is another run going? Say `deepspeed --master_port PORT train.py …`")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # or ranks that exchange objects would all use GPU 0
    if world_size() > 1:
        host_group()  # now, while all ranks are here
    if rank() != 0:
        transformers.utils.logging.disable_progress_bar()
        datasets.disable_progress_bars()


def same_command(argv):
    """The command line that started this run."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    where = ["--hostfile", "HOSTFILE"] if several_hosts() else ["--num_gpus", str(local)] if local else []
    launcher = ["deepspeed", *where] if local else ["python"]
    return shlex.join([*launcher, "train.py", *(arg for arg in argv if not arg.startswith("--local_rank"))])


# Where several ranks end, the launcher looks once a second for a rank that has ended, reports the exit code of the first one
# that it finds, and ends the others.

def let_rank_0_speak_first():
    """Called before printing an error that all ranks may have: rank 0 prints it and ends, and the launcher then ends the
    others while they wait here. An error that only one of them has is printed after the wait."""
    if rank() or int(os.environ.get("RANK", 0)):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30 if int(os.environ.get("LOCAL_RANK", 0)) else 20)  # on each other host the first rank comes first


def wait_to_be_ended(error):
    """Let the launcher end this rank, so that it reports the failing rank's exit code. Returns ours, if it does not."""
    reason, what = one_line(str(error).partition("Exception raised from")[0]), "another rank is gone"  # no trace of C++
    if "NCCL error" in reason:  # it may as well be its own, such as a /dev/shm that is too small
        what = "NCCL failed; where no other rank has an error of its own, this is why"
    else:  # gloo's reason names a place in its source, and gives advice
        reason = reason.partition("] ")[2].partition(". ")[0] or reason
    tqdm.write(f"rank {rank()}: stopped, {what} ({reason})", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10)
    return 1
