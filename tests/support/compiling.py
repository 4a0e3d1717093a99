"""Small models, compiled; and what every refusal has in common."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import teq_graph
from support.architectures import BY_NAME, VOCAB
from support.graphs import randomize
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.errors import TeqGraphError

LLAMA = BY_NAME["Llama (GQA)"]
DYNAMIC = torch.export.Dim.DYNAMIC
TRAINING = TrainingConfig(stages=("teq", "clip", "gptq", "tune"), steps=2, samples=4, length=12, batch_size=2)
SMALL = QuantizationConfig(bits=4, group_size=16)


def mlp() -> nn.Module:
    return randomize(nn.Sequential(nn.Linear(20, 48), nn.ReLU(), nn.Linear(48, 36), nn.Tanh(), nn.Linear(36, 8)))


def compile_mlp(model: nn.Module | None = None, **options: Any) -> teq_graph.CompiledModel:
    options = {"quantization": SMALL, "training": TRAINING, **options}
    return teq_graph.compile(model or mlp(), (torch.randn(5, 20),), ({0: DYNAMIC},), **options)


def compile_llama(model: nn.Module | None = None, **options: Any) -> teq_graph.CompiledModel:
    options = {"quantization": SMALL, "training": None, **options}
    return teq_graph.compile(model or LLAMA.build(), **options)


def tokens(batch: int = 2, length: int = 9) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def in_one_line(caught: pytest.ExceptionInfo[Any]) -> str:
    message = str(caught.value)
    assert isinstance(caught.value, TeqGraphError) and message and "\n" not in message
    return message


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(20, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, gate: Tensor, scale: float = 1.0) -> dict[str, Tensor]:
        hidden = self.first(x) * gate.sigmoid()
        return {"out": self.second(hidden) * scale, "hidden": hidden.relu().sum(-1)}


def compile_with_kwargs(quantization: QuantizationConfig = SMALL) -> teq_graph.CompiledModel:
    example = {"x": torch.randn(4, 20), "gate": torch.randn(4, 32), "scale": 0.5}
    shapes = {"x": {0: DYNAMIC}, "gate": {0: DYNAMIC}, "scale": None}
    model = randomize(TwoInputs())
    return teq_graph.compile(model, example, shapes, quantization=quantization, training=TRAINING)
