"""What each stage makes of each linear of a block, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from teq_graph.analysis.equivalences.equivalence import divide
from teq_graph.graph.products import outputs_for
from teq_graph.passes.insert_scales import InsertedScales, spread_scale
from teq_graph.quantization import dequantize, fake_quantize
from teq_graph.report import ROUNDED
from teq_graph.training.losses import relative_error
from teq_graph.training.stages.codes import BlockProblem, Choice


class LinearErrors:
    """Weight -> stage -> relative error of its linear's output on samples [groups, T, K] of the float model's inputs.

    weights: [N, K] without scales. `factors`: what `problem` multiplies their elements by, one after the other.
    `rounded`: the choice that only rounds, as the scales' training did.
    """

    def __init__(
        self,
        problem: BlockProblem,
        weights: Mapping[str, Tensor],
        factors: Mapping[str, Sequence[Tensor]],
        samples: Mapping[str, Tensor],
        rounded: Choice,
    ) -> None:
        self.weights, self.factors, self.samples = weights, factors, samples
        self.by_name: dict[str, dict[str, float]] = {name: {} for name in weights if name in samples}
        for name, errors in self.by_name.items():
            errors[ROUNDED] = self._error(name, fake_quantize(weights[name], problem.specs[name]))
        self._measure("teq", rounded, [name for name in self.by_name if name in factors])

    def measure(self, stage: str, choice: Choice) -> None:
        """Add what `choice` gives, the result of `stage`."""
        self._measure(stage, choice, list(self.by_name))

    def _measure(self, stage: str, choice: Choice, names: list[str]) -> None:
        for name in names:
            quantized = dequantize(*choice.codes[name])
            for factor in self.factors.get(name, ()):
                quantized = divide(quantized, factor)
            self.by_name[name][stage] = self._error(name, quantized)

    def _error(self, name: str, quantized: Tensor) -> float:
        with torch.no_grad():
            read = self.samples[name].float()
            outputs = (outputs_for(read, weight.float()) for weight in (quantized, self.weights[name]))
            return float(relative_error([next(outputs)], [next(outputs)]))


def factors_of(inserted: InsertedScales, scales: Mapping[str, Tensor], names: list[str]) -> dict[str, list[Tensor]]:
    """What the elements of each weight are multiplied by, of those that a scale other than ones reaches.

    scales: those of `inserted`, by name. Factors of rows and of columns stay apart: together they are as large as the
    weight.
    """
    factors: dict[str, list[Tensor]] = {}
    for equivalence, scale_name in zip(inserted.equivalences, inserted.scales, strict=True):
        scale = scales[scale_name].detach()
        if bool((scale == 1).all()):
            continue
        for group, power in ((equivalence.divided, -1), (equivalence.multiplied, 1)):
            for scaled in group:
                if scaled.name in names:
                    factor = spread_scale(scale, scaled.index.to(scale.device)).pow(power)
                    factors.setdefault(scaled.name, []).append(factor)
    return factors
