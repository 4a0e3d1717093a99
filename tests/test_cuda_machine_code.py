"""What the CUDA kernels compile to: instructions for a code, wide loads, and nothing in local memory."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch

from teq_graph.config import BITS
from teq_graph.kernels import plan
from teq_graph.kernels.plan import Dequantizer, Variant
from teq_graph.kernels.tilings import LANES, STEP, StreamTiling, TileTiling, WarpgroupTiling, ceil_div

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

from machine_code import disassembler, machine_code

pytestmark = pytest.mark.skipif(disassembler() is None, reason="cuobjdump is not installed")

HOPPER = "sm_90a"
MOST_FOR_A_CODE = {2: 2.2, 3: 2.6, 4: 2.2}
"""Instructions of the decode loop, all told, for a code: of two warps to a scheduler each of them is a delay."""


@pytest.mark.parametrize("bits", MOST_FOR_A_CODE)
def test_decode_loop(bits: int, tmp_path: Path) -> None:
    tiling = plan.STREAM_8
    assert isinstance(tiling, StreamTiling)
    code = machine_code(Variant(torch.float16, bits, tiling, True), HOPPER, tmp_path)
    loop = code.innermost("HMMA")
    codes = tiling.rows * STEP // LANES
    assert len(loop) / codes <= MOST_FOR_A_CODE[bits]
    assert loop.count("HMMA") == tiling.row_tiles * STEP // 16
    # A code is brought down and moved to its place by one instruction, and centered by another: two for each pair.
    assert loop.count("HFMA2") + loop.count("HADD2") < codes / 2 * 1.5
    copies = tiling.rows * STEP * bits // 8 // 16 // LANES
    assert loop.count("LDGSTS.E.BYPASS.128") == loop.count("LDGSTS") == copies
    # Vectors of activations for each product of 16, and of codes where a chunk is whole vectors.
    assert loop.count("LDS.128") == STEP // 32 + (2 * tiling.row_tiles if bits == 4 else 0)
    assert loop.count("LDG") == loop.count("STG") == loop.count("BAR") == 0


def test_decode_loop_of_bytes(tmp_path: Path) -> None:
    """Four quarters of a step, each with what reads the next group's scales, which runs once a group."""
    tiling = plan.BYTES[16]
    assert isinstance(tiling, TileTiling)
    code = machine_code(Variant(torch.float16, 8, tiling, True), HOPPER, tmp_path)
    quarter, step = code.innermost("HMMA"), code.innermost("HMMA", "LDGSTS")
    codes = tiling.row_tiles * 16 * STEP // LANES
    assert (len(step) + 3 * len(quarter)) / codes <= 6.3
    # A pair of bytes is moved to its place by one instruction and centered by another.
    assert quarter.count("HADD2") == codes / 4 / 2
    assert quarter.count("PRMT") <= codes / 4 / 2 + 8
    assert step.count("LDGSTS.E.BYPASS.128") == step.count("LDGSTS")
    assert code.count("LDL") == code.count("STL") == 0


@pytest.mark.parametrize("bits", BITS)
def test_loop_of_many_tokens(bits: int, tmp_path: Path) -> None:
    tiling = plan.TILE_64
    assert isinstance(tiling, TileTiling)
    code = machine_code(Variant(torch.float16, bits, tiling, False), HOPPER, tmp_path)
    loop = code.innermost("HMMA")
    products = tiling.row_tiles * tiling.tokens // 8 * 2
    assert loop.count("HMMA") == products  # of 32 columns
    assert loop.count("LDS.128") == tiling.tokens // 8


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("tiling", [plan.GROUPS_64, plan.WIDE_GROUPS_128], ids=str)
def test_loop_of_warpgroups(bits: int, tiling: WarpgroupTiling, tmp_path: Path) -> None:
    """A step of 128 columns: all products under way at once but for those whose registers the next weights take."""
    loop = machine_code(Variant(torch.float16, bits, tiling, False), HOPPER, tmp_path).innermost("HGMMA")
    assert loop.count(f"HGMMA.64x{tiling.tokens}x16.F32") == loop.count("HGMMA") == tiling.row_tiles * STEP // 16
    waits = [text for _, text in loop.instructions if text.startswith("WARPGROUP.DEPBAR")]
    assert waits == ["WARPGROUP.DEPBAR.LE gsb0, 0x1"] * 4
    assert loop.count("HMMA") == loop.count("STG") == loop.count("LDL") == 0
    assert loop.count("BAR") == loop.count("FENCE.VIEW.ASYNC") == 1
    pieces = ceil_div(tiling.rows * bits, tiling.threads) + tiling.tokens * 16 // tiling.threads
    assert loop.count("LDGSTS.E.BYPASS.128") == loop.count("LDGSTS") == pieces
    # While products are under way nothing else touches their sums.
    products = [text for _, text in loop.instructions if text.startswith("HGMMA")]
    firsts = {int(found[1]) for text in products if (found := re.match(r"HGMMA\S+ R(\d+),", text))}
    sums = {first + i for first in firsts for i in range(tiling.tokens // 2)}
    assert len(sums) == tiling.row_tiles * tiling.tokens // 2
    others = [text for _, text in loop.instructions if text not in products]
    assert not [text for text in others if sums & set(map(int, re.findall(r"\bR(\d+)\b", text)))]
    # Besides reading grids, which a step does once at most.
    assert len(loop) < 10 * tiling.row_tiles * 64 + 8 * pieces


@pytest.mark.slow
@pytest.mark.parametrize("dtype", plan.DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ["sm_80", HOPPER, "sm_120"])
def test_nothing_is_in_local_memory(dtype: torch.dtype, architecture: str, tmp_path: Path) -> None:
    tilings = (plan.STREAM_8, plan.TILE_16, plan.TILE_128)
    for kind in (*(Variant(dtype, 3, tiling, tiling.tokens <= 16) for tiling in tilings), Dequantizer(dtype, 3)):
        code = machine_code(kind, architecture, tmp_path)
        assert len(code) > 50
        assert code.count("LDL") == code.count("STL") == 0


@pytest.mark.parametrize("bits", BITS)
def test_dequantizing_reads_and_writes_wide(bits: int, tmp_path: Path) -> None:
    code = machine_code(Dequantizer(torch.bfloat16, bits), HOPPER, tmp_path)
    assert code.count("STG.E.128") == code.count("STG") == 4
