"""Convolutions: batch norms fold into them, scales move through them, and their weights are quantized."""

from __future__ import annotations

import collections
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.graphs import DYNAMIC, apply_and_check, apply_random_scales, find, op_names, relative_error, run
from torch import Tensor, nn
from torch.nn import functional

import teq_graph
from teq_graph import quantization
from teq_graph.analysis.equivalences import Findings
from teq_graph.capture import CapturedGraph, capture
from teq_graph.compile import analyze
from teq_graph.config import WeightSpec
from teq_graph.errors import CaptureError, ConfigError
from teq_graph.graph.products import Reading, outputs_for, product_nodes
from teq_graph.onnx.runtime import load
from teq_graph.onnx.runtime.session import open_directory
from teq_graph.passes.fold_batch_norms import FoldBatchNorms
from teq_graph.passes.normalize_convolutions import NormalizeConvolutions
from teq_graph.quantization import descend
from teq_graph.training.precision import Precision
from teq_graph.training.stages.codes import BlockProblem, gptq, round_to_nearest

CHANNELS, SIZE = 8, 12
Forward = Callable[..., Any]


class Image(nn.Module):
    """Layers by name and a forward function over them."""

    def __init__(self, forward: Forward, **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def randomized(model: nn.Module) -> nn.Module:
    """Eval mode; batch norms with statistics as training leaves them, their gains of both signs."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_()
            module.running_var.uniform_(0.3, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model.eval()


def captured_image(model: nn.Module, *shape: int) -> CapturedGraph:
    shape = shape or (2, CHANNELS, SIZE, SIZE)
    return capture(randomized(model), (torch.randn(shape),), ({0: DYNAMIC},))


def conv(channels: int = CHANNELS, out: int | None = None, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out or channels, size, padding=options.pop("padding", size // 2), **options)


def norm(channels: int = CHANNELS, **options: Any) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, **options)


# ---------------------------------------------------------------------------------------------------- batch norms


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    ("layer", "batch_norm", "shape"),
    [
        (lambda bias: nn.Conv1d(CHANNELS, CHANNELS, 3, bias=bias), nn.BatchNorm1d, (2, CHANNELS, SIZE)),
        (lambda bias: conv(bias=bias, groups=4), nn.BatchNorm2d, (2, CHANNELS, SIZE, SIZE)),
        (lambda bias: nn.Conv3d(CHANNELS, CHANNELS, 2, bias=bias), nn.BatchNorm3d, (2, CHANNELS, 4, 4, 4)),
        (lambda bias: conv(bias=bias, padding="same"), nn.BatchNorm2d, (2, CHANNELS, SIZE, SIZE)),
    ],
    ids=["1d", "2d with groups", "3d", "same"],
)
def test_a_batch_norm_folds_into_the_convolution_before_it(
    layer: Callable[[bool], nn.Module], batch_norm: Any, shape: tuple[int, ...], affine: bool, bias: bool
) -> None:
    model = Image(lambda s, x: s.norm(s.conv(x)), conv=layer(bias), norm=batch_norm(CHANNELS, affine=affine))
    captured = captured_image(model, *shape)
    apply_and_check(FoldBatchNorms(), captured.graph_module, (torch.randn(shape),), tolerance=2e-6)
    assert "batch_norm" not in " ".join(op_names(captured.graph_module)) and len(op_names(captured.graph_module)) == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda s, x: s.norm(x),
        lambda s, x: s.norm(functional.relu(s.conv(x))),
        lambda s, x: (lambda y: s.norm(y) + y)(s.conv(x)),
        lambda s, x: s.norm(functional.conv_transpose2d(x, s.conv.weight)),
    ],
    ids=["alone", "after relu", "the convolution is read elsewhere", "after a transposed convolution"],
)
def test_a_batch_norm_elsewhere_is_a_factor_and_a_shift(forward: Forward) -> None:
    captured = captured_image(Image(forward, conv=conv(), norm=norm()))
    apply_and_check(FoldBatchNorms(), captured.graph_module, (torch.randn(2, CHANNELS, SIZE, SIZE),), tolerance=2e-6)
    assert op_names(captured.graph_module).count("aten.mul.Tensor") == 1


def test_a_norm_shared_by_two_convolutions_folds_into_both() -> None:
    captured = captured_image(
        Image(lambda s, x: s.norm(s.first(x)) + s.norm(s.second(x)), first=conv(), second=conv(), norm=norm())
    )
    apply_and_check(FoldBatchNorms(), captured.graph_module, (torch.randn(2, CHANNELS, SIZE, SIZE),), tolerance=2e-6)
    assert op_names(captured.graph_module) == ["aten.conv2d.default", "aten.conv2d.default", "aten.add.Tensor"]


def test_a_weight_with_two_norms_becomes_two() -> None:
    captured = captured_image(
        Image(lambda s, x: s.first(s.conv(x)) + s.second(s.conv(-x)), conv=conv(), first=norm(), second=norm())
    )
    apply_and_check(FoldBatchNorms(), captured.graph_module, (torch.randn(2, CHANNELS, SIZE, SIZE),), tolerance=2e-6)


def test_one_tensor_as_gain_and_shift_of_a_norm_becomes_two() -> None:
    model = Image(lambda s, x: s.norm(x), norm=norm())
    model.norm.bias = model.norm.weight
    captured = captured_image(model)
    apply_and_check(FoldBatchNorms(), captured.graph_module, (torch.randn(2, CHANNELS, SIZE, SIZE),), tolerance=2e-6)


def test_statistics_of_the_batch_are_left_alone() -> None:
    captured = captured_image(Image(lambda s, x: s.norm(s.conv(x)), conv=conv(), norm=nn.InstanceNorm2d(CHANNELS)))
    apply_and_check(
        FoldBatchNorms(), captured.graph_module, (torch.randn(2, CHANNELS, SIZE, SIZE),), modified=False, tolerance=0
    )


# ------------------------------------------------------------------------------------------------------ normal form


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(CHANNELS, 4, 3, stride=2), (2, CHANNELS, SIZE)),
        (nn.Conv1d(CHANNELS, 4, 4, padding="same"), (2, CHANNELS, SIZE)),
        (nn.Conv2d(CHANNELS, 4, (2, 5), padding="same", dilation=(1, 2)), (2, CHANNELS, SIZE, SIZE)),
        (nn.Conv2d(CHANNELS, 4, (4, 2), padding="same"), (2, CHANNELS, SIZE, SIZE)),
        (nn.Conv2d(CHANNELS, 4, 3, padding="valid", groups=2), (2, CHANNELS, SIZE, SIZE)),
        (nn.Conv2d(CHANNELS, CHANNELS, 3, groups=CHANNELS, padding=1), (2, CHANNELS, SIZE, SIZE)),
        (nn.Conv3d(CHANNELS, 4, (2, 3, 1)), (2, CHANNELS, 4, 4, 4)),
    ],
    ids=["1d", "1d same", "2d same", "2d same, uneven", "valid with groups", "depthwise", "3d"],
)
def test_a_convolution_reads_a_matrix(layer: nn.Module, shape: tuple[int, ...]) -> None:
    captured = captured_image(layer, *shape)
    apply_and_check(NormalizeConvolutions(), captured.graph_module, (torch.randn(shape),), tolerance=0)
    (weight,) = (n for n in captured.graph_module.graph.nodes if n.target == "weight")
    assert weight.meta["val"].shape == (layer.weight.shape[0], layer.weight[0].numel())


def test_a_weight_that_something_else_reads_keeps_its_shape() -> None:
    captured = captured_image(Image(lambda s, x: s.conv(x) * s.conv.weight.mean(), conv=conv()))
    inputs = (torch.randn(2, CHANNELS, SIZE, SIZE),)
    apply_and_check(NormalizeConvolutions(), captured.graph_module, inputs, modified=False, tolerance=0)


# ----------------------------------------------------------------------------------------------------- equivalences


def examine(model: nn.Module, *shape: int) -> Findings:
    """What is found leaves the output as it is, at other sizes too."""
    captured = captured_image(model, *shape)
    x = torch.randn(3, *(shape or (2, CHANNELS, SIZE, SIZE))[1:])
    findings = find(captured)
    expected = run(captured.graph_module, (x,))
    apply_random_scales(captured.graph_module, findings.equivalences)
    assert relative_error(run(captured.graph_module, (x,)), expected) <= 1e-5
    return findings


def sites(findings: Findings) -> dict[str, tuple[str, ...]]:
    return {site.producer: site.linears for site in findings.equivalences}


FOUND: dict[str, tuple[nn.Module, dict[str, tuple[str, ...]]]] = {
    "convolution, norm, relu, convolution": (
        Image(
            lambda s, x: s.second(functional.relu(s.norm(s.first(x)))),
            first=conv(bias=False),
            norm=norm(),
            second=conv(stride=2),
        ),
        {"first.weight": ("second.weight",)},
    ),
    "norm, relu, convolution": (
        Image(lambda s, x: s.second(functional.relu(s.norm(x))), norm=norm(), second=conv()),
        {"norm.weight": ("second.weight",)},
    ),
    "groups": (
        Image(lambda s, x: s.second(functional.relu(s.first(x))), first=conv(), second=conv(out=16, groups=4)),
        {"first.weight": ("second.weight",)},
    ),
    "depthwise, both ways": (
        Image(
            lambda s, x: s.third(functional.leaky_relu(s.second(functional.relu(s.first(x))))),
            first=conv(size=1),
            second=conv(out=2 * CHANNELS, groups=CHANNELS),
            third=conv(2 * CHANNELS, size=1),
        ),
        {"first.weight": ("second.weight",), "second.weight": ("third.weight",)},
    ),
    "pooled, enlarged and beside another": (
        Image(
            lambda s, x: s.second(
                torch.cat([functional.interpolate(functional.max_pool2d(s.first(x), 2), scale_factor=2.0), x], 1)
            ),
            first=conv(out=4),
            second=conv(4 + CHANNELS),
        ),
        {"first.weight": ("second.weight",)},
    ),
    "one dimension": (
        Image(
            lambda s, x: s.second(functional.avg_pool1d(functional.relu(s.first(x.flatten(2))), 3)),
            first=nn.Conv1d(CHANNELS, 6, 3),
            second=nn.Conv1d(6, 4, 3, dilation=2),
        ),
        {"first.weight": ("second.weight",)},
    ),
    "a linear at the end": (
        Image(
            lambda s, x: s.linear(functional.adaptive_avg_pool2d(functional.relu(s.first(x)), 1).flatten(1)),
            first=conv(out=16),
            linear=nn.Linear(16, 4),
        ),
        {"first.weight": ("linear.weight",)},
    ),
    "each place of a channel a column": (
        Image(
            lambda s, x: s.linear(functional.adaptive_avg_pool2d(functional.relu(s.first(x)), 2).flatten(1)),
            first=conv(out=16),
            linear=nn.Linear(64, 4),
        ),
        {"first.weight": ("linear.weight",)},
    ),
    "two convolutions of one": (
        Image(
            lambda s, x: (lambda y: s.second(y) + s.third(y))(functional.relu(s.first(x))),
            first=conv(),
            second=conv(),
            third=conv(size=1),
        ),
        {"first.weight": ("second.weight", "third.weight")},
    ),
    "channels last": (
        Image(
            lambda s, x: s.linear(s.norm(s.first(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2),
            first=conv(groups=CHANNELS),
            norm=nn.LayerNorm(CHANNELS),
            linear=nn.Linear(CHANNELS, 16),
        ),
        {"norm.weight": ("linear.weight",)},
    ),
    "gated": (
        Image(
            lambda s, x: s.second(s.first(x) * s.gate(x.mean((2, 3), keepdim=True)).sigmoid()),
            first=conv(groups=CHANNELS),
            gate=conv(size=1),
            second=conv(size=1),
        ),
        {"first.weight": ("second.weight",)},
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_scales_move_through_convolutions(name: str) -> None:
    model, expected = FOUND[name]
    assert sites(examine(model)) == expected


REFUSED: dict[str, tuple[Forward, str]] = {
    "transposed": (
        lambda s, x: s.second(functional.conv_transpose2d(s.first(x), s.weight)),
        "conv_transpose2d does not commute with a scale per channel",
    ),
    "relu6": (lambda s, x: s.second(functional.relu6(s.first(x))), "relu6 does not commute"),
    "silu": (lambda s, x: s.second(functional.silu(s.first(x))), "silu does not commute"),
    "residual": (lambda s, x: s.second(x + s.first(x)), "it is added to a value"),
    "computed weight": (
        lambda s, x: functional.conv2d(s.first(x), s.second.weight * x.mean()),
        "conv2d does not commute",
    ),
    "as the weight": (
        lambda s, x: functional.conv2d(x, s.first(x)[:, :, :3, :3].mean(0, True)) + s.second(x)[:, :1, 1:-1, 1:-1],
        "conv2d does not commute",
    ),
    "the consumer's weight is read": (
        lambda s, x: s.second(s.first(x)) + s.second(x),
        "second.weight is shared with conv2d",
    ),
    "channels at places": (
        lambda s, x: s.second(s.first(x).transpose(1, 2).reshape(x.shape)),
        "conv2d does not commute with a scale per channel",
    ),
    "pooled over channels": (
        lambda s, x: s.second(functional.avg_pool3d(s.first(x)[:, None], 3, 1, 1)[:, 0]),
        "avg_pool3d does not commute",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_scales_that_cannot_move_through(name: str) -> None:
    forward, reason = REFUSED[name]
    weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 1, 1))
    findings = examine(Image(forward, first=conv(), second=conv(), weight=weight))
    assert "first.weight" not in sites(findings)
    assert any(reason in refusal.reason for refusal in findings.refusals if refusal.producer == "first.weight"), (
        findings.refusals
    )


# ------------------------------------------------------------------------------------------------------ what is read


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv1d(CHANNELS, 4, 3, stride=2, padding=2), (3, CHANNELS, SIZE)),
        (nn.Conv2d(CHANNELS, 6, (3, 2), padding=(1, 0), dilation=(1, 3), groups=2), (3, CHANNELS, SIZE, SIZE)),
        (nn.Conv2d(CHANNELS, 2 * CHANNELS, 3, groups=CHANNELS), (3, CHANNELS, SIZE, SIZE)),
        (nn.Conv2d(CHANNELS, 5, 1, stride=2), (CHANNELS, SIZE, SIZE)),
        (nn.Conv3d(CHANNELS, 4, (2, 3, 1), stride=(1, 2, 3), groups=4), (3, CHANNELS, 4, 5, 6)),
        (nn.Linear(CHANNELS, 5), (3, 7, CHANNELS)),
    ],
    ids=["1d", "2d with groups", "depthwise", "one example", "3d", "linear"],
)
def test_the_windows_of_a_convolution_times_its_matrix_are_its_output(layer: Any, shape: tuple[int, ...]) -> None:
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64)
    captured = capture(layer.float().eval(), (x.float(),))
    NormalizeConvolutions()(captured.graph_module)
    (product,) = product_nodes(captured.graph_module)
    reading = Reading.of(product)
    weight, bias = layer.double().weight.detach().flatten(1), layer.bias.detach()
    given = torch.cat([outputs_for(reading.rows(part), weight) for part in reading.parts(x)]) + bias
    torch.testing.assert_close(given, reading.flat(layer(x)), rtol=1e-12, atol=1e-12)


def test_gptq_of_groups_is_that_of_each_group() -> None:
    groups, n, k = 3, 4, 9
    weight, rows = torch.randn(groups * n, k), torch.randn(groups, 200, k) @ torch.randn(groups, k, k)
    spec = WeightSpec(3, 16)
    problem = BlockProblem(
        {"w": weight},
        {"w": spec},
        {"w": rows.mT @ rows / 200},
        {"w": rows.mean(1)},
        {},
        {},
        lambda *_: weight.sum(),
        1,
        Precision("cpu", is_bfloat16=False),
    )
    rounded = round_to_nearest(problem)
    codes, grid = gptq(problem, rounded).codes["w"]
    starts, grids = (of.split([n] * groups) for of in (rounded.codes["w"][1], grid))
    for part, read, start, own, fitted in zip(weight.split(n), rows, starts, codes.split(n), grids, strict=True):
        moments = read.T @ read / 200
        chosen, expected = descend(part, moments, quantization.gptq(part, moments, start), start)
        assert torch.equal(own, chosen) and torch.equal(fitted.scales, expected.scales)


# ----------------------------------------------------------------------------------------------- compiled, exported


class Residual(nn.Module):
    """A 3x3, a depthwise and a 1x1 convolution with batch norms."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.first_norm = conv(channels, bias=False), norm(channels)
        self.depthwise, self.depthwise_norm = conv(channels, groups=channels, bias=False), norm(channels)
        self.pointwise = conv(channels, size=1)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.first_norm(self.first(x)))
        return x + self.pointwise(functional.relu(self.depthwise_norm(self.depthwise(y))))


