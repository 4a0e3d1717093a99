"""What Hugging Face models tell about their own inputs; a decoder's cache as arguments and results."""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from teq_graph.capture.caches import (
    cache_argument,
    cache_in,
    cache_of,
    describe,
    described,
    empty_encoder_decoder_cache,
    encoder_decoder_cache,
    tensors_of,
)
from teq_graph.capture.captured import float_dtype, magnitude
from teq_graph.capture.features import MADE, Shape, choices, feature_shapes
from teq_graph.capture.kernels import ignores_states
from teq_graph.capture.shapes import POSITIONS, DecoderShape, EncoderDecoderShape, EncoderShape, LayerCache, counted
from teq_graph.errors import CaptureError, one_line
from teq_graph.system.quiet import quiet

# Sizes of the example inputs. Sizes 0 and 1 would be specialised by torch.export, and equal sizes could be
# mistaken for one another by a reader of the graph.
BATCH, PAST, SEQUENCE = 2, 3, 4
_NO_ENCODER_INPUTS = {
    "decoder_input_ids": ("decoder_input_ids", "use_cache"),
    "input_ids": ("input_ids", "attention_mask", "use_cache"),
}
"""What is no input of the encoder, by what the model calls the tokens that its decoder has written."""


class DecoderStep(nn.Module):
    """One step of a causal language model over a cache of any length, as one traceable function.

    With `counts_positions` the model is told each token's position; otherwise it finds them itself. A model whose own
    Python ignores states where several tokens follow them takes these one by one, but where the step is traced.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerCache], counts_positions: bool) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.counts_positions = counts_positions
        self.one_by_one = ignores_states(model)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[tuple[Tensor, ...]]
    ) -> tuple[Tensor, Sequence[tuple[Tensor, ...]]]:
        if not self.one_by_one or torch.compiler.is_exporting() or not any(x.any() for layer in past for x in layer):
            return self._compute(input_ids, attention_mask, past)
        # transformers writes into the states of one token.
        present: Sequence[tuple[Tensor, ...]] = [tuple(held.clone() for held in layer) for layer in past]
        before, logits = attention_mask.shape[1] - input_ids.shape[1], []
        for index, token in enumerate(input_ids.split(1, dim=1)):
            one, present = self._compute(token, attention_mask[:, : before + index + 1], present)
            logits.append(one)
        return torch.cat(logits, dim=1), present

    def _compute(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[tuple[Tensor, ...]]
    ) -> tuple[Tensor, Sequence[tuple[Tensor, ...]]]:
        positions = {}
        if self.counts_positions:
            positions[POSITIONS] = counted(attention_mask)[:, -input_ids.shape[1] :]
        if not any(one.growing_axis for layer in self.layers for one in layer):
            # States hide what came before.
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{cache_argument(self.model): cache_of(self.layers, past)},
            **positions,
        )
        present = []
        for layer, result in zip(past, cache_in(output).layers, strict=True):
            held = zip(layer, (tensors_of(result) or {}).values(), strict=True)
            # A state that is computed in another type is kept in that of the cache.
            present.append(tuple(new if new.dtype == old.dtype else new.to(old.dtype) for old, new in held))
        return output.logits, present


class EncoderDecoderStep(nn.Module):
    """An encoder and one step of its decoder over a cache of any length, as one traceable function.

    What the decoder reads of the encoder are the keys and values that each layer makes of its result: they are
    results, too, so that the graph can be cut there.
    """

    def __init__(self, model: nn.Module, layers: Sequence[LayerCache]) -> None:
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(
        self, encoder: Mapping[str, Tensor], decoder_input_ids: Tensor, past: Sequence[tuple[Tensor, ...]]
    ) -> tuple[Tensor, list[tuple[Tensor, ...]], list[tuple[Tensor, ...]]]:
        cache = encoder_decoder_cache(cache_of(self.layers, past), len(self.layers))
        written = {_written_argument(self.model) or "decoder_input_ids": decoder_input_ids}
        output = self.model(**encoder, **written, use_cache=True, **{cache_argument(self.model): cache})
        present, encoded = (
            [tuple((tensors_of(layer) or {}).values()) for layer in part.layers]
            for part in (cache.self_attention_cache, cache.cross_attention_cache)
        )
        return output.logits, present, encoded


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
        with torch.no_grad(), quiet("transformers.integrations.hub_kernels"):
            return model(*args, **kwargs)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model's Python raises
        raise CaptureError(f"{name_of(model)} fails on {what}: {one_line(error)}") from error


def name_of(model: nn.Module) -> str:
    """The class of the user's model."""
    return type(model.model if isinstance(model, DecoderStep | EncoderDecoderStep) else model).__name__


