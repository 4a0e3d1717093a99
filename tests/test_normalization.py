"""The passes that normalise a captured graph: each on a match, a near miss, a no-op, twice, and with escapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import apply_and_check, capture_small, op_names
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from teq_graph.capture import capture
from teq_graph.graph.nodes import is_tensor_constant
from teq_graph.graph.products import product_nodes, weight_name_of
from teq_graph.graph.tensors import get_tensor
from teq_graph.passes.fold_constants import FoldConstants
from teq_graph.passes.fuse_rms_norm import FuseRMSNorm
from teq_graph.passes.normalize_linears import NormalizeLinears
from teq_graph.passes.remove_no_ops import RemoveNoOps
from teq_graph.passes.untie_weights import UntieWeights

Forward = Callable[..., Any]
WIDTH = 8


class Small(nn.Module):
    """`forward(self, x)` over a few parameters of its own."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(6, WIDTH))
        self.square = nn.Parameter(torch.empty(WIDTH, WIDTH))
        self.matrix = nn.Parameter(torch.empty(WIDTH, 6))
        self.bias = nn.Parameter(torch.empty(6))
        self.gain = nn.Parameter(torch.empty(WIDTH))
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def small(forward: Forward, *shape: int) -> tuple[GraphModule, tuple[Tensor]]:
    """The captured graph without asserts and other noise, and inputs of other sizes than the example's."""
    shape = shape or (2, 4, WIDTH)
    graph_module = capture_small(Small(forward), torch.randn(shape)).graph_module
    bigger = [size + 3 if index < min(2, len(shape) - 1) else size for index, size in enumerate(shape)]
    return graph_module, (torch.randn(bigger),)


def without_no_ops(forward: Forward, *shape: int) -> tuple[GraphModule, tuple[Tensor]]:
    graph_module, inputs = small(forward, *shape)
    RemoveNoOps()(graph_module)
    return graph_module, inputs


def linear_only(s: Small, x: Tensor) -> Tensor:
    return functional.linear(x, s.weight, s.bias)


# ------------------------------------------------------------------------------------------------------ RemoveNoOps

NO_OPS: dict[str, Forward] = {
    "cast": lambda s, x: x.to(torch.float32) * 2,
    "cast to other": lambda s, x: x.type_as(s.gain) * 2,
    "dropout": lambda s, x: functional.dropout(x, 0.5, training=False) * 2,
    "slice": lambda s, x: x[:, :] * 2,
    "detach": lambda s, x: x.detach() * 2,
}


@pytest.mark.parametrize("name", NO_OPS)
def test_no_ops_go(name: str) -> None:
    graph_module, inputs = small(NO_OPS[name])
    apply_and_check(RemoveNoOps(), graph_module, inputs, tolerance=0)
    assert op_names(graph_module) == ["aten.mul.Tensor"]


NOT_NO_OPS: dict[str, Forward] = {
    "cast": lambda s, x: x.to(torch.float64) * 2,
    "narrowing cast and back": lambda s, x: x.to(torch.float16).to(torch.float32) * 2,
    "slice": lambda s, x: x[:, 1:] * 2,
    "slice with step": lambda s, x: x[..., ::2] * 2,
    "nothing": lambda s, x: x * 2 + 1,
}


@pytest.mark.parametrize("name", NOT_NO_OPS)
def test_what_does_something_stays(name: str) -> None:
    graph_module, inputs = small(NOT_NO_OPS[name])
    RemoveNoOps()(graph_module)
    ops = op_names(graph_module)
    apply_and_check(RemoveNoOps(), graph_module, inputs, modified=False, tolerance=0)
    assert op_names(graph_module) == ops
    kept = {"cast": 1, "narrowing cast and back": 2}.get(name, 0)
    assert sum("to." in op for op in ops) == kept


