"""Nodes of torch.fx graphs: what they call, their arguments by name, new calls."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, TypeGuard

import torch
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

aten = torch.ops.aten


def is_call(node: object, *targets: Any) -> TypeGuard[Node]:
    """Whether `node` calls one of `targets`."""
    return isinstance(node, Node) and node.op == "call_function" and node.target in targets


def operands_of(node: Node) -> tuple[Any, ...]:
    """The positional arguments of a call."""
    return node.args


def operand_of(node: Node, index: int = 0) -> Node:
    """The positional argument of a call that is a node itself."""
    source = node.args[index]
    assert isinstance(source, Node)
    return source


def is_tensor_constant(node: object) -> TypeGuard[Node]:
    """Whether `node` reads a parameter, buffer or other constant of the graph module."""
    return isinstance(node, Node) and node.op == "get_attr"


def arguments_of(node: Node) -> dict[str, Any]:
    """All arguments of an ATen call by the names of its schema, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    values = {}
    for index, argument in enumerate(schema.arguments):
        if index < len(node.args):
            values[argument.name] = node.args[index]
        else:
            values[argument.name] = node.kwargs.get(argument.name, argument.default_value)
    return values


class CallBuilder:
    """Adds calls before one node, with their values' shapes."""

    def __init__(self, graph_module: GraphModule, before: Node) -> None:
        self.graph_module = graph_module
        self.before = before

    def __call__(self, target: Any, *args: Any) -> Node:
        graph = self.graph_module.graph
        with graph.inserting_before(self.before):
            node = graph.call_function(target, args)
        values = torch.fx.node.map_arg(args, lambda source: source.meta["val"])
        mode = next((v.fake_mode for v in pytree.tree_leaves(values) if isinstance(v, FakeTensor)), nullcontext())
        # Composite ops, such as linear, in Python: in C++, torch 2.11 asks some of them for the numbers behind symbols.
        with mode, enable_python_dispatcher():
            node.meta["val"] = target(*values)
        return node


def rank_of(node: Node) -> int:
    """Rank of the tensor that `node` gives."""
    return int(node.meta["val"].dim())


def dtype_of(node: Node) -> torch.dtype:
    """Element type of the tensor that `node` gives."""
    value: torch.dtype = node.meta["val"].dtype
    return value


def placeholder_nodes(graph_module: GraphModule) -> list[Node]:
    """The nodes of the graph's inputs, in order."""
    return [node for node in graph_module.graph.nodes if node.op == "placeholder"]
