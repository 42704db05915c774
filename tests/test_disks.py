"""Full and read-only disks: `python -m pytest tests/test_disks.py -n 0`. Mounting small disks needs root."""

import contextlib
import itertools
import shutil
import subprocess
from types import SimpleNamespace

import pytest
from helpers import Run, assert_same_run, errors

import train as entry
from labels.annotators import DatasetAnnotator
from runtime import checkpoint, report
from runtime import run as run_module


@pytest.fixture
def disk(tmp_path):
    """A folder on a small disk of its own: `fill()` leaves no room there, `free()` makes room again."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk needs root")

    def fill():
        with open(folder / "ballast", "wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while ballast.write(bytes(4096)):
                pass

    def remount(how):
        subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)

    yield SimpleNamespace(folder=folder, fill=fill, free=lambda: (folder / "ballast").unlink(), remount=remount)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


LONG = dict(max_steps=20, max_train_samples=32, data_selection=False, save_strategy="steps")


@pytest.fixture(scope="module")
def roomy(train):
    """An undisturbed run that asks about all its 32 pairs in its first 4 steps."""
    return train("roomy", save_steps=20, **LONG)


@pytest.mark.parametrize("place, name, call, every, file, reason", [
    (checkpoint, "save", 2, 10, "checkpoint-20", "the disk took only a part"),
    (report.Log, "write", 11, 10, "metrics.jsonl", "No space left on device"),
    (DatasetAnnotator, "answer", 3, 2, "labels.sqlite", "database or disk is full"),
    (run_module, "save_model", 1, 10, "model.safetensors", "No space left on device"),
    (entry, "add_reference", 1, 10, "config.yaml", "No space left on device"),
])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(place, name, call, every, file, reason, train, roomy, disk,
                                                                 monkeypatch):
    """The disk is full from the n-th call of a function on.  every: steps between checkpoints."""
    keys = LONG | dict(save_steps=every)
    calls, function = itertools.count(1), getattr(place, name)

    def filling(*args, **kwargs):
        if next(calls) == call:
            disk.fill()
        return function(*args, **kwargs)

    monkeypatch.setattr(place, name, filling)
    full = train("full", output_dir=disk.folder / "run", check=2, **keys)
    monkeypatch.setattr(place, name, function)
    assert len(errors(full)) == 1 and f"{full.output}/{file}: cannot be " in errors(full)[0] and reason in errors(full)[0]
    assert "the same command goes on" in errors(full)[0]
    assert not [path for path in full.output.rglob(".*")]  # nothing half-written takes up the room
    again = train("still-full", output_dir=full.output, check=2, **keys)
    assert len(errors(again)) == 1 and full.output.name in errors(again)[0]
    disk.free()
    done = train("room", output_dir=full.output, **keys)
    assert " is damaged" not in done.stdout
    assert_same_run(done, roomy)


def test_a_read_only_output_is_refused_before_anything_is_computed(train, roomy, disk):
    shutil.copytree(roomy.output, disk.folder / "run", ignore=shutil.ignore_patterns("summary.json", "model.safetensors"))
    disk.remount("ro")
    for name, output in (("there", disk.folder / "run"), ("new", disk.folder / "a" / "new")):
        run = train(name, output_dir=output, check=2, save_steps=20, **LONG)
        assert len(errors(run)) == 1 and f"output_dir {output}: nothing can be written in {disk.folder}" in errors(run)[0]
        assert run.stdout == ""
    disk.remount("rw")
    done = train("writable", output_dir=disk.folder / "run", save_steps=20, **LONG)
    assert f"resumed from {done.output}/checkpoint-20" in done.stdout
    assert_same_run(done, roomy)


def test_a_full_disk_under_the_caches_is_reported_too(train, disk, monkeypatch):
    """The caches of the datasets library. It reads their place when it is imported, so the run is a process of its own."""
    disk.fill()
    monkeypatch.setenv("HF_HOME", str(disk.folder))
    process = train.start(output_dir=disk.folder.parent / "run")
    run = Run(None, *process.communicate(timeout=600), process.returncode)
    assert run.code == 2 and len(errors(run)) == 1 and f"$HF_HOME ({disk.folder})" in errors(run)[0]


def test_a_reference_cache_that_cannot_be_written_is_named_before_anything_is_scored(train, disk, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(disk.folder))
    disk.remount("ro")
    run = train("no-cache", check=2, seed=7)
    assert len(errors(run)) == 1 and f"{disk.folder}/adpo/reference-" in errors(run)[0]
    assert "Read-only file system" in errors(run)[0] and not run.output.exists()
    assert "reference log-probs" not in run.stderr  # the pass over the pairs, which may take hours
