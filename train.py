"""Train a language model with Active DPO: the config, and one visible loop around `deepspeed.initialize`.

    deepspeed train.py --config configs/quickstart.yaml [--key value | --key=value] …
    python train.py --config …                            the same in one process, without the launcher
    python train.py --help                                every key

Read `main` first: data, reference, engine, oracle, loop, end. The maths is in adpo.py.

Departures from the paper: none in the loop. Departures from the official code: no Trainer and no trl; an unknown key ends
the run; the reference is scored once and cached, so that no second model is resident; evaluation uses true labels and
never the gate; metrics are those of all ranks; a run is resumed exactly.

Legend: B pairs of a micro-batch, T tokens of a row, N response tokens, V vocabulary, H hidden size.
"""

import dataclasses
import difflib
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import resource
import shutil
import sys
import time
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # `map` forks; threads in the tokeniser would be lost there
if torch.accelerator.current_accelerator() is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed's search for one, and its warnings

import deepspeed
import torch.distributed as dist
import transformers
import yaml
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import adpo
import data
import oracle
import toy

HERE = Path(__file__).resolve().parent


class UsageError(Exception):
    """What the user asked for cannot be done; the message says what, where and what to do. Exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# Config: one flat typed dataclass; the names are those of Hugging Face, TRL and the alignment handbook

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
    # Data
    dataset_mixer: dict[str, float] = key(None, "source: share of its training pairs; a source is a hub id, a folder, a file")
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
    # ADPO
    beta: float = key(0.1, "β: strength of the pull towards the reference", low=1e-6)
    gamma: float = key(1.3, "γ: a pair with |margin| ≤ γ is asked; in units of reward, so it goes with beta", low=0)
    data_selection: bool = key(True, "the gate; false asks for every pair, which is plain DPO")
    pseudo_labels: bool = key(True, "train a pair that is not asked on sign(margin); false gives it no loss")
    loss_type: str = key("sigmoid", "sigmoid (DPO), ipo or hinge")
    label_smoothing: float = key(0.0, "ε of the sigmoid loss", low=0, high=0.5)
    oracle: str = key("dataset", "who answers: dataset (the labels that the data came with)", choices=("dataset",))
    # Optimisation
    per_device_train_batch_size: int = key(8, "pairs a micro-batch", low=1)
    per_device_eval_batch_size: int = key(8, "pairs a batch of evaluation", low=1)
    gradient_accumulation_steps: int = key(1, "micro-batches an optimiser step", low=1)
    learning_rate: float = key(5e-7, "peak learning rate", low=0)
    weight_decay: float = key(0.0, "AdamW's, on matrices alone", low=0)
    max_grad_norm: float = key(1.0, "clip the gradient's norm; 0: do not", low=0)
    optim: str = key("adamw_torch", "optimiser", choices=("adamw_torch", "rmsprop"))
    lr_scheduler_type: str = key("cosine", "schedule after the warm-up",
                                 choices=("cosine", "linear", "constant", "constant_with_warmup"))
    warmup_ratio: float = key(0.1, "share of the steps that warm up", low=0, high=1)
    num_train_epochs: float = key(1.0, "passes over the pairs", low=0)
    max_steps: int = key(-1, "optimiser steps, in place of num_train_epochs; -1: not", low=-1)
    bf16: bool = key(False, "compute in bfloat16, with fp32 weights in the optimiser")
    gradient_checkpointing: bool = key(False, "recompute activations in backward: half the memory, a fifth slower")
    gradient_checkpointing_kwargs: dict[str, bool] = key({"use_reentrant": False}, "passed to torch.utils.checkpoint")
    logits_chunk_size: int = key(2048, "response tokens whose logits are alive at a time", low=1)
    deepspeed: str = key(str(HERE / "ds_config.json"), "engine config; what this file owns is \"auto\" there")
    num_threads: int | None = key(None, "CPU threads a process; small models are several times faster with 1", low=1)
    seed: int = key(42, "order of the pairs, random shares, weights that a model folder lacks", low=0)
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


ALIASES = {"Gamma": "gamma", "evaluation_strategy": "eval_strategy", "dtype": "torch_dtype",
           "dataset_num_proc": "preprocessing_num_workers"}

# Keys of the recipes that this project does not do. Their "off" value is accepted.
REFUSED = {
    "use_peft": "adapters are not supported; all weights are trained",
    "load_in_4bit": "quantised training is not supported",
    "load_in_8bit": "quantised training is not supported",
    "fp16": "float16 needs loss scaling, which skips steps; use bf16",
    "packing": "a row holds one pair",
    "sync_ref_model": "the reference is fixed, which is what makes its log-probs cacheable",
    "reference_free": "without a reference there is no implicit reward to gate by",
    "precompute_ref_log_probs": None,  # always on: accepted when true
}
# Settings of adapters that recipes carry along: without use_peft they mean nothing.
ADAPTER_KEYS = ("lora_", "bnb_4bit_", "use_bnb_")

# What may differ between a checkpoint and the run that resumes it: none of it changes what is computed.
FREE_ON_RESUME = {"logging_steps", "logging_first_step", "log_level", "eval_strategy", "eval_steps", "eval_on_start",
                  "do_eval", "max_eval_samples", "per_device_eval_batch_size", "save_strategy", "save_steps",
                  "save_total_limit", "resume_from_checkpoint", "report_to", "push_to_hub", "hub_model_id",
                  "hub_model_revision", "preprocessing_num_workers", "num_threads", "output_dir", "toy_dir"}


def parse_config(argv):
    """Config from a command line: the YAML of --config, then the flags, which win. Raises UsageError."""
    flags = parse_flags(argv)
    values = {}
    path = flags.pop("config", None)
    if path is None:
        raise UsageError("no config: say --config FILE.yaml (ready ones are in configs/)")
    try:
        loaded = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path}: cannot be read ({getattr(error, 'strerror', None) or error.reason})")
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        where = "" if line is None else f", line {line + 1}"
        raise UsageError(f"{path}{where}: not YAML ({getattr(error, 'problem', None) or error})".replace("\n", " "))
    if not isinstance(loaded or {}, dict):
        raise UsageError(f"{path}: expected keys with values, found {type(loaded).__name__}")
    for place, source in ((path, loaded or {}), ("command line", flags)):
        given = {}
        for name, value in source.items():
            known = resolve_key(str(name), value, place)
            if known:
                if known in given:
                    raise UsageError(f"{place}: {name} and {given[known]} are the same key; keep one")
                given[known] = name
                values[known] = convert(value, known, f"{place}, {name}")
    config = Config(**values)
    check_config(config, path)
    return config


def parse_flags(argv):
    """{"key": text} of `--key value`, `--key=value` and `--key` (true). Of a flag given twice the last counts."""
    flags, rest = {}, list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise UsageError(f"{flag!r}: expected --key value or --key=value")
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
    if name.startswith(ADAPTER_KEYS):
        return None
    if name in REFUSED:
        off = str(value).lower() in ("false", "no", "0", "none", "null", "")
        if off == (name != "precompute_ref_log_probs"):
            return None
        raise UsageError(f"{place}: {name}={value} cannot be honoured: "
                         f"{REFUSED[name] or 'the log-probs of the reference are always computed once'}")
    near = difflib.get_close_matches(name, [*known, *ALIASES], n=1, cutoff=0)
    raise UsageError(f"{place}: unknown key {name!r}; the nearest known key is {near[0]!r}" if near else
                     f"{place}: unknown key {name!r}")


def convert(value, name, place):
    """A value from YAML or the command line as the field's type, checked for choices and range. Raises UsageError."""
    spec = Config.__dataclass_fields__[name]
    hint = spec.type
    optional = isinstance(hint, types.UnionType) or spec.default is None
    if isinstance(hint, types.UnionType):
        hint = next(t for t in typing.get_args(hint) if t is not type(None))
    if value is None or (isinstance(value, str) and value.lower() in ("null", "none") and name != "report_to"):
        if optional or value is not None and hint is str:
            return None if optional else value
        raise UsageError(f"{place}: expected {describe(hint)}, found nothing")
    wrong = UsageError(f"{place}: expected {describe(hint)}, found {value!r}")
    if hint is bool:
        word = str(value).lower()
        if word not in ("true", "yes", "1", "false", "no", "0"):
            raise wrong
        return word in ("true", "yes", "1")
    if hint in (int, float):
        try:
            number = float(value) if not isinstance(value, (bool, list, dict)) else math.nan
        except ValueError:
            raise wrong
        if not math.isfinite(number) or hint is int and number != int(number):
            raise wrong
        value = hint(number)
    elif hint is str:
        if isinstance(value, (list, dict)):
            raise wrong
        value = str(value)
    else:
        value = convert_collection(value, hint, wrong)
    meta = spec.metadata
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), [c for c in meta["choices"] if c], n=1)
        raise UsageError(f"{place}: expected one of {', '.join(str(c) for c in meta['choices'])}, found {value!r}"
                         + (f"; did you mean {near[0]!r}?" if near else ""))
    for bound, beyond, words in ((meta["low"], lambda b: value < b, "at least"), (meta["high"], lambda b: value > b, "at most")):
        if bound is not None and beyond(bound):
            raise UsageError(f"{place}: expected {describe(hint)} of {words} {bound}, found {value}")
    return value


