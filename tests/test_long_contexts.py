"""Rotary embeddings that depend on the length, or are written in complex numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.architectures import GQA, TEXT
from support.compiling import in_one_line, tokens
from support.graphs import apply_and_check, capture_small, randomize, relative_error
from support.onnx import OnnxModel
from torch import Tensor, nn

import teq_graph
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.capture import capture
from teq_graph.errors import CaptureError
from teq_graph.onnx.runtime import load
from teq_graph.passes.make_complex_real import MakeComplexReal

SWITCH, NEW = 16, 12
IN_FLOAT = QuantizationConfig(skip=("*",))


def scaled_by_length() -> nn.Module:
    from transformers import Phi3Config, Phi3ForCausalLM

    half = GQA["hidden_size"] // GQA["num_attention_heads"] // 2
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": [1.0 + 0.1 * i for i in range(half)],
        "long_factor": [2.0 + 0.7 * i for i in range(half)],
        "original_max_position_embeddings": SWITCH,
    }
    config = Phi3Config(**GQA, original_max_position_embeddings=SWITCH, rope_parameters=rope)
    return randomize(Phi3ForCausalLM(config))


def complex_rotary() -> nn.Module:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    sizes = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
    config = DeepseekV2Config(**TEXT, **sizes, first_k_dense_replace=2, n_routed_experts=4, moe_intermediate_size=16)
    return randomize(DeepseekV2ForCausalLM(config))


@torch.no_grad()
def continued(model: nn.Module, prompt: list[int]) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([prompt])
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": NEW}
    result: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), **options)  # type: ignore[operator]
    return result[0, len(prompt) :].tolist()


@pytest.mark.parametrize("build", [scaled_by_length, complex_rotary])
def test_graph_onnx_and_text_are_the_models(build: object, tmp_path: Path) -> None:
    assert callable(build)
    model = build()
    compiled = teq_graph.compile(model, quantization=IN_FLOAT, training=None)
    decoder = compiled.captured.decoder
    assert decoder is not None and decoder.recompute_after == (SWITCH if build is scaled_by_length else None)
    compiled.export_onnx(tmp_path / "onnx", accuracy_level=1)
    session = OnnxModel(tmp_path / "onnx")
    for length in (5, SWITCH, SWITCH + 1, 3 * SWITCH):
        ids = tokens(2, length)
        with torch.no_grad():
            expected = model(input_ids=ids).logits
        assert relative_error(compiled(input_ids=ids).logits, expected) <= 1e-5
        assert relative_error(session.step(compiled, ids, None)[0], expected) <= 1e-4
    runtime = load(tmp_path / "onnx")
    # Within one set of tables, from one to the other, and past the switch from the beginning.
    for length in (2, 9, SWITCH, SWITCH + 3):
        prompt = tokens(1, length)[0].tolist()
        assert runtime.generate(prompt, NEW, do_sample=False, eos_token_id=[]) == continued(model, prompt)


@pytest.mark.parametrize("build", [scaled_by_length, complex_rotary])
def test_all_stages_train(build: object) -> None:
    assert callable(build)
    model = build()
    batches = [tokens(2, 2 * SWITCH) for _ in range(3)]
    training = TrainingConfig(stages=("teq", "clip", "gptq", "tune", "distill"), steps=4, distill_steps=4)
    quantization = QuantizationConfig(bits=3, group_size=16)
    report = teq_graph.compile(model, calibration=batches, quantization=quantization, training=training).report
    assert all(block.after < block.before for block in report.blocks)
    assert any(site.trained for site in report.sites)


def test_a_compiled_model_with_two_tables_is_saved_and_loaded(tmp_path: Path) -> None:
    compiled = teq_graph.compile(scaled_by_length(), training=None)
    compiled.save(tmp_path / "saved")
    loaded = teq_graph.load(tmp_path / "saved")
    assert loaded.captured.decoder == compiled.captured.decoder
    ids = tokens(2, SWITCH + 5)
    assert relative_error(loaded(input_ids=ids).logits, compiled(input_ids=ids).logits) == 0


def test_tables_that_grow_with_the_length_are_refused_in_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(CaptureError, match=r"refuses LlamaForCausalLM .* depend on tensors' values") as caught:
        capture(randomize(LlamaForCausalLM(LlamaConfig(**GQA, rope_parameters=rope))))
    in_one_line(caught)
    assert capfd.readouterr() == ("", "")


# --------------------------------------------------------------------------------------------------- complex numbers


class Turned(nn.Module):
    """Complex products between real linears."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.first, self.second, self.kind = nn.Linear(8, 16), nn.Linear(16, 8), kind

    def forward(self, x: Tensor, angle: Tensor) -> Tensor:
        h = self.first(x)
        z = torch.view_as_complex(h.reshape(*h.shape[:-1], 8, 2))
        w = torch.polar(angle.abs() + 1, angle) * 1.5
        match self.kind:
            case "product":
                z = z * w.unsqueeze(1)
            case "conjugate":
                z = (
                    (z * w.unsqueeze(1).conj())
                    .transpose(1, 2)
                    .flatten(1)
                    .view(x.shape[0], 8, x.shape[1])
                    .transpose(1, 2)
                )
            case "sum":
                z = (z - w[:, None]) / 3 + w[:, None] * h[..., :8]
            case "parts":
                z = torch.complex(z.real * 2, (z * w.unsqueeze(1)).imag)
            case "modulus":
                return self.second(torch.cat([(z * w.unsqueeze(1)).abs(), h[..., :8]], -1))
            case "a real number added":
                z = z + 1
        return self.second(torch.view_as_real(z).flatten(-2))


@pytest.mark.parametrize("kind", ["product", "conjugate", "sum", "parts"])
def test_complex_values_become_two_real_ones(kind: str) -> None:
    inputs = torch.randn(2, 5, 8), torch.randn(2, 8)
    captured = capture_small(Turned(kind), *inputs)
    apply_and_check(MakeComplexReal(), captured.graph_module, (torch.randn(3, 4, 8), torch.randn(3, 8)))
    values = [node.meta.get("val") for node in captured.graph_module.graph.nodes]
    assert not any(isinstance(value, Tensor) and value.is_complex() for value in values)


@pytest.mark.parametrize("kind", ["modulus", "a real number added"])
def test_other_complex_ops_are_left(kind: str) -> None:
    captured = capture_small(Turned(kind), torch.randn(2, 5, 8), torch.randn(2, 8))
    inputs = torch.randn(3, 4, 8), torch.randn(3, 8)
    apply_and_check(MakeComplexReal(), captured.graph_module, inputs, modified=False, tolerance=0)


def test_a_graph_without_complex_values_is_left() -> None:
    captured = capture_small(nn.Linear(8, 8), torch.randn(2, 5, 8))
    apply_and_check(MakeComplexReal(), captured.graph_module, (torch.randn(3, 4, 8),), modified=False, tolerance=0)
