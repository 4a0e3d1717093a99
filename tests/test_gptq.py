"""GPTQ against its definition, column by column in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.moments import columns_of, correlated, damped_moments, moments_of, output_error
from torch import Tensor

from teq_graph.config import BITS, WeightSpec
from teq_graph.errors import NumericsError
from teq_graph.quantization import Grid, find_clipped_grid, find_grid, gptq, quantize
from teq_graph.quantization.gptq import COLUMNS

SPECS = [WeightSpec(*values) for values in itertools.product(BITS, (16, 32, -1), (False, True))]


def plain_gptq(weight: Tensor, moments: Tensor, grid: Grid) -> Tensor:
    """arXiv 2210.17323, section 3, without its blocks and factors: after each column the inverse of what is left.

    The best change of the columns that are left is H[left, left]^-1 H[left, column] times the column's error.
    """
    k = weight.shape[1]
    hessian = damped_moments(moments)
    scale, zero = columns_of(grid, k)
    rest, codes = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.uint8)
    order = sorted(range(k), key=lambda column: -float(moments[column, column]))
    for position, column in enumerate(order):
        code = ((rest[:, column] / scale[:, column]).round() + zero[:, column]).clamp(0, 2**grid.bits - 1)
        codes[:, column] = code.to(torch.uint8)
        error = rest[:, column] - (code - zero[:, column]) * scale[:, column]
        left = order[position + 1 :]
        if left:
            share = torch.linalg.solve(hessian[left][:, left], hessian[left, column])
            rest[:, left] += error[:, None] * share
    return codes


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_those_of_the_definition(spec: WeightSpec) -> None:
    k = COLUMNS + 21
    weight, moments = torch.randn(6, k), moments_of(correlated(300, k))
    grid = find_grid(weight, spec)
    codes, expected = gptq(weight, moments, grid), plain_gptq(weight, moments, grid)
    assert codes.dtype == torch.uint8 and codes.shape == weight.shape
    # A row in which a tie falls to the other side goes its own way from there on.
    same = (codes == expected).all(dim=1)
    assert int(same.sum()) >= 5
    assert int((quantize(weight, grid) != expected).any(dim=1).sum()) == 6


@pytest.mark.parametrize("clipped", [False, True], ids=["whole", "clipped"])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_outputs_are_nearer_than_those_of_round_to_nearest(spec: WeightSpec, clipped: bool) -> None:
    k = 2 * COLUMNS + 7
    inputs, weight = correlated(600, k), torch.randn(24, k)
    moments = moments_of(inputs)
    grid = find_clipped_grid(weight, spec, importance=moments.diagonal()) if clipped else find_grid(weight, spec)
    codes = gptq(weight, moments, grid)
    assert int(codes.max()) < 2**spec.bits
    nearest = output_error(weight, quantize(weight, grid), grid, inputs)
    assert output_error(weight, codes, grid, inputs) < 0.8 * nearest


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("k", [1, 2, COLUMNS - 1, COLUMNS, COLUMNS + 1, 2 * COLUMNS + 30])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_uncorrelated_inputs_give_round_to_nearest(spec: WeightSpec, k: int, n: int) -> None:
    weight = torch.randn(n, k)
    grid = find_grid(weight, spec)
    assert torch.equal(gptq(weight, torch.eye(k), grid), quantize(weight, grid))
    assert torch.equal(gptq(weight, torch.randn(k).exp().diag(), grid), quantize(weight, grid))
    assert torch.equal(gptq(weight, torch.zeros(k, k), grid), quantize(weight, grid))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (1, 40), (7, 3), (1, COLUMNS), (3, 2 * COLUMNS), (2, COLUMNS + 1)])
def test_small_shapes(n: int, k: int) -> None:
    weight, moments = torch.randn(n, k), moments_of(correlated(100, k))
    grid = find_grid(weight, WeightSpec(4, 16))
    codes, expected = gptq(weight, moments, grid), plain_gptq(weight, moments, grid)
    assert int((codes == expected).all(dim=1).sum()) >= n - 1
    assert float((codes != expected).double().mean()) <= 0.1


@pytest.mark.parametrize("bits", BITS)
def test_dead_channels_are_rounded_to_nearest_and_change_nothing(bits: int) -> None:
    k = COLUMNS + 10
    inputs, weight = correlated(300, k), torch.randn(9, k)
    dead = torch.randperm(k)[:20]
    inputs[:, dead] = 0
    moments = moments_of(inputs)
    grid = find_grid(weight, WeightSpec(bits, 16))
    codes = gptq(weight, moments, grid)
    assert torch.equal(codes[:, dead], quantize(weight, grid)[:, dead])
    assert output_error(weight, codes, grid, inputs) < output_error(weight, quantize(weight, grid), grid, inputs)


@pytest.mark.parametrize("factor", [1e-10, 1e-4, 1e4, 1e12, 1e30])
def test_the_size_of_the_inputs_leaves_no_trace(factor: float) -> None:
    k = COLUMNS + 10
    weight, moments = torch.randn(9, k), moments_of(correlated(300, k))
    moments = moments / moments.diagonal().mean()
    grid = find_grid(weight, WeightSpec(3, 16))
    codes, expected = gptq(weight, moments * factor, grid), gptq(weight, moments, grid)
    assert int((codes == expected).all(dim=1).sum()) >= 8


def test_fewer_inputs_than_channels() -> None:
    """Moments of rank 5, which only the damping makes invertible."""
    inputs, weight = correlated(5, 300) * 100, torch.randn(9, 300)
    grid = find_grid(weight, WeightSpec(4, 32))
    codes = gptq(weight, moments_of(inputs), grid)
    nearest = output_error(weight, quantize(weight, grid), grid, inputs)
    assert output_error(weight, codes, grid, inputs) < 0.05 * nearest


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_the_order_of_the_channels_leaves_no_trace(bits: int, symmetric: bool) -> None:
    k = COLUMNS + 16
    weight, moments = torch.randn(8, k), moments_of(correlated(300, k))
    spec, order = WeightSpec(bits, -1, symmetric), torch.randperm(k)
    permuted = weight[:, order]
    codes = gptq(weight, moments, find_grid(weight, spec))
    again = gptq(permuted, moments[order][:, order], find_grid(permuted, spec))
    assert int((codes[:, order] == again).all(dim=1).sum()) >= 7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weights_of_half_precision_are_taken_as_they_are(dtype: torch.dtype) -> None:
    weight, moments = torch.randn(5, 80).to(dtype), moments_of(correlated(200, 80))
    before = weight.clone(), moments.clone()
    grid = find_grid(weight, WeightSpec(4, 16), dtype)
    assert torch.equal(gptq(weight, moments, grid), gptq(weight.float(), moments, grid))
    assert torch.equal(weight, before[0]) and torch.equal(moments, before[1])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_moments_that_are_not_finite(value: float) -> None:
    weight, moments = torch.randn(3, 16), torch.eye(16)
    moments[2, 5] = value
    with pytest.raises(NumericsError, match="second moments") as caught:
        gptq(weight, moments, find_grid(weight, WeightSpec(4, 16)))
    assert "\n" not in str(caught.value)
