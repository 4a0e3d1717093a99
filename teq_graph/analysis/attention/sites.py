"""The attentions of a decoder, from projections to one value."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.fx import Node

from teq_graph.analysis.attention.heads import Heads, Rotation, find_heads
from teq_graph.analysis.attention.matching import Match, match_attention
from teq_graph.analysis.attention.probe import Probe, Step
from teq_graph.analysis.attention.scores import Scores, find_scores
from teq_graph.capture import CapturedGraph
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


def find_attentions(captured: CapturedGraph) -> list[Attention]:
    """The attentions of a decoder that are causal and hide padding, see `Scores`; in graph order."""
    if captured.decoder is None:
        return []
    probe = Probe(captured)
    caches = {present: past for past, present in captured.cache_pairs().items()}
    known: list[Rotation] = []
    found = []
    for node in probe.nodes:
        match = match_attention(probe, node)
        attention = None if match is None else _examine(probe, match, caches, known)
        if attention is not None:
            found.append(attention)
    return found


def _examine(probe: Probe, match: Match, caches: Mapping[Node, Node], known: list[Rotation]) -> Attention | None:
    key_part = _cached_part(probe, match, match.key, caches, transposed=match.scores is not None)
    value_part = _cached_part(probe, match, match.value, caches, transposed=False)
    if key_part is None or value_part is None:
        return None
    output = _merged_heads(probe, match, value_part[0].meta["val"].shape[3])
    scores = find_scores(probe, match) if output is not None else None
    if output is None or scores is None:
        return None
    (key_cache, key), (value_cache, value) = key_part, value_part
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
    probe: Probe, match: Match, node: Node, caches: Mapping[Node, Node], transposed: bool
) -> tuple[Node, Node] | None:
    """The cache [b, kv, p + s, d] that `node` repeats for all heads, and its new part; None where it is otherwise."""
    cache = node
    while cache not in caches:
        if cache.target not in LINEAR or len(cache.args) == 0 or not isinstance(cache.args[0], Node):
            return None
        cache = cache.args[0]
    if not is_call(cache, aten.cat.default):
        return None
    parts, dim = arguments_of(cache)["tensors"], arguments_of(cache)["dim"]
    if len(parts) != 2 or parts[0] is not caches[cache] or dim not in (2, -2):
        return None
    _, kv, _, width = cache.meta["val"].shape
    x = torch.randn(STEP.batch, kv, STEP.total, width, generator=torch.Generator().manual_seed(0))
    repeated = probe.evaluate(node, STEP, {cache: x})
    if transposed:
        repeated = repeated.transpose(-1, -2)
    # A single head may be left for the attention itself to repeat.
    accepted = [x.repeat_interleave(heads // kv, 1) for heads in (match.heads, 1) if heads % kv == 0]
    flat = [wanted.flatten(0, 1) for wanted in accepted]
    return (cache, parts[1]) if any(torch.equal(repeated, wanted) for wanted in accepted + flat) else None


def _merged_heads(probe: Probe, match: Match, width: int) -> Node | None:
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
    return found
