"""Reads a YAML file and the command line into a Config, or says in one line what is wrong.

    parse_config(["--config", "configs/quickstart.yaml", "--gamma=0.7"])    a Config, or UsageError

Every value is checked for its type, range and choices, then all of them together, before anything is loaded. An error names
the place (file or flag), the value, what was expected and the nearest known key.

Departures from the official code: `--Gamma` means `--gamma`; an unknown key is an error; booleans are true/false/yes/no/1/0
in any case; what cannot be honoured is refused with the reason.
"""

import dataclasses
import datetime
import difflib
import importlib.util
import json
import math
import os
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml

import adpo
from labels.judge import Rubric
from labels.oracle import ANNOTATORS, JUDGES, annotator_class
from runtime.config import Config, hub_name, is_repo_id, key
from runtime.errors import UsageError, one_line

# ----------------------------------------------------------------------------------------------------------------------
# The keys and what they can be set to

ALIASES = {"Gamma": "gamma", "evaluation_strategy": "eval_strategy", "dtype": "torch_dtype",
           "dataset_num_proc": "preprocessing_num_workers", "max_seq_length": "max_length"}

# Choices that are the names in a table.
CHOICES = {"loss_type": [*adpo.LOSSES], "oracle": [*ANNOTATORS, "judge"], "judge": [*JUDGES]}


@dataclass
class Accepted:
    """Keys that recipes set but that decide nothing here. They are checked like the others and then dropped; no object of
    this class is ever made. A help text says why only the default can be honoured."""
    # The dtype of training is bf16's. Recomputing activations is the same computation under all of its options.
    torch_dtype: str | None = key(None, None, choices=("auto", "bfloat16", "float32"))
    gradient_checkpointing_kwargs: dict[str, bool] | None = key(None, None)
    lora_dropout: float = key(0.0, "the gate reads the margin that is trained on, and dropout would make it noise; say "
                                   "lora_dropout: 0", low=0, high=1)
    lora_task_type: str = key("CAUSAL_LM", "it is CAUSAL_LM")
    bnb_4bit_quant_storage: str = key("uint8", "it is uint8")
    precompute_ref_log_probs: bool = key(True, "the log-probs of the reference are always computed once")
    use_dora: bool | None = key(False, "the adapter is plain LoRA")
    use_rslora: bool | None = key(False, "the adapter is plain LoRA")
    load_in_8bit: bool | None = key(False, "weights are loaded in full, or in 4 bits")
    fp16: bool | None = key(False, "float16 needs loss scaling, which skips steps; use bf16")
    packing: bool | None = key(False, "a row holds one pair")
    sync_ref_model: bool | None = key(False, "the reference is fixed, so that its log-probs can be cached")
    reference_free: bool | None = key(False, "without a reference there is no implicit reward to gate by")


KEYS = [field.name for field in dataclasses.fields(Config)]
FIELDS = {field.name: field for table in (Config, Accepted) for field in dataclasses.fields(table)}
UNSUPPORTED = {field.name: field.metadata["help"] for field in dataclasses.fields(Accepted) if field.metadata["help"]}

# ADPO replaces a label by sign(m), so it needs a loss of the form f(o · m). These losses of TRL do not fit, by reason.
UNGATED_LOSSES = {
    "it scores chosen and rejected responses apart from each other, not by their margin":
        ("apo_down", "apo_zero", "bco_pair", "kto_pair", "nca_pair", "sppo_hard"),
    "it sorts rewards over the batch, so one pair has no loss of its own": ("aot", "aot_pair", "aot_unpaired"),
    "at a margin of 0, where every pair begins, it pushes away from the label": ("discopop",),
    "its targets are a distribution over both responses, not a label": ("exo_pair",),
    "it corrects for a known rate of wrong labels, which pseudo-labels do not have": ("robust",),
    "it has no preference": ("sft",),
    "it divides log-probs by their lengths, so γ would have another unit": ("sigmoid_norm",),
}

NOT_WITH_A_BUDGET = {"data_selection": "plain DPO buys every label", "max_queries": "that is the number of labels",
                     "after_budget": "every pair gets a soft label", "pseudo_labels": "every pair gets a soft label",
                     "audit_fraction": "the committee is graded on labels that it has not learned from"}
ONLY_WITH = {"after_budget": "max_queries"} | {name: "label_budget" for name in FIELDS if name.startswith("committee_")}

REQUIRED = ("model_name_or_path", "dataset_mixer", "output_dir")
EVALUATION_SPLITS = ("test", "eval", "valid", "dev")  # the name of a split for evaluation contains one of these
BOOLEANS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}  # in any case


