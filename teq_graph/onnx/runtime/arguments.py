"""What callers hand to the runtime: numbers, token ids and prompts, refused in one line where they are none.

Nothing is rounded or guessed: a float is no token, and the keys of a mapping are no prompt.
"""

from __future__ import annotations

import contextlib
import operator
import reprlib
from collections.abc import Callable, Mapping, Set
from typing import Any

import numpy as np
import numpy.typing as npt

from teq_graph.errors import InputError

PROMPTS = "a string, token ids, or a list of either"


def integer(name: str, value: object, least: int, accepted: str = "", most: int | None = None) -> int:
    """`value` as a Python integer, numpy's included, from `least` on to `most`."""
    number = _index(value)
    if number is None or number < least or (most is not None and number > most):
        raise InputError(f"{name}={_shown(value)}: accepted are {accepted or f'integers >= {least}'}")
    return number


def real(name: str, value: object, accepted: str, accepts: Callable[[float], bool]) -> float:
    """`value` as a Python float, where `accepts` says so."""
    if isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):
            if accepts(float(value)):
                return float(value)
    raise InputError(f"{name}={_shown(value)}: accepted are {accepted}")


def tokens(name: str, value: object) -> list[int]:
    """Token ids from a list, tuple, array or tensor of one dimension, or a set."""
    items = list(value) if isinstance(value, Set) else _items(name, value, "token ids")
    return _tokens(name, items, "token ids")


def token_rows(prompt: object) -> tuple[list[list[int]], bool]:
    """Token ids of each prompt, and whether it is a batch of them."""
    items = _items("prompt", prompt, PROMPTS)
    batch = any(_depth(item) > 0 for item in items)
    rows = [_items("prompt", item, PROMPTS) for item in items] if batch else [items]
    return [_tokens("prompt", row, PROMPTS) for row in rows], batch


def integers(name: str, value: object) -> npt.NDArray[np.int64]:
    """An array of integers or booleans as int64; of any shape."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:  # rows of different lengths
        raise InputError(f"{name}={_shown(value)}: accepted are integers [batch, sequence]") from error
    if array.dtype.kind not in "iub":
        kind = f"{array.dtype} of shape {list(array.shape)}"
        raise InputError(f"{name}: {kind}; accepted are integers [batch, sequence]")
    return array.astype(np.int64)


def text(name: str, value: object) -> str:
    """A string that has a UTF-8 form, as tokenizers need."""
    if not isinstance(value, str):
        raise InputError(f"{name}={_shown(value)}: accepted is a string")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        character = value[error.start]
        raise InputError(f"{name}: character {error.start} is {character!r}; accepted is Unicode text") from error
    return value


def _index(value: object) -> int | None:
    if isinstance(value, (bool, np.bool_)):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _tokens(name: str, items: list[Any], accepted: str) -> list[int]:
    found: list[int] = []
    for item in items:
        number = _index(item)
        if number is None:
            raise InputError(f"{name}: {_shown(item)} is no token id; accepted are {accepted}")
        found.append(number)
    return found


def _items(name: str, value: Any, accepted: str) -> list[Any]:
    if isinstance(value, Mapping) or _depth(value) == 0:
        raise InputError(f"{name}: {_shown(value)}; accepted are {accepted}")
    return list(value)


def _depth(value: Any) -> int:
    """Dimensions of an array, a tensor, or nested lists; 0 for anything else."""
    try:
        return np.ndim(value)
    except ValueError:  # rows of different lengths
        return 2
    except TypeError:
        return 0


def _shown(value: object) -> str:
    return " ".join(reprlib.repr(value).split())
