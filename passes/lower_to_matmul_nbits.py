"""Let linears over quantized weights compute from the codes."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import arguments_of, aten, is_call
from teq_graph.graph.tensors import drop_unused
from teq_graph.passes.base import GraphPass, PassResult


class LowerToMatMulNBits(GraphPass[None]):
    """linear(x, dequantize_nbits(codes, scales, zero_points), bias)

    becomes   matmul_nbits(x, codes, scales, zero_points, bias)
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        graph = graph_module.graph
        for linear in list(graph.nodes):
            if not is_call(linear, aten.linear.default):
                continue
            values = arguments_of(linear)
            weight = values["weight"]
            if not is_call(weight, torch.ops.teq_graph.dequantize_nbits.default):
                continue
            assert isinstance(weight, Node)
            codes, scales, zero_points, *shape = weight.args
            with graph.inserting_before(linear):
                result = graph.call_function(
                    torch.ops.teq_graph.matmul_nbits.default,
                    (values["input"], codes, scales, zero_points, values["bias"], *shape),
                )
            result.meta = dict(linear.meta)
            linear.replace_all_uses_with(result)
            graph.erase_node(linear)
            modified = True
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)
