"""`teq-graph report`: what a compilation did, as a page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from teq_graph.cli import console
from teq_graph.errors import ModelFileError, brief
from teq_graph.system.texts import path_of

# torch and pydantic take seconds to import: only inside the command.


def report(
    directory: Annotated[str, typer.Argument(metavar="OUT", help="Directory that quantize wrote, or save().")],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Page to write.  [default: OUT.html, beside OUT]"),
    ] = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Also show what evaluate --json printed, as with --reference."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace FILE if report wrote it before.")] = False,
) -> None:
    """Show what quantize did, as one HTML page.

    The graph block by block with its equivalences, scales, errors after each stage, bits, sizes, training curves, and
    what was refused. The page needs no network and no other file.
    """
    try:
        source = path_of(directory)
    except ValueError as error:
        raise ModelFileError(f"directory {brief(directory)}: {error}") from error
    from teq_graph.reporting.directory import read_directory, read_evaluation
    from teq_graph.reporting.file import check_page, write_page
    from teq_graph.reporting.page import render_page

    # `.` has no name, nor anything beside it.
    whole = Path(os.path.realpath(source))
    target = Path(os.path.abspath(output)) if output is not None else whole.parent / f"{whole.name}.html"
    check_page(target, overwrite)
    found = read_directory(whole)
    measured = None if evaluation is None else read_evaluation(evaluation)
    text = render_page(found, measured)
    write_page(target, text, overwrite)
    console.show_pairs([("page", f"{console.path(target)}, {len(text.encode(errors='replace')) / 1e3:,.0f} kB")])
