"""The coverage table: every model class of transformers, tiny and random, through analysis, folding and ONNX.

python tools/coverage_table.py --results coverage.jsonl --update docs/coverage.md

Each class is built from a tiny configuration and measured in a process of its own, forked from one that has the
libraries loaded, with a limit of time and of memory. `--results` keeps a line for each: an interrupted run goes on
where it ended, `--again PATTERN` measures those of the patterns anew.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import onnxruntime  # noqa: F401  loaded before the processes are forked
import torch
import transformers
from covering.classes import ModelClass, model_classes
from covering.measure import STATE, measure
from covering.page import page
from fuzzing.processes import Outcome, Process

import teq_graph

GIB = 2**30


def finished(model_class: ModelClass, outcome: Outcome, folder: Path) -> dict[str, Any]:
    """The line of one class, from how its process ended."""
    row: dict[str, Any] = {"type": model_class.model_type, "class": model_class.name, "task": model_class.task}
    row["seconds"] = round(outcome.seconds, 1)
    if outcome.result is not None:
        row |= outcome.result
        row["printed"] = outcome.output.strip()[:2000]
        return row
    if (folder / STATE).exists():
        row |= json.loads((folder / STATE).read_text(encoding="utf-8"))
    row.setdefault("stage", "build")
    if outcome.timed_out:
        row["stopped"] = "out of time"
    elif outcome.error is not None:
        row["stopped" if "MemoryError" in outcome.error else "bare"] = outcome.error.strip().splitlines()[-1]
    else:
        row["stopped"] = f"killed by signal {outcome.signal}"
    return row


def run(classes: list[ModelClass], results: Path, jobs: int, timeout: float, memory: int) -> None:
    """Measure all `classes`, so many at a time, and add a line for each to `results`."""
    waiting, running = list(reversed(classes)), []
    total = len(classes)
    with tempfile.TemporaryDirectory() as directory, results.open("a", encoding="utf-8") as lines:
        while waiting or running:
            while waiting and len(running) < jobs:
                one = waiting.pop()
                folder = Path(directory) / one.model_type
                folder.mkdir()
                running.append((one, folder, Process(lambda one=one: measure(one), folder, timeout, memory)))
            for item in list(running):
                one, folder, process = item
                if (outcome := process.poll()) is not None:
                    running.remove(item)
                    row = finished(one, outcome, folder)
                    lines.write(json.dumps(row) + "\n")
                    lines.flush()
                    why = row.get("refused") or row.get("bare") or row.get("stopped") or row.get("not built") or ""
                    left = len(waiting) + len(running)
                    print(
                        f"{total - left}/{total} {one.name}: {row['stage']} {row['seconds']} s {why[:150]}", flush=True
                    )
            time.sleep(0.02)


def warm() -> None:
    """Load what capture, export and session load when they are first used: each process would do it again."""
    with tempfile.TemporaryDirectory() as directory:
        linear = torch.nn.Linear(32, 32).eval()
        compiled = teq_graph.compile(linear, (torch.zeros(2, 32),), ({0: torch.export.Dim.DYNAMIC},), training=None)
        compiled.export_onnx(Path(directory) / "out")


def read(results: Path) -> dict[str, dict[str, Any]]:
    """The last line of each class."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    return {row["class"]: row for row in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True, help="JSON lines, one a class, which a run adds to")
    parser.add_argument("--update", type=Path, help="Markdown file to write")
    parser.add_argument("--only", action="append", help="model types by pattern; all without it")
    parser.add_argument("--again", action="append", default=[], help="of these patterns also what has results")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=60, help="seconds a class may take")
    parser.add_argument("--memory", type=float, default=8, help="GiB a class may take")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    known = read(arguments.results)

    def wanted(one: ModelClass) -> bool:
        def matches(patterns: list[str]) -> bool:
            return any(fnmatch.fnmatch(one.model_type, pattern) for pattern in patterns)

        return matches(arguments.only or ["*"]) and (one.name not in known or matches(arguments.again))

    classes = [one for one in model_classes() if wanted(one)]
    # In no order, so that what an interrupted run has is a fair sample.
    random.Random(0).shuffle(classes)
    warm()
    run(classes, arguments.results, arguments.jobs, arguments.timeout, int(arguments.memory * GIB))
    if arguments.update:
        found = list(read(arguments.results).values())
        arguments.update.write_text(page(found, len(model_classes())), encoding="utf-8")


if __name__ == "__main__":
    main()
