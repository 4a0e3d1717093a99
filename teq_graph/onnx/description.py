"""What `teq_graph.json` may say: types and bounds of every value in it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from teq_graph.capture.schema import Count, Decoder, Encoder, Strict
from teq_graph.config import ACCURACY_LEVELS

Token = Annotated[int, Field(ge=0, lt=2**31)]


class _Description(Strict):
    """The fields of `Metadata`, and what else stands in the file; `system.manifest` reads the list of files."""

    dtype: Literal["float32", "float16", "bfloat16"]
    accuracy_level: Annotated[int, Field(ge=min(ACCURACY_LEVELS), le=max(ACCURACY_LEVELS))]
    opset: Annotated[int, Field(ge=1, le=1000)]
    decoder: Decoder | None
    weights: dict[str, Count]
    eos_token_ids: list[Token]
    pad_token_id: Token | None
    shared_buffers: bool
    encoder: Encoder | None = None
    decoder_start_token_id: Token | None = None
    provenance: dict[str, Any]
    format_version: int
    files: dict[str, Any] = Field(default_factory=dict)


def validated(content: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Metadata` that `content` holds; raises ValueError, with the first value that is wrong."""
    try:
        values = _Description.model_validate(content).model_dump(exclude={"format_version", "files"})
    except ValidationError as error:
        raise ValueError(first_fault(error)) from None
    return {**values, "eos_token_ids": tuple(values["eos_token_ids"])}


def first_fault(error: ValidationError) -> str:
    """The first value of a file that is wrong, and why."""
    first = error.errors(include_url=False)[0]
    place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
    return f"{place} is missing" if first["type"] == "missing" else f"{place}={first['input']!r:.80}: {first['msg']}"
