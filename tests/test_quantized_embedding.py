"""Quantized embedding tables: what is found and refused, the pass, one weight with a tied projection, ONNX."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from support.architectures import BY_NAME, VOCAB
from support.compiling import LLAMA, TRAINING, compile_llama, in_one_line, tokens
from support.graphs import DYNAMIC, apply_and_check, normalize, op_names, randomize, relative_error
from torch import Tensor, nn

import teq_graph
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.analysis.weights import GraphWeight, find_weights
from teq_graph.capture import CapturedGraph, capture
from teq_graph.config import BITS, WeightSpec
from teq_graph.errors import ConfigError, InputError
from teq_graph.graph.nodes import is_call
from teq_graph.graph.tensors import get_tensor, node_tensor, set_tensor
from teq_graph.onnx.export import lower
from teq_graph.onnx.export.model_file import save_model
from teq_graph.onnx.runtime import OnnxDecoder, load
from teq_graph.passes.lower_to_matmul_nbits import LowerToMatMulNBits
from teq_graph.passes.quantize_embeddings import QuantizeEmbeddings
from teq_graph.quantization import QuantizedWeight, find_clipped_grid, quantize, quantize_weight

embedding_nbits = torch.ops.teq_graph.embedding_nbits.default

WIDTH, WORDS = 40, 50
SHAPES = ({0: DYNAMIC, 1: DYNAMIC},)
GATHER, PRODUCT = "teq_graph.embedding_nbits.default", "teq_graph.matmul_nbits.default"
BOTH = QuantizationConfig(bits=4, group_size=16, quantize_lm_head=True, quantize_embedding=True)


class Words(nn.Module):
    """Words and their positions, a linear, and a projection back onto the words, tied or of its own."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, WIDTH), nn.Embedding(32, WIDTH)
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WORDS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        places = self.places(torch.arange(ids.shape[1], device=ids.device))
        return self.head(self.inner(self.words(ids) + places).tanh())


