"""`compile` and `transform`: what they promise."""

from __future__ import annotations

import json
import warnings
from typing import Any

import pytest
import torch
from support.architectures import BY_NAME
from support.compiling import (
    DYNAMIC,
    LLAMA,
    SMALL,
    TRAINING,
    compile_llama,
    compile_mlp,
    compile_with_kwargs,
    in_one_line,
    mlp,
    tokens,
)
from support.graphs import leaves, randomize, relative_error
from torch import Tensor, nn

import teq_graph
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.capture import CapturedGraph
from teq_graph.errors import (
    ConfigError,
    InputError,
)
from teq_graph.graph.nodes import aten, is_call
from teq_graph.graph.tensors import node_tensor


def test_compile_leaves_the_model_as_it_is() -> None:
    model = LLAMA.build()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
    compile_llama(model, training=TRAINING)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected)


def test_compile_samples_its_own_text_for_calibration() -> None:
    compiled = compile_llama(training=TRAINING)
    *inside, last = compiled.equivalences
    assert inside and all(e.scale is not None and e.scale.shape == (e.channels,) for e in inside)
    # The last norm's only reader stays in float: there is nothing to train its scale for.
    assert last.producer == "model.norm.weight" and last.scale is None
    assert compiled.report.covered == 15 and len(compiled.report.quantized) == 14
    assert compiled.report.bytes_after < compiled.report.bytes_before


def test_rounding_to_nearest_has_no_scales() -> None:
    compiled = compile_llama(training=None)
    assert all(e.scale is None for e in compiled.equivalences) and not compiled.report.blocks


def test_other_models_calibrate_on_their_example() -> None:
    compiled = compile_mlp()
    assert len(compiled.equivalences) == 1 and compiled.equivalences[0].scale is not None
    assert compiled(torch.randn(7, 20)).shape == (7, 8)


def test_keyword_arguments_and_constants() -> None:
    compiled = compile_with_kwargs()
    x, gate = torch.randn(6, 20), torch.randn(6, 32)
    outputs = compiled(x=x, gate=gate)
    assert set(outputs) == {"out", "hidden"} and outputs["out"].shape == (6, 8)
    assert relative_error(compiled({"gate": gate, "x": x}), outputs) == 0
    with pytest.raises(InputError, match="gate") as caught:
        compiled(x=x)
    in_one_line(caught)
    with pytest.raises(InputError, match="colour") as caught:
        compiled(x=x, gate=gate, colour=x)
    in_one_line(caught)


def test_the_graph_exports_and_compiles() -> None:
    compiled = compile_llama()
    captured, ids = compiled.captured, tokens(3, 7)
    args, kwargs = captured.bind({"input_ids": ids})
    expected = leaves(compiled.graph_module(*args, **kwargs))
    program = torch.export.export(
        compiled.graph_module, captured.example_args, captured.example_kwargs, dynamic_shapes=captured.dynamic_shapes
    )
    assert any("matmul_nbits" in str(node.target) for node in program.graph.nodes)
    assert relative_error(leaves(program.module(check_guards=False)(*args)), expected) <= 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dynamo's own deprecations
        faster = torch.compile(compiled.graph_module, backend="aot_eager")
        assert relative_error(leaves(faster(*args)), expected) <= 1e-6


def test_skip_and_overrides() -> None:
    quantization = QuantizationConfig(
        bits=4,
        group_size=32,
        skip=("*.k_proj.weight",),
        overrides={"*.mlp.*": {"bits": 2, "group_size": 16}, "*layers.1.mlp.down*": {"bits": 8, "symmetric": True}},
    )
    compiled = compile_llama(quantization=quantization)
    reports = {linear.name: linear for linear in compiled.report.linears}
    assert {name for name, linear in reports.items() if linear.spec is None} == {
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "lm_head.weight",
    }
    assert reports["model.layers.0.self_attn.k_proj.weight"].reason == "skipped by pattern"
    specs = {name: str(linear.spec) for name, linear in reports.items() if linear.spec}
    assert specs["model.layers.0.mlp.down_proj.weight"] == "W2g16"
    assert specs["model.layers.1.mlp.down_proj.weight"] == "W8g32 sym"
    assert specs["model.layers.1.self_attn.q_proj.weight"] == "W4g32"
    bits = [node.args[7] for node in compiled.graph_module.graph.nodes if "matmul_nbits" in str(node.target)]
    assert sorted(bits) == [2] * 5 + [4] * 6 + [8]


