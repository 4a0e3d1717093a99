"""Replace the text between two markers of a Markdown file."""

from __future__ import annotations

from pathlib import Path


def replace_section(path: Path, name: str, content: str) -> None:
    """Put `content` between `<!-- name:begin -->` and `<!-- name:end -->` in the file at `path`."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    text = path.read_text(encoding="utf-8")
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise SystemExit(f"{path}: {begin} … {end} is missing")
    path.write_text(f"{before}{begin}\n{content.strip()}\n{end}{after}", encoding="utf-8")