def convert_collection(value, hint, wrong):
    """list[str] from a list or "a,b"; dict[str, X] from a mapping or "{a: 1}"."""
    if isinstance(value, str) and (value.startswith(("[", "{")) or typing.get_origin(hint) is dict):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            raise wrong
    if typing.get_origin(hint) is list:
        value = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if not isinstance(value, list) or not all(isinstance(v, str) and v for v in value):
            raise wrong
        return value
    item = typing.get_args(hint)[1]
    if not isinstance(value, dict) or not value:
        raise wrong
    for k, v in value.items():
        if not isinstance(v, (int, float)) or isinstance(v, bool) != (item is bool):
            raise wrong
    return {str(k): item(v) for k, v in value.items()}


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
            raise UsageError(f"{path}, dataset_mixer: the share of {source} must be over 0 and at most 1, found {share}")
    if config.dataset_configs and len(config.dataset_configs) != len(config.dataset_mixer):
        raise UsageError(f"{path}: dataset_configs needs one name for each of the {len(config.dataset_mixer)} sources")
    for split in config.dataset_splits:
        if not any(word in split for word in ("train", *EVALUATION_SPLITS)):
            raise UsageError(f"{path}, dataset_splits: {split!r} must contain one of train, {', '.join(EVALUATION_SPLITS)}")
    if not any("train" in split for split in config.dataset_splits):
        raise UsageError(f"{path}, dataset_splits: no name contains `train`")
    if config.loss_type not in adpo.LOSS_TYPES:
        try:
            adpo.preference_loss(torch.zeros(1), torch.ones(1), config.loss_type)
        except ValueError as error:
            raise UsageError(f"{path}: {error}")
    if config.label_smoothing and config.loss_type != "sigmoid":
        raise UsageError(f"{path}: label_smoothing is defined for loss_type sigmoid, not {config.loss_type}")
    if config.torch_dtype == "bfloat16" and not config.bf16:
        raise UsageError(f"{path}: torch_dtype bfloat16 needs bf16: true, which trains with fp32 weights in the optimiser")
    if config.max_steps == 0 or config.num_train_epochs == 0:
        raise UsageError(f"{path}: nothing to do in 0 {'steps' if config.max_steps == 0 else 'epochs'}")
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "none": None}
    for service in config.report_to:
        if service not in packages:
            raise UsageError(f"{path}, report_to: expected some of {', '.join(packages)}, found {service!r}")
        if packages[service] and importlib.util.find_spec(packages[service]) is None:
            raise UsageError(f"{path}, report_to: {service} is not installed: pip install {service}, or --report_to=none")
    if config.push_to_hub:
        from huggingface_hub import get_token
        if get_token() is None:
            raise UsageError(f"{path}: push_to_hub needs a login: run `hf auth login`, or say --push_to_hub=false")


