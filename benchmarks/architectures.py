"""Is every causal language model of the installed transformers trained right, or refused in one line?

    python benchmarks/architectures.py [--only TYPE …] [--minutes N]     writes benchmarks/results/architectures.md
    python benchmarks/architectures.py --gpu-attention                   writes benchmarks/results/architectures_gpu.md

Each type is a tiny model with random weights and random persistent buffers, as a trained checkpoint has them. It goes
through what a run does: load_policy, share_prompts, the check at start, one AdamW step on six pairs, save_model, and the
check at the end. Only DeepSpeed's engine is left out. Apart from the product's own checks, each model is compared with a
plain forward of the original in double precision. With --only, rows are printed and no page is written. With
--gpu-attention, models that take it get attention without a mask, as on a GPU in bf16, by a stand-in for its kernel
(flash_on_cpu.py).
Exit code 0: no type is wrong or ends in a traceback; 1: some do.
"""

import argparse
import contextlib
import functools
import io
import json
import math
import multiprocessing
import platform
import random
import re
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import wait
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import transformers
from safetensors.torch import load_file
from tqdm import tqdm
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

import adpo
import data
from runtime import model, toy
from runtime.config import ROOT, Config
from runtime.engine import check_against_plain_forward
from runtime.errors import UsageError, one_line
from runtime.model import check_models, load_policy, save_model, why_not_saved
from runtime.reference import score, share_prompts

VERDICTS = {"right": "both responses of a pair share a row", "two rows": "right, with a row for each response",
            "refused": "before training, in one line", "not built": "no tiny model, or its own plain forward fails",
            "wrong": "trained with wrong numbers, or not saved as trained", "traceback": "fails, hangs or crashes"}
WITHOUT_MASK = "attention without a mask"
LIMIT = 1e-3  # nats a token, root mean square over a response
LOSS_LIMIT = 1e-5  # nats; router jitter or LayerDrop moves the loss by more than 0.001
SECONDS = 60  # most that a type may take
EXTRA = 16  # embeddings beyond the tokenizer's, for the ids of image and audio tokens

# (what the name of a config key matches, the most that it gets); the first that matches counts. Indexers keep many heads:
# with few, many scores are exactly 0, and it is a matter of chance which of those that are equal are in the top k.
SIZES = [(re.compile(pattern), size) for pattern, size in (
    (r"max_(position|target|source)\w*|n_positions|n_ctx|max_seq_len|context_length|(original|model)_max\w*|ngram_vocab_size_base"
     r"|position_bias_max_distance", 512),
    (r"(\w+_)?hidden_size(_global)?|hidden_dim|index(er)?_n_heads|n_embd|d_model|lru_width|\w*emb(ed|edding)?_(dim|size|proj_dim)"
     r"|adapter_(in_dim|out_dim|input_size)|output_proj_dims", 32),
    (r"(?!qk_head)\w*head_?dim|\w*d_head|dim_head|kv_channels|rotary_dim|d_rel|gated_norm_rank|attention_head_size"
     r"|mamba_n_heads", 8),
    (r"(dense_|shared_|prefix_dense_)?intermediate_size(_mlp)?|[nd]_inner|\w*ffn_dim|dff|dim_ff|feed_forward_size|ffn_hidden_size"
     r"|mamba_d_ssm", 64),
    (r"\w+intermediate_size|expert_ffn_hidden_size|\w+_lora_rank|hidden_size_per_layer_input|laurel_rank|adapter_rank"
     r"|\w*window(_size|_len)?|local_attention|(attention_|mamba_)?chunk_size|(mamba_d|ssm)?_?state(_size)?|prompt_mid_dim"
     r"|hc_lowrank|index_topk|mamba_dt_rank|time_step_rank", 16),
    (r"(?!.*(key_value|kv|mamba))\w*(heads|n_head)|linear_num_\w+_heads|(moe_)?num_experts|num_local_experts|n_routed_experts"
     r"|index_block_size|(image_)?patch_size", 4),
    (r"(num_(hidden_|decoder_|encoder_)?|n_|decoder_|encoder_)layers?|num_blocks|o_groups|zero_expert_num|n_mamba_heads"
     r"|encoder_hash_byte_group_vocab|num_experts_per_tok(en)?|moe_(topk|k)|top_k_experts|n_group|num_expert_group"
     r"|index_topk_blocks|num_nextn_predict_layers", 2),
    (r"topk_group|first_k_dense_replace|num_dense_layers|\w*n(um)?_shared_experts|num_kv_shared_layers|\w*n_groups"
     r"|num_mtp_layers", 1))]