def test_a_reshaped_nothing_is_an_empty_tensor() -> None:
    """ONNX takes 0 for a size that stays: of no channels there is nothing to reshape."""
    forward = lambda s, x: torch.cat([x * s.gain, x[..., :0].view(*x.shape[:2], 0)], -1)  # noqa: E731
    graph_module, inputs = small(forward)
    apply_and_check(RemoveNoOps(), graph_module, inputs, tolerance=0)
    ops = op_names(graph_module)
    assert "aten.new_zeros.default" in ops and "aten.reshape.default" not in ops
    apply_and_check(RemoveNoOps(), graph_module, inputs, modified=False, tolerance=0)


def in_parts(s: Small, x: Tensor) -> Tensor:
    """Two writes into one value, of which the second repeats its source."""
    result = x.new_empty(*x.shape[:-1], 2 * WIDTH)
    result[..., :WIDTH] = x * s.gain
    result[..., WIDTH:] = x[..., :1]
    return result


def test_what_is_overwritten_as_a_whole_has_gradients() -> None:
    graph_module, inputs = small(in_parts)
    assert sum("copy" in op for op in op_names(graph_module)) == 2
    apply_and_check(RemoveNoOps(), graph_module, inputs, tolerance=0)
    assert not any("copy" in op for op in op_names(graph_module))
    (x,) = inputs
    x.requires_grad_()
    graph_module(x).square().sum().backward()
    mine, x.grad = x.grad, None
    (gain,) = graph_module.state_dict().values()
    torch.cat([x * gain, x[..., :1].expand(x.shape)], -1).square().sum().backward()
    assert mine is not None and x.grad is not None
    torch.testing.assert_close(mine, x.grad)


def test_no_op_that_escapes() -> None:
    graph_module, inputs = small(lambda s, x: (x.to(torch.float32), x.to(torch.float32) * 2))
    apply_and_check(RemoveNoOps(), graph_module, inputs, tolerance=0)
    assert op_names(graph_module) == ["aten.mul.Tensor"]


def heads_normalised(s: Small, x: Tensor) -> Tensor:
    """Changes in place make torch.export decompose it: then its end is a view, for strides that the norm passes on."""
    heads = x.clone().add_(1).unflatten(-1, (2, -1)).transpose(1, 2)
    wide = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + 1e-6)
    return (wide * s.gain).transpose(1, 2).reshape(*x.shape[:2], -1)


def test_no_view_relies_on_strides_that_another_pass_changes() -> None:
    graph_module, inputs = small(heads_normalised, 2, 4, 2 * WIDTH)
    assert op_names(graph_module)[-1] == "aten.view.default"
    apply_and_check(RemoveNoOps(), graph_module, inputs, tolerance=0)
    apply_and_check(FuseRMSNorm(), graph_module, inputs)
    assert "aten.rms_norm.default" in op_names(graph_module)


# ------------------------------------------------------------------------------------------------- NormalizeLinears

