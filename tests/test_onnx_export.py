"""Lowering to ONNX and the directory that is written: numbers, names, sizes, operators, refusals."""

from __future__ import annotations

import errno
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, BertConfig, GenerationConfig

from teq_graph.capture import CapturedGraph, capture
from teq_graph.config import BITS, WeightSpec
from teq_graph.errors import ConfigError, ExportError
from teq_graph.graph.products import product_nodes, weight_name_of
from teq_graph.loading import LoadedModel
from teq_graph.onnx.export import export_onnx, lower
from teq_graph.onnx.export.model_file import save_model
from teq_graph.onnx.export.translations import foreign_operators
from teq_graph.passes.fold_constants import FoldConstants
from teq_graph.passes.fuse_rms_norm import FuseRMSNorm
from teq_graph.passes.lower_to_matmul_nbits import LowerToMatMulNBits
from teq_graph.passes.normalize_linears import NormalizeLinears
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.passes.remove_no_ops import RemoveNoOps
from teq_graph.passes.untie_weights import UntieWeights
from teq_graph.system.directories import EXPORTED, new_directory
from teq_graph.system.files import write_json

DYNAMIC = torch.export.Dim.DYNAMIC
VOCAB = 97


def prepare(captured: CapturedGraph, spec: WeightSpec | None = None, lm_head: bool = False) -> CapturedGraph:
    """Normalise and, with `spec`, quantize every linear (of the vocabulary only if `lm_head`)."""
    for step in (RemoveNoOps(), NormalizeLinears(), FoldConstants(), FuseRMSNorm()):
        step(captured.graph_module)
    if spec is not None:
        names = {weight_name_of(linear) for linear in product_nodes(captured.graph_module)}
        if lm_head:
            UntieWeights(names)(captured.graph_module)
            names = {weight_name_of(linear) for linear in product_nodes(captured.graph_module)}
        specs = {name: spec for name in names if lm_head or name != captured.lm_head}
        QuantizeLinears(specs)(captured.graph_module)
        LowerToMatMulNBits()(captured.graph_module)
    return captured


def tiny_llama(**changes: Any) -> CapturedGraph:
    sizes = dict(vocab_size=VOCAB, hidden_size=40, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4)
    config = AutoConfig.for_model("llama", **{**sizes, "num_key_value_heads": 2, "head_dim": 12, **changes})
    return capture(AutoModelForCausalLM.from_config(config).eval())


@pytest.fixture(scope="module")
def llama() -> CapturedGraph:
    """A decoder in 4 bits, for tests that leave it as it is."""
    torch.manual_seed(0)
    return prepare(tiny_llama(), WeightSpec(4, 32))


@pytest.fixture(scope="module")
def lowered(llama: CapturedGraph) -> ir.Model:
    """`llama` in float32."""
    return lower(llama, accuracy_level=1).model


def mlp() -> CapturedGraph:
    model = nn.Sequential(nn.Linear(100, 72), nn.GELU(), nn.Linear(72, 24, bias=False)).eval()
    return capture(model, (torch.randn(3, 100),), ({0: DYNAMIC},))


def open_model(model: ir.Model, directory: Path) -> onnxruntime.InferenceSession:
    save_model(model, directory / "model.onnx")
    return onnxruntime.InferenceSession(str(directory / "model.onnx"), providers=["CPUExecutionProvider"])


def relative_error(actual: npt.NDArray[Any], expected: Tensor) -> float:
    reference = expected.detach().double().numpy()
    return float(np.abs(actual.astype(np.float64) - reference).max() / np.abs(reference).max())


def decoder_feeds(captured: CapturedGraph, ids: Tensor, mask: Tensor, past: list[tuple[Any, Any]]) -> dict[str, Any]:
    feeds: dict[str, Any] = {"input_ids": ids.numpy(), "attention_mask": mask.numpy()}
    for index, pair in enumerate(past):
        for kind, value in zip(("key", "value"), pair, strict=True):
            feeds[f"past_key_values.{index}.{kind}"] = np.asarray(value)
    return feeds


