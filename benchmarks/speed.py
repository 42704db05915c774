"""Speed and memory next to two peers, with the same pairs, model, precision and machine. One peer is TRL 1.16's DPOTrainer,
the other a DPO loop that works as the official code's does, written anew.

    python benchmarks/speed.py --smollm2 MODEL_DIR --hh HH_FILE               every row; most of an hour on two cores
    python benchmarks/speed.py --only hh,uf --threads 1                       some of the rows
    python benchmarks/speed.py --profile --smollm2 MODEL_DIR --hh HH_FILE     where the time and memory of a step go

SmolLM2's row needs a folder with SmolLM2-135M-Instruct and HH's harmlessness pairs (jsonl or jsonl.gz), and is left out
without them. --trl-python PATH names a Python that has TRL; by default one is made in outputs/trl-env.

Each run has its own process, and the two sides of a row run one after the other. Speed is in real tokens per second, with
the prompt counted once for each response: the median over all optimiser steps but the first two. Memory is the peak of the
resident set (on a GPU: of what torch has allocated) above its size when the model had just been loaded. On the fewest
threads, both sides also compute the loss of the same 8 pairs, with a reference that is not the policy. If they disagree, the
benchmark stops.

All runs are plain DPO, the paper's baseline, so that both sides do the same work. Writes benchmarks/results/speed.md,
speed.json and speed.png (on a GPU speed_gpu.*); with --profile, speed_profile.md. --only keeps the other rows, together with
the name of the machine that they were measured on. Exit code 0, or 2 if it could not run.
"""

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import trl_parity  # makes TRL's environment

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE = 1e-4  # relative, between the losses of the two sides
HH_WINDOW = 2048  # pairs of HH whose padding is counted: as many as are sorted by length together
MICRO = 8  # pairs per micro-batch and per step: TRL's default
FEWER = {"smollm2": 4}  # with 8, TRL needs all of 24 GB and waits for them
SMALL = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 8, "num_attention_heads": 4,
         "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False}
VOCABULARY = 8192
BILLION = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
           "num_key_value_heads": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False}

# The settings of a side. Each side orders the pairs as it does by default.
PLAIN = {"bf16": False, "checkpointing": False}
AS_SHIPPED = {"bf16": True, "checkpointing": False}
TRL_DEFAULTS = {"bf16": True, "checkpointing": True}

# name: (title, mean tokens of a prompt and of a response, our settings, peer, its settings, aims: lowest ratio of speed and
# highest ratio of memory)
CASES = {
    "hh": ("HH-like, both with precomputed reference", 134, 64, PLAIN, "trl", PLAIN | {"precompute": True}, 3.0, 0.35),
    "hh-defaults": ("HH-like, TRL's defaults (live reference, bf16, checkpointing)", 134, 64, AS_SHIPPED, "trl",
                    TRL_DEFAULTS, 3.0, 0.35),
    "uf": ("UltraFeedback-like", 90, 180, PLAIN, "trl", PLAIN | {"precompute": True}, 2.0, 0.40),
    "long": ("long prompts", 320, 64, PLAIN, "trl", PLAIN | {"precompute": True}, 3.0, 0.35),
    "smollm2": ("SmolLM2-135M on HH, 4 pairs a step", None, None, PLAIN, "trl", PLAIN | {"precompute": True}, 2.5, 0.35),
    "smollm2-8": ("SmolLM2-135M on HH, 8 pairs a step", None, None, PLAIN, "trl", PLAIN | {"precompute": True}, 2.5, 0.35),
    "official": ("HH-like, the official code's loop (live reference)", 134, 64, PLAIN, "official", PLAIN, 4.0, 0.25),
    # Only on a GPU.
    "billion": ("1.1 B shape, UltraFeedback-like, bf16", 160, 300, AS_SHIPPED, "trl", AS_SHIPPED | {"precompute": True},
                2.0, 0.5),
}


class Stop(Exception):
    """The comparison cannot run; the message says why. Exit code 2."""


# ----------------------------------------------------------------------------------------------------------------------
# The sides. Each runs in its own process and returns {"speeds": tokens per second of each step, "losses": of each step,
# "train": seconds of all steps, "reference": seconds that scoring the reference takes, "memory": bytes above the loaded
# model}. A job with a "reference" folder compares the loss: one step on MICRO pairs.

class Memory:
    """Peak memory since `mark()`, above its size then: of the resident set (Linux), or of what torch has allocated on a
    GPU."""

    def mark(self):
        gc.collect()
        if cuda():
            import torch
            torch.cuda.reset_peak_memory_stats()
            self.base = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's record of the peak
            self.base = self.resident("VmRSS")

    def above(self):
        if cuda():
            import torch
            return torch.cuda.max_memory_allocated() - self.base
        return self.resident("VmHWM") - self.base

    @staticmethod
    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def cuda():
    import torch
    return torch.cuda.is_available()


class Clock:
    """Times at the ends of steps; each waits until the device has finished."""

    def __init__(self):
        self.ends = []

    def tick(self):
        if cuda():
            import torch
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def result(self, tokens, losses, reference, memory):
        seconds = [b - a for a, b in zip(self.ends, self.ends[1:])]
        return {"speeds": [n / s for n, s in zip(tokens, seconds)], "seconds": seconds, "losses": losses,
                "train": sum(seconds), "reference": reference, "memory": memory.above()}


