"""What the command line prints on standard output: tables and summaries; on a terminal pretty, elsewhere plain."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from teq_graph.cli.calibrating import recordings_in
from teq_graph.errors import InputError
from teq_graph.system.files import finite, shown

if TYPE_CHECKING:
    from teq_graph.analysis.attention import AttentionRefusal, Attentions
    from teq_graph.analysis.blocks import Block
    from teq_graph.compile import Analysis
    from teq_graph.config import TrainingConfig
    from teq_graph.estimate import Estimate
    from teq_graph.report import Report, WeightReport
    from teq_graph.weight_plan import PlannedWeight

_UNWRAPPED = 1_000_000  # columns, where standard output is no terminal


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What `inspect` shows of a model."""

    model: str
    analysis: Analysis
    blocks: tuple[Block, ...]
    attentions: Attentions | None
    """None where they were not examined, as in a graph of half precision."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: everything, layer by layer."""
        findings, weights = self.analysis.findings, self.analysis.weights
        return {
            "model": self.model,
            "linears": [
                {"name": w.name, "shape": w.shape, "covered": w.name in findings.scaled, "in_float": w.reason}
                for w in weights
                if w.is_linear
            ],
            "experts": [
                {"name": w.name, "shape": w.shape, "experts": w.experts, "in_float": w.reason}
                | {"covered": w.name in findings.scaled}
                for w in weights
                if w.kind == "experts"
            ],
            "convolutions": [
                {"name": w.name, "shape": w.shape, "covered": w.name in findings.scaled, "in_float": w.reason}
                for w in weights
                if w.kind == "convolution"
            ],
            "equivalences": [
                {"producer": site.producer, "kind": site.kind, "channels": site.channels, "consumers": site.linears}
                for site in findings.equivalences
            ],
            "refusals": [dataclasses.asdict(refusal) for refusal in findings.refusals],
            "blocks": [block.linears for block in self.blocks],
            "embeddings": [
                {"name": w.name, "shape": w.shape, "tied": w.is_tied, "in_float": w.reason}
                for w in weights
                if w.kind == "embedding"
            ],
            "other_weights": [
                {"name": w.name, "kind": w.kind, "shape": w.shape, "reason": w.reason}
                for w in weights
                if not w.is_product and w.kind != "embedding"
            ],
            "attention": self.attentions
            and {
                "proven": len(self.attentions.proven),
                "refusals": [dataclasses.asdict(refusal) for refusal in self.attentions.refusals],
            },
            "notes": self.analysis.notes,
        }

    def _describe_attention(self) -> list[tuple[str, str]]:
        if self.attentions is None:
            return [("attention", "examined when it is exported: the graph is in half precision")]
        return describe_attention(f"{len(self.attentions.proven)} proven", self.attentions.refusals)

    def show(self) -> None:
        """Print tables in which the layers of a stack share a row."""
        findings, weights = self.analysis.findings, self.analysis.weights
        products = [weight for weight in weights if weight.is_product]
        chosen = [product for product in products if product.reason is None]
        kinds = {
            "linears": [w for w in products if w.is_linear],
            "experts": [w for w in products if w.kind == "experts"],
            "convolutions": [w for w in products if w.kind == "convolution"],
        }
        covered = sum(linear.name in findings.scaled for linear in chosen)
        tables = [weight for weight in weights if weight.kind == "embedding" and weight.reason is None]
        show_pairs(
            [
                ("model", self.model),
                *[
                    (kind, f"{len(found)}, {sum(weight.reason is None for weight in found)} to quantize")
                    for kind, found in kinds.items()
                    if found
                ],
                ("covered", f"{covered} of {len(chosen)} have columns that an equivalence scales"),
                ("equivalences", f"{len(findings.equivalences)} found" if findings.equivalences else "none found"),
                *[("embedding", f"{table.name.removesuffix('.weight')}, to quantize") for table in tables],
                *[("blocks", line) for line in _describe_blocks(self.blocks)],
                *self._describe_attention(),
                *[("note", note) for note in self.analysis.notes],
            ]
        )
        _show_table(
            "Equivalences: channels of the producer are divided by a scale, columns of the consumers multiplied",
            ("producer", "kind", "channels", "consumers"),
            collapse_layers(((e.producer, *e.linears), (e.kind, str(e.channels))) for e in findings.equivalences),
            lambda names, rest: (names[0], *rest, _relative(names)),
        )
        _show_table(
            "Quantized without an equivalence",
            ("weight", "shape"),
            collapse_layers(((line.name,), (_shape(line),)) for line in chosen if line.name not in findings.scaled),
            lambda names, rest: (names[0], *rest),
        )
        _show_table(
            "Left in float",
            ("weight", "shape", "reason"),
            collapse_layers(((weight.name,), (_shape(weight), weight.reason)) for weight in weights if weight.reason),
            lambda names, rest: (names[0], *rest),
        )
        reasons: dict[tuple[str, str], list[tuple[str, int]]] = {}
        for names, rest, count in collapse_layers(((r.producer,), (r.reason, r.kind)) for r in findings.refusals):
            reasons.setdefault(rest, []).append((names[0], count))
        _show_table(
            "Producers that cannot be scaled",
            ("producers", "kind", "reason"),
            [(tuple(name for name, _ in group), rest, sum(n for _, n in group)) for rest, group in reasons.items()],
            lambda names, rest: (names, rest[1], rest[0]),
        )


