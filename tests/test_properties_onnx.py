"""Random small language models and encoders: the quantized PyTorch graph against onnxruntime, prefill and decode."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from support.graphs import leaves, randomize, relative_error
from support.onnx import OnnxModel
from support.seeds import BASE
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import teq_graph
from teq_graph import QuantizationConfig
from teq_graph.config import BITS, GROUP_SIZES

# Each takes seconds to trace and to export, and shrinking one hundreds of them: 5 in the check, 100 nightly.
FEW = settings(max_examples=settings().max_examples // 10, phases=set(settings().phases) - {Phase.shrink})
POSITIONS = 64

positive = st.integers(1, 3)
flags = st.booleans()


@st.composite
def decoder_configs(draw: st.DrawFn) -> Any:
    """Configurations of causal language models of any sizes."""
    family = draw(st.sampled_from(sorted(FAMILIES)))
    heads, width, layers = draw(st.integers(1, 6)), draw(st.sampled_from((4, 8, 12, 16, 20))), draw(st.integers(1, 2))
    vocabulary = draw(st.integers(5, 130))
    tied = draw(flags)
    groups = draw(st.sampled_from([count for count in range(1, heads + 1) if heads % count == 0]))
    inner = draw(st.integers(1, 90))
    common = dict(vocab_size=vocabulary, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    return AutoConfig.for_model(family, **common, **FAMILIES[family](draw, heads, groups, width, layers, inner))


def llama(draw: Any, heads: int, groups: int, width: int, layers: int, inner: int) -> dict[str, Any]:
    return dict(
        hidden_size=heads * width, num_attention_heads=heads, num_key_value_heads=groups, num_hidden_layers=layers,
        intermediate_size=inner, max_position_embeddings=POSITIONS, head_dim=draw(st.sampled_from((8, width))),
        hidden_act=draw(st.sampled_from(("silu", "gelu", "relu"))), attention_bias=draw(flags), mlp_bias=draw(flags),
    )  # fmt: skip


def qwen(draw: Any, heads: int, groups: int, width: int, layers: int, inner: int) -> dict[str, Any]:
    sizes = llama(draw, heads, groups, width, layers, inner)
    return {name: size for name, size in sizes.items() if not name.endswith("_bias")}


def mistral(draw: Any, *sizes: int) -> dict[str, Any]:
    return {**qwen(draw, *sizes), "sliding_window": draw(st.sampled_from((None, 3, 6)))}


def opt(draw: Any, heads: int, groups: int, width: int, layers: int, inner: int) -> dict[str, Any]:
    return dict(
        hidden_size=heads * width, num_attention_heads=heads, num_hidden_layers=layers, ffn_dim=inner,
        max_position_embeddings=POSITIONS, enable_bias=draw(flags), do_layer_norm_before=draw(flags),
        word_embed_proj_dim=draw(st.sampled_from((heads * width, 10))), layer_norm_elementwise_affine=draw(flags),
    )  # fmt: skip


def gpt2(draw: Any, heads: int, groups: int, width: int, layers: int, inner: int) -> dict[str, Any]:
    return dict(
        n_embd=heads * width, n_head=heads, n_layer=layers, n_inner=inner, n_positions=POSITIONS,
        scale_attn_by_inverse_layer_idx=draw(flags),
    )  # fmt: skip


def neox(draw: Any, heads: int, groups: int, width: int, layers: int, inner: int) -> dict[str, Any]:
    return dict(
        hidden_size=heads * width, num_attention_heads=heads, num_hidden_layers=layers, intermediate_size=inner,
        max_position_embeddings=POSITIONS, use_parallel_residual=draw(flags), attention_bias=draw(flags),
        rotary_pct=draw(st.sampled_from((0.5, 1.0))),
    )  # fmt: skip


def bloom(draw: Any, heads: int, groups: int, width: int, layers: int, inner: int) -> dict[str, Any]:
    return dict(
        hidden_size=heads * width, n_head=heads, n_layer=layers,
        apply_residual_connection_post_layernorm=draw(flags),
    )  # fmt: skip


FAMILIES = {"llama": llama, "qwen2": qwen, "qwen3": qwen, "mistral": mistral, "opt": opt, "gpt2": gpt2,
            "gpt_neox": neox, "bloom": bloom}  # fmt: skip

quantizations = st.builds(
    QuantizationConfig, st.sampled_from(BITS), st.sampled_from(GROUP_SIZES), flags, quantize_lm_head=flags,
    quantize_embedding=flags,
)  # fmt: skip


@pytest.mark.slow
@FEW
@given(decoder_configs(), quantizations, st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_decoders(config: Any, quantization: QuantizationConfig, batch: int, length: int, seed: int) -> None:
    torch.manual_seed(seed + BASE)
    model = randomize(AutoModelForCausalLM.from_config(config))
    compiled = teq_graph.compile(model, quantization=quantization, training=None)
    tokens = torch.randint(0, config.vocab_size, (batch, length + 3))
    expected = compiled(input_ids=tokens).logits
    with tempfile.TemporaryDirectory() as directory:
        onnx_model = OnnxModel(compiled.export_onnx(Path(directory) / "out", accuracy_level=1))
        whole, _ = onnx_model.step(compiled, tokens, None)
        assert relative_error(whole, expected) <= 1e-4
        part, past = onnx_model.step(compiled, tokens[:, :length], None)
        parts = [part]
        for position in range(length, length + 3):
            part, past = onnx_model.step(compiled, tokens[:, position : position + 1], past)
            parts.append(part)
    assert relative_error(torch.cat(parts, dim=1), expected) <= 1e-4


@st.composite
def encoder_configs(draw: st.DrawFn) -> Any:
    """Configurations of encoders of text."""
    heads, width = draw(st.integers(1, 4)), draw(st.sampled_from((4, 8, 12)))
    return AutoConfig.for_model(
        draw(st.sampled_from(("bert", "roberta", "electra"))),
        vocab_size=draw(st.integers(5, 130)), hidden_size=heads * width, num_attention_heads=heads, pad_token_id=0,
        num_hidden_layers=draw(st.integers(1, 2)), intermediate_size=draw(st.integers(1, 70)),
        max_position_embeddings=POSITIONS, hidden_act=draw(st.sampled_from(("gelu", "relu", "silu"))),
    )  # fmt: skip


@pytest.mark.slow
@FEW
@given(encoder_configs(), quantizations, st.integers(1, 3), st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_encoders(config: Any, quantization: QuantizationConfig, batch: int, length: int, seed: int) -> None:
    torch.manual_seed(seed + BASE)
    compiled = teq_graph.compile(randomize(AutoModel.from_config(config)), quantization=quantization, training=None)
    inputs = {"input_ids": torch.randint(1, config.vocab_size, (batch, length))}
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    with tempfile.TemporaryDirectory() as directory:
        actual = OnnxModel(compiled.export_onnx(Path(directory) / "out", accuracy_level=1)).run(inputs)
    assert relative_error(actual, leaves(compiled(**inputs))[0]) <= 1e-4
