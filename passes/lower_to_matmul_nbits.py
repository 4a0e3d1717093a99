"""Let products over quantized weights compute from the codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import CallBuilder, arguments_of, aten, is_call, rank_of
from teq_graph.graph.products import EXPERT_LINEAR, PRODUCTS, Reading, channel_dim, is_convolution, weight_node
from teq_graph.graph.tensors import drop_unused
from teq_graph.passes.base import GraphPass, PassResult


class LowerToMatMulNBits(GraphPass[None]):
    """1. linear(x, dequantize_nbits(codes, scales, zero_points), bias)
                        →  matmul_nbits(x, codes, scales, zero_points, bias)
    2. conv2d(x, view(dequantize_nbits(codes, scales, zero_points)), bias)
                        →  permute(matmul_nbits(permute(x), codes, scales, zero_points, bias))

    3. expert_linear(x, dequantize_nbits(codes, scales, zero_points), bias, experts, E)
                        →  expert_matmul_nbits(x, codes, scales, zero_points, bias, experts, …, E)

    Case 2 of windows of one place each: a linear over the channels, which go last and back again. Other convolutions
    read the dequantized weight.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        graph = graph_module.graph
        for linear in list(graph.nodes):
            if not is_call(linear, *PRODUCTS) or (is_convolution(linear) and not _is_of_single_places(linear)):
                continue
            weight = weight_node(linear)
            if not is_call(weight, torch.ops.teq_graph.dequantize_nbits.default):
                continue
            codes, scales, zero_points, *shape = weight.args
            values, call = arguments_of(linear), CallBuilder(graph_module, linear)
            if is_call(linear, EXPERT_LINEAR):
                k, n, bits, block_size = shape
                count = values["num_experts"]
                own = (k, n // count, bits, block_size, count)
                parts = (codes, scales, zero_points, values["bias"], values["experts"])
                result = call(torch.ops.teq_graph.expert_matmul_nbits.default, values["input"], *parts, *own)
                linear.replace_all_uses_with(result)
                graph.erase_node(linear)
                modified = True
                continue
            x, rank, dim = values["input"], rank_of(linear), rank_of(linear) + channel_dim(linear)
            others = [d for d in range(rank) if d != dim]
            if is_convolution(linear):
                x = call(aten.permute.default, x, [*others, dim])
            result = call(
                torch.ops.teq_graph.matmul_nbits.default, x, codes, scales, zero_points, values["bias"], *shape
            )
            if is_convolution(linear):
                result = call(aten.permute.default, result, [*range(dim), rank - 1, *range(dim, rank - 1)])
            else:
                result.meta = dict(linear.meta)
            linear.replace_all_uses_with(result)
            graph.erase_node(linear)
            modified = True
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _is_of_single_places(convolution: Node) -> bool:
    """Whether each place of the result reads the same place of the input, all its channels."""
    reading = Reading.of(convolution)
    assert reading.kernel is not None
    return {*reading.kernel, *reading.stride, reading.groups} == {1} and set(reading.padding) == {0}
