"""Let one op do a layer's attention: rotation, cache, mask and the sharing of heads."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node

from teq_graph.analysis.attention import Attention, AttentionRefusal, Heads, Rotation, find_attentions
from teq_graph.analysis.attention.scores import has_flat_batch
from teq_graph.capture import CapturedGraph
from teq_graph.graph.nodes import CallBuilder, aten, is_call, placeholder_nodes, rank_of
from teq_graph.graph.tensors import add_tensor, drop_unused, get_attr_node
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.passes.merge_products import join_products, kind

HEAD_SIZES = 8
"""onnxruntime's kernel takes heads of a multiple of this size, …"""
ROTATED_HEAD_SIZES = 16
"""… rotates them if it is a multiple of this, …"""
ROTATED_CHANNELS = 16
"""… and this many channels of each, or a multiple."""


@dataclasses.dataclass(frozen=True)
class FusedAttentions:
    """How many attentions became one op, and what is to be said of the others, and of those."""

    fused: int
    refusals: tuple[AttentionRefusal, ...]


class FuseAttention(GraphPass[FusedAttentions]):
    """softmax(cap(scale * q keys^T) + bias + mask) values → transpose → reshape

    with keys = repeat(cat(past_k, k)), values = repeat(cat(past_v, v)), and q and k rotated by the position

    becomes   group_query_attention(q, k, v, past_k, past_v, bias, cos, sin, …)

    where `find_attentions` proves it, whether one op did it or several. The bias [b or 1, h or 1, s, p + s] is the
    graph's own where it has one, and hides padding; what is ahead, and the window, the op knows itself. Positions are
    those in the cache: with rotations only distances matter, so that left padding is right. `cos` and `sin` are tables
    over all positions. Without a proven rotation q and k are the graph's own. The result's value has what was refused.
    """

    def __init__(self, captured: CapturedGraph) -> None:
        self.captured = captured

    def call(self, graph_module: GraphModule) -> PassResult[FusedAttentions]:
        found = find_attentions(self.captured)
        refusals = [*found.refusals, *filter(None, map(_refusal, found.proven))]
        unfused = {refusal.node for refusal in refusals if not refusal.is_fused}
        sites = [site for site in found.proven if site.output.name not in unfused]
        if sites:
            biases: dict[tuple[Node, ...], Node] = {}
            tables: dict[int, tuple[Node, Node]] = {}
            for site in sites:
                terms = site.scores.biases
                if terms not in biases:
                    biases[terms] = _bias(graph_module, self.captured, site)
                _fuse(graph_module, site, biases[terms], tables)
            _measure_by_mask(graph_module, self.captured)
            drop_unused(graph_module)
        return PassResult(graph_module, bool(sites), FusedAttentions(len(sites), tuple(refusals)))


def _refusal(site: Attention) -> AttentionRefusal | None:
    """What onnxruntime's kernel does not do of a proven attention."""
    size = site.query.meta["val"].shape[-1]
    if size % HEAD_SIZES:
        reason = f"heads of {size} channels; onnxruntime's kernel takes multiples of {HEAD_SIZES}"
        return AttentionRefusal(site.output.name, reason)
    query, key, _ = site.heads
    if query is None or key is None:
        reason = "fused but for queries and keys, which are more than rotated heads of a projection each"
        return AttentionRefusal(site.output.name, reason, is_fused=True)
    if query.rotation is not None and _common_rotation(site) is None:
        turned = 2 * query.rotation.cos.shape[1]
        accepted = f"heads of a multiple of {ROTATED_HEAD_SIZES}, of which a multiple of {ROTATED_CHANNELS}, all alike"
        reason = f"fused without its rotation: of {size} channels {turned} turn; onnxruntime's kernel takes {accepted}"
        return AttentionRefusal(site.output.name, reason, is_fused=True)
    return None


def _bias(graph_module: GraphModule, captured: CapturedGraph, site: Attention) -> Node:
    """[b, 1 or h, s, p + s] of the activations' type: the biases, and the smallest number where the mask has 0."""
    graph = graph_module.graph
    tokens, mask, *_ = placeholder_nodes(graph_module)
    terms = site.scores.biases
    first = next(node for node in graph.nodes if node.op == "call_function")
    build = CallBuilder(graph_module, site.output if terms else first)
    lowest = torch.finfo(captured.dtype).min

    def row(value: Node) -> Node:
        return build(aten.unsqueeze.default, build(aten.unsqueeze.default, value, 1), 2)

    if terms:
        total = functools.reduce(
            functools.partial(build, aten.add.Tensor), (_with_four_dims(build, term, site.num_heads) for term in terms)
        )
        # Filled, not added: two smallest numbers make an infinity, and padding that sees nothing no number at all.
        bias = build(aten.masked_fill.Scalar, total, row(build(aten.eq.Scalar, mask, 0)), lowest)
    else:
        hidden = build(aten.sub.Tensor, build(aten.to.dtype, mask, captured.dtype), 1.0)
        bias = row(build(aten.mul.Tensor, hidden, -lowest))
    length = build(aten.sym_size.int, tokens, 1)
    return build(aten.expand.default, bias, [-1, -1, length, -1])


