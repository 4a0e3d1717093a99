"""Codes and zero points as the bit streams of MatMulNBits: little-endian, low bits first, per block.

Equal to `np.packbits(bits, bitorder="little")` over the codes' bits. Eight codes of b bits are b whole bytes,
so eight codes travel together through one int64: as eight bytes when apart, as its b low bytes when packed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from teq_graph.config import BITS
from teq_graph.errors import ConfigError, InputError


def pack_codes(codes: Tensor, bits: int, block_size: int, pad: Tensor | int) -> Tensor:
    """Pack codes uint8 [N, K] to uint8 [N, nb, block_size * bits / 8], where nb = ceil(K / block_size).

    The elements past K get the code `pad`: one number, or uint8 [N, nb], one per block (its zero point, so that
    they dequantize to 0). `block_size` is a multiple of 8.
    """
    _check_bits(bits)
    if block_size < 8 or block_size % 8:
        raise ConfigError(f"block_size={block_size}: accepted are multiples of 8")
    n, k = codes.shape
    blocks = -(-k // block_size)
    if k % block_size:
        padded = torch.empty(n, blocks * block_size, dtype=torch.uint8, device=codes.device)
        padded[:, :k] = codes
        padded[:, k:] = pad[:, -1:] if isinstance(pad, Tensor) else pad
        codes = padded
    return _pack(codes, bits).view(n, blocks, block_size * bits // 8)


def unpack_codes(packed: Tensor, bits: int, k: int | None = None) -> Tensor:
    """Unpack uint8 [N, nb, block_size * bits / 8] to codes uint8 [N, k]; k None keeps the padding."""
    _check_bits(bits)
    codes = _unpack(packed.flatten(1), bits)
    return codes if k is None else codes[:, :k]


def pack_zero_points(zero_points: Tensor, bits: int) -> Tensor:
    """Pack zero points uint8 [N, nb] to uint8 [N, ceil(nb * bits / 8)]: each row ends in zero bits."""
    _check_bits(bits)
    n, blocks = zero_points.shape
    padded = torch.zeros(n, -(-blocks // 8) * 8, dtype=torch.uint8, device=zero_points.device)
    padded[:, :blocks] = zero_points
    return _pack(padded, bits)[:, : -(-blocks * bits // 8)].contiguous()


def unpack_zero_points(packed: Tensor, bits: int, blocks: int) -> Tensor:
    """Unpack uint8 [N, ceil(blocks * bits / 8)] to zero points uint8 [N, blocks]."""
    _check_bits(bits)
    n, width = packed.shape
    if width != -(-blocks * bits // 8):
        raise InputError(
            f"zero_points {tuple(packed.shape)}: accepted is [N, {-(-blocks * bits // 8)}] for {blocks} blocks of "
            f"{bits} bits"
        )
    padded = torch.zeros(n, -(-blocks // 8) * bits, dtype=torch.uint8, device=packed.device)
    padded[:, :width] = packed
    return _unpack(padded, bits)[:, :blocks]


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [R, C] to int32 [R, ceil(C * bits / 32)]: each row is one bit stream, and ends in zero bits."""
    _check_bits(bits)
    rows, columns = codes.shape
    padded = torch.zeros(rows, -(-columns // 32) * 32, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes
    return _pack(padded, bits).view(torch.int32)[:, : -(-columns * bits // 32)].contiguous()


def _pack(codes: Tensor, bits: int) -> Tensor:
    """[N, 8m] codes -> [N, m * bits] bytes."""
    # A fresh tensor: the caller's is not written to, and int64 may start only at multiples of 8.
    codes = codes.clone(memory_format=torch.contiguous_format)
    if bits == 8:
        return codes
    eights = codes.view(torch.int64)
    for lane, mask in reversed(_lanes(bits)):
        # Two neighbours meet: the upper one of each pair of half-lanes moves down to the lower one's end.
        eights &= mask
        eights |= eights >> (lane // 2 - bits * lane // 16)
    n, count = eights.shape
    apart = eights.view(torch.uint8).view(n, count, 8)[..., :bits]
    return apart.clone(memory_format=torch.contiguous_format).view(n, -1)


def _unpack(packed: Tensor, bits: int) -> Tensor:
    """[N, m * bits] bytes -> [N, 8m] codes."""
    packed = packed.contiguous()
    if bits == 8:
        return packed
    n = packed.shape[0]
    if bits == 3:
        low, middle, high = packed.view(n, packed.shape[1] // 3, 3).unbind(-1)
        eights = high.to(torch.int64, memory_format=torch.contiguous_format)
        eights <<= 8
        eights |= middle
        eights <<= 8
        eights |= low
    else:
        if packed.storage_offset() % bits:  # a view as wider integers starts at their multiples
            packed = packed.clone()
        wide = packed.view(-1).view(torch.int32 if bits == 4 else torch.int16)
        eights = wide.view(n, packed.shape[1] // bits).to(torch.int64)
        eights &= (1 << 8 * bits) - 1  # int64 repeats the sign
    for lane, mask in _lanes(bits):
        eights |= eights << (lane // 2 - bits * lane // 16)
        eights &= mask
    return eights.view(torch.uint8)


def _lanes(bits: int) -> list[tuple[int, int]]:
    """For lanes of 64, 32 and 16 bits: the mask that keeps the codes of each half-lane at that half's low end."""
    lanes = []
    for lane in (64, 32, 16):
        half = lane // 2
        codes = (1 << (bits * lane // 16)) - 1
        lanes.append((lane, sum(codes << at for at in range(0, 64, half))))
    return lanes


def _check_bits(bits: int) -> None:
    if bits not in BITS:
        raise ConfigError(f"bits={bits}: accepted are {BITS}")
