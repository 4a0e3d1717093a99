"""The tensors that a stretch of the graph reads: which they are, what they are now, and which may change."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.graph.execution import Values, constant_ancestors, run
from teq_graph.graph.nodes import arguments_of, aten, is_call
from teq_graph.graph.products import PRODUCTS, weight_node
from teq_graph.graph.tensors import node_tensor
from teq_graph.passes.insert_scales import InsertedScales

WITH_GAINS = (*PRODUCTS, aten.layer_norm.default, aten.rms_norm.default)


class StretchTensors:
    """Those of `nodes`. A weight is known by its name, whether the nodes read it as it is, scaled or quantized.

    `chosen` holds tensors that take the place of what the graph computes: codes chosen for a weight, a tuned gain.
    """

    def __init__(self, inserted: InsertedScales, nodes: Sequence[Node]) -> None:
        self.inserted = inserted
        self.nodes = nodes
        self.chosen: Values = {}

    def by_node(self, tensors: Mapping[str, Tensor]) -> Values:
        """Tensors by name as the values of the nodes from which they are read."""
        return {node: tensor for name, tensor in tensors.items() for node in self.nodes_of[name]}

    def constants(self, without: Iterable[str] = ()) -> Values:
        """What the nodes compute from tensors alone, weights above all, without gradients; but for the tensors
        `without`."""
        given = {node for name in without for node in self.nodes_of.get(name, ())}.union(self.chosen)
        result: Values = {}
        with torch.no_grad():
            run(constant_ancestors(self.nodes, given), result)
        return {**result, **self.chosen}

    def scaled(self, name: str, constants: Values | None = None) -> Tensor:
        """The float tensor `name` with its scales: among `constants` if given, or else computed."""
        node = self.inserted.scaled.get(name) or self.nodes_of[name][0]
        if constants is None:
            constants = {}
            if node.op == "call_function":
                with torch.no_grad():
                    run([*constant_ancestors([node]), node], constants)
        value: Tensor = constants[node] if node in constants else node_tensor(node)
        return value.detach()

    @functools.cached_property
    def weight_nodes(self) -> list[Node]:
        """The calls that the nodes need and that depend on tensors alone."""
        return constant_ancestors(self.nodes)

    @functools.cached_property
    def nodes_of(self) -> dict[str, list[Node]]:
        """Tensor name -> the nodes from which its value is read."""
        named = {node: name for name, node in (*self.inserted.scaled.items(), *self.inserted.quantized.items())}
        found: dict[str, list[Node]] = {}
        inside = set(self.nodes)
        for source in dict.fromkeys(source for node in self.nodes for source in node.all_input_nodes):
            name = named.get(source, str(source.target) if source.op == "get_attr" else None)
            if name is not None and source not in inside:
                found.setdefault(name, []).append(source)
        return found

    @functools.cached_property
    def linears(self) -> dict[Node, str]:
        """The linears and convolutions whose weights are quantized, and their weights' names."""
        named = {node: name for name, node in self.inserted.quantized.items()}
        calls = {node: weight_node(node) for node in self.nodes if is_call(node, *PRODUCTS)}
        return {node: named[weight] for node, weight in calls.items() if weight in named}

    def gains_and_biases(self) -> list[str]:
        """Names of the vectors that norms and linears take as their gain or bias."""
        name_of = {node: name for name, nodes in self.nodes_of.items() for node in nodes}
        found: dict[str, None] = {}
        for node in self.nodes:
            if is_call(node, *WITH_GAINS):
                for role in ("weight", "bias"):
                    source = arguments_of(node).get(role)
                    if source in name_of and source.meta["val"].dim() == 1:
                        found[name_of[source]] = None
        return list(found)
