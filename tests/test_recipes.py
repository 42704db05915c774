"""The recipes in configs/ and those of the official repository, end to end on models and data sets in miniature.

    python -m pytest tests/test_recipes.py -n 0 -m ""
"""

import math
import os

import miniature
import pytest
import torch
import transformers
from helpers import OFFICIAL_BETA, OFFICIAL_GEMMA, ROOT, reply, user

from runtime.parse import parse_config, wants_empty_system
from runtime.rendering import Renderer


@pytest.fixture(scope="module")
def zephyr(tiny, tmp_path_factory):
    """Models and data sets of the Zephyr recipes in miniature, both in folders and under their names in the hub's caches."""
    path = tmp_path_factory.mktemp("zephyr")
    miniature.folders(path, tiny / "pairs")
    miniature.hub_cache(path, os.environ["HF_HOME"])
    return path


@pytest.mark.slow
@pytest.mark.parametrize("recipe, ends", [("zephyr-7b-beta", ("<s>", "</s>")), ("zephyr-7b-gemma", ("<bos>", "<eos>"))])
def test_the_zephyr_recipes_run_end_to_end_in_miniature(recipe, ends, train, zephyr):
    """The unchanged recipe with the flags of the official README, under ZeRO-3 with two processes. Model and data are found
    under their names in the hub's caches, without a network."""
    run = train(recipe, processes=2, config=ROOT / "configs" / f"{recipe}.yaml", beta=0.1, data_selection="true", Gamma=1.3,
                num_train_epochs=1)
    check_zephyr(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.output)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ends
    assert tokenizer("a b").input_ids[0] == tokenizer.bos_token_id and "Hi" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False)


@pytest.mark.parametrize("processes, official, model, pairs, keys", [
    pytest.param(2, OFFICIAL_BETA, "alignment-handbook/zephyr-7b-sft-full", "HuggingFaceH4/ultrafeedback_binarized",
                 {"push_to_hub": "false"}, marks=pytest.mark.slow),
    (None, OFFICIAL_GEMMA, "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", "argilla/dpo-mix-7k",
     {"report_to": "none", "chat_template": miniature.GEMMA}),
], ids=["beta", "gemma, with Gemma's own template"])
def test_the_official_recipe_files_run_end_to_end_in_miniature(processes, official, model, pairs, keys, train, zephyr,
                                                               tmp_path):
    """The unchanged files, with the same model and data from folders."""
    (tmp_path / "recipe.yaml").write_text(official)
    run = train("official", processes, config=tmp_path / "recipe.yaml", deepspeed="configs/zero3.json", beta=0.1,
                data_selection="true", Gamma=1.3, num_train_epochs=1, model_name_or_path=zephyr / model,
                dataset_mixer=f"{{{zephyr / pairs}: 1.0}}", **keys)
    check_zephyr(run, processes or 1)
    if "chat_template" in keys:
        assert transformers.AutoTokenizer.from_pretrained(run.output).chat_template == miniature.GEMMA


def check_zephyr(run, processes=2):
    """120 pairs in steps of 8 per process, evaluation on 40, and a model in bf16 like the one that was loaded."""
    assert run.summary()["pairs"] == 120 and run.rows()[-1]["step"] == math.ceil(120 / (8 * processes))
    assert abs(run.losses()[0] - math.log(2)) <= 1e-4 and run.rows()[0]["queries"] == 8 * processes
    assert run.summary()["eval_accuracy"] is not None and run.summary()["queries"] == len(run.ledger())
    assert transformers.AutoModelForCausalLM.from_pretrained(run.output).dtype == torch.bfloat16


@pytest.mark.parametrize("model, template, prompt, response", [
    ("alignment-handbook/zephyr-7b-sft-full", None, "<s> <|system|>\n</s> \n<|user|>\nHi, café 你好</s> \n<|assistant|>\n",
     "Yes. </s>"),
    ("HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", None,
     "<bos><|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi, café 你好<|im_end|>\n<|im_start|>assistant\n",
     "Yes. <|im_end|>"),
    ("HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", miniature.GEMMA,
     "<bos><start_of_turn>user\nHi, café 你好<end_of_turn>\n<start_of_turn>model\n", "Yes.<end_of_turn>"),
], ids=["Zephyr", "ChatML with BOS", "Gemma"])
def test_what_the_zephyr_models_read(model, template, prompt, response, zephyr):
    """One BOS, one end, an empty system message where the recipes rely on it and the template has one, and no byte lost."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt_ids, responses = Renderer(tokenizer, 512, 1024, wants_empty_system(model))(
        [user("Hi, café 你好")], [[reply("Yes. ")], [reply("No")]])
    assert tokenizer.decode(prompt_ids) == prompt and tokenizer.decode(responses[0]) == response
    assert tokenizer.unk_token_id not in prompt_ids and tokenizer.convert_tokens_to_ids("<0xE4>") in prompt_ids


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_recipes_parse_with_the_flags_of_the_official_readme(recipe):
    config = parse_config(["--config", str(ROOT / "configs" / recipe), "--beta=0.1", "--data_selection=true", "--Gamma=1.3",
                           "--num_train_epochs=1", "--output_dir=x"])
    assert (config.beta, config.gamma, config.data_selection, config.num_train_epochs) == (0.1, 1.3, True, 1)
