"""The command line and the config: `python -m pytest tests/test_config.py`. It loads YAML, no model and no data."""

import dataclasses
import importlib
import json

import pytest
import torch
from helpers import OFFICIAL_BETA, OFFICIAL_GEMMA, ROOT, command

import adpo
from labels.annotators import HumanAnnotator
from labels.oracle import ANNOTATORS, JUDGES
from labels.reward_model import RewardModelJudge
from runtime import engine, parse, schedule
from runtime.config import Config
from runtime.engine import engine_config
from runtime.errors import UsageError
from runtime.parse import UNGATED_LOSSES, parse_config, why_not_gated
from runtime.schedule import Schedule, learning_rate

GOOD = {"model_name_or_path": "m", "dataset_mixer": {"d": 1.0}, "output_dir": "o"}

OFFICIAL_FLAGS = ["--beta=0.1", "--data_selection=true", "--Gamma=1.3", "--num_train_epochs=1", "--output_dir=out"]


@pytest.fixture
def write(tmp_path):
    def write(values=None, text=None):
        path = tmp_path / "c.yaml"
        path.write_text(json.dumps(values) if text is None else text)
        return ["--config", str(path)]
    return write


def refused(argv, capsys):
    """The error of a command that ends with exit code 2: one line."""
    assert command(argv) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


