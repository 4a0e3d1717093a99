"""Fold scales into the tensors they act on, and take fake-quantization out of the graph again."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from teq_graph import graph as fx
from teq_graph.errors import NumericsError
from teq_graph.graph import node_tensor
from teq_graph.passes.insert_scales import SMALLEST_SCALE, InsertedScales


class FoldScales(PassBase):
    """norm(x; w / s), linear(·; fake_quantize(W · s))   becomes   norm(x; w'), linear(·; W')

    with w' = w / s and W' = W · s as new tensors: the ops the graph had before `InsertScales`, in float.
    `learned` holds the scales, one tensor [channels] for each equivalence.
    """

    def __init__(self, inserted: InsertedScales) -> None:
        self.inserted = inserted
        self.learned: tuple[Tensor, ...] = ()

    def call(self, graph_module: GraphModule) -> PassResult:
        self.learned = tuple(
            fx.get_tensor(graph_module, name).detach().clamp(min=SMALLEST_SCALE) for name in self.inserted.scales
        )
        for name, scaled in self.inserted.scaled.items():
            result = self.inserted.quantized.get(name, scaled)
            source = scaled_tensor(scaled)
            if scaled is not source:
                with torch.no_grad():
                    folded = evaluate_constant(scaled)
                if not torch.isfinite(folded).all():
                    raise NumericsError(
                        f"{name} overflows {folded.dtype} when its scale is folded in: use float32 weights"
                    )
                fx.set_tensor(graph_module, name, folded)
                source.meta["val"] = folded
            result.replace_all_uses_with(source)
        fx.drop_unused(graph_module)
        return PassResult(graph_module, bool(self.inserted.scaled))


def scaled_tensor(node: Node) -> Node:
    """The node that reads the tensor at the start of a chain of scales."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return node


def evaluate_constant(node: Node) -> Tensor:
    """The value of an expression of tensor constants alone."""
    if node.op == "get_attr":
        return node_tensor(node)
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), evaluate_constant)
    assert callable(node.target)
    result: Tensor = node.target(*args, **kwargs)
    return result
