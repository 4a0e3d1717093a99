"""Ranges of least error, against a search in float64."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from support.moments import columns_of
from torch import Tensor

from teq_graph.config import BITS, WeightSpec
from teq_graph.quantization import Grid, dequantize, find_clipped_grid, find_grid, quantize
from teq_graph.quantization.clip import NARROWEST, OFFSETS, STEPS

SPECS = [WeightSpec(*values) for values in itertools.product(BITS, (16, 32, -1), (False, True))]
PARTS = [1 - (1 - NARROWEST) * step / STEPS for step in range(STEPS)]


def group_errors(weight: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """Weighted squared error of each group in float64 [N, nb], from the definition of codes."""
    of = torch.arange(weight.shape[1]) // grid.block_size
    scale, zero = columns_of(grid, weight.shape[1])
    codes = ((weight.double() / scale).round() + zero).clamp(0, 2**grid.bits - 1)
    error = ((codes - zero) * scale - weight.double()).square() * importance.double()
    return torch.zeros_like(grid.scales, dtype=torch.float64).index_add_(1, of, error)


def tried_grids(weight: Tensor, spec: WeightSpec) -> list[Grid]:
    """Every part of the range, with every zero point near its own; the whole range first."""
    grids = [find_grid(weight, spec, part=part) for part in PARTS]
    if spec.symmetric:
        return grids
    moved = [
        dataclasses.replace(g, zero_points=(g.zero_points.short() + offset).clamp(0, 2**spec.bits - 1).byte())
        for offset in OFFSETS
        for g in grids
        if g.zero_points is not None
    ]
    return [*grids, *moved]


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("k", [96, 83, 5])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_group_has_the_part_of_least_error(spec: WeightSpec, k: int, weighted: bool) -> None:
    weight = torch.randn(7, k) * torch.randn(7, 1).exp()
    importance = torch.randn(k).mul(2).exp() if weighted else torch.ones(k)
    grid = find_clipped_grid(weight, spec, importance=importance if weighted else None)
    whole = find_grid(weight, spec)
    assert (grid.bits, grid.block_size, grid.scales.shape) == (whole.bits, whole.block_size, whole.scales.shape)
    assert (grid.zero_points is None) == spec.symmetric
    errors = group_errors(weight, grid, importance)
    tried = torch.stack([group_errors(weight, one, importance) for one in tried_grids(weight, spec)])
    torch.testing.assert_close(errors, tried.amin(0), rtol=1e-5, atol=1e-10)
    assert bool((errors <= tried[0] * (1 + 1e-5)).all())
    assert spec.bits > 3 or k < 16 or float(errors.sum()) < 0.99 * float(tried[0].sum())


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_part_of_the_range(spec: WeightSpec) -> None:
    weight, part = torch.randn(7, 83), float(torch.empty(()).uniform_(NARROWEST, 1))
    whole, grid = find_grid(weight, spec), find_grid(weight, spec, part=part)
    torch.testing.assert_close(grid.scales, whole.scales * part, rtol=1e-6, atol=0)
    zeros = grid.zero_points_as_float() - whole.zero_points_as_float()
    assert zeros.abs().max() <= (0 if spec.symmetric else 1) and float((zeros != 0).double().mean()) < 0.01


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_scales_are_numbers_of_their_dtype(spec: WeightSpec, scale_dtype: torch.dtype) -> None:
    weight, importance = torch.randn(6, 70) * 1e-3, torch.rand(70)
    weight[2] = 0
    grid = find_clipped_grid(weight, spec, scale_dtype, importance)
    assert torch.equal(grid.scales.to(scale_dtype).float(), grid.scales)
    assert grid.zero_points is None or grid.zero_points.dtype == torch.uint8
    codes = quantize(weight, grid)
    assert int(codes.max()) < 2**spec.bits
    assert torch.equal(dequantize(codes, grid)[2], torch.zeros(70))
    whole = find_grid(weight, spec, scale_dtype)
    assert bool((group_errors(weight, grid, importance) <= group_errors(weight, whole, importance) * (1 + 1e-5)).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_half_precision_are_taken_as_they_are(dtype: torch.dtype) -> None:
    weight, importance = torch.randn(5, 48).to(dtype), torch.rand(48)
    before = weight.clone()
    grid = find_clipped_grid(weight, WeightSpec(3, 16), dtype, importance)
    same = find_clipped_grid(weight.float(), WeightSpec(3, 16), dtype, importance)
    assert torch.equal(grid.scales, same.scales)
    assert grid.zero_points is not None and same.zero_points is not None
    assert torch.equal(grid.zero_points, same.zero_points)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_an_outlier_is_clipped_where_its_column_is_unimportant(bits: int, symmetric: bool) -> None:
    spec, outliers = WeightSpec(bits, 32, symmetric), torch.tensor([2.5, -2.5])
    weight = torch.empty(8, 64).uniform_(-1, 1)
    weight[:, [3, 9]] = outliers
    unimportant, important = torch.ones(64), torch.ones(64)
    unimportant[[3, 9]], important[[3, 9]] = 1e-6, 1e6
    whole = find_grid(weight, spec)
    clipped = find_clipped_grid(weight, spec, importance=unimportant)
    kept = find_clipped_grid(weight, spec, importance=important)
    assert bool((clipped.scales[:, 0].abs() < 0.8 * whole.scales[:, 0].abs()).all())
    values = [dequantize(quantize(weight, grid), grid)[:, [3, 9]] for grid in (clipped, kept, whole)]
    assert float(values[0].abs().max()) < 2.2
    errors = [float((value - outliers).square().sum()) for value in values]
    assert errors[1] <= errors[2] * (1 + 1e-5) < errors[0]


def test_columns_without_importance_leave_the_whole_range() -> None:
    weight = torch.randn(4, 32)
    grid = find_clipped_grid(weight, WeightSpec(2, 16), importance=torch.zeros(32))
    assert torch.equal(grid.scales, find_grid(weight, WeightSpec(2, 16)).scales)
