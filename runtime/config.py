"""The config: one flat typed dataclass, a help text a key, read from a YAML and the command line.

    parse_config(["--config", "configs/quickstart.yaml", "--gamma=0.7"])  → Config, or UsageError in one line

The names are those of Hugging Face, TRL and the alignment handbook, so that their recipes run unchanged. Departures from the
official code: `--Gamma` means `--gamma`; an unknown key, a wrong type or a value out of range is an error that names its
place and the nearest known key; booleans take true/false/yes/no/1/0 in any case; what cannot be honoured is refused with
its reason. `python train.py --help` lists every key.
"""

import dataclasses
import datetime
import difflib
import importlib.util
import math
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

import adpo

HERE = Path(__file__).resolve().parent


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what, where and what to do. Exit code 2."""


def key(default, help, choices=None, low=None, high=None):
    factory = {"default_factory": lambda: default} if isinstance(default, (list, dict)) else {"default": default}
    return field(metadata={"help": help, "choices": choices, "low": low, "high": high}, **factory)


@dataclass
class Config:
    # Model
    model_name_or_path: str = key(None, "policy: hub id or folder; `toy` is the built-in task's model")
    model_revision: str = key("main", "branch, tag or commit of the hub model")
    tokenizer_name_or_path: str | None = key(None, "tokenizer, where it is not the model's own")
    ref_model_name_or_path: str | None = key(None, "reference policy; null: the policy before its first step")
    torch_dtype: str | None = key(None, "dtype that the weights are loaded in; bf16 decides what is trained in",
                                  choices=(None, "auto", "bfloat16", "float32"))
    attn_implementation: str | None = key(None, "attention of transformers: eager, sdpa, flash_attention_2, …")
    trust_remote_code: bool = key(False, "run code that comes with the model")
    # Adapter (peft)
    use_peft: bool = key(False, "train a LoRA adapter in place of all weights")
    lora_r: int = key(16, "rank of the adapter", low=1)
    lora_alpha: int = key(32, "the adapter's output is multiplied by lora_alpha / lora_r", low=1)
    lora_dropout: float = key(0.0, "0; anything else is refused", low=0, high=1)
    lora_target_modules: list[str] | None = key(None, "layers that get one, or all-linear; null: as peft has "
                                                      "it for this kind of model")
    lora_modules_to_save: list[str] | None = key(None, "layers that are trained whole and saved with the adapter")
    merge_adapter: bool = key(False, "save a plain model, the adapter merged into its weights")
    load_in_4bit: bool = key(False, "hold the frozen weights in 4 bits (bitsandbytes, on a GPU)")
    bnb_4bit_quant_type: str = key("nf4", "how 4 bits are read", choices=("nf4", "fp4"))
    use_bnb_nested_quant: bool = key(False, "quantise the constants of the quantisation too")
    # Data
    dataset_mixer: dict[str, float] = key(None, "source: share of its training pairs; a hub id, a folder or a file")
    dataset_splits: list[str] = key(["train", "test"], "splits to use; names with `train` are for training")
    dataset_configs: list[str] | None = key(None, "config name of each source of dataset_mixer, in order")
    preprocessing_num_workers: int | None = key(None, "processes that tokenise; null: all cores", low=1)
    chat_template: str | None = key(None, "template in place of the tokenizer's own: text, or a .jinja file")
    auto_insert_empty_system_msg: bool = key(True, "put an empty system message where the template knows system messages")
    max_length: int = key(1024, "tokens of prompt and one response; responses are cut from the right", low=2)
    max_prompt_length: int = key(512, "tokens of the prompt; it is cut from the left", low=1)
    max_train_samples: int | None = key(None, "train on a random share of at most so many pairs", low=1)
    max_eval_samples: int | None = key(None, "evaluate on a random share of at most so many pairs", low=1)
    decontaminate_with: str | None = key(None, "drop pairs that contain text of this benchmark (openai_humaneval, a data "
                                               "set, or a text file)")
    objective: str = key("adpo", "adpo (DPO too, by data_selection) or sft: the mean negative log-likelihood of response "
                                 "tokens, of rows {messages} or {prompt, completion}", choices=("adpo", "sft"))
    # ADPO
    beta: float = key(0.1, "β: strength of the pull towards the reference", low=1e-6)
    gamma: float = key(1.3, "γ: a pair with |margin| ≤ γ is asked; in units of reward, so it goes with beta", low=0)
    data_selection: bool = key(True, "the gate; false asks for every pair, which is plain DPO")
    gate: str = key("paper", "paper: ask where |margin| ≤ γ; calibrated: where a·|margin| ≤ γ, a fitted to the labels "
                             "bought", choices=("paper", "calibrated"))
    target_query_fraction: float | None = key(None, "share of the pairs to ask, in place of gamma: the least sure of each "
                                                    "step", low=1e-6, high=1)
    target_queries: int | None = key(None, "the same as a number of labels, spread over the whole run", low=1)
    pseudo_labels: str = key("true", "a pair that is not asked is trained on sign(margin) (true) or on the chance that y1 "
                                     "is preferred (soft), has no loss (false), or gives its place to a pair whose label is "
                                     "known (replay)", choices=("true", "soft", "false", "replay"))
    loss_type: str = key("sigmoid", "sigmoid (DPO), ipo or hinge")
    label_smoothing: float = key(0.0, "ε of the sigmoid loss", low=0, high=0.5)
    # Who answers
    oracle: str = key("dataset", "dataset (the labels that the data came with), human (tools/label.py) or judge",
                      choices=("dataset", "human", "judge"))
    oracle_wait_minutes: float = key(60.0, "without an answer for so long, a run stops, resumable", low=0)
    max_queries: int | None = key(None, "labels that may be bought in all; null: no limit", low=0)
    after_budget: str = key("none", "when they are bought, an unsure pair gets no label (none) or its pseudo_label",
                            choices=("none", "pseudo_label"))
    price_per_label: float | None = key(None, "turns counts into money", low=0)
    audit_fraction: float = key(0.0, "share of the confident pairs that is asked as well, to know the pseudo-labels' error; "
                                     "0.05 is a good one", low=0, high=1)
    judge: str = key("chat", "chat (an OpenAI-compatible endpoint) or reward_model (a sequence classifier)",
                     choices=("chat", "reward_model"))
    judge_url: str | None = key(None, "base URL of the endpoint, such as http://127.0.0.1:8000/v1")
    judge_model: str | None = key(None, "name of the judge at its endpoint, or the reward model's hub id or folder")
    judge_api_key_env: str = key("OPENAI_API_KEY", "environment variable that holds the endpoint's key, if it wants one")
    judge_concurrency: int = key(8, "requests at a time", low=1)
    judge_timeout: float = key(60.0, "seconds a request may take", low=0.1, high=86400)
    judge_prompt_price: float | None = key(None, "money for a million prompt tokens of the judge", low=0)
    judge_completion_price: float | None = key(None, "money for a million completion tokens of the judge", low=0)
    # Optimisation
    per_device_train_batch_size: int = key(8, "pairs a micro-batch", low=1)
    per_device_eval_batch_size: int = key(8, "pairs a batch of evaluation", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches an optimiser step", low=1)
    micro_batch_tokens: int | None = key(None, "a micro-batch of more tokens, padding included, is cut further; the step "
                                               "stays what it is; null: 1,024 on a CPU, 16,384 on a GPU", low=1)
    group_by_length: bool = key(True, "pairs of like length meet in a step (in windows of 2,048 pairs), so that little is "
                                      "padding; false: steps are a random draw")
    learning_rate: float = key(5e-7, "peak learning rate", low=0)
    weight_decay: float = key(0.0, "AdamW's, on matrices alone", low=0)
    max_grad_norm: float = key(1.0, "clip the gradient's norm; 0: do not", low=0)
    optim: str = key("adamw_torch", "optimiser", choices=("adamw_torch", "rmsprop"))
    lr_scheduler_type: str = key("cosine", "schedule after the warm-up",
                                 choices=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup_ratio: float = key(0.1, "share of the steps that warm up", low=0, high=1)
    num_train_epochs: float = key(1.0, "passes over the pairs", low=0, high=1e6)
    max_steps: int = key(-1, "optimiser steps, in place of num_train_epochs; -1: not", low=-1)
    bf16: bool = key(False, "compute in bfloat16, with fp32 weights in the optimiser")
    gradient_checkpointing: bool = key(False, "recompute activations in backward: half the memory, a fifth slower")
    gradient_checkpointing_kwargs: dict[str, bool] = key({"use_reentrant": False}, "passed to torch.utils.checkpoint")
    logits_chunk_size: int = key(2048, "response tokens whose logits are alive at a time", low=1)
    deepspeed: str = key(str(HERE / "ds_config.json"), "engine config; what this file owns is \"auto\" there")
    num_threads: int | None = key(None, "CPU threads a process; small models are several times faster with 1", low=1,
                                  high=1024)
    seed: int = key(42, "order of the pairs, random shares", low=0, high=2**32 - 1)
    # Output
    output_dir: str = key(None, "where all of it goes")
    logging_steps: int = key(10, "steps between two rows of metrics.jsonl", low=1)
    logging_first_step: bool = key(True, "log the first step too")
    log_level: str = key("warning", "of transformers, datasets and DeepSpeed",
                         choices=("debug", "info", "warning", "error", "critical"))
    do_eval: bool = key(True, "evaluate at all")
    eval_strategy: str = key("no", "when to evaluate, besides at the end", choices=("no", "steps", "epoch"))
    eval_steps: int = key(100, "with eval_strategy steps", low=1)
    eval_on_start: bool = key(False, "evaluate before the first step too")
    save_strategy: str = key("steps", "when to write a checkpoint", choices=("no", "steps", "epoch"))
    save_steps: int = key(500, "with save_strategy steps", low=1)
    save_total_limit: int | None = key(None, "keep so many checkpoints, the latest", low=1)
    resume_from_checkpoint: str | None = key(None, "a checkpoint folder, or false; null: the latest in output_dir, if any")
    report_to: list[str] = key(["none"], "tensorboard, wandb, csv_monitor (DeepSpeed's monitor) or none")
    push_to_hub: bool = key(False, "upload the trained model at the end")
    hub_model_id: str | None = key(None, "name of the uploaded model; null: the name of output_dir")
    hub_model_revision: str = key("main", "branch to upload to")
    # The built-in task (toy.py)
    toy_dir: str = key("outputs/toy", "where the built-in task is kept, for `toy` as a model or data set")
    toy_label_noise: float = key(0.05, "share of its labels that are wrong", low=0, high=0.5)


BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}  # in any case

EVALUATION_SPLITS = ("test", "eval", "valid", "dev")  # a split to evaluate on has one of these in its name

ALIASES = {"Gamma": "gamma", "evaluation_strategy": "eval_strategy", "dtype": "torch_dtype",
           "dataset_num_proc": "preprocessing_num_workers", "max_seq_length": "max_length"}

# Keys of the recipes that this project does not do. Their "off" value is accepted.
REFUSED = {
    "use_dora": "the adapter is plain LoRA",
    "use_rslora": "the adapter is plain LoRA",
    "load_in_8bit": "weights are loaded whole, or in 4 bits",
    "fp16": "float16 needs loss scaling, which skips steps; use bf16",
    "packing": "a row holds one pair",
    "sync_ref_model": "the reference is fixed, which is what makes its log-probs cacheable",
    "reference_free": "without a reference there is no implicit reward to gate by",
    "precompute_ref_log_probs": None,  # always on: accepted when true
}
# Keys of the recipes of which one value alone can be honoured.
FIXED = {"lora_task_type": "CAUSAL_LM", "bnb_4bit_quant_storage": "uint8"}

# What may differ between a checkpoint and the run that resumes it: none of it changes what is computed. How a step is cut
# shows in its last bits alone, as long as it has the same pairs (check_same_start in train.py).
FREE_ON_RESUME = {"logging_steps", "logging_first_step", "log_level", "eval_strategy", "eval_steps", "eval_on_start",
                  "do_eval", "max_eval_samples", "per_device_eval_batch_size", "save_strategy", "save_steps",
                  "save_total_limit", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id",
                  "hub_model_revision", "preprocessing_num_workers", "num_threads", "output_dir", "toy_dir",
                  "oracle_wait_minutes", "price_per_label", "judge_url", "judge_api_key_env", "judge_concurrency",
                  "judge_timeout", "judge_prompt_price", "judge_completion_price", "per_device_train_batch_size",
                  "gradient_accumulation_steps", "micro_batch_tokens", "gradient_checkpointing", "deepspeed",
                  "max_queries"}  # a budget may be raised: what was computed under the old one still holds


def parse_config(argv):
    """Config from a command line: the YAML of --config, then the flags, which win. Raises UsageError."""
    flags = parse_flags(argv)
    values = {}
    path = flags.pop("config", None)
    if path is None:
        raise UsageError("no config: say --config FILE.yaml (ready ones are in configs/)")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # not there, not UTF-8, no name of a file
        raise UsageError(f"--config {shown(path)}: cannot be read ({getattr(error, 'strerror', None) or error})")
    path = shown(path, 300)
    loaded = load_yaml(text, path)
    if not isinstance(loaded or {}, dict):
        raise UsageError(f"{path}: expected keys with values, found {type(loaded).__name__}")
    for place, source in ((path, loaded or {}), ("command line", flags)):
        given = {}
        for name, value in source.items():
            known = resolve_key(str(name), value, place)
            if known:
                if known in given:
                    raise UsageError(f"{place}: {shown(name)} and {given[known]} are the same key; keep one")
                given[known] = name
                values[known] = convert(value, known, f"{place}, {name}")
    config = Config(**values)
    check_config(config, path)
    return config


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds nothing but text, numbers, lists and mappings. A key that stands there twice is an
    error (PyYAML takes the last), and so is an alias of a collection, with which a few lines can be billions of values."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and isinstance(self.anchors.get(event.anchor), yaml.CollectionNode):
            raise yaml.composer.ComposerError(None, None, f"*{event.anchor} repeats a list or mapping; write it out",
                                              event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        lines = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = str(key.value)
            if name in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{shown(name)} stands there already, in line {lines[name]}; keep one", key.start_mark)
            lines[name] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load_yaml(text, place):
    """What a YAML text holds. Raises UsageError that names the line."""
    try:
        return yaml.load(text, Loader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)  # the others: 2024-99-99, !!bool maybe, !!timestamp x, 1,000 brackets
        raise UsageError(f"{place}{f', line {mark.line + 1}' if mark else ''}: not YAML "
                         f"({shown(getattr(error, 'problem', None) or error, 200)})")


def shown(value, limit=80):
    """A value inside a message: one line, cut."""
    text = value if isinstance(value, str) else str(value)
    text = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:limit + 1])
    return text if len(text) <= limit else text[:limit] + "…"


def parse_flags(argv):
    """{"key": text} of `--key value`, `--key=value` and `--key` (true). Of a flag given twice the last counts."""
    flags, rest = {}, list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise UsageError(f"{flag!r:.80}: expected --key value or --key=value")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        flags[name] = value
    flags.pop("local_rank", None)  # the launcher's; the environment says the same
    return flags


def resolve_key(name, value, place):
    """The Config field that a key means, or None for one that is accepted and has nothing to do. Raises UsageError."""
    known = {f.name for f in dataclasses.fields(Config)}
    name = ALIASES.get(name, name)
    if name in known:
        return name
    if name in FIXED:
        if str(value) == FIXED[name]:
            return None
        raise UsageError(f"{place}: {name}={shown(value)} cannot be honoured: it is {FIXED[name]}")
    if name in REFUSED:
        off = str(value).lower() in ("false", "no", "0", "none", "null", "")
        if off == (name != "precompute_ref_log_probs"):
            return None
        raise UsageError(f"{place}: {name}={shown(value)} cannot be honoured: "
                         f"{REFUSED[name] or 'the log-probs of the reference are always computed once'}")
    near = difflib.get_close_matches(name.lower(), [*known, *ALIASES], n=1, cutoff=0)
    raise UsageError(f"{place}: unknown key {name!r:.80}; the nearest known key is {near[0]!r}" if near else
                     f"{place}: unknown key {name!r:.80}")


def convert(value, name, place):
    """A value from YAML or the command line as the field's type, checked for choices and range. Raises UsageError."""
    spec = Config.__dataclass_fields__[name]
    hint = spec.type
    optional = isinstance(hint, types.UnionType) or spec.default is None
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    text = optional or hint is not str  # else "none" is a text like any other
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none") and text and name != "report_to"):
        if optional:
            return None
        raise UsageError(f"{place}: expected {describe(hint)}, found nothing")
    wrong = UsageError(f"{place}: expected {describe(hint)}, found {shown(repr(value))}")
    if hint is bool:
        if str(value).lower() not in BOOLEANS:
            raise wrong
        return BOOLEANS[str(value).lower()]
    if hint in (int, float):
        value = convert_number(value, hint, wrong)
    elif hint is str:
        choices = spec.metadata["choices"] or ()
        if "true" in choices and str(value).lower() in BOOLEANS:  # pseudo_labels: the words of a boolean among others
            value = str(BOOLEANS[str(value).lower()]).lower()
        elif isinstance(value, bool):  # resume_from_checkpoint: false; and YAML reads save_strategy: no as false
            value = "no" if not value and "no" in choices else str(value).lower()
        if isinstance(value, (int, float, datetime.date)):  # YAML reads 0123 as 83: what stood there is not known
            raise UsageError(f"{wrong}; put it in quotes")
        if not is_text(value):
            raise wrong
    else:
        value = convert_collection(value, hint, wrong, place)
    meta = spec.metadata
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), [c for c in meta["choices"] if c], n=1)
        raise UsageError(f"{place}: expected one of {', '.join(str(c) for c in meta['choices'])}, found {shown(repr(value))}"
                         + (f"; did you mean {near[0]!r}?" if near else ""))
    if meta["low"] is not None and value < meta["low"]:
        raise UsageError(f"{place}: expected {describe(hint)} of at least {meta['low']}, found {value}")
    high = meta["high"] if meta["high"] is not None else {int: 2**31 - 1, float: 1e12}.get(hint)
    if high is not None and value > high:
        raise UsageError(f"{place}: expected {describe(hint)} of at most {high}, found {value}")
    return value


