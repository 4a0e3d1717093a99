"""A captured graph -> an ONNX directory that onnxruntime and onnxruntime-genai load."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import _constant_folding as constant_folding
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from teq_graph import pipeline
from teq_graph.capture import CapturedGraph
from teq_graph.config import ACCURACY_LEVELS, DTYPES
from teq_graph.errors import ConfigError, ExportError
from teq_graph.graph.tensors import clone_graph
from teq_graph.onnx.directory import GENAI_FILE, Metadata
from teq_graph.onnx.export.fusions import fuse
from teq_graph.onnx.export.genai import genai_config
from teq_graph.onnx.export.model_file import save_model
from teq_graph.onnx.export.translations import CODES_OF, foreign_operators, translation_table
from teq_graph.system.files import new_directory, one_line, write_json

# The first with Attention, RMSNormalization and RotaryEmbedding.
OPSETS = (23, 24)


def export_onnx(
    captured: CapturedGraph,
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    accuracy_level: int = 4,
    tokenizer: Any = None,
    config: Any = None,
    generation_config: Any = None,
    opset: int = 23,
    overwrite: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write `captured` as `directory`/model.onnx with its neighbours; returns the directory.

    `dtype` is that of weights, activations and KV cache: "float32", "float16" or "bfloat16" (which onnxruntime has on
    GPUs only). `accuracy_level` is MatMulNBits': 4 computes in int8 (fast), 1 in float32. `tokenizer`, `config` and
    `generation_config` are Hugging Face objects, saved beside the model where given. `progress` is told each stage as
    it starts. `captured` is left as it is. Raises ConfigError for options outside what is accepted, ExportError where
    the model has no ONNX form or the directory cannot be written; then nothing is left behind.
    """
    _check_options(dtype, accuracy_level, opset)
    report = progress or (lambda stage: None)
    with new_directory(Path(directory), overwrite) as staging:
        model = lower(captured, dtype=dtype, accuracy_level=accuracy_level, opset=opset, progress=progress)
        report("writing")
        save_model(model, staging)
        for saved in (tokenizer, config, generation_config):
            if saved is not None:
                saved.save_pretrained(staging)
        metadata = Metadata(
            dtype=dtype,
            accuracy_level=accuracy_level,
            opset=opset,
            decoder=captured.decoder,
            weights=_count_weights(model),
            eos_token_ids=_eos_token_ids(generation_config, config, tokenizer),
            pad_token_id=_first_of("pad_token_id", generation_config, config, tokenizer),
            shared_buffers=_shares_buffers(model),
        )
        metadata.write(staging)
        if captured.decoder is not None:
            content = genai_config(metadata, _first_of("bos_token_id", generation_config, config, tokenizer))
            if content is not None:
                write_json(staging / GENAI_FILE, content)
    return Path(directory)


def lower(
    captured: CapturedGraph,
    *,
    dtype: str = "float32",
    accuracy_level: int = 4,
    opset: int = 23,
    progress: Callable[[str], None] | None = None,
) -> ir.Model:
    """`captured` as an ONNX model in memory, with standard and com.microsoft operators only.

    A decoder's inputs are `input_ids`, `attention_mask`, `past_key_values.N.key`, `past_key_values.N.value`,
    its outputs `logits`, `present.N.key`, `present.N.value`. Other models keep the names of their arguments
    and of their output's fields. Large tensors are shared with `captured`.
    """
    _check_options(dtype, accuracy_level, opset)
    report = progress or (lambda stage: None)
    target = getattr(torch, dtype)
    report("preparing")
    wide = _with_example_dtype(captured, torch.float32)
    wide.graph_module = graph_module = clone_graph(captured.graph_module)
    pipeline.run(pipeline.for_onnxruntime(wide, target), graph_module)
    example = _with_example_dtype(captured, target)
    with torch.no_grad(), _quiet():
        report("tracing")
        program = _trace(captured, graph_module, example.example_args, example.example_kwargs)
        report("translating")
        model = _translate(program, opset, accuracy_level)
    report("simplifying")
    _simplify(model)
    _name_values(model, captured, graph_module)
    foreign = foreign_operators(model)
    for name, node in foreign.items():
        raise ExportError(f"node {node.name}: operator {name} is neither standard ONNX nor com.microsoft")
    model.producer_name, model.producer_version = "teq_graph", None
    return model


