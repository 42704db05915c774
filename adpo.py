"""Active Direct Preference Optimization: the algorithm, as pure functions of tensors.

Ji, He, Gu: "Reinforcement Learning from Human Feedback with Active Queries", arXiv 2402.09401, Algorithm 2.

One step of ADPO, in the order of this file:

    logps    (B, 2)  log π_θ(y|x) of both responses                       PairLogps
    rewards  (B, 2)  r(x, y) = β [log π_θ(y|x) − log π_ref(y|x)]          implicit_rewards
    margin   (B,)    m = r(x, y1) − r(x, y2)                              margins
    ask      (B,)    |m| ≤ γ                                              gate
    labels   (B,)    o: the annotator's answer where asked, else sign(m)  choose_labels
    loss     (B,)    −log σ(o · m)                                        preference_loss

Attention without a mask (two_rows, pair_attention) is about speed, and the last part, the chunked head, about memory. Both
change nothing but rounding: skip them on a first reading.

Departures from the paper: none in the rule. A margin of exactly ±γ asks, and an answer that is already known is used
whatever the margin. Departures from the official code: the label of a pair that is not asked is unknown here (there, the
gate only flips the signs of labels that every batch carries); log-probs are fp32 sums whatever the model's dtype; every
response token is scored (there, the last token of the longest rows is cut off); a prompt is computed once for both
responses, in one row `[prompt | y1 | y2]`.

Legend: B pairs, T tokens of a row, N response tokens of a batch, V vocabulary, H hidden size.

Run it: `python adpo.py` prints one step of the method on four pairs. The module needs no package but torch and does no
I/O; tests/test_adpo.py checks each function against an independent computation.
"""

from inspect import signature

import torch
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

# ----------------------------------------------------------------------------------------------------------------------
# Algorithm 2


def implicit_rewards(logps, ref_logps, beta):
    """Implicit reward of each response, in units of reward (β times nats).

    r(x, y) = β [log π_θ(y|x) − log π_ref(y|x)]   (Rafailov et al., arXiv 2305.18290, eq. 5 without its partition term,
    which both responses of a pair share).

    logps, ref_logps: (B, 2) fp32.  Returns (B, 2) fp32; gradients flow through logps.
    """
    return beta * (logps - ref_logps.detach())


def margins(rewards):
    """m = r(x, y1) − r(x, y2).  rewards: (B, 2).  Returns (B,)."""
    return rewards[:, 0] - rewards[:, 1]


def gate(margin, gamma, ids=None):
    """Algorithm 2, the query: True where |m| ≤ γ, so that the annotator is asked.

    margin: (B,), in units of reward; γ has the same unit, so it means something only together with β.
    ids: names of the pairs, for the error alone.
    Returns (B,) bool.  Raises FloatingPointError where a margin is not finite: neither asking nor not asking is right.
    """
    margin = margin.detach()
    finite = margin.isfinite()
    if not finite.all():
        bad = (~finite).nonzero().flatten().tolist()
        names = ", ".join(str(ids[i]) if ids else f"row {i}" for i in bad)
        raise FloatingPointError(f"the margin of pair {names} is {margin[bad[0]].item()}, not a finite number: "
                                 "lower learning_rate, or look at the model's weights")
    return margin.abs() <= gamma


def choose_labels(margin, answers, ask=None, pseudo_labels=True, after_budget="none", ties="none", soft_labels=None):
    """Algorithm 2, the label: o = the annotator's answer where there is one, else sign(m) or none.

    margin: (B,).  answers: (B,), +1 (y1 preferred), −1 (y2 preferred), 0 (no answer, now or before), NaN (an answer
    without a preference: never a label, however sure the policy is).
    ask: (B,) bool, what the gate said; after_budget needs it.
    pseudo_labels: a pair that is not asked gets sign(m); False: no label, the paper's ablation "ADPO without pseudo-labels".
    after_budget: what a pair gets that is to be asked when the budget is spent: "none", no label, or "pseudo_label".
    ties: what an answer without a preference becomes: "none", no label, or "half", NaN, which preference_loss trains
    towards σ(m) = ½.
    soft_labels: (B,) between −1 and 1, from a committee that has learned from all answers, in place of sign(m) and ±1.
    Returns (B,) in margin's dtype, detached (o carries no gradient): +1, −1, 0 for none, NaN for a tie, or a soft label.
    """
    margin = margin.detach()
    answers = answers.to(margin.dtype)
    pseudo = margin.sign() if pseudo_labels else torch.zeros_like(margin)
    if ask is not None and after_budget == "none":
        pseudo = pseudo.masked_fill(ask, 0)
    labels = torch.where(answers != 0, answers, pseudo) if soft_labels is None else soft_labels.to(margin.dtype)
    return labels.masked_fill(answers.isnan(), torch.nan if ties == "half" else 0)


