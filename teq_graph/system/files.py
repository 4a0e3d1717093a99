"""Reading and writing single files: JSON that is read with care, what torch writes, and how paths are shown."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_LARGEST_JSON = 2**26
"""Bytes. The descriptions that are read take some kilobytes, a report of a large model some megabytes."""


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON that `read_json` reads; see `finite` for what is no number there."""
    # A name that is not UTF-8 holds lone surrogates; what takes their place is JSON's own escape.
    text = json.dumps(finite(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_whole(path: Path, text: str) -> None:
    """Write a text in one step: afterwards the file is whole, or as it was. Raises OSError where that fails."""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staging.write_text(text, encoding="utf-8", errors="backslashreplace")
        staging.replace(path)
    finally:
        staging.unlink(missing_ok=True)


def finite(content: Any) -> Any:
    """`content` with "NaN", "Infinity" and "-Infinity" for what JSON has no numbers for, as in protobuf's JSON.

    A model that is quantized too far can have an infinite perplexity, which is worth saying.
    """
    if isinstance(content, Mapping):
        return {name: finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    if isinstance(content, float) and not math.isfinite(content):
        return "NaN" if math.isnan(content) else "Infinity" if content > 0 else "-Infinity"
    return content


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file that anybody may have written.

    Raises OSError, or ValueError where it is no object, is too large or nested too deeply, says a name twice, or holds
    NaN or an infinity, which are no JSON.
    """
    if not path.is_file():
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        raise ValueError("it is no file")  # a pipe by that name would be waited for
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
