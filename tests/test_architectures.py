"""Every architecture that is held: exact scales, a compiled graph that runs, an ONNX model with equal logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import ARCHITECTURES, VOCAB, Architecture
from support.graphs import leaves, op_names, random_scale, relative_error
from support.onnx import OnnxModel
from support.seeds import seed_of
from torch import Tensor, nn

import teq_graph
from teq_graph.compile import analyze
from teq_graph.graph.products import product_nodes, weight_name_of
from teq_graph.graph.tensors import get_tensor
from teq_graph.passes.fold_scales import FoldScales
from teq_graph.passes.insert_scales import InsertScales

STEPS = 8


@pytest.fixture(scope="module", params=ARCHITECTURES, ids=str)
def architecture(request: pytest.FixtureRequest) -> Architecture:
    result: Architecture = request.param
    return result


@pytest.fixture(scope="module")
def model(architecture: Architecture) -> nn.Module:
    torch.manual_seed(seed_of(architecture.name))
    return architecture.build()


@pytest.fixture(scope="module")
def compiled(architecture: Architecture, model: nn.Module) -> teq_graph.CompiledModel:
    calibration = [architecture.inputs(2, 12) for _ in range(2)]
    return teq_graph.compile(
        model,
        architecture.example_inputs,
        architecture.dynamic_shapes,
        calibration=calibration,
        quantization=teq_graph.QuantizationConfig(bits=8, group_size=16),
        training=teq_graph.TrainingConfig(steps=2, batch_size=2),
    )


@torch.no_grad()
def first_output(call: Any, inputs: Any) -> Tensor:
    outputs = call(**inputs) if isinstance(inputs, dict) else call(*inputs)
    return leaves(outputs)[0]


def test_scales_fold_exactly(architecture: Architecture, model: nn.Module) -> None:
    analysis = analyze(model, architecture.example_inputs, architecture.dynamic_shapes)
    captured, equivalences = analysis.captured, analysis.findings.equivalences
    graph_module = captured.graph_module
    linears = [weight_name_of(linear) for linear in product_nodes(graph_module)]
    scaled = {name for equivalence in equivalences for name in equivalence.linears}
    assert len(linears) == architecture.linears
    assert len(scaled & set(linears)) == architecture.covered
    ops, before = op_names(graph_module), graph_module.code
    inserted = InsertScales(equivalences, analysis.specs)(graph_module).value
    for name, equivalence in zip(inserted.scales, equivalences, strict=True):
        get_tensor(graph_module, name).data.copy_(random_scale(equivalence.channels))
    FoldScales(inserted)(graph_module)
    assert op_names(graph_module) == ops and graph_module.code == before
    inputs = architecture.inputs(3, 9)
    expected = first_output(model, inputs)
    args, kwargs = captured.bind(inputs)
    with torch.no_grad():
        actual = leaves(graph_module(*args, **kwargs))[0]
    assert relative_error(actual, expected) <= 1e-5


def test_compiled_graph_runs_at_other_sizes(
    architecture: Architecture, model: nn.Module, compiled: teq_graph.CompiledModel
) -> None:
    errors, chooses = [], any("expert" in name for name in op_names(compiled.graph_module))
    for batch, length in ((3, 13), (1, 1), (2, 5)):
        inputs = architecture.inputs(batch, length)
        expected = first_output(model, inputs)
        actual = first_output(compiled, inputs)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        errors.append(((actual - expected).norm(dim=-1) / expected.norm(dim=-1)).flatten())
        # 8 bits: a wrong scale or code would be an error of order one
        if not chooses:
            assert float((actual - expected).norm() / expected.norm()) <= 0.05
    # A token may get another expert by it, most do not.
    assert float(torch.cat(errors).median()) <= 0.05


decoders_only = pytest.mark.parametrize(
    "architecture", [a for a in ARCHITECTURES if a.is_decoder], indirect=True, ids=str, scope="module"
)


@decoders_only
def test_prefill_and_decode_equal_one_forward(architecture: Architecture, compiled: teq_graph.CompiledModel) -> None:
    tokens = torch.randint(0, VOCAB, (3, 5 + STEPS))
    expected = compiled(input_ids=tokens).logits
    step = compiled(input_ids=tokens[:, :5])
    logits = [step.logits]
    for position in range(5, 5 + STEPS):
        step = compiled(input_ids=tokens[:, position : position + 1], past_key_values=step.past_key_values)
        logits.append(step.logits)
    assert relative_error(torch.cat(logits, 1), expected) <= 1e-5


@decoders_only
def test_left_padding_changes_nothing(architecture: Architecture, compiled: teq_graph.CompiledModel) -> None:
    tokens = torch.randint(0, VOCAB, (2, 9))
    mask = torch.ones_like(tokens)
    mask[0, :4] = 0
    padded = compiled(input_ids=tokens, attention_mask=mask).logits
    assert relative_error(padded[:1, 4:], compiled(input_ids=tokens[:1, 4:]).logits) <= 1e-5
    assert relative_error(padded[1:], compiled(input_ids=tokens[1:]).logits) <= 1e-5


@pytest.mark.slow
def test_onnx_equals_pytorch(architecture: Architecture, compiled: teq_graph.CompiledModel, tmp_path: Path) -> None:
    onnx_model = OnnxModel(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    inputs = architecture.inputs(3, 5 + STEPS)
    expected = first_output(compiled, inputs)
    if not architecture.is_decoder:
        assert relative_error(onnx_model.run(inputs), expected) <= 1e-4
        return
    tokens = inputs["input_ids"]
    whole, _ = onnx_model.step(compiled, tokens, None)
    assert relative_error(whole, expected) <= 1e-4
    part, past = onnx_model.step(compiled, tokens[:, :5], None)
    logits = [part]
    for position in range(5, 5 + STEPS):
        part, past = onnx_model.step(compiled, tokens[:, position : position + 1], past)
        logits.append(part)
    assert relative_error(torch.from_numpy(np.concatenate([x.numpy() for x in logits], 1)), expected) <= 1e-4
