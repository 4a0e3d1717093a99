"""nn.Module -> GraphModule by torch.export."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from teq_graph.capture.buffers import keep_no_state, table_switch
from teq_graph.capture.captured import CapturedGraph, magnitude
from teq_graph.capture.experts import traceable_experts
from teq_graph.capture.kernels import traceable_kernels
from teq_graph.capture.pretrained import (
    PAST,
    DecoderStep,
    EncoderDecoderStep,
    call,
    counts_positions,
    decoder_inputs,
    encoder_decoder_inputs,
    generates_text,
    inputs_from_config,
    is_pretrained,
    longest_text,
    name_of,
    probe_decoder,
    probe_encoder_decoder,
    takes_positions,
    text_inputs,
    without_cache,
)
from teq_graph.capture.prolonging import NoStepError, ProlongedStep, cached_layers
from teq_graph.capture.reasons import location, where, why
from teq_graph.capture.shapes import POSITIONS, CachedTensor, DecoderShape, EncoderDecoderShape, counted
from teq_graph.errors import CaptureError, NumericsError
from teq_graph.graph.tensors import drop_unused, node_tensor, set_tensor
from teq_graph.graph.tracing import without_dispatch_cache
from teq_graph.system.quiet import quiet

LARGEST_WEIGHT = 1e18
"""float32, which errors and second moments are summed in, holds squares up to 3e38."""
CHECKED = 530
"""Tokens that a graph which scans them is compared on with the model: more than a chunk of a scan has."""
AGREEMENT = collections.defaultdict(float, {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1})
"""Largest difference between graph and model, over the largest value; other types agree exactly."""
STRUCTURAL = 1e-2
"""The difference from which on a graph of other lengths holds for few tokens alone. Rounding grows over the layers and
tokens of a recurrence, to 3e-4 in 24 random layers; what is left out of a sum is of the size of its values."""

_TALKATIVE = (
    "torch.export",
    "torch.export._trace",
    "torch._export.non_strict_utils",
    "torch.fx.experimental.symbolic_shapes",
    "torch._subclasses.fake_tensor",
)


def capture(
    model: nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> CapturedGraph:
    """Capture `model` (eval mode, real float32/float16/bfloat16 tensors) with torch.export.

    Without `example_inputs`, those of a Hugging Face model are made from its config: a causal language model
    becomes a decoder step with KV cache, others keep their own signature. With `example_inputs` its result has no
    cache, unless `use_cache` is among them. Parameters are shared with `model`, not copied. Raises CaptureError for a
    model that fails on the inputs, naming the module and line where torch.export refuses it, and NumericsError for
    weights that are not finite.
    """
    check_model(model)
    with traceable_experts(model):
        return _capture(model, example_inputs, dynamic_shapes)


def _capture(
    model: nn.Module, example_inputs: tuple[Any, ...] | Mapping[str, Any] | None, dynamic_shapes: Any
) -> CapturedGraph:
    pretrained = is_pretrained(model)
    if example_inputs is not None:
        args, kwargs = _split_inputs(example_inputs)
        with without_cache(model):
            captured = _export(model, args, kwargs, dynamic_shapes)
    elif not pretrained:
        raise CaptureError(
            f"example_inputs=None: {type(model).__name__} is no Hugging Face model whose inputs could be made "
            "from its config; accepted is a tuple or dict as for torch.export"
        )
    else:
        captured = _export_pretrained(model)
    if pretrained:
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        if isinstance(head, nn.Module) and isinstance(getattr(head, "weight", None), Tensor):
            captured.lm_head = _name_of(captured.graph_module, head.weight)  # type: ignore[arg-type]
    return captured


def check_model(model: nn.Module) -> None:
    """Refuse what cannot be captured: no module, train mode, meta tensors, non-finite or unsupported weights."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"model={type(model).__name__}: accepted is a torch.nn.Module")
    for name, module in model.named_modules():
        if module.training:
            raise CaptureError(f"module {name or type(model).__name__!r} is in train mode: call model.eval() first")
    dtypes = set()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_meta:
            raise CaptureError(f"{name} is on the meta device: load the weights before compiling")
        if tensor.is_floating_point() and isinstance(tensor, nn.Parameter):
            dtypes.add(tensor.dtype)
            if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
                raise CaptureError(f"{name} is {tensor.dtype}: accepted are float32, float16 and bfloat16")
            _check_values(name, tensor.detach())
    if not dtypes:
        raise CaptureError(f"{type(model).__name__} has no floating-point parameters: there is nothing to quantize")


