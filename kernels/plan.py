"""Which variant of the CUDA kernels serves which product, and how it is launched."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar

import torch

from teq_graph.config import BITS
from teq_graph.kernels.tilings import (
    CHUNK,
    STEP,
    AnyTiling,
    StreamTiling,
    TileTiling,
    Tiling,
    WarpgroupTiling,
    ceil_div,
)

SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory for a block that every GPU from sm_80 on has."""
HOPPER_SHARED_LIMIT = 227 * 1024
"""Those of a GPU that multiplies for warpgroups."""
DTYPES = {torch.float16: "Float16", torch.bfloat16: "BFloat16"}
"""Dtypes of activations, and what the sources call them."""
MOST_SCALED_SUMS = 16
"""Tokens up to which scales multiply sums, where groups allow it: more would need too many registers for two sets."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan has to know of a GPU: its multiprocessors, bytes of shared memory for a block, and whether tensor
    cores multiply for whole warpgroups, as those of compute capability 9.0 do."""

    processors: int
    shared_limit: int = SHARED_LIMIT
    warpgroups: bool = False


GENERAL = {
    2: Tiling(tokens=8, row_tiles=1, warps_n=1, warps_k=8),
    8: Tiling(tokens=8, row_tiles=2, warps_n=2, warps_k=4),
    16: Tiling(tokens=16, row_tiles=2, warps_n=4, warps_k=2),
    32: Tiling(tokens=32, row_tiles=2, warps_n=8, warps_k=1),
    64: Tiling(tokens=64, row_tiles=2, warps_n=8, warps_k=1),
}
"""What takes every shape, by the most tokens it is for. More tokens want more rows for what a block reads of A."""
STREAM_8 = StreamTiling(tokens=8, row_tiles=2, warps=8, stages=3, blocks=2)
STREAM_16 = StreamTiling(tokens=16, row_tiles=2, warps=8, stages=3, blocks=1)
TILE_8 = TileTiling(tokens=8, row_tiles=2, warps=4, stages=5, blocks=2)
TILE_16 = TileTiling(tokens=16, row_tiles=2, warps=4, stages=4, blocks=2)
TILE_32 = TileTiling(tokens=32, row_tiles=2, warps=4, stages=3, blocks=3)
TILE_64 = TileTiling(tokens=64, row_tiles=2, warps=4, stages=3, blocks=2)
TILE_128 = TileTiling(tokens=128, row_tiles=2, warps=4, stages=2, blocks=2)
WIDE_32 = TileTiling(tokens=32, row_tiles=2, warps=8, stages=3, blocks=1)
WIDE_128 = TileTiling(tokens=128, row_tiles=2, warps=8, stages=3, blocks=1)
GROUPS_32 = WarpgroupTiling(tokens=32, row_tiles=1, warpgroups=2, stages=4, blocks=2)
GROUPS_64 = WarpgroupTiling(tokens=64, row_tiles=1, warpgroups=2, stages=4, blocks=2)
WIDE_GROUPS_64 = WarpgroupTiling(tokens=64, row_tiles=1, warpgroups=4, stages=4, blocks=1)
WIDE_GROUPS_128 = WarpgroupTiling(tokens=128, row_tiles=1, warpgroups=4, stages=3, blocks=1)
FALLBACKS = (TILE_16, TILE_64)
"""For few and for many tokens, where the wanted tiling has no room."""

Table = dict[int, AnyTiling]
"""Tilings by the most tokens each is for, ascending; with more, weights are dequantized for torch's product."""

