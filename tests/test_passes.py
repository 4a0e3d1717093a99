"""The passes that scale and quantize: what they write, that it is exact where they say so, and what they leave."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.graphs import (
    apply_and_check,
    capture_small,
    check_legal,
    find,
    op_names,
    random_scale,
    relative_error,
    run,
)
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.nn import functional

from teq_graph.analysis.equivalences.equivalence import Equivalence
from teq_graph.config import WeightSpec
from teq_graph.errors import NumericsError
from teq_graph.graph.nodes import arguments_of, is_call
from teq_graph.graph.tensors import get_tensor, set_tensor
from teq_graph.passes.fold_scales import FoldScales
from teq_graph.passes.insert_scales import InsertedScales, InsertScales
from teq_graph.passes.lower_to_matmul_nbits import LowerToMatMulNBits
from teq_graph.passes.merge_products import MergeProducts
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.quantization import fake_quantize, quantize_weight

WIDTH = 24
SPEC = WeightSpec(4, 16)


class Block(nn.Module):
    """norm → up, gate → down, whose intermediate value is an output as well; `head` has no equivalence."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.gate, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH, bias=False)
        self.down, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        y = x + self.down(self.up(y) * functional.silu(self.gate(y)))
        return self.head(y), y


@pytest.fixture
def block() -> tuple[GraphModule, tuple[Equivalence, ...], tuple[Tensor]]:
    captured = capture_small(Block(), torch.randn(2, 5, WIDTH))
    return captured.graph_module, find(captured).equivalences, (torch.randn(3, 7, WIDTH),)


NAMES = ("gate.weight", "up.weight", "down.weight", "head.weight")


def set_scales(graph_module: GraphModule, inserted: InsertedScales) -> list[Tensor]:
    scales = [random_scale(e.channels) for e in inserted.equivalences]
    for name, scale in zip(inserted.scales, scales, strict=True):
        get_tensor(graph_module, name).data.copy_(scale)
    return scales


def test_inserted_scales_are_ones_and_change_nothing(block: Any) -> None:
    graph_module, equivalences, inputs = block
    apply_and_check(InsertScales(equivalences, {}), graph_module, inputs, tolerance=0, idempotent=False, shared=True)
    scales = [(name, p) for name, p in graph_module.named_parameters() if "scale" in name]
    assert [p.shape[0] for _, p in scales] == [e.channels for e in equivalences]
    assert all(torch.equal(p, torch.ones_like(p)) and p.requires_grad for _, p in scales)
    assert not any(p.requires_grad for name, p in graph_module.named_parameters() if "scale" not in name)


def test_random_scales_leave_the_float_output(block: Any) -> None:
    graph_module, equivalences, inputs = block
    expected = run(graph_module, inputs)
    inserted = InsertScales(equivalences, {})(graph_module).value
    set_scales(graph_module, inserted)
    assert relative_error(run(graph_module, inputs), expected) <= 1e-5


def test_nothing_to_insert(block: Any) -> None:
    graph_module, _, inputs = block
    apply_and_check(InsertScales((), {}), graph_module, inputs, modified=False, tolerance=0)


@pytest.mark.parametrize("spec", [WeightSpec(2, 16), WeightSpec(3, 32), SPEC, WeightSpec(8, -1, True)], ids=str)
def test_fake_quantization_of_what_is_named(block: Any, spec: WeightSpec) -> None:
    graph_module, equivalences, inputs = block
    weights = {name: get_tensor(graph_module, name).clone() for name in NAMES}
    for name in ("down.weight", "head.weight"):  # with an equivalence, and without
        set_tensor(graph_module, name, fake_quantize(weights[name], spec))
    expected = run(graph_module, inputs)
    for name in NAMES:
        set_tensor(graph_module, name, weights[name])
    inserted = InsertScales(equivalences, {"down.weight": spec, "head.weight": spec})(graph_module).value
    assert set(inserted.quantized) == {"down.weight", "head.weight"}
    assert relative_error(run(graph_module, inputs), expected) == 0


