"""Generations that are ended from outside, and those for which there is no memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from teq_graph.errors import InputError
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.onnx.runtime.generation import decoding
from teq_graph.system import memory


@pytest.fixture
def decoder(stories_dir: Path) -> OnnxDecoder:
    return OnnxDecoder.load(stories_dir, threads=1)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Positions of each step, in prompts' parts of 16."""
    monkeypatch.setitem(decoding.PREFILL_TOKENS, "cpu", 16)
    taken: list[int] = []
    step = decoding.DecoderSession._step

    def counted(self: Any, ids: Any, *rest: Any) -> Any:
        taken.append(ids.shape[1])
        return step(self, ids, *rest)

    monkeypatch.setattr(decoding.DecoderSession, "_step", counted)
    return taken


@pytest.mark.parametrize("after", [0, 1, 3, 7, 9])
def test_cancelling_between_steps(decoder: OnnxDecoder, steps: list[int], after: int) -> None:
    """A prompt of seven parts, and then tokens."""
    prompt = [5] * 100
    whole = decoder.generate(prompt, 8)
    steps.clear()
    stream = decoder.stream(prompt, 8, cancelled=lambda: len(steps) >= after)
    assert [*stream] == whole[: max(0, after - 6)] == stream.tokens
    assert stream.finish_reason is None
    assert steps == ([16] * 6 + [4] + [1] * 8)[:after]
    steps.clear()
    assert decoder.generate([prompt] * 2, 8, cancelled=lambda: len(steps) >= 1) == [whole[:1]] * 2
    steps.clear()
    text = decoder.generate("Once upon a time", 8, cancelled=lambda: len(steps) >= 4)
    assert decoder.generate("Once upon a time", 8).startswith(text) and text


def test_no_tokens_are_a_length(decoder: OnnxDecoder, steps: list[int]) -> None:
    stream = decoder.stream([5], 0)
    assert ([*stream], stream.finish_reason, steps) == ([], "length", [])


@pytest.mark.parametrize("shared", [True, False])
def test_a_cache_without_memory(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch, shared: bool) -> None:
    """As for a model without a limit of positions; 5 layers of 4 heads of 8 numbers, for keys and for values."""
    monkeypatch.setattr(decoder, "shape", dataclasses.replace(decoder.shape, max_positions=None))
    monkeypatch.setattr(decoder._decoding, "metadata", dataclasses.replace(decoder.metadata, shared_buffers=shared))
    each = decoder.shape.cached_numbers(1) * 4 * (1 if shared else 2)
    assert each == 1280 * (1 if shared else 2)
    monkeypatch.setattr(memory, "available_bytes", lambda: 200 * each + 1)
    accepted = rf"{201 * each:,} bytes; accepted are up to 200 positions, in the {200 * each + 1:,} bytes"
    with pytest.raises(InputError, match=rf"^cache of 201 positions, prompt and new tokens together: {accepted}"):
        decoder.generate([5], 200)
    with pytest.raises(InputError, match="accepted are up to 100 positions"):
        decoder.generate([[5], [5]], 100)
    with pytest.raises(InputError, match="accepted are up to 200 positions"):
        decoder.generate([5], 10**30)
    assert len(decoder.generate([5], 3)) == 3


def test_memory_that_is_available() -> None:
    available = memory.available_bytes()
    assert available is not None and 2**20 < available < 2**50


def test_empty_prompts(decoder: OnnxDecoder) -> None:
    prompt: Any
    for prompt in ([], [[5], []]):
        with pytest.raises(InputError, match=r"^prompt: it is empty; accepted is at least one token$"):
            decoder.generate(prompt)
