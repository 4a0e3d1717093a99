"""What was found of all classes, as a page of Markdown."""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

EXACT, EQUAL = 1e-4, 1e-4
"""Largest differences of what counts as exact after folding, and as equal in onnxruntime."""

INTRODUCTION = """\
# Coverage
A class of transformers for each model type, with the head of its main task, built tiny and random by
`tools/coverage_table.py`, captured without example inputs, and quantized to 4 bits in groups of 16. *Exact*: the
largest difference of its float outputs after scales from 0.1 to 10 are folded into every equivalence. *ONNX*: the
largest difference between onnxruntime at `accuracy_level=1` and the quantized graph; of decoders in steps over their
cache. Both are relative to the largest value; up to 1e-4 counts as exact and equal. *Cache*: of what generates token
after token; where a text *looks ahead*, each token changes what the model gives for those before it: nothing of them
could be kept.
"""


def page(rows: Sequence[dict[str, Any]], count: int) -> str:
    """Totals, the table of what was captured, and the reasons for all else; there are `count` classes."""
    ours = [row for row in rows if row["stage"] != "build"]
    captured = [row for row in ours if row.get("captured")]
    parts = [INTRODUCTION, _totals(rows, count, ours, captured)]
    parts.append(
        "## Captured\n| class | task | quantized | equivalences | exact | ONNX | cache |\n|---|---|---|---|---|---|---|"
    )
    parts += [_line(row) for row in sorted(captured, key=lambda row: row["class"].lower())]
    for title, found in (
        ("Refused", [row for row in ours if not row.get("captured")]),
        ("Not built", [row for row in rows if row["stage"] == "build"]),
    ):
        parts.append(f"\n## {title}\n| class | task | why |\n|---|---|---|")
        parts += [
            f"| {row['class']} | {row['task']} | {why(row)} |"
            for row in sorted(found, key=lambda r: r["class"].lower())
        ]
    return "\n".join(parts) + "\n"


def _totals(
    rows: Sequence[dict[str, Any]], count: int, ours: Sequence[dict[str, Any]], captured: Sequence[dict[str, Any]]
) -> str:
    good = [row for row in captured if is_good(row)]
    exported = [row for row in captured if row["stage"] == "done" and row.get("can_generate")]
    exported = [row for row in exported if not row.get("looks_ahead")]
    cached = [row for row in exported if row["cache"]]
    stages = collections.Counter(row["stage"] for row in captured if row["stage"] != "done")
    lines = [
        f"{len(rows)} of {count} classes were tried, in no order; {len(ours)} of them the tool could build.",
        f"- captured: {_share(len(captured), len(ours))}",
        f"- of these exact and equal in onnxruntime: {_share(len(good), len(captured))}",
        f"- that generate token after token, of those exported, with a cache: {_share(len(cached), len(exported))}",
        f"- ended by an exception that is none of ours: {_share(sum('bare' in row for row in ours), len(ours))}",
        f"- stopped, out of time or memory: {_share(sum('stopped' in row for row in ours), len(ours))}",
    ]
    if stages:
        lines.append(
            f"- captured, and ended in: {', '.join(f'{stage} {count}' for stage, count in stages.most_common())}"
        )
    return "\n".join(lines) + "\n"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole}" + (f" ({part / whole:.0%})" if whole else "")


def is_good(row: dict[str, Any]) -> bool:
    """Whether its values are what they should be, to the end."""
    return row["stage"] == "done" and row["exact"] <= EXACT and row["onnx"] <= EQUAL and row.get("steps", 0) <= EQUAL


def _line(row: dict[str, Any]) -> str:
    figures = [f"{row[name]:.0e}" if name in row else "" for name in ("exact", "onnx")]
    if row["stage"] != "done":
        figures[1] = f"{row['stage']}: {why(row)}"
    kept = "yes" if row["cache"] else "looks ahead" if row.get("looks_ahead") else "no"
    cache = kept if row.get("can_generate") else ""
    counts = f"{row['quantized']} of {row['weights']} | {row['equivalences']}"
    return f"| {row['class']} | {row['task']} | {counts} | {' | '.join(figures)} | {cache} |"


def why(row: dict[str, Any]) -> str:
    """Why a class is not done, short enough for a table."""
    reason = next((row[name] for name in ("refused", "bare", "stopped", "not built") if name in row), "")
    kind = "**not ours:** " if "bare" in row else ""
    text = kind + " ".join(str(reason).split()).replace("|", "\\|")
    return text if len(text) <= 200 else f"{text[:199]}…"
