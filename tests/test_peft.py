"""LoRA: `python -m pytest tests/test_peft.py -n 0`. Real runs of the tiny model; peft itself reads the adapter back."""

import json
import os
import shutil

import peft
import pytest
import torch
import transformers
from helpers import assert_same_weights, copy_without
from safetensors.torch import load_file

from runtime import model
from runtime.config import Config
from tools import generate

LORA = dict(use_peft=True, lora_r=4, lora_alpha=8, lora_target_modules="all-linear", learning_rate="1e-2")


@pytest.fixture(scope="module")
def adapted(train):
    return train("adapted", **LORA)


def logits(lm, tiny):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    with torch.no_grad():
        return lm(**tokenizer("review of the hotel : the staff was rude .", return_tensors="pt")).logits


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_an_adapter_is_saved_that_peft_loads(adapted, tiny):
    names = {path.name for path in adapted.output.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= names
    assert "model.safetensors" not in names
    settings = json.loads((adapted.output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny / "model") and settings["r"] == 4 and settings["lora_alpha"] == 8
    model = peft.PeftModel.from_pretrained(load(tiny / "model"), adapted.output)
    saved = load_file(adapted.output / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model)
    assert saved.keys() == loaded.keys() and all(torch.equal(saved[name], loaded[name]) for name in saved)
    assert (logits(model, tiny) - logits(load(tiny / "model"), tiny)).abs().max() > 0.1
    assert torch.equal(logits(load(adapted.output), tiny), logits(model, tiny))  # transformers finds the base itself


def test_an_adapter_answers_and_writes_pairs(adapted, tiny, tmp_path, capsys):
    """As the model that peft loads; and whose answers they are depends on the weights that it changes too."""
    base, folder = shutil.copytree(tiny / "model", tmp_path / "base"), shutil.copytree(adapted.output, tmp_path / "adapter")
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    (tmp_path / "q.jsonl").write_text('{"prompt": "review of the hotel :"}\n')
    asked = [str(folder), "--max_new_tokens", "8", "--questions", str(tmp_path / "q.jsonl")]
    assert generate.main(asked) == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    ids = tokenizer("review of the hotel :", return_tensors="pt").input_ids
    lm = peft.PeftModel.from_pretrained(load(base), folder)
    new = lm.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0, ids.size(1):]
    found = json.loads((folder / "responses.jsonl").read_text())
    assert found["response"] == tokenizer.decode(new, skip_special_tokens=True).strip()
    assert generate.main([*asked[:3], "--pairs", "--prompts", asked[-1]]) == 0 and "1 pairs in" in capsys.readouterr().out
    os.utime(base / "model.safetensors", ns=(1, 1))
    assert generate.main(asked) == 2 and "another weights" in capsys.readouterr().err


def test_merged_it_is_a_plain_model_that_computes_the_same(train, adapted, tiny):
    merged = train("merged", **LORA, merge_adapter=True)
    assert not list(merged.output.glob("adapter*"))
    plain = load(merged.output)
    assert not hasattr(plain, "peft_config") and plain.num_parameters() == load(tiny / "model").num_parameters()
    assert torch.allclose(logits(plain, tiny), logits(load(adapted.output), tiny), atol=1e-5)


def test_merged_it_stops_where_its_replies_ended(train, adapted, tiny, monkeypatch):
    """As a model that was trained whole does. Here the replies of training ended in token 5 as well."""
    monkeypatch.setattr(model, "name_ends", lambda lm, tokenizer: setattr(lm.generation_config, "eos_token_id", [1, 5]))
    merged = train("merged-ends", **LORA, merge_adapter=True)
    assert load(merged.output).generation_config.eos_token_id == [1, 5]


def test_an_adapter_names_the_revision_of_its_base(tmp_path):
    lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    config = Config(model_name_or_path="org/base", model_revision="v2", dataset_mixer={"d": 1.0}, output_dir="o",
                    lora_target_modules=["all-linear"])
    model.add_adapter(config, lm, "org/base", model.revision_of(config, "org/base"))
    assert lm.peft_config["default"].revision == "v2"
    assert model.revision_of(config, "org/reference") == "main"  # model_revision is the policy's alone
    for name in ("model.safetensors", "modeling_own.py"):
        before = model.folder_fingerprint(tmp_path)
        (tmp_path / name).write_text("x")
        assert model.folder_fingerprint(tmp_path) != before


@pytest.mark.parametrize("stage, processes", [
    (3, None), *(pytest.param(stage, 2, marks=pytest.mark.slow) for stage in range(4))])
def test_zero_stages_and_processes_train_the_same_adapter(stage, processes, train, adapted, engine_configs):
    run = train(f"zero{stage}", processes=processes, deepspeed=engine_configs[stage], **LORA,
                per_device_train_batch_size=8 // (processes or 1))
    assert run.losses() == pytest.approx(adapted.losses(), rel=1e-5) and run.losses()[0] == pytest.approx(0.693147, rel=1e-5)
    name = "adapter_model.safetensors"
    assert_same_weights(load_file(run.output / name), load_file(adapted.output / name), 1e-3)


@pytest.mark.parametrize("stage", [0, 3])
def test_resume_is_exact_and_a_checkpoint_holds_the_adapter_alone(stage, train, tmp_path, engine_configs):
    keys = dict(LORA, save_strategy="steps", save_steps=2, deepspeed=engine_configs[stage])
    whole = train("whole", **keys)
    size = sum(path.stat().st_size for path in (whole.output / "checkpoint-2").rglob("*"))
    assert size < 16 * 25_000 < 4 * 200_000  # the adapter's weights, masters and moments; the model has over 200,000
    stopped = copy_without(whole, tmp_path / "stopped", "checkpoint-4", "summary.json", "adapter_model.safetensors")
    again = train("again", output_dir=stopped, **keys)
    assert "step 2 of 4" in again.stdout and again.losses() == whole.losses()
    name = "adapter_model.safetensors"
    assert_same_weights(load_file(stopped / name), load_file(whole.output / name), 0)


def test_an_adapter_is_a_model_merged_or_trained_further(train, adapted, tiny):
    """With learning rate 0 the run saves what it loaded. A margin of 0 shows that the reference is the adapted model."""
    still = dict(model_name_or_path=adapted.output, warmup_ratio=1.0, max_steps=1)
    full = train("full", **still)
    assert full.losses()[0] == pytest.approx(0.693147, rel=1e-5) and full.rows()[0]["rewards/margins"] == 0
    assert "adapter" not in full.summary()
    base, merged = load_file(tiny / "model" / "model.safetensors"), full.weights()
    expected = peft.PeftModel.from_pretrained(load(tiny / "model"), adapted.output).merge_and_unload().state_dict()
    assert_same_weights(merged, {name: expected[name] for name in merged}, 0)
    assert any(not torch.equal(merged[name], base[name]) for name in merged)

    further = train("further", **{**LORA, **still, "lora_r": 2})
    assert further.rows()[0]["rewards/margins"] == 0 and "trained further as it is (rank 4, alpha 8)" in further.stdout
    name = "adapter_model.safetensors"
    assert_same_weights(load_file(further.output / name), load_file(adapted.output / name), 0)
    settings = json.loads((further.output / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(tiny / "model")


def test_an_adapter_as_the_reference(train, adapted, tiny):
    keys = dict(LORA, max_steps=1, data_selection=False)
    run = train("reference", **keys, ref_model_name_or_path=adapted.output)
    assert run.rows()[0]["rewards/margins"] != 0
    swapped = train("swapped", **keys, model_name_or_path=adapted.output, ref_model_name_or_path=tiny / "model")
    assert swapped.rows()[0]["rewards/margins"] == pytest.approx(-run.rows()[0]["rewards/margins"], rel=1e-4)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(reentrant, train, adapted):
    run = train("checkpointing", **LORA, gradient_checkpointing=True,
                gradient_checkpointing_kwargs=f"{{use_reentrant: {str(reentrant).lower()}}}")
    assert run.losses() == pytest.approx(adapted.losses(), rel=1e-5)


def test_modules_that_are_trained_whole_are_saved_with_the_adapter(train, tiny):
    run = train("saved", use_peft=True, lora_target_modules="q_proj,v_proj", lora_modules_to_save="norm", bf16=True)
    saved = load_file(run.output / "adapter_model.safetensors")
    assert {name.split(".")[-3] for name in saved if "lora" in name} == {"q_proj", "v_proj"}
    assert "base_model.model.model.norm.weight" in saved
    peft.PeftModel.from_pretrained(load(tiny / "model"), run.output)


def test_the_summary_and_the_card_say_what_it_is(adapted):
    assert adapted.summary()["adapter"] == "LoRA of rank 4, alpha 8"
    card = (adapted.output / "README.md").read_text()
    assert "library_name: peft" in card and "| adapter | LoRA of rank 4, alpha 8, on " in card


@pytest.mark.parametrize("keys, message", [
    (dict(lora_target_modules="nowhere"), "lora_target_modules ['nowhere']: "),
    (dict(lora_dropout=0.05), "lora_dropout=0.05 cannot be honoured"),
    (dict(load_in_4bit=True), "load_in_4bit needs a GPU and the package bitsandbytes"),
])
def test_what_an_adapter_cannot_be(keys, message, train):
    run = train("refused", check=2, **{**LORA, **keys})
    assert message in run.stderr and "Traceback" not in run.stderr
