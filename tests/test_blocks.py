"""The repeating blocks of a graph, found from the graph."""

from __future__ import annotations

import pytest
import torch
from support.architectures import ARCHITECTURES, Architecture
from support.graphs import capture_small, find
from torch import Tensor, nn
from torch.nn import functional

from teq_graph.analysis.blocks import Block, find_blocks
from teq_graph.capture import CapturedGraph
from teq_graph.compile import analyze

WIDTH = 16


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


def blocks_of(model: nn.Module, *shape: int) -> tuple[CapturedGraph, tuple[Block, ...]]:
    captured = capture_small(model, torch.randn(shape or (2, 5, WIDTH)))
    return captured, find_blocks(captured, find(captured).equivalences)


def check_partition(captured: CapturedGraph, blocks: tuple[Block, ...]) -> None:
    """Every computing node is in one block, in graph order, and blocks read only what earlier ones give out."""
    calls = [node for node in captured.graph_module.graph.nodes if node.op == "call_function"]
    assert [node for block in blocks for node in block.nodes] == calls
    assert all(block.outputs for block in blocks)
    assert all(set(block.outputs) <= set(block.nodes) for block in blocks)


def test_layers_are_blocks() -> None:
    captured, blocks = blocks_of(nn.Sequential(*(Layer() for _ in range(4)), nn.Linear(WIDTH, 8)))
    check_partition(captured, blocks)
    layers = [(f"{index}.up.weight", f"{index}.down.weight") for index in range(4)]
    assert [block.linears for block in blocks] == [*layers, ("4.weight",)]
    assert all(len(block.outputs) == 1 for block in blocks)


def test_a_stem_and_a_head_are_blocks_of_their_own() -> None:
    stem, head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
    captured, blocks = blocks_of(nn.Sequential(stem, nn.Tanh(), *(Layer() for _ in range(3)), nn.Tanh(), head))
    check_partition(captured, blocks)
    assert [len(block.linears) for block in blocks] == [1, 2, 2, 2, 1]


def test_an_equivalence_joins_neighbours() -> None:
    """Without a norm in between, one layer's output scales into the next one's columns."""
    model = nn.Sequential(*(part for _ in range(3) for part in (nn.Linear(WIDTH, WIDTH), nn.ReLU())))
    captured, blocks = blocks_of(model)
    check_partition(captured, blocks)
    equivalences = find(captured).equivalences
    assert len(equivalences) == 2
    together = [any({e.producer, *e.linears} <= set(block.linears) for block in blocks) for e in equivalences]
    assert any(together)


def test_one_linear_is_one_block() -> None:
    captured, blocks = blocks_of(nn.Linear(WIDTH, 8))
    check_partition(captured, blocks)
    assert [block.linears for block in blocks] == [("weight",)]


def test_no_linear_at_all() -> None:
    captured, blocks = blocks_of(nn.LayerNorm(WIDTH))
    check_partition(captured, blocks)
    assert [block.linears for block in blocks] == [()]


DECODERS = [a for a in ARCHITECTURES if a.name in ("Llama (GQA)", "GPT-2", "Falcon (MQA)", "T5", "ViT")]


@pytest.mark.parametrize("architecture", DECODERS, ids=str)
def test_layers_of_real_architectures(architecture: Architecture) -> None:
    analysis = analyze(architecture.build())
    blocks = find_blocks(analysis.captured, analysis.findings.equivalences)
    check_partition(analysis.captured, blocks)
    sizes = [len(block.linears) for block in blocks]
    assert sum(sizes) == architecture.linears
    # two layers (T5: two in the encoder, two in the decoder), and what is around them
    repeated = [size for size in sizes if size > 1]
    assert len(repeated) >= 2 and len(set(repeated)) <= 2
    inside = sum(any({*e.linears} <= set(block.linears) for block in blocks) for e in analysis.findings.equivalences)
    assert inside >= 0.8 * len(analysis.findings.equivalences)