def check_decoder(captured: CapturedGraph, session: onnxruntime.InferenceSession, tolerance: float) -> None:
    """The whole sequence at once, and prefill with 8 decode steps, against the PyTorch graph; with left padding."""
    assert captured.decoder is not None
    ids = torch.randint(0, VOCAB, (3, 13))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    real = mask.bool().numpy()
    empty = captured.decoder.empty_past(3, captured.dtype)
    with torch.no_grad():
        expected, _ = captured.graph_module(ids, mask, empty)
    kind = np.float16 if session.get_inputs()[2].type == "tensor(float16)" else np.float32
    past: list[tuple[Any, Any]] = [tuple(part.numpy().astype(kind) for part in pair) for pair in empty]
    (whole, *_) = session.run(None, decoder_feeds(captured, ids, mask, past))
    assert whole.dtype == kind
    assert relative_error(whole[real], expected[mask.bool()]) <= tolerance
    steps, position = [], 0
    for length in (5, *[1] * 8):
        part = slice(position, position + length)
        position += length
        logits, *present = session.run(None, decoder_feeds(captured, ids[:, part], mask[:, :position], past))
        past = list(zip(present[::2], present[1::2], strict=True))
        steps.append(logits)
    assert relative_error(np.concatenate(steps, axis=1)[real], expected[mask.bool()]) <= tolerance


@pytest.mark.parametrize("symmetric", [False, True], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("group_size", [16, 64, -1])
@pytest.mark.parametrize("bits", BITS)
def test_quantized_linears_equal_pytorch(bits: int, group_size: int, symmetric: bool, tmp_path: Path) -> None:
    captured = prepare(mlp(), WeightSpec(bits, group_size, symmetric))
    session = open_model(lower(captured, accuracy_level=1).model, tmp_path)
    x = torch.randn(7, 100)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(actual, captured.graph_module(x)) <= 1e-5


def test_decoder_equals_pytorch(llama: CapturedGraph, lowered: ir.Model, tmp_path: Path) -> None:
    # Of seven in each of two layers, key and value are one, and gate and up.
    assert [node.op_type for node in lowered.graph].count("MatMulNBits") == 10
    check_decoder(llama, open_model(lowered, tmp_path), 1e-4)


def test_half_precision_decoder_equals_pytorch(llama: CapturedGraph, tmp_path: Path) -> None:
    check_decoder(llama, open_model(lower(llama, dtype="float16", accuracy_level=1).model, tmp_path), 3e-3)


def test_three_bits_and_whole_rows_in_a_decoder(tmp_path: Path) -> None:
    captured = prepare(tiny_llama(num_hidden_layers=1), WeightSpec(3, -1, True))
    model = lower(captured, accuracy_level=1).model
    products = [node for node in model.graph if node.op_type == "MatMulNBits"]
    assert {node.attributes["bits"].as_int() for node in products} == {4}
    assert {node.attributes["block_size"].as_int() for node in products} <= {64, 128}
    check_decoder(captured, open_model(model, tmp_path), 1e-4)


def test_quantized_head_of_a_tied_model(tmp_path: Path) -> None:
    captured = prepare(tiny_llama(num_hidden_layers=1, tie_word_embeddings=True), WeightSpec(4, 16), lm_head=True)
    model = lower(captured, accuracy_level=1).model
    assert len([node for node in model.graph if node.op_type == "MatMulNBits"]) == 6
    check_decoder(captured, open_model(model, tmp_path), 1e-4)


def test_one_key_head_for_all_query_heads(tmp_path: Path) -> None:
    sizes = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("falcon", **sizes, eos_token_id=1, bos_token_id=1))
    captured = prepare(capture(model.eval()))
    assert captured.decoder is not None and captured.decoder.layers[0][0].sizes[0] == 1
    check_decoder(captured, open_model(lower(captured).model, tmp_path), 1e-5)


def test_decoder_names_and_dimensions(lowered: ir.Model, tmp_path: Path) -> None:
    session = open_model(lowered, tmp_path)
    past = ["batch_size", 2, "past_sequence_length", 12]
    present = ["batch_size", 2, "total_sequence_length", 12]
    pairs = [(layer, kind) for layer in range(2) for kind in ("key", "value")]
    assert {item.name: item.shape for item in session.get_inputs()} == {
        "input_ids": ["batch_size", "sequence_length"],
        "attention_mask": ["batch_size", "total_sequence_length"],
        **{f"past_key_values.{layer}.{kind}": past for layer, kind in pairs},
    }
    assert {item.name: item.shape for item in session.get_outputs()} == {
        "logits": ["batch_size", "sequence_length", VOCAB],
        **{f"present.{layer}.{kind}": present for layer, kind in pairs},
    }