def timed(function, seconds):
    """`function`, with the seconds of each call appended to the list."""
    def wrapper(*args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - start)
        return result
    return wrapper


def our_config(job):
    """train.py's Config for a job."""
    from runtime.parse import parse_config
    config = {
        "model_name_or_path": job["model"], "ref_model_name_or_path": job["reference"],
        "dataset_mixer": {job["pairs"]: 1.0}, "dataset_splits": ["train"], "do_eval": False, "data_selection": False,
        "max_length": 1024, "max_prompt_length": 768, "per_device_train_batch_size": job["micro"], "learning_rate": 1e-6,
        "lr_scheduler_type": "constant", "output_dir": job["output"], "bf16": job["bf16"], "num_threads": job["threads"],
        "gradient_checkpointing": job["checkpointing"], "attn_implementation": job.get("attention"), "logging_steps": 1,
        "save_strategy": "no"}
    path = Path(job["output"]).with_suffix(".yaml")
    path.write_text(json.dumps(config))  # JSON is YAML
    return parse_config(["--config", str(path)])


def after(owner, name, then):
    """Make every call of owner.name be followed by then(result)."""
    function = getattr(owner, name)

    def wrapper(*args, **kwargs):
        result = function(*args, **kwargs)
        then(result)
        return result
    setattr(owner, name, wrapper)


def run_train(job):
    """train.py's own main, in this process."""
    import train
    from runtime.launch import set_up
    config = our_config(job)
    set_up(config)
    train.main(config)


def ours(job):
    """train.py as it is. Its own metrics have tokens and times; calls around its loop show when training begins and ends."""
    import train
    memory, clock, reference = Memory(), Clock(), []
    after(train, "load_policy", lambda _: memory.mark())
    after(train.report, "Log", lambda _: clock.tick())  # just before the loop
    after(train.report, "summarise", lambda _: clock.tick())  # just after it
    train.add_reference = timed(train.add_reference, reference)
    run_train(job)
    rows = [json.loads(line) for line in (Path(job["output"]) / "metrics.jsonl").read_text().splitlines()]
    return {"speeds": [row["tokens_per_second"] for row in rows], "losses": [row["loss"] for row in rows],
            "train": clock.ends[1] - clock.ends[0], "reference": sum(reference), "memory": memory.above()}


def trl(job):
    """TRL's DPOTrainer as it is, in TRL's environment."""
    import datasets
    import torch
    import transformers
    from trl import DPOConfig, DPOTrainer
    torch.set_num_threads(job["threads"])
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    model = load(job["model"])
    memory, clock, reference, tokens = Memory(), Clock(), [], []
    memory.mark()
    arguments = DPOConfig(
        output_dir=job["output"], per_device_train_batch_size=job["micro"], max_length=1024, learning_rate=1e-6,
        lr_scheduler_type="constant", bf16=job["bf16"], gradient_checkpointing=job["checkpointing"], beta=0.1,
        precompute_ref_log_probs=job["precompute"], logging_steps=1, save_strategy="no", num_train_epochs=1,
        use_cpu=not cuda(), report_to="none", disable_tqdm=True)
    DPOTrainer._precompute_ref_logps = timed(DPOTrainer._precompute_ref_logps, reference)
    trainer = DPOTrainer(
        model=model, ref_model=load(job["reference"]) if job["reference"] else None, args=arguments,
        processing_class=transformers.AutoTokenizer.from_pretrained(job["model"]),
        train_dataset=datasets.Dataset.from_list(read_pairs(job["pairs"])))
    collate = trainer.data_collator

    def counting_collate(examples):
        batch = collate(examples)
        tokens.append(int(batch["attention_mask"].sum()))
        return batch

    class Ticks(transformers.TrainerCallback):
        def on_train_begin(self, *_, **__):
            clock.tick()

        def on_step_end(self, *_, **__):
            clock.tick()
    trainer.data_collator = counting_collate
    trainer.add_callback(Ticks())
    trainer.train()
    return clock.result(tokens, [row["loss"] for row in trainer.state.log_history if "loss" in row], sum(reference), memory)


