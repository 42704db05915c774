"""What several test files share: a caches folder of the session's own, a tiny model, and pairs of the toy grammar."""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="kills of tests/test_kills.py")
    parser.addoption("--offload", action="store_true", help="the test that compiles DeepSpeed's CPU Adam")
    parser.addoption("--examples", type=int, default=100, help="rows of each property of tests/test_bad_input.py")
    parser.addoption("--fuzz", type=int, default=150, help="mutated configs of tests/test_bad_input.py")


def pytest_configure(config):
    """Before anything imports datasets or transformers: caches of this session's own, one thread, no network. And Ctrl-C as
    at a terminal: where a shell starts the tests in the background, they and their children inherit that it is ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="adpo-tests-")
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ["OMP_NUM_THREADS"] = "1"


def pytest_unconfigure(config):
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder with a random model of the toy task (model/) and 120 + 40 pairs labelled by the gold reward (pairs/)."""
    from runtime import toy
    folder = tmp_path_factory.mktemp("tiny")
    toy.write_untrained(folder, {"pairs/train.jsonl": 120, "pairs/test.jsonl": 40})
    return folder


@pytest.fixture(scope="session")
def engine_configs(tmp_path_factory):
    """{stage: path} of ds_config.json at each ZeRO stage."""
    folder = tmp_path_factory.mktemp("engines")
    ds = json.loads((ROOT / "ds_config.json").read_text())
    paths = {}
    for stage in range(4):
        ds["zero_optimization"]["stage"] = stage
        paths[stage] = folder / f"zero{stage}.json"
        paths[stage].write_text(json.dumps(ds))
    return paths


@pytest.fixture(scope="session")
def train(tiny, tmp_path_factory):
    """train(name, processes=None, check=0, config=…, **keys) → Run.

    With `processes`, the real command line through the `deepspeed` launcher; without, the same command inside this process,
    which spares the seconds that the imports take. check: the exit code that is expected; None: any.
    """
    base, numbers = tmp_path_factory.mktemp("runs"), itertools.count()
    default = base / "tiny.yaml"
    default.write_text(f"""
model_name_or_path: {tiny}/model
dataset_mixer: {{{tiny}/pairs: 1.0}}
learning_rate: 2.0e-3
warmup_ratio: 0.0
gamma: 0.2
per_device_train_batch_size: 8
max_prompt_length: 16
max_length: 64
max_steps: 4
logging_steps: 1
save_strategy: "no"
num_threads: 1
""")

    def launch(name, processes=None, check=0, config=default, **keys):
        output = Path(keys.setdefault("output_dir", base / f"{name}-{next(numbers)}"))
        argv = ["--config", str(config), *(f"--{key}={value}" for key, value in keys.items())]
        if processes:
            started = launcher(processes)
            done = subprocess.run([*started, *argv], cwd=ROOT, env=launcher_environment(), text=True,
                                  capture_output=True, timeout=240)
            port = started[started.index("--master_port") + 1]  # no shared memory is left behind
            assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
            run = Run(output, done.stdout, done.stderr, done.returncode)
        else:
            from train import command
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                code = command(argv)
            run = Run(output, out.getvalue(), err.getvalue(), code)
        assert check is None or run.code == check, f"exit code {run.code}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"
        return run

    def start(processes=None, stderr=subprocess.PIPE, **keys):
        """The command as a process of its own, under way."""
        argv = ["--config", str(default), *(f"--{key}={value}" for key, value in keys.items())]
        starter = launcher(processes) if processes else [sys.executable, "train.py"]
        return subprocess.Popen([*starter, *argv], cwd=ROOT, env=launcher_environment(), text=True, stdout=subprocess.PIPE,
                                stderr=stderr, start_new_session=True)

    launch.start = start
    return launch


def launcher(processes):
    return ["deepspeed", "--num_gpus", str(processes), "--master_port", str(free_port()), "train.py"]


def launcher_environment():
    """The launcher starts its children with the `python` of the path."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Run:
    """What a run left behind."""

    def __init__(self, output, stdout, stderr, code):
        self.output, self.stdout, self.stderr, self.code = output, stdout, stderr, code

    def rows(self, split="train"):
        rows = [json.loads(line) for line in (self.output / "metrics.jsonl").read_text().splitlines()]
        return [row for row in rows if row["split"] == split]

    def losses(self):
        return [row["loss"] for row in self.rows()]

    def summary(self):
        return json.loads((self.output / "summary.json").read_text())

    def weights(self):
        from safetensors.torch import load_file
        return load_file(self.output / "model.safetensors")

    def ledger(self):
        return sqlite3.connect(self.output / "labels.sqlite").execute(
            "SELECT pair, label, step FROM answers ORDER BY pair").fetchall()
