"""Learning the scales: what changes, what does not, and that it helps."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, VOCAB
from support.graphs import leaves, randomize, relative_error
from torch import Tensor, nn

import teq_graph
from teq_graph.compile import Analysis, analyze
from teq_graph.config import QuantizationConfig, TrainingConfig, WeightSpec
from teq_graph.errors import InputError, NumericsError
from teq_graph.graph.tensors import get_tensor
from teq_graph.loading import LoadedModel
from teq_graph.passes.insert_scales import SMALLEST_SCALE, InsertScales
from teq_graph.passes.lower_to_matmul_nbits import LowerToMatMulNBits
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.quantization import fake_quantize
from teq_graph.training import FirstBlock, Trainer, TrainingResult
from teq_graph.training.losses import relative_error as block_loss
from teq_graph.training.optimize import decay
from teq_graph.training.stages.scales import initial_scale

W2 = QuantizationConfig(bits=2, group_size=16)
LLAMA = next(a for a in ARCHITECTURES if a.name == "Llama (GQA)")


class Layer(nn.Module):
    """A residual MLP whose input channels differ a hundredfold, as those of trained models do."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 48), nn.Linear(48, width)
        self.norm.weight.data = torch.logspace(-1, 1, width)[torch.randperm(width)]

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.down(self.up(self.norm(x)).relu())
        return result


def mlp() -> nn.Module:
    return nn.Sequential(*(Layer() for _ in range(3)), nn.Linear(32, 8)).eval()


EXAMPLE = (torch.zeros(6, 32),)
DYNAMIC = ({0: torch.export.Dim.DYNAMIC},)


def only_scales(**options: Any) -> TrainingConfig:
    """The scales alone, with weights rounded to nearest."""
    return TrainingConfig(stages=("teq",), **options)


def analyzed(model: nn.Module, quantization: QuantizationConfig = W2) -> Analysis:
    pretrained = not isinstance(model, nn.Sequential)
    return analyze(model, *((None, None) if pretrained else (EXAMPLE, DYNAMIC)), quantization)


def trainer_of(analysis: Analysis, batches: list[Any], config: TrainingConfig) -> Trainer:
    return Trainer(analysis.captured, analysis.findings.equivalences, analysis.specs, batches, config)


def train(
    model: nn.Module, batches: list[Any], config: TrainingConfig, quantization: Any = W2
) -> tuple[Analysis, TrainingResult]:
    analysis = analyzed(model, quantization)
    return analysis, trainer_of(analysis, batches, config).run()


def scales_of(result: TrainingResult) -> list[Tensor]:
    return [torch.ones(e.channels) if e.scale is None else e.scale for e in result.equivalences]


@pytest.fixture
def batches() -> list[Any]:
    return [(torch.randn(16, 32),) for _ in range(4)]


@pytest.fixture
def token_batches() -> list[Any]:
    return [{"input_ids": torch.randint(3, VOCAB, (2, 12))} for _ in range(3)]


@pytest.mark.parametrize("objective", ["block", "model"])
def test_only_scales_change(objective: Any, token_batches: list[Any]) -> None:
    model = LLAMA.build()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    analysis = analyzed(model)
    graph_module = analysis.captured.graph_module
    code, tensors = graph_module.code, {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    result = trainer_of(analysis, token_batches, only_scales(objective=objective, steps=3, batch_size=2)).run()
    scales = scales_of(result)
    assert any(not torch.equal(scale, torch.ones_like(scale)) for scale in scales)
    assert all(bool((scale >= SMALLEST_SCALE).all()) for scale in scales)
    # The same graph over the same tensors, scales folded in.
    for equivalence, scale in zip(result.equivalences, scales, strict=True):
        tensors |= equivalence.apply(tensors, scale)
    after = graph_module.state_dict()
    assert graph_module.code == code and after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensors[name]) for name in after)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not parameter.requires_grad or parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_quantized_graph_computes_what_was_trained(bits: int, token_batches: list[Any]) -> None:
    quantization = QuantizationConfig(bits=bits, group_size=16)
    config = only_scales(steps=3, batch_size=2, init="activation")
    model = LLAMA.build()
    analysis, result = train(model, token_batches, config, quantization)
    graph_module = analysis.captured.graph_module
    args, _ = analysis.captured.bind({"input_ids": torch.randint(3, VOCAB, (3, 9))})
    # What training saw: a second graph, with the learned scales inserted.
    seen = analyzed(model, quantization)
    inserted = InsertScales(seen.findings.equivalences, seen.specs)(seen.captured.graph_module).value
    for name, scale in zip(inserted.scales, scales_of(result), strict=True):
        get_tensor(seen.captured.graph_module, name).data.copy_(scale)
    with torch.no_grad():
        trained = leaves(seen.captured.graph_module(*args))
        for step in (QuantizeLinears(analysis.specs), LowerToMatMulNBits()):
            step(graph_module)
        quantized = leaves(graph_module(*args))
    assert relative_error(quantized, trained) <= 1e-5


