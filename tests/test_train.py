"""train.py through its real command line, with and without the `deepspeed` launcher, on a CPU.

    python -m pytest tests/test_train.py -n 0

Models are random and tiny, but what is checked is exact: losses, weights, ledgers, files. Runs with `processes` are
started by the launcher; the others run the same command in this process.
"""

import functools
import json
import math
import re
import shutil

import pytest
import torch
import transformers
import yaml
from helpers import assert_same_weights, copy_without, errors, timeless
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounterWithBackend

import adpo
import data
from benchmarks import flash_on_cpu  # noqa: F401  adpo.pair_attention runs on its stand-ins
from labels.annotators import DatasetAnnotator
from labels.oracle import wilson
from runtime import model, reference
from runtime.run import Run

METRICS = {"step", "epoch", "split", "loss", "rewards/chosen", "rewards/rejected", "rewards/margins",
           "rewards/accuracies", "logps/chosen", "logps/rejected", "learning_rate", "grad_norm", "queries",
           "queries_without_preference", "pairs_seen", "pseudo_labels", "pseudo_label_accuracy", "tokens_per_second"}
SUMMARY = {"pairs", "queries", "query_fraction", "queries_without_preference", "pseudo_labels", "pseudo_label_accuracy",
           "pseudo_label_interval", "eval_loss", "eval_accuracy", "wall_seconds", "peak_memory_bytes", "audited",
           "audit_accuracy", "audit_interval", "cost", "cost_incomplete", "budget_spent_at_step"}


@pytest.fixture(scope="module")
def launched(train):
    """The plain run to which the others are compared: one process, started by the launcher."""
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
    answer = DatasetAnnotator.answer
    monkeypatch.setattr(DatasetAnnotator, "answer", lambda self, questions, ledger: calls.extend(
        question.pair for question in questions) or answer(self, questions, ledger))
    run = train("calls", max_steps=20)  # an epoch is 15 steps, so some pairs come twice
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
    """Score the trained model here and compare its accuracy and loss, by the labels of test.jsonl."""
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


def test_a_pair_without_a_label_counts_in_the_mean(train, tiny):
    """Three labels for a step of 8 pairs. Every margin is 0 there, so d/dm −log σ(o·m) = −o/2: compare with the gradient of
    Σ −o/2 · m, divided by 8 and not by 3."""
    run = train("few-labels", max_queries=3, max_steps=1, do_eval=False)
    labels = {pair: label for pair, label, _ in run.ledger()}
    assert len(labels) == 3 and run.losses() == [pytest.approx(3 / 8 * math.log(2), rel=1e-5)]
    lm = transformers.AutoModelForCausalLM.from_pretrained(tiny / "model")
    renderer = data.Renderer(transformers.AutoTokenizer.from_pretrained(tiny / "model"), 16, 64)
    pairs, _, _ = data.load_pairs({f"{tiny}/pairs": 1.0}, ["train"], renderer, "train")
    for row, id in enumerate(pairs.ids):
        if id in labels:
            prompt, *responses = (part.tolist() for part in pairs.token_ids([row])[0])
            first, second = (lm(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1:-1].log_softmax(-1)[
                range(len(ids)), ids].sum() for ids in responses)
            (-labels[id] / 2 * 0.1 * (first - second) / 8).backward()
    norm = torch.nn.utils.get_total_norm([p.grad for p in lm.parameters()]).item()
    assert run.rows()[0]["grad_norm"] == pytest.approx(norm, rel=1e-4)