def sigmoid_loss(margin, labels, beta, label_smoothing):
    """−p log σ(m) − (1 − p) log σ(−m): DPO, arXiv 2305.18290, eq. 7, where p = (1 + (1 − 2ε) o) / 2 is the probability that
    y1 is preferred and ε = label_smoothing. With ε = 0 and o = ±1 this is −log σ(o·m)."""
    p = (1 + (1 - 2 * label_smoothing) * labels) / 2
    return -p * logsigmoid(margin) - (1 - p) * logsigmoid(-margin)


def ipo_loss(margin, labels, beta, label_smoothing):
    """(o·m/β − 1/(2β))²: IPO, arXiv 2310.12036, eq. 17, with summed log-probs as in the paper. It is 0 at o·m = ½, whatever
    β, and draws every margin there, so γ has to be lower, or nearly every pair is asked."""
    return (labels * margin / beta - 1 / (2 * beta)) ** 2


def hinge_loss(margin, labels, beta, label_smoothing):
    """max(0, 1 − o·m): SLiC, arXiv 2305.10425. From γ = 1 on, a pseudo-label has no loss."""
    return torch.relu(1 - labels * margin)


# The values of the key loss_type. A loss must have the form f(o · m), or replacing o by sign(m) would mean nothing.
LOSSES = {"sigmoid": sigmoid_loss, "ipo": ipo_loss, "hinge": hinge_loss}


def preference_loss(margin, labels, loss_type="sigmoid", beta=0.1, label_smoothing=0.0):
    """Algorithm 2, the loss of each pair. Take the mean over all B pairs, including those without a label.

    margin, labels: (B,), as choose_labels returns them. A tie (NaN) has o = 0. For the sigmoid loss o may lie anywhere
    between −1 and 1, and means that y1 is preferred with probability (1 + o)/2.  loss_type: a name in LOSSES.
    Returns (B,), 0 where the label is 0.
    """
    labels = labels.detach()
    losses = LOSSES[loss_type](margin, labels.nan_to_num(0), beta, label_smoothing)
    return torch.where(labels == 0, torch.zeros_like(losses), losses)


# ----------------------------------------------------------------------------------------------------------------------
# Log-probs of a pair

def sees(segments, positions, window=None):
    """Who attends to whom in rows `[prompt | y1 | y2]`: each token sees the prompt and its own response, causally.

    segments: (B, T) int; 0 prompt, 1 y1, 2 y2, −1 padding.  positions: (B, T) int; those of y2 restart after the prompt.
    window: sliding window in positions, not in indices: y2 comes after y1 in the row, but not in the text.
    Returns a function of indices (row, head, query, key) → bool, tensors that broadcast: FlexAttention's mask_mod.
    """
    def mask_mod(row, head, query, key):
        here, there = segments[row, query], segments[row, key]
        seen = (query >= key) & ((there == 0) | (there == here))  # padding sees padding, so that no row is empty
        if window is not None:
            seen = seen & (positions[row, query] - positions[row, key] < window)
        return seen
    return mask_mod


