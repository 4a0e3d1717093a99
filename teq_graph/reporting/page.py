"""From a report to HTML: what each section shows, and how numbers are written."""

from __future__ import annotations

import collections
import functools
import json
import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from teq_graph.errors import ModelFileError, one_line
from teq_graph.report import REPORT_FILE, ROUNDED, BlockReport, Report, WeightReport, counted
from teq_graph.reporting.charts import Chart, Series, box_chart, line_chart
from teq_graph.reporting.layout import block_tables, depths, role, short
from teq_graph.system.files import finite, shown

if TYPE_CHECKING:
    import jinja2

    from teq_graph.reporting.directory import Evaluation, ReportedDirectory

KEPT = "as kept"
_STYLES = (ROUNDED, "teq", "clip", "gptq", "bias", "tune", "distill", KEPT)
"""What each kind of error is drawn as: the number of a colour, and of a dash, in `charts.css`."""

MOST_CHARTS = 24
"""Of one kind; the tables have everything."""

_JOINED = "\N{NO-BREAK SPACE}"

_HUES = 8
"""Colours from the first block to the last."""


def render_page(directory: ReportedDirectory, evaluation: Evaluation | None = None) -> str:
    """The whole page: one file that needs no other, without scripts.

    Raises ModelFileError for numbers that no model gives, too large to compute with.
    """
    try:
        return _render_page(directory, evaluation)
    except (ArithmeticError, ValueError, RecursionError) as error:
        raise ModelFileError(
            f"{shown(directory.path / REPORT_FILE)} holds what cannot be shown: {one_line(error)}"
        ) from error


def _render_page(directory: ReportedDirectory, evaluation: Evaluation | None) -> str:
    report, provenance = directory.report, directory.provenance
    name = provenance.source.get("name")
    return (
        _environment()
        .get_template("page.html")
        .render(
            title=name if isinstance(name, str) and name else directory.path.name,
            report=report,
            directory=directory,
            provenance=provenance,
            evaluation=evaluation,
            stages=_stages(report),
            tiles=_tiles(directory),
            blocks=block_tables(report),
            block_errors=_block_errors(report),
            scales=_scale_charts(report),
            linear_errors=_linear_errors(report),
            bits=_bits(report),
            sizes=_sizes(directory),
            curves=_training_curves(report),
            refusals=_grouped((refusal.reason, refusal.producer) for refusal in report.refusals),
            in_float=_grouped((weight.reason or "no reason given", weight.name) for weight in report.in_float),
            settings=_settings(directory),
            generator=_generator(),
        )
    )


def render_fragment(report: Report, title: str, lines: Iterable[tuple[str, str]]) -> str:
    """The short form, for notebooks: `lines` of label and text, the errors of blocks, and all weights."""
    template = _environment().get_template("fragment.html")
    return template.render(report=report, title=title, lines=lines, drawn=_block_errors(report))


GENERATOR = "teq_graph"
"""What a page calls its author in its head."""


def _generator() -> str:
    from teq_graph import __version__

    return f"{GENERATOR} {__version__}"


# -------------------------------------------------------------------------------------------------------- sections


def _stages(report: Report) -> list[str]:
    """All stages that some linear's error is known after, in order."""
    found = dict.fromkeys(stage for weight in report.weights for stage in weight.stages)
    return sorted(found, key=_style_of)


def _style_of(stage: str) -> int:
    return _STYLES.index(stage) if stage in _STYLES else len(_STYLES)


def _tiles(directory: ReportedDirectory) -> list[tuple[str, str, str]]:
    """Label, value and note of what a reader wants to know first."""
    report, measured = directory.report, directory.provenance.perplexity
    bits = f"bits {report.describe_bits()}" if report.quantized else ""
    tiles = [
        *((f"{kind} quantized", count, bits) for kind, count in report.counts().items()),
        ("size", f"{_bytes(report.bytes_before)} → {_bytes(report.bytes_after)}", "all tensors of the graph"),
        ("equivalences", str(len(report.sites)), f"{sum(site.folded for site in report.sites)} folded into weights"),
    ]
    if report.blocks:
        before, after = (_mean(values) for values in zip(*_ends(report.blocks), strict=True))
        tiles.append(("block error", f"{_number(before)} → {_number(after)}", f"mean of {len(report.blocks)}"))
    if measured is not None and measured.values:
        values = list(measured.values.values())
        shown = [values[0]] if len(values) == 1 else [values[0], values[-1]]
        tiles.append(("perplexity", " → ".join(f"{value:.2f}" for value in shown), " → ".join(measured.values)))
    tiles.append(("time", _seconds(report.seconds), "to compile"))
    return [(label, value, note.replace(" × ", f"{_JOINED}×{_JOINED}")) for label, value, note in tiles]


def _mean(values: Sequence[float]) -> float:
    # `statistics.fmean` refuses infinities of both signs.
    return sum(values) / len(values)


def _ends(blocks: Iterable[BlockReport]) -> Iterable[tuple[float, float]]:
    return ((block.before, block.after) for block in blocks)


def _block_errors(report: Report) -> Chart | None:
    place = {linears: number for number, linears in enumerate(report.graph)}
    points: dict[str, list[tuple[float, float]]] = {}
    for index, block in enumerate(report.blocks):
        depth = place.get(block.linears, index)
        for stage, error in ((ROUNDED, block.before), *block.stages.items(), (KEPT, block.after)):
            points.setdefault(stage, []).append((depth, error))
    return line_chart("Error of each block", _series(points), "block", "relative squared error")


