"""Run stretches of a graph on values that are kept between them."""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.graph.tensors import node_tensor

Values = dict[Node, Any]
"""What has been computed and is still needed, by node."""


def run(nodes: Iterable[Node], values: Values) -> None:
    """Compute `nodes`, in order, from `values` and the graph's tensors, into `values`."""

    def value_of(node: Node) -> Any:
        return node_tensor(node) if node.op == "get_attr" and node not in values else values[node]

    for node in nodes:
        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value_of)
        assert callable(node.target)
        values[node] = node.target(*args, **kwargs)


def keep_only(values: Values, needed: set[Node]) -> Values:
    """`values` without what nothing needs any more."""
    return {node: value for node, value in values.items() if node in needed}


def shared(values: Values, others: Values) -> Values:
    """`values` with the tensors of `others` where they are equal: masks and rotary tables of one length, mostly."""

    def is_equal(one: Any, other: Any) -> bool:
        both = isinstance(one, Tensor) and isinstance(other, Tensor)
        return both and one.dtype == other.dtype and torch.equal(one, other)

    return {node: others[node] if is_equal(value, others.get(node)) else value for node, value in values.items()}


def advance(nodes: Iterable[Node], values: Values, needed: set[Node]) -> Values:
    """What is `needed` of `values` and of what `nodes` make of them; all else is let go as soon as it has been read."""
    nodes = list(nodes)
    last_reader = {source: node for node in nodes for source in node.all_input_nodes}
    env = dict(values)
    for node in nodes:
        run([node], env)
        for source in node.all_input_nodes:
            if last_reader[source] is node and source not in needed:
                env.pop(source, None)
    return keep_only(env, needed)


def needed_after(stretches: Sequence[Sequence[Node]]) -> list[set[Node]]:
    """For each stretch, the nodes that the later ones read."""
    needed: list[set[Node]] = []
    reads: set[Node] = set()
    for nodes in reversed(stretches):
        needed.append(set(reads))
        for node in nodes:
            reads.update(node.all_input_nodes)
    return needed[::-1]


def constant_ancestors(nodes: Sequence[Node], given: Container[Node] = ()) -> list[Node]:
    """The calls outside `nodes`, in graph order, that `nodes` need and that depend on tensor constants alone.

    What is `given` is known, and so not among them; nor is what it alone is computed from.
    """
    inside = set(nodes)
    found: set[Node] = set()

    def depends_on_constants(node: Node) -> bool:
        if node.op == "get_attr" or node in found or node in given:
            return True
        if (
            node.op != "call_function"
            or not node.all_input_nodes
            or not all(map(depends_on_constants, node.all_input_nodes))
        ):
            return False
        found.add(node)
        return True

    for node in nodes:
        for source in node.all_input_nodes:
            if source not in inside:
                depends_on_constants(source)
    return [node for node in nodes[0].graph.nodes if node in found] if nodes else []
