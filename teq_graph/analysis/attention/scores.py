"""What a softmax is taken of: scaled, capped, biased and masked products of queries and keys."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.analysis.attention.heads import CHUNK
from teq_graph.analysis.attention.matching import Match
from teq_graph.analysis.attention.probe import NotProven, Probe, Step, close

HIDDEN = -1e9
"""Scores up to this one have no weight beside any other."""
LARGE = 2.0**20
"""A product at which a cap is reached, and every other offset is small."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """cap(scale * query key^T) + biases, where a token sees itself and those before it that are no padding.

    cap(x) = softcap * tanh(x / softcap), or x where softcap is 0.
    """

    scale: float
    softcap: float
    window: int
    """Keys that a query sees, itself included; -1: all before it."""
    biases: tuple[Node, ...]
    """Each as `as_bias` takes it."""

    def cap(self, products: Tensor) -> Tensor:
        """The scores of `products`, without biases and masks."""
        scaled = self.scale * products
        return self.softcap * (scaled / self.softcap).tanh() if self.softcap else scaled


def has_flat_batch(bias: Node) -> bool:
    """Whether `bias` is [b * h, s or 1, p + s], and not [b or 1, h or 1, s or 1, p + s] with or without its first."""
    shape = bias.meta["val"].shape
    return len(shape) == 3 and not isinstance(shape[0], int)


def as_bias(bias: Node, value: Tensor, heads: int) -> Tensor:
    """A value of `bias` with four dimensions, [b or 1, h or 1, s or 1, p + s]."""
    return value.unflatten(0, (-1, heads)) if has_flat_batch(bias) else value[(None,) * (4 - value.dim())]


def find_scores(probe: Probe, match: Match) -> Scores:
    """What the softmax of `match` is taken of. Raises NotProven where that is anything else.

    What padding itself sees is nobody's concern.
    """
    try:
        window = _find_window(probe, match)
        response = _find_response(probe, match)
        found = Scores(*response, window, match.terms)
        used: set[Node] = set()
        for step in _steps(probe, window):
            used |= _confirm(probe, match, found, step)
    except (RuntimeError, IndexError, ValueError) as error:
        raise NotProven("its masks or biases depend on more than the number of tokens and the padding") from error
    return dataclasses.replace(found, biases=tuple(term for term in match.terms if term in used))


def _zeros(probe: Probe, match: Match, step: Step) -> Tensor:
    """The scores where all products are zero: biases and masks alone."""
    left = torch.zeros(step.batch, match.heads, step.sequence, 1)
    return match.scores_of(probe, step, left, torch.zeros(step.batch, match.heads, step.total, 1))


def _find_window(probe: Probe, match: Match) -> int:
    """How many keys a query sees, -1 where it is all of them."""
    positions = probe.decoder.max_positions or 4 * CHUNK
    if positions < 16:
        raise NotProven(f"the model has {positions} positions; 16 are needed to tell a window from none")
    seen = {int(count) for count in (_zeros(probe, match, Step(1, positions - 1)) > HIDDEN).sum(-1).flatten()}
    if len(seen) != 1 or seen == {0}:
        raise NotProven("a token sees neither all before it nor a window of one length")
    count = seen.pop()
    return -1 if count == positions else count


def _find_response(probe: Probe, match: Match) -> tuple[float, float]:
    """Scale and softcap, from the scores of a single token with itself."""
    step = Step(1, 0)
    offset = _zeros(probe, match, step)
    one = torch.ones(1, match.heads, 1, 1)

    def response(product: float) -> float:
        return float((match.scores_of(probe, step, one, product * one) - offset).flatten()[0])

    high, higher = response(LARGE), response(2 * LARGE)
    if not 0 < high <= higher < torch.inf:
        raise NotProven("the score of a single token with itself does not rise with the product of its query and key")
    if higher > high:
        return high / LARGE, 0.0
    # Halfway to the cap, where neither its curve nor rounding hides the slope.
    product = LARGE
    while response(product) > 0.75 * high:
        product /= 2
    scale = high * math.atanh(response(product) / high) / product
    return float(torch.tensor(scale, dtype=torch.float32)), high


def _steps(probe: Probe, window: int) -> list[Step]:
    """Steps of two sequences, one with padding."""
    lengths = {(5, 3), (9, 0), (1, 6)}
    if 1 < window < CHUNK and window + 4 <= (probe.decoder.max_positions or 4 * CHUNK):
        lengths |= {(4, window), (window + 2, 0)}
    steps = []
    for sequence, past in sorted(lengths):
        mask = torch.ones(2, past + sequence, dtype=torch.int64)
        mask[0, :2] = 0
        steps.append(Step(sequence, past, mask))
    return steps


def _confirm(probe: Probe, match: Match, expected: Scores, step: Step) -> set[Node]:
    """The biases that are not zero at one step, where the scores are the `expected` ones."""
    assert step.mask is not None
    ahead = torch.arange(step.total) - torch.arange(step.past, step.total)[:, None]
    seen = (ahead <= 0) & (step.mask[:, None, None, :] > 0)
    if expected.window > 0:
        seen &= ahead > -expected.window
    shape = (step.batch, match.heads, step.sequence, step.total)
    rows = (step.mask[:, None, step.past :] > 0).expand(shape[:3])
    seen = seen.expand(shape)
    offset = _zeros(probe, match, step)
    if not torch.equal((offset > HIDDEN)[rows], seen[rows]):
        raise NotProven("its mask is another than that of causality, a window and padding")
    seen = seen & rows[..., None]
    total = torch.zeros(shape)
    used: set[Node] = set()
    for term in match.terms:
        if term.meta["val"].is_floating_point() and term.meta["val"].dim() > 1:
            bias = as_bias(term, probe.evaluate(term, step).float(), match.heads).expand(shape)
            if bias[seen].any():
                total, used = total + bias, used | {term}
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(*shape[:3], 1, generator=generator) * (expected.softcap or 8) / expected.scale
    right = torch.randn(*shape[:2], step.total, 1, generator=generator)
    scores = match.scores_of(probe, step, left, right)
    wanted = expected.cap(left @ right.transpose(-1, -2)) + total
    same = torch.equal(offset[seen], total[seen]) if not used else close(offset[seen], total[seen], 1e-5)
    if not same or not close(scores[seen], wanted[seen], 1e-5):
        raise NotProven("its scores are not capped, scaled products of queries and keys plus biases by position")
    return used
