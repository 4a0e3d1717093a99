"""The kernels' parameters: the one list that the host's arguments and the parameters in the sources follow."""

from __future__ import annotations

from typing import Final

POINTERS: Final = {
    "a": "const u16*",
    "b": "const u8*",
    "scales": "const u16*",
    "zero_points": "const u8*",
    "bias": "const u16*",
    "y": "u16*",
    "partial": "float*",
}
"""Addresses of tensors, which come first, each with its type in the sources."""
SIZES: Final = ("m", "n", "k", "blocks", "log2_block", "chunks", "slice", "split", "across", "ahead")
"""32-bit integers, which follow."""
PARAMETERS: Final = {**POINTERS, **dict.fromkeys(SIZES, "int")}
"""All, in the order of a call. They are the members of `struct Matmul` in matmul_nbits.cuh, which says what each is."""

MACROS: Final = {
    "PARAMETERS": ", ".join(f"{kind} {name}" for name, kind in PARAMETERS.items()),
    "MEMBERS": ", ".join(f".{name} = {name}" for name in PARAMETERS),
}
"""What the sources are compiled with: the parameters of a kernel, and the members of a Matmul that is made of them."""
