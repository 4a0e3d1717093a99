"""Choosing the next token from logits."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from teq_graph.errors import NumericsError
from teq_graph.onnx import arguments


class Sampler:
    """Greedy at `temperature` 0; otherwise samples from softmax(logits / temperature).

    `top_k` > 0 keeps the k most likely tokens. `top_p` < 1 then keeps the smallest set of them that holds at
    least that share of what is left (nucleus sampling: Holtzman et al. 2020, arXiv 1904.09751). The same `seed`
    gives the same tokens for the same logits. Raises InputError for values outside these ranges.
    """

    def __init__(self, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int | None = None) -> None:
        self.temperature = arguments.real(
            "temperature", temperature, "finite numbers >= 0 (0 is greedy)", lambda value: 0.0 <= value < float("inf")
        )
        self.top_k = arguments.integer("top_k", top_k, 0, "integers >= 0 (0 keeps all tokens)")
        self.top_p = arguments.real("top_p", top_p, "numbers above 0, up to 1", lambda value: 0.0 < value <= 1.0)
        self._random = np.random.default_rng(None if seed is None else arguments.integer("seed", seed, 0))

    def __call__(self, logits: npt.NDArray[np.floating]) -> npt.NDArray[np.int64]:
        """Token ids int64 [b] for logits [b, vocab], where -inf masks a token.

        Raises NumericsError for NaN, infinity, and where every token is masked.
        """
        # The largest logit is NaN or infinite where any is.
        if not np.isfinite(logits.max(axis=-1)).all():
            raise NumericsError("the model's logits have NaN or infinite values: accepted are finite ones")
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
