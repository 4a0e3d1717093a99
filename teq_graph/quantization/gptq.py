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
    k = weight.shape[1]
    order = torch.argsort(moments.diagonal(), descending=True)
    factor = _inverse_factor(moments[order][:, order], damping)
    rest = weight.detach().to(torch.float32)[:, order]
    scales = _per_column(grid.scales, grid.block_size, k)[:, order]
    zeros = _per_column(grid.zero_points_as_float(), grid.block_size, k)[:, order]
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for first in range(0, k, COLUMNS):
        within = slice(first, min(first + COLUMNS, k))
        # Contiguous columns: the inner loop works on one at a time.
        columns = rest[:, within].t().contiguous()
        errors = torch.empty_like(columns)
        for offset, column in enumerate(columns):
            at = first + offset
            scale, zero = scales[:, at], zeros[:, at]
            code = grid.codes.nearest(column / scale, zero)
            codes[:, order[at]] = code.to(torch.uint8)
            errors[offset] = (column - (code - zero) * scale) / factor[at, at]
            columns[offset + 1 :] -= factor[at, at + 1 : within.stop, None] * errors[offset]
        rest[:, within.stop :] -= errors.t() @ factor[within, within.stop :]
    return codes


def _inverse_factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the damped moments, float32 [K, K]."""
    if not bool(moments.isfinite().all()):
        raise NumericsError("second moments of a linear's inputs: NaN or infinity; accepted are finite numbers")
    # One name for all, so that no more than two such matrices are alive.
    matrix = moments.to(torch.float64, copy=True)
    # A channel that is always zero has no say; any positive number keeps the matrix invertible.
    matrix.diagonal().add_(damping * matrix.diagonal().mean().clamp(min=1e-12))
    matrix = torch.linalg.cholesky(matrix)
    matrix = torch.cholesky_inverse(matrix)
    matrix = torch.linalg.cholesky(matrix, upper=True)
    factor: Tensor = matrix.to(torch.float32)
    return factor


def _per_column(values: Tensor, block: int, k: int) -> Tensor:
    """Values of groups [N, nb] repeated for their columns [N, K]."""
    return values.repeat_interleave(block, dim=1)[:, :k]
