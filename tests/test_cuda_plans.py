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
from teq_graph.kernels.tilings import STEP, AnyTiling, StreamTiling, Tiling

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


DEVICES = (plan.Device(1), plan.Device(84), plan.Device(132, plan.HOPPER_SHARED_LIMIT, warpgroups=True))


def block_of(block_size: int | str, k: int) -> int:
    return -(-k // 32) * 32 if block_size == "row" else int(block_size)


def check_plan(made: plan.Plan, m: int, n: int, k: int, block: int, device: plan.Device) -> None:
    """It covers the product, within the limits."""
    tiling = made.variant.tiling
    if isinstance(tiling, StreamTiling):
        tiles = -(-n // tiling.rows)
        room = (device.shared_limit + 1024) // (made.shared_bytes + 1024)  # a block takes 1 KiB for itself
        at_once = min(tiling.blocks, room) * device.processors
        assert 1 <= made.grid[0] <= tiles and made.grid[0] * made.grid[2] <= max(at_once, made.grid[2])
        least = k - (made.grid[2] - 1) * made.split
        assert -(-least // STEP) >= tiling.warps, "a warp has a step of every tile"
    else:
        assert made.grid[0] * tiling.rows >= n > (made.grid[0] - 1) * tiling.rows
    assert made.grid[1] * tiling.tokens >= m > (made.grid[1] - 1) * tiling.tokens
    assert made.grid[2] * made.split >= k > (made.grid[2] - 1) * made.split
    assert made.shared_bytes <= device.shared_limit
    assert made.grid[1] <= 65535 and made.grid[2] <= 65535
    assert tiling.threads <= 1024
    assert made.chunks * 32 >= k
    groups = {position >> made.log2_block for position in range(0, k, 32)}
    assert groups == set(range(made.blocks)), "each chunk lies in a group"
    if isinstance(tiling, Tiling):
        # Warps take turns in whole rounds, or they would read each other's copies.
        assert made.split % tiling.round == made.slice % tiling.round == 0
        for begin in range(0, k, made.split):
            for start in range(begin, min(begin + made.split, k), made.slice):
                last = min(start + made.slice, begin + made.split, k) - 1
                groups_here = (last >> made.log2_block) - (start >> made.log2_block) + 1
                assert groups_here <= ((made.slice - 1) >> made.log2_block) + 1, "room for the groups of every slice"
    else:
        assert made.chunks * 32 % STEP == made.split % STEP == 0, "vectors begin where steps do"
    # Scales multiply sums where a step lies in one group, while tokens are few.
    assert made.variant.scale_sums == (tiling.tokens <= 16 and (made.blocks == 1 or block % 128 == 0))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block_size", [32, 64, 128, 256, "row"])
def test_every_plan_covers_the_product_within_the_limits(bits: int, block_size: int | str) -> None:
    kinds = set(plan.variants())
    for (n, k), m, device in itertools.product(SHAPES, TOKENS, DEVICES):
        block = block_of(block_size, k)
        made = plan.make_plan(torch.float16, m, n, k, bits, block, device)
        assert (made is None) == (m > max(plan.table_of(n, k, bits, device.warpgroups)))
        if made is not None:
            assert made.variant in kinds
            check_plan(made, m, n, k, block, device)


@pytest.mark.parametrize("bits", BITS)
def test_every_tiling_takes_what_it_is_asked_for(bits: int) -> None:
    for (n, k), m, device, block_size in itertools.product(SHAPES, (1, 33, 300), DEVICES, (32, 128, "row")):
        product = plan.Product(torch.bfloat16, m, n, k, bits, block_of(block_size, k))
        for tiling in plan.tilings_of(bits):
            if (made := plan.plan_by(product, tiling, device)) is not None:
                assert made.variant.tiling == tiling
                check_plan(made, m, n, k, product.block_size, device)
            else:
                assert not isinstance(tiling, Tiling), "the general kernel takes every shape"


@pytest.mark.parametrize("bits", BITS)
def test_table_on_the_gpu_that_it_was_measured_on(bits: int) -> None:
    """Every choice fits there: a table of what does not would say nothing."""
    for (n, k), warpgroups in itertools.product(((28672, 4096), (4096, 4096), (4096, 14336)), (False, True)):
        table = plan.table_of(n, k, bits, warpgroups)
        assert list(table) == sorted(table)
        for m, tiling in table.items():
            device = dataclasses.replace(DEVICES[-1], warpgroups=warpgroups)
            made = plan.make_plan(torch.float16, m, n, k, bits, 128, device)
            assert made is not None and made.variant.tiling == tiling
            assert tiling.tokens >= min(m, 64), "a tiling for fewer tokens would read weights several times"


def test_small_gpus_take_what_they_have_room_for() -> None:
    """99 KiB of shared memory: bytes in tiles of 128 tokens need twice as much."""
    made = plan.make_plan(torch.float16, 100, 28672, 4096, 8, 128, plan.Device(84))
    assert made is not None and made.variant.tiling == plan.TILE_64
    made = plan.make_plan(torch.float16, 1, 28672, 4096, 4, 128, plan.Device(84))
    assert made is not None and made.variant.tiling == plan.STREAM_8
    # Rows that are no whole steps, as no vector begins where they do.
    made = plan.make_plan(torch.float16, 100, 28672, 4096 + 32, 4, 32, plan.Device(84))
    assert made is not None and made.variant.tiling == plan.GENERAL[64]


def test_warpgroups_are_of_some_gpus() -> None:
    product = plan.Product(torch.float16, 256, 28672, 4096, 4, 128)
    for tiling in (plan.GROUPS_32, plan.GROUPS_64, plan.WIDE_GROUPS_64, plan.WIDE_GROUPS_128):
        assert plan.plan_by(product, tiling, dataclasses.replace(DEVICES[-1], warpgroups=False)) is None
        made = plan.plan_by(product, tiling, DEVICES[-1])
        assert made is not None
        assert [made.variant.compiles_for(f"sm_{name}") for name in ("80", "90", "90a", "100a")] == [
            False,
            False,
            True,
            False,
        ]
    assert [program.architecture_of(c) for c in ((8, 0), (9, 0), (12, 0))] == ["sm_80", "sm_90a", "sm_120"]


def test_few_rows_are_split_over_processors() -> None:
    def grid(m: int, tiling: AnyTiling, device: plan.Device) -> tuple[int, int, int]:
        made = plan.plan_by(plan.Product(torch.float16, m, 4096, 4096, 4, 128), tiling, device)
        assert made is not None
        return made.grid

    assert grid(64, plan.GENERAL[64], plan.Device(132)) == (16, 1, 8)
    assert grid(64, plan.GENERAL[64], plan.Device(16)) == (16, 1, 1)
    assert grid(1, plan.GENERAL[2], plan.Device(132)) == (256, 1, 1)
    assert grid(1, plan.STREAM_8, DEVICES[-1]) == (128, 1, 1)
    assert grid(16, plan.STREAM_16, DEVICES[-1]) == (128, 1, 1)
    longer = dataclasses.replace(plan.STREAM_16, stages=4)
    assert grid(16, longer, DEVICES[-1]) == (66, 1, 2), "which has no room for all of K"
    assert grid(64, plan.TILE_64, DEVICES[-1]) == (32, 1, 5)
    assert grid(64, plan.TILE_64, plan.Device(16, plan.HOPPER_SHARED_LIMIT)) == (32, 1, 1)


@pytest.mark.parametrize(
    ("n", "k", "stretch"),
    [(28672, 4096, 14336), (4096, 14336, 4096), (57344, 8192, 8192), (8, 32, 8), (300, 2**22, 128)],
)
def test_stretches_of_dequantized_rows(n: int, k: int, stretch: int) -> None:
    rows = cuda.stretch_of(n, 2 * k, cuda.DEQUANTIZED_BYTES)
    assert rows == stretch
    assert rows * k * 2 <= cuda.DEQUANTIZED_BYTES or rows == cuda.STRETCH_UNIT
    assert rows == n or rows % cuda.STRETCH_UNIT == 0


def test_settings_of_torch_return() -> None:
    """Both halves of each, also where the product fails."""
    matmul = torch.backends.cuda.matmul
    names = ("allow_fp16_reduced_precision_reduction", "allow_bf16_reduced_precision_reduction")

    def settings() -> list[bool]:
        return [getattr(matmul, name + half) for name in names for half in ("", "_split_k")]

    def fail() -> None:
        assert settings() == [False, True, False, True]
        raise ZeroDivisionError

    with cuda.full_precision_sums():  # which brings back what this test sets
        matmul.allow_fp16_reduced_precision_reduction = True, True
        matmul.allow_bf16_reduced_precision_reduction = False, False
        with pytest.raises(ZeroDivisionError), cuda.full_precision_sums():
            fail()
        assert settings() == [True, True, False, False]


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
    text = program.source("matmul_nbits.cu")
    assert "#include" not in text
    assert text.count("struct Float16 {") == text.count("struct Matmul {") == 1


def test_struct_has_the_parameters_as_members() -> None:
    """The same names and types in the same order: kernels make a Matmul of their parameters."""
    (body,) = re.findall(
        r"^struct Matmul \{\n(.*?)^\};", program.source("matmul_nbits.cu"), flags=re.MULTILINE | re.DOTALL
    )
    members = []
    for declaration in re.sub(r"//.*", "", body).split(";")[:-1]:
        kind, names = re.fullmatch(r"((?:const )?\w+\*?) (.+)", declaration.strip()).groups()
        members += [(name, kind) for name in names.split(", ")]
    assert members == list(PARAMETERS.items())


def test_arguments_are_those_of_the_parameters() -> None:
    tensors = {name: torch.empty(1) for name in ("a", "b", "scales", "zero_points", "bias", "y", "partial")}
    made = plan.make_plan(torch.float16, 1, 256, 5 * 896, 4, 64, plan.Device(132))
    assert made is not None
    sizes = {"m": 1, "n": 2, "k": 3, "blocks": 4, "log2_block": 5, "chunks": 6, "slice": 7, "split": 8, "ahead": 10}
    made = dataclasses.replace(
        made, grid=(9, 1, 1), **{name: size for name, size in sizes.items() if name not in "mnk"}
    )
    sizes["across"] = 9
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
