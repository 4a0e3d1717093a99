"""teq_graph::matmul_nbits on CUDA tensors: the fused kernel, launched on torch's current stream."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from teq_graph.kernels import program
from teq_graph.kernels.parameters import POINTERS, SIZES
from teq_graph.kernels.plan import DTYPES, Dequantizer, Plan, make_plan, refusal
from teq_graph.kernels.tilings import CHUNK, ceil_div

if TYPE_CHECKING:
    from cuda.core import Kernel, Stream

REDUCE_THREADS = 256
VECTOR = 16
"""Bytes of the widest load: where tensors begin, and what rows of A are whole numbers of."""

DEQUANTIZED_BYTES = 128 * 2**20
"""The most floats of a weight that are there at once. Torch's product of fewer rows leaves processors idle: of 28672 x
4096 in stretches of 4096 rows, which the L2 cache holds, 512 tokens took 279 us on an H100, in one stretch 266."""
DEQUANTIZE_THREADS = 256
DEQUANTIZE_COLUMNS, ROWS_OF_THREAD = 8, 4
"""What a thread of the dequantizing kernel does, as dequantize.cuh has it."""
STRETCH_UNIT = 128
"""Rows: of so many of them scales and zero points are whole vectors, and torch's tiles are full."""

plan_of = functools.lru_cache(maxsize=4096)(make_plan)


def takes(dtype: torch.dtype, k: int, block_size: int) -> bool:
    """Whether there is a kernel for activations of `dtype` and weights of K = `k` in groups of `block_size`."""
    return dtype in DTYPES and refusal(k, block_size) is None


def matmul_nbits(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    k: int,
    n: int,
    bits: int,
    block_size: int,
) -> Tensor:
    """a [..., K] float16 or bfloat16 times a quantized weight [N, K]: [..., N], accumulated in float32.

    The arguments are the operator's, all on one CUDA device, checked by it, and of a kind that it `takes`. Can be
    captured in a CUDA graph once it was called for the same shapes.
    """
    rows = aligned(pad_columns(a.reshape(-1, k)))
    y = a.new_empty((*a.shape[:-1], n))
    m, columns = rows.shape
    if m == 0:
        return y
    weight = Weight(
        aligned(b), aligned(scales), None if zero_points is None else aligned(zero_points), bits, block_size
    )
    out = y.view(-1, n)
    with torch.cuda.device(a.device):
        device = program.device_of(a.device.index)
        plan = plan_of(a.dtype, m, n, columns, bits, block_size, device)
        if plan is None:
            multiply_dequantized(rows, weight, _contiguous(bias), out)
        else:
            multiply(plan, rows, weight, _contiguous(bias), out)
    return y


@dataclasses.dataclass(frozen=True)
class Weight:
    """A quantized weight, contiguous and where vectors can begin."""

    b: Tensor
    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block_size: int

    def rows(self, begin: int, end: int) -> Weight:
        """Some of its rows; `begin` a multiple of 16, as rows that begin with a vector have to."""
        zeros = None if self.zero_points is None else self.zero_points[begin:end]
        return dataclasses.replace(self, b=self.b[begin:end], scales=self.scales[begin:end], zero_points=zeros)


