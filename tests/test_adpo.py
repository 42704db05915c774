"""adpo.py against independent computations: `python -m pytest tests/test_adpo.py`.

They are compared with a naive implementation of their own: each response in its own row, a plain forward of the model in
double precision, a full log-softmax, a sum.
"""

import copy
import functools
import math
import random
import re
import weakref

import datasets
import pytest
import torch
import transformers
from torch._dynamo.testing import CompileCounterWithBackend

import adpo
import data
import train
from benchmarks import flash_on_cpu  # noqa: F401  adpo.pair_attention runs on its stand-ins
from runtime import model

V = 97
SMALL = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2)
GPT = dict(vocab_size=V, bos_token_id=1, eos_token_id=2)

# name: (configuration, whether a prompt can be shared)
ARCHITECTURES = {
    "llama": (lambda: transformers.LlamaConfig(**SMALL), True),
    "mistral, sliding window": (lambda: transformers.MistralConfig(**SMALL, sliding_window=5), True),
    "qwen2": (lambda: transformers.Qwen2Config(**SMALL), True),
    "qwen2, two kinds of layers": (lambda: transformers.Qwen2Config(
        **SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=2), True),
    "gemma2": (lambda: transformers.Gemma2Config(**SMALL, head_dim=8, sliding_window=5, final_logit_softcapping=3.0,
                                                 attn_implementation="eager"), True),
    "gpt2": (lambda: transformers.GPT2Config(**GPT, n_embd=32, n_layer=3, n_head=4, n_positions=256), True),
    "granite, logit scale": (lambda: transformers.GraniteConfig(**SMALL, logits_scaling=3.0), True),
    "cohere, logit scale": (lambda: transformers.CohereConfig(**SMALL, logit_scale=0.3), True),
    "bloom, no position_ids": (lambda: transformers.BloomConfig(**GPT, hidden_size=32, n_layer=2, n_head=4), False),
}


def make_lm(name):
    torch.manual_seed(0)
    lm = transformers.AutoModelForCausalLM.from_config(ARCHITECTURES[name][0]()).eval()
    for parameter in lm.parameters():  # with the library's 0.02, a model would hardly depend on its input
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.2)
    return lm


