"""The check as a Markdown file, and the section of kernels/README.md."""

from __future__ import annotations

from collections.abc import Sequence

from markdown_table import table_of

from gpu_checking.device import Device
from gpu_checking.running import Outcome, Step

FENCE = "````"


def page(device: Device, minutes: float, outcomes: Sequence[Outcome], waiting: Sequence[Step]) -> str:
    """All outcomes so far, in their order, and which steps still wait."""
    seconds = sum(outcome.seconds for outcome in outcomes)
    rows = [
        {
            "step": outcome.step.name,
            "outcome": _in_a_cell(_summary(outcome)),
            "seconds": f"{outcome.seconds:.0f}",
            "of at most": f"{outcome.limit:.0f}",
        }
        for outcome in outcomes
    ]
    rows += [{"step": step.name, "outcome": "not begun", "seconds": "", "of at most": ""} for step in waiting]
    head = [
        "# GPU check",
        f"{device}. {device.versions}.",
        f"{device.date}; {seconds:.0f} s of {minutes * 60:.0f}. One run, so without a spread. A step has its share of "
        "the time and of what those before it left; what is not finished then is ended.",
        table_of(rows),
    ]
    return "\n\n".join([*head, *map(_section, outcomes)]) + "\n"


def kernel_section(device: Device, outcome: Outcome) -> str:
    """What was measured of the kernels."""
    parts = [
        f"`tools/gpu_check` on {device}, {device.date}. {device.versions}.",
        outcome.step.method,
        outcome.step.table(outcome.rows),
    ]
    if outcome.how != "passed":
        parts.append(f"How it ended: {outcome.said}. What has no figure was not measured.")
    return "\n\n".join(parts)


def _summary(outcome: Outcome) -> str:
    """Of what passed without figures, the last line it printed tells more."""
    told = outcome.output[-1].strip("= ") if outcome.output and not outcome.rows else ""
    return f"passed: {told}" if outcome.how == "passed" and told else outcome.said


def _section(outcome: Outcome) -> str:
    parts = [f"## {outcome.step.name}: {outcome.said}", outcome.step.method]
    if outcome.rows:
        parts.append(outcome.step.table(outcome.rows))
    if not outcome.is_good:
        parts.append(_fenced(outcome.output))
    return "\n\n".join(parts)


def _fenced(lines: Sequence[str]) -> str:
    shown = [line.replace(FENCE, "'" * len(FENCE)) for line in lines] or ["(it printed nothing)"]
    return "\n".join([FENCE, *shown, FENCE])


def _in_a_cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())
