"""The language model and its tokenizer: loaded and checked, with an adapter where one is trained, and saved.

Whatever is wrong with a folder or a name becomes one line that says what to do. Weights are read from safetensors alone, and
code that comes with a model runs only where the user asked for it.
"""

import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
from pathlib import Path

import deepspeed
import huggingface_hub
import torch
import transformers
from deepspeed.accelerator import get_accelerator
from safetensors.torch import save_file
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import adpo
from runtime.errors import UsageError, one_line
from runtime.files import writing
from runtime.ranks import from_rank_0, rank, say
from runtime.rendering import Renderer


def revision_of(config, name):
    """The revision of a model or tokenizer: model_revision is that of model_name_or_path, and of no other repository."""
    return config.model_revision if name == config.model_name_or_path else "main"


def load_tokenizer(config):
    """The run's tokenizer, with the config's chat template if it names one. Raises UsageError."""
    name = config.tokenizer_name_or_path or config.model_name_or_path
    with loading("tokenizer", name):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            name, revision=revision_of(config, name), trust_remote_code=config.trust_remote_code)
    if config.chat_template:
        try:
            is_file = config.chat_template.endswith(".jinja")
            template = Path(config.chat_template).read_text(encoding="utf-8") if is_file else config.chat_template
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"chat_template {config.chat_template}: cannot be read ({one_line(error)})")
        if "{" not in template:  # the same text for every conversation
            raise UsageError(f"chat_template {one_line(config.chat_template, 200)}: is not a template, which has {{{{ }}}} "
                             "in it; name a file that ends in .jinja, or write the template's text")
        tokenizer.chat_template = template
    return tokenizer


def not_local(name):
    """How the reason begins why a model or a tokenizer cannot be loaded: "" where a folder has its name."""
    return "" if os.path.exists(name) else "not a local folder, and loading it from the hub failed: "


@contextlib.contextmanager
def loading(what, name):
    """Around code that loads a model or a tokenizer: whatever it raises becomes a UsageError in one line."""
    try:
        yield
    except Exception as error:  # a damaged file of a folder may raise anything
        why = one_line(error)
        if "trust_remote_code=True" in why:
            why = "it needs code of its own: read that code, then say --trust_remote_code=true to run it"
        elif "model.safetensors" in why:
            why += "; weights are read from safetensors alone"
        else:
            why = f"{not_local(name)}{why}"
        raise UsageError(f"{what} {name}: cannot be loaded ({type(error).__name__}: {why[:500]})")


def check_models(config, tokenizer):
    """Refuse, before the data is read, an encoder, and a model that the tokenizer does not fit."""
    names = transformers.models.auto.modeling_auto
    tokens = max(tokenizer.get_vocab().values()) + 1
    for given in filter(None, (config.model_name_or_path, config.ref_model_name_or_path)):
        name, revision, _ = resolve_model(config, given)
        with loading("model", name):
            model = transformers.AutoConfig.from_pretrained(
                name, revision=revision, trust_remote_code=config.trust_remote_code)
        decoder = getattr(model, "is_decoder", False) or getattr(model, "is_encoder_decoder", False)
        known = model.model_type in names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or hasattr(model, "auto_map")
        if not known or model.model_type in names.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decoder:
            raise UsageError(f"model {name}: {model.model_type} is not a causal language model; take one that writes text "
                             "from left to right")
        size = getattr(model.get_text_config(), "vocab_size", tokens)
        if tokens > size:
            raise UsageError(f"model {name}: has embeddings for {size:,} tokens, but the tokenizer has {tokens:,}: take the "
                             "model's own tokenizer, or resize the embeddings (resize_token_embeddings) and save the model")
        if given != (config.tokenizer_name_or_path or config.model_name_or_path):
            check_same_tokens(config, tokenizer, name, revision)


def check_same_tokens(config, tokenizer, name, revision):
    """Refuse a model whose own tokenizer gives the same ids to other tokens: the run's ids would be different text to it."""
    try:
        own = transformers.AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=config.trust_remote_code)
    except Exception:  # it comes without a tokenizer, about which transformers may raise anything: nothing to compare
        return
    added = {*tokenizer.get_added_vocab(), *own.get_added_vocab()}
    ours, theirs = ({n: token for token, n in made.get_vocab().items() if token not in added} for made in (tokenizer, own))
    shared = ours.keys() & theirs.keys()
    other = sorted(n for n in shared if ours[n] != theirs[n])
    if len(other) > len(shared) / 100:  # a few reserved tokens may have been renamed
        raise UsageError(f"model {name}: its own tokenizer differs from the run's in {len(other):,} of {len(shared):,} "
                         f"tokens (id {other[0]} is {theirs[other[0]]!r} there and {ours[other[0]]!r} here), so it would "
                         "read different text; take a model with the run's tokenizer")


