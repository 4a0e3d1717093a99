"""A compiled graph and its equivalences as the files of a saved directory, and back."""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pydantic
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node
from torch.utils import _pytree as pytree

from teq_graph.analysis.equivalences.equivalence import Equivalence, ScaledTensor
from teq_graph.capture import CachedTensor, CapturedGraph, DecoderShape, EncoderDecoderShape
from teq_graph.capture.schema import Cached, Decoder, Encoder
from teq_graph.capture.shapes import LayerCache
from teq_graph.errors import ExportError, ModelFileError
from teq_graph.graph.nodes import placeholder_nodes
from teq_graph.saving import (
    DESCRIPTION_FILE,
    FORMAT_VERSION,
    GRAPH_FILE,
    TENSORS_FILE,
    arguments,
    schema,
    targets,
    trees,
)
from teq_graph.saving.graphs import build_graph, describe_nodes, tree_info
from teq_graph.saving.tensors import TensorFile, TensorStore
from teq_graph.saving.values import Sizes, give_values

_MODULES_OF_MODELS = re.compile(
    r"transformers\.(modeling_outputs|cache_utils|utils\.generic|integrations\.\w+|models\.\w+\.(modeling|modular)_\w+)"
)
"""What may be imported for a saved graph: where transformers defines results and operators."""


@dataclasses.dataclass(frozen=True)
class SavedGraph:
    """What is to be written: everything that can be refused has been looked at."""

    description: dict[str, Any]
    """For the file that says what the directory is, which is written last."""
    graph: schema.Graph
    tensors: TensorStore

    def write(self, directory: Path) -> None:
        """Write the graph and its tensors; raises OSError where that fails."""
        (directory / GRAPH_FILE).write_text(self.graph.model_dump_json(), encoding="utf-8")
        self.tensors.write(directory / TENSORS_FILE)


def describe(captured: CapturedGraph, equivalences: Iterable[Equivalence]) -> SavedGraph:
    """`captured` and its `equivalences` as data. Raises ExportError for what a saved directory cannot hold."""
    try:
        return _describe(captured, equivalences)
    except pydantic.ValidationError as error:
        raise ExportError(f"the graph cannot be saved: {schema.first_fault(error)}") from error


def _describe(captured: CapturedGraph, equivalences: Iterable[Equivalence]) -> SavedGraph:
    graph_module, store = captured.graph_module, TensorStore()
    info = tree_info(graph_module)
    # In the order in which the graph takes them, which is its own for those with names.
    kwargs = {name: captured.example_kwargs[name] for name in info.in_spec.children()[1].context}
    leaves, tree = pytree.tree_flatten((captured.example_args, kwargs))
    if tree != info.in_spec:
        raise ExportError("the example inputs have another structure than the graph's: this cannot be saved")

    def example_name(tensor: Tensor) -> str:
        return store.add(f"example.{len(store.tensors)}", tensor)

    graph = schema.Graph(
        arguments=list(info.orig_args),
        nodes=describe_nodes(graph_module, store),
        inputs=_not_a_leaf(trees.describe(info.in_spec)),
        outputs=trees.describe(info.out_spec),
        example=[arguments.encode(leaf, example_name) for leaf in leaves],
        equivalences=[_describe_site(i, site, store) for i, site in enumerate(equivalences)],
    )
    modules = trees.modules_of(info.in_spec) | trees.modules_of(info.out_spec)
    operators = (node.target for node in graph_module.graph.nodes if isinstance(node.target, OpOverload))
    modules |= {module for module in map(targets.module_of, operators) if module is not None}
    for module in modules:
        if not _can_be_known(module):
            raise ExportError(f"types or operators of {module} cannot be saved: it is not imported by that name")
    description = schema.Description(
        format_version=FORMAT_VERSION,
        decoder=None if captured.decoder is None else _describe_decoder(captured.decoder),
        encoder_decoder=None if captured.encoder_decoder is None else _describe_both(captured.encoder_decoder),
        lm_head=captured.lm_head,
        modules=sorted(modules),
        device=str(captured.device),
    )
    return SavedGraph(description.model_dump(exclude={"files", "provenance"}), graph, store)