@pytest.fixture
def services(monkeypatch):
    """As if tensorboard and wandb were installed and the user were logged in to the hub."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.mark.parametrize("text, beta, pairs", [(OFFICIAL_BETA, 0.01, 64), (OFFICIAL_GEMMA, 0.05, 64)])
def test_the_official_recipe_files_run_unchanged(text, beta, pairs, write, services):
    config = parse_config(write(text=text))
    assert config.beta == beta and config.max_length == 1024 and config.learning_rate == 5e-7
    assert 8 * config.per_device_train_batch_size * config.gradient_accumulation_steps == pairs
    with_flags = parse_config(write(text=text) + OFFICIAL_FLAGS)
    assert (with_flags.beta, with_flags.gamma, with_flags.num_train_epochs) == (0.1, 1.3, 1)
    assert with_flags.output_dir == "out" and with_flags.data_selection is True


def test_our_zephyr_recipes_are_the_official_ones_with_their_commands_values(write, services):
    for ours, official in (("zephyr-7b-beta", OFFICIAL_BETA), ("zephyr-7b-gemma", OFFICIAL_GEMMA)):
        mine = dataclasses.asdict(parse_config(["--config", str(ROOT / "configs" / f"{ours}.yaml")]))
        theirs = dataclasses.asdict(parse_config(write(text=official) + OFFICIAL_FLAGS))
        free = {"output_dir", "push_to_hub", "hub_model_id", "report_to", "log_level", "deepspeed"}
        assert {k: v for k, v in mine.items() if k not in free} == {k: v for k, v in theirs.items() if k not in free}
        assert mine["deepspeed"] == "configs/zero3.json" and mine["push_to_hub"] is False


@pytest.mark.parametrize("model, expected", [
    ("alignment-handbook/zephyr-7b-sft-full", True), ("HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", True),
    ("microsoft/Phi-3-mini-4k-instruct", False), ("toy", False)])
def test_the_empty_system_message_is_for_the_handbooks_models(model, expected, write):
    """Their recipes rely on it; no other template would write it at inference."""
    argv = [*write(GOOD), f"--model_name_or_path={model}"]
    assert parse_config(argv).auto_insert_empty_system_msg is expected
    set_to = parse_config([*argv, f"--auto_insert_empty_system_msg={not expected}"])
    assert set_to.auto_insert_empty_system_msg is not expected


@pytest.mark.parametrize("flags", [["--Gamma=0.7"], ["--gamma=0.7"], ["--gamma", "0.7"], ["--Gamma", "0.7"],
                                   ["--gamma=9", "--gamma=0.7"], ["--local_rank=0", "--gamma=7e-1"]])
def test_every_way_to_say_gamma(flags, write):
    assert parse_config(write(GOOD) + flags).gamma == 0.7


@pytest.mark.parametrize("word, value", [("true", True), ("TRUE", True), ("Yes", True), ("1", True), ("false", False),
                                         ("No", False), ("0", False)])
def test_booleans(word, value, write):
    assert parse_config(write(GOOD) + [f"--data_selection={word}"]).data_selection is value
    assert parse_config(write(GOOD | {"data_selection": word})).data_selection is value


def test_values_of_every_type(write):
    config = parse_config(write(GOOD) + [
        "--learning_rate=1e-3", "--chat_template={% if a == b %}x=y{% endif %}", "--dataset_splits=train_sft,test_sft",
        "--dataset_mixer={a/b: 0.5, c: 1}", "--bf16", "--max_train_samples", "10", "--report_to=none",
        "--max_eval_samples=null"])
    assert config.learning_rate == 1e-3 and config.bf16 is True and config.max_train_samples == 10
    assert config.chat_template == "{% if a == b %}x=y{% endif %}"  # only the first "=" separates
    assert config.dataset_splits == ["train_sft", "test_sft"] and config.dataset_mixer == {"a/b": 0.5, "c": 1.0}
    assert config.report_to == ["none"] and config.max_eval_samples is None
    extra = parse_config(write(GOOD) + ["--judge_extra_body={reasoning: {effort: low}, stop: [x], temperature: null}"])
    assert extra.judge_extra_body == {"reasoning": {"effort": "low"}, "stop": ["x"], "temperature": None}


def test_flags_win_over_the_file(write):
    assert parse_config(write(GOOD | {"beta": 0.5}) + ["--beta=0.2"]).beta == 0.2


@pytest.mark.parametrize("flags, message", [
    (["--gama=1"], "command line: unknown key 'gama'; the nearest known key is 'gamma'"),
    (["--learning-rate=1"], "unknown key 'learning-rate'; the nearest known key is 'learning_rate'"),
    (["--beta=big"], "command line, beta: expected a number, found 'big'"),
    (["--beta=nan"], "beta: expected a number"),
    (["--beta=-1"], "beta: expected a number of at least 1e-06, found -1.0"),
    (["--Gamma=-1"], "command line, Gamma: expected a number of at least 0, found -1.0"),
    (["--max_length=12.5"], "max_length: expected a whole number, found '12.5'"),
    (["--bf16=maybe"], "bf16: expected true or false, found 'maybe'"),
    (["--eval_strategy=step"], "expected one of no, steps, epoch, found 'step'; did you mean 'steps'?"),
    (["--max_prompt_length=1024"], "max_prompt_length 1024 leaves no room for a response in max_length 1024"),
    (["--dataset_mixer={d: 1.5}"], "the share of d must be over 0 and at most 1, found 1.5"),
    (["--dataset_mixer=d"], "dataset_mixer: expected a mapping of names to numbers, found 'd'"),
    (["--dataset_splits=everything"], "'everything' must contain one of train, test"),
    (["--dataset_splits=train[:10%],test"], "'train[:10%]' is not the name of one whole split"),
    (["--dataset_splits=train+extra"], "'train+extra' is not the name of one whole split"),
    (["--dataset_splits=test"], "no name contains `train`"),
    (["--loss_type=kto_pair"], "loss_type 'kto_pair' cannot be gated: it scores chosen and rejected responses apart"),
    (["--loss_type=hinge", "--label_smoothing=0.1"], "label_smoothing is defined for loss_type sigmoid, not hinge"),
    (["--loss_type=hinge", "--ties=half"], "ties half is defined for loss_type sigmoid, not hinge"),
    (["--torch_dtype=float16"], "torch_dtype: expected one of auto, bfloat16, float32, found 'float16'"),
    (["--torch_dtype=bfloat16"], "torch_dtype bfloat16 needs bf16: true"),
    (["--use_peft=true", "--lora_dropout=0.05"], "lora_dropout=0.05 cannot be honoured: the gate reads the margin"),
    (["--use_peft=true", "--load_in_4bit=true"], "load_in_4bit needs a GPU and the package bitsandbytes"),
    (["--load_in_4bit=true"], "load_in_4bit goes with use_peft: true"),
    (["--merge_adapter=true"], "merge_adapter goes with use_peft: true"),
    (["--lora_task_type=SEQ_CLS"], "lora_task_type=SEQ_CLS cannot be honoured: it is CAUSAL_LM"),
    (["--use_dora=true"], "use_dora=true cannot be honoured: the adapter is plain LoRA"),
    (["--fp16=true"], "fp16=true cannot be honoured: float16 needs loss scaling"),
    (["--precompute_ref_log_probs=false"], "the log-probs of the reference are always computed once"),
    (["--report_to=mlflow"], "report_to: expected some of tensorboard, wandb, csv_monitor, none, found 'mlflow'"),
    (["--gamma=1", "--Gamma=2"], "command line: Gamma and gamma are the same key; keep one"),
    (["gamma=1"], "'gamma=1': expected --key value or --key=value"),
    (["--label_budget=2.5"], "label_budget: expected a share of the labels up to 1 or a whole number of them, found 2.5"),
    (["--label_budget=0"], "label_budget: expected a number of at least 1e-06, found 0"),
    (["--label_budget=9", "--loss_type=hinge"], "which only loss_type sigmoid takes, not hinge"),
    (["--label_budget=9", "--audit_fraction=0.1"], "audit_fraction does not go with label_budget, because the committee"),
    (["--label_budget=9", "--max_queries=9"], "max_queries does not go with label_budget, because that is the number of"),
    (["--label_budget=9", "--pseudo_labels=false"], "pseudo_labels does not go with label_budget, because every pair gets"),
    (["--label_budget=9", "--after_budget=pseudo_label"], "after_budget does not go with label_budget, because every pair"),
    (["--committee_size=8"], "committee_size decides nothing without label_budget: set that, or leave committee_size out"),
    (["--after_budget=pseudo_label"], "after_budget decides nothing without max_queries"),
    (["--judge_url=http://127.0.0.1:1/v1"], r"nobody asks the judge http://127.0.0.1:1/v1, because oracle is dataset"),
    (["--oracle=human", "--judge_url=u"], "nobody asks the judge u, because oracle is human: say --oracle=judge"),
    (["--judge_model=m"], "nobody asks the judge m, because oracle is dataset: say --oracle=judge"),
    (["--max_queries=9", "--after_budget=pseudo_label", "--pseudo_labels=false"],
     "after_budget pseudo_label does not go with pseudo_labels false"),
    (["--committee_size=1"], "committee_size: expected a whole number of at least 2, found 1"),
    (["--label_budget=9", "--data_selection=false"], "data_selection does not go with label_budget, because plain DPO buys"),
    (["--target_queries=5"], "target_queries"),
    (["--pseudo_labels=replay"], "pseudo_labels: expected true or false, found 'replay'"),
    (["--dataset_splits=train,train"], "'train' is listed twice, so its pairs would count twice"),
    (["--max_steps=0"], "nothing to do, because max_steps is 0"),
    (["--judge_extra_body=low"], "judge_extra_body: expected a mapping of names to values that JSON has, found 'low'"),
    (["--judge_extra_body={since: 2024-01-01}"], "judge_extra_body: expected a mapping of names to values that JSON has"),
    (["--judge_extra_body={messages: []}"], "judge_extra_body: messages is set by the run; leave it out"),
    (["--judge_prompt=nowhere.yaml"], "judge_prompt nowhere.yaml: cannot be read"),
    (["--judge_disagreement=toss"], "judge_disagreement: expected one of tie, coin, again, found 'toss'"),
    (["--judge_unanswerable=ignore"], "judge_unanswerable: expected one of skip, human, stop, found 'ignore'"),
])
def test_what_cannot_work_is_one_line_with_place_value_and_what_was_expected(flags, message, write, capsys):
    assert message in refused(write(GOOD) + flags, capsys)


@pytest.mark.parametrize("text, message", [
    ("", "model_name_or_path is missing"),
    ("- a\n- b\n", "expected keys with values, found list"),
    ("a: b: c\n", "c.yaml, line 1: not YAML"),
    ("model_name_or_path: [x]\n", "c.yaml, model_name_or_path: expected text, found ['x']"),
    ("beta: {a: 1}\n", "c.yaml, beta: expected a number, found {'a': 1}"),
    ("gamma:\n", "c.yaml, gamma: expected a number, found nothing"),
    ("beta: 0.1\ngamma: 1\nlearning_rate: 1\nbeta: 0.2\n", "beta is already set in line 1; keep one"),
    ("lora_r: 0\nuse_peft: true\n", "c.yaml, lora_r: expected a whole number of at least 1, found 0"),
])
def test_a_file_that_cannot_work(text, message, write, capsys):
    assert message in refused(write(text=text), capsys)


def test_no_config_and_no_such_config(capsys):
    assert "say --config FILE.yaml" in refused([], capsys)
    message = refused(["--config", "nowhere.yaml"], capsys)
    assert "--config nowhere.yaml: cannot be read (No such file or directory)" in message


def test_what_recipes_switch_off_is_accepted(write):
    parse_config(write(GOOD | {"use_peft": False, "load_in_4bit": False, "lora_r": 16, "fp16": False,
                               "lora_dropout": 0.05, "lora_target_modules": ["q_proj"], "bnb_4bit_quant_storage": "uint8"}))


def test_help_names_every_key_and_its_choices(capsys):
    assert command(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{field.name} (" in shown and field.metadata["help"] in shown for field in dataclasses.fields(Config))
    assert f"--loss_type (sigmoid; one of {', '.join(adpo.LOSSES)})" in shown and "--max_steps (-1)" in shown
    assert "--oracle (dataset; one of dataset, human, judge)" in shown


@pytest.mark.parametrize("key, table, entry", [
    ("loss_type", adpo.LOSSES, adpo.hinge_loss), ("oracle", ANNOTATORS, HumanAnnotator),
    ("judge", JUDGES, RewardModelJudge)])
def test_a_name_added_to_a_table_is_a_choice_of_its_key_and_in_the_help(key, table, entry, write, monkeypatch):
    assert {*table} <= {*parse.choices(key)}
    with monkeypatch.context() as patch:
        patch.setitem(table, "my_own", entry)
        importlib.reload(parse)  # it reads the tables when it is imported
        config = parse.parse_config(write(GOOD) + [f"--{key}=my_own"])
        assert getattr(config, key) == "my_own"
        line, = [line for line in parse.help_text().splitlines() if line.startswith(f"  --{key} (")]
        assert line.endswith(", my_own)") or ", my_own, " in line
    importlib.reload(parse)
    with pytest.raises(UsageError, match="my_own"):
        parse.parse_config(write(GOOD) + [f"--{key}=my_own"])


def test_what_an_annotator_needs_is_asked_for(write, capsys):
    assert "oracle judge (chat) needs judge_url" in refused(write(GOOD) + ["--oracle=judge"], capsys)
    flags = ["--oracle=judge", "--judge=reward_model"]
    assert "oracle judge (reward_model) needs judge_model" in refused(write(GOOD) + flags, capsys)
    flags = ["--oracle=judge", "--judge_url=u", "--judge_model=m", "--judge_prompt_price=1"]
    assert "go together; set both or neither" in refused(write(GOOD) + flags, capsys)


@pytest.mark.parametrize("kind, reason", [
    *((kind, reason) for reason, kinds in UNGATED_LOSSES.items() for kind in kinds), ("sigmoidd", "it is not known")])
def test_a_loss_that_cannot_be_gated_is_refused_with_its_reason(kind, reason, write, capsys):
    sentence = f"loss_type '{kind}' cannot be gated: {reason}; use one of {', '.join(adpo.LOSSES)}"
    assert why_not_gated(kind) == sentence
    assert sentence in refused(write(GOOD) + [f"--loss_type={kind}"], capsys)


def test_a_loss_of_the_table_can_be_gated():
    assert {why_not_gated(kind) for kind in adpo.LOSSES} == {None}
    assert not {kind for kinds in UNGATED_LOSSES.values() for kind in kinds} & {*adpo.LOSSES}


def test_the_engine_config_takes_what_the_yaml_owns(write, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "world_size", lambda: 2)
    config = parse_config(write(GOOD) + ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=3",
                                         "--max_grad_norm=0.5", "--bf16=true", "--report_to=csv_monitor"])
    ds = engine_config(config)
    assert ds["train_batch_size"] == 24 and ds["train_micro_batch_size_per_gpu"] == 4
    assert ds["gradient_accumulation_steps"] == 3 and ds["gradient_clipping"] == 0.5 and ds["bf16"]["enabled"] is True
    assert ds["csv_monitor"]["enabled"] and "tensorboard" not in ds
    for text, message in (('{"gradient_clipping": 2}', "gradient_clipping is 2, but the YAML says 0.5"),
                          ('{"zero_optimization": {"stage": "auto"}}', 'zero_optimization.stage is "auto", but no key'),
                          ('{"fp16": {"enabled": true}}', "fp16 cannot be honoured"), ("{", "line 1: not JSON"),
                          ('{"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}', "optimizer cannot be honoured"),
                          ('{"scheduler": {"type": "WarmupLR"}}', "scheduler cannot be honoured: the YAML's lr_scheduler"),
                          ('{"zero_optimization": {"stage": 3}}', "torch_compile cannot be honoured: ZeRO-3 gathers")):
        (tmp_path / "ds.json").write_text(text)
        with pytest.raises(UsageError, match=message):
            engine_config(dataclasses.replace(config, deepspeed=str(tmp_path / "ds.json"), torch_compile=True))


@pytest.mark.parametrize("bf16, zero", [("true", '{"stage": 0, "offload_optimizer": null}'),
                                        ("false", '{"stage": 0, "offload_optimizer": {"device": "cpu"}}')])
def test_zero_1_keeps_fp32_weights_and_offloads_where_zero_0_would_not(bf16, zero, write, tmp_path, capsys):
    (tmp_path / "ds.json").write_text(f'{{"bf16": {{"enabled": "auto"}}, "zero_optimization": {zero}}}')
    config = parse_config(write(GOOD) + [f"--bf16={bf16}", f"--deepspeed={tmp_path / 'ds.json'}"])
    assert engine_config(config)["zero_optimization"]["stage"] == 1
    assert "running as ZeRO 1" in capsys.readouterr().out


@pytest.mark.parametrize("stage, bf16, ranks, expected", [
    (2, False, 1, 0), (2, True, 1, 1), (1, True, 1, 1), (3, True, 1, 3), (2, False, 2, 2), (2, True, 2, 2)])
def test_one_process_runs_without_what_only_many_need(stage, bf16, ranks, expected, write, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "world_size", lambda: ranks)
    ds = {"bf16": {"enabled": "auto"}, "zero_optimization": {"stage": stage}}
    for offload, found in (({}, expected), ({"offload_optimizer": {"device": "cpu"}}, stage)):
        (tmp_path / "ds.json").write_text(json.dumps({**ds, "zero_optimization": {"stage": stage, **offload}}))
        config = parse_config(write(GOOD) + [f"--bf16={bf16}", f"--deepspeed={tmp_path / 'ds.json'}"])
        assert engine_config(config)["zero_optimization"]["stage"] == found


def test_an_adam_for_the_host_that_cannot_be_compiled_is_one_line(write, tmp_path, monkeypatch):
    """As where the environment's python is started without activating it: ninja is not on PATH then."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    ds = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    with pytest.raises(UsageError, match=r"ds_config.json: offload_optimizer needs .*\(.*ninja.*\): put a C\+\+ compiler"):
        engine.make_optimizer(parse_config(write(GOOD)), torch.nn.Linear(2, 2), ds)