def resolve_model(config, name):
    """(model, its revision, None), or for an adapter (the model it was trained on, its revision, the adapter's folder)."""
    revision = revision_of(config, name)
    with loading("model", name):
        path = transformers.utils.find_adapter_config_file(name, revision=revision)
        if path is None:
            return name, revision, None
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
        base, revision = settings["base_model_name_or_path"], settings.get("revision") or "main"
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"model {name}: is an adapter, which needs the package peft: pip install -r tools/requirements.txt")
    return base, revision, Path(path).parent


def load_weights(config, name, revision, in_4bit=False):
    """The causal LM, in the dtype in which it will be trained. Raises UsageError if it cannot be loaded whole."""
    dtype = torch.bfloat16 if config.bf16 else torch.float32
    quantised = {}
    if in_4bit:
        quantised = {"device_map": {"": get_accelerator().current_device_name()},
                     "quantization_config": transformers.BitsAndBytesConfig(
                         load_in_4bit=True, bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_type=config.bnb_4bit_quant_type,
                         bnb_4bit_use_double_quant=config.use_bnb_nested_quant)}
    with loading("model", name):
        lm, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, revision=revision, dtype=dtype, output_loading_info=True, **quantised,
            attn_implementation=config.attn_implementation, trust_remote_code=config.trust_remote_code, use_safetensors=True)
    if report["missing_keys"]:  # transformers draws them at random
        raise UsageError(f"model {name}: its weights lack {sorted(report['missing_keys'])[0]} "
                         f"({len(report['missing_keys'])} in all); it takes a causal language model, saved whole")
    return lm


def add_adapter(config, lm, base, revision):
    """Put LoRA weights into the layers of `lm`, in place, and freeze all others. The adapter's output is 0 until it is
    trained, so the policy before its first step is the model that was loaded: `base`, at `revision`. Both are saved."""
    import peft
    targets = config.lora_target_modules
    settings = peft.LoraConfig(
        task_type="CAUSAL_LM", r=config.lora_r, lora_alpha=config.lora_alpha, lora_dropout=0.0,
        target_modules="all-linear" if targets == ["all-linear"] else targets, modules_to_save=config.lora_modules_to_save,
        revision=None if Path(base).exists() else revision)
    try:
        peft.get_peft_model(lm, settings)
    except ValueError as error:
        raise UsageError(f"lora_target_modules {targets}: {one_line(error)}; name layers of {type(lm).__name__}, or "
                         "say all-linear")


def load_adapter(config, lm, name, trained):
    """`lm` with the adapter `name` in its layers, to be trained further; without use_peft, merged into its weights."""
    import peft
    with loading("adapter", name):
        adapted = peft.PeftModel.from_pretrained(lm, name, revision=revision_of(config, name), is_trainable=config.use_peft)
        if not config.use_peft:
            return adapted.merge_and_unload().requires_grad_(True)  # peft has frozen them
    if not trained:
        return lm
    settings = lm.peft_config["default"]
    if settings.peft_type != "LORA":
        raise UsageError(f"adapter {name}: its kind is {settings.peft_type}, but only LoRA can be trained further; with "
                         "use_peft: false it is merged, and all weights are trained")
    say(f"the adapter {name} is trained further as it is (rank {settings.r}, alpha {settings.lora_alpha}); the lora_ keys "
        "are for new ones")
    return lm


def load_policy(config, name=None, trained=True, kind=adpo.PairLogps):
    """The module that the engine wraps: a causal LM without dropout or other noise, with an adapter where one is trained.

    name: a model other than the policy.  trained: False for one that is only scored, which gets no new adapter.
    kind: PairLogps or PairRewards. Its `fingerprint` is the hash of the weights that were loaded.
    """
    name = name or config.model_name_or_path
    torch.manual_seed(config.seed)
    lm = load_lm(config, name, trained)
    remove_noise(lm)
    if config.gradient_checkpointing:
        recompute_activations(lm)
    policy = kind(lm, config.logits_chunk_size, takes_rows=skips_masks(lm))
    if config.torch_compile and not policy.compile_layers():
        raise UsageError(f"model {name}: torch_compile finds no layers in {type(lm).__name__}, which names none "
                         "(_no_split_modules): say --torch_compile=false")
    policy.fingerprint = weights_fingerprint(config, name)
    return policy


def skips_masks(lm):
    """Whether to use attention without a mask. torch has it in bf16 on a GPU, where it is several times as fast as kernels
    that take one."""
    device, dtype = get_accelerator().device_name(), next(lm.parameters()).dtype
    return device == "cuda" and dtype == torch.bfloat16 and calls_attention_of_pairs(lm)


def calls_attention_of_pairs(lm):
    """Whether the model's layers look up their attention under the name "sdpa", which is `attention_of_pairs`."""
    return lm.config._attn_implementation == "sdpa" and lm._supports_attention_backend


