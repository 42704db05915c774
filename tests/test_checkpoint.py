"""Checkpoints: damaged ones, what may change between a checkpoint and the run that resumes it, and what may not.

    python -m pytest tests/test_checkpoint.py -n 0
"""

import fcntl
import json
import os
import shutil
import threading
import zlib

import pytest
import torch
import yaml
from helpers import as_jsonl, assert_same_run, assert_same_weights, copy_without, errors, flip_byte
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from runtime import checkpoint
from runtime.errors import UsageError

SAVING = dict(max_steps=6, save_strategy="steps", save_steps=2)


@pytest.fixture(scope="module")
def whole(train):
    """An undisturbed run with checkpoints 2, 4 and 6."""
    return train("whole", **SAVING)


@pytest.fixture
def stopped(whole, tmp_path):
    """A copy of it as it was after checkpoint 4."""
    return copy_without(whole, tmp_path / "stopped", "checkpoint-6", "summary.json", "model.safetensors")


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


def test_a_run_that_goes_back_leaves_later_checkpoints_aside(train, whole, tmp_path):
    """Or save_total_limit would remove the new ones, and the same command would go on from an old one."""
    copy = copy_without(whole, tmp_path / "back", "summary.json", "model.safetensors")
    again = train("back", output_dir=copy, resume_from_checkpoint=copy / "checkpoint-2", save_total_limit=1, **SAVING)
    assert "checkpoint-6 is of a later step: set aside as checkpoint-6.abandoned" in again.stdout
    assert_same_run(again, whole)
    assert sorted(path.name for path in copy.glob("checkpoint-*")) == [
        "checkpoint-4.abandoned", "checkpoint-6", "checkpoint-6.abandoned"]


def test_the_checkpoint_of_another_run_is_refused(train, whole, tmp_path):
    """Its config would not be compared, and its labels would not be there."""
    keys = SAVING | {"output_dir": tmp_path / "new", "resume_from_checkpoint": whole.output / "checkpoint-2"}
    error, = errors(train("foreign", check=2, **keys))
    assert "checkpoint-2: belongs to another run, whose config.yaml and labels.sqlite" in error


def test_an_evaluation_of_an_earlier_step_is_not_taken_for_the_last_one(train, tmp_path):
    keys = SAVING | {"output_dir": tmp_path / "run", "eval_strategy": "steps", "eval_steps": 2}
    whole = train("evaluated", **keys)
    assert whole.summary()["eval_accuracy"] is not None
    copy = copy_without(whole, tmp_path / "stopped", "checkpoint-6", "summary.json", "model.safetensors")
    resumed = train("not-evaluated", **keys | {"output_dir": copy, "do_eval": False})
    assert resumed.summary()["eval_accuracy"] is None and resumed.rows()[-1]["step"] == 6


def test_without_any_whole_checkpoint_the_run_does_not_start_again_unasked(train, stopped):
    shutil.rmtree(stopped / "checkpoint-2")
    flip_byte(stopped / "checkpoint-4" / MODEL)
    run = train("none-whole", output_dir=stopped, check=2, **SAVING)
    assert len(errors(run)) == 1 and f"checkpoint-4/{MODEL} is damaged" in errors(run)[0]
    assert "move it away to start from step 0" in errors(run)[0] and (stopped / "checkpoint-4").is_dir()


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    """As text, checkpoint-9 would be newer than checkpoint-10."""
    for step in (10, 9, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / STATE).write_text("{}")
    assert list(checkpoint.complete(tmp_path)) == [9, 10, 100]


def test_half_written_checkpoints_are_skipped(train, whole, stopped):
    (stopped / "checkpoint-4" / STATE).unlink()
    shutil.copytree(stopped / "checkpoint-2", stopped / ".checkpoint" / "checkpoint-6")
    run = train("half-written", output_dir=stopped, **SAVING)
    assert f"{stopped}/checkpoint-4 is half-written: skipped" in run.stdout
    assert f"{stopped}/.checkpoint is half-written: skipped" in run.stdout
    assert f"resumed from {stopped}/checkpoint-2 at step 2 of 6" in run.stdout
    assert_same_run(run, whole)


