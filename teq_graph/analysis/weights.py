"""The weights of a graph: what reads each, and which of them no quantization here can hold."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Literal

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import arguments_of, aten, is_call, is_tensor_constant, operand_of
from teq_graph.graph.op_sets import (
    CONVOLUTIONS,
    EXPERTS,
    FILLS,
    OTHER_PRODUCTS,
    PRODUCTS,
    RECURRENT,
    SHAPE_QUERIES,
    op_name,
    passes_on,
)
from teq_graph.graph.products import EXPERT_LINEAR, expert_counts, is_convolution, kind_of, product_nodes, weight_node
from teq_graph.graph.tensors import node_tensor

WeightKind = Literal["linear", "embedding", "convolution", "recurrent", "experts", "product"]
"""What reads a weight; "convolution", "experts": one in normal form; "product": any other product with it."""


@dataclasses.dataclass(frozen=True)
class GraphWeight:
    """A weight, by its name in the graph; `is_tied`: an embedding table that a linear reads, too; `experts`: of how
    many it holds the matrices, 0 where of none.

    `reason` says why it must stay in float, None where it need not.
    """

    name: str
    kind: WeightKind
    shape: tuple[int, ...]
    is_tied: bool = False
    reason: str | None = None
    experts: int = 0


def find_weights(graph_module: GraphModule) -> tuple[GraphWeight, ...]:
    """The weights of products in normal form, those of embeddings and those of all other products, each in graph order.

    A weight is a floating-point constant of at least two dimensions that are larger than 1; between it and a product
    without a normal form, views, casts and choices of some of its rows are looked through.
    """
    kinds: dict[Node, WeightKind] = {}
    for product in product_nodes(graph_module):
        kinds.setdefault(weight_node(product), kind_of(product))
    tables = dict.fromkeys(
        operand_of(node) for node in graph_module.graph.nodes if is_call(node, aten.embedding.default)
    )
    tables = {table: None for table in tables if is_tensor_constant(table)}
    routers = _routers(graph_module)
    found = [_weight(node, kind, reason=routers.get(node)) for node, kind in kinds.items() if node not in tables]
    found += [_weight(node, "embedding", node in kinds, _table_reason(node)) for node in tables]
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node not in kinds and node not in tables and _is_matrix(node):
            reader = next(filter(_kind_of_product, _readers(node)), None)
            if reader is not None:
                kind = _kind_of_product(reader) or "product"
                found.append(_weight(node, kind, reason=f"read by {op_name(reader)}, {_why_in_float(reader, kind)}"))
    counts = expert_counts(graph_module)
    return tuple(dataclasses.replace(weight, experts=counts.get(weight.name, 0)) for weight in found)


def _routers(graph_module: GraphModule) -> dict[Node, str]:
    """The weights whose product chooses experts, each with the reason to leave it in float: there are few of them, and
    another choice is no small error."""
    products = set(product_nodes(graph_module))
    pending = [arguments_of(node)["experts"] for node in products if is_call(node, EXPERT_LINEAR)]
    found, seen = dict[Node, str](), set[Node]()
    while pending:
        node = pending.pop()
        if node in products:
            found[weight_node(node)] = "its product chooses experts"
        elif node not in seen and node.target not in (*FILLS, *SHAPE_QUERIES):
            seen.add(node)
            pending += node.all_input_nodes
    return found


def _weight(node: Node, kind: WeightKind, is_tied: bool = False, reason: str | None = None) -> GraphWeight:
    return GraphWeight(str(node.target), kind, tuple(node_tensor(node).shape), is_tied, reason)


def _is_matrix(node: Node) -> bool:
    tensor = node_tensor(node)
    return tensor.is_floating_point() and sum(size > 1 for size in tensor.shape) >= 2


def _readers(node: Node) -> Iterator[Node]:
    """Who reads `node`, as it is or moved."""
    for reader in node.users:
        yield reader
        if reader.args and reader.args[0] is node and passes_on(reader):
            yield from _readers(reader)


def _kind_of_product(node: Node) -> WeightKind | None:
    """The kind of a weight that `node` reads; None where it is no product."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target._opname
    families: tuple[tuple[WeightKind, tuple[str, ...]], ...] = (
        ("recurrent", RECURRENT),
        ("product", (*CONVOLUTIONS, *EXPERTS, *OTHER_PRODUCTS)),
    )
    for kind, parts in families:
        if any(part in name for part in parts):
            return kind
    return "product" if name in PRODUCTS else None


def _why_in_float(product: Node, kind: WeightKind) -> str:
    """Why no quantization here can hold a weight that `product` reads."""
    if kind == "recurrent":
        return "whose operator in ONNX takes float weights alone"
    if is_convolution(product):
        return "over a computed weight, or one that something else reads, too"
    if "conv_transpose" in op_name(product):
        return "which has its input channels for rows"
    return "which is no linear over a constant weight"


def _table_reason(table: Node) -> str | None:
    """Why an embedding table must stay in float.

    An input of the model chooses the rows of a vocabulary, through nothing but views and casts. Rows whose numbers are
    computed are positions or the like: tables too small to be worth their error.
    """
    lookups = [reader for reader in table.users if is_call(reader, aten.embedding.default)]
    for reader in table.users:
        if reader not in lookups and not (is_call(reader, aten.linear.default) and reader.args[1] is table):
            return f"read by {op_name(reader)}, too"
    if not any(_is_input(operand_of(lookup, 1)) for lookup in lookups):
        return "its rows are not those of an input's tokens, but of positions or the like"
    return None


def _is_input(indices: Node) -> bool:
    while indices.op == "call_function" and passes_on(indices):
        indices = operand_of(indices)
    return indices.op == "placeholder"
