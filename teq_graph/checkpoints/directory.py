"""Writes a Hugging Face directory, whole or not at all."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teq_graph.capture import check_model
from teq_graph.capture.pretrained import is_pretrained
from teq_graph.checkpoints import FORMAT_VERSION
from teq_graph.config import DTYPES, check_choice, check_type
from teq_graph.errors import InputError, NumericsError, brief, one_line
from teq_graph.loading import quiet_transformers
from teq_graph.provenance import provenance as known
from teq_graph.system.directories import CHECKPOINT, new_directory
from teq_graph.system.files import write_json


def save_float(
    model: Any,
    directory: str | os.PathLike[str],
    tokenizer: Any = None,
    dtype: str | None = None,
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write a float model of transformers, as `transform` gives it, to `directory` with its tokenizer.

    Names, tied weights and shards are as `save_pretrained` has them. `dtype`: of what is written, None the model's own;
    `model` is left as it is. Raises NumericsError for a weight that the dtype does not hold, ExportError where the
    directory cannot be written; nothing is left behind then.
    """
    check_pretrained(model)
    if dtype is not None:
        check_choice("dtype", dtype, DTYPES)
        if model.dtype != (wanted := getattr(torch, dtype)):
            model = copy.deepcopy(model).to(wanted)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise NumericsError(f"{name}: some of its values are outside of {kind}; accepted is a wider dtype")
    return write_directory(model, model.state_dict(), directory, tokenizer, overwrite, {"format": "float"}, provenance)


def write_directory(
    model: Any,
    state: dict[str, Tensor],
    directory: str | os.PathLike[str],
    tokenizer: Any,
    overwrite: bool,
    description: Mapping[str, Any],
    provenance: Mapping[str, Any] | None,
) -> Path:
    """Write the tensors of `state` with the configuration of `model`."""
    check_type("directory", directory, (str, os.PathLike), "a path")
    check_type("overwrite", overwrite, bool, "True or False")
    from safetensors import SafetensorError

    target = Path(directory)
    with new_directory(target, overwrite, CHECKPOINT) as staging:
        with quiet_transformers():
            try:
                model.save_pretrained(staging, state_dict=state)
            except SafetensorError as error:  # a full disk is no OSError there
                raise OSError(one_line(error)) from error
            if tokenizer is not None:
                tokenizer.save_pretrained(staging)
        for file in staging.glob("*.safetensors"):
            # safetensors makes files for the owner alone; these are as readable as their folder.
            file.chmod(staging.stat().st_mode & 0o666)
        origin = {**known(None, model.config), **(provenance or {})}
        write_json(staging / CHECKPOINT, {"format_version": FORMAT_VERSION, **description, "provenance": origin})
    return target


def check_pretrained(model: Any) -> None:
    """Raise InputError for what is no model of transformers, CaptureError for one in a state that is not accepted."""
    check_model(model)
    if not is_pretrained(model):
        raise InputError(f"model={brief(type(model).__name__)}: accepted is a model of transformers")
