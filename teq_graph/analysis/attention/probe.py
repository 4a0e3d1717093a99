"""Parts of a decoder's graph, run on values of one's choice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.capture import CapturedGraph, DecoderShape
from teq_graph.graph.execution import run
from teq_graph.graph.nodes import placeholder_nodes
from teq_graph.graph.op_sets import FILLS, SHAPE_QUERIES

TOLERANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Step:
    """`sequence` new tokens after `past` cached ones; mask int64 [b, past + sequence], None for one row of ones."""

    sequence: int
    past: int
    mask: Tensor | None = None

    @property
    def total(self) -> int:
        """Tokens, cached ones included."""
        return self.past + self.sequence

    @property
    def batch(self) -> int:
        """Rows of the mask."""
        return 1 if self.mask is None else self.mask.shape[0]


class NotProven(Exception):  # noqa: N818  a finding, which `find_attentions` turns into a value
    """Why an attention is not the one that an op computes; says what was found, and what is accepted."""


class Probe:
    """Runs parts of a decoder's graph; which nodes depend on the tokens."""

    def __init__(self, captured: CapturedGraph) -> None:
        assert captured.decoder is not None
        self.decoder: DecoderShape = captured.decoder
        self.nodes = list(captured.graph_module.graph.nodes)
        self.placeholders = placeholder_nodes(captured.graph_module)
        self.device = captured.device
        self.dtype = captured.dtype
        tokens, _, *past = self.placeholders
        self.from_tokens = {tokens, *past}
        """Nodes whose values, not only sizes, depend on the tokens."""
        for node in self.nodes:
            if node.target not in (*SHAPE_QUERIES, *FILLS) and self.from_tokens.intersection(node.all_input_nodes):
                self.from_tokens.add(node)

    def evaluate(self, target: Node, step: Step, given: Mapping[Node, Tensor] | None = None) -> Tensor:
        """The value of `target`, on the CPU; `given` nodes are not computed. Tokens and cached values are zeros."""
        tokens = torch.zeros(step.batch, step.sequence, dtype=torch.int64, device=self.device)
        mask = torch.ones(1, step.total, dtype=torch.int64) if step.mask is None else step.mask
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        cached = [zero.expand(one.shape(step.batch, step.past)) for one in self.decoder.cached]
        values = dict(zip(self.placeholders, [tokens, mask.to(self.device), *cached], strict=True))
        values |= {node: value.to(self.device, self.dtype) for node, value in (given or {}).items()}
        needed = _ancestors(target, values)
        with torch.no_grad():
            run([node for node in self.nodes if node in needed], values)
        result: Tensor = values[target]
        return result.cpu()


def _ancestors(target: Node, known: Mapping[Node, object]) -> set[Node]:
    """The calls that `target` needs and that are not known, itself included."""
    found: set[Node] = set()
    pending = [target]
    while pending:
        node = pending.pop()
        if node not in known and node not in found and node.op == "call_function":
            found.add(node)
            pending += node.all_input_nodes
    return found


def close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    """Whether `a` is `b` up to `tolerance` of its largest value."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6))