def test_deepspeeds_timers_do_not_wait_for_the_device(write):
    assert engine_config(parse_config(write(GOOD)))["timers"] == {"throughput": {"enabled": False}}


def test_tokens_alone_decide_how_a_step_is_cut(write):
    """However 12 pairs a step are written down, a micro-batch is filled up to micro_batch_tokens."""
    cuts = []
    for pairs, accumulation in ((12, 1), (4, 3), (1, 12)):
        config = parse_config(write(GOOD) + [f"--per_device_train_batch_size={pairs}", "--micro_batch_tokens=80",
                                             f"--gradient_accumulation_steps={accumulation}"])
        ours = Schedule(config, FakePairs())
        cuts.append([ours.micro_batches(ours.rows(step)) for step in range(ours.epoch_steps)])
    assert cuts[0] == cuts[1] == cuts[2]
    lengths = FakePairs.lengths
    for step in cuts[0]:
        for micro_batch, rest in zip(step, step[1:]):  # the next pair would not have fitted
            longest = max(lengths[row] for row in micro_batch)
            assert len(micro_batch) * longest <= 80 < (len(micro_batch) + 1) * longest and rest


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
def test_learning_rates_are_those_of_transformers(kind, write):
    import torch
    import transformers
    config = parse_config(write(GOOD) + [f"--lr_scheduler_type={kind}", "--learning_rate=0.5", "--warmup_ratio=0.23"])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    theirs = transformers.get_scheduler(kind, optimizer, num_warmup_steps=7, num_training_steps=30)  # ceil(0.23 · 30)
    for step in range(30):
        assert learning_rate(step, 30, config) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


