"""tools/fit.py against real models, a real run, and the tables in docs/: `python -m pytest tests/test_fit.py -n 0`."""

import inspect
import json
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
import torch
import transformers
from helpers import ROOT, free_port, launcher_environment

import adpo
import data
from tools import fit


def test_fit_counts_a_model_as_it_is(tiny):
    config = transformers.AutoConfig.from_pretrained(tiny / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model")
    n = sum(p.numel() for p in model.parameters())
    assert fit.parameters(config) == n
    alone, shared = (fit.rank_memory(config, gpus, 3) for gpus in (1, 8))
    assert alone["weights"] == 2 * n and alone["gradients"] == 4 * n and alone["optimiser"] == 12 * n
    assert all(shared[part] == alone[part] / 8 for part in ("weights", "gradients", "optimiser"))
    one, two = (fit.rank_memory(config, 8, stage) for stage in (1, 2))
    assert (one["gradients"], one["optimiser"]) == (4 * n, 12 * n / 8)
    assert two["weights"] == 2 * n and two["optimiser"] == 12 * n / 8
    plain = fit.rank_memory(config, 1, 2, bf16=False)  # one process in fp32 runs as ZeRO 0, without a second copy
    assert plain["optimiser"] == 8 * n and plain["buffers"] == 0
    v, h = config.vocab_size, config.hidden_size
    assert plain["logits"] == 2048 * v * 4 + v * h * 4
    assert fit.rank_memory(config, tokens=9)["logits"] == 9 * v * 6 + v * h * 2
    assert fit.rank_memory(config, 1, 3, bf16=False)["optimiser"] == 12 * n  # but ZeRO-3 keeps one
    assert fit.rank_memory(config, 1, 0, False, offload=True) == fit.rank_memory(config, 1, 1, False, offload=True)
    assert fit.rank_memory(config, 8, 0) == fit.rank_memory(config, 8, 1)  # in bf16, ZeRO 0 runs as ZeRO 1


@pytest.mark.parametrize("file", ["ds_config.json", "configs/zero3.json"])
def test_fit_counts_the_buckets_that_the_engine_is_told_to_take(file):
    """DeepSpeed allocates a whole one, however small the model is; its own default is ten times as large."""
    zero = json.loads((ROOT / file).read_text())["zero_optimization"]
    assert zero["reduce_bucket_size"] == inspect.signature(fit.rank_memory).parameters["bucket"].default


LLAMA = transformers.LlamaConfig(vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
                                 num_attention_heads=4, num_key_value_heads=2)
OTHERS = {  # families with other names for the same
    "gpt2": transformers.GPT2Config(vocab_size=50, n_embd=64, n_layer=3, n_head=4),
    "gpt_neo": transformers.GPTNeoConfig(vocab_size=50, hidden_size=64, num_layers=2, attention_types=[[["global"], 2]],
                                         num_heads=4),
    "opt": transformers.OPTConfig(vocab_size=50, hidden_size=64, ffn_dim=160, num_hidden_layers=3, num_attention_heads=4),
    "falcon": transformers.FalconConfig(vocab_size=50, hidden_size=64, num_hidden_layers=3, num_attention_heads=4),
    "gemma3": transformers.Gemma3Config(
        text_config=dict(vocab_size=50, hidden_size=64, intermediate_size=160, num_hidden_layers=3, num_attention_heads=4),
        vision_config=dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2))}


