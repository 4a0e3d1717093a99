"""The picture of README's measured part, drawn from the first table of docs/measurements.md.

python tools/plot_measurements.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
from markdown_table import read_table
from matplotlib import pyplot

DOCUMENTS = Path(__file__).resolve().parents[1] / "docs"
# Legible on white and on black.
TEXT, OURS, OTHERS = "#7d8590", "#3a86d9", "#a9b1ba"


def divergences(rows: list[list[str]], column: int) -> list[tuple[str, float]]:
    """Method and KL divergence, the largest first, where a cell is `perplexity / KL`."""
    found = [(row[0], float(row[column].partition("/")[2])) for row in rows if "/" in row[column]]
    return sorted(found, key=lambda pair: -pair[1])


def main() -> None:
    header, *rows = read_table(DOCUMENTS / "measurements.md", "compare_peers")
    mpl.rcParams.update({"text.color": TEXT, "axes.labelcolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT})
    mpl.rcParams.update({"svg.hashsalt": "teq_graph", "font.size": 9})
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 2.2), layout="constrained")
    for axis, column in zip(axes, (1, 2, 3), strict=True):
        pairs = divergences(rows, column)
        names, values = zip(*pairs, strict=True)
        bars = axis.barh(names, values, color=[OURS if name.startswith("ours") else OTHERS for name in names])
        axis.bar_label(bars, fmt="{:.3g}", padding=3)
        axis.set_title(header[column], color=TEXT, fontsize=10)
        axis.set_xlim(0, 1.15 * max(values))
        axis.set_xticks([])
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.tick_params(length=0)
    figure.supxlabel("KL divergence from the float model, nats: less is better", fontsize=9, color=TEXT)
    figure.savefig(DOCUMENTS / "measurements.svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    main()
