"""data.py, from pairs to batches: which pairs a step takes, which rank takes them, and what a batch holds.

    python -m pytest tests/test_batches.py
"""

import random

import datasets
import pytest
import torch

import data
from data import Pairs, collate, epoch_order, split_batch

# ----------------------------------------------------------------------------------------------------------------------
# Order

def test_epoch_order():
    lengths = [random.Random(i).randint(1, 500) for i in range(97)]
    orders = {(epoch, seed): epoch_order(lengths, epoch, seed) for epoch in range(3) for seed in (1, 2)}
    assert all(sorted(order) == list(range(97)) for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) == 6 and orders[2, 1] == epoch_order(lengths, 2, 1)
    assert epoch_order([5], 0, 0) == [0]


def test_epoch_order_by_length(monkeypatch):
    """Each pair comes once. A window's steps hold pairs of similar length, in random order; the small last step is a random
    draw."""
    monkeypatch.setattr(data, "LENGTH_WINDOW", 40)
    lengths = [random.Random(i).randint(1, 500) for i in range(97)]
    order = epoch_order(lengths, 1, 3, 8, group_by_length=True)
    assert sorted(order) == list(range(97)) and order == epoch_order(lengths, 1, 3, 8, group_by_length=True)
    assert order != epoch_order(lengths, 2, 3, 8, group_by_length=True)
    plain = epoch_order(lengths, 1, 3)
    assert order[96:] == plain[96:]
    shuffled = False
    for start in (0, 40, 80):
        window = order[start:min(start + 40, 96)]
        assert sorted(window) == sorted(plain[start:min(start + 40, 96)])  # windows of the same permutation
        steps = [[lengths[i] for i in window[s:s + 8]] for s in range(0, len(window), 8)]
        ordered = sorted(steps)
        assert all(max(a) <= min(b) for a, b in zip(ordered, ordered[1:]))
        shuffled |= steps != ordered
    assert shuffled
    assert sorted(epoch_order(lengths, 0, 0, 64, group_by_length=True)) == list(range(97))  # a step larger than the window
    assert sorted(epoch_order(lengths[:5], 0, 0, 8, group_by_length=True)) == list(range(5))  # a step larger than the data


