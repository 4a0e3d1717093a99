"""Quantized weights that no operator reads as codes: in ONNX they are dequantized before they are read."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch

from teq_graph.onnx.export.initializers import add_initializer
from teq_graph.onnx.export.schemas import DEQUANTIZE_NBITS, OWN_DOMAIN
from teq_graph.quantization import QuantizedWeight

UNSIGNED = {2: ml_dtypes.uint2, 4: ml_dtypes.uint4, 8: np.uint8}
SIGNED = {2: ml_dtypes.int2, 4: ml_dtypes.int4, 8: np.int8}
OPSETS = {2: 25, 4: 21, 8: 21}
"""Bits -> the first opset whose DequantizeLinear takes such codes in blocks."""


def dequantize_linearly(model: ir.Model) -> None:
    """DequantizeNBits(codes, scales, zero points)   becomes   DequantizeLinear(codes [N, K], scales, zero points)

    with a scale and a zero point for each block along K. Symmetric codes are signed and have no zero points. Where the
    model's opset is older than the first that has such codes, it becomes that.
    """
    for node in list(model.graph):
        if node.domain == OWN_DOMAIN and node.op_type == DEQUANTIZE_NBITS.name:
            _replace(model, node)


def _replace(model: ir.Model, node: ir.Node) -> None:
    sizes = {name: node.attributes[name].as_int() for name in ("K", "N", "bits", "block_size")}
    tensors = [None if value is None else _tensor(value) for value in (*node.inputs, None)[:3]]
    packed, scales, zero_points = tensors
    assert packed is not None and scales is not None
    weight = QuantizedWeight(packed, scales, zero_points, sizes["N"], sizes["K"], sizes["bits"], sizes["block_size"])
    codes, grid = weight.to_codes()
    bits = weight.bits
    source = node.inputs[0]
    assert source is not None
    inputs = [codes.numpy().astype(UNSIGNED[bits])]
    if grid.zero_points is None:
        inputs = [(codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8).numpy().astype(SIGNED[bits])]
    else:
        inputs.append(grid.zero_points.numpy().astype(UNSIGNED[bits]))
    names = ("matrix", "zeros")[: len(inputs)]
    made = [add_initializer(model, f"{source.name}.{name}", array) for name, array in zip(names, inputs, strict=True)]
    replacement = ir.node(
        "DequantizeLinear", [made[0], node.inputs[1], *made[1:]], {"axis": 1, "block_size": sizes["block_size"]}
    )
    result = node.outputs[0]
    replacement.outputs[0].name, replacement.outputs[0].type = result.name, result.type
    replacement.outputs[0].shape = result.shape
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], [replacement], [result], replacement.outputs)
    model.opset_imports[""] = max(model.opset_imports[""], OPSETS[bits])


def _tensor(value: ir.Value) -> torch.Tensor:
    assert value.const_value is not None, value.name
    array = value.const_value.numpy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
