"""Ternary and binary grids in the codes of 2 bits: their optimum, every stage, and what is written."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from support.compiling import compile_llama, compile_mlp, in_one_line, tokens
from support.graphs import leaves, relative_error
from support.onnx import OnnxModel
from torch import Tensor

import teq_graph
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.config import BITS, LEVELS, STAGES, WeightSpec
from teq_graph.errors import ConfigError, NumericsError
from teq_graph.quantization import (
    Grid,
    LearnedWeight,
    QuantizedWeight,
    dequantize,
    fake_quantize,
    find_clipped_grid,
    find_grid,
    gptq,
    quantize,
    quantize_weight,
)
from teq_graph.quantization.codes import Codes

SPECS = [WeightSpec(2, group, True, levels) for group, levels in itertools.product((16, 64, -1), LEVELS)]
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALLOWED = {3: [1, 2, 3], 2: [1, 3]}


def uses_only(codes: Tensor, levels: int | None) -> bool:
    assert levels is not None
    return bool(torch.isin(codes, torch.tensor(ALLOWED[levels], dtype=codes.dtype)).all())


def errors(weight: Tensor, scales: Tensor, grid: Grid, importance: Tensor) -> Tensor:
    """Weighted squared error of each group, float64 [N, nb], whose elements take the nearest value there is."""
    of = torch.arange(weight.shape[1]) // grid.block_size
    values = torch.tensor(ALLOWED[grid.levels or 0], dtype=torch.float64) - 2
    candidates = values * scales.double()[:, of, None]
    error = (weight.double()[..., None] - candidates).square().amin(-1) * importance.double()
    return torch.zeros_like(scales, dtype=torch.float64).index_add_(1, of, error)


# ------------------------------------------------------------------------------------------------------------- codes


@pytest.mark.parametrize("bits", BITS)
def test_all_codes_of_the_other_grids_are_as_they_were(bits: int) -> None:
    codes, steps, zero = Codes.of(bits), torch.randn(64, 16) * 2**bits, torch.randint(0, 2**bits, (64, 1)).float()
    assert codes == Codes(0, 2**bits - 1, 1)
    steps[0] = torch.arange(16) / 2 - 4  # ties
    assert torch.equal(codes.nearest(steps.clone(), zero), steps.round().add(zero).clamp(0, 2**bits - 1))


@pytest.mark.parametrize("levels", LEVELS)
def test_the_nearest_code(levels: int) -> None:
    codes, steps = Codes.of(2, levels), torch.randn(500) * 3
    allowed = torch.tensor(ALLOWED[levels]).float()
    nearest = allowed[(steps[:, None] - (allowed - 2)).abs().argmin(-1)]
    assert torch.equal(codes.nearest(steps.clone(), torch.tensor(2.0)), nearest)


# ------------------------------------------------------------------------------------------------------------- grids


@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
@pytest.mark.parametrize("k", [128, 83, 1])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_no_scale_has_a_smaller_error(spec: WeightSpec, k: int, weighted: bool) -> None:
    weight = torch.randn(5, k) * torch.randn(5, 1).exp()
    importance = torch.randn(k).mul(2).exp() if weighted else torch.ones(k)
    grid = find_clipped_grid(weight, spec, importance=importance if weighted else None)
    if not weighted:
        assert torch.equal(grid.scales, find_grid(weight, spec).scales)
    assert (grid.zero_points, grid.bits, grid.levels) == (None, 2, spec.levels)
    best = errors(weight, grid.scales, grid, importance)
    for factor in torch.linspace(-3, 3, 121).exp():
        assert bool((best <= errors(weight, grid.scales * factor, grid, importance) * (1 + 1e-6) + 1e-12).all())
    rounded = dequantize(quantize(weight, grid), grid)
    torch.testing.assert_close(
        ((rounded - weight).double().square() * importance).sum(), best.sum(), rtol=1e-5, atol=1e-10
    )


@pytest.mark.parametrize("size", [0.0, 1e-42, 1e-30, 1e-6, 1.0, 1e4, 1e30, 3e38])
@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_numbers_of_any_size(spec: WeightSpec, scale_dtype: torch.dtype, size: float) -> None:
    weight = (torch.rand(6, 83) * 2 - 1) * size
    if size > 6e4 and scale_dtype == torch.float16:
        with pytest.raises(NumericsError, match="accepted are finite numbers"):
            find_grid(weight, spec, scale_dtype)
        return
    grid = find_grid(weight, spec, scale_dtype)
    codes = quantize(weight, grid)
    assert uses_only(codes, spec.levels)
    assert torch.equal(grid.scales.to(scale_dtype).float(), grid.scales) and bool((grid.scales != 0).all())
    values = dequantize(codes, grid)
    smallest = torch.finfo(scale_dtype).smallest_normal
    assert bool(((values - weight).abs() <= weight.abs().max() + smallest).all())
    assert torch.equal(fake_quantize(weight, spec, scale_dtype=scale_dtype), values)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_what_is_not_finite(spec: WeightSpec, value: float) -> None:
    weight = torch.randn(3, 40)
    weight[1, 7] = value
    with pytest.raises(NumericsError, match="accepted are finite numbers") as caught:
        find_clipped_grid(weight, spec)
    in_one_line(caught)


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_packing_there_and_back(spec: WeightSpec, scale_dtype: torch.dtype) -> None:
    weight = torch.randn(7, 83)
    stored = quantize_weight(weight, spec, scale_dtype)
    grid = find_grid(weight, spec, scale_dtype)
    codes, same = stored.to_codes()
    assert torch.equal(codes, quantize(weight, grid)) and torch.equal(same.scales, grid.scales)
    assert stored.nbytes == QuantizedWeight.bytes_for(7, 83, spec, scale_dtype)
    assert torch.equal(stored.for_onnxruntime().dequantize(), dequantize(codes, grid))


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradient_of_fake_quantization(spec: WeightSpec) -> None:
    """By autograd in float64, with rounding as the identity and codes as they are."""
    weight, incoming = torch.randn(5, 83, requires_grad=True), torch.randn(5, 83)
    rounded = fake_quantize(weight, spec)
    (actual,) = torch.autograd.grad(rounded, weight, incoming)
    grid = find_grid(weight, spec)
    signs = quantize(weight, grid).double() - 2
    of = torch.arange(83) // grid.block_size
    exact = weight.detach().double().requires_grad_()
    sums = [torch.zeros_like(grid.scales, dtype=torch.float64).index_add(1, of, signs * x) for x in (exact, signs)]
    scale = (sums[0] / sums[1])[:, of]
    steps = exact / scale
    through = steps + (signs - steps).detach()
    inside = steps.detach().abs() <= 1 + (4 - (spec.levels or 0)) / 2
    value = scale * torch.where(inside, through, signs)
    torch.testing.assert_close(rounded.double(), value, rtol=1e-5, atol=1e-6)
    (expected,) = torch.autograd.grad(value, exact, incoming.double())
    assert bool((~inside).any())
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)
    identity = torch.autograd.grad(fake_quantize(weight, spec, "identity"), weight, incoming)
    assert torch.equal(identity[0], incoming)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gradients_of_a_learned_weight(spec: WeightSpec) -> None:
    """By autograd in float64, with what codes stand for as it is."""
    weight, incoming = torch.randn(6, 128), torch.randn(6, 128)
    grid = find_grid(weight, spec)
    learned = LearnedWeight.start(weight, quantize(weight, grid), grid, torch.float32)
    learned.latent.add_(torch.randn_like(learned.latent))
    learned.log_scale.add_(torch.randn_like(learned.log_scale) * 0.1)
    codes, changed = learned.result()
    signs = (codes.double() - 2).view(learned.latent.shape)
    exact = [x.double().requires_grad_() for x in (learned.latent, learned.log_scale)]
    steps = exact[0] * (-exact[1][..., None]).exp()
    inside = steps.detach().abs() <= 1 + (4 - (spec.levels or 0)) / 2
    value = torch.where(inside, steps + (signs - steps).detach(), signs)
    value = (value * (learned.step.double() * exact[1].exp())[..., None]).flatten(1)
    torch.testing.assert_close(dequantize(codes, changed).double(), value, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(value, exact, incoming.double())
    learnable = [x.requires_grad_() for x in (learned.latent, learned.log_scale)]
    actual = torch.autograd.grad(learned.value(), learnable, incoming)
    assert 0.05 < float((~inside).double().mean()) < 0.95
    for mine, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine.double(), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_learning_keeps_to_the_codes(spec: WeightSpec) -> None:
    weight, inputs = torch.randn(24, 83), torch.randn(300, 20) @ torch.randn(20, 83) + 0.2 * torch.randn(300, 83)
    grid = find_grid(weight, spec)
    learned = LearnedWeight.start(weight, quantize(weight, grid), grid, torch.float32)
    assert torch.equal(learned.value(), dequantize(quantize(weight, grid), grid))
    target, before = inputs @ weight.T, float("nan")
    optimizer = torch.optim.Adam([x.requires_grad_() for x in (learned.latent, learned.log_scale)], lr=1e-2)
    for step in range(100):
        optimizer.zero_grad()
        loss = (inputs @ learned.value().T - target).square().mean()
        before = float(loss.detach()) if step == 0 else before
        loss.backward()
        optimizer.step()
    codes, result = learned.result()
    assert uses_only(codes, spec.levels) and result.levels == spec.levels
    assert torch.equal(dequantize(codes, result), learned.value().detach())
    assert float((inputs @ dequantize(codes, result).T - target).square().mean()) < 0.6 * before


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_gptq_keeps_to_the_codes(spec: WeightSpec) -> None:
    weight, inputs = torch.randn(24, 83), torch.randn(600, 20) @ torch.randn(20, 83) + 0.3 * torch.randn(600, 83)
    moments, grid = inputs.T @ inputs / 600, find_grid(weight, spec)
    codes = gptq(weight, moments, grid)
    assert uses_only(codes, spec.levels)
    lost = [(inputs @ (dequantize(c, grid) - weight).T).square().sum() for c in (codes, quantize(weight, grid))]
    assert lost[0] < 0.8 * lost[1]


# ------------------------------------------------------------------------------------------------ whole compilations


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("stages", [None, *(("clip", stage) for stage in STAGES)], ids=str)
def test_every_stage_keeps_to_the_codes(stages: tuple[str, ...] | None, levels: int, tmp_path: Path) -> None:
    quantization = QuantizationConfig(2, 16, symmetric=True, levels=levels)
    training = stages and TrainingConfig(stages=stages, steps=2, samples=4, length=12, batch_size=2)
    calibration = None if training is None else [torch.randn(5, 20) for _ in range(4)]
    compiled = compile_mlp(quantization=quantization, training=training, calibration=calibration)
    for linear in compiled.report.quantized:
        assert str(linear.spec) == f"W2g16 {LEVELS[levels]}"
    codes = {name: t for name, t in compiled.graph_module.state_dict().items() if name.endswith("codes")}
    assert len(codes) == 3
    for packed in codes.values():
        unpacked = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], -1).flatten(1)
        assert uses_only(unpacked[:, :20], levels)
    loaded = teq_graph.load(compiled.save(tmp_path / "saved"))
    inputs = torch.randn(6, 20)
    assert torch.equal(loaded(inputs), compiled(inputs))
    assert loaded.report == compiled.report


@pytest.mark.parametrize("group_size", [16, -1])
@pytest.mark.parametrize("levels", LEVELS)
def test_onnxruntime_computes_the_same(levels: int, group_size: int, tmp_path: Path) -> None:
    compiled = compile_llama(quantization=QuantizationConfig(2, group_size, symmetric=True, levels=levels))
    model = OnnxModel(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    ids = tokens()
    expected = leaves(compiled(input_ids=ids))[0]
    assert relative_error(model.step(compiled, ids, None)[0], expected) <= 1e-5


def test_some_layers_alone() -> None:
    ternary = {"bits": 2, "symmetric": True, "levels": 3}
    compiled = compile_mlp(quantization=QuantizationConfig(4, 16, overrides={"2.weight": ternary}), training=None)
    assert [str(linear.spec) for linear in compiled.report.quantized] == ["W4g16", "W2g16 ternary", "W4g16"]


# -------------------------------------------------------------------------------------------------------- configuration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(levels=3), r"levels=3: accepted with bits=2 and symmetric=True"),
        (dict(bits=2, levels=2), r"levels=2: accepted with"),
        (dict(bits=3, symmetric=True, levels=3), r"levels=3: accepted with"),
        (dict(bits=2, symmetric=True, levels=4), r"levels=4: accepted are None, 3 \(ternary\) and 2 \(binary\)"),
        (dict(bits=1.58, symmetric=True), r"bits=1.58: accepted are"),
        (dict(bits=2, symmetric=True, levels=3, target_bits=3), r"levels=3: .* accepted is target_bits=None"),
        (dict(overrides={"*": {"levels": 3}}), r"overrides\['\*'\]: levels=3: accepted with bits=2"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        QuantizationConfig(**options)
    in_one_line(caught)


def test_an_override_of_the_bits_has_all_their_levels() -> None:
    overrides = {"a": {"bits": 4}, "b": {"group_size": 32}, "c": {"bits": 2, "levels": 2}, "d": {"levels": None}}
    config = QuantizationConfig(2, 64, symmetric=True, levels=3, overrides=overrides)
    specs = [str(config.spec_for(name)) for name in "abcde"]
    assert specs == ["W4g64 sym", "W2g32 ternary", "W2g64 binary", "W2g64 sym", "W2g64 ternary"]


def test_levels_of_an_override_are_bits_of_its_own() -> None:
    config = QuantizationConfig(2, 64, symmetric=True, target_bits=3, overrides={"a": {"levels": 3}})
    assert config.chooses_bits_of("b") and not config.chooses_bits_of("a")