def _check_values(name: str, tensor: Tensor) -> None:
    if not tensor.numel():
        return
    largest = max(map(abs, map(float, tensor.aminmax())), key=lambda value: (math.isnan(value), value))
    if not math.isfinite(largest):
        raise NumericsError(f"{name} has NaN or infinite values: accepted are finite weights")
    if largest > LARGEST_WEIGHT:
        raise NumericsError(
            f"{name} has values up to {largest:.3g}, whose squares overflow in sums: accepted are up to "
            f"{LARGEST_WEIGHT:g}"
        )


def _split_inputs(example_inputs: tuple[Any, ...] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, tuple):
        return example_inputs, {}
    raise CaptureError(
        f"example_inputs={type(example_inputs).__name__}: accepted is a tuple or dict as for torch.export"
    )


def _export_pretrained(model: nn.Module) -> CapturedGraph:
    """A Hugging Face model with inputs from its config: a decoder-only language model as a step over its cache.

    Where a cache cannot be had, as a graph over whole texts, which says why.
    """
    shape, reason = probe_decoder(model), None
    if shape is not None:
        try:
            return _export_decoder(model, shape)
        except _OtherLengthError:
            raise  # it would be so without a cache, too
        except CaptureError as error:
            if not shape.states:
                raise
            reason = str(error)
    if (both := probe_encoder_decoder(model)) is not None:
        return _export_encoder_decoder(model, both)
    try:
        with without_cache(model):
            captured = _export(model, *inputs_from_config(model))
        if generates_text(model):
            args, kwargs, _ = inputs_from_config(model, min(CHECKED, longest_text(model) or CHECKED))
            _check_at_another_length(model, captured, args, kwargs)
    except CaptureError as error:
        # What stands in the way of a cache says more than what stands in the way of doing without.
        raise error if reason is None else CaptureError(reason) from error
    if reason is None and generates_text(model):
        try:
            return _prolonging(model, captured)
        except CaptureError as error:
            reason = str(error)
    return dataclasses.replace(captured, without_cache=reason)


def _export_decoder(model: nn.Module, shape: DecoderShape) -> CapturedGraph:
    """The model's step over a cache."""
    step = DecoderStep(model, shape.layers, counts_positions(model, shape))
    args, dynamic_shapes = decoder_inputs(model, shape)
    captured = _export(step, args, {}, dynamic_shapes)
    if shape.states:
        longest = min(CHECKED, shape.max_positions or CHECKED)
        for others in (decoder_inputs(model, shape, 1)[0], text_inputs(model, shape, longest)):
            _check_at_another_length(step, captured, others, {})
    _strip_prefix(captured.graph_module, "model.")
    switch = table_switch(captured.graph_module)
    return dataclasses.replace(captured, decoder=dataclasses.replace(shape, recompute_after=switch))


def _prolonging(model: nn.Module, text: CapturedGraph) -> CapturedGraph:
    """The graph of a whole text as a step over a cache; raises CaptureError where there is none."""
    _, given, _ = inputs_from_config(model, min(CHECKED, longest_text(model) or CHECKED))
    begun = pytree.tree_map_only(Tensor, lambda x: x[:, :PAST], given)
    with torch.no_grad():
        (whole, *_), (begin, *_) = (pytree.tree_leaves(text.graph_module(**x)) for x in (given, begun))
    if not _near(whole[:, :PAST], begin):
        raise NoStepError("each token changes what the model gives for those before it")
    text = _told_positions(model, text, given, whole)
    shape = DecoderShape(cached_layers(text), whole.shape[-1], longest_text(model))
    args, dynamic_shapes = decoder_inputs(model, shape)
    captured = _export(ProlongedStep(text.graph_module), args, {}, dynamic_shapes)
    if not _goes_on(captured, shape, given["input_ids"], whole):
        raise NoStepError
    _strip_prefix(captured.graph_module, "model.")
    return dataclasses.replace(captured, decoder=shape)


