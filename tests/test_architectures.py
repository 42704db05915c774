"""Models whose architecture does something special are trained right, or refused in one line; never silently wrong.

Each is a tiny random model of its kind, trained by the real command. Some of the pairs are longer than any window here.

    python -m pytest tests/test_architectures.py
"""

import random
import re

import pytest
import torch
import transformers
from helpers import assert_same_run, copy_without, errors
from safetensors.torch import load_file, save_file

from runtime import toy
from runtime.config import Config
from runtime.model import load_policy

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2}
TEXT = {**SMALL, "head_dim": 8, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
          "patch_size": 14}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}

# name: (config class, its keys)
KINDS = {
    "window": ("MistralConfig", {**SMALL, "sliding_window": 16}),
    "window of a text part": ("Gemma3Config", {"text_config": {**TEXT, **IDS}, "vision_config": VISION,
                                               "mm_tokens_per_image": 4}),
    "router jitter": ("MixtralConfig", {**SMALL, "num_local_experts": 4, "router_jitter_noise": 0.3}),
    "router jitter by default": ("PhimoeConfig", {**SMALL, "num_local_experts": 4, "max_position_embeddings": 512}),
    "layerdrop": ("OPTConfig", {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_hidden_layers": 4,
                                "num_attention_heads": 4, "layerdrop": 0.5, "max_position_embeddings": 512}),
    "window that counts rows": ("GPTNeoConfig", {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "window_size": 16,
                                                 "attention_types": [[["global", "local"], 1]],
                                                 "max_position_embeddings": 512}),
    "alibi": ("FalconConfig", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True}),
    "buffers": ("DeepseekV3Config", {**SMALL, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4,
                                     "n_group": 2, "topk_group": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1,
                                     "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
                                     "v_head_dim": 8, "max_position_embeddings": 512}),
    "few positions": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    "positions scaled by the longest row": ("Phi3Config", {
        **SMALL, "num_key_value_heads": 4, "max_position_embeddings": 512, "original_max_position_embeddings": 40,
        "rope_parameters": LONGROPE}),
    "not causal": ("XLNetConfig", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64})}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A quarter of the pairs has responses of about 90 tokens, the others of about 12."""
    folder, rng = tmp_path_factory.mktemp("pairs"), random.Random(0)
    for split, count in (("train", 16), ("test", 6)):
        rows = []
        for n in range(count):
            a, b = (" ".join(toy.write_response(rng).strip(" .") for _ in range(1 if n % 4 else 6)) for _ in "ab")
            rows.append({"prompt": f"review of the {rng.choice(toy.PLACES)} :", "response_a": f" {a}",
                         "response_b": f" {b}", "label": rng.choice("ab")})
        toy.write_jsonl(folder / f"{split}.jsonl", rows)
    return folder


@pytest.fixture
def trained(train, pairs, tmp_path):
    """trained(kind, check, …) → (the run of a tiny model of this kind, the model's folder)."""
    def run(kind, check=0, **more):
        name, keys = KINDS[kind]
        tokenizer = toy.make_tokenizer()
        vocab = {} if "text_config" in keys else {"vocab_size": len(tokenizer)}
        if not vocab:
            keys = {**keys, "text_config": {**keys["text_config"], "vocab_size": len(tokenizer)}}
        config = getattr(transformers, name)(**keys, **vocab, **({} if name == "XLNetConfig" else IDS))
        torch.manual_seed(0)
        auto = transformers.AutoModelForImageTextToText if not vocab else transformers.AutoModelForCausalLM
        lm = auto.from_config(config)
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.data.normal_(0, 0.15)  # larger than usual, so that attention is far from uniform
        for buffer_name, buffer in lm.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):
                buffer.uniform_(-1, 1)
        lm.save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        options = dict(max_length=250, max_prompt_length=32, max_steps=2) | more
        return train(kind.replace(" ", "-"), check=check, model_name_or_path=tmp_path / "model",
                     dataset_mixer=f"{{{pairs}: 1.0}}", **options), tmp_path / "model"
    return run


@pytest.mark.parametrize("kind", ["window", "window of a text part", "router jitter", "router jitter by default",
                                  "layerdrop", "buffers"])
def test_it_shares_prompts_and_starts_at_margin_0(kind, trained):
    run, _ = trained(kind)
    first = run.rows()[0]
    assert first["rewards/margins"] == 0.0 and first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert "two rows" not in run.stdout


@pytest.mark.parametrize("kind, why", [
    ("window that counts rows", "log-probs of pair .* differ from a plain forward"),
    ("alibi", "its forward fails on such rows")])
def test_where_a_prompt_cannot_be_shared_each_response_gets_a_row(kind, why, trained):
    run, _ = trained(kind)
    assert re.search(f"two rows per pair: .* cannot share a prompt, {why}", run.stdout)
    assert run.rows()[0]["rewards/margins"] == 0.0


@pytest.mark.parametrize("kind, message", [
    ("few positions", r"train\.jsonl, row \d+: has \d+ tokens, but GPT2LMHeadModel has positions for 32: lower max_length"),
    ("positions scaled by the longest row", "depend on the longest row of a micro-batch: keep max_length within 40"),
    ("not causal", "XLNetLMHeadModel: a later token changes the log-probs of earlier ones")])
