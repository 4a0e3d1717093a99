"""Bits by sensitivity: the estimate is the loss's increase, and the budget goes where it counts."""

from __future__ import annotations

import copy
import dataclasses
import random
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.architectures import BY_NAME, VOCAB
from support.compiling import DYNAMIC, LLAMA, compile_llama, compile_mlp, in_one_line, mlp, tokens
from support.graphs import randomize
from torch import Tensor, nn

import teq_graph
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.cli import run
from teq_graph.compile import Analysis, analyze
from teq_graph.config import BITS
from teq_graph.errors import ConfigError, NumericsError
from teq_graph.graph.nodes import arguments_of
from teq_graph.graph.tensors import get_tensor, node_tensor, set_tensor
from teq_graph.quantization import dequantize, find_clipped_grid, quantize
from teq_graph.quantization.packing import unpack_codes
from teq_graph.report import Report
from teq_graph.training.sensitivity import allocate, loss_increases, loss_of_drawn_tokens

ROUNDED = TrainingConfig(stages=(), samples=8, length=16, batch_size=2)
CHOSEN = dataclasses.replace(ROUNDED, stages=("clip", "gptq"))


def aimed_at(target: float, **options: Any) -> QuantizationConfig:
    return QuantizationConfig(group_size=16, target_bits=target, **options)


def with_one_quantized(analysis: Analysis, name: str, bits: int, args: tuple[Any, ...]) -> Tensor:
    """The first output of the graph with one weight at `bits`."""
    graph_module = analysis.captured.graph_module
    weight = get_tensor(graph_module, name)
    grid = find_clipped_grid(weight, dataclasses.replace(analysis.specs[name], bits=bits))
    set_tensor(graph_module, name, dequantize(quantize(weight, grid), grid))
    with torch.no_grad():
        output = torch.utils._pytree.tree_leaves(graph_module(*args))[0]
    set_tensor(graph_module, name, weight)
    return output  # type: ignore[no-any-return]


def rank_correlation(a: Tensor, b: Tensor) -> float:
    ranks = torch.stack([x.argsort().argsort().double() for x in (a, b)])
    return float(torch.corrcoef(ranks)[0, 1])


def bits_of(report: Report) -> dict[str, int]:
    return {linear.name: linear.spec.bits for linear in report.quantized if linear.spec}


def average(report: Report) -> float:
    sizes = {linear.name: linear.shape[0] * linear.shape[1] for linear in report.quantized}
    return sum(bits * sizes[name] for name, bits in bits_of(report).items()) / sum(sizes.values())


def test_of_a_language_model_the_estimate_is_the_divergence() -> None:
    analysis = analyze(LLAMA.build(std=0.15), quantization=aimed_at(3))
    batches = [{"input_ids": tokens(16, 24)} for _ in range(4)]
    curves = loss_increases(analysis.captured, analysis.specs, batches)
    args, _ = analysis.captured.bind({"input_ids": torch.cat([batch["input_ids"] for batch in batches])})
    with torch.no_grad():
        expected = analysis.captured.graph_module(*args)[0].double().log_softmax(-1)
    divergence = []
    for name in analysis.specs:
        other = with_one_quantized(analysis, name, 3, args).double().log_softmax(-1)
        divergence.append((expected.exp() * (expected - other)).sum(-1).mean())
    estimate, actual = torch.tensor([curves[name][3] for name in analysis.specs]), torch.tensor(divergence)
    ratio = estimate / actual
    assert float(ratio.min()) > 1 / 4 and float(ratio.max()) < 4
    assert 1 / 1.5 < float(ratio.median()) < 1.5
    assert rank_correlation(estimate, actual) > 0.85


@pytest.mark.parametrize("bits", [4, 8])
def test_of_any_other_model_the_estimate_is_the_change_of_the_outputs(bits: int) -> None:
    analysis = analyze(mlp(), (torch.randn(5, 20),), ({0: DYNAMIC},), aimed_at(3))
    batches = [(torch.randn(256, 20),) for _ in range(4)]
    curves = loss_increases(analysis.captured, analysis.specs, batches)
    for name in analysis.specs:
        changes = []
        for args in batches:
            with torch.no_grad():
                expected = analysis.captured.graph_module(*args)
            change = with_one_quantized(analysis, name, bits, args) - expected
            changes.append(0.5 * (change.norm() / expected.norm()) ** 2)
        assert curves[name][bits] == pytest.approx(float(sum(changes)) / len(changes), rel=0.3)


def test_padding_adds_nothing() -> None:
    logits = torch.randn(3, 14, VOCAB, requires_grad=True)
    mask = torch.ones(3, 14, dtype=torch.long)
    mask[:, 9:] = 0
    loss, count = loss_of_drawn_tokens(logits, {"attention_mask": mask}, torch.Generator().manual_seed(5))
    without, same_count = loss_of_drawn_tokens(logits[:, :9], {}, torch.Generator().manual_seed(5))
    assert torch.equal(loss, without) and count == same_count == 27
    loss.backward()
    assert logits.grad is not None and not logits.grad[:, 9:].any() and logits.grad[:, :9].any(-1).all()


