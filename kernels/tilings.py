"""How a block of threads cuts up its work: the shapes of blocks that the CUDA kernels come in."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

LANES = 32
STEP = 128
"""Elements of K that a warp does at a time."""
CHUNK = 32
"""Consecutive codes of a row that a lane takes: rows are whole chunks."""


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
    `stages` steps under way; registers for `blocks` on a multiprocessor. Takes rows of whole steps. The formulas are
    those of stream.cuh."""

    tokens: int
    row_tiles: int
    warps: int
    stages: int
    blocks: int

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
        return _vectors(self.rows * blocks * 2) + _vectors(self.rows * ceil_div(blocks * bits, 8))

    def ahead(self, split: int) -> int:
        """Tiles whose grids are under way: a warp waits for all but its last copies, and a tile has few."""
        return ceil_div(self.stages + 1, ceil_div(split, STEP) // self.warps)

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
        return _ring_bytes(self, bits)


@dataclasses.dataclass(frozen=True)
class WarpgroupTiling:
    """`warpgroups` of four warps side by side, each warp with `row_tiles` tiles of 16 rows of B and all `tokens`;
    `stages` steps of weights and activations in shared memory; registers for `blocks` on a multiprocessor. Takes rows
    of whole steps, on GPUs of compute capability 9.0. The formulas are those of warpgroups.cuh."""

    tokens: int
    row_tiles: int
    warpgroups: int
    stages: int
    blocks: int

    struct: ClassVar = "WarpgroupTiling"
    block: ClassVar = "warpgroup_block"

    @property
    def rows(self) -> int:
        return 64 * self.row_tiles * self.warpgroups

    @property
    def threads(self) -> int:
        return 4 * LANES * self.warpgroups

    def shared_bytes(self, bits: int) -> int:
        return _ring_bytes(self, bits)


AnyTiling = Tiling | StreamTiling | TileTiling | WarpgroupTiling


def ceil_div(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def _ring_bytes(tiling: TileTiling | WarpgroupTiling, bits: int) -> int:
    """Shared memory for steps of weights and activations."""
    return tiling.stages * (tiling.rows * STEP * bits // 8 + tiling.tokens * STEP * 2)


def _vectors(bytes_: int) -> int:
    return ceil_div(bytes_, 16) * 16
