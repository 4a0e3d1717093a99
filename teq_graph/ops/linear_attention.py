"""Reference mathematics of attention over a state that a fixed number of numbers holds, for the operator in
`teq_graph.ops`."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from teq_graph.errors import InputError

CHUNKS = {True: 64, False: 16}
"""Tokens that are computed at once, by whether all channels of a key fade alike: where not, each pair of tokens takes
memory for every channel."""


def check_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> None:
    """Raises InputError for sizes that do not fit together."""
    if key.dim() != 4 or value.dim() != 4:
        raise InputError(f"key {list(key.shape)}, value {list(value.shape)}: accepted are [b, t, h, channels]")
    (batch, tokens, heads, width), channels = key.shape, value.shape[3]
    expected: dict[str, tuple[Tensor, list[tuple[int, ...]]]] = {
        "query": (query, [(batch, tokens, heads, width)]),
        "value": (value, [(batch, tokens, heads, channels)]),
        "decay": (decay, [(batch, tokens, heads), (batch, tokens, heads, width)]),
        "state": (state, [(batch, heads, width, channels)]),
    }
    if beta is not None:
        expected["beta"] = (beta, [(batch, tokens, heads)])
    for name, (tensor, shapes) in expected.items():
        if tuple(tensor.shape) not in shapes:
            accepted = " or ".join(str(list(shape)) for shape in shapes)
            raise InputError(f"{name} {list(tensor.shape)}: accepted is {accepted}")


def linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """The gated delta rule (arXiv 2412.06464), and what it leaves: of each token and head, in float32,

        S = exp(g) S + beta k (v - exp(g) Sᵀ k)ᵀ
        output = scale Sᵀ q

    Without beta nothing is taken back of what the state has for a key (arXiv 2312.06635): S = exp(g) S + k vᵀ.
    query, key: [b, t, h, dk]; value: [b, t, h, dv]; decay g <= 0: [b, t, h], or [b, t, h, dk] where each channel of a
    key fades by itself (arXiv 2510.26692); beta: [b, t, h]; state S: [b, h, dk, dv]. The output [b, t, h, dv] has the
    type of `value`, the new state that of `state`.
    """
    check_linear_attention(query, key, value, decay, beta, state)
    exact = torch.promote_types(value.dtype, torch.float32)
    known = state.to(exact)
    alike = decay.dim() == 3
    if alike:
        decay = decay[..., None]
    # Heads before tokens, so that all products are of matrices.
    tensors = [tensor.to(exact).transpose(1, 2) for tensor in (query, key, value, decay)]
    # Where each channel fades by itself and nothing is taken back, pairs of tokens cost more than the tokens.
    tokens = 1 if beta is None and not alike else CHUNKS[alike]
    parts = zip(*(tensor.split(tokens, dim=2) for tensor in tensors), strict=True)
    betas: Iterable[Tensor | None] = itertools.repeat(None)
    if beta is not None:
        betas = beta[..., None].to(exact).transpose(1, 2).split(tokens, dim=2)
    outputs = []
    for (q, k, v, g), b in zip(parts, betas, strict=False):
        output, known = _token(q, k, v, g, known) if tokens == 1 else _chunk(q, k, v, g, b, known, alike)
        outputs.append(output)
    output = torch.cat(outputs, dim=2).mul(scale)
    return output.transpose(1, 2).to(value.dtype).contiguous(), known.to(state.dtype)


def _token(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token [b, h, 1, …], of which nothing is taken back."""
    state = decay.exp().mT * state + key.mT * value
    return (query.mT * state).sum(2, keepdim=True), state


def _chunk(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor, alike: bool
) -> tuple[Tensor, Tensor]:
    """Tokens [b, h, c, …] at once: what each adds to the state depends on those before it by a triangular system
    (section 3.3 of arXiv 2412.06464)."""
    faded = decay.cumsum(2)
    since = faded.exp()
    # Of token i what is left of j, with nothing of later ones: [b, h, i, j, dk or 1].
    later = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool, device=key.device).triu(1)
    left = (faded[:, :, :, None] - faded[:, :, None]).masked_fill(later[..., None], float("-inf")).exp()

    def pairs(rows: Tensor) -> Tensor:
        if alike:
            return rows @ key.transpose(-1, -2) * left[..., 0]
        return torch.einsum("bhid,bhjd,bhijd->bhij", rows, key, left)

    added = value
    if beta is not None:
        known = beta * (value - (key * since) @ state)
        added = torch.linalg.solve_triangular(pairs(beta * key), known, upper=False, unitriangular=True)
    output = (query * since) @ state + pairs(query) @ added
    until_end = (faded[:, :, -1:] - faded).exp()
    return output, since[:, :, -1, :, None] * state + (key * until_end).transpose(-1, -2) @ added


def remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ARG001  by names
    """What the backward pass of `linear_attention` reads."""
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


def linear_attention_backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all tensors, computed from the inputs anew."""
    wanted = ctx.needs_input_grad[:-1]
    with torch.enable_grad():
        tensors: list[Any] = [  # without beta, None in its place
            None if tensor is None else tensor.detach().requires_grad_(want)
            for tensor, want in zip(ctx.saved_tensors, wanted, strict=True)
        ]
        query, key, value, decay, beta, state = tensors
        outputs = linear_attention(query, key, value, decay, beta, state, ctx.scale)
        differentiable = [tensor for tensor, want in zip(tensors, wanted, strict=True) if want]
        found = iter(torch.autograd.grad(outputs, differentiable, gradients))
    return *(next(found) if want else None for want in wanted), None
