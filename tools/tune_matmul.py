"""Times every plan of the CUDA kernels that could serve a product, beside cuBLAS: what the table in kernels/plan.py is
made from.

    python tools/tune_matmul.py --shapes 28672x4096 --bits 4 --json plans.json

Method: as tools/bench_matmul.py, on random codes. Every plan's product is checked against float64 on fresh random data,
into a result that begins as not-a-number; then a CUDA graph of at least --calls calls is replayed, each on a copy of
the weight that is not in the L2 cache. Figures are medians over --rounds replays in which plans take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cuda_timing import capture, median_seconds
from torch import Tensor

from teq_graph.config import BITS
from teq_graph.kernels import cuda, plan, program
from teq_graph.kernels.cuda import Weight
from teq_graph.kernels.plan import Product
from teq_graph.kernels.tilings import AnyTiling, StreamTiling, TileTiling, WarpgroupTiling
from teq_graph.quantization.weight import dequantize_rows

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
STRETCHES = tuple(2**20 * mebibytes for mebibytes in (32, 64, 128, 1024))
"""Bytes of dequantized weights that are there at once."""
DEQUANTIZE_FROM = 64
OTHERS: tuple[AnyTiling, ...] = (
    StreamTiling(tokens=8, row_tiles=2, warps=8, stages=4, blocks=1),
    StreamTiling(tokens=8, row_tiles=2, warps=8, stages=4, blocks=2),
    StreamTiling(tokens=8, row_tiles=2, warps=4, stages=4, blocks=4),
    StreamTiling(tokens=16, row_tiles=2, warps=8, stages=4, blocks=1),
    StreamTiling(tokens=16, row_tiles=2, warps=8, stages=3, blocks=2),
    TileTiling(tokens=64, row_tiles=2, warps=8, stages=3, blocks=1),
    WarpgroupTiling(tokens=64, row_tiles=2, warpgroups=2, stages=4, blocks=1),
    WarpgroupTiling(tokens=128, row_tiles=2, warpgroups=2, stages=3, blocks=1),
    WarpgroupTiling(tokens=128, row_tiles=1, warpgroups=2, stages=4, blocks=1),
)
"""Tilings that kernels/plan.py does not have, to be tried."""


def random_weight(n: int, k: int, bits: int, group_size: int, dtype: torch.dtype) -> Weight:
    blocks = -(-k // group_size)
    codes = torch.randint(256, (n, blocks, group_size * bits // 8), dtype=torch.uint8, device="cuda")
    scales = ((torch.rand(n, blocks, device="cuda") + 0.5) * 2.0 ** (1 - bits) / k**0.5).to(dtype)
    zeros = torch.randint(256, (n, -(-blocks * bits // 8)), dtype=torch.uint8, device="cuda")
    return Weight(codes, scales, zeros, bits, group_size)


def copy_of(weight: Weight) -> Weight:
    assert weight.zero_points is not None
    return Weight(weight.b.clone(), weight.scales.clone(), weight.zero_points.clone(), weight.bits, weight.block_size)


def name_of(made: plan.Plan) -> str:
    tiling = made.variant.tiling
    numbers = ",".join(map(str, vars(tiling).values()))
    return f"{tiling.struct.removesuffix('Tiling') or 'General'}({numbers}) {'x'.join(map(str, made.grid))}"


def candidates(product: Product) -> Iterator[plan.Plan]:
    """Plans that may be the fastest."""
    for tiling in (*plan.tilings_of(product.bits), *OTHERS):
        fits = product.m <= tiling.tokens or tiling.tokens >= plan.TILE_64.tokens
        sensible = fits and (tiling.tokens <= 16 or tiling.tokens < 4 * product.m)
        if sensible and (made := plan.plan_by(product, tiling, program.device_of(0))):
            yield made


class Tuner:
    """One weight [n, k], as many copies as are twice the L2 cache, and the same as floats."""

    def __init__(self, n: int, k: int, bits: int, group_size: int, dtype: torch.dtype, calls: int) -> None:
        cache = 2 * torch.cuda.get_device_properties(0).L2_cache_size
        first = random_weight(n, k, bits, group_size, dtype)
        bytes_ = first.b.nbytes + first.scales.nbytes
        self.weights = [first, *(copy_of(first) for _ in range(min(64, max(2, -(-cache // bytes_))) - 1))]
        values = dequantize_rows(first.b, first.scales, first.zero_points, bits)[:, :k]
        self.rounded = values.to(dtype)
        self.floats = [self.rounded.clone() for _ in range(max(2, -(-cache // self.rounded.nbytes)))]
        self.exact = values.double().t()
        self.n, self.k, self.bits, self.group_size, self.dtype, self.calls = n, k, bits, group_size, dtype, calls

    def contenders(self, a: Tensor, y: Tensor) -> Iterator[tuple[str, list[Callable[[], Any]]]]:
        m = a.shape[0]
        yield "cuBLAS", [functools.partial(torch.mm, a, floats.t(), out=y) for floats in self.floats]
        product = Product(self.dtype, m, self.n, self.k, self.bits, self.group_size)
        for made in candidates(product):
            yield name_of(made), [functools.partial(cuda.multiply, made, a, w, None, y) for w in self.weights]
        if m >= DEQUANTIZE_FROM:
            stretches = {cuda.stretch_of(self.n, 2 * self.k, most): most for most in STRETCHES}
            for rows, most in stretches.items():
                calls = [functools.partial(cuda.multiply_dequantized, a, w, None, y, most) for w in self.weights]
                yield f"dequantized({rows})", calls

    def measure(self, m: int, rounds: int) -> dict[str, float]:
        """Microseconds a call."""
        a = torch.randn(m, self.k, device="cuda", dtype=self.dtype)
        expected = a.double() @ self.exact
        y = a.new_empty(m, self.n)
        replays: dict[str, Callable[[], Any]] = {}
        counts: dict[str, int] = {}
        for name, calls in self.contenders(a, y):
            y.fill_(float("nan"))
            try:
                calls[0]()
                torch.cuda.synchronize()
            except Exception as error:
                print(f"FAILED {name}: {' '.join(str(error).split())[:300]}", flush=True)
                continue
            error = float((y.double() - expected).norm() / expected.norm())
            if not error < TOLERANCE[self.dtype]:
                print(f"WRONG {self.n}x{self.k} m={m} bits={self.bits} {name}: relative error {error:.2e}", flush=True)
                continue
            repeated = calls * -(-self.calls // len(calls))
            counts[name] = len(repeated)
            replays[name] = capture(repeated).replay
        seconds = median_seconds(replays, rounds)
        return {name: value / counts[name] * 1e6 for name, value in seconds.items()}


def compile_all(architecture: str, bits: list[int], dtypes: list[torch.dtype]) -> None:
    """What will be measured into the cache, by many processes."""
    kinds: list[plan.Variant | plan.Dequantizer] = []
    for dtype in dtypes:
        for b in bits:
            product = Product(dtype, 1, 4096, 4096, b, 128)
            tilings = [t for t in (*plan.tilings_of(b), *OTHERS) if b != 8 or not isinstance(t, StreamTiling)]
            variants = (product.variant(tiling) for tiling in tilings)
            kinds += [*(v for v in variants if v.compiles_for(architecture)), plan.Dequantizer(dtype, b)]
    with multiprocessing.get_context("spawn").Pool() as pool:
        pool.map(functools.partial(compile_one, architecture), kinds, chunksize=1)


def compile_one(architecture: str, kind: plan.Variant | plan.Dequantizer) -> None:
    from cuda.core.utils import FileStreamProgramCache

    program.compile_variant(kind, architecture, cache=FileStreamProgramCache(program.cache_folder()))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["28672x4096", "4096x4096", "4096x14336"], metavar="NxK")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=1e9, help="no new product is begun after so many")
    parser.add_argument("--compile", metavar="SM", help="compile for this architecture (sm_90a, say), and stop")
    parser.add_argument("--best", type=int, default=3, help="how many plans of each product are printed")
    parser.add_argument("--json", type=Path, help="where all figures go, a line a product; they are added to the file")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    dtype = getattr(torch, args.dtype)
    begun = time.monotonic()
    if args.compile:
        compile_all(args.compile, args.bits, [dtype])
        print(f"compiled in {time.monotonic() - begun:.0f} s")
        return
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no NVIDIA GPU")
    compile_all(program.architecture_of(torch.cuda.get_device_capability()), args.bits, [dtype])
    torch.manual_seed(0)
    for shape in args.shapes:
        n, k = map(int, shape.split("x"))
        for bits in args.bits:
            if time.monotonic() - begun > args.seconds:
                print(f"{shape} {bits} bits and what follows: left out, no time")
                return
            tuner = Tuner(n, k, bits, args.group_size, dtype, args.calls)
            for m in args.tokens:
                times = tuner.measure(m, args.rounds)
                cublas = times["cuBLAS"]
                general = next((value for name, value in times.items() if name.startswith("General")), float("nan"))
                others = sorted((value, name) for name, value in times.items() if name != "cuBLAS")[: args.best]
                best = "  ".join(f"{value:.1f} {name}" for value, name in others)
                head = f"W{bits} {shape} {m:4}: {cublas:6.1f} {general:6.1f}"
                print(f"{head} x{cublas / others[0][0]:.2f}  {best}", flush=True)
                if args.json:
                    line = {"n": n, "k": k, "bits": bits, "dtype": args.dtype, "m": m, "us": times}
                    with args.json.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(line) + "\n")
            del tuner
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
