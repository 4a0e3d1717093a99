"""Let a decoder's caches grow in the buffers that they begin in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule

from teq_graph.capture import CapturedGraph
from teq_graph.graph.nodes import arguments_of, aten, is_call
from teq_graph.graph.tensors import drop_unused
from teq_graph.ops.group_query_attention import group_query_attention
from teq_graph.passes.base import GraphPass, PassResult


class GrowCachesInPlace(GraphPass[None]):
    """cat([past, new], 2)                       becomes   append(past, new)
    group_query_attention(q, k, v, past_k, …)    becomes   attend_in_place(q, k, v, past_k, …)

    for the caches of a decoder. A past that is the beginning of a longer buffer (`room_for`) is prolonged there; any
    other is copied, as before. Nothing may read an older past afterwards but up to its own end: for decoding, where
    each step goes on from the last.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        self.captured = captured

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        pairs = self.captured.cache_pairs()
        for past, present in pairs.items():
            if is_call(present, aten.cat.default):
                values = arguments_of(present)
                if len(values["tensors"]) == 2 and values["tensors"][0] is past and values["dim"] in (2, -2):
                    present.target, present.args, present.kwargs = append, tuple(values["tensors"]), {}
                    modified = True
        for node in graph_module.graph.nodes:
            if is_call(node, torch.ops.teq_graph.group_query_attention.default):
                node.target = attend_in_place
                modified = True
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def room_for(batch: int, heads: int, positions: int, width: int, like: Tensor) -> Tensor:
    """An empty past [b, h, 0, d] in a buffer of so many positions."""
    return like.new_empty(batch, heads, positions, width)[:, :, :0]


def append(past: Tensor, new: Tensor) -> Tensor:
    """cat([past, new], 2), [b, h, p + s, d]; within the buffer of `past` where that has room."""
    batch, heads, length, width = past.shape
    total = length + new.shape[2]
    room = past.stride(1) // width if past.stride(2) == width and past.stride(3) == 1 else 0
    # A tensor of no elements has strides, too: what counts is what was allocated.
    stored = past.untyped_storage().nbytes() // past.element_size() - past.storage_offset()
    if total > room or past.stride(0) != heads * past.stride(1) or stored < batch * heads * room * width:
        return torch.cat([past, new], 2)
    grown = past.as_strided((batch, heads, total, width), past.stride(), past.storage_offset())
    grown[:, :, length:] = new
    return grown


def attend_in_place(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`group_query_attention` over caches that `append` prolongs."""
    return group_query_attention(*arguments, grow=append)  # type: ignore[misc]  # it is the last, by name
