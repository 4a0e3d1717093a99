"""What a compilation will take, told before it has taken it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

from torch import Tensor

from teq_graph.capture import CapturedGraph
from teq_graph.config import TrainingConfig, WeightSpec
from teq_graph.graph.tensors import get_tensor, tensor_bytes
from teq_graph.quantization import QuantizedWeight
from teq_graph.system import memory
from teq_graph.training import FirstBlock
from teq_graph.weight_plan import WeightPlan, specs_of

DISTILLED = 0.7
"""Seconds of a step of the whole model, of those that all blocks take for each step that tunes them, with all they do
besides: 0.8 was measured with the steps of `default`, 0.6 with those of `best`."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """`bytes_before` and `bytes_after` of the graph's tensors; seconds of the whole compilation, and the peak memory of
    this process in bytes, as the first block tells them: None until it is done. `without_distillation`: the seconds
    lack it, as no block is tuned whose steps would tell. `notes` say what the result will not do."""

    bytes_before: int
    bytes_after: int
    seconds: float | None = None
    peak_bytes: int | None = None
    without_distillation: bool = False
    notes: tuple[str, ...] = ()


class Estimator:
    """Tells `listener` what is known so far of a compilation that began at `started` (`time.monotonic`)."""

    def __init__(
        self,
        captured: CapturedGraph,
        plan: WeightPlan,
        bytes_before: int,
        started: float,
        listener: Callable[[Estimate], None] | None,
        training: TrainingConfig | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self._started = started
        self._listener = listener
        specs = specs_of(plan)
        self._codes = sum(_stored_bytes(get_tensor(captured.graph_module, name), spec) for name, spec in specs.items())
        after = tensor_bytes(captured.graph_module, without=specs) + self._codes
        stages = training.stages_for(specs.values()) if training is not None else ()
        self._distilled = 0.0
        if training is not None and training.steps and {"tune", "distill"} <= set(stages):
            self._distilled = DISTILLED * training.steps_of_distillation / training.steps
        unknown = "distill" in stages and not self._distilled
        self._size = Estimate(bytes_before, after, without_distillation=unknown, notes=notes)

    def tell_size(self) -> None:
        """Of the size, which is known from the start."""
        if self._listener is not None:
            self._listener(self._size)

    def after_first_block(self, block: FirstBlock) -> None:
        """Of time and memory as well: each block takes time by its share of the weights."""
        if self._listener is None or block.share <= 0:
            return
        elapsed = time.monotonic() - self._started
        of_blocks = block.seconds / block.share
        seconds = elapsed + of_blocks - block.seconds + of_blocks * self._distilled
        # What grows from block to block are the codes that were chosen.
        peak = memory.peak_bytes() + round(self._codes * (1 - block.share))
        self._listener(dataclasses.replace(self._size, seconds=seconds, peak_bytes=peak))


def _stored_bytes(weight: Tensor, spec: WeightSpec) -> int:
    n, k = weight.shape
    return QuantizedWeight.bytes_for(n, k, spec, weight.dtype)
