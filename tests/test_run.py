"""runtime/run.py, launch.py and reference.py by themselves, without a model: `python -m pytest tests/test_run.py`."""

import contextlib
import io
import os
import signal
import sqlite3
import types

import pytest
import torch
import torch.distributed as dist
import transformers

import data
from labels.annotators import Waiting
from runtime import checkpoint, launch, reference, report
from runtime import run as module
from runtime.config import Config
from runtime.errors import Stopped, UsageError
from runtime.run import Interrupt, Run


def make(tmp_path, total_steps=10, **keys):
    """A run that is ready for its first step."""
    config = Config(**{"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "output_dir": str(tmp_path / "run"), **keys})
    run = Run(config)
    run.total_steps, run.epoch_steps, run.can_save = total_steps, 4, True
    run.sums, run.seconds = torch.zeros(3, dtype=torch.float64), 0.0
    return run


@pytest.fixture
def engine(monkeypatch):
    """An engine whose gradients are finite, for Run.end_step."""
    monkeypatch.setattr(module, "skipped_in_a_row", lambda *args: 0)


# ----------------------------------------------------------------------------------------------------------------------
# When to log, evaluate and save

@pytest.mark.parametrize("what, keys, steps", [
    ("logging", {"logging_steps": 4}, [1, 4, 8, 10]), ("logging", {"logging_steps": 1}, range(1, 11)),
    ("logging", {"logging_steps": 4, "logging_first_step": False}, [4, 8, 10]),
    ("logging", {"logging_steps": 100, "logging_first_step": False}, [10]),
    ("eval", {"eval_strategy": "no"}, [10]), ("eval", {"eval_strategy": "steps", "eval_steps": 3}, [3, 6, 9, 10]),
    ("eval", {"eval_strategy": "epoch"}, [4, 8, 10]), ("save", {"save_strategy": "no"}, []),
    ("save", {"save_strategy": "steps", "save_steps": 3}, [3, 6, 9]), ("save", {"save_strategy": "epoch"}, [4, 8])])
def test_what_is_due_after_which_step(what, keys, steps, tmp_path, engine):
    run, due = make(tmp_path, **keys), []
    with run.stoppable(engine):
        for _ in run.steps():
            run.end_step(engine, None, [])
            due += [run.step] if run.is_due(what) else []
    assert due == [*steps]


@pytest.mark.parametrize("pause", ["nothing", "question", "eval", "save"])
def test_the_seconds_since_the_last_log_are_those_of_all_its_steps_and_of_nothing_else(pause, tmp_path, engine, monkeypatch):
    """An evaluation or a checkpoint between two logs neither counts nor makes the steps before it count as no time. Nor does
    waiting for answers count."""
    run, clock = make(tmp_path, total_steps=4), [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: clock[0])  # unlike `time`, it is never set back
    monkeypatch.setattr(module, "reduced", lambda sums: sums.tolist())
    monkeypatch.setattr(checkpoint, "save", lambda engine, output, state, limit: kept.append(state["seconds"]))
    run.metrics, run.start, run.parts, kept = types.SimpleNamespace(write=lambda row: None), {}, {}, []
    with run.stoppable(engine):
        for step in run.steps():
            clock[0] += 1.0
            if pause == "question":
                with run.untimed():
                    clock[0] += 100.0
            run.add(torch.ones(3))
            run.end_step(engine, None, [])
            if step in (1, 3):
                assert run.take_sums() == ([2.0, 2.0, 2.0], 2.0)
                run.log("train", {})
            if pause in ("eval", "save"):
                clock[0] += 100.0
                run.log("eval", {}) if pause == "eval" else run.save(engine)
    assert kept == ([1.0, 0.0, 1.0, 0.0] if pause == "save" else [])  # a resumed run counts on from there


# ----------------------------------------------------------------------------------------------------------------------
# Where a run stops

@pytest.mark.parametrize("when, saved", [("before the first step", []), ("before a step", [2]), ("within a step", []),
                                         ("after a step", [3])])
def test_a_run_that_is_stopped_saves_between_steps_but_not_within_one(when, saved, tmp_path, engine, monkeypatch, handlers):
    """A checkpoint written within a step would count the metrics of some of its micro-batches twice."""
    run, written = make(tmp_path), []
    monkeypatch.setattr(checkpoint, "complete", lambda output: [])
    monkeypatch.setattr(Run, "save", lambda self, engine: written.append(self.step))
    with pytest.raises(Stopped, match="answers are missing"), run.stoppable(engine):
        for step in run.steps():
            if when == "before the first step" or step == 2 and when == "before a step":
                raise Waiting("answers are missing")
            run.add(torch.ones(3))
            if step == 2 and when == "within a step":
                raise Waiting("answers are missing")
            run.end_step(engine, None, [])
            if step == 2 and when == "after a step":
                raise Stopped("answers are missing")
    assert written == saved and run.in_step == (when == "within a step")


@pytest.mark.parametrize("reason", ["no folder of all hosts", "a checkpoint of this step", "another error"])
def test_a_run_that_is_stopped_saves_only_what_is_of_use(reason, tmp_path, engine, monkeypatch, handlers):
    run, written = make(tmp_path), []
    run.can_save = reason != "no folder of all hosts"
    monkeypatch.setattr(checkpoint, "complete", lambda output: [1] if reason == "a checkpoint of this step" else [])
    monkeypatch.setattr(Run, "save", lambda self, engine: written.append(self.step))
    with pytest.raises((Stopped, FloatingPointError)), run.stoppable(engine):
        for _ in run.steps():
            run.end_step(engine, None, [])
            raise FloatingPointError("nan") if reason == "another error" else Stopped("interrupted")
    assert written == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_after_the_step(number, tmp_path, engine, monkeypatch, handlers):
    run, trained, written = make(tmp_path), [], []
    monkeypatch.setattr(checkpoint, "complete", lambda output: [])
    monkeypatch.setattr(Run, "save", lambda self, engine: written.append(self.step))
    with pytest.raises(Stopped, match="^interrupted$"), run.stoppable(engine):
        for step in run.steps():
            if step == 1:
                os.kill(os.getpid(), number)
            run.add(torch.ones(3))
            run.end_step(engine, None, [])
            trained.append(step)
    assert trained == [0, 1] and written == [2]


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_that_ends_gives_the_signals_back(fails, tmp_path, engine, handlers):
    run = make(tmp_path, total_steps=1)
    with contextlib.suppress(FloatingPointError), run.stoppable(engine):
        assert signal.getsignal(signal.SIGINT) is run.interrupt
        for _ in run.steps():
            run.end_step(engine, None, [])
            if fails:
                raise FloatingPointError
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_signal_that_comes_twice_interrupts_once_and_does_not_cut_the_stop_short(handlers):
    """After a Ctrl-C or a SIGTERM that the ranks have had already, the launcher sends them a SIGTERM too."""
    interrupt, raised = Interrupt(), []
    interrupt.install()
    interrupt.inside = True
    for number in (signal.SIGINT, signal.SIGTERM):
        try:
            interrupt(number, None)
        except KeyboardInterrupt:
            raised.append(number)
    interrupt.remove()
    assert raised == [signal.SIGINT] and interrupt.asked and signal.getsignal(signal.SIGTERM) is interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_is_saved_waits_until_all_is_there(number, tmp_path, engine, monkeypatch, handlers):
    """Without a checkpoint of the last step, the whole run would be lost."""
    run, done = make(tmp_path, save_strategy="no"), []
    monkeypatch.setattr(module, "save_model", lambda *args: [os.kill(os.getpid(), number), done.append("model")])
    monkeypatch.setattr(Run, "check_saved", lambda *args: None)
    monkeypatch.setattr(report, "finish", lambda *args: done.append("summary"))
    run.finish(types.SimpleNamespace(destroy=lambda: None), None, {})
    assert done == ["model", "summary"] and run.interrupt.asked


# ----------------------------------------------------------------------------------------------------------------------
# How the command ends

class Ended(BaseException):
    """Stands for the end of the process, by sys.exit or os._exit."""


@pytest.fixture
def ending(monkeypatch):
    """ending(main) → what launch(main) did at the end: [("destroy",), ("exit", code) or ("_exit", code)]."""
    done = []

    def end(how):
        def record(code):
            done.append((how, code))
            raise Ended
        return record

    def run(main, **keys):
        monkeypatch.setattr(launch.sys, "argv", ["train.py", "--config", "c.yaml"])
        monkeypatch.setattr(launch, "parse_config", lambda argv: Config(output_dir="o", **keys))
        monkeypatch.setattr(launch, "set_up", lambda config: None)
        monkeypatch.setattr(launch, "rank", lambda: 0)
        monkeypatch.setattr(launch, "time", types.SimpleNamespace(sleep=lambda seconds: None))
        monkeypatch.setattr(launch, "dist", types.SimpleNamespace(
            is_initialized=lambda: True, destroy_process_group=lambda: done.append(("destroy",)), DistError=dist.DistError))
        monkeypatch.setattr(launch.sys, "exit", end("exit"))
        monkeypatch.setattr(launch.os, "_exit", end("_exit"))
        with contextlib.suppress(Ended):
            launch.launch(main)
        return done

    return run


def raising(error):
    def main(config, command_line):
        raise error
    return main


def test_a_finished_and_a_stopped_run_end_together_with_their_process_group(ending, capsys):
    assert ending(lambda config, command_line: None) == [("destroy",), ("exit", 0)]


def test_a_sign_that_a_terminal_cannot_show_does_not_end_the_run(ending, monkeypatch):
    """The closing line has some. It comes before the upload, and each later start prints it too."""
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(launch.sys, "stdout", terminal)
    assert ending(lambda config, command_line: launch.say("+0.06 → +3.07")) == [("destroy",), ("exit", 0)]
    assert terminal.buffer.getvalue() == b"+0.06 ? +3.07\n"


def test_a_stopped_run_says_how_to_go_on(ending, capsys):
    assert ending(raising(Stopped("interrupted"))) == [("destroy",), ("exit", 75)]
    assert capsys.readouterr().out == (
        "stopped: interrupted. All answers so far are in o/labels.sqlite. "
        "Resume with\n    python train.py --config c.yaml\n")
    ending(raising(Stopped("interrupted")), resume_from_checkpoint="o/checkpoint-1")  # which the run has left behind
    assert capsys.readouterr().out.endswith("python train.py --config c.yaml --resume_from_checkpoint=null\n")


def test_ctrl_c_before_the_first_step_is_no_traceback(ending, capsys):
    assert ending(raising(KeyboardInterrupt())) == [("destroy",), ("exit", 75)]
    assert capsys.readouterr().out == "stopped: interrupted; the same command goes on\n"


@pytest.mark.parametrize("error, code, said", [
    (UsageError("x.yaml: no"), 2, "error: x.yaml: no\n"), (FloatingPointError("nan"), 1, "error: nan\n"),
    (sqlite3.OperationalError("database is locked"), 2, "error: o/labels.sqlite: cannot be used as a ledger"),
    (OSError(28, "No space left on device"), 2, "make room under $HF_HOME"),
    (torch.OutOfMemoryError("CUDA out of memory"), 1, "error: rank 0: out of memory"),
    (dist.DistBackendError("Connection closed by peer"), 1, "rank 0: stopped, another rank is gone (Connection closed"),
    (ValueError("a bug"), 1, "ValueError: a bug\n"), (RuntimeError("another bug"), 1, "RuntimeError: another bug\n"),
    (PermissionError(13, "Permission denied"), 1, "PermissionError: ")])
def test_a_run_that_fails_ends_alone_and_leaves_the_process_group_as_it_is(error, code, said, ending, capsys, handlers):
    """Under NCCL, destroying the group would wait for the other ranks for ever."""
    assert ending(raising(error)) == [("_exit", code)]
    shown = capsys.readouterr().err
    assert said in shown and ("Traceback" in shown) == ("bug" in str(error) or type(error) is PermissionError)


def test_the_command_that_resumes_is_the_one_that_was_given(monkeypatch):
    argv = ["--config", "my config.yaml", "--local_rank=1", "--gamma=1"]
    assert launch.same_command(argv) == "python train.py --config 'my config.yaml' --gamma=1"
    monkeypatch.setenv("LOCAL_SIZE", "1")  # of a machine with more GPUs, perhaps
    assert launch.same_command(argv) == "deepspeed --num_gpus 1 train.py --config 'my config.yaml' --gamma=1"
    monkeypatch.setenv("LOCAL_SIZE", "2")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.same_command(argv) == "deepspeed --num_gpus 2 train.py --config 'my config.yaml' --gamma=1"
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launch.same_command(argv) == "deepspeed --hostfile HOSTFILE train.py --config 'my config.yaml' --gamma=1"


# ----------------------------------------------------------------------------------------------------------------------
# The cache of the reference

class Engine:
    """What add_reference reads of an engine, with a policy whose log-probs are those of its call's number."""
    device = torch.device("cpu")

    def __init__(self, **changes):
        self.calls = 0
        self.attention, self.dtype, self.fingerprint, self.compiled = "sdpa", torch.float32, "weights", False
        self.chunk_size, self.takes_rows = 2048, False
        vars(self).update(changes)
        self.module = types.SimpleNamespace(
            fingerprint=self.fingerprint, compiled=self.compiled, chunk_size=self.chunk_size, takes_rows=self.takes_rows,
            parameters=lambda: iter([torch.zeros(1, dtype=self.dtype)]),
            lm=types.SimpleNamespace(config=types.SimpleNamespace(_attn_implementation=self.attention)))

    def train(self, mode):
        pass

    def __call__(self, batch):
        self.calls += 1
        return torch.full((len(batch.rows), 2), -float(self.calls))


@pytest.fixture
def reference_of(tmp_path, monkeypatch):
    """reference_of(engine, batches=…, **changes of the pairs) → (log-probs, how many batches were scored for them)."""
    import datasets
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: None)
    monkeypatch.setattr(reference, "all_gather", lambda value: [value])
    table = datasets.Dataset.from_dict({"id": ["p0", "p1", "p2"], "prompt_ids": [[1]] * 3, "first_ids": [[2]] * 3,
                                        "second_ids": [[3]] * 3, "tokens": [3] * 3})

    def compute(engine, batches=((0,), (1,)), **changes):
        pairs = data.Pairs(table, changes.pop("fingerprint", "pairs"), {}, **changes)
        before = engine.calls
        reference.add_reference(engine, [(pairs, [list(rows) for rows in batches])])
        return pairs.ref_logps, engine.calls - before

    return compute


def test_the_reference_is_scored_once_and_unscored_pairs_are_not_numbers(reference_of):
    first, calls = reference_of(Engine())
    assert calls == 2 and first[:2].tolist() == [[-1, -1], [-2, -2]] and first[2].isnan().all()
    again, calls = reference_of(Engine())
    assert calls == 0 and torch.equal(again.nan_to_num(), first.nan_to_num())


@pytest.mark.parametrize("change", [
    dict(engine={"attention": "eager"}), dict(engine={"compiled": True}), dict(engine={"dtype": torch.bfloat16}),
    dict(engine={"fingerprint": "others"}), dict(pairs={"fingerprint": "others"}), dict(pairs={"shared": False}),
    dict(pairs={"batches": ((1,), (0,))}), dict(torch="9.9"), dict(transformers="9.9"), dict(code="other"),
    dict(device="another GPU"), dict(engine={"chunk_size": 1}), dict(engine={"takes_rows": True}),
    dict(deterministic=True)], ids=str)
def test_the_cache_is_not_used_where_the_last_bits_would_differ(change, reference_of, monkeypatch, capsys):
    """Other kernels are enough: at step 0 every margin has to be 0, not nearly 0."""
    reference_of(Engine())
    if "torch" in change:
        monkeypatch.setattr(torch, "__version__", change["torch"])
    if "transformers" in change:
        monkeypatch.setattr(reference.transformers, "__version__", change["transformers"])
    if "code" in change:
        monkeypatch.setattr(reference, "CODE", change["code"])
    if "device" in change:
        kernels = reference.kernels
        monkeypatch.setattr(reference, "kernels", lambda engine: (*kernels(engine)[:-1], change["device"]))
    if "deterministic" in change:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert reference_of(Engine(**change.get("engine", {})), **change.get("pairs", {}))[1] == 2
    assert capsys.readouterr().out == ""  # the file in the cache was not found, rather than found and thought damaged


def test_the_kernels_are_those_of_attention_compiler_chunks_versions_and_device(monkeypatch):
    versions = torch.__version__, transformers.__version__
    assert reference.kernels(Engine()) == ("sdpa", False, False, 2048, False, *versions, "cpu")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    engine = Engine(takes_rows=True, device=torch.device("cuda"))
    assert reference.kernels(engine) == ("sdpa", True, False, 2048, False, *versions, "NVIDIA H100")


# ----------------------------------------------------------------------------------------------------------------------
# Set-up

@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_asks_torch_for_kernels_that_repeat(deterministic, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "use_deterministic_algorithms", asked.append)
    monkeypatch.setattr(os, "environ", {**os.environ})  # what it sets is gone afterwards
    launch.set_up(make(tmp_path, deterministic=deterministic).config)
    assert asked == [True] * deterministic
    assert ("CUBLAS_WORKSPACE_CONFIG" in os.environ) == deterministic
    assert not torch.backends.cuda.cudnn_sdp_enabled()