def _told_positions(model: nn.Module, text: CapturedGraph, given: Mapping[str, Any], whole: Tensor) -> CapturedGraph:
    """The graph of a text that takes positions, where the model does and counts them from 0, as in `whole`."""
    if not takes_positions(model):
        return text
    kwargs = {**text.example_kwargs, POSITIONS: counted(torch.ones_like(text.example_kwargs["input_ids"]))}
    shapes = {**text.dynamic_shapes, POSITIONS: text.dynamic_shapes["input_ids"]}
    told = _export(model, (), kwargs, shapes)
    with torch.no_grad():
        result = told.graph_module(**given, **{POSITIONS: counted(torch.ones_like(given["input_ids"]))})
    return told if _near(whole, pytree.tree_leaves(result)[0]) else text


@torch.no_grad()
def _goes_on(step: CapturedGraph, shape: DecoderShape, tokens: Tensor, whole: Tensor) -> bool:
    """Whether the logits of a text in steps are those of the `whole`."""
    past: Any = shape.empty_past(len(tokens), step.dtype, tokens.device)
    mask = torch.ones_like(tokens)
    for begin, end in itertools.pairwise((0, PAST, PAST + 1, tokens.shape[1])):
        try:
            logits, past = step.graph_module(tokens[:, begin:end], mask[:, :end], past)
        except (RuntimeError, IndexError, ValueError):  # sizes that were taken for constants do not fit
            return False
        if not _near(whole[:, begin:end], logits):
            return False
    return True


def _export_encoder_decoder(model: nn.Module, shape: EncoderDecoderShape) -> CapturedGraph:
    """The model's encoder and the step over a cache of its decoder."""
    args, dynamic_shapes = encoder_decoder_inputs(model, shape)
    captured = _export(EncoderDecoderStep(model, shape.decoder.layers), args, {}, dynamic_shapes)
    _strip_prefix(captured.graph_module, "model.")
    captured = dataclasses.replace(captured, encoder_decoder=shape)
    # One sequence does not tell which sizes are the encoder's positions: of a model of sounds, all are fixed.
    values = iter(node.meta["val"].shape[1:] for node in captured.encoded())
    layers = tuple(
        tuple(CachedTensor(one.name, tuple(n if isinstance(n, int) else None for n in next(values))) for one in layer)
        for layer in shape.encoder.layers
    )
    encoder = dataclasses.replace(shape.encoder, layers=layers)
    return dataclasses.replace(captured, encoder_decoder=dataclasses.replace(shape, encoder=encoder))


def _export(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> CapturedGraph:
    # First: where the model itself fails, tracing it says less of why. What it sets up on its first call is there then.
    own_args, own_kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    expected = call(model, "its example inputs", *own_args, **own_kwargs)
    name = name_of(model)
    try:
        # Without gradients, no_grad regions of the model stay inline instead of becoming submodules. transformers
        # and torch warn about their own internals while tracing; none of it is in the user's hands.
        # Kernels are replaced here alone: the model's own are what the graph is compared with.
        with torch.no_grad(), _silent_export(), without_dispatch_cache(), traceable_kernels(model) as replaced:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes)
            refuse_other_constants(program)
            if any(map(_changes_in_place, program.graph.nodes)):
                # Only where it is needed: it traces the program once more, and decomposes nothing.
                program = program.run_decompositions({})
            graph_module = program.module(check_guards=False)
            assert isinstance(graph_module, GraphModule)
            keep_no_state(program, graph_module)
    except CaptureError:
        raise
    except Exception as error:  # torch.export raises whatever the model's Python raises
        raise CaptureError(f"torch.export refuses {name}{where(error)}: {why(error)}") from error
    adopt(graph_module)
    captured = CapturedGraph(graph_module, args, kwargs, dynamic_shapes)
    # Op by op the graph is the model, but for its kernels, which round in other places.
    if not _agrees(expected, captured, AGREEMENT[captured.dtype] if replaced else 0):
        raise CaptureError(
            f"the graph that torch.export made of {name} gives other values than the model: "
            "accepted are models whose result depends on their inputs alone"
        )
    return captured


@contextlib.contextmanager
def _silent_export() -> Iterator[None]:
    """Where torch.export fails, its exception says why: not also the log, and half a graph on standard error."""
    import torch.export._trace as trace

    module: Any = trace
    with quiet(*_TALKATIVE, level=logging.CRITICAL):
        module.print = lambda *_, **__: None  # for what is called by this name there
        try:
            yield
        finally:
            del module.print


