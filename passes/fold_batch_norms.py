"""Write batch norms, in evaluation a factor and a shift per channel, into the convolutions before them."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import (
    CallBuilder,
    arguments_of,
    aten,
    dtype_of,
    is_call,
    is_tensor_constant,
    operand_of,
    rank_of,
)
from teq_graph.graph.products import CONVOLUTIONS, PADDED_CONVOLUTIONS
from teq_graph.graph.tensors import add_tensor, drop_unused, node_tensor, set_tensor
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.passes.fold_constants import Origin

BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)
"""What torch.export gives; the second, of which the first of three results is read, where the model works in place."""
PARAMETERS = ("weight", "bias", "running_mean", "running_var")


class FoldBatchNorms(GraphPass[None]):
    """With f = weight / sqrt(var + eps) and d = bias - mean * f, of a batch norm in evaluation,

    1. batch_norm(conv(x, W, b))   becomes   conv(x, W', b')     with W' = f W row by row, and b' = f b + d
    2. batch_norm(x)               becomes   add(mul(x, f), d)   where no convolution's result is read by it alone

    Constants are computed in float64 and rounded once.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        for node in list(graph_module.graph.nodes):
            if is_call(node, *BATCH_NORMS) and _is_constant(node):
                _rewrite(graph_module, node)
                modified = True
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _is_constant(norm: Node) -> bool:
    values = arguments_of(norm)
    given = [values[name] for name in PARAMETERS if values[name] is not None]
    has_statistics = values["running_mean"] is not None and values["running_var"] is not None
    in_evaluation = not values.get("training")
    return in_evaluation and has_statistics and all(map(is_tensor_constant, given)) and _result(norm) is not None


def _result(norm: Node) -> Node | None:
    """The node of the normalised value; None where statistics are read, too."""
    if is_call(norm, aten.batch_norm.default):
        return norm
    read = [user for user in norm.users if user.users]
    return read[0] if len(read) == 1 and is_call(read[0], operator.getitem) and read[0].args[1] == 0 else None


def _rewrite(graph_module: GraphModule, norm: Node) -> None:
    values = arguments_of(norm)
    sources = [values[name] for name in PARAMETERS if values[name] is not None]
    factor, shift = _affine(values)
    # What is made takes the name of what it is made of, of the first that is there.
    factor_name, shift_name = values["weight"] or values["running_var"], values["bias"] or values["running_mean"]
    source = operand_of(norm)
    if _is_foldable(source):
        _, weight, bias = (arguments_of(source)[name] for name in ("input", "weight", "bias"))
        if bias is not None:
            shift += factor * node_tensor(bias).double()
        rows = node_tensor(weight).double() * factor.reshape(-1, *[1] * (rank_of(weight) - 1))
        dtype = dtype_of(weight)
        bias = _store(source, bias or shift_name, shift.to(dtype), [*([bias] if bias else []), *sources])
        weight = _store(source, weight, rows.to(dtype), [weight, *sources])
        source.args = (source.args[0], weight, bias, *source.args[3:])
        source.kwargs = {name: value for name, value in source.kwargs.items() if name not in ("weight", "bias")}
        result = source
    else:
        shape = (-1, *[1] * (rank_of(source) - 2))
        f, d = (tensor.reshape(shape).to(dtype_of(source)) for tensor in (factor, shift))
        call = CallBuilder(graph_module, norm)
        if factor_name is shift_name:
            shift_name = values["running_mean"]
        scaled = call(aten.mul.Tensor, source, _store(norm, factor_name, f, sources))
        result = call(aten.add.Tensor, scaled, _store(norm, shift_name, d, sources))
    normalized = _result(norm)
    assert normalized is not None
    normalized.replace_all_uses_with(result)


def _affine(values: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """The factor and the shift of each channel, float64 [C]."""
    weight, bias, mean, variance = (
        torch.tensor(default, dtype=torch.float64) if values[name] is None else node_tensor(values[name]).double()
        for name, default in zip(PARAMETERS, (1.0, 0.0, 0.0, 1.0), strict=True)
    )
    factor = weight * (variance + values["eps"]).rsqrt()
    return factor, bias - mean * factor


def _is_foldable(source: Node) -> bool:
    """Whether nothing else reads this convolution, and its weight and bias are constants."""
    if not is_call(source, *CONVOLUTIONS, *PADDED_CONVOLUTIONS) or len(source.users) != 1:
        return False
    values = arguments_of(source)
    return is_tensor_constant(values["weight"]) and (values["bias"] is None or is_tensor_constant(values["bias"]))


def _store(before: Node, old: Node, tensor: Tensor, sources: Sequence[Node]) -> Node:
    """A node that gives `tensor`, made of `sources`: in the place of `old`, or beside it where it has other readers."""
    graph_module = before.graph.owning_module
    assert graph_module is not None and isinstance(old.target, str)
    names = dict.fromkeys(name for source in sources for name in Origin.of(graph_module, str(source.target)).sources)
    name = old.target
    if len(old.users) > 1:
        name = add_tensor(graph_module, name, tensor)
    else:
        set_tensor(graph_module, name, tensor)
    graph_module.meta.setdefault("origins", {})[name] = Origin(tuple(names), None)
    with before.graph.inserting_before(before):
        node = before.graph.create_node("get_attr", name)
    node.meta["val"] = tensor
    return node
