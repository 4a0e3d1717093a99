"""What a model that hears is given: recordings, and the tokens that their transcriptions begin with."""

from __future__ import annotations

import dataclasses
import os
import wave
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, Field, ValidationError

from teq_graph.errors import InputError, ModelFileError, brief, one_line
from teq_graph.onnx.description import first_fault
from teq_graph.onnx.directory import GENERATION_FILE
from teq_graph.system.files import read_json
from teq_graph.system.texts import path_of

Token = Annotated[int, Field(ge=0)]
WAV = "a WAV file of integers (PCM)"


@dataclasses.dataclass(frozen=True)
class Recording:
    """Samples float32 [n] from -1 to 1, `rate` of them a second."""

    samples: npt.NDArray[np.float32]
    rate: int

    @property
    def seconds(self) -> float:
        return len(self.samples) / self.rate


def read_wave(path: str | os.PathLike[str]) -> Recording:
    """The recording in a WAV file of integers, the mean of its channels. Raises InputError for what is none."""
    where = f"recording {brief(os.fspath(path))}"
    try:
        found = path_of(path)
        if not found.is_file():
            raise InputError(f"{where}: no such file; accepted is {WAV}")
        with wave.open(str(found), "rb") as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, ValueError, wave.Error) as error:
        reason = "it is cut short" if isinstance(error, EOFError) else one_line(error)
        raise InputError(f"{where}: {reason}; accepted is {WAV}") from error
    frames = len(content) // (channels * width)
    if width > 4 or rate < 1 or not frames:
        what = f"{frames} samples of {8 * width} bits, {rate} a second"
        raise InputError(f"{where}: {what}; accepted is {WAV}, of at least one sample of up to 32 bits")
    given = np.frombuffer(content, np.uint8, frames * channels * width).reshape(-1, width)
    wide = np.zeros((len(given), 4), np.uint8)
    wide[:, 4 - width :] = given
    if width == 1:
        wide[:, 3] ^= 0x80  # the only width without a sign
    samples = wide.view("<i4").reshape(-1, channels).mean(axis=1) / 2**31
    return Recording(samples.astype(np.float32), rate)


def features(extractor: Any, recording: Recording, name: str) -> npt.NDArray[np.float32]:
    """What `extractor`, of transformers, makes of a recording as the model's input `name`, with an axis for the batch.

    Raises InputError where it is of another rate, or longer than the model hears at a time.
    """
    if not isinstance(recording, Recording):
        raise InputError(f"recording: {brief(recording)}; accepted is a Recording, as read_wave gives it")
    if recording.rate != extractor.sampling_rate:
        accepted = f"accepted are {extractor.sampling_rate}, which ffmpeg -ar {extractor.sampling_rate} gives"
        raise InputError(f"recording of {recording.rate} samples a second: {accepted}")
    longest = getattr(extractor, "n_samples", None)
    if longest is not None and len(recording.samples) > longest:
        most = longest / recording.rate
        raise InputError(f"recording of {recording.seconds:.1f} seconds: accepted are up to {most:g}")
    try:
        made = extractor(recording.samples, sampling_rate=recording.rate, return_tensors="np")
        return np.asarray(made[name], np.float32)
    except Exception as error:  # whatever its numbers lead to
        raise InputError(f"the feature extractor refuses the recording: {one_line(error)}") from error


class TranscriptTokens(BaseModel):
    """What `generation_config.json` says of the tokens that a transcription begins with, in Whisper's terms."""

    lang_to_id: dict[str, Token] | None = None
    task_to_id: dict[str, Token] | None = None
    no_timestamps_token_id: Token | None = None

    @classmethod
    def read(cls, directory: Path) -> TranscriptTokens:
        """Raises ModelFileError where the file is damaged; a directory without one names no such tokens."""
        path = directory / GENERATION_FILE
        if not path.is_file():
            return cls()
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise ModelFileError(f"{path} cannot be read: {first_fault(error)}") from None
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path} cannot be read: {one_line(error)}") from None

    def begin(
        self, start: int, likeliest: Callable[[Sequence[int]], int], language: str | None, task: str | None
    ) -> list[int]:
        """After the token `start` the language, where the model knows several, the task, and that no times are wanted.

        `language` None: what `likeliest` chooses of all languages' tokens; `task` None: to transcribe. Raises
        InputError for one that the model does not know.
        """
        tokens = [start]
        languages = {name.strip("<|>"): token for name, token in (self.lang_to_id or {}).items()}
        if language is not None:
            tokens.append(_named("language", language, languages))
        elif languages:
            tokens.append(likeliest(sorted(languages.values())))
        tasks = self.task_to_id or {}
        if task is not None or tasks:
            tokens.append(_named("task", task or "transcribe", tasks))
        return [*tokens, *([] if self.no_timestamps_token_id is None else [self.no_timestamps_token_id])]


def _named(kind: str, name: str, tokens: dict[str, int]) -> int:
    if name not in tokens:
        accepted = f"accepted are {', '.join(sorted(tokens))}" if tokens else f"the model names no {kind}s"
        raise InputError(f"{kind} {brief(name)}: {accepted}")
    return tokens[name]
