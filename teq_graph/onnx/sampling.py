"""Choosing the next token from logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from teq_graph.errors import InputError, NumericsError


class Sampler:
    """Greedy at `temperature` 0; otherwise samples from softmax(logits / temperature).

    `top_k` > 0 keeps the k most likely tokens. `top_p` < 1 then keeps the smallest set of them that holds at
    least that share of what is left (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751). The same `seed`
    gives the same tokens for the same logits. Raises InputError for values outside these ranges.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise InputError(f"temperature={temperature!r}: accepted are finite numbers >= 0 (0 is greedy)")
        if not isinstance(top_k, int) or top_k < 0:
            raise InputError(f"top_k={top_k!r}: accepted are integers >= 0 (0 keeps all tokens)")
        if not 0.0 < top_p <= 1.0:
            raise InputError(f"top_p={top_p!r}: accepted are numbers above 0, up to 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self._random = np.random.default_rng(seed)

    def __call__(self, logits: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Token ids int64 [b] for logits [b, vocab]; raises NumericsError for NaN."""
        if np.isnan(logits).any():
            raise NumericsError("the model's logits have NaN values: accepted are numbers")
        if self.temperature == 0.0:
            best: npt.NDArray[np.int64] = logits.argmax(axis=-1)
            return best
        return np.array([self._sample(row) for row in logits.astype(np.float64)], dtype=np.int64)

    def _sample(self, logits: npt.NDArray[np.float64]) -> int:
        tokens = np.arange(len(logits))
        if 0 < self.top_k < len(logits):
            tokens = np.argpartition(-logits, self.top_k)[: self.top_k]
        probabilities = _softmax(logits[tokens], self.temperature)
        if self.top_p < 1.0:
            order = np.argsort(-probabilities, kind="stable")
            tokens, probabilities = tokens[order], probabilities[order]
            kept = np.cumsum(probabilities) - probabilities < self.top_p
            tokens, probabilities = tokens[kept], probabilities[kept] / probabilities[kept].sum()
        return int(self._random.choice(tokens, p=probabilities))


def _softmax(logits: npt.NDArray[np.float64], temperature: float) -> npt.NDArray[np.float64]:
    # Shifted before the division, so that a small temperature cannot overflow.
    exponentials = np.exp((logits - logits.max()) / temperature)
    normalized: npt.NDArray[np.float64] = exponentials / exponentials.sum()
    return normalized
