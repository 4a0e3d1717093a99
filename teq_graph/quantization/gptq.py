"""Codes by second-order error compensation: GPTQ (arXiv 2210.17323)."""

from __future__ import annotations

import torch
from torch import Tensor

from teq_graph.errors import NumericsError
from teq_graph.quantization.grid import Grid

DAMPING = 0.01  # arXiv 2210.17323, section 3.3: of the mean diagonal
COLUMNS = 64
"""Columns that are rounded before their errors are passed on to all later ones."""


def gptq(weight: Tensor, moments: Tensor, grid: Grid, damping: float = DAMPING) -> Tensor:
    """Codes uint8 [N, K] on `grid` for a weight [N, K] that reads inputs x with second moments `moments` [K, K].

    Minimises the error of the outputs, E‖x (W - Ŵ)ᵀ‖²: columns are rounded one after the other, and each one's
    error is made up for by those not yet rounded, as the Cholesky factor of the inverse moments says. Columns with
    the largest moments come first («act-order»); the grid is fixed beforehand, so their order leaves no trace in the
    storage. Moments are damped by `damping` times their mean diagonal.

    Raises NumericsError for moments that are not finite.
    """
    order = torch.argsort(moments.diagonal(), descending=True)
    factor = _inverse_factor(moments[order][:, order], damping)
    # Columns of the weight as rows: the loop works on one at a time.
    rest = weight.detach().to(torch.float32).t()[order]
    scales, zeros = grid.scales.t().contiguous(), grid.zero_points_as_float().t().contiguous()
    block_of = (order // grid.block_size).tolist()
    codes = torch.empty(rest.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, len(rest), COLUMNS):
        within = slice(first, min(first + COLUMNS, len(rest)))
        columns = rest[within]
        errors = torch.empty_like(columns)
        for offset, at in enumerate(range(within.start, within.stop)):
            column, scale, zero = columns[offset], scales[block_of[at]], zeros[block_of[at]]
            code = grid.codes.nearest(column / scale, zero)
            codes[at] = code
            torch.sub(column, code.sub_(zero).mul_(scale), out=errors[offset]).div_(factor[at, at])
            columns[offset + 1 :].addr_(factor[at, at + 1 : within.stop], errors[offset], alpha=-1)
        rest[within.stop :] -= factor[within, within.stop :].t() @ errors
    return torch.empty_like(codes).index_copy_(0, order, codes).t().contiguous()


def damped(moments: Tensor, damping: float = DAMPING) -> Tensor:
    """Moments, float64 [K, K], with `damping` times their mean diagonal added to it.

    Raises NumericsError for moments that are not finite.
    """
    if not bool(moments.isfinite().all()):
        raise NumericsError("second moments of a linear's inputs: NaN or infinity; accepted are finite numbers")
    matrix = moments.to(torch.float64, copy=True)
    # A channel that is always zero has no say; any positive number keeps the matrix invertible.
    matrix.diagonal().add_(damping * matrix.diagonal().mean().clamp(min=1e-12))
    return matrix


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments, float32 [K, K]."""
    # One name for all, so that no more than two such matrices are alive.
    matrix = damped(moments, damping)
    matrix = torch.linalg.cholesky(matrix)
    matrix = torch.cholesky_inverse(matrix)
    matrix = torch.linalg.cholesky(matrix, upper=True)
    factor: Tensor = matrix.to(torch.float32)
    return factor
