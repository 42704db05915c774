"""Train a language model with Active DPO: one visible loop around `deepspeed.initialize`.

    deepspeed train.py --config configs/quickstart.yaml [--key value | --key=value] …
    python train.py --config …                            the same in one process, without the launcher
    python train.py --help                                every key

Read `main` first: data, policy and reference, oracle, loop, end. The maths is in adpo.py, the keys in config.py.

Departures from the paper: none in the loop. Departures from the official code: no Trainer and no trl; an unknown key ends
the run; the reference is scored once and cached, so that no second model is resident; evaluation uses true labels and
never the gate; metrics are those of all ranks; a run is resumed exactly.

Legend: B pairs of a micro-batch, T tokens of a row, N response tokens, V vocabulary, H hidden size.
"""

import contextlib
import copy
import dataclasses
import errno
import gc
import hashlib
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # `map` forks; threads in the tokeniser would be lost there
os.environ.setdefault("DEEPSPEED_TIMEOUT", "60")  # minutes: ranks wait while rank 0 tokenises, or uploads the model
if torch.accelerator.current_accelerator() is None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # spares DeepSpeed's search for one, and its warnings

import deepspeed
import huggingface_hub
import pydantic
import torch.distributed as dist
import transformers
import yaml
from deepspeed.accelerator import get_accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tqdm import tqdm

import adpo
import data
import gate
import judge
import oracle
import shards
import toy
from config import FREE_ON_RESUME, HERE, REFUSED, UsageError, help_text, hub_name, is_repo_id, parse_config

# ----------------------------------------------------------------------------------------------------------------------
# Ranks, engine, model

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


def engine_config(config, world):
    """DeepSpeed's config: ds_config.json with each "auto" filled in from the YAML, which owns that number."""
    path = Path(config.deepspeed)
    path = path if path.exists() else HERE / path  # configs/ name their engine from here
    try:
        ds = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=data.unique_keys)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"deepspeed {config.deepspeed}: cannot be read ({getattr(error, 'strerror', None) or error})")
    except json.JSONDecodeError as error:
        raise UsageError(f"{config.deepspeed}, line {error.lineno}: not JSON ({error.msg})")
    except ValueError as error:
        raise UsageError(f"{config.deepspeed}: {error}")
    if not isinstance(ds, dict) or not isinstance(ds.get("zero_optimization", {}), dict):
        raise UsageError(f"{config.deepspeed}: expected an engine config, an object whose zero_optimization is one too")
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
    check_engine_config(ds, config)
    zero = ds.setdefault("zero_optimization", {})
    offloads = any(zero.get(f"offload_{what}", {}).get("device", "none") != "none" for what in ("optimizer", "param"))
    if world == 1 and not config.bf16 and zero.get("stage", 0) in (1, 2) and not offloads:
        zero["stage"] = 0  # one process has nobody to share its optimiser with, only a second copy of all weights to keep
    if config.bf16 and zero.get("stage", 0) == 0:
        say("ZeRO 0 with bf16 would update bf16 weights, where a small step is lost: running as ZeRO 1, with fp32 weights")
        zero["stage"] = 1
    if config.optim == "rmsprop":
        ds["zero_allow_untested_optimizer"] = True  # DeepSpeed vouches for Adam under ZeRO alone, but treats them alike
    ds.setdefault("steps_per_print", 10**9)  # the run prints its own lines
    output = {"enabled": True, "output_path": config.output_dir}
    services = {"tensorboard": {**output, "job_name": "tensorboard"}, "csv_monitor": {**output, "job_name": "csv"},
                "wandb": {"enabled": True, "project": os.environ.get("WANDB_PROJECT", "adpo")}}
    ds.update({name: services[name] for name in config.report_to if name != "none"})
    return ds


def check_engine_config(ds, config):
    """Refuse, in one line, an engine config that DeepSpeed itself cannot read, and settings that would make a check of this
    program blind or that it cannot honour; as DeepSpeed reads them, so that "no" counts as false."""
    place = config.deepspeed
    try:
        sizes = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}  # what they are is not known yet
        read = deepspeed.DeepSpeedConfig(copy.deepcopy({k: v for k, v in ds.items() if k != "train_batch_size"} | sizes))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UsageError(f"{place}: {f'field {field} of ' if field else ''}{error.title}: {one_line(first['msg'])}, found "
                         f"{first['input']!r:.80}")
    except Exception as error:  # DeepSpeed asserts, compares and looks up; whatever it says, it is about this file
        raise UsageError(f"{place}: DeepSpeed cannot read it ({type(error).__name__}: {one_line(error)[:300]})")
    bf16, zero = read.bfloat16_config, read.zero_config
    taken = "a step whose gradient is no finite number would be taken"
    for name, refused, reason in (
            ("fp16", read.float16_config.enabled, REFUSED["fp16"]),
            ("torch_autocast", read.torch_autocast_enabled, "the YAML's bf16 says what is computed in"),
            ("bf16.check_grad_overflow false", config.bf16 and not bf16.check_grad_overflow, taken),
            ("zero_optimization.compute_grad_norm false", not zero.compute_grad_norm, taken),
            ("bf16.bf16_master_weights_and_grads", bf16.bf16_master_weights_and_grads, "small steps would be lost"),
            ("zero_optimization.offload_optimizer.device nvme",
             zero.offload_optimizer and zero.offload_optimizer.device == "nvme",
             "checkpoints do not hold what lies there; offload to the cpu")):
        if refused:
            raise UsageError(f"{place}: {name} cannot be honoured: {reason}")
    if bf16.enabled != config.bf16:
        raise UsageError(f"{place}: bf16 is {bf16.enabled}, but the YAML says {config.bf16}; write "
                         "\"bf16\": {\"enabled\": \"auto\"}")


def initialize(module, optimizer, ds, place):
    """DeepSpeed's engine. What it finds wrong with the settings only now, together with this optimiser, is one line too."""
    try:
        return deepspeed.initialize(model=module, optimizer=optimizer, config=ds)[0]
    except (ValueError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"{place}: DeepSpeed cannot start with it ({type(error).__name__}: {one_line(error)[:300]})")


def decisive(ds):
    """What of an engine config the result depends on: all but how the work is shared out and what is printed."""
    free = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "zero_optimization",
            "steps_per_print", "tensorboard", "csv_monitor", "wandb", "comet", "wall_clock_breakdown", "memory_breakdown",
            "dump_state", "comms_logger", "flops_profiler", "activation_checkpointing", "aio"}
    return {name: value for name, value in ds.items() if name not in free}


def load_tokenizer(config):
    name = config.tokenizer_name_or_path or config.model_name_or_path
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, revision=config.model_revision, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a damaged file of a folder may raise anything
        raise cannot_load("tokenizer", name, error)
    if config.chat_template:
        try:
            is_file = config.chat_template.endswith(".jinja")
            template = Path(config.chat_template).read_text(encoding="utf-8") if is_file else config.chat_template
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"chat_template {config.chat_template}: cannot be read ({one_line(error)})")
        tokenizer.chat_template = template
    return tokenizer


def cannot_load(what, name, error):
    """UsageError in one line about a model or tokenizer that transformers does not load."""
    why = one_line(error)
    if "trust_remote_code=True" in why:
        why = "it needs code of its own: read that code, then say --trust_remote_code=true to run it"
    elif "model.safetensors" in why:
        why += "; weights are read from safetensors alone"
    elif not os.path.exists(name):
        why = f"there is no such folder here, and as a name on the hub: {why}"
    return UsageError(f"{what} {name}: cannot be loaded ({type(error).__name__}: {why[:500]})")


def check_models(config, tokenizer):
    """Refuse, before the data is read, an encoder and a model with fewer embeddings than the tokenizer has tokens."""
    names = transformers.models.auto.modeling_auto
    tokens = max(tokenizer.get_vocab().values()) + 1
    for name in filter(None, (config.model_name_or_path, config.ref_model_name_or_path)):
        name, revision, _ = resolve_model(config, name)
        try:
            model = transformers.AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=config.trust_remote_code)
        except Exception as error:  # as above
            raise cannot_load("model", name, error)
        decoder = getattr(model, "is_decoder", False) or getattr(model, "is_encoder_decoder", False)
        known = model.model_type in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(model, "auto_map")
        if not known or model.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder:
            raise UsageError(f"model {name}: {model.model_type} is no causal language model; it takes one that writes text "
                             "from left to right")
        size = getattr(model.get_text_config(), "vocab_size", tokens)
        if tokens > size:
            raise UsageError(f"model {name}: has embeddings for {size:,} tokens, but the tokenizer has {tokens:,}: take the "
                             "model's own tokenizer, or resize the embeddings (resize_token_embeddings) and save the model")


def one_line(error):
    return " ".join(str(error).split())


def resolve_model(config, name):
    """(model, its revision, None); of an adapter, (the model that it was trained on, its revision, the adapter's folder)."""
    try:
        path = transformers.utils.find_adapter_config_file(name, revision=config.model_revision)
        if path is None:
            return name, config.model_revision, None
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        base, revision = settings["base_model_name_or_path"], settings.get("revision") or "main"
    except Exception as error:  # as above
        raise cannot_load("model", name, error)
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"model {name}: is an adapter, which needs the package peft: pip install -r requirements-extra.txt")
    return base, revision, Path(path).parent


