"""labels/head.py against other ways to compute the same, the features that it reads, and runs that use it:
`python -m pytest tests/test_head.py`."""

import json
import math
import subprocess
import types

import pytest
import torch
from helpers import ROOT, assert_same_run, launcher, launcher_environment, prepared_train
from torch.nn.functional import logsigmoid, softplus

from labels import head as module
from labels import threshold as whom
from labels.annotators import DatasetAnnotator
from labels.head import RewardHead, leave_one_out, moderated, newton, principal
from labels.ledger import Question
from labels.oracle import Oracle
from labels.threshold import make_threshold
from runtime.config import Config
from runtime.schedule import Schedule

# ----------------------------------------------------------------------------------------------------------------------
# The head


def made(n, d, strength=2.0, seed=0):
    """(features (n, d) of a mean square norm of about 1, labels by the Bradley-Terry model, the true margins)."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, d, generator=generator, dtype=torch.float64) / d ** 0.5
    margin = features @ (strength * torch.randn(d, generator=generator, dtype=torch.float64))
    labels = torch.where(torch.rand(n, generator=generator) < torch.sigmoid(margin), 1.0, -1.0).double()
    return features, labels, margin


def objective(w, features, labels, penalty):
    return softplus(-labels * (features @ w)).sum() + penalty / 2 * w @ w


def test_the_fit_is_the_maximum_and_its_covariance_the_inverse_curvature():
    """Against L-BFGS and automatic differentiation."""
    features, labels, _ = made(300, 7)
    head = RewardHead.fit(features, labels)
    w = torch.zeros(7, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([w], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        search.zero_grad()
        loss = objective(w, features, labels, head.penalty)
        loss.backward()
        return loss

    search.step(closure)
    torch.testing.assert_close(head.w, w.detach(), rtol=1e-4, atol=1e-5)
    curvature = torch.autograd.functional.hessian(lambda w: objective(w, features, labels, head.penalty), w.detach())
    torch.testing.assert_close(head.factor @ head.factor.T, curvature, rtol=1e-3, atol=1e-4)
    new = made(5, 7, seed=1)[0]
    v = (new @ torch.linalg.inv(curvature) * new).sum(1)
    t = torch.sigmoid(new @ w.detach() / (1 + math.pi * v / 8).sqrt())
    torch.testing.assert_close(head.opinions(new), 2 * t - 1, rtol=1e-3, atol=1e-4)


def test_left_out_margins_are_those_of_fits_without_each_pair():
    features, labels, _ = made(60, 4)
    for penalty in (1.0, 0.03):
        fitted = newton(features, labels, penalty, torch.zeros(4, dtype=torch.float64))
        found, exact = leave_one_out(features, labels, *fitted), []
        for n in range(60):
            rest = torch.arange(60) != n
            w, factor, _ = newton(features[rest], labels[rest], penalty, torch.zeros(4, dtype=torch.float64))
            v = torch.cholesky_solve(features[n][:, None], factor).squeeze(1) @ features[n]
            exact.append(moderated(features[n] @ w, v))
        exact, with_own = torch.stack(exact), moderated(features @ fitted[0], module.variances(features, fitted[1]))
        assert (found - exact).abs().mean() < 0.1 * (with_own - exact).abs().mean()  # nearly all of the label's own part
        assert (found - exact).abs().max() < 0.15


def test_the_moderated_margin_is_the_mean_over_the_posterior():
    generator = torch.Generator().manual_seed(0)
    for m, v in ((0.5, 0.3), (-2.0, 1.0), (1.0, 4.0)):
        mean = torch.sigmoid(m + v ** 0.5 * torch.randn(200_000, generator=generator)).mean()
        assert torch.sigmoid(moderated(torch.tensor(m), torch.tensor(v))).item() == pytest.approx(mean.item(), abs=0.01)


def test_the_penalty_follows_what_the_features_are_worth():
    features, labels, margin = made(2000, 20, strength=4.0)
    good, noise = RewardHead.fit(features, labels), RewardHead.fit(features, labels[torch.randperm(2000)])
    assert good.penalty < noise.penalty == max(module.PENALTIES)
    new, _, true = made(2000, 20, strength=4.0)  # the same reward
    assert ((good.opinions(new) > 0) == (true > 0)).double().mean() > 0.9
    assert noise.opinions(new).abs().max() < 0.4 and noise.trust < 0.1 < good.trust
    assert good.losses.mean() < math.log(2) - 0.05 and noise.losses.mean() > math.log(2) - 0.005
    left_out = -logsigmoid(labels * 2 * torch.atanh(good.left_out))  # σ(m) = (1 + o) / 2
    torch.testing.assert_close(good.losses, left_out)


def test_a_head_does_not_depend_on_which_response_comes_first():
    features, labels, _ = made(200, 5)
    flips = torch.where(torch.arange(200) % 3 == 0, -1.0, 1.0).double()
    one, other = RewardHead.fit(features, labels), RewardHead.fit(features * flips[:, None], labels * flips)
    torch.testing.assert_close(one.w, other.w)
    torch.testing.assert_close(one.left_out * flips, other.left_out)


def test_nothing_to_fit_to_is_an_error():
    with pytest.raises(ValueError, match="at least one label"):
        RewardHead.fit(torch.zeros(0, 3), torch.zeros(0))


def test_principal_components_against_the_singular_value_decomposition():
    generator = torch.Generator().manual_seed(0)
    spectrum = 0.7 ** torch.arange(40.0)
    features = torch.randn(500, 40, generator=generator) * spectrum @ torch.linalg.qr(torch.randn(40, 40)).Q
    found = principal(features, 5)
    left, values, _ = torch.linalg.svd(features, full_matrices=False)
    exact = left[:, :5] * values[:5]
    exact = exact / exact.square().sum(1).mean().sqrt()
    torch.testing.assert_close(found @ found.T, exact @ exact.T, rtol=1e-2, atol=1e-3)
    assert found.equal(principal(features, 5)) and principal(features[:3], 5).shape == (3, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Its use in a run: 640 pairs, ten a step, of which the annotator answers five

class Pairs:
    """What a schedule and the opinions read of data.Pairs."""

    def __init__(self, features):
        self.ids, self.lengths, self.features = [f"p{n:03}" for n in range(len(features))], [10] * len(features), features

    def __len__(self):
        return len(self.ids)


def make(folder, features):
    """A threshold with a reward head, with its ledger in `folder`."""
    config = Config(per_device_train_batch_size=10, num_train_epochs=1.0, lr_scheduler_type="constant", seed=0,
                    target_query_fraction=0.5, budget_selection="random", pseudo_labels="head")
    folder.mkdir(exist_ok=True)
    schedule = Schedule(config, Pairs(features))
    schedule.rows = lambda step: list(range(10 * step, 10 * step + 10))
    return make_threshold(config, Oracle(DatasetAnnotator({}), folder / "labels.sqlite", config), schedule)


def steps(threshold, labels, margins, last, first=0):
    """Go through steps. Returns {step: (state, rows to train on, soft labels of the step's own pairs)}."""
    found = {}
    for step in range(first, last):
        threshold.advance(step)
        rows = list(range(10 * step, 10 * step + 10))
        threshold.oracle.ledger.add("dataset", [
            (Question(f"p{row:03}", margins[row].item(), step, False), int(labels[row]), "", None, None)
            for row in rows[:5]])
        answers = torch.cat([labels[rows[:5]], torch.zeros(5)]).float()
        found[step] = (threshold.state, threshold.rows_to_train(rows, step), threshold.soften(answers, rows).tolist())
    return found


def test_a_head_that_is_good_is_used_and_a_resumed_run_uses_the_same(tmp_path, capsys):
    features, labels, _ = made(640, 6, strength=5.0)
    margins = torch.zeros(640)  # a policy that knows nothing
    threshold = make(tmp_path / "run", features.float())
    found = steps(threshold, labels, margins, 64)
    used = [step for step in found if found[step][0]["head_used"]]
    assert used == list(range(used[0], 64)) and 12 < used[0] < 20  # 64 labels are needed
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and f"step {used[0]:,}: the reward head predicts the last" in said
    state, rows, soft = found[63]
    assert rows == list(range(630, 640)) and all(0 < abs(o) < 1 for o in soft) and state == threshold.state
    assert (torch.tensor(soft).sign() == labels[630:]).float().mean() > 0.6
    _, rows, answers = found[used[0] - 1]  # before: labelled pairs alone
    assert {row % 10 for row in rows} == set(range(5)) and answers == [*labels[10 * used[0] - 10:][:5].tolist(), *[0] * 5]
    for step in (used[0] - 1, used[0], used[0] + 1, 40):  # the ledger holds answers of steps that are yet to come
        again = make(tmp_path / "run", features.float())
        again.state = dict(found[step - 1][0])
        assert steps(again, labels, margins, 64, first=step) == {at: found[at] for at in range(step, 64)}


def test_a_head_on_noise_is_never_used(tmp_path, capsys):
    features, labels, margin = made(640, 6, strength=5.0)
    noise = torch.randn(640, 6, generator=torch.Generator().manual_seed(9))
    for n, margins in enumerate((torch.zeros(640), margin)):  # whether or not the policy knows something
        found = steps(make(tmp_path / str(n), noise), labels, margins, 64)
        assert not any(state["head_used"] for state, *_ in found.values()) and found[63][0]["head_labels"] > 250
        assert all(row % 10 < 5 for _, rows, _ in found.values() for row in rows)
    assert capsys.readouterr().out == ""


def test_a_head_in_use_is_dropped_where_the_policy_is_clearly_better(tmp_path, capsys):
    """And a policy that is a little better, as a good pupil is, does not drop it."""
    features, labels, margin = made(640, 6, strength=3.0)
    learned = torch.arange(640) > 200  # from here on the policy knows something
    pupil = 1.1 * margin * learned
    assert steps(make(tmp_path / "pupil", features.float()), labels, pupil, 64)[63][0]["head_used"]
    capsys.readouterr()
    knows = 4.0 * labels * learned  # sure and right
    state = steps(make(tmp_path / "sure", features.float()), labels, knows, 64)[63][0]
    said = capsys.readouterr().out
    assert not state["head_used"] and state["policy_loss"] < state["head_loss"] and "back to labelled pairs alone" in said


@pytest.mark.parametrize("ours, policy, used, expected", [
    (0.685, 0.693, False, False),  # not clearly better than a coin: one standard error
    (0.64, 0.693, False, True), (0.64, 0.6, False, False),
    (0.64, 0.63, True, True),  # a pupil may be a little better
    (0.64, 0.55, True, False), (0.685, 0.693, True, False)])
def test_the_guard_by_hand(ours, policy, used, expected, tmp_path, monkeypatch):
    """200 labels; the standard error of the head's mean log-loss is 0.0078, and the policy's has none."""
    opinions = make(tmp_path / "run", torch.zeros(640, 2)).opinions
    spread = 0.11 * torch.where(torch.arange(200) % 2 == 0, 1.0, -1.0)
    head = types.SimpleNamespace(losses=ours + spread.double())
    monkeypatch.setattr(whom, "fit_scale", lambda margin, label, weights: (1.0, 0.0))
    margin = -math.log(math.expm1(policy))  # −log σ(margin) = policy
    state = opinions._guard(head, [(0, 1, margin)] * 200, used, 9)
    assert state["head_used"] == expected and state["head_labels"] == 200
    assert state["head_loss"] == pytest.approx(ours) and state["policy_loss"] == pytest.approx(policy)


def test_soft_labels_by_hand(tmp_path):
    threshold = make(tmp_path / "run", torch.zeros(640, 2))
    labels = torch.tensor([1.0, -1.0, 0.0, math.nan, 0.0])
    assert threshold.soften(labels, [0, 1, 2, 3, 4]) is labels  # not in use
    threshold.state["head_used"] = True
    threshold.opinions.opinion, threshold.opinions.trust = torch.tensor([0.5, 0.5, -0.4, 0.8, 0.0]), 0.25
    soft = threshold.soften(labels, [0, 1, 2, 3, 4])
    torch.testing.assert_close(soft, torch.tensor([0.875, -0.625, -0.4, 0.2, math.nan]), equal_nan=True)
    assert threshold.soften(torch.zeros(1), []).isnan().all()  # a filler


# ----------------------------------------------------------------------------------------------------------------------
# Whole runs

KEYS = dict(target_query_fraction=0.8, budget_selection="random", pseudo_labels="head", max_steps=12)
# A head after 8 labels, come what may.
EARLY = "import labels.threshold as whom\nwhom.FEWEST, whom.clearly = 8, lambda gains, errors: True\n"


def test_a_resumed_run_is_the_whole_one(train, tmp_path, monkeypatch):
    monkeypatch.setattr(whom, "FEWEST", 8)
    monkeypatch.setattr(whom, "clearly", lambda gains, errors: True)
    keys = KEYS | {"save_strategy": "steps", "save_steps": 5}
    whole = train("head", **keys)
    assert whole.rows()[-1]["head_used"] and whole.rows()[-1]["head_labels"] > 50 and whole.summary()["pseudo_labels"] > 0
    assert whole.summary()["query_fraction"] == pytest.approx(0.8, abs=0.08)
    train("head-cut", output_dir=tmp_path / "run", **keys)
    for path in (tmp_path / "run").iterdir():  # as if killed after step 10, with all its answers
        if path.is_file() and not path.name.startswith("labels.sqlite") and path.name != "config.yaml":
            path.unlink()
    resumed = train("head-resumed", output_dir=tmp_path / "run", **keys)
    assert "resumed from" in resumed.stdout and resumed.ledger() == whole.ledger()
    assert all(torch.equal(value, whole.weights()[name]) for name, value in resumed.weights().items())


def test_the_features_are_cached_and_give_the_same_run(train, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr(whom, "FEWEST", 8)
    monkeypatch.setattr(whom, "clearly", lambda gains, errors: True)
    first = train("first", **KEYS)
    assert len(list((tmp_path / "adpo").glob("reference-*"))) == 2
    assert_same_run(train("again", **KEYS), first)
    train("replay", **KEYS | {"pseudo_labels": "replay"})  # needs no features: a file of its own
    assert len(list((tmp_path / "adpo").glob("reference-*"))) == 3


def test_two_ranks_agree_with_one(train, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(whom, "FEWEST", 8)
    monkeypatch.setattr(whom, "clearly", lambda gains, errors: True)
    one = train("one", **KEYS)
    config = tmp_path / "two.json"
    config.write_text(json.dumps(KEYS | dict(
        model_name_or_path=f"{tiny}/model", dataset_mixer={f"{tiny}/pairs": 1.0}, output_dir=f"{tmp_path}/two", gamma=0.2,
        learning_rate=2e-3, warmup_ratio=0, per_device_train_batch_size=4, max_prompt_length=16, max_length=64,
        logging_steps=1, save_strategy="no", num_threads=1)))
    started = [*launcher(2)[:-1], prepared_train(tmp_path / "early.py", EARLY), "--config", str(config)]
    done = subprocess.run(started, cwd=ROOT, text=True, capture_output=True, timeout=600, env=launcher_environment())
    assert done.returncode == 0, done.stderr[-3000:]
    two = type(one)(tmp_path / "two", done.stdout, done.stderr, 0)
    assert two.ledger() == one.ledger() and two.losses() == pytest.approx(one.losses(), rel=1e-4)
    assert two.rows()[-1]["head_used"]


def test_under_zero_3_the_run_is_the_same(train, engine_configs, monkeypatch):
    """The features read embeddings that are spread over the ranks."""
    monkeypatch.setattr(whom, "FEWEST", 8)
    monkeypatch.setattr(whom, "clearly", lambda gains, errors: True)
    one, spread = (train(f"stage-{stage}", deepspeed=engine_configs[stage], **KEYS) for stage in (0, 3))
    assert spread.ledger() == one.ledger() and spread.losses() == pytest.approx(one.losses(), rel=1e-4)
    assert spread.rows()[-1]["head_used"]


@pytest.mark.parametrize("keys, message", [
    ({}, "pseudo_labels head needs labels of random pairs"), ({"target_queries": 9}, "and budget_selection: random"),
    ({"target_queries": 9, "budget_selection": "random", "loss_type": "hinge"},
     "pseudo_labels head is defined for loss_type sigmoid, not hinge")])
def test_what_does_not_go_with_a_head_is_refused(keys, message, train):
    run = train("refused", check=2, pseudo_labels="head", **keys)
    assert message in run.stderr and run.stderr.count("\n") == 1