def test_a_tied_head_is_quantized_as_a_copy() -> None:
    model = randomize(LLAMA.make())
    model.config.tie_word_embeddings = True
    model.tie_weights()
    quantization = QuantizationConfig(bits=8, group_size=16, quantize_lm_head=True)
    compiled = compile_llama(model, quantization=quantization, training=TRAINING)
    ops = [str(node.target) for node in compiled.graph_module.graph.nodes]
    assert ops.count("teq_graph.matmul_nbits.default") == 15 and "aten.linear.default" not in ops
    (embedding,) = [n for n in compiled.graph_module.graph.nodes if is_call(n, aten.embedding.default)]
    assert torch.equal(node_tensor(embedding.args[0]), model.model.embed_tokens.weight)
    ids = tokens()
    with torch.no_grad():
        expected = model(ids).logits
    assert float((compiled(input_ids=ids).logits - expected).norm() / expected.norm()) <= 0.05


def test_the_head_stays_in_float_by_default() -> None:
    compiled = compile_llama()
    (kept,) = [linear for linear in compiled.report.linears if linear.spec is None]
    assert kept.name == "lm_head.weight" and "quantize_lm_head" in str(kept.reason)


def test_a_model_without_equivalences_works_and_says_so() -> None:
    model = randomize(nn.Sequential(nn.Linear(20, 16), nn.GELU(), nn.Linear(16, 8)))
    compiled = compile_mlp(model, quantization=QuantizationConfig(bits=8, group_size=16))
    assert compiled.equivalences == () and "none found" in str(compiled.report)
    assert len(compiled.report.refusals) == 2 and len(compiled.report.quantized) == 2
    x = torch.randn(3, 20)
    with torch.no_grad():
        expected = model(x)
    assert float((compiled(x) - expected).norm() / expected.norm()) <= 0.05


def test_the_report_adds_up() -> None:
    compiled = compile_mlp()
    report = compiled.report
    assert all(linear.error is not None and 0 < linear.error < 0.3 for linear in report.quantized)
    assert report.bytes_before == sum(p.numel() * 4 for p in mlp().parameters())
    assert report.bytes_after == sum(tensor.nbytes for tensor in compiled.graph_module.state_dict().values())
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


class OtherProducts(nn.Module):
    """Weights that are no linears' weights, and constants that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.conv = nn.Linear(20, 20), nn.Conv1d(20, 20, 3, padding=1)
        self.first, self.left = nn.Parameter(torch.empty(20, 20)), nn.Parameter(torch.empty(4, 20, 20))
        self.summed = nn.Parameter(torch.empty(3, 20, 20))
        self.experts, self.chosen = nn.Parameter(torch.empty(5, 20, 20)), nn.Parameter(torch.empty(5, 20, 20))
        self.added, self.table = nn.Parameter(torch.empty(7, 20)), nn.Embedding(9, 20)
        self.register_buffer("frequencies", torch.rand(1, 7, 1))

    def forward(self, x: Tensor) -> Tensor:
        best = x.mean((1, 2)).argsort() % 5
        x = self.linear(x + self.added) + self.table(torch.arange(7)) + self.frequencies @ x[:, :1]
        columns = x.transpose(1, 2)
        x = (self.left @ (self.first @ columns) + self.conv(columns)).transpose(1, 2)
        x = torch.einsum("bsd,edf->bsf", x, self.summed)
        x = torch.bmm(x, self.experts.transpose(1, 2)[best])
        chosen = self.chosen.index_select(0, best[:2])
        result: Tensor = torch.stack([nn.functional.linear(x[0], weight) for weight in chosen.unbind()])
        return result


def test_the_report_names_weights_of_other_products() -> None:
    inputs = (torch.randn(4, 7, 20),)
    compiled = teq_graph.compile(randomize(OtherProducts()), inputs, quantization=SMALL, training=None)
    others = {w.name: w for w in compiled.report.weights if w.kind not in ("linear", "convolution", "embedding")}
    products = {"left": "matmul", "summed": "einsum", "experts": "bmm", "chosen": "linear"}
    assert {name: weight.reason.split()[2].rstrip(",") for name, weight in others.items()} == {
        name: f"aten.{op}" for name, op in products.items()
    }
    assert others["experts"].shape == (5, 20, 20)
    assert {weight.kind for weight in others.values()} == {"product"}
    assert {weight.name for weight in compiled.report.quantized} == {"linear.weight", "conv.weight", "first"}
    assert "left: read by aten.matmul, which is no linear" in str(compiled.report)
    report = compiled.report
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


class Recurrent(nn.Module):
    """Recurrent layers and a table beside a linear."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(30, 20), nn.Embedding(9, 20)
        self.lstm, self.gru, self.head = nn.LSTM(20, 16), nn.GRU(16, 12, bidirectional=True), nn.Linear(24, 8)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        result: Tensor = self.head(self.gru(hidden)[0])
        return result