def read_description(directory: Path) -> schema.Description:
    """What the directory says of itself. Raises ModelFileError where it is of another format, or damaged."""
    path = directory / DESCRIPTION_FILE
    data = schema.read_json(path)
    version = data.get("format_version") if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        again = f"{directory}: format_version={str(version)[:20]}, accepted is {FORMAT_VERSION}"
        older = isinstance(version, int) and version < FORMAT_VERSION
        how = ": compile the model again with this version and save it (files of older formats are not read)"
        raise ModelFileError(again + how if older else again)
    return schema.validated(schema.Description, data, path)


def read(directory: Path, description: schema.Description) -> tuple[CapturedGraph, tuple[Equivalence, ...]]:
    """What `SavedGraph.write` wrote. Nothing in the directory is run: see `teq_graph.saving`.

    Tensors are on the device they were on, or on the CPU where there is no such device. Raises ModelFileError where
    files are missing or damaged, or a module that defines types or operators of the graph is not imported.
    """
    for module in description.modules:
        _import(module, directory)
    path = directory / GRAPH_FILE
    graph = schema.validated(schema.Graph, schema.read_json(path), path)
    wanted = arguments.device_of(description.device)
    tensors = TensorFile(directory / TENSORS_FILE, wanted if _is_there(wanted) else torch.device("cpu"))
    graph_module = build_graph(graph, tensors, description.modules)

    def tensor_of(kind: str, name: str) -> Tensor:
        if kind != "tensor":
            raise ModelFileError(f"an example input is {kind} {name[:100]!r}, which is none")
        return tensors[name]

    leaves = [arguments.decode(leaf, tensor_of) for leaf in graph.example]
    args, kwargs = pytree.tree_unflatten(leaves, tree_info(graph_module).in_spec)
    sizes: list[Sizes] = [node.sizes for node in graph.nodes if isinstance(node, schema.PlaceholderNode)]
    give_values(graph_module, pytree.tree_leaves((args, kwargs)), sizes)
    decoder = None if description.decoder is None else DecoderShape.from_dict(description.decoder.model_dump())
    both = description.encoder_decoder
    captured = CapturedGraph(
        graph_module,
        args,
        kwargs,
        _dynamic_shapes(args, kwargs, sizes),
        decoder,
        description.lm_head,
        encoder_decoder=None if both is None else EncoderDecoderShape.from_dict(both.model_dump()),
    )
    _check_decoder(captured)
    if not _is_there(wanted):
        captured.move_to(torch.device("cpu"))
    return captured, tuple(_build_site(site, tensors) for site in graph.equivalences)


def _not_a_leaf(tree: schema.Tree | None) -> schema.Tree:
    assert tree is not None, "the inputs of a graph are (args, kwargs)"
    return tree


def _describe_both(shape: EncoderDecoderShape) -> schema.EncoderDecoder:
    encoder = shape.encoder
    return schema.EncoderDecoder(
        encoder=Encoder(
            inputs=list(encoder.inputs),
            layers=_describe_layers(encoder.layers),
            vocab_size=encoder.vocab_size,
            max_positions=encoder.max_positions,
        ),
        decoder=_describe_decoder(shape.decoder),
        decoder_start_token_id=shape.decoder_start_token_id,
    )


def _describe_layers(layers: Iterable[LayerCache]) -> list[list[Cached]]:
    return [[Cached(name=one.name, sizes=list(one.sizes)) for one in layer] for layer in layers]


def _describe_decoder(shape: DecoderShape) -> Decoder:
    return Decoder(
        layers=_describe_layers(shape.layers),
        vocab_size=shape.vocab_size,
        max_positions=shape.max_positions,
        recompute_after=shape.recompute_after,
    )


def _describe_site(index: int, site: Equivalence, store: TensorStore) -> schema.Site:
    def described(scaled: Iterable[ScaledTensor]) -> list[schema.Scaled]:
        return [schema.Scaled(name=s.name, index=store.add(f"site.{index}.{s.name}", s.index)) for s in scaled]

    return schema.Site(
        producer=site.producer,
        kind=site.kind,
        channels=site.channels,
        divided=described(site.divided),
        multiplied=described(site.multiplied),
        scale=None if site.scale is None else store.add(f"site.{index}.scale", site.scale),
    )


