"""How much work a refusal may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


@contextlib.contextmanager
def at_once(seconds: float, what: object = None) -> Iterator[None]:
    """Fails where what is inside takes so many `seconds` of processor time, which other work beside leaves alone."""
    started = time.process_time()
    yield
    took = time.process_time() - started
    assert took < seconds, f"{what}: {took:.1f} s of processor time, accepted is less than {seconds}"
