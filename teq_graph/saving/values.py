"""What each node of a graph gives: its shape and type, found by running the graph on tensors without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils import _pytree as pytree

from teq_graph.graph.nodes import placeholder_nodes
from teq_graph.graph.tensors import node_tensor
from teq_graph.graph.tracing import without_dispatch_cache
from teq_graph.saving.targets import OF_NUMBERS

Sizes = Sequence[int | str] | None
"""Of a tensor's dimensions: a number, or a text where it may vary; equal texts are equal sizes."""


def declared_sizes(node: Node, varying: dict[str, str]) -> list[int | str] | None:
    """The sizes of the tensor that an input is declared to be; None where it is no tensor. `varying` collects the names
    given to sizes that may vary, by how torch expresses them."""
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return None
    expressions = [size if isinstance(size, int) else str(size.node.expr) for size in value.shape]
    return [size if isinstance(size, int) else varying.setdefault(size, f"s{len(varying)}") for size in expressions]


def give_values(graph_module: GraphModule, examples: Sequence[Any], sizes: Sequence[Sizes]) -> None:
    """Set `meta["val"]` of every node, for inputs like `examples`, of which `sizes` says what varies.

    Raises ValueError where an example is not of the size declared, and whatever ops raise on arguments that they cannot
    take.
    """
    with torch.no_grad(), without_dispatch_cache():
        # As torch.export makes it: passes call ops on these values and weights. It asks for the cache when it is made.
        mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
        inputs = [_without_data(mode, *pair) for pair in zip(examples, sizes, strict=True)]
        _tie_sizes(inputs, sizes)
        values: dict[Node, Any] = dict(zip(placeholder_nodes(graph_module), inputs, strict=True))
        with mode, enable_python_dispatcher():
            for node in graph_module.graph.nodes:
                if node.op == "get_attr":
                    node.meta["val"] = node_tensor(node)
                    values[node] = mode.from_tensor(node.meta["val"], static_shapes=True)
                elif node.op == "call_function":
                    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                    node.meta["val"] = values[node] = _call(node.target, args, kwargs)
                elif node.op == "placeholder":
                    node.meta["val"] = values[node]


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    counts = target in OF_NUMBERS
    if counts and not all(isinstance(arg, _NUMBERS) for arg in pytree.tree_leaves((args, kwargs))):
        raise ValueError(f"{target.__name__} is called with something that is no number")
    result = target(*args, **kwargs)
    if counts and isinstance(result, int) and not -(2**63) <= result < 2**63:
        raise ValueError(f"{target.__name__} gives more than a size can be")
    return result


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def _without_data(mode: FakeTensorMode, example: Any, sizes: Sizes) -> Any:
    if not isinstance(example, Tensor) or sizes is None:
        if isinstance(example, Tensor) or sizes is not None:
            raise ValueError(f"an input is {type(example).__name__}, and declared to be something else")
        return example
    fixed = [isinstance(size, int) for size in sizes]
    if len(sizes) != example.dim() or any(
        known and size != given for known, size, given in zip(fixed, sizes, example.shape, strict=True)
    ):
        raise ValueError(f"an input of the sizes {list(example.shape)} is declared to be {list(sizes)}")
    kinds = [DimDynamic.STATIC if known else DimDynamic.DYNAMIC for known in fixed]
    return mode.from_tensor(example, symbolic_context=StatelessSymbolicContext(dynamic_sizes=kinds))


def _tie_sizes(inputs: Sequence[Any], sizes: Sequence[Sizes]) -> None:
    """Let sizes of one name be one symbol."""
    first: dict[str, Any] = {}
    for value, names in zip(inputs, sizes, strict=True):
        for size, name in zip(value.shape if names else (), names or (), strict=True):
            if isinstance(name, str) and first.setdefault(name, size) != size:
                raise ValueError(f"sizes that are declared equal are not: {name}")