def _check_options(dtype: str, accuracy_level: int, opset: int) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype!r}: accepted are {', '.join(map(repr, DTYPES))}")
    if accuracy_level not in ACCURACY_LEVELS:
        raise ConfigError(f"accuracy_level={accuracy_level!r}: accepted are {ACCURACY_LEVELS}")
    if opset not in OPSETS:
        raise ConfigError(f"opset={opset!r}: accepted are {OPSETS}")


def _with_example_dtype(captured: CapturedGraph, dtype: torch.dtype) -> CapturedGraph:
    """`captured` with floating-point example inputs of `dtype`."""
    args, kwargs = pytree.tree_map_only(
        Tensor,
        lambda value: value.to(dtype) if value.is_floating_point() else value,
        (captured.example_args, captured.example_kwargs),
    )
    return dataclasses.replace(captured, example_args=args, example_kwargs=kwargs)


def _trace(captured: CapturedGraph, graph_module: GraphModule, args: Any, kwargs: Any) -> ExportedProgram:
    """The lowered graph as torch.onnx takes it.

    For a decoder with one symbol for the length of every cached tensor, where the graph takes that: the exporter
    then reads each size once, and spends less time on comparing symbols.
    """
    choices = [captured.dynamic_shapes]
    if captured.decoder is not None:
        batch, sequence, past = (torch.export.Dim(name) for name in ("batch_size", "sequence_length", "past_length"))
        cached = {0: batch, 2: past}
        tokens, mask = {0: batch, 1: sequence}, {0: batch, 1: torch.export.Dim.DYNAMIC}
        choices.insert(0, (tokens, mask, [(cached, cached)] * len(captured.decoder.layers)))
    for dynamic_shapes in choices:
        try:
            return torch.export.export(graph_module, args, kwargs, dynamic_shapes=dynamic_shapes)
        except Exception as error:
            reason = error
    raise ExportError(f"torch.export refuses the lowered graph: {one_line(reason)}") from reason


def _translate(program: ExportedProgram, opset: int, accuracy_level: int) -> ir.Model:
    """An ONNX model of `program`, without torch's decompositions where every op has a translation.

    Decomposing traces the program once more, several times the cost of the translation itself.
    """
    table = translation_table(opset, accuracy_level)

    def translate() -> ir.Model:
        translated = torch.onnx.export(
            program, dynamo=True, opset_version=opset, optimize=False, verbose=False, custom_translation_table=table
        )
        assert translated is not None
        return translated.model

    try:
        with _without_decompositions(program):
            return translate()
    except torch.onnx.errors.OnnxExporterError:
        pass
    try:
        return translate()
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__
        raise ExportError(f"torch.onnx refuses the graph: {one_line(cause)}") from error


@contextlib.contextmanager
def _without_decompositions(program: ExportedProgram) -> Iterator[None]:
    program.run_decompositions = lambda *args, **kwargs: program
    try:
        yield
    finally:
        del program.run_decompositions


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence what torch, onnxscript and onnx_ir say about their own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _simplify(model: ir.Model) -> None:
    """Fold constants, merge equal subexpressions, drop what is unused."""
    passes = (
        common.InlinePass(),
        constant_folding.FoldConstantsPass(
            # Costs more than the folding, and what torch knows of shapes is enough.
            shape_inference=False,
            input_size_limit=constant_folding.DEFAULT_CONSTANT_FOLD_INPUT_SIZE_LIMIT,
            output_size_limit=constant_folding.DEFAULT_CONSTANT_FOLD_OUTPUT_SIZE_LIMIT,
            should_fold=_should_fold,
        ),
        common.IdentityEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
        # Stack traces and the like, larger than the graph itself.
        common.ClearMetadataAndDocStringPass(),
    )
    for step in passes:
        step(model)
    fuse(model)
    common.RemoveUnusedNodesPass()(model)