def attention_mask(segments, positions, dtype, window=None, flex=False):
    """The mask of `sees` in the form that attention takes.

    segments, positions: (B, T), as `sees` has them.  flex: return a BlockMask for FlexAttention, which skips the blocks
    that nobody sees.
    Otherwise returns (B, 1, T, T) in `dtype`, to be added to the scores: 0 where seen, the dtype's lowest number elsewhere.
    A boolean mask would not do, because eager attention adds the mask, nor −inf, which gives NaN on a row that sees nothing.
    """
    B, T = segments.shape
    if flex:  # always with a window, and a tensor: then layers with and without one share the graphs that are compiled
        window = positions.new_full((), 2**31 - 1 if window is None else window)
        return create_block_mask(sees(segments, positions, window), B, None, T, T, device=segments.device)
    index = torch.arange(T, device=segments.device)
    rows = torch.arange(B, device=segments.device)[:, None, None]  # (B, 1, 1)
    seen = sees(segments, positions, window)(rows, None, index[:, None], index)  # (B, T, T)
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]


def two_rows(segments, prompt_tokens):
    """Where the two causal rows of each pair, `[prompt | y1]` and `[prompt | y2]`, find their tokens in rows
    `[prompt | y1 | y2]`. They are laid end to end, each with its own length.

    Queries keep their order: those of the first row are prompt and y1, those of the second what follows, y2 and the padding,
    which no real token sees. The keys of the second row begin with a copy of the prompt.

    segments: (B, T), as `sees` has them.  prompt_tokens: P, those of all B prompts together.
    Returns, as int32: keys (B·T + P,), which of the B·T tokens each key is; where the queries of each of the 2B rows begin,
    and where its keys do, (2B + 1,) each, with the total at the end.
    """
    B, T = segments.shape
    prompt, first = (segments == 0).sum(-1), (segments == 1).sum(-1)  # (B,) tokens of each prompt, and of each y1
    query_counts = torch.stack([prompt + first, T - prompt - first], 1).flatten()  # (2B,)
    key_counts = torch.stack([prompt + first, T - first], 1).flatten()  # (2B,)
    query_starts, key_starts = (torch.nn.functional.pad(n.cumsum(0), (1, 0)) for n in (query_counts, key_counts))
    total = B * T + prompt_tokens  # known, because to add up key_counts would wait for the device
    row = torch.arange(2 * B, device=segments.device).repeat_interleave(key_counts, output_size=total)  # (B·T + P,)
    place, pair = torch.arange(total, device=segments.device) - key_starts[row], row // 2
    skipped = torch.where((row % 2 == 1) & (place >= prompt[pair]), first[pair], 0)  # y2 comes after y1
    return (pair * T + place + skipped).int(), query_starts.int(), key_starts.int()


