"""Chat templates, rendered in a process of their own that is ended where it takes too long."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from teq_graph.errors import InputError, one_line

SECONDS = 5
"""That one rendering may take: thousands of times what the longest conversation needs."""
MEMORY = 512 * 2**20
"""Bytes that the process may use for a template, where the system can limit it."""
LONGEST = 2**20, 16
"""Characters of a rendered conversation at most: so many, and so many times those of its messages."""

_START_SECONDS = 120
_PROGRAM = Path(__file__).with_name("template_process.py")


class TemplateProcess:
    """A process that renders, started when it is needed and again after it was ended; for any number of threads.

    It costs 60 MB and half a second to start, which passes while a tokenizer is being loaded.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._ready = False

    def start(self) -> None:
        """Begin to start it, if it does not run; returns at once."""
        with self._lock:
            self._start()

    def render(self, template: str, messages: Sequence[Any], variables: Mapping[str, str]) -> str:
        """The text of `messages` up to where the reply begins; `variables` are the names of special tokens.

        Raises InputError where the template does not take the messages, or takes too long or too much memory.
        """
        least, times = LONGEST
        longest = least + times * len(json.dumps(messages))
        request = {"template": template, "messages": messages, "variables": dict(variables), "longest": longest}
        line = json.dumps(request)
        with self._lock:
            process = self._start()
            try:
                if not self._ready:
                    _answer(process, "", _START_SECONDS)
                    self._ready = True
                answer = json.loads(_answer(process, f"{line}\n", SECONDS))
            except BaseException:  # also where the caller is interrupted: the answer would be the next one's
                self._end()
                raise
        if "error" in answer:
            raise InputError(f"messages: the chat template refuses them: {one_line(ValueError(answer['error']))}")
        text: str = answer["text"]
        return text

    def _start(self) -> subprocess.Popen[str]:
        if self._process is None or self._process.poll() is not None:
            self._end()
            command = [sys.executable, "-P", "-W", "ignore", str(_PROGRAM), str(SECONDS), str(MEMORY)]
            try:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    encoding="ascii",
                    env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},  # packages as here
                    start_new_session=True,  # Ctrl-C is for this process alone
                )
            except OSError as error:
                raise InputError(f"messages: no process for the chat template: {error.strerror}") from error
            self._ready = False
            self._ending = weakref.finalize(self, _end, self._process)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._ending()
            self._process = None


@functools.cache
def shared() -> TemplateProcess:
    """The one of this process."""
    return TemplateProcess()


def _answer(process: subprocess.Popen[str], request: str, seconds: float) -> str:
    """The next line of the process, which is killed after `seconds`."""
    assert process.stdin is not None and process.stdout is not None
    began = time.monotonic()
    timer = threading.Timer(seconds, process.kill)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(request)
            process.stdin.flush()
        answer = process.stdout.readline()
    finally:
        timer.cancel()
    if answer.endswith("\n"):
        return answer
    if time.monotonic() - began >= seconds:
        raise InputError(f"messages: the chat template took longer than {seconds} s; accepted is one that ends")
    raise InputError(f"messages: the process of the chat template ended by itself, with code {process.wait()}")


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    with contextlib.suppress(BrokenPipeError):
        process.communicate()
