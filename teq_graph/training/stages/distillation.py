"""The last stage: what is left in float learns from the float model's predictions, through the whole graph.

Codes stay as they are. What EfficientQAT (arXiv 2407.11062, section 3.3) gains from its end-to-end phase, with the
model's own logits for a target, and gains and biases learning too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from teq_graph.config import TrainingConfig
from teq_graph.quantization import ScaledCodes
from teq_graph.report import Curve
from teq_graph.system.progress import task
from teq_graph.training.losses import mean_loss
from teq_graph.training.optimize import Learned, optimize
from teq_graph.training.precision import Precision
from teq_graph.training.stages.codes import Choice, LearnedVector

RATE = 1.5e-3
"""Of the logarithm of group scales, and of gains and biases relative to their root mean square."""
FEW = 100
RATES_OF_FEW = {2: 3e-3, 3: 1e-3, 4: 3e-4, 8: 3e-4}
"""Bits -> rate for fewer steps, whose noise does not average out: the finer the codes, the less it may cost."""

MEASURED = 4
"""Batches on which the loss is measured before and after: as costly as two steps."""

ValueOf = Callable[[str], Tensor]
"""Name of a tensor -> what it is now, with its gradient."""


def distill(
    start: Choice,
    dtypes: Mapping[str, torch.dtype],
    precision: Precision,
    loss_of: Callable[[int, ValueOf], Tensor],
    batches: int,
    config: TrainingConfig,
    generator: torch.Generator,
) -> tuple[Choice, float, float, Curve]:
    """Group scales and floats that bring the loss down; the loss before, as they are, and on the way.

    `dtypes` are those in which each weight's scales are stored, and `loss_of` takes the number of a batch and what
    gives a tensor of `start` as it is now, a weight for products with `precision`. What does not bring the loss down is
    not kept.
    """
    weights = {name: ScaledCodes(*chosen, dtypes[name]) for name, chosen in start.codes.items()}
    floats = {name: LearnedVector(tensor) for name, tensor in start.floats.items()}

    def value_of(name: str) -> Tensor:
        return weights[name].value(precision.weight_dtype(dtypes[name])) if name in weights else floats[name].value()

    def loss(number: int) -> Tensor:
        return loss_of(number, value_of)

    measured = min(MEASURED, batches)
    before = mean_loss(loss, measured)
    steps = config.steps_of_distillation
    by_bits: dict[int, list[Tensor]] = {}
    for weight in weights.values():
        by_bits.setdefault(weight.grid.bits, []).append(weight.log_scale)
    learned = [Learned(scales, _rate(bits, steps)) for bits, scales in by_bits.items()]
    of_floats = max((_rate(bits, steps) for bits in by_bits), default=RATE)
    learned.append(Learned([vector.change for vector in floats.values()], of_floats))
    with task("distilling", steps) as bar:
        curve = optimize(learned, loss, batches, config, generator, bar, steps=steps)
    after = mean_loss(loss, measured)
    if after >= before:
        return start, before, before, curve
    codes = {name: weight.result() for name, weight in weights.items()}
    return Choice(codes, {name: vector.value().detach() for name, vector in floats.items()}), before, after, curve


def _rate(bits: int, steps: int) -> float:
    return RATES_OF_FEW[bits] if steps < FEW else RATE