def probe_decoder(model: Any) -> DecoderShape | None:
    """Run two tokens to see which KV cache the model keeps; None if it is no decoder-only language model."""
    if not generates_text(model):
        return None
    tokens = torch.ones(1, 2, dtype=torch.long, device=_device(model))
    output = call(model, "two tokens", input_ids=tokens, use_cache=True)
    layers = describe(cache_in(output))
    if layers is None:
        return None
    return DecoderShape(layers=layers, vocab_size=output.logits.shape[-1], max_positions=longest_text(model))


def probe_encoder_decoder(model: Any) -> EncoderDecoderShape | None:
    """Decode two tokens to see which KV caches the model keeps; None if it is no such model, or keeps others."""
    written = _written_argument(model)
    if written is None:
        return None
    (_, kwargs, _), device = inputs_from_config(model), _device(model)
    inputs = {name: kwargs[name] for name in kwargs if name not in _NO_ENCODER_INPUTS[written]}
    tokens = torch.ones(1, 2, dtype=torch.long, device=device)
    given: dict[str, Any] = {name: value[:1] for name, value in inputs.items()} | {written: tokens, "use_cache": True}
    if model.config.is_encoder_decoder:
        output = call(model, "two tokens", **given)
        cache = cache_in(output)
    else:
        # What it returns has no cache: the one that it is given is filled, if its decoder takes it.
        cache = empty_encoder_decoder_cache()
        try:
            output = call(model, "a cache", **given, **{cache_argument(model): cache})
        except CaptureError:
            return None
    caches = (getattr(cache, f"{name}_attention_cache", None) for name in ("self", "cross"))
    own, encoded = map(described, caches, ("decoder", "encoder"))
    if own is None or encoded is None:
        return None
    text = model.main_input_name == "input_ids"
    starts = (getattr(model.generation_config, f"{name}_token_id", None) for name in ("decoder_start", "bos"))
    return EncoderDecoderShape(
        EncoderShape(
            tuple(inputs),
            encoded,
            vocab_size=model.get_input_embeddings().weight.shape[0] if text else None,
            max_positions=longest_text(model) if text else None,
        ),
        DecoderShape(own, vocab_size=output.logits.shape[-1], max_positions=longest_text(model)),
        next((start for start in starts if start is not None), None),
    )


def _written_argument(model: Any) -> str | None:
    """What the decoder of an encoder-decoder calls the tokens it has written; None of other models.

    A model whose main input is no text, and that takes text beside it, is an encoder-decoder by another name.
    """
    if not model.can_generate():
        return None
    if model.config.is_encoder_decoder:
        return "decoder_input_ids"
    beside = model.main_input_name != "input_ids" and "input_ids" in inspect.signature(model.forward).parameters
    return "input_ids" if beside else None


def generates_text(model: Any) -> bool:
    """Whether it is a decoder-only language model."""
    found: bool = model.can_generate() and not model.config.is_encoder_decoder and model.main_input_name == "input_ids"
    return found


def longest_text(model: Any) -> int | None:
    """The positions that the model has; None where its config names no limit."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "max_target_positions", "max_seq_len")
    limits = (getattr(config, name, None) for name in names)
    # XLNet has -1 for none.
    return next((limit for limit in limits if limit is not None and limit > 0), None)


def takes_positions(model: nn.Module) -> bool:
    """Whether the model can be told each token's position."""
    return POSITIONS in inspect.signature(model.forward).parameters


def counts_positions(model: Any, shape: DecoderShape) -> bool:
    """Whether the model takes positions, and counts them from 0 as `DecoderStep` does; some begin elsewhere."""
    if not takes_positions(model):
        return False
    inputs = text_inputs(model, shape, SEQUENCE)
    told, own = (call(DecoderStep(model, shape.layers, told), "an empty cache", *inputs)[0] for told in (True, False))
    return torch.allclose(told.float(), own.float(), rtol=0, atol=1e-3 * magnitude(own), equal_nan=True)


def decoder_inputs(model: nn.Module, shape: DecoderShape, sequence: int = SEQUENCE) -> tuple[tuple[Any, ...], Any]:
    """Example arguments and dynamic shapes of a `DecoderStep` of so many tokens."""
    device, dtype = _device(model), float_dtype(model)
    generator = torch.Generator().manual_seed(0)
    past = (torch.randn(one.shape(BATCH, PAST), generator=generator).to(device, dtype) for one in shape.cached)
    tokens = torch.randint(0, shape.vocab_size, (BATCH, sequence), generator=generator).to(device)
    mask = torch.ones(BATCH, PAST + sequence, dtype=torch.long, device=device)
    dynamic = torch.export.Dim.DYNAMIC
    cached = ({axis: dynamic for axis in (0, one.growing_axis) if axis is not None} for one in shape.cached)
    dynamic_shapes = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}, shape.by_layer(cached))
    return (tokens, mask, shape.by_layer(past)), dynamic_shapes


