"""Which run is in output_dir, which of its checkpoints are whole, and how they are written, so that a kill never leaves half
of one.

A checkpoint is a folder checkpoint-N with the files of shards.py, and trainer_state.json with the loop's state and a
checksum of every file. It is written under another name and renamed when it is complete. A run may only be resumed under a
config that computes the same (config.yaml), from the same weights, pairs and engine settings (trainer_state.json).
"""

import dataclasses
import fcntl
import importlib.metadata
import json
import os
import shutil
import time
import zlib
from pathlib import Path

import torch.distributed as dist
import yaml

from runtime import shards
from runtime.config import FREE_ON_RESUME
from runtime.errors import UsageError, one_line
from runtime.files import replace_text, writing
from runtime.ranks import all_gather, barrier, from_rank_0, rank, say

ASIDE = DAMAGED, ABANDONED = ".damaged", ".abandoned"  # added to the name of a checkpoint that no run may resume from
HELD = {}  # {output_dir: its descriptor} of the folders that this process has locked
PATIENCE = 5  # seconds to wait for a run that was just killed to end


def write_config(config, output, step_pairs):
    """Make the run's folder and write its config.yaml."""
    if rank() == 0:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
    lock(output)  # `Run.open` could not lock a folder that did not exist; another run may have used it in the meantime
    check_same_run(config, output, step_pairs)
    if rank() == 0:
        replace_text(output / "config.yaml", yaml.safe_dump(
            {"config": dataclasses.asdict(config), "pairs_a_step": step_pairs, "versions": versions()},
            sort_keys=False, allow_unicode=True))
    barrier()


def versions():
    return {name: importlib.metadata.version(name) for name in
            ("torch", "transformers", "datasets", "deepspeed", "tqdm", "pyyaml")}


def check_writable(config, output):
    """Refuse an output_dir where nothing can be written, or where a model that the run reads would be written over, before
    hours are spent."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if os.path.lexists(path))
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {output}: nothing can be written in {there}: make it writable, or choose another one")
    for name in ("model_name_or_path", "ref_model_name_or_path", "judge_model"):
        model = getattr(config, name)
        if model and Path(model).is_dir() and output.is_dir() and output.samefile(model):
            raise UsageError(f"output_dir {output}: is the folder of {name}, whose weights would be written over: choose "
                             "another one")


def lock(output):
    """Keep other runs out of the run's folder, if it exists, until `unlock` or the end of this process, however it ends.

    Raises UsageError where another run is at work in it. Where the file system has no locks, nobody is kept out.
    """
    taken = False
    if rank() == 0 and output.is_dir() and output.resolve() not in HELD:
        HELD[output.resolve()] = folder = os.open(output, os.O_RDONLY)
        patience = time.monotonic() + PATIENCE
        while (taken := not try_lock(folder)) and time.monotonic() < patience:
            time.sleep(0.2)
        if taken:
            os.close(HELD.pop(output.resolve()))
    if from_rank_0(taken):
        raise UsageError(f"output_dir {output}: another run is at work in it: wait until it has ended, stop it with Ctrl-C, "
                         "or choose another output_dir")


def try_lock(folder):
    """Lock an open folder. Returns whether it is ours."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # the file system has no locks
        pass
    return True


def unlock():
    """Let other runs into the folders of this process."""
    while HELD:
        os.close(HELD.popitem()[1])


os.register_at_fork(after_in_child=unlock)  # a process that outlives us must not keep others out


def check_same_run(config, output, step_pairs):
    """Refuse to continue the run in output_dir under a config that computes something else.  step_pairs: pairs a step."""
    path = output / "config.yaml"
    if not path.is_file():
        return
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        before = dataclasses.asdict(type(config)()) | written["config"]  # a key that is newer than the run had its default
        dict(written["versions"])  # the last thing in the file: without it, the file was cut off
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}), so there is no telling whether this is the same run: "
                         "restore it; or, if you are sure, delete it, and it will be written again")
    now = dataclasses.asdict(config)
    for name in now:
        if name not in FREE_ON_RESUME and before[name] != now[name]:
            raise UsageError(f"{path}: the run in there has {name} {before[name]!r}, this one {now[name]!r}: choose "
                             "another output_dir, or move that one away")
    if written.get("pairs_a_step", step_pairs) != step_pairs:
        raise UsageError(f"{path}: the run in there has {written['pairs_a_step']} pairs a step, this one {step_pairs} "
                         "(per_device_train_batch_size × gradient_accumulation_steps × processes): keep the product, or "
                         "choose another output_dir")


def restore(engine, folder, before, now):
    """Put a checkpoint into the engine.

    before, now: {what: value}, all that the result depends on besides the config. Raises UsageError where it has changed.
    """
    for name in now:
        if before.get(name, now[name]) != now[name]:  # a checkpoint of an earlier version has no reference
            raise UsageError(f"{folder}/trainer_state.json: the run in there has {name} {before[name]}, this one "
                             f"{now[name]}: put that back as it was, or choose another output_dir")
    shards.load(engine, folder)


