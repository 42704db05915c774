"""What can go wrong around a run: damaged files, full disks, dying ranks, numbers that are none, through the real command.

    python -m pytest tests/test_survive.py
"""

import contextlib
import itertools
import json
import math
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
import time
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import ROOT, Run, launcher, launcher_environment
from safetensors.torch import load_file
from test_train import assert_same_weights

import adpo
import train as loop
from labels import oracle
from runtime import checkpoint, report


def errors(run):
    """The run's `error:` lines; and there is no traceback."""
    assert "Traceback" not in run.stdout + run.stderr, run.stderr[-3000:]
    return [line for line in run.stderr.splitlines() if line.startswith("error: ")]


def timeless(run):
    """All rows of metrics.jsonl, but for how fast they were made."""
    return [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in run.rows() + run.rows("eval")]


def assert_same_run(one, other):
    """Metrics, answers and weights, to the last bit."""
    assert timeless(one) == timeless(other) and one.ledger() == other.ledger()
    weights = one.weights(), other.weights()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])


def flip_byte(path, at=None):
    """Another byte in place of one, in the middle of a file or at a text."""
    content = bytearray(path.read_bytes())
    place = len(content) // 2 if at is None else content.index(at)
    content[place] ^= 1
    path.write_bytes(content)


# ----------------------------------------------------------------------------------------------------------------------
# Checkpoints

