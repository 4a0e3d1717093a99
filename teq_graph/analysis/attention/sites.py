"""The attentions of a decoder, from projections to one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import torch
from torch.fx import Node

from teq_graph.analysis.attention.heads import Heads, Rotation, find_heads
from teq_graph.analysis.attention.matching import Match, match_attention
from teq_graph.analysis.attention.probe import NotProven, Probe, Step
from teq_graph.analysis.attention.scores import Scores, find_scores
from teq_graph.capture import CapturedGraph
from teq_graph.errors import one_line
from teq_graph.graph.nodes import arguments_of, aten, is_call, rank_of
from teq_graph.graph.op_sets import LINEAR, UNCHANGED

STEP = Step(3, 2, torch.ones(2, 5, dtype=torch.int64))


@dataclasses.dataclass(frozen=True)
class Attention:
    """softmax(scores of query and key) value over one layer's cache, from projections to one value [b, s, h * d].

    A part whose heads are None is given by its node alone, [b, heads, s, d]; the query's may be [b * h, s, d].
    """

    output: Node
    query: Node
    key: Node
    value: Node
    num_heads: int
    heads: tuple[Heads | None, Heads | None, Heads | None]
    past: tuple[Node, Node]
    present: tuple[Node, Node]
    scores: Scores


@dataclasses.dataclass(frozen=True)
class AttentionRefusal:
    """An attention that is not one op in ONNX, and why; or one that is (`is_fused`), but for what `reason` says."""

    node: str
    reason: str
    is_fused: bool = False


@dataclasses.dataclass(frozen=True)
class Attentions:
    """Those that are proven, and those that are not, in graph order."""

    proven: tuple[Attention, ...]
    refusals: tuple[AttentionRefusal, ...]


def find_attentions(captured: CapturedGraph) -> Attentions:
    """The attentions of a decoder: those that are causal and hide padding (see `Scores`), and why others are not.

    Without a cache there is nothing for the op to do that the graph does not say as well.
    """
    if captured.decoder is None:
        return Attentions((), ())
    probe = Probe(captured)
    caches = {present: past for past, present in captured.cache_pairs().items()}
    known: list[Rotation] = []
    proven, refusals = [], []
    for node in probe.nodes:
        try:
            match = match_attention(probe, node)
            if match is not None:
                proven.append(_examine(probe, match, caches, known))
        except NotProven as finding:
            refusals.append(AttentionRefusal(node.name, str(finding)))
        except (RuntimeError, IndexError, ValueError) as error:
            reason = f"a part of it cannot be run by itself: {one_line(error)}"
            refusals.append(AttentionRefusal(node.name, reason))
    return Attentions(tuple(proven), tuple(refusals))


def _examine(probe: Probe, match: Match, caches: Mapping[Node, Node], known: list[Rotation]) -> Attention:
    key_cache, key = _cached_part(probe, match, match.key, caches, "keys")
    value_cache, value = _cached_part(probe, match, match.value, caches, "values")
    output = _merged_heads(probe, match, value.meta["val"].shape[3])
    scores = find_scores(probe, match)
    parts = ((match.query, match.heads), (key, key.meta["val"].shape[1]), (value, value.meta["val"].shape[1]))
    query_heads, key_heads, value_heads = (find_heads(probe, node, count, known) for node, count in parts)
    return Attention(
        output=output,
        query=match.query,
        key=key,
        value=value,
        num_heads=match.heads,
        heads=(query_heads, key_heads, value_heads),
        past=(caches[key_cache], caches[value_cache]),
        present=(key_cache, value_cache),
        scores=scores,
    )


def _cached_part(
    probe: Probe, match: Match, node: Node, caches: Mapping[Node, Node], what: Literal["keys", "values"]
) -> tuple[Node, Node]:
    """The cache [b, kv, p + s, d] that `node` repeats for all heads, and its new part."""
    cache = node
    while cache not in caches:
        if cache.target not in LINEAR or len(cache.args) == 0 or not isinstance(cache.args[0], Node):
            raise NotProven(f"its {what} are not those of a cache")
        cache = cache.args[0]
    grown = NotProven(f"the cache of its {what} does not grow by new positions at its end")
    if not is_call(cache, aten.cat.default):
        raise grown
    parts, dim = arguments_of(cache)["tensors"], arguments_of(cache)["dim"]
    if len(parts) != 2 or parts[0] is not caches[cache] or dim not in (2, -2):
        raise grown
    _, kv, _, width = cache.meta["val"].shape
    x = torch.randn(STEP.batch, kv, STEP.total, width, generator=torch.Generator().manual_seed(0))
    repeated = probe.evaluate(node, STEP, {cache: x})
    if what == "keys" and match.scores is not None:
        repeated = repeated.transpose(-1, -2)
    # A single head may be left for the attention itself to repeat.
    accepted = [x.repeat_interleave(heads // kv, 1) for heads in (match.heads, 1) if heads % kv == 0]
    flat = [wanted.flatten(0, 1) for wanted in accepted]
    if not any(torch.equal(repeated, wanted) for wanted in accepted + flat):
        raise NotProven(f"its {what} are not the cache's heads, each repeated for a run of queries")
    return cache, parts[1]


def _merged_heads(probe: Probe, match: Match, width: int) -> Node:
    """The last node [b, s, h * d] that the result becomes."""
    generator = torch.Generator().manual_seed(0)
    # Sums of few small integers are exact.
    weights = torch.randint(-8, 9, (STEP.batch, match.heads, STEP.sequence, STEP.total), generator=generator).float()
    value = torch.randint(-8, 9, (STEP.batch, match.heads, STEP.total, width), generator=generator).float()
    wanted = (weights @ value).transpose(1, 2).flatten(2)
    end, found = match.result, None
    while len(end.users) == 1:
        (end,) = end.users
        if end.target not in UNCHANGED and match.value not in end.all_input_nodes:
            break
        if rank_of(end) == 3 and torch.equal(match.output_of(probe, end, STEP, weights, value), wanted):
            found = end
    if found is None:
        raise NotProven("its heads are not put side by side to one value [b, s, h * d]")
    return found
