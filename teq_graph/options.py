"""What the command line's options say, checked before anything takes time."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from teq_graph.config import TrainingConfig
from teq_graph.errors import ConfigError, ExportError, InputError
from teq_graph.files import one_line

CONTEXT = 512
METHODS = ("teq", "rtn")
DTYPES = ("float32", "float16")
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
METADATA_FILE = "teq_graph.json"  # as teq_graph.onnx has it, which takes seconds to import


@dataclasses.dataclass(frozen=True)
class Text:
    """A text to measure perplexity on, and what to call it."""

    content: str
    name: str


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
            except ValueError:
                pattern = ""
        if not pattern:
            accepted = "PATTERN:NAME=VALUE,… with bits, group_size and symmetric (true or false)"
            raise ConfigError(f"--override {option!r}: accepted is {accepted}")
        result[pattern] = values
    return result


def check_choice(name: str, value: object, accepted: Sequence[object]) -> None:
    """Raises ConfigError where `value` is none of the accepted ones."""
    if value not in accepted:
        raise ConfigError(f"--{name} {value}: accepted are {', '.join(map(str, accepted))}")


def training(method: str, options: dict[str, Any]) -> TrainingConfig | None:
    """The configuration of a method that trains, from the options that were given; None for one that does not."""
    check_choice("method", method, METHODS)
    given = {name: value for name, value in options.items() if value is not None}
    if method == "rtn":
        if given:
            raise ConfigError(
                f"--{next(iter(given)).replace('_', '-')}: no effect with --method rtn, which trains nothing"
            )
        return None
    given.pop("calibration", None)
    return TrainingConfig(**given)


def check_output(target: Path, overwrite: bool) -> None:
    """Refuse now what writing would refuse after minutes of work, and to delete what is not ours."""
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target} is a file: accepted is a directory")
    if target.exists() and not overwrite:
        raise ExportError(f"{target} exists: accepted is a new directory, or --overwrite")
    try:
        if target.exists() and any(target.iterdir()) and not (target / METADATA_FILE).is_file():
            raise ExportError(f"{target} holds other files: --overwrite accepts a directory that quantize wrote")
        parent = next(folder for folder in target.absolute().parents if folder.exists())
        os.rmdir(tempfile.mkdtemp(prefix=f".{target.name}.", dir=parent))
    except OSError as error:
        raise ExportError(f"{target} cannot be written: {_reason(error)}") from error


def check_calibration(calibration: str | None, text: Path | None) -> None:
    """Refuse a file that is missing, empty, or the one that perplexity is measured on."""
    if calibration is None:
        return
    path = Path(calibration).expanduser()
    if path.exists():
        read_text(path, "calibration")
        if text is not None and text.exists() and path.samefile(text):
            raise InputError(f"--text {str(text)!r}: it is the calibration file; accepted is a text not calibrated on")
    elif ":" not in calibration:
        raise InputError(f"--calibration {calibration!r}: no such file; data sets are NAME:SPLIT or NAME:CONFIG:SPLIT")


def read_text(path: Path | None, option: str = "text") -> Text:
    """The text of a file, or the built-in one; raises InputError where there is none."""
    if path is None:
        from teq_graph.evaluation import builtin_text

        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return Text(builtin_text(), f"Python {version}'s language reference (built in)")
    try:
        content = path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--{option} {str(path)!r}: {_reason(error)}; accepted is a text file in UTF-8") from error
    if not content.strip():
        raise InputError(f"--{option} {str(path)!r}: it is empty; accepted is a text file in UTF-8")
    return Text(content, path.name)


def tokenize(tokenizer: Any, text: Text, tokens: int) -> list[int]:
    """The first `tokens` tokens of the text."""
    ids: list[int] = tokenizer(text.content, verbose=False)["input_ids"][:tokens]
    if len(ids) < 2:
        raise InputError(f"text {text.name!r} with --tokens {tokens}: it gives {len(ids)}; accepted are two or more")
    return ids


def context_of(context: int | None, limit: int | None) -> int:
    """Tokens of a window: what is asked for, or what fits the model's positions."""
    if context is None:
        return min(CONTEXT, limit or CONTEXT)
    if limit is not None and context > limit:
        raise InputError(f"--context {context}: accepted are up to the model's {limit} positions")
    return context


def _reason(error: OSError | UnicodeDecodeError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)
