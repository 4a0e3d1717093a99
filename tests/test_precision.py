"""Products while codes are chosen are as exact as the codes, and no other product is any less exact for it."""

import contextlib

import pytest
import torch

from teq_graph.config import WeightSpec
from teq_graph.training.precision import Precision


@pytest.fixture
def bfloat16_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


@pytest.mark.usefixtures("bfloat16_hardware")
@pytest.mark.parametrize(
    ("dtypes", "bits", "expected"),
    [
        ((torch.float32, torch.float32), (2, 4), True),
        ((torch.float32, torch.float32), (3, 8), False),
        ((torch.float32, torch.float16), (3, 3), False),
        ((), (), False),
    ],
    ids=str,
)
def test_which_codes_are_coarse_enough(dtypes: tuple[torch.dtype, ...], bits: tuple[int, ...], expected: bool) -> None:
    weights = [torch.randn(4, 32).to(dtype) for dtype in dtypes]
    precision = Precision.for_codes(iter(weights), iter([WeightSpec(b, 16) for b in bits]))
    assert precision == Precision("cpu", expected)
    assert precision.weight_dtype(torch.float32) == (torch.bfloat16 if expected else torch.float32)


def test_hardware_without_such_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert not Precision.for_codes([torch.randn(4, 32)], [WeightSpec(3, 16)]).is_bfloat16


def test_products_in_bfloat16() -> None:
    x, weight = torch.randn(8, 64), torch.randn(16, 64)
    for is_bfloat16, dtype in ((True, torch.bfloat16), (False, torch.float32)):
        with Precision("cpu", is_bfloat16).products():
            assert torch.nn.functional.linear(x, weight).dtype == dtype
    assert torch.nn.functional.linear(x, weight).dtype == torch.float32


def test_products_of_rounded_inputs_are_float32_and_end_with_their_block() -> None:
    x, weight = torch.randn(64, 256), torch.randn(128, 256)
    exact = torch.nn.functional.linear(x.double(), weight.double())
    before = torch.nn.functional.linear(x, weight)
    settings = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    with contextlib.suppress(ZeroDivisionError), Precision("cpu", True).inputs():
        rounded = torch.nn.functional.linear(x, weight)
        raise ZeroDivisionError
    assert torch.backends.mkldnn.matmul.fp32_precision == settings  # type: ignore[attr-defined]
    assert torch.equal(torch.nn.functional.linear(x, weight), before)
    # As far from exact as numbers of 8 significant bits; where the hardware has no such products, not at all.
    error = float((rounded - exact).norm() / exact.norm())
    assert rounded.dtype == torch.float32 and error < 2**-8
    with Precision("cpu", False).inputs():
        assert torch.equal(torch.nn.functional.linear(x, weight), before)