EVALUATION_SPLITS = ("test", "eval", "valid", "dev")


def engine_config(config, world):
    """DeepSpeed's config: ds_config.json with each "auto" filled in from the YAML, which owns that number."""
    path = Path(config.deepspeed)
    path = path if path.exists() else HERE / path  # configs/ name their engine from here
    try:
        ds = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(f"deepspeed {config.deepspeed}: cannot be read ({error.strerror})")
    except json.JSONDecodeError as error:
        raise UsageError(f"{config.deepspeed}, line {error.lineno}: not JSON ({error.msg})")
    micro, steps = config.per_device_train_batch_size, config.gradient_accumulation_steps
    owned = {"train_batch_size": micro * steps * world, "train_micro_batch_size_per_gpu": micro,
             "gradient_accumulation_steps": steps, "gradient_clipping": config.max_grad_norm, "bf16.enabled": config.bf16}

    def fill(node, prefix):
        for name, value in node.items():
            path = prefix + name
            if isinstance(value, dict):
                fill(value, path + ".")
            elif value == "auto":
                if path not in owned:
                    raise UsageError(f"{config.deepspeed}: {path} is \"auto\", but no key of the YAML owns it; give a value")
                node[name] = owned[path]
            elif path in owned and value != owned[path]:
                raise UsageError(f"{config.deepspeed}: {path} is {value}, but the YAML says {owned[path]}; write \"auto\"")
    fill(ds, "")
    if ds.get("fp16", {}).get("enabled"):
        raise UsageError(f"{config.deepspeed}: fp16 cannot be honoured: {REFUSED['fp16']}")
    zero = ds.setdefault("zero_optimization", {})
    if config.bf16 and zero.get("stage", 0) == 0:
        say("ZeRO 0 with bf16 would update bf16 weights, where a small step is lost: running as ZeRO 1, with fp32 weights")
        zero["stage"] = 1
    ds.setdefault("steps_per_print", 10**9)  # the run prints its own lines
    output = {"enabled": True, "output_path": config.output_dir}
    services = {"tensorboard": {**output, "job_name": "tensorboard"}, "csv_monitor": {**output, "job_name": "csv"},
                "wandb": {"enabled": True, "project": os.environ.get("WANDB_PROJECT", "adpo")}}
    ds.update({name: services[name] for name in config.report_to if name != "none"})
    return ds


# ----------------------------------------------------------------------------------------------------------------------
# Ranks, model, reference

def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def say(message):
    """One line from rank 0, above the progress bar."""
    if rank() == 0:
        tqdm.write(message)
        sys.stdout.flush()


def bar(total, what, **kwargs):
    """A progress bar on rank 0; in a log file, a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(total=total, desc=what, disable=rank() != 0 or not terminal and not kwargs.get("leave", True),
                dynamic_ncols=True, mininterval=0.5 if terminal else 20, **kwargs)


def load_tokenizer(config):
    tokenizer = transformers.AutoTokenizer.from_pretrained(
        config.tokenizer_name_or_path or config.model_name_or_path, revision=config.model_revision,
        trust_remote_code=config.trust_remote_code)
    if config.chat_template:
        is_file = config.chat_template.endswith(".jinja")
        tokenizer.chat_template = Path(config.chat_template).read_text() if is_file else config.chat_template
    return tokenizer


def load_model(config, name, say=say):
    """The causal LM inside the module that the engine wraps, in the dtype that it is trained in, dropout off."""
    torch.manual_seed(config.seed)
    lm = transformers.AutoModelForCausalLM.from_pretrained(
        name, revision=config.model_revision, dtype=torch.bfloat16 if config.bf16 else torch.float32,
        attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code, use_safetensors=True)
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():  # some models keep the rate and call the function
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
    if config.gradient_checkpointing:
        lm.activation_checkpointing_enable(config.gradient_checkpointing_kwargs)
        if config.gradient_checkpointing_kwargs.get("use_reentrant"):
            lm.enable_input_require_grads()  # or the reentrant kind sees no input that needs a gradient
    return adpo.PairLogps(lm, config.logits_chunk_size)


def weights_fingerprint(module, name):
    """Hash of a model's weights: the commit of a hub model, the content of a folder's files."""
    commit = getattr(module.lm.config, "_commit_hash", None)
    if commit and not Path(name).exists():
        return f"{name}@{commit}"
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted([*Path(name).glob("*.safetensors"), Path(name) / "config.json"]):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def make_optimizer(config, module, ds):
    """AdamW with decay on matrices alone. DeepSpeed's own Adam where the optimiser lives in host memory."""
    matrices = [p for p in module.parameters() if p.requires_grad and p.dim() >= 2]
    others = [p for p in module.parameters() if p.requires_grad and p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    if config.optim == "rmsprop":
        return torch.optim.RMSprop(groups, lr=config.learning_rate)
    if ds["zero_optimization"].get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam
        return DeepSpeedCPUAdam(groups, lr=config.learning_rate)
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def learning_rate(step, total, config):
    """Learning rate of optimiser step `step` (from 0) of `total`, as transformers' schedules have it."""
    warmup = math.ceil(total * config.warmup_ratio) if config.lr_scheduler_type != "constant" else 0
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}.get(config.lr_scheduler_type, 1.0)
    return config.learning_rate * factor