def test_gradients_reach_every_scale_and_nothing_else(block: Any) -> None:
    graph_module, equivalences, inputs = block
    InsertScales(equivalences, dict.fromkeys(NAMES, SPEC))(graph_module)
    graph_module(*inputs)[0].square().sum().backward()
    for name, parameter in graph_module.named_parameters():
        assert (parameter.grad is not None) == ("scale" in name), name
    grads = [p.grad for name, p in graph_module.named_parameters() if "scale" in name]
    assert grads and all(g is not None and torch.isfinite(g).all() and g.abs().max() > 0 for g in grads)


@pytest.mark.parametrize("specs", [{}, dict.fromkeys(NAMES, SPEC), {"head.weight": SPEC}], ids=["float", "all", "one"])
def test_folding_restores_the_graph(block: Any, specs: dict[str, WeightSpec]) -> None:
    graph_module, equivalences, inputs = block
    expected, code, nodes = run(graph_module, inputs), graph_module.code, str(graph_module.graph)
    weights = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    inserted = InsertScales(equivalences, specs)(graph_module).value
    scales = set_scales(graph_module, inserted)
    result = FoldScales(inserted)(graph_module)
    assert result.modified
    check_legal(graph_module, inputs)
    assert graph_module.code == code and str(graph_module.graph) == nodes
    assert set(graph_module.state_dict()) == set(weights)
    assert relative_error(run(graph_module, inputs), expected) <= 1e-5
    assert all(torch.equal(a, b) for a, b in zip(result.value, scales, strict=True))
    for equivalence, scale in zip(equivalences, scales, strict=True):
        weights |= equivalence.apply(weights, scale)
    after = graph_module.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in weights.items())


def test_folded_weights_quantize_to_what_was_trained(block: Any) -> None:
    graph_module, equivalences, inputs = block
    specs = dict.fromkeys(NAMES, SPEC)
    inserted = InsertScales(equivalences, specs)(graph_module).value
    set_scales(graph_module, inserted)
    expected = run(graph_module, inputs)
    for step in (FoldScales(inserted), QuantizeLinears(specs)):
        step(graph_module)
    assert relative_error(run(graph_module, inputs), expected) <= 1e-6
    LowerToMatMulNBits()(graph_module)
    assert relative_error(run(graph_module, inputs), expected) <= 1e-5


def test_a_scale_below_the_smallest_is_clamped(block: Any) -> None:
    graph_module, equivalences, inputs = block
    expected = run(graph_module, inputs)
    inserted = InsertScales(equivalences, {})(graph_module).value
    get_tensor(graph_module, inserted.scales[0]).data[:] = -1.0
    (scale, *_) = FoldScales(inserted)(graph_module).value
    assert bool((scale > 0).all())
    assert relative_error(run(graph_module, inputs), expected) <= 1e-3


def test_folding_refuses_to_overflow() -> None:
    captured = capture_small(Block(), torch.randn(2, 5, WIDTH))
    equivalences = find(captured).equivalences
    graph_module = captured.graph_module.half()
    inserted = InsertScales(equivalences, {})(graph_module).value
    get_tensor(graph_module, inserted.scales[0]).data = torch.full((WIDTH,), 1e-5)
    with pytest.raises(NumericsError, match=r"norm\.(weight|bias) overflows torch\.float16") as caught:
        FoldScales(inserted)(graph_module)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", [WeightSpec(2, 16), WeightSpec(3, -1), SPEC, WeightSpec(8, 32, True)], ids=str)
def test_quantize_and_lower(block: Any, spec: WeightSpec) -> None:
    graph_module, _, inputs = block
    weights = {name: get_tensor(graph_module, name).clone() for name in NAMES[:3]}
    for name, weight in weights.items():
        set_tensor(graph_module, name, quantize_weight(weight, spec).dequantize())
    expected = run(graph_module, inputs)
    for name, weight in weights.items():
        set_tensor(graph_module, name, weight)
    result = QuantizeLinears(dict.fromkeys(weights, spec))(graph_module)
    assert result.modified
    assert set(result.value) == set(weights)
    assert relative_error(run(graph_module, inputs), expected) <= 1e-6
    apply_and_check(QuantizeLinears(dict.fromkeys(weights, spec)), graph_module, inputs, modified=False, tolerance=0)
    apply_and_check(LowerToMatMulNBits(), graph_module, inputs, tolerance=1e-5)
    ops = op_names(graph_module)
    assert ops.count("teq_graph.matmul_nbits.default") == 3
    assert ops.count("aten.linear.default") == 1 and "teq_graph.dequantize_nbits.default" not in ops
    names = set(graph_module.state_dict())
    assert not set(weights) & names and {"head.weight", "head.bias", "gate.bias"} <= names