class FakePairs:
    lengths = [10 + n % 7 for n in range(42)]

    def __len__(self):
        return 42


def test_schedule_sees_each_pair_once_an_epoch(write, monkeypatch):
    monkeypatch.setattr(schedule, "world_size", lambda: 2)
    config = parse_config(write(GOOD) + ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=2",
                                         "--num_train_epochs=1.5"])
    ours = Schedule(config, FakePairs())
    assert (ours.epoch_steps, ours.total_steps) == (6, 9)
    first = [row for step in range(6) for row in ours.rows(step)]
    assert sorted(first) == list(range(42)) and first != sorted(first)
    assert [len(ours.rows(step)) for step in range(6)] == [8, 8, 8, 8, 8, 2]
    assert ours.rows(6) != first[:8]  # the second epoch has its own order
    assert Schedule(config, FakePairs()).rows(7) == ours.rows(7)  # a resumed run computes the same
    assert [ours.pairs_seen(steps) for steps in (0, 5, 6, 9)] == [0, 40, 42, 42]
    short = Schedule(dataclasses.replace(config, max_steps=2), FakePairs())
    assert short.rows_seen() == sorted(short.rows(0) + short.rows(1))  # not the whole epoch


def test_pairs_that_are_not_kept_do_not_come_and_the_run_is_as_long():
    config = Config(per_device_train_batch_size=8, num_train_epochs=2.0, seed=1)
    schedule, kept = Schedule(config, FakePairs()), [3, 5, 8, 13, 21, 34, 1, 2, 40, 41]
    schedule.keep_only(kept)
    assert (schedule.epoch_steps, schedule.total_steps) == (2, 12)
    for epoch in range(6):
        assert sorted(schedule.rows(2 * epoch) + schedule.rows(2 * epoch + 1)) == sorted(kept)
    assert schedule.rows_seen() == sorted(kept)


