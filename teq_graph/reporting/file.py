"""The file of a page: where it may lie, and what it may take the place of."""

from __future__ import annotations

import os
from pathlib import Path

from teq_graph.errors import ExportError, one_line
from teq_graph.reporting.page import GENERATOR
from teq_graph.system.directories import DESCRIPTIONS
from teq_graph.system.files import shown, write_whole

_MARK = f'<meta name="generator" content="{GENERATOR} '.encode()
_HEAD = 1000
"""Bytes among which a page of ours has its mark."""


def check_page(target: Path, overwrite: bool) -> None:
    """Raise ExportError where a page must not be written.

    What may be replaced, where `overwrite`, is another page of ours. A directory of ours lists its files, and could not
    be written again with a page in it.
    """
    name = shown(target)
    for folder in target.parents:
        if any(os.path.lexists(folder / description) for description in DESCRIPTIONS):
            raise ExportError(
                f"{name} lies in {shown(folder)}, which lists its files: accepted is another place, by -o"
            )
    if not os.path.lexists(target):
        return
    if target.is_symlink() or not target.is_file():
        raise ExportError(f"{name} is no file: accepted is a new one, by -o")
    if not overwrite:
        raise ExportError(f"{name} exists: accepted is a new file, by -o, or --overwrite")
    with target.open("rb") as file:
        if _MARK not in file.read(_HEAD):
            raise ExportError(f"{name} is no page that teq_graph wrote: delete or move it yourself")


def write_page(target: Path, text: str, overwrite: bool) -> None:
    """Write the page; whole or not at all. Raises ExportError where that must not be, or fails."""
    try:
        check_page(target, overwrite)
        write_whole(target, text)
    except OSError as error:
        raise ExportError(f"{shown(target)} cannot be written: {one_line(error)}") from error
