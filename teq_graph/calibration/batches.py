"""Calibration batches from text, data sets, tensors, or the model's own samples."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from teq_graph.calibration.decoding_step import decoding_step
from teq_graph.calibration.encoder_decoders import random_sources, with_answers
from teq_graph.calibration.self_sampling import WRITTEN_AT_ONCE, sample_text
from teq_graph.calibration.sources import WindowChooser, elements_of, join_texts, text_column, text_of, token_rows
from teq_graph.capture import CapturedGraph
from teq_graph.capture.shapes import MASK
from teq_graph.config import TrainingConfig
from teq_graph.errors import ConfigError, InputError, NumericsError, brief
from teq_graph.graph.nodes import placeholder_nodes
from teq_graph.graph.sizes import symbol
from teq_graph.system.memory import available_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Batch: TypeAlias = dict[str, Any] | tuple[Any, ...] | Tensor
"""Keyword arguments, positional arguments or the only argument of one call of the model."""

SampleFn: TypeAlias = Callable[[int, int, int], Tensor]
"""`(samples, length, seed) -> [samples, length]` int64: text of the model's own."""


@dataclasses.dataclass(frozen=True)
class TokenInputs:
    """How a model takes tokens: as `input_ids` [b, s] of the type `ids`, and as `attention_mask` [b, s] of the type
    `mask`, 1 where there is a token, unless that is None. Sizes that are not known are not checked here."""

    vocab_size: int | None = None
    max_positions: int | None = None
    ids: torch.dtype = torch.int64
    mask: torch.dtype | None = torch.int64

    @classmethod
    def of(cls, captured: CapturedGraph) -> TokenInputs | None:
        """Those of a decoder, of an encoder of texts, or of a graph with `input_ids` among its keyword arguments."""
        if captured.decoder is not None:
            return cls(captured.decoder.vocab_size, captured.decoder.max_positions)
        if captured.encoder_decoder is not None:
            encoder = captured.encoder_decoder.encoder
            if encoder.vocab_size is None:
                return None
            masked = torch.int64 if MASK in encoder.inputs else None
            return cls(encoder.vocab_size, encoder.max_positions, mask=masked)
        ids, mask = (captured.example_kwargs.get(name) for name in ("input_ids", "attention_mask"))
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
            return None
        return cls(ids=ids.dtype, mask=mask.dtype if isinstance(mask, Tensor) and mask.shape == ids.shape else None)


def make_batches(
    calibration: Any,
    *,
    samples: int,
    length: int,
    batch_size: int,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    tokens: TokenInputs | None = None,
    sample_fn: SampleFn | None = None,
    batch_is_dynamic: bool = False,
) -> list[Batch]:
    """Turns what the user gives as calibration data into inputs of the model.

    For a model over `tokens` each batch is `{"input_ids": [b, s], "attention_mask": [b, s]}`, b <= `batch_size`,
    padded on the right where lengths differ, the padding masked; rows of a model without a mask are in one batch
    only with others as long. `calibration`:

      - None: text that the model writes, from `sample_fn`;
      - the path of a text file: tokenized whole, cut into windows of `length` that do not overlap, `samples` of
        them chosen at random by `seed`, or all where there are fewer; a text shorter than `length` is one window;
      - a data set of the package `datasets`, or its name as `NAME:SPLIT` or `NAME:CONFIG:SPLIT`: its rows' text,
        joined by blank lines, read as far as needed, then as for a file;
      - strings: each is cut into windows as a file is;
      - an integer tensor or array [N, s], an iterable of such tensors [b, s] or [s], or of dicts with `input_ids`:
        all of it.

    For any other model, a tensor [N, ...] is cut into batches along its first axis; of an iterable, each dict is
    a batch of keyword arguments, each tuple or list one of positional arguments, each tensor the only argument.
    Of an iterator without a length, `samples` elements are read. Elements of one row each that follow one another in
    one shape are joined, up to `batch_size` of them, where `batch_is_dynamic`: the model takes any number of rows in
    the first dimension of all its tensors.

    `length` is reduced to the model's positions where the text is cut or sampled here; inputs that come cut and are
    longer are refused. Raises InputError for no data, data of another kind, token ids outside the vocabulary,
    sequences that are too long; NumericsError for NaN or infinity.
    """
    length = min(length, (tokens and tokens.max_positions) or length)
    choose = WindowChooser(tokenizer, samples, length, seed)
    rows: Iterable[Tensor] | None = None
    if calibration is None:
        if sample_fn is None:
            raise InputError("calibration=None: only a causal language model writes its own; give inputs of the model")
        sampled = sample_fn(samples, length, seed)
        if sampled.is_floating_point():
            elements = sampled.split(batch_size)
        else:
            rows = sampled
    elif isinstance(calibration, (str, Path)):
        rows = choose.from_texts([text_of(calibration, samples * length)])
    else:
        first, elements = elements_of(calibration, samples)
        if isinstance(first, str):
            rows = choose.from_texts(elements)
        elif isinstance(first, Mapping) and text_column(first):
            rows = choose.from_texts([join_texts(elements, samples * length)])
        elif tokens is not None and not isinstance(first, Mapping):
            rows = (row for element in elements for row in token_rows(element))
        elif isinstance(calibration, (Tensor, np.ndarray)):
            elements = torch.as_tensor(calibration).split(batch_size)
    if rows is None:
        batches = [_as_batch(element) for element in elements]
    else:
        batches = _batch_rows(rows, batch_size, masked=tokens is None or tokens.mask is not None)
    if not batches:
        raise InputError("calibration: it is empty; accepted is at least one input")
    for index, batch in enumerate(batches):
        if tokens is not None and isinstance(batch, dict):
            _check_tokens(batch, index, tokens)
        _check_values(batch, index)
    return _join_single_rows(batches, batch_size) if batch_is_dynamic else batches


