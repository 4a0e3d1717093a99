"""`compile` and `transform`: from a model to its quantized graph, or to an equal model that is easier to quantize."""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teq_graph import pipeline
from teq_graph.analysis.blocks import find_blocks
from teq_graph.analysis.equivalences import Equivalence, Findings, find_equivalences
from teq_graph.calibration import calibration_batches, check_source
from teq_graph.capture import CapturedGraph, capture, check_model, usable_device
from teq_graph.capture.pretrained import is_pretrained
from teq_graph.compiled import CompiledModel
from teq_graph.config import QuantizationConfig, TrainingConfig, WeightSpec, check_type
from teq_graph.errors import ConfigError
from teq_graph.estimate import Estimate, Estimator
from teq_graph.graph.tensors import get_tensor, tensor_bytes
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.passes.untie_weights import UntieWeights
from teq_graph.provenance import settings
from teq_graph.quantization import QuantizedWeight, find_clipped_grid, find_grid, quantize
from teq_graph.report import Report, report_sites, report_weights
from teq_graph.training import Trainer, TrainingResult
from teq_graph.training.sensitivity import choose_bits
from teq_graph.weight_plan import WeightPlan, plan_weights, specs_of, with_names, with_specs
from teq_graph.write_back import can_write_back, write_back


@dataclasses.dataclass(frozen=True)
class Analysis:
    """A captured, normalised graph, what it proves, and what its weights are to become."""

    captured: CapturedGraph
    findings: Findings
    weights: WeightPlan
    bytes: int
    notes: tuple[str, ...] = ()

    @property
    def tables(self) -> dict[str, WeightSpec]:
        """The specs of the embedding tables to quantize, which come before training."""
        return specs_of(weight for weight in self.weights if weight.kind == "embedding")

    @property
    def specs(self) -> dict[str, WeightSpec]:
        """The specs of the weights whose codes training chooses: those of products, but for those tied to such a
        table."""
        return specs_of(weight for weight in self.weights if weight.is_product and weight.kind != "embedding")


def analyze(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    quantization: QuantizationConfig = QuantizationConfig(),
) -> Analysis:
    """Capture, normalise and analyse `model`; neither trains nor quantizes anything."""
    check_type("quantization", quantization, QuantizationConfig, "a QuantizationConfig")
    captured = capture(model, example_inputs, dynamic_shapes)
    graph_module = captured.graph_module
    before = tensor_bytes(graph_module)
    pipeline.run(pipeline.NORMALIZE, graph_module)
    plan = plan_weights(captured, quantization)
    linears = specs_of(weight for weight in plan if weight.kind == "linear")
    renamed = pipeline.run(pipeline.untie(linears), graph_module).of(UntieWeights)
    findings = find_equivalences(captured)
    return Analysis(captured, findings, with_names(plan, renamed), before, tuple(_notes(model, captured)))