# ----------------------------------------------------------------------------------------------------------------------
# What may change on resume, and what may not

@pytest.mark.parametrize("name, before, now", [
    ("learning_rate", "0.002", "0.001"), ("gamma", "0.2", "0.5"), ("seed", "42", "43"), ("bf16", "False", "True"),
    ("max_steps", "6", "8"), ("optim", "'adamw_torch'", "'rmsprop'")])
def test_a_config_that_computes_something_else_is_refused_with_both_values(name, before, now, train, stopped):
    run = train("changed", output_dir=stopped, check=2, **SAVING | {name: now.strip("'")})
    assert len(errors(run)) == 1
    assert f"{stopped}/config.yaml: the run in there has {name} {before}, this one {now}: " in errors(run)[0]


def test_a_key_that_is_newer_than_the_run_had_its_default(train, whole, stopped):
    path = stopped / "config.yaml"
    written = yaml.safe_load(path.read_text())
    del written["config"]["label_smoothing"]
    path.write_text(yaml.safe_dump(written, sort_keys=False))
    refused = train("newer-key-set", output_dir=stopped, check=2, label_smoothing=0.1, **SAVING)
    assert "the run in there has label_smoothing 0.0, this one 0.1: " in errors(refused)[0]
    assert_same_run(train("newer-key", output_dir=stopped, **SAVING), whole)


def test_what_is_free_may_change(train, whole, stopped):
    run = train("free", output_dir=stopped, **SAVING | dict(save_strategy="no", save_steps=1, per_device_eval_batch_size=3,
                                                            max_queries=1000, num_threads=2))
    assert "resumed from" in run.stdout
    assert run.ledger() == whole.ledger() and run.losses() == pytest.approx(whole.losses(), rel=1e-5)


def test_the_pairs_of_a_step_the_engine_and_the_data_may_not_change(train, tiny, stopped, engine_configs):
    """Changes that the comparison of the configs alone would miss: pairs per step, the engine's file, the data."""
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
    refused("checkpoint-6/trainer_state.json: the run in there has engine settings ", "'prescale_gradients': True}: put ")
    engine.write_text(json.dumps(settings))
    lines = train_file.read_text().splitlines(keepends=True)
    train_file.write_text("".join(lines[1:] + lines[:1]))  # the same pairs in another order
    refused("checkpoint-6/trainer_state.json: the run in there has pairs ")
    other = {"a": "b", "b": "a"}
    train_file.write_text(as_jsonl(row | {"label": other[row["label"]]} for row in map(json.loads, lines)))
    refused("labels.sqlite: ", " answers are not the labels that the data set has now (")
    train_file.write_text("".join(lines))
    refused("config.yaml: the run in there has 8 pairs a step, this one 24 (", gradient_accumulation_steps=3)
    train("as-it-was", **keys)


# ----------------------------------------------------------------------------------------------------------------------
# Other ranks, another ZeRO stage, another micro-batch on resume

CUT_8 = {1: dict(per_device_train_batch_size=4, gradient_accumulation_steps=2),
         2: dict(per_device_train_batch_size=2, gradient_accumulation_steps=2)}  # processes: a step of 8 pairs


@pytest.fixture(scope="module")
def undisturbed(train, engine_configs):
    """undisturbed(stage, bf16): an undisturbed run of one process with checkpoints 3 and 6, made once."""
    runs = {}

    def get(stage, bf16):
        if (stage, bf16) not in runs:
            runs[stage, bf16] = train("undisturbed", None, deepspeed=engine_configs[stage], bf16=bf16, **CUT_8[1] | RESHARD)
        return runs[stage, bf16]
    return get


RESHARD = dict(max_steps=6, save_strategy="steps", save_steps=3, max_train_samples=42)