def make_pairs(lengths, seed=0):
    """Pairs of random tokens; lengths: (prompt, y1, y2) each."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for n, (p, a, b) in enumerate(lengths):
        tokens = torch.randint(3, V, (p + a + b,), generator=generator).tolist()
        rows.append({"id": f"pair-{n}", "prompt_ids": tokens[:p], "first_ids": tokens[p:p + a],
                     "second_ids": tokens[p + a:], "tokens": p + a + b})
    return data.Pairs(datasets.Dataset.from_list(rows), "random", {})


# Prompts and responses of length 1, padding, rows longer than the window of 5.
LENGTHS = [(1, 1, 1), (7, 4, 9), (20, 12, 3), (1, 10, 2)]


def naive_logps(lm, pairs):
    """(B, 2) in double precision, by one plain forward per response."""
    out = []
    for pair in pairs.table:
        for response in (pair["first_ids"], pair["second_ids"]):
            row = torch.tensor([pair["prompt_ids"] + response])
            logps = lm(input_ids=row).logits[0, :-1].log_softmax(-1)  # (T - 1, V)
            start = len(pair["prompt_ids"]) - 1
            out.append(sum(logps[start + i, token] for i, token in enumerate(response)))
    return torch.stack(out).view(-1, 2)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_logps_and_gradients_agree_with_a_naive_double_precision_forward(name, checkpointing):
    lm, pairs = make_lm(name), make_pairs(LENGTHS)
    double = copy.deepcopy(lm).double()
    module = adpo.PairLogps(lm, chunk_size=7)
    assert (module.why_not_shared() is None) == ARCHITECTURES[name][1]
    if checkpointing:
        model.recompute_activations(lm.train())
        for layer in lm.modules():
            if isinstance(layer, torch.nn.Dropout):
                layer.p = 0.0
    logps = module(data.collate(pairs, [0, 1, 2, 3], shared=module.why_not_shared() is None))
    weights = torch.tensor([[1.0, -0.5], [0.3, 2.0], [-1.0, 0.7], [0.2, -0.4]])
    (logps * weights).sum().backward()
    expected = naive_logps(double, pairs)
    (expected * weights).sum().backward()

    assert logps.dtype == torch.float32
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=0)
    ours = torch.cat([p.grad.flatten() for p in lm.parameters()]).double()
    theirs = torch.cat([p.grad.flatten() for p in double.parameters()])
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", ["llama", "mistral, sliding window", "qwen2, two kinds of layers", "gemma2"])
@torch.no_grad()  # FlexAttention has no backward on a CPU
def test_flex_attention_sees_the_same(name):
    """The block mask and the dense one give the same. FlexAttention runs without the compiler."""
    module = adpo.PairLogps(make_lm(name))
    batch = data.collate(make_pairs([*LENGTHS, (70, 90, 40)]), range(5))
    expected = module(batch)
    module.lm.set_attn_implementation("flex_attention")
    assert module.why_not_shared() is None
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(module(batch), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("window", [None, 5, 500], ids=["its own window", "window 5", "window 500"])
@pytest.mark.parametrize("name", ["llama", "mistral, sliding window", "qwen2, two kinds of layers", "gpt2"])
def test_attention_in_two_causal_rows_gives_what_a_mask_gives(name, window):
    lm, pairs = make_lm(name), make_pairs([*LENGTHS, (3, 40, 2), (3, 2, 40)])
    if window:
        lm.config.sliding_window = window
    assert lm._supports_attention_backend and lm.config._attn_implementation == "sdpa"
    batch, found = data.collate(pairs, range(6)), []
    for takes_rows in (False, True):
        module = adpo.PairLogps(lm, takes_rows=takes_rows)
        masks = module._mask(batch)
        integers = [mask.dtype == torch.int32 for mask in (masks.values() if isinstance(masks, dict) else [masks])]
        kinds = module.layer_types or {"sliding_attention" if module.window else "full_attention"}
        assert integers == [takes_rows and (kind == "full_attention" or module.window >= batch.longest) for kind in kinds]
        lm.zero_grad()
        logps = module(batch)
        (logps * torch.arange(12).view(6, 2)).sum().backward()
        found.append((logps.detach(), torch.cat([p.grad.flatten() for p in lm.parameters()])))
    (logps, grads), (expected, expected_grads) = found[1], found[0]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
    assert (grads - expected_grads).norm() <= 1e-5 * expected_grads.norm()


def test_two_causal_rows_hold_each_response_after_its_prompt():
    segments = torch.tensor([[0, 0, 1, 2, 2, 2], [0, 1, 1, 2, -1, -1]])
    keys, query_starts, key_starts = adpo.two_rows(segments, 3)
    rows = [[0, 1, 2], [0, 1, 3, 4, 5], [6, 7, 8], [6, 9, 10, 11]]  # 10 and 11 are padding
    assert keys.tolist() == sum(rows, [])
    assert key_starts.tolist() == [0, 3, 8, 11, 15]
    assert query_starts.tolist() == [0, 3, 6, 9, 12]  # prompt and y1, then the rest


@pytest.mark.parametrize("name, takes_rows, recomputes", [
    ("llama", True, False), ("llama", True, True), ("qwen2, two kinds of layers", False, False), ("gemma2", False, True)])
def test_compiled_layers_give_what_they_gave(name, takes_rows, recomputes, monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")  # needs no C++ compiler
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    lm, pairs, found = make_lm(name).train(), make_pairs(LENGTHS), []
    if recomputes:
        model.recompute_activations(lm)
    module = adpo.PairLogps(lm, chunk_size=7, takes_rows=takes_rows)
    for compiled in (False, True):
        if compiled:
            assert module.compile_layers() == 4
        lm.zero_grad()
        logps = module(data.collate(pairs, range(4)))
        (logps * torch.arange(8).view(4, 2)).sum().backward()
        found.append((logps.detach(), torch.cat([p.grad.flatten() for p in lm.parameters()])))
    (expected, expected_grads), (logps, grads) = found
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-4)
    assert (grads - expected_grads).norm() <= 1e-5 * expected_grads.norm()
    operations = {node.target for graph in counter.graphs for node in graph.graph.nodes}
    assert counter.graphs and not any("checkpoint" in str(target) for target in operations)
    torch.compiler.reset()


def test_compiled_layers_share_their_graphs_over_layers_and_shapes(monkeypatch):
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    torch.compiler.reset()
    module = adpo.PairLogps(make_lm("llama").train(), chunk_size=16, takes_rows=True)
    module.compile_layers()
    rng, counts = random.Random(0), []
    for n in range(2, 14):
        pairs = make_pairs([[rng.randint(2, 20) for _ in range(3)] for _ in range(n)])
        module(data.collate(pairs, range(n))).sum().backward()
        counts.append(counter.frame_count)
    # The layer, and twice each the two functions of logits: for the first chunk of a batch and for those that follow.
    assert counts == [5] * 12
    torch.compiler.reset()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_at_step_0_every_margin_is_0_and_the_loss_is_log_2(name):
    module = adpo.PairLogps(make_lm(name))
    batch = data.collate(make_pairs(LENGTHS), [0, 1, 2, 3], shared=module.why_not_shared() is None)
    with torch.no_grad():
        reference = module(batch)
    margin = adpo.margins(adpo.implicit_rewards(module(batch), reference, beta=0.1))
    loss = adpo.preference_loss(margin, torch.tensor([1.0, -1.0, 1.0, -1.0])).mean()
    assert margin.abs().max() <= 1e-5
    assert abs(loss.item() - math.log(2)) <= 1e-4


@pytest.mark.parametrize("wrong", ["positions", "segments", "window"])
def test_a_wrong_mask_or_position_would_be_seen(wrong):
    """The comparison above can fail: each ingredient of the shared row matters far more than its tolerance."""
    module = adpo.PairLogps(make_lm("mistral, sliding window"))
    batch = data.collate(make_pairs(LENGTHS), [0, 1, 2, 3])
    right = module(batch)
    if wrong == "positions":
        batch.positions = torch.arange(batch.positions.shape[1]).expand_as(batch.positions)
    elif wrong == "segments":
        batch.segments = batch.segments.clamp(max=0)
    else:
        module.window = None
    assert (module(batch) - right).abs().max() > 0.1


def test_two_rows_a_pair_give_what_one_shared_row_gives():
    module, pairs = adpo.PairLogps(make_lm("llama")), make_pairs(LENGTHS)
    shared = module(data.collate(pairs, [0, 1, 2, 3], shared=True))
    apart = module(data.collate(pairs, [0, 1, 2, 3], shared=False))
    torch.testing.assert_close(shared, apart, rtol=1e-5, atol=1e-5)


def test_attention_mask_by_hand():
    segments = torch.tensor([[0, 0, 1, 2, 2, -1]])
    positions = torch.tensor([[0, 1, 2, 2, 3, 0]])
    seen = [[1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0], [1, 1, 0, 1, 1, 0],
            [1, 1, 0, 0, 0, 1]]
    mask = adpo.attention_mask(segments, positions, torch.float32)
    assert mask.shape == (1, 1, 6, 6)
    assert (mask[0, 0] == 0).int().tolist() == seen
    assert mask.min() == torch.finfo(torch.float32).min
    windowed = adpo.attention_mask(segments, positions, torch.bfloat16, window=2)[0, 0] == 0
    assert windowed[4].int().tolist() == [0, 0, 0, 1, 1, 0]  # position 3 sees only positions 2 and 3 of its own text
    assert windowed[3].int().tolist() == [0, 1, 0, 1, 0, 0]


class OtherHead(torch.nn.Linear):
    """A kind of head that token_logps does not know, such as one with an adapter."""


@pytest.mark.parametrize("kind", [torch.nn.Linear, OtherHead])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale, softcap", [(1.0, None), (0.25, None), (1.0, 5.0), (2.0, 5.0)])
def test_token_logps_against_log_softmax(dtype, scale, softcap, kind):
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(23, 16, generator=generator).to(dtype).requires_grad_()
    targets = torch.randint(0, V, (23,), generator=generator)
    head = kind(16, V).to(dtype)
    weights = torch.randn(23, generator=generator)
    logps = adpo.token_logps(states, targets, head, chunk_size=10, scale=scale, softcap=softcap)
    (logps * weights).sum().backward()
    ours = [states.grad, head.weight.grad, head.bias.grad]

    double = states.detach().double().requires_grad_()
    head64 = copy.deepcopy(head).double()
    raw = head64(double)
    logits = (raw + (head(states.detach()).double() - raw).detach()) * scale  # round the logits as the head did
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    (expected * weights).sum().backward()
    assert logps.dtype == torch.float32  # whatever the model's dtype
    torch.testing.assert_close(logps.double(), expected, rtol=1e-5, atol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for mine, theirs in zip(ours, [double.grad, head64.weight.grad, head64.bias.grad]):
        assert (mine.double() - theirs).norm() <= tolerance * theirs.norm()
    with torch.no_grad():
        torch.testing.assert_close(adpo.token_logps(states, targets, head, 7, scale, softcap), logps, rtol=1e-5, atol=1e-5)


def test_a_frozen_head_gets_no_gradient():
    head = torch.nn.Linear(16, V, bias=False).requires_grad_(False)
    states = torch.randn(23, 16, requires_grad=True)
    adpo.token_logps(states, torch.randint(0, V, (23,)), head, chunk_size=10).sum().backward()
    assert head.weight.grad is None and states.grad.norm() > 0


@pytest.mark.parametrize("kind, recomputed", [(torch.nn.Linear, 7), (OtherHead, 8)])
def test_no_more_than_one_chunk_of_logits_is_alive(monkeypatch, kind, recomputed):
    """Whenever logits are computed, in forward or in backward, those of all earlier chunks have been freed."""
    made, alive = [], []

    def linear(*args):
        alive.append(sum(storage() is not None for storage in made))
        logits = plain(*args)
        made.append(weakref.ref(logits.untyped_storage()))
        return logits

    plain = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    head, states = kind(16, V), torch.randn(64, 16, requires_grad=True)
    adpo.token_logps(states, torch.randint(0, V, (64,)), head, chunk_size=8).sum().backward()
    assert len(made) == 8 + recomputed  # a plain head keeps its last chunk, with which backward starts
    assert max(alive) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 2 by hand

def test_implicit_rewards_and_margins_by_hand():
    logps = torch.tensor([[-10.0, -12.0], [-5.0, -3.0]])
    ref_logps = torch.tensor([[-11.0, -11.0], [-5.0, -5.0]])
    rewards = adpo.implicit_rewards(logps, ref_logps, beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[0.1, -0.1], [0.0, 0.2]]))
    torch.testing.assert_close(adpo.margins(rewards), torch.tensor([0.2, -0.2]))


@pytest.mark.parametrize("margin, asked", [(0.0, True), (1.29, True), (-1.29, True), (1.25, True), (1.3001, False),
                                           (-1.3001, False), (50.0, False)])
def test_gate_by_hand(margin, asked):
    assert adpo.gate(torch.tensor([margin]), 1.3).tolist() == [asked]


def test_a_margin_of_exactly_plus_or_minus_gamma_asks():
    assert adpo.gate(torch.tensor([0.5, -0.5]), 0.5).all()
    assert adpo.gate(torch.tensor([0.0]), 0.0).all()  # γ = 0 at step 0: all pairs are asked, and none is lost


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_margin_that_is_not_a_number_names_its_pair(bad):
    with pytest.raises(FloatingPointError, match="pair b is .*, not a finite number: lower learning_rate"):
        adpo.gate(torch.tensor([0.0, bad]), 1.3, ids=["a", "b"])


def test_labels_by_hand():
    margin = torch.tensor([2.0, -2.0, 2.0, 0.1])
    answers = torch.tensor([0, 0, -1, 1])
    assert adpo.choose_labels(margin, answers).tolist() == [1, -1, -1, 1]
    assert adpo.choose_labels(margin, answers, pseudo_labels=False).tolist() == [0, 0, -1, 1]
    ask = torch.tensor([True, False, False, True])  # the first was to be asked, but the budget was spent
    assert adpo.choose_labels(margin, answers, ask).tolist() == [0, -1, -1, 1]
    assert adpo.choose_labels(margin, answers, ask, after_budget="pseudo_label").tolist() == [1, -1, -1, 1]


@pytest.mark.parametrize("pseudo_labels", [True, False])
@pytest.mark.parametrize("after_budget", ["none", "pseudo_label"])
def test_an_answer_without_a_preference_is_no_label_however_sure_the_policy_is(pseudo_labels, after_budget):
    margin = torch.tensor([2.0, 0.1, -50.0], requires_grad=True)
    answers, ask = torch.tensor([math.nan, math.nan, 1.0]), torch.tensor([False, True, False])
    labels = adpo.choose_labels(margin, answers, ask, pseudo_labels, after_budget)
    assert labels.tolist() == [0, 0, 1]
    adpo.preference_loss(margin, labels).sum().backward()
    assert margin.grad.tolist() == [0, 0, pytest.approx(-1)]


def test_a_tie_can_be_trained_towards_one_half():
    """−½ log σ(m) − ½ log σ(−m), whose gradient is σ(m) − ½."""
    margin = torch.tensor([2.0, -1.0, 0.5], requires_grad=True)
    labels = adpo.choose_labels(margin, torch.tensor([math.nan, math.nan, 0]), pseudo_labels=False, ties="half")
    losses = adpo.preference_loss(margin, labels, label_smoothing=0.1)
    assert losses.tolist() == pytest.approx([1.126928, 0.813262, 0], rel=1e-5)
    losses.sum().backward()
    assert margin.grad.tolist() == pytest.approx([1 / (1 + math.exp(-2)) - 0.5, 1 / (1 + math.exp(1)) - 0.5, 0], rel=1e-5)


def test_no_gradient_flows_through_labels():
    margin = torch.tensor([2.0, -0.5], requires_grad=True)
    labels = adpo.choose_labels(margin, torch.tensor([0, 1]))
    assert not labels.requires_grad
    adpo.preference_loss(margin, labels).sum().backward()
    # d/dm −log σ(o·m) = −o σ(−o·m)
    expected = [-1 / (1 + math.exp(2.0)), -1 / (1 + math.exp(-0.5))]
    assert margin.grad.tolist() == pytest.approx(expected, rel=1e-5)


def test_only_the_policys_log_probs_get_a_gradient():
    """The reference's do not, and neither do labels that somebody computes with a gradient."""
    logps, ref_logps = torch.tensor([[-3.0, -5.0]], requires_grad=True), torch.tensor([[-4.0, -4.0]], requires_grad=True)
    labels = torch.tensor([0.3], requires_grad=True)
    adpo.preference_loss(adpo.margins(adpo.implicit_rewards(logps, ref_logps, beta=0.1)), labels).sum().backward()
    assert logps.grad.abs().min() > 0 and ref_logps.grad is None and labels.grad is None


