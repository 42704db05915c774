"""train.py by its real command line, with and without the `deepspeed` launcher, on a CPU.

    python -m pytest tests/test_train.py

Models are random and tiny; what is checked is exact: losses, weights, ledgers, files. Runs with `processes` are
started by the launcher, the others run the same command in this process.
"""

import json
import math
import os
import shutil
import subprocess

import miniature
import pytest
import torch
import transformers
import yaml
from conftest import ROOT, Run, free_port, launcher_environment
from safetensors.torch import load_file
from test_config import OFFICIAL_BETA, OFFICIAL_GEMMA
from test_data import reply, user

import adpo
import data
from labels import oracle
from runtime.config import parse_config

METRICS = {"step", "epoch", "split", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
           "rewards/accuracies", "logps/chosen", "logps/rejected", "learning_rate", "grad_norm", "queries",
           "pairs_seen", "pseudo_labels", "pseudo_label_accuracy", "tokens_per_second"}
SUMMARY = {"pairs", "queries", "query_fraction", "pseudo_labels", "pseudo_label_accuracy", "pseudo_label_interval",
           "eval_loss", "eval_accuracy", "wall_seconds", "peak_memory_bytes", "audited", "audit_accuracy", "audit_interval",
           "cost", "budget_spent_at_step"}


def assert_same_weights(one, other, tolerance):
    """The norm of the difference, over all weights, against the norm of the weights. (Not element by element: where a
    gradient is nearly 0, AdamW turns rounding into a step of full size.)"""
    assert one.keys() == other.keys()
    one, other = (torch.cat([weights[name].double().flatten() for name in sorted(weights)]) for weights in (one, other))
    assert (one - other).norm() <= tolerance * one.norm()


@pytest.fixture(scope="module")
def launched(train):
    """The plain run that the others are compared with: one process, through the launcher."""
    return train("launched", processes=1, eval_strategy="steps", eval_steps=2)


def test_a_run_leaves_what_the_design_says(launched):
    names = {path.name for path in launched.output.iterdir()}
    assert names >= {"config.yaml", "metrics.jsonl", "summary.json", "labels.sqlite", "config.json", "model.safetensors",
                     "tokenizer.json", "README.md"}
    assert "built successfully" not in launched.stdout  # DeepSpeed has compiled nothing
    assert [row["step"] for row in launched.rows()] == [1, 2, 3, 4]
    assert all(row.keys() == METRICS for row in launched.rows())
    assert [row["step"] for row in launched.rows("eval")] == [2, 4]
    assert launched.summary().keys() == SUMMARY
    written = yaml.safe_load((launched.output / "config.yaml").read_text())
    assert written["config"]["gamma"] == 0.2 and written["versions"]["torch"] == torch.__version__


def test_step_0_has_margin_0_and_loss_log_2(launched):
    first = launched.rows()[0]
    assert abs(first["loss"] - math.log(2)) <= 1e-4
    assert first["rewards/margins"] == 0 and first["rewards/accuracies"] == 0.5


def test_queries_reported_are_the_rows_of_the_ledger(launched):
    rows, ledger = launched.rows(), launched.ledger()
    assert rows[0]["queries"] == 8  # at step 0 every margin is 0, so each pair is asked
    assert [row["queries"] for row in rows] == [sum(step < row["step"] for _, _, step in ledger) for row in rows]
    assert rows[-1]["queries"] == launched.summary()["queries"] == len(ledger)
    assert [row["pairs_seen"] for row in rows] == [8, 16, 24, 32]
    assert 8 < len(ledger) < 32 and len(ledger) + rows[-1]["pseudo_labels"] == 32 == launched.summary()["pairs"]


def test_queries_reported_are_the_calls_to_the_oracle(train, monkeypatch):
    calls = []
    answer = oracle.DatasetAnnotator.answer
    monkeypatch.setattr(oracle.DatasetAnnotator, "answer", lambda self, questions, ledger: calls.extend(
        question.pair for question in questions) or answer(self, questions, ledger))
    run = train("calls", max_steps=20)  # over an epoch of 15: some pairs come twice
    assert sorted(calls) == [pair for pair, _, _ in run.ledger()]
    assert len(calls) == run.summary()["queries"] == run.rows()[-1]["queries"]


