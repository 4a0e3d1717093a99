"""Presets, and the stage that trains the whole model at last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.architectures import ARCHITECTURES, VOCAB
from torch import Tensor

import teq_graph
from teq_graph.cli import options
from teq_graph.config import QuantizationConfig, TrainingConfig, WeightSpec
from teq_graph.errors import ConfigError, InputError
from teq_graph.loading import LoadedModel
from teq_graph.training.losses import TOKENS, prediction_divergence

STORY = "Once upon a time, there was a little dog. The dog liked to play in the park. One day he met a cat. " * 16


@pytest.fixture
def batches(stories260k: LoadedModel) -> list[Tensor]:
    tokens = torch.tensor(stories260k.tokenizer(STORY)["input_ids"])[:512]
    return list(tokens.view(8, 64).split(2))


def divergence(model: Any, other: Any, tokens: Tensor) -> float:
    with torch.no_grad():
        target, logits = model(tokens).logits, other(input_ids=tokens).logits
        return float(prediction_divergence(logits, target, {}))


def test_distillation_brings_predictions_nearer(stories260k: LoadedModel, batches: list[Tensor]) -> None:
    quantization = QuantizationConfig(bits=2, group_size=32)
    results = []
    for stages in (("clip", "gptq"), ("clip", "gptq", "distill")):
        training = TrainingConfig(stages=stages, steps=20, distill_steps=20, batch_size=2)
        results.append(
            teq_graph.compile(stories260k.model, calibration=batches, quantization=quantization, training=training)
        )
    plain, distilled = (divergence(stories260k.model, result, torch.cat(batches)) for result in results)
    assert distilled < 0.9 * plain
    codes = [
        {name: tensor for name, tensor in result.graph_module.state_dict().items() if name.endswith("codes")}
        for result in results
    ]
    assert codes[0] and all(torch.equal(codes[0][name], codes[1][name]) for name in codes[0])


def test_distillation_alone_keeps_nearest_codes_of_an_encoder() -> None:
    bert = next(a for a in ARCHITECTURES if "BERT" in a.name).build()
    batch = {"input_ids": torch.randint(3, VOCAB, (2, 12)), "attention_mask": torch.ones(2, 12, dtype=torch.long)}
    training = TrainingConfig(stages=("distill",), distill_steps=3)
    quantization = QuantizationConfig(bits=4, group_size=16)
    plain, distilled = (
        teq_graph.compile(bert, batch, calibration=[batch], quantization=quantization, training=config)
        for config in (None, training)
    )
    for name, tensor in plain.graph_module.state_dict().items():
        if name.endswith("codes"):
            assert torch.equal(tensor, distilled.graph_module.state_dict()[name])


def test_a_batch_that_the_model_cannot_take_is_named() -> None:
    """Also where the last block is all there is, and distillation the first to run it."""
    model = torch.nn.Sequential(torch.nn.Embedding(5, 32), torch.nn.Linear(32, 32)).eval()
    with pytest.raises(InputError, match=r"calibration batch 0: .*index out of range") as caught:
        teq_graph.compile(
            model,
            example_inputs=(torch.randint(0, 5, (2, 4)),),
            calibration=[(torch.full((2, 4), 9),)],
            quantization=QuantizationConfig(bits=4, group_size=16),
            training=TrainingConfig(stages=("distill",), distill_steps=1),
        )
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [torch.tensor([True, True, False, False, False]), torch.tensor([True])], ids=str)
def test_divergence_and_its_gradient(kept: Tensor) -> None:
    """Of the tokens that are no padding, over several runs of them."""
    mask = torch.stack([torch.ones(7 * TOKENS, dtype=torch.bool)] * 2)
    mask[1] &= kept.repeat(mask.shape[1])[: mask.shape[1]]
    logits, target = torch.randn(*mask.shape, 7).requires_grad_(), torch.randn(*mask.shape, 7)
    exact = logits.detach().double().requires_grad_()
    p, q = target.double().softmax(-1), exact.softmax(-1)
    expected = (p * (p / q).log()).sum(-1)[mask].mean()
    actual = prediction_divergence(logits, target, {"attention_mask": mask.long()})
    torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=0)
    ((2 * actual).backward(), (2 * expected).backward())
    assert logits.grad is not None and exact.grad is not None
    assert float((logits.grad - exact.grad).abs().max()) <= 1e-6 * float(exact.grad.abs().max())


@pytest.mark.parametrize("preset", ["fast", "default", "best"])
def test_presets_compile(preset: str) -> None:
    model = next(a for a in ARCHITECTURES if a.name == "Llama (GQA)").build()
    training = TrainingConfig.preset(preset, samples=4, length=12, batch_size=2)
    if training.steps:
        training = TrainingConfig.preset(preset, samples=4, length=12, batch_size=2, steps=2)
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(bits=3, group_size=16), training=training)
    assert all(block.after <= block.before for block in compiled.report.blocks)
    assert torch.isfinite(compiled(input_ids=torch.randint(3, VOCAB, (2, 7))).logits).all()


def test_stages_come_in_their_order() -> None:
    assert TrainingConfig(stages=("tune", "teq", "gptq")).stages == ("teq", "gptq", "tune")
    assert TrainingConfig().stages_for([WeightSpec(8)]) != TrainingConfig().stages_for([WeightSpec(3)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"stages": ("rounding",)}, "stages="),
        ({"stages": "gptq"}, "stages='gptq'"),
        ({"tuned": ("all",)}, "tuned="),
        ({"scale_steps": -1}, "scale_steps=-1"),
        ({"tuning_rate": 2.0}, "tuning_rate=2.0"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        TrainingConfig(**values)
    assert "\n" not in str(caught.value)


def test_methods_on_the_command_line() -> None:
    training = options.training("best", "teq+gptq", {"steps": 7})
    assert training is not None and training.stages == ("teq", "gptq") and training.steps == 7
    assert options.training("default", "rtn", {}) is None
    for preset, method in (("slow", None), ("default", "awq"), ("default", "teq+")):
        with pytest.raises(ConfigError, match="accepted are"):
            options.training(preset, method, {})
    with pytest.raises(ConfigError, match="preset='slow'"):
        TrainingConfig.preset("slow")
