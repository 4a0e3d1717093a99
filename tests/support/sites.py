"""One small network per case of the analysis, examined: what is found must be exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from support.graphs import apply_random_scales, capture_small, find, relative_error, run
from teq_graph.analysis.equivalences.equivalence import Equivalence, Refusal
from teq_graph.analysis.equivalences.find import Findings
from teq_graph.capture import CapturedGraph

WIDTH = 16
Forward = Callable[..., Any]


class Net(nn.Module):
    """Layers by name and a forward function over them; every linear is `[WIDTH, WIDTH]` where nothing is said."""

    def __init__(self, forward: Forward, bias: bool = True, **layers: nn.Module | nn.Parameter | int) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, nn.Linear(WIDTH, layer, bias) if isinstance(layer, int) else layer)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def examine(model: nn.Module, *shape: int, dynamic: bool = True) -> tuple[CapturedGraph, Findings]:
    """Analyse `model`; whatever is found must leave its output as it is, at other sizes too."""
    captured = capture_small(model, torch.randn(shape or (2, 5, WIDTH)), dynamic=dynamic)
    findings = find(captured)
    sizes = [size + 2 if dynamic and index < len(shape or (1, 1, 1)) - 1 else size for index, size in enumerate(shape)]
    inputs = (torch.randn(sizes or (3, 7, WIDTH)),)
    expected = run(captured.graph_module, inputs)
    apply_random_scales(captured.graph_module, findings.equivalences)
    assert relative_error(run(captured.graph_module, inputs), expected) <= 1e-5
    return captured, findings


def sites(findings: Findings) -> dict[str, tuple[str, ...]]:
    return {e.producer: e.linears for e in findings.equivalences}


def refusal(findings: Findings, producer: str) -> Refusal:
    (found,) = [r for r in findings.refusals if r.producer == producer]
    return found


def equivalence(findings: Findings, producer: str) -> Equivalence:
    (found,) = [e for e in findings.equivalences if e.producer == producer]
    return found
