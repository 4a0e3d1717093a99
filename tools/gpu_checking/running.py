"""A step of the check in a process of its own, which is ended with all that it started when its time is over."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import json_lines
from markdown_table import table_of

ROOT = Path(__file__).resolve().parents[2]
FIGURES, SECONDS = "FIGURES", "SECONDS"
"""Stand in a command for the file that its figures go to, as JSON lines, and for the seconds that it has."""
LINES, WIDTH = 30, 300
"""Of the output that is kept."""
SHORTEST = 1.0
"""Seconds; a step with less is not begun."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PIP_NO_INDEX": "1"}
Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Step:
    """A part of the check: a command, run from the root of the checkout.

    `share` is its part of the time, beside those of the others. `missing` gives the reason why it cannot be run, None
    where it can. `table` makes Markdown of its figures.
    """

    name: str
    share: float
    command: tuple[str, ...]
    method: str
    missing: Callable[[], str | None] = lambda: None
    table: Callable[[Rows], str] = table_of
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a step: `how` is "passed", "failed", "cut" or "not run", and `said` the same with its reason."""

    step: Step
    how: str
    said: str
    seconds: float = 0.0
    limit: float = 0.0
    rows: Rows = ()
    output: tuple[str, ...] = ()

    @property
    def is_good(self) -> bool:
        return self.how in ("passed", "not run")


def limit_of(steps: Sequence[Step], seconds: float) -> float:
    """What the first of the steps may take: its share, and its part of what earlier steps left."""
    return seconds * steps[0].share / sum(step.share for step in steps)


def run(step: Step, limit: float) -> Outcome:
    """Run a step for `limit` seconds at most."""
    if (reason := step.missing()) is not None:
        return Outcome(step, "not run", f"not run: {reason}")
    if limit < SHORTEST:
        return Outcome(step, "not run", "not run: no time was left")
    with tempfile.TemporaryDirectory() as scratch:
        figures, log = Path(scratch) / "figures.jsonl", Path(scratch) / "output"
        given = {FIGURES: str(figures), SECONDS: f"{limit:.0f}"}
        begun = time.monotonic()
        code = _code_of([given.get(part, part) for part in step.command], step.environment, log, limit)
        seconds = time.monotonic() - begun
        printed = log.read_text(encoding="utf-8", errors="replace").splitlines()
        output = tuple(line[:WIDTH] for line in printed if line.strip())[-LINES:]
        return Outcome(step, *_what_became(code, limit), seconds, limit, json_lines.read(figures), output)


def _code_of(command: Sequence[str], environment: Mapping[str, str], log: Path, limit: float) -> int | None:
    """The exit code, None where it was ended."""
    path = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "tools"), os.environ.get("PYTHONPATH")]))
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            cwd=ROOT,
            env={**os.environ, **OFFLINE, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment},
            start_new_session=True,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its helpers too; where it has ended, those that it left
            process.wait()


def _what_became(code: int | None, limit: float) -> tuple[str, str]:
    """`how` and `said` of an outcome."""
    if code is None:
        return "cut", f"cut after {limit:.0f} s"
    if code < 0:
        return "failed", f"failed: signal {signal.Signals(-code).name}"
    if code > 0:
        return "failed", f"failed: exit code {code}"
    return "passed", "passed"
