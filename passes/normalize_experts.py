"""Write every product of rows with matrices that are chosen for them as `expert_linear`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import CallBuilder, arguments_of, aten, is_call, is_tensor_constant, operand_of, rank_of
from teq_graph.graph.products import EXPERT_LINEAR
from teq_graph.graph.tensors import drop_unused, node_tensor, replace_tensors
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.passes.fold_constants import Origin, Step

PRODUCTS = (aten.bmm.default, aten.matmul.default)


class NormalizeExperts(GraphPass[None]):
    """1. squeeze(matmul(W[E, N, K][e], unsqueeze(x, -1)), -1)   →  expert_linear(x, M, None, e, E)
    2. squeeze(matmul(unsqueeze(x, -2), W[E, K, N][e]), -2)      →  expert_linear(x, M, None, e, E)
    3. matmul(x[E, T, K], W[E, K, N])                            →  expert_linear(rows of x, M, None, 0…0 1…1 …, E)
    4. add(expert_linear(x, M, None, e, E), b[E, N][e])          →  expert_linear(x, M, flat(b), e, E)

    M [E * N, K] has the matrices' rows one after the other, under the name of W; e chooses the expert of each row of x,
    where both are brought into one line of rows. W and b are tensor constants; all that reads W is rewritten.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        for weight in [node for node in graph_module.graph.nodes if node.op == "get_attr" and rank_of(node) == 3]:
            modified |= _rewrite_products(graph_module, weight)
        if modified:
            for node in list(graph_module.graph.nodes):
                _absorb_bias(graph_module, node)
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


# ------------------------------------------------------------------------------------------------------------ products


@dataclasses.dataclass(frozen=True)
class _Product:
    """A product to rewrite. `end` gives its result, whatever leads there; `inputs` makes its rows [T, K] and their
    experts [T], `shaped` of a result [T, N] that of `end`."""

    end: Node
    is_transposed: bool
    inputs: Callable[[CallBuilder], tuple[Node, Node]]
    shaped: Callable[[CallBuilder, Node], Node]


def _rewrite_products(graph_module: GraphModule, weight: Node) -> bool:
    """All products with a stack of matrices, if each is one that is known and all read the matrices alike."""
    found: list[_Product] = []
    for reader in weight.users:
        is_choice = is_call(reader, aten.index.Tensor)
        products = _with_chosen(reader, weight) if is_choice else _with_all(reader, weight)
        if not products:
            return False
        found += products
    is_transposed = {product.is_transposed for product in found}
    if len(is_transposed) != 1 or not weight.meta["val"].is_floating_point():
        return False
    count = weight.meta["val"].shape[0]
    _stack(graph_module, weight, is_transposed.pop())
    for product in found:
        call = CallBuilder(graph_module, product.end)
        x, experts = product.inputs(call)
        result = product.shaped(call, call(EXPERT_LINEAR, x, weight, None, experts, count))
        product.end.replace_all_uses_with(result)
        graph_module.graph.erase_node(product.end)
    return True


def _with_chosen(chosen: Node, weight: Node) -> list[_Product]:
    """Cases 1 and 2, of the matrices that `chosen` takes; none where it does anything else, too."""
    experts = _index_of(chosen, weight)
    products = [_with_each(product, chosen, experts) for product in chosen.users if experts is not None]
    return [product for product in products if product is not None] if None not in products else []


def _with_each(product: Node, chosen: Node, experts: Node) -> _Product | None:
    if not is_call(product, *PRODUCTS) or len(product.users) != 1:
        return None
    (end,) = product.users
    is_transposed = product.args[1] is chosen
    x = operand_of(product, 0 if is_transposed else 1)
    # The dimension that a row was given, and that the result is without.
    single = -2 if is_transposed else -1
    if x is chosen or not _is_at(x, aten.unsqueeze.default, single) or not _is_at(end, aten.squeeze.dim, single):
        return None
    rows, rank = operand_of(x), rank_of(experts)
    if rank_of(rows) != rank + 1:
        return None

    def inputs(call: CallBuilder) -> tuple[Node, Node]:
        if rank == 1:
            return rows, experts
        sizes = [call(aten.sym_size.int, experts, dim) for dim in range(rank)]
        each = call(aten.expand.default, rows, [*sizes, -1])
        return call(aten.flatten.using_ints, each, 0, -2), _in_a_row(call, experts)

    def shaped(call: CallBuilder, result: Node) -> Node:
        if rank == 1:
            return result
        sizes = [call(aten.sym_size.int, experts, dim) for dim in range(rank)]
        return call(aten.reshape.default, result, [*sizes, result.meta["val"].shape[-1]])

    return _Product(end, is_transposed, inputs, shaped)