def test_the_trained_model_loads_and_moved(launched, tiny):
    lm = transformers.AutoModelForCausalLM.from_pretrained(launched.output)
    assert transformers.AutoTokenizer.from_pretrained(launched.output).eos_token == "</s>"
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model")
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(lm.parameters(), before.parameters()))


def test_the_closing_line_and_the_model_card(launched):
    summary = launched.summary()
    assert f"{summary['queries']} of 32 labels bought" in launched.stdout
    assert f"held-out accuracy {summary['eval_accuracy']:.3f}" in launched.stdout
    card = (launched.output / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "transformers"
    assert f"| labels bought | {summary['queries']} " in card


def test_evaluation_uses_true_labels_and_never_the_gate(launched, tiny):
    """Score the trained model apart and compare: accuracy and loss by the labels of test.jsonl."""
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(p) for p in (launched.output, tiny / "model"))
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    right, losses = 0.0, []
    for line in (tiny / "pairs" / "test.jsonl").read_text().splitlines():
        row, rewards = json.loads(line), {}
        prompt = tokenizer(row["prompt"]).input_ids
        for side in "ab":
            ids = prompt + tokenizer(row[f"response_{side}"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
            logps = [lm(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]][len(prompt) - 1:]
                     .sum().item() for lm in (policy, reference)]
            rewards[side] = 0.1 * (logps[0] - logps[1])
        other = "b" if row["label"] == "a" else "a"
        margin = rewards[row["label"]] - rewards[other]
        right += margin > 0
        losses.append(math.log1p(math.exp(-margin)))
    assert launched.summary()["eval_accuracy"] == pytest.approx(right / len(losses))
    assert launched.summary()["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


@pytest.mark.parametrize("name, processes, stage, micro, accumulation, tokens", [
    ("no launcher, ZeRO 0", None, 0, 8, 1, 10**6),
    ("ZeRO 0, 2x4", None, 0, 2, 4, 10**6),
    ("ZeRO 1, 8x1", None, 1, 1, 8, 10**6),
    ("cut by tokens, ZeRO 0", None, 0, 8, 1, 100),
    ("2 processes, ZeRO 2, cut by tokens", 2, 2, 4, 1, 100),
    ("2 processes, ZeRO 3, accumulation", 2, 3, 2, 2, 10**6),
])
def test_a_step_does_not_depend_on_how_it_is_cut(name, processes, stage, micro, accumulation, tokens, train, engine_configs,
                                                 launched):
    """Same losses, queries and final weights for any micro-batch, number of ranks and ZeRO stage."""
    run = train(name.replace(" ", "-"), processes, deepspeed=engine_configs[stage], per_device_train_batch_size=micro,
                gradient_accumulation_steps=accumulation, micro_batch_tokens=tokens)
    assert run.losses() == pytest.approx(launched.losses(), rel=1e-5)
    assert [r["grad_norm"] for r in run.rows()] == pytest.approx([r["grad_norm"] for r in launched.rows()], rel=1e-4)
    assert run.ledger() == launched.ledger()
    assert_same_weights(run.weights(), launched.weights(), 1e-5)


def test_an_optimiser_in_host_memory_changes_nothing(request, train, engine_configs, tmp_path):
    """Steps of many micro-batches, more of them in long ones than the config says and more in the second epoch than in the
    first: DeepSpeed has to add them all up. And one checkpoint for both optimisers: each goes on from the other's."""
    if not request.config.getoption("--offload"):
        pytest.skip("compiles DeepSpeed's CPU Adam, a minute or more: --offload")
    engine = json.loads(engine_configs[2].read_text())
    engine["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    (tmp_path / "offload.json").write_text(json.dumps(engine))
    keys = dict(per_device_train_batch_size=2, gradient_accumulation_steps=4, micro_batch_tokens=100, max_steps=20,
                save_strategy="steps", save_steps=10)
    here, there = (train("host-memory", deepspeed=path, **keys) for path in (engine_configs[2], tmp_path / "offload.json"))
    assert there.losses() == pytest.approx(here.losses(), rel=1e-4) and there.ledger() == here.ledger()
    assert_same_weights(there.weights(), here.weights(), 1e-4)
    for first, path in ((here, tmp_path / "offload.json"), (there, engine_configs[2])):
        folder = tmp_path / first.output.name
        shutil.copytree(first.output, folder, ignore=shutil.ignore_patterns("checkpoint-20", "summary.json"))
        again = train("other-memory", output_dir=folder, deepspeed=path, **keys)
        assert "checkpoint-10 at step 10 of 20" in again.stdout
        assert again.losses() == pytest.approx(here.losses(), rel=1e-4) and again.ledger() == here.ledger()
        assert_same_weights(again.weights(), here.weights(), 1e-4)


def test_bf16_with_checkpointing_stays_near_fp32(train, launched):
    run = train("bf16", bf16=True, gradient_checkpointing=True)
    assert run.losses() == pytest.approx(launched.losses(), abs=0.02)
    assert abs(run.losses()[0] - math.log(2)) <= 1e-4


def test_every_pair_is_seen_once_an_epoch_and_none_is_asked_twice(train):
    """42 pairs in steps of 8 over two ranks leave a step of 2: no pair lost or doubled, in two epochs none asked twice."""
    run = train("epochs", processes=2, max_train_samples=42, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                max_steps=-1, num_train_epochs=2, data_selection=False)
    assert [row["step"] for row in run.rows()] == list(range(1, 13))
    assert run.rows()[-1]["epoch"] == 2
    steps = [step for _, _, step in run.ledger()]
    assert [steps.count(step) for step in range(12)] == [8, 8, 8, 8, 8, 2, 0, 0, 0, 0, 0, 0]
    assert run.summary()["pairs"] == run.summary()["queries"] == 42 and run.summary()["pseudo_labels"] == 0


def test_resume_is_exact(train, tmp_path):
    """Stopped behind step 4 of 6, the checkpoint of step 4 lost, and started again with the same command: it goes on from
    step 2, and metrics, ledger and weights are those of the undisturbed run."""
    keys = dict(max_steps=6, save_strategy="steps", save_steps=2, logging_steps=3, save_total_limit=2, gamma=0.1,
                eval_strategy="steps", eval_steps=5)
    whole = train("whole", **keys | {"save_total_limit": 3})
    assert sorted(p.name for p in whole.output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    stopped = tmp_path / "stopped"
    shutil.copytree(whole.output, stopped)
    for path in ("checkpoint-4", "checkpoint-6", "summary.json", "model.safetensors"):
        shutil.rmtree(stopped / path) if (stopped / path).is_dir() else (stopped / path).unlink()
    again = train("again", output_dir=stopped, **keys)
    assert "resumed from" in again.stdout and "step 2 of 6" in again.stdout
    assert sorted(p.name for p in stopped.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]  # save_total_limit
    timeless = [[{k: v for k, v in row.items() if k != "tokens_per_second"} for row in run.rows() + run.rows("eval")]
                for run in (whole, again)]
    assert timeless[0] == timeless[1] and [row["step"] for row in timeless[0]] == [1, 3, 6, 5, 6]
    assert again.ledger() == whole.ledger()
    assert_same_weights(again.weights(), whole.weights(), 0)
    third = train("third", output_dir=stopped, **keys)
    assert "is finished" in third.stdout
    other = train("other", output_dir=stopped, check=2, **{**keys, "gamma": 0.5})
    assert "gamma 0.1, this one 0.5" in other.stderr and "another output_dir" in other.stderr


def test_the_schedules_learning_rate_reaches_the_optimiser(train, tiny):
    """The first step of a warm-up has learning rate 0: the weights stay what they were."""
    run = train("warm-up", warmup_ratio=1.0, max_steps=1)
    assert run.rows()[0]["learning_rate"] == 0 and run.rows()[0]["grad_norm"] > 0
    assert_same_weights(run.weights(), load_file(tiny / "model" / "model.safetensors"), 0)


def test_rmsprop_is_the_official_default_optimiser(train, launched):
    run = train("rmsprop", optim="rmsprop")
    assert run.losses()[0] == pytest.approx(launched.losses()[0]) and run.losses() != pytest.approx(launched.losses())


def test_plain_dpo_and_no_pseudo_labels(train, launched):
    dpo = train("dpo", data_selection=False)
    assert dpo.summary()["queries"] == 32 and dpo.summary()["pseudo_labels"] == 0
    assert dpo.summary()["pseudo_label_accuracy"] is None
    none = train("none", pseudo_labels=False)
    assert none.summary()["pseudo_labels"] == 0 and none.summary()["queries"] < 32
    assert none.losses()[0] == pytest.approx(launched.losses()[0])  # step 0 asks for all
    assert none.losses() != pytest.approx(launched.losses(), rel=1e-3)


def test_another_reference_is_read_and_freed(train, tiny, launched):
    """The reference is the model that the plain run trained: margins at step 0 are no longer 0."""
    run = train("reference", ref_model_name_or_path=launched.output)
    assert run.rows()[0]["rewards/margins"] != 0
    same = train("same-reference", ref_model_name_or_path=tiny / "model")
    assert same.losses() == pytest.approx(launched.losses(), rel=1e-6)


def test_a_model_that_cannot_share_a_prompt_takes_two_rows(train, tiny, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny / "model")
    transformers.BloomForCausalLM(transformers.BloomConfig(
        vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    run = train("bloom", model_name_or_path=tmp_path / "bloom", max_steps=1)
    assert "two rows a pair: BloomForCausalLM cannot share a prompt, it takes no position_ids" in run.stdout
    assert abs(run.losses()[0] - math.log(2)) <= 1e-4


def test_a_model_whose_rows_are_scored_wrongly_is_refused(train, monkeypatch):
    """The check at start-up sees a mask that lets y2 read y1."""
    mask = adpo.attention_mask
    monkeypatch.setattr(adpo, "attention_mask", lambda segments, *args: mask(segments.clamp(max=0), *args))
    run = train("wrong-mask", check=2)
    assert "differ from a plain forward by" in run.stderr and "--attn_implementation=eager" in run.stderr


def test_a_margin_that_is_no_number_ends_the_run_and_names_the_pair(train, tiny, monkeypatch):
    rewards = adpo.implicit_rewards
    monkeypatch.setattr(adpo, "implicit_rewards", lambda *args: rewards(*args) * float("nan"))
    run = train("nan", check=1, do_eval=False)
    assert "error: the margin of pair " in run.stderr and "is nan, not a finite number" in run.stderr
    assert run.ledger() == []  # and no label was bought for it


@pytest.fixture(scope="module")
def zephyr(tiny, tmp_path_factory):
    """Models and data sets of the Zephyr recipes in miniature: in folders, and by their names in the hub's caches."""
    path = tmp_path_factory.mktemp("zephyr")
    miniature.folders(path, tiny / "pairs")
    miniature.hub_cache(path, os.environ["HF_HOME"])
    return path


@pytest.mark.parametrize("recipe, ends", [("zephyr-7b-beta", ("<s>", "</s>")), ("zephyr-7b-gemma", ("<bos>", "<eos>"))])
def test_the_zephyr_recipes_run_end_to_end_in_miniature(recipe, ends, train, zephyr):
    """The recipe as it is with the flags of the official README, under ZeRO-3 over two processes. Model and data are found
    by their names, without a network, in the caches of the hub."""
    run = train(recipe, processes=2, config=ROOT / "configs" / f"{recipe}.yaml", beta=0.1, data_selection="true", Gamma=1.3,
                num_train_epochs=1)
    check_zephyr(run)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run.output)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ends
    assert tokenizer("a b").input_ids[0] == tokenizer.bos_token_id and "Hi" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False)


@pytest.mark.parametrize("processes, official, model, pairs, keys", [
    (2, OFFICIAL_BETA, "alignment-handbook/zephyr-7b-sft-full", "HuggingFaceH4/ultrafeedback_binarized",
     {"push_to_hub": "false"}),
    (None, OFFICIAL_GEMMA, "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", "argilla/dpo-mix-7k",
     {"report_to": "none", "chat_template": miniature.GEMMA}),
], ids=["beta", "gemma, with Gemma's own template"])
def test_the_official_recipe_files_run_end_to_end_in_miniature(processes, official, model, pairs, keys, train, zephyr,
                                                               tmp_path):
    """Their files as they are; the same model and data, in folders."""
    (tmp_path / "recipe.yaml").write_text(official)
    run = train("official", processes, config=tmp_path / "recipe.yaml", deepspeed="configs/zero3.json", beta=0.1,
                data_selection="true", Gamma=1.3, num_train_epochs=1, model_name_or_path=zephyr / model,
                dataset_mixer=f"{{{zephyr / pairs}: 1.0}}", **keys)
    check_zephyr(run, processes or 1)
    if "chat_template" in keys:
        assert transformers.AutoTokenizer.from_pretrained(run.output).chat_template == miniature.GEMMA


def check_zephyr(run, processes=2):
    """120 pairs in steps of 8 a process, evaluation on 40, a model in bf16 as it was."""
    assert run.summary()["pairs"] == 120 and run.rows()[-1]["step"] == math.ceil(120 / (8 * processes))
    assert abs(run.losses()[0] - math.log(2)) <= 1e-4 and run.rows()[0]["queries"] == 8 * processes
    assert run.summary()["eval_accuracy"] is not None and run.summary()["queries"] == len(run.ledger())
    assert transformers.AutoModelForCausalLM.from_pretrained(run.output).dtype == torch.bfloat16


def points_of_csv(output):
    """{split_metric: [(step, value)]}"""
    tables = {path.stem: path.read_text().splitlines() for path in (output / "csv").glob("*.csv")}
    return {name: [tuple(map(float, line.split(","))) for line in lines[1:]] for name, lines in tables.items()}


def points_of_tensorboard(output):
    """The same, as TensorBoard itself reads it."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(output / "tensorboard"), {"scalars": 0}).Reload()
    return {tag.replace("/", "_"): [(event.step, event.value) for event in events.Scalars(tag)]
            for tag in events.Tags()["scalars"]}


@pytest.mark.parametrize("lost", [["checkpoint-4", "checkpoint-6"], ["checkpoint-2", "checkpoint-4", "checkpoint-6"]])
@pytest.mark.parametrize("service, points", [("csv_monitor", points_of_csv), ("tensorboard", points_of_tensorboard)])
def test_the_monitor_holds_each_number_of_the_metrics_once(service, points, lost, train):
    """Both splits, at their steps and nothing else; behind a resume, and behind a start anew, too."""
    if service == "tensorboard":
        pytest.importorskip("tensorboard", reason="needs requirements-extra.txt")
    keys = dict(report_to=service, max_steps=6, save_strategy="steps", save_steps=2, eval_strategy="steps", eval_steps=3,
                eval_on_start=True)

    def check(run):
        expected = {}
        for row in run.rows() + run.rows("eval"):
            for name, value in row.items():
                if name not in ("step", "split") and value is not None:
                    expected.setdefault(f"{row['split']}/{name}".replace("/", "_"), []).append((row["step"], value))
        found = points(run.output)
        assert found.keys() == expected.keys()
        for name in found:
            assert found[name] == [pytest.approx(point, rel=1e-6) for point in expected[name]], name
        assert [step for step, _ in found["train_loss"]] == [1, 2, 3, 4, 5, 6]
        assert [step for step, _ in found["eval_loss"]] == [0, 3, 6]

    run = train("monitor", **keys)
    check(run)
    for name in lost:
        shutil.rmtree(run.output / name)
    (run.output / "summary.json").unlink()
    again = train("monitor-again", output_dir=run.output, **keys)
    assert ("resumed from" in again.stdout) == (len(lost) == 2)
    check(again)


@pytest.mark.parametrize("model, template, prompt, response", [
    ("alignment-handbook/zephyr-7b-sft-full", None, "<s> <|system|>\n</s> \n<|user|>\nHi, café 你好</s> \n<|assistant|>\n",
     "Yes. </s>"),
    ("HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", None,
     "<bos><|im_start|>system\n<|im_end|>\n<|im_start|>user\nHi, café 你好<|im_end|>\n<|im_start|>assistant\n",
     "Yes. <|im_end|>\n<eos>"),
    ("HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", miniature.GEMMA,
     "<bos><start_of_turn>user\nHi, café 你好<end_of_turn>\n<start_of_turn>model\n", "Yes.<end_of_turn>\n<eos>"),
], ids=["Zephyr", "ChatML with BOS", "Gemma"])
def test_what_the_zephyr_models_read(model, template, prompt, response, zephyr):
    """One BOS, one EOS, no system message where the template knows none, and no byte of the text is lost."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = template or tokenizer.chat_template
    prompt_ids, responses = data.Renderer(tokenizer, 512, 1024)(
        [user("Hi, café 你好")], [[reply("Yes. ")], [reply("No")]])
    assert tokenizer.decode(prompt_ids) == prompt and tokenizer.decode(responses[0]) == response
    assert tokenizer.unk_token_id not in prompt_ids and tokenizer.convert_tokens_to_ids("<0xE4>") in prompt_ids




def test_the_default_output_is_the_runs_own(launched):
    """The launcher has its say before the run; behind it nothing but the run's own lines."""
    lines = [line for line in launched.stdout.splitlines() if not line.startswith(("[20", "DeepSpeed "))]
    assert lines[0].startswith("train: 120 rows read, 120 pairs")
    assert len(lines) <= 8 and "Warning" not in launched.stderr


# ----------------------------------------------------------------------------------------------------------------------
# What cannot be done is refused before it costs anything

@pytest.mark.parametrize("rows, keys, message", [
    ([{"prompt": "a", "response_a": " good .", "response_b": " bad ."}], {}, "train.jsonl, row 1: no label"),
    ([{"prompt": "a", "chosen": " b"}], {}, "train.jsonl, row 1, field rejected"),
    ([{"prompt": "a", "chosen": " good .", "rejected": " bad ."}], {"model_name_or_path": "nowhere/at-all"},
     "tokenizer nowhere/at-all: cannot be loaded"),
])
def test_refusals_are_one_line_and_exit_code_2(rows, keys, message, train, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train("refused", check=2, dataset_mixer=f"{{{tmp_path}: 1.0}}", **keys)
    errors = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0]
    assert "Traceback" not in run.stderr and not (run.output / "metrics.jsonl").exists()


def test_without_a_test_split_evaluation_is_skipped_and_said_so(train, tmp_path, tiny):
    shutil.copy(tiny / "pairs" / "train.jsonl", tmp_path)
    run = train("no-test", dataset_mixer=f"{{{tmp_path}: 1.0}}", max_steps=1)
    assert "no test split: evaluation is skipped" in run.stdout and run.summary()["eval_accuracy"] is None


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_recipes_parse_with_the_flags_of_the_official_readme(recipe):
    config = parse_config(["--config", str(ROOT / "configs" / recipe), "--beta=0.1", "--data_selection=true", "--Gamma=1.3",
                           "--num_train_epochs=1", "--output_dir=x"])
    assert (config.beta, config.gamma, config.data_selection, config.num_train_epochs) == (0.1, 1.3, True, 1)


def on_two_hosts(tiny, folder, **keys):
    """Exit codes and outputs of a run over two launchers, as hosts without ssh start it, each with an output_dir and caches
    of its own."""
    (folder / "hostfile").write_text("one slots=1\ntwo slots=1\n")
    port, launchers = str(free_port()), []
    keys = {"model_name_or_path": tiny / "model", "dataset_mixer": f"{{{tiny}/pairs: 1.0}}", "learning_rate": 2e-3,
            "warmup_ratio": 0.0, "gamma": 0.2, "per_device_train_batch_size": 8, "max_prompt_length": 16, "max_length": 64,
            "max_steps": 4, "logging_steps": 1, "num_threads": 1, **keys}
    (folder / "run.yaml").write_text("".join(f"{name}: {value}\n" for name, value in keys.items()))
    for n in range(2):
        command = ["deepspeed", "--hostfile", folder / "hostfile", "--no_ssh", "--node_rank", n, "--master_addr",
                   "127.0.0.1", "--master_port", port, "train.py", "--config", folder / "run.yaml",
                   f"--output_dir={folder}/{n}"]
        launchers.append(subprocess.Popen([str(word) for word in command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                                          stderr=subprocess.STDOUT,
                                          env={**launcher_environment(), "HF_HOME": f"{folder}/hf-{n}"}))
    outputs = [launcher.communicate(timeout=240)[0] for launcher in launchers]
    return [launcher.returncode for launcher in launchers], outputs


def test_of_two_hosts_with_disks_of_their_own_the_first_alone_has_the_output(tiny, train, tmp_path):
    codes, outputs = on_two_hosts(tiny, tmp_path, save_strategy="no")
    assert codes == [0, 0], outputs
    one = train("one-host", processes=2)
    two = Run(tmp_path / "0", "", "", 0)
    assert two.losses() == one.losses() and two.ledger() == one.ledger()
    assert not (tmp_path / "1").exists() and not list((tmp_path / "0").glob(".*"))


def test_checkpoints_that_hosts_do_not_share_are_refused(tiny, tmp_path):
    codes, outputs = on_two_hosts(tiny, tmp_path, save_strategy="epoch")
    assert codes == [2, 2] and "is not the same folder on all hosts" in outputs[0], outputs
