"""Causal attention over a KV cache, proven from the graph by what its parts compute, not by how they are written.

Between a projection and an attention lie only movements of channels and rotations by the position. Both are linear,
so a few probes of that stretch of the graph give the channel that each element of a head takes, and the angle that
it is turned by; random inputs then confirm it.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph import graph as fx
from teq_graph.analysis.blocks import SHAPE_QUERIES
from teq_graph.analysis.rules import KEEPS, MOVES
from teq_graph.attention import rotate
from teq_graph.capture import CapturedGraph, DecoderShape
from teq_graph.execution import run
from teq_graph.graph import aten

LINEAR_OPS = {
    *MOVES,
    *KEEPS,
    operator.getitem,
    aten.cat.default,
    aten.stack.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.index.Tensor,
    aten.index_select.default,
} - {aten.relu.default, aten.leaky_relu.default, aten.abs.default}
"""Ops that are linear in one operand, where the others are fixed."""

REPLACED = {aten.view.default: aten.reshape.default}
"""Given values do not have the strides that a view relies on."""

TOLERANCE = 1e-4
CHUNK = 4096
"""Positions whose angles are computed at once."""
LONGEST = 2**17
"""Positions of a table of angles at most: of longer contexts rotations stay in the graph."""


@dataclasses.dataclass(frozen=True)
class Rotation:
    """cos and sin [positions, r / 2] of the angles, constant factors included; see `teq_graph.attention.rotate`."""

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


class Probe:
    """Runs parts of a decoder's graph on values of one's choice."""

    def __init__(self, captured: CapturedGraph) -> None:
        assert captured.decoder is not None
        self.decoder: DecoderShape = captured.decoder
        self.nodes = list(captured.graph_module.graph.nodes)
        self.placeholders = [node for node in self.nodes if node.op == "placeholder"]
        self.device = captured.device
        self.dtype = captured.dtype
        tokens, _, *past = self.placeholders
        self.from_tokens = {tokens, *past}
        """Nodes whose values, not only sizes, depend on the tokens."""
        for node in self.nodes:
            if node.target not in SHAPE_QUERIES and self.from_tokens.intersection(node.all_input_nodes):
                self.from_tokens.add(node)

    def evaluate(
        self,
        target: Node,
        sequence: int,
        past: int,
        given: Mapping[Node, Tensor] | None = None,
        mask: Tensor | None = None,
        batch: int = 1,
    ) -> Tensor:
        """The value of `target` for `sequence` tokens after `past` cached ones; `given` nodes are not computed."""
        tokens = torch.zeros(batch, sequence, dtype=torch.int64, device=self.device)
        if mask is None:
            mask = torch.ones(batch, past + sequence, dtype=torch.int64, device=self.device)
        zero = torch.zeros((), dtype=self.dtype, device=self.device)
        cached = [
            zero.expand(batch, heads, past, dim)
            for c in self.decoder.layers
            for heads, dim in ((c.key_heads, c.key_dim), (c.value_heads, c.value_dim))
        ]
        values = dict(zip(self.placeholders, [tokens, mask, *cached], strict=True)) | dict(given or {})
        needed = _ancestors(target, values)
        with torch.no_grad():
            run([node for node in self.nodes if node in needed], values, REPLACED)
        result: Tensor = values[target]
        return result


def _ancestors(target: Node, known: Mapping[Node, object]) -> set[Node]:
    """The calls that `target` needs and that are not known, itself included."""
    found: set[Node] = set()
    pending = [target]
    while pending:
        node = pending.pop()
        if node not in known and node not in found and node.op == "call_function":
            found.add(node)
            pending += node.all_input_nodes
    return found


def find_heads(probe: Probe, node: Node, known: list[Rotation]) -> Heads | None:
    """How `node` [b, heads, s, d] is made of a projection; None where it is made otherwise.

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
        given = x.to(probe.device, probe.dtype).view(1, x.shape[0], *shape[1:])
        value = probe.evaluate(node, x.shape[0], past, {source: given.transpose(1, 2) if by_head else given})
        return value[0].float()

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
    if _close(heads_of(x, 11), factor * x[:, channels].transpose(0, 1), 1e-6):
        return Heads(source, by_head, channels, factor, None)
    rotation = _find_rotation(heads_of, channels, width, factor, probe.decoder.max_positions, known)
    return None if rotation is None else Heads(source, by_head, channels, factor, rotation)


def _only_source(probe: Probe, node: Node) -> Node | None:
    """The one value of tokens that `node` is a linear function of."""
    pending, seen, sources = [node], set(), set()
    while pending:
        current = pending.pop()
        if current in seen or current not in probe.from_tokens:
            continue
        seen.add(current)
        if current.target in LINEAR_OPS:
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
    moved = [not _close(turned[..., d], base[..., d], 1e-6) for d in range(channels.shape[1])]
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

        if _close(rotate(base, *angles(4, far), interleaved), turned):
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
            mine.shape[1] == table.shape[1] and _close(mine, table[place : place + 3])
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


def _close(a: Tensor, b: Tensor, tolerance: float = TOLERANCE) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-6))


# --------------------------------------------------------------------------------------------------------- sites


@dataclasses.dataclass(frozen=True)
class Attention:
    """softmax(scale * query key^T + mask) value over one layer's cache, from projections to one value [b, s, h * d].

    A part whose heads are None is given by its node [b, heads, s, d] alone.
    """

    output: Node
    query: Node
    key: Node
    value: Node
    heads: tuple[Heads | None, Heads | None, Heads | None]
    past: tuple[Node, Node]
    present: tuple[Node, Node]
    scale: float
    window: int
    """Keys that a query sees, itself included; -1: all before it."""


