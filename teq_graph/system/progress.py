"""Progress of long work on stderr: a bar on a terminal, occasional plain lines elsewhere, silence by default."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from teq_graph.system import interruption

SHOW_AFTER = 2.0
"""Seconds that a piece of work must last before anything is shown."""
LINE_EVERY = 15.0
"""Seconds between two lines where stderr is not a terminal."""


class _Console(Console):
    """Standard error; where nobody reads it any more, the work goes on in silence."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


_enabled = False
_console = _Console(stderr=True)  # one for all: rich stacks the bars of nested work within a console

T = TypeVar("T")


def enable(on: bool = True) -> None:
    """Show progress from now on; a library call is quiet unless this was called."""
    global _enabled
    _enabled = on


class Task:
    """One piece of work in progress; `advance` counts it, `note` is a short remark such as the current loss."""

    def __init__(self, description: str, total: float | None) -> None:
        self._description = description
        self._total = total
        self._done = 0.0
        self._note = ""
        self._start = self._last_line = time.monotonic()
        self._shown = threading.Event()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = Progress(*columns, console=_console, transient=True)
        self._id = self._bar.add_task(description, total=total, note="")
        # a timer, not a check in `advance`: work of one long step is announced too
        self._timer = threading.Timer(SHOW_AFTER, self._show)
        self._timer.daemon = True
        if _enabled:
            self._timer.start()

    def advance(self, amount: float = 1, note: str = "") -> None:
        """Counts `amount` more of the total as done."""
        interruption.check()
        self._done += amount
        self._note = note or self._note
        self._bar.update(self._id, completed=self._done, note=self._note)
        if self._shown.is_set() and not _console.is_terminal and time.monotonic() - self._last_line > LINE_EVERY:
            self._print_line()

    def _show(self) -> None:
        self._shown.set()
        if _console.is_terminal:
            self._bar.start()
        else:
            self._print_line()

    def _print_line(self, ending: str = "") -> None:
        self._last_line = time.monotonic()
        count = "" if self._total is None else f" {self._done:g}/{self._total:g}"
        seconds = f"{self._last_line - self._start:.0f} s"
        note = f" {self._note}" if self._note else ""
        line = f"{self._description}{count} [{seconds}]{note}{ending}"
        try:
            _console.print(line, markup=False, highlight=False, soft_wrap=True)
        except OSError:  # a full disk, where standard error is a file
            _console.quiet = True

    def close(self, ending: str) -> None:
        """Ends the display; what was shown leaves one line behind."""
        self._timer.cancel()
        if self._timer.is_alive():  # `_show` is running at this moment
            self._timer.join()
        if self._shown.is_set():
            if _console.is_terminal:
                self._bar.stop()
            self._print_line(f" {ending}")


def say(line: str) -> None:
    """One line between what the bars show, where progress is shown at all."""
    if _enabled:
        with contextlib.suppress(OSError):
            _console.print(line, markup=False, highlight=False, soft_wrap=True)


@contextlib.contextmanager
def task(description: str, total: float | None = None) -> Iterator[Task]:
    """`with task("Training", total=200) as work: ... work.advance()`; without `total` only the time is shown.

    Where a task begins, advances or ends, a signal takes effect that a library swallowed before.
    """
    interruption.check()
    work = Task(description, total)
    try:
        yield work
        interruption.check()
    except BaseException:
        work.close("stopped")
        raise
    work.close("done")


def track(iterable: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """Yields from `iterable`, counting each element; `total` defaults to its length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with task(description, total) as work:
        for element in iterable:
            yield element
            work.advance()
