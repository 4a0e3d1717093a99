"""Let the runtime choose from which position on logits are computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from teq_graph.onnx.directory import LOGITS_FROM
from teq_graph.system.quiet import quiet

POSITION_WISE = {"MatMul", "MatMulNBits", "Gemm", "Add", "Sub", "Mul", "Div", "Tanh", "Cast", "Identity"}
"""Operators that make of each position [b, s, …] what they make of it alone, where the rest is constant."""
PRODUCTS = {"MatMul", "MatMulNBits", "Gemm"}

_POSITIONS = 1
"""The axis of [b, s, …]."""


def add_logits_from(model: ir.Model) -> bool:
    """x → head → logits   becomes   x → Slice(logits_from, …) → head → logits

    `logits_from` int64 [1] is a new input: 0 for all logits, -n for those of the last n positions. The vocabulary
    projection of a long prompt is a fifth of a small model's work, and its logits are the largest tensor by far;
    generation needs the last only. Returns whether there is such a head.
    """
    graph = model.graph
    logits = value = graph.outputs[0]
    head: list[ir.Node] = []
    while (node := value.producer()) is not None and node.op_type in POSITION_WISE:
        computed = [item for item in node.inputs if item is not None and not _is_constant(item)]
        if len(computed) != 1 or (head and len(value.uses()) > 1):
            break
        head.append(node)
        (value,) = computed
    if value in graph.inputs or not any(node.op_type in PRODUCTS for node in head):
        return False
    reader = head[-1]
    start = ir.Value(name=LOGITS_FROM, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    end = _constant(graph, f"{LOGITS_FROM}.end", np.iinfo(np.int64).max)
    axis = _constant(graph, f"{LOGITS_FROM}.axis", _POSITIONS)
    graph.inputs.append(start)
    # The output is no longer as long as the input.
    logits.shape = None
    chosen = ir.node("Slice", [value, start, end, axis])
    chosen.outputs[0].name = f"{value.name}.{LOGITS_FROM}"
    graph.insert_before(reader, chosen)
    for index, item in enumerate(reader.inputs):
        if item is value:
            reader.replace_input_with(index, chosen.outputs[0])
    return True


def with_chosen_logits(path: Path) -> bytes | None:
    """The model in a file, its external tensors left where they are, with `logits_from`; None where it has no head.

    The file itself is for any runtime, and onnxruntime warns of inputs that have a default.
    """
    with quiet("onnx_ir"):  # of a damaged file, it tells what it makes up for; onnxruntime refuses it
        model = ir.load(path)
    return ir.to_proto(model).SerializeToString() if add_logits_from(model) else None


def _is_constant(value: ir.Value) -> bool:
    """Whether it is a tensor, or a transposed one, as the weight of a tied head is."""
    node = value.producer()
    if node is None:
        return value.is_initializer()
    return node.op_type == "Transpose" and all(item is not None and _is_constant(item) for item in node.inputs)


def _constant(graph: ir.Graph, name: str, number: int) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    value.const_value = ir.tensor(np.array([number], dtype=np.int64), name=name)
    graph.register_initializer(value)
    return value
