"""Weights that take part in products which are no linears."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Iterator

import torch
from torch.fx import GraphModule, Node

from teq_graph import graph as fx
from teq_graph.graph import aten

PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "mv", "addmv", "einsum", "tensordot")
# Whatever comes before or after: `conv2d`, `conv_transpose1d`; the experts' products have a name in every library.
PRODUCT_FAMILIES = ("conv", "grouped_mm", "bilinear")
COPIES = (
    aten.clone.default,
    aten._to_copy.default,
    aten.repeat.default,
    aten.index.Tensor,
    aten.index_select.default,
    aten.gather.default,
)


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
    linears = {linear: fx.weight_name(linear) for linear in fx.linears(graph_module)}
    known = set(linears.values())
    found = []
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in known and _is_matrix(node):
            product = next((reader for reader in _readers(node) if _is_product(reader) and reader not in linears), None)
            if product is not None:
                reason = f"read by {_op_name(product)}, which is no linear over a constant weight"
                found.append(OtherWeight(str(node.target), tuple(node.meta["val"].shape), reason))
    return tuple(found)


def _is_matrix(node: Node) -> bool:
    tensor = fx.node_tensor(node)
    return tensor.is_floating_point() and sum(size > 1 for size in tensor.shape) >= 2


def _readers(node: Node) -> Iterator[Node]:
    """Who reads `node`, as it is or moved."""
    for reader in node.users:
        yield reader
        if reader.args and reader.args[0] is node and moves(reader):
            yield from _readers(reader)


def moves(node: Node) -> bool:
    """Whether `node` gives elements of its first argument, as they are, in another place, shape or type."""
    if node.target is operator.getitem or node.target in COPIES:
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and any(
        argument.alias_info is not None and not argument.alias_info.is_write for argument in target._schema.arguments
    )


def _is_product(node: Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    name = node.target._opname
    return name in PRODUCTS or any(family in name for family in PRODUCT_FAMILIES)


def _op_name(node: Node) -> str:
    return str(node.target).rpartition(".")[0]
