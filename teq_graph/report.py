"""What a compilation did: which scales moved, which weights were quantized and how well, which were not and why."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import operator
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from teq_graph.analysis.equivalences import Equivalence, ProducerKind, Refusal
from teq_graph.analysis.weights import WeightKind
from teq_graph.config import WeightSpec
from teq_graph.quantization import QuantizedWeight
from teq_graph.weight_plan import PlannedWeight

REPORT_FILE = "report.json"
"""Beside a saved graph, and in an exported directory."""

ROUNDED = "rounded to nearest"
"""What errors before every stage are called."""

SHARES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
"""Of the channels, whose quantiles tell how scales are distributed."""

FEW_ROWS = 16
"""Of the calibration data. An expert that has fewer goes by what all experts of its weight read, more than by those."""

_POINTS = 100
"""Of a training curve at most."""


@dataclasses.dataclass(frozen=True)
class Curve:
    """The losses of `steps` training steps. Each of `losses` is the mean of steps that follow each other."""

    steps: int
    losses: tuple[float, ...]

    @classmethod
    def of(cls, losses: Sequence[float]) -> Curve:
        """Of one loss a step, thinned where they are many."""
        points = min(_POINTS, len(losses))
        edges = [len(losses) * point // points for point in range(points + 1)] if points else []
        return cls(len(losses), tuple(sum(losses[a:b]) / (b - a) for a, b in itertools.pairwise(edges)))


@dataclasses.dataclass(frozen=True)
class SiteReport:
    """One equivalence. Where its scale was trained: the range of the scale, and its spread, the standard deviation
    of log2; 0 where training went back to ones. `trained` is False where the scale was left out of training.

    `consumers` names the weights whose columns it multiplies. `quantiles` are those of log2 of a trained scale, at
    `SHARES` of its channels.
    """

    producer: str
    kind: ProducerKind
    channels: int
    trained: bool = False
    smallest: float = 1.0
    largest: float = 1.0
    spread: float = 0.0
    consumers: tuple[str, ...] = ()
    quantiles: tuple[float, ...] = ()

    @property
    def folded(self) -> bool:
        """Whether a scale other than ones was folded into the weights."""
        return self.smallest != 1.0 or self.largest != 1.0


@dataclasses.dataclass(frozen=True)
class WeightErrors:
    """How well a weight was quantized.

    weight: ‖dequantized − float‖ / ‖float‖, scales included. stages: squared relative error of the product's output
    after each stage, `ROUNDED` first, for inputs as the float model has them. experts: as `weight`, of each expert's
    matrix by itself; rows: how many rows of all calibration data it had.
    """

    weight: float
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    experts: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class WeightReport:
    """One weight of the graph. `spec` is None where it stays in float, for the `reason` given.

    `scaled`: an equivalence scales some of its columns. `tied`: an embedding table that a linear reads, too. `error` is
    ‖dequantized − float‖ / ‖float‖ of the weight as it was quantized, scales included. `stages` holds, where codes were
    chosen on calibration data, the squared relative error of the linear's output after each stage, `ROUNDED` first, for
    inputs as the float model has them. Of a weight that holds the matrices of several experts, `experts` has the error
    of each, and `rows` how many rows of the calibration data chose it.
    """

    name: str
    kind: WeightKind
    shape: tuple[int, ...]
    spec: WeightSpec | None
    reason: str | None = None
    scaled: bool = False
    tied: bool = False
    error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    experts: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """Relative output error of a block (or the whole model's loss), rounded to nearest, after each stage, and as it
    was kept: the least of them."""

    linears: tuple[str, ...]
    before: float
    after: float
    stages: dict[str, float] = dataclasses.field(default_factory=dict)
    """Stage -> error after it, in the order in which they ran."""
    curves: dict[str, Curve] = dataclasses.field(default_factory=dict)
    """Stage that trains -> its losses."""


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """The whole compilation. `bytes_before` and `bytes_after` count every tensor of the graph, each once.

    `sites` are the equivalences found, `refusals` the producers that have none; `weights` all weights of products and
    lookups; `distillation` the whole model's loss where it was distilled; `notes` say what else a user should know;
    `settings` are what was asked for, as plain data. `graph` names the linears of each block of the graph, in order.
    """

    weights: tuple[WeightReport, ...]
    sites: tuple[SiteReport, ...] = ()
    refusals: tuple[Refusal, ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    distillation: BlockReport | None = None
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    graph: tuple[tuple[str, ...], ...] = ()

    @property
    def linears(self) -> tuple[WeightReport, ...]:
        """The weights that linears read."""
        return tuple(weight for weight in self.weights if weight.kind == "linear" or weight.tied)

    @property
    def experts(self) -> tuple[WeightReport, ...]:
        """The weights that hold the matrices of several experts, one after the other: [experts * N, K]."""
        return tuple(weight for weight in self.weights if weight.kind == "experts")

    @property
    def convolutions(self) -> tuple[WeightReport, ...]:
        """The weights that convolutions read, as matrices [N, K] over the K numbers of a window."""
        return tuple(weight for weight in self.weights if weight.kind == "convolution")

    @property
    def products(self) -> tuple[WeightReport, ...]:
        """The weights that linears, experts and convolutions read."""
        return (*self.linears, *self.experts, *self.convolutions)

    @property
    def embeddings(self) -> tuple[WeightReport, ...]:
        """The tables of embeddings."""
        return tuple(weight for weight in self.weights if weight.kind == "embedding")

    @property
    def quantized(self) -> tuple[WeightReport, ...]:
        """The weights of linears, experts and convolutions that were quantized."""
        return tuple(weight for weight in self.products if weight.spec is not None)

    @property
    def in_float(self) -> tuple[WeightReport, ...]:
        """What was not quantized, each with its `reason`."""
        return tuple(weight for weight in self.weights if weight.spec is None)

    @property
    def covered(self) -> int:
        """How many of `products` have at least one equivalence that scales their columns."""
        return sum(weight.scaled for weight in self.products)

    def counts(self) -> dict[str, str]:
        """How many of the weights of each kind that there is are quantized, as in `30 of 31`."""
        kinds = {"linears": self.linears, "experts": self.experts, "convolutions": self.convolutions}
        return {
            kind: f"{sum(weight.spec is not None for weight in weights)} of {len(weights)}"
            for kind, weights in kinds.items()
            if weights
        }

    def describe_scales(self) -> str:
        """What became of the equivalences, as in `120 found, 118 trained, 110 folded in: scales 0.4 to 3.1, …`."""
        if not self.sites:
            return "none found"
        trained = [site for site in self.sites if site.trained]
        if not trained:
            return f"{len(self.sites)} found, no scales trained (the stage teq trains them)"
        folded = [site for site in trained if site.folded]
        text = f"{len(self.sites)} found, {len(trained)} trained, {len(folded)} folded in"
        if not folded:
            return f"{text}: ones were better"
        smallest, largest = min(site.smallest for site in folded), max(site.largest for site in folded)
        spread = 2 ** (sum(site.spread for site in folded) / len(folded))
        return f"{text}: scales {smallest:.3g} to {largest:.3g}, within a site typically × or ÷ {spread:.3g}"

    def describe_errors(self) -> str:
        """Mean error of the blocks: rounded to nearest, after each stage, and as they were kept."""
        count = len(self.blocks)
        sums: dict[str, float] = collections.defaultdict(float)
        for block in self.blocks:
            sums[ROUNDED] += block.before / count
            # A stage that a block went without changed nothing there.
            error = block.before
            for stage in dict.fromkeys(stage for other in self.blocks for stage in other.stages):
                error = block.stages.get(stage, error)
                sums[stage] += error / count
            sums["as kept"] += block.after / count
        where = f"mean of {count} blocks" if count > 1 else "one block"
        return " → ".join(f"{error:.4g} {stage}" for stage, error in sums.items()) + f" ({where})"

    def describe_bits(self) -> str:
        """Bits of the quantized weights, as in `3.29 on average: 12 × 2, 100 × 3`."""
        bits = [linear.spec.bits for linear in self.quantized if linear.spec]
        sizes = [math.prod(linear.shape) for linear in self.quantized]
        average = sum(map(operator.mul, bits, sizes)) / max(1, sum(sizes))
        return f"{average:.3g} on average: {', '.join(f'{bits.count(b)} × {b}' for b in sorted(set(bits)))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        data: dict[str, Any] = _schema().dump_python(self, mode="json")
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_dict`; raises ValueError where the data are those of no report."""
        report: Report = _schema().validate_python(data)
        return report

    def summary(self) -> str:
        """The whole in a few words, as in `210 linears at W4g128, 120 equivalences, 87 MB`."""
        counts = collections.Counter(str(linear.spec) for linear in self.quantized)
        specs = [spec for spec, _ in counts.most_common(3)]
        at = f" at {', '.join(specs)}{' …' if len(counts) > 3 else ''}" if specs else ""
        size = f"{self.bytes_after / 1e6:,.0f} MB" if self.bytes_after >= 1e7 else f"{self.bytes_after / 1e3:,.0f} kB"
        kinds = (("linear", self.linears), ("weight of experts", self.experts), ("convolution", self.convolutions))
        counted_kinds = [counted(sum(w.spec is not None for w in weights), kind) for kind, weights in kinds if weights]
        return f"{' and '.join(counted_kinds) or '0 linears'}{at}, {counted(len(self.sites), 'equivalence')}, {size}"

    def __repr__(self) -> str:
        return f"Report({self.summary()})"

    def _repr_html_(self) -> str:
        """For notebooks: what `to_html` gives."""
        return self.to_html()

    def to_html(self, title: str = "Report") -> str:
        """A fragment of HTML that needs nothing else: `title`, the lines of `str`, the blocks' errors, and a table of
        the weights."""
        from teq_graph.reporting.page import render_fragment

        return render_fragment(self, title, self._lines())

    def __str__(self) -> str:
        return "\n".join(f"{label:<14}{value}" for label, value in self._lines())

    def _describe_experts(self) -> Iterator[str]:
        """How far the errors of experts are apart, and how many of them few tokens chose."""
        errors = [error for weight in self.experts if weight.spec for error in weight.experts]
        if errors:
            most = max(len(weight.experts) for weight in self.experts)
            yield f"{most} a weight, errors {min(errors):.1%} to {max(errors):.1%}"
        rows = [count for weight in self.experts for count in weight.rows]
        few = sum(count < FEW_ROWS for count in rows)
        if few:
            yield (
                f"{few} of {len(rows)} matrices had fewer than {FEW_ROWS} rows of the calibration data: their codes go "
                "by what all experts read"
            )

    def _lines(self) -> list[tuple[str, str]]:
        lines = [
            *((kind, f"{count} quantized") for kind, count in self.counts().items()),
            ("equivalences", self.describe_scales()),
        ]
        if len({linear.spec.bits for linear in self.quantized if linear.spec}) > 1:
            lines.append(("bits", self.describe_bits()))
        for table in self.embeddings:
            if table.spec is not None:
                tied = ", one with the vocabulary projection" if table.tied else ""
                lines.append(("embedding", f"{table.name}: {table.spec}, error {table.error:.1%}{tied}"))
        lines += [("experts", line) for line in self._describe_experts()]
        if self.blocks:
            lines.append(("block error", self.describe_errors()))
        if self.distillation is not None:
            lines.append(("model loss", f"{self.distillation.before:.4g} → {self.distillation.after:.4g} distilled"))
        for reason in dict.fromkeys(weight.reason for weight in self.in_float):
            names = [weight.name for weight in self.in_float if weight.reason == reason]
            lines.append(("in float", f"{', '.join(names[:3])}{' …' if len(names) > 3 else ''}: {reason}"))
        ratio = self.bytes_after / max(1, self.bytes_before)
        lines.append(("bytes", f"{self.bytes_before:,} → {self.bytes_after:,} ({ratio:.1%})"))
        lines.append(("time", f"{self.seconds:.1f} s"))
        return lines + [("note", note) for note in self.notes]


def counted(count: int, noun: str) -> str:
    """As in `1 linear`, `2 linears` and `2 weights of experts`."""
    first, *rest = noun.split(" ")
    return " ".join([str(count), f"{first}{'' if count == 1 else 's'}", *rest])


def _schema() -> Any:
    import pydantic

    return pydantic.TypeAdapter(Report)


def report_sites(equivalences: Iterable[Equivalence]) -> tuple[SiteReport, ...]:
    """What became of each equivalence."""
    return tuple(_report_site(equivalence) for equivalence in equivalences)


def _report_site(site: Equivalence) -> SiteReport:
    report = SiteReport(site.producer, site.kind, site.channels, consumers=site.linears)
    if site.scale is None:
        return report
    scale = site.scale.detach().float().cpu()
    quantiles = np.quantile(scale.log2().numpy(), SHARES)
    return dataclasses.replace(
        report,
        trained=True,
        smallest=float(scale.min()),
        largest=float(scale.max()),
        spread=float(scale.log2().std(correction=0)),
        quantiles=tuple(round(float(value), 4) for value in quantiles),
    )


def report_weights(
    plan: Iterable[PlannedWeight],
    scaled: Collection[str],
    floats: Mapping[str, Tensor],
    stored: Mapping[str, QuantizedWeight],
    errors: Mapping[str, WeightErrors],
) -> tuple[WeightReport, ...]:
    """Errors and sizes of the planned weights: `floats` as they were, `stored` as they are kept, and their `errors`
    where these are known already, by name."""
    return tuple(_report_weight(weight, weight.name in scaled, floats[weight.name], stored, errors) for weight in plan)


def _report_weight(
    weight: PlannedWeight,
    scaled: bool,
    original: Tensor,
    stored: Mapping[str, QuantizedWeight],
    errors: Mapping[str, WeightErrors],
) -> WeightReport:
    size = original.numel() * original.element_size()
    report = WeightReport(
        weight.name, weight.kind, weight.shape, weight.spec, weight.reason, scaled, weight.is_tied, None, size, size
    )
    if weight.spec is None:
        return report
    kept = stored[weight.name]
    found = errors.get(weight.name) or errors_of(kept, original, weight.experts)
    return dataclasses.replace(
        report,
        error=found.weight,
        bytes_after=kept.nbytes,
        stages=found.stages,
        experts=found.experts,
        rows=found.rows,
    )


def errors_of(kept: QuantizedWeight, weight: Tensor, experts: int = 0) -> WeightErrors:
    """What `kept` is off by, as a whole and for each of several experts."""
    with torch.no_grad():
        wanted = weight.float()
        lost = kept.dequantize().to(wanted.device) - wanted

        def relative(lost: Tensor, wanted: Tensor) -> float:
            return float(lost.norm() / wanted.norm().clamp(min=1e-30))

        parts = zip(lost.chunk(experts), wanted.chunk(experts), strict=True) if experts else ()
        return WeightErrors(relative(lost, wanted), experts=tuple(relative(*part) for part in parts))
