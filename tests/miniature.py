"""The models and data sets of the Zephyr recipes in miniature. Files, config keys, templates, columns and splits are as on
the hub; vocabularies are small, weights random, and the pairs come from the toy grammar.

`folders(path, pairs)` writes them as plain folders. `hub_cache(path, home)` puts those where the hub's libraries look for
earlier downloads, so that a run with HF_HUB_OFFLINE=1 finds each by its name.
"""

import json
import shutil
from pathlib import Path

import datasets
import torch
import transformers
from datasets.arrow_writer import ArrowWriter
from helpers import reply, user
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from runtime import toy

COMMIT = "0123456789abcdef0123456789abcdef01234567"
# The handbook's default; the line break after {{ … }} is part of its output.
ZEPHYR = ("{% for m in messages %}\n{% if m['role'] in ['user', 'system', 'assistant'] %}\n"
          "{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token }}\n{% endif %}\n"
          "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}")
CHATML_WITH_BOS = ("{{ bos_token }}{% for m in messages %}"
                   "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
                   "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
                   "{% elif messages[-1]['role'] == 'assistant' %}{{ eos_token }}{% endif %}")
# Gemma's own, which refuses system messages.
GEMMA = ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
         "{{ bos_token }}{% for m in messages %}"
         "{{ '<start_of_turn>' + ('model' if m['role'] == 'assistant' else m['role']) + '\n' "
         "+ m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
         "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "rms_norm_eps": 1e-06,
         "attention_dropout": 0.0, "initializer_range": 0.02, "rope_theta": 10000.0, "torch_dtype": "bfloat16",
         "transformers_version": "4.38.2", "use_cache": True}
MODELS = {
    "alignment-handbook/zephyr-7b-sft-full": {
        "config": {**SMALL, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
                   "num_key_value_heads": 2, "max_position_embeddings": 32768, "sliding_window": 4096,
                   "tie_word_embeddings": False},
        "special": ["<unk>", "<s>", "</s>"],
        "tokenizer": {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
                      "pad_token": "</s>", "add_bos_token": True, "add_eos_token": False, "legacy": True,
                      "clean_up_tokenization_spaces": False, "model_max_length": 2048, "sp_model_kwargs": {},
                      "spaces_between_special_tokens": False, "truncation_side": "left",
                      "use_default_system_prompt": True, "chat_template": ZEPHYR}},
    "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1": {
        "config": {**SMALL, "architectures": ["GemmaForCausalLM"], "model_type": "gemma", "hidden_act": "gelu",
                   "head_dim": 16, "num_key_value_heads": 4, "max_position_embeddings": 8192, "attention_bias": False},
        "special": ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|im_start|>", "<|im_end|>", "<start_of_turn>",
                    "<end_of_turn>"],
        "tokenizer": {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>",
                      "pad_token": "<pad>", "add_bos_token": True, "add_eos_token": False, "legacy": None,
                      "additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "clean_up_tokenization_spaces": False,
                      "model_max_length": 2048, "sp_model_kwargs": {}, "spaces_between_special_tokens": False,
                      "use_default_system_prompt": False, "chat_template": CHATML_WITH_BOS}},
}
DATA = {"HuggingFaceH4/ultrafeedback_binarized": ("train_prefs", "test_prefs"), "argilla/dpo-mix-7k": ("train", "test")}


def make_tokenizer(special, bos, leading_space):
    """A BPE like those converted from SentencePiece: "▁" for spaces, bytes for what is not in the vocabulary, a BOS first.

    leading_space: Llama's and Mistral's "▁" in front of a text, which Gemma does not have.
    """
    learned = Tokenizer(models.BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.train_from_iterator([f" the {word} review user assistant" for word in toy.OPINIONS],
                                trainers.BpeTrainer(vocab_size=300, show_progress=False))
    learned = json.loads(learned.to_str())["model"]
    vocabulary = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *learned["vocab"]]
    made = Tokenizer(models.BPE({token: n for n, token in enumerate(dict.fromkeys(vocabulary))},
                                [tuple(pair) for pair in learned["merges"]], unk_token="<unk>", fuse_unk=True,
                                byte_fallback=True))
    made.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    prepend = [normalizers.Prepend("▁")] if leading_space else []
    made.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    made.pre_tokenizer = None if leading_space else pre_tokenizers.Split(" ", "merged_with_previous")
    strip = [decoders.Strip(" ", 1, 0)] if leading_space else []
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    made.post_processor = processors.TemplateProcessing(single=f"{bos} $A", pair=f"{bos} $A {bos} $B",
                                                        special_tokens=[(bos, made.token_to_id(bos))])
    return made


