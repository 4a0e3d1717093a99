"""Calibration batches from text, data sets, tensors, or the model's own samples."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils import _pytree as pytree

from teq_graph.calibration.self_sampling import StepFn, sample_text
from teq_graph.capture import CapturedGraph
from teq_graph.config import TrainingConfig
from teq_graph.errors import InputError, NumericsError, one_line

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
        """Those of a decoder, or of a graph with `input_ids` among its keyword arguments."""
        if captured.decoder is not None:
            return cls(captured.decoder.vocab_size, captured.decoder.max_positions)
        ids, mask = (captured.example_kwargs.get(name) for name in ("input_ids", "attention_mask"))
        if not isinstance(ids, Tensor) or ids.is_floating_point() or ids.dim() != 2:
            return None
        return cls(ids=ids.dtype, mask=mask.dtype if isinstance(mask, Tensor) and mask.shape == ids.shape else None)


_ROW_SEPARATOR = "\n\n"  # joins the rows of a data set; gives the standard string for WikiText
_CHARS_PER_TOKEN = 32  # rows are read up to this many characters per wanted token: some eight times what is used


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
    Of an iterator without a length, `samples` elements are read.

    `length` is reduced to the model's positions where the text is cut or sampled here; inputs that come cut and are
    longer are refused. Raises InputError for no data, data of another kind, token ids outside the vocabulary,
    sequences that are too long; NumericsError for NaN or infinity.
    """
    length = min(length, (tokens and tokens.max_positions) or length)
    choose = _Chooser(tokenizer, samples, length, seed)
    rows: Iterable[Tensor] | None = None
    if calibration is None:
        if sample_fn is None:
            raise InputError("calibration=None: only a causal language model writes its own; give inputs of the model")
        rows = sample_fn(samples, length, seed)
    elif isinstance(calibration, (str, Path)):
        rows = choose.from_texts([_text_of(calibration, samples * length)])
    else:
        first, elements = _elements(calibration, samples)
        if isinstance(first, str):
            rows = choose.from_texts(elements)
        elif isinstance(first, Mapping) and _text_column(first):
            rows = choose.from_texts([_join_rows(elements, samples * length)])
        elif tokens is not None and not isinstance(first, Mapping):
            rows = (row for element in elements for row in _token_rows(element))
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
    return batches


def calibration_batches(
    calibration: Any, captured: CapturedGraph, training: TrainingConfig, tokenizer: Any, example_inputs: Any = None
) -> list[Batch]:
    """What the user gives as calibration, as inputs of the captured graph.

    None stands for a causal language model's own samples, and for the user's `example_inputs` of another model.
    """
    decoder = captured.decoder
    if calibration is None and decoder is None and example_inputs is not None:
        calibration = [example_inputs]

    def sample(samples: int, length: int, seed: int) -> Tensor:
        assert decoder is not None
        return sample_text(
            captured_step(captured),
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
    )


