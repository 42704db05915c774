"""benchmarks/query_efficiency.py, without its runs: what is run, which learning rates are chosen, what the tables say:
`python -m pytest tests/test_query_efficiency.py`."""

import json
import math
import os
from pathlib import Path

import pytest
import torch

from benchmarks import query_efficiency, query_report
from benchmarks.query_efficiency import FULL, HEADLINE, METHODS, SHARES, SHORT, TUNED_AS, Bench, Job, choose
from runtime import toy
from runtime.parse import parse_config


@pytest.fixture
def bench(tmp_path):
    return Bench(FULL, tmp_path / "runs", {task: tmp_path / task for task in FULL.rates})


def finish(bench, job, accuracy, **more):
    """Write a run's result as if it had been trained."""
    bench.folder(job).mkdir(parents=True)
    found = {"queries": 4096, "wrong": 0.2, "accuracy": accuracy, "log_loss": 0.3, "seconds": 30.0,
             "mixtures": [[0.25, 1.0, 0.5], [0.5, 4.0, 1.0], [1.0, 9.0, 2.0]]} | more
    (bench.folder(job) / "result.json").write_text(json.dumps(found))


@pytest.mark.parametrize("tried, chosen, more", [
    ({1e-3: [0.8], 2e-3: [0.9]}, None, [4e-3]),  # the grid has not been tried
    ({1e-3: [0.8], 2e-3: [0.9], 4e-3: [0.7]}, 2e-3, []),
    ({1e-3: [0.8, 0.9], 2e-3: [0.84, 0.84], 4e-3: [0.7, 0.7]}, 1e-3, [5e-4]),  # by the mean
    ({1e-3: [0.8], 2e-3: [0.8], 4e-3: [0.9]}, 4e-3, [8e-3]),
    ({1e-3: [0.8], 2e-3: [0.8], 4e-3: [0.9], 8e-3: [0.95]}, 8e-3, [])])  # one more than the grid, in all
def test_the_best_of_the_tuning_runs_is_chosen(tried, chosen, more):
    assert choose(tried, (1e-3, 2e-3, 4e-3)) == (chosen, more)
    assert choose({0.1: [0.5]}, (0.1,)) == (0.1, [])  # a grid of one is not searched


def test_the_learning_rate_is_chosen_first_and_then_beta(bench):
    cell = "toy", "noise-0.2", "random subset"
    asked = []
    while more := bench.setting(*cell)[1]:
        asked.append(more)
        for job in bench.tuning(*cell, more):
            finish(bench, job, 0.9 - abs(job.rate - 8e-3) - abs(job.beta - 0.2))
    rates, edge, betas, last = asked
    assert rates == [(rate, 0.1) for rate in FULL.rates["toy"]] and edge == [(8e-3, 0.1)]
    assert betas == [(8e-3, 0.05), (8e-3, 0.2)] and last == [(8e-3, 0.4)]
    assert bench.setting(*cell) == ((8e-3, 0.2), [])


def test_all_methods_are_tuned_on_the_same_grid_and_never_on_reported_seeds(bench):
    for task in FULL.rates:
        rates = [(rate, 0.1) for rate in FULL.rates[task]]
        tuning = {job for cell in bench.cells(task) for job in bench.tuning(task, *cell, rates)}
        for method in METHODS:
            assert bench.setting(task, "noise-0.2", method) == (None, rates)
            of_method = {job.rate for job in tuning if job.method == TUNED_AS.get(method, method)}
            assert of_method == set(FULL.rates[task])
        reported = {seed for *_, seeds in FULL.blocks for seed in seeds.get(task, ())}
        assert max(reported) < min(job.seed for job in tuning)


def tune(bench, best=2e-3):
    """Finish the built-in task's tuning runs at 20 % noise, so that each headline method does best at this learning rate."""
    for method in HEADLINE:
        while more := bench.setting("toy", "noise-0.2", method)[1]:
            for job in bench.tuning("toy", "noise-0.2", method, more):
                finish(bench, job, 0.9 - 10 * abs(job.rate - best) - abs(job.beta - 0.1))


