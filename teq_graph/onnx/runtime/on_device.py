"""Sessions on a GPU whose decoding steps leave nothing to the processor, and can be replayed as a CUDA graph."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime

from teq_graph.onnx.directory import Metadata
from teq_graph.onnx.fused_products import FUSED_PRODUCTS, has_fused_products
from teq_graph.onnx.padding import LAST_POSITIONS, take_lengths
from teq_graph.onnx.runtime.last_logits import add_logits_from

CUDA = "CUDAExecutionProvider"
CAPTURE = "enable_cuda_graph"
"""Option of the CUDA provider: run a step once, then replay what it launched."""

BEST_TOKEN, BEST_LOGIT = "best_token", "best_logit"
"""Outputs [b, s] that the runtime adds: of each position the index of the largest logit, and that logit."""


def open_on_device(
    path: Path,
    metadata: Metadata,
    options: onnxruntime.SessionOptions,
    providers: Sequence[Any],
    try_step: Callable[[onnxruntime.InferenceSession, Metadata], object],
) -> onnxruntime.InferenceSession | None:
    """A session over the model in `path` with lengths in the place of the mask; None where it is to run as it is.

    That is where the provider is another than CUDA's, or the decoder needs the mask itself. Its logits are float32.
    `try_step` runs one step: what a provider cannot capture, it says only then.
    """
    name, given = providers[0] if isinstance(providers[0], tuple) else (providers[0], {})
    if name != CUDA or not metadata.shared_buffers:
        return None
    fused = [True, False] if has_fused_products(ir.load(path)) else [False]
    for fuses, (finds_best, chosen) in itertools.product(fused, _variants(given)):
        model = ir.load(path)
        if not prepare(model, finds_best):
            return None
        first = (name, {**given, **chosen})
        options.add_session_config_entry(FUSED_PRODUCTS, str(int(fuses)))
        try:
            content = ir.to_proto(model).SerializeToString()
            session = onnxruntime.InferenceSession(content, sess_options=options, providers=[first, *providers[1:]])
            try_step(session, metadata)
            return session
        except Exception:  # refused for a node that the provider lacks, or cannot replay
            continue
    return None


def prepare(model: ir.Model, finds_best: bool = True) -> bool:
    """Let the graph take lengths, choose its logits and find the largest; False, and unchanged, where it cannot."""
    if not take_lengths(model):
        return False
    add_logits_from(model)
    _widen_logits(model)
    if finds_best:
        _find_best(model)
    return True


def takes_lengths(session: onnxruntime.InferenceSession) -> bool:
    return any(item.name == LAST_POSITIONS for item in session.get_inputs())


def captures(session: onnxruntime.InferenceSession) -> bool:
    return bool(session.get_provider_options().get(CUDA, {}).get(CAPTURE) == "1")


def run_options(graph: int | None) -> onnxruntime.RunOptions:
    """Of the run that is captured as this graph, or replays it; None for a run of shapes that change."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(-1 if graph is None else graph))
    return options


def _variants(given: dict[str, Any]) -> Iterator[tuple[bool, dict[str, str]]]:
    """(whether to find the best token, provider options), the fastest first."""
    captured: list[dict[str, str]] = [{}] if CAPTURE in given else [{CAPTURE: "1"}, {}]
    for chosen, finds_best in itertools.product(captured, (True, False)):
        yield finds_best, chosen


def _widen_logits(model: ir.Model) -> None:
    """logits   becomes   Cast(logits) to float32, which numpy has, and every provider finds the largest of."""
    logits = model.graph.outputs[0]
    if logits.dtype == ir.DataType.FLOAT:
        return
    cast = ir.node("Cast", [logits], {"to": ir.DataType.FLOAT})
    (wide,) = cast.outputs
    wide.name, wide.type, wide.shape = logits.name, ir.TensorType(ir.DataType.FLOAT), logits.shape
    logits.name = f"{logits.name}.narrow"
    model.graph.append(cast)
    model.graph.outputs[0] = wide


def _find_best(model: ir.Model) -> None:
    """logits [b, s, vocab]   becomes   also ArgMax and ReduceMax of the last axis"""
    graph = model.graph
    logits = graph.outputs[0]
    axis = ir.Value(name=f"{BEST_LOGIT}.axis", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64))
    axis.const_value = ir.tensor([-1], dtype=ir.DataType.INT64, name=axis.name)
    graph.register_initializer(axis)
    found = ir.node("ArgMax", [logits], {"axis": -1, "keepdims": 0})
    largest = ir.node("ReduceMax", [logits, axis], {"keepdims": 0})
    for node, name, kind in ((found, BEST_TOKEN, ir.DataType.INT64), (largest, BEST_LOGIT, ir.DataType.FLOAT)):
        node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(kind)
        graph.append(node)
        graph.outputs.append(node.outputs[0])
