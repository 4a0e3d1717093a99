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
    from teq_graph.onnx.runtime import OnnxDecoder

_SUFFIX = "ExecutionProvider"


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """A causal language model, in PyTorch or in onnxruntime; `max_positions` None: it names no limit."""

    runtime: str
    logits_fn: LogitsFn
    tokenizer: Any
    max_positions: int | None


def open_decoder(directory: Path, threads: int | None, provider: str | None, verify: bool = True) -> OnnxDecoder:
    """A directory that quantize wrote, in onnxruntime; `provider` may go without its ending."""
    provider = provider or "cpu"
    if not provider.endswith(_SUFFIX):
        provider = f"{provider.upper()}{_SUFFIX}"
    providers = tuple(dict.fromkeys((provider, f"CPU{_SUFFIX}")))
    with progress.task(f"Loading {directory}"):
        from teq_graph.onnx.runtime import OnnxDecoder

        return OnnxDecoder.load(directory, providers, threads, verify=verify)


def open_generator(directory: Path, threads: int | None, provider: str | None, verify: bool = True) -> OnnxDecoder:
    """The same with what generating needs besides, so that the first text does not wait for it.

    Says on stderr what its generation config asks for and is not implemented.
    """
    decoder = open_decoder(directory, threads, provider, verify)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        _ = decoder.generation_options
    for warning in said:
        typer.echo(f"warning: {warning.message}", err=True)
    with progress.task(f"Loading the tokenizer of {directory}"):
        _ = decoder.tokenizer
    return decoder


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
