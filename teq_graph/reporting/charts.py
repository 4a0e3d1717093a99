"""Where the lines and boxes of a chart lie: pixels of a small SVG, which the templates draw."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

WIDTH, HEIGHT = 340, 190
LEFT, RIGHT, TOP, BOTTOM = 46, WIDTH - 8, 8, HEIGHT - 34

Point = tuple[float, float]

_FEW = 12
"""Points that are drawn as dots besides."""

_LEAST_MARGIN = 0.05
"""Of logarithms, so that noise is not blown up."""

_LARGEST_POWER = 100
"""Of 2, beyond which a scale is none that was learned."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve: the number of its colour, a path, and dots where there are few."""

    style: int
    path: str
    dots: tuple[Point, ...]
    title: str


@dataclasses.dataclass(frozen=True)
class Box:
    """A distribution at `x`: from top to bottom its largest, 95 %, 75 %, median, 25 %, 5 % and least."""

    x: float
    width: float
    tops: tuple[float, ...]
    title: str


@dataclasses.dataclass(frozen=True)
class Chart:
    """What one SVG shows; ticks are positions and labels. `base` is where nothing changes."""

    title: str
    x_label: str
    y_label: str
    x_ticks: Sequence[tuple[float, str]]
    y_ticks: Sequence[tuple[float, str]]
    lines: Sequence[Line] = ()
    boxes: Sequence[Box] = ()
    base: float | None = None
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = RIGHT
    top: int = TOP
    bottom: int = BOTTOM


@dataclasses.dataclass(frozen=True)
class Axis:
    """Values from `low` to `high` onto pixels from `start` to `end`."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return round(self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start), 1)


@dataclasses.dataclass(frozen=True)
class Series:
    """Values over x; `style` is the number of a colour. What a logarithmic axis cannot show leaves a gap."""

    title: str
    style: int
    points: Sequence[Point]


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str) -> Chart | None:
    """Positive values on a logarithmic axis; None where there is none to show."""
    shown = [point for one in series for point in one.points if _is_positive(point[1])]
    if not shown:
        return None
    y = _padded([math.log10(value) for _, value in shown], 0.1)
    x = _horizontal([place for place, _ in shown])
    lines = [
        Line(one.style, _path(one.points, x, y), _dots(one.points, x, y), one.title)
        for one in series
        if any(_is_positive(value) for _, value in one.points)
    ]
    ticks = [(y(math.log10(value)), f"{value:.6g}") for value in _decimals(10**y.low, 10**y.high)]
    return Chart(title, x_label, y_label, _whole(x), ticks, lines)


def box_chart(title: str, quantiles: Mapping[int, Sequence[float]], x_label: str, y_label: str) -> Chart | None:
    """Distributions of logarithms to base 2 over depth, with the factors that they stand for at the axis.

    quantiles: depth -> those at `report.SHARES`.
    """
    found = {
        depth: values
        for depth, values in quantiles.items()
        if len(values) == 9 and all(abs(value) < _LARGEST_POWER for value in values)
    }
    if not found:
        return None
    x = _horizontal(list(found))
    y = _padded([value for values in found.values() for value in values] + [0.0], 0.1)
    width = round(min(18.0, 0.7 * (RIGHT - LEFT) / max(1.0, x.high - x.low)), 1)
    boxes = [
        Box(
            x(depth),
            width,
            tuple(y(values[index]) for index in (8, 6, 5, 4, 3, 2, 0)),
            f"block {depth}: {_range(values, 0)}, half of it {_range(values, 3)}",
        )
        for depth, values in found.items()
    ]
    ticks = [(y(math.log2(factor)), f"{factor:.3g}") for factor in _factors(2**y.low, 2**y.high)]
    return Chart(title, x_label, y_label, _whole(x), ticks, boxes=boxes, base=y(0.0))


def _range(quantiles: Sequence[float], index: int) -> str:
    """Between a quantile and the one as far from the other end."""
    return f"× {2 ** quantiles[index]:.3g} to {2 ** quantiles[-1 - index]:.3g}"


def _is_positive(value: float) -> bool:
    return 1e-30 < value < 1e30


def _horizontal(places: Sequence[float]) -> Axis:
    return Axis(min(places) - 0.5, max(places) + 0.5, LEFT, RIGHT)


def _padded(values: Sequence[float], share: float) -> Axis:
    low, high = min(values), max(values)
    margin = max(share * (high - low), _LEAST_MARGIN)
    return Axis(low - margin, high + margin, BOTTOM, TOP)


def _path(points: Iterable[Point], x: Axis, y: Axis) -> str:
    parts, pen = [], "M"
    for place, value in points:
        if _is_positive(value):
            parts.append(f"{pen}{x(place):g} {y(math.log10(value)):g}")
            pen = "L"
        else:
            pen = "M"
    return "".join(parts)


def _dots(points: Sequence[Point], x: Axis, y: Axis) -> tuple[Point, ...]:
    if len(points) > _FEW:
        return ()
    return tuple((x(place), y(math.log10(value))) for place, value in points if _is_positive(value))


def _whole(x: Axis) -> list[tuple[float, str]]:
    return [(x(place), f"{place:g}") for place in _steps(x.low, x.high, 6) if place == round(place)]


def _steps(low: float, high: float, most: int) -> list[float]:
    """Round numbers between, `most` or a few less of them."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _factors(low: float, high: float) -> list[float]:
    """Round factors between: powers of two over a wide range, else equally far apart."""
    if high / low < 4:
        return [value for value in _steps(low, high, 6) if value > 0]
    return [2.0**power for power in _steps(math.log2(low), math.log2(high), 6) if power == round(power)]


def _decimals(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten between; over a wide range the powers alone."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 3 else (1,)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in values if low <= value <= high] or [math.sqrt(low * high)]