@pytest.mark.parametrize("count", (0, 1, 3, 7, 8, 64))
def test_split_batch(count):
    """For any grid: every pair comes once, no rank gets too many pairs or tokens, ranks have equally many micro-steps."""
    draw = random.Random(count)
    lengths = [draw.randint(1, 50) for _ in range(200)]
    rows = draw.sample(range(200), count)
    for ranks, most_pairs, most_tokens in ((1, 64, 10**6), (1, 8, 100), (8, 1, 100), (2, 4, 10**6), (3, 5, 60), (2, 8, 10)):
        grid = split_batch(rows, lengths, ranks, most_pairs, most_tokens)
        assert all(len(step) == ranks for step in grid)
        cells = [cell for step in grid for cell in step]
        assert sorted(i for cell in cells for i in cell) == sorted(rows)
        for cell in filter(None, cells):
            assert len(cell) <= most_pairs and (len(cell) * max(lengths[i] for i in cell) <= most_tokens or len(cell) == 1)
        for step in grid[:-1]:
            assert len({len(cell) for cell in step}) == 1  # no rank waits for another
        assert grid == split_batch(rows[::-1], lengths, ranks, most_pairs, most_tokens)  # in any order of the rows
        flat = [lengths[i] for cell in cells for i in cell]
        assert flat == sorted(flat, reverse=True)  # pairs of similar length meet
    assert len(split_batch(rows, lengths, 1, 8, 10**6)) == -(-count // 8)  # no more micro-steps than needed


def test_little_of_a_batch_is_padding():
    """Under 5 % of the computed positions, with lengths that vary like those of dialogues and the sizes of the recipes."""
    draw = random.Random(0)
    lengths = [min(1500, 20 + round(draw.lognormvariate(5, 0.8))) for _ in range(2308)]
    for step_pairs, micro_pairs in ((8, 8), (32, 8), (64, 4), (64, 8)):
        order = epoch_order(lengths, 0, 42, step_pairs, group_by_length=True)
        cells = [cell for start in range(0, len(order), step_pairs)
                 for step in split_batch(order[start:start + step_pairs], lengths, 1, micro_pairs, 16384) for cell in step]
        computed = sum(len(cell) * max(lengths[i] for i in cell) for cell in cells)
        assert 1 - sum(lengths) / computed < 0.05


# ----------------------------------------------------------------------------------------------------------------------
# Batches

def two_pairs():
    table = datasets.Dataset.from_dict({
        "id": ["p0", "p1"], "prompt_ids": [[11, 12], [13]], "first_ids": [[21, 22, 2], [23]],
        "second_ids": [[31, 2], [32, 2]], "tokens": [7, 4]})
    return Pairs(table, "f", {})


def test_collate_shared():
    batch = collate(two_pairs(), [1, 0], shared=True, pad=9)
    assert batch.ids == ["p1", "p0"] and batch.rows.tolist() == [1, 0] and batch.weights.tolist() == [1.0, 1.0]
    assert batch.shared is True
    assert batch.input_ids.tolist() == [[13, 23, 32, 2, 9, 9, 9], [11, 12, 21, 22, 2, 31, 2]]
    assert batch.segments.tolist() == [[0, 1, 2, 2, -1, -1, -1], [0, 0, 1, 1, 1, 2, 2]]
    # positions of y2 restart after the prompt
    assert batch.positions.tolist() == [[0, 1, 1, 2, 0, 0, 0], [0, 1, 2, 3, 4, 2, 3]]
    # the prompt's last state predicts the first token of both responses, then each token's state the next
    assert batch.sources.tolist() == [0, 0, 2, 7 + 1, 7 + 2, 7 + 3, 7 + 1, 7 + 5]
    assert batch.targets.tolist() == [23, 32, 2, 21, 22, 2, 31, 2]
    assert batch.lengths.tolist() == [1, 2, 3, 2]
    assert batch.tokens == (1 + 1) + (1 + 2) + (2 + 3) + (2 + 2)
    assert batch.input_ids.dtype == batch.sources.dtype == batch.targets.dtype == torch.int64
    assert batch.weights.dtype == torch.float32 and batch.input_ids.is_contiguous()
    moved = batch.to("cpu")
    assert isinstance(moved, data.PairBatch) and torch.equal(moved.sources, batch.sources) and moved.ids == batch.ids


def test_collate_two_rows_a_pair():
    batch = collate(two_pairs(), [1, 0], shared=False, pad=9)
    assert batch.input_ids.tolist() == [[13, 23, 9, 9, 9], [13, 32, 2, 9, 9], [11, 12, 21, 22, 2], [11, 12, 31, 2, 9]]
    assert batch.segments.tolist() == [[0, 1, -1, -1, -1], [0, 2, 2, -1, -1], [0, 0, 1, 1, 1], [0, 0, 2, 2, -1]]
    assert batch.positions.tolist() == [[0, 1, 0, 0, 0], [0, 1, 2, 0, 0], [0, 1, 2, 3, 4], [0, 1, 2, 3, 0]]
    assert batch.sources.tolist() == [0, 5, 6, 11, 12, 13, 16, 17]
    assert batch.targets.tolist() == [23, 32, 2, 21, 22, 2, 31, 2]
    assert batch.lengths.tolist() == [1, 2, 3, 2] and batch.tokens == 14 and batch.shared is False
    assert batch.ids == ["p1", "p0"] and batch.rows.tolist() == [1, 0]


@pytest.mark.parametrize("shared", (True, False))
def test_collate_filler(shared):
    batch = collate(two_pairs(), [], shared=shared)
    assert batch.ids == [None] and batch.weights.tolist() == [0.0] and batch.tokens == 0
    real = collate(two_pairs(), [0], shared=shared)
    assert torch.equal(batch.input_ids, real.input_ids) and torch.equal(batch.sources, real.sources)
    assert real.ids == ["p0"] and real.weights.tolist() == [1.0] and real.tokens == 9


def test_a_batch_carries_what_belongs_to_its_rows():
    pairs = two_pairs()
    assert pairs.kind == "train" and pairs.shared
    batch = pairs.batch([1, 0], "cpu")
    assert batch.ref_logps is None and batch.labels is None
    assert torch.equal(batch.input_ids, collate(pairs, [1, 0]).input_ids)
    pairs.ref_logps, pairs.shared = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), False
    batch = pairs.batch([1, 0, 1], "cpu")
    assert batch.ref_logps.tolist() == [[3, 4], [1, 2], [3, 4]] and batch.labels is None and batch.shared is False
    pairs.soft_labels = torch.tensor([0.5, -0.25])
    assert pairs.batch([1, 0, 1], "cpu").soft_labels.tolist() == [-0.25, 0.5, -0.25]
    assert pairs.batch([], "cpu").soft_labels.tolist() == [0]  # of a filler
    pairs.kind, pairs.labels = "test", torch.tensor([1.0, -1.0])
    assert pairs.batch([1, 0], "cpu").labels.tolist() == [-1, 1]


def test_training_pairs_that_hold_labels_make_no_batch():
    pairs = two_pairs()
    pairs.labels = torch.tensor([1.0, -1.0])
    with pytest.raises(AssertionError, match="must not hold labels"):
        pairs.batch([1, 0], "cpu")


def test_a_filler_has_finite_numbers_although_its_pair_was_not_scored():
    """A run that ends within its first epoch scores only the pairs that it will see, and pair 0 may not be among them."""
    pairs = two_pairs()
    pairs.ref_logps = torch.tensor([[torch.nan, torch.nan], [3.0, 4.0]])
    assert pairs.batch([], "cpu").ref_logps.isfinite().all() and pairs.batch([0], "cpu").ref_logps.isnan().all()
