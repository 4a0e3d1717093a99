"""Reference mathematics of com.microsoft::GroupQueryAttention, for the operator of that name in `teq_graph.ops`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of x [b, h, s, d].

    cos, sin: [s, r / 2], for each position of x; channels from r on stay as they are. A pair is turned as one:
    channels (i, i + r / 2), or (2 i, 2 i + 1) if `interleaved`.
    """
    width = 2 * cos.shape[-1]
    turned, rest = x[..., :width], x[..., width:]
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    parts = (first * cos - second * sin, second * cos + first * sin)
    joined = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([joined, rest], -1)


def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    bias: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    num_heads: int,
    kv_num_heads: int,
    scale: float,
    softcap: float,
    window: int,
    interleaved: bool,
    grow: Callable[[Tensor, Tensor], Tensor] = lambda past, new: torch.cat([past, new], 2),
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a KV cache: output [b, s, h * d], present key and value [b, kv, p + s, d].

    query: [b, s, h * d]; key, value: [b, s, kv * d]; or all three packed in query. past_key, past_value:
    [b, kv, p, d]. bias: [b or 1, h or 1, s, p + s], added to the scaled scores. cos, sin: [positions, r / 2], by the
    position in the cache; None where nothing is rotated. softcap: scores become softcap * tanh(scores / softcap)
    before the bias, 0 where they are left alone. window: keys that a query sees, itself included; -1: all before it.
    grow: how a past becomes present.
    """
    batch, length = query.shape[:2]
    if key is None or value is None:
        width = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        query, key, value = query.split([num_heads * width, kv_num_heads * width, kv_num_heads * width], -1)
    q, k, v = (x.view(batch, length, -1, past_key.shape[-1]).transpose(1, 2) for x in (query, key, value))
    past = past_key.shape[2]
    if cos is not None and sin is not None:
        positions = slice(past, past + length)
        q, k = (rotate(x, cos[positions], sin[positions], interleaved) for x in (q, k))
    keys, values = grow(past_key, k), grow(past_value, v)
    wide = torch.promote_types(q.dtype, torch.float32)
    # The queries that share a head are rows of one product with it: its keys and values are not repeated.
    shared = q.reshape(batch, kv_num_heads, -1, q.shape[-1])
    scores = (shared @ keys.transpose(-1, -2)).to(wide).view(batch, num_heads, length, -1) * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    ahead = torch.arange(keys.shape[2], device=q.device) - torch.arange(past, past + length, device=q.device)[:, None]
    hidden = ahead > 0 if window < 0 else (ahead > 0) | (ahead <= -window)
    weights = functional.softmax((scores + bias.to(wide)).masked_fill(hidden, -torch.inf), -1).to(q.dtype)
    output = weights.view(batch, kv_num_heads, -1, keys.shape[2]) @ values
    return output.view(batch, num_heads, length, -1).transpose(1, 2).flatten(2), keys, values
