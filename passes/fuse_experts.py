"""Let one op do a mixture of experts: both products, the activation between them, and the weighted sum."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.graph.execution import Values, run
from teq_graph.graph.nodes import CallBuilder, arguments_of, aten, is_call, operand_of, rank_of
from teq_graph.graph.op_sets import CASTS, COPIES, RESHAPES
from teq_graph.graph.tensors import add_tensor, drop_unused, get_attr_node, node_tensor
from teq_graph.ops.expert_mixture import ACTIVATIONS, GATED, activate
from teq_graph.passes.base import GraphPass, PassResult

PRODUCT = torch.ops.teq_graph.expert_matmul_nbits.default
MIXTURE = torch.ops.teq_graph.expert_mixture_nbits.default
SAME_ORDER = (*RESHAPES, *CASTS, *COPIES, aten.flatten.using_ints, aten.unsqueeze.default, aten.squeeze.dim)
"""The same numbers, one after the other."""
EXACT_BITS = (4,)
"""Of experts that onnxruntime's kernel computes in float32 if asked to; others in int8 always."""
PROBES, SPREAD, TOLERANCE = 64, 6.0, 1e-5
"""Rows on which activations are compared, their standard deviation, and the largest difference over the largest value.
Limits of activations are within that spread."""


class FuseExperts(GraphPass[None]):
    """sum(weights * expert_matmul_nbits(f(expert_matmul_nbits(each row of x k times, …)), …), over k)

    becomes   expert_mixture_nbits(x, chosen, weights, …)

    where `chosen` are the indices of a top-k, and f is compared by its values with the activations that the op knows:
    rows of the first weights are brought into the order that it wants. Both weights have one size of blocks, which
    divides their rows. `exact`: only such bits as onnxruntime multiplies in float.
    """

    def __init__(self, exact: bool) -> None:
        self.exact = exact

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        for node in list(graph_module.graph.nodes):
            if is_call(node, PRODUCT) and (mixture := _mixture_of(node, EXACT_BITS if self.exact else (2, 4, 8))):
                _fuse(graph_module, mixture)
                modified = True
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


@dataclasses.dataclass(frozen=True)
class Activation:
    """An activation that the op knows, and the order of the first product's channels that it wants."""

    name: str
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None
    order: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Mixture:
    """A mixture of experts that ends in the node `end`."""

    first: Node
    second: Node
    end: Node
    x: Node
    chosen: Node
    weights: Node
    activation: Activation


# ------------------------------------------------------------------------------------------------------------ matching


def _mixture_of(second: Node, bits: Sequence[int]) -> Mixture | None:
    """The mixture whose last product is `second`."""
    between, first = _between(second)
    if first is None or not _fits(first, second, bits):
        return None
    end, count, weights = _weighted_sum(second)
    chosen, weights = (_by_token(node, count) for node in (arguments_of(second)["experts"], weights))
    if end is None or chosen is None or weights is None or not _is_top(chosen):
        return None
    x = _repeated(operand_of(first), count)
    if x is None or rank_of(x) != 2:
        return None
    activation = _activation(between, first, operand_of(second))
    return None if activation is None else Mixture(first, second, end, x, chosen, weights, activation)


def _between(second: Node) -> tuple[list[Node], Node | None]:
    """The nodes between the two products, in order, and the first of these; None where something else is read or reads
    what is between."""
    found, pending, first = set[Node](), [operand_of(second)], None
    while pending:
        node = pending.pop()
        if is_call(node, PRODUCT):
            if first not in (None, node):
                return [], None
            first = node
        elif node.op == "call_function" and node not in found:
            found.add(node)
            pending += node.all_input_nodes
        elif node not in found and node.op != "get_attr":
            return [], None
    inside = {*found, second}
    if first is None or any(user not in inside for node in (*found, first) for user in node.users):
        return [], None
    return [node for node in second.graph.nodes if node in found], first


def _fits(first: Node, second: Node, bits: Sequence[int]) -> bool:
    one, two = arguments_of(first), arguments_of(second)
    block = one["block_size"]
    return (
        one["experts"] is two["experts"]
        and one["bits"] in bits
        and two["bits"] in bits
        and block == two["block_size"]
        and block >= 16
        and block & (block - 1) == 0
        and one["K"] % block == two["K"] % block == 0
    )


def _by_token(node: Node | None, count: int) -> Node | None:
    """`node`, or what it is another shape of, as [T, count]."""
    while node is not None and (rank_of(node) != 2 or node.meta["val"].shape[1] != count):
        node = operand_of(node) if is_call(node, *SAME_ORDER) else None
    return node


def _is_top(chosen: Node) -> bool:
    """Whether the rows of `chosen` are the indices of the largest of something: they are different ones."""
    while is_call(chosen, *CASTS, *COPIES):
        chosen = operand_of(chosen)
    source = chosen.args[0] if chosen.args else None
    if not is_call(source, aten.topk.default) or chosen.args[1] != 1:
        return False
    values = arguments_of(source)
    return values["dim"] in (-1, 1) and rank_of(values["self"]) == 2


