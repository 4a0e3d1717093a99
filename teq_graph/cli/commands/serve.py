"""`teq-graph serve`: OpenAI's API over an exported directory."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from teq_graph.cli import opening, options
from teq_graph.cli.parameters import Provider, Threads, Verify
from teq_graph.errors import ConfigError


def serve(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that quantize wrote.")],
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--model-name", metavar="NAME", help="What clients call it.  [default: OUT's name]")
    ] = None,
    queue: Annotated[int, typer.Option(metavar="N", help="Requests that wait at most, besides the one running.")] = 64,
    grace: Annotated[
        int, typer.Option(metavar="N", help="Seconds that a running request has when a signal ends it.")
    ] = 30,
    threads: Threads = None,
    provider: Provider = None,
    verify: Verify = True,
) -> None:
    """Serve OpenAI's API over onnxruntime.

    Chat completions and completions, whole or streamed, one after the other; the rest wait in a queue, and are refused
    when it is full. How tokens are chosen is what the model's generation config says (greedy without one), where a
    request does not say otherwise.
    """
    try:
        from teq_graph.serving import server
    except ImportError as error:
        raise ConfigError(f"serve: {error.name} is not installed; pip install teq-graph[serve]") from error
    options.check_range("queue", queue, 1)
    options.check_range("grace", grace, 0)
    options.check_range("port", port, 0, 65535)
    decoder = opening.open_decoder(directory, threads, provider, verify)
    name = name or directory.resolve().name
    listening = server.listen(host, port)
    address, port = listening.getsockname()[:2]
    typer.echo(f"serving {name} on http://{f'[{address}]' if ':' in address else address}:{port}/v1")
    sys.stdout.flush()
    server.serve(decoder, listening, name, queue, grace)
