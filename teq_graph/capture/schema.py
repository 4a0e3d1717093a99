"""What descriptions in JSON say of a captured decoder. Imported where they are read or written: it loads pydantic."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Count = Annotated[int, Field(ge=1, lt=2**31)]


class Strict(BaseModel):
    """Takes a number for a number, nothing else for it, and nothing that it does not name."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Layer(Strict):
    """A `LayerCache`."""

    key_heads: Count
    key_dim: Count
    value_heads: Count
    value_dim: Count


class Decoder(Strict):
    """A `DecoderShape`."""

    layers: Annotated[list[Layer], Field(min_length=1)]
    vocab_size: Count
    max_positions: Count | None
    recompute_after: Count | None = None