def word_ids(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randint(WORDS, (batch, length))


def capture_words(model: nn.Module) -> CapturedGraph:
    return normalize(capture(randomize(model), (word_ids(),), SHAPES))


def compile_words(tied: bool, quantization: QuantizationConfig = BOTH, **options: Any) -> teq_graph.CompiledModel:
    model = randomize(Words(tied))
    return teq_graph.compile(model, (word_ids(),), SHAPES, quantization=quantization, **{"training": None, **options})


def tables_of(captured: CapturedGraph) -> list[GraphWeight]:
    return [weight for weight in find_weights(captured.graph_module) if weight.kind == "embedding"]


def tied_llama() -> nn.Module:
    model = randomize(LLAMA.make())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    return model


def tensor_names(compiled: teq_graph.CompiledModel, part: str) -> list[str]:
    return [name for name in compiled.graph_module.state_dict() if part in name]


# -------------------------------------------------------------------------------------------------------- operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("bits", "group"), [*itertools.product(BITS, (16, 128, -1))])
def test_the_operator_gives_rows(bits: int, group: int, dtype: torch.dtype) -> None:
    for symmetric in (False, True):
        weight = quantize_weight(torch.randn(WORDS, WIDTH), WeightSpec(bits, group, symmetric), dtype)
        stored = (weight.packed, weight.scales, weight.zero_points, WIDTH, bits, weight.block_size)
        for shape in ((), (5,), (2, 3), (0, 4)):
            indices = torch.randint(WORDS, shape)
            rows = embedding_nbits(indices, *stored)
            assert rows.shape == (*shape, WIDTH) and rows.dtype == dtype and rows.is_contiguous()
            assert torch.equal(rows, weight.dequantize(dtype)[indices])
    if group == 16:
        torch.library.opcheck(embedding_nbits, (torch.randint(WORDS, (2, 3), dtype=torch.int32), *stored))


def test_the_operator_refuses() -> None:
    weight = quantize_weight(torch.randn(WORDS, WIDTH), WeightSpec(4, 16))
    stored = (weight.packed, weight.scales, weight.zero_points)
    for index in (-1, WORDS):
        with pytest.raises((IndexError, RuntimeError), match="out of range"):
            embedding_nbits(torch.tensor([index]), *stored, WIDTH, 4, 16)
    for indices, width in ((torch.rand(3), WIDTH), (torch.tensor([1]), WIDTH + 16)):
        for device in ("cpu", "meta"):
            with pytest.raises(InputError, match="accepted") as caught:
                embedding_nbits(indices.to(device), *(x.to(device) for x in stored if x is not None), width, 4, 16)
            in_one_line(caught)


# -------------------------------------------------------------------------------------------------- analysis, pass


def test_tables_that_an_input_looks_up() -> None:
    captured = capture_words(Words())
    places, words = tables_of(captured)
    assert (words.name, words.is_tied, words.reason) == ("words.weight", True, None)
    assert (places.name, places.is_tied) == ("places.weight", False) and "positions" in str(places.reason)


def test_indices_may_be_moved_but_not_computed() -> None:
    class Lookup(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moved, self.computed, self.read = (nn.Embedding(WORDS, WIDTH) for _ in range(3))

        def forward(self, ids: Tensor) -> Tensor:
            later = ids[:, 1:]
            rows = self.moved(ids.to(torch.int32).view(-1, ids.shape[-1])[:, 1:])
            return rows + self.computed(later * 0 + 1) + self.read(later) * (self.read.weight * ids.sum()).sum()

    captured = capture_words(Lookup())
    reasons = {table.name: str(table.reason) for table in tables_of(captured)}
    assert reasons["moved.weight"] == "None" and "positions" in reasons["computed.weight"]
    assert reasons["read.weight"] == "read by aten.mul, too"


@pytest.mark.parametrize("spec", [WeightSpec(2, 16), WeightSpec(3, -1), WeightSpec(4, 16, True)], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_the_pass_stores_a_table_once(tied: bool, spec: WeightSpec) -> None:
    captured = capture_words(Words(tied))
    graph_module, inputs = captured.graph_module, (word_ids(2, 9),)
    table = quantize_weight(get_tensor(graph_module, "words.weight"), spec)
    set_tensor(graph_module, "words.weight", table.dequantize())
    apply_and_check(QuantizeEmbeddings({"words.weight": table}), graph_module, inputs, tolerance=0)
    apply_and_check(LowerToMatMulNBits(), graph_module, inputs, modified=tied, tolerance=1e-5)
    ops, names = op_names(graph_module), set(graph_module.state_dict())
    assert ops.count(GATHER) == 1 and ops.count(PRODUCT) == tied and ops.count("aten.embedding.default") == 1
    assert "words.weight" not in names and "places.weight" in names
    assert [name for name in names if "codes" in name] == ["words.codes"]
    assert torch.equal(get_tensor(graph_module, "words.codes"), table.packed)


def test_the_pass_leaves_other_tables() -> None:
    graph_module = capture_words(Words()).graph_module
    table = quantize_weight(torch.randn(WORDS, WIDTH), WeightSpec(4, 16))
    for tables in ({}, {"other.weight": table}, {"inner.bias": table}):
        apply_and_check(QuantizeEmbeddings(tables), graph_module, (word_ids(),), modified=False, tolerance=0)


# --------------------------------------------------------------------------------------------------------- compile


@pytest.mark.parametrize("training", [None, TRAINING], ids=["rounded", "trained"])
def test_a_tied_projection_and_its_table_are_one_weight(training: TrainingConfig | None) -> None:
    model = tied_llama()
    weight = model.get_input_embeddings().weight.detach().clone()  # type: ignore[operator]
    compiled = compile_llama(model, quantization=BOTH, training=training)
    spec = WeightSpec(4, 16)
    grid = find_clipped_grid(weight, spec)
    clipped = QuantizedWeight.from_codes(quantize(weight, grid), grid)
    table = quantize_weight(weight, spec) if training is None else clipped
    (lookup,) = [node for node in compiled.graph_module.graph.nodes if is_call(node, embedding_nbits)]
    head = [node for node in compiled.graph_module.graph.nodes if str(node.target) == PRODUCT][-1]
    assert lookup.args[1:4] == head.args[1:4]
    for node, expected in zip(lookup.args[1:4], (table.packed, table.scales, table.zero_points), strict=True):
        assert expected is not None and torch.equal(node_tensor(node), expected)
    assert tensor_names(compiled, "embed") == [f"model.embed_tokens.{x}" for x in ("codes", "scales", "zero_points")]
    report = compiled.report
    (embedding,) = report.embeddings
    assert embedding.tied and embedding.spec == spec and embedding.bytes_after == table.nbytes
    error = float((table.dequantize() - weight).norm() / weight.norm())
    assert embedding.error == pytest.approx(error) and f"error {error:.1%}" in str(report)
    assert report.bytes_after == sum(tensor.nbytes for tensor in compiled.graph_module.state_dict().values())
    assert len(report.quantized) == 15 and not report.in_float
    # The final norm keeps its gain: its only reader cannot be scaled.
    assert not {linear.name: linear for linear in report.linears}[embedding.name].scaled


def test_blocks_learn_on_the_quantized_table_and_towards_the_float_model(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    run_blocks = teq_graph.training.trainer.Trainer._train_blocks

    def spy(self: Any, stages: Any) -> None:
        name = next(iter(self.tables))
        read = get_tensor(self.working, name), self.reference.tensor(name)
        seen.append((*read, self.tables[name].dequantize()))
        run_blocks(self, stages)

    monkeypatch.setattr(teq_graph.training.trainer.Trainer, "_train_blocks", spy)
    model = tied_llama()
    compile_llama(model, quantization=BOTH, training=TRAINING)
    ((trained, reference, table),) = seen
    assert torch.equal(trained, table)
    assert torch.equal(reference, model.get_input_embeddings().weight)  # type: ignore[operator]


def test_an_untied_table_leaves_the_projection_to_training() -> None:
    compiled = compile_words(False, training=TrainingConfig(stages=("gptq",)), calibration=[(word_ids(),)] * 3)
    words, places = compiled.report.embeddings
    assert not words.tied and words.spec == WeightSpec(4, 16)
    assert places.spec is None and "positions" in str(places.reason) and places in compiled.report.in_float
    assert tensor_names(compiled, "codes") == ["words.codes", "inner.codes", "head.codes"]
    assert len(compiled.report.quantized) == 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"quantize_lm_head": False}, "tied to a projection that stays in float"), ({"skip": ("words*",)}, "skipped")],
    ids=["head in float", "skipped"],
)
def test_a_table_whose_projection_stays_in_float_stays_so(options: dict[str, Any], reason: str) -> None:
    options = {"quantize_lm_head": True, "quantize_embedding": True, "group_size": 16, **options}
    if "skip" in options:
        compiled = compile_words(True, QuantizationConfig(**options))
    else:
        compiled = compile_llama(tied_llama(), quantization=QuantizationConfig(**options))
    assert GATHER not in op_names(compiled.graph_module)
    table = compiled.report.embeddings[-1]
    assert table.spec is None and reason in str(table.reason) and table.bytes_after == table.bytes_before
    assert reason in str(compiled.report)


