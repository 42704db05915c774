"""A reward head: a model of the annotator, apart from the policy, that has an opinion on pairs that were not asked.

    head = RewardHead.fit(features, labels)      ridge-regularised logistic regression on the labels bought
    head.opinions(features)                      2t − 1 for any pair, t the chance that the annotator prefers y1
    head.left_out                                the same for the labelled pairs, each as if its own label were unknown

The features φ of a pair are fixed numbers from the pass that scores the reference (`pair_features`); nothing here reads
the policy, so the policy's mistakes are not confirmed. The prior is w ~ N(0, I/λ), and Laplace's approximation gives
the posterior N(w, Σ). λ is the one under which the labels left out one at a time are predicted best.

Departures from the paper (arXiv 2402.09401) and its official code: they have no such model; an unasked pair gets sign(m).

Torch alone, fp64 on the CPU, no I/O. tests/test_head.py compares it with other ways to compute the same.
"""

import math
from functools import cache

import torch
from torch.nn.functional import logsigmoid

FEATURES = 4096  # of a pair, half of them from embeddings and half from hidden states
WIDTH = 0.5  # ℓ² of the kernel exp(−|u − v|² / 2ℓ²) of unit vectors that they approximate
COMPONENTS = 512  # principal components that are kept of them
PENALTIES = [10 ** (1 - n / 2) for n in range(9)]  # λ, from 10 to 0.001; features have a mean square norm of about 1