def test_attention_and_norms_are_one_operator_each(lowered: ir.Model) -> None:
    """The heads of four channels are none for GroupQueryAttention; the first norm has no residual before it."""
    counts = [node.op_type for node in lowered.graph]
    assert counts.count("Attention") == 2
    assert counts.count("RMSNormalization") == 1
    assert counts.count("SkipSimplifiedLayerNormalization") == 4
    assert counts.count("QuickGelu") == 2
    assert "Sigmoid" not in counts
    skips = [node for node in lowered.graph if node.op_type == "SkipSimplifiedLayerNormalization"]
    assert all(bool(value.name) == bool(value.uses()) for node in skips for value in node.outputs)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_layer_of_a_decoder_is_ten_operators(dtype: str) -> None:
    decoders = [prepare(tiny_llama(head_dim=16, num_hidden_layers=n), WeightSpec(4, 32)) for n in (1, 2)]
    one, two = ([node.op_type for node in lower(captured, dtype=dtype).model.graph] for captured in decoders)
    assert len(two) - len(one) == 10
    assert one.count("GroupQueryAttention") == 1 and one.count("MatMulNBits") == 4


def test_the_model_is_valid_and_has_known_operators_only(lowered: ir.Model, tmp_path: Path) -> None:
    save_model(lowered, tmp_path / "model.onnx")
    path = tmp_path / "model.onnx"
    onnx.checker.check_model(str(path))
    model = onnx.load(path, load_external_data=False)
    assert {node.domain for node in model.graph.node} <= {"", "com.microsoft"}
    assert not model.functions
    assert {item.domain: item.version for item in model.opset_import} == {"": 23, "com.microsoft": 1}


def test_foreign_operators_are_named() -> None:
    node = ir.Node("pkg.elsewhere", "Mystery", [], name="node_7")
    model = ir.Model(ir.Graph([], node.outputs, nodes=[node], name="graph"), ir_version=10)
    assert foreign_operators(model) == {"pkg.elsewhere::Mystery": node}


