"""A captured decoder that goes on from its cache, step after step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

from teq_graph import pipeline
from teq_graph.capture import CachedTensor, CapturedGraph
from teq_graph.graph.tensors import clone_graph
from teq_graph.passes.grow_caches_in_place import room_for

StepFn: TypeAlias = Callable[[Tensor, Any], tuple[Tensor, Any]]
"""`(input_ids [b, s], past) -> (logits [b, s, vocab], past)`; a past of None is the empty one."""


def decoding_step(captured: CapturedGraph, positions: int) -> StepFn:
    """`captured`, a float decoder, for sequences of so many positions without padding; it is left as it is.

    Each past is good for one step: its buffers are the next one's.
    """
    decoder = captured.decoder
    assert decoder is not None
    own = dataclasses.replace(captured, graph_module=clone_graph(captured.graph_module))
    pipeline.run(pipeline.for_sampling(own), own.graph_module)
    like = torch.empty(0, dtype=captured.dtype, device=captured.device)

    def step(input_ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        input_ids = input_ids.to(captured.device)
        if past is None:
            past = decoder.by_layer(_beginning(one, len(input_ids), positions, like) for one in decoder.cached)
        args, _ = own.bind({"input_ids": input_ids, "past_key_values": past})
        logits, present = own.graph_module(*args)
        return logits, present

    return step


def _beginning(tensor: CachedTensor, batch: int, positions: int, like: Tensor) -> Tensor:
    """What is cached before the first step, with room for so many positions where keys and values grow."""
    if len(tensor.sizes) == 3 and tensor.growing_axis == 2:
        heads, _, width = tensor.sizes
        assert heads is not None and width is not None
        return room_for(batch, heads, positions, width, like)
    return like.new_zeros(tensor.shape(batch, 0))
