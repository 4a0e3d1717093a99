"""A captured model: its graph, the inputs it was captured with, and how callers bind theirs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from teq_graph.capture.shapes import (
    DECODER_INPUTS,
    MASK,
    CachedTensor,
    DecoderShape,
    EncoderDecoderShape,
    LayerCache,
)
from teq_graph.errors import InputError, brief, one_line
from teq_graph.graph.nodes import is_tensor_constant, placeholder_nodes
from teq_graph.graph.sizes import fixed, symbol
from teq_graph.graph.tensors import node_tensor


@dataclasses.dataclass
class CapturedGraph:
    """A model as a graph, with the inputs it was captured with.

    `graph_module` takes `example_args` and `example_kwargs` (any sizes where `dynamic_shapes` says so).
    A decoder's signature is `(input_ids [b, s], attention_mask [b, p+s], past)` → `(logits [b, s, vocab], present)`,
    all integer inputs int64; past and present are lists of each layer's cached tensors, as `decoder.layers` says.
    An encoder-decoder's is `(encoder's inputs by name, decoder_input_ids [b, s], past)` → `(logits [b, s, vocab],
    present, encoded)`, where `encoded` are the tensors of `encoder_decoder.encoder.layers`, by layer.
    `lm_head` names the weight that projects onto the vocabulary, where the model says which it is. `without_cache` says
    why the model's states are no inputs of the graph, where it has some.
    """

    graph_module: GraphModule
    example_args: tuple[Any, ...]
    example_kwargs: dict[str, Any]
    dynamic_shapes: Any
    decoder: DecoderShape | None = None
    lm_head: str | None = None
    without_cache: str | None = None
    encoder_decoder: EncoderDecoderShape | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of a decoder's KV cache, otherwise of the graph's first tensor that has one."""
        if self.cached:
            *_, past = self.example_args
            return past[0][0].dtype  # type: ignore[no-any-return]
        return float_dtype(self.graph_module)

    @property
    def cached(self) -> tuple[CachedTensor, ...]:
        """The tensors that a step takes from the one before; none of a model without a cache."""
        stepping = self.decoder if self.encoder_decoder is None else self.encoder_decoder.decoder
        return () if stepping is None else stepping.cached

    @property
    def steps(self) -> bool:
        """Whether the graph is a step over a cache, whose inputs have fixed names."""
        return self.decoder is not None or self.encoder_decoder is not None

    @property
    def input_names(self) -> list[str]:
        """The names of the inputs that a caller gives by name."""
        if self.encoder_decoder is not None:
            return self.encoder_decoder.inputs
        return DECODER_INPUTS if self.decoder is not None else list(self.example_kwargs)

    @property
    def device(self) -> torch.device:
        """Where the graph's tensors are."""
        return next(self.graph_module.buffers()).device

    def bind(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The graph's args and kwargs for what a user gives: a mapping by argument name, a tuple, or one tensor.

        A decoder needs `input_ids`; `attention_mask` (all ones) and `past_key_values` (none) are optional. An
        encoder-decoder needs its encoder's inputs; `decoder_input_ids` are its start token where they are not given.
        Arguments that are no tensors keep the values that the graph was captured with. Raises InputError for
        tensors of another type or shape than the graph takes.
        """
        args, kwargs = self._bind(inputs)
        self._check_tensors(pytree.tree_leaves((args, kwargs)))
        return args, kwargs

    def placeholder_values(self, inputs: Any, graph_module: GraphModule | None = None) -> dict[Node, Any]:
        """What `bind` makes of `inputs`, by the graph's placeholders, or those of `graph_module`, a clone of it."""
        placeholders = placeholder_nodes(graph_module or self.graph_module)
        return dict(zip(placeholders, pytree.tree_leaves(self.bind(inputs)), strict=True))

    def _bind(self, inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        names, by_position = self.input_names, bool(self.example_args) and not self.steps
        accepted = f"a tuple of {len(self.example_args)}" if by_position else f"a mapping of {names}"
        if isinstance(inputs, Tensor):
            inputs = (inputs,) if by_position else {names[0]: inputs}
        if by_position and isinstance(inputs, tuple) and len(inputs) == len(self.example_args):
            return inputs, dict(self.example_kwargs)
        if by_position or not isinstance(inputs, Mapping):
            raise InputError(f"inputs={_kind(inputs)}: accepted is {accepted}")
        if unknown := sorted(set(inputs) - set(names)):
            raise InputError(f"inputs {unknown}: accepted are {names}")
        if self.decoder is not None:
            return _bind_decoder(self, self.decoder, inputs), {}
        if self.encoder_decoder is not None:
            return _bind_encoder_decoder(self, self.encoder_decoder, inputs), {}
        constants = {name: value for name, value in self.example_kwargs.items() if not isinstance(value, Tensor)}
        if missing := sorted(set(names) - set(inputs) - set(constants)):
            raise InputError(f"inputs {sorted(inputs)}: missing are {missing}")
        return (), {name: inputs.get(name, constants.get(name)) for name in names}

    def _check_tensors(self, leaves: list[Any]) -> None:
        """Compare with the graph's placeholders: type, rank, and sizes, of which dynamic ones fit together."""
        placeholders = placeholder_nodes(self.graph_module)
        if len(leaves) != len(placeholders):
            raise InputError(f"{len(leaves)} inputs: accepted are {len(placeholders)}")
        sizes: dict[Any, int] = {}
        for leaf, placeholder in zip(leaves, placeholders, strict=True):
            declared = placeholder.meta["val"]
            if not isinstance(declared, Tensor):
                continue
            accepted = f"{placeholder.name} {describe(declared)}"
            if not isinstance(leaf, Tensor):
                raise InputError(f"{placeholder.name}={type(leaf).__name__}: accepted is {accepted}")
            if leaf.dtype != declared.dtype or leaf.dim() != declared.dim():
                raise InputError(f"{placeholder.name} {describe(leaf)}: accepted is {accepted}")
            for given, size in zip(leaf.shape, declared.shape, strict=True):
                expected = sizes.setdefault(symbol(size), given) if symbol(size) is not None else fixed(size, sizes)
                if expected is not None and given != expected:
                    raise InputError(
                        f"{placeholder.name} {describe(leaf)}: accepted is {accepted}; "
                        "other sizes need example_inputs with dynamic_shapes when the model is compiled"
                    )

    def move_to(self, device: str | torch.device) -> None:
        """Move tensors, example inputs, the device arguments of the graph's own ops, and the values of its nodes.

        Raises InputError, before anything has moved, for what is no device of this machine that holds numbers.
        """
        device = usable_device(device)

        def moved(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        self.graph_module.to(device)
        self.example_args, self.example_kwargs = pytree.tree_map(moved, (self.example_args, self.example_kwargs))
        for node in self.graph_module.graph.nodes:
            swap = lambda value: device if isinstance(value, torch.device) else value  # noqa: E731
            node.args, node.kwargs = torch.fx.node.map_aggregate((node.args, node.kwargs), swap)
            if is_tensor_constant(node):
                node.meta["val"] = node_tensor(node)
            elif "val" in node.meta:
                node.meta["val"] = pytree.tree_map(moved, node.meta["val"])
        self.graph_module.recompile()

    def cache_pairs(self) -> dict[Node, Node]:
        """The placeholder of each cached tensor -> the node that gives its successor."""
        if not self.cached:
            return {}
        outputs, kept = self.outputs(), len(self.encoded())
        count, last = len(self.cached), len(outputs) - kept
        placeholders = placeholder_nodes(self.graph_module)[-count:]
        return dict(zip(placeholders, outputs[last - count : last], strict=True))

    def encoded(self) -> tuple[Node, ...]:
        """For an encoder-decoder: the nodes that give the tensors of `encoder.layers`, which every step reads again."""
        count = 0 if self.encoder_decoder is None else sum(map(len, self.encoder_decoder.encoder.layers))
        return tuple(self.outputs()[-count:]) if count else ()

    def outputs(self) -> list[Any]:
        """The leaves of the graph's result, in order."""
        output = next(iter(reversed(self.graph_module.graph.nodes)))
        leaves: list[Any] = pytree.tree_leaves(output.args[0])
        return leaves


def _kind(inputs: Any) -> str:
    if isinstance(inputs, Mapping):
        return f"a mapping of {sorted(map(str, inputs))}"
    return f"a tuple of {len(inputs)}" if isinstance(inputs, tuple) else type(inputs).__name__


def _bind_decoder(captured: CapturedGraph, decoder: DecoderShape, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    tokens, past = _bind_step("input_ids", captured, decoder, inputs)
    seen, mask = decoder.past_length(past), inputs.get("attention_mask")
    # Without an axis of positions, how many were seen is for the caller to know.
    total = tokens.shape[1] + seen if seen is not None else max(tokens.shape[1], _length(mask))
    _check_room(decoder, total)
    if mask is None:
        mask = torch.ones(tokens.shape[0], total, dtype=torch.long, device=tokens.device)
    elif not isinstance(mask, Tensor) or tuple(mask.shape) != (tokens.shape[0], total):
        shown = tuple(mask.shape) if isinstance(mask, Tensor) else brief(mask)
        raise InputError(f"attention_mask={shown}: accepted is {(tokens.shape[0], total)}, past included")
    return tokens, mask.long(), past


def _bind_encoder_decoder(
    captured: CapturedGraph, shape: EncoderDecoderShape, inputs: Mapping[str, Any]
) -> tuple[Any, ...]:
    given = {name: inputs[name] for name in shape.encoder.inputs if inputs.get(name) is not None}
    first, start = next(iter(given.values()), None), shape.decoder_start_token_id
    if isinstance(first, Tensor) and inputs.get("decoder_input_ids") is None and start is not None:
        inputs = {**inputs, "decoder_input_ids": torch.full((len(first), 1), start, device=first.device)}
    tokens, past = _bind_step("decoder_input_ids", captured, shape.decoder, inputs)
    _check_room(shape.decoder, tokens.shape[1] + (shape.decoder.past_length(past) or 0))
    missing = [name for name in shape.encoder.inputs if name not in given]
    if missing == [MASK] and isinstance(first, Tensor):
        given[MASK] = torch.ones_like(first)
    elif missing:
        raise InputError(f"inputs {sorted(inputs)}: missing are {missing}")
    # A mask of booleans, say, is what one of integers is.
    whole = {
        name: value.long() if isinstance(value, Tensor) and not value.is_floating_point() else value
        for name, value in given.items()
    }
    return {name: whole[name] for name in shape.encoder.inputs}, tokens, past


def _bind_step(
    name: str, captured: CapturedGraph, decoder: DecoderShape, inputs: Mapping[str, Any]
) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
    """The tokens [b, s] int64 that `name` is, and the tensors that were cached before them."""
    tokens = inputs.get(name)
    if not isinstance(tokens, Tensor) or tokens.dim() != 2 or tokens.is_floating_point() or tokens.numel() == 0:
        shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InputError(f"{name}={shape}: accepted are integers [batch, sequence], at least one")
    past = inputs.get("past_key_values")
    if past is None:
        return tokens.long(), decoder.empty_past(tokens.shape[0], captured.dtype, tokens.device)
    return tokens.long(), _layers(past, decoder)


def _check_room(decoder: DecoderShape, total: int) -> None:
    if decoder.max_positions is not None and total > decoder.max_positions:
        raise InputError(f"sequence of {total} positions: the model has {decoder.max_positions}")


def _length(mask: Any) -> int:
    return mask.shape[1] if isinstance(mask, Tensor) and mask.dim() == 2 else 0


def _layers(past: Any, decoder: DecoderShape) -> list[tuple[Tensor, ...]]:
    """The cached tensors of each layer, in number and rank as the decoder has them."""
    if isinstance(past, (list, tuple)) and len(past) == len(decoder.layers):
        layers = [tuple(layer) if isinstance(layer, (list, tuple)) else () for layer in past]
        if all(map(_fits, layers, decoder.layers)):
            return layers
    shapes = dict.fromkeys(", ".join(f"{one.name} {_shown(one)}" for one in layer) for layer in decoder.layers)
    accepted = f"a list of {len(decoder.layers)}, as a step returns, of tensors ({') or ('.join(shapes)})"
    raise InputError(f"past_key_values={brief(past)}: accepted is {accepted}")


def _fits(given: tuple[Any, ...], layer: LayerCache) -> bool:
    ranks = [tensor.dim() if isinstance(tensor, Tensor) else None for tensor in given]
    return ranks == [len(one.sizes) + 1 for one in layer]


def _shown(tensor: CachedTensor) -> str:
    return f"[{', '.join(['batch', *('positions' if size is None else str(size) for size in tensor.sizes)])}]"


def describe(tensor: Tensor) -> str:
    """Shape and type, as in `[2, any] torch.int64`."""
    sizes = ("any" if symbol(size) is not None else str(size) for size in tensor.shape)
    return f"[{', '.join(sizes)}] {tensor.dtype}"


def float_dtype(model: nn.Module) -> torch.dtype:
    """Type of the first floating-point parameter, or buffer; float32 where there is none."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            return tensor.dtype
    return torch.float32


def magnitude(tensor: Tensor) -> float:
    """The largest absolute value that is finite; 0 where there is none."""
    finite = tensor.double().abs()
    finite = finite[finite.isfinite()]
    return float(finite.max()) if finite.numel() else 0.0


def usable_device(device: str | torch.device) -> torch.device:
    """The device of that name. Raises InputError for what is no device of this machine that holds numbers."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found).cpu()
    except (AssertionError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"device={brief(device)}: {one_line(error)}; accepted are cpu and cuda") from error
    return found
