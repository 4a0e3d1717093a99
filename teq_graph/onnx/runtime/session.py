"""Opening exported directories with onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from teq_graph.errors import InputError, ModelFileError, one_line
from teq_graph.onnx.directory import MODEL_FILE, WRITTEN, Metadata
from teq_graph.onnx.runtime import arguments
from teq_graph.onnx.runtime.generation.device_decoding import try_step
from teq_graph.onnx.runtime.last_logits import with_chosen_logits
from teq_graph.onnx.runtime.on_device import open_on_device

Provider = str | tuple[str, dict[str, Any]]
CPU: tuple[Provider, ...] = ("CPUExecutionProvider",)

# More threads than processors gain nothing, and each takes onnxruntime tens of milliseconds to start: thousands of
# them look like a hang. Some more are let through, for a script that was written for a larger machine.
MAX_THREADS = max(64, 4 * (os.cpu_count() or 1))

_ONLY_FATAL = 4
_EXTERNAL_TENSORS = "session.model_external_initializers_file_folder_path"


def open_directory(
    directory: str | os.PathLike[str],
    providers: Sequence[Provider] = CPU,
    threads: int | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
) -> tuple[onnxruntime.InferenceSession, Metadata]:
    """Session and metadata of an exported directory.

    `providers` are onnxruntime's, most wanted first, each a name or (name, options). `threads` is the number of
    CPU threads of one operator, None leaves it to onnxruntime. `session_options` None: its defaults, without log
    lines, since what goes wrong is an exception. Raises InputError for a provider that this
    onnxruntime does not have, ModelFileError for a directory that is none or damaged.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ModelFileError(f"{path} is no directory: accepted is {WRITTEN}")
    metadata = Metadata.read(path)
    _check_providers(providers)
    options = session_options
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ONLY_FATAL
    if threads is not None:
        accepted = f"None and integers from 1 to {MAX_THREADS}"
        options.intra_op_num_threads = arguments.integer("threads", threads, 1, accepted, MAX_THREADS)
    model = path / MODEL_FILE
    if not model.is_file():
        raise ModelFileError(f"{model} is missing: accepted is {WRITTEN}")
    try:
        source: str | bytes = str(model)
        if metadata.decoder is not None and (changed := with_chosen_logits(model)) is not None:
            source = changed
        options.add_session_config_entry(_EXTERNAL_TENSORS, str(path))
        session = open_on_device(model, metadata, options, providers, try_step) or onnxruntime.InferenceSession(
            source, sess_options=options, providers=list(providers)
        )
    except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
        raise ModelFileError(f"{model} cannot be loaded: {one_line(error)}") from error
    return session, metadata


def _check_providers(providers: Sequence[Provider]) -> None:
    available = onnxruntime.get_available_providers()
    if not isinstance(providers, (list, tuple)) or not providers:
        raise InputError(f"providers={providers!r}: accepted is a sequence of at least one of {', '.join(available)}")
    for provider in providers:
        name = provider[0] if isinstance(provider, tuple) and provider else provider
        if name not in available:
            raise InputError(f"provider {name!r}: this onnxruntime has {', '.join(available)}")
