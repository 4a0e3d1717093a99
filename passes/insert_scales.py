"""Put trainable scales and fake-quantization into the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from teq_graph.analysis.equivalences.equivalence import Equivalence, ScaledTensor, divide, multiply, spread
from teq_graph.config import WeightSpec
from teq_graph.graph.products import is_product, is_weight_view
from teq_graph.graph.tensors import add_tensor, get_tensor
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.quantization import fake_quantize

SMALLEST_SCALE = 1e-5  # arXiv 2310.10944, section 3.2


@dataclasses.dataclass(frozen=True)
class InsertedScales:
    """Names and nodes that `insert_scales` added; `scales[i]` is the parameter [channels] of equivalence i."""

    equivalences: tuple[Equivalence, ...]
    scales: tuple[str, ...]
    scaled: Mapping[str, Node]
    """Tensor name -> the node that gives its scaled, not quantized, value."""
    quantized: Mapping[str, Node]
    """Weight name -> the fake-quantization node that its linears read."""


def spread_scale(scale: Tensor, index: Tensor) -> Tensor:
    """`spread`, with the scale kept positive."""
    return spread(scale.clamp(min=SMALLEST_SCALE), index)


def fake_quantize_weight(weight: Tensor, bits: int, group_size: int, symmetric: bool, levels: int | None) -> Tensor:
    """`fake_quantize` with arguments that a graph can hold."""
    return fake_quantize(weight, WeightSpec(bits, group_size, symmetric, levels))


class InsertScales(GraphPass[InsertedScales]):
    """norm(x; w), linear(·; W)   becomes   norm(x; w / s), linear(·; fake_quantize(W · s))

    with s a parameter [channels] of each equivalence, all ones. Weights in `specs` are fake-quantized even
    where no equivalence reaches them. The result's value says what was added, for `FoldScales` to take out again.
    """

    def __init__(self, equivalences: Sequence[Equivalence], specs: Mapping[str, WeightSpec]) -> None:
        self.equivalences = tuple(equivalences)
        self.specs = specs

    def call(self, graph_module: GraphModule) -> PassResult[InsertedScales]:
        parts: dict[str, list[tuple[int, ScaledTensor, bool]]] = {}
        names = []
        for number, equivalence in enumerate(self.equivalences):
            device = get_tensor(graph_module, equivalence.producer).device
            ones = nn.Parameter(torch.ones(equivalence.channels, device=device))
            name = add_tensor(graph_module, f"teq_scales.{number}", ones)
            names.append(name)
            for scaled in equivalence.divided:
                parts.setdefault(scaled.name, []).append((number, scaled, True))
            for scaled in equivalence.multiplied:
                parts.setdefault(scaled.name, []).append((number, scaled, False))
        sources = {node.target: node for node in graph_module.graph.nodes if node.op == "get_attr"}
        scaled_nodes, quantized = {}, {}
        for name in [*parts, *(name for name in self.specs if name not in parts)]:
            source = sources[name]
            readers = _readers(source, name in self.specs)
            # Nodes compare by their place in the graph.
            with graph_module.graph.inserting_before(min(readers)):
                value = source
                for number, scaled, is_divided in parts.get(name, []):
                    value = self._scale(graph_module, value, names[number], scaled, is_divided)
                scaled_nodes[name] = value
                if name in self.specs:
                    spec = self.specs[name]
                    settings = (spec.bits, spec.group_size, spec.symmetric, spec.levels)
                    value = graph_module.graph.call_function(fake_quantize_weight, (value, *settings))
                    quantized[name] = value
                value.meta["val"] = source.meta["val"]
            for reader in readers:
                reader.replace_input_with(source, value)
        inserted = InsertedScales(self.equivalences, tuple(names), scaled_nodes, quantized)
        graph_module.recompile()
        return PassResult(graph_module, bool(scaled_nodes), inserted)

    @staticmethod
    def _scale(graph_module: GraphModule, value: Node, scale_name: str, scaled: ScaledTensor, is_divided: bool) -> Node:
        graph, device = graph_module.graph, get_tensor(graph_module, scale_name).device
        index = add_tensor(graph_module, f"teq_index.{scale_name.rpartition('.')[2]}", scaled.index.to(device))
        sources = [graph.create_node("get_attr", name) for name in (scale_name, index)]
        for node, name in zip(sources, (scale_name, index), strict=True):
            node.meta["val"] = get_tensor(graph_module, name)
        factor = graph.call_function(spread_scale, tuple(sources))
        factor.meta["val"] = torch.empty(scaled.index.shape, device="meta")
        result = graph.call_function(divide if is_divided else multiply, (value, factor))
        result.meta["val"] = value.meta["val"]
        return result


def _readers(source: Node, is_weight: bool) -> list[Node]:
    """Who reads the new value. A weight that is only quantized may be read elsewhere too, as it is."""
    if is_weight:
        return [user for user in source.users if is_weight_view(user) or (is_product(user) and user.args[1] is source)]
    return list(source.users)
