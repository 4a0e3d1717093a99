"""What bounds a product, from its machine code."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from teq_graph.kernels import plan
from teq_graph.kernels.plan import Product
from teq_graph.kernels.tilings import AnyTiling

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import model_matmul
from machine_code import disassembler, machine_code

WIDE = plan.WIDE_GROUPS_128


def bounds(m: int, tiling: AnyTiling, instructions: int = 1000) -> model_matmul.Bounds:
    product = Product(torch.float16, m, 132 * 256, 4096, 4, 128)
    made = plan.plan_by(product, tiling, model_matmul.H100)
    assert made is not None
    return model_matmul.bounds_of(made, product, instructions)


def test_bounds_of_one_tile_for_each_multiprocessor() -> None:
    made = bounds(128, WIDE)
    assert made.tensor == pytest.approx(256 * 128 * 4096 / 2048 / 1755)
    assert made.issue == pytest.approx(4096 / 128 * 1000 * 16 / 4 / 1755)
    weights = 132 * 256 * (4096 / 2 + 32 * 2.5)
    results = 2 * 128 * 132 * 256
    assert made.memory == pytest.approx((weights + 2 * 128 * 4096 + results) / 2770e3)
    assert made.cache == pytest.approx((weights + 132 * 2 * 128 * 4096) / 5500e3)
    assert made.least == max(made.memory, made.cache, made.issue, made.tensor)


def test_more_tokens_read_weights_again_and_take_turns() -> None:
    few, many = bounds(128, WIDE), bounds(512, WIDE)
    assert [many.tensor, many.issue, many.memory, many.cache] == pytest.approx(
        [4 * bound for bound in (few.tensor, few.issue, few.memory, few.cache)]
    )


@pytest.mark.skipif(disassembler() is None, reason="cuobjdump is not installed")
@pytest.mark.parametrize(("tiling", "loops"), [(plan.STREAM_8, 1), (plan.TILE_16, 4), (plan.GROUPS_32, 1)], ids=str)
def test_instructions_of_a_step(tiling: AnyTiling, loops: int, tmp_path: Path) -> None:
    """An inner loop over quarters of a step counts four times."""
    made = plan.plan_by(Product(torch.float16, 8, 4096, 4096, 4, 128), tiling, model_matmul.H100)
    assert made is not None
    code = machine_code(made.variant, model_matmul.ARCHITECTURE, tmp_path)
    product = "HGMMA" if tiling is plan.GROUPS_32 else "HMMA"
    step, inner = code.innermost(product, "LDGSTS"), code.innermost(product)
    assert (len(inner) < len(step)) == (loops > 1)
    assert model_matmul.instructions_of_step(code, made) == len(step) + (loops - 1) * len(inner)
