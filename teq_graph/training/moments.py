"""First and second moments of what a product reads, over all calibration batches."""

from __future__ import annotations

import torch
from torch import Tensor

from teq_graph.graph.products import Reading
from teq_graph.report import FEW_ROWS

PANELS = 4
"""Of columns. Second moments are symmetric: in panels from the diagonal down they are five eighths of the work."""


class Moments:
    """Sums over the rows of a reading, of each group of the weight's rows by itself."""

    def __init__(self) -> None:
        self.of_experts = False
        self.counts = self.first = self.second = torch.zeros(())

    def add(self, reading: Reading, value: Tensor, experts: Tensor | None = None) -> None:
        """Add the rows of `value`, one of the values that `reading` is of."""
        self.of_experts = experts is not None
        for part in reading.parts(value):
            read = reading.rows(part, experts).float()
            if experts is None:
                counts = torch.full((len(read),), float(read.shape[1]), device=read.device)
            else:
                counts = torch.bincount(experts, minlength=reading.groups).float()
            self.counts = counts + self.counts.to(counts.device)
            self.first = read.sum(1).add_(self.first.to(read.device))
            if not self.second.dim():
                self.second = read.new_zeros(len(read), read.shape[2], read.shape[2])
            self.second = self.second.to(read.device)
            for panel, below in _panels(read.shape[2]):
                self.second[:, below, panel] += read[..., below].mT @ read[..., panel]

    def rows(self) -> tuple[int, ...]:
        """How many each group had."""
        return tuple(map(int, self.counts.tolist()))

    def result(self) -> tuple[Tensor, Tensor]:
        """Second moments [groups, K, K] and means [groups, K], float32."""
        counts = self.counts
        for panel, below in _panels(self.second.shape[-1]):
            self.second[:, panel, below] = self.second[:, below, panel].mT.clone()
        if self.of_experts:
            total = counts.sum().clamp(min=1)
            # So many rows of all experts, as they are on average, beside an expert's own.
            self.second += FEW_ROWS / total * self.second.sum(0)
            self.first += FEW_ROWS / total * self.first.sum(0)
            counts = counts + FEW_ROWS
        return self.second.div_(counts[:, None, None]), self.first / counts[:, None]


def _panels(k: int) -> list[tuple[slice, slice]]:
    """Runs of columns of a matrix [k, k], and the rows from their first diagonal element downwards."""
    width = -(-k // PANELS)
    return [(slice(first, first + width), slice(first, k)) for first in range(0, k, width)]
