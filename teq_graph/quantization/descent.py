"""Codes and scales that already make up for one another, each once more while the others stay."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from teq_graph.quantization.gptq import COLUMNS, damped
from teq_graph.quantization.grid import Grid, round_scales


def descend(
    weight: Tensor,
    moments: Tensor,
    codes: Tensor,
    grid: Grid,
    scale_dtype: torch.dtype = torch.float32,
    sweeps: int = 2,
) -> tuple[Tensor, Grid]:
    """Codes uint8 [N, K] and scales of a weight [N, K] that leave no larger an error of the outputs, E‖x (W - Ŵ)ᵀ‖².

    Coordinate descent on what `gptq` minimises, from the `codes` and `grid` that it left. A sweep gives each column in
    turn its best code, all others given (QuantEase, arXiv 2309.01885, section 3.2), then each group in turn its best
    scale, codes and other groups given: where pᵢ is the derivative of a row's error by its column i, halved and
    negative, column i wants to be pᵢ / Hᵢᵢ larger, and a group of codes r a scale that is pᵀr / rᵀHr larger. Scales are
    rounded to `scale_dtype`. Moments [K, K] are damped as for `gptq`.
    """
    matrix = damped(moments)
    # In units of their mean, whose products float32 holds whatever the inputs' size is.
    matrix = (matrix / matrix.diagonal().mean()).to(torch.float32)
    diagonal = matrix.diagonal()
    # Columns of the weight as rows: the loops work on one at a time.
    scales = grid.scales.t().clone(memory_format=torch.contiguous_format)
    zeros = grid.zero_points_as_float().t().contiguous()
    chosen = codes.t().to(torch.float32, memory_format=torch.contiguous_format)
    block_of = [column // grid.block_size for column in range(len(chosen))]
    kept = (chosen - zeros[block_of]).mul_(scales[block_of])
    pull = matrix @ weight.detach().to(torch.float32).t().sub(kept)
    del kept
    for _ in range(sweeps):
        for first in range(0, len(chosen), COLUMNS):
            within = slice(first, min(first + COLUMNS, len(chosen)))
            # What the columns of a run change is passed on to all others at its end.
            own, changes = pull[within].clone(), torch.empty_like(pull[within])
            for offset, column in enumerate(range(within.start, within.stop)):
                scale, zero = scales[block_of[column]], zeros[block_of[column]]
                code = chosen[column]
                better = grid.codes.nearest((code - zero).add_(own[offset] / (scale * diagonal[column])), zero)
                torch.mul(better - code, scale, out=changes[offset])
                own[offset + 1 :].addr_(matrix[column, column + 1 : within.stop], changes[offset], alpha=-1)
                chosen[column] = better
            pull -= matrix[:, within] @ changes
        for block in range(len(scales)):
            of = slice(block * grid.block_size, (block + 1) * grid.block_size)
            values = chosen[of] - zeros[block]
            spread = (values * (matrix[of, of] @ values)).sum(0)
            step = (pull[of] * values).sum(0) / spread
            # A group whose codes are all zero has any scale.
            better = torch.where(spread > 0, round_scales(scales[block] + step, scale_dtype), scales[block])
            pull -= matrix[:, of] @ (values * (better - scales[block]))
            scales[block] = better
    return chosen.to(torch.uint8).t().contiguous(), dataclasses.replace(grid, scales=scales.t().contiguous())
