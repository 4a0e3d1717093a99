"""The memory of this process: its peak, and freed memory given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import sys
from collections.abc import Callable


def trim() -> None:
    """Let the C library give back what it holds but does not use.

    Tensors of one size that are freed among others that stay leave gaps that the next sizes do not fit: over the
    blocks of a model they add up to a sixth of the process. Without glibc nothing happens.
    """
    _malloc_trim()(0)


def peak_bytes() -> int:
    """The largest resident memory of this process so far."""
    with contextlib.suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # POSIX alone has it; on Linux it counts that of the process which this one came from, too

    count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return count if sys.platform == "darwin" else 1024 * count


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        function: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; Windows has no library of the process itself
        return lambda _: None
    return function