SAVING = dict(max_steps=6, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def whole(train):
    """An undisturbed run with the checkpoints 2, 4 and 6."""
    return train("whole", **SAVING)


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of it as it was when checkpoint 4 had been written."""
    folder = tmp_path / "stopped"
    shutil.copytree(whole.output, folder, ignore=shutil.ignore_patterns("checkpoint-6", "summary.json", "model.safetensors"))
    return folder


MODEL, STATE = "rank-00000.pt", "trainer_state.json"


@pytest.mark.parametrize("harm, problem", [
    (lambda folder: flip_byte(folder / MODEL), f"checkpoint-4/{MODEL} is damaged (its checksum differs)"),
    (lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:-1]), f"checkpoint-4/{MODEL} is damaged ("),
    (lambda folder: (folder / MODEL).unlink(), f"checkpoint-4/{MODEL} is missing"),
    (lambda folder: flip_byte(folder / STATE, b"4,\n"), f"checkpoint-4/{STATE} is damaged (its checksum"),
    (lambda folder: (folder / STATE).write_text('{"step": 4'), f"checkpoint-4/{STATE} is damaged ("),
])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(harm, problem, train, whole, stopped):
    harm(stopped / "checkpoint-4")
    asked = train("asked", output_dir=stopped, resume_from_checkpoint=stopped / "checkpoint-4", check=2, **SAVING)
    assert len(errors(asked)) == 1 and problem in errors(asked)[0]
    again = train("again", output_dir=stopped, save_total_limit=1, **SAVING)
    assert f"{problem}" in again.stdout and "set aside as checkpoint-4.damaged, going back to checkpoint-2" in again.stdout
    assert f"resumed from {stopped}/checkpoint-2 at step 2 of 6" in again.stdout
    assert_same_run(again, whole)
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-4.damaged", "checkpoint-6"]


def test_without_any_whole_checkpoint_nothing_is_begun_anew_unasked(train, stopped):
    shutil.rmtree(stopped / "checkpoint-2")
    flip_byte(stopped / "checkpoint-4" / MODEL)
    run = train("none-whole", output_dir=stopped, check=2, **SAVING)
    assert len(errors(run)) == 1 and f"checkpoint-4/{MODEL} is damaged" in errors(run)[0]
    assert "move it away to start from step 0" in errors(run)[0] and (stopped / "checkpoint-4").is_dir()


def test_half_written_checkpoints_are_skipped_and_old_ones_taken_unverified(train, whole, stopped):
    (stopped / "checkpoint-4" / STATE).unlink()
    shutil.copytree(stopped / "checkpoint-2", stopped / ".checkpoint" / "checkpoint-6")
    state = json.loads((stopped / "checkpoint-2" / STATE).read_text())
    del state["files"], state["checksum"]
    (stopped / "checkpoint-2" / STATE).write_text(json.dumps(state))
    run = train("old", output_dir=stopped, **SAVING)
    assert f"{stopped}/checkpoint-4 is half-written: skipped" in run.stdout
    assert f"{stopped}/.checkpoint is half-written: skipped" in run.stdout
    assert f"{stopped}/checkpoint-2 was written before checkpoints had checksums: taken as it is" in run.stdout
    assert_same_run(run, whole)


# ----------------------------------------------------------------------------------------------------------------------
# Losses and gradients that are no finite number

@pytest.fixture
def break_steps(monkeypatch):
    """break_steps(steps, how): the first micro-batch of these optimiser steps of 2 micro-batches has a gradient that is no
    number behind a loss that is one ("gradient"), or a loss that is infinite with a gradient that is not ("loss")."""
    rewards, loss = adpo.implicit_rewards, adpo.preference_loss

    def install(steps, how):
        calls = itertools.count()

        def hooked(logps, *args):
            value = rewards(logps, *args)
            if value.requires_grad and next(calls) in [2 * step for step in steps] and how == "gradient":
                value.register_hook(lambda grad: grad * math.nan)
            return value

        def infinite(margin, *args):
            value = loss(margin, *args)
            if margin.requires_grad and next(calls) in [2 * step for step in steps] and how == "loss":
                value = value + math.inf
            return value

        monkeypatch.setattr(adpo, "implicit_rewards", hooked if how == "gradient" else rewards)
        monkeypatch.setattr(adpo, "preference_loss", infinite if how == "loss" else loss)
    return install


CUT = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, max_steps=6)


@pytest.mark.parametrize("how", ["gradient", "loss"])
@pytest.mark.parametrize("stage, bf16", [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)])
def test_a_step_whose_gradient_is_no_number_changes_no_weight(how, stage, bf16, train, tiny, engine_configs, break_steps):
    break_steps([0, 1], how)
    run = train("broken", **CUT | dict(deepspeed=engine_configs[stage], bf16=bf16, max_steps=2))
    after, before = run.weights(), load_file(tiny / "model" / "model.safetensors")
    assert all((after[name] == before[name].to(after[name].dtype)).all() for name in after)
    named = [line.split(", ") for line in re.findall("the step is not taken; its pairs are (.*)", run.stdout)]
    assert len(named) == 2 and set(named[0]) == {pair for pair, _, step in run.ledger() if step == 0}  # step 0 asks for all
    assert all((row["loss"] is None) == (how == "loss") for row in run.rows())  # metrics.jsonl is JSON even so


@pytest.mark.parametrize("stage", [0, 2])
def test_training_goes_on_behind_such_a_step_and_ends_at_three_in_a_row(stage, train, engine_configs, break_steps):
    """Steps 1 and 2 broken, 3 not, 4 to 6 broken; a resumed run counts on from its checkpoint."""
    keys = CUT | dict(deepspeed=engine_configs[stage], save_strategy="steps", save_steps=1)
    break_steps([0, 1, 3, 4, 5], "gradient")
    run = train("three", check=1, **keys)
    assert run.stdout.count("the step is not taken") == 4
    assert len(errors(run)) == 1 and "step 6: " in errors(run)[0] and "it is the third in a row" in errors(run)[0]
    assert [row["step"] for row in run.rows()] == [1, 2, 3, 4, 5] and run.rows()[3]["loss"] < run.rows()[0]["loss"]
    break_steps([0], "gradient")
    again = train("again", output_dir=run.output, check=1, **keys)
    assert f"resumed from {run.output}/checkpoint-5" in again.stdout and "it is the third in a row" in errors(again)[0]
    break_steps([], "gradient")
    done = train("done", output_dir=run.output, **keys)
    assert [row["step"] for row in done.rows()] == [1, 2, 3, 4, 5, 6]


# ----------------------------------------------------------------------------------------------------------------------
# Ranks that die

@pytest.fixture
def broken(tiny, tmp_path):
    """broken(code, **keys) → the command line, but for its launcher, of train.py behind some code that each rank runs first,
    with its `rank` and `at(n)`, which is true at its n-th call."""
    def command(code, **keys):
        script, config = tmp_path / "broken.py", tmp_path / "tiny.json"  # JSON is YAML
        script.write_text(textwrap.dedent(f"""
            import itertools, os, runpy, signal, sys
            sys.path.insert(0, {str(ROOT)!r})
            import adpo, oracle
            rank, calls = int(os.environ.get("RANK", 0)), itertools.count(1)
            def at(n):
                return next(calls) == n
            """) + textwrap.dedent(code) + f"\nrunpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
        config.write_text(json.dumps(dict(
            model_name_or_path=f"{tiny}/model", dataset_mixer={f"{tiny}/pairs": 1.0}, output_dir=f"{tmp_path}/run",
            gamma=0.2, learning_rate=2e-3, warmup_ratio=0, per_device_train_batch_size=4, max_prompt_length=16,
            max_length=64, max_steps=6, save_steps=2, do_eval=False, num_threads=1) | keys))
        return [str(script), "--config", str(config)]
    return command


@pytest.fixture
def broken_ranks(broken, tmp_path):
    """broken_ranks(code) → Run of two processes through the launcher. One that hangs fails the test."""
    def launch(code):
        done = subprocess.run([*launcher(2)[:-1], *broken(code)], cwd=ROOT, text=True, timeout=240, capture_output=True,
                              env=launcher_environment())
        return Run(tmp_path / "run", done.stdout, done.stderr, done.returncode)
    return launch


def test_a_rank_that_is_killed_takes_the_run_down(broken_ranks):
    run = broken_ranks("""
        rewards = adpo.implicit_rewards
        def killed(*args):
            if rank == 1 and at(3):
                os.kill(os.getpid(), signal.SIGKILL)
            return rewards(*args)
        adpo.implicit_rewards = killed
        """)
    assert run.code == 256 - 9 and "Traceback" not in run.stderr
    assert "rank 0: stopped, another rank is gone (" in run.stderr
    assert [path.name for path in run.output.glob("checkpoint-*")] == ["checkpoint-2"]


def test_an_exception_of_one_rank_is_shown_and_is_the_only_one(broken_ranks):
    run = broken_ranks("""
        rewards = adpo.implicit_rewards
        def wrong(*args):
            if rank == 1 and at(3):
                raise ArithmeticError("what rank 1 has to say")
            return rewards(*args)
        adpo.implicit_rewards = wrong
        """)
    assert run.code == 1 and run.stderr.count("Traceback") == 1
    assert "ArithmeticError: what rank 1 has to say" in run.stderr


def test_an_error_of_rank_0_alone_ends_the_other_and_gives_the_exit_code(broken_ranks):
    run = broken_ranks("""
        take = oracle.Ledger.take
        def refused(*args):
            if at(3):
                raise oracle.LedgerError("what rank 0 has to say")
            return take(*args)
        oracle.Ledger.take = refused
        """)
    assert run.code == 2 and errors(run) == ["error: what rank 0 has to say"]
    assert "rank 1: stopped, another rank is gone (" in run.stderr


def test_an_error_that_all_ranks_have_is_printed_once(train):
    run = train("alike", processes=2, check=2, gamma=-1)
    assert len(errors(run)) == 1 and "gamma" in errors(run)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Disks

@pytest.fixture
def disk(tmp_path):
    """A folder that is a small disk of its own: `fill()` leaves no room on it, `free()` makes room again."""
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
    """An undisturbed run that asks for all its 32 pairs in its first 4 steps."""
    return train("roomy", save_steps=20, **LONG)


@pytest.mark.parametrize("place, name, call, every, file, reason", [
    (checkpoint, "save", 2, 10, "checkpoint-20", "the disk took only a part"),
    (report.Log, "write", 11, 10, "metrics.jsonl", "No space left on device"),
    (oracle.DatasetAnnotator, "answer", 3, 2, "labels.sqlite", "database or disk is full"),
    (loop, "save_model", 1, 10, "model.safetensors", "No space left on device"),
    (loop, "reference_logps", 1, 10, "config.yaml", "No space left on device"),
])
def test_a_full_disk_stops_a_run_that_goes_on_when_there_is_room(place, name, call, every, file, reason, train, roomy, disk,
                                                                 monkeypatch):
    """The disk is full from the n-th call of a function on; a checkpoint is written `every` so many steps."""
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


def test_a_full_disk_under_the_caches_is_said_so_too(broken, disk):
    """The caches of datasets; their place is read at import, hence a process of its own."""
    disk.fill()
    done = subprocess.run([sys.executable, *broken("")], cwd=ROOT, text=True, capture_output=True, timeout=240,
                          env={**launcher_environment(), "HF_HOME": str(disk.folder)})
    run = Run(None, done.stdout, done.stderr, done.returncode)
    assert run.code == 2 and len(errors(run)) == 1 and f"$HF_HOME ({disk.folder})" in errors(run)[0]


def test_a_reference_cache_that_cannot_be_written_is_named(train, disk, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(disk.folder))
    disk.remount("ro")
    run = train("no-cache", check=2, seed=7)
    assert len(errors(run)) == 1 and f"{disk.folder}/adpo/reference-" in errors(run)[0]
    assert "Read-only file system" in errors(run)[0] and not run.output.exists()


# ----------------------------------------------------------------------------------------------------------------------
# Damaged files

def cut(path, size=None):
    """Leave the first half of a file, or so many bytes."""
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2 if size is None else size])


@pytest.mark.parametrize("harm", [cut, lambda path: cut(path, 0), lambda path: cut(path, 100),
                                  lambda path: flip_byte(path, b"shape"), lambda path: path.write_text("git-lfs pointer")])
def test_a_model_whose_weights_are_damaged_is_refused(harm, train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    harm(tmp_path / "model" / "model.safetensors")
    for key in ("model_name_or_path", "ref_model_name_or_path"):
        run = train("damaged-model", check=2, **{key: tmp_path / "model"})
        assert len(errors(run)) == 1 and f"model {tmp_path}/model: " in errors(run)[0]


@pytest.mark.parametrize("harm", [cut, lambda path: cut(path, 0), lambda path: flip_byte(path)])
def test_a_damaged_cache_of_the_reference_is_computed_again(harm, train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    first = train("first")
    files = sorted((tmp_path / "adpo").glob("reference-*.safetensors"))
    content = [path.read_bytes() for path in files]
    assert len(files) == 2  # of the training and of the test pairs
    for path in files:
        harm(path)
    again = train("again")
    assert all(f"{path} is damaged (" in again.stdout for path in files) and again.stdout.count("are computed again") == 2
    assert_same_run(again, first)
    assert [path.read_bytes() for path in files] == content
    assert "damaged" not in train("third").stdout


def test_a_damaged_metrics_file_loses_no_row_that_it_holds(train, whole, stopped):
    """A line that is none, and a last line that is cut: of a step behind the checkpoint, which is written again."""
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_bytes("".join([lines[0], "\0\0\n", *lines[1:]])[:-9].encode() + b"\xff")
    run = train("metrics", output_dir=stopped, **SAVING)
    assert [line.split(": ")[0] for line in run.stdout.splitlines() if "dropped" in line and "metrics" in line] == [
        f"{stopped}/metrics.jsonl, line {n}" for n in (2, len(lines) + 1)]
    assert_same_run(run, whole)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
@pytest.mark.parametrize("harm", [
    lambda path: cut(path), lambda path: cut(path, 0), lambda path: path.write_bytes(b"\xff\xfe"),
    lambda path: path.write_text("a: [")], ids=["cut", "empty", "bytes", "text"])
def test_a_damaged_file_of_the_output_is_named_and_can_be_written_anew(name, harm, train, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run")
    harm(tmp_path / "run" / name)
    run = train("damaged", output_dir=tmp_path / "run", check=2, **SAVING)
    assert len(errors(run)) == 1 and f"{tmp_path}/run/{name} is damaged (" in errors(run)[0]
    (tmp_path / "run" / name).unlink()
    assert_same_run(train("anew", output_dir=tmp_path / "run", **SAVING), whole)
    assert name == "config.yaml" or (tmp_path / "run" / name).is_file()


# ----------------------------------------------------------------------------------------------------------------------
# Ledgers

def test_a_ledger_that_another_process_holds_too_long_ends_the_run_resumable(train, whole, tmp_path, monkeypatch):
    """Held from the third questions on, longer than the run has patience."""
    monkeypatch.setattr(oracle.Ledger.__init__, "__defaults__", (0.2,))
    holder, calls, answer = [], itertools.count(1), oracle.DatasetAnnotator.answer

    def held(self, questions, ledger):
        if next(calls) == 3:
            holder.append(sqlite3.connect(ledger.path, isolation_level=None))
            holder[0].execute("BEGIN IMMEDIATE")
        return answer(self, questions, ledger)

    monkeypatch.setattr(oracle.DatasetAnnotator, "answer", held)
    run = train("held", output_dir=tmp_path / "run", check=2, **SAVING)
    again = train("held-still", output_dir=tmp_path / "run", check=2, **SAVING)
    for stopped in run, again:
        assert len(errors(stopped)) == 1 and f"{tmp_path}/run/labels.sqlite: cannot be used" in errors(stopped)[0]
        assert "(database is locked): another process holds it" in errors(stopped)[0]
    holder[0].close()
    done = train("let-go", output_dir=tmp_path / "run", **SAVING)
    assert "resumed from" in done.stdout
    assert_same_run(done, whole)


def other_data(tiny, folder):
    """As many pairs of another data set."""
    folder.mkdir()
    for split in ("train", "test"):
        text = (tiny / "pairs" / f"{split}.jsonl").read_text().replace("review of", "praise of")
        (folder / f"{split}.jsonl").write_text(text)
    return folder


def test_the_ledger_of_another_data_set_is_refused_and_reused_answers_are_not(train, tiny, whole, tmp_path):
    mixer = f"{{{other_data(tiny, tmp_path / 'pairs')}: 1.0}}"
    (tmp_path / "run").mkdir()
    shutil.copy(whole.output / "labels.sqlite", tmp_path / "run")
    before = whole.ledger()
    run = train("other-data", output_dir=tmp_path / "run", dataset_mixer=mixer, check=2)
    assert len(errors(run)) == 1 and f"/run/labels.sqlite: {len(before)} of its {len(before)} answers are" in errors(run)[0]
    assert run.ledger() == before and "--reuse" in errors(run)[0]
    reuse = [sys.executable, "tools/ledger.py", str(tmp_path / "new"), "--reuse", str(whole.output)]
    subprocess.run(reuse, cwd=ROOT, check=True, capture_output=True)
    run = train("reused", output_dir=tmp_path / "new", dataset_mixer=mixer)
    assert f"{len(before)} answers of other runs are in the ledger, 0 of them of pairs of this run" in run.stdout
    assert run.summary()["queries"] == len(run.ledger()) - len(before)


def other_version(path):
    with contextlib.closing(sqlite3.connect(path)) as ledger:
        ledger.execute("PRAGMA user_version = 9")


@pytest.mark.parametrize("harm, problem", [
    (lambda path: path.write_text("pair,label\n" * 1000), "(file is not a database): move it away"),
    (other_version, "not a ledger of this version (9, not 2): move it away"),
    (lambda path: path.write_bytes(path.read_bytes()[:4096] + b"\xff" * (path.stat().st_size - 4096)),
     "(database disk image is malformed): it is damaged"),
])
def test_what_is_no_ledger_of_this_version_is_refused_and_left_alone(harm, problem, train, whole, tmp_path):
    shutil.copytree(whole.output, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    harm(tmp_path / "run" / "labels.sqlite")
    content = (tmp_path / "run" / "labels.sqlite").read_bytes()
    run = train("no-ledger", output_dir=tmp_path / "run", check=2, **SAVING)
    assert len(errors(run)) == 1 and f"{tmp_path}/run/labels.sqlite: " in errors(run)[0] and problem in errors(run)[0]
    assert (tmp_path / "run" / "labels.sqlite").read_bytes() == content


# ----------------------------------------------------------------------------------------------------------------------
# What may change on resume

@pytest.mark.parametrize("name, before, now", [
    ("learning_rate", "0.002", "0.001"), ("gamma", "0.2", "0.5"), ("seed", "42", "43"), ("bf16", "False", "True"),
    ("max_steps", "6", "8"), ("optim", "'adamw_torch'", "'rmsprop'")])
def test_a_config_that_computes_something_else_is_refused_with_both_values(name, before, now, train, stopped):
    run = train("changed", output_dir=stopped, check=2, **SAVING | {name: now.strip("'")})
    assert len(errors(run)) == 1
    assert f"{stopped}/config.yaml: the run in there has {name} {before}, this one {now}: " in errors(run)[0]


def test_what_is_free_may_change(train, whole, stopped):
    run = train("free", output_dir=stopped, **SAVING | dict(save_strategy="no", save_steps=1, per_device_eval_batch_size=3,
                                                            max_queries=1000, num_threads=2))
    assert "resumed from" in run.stdout
    assert run.ledger() == whole.ledger() and run.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_the_pairs_of_a_step_the_engine_and_the_data_may_not_change(train, tiny, stopped, engine_configs):
    """Where the free keys or what the config names have changed: the cut of a step, the engine's file, the data."""
    engine, train_file = stopped / "engine.json", stopped / "pairs" / "train.jsonl"
    engine.write_text(engine_configs[2].read_text())
    shutil.copytree(tiny / "pairs", stopped / "pairs")
    keys = SAVING | dict(deepspeed=engine, dataset_mixer=f"{{{stopped}/pairs: 1.0}}", output_dir=stopped / "run")
    train("start", **keys)
    (stopped / "run" / "summary.json").unlink()

    def refused(*words, **changed):
        run = train("other-start", check=2, **keys | changed)
        assert len(errors(run)) == 1 and all(word in errors(run)[0] for word in (f"{stopped}/run/", *words)), run.stderr

    settings = json.loads(engine.read_text())
    engine.write_text(json.dumps(settings | {"prescale_gradients": True}))
    refused("checkpoint-6/trainer_state.json: the run in there has engine settings ", "'prescale_gradients': True}: go on")
    engine.write_text(json.dumps(settings))
    lines = train_file.read_text().splitlines(keepends=True)
    train_file.write_text("".join(lines[1:] + lines[:1]))  # the same pairs in another order
    refused("checkpoint-6/trainer_state.json: the run in there has pairs ")
    train_file.write_text("".join(lines))
    refused("config.yaml: the run in there has 8 pairs a step, this one 24 (", gradient_accumulation_steps=3)
    train("as-it-was", **keys)


# ----------------------------------------------------------------------------------------------------------------------
# Other ranks, another ZeRO stage, another micro-batch on resume

CUT_8 = {1: dict(per_device_train_batch_size=4, gradient_accumulation_steps=2),
         2: dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)}  # processes: a step of 8 pairs


