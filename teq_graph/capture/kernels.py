"""How Hugging Face models compute their recurrences over tokens, while they are captured."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import teq_graph.ops  # noqa: F401  (registers the operators)


def delta_rule(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """The gated delta rule as the package `fla` (flash-linear-attention) has it, in one operator.

    query, key: [b, t, heads, dk], with as many heads as `value` [b, t, h, dv] or a divisor of them; g: [b, t, h] or
    [b, t, h, dk]; beta: [b, t, h]; initial_state: [b, h, dk, dv].
    """
    dtype, heads = query.dtype, value.shape[2]
    query, key, value, g, beta = (tensor.to(torch.float32) for tensor in (query, key, value, g, beta))
    if key.shape[2] != heads:
        query, key = (tensor.repeat_interleave(heads // key.shape[2], dim=2) for tensor in (query, key))
    if use_qk_l2norm_in_kernel:
        query, key = (tensor * torch.rsqrt(tensor.square().sum(-1, keepdim=True) + 1e-6) for tensor in (query, key))
    if initial_state is None:
        initial_state = value.new_zeros(value.shape[0], heads, key.shape[3], value.shape[3])
    scale = key.shape[-1] ** -0.5
    output, state = torch.ops.teq_graph.linear_attention(query, key, value, g, beta, initial_state, scale)
    return output.to(dtype), state if output_final_state else None


TRACEABLE: dict[str, Callable[..., Any]] = dict.fromkeys(
    ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "chunk_kda", "fused_recurrent_kda"), delta_rule
)
"""Kernels that transformers takes from other packages where they are installed, by the names that it knows them by."""


@contextlib.contextmanager
def traceable_kernels(model: nn.Module) -> Iterator[None]:
    """While a Hugging Face model's recurrences are single operators, where its own Python is a loop over tokens."""
    sources = {type(module).__module__ for module in model.modules()}
    replaced: list[tuple[Any, str, Any]] = []
    try:
        for source in map(sys.modules.get, sources):
            for name, function in list(vars(source).items()) if source is not None else ():
                if (kernel := TRACEABLE.get(_kernel_name(function))) is not None:
                    replaced.append((source, name, function))
                    setattr(source, name, kernel)
        yield
    finally:
        for source, name, function in replaced:
            setattr(source, name, function)


def _kernel_name(function: Any) -> str:
    """What transformers calls the kernel that `function` stands for; empty for other things."""
    if not inspect.isfunction(function) or not hasattr(function, "__wrapped__"):
        return ""
    name = inspect.getclosurevars(function).nonlocals.get("func_name")
    return name if isinstance(name, str) else ""
