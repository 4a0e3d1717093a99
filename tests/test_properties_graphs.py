"""Random networks: what is declared foldable is exact, and every pass leaves the outputs as they were."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from support.graphs import (
    apply_random_scales_in_float64,
    capture_small,
    find,
    normalize,
    op_names,
    relative_error,
    run,
)
from support.onnx import OnnxModel
from support.random_graphs import JUMPS, RandomNetwork, random_networks
from torch import Tensor
from torch.fx import GraphModule

from teq_graph import pipeline
from teq_graph.analysis.equivalences import Equivalence
from teq_graph.capture import CapturedGraph
from teq_graph.config import BITS, WeightSpec
from teq_graph.errors import CaptureError
from teq_graph.graph.products import product_nodes, weight_name_of
from teq_graph.graph.tensors import clone_graph, set_tensor
from teq_graph.onnx.export import export_onnx
from teq_graph.passes.fold_scales import FoldScales
from teq_graph.passes.insert_scales import InsertScales
from teq_graph.passes.quantize_linears import QuantizeLinears

SIZES = ((2, 4), (3, 6), (4, 10), (3, 7))
FOUND_IN_EACH = 0.15
"""Equivalences per network, below which the test has lost its power: of 1,000 networks there are 0.39 in each, and 50
of them, which differ with what else is imported, have had as few as 0.26."""


Inputs = list[tuple[Tensor, ...]]


def capture_network(network: RandomNetwork) -> tuple[CapturedGraph, Inputs]:
    """The graph as it is, and inputs of every size that it takes; the first is that of the capture."""
    sizes = SIZES
    try:
        captured = capture_small(network, *network.example(*sizes[0]))
    except CaptureError as error:
        if "Constraints violated" not in str(error.__cause__):  # some ops need a certain length
            raise
        captured, sizes = capture_small(network, *network.example(*sizes[0]), dynamic=False), sizes[:1]
    inputs = [network.example(*sizes[0])]
    for size in sizes[1:]:
        x = network.example(*size)
        try:
            run(captured.graph_module, x)
        except RuntimeError:  # torch.export noted that some ops need an even length, say
            continue
        inputs.append(x)
    return captured, inputs


def describe(equivalences: tuple[Equivalence, ...]) -> str:
    return "\n".join(f"{e.producer} ({e.kind}, {e.channels}) -> {', '.join(e.linears)}" for e in equivalences)


@pytest.mark.slow
def test_what_is_declared_foldable_is_exact() -> None:
    counts = []

    @given(random_networks())
    def check(network: RandomNetwork) -> None:
        captured, inputs = capture_network(network)
        equivalences = find(captured).equivalences
        note(describe(equivalences))
        graph_module = captured.graph_module.double()
        network.double()
        inputs = [tuple(part.double() for part in x) for x in inputs]
        expected, ops = [run(graph_module, x) for x in inputs], op_names(graph_module)
        with torch.no_grad():
            assert relative_error(expected[0], network(*inputs[0])) <= 1e-5  # constants are folded in float32

        def check_outputs(graph_module: GraphModule) -> None:
            for x, outputs in zip(inputs, expected, strict=True):
                assert relative_error(run(graph_module, x), outputs) <= 1e-9

        spelled_out = clone_graph(graph_module)
        apply_random_scales_in_float64(spelled_out, equivalences)
        check_outputs(spelled_out)
        # The same by the passes, which compute in float32: powers of two lose nothing there.
        inserted = InsertScales(equivalences, {})(graph_module).value
        for name, equivalence in zip(inserted.scales, equivalences, strict=True):
            set_tensor(graph_module, name, torch.randint(-3, 4, (equivalence.channels,)).double().exp2())
        check_outputs(graph_module)
        FoldScales(inserted)(graph_module)
        assert op_names(graph_module) == ops
        check_outputs(graph_module)
        counts.append(len(equivalences))

    check()
    assert sum(counts) >= FOUND_IN_EACH * len(counts), "the test has lost its power"


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 2)
@given(random_networks(without=JUMPS), st.sampled_from(BITS), st.sampled_from((16, -1)), st.booleans())
def test_codes_stand_for_the_weights_that_they_dequantize_to(
    network: RandomNetwork, bits: int, group_size: int, symmetric: bool
) -> None:
    """What training computes with is what is stored."""
    captured, inputs = capture_network(network)
    graph_module = normalize(captured).graph_module
    specs = {weight_name_of(linear): WeightSpec(bits, group_size, symmetric) for linear in product_nodes(graph_module)}
    trained = clone_graph(graph_module)
    InsertScales((), specs)(trained)
    stored = pipeline.run(pipeline.quantize(specs, {}, {}), graph_module).of(QuantizeLinears)
    assert stored.keys() == specs.keys() and not list(product_nodes(graph_module))
    for x in inputs:
        assert relative_error(run(graph_module, x), run(trained, x)) <= 1e-5


@pytest.mark.slow
@settings(max_examples=settings().max_examples // 5, phases=set(settings().phases) - {Phase.shrink})
@given(random_networks(without=JUMPS | {"roll by length"}), st.sampled_from((2, 4, 8)))
def test_onnxruntime_computes_the_same(network: RandomNetwork, bits: int) -> None:
    captured, inputs = capture_network(network)
    graph_module = normalize(captured).graph_module
    specs = {weight_name_of(linear): WeightSpec(bits, 16) for linear in product_nodes(graph_module)}
    pipeline.run(pipeline.quantize(specs, {}, {}), graph_module)
    with tempfile.TemporaryDirectory() as directory:
        model = OnnxModel(export_onnx(captured, Path(directory) / "out", accuracy_level=1))
        for x in inputs:
            assert relative_error(model.outputs(x), run(graph_module, x)) <= 1e-4
