"""Fixtures and options of the tests: a caches folder of the session's own, a tiny model, and runs of it.

    python -m pytest                    all but the slow tests, two files at a time
    python -m pytest -m slow            the slow ones: ranks that die, kills, real browsers
    python -m pytest -m "" tests/test_x.py -n 0
"""

import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

pytest.register_assert_rewrite("helpers")  # before it is imported

from helpers import ROOT, Run, Server, command, launcher, launcher_environment  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=2, help="kills of tests/test_kills.py")
    parser.addoption("--offload", action="store_true", help="the test that compiles DeepSpeed's CPU Adam")
    parser.addoption("--examples", type=int, default=100, help="rows of each property in tests/test_bad_input.py")
    parser.addoption("--fuzz", type=int, default=150, help="mutated configs in tests/test_bad_input.py")


def pytest_configure(config):
    """Before anything imports torch, datasets or transformers: caches of this session's own, one thread, no network. And
    Ctrl-C as at a terminal: a shell that starts the tests in the background makes them and their children ignore it."""
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

    With `processes`, the real command line through the `deepspeed` launcher. Without, the same command inside this process,
    which saves the seconds that the imports take. check: the expected exit code; None: any.
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

    def run(name, processes=None, check=0, config=default, **keys):
        output = Path(keys.setdefault("output_dir", base / f"{name}-{next(numbers)}"))
        argv = ["--config", str(config), *(f"--{key}={value}" for key, value in keys.items())]
        if processes:
            started = launcher(processes)
            done = subprocess.run([*started, *argv], cwd=ROOT, env=launcher_environment(), text=True,
                                  capture_output=True, timeout=600)
            port = started[started.index("--master_port") + 1]  # no shared memory is left over
            assert not list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"))
            done = Run(output, done.stdout, done.stderr, done.returncode)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
                code = command(argv)
            done = Run(output, out.getvalue(), err.getvalue(), code)
        assert check is None or done.code == check, f"exit code {done.code}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done

    def start(processes=None, stderr=subprocess.PIPE, **keys):
        """The command in a process of its own, which is still running."""
        argv = ["--config", str(default), *(f"--{key}={value}" for key, value in keys.items())]
        starter = launcher(processes) if processes else [sys.executable, "train.py"]
        return subprocess.Popen([*starter, *argv], cwd=ROOT, env=launcher_environment(), text=True, stdout=subprocess.PIPE,
                                stderr=stderr, start_new_session=True)

    run.start = start
    return run


@pytest.fixture(scope="session")
def unlabelled(tiny, tmp_path_factory):
    """The tiny pairs without their labels, and their test split with labels."""
    folder = tmp_path_factory.mktemp("unlabelled")
    with open(folder / "train.jsonl", "w") as file:
        for line in (tiny / "pairs" / "train.jsonl").read_text().splitlines():
            row = json.loads(line)
            file.write(json.dumps({key: row[key] for key in ("prompt", "response_a", "response_b")}) + "\n")
    shutil.copy(tiny / "pairs" / "test.jsonl", folder)
    return folder


@pytest.fixture(scope="session")
def by_dataset(train):
    """A run whose labels came with the data. With any other annotator that says the same, it must be the same."""
    return train("by-dataset")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A test's own cache of data sets."""
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def handlers():
    """Restores the signal handlers after the test."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def ledger(tmp_path):
    """An empty ledger."""
    from labels.ledger import Ledger
    ledger = Ledger(tmp_path / "labels.sqlite")
    yield ledger
    ledger.close()


@pytest.fixture
def serve(monkeypatch):
    """serve(behave) → helpers.Server, a chat endpoint on loopback."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers = []

    def start(behave, port=0):
        servers.append(Server(behave, port))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


@pytest.fixture
def release():
    """An event for threads of a server to wait for, which is set when the test has ended."""
    event = threading.Event()
    yield event
    event.set()


@pytest.fixture(scope="module")
def browser():
    """Chromium, driven by Playwright; a test is skipped where either is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs tests/requirements.txt")
    chromium = shutil.which("chromium") or "/usr/bin/chromium"
    if not Path(chromium).exists():
        pytest.skip("needs chromium: apt-get install chromium")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
             "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=chromium, args=flags)
        yield started
        started.close()
