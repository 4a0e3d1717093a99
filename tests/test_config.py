"""Configurations: hostile values of every field are refused in one line, and what is accepted is Python's own."""

from __future__ import annotations

import dataclasses
import fractions
from typing import Any

import numpy as np
import pytest
import torch
from support.compiling import in_one_line

from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.config import LAST_SEED, MOST, STAGES, WeightSpec
from teq_graph.errors import ConfigError, brief


class Hostile:
    """Neither hashable nor comparable, and without a repr."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


HOSTILE = [
    Hostile(), object(), int, len, b"4", "4", "", "yes\nno", "\ud800", "x" * 10_000, 3.5, 1e308, float("nan"),
    float("inf"), -float("inf"), -0.5, -1.0, -1, -(10**400), 10**15, 2**70, 10**10_000, 4 + 0j, True, None, [], {},
    set(), ["a"], {"a": 1}, [[]], [{}], [None], [4], ["clip", 3], {3: {}}, {3: {"bits": 4}}, {"*": 4}, {"*": None},
    {"*": {"bit": 4}}, {"*": {"bits": "4"}}, {"*": {"bits": [4]}}, {"*": {4: 4}}, {b"*": {}}, np.nan, np.inf,
    np.array([4, 8]), np.array("4"), np.bool_(True), torch.tensor(4), torch.tensor([1.0, 2.0]), float,
    ("a" * 10_000,) * 1000,
]  # fmt: skip
FLAGS = ("symmetric", "quantize_lm_head", "quantize_embedding")
OPTIONAL = ("target_bits", "levels", "stages", "scale_steps", "distill_steps", "learning_rate", "tuning_rate")


def is_accepted(name: str, value: Any) -> bool:
    """The few values of the list that are right for some field."""
    if name == "skip":  # any iterable of strings
        return type(value) in (list, dict, set, tuple) and all(isinstance(pattern, str) for pattern in value)
    if name in ("stages", "tuned") and type(value) in (list, dict, set):
        return not value
    if type(value) in (float, int):
        return (name, value) in [("target_bits", 3.5), ("group_size", -1), ("seed", 10**15)]
    return (
        (value is None and name in OPTIONAL)
        or (value is True and name in FLAGS)
        or (type(value) is dict and not value and name == "overrides")
    )


CASES = [
    pytest.param(config, field.name, value, id=f"{config.__name__}-{field.name}-{number}")
    for config in (WeightSpec, QuantizationConfig, TrainingConfig)
    for field in dataclasses.fields(config)
    for number, value in enumerate(HOSTILE)
    if not is_accepted(field.name, value)
]


@pytest.mark.parametrize(("config", "name", "value"), CASES)
def test_every_hostile_value_of_every_field(config: Any, name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{name}") as caught:
        config(**{name: value})
    message = in_one_line(caught)
    assert "accepted" in message and len(message) < 600


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.uint16])
def test_integers_of_numpy_become_pythons(kind: Any) -> None:
    quantization = QuantizationConfig(bits=kind(3), group_size=kind(32), overrides={"*": {"bits": kind(8)}})
    training = TrainingConfig(steps=kind(7), seed=kind(3), samples=kind(5))
    values = [quantization.bits, quantization.group_size, quantization.overrides["*"]["bits"]]
    values += [training.steps, training.seed, training.samples]
    assert [(type(value), value) for value in values] == [(int, n) for n in (3, 32, 8, 7, 3, 5)]
    assert quantization == QuantizationConfig(3, 32, overrides={"*": {"bits": 8}})


@pytest.mark.parametrize("number", [np.float32(0.25), np.float64(0.25), fractions.Fraction(1, 4)])
def test_other_numbers_become_floats(number: Any) -> None:
    training = TrainingConfig(learning_rate=number, tuning_rate=number, warmup=number)
    assert [(type(rate), rate) for rate in (training.learning_rate, training.tuning_rate, training.warmup)] == [
        (float, 0.25)
    ] * 3


def test_what_is_given_can_be_changed_afterwards() -> None:
    patterns, overrides = ["a"], {"*": {"bits": 8}}
    config = QuantizationConfig(skip=patterns, overrides=overrides)  # type: ignore[arg-type]
    patterns.append("b")
    overrides["*"]["bits"] = 5
    assert config.skip == ("a",) and config.overrides == {"*": {"bits": 8}}


def test_the_ends_of_ranges() -> None:
    TrainingConfig(samples=MOST, length=MOST, steps=0, seed=LAST_SEED)
    for name, value in (("samples", MOST + 1), ("length", MOST + 1), ("steps", MOST + 1), ("seed", LAST_SEED + 1)):
        with pytest.raises(ConfigError, match=f"{name}={value}: accepted are integers from"):
            TrainingConfig(**{name: value})


def test_stages_of_any_iterable_in_their_order() -> None:
    assert TrainingConfig(stages=iter(reversed(STAGES))).stages == STAGES  # type: ignore[arg-type]
    assert TrainingConfig(stages={"tune": 1, "clip": 2}).stages == ("clip", "tune")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["slow", "", None, 3, [], Hostile()])
def test_unknown_presets(name: Any) -> None:
    with pytest.raises(ConfigError, match=r"preset=.*accepted are fast, default, best") as caught:
        TrainingConfig.preset(name)
    in_one_line(caught)


def test_unknown_options_of_a_preset() -> None:
    with pytest.raises(ConfigError, match=r"option 'step' of a preset: accepted are .*steps") as caught:
        TrainingConfig.preset("best", step=3)
    in_one_line(caught)
    with pytest.raises(ConfigError, match="steps='3'"):
        TrainingConfig.preset("best", steps="3")


def test_brief_is_short_and_never_fails() -> None:
    for value in [*HOSTILE, [HOSTILE] * 100, {"a": {"b": {"c": Hostile()}}}]:
        shown = brief(value)
        assert shown and len(shown) < 500 and "\n" not in shown
    assert brief({"bits": 4}) == "{'bits': 4}"
