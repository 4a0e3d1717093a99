"""What Hugging Face models tell about their own inputs; the KV cache as arguments and results."""

from __future__ import annotations

import contextlib
import inspect
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teq_graph.capture.captured import DecoderShape, LayerCache, float_dtype, magnitude
from teq_graph.errors import CaptureError, one_line

# Sizes of the example inputs. Sizes 0 and 1 would be specialised by torch.export, and equal sizes could be
# mistaken for one another by a reader of the graph.
BATCH, PAST, SEQUENCE = 2, 3, 4


class DecoderStep(nn.Module):
    """One step of a causal language model over a KV cache of any length, as one traceable function.

    With `counts_positions` the model is told each token's position; otherwise it finds them itself.
    """

    def __init__(self, model: nn.Module, counts_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.counts_positions = counts_positions

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
        positions = {}
        if self.counts_positions:
            # Counted over the mask, so that left padding does not shift them.
            counted = (attention_mask.cumsum(-1) - 1).clamp(min=0)
            positions["position_ids"] = counted[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{_cache_argument(self.model): _cache_of(past)},
            **positions,
        )
        return output.logits, [(layer.keys, layer.values) for layer in _cache_in(output).layers]


def is_pretrained(model: nn.Module) -> bool:
    # A Hugging Face model cannot exist without its library having been imported.
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """While a Hugging Face model's configs say that it returns no cache where its caller does not ask for one.

    The cache is an object with a state of its own, which is no value of a graph.
    """
    found: list[Any] = [getattr(module, "config", None) for module in model.modules()] if is_pretrained(model) else []
    configs = {id(config): config for config in found if getattr(config, "use_cache", None) is True}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


def call(model: nn.Module, what: str, *args: Any, **kwargs: Any) -> Any:
    """What `model` gives without gradients; raises CaptureError, with its class and `what` it was given, where it
    fails."""
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            return model(*args, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's Python raises
        name = type(model.model if isinstance(model, DecoderStep) else model).__name__
        raise CaptureError(f"{name} fails on {what}: {one_line(error)}") from error


def _cache_of(past: Sequence[tuple[Tensor, Tensor]]) -> Any:
    """A growing cache that holds `past`, whatever window the model's own cache would keep: the mask decides."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache()
    for key, value in past:
        layer = DynamicLayer()
        layer.lazy_initialization(key, value)
        layer.keys, layer.values = key, value
        cache.layers.append(layer)
    return cache


# What transformers calls the KV cache from 5.24 on, and before.
_CACHE_NAMES = ("cache", "past_key_values")


def _cache_argument(model: nn.Module) -> str:
    """The name by which the model takes a KV cache."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_NAMES if name in accepted), _CACHE_NAMES[-1])


def _cache_in(output: Any) -> Any:
    """The KV cache among a model's results; None where there is none."""
    return next((output[name] for name in _CACHE_NAMES if output.get(name) is not None), None)


def probe_decoder(model: Any) -> DecoderShape | None:
    """Run two tokens to see which KV cache the model keeps; None if it is no decoder-only language model."""
    if not model.can_generate() or model.config.is_encoder_decoder or model.main_input_name != "input_ids":
        return None
    tokens = torch.ones(1, 2, dtype=torch.long, device=_device(model))
    output = call(model, "two tokens", input_ids=tokens, use_cache=True)
    layers = getattr(_cache_in(output), "layers", None)
    if not layers or not all(isinstance(getattr(layer, "values", None), Tensor) for layer in layers):
        return None
    shapes = [(*layer.keys.shape[1::2], *layer.values.shape[1::2]) for layer in layers]
    config = model.config.get_text_config()
    return DecoderShape(
        layers=tuple(LayerCache(*shape) for shape in shapes),
        vocab_size=output.logits.shape[-1],
        max_positions=getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None),
    )


def counts_positions(model: Any, shape: DecoderShape) -> bool:
    """Whether the model takes positions, and counts them from 0 as `DecoderStep` does; some begin elsewhere."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    (tokens, mask, _), _ = decoder_inputs(model, shape)
    past = shape.empty_past(BATCH, float_dtype(model), _device(model))
    told, own = (
        call(DecoderStep(model, told), "an empty cache", tokens, mask[:, :SEQUENCE], past)[0] for told in (True, False)
    )
    return torch.allclose(told.float(), own.float(), rtol=0, atol=1e-3 * magnitude(own), equal_nan=True)


def decoder_inputs(model: nn.Module, shape: DecoderShape) -> tuple[tuple[Any, ...], Any]:
    """Example arguments and dynamic shapes of a `DecoderStep`."""
    device, dtype = _device(model), float_dtype(model)
    generator = torch.Generator().manual_seed(0)
    past = []
    for layer in shape.layers:
        key, value = (torch.randn(BATCH, heads, PAST, dim, generator=generator) for heads, dim in layer.sizes)
        past.append((key.to(device, dtype), value.to(device, dtype)))
    tokens = torch.randint(0, shape.vocab_size, (BATCH, SEQUENCE), generator=generator).to(device)
    mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.long, device=device)
    dynamic = torch.export.Dim.DYNAMIC
    cached = {0: dynamic, 2: dynamic}
    dynamic_shapes = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}, [(cached, cached)] * len(past))
    return (tokens, mask, past), dynamic_shapes


def inputs_from_config(model: Any) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Example inputs and dynamic shapes of a Hugging Face model that is no decoder."""
    config, device, dtype = model.config, _device(model), float_dtype(model)
    accepted = inspect.signature(model.forward).parameters
    dynamic = torch.export.Dim.DYNAMIC
    generator = torch.Generator().manual_seed(0)
    kwargs: dict[str, Any] = {}
    shapes: dict[str, Any] = {}
    if model.main_input_name == "pixel_values":
        size, channels = getattr(config, "image_size", None), getattr(config, "num_channels", None)
        if size is None or channels is None:
            raise CaptureError(
                f"example_inputs=None: the config of {type(model).__name__} has no image_size and num_channels; "
                "accepted is a tuple or dict as for torch.export"
            )
        height, width = (size, size) if isinstance(size, int) else size
        pixels = torch.randn(BATCH, channels, height, width, generator=generator)
        kwargs["pixel_values"], shapes["pixel_values"] = pixels.to(device, dtype), {0: dynamic}
    elif model.main_input_name == "input_ids":
        names = ["input_ids", "attention_mask"]
        if config.is_encoder_decoder:
            names.append("decoder_input_ids")
        for name, length in zip(names, (SEQUENCE + 1, SEQUENCE + 1, SEQUENCE), strict=False):
            if name not in accepted:
                continue
            tokens = torch.randint(0, config.get_text_config().vocab_size, (BATCH, length), generator=generator)
            kwargs[name] = torch.ones_like(tokens) if name == "attention_mask" else tokens
            kwargs[name] = kwargs[name].to(device)
            shapes[name] = {0: dynamic, 1: dynamic}
    else:
        raise CaptureError(
            f"example_inputs=None: no inputs are made for {model.main_input_name!r} (made are input_ids and "
            "pixel_values); accepted is a tuple or dict as for torch.export"
        )
    if "use_cache" in accepted:
        kwargs["use_cache"], shapes["use_cache"] = False, None
    return (), kwargs, shapes


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