def official(job):
    """DPO as the official code's trainer does it (similar to TRL 0.12): a second model is the reference and scores every
    batch, each response has its own row after a copy of the prompt, rows are padded to the longest, and all positions get
    logits and a log_softmax. The order is random. What that code gets wrong (cut tokens, bf16 sums, the gate in evaluation)
    is left out."""
    import torch
    import transformers
    torch.set_num_threads(job["threads"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    model = load(job["model"]).train()
    memory, clock, tokens, losses = Memory(), Clock(), [], []
    memory.mark()
    device = torch.device("cuda" if cuda() else "cpu")
    model.to(device)
    reference = load(job["reference"] or job["model"]).to(device).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    pairs = read_pairs(job["pairs"])
    random.Random(0).shuffle(pairs)

    def rows(batch):
        """input_ids, attention_mask and labels, each (2B, T): the chosen responses, then the rejected ones."""
        lines = []
        for side in ("chosen", "rejected"):
            for pair in batch:
                prompt = tokenizer(pair["prompt"], add_special_tokens=False).input_ids
                both = tokenizer(pair["prompt"] + pair[side], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
                lines.append((both, [-100] * len(prompt) + both[len(prompt):]))
        width = max(len(ids) for ids, _ in lines)
        pad = [(ids + [0] * (width - len(ids)), [1] * len(ids) + [0] * (width - len(ids)),
                labels + [-100] * (width - len(ids))) for ids, labels in lines]
        return (torch.tensor(column, device=device) for column in zip(*pad))

    def logps(lm, ids, mask, labels):
        logits = lm(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]  # (2B, T − 1, V)
        scored = labels[:, 1:] != -100
        picked = logits.log_softmax(-1).gather(-1, labels[:, 1:].clamp(min=0)[..., None]).squeeze(-1)
        return (picked * scored).sum(-1).chunk(2)  # 2 × (B,)

    clock.tick()
    for start in range(0, len(pairs), job["micro"]):
        ids, mask, labels = rows(pairs[start:start + job["micro"]])
        with torch.no_grad():
            ref_chosen, ref_rejected = logps(reference, ids, mask, labels)
        chosen, rejected = logps(model, ids, mask, labels)
        margin = 0.1 * ((chosen - ref_chosen) - (rejected - ref_rejected))
        loss = -torch.nn.functional.logsigmoid(margin).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        tokens.append(int(mask.sum()))
        losses.append(loss.item())
        clock.tick()
    return clock.result(tokens, losses, 0.0, memory)


def load(folder):
    import torch
    import transformers
    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def read_pairs(folder):
    with open(Path(folder) / "train.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# ----------------------------------------------------------------------------------------------------------------------
# Models and pairs

def random_model(folder, shape):
    """Write a random Llama and a tokenizer of the words w0, w1, …"""
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = ["<pad>", "<unk>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>", model_max_length=4096,
        clean_up_tokenization_spaces=False).save_pretrained(folder)
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=VOCABULARY, pad_token_id=0, bos_token_id=None, eos_token_id=2, **shape)).save_pretrained(folder)


def without_template(source, folder):
    """Copy a model folder without its chat template: both sides get the same strings and turn them into the same tokens."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("chat_template*", "*.bin"))
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("chat_template", None)
    path.write_text(json.dumps(settings))


def other_model(source, folder):
    """Write the model with slightly changed weights: a reference that is not the policy, to compare the loss with."""
    import torch
    import transformers
    model = load(source)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * parameter.std() * torch.randn_like(parameter)
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(folder)


def word_pairs(prompt, response, count):
    """Pairs of random words, with log-normal lengths of about these means."""
    rng = random.Random(0)

    def text(mean):
        n = max(2, round(mean * rng.lognormvariate(-0.18, 0.6)))
        return " " + " ".join(f"w{rng.randrange(VOCABULARY - 3)}" for _ in range(min(n, 3 * mean)))
    return [{"prompt": text(prompt), "chosen": text(response), "rejected": text(response)} for _ in range(count)]


def hh_pairs(path, tokenizer, count):
    """Random pairs of an HH file as {prompt, chosen, rejected}, all of them short enough not to be cut."""
    from runtime.formats import parse_row
    from runtime.sources import read_rows
    pairs = []
    for place, row in read_rows(str(path), "train"):
        parsed = parse_row(row, place)
        prompt, (chosen, rejected) = parsed["prompt"], parsed["responses"]
        longest = max(len(tokenizer(prompt + side).input_ids) for side in (chosen, rejected))
        if chosen.strip() and rejected.strip() and chosen != rejected and longest < 768:
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return random.Random(0).sample(pairs, count)


def write_pairs(folder, pairs):
    folder.mkdir(parents=True)
    (folder / "train.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


# ----------------------------------------------------------------------------------------------------------------------
# How far from the limit: the machine's own rate of matrix products; growth with length and vocabulary; the parts of a step

def unique_flops(config, pairs, per_weight=6):
    """(FLOPs that a step on these pairs needs, real tokens). 6 FLOPs per weight and token (4 per frozen weight, whose
    gradient is not computed), with the prompt counted once for both responses and the head for response tokens only; plus
    the two products of attention over what each token sees, times 3 for forward and backward."""
    h, layers = config.hidden_size, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or h // config.num_attention_heads
    q, kv = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    weights = layers * (2 * h * q + 2 * h * kv + 3 * h * config.intermediate_size)
    flops = tokens = 0
    for prompt, first, second in pairs:
        seen = (prompt + first) ** 2 / 2 + (prompt + second) ** 2 / 2 - prompt ** 2 / 2
        flops += per_weight * (weights * (prompt + first + second) + config.vocab_size * h * (first + second))
        flops += 3 * 4 * layers * q * seen
        tokens += 2 * prompt + first + second
    return flops, tokens


def limit(job):
    """FLOPs per second of matrix products alone: for each weight the product of the forward pass and the two of the backward
    pass, with as many tokens as a micro-batch has, in the dtype of training."""
    import torch
    import transformers
    torch.set_num_threads(job["threads"])
    torch.set_default_device("cuda" if cuda() else "cpu")
    config = transformers.AutoConfig.from_pretrained(job["model"])
    dtype = torch.bfloat16 if job["bf16"] else torch.float32
    h, f = config.hidden_size, config.intermediate_size
    kv = h * config.num_key_value_heads // config.num_attention_heads
    layers, tokens = config.num_hidden_layers, job["tokens"]
    shapes = [(tokens, h, n, layers) for n in (h, kv, kv, h, f, f)] + [(tokens, f, h, layers),
                                                                       (job["responses"], h, config.vocab_size, 1)]
    seconds = flops = 0
    for m, k, n, times in shapes:
        x, w, g = (torch.randn(shape).to(dtype) for shape in ((m, k), (n, k), (m, n)))
        for a, b in ((x, w.t()), (g, w), (g.t(), x)):
            seconds += times * statistics.median(clocked(torch.matmul, a, b) for _ in range(6))
            flops += times * 2 * m * k * n
    return {"rate": flops / seconds}


def clocked(function, *args):
    """Seconds that a call takes, including the device's work."""
    clock = Clock()
    clock.tick()
    function(*args)
    clock.tick()
    return clock.ends[1] - clock.ends[0]


def growth(job):
    """Seconds of forward and backward of one row by its number of tokens, and of attention alone; peak memory by size of the
    vocabulary."""
    import datasets
    import torch
    import transformers

    import adpo
    import data
    torch.set_num_threads(job["threads"])
    lm = load(job["model"]).train()
    module = adpo.PairLogps(lm, 512)
    config = lm.config

    def row(tokens, vocabulary):
        """A batch of one pair, whose prompt is half of the row."""
        def ids(n):
            return torch.randint(3, vocabulary, (n,)).tolist()
        pair = {"prompt_ids": ids(tokens // 2), "first_ids": ids(tokens // 4), "second_ids": ids(tokens // 4)}
        table = datasets.Dataset.from_list([{"id": "row", "tokens": tokens, **pair}])
        return data.collate(data.Pairs(table, "", {}), [0])

    def step(module, batch):
        module.zero_grad(set_to_none=True)
        module(batch).sum().backward()

    def mask(batch):
        return adpo.attention_mask(batch.segments, batch.positions, torch.float32)

    def attention(q, k, v, mask):
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).sum().backward()
    lengths = []
    for tokens in (256, 512, 1024, 2048, 4096):
        batch = row(tokens, config.vocab_size)
        step(module, batch)
        whole = statistics.median(clocked(step, module, batch) for _ in range(5))
        q, k, v = (torch.randn(1, config.num_attention_heads, tokens, config.hidden_size // config.num_attention_heads,
                               requires_grad=True) for _ in "qkv")
        attention(q, k, v, mask(batch))
        bare = statistics.median(clocked(attention, q, k, v, mask(batch)) for _ in range(5))
        bare = bare * config.num_hidden_layers + statistics.median(clocked(mask, batch) for _ in range(5))
        lengths.append([tokens, whole, bare])
    vocabularies = []
    for vocabulary in (8192, 32768, 131072):
        shape = SMALL | {"vocab_size": vocabulary, "num_hidden_layers": 1}
        lm = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        module, batch, memory = adpo.PairLogps(lm, 256), row(2048, vocabulary), Memory()
        memory.mark()
        module(batch).sum().backward()
        first = memory.above() - sum(parameter.grad.nbytes for parameter in lm.parameters())
        memory.mark()
        module(batch).sum().backward()  # adds to the gradients of the first
        vocabularies.append([vocabulary, max(0, first), memory.above(), 256 * vocabulary * 4,
                             len(batch.targets) * vocabulary * 4])
    return {"lengths": lengths, "vocabularies": vocabularies}


def profile(job):
    """The parts of a run of train.py, [[part, seconds, calls, peak memory so far]], and the operators that take longest."""
    import torch

    import train
    parts, memory, clock = {}, Memory(), Clock()
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU] + (
        [torch.profiler.ProfilerActivity.CUDA] if cuda() else []))

    def watch(owner, name, title):
        function = getattr(owner, name)

        def wrapper(*args, **kwargs):
            begin = Clock()
            begin.tick()
            result = function(*args, **kwargs)
            begin.tick()
            seconds, calls = parts.get(title, (0.0, 0, 0))[:2]
            parts[title] = seconds + begin.ends[1] - begin.ends[0], calls + 1, memory.above()
            return result
        setattr(owner, name, wrapper)

    def watch_engine(result):
        watch(result[0].module.lm.base_model, "forward", "forward: the model's body")
        watch(train.adpo, "token_logps", "forward: head and log-probs")
        watch(result[0], "backward", "backward")
        watch(result[0], "step", "optimiser")

    def begin(_):
        parts.clear()  # nothing before this belongs to a step
        profiler.start()
        clock.tick()

    def end(_):
        clock.tick()
        profiler.stop()
    after(train, "load_policy", lambda _: memory.mark())
    after(train.deepspeed, "initialize", watch_engine)
    after(train.report, "Log", begin)
    after(train.report, "summarise", end)
    watch(train.data, "collate", "collate")
    watch(train.adpo, "gate", "gate")
    watch(train.Oracle, "answer", "oracle and ledger")
    watch(train, "metric_sums", "metrics")
    run_train(job)
    sort = "self_cuda_time_total" if cuda() else "self_cpu_time_total"
    return {"parts": [[title, *values] for title, values in parts.items()], "whole": clock.ends[1] - clock.ends[0],
            "operators": profiler.key_averages().table(sort_by=sort, row_limit=15, max_name_column_width=48)}


WORKERS = {"ours": ours, "trl": trl, "official": official, "limit": limit, "growth": growth, "profile": profile}


def work(name, path):
    """What a child process does: one worker, one job."""
    sys.path.insert(0, str(ROOT))
    job = json.loads(Path(path).read_text())
    Path(job["result"]).write_text(json.dumps(WORKERS[name](job)))


# ----------------------------------------------------------------------------------------------------------------------
# The two sides of each row

class Bench:
    """The models, pairs and child processes of this benchmark."""

    def __init__(self, options):
        self.options, self.folder = options, Path(options.outputs).resolve() / "speed"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.trl_python = None

    def model(self, case):
        """(model folder, folder of the same model with slightly changed weights)."""
        folder = self.folder / (case.partition("-")[0] if case.startswith(("smollm2", "billion")) else "small")
        if not folder.exists() and case.startswith("smollm2"):
            without_template(self.options.smollm2, folder)
        elif not folder.exists():
            random_model(folder, BILLION if case == "billion" else SMALL)
        other = folder.with_name(folder.name + "-moved")
        if not other.exists():
            other_model(folder, other)
        return folder, other

    def pairs(self, case, steps):
        """(folder with the pairs for this many steps, folder with the first step's)."""
        folder = self.folder / f"pairs-{case}"
        if not folder.exists():
            _, prompt, response, *_ = CASES[case]
            if prompt:
                pairs = word_pairs(prompt, response, steps * micro(case))
            else:
                import transformers
                tokenizer = transformers.AutoTokenizer.from_pretrained(self.model(case)[0])
                pairs = hh_pairs(self.options.hh, tokenizer, steps * micro(case))
            write_pairs(folder, pairs)
            write_pairs(folder.with_name(folder.name + "-few"), pairs[:micro(case)])
        return folder, folder.with_name(folder.name + "-few")

    def lengths(self, case, window=None):
        """[(prompt, first, second)] of a case's pairs, in tokens; with `window`, of that many pairs of HH."""
        import transformers
        tokenizer = transformers.AutoTokenizer.from_pretrained(self.model(case)[0])
        pairs = (hh_pairs(self.options.hh, tokenizer, window) if window
                 else read_pairs(self.pairs(case, self.options.steps)[0]))

        def count(text):
            return len(tokenizer(text, add_special_tokens=False).input_ids)
        return [(n := count(p["prompt"]), *(count(p["prompt"] + p[side]) + 1 - n for side in ("chosen", "rejected")))
                for p in pairs]

    def run(self, worker, job):
        """A worker's result, from a process of its own. Raises Stop with its last line of output if it fails."""
        threads = job["threads"]
        path = self.folder / f"{worker}.json"
        job |= {"output": str(path.with_suffix("")), "result": str(path.with_suffix(".result"))}
        shutil.rmtree(job["output"], ignore_errors=True)
        shutil.rmtree(self.folder / "cache", ignore_errors=True)  # so every run scores the reference
        path.write_text(json.dumps(job))
        if worker == "trl" and not self.trl_python:
            self.trl_python = trl_parity.peer_python(self.folder.parent, self.options.trl_python)
        python = self.trl_python if worker == "trl" else sys.executable
        env = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "HF_HOME": str(self.folder / "cache")}
        log = path.with_suffix(".log")
        with open(log, "w", encoding="utf-8") as file:
            code = subprocess.run([str(python), str(Path(__file__).resolve()), "--work", worker, str(path)], cwd=ROOT,
                                  env=env, stdout=file, stderr=subprocess.STDOUT).returncode
        if code:
            lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
            raise Stop(f"{log}: exit code {code}, {lines[-1] if lines else 'no output'}")
        return json.loads(path.with_suffix(".result").read_text())

    def fastest(self, worker, job):
        """A worker's result, with its median speed. On a GPU, train.py runs with each attention implementation that is
        installed, and the fastest counts."""
        kinds = [None]
        if worker == "ours" and cuda():
            kinds = ["sdpa", "flex_attention", *["flash_attention_2"] * bool(importlib.util.find_spec("flash_attn"))]
        found = []
        for kind in kinds:
            result = self.run(worker, job | {"attention": kind})
            speeds = result["speeds"][2:]
            found.append(result | {"speed": statistics.median(speeds), "spread": [min(speeds), max(speeds)],
                                   "attention": kind or "default"})
        return max(found, key=lambda result: result["speed"])

    def case(self, name, threads):
        """One row of the table: {"ours", "peer", "losses"}. Raises Stop if the two sides do not compute the same loss."""
        _, _, _, mine, peer, theirs, _, _ = CASES[name]
        model, moved = self.model(name)
        pairs, few = self.pairs(name, self.options.steps)
        sides, losses = {}, []
        for side, worker, settings in (("ours", "ours", mine), ("peer", peer, theirs)):
            job = {"model": str(model), "reference": None, "pairs": str(pairs), "threads": threads, "precompute": False,
                   "micro": micro(name)}
            job |= settings
            # Compare the loss in fp32. With the policy as its own reference it would be log 2 whatever we compute.
            if threads == min(self.options.threads):
                check = self.run(worker, job | {"bf16": False, "precompute": False, "reference": str(moved),
                                                "pairs": str(few)})
                losses.append(check["losses"][0])
            sides[side] = self.fastest(worker, job)
            print(f"{name}, {threads} thread{'s' if threads > 1 else ''}, {worker}: {sides[side]['speed']:,.0f} tokens/s, "
                  f"{sides[side]['memory'] / 1e6:,.0f} MB above the model", flush=True)
        if losses and abs(losses[0] - losses[1]) > TOLERANCE * abs(losses[1]):
            raise Stop(f"{name}: the losses of the same pairs are {losses[0]:.6f} (train.py) and {losses[1]:.6f} ({peer})")
        return sides | {"losses": losses}