def load_weights(config, name, revision, in_4bit=False):
    """The causal LM, in the dtype that it is trained in."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    quantised = {}
    if in_4bit:
        quantised = {"device_map": {"": get_accelerator().current_device_name()},
                     "quantization_config": transformers.BitsAndBytesConfig(
                         load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type=config.bnb_4bit_quant_type,
                         bnb_4bit_use_double_quant=config.use_bnb_nested_quant)}
    try:
        lm, loading = transformers.AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True, **quantised,
            attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code, use_safetensors=True)
    except Exception as error:  # as above
        raise cannot_load("model", name, error)
    if loading["missing_keys"]:  # transformers draws them at random
        raise UsageError(f"model {name}: its weights lack {sorted(loading['missing_keys'])[0]} "
                         f"({len(loading['missing_keys'])} in all); it takes a causal language model, saved whole")
    return lm


def add_adapter(config, lm):
    """Put LoRA weights into the layers of `lm`, in place, and freeze all others. Their output is 0 until they are trained,
    so that the policy before its first step is the model that was loaded."""
    import peft
    targets = config.lora_target_modules
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=config.lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets, modules_to_save=config.lora_modules_to_save)
    try:
        peft.get_peft_model(lm, settings)
    except ValueError as error:
        raise UsageError(f"lora_target_modules {targets}: {one_line(error)}; layers of {type(lm).__name__} are needed, or "
                         "all-linear")


def load_adapter(config, lm, name, trained):
    """`lm` with the adapter `name` in its layers, to be trained further; where all weights are trained, merged into them."""
    import peft
    try:
        adapted = peft.PeftModel.from_pretrained(lm, name, revision=config.model_revision, is_trainable=config.use_peft)
        if not config.use_peft:
            return adapted.merge_and_unload().requires_grad_(True)  # peft has frozen them
    except Exception as error:  # as above
        raise cannot_load("adapter", name, error)
    if not trained:
        return lm
    settings = lm.peft_config["default"]
    if settings.peft_type != "LORA":
        raise UsageError(f"adapter {name}: its kind is {settings.peft_type}, and LoRA alone is trained further; with "
                         "use_peft: false it is merged, and all weights are trained")
    say(f"the adapter {name} is trained further, as it is (rank {settings.r}, alpha {settings.lora_alpha}); the lora_ keys "
        "make a new one")
    return lm


def load_model(config, name, trained=True):
    """The causal LM inside the module that the engine wraps, with its adapter where one is trained, dropout off."""
    torch.manual_seed(config.seed)
    base, revision, adapter = resolve_model(config, name)
    lm = load_weights(config, base, revision, config.load_in_4bit)
    if adapter:
        lm = load_adapter(config, lm, name, trained)
    elif config.use_peft and trained:
        add_adapter(config, lm)
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():  # some models keep the rate and call the function
            if "dropout" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
    if config.gradient_checkpointing:
        recompute_activations(lm, config.gradient_checkpointing_kwargs)
        if config.gradient_checkpointing_kwargs.get("use_reentrant"):
            lm.enable_input_require_grads()  # or the reentrant kind sees no input that needs a gradient
    return adpo.PairLogps(lm, config.logits_chunk_size)


def recompute_activations(lm, options):
    """Activation checkpointing by either of its names: transformers before 5.21 has the older one alone."""
    new = hasattr(lm, "activation_checkpointing_enable")
    (lm.activation_checkpointing_enable if new else lm.gradient_checkpointing_enable)(options)


def weights_fingerprint(config, name):
    """Hash of a model's weights: the commit of a hub model, the content of a folder's files. Of an adapter, of both."""
    base, revision, adapter = resolve_model(config, name)
    if Path(base).exists():
        found = folder_fingerprint(base)
    else:  # loaded before this from the hub's cache, whose folders have the names of commits
        found = f"{base}@{Path(huggingface_hub.try_to_load_from_cache(base, 'config.json', revision=revision)).parent.name}"
    if adapter:
        # Merged, log-probs are not the same to the last bit.
        found += f" {'+' if config.use_peft else 'merged with'} {folder_fingerprint(adapter)}"
    if config.load_in_4bit:
        found += f", {config.bnb_4bit_quant_type}{' nested' if config.use_bnb_nested_quant else ''}"
    return found


def folder_fingerprint(folder):
    digest = hashlib.blake2b(digest_size=16)
    names = [name for name in ("config.json", "adapter_config.json") if (Path(folder) / name).is_file()]
    for path in sorted([*Path(folder).glob("*.safetensors"), *(Path(folder) / name for name in names)]):
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
    return torch.optim.AdamW(groups, lr=config.learning_rate, fused=True)


def learning_rate(step, total, config):
    """Learning rate of optimiser step `step` (from 0) of `total`, as transformers' schedules have it."""
    warmup = math.ceil(total * config.warmup_ratio) if config.lr_scheduler_type != "constant" else 0
    if step < warmup:
        return config.learning_rate * step / warmup
    progress = (step - warmup) / max(1, total - warmup)
    factor = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}.get(config.lr_scheduler_type, 1.0)
    return config.learning_rate * factor


def pairs_a_step(config, world):
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * world


def set_learning_rate(engine, step, total, config):
    """Give the engine the learning rate of a step. Returns it."""
    lr = learning_rate(step, total, config)
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
    return lr


