"""How exactly products are computed while scales are learned and codes are chosen: no more exactly than codes are."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from teq_graph.config import WeightSpec


@dataclasses.dataclass(frozen=True)
class Precision:
    """Of products on `device`: in bfloat16, or as the model has them."""

    device: str
    is_bfloat16: bool

    @classmethod
    def for_codes(cls, weights: Iterable[Tensor], specs: Iterable[WeightSpec]) -> Precision:
        """bfloat16 where the hardware has its products and 8 significant bits are more than the codes have."""
        weights = tuple(weights)
        device = weights[0].device.type if weights else "cpu"
        has = torch.cuda.is_bf16_supported() if device == "cuda" else torch.cpu._is_avx512_bf16_supported()
        coarse = bool(weights) and all(spec.bits <= 4 for spec in specs)
        return cls(device, has and coarse and all(weight.dtype == torch.float32 for weight in weights))

    def products(self) -> contextlib.AbstractContextManager[object]:
        """Products, and what they give, in bfloat16."""
        return torch.autocast(self.device, torch.bfloat16) if self.is_bfloat16 else contextlib.nullcontext()

    def inputs(self) -> contextlib.AbstractContextManager[object]:
        """Products that give float32, of inputs that are rounded to bfloat16."""
        return _rounded_inputs() if self.is_bfloat16 and self.device == "cpu" else contextlib.nullcontext()

    def weight_dtype(self, stored: torch.dtype) -> torch.dtype:
        """Of a weight that only `products` read, and that is stored in another dtype."""
        return torch.bfloat16 if self.is_bfloat16 else stored


@contextlib.contextmanager
def _rounded_inputs() -> Iterator[None]:
    settings: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # set by its module
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before