def captured_step(captured: CapturedGraph) -> StepFn:
    """A captured decoder as `(input_ids, past) -> (logits, past)`, without padding."""

    def step(input_ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        args, _ = captured.bind({"input_ids": input_ids.to(captured.device), "past_key_values": past})
        logits, past = captured.graph_module(*args)
        return logits, past

    return step


def _leading_token(tokenizer: Any) -> int | None:
    """The token that the tokenizer puts before every text, if it does."""
    if tokenizer is None:
        return None
    ids = tokenizer("a")["input_ids"]
    return ids[0] if ids and ids[0] == tokenizer.bos_token_id else None


class _Chooser:
    """Cuts texts into windows of tokens and chooses some of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, samples: int, length: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._samples = samples
        self._length = length
        self._seed = seed

    def from_texts(self, texts: Iterable[str]) -> list[Tensor]:
        """`samples` windows [length], or shorter where a text is shorter."""
        if self._tokenizer is None:
            raise InputError("calibration: it is text, but the model has no tokenizer; accepted are tensors of tokens")
        windows = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"calibration: element {index} is {type(text).__name__}, the first is a string")
            ids = self._tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"]
            windows += self._cut(torch.tensor(ids, dtype=torch.int64))
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(self._seed))
        return [windows[index] for index in chosen[: self._samples]]

    def _cut(self, ids: Tensor) -> list[Tensor]:
        full = len(ids) // self._length
        return list(ids[: full * self._length].split(self._length)) if full else [ids] * bool(len(ids))


def _text_of(source: str | Path, tokens: int) -> str:
    """The text of a file, or of as many rows of a named data set as give about `tokens` tokens."""
    path = Path(source).expanduser()
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"calibration file {str(source)!r}: {error}; accepted is text in UTF-8") from error
    name, *rest = str(source).split(":")
    if len(rest) not in (1, 2):
        raise InputError(f"calibration={str(source)!r}: no such file; data sets are NAME:SPLIT or NAME:CONFIG:SPLIT")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"calibration={str(source)!r}: needs the package datasets; pip install datasets") from error
    try:
        # streamed: only what is read is downloaded
        return _join_rows(datasets.load_dataset(name, *rest[:-1], split=rest[-1], streaming=True), tokens)
    except InputError:
        raise
    except Exception as error:  # the hub's, the file system's and the data set's own errors
        raise InputError(f"calibration={str(source)!r}: the data set cannot be loaded: {one_line(error)}") from error


def _text_column(row: Mapping[str, Any]) -> str | None:
    """`"text"`, or else the first column that holds a string."""
    columns = [name for name, value in row.items() if isinstance(value, str)]
    return "text" if "text" in columns else next(iter(columns), None)


def _join_rows(rows: Iterable[Any], tokens: int) -> str:
    texts: list[str] = []
    size = 0
    for row in rows:
        column = _text_column(row)
        if column is None:
            raise InputError(f"calibration: a row of the data set has the columns {list(row)}; accepted is one of text")
        texts.append(row[column])
        size += len(row[column])
        if size > _CHARS_PER_TOKEN * tokens:
            break
    return _ROW_SEPARATOR.join(texts)


def _elements(calibration: Any, samples: int) -> tuple[Any, Iterable[Any]]:
    """The first element, and all; a dict or a tensor is an element itself."""
    if isinstance(calibration, (Tensor, np.ndarray)):
        return calibration, [calibration]
    if isinstance(calibration, Mapping):
        if any(not isinstance(value, (Tensor, np.ndarray, Sequence)) for value in calibration.values()):
            raise InputError(f"calibration: a dict with the keys {list(calibration)}; its values are to be tensors")
        return calibration, [calibration]
    if not isinstance(calibration, Iterable):
        kind = type(calibration).__name__
        raise InputError(f"calibration: it is {kind}; accepted are text, tensors, or an iterable of the model's inputs")
    iterator: Iterator[Any] = iter(calibration)
    for first in iterator:
        elements = itertools.chain([first], iterator)
        return first, elements if isinstance(calibration, Sized) else _until(elements, first, samples)
    raise InputError("calibration: it is empty; accepted is at least one input")


def _until(elements: Iterator[Any], first: Any, samples: int) -> Iterator[Any]:
    # the rows of a data set are counted by their text, in `_join_rows`
    rows = isinstance(first, Mapping) and _text_column(first) is not None
    return elements if rows else itertools.islice(elements, samples)


def _token_rows(element: Any) -> Iterable[Tensor]:
    """Rows [s] int64 of token ids [b, s] or [s]."""
    try:
        ids = torch.as_tensor(element)
    except (TypeError, ValueError, RuntimeError):
        kind = type(element).__name__
        raise InputError(f"calibration: an element is {kind}; accepted are integer tensors [b, s]") from None
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or ids.dim() not in (1, 2):
        shape = list(ids.shape)
        raise InputError(f"calibration: an element is {ids.dtype} {shape}; accepted are integer tensors [b, s]")
    return list(torch.atleast_2d(ids.to(torch.int64)))


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


def _check_tokens(batch: dict[str, Any], index: int, tokens: TokenInputs) -> None:
    """Checks `input_ids` and completes `attention_mask`, in place."""
    if "input_ids" not in batch:
        raise InputError(f"calibration: batch {index} has the keys {list(batch)}; input_ids is missing")
    rows = list(_token_rows(batch["input_ids"]))
    ids = torch.stack(rows) if rows else torch.empty(0, 0, dtype=torch.int64)
    batch["input_ids"] = ids.to(tokens.ids)
    if tokens.mask is not None:
        mask = torch.atleast_2d(torch.as_tensor(batch.get("attention_mask", torch.ones_like(ids)))).to(tokens.mask)
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