def pair_attention(query, key, value, keys, query_starts, key_starts, scale):
    """Attention in rows `[prompt | y1 | y2]` by torch's FlashAttention, which takes no mask: each pair is two causal rows.

    query: (B, heads, T, D).  key: (B, KV heads, T, D).  value: (B, KV heads, T, E).  keys, query_starts, key_starts: of
    `two_rows`.  Returns (B, T, heads, E).
    """
    (B, _, T, D), E = query.shape, value.shape[-1]
    size = -(-max(D, E) // 8) * 8  # the kernel takes heads of one size, a multiple of 8

    def end_to_end(x):  # (B, h, T, d) -> (B·T, h, size)
        x = x.transpose(1, 2).flatten(0, 1)
        return x if x.shape[-1] == size else torch.nn.functional.pad(x, (0, size - x.shape[-1]))

    key, value = (end_to_end(x).index_select(0, keys) for x in (key, value))  # (B·T + P, KV heads, size)
    # A row's last query sees all its keys: where there are fewer queries than keys, the mask is aligned at their ends. Not
    # torch.nn.attention.varlen, which calls the same, because its arguments differ between torch 2.11 and 2.13.
    out = torch.ops.aten._flash_attention_forward(
        end_to_end(query), key, value, query_starts, key_starts, T, T, dropout_p=0.0, is_causal=True,
        return_debug_mask=False, scale=D ** -0.5 if scale is None else scale)[0]  # (B·T, heads, size)
    return out[..., :E].unflatten(0, (B, T))


class PairLogps(torch.nn.Module):
    """The module that the engine wraps: a causal language model that scores both responses of each pair.

    lm: a transformers causal LM.  chunk_size: response tokens that go through its head at a time.  takes_rows: whether its
    attention takes the indices of `two_rows` in place of a mask, as runtime/model.py arranges it.
    Everything runs inside `forward`, as ZeRO-3 demands.
    """

    # Layers that read only what the mask lets them read. Any other kind (linear attention, convolution, recurrent
    # state, chunked attention) lets y1 leak into y2 of a shared row.
    MASKED_LAYERS = {"full_attention", "sliding_attention"}
    # Attention implementations that take any mask; FlashAttention takes none.
    MASKED_ATTENTION = {"eager", "sdpa", "flex_attention"}
    SOFTCAPS = "final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"  # Gemma 2, RecurrentGemma, xLSTM

    def __init__(self, lm, chunk_size=2048, takes_rows=False):
        super().__init__()
        self.takes_rows = takes_rows
        self.lm = lm
        self.chunk_size = chunk_size
        self.compiled, self.score_logits, self.grad_logits = False, score_logits, grad_logits
        config = lm.config.get_text_config()  # of a model that also takes images, the part that reads text
        self.softcap = next((value for name in self.SOFTCAPS if (value := getattr(config, name, None))), None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)  # Cohere
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite
        self.scale /= float(getattr(config, "logits_mup_width_multiplier", None) or 1.0)  # Inkling
        self.layer_types = set(getattr(config, "layer_types", None) or ())
        self.window = getattr(config, "sliding_window", None)
        if getattr(config, "use_sliding_window", True) is False:
            self.window = None

    def compile_layers(self):
        """Compile (torch.compile) the layers of the model and the arithmetic on logits, for any B, T and N.

        Not the model as a whole: its layers share their code, which then is compiled once, in seconds.
        Returns the number of layers.
        """
        kinds = self.lm._no_split_modules or ()  # transformers' names of the classes of its layers
        layers = [module for module in self.lm.modules() if type(module).__name__ in kinds]
        for layer in layers:
            if getattr(layer, "gradient_checkpointing", False):
                # Checkpoint around the compiled layer. Inside it, torch would compile the recomputation as well.
                layer.gradient_checkpointing = False
                layer.forward = recomputed(torch.compile(layer.forward, dynamic=True))
            else:
                layer.compile(dynamic=True)
        self.compiled, self.score_logits, self.grad_logits = True, for_any_length(score_logits), for_any_length(grad_logits)
        return len(layers)

    def why_not_shared(self):
        """None where a row can hold `[prompt | y1 | y2]`, else the reason, for the user."""
        foreign = self.layer_types - self.MASKED_LAYERS
        if foreign or self.lm._is_stateful:
            return f"its layers carry state past the mask ({', '.join(sorted(foreign)) or 'recurrent'})"
        if "position_ids" not in signature(self.lm.base_model.forward).parameters:
            return "it takes no position_ids"
        if self.lm.config._attn_implementation not in self.MASKED_ATTENTION:
            return f"attn_implementation {self.lm.config._attn_implementation} takes no mask of our own"
        return None

    def forward(self, batch, per_token=None):
        """log π(y|x) = Σ_t log π(y_t | x, y_<t) of both responses.

        batch: a PairBatch (data.py).  per_token: "ours" returns the N summands instead, and "plain" those of
        plain_token_logps, for the check at start-up.  Returns (B, 2) fp32, an fp32 sum.
        """
        if per_token:
            return self.plain_token_logps(batch) if per_token == "plain" else self.token_logps(batch)
        logps = self.token_logps(batch)  # (N,)
        # unsafe: the check of the lengths would wait for the device.  (2B,) -> (B, 2)
        return torch.segment_reduce(logps, "sum", lengths=batch.lengths, initial=0.0, unsafe=True).view(-1, 2)

    def token_logps(self, batch):
        """Log-prob of each response token, pair by pair, y1 before y2: (N,) fp32."""
        # (N, H): only states that predict a response token reach the head
        states = self.hidden_states(batch).flatten(0, 1)[batch.sources]
        return token_logps(states, batch.targets, self.lm.get_output_embeddings(), self.chunk_size, self.scale,
                           self.softcap, self.score_logits, self.grad_logits)

    def hidden_states(self, batch):
        """The last hidden state of each token: (B, T, H), or (2B, T, H) in two rows a pair."""
        return self.lm.base_model(input_ids=batch.input_ids, attention_mask=self._mask(batch),
                                  position_ids=batch.positions if batch.shared else None, use_cache=False).last_hidden_state

    def _mask(self, batch):
        """The mask, or the dict of masks by kind of layer, that the model's forward takes."""
        if not batch.shared:
            return (batch.segments >= 0).long()  # (2B, T): plain padding; the model makes its own causal mask
        dtype = next(self.lm.parameters()).dtype
        flex = self.lm.config._attn_implementation == "flex_attention"

        def mask(window):
            if self.takes_rows and (window is None or window >= batch.longest):  # (1, 1, 1, B·T + P + 4B + 2) int32
                return torch.cat(two_rows(batch.segments, batch.prompt_tokens))[None, None, None]
            return attention_mask(batch.segments, batch.positions, dtype, window, flex)
        if "sliding_attention" in self.layer_types:
            return {kind: mask(self.window if kind == "sliding_attention" else None) for kind in self.layer_types}
        return mask(None if self.layer_types else self.window)

    def plain_token_logps(self, batch):
        """What token_logps returns, computed the ordinary way to check it: the model's own forward and log-softmax, row by
        row.

        batch: in two rows a pair.  Returns (N,) fp32.
        """
        logps = []
        for row, segments in zip(batch.input_ids, batch.segments):  # (T,) each
            row = row[segments >= 0]
            n = int((segments > 0).sum())
            logits = self.lm(input_ids=row[None], use_cache=False).logits[0, -n - 1:-1]  # (n, V)
            logps.append(logits.float().log_softmax(-1).gather(-1, row[-n:, None]).squeeze(-1))
        return torch.cat(logps)


class PairRewards(PairLogps):
    """A causal language model as a reward model: r(x, y) = Σ_t w · h_t over the last hidden states h of y's tokens.

    Its reward takes the place of the implicit one, β [log π_θ(y|x) − log π_ref(y|x)]. It too is a sum over tokens, and 0
    before the first step, where w is 0. Arguments as for PairLogps.
    """

    def __init__(self, lm, *arguments, **keywords):
        super().__init__(lm, *arguments, **keywords)
        embeddings, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        if head.weight is not embeddings.weight:
            head.requires_grad_(False)  # nothing reads it
        self.reward_head = torch.nn.Linear(embeddings.embedding_dim, 1, bias=False, dtype=embeddings.weight.dtype)
        torch.nn.init.zeros_(self.reward_head.weight)  # w

    def forward(self, batch, per_token=None):
        """r(x, y) of both responses: (B, 2) fp32, an fp32 sum.  per_token: log-probs, as PairLogps has them."""
        if per_token:
            return super().forward(batch, per_token)
        values = self.reward_head(self.hidden_states(batch)).squeeze(-1).float()  # (B, T)  w · h_t, or (2B, T)
        if batch.shared:
            return torch.stack([(values * (batch.segments == response)).sum(-1) for response in (1, 2)], -1)
        return (values * (batch.segments > 0)).sum(-1).view(-1, 2)


# ----------------------------------------------------------------------------------------------------------------------
# The head in chunks: skip this part on a first reading. It computes log softmax(logits)[target] without ever holding the
# (N, V) logits of a whole batch, which would be the largest tensor of a step by far.

class TokenLogps(torch.autograd.Function):
    """log softmax(logits)[target] of each state, with logits = softcap(scale · (h Wᵀ + b)), in fp32.

    forward(states (N, H), weight (V, H), bias (V,) or None, targets (N,), chunk_size, scale, softcap, score, grad_of)
    -> (N,) fp32.  score, grad_of: `score_logits` and `grad_logits`, compiled or not.
    Both directions go through the states in chunks, so that only one (chunk_size, V) block of logits exists at a time.
    Backward computes each block again, except the last one, which it starts with, and sums the weight's gradient in place.
    weight None: the states already are the logits h Wᵀ + b, (N, V).
    """

    @staticmethod
    def raw_logits(states, weight, bias):
        return states if weight is None else torch.nn.functional.linear(states, weight, bias)  # (n, V)

    @staticmethod
    def forward(ctx, states, weight, bias, targets, chunk_size, scale, softcap, score, grad_of):
        logps, lses, raw = [], [], None
        for h, t in zip(states.split(chunk_size), targets.split(chunk_size)):
            del raw  # otherwise two blocks would be in memory
            raw = TokenLogps.raw_logits(h, weight, bias)
            logp, lse = score(raw, t, scale, softcap)  # (n,)
            logps.append(logp)
            lses.append(lse)
        ctx.save_for_backward(states, weight, bias, targets, torch.cat(lses))
        ctx.raw = None if weight is None else raw  # not save_for_backward, which would keep it until backward has ended
        ctx.chunk_size, ctx.scale, ctx.softcap, ctx.grad_of = chunk_size, scale, softcap, grad_of
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad):
        states, weight, bias, targets, lses = ctx.saved_tensors
        raw, ctx.raw = ctx.raw, None
        chunks = [x.split(ctx.chunk_size) for x in (states, targets, lses, grad)]
        grad_states, grad_weight, grad_bias = [], None, None
        for h, t, lse, g in reversed(list(zip(*chunks))):
            raw = TokenLogps.raw_logits(h, weight, bias) if raw is None else raw
            d = ctx.grad_of(raw, t, lse, g, ctx.scale, ctx.softcap)  # (n, V)
            grad_states.append(d if weight is None else d @ weight)  # (n, H)
            if ctx.needs_input_grad[1]:  # (V, H)
                grad_weight = d.T @ h if grad_weight is None else grad_weight.addmm_(d.T, h)
            if ctx.needs_input_grad[2]:  # (V,)
                grad_bias = d.sum(0) if grad_bias is None else grad_bias.add_(d.sum(0))
            raw = d = None  # free them before the next block is computed
        return torch.cat(grad_states[::-1]), grad_weight, grad_bias, None, None, None, None, None, None