# Measured by tools/tune_matmul.py in float16, groups of 128, cold L2, of 28672 x 4096 at 2, 3, 4 and 8 bits and of
# 4096 x 4096 and 4096 x 14336 at 4. Between the numbers of tokens that were measured times are interpolated.
# With products of warpgroups, on an H200 (132 multiprocessors), 2026-11-28:
GROUPS: Table = {8: STREAM_8, 16: STREAM_16, 32: GROUPS_32, 64: GROUPS_64, 256: WIDE_GROUPS_128}
GROUPS_SMALL: Table = {8: STREAM_8, 16: STREAM_16, 32: GROUPS_32, 128: GROUPS_64}
GROUPS_BYTES: Table = {8: TILE_8, 16: TILE_16, 32: GROUPS_32, 64: WIDE_GROUPS_64, 256: WIDE_GROUPS_128}
# Without them, on an H100 80GB HBM3 (as many), 2026-11-27, up to 16 tokens as above. GPUs that have no such products
# take these, although none was measured.
LARGE: Table = {8: STREAM_8, 16: STREAM_16, 32: TILE_32, 64: TILE_64, 128: TILE_128, 192: TILE_64}
LONG: Table = {8: STREAM_8, 16: STREAM_16, 32: TILE_32, 64: TILE_64, 256: TILE_128}
SMALL: Table = {8: STREAM_8, 16: STREAM_16, 32: GENERAL[32], 64: GENERAL[64], 128: TILE_64}
BYTES: Table = {8: TILE_8, 16: TILE_16, 32: WIDE_32, 64: TILE_64, 128: WIDE_128, 192: TILE_64}


def table_of(n: int, k: int, bits: int, warpgroups: bool) -> Table:
    """The measured table for a weight [n, k]."""
    if bits == 8:
        return GROUPS_BYTES if warpgroups else BYTES
    if n * k <= 2**25:  # few blocks: what a block costs to begin and to end counts
        return GROUPS_SMALL if warpgroups else SMALL
    if warpgroups:
        return GROUPS
    return LONG if k > 2 * n else LARGE


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for."""

    dtype: torch.dtype
    bits: int
    tiling: AnyTiling
    scale_sums: bool

    file: ClassVar = "matmul_nbits.cu"
    kernels: ClassVar = ("matmul_nbits", "reduce_splits")

    def compiles_for(self, architecture: str) -> bool:
        """Whether GPUs of that kind have all its instructions: "sm_90a", say."""
        return not isinstance(self.tiling, WarpgroupTiling) or architecture == "sm_90a"

    @property
    def macros(self) -> dict[str, str]:
        """The macros of matmul_nbits.cu."""
        tiling = ", ".join(map(str, (self.bits, *dataclasses.astuple(self.tiling))))
        return {
            "VARIANT_TYPE": DTYPES[self.dtype],
            "VARIANT_BLOCK": self.tiling.block,
            "VARIANT_TILING": f"{self.tiling.struct}<{tiling}>",
            "VARIANT_SCALE_SUMS": str(self.scale_sums).lower(),
        }


@dataclasses.dataclass(frozen=True)
class Dequantizer:
    """What the kernel that writes weights as floats is compiled for."""

    dtype: torch.dtype
    bits: int

    file: ClassVar = "dequantize_nbits.cu"
    kernels: ClassVar = ("dequantize_nbits",)

    @property
    def macros(self) -> dict[str, str]:
        """The macros of dequantize_nbits.cu."""
        return {"VARIANT_TYPE": DTYPES[self.dtype], "VARIANT_BITS": str(self.bits)}


def tilings_of(bits: int) -> list[AnyTiling]:
    """Those that serve some product of codes of `bits` bits."""
    tables = (GROUPS_BYTES, BYTES) if bits == 8 else (GROUPS, GROUPS_SMALL, LARGE, LONG, SMALL)
    chosen = (tiling for table in tables for tiling in table.values())
    return list(dict.fromkeys([*GENERAL.values(), *FALLBACKS, *chosen]))


def variants() -> Iterator[Variant]:
    """All there are."""
    for dtype, bits in itertools.product(DTYPES, BITS):
        for tiling in tilings_of(bits):
            for scale_sums in (False, True) if tiling.tokens <= MOST_SCALED_SUMS else (False,):
                yield Variant(dtype, bits, tiling, scale_sums)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A launch: its variant, grid (blocks over N, M and K), bytes of shared memory, and sizes that the kernel takes."""

    variant: Variant
    grid: tuple[int, int, int]
    shared_bytes: int
    blocks: int
    log2_block: int
    chunks: int
    slice: int
    split: int
    ahead: int = 0

    @property
    def across(self) -> int:
        return self.grid[0]


