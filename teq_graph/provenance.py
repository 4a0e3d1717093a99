"""What a quantized model is made of and by: written into the descriptions of saved and exported directories."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from teq_graph.config import QuantizationConfig, TrainingConfig
from teq_graph.loading import LoadedModel, source_files
from teq_graph.report import Report
from teq_graph.system.manifest import FileEntry

_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime")


def provenance(report: Report | None, config: Any = None) -> dict[str, Any]:
    """What is known of every compiled model, as plain data for JSON.

    "created" (UTC), "source" (from the Hugging Face `config`), what `settings` gives, "versions" and "processor".
    """
    return {
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "source": _source_of_config(config),
        **(report.settings if report is not None else {}),
        "versions": _versions(),
        "processor": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def settings(
    quantization: QuantizationConfig, training: TrainingConfig | None, stages: tuple[str, ...], calibration: Any
) -> dict[str, Any]:
    """How a model was compiled, as plain data for JSON: the configurations, and what was calibrated on."""
    content = {
        "quantization": quantization,
        "training": training,
        "stages": stages,
        "seed": None if training is None else training.seed,
        "calibration": None if training is None else _describe_calibration(calibration),
    }
    plain: dict[str, Any] = json.loads(json.dumps(content, default=dataclasses.asdict))
    return plain


def describe_source(loaded: LoadedModel, given: str) -> dict[str, Any]:
    """The model that the user called `given`: its name, the SHA-256 of its weights and config, and what it says itself.

    A model of the hub has its "revision"; "license" is that of its own card or GGUF file.
    """
    files = source_files(given, loaded.model.config)
    source: dict[str, Any] = {"name": loaded.name, "given": given}
    if (revision := getattr(loaded.model.config, "_commit_hash", None)) is not None:
        source["revision"] = revision
    if (license := _license(files)) is not None:  # noqa: A001
        source["license"] = license
    return {**source, "sha256": {file.name: FileEntry.of(file).sha256 for file in files}}


def _source_of_config(config: Any) -> dict[str, Any]:
    given = str(getattr(config, "_name_or_path", "") or "")
    source = {"name": os.path.basename(given) or str(getattr(config, "model_type", "") or "unknown")}
    if given and not os.path.isabs(given) and not os.path.exists(given):
        source["given"] = given
    return source


def _versions() -> dict[str, str]:
    from teq_graph import __version__

    found = {"teq_graph": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def _describe_calibration(calibration: Any) -> Mapping[str, str]:
    if calibration is None:
        return {"kind": "text that the model wrote"}
    if not isinstance(calibration, str | Path):
        return {"kind": f"given as a {type(calibration).__name__}"}
    path = Path(calibration).expanduser()
    if path.is_file():
        return {"kind": "file", "name": path.name, "sha256": FileEntry.of(path).sha256}
    return {"kind": "data set", "name": str(calibration)}


def _license(files: list[Path]) -> str | None:
    import huggingface_hub

    for file in files:
        if file.suffix == ".gguf":
            import gguf

            field = gguf.GGUFReader(str(file)).fields.get("general.license")
            return None if field is None else str(field.contents())
        if (card := file.parent / "README.md").is_file():
            with contextlib.suppress(Exception):  # a card is of people, and no reason to fail
                found = (huggingface_hub.metadata_load(card) or {}).get("license")
                return found if isinstance(found, str) else None
    return None
