"""Bit streams against numpy's packbits, and stored weights against onnxruntime's MatMulNBits."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from teq_graph.config import BITS, GROUP_SIZES, WeightSpec
from teq_graph.errors import ConfigError, InputError
from teq_graph.quantization import (
    QuantizedWeight,
    dequantize,
    find_grid,
    num_blocks,
    quantize,
    quantize_weight,
)
from teq_graph.quantization.packing import pack_codes, pack_zero_points, unpack_codes, unpack_zero_points

SHAPES = [(64, 16), (70, 16), (70, 32), (300, 128), (20, 24), (13, 16), (256, 256), (40, 40), (8, 8), (1000, 1000)]


def packbits(codes: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The codes of the last axis as a little-endian bit stream, low bits first."""
    stream = (codes[..., None] >> np.arange(bits)) & 1
    return np.packbits(stream.reshape(*codes.shape[:-1], -1).astype(np.uint8), axis=-1, bitorder="little")


@pytest.mark.parametrize(("k", "block"), SHAPES)
@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_numpy_does(bits: int, k: int, block: int) -> None:
    n, blocks = 5, num_blocks(k, block)
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    pad = torch.randint(0, 2**bits, (n, blocks), dtype=torch.uint8)
    before = codes.clone()
    packed = pack_codes(codes, bits, block, pad)
    full = torch.cat([codes, pad[:, -1:].expand(n, blocks * block - k)], dim=1).numpy()
    assert packed.dtype == torch.uint8
    assert packed.is_contiguous()
    assert np.array_equal(packed.numpy(), packbits(full.reshape(n, blocks, block), bits))
    assert torch.equal(codes, before)
    assert torch.equal(unpack_codes(packed, bits, k), codes)
    assert np.array_equal(unpack_codes(packed, bits).numpy(), full)
    constant = unpack_codes(pack_codes(codes, bits, block, 1), bits)
    assert torch.equal(constant[:, :k], codes)
    assert torch.all(constant[:, k:] == 1)


@pytest.mark.parametrize("blocks", [1, 2, 3, 5, 7, 8, 9, 31])
@pytest.mark.parametrize("bits", BITS)
def test_zero_points_are_packed_as_numpy_does(bits: int, blocks: int) -> None:
    zero_points = torch.randint(0, 2**bits, (6, blocks), dtype=torch.uint8)
    packed = pack_zero_points(zero_points, bits)
    assert np.array_equal(packed.numpy(), packbits(zero_points.numpy(), bits))
    assert torch.equal(unpack_zero_points(packed, bits, blocks), zero_points)
    with pytest.raises(InputError, match="zero_points"):
        unpack_zero_points(packed, bits, blocks + 8)


@pytest.mark.parametrize("bits", BITS)
def test_views_are_packed_and_unpacked(bits: int) -> None:
    codes = torch.randint(0, 2**bits, (64, 7), dtype=torch.uint8)
    packed = pack_codes(codes.t(), bits, 16, 0)
    assert torch.equal(unpack_codes(packed, bits), codes.t())
    # Storage that starts at an odd byte, and rows of a larger tensor.
    shifted = torch.cat([torch.zeros(1, dtype=torch.uint8), packed.flatten()])[1:].view(packed.shape)
    assert torch.equal(unpack_codes(shifted, bits), codes.t())
    assert torch.equal(unpack_codes(packed[2:5], bits), codes.t()[2:5])
    assert torch.equal(unpack_codes(packed[::2], bits), codes.t()[::2])
    # One row of one block, cut out of a longer row: contiguous, with a stride that is no multiple of anything.
    wide = torch.cat([packed[:1].flatten(), torch.zeros(1, dtype=torch.uint8)])[None]
    cut = wide[:, None, : 2 * bits]
    assert torch.equal(unpack_codes(cut, bits), codes.t()[:1, :16])


