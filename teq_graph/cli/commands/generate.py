"""`teq-graph generate`: text from an exported directory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from teq_graph.cli import console, opening, options
from teq_graph.cli.parameters import Provider, Threads, Verify
from teq_graph.errors import ConfigError

# onnxruntime takes a second to import: only inside the functions.
if TYPE_CHECKING:
    from teq_graph.onnx.runtime import OnnxDecoder, OnnxEncoderDecoder


def generate(
    directory: Annotated[Path, typer.Argument(metavar="OUT", help="Directory that quantize wrote.")],
    prompt: Annotated[
        str | None,
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Text to answer or to continue; of an encoder-decoder, its source.  [default: asks for it]",
        ),
    ] = None,
    audio: Annotated[
        Path | None, typer.Option("--audio", metavar="FILE", help="WAV file to transcribe, for a model that hears.")
    ] = None,
    language: Annotated[
        str | None,
        typer.Option("--language", metavar="NAME", help="Of the recording, as en.  [default: what the model hears]"),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="NAME", help="What to make of it, as translate.  [default: transcribe]"),
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
    the standard input is one, and a chat goes on from line to line. An encoder-decoder writes what it makes of each by
    itself, or of a recording. How tokens are chosen is what the model's generation config says (greedy without one),
    where no option says otherwise.
    """
    options.check_seed(seed)
    for name, value in (("language", language), ("task", task)):
        if value is not None and audio is None:
            raise ConfigError(f"--{name} {value}: no effect without --audio")
    for name, is_given in (("prompt", prompt is not None), ("system", system is not None), ("chat", chat)):
        if is_given and audio is not None:
            raise ConfigError(f"--{name}: no effect with --audio, which is what the model hears")
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
    chosen = {name: value for name, value in given.items() if value is not None}
    if audio is not None:
        _transcribe(directory, audio, language, task, chosen, threads, provider, verify)
        return
    model = opening.open_generator(directory, threads, provider, verify)
    from teq_graph.onnx.runtime import OnnxDecoder
    from teq_graph.onnx.runtime.generation.conversation import Conversation

    _check_source(directory, model, "prompt")
    opening.prepare(model)
    if chat is None:
        chat = isinstance(model, OnnxDecoder) and bool(model.tokenizer.chat_template)
    conversation = Conversation(model, chat, system, chosen)
    for message in console.lines_of_input() if prompt is None else [prompt]:
        started = time.perf_counter()
        first = _write(conversation.reply(message))
        _tell(conversation.new_tokens, f"prompt of {conversation.prompt_tokens} tokens", started, first)


def _transcribe(
    directory: Path,
    audio: Path,
    language: str | None,
    task: str | None,
    chosen: dict[str, Any],
    threads: int | None,
    provider: str | None,
    verify: bool,
) -> None:
    from teq_graph.onnx.runtime import OnnxEncoderDecoder, read_wave

    recording = read_wave(audio)  # before the model is loaded, which takes seconds
    model = opening.open_generator(directory, threads, provider, verify)
    _check_source(directory, model, "audio")
    assert isinstance(model, OnnxEncoderDecoder)
    opening.prepare(model)
    started = time.perf_counter()
    stream = model.transcribe(recording, language, task, **chosen)
    first = _write(stream)
    _tell(len(stream.tokens), f"{recording.seconds:.1f} s of sound", started, first)


def _check_source(directory: Path, model: OnnxDecoder | OnnxEncoderDecoder, given: str) -> None:
    from teq_graph.onnx.runtime import OnnxEncoderDecoder

    hears = isinstance(model, OnnxEncoderDecoder) and model.hears
    if hears != (given == "audio"):
        takes, option = ("sounds", "audio") if hears else ("text", "prompt")
        raise ConfigError(f"--{given}: {directory} takes {takes}; accepted is --{option}")


def _write(pieces: Iterator[str]) -> float:
    """Print the pieces as they come; returns when the first came."""
    first = None
    for piece in pieces:
        first = first or time.perf_counter()
        typer.echo(piece, nl=False)
    typer.echo()
    return first or time.perf_counter()


def _tell(count: int, read: str, started: float, first: float) -> None:
    ended = time.perf_counter()
    speed = f", {(count - 1) / (ended - first):.1f} tokens/s" if count > 1 and ended > first else ""
    typer.echo(f"{count} tokens{speed}; {read} in {first - started:.2f} s", err=True)
