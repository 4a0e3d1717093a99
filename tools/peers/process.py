"""Runs one method in processes of its own, and gives its row."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from peers.environments import BuildError, python_of
from peers.methods import METHODS

FOLDER = Path(__file__).parent


class MethodError(Exception):
    """The method gave no figures; the message is one line."""


def measure_method(
    name: str, fields: Mapping[str, Any], *, venvs: Path, logs: Path, timeout: float, ragged: bool
) -> dict[str, Any]:
    """The row of a method; of one that fails, its error. `fields` are those of the job file, but for the options."""
    method = METHODS[name]
    row: dict[str, Any] = {"method": name}
    logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, (logs / f"{name}.log").open("w", encoding="utf-8") as log:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps({**fields, "options": method.options}), encoding="utf-8")
        (job.parent / "result.json").write_text("{}", encoding="utf-8")
        try:
            python = python_of(method.environment, venvs)
            deadline = time.monotonic() + timeout
            if method.runner:
                _run([python, FOLDER / method.runner, job], log, deadline)
            if not method.runner or (job.parent / "weights.safetensors").is_file():
                _run([sys.executable, FOLDER / "evaluator.py", job], log, deadline)
            row.update(json.loads((job.parent / "result.json").read_text(encoding="utf-8")))
        except (BuildError, MethodError) as error:
            row["error"] = str(error)
    notes = [method.note, method.ragged if ragged else "", *row.get("notes", [])]
    row["notes"] = [note for note in notes if note]
    return row


def _run(command: list[Any], log: TextIO, deadline: float) -> None:
    """Run to its end or the deadline, output to `log`; raises MethodError with what it says of its failure."""
    job = Path(command[-1])
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        cwd=job.parent,  # packages write their workspaces where they run
        env=environment,
        start_new_session=True,
    )
    try:
        code = process.wait(max(deadline - time.monotonic(), 0.0))
    except subprocess.TimeoutExpired:
        raise MethodError("it took longer than --timeout") from None
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its helpers too; where it has ended, those that it left
        process.wait()
    error = json.loads((job.parent / "result.json").read_text(encoding="utf-8")).get("error")
    if error:
        raise MethodError(error)
    if code:
        lines = [line for line in Path(log.name).read_text(encoding="utf-8", errors="replace").splitlines() if line]
        reason = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        raise MethodError(" ".join(lines[-1].split())[:300] if lines and code > 0 else reason)
