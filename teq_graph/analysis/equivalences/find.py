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
from teq_graph.graph.nodes import arguments_of, aten, is_call, is_tensor_constant, operand_of, operands_of, rank_of
from teq_graph.graph.tensors import node_tensor


@dataclasses.dataclass(frozen=True)
class Producer:
    """A node whose output channels are scaled by scaling `tensors`, each along its given dimension."""

    node: Node
    kind: ProducerKind
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

        producer(x; w, b) ──movement, gating, attention──▶ linear(·; W)

    is an equivalence for the channels c whose every path from the producer ends in a linear's columns:
    w[c] / s[c], b[c] / s[c] and W[:, columns carrying c] · s[c] give the same output. A channel is refused
    where it reaches an op that does not commute with a scale, a graph output, or a weight that something
    outside the site reads as well.
    """
    check_type("captured", captured, CapturedGraph, "a CapturedGraph")
    graph_module = captured.graph_module
    samples = ExampleValues.at_two_sizes(captured)
    cache_pairs = captured.cache_pairs()
    equivalences, refusals = [], []
    for producer in producers(graph_module):
        if not samples:
            reason = "the graph runs at the example's sizes alone, which proves nothing about others"
            refusals.append(Refusal(producer.name, producer.kind, producer.node.name, reason))
            continue
        trace, *others = (trace_channels(graph_module, producer.node, values, cache_pairs) for values in samples)
        for other in others:
            trace.require_agreement(other)
        found = _examine(producer, trace)
        if isinstance(found, Equivalence):
            equivalences.append(found)
        else:
            refusals.append(found)
    return Findings(tuple(equivalences), tuple(refusals))


def producers(graph_module: GraphModule) -> Iterator[Producer]:
    """Every node that multiplies its output channels by a constant vector: linears, norms, plain gains."""
    for node in graph_module.graph.nodes:
        if is_call(node, aten.linear.default) and is_tensor_constant(node.args[1]):
            values = arguments_of(node)
            if values["bias"] is None or is_tensor_constant(values["bias"]):
                yield _producer(node, "linear", values["weight"], values["bias"])
        elif is_call(node, aten.layer_norm.default, aten.rms_norm.default):
            values = arguments_of(node)
            bias = values.get("bias")
            constant = is_tensor_constant(values["weight"]) and (bias is None or is_tensor_constant(bias))
            if constant and len(values["normalized_shape"]) == 1:
                kind: ProducerKind = "layer_norm" if "bias" in values else "rms_norm"
                yield _producer(node, kind, values["weight"], bias)
        elif is_call(node, aten.mul.Tensor):
            first, second = operands_of(node)
            for gain, x in ((first, second), (second, first)):
                if _is_gain(gain, node) and isinstance(x, Node) and not is_tensor_constant(x):
                    yield _producer(node, "gain", gain, None)


def _producer(node: Node, kind: ProducerKind, weight: Node, bias: Node | None) -> Producer:
    # Channels are a linear's rows, and the only dimension of a gain; a bias has one dimension.
    dim = 0 if kind == "linear" else rank_of(weight) - 1
    # A norm may use one tensor as both; it is scaled once.
    return Producer(node, kind, ((weight, dim), *([(bias, 0)] if bias not in (None, weight) else [])))


def _is_gain(value: object, node: Node) -> bool:
    if not is_tensor_constant(value):
        return False
    tensor = node_tensor(value)
    width = node.meta["val"].shape[-1]
    return tensor.is_floating_point() and tensor.dim() >= 1 and tensor.numel() == tensor.shape[-1] == width


def _examine(producer: Producer, trace: Trace) -> Equivalence | Refusal:
    """The equivalence of the labels that never escape, or the reason why there is none."""
    _refuse_shared(producer, trace)
    count = trace.values.env[producer.node].shape[-1]
    reached = {label for columns in trace.columns.values() for label in columns.tolist() if label >= 0}
    alive = sorted(reached - trace.escapes.keys())
    if not alive:
        escape = trace.escapes.get(min(trace.escapes)) if trace.escapes else None
        node = escape.node if escape else producer.node
        reason = escape.reason if escape else "no linear reads it"
        return Refusal(producer.name, producer.kind, node.name, reason)
    # Label -> channel of the equivalence; the extra last entry sends label -1 to -1.
    channel = torch.full((count + 1,), -1)
    channel[alive] = torch.arange(len(alive))
    divided = [_along(node, dim, channel[:count]) for node, dim in producer.tensors]
    divided += [ScaledTensor(str(node.target), channel[labels]) for node, labels in trace.constants.items()]
    multiplied = {}
    for linear, columns in trace.columns.items():
        scaled = _along(operand_of(linear, 1), 1, channel[columns])
        if bool((scaled.index >= 0).any()):
            multiplied[scaled.name] = scaled
    return Equivalence(producer.name, producer.kind, len(alive), tuple(divided), tuple(multiplied.values()))


def _along(node: Node, dim: int, index: Tensor) -> ScaledTensor:
    shape = [1] * rank_of(node)
    shape[dim] = -1
    return ScaledTensor(str(node.target), index.reshape(shape))


def _refuse_shared(producer: Producer, trace: Trace) -> None:
    """Let labels escape where a tensor that would be scaled is read from outside the site as well."""
    everything = torch.arange(trace.values.env[producer.node].shape[-1])
    for tensor, _ in producer.tensors:
        _refuse_other_readers(tensor, {producer.node}, everything, trace)
    for constant, labels in trace.constants.items():
        adders = {node for node in constant.users if node in trace.labels}
        _refuse_other_readers(constant, adders if len(adders) == 1 else set(), labels, trace)
    for linear, columns in trace.columns.items():
        weight = operand_of(linear, 1)
        twins = {
            node for node, other in trace.columns.items() if node.args[1] is weight and torch.equal(other, columns)
        }
        _refuse_other_readers(weight, twins, columns, trace)


def _refuse_other_readers(tensor: Node, inside: set[Node], labels: Tensor, trace: Trace) -> None:
    others = [node for node in tensor.users if node not in inside]
    if others:
        trace.escape(labels, others[0], f"{tensor.target} is shared with {others[0].name}")