def write_model(folder, config, special, tokenizer):
    """Write config.json, weights in several files, tokenizer.json and tokenizer_config.json, as transformers 4 did."""
    made = make_tokenizer(special, tokenizer["bos_token"], tokenizer["tokenizer_class"] == "LlamaTokenizer")
    ids = {f"{name}_token_id": made.token_to_id(tokenizer[f"{name}_token"]) for name in ("bos", "eos", "pad")}
    config = {**config, **ids, "vocab_size": made.get_vocab_size()}
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**config), dtype=torch.bfloat16)
    lm.save_pretrained(folder, max_shard_size="60KB")
    made.save(str(folder / "tokenizer.json"))
    added = {str(made.token_to_id(token)): {"content": token, "lstrip": False, "normalized": False, "rstrip": False,
                                            "single_word": False, "special": True} for token in special}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "added_tokens_decoder": added}))


def write_data(folder, name, pairs):
    """Write the splits of one data set as jsonl, from labelled pairs of the toy grammar. pairs: a folder with
    train.jsonl and test.jsonl."""
    for split in DATA[name]:
        with open(folder / f"{split}.jsonl", "w") as file:
            for n, line in enumerate((pairs / f"{split.removesuffix('_prefs')}.jsonl").read_text().splitlines()):
                row = json.loads(line)
                sides = [row["label"], "b" if row["label"] == "a" else "a"]
                chosen, rejected = (row[f"response_{side}"].strip() for side in sides)
                talk = [user(row["prompt"])]
                if name == "argilla/dpo-mix-7k" and n % 2:  # half of the conversations have an earlier turn
                    talk = [user("Hello, café! 你好"), reply("Hello."), *talk]
                both = {"chosen": [*talk, reply(chosen)], "rejected": [*talk, reply(rejected)]}
                if name == "argilla/dpo-mix-7k":
                    row = {"dataset": "argilla/toy", **both, "chosen_rating": 5.0, "rejected_rating": 3.0}
                else:
                    row = {"prompt": row["prompt"], "prompt_id": f"{n:064x}", **both, "messages": both["chosen"],
                           "score_chosen": 8.0, "score_rejected": 3.0}
                file.write(json.dumps(row) + "\n")


def folders(path, pairs):
    """Write each model and data set to path/ITS NAME."""
    for name, model in MODELS.items():
        (path / name).mkdir(parents=True)
        write_model(path / name, **model)
    for name in DATA:
        (path / name).mkdir(parents=True)
        write_data(path / name, name, pairs)


def hub_cache(path, home):
    """Put the folders that `folders` wrote into the caches under `home` (HF_HOME), as if they had been downloaded."""
    for name in MODELS:
        repository = Path(home) / "hub" / f"models--{name.replace('/', '--')}"
        shutil.copytree(path / name, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    for name, splits in DATA.items():
        owner, short = name.split("/")
        folder = Path(home) / "datasets" / f"{owner}___{short}" / "default" / "0.0.0" / COMMIT
        folder.mkdir(parents=True)
        info = datasets.DatasetInfo(builder_name="parquet", dataset_name=short, config_name="default", version="0.0.0")
        info.splits = datasets.SplitDict(dataset_name=short)
        for split in splits:
            rows = datasets.Dataset.from_json(str(path / name / f"{split}.jsonl"), cache_dir=str(path / "cache"))
            with ArrowWriter(path=str(folder / f"{short}-{split}.arrow"), features=rows.features) as writer:
                writer.write_table(rows.data.table)
                count, size = writer.finalize()
            info.features = rows.features
            info.splits.add(datasets.SplitInfo(split, num_bytes=size, num_examples=count))
        info.write_to_directory(str(folder))