def attention_of_pairs(module, query, key, value, attention_mask, scaling=None, **rest):
    """transformers' "sdpa", which also takes the indices of adpo.two_rows, (1, 1, 1, n) int32, in place of a mask."""
    if attention_mask is None or attention_mask.dtype != torch.int32:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **rest)
    starts = 2 * query.shape[0] + 1
    rows = attention_mask.flatten().split([attention_mask.shape[-1] - 2 * starts, starts, starts])
    return adpo.pair_attention(query, key, value, *rows, scaling), None


transformers.AttentionInterface.register("sdpa", attention_of_pairs)


def load_lm(config, name, trained):
    """The causal LM `name`, with its adapter where it is one, or a new one where one is trained."""
    base, revision, adapter = resolve_model(config, name)
    lm = load_weights(config, base, revision, config.load_in_4bit)
    if adapter:
        return load_adapter(config, lm, name, trained)
    if config.use_peft and trained:
        add_adapter(config, lm, base, revision)
    return lm


def remove_noise(lm):
    """Switch off dropout, LayerDrop and router jitter, which would move the margin that the gate reads."""
    for module in lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for attribute, value in vars(module).items():  # some models keep the rate and call the function
            if "drop" in attribute and isinstance(value, float):
                setattr(module, attribute, 0.0)
        if any("jitter" in attribute for attribute in vars(module)):
            # The rate itself stays: PhiMoE's router also reads it as a threshold in eval mode. Instead, train() no longer
            # reaches this router, which has noise only in training mode.
            module.eval()
            module.train = lambda mode=True, module=module: module


def recompute_activations(lm):
    """Activation checkpointing under either of its names: transformers before 5.21 has only the older one. The layers draw
    no random numbers (remove_noise), so the generator's state need not be saved."""
    new = hasattr(lm, "activation_checkpointing_enable")
    enable = lm.activation_checkpointing_enable if new else lm.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": False})


def weights_fingerprint(config, name):
    """Hash of a model's weights (`content_of`); for an adapter, of both."""
    base, revision, adapter = resolve_model(config, name)
    found = content_of(base, revision)
    if adapter:
        # Merging changes the last bits of the log-probs.
        found += f" {'+' if config.use_peft else 'merged with'} {folder_fingerprint(adapter)}"
    if config.load_in_4bit:
        found += f", {config.bnb_4bit_quant_type}{' nested' if config.use_bnb_nested_quant else ''}"
    return found


def content_of(name, revision=None):
    """The content of a model that has just been loaded: a hash of a folder's files, or a hub model's name and commit."""
    if Path(name).exists():
        return folder_fingerprint(name)
    # The folders of the hub's cache are named after commits.
    return f"{name}@{Path(huggingface_hub.try_to_load_from_cache(name, 'config.json', revision=revision)).parent.name}"


def folder_fingerprint(folder):
    """Hash of the weights in a folder, of their config, and of the code that a model brings."""
    folder, digest = Path(folder), hashlib.blake2b(digest_size=16)
    configs = filter(Path.is_file, (folder / "config.json", folder / "adapter_config.json"))
    for path in sorted([*folder.glob("*.safetensors"), *folder.glob("*.py"), *configs]):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()


def leaves_adapter(config):
    """Whether the run leaves an adapter rather than a model."""
    return config.use_peft and not config.merge_adapter


def save_adapter(config, lm, state, folder, tokenizer):
    """Write the adapter as PeftModel.from_pretrained reads it, or with merge_adapter a plain model that includes it.

    state: {name: weight} of everything that was trained.
    """
    import peft
    settings = lm.peft_config["default"]
    settings.inference_mode = True  # what loads it next is not training
    weights = peft.get_peft_model_state_dict(lm, state, save_embedding_layers=False)
    folder.mkdir()
    save_file({f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()},
              folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings.save_pretrained(folder)
    if config.merge_adapter:  # into the original weights, not into their 4-bit form
        base, revision, _ = resolve_model(config, config.model_name_or_path)
        merged = peft.PeftModel.from_pretrained(load_weights(config, base, revision), folder).merge_and_unload()
        save_whole(merged, tokenizer, folder)
        for name in ("adapter_model.safetensors", "adapter_config.json"):
            (folder / name).unlink()


@torch.no_grad()
def why_not_saved(config, output, batch, logps):
    """None if the model in `output`, loaded as a user would load it, gives the log-probs of the policy, else what is wrong.

    batch: a PairBatch in two rows a pair, on the CPU.  logps: (N,), the policy's of each of its response tokens.
    """
    try:
        lm = load_lm(dataclasses.replace(config, use_peft=False), str(output), trained=False).eval()
        found = adpo.PairLogps(lm).plain_token_logps(batch)  # (N,)
    except Exception as error:  # from_pretrained or the model's own code
        return f"it cannot be loaded ({type(error).__name__}: {one_line(error, 300)})"
    error = (found - logps).pow(2).mean().sqrt().item()
    return None if error <= tolerance(lm) else f"its log-probs differ from those of the policy by {error:.2g} nats a token"


def why_tokenizer_not_saved(config, tokenizer, output, pair):
    """None if the tokenizer in `output`, loaded again as a user would, makes the same tokens of a pair, else what is wrong.

    pair: (prompt, responses), strings or messages.
    """
    try:
        saved = load_tokenizer(dataclasses.replace(config, model_name_or_path=str(output), tokenizer_name_or_path=None,
                                                   chat_template=None))
        found, expected = (Renderer(made, config.max_prompt_length, config.max_length)(*pair)
                           for made in (saved, tokenizer))
    except Exception as error:  # the tokenizer's own code or template
        return f"it cannot be used ({type(error).__name__}: {one_line(error, 300)})"
    return None if found == expected else "it makes other tokens of the text of a pair"


def tolerance(lm):
    """How far apart the log-probs of two computations may be, in nats a token (root mean square)."""
    return 0.15 if next(lm.parameters()).dtype == torch.bfloat16 else 1e-3


def own_ends(lm):
    """Ids of the tokens at which the model's own `generate` stops."""
    ends = lm.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [] if ends is None else [ends])


