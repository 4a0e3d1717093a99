"""How products are cut up for the CUDA kernel; no GPU is needed for what a launch would be."""

from __future__ import annotations

import dataclasses
import itertools
import re

import numpy as np
import pytest
import torch

from teq_graph.config import BITS
from teq_graph.kernels import cuda, plan, program
from teq_graph.kernels.parameters import PARAMETERS, POINTERS, SIZES

SHAPES = [
    (256, 5 * 896),
    (4096, 4096),
    (1024, 4096),
    (14336, 4096),
    (4096, 14336),
    (576, 576),
    (8, 32),
    (28672, 8192),
    (130000, 1000),
]
TOKENS = (1, 2, 3, 8, 9, 16, 17, 32, 33, 64, 65, 512, 2048)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, "row"])
def test_every_plan_covers_the_product_within_the_limits(bits: int, block_size: int | str) -> None:
    kinds = set(plan.variants())
    for (n, k), m, processors in itertools.product(SHAPES, TOKENS, (1, 84, 132)):
        block = -(-k // 32) * 32 if block_size == "row" else int(block_size)
        made = plan.make_plan(torch.float16, m, n, k, bits, block, processors)
        tiling = made.variant.tiling
        assert made.variant in kinds
        assert made.grid[0] * tiling.rows >= n > (made.grid[0] - 1) * tiling.rows
        assert made.grid[1] * tiling.tokens >= m > (made.grid[1] - 1) * tiling.tokens
        assert made.grid[2] * made.split >= k > (made.grid[2] - 1) * made.split
        # Warps take turns in whole rounds, or they would read each other's copies.
        assert made.split % tiling.round == made.slice % tiling.round == 0
        assert made.shared_bytes <= plan.SHARED_LIMIT
        assert made.grid[1] <= 65535 and made.grid[2] <= 65535
        assert tiling.threads <= 1024
        assert made.chunks * 32 >= k
        groups = {position >> made.log2_block for position in range(0, k, 32)}
        assert groups == set(range(made.blocks)), "each chunk lies in a group"
        for begin in range(0, k, made.split):
            for start in range(begin, min(begin + made.split, k), made.slice):
                last = min(start + made.slice, begin + made.split, k) - 1
                groups_here = (last >> made.log2_block) - (start >> made.log2_block) + 1
                assert groups_here <= ((made.slice - 1) >> made.log2_block) + 1, "room for the groups of every slice"
        # Scales multiply sums where a step lies in one group, while tokens are few.
        assert made.variant.scale_sums == (tiling.tokens <= 16 and (made.blocks == 1 or block % 128 == 0))


def test_few_rows_are_split_over_processors() -> None:
    assert plan.make_plan(torch.float16, 64, 4096, 4096, 4, 128, 132).grid == (16, 1, 8)
    assert plan.make_plan(torch.float16, 64, 4096, 4096, 4, 128, 16).grid == (16, 1, 1)
    assert plan.make_plan(torch.float16, 1, 4096, 4096, 4, 128, 132).grid == (256, 1, 1)


@pytest.mark.parametrize(
    ("k", "block_size", "taken"),
    [(4096, 32, True), (4096, 16, False), (576, 576, True), (172, 176, False), (576, 96, False), (100, 128, True)],
)
def test_which_groups_are_taken(k: int, block_size: int, taken: bool) -> None:
    reason = plan.refusal(k, block_size)
    assert (reason is None) == taken
    assert reason is None or f"block_size={block_size}" in reason
    for dtype in plan.DTYPES:
        assert cuda.takes(dtype, k, block_size) == taken
    assert not cuda.takes(torch.float32, k, block_size)


def test_columns_and_addresses_are_made_to_fit() -> None:
    a = torch.randn(3, 20).half()
    padded = cuda.pad_columns(a)
    assert torch.equal(padded, torch.nn.functional.pad(a, (0, 4)))
    assert cuda.pad_columns(padded) is padded
    odd = torch.arange(40, dtype=torch.uint8)[3:35]
    assert cuda.aligned(odd).data_ptr() % 16 == 0
    assert torch.equal(cuda.aligned(odd), odd)
    assert cuda.aligned(padded) is padded


def test_source_has_its_includes_in_place_once() -> None:
    text = program.source()
    assert "#include" not in text
    assert text.count("struct Float16 {") == text.count("struct Matmul {") == 1


def test_struct_has_the_parameters_as_members() -> None:
    """The same names and types in the same order: kernels make a Matmul of their parameters."""
    (body,) = re.findall(r"^struct Matmul \{\n(.*?)^\};", program.source(), flags=re.MULTILINE | re.DOTALL)
    members = []
    for declaration in re.sub(r"//.*", "", body).split(";")[:-1]:
        kind, names = re.fullmatch(r"((?:const )?\w+\*?) (.+)", declaration.strip()).groups()
        members += [(name, kind) for name in names.split(", ")]
    assert members == list(PARAMETERS.items())


def test_arguments_are_those_of_the_parameters() -> None:
    tensors = {name: torch.empty(1) for name in ("a", "b", "scales", "zero_points", "bias", "y", "partial")}
    made = plan.make_plan(torch.float16, 1, 256, 5 * 896, 4, 64, processors=132)
    sizes = {"m": 1, "n": 2, "k": 3, "blocks": 4, "log2_block": 5, "chunks": 6, "slice": 7, "split": 8}
    made = dataclasses.replace(made, **{name: size for name, size in sizes.items() if name not in "mnk"})
    arguments = dict(zip(PARAMETERS, cuda.kernel_arguments(tensors, 1, 2, 3, made), strict=True))
    assert arguments == {name: tensor.data_ptr() for name, tensor in tensors.items()} | sizes
    # cuda-core passes int as 64 bits.
    assert {type(arguments[name]) for name in POINTERS} == {int}
    assert {type(arguments[name]) for name in SIZES} == {np.int32}
    assert cuda.kernel_arguments({**tensors, "bias": None}, 1, 2, 3, made)[list(PARAMETERS).index("bias")] == 0


@pytest.mark.parametrize("handle", [0, 0x7F00_0000_1000])
def test_streams_are_those_of_cuda_core(handle: int) -> None:
    """Its own class, as it deprecates others, and open, also where it is the default stream."""
    from cuda.core import Stream

    stream = cuda.stream_of(handle)
    assert type(stream) is Stream
    assert stream.__cuda_stream__() == (0, handle)
    assert not stream.is_closed