def test_fit_counts_the_activations_that_autograd_keeps():
    """What one more token keeps for the backward pass, counted in the graph of a real model."""
    config = LLAMA
    lm = transformers.LlamaForCausalLM(config)
    weights = {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def kept(tokens):
        storages = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                storages[storage.data_ptr()] = (tensor, storage.nbytes())
            return tensor
        pair = {"prompt_ids": [5] * (tokens - 2), "first_ids": [6], "second_ids": [7]}
        pairs = data.Pairs(datasets.Dataset.from_list([{"id": "a", "tokens": tokens, **pair}]), "", {})
        batch = data.collate(pairs, [0])
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            adpo.PairLogps(lm)(batch)
        return sum(size for _, size in storages.values())
    # The mask grows with the square of the tokens; subtract its part.
    grown = kept(400) - kept(200) - 4 * (400 ** 2 - 200 ** 2)
    assert grown / 200 == pytest.approx(fit.activation_bytes(config, 4, False), rel=0.15)


@pytest.mark.parametrize("flags, page", [([], "performance.md"), (["--plan"], "scale.md")])
def test_the_tables_in_docs_are_what_it_prints(flags, page, capsys):
    fit.main(fit.parse(flags))
    assert f"\n{capsys.readouterr().out}\n" in (ROOT / "docs" / page).read_text(encoding="utf-8") + "\n"


COUNTING = """
import json, os, sys
import torch.distributed as dist

sent, marks = [0.0], []
for name in ("all_gather_into_tensor", "reduce_scatter_tensor", "all_reduce", "broadcast", "all_gather", "reduce_scatter"):
    def counted(*args, name=name, collective=getattr(dist, name), **kwargs):
        tensors = [*args, *kwargs.values()]
        world, parts = dist.get_world_size(), tensors[1 if name in ("reduce_scatter_tensor", "reduce_scatter") else 0]
        size = sum(part.numel() * part.element_size() for part in (parts if isinstance(parts, list) else [parts]))
        sent[0] += size * (world - 1) / world * (2 if name == "all_reduce" else 1)  # as it travels around a ring
        return collective(*args, **kwargs)
    setattr(dist, name, counted)

from runtime.launch import command  # first: it sets what DeepSpeed reads when it is imported

import deepspeed
import train
from safetensors.torch import load_file

step = deepspeed.DeepSpeedEngine.step
def marked(engine, *args):
    step(engine, *args)
    marks.append(sent[0])
deepspeed.DeepSpeedEngine.step = marked

code = command([arg for arg in sys.argv[1:] if not arg.startswith("--local_rank")], train.main)
if os.environ["RANK"] == "0":
    output, = (arg.partition("=")[2] for arg in sys.argv if arg.startswith("--output_dir="))
    weights = load_file(output + "/model.safetensors").values()
    print("COUNTED", json.dumps([sum(p.numel() for p in weights), (marks[-1] - marks[1]) / (len(marks) - 2)]), flush=True)
sys.exit(code)
"""


@pytest.mark.slow
def test_fit_counts_the_bytes_that_two_ranks_send_under_zero_3(tiny, tmp_path):
    """Counted in the collectives of a real run that, like one of a large model, keeps no gathered weights."""
    ds = json.loads((ROOT / "configs" / "zero3.json").read_text())
    ds["zero_optimization"] |= {"stage": 3, "stage3_param_persistence_threshold": 0, "stage3_max_reuse_distance": 0,
                                "stage3_prefetch_bucket_size": 0, "stage3_max_live_parameters": 0}
    (tmp_path / "zero3.json").write_text(json.dumps(ds))
    (tmp_path / "count.py").write_text(COUNTING)
    command = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), str(tmp_path / "count.py"),
               f"--output_dir={tmp_path}/run", "--config", str(ROOT / "configs" / "quickstart.yaml"),
               f"--model_name_or_path={tiny}/model", f"--dataset_mixer={{{tiny}/pairs: 1.0}}", "--max_steps=5",
               "--per_device_train_batch_size=8", "--logging_steps=5", "--do_eval=false", "--save_strategy=no",
               "--num_threads=1", "--max_prompt_length=16", "--max_length=64", f"--deepspeed={tmp_path}/zero3.json"]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600,
                          env={**launcher_environment(), "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    parameters, sent = json.loads(done.stdout.partition("COUNTED ")[2].splitlines()[0])
    assert sent == pytest.approx(fit.wire_bytes(parameters, 2, width=4), rel=0.15)


def test_a_plan_follows_from_the_memory_of_the_table_and_from_what_is_assumed():
    config = fit.transformers.LlamaConfig(**fit.SHAPES["Zephyr-7B"])
    assumed = dict(fp32=False, no_checkpointing=False, tokens=8192, micro_steps=2, gpus_a_host=8, tflops=400, nvlink=200,
                   wire=25, pcie=25, host_memory=200)
    found = fit.plan(config, 8, SimpleNamespace(**assumed))
    assert found["GPU memory"] == sum(fit.rank_memory(config, 8, 3, offload=True).values())
    n = fit.parameters(config)
    assert n == 7_241_732_096 and found["host memory"] == 2 * n
    assert found["compute"] == pytest.approx(8 * n * 2 * 8192 / 400e12)
    across = fit.plan(config, 16, SimpleNamespace(**assumed))  # two hosts: the slower wire
    assert across["wire"] / found["wire"] == pytest.approx(8 * (15 / 16) / (7 / 8))
    assert found["least"] < found["most"] <= found["least"] + min(found["compute"], found["wire"]) + 1e-9
    once = fit.plan(config, 8, SimpleNamespace(**assumed | {"micro_steps": 1}))
    assert found["bytes on the wire"] == 2 * once["bytes on the wire"] and found["Adam"] == once["Adam"]
    half = fit.plan(config, 4, SimpleNamespace(**assumed | {"no_checkpointing": True}))  # half a host, with all its memory
    assert half["Adam"] == found["Adam"] and half["compute"] == pytest.approx(found["compute"] * 6 / 8)


def test_each_flag_changes_what_is_said(tmp_path, capsys):
    transformers.LlamaConfig(**fit.SHAPES["Llama-3.2-1B"]).save_pretrained(tmp_path)
    said = set()
    commands = ("", "--gpus 8", "--gpus 8 --zero 3", "--fp32", "--no-checkpointing", "--tokens 99", "--offload", "--plan",
                "--plan --gpus 9", "--plan --fp32", "--plan --no-checkpointing", "--plan --tokens 99",
                "--plan --micro-steps 2", "--plan --tflops 9", "--plan --gpus-a-host 2", "--plan --nvlink 9",
                "--plan --wire 9", "--plan --pcie 9", "--plan --host-memory 9")
    for flags in commands:
        fit.main(fit.parse([str(tmp_path), *flags.split()]))
        said.add(capsys.readouterr().out.partition("\nAssumed")[0])
    assert len(said) == len(commands)


@pytest.mark.parametrize("flags, words", [
    (("--tokens", "-5"), "--tokens -5: expected more than 0"), (("--gpus", "0"), "--gpus 0: expected more than 0"),
    (("--plan", "--wire", "0"), "--wire 0.0: expected"), (("--plan", "--gpus-a-host", "0"), "--gpus-a-host 0: expected"),
    (("--plan", "--tflops", "nan"), "--tflops nan: expected"), (("nowhere",), "nowhere: no config.json there"),
    (("--gpus", "4"), "without a MODEL_DIR the table is always the same"), (("m", "--wire", "9"), "decide nothing without"),
    (("m", "--plan", "--zero", "2"), "--zero and --offload decide nothing with"),
    (("--plan", "--offload"), "--zero and --offload decide nothing with")])
def test_numbers_without_a_meaning_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as end:
        sys.exit(fit.main(fit.parse(flags)))
    out, err = capsys.readouterr()
    assert (end.value.code, out) == (2, "") and words in err.splitlines()[-1]


@pytest.mark.parametrize("family", OTHERS)
def test_families_with_other_names(family, tmp_path, capsys):
    OTHERS[family].save_pretrained(tmp_path)
    for flags in ([], ["--plan"]):
        assert fit.main(fit.parse([str(tmp_path), *flags])) == 0
        assert "GB" in capsys.readouterr().out
    n = sum(p.numel() for p in transformers.AutoModelForCausalLM.from_config(OTHERS[family]).parameters())
    memory = fit.rank_memory(OTHERS[family])
    assert memory["weights"] == 2 * n and memory["logits"] == 2048 * 50 * 6 + 50 * 64 * 2
    f = 4 * 64 if family in ("gpt2", "gpt_neo", "falcon") else 160
    wider = fit.activation_bytes(transformers.LlamaConfig(**LLAMA.to_dict() | {"intermediate_size": f}), 2, False)
    layers = OTHERS[family].get_text_config().num_hidden_layers
    if family != "gemma3":  # whose heads are wider
        assert memory["activations"] == 8192 * (layers * 64 * 2 + (wider // 3))


@pytest.mark.parametrize("config, words", [
    (transformers.MambaConfig(num_hidden_layers=1), "names no number of attention heads"),
    (transformers.BloomConfig(), "names no width of the MLP"),
    (transformers.T5Config(num_layers=1), "Unrecognized configuration class")], ids=lambda value: getattr(
        value, "model_type", ""))
def test_a_shape_that_it_does_not_know_is_refused(config, words, tmp_path, capsys):
    config.save_pretrained(tmp_path)
    for flags in ([], ["--plan"]):
        assert fit.main(fit.parse([str(tmp_path), *flags])) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"tools/fit.py: {tmp_path}: config.json cannot be used (") and words in err
        assert err.count("\n") == 1


def test_a_config_that_is_none(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{]")
    assert fit.main(fit.parse([str(tmp_path)])) == 2
    assert capsys.readouterr().err.startswith(f"tools/fit.py: {tmp_path}: config.json cannot be used (")