TOKENS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "decoder_start_token_id": 2}
# What a type needs besides, where its defaults are not valid, or show less than real checkpoints do. "TYPE.PART" is a part.
INDEXER = dict(indexer_n_heads=32, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=16, indexer_compress_ratio=4)
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
OVERRIDES = {
    **dict.fromkeys(("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral"), {"head_dim": 8}),
    **dict.fromkeys(("lfm2", "lfm2_moe"), {"layer_types": ["conv", "full_attention"]}),
    **dict.fromkeys(("qwen4_exp_text", "qwen4_exp.text_config"), INDEXER),
    "bamba": {"attn_layer_indices": [1]}, "bert-generation": {"is_decoder": True}, "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": ROPE}}, "dbrx.ffn_config": {"moe_top_k": 2},
    "dbrx.attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1}, "mamba2": {"num_heads": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2}, "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_embds": False, "is_decoder": True, "lsh_attn_chunk_length": 16, "local_attn_chunk_length": 16},
    "xlm": {"causal": True}, "xmod": {"default_language": "en_XX"},
    "zamba": {"attention_hidden_size": 64, "attention_head_dim": 16, "num_hidden_layers": 4,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"n_mamba_heads": 8, "attention_hidden_size": 64, "attention_head_dim": 16}}


def size_of(name):
    return next((size for pattern, size in SIZES if pattern.fullmatch(name)), None)


def tiny(config, vocab, type):
    """The keys that make a tiny config of the class of `config`, a default one."""
    default, keys, spare = config.to_dict(), {}, 0
    for name, value in default.items():
        if name in TOKENS:
            keys[name] = TOKENS[name]
        elif not isinstance(value, int) or isinstance(value, bool):
            continue
        elif name.endswith(("_token_id", "_token_index")):  # of images, say: ids that no text has
            keys[name] = vocab - 1 - spare % EXTRA
            spare += 1
        elif size := size_of(name):
            keys[name] = min(value, size)
        elif name.endswith(("key_value_heads", "num_kv_heads")):
            keys[name] = value if value < 2 else 4 if value == default.get("num_attention_heads") else 2
        elif name.startswith(("vocab_size", "decoder_vocab", "unpadded_vocab")):
            keys[name] = vocab
    keys |= few_layers(default)
    for part in config.sub_configs:
        if getattr(config, part, None) is not None:
            keys[part] = tiny(getattr(config, part), vocab, f"{type}.{part}")
    return keys | OVERRIDES.get(type, {})


def few_layers(default):
    """Lists that have an entry for each layer, cut to as few layers as show every kind, and the number of these layers."""
    count = next((name for name in default if "layer" in name and size_of(name) == 2 and default[name]), None)
    lists = {name: value for name, value in default.items() if isinstance(value, list) and len(value) == default.get(count)}
    if not lists:
        return {}
    entries = list(zip(*([(name, str(entry)) for entry in value] for name, value in lists.items())))  # one a layer
    picked = [n for n, entry in enumerate(entries) if not set(entry) <= {kind for kinds in entries[:n] for kind in kinds}]
    if not 2 <= len(picked) <= 8:  # more: numbers that differ in each layer
        picked = range(2)
    return {name: [value[layer] for layer in picked] for name, value in lists.items()} | {count: len(picked)}