class Schedule:
    """Which pairs each optimiser step takes, and how they are dealt out to ranks and micro-steps."""

    def __init__(self, config, pairs, world):
        self.pairs, self.world, self.config = pairs, world, config
        self.step_pairs = pairs_a_step(config, world)
        self.epoch_steps = math.ceil(len(pairs) / self.step_pairs)
        self.total_steps = (config.max_steps if config.max_steps > 0
                            else math.ceil(config.num_train_epochs * self.epoch_steps))
        self._order = (None, None)

    def rows(self, step):
        """Indices of the pairs of a step. The last step of an epoch takes what is left: each pair once an epoch."""
        epoch, within = divmod(step, self.epoch_steps)
        if self._order[0] != epoch:
            self._order = (epoch, data.epoch_order(self.pairs.lengths, epoch, self.config.seed, self.step_pairs,
                                                   self.config.group_by_length))
        return self._order[1][within * self.step_pairs:(within + 1) * self.step_pairs]

    def micro_batches(self, step, rows=None):
        """This rank's micro-batches of a step (or of these rows): lists of indices, some empty; as many on each rank."""
        rows = self.rows(step) if rows is None else rows
        return my_batches(rows, self.pairs, self.config.per_device_train_batch_size, self.world, self.config)

    def visits(self, step):
        """How many pairs come before a step, each as often as it comes."""
        epoch, within = divmod(step, self.epoch_steps)
        return epoch * len(self.pairs) + within * self.step_pairs

    def pairs_seen(self):
        """How many different pairs the run comes to."""
        return min(len(self.pairs), self.total_steps * self.step_pairs)

    def unlabelled_left(self, step, bought):
        """About how often the run still comes to a pair without a label. bought: labels so far."""
        end, total = (step // self.epoch_steps + 1) * self.epoch_steps, self.total_steps
        here = self.visits(min(end, total)) - self.visits(step)
        later = self.visits(total) - self.visits(min(end, total))
        unlabelled = 1 - bought / len(self.pairs)
        return here * (1 if step < self.epoch_steps else unlabelled) + later * unlabelled

    def engine_batches(self):
        """The batch sizes as the engine is to know them: a long step has more micro-steps than the config says."""
        most = max(len(self.micro_batches(step)) for step in range(self.total_steps))
        if self.config.pseudo_labels == "replay":  # any pairs may meet in a step
            longest = sorted(range(len(self.pairs)), key=lambda row: -self.pairs.lengths[row])[:self.step_pairs]
            most = max(most, len(self.micro_batches(None, longest)))
        micro = self.config.per_device_train_batch_size
        return {"gradient_accumulation_steps": most, "train_batch_size": micro * most * self.world}

    def training_batches(self):
        """This rank's micro-batches of one pass over all the pairs that the run will see."""
        return [rows for step in range(min(self.total_steps, self.epoch_steps)) for rows in self.micro_batches(step)]


def my_batches(rows, pairs, batch_size, world, config):
    """This rank's share of these pairs, in batches of at most batch_size pairs and as many tokens as the config allows."""
    most_tokens = config.micro_batch_tokens or (1024 if get_accelerator().device_name() == "cpu" else 16384)
    return [ranks[rank()] for ranks in data.split_batch(rows, pairs.lengths, world, batch_size, most_tokens)]


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
    dist.all_reduce(logps)
    dist.all_reduce(seen)
    return logps.where(seen > 0, torch.nan).cpu()


def reference_logps(engine, parts, weights, shared):
    """log π_ref of all pairs of the run, from the cache on disk or computed once. `parts`: {name: (pairs, batches)}.

    The batches are those that training and evaluation will use, and part of the cache's key: how a batch is padded shows
    in the last bits of a log-prob, and at step 0 every margin is to be 0, not nearly 0.
    """
    cache = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")) / "adpo"
    scores = {}
    for name, (pairs, batches) in parts.items():
        depends = [data.VERSION, weights, pairs.fingerprint, str(next(engine.module.parameters()).dtype), shared,
                   engine.module.lm.config._attn_implementation, all_gather(batches)]
        path = cache / f"reference-{hashlib.sha256(json.dumps(depends).encode()).hexdigest()[:32]}.safetensors"
        found = [cached_logps(path) if rank() == 0 else None]
        dist.broadcast_object_list(found, src=0, device=engine.device)  # rank 0's disk decides for all hosts
        if found[0] is None:
            found[0] = score(engine, pairs, batches, shared, f"reference log-probs ({name})")
            if rank() == 0:
                with writing(path, temporary := path.with_suffix(f".{os.getpid()}.tmp")):
                    cache.mkdir(parents=True, exist_ok=True)
                    save_file({"logps": found[0], "crc": crc(found[0])}, temporary)
                    os.replace(temporary, path)
        scores[name] = found[0]
    return scores


def crc(tensor):
    """CRC-32 of a tensor's bytes, as a tensor."""
    return torch.tensor(zlib.crc32(tensor.numpy().tobytes()))


def cached_logps(path):
    """The log-probs in a file of the cache, or None where there is none that is whole, said so where it is damaged."""
    if not path.is_file():
        return None
    try:
        found = load_file(path)
        if "crc" in found and found["crc"] != crc(found["logps"]):  # files of before have none
            raise ValueError("its checksum differs")
        return found["logps"]
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        say(f"{path} is damaged ({one_line(error)}): the log-probs of the reference are computed again")
        return None


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
    limit = 0.15 if next(engine.module.parameters()).dtype == torch.bfloat16 else 1e-3
    if not error <= limit:
        raise UsageError(f"{type(engine.module.lm).__name__}: log-probs of pair {pairs.ids[row]} differ from a plain "
                         f"forward by {error:.2g} nats a token (limit {limit:.2g}): this architecture, version of "
                         "transformers or attn_implementation is not supported; try --attn_implementation=eager")


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


def reduced(sums):
    """Metric sums over all ranks, as a list."""
    sums = sums.clone()
    dist.all_reduce(sums)
    return sums.tolist()


def means(sums):
    """({metric: mean}, tokens) of reduced sums. The loss is over all pairs, the rest over those with a label."""
    pairs, labelled, tokens, loss, *rest = sums
    return {"loss": loss / max(pairs, 1)} | {k: v / max(labelled, 1) for k, v in zip(METRICS[1:], rest)}, tokens


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
    return means(reduced(sums))[0]


class Log:
    """metrics.jsonl and DeepSpeed's monitor, from rank 0.  step: the last that is kept of what was there; −1: nothing is."""

    def __init__(self, output, engine, step):
        self.path, self.monitor = output / "metrics.jsonl", engine.monitor if engine.monitor.enabled else None
        engine.monitor.enabled = False  # for the engine, which logs against samples: wandb would drop our steps behind those
        if rank() == 0:  # a resumed run writes the steps behind its checkpoint again
            lines = self.path.read_text(errors="replace").splitlines() if self.path.is_file() else []
            lines = [line for n, line in enumerate(lines, 1) if self.stands(n, line, step)]
            replace_text(self.path, "".join(line + "\n" for line in lines))
            if self.monitor:
                self.catch_up([json.loads(line) for line in lines], step)

    def stands(self, n, line, step):
        """Whether a line is a row of an optimiser step up to `step`. One that is no row is dropped, and said so."""
        try:
            return json.loads(line)["step"] <= step
        except (ValueError, KeyError, TypeError):
            say(f"{self.path}, line {n}: cut off or damaged, dropped")
            return False

    def catch_up(self, rows, step):
        """Let the services hold the rows that stand and nothing behind them: TensorBoard is told what to forget, the CSV
        files are written anew, and a run of wandb, which cannot forget, is a new one that begins with these rows."""
        if writer := getattr(self.monitor.tb_monitor, "summary_writer", None):
            from tensorboard.compat.proto.event_pb2 import Event, SessionLog
            writer.file_writer.add_event(Event(session_log=SessionLog(status=SessionLog.START)), step + 1)
        if self.monitor.csv_monitor:
            for path in Path(self.monitor.csv_monitor.log_dir).glob("*.csv"):
                path.unlink()
        for service in filter(None, (self.monitor.csv_monitor, self.monitor.wandb_monitor)):
            for row in rows:
                service.write_events(self.events(row))

    def events(self, row):
        return [(f"{row['split']}/{name}", value, row["step"]) for name, value in row.items()
                if isinstance(value, (int, float)) and name != "step"]

    def write(self, row):
        """row: {metric: value}. A number that is not finite becomes null: JSON has no word for it."""
        if rank() == 0:
            row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
            with writing(self.path), open(self.path, "a") as file:
                file.write(json.dumps(row) + "\n")
            if self.monitor:
                self.monitor.write_events(self.events(row))


@contextlib.contextmanager
def writing(path, scrap=None):
    """Around what writes a file or a folder. On a disk that takes no more, UsageError in one line; whatever goes wrong, the
    half-written `scrap`, a file or a folder, is removed."""
    try:
        yield
    except BaseException as error:
        if scrap and scrap.is_dir():
            shutil.rmtree(scrap, ignore_errors=True)
        elif scrap and scrap.exists():
            scrap.unlink()
        if "inline_container" in str(error):  # torch.save's way to say so
            reason = "the disk took only a part"
        elif isinstance(error, (OSError, SafetensorError)):
            reason = getattr(error, "strerror", None) or one_line(error)
        else:
            raise
        raise UsageError(f"{path}: cannot be written ({reason}): make room, or make it writable; then the same command goes "
                         "on from the last checkpoint")


def check_writable(output):
    """Refuse an output_dir where nothing can be written, before hours are spent."""
    there = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {output}: nothing can be written in {there}: make it writable, or choose another one")


def replace_text(path, text):
    """Write a file so that it is the old one or the new one, whatever happens."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path, temporary):
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


def checksums(folder):
    """{file: [bytes, CRC-32]} of a checkpoint but for trainer_state.json. All ranks call it together and share the work."""
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    mine = {}
    for name in [name for name in names if name != "trainer_state.json"][rank()::dist.get_world_size()]:
        size = crc = 0
        with open(folder / name, "rb") as file:
            while block := file.read(1 << 24):
                size, crc = size + len(block), zlib.crc32(block, crc)
            os.fsync(file.fileno())  # on the disk before an older checkpoint goes
        mine[name] = [size, crc]
    return {name: found for part in all_gather(mine) for name, found in part.items()}


def state_text(state):
    """trainer_state.json, with a checksum of its own."""
    return json.dumps({**state, "checksum": zlib.crc32(json.dumps(state).encode())}, indent=2)


def read_state(folder):
    """What trainer_state.json holds. Raises OSError or ValueError where it cannot be read or is not what was written."""
    state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    if not isinstance(state, dict):
        raise ValueError("it holds no keys")
    checksum = state.pop("checksum", None)
    if "files" in state and checksum != zlib.crc32(json.dumps(state).encode()):
        raise ValueError("its checksum differs")
    return state


def damage(folder):
    """What is wrong with a checkpoint, naming the file, or None. All ranks call it together."""
    try:
        expected = read_state(folder).get("files")
    except (OSError, ValueError) as error:
        return f"{folder}/trainer_state.json is damaged ({one_line(error)})"
    if expected is None:
        say(f"{folder} was written before checkpoints had checksums: taken as it is")
        return None
    found = checksums(folder)
    for name, (size, crc) in expected.items():
        if name not in found:
            return f"{folder}/{name} is missing"
        if found[name] != [size, crc]:
            what = f"{found[name][0]:,} of {size:,} bytes" if found[name][0] != size else "its checksum differs"
            return f"{folder}/{name} is damaged ({what})"
    return None


def save_checkpoint(engine, output, state, limit):
    """Write a checkpoint aside, give it its name when it is complete, then drop what save_total_limit does not keep."""
    aside, name = output / ".checkpoint", f"checkpoint-{state['step']}"
    if rank() == 0:
        shutil.rmtree(aside, ignore_errors=True)
    dist.barrier()
    with writing(output / name, aside):
        shards.save(engine, aside / name)
        dist.barrier()
        state = state | {"files": checksums(aside / name)}
    if rank() == 0:
        replace_text(aside / name / "trainer_state.json", state_text(state))
        shutil.rmtree(output / name, ignore_errors=True)
        os.replace(aside / name, output / name)
        shutil.rmtree(aside)
        for step in list(checkpoints(output))[:-limit] if limit else ():
            shutil.rmtree(output / f"checkpoint-{step}")
    dist.barrier()


def newest_whole_checkpoint(output):
    """The folder of the newest checkpoint that is what was written, or None where there is none at all.

    Damaged ones that are newer are renamed, so that nothing takes them for checkpoints again: the run comes to their steps
    once more, with the same answers, which are in the ledger. All ranks call it together.
    """
    for path in [output / ".checkpoint", *sorted(output.glob("checkpoint-*"))]:
        if path.is_dir() and path.suffix != ".damaged" and not (path / "trainer_state.json").is_file():
            say(f"{path} is half-written: skipped")
    damaged = {}
    for folder in reversed(checkpoints(output).values()):
        problem = damage(folder)
        if problem is None:
            break
        damaged[folder] = problem
    else:
        if damaged:
            raise UsageError(f"{'; '.join(damaged.values())}; no other checkpoint is there: restore it, or move it away to "
                             f"start from step 0, with the labels of {output}/labels.sqlite")
        return None
    for bad, problem in damaged.items():
        aside = bad.with_name(f"{bad.name}.damaged")
        say(f"{problem}: set aside as {aside.name}, going back to {folder.name}")
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(bad, aside)
    dist.barrier()
    return folder


def find_checkpoint(config, output):
    """The checkpoint folder to resume from, or None. Raises UsageError where the one that is asked for is damaged."""
    wanted = config.resume_from_checkpoint
    if wanted is not None and wanted.lower() in ("false", "no", "0"):
        if checkpoints(output):
            raise UsageError(f"resume_from_checkpoint false, but {output} holds the checkpoints of a run: choose another "
                             "output_dir, or move that one away")
        return None
    if wanted is None or wanted.lower() in ("true", "yes", "1"):
        newest = newest_whole_checkpoint(output)
        if not newest and wanted is not None:
            raise UsageError(f"resume_from_checkpoint: {output} holds no complete checkpoint")
        return newest
    folder = Path(wanted)
    if not (folder / "trainer_state.json").is_file():
        raise UsageError(f"resume_from_checkpoint {folder}: no complete checkpoint there (no trainer_state.json)")
    if problem := damage(folder):
        raise UsageError(f"resume_from_checkpoint: {problem}: name another one, or none to take the newest that is whole")
    return folder


def check_same_run(config, output, step_pairs):
    """Refuse to go on with a run in output_dir under a config that computes something else. step_pairs: pairs a step."""
    path = output / "config.yaml"
    if not path.is_file():
        return
    try:
        written = yaml.safe_load(path.read_text(encoding="utf-8"))
        before = dict(written["config"])
        dict(written["versions"])  # it ends the file: without it, the file was cut
    except (OSError, ValueError, yaml.YAMLError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}), so that nobody can say whether this is the same run: "
                         "restore it; or, if you are sure, delete it, and it is written anew")
    now = dataclasses.asdict(config)
    for name in now:
        if name not in FREE_ON_RESUME and before.get(name) != now[name]:
            raise UsageError(f"{path}: the run in there has {name} {before.get(name)!r}, this one {now[name]!r}: choose "
                             "another output_dir, or move that one away")
    if written.get("pairs_a_step", step_pairs) != step_pairs:
        raise UsageError(f"{path}: the run in there has {written['pairs_a_step']} pairs a step, this one {step_pairs} "
                         "(per_device_train_batch_size × gradient_accumulation_steps × processes): keep the product, or "
                         "choose another output_dir")


def check_same_start(resume, before, now):
    """Refuse to go on from a checkpoint where something outside the config has changed that the result depends on.

    before, now: {what: value}; before: None in checkpoints that do not have it.
    """
    for name in now if before else ():
        if name in before and before[name] != now[name]:
            raise UsageError(f"{resume}/trainer_state.json: the run in there has {name} {before[name]}, this one "
                             f"{now[name]}: go on as it was, or choose another output_dir")


def leaves_adapter(config):
    """Whether the run leaves an adapter, not a model."""
    return config.use_peft and not config.merge_adapter


def save_adapter(config, lm, state, folder):
    """The adapter as PeftModel.from_pretrained reads it; with merge_adapter, the plain model, the adapter in its weights.

    state: {name: weight} of all that was trained.
    """
    import peft
    settings = lm.peft_config["default"]
    settings.inference_mode = True  # who loads it wants it as it is
    weights = peft.get_peft_model_state_dict(lm, state, save_embedding_layers=False)
    folder.mkdir()
    save_file({f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.save_pretrained(folder)
    if config.merge_adapter:  # into the model as it was loaded, not into the 4 bits of it
        base, revision, _ = resolve_model(config, config.model_name_or_path)
        merged = peft.PeftModel.from_pretrained(load_weights(config, base, revision), folder).merge_and_unload()
        merged.save_pretrained(folder)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).unlink()


def save_model(engine, tokenizer, output, config):
    """The trained model, or its adapter, in Hugging Face form, gathered over ranks; each file is put in place when it is
    complete. Returns their names, on rank 0."""
    state = {}
    for name, parameter in engine.module.lm.named_parameters():
        if not parameter.requires_grad and config.use_peft:
            continue  # what was not trained is where it was loaded from
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    if rank() == 0:
        transformers.utils.logging.disable_progress_bar()
        staging = output / ".model"
        shutil.rmtree(staging, ignore_errors=True)
        with writing(output / "model.safetensors", staging):
            if config.use_peft:
                save_adapter(config, engine.module.lm, state, staging)
            else:
                engine.module.lm.save_pretrained(staging, state_dict=state)
            tokenizer.save_pretrained(staging)
            names = sorted(path.name + "/" * path.is_dir() for path in staging.iterdir())
            for name in names:
                os.replace(staging / name, output / name)
        staging.rmdir()
    dist.barrier()
    return names if rank() == 0 else None


def draw_curves(output):
    """Write curves.png, what tools/plot.py draws, where matplotlib is installed. Returns the names of what it wrote."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from tools import plot
    try:
        figure = plot.draw({output.name: plot.read_metrics(output)})
    except plot.PlotError as error:
        say(f"no curves: {error}")
        return []
    with writing(output / "curves.png"):
        plot.save(figure, output / "curves.png")
    return ["curves.png"]


def on_hub(name):
    """Whether a model or a data set is one of the hub's: what is a path here means nothing there."""
    return is_repo_id(name) and not Path(name).exists()


def front_matter(config, summary):
    """What the hub reads of a model card, as YAML."""
    front = {"library_name": "peft" if leaves_adapter(config) else "transformers",
             "pipeline_tag": "text-generation",
             "tags": ["sft"] if config.objective == "sft" else ["adpo", "dpo", "preference-learning"]}
    sources = [name for name in config.dataset_mixer if on_hub(name)]
    if on_hub(config.model_name_or_path):
        front["base_model"] = config.model_name_or_path
    if sources:
        front["datasets"] = sources
    if len(sources) == len(config.dataset_mixer) == 1 and summary.get("eval_accuracy") is not None:
        front["model-index"] = [{"name": Path(config.output_dir).resolve().name, "results": [{
            "task": {"type": "text-generation", "name": "preference"},
            "dataset": {"type": sources[0], "name": sources[0]},
            "metrics": [{"type": "accuracy", "name": "held-out accuracy of the implicit reward",
                         "value": round(summary["eval_accuracy"], 4)}]}]}]
    return yaml.safe_dump(front, sort_keys=False)


def card_rows(config, summary):
    """{name: value} of a model card's table; None for what there is not."""
    adapter = summary.get("adapter")
    if adapter:
        adapter += ", merged into the weights" if config.merge_adapter else f", on {code(config.model_name_or_path)}"
    data_row = ", ".join(f"{100 * part:.4g} % of {code(name)}" for name, part in config.dataset_mixer.items())
    if config.objective == "sft":
        held_out = "not measured" if summary["eval_loss"] is None else f"{summary['eval_loss']:.4f}"
        return {"data": data_row, "examples": f"{summary['examples']:,}", "held-out loss, nats a token": held_out,
                "adapter": adapter}

    def right(kind):
        return "{:.1%} of them right (95 % interval {:.1%} to {:.1%})".format(summary[f"{kind}_accuracy"],
                                                                             *summary[f"{kind}_interval"])

    pseudo, audited = f"{summary['pseudo_labels']:,}", f"{summary['audited']:,}"
    return {"data": data_row, "pairs": f"{summary['pairs']:,}",
            "labels bought": f"{summary['queries']:,} ({summary['query_fraction']:.1%})",
            "annotator": "judge, " + code(config.judge_model) if config.oracle == "judge" else config.oracle,
            "pseudo-labels": pseudo if summary["pseudo_label_accuracy"] is None else f"{pseudo}, {right('pseudo_label')}",
            "audited pseudo-labels": f"{audited}, {right('audit')}" if summary["audited"] else None,
            "spent on labels": None if summary["cost"] is None else f"{summary['cost']:,.2f}",
            "held-out accuracy of the implicit reward": ("not measured" if summary["eval_accuracy"] is None
                                                         else f"{summary['eval_accuracy']:.3f}"),
            "β, γ": f"{config.beta}, {config.gamma if config.data_selection else 'every pair asked'}", "adapter": adapter}


def model_card(config, summary, command_line, curves):
    """README.md of the trained model.  command_line: what started the run, or None.  curves: names of pictures."""
    how = ("by supervised fine-tuning." if config.objective == "sft" else
           "with Active Direct Preference Optimization ([arXiv 2402.09401](https://arxiv.org/abs/2402.09401)), which asks "
           "for a label only where the policy is unsure.")
    settings = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True).rstrip()
    parts = [
        f"---\n{front_matter(config, summary)}---",
        f"# {code(Path(config.output_dir).resolve().name)}",
        f"Trained from {code(config.model_name_or_path)} {how}",
        "| | |\n| --- | --- |\n" + "\n".join("| {} | {} |".format(name, value.replace("|", "\\|"))
                                            for name, value in card_rows(config, summary).items() if value),
        *(f"![Accuracy, margin, labels and pseudo-labels, against labels bought and steps]({name})" for name in curves),
        "The command:\n\n" + fenced(command_line, "sh") if command_line else "",
        "The config, with " + ", ".join(f"{name} {version}" for name, version in versions().items()) + ":",
        fenced(settings, "yaml")]
    text = "\n\n".join(filter(None, parts)) + "\n"
    if config.judge_url:  # a key may stand in it
        url = urlsplit(config.judge_url)
        text = text.replace(config.judge_url, urlunsplit(url._replace(netloc=url.netloc.rpartition("@")[2], query="")))
    return text.encode("utf-8", "replace").decode()  # a path may hold bytes that are no text


