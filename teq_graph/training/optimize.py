"""The loop of gradient steps that every learning stage shares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from teq_graph.config import TrainingConfig
from teq_graph.errors import NumericsError
from teq_graph.report import Curve
from teq_graph.system.progress import Task


@dataclasses.dataclass(frozen=True)
class Learned:
    """Tensors that learn at one rate."""

    tensors: Sequence[Tensor]
    rate: float


def optimize(
    learned: Sequence[Learned],
    loss_of: Callable[[int], Tensor],
    batches: int,
    config: TrainingConfig,
    generator: torch.Generator,
    bar: Task,
    steps: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    smallest: float | None = None,
) -> Curve:
    """Adam for `steps` (or the configured) steps on the loss of one batch each, in shuffled order; linear warm-up
    and decay. Values are kept at or above `smallest`. Returns the losses.

    Raises NumericsError where the loss is not finite.
    """
    steps = config.steps if steps is None else steps
    tensors = [tensor.requires_grad_() for group in learned for tensor in group.tensors]
    groups = [{"params": list(group.tensors), "lr": group.rate} for group in learned if group.tensors]
    optimizer = torch.optim.Adam(groups, betas=betas, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step, steps, config.warmup))
    order: list[int] = []
    losses: list[float] = []
    for _ in range(steps):
        order = order or torch.randperm(batches, generator=generator).tolist()
        loss = loss_of(order.pop())
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NumericsError(f"training loss is {value}: accepted are finite losses; lower learning_rate")
        losses.append(value)
        loss.backward()
        optimizer.step()
        schedule.step()
        # Not beside the activations of the next step.
        optimizer.zero_grad()
        del loss
        if smallest is not None:
            with torch.no_grad():
                for tensor in tensors:
                    tensor.clamp_(min=smallest)
        bar.advance(1, note=f"loss {value:.3g}")
    for tensor in tensors:
        tensor.requires_grad_(False)
    return Curve.of(losses)


def decay(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first part of the steps, then linear decay to zero."""
    rising = max(1, round(steps * warmup))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))
