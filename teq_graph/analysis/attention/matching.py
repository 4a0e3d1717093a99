"""Attention as it is written: one op, or a softmax between two products."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.analysis.attention.probe import NotProven, Probe, Step
from teq_graph.graph.nodes import arguments_of, aten, is_call, rank_of
from teq_graph.graph.op_sets import PARAMETERIZED, SOFTMAX, UNCHANGED, op_name

PRODUCTS: dict[Any, tuple[str, str]] = {
    aten.matmul.default: ("self", "other"),
    aten.bmm.default: ("self", "mat2"),
    aten.baddbmm.default: ("batch1", "batch2"),
}
"""Products of matrices, and the names of their factors."""

BIASES_OF_TOKENS = "its mask or biases depend on the tokens; accepted are those of positions and padding"

ON_SCORES = {
    *UNCHANGED,
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.tanh.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
}
"""What may become of scores before their softmax; what it does is proven by `find_scores`."""


@dataclasses.dataclass(frozen=True)
class Match:
    """weights = softmax over keys of a function of query key^T; result = weights value, [b, h, s, d] in some shape."""

    result: Node
    """The op that does it all, or the weights."""
    heads: int
    query: Node
    """[b, h, s, d] or [b * h, s, d]"""
    key: Node
    """[…, p + s, d], or [..., d, p + s] as the factor of a product"""
    value: Node
    terms: tuple[Node, ...]
    """Masks and biases: what the scores are combined with on the way to the softmax."""
    scores: Node | None
    """What the softmax is taken of; None where one op does it all."""

    def scores_of(self, probe: Probe, step: Step, left: Tensor, right: Tensor) -> Tensor:
        """What the softmax is taken of, float32 [b, h, s, p + s], where the products are left [b, h, s, 1] right."""
        right = right.transpose(-1, -2)
        if self.scores is not None:
            # Factors may have any inner size, so that nothing need be known of the product itself.
            given = {self.query: _shaped_as(self.query, left), self.key: _shaped_as(self.key, right)}
            result = probe.evaluate(self.scores, step, given)
            return result.reshape(step.batch, self.heads, step.sequence, step.total).float()
        values = arguments_of(self.result)
        scale = self.query.meta["val"].shape[-1] ** -0.5 if values["scale"] is None else values["scale"]
        scores: Tensor = left @ right * scale
        for mask in self.terms:
            added = probe.evaluate(mask, step)
            scores = scores.masked_fill(~added, -torch.inf) if added.dtype == torch.bool else scores + added.float()
        return scores

    def output_of(self, probe: Probe, end: Node, step: Step, weights: Tensor, value: Tensor) -> Tensor:
        """What `end` becomes, where the weights are [b, h, s, p + s] and the values [b, h, p + s, d]."""
        if self.scores is None:
            return probe.evaluate(end, step, {self.result: weights @ value})
        given = {self.result: _shaped_as(self.result, weights), self.value: _shaped_as(self.value, value)}
        return probe.evaluate(end, step, given)


def _shaped_as(node: Node, value: Tensor) -> Tensor:
    """`value` [b, h, …], with batch and heads as one where `node` has them so."""
    return value.flatten(0, 1) if rank_of(node) == 3 else value


def match_attention(probe: Probe, node: Node) -> Match | None:
    """The attention whose softmax `node` is, or does; None where it is none: a router's softmax, a classifier's.

    Raises NotProven for an attention of another form.
    """
    if is_call(node, aten.scaled_dot_product_attention.default):
        return _match_op(probe, node)
    return _match_softmax(probe, node) if is_call(node, *SOFTMAX) else None


def _match_op(probe: Probe, node: Node) -> Match:
    values = arguments_of(node)
    mask = values["attn_mask"]
    if rank_of(node) != 4:
        raise NotProven(f"it has {rank_of(node)} dimensions; accepted are [b, h, s, d]")
    if not isinstance(mask, Node) or values["is_causal"] or values["dropout_p"]:
        raise NotProven("it has no mask of its own, or drops weights; accepted is a mask alone")
    if mask in probe.from_tokens:
        raise NotProven(BIASES_OF_TOKENS)
    heads = node.meta["val"].shape[1]
    return Match(node, heads, values["query"], values["key"], values["value"], (mask,), None)


def _match_softmax(probe: Probe, softmax: Node) -> Match | None:
    values = arguments_of(softmax)
    product = _product_of_scores(probe, values["self"])
    if product is None or not _weighs_values(probe, softmax):
        return None
    if values["dim"] not in (-1, rank_of(softmax) - 1):
        raise NotProven(f"its softmax is over dimension {values['dim']}; accepted is the last, that of keys")
    value = _weighted(softmax)
    stretch, terms = _stretch(probe, values["self"], product)
    heads = [node.meta["val"].shape[1] for node in (product, *stretch) if rank_of(node) == 4]
    arguments = arguments_of(product)
    query, key = (arguments[name] for name in PRODUCTS[product.target])
    if is_call(product, aten.baddbmm.default):
        terms.append(arguments["self"])
    if any(term in probe.from_tokens for term in terms):
        raise NotProven(BIASES_OF_TOKENS)
    if not heads or any(rank_of(part) not in (3, 4) for part in (query, key, value, softmax)):
        raise NotProven("its parts are not [b, h, s, d] or [b * h, s, d]")
    tensors = tuple(node for node in terms if isinstance(node.meta.get("val"), Tensor))
    return Match(softmax, heads[0], query, key, value, tensors, values["self"])


def _is_product(probe: Probe, node: Node) -> bool:
    """Whether `node` multiplies two values of the tokens."""
    if node.target not in PRODUCTS:
        return False
    return all(arguments_of(node)[name] in probe.from_tokens for name in PRODUCTS[node.target])


def _product_of_scores(probe: Probe, scores: Node) -> Node | None:
    """The product of queries and keys that the scores are made of, whatever was done to them element by element."""
    pending, seen = [scores], set()
    while pending:
        node = pending.pop()
        if _is_product(probe, node):
            return node
        # A linear or a norm begins another computation.
        begins = is_call(node, *PARAMETERIZED) or op_name(node) == "teq_graph.matmul_nbits"
        if node not in seen and node in probe.from_tokens and not begins:
            seen.add(node)
            pending += node.all_input_nodes
    return None


def _weighs_values(probe: Probe, softmax: Node) -> bool:
    """Whether a product with other values of the tokens reads the softmax's result."""
    pending = list(softmax.users)
    while pending:
        user = pending.pop()
        if _is_product(probe, user):
            return True
        if user.target in UNCHANGED:
            pending += user.users
    return False