def _should_fold(node: ir.Node) -> bool | None:
    # A transposed or reshaped copy of a weight that has other uses (a tied embedding) would be stored a second time;
    # onnxruntime folds it in memory.
    source = node.inputs[0] if node.inputs else None
    if node.op_type in ("Transpose", "Reshape") and source is not None and source.is_initializer():
        return False if len(source.uses()) > 1 else None
    return None


def _name_values(model: ir.Model, captured: CapturedGraph, graph_module: GraphModule) -> None:
    """Give inputs, outputs and their dynamic dimensions names that a reader knows."""
    graph = model.graph
    for node in graph:
        for value in node.outputs:
            # Inferred by onnxruntime again, without torch's symbols.
            value.shape = None
    if captured.decoder is not None:
        _name_decoder(graph, captured)
        return
    for value, name in zip(graph.outputs, _output_names(graph_module), strict=True):
        value.name = name
    renamed: dict[str, str] = {}
    for value in graph.inputs:
        assert value.shape is not None
        value.shape = ir.Shape(
            renamed.setdefault(str(size.value), "batch_size" if axis == 0 else f"{value.name}_{axis}")
            if isinstance(size, ir.SymbolicDim)
            else size
            for axis, size in enumerate(value.shape)
        )


def _name_decoder(graph: ir.Graph, captured: CapturedGraph) -> None:
    assert captured.decoder is not None
    batch, sequence, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    inputs: list[tuple[str, tuple[str | int, ...]]] = [
        ("input_ids", (batch, sequence)),
        ("attention_mask", (batch, total)),
    ]
    outputs: list[tuple[str, tuple[str | int, ...]]] = [("logits", (batch, sequence, captured.decoder.vocab_size))]
    for index, c in enumerate(captured.decoder.layers):
        for kind, heads, dim in (("key", c.key_heads, c.key_dim), ("value", c.value_heads, c.value_dim)):
            inputs.append((f"past_key_values.{index}.{kind}", (batch, heads, past, dim)))
            outputs.append((f"present.{index}.{kind}", (batch, heads, total, dim)))
    for values, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, (name, shape) in zip(values, names, strict=True):
            value.name, value.shape = name, ir.Shape(shape)


def _output_names(graph_module: GraphModule) -> list[str]:
    """Names of the graph's outputs: the path to each in the model's result."""
    spec = graph_module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    leaves = pytree.tree_leaves(next(iter(reversed(graph_module.graph.nodes))).args[0])
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(leaves))), spec))
    names = []
    for (path, _), leaf in zip(paths, leaves, strict=True):
        if isinstance(leaf, torch.fx.Node):
            parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in path]
            name = ".".join(parts)
            names.append(name if name and not name[0].isdigit() else f"output.{name}".rstrip("."))
    return names


def _count_weights(model: ir.Model) -> dict[str, int]:
    kinds: dict[ir.Value | None, str] = {}
    for node in model.graph.all_nodes():
        if node.op_type in CODES_OF:
            codes = node.inputs[CODES_OF[node.op_type]]
            view = codes.producer() if codes is not None else None
            bits, group = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
            kinds[codes if view is None else view.inputs[0]] = f"{bits}/{group}"
    return dict(collections.Counter(kinds.values()))


def _shares_buffers(model: ir.Model) -> bool:
    """Whether one operator writes every cached tensor, and nothing else looks at the past but for its batch size.

    Nor does anything look at what is written: past and present are as long as their buffer.
    """
    cached = [value for value in model.graph.inputs if (value.name or "").startswith("past_key_values.")]
    readers = {use.node for value in cached for use in value.uses()}
    others = {node for node in readers if node.op_type != "GroupQueryAttention"}
    written = [value for value in model.graph.outputs if (value.name or "").startswith("present.")]
    return others < readers and all(map(_is_batch_size, others)) and not any(value.uses() for value in written)


def _is_batch_size(node: ir.Node) -> bool:
    bounds = [node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end")]
    return node.op_type == "Shape" and bounds in ([0, 1], [None, 1])


def _first_of(name: str, *sources: Any) -> Any:
    return next((value for value in (getattr(source, name, None) for source in sources) if value is not None), None)


def _eos_token_ids(*sources: Any) -> tuple[int, ...]:
    value = _first_of("eos_token_id", *sources)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)


__all__ = ["OPSETS", "export_onnx", "lower"]
