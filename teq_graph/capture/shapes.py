"""What a captured language model takes and keeps between its steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
DECODER_INPUTS = ["input_ids", "attention_mask", "past_key_values"]
ENCODED = "encoder_"
"""What the names of a decoder's inputs begin with that are inputs of its encoder, too."""
PAST, PRESENT = "past_key_values", "present"
"""What the names of cached tensors begin with, as inputs and as outputs; `DecoderShape.cache_names` follow."""
MASK, POSITIONS = "attention_mask", "position_ids"
STEP_INPUTS = ["decoder_input_ids", "past_key_values"]
"""What an encoder-decoder takes beside its encoder's inputs."""


@dataclasses.dataclass(frozen=True)
class CachedTensor:
    """One tensor `[b, *sizes]` of a layer, which a step takes and gives anew.

    A size of None is the number of positions: that axis is prolonged by a step's tokens, and empty before the first. A
    tensor without such an axis is a state, which is replaced, and zeros before the first step.
    """

    name: str
    sizes: tuple[int | None, ...]

    @property
    def growing_axis(self) -> int | None:
        """The axis of positions, counted with the batch's; None for a state."""
        return self.sizes.index(None) + 1 if None in self.sizes else None

    @property
    def numbers(self) -> int:
        """How many numbers it holds for each sequence: of each position, where it grows."""
        return math.prod(size for size in self.sizes if size is not None)

    def shape(self, batch: int, positions: int) -> tuple[int, ...]:
        """Its shape after so many positions."""
        return (batch, *(positions if size is None else size for size in self.sizes))


LayerCache = tuple[CachedTensor, ...]
"""What one layer keeps between steps."""


def counted(mask: Tensor) -> Tensor:
    """The positions of tokens [b, n] under `mask`: they begin with a text, which padding on the left does not shift."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def attention_cache(key_heads: int, key_dim: int, value_heads: int, value_dim: int) -> LayerCache:
    """Key `[b, key_heads, p, key_dim]` and value `[b, value_heads, p, value_dim]` of attention."""
    return CachedTensor("key", (key_heads, None, key_dim)), CachedTensor("value", (value_heads, None, value_dim))


def layers_of(data: Iterable[Iterable[Mapping[str, Any]]]) -> tuple[LayerCache, ...]:
    """The inverse of `dataclasses.asdict` of the cached tensors of each layer."""
    return tuple(tuple(CachedTensor(t["name"], tuple(t["sizes"])) for t in layer) for layer in data)


def _names_of(layers: Iterable[LayerCache]) -> tuple[str, ...]:
    return tuple(f"{index}.{tensor.name}" for index, layer in enumerate(layers) for tensor in layer)


@dataclasses.dataclass(frozen=True)
class DecoderShape:
    """What a caller must know to drive a captured decoder.

    `recompute_after`: sequences of more tokens are computed with other tables of angles, all their tokens anew.
    """

    layers: tuple[LayerCache, ...]
    vocab_size: int
    max_positions: int | None
    recompute_after: int | None = None

    @property
    def cached(self) -> tuple[CachedTensor, ...]:
        """The cached tensors of all layers, in order."""
        return tuple(tensor for layer in self.layers for tensor in layer)

    @property
    def cache_names(self) -> tuple[str, ...]:
        """A name for each of `cached`: its layer's number, and its own name in it."""
        return _names_of(self.layers)

    @property
    def states(self) -> bool:
        """Whether anything cached is a state, of which a step cannot be taken back."""
        return any(tensor.growing_axis is None for tensor in self.cached)

    def cached_numbers(self, positions: int) -> int:
        """How many numbers the cache holds for a sequence of so many positions."""
        return sum(tensor.numbers * (1 if tensor.growing_axis is None else positions) for tensor in self.cached)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> DecoderShape:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**data, "layers": layers_of(data["layers"])})

    def by_layer(self, tensors: Iterable[T]) -> list[tuple[T, ...]]:
        """Something for each of `cached`, in its layers."""
        each = iter(tensors)
        return [tuple(next(each) for _ in layer) for layer in self.layers]

    def past_length(self, past: Sequence[Sequence[Tensor]]) -> int | None:
        """Positions that `past` holds; None where nothing in it grows."""
        pairs = zip(self.cached, (tensor for layer in past for tensor in layer), strict=True)
        return next((held.shape[axis] for one, held in pairs if (axis := one.growing_axis) is not None), None)

    def empty_past(
        self, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> list[tuple[Tensor, ...]]:
        """A cache of no positions, for prefill."""
        return self.by_layer(torch.zeros(one.shape(batch, 0), dtype=dtype, device=device) for one in self.cached)


@dataclasses.dataclass(frozen=True)
class EncoderShape:
    """What an encoder takes and gives.

    `inputs` are the names of what it takes: of texts `input_ids` [b, n], and `attention_mask` [b, n] where the model
    takes one, which its decoder reads, too. `layers` are the keys and values `[b, heads, n, dim]` that each of the
    decoder's layers makes of its result, once for all steps; their positions are the encoder's. `vocab_size` and
    `max_positions` bound its tokens and their number; None where it takes none, or any number.
    """

    inputs: tuple[str, ...]
    layers: tuple[LayerCache, ...]
    vocab_size: int | None = None
    max_positions: int | None = None

    @property
    def cache_names(self) -> tuple[str, ...]:
        """A name for each tensor of `layers`, in order, as `DecoderShape.cache_names`."""
        return _names_of(self.layers)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EncoderShape:
        """The inverse of `dataclasses.asdict`."""
        return cls(**{**data, "inputs": tuple(data["inputs"]), "layers": layers_of(data["layers"])})


@dataclasses.dataclass(frozen=True)
class EncoderDecoderShape:
    """What a caller must know to drive a captured encoder-decoder.

    `decoder` is its step over what it has written, which begins with the token `decoder_start_token_id`; None where
    the model names none.
    """

    encoder: EncoderShape
    decoder: DecoderShape
    decoder_start_token_id: int | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> EncoderDecoderShape:
        """The inverse of `dataclasses.asdict`."""
        parts = {"encoder": EncoderShape.from_dict(data["encoder"]), "decoder": DecoderShape.from_dict(data["decoder"])}
        return cls(**{**data, **parts})

    @property
    def inputs(self) -> list[str]:
        """The names of all inputs, in order."""
        return [*self.encoder.inputs, *STEP_INPUTS]
