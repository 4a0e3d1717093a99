"""Tables in Markdown: of rows, and between two markers of a file, where one tool writes them and another reads them."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def table_of(rows: Iterable[Mapping[str, Any]]) -> str:
    """A table whose columns are the rows' keys; a table each for rows of other keys."""
    tables = []
    for columns, group in itertools.groupby(rows, key=tuple):
        lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        lines += [f"| {' | '.join(str(row[column]) for column in columns)} |" for row in group]
        tables.append("\n".join(lines))
    return "\n\n".join(tables)


def replace_section(path: Path, name: str, content: str) -> None:
    """Put `content` between `<!-- name:begin -->` and `<!-- name:end -->` in the file at `path`, and nowhere else."""
    before, _, after = _split(path, name)
    path.write_text(f"{before}{_begin(name)}\n{content.strip()}\n{_end(name)}{after}", encoding="utf-8")


def read_table(path: Path, name: str) -> list[list[str]]:
    """The cells of the table between the markers, its header first, without emphasis."""
    _, section, _ = _split(path, name)
    rows = [line.strip().strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip().replace("*", "").replace("`", "") for cell in row] for row in rows]
    return [row for row in cells if not all(set(cell) <= set("-:") for cell in row)]


def _split(path: Path, name: str) -> tuple[str, str, str]:
    text = path.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(_begin(name))
    section, found_end, after = rest.partition(_end(name))
    if not (found_begin and found_end):
        raise SystemExit(f"{path}: {_begin(name)} … {_end(name)} is missing")
    return before, section, after


def _begin(name: str) -> str:
    return f"<!-- {name}:begin -->"


def _end(name: str) -> str:
    return f"<!-- {name}:end -->"