class Stopwatch:
    """Seconds of each stage."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, float]] = []
        self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """The time since the lap before belongs to `name`."""
        now = time.monotonic()
        self._laps.append((name, now - self._last))
        self._last = now

    def to_dict(self) -> dict[str, float]:
        """Seconds by stage."""
        return {name: round(seconds, 3) for name, seconds in self._laps}

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self._laps)
        return f"{sum(seconds for _, seconds in self._laps):.0f} s ({parts})"


def lines_of_input() -> Iterator[str]:
    """Lines of standard input that are not empty, asked for on a terminal. Raises InputError for what is no text."""
    if sys.stdin is None:  # closed
        return
    asks = sys.stdin.isatty()
    if asks:
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # editing and history of what `input` reads
    while True:
        try:
            line = input("> " if asks else "")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise InputError(f"standard input: {error.reason}; accepted is text in {error.encoding}") from error
        if line.strip():
            yield line


def describe_report(report: Report) -> list[tuple[str, str]]:
    """What a compilation did, as labelled lines."""
    quantized = report.quantized
    specs = [str(linear.spec) for linear in quantized]
    counts = ", ".join(f"{specs.count(spec)} {spec}" for spec in dict.fromkeys(specs))
    lines = [
        ("quantized", f"{', '.join(f'{count} {kind}' for kind, count in report.counts().items())}: {counts or 'none'}"),
        ("equivalences", report.describe_scales()),
    ]
    lines += [("embedding", _describe_table(table)) for table in report.embeddings if table.spec is not None]
    kept = (((weight.name,), (weight.reason,)) for weight in report.in_float)
    lines += [("in float", f"{names[0]}: {reason}") for names, (reason,), _ in collapse_layers(kept)]
    if report.blocks:
        lines.append(("block error", report.describe_errors()))
    if report.distillation is not None:
        loss = report.distillation
        lines.append(("model loss", f"{loss.before:.4g} → {loss.after:.4g} distilled"))
    return [*lines, *(("note", note) for note in report.notes)]


def describe_attention(count: str, refusals: Iterable[AttentionRefusal]) -> list[tuple[str, str]]:
    """How many attentions are one op each, and what is to be said of the others: one line for each reason."""
    lines = [count]
    nodes: dict[str, list[str]] = {}
    for refusal in refusals:
        nodes.setdefault(refusal.reason, []).append(refusal.node)
    lines += [f"{len(names)} ({names[0]}{' …' if len(names) > 1 else ''}): {why}" for why, names in nodes.items()]
    return [("attention", line) for line in lines]


def describe_estimate(estimate: Estimate) -> list[tuple[str, str]]:
    """What a run will take, as labelled lines: of the size from the start, of time and memory after the first block."""
    before, after = _megabytes(estimate.bytes_before), _megabytes(estimate.bytes_after)
    lines = [("size", f"{before} → about {after}, {estimate.bytes_before / estimate.bytes_after:.2f} times smaller")]
    lines += [("note", note) for note in estimate.notes]
    if estimate.seconds is not None and estimate.peak_bytes is not None:
        besides = ", distillation not counted" if estimate.without_distillation else ""
        lines.append(("time", f"about {_duration(estimate.seconds)}{besides}"))
        lines.append(("memory", f"about {_megabytes(estimate.peak_bytes)} at most"))
    return lines


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def describe_calibration(training: TrainingConfig | None, calibration: str | None) -> str:
    """What the codes were chosen for."""
    if training is None:
        return "none: weights are rounded to nearest"
    if calibration and recordings_in(calibration):
        return f"sound of {calibration}"
    source = f"text of {calibration}" if calibration else "text that the model wrote"
    return f"up to {training.samples} × {training.length} tokens, {source}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 1e8 else f"{count / 1e6:.3g} MB"


def show_pairs(pairs: Iterable[tuple[str, str]]) -> None:
    """Print labelled lines, the values aligned; a label that repeats is printed once."""
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    previous = ""
    for label, value in pairs:
        table.add_row("" if label == previous else label, escape(value))
        previous = label
    _print(table)


def path(name: object) -> str:
    """A path as standard output can say it: what it cannot is escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    return shown(name).encode(encoding, "backslashreplace").decode(encoding)


def print_json(content: Any) -> None:
    """Print `content` as indented JSON."""
    # Where standard output cannot say every character, JSON's own escapes can.
    takes_all = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    text = json.dumps(finite(content), indent=2, ensure_ascii=not takes_all)
    sys.stdout.write(text.encode("utf-8", "backslashreplace").decode() + "\n")


def describe_sizes(before: int, after: int, dtype: object) -> str:
    """Bytes of the float model in memory and of the exported directory, in megabytes of 10⁶."""
    kind = str(dtype).removeprefix("torch.")
    return f"{_megabytes(before)} in {kind} → {_megabytes(after)} on disk, {before / after:.2f} times smaller"


