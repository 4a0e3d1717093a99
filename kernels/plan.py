"""How a product is cut up into blocks of threads: the variants of the CUDA kernels, and which serves which shapes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import ClassVar

import torch

from teq_graph.config import BITS

LANES = 32
STEP = 128
"""Elements of K that a warp does at a time."""
CHUNK = 32
"""Consecutive codes of a row that a lane takes: rows are whole chunks."""
SHARED_LIMIT = 99 * 1024
"""Bytes of shared memory for a block that every GPU from sm_80 on has."""
DTYPES = {torch.float16: "Float16", torch.bfloat16: "BFloat16"}
"""Dtypes of activations, and what the sources call them."""


@dataclasses.dataclass(frozen=True)
class Device:
    """What a plan has to know of a GPU: its multiprocessors, and bytes of shared memory for a block."""

    processors: int
    shared_limit: int = SHARED_LIMIT


@dataclasses.dataclass(frozen=True)
class Tiling:
    """A block does `tokens` rows of A; `warps_n` warps have `row_tiles` tiles of 16 rows of B each, and of each of
    them there are `warps_k` that take turns over K. Takes every shape. The formulas are those of matmul_nbits.cuh."""

    tokens: int
    row_tiles: int
    warps_n: int
    warps_k: int

    struct: ClassVar = "Tiling"
    block: ClassVar = "matmul_block"

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.warps_n

    @property
    def warps(self) -> int:
        return self.warps_n * self.warps_k

    @property
    def threads(self) -> int:
        return LANES * self.warps

    @property
    def round(self) -> int:
        """Elements of K that all the warps do together."""
        return STEP * self.warps_k

    def staged_bytes(self, tokens: int, slice_: int, groups: int) -> int:
        """Shared memory for the activations and grids of a slice of K."""
        return tokens * (slice_ * 2 + 64) + groups * self.rows * 4

    def ring_bytes(self, bits: int) -> int:
        """Shared memory for the copies of B under way."""
        step = self.row_tiles * 16 * STEP * bits // 8
        return max(2, 4096 // step) * step * self.warps

    @property
    def sums_bytes(self) -> int:
        """Shared memory for the sums of the warps."""
        return self.warps_k * self.tokens * (self.rows + 1) * 4

    def shared_bytes(self, bits: int, staged: int) -> int:
        """Shared memory of a block: copies of B under way beside what is staged; at last the sums in their place."""
        return max(self.ring_bytes(bits) + staged, self.sums_bytes)


@dataclasses.dataclass(frozen=True)
class StreamTiling:
    """Blocks that stay and walk through tiles of 16 * `row_tiles` rows of B; `warps` take turns over K, each with
    `stages` steps under way. Takes rows of whole steps. The formulas are those of stream.cuh."""

    tokens: int
    row_tiles: int
    warps: int
    stages: int

    struct: ClassVar = "StreamTiling"
    block: ClassVar = "stream_block"

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles

    @property
    def threads(self) -> int:
        return LANES * self.warps

    @property
    def round(self) -> int:
        return STEP * self.warps

    def ring_bytes(self, bits: int) -> int:
        return self.stages * self.rows * STEP * bits // 8 * self.warps

    @property
    def sums_bytes(self) -> int:
        return 2 * self.warps * self.tokens * (self.rows + 1) * 4

    def grid_bytes(self, bits: int, blocks: int) -> int:
        """Of the scales and zero points of a tile of rows, as if there were zero points."""
        return _vectors(self.rows * blocks * 2) + _vectors(self.rows * _ceil(blocks * bits, 8))

    def ahead(self, split: int) -> int:
        """Tiles whose grids are under way: a warp waits for all but its last copies, and a tile has few."""
        return _ceil(self.stages + 1, _ceil(split, STEP) // self.warps)

    def shared_bytes(self, bits: int, blocks: int, tokens: int, split: int, ahead: int) -> int:
        grids = (ahead + 1) * self.grid_bytes(bits, blocks)
        return self.ring_bytes(bits) + self.sums_bytes + grids + tokens * (split * 2 + 64)


@dataclasses.dataclass(frozen=True)
class TileTiling:
    """`warps` side by side, each with `row_tiles` tiles of 16 rows of B and all `tokens`; `stages` steps of weights and
    activations in shared memory; registers for `blocks` on a multiprocessor. Takes rows of whole steps. The formulas
    are those of tiles.cuh."""

    tokens: int
    row_tiles: int
    warps: int
    stages: int
    blocks: int

    struct: ClassVar = "TileTiling"
    block: ClassVar = "tile_block"

    @property
    def rows(self) -> int:
        return 16 * self.row_tiles * self.warps

    @property
    def threads(self) -> int:
        return LANES * self.warps

    def shared_bytes(self, bits: int) -> int:
        return self.stages * (self.rows * STEP * bits // 8 + self.tokens * STEP * 2)


AnyTiling = Tiling | StreamTiling | TileTiling

DECODE = Tiling(tokens=8, row_tiles=1, warps_n=1, warps_k=8)
# The more tokens, the more rows a block has to do for what it reads of A.
TILINGS = {
    2: DECODE,
    8: Tiling(tokens=8, row_tiles=2, warps_n=2, warps_k=4),
    16: Tiling(tokens=16, row_tiles=2, warps_n=4, warps_k=2),
    32: Tiling(tokens=32, row_tiles=2, warps_n=8, warps_k=1),
    64: Tiling(tokens=64, row_tiles=2, warps_n=8, warps_k=1),
}
"""The most tokens a tiling is for; more than the last are several of its blocks."""
STREAMS = (
    StreamTiling(8, 1, 8, 8),
    StreamTiling(8, 1, 16, 4),
    StreamTiling(8, 1, 16, 6),
    StreamTiling(8, 2, 8, 4),
    StreamTiling(16, 1, 8, 8),
    StreamTiling(16, 1, 16, 4),
    StreamTiling(16, 2, 8, 4),
    StreamTiling(32, 1, 8, 4),
    StreamTiling(32, 2, 8, 2),
)
TILES = (
    TileTiling(16, 1, 4, 6, 2),
    TileTiling(16, 1, 8, 5, 2),
    TileTiling(16, 2, 4, 4, 2),
    TileTiling(32, 2, 4, 3, 3),
    TileTiling(32, 2, 8, 3, 1),
    TileTiling(32, 1, 8, 4, 2),
    TileTiling(64, 2, 4, 3, 2),
    TileTiling(64, 1, 8, 3, 2),
    TileTiling(64, 2, 8, 3, 1),
    TileTiling(64, 2, 8, 4, 1),
    TileTiling(128, 2, 4, 2, 1),
    TileTiling(128, 1, 8, 3, 1),
    TileTiling(128, 2, 8, 3, 1),
    TileTiling(128, 2, 8, 4, 1),
)
MOST_SCALED_SUMS = 16
"""Tokens up to which scales multiply sums, where groups allow it: more would need too many registers for two sets."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for."""

    dtype: torch.dtype
    bits: int
    tiling: AnyTiling
    scale_sums: bool

    file: ClassVar = "matmul_nbits.cu"
    kernels: ClassVar = ("matmul_nbits", "reduce_splits")

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


