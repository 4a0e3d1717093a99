"""Directories that appear whole or not at all, and JSON in them."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from teq_graph.errors import ExportError, one_line


@contextlib.contextmanager
def new_directory(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place once the block ends without an exception.

    Raises ExportError where `target` exists (unless `overwrite`), its parent cannot be written, or writing
    fails (OSError). After an exception nothing is left behind, and an old `target` is as it was.
    """
    # Not `absolute`, which keeps `..`: of a path through folders that do not exist yet, nothing would exist.
    target = Path(os.path.abspath(target))
    _check_target(target, overwrite)
    created = [folder for folder in target.parents if not folder.exists()]
    staging = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        # mkdtemp lets nobody else in; the result gets the permissions of any new directory beside it.
        staging.chmod(0o777 & ~_umask())
        yield staging
        _check_target(target, overwrite)  # again: minutes have passed
        _replace(staging, target)
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {one_line(error)}") from error
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
        for folder in created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


def _check_target(target: Path, overwrite: bool) -> None:
    if target.is_symlink() and not target.exists():
        raise ExportError(f"{target} is a link to nothing: accepted is a new directory")
    if target.exists() and not overwrite:
        raise ExportError(f"{target} exists: accepted is a new directory, or overwrite=True")
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file: accepted is a directory")


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _replace(staging: Path, target: Path) -> None:
    if not target.exists():
        staging.rename(target)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = aside / target.name
    try:
        target.rename(old)
        staging.rename(target)
    finally:
        # After any exception, Ctrl-C included. The old content goes only where `target` is there, new or old.
        if not target.exists():
            old.rename(target)
        shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
