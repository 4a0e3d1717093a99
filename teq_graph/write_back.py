"""Put transformed tensors back into the parameters of the model they were captured from."""

from __future__ import annotations

import collections

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from teq_graph.analysis.equivalences.equivalence import Equivalence
from teq_graph.graph.nodes import aten
from teq_graph.graph.op_sets import CASTS, RESHAPES
from teq_graph.graph.tensors import get_tensor
from teq_graph.passes.fold_constants import Origin, Step

SELF_INVERSE = (aten.t.default, aten.numpy_T.default, aten.mT.default, aten.transpose.int)


def can_write_back(graph_module: GraphModule, equivalence: Equivalence, model: nn.Module) -> bool:
    """Whether every tensor of the equivalence is a parameter of `model`, or an invertible function of one.

    The parameter must be in no other constant of the graph: that would change with it.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    read = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    uses = collections.Counter(source for name in read for source in Origin.of(graph_module, name).sources)
    for scaled in (*equivalence.divided, *equivalence.multiplied):
        source, *others = Origin.of(graph_module, scaled.name).sources
        if others or source not in parameters or uses[source] > 1:
            return False
        if _unfolded(graph_module, scaled.name, parameters[source]) is None:
            return False
    return True


def write_back(graph_module: GraphModule, equivalences: tuple[Equivalence, ...], model: nn.Module) -> None:
    """Copy the graph's present tensors of `equivalences` into the parameters of `model`."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {scaled.name for e in equivalences for scaled in (*e.divided, *e.multiplied)}
    for name in sorted(names):
        (source,) = Origin.of(graph_module, name).sources
        value = _unfolded(graph_module, name, parameters[source])
        assert value is not None
        with torch.no_grad():
            parameters[source].copy_(value)


def write_back_all(graph_module: GraphModule, model: nn.Module) -> None:
    """Copy every float tensor of the graph that has changed since it was captured into the parameters of `model`.

    Constants that several tensors went into are left out: their value does not tell what each would be.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    names = {str(node.target) for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name in sorted(names):
        origin = Origin.of(graph_module, name)
        if len(origin.sources) != 1 or origin.sources[0] not in parameters:
            continue
        parameter = parameters[origin.sources[0]]
        value = _unfolded(graph_module, name, parameter)
        if value is None or torch.equal(_folded(origin, parameter.detach()), get_tensor(graph_module, name)):
            continue
        with torch.no_grad():
            parameter.copy_(value)


def _folded(origin: Origin, source: Tensor) -> Tensor:
    """What the graph's constant is for this value of its one source."""
    value = source
    for step in origin.steps or ():
        value = _applied(step, value)
    return value


def _applied(step: Step, value: Tensor) -> Tensor:
    target, args, kwargs = step
    place = args.index(None)
    result: Tensor = target(*args[:place], value, *args[place + 1 :], **kwargs)
    return result


def _unfolded(graph_module: GraphModule, name: str, source: Tensor) -> Tensor | None:
    """The value of its source, which is as large as `source`, that gives the graph's tensor `name`; None where it
    cannot be told."""
    steps = Origin.of(graph_module, name).steps
    before = source.detach().to("meta")
    shapes = []
    for step in steps or ():
        shapes.append(before.shape)
        try:
            before = _applied(step, before)
        except (RuntimeError, TypeError):  # another tensor takes part, which is on a device
            return None
    value: Tensor | None = get_tensor(graph_module, name)
    for step, shape in zip(reversed(steps or ()), reversed(shapes), strict=True):
        value = None if value is None else _inverse(step, value, shape)
    return None if steps is None else value


def _inverse(step: Step, value: Tensor, shape: torch.Size) -> Tensor | None:
    """Undo one op of a folded constant, which was applied to a tensor of `shape`; None where that is not possible."""
    target, args, kwargs = step
    result: Tensor
    if target in SELF_INVERSE:
        result = target(value, *args[1:], **kwargs)
        return result
    if target in CASTS:
        return value
    if target in RESHAPES and value.numel() == shape.numel():
        result = value.reshape(shape)
        return result
    others = [arg for arg in args if arg is not None]
    if target == aten.add.Tensor and len(others) == 1 and not kwargs:
        result = value - others[0]
        return result
    if target == aten.mul.Tensor and len(others) == 1 and others[0] != 0:
        result = value / others[0]
        return result
    return None
