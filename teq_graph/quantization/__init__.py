"""Grids, codes and storage of quantized weights: the reference mathematics of MatMulNBits."""

from teq_graph.quantization.clip import find_clipped_grid
from teq_graph.quantization.descent import descend
from teq_graph.quantization.gptq import gptq
from teq_graph.quantization.grid import (
    Grid,
    dequantize,
    fake_quantize,
    find_grid,
    num_blocks,
    quantize,
    resolve_block_size,
    round_scales,
)
from teq_graph.quantization.learned import LearnedWeight, ScaledCodes
from teq_graph.quantization.weight import QuantizedWeight, quantize_weight

__all__ = [
    "Grid",
    "LearnedWeight",
    "QuantizedWeight",
    "ScaledCodes",
    "dequantize",
    "descend",
    "fake_quantize",
    "find_clipped_grid",
    "find_grid",
    "gptq",
    "num_blocks",
    "quantize",
    "quantize_weight",
    "resolve_block_size",
    "round_scales",
]
