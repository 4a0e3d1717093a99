"""Values that are kept between stretches of a graph."""

from __future__ import annotations

import torch
from torch.fx import Graph

from teq_graph.graph.execution import Values, shared


def test_equal_tensors_are_kept_once() -> None:
    names = ("mask", "table", "hidden", "longer", "narrow", "size", "new")
    mask, table, hidden, longer, narrow, size, new = (Graph().placeholder(name) for name in names)
    first: Values = {mask: torch.rand(3, 3) > 0.5, table: torch.randn(4), hidden: torch.randn(2, 4)}
    first |= {longer: torch.ones(2), narrow: torch.ones(2), size: 3}
    second = {node: value.clone() if isinstance(value, torch.Tensor) else value for node, value in first.items()}
    changes = {hidden: first[hidden] + 1e-6, longer: torch.ones(3), narrow: torch.ones(2).half(), new: torch.randn(1)}
    kept = shared({**second, **changes}, first)
    assert all(kept[node] is first[node] for node in (mask, table, size))
    assert all(kept[node] is value for node, value in changes.items())
