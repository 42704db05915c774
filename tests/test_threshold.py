"""labels/threshold.py, whom to ask and whom to replay: `python -m pytest tests/test_threshold.py`."""

import math
import types

import pytest
import torch

import adpo
from labels.annotators import DatasetAnnotator
from labels.ledger import Question
from labels.oracle import Oracle
from labels.threshold import THRESHOLDS, Budget, Calibrated, FixedGamma, fit_scale, make_threshold
from runtime.config import Config
from runtime.schedule import Schedule

# ----------------------------------------------------------------------------------------------------------------------
# The scale

def test_the_scale_is_the_weighted_maximum_likelihood():
    """Compare with a brute-force search over a, for labels whose true scale is 0.6."""
    generator = torch.Generator().manual_seed(0)
    margin = 3 * torch.randn(4000, generator=generator)
    answers = torch.where(torch.rand(4000, generator=generator) < torch.sigmoid(0.6 * margin), 1, -1)
    weights = torch.where(margin.abs() > 2, 20.0, 1.0)
    a, error = fit_scale(margin, answers, weights)
    grid = torch.linspace(0, 2, 20001, dtype=torch.float64)[:, None]
    likelihood = (weights * torch.nn.functional.logsigmoid(grid * (margin * answers))).sum(1)
    assert a == pytest.approx(grid[likelihood.argmax()].item(), abs=1e-4)
    assert abs(a - 0.6) < 3 * error and 0.01 < error < 0.1


def test_the_standard_error_is_the_spread_of_the_fit():
    generator = torch.Generator().manual_seed(1)
    fits = []
    for _ in range(300):
        margin = 2 * torch.randn(500, generator=generator)
        answers = torch.where(torch.rand(500, generator=generator) < torch.sigmoid(margin), 1, -1)
        asked = (margin.abs() < 1) | (torch.rand(500, generator=generator) < 0.2)
        weights = torch.where(margin.abs() < 1, 1.0, 5.0)
        fits.append(fit_scale(margin[asked], answers[asked], weights[asked]))
    a, errors = torch.tensor(fits).T
    assert a.mean().item() == pytest.approx(1, abs=0.05)
    assert errors.mean().item() == pytest.approx(a.std().item(), rel=0.15)


@pytest.mark.parametrize("margin, answers, low, high", [
    ([1.0, 2.0, -3.0], [-1, -1, 1], 0, 0),  # all against the policy
    ([1.0, 2.0, -3.0], [1, 1, -1], 5, math.inf),  # all with it: the likelihood has no maximum
    ([0.0, 0.0], [1, -1], 0, 0)])
def test_the_scale_at_its_ends(margin, answers, low, high):
    a, error = fit_scale(torch.tensor(margin), torch.tensor(answers), torch.ones(len(margin)))
    assert low <= a <= high and math.isfinite(a) and error >= 0


# ----------------------------------------------------------------------------------------------------------------------
# The threshold, from a real ledger

PAIRS = [f"p{n:03}" for n in range(400)]


def rows_of(step):
    """Ten pairs a step, in order."""
    return [(10 * step + n) % 400 for n in range(10)]


class Pairs:
    """What a schedule and a threshold read of data.Pairs."""

    def __init__(self, count=400):
        self.ids, self.lengths = PAIRS[:count], [10] * count

    def __len__(self):
        return len(self.ids)


def make(tmp_path, rows=lambda step: range(400), **keys):
    """A threshold for 400 pairs in 40 steps of ten, with the ledger in tmp_path.  rows: the step's; by default all pairs."""
    config = Config(**{"gamma": 1.0, "audit_fraction": 0.05, "per_device_train_batch_size": 10, "num_train_epochs": 1.0,
                       "lr_scheduler_type": "constant", "seed": 0, **keys})
    schedule = Schedule(config, Pairs())
    schedule.rows = rows
    return make_threshold(config, Oracle(DatasetAnnotator(dict.fromkeys(PAIRS, 1)), tmp_path / "labels.sqlite", config),
                          schedule)


def buy(threshold, step, labelled, audit=False):
    """labelled: {pair: (margin, label)}."""
    threshold.oracle.ledger.add("dataset", [(Question(pair, margin, step, audit), label, "", None, None)
                                            for pair, (margin, label) in labelled.items()])


