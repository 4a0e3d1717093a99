"""Find every place where per-channel scales can move from a producer into linears without changing the output."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.analysis.equivalences.channels import trace_channels
from teq_graph.analysis.equivalences.equivalence import Equivalence, ProducerKind, Refusal, ScaledTensor
from teq_graph.analysis.equivalences.example_values import ExampleValues
from teq_graph.analysis.equivalences.trace import Trace
from teq_graph.capture import CapturedGraph
from teq_graph.config import check_type
from teq_graph.graph.nodes import arguments_of, aten, is_call, is_tensor_constant, operands_of, rank_of
from teq_graph.graph.products import (
    channel_dim,
    is_product,
    kind_of,
    readers_of,
    weight_name_of,
    weight_node,
)
from teq_graph.graph.tensors import node_tensor


@dataclasses.dataclass(frozen=True)
class Producer:
    """A node whose output channels, in its dimension `dim` < 0, are scaled by scaling `tensors`, each along its own."""

    node: Node
    kind: ProducerKind
    dim: int
    tensors: tuple[tuple[Node, int], ...]

    @property
    def name(self) -> str:
        return str(self.tensors[0][0].target)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What the graph proves: the equivalences, in graph order, and the producers that have none."""

    equivalences: tuple[Equivalence, ...]
    refusals: tuple[Refusal, ...]

    @functools.cached_property
    def scaled(self) -> frozenset[str]:
        """The weights of linears whose columns some equivalence scales."""
        return frozenset(name for equivalence in self.equivalences for name in equivalence.linears)


def find_equivalences(captured: CapturedGraph) -> Findings:
    """What a normalised graph proves.

        producer(x; w, b) ──movement, gating, attention──▶ product(·; W)

    is an equivalence for the channels c whose every path from the producer ends in columns of linears or convolutions:
    w[c] / s[c], b[c] / s[c] and W[:, columns carrying c] · s[c] give the same output. A channel is refused
    where it reaches an op that does not commute with a scale, a graph output, or a weight that something
    outside the site reads as well.
    """
    check_type("captured", captured, CapturedGraph, "a CapturedGraph")
    graph_module = captured.graph_module
    samples = ExampleValues.at_two_sizes(captured)
    equivalences, refusals = [], []
    for producer in producers(graph_module):
        if not samples:
            reason = "the graph runs at the example's sizes alone, which proves nothing about others"
            refusals.append(Refusal(producer.name, producer.kind, producer.node.name, reason))
            continue
        trace, *others = (trace_channels(captured, producer.node, producer.dim, values) for values in samples)
        for other in others:
            trace.require_agreement(other)
        found = _examine(producer, trace)
        if isinstance(found, Equivalence):
            equivalences.append(found)
        else:
            refusals.append(found)
    return Findings(tuple(equivalences), tuple(refusals))


def producers(graph_module: GraphModule) -> Iterator[Producer]:
    """Every node that multiplies its output channels by a constant vector: products, norms, plain gains."""
    for node in graph_module.graph.nodes:
        if is_product(node):
            bias = arguments_of(node)["bias"]
            if bias is None or is_tensor_constant(bias):
                kind: ProducerKind = kind_of(node)
                yield _producer(node, kind, channel_dim(node), (weight_node(node), 0), bias)
        elif is_call(node, aten.layer_norm.default, aten.rms_norm.default):
            values = arguments_of(node)
            bias = values.get("bias")
            constant = is_tensor_constant(values["weight"]) and (bias is None or is_tensor_constant(bias))
            if constant and len(values["normalized_shape"]) == 1:
                kind = "layer_norm" if "bias" in values else "rms_norm"
                yield _producer(node, kind, -1, (values["weight"], 0), bias)
        elif is_call(node, aten.mul.Tensor):
            first, second = operands_of(node)
            for gain, x in ((first, second), (second, first)):
                dim = _gain_dim(gain, node)
                if dim is not None and isinstance(x, Node) and not is_tensor_constant(x):
                    yield _producer(node, "gain", dim, (gain, rank_of(gain) + dim), None)


def _producer(node: Node, kind: ProducerKind, dim: int, weight: tuple[Node, int], bias: Node | None) -> Producer:
    # A norm may use one tensor as both; it is scaled once.
    return Producer(node, kind, dim, (weight, *([(bias, 0)] if bias not in (None, weight[0]) else [])))


