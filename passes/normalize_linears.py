"""Write every product with a constant matrix as `aten.linear(x, weight[N, K], bias)`."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from teq_graph.graph.nodes import (
    arguments_of,
    aten,
    dtype_of,
    is_call,
    is_tensor_constant,
    operand_of,
    operands_of,
    rank_of,
)
from teq_graph.graph.op_sets import RESHAPES, TRANSPOSES
from teq_graph.graph.tensors import drop_unused
from teq_graph.passes.base import GraphPass, PassResult


class NormalizeLinears(GraphPass[None]):
    """1. addmm(bias, x, W[K, N])       →  linear(x, t(W), bias)
    2. mm(x, W), matmul(x, W)           →  linear(x, t(W))
    3. mm(W, x), matmul(W, x)           →  t(linear(t(x), W))
    4. linear(x, t(t(W)))               →  linear(x, W)
    5. add(linear(x, W), constant[N])   →  linear(x, W, constant)
    6. view(linear(view(x), W), sizes)  →  linear(x, W)

    W is a tensor constant or the transpose of one; `t` of a constant is left for constant folding. Case 5
    needs a linear without bias that nothing else reads; case 6 one that nothing else reads, and sizes that are
    those of x but for the last.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        for node in list(graph_module.graph.nodes):
            modified |= _rewrite_product(node) or _turn_product(node) or _absorb_bias(node) or _keep_dimensions(node)
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _rewrite_product(node: Node) -> bool:
    if is_call(node, aten.addmm.default):
        values = arguments_of(node)
        bias, x, matrix = values["self"], values["mat1"], values["mat2"]
        if values["beta"] != 1 or values["alpha"] != 1 or not is_tensor_constant(bias):
            return False
        if bias.meta["val"].shape != node.meta["val"].shape[-1:]:
            return False
    elif is_call(node, aten.mm.default, aten.matmul.default):
        bias, (x, matrix) = None, node.args[:2]
    else:
        return False
    if not isinstance(x, Node) or is_tensor_constant(x) or not _is_constant_matrix(matrix):
        return False
    graph = node.graph
    with graph.inserting_before(node):
        if _transposes(matrix):
            weight = matrix.args[0]
        else:
            weight = graph.call_function(aten.t.default, (matrix,))
            weight.meta["val"] = matrix.meta["val"].t()
        linear = graph.call_function(aten.linear.default, (x, weight) if bias is None else (x, weight, bias))
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    graph.erase_node(node)
    return True


def _turn_product(node: Node) -> bool:
    """A product whose constant comes first."""
    if not is_call(node, aten.mm.default, aten.matmul.default):
        return False
    matrix, x = operands_of(node)[:2]
    if not isinstance(x, Node) or is_tensor_constant(x) or not _is_constant_matrix(matrix):
        return False
    rows, turned = rank_of(x) > 1, node.meta["val"]
    with node.graph.inserting_before(node):
        if rows:
            x = _turn(x)
            turned = turned.mT
        linear = node.graph.call_function(aten.linear.default, (x, matrix))
        linear.meta = {**node.meta, "val": turned}
        result = _turn(linear) if rows else linear
    node.replace_all_uses_with(result)
    node.graph.erase_node(node)
    return True


def _turn(node: Node) -> Node:
    """The node with its last two dimensions exchanged."""
    result = node.graph.call_function(aten.transpose.int, (node, -2, -1))
    result.meta = {**node.meta, "val": node.meta["val"].mT}
    return result


def _is_constant_matrix(value: object) -> bool:
    if is_call(value, *TRANSPOSES):
        assert isinstance(value, Node)
        value = value.args[0]
    return is_tensor_constant(value) and rank_of(value) == 2


def _transposes(matrix: Node) -> bool:
    """Whether `matrix` is the transpose of what it reads: `permute(0, 1)` is not."""
    if is_call(matrix, aten.transpose.int):
        _, first, second = operands_of(matrix)
        return bool((first - second) % 2 == 1)
    if is_call(matrix, aten.permute.default):
        return [dim % 2 for dim in operands_of(matrix)[1]] == [1, 0]
    return is_call(matrix, *TRANSPOSES)


def _absorb_bias(node: Node) -> bool:
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return False
    for linear, bias in (node.args, reversed(node.args)):
        if not (is_call(linear, aten.linear.default) and is_tensor_constant(bias)):
            continue
        assert isinstance(linear, Node) and isinstance(bias, Node)
        has_bias = arguments_of(linear)["bias"] is not None
        fits = bias.meta["val"].shape == linear.meta["val"].shape[-1:] and dtype_of(bias) == dtype_of(linear)
        if not has_bias and fits and len(linear.users) == 1:
            linear.args = (*linear.args[:2], bias)
            # The constant may be read only from here on, so the linear moves down to its reader.
            node.prepend(linear)
            node.replace_all_uses_with(linear)
            node.graph.erase_node(node)
            return True
    return False


def _keep_dimensions(node: Node) -> bool:
    if not is_call(node, *RESHAPES):
        return False
    linear = operand_of(node)
    if not is_call(linear, aten.linear.default) or len(linear.users) != 1:
        return False
    flat = operand_of(linear)
    if not is_call(flat, *RESHAPES):
        return False
    x = operand_of(flat)
    shape, source = node.meta["val"].shape, x.meta["val"].shape
    wanted = (*source[:-1], linear.meta["val"].shape[-1])
    if len(shape) != len(wanted) or not _same_size(source[-1], flat.meta["val"].shape[-1]):
        return False
    if not all(map(_same_size, shape, wanted)):
        return False
    linear.args = (x, *linear.args[1:])
    linear.meta = dict(node.meta)
    node.replace_all_uses_with(linear)
    node.graph.erase_node(node)
    return True


def _same_size(size: int | torch.SymInt, other: int | torch.SymInt) -> bool:
    return statically_known_true(size == other)
