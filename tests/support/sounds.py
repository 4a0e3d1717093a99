"""WAV files."""

from __future__ import annotations

import wave
from pathlib import Path


def write_wave(path: Path, content: bytes, width: int = 2, channels: int = 1, rate: int = 16000) -> Path:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(content)
    return path