def test_what_cannot_be_right_is_refused(kind, message, trained):
    run, _ = trained(kind, check=2)
    error, = (line for line in run.stderr.splitlines() if line.startswith("error: "))
    assert re.search(message, error)


def test_buffers_are_saved_with_the_weights(trained):
    """Without its routing bias, a DeepSeek-V3 would be saved as another model, and could not be trained further."""
    run, folder = trained("buffers")
    before, after = load_file(folder / "model.safetensors"), run.weights()
    assert before.keys() == after.keys()
    bias, = (name for name in before if name.endswith("e_score_correction_bias"))
    assert torch.equal(before[bias], after[bias])


def routing_bias(file):
    weights = load_file(file)
    bias, = (name for name in weights if name.endswith("e_score_correction_bias"))
    return weights[bias]


def test_buffers_are_saved_with_a_merged_adapter(trained):
    run, folder = trained("buffers", use_peft=True, lora_target_modules="q_a_proj,o_proj", merge_adapter=True)
    assert torch.equal(routing_bias(folder / "model.safetensors"), routing_bias(run.output / "model.safetensors"))


@pytest.mark.slow
def test_buffers_are_saved_by_a_run_that_resumes_on_other_ranks(trained, engine_configs, tmp_path):
    saving = dict(save_strategy="steps", save_steps=1, gradient_accumulation_steps=1)
    first, _ = trained("buffers", processes=2, deepspeed=engine_configs[2], per_device_train_batch_size=4, **saving)
    stopped = copy_without(first, tmp_path / "stopped", "checkpoint-2", "summary.json", "model.safetensors")
    again, folder = trained("buffers", deepspeed=engine_configs[3], per_device_train_batch_size=8, **saving,
                            output_dir=stopped)
    assert "at step 1 of 2" in again.stdout and again.losses() == pytest.approx(first.losses(), rel=1e-5)
    assert torch.equal(routing_bias(folder / "model.safetensors"), routing_bias(stopped / "model.safetensors"))


def test_noise_goes_and_the_model_stays(trained):
    """PhiMoE's router reads its jitter rate as a threshold too: without the rate it would be another model."""
    _, folder = trained("router jitter by default")
    config = Config(model_name_or_path=str(folder), dataset_mixer={"d": 1.0}, output_dir="o")
    lm, policy = transformers.AutoModelForCausalLM.from_pretrained(folder).eval(), load_policy(config)
    tokens = torch.arange(4, 40)[None]  # (1, T)
    expected = lm(input_ids=tokens).logits
    for mode in (False, True):
        torch.testing.assert_close(policy.train(mode).lm(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_was_not_saved_right_is_reported_and_its_checkpoint_kept(train, monkeypatch):
    """The saved folder is loaded again at the end of a run, and has to give the log-probs of the policy."""
    from runtime import run as module
    saved_right = module.save_model

    def save_wrong(engine, tokenizer, output, config):
        names = saved_right(engine, tokenizer, output, config)
        weights = load_file(output / "model.safetensors")
        weights["model.norm.weight"] *= 1.5
        save_file(weights, output / "model.safetensors", metadata={"format": "pt"})
        return names
    monkeypatch.setattr(module, "save_model", save_wrong)
    run = train("saved-wrong")
    assert re.search(r"WARNING: the model in .* is not what was trained: its log-probs differ .* by [\d.]+ nats a token. "
                     r"checkpoint-4 holds the trained weights", run.stdout)
    assert (run.output / "checkpoint-4" / "trainer_state.json").is_file()


@pytest.mark.parametrize("change, match", [
    (lambda content: content[:99], r"it cannot be used \(UsageError: tokenizer "),
    (lambda content: content.replace('"review"', '"revue"'), "it makes other tokens of the text of a pair"),
], ids=["damaged", "other tokens"])
def test_a_tokenizer_that_was_not_saved_right_is_reported(change, match, train, tiny, monkeypatch):
    from runtime import run as module
    saved_right = module.save_model

    def save_wrong(engine, tokenizer, output, config):
        names = saved_right(engine, tokenizer, output, config)
        (output / "tokenizer.json").write_text(change((output / "tokenizer.json").read_text()))
        return names
    monkeypatch.setattr(module, "save_model", save_wrong)
    run = train("tokenizer-saved-wrong", max_steps=1)
    assert re.search(rf"WARNING: the tokenizer in \S+ is not that of the run: {match}.* Copy its files from {tiny}/model",
                     run.stdout), run.stdout


def test_a_model_that_cannot_be_saved_is_kept_in_a_checkpoint(train, by_dataset, monkeypatch):
    """Whatever the library or the model's own code raises, the training is not lost."""
    def fails(*_, **__):
        raise RuntimeError("its own code")
    with monkeypatch.context() as patched:
        patched.setattr(transformers.LlamaForCausalLM, "save_pretrained", fails)
        run = train("not-saved", check=2)
    assert errors(run) == [f"error: {run.output}: the model cannot be saved (RuntimeError: its own code). checkpoint-4 "
                           "holds the trained weights, and the same command goes on from there"]
    done = train("saved", output_dir=run.output)
    assert f"resumed from {run.output}/checkpoint-4" in done.stdout
    assert_same_run(done, by_dataset)