def code(text):
    """A text as a code span of Markdown: nothing in it is markup."""
    text = one_line(text)
    space = " " * ("`" in text)
    return f"{ticks(text, 1)}{space}{text}{space}{ticks(text, 1)}"


def fenced(text, language):
    """A text as a code block of Markdown, whatever is in it."""
    return f"{ticks(text, 3)}{language}\n{text}\n{ticks(text, 3)}"


def ticks(text, least):
    """As many backticks as no run of them in the text has."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def closing_line(summary):
    """The run in one line of plain words."""
    if "examples" in summary:  # SFT
        held_out = [] if summary["eval_loss"] is None else [f"held-out loss {summary['eval_loss']:.4f}"]
        return " · ".join([f"{summary['examples']:,} examples", *held_out, f"{summary['wall_seconds']:.0f} s"])
    share = summary["query_fraction"]
    parts = [f"{summary['queries']:,} of {summary['pairs']:,} labels bought ({share:.0%})".replace("%", " %")]
    if summary["pseudo_label_accuracy"] is not None:
        parts.append(f"pseudo-labels right: {100 * summary['pseudo_label_accuracy']:.1f} %")
    if summary["audited"]:
        low, high = summary["audit_interval"]
        parts.append(f"{summary['audited']:,} audited: {100 * summary['audit_accuracy']:.1f} % right ({100 * low:.1f}–"
                     f"{100 * high:.1f} %)")
    if summary["budget_spent_at_step"] is not None:
        parts.append(f"the budget was spent at step {summary['budget_spent_at_step'] + 1:,}")
    if summary["cost"] is not None:
        parts.append(f"{summary['cost']:,.2f} spent on labels")
    if summary["eval_accuracy"] is not None:
        parts.append(f"held-out accuracy {summary['eval_accuracy']:.3f}")
    if "gold_reward_after" in summary:
        parts.append("gold reward of generations "
                     f"{summary['gold_reward_before']:+.2f} → {summary['gold_reward_after']:+.2f}")
    return " · ".join([*parts, f"{summary['wall_seconds']:.0f} s"])


def read_summary(path):
    """summary.json of a run that has ended. Raises UsageError where it is damaged."""
    try:
        closing_line(summary := json.loads(path.read_text(encoding="utf-8")))
        return summary
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UsageError(f"{path} is damaged ({one_line(error)}): restore it, or delete it, and the same command goes on "
                         "from the last checkpoint and writes it anew")


def write_config(config, output, schedule):
    """The run's folder and its config.yaml."""
    if rank() == 0:
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
        replace_text(output / "config.yaml", yaml.safe_dump(
            {"config": dataclasses.asdict(config), "pairs_a_step": schedule.step_pairs, "versions": versions()},
            sort_keys=False, allow_unicode=True))
    dist.barrier()


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
    """Run `work` on rank 0, then on the first rank of each other host, whose caches may be its own, then on the others, who
    find its result in a cache."""
    turn = 0 if rank() == 0 else 1 if os.environ["LOCAL_RANK"] == "0" else 2
    for n in range(3):
        if n == turn:
            result = work()
        dist.barrier()
    return result


