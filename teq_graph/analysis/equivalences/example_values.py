"""What every node of a graph computes on example inputs, at two sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Interpreter

from teq_graph.capture import CapturedGraph
from teq_graph.graph.nodes import placeholder_nodes
from teq_graph.graph.sizes import fixed, symbol


class ExampleValues(Interpreter):
    """Runs the graph once on example inputs and keeps every value: shapes, indices and sizes for the rules."""

    def __init__(self, captured: CapturedGraph, inputs: Sequence[Any] | None = None) -> None:
        super().__init__(captured.graph_module, garbage_collect_values=False)
        if inputs is None:
            inputs = torch.utils._pytree.tree_leaves((captured.example_args, captured.example_kwargs))
        with torch.no_grad():
            self.run(*inputs, enable_io_processing=False)

    @classmethod
    def at_two_sizes(cls, captured: CapturedGraph) -> list[ExampleValues]:
        """The example, and inputs of which every dynamic dimension has another size, where there is one.

        A rule that runs an op at one size cannot tell `x[..., :4]` from `x[..., :length]`. Empty where the graph
        has dynamic dimensions and runs at none of the other sizes: nothing is proven about them then.
        """
        values = [cls(captured)]
        for resize in RESIZES:
            inputs = _resized_inputs(captured, resize)
            if inputs is None:
                return values
            try:
                return [*values, cls(captured, inputs)]
            except (RuntimeError, IndexError, ValueError):  # a size that the model has no positions for, say
                continue
        return []

    def of(self, value: Any) -> Any:
        """`value` with every node replaced by what it computed."""
        return torch.fx.node.map_arg(value, self.env.__getitem__)


Resize = Callable[[int], int]
# Doubling keeps what is a sum or a multiple of other sizes.
RESIZES: tuple[Resize, ...] = (lambda n: n + 1, lambda n: max(2, n - 1), lambda n: 2 * n)


def _resized_inputs(captured: CapturedGraph, resize: Resize) -> list[Any] | None:
    """The example inputs, repeated or cut to other sizes where they are dynamic; None where they are not."""
    leaves = torch.utils._pytree.tree_leaves((captured.example_args, captured.example_kwargs))
    placeholders = placeholder_nodes(captured.graph_module)
    tensors = [
        (leaf, p.meta["val"].shape) for leaf, p in zip(leaves, placeholders, strict=True) if isinstance(leaf, Tensor)
    ]
    sizes = {
        symbol(size): resize(old)
        for leaf, declared in tensors
        for old, size in zip(leaf.shape, declared, strict=True)
        if symbol(size) is not None
    }
    if all(isinstance(size, int) for _, declared in tensors for size in declared):
        return None
    resized = iter([_resized(leaf, declared, sizes, resize) for leaf, declared in tensors])
    return [next(resized) if isinstance(leaf, Tensor) else leaf for leaf in leaves]


def _resized(leaf: Tensor, declared: Sequence[Any], sizes: Mapping[Any, int], resize: Resize) -> Tensor:
    for dim, size in enumerate(declared):
        if not isinstance(size, int):
            wanted = fixed(size, sizes)
            indices = torch.arange(resize(leaf.shape[dim]) if wanted is None else wanted, device=leaf.device)
            leaf = leaf.index_select(dim, indices % leaf.shape[dim])
    return leaf