def choices(name):
    """The values that a key can be set to, or None if they are not listed."""
    return CHOICES.get(name) or FIELDS[name].metadata["choices"]


def why_not_gated(loss_type):
    """None for a loss in adpo.LOSSES, otherwise why it cannot be used, for the user."""
    if loss_type in adpo.LOSSES:
        return None
    reason = next((reason for reason, names in UNGATED_LOSSES.items() if loss_type in names), "it is not known")
    return f"loss_type {loss_type!r} cannot be gated: {reason}; use one of {', '.join(adpo.LOSSES)}"


def wants_empty_system(model):
    """Whether a model expects an empty system message where a conversation has none, which its template would not write at
    inference: those of the alignment handbook were fine-tuned so, and its recipes rely on it."""
    return str(model).startswith(("alignment-handbook/", "HuggingFaceH4/"))


def help_text():
    """Every key with its default, its choices and what it means."""
    lines = ["Train a language model with Active DPO.", "",
             "deepspeed train.py --config FILE.yaml [--key value | --key=value] …",
             "python data.py --config FILE.yaml …        with the same keys, shows some of the pairs", ""]
    for field in dataclasses.fields(Config):
        default = field.default_factory() if field.default is dataclasses.MISSING else field.default
        default = default if isinstance(default, str) else json.dumps(default)  # null and true, as in YAML
        default = "required" if field.name in REQUIRED else "ds_config.json" if field.name == "deepspeed" else default
        options = f"; one of {', '.join(choices(field.name))}" if choices(field.name) else ""
        lines.append(f"  --{field.name} ({default}{options})\n      {field.metadata['help']}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Reading

def parse_config(argv):
    """Config from a command line: the YAML of --config, then the flags, which win. Raises UsageError."""
    flags = parse_flags(argv)
    path = flags.pop("config", None)
    if path is None:
        raise UsageError("no config: say --config FILE.yaml (ready ones are in configs/)")
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:  # no such file, not UTF-8, not a possible file name
        raise UsageError(f"--config {one_line(path, 80)}: cannot be read ({getattr(error, 'strerror', None) or error})")
    path = one_line(path, 300)
    loaded = load_yaml(text, path) or {}
    if not isinstance(loaded, dict):
        raise UsageError(f"{path}: expected keys with values, found {type(loaded).__name__}")
    values, places = {}, {}
    for place, source in ((path, loaded), ("command line", flags)):
        spelled = {}
        for name, value in source.items():
            known = resolve_key(str(name), place)
            if known in spelled:
                raise UsageError(f"{place}: {one_line(name, 80)} and {spelled[known]} are the same key; keep one")
            spelled[known], places[known] = name, place
            values[known] = convert(value, known, f"{place}, {name}")
    if values.get("auto_insert_empty_system_msg") is None:
        values["auto_insert_empty_system_msg"] = wants_empty_system(values.get("model_name_or_path"))
    config = Config(**{name: value for name, value in values.items() if name in KEYS})
    check_accepted({name: value for name, value in values.items() if name not in KEYS}, places, config)
    check_config(config, path)
    return config


def parse_flags(argv):
    """{"key": text} from `--key value`, `--key=value` and `--key` (true). If a flag is given twice, the last one wins."""
    flags, rest = {}, list(argv)
    while rest:
        flag = rest.pop(0)
        if not flag.startswith("--") or flag == "--":
            raise UsageError(f"{flag!r:.80}: expected --key value or --key=value")
        name, equals, value = flag[2:].partition("=")
        if not equals:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else "true"
        flags[name] = value
    flags.pop("local_rank", None)  # set by the launcher, which says the same in the environment
    return flags


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader, which builds only text, numbers, dates, lists and mappings. A key that is set twice is an error
    (PyYAML silently keeps the last). So is an alias of a list or mapping: with those, a few lines expand to billions of
    values."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) and isinstance(self.anchors.get(event.anchor), yaml.CollectionNode):
            raise yaml.composer.ComposerError(None, None, f"*{event.anchor} repeats a list or mapping; write it out",
                                              event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        lines = {}
        for entry, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            name = str(entry.value)
            if name in lines:
                raise yaml.constructor.ConstructorError(
                    None, None, f"{one_line(name, 80)} is already set in line {lines[name]}; keep one", entry.start_mark)
            lines[name] = entry.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load_yaml(text, place):
    """The content of a YAML text. Raises UsageError, which names the line."""
    try:
        return yaml.load(text, Loader)
    # The last four come from 2024-99-99, !!bool maybe, !!timestamp x and 1,000 brackets.
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        raise UsageError(f"{place}{f', line {mark.line + 1}' if mark else ''}: not YAML "
                         f"({one_line(getattr(error, 'problem', None) or error, 200)})")


def resolve_key(name, place):
    """The name in FIELDS that a key stands for. Raises UsageError."""
    name = ALIASES.get(name, name)
    if name not in FIELDS:
        near = difflib.get_close_matches(name.lower(), [*FIELDS, *ALIASES], n=1)
        advice = f"the nearest known key is {near[0]!r}" if near else "python train.py --help lists all keys"
        raise UsageError(f"{place}: unknown key {name!r:.80}; {advice}")
    return name


# ----------------------------------------------------------------------------------------------------------------------
# One value

def convert(value, name, place):
    """A value from YAML or the command line in the type of its key, checked for choices and range. Raises UsageError."""
    spec = FIELDS[name]
    hint, optional = spec.type, spec.default is None
    if isinstance(hint, types.UnionType):
        hint, optional = next(t for t in typing.get_args(hint) if t is not types.NoneType), True
    # For a text that is needed "none" is a word like any other (after_budget: none), and in report_to it is a service.
    is_null = optional or hint is not str and name != "report_to"
    if value is None or is_null and isinstance(value, str) and value.lower() in ("null", "none"):
        if optional:
            return None
        raise UsageError(f"{place}: expected {describe(hint)}, found nothing")
    wrong = UsageError(f"{place}: expected {describe(hint)}, found {one_line(repr(value), 80)}")
    if hint is bool:
        if str(value).lower() not in BOOLEANS:
            raise wrong
        return BOOLEANS[str(value).lower()]
    if hint in (int, float):
        value = convert_number(value, hint, wrong)
    elif hint is str:
        value = convert_text(value, choices(name) or (), wrong)
    else:
        value = convert_collection(value, hint, wrong, place)
    check_value(value, name, hint, place)
    return value


def check_value(value, name, hint, place):
    """Refuse a value outside of its key's choices or range. Raises UsageError."""
    meta, options = FIELDS[name].metadata, choices(name)
    if options and value not in options and name != "loss_type":  # check_config knows why another loss cannot be used
        near = difflib.get_close_matches(str(value), options, n=1)
        raise UsageError(f"{place}: expected one of {', '.join(options)}, found {one_line(repr(value), 80)}"
                         + (f"; did you mean {near[0]!r}?" if near else ""))
    if meta["low"] is not None and value < meta["low"]:
        raise UsageError(f"{place}: expected {describe(hint)} of at least {meta['low']}, found {value}")
    high = meta["high"] if meta["high"] is not None else {int: 2**31 - 1, float: 1e12}.get(hint)
    if high is not None and value > high:
        raise UsageError(f"{place}: expected {describe(hint)} of at most {high}, found {value}")


def is_text(value):
    """Whether a value is text that can be a name or a path: not blank, and only characters that a file name can have."""
    return isinstance(value, str) and value.strip() != "" and not re.search("[\0\ud800-\udfff]", value)


def convert_text(value, options, wrong):
    """Text from text, or from a boolean where a word for it is meant. options: the key's choices.  wrong: what to raise."""
    if isinstance(value, bool):  # YAML reads save_strategy: no as false; resume_from_checkpoint may be false
        value = "no" if not value and "no" in options else str(value).lower()
    if isinstance(value, (int, float, datetime.date)):  # YAML reads 0123 as 83, so what the user wrote is lost
        raise UsageError(f"{wrong}; put it in quotes")
    if not is_text(value):
        raise wrong
    return os.path.expanduser(value)  # a shell leaves the ~ of --output_dir=~/runs as it is


def convert_number(value, hint, wrong):
    """A finite int or float, as hint says, from a number or text. wrong: what to raise."""
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
    """list[str] from a list or "a,b"; dict[str, X] from a mapping or "{a: 1}". wrong: what to raise."""
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
    if item is object:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):  # a date, or not a number
            raise wrong
        return value
    if item is bool:
        if not all(isinstance(v, bool) for v in value.values()):
            raise wrong
        return value
    return {os.path.expanduser(k): convert_number(v, item, wrong) for k, v in value.items()}


def describe(hint):
    """A type in words."""
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", list[str]: "a list of names",
            dict[str, float]: "a mapping of names to numbers", dict[str, bool]: "a mapping of names to true or false",
            dict[str, object]: "a mapping of names to values that JSON has"}[hint]