class Schedule:
    """Which pairs each optimiser step takes, and how they are dealt out to ranks and micro-steps."""

    def __init__(self, config, pairs, world):
        self.pairs, self.world, self.seed = pairs, world, config.seed
        self.micro_steps = config.gradient_accumulation_steps
        self.step_pairs = config.per_device_train_batch_size * self.micro_steps * world
        self.epoch_steps = math.ceil(len(pairs) / self.step_pairs)
        self.total_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * self.epoch_steps)
        self._order = (None, None)

    def rows(self, step):
        """Indices of the pairs of a step. The last step of an epoch takes what is left: each pair once an epoch."""
        epoch, within = divmod(step, self.epoch_steps)
        if self._order[0] != epoch:
            self._order = (epoch, data.epoch_order(len(self.pairs), epoch, self.seed))
        return self._order[1][within * self.step_pairs:(within + 1) * self.step_pairs]

    def micro_batches(self, step):
        """This rank's micro-batches of a step: a list of lists of indices, some of them empty."""
        dealt = data.split_step(self.rows(step), self.pairs.lengths, self.world, self.micro_steps)
        return [micro[rank()] for micro in dealt]

    def training_batches(self):
        """This rank's micro-batches of one pass over all the pairs that the run will see."""
        return [rows for step in range(min(self.total_steps, self.epoch_steps)) for rows in self.micro_batches(step)]


def evaluation_batches(pairs, batch_size, world):
    rows = list(range(len(pairs)))
    step = batch_size * world
    dealt = (data.split_step(rows[i:i + step], pairs.lengths, world, 1) for i in range(0, len(rows), step))
    return [micro[0][rank()] for micro in dealt]


@torch.no_grad()
def score(engine, pairs, batches, shared, what):
    """Log-probs of all pairs, over all ranks: (pairs, 2) fp32 on the CPU, NaN for a pair that no batch holds."""
    engine.eval()
    logps = torch.zeros(len(pairs), 2, device=engine.device)
    seen = torch.zeros(len(pairs), 1, device=engine.device)
    with bar(len(batches), what) as progress:
        for rows in batches:
            batch = data.collate(pairs, rows, shared).to(engine.device)
            scored = engine(batch)  # (B, 2)
            if rows:
                logps[batch.rows], seen[batch.rows] = scored, 1.0
            progress.update()
    if dist.get_world_size() > 1:
        dist.all_reduce(logps)
        dist.all_reduce(seen)
    return logps.where(seen > 0, torch.nan).cpu()


def reference_logps(engine, parts, weights, config, shared):
    """log π_ref of all pairs of the run, from the cache on disk or computed once. `parts`: {name: (pairs, batches)}.

    The batches are those that training and evaluation will use, and part of the cache's key: how a batch is padded shows
    in the last bits of a log-prob, and at step 0 every margin is to be 0, not nearly 0.
    """
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "adpo"
    scores = {}
    for name, (pairs, batches) in parts.items():
        depends = [data.VERSION, weights, pairs.fingerprint, str(next(engine.module.parameters()).dtype), shared,
                   engine.module.lm.config._attn_implementation, hashlib.sha256(repr(all_gather(batches)).encode()).hexdigest()]
        path = cache / f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]}.safetensors"
        found = [path.is_file() and load_file(path)["logps"]]
        dist.broadcast_object_list(found, src=0, device=engine.device)  # rank 0's disk decides for all hosts
        if found[0] is False:
            found[0] = score(engine, pairs, batches, shared, f"reference log-probs ({name})")
            if rank() == 0:
                cache.mkdir(parents=True, exist_ok=True)
                save_file({"logps": found[0]}, temporary := path.with_suffix(f".{os.getpid()}.tmp"))
                os.replace(temporary, path)
        scores[name] = found[0]
    return scores


def all_gather(value):
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


