"""Replace the weights of linears and convolutions by codes and grids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from teq_graph.config import WeightSpec
from teq_graph.graph.products import before_weight, product_nodes, replace_weight, weight_name_of, weight_node
from teq_graph.graph.tensors import add_tensor, drop_unused, get_tensor, node_tensor
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.quantization import QuantizedWeight, quantize_weight


class QuantizeLinears(GraphPass[dict[str, QuantizedWeight]]):
    """linear(x, W[N, K])   becomes   linear(x, dequantize_nbits(codes, scales, zero_points))

    and so does a convolution over a matrix, for the weights in `specs`, as they were `chosen` or else rounded to
    nearest. The result's value holds them by weight name. Codes and grid stand beside where the weight was, as `codes`,
    `scales` and `zero_points`, in the layout of MatMulNBits.
    """

    def __init__(self, specs: Mapping[str, WeightSpec], chosen: Mapping[str, QuantizedWeight] | None = None) -> None:
        self.specs = specs
        self.chosen = chosen or {}

    def call(self, graph_module: GraphModule) -> PassResult[dict[str, QuantizedWeight]]:
        quantized: dict[str, QuantizedWeight] = {}
        dequantized: dict[str, Node] = {}
        for linear in list(product_nodes(graph_module)):
            name = weight_name_of(linear)
            if name not in self.specs:
                continue
            if name not in dequantized:
                weight = node_tensor(weight_node(linear))
                quantized[name] = self.chosen.get(name) or quantize_weight(
                    weight.detach(), self.specs[name], weight.dtype
                )
                # Before the first reader; later readers of the same weight follow it.
                dequantized[name] = dequantize_node(graph_module, before_weight(linear), name, quantized[name])
            replace_weight(linear, dequantized[name])
        if dequantized:
            drop_unused(graph_module)
        return PassResult(graph_module, bool(dequantized), quantized)


def dequantize_node(graph_module: GraphModule, before: Node, name: str, weight: QuantizedWeight) -> Node:
    """A node that gives the weight called `name` [N, K] from its codes, which are stored beside it."""
    owner, _, leaf = name.rpartition(".")
    stem = (f"{owner}." if owner else "") + ("" if leaf == "weight" else f"{leaf}_")
    graph = graph_module.graph
    with graph.inserting_before(before):
        tensors: list[Node | None] = []
        parts = (("codes", weight.packed), ("scales", weight.scales), ("zero_points", weight.zero_points))
        for part, tensor in parts:
            if tensor is None:
                tensors.append(None)
                continue
            node = graph.create_node("get_attr", add_tensor(graph_module, f"{stem}{part}", tensor))
            node.meta["val"] = tensor
            tensors.append(node)
        shape = (weight.k, weight.n, weight.bits, weight.block_size)
        result = graph.call_function(torch.ops.teq_graph.dequantize_nbits.default, (*tensors, *shape))
    result.meta["val"] = get_tensor(graph_module, name)
    return result