def show_table(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows of text under their headers, numbers on the right; nothing but the headers without rows."""
    rows = list(rows)
    numbers = [any(row[index].lstrip("-")[:1].isdigit() for row in rows) for index in range(len(headers))]
    table = _empty_table(zip(headers, numbers, strict=True))
    for row in rows:
        table.add_row(*map(escape, row))
    _print(table)


def _show_table(title: str, headers: Sequence[str], groups: Iterable[tuple[Any, Any, int]], row: Any) -> None:
    """Nothing without rows. A tuple in a row is a list: one line each on a terminal, else joined by commas."""
    console = _console()
    pretty = console.is_terminal
    table = _empty_table((header, header in ("channels", "count")) for header in (*headers, "count"))
    for names, rest, count in groups:
        cells = [
            ("\n" if pretty else ", ").join(cell) if isinstance(cell, tuple) else cell for cell in row(names, rest)
        ]
        table.add_row(*map(escape, cells), str(count))
    if table.row_count:
        console.print(f"\n[bold]{title}[/bold]" if pretty else f"\n{title}")
        _print(table)


def _empty_table(columns: Iterable[tuple[str, bool]]) -> Table:
    """Columns are given by their header, and whether they hold numbers."""
    pretty = _console().is_terminal
    table = Table(box=box.SIMPLE_HEAD if pretty else None, pad_edge=pretty, padding=(0, 1 if pretty else 2, 0, 0))
    for header, number in columns:
        table.add_column(header, justify="right" if number else "left", no_wrap=number, overflow="fold")
    return table


def _console() -> Console:
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_UNWRAPPED)


def _print(table: Table) -> None:
    console = _console()
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as capture:
        console.print(table)
    sys.stdout.write("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def _relative(names: Sequence[str]) -> tuple[str, ...]:
    """The names after the first; on a terminal, where room is scarce, without the prefix they share with it."""
    if not _console().is_terminal:
        return tuple(names[1:])
    first = names[0].split(".")
    short = []
    for name in names[1:]:
        parts = name.split(".")
        shared = _shared(parts, first)
        short.append(".".join(["…", *parts[shared:]] if shared else parts))
    return tuple(short)


def _shared(parts: Sequence[str], others: Sequence[str]) -> int:
    """How many parts are the same from the beginning on."""
    return len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(parts, others, strict=False))))


def _describe_table(table: WeightReport) -> str:
    sizes = f"{_megabytes(table.bytes_before)} → {_megabytes(table.bytes_after)}"
    tied = ", one with the vocabulary projection" if table.tied else ""
    return f"{table.name.removesuffix('.weight')}: {table.spec}, error {table.error:.1%}, {sizes}{tied}"


def _shape(weight: PlannedWeight) -> str:
    return "×".join(map(str, weight.shape))


def _describe_blocks(blocks: Sequence[Block]) -> list[str]:
    """Blocks with the same linears, layer numbers aside, in one line."""
    lines = []
    for names, _, count in collapse_layers((block.linears or ("no linears",), ()) for block in blocks):
        ends = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        lines.append(f"{count} × {len(names)} linears: {ends}" if len(names) > 1 else f"{count} × {ends}")
    return lines or ["none"]


def collapse_layers(rows: Iterable[tuple[tuple[str, ...], Any]]) -> list[tuple[tuple[str, ...], Any, int]]:
    """Rows (names, rest) that differ only in the numbers of their layers, as (names with ranges, rest, count).

    A number counts as a layer's where it ends a dotted prefix that a row's names share with the row's first name:
    `layers.0.norm, layers.0.q` and `layers.1.norm, layers.1.q` become `layers.0-1.norm, layers.0-1.q`, 2.
    """
    groups: dict[tuple[Any, ...], list[list[int]]] = {}
    for names, rest in rows:
        first = names[0].split(".")
        patterns, numbers = [], [int(part) for part in first if part.isdecimal()]
        for name in names:
            parts = name.split(".")
            shared = _shared(parts, first)
            patterns.append(
                tuple(part if not part.isdecimal() or at >= shared else None for at, part in enumerate(parts))
            )
        groups.setdefault((tuple(patterns), rest), []).append(numbers)
    result = []
    for (patterns, rest), found in groups.items():
        columns = [sorted(set(column)) for column in zip(*found, strict=True)]
        if math.prod(map(len, columns)) == len(found):
            result.append((_fill(patterns, [_ranges(column) for column in columns]), rest, len(found)))
        else:  # not every combination occurs
            result += [(_fill(patterns, [str(number) for number in numbers]), rest, 1) for numbers in found]
    return result


def _fill(patterns: Sequence[Sequence[str | None]], numbers: Sequence[str]) -> tuple[str, ...]:
    """Names of `patterns`, without their last part where it is `weight`, as every linear's is."""
    names = []
    for pattern in patterns:
        values = iter(numbers)
        names.append(".".join(next(values) if part is None else part for part in pattern).removesuffix(".weight"))
    return tuple(names)


def _ranges(numbers: Sequence[int]) -> str:
    """`0-3,5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
