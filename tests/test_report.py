"""How reports and compiled models show themselves."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from support.compiling import DYNAMIC, LLAMA, SMALL, TRAINING, compile_llama, compile_mlp, mlp
from torch import Tensor

import teq_graph
from teq_graph import pipeline
from teq_graph.compile import analyze
from teq_graph.config import TrainingConfig, WeightSpec
from teq_graph.graph.tensors import get_tensor
from teq_graph.passes.insert_scales import InsertScales
from teq_graph.quantization import fake_quantize
from teq_graph.report import ROUNDED, SHARES, BlockReport, Curve, Report, SiteReport, WeightReport
from teq_graph.system.files import finite, read_json, write_json
from teq_graph.training.linear_errors import factors_of
from teq_graph.training.precision import Precision
from teq_graph.training.tensors import StretchTensors

VOID = {"br", "hr", "img", "input", "link", "meta"}


class Checker(html.parser.HTMLParser):
    """Elements that open and close in order; their names, and the text of table cells."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.cells: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        assert tag not in VOID and not any(name.startswith("on") or name in ("src", "href") for name, _ in attrs)
        self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["td"]:
            self.cells[-1] += data


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == [] and set(checker.seen) <= {
        "div", "p", "b", "table", "tr", "th", "td", "details", "summary",
        "style", "ul", "li", "svg", "g", "title", "path", "circle", "text",
    }  # fmt: skip
    return checker


@pytest.fixture(scope="module")
def llama() -> teq_graph.CompiledModel:
    return compile_llama(training=TRAINING)


def test_one_short_line(llama: teq_graph.CompiledModel) -> None:
    size = llama.report.bytes_after
    assert repr(llama) == f"CompiledModel(llama, 14 linears at W4g16, 9 equivalences, {size / 1e3:.0f} kB)"
    assert repr(llama.report) == f"Report(14 linears at W4g16, 9 equivalences, {size / 1e3:.0f} kB)"
    llama.config.architectures = ["LlamaForCausalLM"]
    assert repr(llama).startswith("CompiledModel(LlamaForCausalLM, 14 linears")
    assert repr(compile_mlp()).startswith("CompiledModel(3 linears at W4g16, 1 equivalence, ")
    mixed = dataclasses.replace(SMALL, overrides={"2.*": {"bits": 8}, "0.*": {"bits": 8, "symmetric": True}})
    assert repr(compile_mlp(quantization=mixed)).startswith("CompiledModel(3 linears at W8g16 sym, W8g16, W4g16, ")


def test_large_sizes() -> None:
    sites = (SiteReport("a", "linear", 4),) * 120
    assert repr(Report((), sites, bytes_after=87_123_456)) == "Report(0 linears, 120 equivalences, 87 MB)"
    assert repr(Report((), bytes_after=3_087_123_456)) == "Report(0 linears, 0 equivalences, 3,087 MB)"


def test_html_has_every_line_and_weight(llama: teq_graph.CompiledModel) -> None:
    for text in (llama._repr_html_(), llama.report._repr_html_()):
        cells = checked(text).cells
        for line in str(llama.report).splitlines():
            assert line[14:] in cells
        assert {weight.name for weight in llama.report.weights} <= set(cells)


def test_html_is_escaped() -> None:
    evil = "<script>alert(1)</script>&'\"\x00"
    report = Report(
        (
            WeightReport(evil, "linear", (2, 2), None, evil),
            WeightReport(evil, "linear", (2, 2), WeightSpec(), error=0.1),
        ),
        notes=(evil,),
    )
    checker = checked(report.to_html(evil))
    assert evil in checker.cells and "script" not in checker.seen


# ------------------------------------------------------------------------------------------------------------ contents


def test_the_graph_and_what_each_site_feeds(llama: teq_graph.CompiledModel) -> None:
    report = llama.report
    assert [len(linears) for linears in report.graph] == [7, 7, 1]
    assert {name for linears in report.graph for name in linears} == {weight.name for weight in report.linears}
    for site, equivalence in zip(report.sites, llama.equivalences, strict=True):
        assert site.consumers == equivalence.linears
        if equivalence.scale is None:  # that of the norm before the vocabulary projection, which stays in float
            assert not site.trained and site.quantiles == ()
            continue
        expected = np.quantile(equivalence.scale.log2().double().numpy(), SHARES)
        assert site.quantiles == pytest.approx(expected, abs=1e-4)
        assert (2 ** site.quantiles[0], 2 ** site.quantiles[-1]) == pytest.approx((site.smallest, site.largest), 1e-3)


def test_every_training_stage_has_its_curve(llama: teq_graph.CompiledModel) -> None:
    assert [list(block.curves) for block in llama.report.blocks] == [["teq", "tune"]] * 2
    for block in llama.report.blocks:
        for stage, steps in (("teq", TRAINING.steps_of_scales), ("tune", TRAINING.steps)):
            assert (block.curves[stage].steps, len(block.curves[stage].losses)) == (steps, steps)
    distilled = compile_mlp(training=dataclasses.replace(TRAINING, stages=("clip", "distill"))).report
    assert distilled.distillation is not None and list(distilled.distillation.curves) == ["distill"]
    assert compile_mlp(training=dataclasses.replace(TRAINING, stages=("clip",))).report.blocks[0].curves == {}