def is_text(value):
    """Whether a value is text that can be a name or a path: not blank, and something that a file can hold."""
    return isinstance(value, str) and value.strip() != "" and not re.search("[\0\ud800-\udfff]", value)


def convert_number(value, hint, wrong):
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise wrong
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise wrong
    if not math.isfinite(number) or hint is int and number != int(number):
        raise wrong
    return hint(number)


def convert_collection(value, hint, wrong, place):
    """list[str] from a list or "a,b"; dict[str, X] from a mapping or "{a: 1}"."""
    if isinstance(value, str) and (value.startswith(("[", "{")) or typing.get_origin(hint) is dict):
        value = load_yaml(value, place)
    if typing.get_origin(hint) is list:
        value = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(map(is_text, value)):
            raise wrong
        return value
    item = typing.get_args(hint)[1]
    if not isinstance(value, dict) or not value or not all(map(is_text, value)):
        raise wrong
    if item is bool:
        if not all(isinstance(v, bool) for v in value.values()):
            raise wrong
        return value
    return {k: convert_number(v, item, wrong) for k, v in value.items()}


def describe(hint):
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}.get(hint) or (
        "a list of names" if typing.get_origin(hint) is list else "a mapping of names to numbers"
        if typing.get_args(hint)[1] is float else "a mapping of names to true or false")