def test_every_weight_in_float_has_its_reason() -> None:
    inputs = (torch.randint(0, 30, (4, 9)),)
    report = teq_graph.compile(randomize(Recurrent()), inputs, quantization=SMALL, training=None).report
    assert [weight.name for weight in report.quantized] == ["head.weight"]
    reasons = {weight.name: (weight.kind, str(weight.reason)) for weight in report.in_float}
    assert {name for name, (kind, _) in reasons.items() if kind == "recurrent"} == {
        *(f"lstm.weight_{part}_l0" for part in ("ih", "hh")),
        *(f"gru.weight_{part}_l0{way}" for part in ("ih", "hh") for way in ("", "_reverse")),
    }
    assert reasons["lstm.weight_ih_l0"][1].startswith("read by aten.lstm")
    assert reasons["words.weight"] == ("embedding", "embedding (quantize_embedding=False)")
    assert reasons["places.weight"][0] == "embedding" and "positions" in reasons["places.weight"][1]
    assert all(f"{name}" in str(report) for name in ("lstm.weight_ih_l0", "words.weight"))


def test_the_report_tells_scales_that_were_trained_from_those_that_were_found() -> None:
    found = compile_llama(training=TrainingConfig(stages=("gptq",), samples=4, length=12)).report
    assert len(found.sites) == 9 and not any(site.trained or site.folded for site in found.sites)
    assert "9 found, no scales trained" in str(found)
    compiled = compile_llama(training=TRAINING)
    report = compiled.report
    trained = [site for site in report.sites if site.trained]
    assert len(trained) == 8 and "9 found, 8 trained" in str(report)
    for site, equivalence in zip(report.sites, compiled.equivalences, strict=True):
        assert site.trained == (equivalence.scale is not None)
        if equivalence.scale is not None:
            scale = equivalence.scale
            assert (site.smallest, site.largest) == (float(scale.min()), float(scale.max()))
            logs = scale.double().log2()
            spread = (logs - logs.mean()).square().mean().sqrt()
            assert site.spread == pytest.approx(float(spread), rel=1e-4, abs=1e-6)
            assert site.folded == bool((scale != 1).any())
    assert [list(block.stages) for block in report.blocks] == [["teq", "clip", "gptq", "tune"]] * 2
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(("name", "notes"), [("T5", 0), ("Llama (GQA)", 0), ("BERT (post-LN)", 0)])
def test_the_report_says_where_a_generator_has_no_cache(name: str, notes: int) -> None:
    report = teq_graph.compile(BY_NAME[name].build(), quantization=SMALL, training=None).report
    assert len(report.notes) == notes and all("no KV cache" in note and note in str(report) for note in report.notes)
    assert type(report).from_dict(json.loads(json.dumps(report.to_dict()))) == report


# -------------------------------------------------------------------------------------------------------- transform


@pytest.mark.parametrize("name", ["Llama (GQA)", "Gemma2", "GPT-2", "BLOOM", "OPT", "T5"])
def test_transform_gives_an_equal_model_of_the_same_class(name: str) -> None:
    architecture = BY_NAME[name]
    model = architecture.build()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    calibration = [architecture.inputs(2, 9) for _ in range(2)]
    config = TrainingConfig(steps=8, batch_size=2, learning_rate=0.3)
    result = teq_graph.transform(
        model, calibration=calibration, quantization=QuantizationConfig(bits=2, group_size=16), training=config
    )
    assert type(result) is type(model) and result is not model
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    changed = [key for key, tensor in result.state_dict().items() if not torch.equal(tensor, state[key])]
    assert len(changed) >= 4
    inputs = architecture.inputs(3, 11)
    with torch.no_grad():
        assert relative_error(leaves(result(**inputs))[0], leaves(model(**inputs))[0]) <= 1e-5


