"""Weights that learn: where they start, what they stand for, and gradients against autograd in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from teq_graph.config import BITS, WeightSpec
from teq_graph.quantization import Grid, LearnedWeight, ScaledCodes, dequantize, find_grid, quantize

SPECS = [WeightSpec(*values) for values in itertools.product(BITS, (16, 32, -1), (False, True))]
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def random_codes(n: int, k: int, bits: int) -> Tensor:
    return torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)


def started(
    spec: WeightSpec, n: int = 6, k: int = 83, scale_dtype: torch.dtype = torch.float32, size: float = 1.0
) -> LearnedWeight:
    weight = torch.randn(n, k) * size
    return LearnedWeight.start(weight, random_codes(n, k, spec.bits), find_grid(weight, spec, scale_dtype), scale_dtype)


def change(learned: LearnedWeight, size: float) -> None:
    """Random changes, past the ends of the codes and of the zero points, too."""
    learned.latent.add_(torch.randn_like(learned.latent) * size * 2 ** (learned.bits - 1))
    learned.log_scale.add_(torch.randn_like(learned.log_scale) * size)
    if not learned.symmetric:
        learned.zero.add_(torch.randn_like(learned.zero) * size * 2**learned.bits)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("k", [83, 1])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_it_starts_at_the_given_codes(spec: WeightSpec, k: int, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(5, k)
    weight[3] = 0
    grid = find_grid(weight, spec, scale_dtype)
    for codes in (quantize(weight, grid), random_codes(5, k, spec.bits)):
        learned = LearnedWeight.start(weight, codes, grid, scale_dtype)
        result, same = learned.result()
        assert result.dtype == torch.uint8 and torch.equal(result, codes)
        assert torch.equal(same.scales, grid.scales)
        assert (same.bits, same.block_size) == (grid.bits, grid.block_size)
        assert (same.zero_points is None) == (grid.zero_points is None) == spec.symmetric
        if same.zero_points is not None and grid.zero_points is not None:
            assert same.zero_points.dtype == torch.uint8 and torch.equal(same.zero_points, grid.zero_points)
        assert torch.equal(learned.value(), dequantize(codes, grid))


def test_it_starts_as_near_to_the_weight_as_its_codes_allow() -> None:
    weight = torch.randn(5, 40)
    grid = find_grid(weight, WeightSpec(4, 16))
    nearest = LearnedWeight.start(weight, quantize(weight, grid), grid, torch.float32)
    steps = grid.scales.repeat_interleave(16, dim=1)[:, :40]
    latent = nearest.latent.flatten(1)[:, :40] * steps
    assert bool(((latent - weight).abs() <= 0.0201 * steps).all())
    assert float((latent == weight).double().mean()) > 0.9 or torch.allclose(latent, weight, atol=2e-2)


@pytest.mark.parametrize("size", [0.01, 0.3, 2.0])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_the_value_is_that_of_the_result(spec: WeightSpec, scale_dtype: torch.dtype, size: float) -> None:
    for magnitude in (1.0, 1e-6):
        learned = started(spec, scale_dtype=scale_dtype, size=magnitude)
        change(learned, size)
        codes, grid = learned.result()
        assert codes.shape == (6, 83) and int(codes.max()) < 2**spec.bits
        assert torch.equal(grid.scales.to(scale_dtype).float(), grid.scales)
        assert bool((grid.scales != 0).all())
        value = learned.value()
        assert value.shape == (6, 83) and torch.equal(value, dequantize(codes, grid))


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    return exact + (rounded.double() - exact).detach()


def reference_value(learned: LearnedWeight, latent: Tensor, log_scale: Tensor, zero: Tensor) -> Tensor:
    """The formula by autograd in float64; only what is rounded to is taken from the result."""
    codes, grid = learned.result()
    top = 2**learned.bits - 1
    scale = straight_through(learned.step.double() * log_scale.exp(), grid.scales)[..., None]
    z = straight_through(zero, grid.zero_points_as_float())[..., None]
    t = latent * torch.exp(-log_scale)[..., None]
    rounded = straight_through(t, (learned.latent * torch.exp(-learned.log_scale)[..., None]).round())
    value = ((rounded + z).clamp(0, top) - z) * scale
    return value.flatten(1)[:, : codes.shape[1]]


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("k", [83, 5])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_are_those_of_autograd(spec: WeightSpec, k: int, scale_dtype: torch.dtype) -> None:
    learned = started(spec, k=k, scale_dtype=scale_dtype)
    change(learned, 0.1)
    learned.latent[0] += 2.0**spec.bits  # clipped, all of it
    incoming = torch.randn(6, k)
    names = ("latent", "log_scale", "zero")
    leaves = [getattr(learned, name).requires_grad_() for name in names]
    actual = torch.autograd.grad(learned.value(), leaves, incoming)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    for leaf in leaves:
        leaf.requires_grad_(False)
    value = reference_value(learned, *exact)
    torch.testing.assert_close(learned.value().double(), value.detach(), rtol=1e-6, atol=1e-7)
    expected = torch.autograd.grad(value, exact, incoming.double())
    clipped = (expected[0].flatten(1)[:, :k] == 0).double().mean()
    assert 0.05 < float(clipped) < 0.95
    # What is summed over a group partly cancels: float32 is exact to a part of what goes in.
    padded = torch.nn.functional.pad(incoming, (0, -k % learned.block_size)).view(learned.latent.shape)
    terms = (padded * (1 + exact[0].detach().abs()) * learned.step[..., None]).abs().sum(-1)
    sizes = {"latent": expected[0].abs().max(), "log_scale": terms.max(), "zero": terms.max()}
    for name, mine, reference in zip(names, actual, expected, strict=True):
        assert mine.dtype == torch.float32 and mine.shape == reference.shape
        assert float((mine.double() - reference).abs().max()) <= 2e-6 * float(sizes[name]), name
        assert float(reference.abs().max()) > 0, name


def test_the_gradient_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    learned, incoming = started(WeightSpec(3, 16), n=40, k=83), torch.randn(40, 83)
    change(learned, 0.1)
    leaves = [tensor.requires_grad_() for tensor in (learned.latent, learned.log_scale, learned.zero)]
    outcomes = []
    for tile in (2**18, 200, 1):
        monkeypatch.setattr("teq_graph.quantization.learned.TILE", tile)
        value = learned.value()
        outcomes.append((value, *torch.autograd.grad(value, leaves, incoming)))
    for outcome in outcomes[1:]:
        for mine, first in zip(outcome, outcomes[0], strict=True):
            torch.testing.assert_close(mine, first, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [64, 83])
def test_a_value_for_products_in_bfloat16(k: int) -> None:
    learned, incoming = started(WeightSpec(3, 16), k=k), torch.randn(6, k).bfloat16()
    change(learned, 0.1)
    leaves = [tensor.requires_grad_() for tensor in (learned.latent, learned.log_scale, learned.zero)]
    exact, rounded = learned.value(), learned.value(torch.bfloat16)
    # A product computes the gradient of a weight that is not contiguous in another layout, which costs more.
    assert rounded.is_contiguous() and torch.equal(rounded, exact.bfloat16())
    for mine, expected in zip(
        torch.autograd.grad(rounded, leaves, incoming),
        torch.autograd.grad(exact, leaves, incoming.float()),
        strict=True,
    ):
        assert torch.equal(mine, expected)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_that_stay_on_scales_that_learn(spec: WeightSpec, scale_dtype: torch.dtype) -> None:
    weight, incoming = torch.randn(6, 83), torch.randn(6, 83)
    grid = find_grid(weight, spec, scale_dtype)
    scaled = ScaledCodes(quantize(weight, grid), grid, scale_dtype)
    scaled.log_scale.add_(torch.randn_like(scaled.log_scale) * 0.1).requires_grad_()
    value = scaled.value(scale_dtype)
    assert value.dtype == scale_dtype
    (actual,) = torch.autograd.grad(value, scaled.log_scale, incoming.to(scale_dtype))
    exact = scaled.log_scale.detach().double().requires_grad_()
    grown = exact.exp().repeat_interleave(grid.block_size, 1)[:, :83]
    wanted = dequantize(scaled.codes, grid).double() * grown
    (expected,) = torch.autograd.grad(wanted, exact, incoming.to(scale_dtype).double())
    # The exponential and two products are rounded.
    torch.testing.assert_close(value.double(), wanted.detach(), rtol=2 * torch.finfo(scale_dtype).eps, atol=0)
    assert float((actual - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
    scaled.log_scale.requires_grad_(False)
    codes, found = scaled.result()
    assert torch.equal(codes, scaled.codes)
    torch.testing.assert_close(dequantize(codes, found).to(scale_dtype), value.detach())


def test_only_what_is_asked_for_has_a_gradient() -> None:
    learned = started(WeightSpec(4, 16))
    learned.log_scale.requires_grad_()
    learned.value().sum().backward()
    assert learned.log_scale.grad is not None
    assert learned.latent.grad is None and learned.zero.grad is None


def least_squares(
    learned: LearnedWeight, weight: Tensor, inputs: Tensor, trained: list[Tensor], rate: float = 5e-3
) -> float:
    """The relative error of the outputs after 200 steps of Adam, of falling rate, on `trained`."""
    optimizer = torch.optim.Adam([tensor.requires_grad_() for tensor in trained], lr=rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0, 200)
    target = inputs @ weight.T
    for _ in range(200):
        optimizer.zero_grad()
        (inputs @ learned.value().T - target).square().mean().backward()
        optimizer.step()
        schedule.step()
    for tensor in trained:
        tensor.requires_grad_(False)
    return relative_output_error(dequantize(*learned.result()), weight, inputs)


def relative_output_error(value: Tensor, weight: Tensor, inputs: Tensor) -> float:
    return float((inputs @ (value - weight).T).square().sum() / (inputs @ weight.T).square().sum())


@pytest.mark.parametrize("parts", [("latent",), ("latent", "log_scale", "zero")], ids="+".join)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_training_reduces_the_error(bits: int, symmetric: bool, parts: tuple[str, ...]) -> None:
    weight = torch.randn(32, 56)
    inputs = torch.randn(256, 14) @ torch.randn(14, 56) + 0.2 * torch.randn(256, 56)
    grid: Grid = find_grid(weight, WeightSpec(bits, 16, symmetric))
    learned = LearnedWeight.start(weight, quantize(weight, grid), grid, torch.float32)
    before = relative_output_error(learned.value(), weight, inputs)
    trained = [getattr(learned, part) for part in parts if not (symmetric and part == "zero")]
    after = least_squares(learned, weight, inputs, trained)
    assert after < 0.6 * before


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_training_finds_the_scales(bits: int) -> None:
    """From scales that are twice as large as they need to be."""
    weight, inputs = torch.randn(32, 56), torch.randn(256, 56)
    whole = find_grid(weight, WeightSpec(bits, 16))
    grid = Grid(whole.scales * 2, whole.zero_points, bits, 16)
    learned = LearnedWeight.start(weight, quantize(weight, grid), grid, torch.float32)
    before = relative_output_error(learned.value(), weight, inputs)
    after = least_squares(learned, weight, inputs, [learned.log_scale], rate=2e-2)
    assert after < 0.6 * before
    assert float(learned.log_scale.mean()) < -0.2