def test_packing_refusals() -> None:
    codes = torch.zeros(2, 16, dtype=torch.uint8)
    for function in (
        lambda: pack_codes(codes, 5, 16, 0),
        lambda: unpack_codes(codes[:, None], 5),
        lambda: pack_zero_points(codes, 5),
        lambda: unpack_zero_points(codes, 5, 16),
    ):
        with pytest.raises(ConfigError, match="bits=5"):
            function()
    with pytest.raises(ConfigError, match="block_size=12"):
        pack_codes(codes, 4, 12, 0)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("k", [256, 300, 20])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_stored_weights_dequantize_to_the_grid_s_values(
    bits: int, group_size: int, symmetric: bool, k: int, scale_dtype: torch.dtype
) -> None:
    spec = WeightSpec(bits, group_size, symmetric)
    weight = torch.randn(6, k)
    grid = find_grid(weight, spec, scale_dtype)
    values = dequantize(quantize(weight, grid), grid)
    stored = quantize_weight(weight, spec, scale_dtype)
    blocks = grid.scales.shape[1]
    assert stored.packed.shape == (6, blocks, grid.block_size * bits // 8)
    assert stored.scales.dtype == scale_dtype
    assert (stored.zero_points is None) == symmetric
    assert torch.equal(stored.dequantize(), values)
    assert torch.equal(stored.dequantize(torch.float16), values.half())
    zero_bytes = 0 if symmetric else 6 * -(-blocks * bits // 8)
    assert stored.nbytes == stored.packed.numel() + 6 * blocks * scale_dtype.itemsize + zero_bytes
    padding = dequantize_with_padding(stored)[:, k:]
    assert torch.all(padding == 0)
    accepted = stored.for_onnxruntime()
    assert accepted.bits in (2, 4, 8)
    assert accepted.block_size in (16, 32, 64, 128, 256)
    assert torch.equal(accepted.dequantize().view(torch.int32), stored.dequantize().view(torch.int32))
    assert torch.all(dequantize_with_padding(accepted)[:, k:] == 0)
    assert accepted.for_onnxruntime() is accepted


def dequantize_with_padding(weight: QuantizedWeight) -> torch.Tensor:
    whole = weight.packed.shape[1] * weight.block_size
    return dataclasses.replace(weight, k=whole).dequantize()


def test_scales_must_be_numbers_of_their_dtype() -> None:
    weight = torch.randn(4, 32)
    grid = find_grid(weight, WeightSpec(4, 16))
    with pytest.raises(InputError, match="float16"):
        QuantizedWeight.from_codes(quantize(weight, grid), grid, torch.float16)
    with pytest.raises(InputError, match=r"codes \(4, 64\)"):
        QuantizedWeight.from_codes(torch.zeros(4, 64, dtype=torch.uint8), grid)


def run_onnxruntime(weight: QuantizedWeight, a: np.ndarray[Any, Any], accuracy_level: int) -> np.ndarray[Any, Any]:
    """One com.microsoft::MatMulNBits node on onnxruntime's CPU provider."""
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    initializers = {"b": weight.packed, "scales": weight.scales}
    if weight.zero_points is not None:
        initializers["zero_points"] = weight.zero_points
    node = helper.make_node(
        "MatMulNBits",
        ["a", *initializers],
        ["y"],
        domain="com.microsoft",
        K=weight.k,
        N=weight.n,
        bits=weight.bits,
        block_size=weight.block_size,
        accuracy_level=accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "matmul",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, ["m", weight.k])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["m", weight.n])],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in initializers.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {"a": a})
    return np.asarray(result)


@pytest.mark.parametrize("k", [256, 300, 24])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_onnxruntime_computes_the_same(bits: int, group_size: int, symmetric: bool, k: int) -> None:
    pytest.importorskip("onnxruntime")
    original = quantize_weight(torch.randn(24, k), WeightSpec(bits, group_size, symmetric))
    for rows in (1, 5):
        a = torch.randn(rows, k)
        expected = (a.double() @ original.dequantize().double().t()).numpy()
        result = run_onnxruntime(original.for_onnxruntime(), a.numpy(), accuracy_level=1)
        assert np.abs(result - expected).max() <= 1e-5 * np.abs(expected).max()