def measure(bench, names, found, keep):
    """Measure these rows, put the numbers into `found`, and call keep(found) after each row."""
    import transformers
    threads = bench.options.threads
    for name in names:
        for count in threads:
            found["rows"][f"{name}/{count}"] = bench.case(name, count) | {"machine": found["machine"]}
            keep(found)
        if name in ("hh", "smollm2", "billion"):
            model, lengths = bench.model(name)[0], bench.lengths(name)
            flops, tokens = unique_flops(transformers.AutoConfig.from_pretrained(model), lengths)
            unique = sum(map(sum, lengths))
            for count in threads:
                rate = bench.run("limit", {
                    "model": str(model), "threads": count, "bf16": CASES[name][3]["bf16"], "tokens": 1024,
                    "responses": round(1024 * sum(a + b for _, a, b in lengths) / unique)})["rate"]
                speed = found["rows"][f"{name}/{count}"]["ours"]["speed"]
                found["limit"][f"{name}/{count}"] = {"rate": rate, "achieved": speed * flops / tokens}
        found["padding"][name] = padding(bench.lengths(name), micro(name))
        if name == "smollm2":
            found["hh_padding"] = padding(bench.lengths(name, HH_WINDOW), micro(name))
        found["fit"][name] = predicted(bench, name)
        keep(found)
    if found.get("growth", {}).get("machine") != found["machine"]:
        found["growth"] = {"machine": found["machine"]} | {
            str(count): bench.run("growth", {"model": str(bench.model("hh")[0]), "threads": count}) for count in threads}
        keep(found)


