"""Replace embedding tables by codes and grids."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import arguments_of, aten, is_call, is_tensor_constant
from teq_graph.graph.tensors import drop_unused
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.passes.quantize_linears import dequantize_node
from teq_graph.quantization import QuantizedWeight


class QuantizeEmbeddings(GraphPass[None]):
    """embedding(W[V, D], i), linear(x, W)

    becomes   embedding_nbits(i, codes, scales, zero_points), linear(x, dequantize_nbits(codes, scales, zero_points))

    for the tables in `tables`, by weight name. The codes of a table that a linear reads, too, are stored once, in the
    layout of MatMulNBits; `LowerToMatMulNBits` lets the linear compute from them.
    """

    def __init__(self, tables: Mapping[str, QuantizedWeight]) -> None:
        self.tables = tables

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        graph = graph_module.graph
        dequantized: dict[str, Node] = {}
        for reader in list(graph.nodes):
            is_embedding = is_call(reader, aten.embedding.default)
            if not is_embedding and not is_call(reader, aten.linear.default):
                continue
            values = arguments_of(reader)
            source = values["weight"]
            if not is_tensor_constant(source) or source.target not in self.tables:
                continue
            name = str(source.target)
            if name not in dequantized:
                dequantized[name] = dequantize_node(graph_module, reader, name, self.tables[name])
            if not is_embedding:
                reader.update_arg(1, dequantized[name])
                continue
            codes, scales, zero_points, d, _, bits, block_size = dequantized[name].args
            with graph.inserting_before(reader):
                result = graph.call_function(
                    torch.ops.teq_graph.embedding_nbits.default,
                    (values["indices"], codes, scales, zero_points, d, bits, block_size),
                )
            result.meta = dict(reader.meta)
            reader.replace_all_uses_with(result)
            graph.erase_node(reader)
        if dequantized:
            drop_unused(graph_module)
        return PassResult(graph_module, bool(dequantized))