class UNet(nn.Module):
    """Down and up again, with a skip: no linear anywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.down = conv(3, 8), nn.Sequential(nn.MaxPool2d(2), conv(8, 16), norm(16), nn.ReLU())
        self.blocks = nn.Sequential(Residual(16), Residual(16))
        self.up, self.merge = nn.ConvTranspose2d(16, 8, 2, stride=2), nn.Sequential(conv(16, 8), norm(8), nn.ReLU())
        self.head = conv(8, 2, size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        y = self.up(self.blocks(self.down(x)))
        z = functional.interpolate(self.merge(torch.cat([x, y], 1)), scale_factor=2.0, mode="bilinear")
        return self.head(functional.avg_pool2d(z, 2))


PICTURES = (2, 3, 16, 16)


def compiled_net(tmp_path: Path, model: nn.Module, **options: Any) -> tuple[teq_graph.CompiledModel, Tensor]:
    """`model` compiled by `options`, and its error in the graph; equal in onnxruntime, and after saving."""
    training = options.pop("training", None)
    compiled = teq_graph.compile(
        randomized(model),
        (torch.randn(PICTURES),),
        ({0: DYNAMIC},),
        [(torch.randn(PICTURES),) for _ in range(4)],
        teq_graph.QuantizationConfig(**options),
        training,
    )
    x = torch.randn(3, *PICTURES[1:])
    directory = compiled.export_onnx(tmp_path / "onnx", accuracy_level=1)
    session, _ = open_directory(directory)
    given = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    wanted = compiled(x)
    assert relative_error(torch.from_numpy(given), wanted) <= 1e-5
    loaded = teq_graph.load(compiled.save(tmp_path / "saved"))
    assert torch.equal(loaded(x), wanted)
    with torch.no_grad():
        expected = model(x)
    return compiled, (wanted - expected).norm() / expected.norm()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("bits", "most"), [(2, 1.0), (3, 0.5), (4, 0.25), (8, 0.02)])
@pytest.mark.parametrize("group_size", [16, -1])
def test_a_network_without_linears(tmp_path: Path, bits: int, most: float, symmetric: bool, group_size: int) -> None:
    compiled, error = compiled_net(tmp_path, UNet(), bits=bits, symmetric=symmetric, group_size=group_size)
    report = compiled.report
    assert report.counts() == {"convolutions": "10 of 10"} and "convolutions  10 of 10 quantized" in str(report)
    assert error <= most
    assert {weight.name: weight.reason for weight in report.in_float} == {
        "up.weight": "read by aten.conv_transpose2d, which has its input channels for rows"
    }
    assert all(0 < weight.error < 1 for weight in report.convolutions)
    model = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    ops = collections.Counter(node.op_type for node in model.graph.node)
    assert ops["DequantizeLinear"] == ops["Conv"] == 10 and not ops["MatMulNBits"]
    read = {node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    codes = {tensor.data_type for tensor in model.graph.initializer if tensor.name in read}
    stored = {2: "2", 3: "4", 4: "4", 8: "8"}[bits]
    assert codes == {onnx.TensorProto.DataType.Value(f"{'INT' if symmetric else 'UINT'}{stored}")}
    (opset,) = (entry.version for entry in model.opset_import if not entry.domain)
    assert opset == (25 if bits == 2 else 23)


@pytest.mark.parametrize("init", ["activation", "weight"])
def test_training_brings_the_error_of_convolutions_down(tmp_path: Path, init: Any) -> None:
    rounded = compiled_net(tmp_path / "rounded", UNet(), bits=3, group_size=16)[1]
    torch.manual_seed(0)
    training = teq_graph.TrainingConfig(steps=20, stages=("teq", "clip", "gptq", "bias", "tune"), init=init)
    compiled, error = compiled_net(tmp_path / "trained", UNet(), bits=3, group_size=16, training=training)
    report = compiled.report
    assert error < 0.8 * rounded
    assert all(block.after < block.before for block in report.blocks)
    assert all({"rounded to nearest", "gptq", "tune"} <= weight.stages.keys() for weight in report.convolutions)
    assert any(site.kind == "convolution" and site.trained for site in report.sites)


def test_bits_of_convolutions_are_chosen(tmp_path: Path) -> None:
    training = teq_graph.TrainingConfig(stages=("clip", "gptq"))
    compiled, _ = compiled_net(tmp_path, UNet(), target_bits=3.5, group_size=16, training=training)
    bits = {weight.spec.bits for weight in compiled.report.convolutions}
    assert len(bits) > 1 and compiled.report.describe_bits().startswith("3.")


def test_convolutions_can_be_skipped(tmp_path: Path) -> None:
    compiled, _ = compiled_net(tmp_path, UNet(), skip=("*depthwise*", "stem*"), overrides={"head*": {"bits": 8}})
    in_float = {weight.name for weight in compiled.report.convolutions if weight.reason == "skipped by pattern"}
    assert in_float == {"stem.weight", "blocks.0.depthwise.weight", "blocks.1.depthwise.weight"}
    assert {w.spec.bits for w in compiled.report.convolutions if w.name == "head.weight" and w.spec} == {8}
    with pytest.raises(ConfigError, match="it matches no linear or convolution"):
        compiled_net(tmp_path, UNet(), skip=("stems*",))


def test_a_graph_without_products_is_refused() -> None:
    with pytest.raises(CaptureError, match="no linears and no convolutions") as caught:
        teq_graph.compile(randomized(norm()), (torch.randn(2, CHANNELS, 4, 4),), training=None)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("shape", [(2, 4, 6, 7, 8), (4, 6, 7, 8)], ids=["a batch", "one example"])
@pytest.mark.parametrize("bias", [True, False])
def test_three_dimensions_in_onnx(bias: bool, shape: tuple[int, ...], tmp_path: Path) -> None:
    options = {"stride": (1, 2, 1), "padding": 1, "dilation": (1, 1, 2), "groups": 2, "bias": bias}
    model = randomized(nn.Sequential(nn.Conv3d(4, 8, 3, **options), nn.ReLU(), nn.Conv3d(8, 4, (1, 2, 1), bias=bias)))
    quantization = teq_graph.QuantizationConfig(bits=4, group_size=16)
    compiled = teq_graph.compile(model, (torch.randn(shape),), quantization=quantization, training=None)
    x = torch.randn(shape)
    with torch.no_grad():
        expected = compiled(x)
    (actual,) = load(compiled.export_onnx(tmp_path / "onnx", accuracy_level=1)).run(input=x.numpy()).values()
    assert relative_error(torch.from_numpy(actual), expected) <= 1e-5


def test_the_file_is_small(tmp_path: Path) -> None:
    """4 bits in blocks of 32 take 5.2 bits a number with scales and zero points; names and nodes come on top."""
    model = nn.Sequential(conv(64, 128), nn.ReLU(), conv(128, 128)).eval()
    compiled = teq_graph.compile(
        model, (torch.randn(1, 64, 8, 8),), quantization=teq_graph.QuantizationConfig(group_size=32), training=None
    )
    directory = compiled.export_onnx(tmp_path / "onnx")
    size = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
    numbers = sum(parameter.numel() for parameter in model.parameters())
    assert size <= numbers * 5.2 / 8 + 8_000


FAMILIES: dict[str, tuple[str, dict[str, Any], int]] = {
    "ResNet": ("ResNet", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 1]}, 5),
    "ResNet, basic": ("ResNet", {"embedding_size": 8, "hidden_sizes": [8], "depths": [2], "layer_type": "basic"}, 2),
    "MobileNetV2": ("MobileNetV2", {"image_size": 32, "depth_multiplier": 0.1, "last_hidden_size": 32}, 1),
    "EfficientNet": (
        "EfficientNet",
        {"image_size": 32, "width_coefficient": 0.1, "depth_coefficient": 0.1, "hidden_dim": 128},
        2,
    ),
    "ConvNext": ("ConvNext", {"image_size": 32, "hidden_sizes": [16, 16, 32, 32], "depths": [1, 1, 2, 1]}, 9),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_families_of_transformers(tmp_path: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    family, config, least = FAMILIES[name]
    model = getattr(transformers, f"{family}ForImageClassification")(
        getattr(transformers, f"{family}Config")(num_labels=5, **config)
    )
    for module in randomized(model).modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    analysis = analyze(model, pixels, {"pixel_values": {0: DYNAMIC}})
    assert len(analysis.findings.equivalences) >= least
    assert "batch_norm" not in " ".join(op_names(analysis.captured.graph_module))
    others = {"pixel_values": torch.randn(3, 3, 32, 32)}
    with torch.no_grad():
        expected = model(**others).logits
    assert relative_error(run(analysis.captured.graph_module, others).logits, expected) <= 1e-5
    apply_random_scales(analysis.captured.graph_module, analysis.findings.equivalences)
    assert relative_error(run(analysis.captured.graph_module, others).logits, expected) <= 1e-5
    compiled = teq_graph.compile(
        model,
        pixels,
        {"pixel_values": {0: DYNAMIC}},
        quantization=teq_graph.QuantizationConfig(bits=2, group_size=32),
        training=None,
    )
    assert all(weight.spec is not None for weight in compiled.report.products)
    session, _ = open_directory(compiled.export_onnx(tmp_path / "onnx", accuracy_level=1))
    given = session.run(None, {"pixel_values": others["pixel_values"].numpy()})[0]
    assert relative_error(torch.from_numpy(given), compiled(**others).logits) <= 1e-4
