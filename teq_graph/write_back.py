"""Put transformed tensors back into the parameters of the model they were captured from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from teq_graph import graph as fx
from teq_graph.analysis.equivalence import Equivalence
from teq_graph.graph import aten
from teq_graph.passes.fold_constants import Origin

SELF_INVERSE = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int)
CASTS = (aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout)


def can_write_back(graph_module: GraphModule, equivalence: Equivalence, model: nn.Module) -> bool:
    """Whether every tensor of the equivalence is a parameter of `model`, or an invertible function of one."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = [str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"]
    sources = [_origin(graph_module, name).source for name in read]
    for scaled in (*equivalence.divided, *equivalence.multiplied):
        origin = _origin(graph_module, scaled.name)
        # A parameter that the graph reads in two forms cannot hold one of them scaled.
        if origin.source not in parameters or sources.count(origin.source) > 1:
            return False
        if any(_inverse(step, torch.zeros(1, 1)) is None for step in origin.expression):
            return False
    return True


def write_back(graph_module: GraphModule, equivalences: tuple[Equivalence, ...], model: nn.Module) -> None:
    """Copy the graph's present tensors of `equivalences` into the parameters of `model`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {scaled.name for e in equivalences for scaled in (*e.divided, *e.multiplied)}
    for name in sorted(names):
        origin = _origin(graph_module, name)
        value = fx.get_tensor(graph_module, name)
        for step in reversed(origin.expression):
            inverted = _inverse(step, value)
            assert inverted is not None
            value = inverted
        with torch.no_grad():
            parameters[origin.source].copy_(value)


def _origin(graph_module: GraphModule, name: str) -> Origin:
    origin: Origin = graph_module.meta.get("origins", {}).get(name, Origin(name, ()))
    return origin


def _inverse(step: tuple[Any, tuple[Any, ...], dict[str, Any]], value: Tensor) -> Tensor | None:
    """Undo one op of a folded constant; its own operand stands as None among the arguments."""
    target, args, kwargs = step
    result: Tensor
    if target in SELF_INVERSE:
        result = target(value, *args[1:], **kwargs)
        return result
    if target in CASTS:
        return value
    others = [arg for arg in args if arg is not None]
    if target == aten.add.Tensor and len(others) == 1 and not kwargs:
        result = value - others[0]
        return result
    if target == aten.mul.Tensor and len(others) == 1 and others[0] != 0:
        result = value / others[0]
        return result
    return None
