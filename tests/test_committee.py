"""labels/committee.py and adpo.PairRewards: `python -m pytest tests/test_committee.py`."""

import json
import math
import os
import random
import re
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers import Person
from safetensors.torch import load_file

import adpo
import data
from labels import committee
from labels.annotators import HumanAnnotator
from labels.committee import knows_something, labels_to_have
from labels.ledger import Ledger, Question
from runtime import toy
from runtime.config import Config
from runtime.model import load_policy, load_tokenizer
from runtime.schedule import Schedule

# Enough for the members to learn the pairs of `easy` with a random model.
KEYS = {"label_budget": 64, "committee_size": 2, "committee_epochs": 6,
        "committee_learning_rate": 5e-3, "max_steps": 12}
SAVING = {"save_strategy": "steps", "save_steps": 5}


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    """A data set whose better response says "perfect", and the other "rotten"."""
    folder, rng = tmp_path_factory.mktemp("easy"), random.Random(0)
    for name, count in (("train", 120), ("test", 40)):
        rows = []
        for n in range(count):
            start = rng.choice(toy.CLAUSES).format(aspect=rng.choice(toy.ASPECTS), word=rng.choice(toy.OPINIONS))
            responses = [f" {start} and the service seemed {word} ." for word in ("perfect", "rotten")]
            label = rng.choice("ab")
            rows.append({"prompt": toy.PROMPT.format(place=toy.PLACES[n % 40], city=toy.CITIES[n // 40]), "label": label,
                         "response_a": responses[label == "b"], "response_b": responses[label == "a"]})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"{{{folder}: 1.0}}"


# ----------------------------------------------------------------------------------------------------------------------
# One member

@pytest.fixture(scope="module")
def config(tiny):
    return Config(model_name_or_path=f"{tiny}/model", dataset_mixer={f"{tiny}/pairs": 1.0}, max_prompt_length=16,
                  max_length=64)


@pytest.fixture(scope="module")
def pairs(config):
    renderer = data.Renderer(load_tokenizer(config), config.max_prompt_length, config.max_length)
    return data.load_pairs(config.dataset_mixer, ["train"], renderer, "train")[0]


@pytest.mark.parametrize("shared", [True, False])
def test_a_reward_sums_the_states_of_the_response(config, pairs, shared):
    """Compare with the model's own forward on each response alone."""
    module = load_policy(config, kind=adpo.PairRewards)
    with torch.no_grad():
        assert (module(data.collate(pairs, [0], shared)) == 0).all()  # before the first step
        torch.nn.init.normal_(module.reward_head.weight)
        rows = [3, 0, 7]
        found = module(data.collate(pairs, rows, shared))  # (B, 2)
        for pair, (prompt, *responses) in zip(found, pairs.token_ids(rows)):
            for reward, response in zip(pair, responses):
                ids = torch.tensor([*prompt, *response])[None]
                states = module.lm(ids, output_hidden_states=True).hidden_states[-1][0, len(prompt):]  # (n, H)
                expected = (states @ module.reward_head.weight[0]).sum().item()
                assert reward.item() == pytest.approx(expected, abs=1e-4)


def test_only_what_a_reward_reads_is_trained(config, pairs):
    module = load_policy(config, kind=adpo.PairRewards)
    torch.nn.init.ones_(module.reward_head.weight)
    module(data.collate(pairs, [0, 1])).sum().backward()
    for name, parameter in module.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name


def test_a_member_takes_steps_of_committee_batch_size_over_the_labelled_pairs(config, pairs, monkeypatch):
    steps, rates = [], []  # (pairs of the step, whether the micro-batch ends it); what the learning rate depends on
    monkeypatch.setattr(committee, "backward", lambda engine, loss, whole, last: steps.append((whole, last)))
    monkeypatch.setattr(committee, "set_learning_rate", lambda engine, *arguments: rates.append(arguments))
    monkeypatch.setattr(committee, "skipped_in_a_row", lambda *arguments: 0)
    config = replace(config, committee_batch_size=16, committee_epochs=1.5, committee_learning_rate=0.25)
    engine = load_policy(config, kind=adpo.PairRewards)
    engine.device = torch.device("cpu")
    labels = torch.zeros(len(pairs)).index_fill(0, torch.arange(40), 1.0)
    committee.train(engine, SimpleNamespace(config=config, stop_if_asked=lambda: None), Schedule(config, pairs), labels, 0)
    assert [whole for whole, last in steps if last] == [16, 16, 8, 16, 16]
    assert rates == [(step, 5, config, 0.25) for step in range(5)]


# ----------------------------------------------------------------------------------------------------------------------
# Many members

def test_a_member_is_graded_on_labels_that_it_had_not_seen(capsys):
    labels = torch.tensor([1.0, -1.0] * 100 + [0.0, math.nan])
    margin = torch.cat([labels[:200], torch.tensor([9.0, 9.0])])
    assert knows_something(margin, labels)
    assert "is right about 100.0% of 200 others" in capsys.readouterr().out
    assert not knows_something(-margin, labels)
    half = margin.clone()
    half[:100] *= -1
    assert not knows_something(half, labels)
    assert "is right about 50.0% of 200 others; it does not beat guessing" in capsys.readouterr().out
    assert knows_something(half * torch.where(half * labels > 0, 2.0, 1.0), labels)  # surer where it is right
    assert not knows_something(margin, torch.zeros(202))


def test_a_coin_is_seldom_taken_for_knowledge():
    """In one of 40 draws, if the labels are independent of the margins."""
    generator = torch.Generator().manual_seed(0)
    taken = sum(knows_something(torch.randn(300, generator=generator),
                                torch.where(torch.rand(300, generator=generator) < 0.5, 1.0, -1.0)) for _ in range(2000))
    assert 30 <= taken <= 70


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

@pytest.fixture(scope="module")
def whole(train, easy):
    return train("committee", dataset_mixer=easy, **KEYS, **SAVING)


def members():
    """The files of all members so far, the oldest first."""
    return sorted(Path(os.environ["HF_HOME"], "adpo").glob("committee-*"), key=lambda path: path.stat().st_mtime_ns)


def test_all_labels_are_bought_before_the_first_step_and_every_pair_is_trained_on(whole):
    rows = whole.rows()
    assert {row["queries"] for row in rows} == {64} and {row["pairs_seen"] for row in rows} == {96}
    assert whole.summary()["queries"] == 64 and "does not beat guessing" not in whole.stdout
    assert whole.summary()["pseudo_label_accuracy"] > 0.9 and whole.summary()["committee"] is True
    ledger = Ledger(whole.output / "labels.sqlite")
    asked = ledger.db.execute("SELECT step, margin FROM answers ORDER BY step").fetchall()
    ledger.close()
    assert asked == [(0, 0.0)] * 64
    assert whole.summary()["pseudo_labels"] == 96 - 64  # of 12 steps of 8


def test_the_soft_labels_are_the_mean_of_the_members(train, easy, monkeypatch):
    """The loss of the first step, where the policy's margins are 0, is log 2 whatever the labels; its gradient is not. So
    look at what the loop was given."""
    seen = []
    choose = adpo.choose_labels

    def watched(*arguments, **keywords):
        if len(arguments) == 7:
            seen.append(arguments[6])
        return choose(*arguments, **keywords)
    monkeypatch.setattr(adpo, "choose_labels", watched)
    train("committee-again", dataset_mixer=easy, **KEYS | {"max_steps": 15})  # one epoch
    margins = [load_file(path)["values"] for path in members()[-2:]]
    assert not torch.equal(*margins)  # each has seen the labels in an order of its own
    given = torch.cat(seen).sort().values
    torch.testing.assert_close(given, (margins[0].sigmoid() + margins[1].sigmoid() - 1).sort().values)
    assert given.abs().max() < 1 and given.abs().mean() > 0.1


def test_another_rate_or_beta_of_the_policy_needs_no_new_members(whole, train, easy):
    before = members()
    other = train("committee-beta", dataset_mixer=easy, beta=0.5, learning_rate=3e-4, **KEYS)
    assert members() == before and other.ledger() == whole.ledger() and other.losses() != whole.losses()


@pytest.fixture
def engines(monkeypatch):
    """The engines of all members from now on, as weak references. Each must be gone before the next is made."""
    engines, in_engine = [], committee.in_engine

    def watched(use, *arguments, **keywords):
        assert not any(engine() for engine in engines)
        return in_engine(lambda engine: (engines.append(weakref.ref(engine)), use(engine))[1], *arguments, **keywords)
    monkeypatch.setattr(committee, "in_engine", watched)
    monkeypatch.setattr(committee, "cached", lambda kind, depends, compute: compute())
    return engines


@pytest.mark.parametrize("stage, bf16", [(0, False), (1, True), (3, False)])
def test_a_member_is_gone_before_the_next_is_loaded(stage, bf16, engines, train, easy, engine_configs):
    train("committee-memory", dataset_mixer=easy, deepspeed=engine_configs[stage], bf16=bf16,
          **KEYS | {"committee_epochs": 1, "max_steps": 1})
    assert len(engines) >= 2 and not any(engine() for engine in engines)


def test_members_report_to_no_service(train, easy, tmp_path):
    """W&B takes no step that is smaller than the last, so after the members' steps it would drop the policy's."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = train("committee-reports", dataset_mixer=easy, report_to="tensorboard", **KEYS | {"seed": 7, "max_steps": 2})
    written, = (run.output / "tensorboard").iterdir()  # the policy's alone
    events = accumulator.EventAccumulator(str(written)).Reload()
    assert {name.partition("/")[0] for name in events.Tags()["scalars"]} == {"train", "eval"}


@pytest.mark.parametrize("stage", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_buy_and_learn_together(stage, whole, train, easy, engine_configs):
    """Their members differ in the last bits, which may decide between pairs that are worth the same."""
    two = train("committee-2", 2, dataset_mixer=easy, deepspeed=engine_configs[stage],
                **KEYS | {"per_device_train_batch_size": 4})
    first_half = [{row for row in run.ledger() if row[2] == 0} for run in (two, whole)]
    assert first_half[0] == first_half[1] and len(two.ledger()) == 64
    assert two.losses() == pytest.approx(whole.losses(), abs=0.03)


def test_a_resumed_run_is_the_whole_one(whole, train, easy, tmp_path):
    keys = dict(KEYS, dataset_mixer=easy, **SAVING)
    output = tmp_path / "run"
    train("committee-cut", output_dir=output, oracle="dataset", **keys)
    for path in output.iterdir():  # as if killed after step 10
        if path.is_file() and not path.name.startswith("labels.sqlite") and path.name != "config.yaml":
            path.unlink()
    members()[-1].unlink()
    resumed = train("committee-resumed", output_dir=output, **keys)
    assert "resumed from" in resumed.stdout and resumed.ledger() == whole.ledger()
    assert all(torch.equal(value, whole.weights()[name]) for name, value in resumed.weights().items())


def test_a_run_that_stops_before_all_labels_are_bought_draws_the_same_pairs_again(whole, train, easy, tmp_path):
    """As if it had been killed when half of the answers were there."""
    keys = dict(KEYS, dataset_mixer=easy, output_dir=tmp_path / "run", **SAVING)
    train("committee-first", **keys)
    ledger = Ledger(tmp_path / "run" / "labels.sqlite")
    late = [pair for pair, in ledger.db.execute("SELECT pair FROM answers ORDER BY pair")][::2]
    with ledger.transaction():
        ledger.db.executemany("DELETE FROM answers WHERE pair = ?", [(pair,) for pair in late])
    ledger.close()
    for path in (tmp_path / "run").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif not path.name.startswith("labels.sqlite") and path.name != "config.yaml":
            path.unlink()
    for path in members():
        path.unlink()
    again = train("committee-second", **keys)
    assert again.ledger() == whole.ledger()
    assert all(torch.equal(value, whole.weights()[name]) for name, value in again.weights().items())


def test_people_are_asked_everything_at_once(whole, train, easy, tmp_path, monkeypatch):
    """Nobody is there for the last quarter: the run stops, and the same command goes on."""
    monkeypatch.setattr(HumanAnnotator, "poll_seconds", 0.02)
    keys = dict(KEYS, dataset_mixer=easy, oracle="human", output_dir=tmp_path / "run", **SAVING)
    with Person(tmp_path / "run", limit=48):
        stopped = train("committee-waits", check=75, oracle_wait_minutes=0.02, **keys)
    assert "stopped: no answer for 0.02 minutes" in stopped.stdout and len(stopped.ledger()) == 48
    with Person(tmp_path / "run"):
        run = train("committee-goes-on", **keys)
    assert run.ledger() == whole.ledger()
    assert all(torch.equal(value, whole.weights()[name]) for name, value in run.weights().items())


def test_members_that_learn_nothing_are_not_believed(tiny, train, tmp_path):
    """Labels at random: every step is then filled with pairs whose labels were bought."""
    rng = random.Random(1)
    for name in ("train", "test"):
        rows = [json.loads(line) for line in (tiny / "pairs" / f"{name}.jsonl").read_text().splitlines()]
        (tmp_path / f"{name}.jsonl").write_text("".join(
            json.dumps(row | {"label": rng.choice("ab")}) + "\n" for row in rows))
    run = train("committee-noise", dataset_mixer=f"{{{tmp_path}: 1.0}}", **KEYS)
    assert "it does not beat guessing, so the run trains only on the labelled pairs" in run.stdout
    summary = run.summary()
    assert (summary["pseudo_labels"], summary["queries"], summary["pairs"]) == (0, 64, 96) and "(67 %)" in run.stdout
    assert [row["pairs_seen"] for row in run.rows() if row["split"] == "train"] == [96] * 12
    assert run.rows()[-1]["epoch"] == 1.5  # 12 steps of 8 of 64 pairs
    assert summary["committee"] is False
    assert "without a committee, because a member did not beat guessing" in (run.output / "README.md").read_text()


def test_a_pair_that_the_data_repeats_is_graded_once(tiny, train, tmp_path):
    """Otherwise three rows a pair would make a guess 1.7 times as sure of itself."""
    rows = (tiny / "pairs" / "train.jsonl").read_text().splitlines()[:40]
    (tmp_path / "train.jsonl").write_text("\n".join(3 * rows))
    run = train("committee-repeated", dataset_mixer=f"{{{tmp_path}: 1.0}}",
                **KEYS | {"label_budget": 1, "committee_epochs": 0.1, "max_steps": 15})
    pairs = [pair for pair, *_ in run.ledger()]
    assert len(pairs) == 40
    held_out = sum(committee.drawn(f"half 42 {pair}") % 2 for pair in pairs)
    assert f" {held_out} others" in run.stdout


@pytest.mark.parametrize("budget, labels", [(0.25, 30), (1, 120), (64, 64), (1e9, 120), (1e-6, 1)])
def test_a_budget_is_a_share_or_a_number(budget, labels):
    assert labels_to_have(budget, 120) == labels


def test_labels_of_another_run_count(whole, train, easy, tmp_path):
    (tmp_path / "run").mkdir()
    ledger = Ledger(tmp_path / "run" / "labels.sqlite")
    known = sorted(whole.ledger())[:48]
    ledger.add("reused", [(Question(pair, None, -1), label, "", None, None) for pair, label, _ in known])
    ledger.close()
    run = train("committee-reuses", dataset_mixer=easy, output_dir=tmp_path / "run", **KEYS)
    assert run.summary()["queries"] == 16 and run.stdout.count("48 answers of other runs are in the ledger") == 1
    graded = int(re.search(r"is right about .* of (\d+) others", run.stdout)[1])
    assert 16 <= graded <= 48 and len(run.ledger()) == 64  # about half of all


@pytest.mark.parametrize("ties, trained", [("none", 0), ("half", 1)])
def test_an_answer_without_a_preference_is_not_overruled_by_the_committee(ties, trained):
    margin, soft = torch.tensor([2.0, 2.0, 2.0]), torch.tensor([-0.5, 0.5, 0.25])
    labels = adpo.choose_labels(margin, torch.tensor([1.0, math.nan, 0.0]), soft_labels=soft, ties=ties)
    assert labels[0] == -0.5 and labels[2] == 0.25 and bool(labels[1].isnan()) == bool(trained)
    assert (adpo.preference_loss(margin, labels)[1] > 0) == trained


def test_answers_that_never_prefer_a_response_end_the_run(train, easy, tmp_path, config):
    """Those about the 24 pairs that the run does not come to do not count."""
    (tmp_path / "run").mkdir()
    renderer = data.Renderer(load_tokenizer(config), config.max_prompt_length, config.max_length)
    ids = data.load_pairs(yaml.safe_load(easy), ["train"], renderer, "train")[0].ids
    whole = train("committee-all", dataset_mixer=easy, **KEYS | {"label_budget": 1.0, "committee_epochs": 0.01})
    ledger = Ledger(tmp_path / "run" / "labels.sqlite")
    seen = {pair for pair, *_ in whole.ledger()}
    ledger.add("reused", [(Question(pair, None, -1), int(pair not in seen), "", None, None) for pair in ids])
    ledger.close()
    run = train("committee-ties", check=2, dataset_mixer=easy, output_dir=tmp_path / "run", **KEYS)
    assert "none of the 96 answers prefers a response" in run.stderr
