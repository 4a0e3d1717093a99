"""What an encoder-decoder is calibrated on: sources, and what it writes of them itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from teq_graph.calibration.self_sampling import draw
from teq_graph.capture import CapturedGraph
from teq_graph.capture.cutting import cut
from teq_graph.capture.shapes import ENCODED, PAST, PRESENT
from teq_graph.errors import InputError
from teq_graph.system import progress

TOKENS = "decoder_input_ids"


def random_sources(captured: CapturedGraph, samples: int, length: int, seed: int) -> Tensor:
    """Sources without any data: tokens [samples, length] int64 drawn uniformly from the encoder's vocabulary, or, of an
    encoder of other things, standard normal numbers of its input's shape."""
    assert captured.encoder_decoder is not None
    encoder, generator = captured.encoder_decoder.encoder, torch.Generator().manual_seed(seed)
    example = captured.example_args[0][encoder.inputs[0]]
    if encoder.vocab_size is None:
        return torch.randn(samples, *example.shape[1:], generator=generator)
    return torch.randint(encoder.vocab_size, (samples, length), generator=generator)


def with_answers(
    captured: CapturedGraph, batches: Iterable[Any], *, length: int, batch_size: int, seed: int
) -> list[dict[str, Any]]:
    """Inputs of `captured`, of `batch_size` rows at most where it wrote the decoder's tokens itself.

    Those that come without are completed: after the start token come up to `length` - 1 that are drawn from the model's
    distribution at temperature 1. Raises InputError where the model has no start token, or a batch is neither a dict
    nor one tensor.
    """
    shape = captured.encoder_decoder
    assert shape is not None
    length = min(length, shape.decoder.max_positions or length)
    write, result = None, []
    for batch in batches:
        inputs = {shape.encoder.inputs[0]: batch} if isinstance(batch, Tensor) else batch
        if not isinstance(inputs, dict):
            raise InputError(f"calibration: an element is {type(batch).__name__}; accepted are dicts and tensors")
        if TOKENS in inputs:
            result.append(inputs)
            continue
        if shape.decoder_start_token_id is None:
            raise InputError(f"calibration: {TOKENS} are missing, and the model names no token to start with")
        write = write or _Writer(captured, seed)
        (encoder_inputs, _, _), _ = captured.bind({**inputs, TOKENS: torch.zeros(_rows(inputs), 1, dtype=torch.long)})
        whole = {**encoder_inputs, TOKENS: write(encoder_inputs, shape.decoder_start_token_id, length)}
        result += _split(whole, batch_size)
    return result


class _Writer:
    """The encoder, and the decoder with its cache, of a float graph."""

    def __init__(self, captured: CapturedGraph, seed: int) -> None:
        assert captured.encoder_decoder is not None
        self.captured = captured
        self.decoder_shape = captured.encoder_decoder.decoder
        self.encoder, self.decoder = cut(captured)
        self.generator = torch.Generator().manual_seed(seed)

    @torch.inference_mode()
    def __call__(self, inputs: dict[str, Tensor], start: int, length: int) -> Tensor:
        """Tokens [b, length] int64, the start token first."""
        inputs = {name: value.to(self.captured.device) for name, value in inputs.items()}
        encoded = self.encoder.graph_module(**inputs)[PRESENT]
        read = {f"{ENCODED}{name}": value for name, value in inputs.items()}
        read = {name: value for name, value in read.items() if name in self.decoder.example_kwargs}
        rows = _rows(inputs)
        empty = self.decoder_shape.empty_past(rows, self.captured.dtype, self.captured.device)
        past = [{"decoder": {"key": key, "value": value}} for key, value in empty]
        pieces = [torch.full((rows, 1), start)]
        with progress.task("Sampling text", total=rows * length) as work:
            for _ in range(1, length):
                layers = [{**own, **other} for own, other in zip(past, encoded, strict=True)]
                tokens = pieces[-1].to(self.captured.device)
                output = self.decoder.graph_module(input_ids=tokens, **{PAST: layers}, **read)
                past = output[PRESENT]
                pieces.append(draw(output["logits"][:, -1], self.generator))
                work.advance(rows)
        return torch.cat(pieces, 1).clone()


def _rows(inputs: dict[str, Any]) -> int:
    return len(next(iter(inputs.values())))


def _split(batch: dict[str, Tensor], batch_size: int) -> Iterator[dict[str, Tensor]]:
    for start in range(0, _rows(batch), batch_size):
        yield {name: value[start : start + batch_size] for name, value in batch.items()}
