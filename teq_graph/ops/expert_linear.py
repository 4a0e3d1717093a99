"""Reference mathematics of linears whose rows each belong to one of several experts, for the operators in
`teq_graph.ops`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from teq_graph.errors import InputError


def rows_by_expert(experts: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has rows, and their indices [t], in order."""
    # Most calls of a decoder have a row or few for each expert: one sort, and one look at the numbers.
    order = torch.argsort(experts, stable=True)
    counts = torch.bincount(experts, minlength=num_experts).tolist()
    if len(counts) > num_experts:
        raise InputError(f"experts up to {len(counts) - 1}: accepted are 0 to {num_experts - 1}")
    for expert, rows in enumerate(order.split(counts)):
        if len(rows):
            yield expert, rows


def check_expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, num_experts: int) -> None:
    """Raises InputError for sizes and types that do not fit together."""
    check_experts(x, experts, num_experts)
    if weight.dim() != 2 or weight.shape[0] % num_experts or weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise InputError(
            f"weight {list(weight.shape)} {weight.dtype}: accepted is [{num_experts} * N, {x.shape[1]}] {x.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[:1] or bias.dtype != x.dtype):
        raise InputError(f"bias {list(bias.shape)} {bias.dtype}: accepted is [{weight.shape[0]}] {x.dtype}")


def check_experts(x: Tensor, experts: Tensor, num_experts: int) -> None:
    """Raises InputError for rows and experts that do not fit together."""
    if num_experts < 1:
        raise InputError(f"num_experts={num_experts}: accepted is at least 1")
    if x.dim() != 2 or experts.dtype != torch.int64 or experts.dim() != 1 or experts.shape[0] != x.shape[0]:
        raise InputError(
            f"input {list(x.shape)} with experts {list(experts.shape)} {experts.dtype}: "
            "accepted are [T, K] and [T] torch.int64"
        )


def expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, num_experts: int) -> Tensor:
    """Row t is x[t] times the matrix of expert experts[t], plus its bias: [T, N].

    x: [T, K]; weight: [num_experts * N, K], the rows of one expert after those of another; bias: [num_experts * N];
    experts: int64 [T]. Only the matrices of chosen experts are read.
    """
    check_expert_linear(x, weight, bias, experts, num_experts)
    matrices = weight.unflatten(0, (num_experts, -1))
    biases = None if bias is None else bias.unflatten(0, (num_experts, -1))

    def product(rows: Tensor, expert: int) -> Tensor:
        return torch.nn.functional.linear(rows, matrices[expert], None if biases is None else biases[expert])

    return for_each_expert(x, experts, num_experts, matrices.shape[1], product)


def for_each_expert(
    x: Tensor, experts: Tensor, num_experts: int, width: int, product: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """`product` of the rows of x [T, K] of each expert, and that expert, in the rows' own order: [T, width]."""
    result = x.new_empty(len(x), width)
    for expert, rows in rows_by_expert(experts, num_experts):
        result[rows] = product(x[rows], expert)
    return result


def remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001  torch calls it by names
    """What the backward pass of `expert_linear` reads."""
    x, weight, bias, experts, ctx.num_experts = inputs
    ctx.save_for_backward(x, weight, experts)
    ctx.has_bias = bias is not None


def expert_linear_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias."""
    x, weight, experts = ctx.saved_tensors
    matrices = weight.unflatten(0, (ctx.num_experts, -1))
    wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    of_x = torch.zeros_like(x) if wants_x else None
    of_weight = torch.zeros_like(matrices) if wants_weight else None
    of_bias = gradient.new_zeros(matrices.shape[:2]) if wants_bias and ctx.has_bias else None
    for expert, rows in rows_by_expert(experts, ctx.num_experts):
        of_rows = gradient[rows]
        if of_x is not None:
            of_x[rows] = of_rows @ matrices[expert]
        if of_weight is not None:
            torch.mm(of_rows.t(), x[rows], out=of_weight[expert])
        if of_bias is not None:
            of_bias[expert] = of_rows.sum(0)
    flat = [None if grad is None else grad.flatten(0, 1) for grad in (of_weight, of_bias)]
    return of_x, *flat, None, None