def name_ends(lm, tokenizer):
    """Make `generate` stop where the responses of training end. With a chat template that need not be EOS."""
    ends = Renderer(tokenizer, 1, 2).ends
    if not ends <= own_ends(lm):
        lm.generation_config.eos_token_id = sorted(ends | own_ends(lm))


def save_whole(lm, tokenizer, folder, **state):
    """save_pretrained, and what `generate` does by default: what it did before, but it stops where responses end."""
    generation = getattr(lm, "generation_config", None)  # a model with code of its own may have no `generate`
    if generation is not None:
        name_ends(lm, tokenizer)
        # transformers refuses to save settings that `generate` ignores, and some models have such: Vicuna's temperature.
        lm.generation_config = transformers.GenerationConfig()
    lm.save_pretrained(folder, **state)
    if generation is not None:
        generation.to_json_file(folder / "generation_config.json")


def save_tokenizer(tokenizer, folder):
    """save_pretrained. Of a tokenizer with code of its own, transformers writes the name of the class where its loader
    expects a pair of names: of the slow and of the fast one."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    name = (settings.get("auto_map") or {}).get("AutoTokenizer")
    if isinstance(name, str):
        settings["auto_map"]["AutoTokenizer"] = [None, name] if tokenizer.is_fast else [name, None]
        path.write_text(json.dumps(settings, indent=2, ensure_ascii=False), encoding="utf-8")


class NotSaved(Exception):
    """The trained model cannot be written, whatever the disk; the message says why. All ranks raise it together."""


def save_model(engine, tokenizer, output, config):
    """Write the trained model, or its adapter, in Hugging Face form, gathered over ranks. Each file gets its name when it is
    complete. Returns the names on rank 0. Raises NotSaved."""
    lm, state = engine.module.lm, {}
    for name, parameter in lm.named_parameters():
        if not parameter.requires_grad and config.use_peft:
            continue  # frozen weights are where they were loaded from
        with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
            if rank() == 0:
                state[name] = parameter.detach().to("cpu", copy=True)
    saved = lm.state_dict().keys()  # persistent buffers are part of a model too, such as the routing bias of DeepSeek V3
    state |= {name: buffer.to("cpu", copy=True) for name, buffer in lm.named_buffers() if name in saved}
    failure, names = None, None
    if rank() == 0:
        try:
            names = write_model(config, lm, state, output, tokenizer)
        except UsageError:  # the disk
            raise
        except Exception as error:  # transformers', peft's, or the model's own code
            failure = f"{type(error).__name__}: {one_line(error, 300)}"
    if failure := from_rank_0(failure):
        raise NotSaved(failure)
    return names


def write_model(config, lm, state, output, tokenizer):
    """Rank 0's part of save_model.  state: {name: weight or buffer}."""
    transformers.utils.logging.disable_progress_bar()
    staging = output / ".model"
    shutil.rmtree(staging, ignore_errors=True)
    with writing(output / "model.safetensors", staging):
        if config.use_peft:
            save_adapter(config, lm, state, staging, tokenizer)
        else:
            save_whole(lm, tokenizer, staging, state_dict=state)
        save_tokenizer(tokenizer, staging)
        names = sorted(path.name + "/" * path.is_dir() for path in staging.iterdir())
        for name in names:
            if name.endswith("/"):  # a folder of chat templates, which an attempt that was killed may have left
                shutil.rmtree(output / name, ignore_errors=True)
            os.replace(staging / name, output / name)
    staging.rmdir()
    return names
