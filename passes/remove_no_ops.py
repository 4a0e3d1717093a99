"""Remove asserts, casts to the type a value already has, whole slices, copies over all, demands on strides."""

from __future__ import annotations

import sys

import torch
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import arguments_of, aten, dtype_of, operand_of
from teq_graph.graph.op_sets import ALIASES, CASTS
from teq_graph.graph.tensors import drop_unused
from teq_graph.passes.base import GraphPass, PassResult

CHECKS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range_for_size.default,
    aten.sym_constrain_range.default,
    torch._check,
)


class RemoveNoOps(GraphPass[None]):
    """1. x → to(float32) → dropout → slice(0, end) → y   becomes   x → y           where x is float32 already
    2. copy(x, y)                                      becomes   expand_as(y, x)   where y has the dtype of x
    3. view(x, sizes)                                  becomes   reshape(x, sizes)
    4. reshape(x, sizes)                               becomes   new_zeros(x, sizes)   where one of the sizes is 0

    Values and dtypes stay exactly as they are. Case 2 is what torch.export makes of `x[...] = y`, and has no gradient.
    Of case 3 torch.export has made sure for the strides that x had; other passes may give it others. Of case 4 there
    are no values, and ONNX takes 0 for a size that stays as it is.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
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
            elif node.target == aten.copy.default and dtype_of(operand_of(node)) == dtype_of(operand_of(node, 1)):
                node.target, node.args, node.kwargs = aten.expand_as.default, node.args[1::-1], {}
                modified = True
            elif node.target in (aten.view.default, aten.reshape.default):
                # Sizes that inputs decide are not known to be 0, and are not compared.
                is_empty = any(isinstance(size, int) and size == 0 for size in node.meta["val"].shape)
                target = aten.new_zeros.default if is_empty else aten.reshape.default
                modified |= node.target != target
                node.target = target
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _keeps_type(node: Node) -> bool:
    source, result = operand_of(node).meta.get("val"), node.meta["val"]
    return source is not None and source.dtype == result.dtype and source.device == result.device


def _is_no_op(node: Node) -> bool:
    if node.target in ALIASES:
        return True
    if node.target in CASTS:
        return _keeps_type(node)
    if node.target == aten.dropout.default:
        return not arguments_of(node)["train"]
    if node.target == aten.slice.Tensor:
        values = arguments_of(node)
        return values["start"] in (None, 0) and values["end"] in (None, sys.maxsize) and values["step"] == 1
    return False