@torch.no_grad()
def check_rows(engine, pairs, shared):
    """Refuse to train where a row's log-probs are not those of a plain forward: compare them on one real pair.

    The pair of median length; root mean square over its response tokens, in nats.
    """
    engine.eval()
    row = sorted(range(len(pairs)), key=lambda i: pairs.lengths[i])[len(pairs) // 2]
    plain = engine(data.collate(pairs, [row], shared=False).to(engine.device), per_token="plain")
    ours = engine(data.collate(pairs, [row], shared).to(engine.device), per_token="ours")
    error = (ours - plain).pow(2).mean().sqrt().item()
    limit = 0.15 if plain_dtype(engine) == torch.bfloat16 else 1e-3
    if not error <= limit:
        raise UsageError(f"{type(engine.module.lm).__name__}: log-probs of pair {pairs.ids[row]} differ from a plain forward "
                         f"by {error:.2g} nats a token (limit {limit:.2g}): this architecture, transformers version or "
                         "attn_implementation is not supported; try attn_implementation: eager")
    return error


def plain_dtype(engine):
    return next(engine.module.parameters()).dtype


# ----------------------------------------------------------------------------------------------------------------------
# Metrics, evaluation, checkpoints

METRICS = ("loss", "rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies", "logps/chosen",
           "logps/rejected")


def metric_sums(losses, rewards, logps, labels, weights, tokens):
    """Sums over a micro-batch, (10,) fp64: pairs, labelled pairs, tokens, then one for each of METRICS.

    losses, labels, weights: (B,).  rewards, logps: (B, 2).  "Chosen" is by the label that the loss used; a margin of
    exactly 0 counts as half right.
    """
    labelled = weights * (labels != 0)  # (B,)
    first = (labels > 0)[:, None]  # (B, 1)
    ordered = [torch.where(first, x, x.flip(-1)) for x in (rewards.detach(), logps.detach())]  # (B, 2): chosen, rejected
    margin = ordered[0][:, 0] - ordered[0][:, 1]
    right = (margin > 0).float() + 0.5 * (margin == 0)
    columns = torch.stack([ordered[0][:, 0], ordered[0][:, 1], margin, right, ordered[1][:, 0], ordered[1][:, 1]])  # (6, B)
    sums = torch.stack([weights.sum(), labelled.sum(), weights.new_tensor(float(tokens)), (losses.detach() * weights).sum()])
    return torch.cat([sums, (columns * labelled).sum(-1)]).double()


def means(sums):
    """{metric: mean} of summed metrics over all ranks. The loss is over all pairs, the rest over those with a label."""
    sums = sums.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(sums)
    pairs, labelled, tokens, loss, *rest = sums.tolist()
    return {"loss": loss / max(pairs, 1), **{name: value / max(labelled, 1) for name, value in zip(METRICS[1:], rest)}}, tokens


@torch.no_grad()
def evaluate(engine, pairs, batches, reference, labels, config, shared):
    """Loss and accuracy on the test split, by its true labels, never by the gate.  labels: (pairs,), ±1."""
    engine.eval()
    sums = torch.zeros(10, dtype=torch.float64, device=engine.device)
    with bar(len(batches), "evaluate", leave=False) as progress:
        for rows in batches:
            batch = data.collate(pairs, rows, shared).to(engine.device)
            logps = engine(batch)
            rewards = adpo.implicit_rewards(logps, reference[batch.rows], config.beta)
            o = labels[batch.rows]
            losses = adpo.preference_loss(adpo.margins(rewards), o, config.loss_type, config.beta, config.label_smoothing)
            sums += metric_sums(losses, rewards, logps, o, batch.weights, batch.tokens)
            progress.update()
    return means(sums)[0]


class Log:
    """metrics.jsonl and DeepSpeed's monitor, from rank 0."""

    def __init__(self, output, engine, step):
        self.path, self.engine = output / "metrics.jsonl", engine
        if rank() == 0:  # a resumed run writes the steps behind its checkpoint again
            lines = self.path.read_text().splitlines() if self.path.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            replace_text(self.path, "".join(line + "\n" for line in kept))

    def write(self, row):
        if rank() == 0:
            with open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.engine.monitor.enabled:
                self.engine.monitor.write_events([(f"{row['split']}/{name}", value, row["step"]) for name, value in row.items()
                                                  if isinstance(value, (int, float)) and name != "step"])


def replace_text(path, text):
    """Write a file so that it is the old one or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def checkpoints(output):
    """{step: folder} of the complete checkpoints of a run."""
    found = {}
    for path in output.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if number.isdigit() and (path / "trainer_state.json").is_file():
            found[int(number)] = path
    return dict(sorted(found.items()))


def save_checkpoint(engine, output, state, limit):
    """Write a checkpoint aside, give it its name when it is complete, then drop what save_total_limit does not keep."""
    aside, name = output / ".checkpoint", f"checkpoint-{state['step']}"
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier()
    engine.save_checkpoint(str(aside), tag=name, save_latest=False)
    dist.barrier()
    if rank() == 0:
        replace_text(aside / name / "trainer_state.json", json.dumps(state, indent=2))
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(aside / name, output / name)
        shutil.rmtree(aside)
        for step in list(checkpoints(output))[:-limit] if limit else ():
            shutil.rmtree(output / f"checkpoint-{step}")
    dist.barrier()


def find_checkpoint(config, output):
    """The checkpoint folder to resume from, or None."""
    wanted = config.resume_from_checkpoint
    if wanted is not None and wanted.lower() in ("false", "no", "0"):
        if checkpoints(output):
            raise UsageError(f"resume_from_checkpoint false, but {output} holds the checkpoints of a run: choose another "
                             "output_dir, or move that one away")
        return None
    if wanted is None or wanted.lower() in ("true", "yes", "1"):
        complete = checkpoints(output)
        if not complete and wanted is not None:
            raise UsageError(f"resume_from_checkpoint: {output} holds no complete checkpoint")
        return list(complete.values())[-1] if complete else None
    folder = Path(wanted)
    if not (folder / "trainer_state.json").is_file():
        raise UsageError(f"resume_from_checkpoint {folder}: no complete checkpoint there (no trainer_state.json)")
    return folder


def check_same_run(config, output):
    """Refuse to go on with a run in output_dir under a config that computes something else."""
    path = output / "config.yaml"
    if not path.is_file():
        return
    before = yaml.safe_load(path.read_text())["config"]
    now = dataclasses.asdict(config)
    for name in now:
        if name not in FREE_ON_RESUME and before.get(name) != now[name]:
            raise UsageError(f"{path}: the run in there has {name} {before.get(name)!r}, this one {now[name]!r}: choose "
                             "another output_dir, or move that one away")


def save_model(engine, tokenizer, output, card):
    """The trained model in Hugging Face form, gathered over ranks; each file is put in place when it is complete."""
    state = {}
    for name, parameter in engine.module.lm.named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    if rank() == 0:
        transformers.utils.logging.disable_progress_bar()
        staging = output / ".model"
        shutil.rmtree(staging, ignore_errors=True)
        engine.module.lm.save_pretrained(staging, state_dict=state)
        tokenizer.save_pretrained(staging)
        (staging / "README.md").write_text(card, encoding="utf-8")
        for path in staging.iterdir():
            os.replace(path, output / path.name)
        staging.rmdir()
    dist.barrier()


def model_card(config, summary):
    """README.md of the trained model."""
    front = {"base_model": config.model_name_or_path, "datasets": list(config.dataset_mixer),
             "library_name": "transformers", "tags": ["adpo", "dpo", "preference-learning"]}
    accuracy, right = summary["eval_accuracy"], summary["pseudo_label_accuracy"]
    rows = [("pairs", f"{summary['pairs']:,}"),
            ("labels bought", f"{summary['queries']:,} ({summary['query_fraction']:.1%})"),
            ("pseudo-labels", f"{summary['pseudo_labels']:,}" + ("" if right is None else f", {right:.1%} of them right")),
            ("held-out accuracy of the implicit reward", "not measured" if accuracy is None else f"{accuracy:.3f}"),
            ("β, γ", f"{config.beta}, {config.gamma if config.data_selection else 'every pair asked'}")]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return (f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n\n# {Path(config.output_dir).name}\n\n"
            f"Trained from `{config.model_name_or_path}` with Active Direct Preference Optimization "
            f"([arXiv 2402.09401](https://arxiv.org/abs/2402.09401)).\n\n| | |\n| --- | --- |\n{table}\n\n"
            f"```yaml\n{yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)}```\n")


def closing_line(summary):
    """The run in one line of plain words."""
    share = summary["query_fraction"]
    parts = [f"{summary['queries']:,} of {summary['pairs']:,} labels bought ({share:.0%})".replace("%", " %")]
    if summary["pseudo_label_accuracy"] is not None:
        parts.append(f"pseudo-labels right: {100 * summary['pseudo_label_accuracy']:.1f} %")
    if summary["eval_accuracy"] is not None:
        parts.append(f"held-out accuracy {summary['eval_accuracy']:.3f}")
    if "gold_reward_after" in summary:
        parts.append(f"gold reward of generations {summary['gold_reward_before']:+.2f} → {summary['gold_reward_after']:+.2f}")
    return " · ".join([*parts, f"{summary['wall_seconds']:.0f} s"])


def versions():
    return {name: importlib.metadata.version(name) for name in
            ("torch", "transformers", "datasets", "deepspeed", "tqdm", "pyyaml")}


def peak_memory(device):
    """Bytes at the peak, of the rank with most: of the GPU, or of the process."""
    peak = (torch.cuda.max_memory_allocated() if device.type == "cuda"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    peak = torch.tensor(peak, device=device)
    dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return peak.item()


# ----------------------------------------------------------------------------------------------------------------------

def rank_0_first(work):
    """Run `work` on rank 0, then on the others, who find its result in a cache."""
    if rank() == 0:
        result = work()
    dist.barrier()
    if rank() != 0:
        result = work()
    return result


def setup(config):
    """Threads, log levels and the process group; then the built-in task, where the config names it."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    transformers.logging.set_verbosity(getattr(transformers.logging, config.log_level.upper()))
    data.datasets.logging.set_verbosity(getattr(data.datasets.logging, config.log_level.upper()))
    deepspeed.utils.logging.logger.setLevel(config.log_level.upper())
    os.environ.setdefault("RANK", "0"), os.environ.setdefault("WORLD_SIZE", "1"), os.environ.setdefault("LOCAL_RANK", "0")
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1"), os.environ.setdefault("MASTER_PORT", "0")
    deepspeed.init_distributed(dist_init_required=True, auto_mpi_discovery=False)
    if rank() != 0:
        transformers.utils.logging.disable_progress_bar()
        data.datasets.disable_progress_bars()
    if "toy" in (config.model_name_or_path, *config.dataset_mixer):
        model, pairs = rank_0_first(lambda: toy.build(config.toy_dir, label_noise=config.toy_label_noise))
        config.dataset_mixer = {str(pairs) if source == "toy" else source: share
                                for source, share in config.dataset_mixer.items()}
        if config.model_name_or_path == "toy":
            config.model_name_or_path = str(model)
        return [json.loads(line)["prompt"] for line in open(Path(pairs) / "test.jsonl")]
    return None


def load_data(config, tokenizer):
    """(train pairs, test pairs or None, annotator, test labels (pairs,) or None)."""
    renderer = data.Renderer(tokenizer, config.max_prompt_length, config.max_length, config.auto_insert_empty_system_msg)
    names = dict(zip(config.dataset_mixer, config.dataset_configs or ()))

    def load(kind, limit):
        splits = [split for split in config.dataset_splits if ("train" in split) == (kind == "train")]
        return rank_0_first(lambda: data.load_pairs(
            config.dataset_mixer, splits, renderer, kind, names, config.preprocessing_num_workers,
            config.decontaminate_with if kind == "train" else None, limit, config.seed, say))

    train, labels, truths = load("train", config.max_train_samples)
    missing = next((id for id in train.ids if id not in labels), None)
    if missing is not None:
        raise UsageError(f"oracle dataset: pair {missing} has no label ({len(set(train.ids) - set(labels))} pairs have none)")
    annotator = oracle.DatasetAnnotator(labels, truths) if rank() == 0 else None
    test, test_labels = None, None
    if config.do_eval:
        test, _, test_truths = load("test", config.max_eval_samples)
        if test is None:
            say("no test split: evaluation is skipped")
        elif not all(id in test_truths for id in test.ids):
            raise UsageError(f"the test split has pairs without a label, {next(i for i in test.ids if i not in test_truths)} "
                             "the first: label them, or say --do_eval=false")
        else:
            test_labels = torch.tensor([float(test_truths[id]) for id in test.ids])
    return train, test, annotator, test_labels


def main(config):
    start_time = time.time()
    toy_prompts = setup(config)
    world = dist.get_world_size()
    ds = engine_config(config, world)
    output = Path(config.output_dir)
    if (output / "summary.json").is_file():
        check_same_run(config, output)
        say(f"{output} is finished: {closing_line(json.loads((output / 'summary.json').read_text()))}")
        return say("to train again, choose another --output_dir or move that one away")
    check_same_run(config, output)
    resume = find_checkpoint(config, output)

    # Data. The labels go to the annotator; what the loop gets has none.
    tokenizer = load_tokenizer(config)
    train, test, annotator, test_labels = load_data(config, tokenizer)
    schedule = Schedule(config, train, world)
    train_batches = schedule.training_batches()
    test_batches = evaluation_batches(test, config.per_device_eval_batch_size, world) if test else []
    parts = {"train": (train, train_batches)} | ({"test": (test, test_batches)} if test else {})

    # Policy and engine. A reference that is another model is loaded, scored and freed before.
    reference = None
    if config.ref_model_name_or_path:
        module = load_model(config, config.ref_model_name_or_path)
        stage = 3 if ds["zero_optimization"].get("stage") == 3 else 0
        engine = deepspeed.initialize(model=module, config={**ds, "zero_optimization": {"stage": stage}})[0]
        shared = module.why_not_shared() is None
        check_rows(engine, train, shared)
        reference = reference_logps(engine, parts, weights_fingerprint(module, config.ref_model_name_or_path), config, shared)
        engine.destroy()
        del engine, module
        gc.collect()
    module = load_model(config, config.model_name_or_path)
    shared = module.why_not_shared() is None
    if not shared:
        say(f"two rows a pair: {type(module.lm).__name__} cannot share a prompt, {module.why_not_shared()}")
    weights = weights_fingerprint(module, config.model_name_or_path)
    engine = deepspeed.initialize(model=module, optimizer=make_optimizer(config, module, ds), config=ds)[0]
    device = engine.device
    check_rows(engine, train, shared)
    if reference is None:  # the reference is the policy before its first step
        reference = reference_logps(engine, parts, weights, config, shared)
    reference = {name: logps.to(device) for name, logps in reference.items()}  # (pairs, 2)
    test_labels = test_labels.to(device) if test else None

    # The run's folder, its ledger, and where it stands.
    if rank() == 0:
        output.mkdir(parents=True, exist_ok=True)
        replace_text(output / "config.yaml", yaml.safe_dump(
            {"config": dataclasses.asdict(config), "versions": versions()}, sort_keys=False, allow_unicode=True))
    dist.barrier()
    asker = oracle.Oracle(annotator, output / "labels.sqlite")
    step, seconds_before = 0, 0.0
    sums = torch.zeros(10, dtype=torch.float64, device=device)  # metrics since the last log
    if resume:
        engine.load_checkpoint(str(resume.parent), tag=resume.name)
        state = json.loads((resume / "trainer_state.json").read_text())
        step, seconds_before, asker.pseudo = state["step"], state["wall_seconds"], state["pseudo"]
        sums += torch.tensor(state["sums"], dtype=torch.float64, device=device) * (rank() == 0)
        say(f"resumed from {resume} at step {step:,} of {schedule.total_steps:,}")
    log = Log(output, engine, step)
    say(f"{len(train):,} pairs, {schedule.total_steps:,} steps of {schedule.step_pairs} pairs, "
        f"{sum(p.ds_numel if hasattr(p, 'ds_numel') else p.numel() for p in module.parameters()):,} parameters, "
        f"{world} process{'es' if world > 1 else ''} on {device.type}, ZeRO {ds['zero_optimization'].get('stage', 0)}")

    def wall_seconds():
        return seconds_before + time.time() - start_time

    def run_evaluation():
        metrics = evaluate(engine, test, test_batches, reference["test"], test_labels, config, shared)
        log.write({"step": step, "epoch": step / schedule.epoch_steps, "split": "eval", **metrics,
                   "queries": asker.queries(step - 1), "pseudo_labels": asker.pseudo["labels"]})
        return metrics

    # The loop.
    evaluation = run_evaluation() if test and config.eval_on_start and step == 0 else None
    window_start = time.time()
    progress = bar(schedule.total_steps, "train", initial=step)
    while step < schedule.total_steps:
        engine.train()
        lr = learning_rate(step, schedule.total_steps, config)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr
        step_pairs = len(schedule.rows(step))
        pseudo_ids, pseudo_labels = [], []

        for rows in schedule.micro_batches(step):
            batch = data.collate(train, rows, shared).to(device)
            logps = engine(batch)  # (B, 2)  log π_θ(y|x)
            rewards = adpo.implicit_rewards(logps, reference["train"][batch.rows], config.beta)  # (B, 2)
            margin = adpo.margins(rewards)  # (B,)

            # Algorithm 2: ask where |m| ≤ γ, else o = sign(m). The one wait for the device in a micro-step.
            m = margin.detach().cpu()
            ask = adpo.gate(m, config.gamma if config.data_selection else math.inf, batch.ids)
            answers = torch.tensor(asker.answer(batch.ids, m.tolist(), ask.tolist(), step))
            o = adpo.choose_labels(m, answers, config.pseudo_labels)
            unasked = [i for i, id in enumerate(batch.ids) if id is not None and answers[i] == 0 and o[i] != 0]
            pseudo_ids += [batch.ids[i] for i in unasked]
            pseudo_labels += [int(o[i]) for i in unasked]
            o = o.to(device)

            losses = adpo.preference_loss(margin, o, config.loss_type, config.beta, config.label_smoothing)  # (B,)
            # The step's loss is the mean over its pairs, however they are cut: DeepSpeed divides by micro-steps and ranks.
            engine.backward((losses * batch.weights).sum() * (schedule.micro_steps * world / step_pairs))
            if engine.is_gradient_accumulation_boundary():
                grad_norm = gradient_norm(engine)
            engine.step()
            sums += metric_sums(losses, rewards, logps, o, batch.weights, batch.tokens)

        asker.report_pseudo(pseudo_ids, pseudo_labels)
        step += 1
        epoch_end = step % schedule.epoch_steps == 0
        last = step == schedule.total_steps
        if step % config.logging_steps == 0 or last or (step == 1 and config.logging_first_step):
            metrics, tokens = means(sums)
            row = {"step": step, "epoch": step / schedule.epoch_steps, "split": "train", **metrics, "learning_rate": lr,
                   "grad_norm": float(grad_norm if grad_norm is not None else engine.get_global_grad_norm()), "queries": asker.queries(step - 1),
                   "pseudo_labels": asker.pseudo["labels"], "tokens_per_second": tokens / (time.time() - window_start)}
            log.write(row)
            if rank() == 0:
                progress.set_postfix_str(
                    f"loss {row['loss']:.3f}, acc {row['rewards/accuracies']:.3f}, {row['queries']:,} queries "
                    f"({row['queries'] / min(step * schedule.step_pairs, len(train)):.0%})"
                    + (f", held-out {evaluation['rewards/accuracies']:.3f}" if evaluation else ""), refresh=False)
            sums.zero_()
            window_start = time.time()
        progress.update()
        if test and (last or due(config.eval_strategy, config.eval_steps, step, epoch_end)):
            evaluation = run_evaluation()
            window_start = time.time()
        if due(config.save_strategy, config.save_steps, step, epoch_end):
            state = {"step": step, "epoch": step / schedule.epoch_steps, "wall_seconds": wall_seconds(),
                     "pseudo": asker.pseudo, "sums": reduced(sums).tolist()}
            save_checkpoint(engine, output, state, config.save_total_limit)
            window_start = time.time()
    progress.close()

    # The end: model, card, summary.
    seen = {train.ids[row] for s in range(min(schedule.total_steps, schedule.epoch_steps)) for row in schedule.rows(s)}
    queries, pseudo = asker.queries(), asker.pseudo
    summary = {"pairs": len(seen), "queries": queries, "query_fraction": (queries or 0) / len(seen),
               "pseudo_labels": pseudo["labels"],
               "pseudo_label_accuracy": pseudo["right"] / pseudo["known"] if pseudo["known"] else None,
               "eval_loss": evaluation and evaluation["loss"],
               "eval_accuracy": evaluation and evaluation["rewards/accuracies"],
               "peak_memory_bytes": peak_memory(device)}
    save_model(engine, tokenizer, output, model_card(config, summary) if rank() == 0 else "")
    asker.close()
    if rank() == 0:
        if toy_prompts:
            summary |= {f"gold_reward_{when}": toy.mean_gold_reward(folder, toy_prompts)
                        for when, folder in (("before", config.model_name_or_path), ("after", output))}
        if config.push_to_hub:
            push(config, output)
        summary["wall_seconds"] = wall_seconds()
        replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
        say(closing_line(summary))
        say(f"the model, its metrics and its ledger are in {output}")
    dist.barrier()
    engine.destroy()


def gradient_norm(engine):
    """Norm of the step's gradient, before clipping, where the engine itself keeps no account of it (fp32 without ZeRO);
    else None, and `engine.get_global_grad_norm()` says it after the step."""
    if engine.zero_optimization():
        return None
    return torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])


