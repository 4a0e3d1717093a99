"""Label propagation: where does each output channel of a producer go, and where does it escape?

Every channel gets its index as a label; of several experts, where the channels of each row are others, that of row and
channel. A label tensor has the shape of the value it describes and holds,
per element, the channel whose scale that element carries, or -1. `RULES` says how labels pass through an op;
every other op lets the labels that reach it escape, as do the graph's outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.analysis.equivalences.example_values import ExampleValues
from teq_graph.analysis.equivalences.rules import RULES, grown_cache
from teq_graph.analysis.equivalences.trace import Labels, Trace
from teq_graph.capture import CapturedGraph
from teq_graph.graph.nodes import arguments_of, is_call
from teq_graph.graph.products import EXPERT_LINEAR


def trace_channels(captured: CapturedGraph, producer: Node, dim: int, values: ExampleValues) -> Trace:
    """Follow the channels in the dimension `dim` < 0 of `producer`'s output through the graph."""
    shape = values.env[producer].shape
    trace = Trace(producer, values, captured.cache_pairs(), shape[dim], encoded=captured.encoded())
    if is_call(producer, EXPERT_LINEAR):
        trace.rows = arguments_of(producer)["experts"]
        trace.labels[producer] = torch.arange(shape.numel()).reshape(shape)
    else:
        trace.labels[producer] = torch.arange(shape[dim]).reshape(-1, *[1] * (-1 - dim)).expand(shape)
    pending = set(producer.users)
    for node in captured.graph_module.graph.nodes:
        if node not in pending:
            continue
        result = _apply_rule(node, trace)
        if result is not None:
            trace.labels[node] = result
            pending.update(node.users)
    return trace


def _apply_rule(node: Node, trace: Trace) -> Labels | None:
    if node.op == "output":
        successors = set(trace.cache_pairs.values())
        for source in node.all_input_nodes:
            goes_on = source in trace.encoded or (source in successors and grown_cache(source, trace) is not None)
            if source in trace.labels and not goes_on:
                trace.escape(trace.labels[source], node, "it is an output of the graph")
        return None
    rule = RULES.get(node.target)
    result = rule(node, trace) if rule is not None else None
    if result is None and node not in trace.columns:
        for source in node.all_input_nodes:
            if source in trace.labels:
                trace.escape(trace.labels[source], node, _why(node))
        return None
    if isinstance(result, Tensor) and not bool((result >= 0).any()):
        return None
    return result


def _why(node: Node) -> str:
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    return {
        "add": "it is added to a value that does not carry its scale",
        "sub": "it is subtracted from a value that does not carry its scale",
    }.get(name, f"{name} does not commute with a scale per channel")