# ----------------------------------------------------------------------------------------------------------------------
# All values together

def check_accepted(values, places, config):
    """Refuse keys of Accepted that ask for something that is not done. places: {key: where it is set}. Raises UsageError."""
    for name, value in values.items():
        if name in UNSUPPORTED and value not in (None, FIELDS[name].default) and (name != "lora_dropout" or config.use_peft):
            value = str(value).lower() if isinstance(value, bool) else one_line(value, 80)
            raise UsageError(f"{places[name]}: {name}={value} cannot be honoured: {UNSUPPORTED[name]}")
    if values.get("torch_dtype") == "bfloat16" and not config.bf16:
        raise UsageError(f"{places['torch_dtype']}: torch_dtype bfloat16 needs bf16: true, which trains with fp32 weights "
                         "in the optimiser")
    for name in values.get("gradient_checkpointing_kwargs") or ():
        if name not in ("use_reentrant", "preserve_rng_state"):
            raise UsageError(f"{places['gradient_checkpointing_kwargs']}, gradient_checkpointing_kwargs: expected "
                             f"use_reentrant or preserve_rng_state, found {one_line(repr(name), 80)}")


def check_config(config, path):
    """Check what concerns several keys, and what is installed. path: for the messages. Raises UsageError."""
    for name in REQUIRED:
        if getattr(config, name) is None:
            raise UsageError(f"{path}: {name} is missing: set it there, or say --{name}=…")
    if config.max_steps == 0 or config.num_train_epochs == 0:
        name = "max_steps" if config.max_steps == 0 else "num_train_epochs"
        raise UsageError(f"{path}: nothing to do, because {name} is 0: raise it, or leave it out")
    if config.attn_implementation == "flex_attention" and not torch.accelerator.is_available():  # torch cannot train with it
        raise UsageError(f"{path}: attn_implementation flex_attention needs a GPU; on a CPU say sdpa or eager")
    check_data(config, path)
    check_sft(config, path)
    check_adpo(config, path)
    check_adapter(config, path)
    check_services(config, path)