@pytest.fixture(scope="module")
def undisturbed(train, engine_configs):
    """{(stage, bf16): an undisturbed run of one process with the checkpoints 3 and 6}, made when it is asked for."""
    runs = {}

    def get(stage, bf16):
        if (stage, bf16) not in runs:
            runs[stage, bf16] = train("undisturbed", None, deepspeed=engine_configs[stage], bf16=bf16, **CUT_8[1] | RESHARD)
        return runs[stage, bf16]
    return get


RESHARD = dict(max_steps=6, save_strategy="steps", save_steps=3, max_train_samples=42)


def stop_at_3(run, folder):
    """A copy of a run as it was when checkpoint 3 had been written."""
    shutil.copytree(run.output, folder, ignore=shutil.ignore_patterns("checkpoint-6", "summary.json", "model.safetensors"))
    return folder


def assert_near(one, other, bf16):
    """Losses, queries and weights of two runs, within the dtype's tolerance."""
    assert one.losses() == pytest.approx(other.losses(), rel=1e-2 if bf16 else 1e-5)
    if not bf16:
        assert one.ledger() == other.ledger()
    assert_same_weights(one.weights(), other.weights(), 5e-3 if bf16 else 1e-5)


@pytest.mark.parametrize("bf16, before, after", [
    (False, 2, 0), (False, 0, 1), (False, 1, 3), (False, 3, 2), (True, 1, 2), (True, 2, 3), (True, 3, 1)])