@pytest.mark.parametrize("init", ["ones", "weight", "activation"])
def test_no_block_gets_worse(init: Any, batches: list[Any]) -> None:
    reports = [report for _ in range(4) for report in train(mlp(), batches, only_scales(steps=30, init=init))[1].blocks]
    assert len(reports) == 12
    assert all(report.after <= report.before for report in reports)
    # of single networks, 0.78 to 0.97; 0.88 on average
    assert sum(report.after for report in reports) < 0.96 * sum(report.before for report in reports)


class Classes(nn.Module):
    """Ends in numbers that have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()[:-1]

    def forward(self, x: Tensor) -> Any:
        scores = self.layers(x)
        return scores.argmax(-1), scores.max(-1).indices > 3


@pytest.mark.parametrize("objective", ["block", "model"])
def test_a_model_without_float_outputs_learns_its_last_float_values(objective: Any, batches: list[Any]) -> None:
    model = Classes().eval()
    options = dict(calibration=batches, quantization=W2)
    config = only_scales(objective=objective, steps=20, learning_rate=1e-2)
    last, same = (
        teq_graph.compile(part, EXAMPLE, DYNAMIC, training=config, **options).report.blocks[-1]
        for part in (model, model.layers)
    )
    assert last.after < last.before
    assert (last.before, last.after) == pytest.approx((same.before, same.after), rel=1e-4)


def test_a_block_that_training_would_harm_keeps_ones(batches: list[Any]) -> None:
    _, result = train(mlp(), batches, only_scales(steps=3, learning_rate=0.99, warmup=0))
    for report, scale in zip(result.blocks, scales_of(result)[::2], strict=False):
        assert report.after <= report.before
        assert report.after < report.before or torch.equal(scale, torch.ones_like(scale))


@pytest.mark.usefixtures("float32_products")
def test_the_reported_error_is_the_blocks_own(batches: list[Any]) -> None:
    """Of the first block, whose input is the float one: recomputed here from the definition."""
    model = mlp()
    analysis, result = train(model, batches, only_scales(steps=10))
    first, x = model[0], torch.cat([batch for (batch,) in batches])
    (site,) = [e for e in analysis.findings.equivalences if e.producer == "0.norm.weight"]
    (inner,) = [e for e in analysis.findings.equivalences if e.producer == "0.up.weight"]
    numbers = [analysis.findings.equivalences.index(e) for e in (site, inner)]
    s, t = (scales_of(result)[number] for number in numbers)
    spec = WeightSpec(2, 16)

    def error(s: Tensor, t: Tensor) -> float:
        up = fake_quantize(first.up.weight * s / t[:, None], spec)
        down = fake_quantize(first.down.weight * t, spec)
        hidden = nn.functional.linear(first.norm(x) / s, up, first.up.bias / t).relu()
        output = x + nn.functional.linear(hidden, down, first.down.bias)
        target = first(x)
        return float(((output - target).square().mean(-1) / target.square().mean(-1)).mean())

    with torch.no_grad():
        assert result.blocks[0].before == pytest.approx(error(torch.ones(32), torch.ones(48)), rel=1e-4)
        assert result.blocks[0].after == pytest.approx(error(s, t), rel=1e-4)


def test_the_model_objective_reduces_the_distance_to_the_float_outputs(batches: list[Any]) -> None:
    _, result = train(mlp(), batches, only_scales(objective="model", steps=40, learning_rate=1e-2))
    (report,) = result.blocks
    assert report.after < 0.98 * report.before


def test_the_model_objective_reduces_a_language_models_loss(stories260k: LoadedModel) -> None:
    text = stories260k.tokenizer("Once upon a time, there was a little dog. The dog liked to play in the park. " * 12)
    tokens = torch.tensor(text["input_ids"])[:256].view(4, 64)
    config = only_scales(objective="model", steps=30, learning_rate=5e-3)
    quantization = QuantizationConfig(bits=3, group_size=32)
    _, result = train(stories260k.model, [{"input_ids": part} for part in tokens.split(2)], config, quantization)
    (report,) = result.blocks
    with torch.no_grad():
        logits = stories260k.model(tokens).logits[:, :-1]
    own = float(nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))
    assert own < report.before
    assert report.after - own < 0.9 * (report.before - own)


@pytest.mark.parametrize("objective", ["block", "model"])
def test_a_seed_makes_a_run_repeatable(objective: Any, batches: list[Any]) -> None:
    model = mlp()
    config = only_scales(objective=objective, steps=5, seed=7)
    first, second = (scales_of(train(copy.deepcopy(model), batches, config)[1]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    other = scales_of(train(model, batches, only_scales(objective=objective, steps=5, seed=8))[1])
    assert any(not torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_compile_is_repeatable_on_its_own_samples() -> None:
    model = LLAMA.build()
    config = only_scales(steps=2, samples=4, length=12, batch_size=2, seed=3)
    first, second = (teq_graph.compile(model, quantization=W2, training=config) for _ in range(2))
    pairs = [(a.scale, b.scale) for a, b in zip(first.equivalences, second.equivalences, strict=True)]
    assert all(torch.equal(a, b) for a, b in pairs if a is not None) and sum(a is not None for a, _ in pairs) == 8
    tokens = torch.randint(3, VOCAB, (2, 7))
    assert torch.equal(first(input_ids=tokens).logits, second(input_ids=tokens).logits)


# --------------------------------------------------------------------------------------------------- initial values


def initial(init: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """The scale of a norm that feeds two linears, the linears' weights, and what they read."""
    model = nn.Sequential(Layer()).eval()
    analysis = analyze(model, EXAMPLE, DYNAMIC, W2)
    site = next(e for e in analysis.findings.equivalences if e.kind == "layer_norm")
    weights = {"0.up.weight": model[0].up.weight.detach()}
    inputs = model[0].norm(torch.randn(64, 32)).detach()
    return initial_scale(site, init, weights, {"0.up.weight": inputs[None]}, analysis.specs), weights, inputs