def several_hosts():
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    return here < int(os.environ.get("WORLD_SIZE", "1"))


def is_shared(output):
    """Whether output_dir is one folder for all ranks: what rank 0 writes there, they all see. Makes it."""
    if not several_hosts():
        return True
    probe = output / all_gather(f".seen-by-all-{os.getpid()}")[0]
    if rank() == 0:
        with writing(probe):
            output.mkdir(parents=True, exist_ok=True)
            probe.touch()
    dist.barrier()
    seen = all(all_gather(probe.exists()))
    if rank() == 0:
        probe.unlink()
    return seen


def check_same_pairs(*splits):
    """Refuse to train where the ranks have read different pairs, as hosts with files of their own may."""
    for name, found in zip(("train", "test"), splits):
        if found and len(set(all_gather(found.fingerprint))) > 1:
            raise UsageError(f"the {name} pairs are not the same on all hosts: copy data set and tokenizer from one to the "
                             "others, or put them on a file system that all share")


def setup(config):
    """Threads, log levels and the process group."""
    if config.num_threads:
        torch.set_num_threads(config.num_threads)
    transformers.logging.set_verbosity(getattr(transformers.logging, config.log_level.upper()))
    data.datasets.logging.set_verbosity(getattr(data.datasets.logging, config.log_level.upper()))
    deepspeed.utils.logging.logger.setLevel(config.log_level.upper())
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"), ("MASTER_ADDR", "127.0.0.1")):
        os.environ.setdefault(name, value)  # one process, where no launcher has set them
    if os.environ["WORLD_SIZE"] == "1":
        os.environ["MASTER_PORT"] = "0"  # any free port: nobody else has to find it, and runs side by side do not collide
    # On a CPU it would compile an op here, half a minute with a C++ compiler, that only its inference engine calls and that
    # leaves 69 MB a rank in /dev/shm for ever.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    try:
        deepspeed.init_distributed(dist_init_required=True, auto_mpi_discovery=False)
    except dist.DistNetworkError as error:
        raise UsageError(f"the ranks cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                         f"({one_line(error)}): is another run on? Say `deepspeed --master_port PORT train.py …`")
    get_accelerator().set_device(int(os.environ["LOCAL_RANK"]))  # or ranks that exchange objects would all take GPU 0
    if rank() != 0:
        transformers.utils.logging.disable_progress_bar()
        data.datasets.disable_progress_bars()


def resolve_toy(config):
    """Build the built-in task where the config names it, and put its folders in place of `toy`.

    Returns the prompts of its test split, to generate from, or None.
    """
    if "toy" not in (config.model_name_or_path, *config.dataset_mixer):
        return None
    try:
        model, pairs = rank_0_first(lambda: toy.build(config.toy_dir, label_noise=config.toy_label_noise))
    except ValueError as error:
        raise UsageError(f"toy: {error}")
    config.dataset_mixer = {str(pairs) if source == "toy" else source: share
                            for source, share in config.dataset_mixer.items()}
    if config.model_name_or_path == "toy":
        config.model_name_or_path = str(model)
    return [row["prompt"] for _, row in data.read_rows(str(pairs), "test")]


def load_split(config, tokenizer, kind, limit):
    """(pairs or None, labels, truths) of the splits to train on or to test on, as data.load_pairs has them."""
    renderer = data.Renderer(tokenizer, config.max_prompt_length, config.max_length, config.auto_insert_empty_system_msg)
    names = dict(zip(config.dataset_mixer, config.dataset_configs or ()))
    splits = [split for split in config.dataset_splits if ("train" in split) == (kind == "train")]
    return rank_0_first(lambda: data.load_pairs(
        config.dataset_mixer, splits, renderer, kind, names, config.preprocessing_num_workers,
        config.decontaminate_with if kind == "train" else None, limit, config.seed, say, config.objective == "sft"))


def load_data(config, tokenizer):
    """(train pairs, test pairs or None, annotator, test labels (pairs,) or None).

    The labels go to the annotator, on rank 0 alone; what the loop gets has none.
    """
    train, labels, truths = load_split(config, tokenizer, "train", config.max_train_samples)
    missing = [id for id in train.ids if id not in labels]
    if config.oracle == "dataset" and missing:
        raise UsageError(f"{train.place(missing[0])}: no label, and oracle is dataset ({len(missing)} of {len(train)} pairs "
                         "have none): label them, or say --oracle=human or --oracle=judge")
    annotator = make_annotator(config, train, labels, truths) if rank() == 0 else None
    test, _, truths = load_split(config, tokenizer, "test", config.max_eval_samples) if config.do_eval else (None, {}, {})
    missing = [id for id in test.ids if id not in truths] if test else []
    if test is None or len(missing) == len(test):
        if config.do_eval:
            say(f"no {'labels in the ' if test else ''}test split: evaluation is skipped")
        return train, None, annotator, None
    if missing:
        raise UsageError(f"{test.place(missing[0])}: no label ({len(missing)} of {len(test)} pairs of the test split have "
                         "none): label them, or say --do_eval=false")
    return train, test, annotator, torch.tensor([float(truths[id]) for id in test.ids])


def make_annotator(config, train, labels, truths):
    """Who answers."""
    if config.oracle == "dataset":
        return oracle.DatasetAnnotator(labels, truths)
    texts = train.text_by_id()
    if config.oracle == "human":
        return oracle.HumanAnnotator(texts, config.oracle_wait_minutes)
    try:
        if config.judge == "reward_model":
            return judge.RewardModelJudge(texts, config.judge_model, seed=config.seed)
        price = None
        if config.judge_prompt_price is not None:
            price = config.judge_prompt_price / 1e6, config.judge_completion_price / 1e6
        return judge.ChatJudge(texts, config.judge_url, config.judge_model, os.environ.get(config.judge_api_key_env),
                               config.judge_concurrency, config.judge_timeout, seed=config.seed, price=price)
    except (OSError, ValueError) as error:
        raise UsageError(f"oracle judge: {one_line(error)}")


def start_engine(config, ds, name, pairs, with_optimizer=True):
    """(engine of a model, fingerprint of its weights, whether a row holds both responses), its rows checked on `pairs`."""
    try:
        module = load_model(config, name, trained=with_optimizer)
    except SafetensorError as error:
        raise UsageError(f"model {name}: a file of its weights is damaged ({one_line(error)}): fetch it again")
    shared = module.why_not_shared() is None and config.objective != "sft"
    optimizer = make_optimizer(config, module, ds) if with_optimizer else None
    weights = weights_fingerprint(config, name)
    engine = initialize(module, optimizer, ds, config.deepspeed)
    check_rows(engine, pairs, shared)
    return engine, weights, shared


def policy_and_reference(config, ds, parts):
    """(engine of the policy, fingerprint of its weights, {part: reference log-probs (pairs, 2)}, whether a row holds both
    responses).

    The reference is the policy before its first step, scored by its own engine. One that is another model is loaded, scored
    and freed before the policy is loaded. parts: {"train": (pairs, batches), …}.
    """
    train, reference = parts["train"][0], None
    if config.ref_model_name_or_path:
        stage = 3 if ds["zero_optimization"].get("stage") == 3 else 0  # without an optimiser, stages 1 and 2 have no sense
        engine, weights, shared = start_engine(config, {**ds, "zero_optimization": {"stage": stage}},
                                               config.ref_model_name_or_path, train, with_optimizer=False)
        reference = reference_logps(engine, parts, weights, shared)
        engine.destroy()
        del engine
        gc.collect()
    engine, weights, shared = start_engine(config, ds, config.model_name_or_path, train)
    if not shared:
        say(f"two rows a pair: {type(engine.module.lm).__name__} cannot share a prompt, {engine.module.why_not_shared()}")
    if reference is None:
        reference = reference_logps(engine, parts, weights, shared)
    return engine, weights, {name: logps.to(engine.device) for name, logps in reference.items()}, shared


def main(config, command_line=None):
    """The run.  command_line: what started it, for the model card."""
    start_time = time.time()
    setup(config)
    toy_prompts = resolve_toy(config)
    world = dist.get_world_size()
    ds = engine_config(config, world)
    output = Path(config.output_dir)
    shared_output = is_shared(output)
    check_same_run(config, output, pairs_a_step(config, world))
    if all_gather((output / "summary.json").is_file())[0]:
        if rank() == 0:
            say(f"{output} is finished: {closing_line(read_summary(output / 'summary.json'))}")
        return say("to train again, choose another --output_dir or move that one away")
    check_writable(output)
    if not shared_output and config.save_strategy != "no":
        raise UsageError(f"output_dir {output}: is not the same folder on all hosts, and each rank writes its part of a "
                         "checkpoint there: put it on a file system that all share, or say --save_strategy=no")
    resume = find_checkpoint(config, output) if shared_output else None

    # Data, policy, reference.
    tokenizer = load_tokenizer(config)
    check_models(config, tokenizer)
    if config.objective == "sft":
        return sft(config, ds, tokenizer, output, resume, start_time, command_line)
    train, test, annotator, test_labels = load_data(config, tokenizer)
    check_same_pairs(train, test)
    schedule = Schedule(config, train, world)
    parts = {"train": (train, schedule.training_batches())}
    ds |= schedule.engine_batches()
    if test:
        test_batches = my_batches(range(len(test)), test, config.per_device_eval_batch_size, world, config)
        parts["test"] = (test, test_batches)
    engine, weights, reference, shared = policy_and_reference(config, ds, parts)
    device = engine.device

    # The run's folder, its ledger, and where it stands.
    write_config(config, output, schedule)
    asker = oracle.Oracle(annotator, output / "labels.sqlite", config.max_queries, config.oracle != "dataset")
    if asker.ledger:
        reused, of_ours = asker.ledger.check_pairs(train.ids)
        if reused:
            say(f"{reused:,} answers of other runs are in the ledger, {of_ours:,} of them of pairs of this run")
    step, skipped, seconds_before, evaluation = 0, 0, 0.0, None
    sums = torch.zeros(10, dtype=torch.float64, device=device)  # metrics since the last log
    start = {"pairs a step": schedule.step_pairs, "pairs": train.fingerprint, "model": weights,
             "engine settings": decisive(ds)}
    if resume:
        state = read_state(resume)
        check_same_start(resume, state.get("start"), start)
        shards.load(engine, resume)
        step, seconds_before, asker.state, evaluation = (state[k] for k in ("step", "wall_seconds", "oracle", "evaluation"))
        skipped = state.get("skipped", 0)  # in a row
        sums += torch.tensor(state["sums"], dtype=torch.float64, device=device) * (rank() == 0)
        say(f"resumed from {resume} at step {step:,} of {schedule.total_steps:,}")
    log = Log(output, engine, step if resume else -1)
    say(f"{len(train):,} pairs, {schedule.total_steps:,} steps of {schedule.step_pairs} pairs, "
        f"{sum(getattr(p, 'ds_numel', p.numel()) for p in engine.module.parameters()):,} parameters, "
        f"{world} process{'es' if world > 1 else ''} on {device.type}, ZeRO {ds['zero_optimization'].get('stage', 0)}")

    def labels_so_far():
        state = asker.state
        return {"pairs_seen": min(step * schedule.step_pairs, len(train)), "queries": asker.queries(step - 1),
                "pseudo_labels": state["pseudo_labels"], "pseudo_label_accuracy": pseudo_label_accuracy(state),
                **audit_metrics(asker, step - 1, config)}

    def run_evaluation():
        metrics = evaluate(engine, test, test_batches, reference["test"], test_labels.to(device), config, shared)
        log.write(row := {"step": step, "epoch": step / schedule.epoch_steps, "split": "eval", **metrics, **labels_so_far()})
        say(f"step {step:,}: held-out accuracy {metrics['rewards/accuracies']:.3f}, loss {metrics['loss']:.4f}, "
            f"{row['queries']:,} labels bought")
        return metrics

    def checkpoint():
        state = {"step": step, "start": start, "skipped": skipped, "wall_seconds": seconds_before + time.time() - start_time,
                 "oracle": asker.state, "evaluation": evaluation, "sums": reduced(sums)}
        save_checkpoint(engine, output, state, config.save_total_limit)

    # The loop.
    threshold = gate.Gate(config, asker, train.ids, schedule, step)
    if test and config.eval_on_start and step == 0:
        evaluation = run_evaluation()
    progress = bar(schedule.total_steps, "train", initial=step)
    if annotator:
        annotator.show = lambda missing: progress.set_description_str(
            f"waiting for {missing} labels" if missing else "train")
    asker.interrupt.install()
    window_start = time.time()
    while step < schedule.total_steps:
        try:
            asker.stop_if_asked()
            if notice := threshold.advance(step):
                say(f"WARNING: {notice}")
            rows = schedule.rows(step)
            if threshold.looks_ahead:
                ask_ahead(engine, asker, threshold, train, schedule.micro_batches(step), reference["train"], step, config,
                          shared)
                rows = threshold.rows_to_train(rows, step)
        except oracle.Waiting:
            progress.close()
            if step and shared_output and step not in checkpoints(output):
                checkpoint()
            asker.interrupt.remove()
            asker.close()
            raise
        engine.train()
        lr = set_learning_rate(engine, step, schedule.total_steps, config)
        unasked = []  # (pair id, pseudo-label)

        micro_batches = schedule.micro_batches(step, rows)
        for n, micro_batch in enumerate(micro_batches, 1):
            engine.set_gradient_accumulation_boundary(n == len(micro_batches))
            batch = data.collate(train, micro_batch, shared).to(device)
            logps = engine(batch)  # (B, 2)  log π_θ(y|x)
            rewards = adpo.implicit_rewards(logps, reference["train"][batch.rows], config.beta)  # (B, 2)
            margin = adpo.margins(rewards)  # (B,)

            # Algorithm 2: ask where |m| ≤ γ, else o = sign(m). The one wait for the device in a micro-step.
            m, unsure, audited = consult_gate(margin, batch.ids, threshold, config)
            answers = torch.tensor(asker.answer(batch.ids, m.tolist(), (unsure | audited).tolist(), step, audited.tolist()))
            o = adpo.choose_labels(m, answers, unsure if config.after_budget == "none" else None, config.pseudo_labels,
                                   threshold.scale)
            unasked += [(id, 1 if label > 0 else -1)
                        for id, label, answer in zip(batch.ids, o, answers) if id and label and not answer]

            o = o.to(device)
            losses = adpo.preference_loss(margin, o, config.loss_type, config.beta, config.label_smoothing)  # (B,)
            losses = no_step_if_infinite(losses)
            # The step's loss is the mean over its pairs, however they are cut; DeepSpeed divides by micro-steps and ranks.
            engine.backward((losses * batch.weights).sum() * (engine.gradient_accumulation_steps() * world / len(rows)))
            if engine.is_gradient_accumulation_boundary():
                grad_norm = gradient_norm(engine)
            engine.step()
            sums += metric_sums(losses, rewards, logps, o, batch.weights, batch.tokens)

        asker.report_pseudo(unasked)
        skipped = skipped_in_a_row(skipped, engine, grad_norm, step, [train.ids[row] for row in rows])
        step += 1
        epoch_end, last = step % schedule.epoch_steps == 0, step == schedule.total_steps
        if step % config.logging_steps == 0 or last or (step == 1 and config.logging_first_step):
            metrics, tokens = means(reduced(sums))
            row = {"step": step, "epoch": step / schedule.epoch_steps, "split": "train", **metrics, "learning_rate": lr,
                   "grad_norm": norm_for_log(engine, grad_norm),
                   **labels_so_far(), **threshold.metrics(), "tokens_per_second": tokens / (time.time() - window_start)}
            log.write(row)
            warn_of_wrong_pseudo_labels(asker, step - 1, config)
            progress.set_postfix_str(bar_text(row, evaluation, cost(asker, config)), refresh=False)
            sums.zero_()
            window_start = time.time()
        progress.update()
        if test and (last or due(config.eval_strategy, config.eval_steps, step, epoch_end)):
            evaluation = run_evaluation()
            window_start = time.time()
        if due(config.save_strategy, config.save_steps, step, epoch_end):
            checkpoint()
            window_start = time.time()
    progress.close()
    asker.interrupt.remove()

    # The end: model, card, summary; then the hub.
    summary = summarise(train, schedule, asker, evaluation, device, config, engine.module.lm)
    names = save_model(engine, tokenizer, output, config)
    asker.close()
    engine.destroy()
    if rank() == 0 and toy_prompts:
        summary |= {f"gold_reward_{when}": toy.mean_gold_reward(folder, toy_prompts)
                    for when, folder in (("before", config.model_name_or_path), ("after", output))}
    finish(config, summary, output, names, command_line, seconds_before + time.time() - start_time)


def finish(config, summary, output, names, command_line, seconds):
    """What comes behind the model: card, summary, the last lines, the hub.  names: of the model's files."""
    failure = None
    if rank() == 0:
        curves = [] if config.objective == "sft" else draw_curves(output)
        replace_text(output / "README.md", model_card(config, summary, command_line, curves))
        summary["wall_seconds"] = seconds
        replace_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
        say(closing_line(summary))
        what = "adapter" if leaves_adapter(config) else "model"
        rest = " and its metrics" if config.objective == "sft" else ", its metrics and its ledger"
        say(f"the {what}{rest} are in {output}")
        if config.push_to_hub:
            failure = push(config, output, names + curves)
    dist.barrier()
    if failure:
        raise UsageError(failure)


def sft(config, ds, tokenizer, output, resume, start_time, command_line):
    """Supervised fine-tuning: the loop of `main` without reference, gate and ledger. The loss of a step is the mean of
    −log π(y_t | x, y_<t) over its response tokens, however they are cut into micro-batches and ranks."""
    world = dist.get_world_size()
    train, _, _ = load_split(config, tokenizer, "train", config.max_train_samples)
    test = load_split(config, tokenizer, "test", config.max_eval_samples)[0] if config.do_eval else None
    if config.do_eval and not test:
        say("no test split: evaluation is skipped")
    schedule = Schedule(config, train, world)
    ds |= schedule.engine_batches()
    engine, weights, _ = start_engine(config, ds, config.model_name_or_path, train)
    device = engine.device

    write_config(config, output, schedule)
    step, skipped, seconds_before, evaluation = 0, 0, 0.0, None
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, response tokens, all tokens since the last log
    start = {"examples a step": schedule.step_pairs, "examples": train.fingerprint, "model": weights,
             "engine settings": decisive(ds)}
    if resume:
        state = read_state(resume)
        check_same_start(resume, state.get("start"), start)
        shards.load(engine, resume)
        step, seconds_before, evaluation, skipped = (state[k] for k in ("step", "wall_seconds", "evaluation", "skipped"))
        sums += torch.tensor(state["sums"], dtype=torch.float64, device=device) * (rank() == 0)
        say(f"resumed from {resume} at step {step:,} of {schedule.total_steps:,}")
    log = Log(output, engine, step if resume else -1)
    say(f"{len(train):,} examples, {schedule.total_steps:,} steps of {schedule.step_pairs}, {world} "
        f"process{'es' if world > 1 else ''} on {device.type}, ZeRO {ds['zero_optimization'].get('stage', 0)}")

    def run_evaluation():
        loss = sft_evaluate(engine, test, config)
        log.write({"step": step, "epoch": step / schedule.epoch_steps, "split": "eval", "loss": loss})
        say(f"step {step:,}: held-out loss {loss:.4f}")
        return loss

    def checkpoint():
        state = {"step": step, "start": start, "skipped": skipped, "wall_seconds": seconds_before + time.time() - start_time,
                 "evaluation": evaluation, "sums": reduced(sums)}
        save_checkpoint(engine, output, state, config.save_total_limit)

    if test and config.eval_on_start and step == 0:
        evaluation = run_evaluation()
    progress = bar(schedule.total_steps, "train", initial=step)
    interrupt = oracle.Interrupt()
    interrupt.install()
    window_start = time.time()
    while step < schedule.total_steps:
        if max(all_gather(interrupt.asked)):  # one rank's signal stops all
            progress.close()
            if step and step not in checkpoints(output):
                checkpoint()
            interrupt.remove()
            raise oracle.Waiting("interrupted")
        engine.train()
        lr = set_learning_rate(engine, step, schedule.total_steps, config)
        step_tokens = sum(map(len, train.table[schedule.rows(step)]["first_ids"]))

        micro_batches = schedule.micro_batches(step)
        for n, rows in enumerate(micro_batches, 1):
            engine.set_gradient_accumulation_boundary(n == len(micro_batches))
            losses, batch = sft_losses(engine, train, rows)  # (N,)
            engine.backward(losses.sum() * (engine.gradient_accumulation_steps() * world / step_tokens))
            if engine.is_gradient_accumulation_boundary():
                grad_norm = gradient_norm(engine)
            engine.step()
            sums += torch.stack([losses.detach().sum().double(), losses.new_tensor(len(losses) * bool(rows)).double(),
                                 losses.new_tensor(batch.tokens).double()])

        skipped = skipped_in_a_row(skipped, engine, grad_norm, step, [train.ids[row] for row in schedule.rows(step)])
        step += 1
        epoch_end, last = step % schedule.epoch_steps == 0, step == schedule.total_steps
        if step % config.logging_steps == 0 or last or (step == 1 and config.logging_first_step):
            loss, counted, tokens = reduced(sums)
            log.write({"step": step, "epoch": step / schedule.epoch_steps, "split": "train", "loss": loss / counted,
                       "learning_rate": lr,
                       "grad_norm": norm_for_log(engine, grad_norm),
                       "tokens_per_second": tokens / (time.time() - window_start)})
            progress.set_postfix_str(f"loss {loss / counted:.3f}", refresh=False)
            sums.zero_()
            window_start = time.time()
        progress.update()
        if test and (last or due(config.eval_strategy, config.eval_steps, step, epoch_end)):
            evaluation = run_evaluation()
            window_start = time.time()
        if due(config.save_strategy, config.save_steps, step, epoch_end):
            checkpoint()
            window_start = time.time()
    progress.close()
    interrupt.remove()

    summary = {"examples": len(train), "eval_loss": evaluation, "peak_memory_bytes": peak_memory(device),
               **adapter_summary(config, engine.module.lm)}
    names = save_model(engine, tokenizer, output, config)
    engine.destroy()
    finish(config, summary, output, names, command_line, seconds_before + time.time() - start_time)


def sft_losses(engine, examples, rows):
    """(−log π(y_t | x, y_<t) of each response token (N,), 0 for those of a filler; the batch)."""
    batch = data.collate(examples, rows, shared=False).to(engine.device)
    logps = engine(batch, per_token="ours")  # (N,)
    return no_step_if_infinite(-logps * batch.weights.repeat_interleave(batch.lengths, output_size=len(logps))), batch


@torch.no_grad()
def sft_evaluate(engine, examples, config):
    """Mean loss over the response tokens of the test split, in nats."""
    engine.eval()
    batches = my_batches(range(len(examples)), examples, config.per_device_eval_batch_size, dist.get_world_size(), config)
    sums = torch.zeros(2, dtype=torch.float64, device=engine.device)
    with bar(len(batches), "evaluate", leave=False) as progress:
        for rows in batches:
            losses, _ = sft_losses(engine, examples, rows)
            sums += torch.stack([losses.sum().double(), losses.new_tensor(len(losses) * bool(rows)).double()])
            progress.update()
    loss, tokens = reduced(sums)
    return loss / tokens


def consult_gate(margin, ids, threshold, config):
    """(margins, who is unsure, who is audited), each (B,) on the CPU. ids: None for a filler."""
    m = margin.detach().cpu()
    unsure = adpo.gate(m, threshold.gamma, ids, threshold.scale)
    drawn = [id is not None and oracle.is_audited(id, config.audit_fraction, config.seed) for id in ids]
    return m, unsure, torch.tensor(drawn) & ~unsure


@torch.no_grad()
def ask_ahead(engine, asker, threshold, pairs, micro_batches, reference, step, config, shared):
    """Put all questions of a step at once, over all micro-steps and ranks: so that people and judges are not waited for
    again and again, and so that a budget can go to the least sure pairs of the step. The loop then finds the answers in the
    ledger. Costs one more forward pass of the step; nothing changes between the two, so that they agree on who is asked."""
    engine.eval()
    ids, margins = [], []
    for rows in micro_batches:
        batch = data.collate(pairs, rows, shared).to(engine.device)
        margins.append(adpo.margins(adpo.implicit_rewards(engine(batch), reference[batch.rows], config.beta)))
        ids += batch.ids
    margins = torch.cat(margins)
    threshold.follow(ids, margins.tolist(), step)
    m, unsure, audited = consult_gate(margins, ids, threshold, config)
    asker.answer(ids, m.tolist(), (unsure | audited).tolist(), step, audited.tolist())


def cost(asker, config):
    """Money spent on labels (rank 0), or None where no price is known."""
    if not asker.ledger:
        return None
    known, unpriced = asker.ledger.cost()
    if config.price_per_label is None:
        return known or None
    return known + unpriced * config.price_per_label


def pseudo_label_accuracy(state):
    """Share of the pseudo-labels so far that are right, or None where no truth is known.  state: the oracle's."""
    return state["pseudo_right"] / state["pseudo_known"] if state["pseudo_known"] else None


def audit_metrics(asker, step, config):
    """What the audit says so far, for a row of metrics; nothing without one."""
    if not config.audit_fraction:
        return {}
    audit = asker.audit(step) or {"audited": 0, "accuracy": None, "interval": (0.0, 1.0)}
    return {"audited": audit["audited"], "audit_accuracy": audit["accuracy"], "audit_low": audit["interval"][0],
            "audit_high": audit["interval"][1]}


def warn_of_wrong_pseudo_labels(asker, step, config):
    """Once, loudly: the audited error is above what the policy's own confidence predicts, beyond the 95 % interval."""
    if not config.audit_fraction or asker.state["warned"]:
        return
    audit = asker.audit(step)
    if audit and audit["interval"][1] < audit["predicted"]:
        asker.state["warned"] = True
        say(f"WARNING: of {audit['audited']} audited pseudo-labels {audit['accuracy']:.1%} agree with the annotator, where "
            f"the policy's own confidence predicts {audit['predicted']:.1%}: it is surer than it has a right to be. Raise "
            "gamma, or lower learning_rate.")


def bar_text(row, evaluation, cost):
    """What stands behind the training bar."""
    held_out = f", held-out {evaluation['rewards/accuracies']:.3f}" if evaluation else ""
    price = f", {cost:,.2f} spent" if cost is not None else ""
    return (f"loss {row['loss']:.3f}, acc {row['rewards/accuracies']:.3f}, {row['queries']:,} queries "
            f"({row['queries'] / row['pairs_seen']:.0%} of pairs){price}{held_out}")


def gradient_norm(engine):
    """Norm of the step's gradient, before clipping, where the engine itself keeps no account of it (fp32 without ZeRO);
    else None, and `engine.get_global_grad_norm()` says it after the step. One that is not finite keeps the engine from
    taking the step; under ZeRO it does so by itself."""
    if engine.zero_optimization():
        return None
    norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]).item()
    if not math.isfinite(norm):
        engine.zero_grad()
        engine.set_gradient_accumulation_boundary(False)
    return norm


