"""Choosing tokens: the distribution, each option beside transformers' own, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers.generation.logits_process as reference
from support.names import stable
from transformers import GenerationConfig

from teq_graph.errors import InputError, NumericsError
from teq_graph.onnx.runtime.generation.options import NEUTRAL, GenerationOptions
from teq_graph.onnx.runtime.generation.sampling import (
    Sampler,
    keep_epsilon,
    keep_eta,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
)


def sampler(**options: Any) -> Sampler:
    return Sampler(GenerationOptions().changed(**options))


def test_samples_follow_the_distribution() -> None:
    logits = np.log([0.5, 0.05, 0.3, 0.15])
    draws = np.repeat(logits[None], 20000, axis=0)
    cases: list[tuple[dict[str, Any], list[float]]] = [
        ({}, [0.5, 0.05, 0.3, 0.15]),
        ({"top_k": 2}, [0.625, 0.0, 0.375, 0.0]),
        ({"top_p": 0.9}, [0.5 / 0.95, 0.0, 0.3 / 0.95, 0.15 / 0.95]),
        ({"top_p": 0.79}, [0.625, 0.0, 0.375, 0.0]),
        ({"min_p": 0.5}, [0.625, 0.0, 0.375, 0.0]),
        ({"epsilon_cutoff": 0.1}, [0.5 / 0.95, 0.0, 0.3 / 0.95, 0.15 / 0.95]),
    ]
    for options, expected in cases:
        counts = np.bincount(sampler(temperature=1.0, seed=1, **options)(draws), minlength=4) / len(draws)
        # Five standard deviations of a share.
        assert np.abs(counts - expected).max() < 5 * 0.5 / len(draws) ** 0.5
        assert (counts[np.array(expected) == 0] == 0).all()
    sharp = np.bincount(sampler(temperature=0.5, seed=1)(draws), minlength=4) / len(draws)
    squared = np.array([0.5, 0.05, 0.3, 0.15]) ** 2
    assert np.abs(sharp - squared / squared.sum()).max() < 5 * 0.5 / len(draws) ** 0.5


@pytest.mark.parametrize(
    ("keep", "warper", "value"),
    [
        (keep_top_k, reference.TopKLogitsWarper, 7),
        (keep_top_k, reference.TopKLogitsWarper, 1000),
        (keep_top_p, reference.TopPLogitsWarper, 0.8),
        (keep_min_p, reference.MinPLogitsWarper, 0.05),
        (keep_typical, reference.TypicalLogitsWarper, 0.7),
        (keep_epsilon, reference.EpsilonLogitsWarper, 0.01),
        (keep_eta, reference.EtaLogitsWarper, 0.02),
    ],
)
def test_what_is_left_out_is_what_transformers_leaves_out(keep: Any, warper: Any, value: float) -> None:
    options = {"device": "cpu"} if warper is reference.EtaLogitsWarper else {}
    for _ in range(20):
        logits = 2 * torch.randn(1, 100, dtype=torch.float64)
        expected = torch.isfinite(warper(value, **options)(torch.zeros(1, 1, dtype=torch.int64), logits.clone()))[0]
        assert keep(logits[0].numpy(), value).tolist() == expected.tolist()
    assert expected.sum() > 0 and (expected.sum() < 100 or value == 1000)


def test_what_changes_logits_changes_them_as_transformers_does() -> None:
    """Greedy choices among logits that are close, so that every change shows."""
    eos = 5
    for _ in range(50):
        sequence = torch.randint(0, 8, (1, 20))
        tokens = sequence[0].tolist()
        logits = torch.randn(1, 8, dtype=torch.float64)
        cases: list[tuple[dict[str, Any], Any]] = [
            ({"repetition_penalty": 1.7}, reference.RepetitionPenaltyLogitsProcessor(1.7)),
            ({"no_repeat_ngram_size": 2}, reference.NoRepeatNGramLogitsProcessor(2)),
            ({"no_repeat_ngram_size": 3}, reference.NoRepeatNGramLogitsProcessor(3)),
            ({"suppress_tokens": [1, 4]}, reference.SuppressTokensLogitsProcessor([1, 4])),
            ({"min_new_tokens": 9}, reference.MinNewTokensLengthLogitsProcessor(12, 9, eos, device="cpu")),
            ({"min_new_tokens": 8}, reference.MinNewTokensLengthLogitsProcessor(12, 8, eos, device="cpu")),
        ]
        for options, processor in cases:
            changed = processor(sequence, logits.clone())
            if changed.max() == -torch.inf:
                continue
            chosen = Sampler(GenerationOptions(**options), [eos])(logits.numpy(), [(tokens[:12], tokens[12:])])
            assert chosen.tolist() == changed.argmax(-1).tolist()


def test_penalties_on_new_tokens_are_openai_s() -> None:
    """https://platform.openai.com/docs/api-reference: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    logits = np.array([[3.0, 2.9, 2.0, 0.0]])
    before = [([0, 1, 1], [0, 2, 0])]
    for options, expected in (({"presence_penalty": 0.2}, 1), ({"frequency_penalty": 0.06}, 1), ({}, 0)):
        assert Sampler(GenerationOptions(**options))(logits, before).tolist() == [expected]  # type: ignore[arg-type]
    assert Sampler(GenerationOptions(frequency_penalty=-2.0))(logits, before).tolist() == [0]