def check_config(config, path):
    """What no single key can be checked for. Raises UsageError."""
    for name in ("model_name_or_path", "dataset_mixer", "output_dir"):
        if getattr(config, name) is None:
            raise UsageError(f"{path}: {name} is missing")
    if config.max_prompt_length >= config.max_length:
        raise UsageError(f"{path}: max_prompt_length {config.max_prompt_length} leaves no room for a response in "
                         f"max_length {config.max_length}")
    for source, share in config.dataset_mixer.items():
        if not 0 < share <= 1:
            raise UsageError(f"{path}, dataset_mixer: the share of {shown(source)} must be over 0 and at most 1, found "
                             f"{share}")
    if config.dataset_configs and len(config.dataset_configs) != len(config.dataset_mixer):
        raise UsageError(f"{path}: dataset_configs needs one name for each of the {len(config.dataset_mixer)} sources")
    for split in config.dataset_splits:
        if not any(word in split for word in ("train", *EVALUATION_SPLITS)):
            raise UsageError(f"{path}, dataset_splits: {shown(repr(split))} must contain one of train, "
                             f"{', '.join(EVALUATION_SPLITS)}")
    if len(set(config.dataset_splits)) < len(config.dataset_splits):
        raise UsageError(f"{path}, dataset_splits: a name stands there twice, and its pairs would count twice")
    if not any("train" in split for split in config.dataset_splits):
        raise UsageError(f"{path}, dataset_splits: no name contains `train`")
    if refusal := adpo.why_not_gated(shown(config.loss_type)):
        raise UsageError(f"{path}: {refusal}")
    if config.gate == "calibrated" and not config.audit_fraction:
        raise UsageError(f"{path}: gate calibrated needs an audit_fraction (0.05 is a good one): only audited pairs tell "
                         "whether the confident ones are right")
    if config.target_query_fraction is not None and config.target_queries is not None:
        raise UsageError(f"{path}: target_query_fraction and target_queries are two ways to say the same; keep one")
    if config.pseudo_labels == "soft" and config.loss_type != "sigmoid":
        raise UsageError(f"{path}: pseudo_labels soft is defined for loss_type sigmoid, not {config.loss_type}")
    if config.label_smoothing and config.loss_type != "sigmoid":
        raise UsageError(f"{path}: label_smoothing is defined for loss_type sigmoid, not {config.loss_type}")
    check_adapter(config, path)
    check_sft(config, path)
    if config.torch_dtype == "bfloat16" and not config.bf16:
        raise UsageError(f"{path}: torch_dtype bfloat16 needs bf16: true, which trains with fp32 weights in the optimiser")
    if config.max_steps == 0 or config.num_train_epochs == 0:
        raise UsageError(f"{path}: nothing to do in 0 {'steps' if config.max_steps == 0 else 'epochs'}")
    for name in config.gradient_checkpointing_kwargs:
        if name not in ("use_reentrant", "preserve_rng_state"):
            raise UsageError(f"{path}, gradient_checkpointing_kwargs: expected use_reentrant or preserve_rng_state, found "
                             f"{shown(repr(name))}")
    if config.oracle == "judge":
        needed = ("judge_url", "judge_model") if config.judge == "chat" else ("judge_model",)
        for name in needed:
            if getattr(config, name) is None:
                raise UsageError(f"{path}: oracle judge ({config.judge}) needs {name}")
    if (config.judge_prompt_price is None) != (config.judge_completion_price is None):
        raise UsageError(f"{path}: judge_prompt_price and judge_completion_price go together")
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "none": None}
    for service in config.report_to:
        if service not in packages:
            raise UsageError(f"{path}, report_to: expected some of {', '.join(packages)}, found {shown(repr(service))}")
        if packages[service] and importlib.util.find_spec(packages[service]) is None:
            raise UsageError(f"{path}, report_to: {service} is not installed: pip install {service}, or --report_to=none")
    if config.push_to_hub:
        from huggingface_hub import constants, get_token
        if get_token() is None:
            raise UsageError(f"{path}: push_to_hub needs a login: run `hf auth login`, or say --push_to_hub=false")
        if constants.HF_HUB_OFFLINE:
            raise UsageError(f"{path}: push_to_hub, but HF_HUB_OFFLINE is set: unset it, or say --push_to_hub=false")
        if not is_repo_id(hub_name(config)):
            raise UsageError(f"{path}: push_to_hub: {shown(hub_name(config))} is no name of a model on the hub: say "
                             "--hub_model_id=USER/NAME, of letters, digits, -, _ and .")


