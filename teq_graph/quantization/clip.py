"""Narrower ranges: the grid of least error, where round-to-nearest takes the whole range of each group."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from teq_graph.config import WeightSpec
from teq_graph.quantization.grid import Grid, find_grid, find_least_squares_grid, split_groups

STEPS = 20
NARROWEST = 0.5
"""The smallest part of a group's range that is tried."""


def find_clipped_grid(
    weight: Tensor, spec: WeightSpec, scale_dtype: torch.dtype = torch.float32, importance: Tensor | None = None
) -> Grid:
    """The grid of a weight [N, K] whose groups each have the range, of `STEPS` parts of their own, of least error.

    The error is the squared difference to the weight, each column weighted by its `importance` >= 0, [K] or [N, K] (the
    mean square of the input channel); all columns count alike where it is None. The whole range is among those tried.
    Of two or three levels it is the least error of all ranges.
    """
    if spec.levels is not None:
        return find_least_squares_grid(weight, spec, scale_dtype, importance)
    weight = weight.detach().to(torch.float32)
    best: Grid | None = None
    best_error = torch.empty(0)
    for step in range(STEPS):
        part = 1 - (1 - NARROWEST) * step / STEPS
        grid = find_grid(weight, spec, scale_dtype, part)
        error = _group_errors(weight, grid, importance)
        if best is None:
            best, best_error = grid, error
            continue
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        zeros = best.zero_points
        if zeros is not None and grid.zero_points is not None:
            zeros = torch.where(better, grid.zero_points, zeros)
        best = dataclasses.replace(best, scales=torch.where(better, grid.scales, best.scales), zero_points=zeros)
    assert best is not None
    return best


def _group_errors(weight: Tensor, grid: Grid, importance: Tensor | None) -> Tensor:
    """Weighted squared error of each group, float32 [N, nb]."""
    zeros = grid.zero_points_as_float()
    columns = torch.ones_like(weight[:1]) if importance is None else torch.atleast_2d(importance).to(weight)
    errors = []
    for (groups, of), (share, _) in zip(
        split_groups(weight, grid.block_size), split_groups(columns, grid.block_size), strict=True
    ):
        scale, zero = grid.scales[:, of, None], zeros[:, of, None]
        rounded = grid.codes.nearest(groups / scale, zero).sub_(zero).mul_(scale)
        errors.append(rounded.sub_(groups).square_().mul_(share).sum(-1))
    return torch.cat(errors, dim=1)
