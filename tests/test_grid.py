"""Grids, codes and fake quantization against the formulas, in float64 and by autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from teq_graph.config import BITS, GROUP_SIZES, WeightSpec
from teq_graph.errors import ConfigError, InputError, NumericsError
from teq_graph.quantization import (
    Grid,
    dequantize,
    fake_quantize,
    find_grid,
    num_blocks,
    quantize,
    resolve_block_size,
    round_scales,
)

SPECS = [WeightSpec(*values) for values in itertools.product(BITS, GROUP_SIZES, (False, True))]
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def group_slices(k: int, block: int) -> list[slice]:
    return [slice(start, min(start + block, k)) for start in range(0, k, block)]


@pytest.mark.parametrize(
    ("k", "group_size", "block", "blocks"),
    [(64, 16, 16, 4), (65, 16, 16, 5), (10, 128, 128, 1), (64, -1, 64, 1), (65, -1, 72, 1), (1, -1, 8, 1)],
)
def test_block_sizes(k: int, group_size: int, block: int, blocks: int) -> None:
    assert resolve_block_size(k, group_size) == block
    assert num_blocks(k, block) == blocks


@pytest.mark.parametrize("k", [256, 300, 7])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_find_grid_is_the_formula_group_by_group(spec: WeightSpec, k: int) -> None:
    weight = torch.randn(5, k) + 0.3
    grid = find_grid(weight, spec)
    block = resolve_block_size(k, spec.group_size)
    assert grid.block_size == block
    assert grid.bits == spec.bits
    assert grid.scales.shape == (5, num_blocks(k, block))
    assert grid.scales.dtype == torch.float32
    levels = 2**spec.bits - 1
    for row in range(5):
        for index, of in enumerate(group_slices(k, block)):
            values = weight[row, of].double()
            low, high = min(values.min().item(), 0.0), max(values.max().item(), 0.0)
            scale = grid.scales[row, index].item()
            if spec.symmetric:
                extreme = high if high > -low else low
                assert grid.zero_points is None
                assert scale == pytest.approx(extreme / -(2 ** (spec.bits - 1)), rel=1e-6)
            else:
                assert grid.zero_points is not None
                assert grid.zero_points.dtype == torch.uint8
                assert scale == pytest.approx((high - low) / levels, rel=1e-6)
                # Half a code of slack around ties, which float32 may take to either side.
                assert abs(grid.zero_points[row, index].item() - min(max(-low / scale, 0), levels)) <= 0.5 + 1e-4


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("k", [256, 300])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_codes_are_nearest(spec: WeightSpec, k: int, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(4, k)
    grid = find_grid(weight, spec, scale_dtype)
    assert torch.equal(grid.scales.to(scale_dtype).float(), grid.scales)
    codes = quantize(weight, grid)
    values = dequantize(codes, grid)
    assert codes.dtype == torch.uint8
    assert codes.shape == weight.shape
    assert int(codes.max()) < 2**spec.bits
    zeros = grid.zero_points_as_float().double()
    for index, of in enumerate(group_slices(k, grid.block_size)):
        scale, zero = grid.scales[:, index, None].double(), zeros[:, index, None]
        levels = torch.arange(2**spec.bits, dtype=torch.float64)
        candidates = (levels - zero) * scale  # [4, levels]
        nearest = (weight[:, of, None].double() - candidates[:, None]).abs().amin(dim=-1)
        error = (weight[:, of].double() - values[:, of].double()).abs()
        assert torch.all(error <= nearest + 1e-5 * scale.abs())
        torch.testing.assert_close(
            values[:, of].double(), candidates.gather(1, codes[:, of].long()), rtol=1e-6, atol=1e-12
        )


@pytest.mark.parametrize("spec", [WeightSpec(4, 16, True), WeightSpec(2, 16, True)], ids=str)
def test_symmetric_extreme_is_exact_and_the_scale_is_signed(spec: WeightSpec) -> None:
    weight = torch.rand(6, 16) * 0.5
    weight[:3, 4] = 3.0
    weight[3:, 4] = -3.0
    grid = find_grid(weight, spec)
    assert torch.all(grid.scales[:3] < 0)
    assert torch.all(grid.scales[3:] > 0)
    codes = quantize(weight, grid)
    assert torch.all(codes[:, 4] == 0)
    assert torch.equal(dequantize(codes, grid)[:, 4], weight[:, 4])


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("spec", [s for s in SPECS if s.group_size in (16, -1)], ids=str)
def test_zero_groups_have_scale_one(spec: WeightSpec, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(3, 24)
    weight[1] = 0
    weight[2] = -0.0
    grid = find_grid(weight, spec, scale_dtype)
    assert torch.all(grid.scales[1:] == 1)
    assert torch.all(dequantize(quantize(weight, grid), grid)[1:] == 0)


@pytest.mark.parametrize("magnitude", [1e-45, 1e-42, 1e-38, 1e-30, 3e-8, 1e-6, 1e-4, 1e-3])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_tiny_ranges_stay_finite(bits: int, symmetric: bool, scale_dtype: torch.dtype, magnitude: float) -> None:
    spec = WeightSpec(bits, 16, symmetric)
    weight = torch.empty(8, 20).uniform_(-1, 1) * magnitude
    grid = find_grid(weight, spec, scale_dtype)
    stored = grid.scales.to(scale_dtype)
    assert torch.all(stored != 0)
    assert torch.all(stored.isfinite())
    assert torch.equal(stored.float(), grid.scales)
    values = dequantize(quantize(weight, grid), grid)
    assert torch.all(values.isfinite())
    # Symmetric codes lack one level on one side: up to a whole step there, half a step elsewhere. A scale that is
    # rounded down moves the ends of the range by up to 2**bits of its half ulps.
    bound = (1.001 if symmetric else 0.501) + 2**bits * torch.finfo(scale_dtype).eps / 2
    steps = grid.scales.abs().repeat_interleave(16, dim=1)[:, :20]
    assert torch.all((values - weight).abs() <= steps * bound)
    assert torch.equal(fake_quantize(weight, spec, scale_dtype=scale_dtype), values)


def test_round_scales() -> None:
    scales = torch.tensor([0.0, 1e-45, -1e-45, 1e-9, -1e-9, 5e-8, 1 / 3, -1 / 3])
    rounded = round_scales(scales, torch.float16)
    smallest = 2.0**-24
    expected = torch.tensor([1.0, smallest, -smallest, smallest, -smallest, smallest, 1365 / 4096, -1365 / 4096])
    assert torch.equal(rounded, expected)
    assert torch.equal(round_scales(torch.tensor([1 / 3]), torch.float32), torch.tensor([1 / 3]))
    with pytest.raises(ConfigError, match=r"scale_dtype=torch\.float64"):
        round_scales(scales, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("k", [256, 300])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_fake_quantize_equals_quantize(spec: WeightSpec, k: int, scale_dtype: torch.dtype, dtype: torch.dtype) -> None:
    weight = torch.randn(6, k).to(dtype)
    # Ties: max == -min makes round(-min / scale) and round(max / scale) both halves.
    weight[0, :2] = torch.tensor([4.0, -4.0])
    weight[1] = weight[1].round()
    weight[2] = -weight[2].abs() - 0.1
    grid = find_grid(weight, spec, scale_dtype)
    expected = dequantize(quantize(weight, grid), grid).to(dtype)
    result = fake_quantize(weight, spec, scale_dtype=scale_dtype)
    assert result.dtype == dtype
    assert torch.equal(result, expected)


def test_fake_quantize_tiles_and_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, incoming = torch.randn(40, 72), torch.randn(40, 72)
    for symmetric in (False, True):
        spec = WeightSpec(3, 32, symmetric)
        outcomes = []
        for tile in (2**18, 200, 1):
            monkeypatch.setattr("teq_graph.quantization.grid.TILE", tile)
            for leaf in (weight.clone(), weight.t().contiguous().t()):
                leaf.requires_grad_()
                rounded = fake_quantize(leaf, spec)
                outcomes.append((rounded, *torch.autograd.grad(rounded, leaf, incoming)))
        for rounded, grad in outcomes[1:]:
            assert torch.equal(rounded, outcomes[0][0])
            torch.testing.assert_close(grad, outcomes[0][1], rtol=1e-6, atol=1e-6)


def straight_through(exact: Tensor, rounded: Tensor) -> Tensor:
    return exact + (rounded.double() - exact).detach()


def naive_range_gradient(weight: Tensor, incoming: Tensor, spec: WeightSpec, scale_dtype: torch.dtype) -> Tensor:
    """Autograd in float64 through the formulas, group by group; only roundings are decided in float32."""
    grid = find_grid(weight, spec, scale_dtype)
    zeros = grid.zero_points_as_float()
    leaf = weight.double().requires_grad_()
    levels, middle = 2**spec.bits - 1, 2 ** (spec.bits - 1)
    columns = []
    for index, of in enumerate(group_slices(weight.shape[1], grid.block_size)):
        group = leaf[:, of]
        low = group.amin(dim=1, keepdim=True).clamp(max=0)
        high = group.amax(dim=1, keepdim=True).clamp(min=0)
        ideal = torch.where(high > -low, high, low) / -middle if spec.symmetric else (high - low) / levels
        scale = straight_through(ideal, grid.scales[:, index, None])
        steps = straight_through(group / scale, (weight[:, of] / grid.scales[:, index, None]).round())
        zero = zeros[:, index, None].double()
        if not spec.symmetric:
            zero = straight_through(-low / scale, zero).clamp(0, levels)
        columns.append(((steps + zero).clamp(0, levels) - zero) * scale)
    return torch.autograd.grad(torch.cat(columns, dim=1), leaf, incoming.double())[0]


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("k", [256, 300, 20])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_range_gradient_is_autograd_with_straight_through_rounding(
    spec: WeightSpec, k: int, scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(12, k)
    weight[0, :2] = torch.tensor([5.0, -5.0])  # clips in asymmetric codes: both ends round up
    weight[1] = weight[1].abs() + 0.1  # one-sided groups: 0 is the low end, and no element
    weight[2] = -weight[2].abs() - 0.1
    weight[3] = weight[3].clamp(-0.5, 0.7)  # many elements share each end
    incoming = torch.randn(12, k)
    leaf = weight.clone().requires_grad_()
    (result,) = torch.autograd.grad(fake_quantize(leaf, spec, "range", scale_dtype), leaf, incoming)
    expected = naive_range_gradient(weight, incoming, spec, scale_dtype)
    torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-4)


def test_range_gradient_has_both_clipped_and_kept_paths() -> None:
    """The cases of the gradient test really occur: asymmetric clipping only by a tie, symmetric clipping often."""
    weight = torch.zeros(1, 16)
    weight[0, :2] = torch.tensor([5.0, -5.0])
    grid = find_grid(weight, WeightSpec(4, 16))
    assert grid.zero_points is not None
    assert int(grid.zero_points) == 8
    assert int(quantize(weight, grid)[0, 0]) == 15
    assert float((weight / grid.scales).round()[0, 0]) == 8.0


def test_identity_gradient() -> None:
    leaf = torch.randn(4, 40, requires_grad=True)
    incoming = torch.randn(4, 40)
    (result,) = torch.autograd.grad(fake_quantize(leaf, WeightSpec(2, 16), "identity"), leaf, incoming)
    assert torch.equal(result, incoming)


@pytest.mark.parametrize("gradient", ["identity", "range"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_gradients(dtype: torch.dtype, gradient: str) -> None:
    leaf = torch.randn(4, 40).to(dtype).requires_grad_()
    incoming = torch.randn(4, 40).to(dtype)
    (result,) = torch.autograd.grad(fake_quantize(leaf, WeightSpec(3, 16), gradient), leaf, incoming)  # type: ignore[arg-type]
    wide = leaf.detach().float().requires_grad_()
    (expected,) = torch.autograd.grad(fake_quantize(wide, WeightSpec(3, 16), gradient), wide, incoming.float())  # type: ignore[arg-type]
    assert result.dtype == dtype
    assert torch.equal(result, expected.to(dtype))


@pytest.mark.parametrize("symmetric", [False, True])
def test_all_zero_and_tiny_groups_have_finite_gradients(symmetric: bool) -> None:
    weight = torch.randn(3, 32)
    weight[0] = 0
    weight[1] *= 1e-41
    leaf = weight.requires_grad_()
    (result,) = torch.autograd.grad(fake_quantize(leaf, WeightSpec(4, 16, symmetric)).sum(), leaf)
    assert torch.all(result.isfinite())
    assert torch.equal(result[0], torch.ones(32))


def test_scales_are_learned_through_the_range_gradient() -> None:
    """A scale per input channel, as a training step has it: `"range"` sees what a scale does to a group's step."""
    weight = torch.randn(64, 128)
    inputs = torch.randn(256, 128) * torch.logspace(-1, 1, 128)
    target = inputs @ weight.t()
    ratios: dict[str, float] = {}
    for gradient in ("identity", "range"):
        log_scale = torch.zeros(128, requires_grad=True)
        optimizer = torch.optim.Adam([log_scale], lr=0.02)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            scale = log_scale.exp()
            rounded = fake_quantize(weight * scale, WeightSpec(3, 64), gradient)
            loss = ((inputs / scale) @ rounded.t() - target).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        ratios[gradient] = losses[-1] / losses[0]
    assert ratios["range"] < 0.9
    assert ratios["range"] < ratios["identity"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("symmetric", [False, True])
def test_not_finite_weights_are_refused(value: float, symmetric: bool) -> None:
    weight = torch.randn(4, 40)
    weight[2, 35] = value
    with pytest.raises(NumericsError, match=r"weight \(4, 40\): NaN or infinity") as caught:
        find_grid(weight, WeightSpec(4, 16, symmetric))
    assert "\n" not in str(caught.value)


def test_scales_that_overflow_their_dtype_are_refused() -> None:
    with pytest.raises(NumericsError, match="float16"):
        find_grid(torch.full((2, 16), 1e7), WeightSpec(4, 16), torch.float16)


@pytest.mark.parametrize(
    "weight", [torch.ones(4), torch.ones(0, 4), torch.ones(4, 0), torch.ones(4, 4, dtype=torch.int64)]
)
def test_weights_that_are_no_float_matrix_are_refused(weight: Tensor) -> None:
    for function in (find_grid, fake_quantize):
        with pytest.raises(InputError, match="accepted are floating-point"):
            function(weight, WeightSpec(4, 16))


def test_other_refusals() -> None:
    with pytest.raises(InputError, match="K=0"):
        resolve_block_size(0, -1)
    with pytest.raises(ConfigError, match="gradient='none'"):
        fake_quantize(torch.ones(2, 16), WeightSpec(4, 16), "none")  # type: ignore[arg-type]
    grid = Grid(torch.ones(4, 2), None, 4, 16)
    for function in (quantize, dequantize):
        with pytest.raises(InputError, match=r"grid scales \(4, 2\)"):
            function(torch.ones(4, 48), grid)
