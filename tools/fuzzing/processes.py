"""Functions in processes of their own, forked from a warm one: what they say, print, or die of."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEMORY = 4 * 2**30
"""Bytes that a function may take beside what the warm process has."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a process ended.

    `result` is what the function returned, None where it never did; `error` the traceback of its exception; `signal`
    what killed it; `output` what it printed.
    """

    result: Any
    error: str | None
    signal: int
    output: str
    timed_out: bool
    seconds: float


class Process:
    """`function` in a process whose files are in `folder`, where it also stands; what it returns is made JSON."""

    def __init__(self, function: Callable[[], Any], folder: Path, timeout: float, memory: int | None = MEMORY) -> None:
        self.folder = folder
        self.started = time.monotonic()
        self._deadline = self.started + timeout
        self._timed_out = False
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _be_the_child(function, folder, memory)

    def kill(self) -> None:
        """Its children too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def is_running(self) -> bool:
        """Whether it has not ended by itself."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def poll(self) -> Outcome | None:
        """How it ended, None while it runs; it is killed when its time is over."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid == 0:
            if time.monotonic() > self._deadline and not self._timed_out:
                self._timed_out = True
                self.kill()
            return None
        self.kill()  # what it left running
        said: dict[str, Any] = {}
        with contextlib.suppress(OSError, ValueError):
            said = json.loads((self.folder / "result").read_text(encoding="utf-8"))
        output = (self.folder / "output").read_text(encoding="utf-8", errors="replace")
        died_of = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        seconds = time.monotonic() - self.started
        return Outcome(said.get("result"), said.get("error"), died_of, output, self._timed_out, seconds)

    def wait(self) -> Outcome:
        """How it ends."""
        while (outcome := self.poll()) is None:
            time.sleep(0.01)
        return outcome


def _be_the_child(function: Callable[[], Any], folder: Path, memory: int | None) -> None:
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open("output", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(output, 1)
        os.dup2(output, 2)
        if memory is not None:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + memory,) * 2)
        try:
            said = {"result": function()}
        except BaseException:
            said = {"error": traceback.format_exc()}
        sys.stdout.flush()
        sys.stderr.flush()
        Path("result").write_text(json.dumps(said), encoding="utf-8")
    finally:
        os._exit(0)