def final_logits(raw, scale, softcap):
    """softcap(scale · raw) in fp32: (n, V). This is `raw` itself if it is fp32 and has neither scale nor softcap."""
    logits = raw.float()
    if scale != 1.0:
        logits = logits * scale
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def score_logits(raw, targets, scale, softcap):
    """(log softmax(logits)[target], log Σ exp(logits)), (n,) fp32 each.  raw: (n, V).  targets: (n,)."""
    logits = final_logits(raw, scale, softcap)
    # In blocks of columns, because logsumexp copies its input.
    lse = torch.stack([block.logsumexp(-1) for block in logits.split(8192, dim=-1)]).logsumexp(0)
    return logits.gather(-1, targets[:, None]).squeeze(-1) - lse, lse


def grad_logits(raw, targets, lse, grad, scale, softcap):
    """The gradient of raw, (n, V) in its dtype: onehot(target) − softmax(logits), times the incoming gradient and the slopes
    of softcap and scale.

    raw: (n, V); its memory may be used again.  targets, lse, grad: (n,).
    """
    logits = final_logits(raw, scale, softcap)
    slope = 1 - (logits / softcap) ** 2 if softcap else None  # d softcap·tanh(u/softcap) / du = 1 − tanh²
    target = torch.arange(len(logits), device=raw.device), targets
    at_target = (logits[target] - lse).exp() * -grad + grad  # (n,)
    d = logits.sub_(lse[:, None]).exp_().mul_(-grad[:, None])
    if slope is not None:
        d.mul_(slope)
        at_target = at_target * slope[target]
    if scale != 1.0:
        d.mul_(scale)
        at_target = at_target * scale
    d = d.to(raw.dtype)
    d[target] = at_target.to(raw.dtype)  # last, so that a compiler need not hold d in fp32
    return d