def refusal(k: int, block_size: int) -> str | None:
    """Why the kernel cannot read weights of K = `k` in groups of `block_size`; None where it can."""
    power = block_size & (block_size - 1) == 0
    if block_size % CHUNK or not (power or block_size >= k):
        return f"block_size={block_size}: the kernel takes powers of two from {CHUNK}, or a whole row in {CHUNK}s"
    return None


@dataclasses.dataclass(frozen=True)
class Product:
    """A [m, k] of `dtype` times a weight [n, k] of codes of `bits` bits in groups of `block_size`."""

    dtype: torch.dtype
    m: int
    n: int
    k: int
    bits: int
    block_size: int

    @property
    def blocks(self) -> int:
        return ceil_div(self.k, self.block_size)

    @property
    def log2_block(self) -> int:
        return self.block_size.bit_length() - 1 if self.blocks > 1 else 30

    @property
    def chunks(self) -> int:
        """Stored chunks of a row."""
        return self.blocks * self.block_size // CHUNK

    @property
    def whole_steps(self) -> bool:
        """Whether a row begins where a vector can."""
        return self.chunks * CHUNK % STEP == 0

    @property
    def unit(self) -> int:
        """What parts of K are whole numbers of, so that each begins with a group."""
        return max(STEP, self.block_size) if self.blocks > 1 else STEP

    def variant(self, tiling: AnyTiling) -> Variant:
        uniform = self.blocks == 1 or self.block_size % STEP == 0
        return Variant(self.dtype, self.bits, tiling, uniform and tiling.tokens <= MOST_SCALED_SUMS)

    def plan(self, tiling: AnyTiling, grid: tuple[int, int, int], shared: int, split: int, **sizes: int) -> Plan:
        sizes = {"slice": split, **sizes}
        variant = self.variant(tiling)
        return Plan(variant, grid, shared, self.blocks, self.log2_block, self.chunks, split=split, **sizes)


def make_plan(dtype: torch.dtype, m: int, n: int, k: int, bits: int, block_size: int, device: Device) -> Plan | None:
    """For A [m, k] of `dtype` and B [n, k]; None where B had better be dequantized for torch's product."""
    tiling = next((tiling for most, tiling in table_of(n, k, bits, device.warpgroups).items() if m <= most), None)
    return None if tiling is None else fit(Product(dtype, m, n, k, bits, block_size), tiling, device)


def fit(product: Product, wanted: AnyTiling, device: Device) -> Plan:
    """A plan by the tiling that is wanted, or by the nearest that the product and the device have room for."""
    few, many = FALLBACKS
    for tiling in (wanted, few if wanted.tokens <= few.tokens else many):
        if (plan := plan_by(product, tiling, device)) is not None:
            return plan
    return general_plan(product, next((t for most, t in GENERAL.items() if product.m <= most), GENERAL[64]), device)


def plan_by(product: Product, tiling: AnyTiling, device: Device) -> Plan | None:
    """A plan by that tiling; None where it does not take the product, or the device has no room."""
    if isinstance(tiling, Tiling):
        return general_plan(product, tiling, device)
    if not product.whole_steps:
        return None
    if isinstance(tiling, WarpgroupTiling) and not device.warpgroups:
        return None
    if isinstance(tiling, TileTiling | WarpgroupTiling):
        return tile_plan(product, tiling, device)
    return stream_plan(product, tiling, device) if product.bits != 8 else None


