"""What became of one producer's channels on their way through the graph."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.analysis.equivalences.example_values import ExampleValues

Labels = Any  # a label tensor, or a list of them (None where unlabelled) for ops with several results


@dataclasses.dataclass(frozen=True)
class Escape:
    """The node at which channels stop being movable, and why."""

    node: Node
    reason: str


@dataclasses.dataclass
class Trace:
    """What became of one producer's channels."""

    producer: Node
    values: ExampleValues
    cache_pairs: dict[Node, Node]
    channels: int
    """Of the producer. A label of a row of several experts' is row * channels + channel."""
    rows: Node | None = None
    """What chooses the expert of each row, where the producer is of several experts."""
    encoded: Collection[Node] = ()
    """Outputs that the graph reads itself in the next step, in the place of computing them."""
    labels: dict[Node, Labels] = dataclasses.field(default_factory=dict)
    columns: dict[Node, Tensor] = dataclasses.field(default_factory=dict)
    """Consumer -> the label of each element of its weight [N, K]: [1, K] where all rows have the same, or [N, K]."""
    constants: dict[Node, Tensor] = dataclasses.field(default_factory=dict)
    """Added constant -> the label of each of its elements; it is divided together with the producer."""
    escapes: dict[int, Escape] = dataclasses.field(default_factory=dict)

    def labels_of(self, value: Any) -> Tensor | None:
        return self.labels.get(value) if isinstance(value, Node) else None

    def escape(self, labels: Labels, node: Node, reason: str) -> None:
        for tensor in labels if isinstance(labels, list) else [labels]:
            if tensor is not None:
                for label in tensor[tensor >= 0].remainder(self.channels).unique().tolist():
                    self.escapes.setdefault(label, Escape(node, reason))

    def require_agreement(self, other: Trace) -> None:
        """Let labels escape that escape in `other`, or that reach other elements there."""
        for label, escape in other.escapes.items():
            self.escapes.setdefault(label, escape)
        for mine, theirs in ((self.columns, other.columns), (self.constants, other.constants)):
            for node in {**mine, **theirs}:
                a, b = mine.get(node), theirs.get(node)
                if a is None or b is None:
                    self.escape(a if b is None else b, node, "where it goes depends on the inputs' sizes")
                else:
                    self.escape(torch.cat([a[a != b], b[a != b]]), node, "where it goes depends on the inputs' sizes")