@cache
def random_fourier(size, seed):
    """W, (size, FEATURES / 2), and phases b, (FEATURES / 2,), fp32 on the CPU: the same in every process.

    Each column of W is drawn from N(0, I/ℓ²); within a block of `size` columns they are orthogonal, which makes the
    approximation better (Yu et al. 2016, Orthogonal random features).
    """
    generator, blocks = torch.Generator().manual_seed(seed), []
    for _ in range(0, FEATURES // 2, size):
        directions = torch.linalg.qr(torch.randn(size, size, generator=generator)).Q
        blocks.append(directions * torch.randn(size, size, generator=generator).norm(dim=0) / WIDTH ** 0.5)
    phases = 2 * torch.pi * torch.rand(FEATURES // 2, generator=generator)
    return torch.cat(blocks, 1)[:, :FEATURES // 2], phases


def pair_features(batch, hidden, embeddings):
    """φ(y1) − φ(y2) of each pair, (B, FEATURES) fp32: for adpo.PairLogps, which calls this in its forward pass.

    φ(y) = n^(−1/2) Σ_t [cos(W ê_t + b), ½ cos(W' ĥ_t + b')] over the n tokens of y: random Fourier features (Rahimi and
    Recht 2007) of the tokens' input embeddings ê and last hidden states ĥ, both of length 1. The product of two such φ is
    about the mean of a Gaussian kernel over all pairs of tokens, so tokens that the model treats alike count alike.

    batch: a PairBatch.  hidden: (B·T, H), or (2B·T, H) in two rows a pair.  embeddings: the model's module of them.
    """
    own = (batch.segments > 0).flatten().nonzero().squeeze(-1)  # (N,) where the response tokens stand, as in targets
    parts = []
    for n, states in enumerate((embeddings(batch.targets), hidden[own])):  # (N, H)
        weights, phases = random_fourier(states.shape[1], n)
        unit = torch.nn.functional.normalize(states.float(), dim=-1)
        waves = torch.cos(unit @ weights.to(unit.device) + phases.to(unit.device)) / (1 + n)  # (N, FEATURES / 2)
        sums = torch.segment_reduce(waves, "sum", lengths=batch.lengths, axis=0, initial=0.0, unsafe=True)  # (2B, …)
        parts.append((sums / batch.lengths[:, None].sqrt()).unflatten(0, (-1, 2)))
    first, second = torch.cat(parts, -1).unbind(1)  # (B, 2, FEATURES)
    return first - second


def moderated(m, v):
    """m / √(1 + πv/8): its σ is about E σ(z) for z ~ N(m, v) (MacKay 1992, The evidence framework applied to classification
    networks, eq. 5).  m, v: (n,)."""
    return m / (1 + math.pi * v / 8).sqrt()


def principal(features, size):
    """The first `size` principal components of the features, scaled to a mean square norm of 1: (n, size) fp32.

    They need no label: they are what the pairs differ in most. A randomised subspace iteration (Halko et al. 2011,
    arXiv 0909.4061, algorithm 4.4), with a fixed seed.  features: (n, d) fp32.
    """
    size = min(size, *features.shape)
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(features.shape[1], min(size + 50, features.shape[1]), generator=generator)
    for _ in range(2):
        basis = torch.linalg.qr(features.T @ (features @ basis)).Q  # (d, size + 50)
    projected = (features @ basis).double()
    directions = torch.linalg.eigh(projected.T @ projected).eigenvectors.flip(1)[:, :size]
    found = projected @ directions
    return (found / found.square().sum(1).mean().sqrt().clamp_min(1e-12)).float()


def newton(features, labels, penalty, w, steps=30):
    """The maximum of Σ log σ(o wᵀφ) − λ/2 |w|² by Newton's method, from w.

    features: (n, d) fp64.  labels: (n,) fp64, ±1.  Returns (w (d,), Cholesky factor of ΦᵀQΦ + λI (d, d), q (n,)), where
    Q = diag(q), q = p(1 − p), and Σ is the inverse of that matrix.
    """
    for _ in range(steps):
        p = torch.sigmoid(features @ w)  # (n,)
        q = p * (1 - p)
        gradient = features.T @ (p - (1 + labels) / 2) + penalty * w  # (d,)
        curvature = features.T @ (features * q[:, None])  # (d, d)  ΦᵀQΦ
        curvature.diagonal().add_(penalty)
        factor = torch.linalg.cholesky(curvature)
        step = torch.cholesky_solve(gradient[:, None], factor).squeeze(1)
        w = w - step
        if gradient @ step < 1e-8 * len(labels):  # the objective is about half of this from its optimum
            break
    return w, factor, q


def variances(features, factor):
    """v = φᵀΣφ: (n,)."""
    return torch.linalg.solve_triangular(factor, features.T, upper=False).square().sum(0)


def leave_one_out(features, labels, w, factor, q):
    """Moderated margin of each labelled pair as if the head had been fitted without it: (n,).

    Approximate leave-one-out: one Newton step and a rank-one change of Σ (Rad and Maleki 2020, arXiv 1801.10243, eq. 7).
    """
    v = variances(features, factor)  # leverage without its factor q
    m = features @ w
    left = 1 - v * q
    return moderated(m + v * (torch.sigmoid(m) - (1 + labels) / 2) / left, v / left)


class RewardHead:
    """P(the annotator prefers y1) = σ(wᵀφ), with a posterior over w.

    w: (d,).  factor: (d, d), Cholesky factor of Σ⁻¹.  penalty: λ.
    left_out: (n,) fp64, 2t − 1 for the pairs of the fit, each without its own label.  losses: (n,) their log-losses, nats.
    trust: how right the head is, from 0 for a coin to 1: 2a − 1, with a the share of left-out labels on its side.
    """

    def __init__(self, w, factor, penalty, left_out, losses, trust):
        self.w, self.factor, self.penalty = w, factor, penalty
        self.left_out, self.losses, self.trust = left_out, losses, trust

    @classmethod
    def fit(cls, features, labels):
        """Fit w, Σ and λ.  features: (n, d), φ(y1) − φ(y2).  labels: (n,), ±1.

        λ is the one of PENALTIES under which the left-out labels are predicted best; each fit starts from the last. Raises
        ValueError where there is nothing to fit to.
        """
        if not len(labels):
            raise ValueError("a reward head needs at least one label")
        features, labels = features.double(), labels.double()
        w, best = torch.zeros(features.shape[1], dtype=torch.float64), None
        for penalty in PENALTIES:
            w, factor, q = newton(features, labels, penalty, w)
            margin = leave_one_out(features, labels, w, factor, q)
            losses = -logsigmoid(labels * margin)
            if best and losses.mean() >= best.losses.mean():
                continue
            right = (labels * margin > 0).double() + 0.5 * (margin == 0)
            best = cls(w, factor, penalty, 2 * torch.sigmoid(margin) - 1, losses, max(0.0, 2 * right.mean().item() - 1))
        return best

    def opinions(self, features):
        """2t − 1 for pairs that were not part of the fit, t = σ(wᵀφ / √(1 + πv/8)) and v = φᵀΣφ.  features: (n, d).
        Returns (n,) fp64."""
        features = features.double()
        return 2 * torch.sigmoid(moderated(features @ self.w, variances(features, self.factor))) - 1