def stop_at_3(run, folder):
    """A copy of a run as it was after checkpoint 3."""
    return copy_without(run, folder, "checkpoint-6", "summary.json", "model.safetensors")


def assert_near(one, other, bf16):
    """Losses, queries and weights of two runs, within the dtype's tolerance."""
    assert one.losses() == pytest.approx(other.losses(), rel=1e-2 if bf16 else 1e-5)
    if not bf16:
        assert one.ledger() == other.ledger()
    assert_same_weights(one.weights(), other.weights(), 5e-3 if bf16 else 1e-5)


@pytest.mark.parametrize("bf16, before, after", [
    (False, 2, 0), (False, 0, 1), (False, 1, 3), (False, 3, 2), (True, 1, 2), (True, 2, 3), (True, 3, 1)])
def test_the_zero_stage_may_change_on_resume(bf16, before, after, train, undisturbed, engine_configs, tmp_path):
    """With one process. A run that goes on with the stage it had is the same to the last bit."""
    whole = undisturbed(before, bf16)
    for stage in (before, after):
        folder = stop_at_3(whole, tmp_path / f"to-{stage}")
        again = train("resharded", output_dir=folder, deepspeed=engine_configs[stage], bf16=bf16, **CUT_8[1] | RESHARD)
        assert f"resumed from {folder}/checkpoint-3 at step 3 of 6" in again.stdout
        if stage == before:
            assert_same_run(again, whole)
        else:
            assert_near(again, whole, bf16)


@pytest.mark.slow
@pytest.mark.parametrize("bf16, processes, before, after", [
    (False, (2, None), 2, (0, 1, 3)), (False, (None, 2), 0, (3,)), (True, (2, None), 3, (1, 2)), (True, (None, 2), 1, (2,))])
def test_the_number_of_ranks_may_change_on_resume(bf16, processes, before, after, train, undisturbed, engine_configs,
                                                  tmp_path):
    """In a run of 42 pairs in steps of 8; its last step has 2."""
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


def write_as_whole(content, folder):
    """Put other content into a checkpoint, with checksums that are right."""
    torch.save(content, folder / MODEL)
    state, written = checkpoint.read_state(folder), (folder / MODEL).read_bytes()
    state["files"][MODEL] = [len(written), zlib.crc32(written)]
    (folder / STATE).write_text(checkpoint.state_text(state))


def test_a_checkpoint_of_another_model_is_refused(train, whole, stopped):
    """So is one that lacks the file of another rank. The message says how much of which parameter the checkpoint has."""
    held = torch.load(stopped / "checkpoint-4" / MODEL, weights_only=True)
    write_as_whole(held | {"flats": held["flats"][1:]}, stopped / "checkpoint-4")
    run = train("another-model", output_dir=stopped, check=2, **SAVING)
    assert len(errors(run)) == 1 and f"{stopped}/checkpoint-4: its files rank-*.pt hold 0 of the " in errors(run)[0]


def test_another_reference_under_the_same_name_is_refused(train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "reference")
    keys = SAVING | dict(ref_model_name_or_path=tmp_path / "reference", output_dir=tmp_path / "run")
    train("start", **keys)
    (tmp_path / "run" / "summary.json").unlink()
    weights = load_file(tmp_path / "reference" / "model.safetensors")
    weights["model.norm.weight"] *= 1.1
    save_file(weights, tmp_path / "reference" / "model.safetensors", metadata={"format": "pt"})
    run = train("other-reference", check=2, **keys)
    assert len(errors(run)) == 1 and "checkpoint-6/trainer_state.json: the run in there has reference " in errors(run)[0]


def test_nothing_that_is_hidden_in_a_checkpoint_is_run(train, stopped, tmp_path):
    """A pickle that would make a folder, in a checkpoint whose checksums are right."""
    class Hidden:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "it-ran"),)

    held = torch.load(stopped / "checkpoint-4" / MODEL, weights_only=True)
    write_as_whole(held | {"hidden": Hidden()}, stopped / "checkpoint-4")
    run = train("hidden", output_dir=stopped, check=2, **SAVING)
    assert len(errors(run)) == 1 and f"checkpoint-4/{MODEL}: " in errors(run)[0] and "os.mkdir" not in run.stdout
    assert not (tmp_path / "it-ran").exists()


