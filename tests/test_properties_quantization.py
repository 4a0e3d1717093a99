"""Grids, codes and packing of any shape and any finite numbers, against their definitions in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from teq_graph.config import BITS, GROUP_SIZES, WeightSpec
from teq_graph.errors import NumericsError
from teq_graph.quantization import (
    Grid,
    dequantize,
    fake_quantize,
    find_clipped_grid,
    find_grid,
    num_blocks,
    quantize,
    quantize_weight,
    resolve_block_size,
)
from teq_graph.quantization.packing import pack_codes, pack_zero_points, unpack_codes, unpack_zero_points

BLOCKS = (8, 16, 24, 32, 64, 72, 128, 256)
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HUGE = float(np.finfo(np.float32).max)


def packbits(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The codes of the last axis as a little-endian bit stream, low bits first."""
    stream = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


@st.composite
def codes_of(draw: st.DrawFn) -> tuple[int, int, np.ndarray[Any, Any]]:
    """Bits, block size, and codes [N, K]."""
    bits, block = draw(st.sampled_from(BITS)), draw(st.sampled_from(BLOCKS))
    shape = draw(st.integers(1, 9)), draw(st.integers(1, 3 * block))
    fill = st.integers(0, 2**bits - 1)
    return bits, block, draw(arrays.arrays(np.uint8, shape, elements=fill, fill=fill))


@given(codes_of(), st.data())
def test_codes_are_packed_as_numpy_does(case: tuple[int, int, np.ndarray[Any, Any]], data: st.DataObject) -> None:
    bits, block, codes = case
    n, k = codes.shape
    blocks = num_blocks(k, block)
    pad = data.draw(arrays.arrays(np.uint8, (n, blocks), elements=st.integers(0, 2**bits - 1)))
    packed = pack_codes(torch.from_numpy(codes), bits, block, torch.from_numpy(pad))
    full = np.concatenate([codes, np.repeat(pad[:, -1:], blocks * block - k, axis=1)], axis=1)
    assert np.array_equal(packed.numpy(), packbits(full.reshape(n, blocks, block), bits))
    assert np.array_equal(unpack_codes(packed, bits, k).numpy(), codes)
    assert np.array_equal(unpack_codes(packed, bits).numpy(), full)
    zeros = pack_zero_points(torch.from_numpy(pad), bits)
    assert np.array_equal(zeros.numpy(), packbits(pad, bits))
    assert np.array_equal(unpack_zero_points(zeros, bits, blocks).numpy(), pad)


@st.composite
def weights(draw: st.DrawFn, largest: float = HUGE) -> Tensor:
    """Float32 [N, K] of any finite numbers: of all sizes, of like size, constant rows, zeros, denormals."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 70))
    bound = min(largest, draw(st.sampled_from([1e-44, 1e-38, 1e-6, 1.0, 1e6, HUGE])))
    bound = float(np.float32(bound))
    elements = st.floats(-bound, bound, width=32)
    return torch.from_numpy(draw(arrays.arrays(np.float32, shape, elements=elements, fill=elements)))


specs = st.builds(WeightSpec, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), st.booleans())


def by_element(grid: Grid, values: Tensor, k: int) -> Tensor:
    """Numbers [N, nb] of groups, for each element: float64 [N, K]."""
    return values.double().repeat_interleave(grid.block_size, dim=1)[:, :k]


def rounding_of(grid: Grid, spec: WeightSpec, dtype: torch.dtype, k: int) -> Tensor:
    """How far the value of a code may be from the element, float64 [N, K]."""
    # Half a step; of symmetric codes, which lack a level on one side, a whole one there. A scale that is rounded down
    # moves the ends of a group by 2**bits of its half ulps; float32 arithmetic by a few of its own.
    steps = 1.0 if spec.symmetric else 0.5
    steps += 2**spec.bits * (torch.finfo(dtype).eps / 2 + 2 * torch.finfo(torch.float32).eps)
    return by_element(grid, grid.scales.abs(), k) * steps


@given(weights(), specs, st.sampled_from(SCALE_DTYPES))
@example(torch.full((1, 1), HUGE), WeightSpec(2, 16, False), torch.float32)
@example(torch.tensor([[HUGE, -HUGE]]), WeightSpec(8, 16, False), torch.float32)
@example(torch.full((1, 1), 3.3895e38), WeightSpec(2, 16, False), torch.bfloat16)
@example(torch.full((1, 1), 1e-45), WeightSpec(2, 16, True), torch.float32)
def test_no_element_is_further_than_half_a_step(weight: Tensor, spec: WeightSpec, dtype: torch.dtype) -> None:
    k = weight.shape[1]
    try:
        grid = find_grid(weight, spec, dtype)
    except NumericsError:
        # Only where no scale of that dtype reaches the ends of a group, or float32 does not hold their distance.
        levels = 2 ** (spec.bits - 1) if spec.symmetric else 2**spec.bits - 1
        distance = float(weight.abs().max()) * (1 if spec.symmetric else 2)
        assert distance > 0.99 * min(HUGE, levels * torch.finfo(dtype).max)
        return
    assert bool(grid.scales.isfinite().all()) and bool((grid.scales != 0).all())
    assert torch.equal(grid.scales.to(dtype).float(), grid.scales)
    assert grid.block_size == resolve_block_size(k, spec.group_size)
    codes = quantize(weight, grid)
    assert int(codes.max()) < 2**spec.bits
    values = dequantize(codes, grid)
    exact = (codes.double() - by_element(grid, grid.zero_points_as_float(), k)) * by_element(grid, grid.scales, k)
    assert bool(values.isfinite().all())
    assert bool(((values.double() - exact).abs() <= 2e-7 * exact.abs() + 1e-44).all())
    assert bool(((values.double() - weight.double()).abs() <= rounding_of(grid, spec, dtype, k)).all())
    assert torch.equal(fake_quantize(weight, spec, scale_dtype=dtype), values)
    stored = quantize_weight(weight, spec, dtype)
    assert torch.equal(stored.dequantize(), values)
    assert torch.equal(stored.for_onnxruntime().dequantize(), values)


@given(weights(largest=1e18), specs)
def test_clipping_is_never_worse(weight: Tensor, spec: WeightSpec) -> None:
    """By the squared error, which float32 holds for the numbers of this test."""
    assume(float(weight.abs().max()) == 0 or float(weight.abs().max()) > 1e-15)
    errors = []
    for find in (find_clipped_grid, find_grid):
        grid = find(weight, spec)
        values = dequantize(quantize(weight, grid), grid)
        assert bool(values.isfinite().all())
        errors.append(float((values - weight).double().square().sum()))
    clipped, whole = errors
    assert clipped <= whole * (1 + 1e-5)
