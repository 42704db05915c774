"""benchmarks/gpu.py, as far as it needs neither a GPU nor a model."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# benchmarks/gpu.py with this check alone, and no model or pairs to make.
SCRIPT = """
import os, pathlib, sys, threading, time
sys.path.insert(0, sys.argv[1])
import gpu

class Bench(gpu.Bench):
    def __init__(self, options):
        self.options, self.started, self.output = options, time.time(), pathlib.Path(options.output)
        self.lock, self.done, self.running, self.environment = threading.RLock(), {}, [], os.environ
        self.small = False

    def card(self):
        return "a card"

def check(bench):
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    yield bench.process(["-c", child], bench.output / "child").why()

gpu.Bench = Bench
checks = [(name, "A check", "none", 1, check) for name in ("1", "2")]
gpu.CHECKS = [checks] if sys.argv[4] == "together" else checks[:1]
sys.exit(gpu.main(gpu.argparse.Namespace(output=sys.argv[2], limit=float(sys.argv[3]), only=[])))
"""


@pytest.mark.parametrize("how", ["alone", "together"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_is_interrupted_leaves_nothing_running(number, how, tmp_path):
    """A run that went on would slow down whatever uses the card next."""
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(ROOT / "benchmarks"), str(tmp_path), "60", how])
    try:
        printed = tmp_path / "child.out"
        while not (printed.is_file() and printed.read_text().endswith("\n")):
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
        command, deadline = Path(f"/proc/{int(printed.read_text())}/cmdline"), time.monotonic() + 10
        while command.exists() and command.read_bytes():  # empty: it has ended, and init has not collected it yet
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        process.kill()
