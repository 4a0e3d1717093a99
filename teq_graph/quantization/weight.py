"""A quantized weight as MatMulNBits stores it."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from teq_graph.config import WeightSpec
from teq_graph.errors import InputError
from teq_graph.quantization.grid import Grid, find_grid, num_blocks, quantize, resolve_block_size
from teq_graph.quantization.packing import pack_codes, pack_zero_points, unpack_codes, unpack_zero_points

ONNXRUNTIME_BLOCK_SIZES = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A weight [n, k] in `bits` bits.

    packed: uint8 [n, nb, block_size * bits / 8], where nb = ceil(k / block_size); padding codes dequantize to 0.
    scales: [n, nb], float32, float16 or bfloat16.
    zero_points: packed uint8 [n, ceil(nb * bits / 8)]; None means `2**(bits - 1)`.
    """

    packed: Tensor
    scales: Tensor
    zero_points: Tensor | None
    n: int
    k: int
    bits: int
    block_size: int

    @classmethod
    def from_codes(cls, codes: Tensor, grid: Grid, scale_dtype: torch.dtype = torch.float32) -> QuantizedWeight:
        """Pack codes uint8 [N, K] on `grid`.

        Raises InputError for scales that `scale_dtype` does not hold exactly: codes that were chosen for other
        scales than the stored ones are silently worse (`find_grid` and `round_scales` take the dtype).
        """
        n, k = codes.shape
        if tuple(grid.scales.shape) != (n, num_blocks(k, grid.block_size)):
            raise InputError(
                f"codes {tuple(codes.shape)}, scales {tuple(grid.scales.shape)}, block_size={grid.block_size}: "
                "accepted are [N, K] and [N, ceil(K / block_size)]"
            )
        scales = grid.scales.to(scale_dtype)
        if not torch.equal(scales.to(torch.float32), grid.scales):
            raise InputError(
                f"grid scales: some are no {scale_dtype} numbers; accepted are scales rounded to it before"
            )
        zero_points = grid.zero_points
        return cls(
            packed=pack_codes(
                codes, grid.bits, grid.block_size, 2 ** (grid.bits - 1) if zero_points is None else zero_points
            ),
            scales=scales,
            zero_points=None if zero_points is None else pack_zero_points(zero_points, grid.bits),
            n=n,
            k=k,
            bits=grid.bits,
            block_size=grid.block_size,
        )

    def to_codes(self) -> tuple[Tensor, Grid]:
        """Codes uint8 [N, K] and their grid: what `from_codes` was given."""
        zero_points = self.zero_points
        if zero_points is not None:
            zero_points = unpack_zero_points(zero_points, self.bits, self.scales.shape[1])
        grid = Grid(self.scales.to(torch.float32), zero_points, self.bits, self.block_size)
        return unpack_codes(self.packed, self.bits, self.k).contiguous(), grid

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points."""
        zero_points = 0 if self.zero_points is None else self.zero_points.nbytes
        return self.packed.nbytes + self.scales.nbytes + zero_points

    @staticmethod
    def bytes_for(n: int, k: int, spec: WeightSpec, scale_dtype: torch.dtype = torch.float32) -> int:
        """`nbytes` of a weight [n, k] by its spec."""
        block = resolve_block_size(k, spec.group_size)
        blocks = num_blocks(k, block)
        zero_points = 0 if spec.symmetric else -(-blocks * spec.bits // 8)
        return n * (blocks * block * spec.bits // 8 + blocks * scale_dtype.itemsize + zero_points)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight [n, k], computed in float32."""
        weight = dequantize_rows(self.packed, self.scales, self.zero_points, self.bits)
        return weight[:, : self.k].to(dtype).contiguous()

    def for_onnxruntime(self) -> QuantizedWeight:
        """An equal weight, bit for bit, that onnxruntime's MatMulNBits takes.

        3-bit codes are stored in 4 bits, and a whole-row block of another size becomes blocks of at most 128 that
        repeat its scale and zero point.
        """
        bits = 4 if self.bits == 3 else self.bits
        block = self.block_size
        if block not in ONNXRUNTIME_BLOCK_SIZES:
            block = next(size for size in ONNXRUNTIME_BLOCK_SIZES if size >= min(block, 128))
        if (bits, block) == (self.bits, self.block_size):
            return self
        # Old blocks that are no multiple of the new ones are whole rows: one scale and one zero point per row.
        blocks = num_blocks(self.k, block)
        codes = unpack_codes(self.packed, self.bits, self.k)
        scales, zero_points = self.scales, self.zero_points
        if zero_points is not None:
            zero_points = unpack_zero_points(zero_points, self.bits, scales.shape[1])
        else:
            # The implied zero point moves from 2**(old bits - 1) to 2**(new bits - 1), and the codes with it.
            codes = codes + (2 ** (bits - 1) - 2 ** (self.bits - 1))
        if block != self.block_size:
            scales = scales.expand(-1, blocks).contiguous()
            zero_points = None if zero_points is None else zero_points.expand(-1, blocks)
        return QuantizedWeight(
            packed=pack_codes(codes, bits, block, 2 ** (bits - 1) if zero_points is None else zero_points),
            scales=scales,
            zero_points=None if zero_points is None else pack_zero_points(zero_points, bits),
            n=self.n,
            k=self.k,
            bits=bits,
            block_size=block,
        )


def quantize_weight(weight: Tensor, spec: WeightSpec, scale_dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """Round a weight [N, K] to nearest on its own grid, whose scales are numbers of `scale_dtype`."""
    grid = find_grid(weight, spec, scale_dtype)
    return QuantizedWeight.from_codes(quantize(weight, grid), grid, scale_dtype)


def dequantize_rows(
    packed: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int, out: Tensor | None = None
) -> Tensor:
    """Dequantize whole rows, padding included: float32 [n, nb * block_size], written to `out` where given."""
    n, blocks, _ = packed.shape
    codes = unpack_codes(packed, bits)
    weight = torch.empty(codes.shape, dtype=torch.float32, device=codes.device) if out is None else out
    groups = weight.copy_(codes).view(n, blocks, codes.shape[1] // blocks)
    if zero_points is None:
        groups -= 2 ** (bits - 1)
    else:
        groups -= unpack_zero_points(zero_points, bits, blocks)[..., None].to(torch.float32)
    groups *= scales[..., None].to(torch.float32)
    return weight
