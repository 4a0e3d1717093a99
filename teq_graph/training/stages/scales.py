"""Where the scales of equivalences start."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from teq_graph.analysis.equivalences.equivalence import Equivalence, ScaledTensor, by_group, divide, multiply
from teq_graph.config import Init, WeightSpec
from teq_graph.graph.products import outputs_for
from teq_graph.quantization import fake_quantize

# Powers of the activation magnitude that are tried, 0 (no scale) first (AWQ, arXiv 2306.00978, section 3.2).
POWERS = tuple(step / 10 for step in range(10))
SPREAD = 1e4
"""Largest scale over smallest scale that an initial value may have."""


def initial_scale(
    equivalence: Equivalence,
    init: Init,
    weights: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
    specs: Mapping[str, WeightSpec],
) -> Tensor:
    """The starting scale, float32 [channels], with geometric mean 1.

    `weights` holds the consumers' weights [N, K] by name; `inputs` samples of what they read, [groups, T, K].
    """
    ones = torch.ones(equivalence.channels)
    consumers = [scaled for scaled in equivalence.multiplied if scaled.name in specs]
    if init == "ones" or not consumers:
        return ones
    if init == "weight":
        largest = {c.name: weights[c.name].float().abs() for c in consumers}
        columns = {c.name: _largest_by_index(largest[c.name], c.index) for c in consumers}
        return _balanced(1 / _per_channel(equivalence, columns).sqrt())
    inputs = {c.name: _unit_rows(inputs[c.name].float()) for c in consumers}
    magnitude = _per_channel(equivalence, {name: rows.abs().mean(1) for name, rows in inputs.items()})
    best, best_loss = ones, float("inf")
    for power in POWERS:
        scale = _balanced(magnitude.clamp(min=1e-8) ** power)
        loss = sum(
            _output_error(equivalence, c, scale, weights[c.name], inputs[c.name], specs[c.name]) for c in consumers
        )
        if loss < best_loss:
            best, best_loss = scale, loss
    return best


def _largest_by_index(weight: Tensor, index: Tensor) -> Tensor:
    """The largest of the elements [N, K] that one element of `index` stands for."""
    if index.dim() > weight.dim():
        return by_group(weight, index).amax(1)
    return weight if len(index) > 1 else weight.amax(0)


def _unit_rows(rows: Tensor) -> Tensor:
    """Each token at the same root mean square: a few tokens of trained decoders are hundreds of times larger."""
    return rows / rows.square().mean(-1, keepdim=True).clamp(min=1e-12).sqrt()


def _per_channel(equivalence: Equivalence, columns: Mapping[str, Tensor]) -> Tensor:
    """The mean, over every element of a consumer's `index` that is a channel's, of a positive figure for each: one per
    column, per column of a group, or per element."""
    total, count = torch.zeros(equivalence.channels), torch.zeros(equivalence.channels)
    for scaled in equivalence.multiplied:
        if scaled.name in columns:
            index = scaled.index.reshape(-1)
            carried = index >= 0
            figures = torch.atleast_2d(columns[scaled.name].cpu())
            if len(figures) > len(scaled.index):
                # All experts carry the same channels.
                figures = figures.mean(0, keepdim=True)
            figures = figures.repeat_interleave(len(scaled.index) // len(figures), 0).reshape(-1)
            total.index_add_(0, index[carried], figures[carried])
            count.index_add_(0, index[carried], torch.ones(int(carried.sum())))
    return (total / count.clamp(min=1)).clamp(min=1e-8)


def _balanced(scale: Tensor) -> Tensor:
    scale = scale / scale.log().mean().exp()
    return scale.clamp(min=SPREAD**-0.5, max=SPREAD**0.5)


def _output_error(
    equivalence: Equivalence, consumer: ScaledTensor, scale: Tensor, weight: Tensor, inputs: Tensor, spec: WeightSpec
) -> float:
    """Squared error of the product's output when its weight is scaled and quantized, relative to the output."""
    weight = weight.float()
    factor = equivalence.factor(consumer, scale.to(weight.device))
    error = divide(fake_quantize(multiply(weight, factor), spec), factor) - weight
    return float(_energy(outputs_for(inputs, error)) / _energy(outputs_for(inputs, weight)).clamp(min=1e-12))


def _energy(rows: Tensor) -> Tensor:
    return rows.square().sum()
