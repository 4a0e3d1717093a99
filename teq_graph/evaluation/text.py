"""Perplexity of a language model, and how far two models' predictions are apart."""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from teq_graph.errors import InputError, NumericsError, brief
from teq_graph.system import progress

LogitsFn: TypeAlias = Callable[[Tensor], Any]
"""`input_ids [b, s] int64 -> logits [b, s, vocab]`, a tensor or an array of any float dtype."""

_ROWS = 128  # logits are widened to float32 this many positions at a time: 25 MB for 49152 tokens


@dataclasses.dataclass(frozen=True)
class Perplexity:
    """`value` = exp(mean negative log-likelihood) over `tokens` predicted tokens; `seconds` it took."""

    value: float
    tokens: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Divergence:
    """Means over `tokens` positions: KL(reference || other) in nats, and how often both favour the same token."""

    kl_divergence: float
    top1_agreement: float
    tokens: int


def perplexity(
    logits_fn: LogitsFn,
    token_ids: Tensor | Sequence[int],
    *,
    context: int,
    stride: int | None = None,
    batch_size: int = 1,
) -> Perplexity:
    """Perplexity on `token_ids` [n], in windows of at most `context` tokens.

    Windows begin every `stride` tokens, and each predicts the tokens that the one before did not reach. With
    `stride=None` (= `context`) they do not overlap, and each predicts all its tokens but the first: the usual
    protocol of the literature on quantization. A smaller stride gives each token more to look back on.

    Raises InputError for fewer than two tokens or a context or stride out of range, NumericsError where the
    result is not finite.
    """
    ids = _as_ids(token_ids)
    stride = context if stride is None else stride
    _check_sizes(context, stride, batch_size)
    start = time.perf_counter()
    total, count = 0.0, 0
    for windows, targets in _window_batches(ids, context, stride, batch_size, "Perplexity"):
        logits = _logits(logits_fn, windows)[:, :-1]
        labels = windows[:, 1:].to(logits.device)
        for row, label, wanted in zip(logits, labels, targets, strict=True):
            for part, expected in zip(row[-wanted:].split(_ROWS), label[-wanted:].split(_ROWS), strict=True):
                total += functional.cross_entropy(part.float(), expected, reduction="sum").item()
            count += wanted
    mean = total / count
    if not math.isfinite(mean):
        raise NumericsError(f"perplexity: the mean negative log-likelihood is {mean}; accepted are finite logits")
    return Perplexity(math.exp(min(mean, 700.0)), count, time.perf_counter() - start)


def divergence(
    reference_fn: LogitsFn,
    logits_fn: LogitsFn,
    token_ids: Tensor | Sequence[int],
    *,
    context: int,
    batch_size: int = 1,
) -> Divergence:
    """Compares two models' predictions at every position of `token_ids` [n], in windows of `context` tokens."""
    ids = _as_ids(token_ids)
    _check_sizes(context, context, batch_size)
    total, agreed, count = 0.0, 0, 0
    for windows, _ in _window_batches(ids, context, context, batch_size, "Comparing logits"):
        parts = (_logits(function, windows).flatten(0, 1).split(_ROWS) for function in (reference_fn, logits_fn))
        for expected, actual in zip(*parts, strict=True):
            actual = actual.to(expected.device)
            log_p, log_q = expected.float().log_softmax(-1), actual.float().log_softmax(-1)
            total += functional.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
            agreed += int((expected.argmax(-1) == actual.argmax(-1)).sum())
            count += len(expected)
    if not math.isfinite(total):
        raise NumericsError(f"divergence: it is {total}; accepted are finite logits")
    return Divergence(total / count, agreed / count, count)


def builtin_text() -> str:
    """English prose that every machine has: the language reference in CPython's standard library.

    Its paragraphs, one per line, without headings, code, tables and markup. The text differs a little between
    versions of Python, so figures on it compare within one version only.
    """
    from pydoc_data.topics import topics

    paragraphs = (
        " ".join(re.sub(r"[*\"`]|\[\d+\]", "", block).split())
        for name in sorted(topics)
        for block in re.split(r"\n\s*\n", topics[name])
        if not re.search(r"^\s{2,}|[*=~^-]{4}|::=|[|+]-", block, re.MULTILINE)
    )
    prose = (text for text in paragraphs if len(text) > 120 and text.endswith("."))
    return "\n".join(dict.fromkeys(prose))  # topics repeat one another's paragraphs


def _check_sizes(context: Any, stride: Any, batch_size: Any) -> None:
    sizes = (context, stride, batch_size)
    if (
        any(isinstance(size, bool) or not isinstance(size, numbers.Integral) for size in sizes)
        or min(sizes) < 1
        or not 2 <= context >= stride
    ):
        shown = f"context={brief(context)}, stride={brief(stride)}, batch_size={brief(batch_size)}"
        raise InputError(f"{shown}: accepted are integers >= 1, a context >= 2 and a stride up to it")


def _as_ids(token_ids: Tensor | Sequence[int]) -> Tensor:
    try:
        ids = torch.as_tensor(token_ids).flatten()
    except (RuntimeError, TypeError, ValueError):
        raise InputError(f"token_ids={brief(token_ids)}: accepted are integers [n]") from None
    if len(ids) < 2:
        raise InputError(f"token_ids: there are {len(ids)} tokens; accepted are two or more")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool or int(ids.min()) < 0:
        raise InputError(f"token_ids={brief(token_ids)}: accepted are integers [n], from 0 on")
    return ids.to(torch.int64)


def _window_batches(
    ids: Tensor, context: int, stride: int, batch_size: int, description: str
) -> Iterator[tuple[Tensor, list[int]]]:
    """Windows [b, s] of equal length, and of each how many of its last tokens it is to predict."""
    pending: list[Tensor] = []
    targets: list[int] = []
    reached = 0
    for begin in progress.track(range(0, max(len(ids) - 1, 1), stride), description):
        window = ids[begin : begin + context]
        if begin and reached == len(ids):
            continue
        if pending and (len(pending) == batch_size or len(window) != len(pending[0])):
            yield torch.stack(pending), targets
            pending, targets = [], []
        pending.append(window)
        targets.append(min(begin + len(window) - reached, len(window) - 1))
        reached = begin + len(window)
    yield torch.stack(pending), targets


def _logits(function: LogitsFn, windows: Tensor) -> Tensor:
    if not callable(function):
        raise InputError(f"logits_fn={brief(function)}: accepted is a function of input_ids")
    with torch.inference_mode():
        given = function(windows)
        try:
            logits = torch.as_tensor(given)
        except (RuntimeError, TypeError, ValueError):
            raise InputError(f"logits={brief(given)}: accepted are floats [b, s, vocab]") from None
    shape, size = list(windows.shape), int(windows.max()) + 1
    if logits.dim() != 3 or list(logits.shape[:2]) != shape or not logits.is_floating_point():
        kind = f"{list(logits.shape)} {logits.dtype}"
        raise InputError(f"logits of input_ids {shape} are {kind}; accepted are floats [b, s, vocab]")
    if logits.shape[2] < size:
        raise InputError(f"token_ids: {size - 1} is one of them; accepted are 0 to {logits.shape[2] - 1}")
    return logits