def check_data(config, path):
    """Check lengths, sources and splits. Raises UsageError."""
    if config.max_prompt_length >= config.max_length:
        raise UsageError(f"{path}: max_prompt_length {config.max_prompt_length} leaves no room for a response in "
                         f"max_length {config.max_length}")
    for source, share in config.dataset_mixer.items():
        if not 0 < share <= 1:
            raise UsageError(f"{path}, dataset_mixer: the share of {one_line(source, 80)} must be over 0 and at most 1, "
                             f"found {share}")
    if config.dataset_configs and len(config.dataset_configs) != len(config.dataset_mixer):
        raise UsageError(f"{path}: dataset_configs needs one name for each of the {len(config.dataset_mixer)} sources")
    for split in config.dataset_splits:
        if not any(word in split for word in ("train", *EVALUATION_SPLITS)):
            raise UsageError(f"{path}, dataset_splits: {one_line(repr(split), 80)} must contain one of train, "
                             f"{', '.join(EVALUATION_SPLITS)}")
        if re.search(r"[\[+]", split):  # a single file, which stands for each name, would be taken whole
            raise UsageError(f"{path}, dataset_splits: {one_line(repr(split), 80)} is not the name of one whole split; "
                             "dataset_mixer and max_train_samples take parts of them")
        if config.dataset_splits.count(split) > 1:
            raise UsageError(f"{path}, dataset_splits: {one_line(repr(split), 80)} is listed twice, so its pairs would "
                             "count twice")
    if not any("train" in split for split in config.dataset_splits):
        raise UsageError(f"{path}, dataset_splits: no name contains `train`, so there is nothing to train on: add one")