def test_curves_are_thinned_to_means() -> None:
    losses = torch.rand(1234, dtype=torch.float64).tolist()
    curve = Curve.of(losses)
    assert curve.steps == 1234 and len(curve.losses) == 100
    sizes = np.diff([1234 * point // 100 for point in range(101)])
    assert float(np.dot(curve.losses, sizes)) == pytest.approx(sum(losses))
    assert Curve.of(losses[:100]).losses == tuple(losses[:100]) and Curve.of([]) == Curve(0, ())


def relative(output: Tensor, target: Tensor) -> float:
    """By its definition, in float64."""
    lost = (output - target).square().mean(-1) / target.square().mean(-1)
    return float(lost.mean())


@pytest.mark.parametrize("stages", [("gptq",), ("teq",), ("teq", "clip", "gptq", "tune")], ids="+".join)
def test_errors_of_linears_are_those_of_their_outputs(stages: tuple[str, ...]) -> None:
    model, x = mlp(), torch.randn(64, 20)
    training = TrainingConfig(stages=stages, steps=5, batch_size=64)
    compiled = teq_graph.compile(model, (x,), ({0: DYNAMIC},), [(x,)], SMALL, training)
    reports = {weight.name: weight for weight in compiled.report.linears}
    if stages == ("teq",):
        assert all(report.stages == {} for report in reports.values())
        return
    moved = [name for site in compiled.report.sites if site.folded for name in (site.producer, *site.consumers)]
    weights = [model.get_parameter(name).detach() for name in reports]
    precision = Precision.for_codes(weights, [WeightSpec(4, 16)] * len(weights))
    for name, report in reports.items():
        layer = int(name.split(".")[0])
        weight = model[layer].weight.detach().double()
        with torch.no_grad(), precision.inputs():  # as the float model is computed whose inputs are looked at
            read = model[:layer](x).double()
        rounded = fake_quantize(weight.float(), WeightSpec(4, 16)).double()
        wanted = [ROUNDED, *(stage for stage in stages if stage != "teq" or name in moved)]
        assert list(report.stages) == wanted
        assert report.stages[ROUNDED] == pytest.approx(relative(read @ rounded.T, read @ weight.T), rel=1e-3)
        assert report.stages["gptq"] < report.stages[ROUNDED]


def test_factors_are_what_the_graph_multiplies_by() -> None:
    analysis = analyze(LLAMA.build())
    captured, specs = analysis.captured, analysis.specs
    before = {name: get_tensor(captured.graph_module, name).clone() for name in specs}
    nodes = [node for node in captured.graph_module.graph.nodes if node.op == "call_function"]
    inserted = pipeline.run(pipeline.insert_scales(analysis.findings.equivalences, specs), captured.graph_module).of(
        InsertScales
    )
    scales = {name: get_tensor(captured.graph_module, name) for name in inserted.scales}
    assert factors_of(inserted, scales, list(specs)) == {}
    for name in inserted.scales[1:]:
        scales[name].data.uniform_(0.5, 2)
    factors = factors_of(inserted, scales, list(specs))
    tensors = StretchTensors(inserted, nodes)
    constants = tensors.constants()
    assert 0 < len(factors) < len(specs)
    for name, weight in before.items():
        expected = tensors.scaled(name, constants)
        torch.testing.assert_close(math.prod(factors.get(name, []), start=weight), expected)


# ---------------------------------------------------------------------------------------------------------------- files


def test_reports_survive_json(llama: teq_graph.CompiledModel, tmp_path: Path) -> None:
    write_json(tmp_path / "report.json", llama.report.to_dict())
    assert Report.from_dict(read_json(tmp_path / "report.json")) == llama.report


def test_reports_of_earlier_versions_are_read(llama: teq_graph.CompiledModel) -> None:
    data = llama.report.to_dict()
    del data["graph"]
    for kind, names in {"sites": ("consumers", "quantiles"), "weights": ("stages",), "blocks": ("curves",)}.items():
        for entry in data[kind]:
            for name in names:
                del entry[name]
    older = Report.from_dict(json.loads(json.dumps(data)))
    assert older.sites[0].consumers == () and older.blocks[0].curves == {} and older.weights[0].stages == {}
    assert str(older) == str(llama.report)


def test_what_is_no_number_of_json_is_read_back(tmp_path: Path) -> None:
    block = BlockReport(("a",), math.inf, -math.inf, {"clip": math.nan}, {"tune": Curve(2, (math.inf, 1.0))})
    write_json(tmp_path / "report.json", {**Report((), blocks=(block,)).to_dict(), "other": [{"value": (math.nan,)}]})
    assert "NaN" in (tmp_path / "report.json").read_text()
    content = read_json(tmp_path / "report.json")
    assert content["other"] == [{"value": ["NaN"]}]
    (found,) = Report.from_dict(content).blocks
    assert (found.before, found.after) == (math.inf, -math.inf) and math.isnan(found.stages["clip"])
    assert found.curves["tune"].losses == (math.inf, 1.0)
    assert finite({"a": 1.5, "b": [2, None, True, "x"]}) == {"a": 1.5, "b": [2, None, True, "x"]}
