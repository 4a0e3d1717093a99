"""The page that `teq-graph report` writes: what it shows, and where its charts draw it."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.compiling import compile_mlp
from support.pages import EVIL, checked, export_llama

from teq_graph.analysis.equivalences import Refusal
from teq_graph.config import WeightSpec
from teq_graph.report import ROUNDED, BlockReport, Curve, Report, SiteReport, WeightReport
from teq_graph.reporting.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Chart, Series, box_chart, line_chart
from teq_graph.reporting.directory import (
    Attention,
    AttentionRefusal,
    Perplexity,
    Provenance,
    ReportedDirectory,
    read_directory,
)
from teq_graph.reporting.page import render_fragment, render_page

SECTIONS = ["quality", "graph", "scales", "errors", "bits", "sizes", "training", "refusals", "making"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_llama(tmp_path_factory.mktemp("exported"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_mlp(training=None).save(tmp_path_factory.mktemp("saved") / "saved")


def directory_of(report: Report, **values: Any) -> ReportedDirectory:
    fields: dict[str, Any] = {"provenance": Provenance(), "attention": None, "files": {}, **values}
    return ReportedDirectory(Path("out"), report, **fields)


# ------------------------------------------------------------------------------------------------------------- contents


def test_every_section_of_a_trained_model(exported: Path) -> None:
    directory = read_directory(exported)
    text = render_page(directory)
    page = checked(text)
    assert (
        text.startswith("<!DOCTYPE html>") and 'content="light dark"' in text and "prefers-color-scheme: dark" in text
    )
    assert "default-src 'none'" in text
    assert [values["id"] for tag, values in page.elements if tag == "section"] == SECTIONS
    assert [values["href"][1:] for tag, values in page.elements if tag == "a"] == SECTIONS
    titles = {values["title"] for _, values in page.elements if "title" in values}
    assert {weight.name for weight in directory.report.linears} <= titles
    assert {site.producer for site in directory.report.sites} <= titles
    for refusal in directory.report.refusals:
        assert refusal.reason in page.text and refusal.producer in page.text
    for stage in ("rounded to nearest", "teq", "clip", "gptq", "tune", "as kept"):
        assert stage in page.text
    assert "teq-graph quantize llama -o 'my out'" in page.text
    assert "13.250" in page.text and "100 tokens of a text" in page.text
    assert all(version in page.text for version in directory.provenance.versions.values())
    assert page.text.count("Block ") >= 3 and "1 fused" not in page.text
    arcs = [values for tag, values in page.elements if values.get("class", "").startswith("arc ")]
    assert len(arcs) == sum(len(site.consumers) for site in directory.report.sites)
    charts = [values["aria-label"] for tag, values in page.elements if tag == "svg" and "aria-label" in values]
    for name in ("Error of each block", "model.layers.•.self_attn.v_proj: scale", "model.layers.•.mlp.down_proj: rel"):
        assert any(chart.startswith(name) for chart in charts)
    assert {"teq: loss over step", "tune: loss over step"} <= set(charts)


def test_what_was_not_measured_is_said_in_words(saved: Path) -> None:
    page = checked(render_page(read_directory(saved)))
    assert not any(tag == "svg" and "aria-label" in values for tag, values in page.elements)
    for words in (
        "Perplexity was not measured",
        "KL divergence from the float model was not measured",
        "1 equivalence found, and no scales trained",
        "Blocks were not trained",
        "outputs of single linears were not measured",
        "Nothing was trained",
        "By the Python API",
        "Not examined",
    ):
        assert words in page.text
    empty = checked(render_page(directory_of(Report(()))))
    assert "No equivalences were found" in empty.text and "No linear was quantized" in empty.text


def test_bits_that_differ_are_a_table() -> None:
    weights = tuple(
        WeightReport(f"layers.{layer}.{name}.weight", "linear", (8, 8), WeightSpec(bits) if bits else None, "asked")
        for layer, bits in enumerate((2, 3, 8, None))
        for name in ("up", "down")
    )
    graph = tuple((f"layers.{layer}.up.weight", f"layers.{layer}.down.weight") for layer in range(4))
    page = checked(render_page(directory_of(Report(weights, graph=graph))))
    cells = [values["class"] for tag, values in page.elements if tag == "td" and "b " in values.get("class", "")]
    assert cells == ["b b2", "b b3", "b b8"] * 2
    assert "layers.•.up" in page.text


def test_older_reports_are_shown(exported: Path) -> None:
    directory = read_directory(exported)
    report = dataclasses.replace(
        directory.report,
        graph=(),
        sites=tuple(dataclasses.replace(site, consumers=(), quantiles=()) for site in directory.report.sites),
        weights=tuple(dataclasses.replace(weight, stages={}) for weight in directory.report.weights),
        blocks=tuple(dataclasses.replace(block, curves={}) for block in directory.report.blocks),
    )
    page = checked(render_page(dataclasses.replace(directory, report=report)))
    assert page.text.count("an earlier version wrote") == 3
    assert all(weight.name.removesuffix(".weight") in page.text for weight in report.linears)


def test_everything_is_escaped() -> None:
    curve = Curve(2, (1.0, 0.5))
    block = BlockReport((EVIL,), 0.1, 0.05, {EVIL: 0.07}, {EVIL: curve})
    report = Report(
        (
            WeightReport(EVIL, "linear", (2, 2), WeightSpec(), error=0.1, stages={ROUNDED: 0.2, EVIL: 0.1}),
            WeightReport(f"{EVIL}.1", "linear", (2, 2), None, EVIL),
        ),
        (SiteReport(EVIL + "2", "linear", 2, True, 0.5, 2.0, 1.0, (EVIL,), tuple(range(-4, 5))),),
        (Refusal(EVIL, "linear", EVIL, EVIL),),
        (block,),
        block,
        notes=(EVIL,),
        graph=((EVIL,), (f"{EVIL}.1",)),
    )
    provenance = Provenance.model_validate(
        {
            **dict.fromkeys(("created", "command", "processor"), EVIL),
            **{name: {EVIL: EVIL} for name in ("versions", "quantization", "training", "calibration")},
            "source": {"name": EVIL},
            "stages": [EVIL],
            "perplexity": Perplexity(values={EVIL: 3.0}, text=EVIL, tokens=1, context=1),
        }
    )
    attention = Attention(fused=1, refusals=(AttentionRefusal(node=EVIL, reason=EVIL),))
    directory = directory_of(report, provenance=provenance, attention=attention, files={EVIL: 1})
    page = checked(render_page(directory))
    assert page.text.count(EVIL) > 20 and "49" not in page.text
    fragment = checked(render_fragment(report, EVIL, [(EVIL, EVIL)]))
    assert fragment.text.count(EVIL) > 5


def test_what_is_not_finite_leaves_gaps() -> None:
    values = (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-320, 1e308, 0.5)
    names = tuple(f"layers.{index}.up" for index in range(len(values)))
    report = Report(
        tuple(
            WeightReport(name, "linear", (2, 2), WeightSpec(), error=value, stages={ROUNDED: value})
            for name, value in zip(names, values, strict=True)
        ),
        tuple(
            SiteReport("norm", "gain", 2, True, value, value, value, (name,), (value,) * 9)
            for name, value in zip(names, values, strict=True)
        ),
        blocks=tuple(
            BlockReport((name,), value, value, {"clip": value}, {"tune": Curve(1, (value,))})
            for name, value in zip(names, values, strict=True)
        ),
        seconds=math.inf,
        graph=tuple((name,) for name in names),
    )
    perplexity = Perplexity(values={"float": 3.0, "quantized": math.inf}, text="t", tokens=1, context=1)
    page = checked(render_page(directory_of(report, provenance=Provenance(perplexity=perplexity))))
    assert "∞" in page.text and "NaN" in page.text


def test_large_models_stay_readable() -> None:
    roles = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    stages = {ROUNDED: 0.0123456, "teq": 0.0112345, "clip": 0.00987654, "gptq": 0.000123456, "tune": 0.000234567}
    curves = {stage: Curve(400, tuple(1 / (step + 1) for step in range(100))) for stage in ("teq", "tune")}
    graph = tuple(tuple(f"model.layers.{layer}.module.{role}.weight" for role in roles) for layer in range(72))
    names = [name for block in graph for name in block]
    report = Report(
        tuple(WeightReport(name, "linear", (8192, 8192), WeightSpec(3), error=0.1, stages=stages) for name in names),
        tuple(
            SiteReport(f"{block[0]}.{site}", "rms_norm", 8192, True, 0.1, 9.0, 0.3, block[:3], tuple(range(-4, 5)))
            for block in graph
            for site in range(4)
        ),
        tuple(Refusal(name, "linear", "add", f"reason {index % 9}") for index, name in enumerate(names)),
        tuple(BlockReport(block, 0.1, 0.05, stages, curves) for block in graph),
        graph=graph,
    )
    text = render_page(directory_of(report))
    checked(text)
    assert len(names) > 500 and len(text.encode()) < 2_000_000


# --------------------------------------------------------------------------------------------------------------- charts


def inside(chart: Chart) -> bool:
    points = [point for line in chart.lines for point in line.dots]
    for line in chart.lines:
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", line.path)]
        points += list(zip(numbers[::2], numbers[1::2], strict=True))
    points += [(box.x, top) for box in chart.boxes for top in box.tops]
    ticks = all(TOP - 1 <= y <= BOTTOM + 1 for y, _ in chart.y_ticks) and all(0 <= x <= WIDTH for x, _ in chart.x_ticks)
    return ticks and all(LEFT - 1 <= x <= RIGHT + 1 and TOP - 1 <= y <= BOTTOM + 1 < HEIGHT for x, y in points)


def test_lines_lie_where_their_values_are() -> None:
    chart = line_chart("t", [Series("a", 1, [(0, 0.001), (1, 0.1), (2, 0.0), (3, 10.0)])], "x", "y")
    assert chart is not None and inside(chart)
    of = {label: y for y, label in chart.y_ticks}
    assert list(of) == ["0.001", "0.01", "0.1", "1", "10"]
    (line,) = chart.lines
    x = [x for x, _ in chart.x_ticks]
    assert line.dots == ((x[0], of["0.001"]), (x[1], of["0.1"]), (x[3], of["10"]))
    assert line.path.count("M") == 2 and line.path.count("L") == 1
    assert line_chart("t", [Series("a", 1, [(0, 0.0), (1, math.nan)])], "x", "y") is None


def test_boxes_lie_where_their_quantiles_are() -> None:
    chart = box_chart("t", {3: (-2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2), 4: (0,) * 9, 5: (math.inf,) * 9}, "x", "y")
    assert chart is not None and inside(chart) and len(chart.boxes) == 2
    of = {label: y for y, label in chart.y_ticks}
    assert list(of) == ["0.25", "0.5", "1", "2", "4"] and chart.base == of["1"]
    box = chart.boxes[0]
    assert (box.tops[0], box.tops[1], box.tops[3], box.tops[5], box.tops[6]) == tuple(
        of[label] for label in ("4", "2", "1", "0.5", "0.25")
    )
    assert box.title == "block 3: × 0.25 to 4, half of it × 0.707 to 1.41"
    assert box_chart("t", {0: ()}, "x", "y") is None


@given(st.lists(st.lists(st.floats(), min_size=1, max_size=20), min_size=1, max_size=3))
def test_charts_of_any_numbers(columns: list[list[float]]) -> None:
    chart = line_chart("t", [Series("a", 1, list(enumerate(column))) for column in columns], "x", "y")
    assert chart is None or inside(chart)
    boxes = box_chart("t", {depth: sorted((column * 9)[:9]) for depth, column in enumerate(columns)}, "x", "y")
    assert boxes is None or inside(boxes)
