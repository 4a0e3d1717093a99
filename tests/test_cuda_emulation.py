"""The emulation of the CUDA kernels notices what a GPU would not forgive."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from support import cuda_emulation

from teq_graph.config import WeightSpec
from teq_graph.kernels import plan
from teq_graph.kernels.plan import Device, Product
from teq_graph.quantization import quantize_weight

PUBLISH, COPIES = "    publish_to_products();\n", "    wait_for_copies<STAGES - 3>();\n"
FAULTS = {
    "nothing": ("", ""),
    "copies that products are not told of": (PUBLISH, ""),
    "copies that products are told of too early": (COPIES + PUBLISH, PUBLISH + COPIES),
    "copies that have not arrived": ("wait_for_copies<STAGES - 3>", "wait_for_copies<STAGES - 2>"),
    "copies into what is being multiplied": (
        "stage < 2 ? stage + STAGES - 2 : stage - 2",
        "stage < 1 ? stage + STAGES - 1 : stage - 1",
    ),
    "threads that do not wait for each other": ("    __syncthreads();\n    // Products", "    // Products"),
    "weights that are overwritten while they multiply": ("wait_for_products<1>()", "wait_for_products<2>()"),
    "sums that are read while they are added to": ("  wait_for_products<0>();\n", ""),
    "products without a fence": ("  fence_products();\n", ""),
    "activations in the wrong places": ("piece % 8 ^ token % 8", "piece % 8"),
}
"""A change of warpgroups.cuh that brings it about."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_warpgroups_are_noticed(fault: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    right, wrong = FAULTS[fault]
    kernels = tmp_path / "kernels"
    shutil.copytree(cuda_emulation.KERNELS, kernels)
    source = kernels / "warpgroups.cuh"
    text = source.read_text(encoding="utf-8")
    assert right in text
    source.write_text(text.replace(right, wrong, 1), encoding="utf-8")

    weight = quantize_weight(torch.randn(123, 1000), WeightSpec(4, 32), torch.float16)
    a = torch.randn(59, 1000).half()
    product = Product(a.dtype, len(a), weight.n, weight.k, weight.bits, weight.block_size)
    made = plan.plan_by(product, plan.GROUPS_64, Device(1, plan.HOPPER_SHARED_LIMIT, warpgroups=True))
    assert made is not None
    library = cuda_emulation.build(tmp_path, [made.variant], kernels)
    expected = a.double() @ weight.dequantize(a.dtype).double().t()
    try:
        y = cuda_emulation.run(library, made, a, weight.packed, weight.scales, weight.zero_points, None)
    except AssertionError:  # of the emulation
        is_right = False
    else:
        is_right = bool(((y.double() - expected).abs() <= 1e-3 * expected.abs().max()).all())
    assert is_right == (fault == "nothing")
