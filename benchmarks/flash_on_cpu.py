"""torch's FlashAttention for sequences of any length, on a CPU: plain stand-ins for the two kernels that adpo.pair_attention
calls, which torch has for GPUs alone. To import this module is to register them with torch.

They are slow, refuse what the real ones refuse, and know no dropout and no window. `python benchmarks/gpu.py --only rows`
compares the real ones with attention with a mask.
"""

import math

import torch

LIBRARY = torch.library.Library("aten", "IMPL")


def sequences(query, key, query_starts, key_starts, scale):
    """Yield (queries of a sequence, its keys, attention weights (heads, queries, keys)); the mask is aligned at the ends."""
    for n in range(len(query_starts) - 1):
        here, there = (slice(starts[n], starts[n + 1]) for starts in (query_starts, key_starts))
        scores = torch.einsum("qhd,khd->hqk", query[here], key[there]) * (scale or query.shape[2] ** -0.5)
        queries, keys = scores.shape[1:]
        seen = torch.arange(keys) <= torch.arange(queries)[:, None] + keys - queries
        yield here, there, scores.masked_fill(~seen, -math.inf).softmax(-1)


@torch.library.impl(LIBRARY, "_flash_attention_forward", "CPU")
def forward(query, key, value, query_starts, key_starts, most_queries, most_keys, dropout_p, is_causal, return_debug_mask,
            scale=None, **rest):
    """query: (Q, heads, D).  key, value: (K, KV heads, D).  Returns (Q, heads, D) and four tensors that nothing reads."""
    size, groups = query.shape[2], query.shape[1] // key.shape[1]
    if not size == key.shape[2] == value.shape[2] or size % 8 or size > 256:
        raise RuntimeError(f"FlashAttention does not take heads of {size}, {key.shape[2]} and {value.shape[2]}")
    assert is_causal and not dropout_p and query_starts.dtype == key_starts.dtype == torch.int32
    assert (query.shape[0], key.shape[0]) == (query_starts[-1], key_starts[-1])
    assert (query_starts.diff() <= most_queries).all() and (key_starts.diff() <= most_keys).all()
    out, nothing = torch.empty_like(query), query.new_empty(0)
    lse = query.new_empty(query.shape[1], query.shape[0], dtype=torch.float32)  # of the real shape; `backward` needs none
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    for here, there, weights in sequences(query, key, query_starts, key_starts, scale):
        out[here] = torch.einsum("hqk,khd->qhd", weights, value[there])
    return out, lse, nothing, nothing, nothing


@torch.library.impl(LIBRARY, "_flash_attention_backward", "CPU")
def backward(grad, query, key, value, out, lse, query_starts, key_starts, most_queries, most_keys, dropout_p, is_causal,
             seed, offset, scale=None, **rest):
    """The gradients of query, key and value, in their shapes."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    grads = [torch.zeros_like(x) for x in (query, key, value)]
    for here, there, weights in sequences(query, key, query_starts, key_starts, scale):
        slopes = torch.einsum("qhd,khd->hqk", grad[here], value[there])
        slopes = weights * (slopes - (grad[here] * out[here]).sum(-1).T[..., None]) * (scale or query.shape[2] ** -0.5)
        grads[0][here] = torch.einsum("hqk,khd->qhd", slopes, key[there])
        grads[1][there] = torch.einsum("hqk,qhd->khd", slopes, query[here])
        grads[2][there] = torch.einsum("hqk,qhd->khd", weights, grad[here])
    return grads[0], *(x.unflatten(1, (-1, groups)).sum(2) for x in grads[1:])
