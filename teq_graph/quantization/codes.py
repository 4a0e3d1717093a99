"""Which codes a grid has: the one place that knows."""

from __future__ import annotations

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Codes:
    """The codes `first`, `first + step`, … `last`."""

    first: int
    last: int
    step: int = 1

    @classmethod
    def of(cls, bits: int, levels: int | None = None) -> Codes:
        """All codes of `bits`; with `levels`, of the codes of 2 bits those around the zero point 2, which stand for
        -1, 0, 1 (three) and -1, 1 (two)."""
        if levels is None:
            return cls(0, 2**bits - 1)
        return cls(1, 3, step=4 - levels)

    def round(self, steps: Tensor, zero: Tensor) -> Tensor:
        """Numbers in units of the scale, in place, as codes of this spacing, also beyond the ends."""
        if self.step == 1:
            return steps.round_().add_(zero)
        return steps.add_(zero - self.first).div_(self.step).round_().mul_(self.step).add_(self.first)

    def nearest(self, steps: Tensor, zero: Tensor) -> Tensor:
        """Numbers in units of the scale, in place, as their nearest codes."""
        return self.round(steps, zero).clamp_(self.first, self.last)