def test_an_operator_without_translation_is_refused_in_one_line(tmp_path: Path) -> None:
    class Spectrum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.linalg.eigvalsh(self.linear(x) @ x.T)

    captured = capture(Spectrum().eval(), (torch.randn(8, 8),))
    with pytest.raises(ExportError, match=r"eigh|eigvalsh") as caught:
        export_onnx(captured, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_operators_that_only_torch_decomposes(tmp_path: Path) -> None:
    class Squares(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.square(self.linear(x)).std(dim=-1)

    captured = capture(Squares().eval(), (torch.randn(3, 8),), ({0: DYNAMIC},))
    session = open_model(lower(captured).model, tmp_path)
    x = torch.randn(5, 8)
    (actual,) = session.run(None, {"x": x.numpy()})
    assert relative_error(actual, captured.graph_module(x)) <= 1e-5


class Beside(nn.Module):
    """A result with numbers beside its tensors, as the sizes of an image in patches."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return {"y": y, "sizes": (3, 2), "more": [y * 2, True, None, x.shape[0]]}


def test_numbers_beside_tensors_are_no_outputs(tmp_path: Path) -> None:
    captured = capture(Beside().eval(), (torch.randn(3, 8),), ({0: DYNAMIC},))
    session = open_model(lower(captured).model, tmp_path)
    x = torch.randn(5, 8)
    expected = captured.graph_module(x)
    names = [item.name for item in session.get_outputs()]
    assert names[:2] == ["y", "more.0"]
    actual = dict(zip(names, session.run(None, {"x": x.numpy()}), strict=True))
    assert relative_error(actual["y"], expected["y"]) <= 1e-6
    assert relative_error(actual["more.0"], expected["more"][0]) <= 1e-6
    assert (expected["sizes"], expected["more"][1]) == ((3, 2), True)


class NoNumbers(nn.Module):
    """Numbers that are none, as of a softmax over nothing, beside a choice that torch does not decompose."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, keep: Tensor) -> tuple[Tensor, ...]:
        chosen = self.linear(x)[:, keep]
        attended = chosen.masked_fill((chosen < 0) | (x[:, :1] == 0), -math.inf).softmax(-1)
        return attended.nan_to_num(), (x / 0).nan_to_num(1.5, 2.5), (x / 0).nan_to_num(neginf=-7.0), chosen.square()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_numbers_that_are_none_and_sizes_that_values_decide(dtype: torch.dtype, tmp_path: Path) -> None:
    x, keep = torch.randn(3, 8, dtype=dtype), torch.arange(8) % 3 > 0
    x[0, :3] = 0
    captured = capture(NoNumbers().eval().to(dtype), (x, keep))
    session = open_model(lower(captured, dtype=str(dtype).removeprefix("torch.")).model, tmp_path)
    expected = captured.graph_module(x, keep)
    for value, reference in zip(session.run(None, {"x": x.numpy(), "keep": keep.numpy()}), expected, strict=True):
        assert relative_error(value, reference) <= (1e-6 if dtype == torch.float32 else 2e-3)


class FromNumbers(nn.Module):
    """Differences whose first operand is a number, of floats and of integers, which a float makes floats."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        y = self.linear(x)
        return 2 - y, torch.rsub(y, 0.3, alpha=3), 1.0 - mask, 7 - mask, torch.rsub(mask, 5, alpha=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_number_minus_a_tensor(dtype: torch.dtype, tmp_path: Path) -> None:
    x, mask = torch.randn(3, 8, dtype=dtype), torch.randint(-9, 9, (3, 4))
    captured = capture(FromNumbers().eval().to(dtype), (x, mask))
    session = open_model(lower(captured, dtype=str(dtype).removeprefix("torch.")).model, tmp_path)
    expected = captured.graph_module(x, mask)
    actual = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    for value, reference in zip(actual, expected, strict=True):
        assert np.issubdtype(value.dtype, np.floating) == reference.is_floating_point()
        assert relative_error(value, reference) <= (1e-6 if dtype == torch.float32 else 2e-3)


def test_xlnet(tmp_path: Path) -> None:
    """It has no largest length, and its mask is an integer taken from a float."""
    config = AutoConfig.for_model("xlnet", vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64)
    captured = prepare(capture(AutoModelForCausalLM.from_config(config).eval()), WeightSpec(8, 16))
    session = open_model(lower(captured, accuracy_level=1).model, tmp_path)
    ids, mask = torch.randint(3, VOCAB, (3, 12)), torch.ones(3, 12, dtype=torch.long)
    mask[1, :4] = 0
    expected = captured.graph_module(**{**captured.example_kwargs, "input_ids": ids, "attention_mask": mask})
    actual = session.run(["logits"], {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})[0]
    assert relative_error(actual, expected["logits"]) <= 1e-4


class ComputedBias(nn.Module):
    """A product whose bias is computed, in a way that does not tell onnxruntime its length."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x.reshape(x.shape[0], -1, 2, 4).transpose(2, 3).reshape(x.shape)
        return nn.functional.linear(x, self.linear.weight, mixed.mean((0, 1)))


def test_a_computed_bias(tmp_path: Path) -> None:
    x = torch.randn(2, 4, 8)
    model = ComputedBias().eval()
    captured = prepare(capture(model, (x,), ({0: DYNAMIC, 1: DYNAMIC},)), WeightSpec(4, 16))
    session = open_model(lower(captured, accuracy_level=1).model, tmp_path)
    with torch.no_grad():
        expected = captured.graph_module(x)
    (actual,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert relative_error(actual, expected) <= 1e-5


def test_parts_of_a_constant_are_no_news(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            low, high = torch.arange(16, dtype=x.dtype).split(8)
            return self.linear(x) * low + high

    x = torch.randn(3, 8)
    captured = capture(Halves().eval(), (x,), ({0: DYNAMIC},))
    session = open_model(lower(captured).model, tmp_path)
    assert not caplog.records
    assert relative_error(session.run(None, {"x": x.numpy()})[0], captured.graph_module(x)) <= 1e-6


class Padded(nn.Module):
    """Pooling over values below zero, with zeros around them."""

    def __init__(self, pool: nn.Module, by: float) -> None:
        super().__init__()
        self.convolution, self.pool, self.by = nn.Conv2d(3, 16, 1), pool, by

    def forward(self, x: Tensor) -> Tensor:
        y = -self.convolution(x).abs() - 0.5
        return self.pool(nn.functional.pad(y, (1, 1, 1, 1), value=self.by))


@pytest.mark.parametrize("by", [0.0, 0.25])
@pytest.mark.parametrize("pool", [nn.MaxPool2d(3, 2), nn.AvgPool2d(3, 2)], ids=["max", "mean"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_zeros_around_what_is_pooled(pool: nn.Module, by: float, dtype: str, tmp_path: Path) -> None:
    """onnxruntime makes padding by 0 a part of a MaxPool, which pads by less than every number."""
    x = torch.randn(2, 3, 9, 9)
    captured = capture(Padded(pool, by).eval(), (x,), ({0: DYNAMIC},))
    session = open_model(lower(captured, dtype=dtype).model, tmp_path)
    other = torch.randn(3, 3, 9, 9, dtype=getattr(torch, dtype))
    with torch.no_grad():
        expected = captured.graph_module(other.float())
    (actual,) = session.run(None, {"x": other.numpy()})
    assert relative_error(actual, expected) <= (1e-6 if dtype == "float32" else 2e-3)


class Masked(nn.Module):
    """Attention under one mask for all queries."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        heads = self.linear(x).unflatten(-1, (2, 8)).transpose(1, 2)
        added = (1.0 - mask[:, None, None].to(x.dtype)) * -1e4
        return nn.functional.scaled_dot_product_attention(heads, heads, heads, attn_mask=added)


def test_a_mask_that_is_the_same_for_all_queries(tmp_path: Path) -> None:
    x, mask = torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.long)
    captured = capture(Masked().eval(), (x, mask), ({0: DYNAMIC, 1: DYNAMIC}, {0: DYNAMIC, 1: DYNAMIC}))
    session = open_model(lower(captured).model, tmp_path)
    x, mask = torch.randn(3, 7, 16), torch.ones(3, 7, dtype=torch.long)
    mask[1, 4:] = 0
    with torch.no_grad():
        expected = captured.graph_module(x, mask)
    (actual,) = session.run(None, {"x": x.numpy(), "mask": mask.numpy()})
    assert relative_error(actual, expected) <= 1e-5


def test_other_models_keep_their_names(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
    captured = prepare(capture(AutoModel.from_config(config).eval()), WeightSpec(8, 16))
    session = open_model(lower(captured, accuracy_level=1).model, tmp_path)
    inputs = {item.name: item for item in session.get_inputs()}
    assert set(inputs) == {name for name, value in captured.example_kwargs.items() if isinstance(value, Tensor)}
    assert inputs["input_ids"].shape[0] == "batch_size" and isinstance(inputs["input_ids"].shape[1], str)
    assert [item.name for item in session.get_outputs()] == ["last_hidden_state", "pooler_output"]
    kwargs = {name: torch.ones(3, 6, dtype=torch.long) for name in inputs}
    kwargs["input_ids"] = torch.randint(0, 50, (3, 6))
    kwargs["attention_mask"][1, 4:] = 0
    expected = captured.graph_module(**{**captured.example_kwargs, **kwargs})
    actual = session.run(None, {name: value.numpy() for name, value in kwargs.items()})
    for value, reference in zip(actual, (expected["last_hidden_state"], expected["pooler_output"]), strict=True):
        assert relative_error(value, reference) <= 1e-4


def test_the_captured_graph_is_left_as_it_is() -> None:
    captured = prepare(tiny_llama(num_hidden_layers=1), WeightSpec(3, -1))
    module = captured.graph_module
    code = str(module.graph)
    tensors = dict(module.state_dict(keep_vars=True))
    values = {name: tensor.clone() for name, tensor in tensors.items()}
    lower(captured, dtype="float16")
    assert str(module.graph) == code
    after = dict(module.state_dict(keep_vars=True))
    assert after.keys() == tensors.keys()
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())


def test_a_tied_weight_is_stored_once(tmp_path: Path) -> None:
    wide = dict(vocab_size=3000, hidden_size=96, num_hidden_layers=1, head_dim=8)
    for tied, copies in ((True, 1), (False, 2)):
        captured = prepare(tiny_llama(**wide, tie_word_embeddings=tied))
        out = export_onnx(captured, tmp_path / str(tied))
        size = (out / "model.onnx.data").stat().st_size
        rest = sum(tensor.nbytes for tensor in captured.graph_module.state_dict().values()) - copies * 3000 * 96 * 4
        assert copies * 3000 * 96 * 4 <= size <= copies * 3000 * 96 * 4 + rest
        check_size = (out / "model.onnx").stat().st_size
        assert check_size < 200_000


def test_small_models_are_one_file(tmp_path: Path) -> None:
    out = export_onnx(prepare(mlp(), WeightSpec(4, 32)), tmp_path / "out")
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.onnx", "report.json", "teq_graph.json"]


def test_files_of_a_language_model(stories260k: LoadedModel, tmp_path: Path) -> None:
    model = stories260k.model
    captured = prepare(capture(model), WeightSpec(4, 32))
    generation = GenerationConfig(eos_token_id=[2, 5], bos_token_id=1)
    out = export_onnx(
        captured,
        tmp_path / "out",
        tokenizer=stories260k.tokenizer,
        config=model.config,
        generation_config=generation,
    )
    present = {path.name for path in out.iterdir()}
    assert present >= {"model.onnx", "tokenizer.json", "config.json", "generation_config.json", "genai_config.json"}
    described = json.loads((out / "teq_graph.json").read_text())
    attention = json.loads((out / "report.json").read_text())["attention"]
    assert attention["fused"] == 5 and len(attention["refusals"]) == 5
    assert all("of 8 channels 8 turn" in r["reason"] and r["is_fused"] for r in attention["refusals"])
    assert described["weights"] == {"4/32": 25}  # query, key and value are one, and gate and up
    assert described["eos_token_ids"] == [2, 5]
    assert described["decoder"]["max_positions"] == 512
    genai = json.loads((out / "genai_config.json").read_text())["model"]
    assert genai["type"] == "decoder" and genai["eos_token_id"] == [2, 5] and genai["bos_token_id"] == 1
    assert (genai["context_length"], genai["vocab_size"]) == (512, 512)
    assert (genai["decoder"]["num_key_value_heads"], genai["decoder"]["head_size"]) == (4, 8)


def test_export_and_session_say_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    captured = prepare(tiny_llama(num_hidden_layers=1), WeightSpec(3, 32))
    for dtype in ("float32", "float16"):
        out = export_onnx(captured, tmp_path / dtype, dtype=dtype)
        onnxruntime.InferenceSession(str(out / "model.onnx"), providers=["CPUExecutionProvider"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("option", "value"),
    [("dtype", "float64"), ("accuracy_level", 5), ("accuracy_level", None), ("opset", 20)],
)
def test_wrong_options(option: str, value: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=option):
        export_onnx(mlp(), tmp_path / "out", **{option: value})
    assert not list(tmp_path.iterdir())


def test_an_existing_directory_is_kept_unless_overwritten(tmp_path: Path) -> None:
    captured = prepare(mlp())
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("mine")
    with pytest.raises(ExportError, match="exists"):
        export_onnx(captured, out)
    with pytest.raises(ExportError, match="out holds other files"):
        export_onnx(captured, out, overwrite=True)
    assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    for _ in range(2):
        export_onnx(captured, out, overwrite=True)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "model.onnx", "report.json", "teq_graph.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_parent_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="cannot be written") as caught:
        export_onnx(mlp(), tmp_path / "file" / "out")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_behind(overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(model: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(ir, "save", save)
    if overwrite:
        with new_directory(tmp_path / "out", False, EXPORTED) as staging:
            write_json(staging / EXPORTED, {"format_version": 1})
    with pytest.raises(ExportError, match="No space left on device") as caught:
        export_onnx(prepare(mlp()), tmp_path / "out", overwrite=overwrite)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == (["out", EXPORTED] if overwrite else [])