def test_what_is_reported_waits_for_its_learning_rate_and_goes_seed_by_seed(bench):
    assert bench.reported("toy", HEADLINE, ["noise-0.2"], {"toy": range(5)}) == []
    tune(bench)
    jobs = bench.reported("toy", HEADLINE, ["noise-0.2"], {"toy": range(5)})
    assert [(job.seed, job.method) for job in jobs] == [(seed, method) for seed in range(5) for method in HEADLINE]
    assert {(job.rate, job.beta) for job in jobs} == {(2e-3, 0.1)}
    assert bench.reported("toy", HEADLINE, ["noise-0.35"], {"toy": range(5)}) == []  # another noise has its own
    assert bench.reported("toy", HEADLINE, ["noise-0.2"], {"movies": range(5)}) == []


def test_every_method_is_a_config_that_train_accepts(bench, tmp_path):
    for noise in SHARES:
        for method in METHODS:
            job = Job("toy", noise, method, 2e-3, 0.05, 3)
            path = tmp_path / "keys.yaml"
            path.write_text(json.dumps(bench.keys(job)))
            config = parse_config(["--config", str(path)])
            assert (config.seed, config.learning_rate, config.beta, config.max_steps) == (3, 2e-3, 0.05, 256)
            assert bench.folder(job) == Path(config.output_dir) and noise in next(iter(config.dataset_mixer))
            if method in HEADLINE and method != "DPO, all labels":
                share = config.label_budget or config.max_train_samples / 16384
                assert share == pytest.approx(SHARES[noise], abs=1e-4)
    assert bench.keys(Job("toy", "noise-0.2", "random subset", 1e-3, 0.1, 0))["max_train_samples"] == 4096
    folders = {bench.folder(Job("toy", "noise-0.2", method, 1e-3, 0.1, 0)) for method in METHODS}
    assert len(folders) == len(METHODS)


def test_the_plan_counts_what_is_run(bench):
    """By hand: 3 headline methods with 5 settings on 2 seeds of 2 noises, 9 others on one; then the blocks."""
    jobs = bench.planned("toy")
    assert len(jobs) == 3 * 5 * 4 + 9 * 5 + 3 * 20 + 10 * 3 + 2 * 10 * 3 + 10 + 8 * 3 + 5 * 2 + 3
    assert {job.seed for job in jobs} == {*range(20), 100, 101}
    assert len(Bench(SHORT, bench.outputs, {"toy": bench.roots["toy"]}).planned("toy")) == 3 * 2 + 3 * 2


