"""What training minimises."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.graph.products import is_image

NO_TOKEN = -100
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
    """KL(target || logits) in nats, mean over the tokens that are no padding; both [b, s, vocab]."""
    mask = batch.get("attention_mask")
    if mask is not None:
        present = mask.bool().to(logits.device)
        logits, target = logits[present], target[present]
    log_p, log_q = (part.float().log_softmax(-1).flatten(0, -2) for part in (target, logits))
    return torch.nn.functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """What follows each token but the last [b, s - 1]; NO_TOKEN where that is padding."""
    labels = batch["input_ids"][:, 1:]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask[:, 1:] == 0, NO_TOKEN)