@pytest.mark.parametrize("kind, smoothing, expected", [
    ("sigmoid", 0.0, math.log(1 + math.exp(0.7))),
    ("sigmoid", 0.1, 0.9 * math.log(1 + math.exp(0.7)) + 0.1 * math.log(1 + math.exp(-0.7))),
    ("hinge", 0.0, 1.7),
    ("ipo", 0.0, (-0.7 / 0.2 - 1 / 0.4) ** 2),
])
def test_losses_by_hand(kind, smoothing, expected):
    """m = 0.7 with the label against it, β = 0.2."""
    loss = adpo.preference_loss(torch.tensor([0.7]), torch.tensor([-1.0]), kind, beta=0.2, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("kind, smoothing, place", [("ipo", 0.0, 0.5), ("hinge", 0.0, 1.0), ("sigmoid", 0.2, math.log(4))])
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_place_to_which_a_loss_draws_margins(kind, smoothing, place, beta):
    """docs/method.md names it, because γ has to fit it."""
    margin = torch.tensor([place, -place, place - 0.1, place + 0.1], requires_grad=True)
    losses = adpo.preference_loss(margin, torch.tensor([1.0, -1.0, 1.0, 1.0]), kind, beta, smoothing)
    slope, = torch.autograd.grad(losses.sum(), margin)
    assert slope[:2].tolist() == pytest.approx([0, 0], abs=1e-6) and slope[2] < 0 and slope[3] >= 0


@pytest.mark.parametrize("kind", adpo.LOSSES)
def test_a_pair_without_a_label_has_no_loss_and_no_gradient(kind):
    margin = torch.tensor([3.0, 0.2], requires_grad=True)
    loss = adpo.preference_loss(margin, torch.tensor([0.0, 1.0]), kind)
    loss.mean().backward()
    assert loss[0] == 0 and margin.grad[0] == 0
    assert loss[1] > 0 and margin.grad[1] != 0


def test_a_loss_added_to_the_table_is_used_and_needs_no_case_for_pairs_without_a_label(monkeypatch):
    """tests/test_config.py: the config then accepts its name."""
    monkeypatch.setitem(adpo.LOSSES, "linear", lambda margin, labels, beta, label_smoothing: 5 - beta * labels * margin)
    losses = adpo.preference_loss(torch.tensor([2.0, 3.0, 4.0]), torch.tensor([1.0, -1.0, 0.0]), "linear", beta=0.5)
    assert losses.tolist() == [4.0, 6.5, 0.0]


def test_the_worked_example_computes_what_it_prints(capsys):
    """Compute each row again from its printed log-probs, with the equations written out; every case is among the rows."""
    adpo.worked_example()
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    rows = [line.split(maxsplit=10) for line in printed.splitlines() if re.match(r" +\d ", line)]
    seen = []
    for _, y1, y2, ref1, ref2, r1, r2, m, asked, o, rest in rows:
        source, loss, slope = rest.rsplit(maxsplit=2)
        rewards = [0.1 * (float(y1) - float(ref1)), 0.1 * (float(y2) - float(ref2))]
        margin = rewards[0] - rewards[1]
        assert [float(r1), float(r2), float(m)] == pytest.approx([*rewards, margin])
        assert asked == ("yes" if abs(margin) <= 1.3 + 1e-6 else "no") and (asked == "yes") == (source == "the annotator")
        assert asked == "yes" or float(o) == math.copysign(1, margin)
        assert float(loss) == pytest.approx(math.log1p(math.exp(-float(o) * margin)), abs=6e-4)
        assert float(slope) == pytest.approx(-float(o) / (1 + math.exp(float(o) * margin)) / len(rows), abs=6e-4)
        seen.append((source, round(abs(margin), 6) == 1.3))
    assert seen == [("the annotator", False), ("sign(m)", False), ("sign(m), WRONG", False), ("the annotator", True)]
    assert f"mean loss = {sum(float(row[-1].split()[-2]) for row in rows) / 4:.3f}, with 2 labels bought" in printed


def test_flex_attention_compiles_few_graphs_whatever_the_shape_and_the_window():
    """Layers with and without a window, in 12 shapes: more graphs than torch's limit (8), and it would hold all scores."""
    from torch.nn.attention.flex_attention import flex_attention
    graphs, rng = [], random.Random(0)

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward
    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v, mask: flex_attention(q, k, v, block_mask=mask), backend=backend)
    for _ in range(12):
        pairs, prompt, first, second = rng.randint(1, 3), *(rng.randint(20, 120) for _ in range(3))
        parts = torch.arange(prompt), prompt + torch.arange(first), prompt + torch.arange(second)
        segments = torch.cat([torch.full_like(part, n) for n, part in enumerate(parts)]).expand(pairs, -1)
        positions = torch.cat(parts).expand(pairs, -1)
        q, k, v = torch.randn(3, pairs, 2, segments.shape[1], 16)
        for window in (None, 16):
            compiled(q, k, v, adpo.attention_mask(segments, positions, q.dtype, window, flex=True))
    assert len(graphs) <= 4


def test_a_micro_step_waits_for_the_device_only_where_the_margins_are_read():
    """No number is read back in the forward, the loss, the backward or the metrics: count the calls that `.item()` makes."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    module = adpo.PairLogps(make_lm("llama"), chunk_size=7)
    batch = data.collate(make_pairs(LENGTHS), [0, 1, 2, 3])
    labels = torch.tensor([1.0, -1.0, 1.0, 0.0])
    with Reads() as reads:
        logps = module(batch)
        rewards = adpo.implicit_rewards(logps, logps.detach() + 1, beta=0.1)
        losses = adpo.preference_loss(adpo.margins(rewards), labels)
        (losses * batch.weights).sum().backward()
        train.metric_sums(losses, rewards, logps, labels, batch.weights, batch.tokens)
        assert reads.count == 0
        losses.sum().item()
    assert reads.count == 1  # the counter works
