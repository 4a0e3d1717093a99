"""The repeating blocks of a graph.

The linears and convolutions of a deep network repeat: the same shapes in the same order, once per layer. The boundary
between two repetitions is put where the fewest activations are alive, which in a residual network is the
one node that carries the residual stream.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.analysis.equivalences.equivalence import Equivalence
from teq_graph.capture import CapturedGraph
from teq_graph.graph.nodes import arguments_of, aten
from teq_graph.graph.op_sets import SHAPE_QUERIES
from teq_graph.graph.products import PRODUCTS, product_nodes, weight_name_of

# More live activations than these at a boundary (a residual stream, an encoder's output) mean that it cuts
# through the inside of a layer.
MOST_LIVE = 2
PARAMETERIZED = (aten.embedding.default, *PRODUCTS)


@dataclasses.dataclass(frozen=True)
class Block:
    """A stretch of the graph: its nodes in order, and the activations that leave it."""

    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]
    linears: tuple[str, ...]
    """Names of the weights of its linears and convolutions."""


def find_blocks(captured: CapturedGraph, equivalences: Sequence[Equivalence]) -> tuple[Block, ...]:
    """Cut the graph into blocks, in order; an equivalence between two neighbours joins them."""
    graph_module = captured.graph_module
    nodes = list(graph_module.graph.nodes)
    position = {node: index for index, node in enumerate(nodes)}
    live = _live_activations(captured, nodes)
    linears = list(product_nodes(graph_module))
    weights = {linear: weight_name_of(linear) for linear in linears}
    cuts = []
    for start in _block_starts([_signature(linear) for linear in linears]):
        if start == 0:
            continue
        span = range(position[linears[start - 1]], position[linears[start]])
        cut = min(span, key=lambda index: len(live[index]))
        if len(live[cut]) <= MOST_LIVE:
            cuts.append(cut)
    cuts = _without_inner_cuts(cuts, [_span(graph_module, position, e) for e in equivalences])
    computed = [index for index, node in enumerate(nodes) if node.op == "call_function"]
    edges = [computed[0] - 1, *cuts, computed[-1]] if computed else []
    results = _results(captured, nodes[-1])
    blocks = []
    for first, last in itertools.pairwise(edges):
        inside = tuple(node for node in nodes[first + 1 : last + 1] if node.op == "call_function")
        outputs = results if last == edges[-1] else live[last]
        blocks.append(
            Block(
                inside,
                tuple(node for node in outputs if node in set(inside)),
                tuple(weights[node] for node in inside if node in weights),
            )
        )
    return tuple(blocks)


def _signature(linear: Node) -> tuple[object, ...]:
    values = arguments_of(linear)
    return (linear.target, tuple(values["weight"].meta["val"].shape), values["bias"] is None)


def _block_starts(signatures: Sequence[object]) -> list[int]:
    """Index of the first linear of each block: repetitions of the longest run, then the rest likewise."""
    starts: list[int] = []
    index = 0
    while index < len(signatures):
        best_period, best_covered = 1, 1
        for period in range(1, (len(signatures) - index) // 2 + 1):
            pattern = signatures[index : index + period]
            repeats = 1
            while signatures[index + repeats * period : index + (repeats + 1) * period] == pattern:
                repeats += 1
            if repeats > 1 and repeats * period > best_covered:
                best_period, best_covered = period, repeats * period
        starts += range(index, index + best_covered, best_period)
        index += best_covered
    return starts


def _live_activations(captured: CapturedGraph, nodes: list[Node]) -> list[list[Node]]:
    """For each position, the activations computed up to it and read after it.

    An activation derives from the inputs' values through a parameterized op; masks, positions and rotary
    tables do not, and are the same for every block.
    """
    cached = set(captured.cache_pairs())
    by_value: set[Node] = set()
    activations: set[Node] = set()
    last_read: dict[Node, int] = {}
    for index, node in enumerate(nodes):
        if node.op == "placeholder":
            value = node.meta["val"]
            if isinstance(value, Tensor) and node not in cached:
                by_value.add(node)
                if value.is_floating_point():
                    activations.add(node)
        elif node.op == "call_function" and node.target not in SHAPE_QUERIES:
            inputs = node.all_input_nodes
            if any(n in by_value for n in inputs):
                by_value.add(node)
                starts = node.target in PARAMETERIZED or any(n in activations for n in inputs)
                if starts and _is_float(node.meta.get("val")):
                    activations.add(node)
        if node.op != "output":
            for n in node.all_input_nodes:
                last_read[n] = index
    live: list[list[Node]] = []
    alive: list[Node] = []
    for index, node in enumerate(nodes):
        alive = [n for n in alive if last_read[n] > index]
        if node in activations and last_read.get(node, -1) > index:
            alive.append(node)
        live.append(list(alive))
    return live


def _is_float(value: object) -> bool:
    if isinstance(value, Sequence):
        return any(map(_is_float, value))
    return isinstance(value, Tensor) and value.is_floating_point()


def _results(captured: CapturedGraph, output: Node) -> list[Node]:
    """The floating-point results of the graph, what it keeps for the next step aside."""
    successors = {*captured.cache_pairs().values(), *captured.encoded()}
    leaves = torch.utils._pytree.tree_leaves(output.args[0])
    return [
        leaf for leaf in leaves if isinstance(leaf, Node) and leaf not in successors and _is_float(leaf.meta.get("val"))
    ]


def _span(graph_module: GraphModule, position: dict[Node, int], equivalence: Equivalence) -> tuple[int, int]:
    """First and last position at which the equivalence's tensors are read."""
    names = {scaled.name for scaled in (*equivalence.divided, *equivalence.multiplied)}
    readers = [
        position[user]
        for node in graph_module.graph.nodes
        if node.op == "get_attr" and node.target in names
        for user in node.users
    ]
    return min(readers), max(readers)


def _without_inner_cuts(cuts: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """Drop the cut that an equivalence crosses; one that crosses several is left to cross them."""
    inner = set()
    for first, last in spans:
        crossed = [cut for cut in cuts if first <= cut < last]
        if len(crossed) == 1:
            inner.update(crossed)
    return [cut for cut in cuts if cut not in inner]