def test_an_override_is_for_both() -> None:
    quantization = QuantizationConfig(
        group_size=16, quantize_lm_head=True, quantize_embedding=True, overrides={"words.*": {"bits": 8}}
    )
    compiled = compile_words(True, quantization)
    assert [node.args[-2] for node in compiled.graph_module.graph.nodes if str(node.target) == GATHER] == [8]
    assert {linear.name: str(linear.spec) for linear in compiled.report.linears} == {
        "inner.weight": "W4g16",
        "words.weight": "W8g16",
    }


def test_without_the_option_nothing_changes() -> None:
    quantization = QuantizationConfig(group_size=16, quantize_lm_head=True)
    compiled = compile_llama(tied_llama(), quantization=quantization)
    assert GATHER not in op_names(compiled.graph_module)
    assert [table.reason for table in compiled.report.embeddings] == ["embedding (quantize_embedding=False)"]
    assert "aten.embedding.default" in op_names(compiled.graph_module)


def test_tables_count_towards_the_average_with_bits_of_their_own() -> None:
    options: dict[str, Any] = {"training": TrainingConfig(stages=(), samples=4, length=12)}
    free = QuantizationConfig(group_size=16, target_bits=3, quantize_lm_head=True, quantize_embedding=True)
    report = compile_llama(tied_llama(), quantization=free, **options).report
    (table,) = report.embeddings
    sizes = {linear.name: linear.shape[0] * linear.shape[1] for linear in report.linears}
    bits = {linear.name: linear.spec.bits for linear in report.linears if linear.spec}
    assert table.spec is not None and table.spec.bits == bits[table.name] == 4
    assert sum(bits[name] * size for name, size in sizes.items()) <= 3 * sum(sizes.values())


def test_a_pattern_without_a_match_is_refused() -> None:
    for option in ({"skip": ("nothing",)}, {"overrides": {"nothing": {"bits": 8}}}):
        with pytest.raises(
            ConfigError, match=r"matches no linear, convolution or embedding; .*places\.weight"
        ) as caught:
            compile_words(False, QuantizationConfig(group_size=16, quantize_embedding=True, **option))
        in_one_line(caught)


@pytest.mark.parametrize("name", ["GPT-2", "OPT", "BERT (post-LN)", "T5"])
def test_tables_of_architectures(name: str) -> None:
    architecture = BY_NAME[name]
    model, inputs = architecture.build(), architecture.inputs(2, 9)
    quantization = QuantizationConfig(bits=8, group_size=16, quantize_lm_head=True, quantize_embedding=True)
    compiled = teq_graph.compile(model, quantization=quantization, training=None)
    tables = [table for table in compiled.report.embeddings if table.spec is not None]
    assert [table.shape[0] for table in tables] == [VOCAB]
    assert all("positions" in str(table.reason) for table in compiled.report.embeddings if table not in tables)
    assert "aten.embedding.default" in op_names(compiled.graph_module)
    with torch.no_grad():
        expected, actual = model(**inputs)[0], compiled(**inputs)[0]
    assert float((actual - expected).norm() / expected.norm()) <= 0.1