def test_an_end_that_was_killed_while_it_saved_is_repeated(train, tiny, tmp_path):
    """With a tokenizer that has several chat templates, which transformers saves in a folder."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(tmp_path / "model")
    keys = SAVING | {"output_dir": tmp_path / "run", "model_name_or_path": tmp_path / "model"}
    template = train("templates", **keys).output / "additional_chat_templates" / "tool_use.jinja"
    assert template.is_file()
    (tmp_path / "run" / "summary.json").unlink()
    assert train("templates", **keys).summary()["queries"] and template.is_file()


def test_one_run_at_a_time_in_a_folder(train, stopped, monkeypatch):
    """The second would write into the files of the first. Here the first is this process."""
    monkeypatch.setattr(checkpoint, "PATIENCE", 0.3)
    other = os.open(stopped, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    run = train("second", output_dir=stopped, check=2, **SAVING)
    assert errors(run) == [f"error: output_dir {stopped}: another run is at work in it: wait until it has ended, stop it "
                           "with Ctrl-C, or choose another output_dir"]
    os.close(other)
    assert train("second", output_dir=stopped, **SAVING).summary()
    other = os.open(stopped, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the run that has ended holds it no more
    os.close(other)


def test_two_runs_that_begin_at_once_do_not_both_train(tmp_path, monkeypatch):
    """Neither finds a folder; the lock of the first to make it keeps the other out. A child process keeps nobody out."""
    checkpoint.lock(tmp_path / "run")  # not there yet
    (tmp_path / "run").mkdir()
    checkpoint.lock(tmp_path / "run")
    checkpoint.lock(tmp_path / "run")  # ours already
    child = os.fork()
    if not child:
        os._exit(bool(checkpoint.HELD))
    assert os.waitpid(child, 0)[1] == 0 and len(checkpoint.HELD) == 1
    mine = dict(checkpoint.HELD)
    checkpoint.HELD.clear()
    monkeypatch.setattr(checkpoint, "PATIENCE", 0)
    with pytest.raises(UsageError, match="another run is at work"):
        checkpoint.lock(tmp_path / "run")
    checkpoint.HELD.update(mine)
    checkpoint.unlock()
    checkpoint.lock(tmp_path / "run")
    checkpoint.unlock()


def test_a_run_that_waited_for_the_end_of_another_finds_it_finished(train, whole, tmp_path):
    copy = copy_without(whole, tmp_path / "ending", "summary.json")
    other = os.open(copy, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)

    def end():
        shutil.copy(whole.output / "summary.json", copy)
        os.close(other)
    threading.Timer(2, end).start()
    assert "is finished" in train("ending", output_dir=copy, **SAVING).stdout


@pytest.mark.parametrize("name", ["model_name_or_path", "ref_model_name_or_path"])
def test_a_run_does_not_write_over_a_model_that_it_reads(name, train, tiny, tmp_path):
    shutil.copytree(tiny / "model", tmp_path / "model")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    run = train("in-place", output_dir=tmp_path / "link", check=2, **{name: tmp_path / "model"})
    assert errors(run) == [f"error: output_dir {run.output}: is the folder of {name}, whose weights would be written over: "
                           "choose another one"]
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == sorted(
        path.name for path in (tiny / "model").iterdir())


@pytest.mark.parametrize("output", ["link", "link/run"])
def test_an_output_dir_behind_a_broken_link_is_refused_before_anything_is_read(output, train, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "disk-that-is-not-mounted")
    run = train("nowhere", output_dir=tmp_path / output, check=2)
    assert errors(run) == [f"error: output_dir {run.output}: nothing can be written in {tmp_path}/link: make it writable, "
                           "or choose another one"]
    assert run.stdout == ""