@torch.no_grad()
def build(type, folder, tokenizer):
    """Write the tiny model into `folder`. Returns it, on the CPU, in fp32."""
    default = CONFIG_MAPPING[type]()
    keys = tiny(default, len(tokenizer) + EXTRA, type)
    if type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not default.is_encoder_decoder:
        keys["is_decoder"] = True  # otherwise it is an encoder, and refused as one
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(CONFIG_MAPPING[type](**keys), dtype=torch.float32)
    for parameter in lm.parameters():
        if parameter.dim() > 1:
            parameter.normal_(0, 0.15)  # larger than usual, so that attention is far from uniform
        else:
            parameter.add_(torch.randn_like(parameter) * 0.02)
    for module in lm.modules():
        if isinstance(module, torch.nn.Embedding) and module.padding_idx is not None:
            module.weight[module.padding_idx] = 0  # as from_pretrained makes it
    saved = lm.state_dict().keys()
    for name, buffer in lm.named_buffers():
        computed = name.endswith(("_decay", "slope_rate"))  # MiniMax: from the config, also in a trained checkpoint
        if name in saved and buffer.is_floating_point() and not computed:
            buffer.uniform_(0.1, 1.0)
    lm.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return lm.eval()


def make_pairs(folder, tokenizer):
    """Six pairs, as the product reads them. Two have responses of about 90 tokens, the others of about 12."""
    rng, rows = random.Random(0), []
    for n in range(6):
        a, b = (" ".join(toy.write_response(rng).strip(" .") for _ in range(1 if n % 3 else 6)) for _ in "ab")
        rows.append({"prompt": f"review of the {rng.choice(toy.PLACES)} :", "response_a": f" {a}", "response_b": f" {b}",
                     "label": rng.choice("ab")})
    toy.write_jsonl(folder / "train.jsonl", rows)
    renderer = data.Renderer(tokenizer, max_prompt_length=32, max_length=250)
    return data.load_pairs({str(folder): 1.0}, ["train"], renderer, "train", workers=1, say=lambda line: None)[0]


@torch.no_grad()
def plain(lm, batch, changed=False):
    """Log-prob of each response token by the model's own forward, row by row: (N,) fp64.

    batch: in two rows a pair.  changed: replace each row's last token first, and count its own log-prob as 0.
    """
    logps = []
    for row, segments in zip(batch.input_ids, batch.segments):
        row, n = row[segments >= 0].clone(), int((segments > 0).sum())
        row[-1] = 5 if changed else row[-1]
        logits = lm(input_ids=row[None], use_cache=False).logits[0, -n - 1:-1].double()  # (n, V)
        logps.append(logits.log_softmax(-1).gather(-1, row[-n:, None]).squeeze(-1))
        logps[-1][-1] *= not changed
    return torch.cat(logps)


def original(lm, batch):
    """(plain log-probs (N,), how far a changed last token moves them) of the model that was built."""
    lm.set_experts_implementation("eager")  # the others take no double precision
    try:
        logps = plain(lm.double(), batch)
    except RuntimeError:  # its own code mixes dtypes then
        logps = plain(lm.float(), batch)
    ends = batch.lengths.cumsum(0) - 1
    return logps, (logps.index_fill(0, ends, 0.0) - plain(lm, batch, changed=True)).abs().max().item()


