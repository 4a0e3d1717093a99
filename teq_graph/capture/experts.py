"""How Hugging Face models compute their experts, while they are captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn

TRACEABLE = "batched_mm"
"""Of transformers' ways to compute experts the one that is a product with chosen matrices: no loop over the experts
that tokens chose, and no rows sorted by them."""


@contextlib.contextmanager
def traceable_experts(model: nn.Module) -> Iterator[None]:
    """While a Hugging Face model's experts are products that the analysis reads; other modules stay as they are."""
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in found if hasattr(config, "_experts_implementation")}
    before = {key: config._experts_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._experts_implementation = TRACEABLE
        yield
    finally:
        # A config's own parts follow it, and come after it.
        for key, config in configs.items():
            config._experts_implementation = before[key]
