"""Choosing the next token from logits."""

from __future__ import annotations

import collections
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from teq_graph.errors import NumericsError
from teq_graph.onnx.runtime.generation.options import GenerationOptions

Row = npt.NDArray[np.float64]


class Sampler:
    """Chooses tokens as `GenerationOptions` say: first what changes logits, then temperature, then what leaves out
    unlikely tokens, in the order of transformers' `generate`.
    """

    def __init__(self, options: GenerationOptions, eos_tokens: Sequence[int] = (), count: int | None = None) -> None:
        """`count` is how many tokens come at most."""
        self.options = options
        self._count = count
        self._eos = list(eos_tokens)
        self._random = np.random.default_rng(options.seed)
        self._changes_logits = (
            options.repetition_penalty != 1.0
            or options.presence_penalty != 0.0
            or options.frequency_penalty != 0.0
            or options.no_repeat_ngram_size > 0
            or options.min_new_tokens > 0
            or options.min_length > 0
            or any(tokens for name, tokens in options.tokens().items() if name != "eos_token_id")
        )

    def __call__(
        self, logits: npt.NDArray[np.floating], before: Sequence[tuple[Sequence[int], Sequence[int]]] = ()
    ) -> npt.NDArray[np.int64]:
        """Token ids int64 [b] for logits [b, vocab], where -inf masks a token.

        `before` are, for each row, its prompt and the tokens that follow it so far.
        Raises NumericsError for NaN, infinity, and where every token is masked.
        """
        best: npt.NDArray[np.int64] = logits.argmax(axis=-1)
        self.check(logits[np.arange(len(best)), best])
        if self.takes_best:
            return best
        rows = [row.astype(np.float64) for row in logits]
        if self._changes_logits:
            for row, (prompt, new) in zip(rows, before, strict=True):
                self._change(row, prompt, new)
        choose = self._sample if self.options.samples else lambda row: int(row.argmax())
        return np.array([choose(row) for row in rows], dtype=np.int64)

    @property
    def takes_best(self) -> bool:
        """Whether the tokens are those of the largest logits."""
        return not self._changes_logits and not self.options.samples

    def check(self, largest: npt.NDArray[np.floating]) -> None:
        """Raises NumericsError where the largest logit of a row is NaN or infinite, as it is where any is."""
        if not np.isfinite(largest).all():
            raise NumericsError("the model's logits have NaN or infinite values: accepted are finite ones")

    def _change(self, row: Row, prompt: Sequence[int], new: Sequence[int]) -> None:
        options, sequence = self.options, [*prompt, *new]
        if options.repetition_penalty != 1.0:
            seen = np.unique(np.asarray(sequence, dtype=np.int64))
            with np.errstate(over="ignore"):  # told of below
                row[seen] *= np.where(row[seen] < 0, options.repetition_penalty, 1 / options.repetition_penalty)
        if options.presence_penalty or options.frequency_penalty:
            for token, count in collections.Counter(new).items():
                row[token] -= options.presence_penalty + count * options.frequency_penalty
        banned = _repeating(sequence, options.no_repeat_ngram_size) if options.no_repeat_ngram_size else []
        banned += [token for (token,) in options.bad_words_ids]
        if len(new) < options.min_new_tokens or len(sequence) < options.min_length:
            banned += self._eos
        row[banned] = -np.inf
        if options.forced_bos_token_id is not None and len(sequence) == 1:
            _force(row, options.forced_bos_token_id)
        if options.forced_eos_token_id is not None and len(new) + 1 == self._count:
            _force(row, options.forced_eos_token_id)
        row[[*options.suppress_tokens]] = -np.inf
        # A first token that is forced is not the one that this is about.
        if len(new) == int(options.forced_bos_token_id is not None and len(prompt) == 1):
            row[[*options.begin_suppress_tokens]] = -np.inf
        if row.max() == -np.inf:
            raise NumericsError("no token is left to choose from: fewer may be suppressed or kept from repeating")
        if not np.isfinite(row.max()):  # so is the largest where any is NaN
            given = f"repetition_penalty={options.repetition_penalty}"
            raise NumericsError(f"{given}: logits of {row.max()} after it; accepted is one that leaves them finite")

    def _sample(self, row: Row) -> int:
        options = self.options
        # Shifted before the division: with a small temperature all but the largest overflow, to a probability of 0.
        with np.errstate(over="ignore"):
            logits = (row - row.max()) / options.temperature
        tokens = np.flatnonzero(logits > -np.inf)
        for keep, value, neutral in (
            (keep_top_k, options.top_k, 0),
            (keep_top_p, options.top_p, 1.0),
            (keep_min_p, options.min_p, 0.0),
            (keep_typical, options.typical_p, 1.0),
            (keep_epsilon, options.epsilon_cutoff, 0.0),
            (keep_eta, options.eta_cutoff, 0.0),
        ):
            if value != neutral:
                kept = keep(logits[tokens], value)
                # One is always left, however strict.
                tokens = tokens[kept] if kept.any() else tokens[[logits[tokens].argmax()]]
        return int(self._random.choice(tokens, p=_softmax(logits[tokens])))


def _force(row: Row, token: int) -> None:
    row[:] = -np.inf
    row[token] = 0.0


def _repeating(sequence: Sequence[int], size: int) -> list[int]:
    """The tokens that would end a run of `size` tokens which was there before."""
    start = list(sequence[len(sequence) - size + 1 :])
    places = range(len(sequence) - size + 1)
    return [sequence[at + size - 1] for at in places if list(sequence[at : at + size - 1]) == start]


# What leaves out unlikely tokens: logits [n] -> which of them stay, bool [n].

Kept = npt.NDArray[np.bool_]


def keep_top_k(logits: Row, count: float) -> Kept:
    kept = np.zeros(len(logits), dtype=bool)
    size = min(int(count), len(logits))
    kept[np.argpartition(-logits, size - 1)[:size]] = True
    return kept


def keep_top_p(logits: Row, share: float) -> Kept:
    probabilities = _softmax(logits)
    return _first(probabilities, np.argsort(-probabilities, kind="stable"), share)


def keep_min_p(logits: Row, share: float) -> Kept:
    kept: Kept = logits >= logits.max() + math.log(share)
    return kept


def keep_typical(logits: Row, share: float) -> Kept:
    probabilities = _softmax(logits)
    information = -np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))
    distance = np.abs(information - probabilities @ information)
    return _first(probabilities, np.argsort(distance, kind="stable"), share)


def keep_epsilon(logits: Row, cutoff: float) -> Kept:
    return _softmax(logits) >= cutoff


def keep_eta(logits: Row, cutoff: float) -> Kept:
    probabilities = _softmax(logits)
    entropy = -(probabilities * np.log(np.maximum(probabilities, np.finfo(np.float64).tiny))).sum()
    return probabilities >= min(cutoff, math.sqrt(cutoff) * math.exp(-entropy))


def _first(probabilities: Row, order: npt.NDArray[np.int64], share: float) -> Kept:
    """The first in `order` that together hold `share`."""
    ordered = probabilities[order]
    kept = np.zeros(len(order), dtype=bool)
    kept[order[np.cumsum(ordered) - ordered < share]] = True
    return kept


def _softmax(logits: Row) -> Row:
    exponentials = np.exp(logits - logits.max())
    normalized: Row = exponentials / exponentials.sum()
    return normalized
