"""Weights for the fused kernels of onnxruntime's CUDA provider: what they are, how they are exported and opened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
import transformers
from support.compiling import in_one_line
from support.graphs import randomize, relative_error

import teq_graph
from teq_graph import QuantizationConfig
from teq_graph.errors import ConfigError
from teq_graph.onnx.directory import GENAI_FILE, MODEL_FILE, Metadata
from teq_graph.onnx.fused_products import FUSED_PRODUCTS, has_fused_kernel, has_fused_products
from teq_graph.onnx.runtime import OnnxDecoder, on_device

HALF = ir.DataType.FLOAT16


def qwen() -> torch.nn.Module:
    """Its queries, keys and values have biases."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = transformers.Qwen2Config(vocab_size=80, num_hidden_layers=2, max_position_embeddings=64, **sizes)
    return randomize(transformers.Qwen2ForCausalLM(config)).eval()


def export(directory: Path, quantization: QuantizationConfig, dtype: Any = "float16") -> teq_graph.CompiledModel:
    compiled = teq_graph.compile(qwen(), quantization=quantization, training=None)
    compiled.export_onnx(directory, dtype=dtype, accuracy_level=1)
    return compiled


@pytest.mark.parametrize(("bits", "group_size"), [(2, 64), (4, 32), (8, 32)])
def test_grids(bits: int, group_size: int) -> None:
    made = QuantizationConfig.for_cuda(bits, skip=("*.mlp.*",), quantize_lm_head=True)
    assert (made.bits, made.group_size, made.symmetric) == (bits, group_size, True)
    assert made.skip == ("*.mlp.*",) and made.quantize_lm_head
    assert QuantizationConfig.for_cuda(bits, group_size=group_size, symmetric=True) == QuantizationConfig.for_cuda(bits)
    assert has_fused_kernel(HALF, bits, group_size, 128, False)
    for other in [
        (ir.DataType.FLOAT, bits, group_size, 128, False),
        (HALF, bits, 128, 128, False),
        (HALF, bits, group_size, 96, False),
        (HALF, bits, group_size, 128, True),
        (HALF, 3, group_size, 128, False),
    ]:
        assert not has_fused_kernel(*other)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 3}, "bits=3: accepted are (2, 4, 8), of which onnxruntime has fused CUDA kernels"),
        ({"group_size": 128}, "group_size=128: accepted for CUDA is 32"),
        ({"symmetric": False}, "symmetric=False: accepted for CUDA is True"),
        ({"target_bits": 3.5}, "target_bits=3.5: accepted for CUDA is None"),
        ({"bits": 2, "levels": 3}, "levels=3: accepted for CUDA is None"),
    ],
)
def test_what_has_no_fused_kernel(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        QuantizationConfig.for_cuda(**options)
    assert in_one_line(caught) == message


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_export_and_decoding(bits: int, tmp_path: Path) -> None:
    """Fused kernels take no bias: those of weights that have the kernels are added apart. The CPU runs it, too."""
    compiled = export(tmp_path / "out", QuantizationConfig.for_cuda(bits))
    products = [node for node in ir.load(tmp_path / "out" / MODEL_FILE).graph if node.op_type == "MatMulNBits"]
    taken = [node for node in products if node.attributes["N"].as_int() % (128 if bits == 2 else 64) == 0]
    assert len(taken) >= 4
    assert all(value is None for node in taken for value in node.inputs[3:])
    config = json.loads((tmp_path / "out" / GENAI_FILE).read_text(encoding="utf-8"))
    assert config["model"]["decoder"]["session_options"][FUSED_PRODUCTS] == "1"
    ids = torch.randint(1, 80, (1, 9))
    logits = torch.from_numpy(OnnxDecoder.load(tmp_path / "out", threads=1).logits(ids.numpy()))
    assert relative_error(logits, compiled(input_ids=ids).logits.float()) < 3e-3


def test_genai_loads_what_has_fused_products(tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    export(tmp_path / "out", QuantizationConfig.for_cuda(4), "float32")
    config = tmp_path / "out" / GENAI_FILE
    content = json.loads(config.read_text(encoding="utf-8"))
    assert FUSED_PRODUCTS not in content["model"]["decoder"]["session_options"]
    content["model"]["decoder"]["session_options"][FUSED_PRODUCTS] = "1"
    config.write_text(json.dumps(content), encoding="utf-8")
    assert genai.Model(str(tmp_path / "out")).type == "decoder"


@pytest.mark.parametrize(
    ("quantization", "asked"),
    [(QuantizationConfig.for_cuda(4), ["1"] * 4 + ["0"] * 4), (QuantizationConfig(4, 32), ["0"] * 4)],
    ids=["for CUDA", "others"],
)
def test_sessions_ask_for_fused_kernels_first(
    quantization: QuantizationConfig, asked: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "out", quantization)
    seen: list[str] = []

    def refuse(content: bytes, sess_options: Any, providers: Any) -> None:
        seen.append(sess_options.get_session_config_entry(FUSED_PRODUCTS))
        raise RuntimeError("no such device")

    path = tmp_path / "out" / MODEL_FILE
    assert has_fused_products(ir.load(path)) == ("1" in asked)
    metadata, options = Metadata.read(tmp_path / "out"), onnxruntime.SessionOptions()
    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    assert on_device.open_on_device(path, metadata, options, [on_device.CUDA], lambda *_: None) is None
    assert seen == asked
