"""All commands under one name, and how one is invoked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

import teq_graph
from teq_graph.cli.commands.evaluate import evaluate
from teq_graph.cli.commands.generate import generate
from teq_graph.cli.commands.inspect import inspect
from teq_graph.cli.commands.quantize import quantize
from teq_graph.cli.commands.report import report
from teq_graph.cli.commands.serve import serve
from teq_graph.cli.commands.transform import transform

# click's base of all errors of usage; typer has it under different names from version to version
UsageError: type[typer.BadParameter] = typer.BadParameter.__base__  # type: ignore[assignment]

app = typer.Typer(
    name="teq-graph",
    add_completion=False,
    rich_markup_mode=None,
    help=teq_graph.__doc__,
    context_settings={"max_content_width": 100},
)


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"teq-graph {teq_graph.__version__}")
        raise typer.Exit


for command in (inspect, quantize, transform, report, generate, serve, evaluate):
    app.command()(command)


def invoke(arguments: Sequence[str]) -> int:
    """Runs one command, and lets every exception through: `Typer.__call__` has its own ideas about some."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("teq-graph", list(arguments) or ["--help"], obj=list(arguments)) as context:
            command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    return 0
