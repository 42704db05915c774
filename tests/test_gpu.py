"""benchmarks/gpu.py, as far as it needs neither a GPU nor a model."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu  # noqa: E402
import speed  # noqa: E402

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


@pytest.fixture
def bench(tmp_path):
    """A Bench without models and pairs, whose card reaches 1 TFLOP/s."""
    bench = object.__new__(gpu.Bench)
    bench.folder, bench.done, bench.lengths, bench.cuda, bench.small = tmp_path, {}, [(100, 50, 70)], True, False
    bench.rate, bench.lock = 1e12, threading.RLock()
    bench.model, bench.left = lambda shape: tmp_path / shape, lambda: 60
    bench.pairs = tmp_path / "pairs"
    return bench


def test_a_run_that_is_cut_off_keeps_what_it_has(bench, monkeypatch):
    """Of two runs one ended, and the other was killed after its second line: its speed and its first margin are there."""
    monkeypatch.setattr(gpu, "RATES", {"x": ("SmolLM2-135M", 0.3, [("whole", {}), ("cut", {}), ("never", {})])})

    def process(command, output, **rest):
        for n, steps in enumerate([(1, 8, 16), (1, 8)]):
            output.with_name(f"rates-x-{n}").mkdir()
            rows = [{"split": "train", "step": step, "tokens_per_second": 1000.0 * step, "rewards/margins": n / 2}
                    for step in steps]
            (output.with_name(f"rates-x-{n}") / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)))
        output.with_name("rates-x-0.peak").write_text("5000000000")
    bench.process = process
    _, whole, cut, never, *verdicts = gpu.rates(bench, "x")
    assert whole.startswith("| whole | 8,000 | 16,000 | ") and whole.endswith(" | 0.0 |")
    assert cut == "| cut | 8,000 |  | | | | | 0.5 |" and never == "| never |  |  | | | | |  |"
    assert [passed for passed, _ in verdicts] == [False, False, True] and "cut, never: see gpu.log" in verdicts[0][1]


def test_an_adapter_spares_the_gradients_of_frozen_weights_and_nothing_of_attention():
    """Against torch's own count of the products, whose attention computes every position, seen or not."""
    config = transformers.LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                      num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager")
    lm, T = transformers.LlamaForCausalLM(config), 10
    counted = []
    for frozen in (False, True):
        for weight in lm.parameters():
            weight.requires_grad_(not frozen)
        inputs = torch.randn(1, T, 32, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            lm(inputs_embeds=inputs, use_cache=False).logits.sum().backward()
        counted.append(counter.get_total_flops())
    unseen = 3 * 4 * 2 * 32 * (T * T / 2)
    full, adapter = (speed.unique_flops(config, [(0, T, 0)], n)[0] + unseen for n in (6, 4))
    assert [full, adapter] == counted


def test_trl_s_tokens_a_second_are_tokens_by_seconds(monkeypatch, tmp_path, capsys):
    """Of all steps, not a mean of the speeds of steps, which a short step would count in full; and without the kernel that
    train.py does not use either."""
    tokens, seconds = [9, *range(100, 115)], [9.0, *([1.0] * 10), 1.0, 2.0, 3.0, 4.0, 5.0]
    kernels = []

    def trl(job):
        kernels.append((job["micro"], torch.backends.cuda.cudnn_sdp_enabled()))
        return {"speeds": [n / s for n, s in zip(tokens, seconds)], "seconds": seconds, "memory": 7}
    monkeypatch.setattr(speed, "trl", trl)
    before = torch.backends.cuda.cudnn_sdp_enabled()
    (tmp_path / "job.json").write_text("{}")
    gpu.trl_speed(tmp_path / "job.json")
    torch.backends.cuda.enable_cudnn_sdp(before)
    assert kernels == [(32, False), (32, True), (8, False)]
    for line, micro in zip(capsys.readouterr().out.splitlines(), (32, 32, 8)):
        row = json.loads(line.removeprefix("TRL "))
        assert row["title"].startswith(f"{micro} pairs a step")
        assert (row["cold"], row["warm"]) == pytest.approx((sum(range(100, 107)) / 7, sum(range(110, 115)) / 15))


def test_a_check_that_does_not_exist_is_refused_and_no_time_is_no_success(tmp_path):
    script = ROOT / "benchmarks" / "gpu.py"
    wrong = subprocess.run([sys.executable, script, "--only", "7,6LoRA"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "'6LoRA' is not a check; choose from 1, 2, rows, 4, 8, 6, 135M," in wrong.stderr
    assert gpu.check_names("7B,LoRA,1B") == ["7B", "LoRA", "1B"]
    late = subprocess.run([sys.executable, "-c", SCRIPT, str(script.parent), str(tmp_path), "0", "alone"],
                          capture_output=True, text=True)
    assert late.returncode == 2 and "| 1 | for the record | no time left |" in late.stdout
