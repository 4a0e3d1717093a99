"""How a product is cut into blocks of threads: the variants of the CUDA kernel, and which one serves which shapes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

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
class Tiling:
    """A block does `tokens` rows of A; `warps_n` warps have `row_tiles` tiles of 16 rows of B each, and of each of
    them there are `warps_k` that take turns over K. The formulas are those of `Tiling` in matmul_nbits.cuh."""

    tokens: int
    row_tiles: int
    warps_n: int
    warps_k: int

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
MOST_SCALED_SUMS = 16
"""Tokens up to which scales multiply sums, where groups allow it: more would need too many registers for two sets."""


@dataclasses.dataclass(frozen=True)
class Variant:
    """What the kernel is compiled for."""

    dtype: torch.dtype
    bits: int
    tiling: Tiling
    scale_sums: bool

    @property
    def macros(self) -> dict[str, str]:
        """The macros of matmul_nbits.cu."""
        tiling = ", ".join(map(str, (self.bits, *dataclasses.astuple(self.tiling))))
        scale_sums = str(self.scale_sums).lower()
        return {"VARIANT_TYPE": DTYPES[self.dtype], "VARIANT_TILING": tiling, "VARIANT_SCALE_SUMS": scale_sums}


def variants() -> Iterator[Variant]:
    """All there are."""
    for dtype, bits, tiling in itertools.product(DTYPES, BITS, TILINGS.values()):
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


def refusal(k: int, block_size: int) -> str | None:
    """Why the kernel cannot read weights of K = `k` in groups of `block_size`; None where it can."""
    power = block_size & (block_size - 1) == 0
    if block_size % CHUNK or not (power or block_size >= k):
        return f"block_size={block_size}: the kernel takes powers of two from {CHUNK}, or a whole row in {CHUNK}s"
    return None


def make_plan(dtype: torch.dtype, m: int, n: int, k: int, bits: int, block_size: int, processors: int) -> Plan:
    """For A [m, k] of `dtype` and B [n, k], on a GPU of so many multiprocessors."""
    blocks = _ceil(k, block_size)
    tiling = next((tiling for most, tiling in TILINGS.items() if m <= most), TILINGS[max(TILINGS)])
    uniform = blocks == 1 or block_size % STEP == 0
    variant = Variant(dtype, bits, tiling, uniform and tiling.tokens <= MOST_SCALED_SUMS)
    across = _ceil(n, tiling.rows) * _ceil(m, tiling.tokens)
    # Few blocks leave processors idle: K is split over several, as long as each still has some rounds to do. Each
    # begins with a group, so that a slice of it has no more groups than its length says.
    splits = max(1, min(processors // across, _ceil(k, tiling.round) // 4))
    unit = max(tiling.round, block_size) if blocks > 1 else tiling.round
    split = _ceil(_ceil(k, unit), splits) * unit
    log2_block = block_size.bit_length() - 1 if blocks > 1 else 30
    slice_, shared = _longest_slice(tiling, bits, min(tiling.tokens, m), split, 1 << log2_block)
    return Plan(
        variant=variant,
        grid=(_ceil(n, tiling.rows), _ceil(m, tiling.tokens), _ceil(k, split)),
        shared_bytes=shared,
        blocks=blocks,
        log2_block=log2_block,
        chunks=blocks * block_size // CHUNK,
        slice=slice_,
        split=split,
    )


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
