"""Opening exported directories with onnxruntime."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from teq_graph.errors import InputError, ModelFileError
from teq_graph.files import one_line
from teq_graph.onnx.directory import MODEL_FILE, Metadata

Provider = str | tuple[str, dict[str, Any]]
CPU: tuple[Provider, ...] = ("CPUExecutionProvider",)


def open_directory(
    directory: str | os.PathLike[str],
    providers: Sequence[Provider] = CPU,
    threads: int | None = None,
    session_options: onnxruntime.SessionOptions | None = None,
) -> tuple[onnxruntime.InferenceSession, Metadata]:
    """Session and metadata of an exported directory.

    `providers` are onnxruntime's, most wanted first, each a name or (name, options). `threads` is the number of
    CPU threads of one operator, None leaves it to onnxruntime. Raises InputError for a provider that this
    onnxruntime does not have, ModelFileError for a directory that is none or damaged.
    """
    path = Path(directory)
    if not path.is_dir():
        raise ModelFileError(f"{path} is no directory: accepted is a directory written by export_onnx")
    metadata = Metadata.read(path)
    _check_providers(providers)
    options = session_options if session_options is not None else onnxruntime.SessionOptions()
    if threads is not None:
        if threads < 1:
            raise InputError(f"threads={threads!r}: accepted are None and integers >= 1")
        options.intra_op_num_threads = threads
    model = path / MODEL_FILE
    if not model.is_file():
        raise ModelFileError(f"{model} is missing: accepted is a directory written by export_onnx")
    try:
        session = onnxruntime.InferenceSession(str(model), sess_options=options, providers=list(providers))
    except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
        raise ModelFileError(f"{model} cannot be loaded: {one_line(error)}") from error
    return session, metadata


def _check_providers(providers: Sequence[Provider]) -> None:
    available = onnxruntime.get_available_providers()
    if isinstance(providers, str) or not providers:
        raise InputError(f"providers={providers!r}: accepted is a sequence of at least one of {', '.join(available)}")
    for provider in providers:
        name = provider if isinstance(provider, str) else provider[0]
        if name not in available:
            raise InputError(f"provider {name!r}: this onnxruntime has {', '.join(available)}")