def hub_name(config):
    """The name of the model on the hub; without a user's, it is the one who is logged in."""
    return config.hub_model_id or Path(config.output_dir).resolve().name


def is_repo_id(name):
    """Whether the hub allows a model or a data set of this name."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_sft(config, path):
    """SFT has no preference: what speaks of one may stand at its default alone. Raises UsageError."""
    if config.objective != "sft":
        return
    fields = list(dataclasses.fields(Config))
    names = [f.name for f in fields]
    preference = fields[names.index("beta"):names.index("per_device_train_batch_size")]  # ADPO, and who answers
    for f in [*preference, fields[names.index("ref_model_name_or_path")]]:
        if getattr(config, f.name) != f.default:
            raise UsageError(f"{path}: {f.name} cannot be honoured with objective sft: it has no reference, margin or "
                             "label to ask for; leave it out")


def check_adapter(config, path):
    """What an adapter and 4 bits need. Raises UsageError."""
    for name in ("merge_adapter", "load_in_4bit"):
        if getattr(config, name) and not config.use_peft:
            raise UsageError(f"{path}: {name} goes with use_peft: true, which trains an adapter")
    if not config.use_peft:
        return
    if config.lora_dropout:
        raise UsageError(f"{path}: lora_dropout={config.lora_dropout} cannot be honoured: the gate reads the margin that is "
                         "trained on, and dropout would make it noise; say lora_dropout: 0")
    if config.load_in_4bit and (importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available()):
        raise UsageError(f"{path}: load_in_4bit needs a GPU and the package bitsandbytes (pip install bitsandbytes); "
                         "without them say load_in_4bit: false")
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"{path}: use_peft needs the package peft: pip install -r requirements-extra.txt")


def help_text():
    """Every key with its default and what it means."""
    lines = ["Train a language model with Active DPO.", "",
             "deepspeed train.py --config FILE.yaml [--key value | --key=value] …", ""]
    for f in dataclasses.fields(Config):
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        default = "ds_config.json" if f.name == "deepspeed" else default
        lines.append(f"  --{f.name} ({default})\n      {f.metadata['help']}")
    return "\n".join(lines)
