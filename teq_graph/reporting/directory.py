"""What a written directory says of itself, read with care: anybody may have written it."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Annotated, Any, TypeVar

import pydantic
from pydantic import BaseModel, ConfigDict, Field

from teq_graph.errors import ModelFileError, one_line
from teq_graph.report import REPORT_FILE, Report
from teq_graph.saving.schema import damaged
from teq_graph.system.directories import DESCRIPTIONS
from teq_graph.system.files import read_json, shown
from teq_graph.system.manifest import entries_of, verify_files

WRITTEN = "a directory that teq-graph quantize, export_onnx or save wrote"


Content = TypeVar("Content")


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Perplexity(_Part):
    """Perplexities of one text: of what -> value."""

    values: dict[str, float]
    text: str
    tokens: int
    context: int


class Divergence(_Part):
    """How far predictions are from those of a reference: `evaluate --reference`."""

    model: str
    kl_divergence: float
    top1_agreement: float
    tokens: int


class Evaluation(_Part):
    """What `teq-graph evaluate --json` prints for a text."""

    model: str
    runtime: str
    text: str
    tokens: int
    context: int
    perplexity: float
    reference: Divergence | None = None


class Provenance(_Part):
    """What a description says of how its directory was made. `others` is all that is only shown."""

    created: str | None = None
    source: dict[str, Any] = Field(default_factory=dict)
    command: str | None = None
    stages: tuple[str, ...] = ()
    versions: dict[str, str] = Field(default_factory=dict)
    processor: str | None = None
    perplexity: Perplexity | None = None
    quantization: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    calibration: dict[str, Any] | None = None


class AttentionRefusal(_Part):
    """An attention that is not one operator, or not whole."""

    node: str
    reason: str
    is_fused: bool = False


class Attention(_Part):
    """What became of a decoder's attentions in ONNX."""

    fused: Annotated[int, Field(ge=0)]
    refusals: tuple[AttentionRefusal, ...] = ()


class _Description(_Part):
    provenance: Provenance = Provenance()


class _ReportFile(_Part):
    attention: Attention | None = None


@dataclasses.dataclass(frozen=True)
class ReportedDirectory:
    """A directory of ours, but for its model. `files` are sizes in bytes by name."""

    path: Path
    report: Report
    provenance: Provenance
    attention: Attention | None
    files: dict[str, int]


def read_directory(path: Path) -> ReportedDirectory:
    """What `path` says. Raises ModelFileError where it is none of ours, has no report, or was damaged since."""
    if not path.is_dir():
        what = "is no directory" if os.path.lexists(path) else "is missing"
        raise ModelFileError(f"{shown(path)} {what}: accepted is {WRITTEN}")
    description = next((name for name in DESCRIPTIONS if os.path.lexists(path / name)), None)
    if description is None:
        raise ModelFileError(f"{shown(path)} has no {' or '.join(DESCRIPTIONS)}: accepted is {WRITTEN}")
    if not os.path.lexists(path / REPORT_FILE):
        raise ModelFileError(f"{shown(path / REPORT_FILE)} is missing: accepted is {WRITTEN}")
    verify_files(path, description, (REPORT_FILE,))
    said, reported = _read(path / description), _read(path / REPORT_FILE)
    try:
        files = entries_of(said)
    except ValueError as error:
        raise ModelFileError(f"{shown(path / description)} is damaged: {error}") from None
    if "weights" not in reported:
        raise ModelFileError(f"{shown(path / REPORT_FILE)} holds no report: the model was exported without one")
    return ReportedDirectory(
        path,
        _parsed(pydantic.TypeAdapter(Report), reported, path / REPORT_FILE),
        _parsed(pydantic.TypeAdapter(_Description), said, path / description).provenance,
        _parsed(pydantic.TypeAdapter(_ReportFile), reported, path / REPORT_FILE).attention,
        {name: entry.bytes for name, entry in files.items()},
    )


def read_evaluation(path: Path) -> Evaluation:
    """What `teq-graph evaluate --json` printed into a file; raises ModelFileError where that is something else."""
    return _parsed(pydantic.TypeAdapter(Evaluation), _read(path), path)


def _read(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{shown(path)} cannot be read: {one_line(error)}") from None


def _parsed(kind: pydantic.TypeAdapter[Content], data: dict[str, Any], path: Path) -> Content:
    try:
        return kind.validate_python(data)
    except pydantic.ValidationError as error:
        raise damaged(path, error) from None