def find(config, output):
    """The checkpoint folder to resume from, or None. Raises UsageError if the one that was asked for is damaged."""
    wanted = config.resume_from_checkpoint
    if wanted is not None and wanted.lower() in ("false", "no", "0"):
        if complete(output):
            raise UsageError(f"resume_from_checkpoint false, but {output} holds the checkpoints of a run: choose another "
                             "output_dir, or move that one away")
        return None
    if wanted is None or wanted.lower() in ("true", "yes", "1"):
        newest = newest_whole(output)
        if not newest and wanted is not None:
            raise UsageError(f"resume_from_checkpoint: {output} holds no complete checkpoint")
        return newest
    folder = Path(wanted)
    if not (folder / "trainer_state.json").is_file():
        raise UsageError(f"resume_from_checkpoint {folder}: no complete checkpoint there (no trainer_state.json)")
    if folder.resolve().parent != output.resolve():
        raise UsageError(f"resume_from_checkpoint {folder}: belongs to another run, whose config.yaml and labels.sqlite are "
                         f"not in {output}: copy that run's whole folder to {output}, and name the checkpoint in there")
    if problem := damage(folder):
        raise UsageError(f"resume_from_checkpoint: {problem}: name another one, or none to take the newest that is whole")
    return folder


def newest_whole(output):
    """The folder of the newest undamaged checkpoint, or None if there are no checkpoints at all.

    Newer ones that are damaged are renamed, so that nothing takes them for checkpoints again: the run will come to their
    steps once more, with the same answers from the ledger. All ranks call it together.
    """
    for path in [output / ".checkpoint", *sorted(output.glob("checkpoint-*"))]:
        if path.is_dir() and path.suffix not in ASIDE and not (path / "trainer_state.json").is_file():
            say(f"{path} is half-written: skipped")
    damaged = {}
    for folder in reversed(complete(output).values()):
        problem = damage(folder)
        if problem is None:
            break
        damaged[folder] = problem
    else:
        if damaged:
            raise UsageError(f"{'; '.join(damaged.values())}; there is no other checkpoint: restore it, or move it away to "
                             f"start from step 0, with the labels of {output}/labels.sqlite")
        return None
    for bad, problem in damaged.items():
        say(f"{problem}: set aside as {set_aside(bad, DAMAGED)}, going back to {folder.name}")
    barrier()
    return folder


def set_aside_later(output, step):
    """Rename the checkpoints of steps after this one, from which a run goes on, so that no run resumes from them: this run
    comes to those steps again, perhaps in another way. All ranks call it together."""
    for later, folder in complete(output).items():
        if later > step:
            say(f"{folder.name} is of a later step: set aside as {set_aside(folder, ABANDONED)}")
    barrier()


def set_aside(folder, ending):
    """Rename a checkpoint, on rank 0, so that no run resumes from it. Returns the new name."""
    aside = folder.with_name(folder.name + ending)
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    return aside.name


def complete(output):
    """{step: folder} of the complete checkpoints of a run."""
    found = {}
    for path in output.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / "trainer_state.json").is_file():
            found[int(number)] = path
    return dict(sorted(found.items()))


def damage(folder):
    """What is wrong with a checkpoint, naming the file, or None. All ranks call it together."""
    try:
        expected = read_state(folder)["files"]
    except (OSError, ValueError, KeyError) as error:
        return f"{folder}/trainer_state.json is damaged ({one_line(error)})"
    found = checksums(folder)
    for name, (size, crc) in expected.items():
        if name not in found:
            return f"{folder}/{name} is missing"
        if found[name] != [size, crc]:
            what = f"{found[name][0]:,} of {size:,} bytes" if found[name][0] != size else "its checksum differs"
            return f"{folder}/{name} is damaged ({what})"
    return None


def checksums(folder):
    """{file: [bytes, CRC-32]} of a checkpoint, except trainer_state.json. All ranks call it together and share the work."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    mine = {}
    for name in [name for name in names if name != "trainer_state.json"][rank()::dist.get_world_size()]:
        size = crc = 0
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                size, crc = size + len(block), zlib.crc32(block, crc)
            os.fsync(file.fileno())  # on the disk before an older checkpoint is removed
        mine[name] = [size, crc]
    return {name: found for part in all_gather(mine) for name, found in part.items()}


def state_text(state):
    """trainer_state.json, with a checksum of its own."""
    return json.dumps({**state, "checksum": zlib.crc32(json.dumps(state).encode())}, indent=2)


def read_state(folder):
    """The content of trainer_state.json. Raises OSError or ValueError if it cannot be read or is not what was written."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError("it holds no keys")
    checksum = state.pop("checksum", None)
    if checksum != zlib.crc32(json.dumps(state).encode()):
        raise ValueError("its checksum differs")
    return state


def save(engine, output, state, limit):
    """Write a checkpoint under another name, rename it when it is complete, then remove those over save_total_limit."""
    aside, name = output / ".checkpoint", f"checkpoint-{state['step']}"
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    barrier()
    with writing(output / name, aside):
        shards.save(engine, aside / name)
        barrier()
        state = state | {"files": checksums(aside / name)}
    if rank() == 0:
        replace_text(aside / name / "trainer_state.json", state_text(state))
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(aside / name, output / name)
        shutil.rmtree(aside)
        for step in list(complete(output))[:-limit] if limit else ():
            shutil.rmtree(output / f"checkpoint-{step}")
    barrier()
