"""Which features of a pair should a reward head read? The head alone as a classifier, before any training.

    python benchmarks/head_features.py TOY_DIR MOVIES_DIR     ten minutes on one thread

TOY_DIR and MOVIES_DIR are folders of runtime/toy.py and benchmarks/movies.py, of seeds that no other benchmark reports; they
are built where they are missing. Of the movie task only the pairs of the first half of the training prompts are used. A
quarter of the pairs is held out. reward_head.py is fitted to 4,096 labels of the others, drawn at random, and scored on the
held-out pairs by their true labels. Writes benchmarks/results/head_features.md.
"""

import argparse
import sys
from functools import cache
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.functional import normalize

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data  # noqa: E402
from benchmarks import movies  # noqa: E402
from benchmarks.reward_head import RewardHead, principal, variances  # noqa: E402
from runtime import toy  # noqa: E402
from runtime.config import Config  # noqa: E402
from runtime.model import load_policy, load_tokenizer  # noqa: E402

SEED, BOUGHT, NOISES = 200, 4096, (0.05, 0.2, 0.35)
HASHED = 512  # numbers of a gradient sketch
FEATURES = 4096  # Fourier features, half of them of embeddings and half of hidden states
WIDTH = 0.5  # ℓ² of the kernel exp(−|u − v|² / 2ℓ²) of unit vectors that they approximate
RESULTS = ROOT / "benchmarks" / "results" / "head_features.md"
# name: (blocks with their weights, components that are kept)
SETS = {
    "last hidden states, mean": ({"mean": 1.0}, 512),
    "last hidden states, sum": ({"sum": 1.0}, 512),
    "last token's hidden state": ({"last": 1.0}, 512),
    "input embeddings, sum": ({"embeddings": 1.0}, 512),
    "gradient of the logits, hashed": ({"gradient": 1.0}, 512),
    "gradient of the last layer, sketched": ({"layer": 1.0}, 512),
    "mean state + last state + gradient of the logits": ({"mean": 1.0, "last": 1.0, "gradient": 1.0}, 512),
    "Fourier features of the embeddings": ({"fourier-embeddings": 1.0}, 512),
    "Fourier features of the hidden states": ({"fourier-states": 1.0}, 512),
    "**both, states with half the weight** (best on both)": ({"fourier-embeddings": 1.0, "fourier-states": 0.5}, 512),
    "both, 256 components": ({"fourier-embeddings": 1.0, "fourier-states": 0.5}, 256),
    "both, 1,024 components": ({"fourier-embeddings": 1.0, "fourier-states": 0.5}, 1024),
    "*token counts, for comparison*": ({"counts": 1.0}, 1024),
}
ABOUT = f"""\
Accuracy and, after the slash, log-loss in nats on held-out pairs, by their true labels; {BOUGHT:,} labels unless "all" is
said. Features of a pair are those of y1 minus those of y2; a block is scaled to a mean square norm of 1, times its weight,
and of all blocks together the stated number of principal components is kept. The head is `benchmarks/reward_head.py`.
Token counts are the reward's own form on the built-in task, so that row is a bound there, not a candidate."""


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


def fourier(states, lengths, seed):
    """φ(y) = n^(−1/2) Σ_t cos(W û_t + b) over the n tokens of a response, û_t their states of length 1: random Fourier
    features (Rahimi and Recht 2007). The product of two is about the mean of a Gaussian kernel over all pairs of tokens.

    states: (N, H).  lengths: (2B,).  Returns (2B, FEATURES / 2)."""
    weights, phases = random_fourier(states.shape[1], seed)
    waves = torch.cos(normalize(states.float(), dim=-1) @ weights + phases)  # (N, FEATURES / 2)
    return torch.segment_reduce(waves, "sum", lengths=lengths, axis=0) / lengths[:, None].sqrt()