class ReadTwice(nn.Module):
    """A parameter that the graph reads as it is, and in a constant together with another."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(20), nn.Linear(20, 20)
        self.prototypes = nn.Parameter(torch.empty(5, 20))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.linear(self.norm(x)) + self.linear(self.prototypes).mean(0)
        return result


class Shared(nn.Module):
    """Parameters that do not stand in the graph as they are: sums, buffers, and one read in two forms."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.delta = nn.Parameter(torch.empty(20, 20)), nn.Parameter(torch.empty(20, 20))
        self.gain = nn.Parameter(torch.empty(20))
        self.register_buffer("factor", torch.rand(20) + 1)
        self.last, self.plain, self.end = nn.Linear(20, 20), nn.Linear(20, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(nn.functional.linear(x, self.weight + self.delta).relu())
        x = self.plain(nn.functional.rms_norm(x, (20,), 1 + self.gain)) + x.tanh() * self.gain
        result: Tensor = self.end(x.tanh() * self.factor)
        return result


@pytest.mark.parametrize(("make", "sites"), [(Shared, 3), (ReadTwice, 1)])
def test_transform_refuses_what_it_cannot_write_back(make: type[nn.Module], sites: int) -> None:
    model = randomize(make())
    inputs = (torch.randn(6, 20),)
    with pytest.raises(ConfigError, match=r"none of its \d equivalences is over parameters alone .*no scale to train"):
        teq_graph.transform(model, inputs, ({0: DYNAMIC},), training=TrainingConfig(steps=8, learning_rate=0.3))
    compiled = teq_graph.compile(model, inputs, ({0: DYNAMIC},), training=None)
    assert len(compiled.equivalences) >= sites, "the graph itself can be scaled at all of them"


def test_a_device_to_train_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph goes there before calibration data is made, and back with all that was found; the model stays."""
    moved: list[str] = []
    move_to = CapturedGraph.move_to

    def record(captured: CapturedGraph, device: Any) -> None:
        moved.append(str(device))
        move_to(captured, device)

    monkeypatch.setattr(CapturedGraph, "move_to", record)
    model = LLAMA.build()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in model.state_dict().items()}
    torch.manual_seed(0)
    elsewhere = compile_llama(model, training=TRAINING, device="cpu")
    assert moved == ["cpu", "cpu"]
    torch.manual_seed(0)
    here = compile_llama(model, training=TRAINING)
    assert moved == ["cpu", "cpu"]
    ids = tokens()
    assert torch.equal(elsewhere(input_ids=ids).logits, here(input_ids=ids).logits)
    assert all(tensor.data_ptr() == before[name][0] for name, tensor in model.state_dict().items())
    assert all(torch.equal(tensor, before[name][1]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("device", ["tpu", "cuda:99", "meta", 7.5, ""])
def test_what_is_no_device(device: Any) -> None:
    with pytest.raises(InputError, match=r"^device=.*accepted are cpu and cuda$") as caught:
        compile_llama(device=device)
    in_one_line(caught)


@pytest.mark.gpu
@pytest.mark.parametrize(("stages", "least"), [(("clip", "gptq"), 0.9), (None, 0.7)], ids=["clip+gptq", "default"])
def test_gpu_training(stages: tuple[str, ...] | None, least: float) -> None:
    """Codes are those of the CPU but for some, outputs as good, and all that is found is on the CPU.

    Training follows each rounding: on one CPU, products in bfloat16 and in float32 leave 78 % of codes equal.
    """
    training = TrainingConfig(stages=stages, steps=10, samples=8, length=16, batch_size=2)
    model = LLAMA.build()
    codes, errors = [], []
    ids = tokens()
    for device in (None, "cuda"):
        torch.manual_seed(0)
        compiled = compile_llama(model, training=training, device=device, calibration=torch.arange(3, 19).expand(8, 16))
        packed = torch.cat([t.flatten() for t in compiled.graph_module.buffers() if t.dtype == torch.uint8])
        codes.append(torch.cat([packed & 15, packed >> 4]))
        errors.append(relative_error(compiled(input_ids=ids).logits, model(input_ids=ids).logits))
        assert {t.device.type for t in compiled.graph_module.buffers()} == {"cpu"}
        assert all(e.scale is None or e.scale.device.type == "cpu" for e in compiled.equivalences)
    assert (codes[0] == codes[1]).double().mean() > least
    assert errors[1] < 1.3 * errors[0]
    assert {parameter.device.type for parameter in model.parameters()} == {"cpu"}
