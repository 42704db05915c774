"""What fits where: estimate the memory of one rank, for a model, a number of GPUs and a ZeRO stage.

    python tools/fit.py                                    the table of docs/performance.md
    python tools/fit.py MODEL_DIR --gpus 8 --zero 3        one model, part by part
    python tools/fit.py MODEL_DIR --fp32 --no-checkpointing --tokens 1024
    python tools/fit.py --plan                             the 7B shape on 8 and 64 GPUs, ZeRO-3, optimiser on the CPU:
                                                           memory, time and bytes of a step (the table of docs/scale.md)
    python tools/fit.py MODEL_DIR --plan --gpus 16 --tflops 300 --wire 12.5

The estimate is of what train.py holds at the peak of a step, from the shapes alone; benchmarks/results/speed.md compares it
with measured peaks. Activations are counted as in a layer of a Llama; one of another family may keep half or twice as much.
The estimate leaves out what the CUDA context, NCCL and fragmentation take, so keep 10 to 20 % free.

Exit code 2: the model does not exist, its config lacks something that the estimate needs, or a number does not make sense.
One line says which.
"""

import argparse
import math
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the repository root, for the import below

from runtime.errors import UsageError, one_line  # noqa: E402

GB = 1e9
# Rows of the table: name, and the keys of a Llama config.
SHAPES = {
    "SmolLM2-135M": dict(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, tie_word_embeddings=True),
    "Llama-3.2-1B": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                         num_attention_heads=32, num_key_value_heads=8, head_dim=64, tie_word_embeddings=True),
    "Zephyr-7B": dict(vocab_size=32000, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
                      num_attention_heads=32, num_key_value_heads=8),
    "Llama-3.1-70B": dict(vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
                          num_attention_heads=64, num_key_value_heads=8),
}
# What the estimate reads of a config, and the names that families have for it.
NAMES = {"hidden size": ["hidden_size"], "width of the MLP": ["intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"],
         "number of attention heads": ["num_attention_heads"], "number of layers": ["num_hidden_layers"],
         "size of the vocabulary": ["vocab_size"]}
# Columns of the table: GPUs, ZeRO stage, whether the optimiser is in host memory.
PLACES = [(1, 2, False), (1, 2, True), (8, 2, False), (8, 3, False), (64, 3, False)]


def parameters(config):
    """Number of weights of a model of this transformers config; nothing is allocated. Raises UsageError."""
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        raise UsageError(error)
    return sum(p.numel() for p in model.parameters())


def shape(config):
    """(H, width of the MLP, attention heads, layers, V) of a config, or of its text part. Raises UsageError if it does not
    name one of them."""
    config = config.get_text_config()
    found = []
    for what, names in NAMES.items():
        name = next((name for name in names if hasattr(config, name)), None)
        if name is None:
            raise UsageError(f"it names no {what}, as {' or '.join(names)}")
        found.append(getattr(config, name))
    h, mlp, *others = found
    return h, mlp or 4 * h, *others  # a width of None stands for 4 H, as in GPT-2


def rank_memory(config, gpus=1, stage=2, bf16=True, checkpointing=True, tokens=8192, chunk=2048, offload=False,
                bucket=50_000_000):
    """Bytes that one rank holds at the peak of a step, by part: {"weights", "gradients", "optimiser", "buffers",
    "activations", "logits"}.

    tokens: of a micro-batch, padding included.  chunk: response tokens whose logits are in memory at a time.  offload:
    fp32 weights, gradients and the optimiser's moments are in host memory.  bucket: elements that DeepSpeed reduces or
    gathers at a time.  This follows ZeRO (arXiv 1910.02054, section 5): what a stage partitions is divided by the GPUs.
    """
    n, width = parameters(config), 2 if bf16 else 4
    h, _, _, _, vocabulary = shape(config)
    alone = gpus == 1 and stage < 3 and not offload
    stage = int(bf16) if alone else max(stage, int(bf16 or offload))  # as in runtime/engine.py
    shares = [gpus if stage >= needed else 1 for needed in (3, 2, 1)]  # of weights, gradients, optimiser
    master = 4 * n if stage > 0 else 0  # fp32 weights beside those of the engine
    memory = {"weights": width * n / shares[0], "gradients": 4 * n / shares[1], "optimiser": (8 * n + master) / shares[2],
              "buffers": 2 * bucket * width if stage > 0 else 0}
    if stage == 3:  # gathered weights: DeepSpeed keeps up to 1e9 elements
        memory["buffers"] += width * min(n, 1e9)
    memory["buffers"] = min(memory["buffers"], 4 * width * n)
    if offload:
        memory["gradients"] = memory["optimiser"] = 0
    memory["activations"] = tokens * activation_bytes(config, width, checkpointing)
    # The logits in the model's dtype, the fp32 copy that becomes their gradient, and the head's gradient before it is added.
    head = vocabulary * h * width
    memory["logits"] = min(chunk, tokens) * vocabulary * (4 if width == 4 else 6) + head
    return memory


