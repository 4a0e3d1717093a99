"""Memory that was freed, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


def trim() -> None:
    """Let the C library give back what it holds but does not use.

    Tensors of one size that are freed among others that stay leave gaps that the next sizes do not fit: over the
    blocks of a model they add up to a sixth of the process. Without glibc nothing happens.
    """
    _malloc_trim()(0)


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        function: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; Windows has no library of the process itself
        return lambda _: None
    return function
