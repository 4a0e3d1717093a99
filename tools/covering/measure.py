"""What becomes of one class: captured, exact after folding, equal in ONNX, with a cache."""

from __future__ import annotations

import inspect
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from support.graphs import apply_random_scales, leaves
from support.onnx import OnnxModel
from torch import Tensor, nn

import teq_graph
from covering.classes import ModelClass
from covering.configurations import build, candidates
from covering.page import EXACT
from teq_graph import pipeline
from teq_graph.capture import CapturedGraph
from teq_graph.compile import Analysis, analyze, make_report, quantize_tables
from teq_graph.compiled import CompiledModel
from teq_graph.errors import CaptureError, TeqGraphError, one_line
from teq_graph.graph.tensors import clone_graph, get_tensor
from teq_graph.onnx.runtime import load
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.training import TrainingResult

STATE = Path("state")
"""Where a process keeps what it has found so far, for whoever ends it."""
QUANTIZATION = teq_graph.QuantizationConfig(bits=4, group_size=16)


@torch.no_grad()
def measure(model_class: ModelClass) -> dict[str, Any]:
    """All figures of a class. `refused` is what we say where we refuse, `bare` any other exception of ours."""
    row: dict[str, Any] = {"stage": "build"}
    torch.manual_seed(0)
    try:
        analysis = _first_that_runs(model_class, row)
        if analysis is not None:
            _fold(analysis, row)
            _export(analysis, row)
    except TeqGraphError as error:
        row["refused"] = str(error)
    except Exception as error:
        # torch has no exception of its own for the memory of the CPU.
        kind = "stopped" if "can't allocate memory" in str(error) else "bare"
        row[kind] = f"{type(error).__name__}: {one_line(error)}"
    return row


def _first_that_runs(model_class: ModelClass, row: dict[str, Any]) -> Analysis | None:
    """The smallest model that can be built and takes its inputs; a refusal of the last where none does."""
    import transformers

    config_class = transformers.AutoConfig.for_model(model_class.model_type).__class__
    refusal: CaptureError | None = None
    reasons = []
    for values in candidates(config_class, model_class.task):
        try:
            model = build(getattr(transformers, model_class.name), config_class.from_dict(values))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {one_line(error)}")
            continue
        row["can_generate"] = _writes(model)
        _forget_output()
        try:
            row["stage"] = "capture"
            _note(row)
            return analyze(model, quantization=QUANTIZATION)
        except CaptureError as error:
            if "fails on" not in str(error):
                raise
            refusal = refusal or error
    if refusal is not None:
        raise refusal
    row["not built"] = reasons[0]
    return None


def _writes(model: nn.Module) -> bool:
    """Whether it generates token after token; what `generate` of others does is one forward."""
    taken = inspect.signature(model.forward).parameters
    return bool(getattr(model, "can_generate", bool)()) and not {"input_ids", "decoder_input_ids"}.isdisjoint(taken)


def _looks_ahead(captured: CapturedGraph) -> bool:
    """Whether a text's last token changes what is given for those before it: there is nothing to cache then."""
    inputs = captured.example_kwargs
    texts = [name for name in inputs if name in ("input_ids", "attention_mask", "decoder_input_ids")]
    begun = inputs | {name: inputs[name][:, :-1] for name in texts}
    whole, part = (leaves(captured.graph_module(**given))[0] for given in (inputs, begun))
    return whole.dim() == 3 and _difference(whole[:, : part.shape[1]], part) > EXACT


def _fold(analysis: Analysis, row: dict[str, Any]) -> None:
    """Random scales of every equivalence, folded: the largest difference of the float outputs."""
    captured, findings = analysis.captured, analysis.findings
    keeps = captured.decoder is not None or captured.encoder_decoder is not None
    row |= {"stage": "fold", "captured": True, "cache": keeps}
    row["looks_ahead"] = bool(row["can_generate"] and not keeps and _looks_ahead(captured))
    row["notes"] = list(analysis.notes)
    row["equivalences"] = len(findings.equivalences)
    products = [weight for weight in analysis.weights if weight.is_product]
    row["weights"] = len(products)
    row["quantized"] = sum(weight.spec is not None for weight in products)
    row["kinds"] = sorted({weight.kind for weight in products})
    _note(row)
    graph_module = clone_graph(captured.graph_module)
    args, kwargs = _inputs(captured)
    before = _outputs(captured, graph_module(*args, **kwargs))
    apply_random_scales(graph_module, findings.equivalences)
    row["exact"] = _difference(_outputs(captured, graph_module(*args, **kwargs)), before)


