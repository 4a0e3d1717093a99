"""`teq-graph serve`: OpenAI's API over an exported directory."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated

import typer

from teq_graph.cli import opening, options
from teq_graph.cli.parameters import Provider, Threads, Verify
from teq_graph.errors import ConfigError

LOG_LEVELS = ("critical", "error", "warning", "info", "debug")
_DAY = 86400
_EXTRA = ("uvicorn", "fastapi", "prometheus_client")


def serve(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that quantize wrote.")],
    host: Annotated[str, typer.Option(metavar="NAME", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", help="Port to listen on; 0 takes a free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--model-name", metavar="NAME", help="What clients call it.  [default: OUT's name]")
    ] = None,
    queue: Annotated[int, typer.Option(metavar="N", help="Prompts that wait at most, besides the one running.")] = 64,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", help="New tokens that a request may ask for; more are refused.")
    ] = 16384,
    timeout: Annotated[
        int,
        typer.Option(
            metavar="N", help="Seconds that a request may take, waiting included; then it gets what there is."
        ),
    ] = 600,
    grace: Annotated[
        int, typer.Option(metavar="N", help="Seconds that a running request has when a signal ends it.")
    ] = 30,
    api_key: Annotated[
        str | None,
        typer.Option(
            metavar="KEY",
            envvar="TEQ_GRAPH_API_KEY",
            help="Ask clients for this key; better in the environment, where other users do not see it.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A name that clients may call this server by; repeatable, * takes any."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None,
        typer.Option(metavar="URL", help="A site whose pages may use this server; repeatable, * allows all."),
    ] = None,
    log_level: Annotated[
        str, typer.Option(metavar="NAME", help=f"{', '.join(LOG_LEVELS)}; info has a line for each request.")
    ] = "warning",
    threads: Threads = None,
    provider: Provider = None,
    verify: Verify = True,
) -> None:
    """Serve OpenAI's API over onnxruntime.

    Chat completions and completions, whole or streamed, one after the other; the rest wait in a queue, and are refused
    when it is full. How tokens are chosen is what the model's generation config says (greedy without one), where a
    request does not say otherwise. /health tells whether it is alive, /metrics what Prometheus reads.

    Only this machine reaches it, unless --host says otherwise; then an --api-key is in place. Clients call it by its
    address, localhost, or --allowed-host; web pages are refused, but those of --allow-origin.
    """
    options.check_range("queue", queue, 1)
    options.check_range("grace", grace, 0, _DAY)
    options.check_range("port", port, 0, 65535)
    options.check_range("max-tokens", max_tokens, 1)
    options.check_range("timeout", timeout, 1, _DAY)
    options.check_choice("log-level", log_level, LOG_LEVELS)
    try:
        for package in _EXTRA:
            importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"serve: {error.name} is not installed; pip install teq-graph[serve]") from error
    from teq_graph.serving import sockets

    with sockets.listen(host, port) as listening:  # before the model is loaded, which takes seconds
        from teq_graph.serving.guards import Access

        local = sockets.is_local(listening)
        access = Access.listening_on(host, local, allowed_host or (), allow_origin or (), api_key)
        decoder = opening.open_decoder(directory, threads, provider, verify)
        opening.prepare(decoder)
        from teq_graph.serving import server
        from teq_graph.serving.app import make_app
        from teq_graph.serving.completions import Limits
        from teq_graph.serving.worker import Worker

        if not local and api_key is None:
            typer.echo(f"warning: --host {host}: whoever reaches it may use it; --api-key asks for a key", err=True)
        name = name or directory.resolve().name
        address, port = listening.getsockname()[:2]
        typer.echo(f"serving {name} on http://{f'[{address}]' if ':' in address else address}:{port}/v1")
        sys.stdout.flush()
        worker = Worker(queue)
        server.serve(
            make_app(decoder, worker, name, Limits(max_tokens, timeout), access), worker, listening, grace, log_level
        )