PRODUCTS: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "addmm": (lambda s, x: torch.addmm(s.bias, x, s.matrix), (5, WIDTH)),
    "mm": (lambda s, x: torch.mm(x, s.matrix), (5, WIDTH)),
    "matmul": (lambda s, x: x @ s.matrix, (2, 4, WIDTH)),
    "transposed": (lambda s, x: x @ s.weight.T, (2, 4, WIDTH)),
    "transposed t": (lambda s, x: x @ s.weight.t(), (2, 4, WIDTH)),
    "transposed transpose": (lambda s, x: x @ s.weight.transpose(1, 0), (2, 4, WIDTH)),
    "transposed permute": (lambda s, x: x @ s.weight.permute(1, 0), (2, 4, WIDTH)),
    "square, not transposed": (lambda s, x: x @ s.square.permute(0, 1), (2, 4, WIDTH)),
    "bias after": (lambda s, x: functional.linear(x, s.weight) + s.bias, (2, 4, WIDTH)),
    "bias before": (lambda s, x: s.bias + functional.linear(x, s.weight), (2, 4, WIDTH)),
    "product and bias": (lambda s, x: x @ s.matrix + s.bias, (2, 4, WIDTH)),
    "bias twice": (lambda s, x: x @ s.matrix + s.bias + s.bias, (2, 4, WIDTH)),
    "constant first": (lambda s, x: s.weight @ x.transpose(-1, -2), (2, 4, WIDTH)),
    "constant first, transposed": (lambda s, x: s.matrix.t() @ x.transpose(-1, -2), (2, 4, WIDTH)),
    "constant first, mm": (lambda s, x: torch.mm(s.weight, x.t()), (5, WIDTH)),
    "constant first, of a vector": (lambda s, x: s.weight @ x, (WIDTH,)),
    "of rows": (
        lambda s, x: torch.addmm(s.bias, x.view(-1, WIDTH), s.matrix).view(x.shape[0], x.shape[1], 6),
        (2, 4, WIDTH),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_become_linears(name: str) -> None:
    forward, shape = PRODUCTS[name]
    graph_module, inputs = without_no_ops(forward, *shape)
    apply_and_check(NormalizeLinears(), graph_module, inputs)
    FoldConstants()(graph_module)
    ops = op_names(graph_module)
    assert "aten.linear.default" in ops
    assert not {"aten.mm.default", "aten.addmm.default", "aten.matmul.default"} & set(ops)
    assert sum(op == "aten.add.Tensor" for op in ops) == (name == "bias twice")
    assert not {"aten.view.default", "aten.reshape.default"} & set(ops)


NO_PRODUCTS: dict[str, tuple[Forward, tuple[int, ...]]] = {
    "linear": (linear_only, (2, 4, WIDTH)),
    "both computed": (lambda s, x: x @ x.transpose(-1, -2), (2, 4, WIDTH)),
    "scaled addmm": (lambda s, x: torch.addmm(s.bias, x, s.matrix, beta=2), (5, WIDTH)),
    "addmm with a scalar bias": (lambda s, x: torch.addmm(s.bias[:1], x, s.matrix), (5, WIDTH)),
    "addmm with a matrix of biases": (lambda s, x: torch.addmm(s.weight[:1, :6], x, s.matrix), (5, WIDTH)),
    "bias of a linear that is read twice": (
        lambda s, x: (lambda y: (y + s.bias, y))(functional.linear(x, s.weight)),
        (2, 4, WIDTH),
    ),
    "rows that are read as well": (
        lambda s, x: (lambda y: (y, y.view(x.shape[0], x.shape[1], 6)))(functional.linear(x.view(-1, WIDTH), s.weight)),
        (2, 4, WIDTH),
    ),
    "rows of other sizes": (
        lambda s, x: functional.linear(x.view(-1, WIDTH), s.weight).view(x.shape[1], x.shape[0], 6),
        (2, 4, WIDTH),
    ),
    "columns of other sizes": (
        lambda s, x: functional.linear(x.view(x.shape[0], -1, WIDTH), s.weight).view(x.shape[0], x.shape[1], 12),
        (2, 4, 2 * WIDTH),
    ),
    "second bias": (lambda s, x: functional.linear(x, s.weight, s.bias) + s.bias, (2, 4, WIDTH)),
    "bias times two": (lambda s, x: torch.add(functional.linear(x, s.weight), s.bias, alpha=2), (2, 4, WIDTH)),
    "bias that broadcasts": (lambda s, x: functional.linear(x, s.weight) + s.bias[:1], (2, 4, WIDTH)),
}


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_other_products_stay(name: str) -> None:
    forward, shape = NO_PRODUCTS[name]
    graph_module, inputs = without_no_ops(forward, *shape)
    FoldConstants()(graph_module)
    apply_and_check(NormalizeLinears(), graph_module, inputs, modified=False, tolerance=0)


# ---------------------------------------------------------------------------------------------------- FoldConstants

EXPRESSIONS: dict[str, Forward] = {
    "1 + weight": lambda s, x: x * (1 + s.gain),
    "transpose": lambda s, x: functional.linear(x, s.matrix.t()),
    "chain": lambda s, x: x * (1 + s.gain * 0.5).float(),
    "two sources": lambda s, x: functional.linear(x, s.weight + s.matrix.t()),
    "read elsewhere": lambda s, x: x * (1 + s.gain) + s.gain,
}


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_constants_fold(name: str) -> None:
    graph_module, inputs = without_no_ops(EXPRESSIONS[name])
    apply_and_check(FoldConstants(), graph_module, inputs, tolerance=0)
    assert set(op_names(graph_module)) <= {"aten.mul.Tensor", "aten.linear.default", "aten.add.Tensor"}
    computed = [node for node in graph_module.graph.nodes if node.op == "call_function"]
    assert not any(all(map(is_tensor_constant, node.all_input_nodes)) for node in computed)


def test_a_folded_constant_keeps_the_name_where_it_is_free() -> None:
    graph_module, _ = without_no_ops(EXPRESSIONS["1 + weight"])
    original = get_tensor(graph_module, "gain").clone()
    FoldConstants()(graph_module)
    assert torch.equal(get_tensor(graph_module, "gain"), 1 + original)
    graph_module, _ = without_no_ops(EXPRESSIONS["read elsewhere"])
    original = get_tensor(graph_module, "gain").clone()
    FoldConstants()(graph_module)
    assert torch.equal(get_tensor(graph_module, "gain"), original)


NOT_CONSTANT: dict[str, Forward] = {
    "input": lambda s, x: x + 1,
    "larger than its source": lambda s, x: x + s.gain.expand(64, WIDTH)[:1],
    "random": lambda s, x: x + torch.rand_like(s.gain) * 0,
    "depends on a size": lambda s, x: x + s.gain.repeat(x.shape[1], 1) * 0,
}


@pytest.mark.parametrize("name", NOT_CONSTANT)
def test_what_is_not_constant_stays(name: str) -> None:
    graph_module, inputs = without_no_ops(NOT_CONSTANT[name])
    apply_and_check(FoldConstants(), graph_module, inputs, modified=False, tolerance=0)


# ------------------------------------------------------------------------------------------------------ FuseRMSNorm


def root(x: Tensor, eps: float = 1e-5) -> Tensor:
    return torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


NORMS: dict[str, Forward] = {
    "pow": lambda s, x: x * root(x) * s.gain,
    "gain first": lambda s, x: s.gain * (root(x) * x),
    "square": lambda s, x: x * torch.rsqrt(torch.square(x).mean(-1, keepdim=True) + 1e-6) * s.gain,
    "product": lambda s, x: x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * s.gain,
    "dimension by number": lambda s, x: x * torch.rsqrt(x.pow(2).mean(2, keepdim=True) + 1e-6) * s.gain,
    "no gain": lambda s, x: (x * root(x)).relu(),
    "1 + weight": lambda s, x: x * root(x) * (1.0 + s.gain),
    "normalised value escapes": lambda s, x: (lambda y: (y * s.gain, y))(x * root(x)),
    "mean square escapes": lambda s, x: (lambda m: (x * torch.rsqrt(m + 1e-6) * s.gain, m))(
        x.pow(2).mean(-1, keepdim=True)
    ),
}


@pytest.mark.parametrize("name", NORMS)
def test_rms_norms_fuse(name: str) -> None:
    graph_module, inputs = without_no_ops(NORMS[name])
    FoldConstants()(graph_module)
    apply_and_check(FuseRMSNorm(), graph_module, inputs)
    ops = op_names(graph_module)
    assert ops.count("aten.rms_norm.default") == 1 and "aten.rsqrt.default" not in ops
    gained = name != "no gain"
    assert ops.count("aten.mul.Tensor") == (gained and "escapes" in name and "normalised" in name)


NOT_RMS_NORMS: dict[str, Forward] = {
    "centred": lambda s, x: x * torch.rsqrt((x - x.mean(-1, keepdim=True)).pow(2).mean(-1, keepdim=True) + 1e-6),
    "cube": lambda s, x: x * torch.rsqrt(x.abs().pow(3).mean(-1, keepdim=True) + 1e-6),
    "another dimension": lambda s, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6),
    "another value": lambda s, x: (x + 1) * root(x),
    "sum": lambda s, x: x * torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6),
    "root escapes": lambda s, x: (lambda r: (x * r * s.gain, r))(root(x)),
    "computed epsilon": lambda s, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + s.gain[:1].abs()),
    "half before the gain": lambda s, x: (x * root(x)).to(torch.float16).to(torch.float32) * s.gain,
    "integers before the gain": lambda s, x: (x * root(x)).to(torch.int64).to(torch.float32) * s.gain,
    "epsilon times two": lambda s, x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 1e-3, alpha=2)),
    "none": lambda s, x: x * s.gain,
}


