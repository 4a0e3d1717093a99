"""The CUDA kernel on the CPU: its own source, a block of threads at a time (see tests/cuda_emulation)."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from filelock import FileLock
from torch import Tensor

from teq_graph.kernels import cuda
from teq_graph.kernels.parameters import MACROS, POINTERS, SIZES
from teq_graph.kernels.plan import Dequantizer, Plan, Variant, variants

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "tests" / "cuda_emulation"
KERNELS = ROOT / "kernels"
FLAGS = ["-std=c++20", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{SOURCES}"]


def build(folder: Path, kinds: Iterable[Variant] | None = None, kernels: Path = KERNELS) -> ctypes.CDLL:
    """Compile variants, or all, of the sources in `kernels` into a library in `folder`, which processes share."""
    library = folder / "kernels.so"
    with FileLock(folder / "lock"):
        if not library.is_file():
            # Variants are many and each runs for a moment: several share what a file includes, and only the
            # instructions and the switches between threads, where the time goes, are optimized.
            groups = itertools.groupby(kinds or variants(), lambda variant: (variant.dtype, variant.bits))
            objects, commands = [], []
            for index, (kind, group) in enumerate(groups):
                objects.append(folder / f"variants_{index}.o")
                defines = defines_of(group, Dequantizer(*kind))
                commands.append(["-Og", *defines, "-c", SOURCES / "variants.cpp", "-o", objects[-1]])
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(lambda command: compile_with_gcc(command, kernels), commands))
            unfinished = folder / "unfinished.so"
            optimized = [SOURCES / "block.cpp", SOURCES / "instructions.cpp"]
            compile_with_gcc(["-O2", "-shared", *optimized, *objects, "-o", unfinished], kernels)
            unfinished.rename(library)
    return ctypes.CDLL(str(library))


def compile_with_gcc(arguments: Sequence[object], kernels: Path = KERNELS) -> None:
    command = ["g++", *FLAGS, f"-I{kernels}", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:3000]


def constants(expressions: Sequence[str], folder: Path) -> list[int]:
    """The values of constants of the sources, by a program that is made in `folder`."""
    listed = ", ".join(f"static_cast<i64>({expression})" for expression in expressions)
    program = folder / "constants"
    compile_with_gcc([f"-DCONSTANTS={listed}", SOURCES / "constants.cpp", "-o", program])
    return [int(line) for line in subprocess.check_output([program], text=True).split()]


def function_of(variant: Variant | Dequantizer) -> str:
    """The name of a variant's function."""
    return "run_" + "_".join("".join(c if c.isalnum() else "_" for c in value) for value in variant.macros.values())


def defines_of(group: Iterable[Variant], dequantizer: Dequantizer) -> list[str]:
    """The macros of variants.cpp."""
    parts = ("VARIANT_TYPE", "VARIANT_BLOCK", "VARIANT_SCALE_SUMS", "VARIANT_TILING")
    calls = [f"VARIANT({', '.join([function_of(v), *(v.macros[part] for part in parts)])})" for v in group]
    other = f"DEQUANTIZER({', '.join([function_of(dequantizer), *dequantizer.macros.values()])})"
    macros = {**MACROS, "VARIANTS": " ".join(calls), "DEQUANTIZERS": other}
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
    tensors = {
        "a": rows,
        "b": b,
        "scales": scales,
        "zero_points": zero_points,
        "bias": bias,
        "y": y,
        "partial": partial,
    }
    arguments = cuda.kernel_arguments(tensors, m, n, rows.shape[1], plan)
    function = library[function_of(plan.variant)]
    function.restype = ctypes.c_char_p
    integers = len(SIZES) + len(plan.grid) + 1
    function.argtypes = [ctypes.c_void_p] * len(POINTERS) + [ctypes.c_int] * integers
    error = function(*map(int, arguments), *plan.grid, plan.shared_bytes)
    assert error is None, error.decode()
    return y


def dequantize(library: ctypes.CDLL, weight: cuda.Weight, floats: Tensor) -> None:
    """The weight as floats [N, K], as `teq_graph.kernels.cuda.dequantize` launches it."""
    function = library[function_of(Dequantizer(floats.dtype, weight.bits))]
    function.argtypes = [ctypes.c_void_p] * len(POINTERS) + [ctypes.c_int] * (len(SIZES) + 3)
    function.restype = None
    grid, threads, arguments = cuda.dequantizing_launch(weight, floats)
    function(*map(int, arguments), *grid[:2], threads)


if __name__ == "__main__":
    build(Path(sys.argv[1]))
