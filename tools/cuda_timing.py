"""Time on a GPU, for the benchmarks: CUDA graphs, and medians of what takes turns."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

WARM_UPS = 3


@dataclasses.dataclass(frozen=True)
class Captured:
    """A graph that makes each call once, with the calls: it reads and writes what only they may keep alive."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Callable[[], Any]]

    def replay(self) -> None:
        self.graph.replay()


def capture(calls: Sequence[Callable[[], Any]]) -> Captured:
    """The calls as a graph. Some are made before, so that nothing is compiled in it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in itertools.islice(itertools.cycle(calls), WARM_UPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return Captured(graph, calls)


def median_seconds(calls: Mapping[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, float]:
    """Of each call, made `repeats` times in a row in each of `rounds`, by CUDA events; one more round is left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            times[name].append(start.elapsed_time(end) / 1e3 / repeats)
    return {name: statistics.median(values[1:]) for name, values in times.items()}
