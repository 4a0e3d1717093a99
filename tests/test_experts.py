"""Mixtures of experts: products whose rows choose their matrices."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from support.architectures import BY_NAME
from support.compiling import in_one_line, tokens
from support.graphs import DYNAMIC, apply_and_check, capture_small, find, normalize, randomize, relative_error
from support.onnx import OnnxModel
from torch import Tensor, nn
from torch.nn import functional

import teq_graph
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.compile import analyze
from teq_graph.config import WeightSpec
from teq_graph.errors import InputError
from teq_graph.graph.nodes import is_call
from teq_graph.graph.products import EXPERT_LINEAR, Reading, by_expert, product_nodes
from teq_graph.graph.tensors import get_tensor, replace_tensors
from teq_graph.onnx.runtime import load
from teq_graph.passes.normalize_experts import NormalizeExperts
from teq_graph.quantization import quantize_weight
from teq_graph.report import FEW_ROWS, Report
from teq_graph.training.moments import Moments
from teq_graph.training.sensitivity import loss_increases

FAMILIES = ("Mixtral", "Qwen3-MoE", "OLMoE", "gpt-oss", "DeepSeek-V3")
EXPERTS, TOP, WIDTH, INNER = 5, 2, 32, 48
SMALL = QuantizationConfig(bits=4, group_size=16)
IN_FLOAT = QuantizationConfig(skip=("*",))


def swiglu(h: Tensor) -> Tensor:
    gate, up = h.chunk(2, -1)
    return functional.silu(gate) * up


def limited_pairs(h: Tensor) -> Tensor:
    gate, up = h[..., ::2].clamp(max=1.5), h[..., 1::2].clamp(-1.5, 1.5)
    return (up + 1) * gate * torch.sigmoid(1.702 * gate)


def up_first(h: Tensor) -> Tensor:
    up, gate = h.chunk(2, -1)
    return up * (gate * torch.sigmoid(gate))


class Mixture(nn.Module):
    """Written by hand: a norm, a router, and experts in a row of their own."""

    def __init__(self, activation: Callable[[Tensor], Tensor] = swiglu, gated: bool = True, bias: bool = False) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.empty(EXPERTS, (1 + gated) * INNER, WIDTH))
        self.down = nn.Parameter(torch.empty(EXPERTS, WIDTH, INNER))
        self.up_bias = nn.Parameter(torch.empty(EXPERTS, (1 + gated) * INNER)) if bias else None
        self.down_bias = nn.Parameter(torch.empty(EXPERTS, WIDTH)) if bias else None
        self.activation = activation

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(x).softmax(-1).topk(TOP, -1)
        return weights, chosen

    def forward(self, x: Tensor) -> Tensor:
        rows = self.norm(x).flatten(0, 1)
        weights, chosen = self.choose(rows)
        return (x.flatten(0, 1) + self.mix(rows, weights, chosen)).view(x.shape)

    def mix(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        experts = chosen.flatten()
        h = (self.up[experts] @ rows.repeat_interleave(TOP, 0)[..., None]).squeeze(-1)
        h = self.activation(h if self.up_bias is None else h + self.up_bias[experts])
        y = (self.down[experts] @ self.between(h)[..., None]).squeeze(-1)
        y = y if self.down_bias is None else y + self.down_bias[experts]
        return (y * weights.flatten()[:, None]).view(-1, TOP, WIDTH).sum(1)

    def between(self, h: Tensor) -> Tensor:
        return h


class Transposed(Mixture):
    """Rows of two dimensions, and matrices from the left."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(matrix.detach().mT.contiguous()) for matrix in (self.up, self.down))

    def mix(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        h = (rows[:, None].expand(-1, TOP, -1)[..., None, :] @ self.up[chosen]).squeeze(-2)
        y = (self.activation(h)[..., None, :] @ self.down[chosen]).squeeze(-2)
        return (y * weights[..., None]).sum(1)


class AllExperts(Mixture):
    """Every expert sees every token; the router weighs them."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(matrix.detach().mT.contiguous()) for matrix in (self.up, self.down))

    def mix(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        shares = rows.new_zeros(rows.shape[0], EXPERTS).scatter(1, chosen, weights)
        y = torch.bmm(self.activation(torch.bmm(rows.expand(EXPERTS, -1, -1), self.up)), self.down)
        return (y * shares.t()[..., None]).sum(0)


class OtherRows(Mixture):
    """What an expert gives is read by that of another row."""

    def between(self, h: Tensor) -> Tensor:
        return h.flip(0)


class OtherExperts(Mixture):
    """Each token's second product is by experts of its own choice."""

    def mix(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        h = (self.up[chosen.flatten()] @ rows.repeat_interleave(TOP, 0)[..., None]).squeeze(-1)
        others = (chosen.flatten() + 1) % EXPERTS
        y = (self.down[others] @ self.activation(h)[..., None]).squeeze(-1)
        return (y * weights.flatten()[:, None]).view(-1, TOP, WIDTH).sum(1)


class Loop(nn.Module):
    """Experts as a list of modules, each given the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS)
        sizes = ((WIDTH, INNER), (INNER, WIDTH))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(*sizes[0]), nn.ReLU(), nn.Linear(*sizes[1])) for _ in range(EXPERTS)
        )

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1)
        weights, chosen = self.router(rows).softmax(-1).topk(TOP, -1)
        result = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(chosen == number)
            result = result.index_add(0, token, expert(rows[token]) * weights[token, place, None])
        return result.view(x.shape)


def example(batch: int = 3, length: int = 7) -> Tensor:
    return torch.randn(batch, length, WIDTH)


def expert_linears(graph_module: torch.fx.GraphModule) -> list[torch.fx.Node]:
    return [node for node in graph_module.graph.nodes if is_call(node, EXPERT_LINEAR)]


# ------------------------------------------------------------------------------------------------------------ operators


def definition(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, count: int) -> Tensor:
    y = torch.einsum("tnk,tk->tn", weight.unflatten(0, (count, -1))[experts], x)
    return y if bias is None else y + bias.view(count, -1)[experts]


@pytest.mark.parametrize("with_bias", [True, False])
def test_each_row_times_the_matrix_of_its_expert(with_bias: bool) -> None:
    x, weight = torch.randn(11, 8, dtype=torch.float64), torch.randn(4 * 6, 8, dtype=torch.float64)
    bias = torch.randn(4 * 6, dtype=torch.float64) if with_bias else None
    experts = torch.randint(0, 3, (11,))  # the last has no rows
    tensors = [t.requires_grad_() for t in (x, weight, bias) if t is not None]

    def call(*tensors: Tensor) -> Tensor:
        x, weight, *bias = tensors
        result: Tensor = torch.ops.teq_graph.expert_linear(x, weight, *(bias or [None]), experts, 4)
        return result

    assert relative_error(call(*tensors), definition(x, weight, bias, experts, 4)) <= 1e-14
    assert torch.autograd.gradcheck(call, tensors)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantized_matrices_of_experts(bits: int) -> None:
    weight, bias = torch.randn(4 * 6, 32), torch.randn(4 * 6)
    kept = quantize_weight(weight, WeightSpec(bits, 16, False, None), torch.float32)
    x, experts = torch.randn(9, 32), torch.randint(0, 4, (9,))
    stored = (kept.packed, kept.scales, kept.zero_points)
    actual = torch.ops.teq_graph.expert_matmul_nbits(x, *stored, bias, experts, 32, 6, bits, 16, 4)
    assert relative_error(actual, definition(x, kept.dequantize(), bias, experts, 4)) <= 1e-6
    with pytest.raises(InputError, match="experts up to 4: accepted are 0 to 3") as caught:
        torch.ops.teq_graph.expert_matmul_nbits(x, *stored, bias, experts + 4 - experts, 32, 6, bits, 16, 4)
    in_one_line(caught)


def test_rows_and_experts_that_do_not_fit_are_refused() -> None:
    x, weight = torch.randn(9, 8), torch.randn(12, 8)
    for experts, count, message in (
        (torch.zeros(8, dtype=torch.long), 4, r"experts \[8\]"),
        (torch.zeros(9), 4, "torch.float32"),
        (torch.zeros(9, dtype=torch.long), 5, r"accepted is \[5 \* N, 8\]"),
        (torch.zeros(9, dtype=torch.long), 0, "num_experts=0"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            torch.ops.teq_graph.expert_linear(x, weight, None, experts, count)
        in_one_line(caught)


# -------------------------------------------------------------------------------------------------------- normal form


@pytest.mark.parametrize(
    "make",
    [Mixture, lambda: Mixture(bias=True), Transposed, AllExperts],
    ids=["rows", "biases", "from the left", "all"],
)
def test_products_with_chosen_matrices_are_found(make: Callable[[], nn.Module]) -> None:
    captured = capture_small(make(), example())
    names = [name for name in ("up", "down") if name in captured.graph_module.state_dict()]
    apply_and_check(NormalizeExperts(), captured.graph_module, (example(2, 5),), tolerance=1e-5, shared=True)
    found = expert_linears(captured.graph_module)
    assert len(found) == len(names) == 2
    assert [tuple(get_tensor(captured.graph_module, name).shape) for name in names] == [
        (EXPERTS * 2 * INNER, WIDTH),
        (EXPERTS * WIDTH, INNER),
    ]
    biases = [node.args[2] is not None for node in found]
    assert biases == [hasattr(captured.graph_module, "up_bias")] * 2


class ReadElsewhere(Mixture):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up.sum() + self.down[0].sum()


class TwoIndices(Mixture):
    def mix(self, rows: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        columns = self.up[chosen.flatten(), chosen.flatten()]
        return rows + columns.mean() * weights.sum()


@pytest.mark.parametrize("make", [ReadElsewhere, TwoIndices])
def test_other_readers_of_a_stack_leave_it_alone(make: Callable[[], nn.Module]) -> None:
    captured = capture_small(make(), example())
    apply_and_check(NormalizeExperts(), captured.graph_module, (example(2, 5),), modified=False, shared=True)


# ------------------------------------------------------------------------------------------------------- equivalences


@pytest.mark.parametrize("make", [Mixture, Transposed], ids=["rows", "from the left"])
def test_scales_move_into_experts_and_within_each(make: Callable[[], nn.Module]) -> None:
    captured = normalize(capture_small(make(), example()))
    found = {site.producer: site for site in find(captured).equivalences}
    assert found["norm.weight"].linears == ("router.weight", "up") and found["norm.weight"].channels == WIDTH
    up = found["up"]
    # Half of the rows gate; each expert has scales of its own.
    assert up.kind == "experts" and up.linears == ("down",) and up.channels == EXPERTS * INNER
    x = example(4, 9)
    expected = captured.graph_module(x)
    for site in found.values():
        scale = torch.rand(site.channels) * 3 + 0.2
        names = {scaled.name for scaled in (*site.divided, *site.multiplied)}
        tensors = {name: get_tensor(captured.graph_module, name).detach() for name in names}
        replace_tensors(captured.graph_module, site.apply(tensors, scale))
    assert relative_error(captured.graph_module(x), expected) <= 1e-5


@pytest.mark.parametrize("make", [OtherRows, OtherExperts])
def test_rows_of_other_experts_take_no_scale_of_an_expert(make: Callable[[], nn.Module]) -> None:
    findings = find(capture_small(make(), example()))
    assert "up" not in {site.producer for site in findings.equivalences}
    assert "up" in {refusal.producer for refusal in findings.refusals}


# ------------------------------------------------------------------------------------------------------------ training


def test_moments_are_those_of_each_experts_own_rows() -> None:
    captured = normalize(capture_small(Mixture(), example()))
    reading = Reading.of(expert_linears(captured.graph_module)[0])
    moments, rows, chosen = Moments(), [], []
    for _ in range(3):
        x, experts = torch.randn(40, WIDTH), torch.randint(0, EXPERTS - 1, (40,))
        moments.add(reading, x, experts)
        rows.append(x)
        chosen.append(experts)
    second, first = moments.result()
    x, experts = torch.cat(rows), torch.cat(chosen)
    for expert in range(EXPERTS):
        own = x[experts == expert]
        # So many rows of the average of all beside its own.
        total = own.T @ own + FEW_ROWS * x.T @ x / len(x)
        assert relative_error(second[expert], total / (len(own) + FEW_ROWS)) <= 1e-5
        assert relative_error(first[expert], (own.sum(0) + FEW_ROWS * x.mean(0)) / (len(own) + FEW_ROWS)) <= 1e-4
    assert moments.rows() == tuple(int((experts == expert).sum()) for expert in range(EXPERTS))


def test_rows_by_expert() -> None:
    x, experts = torch.randn(13, 4), torch.tensor([2, 0, 2, 2, 0, 3, 2, 0, 3, 2, 0, 2, 3])
    grouped = by_expert(x, experts, 5)
    assert grouped.shape == (5, 6, 4)
    for expert in range(5):
        own = x[experts == expert]
        assert torch.equal(grouped[expert, : len(own)], own) and not grouped[expert, len(own) :].any()


def test_experts_learn_and_the_report_tells_of_each() -> None:
    model = randomize(Mixture(bias=True))
    x = [example(4, 12) for _ in range(4)]
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    training = TrainingConfig(stages=("teq", "clip", "gptq", "bias", "tune"), steps=20, batch_size=2)
    quantization = QuantizationConfig(bits=3, group_size=16)
    report = teq_graph.compile(model, (x[0],), shapes, x, quantization, training).report
    assert report.counts() == {"linears": "0 of 1", "experts": "2 of 2"}
    assert next(w.reason for w in report.weights if w.name == "router.weight") == "its product chooses experts"
    (block,) = report.blocks
    assert block.after < 0.8 * block.before
    for weight in report.experts:
        assert len(weight.experts) == len(weight.rows) == EXPERTS and sum(weight.rows) == 4 * 4 * 12 * TOP
        assert 0 < min(weight.experts) <= weight.error <= max(weight.experts)
    assert Report.from_dict(report.to_dict()) == report
    few = sum(count < FEW_ROWS for weight in report.experts for count in weight.rows)
    assert (f"{few} of {2 * EXPERTS} matrices had fewer than {FEW_ROWS} rows" in str(report)) == bool(few)


def test_sensitivity_of_one_expert_is_that_of_a_linear() -> None:
    class One(nn.Module):
        def __init__(self, as_expert: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.empty(1, 24, WIDTH) if as_expert else torch.empty(24, WIDTH))
            self.as_expert = as_expert

        def forward(self, x: Tensor) -> Tensor:
            rows = x.flatten(0, 1)
            if not self.as_expert:
                return functional.linear(rows, self.weight).tanh()
            only = torch.zeros_like(rows[:, 0], dtype=torch.long)
            return (self.weight[only] @ rows[..., None]).squeeze(-1).tanh()

    batches, curves = [(example(),)], []
    for model in (One(True), One(False)):
        captured = normalize(capture_small(model, example()))
        (name,) = (str(product.args[1].target) for product in product_nodes(captured.graph_module))  # type: ignore[union-attr]
        weight = torch.linspace(-1, 1, 24 * WIDTH).sin().view(24, WIDTH) * torch.linspace(0.1, 2, WIDTH)
        replace_tensors(captured.graph_module, {name: weight})
        spec = WeightSpec(4, 16, False, None)
        curves.append(loss_increases(captured, {name: spec}, batches)[name])
    assert curves[0].keys() == curves[1].keys()
    for bits, increase in curves[0].items():
        assert increase == pytest.approx(curves[1][bits], rel=1e-4)


@pytest.mark.parametrize("name", ["Qwen3-MoE", "gpt-oss"])
def test_transformed_experts_are_written_back(name: str) -> None:
    model = BY_NAME[name].build(std=0.1)
    training = TrainingConfig(steps=10, batch_size=2)
    result = teq_graph.transform(
        model, calibration=[tokens(2, 12) for _ in range(3)], quantization=SMALL, training=training
    )
    x = tokens()
    assert relative_error(result(input_ids=x).logits, model(input_ids=x).logits) <= 1e-5
    changed = [
        n for (n, p), q in zip(model.named_parameters(), result.parameters(), strict=True) if not torch.equal(p, q)
    ]
    assert any("experts" in name for name in changed)


# ----------------------------------------------------------------------------------------------------------------- onnx


def operators(directory: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(directory / "model.onnx", load_external_data=False).graph.node)


def export(model: nn.Module, folder: Path, quantization: QuantizationConfig = SMALL, level: int = 1) -> Path:
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    compiled = teq_graph.compile(randomize(model), (example(),), shapes, quantization=quantization, training=None)
    directory = compiled.export_onnx(folder / "out", accuracy_level=level)
    for size in ((3, 7), (1, 1)):
        x = example(*size)
        tolerance = 1e-5 if level == 1 else 0.05
        assert relative_error(OnnxModel(directory).run((x,)), compiled(x)) <= tolerance
    return directory


@pytest.mark.parametrize(
    ("activation", "gated"),
    [
        (swiglu, True),
        (limited_pairs, True),
        (up_first, True),
        (functional.silu, False),
        (functional.relu, False),
        (lambda h: functional.gelu(h, approximate="tanh"), False),
        (lambda h: h * 1.0, False),
    ],
    ids=["swiglu", "pairs with limits", "up first", "silu", "relu", "gelu", "none"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_one_operator_does_a_mixture(
    activation: Callable[[Tensor], Tensor], gated: bool, bias: bool, tmp_path: Path
) -> None:
    found = operators(export(Mixture(activation, gated, bias), tmp_path))
    assert found["QMoE"] == 1 and found["MatMulNBits"] == 0


def test_no_weight_is_another_shape_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime would make a copy in memory of what it reshapes."""
    monkeypatch.setattr("teq_graph.onnx.export.model_file._EXTERNAL_FROM_BYTES", 0)
    graph = onnx.load(export(Mixture(bias=True), tmp_path) / "model.onnx", load_external_data=False).graph
    outside = {tensor.name for tensor in graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL}
    (mixture,) = (node for node in graph.node if node.op_type == "QMoE")
    assert {mixture.input[2], mixture.input[5]} <= outside
    assert not [node for node in graph.node if node.op_type == "Reshape" and node.input[0] in outside]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_symmetric_codes_in_half_precision(bits: int, tmp_path: Path) -> None:
    quantization = QuantizationConfig(bits=bits, group_size=16, symmetric=True)
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    model = randomize(Mixture(bias=True))
    compiled = teq_graph.compile(model, (example(),), shapes, quantization=quantization, training=None)
    directory = compiled.export_onnx(tmp_path / "out", dtype="float16", accuracy_level=4)
    assert operators(directory)["QMoE"] == 1
    x = example()
    assert relative_error(OnnxModel(directory).run((x.half(),)).float(), compiled(x)) <= 0.05


@pytest.mark.parametrize(
    ("bits", "level", "fused"), [(2, 1, False), (3, 1, True), (8, 1, False), (2, 4, True), (4, 4, True), (8, 4, True)]
)
def test_experts_that_the_operator_rounds_have_products_of_their_own(
    bits: int, level: int, fused: bool, tmp_path: Path
) -> None:
    found = operators(export(Mixture(), tmp_path, QuantizationConfig(bits=bits, group_size=16), level))
    assert (found["QMoE"], found["MatMulNBits"]) == ((1, 0) if fused else (0, 2 * EXPERTS))


class NoTopK(Mixture):
    """The same expert may be chosen twice, which the operator cannot do."""

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        best = self.router(x).argmax(-1, keepdim=True)
        return torch.cat([best, best], 1).to(x.dtype) + 1, torch.cat([best, best], 1)


@pytest.mark.parametrize(
    "make",
    [NoTopK, OtherRows, OtherExperts, AllExperts, lambda: Mixture(functional.gelu, gated=False)],
    ids=["no top-k", "other rows", "other experts", "all experts", "exact gelu"],
)
def test_other_mixtures_have_products_of_their_own(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    found = operators(export(make(), tmp_path))
    # Where it chooses nothing, the router is a linear like others.
    assert found["QMoE"] == 0 and found["MatMulNBits"] == 2 * EXPERTS + (make is AllExperts)


def test_experts_in_float(tmp_path: Path) -> None:
    found = operators(export(Mixture(bias=True), tmp_path, IN_FLOAT))
    assert found["MatMulNBits"] == found["QMoE"] == 0


@pytest.mark.parametrize("name", FAMILIES)
def test_the_tokens_of_transformers(name: str, tmp_path: Path) -> None:
    model = BY_NAME[name].build()
    decoder = load(teq_graph.compile(model, quantization=IN_FLOAT, training=None).export_onnx(tmp_path / "out"))
    prompt = tokens(1, 6)
    wanted = model.generate(  # type: ignore[operator]
        prompt, max_new_tokens=16, do_sample=False, pad_token_id=0
    )
    given = decoder.generate(prompt[0].tolist(), max_new_tokens=16)
    wanted = list(itertools.takewhile(lambda token: token != 2, wanted[0, 6:].tolist()))
    assert list(itertools.takewhile(lambda token: token != 2, given)) == wanted


@pytest.mark.parametrize("name", FAMILIES)
def test_one_operator_does_the_mixtures_of_each_family(name: str, tmp_path: Path) -> None:
    compiled = teq_graph.compile(BY_NAME[name].build(), quantization=SMALL, training=None)
    found = operators(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    assert found["QMoE"] == sum(weight.kind == "experts" for weight in compiled.report.weights) // 2 > 0


def test_saved_and_loaded(tmp_path: Path) -> None:
    compiled = teq_graph.compile(BY_NAME["gpt-oss"].build(), quantization=SMALL, training=None)
    again = teq_graph.load(compiled.save(tmp_path / "saved"))
    x = tokens()
    assert torch.equal(again(input_ids=x).logits, compiled(input_ids=x).logits)
    assert [site.kind for site in again.equivalences] == [site.kind for site in compiled.equivalences]


def test_the_model_computes_its_experts_as_before() -> None:
    model = BY_NAME["Mixtral"].build()
    before = model.config._experts_implementation  # type: ignore[union-attr]
    analyze(model)
    assert model.config._experts_implementation == before  # type: ignore[union-attr]


def test_experts_as_a_list_of_modules(tmp_path: Path) -> None:
    """Each expert's linears are linears like others, over the rows that chose it."""
    model, x = randomize(Loop()), example()
    shapes = ({0: DYNAMIC, 1: DYNAMIC},)
    quantization = QuantizationConfig(bits=8, group_size=16)
    batches = [example() for _ in range(2)]
    compiled = teq_graph.compile(model, (x,), shapes, batches, quantization, TrainingConfig(steps=2))
    assert compiled.report.counts() == {"linears": f"{1 + 2 * EXPERTS} of {1 + 2 * EXPERTS}"}
    pairs = {(site.producer, site.linears) for site in compiled.equivalences}
    assert {(f"experts.{e}.0.weight", (f"experts.{e}.2.weight",)) for e in range(EXPERTS)} <= pairs
    y = example(2, 9)
    with torch.no_grad():
        assert float((compiled(y) - model(y)).norm() / model(y).norm()) < 0.02
    onnx_model = OnnxModel(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    for y in (example(2, 9), example(1, 1)):
        assert relative_error(onnx_model.run((y,)), compiled(y)) <= 1e-5