def check_adpo(config, path):
    """Check the loss, whom to ask and who answers. Raises UsageError."""
    if refusal := why_not_gated(one_line(config.loss_type, 80)):
        raise UsageError(f"{path}: {refusal}")
    if config.label_smoothing and config.loss_type != "sigmoid":
        raise UsageError(f"{path}: label_smoothing is defined for loss_type sigmoid, not {config.loss_type}: leave it out")
    if config.ties == "half" and config.loss_type != "sigmoid":
        raise UsageError(f"{path}: ties half is defined for loss_type sigmoid, not {config.loss_type}: leave it out")
    if config.label_budget:
        if config.label_budget > 1 and config.label_budget % 1:
            raise UsageError(f"{path}, label_budget: expected a share of the labels up to 1 or a whole number of them, "
                             f"found {config.label_budget:g}")
        if config.loss_type != "sigmoid":
            raise UsageError(f"{path}: label_budget trains on soft labels, which only loss_type sigmoid takes, not "
                             f"{config.loss_type}: leave loss_type out")
        for name, why in NOT_WITH_A_BUDGET.items():
            if getattr(config, name) != FIELDS[name].default:
                raise UsageError(f"{path}: {name} does not go with label_budget, because {why}: leave one of them out")
    for name, other in ONLY_WITH.items():
        if getattr(config, name) != FIELDS[name].default and getattr(config, other) is None:
            raise UsageError(f"{path}: {name} decides nothing without {other}: set that, or leave {name} out")
    if config.after_budget == "pseudo_label" and not config.pseudo_labels:
        raise UsageError(f"{path}: after_budget pseudo_label does not go with pseudo_labels false: leave one of them out")
    judged = config.judge_url or config.judge_model
    if judged and config.oracle in ("dataset", "human"):
        raise UsageError(f"{path}: nobody asks the judge {one_line(judged, 80)}, because oracle is {config.oracle}: say "
                         "--oracle=judge, or leave judge_url and judge_model out")
    for name in annotator_class(config).needs:
        if getattr(config, name) is None:
            kind = f" ({config.judge})" if config.oracle == "judge" else ""
            raise UsageError(f"{path}: oracle {config.oracle}{kind} needs {name}: say --{name}=…")
    for name in ("model", "messages", "stream", "n"):
        if name in (config.judge_extra_body or ()):
            raise UsageError(f"{path}, judge_extra_body: {name} is set by the run; leave it out")
    try:
        Rubric(config.judge_prompt)
    except ValueError as error:
        raise UsageError(f"{path}: {error}")
    if (config.judge_prompt_price is None) != (config.judge_completion_price is None):
        raise UsageError(f"{path}: judge_prompt_price and judge_completion_price go together; set both or neither")


def check_sft(config, path):
    """SFT has no preferences: the keys about them must keep their defaults. Raises UsageError."""
    if config.objective != "sft":
        return
    preference = KEYS[KEYS.index("beta"):KEYS.index("per_device_train_batch_size")]  # the groups ADPO and Who answers
    for name in [*preference, "ref_model_name_or_path"]:
        if getattr(config, name) != FIELDS[name].default:
            raise UsageError(f"{path}: {name} cannot be honoured with objective sft: it has no reference, no margin and no "
                             "label to ask for; leave it out")


def check_adapter(config, path):
    """Check what an adapter and 4-bit weights need. Raises UsageError."""
    for name in ("merge_adapter", "load_in_4bit"):
        if getattr(config, name) and not config.use_peft:
            raise UsageError(f"{path}: {name} goes with use_peft: true, which trains an adapter")
    if config.load_in_4bit and (importlib.util.find_spec("bitsandbytes") is None or not torch.cuda.is_available()):
        raise UsageError(f"{path}: load_in_4bit needs a GPU and the package bitsandbytes (pip install bitsandbytes); "
                         "without them say load_in_4bit: false")
    if config.use_peft and importlib.util.find_spec("peft") is None:
        raise UsageError(f"{path}: use_peft needs the package peft: pip install -r tools/requirements.txt")


def check_services(config, path):
    """Check that metrics and the model can go where the config wants them. Raises UsageError."""
    packages = {"tensorboard": "tensorboard", "wandb": "wandb", "csv_monitor": None, "none": None}
    for service in config.report_to:
        if service not in packages:
            raise UsageError(f"{path}, report_to: expected some of {', '.join(packages)}, found "
                             f"{one_line(repr(service), 80)}")
        if packages[service] and importlib.util.find_spec(packages[service]) is None:
            raise UsageError(f"{path}, report_to: {service} is not installed: pip install {service}, or --report_to=none")
    if not config.push_to_hub:
        return
    from huggingface_hub import constants, get_token
    if get_token() is None:
        raise UsageError(f"{path}: push_to_hub needs a login: run `hf auth login`, or say --push_to_hub=false")
    if constants.HF_HUB_OFFLINE:
        raise UsageError(f"{path}: push_to_hub is true, but HF_HUB_OFFLINE is set: unset it, or say --push_to_hub=false")
    if not is_repo_id(hub_name(config)):
        raise UsageError(f"{path}: push_to_hub: {one_line(hub_name(config), 80)} cannot be the name of a model on the hub: "
                         "say --hub_model_id=USER/NAME, with letters, digits, -, _ and .")
