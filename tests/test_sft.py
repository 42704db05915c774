"""Supervised fine-tuning: `python -m pytest tests/test_sft.py -n 0`.

Loss and gradient are compared with those of transformers with labels, in double precision. The runs are real ones.
"""

import random
import shutil

import pytest
import torch
import transformers
from helpers import ROOT, assert_same_weights, copy_without
from safetensors.torch import load_file

import adpo
import data
from runtime import toy
from runtime.errors import UsageError
from runtime.parse import parse_config

SFT = dict(objective="sft", gamma=1.3)


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """A folder of 24 + 8 rows {prompt, completion} of the toy grammar."""
    folder, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    for split, count in (("train", 24), ("test", 8)):
        toy.write_jsonl(folder / f"{split}.jsonl", [
            {"prompt": f"review of the {rng.choice(toy.PLACES)} :", "completion": toy.write_response(rng)}
            for _ in range(count)])
    return folder


@pytest.fixture(scope="module")
def tuned(train, texts):
    return train("tuned", **SFT, dataset_mixer=f"{{{texts}: 1.0}}")


def plain(model, path, rows):
    """(model in double precision, mean loss over the response tokens of these rows of a file), by transformers with labels,
    row by row. The model holds the gradient of that loss."""
    lm = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    loss, tokens = 0, 0
    for row in [row for n, row in enumerate(toy.read_jsonl(path)) if n in rows]:
        prompt = tokenizer(row["prompt"]).input_ids
        ids = tokenizer(row["prompt"] + row["completion"]).input_ids + [tokenizer.eos_token_id]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt):]])
        n = len(ids) - len(prompt)
        loss, tokens = loss + n * lm(torch.tensor([ids]), labels=labels).loss, tokens + n
    (loss / tokens).backward()
    return lm, (loss / tokens).item()


def gradient(lm):
    return torch.cat([p.grad.double().flatten() for _, p in sorted(lm.named_parameters())])


def test_loss_and_gradient_are_those_of_transformers(tiny, texts):
    """In fp32, compared with double precision, for three rows of different lengths in one batch."""
    lm, loss = plain(tiny / "model", texts / "train.jsonl", {0, 1, 2})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    pairs, _, _ = data.load_pairs({str(texts): 1.0}, ["train"], data.Renderer(tokenizer, 16, 64), "train", examples=True)
    module = adpo.PairLogps(transformers.AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32))
    logps = module(data.collate(pairs, [0, 1, 2], shared=False), per_token="ours")
    (-logps.mean()).backward()
    assert -logps.mean().item() == pytest.approx(loss, rel=1e-6)
    assert (gradient(module.lm) - gradient(lm)).norm() <= 1e-5 * gradient(lm).norm()


