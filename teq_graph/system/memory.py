"""The memory of this process: its peak, what it may still take, and freed memory given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path


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


def available_bytes() -> int | None:
    """What this process may still take before the system or its container ends it; None where nobody knows.

    On Linux what can be had without swapping, or is left of a control group's limit; elsewhere all of the machine.
    """
    with contextlib.suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
        return max(0, min([*free, *_left_of_groups()]))
    with contextlib.suppress(AttributeError, OSError, ValueError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None


def _left_of_groups() -> Iterator[int]:
    """Of each control group's limit what is not in use; files in memory are not counted, which give way."""
    for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = Path("/sys/fs/cgroup", controllers)
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):  # the root, too, where a container sees its own group
            with contextlib.suppress(OSError, ValueError):  # "max", or no such file
                limit, used = (int((folder / name).read_text(encoding="ascii")) for name in names)
                statistics = (folder / "memory.stat").read_text(encoding="ascii").split()
                yield limit - used + int(statistics[statistics.index("inactive_file") + 1])


@functools.cache
def _malloc_trim() -> Callable[[int], object]:
    try:
        function: Callable[[int], object] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # not glibc; Windows has no library of the process itself
        return lambda _: None
    return function