def test_pairs_that_are_kept_are_grouped_by_their_own_lengths():
    schedule = Schedule(Config(per_device_train_batch_size=6, group_by_length=True), FakePairs())
    schedule.keep_only([n for n in range(42) if n % 7 in (0, 3, 6)])  # six of each of three lengths
    assert all(len({FakePairs.lengths[row] for row in schedule.rows(step)}) == 1 for step in range(3))


def test_no_without_quotes_is_a_choice_where_there_is_one(write):
    text = '{model_name_or_path: m, dataset_mixer: {d: 1.0}, output_dir: o, save_strategy: no, eval_strategy: No}'
    assert parse_config(write(text=text)).save_strategy == parse_config(write(text=text)).eval_strategy == "no"


def test_a_path_that_begins_with_the_home_folder_is_in_it(write, monkeypatch):
    """A shell leaves the ~ of --output_dir=~/runs as it is, and YAML does too: it would become a folder of that name."""
    monkeypatch.setenv("HOME", "/home/ann")
    config = parse_config([*write({**GOOD, "dataset_mixer": {"~/pairs": 1.0}, "model_name_or_path": "~/model"}),
                           "--output_dir=~/runs/mine"])
    assert (config.output_dir, config.model_name_or_path) == ("/home/ann/runs/mine", "/home/ann/model")
    assert config.dataset_mixer == {"/home/ann/pairs": 1.0}


@pytest.mark.parametrize("gpu", [False, True])
def test_flex_attention_is_refused_where_torch_cannot_train_with_it(gpu, write, capsys, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: gpu)
    argv = [*write(GOOD), "--attn_implementation=flex_attention"]
    if gpu:
        assert parse_config(argv).attn_implementation == "flex_attention"
    else:
        assert "attn_implementation flex_attention needs a GPU; on a CPU say sdpa or eager" in refused(argv, capsys)