def step(engine, pairs):
    """One AdamW step on all pairs. Returns (loss, gradient norm, log-probs (N,) before the step)."""
    rows, parameters = list(range(len(pairs))), list(engine.module.parameters())
    pairs.ref_logps = score(engine, pairs, [rows], "reference")
    engine.train()
    batch = pairs.batch(rows, "cpu")
    with torch.no_grad():
        logps = engine(batch, per_token="ours")
    margin = adpo.margins(adpo.implicit_rewards(engine(batch), batch.ref_logps, beta=0.1))
    labels = adpo.choose_labels(margin, torch.tensor([1.0, -1.0] * (len(rows) // 2)), adpo.gate(margin, gamma=1.3))
    loss = adpo.preference_loss(margin, labels).mean()
    loss.backward()
    torch.optim.AdamW(parameters, lr=1e-3).step()
    return loss.item(), torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item(), logps


def why_saved_wrong(engine, pairs, config, tokenizer):
    """Save the trained model. Returns None, or what is wrong with what was written."""
    output = Path(config.output_dir)
    output.mkdir()
    save_model(engine, tokenizer, output, config)
    before, after = (load_file(Path(folder, "model.safetensors")).keys() for folder in (config.model_name_or_path, output))
    if before != after:
        return f"saved: {len(after)} tensors instead of {len(before)}"
    batch = data.collate(pairs, [1], shared=False)
    engine.eval()
    with torch.no_grad():
        why = why_not_saved(config, output, batch, engine(batch, per_token="ours"))
    return why and f"saved: {why}"


def train(config, tokenizer, pairs, batch, wanted, moved):
    """(verdict, detail) of the model in config.model_name_or_path.  batch: the pairs.  wanted, moved: from original()."""
    check_models(config, tokenizer)
    policy = load_policy(config)
    engine = functools.partial(policy)  # in place of DeepSpeed's, with what the checks and save_model use of it
    vars(engine).update(module=policy, device=torch.device("cpu"), eval=policy.eval, train=policy.train)
    share_prompts(policy, [(pairs, None)])
    check_against_plain_forward(engine, pairs)
    loss, norm, logps = step(engine, pairs)
    error = torch.stack([part.pow(2).mean().sqrt() for part in (logps - wanted).split(batch.lengths.tolist())]).max().item()
    why = why_saved_wrong(engine, pairs, config, tokenizer)
    wrong = [text for text, right in (
        (f"log-probs differ by {error:.2g} nats a token", error <= LIMIT),
        (f"the loss of the first step is {loss:.6f}, not log 2", abs(loss - math.log(2)) <= LOSS_LIMIT),
        (f"a later token moves log-probs by {moved:.2g}", moved <= LIMIT),
        (f"the gradient's norm is {norm}", 0 < norm < math.inf), (why, why is None)) if not right]
    without_mask = WITHOUT_MASK * (policy.takes_rows and pairs.shared)
    return ("wrong" if wrong else "right" if pairs.shared else "two rows"), "; ".join(wrong) or without_mask


def verdict(type, tokenizer, pairs, folder):
    """(type, verdict, detail), whatever happens short of a crash."""
    def failure(error):
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{error.__class__.__name__}: {one_line(error, 200)} ({Path(place.filename).name}, line {place.lineno})"

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(io.StringIO()):
        batch = data.collate(pairs, list(range(len(pairs))), shared=False)
        try:
            lm = build(type, folder / "model", tokenizer)
            wanted, moved = original(lm, batch)
        except Exception as error:
            return type, "not built", failure(error)
        config = Config(str(folder / "model"), dataset_mixer={"pairs": 1.0}, output_dir=str(folder / "out"))
        try:
            result, detail = train(config, tokenizer, pairs, batch, wanted, moved)
        except UsageError as error:
            return type, "refused", one_line(str(error).replace(str(folder), "…"))
        except Exception as error:
            return type, "traceback", failure(error)
    reasons = [line.partition(", ")[2] for line in said.getvalue().splitlines() if line.startswith("two rows")]
    reasons += [line.replace(", which is slower: without one, ", ", because without one ")
                for line in said.getvalue().splitlines() if line.startswith("attention with a mask")]
    return type, result, detail or "".join(reasons[:1])


def try_one(type, tokenizer, pairs, folder):
    """In a process of its own: write folder/row.json."""
    signal.alarm(SECONDS)  # which kills a process that hangs
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    row = verdict(type, tokenizer, pairs, folder)
    (folder / "row.json").write_text(json.dumps(row))


def try_all(types, tokenizer, minutes, workers):
    """Yield the row (type, verdict, detail) of each type as it comes; start no other after so many minutes."""
    end, left, running = time.monotonic() + minutes * 60, list(types[::-1]), {}
    fork = multiprocessing.get_context("fork")  # so that everything is imported once
    with tempfile.TemporaryDirectory() as home, tqdm(total=len(types), desc="types", dynamic_ncols=True) as progress:
        pairs = make_pairs(Path(home), tokenizer)
        while running or left and time.monotonic() < end:
            while left and len(running) < workers and time.monotonic() < end:
                type = left.pop()
                folder = Path(home) / type
                folder.mkdir()
                process = fork.Process(target=try_one, args=(type, tokenizer, pairs, folder))
                process.start()
                running[process.sentinel] = type, process, folder
            for sentinel in wait(list(running)):
                type, process, folder = running.pop(sentinel)
                process.join()
                found = folder / "row.json"
                died = [type, "traceback", f"its process died, with exit code {process.exitcode}"]
                yield json.loads(found.read_text()) if found.exists() else died
                progress.update()


def page(rows, total, path, option):
    """Write the rows of the types that were tried, out of `total`.  option: of the command line, or empty."""
    counts = Counter(row[1] for row in rows)
    rows = sorted(rows, key=lambda row: (-list(VERDICTS).index(row[1]), row[0]))
    bar = chr(92) + "|"
    taken = sum(detail == WITHOUT_MASK for *_, detail in rows)
    about_masks = f"""
- Attention is what it is on a GPU in bf16, but in fp32 and with a stand-in for its kernel: {taken} types take it without a
  mask. Of these, layers whose window is shorter than a row still get one.""" if option else ""
    path.write_text(f"""# Architectures{", with attention as on a GPU" * bool(option)}

Made by

    python benchmarks/architectures.py{option}

**Verdict: of {total} causal-LM types of transformers, {counts["right"] + counts["two rows"]} are trained right and \
{counts["refused"]} are refused in one line; {counts["wrong"]} are wrong and {counts["traceback"]} end in a traceback. \
{counts["not built"]} could not be built, and {total - len(rows)} were not tried.**

| verdict | types | meaning |
| --- | --: | --- |
""" + "".join(f"| {name} | {counts[name]} | {meaning} |\n" for name, meaning in VERDICTS.items()) + f"""
- Each type is a tiny model with random weights and buffers, loaded, checked, trained for one step on six pairs and saved by
  the functions that a run calls, in fp32 on a CPU. Two pairs are longer than any attention window (16 tokens).
- Right means: the log-probs of each response are within {LIMIT:g} nats a token of a plain forward of the original in double
  precision (root mean square; in fp32 if the model's code takes nothing else); the loss of the first step is within
  {LOSS_LIMIT:g} of log 2; a later token moves no earlier log-prob; the gradient's norm is finite and not 0; what was saved
  has every tensor and gives the policy's log-probs.{about_masks}
- Encoders (BERT and its kind) are built with `is_decoder: true`; without it they are refused as encoders.
- Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}

| type | verdict | why |
| --- | --- | --- |
""" + "".join(f"| {type} | {result} | {detail.replace('|', bar)} |\n" for type, result, detail in rows), encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    parser.add_argument("--only", nargs="+", metavar="TYPE", choices=known, help="try these types alone")
    parser.add_argument("--minutes", type=float, default=60, help="start no other type after so long")
    parser.add_argument("--workers", type=int, default=2, help="types to try at a time")
    parser.add_argument("--gpu-attention", action="store_true", help="attention without a mask, where a model takes it")
    args = parser.parse_args()
    if args.gpu_attention:
        from benchmarks import flash_on_cpu  # noqa: F401  the kernel
        model.skips_masks = model.calls_attention_of_pairs
    name, option = ("architectures_gpu.md", " --gpu-attention") if args.gpu_attention else ("architectures.md", "")
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    types, rows = args.only or known, []
    for row in try_all(types, toy.make_tokenizer(), args.minutes, args.workers):
        rows.append(row)
        if args.only:
            tqdm.write("  ".join(row))
        else:
            page(rows, len(types), ROOT / "benchmarks" / "results" / name, option)
    return int(any(result in ("wrong", "traceback") for _, result, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
