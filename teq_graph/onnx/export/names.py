"""Names of inputs, outputs and their dynamic dimensions that a reader knows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import onnx_ir as ir
import torch
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from teq_graph.capture import CapturedGraph
from teq_graph.capture.shapes import PAST, PRESENT


def name_values(model: ir.Model, captured: CapturedGraph, graph_module: GraphModule) -> None:
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
    for value, named in zip(graph.inputs, _input_names(captured), strict=True):
        value.name = named or value.name
        assert value.shape is not None
        value.shape = ir.Shape(
            renamed.setdefault(str(size.value), "batch_size" if axis == 0 else f"{value.name}_{axis}")
            if isinstance(size, ir.SymbolicDim)
            else size
            for axis, size in enumerate(value.shape)
        )


def _input_names(captured: CapturedGraph) -> list[str | None]:
    """The path to each tensor among the arguments that have names; None for the others."""
    leaves, spec = pytree.tree_flatten((captured.example_args, captured.example_kwargs))
    _, kwargs = pytree.tree_unflatten(list(range(len(leaves))), spec)
    paths = dict(_paths(kwargs, ()))
    return [
        ".".join(paths[number]) if number in paths else None
        for number, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
    ]


def name_sizes(model: ir.Model, part: CapturedGraph) -> None:
    """Call the dynamic sizes of the inputs as in `part`, one of `cut`: torch forgets the names that it is given."""
    leaves = pytree.tree_leaves(part.dynamic_shapes, is_leaf=lambda sizes: isinstance(next(iter(sizes), None), int))
    for value, sizes in zip(model.graph.inputs, leaves, strict=True):
        assert value.shape is not None
        value.shape = ir.Shape(
            size if axis not in sizes else sizes[axis].__name__ for axis, size in enumerate(value.shape)
        )


def _name_decoder(graph: ir.Graph, captured: CapturedGraph) -> None:
    assert captured.decoder is not None
    batch, sequence, past, total = "batch_size", "sequence_length", "past_sequence_length", "total_sequence_length"
    inputs: list[tuple[str, tuple[str | int, ...]]] = [
        ("input_ids", (batch, sequence)),
        ("attention_mask", (batch, total)),
    ]
    outputs: list[tuple[str, tuple[str | int, ...]]] = [("logits", (batch, sequence, captured.decoder.vocab_size))]
    for name, tensor in zip(captured.decoder.cache_names, captured.decoder.cached, strict=True):
        for values, prefix, positions in ((inputs, PAST, past), (outputs, PRESENT, total)):
            sizes = (positions if size is None else size for size in tensor.sizes)
            values.append((f"{prefix}.{name}", (batch, *sizes)))
    for named, names in ((graph.inputs, inputs), (graph.outputs, outputs)):
        for value, (name, shape) in zip(named, names, strict=True):
            value.name, value.shape = name, ir.Shape(shape)


def _output_names(graph_module: GraphModule) -> list[str]:
    """Names of the graph's outputs: the path to each in the model's result."""
    spec = graph_module.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]
    leaves = pytree.tree_leaves(next(iter(reversed(graph_module.graph.nodes))).args[0])
    # Not by `tree_flatten_with_path`: older versions of transformers do not tell it the names of their outputs' fields.
    paths = dict(_paths(pytree.tree_unflatten(list(range(len(leaves))), spec), ()))
    names = []
    for number, leaf in enumerate(leaves):
        if isinstance(leaf, torch.fx.Node):
            name = ".".join(paths[number])
            names.append(name if name and not name[0].isdigit() else f"output.{name}".rstrip("."))
    return names


def _paths(value: Any, path: tuple[str, ...]) -> Iterator[tuple[int, tuple[str, ...]]]:
    """The numbers in nested mappings and sequences, each with the keys that lead to it."""
    if isinstance(value, Mapping):
        items: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, tuple) and (fields := getattr(value, "_fields", None)) is not None:  # a named tuple
        items = zip(fields, value, strict=True)
    elif isinstance(value, list | tuple):
        items = enumerate(value)
    else:
        yield value, path
        return
    for key, item in items:
        yield from _paths(item, (*path, str(key)))