def _stretch(probe: Probe, scores: Node, product: Node) -> tuple[list[Node], list[Node]]:
    """The ops between the product and the softmax, and the terms that they combine the scores with."""
    stretch: list[Node] = []
    terms: list[Node] = []
    pending = [scores]
    while pending:
        node = pending.pop()
        if node in stretch or node is product or node in terms:
            continue
        if node not in probe.from_tokens:
            terms.append(node)
        elif node.target in ON_SCORES:
            stretch.append(node)
            pending += node.all_input_nodes
        elif node.op == "placeholder" or any(source.op == "placeholder" for source in node.all_input_nodes):
            raise NotProven(BIASES_OF_TOKENS)
        else:
            raise NotProven(f"its scores go through {op_name(node)}; accepted are scales, caps, biases and masks")
    return stretch, terms


def _weighted(softmax: Node) -> Node:
    """The value that nothing but a product takes the softmax's result to."""
    node = softmax
    while len(node.users) == 1:
        (user,) = node.users
        if user.target in PRODUCTS and not is_call(user, aten.baddbmm.default):
            left, right = (arguments_of(user)[name] for name in PRODUCTS[user.target])
            if left is node and right is not node:
                return right  # type: ignore[no-any-return]
            raise NotProven("its weights are the right factor of a product; accepted is the left")
        if user.target not in UNCHANGED:
            raise NotProven(f"its weights go through {op_name(user)}; accepted are casts and copies")
        node = user
    raise NotProven("its weights are read by more than one op")
