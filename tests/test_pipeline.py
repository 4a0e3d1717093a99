"""The runner of passes: order, values, what it says of a pass that fails, and what it checks in tests."""

from __future__ import annotations

import re

import pytest
import torch
from support.compiling import LLAMA, compile_llama, in_one_line
from support.graphs import capture_small
from support.names import stable
from torch import nn
from torch.fx import GraphModule

from teq_graph import pipeline
from teq_graph.errors import NumericsError, PassError
from teq_graph.graph.check import check_graph
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.passes.fuse_attention import FuseAttention
from teq_graph.pipeline import Phase


class Noted(GraphPass[str]):
    """Says its name, and changes nothing."""

    def __init__(self, name: str = "noted", log: list[str] | None = None) -> None:
        self.name = name
        self.log = [] if log is None else log

    def call(self, graph_module: GraphModule) -> PassResult[str]:
        self.log.append(self.name)
        return PassResult(graph_module, False, self.name)


class Failing(GraphPass[None]):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        raise self.error


class Careless(GraphPass[None]):
    """Leaves the graph in one of the states that no pass may leave it in."""

    def __init__(self, change: str) -> None:
        self.change = change

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        node = next(node for node in graph_module.graph.nodes if node.op == "call_function")
        if self.change == "meta":
            del node.meta["val"]
        elif self.change == "code":
            node.target = torch.ops.aten.relu.default
        elif self.change == "tensor":
            reader = next(node for node in graph_module.graph.nodes if node.op == "get_attr")
            reader.meta["val"] = reader.meta["val"].half()
        elif self.change == "order":
            node.append(next(node for node in graph_module.graph.nodes if node.op == "placeholder"))
        return PassResult(graph_module, True)


@pytest.fixture
def graph_module() -> GraphModule:
    return capture_small(nn.Linear(8, 4), torch.randn(2, 8)).graph_module


def test_passes_run_in_order_and_return_what_they_found(graph_module: GraphModule) -> None:
    log: list[str] = []

    class Other(Noted):
        pass

    result = pipeline.run(Phase("phase", (Noted("first", log), Other("second", log))), graph_module)
    assert log == ["first", "second"] and not result.modified
    assert result.of(Other) == "second"
    with pytest.raises(ValueError, match="unpack"):  # two of that class, of which it cannot be said which is meant
        result.of(Noted)


@pytest.mark.parametrize("before", [0, 2])
def test_a_pass_that_fails_is_named_with_those_before_it(before: int, graph_module: GraphModule) -> None:
    phase = Phase("some phase", (*[Noted()] * before, Failing(RuntimeError("no such thing\n\nat line 3"))))
    with pytest.raises(PassError) as caught:
        pipeline.run(phase, graph_module)
    message = in_one_line(caught)
    place = "after Noted, Noted" if before else "the first"
    assert message == f"pass Failing of phase 'some phase' ({place}): RuntimeError: no such thing"
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "error", [NumericsError("too large"), KeyboardInterrupt(), torch.OutOfMemoryError()], ids=stable
)
def test_refusals_and_interruptions_stay_what_they_are(error: BaseException, graph_module: GraphModule) -> None:
    with pytest.raises(type(error)) as caught:
        pipeline.run(Phase("phase", (Failing(error),)), graph_module)
    assert caught.value is error


@pytest.mark.parametrize("change", ["meta", "code", "tensor", "order"])
def test_graphs_are_checked_after_each_pass(change: str, graph_module: GraphModule) -> None:
    check_graph(graph_module)
    with pytest.raises(PassError, match="pass Careless of phase 'phase'"):
        pipeline.run(Phase("phase", (Careless(change),)), graph_module)


def test_checks_are_for_tests(graph_module: GraphModule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "checks_every_pass", False)
    assert pipeline.run(Phase("phase", (Careless("meta"),)), graph_module).modified


def test_a_pass_that_fails_deep_in_an_export_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: object) -> None:
    def fail(*_: object) -> None:
        raise IndexError("list index out of range")

    compiled = compile_llama(LLAMA.build())
    monkeypatch.setattr(FuseAttention, "call", fail)
    with pytest.raises(PassError, match=re.escape("pass FuseAttention of phase 'for onnxruntime' (after RemoveNoOps")):
        compiled.export_onnx(f"{tmp_path}/out")