@torch.no_grad()
def blocks_of(policy, pairs, rows):
    """{block: (rows, d) fp32}, the difference of both responses."""
    lm, found = policy.lm, {}
    V, H = lm.get_output_embeddings().weight.shape
    generator = torch.Generator().manual_seed(0)
    bucket, sign = torch.randint(HASHED, (V,), generator=generator), torch.randint(2, (V,), generator=generator) * 2.0 - 1
    left, right = torch.randn(V, HASHED, generator=generator), torch.randn(H, HASHED, generator=generator) / H ** 0.5
    def total(x, batch, how="sum"):
        return torch.segment_reduce(x, how, lengths=batch.lengths, axis=0)  # (N, d) -> (2B, d)

    for start in range(0, len(rows), 64):
        batch = pairs.batch(rows[start:start + 64], torch.device("cpu"))
        hidden, N = lm.base_model(
            input_ids=batch.input_ids, attention_mask=policy._mask(batch), position_ids=batch.positions,
            use_cache=False).last_hidden_state.flatten(0, 1), len(batch.targets)
        states, own = hidden[batch.sources], hidden[(batch.segments > 0).flatten()]  # (N, H): before, and at, each token
        surprise = -lm.get_output_embeddings()(states).softmax(-1)  # (N, V)  onehot(y_t) − π, the gradient of the logits
        surprise[torch.arange(N), batch.targets] += 1
        hashed = torch.zeros(N, HASHED).index_add_(1, bucket, surprise * sign)
        of_response = torch.repeat_interleave(torch.arange(len(batch.lengths)), batch.lengths)
        counts = torch.zeros(len(batch.lengths), V).index_put_((of_response, batch.targets), torch.ones(N), accumulate=True)

        responses = {"sum": total(own, batch), "mean": total(own, batch, "mean"), "last": own[batch.lengths.cumsum(0) - 1],
                     "embeddings": total(normalize(lm.get_input_embeddings()(batch.targets), dim=-1), batch),
                     "gradient": total(hashed, batch), "layer": total((surprise @ left) * (states @ right), batch),
                     "counts": counts}
        responses |= {"fourier-embeddings": fourier(lm.get_input_embeddings()(batch.targets), batch.lengths, 0),
                      "fourier-states": fourier(own, batch.lengths, 1)}
        differences = {name: x[0::2] - x[1::2] for name, x in responses.items()}
        for name, x in differences.items():
            found.setdefault(name, []).append(x)
    return {name: torch.cat(parts) for name, parts in found.items()}


def scaled(x):
    return x / x.square().sum(1).mean().sqrt()


