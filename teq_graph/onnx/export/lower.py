"""A captured graph -> an ONNX model in memory."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript.optimizer import _constant_folding as constant_folding
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from teq_graph import pipeline
from teq_graph.capture import CapturedGraph
from teq_graph.config import ACCURACY_LEVELS, DTYPES, check_choice, integer_of
from teq_graph.errors import ExportError, one_line
from teq_graph.graph.tensors import clone_graph
from teq_graph.graph.tracing import without_dispatch_cache
from teq_graph.onnx.export.dequantized import dequantize_linearly
from teq_graph.onnx.export.experts import split_experts
from teq_graph.onnx.export.fusions import fuse
from teq_graph.onnx.export.names import name_values
from teq_graph.onnx.export.translations import foreign_operators, translation_table
from teq_graph.passes.fuse_attention import FuseAttention, FusedAttentions
from teq_graph.system.quiet import quiet

# The first with Attention, RMSNormalization and RotaryEmbedding.
OPSETS = (23, 24)
INTEGERS = 4
"""The accuracy level at which products round activations to 8 bits."""

TALKATIVE = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")
"""Loggers that tell of their own internals."""


@dataclasses.dataclass(frozen=True)
class Lowered:
    """An ONNX model in memory, and what became of the graph's attentions."""

    model: ir.Model
    attention: FusedAttentions


def lower(
    captured: CapturedGraph,
    *,
    dtype: str = "float32",
    accuracy_level: int = 4,
    opset: int = 23,
) -> Lowered:
    """`captured` as an ONNX model in memory, with standard and com.microsoft operators only.

    A decoder's inputs are `input_ids`, `attention_mask`, `past_key_values.N.key`, `past_key_values.N.value`,
    its outputs `logits`, `present.N.key`, `present.N.value`. Other models keep the names of their arguments
    and of their output's fields. Large tensors are shared with `captured`.
    """
    check_options(dtype, accuracy_level, opset)
    target = getattr(torch, dtype)
    wide = _with_example_dtype(captured, torch.float32)
    wide.graph_module = graph_module = clone_graph(captured.graph_module)
    attention = pipeline.run(pipeline.for_onnxruntime(wide, target, exact=accuracy_level != INTEGERS), graph_module).of(
        FuseAttention
    )
    _leave_out_numbers(graph_module)
    example = _with_example_dtype(captured, target)
    with torch.no_grad(), quiet(*TALKATIVE), without_dispatch_cache():
        program = _trace(captured, graph_module, example.example_args, example.example_kwargs)
        model = _translate(program, opset, accuracy_level)
        dequantize_linearly(model)
        split_experts(model)
        _simplify(model)
    name_values(model, captured, graph_module)
    foreign = foreign_operators(model)
    for name, node in foreign.items():
        raise ExportError(f"node {node.name}: operator {name} is neither standard ONNX nor com.microsoft")
    model.producer_name, model.producer_version = "teq_graph", None
    return Lowered(model, attention)


def check_options(dtype: str, accuracy_level: int, opset: int) -> None:
    """Raises ConfigError for options outside what is accepted."""
    check_choice("dtype", dtype, DTYPES)
    integer_of("accuracy_level", accuracy_level, ACCURACY_LEVELS, f"{ACCURACY_LEVELS}")
    integer_of("opset", opset, OPSETS, f"{OPSETS}")


def _with_example_dtype(captured: CapturedGraph, dtype: torch.dtype) -> CapturedGraph:
    """`captured` with floating-point example inputs of `dtype`."""
    args, kwargs = pytree.tree_map_only(
        Tensor,
        lambda value: value.to(dtype) if value.is_floating_point() else value,
        (captured.example_args, captured.example_kwargs),
    )
    return dataclasses.replace(captured, example_args=args, example_kwargs=kwargs)


def _leave_out_numbers(graph_module: GraphModule) -> None:
    """What a model gives beside tensors, as the sizes of an image in patches, is no output of an ONNX model."""
    (output,) = (node for node in graph_module.graph.nodes if node.op == "output")
    output.args = pytree.tree_map(lambda leaf: leaf if isinstance(leaf, Node) else None, output.args)
    graph_module.recompile()


def _trace(captured: CapturedGraph, graph_module: GraphModule, args: Any, kwargs: Any) -> ExportedProgram:
    """The lowered graph as torch.onnx takes it.

    For a decoder with one symbol for the length of every cached tensor, where the graph takes that: the exporter
    then reads each size once, and spends less time on comparing symbols.
    """
    choices = [captured.dynamic_shapes, _without_names(captured.dynamic_shapes)]
    if (decoder := captured.decoder) is not None:
        batch, sequence, past = (torch.export.Dim(name) for name in ("batch_size", "sequence_length", "past_length"))
        tokens, mask = {0: batch, 1: sequence}, {0: batch, 1: torch.export.Dim.DYNAMIC}
        cached = ({0: batch} | ({} if (axis := one.growing_axis) is None else {axis: past}) for one in decoder.cached)
        choices.insert(0, (tokens, mask, decoder.by_layer(cached)))
    for dynamic_shapes in choices:
        try:
            return torch.export.export(graph_module, args, kwargs, dynamic_shapes=dynamic_shapes)
        except Exception as error:
            reason = error
    raise ExportError(f"torch.export refuses the lowered graph: {one_line(reason)}") from reason


def _without_names(dynamic_shapes: Any) -> Any:
    """The same sizes dynamic, each by itself."""
    return pytree.tree_map(
        lambda size: torch.export.Dim.DYNAMIC if isinstance(size, torch.export.Dim) else size, dynamic_shapes
    )


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
    except torch.onnx.errors.OnnxExporterError as error:
        undecomposed = _root(error)
    try:
        return translate()
    except torch.onnx.errors.OnnxExporterError as error:
        causes = (_root(error), undecomposed)
        # Where decomposing fails, what stands in the way is the op that needs it.
        cause = next((one for one in causes if "No ONNX function" in str(one)), causes[0])
        raise ExportError(f"torch.onnx refuses the graph: {one_line(cause)}") from error


def _root(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _root(error.__cause__)


@contextlib.contextmanager
def _without_decompositions(program: ExportedProgram) -> Iterator[None]:
    program.run_decompositions = lambda *_, **__: program
    try:
        yield
    finally:
        del program.run_decompositions


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