@pytest.mark.parametrize("name", NOT_RMS_NORMS)
def test_what_is_no_rms_norm_stays(name: str) -> None:
    graph_module, inputs = without_no_ops(NOT_RMS_NORMS[name])
    FoldConstants()(graph_module)
    if "before the gain" in name:
        # The norm itself fuses; its narrowing stays, and with it the product after it.
        apply_and_check(FuseRMSNorm(), graph_module, inputs, tolerance=1e-3)
        assert op_names(graph_module)[1:] == ["aten.to.dtype", "aten.to.dtype", "aten.mul.Tensor"]
        return
    apply_and_check(FuseRMSNorm(), graph_module, inputs, modified=False, tolerance=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rms_norm_in_half_precision(dtype: torch.dtype) -> None:
    def forward(s: Small, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return s.gain * (wide * root(wide)).to(x.dtype)

    model = Small(forward)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    captured = capture(model.to(dtype).eval(), (torch.randn(2, 4, WIDTH, dtype=dtype),))
    RemoveNoOps()(captured.graph_module)
    inputs = (torch.randn(2, 4, WIDTH, dtype=dtype),)
    eps = torch.finfo(dtype).eps
    apply_and_check(FuseRMSNorm(), captured.graph_module, inputs, tolerance=2 * eps)
    assert op_names(captured.graph_module) == ["aten.rms_norm.default"]


# ----------------------------------------------------------------------------------------------------- UntieWeights


def tied(s: Small, x: Tensor) -> Any:
    return functional.linear(x, s.weight), functional.embedding(torch.arange(3), s.weight)


def test_a_tied_weight_gets_a_copy_for_its_linear() -> None:
    graph_module, inputs = without_no_ops(tied)
    renamed = apply_and_check(UntieWeights({"weight"}), graph_module, inputs, tolerance=0).value
    (linear,) = product_nodes(graph_module)
    assert weight_name_of(linear) == renamed["weight"] != "weight"
    assert torch.equal(get_tensor(graph_module, "weight"), get_tensor(graph_module, renamed["weight"]))


def test_the_linears_of_a_tied_weight_share_one_copy() -> None:
    def twice(s: Small, x: Tensor) -> Any:
        return *tied(s, x), functional.linear(x.tanh(), s.weight)

    graph_module, inputs = without_no_ops(twice)
    renamed = apply_and_check(UntieWeights({"weight"}), graph_module, inputs, tolerance=0).value
    names = [weight_name_of(linear) for linear in product_nodes(graph_module)]
    assert names == [renamed["weight"]] * 2


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (tied, set()),
        (tied, {"matrix"}),
        (linear_only, {"weight"}),
        (lambda s, x: (functional.linear(x, s.weight), functional.linear(x * 2, s.weight)), {"weight"}),
    ],
    ids=["not named", "another", "not tied", "shared by linears only"],
)
def test_other_weights_stay_tied(forward: Forward, names: set[str]) -> None:
    graph_module, inputs = without_no_ops(forward)
    apply_and_check(UntieWeights(names), graph_module, inputs, modified=False, tolerance=0)