def micro(name):
    """Pairs per micro-batch and per step of a row."""
    return FEWER.get(name, MICRO)


def padding(lengths, pairs=MICRO):
    """Share of padding among the positions that train.py computes for these pairs.  pairs: of a step."""
    import data
    tokens = [sum(pair) for pair in lengths]
    order = data.epoch_order(tokens, 0, 42, pairs, group_by_length=True)
    cells = [cell for start in range(0, len(order), pairs)
             for step in data.split_batch(order[start:start + pairs], tokens, 1, pairs, 1024) for cell in step]
    return 1 - sum(tokens) / sum(len(cell) * max(tokens[i] for i in cell) for cell in cells)


def predicted(bench, name):
    """Bytes above the loaded model that tools/fit.py expects for our side of a row."""
    import transformers

    from tools import fit
    lengths, settings = bench.lengths(name), CASES[name][3]
    share = sum(a + b for _, a, b in lengths) / sum(map(sum, lengths))  # of the tokens that are responses
    tokens = micro(name) * max(map(sum, lengths)) if cuda() else max(1024, max(map(sum, lengths)))
    memory = fit.rank_memory(transformers.AutoConfig.from_pretrained(bench.model(name)[0]), 1, 2, settings["bf16"],
                             settings["checkpointing"], tokens, min(2048, round(share * tokens)))
    return sum(memory.values()) - memory["weights"]