def refuse_other_constants(program: ExportedProgram) -> None:
    """What is no tensor: regions that torch.export keeps as submodules (branches, loops, changes of a global mode), and
    functions, as of mappings over a dimension."""
    for node in program.graph.nodes:
        value = getattr(program.graph_module, node.target, None) if node.op == "get_attr" else None
        if value is not None and not isinstance(value, Tensor):
            (user, *_) = node.users
            raise CaptureError(
                f"the model uses {user.target}{location(user)}: accepted are models without control flow over "
                "tensors, autocast, changes of the gradient mode and functions as values"
            )


def _changes_in_place(node: Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


class _OtherLengthError(CaptureError):
    """A graph that holds for the number of tokens alone that it was captured with, or few more."""


def _check_at_another_length(
    model: nn.Module, captured: CapturedGraph, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """The graph gives what the model gives, on other inputs than it was captured with, if the model takes them."""
    own_args, own_kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, kwargs))
    try:
        expected = call(model, "inputs of another length", *own_args, **own_kwargs)
    except CaptureError:
        return
    # Not op by op: the model may take another way there, and round differently in its own type.
    coarsest = max(STRUCTURAL, AGREEMENT[captured.dtype])
    if not _agrees(expected, dataclasses.replace(captured, example_args=args, example_kwargs=kwargs), coarsest):
        raise _OtherLengthError(
            f"the graph that torch.export made of {name_of(model)} holds for few tokens alone: "
            "accepted are models whose Python does the same for texts of any length"
        )


def _agrees(expected: Any, captured: CapturedGraph, coarsest: float = 0) -> bool:
    """Whether the graph gives what the model gave, on its example inputs; floats at least up to `coarsest`."""
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            actual = captured.graph_module(*captured.example_args, **captured.example_kwargs)
    except (RuntimeError, IndexError, ValueError):  # sizes that were taken for constants do not fit
        return False
    return _near(expected, actual, coarsest)


def _near(expected: Any, actual: Any, coarsest: float = 0) -> bool:
    """Whether all tensors are the same, floats at least up to `coarsest`."""
    wanted_tensors, given_tensors = (
        [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)] for result in (expected, actual)
    )
    return all(
        wanted.shape == given.shape
        and torch.allclose(
            given.double(),
            wanted.double(),
            rtol=0,
            atol=max(AGREEMENT[wanted.dtype], coarsest * wanted.is_floating_point()) * magnitude(wanted),
            equal_nan=True,
        )
        for wanted, given in zip(wanted_tensors, given_tensors, strict=True)
    )


def adopt(graph_module: GraphModule) -> None:
    """Make an exported program's module ours: one node for each tensor, and no gradients into the weights.

    The sizes that torch.export derived as bounds from the example (total length >= 4) are no bounds of the
    computation: an empty cache is fine. Its check of them goes.
    """
    graph_module._forward_pre_hooks.clear()
    graph_module._forward_pre_hooks_with_kwargs.clear()
    _merge_shared_tensors(graph_module)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            node.meta["val"] = node_tensor(node).detach()
            set_tensor(graph_module, node.target, node.meta["val"])
    drop_unused(graph_module)


def _merge_shared_tensors(graph_module: GraphModule) -> None:
    """Let every use of one tensor read one node, so that sharing (tied weights) is visible in the graph."""
    first: dict[Any, Node] = {}
    for node in list(graph_module.graph.nodes):
        if node.op != "get_attr":
            continue
        tensor = node_tensor(node)
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else id(tensor)
        known = first.setdefault(key, node)
        if known is not node:
            node.replace_all_uses_with(known)
            graph_module.graph.erase_node(node)


def _strip_prefix(graph_module: GraphModule, prefix: str) -> None:
    """Give the tensors of a wrapped model their own names again."""
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target.startswith(prefix):
            tensor = node_tensor(node)
            node.target = node.target.removeprefix(prefix)
            set_tensor(graph_module, node.target, tensor)
    drop_unused(graph_module)


def _name_of(graph_module: GraphModule, tensor: Tensor) -> str | None:
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node_tensor(node).data_ptr() == tensor.data_ptr():
            return str(node.target)
    return None
