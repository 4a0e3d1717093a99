"""The stages that choose codes: each by its definition, and all of them through compile, storage and ONNX."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import numpy_helper
from support.architectures import BY_NAME
from support.graphs import leaves, randomize
from support.onnx import OnnxModel
from torch import Tensor, nn

import teq_graph
from teq_graph import quantization
from teq_graph.config import TUNED, QuantizationConfig, TrainingConfig, WeightSpec
from teq_graph.quantization import dequantize
from teq_graph.system.progress import Task
from teq_graph.training.losses import relative_error
from teq_graph.training.precision import Precision
from teq_graph.training.stages.codes import (
    BlockProblem,
    Choice,
    bias,
    clip,
    gptq,
    round_to_nearest,
    tune,
)

W2 = QuantizationConfig(bits=2, group_size=16)
COMBINATIONS = (("clip",), ("gptq",), ("clip", "gptq"), ("bias",), ("tune",), ("teq", "clip", "gptq", "tune"))
ALL = ("teq", "clip", "gptq", "bias", "tune")


# ------------------------------------------------------------------------------------------------------- one problem


@dataclasses.dataclass
class TwoLayers:
    """y = W2 relu(W1 x + b1) + b2 for correlated x."""

    up: Tensor
    down: Tensor
    bias: Tensor
    other: Tensor
    inputs: list[Tensor]

    @classmethod
    def random(cls, dtype: torch.dtype) -> TwoLayers:
        mixed = torch.randn(8, 40)
        inputs = [(torch.randn(64, 8) @ mixed + 0.3 * torch.randn(64, 40)).to(dtype) for _ in range(3)]
        parts = (torch.randn(48, 40), torch.randn(24, 48), torch.randn(48) + 1, torch.randn(24))
        return cls(*(part.to(dtype) for part in parts), inputs)

    def hidden(self, x: Tensor, up: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.linear(x, up, bias).relu()

    def problem(self, bits: int, symmetric: bool) -> BlockProblem:
        reads = {"up": torch.cat(self.inputs).float()}
        reads["down"] = self.hidden(torch.cat(self.inputs), self.up, self.bias).float()
        spec = WeightSpec(bits, 32, symmetric)

        def output(x: Tensor, t: Any) -> Tensor:
            return nn.functional.linear(self.hidden(x, t["up"], t["bias"]), t["down"], t["other"])

        floats = {"bias": self.bias, "other": self.other}
        target = [output(x, {"up": self.up, "down": self.down, **floats}) for x in self.inputs]
        return BlockProblem(
            weights={"up": self.up, "down": self.down},
            specs={"up": spec, "down": spec},
            moments={name: (read.T @ read / len(read))[None] for name, read in reads.items()},
            means={name: read.mean(0)[None] for name, read in reads.items()},
            floats=floats,
            bias_of={"up": "bias", "down": "other"},
            loss_of=lambda number, t: relative_error([output(self.inputs[number], t)], [target[number]]),
            batches=len(self.inputs),
            precision=Precision("cpu", is_bfloat16=False),
        )


def loss(problem: BlockProblem, choice: Choice) -> float:
    tensors = choice.tensors(problem)
    with torch.no_grad():
        return sum(float(problem.loss_of(number, tensors)) for number in range(problem.batches)) / problem.batches


def tuned(problem: BlockProblem, choice: Choice, **options: Any) -> Choice:
    config = TrainingConfig(**{"steps": 60, **options})
    return tune(problem, choice, config, torch.Generator().manual_seed(3), Task("tuning", None))[0]


def check_grids(problem: BlockProblem, choice: Choice) -> None:
    assert set(choice.codes) == set(problem.weights)
    for name, (codes, grid) in choice.codes.items():
        weight, spec = problem.weights[name], problem.specs[name]
        assert codes.dtype == torch.uint8 and codes.shape == weight.shape and int(codes.max()) < 2**spec.bits
        assert (grid.bits, grid.block_size) == (spec.bits, spec.group_size)
        assert grid.scales.dtype == torch.float32
        assert torch.equal(grid.scales.to(weight.dtype).float(), grid.scales)
        assert (grid.zero_points is None) == spec.symmetric
        assert grid.zero_points is None or grid.zero_points.dtype == torch.uint8
    tensors = choice.tensors(problem)
    assert set(tensors) == {*problem.weights, *problem.floats}
    assert all(t.dtype == problem.weights["up"].dtype and not t.requires_grad for t in tensors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_each_stage_keeps_the_grids_of_its_spec(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    problem = TwoLayers.random(dtype).problem(bits, symmetric)
    choice = round_to_nearest(problem)
    check_grids(problem, choice)
    for stage in (clip, gptq, bias):
        choice = stage(problem, choice)
        check_grids(problem, choice)
    check_grids(problem, tuned(problem, choice, steps=3))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_corrected_biases_leave_no_mean_error(bits: int, symmetric: bool) -> None:
    layers = TwoLayers.random(torch.float32)
    problem = layers.problem(bits, symmetric)
    for start in (round_to_nearest(problem), gptq(problem, round_to_nearest(problem))):
        corrected = bias(problem, start)
        x = torch.cat(layers.inputs).double()
        hidden = layers.hidden(x, layers.up.double(), layers.bias.double())
        for read, name, of in ((x, "up", "bias"), (hidden, "down", "other")):
            error = read @ (dequantize(*corrected.codes[name]) - problem.weights[name]).double().T
            before = error.mean(0)
            after = before + (corrected.floats[of] - problem.floats[of]).double()
            assert float(after.abs().max()) <= 1e-5 * float(error.abs().max())
            assert float(after.abs().max()) < 1e-3 * float(before.abs().max())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(
    ("bits", "parts", "rate"), [(2, TUNED, 2e-3), (3, ("rounding", "floats"), 6e-4), (4, ("floats",), 1.2e-2)]
)
def test_tuning_reduces_the_loss(bits: int, parts: tuple[str, ...], rate: float, symmetric: bool) -> None:
    ratios = []
    for _ in range(3):
        problem = TwoLayers.random(torch.float32).problem(bits, symmetric)
        # Not from the best codes of each layer by itself, which leave two layers little to gain.
        start = clip(problem, round_to_nearest(problem))
        for name, (_, grid) in start.codes.items():
            chosen = quantization.gptq(problem.weights[name], problem.moments[name][0], grid)
            start = Choice({**start.codes, name: (chosen, grid)})
        assert loss(problem, start) < loss(problem, round_to_nearest(problem))
        choice = tuned(problem, start, steps=80, tuned=parts, tuning_rate=rate)
        ratios.append(loss(problem, choice) / loss(problem, start))
    assert sum(ratios) / len(ratios) < 0.98, ratios


@pytest.mark.parametrize("part", ["rounding", "group_scales", "zero_points", "floats"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_only_what_is_tuned_changes(symmetric: bool, part: str) -> None:
    problem = TwoLayers.random(torch.float32).problem(3, symmetric)
    start = clip(problem, round_to_nearest(problem))
    # Zero points learn from elements that leave the codes' range, which takes a change of rounding.
    parts = {"rounding", "zero_points"} if part == "zero_points" and not symmetric else {part}
    result = tuned(problem, start, tuned=tuple(parts), tuning_rate=0.2, steps=20)
    check_grids(problem, result)
    changed = set()
    for name, (codes, grid) in result.codes.items():
        before, same = start.codes[name]
        changed |= {"rounding"} if not torch.equal(codes, before) else set()
        changed |= {"group_scales"} if not torch.equal(grid.scales, same.scales) else set()
        if grid.zero_points is not None and same.zero_points is not None:
            changed |= {"zero_points"} if not torch.equal(grid.zero_points, same.zero_points) else set()
    if any(not torch.equal(tensor, problem.floats[name]) for name, tensor in result.floats.items()):
        changed.add("floats")
    # Latents keep their places, and codes follow the scales.
    expected = set() if symmetric and part == "zero_points" else parts
    assert changed - {"rounding"} == expected - {"rounding"}
    assert "rounding" in changed or not expected or part in ("floats", "group_scales")
    assert "rounding" not in changed or part != "floats"


# --------------------------------------------------------------------------------------------------- through compile


class Layer(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return result


def mlp() -> nn.Module:
    return randomize(nn.Sequential(*(Layer() for _ in range(3))))


EXAMPLE: Any = ((torch.zeros(6, 32),), ({0: torch.export.Dim.DYNAMIC},))


def config(stages: tuple[str, ...], **options: Any) -> TrainingConfig:
    return TrainingConfig(**{"stages": stages, "steps": 8, "batch_size": 2, **options})


def outputs(model: Any, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return leaves(model(**batch) if isinstance(batch, dict) else model(*batch))


def last_error(compiled: Any, model: nn.Module, batches: list[Any], first_only: bool) -> float:
    total = 0.0
    for batch in batches:
        mine, theirs = outputs(compiled, batch), outputs(model, batch)
        total += float(relative_error(mine[:1], theirs[:1]) if first_only else relative_error(mine, theirs))
    return total / len(batches)


@pytest.mark.usefixtures("float32_products")
@pytest.mark.parametrize("stages", COMBINATIONS, ids="+".join)
@pytest.mark.parametrize("name", ["Llama (GQA)", "OPT", "BERT (post-LN)"])
def test_the_compiled_model_is_what_was_chosen(name: str, stages: tuple[str, ...]) -> None:
    architecture = BY_NAME[name]
    model = architecture.build()
    batches = [architecture.inputs(2, 10) for _ in range(3)]
    quantization = dataclasses.replace(W2, bits=3, quantize_lm_head=True)
    compiled = teq_graph.compile(model, calibration=batches, quantization=quantization, training=config(stages))
    reports = compiled.report.blocks
    assert all(report.after <= report.before * (1 + 1e-6) for report in reports)
    if stages != ("bias",):
        assert sum(report.after for report in reports) < sum(report.before for report in reports)
    actual = last_error(compiled, model, batches, first_only=architecture.is_decoder)
    assert actual == pytest.approx(reports[-1].after, rel=1e-4)


@pytest.mark.parametrize("stages", [("bias",), ("tune",)], ids="+".join)
def test_gains_and_biases_are_written_back(stages: tuple[str, ...]) -> None:
    model, batches = mlp(), [(torch.randn(16, 32),) for _ in range(3)]
    before = copy.deepcopy(model.state_dict())
    compiled = teq_graph.compile(model, *EXAMPLE, batches, W2, config(stages, steps=30))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    after = compiled.graph_module.state_dict()
    moved = {name for name in before if name in after and not torch.equal(after[name], before[name])}
    assert any(name.endswith("up.bias") for name in moved)
    assert any(name.endswith("norm.weight") for name in moved) == (stages == ("tune",))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_no_block_is_worse_than_round_to_nearest(bits: int) -> None:
    for stages in (("bias",), ("gptq",), ("clip", "gptq", "bias", "tune")):
        model, batches = mlp(), [(torch.randn(5, 32),) for _ in range(3)]
        # One rate too high to learn anything.
        training = config(stages, steps=5, tuning_rate=0.9)
        quantization = QuantizationConfig(bits=bits, group_size=16)
        reports = teq_graph.compile(model, *EXAMPLE, batches, quantization, training).report.blocks
        assert len(reports) == 3
        assert all(report.after <= report.before * (1 + 1e-6) for report in reports)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama (GQA)", "BERT (post-LN)"])
def test_half_precision_models_take_all_stages(name: str, dtype: torch.dtype) -> None:
    architecture = BY_NAME[name]
    model = architecture.build().to(dtype)
    batches = [architecture.inputs(2, 10) for _ in range(3)]
    quantization = QuantizationConfig(bits=4, group_size=16, quantize_lm_head=True)
    compiled = teq_graph.compile(model, calibration=batches, quantization=quantization, training=config(ALL))
    assert all(report.after <= report.before for report in compiled.report.blocks)
    result = outputs(compiled, batches[0])
    assert all(part.dtype == dtype and bool(part.isfinite().all()) for part in result)
    actual = last_error(compiled, model, batches, first_only=architecture.is_decoder)
    # The type's own rounding is an error of eps squared.
    noise = (2 * torch.finfo(dtype).eps) ** 2
    assert actual == pytest.approx(compiled.report.blocks[-1].after, rel=0.15, abs=noise)


def test_outlier_channels_do_not_overflow_float16() -> None:
    architecture = BY_NAME["Llama (GQA)"]
    model = architecture.build(std=0.1)
    for name, parameter in model.named_parameters():
        if "layernorm" in name:
            parameter.data[3] = 1e4
        elif name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            parameter.data[:, 3] *= 1e-3
    model = model.half()
    batches = [architecture.inputs(2, 10) for _ in range(3)]
    assert all(bool(part.isfinite().all()) for part in outputs(model, batches[0]))
    for stages in (ALL, ("clip", "gptq")):
        compiled = teq_graph.compile(model, calibration=batches, quantization=W2, training=config(stages))
        for batch in (*batches, architecture.inputs(3, 17)):
            assert all(bool(part.isfinite().all()) for part in outputs(compiled, batch))


class SharedLayers(nn.Module):
    """One layer read by two blocks, as in ALBERT, and one of their own between them."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.own = Layer(), nn.ModuleList(Layer() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.own:
            x = layer(self.shared(x))
        return x