def test_the_zero_stage_may_change_on_resume(bf16, before, after, train, undisturbed, engine_configs, tmp_path):
    """Of one process. What goes on with the stage that it had is the same to the last bit."""
    whole = undisturbed(before, bf16)
    for stage in (before, after):
        folder = stop_at_3(whole, tmp_path / f"to-{stage}")
        again = train("resharded", output_dir=folder, deepspeed=engine_configs[stage], bf16=bf16, **CUT_8[1] | RESHARD)
        assert f"resumed from {folder}/checkpoint-3 at step 3 of 6" in again.stdout
        if stage == before:
            assert_same_run(again, whole)
        else:
            assert_near(again, whole, bf16)


@pytest.mark.parametrize("bf16, processes, before, after", [
    (False, (2, None), 2, (0, 1, 3)), (False, (None, 2), 0, (3,)), (True, (2, None), 3, (1, 2)), (True, (None, 2), 1, (2,))])
def test_the_number_of_ranks_may_change_on_resume(bf16, processes, before, after, train, undisturbed, engine_configs,
                                                  tmp_path):
    """Of a run of 42 pairs in steps of 8, the last of which has 2."""
    whole = undisturbed(before, bf16)
    if processes[0]:
        first = train("before", 2, deepspeed=engine_configs[before], bf16=bf16, **CUT_8[2] | RESHARD)
        assert_near(first, whole, bf16)
    else:
        first = whole
    for stage in after:
        folder = stop_at_3(first, tmp_path / f"to-{stage}")
        again = train("resharded", processes[1], output_dir=folder, deepspeed=engine_configs[stage], bf16=bf16,
                      **CUT_8[processes[1] or 1] | RESHARD)
        assert f"resumed from {folder}/checkpoint-3 at step 3 of 6" in again.stdout
        assert_near(again, whole, bf16)