def for_any_length(function):
    """`function`, compiled once for tensors of any length."""
    compiled = torch.compile(function)

    def call(*arguments):
        for tensor in filter(torch.is_tensor, arguments):
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
        return compiled(*arguments)
    return call


def recomputed(function):
    """`function`, whose activations are computed again in backward. It must draw no random numbers: their state is lost."""
    def call(*arguments, **keywords):
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)
    return call


def token_logps(states, targets, head, chunk_size, scale=1.0, softcap=None, score=score_logits, grad_of=grad_logits):
    """Log-prob of each target token, with the logits of no more than chunk_size tokens in memory at a time.

    states: (N, H), the states that predict the targets.  targets: (N,).  head: the LM head.
    score, grad_of: `score_logits` and `grad_logits`, or these two compiled.  Returns (N,) fp32.
    """
    rest = chunk_size, scale, softcap, score, grad_of

    def all_chunks(states):
        return TokenLogps.apply(states, head.weight, head.bias, targets, *rest)

    def one_chunk(h, t):
        return TokenLogps.apply(head(h), None, None, t, *rest)  # (n, H) -> (n, V) -> (n,)

    if type(head) is torch.nn.Linear:
        head.forward = all_chunks  # call the module itself, so that ZeRO-3's hooks gather its weight, in backward too
        try:
            return head(states)
        finally:
            del head.forward
    # We do not take apart a head of another kind, such as one with an adapter.
    return torch.cat([checkpoint(one_chunk, h, t, use_reentrant=False)
                      for h, t in zip(states.split(chunk_size), targets.split(chunk_size))])


