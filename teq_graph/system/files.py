"""Reading and writing single files: JSON that is read with care, what torch writes, and how paths are shown."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

_LARGEST_JSON = 2**26
"""Bytes. The descriptions that are read take some kilobytes, a report of a large model some megabytes."""


class _PatientFile(io.RawIOBase):
    """A binary file that keeps the first OSError of a write to itself and takes everything that follows."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.file.seek(offset, whence)

    def write(self, data: Any) -> int:
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)


@contextlib.contextmanager
def torch_file(path: Path) -> Iterator[Any]:
    """A new file for `torch.save` and `torch.export.save`; OSError is raised when the block ends.

    Their zip writer answers a write that fails in a destructor, which ends the process.
    """
    with path.open("wb") as file:
        patient = _PatientFile(file)
        yield patient
        if patient.error is not None:
            raise patient.error


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON."""
    # A name that is not UTF-8 holds lone surrogates; what takes their place is JSON's own escape.
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that anybody may have written.

    Raises OSError, or ValueError where it is no object, is too large or nested too deeply, says a name twice, or holds
    NaN or an infinity, which are no JSON.
    """
    if not path.is_file():
        # A pipe by that name would be waited for.
        raise FileNotFoundError(f"{path} is missing" if not path.exists() else f"{path} is no file")
    if path.stat().st_size > _LARGEST_JSON:
        raise ValueError(f"{path.stat().st_size} bytes, accepted are up to {_LARGEST_JSON}")
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, object_pairs_hook=_without_duplicates, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, accepted is an object")
    return content


def shown(path: object) -> str:
    """A path as every terminal can print it in one line: what it cannot print is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is there twice")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")
