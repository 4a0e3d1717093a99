"""Store quantized weights the way onnxruntime's MatMulNBits and GatherBlockQuantized accept them."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import arguments_of, is_call
from teq_graph.graph.tensors import add_tensor, drop_unused, get_attr_node, node_tensor
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.quantization import QuantizedWeight

READERS = (
    torch.ops.teq_graph.matmul_nbits.default,
    torch.ops.teq_graph.expert_matmul_nbits.default,
    torch.ops.teq_graph.embedding_nbits.default,
    torch.ops.teq_graph.dequantize_nbits.default,
)
Stored = tuple[Node, Node, Node | None]
"""The nodes that read b, scales and zero_points."""


class MatchOnnxruntimeLayout(GraphPass[None]):
    """matmul_nbits(a, b, …, bits=3, block_size=K)   becomes   matmul_nbits(a, b', …, bits=4, block_size=128)

    and so do embedding_nbits(indices, b, …) and dequantize_nbits(b, …).
    onnxruntime takes 2, 4 and 8 bits in blocks of 16 to 256. 3-bit codes move into 4 bits, and a block that
    spans the whole row becomes blocks of 128 with the same scale: the weight stays equal bit for bit
    (`QuantizedWeight.for_onnxruntime`). What is accepted already is left alone, and a weight that several
    operators read is stored once.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        done: dict[tuple[Stored, int, int], tuple[Stored, int, int]] = {}
        for node in list(graph_module.graph.nodes):
            if not is_call(node, *READERS):
                continue
            values: dict[str, Any] = arguments_of(node)
            stored: Stored = (values["b"], values["scales"], values["zero_points"])
            key = (stored, values["bits"], values["block_size"])
            weight = _weight(stored, values)
            accepted = weight.for_onnxruntime()
            if accepted is weight:
                continue
            if key not in done:
                done[key] = (_store(graph_module, stored, accepted), accepted.bits, accepted.block_size)
            (values["b"], values["scales"], values["zero_points"]), values["bits"], values["block_size"] = done[key]
            node.args, node.kwargs = tuple(values.values()), {}
        if done:
            drop_unused(graph_module)
        return PassResult(graph_module, bool(done))


def _weight(stored: Stored, values: dict[str, Any]) -> QuantizedWeight:
    b, scales, zero_points = (None if node is None else node_tensor(node) for node in stored)
    assert b is not None and scales is not None
    k = values["K"] if "K" in values else values["D"]
    return QuantizedWeight(b, scales, zero_points, b.shape[0], k, values["bits"], values["block_size"])


def _store(graph_module: GraphModule, old: Stored, weight: QuantizedWeight) -> Stored:
    """Nodes for the tensors of `weight`, named after those that they replace."""
    nodes: list[Node | None] = []
    for node, tensor in zip(old, (weight.packed, weight.scales, weight.zero_points), strict=True):
        if node is not None and tensor is not None:
            node = get_attr_node(graph_module, add_tensor(graph_module, str(node.target), tensor))
        nodes.append(node)
    b, scales, zero_points = nodes
    assert b is not None and scales is not None
    return b, scales, zero_points