def no_step_if_infinite(losses):
    """The losses, times 1: an infinite one gets a gradient of NaN, so that the engine does not take the step."""
    return losses * (1 + 0 * losses.detach())


def norm_for_log(engine, grad_norm):
    """The gradient's norm, behind the step: what gradient_norm said before it, or else the engine."""
    return float(engine.get_global_grad_norm() if grad_norm is None else grad_norm)


def skipped_in_a_row(before, engine, grad_norm, step, ids):
    """How many steps in a row were not taken because their gradient was no finite number, up to this one: 0 where it was
    taken. Names the pairs of one that was not, and raises FloatingPointError at the third.

    before: that number, up to the step before.  grad_norm: what gradient_norm said.  ids: the step's pairs, over all ranks.
    """
    if not (engine.optimizer.overflow if grad_norm is None else not math.isfinite(grad_norm)):
        return 0
    what = f"step {step + 1:,}: the loss or its gradient is not a finite number, so the step is not taken; its pairs are"
    if before + 1 < 3:
        say(f"{what} {', '.join(ids)}")
        return before + 1
    raise FloatingPointError(f"{what} {', '.join(ids)}; it is the third in a row: lower learning_rate, or look at the "
                             "model's weights and at these pairs. The checkpoints are as they were")


def due(strategy, every, step, epoch_end):
    return strategy == "steps" and step % every == 0 or strategy == "epoch" and epoch_end


