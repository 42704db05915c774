"""benchmarks/reward_head.py against other ways to compute the same: `python -m pytest tests/test_reward_head.py`."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from benchmarks import reward_head as module
from benchmarks.reward_head import RewardHead, leave_one_out, moderated, newton, principal


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
