"""What a check ran on: the GPU, its driver, and versions."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import platform
import shutil
import subprocess
import warnings

from gpu_checking.running import ROOT

PACKAGES = (
    "torch",
    "triton",
    "cuda-core",
    "cuda-bindings",
    "nvidia-cuda-nvrtc",
    "numpy",
    "transformers",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "gemlite",
    "humming-kernels",
)
DRIVER = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


@dataclasses.dataclass(frozen=True)
class Device:
    """Of the first GPU that torch sees, in words."""

    name: str
    details: str
    versions: str
    date: str

    def __str__(self) -> str:
        return f"{self.name}, {self.details}"


def find_device() -> Device | None:
    """None where torch sees no NVIDIA GPU."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a CUDA build of torch warns where there is no driver
        if not torch.cuda.is_available():
            return None
    about = torch.cuda.get_device_properties(0)
    details = [
        f"{about.total_memory / 2**30:.0f} GiB",
        f"compute capability {about.major}.{about.minor}",
        f"{about.multi_processor_count} multiprocessors",
        f"driver {_said_by(*DRIVER) or 'unknown'}",
        f"CUDA {torch.version.cuda}",
    ]
    versions = [f"Python {platform.python_version()}", *_versions()]
    if commit := _said_by("git", "-C", str(ROOT), "describe", "--always", "--dirty"):
        versions.append(f"commit {commit}")
    return Device(about.name, ", ".join(details), ", ".join(versions), datetime.date.today().isoformat())


def _versions() -> list[str]:
    found = {distribution.name.lower(): distribution.version for distribution in importlib.metadata.distributions()}
    return [f"{name} {found[name]}" for name in PACKAGES if name in found]


def _said_by(*command: str) -> str | None:
    """The first line of a command's output, None where it is not there or fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.strip().splitlines()), None)
