"""What descriptions in JSON say of a captured decoder. Imported where they are read or written: it loads pydantic."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator

Count = Annotated[int, Field(ge=1, lt=2**31)]


class Strict(BaseModel):
    """Takes a number for a number, nothing else for it, and nothing that it does not name."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Cached(Strict):
    """A `CachedTensor`; a size of null is the number of positions, which one axis at most has."""

    name: Annotated[str, Field(pattern=r"^[a-z_.]{1,40}$")]
    sizes: Annotated[list[Count | None], Field(min_length=1, max_length=7)]

    @field_validator("sizes")
    @classmethod
    def _one_axis_grows(cls, sizes: list[int | None]) -> list[int | None]:
        if sizes.count(None) > 1:
            raise ValueError("one size at most is null")
        return sizes


class Encoder(Strict):
    """An `EncoderShape`."""

    inputs: Annotated[list[Annotated[str, Field(pattern=r"^[a-z_]{1,40}$")]], Field(min_length=1, max_length=8)]
    layers: Annotated[list[list[Cached]], Field(min_length=1)]
    vocab_size: Count | None
    max_positions: Count | None


class Decoder(Strict):
    """A `DecoderShape`."""

    layers: Annotated[list[list[Cached]], Field(min_length=1)]
    vocab_size: Count
    max_positions: Count | None
    recompute_after: Count | None = None
