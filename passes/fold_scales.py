"""Fold scales into the tensors they act on, and take fake-quantization out of the graph again."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.errors import NumericsError
from teq_graph.graph.tensors import drop_unused, get_tensor, node_tensor, set_tensor
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.passes.insert_scales import SMALLEST_SCALE, InsertedScales


class FoldScales(GraphPass[tuple[Tensor, ...]]):
    """norm(x; w / s), linear(·; fake_quantize(W · s))   becomes   norm(x; w'), linear(·; W')

    with w' = w / s and W' = W · s as new tensors: the ops the graph had before `InsertScales`, in float.
    Tensors in `left` stay as they are: their values come from elsewhere, and scaled copies of them all would be as
    large as the model.
    The result's value holds the scales, one tensor [channels] for each equivalence.
    """

    def __init__(self, inserted: InsertedScales, left: Collection[str] = ()) -> None:
        self.inserted = inserted
        self.left = left

    def call(self, graph_module: GraphModule) -> PassResult[tuple[Tensor, ...]]:
        learned = tuple(
            get_tensor(graph_module, name).detach().clamp(min=SMALLEST_SCALE) for name in self.inserted.scales
        )
        for name, scaled in self.inserted.scaled.items():
            result = self.inserted.quantized.get(name, scaled)
            source = scaled_tensor(scaled)
            if scaled is not source and name not in self.left:
                with torch.no_grad():
                    folded = evaluate_constant(scaled)
                if not torch.isfinite(folded).all():
                    raise NumericsError(
                        f"{name} overflows {folded.dtype} when its scale is folded in: use float32 weights"
                    )
                set_tensor(graph_module, name, folded)
                source.meta["val"] = folded
            result.replace_all_uses_with(source)
        drop_unused(graph_module)
        return PassResult(graph_module, bool(self.inserted.scaled), learned)


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
