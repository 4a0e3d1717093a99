"""Remove asserts, casts to the type a value already has, and whole slices."""

from __future__ import annotations

import sys

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from teq_graph import graph as fx
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
    aten.lift_fresh_copy.default,
    aten.lift_fresh.default,
)


class RemoveNoOps(PassBase):
    """x → to(float32) → dropout → slice(0, end) → y   becomes   x → y

    where x is float32 already. Values and dtypes stay exactly as they are.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        modified = False
        for node in list(graph_module.graph.nodes):
            if node.op != "call_function":
                continue
            if node.target in CHECKS:
                graph_module.graph.erase_node(node)
                modified = True
            elif _is_no_op(node):
                node.replace_all_uses_with(node.args[0])
                graph_module.graph.erase_node(node)
                modified = True
        if modified:
            fx.drop_unused(graph_module)
        return PassResult(graph_module, modified)


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
