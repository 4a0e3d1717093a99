"""Coordinate descent on codes and scales against its definition, each column and group in turn in float64."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from support.moments import columns_of, correlated, damped_moments, moments_of, output_error
from torch import Tensor

from teq_graph.config import BITS, WeightSpec
from teq_graph.errors import NumericsError
from teq_graph.quantization import Grid, dequantize, descend, find_clipped_grid, find_grid, gptq, quantize
from teq_graph.quantization.gptq import COLUMNS

SPECS = [WeightSpec(*values) for values in itertools.product(BITS, (16, 32, -1), (False, True))]
SPECS += [WeightSpec(2, 16, True, levels) for levels in (2, 3)]


def plain_descent(weight: Tensor, moments: Tensor, codes: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """One sweep: each column's code, then each group's scale, is where the error is least, the others given."""
    matrix, k = damped_moments(moments), weight.shape[1]
    scales, (_, zero) = grid.scales.double().clone(), columns_of(grid, k)
    chosen = codes.double()
    group = torch.arange(k) // grid.block_size

    def lost() -> Tensor:
        return weight.double() - (chosen - zero) * scales[:, group]

    for column in range(k):
        rest = lost()
        rest[:, column] = 0
        # Where the derivative by this column's value is zero.
        best = weight[:, column].double() + rest @ matrix[:, column] / matrix[column, column]
        steps = best / scales[:, group[column]]
        chosen[:, column] = grid.codes.nearest(steps, zero[:, column])
    for block in range(scales.shape[1]):
        values = (chosen - zero) * (group == block)
        rest = lost() + values * scales[:, [block]]
        below = ((values @ matrix) * values).sum(1)
        best = ((rest @ matrix) * values).sum(1) / below
        scales[:, block] = torch.where(below > 0, best, scales[:, block])
    return chosen, scales


def started(spec: WeightSpec, k: int, rows: int) -> dict[str, Any]:
    """A weight, moments of its inputs, and what GPTQ makes of it."""
    inputs, weight = correlated(400, k), torch.randn(rows, k)
    moments = moments_of(inputs)
    grid = find_grid(weight, spec)
    return dict(weight=weight, moments=moments, codes=gptq(weight, moments, grid), grid=grid)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_a_sweep_is_that_of_the_definition(spec: WeightSpec) -> None:
    given = started(spec, COLUMNS + 21, 8)
    before = given["codes"].clone(), given["grid"].scales.clone()
    expected, scales = plain_descent(**given)
    codes, grid = descend(**given, sweeps=1)
    assert torch.equal(given["codes"], before[0]) and torch.equal(given["grid"].scales, before[1])
    assert codes.dtype == torch.uint8 and codes.is_contiguous() and grid.zero_points is given["grid"].zero_points
    # A row in which a tie falls to the other side goes its own way from there on.
    same = (codes == expected).all(dim=1)
    assert int(same.sum()) >= 7
    assert torch.allclose(grid.scales[same].double(), scales[same], rtol=1e-3)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_each_sweep_brings_outputs_nearer(spec: WeightSpec) -> None:
    k = 2 * COLUMNS + 7
    inputs, weight = correlated(600, k), torch.randn(24, k)
    moments = moments_of(inputs)
    grid = find_clipped_grid(weight, spec, importance=moments.diagonal())
    codes = gptq(weight, moments, grid)
    results = [(codes, grid), *(descend(weight, moments, codes, grid, sweeps=sweeps) for sweeps in (1, 3))]
    # Of each row what descent minimises, and of all the error on the inputs themselves.
    lost = [weight.double() - dequantize(*result).double() for result in results]
    errors = [((rows @ damped_moments(moments)) * rows).sum(1) for rows in lost]
    assert bool((errors[1] <= errors[0] * (1 + 1e-5)).all() and (errors[2] <= errors[1] * (1 + 1e-5)).all())
    assert output_error(weight, *results[1], inputs) < 0.95 * output_error(weight, *results[0], inputs)


def test_weights_on_the_grid_stay() -> None:
    k = 96
    moments = moments_of(correlated(400, k))
    grid = find_grid(torch.randn(8, k), WeightSpec(3, 32))
    codes = torch.randint(0, 8, (8, k), dtype=torch.uint8)
    after, same = descend(dequantize(codes, grid), moments, codes, grid, sweeps=2)
    assert torch.equal(after, codes) and torch.allclose(same.scales, grid.scales, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_are_those_that_are_stored(dtype: torch.dtype) -> None:
    weight, moments = torch.randn(8, 64), moments_of(correlated(400, 64))
    grid = find_grid(weight, WeightSpec(4, 16), dtype)
    _, fitted = descend(weight, moments, gptq(weight, moments, grid), grid, dtype)
    assert torch.equal(fitted.scales.to(dtype).float(), fitted.scales)
    assert not torch.equal(fitted.scales, grid.scales)


def test_channels_and_weights_that_are_zero() -> None:
    weight = torch.randn(8, 64)
    weight[:, 16:32] = 0
    grid = find_grid(weight, WeightSpec(4, 16))
    zero = torch.zeros(64, 64)
    codes, fitted = descend(weight, zero, quantize(weight, grid), grid, sweeps=1)
    assert torch.equal(codes, quantize(weight, grid)) and not dequantize(codes, fitted)[:, 16:32].any()
    assert fitted.scales.isfinite().all() and (fitted.scales != 0).all()


@pytest.mark.parametrize("factor", [1e-10, 1e30])
def test_the_size_of_the_inputs_leaves_no_trace(factor: float) -> None:
    given = started(WeightSpec(3, 16), 64, 8)
    codes, grid = descend(**given)
    again, same = descend(**{**given, "moments": given["moments"] * factor})
    assert torch.equal(again, codes) and torch.allclose(same.scales, grid.scales, rtol=1e-4)


def test_moments_that_are_not_finite() -> None:
    weight = torch.randn(4, 32)
    grid = find_grid(weight, WeightSpec(4, 16))
    with pytest.raises(NumericsError, match=r"second moments .* accepted are finite numbers"):
        descend(weight, torch.full((32, 32), torch.nan), quantize(weight, grid), grid)
