"""Tiny random encoder-decoders of four kinds, and what transformers writes with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from support.architectures import VOCAB
from support.graphs import randomize

PAD, START, END = 0, 3, 2
IDS = dict(vocab_size=VOCAB, pad_token_id=PAD, bos_token_id=1, eos_token_id=END, decoder_start_token_id=START)
LAYERS = dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4)
WIDTHS = dict(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64)
BINS, FRAMES = 16, 40


def t5(**options: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = dict(d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    return randomize(T5ForConditionalGeneration(T5Config(**({**IDS, **sizes} | options))))


def bart(**options: Any) -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        **{**IDS, **LAYERS, **WIDTHS, "max_position_embeddings": 64, "forced_eos_token_id": END} | options
    )
    return randomize(BartForConditionalGeneration(config))


def marian(**options: Any) -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    config = MarianConfig(
        **{**IDS, **LAYERS, **WIDTHS, "max_position_embeddings": 64, "forced_eos_token_id": 0} | options
    )
    return randomize(MarianMTModel(config))


def whisper(**options: Any) -> nn.Module:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    audio = dict(num_mel_bins=BINS, max_source_positions=FRAMES // 2, max_target_positions=40)
    quiet: dict[str, Any] = {"begin_suppress_tokens": [5, 6], "suppress_tokens": [7]}
    config = WhisperConfig(**{**IDS, **LAYERS, **WIDTHS, **audio, **quiet} | options)
    return randomize(WhisperForConditionalGeneration(config))


KINDS: dict[str, Callable[..., nn.Module]] = {"T5": t5, "BART": bart, "Marian": marian, "Whisper": whisper}


def greedy(model: Any, inputs: dict[str, Tensor], **options: Any) -> list[list[int]]:
    """What transformers generates after the start token, up to the end token."""
    from transformers import GenerationMixin

    # Not Whisper's own, which cuts sounds into windows.
    found = GenerationMixin.generate(model, **inputs, do_sample=False, num_beams=1, **options)
    ends = model.generation_config.eos_token_id
    rows = [row[1:] for row in found.tolist()]
    return [row[: row.index(ends)] if ends in row else row for row in rows]