def _inputs(captured: CapturedGraph) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Those that it was captured with; of a decoder without a past, which a folded scale would scale, too."""
    if captured.encoder_decoder is not None:
        return captured.bind(_source(captured) | {"decoder_input_ids": _written(captured)})
    if captured.decoder is None:
        return captured.example_args, captured.example_kwargs
    return captured.bind({"input_ids": torch.randint(3, captured.decoder.vocab_size, (2, 8))})


def _outputs(captured: CapturedGraph, result: Any) -> Any:
    """All outputs, of a decoder the logits alone: folded scales change what is cached."""
    return result if captured.decoder is None and captured.encoder_decoder is None else result[0]


def _source(captured: CapturedGraph) -> dict[str, Tensor]:
    """What the encoder of an encoder-decoder reads, as it was captured with."""
    assert captured.encoder_decoder is not None
    source: dict[str, Tensor] = captured.example_args[0]
    return source


def _written(captured: CapturedGraph) -> Tensor:
    assert captured.encoder_decoder is not None
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, captured.encoder_decoder.decoder.vocab_size, (2, 6), generator=generator)


def _export(analysis: Analysis, row: dict[str, Any]) -> None:
    """Rounded to nearest as `compile` does, and exported: the largest difference between onnxruntime and the graph."""
    row["stage"] = "compile"
    _note(row)
    captured, found = analysis.captured, analysis.findings.equivalences
    floats = {weight.name: get_tensor(captured.graph_module, weight.name) for weight in analysis.weights}
    tables = quantize_tables(analysis, clip=False)
    stored = pipeline.run(pipeline.quantize(analysis.specs, {}, tables), captured.graph_module).of(QuantizeLinears)
    report = make_report(analysis, (), TrainingResult(found, {}, (), None), floats, stored | tables)
    compiled = CompiledModel(captured, found, report)
    row["stage"] = "export"
    _note(row)
    with tempfile.TemporaryDirectory() as directory:
        path = compiled.export_onnx(Path(directory) / "out", accuracy_level=1)
        row["stage"] = "onnxruntime"
        _note(row)
        if captured.encoder_decoder is not None:
            args, kwargs = _inputs(captured)
            source = _source(captured)
            first = next(iter(source.values()))
            given = first.tolist() if "input_ids" in source else first.numpy()
            logits = torch.from_numpy(load(path).logits(given, _written(captured).numpy()))
            row["onnx"] = _difference(logits, compiled.graph_module(*args, **kwargs)[0])
            row["stage"] = "done"
            return
        onnx_model = OnnxModel(path)
        if captured.decoder is not None:
            row["steps"], row["onnx"] = _generate(compiled, onnx_model)
        else:
            tensors = {name: x for name, x in captured.example_kwargs.items() if isinstance(x, Tensor)}
            expected = compiled.graph_module(*captured.example_args, **captured.example_kwargs)
            row["onnx"] = _difference(onnx_model.outputs(tensors or captured.example_args), expected)
    row["stage"] = "done"


def _generate(compiled: CompiledModel, onnx_model: OnnxModel) -> tuple[float, float]:
    """Logits of a text in steps: beside those of one forward, and in onnxruntime beside those in PyTorch."""
    decoder = compiled.captured.decoder
    assert decoder is not None
    tokens = torch.randint(3, decoder.vocab_size, (2, 8))
    ours, theirs = [], []
    past, onnx_past = None, None
    for begin, end in ((0, 5), (5, 6), (6, 7), (7, 8)):
        mask = torch.ones(2, end, dtype=torch.long)
        logits, past = compiled(tokens[:, begin:end], mask, past)
        ours.append(logits)
        logits, onnx_past = onnx_model.step(compiled, tokens[:, begin:end], onnx_past, mask)
        theirs.append(logits)
    steps = torch.cat(ours, 1)
    return _difference(steps, compiled(input_ids=tokens).logits), _difference(torch.cat(theirs, 1), steps)


def _difference(actual: Any, expected: Any) -> float:
    """The largest difference of float outputs relative to the largest value of each, the worst of all."""
    pairs = zip(leaves(actual), leaves(expected), strict=True)
    return max((_relative(a.double(), e.double()) for a, e in pairs if e.is_floating_point()), default=0.0)


def _relative(actual: Tensor, expected: Tensor) -> float:
    finite = expected.isfinite()
    if actual.shape != expected.shape or not torch.equal(actual.isfinite(), finite):
        return math.inf
    if not finite.any():
        return 0.0
    return float((actual - expected)[finite].abs().max() / expected[finite].abs().max().clamp(min=1e-30))


def _note(row: dict[str, Any]) -> None:
    STATE.write_text(json.dumps(row), encoding="utf-8")


def _forget_output() -> None:
    """What was printed so far is of transformers building the model."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.ftruncate(1, 0)
    os.lseek(1, 0, os.SEEK_SET)
