"""Every kernel once or twice on small products, for compute-sanitizer: all that they read and write is looked at."""

from __future__ import annotations

import torch

from teq_graph.config import BITS, WeightSpec
from teq_graph.kernels import cuda, plan, program
from teq_graph.kernels.plan import Product
from teq_graph.quantization import quantize_weight

N, GROUP_SIZE = 70, 128
KS = (1152, 1216)
"""Whole steps of 128, one for each of a block's eight warps and one more; and what ends inside a step."""
DTYPE = torch.float16


def multiply_all(bits: int, k: int) -> int:
    """How many products there were; raises AssertionError where one left an output out."""
    weight = quantize_weight(torch.randn(N, k), WeightSpec(bits, GROUP_SIZE), DTYPE)
    assert weight.zero_points is not None
    parts = (weight.packed.cuda(), weight.scales.cuda(), weight.zero_points.cuda())
    moved = cuda.Weight(*parts, bits, GROUP_SIZE)
    floats = torch.full((N, k), float("nan"), dtype=DTYPE, device="cuda")
    cuda.dequantize(moved, floats)
    assert floats.cpu().isfinite().all()
    count = 1
    for tiling in plan.tilings_of(bits):
        for m in sorted({1, tiling.tokens + 1}):
            made = plan.plan_by(Product(DTYPE, m, N, k, bits, GROUP_SIZE), tiling, program.device_of(0))
            if made is None:
                continue
            y = torch.full((m, N), float("nan"), dtype=DTYPE, device="cuda")
            cuda.multiply(made, torch.randn(m, k).to("cuda", DTYPE), moved, None, y)
            assert y.cpu().isfinite().all(), f"{bits} bits, {m} × {N} × {k}, {tiling}"
            count += 1
    return count


if __name__ == "__main__":
    torch.manual_seed(0)
    print(f"{sum(multiply_all(bits, k) for bits in BITS for k in KS)} launches")