def activation_bytes(config, width, checkpointing):
    """Bytes that are kept of one token for the backward pass: all layers, or with checkpointing every layer's input and one
    layer."""
    h, f, heads, layers, _ = shape(config)
    q = heads * (getattr(config.get_text_config(), "head_dim", None) or h // heads)
    norms = 2 * h * (4 + 2 * width)  # each: its input in fp32, the normalised input, and its output
    attention = width * (3 * q + 2 * q)  # q, k, v (repeated to all heads), the output, its copy for the projection
    mlp = width * 4 * f  # gate, its activation, up, their product
    layer = norms + attention + mlp
    return layers * h * width + layer if checkpointing else layers * layer


def wire_bytes(parameters, gpus, width=2, micro_steps=1, gathers=2):
    """Bytes that one rank sends in an optimiser step under ZeRO-3; it receives as many.

    In each micro-step every weight is gathered for the forward pass and again for the backward pass (`gathers` times), and
    every gradient is reduced to the rank that keeps it (ZeRO, section 7.2). In a ring, (gpus − 1)/gpus of all that goes
    through each rank.  width: bytes of a weight or gradient that is sent.
    For a small model this is an upper bound, because DeepSpeed does not release and gather all of its weights each time
    (stage3_max_reuse_distance, stage3_param_persistence_threshold).
    """
    return micro_steps * (gathers + 1) * width * parameters * (gpus - 1) / gpus


def plan(config, gpus, options):
    """A step under ZeRO-3 with the optimiser in host memory, as {what: bytes per rank, or seconds}.

    Compute: 6 FLOPs per weight and token, or 8 with checkpointing, which repeats the forward pass; attention itself is not
    counted. PCIe: fp32 gradients go down and weights up, the rank's share of each, once a step. Adam: 16 bytes read and 14
    written per weight, in the memory of the host, which its ranks share.
    """
    n, width = parameters(config), 4 if options.fp32 else 2
    share, per_host = n / gpus, min(gpus, options.gpus_a_host)
    tokens = options.tokens * options.micro_steps
    found = {"GPU memory": sum(rank_memory(config, gpus, 3, not options.fp32, not options.no_checkpointing, options.tokens,
                                           offload=True).values()),
             "host memory": 16 * share,  # weights, two moments and gradients in fp32
             "bytes on the wire": wire_bytes(n, gpus, width, options.micro_steps),
             "bytes over PCIe": (4 + width) * share}
    speed = options.wire if gpus > options.gpus_a_host else options.nvlink
    found |= {"compute": (6 if options.no_checkpointing else 8) * n * tokens / (1e12 * options.tflops),
              "wire": found["bytes on the wire"] / (GB * speed), "PCIe": found["bytes over PCIe"] / (GB * options.pcie),
              "Adam": 30 * share * per_host / (GB * options.host_memory)}
    update = found["PCIe"] + found["Adam"]  # follows the micro-steps
    return found | {"least": max(found["compute"], found["wire"]) + update,
                    "most": found["compute"] + found["wire"] + update, "tokens": tokens * gpus}


def plan_table(name, config, options):
    """The plan for each number of GPUs, and what it assumes."""
    counts = [options.gpus] if options.gpus else [8, 64]
    plans = [plan(config, gpus, options) for gpus in counts]

    def row(words, cell):
        return f"| {words} | " + " | ".join(cell(found) for found in plans) + " |"
    lines = [f"| {name}, ZeRO-3, optimiser on the CPU | " + " | ".join(f"{gpus} GPUs" for gpus in counts) + " |",
             "| --- |" + " --: |" * len(counts)]
    lines += [row(f"{words}, GB per rank", lambda found, key=key: f"{found[key] / GB:,.1f}") for words, key in (
        ("memory of the GPU", "GPU memory"), ("memory of the host", "host memory"),
        ("sent over the wire in a step", "bytes on the wire"), ("over PCIe in a step", "bytes over PCIe"))]
    lines += [row(f"{words}, s", lambda found, key=key: f"{found[key]:,.2f}") for words, key in (
        ("compute", "compute"), ("wire", "wire"), ("PCIe", "PCIe"), ("Adam on the host", "Adam"),
        ("a step, if compute and wire overlap", "least"), ("a step, if they do not", "most"))]
    lines.append(row("tokens per second, all ranks", lambda found: f"{found['tokens'] / found['most']:,.0f} to "
                                                                    f"{found['tokens'] / found['least']:,.0f}"))
    return "\n".join([*lines, "", f"Assumed: {options.tokens:,} tokens in a micro-batch, {options.micro_steps} of them in a "
                      f"step; {options.tflops:g} TFLOP/s per GPU in practice; {options.gpus_a_host} GPUs per host; "
                      f"{options.nvlink:g} GB/s per GPU and direction within a host, {options.wire:g} between hosts; "
                      f"{options.pcie:g} GB/s of PCIe per GPU; {options.host_memory:g} GB/s of memory per host."])


def table():
    """The table of docs/performance.md."""
    head = [f"{gpus} GPU{'s' if gpus > 1 else ''}, ZeRO-{stage}{', optimiser on the CPU' if offload else ''}"
            for gpus, stage, offload in PLACES]
    lines = ["| GB a GPU | " + " | ".join(head) + " |", "| --- |" + " --: |" * len(head)]
    for name, shape in SHAPES.items():
        config = transformers.LlamaConfig(**shape)
        cells = [sum(rank_memory(config, gpus, stage, offload=offload).values()) / GB for gpus, stage, offload in PLACES]
        lines.append(f"| {name} | " + " | ".join(f"{cell:,.0f}" if cell >= 10 else f"{cell:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


OF_PLAN = "micro_steps", "tflops", "gpus_a_host", "nvlink", "wire", "pcie", "host_memory"  # options


def parse(argv=None):
    """The options of a command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", metavar="MODEL_DIR", help="a model folder; without one, the table")
    parser.add_argument("--gpus", type=int, help="default: 1; with --plan 8 and 64")
    parser.add_argument("--zero", type=int, choices=range(4), help="default: 2")
    parser.add_argument("--fp32", action="store_true", help="instead of bf16")
    parser.add_argument("--no-checkpointing", action="store_true")
    parser.add_argument("--tokens", type=int, default=8192, help="of a micro-batch")
    parser.add_argument("--offload", action="store_true", help="keep the optimiser in host memory")
    parser.add_argument("--plan", action="store_true", help="a step under ZeRO-3, with the optimiser in host memory")
    parser.add_argument("--micro-steps", type=int, default=4, help="of a step and rank (this and all below: for --plan)")
    parser.add_argument("--tflops", type=float, default=400, help="of a GPU, in practice")
    parser.add_argument("--gpus-a-host", type=int, default=8)
    parser.add_argument("--nvlink", type=float, default=200, help="GB/s per GPU and direction, within a host")
    parser.add_argument("--wire", type=float, default=25, help="GB/s per GPU and direction, between hosts")
    parser.add_argument("--pcie", type=float, default=25, help="GB/s per GPU")
    parser.add_argument("--host-memory", type=float, default=200, help="GB/s per host")
    options = parser.parse_args(argv)
    for name in ("gpus", "tokens", *OF_PLAN):
        value = getattr(options, name)
        if value is not None and not 0 < value < math.inf:
            parser.error(f"--{name.replace('_', '-')} {value}: expected more than 0")
    unset = parser.parse_args([])
    if not (options.model or options.plan) and options != unset:
        parser.error("without a MODEL_DIR the table is always the same: name a model's folder")
    if options.plan and (options.zero is not None or options.offload):
        parser.error("--zero and --offload decide nothing with --plan, which is of ZeRO-3 with the optimiser in host memory")
    if not options.plan and any(getattr(options, name) != getattr(unset, name) for name in OF_PLAN):
        parser.error(f"{', '.join('--' + name.replace('_', '-') for name in OF_PLAN)} decide nothing without --plan")
    return options


def main(options):
    if not options.model:
        name = "Zephyr-7B"
        print(plan_table(name, transformers.LlamaConfig(**SHAPES[name]), options) if options.plan else table())
        return 0
    if not (Path(options.model) / "config.json").is_file():
        print(f"tools/fit.py: {options.model}: no config.json there; name a model folder", file=sys.stderr)
        return 2
    try:
        config = transformers.AutoConfig.from_pretrained(options.model)
        if options.plan:
            print(plan_table(Path(options.model).name, config, options))
            return 0
        stage = 2 if options.zero is None else options.zero
        memory = rank_memory(config, options.gpus or 1, stage, not options.fp32, not options.no_checkpointing,
                             options.tokens, offload=options.offload)
    except Exception as error:  # a damaged config may raise anything
        print(f"tools/fit.py: {options.model}: config.json cannot be used ({one_line(error, 300)})", file=sys.stderr)
        return 2
    for part, size in memory.items():
        print(f"{part:>12} {size / GB:8.2f} GB")
    print(f"{'together':>12} {sum(memory.values()) / GB:8.2f} GB a GPU")
    return 0


if __name__ == "__main__":
    sys.exit(main(parse()))
