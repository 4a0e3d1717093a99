"""Products of experts that no one operator computes: in ONNX each expert has a product of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from teq_graph.onnx.export.initializers import add_initializer
from teq_graph.onnx.export.schemas import CONTRIB_DOMAIN, EXPERT_LINEAR, EXPERT_MATMUL_NBITS, OWN_DOMAIN, given

Weights = Sequence[ir.Value | None]


def split_experts(model: ir.Model) -> None:
    """ExpertMatMulNBits(a, experts, b, …)

    becomes   ScatterND(zeros, rows, Concat(MatMulNBits(Gather(a, rows of expert 0), b of expert 0, …), …))

    and so does ExpertLinear, with Gemm. An expert without rows computes nothing.
    """
    for node in list(model.graph):
        if node.domain == OWN_DOMAIN and node.op_type in (EXPERT_LINEAR.name, EXPERT_MATMUL_NBITS.name):
            _split(model, node)


def _split(model: ir.Model, node: ir.Node) -> None:
    tape = ir.tape.Tape()
    x, experts, *weights = node.inputs
    assert x is not None and experts is not None
    numbers = {name: attribute.as_int() for name, attribute in node.attributes.items()}
    count = numbers.pop("num_experts")
    parts = [[None] * count if value is None else _parts(model, value, count) for value in weights]
    rows, results = [], []
    for expert in range(count):
        own = _rows_of(tape, model, experts, expert)
        read = tape.op("Gather", [x, own], {"axis": 0})
        results.append(_product(tape, node.op_type, read, [values[expert] for values in parts], numbers))
        rows.append(own)
    places = tape.op("Unsqueeze", [tape.op("Concat", rows, {"axis": 0}), _constant(model, "last", np.array([-1]))])
    joined = tape.op("Concat", results, {"axis": 0})
    # Rows are as many as they were: any values of that shape and type do.
    zeros = tape.op("Sub", [joined, joined])
    tape.op("ScatterND", [zeros, places, joined])
    old, new = node.outputs[0], tape.nodes[-1].outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(model.graph, node, [node], tape.nodes, [old], [new])
    model.opset_imports.setdefault(CONTRIB_DOMAIN, 1)


def _rows_of(tape: ir.tape.Tape, model: ir.Model, experts: ir.Value, expert: int) -> ir.Value:
    """Indices [t] of the rows that an expert has."""
    hits = tape.op("Equal", [experts, _constant(model, str(expert), np.array(expert))])
    return tape.op("Reshape", [tape.op("NonZero", [hits]), _constant(model, "last", np.array([-1]))])


def _product(tape: ir.tape.Tape, kind: str, rows: ir.Value, weights: Weights, numbers: Mapping[str, int]) -> ir.Value:
    if kind == EXPERT_LINEAR.name:
        return tape.op("Gemm", given(rows, *weights), {"transB": 1})
    b, scales, zero_points, bias = (*weights, None, None)[:4]
    inputs = given(rows, b, scales, zero_points, None, bias)
    return tape.op("MatMulNBits", inputs, dict(numbers), domain=CONTRIB_DOMAIN)


def _parts(model: ir.Model, value: ir.Value, count: int) -> list[ir.Value]:
    """The entries of an initializer that belong to each expert, as initializers; made once for all who read it."""
    tensor = value.const_value
    assert tensor is not None, value.name
    array = tensor.numpy()
    size = len(array) // count
    return [
        add_initializer(model, f"{value.name}.{expert}", array[expert * size : (expert + 1) * size])
        for expert in range(count)
    ]


def _constant(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    return add_initializer(model, f"experts.{name}", array)
