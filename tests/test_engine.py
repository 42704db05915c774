"""Steps whose loss or gradient is not finite: `python -m pytest tests/test_engine.py -n 0`."""

import itertools
import math
import re

import pytest
from helpers import errors
from safetensors.torch import load_file

import adpo


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
