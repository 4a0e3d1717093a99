"""The process of `teq-graph`: signals, streams and exit codes; the commands themselves are in `cli.commands`.

Nothing else is imported before `main` runs, so that an early Ctrl-C finds it prepared.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import warnings
from collections.abc import Sequence

from teq_graph.errors import TeqGraphError
from teq_graph.system import interruption

_PIPE_CLOSED = 128 + signal.SIGPIPE  # nobody reads on, as after `| head`

_LONGEST = 1000  # characters of a message


def run(arguments: Sequence[str], show_progress: bool = False) -> int:
    """Runs one command; returns the exit code: 0, 2 for what is refused, 128 + number after a signal."""
    try:
        code = _invoke(arguments, show_progress)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        # A library that is interrupted raises whatever it likes.
        if interruption.received() is None:
            raise
        code = 1
    number = interruption.received()
    return code if number is None else 128 + number


def main() -> None:
    """The entry point of `teq-graph`."""
    interruption.install()
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, and its number free for the next file that is opened
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115  for the life of the process
    if not sys.warnoptions:
        warnings.simplefilter("ignore")  # what torch and others say to their callers is not for the user
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal without × and → is no reason to fail
    code = run(sys.argv[1:], show_progress=True)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            # `run` has told of it. The interpreter would try again at its end, and complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _invoke(arguments: Sequence[str], show_progress: bool) -> int:
    from teq_graph.cli import app
    from teq_graph.system import progress

    if show_progress:
        progress.enable()
    try:
        code = app.invoke(arguments)
        sys.stdout.flush()
        return code
    except TeqGraphError as error:
        return _fail(str(error))
    except app.UsageError as error:
        return _fail(error.format_message())
    except BrokenPipeError:
        return _PIPE_CLOSED
    except SystemExit as error:  # rich's answer to it
        if isinstance(error.__context__, BrokenPipeError):
            return _PIPE_CLOSED
        raise
    except OSError as error:
        # A write, of which only those to files by name tell it.
        return _fail(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _fail(message: str) -> int:
    if interruption.received() is None:  # otherwise the message tells of what the signal broke
        # A file name need not be text.
        line = " ".join(message.encode(errors="backslashreplace").decode().split())
        if len(line) > _LONGEST:  # an argument that is no name of anything
            line = f"{line[: _LONGEST // 2]} … {line[-_LONGEST // 2 :]}"
        with contextlib.suppress(OSError):
            sys.stderr.write(f"error: {line}\n")
    return 2
