"""Equivalence: where per-channel scales move from a producer into its consumers, and their algebra.

For a producer with output channels c and consumers that read them in known columns,

    producer:  row c of the weight, and of the bias, is divided by s[c]
    consumer:  every column that carries channel c is multiplied by s[c]

leaves the float output unchanged for every s > 0 (arXiv 2310.10944, section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from teq_graph.errors import EquivalenceError

ProducerKind = Literal["linear", "experts", "convolution", "layer_norm", "rms_norm", "gain"]


def spread(scale: Tensor, index: Tensor) -> Tensor:
    """`scale` [channels] over the elements of a tensor as `index` says; 1 where that is -1."""
    return torch.cat([scale, scale.new_ones(1)])[index]


def divide(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor / factor`, computed in float32, in the tensor's dtype; see `by_group`."""
    return (by_group(tensor.float(), factor) / factor).reshape(tensor.shape).to(tensor.dtype)


def multiply(tensor: Tensor, factor: Tensor) -> Tensor:
    """`tensor * factor`, computed in float32, in the tensor's dtype; see `by_group`."""
    return (by_group(tensor.float(), factor) * factor).reshape(tensor.shape).to(tensor.dtype)


def by_group(tensor: Tensor, factor: Tensor) -> Tensor:
    """A weight [N, K] as [groups, N / groups, K] where `factor` [groups, …] tells its groups of rows apart."""
    return tensor.unflatten(0, (len(factor), -1)) if factor.dim() > tensor.dim() else tensor


@dataclasses.dataclass(frozen=True)
class ScaledTensor:
    """A tensor that takes part. `index`, broadcastable to its shape, holds the channel whose scale each
    element takes; -1 where it takes none. That of a weight whose groups of rows differ has one dimension more, the
    groups."""

    name: str
    index: Tensor


@dataclasses.dataclass(frozen=True)
class Equivalence:
    """One proven pair of scalings.

    `channels` counts the independent scales: channels that only ever appear together (repeated KV heads)
    share one. `divided` are the producer's tensors, `multiplied` the consumers' weights; `linears` names
    the consumers' weights in graph order. `producer` is the name of the producer's first tensor.
    """

    producer: str
    kind: ProducerKind
    channels: int
    divided: tuple[ScaledTensor, ...]
    multiplied: tuple[ScaledTensor, ...]
    scale: Tensor | None = None
    """The learned scale, float32 [channels]; None where nothing was learned."""

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of the consumers' weights."""
        return tuple(scaled.name for scaled in self.multiplied)

    def factor(self, scaled: ScaledTensor, scale: Tensor) -> Tensor:
        """`scale` [channels] spread over the elements of `scaled`, 1 where no channel applies."""
        return spread(scale, scaled.index.to(scale.device))

    def apply(self, tensors: Mapping[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
        """The tensors that change, by name, for `scale` float [channels] > 0; `tensors` holds the present ones.

        Computed in float32 and rounded once to each tensor's dtype. A tensor that takes part twice (a
        weight whose rows and columns belong to one equivalence) is changed by both.
        """
        if tuple(scale.shape) != (self.channels,):
            raise EquivalenceError(
                f"scale of {self.producer} has shape {tuple(scale.shape)}: accepted is ({self.channels},)"
            )
        if not bool(((scale > 0) & torch.isfinite(scale)).all()):
            raise EquivalenceError(
                f"scale of {self.producer} has values outside (0, inf): the transformation needs s > 0"
            )
        changed: dict[str, Tensor] = {}
        scale = scale.detach().float()
        for group, change in ((self.divided, divide), (self.multiplied, multiply)):
            for scaled in group:
                tensor = changed.get(scaled.name, tensors[scaled.name])
                changed[scaled.name] = change(tensor, self.factor(scaled, scale))
        return changed


@dataclasses.dataclass(frozen=True)
class Refusal:
    """A producer whose channels cannot be scaled exactly: where they escape, and why."""

    producer: str
    kind: ProducerKind
    node: str
    reason: str