def calibration_batches(
    calibration: Any, captured: CapturedGraph, training: TrainingConfig, tokenizer: Any, example_inputs: Any = None
) -> list[Batch]:
    """What the user gives as calibration, as inputs of the captured graph.

    None stands for a causal language model's own samples, for random sources of an encoder-decoder, and for the user's
    `example_inputs` of another model. What an encoder-decoder is to write of a source, it writes itself, unless the
    user gives it as `decoder_input_ids`. All is where the graph is.
    """
    batches = _batches_of(calibration, captured, training, tokenizer, example_inputs)
    return [pytree.tree_map_only(Tensor, lambda tensor: tensor.to(captured.device), batch) for batch in batches]


def _batches_of(
    calibration: Any, captured: CapturedGraph, training: TrainingConfig, tokenizer: Any, example_inputs: Any
) -> list[Batch]:
    if captured.encoder_decoder is not None:
        sources = make_batches(
            calibration,
            samples=training.samples,
            length=training.length,
            batch_size=WRITTEN_AT_ONCE,
            seed=training.seed,
            tokenizer=tokenizer,
            tokens=TokenInputs.of(captured),
            sample_fn=functools.partial(random_sources, captured),
            batch_is_dynamic=_batch_is_dynamic(captured),
        )
        return list(
            with_answers(captured, sources, length=training.length, batch_size=training.batch_size, seed=training.seed)
        )
    decoder = captured.decoder
    if calibration is None and decoder is None and example_inputs is not None:
        calibration = [example_inputs]

    def sample(samples: int, length: int, seed: int) -> Tensor:
        assert decoder is not None
        _check_memory(captured, samples, length)
        return sample_text(
            decoding_step(captured, length),
            samples=samples,
            length=length,
            seed=seed,
            # An embedding padded beyond the tokenizer has rows that are no tokens.
            vocab_size=min(decoder.vocab_size, len(tokenizer) if tokenizer is not None else decoder.vocab_size),
            bos_token_id=_leading_token(tokenizer),
            special_ids=getattr(tokenizer, "all_special_ids", ()),
        )

    return make_batches(
        calibration,
        samples=training.samples,
        length=training.length,
        batch_size=training.batch_size,
        seed=training.seed,
        tokenizer=tokenizer,
        tokens=TokenInputs.of(captured),
        sample_fn=None if decoder is None else sample,
        batch_is_dynamic=_batch_is_dynamic(captured),
    )


def _check_memory(captured: CapturedGraph, samples: int, length: int) -> None:
    """Raises ConfigError where text of the model's own does not fit in memory, with the cache that writing it takes."""
    assert captured.decoder is not None
    tokens = torch.empty(0, dtype=torch.int64).element_size() * samples * length
    needed = tokens + min(samples, WRITTEN_AT_ONCE) * captured.decoder.cached_numbers(length) * captured.dtype.itemsize
    available = available_bytes()
    if available is not None and needed > available:
        raise ConfigError(
            f"samples={samples}, length={length}: text of the model's own takes {needed / 1e9:,.1f} GB of memory; "
            f"accepted is what fits in the {available / 1e9:,.1f} GB that are free"
        )


def _leading_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    if tokenizer is None:
        return None
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and ids[0] == getattr(tokenizer, "bos_token_id", None) else None


