"""The pipeline: one ordered list from a model to its quantized graph."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import GraphModule

from teq_graph import pipeline
from teq_graph.analysis.blocks import find_blocks
from teq_graph.analysis.embeddings import find_embeddings
from teq_graph.analysis.equivalences import Equivalence, Findings, find_equivalences
from teq_graph.analysis.other_weights import OtherWeight, find_other_weights
from teq_graph.calibration import calibration_batches
from teq_graph.capture import CapturedGraph, capture
from teq_graph.capture.pretrained import is_pretrained
from teq_graph.compiled import CompiledModel
from teq_graph.config import QuantizationConfig, TrainingConfig, WeightSpec
from teq_graph.errors import CaptureError, ConfigError
from teq_graph.graph.nodes import linear_nodes, weight_name_of
from teq_graph.graph.tensors import get_tensor, node_tensor, set_tensor
from teq_graph.passes.fold_scales import FoldScales
from teq_graph.passes.insert_scales import InsertScales
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.passes.untie_weights import UntieWeights
from teq_graph.quantization import QuantizedWeight, find_clipped_grid, find_grid, quantize
from teq_graph.report import BlockReport, EmbeddingReport, LinearReport, Report
from teq_graph.training import Trainer
from teq_graph.training.sensitivity import choose_bits
from teq_graph.write_back import can_write_back, write_back

Decision = tuple[str, WeightSpec | None, str | None]
"""Name of a weight, its spec, and where it has none the reason."""


@dataclasses.dataclass
class Analysis:
    """A captured, normalised graph and what it proves."""

    captured: CapturedGraph
    specs: dict[str, WeightSpec]
    kept_in_float: dict[str, str]
    """Weight name of a linear -> why it is not quantized."""
    findings: Findings
    bytes: int
    free: frozenset[str] = frozenset()
    """The weights whose bits are yet to be chosen."""
    other_weights: tuple[OtherWeight, ...] = ()
    notes: tuple[str, ...] = ()
    tables: dict[str, WeightSpec] = dataclasses.field(default_factory=dict)
    """The embedding tables to quantize, by name; that of a tied projection is in `specs` as well."""
    tables_in_float: dict[str, str] = dataclasses.field(default_factory=dict)
    """Name of another embedding table -> why it is not quantized, where any was to be."""

    @property
    def trained_specs(self) -> dict[str, WeightSpec]:
        """The specs of the weights whose codes training chooses: not those of tables, which come before it."""
        return {name: spec for name, spec in self.specs.items() if name not in self.tables}

    @property
    def linears(self) -> list[Decision]:
        """What becomes of the weight of each linear."""
        return _decisions(self.specs, self.kept_in_float)

    @property
    def embeddings(self) -> list[Decision]:
        """What becomes of each embedding table, where any was to be quantized."""
        return _decisions(self.tables, self.tables_in_float)

    def choose_bits(self, batches: Sequence[Any], target: float, seed: int) -> None:
        """Give the `free` weights the bits that serve the float model's loss on `batches` best."""
        specs = choose_bits(self.captured, self.specs | self.tables, self.free, batches, target, seed)
        self.specs = {name: specs[name] for name in self.specs}

    def quantize_tables(self, clip: bool) -> dict[str, QuantizedWeight]:
        """The embedding tables rounded to nearest, on clipped ranges where `clip`."""
        quantized = {}
        for name, spec in self.tables.items():
            weight = get_tensor(self.captured.graph_module, name)
            grid = (find_clipped_grid if clip else find_grid)(weight, spec, weight.dtype)
            quantized[name] = QuantizedWeight.from_codes(quantize(weight, grid), grid, weight.dtype)
        return quantized


def _decisions(specs: Mapping[str, WeightSpec], kept: Mapping[str, str]) -> list[Decision]:
    return [*((name, spec, None) for name, spec in specs.items()), *((n, None, reason) for n, reason in kept.items())]


def analyze(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    quantization: QuantizationConfig = QuantizationConfig(),
) -> Analysis:
    """Capture, normalise and analyse `model`; neither trains nor quantizes anything."""
    captured = capture(model, example_inputs, dynamic_shapes)
    graph_module = captured.graph_module
    before = tensor_bytes(graph_module)
    pipeline.run(pipeline.NORMALIZE, graph_module)
    specs, kept = choose_linears(captured, quantization)
    tables, tables_in_float = choose_embeddings(captured, quantization, specs)
    _check_patterns(quantization, list(dict.fromkeys([*specs, *kept, *tables, *tables_in_float])))
    # Before the analysis: a tied projection of its own can be scaled, a shared one cannot.
    renamed = pipeline.run(pipeline.untie(specs.keys() - tables.keys()), graph_module).of(UntieWeights)
    chooses = [name for name in specs if quantization.chooses_bits_of(name) and name not in tables]
    free = frozenset(renamed.get(name, name) for name in chooses)
    specs = {renamed.get(name, name): spec for name, spec in specs.items()}
    findings = find_equivalences(captured)
    others, notes = find_other_weights(graph_module), tuple(_notes(model, captured))
    return Analysis(captured, specs, kept, findings, before, free, others, notes, tables, tables_in_float)