def summarise(train, schedule, asker, evaluation, device, config, lm):
    """summary.json without its times. All ranks call it together; what the ledger knows is known to rank 0 alone."""
    epoch = range(min(schedule.total_steps, schedule.epoch_steps))
    pairs = len({train.ids[row] for step in epoch for row in schedule.rows(step)})
    queries, state, audit = asker.queries(), asker.state, asker.audit()
    return {"pairs": pairs, "queries": queries, "query_fraction": queries / pairs, "pseudo_labels": state["pseudo_labels"],
            "pseudo_label_accuracy": pseudo_label_accuracy(state),
            "pseudo_label_interval": (list(oracle.wilson(state["pseudo_right"], state["pseudo_known"]))
                                      if state["pseudo_known"] else None),
            "audited": audit["audited"] if audit else 0, "audit_accuracy": audit and audit["accuracy"],
            "audit_interval": audit and list(audit["interval"]), "cost": cost(asker, config),
            "budget_spent_at_step": state["budget_spent_at_step"],
            "eval_loss": evaluation and evaluation["loss"],
            "eval_accuracy": evaluation and evaluation["rewards/accuracies"], "peak_memory_bytes": peak_memory(device),
            **adapter_summary(config, lm)}


def adapter_summary(config, lm):
    """What is trained, where it is not all weights."""
    if not config.use_peft:
        return {}
    settings = lm.peft_config["default"]
    return {"adapter": f"LoRA of rank {settings.r}, alpha {settings.lora_alpha}"}


