"""A part of a graph as a graph of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo
from torch.utils import _pytree as pytree

from teq_graph.graph.nodes import aten, is_call
from teq_graph.graph.sizes import symbol
from teq_graph.graph.tensors import drop_unused


def needed_for(results: Any, given: Mapping[Node, Any]) -> set[Node]:
    """The nodes that `results`, a tree of nodes, are computed from, those of `given` included, where it stops."""
    found: set[Node] = set()
    pending = [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Node)]
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if node in given else _sources(node, given)
    return found


def part_of(graph_module: GraphModule, inputs: Mapping[str, Any], results: Any) -> GraphModule:
    """What computes `results` from `inputs`, trees of nodes by the name of an argument; over the same tensors.

    Where a size is read that one of the inputs has, it is read there: the value that it was read from may belong to
    another part.
    """
    leaves, in_spec = pytree.tree_flatten(((), dict(inputs)))
    graph, copies = Graph(), {}
    for node in leaves:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    needed = needed_for(results, dict.fromkeys(leaves))
    for node in graph_module.graph.nodes:
        if node not in needed or node in copies:
            continue
        (source,) = sized if (sized := _sources(node, copies)) and is_call(node, aten.sym_size.int) else (None,)
        if source is None or source is node.args[0]:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        else:
            dim = _dimension(node, source)
            copies[node] = graph.call_function(node.target, (copies[source], dim))
            copies[node].meta = dict(node.meta)
    graph.output([copies[leaf] for leaf in pytree.tree_leaves(results)])
    out_spec = pytree.tree_structure(results)
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(inputs), in_spec, out_spec)))
    part = GraphModule(graph_module, graph)
    drop_unused(part)
    return part


def _sources(node: Node, given: Mapping[Node, Any]) -> list[Node]:
    """What `node` is computed from: a size from the first of `given` that has it, where one does."""
    if is_call(node, aten.sym_size.int):
        for other in given:
            if _dimension(node, other) is not None:
                return [other]
    return node.all_input_nodes


def _dimension(size: Node, of: Node) -> int | None:
    """Which dimension of `of` has the size that `size` reads."""
    if not isinstance(value := of.meta.get("val"), Tensor):
        return None
    wanted = symbol(size.meta["val"])
    return next(
        (index for index, known in enumerate(value.shape) if wanted is not None and symbol(known) == wanted), None
    )
