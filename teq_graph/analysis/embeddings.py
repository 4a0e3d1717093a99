"""The embedding tables of a graph, and which of them an input looks up."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule, Node

from teq_graph import graph as fx
from teq_graph.analysis.products import moves
from teq_graph.graph import aten


@dataclasses.dataclass(frozen=True)
class EmbeddingTable:
    """A constant [V, D] whose rows are looked up; `is_tied` where a linear reads it, too.

    `reason` says why it must stay in float, None where it need not.
    """

    name: str
    is_tied: bool
    reason: str | None


def find_embeddings(graph_module: GraphModule) -> tuple[EmbeddingTable, ...]:
    """The tables that embeddings read, in graph order.

    An input of the model chooses the rows of a vocabulary, through nothing but views and casts. Rows whose numbers are
    computed are positions or the like: tables too small to be worth their error.
    """
    embeddings = [node for node in graph_module.graph.nodes if fx.is_call(node, aten.embedding.default)]
    tables = dict.fromkeys(fx.operand(node) for node in embeddings)
    return tuple(
        EmbeddingTable(str(table.target), any(_is_linear_over(reader, table) for reader in table.users), _reason(table))
        for table in tables
        if fx.is_tensor_constant(table)
    )


def _reason(table: Node) -> str | None:
    lookups = [reader for reader in table.users if fx.is_call(reader, aten.embedding.default)]
    for reader in table.users:
        if reader not in lookups and not _is_linear_over(reader, table):
            return f"read by {str(reader.target).rpartition('.')[0]}, too"
    if not any(_is_input(fx.operand(lookup, 1)) for lookup in lookups):
        return "its rows are not those of an input's tokens, but of positions or the like"
    return None


def _is_linear_over(reader: Node, table: Node) -> bool:
    return fx.is_call(reader, aten.linear.default) and reader.args[1] is table


def _is_input(indices: Node) -> bool:
    while indices.op == "call_function" and moves(indices):
        indices = fx.operand(indices)
    return indices.op == "placeholder"