def _linear_errors(report: Report) -> list[Chart]:
    depth_of = depths(report)
    groups: dict[str, dict[str, dict[int, list[float]]]] = {}
    for weight in report.products:
        if weight.name in depth_of:
            stages = groups.setdefault(role(weight.name, report), {})
            for stage, error in weight.stages.items():
                stages.setdefault(stage, {}).setdefault(depth_of[weight.name], []).append(error)
    charts = []
    for name, stages in groups.items():
        means = {
            stage: [(float(depth), _mean(errors)) for depth, errors in sorted(by_depth.items())]
            for stage, by_depth in stages.items()
        }
        charts.append(line_chart(name, _series(means), "block", "relative squared error"))
    return [chart for chart in charts if chart is not None]


def _series(points: dict[str, list[tuple[float, float]]]) -> list[Series]:
    # What was kept lies under the stage that gave it.
    order = sorted(points, key=lambda stage: (stage != KEPT, _style_of(stage)))
    return [Series(stage, _style_of(stage), points[stage]) for stage in order]


def _scale_charts(report: Report) -> list[Chart]:
    depth_of = depths(report)
    groups: dict[str, dict[int, list[Sequence[float]]]] = {}
    for index, site in enumerate(report.sites):
        depth = next((depth_of[name] for name in site.consumers if name in depth_of), index)
        if site.quantiles:
            groups.setdefault(role(site.producer, report), {}).setdefault(depth, []).append(site.quantiles)
    charts = (
        box_chart(name, {depth: _pooled(found) for depth, found in by_depth.items()}, "block", "scale")
        for name, by_depth in groups.items()
    )
    return [chart for chart in charts if chart is not None]


def _pooled(quantiles: Sequence[Sequence[float]]) -> list[float]:
    """Of several sites the extremes, and the mean of what lies between."""
    columns = list(zip(*quantiles, strict=False))
    return [
        min(column) if index == 0 else max(column) if index == len(columns) - 1 else _mean(column)
        for index, column in enumerate(columns)
    ]


def _bits(report: Report) -> list[tuple[str, list[tuple[int, WeightReport | None]]]] | None:
    """Rows of a table: role, and the weight in each block; None where all linears have the same bits."""
    if len({linear.spec.bits for linear in report.quantized if linear.spec}) < 2:
        return None
    depth_of = depths(report)
    rows: dict[str, dict[int, WeightReport]] = {}
    for weight in report.products:
        if weight.name in depth_of:
            rows.setdefault(role(weight.name, report), {}).setdefault(depth_of[weight.name], weight)
    return [(name, [(depth, row.get(depth)) for depth in range(len(report.graph))]) for name, row in rows.items()]


def _sizes(directory: ReportedDirectory) -> list[tuple[str, int]]:
    """What is compared, and its bytes."""
    report = directory.report
    rows = [("the float model's tensors", report.bytes_before), ("the quantized graph's tensors", report.bytes_after)]
    for what, weights in (
        ("linears", report.linears),
        ("experts", report.experts),
        ("convolutions", report.convolutions),
        ("embeddings", report.embeddings),
    ):
        if weights:
            rows += [
                (f"{what} in float", sum(weight.bytes_before for weight in weights)),
                (f"{what} as stored", sum(weight.bytes_after for weight in weights)),
            ]
    return [*rows, ("all files of the directory", sum(directory.files.values()))]


def _training_curves(report: Report) -> list[Chart]:
    """One chart for each stage that trains: a line for each block, from the first colour to the last."""
    lines: dict[str, list[Series]] = {}
    whole = [] if report.distillation is None else [("the whole model", report.distillation)]
    blocks = [(f"block {index}", block) for index, block in enumerate(report.blocks)]
    for index, (name, block) in enumerate([*blocks, *whole]):
        hue = min(_HUES - 1, index * _HUES // max(1, len(blocks)))
        for stage, curve in block.curves.items():
            step = curve.steps / max(1, len(curve.losses))
            points = [(step * (number + 0.5), loss) for number, loss in enumerate(curve.losses)]
            lines.setdefault(stage, []).append(Series(name, hue, points))
    charts = (line_chart(stage, series, "step", "loss") for stage, series in lines.items())
    return [chart for chart in charts if chart is not None]


def _grouped(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Reason -> the names that have it, the most frequent first."""
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for reason, name in pairs:
        groups[reason].append(name)
    return sorted(groups.items(), key=lambda group: -len(group[1]))


def _settings(directory: ReportedDirectory) -> list[tuple[str, str]]:
    provenance = directory.provenance
    parts = {
        "source": provenance.source,
        "quantization": provenance.quantization,
        "training": provenance.training,
        "calibration": provenance.calibration,
    }
    return [(name, _json(value)) for name, value in parts.items() if value]


# --------------------------------------------------------------------------------------------------------- writing


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("teq_graph.reporting"),
        autoescape=True,  # every name in a report comes from somebody's model
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "number": _number,
        "bytes": _bytes,
        "counted": counted,
        "short": short,
        "shape": lambda shape: "×".join(map(str, shape)),
    }
    environment.filters.update(filters)
    environment.globals.update(MOST_CHARTS=MOST_CHARTS, STYLES=_STYLES)
    return environment


def _number(value: float) -> str:
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:.3g}"


def _bytes(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            digits = 2 if count < 10 * size else 1 if count < 100 * size else 0
            return f"{count / size:,.{digits}f}{_JOINED}{unit}"
    return f"{count}{_JOINED}B"


def _seconds(seconds: float) -> str:
    if seconds < 100 or not math.isfinite(seconds):
        return f"{seconds:.0f}{_JOINED}s"
    return f"{seconds / 60:.0f}{_JOINED}min"


def _json(value: Any) -> str:
    return json.dumps(finite(value), indent=2, ensure_ascii=False)