def test_extreme_temperatures_and_logits() -> None:
    logits = np.array([[1e4, -1e4, np.inf * -1, 3.0]])
    assert sampler(temperature=1e-30, seed=0)(logits).tolist() == [0]
    assert sampler(temperature=1e30, seed=0)(logits)[0] in (0, 1, 3)
    masked = np.array([[-np.inf, 2.0, -np.inf]])
    assert sampler()(masked).tolist() == sampler(temperature=1.0, top_p=0.5, seed=0)(masked).tolist() == [1]
    strict = sampler(temperature=1.0, epsilon_cutoff=0.99, typical_p=1e-9, min_p=1.0)
    assert strict(np.array([[0.0, 0.1, -0.1]])).tolist() == [1]


@pytest.mark.parametrize("row", [[0.0, np.nan], [0.0, np.inf], [np.inf, -np.inf], [-np.inf, -np.inf]], ids=stable)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite(row: list[float], temperature: float) -> None:
    for dtype in (np.float32, np.float64):
        with pytest.raises(NumericsError, match="NaN or infinite"):
            sampler(temperature=temperature, top_k=1)(np.array([[0.0, 1.0], row], dtype=dtype))


EXTREMES: dict[str, list[float]] = {
    "temperature": [0.0, 5e-324, 1e-320, 1e-308, 1e308, 1.7976931348623157e308],
    "top_k": [0, 1, 10**30],
    "top_p": [5e-324, 1e-308, 1.0],
    "min_p": [5e-324, 1.0],
    "typical_p": [5e-324, 1.0],
    "epsilon_cutoff": [5e-324, 1 - 1e-16],
    "eta_cutoff": [5e-324, 1 - 1e-16],
    "repetition_penalty": [1e-3, 1e3],
    "presence_penalty": [-2.0, 2.0, 5e-324],
    "frequency_penalty": [-2.0, 2.0, 5e-324],
    "no_repeat_ngram_size": [1, 10**30],
    "min_new_tokens": [10**30],
    "seed": [0, 2**70],
}


@pytest.mark.parametrize(("option", "value"), [(name, value) for name, values in EXTREMES.items() for value in values])
@pytest.mark.parametrize("scale", [1e-45, 1.0, 1e37], ids=["tiny", "usual", "huge"])
def test_extremes_give_tokens(option: str, value: float, scale: float) -> None:
    """With every other option on, too: a token each time, or one line; warnings are errors here."""
    others = {"temperature": 0.7, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "repetition_penalty": 1.3, "seed": 1}
    logits = (np.random.standard_normal((2, 50)) * scale).astype(np.float32)
    logits[0, :10] = -np.inf
    before = [([1, 2, 3], [7, 7, 9]), ([40], [])]
    options: Any
    for options in ({option: value}, {**others, option: value}):
        for sampled in (True, False):
            chosen = Sampler(GenerationOptions().changed(**{**options, "do_sample": sampled}), [0])
            assert all(0 <= token < 50 for token in chosen(logits, before))