def test_the_model_is_left_as_it_is() -> None:
    model = LLAMA.build()
    state = copy.deepcopy(model.state_dict())
    analysis = analyze(model, quantization=aimed_at(3))
    with torch.no_grad():
        loss_increases(analysis.captured, analysis.specs, [{"input_ids": tokens()}])
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(tensor.grad is None for tensor in analysis.captured.graph_module.buffers())


def test_the_allocation_is_optimal_where_the_budget_is_met_exactly() -> None:
    numbers = random.Random(int(torch.randint(2**31, ())))
    for _ in range(20):
        sizes = {str(index): numbers.randint(1, 9) for index in range(12)}
        curves = {name: dict(zip(BITS, sorted((numbers.random() for _ in BITS), reverse=True), strict=True))
                  for name in sizes}  # fmt: skip
        price = numbers.uniform(0, 0.1)
        best = {name: min(BITS, key=lambda bits: curves[name][bits] + price * bits * sizes[name]) for name in sizes}
        budget = sum(bits * sizes[name] for name, bits in best.items())
        chosen = allocate(curves, sizes, budget)
        assert sum(bits * sizes[name] for name, bits in chosen.items()) <= budget
        losses = [sum(curves[name][bits] for name, bits in choice.items()) for choice in (chosen, best)]
        assert losses[0] == pytest.approx(losses[1])


def test_what_is_left_of_the_budget_is_spent() -> None:
    curves = {"a": {2: 9.0, 3: 8.0, 4: 1.0, 8: 0.0}, "b": {2: 0.5, 3: 0.4, 4: 0.3, 8: 0.2}}
    assert allocate(curves, {"a": 10, "b": 1}, 2 * 11 + 11) == {"a": 3, "b": 3}
    assert allocate(curves, {"a": 10, "b": 1}, 2 * 11) == {"a": 2, "b": 2}
    assert allocate(curves, {"a": 10, "b": 1}, 8 * 11) == {"a": 8, "b": 8}


@pytest.mark.parametrize("target", [2, 3.3, 8])
def test_the_budget_is_met_and_nearly_used_up(target: float) -> None:
    report = compile_llama(quantization=aimed_at(target), training=ROUNDED).report
    assert target - 0.1 <= average(report) <= target
    found = bits_of(report)
    assert set(found.values()) <= set(BITS) and (target in BITS or len(set(found.values())) > 1)


class Weighed(nn.Module):
    """Two linears of one shape, of which one gives nearly all of the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 16), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = 0.01 * self.first(x) + self.second(x)
        return result


def test_what_matters_more_gets_more() -> None:
    example = (torch.randn(64, 32),)
    report = teq_graph.compile(Weighed().eval(), example, quantization=aimed_at(3), training=ROUNDED).report
    assert bits_of(report) == {"first.weight": 2, "second.weight": 4}
    assert "bits          3 on average: 1 × 2, 1 × 4" in str(report)
    assert Report.from_dict(report.to_dict()) == report


def test_bits_of_overrides_stay_and_count() -> None:
    overrides = {"*mlp.down*": {"bits": 8}, "*q_proj*": {"group_size": 32}}
    report = compile_llama(quantization=aimed_at(4, bits=3, overrides=overrides), training=ROUNDED).report
    specs = {linear.name: linear.spec for linear in report.quantized if linear.spec}
    assert all((spec.bits == 8) for name, spec in specs.items() if "down" in name)
    assert all(spec.group_size == (32 if "q_proj" in name else 16) for name, spec in specs.items())
    assert 3.8 <= average(report) <= 4


def test_overrides_that_leave_too_little() -> None:
    with pytest.raises(ConfigError, match=r"target_bits=2.5: .* overrides, accepted are [\d.]+ and more") as caught:
        compile_mlp(quantization=aimed_at(2.5, overrides={"2.*": {"bits": 8}}), training=ROUNDED)
    in_one_line(caught)


def test_a_shared_weight_counts_once() -> None:
    shared = nn.Linear(20, 20)
    model = randomize(nn.Sequential(shared, nn.Tanh(), shared, nn.Tanh(), nn.Linear(20, 20)))
    report = compile_mlp(model, quantization=aimed_at(3), training=CHOSEN).report
    assert sorted(bits_of(report).values()) in ([2, 4], [3, 3]) and len(report.quantized) == 2


def test_a_tied_head_takes_part() -> None:
    model = randomize(LLAMA.make())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    report = compile_llama(model, quantization=aimed_at(4, quantize_lm_head=True), training=ROUNDED).report
    assert len(report.quantized) == 15 and 3.9 <= average(report) <= 4


class Classes(nn.Module):
    """Ends in numbers that have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x).argmax(-1)  # type: ignore[no-any-return]


def test_an_argmax_hides_nothing() -> None:
    analysis = analyze(Classes().eval(), (torch.randn(5, 20),), ({0: DYNAMIC},), aimed_at(3))
    curves = loss_increases(analysis.captured, analysis.specs, [(torch.randn(64, 20),)])
    assert len(curves) == 3 and all(curve[2] > curve[8] > 0 for curve in curves.values())


