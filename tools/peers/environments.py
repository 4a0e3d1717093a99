"""One virtual environment per package, made from its pinned requirements once and used again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).parent / "requirements"


class BuildError(Exception):
    """The environment could not be made; the message is one line."""


def python_of(name: str, folder: Path) -> Path:
    """The interpreter of the environment `name` below `folder`, made anew where its requirements have changed."""
    if not name:
        return Path(sys.executable)
    target = folder / name
    wanted = REQUIREMENTS / f"{name}.txt"
    python, stamp = target / "bin" / "python", target / "requirements.txt"
    if stamp.is_file() and stamp.read_bytes() == wanted.read_bytes():
        return python
    print(f"  making the environment {target}; this takes minutes", flush=True)
    _run([sys.executable, "-m", "venv", "--clear", str(target)], name)
    options = ["--quiet", "--disable-pip-version-check", "--no-input"]
    _run([str(python), "-m", "pip", "install", *options, "-r", str(wanted)], name)
    shutil.copyfile(wanted, stamp)  # last: without it the environment counts as unfinished
    return python


def _run(command: list[str], name: str) -> None:
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or [f"exit code {done.returncode}"]
        raise BuildError(f"environment {name}: {errors[-1]}")
