"""Evaluate expressions of parameters alone, such as `1 + weight` or `weight.T`."""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import is_tensor_constant
from teq_graph.graph.tensors import add_tensor, drop_unused, node_tensor, set_tensor
from teq_graph.passes.base import GraphPass, PassResult

Step: TypeAlias = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""An op, and its arguments with None in the place of the value that it is applied to."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a constant was made from.

    `sources` names all tensors that its value depends on. `steps` were applied to the only source, in order;
    None where there are several, as the result alone does not tell them apart.
    """

    sources: tuple[str, ...]
    steps: tuple[Step, ...] | None = ()

    @classmethod
    def of(cls, graph_module: GraphModule, name: str) -> Origin:
        """The origin of the tensor called `name`: itself, where nothing was folded into it."""
        origin: Origin = graph_module.meta.get("origins", {}).get(name, cls((name,)))
        return origin


class FoldConstants(GraphPass[None]):
    """add(weight, 1) → c   becomes   c'

    where c' is a new constant. It keeps the name of its first source where nothing else reads that.
    Results larger than their sources (an expanded mask, say) stay expressions. What each constant was made
    from is kept in `graph_module.meta["origins"]`, so that a scale can be written back.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        for node in list(graph_module.graph.nodes):
            if _is_foldable(node):
                modified |= _fold(graph_module, node)
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _is_foldable(node: Node) -> bool:
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return False
    if torch.Tag.nondeterministic_seeded in node.target.tags or node.target._schema.is_mutable:
        return False
    inputs = node.all_input_nodes
    return bool(inputs) and all(map(is_tensor_constant, inputs)) and isinstance(node.meta.get("val"), Tensor)


def _fold(graph_module: GraphModule, node: Node) -> bool:
    sources = node.all_input_nodes
    lookup = {source: node_tensor(source) for source in sources}
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), lookup.__getitem__)
    assert callable(node.target)
    if any(not isinstance(dim, int) for dim in node.meta["val"].shape):
        return False
    if node.meta["val"].numel() > sum(tensor.numel() for tensor in lookup.values()):
        return False
    with torch.no_grad():
        value = node.target(*args, **kwargs)
    first = sources[0]
    assert isinstance(first.target, str)
    origin = _origin(graph_module, node)
    replaces = set(first.users) == {node}
    if replaces:
        name = first.target
        set_tensor(graph_module, name, value)
    else:
        name = add_tensor(graph_module, first.target, value)
    graph_module.meta.setdefault("origins", {})[name] = origin
    with graph_module.graph.inserting_before(node):
        constant = graph_module.graph.create_node("get_attr", name)
    constant.meta = {**node.meta, "val": value}
    node.replace_all_uses_with(constant)
    graph_module.graph.erase_node(node)
    if replaces:
        graph_module.graph.erase_node(first)
    return True


def _origin(graph_module: GraphModule, node: Node) -> Origin:
    origins = [Origin.of(graph_module, str(source.target)) for source in node.all_input_nodes]
    names = tuple(dict.fromkeys(name for origin in origins for name in origin.sources))
    if len(origins) > 1 or origins[0].steps is None:
        return Origin(names, None)
    step = (node.target, tuple(None if isinstance(arg, Node) else arg for arg in node.args), dict(node.kwargs))
    return Origin(names, (*origins[0].steps, step))
