"""What users give as calibration data: texts, data sets, tensors, iterables of inputs."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from teq_graph.errors import InputError, brief, one_line
from teq_graph.system.texts import path_of, read_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROW_SEPARATOR = "\n\n"  # joins the rows of a data set; gives the standard string for WikiText
_ACCEPTED = "text, tensors, or an iterable of the model's inputs"
_EMPTY = "calibration: it is empty; accepted is at least one input"
_NO_TOKENIZER = "calibration: it is text, but the model has no tokenizer; accepted are tensors of tokens"
_CHARS_PER_TOKEN = 32  # rows are read up to this many characters per wanted token: some eight times what is used


class WindowChooser:
    """Cuts texts into windows of tokens and chooses some of them."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, samples: int, length: int, seed: int) -> None:
        self._tokenizer = tokenizer
        self._samples = samples
        self._length = length
        self._seed = seed

    def from_texts(self, texts: Iterable[str]) -> list[Tensor]:
        """`samples` windows [length], or shorter where a text is shorter."""
        if self._tokenizer is None:
            raise InputError(_NO_TOKENIZER)
        windows = []
        for index, text in enumerate(texts):
            if not isinstance(text, str):
                raise InputError(f"calibration: element {index} is {type(text).__name__}, the first is a string")
            windows += self._cut(_tokens_of(self._tokenizer, text, index))
        chosen = torch.randperm(len(windows), generator=torch.Generator().manual_seed(self._seed))
        return [windows[index] for index in chosen[: self._samples]]

    def _cut(self, ids: Tensor) -> list[Tensor]:
        full = len(ids) // self._length
        return list(ids[: full * self._length].split(self._length)) if full else [ids] * bool(len(ids))


def _tokens_of(tokenizer: Any, text: str, index: int) -> Tensor:
    """Token ids [n] int64 of a text that is `index` among others."""
    try:
        return torch.tensor(tokenizer(text, verbose=False, return_attention_mask=False)["input_ids"], dtype=torch.int64)
    except Exception as error:  # of a string that is no Unicode text, or of whatever the tokenizer is
        raise InputError(f"calibration: the tokenizer refuses text {index}: {one_line(error)}") from error


def text_of(source: str | Path, tokens: int) -> str:
    """The text of a file, or of as many rows of a named data set as give about `tokens` tokens."""
    if _names_a_file(source):
        return read_text("calibration file", source)
    shown = brief(str(source))
    name, *rest = str(source).split(":")
    try:
        import datasets
    except ImportError as error:
        raise InputError(f"calibration={shown}: needs the package datasets; pip install datasets") from error
    try:
        # streamed: only what is read is downloaded
        return join_texts(datasets.load_dataset(name, *rest[:-1], split=rest[-1], streaming=True), tokens)
    except InputError:
        raise
    except Exception as error:  # the hub's, the file system's and the data set's own errors
        raise InputError(f"calibration={shown}: the data set cannot be loaded: {one_line(error)}") from error


def _names_a_file(source: str | Path) -> bool:
    """Whether it is a file rather than a data set; raises InputError where it is neither."""
    shown, data_sets = brief(str(source)), "data sets are NAME:SPLIT or NAME:CONFIG:SPLIT"
    try:
        if path_of(source).exists():
            return True
    except ValueError as error:
        raise InputError(f"calibration={shown}: {error}; accepted is a text file in UTF-8") from error
    if str(source).count(":") not in (1, 2) or not all(str(source).split(":")):
        raise InputError(f"calibration={shown}: no such file; {data_sets}")
    return False


def check_source(calibration: Any, tokenizer: Any) -> None:
    """Refuse at once, by InputError, what is no calibration data of any kind; nothing is read but a file of text."""
    if isinstance(calibration, (str, Path)):
        if _names_a_file(calibration):
            read_text("calibration file", calibration)
        if tokenizer is None:
            raise InputError(_NO_TOKENIZER)
    elif calibration is not None and not isinstance(calibration, (Tensor, np.ndarray, Mapping)):
        if isinstance(calibration, (bytes, bytearray)) or not isinstance(calibration, Iterable):
            raise InputError(f"calibration={brief(calibration)}: accepted are {_ACCEPTED}")
        if isinstance(calibration, (list, tuple, set)):
            if not calibration:
                raise InputError(_EMPTY)
            if tokenizer is None and isinstance(next(iter(calibration)), str):
                raise InputError(_NO_TOKENIZER)


def text_column(row: Mapping[str, Any]) -> str | None:
    """`"text"`, or else the first column that holds a string."""
    columns = [name for name, value in row.items() if isinstance(value, str)]
    return "text" if "text" in columns else next(iter(columns), None)


def join_texts(rows: Iterable[Any], tokens: int) -> str:
    """The texts of a data set's rows, as many as give about `tokens` tokens."""
    texts: list[str] = []
    size = 0
    for row in rows:
        column = text_column(row)
        if column is None:
            raise InputError(f"calibration: a row of the data set has the columns {list(row)}; accepted is one of text")
        texts.append(row[column])
        size += len(row[column])
        if size > _CHARS_PER_TOKEN * tokens:
            break
    return _ROW_SEPARATOR.join(texts)


def elements_of(calibration: Any, samples: int) -> tuple[Any, Iterable[Any]]:
    """The first element, and all; a dict or a tensor is an element itself."""
    if isinstance(calibration, (Tensor, np.ndarray)):
        return calibration, [calibration]
    if isinstance(calibration, Mapping):
        if any(not isinstance(value, (Tensor, np.ndarray, Sequence)) for value in calibration.values()):
            raise InputError(f"calibration: a dict with the keys {list(calibration)}; its values are to be tensors")
        return calibration, [calibration]
    if not isinstance(calibration, Iterable):
        raise InputError(f"calibration={brief(calibration)}: accepted are {_ACCEPTED}")
    iterator: Iterator[Any] = iter(calibration)
    for first in iterator:
        elements = itertools.chain([first], iterator)
        return first, elements if isinstance(calibration, Sized) else _until(elements, first, samples)
    raise InputError(_EMPTY)


def _until(elements: Iterator[Any], first: Any, samples: int) -> Iterator[Any]:
    # the rows of a data set are counted by their text, in `join_texts`
    rows = isinstance(first, Mapping) and text_column(first) is not None
    return elements if rows else itertools.islice(elements, samples)


def token_rows(element: Any) -> Iterable[Tensor]:
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