# ----------------------------------------------------------------------------------------------------------------------
# The report

def mark(value, target, least):
    """A ratio, in bold if it reaches its aim."""
    good = value >= target if least else value <= target
    return f"{'**' if good else ''}{value:.2f}{'**' if good else ''}"


def is_starved(row, found):
    """Whether the peer came so close to the machine's memory that its speed is not its own."""
    return not found["suffix"] and row["peer"]["memory"] > 0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def table(found):
    """(rows of the main table, what missed its aim, where the peer ran short of memory), each a list of texts."""
    rows, missed, tight = [], [], []
    for key, row in found["rows"].items():
        name, threads = key.split("/")
        title, *_, speed_aim, memory_aim = CASES[name]
        a, b = row["ours"], row["peer"]
        speed, memory = a["speed"] / b["speed"], a["memory"] / b["memory"]
        epoch = (b["reference"] + b["train"]) / (a["reference"] + a["train"])
        place = f"{title}, {threads} thread{'s' if int(threads) > 1 else ''}"
        for what, value, aim, good in (("speed", speed, speed_aim, speed >= speed_aim),
                                       ("memory", memory, memory_aim, memory <= memory_aim),
                                       ("a whole epoch", epoch, 1.5, epoch >= 1.5)):
            if not good:
                missed.append(f"{place}: {what} {value:.2f}, the aim is {aim}")
        if is_starved(row, found):
            tight.append(f"{place}: {speed:.2f} times the peer's speed, {a['speed'] / b['spread'][1]:.2f} times that of its "
                         "fastest step")
            continue
        rows.append(
            f"| {title} | {threads} | {a['speed']:,.0f} | {b['speed']:,.0f} | {mark(speed, speed_aim, True)} "
            f"(≥ {speed_aim}) | {a['memory'] / 1e6:,.0f} | {b['memory'] / 1e6:,.0f} | "
            f"{mark(memory, memory_aim, False)} (≤ {memory_aim}) | {a['reference']:.1f} | {b['reference']:.1f} | "
            f"{mark(epoch, 1.5, True)} |")
    return rows, missed, tight


