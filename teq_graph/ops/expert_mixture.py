"""Reference mathematics of com.microsoft::QMoE, for the operator `expert_mixture_nbits` in `teq_graph.ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn import functional

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "relu": functional.relu,
    "gelu": lambda x: functional.gelu(x, approximate="tanh"),
    "identity": lambda x: x,
}
"""Those that are not gated, by QMoE's names."""

GATED = "swiglu"


def activate(x: Tensor, activation: str, alpha: float, beta: float, limit: float | None) -> Tensor:
    """What QMoE makes of the first product's result x [T, I], or [T, 2 I] where it is gated.

    Gated, the gates g are the even channels and l the odd ones: min(g, limit) * sigmoid(alpha * min(g, limit)) *
    (clamp(l, -limit, limit) + beta).
    """
    if activation != GATED:
        return ACTIVATIONS[activation](x)
    gate, linear = x[..., ::2], x[..., 1::2]
    if limit is not None:
        gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (linear + beta)


def expert_mixture(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    first: Callable[[Tensor, Tensor], Tensor],
    second: Callable[[Tensor, Tensor], Tensor],
    between: Callable[[Tensor], Tensor],
) -> Tensor:
    """The weighted sum of what the chosen experts make of each token, [T, N].

    x: [T, K]; chosen: int64 [T, k], different experts for each token; weights: [T, k]. `first` and `second` are the
    experts' products of rows and their experts, `between` what stands between them.
    """
    experts = chosen.flatten()
    rows = x.repeat_interleave(chosen.shape[1], 0)
    results = second(between(first(rows, experts)), experts)
    summed: Tensor = (results.unflatten(0, chosen.shape) * weights[..., None]).sum(1)
    return summed
