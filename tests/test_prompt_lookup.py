"""Prompt lookup: guesses from the text itself, which leave the tokens as they are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.onnx.runtime.generation import decoding
from teq_graph.onnx.runtime.generation.prompt_lookup import guess

PROMPT = "Once upon a time"


@pytest.fixture
def decoder(stories_dir: Path) -> OnnxDecoder:
    return OnnxDecoder.load(stories_dir, threads=1)


@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(temperature=0.8, seed=7),
        dict(do_sample=False, repetition_penalty=1.1, presence_penalty=0.2),
        dict(do_sample=False, stop_strings="park"),
        dict(do_sample=False, no_repeat_ngram_size=4),
    ],
    ids=str,
)
def test_prompt_lookup_gives_the_same_tokens_in_fewer_steps(
    decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Steps are fewer but where no run of four may come twice: then what followed three before is never chosen."""
    once = decoder.generate(decoder.encode(PROMPT), 40, do_sample=False)
    tokens = [*decoder.encode(PROMPT), *once, *decoder.encode(PROMPT), *once[:5]]
    steps = [0]
    step = decoding.DecoderSession._step

    def counted(self: Any, *args: Any) -> Any:
        steps[0] += 1
        return step(self, *args)

    monkeypatch.setattr(decoding.DecoderSession, "_step", counted)
    expected = decoder.generate(tokens, 50, **options)
    one_by_one = steps[0]
    for lookup in (1, 3, 8):
        steps[0] = 0
        stream = decoder.stream(tokens, 50, prompt_lookup_num_tokens=lookup, **options)
        assert [*stream] == expected == stream.tokens
        if "no_repeat_ngram_size" in options:
            assert steps[0] == one_by_one
        else:
            assert steps[0] < one_by_one
    last = decoder.stream(tokens, 1, prompt_lookup_num_tokens=8, **options)
    assert [*last] == expected[:1] and last.finish_reason == "length"


def test_prompt_lookup_at_the_end_of_the_context(decoder: OnnxDecoder) -> None:
    tokens = decoder.encode(PROMPT) * 200
    for length in (505, 510, 512):
        expected = decoder.generate(tokens[:length], eos_token_id=())
        assert decoder.generate(tokens[:length], eos_token_id=(), prompt_lookup_num_tokens=8) == expected
        assert len(expected) == 513 - length


def test_prompt_lookup_where_it_cannot_be(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch, and where the past is not written in place: the same tokens, one by one."""
    prompts = [PROMPT, "Tom"]
    assert decoder.generate(prompts, 30, prompt_lookup_num_tokens=4) == decoder.generate(prompts, 30)
    grown = dataclasses.replace(decoder.metadata, shared_buffers=False)
    monkeypatch.setattr(decoder._decoding, "metadata", grown)
    assert decoder.generate(PROMPT, 30, prompt_lookup_num_tokens=4) == decoder.generate(PROMPT, 30)


def test_guesses_are_what_followed_before() -> None:
    assert guess([5, 1, 2, 3, 9, 8, 1, 2, 3], 2) == [9, 8]
    assert guess([1, 2, 3, 7, 1, 2, 3, 9, 1, 2, 3], 1) == [9], "where they stood last"
    assert guess([6, 2, 3, 8, 5, 2, 3], 2) == [], "two alike"
    assert guess([1, 2, 1, 2, 1], 5) == [2, 1, 2, 1, 2], "on and on"
    assert guess([4, 4, 4, 4], 3) == [4, 4, 4]
    for tokens in ([], [1], [1, 1], [1, 1, 1], [1, 2, 3, 4], [1, 2, 3, 1]):
        assert guess(tokens, 4) == []
    assert guess([1, 1, 1, 1], 0) == []
