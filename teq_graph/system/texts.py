"""What users name: paths, and files of text, refused in one line where they are none."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from teq_graph.errors import InputError, brief, one_line

MOST_BYTES = 2**30
"""Of a text: some two hundred million tokens."""


def path_of(value: str | os.PathLike[str]) -> Path:
    """`value` as a path with the home directory in place of `~`; nothing needs to be there.

    Raises ValueError, with a reason for one line, where no file can have that name, or it is not to be looked at.
    """
    try:
        path = Path(value).expanduser()
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except UnicodeEncodeError:
        raise ValueError("it has characters that no file name has") from None
    except OSError as error:  # a name that is too long, a directory that is not to be read
        raise ValueError(one_line(error)) from error
    except (RuntimeError, TypeError, ValueError) as error:  # a home of nobody, another type, a NUL
        raise ValueError(one_line(error)) from error
    return path


def read_text(name: str, value: str | os.PathLike[str]) -> str:
    """The text of the file `value`; `name` is what the caller calls it.

    Raises InputError where it is no regular file (others can be endless), not UTF-8, empty, or larger than a text is.
    """
    where = f"{name} {brief(os.fspath(value))}"
    try:
        path = path_of(value)
        with open(path, "rb", opener=_open_at_once) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise InputError(f"{where}: it is no regular file; accepted is a text file in UTF-8")
            if status.st_size > MOST_BYTES:
                size = f"{status.st_size / 1e9:,.1f} GB"
                raise InputError(f"{where}: it is {size} large; accepted is text of up to {MOST_BYTES / 1e9:.3g} GB")
            content = file.read(MOST_BYTES).decode("utf-8")
    except IsADirectoryError:
        raise InputError(f"{where}: it is a directory; accepted is a text file in UTF-8") from None
    except (MemoryError, OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: {one_line(error)}; accepted is a text file in UTF-8") from error
    if not content.strip():
        raise InputError(f"{where}: it is empty; accepted is a text file in UTF-8")
    return content.replace("\r\n", "\n").replace("\r", "\n")


def _open_at_once(path: str, flags: int) -> int:
    """Without waiting for somebody to write to a pipe."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
