"""The CUDA kernel on the CPU: its own source, a block of threads at a time (see tests/cuda_emulation)."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from teq_graph.kernels import cuda
from teq_graph.kernels.plan import Plan, Variant, variants

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "cuda_emulation"
FLAGS = ["-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{ROOT / 'kernels'}"]
POINTERS = ("a", "b", "scales", "zero_points", "bias", "y", "partial")
SIZES = ("m", "n", "k", "blocks", "log2_block", "chunks", "slice", "split")


class Matmul(ctypes.Structure):
    """The kernel's parameters."""

    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int) for name in SIZES)]


def build(folder: Path) -> ctypes.CDLL:
    """Compile all variants into a library in `folder`, which processes share."""
    library = folder / "kernels.so"
    with FileLock(folder / "lock"):
        if not library.is_file():
            objects = [folder / f"{function_of(variant)}.o" for variant in variants()]
            commands = [
                [*defines_of(variant), "-c", SOURCES / "variant.cpp", "-o", target]
                for variant, target in zip(variants(), objects, strict=True)
            ]
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(compile_with_gcc, commands))
            unfinished = folder / "unfinished.so"
            compile_with_gcc(["-shared", SOURCES / "block.cpp", *objects, "-o", unfinished])
            unfinished.rename(library)
    return ctypes.CDLL(str(library))


def compile_with_gcc(arguments: Sequence[object]) -> None:
    done = subprocess.run(["g++", *FLAGS, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]


def function_of(variant: Variant) -> str:
    """The name of a variant's function."""
    return "run_" + "_".join("".join(c if c.isalnum() else "_" for c in value) for value in variant.macros.values())


def defines_of(variant: Variant) -> list[str]:
    macros = {**variant.macros, "VARIANT_FUNCTION": function_of(variant)}
    return [f"-D{name}={value}" for name, value in macros.items()]


def run(
    library: ctypes.CDLL,
    plan: Plan,
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    """A [M, K] times a weight by a plan, as `teq_graph.kernels.cuda` launches it: [M, N]."""
    rows = cuda.aligned(cuda.pad_columns(a))
    m, n = rows.shape[0], b.shape[0]
    y = torch.full((m, n), float("nan"), dtype=a.dtype)
    splits = plan.grid[2]
    partial = torch.full((splits, m, n), float("nan")) if splits > 1 else None
    tensors = [rows, b, scales, zero_points, bias, y, partial]
    arguments = cuda.kernel_arguments(tensors, m, n, rows.shape[1], plan)
    function = library[function_of(plan.variant)]
    function.restype = ctypes.c_char_p
    matmul = Matmul(*(int(argument) for argument in arguments))
    error = function(ctypes.byref(matmul), *plan.grid, plan.shared_bytes)
    assert error is None, error.decode()
    return y


if __name__ == "__main__":
    build(Path(sys.argv[1]))