def find_attentions(captured: CapturedGraph) -> list[Attention]:
    """The attentions of a decoder whose mask is causal, hides padding, and may have a window; in graph order."""
    if captured.decoder is None:
        return []
    probe = Probe(captured)
    caches = {present: past for past, present in captured.cache_pairs().items()}
    known: list[Rotation] = []
    windows: dict[Node, int | None] = {}
    found = []
    for node in probe.nodes:
        if fx.is_call(node, aten.scaled_dot_product_attention.default):
            attention = _examine(probe, node, caches, known, windows)
            if attention is not None:
                found.append(attention)
    return found


def _examine(
    probe: Probe, node: Node, caches: Mapping[Node, Node], known: list[Rotation], windows: dict[Node, int | None]
) -> Attention | None:
    values = fx.arguments(node)
    mask = values["attn_mask"]
    if not isinstance(mask, Node) or values["is_causal"] or values["dropout_p"] or fx.ndim(node) != 4:
        return None
    output = _merged_heads(probe, node)
    parts = [_cached_part(probe, values[name], caches, node) for name in ("key", "value")]
    if output is None or parts[0] is None or parts[1] is None:
        return None
    if mask not in windows:
        windows[mask] = find_window(probe, mask)
    window = windows[mask]
    if window is None:
        return None
    (key_cache, key), (value_cache, value) = parts[0], parts[1]
    query = values["query"]
    width = query.meta["val"].shape[-1]
    return Attention(
        output=output,
        query=query,
        key=key,
        value=value,
        heads=(find_heads(probe, query, known), find_heads(probe, key, known), find_heads(probe, value, known)),
        past=(caches[key_cache], caches[value_cache]),
        present=(key_cache, value_cache),
        scale=float(width**-0.5 if values["scale"] is None else values["scale"]),
        window=window,
    )


def _cached_part(probe: Probe, node: Node, caches: Mapping[Node, Node], attention: Node) -> tuple[Node, Node] | None:
    """The cache [b, kv, p + s, d] that `node` repeats for all heads, and its new part; None where it is otherwise."""
    cache = node
    while cache not in caches:
        if cache.target not in LINEAR_OPS or len(cache.args) == 0 or not isinstance(cache.args[0], Node):
            return None
        cache = cache.args[0]
    if not fx.is_call(cache, aten.cat.default):
        return None
    parts, dim = fx.arguments(cache)["tensors"], fx.arguments(cache)["dim"]
    if len(parts) != 2 or parts[0] is not caches[cache] or dim not in (2, -2):
        return None
    heads, kv, width = node.meta["val"].shape[1], cache.meta["val"].shape[1], cache.meta["val"].shape[3]
    queries = attention.meta["val"].shape[1]
    x = torch.randn(1, kv, 5, width, generator=torch.Generator().manual_seed(0)).to(probe.device, probe.dtype)
    repeated = probe.evaluate(node, 2, 3, {cache: x})
    # A single head may be left for the attention itself to repeat.
    if heads not in (queries, 1) or not torch.equal(repeated, x.repeat_interleave(heads // kv, 1)):
        return None
    return cache, parts[1]


def _merged_heads(probe: Probe, node: Node) -> Node | None:
    """The last node [b, s, h * d] that the attention's output [b, h, s, d] becomes."""
    _, heads, _, width = node.meta["val"].shape
    x = torch.randn(2, heads, 3, width, generator=torch.Generator().manual_seed(0)).to(probe.device, probe.dtype)
    wanted = x.transpose(1, 2).flatten(2)
    end, found = node, None
    while len(end.users) == 1:
        (end,) = end.users
        if end.target not in MOVES and end.target not in KEEPS:
            break
        value = probe.evaluate(end, 3, 2, {node: x}, batch=2)
        if value.shape == wanted.shape and torch.equal(value, wanted):
            found = end
    return found


def find_window(probe: Probe, mask: Node) -> int | None:
    """-1 where `mask` lets every token see itself and all before it that are no padding, or how many of them.

    None where the mask is another one. What padding itself sees is nobody's concern.
    """
    positions = probe.decoder.max_positions or 4 * CHUNK
    if positions < 16:
        return None
    row = probe.evaluate(mask, 1, positions - 1)
    seen = int(_visible(row).sum())
    window = -1 if seen == positions else seen
    if window == 0:
        return None
    lengths = {(5, 3), (9, 0), (1, 6)}
    if 1 < window < CHUNK and window + 4 <= positions:
        lengths |= {(4, window), (window + 2, 0)}
    for sequence, past in sorted(lengths):
        attention_mask = torch.ones(2, past + sequence, dtype=torch.int64, device=probe.device)
        attention_mask[0, :2] = 0
        given = probe.evaluate(mask, sequence, past, mask=attention_mask, batch=2)
        ahead = torch.arange(past + sequence) - torch.arange(past, past + sequence)[:, None]
        allowed = (ahead <= 0) & (attention_mask.cpu()[:, None, None, :] > 0)
        if window > 0:
            allowed &= ahead > -window
        visible = _visible(given)
        if visible.dim() != 4 or visible.shape[-2:] != allowed.shape[-2:]:
            return None
        rows = (attention_mask.cpu()[:, None, past:] > 0).expand(2, visible.shape[1], sequence)
        visible = visible.expand(2, visible.shape[1], *visible.shape[2:])
        if not torch.equal(visible[rows], allowed.expand(visible.shape)[rows]):
            return None
    return window


def _visible(mask: Tensor) -> Tensor:
    """Where a mask, bool or additive, lets through; additive ones hold zeros there."""
    return (mask if mask.dtype == torch.bool else mask == 0).cpu()