def text_inputs(model: nn.Module, shape: DecoderShape, length: int) -> tuple[Any, ...]:
    """Arguments of a `DecoderStep` that begins a text of so many tokens."""
    (tokens, mask, _), _ = decoder_inputs(model, shape, length)
    return tokens, mask[:, :length], shape.empty_past(BATCH, float_dtype(model), _device(model))


def encoder_decoder_inputs(model: nn.Module, shape: EncoderDecoderShape) -> tuple[tuple[Any, ...], Any]:
    """Example arguments and dynamic shapes of an `EncoderDecoderStep`."""
    _, kwargs, shapes = inputs_from_config(model)
    (tokens, _, past), (of_tokens, _, of_past) = decoder_inputs(model, shape.decoder)
    names = shape.encoder.inputs
    return (
        ({name: kwargs[name] for name in names}, tokens, past),
        ({name: shapes[name] for name in names}, of_tokens, of_past),
    )


def inputs_from_config(
    model: Any, length: int = SEQUENCE + 1
) -> tuple[tuple[Any, ...], dict[str, Any], dict[str, Any]]:
    """Example inputs and dynamic shapes of a Hugging Face model that is no decoder, texts of so many tokens.

    The first that the model takes: its main input and what else its forward demands, with another where that is not
    enough. Raises CaptureError for a model that takes none, and for inputs that none are made for.
    """
    accepted = inspect.signature(model.forward).parameters
    needed = [
        name for name, one in accepted.items() if one.default is one.empty and one.kind == one.POSITIONAL_OR_KEYWORD
    ]
    if model.main_input_name in accepted:  # it is input_ids where a class does not say
        needed = list(dict.fromkeys([model.main_input_name, *needed]))
    more = [name for name in ("input_ids", *MADE) if name in accepted and name not in needed]
    refusal: CaptureError | None = None
    for names in (needed, *([*needed, name] for name in more)):
        tensors, axes = _texts(model, names, length)
        for chosen in choices({name: _shapes(model, name) for name in names if name not in tensors}):
            kwargs: dict[str, Any] = tensors | {name: _floats(model, sizes) for name, (sizes, _) in chosen.items()}
            dynamic = axes | {name: free for name, (_, free) in chosen.items()}
            shapes: dict[str, Any] = {name: dict.fromkeys(dynamic[name], torch.export.Dim.DYNAMIC) for name in kwargs}
            if "use_cache" in accepted:
                kwargs["use_cache"], shapes["use_cache"] = False, None
            try:
                call(model, "its example inputs", **kwargs)
                return (), kwargs, shapes
            except CaptureError as error:
                refusal = refusal or error
    assert refusal is not None
    raise refusal


def _texts(model: Any, names: Sequence[str], length: int) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Those of an example's inputs that are tokens, with the masks over them, and which of their axes are dynamic."""
    config, accepted = model.config, inspect.signature(model.forward).parameters
    sizes = {name: length for name in names if name.endswith("input_ids")}
    if "input_ids" in sizes and "attention_mask" in accepted:
        sizes["attention_mask"] = length
    if config.is_encoder_decoder and "decoder_input_ids" in accepted:
        sizes["decoder_input_ids"] = length - 1
    generator = torch.Generator().manual_seed(0)
    vocabulary: int = getattr(config.get_text_config(), "vocab_size", 0)
    if not vocabulary and sizes:
        raise CaptureError(
            f"example_inputs=None: no inputs are made for {next(iter(sizes))!r} of {type(model).__name__} (its config "
            "names no vocab_size); accepted is a tuple or dict as for torch.export"
        )
    tensors = {}
    for name, size in sizes.items():
        if name == "attention_mask":
            tensors[name] = torch.ones(BATCH, size, dtype=torch.long, device=_device(model))
        else:
            tokens = torch.randint(0, vocabulary, (BATCH, size), generator=generator)
            tensors[name] = tokens.to(_device(model))
    return tensors, dict.fromkeys(tensors, (0, 1))


def _shapes(model: Any, name: str) -> list[Shape]:
    """The shapes to try for an input of numbers; raises CaptureError where there are none."""
    shapes = feature_shapes(model.config, name, BATCH)
    if not shapes:
        why = "its config does not say how large they are" if name in MADE else f"made are input_ids, {', '.join(MADE)}"
        raise CaptureError(
            f"example_inputs=None: no inputs are made for {name!r} of {type(model).__name__} ({why}); "
            "accepted is a tuple or dict as for torch.export"
        )
    return shapes


def _floats(model: nn.Module, sizes: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(sizes, generator=generator).to(_device(model), float_dtype(model))


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
