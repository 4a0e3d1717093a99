"""Sizes of tensors that are symbols in a graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def symbol(size: Any) -> Any:
    """The symbol that a dynamic size consists of; None for a number or an expression."""
    expression = size.node.expr if isinstance(size, torch.SymInt) else None
    return expression if expression is not None and expression.is_Symbol else None


def fixed(size: Any, sizes: Mapping[Any, int]) -> int | None:
    """The number that a size is, given those of symbols; None while one of its symbols is not known."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    value = size.node.expr.subs(sizes)
    return int(value) if value.is_number else None