def report(found):
    """The results page."""
    steps, (rows, missed, tight) = found["steps"], table(found)
    elsewhere = {CASES[key.split("/")[0]][0]: row["machine"] for key, row in found["rows"].items()
                 if row["machine"] != found["machine"]}
    losses = [f"| {CASES[key.split('/')[0]][0]} | {row['losses'][0]:.6f} | {row['losses'][1]:.6f} |"
              for key, row in found["rows"].items() if row["losses"]]
    limits = [f"| {CASES[key.split('/')[0]][0]} | {key.split('/')[1]} | {x['rate'] / 1e9:,.1f} | "
              f"{x['achieved'] / 1e9:,.1f} | {x['achieved'] / x['rate']:.2f} |" for key, x in found["limit"].items()]
    paddings = "; ".join(f"{CASES[name][0]} {share:.1%}" for name, share in found["padding"].items())
    if "hh_padding" in found:
        paddings += (f". With {HH_WINDOW:,} pairs of HH, as many as a run sorts by length together, it is "
                     f"{found['hh_padding']:.2%}")
    fits = []
    for name, expected in found["fit"].items():
        peaks = [f"{row['ours']['memory'] / 1e6:,.0f}" for key, row in found["rows"].items() if key.startswith(f"{name}/")]
        fits.append(f"| {CASES[name][0]} | {expected / 1e6:,.0f} | {', '.join(peaks)} |")
    text = f"""\
# Speed and memory, side by side

Made by `python benchmarks/speed.py`; {found['machine']}; {found['versions']}. {MICRO} pairs a step
where the row gives no other number, {steps} steps, the first two not counted, AdamW. All sides do plain DPO,
which asks for every label, so that they do the same work.

![Tokens per second and memory of each row](speed{found['suffix']}.png)

Speed is in real tokens per second, with the prompt counted once for each response. Memory is the peak above the loaded
model, in MB. "Reference" is how many seconds it takes to score the reference for the whole epoch. "Epoch" is how many times
faster a run of one epoch is from start to end, including that. Bold: the aim in brackets is reached (for an epoch: ≥ 1.5).

| work | threads | tokens/s | peer | ratio | memory | peer | ratio | reference | peer | epoch |
| --- | --: | --: | --: | --- | --: | --: | --- | --: | --: | --: |
{chr(10).join(rows)}

{" ".join(f"{title} was measured on {machine}, and so was its share of the limit." for title, machine in elsewhere.items())}

{"Every aim is reached." if not missed else "Not reached: " + "; ".join(missed) + "."}

{"Not in the table, because the peer waits for the machine's memory: " + "; ".join(tight) + "." if tight else ""}

All sides compute the same loss. This is the loss of a step's pairs in fp32, with a reference that is not the policy:

| work | train.py | peer |
| --- | --: | --: |
{chr(10).join(losses)}

## How far from the limit

GFLOP/s of the model's matrix products alone, with the shapes and the dtype of a micro-batch, and of whole training steps.
For the steps, only what the unique tokens need is counted: 6 FLOPs per weight and token, the prompt once, the head for
response tokens only, and attention over what each token sees.

| work | threads | products alone | training | share |
| --- | --: | --: | --: | --: |
{chr(10).join(limits)}

Padding, as a share of the positions computed for the pairs of these {steps} steps: {paddings}.

What `tools/fit.py` expects above the loaded model, and what was measured (on one thread, on two), in MB. The resident set of
a CPU process also includes what its allocator keeps.

| work | expected | measured |
| --- | --: | --: |
{chr(10).join(fits)}
"""
    return text + (growth_report(found["growth"]) if "growth" in found else "")


def growth_report(growth):
    """The section about growth with the length of a row and with the vocabulary."""
    growths = {count: results for count, results in growth.items() if count != "machine"}
    lines = []
    for count, results in growths.items():
        rates = [(whole - bare) / tokens for tokens, whole, bare in results["lengths"]]
        lines += [f"| {count} | {tokens:,} | {1e3 * whole:,.0f} | {1e3 * bare:,.0f} | {1e6 * rate:,.0f} | "
                  f"{rate / rates[0]:.2f} |" for rate, (tokens, whole, bare) in zip(rates, results["lengths"])]
    vocabularies = ["| " + " | ".join([f"{size:,}", *(f"{memory / 1e6:,.0f}" for memory in rest)]) + " |"
                    for size, *rest in next(iter(growths.values()))["vocabularies"]]
    return f"""
## Growth

Forward and backward of one row, by its number of tokens. "Attention" is the time of attention calls alone, with the same
shape and mask, one per layer, and of making the mask. The shortest row is too short to use two threads well.

| threads | tokens per row | ms | attention, ms | µs per token without attention | relative to the shortest |
| --: | --: | --: | --: | --: | --: |
{chr(10).join(lines)}

Peak memory of forward and backward above the model and its gradients, in MB; one layer, 2,048 tokens, logits in chunks of
256. It is 0 if the chunk of logits is freed before the gradient of the embedding is made, which is as large. A later
micro-batch holds the gradient of the head's weight twice: its own, and the sum that it is then added to. (If ZeRO partitions
the gradients, every micro-batch is like the first.)

| vocabulary | first micro-batch of a step | later ones | one chunk of logits | all logits of the responses |
| --: | --: | --: | --: | --: |
{chr(10).join(vocabularies)}
"""