def compile(  # noqa: A001  the name is the contract, as torch.compile's is
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
    calibration: Any = None,
    quantization: QuantizationConfig = QuantizationConfig(),
    training: TrainingConfig | None = TrainingConfig(),
    tokenizer: Any = None,
) -> CompiledModel:
    """Compile `model` into a graph whose linears compute from low-bit weights.

    model: an `nn.Module` in eval mode with float32, float16 or bfloat16 weights; it is not changed.
    example_inputs, dynamic_shapes: as for `torch.export.export`; made from the config for Hugging Face models.
    calibration: a text file's path, strings (with `tokenizer`), `[batch, seq]` token tensors, any iterable of
        the model's inputs, or a `datasets` data set; None lets a language model sample its own text.
    training: how the scales are learned; None rounds to nearest without any scales, for which `target_bits` has no
        calibration to go by: it takes `TrainingConfig(stages=())` instead.
    tokenizer: for text calibration, and written beside the exported model.

    Raises ConfigError, CaptureError, InputError or NumericsError, each naming what is wrong.
    """
    started = time.monotonic()
    if not (training is None or isinstance(training, TrainingConfig)):
        raise ConfigError(f"training={training!r}: accepted are a TrainingConfig and None")
    if training is None and quantization.target_bits is not None:
        raise ConfigError(
            f"target_bits={quantization.target_bits}: bits are chosen on calibration data; accepted with it is a "
            "TrainingConfig, with stages=() to round to nearest"
        )
    analysis = analyze(model, example_inputs, dynamic_shapes, quantization)
    captured, batches = analysis.captured, None
    if training is not None and quantization.target_bits is not None:
        batches = calibration_batches(calibration, captured, training, tokenizer, example_inputs)
        analysis.choose_bits(batches, quantization.target_bits, training.seed)
    specs = analysis.trained_specs
    equivalences, blocks = analysis.findings.equivalences, tuple[BlockReport, ...]()
    chosen: Mapping[str, QuantizedWeight] = {}
    stages = training.stages_for(specs.values()) if training is not None else ()
    tables = analysis.quantize_tables(clip="clip" in stages)
    if training is not None and specs and (equivalences or any(stage != "scales" for stage in stages)):
        batches = batches or calibration_batches(calibration, captured, training, tokenizer, example_inputs)
        equivalences, blocks, chosen = train(analysis, batches, training, tables)
    originals = {name: get_tensor(captured.graph_module, name) for name in specs | analysis.tables}
    done = pipeline.run(pipeline.quantize(specs, chosen, tables), captured.graph_module)
    report = dataclasses.replace(
        make_report(analysis, blocks, originals, done.of(QuantizeLinears) | tables), seconds=time.monotonic() - started
    )
    config = getattr(model, "config", None)
    return CompiledModel(
        captured=captured,
        equivalences=equivalences,
        report=report,
        tokenizer=tokenizer,
        config=copy.deepcopy(config),
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
    The arguments are those of `compile`. The copy is input for any other quantizer.
    """
    if not isinstance(training, TrainingConfig):
        raise ConfigError(
            f"training={training!r}: accepted is a TrainingConfig, as trained scales are all that changes"
        )
    result = copy.deepcopy(model)
    analysis = analyze(result, example_inputs, dynamic_shapes, quantization)
    graph_module = analysis.captured.graph_module
    found = tuple(e for e in analysis.findings.equivalences if can_write_back(graph_module, e, result))
    if found:
        analysis.findings = dataclasses.replace(analysis.findings, equivalences=found)
        batches = calibration_batches(calibration, analysis.captured, training, tokenizer, example_inputs)
        if quantization.target_bits is not None:
            analysis.choose_bits(batches, quantization.target_bits, training.seed)
        train(analysis, batches, dataclasses.replace(training, stages=("scales",)))
        write_back(graph_module, found, result)
    return result


def train(
    analysis: Analysis,
    batches: Sequence[Any],
    training: TrainingConfig,
    tables: Mapping[str, QuantizedWeight] | None = None,
) -> tuple[tuple[Equivalence, ...], tuple[BlockReport, ...], Mapping[str, QuantizedWeight]]:
    """Run the stages: the equivalences with the scales that were folded, each block's error, and the weights chosen.

    The blocks learn with the embedding `tables` as they were quantized, which the graph has in float again after it.
    Gains and biases that were tuned are written to the graph; weights are, but for their scales, as they were.
    """
    captured, found = analysis.captured, analysis.findings.equivalences
    blocks = find_blocks(captured, found)
    specs = analysis.trained_specs
    used = found if "scales" in training.stages_for(specs.values()) else ()
    trainer = Trainer(captured, InsertScales(used, specs), blocks, batches, training, tables or {})
    trainer.run()
    scales = FoldScales(trainer.inserted)(captured.graph_module).value
    floats = {name: trainer.reference.tensor(name) for name in trainer.tables}
    for name, tensor in (floats | trainer.floats).items():
        set_tensor(captured.graph_module, name, tensor)
    learned = tuple(dataclasses.replace(e, scale=s) for e, s in zip(used, scales, strict=True)) or found
    return learned, tuple(trainer.reports), trainer.weights


def choose_linears(
    captured: CapturedGraph, quantization: QuantizationConfig
) -> tuple[dict[str, WeightSpec], dict[str, str]]:
    """The linears to quantize, by weight name, and the reason for each that is left in float.

    Raises CaptureError where there are none.
    """
    specs: dict[str, WeightSpec] = {}
    kept: dict[str, str] = {}
    for linear in linear_nodes(captured.graph_module):
        name = weight_name_of(linear)
        spec = quantization.spec_for(name)
        if spec is None:
            kept[name] = "skipped by pattern"
        elif name == captured.lm_head and not quantization.quantize_lm_head:
            kept[name] = "vocabulary projection (quantize_lm_head=False)"
        else:
            specs[name] = spec
    if not specs and not kept:
        raise CaptureError("the graph has no linear layers: there is nothing to quantize")
    return specs, kept


def choose_embeddings(
    captured: CapturedGraph, quantization: QuantizationConfig, linears: Mapping[str, WeightSpec]
) -> tuple[dict[str, WeightSpec], dict[str, str]]:
    """The embedding tables to quantize, by name, and the reason for each that is left in float; `linears` are those
    to quantize."""
    specs: dict[str, WeightSpec] = {}
    kept: dict[str, str] = {}
    for table in find_embeddings(captured.graph_module) if quantization.quantize_embedding else ():
        spec = quantization.spec_for(table.name)
        if spec is None:
            kept[table.name] = "skipped by pattern"
        elif table.reason is not None:
            kept[table.name] = f"embedding: {table.reason}"
        elif table.is_tied and table.name not in linears:
            kept[table.name] = "embedding: tied to a projection that stays in float"
        else:
            specs[table.name] = spec
    return specs, kept


def _check_patterns(quantization: QuantizationConfig, names: list[str]) -> None:
    """Raises ConfigError for a pattern that matches none of the weights."""
    what = "linear or embedding" if quantization.quantize_embedding else "linear"
    for option, patterns in (("skip", quantization.skip), ("overrides", tuple(quantization.overrides))):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise ConfigError(f"{option}={pattern!r}: it matches no {what}; their weights are {_some(names)}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" … {names[-1]}" if len(names) > 2 else "")


def make_report(
    analysis: Analysis,
    blocks: tuple[BlockReport, ...],
    originals: Mapping[str, Tensor],
    stored: Mapping[str, QuantizedWeight],
) -> Report:
    """Errors and sizes of what was done, from the weights as they were and as they are stored."""
    scaled = {name for equivalence in analysis.findings.equivalences for name in equivalence.linears}

    def facts(name: str, spec: WeightSpec | None, reason: str | None) -> dict[str, Any]:
        weight = originals[name] if spec else get_tensor(analysis.captured.graph_module, name)
        size = weight.numel() * weight.element_size()
        result = {"name": name, "shape": tuple(weight.shape), "spec": spec, "reason": reason, "bytes_before": size}
        if spec is None:
            return {**result, "bytes_after": size}
        error = (stored[name].dequantize().to(weight.device) - weight.float()).norm()
        error /= weight.float().norm().clamp(min=1e-30)
        return {**result, "error": float(error), "bytes_after": stored[name].nbytes}

    return Report(
        linears=tuple(LinearReport(**facts(*linear), scaled=linear[0] in scaled) for linear in analysis.linears),
        equivalences=len(analysis.findings.equivalences),
        refusals=analysis.findings.refusals,
        blocks=blocks,
        bytes_before=analysis.bytes,
        bytes_after=tensor_bytes(analysis.captured.graph_module),
        other_weights=analysis.other_weights,
        notes=analysis.notes,
        embeddings=tuple(
            EmbeddingReport(**facts(*table), tied=table[0] in analysis.specs) for table in analysis.embeddings
        ),
    )


def _notes(model: Any, captured: CapturedGraph) -> Iterator[str]:
    if captured.decoder is None and is_pretrained(model) and model.can_generate():
        yield "the graph keeps no KV cache: where the model generates text, each token computes the whole text again"


def tensor_bytes(graph_module: GraphModule) -> int:
    """Bytes of all tensors that the graph reads, shared ones counted once."""
    seen: dict[int, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor = node_tensor(node)
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), tensor.numel() * tensor.element_size())
    return sum(seen.values())


__all__ = ["Analysis", "analyze", "choose_linears", "compile", "transform"]
