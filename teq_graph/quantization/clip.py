"""Narrower ranges: the grid of least error, where round-to-nearest takes the whole range of each group."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from teq_graph.config import WeightSpec
from teq_graph.quantization.grid import Grid, find_grid, find_least_squares_grid, split_groups

STEPS = 10
NARROWEST = 0.5
"""The smallest part of a group's range that is tried."""
OFFSETS = (-1, 0, 1)
"""What is added to the zero point of each range."""


def find_clipped_grid(
    weight: Tensor, spec: WeightSpec, scale_dtype: torch.dtype = torch.float32, importance: Tensor | None = None
) -> Grid:
    """The grid of a weight [N, K] whose groups each have the range, of `STEPS` parts of their own, and the zero point,
    of those near it, of least error: both together, as in NeUQI (arXiv 2505.17595).

    The error is the squared difference to the weight, each column weighted by its `importance` >= 0, [K] or [N, K] (the
    mean square of the input channel); all columns count alike where it is None. The whole range is among those tried.
    Of two or three levels it is the least error of all ranges.
    """
    if spec.levels is not None:
        return find_least_squares_grid(weight, spec, scale_dtype, importance)
    weight = weight.detach().to(torch.float32)
    best: Grid | None = None
    least = torch.empty(0)
    for step in range(STEPS):
        part = 1 - (1 - NARROWEST) * step / STEPS
        for grid, error in _near(weight, find_grid(weight, spec, scale_dtype, part), importance):
            if best is None:
                best, least = grid, error
                continue
            better = error < least
            least = torch.where(better, error, least)
            zeros = best.zero_points
            if zeros is not None and grid.zero_points is not None:
                zeros = torch.where(better, grid.zero_points, zeros)
            scales = torch.where(better, grid.scales, best.scales)
            best = dataclasses.replace(best, scales=scales, zero_points=zeros)
    assert best is not None
    return best


def _near(weight: Tensor, grid: Grid, importance: Tensor | None) -> Iterator[tuple[Grid, Tensor]]:
    """The grid, and the same with its zero points moved, each with the weighted squared error of each group, float32
    [N, nb]."""
    columns = torch.ones_like(weight[:1]) if importance is None else torch.atleast_2d(importance).to(weight)
    codes, zeros = grid.codes, grid.zero_points_as_float()
    moved = [zeros]
    if grid.zero_points is not None:
        moved = [(zeros + offset).clamp(codes.first, codes.last) for offset in OFFSETS]
    errors: list[list[Tensor]] = [[] for _ in moved]
    for (groups, of), (share, _) in zip(
        split_groups(weight, grid.block_size), split_groups(columns, grid.block_size), strict=True
    ):
        scale = grid.scales[:, of, None]
        steps = (groups / scale).round_()
        for zero, found in zip(moved, errors, strict=True):
            kept = steps.clamp(codes.first - zero[:, of, None], codes.last - zero[:, of, None])
            found.append(kept.mul_(scale).sub_(groups).square_().mul_(share).sum(-1))
    for zero, found in zip(moved, errors, strict=True):
        zero_points = None if grid.zero_points is None else zero.to(torch.uint8)
        yield dataclasses.replace(grid, zero_points=zero_points), torch.cat(found, dim=1)
