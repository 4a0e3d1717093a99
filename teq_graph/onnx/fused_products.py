"""Products that onnxruntime's CUDA provider has fused kernels for: which they are, and what makes it take them."""

from __future__ import annotations

import onnx_ir as ir

from teq_graph.config import FUSED_GROUP_SIZES

FUSED_PRODUCTS = "ep.cuda.fpa_intb_gemm"
"""Entry of a session's configuration: "1" lets the provider take its fused kernels. Other providers do not read it."""
_ROWS = {2: 128, 4: 64, 8: 64}
"""Bits -> what the rows of a weight have to be a multiple of."""
_ZERO_POINTS, _BIAS = 3, 5
"""Inputs of MatMulNBits."""


def has_fused_kernel(dtype: ir.DataType | None, bits: int, block_size: int, rows: int, has_zero_points: bool) -> bool:
    """Whether there is a fused kernel for a MatMulNBits over such a weight [rows, K], where it has no bias."""
    fits = FUSED_GROUP_SIZES.get(bits) == block_size and not has_zero_points and rows % _ROWS[bits] == 0
    return dtype == ir.DataType.FLOAT16 and fits


def has_fused_products(model: ir.Model) -> bool:
    """Whether a graph has products that fused kernels take."""
    return any(map(_is_fused, (node for node in model.graph if node.op_type == "MatMulNBits")))


def _is_fused(node: ir.Node) -> bool:
    inputs = [*node.inputs, None, None, None][: _BIAS + 1]
    activations = inputs[0]
    if activations is None or inputs[_BIAS] is not None:
        return False
    bits, block_size, rows = (node.attributes[name].as_int() for name in ("bits", "block_size", "N"))
    return has_fused_kernel(activations.dtype, bits, block_size, rows, inputs[_ZERO_POINTS] is not None)
