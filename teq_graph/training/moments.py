"""First and second moments of what a product reads, over all calibration batches."""

from __future__ import annotations

import torch
from torch import Tensor

from teq_graph.graph.products import Reading
from teq_graph.report import FEW_ROWS


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
            self.second = (read.mT @ read).add_(self.second.to(read.device))

    def rows(self) -> tuple[int, ...]:
        """How many each group had."""
        return tuple(map(int, self.counts.tolist()))

    def result(self) -> tuple[Tensor, Tensor]:
        """Second moments [groups, K, K] and means [groups, K], float32."""
        counts = self.counts
        if self.of_experts:
            total = counts.sum().clamp(min=1)
            # So many rows of all experts, as they are on average, beside an expert's own.
            self.second += FEW_ROWS / total * self.second.sum(0)
            self.first += FEW_ROWS / total * self.first.sum(0)
            counts = counts + FEW_ROWS
        return self.second.div_(counts[:, None, None]), self.first / counts[:, None]