@pytest.mark.parametrize("keys, kind, looks_ahead", [
    ({}, FixedGamma, False), ({"gate": "calibrated"}, Calibrated, False), ({"target_queries": 3}, Budget, True),
    ({"target_query_fraction": 0.1}, Budget, True), ({"pseudo_labels": "replay"}, FixedGamma, True),
    ({"oracle": "human"}, FixedGamma, True), ({"gate": "calibrated", "pseudo_labels": "replay"}, Calibrated, True),
    ({"data_selection": False, "gate": "calibrated", "target_queries": 3, "pseudo_labels": "replay"}, FixedGamma, False)])
def test_the_config_chooses_the_threshold(keys, kind, looks_ahead, tmp_path):
    threshold = make(tmp_path, **keys)
    assert type(threshold) is kind and threshold.looks_ahead == looks_ahead


def test_a_new_threshold_is_one_class_and_one_line_of_the_table(tmp_path, monkeypatch):
    class Halving(FixedGamma):
        def advance(self, step):
            self.gamma = self.config.gamma / 2 ** step

    monkeypatch.setitem(THRESHOLDS, "halving", Halving)  # tests/test_config.py: the config then accepts its name
    threshold = make(tmp_path, gate="halving")
    threshold.advance(3)
    assert type(threshold) is Halving and threshold.gamma == 1 / 8


def test_the_papers_threshold_is_gamma_and_reads_nothing(tmp_path):
    threshold = make(tmp_path)
    threshold.oracle.ledger.close()
    threshold.advance(0)
    assert (threshold.gamma, threshold.looks_ahead, threshold.metrics(), threshold.state) == (1.0, False, {}, {})
    assert threshold.rows_to_train([3, 1], 0) == [3, 1]
    plain = make(tmp_path, data_selection=False, gate="calibrated", target_queries=3)
    assert plain.gamma == math.inf  # plain DPO asks for every pair


def test_a_calibrated_gate_asks_where_the_scaled_margin_is_small(tmp_path):
    threshold, margin = make(tmp_path, gate="calibrated"), torch.tensor([0.5, -1.0, 2.0])
    for scale, asked in ((0.5, [True, True, True]), (2.0, [True, False, False]), (0.0, [True, True, True])):
        threshold._fit = lambda scale=scale: scale
        threshold.advance(0)
        assert threshold.metrics() == {"gate_gamma": 1.0, "gate_scale": scale}
        assert adpo.gate(margin, threshold.gamma).tolist() == asked


def test_a_calibrated_gate_asks_all_until_it_knows_enough_and_then_fits(tmp_path):
    threshold = make(tmp_path, gate="calibrated")
    buy(threshold, 0, {pair: (2.0, 1 if n % 4 else -1) for n, pair in enumerate(PAIRS[:63])})
    threshold.advance(1)
    assert threshold.scale == 0.0 and threshold.gamma == math.inf  # 63 labels
    buy(threshold, 1, {PAIRS[63]: (2.0, 1)})
    threshold.advance(2)
    margins, labels = torch.full((64,), 2.0), torch.tensor([1 if n % 4 else -1 for n in range(63)] + [1])
    a, error = fit_scale(margins, labels, torch.ones(64))
    assert threshold.scale == pytest.approx(a - error) and 0.2 < threshold.scale < 0.6  # σ(2a) = 3/4 at 0.55
    assert threshold.gamma == 1.0 / threshold.scale


def test_audited_pairs_count_for_all_the_confident_ones(tmp_path):
    """Unsure pairs agree, the few audited ones do not: weighted by 20, they bring the scale down."""
    scales = []
    for n, audit in enumerate((False, True)):
        (tmp_path / str(n)).mkdir()
        threshold = make(tmp_path / str(n), gate="calibrated")
        buy(threshold, 0, {pair: (0.5, 1) for pair in PAIRS[:80]})
        buy(threshold, 0, {pair: (4.0, 1 if k % 2 else -1) for k, pair in enumerate(PAIRS[80:96])}, audit)
        threshold.advance(1)
        scales.append(threshold.scale)
    assert scales[1] < 0.3 * scales[0]


