"""What --calibration names: text, a data set, or recordings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq_graph.errors import ConfigError, InputError, brief
from teq_graph.system.texts import path_of, read_text

if TYPE_CHECKING:
    from teq_graph.loading import LoadedModel


def check_calibration(calibration: str | None, text: Path | None) -> None:
    """Refuse a file that is missing, empty, or the one that perplexity is measured on."""
    if calibration is None:
        return
    try:
        path = path_of(calibration)
        measured = None if text is None else path_of(text)
    except ValueError as error:
        raise InputError(
            f"--calibration {brief(calibration)} or --text: {error}; accepted are files of text"
        ) from error
    if path.exists():
        if not recordings_in(calibration):
            read_text("--calibration", calibration)
        if measured is not None and measured.exists() and path.samefile(measured):
            raise InputError(f"--text {str(text)!r}: it is the calibration file; accepted is a text not calibrated on")
    elif ":" not in calibration:
        raise InputError(
            f"--calibration {brief(calibration)}: no such file; data sets are NAME:SPLIT or NAME:CONFIG:SPLIT"
        )


def recordings_in(calibration: str) -> list[Path]:
    """The WAV file, or those of the directory, that `calibration` is the path of; none where it is something else."""
    path = path_of(calibration)
    return [path] if path.suffix.lower() == ".wav" else sorted(path.glob("*.wav"))


def check_trainable(loaded: LoadedModel, calibration: str | None, otherwise: str = "--method rtn") -> None:
    """Refuse a model that `calibration` is not for; `otherwise` works without one, empty where nothing does."""
    takes, hears = loaded.model.main_input_name, loaded.feature_extractor is not None
    writes_its_own = loaded.writes_text and loaded.reads_text
    kind = "recordings" if calibration is not None and recordings_in(calibration) else "text"
    if calibration is None and not writes_its_own:
        what = f"takes {takes}" if loaded.writes_text else f"is a {type(loaded.model).__name__}"
        reason = f"{what}, and only a language model writes text to calibrate on"
    elif calibration is not None and not (hears if kind == "recordings" else loaded.reads_text):
        reason = f"takes {takes}, which the {kind} of --calibration {'are' if kind == 'recordings' else 'is'} not"
    elif kind == "text" and calibration is not None and loaded.tokenizer is None:
        reason = "has no tokenizer to read --calibration with"
    else:
        return
    ways = [
        *(["--calibration FILE.wav"] if hears else []),
        *(["--calibration FILE"] if loaded.reads_text and loaded.tokenizer is not None else []),
        *(["no --calibration"] if writes_its_own and calibration is not None else []),
        *filter(None, [otherwise]),
    ]
    accepted = " and ".join(ways) or "nothing; in Python, token tensors"
    raise ConfigError(f"model {loaded.name!r} {reason}; on the command line, accepted for it: {accepted}")


def inputs_of(loaded: LoadedModel, calibration: str | None) -> Any:
    """What `compile` takes for it: of recordings their features, and anything else as it is."""
    files = [] if calibration is None else recordings_in(calibration)
    if not files:
        return calibration
    import torch

    from teq_graph.onnx.runtime.speech import features, read_wave

    name, made = loaded.model.main_input_name, []
    for file in files:
        recording = read_wave(file)
        try:
            made.append(features(loaded.feature_extractor, recording, name))
        except InputError as error:
            raise InputError(f"--calibration {brief(str(file))}: {error}") from error
    return [{name: torch.from_numpy(one).to(loaded.model.dtype)} for one in made]