def _in_a_row(call: CallBuilder, experts: Node) -> Node:
    """Choices of several dimensions in one, by the same node for all products: so they are seen to be the same."""
    for user in experts.users:
        if is_call(user, aten.flatten.using_ints) and user.args[1:] == (0, -1):
            return user
    return CallBuilder(call.graph_module, experts.next)(aten.flatten.using_ints, experts, 0, -1)


def _index_of(chosen: Node, stack: Node) -> Node | None:
    """What chooses entries of `stack` along its first dimension alone."""
    indices: Sequence[Any] = arguments_of(chosen)["indices"]
    if operand_of(chosen) is not stack or len(indices) != 1 or not isinstance(indices[0], Node):
        return None
    value = indices[0].meta["val"]
    return indices[0] if value.dim() >= 1 and value.dtype == torch.int64 else None


def _is_at(node: Node, target: Any, dim: int) -> bool:
    """Whether `node` calls `target`, which adds or removes a dimension of size 1, for the dimension `dim` < 0."""
    rank = rank_of(node) + (target is aten.squeeze.dim)
    return is_call(node, target) and node.args[1] in (dim, dim + rank)


def _with_all(product: Node, weight: Node) -> list[_Product]:
    """Case 3."""
    if not is_call(product, *PRODUCTS) or product.args[1] is not weight or operand_of(product) is weight:
        return []
    x = operand_of(product)
    count, _, n = weight.meta["val"].shape
    if rank_of(x) != 3 or is_tensor_constant(x) or x.meta["val"].shape[0] != count:
        return []

    def inputs(call: CallBuilder) -> tuple[Node, Node]:
        rows = call(aten.sym_size.int, x, 1)
        ones = call(aten.new_ones.default, x, [count, rows])
        first = call(aten.cumsum.default, call(aten.to.dtype, ones, torch.int64), 0)
        experts = call(aten.sub.Tensor, first, 1)
        return call(aten.flatten.using_ints, x, 0, 1), call(aten.flatten.using_ints, experts, 0, 1)

    def shaped(call: CallBuilder, result: Node) -> Node:
        return call(aten.reshape.default, result, [count, -1, n])

    return [_Product(product, True, inputs, shaped)]


def _stack(graph_module: GraphModule, weight: Node, is_transposed: bool) -> None:
    tensor = node_tensor(weight)
    matrices = tensor.mT if is_transposed else tensor
    steps: list[Step] = [(aten.mT.default, (None,), {})] if is_transposed else []
    _flatten(graph_module, weight, matrices.reshape(-1, matrices.shape[-1]), steps)


def _flatten(graph_module: GraphModule, constant: Node, flat: Tensor, steps: Sequence[Step] = ()) -> None:
    """Let `constant` be `flat`, its own value in another shape after `steps`."""
    name = str(constant.target)
    origin = Origin.of(graph_module, name)
    reshape: Step = (aten.reshape.default, (None, list(flat.shape)), {})
    known = None if origin.steps is None else (*origin.steps, *steps, reshape)
    graph_module.meta.setdefault("origins", {})[name] = Origin(origin.sources, known)
    replace_tensors(graph_module, {name: flat})


# -------------------------------------------------------------------------------------------------------------- biases


def _absorb_bias(graph_module: GraphModule, node: Node) -> None:
    """Case 4."""
    if not is_call(node, aten.add.Tensor) or node.kwargs:
        return
    for linear, chosen in (node.args, reversed(node.args)):
        if not is_call(linear, EXPERT_LINEAR) or not is_call(chosen, aten.index.Tensor) or len(linear.users) != 1:
            continue
        values, biases = arguments_of(linear), operand_of(chosen)
        if not is_tensor_constant(biases) or {*biases.users} != {chosen} or {*chosen.users} != {node}:
            continue
        shape = (values["num_experts"], linear.meta["val"].shape[-1])
        if tuple(biases.meta["val"].shape) != shape or biases.meta["val"].dtype != linear.meta["val"].dtype:
            continue
        if values["bias"] is None and _index_of(chosen, biases) is values["experts"]:
            flat = node_tensor(biases).reshape(-1)
            node.replace_all_uses_with(linear)
            graph_module.graph.erase_node(node)
            graph_module.graph.erase_node(chosen)
            _flatten(graph_module, biases, flat)
            # The bias may be read only from here on.
            linear.prepend(biases)
            linear.args = (*linear.args[:2], biases, *linear.args[3:])
            return
