"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.graph.products import is_image

NO_TOKEN = -100
TOKENS = 16
"""Of which a divergence is computed at a time."""
LOSS_BATCHES = 4
"""Batches on which a loss is measured before and after training."""


def mean_loss(loss_of: Callable[[int], Tensor], batches: int) -> float:
    """Mean over the batches 0 to `batches`, without gradients."""
    with torch.no_grad():
        return sum(float(loss_of(number)) for number in range(batches)) / batches


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared error over the last dimension, each token relative to its own mean square.

    A few tokens are hundreds of times larger than the others in trained decoders; an absolute error would
    be about them alone. Of an image the numbers are those of one example (`as_tokens`).
    """
    losses = []
    for output, target in zip(outputs, targets, strict=True):
        target = target.float()
        error = (output.float() - target).square().mean(-1)
        losses.append((error / target.square().mean(-1).clamp(min=1e-12)).mean())
    return torch.stack(losses).mean()


def as_tokens(nodes: Sequence[Node], values: Sequence[Tensor]) -> list[Tensor]:
    """What `nodes` gave, with what is one unit for `relative_error` in the last dimension: images as a whole, of whose
    rows and channels some may be all zero."""
    return [value.flatten(1) if is_image(node) else value for node, value in zip(nodes, values, strict=True)]


def next_token_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of each next token in nats, padding left out; logits [b, s, vocab]."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), next_tokens(batch).flatten(), ignore_index=NO_TOKEN
    )


def prediction_divergence(logits: Tensor, target: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """KL(target || logits) in nats, mean over the tokens that are no padding; both [b, s, vocab].

    Where `logits` learn, `target` has been used up: its memory takes the slope.
    """
    mask = batch.get("attention_mask")
    if mask is not None and not bool((present := mask.bool().to(logits.device)).all()):
        logits, target = logits[present], target[present]
    apply: Callable[..., Tensor] = _Divergence.apply
    return apply(logits.flatten(0, -2), target.flatten(0, -2))


class _Divergence(torch.autograd.Function):
    """A few tokens at a time: a float32 copy of all logits would be the largest of what training keeps. The derivative
    by logits is the difference of the probabilities, and is computed while these are at hand."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> Tensor:
        total = logits.new_zeros((), dtype=torch.float32)
        learns = ctx.needs_input_grad[0]
        slope = target if target.dtype == logits.dtype else torch.empty_like(logits if learns else logits[:0])
        for first in range(0, len(logits), TOKENS):
            run = slice(first, first + TOKENS)
            log_q, log_p = (part[run].float().log_softmax(-1) for part in (logits, target))
            p = log_p.exp()
            total += torch.linalg.vecdot(p, log_p.sub_(log_q)).sum()
            if learns:
                slope[run] = log_q.exp_().sub_(p).div_(len(logits))
        ctx.slope = slope
        return total / len(logits)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        slope, ctx.slope = ctx.slope, None
        return slope.mul_(grad), None


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """What follows each token but the last [b, s - 1]; NO_TOKEN where that is padding."""
    labels = batch["input_ids"][:, 1:]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask[:, 1:] == 0, NO_TOKEN)
