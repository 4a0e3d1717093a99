"""Capture small modules, apply passes and scales, and check what comes out."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from teq_graph import pipeline
from teq_graph.analysis.equivalences import Equivalence, Findings, find_equivalences
from teq_graph.capture import CapturedGraph, capture
from teq_graph.graph.tensors import get_tensor, set_tensor
from teq_graph.passes.base import GraphPass, PassResult

DYNAMIC = torch.export.Dim.DYNAMIC
T = TypeVar("T")
SMALLEST, LARGEST = 0.1, 10.0


def randomize(model: nn.Module, std: float = 0.3) -> nn.Module:
    """Give every parameter normal values, so that norms and biases are not trivial; eval mode."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def capture_small(model: nn.Module, *args: Tensor, dynamic: bool = True) -> CapturedGraph:
    """`model` with random parameters; the first two dimensions of each argument are dynamic, but for the last."""
    shapes = tuple(dict.fromkeys(range(min(2, x.dim() - 1)), DYNAMIC) for x in args)
    return capture(randomize(model), args, shapes if dynamic else None)


def normalize(captured: CapturedGraph) -> CapturedGraph:
    """Apply the passes that come before the analysis."""
    pipeline.run(pipeline.NORMALIZE, captured.graph_module)
    return captured


def find(captured: CapturedGraph) -> Findings:
    """Normalise and analyse."""
    return find_equivalences(normalize(captured))


def find_in(model: nn.Module, *args: Tensor) -> Findings:
    """Capture, normalise and analyse."""
    return find(capture_small(model, *args))


def leaves(outputs: Any) -> list[Tensor]:
    """The tensors of an output, in order."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def relative_error(actual: Any, expected: Any) -> float:
    """Largest difference relative to the largest expected magnitude, the worst of all outputs."""
    pairs = list(zip(leaves(actual), leaves(expected), strict=True))
    assert pairs
    worst = 0.0
    for a, e in pairs:
        assert a.shape == e.shape and a.dtype == e.dtype
        if a.numel():
            a, e = a.detach().double(), e.detach().double()
            assert torch.isfinite(e).all()
            error = float((a - e).abs().max() / e.abs().max().clamp(min=1e-300))
            worst = max(worst, error if math.isfinite(error) else math.inf)
    return worst


def run(graph_module: GraphModule, inputs: Any) -> Any:
    """The outputs for a tuple of arguments, a mapping of keyword arguments, or (args, kwargs)."""
    if isinstance(inputs, Mapping):
        args, kwargs = (), inputs
    elif len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        args, kwargs = inputs
    else:
        args, kwargs = inputs, {}
    with torch.no_grad():
        return graph_module(*copy.deepcopy(args), **copy.deepcopy(kwargs))


def op_names(graph_module: GraphModule) -> list[str]:
    """The ops of the graph, in order."""
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


def apply_and_check(
    step: GraphPass[T],
    graph_module: GraphModule,
    inputs: tuple[Any, ...],
    *,
    modified: bool = True,
    tolerance: float = 1e-6,
    idempotent: bool = True,
    shared: bool = False,
) -> PassResult[T]:
    """Apply a pass and check its contract.

    It says whether it changed anything, and changes nothing where it says so; the graph is legal, compiled and
    keeps its inputs; every node's recorded shape and dtype is what it computes; the outputs are those of before
    (bit for bit where `tolerance` is 0); a second application changes nothing (`idempotent`). No tensor is read
    by two nodes unless `shared`.
    """
    code, graph = graph_module.code, str(graph_module.graph)
    tensors = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    expected = run(graph_module, inputs)
    result = step(graph_module)
    assert result.graph_module is graph_module
    assert result.modified == modified
    if not modified:
        assert graph_module.code == code and str(graph_module.graph) == graph
        after = graph_module.state_dict()
        assert after.keys() == tensors.keys() and all(torch.equal(after[name], tensors[name]) for name in tensors)
    check_legal(graph_module, inputs, shared)
    assert _signature(code) == _signature(graph_module.code)
    actual = run(graph_module, inputs)
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{type(step).__name__}: relative error {error:.3g}"
    if idempotent:
        code = graph_module.code
        again = step(graph_module)
        assert not again.modified
        assert graph_module.code == code
    return result


def check_legal(graph_module: GraphModule, inputs: tuple[Any, ...], shared: bool = False) -> None:
    """Lint; compiled code of the present graph; unique names; tensors exist; recorded metadata is true."""
    graph = graph_module.graph
    graph.lint()
    code = graph_module.code
    graph_module.recompile()
    assert graph_module.code == code, "the pass did not recompile"
    names = [node.name for node in graph.nodes]
    assert len(names) == len(set(names))
    read = [node.target for node in graph.nodes if node.op == "get_attr"]
    assert shared or len(read) == len(set(read)), "a tensor is read by two nodes"
    assert {name for name, _ in graph_module.named_parameters()} <= set(read), "a parameter that nothing reads"
    _CheckMetadata(graph_module).run(*pytree.tree_leaves(inputs), enable_io_processing=False)


class _CheckMetadata(Interpreter):
    """Compares each value with what its node's metadata promises; symbolic sizes agree with any."""

    def run_node(self, n: Node) -> Any:
        with torch.no_grad():
            result = super().run_node(n)
        promised = n.meta.get("val")
        if isinstance(promised, Tensor):
            assert isinstance(result, Tensor) and result.dtype == promised.dtype, n
            assert result.dim() == promised.dim(), n
            sizes = zip(result.shape, promised.shape, strict=True)
            assert all(actual == size for actual, size in sizes if isinstance(size, int)), n
        elif n.op == "get_attr":
            raise AssertionError(f"{n.target} has no metadata")
        return result


def _signature(code: str) -> str:
    return next(line for line in code.splitlines() if line.startswith("def forward"))


def random_scale(channels: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random scales, log-uniform in [0.1, 10]."""
    low, high = math.log(SMALLEST), math.log(LARGEST)
    return torch.empty(channels, dtype=dtype).uniform_(low, high).exp().clamp(SMALLEST, LARGEST)


def apply_random_scales(graph_module: GraphModule, equivalences: Sequence[Equivalence]) -> None:
    """Fold random scales of every equivalence, through the product's own algebra in float32."""
    for equivalence in equivalences:
        names = [scaled.name for scaled in (*equivalence.divided, *equivalence.multiplied)]
        tensors = {name: get_tensor(graph_module, name) for name in names}
        for name, value in equivalence.apply(tensors, random_scale(equivalence.channels)).items():
            set_tensor(graph_module, name, value)
    graph_module.recompile()


def apply_random_scales_in_float64(graph_module: GraphModule, equivalences: Sequence[Equivalence]) -> None:
    """Fold random scales of every equivalence into the tensors of a float64 graph, spelled out once more."""
    for equivalence in equivalences:
        scale = random_scale(equivalence.channels, torch.float64)
        one = torch.ones(1, dtype=torch.float64)
        for scaled in equivalence.divided:
            factor = torch.cat([scale, one])[scaled.index]
            set_tensor(graph_module, scaled.name, get_tensor(graph_module, scaled.name) / factor)
        for scaled in equivalence.multiplied:
            factor = torch.cat([scale, one])[scaled.index]
            set_tensor(graph_module, scaled.name, get_tensor(graph_module, scaled.name) * factor)
    graph_module.recompile()
