"""Ranks that die, and signals: `python -m pytest tests/test_ranks.py -n 0 -m ""`. What needs the launcher is slow."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import psutil
import pytest
import torch.distributed as dist
from helpers import ROOT, Run, errors, launcher, launcher_environment, prepared_train, wait_until

from labels.ledger import Ledger
from runtime import launch
from runtime.ranks import lost_peer


@pytest.fixture
def broken(tiny, tmp_path):
    """broken(code) → the command line, without a launcher, of a train.py whose ranks first run some code."""
    def command(code):
        config = tmp_path / "tiny.json"  # JSON is YAML
        config.write_text(json.dumps(dict(
            model_name_or_path=f"{tiny}/model", dataset_mixer={f"{tiny}/pairs": 1.0}, output_dir=f"{tmp_path}/run",
            gamma=0.2, learning_rate=2e-3, warmup_ratio=0, per_device_train_batch_size=4, max_prompt_length=16,
            max_length=64, max_steps=6, save_steps=2, do_eval=False, num_threads=1)))
        return [prepared_train(tmp_path / "broken.py", code), "--config", str(config)]
    return command


@pytest.fixture
def broken_ranks(broken, tmp_path):
    """broken_ranks(code) → Run of two processes, started by the launcher. A run that hangs fails the test."""
    def launch(code):
        done = subprocess.run([*launcher(2)[:-1], *broken(code)], cwd=ROOT, text=True, timeout=600, capture_output=True,
                              env=launcher_environment())
        return Run(tmp_path / "run", done.stdout, done.stderr, done.returncode)
    return launch


@pytest.mark.slow
def test_if_one_rank_cannot_do_without_a_mask_none_does(broken_ranks):
    """As with cards of two kinds: the other rank would go on without one, and rank 0 would not say so."""
    run = broken_ranks("""
        import adpo
        from benchmarks import flash_on_cpu
        from runtime import model
        model.skips_masks = model.calls_attention_of_pairs
        def refused(*_):
            raise RuntimeError("no kernel for this card")
        if rank == 1:
            adpo.pair_attention = refused
    """)
    assert run.code == 0, run.stderr
    assert ("attention with a mask, which is slower: without one, its forward fails on such rows "
            "(RuntimeError: no kernel for this card)") in run.stdout


@pytest.mark.slow
def test_a_rank_that_is_killed_takes_the_run_down(broken_ranks):
    run = broken_ranks("""
        import adpo
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


@pytest.mark.slow
def test_an_exception_of_one_rank_is_shown_and_is_the_only_one(broken_ranks):
    run = broken_ranks("""
        import adpo
        rewards = adpo.implicit_rewards
        def wrong(*args):
            if rank == 1 and at(3):
                raise ArithmeticError("what rank 1 has to say")
            return rewards(*args)
        adpo.implicit_rewards = wrong
        """)
    assert run.code == 1 and run.stderr.count("Traceback") == 1
    assert "ArithmeticError: what rank 1 has to say" in run.stderr


@pytest.mark.slow
def test_an_error_of_rank_0_alone_ends_the_other_and_gives_the_exit_code(broken_ranks):
    run = broken_ranks("""
        from labels.ledger import Ledger, LedgerError
        take = Ledger.take
        def refused(*args):
            if at(3):
                raise LedgerError("what rank 0 has to say")
            return take(*args)
        Ledger.take = refused
        """)
    assert run.code == 2 and errors(run) == ["error: what rank 0 has to say"]
    assert "rank 1: stopped, another rank is gone (" in run.stderr


@pytest.mark.slow
def test_ranks_wait_for_one_that_tokenises_and_reads_its_model_for_longer_than_collectives_wait(broken_ranks):
    """Those of the run wait as long as DEEPSPEED_TIMEOUT says, DeepSpeed's own 10 minutes under NCCL."""
    run = broken_ranks("""
        import time
        from datetime import timedelta
        import torch.distributed.distributed_c10d as c10d
        c10d.default_pg_timeout = timedelta(seconds=15)
        import runtime.launch, runtime.model, data, deepspeed
        start = deepspeed.init_distributed
        deepspeed.init_distributed = lambda **keys: start(timeout=c10d.default_pg_timeout, **keys)
        def late(function):
            def wrapper(*args, **keys):
                time.sleep(25 * (rank == 0))
                return function(*args, **keys)
            return wrapper
        data.load_pairs, runtime.model.load_policy = late(data.load_pairs), late(runtime.model.load_policy)
        """)
    assert run.code == 0, run.stderr