def test_a_run_leaves_metrics_a_summary_and_the_model_and_no_ledger(tuned, texts, tiny):
    names = {path.name for path in tuned.output.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "summary.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert "labels.sqlite" not in names
    assert all(row.keys() == {"step", "epoch", "split", "loss", "learning_rate", "grad_norm", "tokens_per_second"}
               for row in tuned.rows()) and tuned.losses()[-1] < tuned.losses()[0]
    _, held_out = plain(tuned.output, texts / "test.jsonl", set(range(8)))
    assert tuned.summary()["eval_loss"] == tuned.rows("eval")[-1]["loss"] == pytest.approx(held_out, rel=1e-5)
    assert tuned.summary()["examples"] == 24 and "24 examples · held-out loss" in tuned.stdout
    assert "supervised fine-tuning" in (tuned.output / "README.md").read_text()


@pytest.mark.parametrize("keys", [
    dict(per_device_train_batch_size=4, gradient_accumulation_steps=2), dict(micro_batch_tokens=40),
    pytest.param(dict(processes=2, per_device_train_batch_size=4, zero=2), marks=pytest.mark.slow),
    pytest.param(dict(processes=2, per_device_train_batch_size=4, zero=3), marks=pytest.mark.slow)])
def test_a_step_is_the_same_however_it_is_cut(keys, train, tuned, texts, engine_configs):
    """24 examples in steps of 8. Their lengths differ, so a mean of means would give another loss."""
    keys = dict(keys)
    engine = {"deepspeed": engine_configs[keys.pop("zero")]} if "zero" in keys else {}
    run = train("cut", **SFT, **keys, **engine, dataset_mixer=f"{{{texts}: 1.0}}")
    assert run.losses() == pytest.approx(tuned.losses(), rel=1e-5)
    assert [row["grad_norm"] for row in run.rows()] == pytest.approx([r["grad_norm"] for r in tuned.rows()], rel=1e-4)
    assert_same_weights(run.weights(), tuned.weights(), 1e-3)


def test_the_first_step_is_the_mean_over_all_its_tokens(train, tiny, texts):
    run = train("all", **SFT, dataset_mixer=f"{{{texts}: 1.0}}", max_steps=1, per_device_train_batch_size=24, do_eval=False)
    lm, loss = plain(tiny / "model", texts / "train.jsonl", set(range(24)))
    assert run.losses()[0] == pytest.approx(loss, rel=1e-6)
    assert run.rows()[0]["grad_norm"] == pytest.approx(gradient(lm).norm().item(), rel=1e-5)


def test_as_many_examples_are_taken_as_the_keys_say(train, texts):
    run = train("few", **SFT, dataset_mixer=f"{{{texts}: 1.0}}", max_steps=1, max_train_samples=10, max_eval_samples=3)
    assert "train: 10 rows read" in run.stdout and "test: 3 rows read" in run.stdout and run.summary()["examples"] == 10


def test_test_examples_that_are_training_examples_are_counted(train, texts, tmp_path):
    for name in ("train", "test"):
        shutil.copy(texts / "train.jsonl", tmp_path / f"{name}.jsonl")
    run = train("overlap", **SFT, dataset_mixer=f"{{{tmp_path}: 1.0}}", max_steps=1, max_eval_samples=3)
    assert "WARNING: 3 of 3 test examples are training examples too" in run.stdout


def test_resume_is_exact(train, texts, tmp_path):
    keys = dict(SFT, dataset_mixer=f"{{{texts}: 1.0}}", save_strategy="steps", save_steps=2, logging_steps=3)
    whole = train("whole", **keys)
    stopped = copy_without(whole, tmp_path / "stopped", "checkpoint-4", "summary.json")
    again = train("again", output_dir=stopped, **keys)
    assert "at step 2 of 4" in again.stdout and again.losses() == whole.losses()
    assert_same_weights(again.weights(), whole.weights(), 0)
    assert "is finished: 24 examples" in train("third", output_dir=stopped, **keys).stdout


def test_an_adapter_by_sft(train, tuned, texts):
    run = train("adapter", **SFT, dataset_mixer=f"{{{texts}: 1.0}}", use_peft=True, lora_target_modules="all-linear")
    assert run.losses()[0] == pytest.approx(tuned.losses()[0], rel=1e-5) and run.losses()[1] != tuned.losses()[1]
    assert load_file(run.output / "adapter_model.safetensors")


def message(role, content):
    return {"role": role, "content": content}


@pytest.mark.parametrize("row, examples", [
    ({"prompt": "a", "completion": " b"}, [("a", " b")]),
    ({"prompt": "a", "completion": [message("assistant", "b")]}, [([message("user", "a")], [message("assistant", "b")])]),
    ({"prompt": [message("user", "a")], "completion": "b"}, [([message("user", "a")], [message("assistant", "b")])]),
    # Every turn of the assistant that answers something; chosen and rejected are ignored.
    ({"messages": [message("assistant", "hi"), message("user", "a"), message("assistant", "b"), message("user", "c"),
                   message("assistant", "d"), message("user", "e")], "chosen": "x", "rejected": "y"},
     [([message("assistant", "hi"), message("user", "a")], [message("assistant", "b")]),
      ([message("assistant", "hi"), message("user", "a"), message("assistant", "b"), message("user", "c")],
       [message("assistant", "d")])]),
])
def test_the_examples_of_a_row(row, examples):
    assert data.parse_example(row, "f, row 1") == examples


@pytest.mark.parametrize("row, error", [
    ({"chosen": "a", "rejected": "b"}, "f, row 1: needs messages, or prompt and completion; it has chosen, rejected"),
    ({"completion": "a"}, "f, row 1, field prompt: expected a string or a list of messages, found nothing"),
    ({"messages": "a"}, "f, row 1, field messages: expected a list of messages, found a string"),
    ({"messages": [message("user", "a")]}, "f, row 1, field messages: has no assistant message that answers"),
    (["a"], "f, row 1: expected an object with fields, found list"),
])
def test_a_row_without_an_example_is_refused(row, error):
    with pytest.raises(data.DataError) as raised:
        data.parse_example(row, "f, row 1")
    assert str(raised.value).startswith(error)


@pytest.mark.parametrize("flag", ["gamma=1", "data_selection=false", "ref_model_name_or_path=m", "oracle=human",
                                  "max_queries=5", "judge_model=m", "loss_type=hinge"])
def test_keys_of_preferences_are_refused(flag):
    recipe = str(ROOT / "configs" / "smollm2-135m.yaml")
    assert parse_config(["--config", recipe, "--objective=sft"]).objective == "sft"  # all have their defaults
    with pytest.raises(UsageError, match=f"{flag.partition('=')[0]} cannot be honoured with objective sft"):
        parse_config(["--config", recipe, "--objective=sft", f"--{flag}"])


def test_pairs_are_not_examples(train):
    run = train("pairs", check=2, **SFT)
    assert "train.jsonl, row 1: needs messages, or prompt and completion; it has prompt, response_a" in run.stderr
