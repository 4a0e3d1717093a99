"""Recognise RMSNorm spelled out in elementary ops."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import arguments_of, aten, dtype_of, is_call, is_tensor_constant, operand_of, rank_of
from teq_graph.graph.op_sets import CASTS
from teq_graph.graph.tensors import drop_unused
from teq_graph.passes.base import GraphPass, PassResult


class FuseRMSNorm(GraphPass[None]):
    """x → pow(2) → mean(-1) → add(eps) → rsqrt → mul(x) [→ mul(weight)]   becomes   rms_norm(x, [D], weight, eps)

    Casts to float32 before and back after are absorbed: the op itself accumulates in float32. The norm
    without weight is fused as well. One op is one rule for the analysis, one kernel in training, and
    `RMSNormalization` in ONNX. (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.)
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        for node in list(graph_module.graph.nodes):
            if is_call(node, aten.rsqrt.default):
                modified |= _fuse(node)
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _fuse(rsqrt: Node) -> bool:
    matched = _match_root_mean_square(rsqrt)
    if matched is None or len(rsqrt.users) != 1:
        return False
    squared, eps = matched
    normalized = next(iter(rsqrt.users))
    if not is_call(normalized, aten.mul.Tensor):
        return False
    other = normalized.args[0] if normalized.args[1] is rsqrt else normalized.args[1]
    if not isinstance(other, Node) or _uncast(other) is not _uncast(squared):
        return False
    source = _uncast(squared)
    width = source.meta["val"].shape[-1]
    if not isinstance(width, int):
        return False
    end, weight = normalized, None
    last = _only_user_through_casts(normalized, dtype_of(source))
    if last is not None and is_call(last, aten.mul.Tensor):
        for gain in last.args:
            if is_tensor_constant(gain) and tuple(gain.meta["val"].shape) == (width,):
                end, weight = last, gain
    if weight is None:
        end = _last_cast(normalized, dtype_of(source))
    if dtype_of(end) != dtype_of(source) or (weight is not None and dtype_of(weight) != dtype_of(source)):
        return False
    with end.graph.inserting_before(end):
        fused = end.graph.call_function(aten.rms_norm.default, (source, [width], weight, eps))
    fused.meta = dict(end.meta)
    end.replace_all_uses_with(fused)
    return True


def _match_root_mean_square(rsqrt: Node) -> tuple[Node, float] | None:
    """x and eps where `rsqrt` is of mean(x², -1, keepdim) + eps."""
    add = operand_of(rsqrt)
    if not is_call(add, aten.add.Tensor) or add.kwargs or not isinstance(add.args[1], float):
        return None
    mean = operand_of(add)
    if not is_call(mean, aten.mean.dim):
        return None
    values: dict[str, Any] = arguments_of(mean)
    square = values["self"]
    if not values["keepdim"] or list(values["dim"]) not in ([-1], [rank_of(square) - 1]):
        return None
    if is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return operand_of(square), add.args[1]
    if is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
        return operand_of(square), add.args[1]
    if is_call(square, aten.square.default):
        return operand_of(square), add.args[1]
    return None


def _uncast(node: Node) -> Node:
    """The value before a cast to a wider type; narrowing casts lose digits and stay."""
    if is_call(node, *CASTS):
        source = operand_of(node)
        if dtype_of(source).itemsize <= dtype_of(node).itemsize:
            return source
    return node


def _only_user_through_casts(node: Node, source: torch.dtype) -> Node | None:
    """What reads `node`, past casts that keep every digit of the type `source`."""
    while len(node.users) == 1:
        (user,) = node.users
        if not is_call(user, *CASTS):
            return user
        between = dtype_of(user)
        if between != source and (not between.is_floating_point or between.itemsize <= source.itemsize):
            return None
        node = user
    return None


def _last_cast(node: Node, target: Any) -> Node:
    """The cast of `node` back to `target` where that is all its use, otherwise `node`."""
    if len(node.users) == 1:
        (user,) = node.users
        if is_call(user, *CASTS) and dtype_of(user) == target:
            return user
    return node