def test_a_checkpoint_of_another_model_is_refused(train, whole, stopped):
    """And so is one whose file of another rank is not there: it says how much of which parameter it has."""
    held = torch.load(stopped / "checkpoint-4" / MODEL, weights_only=True)
    state = json.loads((stopped / "checkpoint-4" / STATE).read_text())
    del state["files"], state["checksum"]
    (stopped / "checkpoint-4" / STATE).write_text(json.dumps(state))
    held["flats"] = held["flats"][1:]
    torch.save(held, stopped / "checkpoint-4" / MODEL)
    run = train("another-model", output_dir=stopped, check=2, **SAVING)
    assert len(errors(run)) == 1 and f"{stopped}/checkpoint-4: its files rank-*.pt hold 0 of the " in errors(run)[0]


def test_nothing_that_is_hidden_in_a_checkpoint_is_run(train, stopped, tmp_path):
    """A pickle that would make a file, behind checksums that are right."""
    class Hidden:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    held = torch.load(stopped / "checkpoint-4" / MODEL, weights_only=True)
    torch.save(held | {"hidden": Hidden()}, stopped / "checkpoint-4" / MODEL)
    state = json.loads((stopped / "checkpoint-4" / STATE).read_text())
    del state["files"], state["checksum"]
    (stopped / "checkpoint-4" / STATE).write_text(json.dumps(state))
    run = train("hidden", output_dir=stopped, check=2, **SAVING)
    assert len(errors(run)) == 1 and f"checkpoint-4/{MODEL}: " in errors(run)[0] and "os.mkdir" not in run.stdout
    assert not (tmp_path / "it-ran").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Signals under the launcher, which passes them on in its own way

