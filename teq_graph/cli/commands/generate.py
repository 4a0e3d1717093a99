"""`teq-graph generate`: text from an exported directory."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from teq_graph.cli import console, opening, options
from teq_graph.cli.parameters import Provider, Threads, Verify


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
    verify: Verify = True,
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
    decoder = opening.open_generator(directory, threads, provider, verify)
    from teq_graph.onnx.runtime.generation.conversation import Conversation

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