def test_nothing_to_quantize_or_lower(block: Any) -> None:
    graph_module, _, inputs = block
    apply_and_check(QuantizeLinears({}), graph_module, inputs, modified=False, tolerance=0)
    apply_and_check(QuantizeLinears({"other": SPEC}), graph_module, inputs, modified=False, tolerance=0)
    apply_and_check(LowerToMatMulNBits(), graph_module, inputs, modified=False, tolerance=0)


def test_a_weight_of_two_linears_is_quantized_once() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x).tanh())

    captured = capture_small(Shared(), torch.randn(2, 5, WIDTH))
    find(captured)
    graph_module, inputs = captured.graph_module, (torch.randn(3, 7, WIDTH),)
    QuantizeLinears({"linear.weight": SPEC})(graph_module)
    assert op_names(graph_module).count("teq_graph.dequantize_nbits.default") == 1
    apply_and_check(LowerToMatMulNBits(), graph_module, inputs, tolerance=1e-5)
    assert op_names(graph_module).count("teq_graph.matmul_nbits.default") == 2
    assert len([name for name in graph_module.state_dict() if "codes" in name]) == 1


# --------------------------------------------------------------------------------------------------------- merging


class Gated(nn.Module):
    """Gate and up read one value; `other` reads it too, and is of another size."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.odd = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16, bias=False)
        self.other, self.down = nn.Linear(WIDTH, 8), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.relu()
        return self.down(self.up(x) * functional.silu(self.gate(x)) + self.odd(x)), self.other(x)


def quantized_products(module: nn.Module, specs: dict[str, WeightSpec]) -> GraphModule:
    graph_module = capture_small(module, torch.randn(2, 5, WIDTH)).graph_module
    QuantizeLinears(specs)(graph_module)
    LowerToMatMulNBits()(graph_module)
    return graph_module


@pytest.mark.parametrize("spec", [WeightSpec(4, 16), WeightSpec(3, 16, symmetric=True), WeightSpec(2, -1)], ids=str)
def test_products_of_one_value_become_one(spec: WeightSpec) -> None:
    names = [f"{name}.weight" for name in ("gate", "up", "odd", "other", "down")]
    graph_module = quantized_products(Gated(), dict.fromkeys(names, spec))
    inputs = (torch.randn(3, 7, WIDTH),)
    # Which rows are multiplied together decides how a sum over WIDTH products is split: each rounds by eps at most.
    apply_and_check(MergeProducts(), graph_module, inputs, tolerance=WIDTH * torch.finfo(torch.float32).eps)
    products = [node for node in graph_module.graph.nodes if is_call(node, torch.ops.teq_graph.matmul_nbits.default)]
    # Without a bias, and of another size, they stay.
    assert sorted(arguments_of(node)["N"] for node in products) == [8, 16, WIDTH, 32]
    assert not MergeProducts()(graph_module).modified


def test_products_that_differ_stay_apart() -> None:
    specs = {"gate.weight": WeightSpec(4, 16), "up.weight": WeightSpec(2, 16), "odd.weight": WeightSpec(4, 32)}
    graph_module = quantized_products(Gated(), specs)
    assert not MergeProducts()(graph_module).modified

    class Shared(nn.Module):
        """One weight is read twice, and another value is read."""

        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(WIDTH, 16), nn.Linear(WIDTH, 16)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) + self.two(x.relu()) + self.two(x)

    graph_module = quantized_products(Shared(), {"one.weight": SPEC, "two.weight": SPEC})
    assert not MergeProducts()(graph_module).modified
