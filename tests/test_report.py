"""How reports and compiled models show themselves."""

from __future__ import annotations

import dataclasses
import html.parser

import pytest
from support.compiling import SMALL, TRAINING, compile_llama, compile_mlp

import teq_graph
from teq_graph.config import WeightSpec
from teq_graph.report import Report, SiteReport, WeightReport

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
        "div", "p", "b", "table", "tr", "th", "td", "details", "summary"
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
