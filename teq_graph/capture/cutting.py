"""The graph of an encoder-decoder, cut in two: what is computed once for a text, and what for each token."""

from __future__ import annotations

from typing import Any

import torch
from torch.export import Dim
from torch.fx import Node
from torch.utils import _pytree as pytree

from teq_graph.capture.captured import CapturedGraph
from teq_graph.capture.shapes import ENCODED, PAST, PRESENT
from teq_graph.graph.nodes import placeholder_nodes
from teq_graph.graph.parts import needed_for, part_of


@torch.no_grad()
def cut(captured: CapturedGraph) -> tuple[CapturedGraph, CapturedGraph]:
    """Two graphs over the tensors of `captured`, an encoder-decoder, with inputs and results by name.

    The encoder gives `present`: for each of the decoder's layers the keys and values that it makes of the encoder's
    result. The decoder's step goes from `input_ids` and `past_key_values`, for each layer those of its own tokens and
    the encoder's, to `logits` and `present`, its own with the new tokens. What it reads of the encoder's inputs itself
    (their mask) is an input named after them.
    """
    shape = captured.encoder_decoder
    assert shape is not None
    graph_module, encoded = captured.graph_module, captured.encoded()
    placeholders = placeholder_nodes(graph_module)
    given, _, _ = captured.example_args
    inputs = dict(zip(given, placeholders, strict=False))
    tokens, *past = placeholders[len(inputs) :]
    pairs = captured.cache_pairs()
    logits = captured.outputs()[0]

    def by_layer(own: Any, other: Any) -> list[dict[str, dict[str, Any]]]:
        """Of the keys and values in their order, those of each layer: by the names of the cached tensors."""
        layers: list[dict[str, dict[str, Any]]] = [{} for _ in shape.decoder.layers]
        for part, values in ((shape.decoder, own), (shape.encoder, other)):
            for name, value in zip(part.cache_names, values, strict=False):
                index, kind, tensor = name.split(".")
                layers[int(index)].setdefault(kind, {})[tensor] = value
        return layers

    encoder = part_of(graph_module, inputs, {PRESENT: by_layer((), encoded)})
    ahead = {"input_ids": tokens, PAST: by_layer(past, encoded)}
    results = {"logits": logits, PRESENT: by_layer([pairs[node] for node in past], ())}
    stops = dict.fromkeys([*pytree.tree_leaves(ahead), *inputs.values()])
    read = needed_for(results, stops)
    step = ahead | {f"{ENCODED}{name}": node for name, node in inputs.items() if node in read}
    decoder = part_of(graph_module, step, results)

    (values, ids, cached) = captured.example_args
    example = {
        "input_ids": ids,
        PAST: by_layer(pytree.tree_leaves(cached), pytree.tree_leaves(encoder(**values))),
        **{f"{ENCODED}{name}": value for name, value in values.items() if f"{ENCODED}{name}" in step},
    }
    length, past_length, encoded_length = (f"{kind}sequence_length" for kind in ("", "past_", ENCODED))
    sizes = {
        "input_ids": _named(tokens, length),
        PAST: by_layer(
            [_named(node, past_length) for node in past], [_named(node, encoded_length) for node in encoded]
        ),
        **{f"{ENCODED}{name}": _named(node, encoded_length) for name, node in inputs.items() if node in read},
    }
    return (
        CapturedGraph(encoder, (), dict(values), {name: _named(node, encoded_length) for name, node in inputs.items()}),
        CapturedGraph(decoder, (), example, sizes),
    )


def _named(node: Node, positions: str) -> dict[int, Any]:
    """The dynamic sizes of an input, by the names that they have in the file."""
    sizes = enumerate(node.meta["val"].shape)
    return {axis: Dim(positions if axis else "batch_size") for axis, size in sizes if isinstance(size, torch.SymInt)}