def test_an_encoder() -> None:
    bert = BY_NAME["BERT (post-LN)"]
    batches = [bert.inputs(2, 8) for _ in range(2)]
    compiled = teq_graph.compile(
        bert.build(), bert.example_inputs, bert.dynamic_shapes, batches, aimed_at(3), training=ROUNDED
    )
    assert 2.9 <= average(compiled.report) <= 3


def test_the_estimate_is_the_seeds() -> None:
    analysis = analyze(LLAMA.build(), quantization=aimed_at(3))
    batches = [{"input_ids": tokens(2, 12)}]
    once, again, other = (loss_increases(analysis.captured, analysis.specs, batches, seed) for seed in (1, 1, 2))
    assert once == again != other


def test_mixed_bits_are_saved_and_exported(tmp_path: Path) -> None:
    compiled = compile_mlp(
        quantization=aimed_at(4.2, overrides={"0.*": {"bits": 3}, "4.*": {"bits": 8}}), training=CHOSEN
    )
    assert len(set(bits_of(compiled.report).values())) == 3
    compiled.save(tmp_path / "saved")
    loaded = teq_graph.load(tmp_path / "saved")
    x = torch.randn(7, 20)
    assert torch.equal(loaded(x), compiled(x)) and bits_of(loaded.report) == bits_of(compiled.report)

    compiled.export_onnx(tmp_path / "onnx", accuracy_level=1)
    exported = onnx.load(tmp_path / "onnx" / "model.onnx")
    stored = {tensor.name: torch.from_numpy(onnx.numpy_helper.to_array(tensor).copy()) for tensor in
              exported.graph.initializer}  # fmt: skip
    products = [node for node in exported.graph.node if node.op_type == "MatMulNBits"]
    ours = [node for node in compiled.graph_module.graph.nodes if "matmul_nbits" in str(node.target)]
    assert len(products) == len(ours) == 3
    for product, node in zip(products, ours, strict=True):
        values, attributes = arguments_of(node), {a.name: a.i for a in product.attribute}
        assert attributes["bits"] == {3: 4}.get(values["bits"], values["bits"])
        codes = unpack_codes(node_tensor(values["b"]), values["bits"], values["K"])
        assert torch.equal(unpack_codes(stored[product.input[1]], attributes["bits"], values["K"]), codes)


@pytest.mark.parametrize("value", [1.9, 8.1, 0, -3, float("nan"), float("inf"), "3", True, (3,)])
def test_wrong_targets(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"target_bits=.*accepted are None and numbers from 2 to 8") as caught:
        QuantizationConfig(target_bits=value)
    assert repr(value) in in_one_line(caught)


def test_without_calibration_there_is_no_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"target_bits=3.*accepted with it is a TrainingConfig") as caught:
        compile_llama(quantization=aimed_at(3), training=None)
    in_one_line(caught)
    assert run(["quantize", "smollm2", "-o", str(tmp_path / "out"), "--method", "rtn", "--target-bits", "3"]) != 0
    assert "--target-bits 3.0: no effect with --method rtn" in capsys.readouterr().err


def test_not_a_number() -> None:
    model = LLAMA.build()
    analysis = analyze(model, quantization=aimed_at(3))
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NumericsError, match="calibration batch 0: the float model gives NaN") as caught:
        loss_increases(analysis.captured, analysis.specs, [{"input_ids": torch.randint(3, VOCAB, (2, 9))}])
    in_one_line(caught)


def test_transform_takes_a_target() -> None:
    model = LLAMA.build()
    result = teq_graph.transform(model, quantization=aimed_at(3), training=dataclasses.replace(ROUNDED, steps=1))
    ids = tokens()
    with torch.no_grad():
        expected, actual = model(ids).logits, result(ids).logits
    assert float((actual - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.slow
def test_a_target_beats_uniform_bits(babyllama: Any, wikitext_validation: Path) -> None:
    """On the divergence from the float model, on text that is not calibrated on."""
    text = wikitext_validation.read_text(encoding="utf-8")
    calibration, held_out = [text[: len(text) // 2]], text[len(text) // 2 :]
    ids = torch.tensor(babyllama.tokenizer(held_out[:40000])["input_ids"][:4096]).view(16, 256)
    with torch.no_grad():
        expected = babyllama.model(ids).logits.log_softmax(-1)
    divergence = []
    for quantization in (QuantizationConfig(bits=3, group_size=32), QuantizationConfig(group_size=32, target_bits=3)):
        compiled = teq_graph.compile(
            babyllama.model, calibration=calibration, quantization=quantization, tokenizer=babyllama.tokenizer,
            training=TrainingConfig(stages=("clip", "gptq"), samples=32),
        )  # fmt: skip
        with torch.no_grad():
            other = compiled(input_ids=ids).logits.log_softmax(-1)
        divergence.append(float((expected.exp() * (expected - other)).sum(-1).mean()))
    assert divergence[1] < 0.9 * divergence[0]