def _build_site(site: schema.Site, tensors: TensorFile) -> Equivalence:
    def built(scaled: Iterable[schema.Scaled]) -> tuple[ScaledTensor, ...]:
        return tuple(ScaledTensor(s.name, tensors[s.index]) for s in scaled)

    scale = None if site.scale is None else tensors[site.scale]
    return Equivalence(site.producer, site.kind, site.channels, built(site.divided), built(site.multiplied), scale)


def _can_be_known(module: str) -> bool:
    return module in sys.modules or _MODULES_OF_MODELS.fullmatch(module) is not None


def _import(module: str, source: Path) -> None:
    """Make the types and operators of `module` known. A saved directory cannot run any code that is installed:
    what is not imported yet must be where transformers defines them."""
    if not _can_be_known(module):
        raise ModelFileError(f"{source} has types or operators of {module}: import it before loading")
    importlib.import_module(module)


def _is_there(device: torch.device) -> bool:
    if device.type in ("cpu", "meta"):
        return True
    backend = getattr(torch, device.type, None)
    return backend is not None and backend.is_available() and (device.index or 0) < backend.device_count()


def _dynamic_shapes(args: Any, kwargs: Any, sizes: list[Sizes]) -> Any:
    """What `torch.export` needs to keep every dimension dynamic that may vary in the graph."""
    declared: Iterator[Sizes] = iter(sizes)

    def dims(_: Any) -> Any:
        given = next(declared)
        if given is None:
            return None
        return {dim: torch.export.Dim.DYNAMIC for dim, size in enumerate(given) if isinstance(size, str)}

    by_args, by_kwargs = pytree.tree_map(dims, (args, kwargs))
    # By name where everything has one, otherwise in the order of the signature.
    return (*by_args, *by_kwargs.values()) if args else by_kwargs


def _check_decoder(captured: CapturedGraph) -> None:
    """A decoder's caches are those that its inputs have, and what it reads of its encoder is what it gives."""
    both = captured.encoder_decoder
    if captured.decoder is not None and both is not None:
        raise ModelFileError("a model that is both a decoder and an encoder-decoder")
    decoder = captured.decoder if both is None else both.decoder
    if decoder is None:
        return
    if captured.example_kwargs or len(captured.example_args) != 3:
        raise ModelFileError(f"a decoder of {len(captured.example_args)} inputs: accepted are tokens, mask and caches")
    first, _, layers = captured.example_args
    if [len(layer) for layer in layers] != [len(layer) for layer in decoder.layers] or not all(
        map(_fits, decoder.cached, pytree.tree_leaves(layers))
    ):
        raise ModelFileError(f"a decoder of {len(decoder.layers)} layers with caches of other sizes")
    others = 2
    if both is not None:
        if not isinstance(first, dict) or tuple(first) != both.encoder.inputs:
            raise ModelFileError(f"an encoder whose inputs are not {', '.join(both.encoder.inputs)[:200]}")
        others = 1 + len(first)
        encoded = [tensor for layer in both.encoder.layers for tensor in layer]
        given = captured.outputs()
        if len(given) != 1 + len(decoder.cached) + len(encoded):
            raise ModelFileError(f"an encoder-decoder of {len(given)} results: accepted are logits and caches")
        if len(both.encoder.layers) != len(decoder.layers) or not all(
            isinstance(node, Node) and _fits(one, node.meta.get("val"))
            for one, node in zip(encoded, captured.encoded(), strict=True)
        ):
            raise ModelFileError("an encoder-decoder that encodes into other sizes")
    if len(captured.cache_pairs()) != len(placeholder_nodes(captured.graph_module)) - others:
        raise ModelFileError("a decoder whose caches are not its inputs")


def _fits(one: CachedTensor, value: object) -> bool:
    """Whether `value` [b, …] may be kept as `one`."""
    if not isinstance(value, Tensor) or value.dim() != len(one.sizes) + 1:
        return False
    return all(size in (None, given) for size, given in zip(one.sizes, value.shape[1:], strict=True))