def variants() -> Iterator[Variant]:
    """All there are."""
    for dtype, bits, tiling in itertools.product(DTYPES, BITS, (*TILINGS.values(), *STREAMS, *TILES)):
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
        return _ceil(self.k, self.block_size)

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

    def variant(self, tiling: AnyTiling) -> Variant:
        uniform = self.blocks == 1 or self.block_size % STEP == 0
        return Variant(self.dtype, self.bits, tiling, uniform and tiling.tokens <= MOST_SCALED_SUMS)

    def plan(self, tiling: AnyTiling, grid: tuple[int, int, int], shared: int, split: int, **sizes: int) -> Plan:
        sizes = {"slice": split, **sizes}
        variant = self.variant(tiling)
        return Plan(variant, grid, shared, self.blocks, self.log2_block, self.chunks, split=split, **sizes)


def make_plan(dtype: torch.dtype, m: int, n: int, k: int, bits: int, block_size: int, device: Device) -> Plan:
    """For A [m, k] of `dtype` and B [n, k]."""
    product = Product(dtype, m, n, k, bits, block_size)
    if product.whole_steps:
        if m <= 16:
            tokens = 8 if m <= 8 else 16
            for tiling in (tiling for tiling in STREAMS if tiling.tokens == tokens):
                if (plan := stream_plan(product, tiling, device)) is not None:
                    return plan
        else:
            tokens = next((tokens for tokens in (32, 64) if m <= tokens), 128)
            for tiling in (tiling for tiling in TILES if tiling.tokens == tokens):
                if (plan := tile_plan(product, tiling, device)) is not None:
                    return plan
    return general_plan(product, device)