def test_an_error_of_nccls_own_is_not_taken_for_a_rank_that_is_gone(monkeypatch, capsys):
    """All ranks have it where a container's /dev/shm is too small, and it is the only error there is."""
    monkeypatch.setattr(launch.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(launch.signal, "signal", lambda *_: None)
    shared = "Last error:\nError while creating shared memory segment /dev/shm/nccl-1YsMbG (size 734)"
    error = dist.DistBackendError("NCCL error in: /c10d/NCCLUtils.hpp:268, system error, NCCL version 2.21.5\n"
                                  f"{shared}\nException raised from create at (most recent call first):\n#4 Error ")
    assert lost_peer(error) and launch.wait_to_be_ended(error) == 1
    said = capsys.readouterr().err
    assert said.startswith("rank 0: stopped, NCCL failed; where no other rank has an error of its own, this is why (NCCL")
    assert said.endswith(f"{' '.join(shared.split())})\n") and said.count("\n") == 1


@pytest.mark.slow
def test_an_error_that_all_ranks_have_is_printed_once(train):
    run = train("alike", processes=2, check=2, gamma=-1)
    assert len(errors(run)) == 1 and "gamma" in errors(run)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Signals. The launcher passes them on in its own way.

@pytest.fixture
def launched(train, tmp_path):
    """launched(**keys) → (output_dir, the running launcher of two processes). It is a process group, as in a shell."""
    started = []

    def launch(**keys):
        started.append(train.start(2, output_dir=tmp_path / "run", per_device_train_batch_size=4, do_eval=False, **keys))
        return tmp_path / "run", started[-1]

    yield launch
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def rows_written(output):
    return (output / "metrics.jsonl").read_text().count("\n") if (output / "metrics.jsonl").exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_launchers_group_stops_ranks_that_wait_for_people(number, launched, tiny, tmp_path):
    """The way that Ctrl-C and schedulers send it. Each rank gets it twice, from the sender and from the launcher."""
    with open(tmp_path / "train.jsonl", "w") as file:
        for line in (tiny / "pairs" / "train.jsonl").read_text().splitlines():
            file.write(json.dumps({k: v for k, v in json.loads(line).items() if k != "label"}) + "\n")
    output, process = launched(oracle="human", dataset_mixer=f"{{{tmp_path}/train.jsonl: 1.0}}")

    def asked():
        return (output / "labels.sqlite").exists() and len(Ledger(output / "labels.sqlite").open_questions()) == 8

    wait_until(asked, process)
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=600)
    assert "stopped: interrupted, 8 of 8 answers are missing" in out and "--num_gpus 2 train.py" in out, out + err
    page = f"`python tools/label.py {output}`"
    assert f"missing; people answer with {page}" in out and f"waiting for 8 labels (answer with {page})" in err


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_all_and_the_launcher_passes_75_on(launched):
    output, process = launched(max_steps=1000)
    wait_until(lambda: rows_written(output) >= 3, process)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if "--local_rank=1" in child.cmdline()]
    ranks[0].terminate()
    out, err = process.communicate(timeout=600)
    assert process.returncode == 75 and "stopped: interrupted" in out, out + err
    assert len(list(output.glob("checkpoint-*/trainer_state.json"))) == 1


def test_a_second_ctrl_c_ends_a_run_at_once(broken, tmp_path):
    """In the middle of a step that takes long."""
    command = broken("""
        import pathlib, time
        import adpo
        folder = pathlib.Path("{folder}")
        def long(*args):
            (folder / "in-a-step").touch()
            while not signal.getsignal(signal.SIGINT).asked:
                time.sleep(0.01)
            (folder / "heard").touch()
            time.sleep(1000)
        adpo.implicit_rewards = long
        """.replace("{folder}", str(tmp_path)))
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=launcher_environment(), stderr=subprocess.DEVNULL)
    wait_until((tmp_path / "in-a-step").exists, process)
    process.send_signal(signal.SIGINT)
    wait_until((tmp_path / "heard").exists, process)  # two at the same time would count as one
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=600) == -signal.SIGINT
