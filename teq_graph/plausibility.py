"""What would take minutes before it fails: layers without number, weights that no file fills, a silent hub."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from teq_graph.errors import ModelFileError, brief

MOST_LAYERS = 10_000
HUB_PATIENCE = 5.0
"""Seconds for the hub to say anything at all; HF_HUB_ETAG_TIMEOUT of the environment comes first."""

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def check_layers(source: str, config: object) -> None:
    """Refuse a count of layers, anywhere in a configuration as its file has it, that no model has.

    Of what a configuration can say, it alone is turned into that many objects before any weight is looked at.
    """
    for name, value in config.items() if isinstance(config, Mapping) else ():
        if "layer" in str(name) and isinstance(value, int) and value > MOST_LAYERS:
            raise ModelFileError(f"model {source!r}: {name}={brief(value)}: accepted are up to {MOST_LAYERS}")
        check_layers(source, value)


@contextlib.contextmanager
def no_more_weights_than_files(source: str, directory: str, gguf_file: str | None = None) -> Iterator[None]:
    """Stop the making of a model, which takes its time before anything is read, once no files can fill it.

    A weight is at least one byte, in GGUF a bit, and a tied one is made twice. `directory` can be a hub id, whose files
    are in the cache by the time that the first weight is made.
    """
    thread = threading.get_ident()
    made, most = 0, -1

    def count(_module: torch.nn.Module, _name: str, parameter: torch.nn.Parameter | None) -> None:
        nonlocal made, most
        if parameter is None or threading.get_ident() != thread:
            return
        if most < 0:
            most = 2**20 + (16 if gguf_file else 2) * _bytes_of(directory, gguf_file)
        made += parameter.numel()
        if made > most:
            raise ModelFileError(f"model {source!r}: its configuration describes far more weights than its files hold")

    handle = torch.nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _bytes_of(directory: str, gguf_file: str | None) -> int:
    folder = Path(directory)
    if gguf_file is not None:
        return (folder / gguf_file).stat().st_size
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        folder = Path(str(try_to_load_from_cache(directory, "config.json"))).parent
    return sum(file.stat().st_size for file in folder.rglob("*") if file.suffix in _WEIGHTS)


def hub_answers(model_id: str) -> bool:
    """Whether the hub says anything about a model in a few seconds: where it does not, its client asks for half a
    minute, and once more for each file that the cache does not have."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    try:
        patience = float(os.environ["HF_HUB_ETAG_TIMEOUT"])
    except (KeyError, ValueError):
        patience = HUB_PATIENCE
    answers = threading.Event()

    def ask() -> None:
        with contextlib.suppress(Exception):  # of the network, and of the client's mode without one
            with contextlib.suppress(HfHubHTTPError):  # an answer, too
                get_hf_file_metadata(hf_hub_url(model_id, "config.json"), timeout=patience)
            answers.set()

    # On a thread: looking up a name takes as long as the system likes.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(patience)
    return answers.is_set()
