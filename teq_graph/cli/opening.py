"""Opening what a command is given: a float model, or a directory that quantize wrote."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from teq_graph.errors import ConfigError, ModelFileError, brief
from teq_graph.system import progress
from teq_graph.system.texts import path_of

# torch, transformers and onnxruntime take seconds to import: only inside the functions.
if TYPE_CHECKING:
    from teq_graph.evaluation import LogitsFn
    from teq_graph.onnx.runtime import OnnxDecoder, OnnxEncoderDecoder

_SUFFIX = "ExecutionProvider"


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model, in PyTorch or in onnxruntime; `max_positions` None: it names no limit."""

    runtime: str
    logits_fn: LogitsFn
    tokenizer: Any
    max_positions: int | None


def open_decoder(directory: Path, threads: int | None, provider: str | None, verify: bool = True) -> OnnxDecoder:
    """A causal language model that quantize wrote, in onnxruntime; `provider` may go without its ending."""
    with progress.task(f"Loading {directory}"):
        from teq_graph.onnx.runtime import OnnxDecoder

        return OnnxDecoder.load(directory, _providers(provider), threads, verify=verify)


def open_generator(
    directory: Path, threads: int | None, provider: str | None, verify: bool = True
) -> OnnxDecoder | OnnxEncoderDecoder:
    """Whatever quantize wrote that writes text."""
    with progress.task(f"Loading {directory}"):
        from teq_graph.onnx.runtime import OnnxModel, load

        model = load(directory, _providers(provider), threads, verify=verify)
    if isinstance(model, OnnxModel):
        what = "it is not a causal language model, nor an encoder-decoder"
        raise ModelFileError(f"{directory}: {what}; accepted is one that generates text")
    return model


def prepare(model: OnnxDecoder | OnnxEncoderDecoder) -> None:
    """Load what generating needs besides, so that the first text does not wait for it.

    Says on stderr what its generation config asks for and is not implemented.
    """
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _ = model.generation_options
    for warning in said:
        typer.echo(f"warning: {warning.message}", err=True)
    with progress.task(f"Loading the tokenizer of {model.directory}"):
        _ = model.tokenizer


def _providers(name: str | None) -> tuple[str, ...]:
    name = name or "cpu"
    if not name.endswith(_SUFFIX):
        name = f"{name.upper()}{_SUFFIX}"
    return tuple(dict.fromkeys((name, f"CPU{_SUFFIX}")))


def open_language_model(source: str, threads: int | None, provider: str | None, verify: bool = True) -> LanguageModel:
    """A float model or what quantize wrote; the other arguments are for the latter only."""
    from teq_graph.onnx.directory import METADATA_FILE, MODEL_FILE

    try:
        directory = path_of(source)
    except ValueError as error:
        raise ModelFileError(f"model {brief(source)}: {error}") from error
    if any((directory / name).exists() for name in (METADATA_FILE, MODEL_FILE)):
        decoder = open_decoder(directory, threads, provider, verify)
        return LanguageModel("onnxruntime", onnx_logits(decoder), decoder.tokenizer, decoder.shape.max_positions)
    for name, value in (("threads", threads), ("provider", provider), ("no-verify", None if verify else True)):
        if value is not None:
            raise ConfigError(f"--{name}: no effect in PyTorch; accepted for a directory that quantize wrote")
    from teq_graph.capture.pretrained import longest_text
    from teq_graph.loading import load_model

    loaded = load_model(source)
    if not loaded.is_causal:
        raise ModelFileError(
            f"model {source!r} is a {type(loaded.model).__name__}: accepted are causal language models"
        )
    if loaded.tokenizer is None:
        raise ModelFileError(f"model {source!r} has no tokenizer: perplexity on a text needs one")
    limit = longest_text(loaded.model)
    return LanguageModel("PyTorch", torch_logits(loaded.model), loaded.tokenizer, limit)


def torch_logits(model: Any) -> LogitsFn:
    """Logits of a Hugging Face model."""
    return lambda input_ids: model(input_ids=input_ids, use_cache=False).logits


def onnx_logits(decoder: OnnxDecoder) -> LogitsFn:
    """Logits of an exported model."""
    return lambda input_ids: decoder.logits(input_ids.numpy())