def push(config, output, names):
    """Upload the trained model and what describes it. Checkpoints, the ledger and whatever else lies in the folder stay
    here, and so does config.yaml, in whose judge_url a key may stand. All is saved by now: where it does not arrive, returns
    a line that says why and has the command that sends it.

    names: of the files of the model, and of the pictures of its card.
    """
    from huggingface_hub import HfApi
    names = [*names, "README.md", "metrics.jsonl", "summary.json"]
    api, name, branch = HfApi(), hub_name(config), config.hub_model_revision
    by_hand = shlex.join(["hf", "upload", name, str(output), ".", f"--revision={branch}",
                          *(f"--include={file}" for file in names)])
    try:
        name = api.create_repo(name, exist_ok=True).repo_id
        if branch != "main":
            api.create_branch(name, branch=branch, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=str(output), revision=branch, allow_patterns=names)
    except Exception as error:  # of the network, of the hub, of a disk that its client fills
        error = (type(error) is RuntimeError and error.__cause__) or error  # "Error while uploading …" has its reason there
        why = one_line(getattr(error, "server_message", None) or error)[:400]
        return (f"{output} is complete, but not uploaded to {name} at {api.endpoint} ({type(error).__name__}: {why}); "
                f"to upload it: {by_hand}")
    say(f"uploaded to {api.endpoint}/{name}, branch {branch}")


def same_command(argv):
    """The command line that started this run."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 0)
    where = ["--hostfile", "HOSTFILE"] if several_hosts() else ["--num_gpus", str(local)] if local > 1 else []
    launcher = ["deepspeed", *where] if local else ["python"]
    return shlex.join([*launcher, "train.py", *(arg for arg in argv if not arg.startswith("--local_rank"))])


def lost_peer(error):
    """Whether a collective failed because another rank is gone, which is what has to be looked at."""
    return isinstance(error, dist.DistError) or "/gloo/" in str(error)


def leave_the_word_to_the_other(error):
    """Wait for the launcher to end this rank: it looks once a second for a rank that has ended and takes the exit code of
    the first that it finds, which is to be that of the rank that has something to say. Returns the exit code without it."""
    reason = one_line(error)
    reason = reason.partition("] ")[2].partition(". ")[0] or reason  # gloo's has the place in its source, and advice
    tqdm.write(f"rank {rank()}: stopped, another rank is gone ({reason})", file=sys.stderr)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(10)
    return 1


def let_rank_0_speak_first():
    """Before an error that all ranks may have alike is printed: rank 0 says it at once and ends, and its launcher then ends
    the others while they wait here. What one of them has alone it says a little later."""
    place = {name: int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK")}
    if place["RANK"]:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(30 if place["LOCAL_RANK"] else 20)  # seconds; on each other host its first rank is the first


def command(argv):
    """The command line. Returns the exit code: 0; 75 where answers are missing and the same command resumes; 2 where the
    user has to change something; 1 where training broke down. Behind 1 and 2 stands one line that says what is wrong."""
    if "--help" in argv or "-h" in argv:
        print(help_text())
        return 0
    try:
        main(config := parse_config(argv), same_command(argv))
    except oracle.Waiting as waiting:
        answers = f" All answers so far are in {config.output_dir}/labels.sqlite." if config.objective == "adpo" else ""
        say(f"stopped: {waiting}.{answers} Resume with\n    {same_command(argv)}")
        return 75
    except sqlite3.Error as error:
        what = oracle.in_words(Path(config.output_dir) / "labels.sqlite", error)
        tqdm.write(f"error: {what}; then the same command goes on from the last checkpoint", file=sys.stderr)
        return 2
    except (UsageError, data.DataError, oracle.LedgerError, FloatingPointError) as error:
        let_rank_0_speak_first()
        tqdm.write(f"error: {one_line(error)}", file=sys.stderr)  # a line of its own, whatever bar stands there
        return 1 if isinstance(error, FloatingPointError) else 2
    except OSError as error:  # what is not written here but by libraries: their caches
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS) and "Not enough disk space" not in str(error):
            raise
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        tqdm.write(f"error: {one_line(error)}: make room under $HF_HOME ({home}) and $TMPDIR ({tempfile.gettempdir()}), or "
                   "make them writable; then the same command goes on", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if not lost_peer(error):
            raise
        return leave_the_word_to_the_other(error)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(command(sys.argv[1:]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