def test_the_guard_raises_gamma_where_audited_pairs_disagree_and_starts_counting_again(tmp_path, capsys):
    threshold = make(tmp_path, gate="calibrated")
    buy(threshold, 0, {pair: (3.0, 1) for pair in PAIRS[:100]})
    buy(threshold, 0, {pair: (0.1, 1) for pair in PAIRS[100:110]})
    buy(threshold, 1, {pair: (8.0, 1 if n % 3 else -1) for n, pair in enumerate(PAIRS[110:140])}, audit=True)
    threshold.advance(1)
    assert threshold.scaled_gamma == 1.0 and capsys.readouterr().out == ""
    threshold._fit = lambda: 1.0  # as if the fit could not see it
    threshold.advance(2)
    notice = capsys.readouterr().out
    assert threshold.gamma == 1.5 and "30 audited pairs 66.7% agree" in notice and "raised to 1.5" in notice
    threshold.advance(3)
    assert threshold.gamma == 1.5 and capsys.readouterr().out == ""  # the same audits do not count twice
    again = make(tmp_path, gate="calibrated")
    again.state = dict(threshold.state)  # a checkpoint keeps it
    again.advance(3)
    assert again.scaled_gamma == 1.5


def test_a_resumed_run_has_the_threshold_of_the_undisturbed_one(tmp_path):
    """Even though answers of the step that was cut short, and of other runs, are in the ledger already."""
    keys = dict(gate="calibrated", pseudo_labels="replay", rows=rows_of)
    make(tmp_path, **keys).oracle.ledger.add("reused", [(Question("p399", None, -1), 1, "", None, None)])
    threshold, trained = make(tmp_path, **keys), []
    for step in range(42):  # two steps of a second epoch
        threshold.advance(step)
        if step < 40:
            buy(threshold, step, {PAIRS[row]: (0.3 * (row % 10 - 1), 1 if row % 10 > 2 else -1)
                                  for row in rows_of(step)[:5]}, audit=step % 3 == 0)
        trained.append(threshold.rows_to_train(rows_of(step), step))
    for step in (0, 1, 11, 40, 41):
        again = make(tmp_path, **keys)
        for at in range(step, 42):
            again.advance(at)
            assert again.rows_to_train(rows_of(at), at) == trained[at]
        assert again.scale == threshold.scale > 0
        assert list(again.replay.pool) == list(threshold.replay.pool) and len(again.replay.pool) == 201


def test_a_budget_asks_the_least_sure_and_lasts_to_the_end(tmp_path):
    threshold = make(tmp_path, target_query_fraction=0.3, audit_fraction=0.0)
    generator = torch.Generator().manual_seed(0)
    assert threshold.looks_ahead
    for step in range(40):
        ids, margins = PAIRS[10 * step:10 * step + 10], torch.randn(10, generator=generator) * (1 + step)
        threshold.advance(step)
        threshold.plan(ids, margins.tolist(), step)
        asked = adpo.gate(margins, threshold.gamma)
        if asked.any() and not asked.all():
            assert margins[asked].abs().max() < margins[~asked].abs().min()
        before = threshold.gamma
        buy(threshold, step, {id: (m, 1) for id, m, ask in zip(ids, margins.tolist(), asked) if ask})
        threshold.plan(ids, margins.tolist(), step)  # again, after a kill in this step
        assert threshold.gamma == before
    assert threshold.oracle.queries() == 120