def test_logits_that_a_penalty_makes_infinite() -> None:
    logits = np.array([[1e307, 0.0]])
    penalized = Sampler(GenerationOptions(repetition_penalty=0.001))
    with pytest.raises(NumericsError, match=r"^repetition_penalty=0.001: logits of inf after it; accepted is"):
        penalized(logits, [([0], [])])
    assert penalized(-logits, [([0], [])]).tolist() == [1]


def test_no_token_left() -> None:
    with pytest.raises(NumericsError, match="no token is left"):
        Sampler(GenerationOptions(suppress_tokens=(0, 1)))(np.array([[0.0, 1.0]]), [([0], [])])


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("temperature", value) for value in (-1.0, float("nan"), float("inf"), 10**400, "x", "1", None, True)),
        *(("top_k", value) for value in (-1, 1.5, 2.0, "2", None, True)),
        *(("top_p", value) for value in (0.0, 2, "x", None)),
        *(("typical_p", value) for value in (0.0, 1.1)),
        *(("min_p", value) for value in (-0.1, 1.1)),
        *(("epsilon_cutoff", value) for value in (-0.1, 1.0)),
        *(("repetition_penalty", value) for value in (0.0, -1, float("inf"), "x", 1e-308, 5e-324, 1e308, 1001)),
        *(("presence_penalty", value) for value in (-2.1, 3, float("nan"))),
        *(("no_repeat_ngram_size", value) for value in (-1, 1.5)),
        *(("do_sample", value) for value in (1, "yes")),
        *(("stop_strings", value) for value in (5, "", ["a", ""], [1])),
        *(("max_new_tokens", value) for value in (-1, 1.5)),
        *(("seed", value) for value in (-1, 0.5, "x")),
    ],
)
def test_wrong_options(option: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"^{option}=[^\n]*: accepted "):
        GenerationOptions().changed(**{option: value})


def test_what_samples() -> None:
    start = GenerationOptions()
    assert not start.samples
    assert start.changed(temperature=0.5).samples and start.changed(top_p=0.5).samples
    assert not start.changed(temperature=0).samples and not start.changed(do_sample=False, top_k=5).samples
    assert not start.changed(repetition_penalty=1.2).samples
    config = GenerationConfig(do_sample=True, top_k=7)
    assert start.with_config(config).samples and start.with_config(config).top_k == 7
    assert not start.with_config({"temperature": 0.5}).samples  # as transformers has it
    assert start.with_config(config).changed(do_sample=False).samples is False


def test_options_of_transformers_that_are_not_there() -> None:
    start = GenerationOptions()
    for name, neutral in NEUTRAL.items():
        assert start.changed(**{name: neutral}) == start.changed(**{name: None}) == start
    assert start.changed(min_length=0, bad_words_ids=[]) == start
    for options in ({"num_beams": 4}, {"guidance_scale": 1.5}, {"bad_words_ids": [[1, 2]]}):
        accepted = r"(is (1|None)|are words of one token)"
        with pytest.raises(InputError, match=rf"^{next(iter(options))}=.*: accepted {accepted}$"):
            start.changed(**options)
        with pytest.raises(InputError, match=rf"^{next(iter(options))}="):
            start.with_config(GenerationConfig(**options))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^option 'temprature': accepted are .*temperature"):
        start.changed(temprature=1)
    for wrong in (5, "greedy", [1]):
        with pytest.raises(InputError, match=r"^generation_config="):
            start.with_config(wrong)


def test_how_many_tokens_may_follow() -> None:
    start = GenerationOptions()
    assert start.new_tokens(7) == 128
    assert start.changed(max_length=20).new_tokens(7) == 13
    assert start.changed(max_length=20).new_tokens(70) == 0
    assert start.changed(max_length=20, max_new_tokens=5).new_tokens(7) == 5
    assert start.changed(max_new_tokens=5).changed(max_length=20).new_tokens(7) == 13
