"""Convolutions: batch norms fold into them, scales move through them, and their weights are quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import DYNAMIC, apply_and_check, apply_random_scales, find, op_names, relative_error, run
from torch import Tensor, nn
from torch.nn import functional

from teq_graph.analysis.equivalences import Findings
from teq_graph.capture import CapturedGraph, capture
from teq_graph.passes.fold_batch_norms import FoldBatchNorms
from teq_graph.passes.normalize_convolutions import NormalizeConvolutions

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