def stream_plan(product: Product, tiling: StreamTiling, device: Device) -> Plan | None:
    """None where a block has no room, or warps nothing to do."""
    m, n, k, unit = product.m, product.n, product.k, product.unit
    for splits in range(1, 17):
        split = ceil_div(ceil_div(k, unit), splits) * unit
        least = k - (splits - 1) * split
        if ceil_div(k, split) != splits or ceil_div(least, STEP) < tiling.warps:
            continue
        ahead = tiling.ahead(least)
        shared = tiling.shared_bytes(product.bits, product.blocks, min(m, tiling.tokens), split, ahead)
        if shared > device.shared_limit:
            continue
        across = max(1, _room(tiling, shared, device) * device.processors // splits)
        grid = (min(ceil_div(n, tiling.rows), across), ceil_div(m, tiling.tokens), splits)
        return product.plan(tiling, grid, shared, split, ahead=ahead)
    return None


def tile_plan(product: Product, tiling: TileTiling | WarpgroupTiling, device: Device) -> Plan | None:
    """K is split so that there are as many blocks as have room at once; None where not even one has."""
    m, n, k, unit = product.m, product.n, product.k, product.unit
    shared = tiling.shared_bytes(product.bits)
    if shared > device.shared_limit:
        return None
    across = ceil_div(n, tiling.rows) * ceil_div(m, tiling.tokens)
    room = _room(tiling, shared, device)
    splits = max(1, min(room * device.processors // across, ceil_div(k, STEP) // (2 * tiling.stages)))
    split = ceil_div(ceil_div(k, unit), splits) * unit
    grid = (ceil_div(n, tiling.rows), ceil_div(m, tiling.tokens), ceil_div(k, split))
    return product.plan(tiling, grid, shared, split)


def _room(tiling: StreamTiling | TileTiling | WarpgroupTiling, shared: int, device: Device) -> int:
    """Blocks with so much shared memory on a multiprocessor at once; each takes 1 KiB for itself."""
    return min(tiling.blocks, (device.shared_limit + 1024) // (shared + 1024))


def general_plan(product: Product, tiling: Tiling, device: Device) -> Plan:
    """By the kernel that takes every shape."""
    m, n, k, block_size = product.m, product.n, product.k, product.block_size
    across = ceil_div(n, tiling.rows) * ceil_div(m, tiling.tokens)
    # Few blocks leave processors idle: K is split over several, as long as each still has some rounds to do. Each
    # begins with a group, so that a slice of it has no more groups than its length says.
    splits = max(1, min(device.processors // across, ceil_div(k, tiling.round) // 4))
    unit = max(tiling.round, block_size) if product.blocks > 1 else tiling.round
    split = ceil_div(ceil_div(k, unit), splits) * unit
    slice_, shared = _longest_slice(tiling, product.bits, min(tiling.tokens, m), split, 1 << product.log2_block)
    grid = (ceil_div(n, tiling.rows), ceil_div(m, tiling.tokens), ceil_div(k, split))
    return product.plan(tiling, grid, shared, split, slice=slice_)


def _longest_slice(tiling: Tiling, bits: int, tokens: int, split: int, group: int) -> tuple[int, int]:
    """Elements of K whose activations and grids are in shared memory at once, and the bytes of a block with them.

    Activations and grids may take 24 KiB, or 40 where tokens are many; the least slice is a round of the warps.
    """
    budget = 24 * 1024 if tokens <= MOST_SCALED_SUMS else 40 * 1024
    slice_, staged = tiling.round, tiling.staged_bytes(tokens, tiling.round, ceil_div(tiling.round, group))
    while slice_ < split:
        longer = tiling.staged_bytes(tokens, slice_ * 2, ceil_div(slice_ * 2, group))
        if longer > budget or tiling.shared_bytes(bits, longer) > SHARED_LIMIT:
            break
        slice_, staged = slice_ * 2, longer
    return slice_, tiling.shared_bytes(bits, staged)