def compile(  # noqa: A001  the name is the contract, as torch.compile's is
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    quantization: QuantizationConfig = QuantizationConfig(),
    training: TrainingConfig | None = TrainingConfig(),
    tokenizer: Any = None,
    feature_extractor: Any = None,
    on_estimate: Callable[[Estimate], None] | None = None,
    device: str | torch.device | None = None,
) -> CompiledModel:
    """Compile `model` into a graph whose linears and convolutions compute from low-bit weights.

    model: an `nn.Module` in eval mode with float32, float16 or bfloat16 weights; it is not changed.
    example_inputs, dynamic_shapes: as for `torch.export.export`; made from the config for Hugging Face models.
    calibration: a text file's path, strings (with `tokenizer`), `[batch, seq]` token tensors, any iterable of
        the model's inputs, or a `datasets` data set; None lets a language model sample its own text.
    training: how codes are chosen and what is learned; None rounds to nearest, for which `target_bits` has no
        calibration to go by: it takes `TrainingConfig(stages=())` instead.
    tokenizer: for text calibration, and written beside the exported model.
    feature_extractor: of transformers, for an encoder-decoder that hears; written beside the exported model.
    on_estimate: told what the whole will take once that is known: the size before anything else, and again with time
        and memory after the first block. An exception of its own ends the compilation.
    device: where scales are trained and codes chosen: "cuda", for a model that is in the host's memory, where the
        result is then as well. None: where the model is.

    Raises ConfigError, CaptureError, InputError or NumericsError, each naming what is wrong.
    """
    started = time.monotonic()
    check_type("training", training, (TrainingConfig, type(None)), "a TrainingConfig, or None to round to nearest")
    check_type("on_estimate", on_estimate, (Callable, type(None)), "a function of an Estimate, or None")
    check_type("feature_extractor", feature_extractor, (Callable, type(None)), "a feature extractor, or None")
    _check_arguments(quantization, tokenizer, None if training is None else calibration)
    if training is None and quantization.target_bits is not None:
        raise ConfigError(
            f"target_bits={quantization.target_bits}: bits are chosen on calibration data; accepted with it is a "
            "TrainingConfig, with stages=() to round to nearest"
        )
    target = None if device is None else usable_device(device)
    analysis = analyze(model, example_inputs, dynamic_shapes, quantization)
    captured = analysis.captured
    home = captured.device
    if target is not None:
        captured.move_to(target)

    @functools.cache
    def batches() -> Sequence[Any]:
        assert training is not None
        return calibration_batches(calibration, captured, training, tokenizer, example_inputs)

    if training is not None and quantization.target_bits is not None:
        analysis = with_chosen_bits(analysis, batches(), quantization.target_bits, training.seed)
    estimator = Estimator(captured, analysis.weights, analysis.bytes, started, on_estimate, training, analysis.notes)
    estimator.tell_size()
    stages = training.stages_for(analysis.specs.values()) if training is not None else ()
    tables = quantize_tables(analysis, clip="clip" in stages)
    blocks = [block.linears for block in find_blocks(captured, analysis.findings.equivalences)]
    result = TrainingResult(analysis.findings.equivalences, {}, (), None)
    learns = result.equivalences or any(stage != "teq" for stage in stages)
    if training is not None and analysis.specs and stages and learns:
        trainer = Trainer(
            captured, result.equivalences, analysis.specs, batches(), training, tables, estimator.after_first_block
        )
        result = trainer.run()
    floats = {weight.name: get_tensor(captured.graph_module, weight.name) for weight in analysis.weights}
    phase = pipeline.quantize(analysis.specs, result.weights, tables)
    stored = pipeline.run(phase, captured.graph_module).of(QuantizeLinears) | tables
    asked = settings(quantization, training, stages, calibration)
    report = make_report(analysis, blocks, result, floats, stored)
    equivalences = result.equivalences
    if target is not None:
        captured.move_to(home)
        equivalences = tuple(_moved(equivalence, home) for equivalence in equivalences)
    return CompiledModel(
        captured=captured,
        equivalences=equivalences,
        report=dataclasses.replace(report, seconds=time.monotonic() - started, settings=asked),
        tokenizer=tokenizer,
        feature_extractor=feature_extractor,
        config=copy.deepcopy(getattr(model, "config", None)),
        generation_config=copy.deepcopy(getattr(model, "generation_config", None)),
    )


def transform(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    quantization: QuantizationConfig = QuantizationConfig(),
    training: TrainingConfig = TrainingConfig(),
    tokenizer: Any = None,
) -> nn.Module:
    """A copy of `model`, of the same class and with the same float output, whose weights are easier to quantize.

    The scales are trained for `quantization` and folded into the copy's parameters; nothing is quantized.
    The arguments are those of `compile`. The copy is input for any other quantizer; `save_float` of
    `teq_graph.checkpoints.directory` writes one of transformers with its tokenizer.

    Raises ConfigError where there is no scale to train: no equivalence is found, or none whose tensors are parameters.
    """
    return transform_with_sites(
        model, example_inputs, dynamic_shapes, calibration, quantization, training, tokenizer
    ).model


@dataclasses.dataclass(frozen=True)
class Transformed:
    """A transformed model, what was folded into it, and how many equivalences more its graph has."""

    model: nn.Module
    report: Report
    left: int


