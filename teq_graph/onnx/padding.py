"""Decoders without padding: each sequence of a batch has its own length, and nothing hides what is before it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

ATTENTION = "GroupQueryAttention"
LAST_POSITIONS = "last_positions"
"""Input int32 [b]: the position of each sequence's newest token."""
TOTAL_LENGTH = "total_length"
"""Input int32 [1], in the host's memory: positions that any of the sequences reaches, or those of the buffer."""

_LAST, _TOTAL, _BIAS = 5, 6, 10
"""Inputs of GroupQueryAttention."""
_SHAPING = {"Cast", "Clip", "Expand", "Identity", "Unsqueeze"}
_LARGE = 1e4
"""What hides a position at least: exp(-1e4) is zero in every type."""

Lengths = Callable[[ir.Graph, ir.Value], tuple[ir.Value, ir.Value]]
"""(graph, attention mask) -> GroupQueryAttention's `seqlens_k` and `total_sequence_length`."""


def count_lengths(model: ir.Model) -> bool:
    """GroupQueryAttention(…, bias of the mask)   becomes   GroupQueryAttention(…, ReduceSum(mask) - 1, Shape(mask))

    Then the tokens of a sequence are the first so many of its row, padding comes after them, and the mask may be as
    long as the cache's buffer: a step's shapes can stay as they are. On a GPU attention without a bias has kernels
    that read each key once. Returns whether all attentions are such.
    """
    return _replace_bias(model, _count)


def take_lengths(model: ir.Model) -> bool:
    """GroupQueryAttention(…, bias of the mask)   becomes   GroupQueryAttention(…, last_positions, total_length)

    Both are inputs in the place of `attention_mask`: of a step on a GPU, nothing is left for the processor. Returns
    whether all attentions are such, and nothing else reads the mask.
    """
    return _replace_bias(model, _inputs, only=True)


def _replace_bias(model: ir.Model, lengths: Lengths, only: bool = False) -> bool:
    graph = model.graph
    mask = next((value for value in graph.inputs if value.name == "attention_mask"), None)
    attentions = [node for node in graph if node.op_type == ATTENTION]
    if mask is None or not attentions or not all(_hides_padding_alone(node, mask) for node in attentions):
        return False
    if only and not _goes_to_attentions(mask):
        return False
    last, total = lengths(graph, mask)
    for node in attentions:
        node.replace_input_with(_LAST, last)
        node.replace_input_with(_TOTAL, total)
        node.replace_input_with(_BIAS, None)
    common.RemoveUnusedNodesPass()(model)
    if only:
        graph.inputs.remove(mask)
    return True


def _hides_padding_alone(attention: ir.Node, mask: ir.Value) -> bool:
    """Whether the bias is (mask - 1) * large: nothing where the mask is 1."""
    if len(attention.inputs) <= _BIAS or (value := attention.inputs[_BIAS]) is None:
        return False
    while (node := value.producer()) is not None and node.op_type in _SHAPING:
        value = _first(node)
    if node is None or node.op_type != "Mul":
        return False
    hidden, large = node.inputs
    if hidden is None or (number := _number(large)) is None or number < _LARGE:
        return False
    node = hidden.producer()
    if node is None or node.op_type != "Sub" or _number(node.inputs[1]) != 1:
        return False
    value = _first(node)
    while (node := value.producer()) is not None and node.op_type == "Cast":
        value = _first(node)
    return value is mask


def _goes_to_attentions(mask: ir.Value) -> bool:
    """Whether what is computed of the mask goes to attentions, as bias and lengths, and nowhere else."""
    waiting: list[ir.Value] = [mask]
    seen: set[ir.Node] = set()
    while waiting:
        value = waiting.pop()
        if value.is_graph_output():
            return False
        for use in value.uses():
            if use.node.op_type == ATTENTION:
                if use.idx not in (_LAST, _TOTAL, _BIAS):
                    return False
            elif use.node not in seen:
                seen.add(use.node)
                waiting.extend(use.node.outputs)
    return True


def _count(graph: ir.Graph, mask: ir.Value) -> tuple[ir.Value, ir.Value]:
    one = _constant(graph, "lengths.one", np.array([1], np.int64))
    nodes = [
        counted := ir.node("ReduceSum", [mask, one], {"keepdims": 0}),
        last := ir.node("Sub", [counted.outputs[0], one]),
        ir.node("Cast", [last.outputs[0]], {"to": ir.DataType.INT32}),
        length := ir.node("Shape", [mask], {"start": 1, "end": 2}),
        ir.node("Cast", [length.outputs[0]], {"to": ir.DataType.INT32}),
    ]
    for index, node in enumerate(nodes):
        node.outputs[0].name = f"lengths.{index}"
    graph.insert_before(graph[0], nodes)
    return nodes[2].outputs[0], nodes[4].outputs[0]


def _inputs(graph: ir.Graph, _: ir.Value) -> tuple[ir.Value, ir.Value]:
    integer = ir.TensorType(ir.DataType.INT32)
    last = ir.Value(name=LAST_POSITIONS, shape=ir.Shape(["batch_size"]), type=integer)
    total = ir.Value(name=TOTAL_LENGTH, shape=ir.Shape([1]), type=integer)
    graph.inputs.extend([last, total])
    return last, total


def _first(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _number(value: ir.Value | None) -> float | None:
    """The one number of a constant."""
    tensor = None if value is None else value.const_value
    return float(tensor.numpy().item()) if tensor is not None and tensor.size == 1 else None


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(ir.DataType.INT64))
    value.const_value = ir.tensor(array, name=name)
    graph.register_initializer(value)
    return value
