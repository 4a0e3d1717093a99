"""The Markdown table and the plot of measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peers.methods import METHODS

Row = Mapping[str, Any]
COLUMNS = ("method", "perplexity", "KL", "top-1 agreement", "seconds", "peak MB", "bytes MB", "note")


def line(row: Row) -> str:
    """One line of the table; of a method that failed its error."""
    error = row.get("error")
    notes = [f"error: {error}"] if error else row.get("notes", [])
    cells = [
        METHODS[row["method"]].label,
        _number(row.get("perplexity"), ".2f"),
        _number(row.get("kl_divergence"), ".4f"),
        _number(row.get("top1_agreement"), ".1%"),
        _number(row.get("seconds"), ".1f"),
        _number(row.get("peak_bytes"), ".0f", 1e6),
        _number(row.get("stored_bytes"), ".2f", 1e6),
        "; ".join(notes).replace("|", "\\|"),
    ]
    return f"| {' | '.join(cells)} |"


def table(rows: Iterable[Row]) -> str:
    return "\n".join([f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS), *map(line, rows)])


def _number(value: float | None, format_spec: str, unit: float = 1.0) -> str:
    if value is None:
        return ""
    return format(value / unit, format_spec if abs(value / unit) < 1e5 else ".1e")


def document(settings: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """The whole Markdown file."""
    s = settings
    samples, length = s["calibration_shape"]
    head = (
        f"`{s['model']}`, W{s['bits']}g{s['group_size']} asymmetric, vocabulary projection in float. Perplexity on the "
        f"first {s['tokens']} tokens of `{s['test']}` in windows of {s['context']} that do not overlap; KL and top-1 "
        f"agreement with the float model at the same positions. Calibration: the same {samples} × {length} tokens of "
        f"`{s['calibration']}` for all; {s['iters']} iterations of batch {s['batch_size']}, seed {s['seed']}, where a "
        "method iterates and its preset says nothing else."
    )
    rules = (
        "Seconds: from the loaded model and the calibration tokens to codes. Peak: the largest resident memory of the "
        "method's process until then, loading included. Bytes: one formula for all: codes, a 16-bit scale and a zero "
        "point (of as many bits as codes, where the note says nothing else) per group, everything else in float32."
    )
    return "\n\n".join([head, rules, table(rows)]) + "\n"


def plot(rows: Iterable[Row], path: Path) -> bool:
    """Perplexity against seconds, on logarithmic axes; False where matplotlib is not installed.

    Points are numbered, the legend names them. Perplexities above ten times the least are named, but not drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [row for row in rows if not row.get("error")]
    limit = 10 * min((row["perplexity"] for row in good), default=1.0)
    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    for number, row in enumerate(good, start=1):
        label, value = METHODS[row["method"]].label, row["perplexity"]
        if "seconds" not in row:
            axes.axhline(value, color="gray", linestyle="--", label=label)
        elif value > limit:
            axes.plot([], [], " ", label=f"{label}: {_number(value, '.0f')}, not drawn")
        else:
            color = "tab:red" if label.startswith("ours") else "tab:blue"
            axes.scatter(row["seconds"], value, color=color, label=f"{number}  {label}", zorder=3)
            offset = dict(xytext=(4, 4), textcoords="offset points")
            axes.annotate(str(number), (row["seconds"], value), fontsize=9, **offset)
    axes.set(xscale="log", yscale="log", xlabel="seconds to quantize", ylabel="perplexity")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return True