def test_a_random_budget_buys_as_many_whatever_the_margins(tmp_path):
    """And decides the same again, as after a kill; with another seed it chooses other pairs."""
    def ask(threshold, margins, ids, step):
        scores = threshold.scores(torch.tensor(margins), ids, step)
        threshold.plan(ids, scores.tolist(), step)
        return adpo.gate(scores, threshold.gamma, ids)

    def run(name, **keys):
        (tmp_path / name).mkdir()
        threshold = make(tmp_path / name, target_query_fraction=0.3, audit_fraction=0.0, budget_selection="random", **keys)
        for step in range(40):
            ids, margins = PAIRS[10 * step:10 * step + 10], [float(n) for n in range(10)]
            asked = ask(threshold, margins, ids, step)
            buy(threshold, step, {id: (m, 1) for id, m, ask in zip(ids, margins, asked) if ask})
            assert ask(threshold, margins, ids, step).equal(asked)
        return {pair: margin for pair, _, margin, *_ in threshold.oracle.ledger.labels(0, 39)}

    bought = run("one")
    assert len(bought) == 120 and sum(bought.values()) / 120 == pytest.approx(4.5, abs=0.8)  # least sure: 1.0
    assert bought == run("two") and set(bought) != set(run("three", seed=1))
    threshold = make(tmp_path, target_queries=3, budget_selection="random")
    assert ask(threshold, [0.0, 0.0], PAIRS[:2], 0).sum() == 1 and math.isnan(threshold.metrics()["gate_gamma"])
    assert adpo.gate(threshold.scores(torch.zeros(3), [*PAIRS[:2], None], 0), threshold.gamma)[:2].sum() == 1  # a filler
    with pytest.raises(FloatingPointError, match="the margin of pair p001 is nan"):
        adpo.gate(threshold.scores(torch.tensor([0.0, math.nan]), PAIRS[:2], 0), threshold.gamma, PAIRS[:2])


def test_with_audits_a_budget_holds_too(tmp_path):
    """A quarter of the confident pairs is asked as well, so fewer of the unsure ones are."""
    threshold = make(tmp_path, target_queries=200, audit_fraction=0.25)
    threshold.plan(PAIRS[:200], [0.01 * n for n in range(200)], 0)
    unsure = int(adpo.gate(torch.tensor([0.01 * n for n in range(200)]), threshold.gamma).sum())
    assert unsure == 67 and unsure + 0.25 * (200 - unsure) == pytest.approx(100, abs=1)


def test_replay_takes_labelled_pairs_in_turn(tmp_path):
    rows = [*map(rows_of, range(3)), [30, 14, 31, 32], [33]]
    threshold = make(tmp_path, pseudo_labels="replay", rows=lambda step: rows[step])
    buy(threshold, 0, {PAIRS[row]: (0.1, 1) for row in (0, 2, 4, 6, 8)})
    assert threshold.rows_to_train(rows[0], 0) == [0, 2, 4, 6, 8]  # no others have a label
    buy(threshold, 1, {PAIRS[row]: (0.1, 1) for row in range(10, 17)})
    threshold.advance(1)
    assert threshold.rows_to_train(rows[1], 1) == [*range(10, 17), 0, 2, 4]
    threshold.advance(2)
    assert threshold.rows_to_train(rows[2], 2) == [6, 8, *range(10, 17), 0]  # longest ago first; no new label
    buy(threshold, 3, {PAIRS[30]: (0.1, 1)})
    threshold.advance(3)
    assert threshold.rows_to_train(rows[3], 3) == [30, 14, 2, 4]  # 14 has a label, and is not taken twice
    assert threshold.rows_to_train(rows[4], 4) == [6]


def test_an_answer_without_a_preference_is_neither_replayed_nor_fitted(tmp_path):
    rows = [rows_of(0), rows_of(1)]
    threshold = make(tmp_path, gate="calibrated", pseudo_labels="replay", rows=lambda step: rows[step])
    buy(threshold, 0, {PAIRS[row]: (0.1, row % 2) for row in range(10)})  # the even ones have no preference
    assert threshold.rows_to_train(rows[0], 0) == [1, 3, 5, 7, 9] == threshold.rows_to_train(rows[1], 1)
    threshold.advance(2)
    assert list(threshold.recent) == 5 * [(0.1, 1, 0)]


