"""Remove asserts, casts to the type a value already has, whole slices, and in-place variants."""

from __future__ import annotations

import functools
import sys
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from teq_graph import graph as fx
from teq_graph.errors import CaptureError
from teq_graph.graph import aten

CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
    torch._check,
)
# Ops that give back their first argument where dtype and device already agree; layout is always strided.
CASTS = (
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.to.other,
    aten.type_as.default,
    aten._to_copy.default,
)
IDENTITIES = (
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
)


class RemoveNoOps(PassBase):
    """x → to(float32) → dropout → slice(0, end) → y   becomes   x → y

    where x is float32 already. `x.add_(y)` becomes `add(x, y)`, which later readers of x read instead, so
    that every node is a value and none changes under another. Values and dtypes stay exactly as they are.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        modified = False
        nodes = list(graph_module.graph.nodes)
        if any(_functional_variant(node.target) is not None for node in nodes if node.op == "call_function"):
            _keep_copies(nodes)
        for node in nodes:
            if node.op != "call_function":
                continue
            if node.target in CHECKS:
                graph_module.graph.erase_node(node)
                modified = True
            elif _is_no_op(node):
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                modified = True
            elif (functional := _functional_variant(node.target)) is not None:
                _make_functional(node, functional)
                modified = True
        if modified:
            fx.drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _keep_copies(nodes: list[Node]) -> None:
    """Where values change in place, a copy of a value is another value, whatever its type."""
    for node in nodes:
        copies = fx.is_call(node, aten._to_copy.default, aten.lift_fresh_copy.default)
        if (copies or (fx.is_call(node, *CASTS) and fx.arguments(node).get("copy"))) and _keeps_type(node):
            node.target, node.args, node.kwargs = aten.clone.default, node.args[:1], {}


def _keeps_type(node: Node) -> bool:
    source, result = fx.operand(node).meta.get("val"), node.meta["val"]
    return source is not None and source.dtype == result.dtype and source.device == result.device


def _is_no_op(node: Node) -> bool:
    if node.target in IDENTITIES:
        return True
    if node.target in CASTS:
        return _keeps_type(node)
    if node.target == aten.dropout.default:
        return not fx.arguments(node)["train"]
    if node.target == aten.slice.Tensor:
        values = fx.arguments(node)
        return values["start"] in (None, 0) and values["end"] in (None, sys.maxsize) and values["step"] == 1
    return False


def _functional_variant(target: Any) -> Any:
    """`aten.add.Tensor` for `aten.add_.Tensor`; None for what changes nothing in place."""
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return None
    packet = target._opname.removesuffix("_")
    if packet == target._opname or not hasattr(aten, packet):
        raise CaptureError(f"{target} changes a tensor in place and has no functional variant")
    return getattr(getattr(aten, packet), target._overloadname)


def _make_functional(node: Node, functional: Any) -> None:
    changed = fx.operand(node)
    if changed.op != "call_function" or torch._ops.OpOverload not in type(changed.target).__mro__ or _is_view(changed):
        raise CaptureError(
            f"{node.target} changes {changed.name}, an input or a view, in place: accepted are fresh values"
        )
    widest = [fx.dtype(other) for other in node.all_input_nodes if isinstance(other.meta.get("val"), Tensor)]
    if functional != aten.copy.default and functools.reduce(torch.promote_types, widest) != fx.dtype(node):
        raise CaptureError(f"{node.target} changes {changed.name} in place by values of a wider type than its own")
    node.target = functional
    order = {other: index for index, other in enumerate(node.graph.nodes)}
    later = {user for user in changed.users if order[user] > order[node]}
    changed.replace_all_uses_with(node, delete_user_cb=lambda user: user in later)


def _is_view(node: Node) -> bool:
    target: Any = node.target
    return any(argument.alias_info is not None for argument in target._schema.arguments)