class Task:
    """A task's blocks, true labels and labels at each noise, with the rows for fitting and those held out."""

    def __init__(self, model_dir, pairs_dir, gaps, half):
        config = Config(model_name_or_path=str(model_dir), dataset_mixer={str(pairs_dir): 1.0}, max_length=96,
                        max_prompt_length=32, preprocessing_num_workers=1)
        tokenizer = load_tokenizer(config)
        pairs, _, truths = data.load_split(config, tokenizer, "train", None)
        prompts = dict.fromkeys(pairs.texts["prompt"][:])
        used = set(list(prompts)[:len(prompts) // 2 if half else None])
        rows = [row for row, prompt in enumerate(pairs.texts["prompt"][:]) if prompt in used]
        rows = sorted(rows, key=lambda row: pairs.lengths[row])  # little padding
        self.blocks = blocks_of(load_policy(config).eval(), pairs, rows)
        self.truth = torch.tensor([float(truths[pairs.ids[row]]) for row in rows])
        lines = [int(pairs.texts[row]["place"].rsplit(" ", 1)[1]) - 1 for row in rows]  # "FILE, row N"
        written = toy.read_jsonl(pairs_dir / "train.jsonl")
        self.labels = {}
        for noise in NOISES:
            labelled = toy.label_rows(written, gaps(written), noise, SEED)
            right = torch.tensor([labelled[n]["label"] == labelled[n]["truth"] for n in lines])
            self.labels[noise] = torch.where(right, self.truth, -self.truth)
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
        self.held_out, self.pool = order[:len(order) // 4], order[len(order) // 4:]

    def features(self, blocks, components):
        parts = [weight * scaled(self.blocks[name]) for name, weight in blocks.items()]
        return principal(torch.cat(parts, 1), components)

    def score(self, features, noise, rows):
        """(head, "accuracy / log-loss") of a head that is fitted to the labels of these rows."""
        head = RewardHead.fit(features[rows], self.labels[noise][rows])
        opinion, truth = head.opinions(features[self.held_out]), self.truth[self.held_out]
        loss = -((1 + truth * opinion) / 2).clamp_min(1e-12).log().mean()
        return head, f"{(truth * opinion > 0).double().mean():.4f} / {loss:.3f}"

    def rounds(self, features, noise, choose, count=9):
        """The score after `count` rounds. The first buys random pairs, each later one those that `choose` scores highest."""
        size = BOUGHT // count
        bought, left = self.pool[:BOUGHT - size * (count - 1)], self.pool[BOUGHT - size * (count - 1):]
        for n in range(count - 1):
            head = RewardHead.fit(features[bought], self.labels[noise][bought])
            left = left[torch.randperm(len(left), generator=torch.Generator().manual_seed(n))]
            order = choose(head, features[left]).argsort(descending=True)
            bought, left = torch.cat([bought, left[order[:size]]]), left[order[size:]]
        return self.score(features, noise, bought)[1]


def information(head, features):
    """BALD (Houlsby et al. 2011, arXiv 1112.5745): mutual information of a pair's label and w, in nats, (n,)."""
    features = features.double()
    v = variances(features, head.factor)
    z = torch.linspace(-4, 4, 41, dtype=torch.float64)
    weight = torch.exp(-z * z / 2) / torch.exp(-z * z / 2).sum()
    m = (features @ head.w)[:, None] + v.sqrt()[:, None] * z  # (n, 41)

    def entropy(p):
        return -(p * p.clamp_min(1e-12).log() + (1 - p) * (1 - p).clamp_min(1e-12).log())
    p = torch.sigmoid(m)
    return entropy(p @ weight) - entropy(p) @ weight


CHOICES = {"random": lambda head, features: torch.zeros(len(features)),
           "least sure": lambda head, features: -head.opinions(features).abs(), "BALD": information}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("toy", type=Path, metavar="TOY_DIR")
    parser.add_argument("movies", type=Path, metavar="MOVIES_DIR")
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    head = "| features | " + " | ".join([*(f"{noise:.0%} wrong" for noise in NOISES), "20% wrong, all labels"]) + " |"
    lines = ["# Features for a reward head", "", "Made by `python benchmarks/head_features.py TOY_DIR MOVIES_DIR`.", "",
             ABOUT]
    for name, built, gaps in (("Built-in task", toy.build(args.toy, 0.2, seed=SEED), toy.reward_gaps),
                              ("Movie task", movies.build(args.movies, 0.2), movies.Reward(args.movies).gaps)):
        task = Task(*built, gaps, half=name == "Movie task")
        bought = task.pool[:BOUGHT]
        lines += ["", f"## {name}: {len(task.pool):,} pairs to ask about, {len(task.held_out):,} held out", "", head,
                  "| --- |" + " --: |" * 4]
        for title, (blocks, components) in SETS.items():
            features = task.features(blocks, components)
            cells = [task.score(features, noise, bought)[1] for noise in NOISES] + [task.score(features, 0.2, task.pool)[1]]
            lines.append(f"| {title} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
        features = task.features(*SETS["**both, states with half the weight** (best on both)"])
        lines += ["", f"The same {BOUGHT:,} labels bought in nine rounds, with the features in bold:", "",
                  "| chosen | " + " | ".join(f"{noise:.0%} wrong" for noise in NOISES) + " |", "| --- |" + " --: |" * 3]
        for title, choose in CHOICES.items():
            lines.append(f"| {title} | " + " | ".join(task.rounds(features, noise, choose) for noise in NOISES) + " |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
