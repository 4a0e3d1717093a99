"""Heads of a projection.

Between a projection and an attention lie only movements of channels and rotations by the position. Both are linear,
so a few probes of that stretch of the graph give the channel that each element of a head takes, and the angle that
it is turned by; random inputs then confirm it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.analysis.attention.probe import TOLERANCE, Probe, Step, close
from teq_graph.graph.op_sets import LINEAR
from teq_graph.ops.group_query_attention import rotate

CHUNK = 4096
"""Positions whose angles are computed at once."""
LONGEST = 2**17
"""Positions of a table of angles at most: of longer contexts rotations stay in the graph."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """cos and sin [positions, r / 2] of the angles, constant factors included; see `rotate`."""

    cos: Tensor
    sin: Tensor
    interleaved: bool


@dataclasses.dataclass(frozen=True)
class Heads:
    """A value [b, heads, s, d]: factor * rotation(x[..., channels]), with x [b, s, n] the flat form of `source`."""

    source: Node
    """[b, s, n] or [b, s, heads, d], or `by_head` [b, heads, s, d]"""
    by_head: bool
    channels: Tensor
    """int64 [heads, d]"""
    factor: float
    rotation: Rotation | None


def find_heads(probe: Probe, node: Node, heads: int, known: list[Rotation]) -> Heads | None:
    """How `node` [b, heads, s, d] or [b * heads, s, d] is made of a projection; None where it is made otherwise.

    `known` are rotations found before, and gets a new one added.
    """
    source = _only_source(probe, node)
    if source is None or source.meta["val"].dim() not in (3, 4):
        return None
    shape = list(source.meta["val"].shape)
    by_head = isinstance(shape[1], int)
    del shape[2 if by_head else 1]
    if not all(isinstance(size, int) for size in shape[1:]):
        return None
    width = math.prod(shape[1:])

    def heads_of(x: Tensor, past: int) -> Tensor:
        """[heads, s, d] of a source [s, width]."""
        given = x.view(1, x.shape[0], *shape[1:])
        value = probe.evaluate(node, Step(x.shape[0], past), {source: given.transpose(1, 2) if by_head else given})
        return value.reshape(heads, x.shape[0], -1).float()

    try:
        ones = heads_of(torch.ones(1, width), 0)
        labels = heads_of(torch.arange(1.0, width + 1)[None], 0) / ones
    except (RuntimeError, IndexError, ValueError):  # the stretch depends on more than its source's shape
        return None
    channels = labels.round().long()[:, 0] - 1
    if not torch.isfinite(labels).all() or (labels[:, 0] - 1 - channels).abs().max() > TOLERANCE * width:
        return None
    if not 0 <= int(channels.min()) <= int(channels.max()) < width:
        return None
    factor = float(ones[0, 0, -1])
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(0))
    if close(heads_of(x, 11), factor * x[:, channels].transpose(0, 1), 1e-6):
        return Heads(source, by_head, channels, factor, None)
    # Where angles depend on the length of the sequence, no one table has them.
    positions = None if probe.decoder.recompute_after is not None else probe.decoder.max_positions
    rotation = _find_rotation(heads_of, channels, width, factor, positions, known)
    return None if rotation is None else Heads(source, by_head, channels, factor, rotation)


def _only_source(probe: Probe, node: Node) -> Node | None:
    """The one value of tokens that `node` is a linear function of."""
    pending, seen, sources = [node], set(), set()
    while pending:
        current = pending.pop()
        if current in seen or current not in probe.from_tokens:
            continue
        seen.add(current)
        if current.target in LINEAR:
            pending += current.all_input_nodes
        elif isinstance(current.meta.get("val"), Tensor):
            sources.add(current)
    return sources.pop() if len(sources) == 1 else None


HeadsOf = Callable[[Tensor, int], Tensor]
"""(source [s, width], past) -> [heads, s, d]"""


def _find_rotation(
    heads_of: HeadsOf, channels: Tensor, width: int, factor: float, positions: int | None, known: list[Rotation]
) -> Rotation | None:
    if positions is None or not 16 <= positions <= LONGEST:
        return None
    # Far from the start, where the slowest channels have turned as well.
    far = positions - 4
    x = torch.randn(4, width, generator=torch.Generator().manual_seed(1))
    base, turned = x[:, channels].transpose(0, 1), heads_of(x, far) / factor
    moved = [not close(turned[..., d], base[..., d], 1e-6) for d in range(channels.shape[1])]
    count = sum(moved)
    if count % 2 or not all(moved[:count]):
        return None
    for interleaved in (False, True):
        first, second = (
            (slice(0, count, 2), slice(1, count, 2)) if interleaved else (slice(count // 2), slice(count // 2, count))
        )

        def angles(sequence: int, past: int, first: slice = first, second: slice = second) -> tuple[Tensor, Tensor]:
            """cos and sin: what becomes of a one in the first channel of each pair."""
            one = torch.zeros(width)
            one[channels[:, first]] = 1
            result = heads_of(one.expand(sequence, width), past)[0] / factor
            return result[:, first], result[:, second]

        if close(rotate(base, *angles(4, far), interleaved), turned):
            return _table(angles, interleaved, positions, known)
    return None


def _table(
    angles: Callable[[int, int], tuple[Tensor, Tensor]],
    interleaved: bool,
    positions: int,
    known: list[Rotation],
) -> Rotation | None:
    """The rotation of all positions, one of `known` where it is the same."""
    places = [5, positions // 2, positions - 3]
    samples = [angles(3, place) for place in places]

    def agrees(rotation: Rotation) -> bool:
        return rotation.interleaved == interleaved and all(
            mine.shape[1] == table.shape[1] and close(mine, table[place : place + 3])
            for place, sample in zip(places, samples, strict=True)
            for mine, table in zip(sample, (rotation.cos, rotation.sin), strict=True)
        )

    for rotation in known:
        if agrees(rotation):
            return rotation
    parts = [angles(min(CHUNK, positions - start), start) for start in range(0, positions, CHUNK)]
    cos, sin = (torch.cat(tables) for tables in zip(*parts, strict=True))
    rotation = Rotation(cos, sin, interleaved)
    # Angles that depend on the length of the sequence are in no table.
    if not agrees(rotation):
        return None
    known.append(rotation)
    return rotation