@pytest.mark.parametrize("name, processes, stage, micro, accumulation, tokens", [
    ("no launcher, ZeRO 0", None, 0, 8, 1, 10**6),
    ("ZeRO 0, 2x4", None, 0, 2, 4, 10**6),
    ("ZeRO 1, 8x1", None, 1, 1, 8, 10**6),
    ("cut by tokens, ZeRO 0", None, 0, 8, 1, 100),
    ("2 processes, ZeRO 2, cut by tokens", 2, 2, 4, 1, 100),
    pytest.param("2 processes, ZeRO 3, accumulation", 2, 3, 2, 2, 10**6, marks=pytest.mark.slow),
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
    """DeepSpeed has to add up all micro-batches of a step; there are more of them in long steps than the config says, and
    more in the second epoch than in the first. Both optimisers share one kind of checkpoint: each resumes the other's."""
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
        folder = copy_without(first, tmp_path / first.output.name, "checkpoint-20", "summary.json")
        again = train("other-memory", output_dir=folder, deepspeed=path, **keys)
        assert "checkpoint-10 at step 10 of 20" in again.stdout
        assert again.losses() == pytest.approx(here.losses(), rel=1e-4) and again.ledger() == here.ledger()
        assert_same_weights(again.weights(), here.weights(), 1e-4)


def test_bf16_with_checkpointing_stays_near_fp32(train, launched):
    run = train("bf16", bf16=True, gradient_checkpointing=True)
    assert run.losses() == pytest.approx(launched.losses(), abs=0.02)
    assert abs(run.losses()[0] - math.log(2)) <= 1e-4
    assert "bf16_optimizer" not in run.stdout  # DeepSpeed's lines about memory


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_compiled_layers_train_alike_and_scoring_compiles_nothing_of_its_own(checkpointing, train, launched, monkeypatch,
                                                                                       tmp_path):
    """Scoring, evaluation and training share their graphs, so that the margins of step 0 are 0 with any compiler."""
    counter, graphs = CompileCounterWithBackend("aot_eager"), []
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setenv("HF_HOME", str(tmp_path))  # no reference is cached
    torch.compiler.reset()
    score = reference.score
    monkeypatch.setattr(reference, "score", lambda *rest: (score(*rest), graphs.append(counter.frame_count))[0])
    steps = Run.end_step
    monkeypatch.setattr(Run, "end_step", lambda *rest: (graphs.append(counter.frame_count), steps(*rest)))
    run = train("compiled", torch_compile=True, gradient_checkpointing=checkpointing, eval_on_start=True)
    torch.compiler.reset()
    assert run.losses() == pytest.approx(launched.losses(), rel=1e-4)
    assert all(row["rewards/margins"] == 0 for row in run.rows("eval")[:1] + run.rows()[:1])
    _, scored, first, *later = graphs  # after scoring train and test; after each step
    assert first == scored + 1 and {*later, counter.frame_count} == {first}  # only the gradient of the logits is new in
    # training, and nothing at the end, when the saved model is compared with what was trained


@pytest.mark.slow
def test_every_pair_is_seen_once_an_epoch_and_none_is_asked_twice(train):
    """42 pairs in steps of 8 over two ranks leave a step of 2. No pair is lost or doubled, and none is asked twice in two
    epochs."""
    run = train("epochs", processes=2, max_train_samples=42, per_device_train_batch_size=2, gradient_accumulation_steps=2,
                max_steps=-1, num_train_epochs=2, data_selection=False)
    assert [row["step"] for row in run.rows()] == list(range(1, 13))
    assert run.rows()[-1]["epoch"] == 2
    steps = [step for _, _, step in run.ledger()]
    assert [steps.count(step) for step in range(12)] == [8, 8, 8, 8, 8, 2, 0, 0, 0, 0, 0, 0]
    assert run.summary()["pairs"] == run.summary()["queries"] == 42 and run.summary()["pseudo_labels"] == 0


def test_the_interval_of_pseudo_labels_counts_a_pair_once(train):
    """Two epochs of 42 pairs, whose last steps have 2. Those of the first step, whose margins are 0, are asked."""
    summary = train("twice", max_train_samples=42, max_steps=-1, num_train_epochs=2, gamma=0, do_eval=False).summary()
    assert (summary["queries"], summary["pseudo_labels"]) == (8, 2 * 34)
    assert summary["pseudo_label_interval"] == pytest.approx(wilson(summary["pseudo_label_accuracy"] * 34, 34))


def test_resume_is_exact(train, tmp_path):
    """A run is stopped after step 4 of 6, loses the checkpoint of step 4, and is started again with the same command. It
    goes on from step 2, and its metrics, ledger and weights are those of the undisturbed run."""
    keys = dict(max_steps=6, save_strategy="steps", save_steps=2, logging_steps=3, save_total_limit=2, gamma=0.1,
                eval_strategy="steps", eval_steps=5)
    whole = train("whole", **keys | {"save_total_limit": 3})
    assert sorted(p.name for p in whole.output.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]
    stopped = copy_without(whole, tmp_path / "stopped", "checkpoint-4", "checkpoint-6", "summary.json", "model.safetensors")
    again = train("again", output_dir=stopped, **keys)
    assert "resumed from" in again.stdout and "step 2 of 6" in again.stdout
    assert sorted(p.name for p in stopped.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]  # save_total_limit
    assert timeless(again) == timeless(whole) and [row["step"] for row in timeless(whole)] == [1, 3, 6, 5, 6]
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
    assert "two rows per pair: BloomForCausalLM cannot share a prompt, because it takes no position_ids" in run.stdout
    assert abs(run.losses()[0] - math.log(2)) <= 1e-4


def test_attention_without_a_mask_trains_as_attention_with_one_does(train, by_dataset, monkeypatch):
    """As on a GPU, with a stand-in for the kernel."""
    monkeypatch.setattr(model, "skips_masks", model.calls_attention_of_pairs)
    attention, calls = adpo.pair_attention, []
    monkeypatch.setattr(adpo, "pair_attention", lambda *arguments: calls.append(1) or attention(*arguments))
    run = train("without-mask")
    assert calls and "attention with a mask" not in run.stdout
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)


def test_a_model_that_attention_without_a_mask_does_not_take_gets_a_mask(train, by_dataset, monkeypatch):
    """As heads of more than 256, which FlashAttention does not take. The run is then what it is with a mask throughout."""
    def refuse(*_):
        raise RuntimeError("heads of 512")
    monkeypatch.setattr(model, "skips_masks", model.calls_attention_of_pairs)
    monkeypatch.setattr(adpo, "pair_attention", refuse)
    run = train("no-flash")
    assert ("attention with a mask, which is slower: without one, its forward fails on such rows "
            "(RuntimeError: heads of 512)") in run.stdout
    assert "two rows per pair" not in run.stdout
    assert run.losses() == by_dataset.losses()


def test_a_model_whose_shared_rows_are_scored_wrongly_gets_two_rows(train, by_dataset, monkeypatch):
    """The check at start-up notices a mask that lets y2 read y1, and the run goes on without it."""
    mask = adpo.attention_mask
    monkeypatch.setattr(adpo, "attention_mask", lambda segments, *args: mask(segments.clamp(max=0), *args))
    run = train("wrong-mask")
    assert re.search("two rows per pair: .* cannot share a prompt, .* differ from a plain forward by", run.stdout)
    assert run.losses() == pytest.approx(by_dataset.losses(), rel=1e-5)


@pytest.mark.parametrize("when", ["always", "in training mode"])
def test_a_model_whose_rows_are_scored_wrongly_is_refused(when, train, monkeypatch):
    """Noise that only training mode adds would move the margins that the gate reads."""
    scored = adpo.PairLogps.token_logps
    monkeypatch.setattr(adpo.PairLogps, "token_logps", lambda self, batch: scored(self, batch) + 0.002 * (
        when == "always" or self.training))
    run = train("wrong-rows", check=2)
    assert "differ from a plain forward by 0.002 nats a token" in run.stderr
    assert "--attn_implementation=eager" in run.stderr


def test_a_margin_that_is_not_a_number_ends_the_run_and_names_the_pair(train, tiny, monkeypatch):
    rewards = adpo.implicit_rewards
    monkeypatch.setattr(adpo, "implicit_rewards", lambda *args: rewards(*args) * float("nan"))
    run = train("nan", check=1, do_eval=False)
    assert "error: the margin of pair " in run.stderr and "is nan, not a finite number" in run.stderr
    assert run.ledger() == []  # no label was bought for it


def test_the_default_output_is_the_runs_own(launched):
    """The launcher prints its lines before the run; after that, only the run's own lines follow."""
    lines = [line for line in launched.stdout.splitlines() if not line.startswith(("[20", "DeepSpeed "))]
    assert lines[0].startswith("train: 120 rows read, 120 pairs")
    assert len(lines) <= 8 and "Warning" not in launched.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Refused before it costs anything

@pytest.mark.parametrize("rows, keys, message", [
    ([{"prompt": "a", "response_a": " good .", "response_b": " bad ."}], {}, "train.jsonl, row 1: no label"),
    ([{"prompt": "a", "chosen": " b"}], {}, "train.jsonl, row 1, field rejected"),
    ([{"prompt": "a", "chosen": " good .", "rejected": " bad ."}], {"model_name_or_path": "nowhere/at-all"},
     "tokenizer nowhere/at-all: cannot be loaded"),
])
def test_refusals_are_one_line_and_exit_code_2(rows, keys, message, train, tmp_path):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = train("refused", check=2, dataset_mixer=f"{{{tmp_path}: 1.0}}", **keys)
    assert len(errors(run)) == 1 and message in errors(run)[0]
    assert not (run.output / "metrics.jsonl").exists()


def test_without_a_test_split_the_run_says_that_it_skips_evaluation(train, tmp_path, tiny):
    shutil.copy(tiny / "pairs" / "train.jsonl", tmp_path)
    run = train("no-test", dataset_mixer=f"{{{tmp_path}: 1.0}}", max_steps=1)
    assert "no test split: evaluation is skipped" in run.stdout and run.summary()["eval_accuracy"] is None


def test_test_pairs_that_are_training_pairs_are_counted(train, tmp_path, tiny):
    rows = [json.loads(line) for line in (tiny / "pairs" / "train.jsonl").read_text().splitlines()]
    again = [{"prompt": row["prompt"], "response_a": row["response_b"], "response_b": row["response_a"],
              "label": "a" if row["label"] == "b" else "b"} for row in rows[:3]]  # the same pairs, the other way round
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in again * 2)
                                         + (tiny / "pairs" / "test.jsonl").read_text())
    run = train("overlap", dataset_mixer=f"{{{tmp_path}: 1.0}}", max_steps=1)
    assert "WARNING: 3 of 43 test pairs are training pairs too" in run.stdout


def test_without_overlap_there_is_no_warning(by_dataset):
    assert "WARNING" not in by_dataset.stdout