def _gain_dim(value: object, node: Node) -> int | None:
    """The dimension < 0 of the product `node` along which `value` has one number for each channel; None if it has
    not."""
    if not is_tensor_constant(value) or not node_tensor(value).is_floating_point():
        return None
    shape, result = node_tensor(value).shape, node.meta["val"].shape
    dims = range(-1, -1 - len(shape), -1)
    return next((dim for dim in dims if shape[dim] == shape.numel() == result[dim]), None)


def _examine(producer: Producer, trace: Trace) -> Equivalence | Refusal:
    """The equivalence of the labels that never escape, or the reason why there is none."""
    _refuse_shared(producer, trace)
    count = trace.values.env[producer.node].shape[producer.dim]
    reached = {label for columns in trace.columns.values() for label in columns.unique().tolist() if label >= 0}
    alive = sorted(reached - trace.escapes.keys())
    if not alive:
        escape = trace.escapes.get(min(trace.escapes)) if trace.escapes else None
        node = escape.node if escape else producer.node
        reason = escape.reason if escape else "no linear or convolution reads it"
        return Refusal(producer.name, producer.kind, node.name, reason)
    # Label -> channel of the equivalence; the extra last entry sends label -1 to -1.
    channel = torch.full((count + 1,), -1)
    channel[alive] = torch.arange(len(alive))
    divided = [_along(node, dim, channel[:count]) for node, dim in producer.tensors]
    divided += [ScaledTensor(str(node.target), channel[labels]) for node, labels in trace.constants.items()]
    multiplied = {}
    for product, columns in trace.columns.items():
        scaled = ScaledTensor(weight_name_of(product), channel[columns])
        if bool((scaled.index >= 0).any()):
            multiplied[scaled.name] = scaled
    found = Equivalence(producer.name, producer.kind, len(alive), tuple(divided), tuple(multiplied.values()))
    return found if trace.rows is None else _of_each_expert(found, arguments_of(producer.node)["num_experts"])


def _of_each_expert(shared: Equivalence, experts: int) -> Equivalence:
    """`shared`, whose channels are the same in all experts, with channels of its own for each."""
    first = shared.channels * torch.arange(experts)

    def apart(scaled: ScaledTensor) -> ScaledTensor:
        # [N] of a bias; [N, 1] and [1, K] of weights.
        index = scaled.index[None] + first.reshape(-1, *[1] * scaled.index.dim())
        index = index.where(scaled.index >= 0, -1)
        return ScaledTensor(scaled.name, index if scaled.index.dim() > 1 else index.flatten())

    divided, multiplied = (tuple(map(apart, tensors)) for tensors in (shared.divided, shared.multiplied))
    channels = experts * shared.channels
    return dataclasses.replace(shared, channels=channels, divided=divided, multiplied=multiplied)


def _along(node: Node, dim: int, index: Tensor) -> ScaledTensor:
    shape = [1] * rank_of(node)
    shape[dim] = -1
    return ScaledTensor(str(node.target), index.reshape(shape))


def _refuse_shared(producer: Producer, trace: Trace) -> None:
    """Let labels escape where a tensor that would be scaled is read from outside the site as well."""
    everything = torch.arange(trace.values.env[producer.node].shape[producer.dim])
    for tensor, _ in producer.tensors:
        _refuse_other_readers(tensor, {producer.node}, everything, trace)
    for constant, labels in trace.constants.items():
        adders = {node for node in constant.users if node in trace.labels}
        _refuse_other_readers(constant, adders if len(adders) == 1 else set(), labels, trace)
    for product, columns in trace.columns.items():
        weight = weight_node(product)
        twins = {
            node for node, other in trace.columns.items() if weight_node(node) is weight and torch.equal(other, columns)
        }
        _refuse_other_readers(weight, twins, columns, trace)


def _refuse_other_readers(tensor: Node, inside: set[Node], labels: Tensor, trace: Trace) -> None:
    others = [node for node in readers_of(tensor) if node not in inside]
    if others:
        trace.escape(labels, others[0], f"{tensor.target} is shared with {others[0].name}")
