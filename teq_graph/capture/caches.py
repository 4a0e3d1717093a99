"""The cache objects of Hugging Face models, and what they hold as tensors by layer."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teq_graph.capture.kernels import read_state
from teq_graph.capture.shapes import CachedTensor, LayerCache

_NAMES = ("cache", "past_key_values", "cache_params")
"""What transformers calls the cache: from 5.24 on, before, and where all of it are states."""

_GROWING = {"key": ("keys", 2), "value": ("values", 2), "indexer_key": ("indexer_keys", 1)}
"""Attributes, and axes of positions. What chooses the positions to attend to has one key for all heads."""
_STATES = {"conv_state": "conv_states", "recurrent_state": "recurrent_states"}


def cache_argument(model: nn.Module) -> str:
    """The name by which the model takes a cache."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in _NAMES if name in accepted), "past_key_values")


def cache_in(output: Any) -> Any:
    """The cache among a model's results; None where there is none."""
    return next((output[name] for name in _NAMES if output.get(name) is not None), None)


def describe(cache: Any) -> tuple[LayerCache, ...] | None:
    """What the layers of a cache hold, after some tokens of one sequence; None where that is not known.

    A class of a model's own holds more than its layers say.
    """
    if type(cache).__module__ != "transformers.cache_utils":
        return None
    layers = []
    for layer in getattr(cache, "layers", None) or ():
        held = tensors_of(layer)
        if held is None or any(tensor.shape[0] != 1 for tensor in held.values()):
            return None
        if any(held[name].dim() != axis + 2 for name, (_, axis) in _GROWING.items() if name in held):
            return None
        layers.append(tuple(CachedTensor(name, _sizes(name, tensor)) for name, tensor in held.items()))
    return tuple(layers) if any(layers) else None


def _sizes(name: str, tensor: Tensor) -> tuple[int | None, ...]:
    """The sizes of a cached tensor but for the batch's, without the number of its positions."""
    _, positions = _GROWING.get(name, (name, None))
    return tuple(None if axis == positions else size for axis, size in enumerate(tensor.shape[1:], 1))


def described(cache: Any, name: str) -> tuple[LayerCache, ...] | None:
    """As `describe`, with `name` before those of the tensors, of which every layer has some."""
    layers = describe(cache)
    if layers is None or not all(layers):
        return None
    return tuple(tuple(dataclasses.replace(one, name=f"{name}.{one.name}") for one in layer) for layer in layers)


def tensors_of(layer: Any) -> dict[str, Tensor] | None:
    """The tensors that one layer of a cache holds, by name; None where it holds others.

    A layer of a model whose other layers have caches may hold nothing at all, as attention over images without one.
    """
    if not getattr(layer, "is_initialized", True):
        return {}
    found = {name: getattr(layer, attribute, None) for name, (attribute, _) in _GROWING.items()}
    held: dict[str, Any] = {name: value for name, value in found.items() if value is not None}
    for name, attribute in _STATES.items():
        states = getattr(layer, attribute, None)
        if isinstance(states, Mapping):
            kept = {index: state for index, state in states.items() if state is not None}
            held |= {f"{name}_{index}" if index else name: state for index, state in kept.items()}
        elif states is not None:
            return None
    return held if all(isinstance(value, Tensor) for value in held.values()) else None


def cache_of(layers: Sequence[LayerCache], past: Sequence[Sequence[Tensor]]) -> Any:
    """A cache that holds `past`; whatever window the model's own cache would keep, it grows: the mask decides."""
    cache = _readable()()
    for layer, tensors in zip(layers, past, strict=True):
        names = (one.name.rpartition(".")[2] for one in layer)
        cache.layers.append(_filled(dict(zip(names, tensors, strict=True))))
    return cache


@functools.cache
def _readable() -> type[Any]:
    """A cache that tells which of its states a layer goes on from."""
    from transformers.cache_utils import DynamicCache

    class Readable(DynamicCache):  # type: ignore[misc]  # transformers has no types here
        def get_recurrent_state(self, *args: Any, **kwargs: Any) -> Tensor | None:
            state: Tensor | None = super().get_recurrent_state(*args, **kwargs)
            if state is not None:
                read_state(state)
            return state

    return Readable


def encoder_decoder_cache(past: Any, layers: int) -> Any:
    """A cache of both attentions of a decoder that has seen `past`, and has yet to look at what it decodes."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    encoded = DynamicCache()
    encoded.layers += [_written_once()() for _ in range(layers)]
    return EncoderDecoderCache(past, encoded)


def empty_encoder_decoder_cache() -> Any:
    """A cache that holds nothing, for a model that fills the one it is given."""
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache

    return EncoderDecoderCache(DynamicCache(), DynamicCache())


@functools.cache
def _written_once() -> type[Any]:
    """A layer that holds the keys and values it is given, where transformers' own appends them to none."""
    from transformers.cache_utils import DynamicLayer

    class WrittenOnce(DynamicLayer):  # type: ignore[misc]  # transformers has no types here
        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states

    return WrittenOnce


def _filled(held: Mapping[str, Tensor]) -> Any:
    from transformers import cache_utils

    states = {name: tensor for name, tensor in held.items() if name not in _GROWING}
    if not held:
        layer = cache_utils.DummyLayer()
        layer.is_initialized = False  # attention over images, without one, looks here for those of the last step
        return layer
    if not states:
        layer = cache_utils.DynamicLayer()
        if "indexer_key" in held:
            layer = cache_utils.DynamicIndexedLayer()
            layer.lazy_initialization_indexer(held["indexer_key"])
            layer.indexer_keys = held["indexer_key"]
    else:
        alone, beside_attention = _layers_with_states()
        numbers = {name: int(name.rpartition("_")[2]) if name[-1].isdigit() else 0 for name in states}
        layer = (alone if len(states) == len(held) else beside_attention)(number_of_states=max(numbers.values()) + 1)
        for name, state in states.items():
            number = numbers[name]
            attribute = next(value for key, value in _STATES.items() if name.startswith(key))
            getattr(layer, attribute)[number] = state
            layer.has_previous_state[number] = True
    if len(states) < len(held):
        cache_utils.DynamicLayer.lazy_initialization(layer, held["key"], held["value"])
        layer.keys, layer.values = held["key"], held["value"]
    return layer


@functools.cache
def _layers_with_states() -> tuple[type[Any], type[Any]]:
    """Layers of a cache that put new states in the place of the old, which transformers' own write into.

    In a graph of values no tensor changes. Zeros are what a state begins with, so that they serve the first step too.
    """
    from transformers.cache_utils import LinearAttentionAndFullAttentionLayer, LinearAttentionLayer

    class States(LinearAttentionLayer):  # type: ignore[misc]  # transformers has no types here
        def update_conv_state(self, conv_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
            known = self.conv_states[state_idx]
            assert known is not None
            seen = torch.cat([known, conv_states], dim=-1)
            self.conv_states[state_idx] = seen[..., -known.shape[-1] :]
            return seen

        def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **_: Any) -> Tensor:
            self.recurrent_states[state_idx] = recurrent_states
            return recurrent_states

    class StatesBesideAttention(States, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc]
        pass

    return States, StatesBesideAttention