def test_a_worker_that_dies_loses_only_what_it_was_at(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(query_efficiency, "call", die_once)
    calls = [(str(tmp_path), str(n)) for n in range(3)]
    bench.work(calls)
    assert {path.name for path in tmp_path.iterdir()} >= {"0", "1", "2"}
    with pytest.raises(RuntimeError, match="ended their worker three times"):
        bench.work([(str(tmp_path), "always")])
    with pytest.raises(ZeroDivisionError):
        bench.work([(str(tmp_path), "error")])


def die_once(folder, name):
    """In a worker: leave a file; "1" kills its worker the first time."""
    if name == "error":
        raise ZeroDivisionError
    if name == "always" or name == "1" and not os.path.exists(f"{folder}/died"):
        open(f"{folder}/died", "w").close()
        os._exit(9)
    open(f"{folder}/{name}", "w").close()


def test_reward_at_a_kl_by_hand():
    mixtures = [[0.25, 1.0, 0.5], [0.5, 4.0, 1.0], [1.0, 9.0, 2.0]]
    assert query_report.reward_at(mixtures, 4.0) == 1.0
    assert query_report.reward_at(mixtures, 2.25) == pytest.approx(0.75)  # √2.25 is halfway from √1 to √4
    assert query_report.reward_at(mixtures, 16.0) is None


def test_equivalence_by_hand(bench):
    def runs(**accuracies):
        return {name.replace("_", " "): {"0": {"accuracy": a, "queries": q}} for name, (a, q) in accuracies.items()}

    curve = {"random subset, 12.5 %": (0.80, 2048), "random subset": (0.84, 4096), "random subset, 50 %": (0.88, 8192),
             "DPO, all labels": (0.90, 16384)}
    for accuracy, share in ((0.86, "35.4%"), (0.80, "12.5%"), (0.79, "under 12.5%"), (0.91, "over 100%")):
        found = runs(**curve, mine=(accuracy, 4096))
        assert query_report.equivalent(found, "mine", 16384) == share
    assert query_report.equivalent(runs(mine=(0.9, 1)), "mine", 16384) is None


def test_intervals_are_students_and_differences_are_paired():
    mean, half = query_report.interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(query_report.interval([1.0])[1])
    runs = {"a": {"0": {"accuracy": 0.9}, "2": {"accuracy": 0.8}}, "b": {"0": {"accuracy": 0.7}, "1": {"accuracy": 0.1}}}
    assert query_report.differences(runs, "a", "b") == pytest.approx([0.2])


def test_the_page_says_what_finished(bench, tmp_path, capsys):
    tune(bench)
    for job in bench.reported("toy", HEADLINE, ["noise-0.2"], {"toy": range(3)}):
        gain = {"committee": 0.03, "DPO, all labels": 0.01}.get(job.method, 0)
        finish(bench, job, 0.9 + gain + 0.01 * job.seed + 0.001 * (job.seed == 2) * (gain > 0))
    query_report.write(bench, tmp_path)
    page = (tmp_path / "query_efficiency.md").read_text()
    assert "at least 2 points above a random subset, the interval above 0 | yes | +0.0303 ± 0.0014 |" in page
    assert "| committee | 0.002 | 0.1 | 3 | 25.0% | 20.0% |" in page
    assert page.count("**0.9000**") == 2 * len(HEADLINE)
    assert (tmp_path / "query_efficiency.png").exists()


def test_what_finished_elsewhere_is_not_run_again(bench, tmp_path):
    """But where the keys of a method have changed, it is."""
    tune(bench, best=8e-3)
    job, = bench.reported("toy", ["committee"], ["noise-0.2"], {"toy": range(1)})
    finish(bench, job, 0.93)
    assert job.rate == 8e-3
    dump = json.loads(bench.dump())
    (tmp_path / "kept.json").write_text(bench.dump())
    kept = query_efficiency.read_kept(tmp_path / "kept.json")
    elsewhere = Bench(FULL, tmp_path / "empty", bench.roots, kept=kept)
    assert len(kept) == len(dump["runs"]) == len(HEADLINE) * (4 + 2) * 2 + 1
    assert elsewhere.finished("toy") == bench.finished("toy") == kept
    assert elsewhere.result(job)["accuracy"] == 0.93 and elsewhere.dump() == bench.dump()
    dump["methods"]["committee"]["gamma"] = 0.2
    (tmp_path / "kept.json").write_text(json.dumps(dump))
    assert {job.method for job in query_efficiency.read_kept(tmp_path / "kept.json")} == {*HEADLINE} - {"committee"}
    assert query_efficiency.read_kept(tmp_path / "none.json") == {}


def test_a_mixture_goes_from_the_reference_to_the_policy(tiny, monkeypatch):
    query_runs = pytest.importorskip("benchmarks.query_runs")
    monkeypatch.setattr(query_runs, "LAMBDAS", (0.0, 0.5, 1.0))
    reference, tokenizer = toy.load(tiny / "model")
    policy, _ = toy.load(tiny / "model")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    prompts = ["review of the hotel in paris :", "review of the bar :"] * 16
    with toy.seeded_and_silent(0):
        texts, kl = query_runs.sample_mixtures(policy, reference, tokenizer, prompts, 6)
    zero, half, one = kl.view(3, 32).mean(1).tolist()
    assert abs(zero) < 1e-5 < half < one and len(texts) == 96
    checked = 0
    for prompt, text, found in zip(prompts, texts[64:], kl[64:].tolist()):  # of the policy itself, in one pass
        ids, start = tokenizer(prompt + text, return_tensors="pt").input_ids, len(tokenizer(prompt).input_ids)
        if ids.shape[1] == start + 6:  # not where it sampled a token that no text shows
            with torch.no_grad():
                ours, theirs = (m(ids).logits[0, start - 1:-1].log_softmax(-1) for m in (policy, reference))
            assert found == pytest.approx((ours.exp() * (ours - theirs)).sum().item(), rel=1e-3)
            checked += len(prompt) == len(prompts[1])
    assert checked > 3