def _batch_rows(rows: Iterable[Tensor], batch_size: int, masked: bool) -> list[Batch]:
    batches: list[Batch] = []
    for _, group in itertools.groupby(rows, lambda row: masked or len(row)):
        while chunk := list(itertools.islice(group, batch_size)):
            batch = {"input_ids": pad_sequence(chunk, batch_first=True)}
            if masked:
                batch["attention_mask"] = pad_sequence([torch.ones_like(row) for row in chunk], batch_first=True)
            batches.append(batch)
    return batches


def _as_batch(element: Any) -> Batch:
    element = pytree.tree_map(lambda leaf: torch.as_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf, element)
    if isinstance(element, Mapping):
        return dict(element)
    if isinstance(element, (tuple, list)):
        return tuple(element)
    if isinstance(element, Tensor):
        return element
    raise InputError(f"calibration: an element is {type(element).__name__}; accepted are dicts, tuples and tensors")


def _batch_is_dynamic(captured: CapturedGraph) -> bool:
    """Whether the first dimension of all of the graph's tensor inputs is one and the same dynamic size."""
    values = [node.meta["val"] for node in placeholder_nodes(captured.graph_module)]
    firsts = {symbol(value.shape[0]) if value.dim() else None for value in values if isinstance(value, Tensor)}
    return len(firsts) == 1 and None not in firsts


def _join_single_rows(batches: list[Batch], batch_size: int) -> list[Batch]:
    """Rows given one at a time train as texts do: in batches."""
    joined: list[Batch] = []
    for form, group in itertools.groupby(batches, _form_of_row):
        rows = list(group)
        if form is None:
            joined += rows
            continue
        for start in range(0, len(rows), batch_size):
            joined.append(pytree.tree_map(_concatenated, *rows[start : start + batch_size]))
    return joined


def _form_of_row(batch: Batch) -> tuple[object, ...] | None:
    """What rows that can be joined have in common: structure, shapes, dtypes and all else; None for no single row."""
    leaves, structure = pytree.tree_flatten(batch)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not tensors or any(leaf.dim() == 0 or leaf.shape[0] != 1 for leaf in tensors):
        return None
    return str(structure), *(
        (leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else _identity(leaf) for leaf in leaves
    )


def _identity(value: object) -> object:
    """Equal for values that are alike, and for tensors of one kind."""
    if isinstance(value, Tensor):
        return value.shape, value.dtype
    try:
        return repr(value)
    except Exception:  # of a class of the caller's own
        return id(value)


def _concatenated(*leaves: Any) -> Any:
    return torch.cat(leaves) if isinstance(leaves[0], Tensor) else leaves[0]


def _check_tokens(batch: dict[str, Any], index: int, tokens: TokenInputs) -> None:
    """Checks `input_ids` and completes `attention_mask`, in place."""
    if "input_ids" not in batch:
        raise InputError(f"calibration: batch {index} has the keys {list(batch)}; input_ids is missing")
    rows = list(token_rows(batch["input_ids"]))
    ids = torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.int64)
    batch["input_ids"] = ids.to(tokens.ids)
    if tokens.mask is not None:
        given = batch.get("attention_mask", torch.ones_like(ids))
        try:
            mask = torch.atleast_2d(torch.as_tensor(given)).to(tokens.mask)
        except (RuntimeError, TypeError, ValueError):
            raise InputError(
                f"calibration: attention_mask of batch {index} is {brief(given)}; accepted are tensors [b, s]"
            ) from None
        batch["attention_mask"] = mask
        if mask.shape != ids.shape:
            shapes = f"attention_mask {list(mask.shape)} and input_ids {list(ids.shape)}"
            raise InputError(f"calibration: batch {index} has {shapes}; accepted are equal shapes")
    if not ids.numel():
        raise InputError(f"calibration: input_ids of batch {index} are empty, {list(ids.shape)}")
    size, positions = tokens.vocab_size, tokens.max_positions
    for bad in (int(ids.min()), int(ids.max())):
        if size is not None and not 0 <= bad < size:
            raise InputError(f"calibration: token id {bad} in batch {index}; accepted are 0 to {size - 1}")
    if positions is not None and ids.shape[1] > positions:
        raise InputError(f"calibration: batch {index} has {ids.shape[1]} tokens; accepted are up to {positions}")


def _check_values(batch: Batch, index: int) -> None:
    for path, leaf in pytree.tree_leaves_with_path(batch):
        if isinstance(leaf, Tensor):
            name = pytree.keystr(path)
            if not leaf.numel():
                raise InputError(f"calibration: input {name} of batch {index} is empty, {list(leaf.shape)}")
            if leaf.is_floating_point() and not torch.isfinite(leaf).all():
                raise NumericsError(f"calibration: input {name} of batch {index} holds NaN or infinity")
