"""The commands that run an exported directory: generate, serve."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from teq_graph import console, opening, options
from teq_graph.errors import ConfigError

Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="CPU threads of onnxruntime.  [default: its own choice]")
]
Provider = Annotated[
    str | None,
    typer.Option("--provider", metavar="NAME", help="Execution provider of onnxruntime: cpu, cuda, …  [default: cpu]"),
]


def generate(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that quantize wrote.")],
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="Text to answer or to continue.  [default: asks for it]"),
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(metavar="N", help="Tokens to generate at most.")] = None,
    temperature: Annotated[
        float | None, typer.Option(metavar="N", help="0 always takes the most likely token.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option(metavar="N", help="Sample among the k most likely tokens; 0: among all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option(metavar="N", help="Sample among the most likely tokens of this joint probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(metavar="N", help="Sample among tokens this share as likely as the likeliest.")
    ] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option(metavar="N", help="Above 1, makes tokens that were there less likely.")
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="End before this text; repeatable.")
    ] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Repeatable sampling.  [default: random]")] = None,
    prompt_lookup: Annotated[
        int | None, typer.Option(metavar="N", help="Guess N tokens at a time: faster where text is copied or repeats.")
    ] = None,
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="First message of a chat, from the system.")
    ] = None,
    threads: Threads = None,
    provider: Provider = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Use the chat template.  [default: where there is one]")
    ] = None,
) -> None:
    """Generate text with onnxruntime.

    Answers the prompt where the model has a chat template, and continues it otherwise. Without a prompt, each line of
    the standard input is one, and a chat goes on from line to line. How tokens are chosen is what the model's
    generation config says (greedy without one), where no option says otherwise.
    """
    options.check_seed(seed)
    given = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop_strings": stop,
        "seed": seed,
        "prompt_lookup_num_tokens": prompt_lookup,
    }
    decoder = opening.open_decoder(directory, threads, provider)
    from teq_graph.onnx.conversation import Conversation

    chat = bool(decoder.tokenizer.chat_template) if chat is None else chat
    chosen = {name: value for name, value in given.items() if value is not None}
    conversation = Conversation(decoder, chat, system, chosen)
    for message in console.lines_of_input() if prompt is None else [prompt]:
        started, first = time.perf_counter(), None
        for piece in conversation.reply(message):
            first = first or time.perf_counter()
            typer.echo(piece, nl=False)
        typer.echo()
        ended, count = time.perf_counter(), conversation.new_tokens
        first = first or ended
        speed = f", {(count - 1) / (ended - first):.1f} tokens/s" if count > 1 and ended > first else ""
        prefill = f"prompt of {conversation.prompt_tokens} tokens in {first - started:.2f} s"
        typer.echo(f"{count} tokens{speed}; {prefill}", err=True)


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
    decoder = opening.open_decoder(directory, threads, provider)
    name = name or directory.resolve().name
    listening = server.listen(host, port)
    address, port = listening.getsockname()[:2]
    typer.echo(f"serving {name} on http://{f'[{address}]' if ':' in address else address}:{port}/v1")
    sys.stdout.flush()
    server.serve(decoder, listening, name, queue, grace)