def multiply(plan: Plan, a: Tensor, weight: Weight, bias: Tensor | None, y: Tensor) -> None:
    """y [M, N] = a [M, K] times the weight, plus bias, by a plan for them."""
    (m, k), n, splits = a.shape, y.shape[1], plan.grid[2]
    tensors = {
        "a": a,
        "b": weight.b,
        "scales": weight.scales,
        "zero_points": weight.zero_points,
        "bias": bias,
        "y": y,
        "partial": a.new_empty((splits, m, n), dtype=torch.float32) if splits > 1 else None,
    }
    arguments = kernel_arguments(tensors, m, n, k, plan)
    product, total = program.load(plan.variant, a.device.index)
    stream = stream_of(torch.cuda.current_stream().cuda_stream)
    _launch(stream, product, plan.grid, plan.variant.tiling.threads, plan.shared_bytes, arguments)
    if splits > 1:
        _launch(stream, total, (-(-m * n // REDUCE_THREADS), 1, 1), REDUCE_THREADS, 0, arguments)


def multiply_dequantized(
    a: Tensor, weight: Weight, bias: Tensor | None, y: Tensor, most_bytes: int = DEQUANTIZED_BYTES
) -> None:
    """y [M, N] = a [M, K] times the weight, plus bias, by torch: some rows of the weight after the other, as floats."""
    n, columns = y.shape[1], a.shape[1]
    stretch = stretch_of(n, columns * a.element_size(), most_bytes)
    floats = a.new_empty((stretch, columns))
    with full_precision_sums():
        for begin in range(0, n, stretch):
            end = min(begin + stretch, n)
            target = floats[: end - begin]
            dequantize(weight.rows(begin, end), target)
            if bias is None:
                torch.mm(a, target.t(), out=y[:, begin:end])
            elif stretch == n:
                torch.addmm(bias, a, target.t(), out=y)
            else:  # into rows that follow each other the product is rounded once, after the bias
                y[:, begin:end] = torch.addmm(bias[begin:end], a, target.t())


def stretch_of(n: int, row_bytes: int, most_bytes: int) -> int:
    """Rows that are dequantized at once: as few stretches as `most_bytes` allow, all alike, of whole vectors."""
    most = max(STRETCH_UNIT, most_bytes // row_bytes // STRETCH_UNIT * STRETCH_UNIT)
    stretches = ceil_div(n, most)
    return min(n, ceil_div(ceil_div(n, stretches), STRETCH_UNIT) * STRETCH_UNIT)


@contextlib.contextmanager
def full_precision_sums() -> Iterator[None]:
    """Torch's products sum in float32, as the fused kernels do, also where K is split; what was set before returns."""
    matmul, names = torch.backends.cuda.matmul, [f"allow_{t}_reduced_precision_reduction" for t in ("fp16", "bf16")]
    before = {name: (getattr(matmul, name), getattr(matmul, f"{name}_split_k")) for name in names}
    try:
        for name in names:
            setattr(matmul, name, False)
        yield
    finally:
        for name, value in before.items():
            setattr(matmul, name, value)


def dequantize(weight: Weight, floats: Tensor) -> None:
    """The weight as floats [N, K], float16 or bfloat16, K a multiple of 8."""
    (kernel,) = program.load(Dequantizer(floats.dtype, weight.bits), floats.device.index)
    stream = stream_of(torch.cuda.current_stream().cuda_stream)
    grid, threads, arguments = dequantizing_launch(weight, floats)
    _launch(stream, kernel, grid, threads, 0, arguments)


def dequantizing_launch(weight: Weight, floats: Tensor) -> tuple[tuple[int, int, int], int, list[Any]]:
    """Grid, threads of a block and arguments of the launch that writes a weight as floats [N, K]."""
    (n, k), blocks = floats.shape, weight.scales.shape[1]
    tensors = {"b": weight.b, "scales": weight.scales, "zero_points": weight.zero_points, "y": floats}
    sizes = {
        "n": n,
        "k": k,
        "blocks": blocks,
        "log2_block": weight.block_size.bit_length() - 1 if blocks > 1 else 30,
        "chunks": blocks * weight.block_size // CHUNK,
    }
    grid = (ceil_div(k, DEQUANTIZE_COLUMNS * DEQUANTIZE_THREADS), ceil_div(n, ROWS_OF_THREAD), 1)
    return grid, DEQUANTIZE_THREADS, listed(tensors, sizes)


def listed(tensors: Mapping[str, Tensor | None], sizes: Mapping[str, int]) -> list[Any]:
    """A kernel's arguments in their order: addresses as int, null for None; sizes as int32. 0 for what is not named."""
    pointers = [0 if (tensor := tensors.get(name)) is None else tensor.data_ptr() for name in POINTERS]
    return [*pointers, *(np.int32(sizes.get(name, 0)) for name in SIZES)]


def kernel_arguments(tensors: Mapping[str, Tensor | None], m: int, n: int, k: int, plan: Plan) -> list[Any]:
    """The arguments of a launch by a plan."""
    sizes = {
        "m": m,
        "n": n,
        "k": k,
        "blocks": plan.blocks,
        "log2_block": plan.log2_block,
        "chunks": plan.chunks,
        "slice": plan.slice,
        "split": plan.split,
        "across": plan.across,
        "ahead": plan.ahead,
    }
    return listed(tensors, sizes)


@functools.lru_cache(maxsize=64)
def stream_of(handle: int) -> Stream:
    """A stream of torch, by its handle, as cuda-core has streams. It owns nothing, so it may outlive torch's."""
    from cuda.core import Stream

    return Stream.from_handle(handle)


def pad_columns(rows: Tensor) -> Tensor:
    """Rows [M, K], contiguous, with zeros up to a whole number of vectors."""
    missing = -rows.shape[1] % (VECTOR // rows.element_size())
    return torch.nn.functional.pad(rows, (0, missing)) if missing else rows.contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """The tensor, contiguous, where a vector can begin."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % VECTOR else tensor


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _launch(
    stream: Stream, kernel: Kernel, grid: tuple[int, int, int], threads: int, shared_bytes: int, arguments: list[Any]
) -> None:
    from cuda.core import LaunchConfig, launch

    launch(stream, LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes), kernel, *arguments)