# ----------------------------------------------------------------------------------------------------------------------
# python adpo.py

def worked_example():
    """Print one step of the method on four pairs with made-up log-probs, computed by the functions above.

    Pair 1: the policy is unsure. 2: it is sure and right. 3: it is sure and wrong. 4: a margin of exactly γ, which asks.
    """
    beta, gamma = 0.1, 1.3
    #                        y1     y2
    logps = torch.tensor([[-42.0, -45.0], [-51.0, -30.0], [-38.0, -58.0], [-43.0, -56.0]], requires_grad=True)  # π_θ
    ref_logps = torch.tensor([[-43.0, -44.0], [-44.0, -40.0], [-49.0, -51.0], [-50.0, -50.0]])  # π_ref
    truth = torch.tensor([-1.0, -1.0, -1.0, 1.0])  # o, the annotator's answers: hidden from the policy until it asks

    rewards = implicit_rewards(logps, ref_logps, beta)
    margin = margins(rewards)
    ask = gate(margin, gamma)
    labels = choose_labels(margin, answers=torch.where(ask, truth, 0.0))  # an answer that was not asked for is not seen
    loss = preference_loss(margin, labels)
    slope, = torch.autograd.grad(loss.mean(), margin)  # −o σ(−o·m) / B
    dpo = preference_loss(margin, choose_labels(margin, truth)).mean()

    print(f"""\
r(x, y) = β [log π_θ(y|x) − log π_ref(y|x)]     m = r(x, y1) − r(x, y2)     β = {beta}, γ = {gamma}
|m| ≤ γ: ask, o is the annotator's answer       |m| > γ: do not ask, o = sign(m)

      log π_θ(y|x)  log π_ref(y|x)     r(x, y)                                −log σ(o·m)
pair    y1     y2      y1     y2      y1     y2       m  ask?   o  from              loss   ∂L/∂m""")
    for n in range(len(margin)):
        numbers = [*logps[n].tolist(), *ref_logps[n].tolist(), *rewards[n].tolist(), margin[n].item()]
        source = "the annotator" if ask[n] else "sign(m)" if labels[n] == truth[n] else "sign(m), WRONG"
        print("{:3}  {:5.0f}  {:5.0f}   {:5.0f}  {:5.0f}   {:+5.1f}  {:+5.1f}   {:+5.1f}".format(n + 1, *numbers),
              f" {'yes' if ask[n] else 'no':4}  {labels[n]:+.0f}  {source:14}  {loss[n]:.3f}  {slope[n]:+.3f}")
    print(f"""
L = mean loss = {loss.mean():.3f}, with {ask.sum()} labels bought; with all {len(ask)}, as in plain DPO, it is {dpo:.3f}.
The step moves each m against ∂L/∂m, that is towards its o. Pair 3 is the price of not asking: its
loss is small, as if it were learned, and the policy becomes surer of the wrong response.""")


if __name__ == "__main__":
    worked_example()
