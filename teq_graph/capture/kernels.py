"""How Hugging Face models compute their recurrences over tokens, while they are captured."""

from __future__ import annotations

import contextlib
import contextvars
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


_read: contextvars.ContextVar[list[Tensor]] = contextvars.ContextVar("what the last layer has read of its states")
"""Set while kernels are replaced."""


def read_state(state: Tensor) -> None:
    """Say that a layer has read `state` [b, d, n], or [b, heads, d, n], to go on from there."""
    if (states := _read.get(None)) is not None:
        states[:] = [state] if state.dim() == 3 else state.unbind(1)


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan (arXiv 2312.00752) as the package `mamba_ssm` has it, from the state that the layer has read.

    hidden_states, dt, z: [b, d, t]; A: [d, n]; B, C: [b, n, t]; D, delta_bias: [d]. Theirs begins from nothing. Each
    channel d is a head whose value has one channel, and the scans of several heads take their states in turn.
    """
    states = _read.get()
    state = states.pop(0) if states else hidden_states.new_zeros(hidden_states.shape[0], *A.shape)
    steps = _steps(dt.transpose(1, 2), delta_bias, delta_softplus)
    values = hidden_states.transpose(1, 2).to(torch.float32)
    decay = steps[..., None] * A.to(torch.float32)
    query, key = (x.transpose(1, 2)[:, :, None].to(torch.float32).expand_as(decay) for x in (C, B))
    added = (steps * values)[..., None]
    output, last = torch.ops.teq_graph.linear_attention(query, key, added, decay, None, state[..., None], 1.0)
    result = output.squeeze(-1).transpose(1, 2).to(hidden_states.dtype)
    if D is not None:
        result = result + hidden_states * D[:, None]
    if z is not None:
        result = result * nn.functional.silu(z)
    return (result, last.squeeze(-1)) if return_last_state else result


def chunked_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,  # noqa: ARG001  by name
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """The scan of state space duality (arXiv 2405.21060) as the package `mamba_ssm` has it, in one operator.

    hidden_states: [b, t, h, p]; dt: [b, t, h]; A, D, dt_bias: [h]; B, C: [b, t, g, n], with g a divisor of h;
    initial_states: [b, h, p, n].
    """
    heads = hidden_states.shape[2]
    steps = _steps(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    values = hidden_states.to(torch.float32)
    query, key = (x.to(torch.float32).repeat_interleave(heads // x.shape[2], dim=2) for x in (C, B))
    if initial_states is None:
        initial_states = values.new_zeros(values.shape[0], heads, values.shape[3], key.shape[3])
    known = initial_states.transpose(2, 3)
    output, last = torch.ops.teq_graph.linear_attention(
        query, key, values * steps[..., None], steps * A.to(torch.float32), None, known, 1.0
    )
    if D is not None:
        output = output + values * D[:, None]
    return (output, last.transpose(2, 3)) if return_final_states else output


def _steps(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """How far each channel or head goes on, from what is computed of a token and in its type, as in transformers."""
    if bias is not None:
        dt = dt + bias.to(dt.dtype)
    return (nn.functional.softplus(dt) if softplus else dt).to(torch.float32)


FROM_NOTHING = "selective_scan_fn"
"""The kernel that begins without a state, whatever the cache holds: for one token alone, transformers has another."""

TRACEABLE: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(
        ("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule", "chunk_kda", "fused_recurrent_kda"), delta_rule
    ),
    "mamba_chunk_scan_combined": chunked_scan,
    FROM_NOTHING: selective_scan,
}
"""Kernels that transformers takes from other packages where they are installed, by the names that it knows them by."""


def ignores_states(model: nn.Module) -> bool:
    """Whether a Hugging Face model computes several tokens as if none were before them."""
    return any(_kernel_name(function) == FROM_NOTHING for _, _, function in _functions(model))


@contextlib.contextmanager
def traceable_kernels(model: nn.Module) -> Iterator[bool]:
    """While a Hugging Face model's recurrences are single operators, where its own Python is a loop over tokens; gives
    whether it has any."""
    replaced: list[tuple[Any, str, Any]] = []
    before = _read.set([])
    try:
        for source, name, function in _functions(model):
            if (kernel := TRACEABLE.get(_kernel_name(function))) is not None:
                replaced.append((source, name, function))
                setattr(source, name, kernel)
        yield bool(replaced)
    finally:
        _read.reset(before)
        for source, name, function in replaced:
            setattr(source, name, function)


def _functions(model: nn.Module) -> list[tuple[Any, str, Any]]:
    """What the source files of the model's classes know by name: the files, the names and what they stand for."""
    sources = map(sys.modules.get, {type(module).__module__ for module in model.modules()})
    return [(source, name, value) for source in sources if source is not None for name, value in vars(source).items()]


def _kernel_name(function: Any) -> str:
    """What transformers calls the kernel that `function` stands for; empty for other things."""
    if not inspect.isfunction(function) or not hasattr(function, "__wrapped__"):
        return ""
    name = inspect.getclosurevars(function).nonlocals.get("func_name")
    return name if isinstance(name, str) else ""
