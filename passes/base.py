"""What every pass is: a change of a graph, and what it has to say of it."""

from __future__ import annotations

import abc
from typing import Any, Generic, TypeVar

from torch.fx import GraphModule
from torch.fx.passes.infra import pass_base

import teq_graph.ops  # noqa: F401  registers the operators, which passes name

T = TypeVar("T")


class PassResult(pass_base.PassResult, Generic[T]):
    """(graph_module, modified), as torch has it, and `value`: what later steps must know of the change."""

    value: T

    def __new__(cls, graph_module: GraphModule, modified: bool, value: Any = None) -> PassResult[T]:
        result: PassResult[T] = super().__new__(cls, graph_module, modified)  # type: ignore[assignment]
        result.value = value
        return result


class GraphPass(pass_base.PassBase, Generic[T]):
    """Changes a graph in place and returns what it did; keeps nothing on itself.

    `modified` says truthfully whether anything changed. `T` is the type of `PassResult.value`, None for most.
    """

    @abc.abstractmethod
    def call(self, graph_module: GraphModule) -> PassResult[T]:
        """Change `graph_module`."""

    def __call__(self, graph_module: GraphModule) -> PassResult[T]:
        result: PassResult[T] = super().__call__(graph_module)  # type: ignore[assignment]
        return result
