"""Opening exported directories with onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from teq_graph.capture import EncoderShape
from teq_graph.capture.shapes import PAST, PRESENT
from teq_graph.errors import InputError, ModelFileError, one_line
from teq_graph.onnx.directory import (
    DECODER_FILE,
    ENCODER_FILE,
    METADATA_FILE,
    MODEL_FILE,
    VERIFIED,
    WRITTEN,
    Metadata,
)
from teq_graph.onnx.runtime import arguments
from teq_graph.onnx.runtime.generation.device_decoding import try_step
from teq_graph.onnx.runtime.last_logits import with_chosen_logits
from teq_graph.onnx.runtime.on_device import open_on_device
from teq_graph.system.manifest import verify_files

Provider = str | tuple[str, dict[str, Any]]
CPU: tuple[Provider, ...] = ("CPUExecutionProvider",)

# More threads than processors gain nothing, and each takes onnxruntime tens of milliseconds to start: thousands of
# them look like a hang. Some more are let through, for a script that was written for a larger machine.
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))

_ONNX_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)", "bfloat16": "tensor(bfloat16)"}
_ONLY_FATAL = 4
_FOLDS_WEIGHTS = "session.disable_quant_qdq"
"""onnxruntime leaves a dequantized constant to each run, for fusions into integer operators that are none of ours."""
_EXTERNAL_TENSORS = "session.model_external_initializers_file_folder_path"


def open_directory(
    directory: str | os.PathLike[str],
    providers: Sequence[Provider] = CPU,
    threads: int | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
    verify: bool = True,
) -> tuple[onnxruntime.InferenceSession, Metadata]:
    """Session and metadata of an exported directory.

    `providers` are onnxruntime's, most wanted first, each a name or (name, options). `threads` is the number of
    CPU threads of one operator, None leaves it to onnxruntime. `session_options` None: its defaults, without log
    lines, since what goes wrong is an exception, and with weights of convolutions dequantized once, not in each run:
    in memory they are floats (`session.disable_quant_qdq`). `verify`: compare the checksums of model and weights, which
    takes about a second a GB. Raises InputError for a provider that this onnxruntime does not have, ModelFileError for
    a directory that is none or damaged, or whose description is of another model.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ModelFileError(f"{path} is no directory: accepted is {WRITTEN}")
    metadata = Metadata.read(path)
    _check_providers(providers)
    options = _session_options(path, threads, session_options)
    model = path / (MODEL_FILE if metadata.encoder is None else DECODER_FILE)
    if not model.is_file():
        raise ModelFileError(f"{model} is missing: accepted is {WRITTEN}")
    if verify:
        verify_files(path, METADATA_FILE, VERIFIED)
    try:
        session = open_on_device(model, metadata, options, providers, _try)
        if session is None:
            changed = None if metadata.decoder is None else with_chosen_logits(model)
            session = onnxruntime.InferenceSession(
                changed or str(model), sess_options=options, providers=list(providers)
            )
    except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
        raise ModelFileError(f"{model} cannot be loaded: {one_line(error)}") from error
    if (difference := _difference(session, metadata)) is not None:
        raise ModelFileError(f"{path / METADATA_FILE} is of another model than {model.name}: {difference}")
    return session, metadata


def open_encoder(
    directory: str | os.PathLike[str],
    encoder: EncoderShape,
    providers: Sequence[Provider] = CPU,
    threads: int | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
) -> onnxruntime.InferenceSession:
    """A session of the `encoder` in a directory whose decoder `open_directory` has opened, with the same arguments.

    Raises ModelFileError where its file is missing or damaged, or it is another encoder.
    """
    path = Path(directory)
    model = path / ENCODER_FILE
    if not model.is_file():
        raise ModelFileError(f"{model} is missing: accepted is {WRITTEN}")
    options = _session_options(path, threads, session_options)
    try:
        session = onnxruntime.InferenceSession(str(model), sess_options=options, providers=list(providers))
    except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
        raise ModelFileError(f"{model} cannot be loaded: {one_line(error)}") from error
    said = (set(encoder.inputs), {f"{PRESENT}.{name}" for name in encoder.cache_names})
    has = tuple({item.name for item in items} for items in (session.get_inputs(), session.get_outputs()))
    if said != has:
        shown = " -> ".join(", ".join(sorted(names)) for names in said)
        raise ModelFileError(f"{path / METADATA_FILE} is of another model than {model.name}: {shown:.200}")
    return session


def _session_options(
    path: Path, threads: int | None, given: onnxruntime.SessionOptions | None
) -> onnxruntime.SessionOptions:
    options = given
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ONLY_FATAL
        options.add_session_config_entry(_FOLDS_WEIGHTS, "1")
    if threads is not None:
        accepted = f"None and integers from 1 to {MAX_THREADS}"
        options.intra_op_num_threads = arguments.integer("threads", threads, 1, accepted, MAX_THREADS)
    options.add_session_config_entry(_EXTERNAL_TENSORS, str(path))
    return options


def _try(session: onnxruntime.InferenceSession, metadata: Metadata) -> None:
    """One step, unless it is refused below."""
    if _difference(session, metadata) is None:
        try_step(session, metadata)


def _difference(session: onnxruntime.InferenceSession, metadata: Metadata) -> str | None:
    """What a decoder's description says otherwise than its model, before caches are made by it; None: nothing."""
    if metadata.decoder is None:
        return None
    cached = {item.name: item for item in session.get_inputs() if item.name.startswith(f"{PAST}.")}
    described, names = metadata.decoder.cached, metadata.decoder.cache_names
    if metadata.encoder is not None:
        described += tuple(tensor for layer in metadata.encoder.layers for tensor in layer)
        names += metadata.encoder.cache_names
    if len(cached) != len(described):
        layers = len(metadata.decoder.layers)
        return f"{layers} layers of {len(described)} caches, while the model has {len(cached)} inputs {PAST}"
    for tensor, name in zip(described, (f"{PAST}.{name}" for name in names), strict=True):
        item = cached.get(name)
        if item is None:
            return f"an input {name}, which the model does not have"
        if len(item.shape) != len(tensor.sizes) + 1 or not all(map(_fits, item.shape[1:], tensor.sizes)):
            return f"sizes {list(tensor.sizes)} for {name}, while the model takes {item.shape}"
        if item.type != _ONNX_TYPES[metadata.dtype]:
            return f"dtype {metadata.dtype}, while the model takes {name} as {item.type}"
    logits = next((item.shape for item in session.get_outputs() if item.name == "logits"), None)
    if logits is None or len(logits) != 3 or not _fits(logits[2], metadata.decoder.vocab_size):
        return f"logits of {metadata.decoder.vocab_size} tokens, while the model gives {logits}"
    return None


def _fits(size: int | str | None, said: int | None) -> bool:
    return size == said if isinstance(size, int) else True


def _check_providers(providers: Sequence[Provider]) -> None:
    available = onnxruntime.get_available_providers()
    if not isinstance(providers, (list, tuple)) or not providers:
        raise InputError(f"providers={providers!r}: accepted is a sequence of at least one of {', '.join(available)}")
    for provider in providers:
        name = provider[0] if isinstance(provider, tuple) and provider else provider
        if name not in available:
            raise InputError(f"provider {name!r}: this onnxruntime has {', '.join(available)}")