def transform_with_sites(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    quantization: QuantizationConfig = QuantizationConfig(),
    training: TrainingConfig = TrainingConfig(),
    tokenizer: Any = None,
) -> Transformed:
    """What `transform` does, with what was learned."""
    check_type("training", training, TrainingConfig, "a TrainingConfig, as trained scales are all that changes")
    _check_arguments(quantization, tokenizer, calibration)
    check_model(model)  # before it is copied
    result = copy.deepcopy(model)
    analysis = analyze(result, example_inputs, dynamic_shapes, quantization)
    captured = analysis.captured
    sites = analysis.findings.equivalences
    found = tuple(e for e in sites if can_write_back(captured.graph_module, e, result))
    if not found:
        name, count = type(model).__name__, len(sites)
        why = "it has no equivalence"
        if sites:
            why = f"none of its {count} equivalences is over parameters alone (buffers and sums of parameters are not)"
        raise ConfigError(
            f"{name}: {why}, so there is no scale to train; accepted are models with one that changes parameters"
        )
    if not analysis.specs:
        raise ConfigError("skip leaves no weight to quantize, for which scales could be trained; accepted are some")
    batches = calibration_batches(calibration, captured, training, tokenizer, example_inputs)
    if quantization.target_bits is not None:
        analysis = with_chosen_bits(analysis, batches, quantization.target_bits, training.seed)
    learned = Trainer(captured, found, analysis.specs, batches, dataclasses.replace(training, stages=("teq",))).run()
    write_back(captured.graph_module, found, result)
    report = Report(weights=(), sites=report_sites(learned.equivalences), blocks=learned.blocks)
    return Transformed(result, report, len(sites) - len(found))


# ------------------------------------------------------------------------------------------------------------- pieces


def _moved(equivalence: Equivalence, device: torch.device) -> Equivalence:
    scale = equivalence.scale
    return equivalence if scale is None else dataclasses.replace(equivalence, scale=scale.to(device))


def with_chosen_bits(analysis: Analysis, batches: Sequence[Any], target: float, seed: int) -> Analysis:
    """`analysis` with the free bits chosen: those that serve the float model's loss on `batches` best."""
    free = {weight.name for weight in analysis.weights if weight.bits_are_free}
    specs = choose_bits(analysis.captured, specs_of(analysis.weights), free, batches, target, seed)
    return dataclasses.replace(analysis, weights=with_specs(analysis.weights, specs))


def quantize_tables(analysis: Analysis, clip: bool) -> dict[str, QuantizedWeight]:
    """The embedding tables rounded to nearest, on clipped ranges where `clip`."""
    quantized = {}
    for name, spec in analysis.tables.items():
        weight = get_tensor(analysis.captured.graph_module, name)
        grid = (find_clipped_grid if clip else find_grid)(weight, spec, weight.dtype)
        quantized[name] = QuantizedWeight.from_codes(quantize(weight, grid), grid, weight.dtype)
    return quantized


def make_report(
    analysis: Analysis,
    blocks: Sequence[tuple[str, ...]],
    result: TrainingResult,
    floats: Mapping[str, Tensor],
    stored: Mapping[str, QuantizedWeight],
) -> Report:
    """What was done, from the linears of each block, and the weights in float and as stored."""
    return Report(
        weights=report_weights(analysis.weights, analysis.findings.scaled, floats, stored, result.errors),
        sites=report_sites(result.equivalences),
        refusals=analysis.findings.refusals,
        blocks=result.blocks,
        distillation=result.distillation,
        bytes_before=analysis.bytes,
        bytes_after=tensor_bytes(analysis.captured.graph_module),
        notes=analysis.notes,
        graph=tuple(blocks),
    )


def _check_arguments(quantization: object, tokenizer: object, calibration: object) -> None:
    """What can be refused before the model is looked at."""
    check_type("quantization", quantization, QuantizationConfig, "a QuantizationConfig")
    check_type("tokenizer", tokenizer, (Callable, type(None)), "a tokenizer of transformers, or None")
    check_source(calibration, tokenizer)


def _notes(model: Any, captured: CapturedGraph) -> Iterator[str]:
    writes = any(name.endswith("input_ids") for name in captured.input_names)
    if writes and not captured.cached and is_pretrained(model) and model.can_generate():
        why = "" if captured.without_cache is None else f" ({captured.without_cache})"
        cost = "where the model generates text, each token computes the whole text again"
        yield f"the graph keeps no KV cache{why}: {cost}"
