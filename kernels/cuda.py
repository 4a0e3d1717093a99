"""teq_graph::matmul_nbits on CUDA tensors: the fused kernel, launched on torch's current stream."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from teq_graph.kernels import program
from teq_graph.kernels.parameters import POINTERS, SIZES
from teq_graph.kernels.plan import DTYPES, Plan, make_plan, refusal

if TYPE_CHECKING:
    from cuda.core import Kernel, Stream

REDUCE_THREADS = 256
VECTOR = 16
"""Bytes of the widest load: where tensors begin, and what rows of A are whole numbers of."""

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
    m = rows.shape[0]
    if m == 0:
        return y
    index = a.device.index
    plan = plan_of(a.dtype, m, n, rows.shape[1], bits, block_size, _processors(index))
    splits = plan.grid[2]
    partial = a.new_empty((splits, m, n), dtype=torch.float32) if splits > 1 else None
    tensors = {
        "a": rows,
        "b": aligned(b),
        "scales": scales.contiguous(),
        "zero_points": _contiguous(zero_points),
        "bias": _contiguous(bias),
        "y": y,
        "partial": partial,
    }
    arguments = kernel_arguments(tensors, m, n, rows.shape[1], plan)
    with torch.cuda.device(index):
        product, total = program.load(plan.variant, index)
        stream = stream_of(torch.cuda.current_stream().cuda_stream)
        _launch(stream, product, plan.grid, plan.variant.tiling.threads, plan.shared_bytes, arguments)
        if partial is not None:
            _launch(stream, total, (-(-m * n // REDUCE_THREADS), 1, 1), REDUCE_THREADS, 0, arguments)
    return y


def kernel_arguments(tensors: Mapping[str, Tensor | None], m: int, n: int, k: int, plan: Plan) -> list[Any]:
    """The kernel's arguments in their order: addresses of `tensors`, by name, as int, null for None; sizes as int32."""
    sizes = {
        "m": m,
        "n": n,
        "k": k,
        "blocks": plan.blocks,
        "log2_block": plan.log2_block,
        "chunks": plan.chunks,
        "slice": plan.slice,
        "split": plan.split,
    }
    pointers = [0 if (tensor := tensors[name]) is None else tensor.data_ptr() for name in POINTERS]
    return [*pointers, *(np.int32(sizes[name]) for name in SIZES)]


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


@functools.cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def _launch(
    stream: Stream, kernel: Kernel, grid: tuple[int, int, int], threads: int, shared_bytes: int, arguments: list[Any]
) -> None:
    from cuda.core import LaunchConfig, launch

    launch(stream, LaunchConfig(grid=grid, block=threads, shmem_size=shared_bytes), kernel, *arguments)
