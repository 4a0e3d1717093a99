"""Signals that end a command, on record: a library can swallow the exception, but not the record."""

from __future__ import annotations

import signal
from types import FrameType

_received: int | None = None


def install() -> None:
    """From now on Ctrl-C, `kill` and a closed terminal end the main thread's work with KeyboardInterrupt.

    So that cleaning up happens alike for all of them. What the caller has us ignore (`nohup`) stays ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def received() -> int | None:
    """The number of the signal that came, if one did."""
    return _received


def exit_code() -> int:
    """128 and the number of the signal that came, of Ctrl-C where none is on record."""
    return 128 + (signal.SIGINT if _received is None else _received)


def check() -> None:
    """Raise KeyboardInterrupt once more if a signal came: what was interrupted may have gone on regardless."""
    if _received is not None:
        raise KeyboardInterrupt


def _stop(number: int, _frame: FrameType | None) -> None:
    global _received
    _received = number
    raise KeyboardInterrupt