def _with_four_dims(build: CallBuilder, bias: Node, heads: int) -> Node:
    """[b or 1, h or 1, s or 1, p + s], as `analysis.attention.scores.as_bias`."""
    if has_flat_batch(bias):
        return build(aten.unflatten.int, bias, 0, [-1, heads])
    while rank_of(bias) < 4:
        bias = build(aten.unsqueeze.default, bias, 0)
    return bias


def _measure_by_mask(graph_module: GraphModule, captured: CapturedGraph) -> None:
    """Let lengths come from the mask and the tokens: the cache's own is that of its buffer, where one is shared."""
    graph = graph_module.graph
    tokens, mask, *_ = placeholder_nodes(graph_module)
    for past, present in captured.cache_pairs().items():
        for query in [*past.users, *present.users]:
            if is_call(query, aten.sym_size.int) and query.args[1] in (2, -2):
                build = CallBuilder(graph_module, query)
                length = build(aten.sym_size.int, mask, 1)
                if query.args[0] is past:
                    length = build(operator.sub, length, build(aten.sym_size.int, tokens, 1))
                query.replace_all_uses_with(length)
                graph.erase_node(query)


def _fuse(graph_module: GraphModule, site: Attention, bias: Node, tables: dict[int, tuple[Node, Node]]) -> None:
    build = CallBuilder(graph_module, site.output)
    plan = _plan(site)
    rotation = plan.rotation
    operands: Sequence[Node | None]
    if plan.packed:
        operands = (_pack(build, plan.heads), None, None)
    else:
        nodes = (site.query, site.key, site.value)
        operands = [_flat(build, node, site.num_heads, heads) for node, heads in zip(nodes, plan.heads, strict=True)]
    query = plan.heads[0]
    result = build(
        torch.ops.teq_graph.group_query_attention.default,
        *operands,
        *site.past,
        bias,
        *((None, None) if rotation is None else _table_nodes(graph_module, rotation, tables)),
        site.num_heads,
        site.key.meta["val"].shape[1],
        site.scores.scale * (1.0 if query is None else query.factor),
        site.scores.softcap,
        site.scores.window,
        rotation is not None and rotation.interleaved,
    )
    for index, replaced in enumerate((site.output, *site.present)):
        item = build(operator.getitem, result, index)
        item.meta = dict(replaced.meta)
        replaced.replace_all_uses_with(item)


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the op is given: the rotation that it does, and each part's projection, or None for the part itself."""

    rotation: Rotation | None
    heads: tuple[Heads | None, ...]
    packed: bool


def _plan(site: Attention) -> _Plan:
    for rotation in (_common_rotation(site), None):
        wanted = (rotation, rotation, None)
        heads = tuple(
            part if part is not None and part.rotation is turned and (index == 0 or part.factor == 1) else None
            for index, (part, turned) in enumerate(zip(site.heads, wanted, strict=True))
        )
        if _can_pack(heads):
            return _Plan(rotation, heads, True)
        in_order = tuple(part if part is not None and _is_in_order(part) else None for part in heads)
        if rotation is None or None not in in_order[:2]:
            break
    return _Plan(rotation, in_order, False)


def _common_rotation(site: Attention) -> Rotation | None:
    """The rotation of queries and keys alike, where onnxruntime's kernel does it."""
    query, key, _ = site.heads
    if query is None or key is None or query.rotation is None or query.rotation is not key.rotation:
        return None
    width, channels = query.channels.shape[1], 2 * query.rotation.cos.shape[1]
    return None if width % ROTATED_HEAD_SIZES or channels % ROTATED_CHANNELS else query.rotation


def _is_in_order(heads: Heads) -> bool:
    flat = heads.channels.flatten()
    size = math.prod(size for size in heads.source.meta["val"].shape[1:] if isinstance(size, int))
    return len(flat) == size and torch.equal(flat, torch.arange(size))


def _can_pack(heads: Sequence[Heads | None]) -> bool:
    """Whether all three are rows of products of one value, alike in everything but their rows."""
    kinds = {None if part is None else kind(part.source) for part in heads}
    return len(kinds) == 1 and None not in kinds


def _pack(build: CallBuilder, heads: Sequence[Heads | None]) -> Node:
    """One product for queries, keys and values: rows of the projections in the order of heads."""
    parts = [part for part in heads if part is not None]
    return join_products(build, [part.source for part in parts], "packed", [part.channels.flatten() for part in parts])


def _flat(build: CallBuilder, node: Node, count: int, heads: Heads | None) -> Node:
    """[b, s, h * d]: a projection whose channels are in order, or else the part that became of it.

    `count` tells how many heads a query [b * h, s, d] has.
    """
    if heads is None:
        if rank_of(node) == 3:
            node = build(aten.unflatten.int, node, 0, [-1, count])
        return build(aten.flatten.using_ints, build(aten.transpose.int, node, 1, 2), 2)
    source = build(aten.transpose.int, heads.source, 1, 2) if heads.by_head else heads.source
    return source if rank_of(source) == 3 else build(aten.flatten.using_ints, source, 2)


def _table_nodes(
    graph_module: GraphModule, rotation: Rotation, tables: dict[int, tuple[Node, Node]]
) -> tuple[Node, Node]:
    if id(rotation) not in tables:
        cos, sin = (
            get_attr_node(graph_module, add_tensor(graph_module, f"rotary.{name}", table))
            for name, table in (("cos", rotation.cos), ("sin", rotation.sin))
        )
        tables[id(rotation)] = cos, sin
    return tables[id(rotation)]
