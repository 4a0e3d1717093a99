"""What the command line's options say, checked before anything takes time."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq_graph.config import LAST_SEED, MOST, PRESETS, STAGES, TrainingConfig
from teq_graph.errors import ConfigError, InputError, brief
from teq_graph.system.directories import check_target
from teq_graph.system.texts import read_text

if TYPE_CHECKING:
    from teq_graph.cli.opening import LanguageModel

CONTEXT = 512
TOKENS = 8192
RTN = "rtn"
PAPER_TASKS = ("lambada_openai", "hellaswag", "winogrande", "piqa")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to measure perplexity on, what to call it, and how many of its tokens to take."""

    content: str
    name: str
    tokens: int


def overrides(options: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """`PATTERN:bits=4,symmetric=true` as QuantizationConfig has it."""
    result: dict[str, dict[str, Any]] = {}
    for option in options or ():
        pattern, _, settings = option.rpartition(":")
        values: dict[str, Any] = {}
        for setting in settings.split(","):
            name, _, value = setting.partition("=")
            try:
                values[name] = json.loads(value)
            except (ValueError, RecursionError):
                pattern = ""
        if not pattern:
            accepted = "PATTERN:NAME=VALUE,… with bits, group_size, symmetric (true or false) and levels"
            raise ConfigError(f"--override {brief(option)}: accepted is {accepted}")
        result[pattern] = values
    return result


def was_given(context: Any, name: str) -> bool:
    """Whether an option stands on the command line, rather than having its default."""
    return bool(context.get_parameter_source(name).name == "COMMANDLINE")


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    """Raises ConfigError where `value` is none of the accepted ones."""
    if value not in accepted:
        raise ConfigError(f"--{name} {value}: accepted are {', '.join(map(str, accepted))}")


def check_range(name: str, value: int | None, least: int, most: int = MOST) -> None:
    """Raises ConfigError where `value` is given and outside the range."""
    if value is not None and not least <= value <= most:
        raise ConfigError(f"--{name} {value}: accepted are {least} to {most}")


def check_seed(seed: int | None) -> None:
    """Raises ConfigError for a seed that some random generator does not take."""
    check_range("seed", seed, 0, LAST_SEED)


def training(preset: str, method: str | None, options: dict[str, Any]) -> TrainingConfig | None:
    """The configuration of a preset, changed by a method and the options that were given; None where nothing is
    calibrated.

    A method is `rtn`, or stages joined by `+`, as in `teq+clip+gptq`.
    """
    check_choice("preset", preset, tuple(PRESETS))
    given = {name: value for name, value in options.items() if value is not None}
    if method == RTN:
        if given:
            raise ConfigError(
                f"--{next(iter(given)).replace('_', '-')}: no effect with --method rtn, which trains nothing"
            )
        return None
    if method is not None:
        parts = method.split("+")
        if not set(parts) <= set(STAGES):
            raise ConfigError(f"--method {method}: accepted are rtn, and any of {', '.join(STAGES)} joined by +")
        given["stages"] = tuple(parts)
    given.pop("calibration", None)
    check_seed(given.get("seed"))
    for name in ("samples", "length", "batch_size"):
        check_range(name.replace("_", "-"), given.get(name), 1)
    return TrainingConfig.preset(preset, **given)


def output_directory(target: Path, overwrite: bool) -> Path:
    """Where to write, without links and `..`, which mean something else once missing folders are made.

    Refuses now what writing would refuse after minutes of work.
    """
    given, resolved = Path(os.path.abspath(target)), Path(os.path.realpath(target))
    check_target(given if given.is_symlink() and not given.exists() else resolved, overwrite, "--overwrite")
    return resolved


def text(path: Path | None, tokens: int | None) -> Text:
    """The text of a file, or the built-in one, to measure perplexity on; raises InputError where there is none."""
    check_range("tokens", tokens, 2)
    if path is not None:
        return Text(read_text("--text", path), path.name, tokens or TOKENS)
    from teq_graph.evaluation import builtin_text

    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return Text(builtin_text(), f"Python {version}'s language reference (built in)", tokens or TOKENS)


def check_no_text(path: Path | None, tokens: int | None) -> None:
    """Refuse to be told what to measure perplexity on where none is measured."""
    for name, value in (("text", path), ("tokens", tokens)):
        if value is not None:
            raise ConfigError(f"--{name}: no effect with --no-evaluate")


def tokenize(tokenizer: Any, text: Text) -> list[int]:
    """The tokens of the text to take."""
    ids: list[int] = tokenizer(text.content, verbose=False)["input_ids"][: text.tokens]
    if len(ids) < 2:
        raise InputError(f"text {text.name!r}: it gives {len(ids)} tokens; accepted are two or more")
    return ids


def check_reference(reference: LanguageModel, model: LanguageModel, text: Text, ids: list[int]) -> None:
    """Refuse a reference that has other tokens than the model: their predictions are of different things."""
    import torch

    probe = torch.tensor([ids[:1]])
    with torch.no_grad():
        sizes = [len(one.logits_fn(probe)[0, -1]) for one in (reference, model)]
    if tokenize(reference.tokenizer, text) != ids or sizes[0] != sizes[1]:
        raise InputError("--reference: its tokens are not the model's; accepted is a model with the same tokenizer")


def context_of(context: int | None, limit: int | None) -> int:
    """Tokens of a window: what is asked for, or what fits the model's positions."""
    if context is None:
        return min(CONTEXT, limit or CONTEXT)
    if limit is not None and context > limit:
        raise InputError(f"--context {context}: accepted are up to the model's {limit} positions")
    return context


def tasks(names: str | None, task_options: dict[str, Any], text_options: dict[str, Any]) -> tuple[str, ...]:
    """Names of the tasks to evaluate on, none for a text; refuses the options of the other kind of evaluation."""
    accepted = ("--tasks", "which bring their own texts") if names is not None else ("a text", "for --tasks only")
    for name, value in (text_options if names is not None else task_options).items():
        if value is not None:
            raise ConfigError(f"--{name}: no effect with {accepted[0]}, {accepted[1]}")
    for name, least in (("limit", 1), ("num-fewshot", 0), ("batch-size", 1)):
        check_range(name, task_options[name], least)
    chosen = tuple(dict.fromkeys(filter(None, map(str.strip, (names or "").split(",")))))
    if names is not None and not chosen:
        raise ConfigError(f"--tasks {names!r}: accepted are names of tasks, separated by commas")
    return chosen