def due(strategy, every, step, epoch_end):
    return strategy == "steps" and step % every == 0 or strategy == "epoch" and epoch_end


def reduced(sums):
    """Metric sums over all ranks, for a checkpoint."""
    sums = sums.clone()
    if dist.get_world_size() > 1:
        dist.all_reduce(sums)
    return sums


def push(config, output):
    """Upload the trained model; checkpoints and the ledger stay here."""
    from huggingface_hub import HfApi
    api = HfApi()
    name = api.create_repo(config.hub_model_id or output.name, exist_ok=True).repo_id
    api.upload_folder(repo_id=name, folder_path=str(output), revision=config.hub_model_revision,
                      ignore_patterns=["checkpoint-*", "labels.sqlite*", "tensorboard/*", "csv/*", ".*"])
    say(f"uploaded to {name}")


def help_text():
    lines = [__doc__.split("\n\n")[0], "", "deepspeed train.py --config FILE.yaml [--key value | --key=value] …", ""]
    for f in dataclasses.fields(Config):
        default = f.default_factory() if f.default is dataclasses.MISSING else f.default
        default = "ds_config.json" if f.name == "deepspeed" else default
        lines.append(f"  --{f.name} ({default})\n      {f.metadata['help']}")
    return "\n".join(lines)


def command(argv):
    """The command line: exit code 0, or 2 behind one line that says what is wrong."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    try:
        main(parse_config(argv))
    except (UsageError, data.DataError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


if __name__ == "__main__":
    try:
        sys.exit(command(sys.argv[1:]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
