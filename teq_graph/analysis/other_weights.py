"""Weights that take part in products which are no linears."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import linear_nodes, weight_name_of
from teq_graph.graph.op_sets import CONVOLUTIONS, EXPERTS, OTHER_PRODUCTS, PRODUCTS, op_name, passes_on
from teq_graph.graph.tensors import node_tensor


@dataclasses.dataclass(frozen=True)
class OtherWeight:
    """A constant that a product reads which is no linear. It stays in float, for the `reason` given."""

    name: str
    shape: tuple[int, ...]
    reason: str


def find_other_weights(graph_module: GraphModule) -> tuple[OtherWeight, ...]:
    """The weights of experts, convolutions and the like, in graph order.

    A weight is a floating-point constant of at least two dimensions that are larger than 1; between it and the
    product, views, casts and choices of some of its rows are looked through. Weights of linears are left out.
    """
    linears = {linear: weight_name_of(linear) for linear in linear_nodes(graph_module)}
    known = set(linears.values())
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in known and _is_matrix(node):
            product = next((reader for reader in _readers(node) if _is_product(reader) and reader not in linears), None)
            if product is not None:
                reason = f"read by {op_name(product)}, which is no linear over a constant weight"
                found.append(OtherWeight(str(node.target), tuple(node.meta["val"].shape), reason))
    return tuple(found)


def _is_matrix(node: Node) -> bool:
    tensor = node_tensor(node)
    return tensor.is_floating_point() and sum(size > 1 for size in tensor.shape) >= 2


def _readers(node: Node) -> Iterator[Node]:
    """Who reads `node`, as it is or moved."""
    for reader in node.users:
        yield reader
        if reader.args and reader.args[0] is node and passes_on(reader):
            yield from _readers(reader)


def _is_product(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._opname
    return name in PRODUCTS or any(part in name for part in (*CONVOLUTIONS, *EXPERTS, *OTHER_PRODUCTS))