@pytest.mark.parametrize("stages", [("clip", "gptq"), ("bias",), ALL], ids="+".join)
def test_weights_that_two_blocks_share(stages: tuple[str, ...]) -> None:
    model, batches = randomize(SharedLayers()), [(torch.randn(16, 32),) for _ in range(3)]
    compiled = teq_graph.compile(model, *EXAMPLE, batches, dataclasses.replace(W2, bits=4), config(stages))
    assert len(compiled.report.linears) == 6
    assert last_error(compiled, model, batches, first_only=True) < 0.1


def codes_of(compiled: teq_graph.CompiledModel) -> dict[str, Tensor]:
    parts = ("codes", "scales", "zero_points")
    return {n: t for n, t in compiled.graph_module.state_dict().items() if n.rpartition(".")[2].endswith(parts)}


def test_a_seed_makes_a_run_repeatable() -> None:
    model, batches = mlp(), [(torch.randn(16, 32),) for _ in range(3)]
    first, second, other = (
        teq_graph.compile(model, *EXAMPLE, batches, W2, config(ALL, seed=seed)).graph_module.state_dict()
        for seed in (5, 5, 6)
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3])
def test_codes_come_back_bit_for_bit(bits: int, symmetric: bool, tmp_path: Path) -> None:
    model, batches = mlp(), [(torch.randn(16, 32),) for _ in range(3)]
    quantization = QuantizationConfig(bits=bits, group_size=16, symmetric=symmetric)
    compiled = teq_graph.compile(model, *EXAMPLE, batches, quantization, config(ALL))
    compiled.save(tmp_path / "saved")
    loaded = teq_graph.load(tmp_path / "saved")
    before, after = compiled.graph_module.state_dict(), loaded.graph_module.state_dict()
    assert len(codes_of(compiled)) == 6 * (2 if symmetric else 3)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    compiled.export_onnx(tmp_path / "onnx", accuracy_level=1)
    exported = onnx.load(tmp_path / "onnx" / "model.onnx")
    base = str(tmp_path / "onnx")
    arrays = {i.name: torch.tensor(numpy_helper.to_array(i, base).copy()) for i in exported.graph.initializer}
    nodes = [node for node in exported.graph.node if node.op_type == "MatMulNBits"]
    assert len(nodes) == 6
    stored = [arrays[node.input[1]] for node in nodes]
    for name, codes in codes_of(compiled).items():
        if name.endswith("codes") and bits == 2:  # onnxruntime stores 3 bits in 4
            assert any(codes.shape == other.shape and torch.equal(codes, other) for other in stored), name
    x = torch.randn(9, 32)
    result = OnnxModel(tmp_path / "onnx").run((x,))
    torch.testing.assert_close(result, outputs(compiled, (x,))[0], rtol=1e-4, atol=1e-4)