def test_initial_ones() -> None:
    scale, _, _ = initial("ones")
    assert torch.equal(scale, torch.ones(32))


def test_initial_weight_norm() -> None:
    scale, weights, _ = initial("weight")
    expected = 1 / weights["0.up.weight"].abs().amax(0).sqrt()
    expected = expected / expected.log().mean().exp()
    assert torch.allclose(scale, expected, rtol=1e-5)


def test_initial_activation_aware_is_no_worse_than_ones() -> None:
    scale, weights, inputs = initial("activation")
    weight, spec = weights["0.up.weight"], WeightSpec(2, 16)
    rows = inputs / inputs.square().mean(-1, keepdim=True).sqrt()

    def error(s: Tensor) -> float:
        return float((rows @ (fake_quantize(weight * s, spec) / s - weight).T).square().sum())

    assert error(scale) < error(torch.ones(32))
    assert float(scale.log().mean().abs()) <= 1e-4


@pytest.mark.parametrize("objective", ["block", "model"])
def test_zero_steps_keep_the_initial_scales(
    objective: Any, batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even those that make things worse."""
    initial = {n: torch.logspace(-2, 2, n)[torch.randperm(n)] for n in (32, 48)}
    monkeypatch.setattr("teq_graph.training.block.initial_scale", lambda site, *_: initial[site.channels])
    _, result = train(mlp(), batches, only_scales(objective=objective, steps=0, init="weight"))
    assert any(report.after > report.before for report in result.blocks)
    assert all(torch.equal(scale, initial[len(scale)]) for scale in scales_of(result))


def test_the_schedule_rises_then_falls_to_zero() -> None:
    rates = [decay(step, 100, 0.1) for step in range(100)]
    assert rates.index(max(rates)) in (9, 10) and max(rates) == 1.0
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] <= 0.02 and decay(100, 100, 0.1) == 0
    assert decay(0, 1, 0.05) == 1.0


def test_the_block_loss_is_relative_to_each_token() -> None:
    target = torch.randn(2, 3, 8, dtype=torch.float64)
    output = target + 0.1 * torch.randn_like(target)
    large = target * torch.tensor([1.0, 1000.0, 1.0])[:, None], output * torch.tensor([1.0, 1000.0, 1.0])[:, None]
    expected = ((output - target).square().mean(-1) / target.square().mean(-1)).mean()
    assert float(block_loss([output], [target])) == pytest.approx(float(expected), rel=1e-5)
    assert float(block_loss([large[1]], [large[0]])) == pytest.approx(float(expected), rel=1e-4)


# ------------------------------------------------------------------------------------------------------ other types


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_compile(dtype: torch.dtype) -> None:
    model = LLAMA.build().to(dtype)
    compiled = teq_graph.compile(
        model,
        calibration=torch.randint(3, VOCAB, (4, 12)),
        quantization=QuantizationConfig(bits=8, group_size=16),
        training=only_scales(steps=2, batch_size=2),
    )
    tokens = torch.randint(3, VOCAB, (2, 9))
    logits = compiled(input_ids=tokens).logits
    assert logits.dtype == dtype
    with torch.no_grad():
        expected = model.float()(tokens).logits
    # 8-bit weights and the type's own rounding, over two layers
    assert float((logits.float() - expected).norm() / expected.norm()) <= 0.02 + 20 * torch.finfo(dtype).eps


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(("objective", "init"), [("block", "ones"), ("model", "ones"), ("model", "activation")])
@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": torch.zeros(2, 40, dtype=torch.long)}, "size"),
        ({"input_ids": torch.full((2, 8), VOCAB)}, "index out of range"),
        ({"input_ids": torch.zeros(2, 8)}, "input_ids"),
        ({"tokens": torch.zeros(2, 8, dtype=torch.long)}, "tokens"),
    ],
    ids=["too long", "outside the vocabulary", "floats", "other name"],
)
def test_a_batch_that_the_model_cannot_take_is_named(objective: Any, init: Any, batch: Any, message: str) -> None:
    from transformers import BertConfig, BertModel

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    model = randomize(BertModel(BertConfig(vocab_size=VOCAB, max_position_embeddings=32, **sizes)))
    mask = torch.ones(2, next(iter(batch.values())).shape[1], dtype=torch.long)
    fine = {"input_ids": torch.randint(0, VOCAB, mask.shape)[:, :32], "attention_mask": mask[:, :32]}
    config = only_scales(objective=objective, init=init, steps=1)
    with pytest.raises(InputError, match=f"calibration batch 1: .*{message}") as caught:
        train(model, [fine, {**batch, "attention_mask": mask}], config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.ones(2, 1, dtype=torch.long)},
        {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 0, 0]] * 2)},
    ],
    ids=["one token", "padding"],
)
def test_rows_of_one_token_have_no_next_one(batch: Any, token_batches: list[Any]) -> None:
    model = LLAMA.build()
    with pytest.raises(InputError, match=r"calibration batch 3: .*at least two tokens") as caught:
        train(model, [*token_batches, batch], only_scales(objective="model", steps=1))
    assert "\n" not in str(caught.value)
    train(model, [*token_batches, batch], only_scales(steps=0))  # a block's outputs are there for one token, too


def test_a_calibration_that_overflows_is_named(batches: list[Any]) -> None:
    model = randomize(mlp(), std=1e17)
    with pytest.raises(NumericsError, match="calibration batch 0") as caught:
        train(model, batches, only_scales(steps=1))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stages", [("teq",), ("teq", "clip", "gptq", "tune"), ("tune", "distill")], ids="+".join)
def test_an_exception_leaves_the_graph_as_it_was(stages: tuple[str, ...], batches: list[Any]) -> None:
    model = mlp()
    analysis = analyzed(model)
    graph_module = analysis.captured.graph_module
    code, tensors = graph_module.code, {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    x = torch.randn(9, 32)
    expected = graph_module(x)
    # The second batch fails: where scales and codes of the first blocks are chosen, or before.
    with pytest.raises(InputError, match="calibration batch 3"):
        trainer_of(analysis, [*batches[:3], (torch.randn(16, 31),)], TrainingConfig(stages=stages, steps=2)).run()

    def interrupt(_: FirstBlock) -> None:
        raise KeyboardInterrupt

    trainer = trainer_of(analysis, batches, TrainingConfig(stages=stages, steps=2))
    trainer.after_first_block = interrupt
    with pytest.raises(KeyboardInterrupt):
        trainer.run()
    after = graph_module.state_dict()
    assert graph_module.code == code and after.keys() == tensors.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert torch.equal(graph_module(x), expected)


def test_errors_after_each_stage(batches: list[Any]) -> None:
    _, result = train(mlp(), batches, TrainingConfig(stages=("teq", "clip", "gptq", "bias", "tune"), steps=5))
    # The last block is a linear without a norm before it: no scale of its own.
    stages = ["teq", "clip", "gptq", "bias", "tune"]
    assert [list(block.stages) for block in result.blocks] == [stages] * 3 + [stages[1:]]
    for block in result.blocks:
        assert block.after == min(block.before, *block.stages.values())
        assert len(set(block.stages.values())) == len(block.stages), "each stage is measured by itself"


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="the processor has no products in bfloat16")
def test_products_in_bfloat16_change_errors_by_less_than_rounding_does(
    batches: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, fast = mlp(), []
    for supported in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda supported=supported: supported)
        fast.append(train(model, batches, only_scales(steps=0))[1].blocks[0].before)
    assert fast[0] != fast[1] and fast[0] == pytest.approx(fast[1], rel=0.03)


def test_scales_take_part_of_the_steps_where_codes_follow() -> None:
    steps = {stages: TrainingConfig(steps=50, stages=stages).steps_of_scales for stages in (None, ("teq",))}
    assert steps == {None: 10, ("teq",): 50}
    assert TrainingConfig(stages=("teq", "gptq"), scale_steps=7).steps_of_scales == 7


def test_a_few_steps_train_the_whole_model() -> None:
    assert TrainingConfig(steps=50).steps_of_distillation == 5
    assert TrainingConfig(distill_steps=3).steps_of_distillation == 3
    assert TrainingConfig.preset("best").steps_of_distillation == 200
    assert TrainingConfig.preset("best", steps=7).steps_of_distillation == 7
    assert TrainingConfig.preset("best", steps=7, distill_steps=3).steps_of_distillation == 3
    assert TrainingConfig.preset("default", steps=7).steps_of_distillation == 1


@pytest.mark.parametrize(
    ("bits", "stages"),
    [
        ((8,), ("clip", "gptq")),
        ((4, 8), ("teq", "clip", "gptq", "tune")),
        ((3, 4), ("teq", "clip", "gptq", "tune", "distill")),
        ((2,), ("teq", "clip", "gptq", "tune", "distill")),
        ((), ("clip", "gptq")),
    ],
)
def test_stages_that_serve_the_bits(bits: tuple[int, ...], stages: tuple[str, ...]) -> None:
    assert TrainingConfig().stages_for(WeightSpec(b) for b in bits) == stages
    assert TrainingConfig(stages=("tune",)).stages_for(WeightSpec(b) for b in bits) == ("tune",)
