"""Text that a causal language model writes itself, for calibration without data."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from teq_graph.calibration.decoding_step import StepFn
from teq_graph.errors import NumericsError
from teq_graph.system import progress

WRITTEN_AT_ONCE = 32
"""Samples that are written side by side, each with a KV cache of its own."""


def sample_text(
    step: StepFn,
    *,
    samples: int,
    length: int,
    seed: int,
    vocab_size: int,
    bos_token_id: int | None = None,
    special_ids: Iterable[int] = (),
    batch_size: int = WRITTEN_AT_ONCE,
) -> Tensor:
    """Text [samples, length] int64 written by a causal language model, for calibration without data.

    After the beginning-of-text token, where the model's tokenizer writes one, comes a token drawn uniformly
    from the vocabulary without `special_ids`, then tokens drawn from the model's distribution at temperature 1.
    The random token makes the samples differ: from the beginning alone, an instruction-tuned model writes its one
    system prompt again and again. LLM-QAT (arXiv 2305.17888, section 3.1) takes the next few tokens greedily; on
    SmolLM2 that repeats one phrase, and this and lower temperatures moved the channels' mean magnitudes away from
    those on WikiText (rms log ratio 0.127 as here, 0.134 greedily, 0.136 at 0.8, 0.264 for random tokens). A text
    that ends is followed by another one, as in the packed sequences of pre-training.

    Raises NumericsError where the model's logits are not finite.
    """
    generator = torch.Generator().manual_seed(seed)
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[[index for index in special_ids if 0 <= index < vocab_size]] = False
    starts = allowed.nonzero().squeeze(-1)
    first = starts[torch.randint(len(starts), (samples, 1), generator=generator)]
    if bos_token_id is not None:
        first = torch.cat([torch.full((samples, 1), bos_token_id), first], 1)
    texts = []
    with torch.inference_mode(), progress.task("Sampling text", total=samples * length) as work:
        for written in first[:, :length].split(batch_size):
            pieces, past = [written], None
            for _ in range(written.shape[1], length):
                logits, past = step(pieces[-1], past)
                pieces.append(draw(logits[:, -1], generator))
                work.advance(len(written))
            texts.append(torch.cat(pieces, 1))
    return torch.cat(texts).clone()


def draw(logits: Tensor, generator: torch.Generator) -> Tensor:
    """One token per row [b, vocab] -> [b, 1]."""
    logits = logits.float().cpu()
    if not torch.isfinite(logits.amax(-1)).all():  # the maximum is NaN or infinite where any is; -inf masks a token
        raise NumericsError("sampling text: the model's logits hold NaN or infinity; accepted are finite ones")
    # inverse of the distribution function: several times faster here than torch.multinomial, in float64 since
    # float32 sums over a large vocabulary lose the tail
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)
    points = torch.rand(len(logits), 1, generator=generator, dtype=torch.float64) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).clamp_(max=logits.shape[-1] - 1)