def candidates(product: Product, device: Device) -> Iterator[Plan]:
    """All plans that may be the fastest, for tools that measure them."""
    yield general_plan(product, device)
    if not product.whole_steps:
        return
    for tiling in STREAMS:
        if product.m <= tiling.tokens and (tiling.tokens == 8 or product.m > tiling.tokens // 2):
            for blocks in (1, 2):
                if plan := stream_plan(product, tiling, device, blocks):
                    yield plan
    for tiling in TILES:
        if max(8, tiling.tokens // 2) < product.m and (product.m <= tiling.tokens or tiling.tokens >= 64):
            for waves in (1, 2):
                if plan := tile_plan(product, tiling, device, waves):
                    yield plan


def stream_plan(product: Product, tiling: StreamTiling, device: Device, blocks: int = 1) -> Plan | None:
    """With so many blocks to a processor; None where they have no room, or warps nothing to do."""
    m, n, k, bits = product.m, product.n, product.k, product.bits
    tokens = min(m, tiling.tokens)
    unit = max(STEP, product.block_size) if product.blocks > 1 else STEP
    for splits in range(1, 17):
        split = _ceil(_ceil(k, unit), splits) * unit
        least = k - (splits - 1) * split
        if _ceil(k, split) != splits or _ceil(least, STEP) < tiling.warps:
            continue
        ahead = tiling.ahead(least)
        shared = tiling.shared_bytes(bits, product.blocks, tokens, split, ahead)
        if (shared + 1024) * blocks > device.shared_limit + 1024:  # a block takes 1 KiB for itself
            continue
        tiles = _ceil(n, tiling.rows)
        turns = _ceil(tiles, max(1, device.processors * blocks // splits))
        return product.plan(tiling, (_ceil(tiles, turns), _ceil(m, tiling.tokens), splits), shared, split, ahead=ahead)
    return None


def tile_plan(product: Product, tiling: TileTiling, device: Device, waves: int = 1) -> Plan | None:
    """K is split so that there are `waves` times as many blocks as processors; None where a block has no room."""
    m, n, k = product.m, product.n, product.k
    shared = tiling.shared_bytes(product.bits)
    if (shared + 1024) * tiling.blocks > device.shared_limit + 1024:
        return None
    across = _ceil(n, tiling.rows) * _ceil(m, tiling.tokens)
    splits = max(1, min(waves * tiling.blocks * device.processors // across, _ceil(k, STEP) // (2 * tiling.stages)))
    unit = max(STEP, product.block_size) if product.blocks > 1 else STEP
    split = _ceil(_ceil(k, unit), splits) * unit
    grid = (_ceil(n, tiling.rows), _ceil(m, tiling.tokens), _ceil(k, split))
    return product.plan(tiling, grid, shared, split)


def general_plan(product: Product, device: Device) -> Plan:
    """By the kernel that takes every shape."""
    m, n, k, block_size = product.m, product.n, product.k, product.block_size
    tiling = next((tiling for most, tiling in TILINGS.items() if m <= most), TILINGS[max(TILINGS)])
    across = _ceil(n, tiling.rows) * _ceil(m, tiling.tokens)
    # Few blocks leave processors idle: K is split over several, as long as each still has some rounds to do. Each
    # begins with a group, so that a slice of it has no more groups than its length says.
    splits = max(1, min(device.processors // across, _ceil(k, tiling.round) // 4))
    unit = max(tiling.round, block_size) if product.blocks > 1 else tiling.round
    split = _ceil(_ceil(k, unit), splits) * unit
    slice_, shared = _longest_slice(tiling, product.bits, min(tiling.tokens, m), split, 1 << product.log2_block)
    grid = (_ceil(n, tiling.rows), _ceil(m, tiling.tokens), _ceil(k, split))
    return product.plan(tiling, grid, shared, split, slice=slice_)


def _longest_slice(tiling: Tiling, bits: int, tokens: int, split: int, group: int) -> tuple[int, int]:
    """Elements of K whose activations and grids are in shared memory at once, and the bytes of a block with them.

    Activations and grids may take 24 KiB, or 40 where tokens are many; the least slice is a round of the warps.
    """
    budget = 24 * 1024 if tokens <= MOST_SCALED_SUMS else 40 * 1024
    slice_, staged = tiling.round, tiling.staged_bytes(tokens, tiling.round, _ceil(tiling.round, group))
    while slice_ < split:
        longer = tiling.staged_bytes(tokens, slice_ * 2, _ceil(slice_ * 2, group))
        if longer > budget or tiling.shared_bytes(bits, longer) > SHARED_LIMIT:
            break
        slice_, staged = slice_ * 2, longer
    return slice_, tiling.shared_bytes(bits, staged)


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _vectors(bytes_: int) -> int:
    return _ceil(bytes_, 16) * 16