def chart(found, path):
    """Draw bars: tokens per second and memory of both sides of each row, with the largest number of threads."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    most = max(int(key.split("/")[1]) for key in found["rows"])
    rows = {key.split("/")[0]: row for key, row in found["rows"].items()
            if key.endswith(f"/{most}") and not is_starved(row, found)}
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.85 * len(rows) + 1.2), sharey=True)
    for axis, field, scale, label in ((axes[0], "speed", 1, "real tokens per second (more is better)"),
                                      (axes[1], "memory", 1e9, "peak GB above the model (less is better)")):
        for n, (name, row) in enumerate(rows.items()):
            a, b = row["ours"][field] / scale, row["peer"][field] / scale
            axis.barh(n - 0.2, a, 0.38, color="#1f4e79", label="train.py" if n == 0 else None)
            axis.barh(n + 0.2, b, 0.38, color="#c9c9c9", edgecolor="#555555", hatch="//",
                      label="peer" if n == 0 else None)
            axis.text(max(a, 0), n - 0.2, f" {a / b:.2f}×", va="center", fontsize=9)
        axis.set_xlabel(label)
        peers = {"trl": "TRL 1.16", "official": "naive loop"}
        titles = [f"{CASES[name][0]}\n(peer: {peers[CASES[name][4]]}; {row['machine']})" for name, row in rows.items()]
        axis.set_yticks(range(len(rows)), titles, fontsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].invert_yaxis()
    axes[1].legend(loc="lower right", frameon=False)
    figure.suptitle(f"The same pairs, model, precision and machine; {most} threads", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def profile_report(found, title, machine):
    """The results page of a profile."""
    parts = sorted(found["parts"], key=lambda part: -part[1])
    rest = found["whole"] - sum(part[1] for part in parts)
    lines = [f"| {title} | {seconds:.2f} | {seconds / found['whole']:.1%} | {calls} | {peak / 1e6:,.0f} |"
             for title, seconds, calls, peak in parts]
    return f"""\
# Where the time and the memory of a step go

Made by `python benchmarks/speed.py --profile`: {title}, 2 steps of {MICRO} pairs, {machine}. {found['whole']:.1f} s in all,
under torch's profiler. With checkpointing, or with several chunks of logits, the backward pass computes parts of the forward
pass again.

| part | seconds | share | calls | peak so far, MB above the model |
| --- | --: | --: | --: | --: |
{chr(10).join(lines)}
| everything else | {rest:.2f} | {rest / found['whole']:.1%} | | |

```
{found['operators'].strip()}
```
"""


def main(options):
    unknown = set(options.only) - set(CASES)
    if unknown:
        raise Stop(f"--only {', '.join(sorted(unknown))}: no such row; the rows are {', '.join(CASES)}")
    sys.path.insert(0, str(ROOT))
    here = Path(__file__).parent / "results"
    names = options.only or [name for name in CASES if name != "smollm2-8" and (name != "billion" or cuda())]
    if not (options.smollm2 and options.hh) and "smollm2" in names:
        print("SmolLM2's row is left out: it needs --smollm2 MODEL_DIR and --hh HH_FILE", flush=True)
        names.remove("smollm2")
    import torch
    machine = torch.cuda.get_device_name() if cuda() else trl_parity.cpu_name()
    suffix = "_gpu" if cuda() else ""
    options.threads = [1] if cuda() else options.threads
    bench = Bench(options)
    if options.profile:
        name = options.only[0] if options.only else "smollm2" if options.smollm2 and options.hh else "hh"
        job = {"model": str(bench.model(name)[0]), "pairs": str(bench.pairs(name, 2)[0]), "reference": None,
               "threads": max(options.threads), "micro": MICRO, **CASES[name][3]}
        text = profile_report(bench.run("profile", job), CASES[name][0], f"{machine}, threads: {max(options.threads)}")
        (here / f"speed_profile{suffix}.md").write_text(text, encoding="utf-8")
        print(text)
        return
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "deepspeed")]
    versions = ", ".join([f"Python {platform.python_version()}", *versions, f"TRL {trl_parity.TRL}"])
    facts = {"machine": machine, "suffix": suffix, "steps": options.steps, "versions": versions}
    path = here / f"speed{suffix}.json"
    found = facts | {"rows": {}, "limit": {}, "padding": {}, "fit": {}}
    if path.is_file() and options.only:  # keep the other rows if they had the same versions and number of steps
        before = json.loads(path.read_text()) | {"machine": machine}  # each row names its own machine
        found = before if {name: before[name] for name in facts} == facts else found

    def keep(found):
        found["rows"] = {f"{name}/{n}": row for name in CASES for n in (1, 2) if (row := found["rows"].get(f"{name}/{n}"))}
        path.write_text(json.dumps(found, indent=1), encoding="utf-8")
    measure(bench, names, found, keep)
    path.with_suffix(".md").write_text(report(found), encoding="utf-8")
    chart(found, path.with_suffix(".png"))
    print(report(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        sys.exit(work(*sys.argv[2:]))
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", metavar="ROWS", type=lambda text: text.split(","), default=[], help=", ".join(CASES))
    parser.add_argument("--threads", type=lambda text: [int(n) for n in text.split(",")], default=[1, 2],
                        help="default: 1,2")
    parser.add_argument("--steps", type=int, default=8, help="optimiser steps per run; default: 8")
    parser.add_argument("--smollm2", metavar="MODEL_DIR", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--hh", metavar="HH_FILE", help="HH's harmlessness pairs")
    parser.add_argument("--trl-python", metavar="PATH",
                        help="a Python that has TRL; default: one made in outputs/trl-env")
    parser.add_argument("--outputs", metavar="DIR", default=ROOT / "outputs", help="folder to work in; default: outputs")
    parser.add_argument("--profile", action="store_true", help="show the parts of a step instead of the comparison")
    try:
        main(parser.parse_args())
    except (Stop, trl_parity.Stop) as error:
        sys.exit(print(f"error: {error}", file=sys.stderr) or 2)
