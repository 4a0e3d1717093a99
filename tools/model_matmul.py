"""What bounds a product on an H100: bytes, instructions, multiplications; from the machine code, without a GPU.

    python tools/model_matmul.py --shapes 28672x4096 --bits 4 --tokens 1 16 64 256

A row for each tiling that could serve the product, and the bounds in µs:

- memory: weights, scales and zero points once for each block over tokens, activations and results once, at what an H100
  reads cold weights at (measured);
- cache: what all blocks copy into shared memory, at {cache:g} GB/s, which is what is published for its L2 cache;
- issue: instructions of the loop over K, one a cycle of each of a multiprocessor's four schedulers, those for the next
  group's scales as often as they stand there;
- tensor: multiplications of the loop, at {fma} a cycle of a multiprocessor, by `mma.sync` at {share:.0%} of that.

The last two count what a multiprocessor does one after the other: blocks that have room at once share it, and the last
of them may find others idle. The least time is the greatest of the four. What a block costs to begin and to end, and
what waits for what, is in no bound: times that were measured are in kernels/README.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from machine_code import MachineCode, machine_code
from markdown_table import table_of

from teq_graph.config import BITS
from teq_graph.kernels import plan
from teq_graph.kernels.plan import Device, Plan, Product
from teq_graph.kernels.tilings import LANES, STEP, StreamTiling, Tiling, WarpgroupTiling, ceil_div

H100 = Device(132, plan.HOPPER_SHARED_LIMIT, warpgroups=True)
ARCHITECTURE = "sm_90a"
CYCLES = 1755.0
"""A microsecond."""
MEMORY, CACHE = 2770.0, 5500.0
"""GB/s."""
MULTIPLICATIONS, OF_MMA = 2048, 0.62
"""Of 16-bit floats, a cycle of a multiprocessor; and the part of them that mma.sync reaches, as published."""
SCHEDULERS = 4


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Microseconds."""

    memory: float
    cache: float
    issue: float
    tensor: float

    @property
    def least(self) -> float:
        return max(dataclasses.astuple(self))


def instructions_of_step(code: MachineCode, made: Plan) -> int:
    """Of a warp, for 128 elements of K of its rows."""
    product = "HGMMA" if isinstance(made.variant.tiling, WarpgroupTiling) else "HMMA"
    step, inner = code.innermost(product, "LDGSTS"), code.innermost(product)
    tiles = made.variant.tiling.row_tiles * made.variant.tiling.tokens // 8
    repeated = 1 if product == "HGMMA" else tiles * STEP // 16 // inner.count("HMMA")
    return len(step) + (repeated - 1) * len(inner)


def bounds_of(made: Plan, product: Product, instructions: int) -> Bounds:
    tiling = made.variant.tiling
    _, down, splits = made.grid
    weights = product.n * product.k * product.bits / 8
    grids = product.n * product.blocks * (2 + product.bits / 8)
    activations, results = 2 * product.m * product.k, 2 * product.m * product.n
    partial = 8 * splits * product.m * product.n if splits > 1 else 0
    across = ceil_div(product.n, tiling.rows)  # of tiles: blocks that stay have several
    copied = down * (weights + grids) + across * activations
    tiles = across * down * splits
    steps = ceil_div(min(made.split, product.k), STEP)
    # A multiprocessor has `turns` tiles one after the other, side by side where several blocks have room.
    turns = ceil_div(tiles, H100.processors)
    warps = tiling.threads // LANES
    steps_of_warp = ceil_div(steps, tiling.warps) if isinstance(tiling, StreamTiling) else steps
    rate = MULTIPLICATIONS * (1.0 if isinstance(tiling, WarpgroupTiling) else OF_MMA)
    return Bounds(
        memory=(down * (weights + grids) + activations + results + partial) / MEMORY / 1e3,
        cache=copied / CACHE / 1e3,
        issue=turns * steps_of_warp * instructions * warps / SCHEDULERS / CYCLES,
        tensor=turns * steps * STEP * tiling.rows * tiling.tokens / rate / CYCLES,
    )


def candidates(product: Product) -> Iterator[Plan]:
    """By the kernels that this tool knows the loops of, with tilings for about as many tokens."""
    for tiling in plan.tilings_of(product.bits):
        made = plan.plan_by(product, tiling, H100)
        fits = min(product.m, 64) <= tiling.tokens < 4 * max(product.m, 4)
        if made is not None and fits and not isinstance(tiling, Tiling):
            yield made


def parse_arguments() -> argparse.Namespace:
    described = (__doc__ or "").format(cache=CACHE, fma=MULTIPLICATIONS, share=OF_MMA)
    parser = argparse.ArgumentParser(description=described, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["28672x4096"], metavar="NxK")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=[4])
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 16, 32, 64, 128, 256, 512, 2048])
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    rows, counted = [], dict[plan.Variant, int]()
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shapes:
            n, k = map(int, shape.split("x"))
            for bits in args.bits:
                for m in args.tokens:
                    product = Product(torch.float16, m, n, k, bits, args.group_size)
                    for made in candidates(product):
                        if made.variant not in counted:
                            code = machine_code(made.variant, ARCHITECTURE, Path(folder))
                            counted[made.variant] = instructions_of_step(code, made)
                        bounds = bounds_of(made, product, counted[made.variant])
                        figures = {f"{name}, µs": f"{us:.1f}" for name, us in dataclasses.asdict(bounds).items()}
                        row = {"product": f"{m} × {k} × {n}, W{bits}", "tiling": str(made.variant.tiling)}
                        rows.append({**row, **figures, "least, µs": f"{bounds.least:.1f}"})
    print(table_of(rows))


if __name__ == "__main__":
    main()
