"""The embedding tables of a graph, and which of them an input looks up."""

from __future__ import annotations

import dataclasses

from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import aten, is_call, is_tensor_constant, operand_of
from teq_graph.graph.op_sets import passes_on


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
    embeddings = [node for node in graph_module.graph.nodes if is_call(node, aten.embedding.default)]
    tables = dict.fromkeys(operand_of(node) for node in embeddings)
    return tuple(
        EmbeddingTable(str(table.target), any(_is_linear_over(reader, table) for reader in table.users), _reason(table))
        for table in tables
        if is_tensor_constant(table)
    )


def _reason(table: Node) -> str | None:
    lookups = [reader for reader in table.users if is_call(reader, aten.embedding.default)]
    for reader in table.users:
        if reader not in lookups and not _is_linear_over(reader, table):
            return f"read by {str(reader.target).rpartition('.')[0]}, too"
    if not any(_is_input(operand_of(lookup, 1)) for lookup in lookups):
        return "its rows are not those of an input's tokens, but of positions or the like"
    return None


def _is_linear_over(reader: Node, table: Node) -> bool:
    return is_call(reader, aten.linear.default) and reader.args[1] is table


def _is_input(indices: Node) -> bool:
    while indices.op == "call_function" and passes_on(indices):
        indices = operand_of(indices)
    return indices.op == "placeholder"