@pytest.fixture
def launched(train, tmp_path):
    """launched(**keys) → (output_dir, the launcher of two processes, under way): a process group as a shell makes one."""
    started = []

    def launch(**keys):
        started.append(train.start(2, output_dir=tmp_path / "run", per_device_train_batch_size=4, do_eval=False, **keys))
        return tmp_path / "run", started[-1]

    yield launch
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition, process):
    """Until something has happened in a run that is under way."""
    deadline = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)


def rows_written(output):
    return (output / "metrics.jsonl").read_text().count("\n") if (output / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launchers_group_stops_ranks_that_wait_for_people(number, launched, tiny, tmp_path):
    """As Ctrl-C and schedulers send it. Each rank gets it twice, from the sender and from the launcher."""
    with open(tmp_path / "train.jsonl", "w") as file:
        for line in (tiny / "pairs" / "train.jsonl").read_text().splitlines():
            file.write(json.dumps({k: v for k, v in json.loads(line).items() if k != "label"}) + "\n")
    output, process = launched(oracle="human", dataset_mixer=f"{{{tmp_path}/train.jsonl: 1.0}}")

    def asked():
        return (output / "labels.sqlite").exists() and len(oracle.Ledger(output / "labels.sqlite").open_questions()) == 8

    wait_for(asked, process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=60)
    assert "stopped: interrupted, 8 of 8 answers are missing" in out and "--num_gpus 2 train.py" in out, out + err


def test_sigterm_to_one_rank_stops_all_and_the_launcher_passes_75_on(launched):
    output, process = launched(max_steps=1000)
    wait_for(lambda: rows_written(output) >= 3, process)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in child.cmdline()]
    ranks[0].terminate()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 75 and "stopped: interrupted" in out, out + err
    assert len(list(output.glob("checkpoint-*/trainer_state.json"))) == 1


def test_a_second_ctrl_c_ends_a_run_at_once(broken, tmp_path):
    """In the middle of a step that takes its time."""
    command = broken("""
        import pathlib, time
        def long(*args):
            pathlib.Path("{folder}/in-a-step").touch()
            time.sleep(1000)
        adpo.implicit_rewards = long
        """.replace("{folder}", str(tmp_path)))
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=launcher_environment(), stderr=subprocess.DEVNULL)
    wait_for((tmp_path / "in-a-step").exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(1)  # two at once would be one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=100) == -signal.SIGINT