def test_a_budget_follows_what_a_label_is_worth(tmp_path):
    """A step's share is in proportion to the learning rates of the steps that train on its labels."""
    def budget(kind, epochs=1, steps=-1, **keys):
        config = Config(**{"target_queries": 20, "lr_scheduler_type": kind, "learning_rate": 0.02, "warmup_ratio": 0.0,
                           "per_device_train_batch_size": 10, "num_train_epochs": epochs, "max_steps": steps, **keys})
        return make_threshold(config, types.SimpleNamespace(asks_together=False), Schedule(config, Pairs(95)))

    constant = budget("constant")  # ten steps an epoch, the last of five pairs
    assert [constant.unlabelled_left(step, 0) for step in (0, 3, 9)] == pytest.approx([95, 65, 5])
    assert budget("constant", epochs=2).unlabelled_left(4, 19) == pytest.approx(55 + 0.8 * 95)
    assert budget("constant", epochs=2).unlabelled_left(14, 19) == pytest.approx(0.8 * 55)
    assert budget("constant", steps=4).unlabelled_left(1, 0) == pytest.approx(30)

    def shares(threshold):
        """What each step asks of each of its pairs, with a budget of 20 labels."""
        left, asked = 20.0, []
        for step in range(10):
            asked.append(left / threshold.unlabelled_left(step, 20 - left))
            left -= asked[-1] * (10 if step < 9 else 5)
        assert left == pytest.approx(0, abs=1e-9)
        return asked

    rates = torch.arange(10, 0, -1) / 10  # of the linear schedule
    for keys, worth in (({}, rates), ({"pseudo_labels": "replay"}, rates.flip(0).cumsum(0).flip(0))):
        found = torch.tensor(shares(budget("linear", **keys)))
        torch.testing.assert_close(found / found[0], worth / worth[0])
    warm = shares(budget("linear", warmup_ratio=0.2))
    assert warm[0] < 1e-6 < warm[1] < warm[2] > warm[3]


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

@pytest.mark.parametrize("keys", [
    pytest.param({"target_query_fraction": 0.4, "pseudo_labels": "replay"}, id="budget and replay"),
    pytest.param({"target_query_fraction": 0.4, "pseudo_labels": "replay", "budget_selection": "random"},
                 id="random budget and replay"),
    pytest.param({"gate": "calibrated", "audit_fraction": 0.3, "pseudo_labels": "replay"}, id="calibrated and replay",
                 marks=pytest.mark.slow),
    pytest.param({"target_queries": 40, "audit_fraction": 0.1}, id="budget and audits", marks=pytest.mark.slow)])
def test_a_run_in_two_processes_and_a_resumed_one_are_the_whole_one(keys, train, tmp_path):
    keys = dict(keys, max_steps=12, save_strategy="steps", save_steps=5)
    whole = train("gate", **keys)
    two = train("gate-2", 2, **keys | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2})
    assert two.ledger() == whole.ledger() and two.losses() == pytest.approx(whole.losses(), rel=1e-4)
    train("gate-cut", output_dir=tmp_path / "run", oracle="dataset", **keys)
    for path in (tmp_path / "run").iterdir():  # as if killed after step 10, with all its answers
        if path.is_file() and not path.name.startswith("labels.sqlite") and path.name != "config.yaml":
            path.unlink()
    resumed = train("gate-resumed", output_dir=tmp_path / "run", **keys)
    assert "resumed from" in resumed.stdout and resumed.ledger() == whole.ledger()
    assert all(torch.equal(value, whole.weights()[name]) for name, value in resumed.weights().items())
    if share := keys.get("target_query_fraction"):
        assert whole.summary()["query_fraction"] == pytest.approx(share, rel=0.1)
        assert whole.summary()["pseudo_labels"] == 0
    assert "gate_scale" in whole.rows()[-1]
    assert (whole.rows()[-1]["gate_gamma"] is None) == ("budget_selection" in keys)  # chosen at random, not by γ


@pytest.mark.parametrize("keys, message", [
    ({"gate": "calibrated"}, "needs an audit_fraction"),
    ({"target_queries": 5, "target_query_fraction": 0.5}, "two ways to set the same budget; keep one"),
    ({"gate": "calibrated", "audit_fraction": 0.1, "target_queries": 5},
     "gate calibrated and target_queries are two ways to decide whom to ask; keep one"),
    ({"budget_selection": "random"}, "budget_selection random goes with a budget: set target_query_fraction or "),
    ({"pseudo_labels": "perhaps"}, "pseudo_labels: expected one of true, false, replay, committee, found 'perhaps'")])
def test_what_does_not_go_together_is_refused(keys, message, train):
    run = train("refused", check=2, **keys)
    assert message in run.stderr and run.stderr.count("\n") == 1