# -------------------------------------------------------------------------------------------------- saved, exported


@pytest.mark.parametrize(("bits", "group"), [*itertools.product(BITS, (16, -1)), (4, 64), (3, 32)])
@pytest.mark.parametrize("tied", [False, True])
def test_onnxruntime_reads_one_weight_and_equals_pytorch(tied: bool, bits: int, group: int, tmp_path: Path) -> None:
    quantization = QuantizationConfig(bits, group, tied, quantize_lm_head=True, quantize_embedding=True)
    compiled = compile_words(tied, quantization)
    model = lower(compiled.captured, accuracy_level=1).model
    operators = [node for node in model.graph if node.domain == "com.microsoft"]
    assert [node.op_type for node in operators].count("GatherBlockQuantized") == 1
    stored = compiled.graph_module.state_dict()
    parts = (stored["words.codes"], stored["words.scales"], stored.get("words.zero_points"))
    weight = QuantizedWeight(*parts, WORDS, WIDTH, bits, WIDTH if group == -1 else group).for_onnxruntime()
    tensors = [value.const_value for value in model.graph.initializers.values()]
    files = [torch.from_numpy(tensor.numpy().copy()) for tensor in tensors if tensor is not None]
    for part in (weight.packed, weight.scales):
        alike = [tensor for tensor in files if (tensor.dtype, tensor.numel()) == (part.dtype, part.numel())]
        assert len(alike) == (1 if tied else 2)  # where the projection has codes of its own
        assert sum(torch.equal(tensor.view_as(part), part) for tensor in alike) == 1
    save_model(model, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    ids = word_ids(2, 9)
    (actual,) = session.run(None, {session.get_inputs()[0].name: ids.numpy()})
    assert relative_error(torch.from_numpy(actual), compiled(ids)) <= 1e-5


def test_a_table_and_its_projection_are_one_place_in_the_file(tmp_path: Path) -> None:
    words, width = 4096, 512

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(words, width)

        def forward(self, ids: Tensor) -> Tensor:
            return nn.functional.linear(self.words(ids).tanh(), self.words.weight)

    ids = torch.randint(words, (2, 5))
    compiled = teq_graph.compile(randomize(Tied()), (ids,), SHAPES, quantization=BOTH, training=None)
    compiled.export_onnx(tmp_path / "model", accuracy_level=1)
    path = tmp_path / "model" / "model.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    operators, tensors = [node.op_type for node in graph.node], {tensor.name: tensor for tensor in graph.initializer}
    assert "Reshape" not in operators
    lookup, product = (graph.node[operators.index(name)] for name in ("GatherBlockQuantized", "MatMulNBits"))
    table, weight = tensors[lookup.input[0]], tensors[product.input[1]]
    assert list(table.dims) == [words, width // 2] and list(weight.dims) == [words, width // 16, 8]
    assert table.external_data == weight.external_data
    stored = sum(tensor.nbytes for tensor in compiled.graph_module.state_dict().values())
    assert path.with_name("model.onnx.data").stat().st_size <= stored * 1.01
    actual = load(tmp_path / "model").run(ids=ids)["output"]  # type: ignore[union-attr]
    assert relative_error(torch.from_numpy(actual), compiled(ids)) <= 1e-5


@pytest.mark.parametrize("bits", [3, 4])
def test_a_tied_decoder_in_files(bits: int, tmp_path: Path) -> None:
    quantization = QuantizationConfig(bits, 16, quantize_lm_head=True, quantize_embedding=True)
    compiled, ids = compile_llama(tied_llama(), quantization=quantization, training=TRAINING), tokens(2, 11)
    expected = compiled(input_ids=ids).logits
    compiled.save(tmp_path / "saved")
    loaded = teq_graph.load(tmp_path / "saved")
    before, after = compiled.graph_module.state_dict(), loaded.graph_module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert loaded.report == compiled.report and torch.equal(loaded(input_ids=ids).logits, expected)
    for dtype, tolerance in (("float32", 1e-5), ("float16", 5e-3)):
        loaded.export_onnx(tmp_path / dtype, dtype=dtype, accuracy_level=1)  # type: ignore[arg-type]
        decoder = load(tmp_path / dtype)
        assert isinstance(decoder, OnnxDecoder)
        assert relative_error(torch.from_numpy(decoder.logits(ids.numpy())), expected) <= tolerance
        # Every weight once: the vocabulary projection's is the table's. Per layer k and v are one, and gate and up.
        assert decoder.metadata.weights == {"4/16": 1 + 2 * (7 - 2)}
