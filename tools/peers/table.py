"""The Markdown table and the plot of measured rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from peers.methods import METHODS

Row = Mapping[str, Any]
Column = tuple[str, str, str, float]
"""Head, field of a row, format, and the unit it is given in."""

LANGUAGE_MODEL: tuple[Column, ...] = (
    ("perplexity", "perplexity", ".2f", 1.0),
    ("KL", "kl_divergence", ".4f", 1.0),
    ("top-1 agreement", "top1_agreement", ".1%", 1.0),
)
ENCODER: tuple[Column, ...] = (
    ("1 − cosine, mean", "cosine_distance", ".6f", 1.0),
    ("largest", "largest_distance", ".6f", 1.0),
    ("same neighbour", "neighbour_agreement", ".1%", 1.0),
)
COST: tuple[Column, ...] = (
    ("seconds", "seconds", ".1f", 1.0),
    ("peak MB", "peak_bytes", ".0f", 1e6),
    ("bytes MB", "stored_bytes", ".2f", 1e6),
)


def columns_of(settings: Mapping[str, Any]) -> tuple[Column, ...]:
    return (*(ENCODER if settings["is_encoder"] else LANGUAGE_MODEL), *COST)


def line(row: Row, columns: Iterable[Column]) -> str:
    """One line of the table; of a method that failed its error."""
    error = row.get("error")
    notes = [f"error: {error}"] if error else row.get("notes", [])
    figures = (_number(row.get(field), format_spec, unit) for _, field, format_spec, unit in columns)
    cells = [METHODS[row["method"]].label, *figures, "; ".join(notes).replace("|", "\\|")]
    return f"| {' | '.join(cells)} |"


def table(rows: Iterable[Row], columns: Iterable[Column]) -> str:
    heads = ["method", *(head for head, *_ in columns), "note"]
    lines = [line(row, columns) for row in rows]
    return "\n".join([f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *lines])


def _number(value: float | None, format_spec: str, unit: float = 1.0) -> str:
    if value is None:
        return ""
    return format(value / unit, format_spec if abs(value / unit) < 1e5 else ".1e")


def document(settings: Mapping[str, Any], rows: Iterable[Row]) -> str:
    """The whole Markdown file."""
    s = settings
    samples, length = s["calibration_shape"]
    if s["is_encoder"]:
        measured = (
            f"Embeddings are the mean of the last hidden states of each sentence in the first {s['tokens']} tokens of "
            f"`{s['test']}`; their cosine with the float model's, and how often the nearest other sentence is the same."
        )
    else:
        measured = (
            f"Vocabulary projection in float. Perplexity on the first {s['tokens']} tokens of `{s['test']}` in windows "
            f"of {s['context']} that do not overlap; KL and top-1 agreement with the float model at the same positions."
        )
    head = (
        f"`{s['model']}`, W{s['bits']}g{s['group_size']} asymmetric. {measured} Calibration: the same {samples} × "
        f"{length} tokens of `{s['calibration']}` for all; {s['iters']} iterations of batch {s['batch_size']}, seed "
        f"{s['seed']}, where a method iterates and its preset says nothing else. auto-round and ours on {s['device']}."
    )
    rules = (
        "Seconds: from the loaded model and the calibration tokens to codes. Peak: the largest resident memory of the "
        "method's process until then, loading included. Bytes: one formula for all: codes, a 16-bit scale and a zero "
        "point (of as many bits as codes, where the note says nothing else) per group, everything else in float32."
    )
    return "\n\n".join([head, rules, table(rows, columns_of(settings))]) + "\n"


def plot(rows: Iterable[Row], path: Path, settings: Mapping[str, Any]) -> bool:
    """The first figure of the table against seconds, on logarithmic axes; False where matplotlib is not installed.

    Points are numbered, the legend names them. Figures above ten times the least are named, but not drawn.
    """
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    good = [row for row in rows if not row.get("error")]
    head, field, format_spec, _ = columns_of(settings)[0]
    limit = 10 * min((row[field] for row in good if "seconds" in row), default=1.0)
    figure, axes = pyplot.subplots(figsize=(10, 5.5))
    for number, row in enumerate(good, start=1):
        label, value = METHODS[row["method"]].label, row[field]
        if "seconds" not in row:
            if value > 0:
                axes.axhline(value, color="gray", linestyle="--", label=label)
        elif value > limit:
            axes.plot([], [], " ", label=f"{label}: {_number(value, format_spec)}, not drawn")
        else:
            color = "tab:red" if label.startswith("ours") else "tab:blue"
            axes.scatter(row["seconds"], value, color=color, label=f"{number}  {label}", zorder=3)
            offset = dict(xytext=(4, 4), textcoords="offset points")
            axes.annotate(str(number), (row["seconds"], value), fontsize=9, **offset)
    axes.set(xscale="log", yscale="log", xlabel="seconds to quantize", ylabel=head)
    axes.grid(visible=True, which="both", alpha=0.3)
    if good:
        axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)
    return True
