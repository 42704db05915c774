"""Steps whose loss or gradient is not finite, what decays, and ZeRO-3 without the whole model on any device.

    python -m pytest tests/test_engine.py -n 0
"""

import itertools
import math
import re
import subprocess

import deepspeed
import pytest
import torch
import transformers
from helpers import ROOT, errors, launcher, launcher_environment, prepared_train
from safetensors.torch import load_file

import adpo
from runtime.config import Config
from runtime.engine import make_optimizer


@pytest.fixture
def break_steps(monkeypatch):
    """break_steps(steps, how): break the first of the two micro-batches of these optimiser steps. With how "gradient" its
    loss is a number but the gradient is not; with "loss" its loss is infinite but the gradient is a number."""
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


# The pairs of these steps have 28 to 48 tokens: 200 cut each step of 8 pairs into two micro-batches.
CUT = dict(per_device_train_batch_size=8, micro_batch_tokens=200, max_steps=6)


@pytest.mark.parametrize("how", ["gradient", "loss"])
@pytest.mark.parametrize("stage, bf16", [(0, False), (1, False), (2, False), (3, False), (1, True), (2, True), (3, True)])
def test_a_step_whose_gradient_is_not_finite_changes_no_weight(how, stage, bf16, train, tiny, engine_configs, break_steps):
    break_steps([0, 1], how)
    run = train("broken", **CUT | dict(deepspeed=engine_configs[stage], bf16=bf16, max_steps=2))
    after, before = run.weights(), load_file(tiny / "model" / "model.safetensors")
    assert all((after[name] == before[name].to(after[name].dtype)).all() for name in after)
    named = [line.split(", ") for line in re.findall("the step is not taken; its pairs are (.*)", run.stdout)]
    assert len(named) == 2 and set(named[0]) == {pair for pair, _, step in run.ledger() if step == 0}  # step 0 asks for all
    assert all((row["loss"] is None) == (how == "loss") for row in run.rows())  # metrics.jsonl is JSON even so


@pytest.mark.parametrize("stage", [0, 2])
def test_training_goes_on_after_such_a_step_and_ends_at_three_in_a_row(stage, train, engine_configs, break_steps):
    """Steps 1 and 2 are broken, 3 is not, 4 to 6 are. A resumed run continues the count of its checkpoint."""
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


@pytest.mark.parametrize("optim", ["adamw_torch", "rmsprop"])
def test_only_matrices_decay(optim):
    """Not biases and norms; and a frozen weight is not trained at all."""
    module = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 3), torch.nn.LayerNorm(3),
                                 torch.nn.Linear(3, 2).requires_grad_(False))
    optimizer = make_optimizer(Config(optim=optim, weight_decay=0.1, learning_rate=0.5), module, {"zero_optimization": {}})
    names = {parameter: name for name, parameter in module.named_parameters()}
    decay = {names[parameter]: group["weight_decay"] for group in optimizer.param_groups for parameter in group["params"]}
    assert decay == {"0.weight": 0.1, "1.weight": 0.1, "1.bias": 0.0, "2.weight": 0.0, "2.bias": 0.0}
    assert all(group["lr"] == 0.5 for group in optimizer.param_groups)


# ----------------------------------------------------------------------------------------------------------------------
# ZeRO-3

def test_the_engine_gets_parts_of_weights_and_not_the_model(train, engine_configs, monkeypatch):
    """DeepSpeed would move the whole model to every device before it parts it, which a large model does not survive."""
    given, initialize = [], deepspeed.initialize

    def recorded(model, **more):
        given.extend((name, p.numel(), p.ds_tensor.numel()) for name, p in model.named_parameters())
        return initialize(model=model, **more)
    monkeypatch.setattr(deepspeed, "initialize", recorded)
    train("parts", deepspeed=engine_configs[3], max_steps=1)
    assert given and all(whole == 0 and part > 0 for _, whole, part in given)


MEASURED = """
    import threading, time
    import deepspeed, torch, transformers

    def anonymous():  # MB of memory of our own; files that are mapped do not count
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1e3

    load, initialize, seen = transformers.AutoModelForCausalLM.from_pretrained, deepspeed.initialize, []

    def watch():
        while True:
            seen.append(anonymous())
            time.sleep(0.002)

    def loading(*args, **options):
        if not seen:
            seen.append(anonymous())
            threading.Thread(target=watch, daemon=True).start()
        return load(*args, **options)

    def starting(**options):
        print(f"rank {rank} needed {max(seen) - seen[0]:.0f} MB", file=sys.stderr, flush=True)
        return initialize(**options)

    transformers.AutoModelForCausalLM.from_pretrained, deepspeed.initialize = loading, starting
"""


@pytest.mark.slow
def test_a_rank_needs_memory_for_its_part_while_it_loads(tiny, tmp_path, engine_configs):
    """Two ranks, a model of 240 MB in files of 20 MB, whose largest weight has 4 MB. On a CPU, rank 1 also needs the memory
    of one file, because the broadcast writes into its mapping."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    shape = transformers.LlamaConfig(hidden_size=1024, intermediate_size=2048, num_hidden_layers=11, num_attention_heads=8,
                                     vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, eos_token_id=3)
    lm = transformers.LlamaForCausalLM(shape).bfloat16()
    size = sum(p.numel() for p in lm.parameters()) * 2 / 1e6
    lm.save_pretrained(tmp_path / "model", max_shard_size="20MB")
    tokenizer.save_pretrained(tmp_path / "model")
    script = prepared_train(tmp_path / "measured.py", MEASURED)
    argv = ["--config", tmp_path / "run.yaml", f"--model_name_or_path={tmp_path}/model"]
    (tmp_path / "run.yaml").write_text(
        f"dataset_mixer: {{{tiny}/pairs: 1.0}}\noutput_dir: {tmp_path}/out\nbf16: true\nmax_length: 64\n"
        f"max_prompt_length: 16\nmax_steps: 1\nsave_strategy: 'no'\ndo_eval: false\nnum_threads: 1\n"
        f"deepspeed: {engine_configs[3]}\nper_device_train_batch_size: 4\n")
    command = [script if part == "train.py" else part for part in launcher(2)]
    done = subprocess.run([*command, *argv], cwd=ROOT, env=launcher_environment(), text=True, capture_output=True,
                          timeout=600)
    needed = re.findall(r"rank \d needed (\d+) MB", done.stderr)
    assert done.returncode == 0 and len(needed) == 2, done.stderr[-3000:]
    assert all(float(megabytes) < size / 2 + 60 < 0.8 * size for megabytes in needed), (size, needed)