def _weighted_sum(product: Node) -> tuple[Node | None, int, Node | None]:
    """The node that sums what `product` gives for a token, how many rows, and their weights; None where it is no such
    sum."""
    node, weights = product, None
    while len(node.users) == 1:
        (user,) = node.users
        if is_call(user, aten.mul.Tensor) and weights is None:
            weights = operand_of(user, 1 if user.args[0] is node else 0)
            # One weight for each row.
            if weights is node or rank_of(weights) != rank_of(node) or weights.meta["val"].shape[-1] != 1:
                break
        elif is_call(user, aten.sum.dim_IntList):
            values = arguments_of(user)
            is_sum = rank_of(node) == 3 and list(values["dim"] or ()) in ([1], [-2]) and not values["keepdim"]
            return (user, node.meta["val"].shape[1], weights) if is_sum else (None, 0, None)
        elif not is_call(user, *SAME_ORDER):
            break
        node = user
    return None, 0, None


def _repeated(rows: Node, count: int) -> Node | None:
    """What has each of its rows so many times in `rows`, one after the other."""
    while is_call(rows, *SAME_ORDER) and rank_of(operand_of(rows)) == 2:
        rows = operand_of(rows)
    if is_call(rows, aten.repeat_interleave.self_int):
        values = arguments_of(rows)
        return values["self"] if values["repeats"] == count and values["dim"] in (0, -2) else None
    each = operand_of(rows) if is_call(rows, *SAME_ORDER) else rows
    if is_call(each, aten.expand.default) and rank_of(each) == 3 and each.meta["val"].shape[1] == count:
        single = operand_of(each)
        if is_call(single, aten.unsqueeze.default) and single.args[1] in (1, -2):
            return operand_of(single)
    return None


# ---------------------------------------------------------------------------------------------------------- activation


def _activation(nodes: Sequence[Node], first: Node, end: Node) -> Activation | None:
    """Which of the op's activations gives what `nodes` make of the result of `first`."""
    n, inner = (node.meta["val"].shape[-1] for node in (first, end))
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(PROBES, n, generator=generator, device="cpu").mul_(SPREAD).to(first.meta["val"].device)
    env: Values = {first: rows}
    try:
        with torch.no_grad():
            run(nodes, env)
    except (RuntimeError, IndexError, KeyError, ValueError):  # sizes that are not those of these rows
        return None
    wanted = env[end]
    if wanted.shape != (PROBES, inner):
        return None
    scale = wanted.abs().max()
    for candidate in _candidates(nodes, n, inner):
        x = rows if candidate.order is None else rows[:, candidate.order]
        given = activate(x, candidate.name, candidate.alpha, candidate.beta, candidate.limit)
        if bool((given - wanted).abs().max() <= TOLERANCE * scale):
            return candidate
    return None


def _candidates(nodes: Sequence[Node], n: int, inner: int) -> Iterator[Activation]:
    if n == inner:
        yield from map(Activation, ACTIVATIONS)
    if n != 2 * inner:
        return
    numbers = {
        abs(float(arg))
        for node in nodes
        for arg in (*node.args, *node.kwargs.values())
        if isinstance(arg, int | float) and not isinstance(arg, bool)
    }
    numbers = {number for number in numbers if number and number < SPREAD * 10}
    halves = torch.arange(n).view(2, inner)
    pairs = torch.arange(n).view(inner, 2).t()
    for gates, others in (halves, halves.flip(0), pairs, pairs.flip(0)):
        order = torch.stack([gates, others], 1).flatten()
        for alpha, beta, limit in itertools.product({1.0, *numbers}, {0.0, *numbers}, [None, *numbers]):
            yield Activation(GATED, alpha, beta, limit, order)


# ----------------------------------------------------------------------------------------------------------- rewriting


def _fuse(graph_module: GraphModule, mixture: Mixture) -> None:
    one, two = arguments_of(mixture.first), arguments_of(mixture.second)
    count, order = one["num_experts"], mixture.activation.order
    parts = []
    for name in ("b", "scales", "zero_points", "bias"):
        node = one[name]
        if node is not None and order is not None:
            tensor = node_tensor(node).unflatten(0, (count, -1))
            ordered = tensor[:, order.to(tensor.device)].flatten(0, 1)
            node = get_attr_node(graph_module, add_tensor(graph_module, f"{node.target}_ordered", ordered))
        parts.append(node)
    activation = mixture.activation
    call = CallBuilder(graph_module, mixture.end)
    result = call(
        MIXTURE,
        mixture.x,
        mixture.chosen,
        mixture.weights,
        *parts,
        *(two[name] for name in ("b", "scales", "zero_points", "bias")),
        *(one["K"], one["N"], two["K"], two["N"], one["bits"], two["bits"], one["block_size"], count),
        *(activation.name, activation.alpha, activation.beta, activation.limit),
    )
    mixture.end.replace_all_uses_with(result)
    graph_module.graph.erase_node(mixture.end)
