"""Let products over quantized weights compute from the codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import CallBuilder, arguments_of, aten, is_call
from teq_graph.graph.products import EXPERT_LINEAR, weight_node
from teq_graph.graph.tensors import drop_unused
from teq_graph.passes.base import GraphPass, PassResult


class LowerToMatMulNBits(GraphPass[None]):
    """1. linear(x, dequantize_nbits(codes, scales, zero_points), bias)
                        →  matmul_nbits(x, codes, scales, zero_points, bias)
    2. expert_linear(x, dequantize_nbits(codes, scales, zero_points), bias, experts, E)
                        →  expert_matmul_nbits(x, codes, scales, zero_points, bias, experts, E)

    Convolutions read the dequantized weight: their rows, the places of images, are many, and a product of floats is
    faster for these.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        for node in list(graph_module.graph.nodes):
            if is_call(node, aten.linear.default, EXPERT_LINEAR):
                weight = weight_node(node)
                if is_call(weight, torch.ops.teq_graph.dequantize_nbits.default):
                    _lower(graph_module, node, weight)
                    modified = True
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _lower(graph_module: GraphModule, linear: Node, weight: Node) -> None:
    values, call = arguments_of(linear), CallBuilder(graph_module, linear)
    codes, scales, zero_points, k, n, bits, block_size = weight.args
    inputs = (values["input"], codes, scales, zero_points, values["bias"])
    if is_call(linear, EXPERT_LINEAR):
        experts, count = values["experts"], values["num_experts"]
        assert isinstance(n, int)
        own = (k, n // count, bits, block_size, count)
        result = call(torch.ops.teq_graph.expert_matmul_nbits.default, *inputs, experts, *own)
    else:
        result = call(torch.ops.teq_graph.matmul_nbits.default, *inputs, k, n, bits, block_size)
    result.meta = dict(linear.meta)
    linear.replace_all_uses_with(result)
    graph_module.graph.erase_node(linear)
