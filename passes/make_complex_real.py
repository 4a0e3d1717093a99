"""Write products of complex numbers in real ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import CallBuilder, aten, rank_of
from teq_graph.graph.op_sets import CASTS, COPIES, MOVES, UNCHANGED
from teq_graph.graph.tensors import drop_unused
from teq_graph.passes.base import GraphPass, PassResult

Pair = tuple[Node, Node]
"""Real and imaginary part, each of the complex value's own shape."""


class MakeComplexReal(GraphPass[None]):
    """z = view_as_complex(x [.., 2]), w = polar(r, a):   view_as_real(z · w)

    becomes   a, b = x[.., 0], x[.., 1];  c, d = r · cos a, r · sin a:   stack([a · c − b · d, a · d + b · c], -1)

    A complex value is two real ones of its shape: `view_as_complex`, `complex` and `polar` make them, `view_as_real`,
    `real` and `imag` read them. Between these are sums, products, quotients by real numbers and conjugates, and what
    only moves numbers, which moves both parts alike. A graph with another op on a complex value, or with complex
    inputs, constants or results, is left as it is.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        complex_nodes = [node for node in graph_module.graph.nodes if _is_complex(node)]
        readers = {user for node in complex_nodes for user in node.users}
        rewritten = [node for node in graph_module.graph.nodes if node in readers or node in {*complex_nodes}]
        if not complex_nodes or not all(_rule_of(node) is not None for node in rewritten):
            return PassResult(graph_module, False)
        pairs: dict[Node, Pair] = {}
        for node in rewritten:
            rule = _rule_of(node)
            assert rule is not None
            result = rule(CallBuilder(graph_module, node), node, pairs)
            if isinstance(result, Node):
                node.replace_all_uses_with(result)
            else:
                pairs[node] = result
        for node in reversed(rewritten):
            graph_module.graph.erase_node(node)
        drop_unused(graph_module)
        return PassResult(graph_module, True)


def _is_complex(node: object) -> bool:
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.is_complex()


Rule = Callable[[CallBuilder, Node, dict[Node, Pair]], "Pair | Node"]


def _parts(value: Any, pairs: dict[Node, Pair]) -> tuple[Any, Any]:
    """Both parts of an operand; None for the imaginary part of a real one."""
    return pairs.get(value, (value, None))


def _from_last_axis(build: CallBuilder, node: Node, _: dict[Node, Pair]) -> Pair:
    (x,) = node.args
    return build(aten.select.int, x, -1, 0), build(aten.select.int, x, -1, 1)


def _from_parts(_: CallBuilder, node: Node, __: dict[Node, Pair]) -> Pair:
    real, imaginary = node.args
    assert isinstance(real, Node) and isinstance(imaginary, Node)
    return real, imaginary


def _from_angle(build: CallBuilder, node: Node, _: dict[Node, Pair]) -> Pair:
    length, angle = node.args
    cos, sin = build(aten.cos.default, angle), build(aten.sin.default, angle)
    return build(aten.mul.Tensor, length, cos), build(aten.mul.Tensor, length, sin)


def _product(build: CallBuilder, node: Node, pairs: dict[Node, Pair]) -> Pair:
    (a, b), (c, d) = (_parts(value, pairs) for value in node.args)
    mul = aten.mul.Tensor
    if b is None or d is None:
        real, imaginary, factor = (c, d, a) if b is None else (a, b, c)
        return build(mul, real, factor), build(mul, imaginary, factor)
    return (
        build(aten.sub.Tensor, build(mul, a, c), build(mul, b, d)),
        build(aten.add.Tensor, build(mul, a, d), build(mul, b, c)),
    )


def _quotient(build: CallBuilder, node: Node, pairs: dict[Node, Pair]) -> Pair:
    (a, b), (c, _) = (_parts(value, pairs) for value in node.args)
    return build(aten.div.Tensor, a, c), build(aten.div.Tensor, b, c)


def _each_part(build: CallBuilder, node: Node, pairs: dict[Node, Pair]) -> Pair:
    def part_of(index: int) -> Node:
        arguments = torch.fx.node.map_arg(node.args, lambda x: pairs[x][index] if x in pairs else x)
        return build(node.target, *arguments)

    return part_of(0), part_of(1)


def _same(_: CallBuilder, node: Node, pairs: dict[Node, Pair]) -> Pair:
    source = node.args[0]
    assert isinstance(source, Node)
    return pairs[source]


def _conjugate(build: CallBuilder, node: Node, pairs: dict[Node, Pair]) -> Pair:
    real, imaginary = _same(build, node, pairs)
    return real, build(aten.neg.default, imaginary)


def _to_last_axis(build: CallBuilder, node: Node, pairs: dict[Node, Pair]) -> Node:
    real, imaginary = _same(build, node, pairs)
    dim = rank_of(real)
    return build(aten.cat.default, [build(aten.unsqueeze.default, part, dim) for part in (real, imaginary)], dim)


def _real(build: CallBuilder, node: Node, pairs: dict[Node, Pair]) -> Node:
    return _same(build, node, pairs)[0]


def _imaginary(build: CallBuilder, node: Node, pairs: dict[Node, Pair]) -> Node:
    return _same(build, node, pairs)[1]


_RULES: dict[Any, Rule] = {
    aten.view_as_complex.default: _from_last_axis,
    aten.complex.default: _from_parts,
    aten.polar.default: _from_angle,
    aten.mul.Tensor: _product,
    aten.div.Tensor: _quotient,
    aten.add.Tensor: _each_part,
    aten.sub.Tensor: _each_part,
    aten.neg.default: _each_part,
    aten.conj.default: _conjugate,
    aten._conj.default: _conjugate,
    aten.resolve_conj.default: _same,
    aten.view_as_real.default: _to_last_axis,
    aten.real.default: _real,
    aten.imag.default: _imaginary,
    aten.cat.default: _each_part,
    **dict.fromkeys((*MOVES, *COPIES), _each_part),
    **dict.fromkeys(CASTS, _same),
}


def _rule_of(node: Node) -> Rule | None:
    """How `node`, which gives or reads complex values, is written in real ones; None where it cannot."""
    rule = _RULES.get(node.target)
    if rule is None or node.op != "call_function" or not isinstance(node.meta["val"], Tensor):
        return None
    if node.kwargs and node.target not in UNCHANGED:
        return None
    operands: list[Any] = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in node.args]
    if any(isinstance(operand, complex) for operand in operands):
        return None
    if node.target in (aten.add.Tensor, aten.sub.Tensor) and not all(map(_is_complex, node.args)):
        return None  # a real operand changes the real part alone
    if rule is _from_parts and operands[0].shape != operands[1].shape:
        return None
    if rule is _quotient and _is_complex(node.args[1]):
        return None
    if node.target in CASTS and (operands[0].dtype, operands[0].device) != (
        node.meta["val"].dtype,
        node.meta["val"].device,
    ):
        return None
    return rule
