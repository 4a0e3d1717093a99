"""Runs that are killed at random moments: what stands in their output is all or nothing.

python tools/kill_runs.py --kills 100 --seed 0

`teq-graph quantize`, `CompiledModel.save` and `export_onnx` write a tiny model, to a new directory and over an old one,
each in a process that is forked from one that has the libraries loaded, and killed (SIGKILL): every other one at any
moment of its run, the others while files are written. What the output is then:

  absent  as it was, where there was none before
  old     the old one, byte for byte
  new     the new one, which loads and runs
  aside   the old one under a hidden name beside it
  half    anything else

After the kills of each kind the same run goes to its end, and says what hidden files are left. Exits 1 where anything
was `half`, a last run failed, or hidden files were left.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from fuzzing.processes import Process
from fuzzing.subjects import read_exported, read_saved

import teq_graph
from teq_graph.cli import run as run_command
from teq_graph.loading import load_model

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
ENDS = ("absent", "old", "new", "aside", "half")
LIMIT = 300.0
"""Seconds for a run that is not killed."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """`write(path, overwrite)` makes a directory, `read(path)` says whether it is whole."""

    name: str
    write: Callable[[Path, bool], object]
    read: Callable[[Path], bool]


def operations(model: Path) -> list[Operation]:
    """What is killed, on a model that is loaded once."""
    loaded = load_model(model)
    quantization = teq_graph.QuantizationConfig(bits=4, group_size=32)
    compiled = teq_graph.compile(loaded.model, tokenizer=loaded.tokenizer, quantization=quantization, training=None)

    def quantize(path: Path, overwrite: bool) -> None:
        arguments = ["quantize", str(model), "-o", str(path), "--method", "rtn", "--group-size", "32", "--no-evaluate"]
        code = run_command([*arguments, *(["--overwrite"] if overwrite else [])])
        if code:
            raise AssertionError(f"exit code {code}")

    def save(path: Path, overwrite: bool) -> None:
        compiled.save(path, overwrite=overwrite)

    def export(path: Path, overwrite: bool) -> None:
        compiled.export_onnx(path, overwrite=overwrite)

    return [
        Operation("quantize", quantize, read_exported),
        Operation("save", save, read_saved),
        Operation("export_onnx", export, read_exported),
    ]


def contents(directory: Path) -> dict[str, str]:
    """Relative path -> hash, of every file."""
    return {
        path.relative_to(directory).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


class Kills:
    """Kills of one operation, onto nothing or onto an old output, in a folder of its own."""

    def __init__(self, operation: Operation, onto_old: bool, folder: Path, choose: random.Random) -> None:
        self.operation, self.choose = operation, choose
        self.target = folder / "outputs" / "out"
        self.scratch = folder / "scratch"
        self.old: dict[str, str] | None = None
        self._spare = folder / "old"
        for made in (self.target.parent, self.scratch):
            made.mkdir(parents=True)
        self.seconds, self.writing = self._measure()
        if onto_old:
            # Something else than what is written, so that each is known.
            (self.target / "report.json").write_text("{}", encoding="utf-8")
            self.target.rename(self._spare)
            self.old = contents(self._spare)
        self._reset()

    def kill_one(self) -> str:
        """One of `ENDS`."""
        while_writing = self.choose.random() < 0.5
        process = self._start()
        if while_writing:
            self._wait_for_a_file(process)
        self._sleep(process, self.choose.uniform(0, self.writing if while_writing else self.seconds))
        process.kill()
        process.wait()
        end = self._end()
        if end != "old":
            self._reset()
        return end

    def last_run(self) -> str:
        """What went wrong with a run to the end, and what it left; nothing if all is well."""
        if (outcome := self._start().wait()).error or outcome.signal or outcome.timed_out:
            return (outcome.error or outcome.output or "killed").strip().splitlines()[-1]
        if not self._is_whole(self.target):
            return "what it wrote does not load"
        left = sorted(path.name for path in self.target.parent.iterdir() if path != self.target)
        return f"{len(left)} left beside it, {left[0]} the first" if left else ""

    def _measure(self) -> tuple[float, float]:
        """Seconds of a run, and of the part of it that writes."""
        process = self._start(onto_old=False)
        self._wait_for_a_file(process)
        before = time.monotonic() - process.started
        outcome = process.wait()
        if outcome.error or not self._is_whole(self.target):
            sys.exit(f"error: {self.operation.name} fails by itself: {outcome.error or outcome.output}")
        return outcome.seconds, outcome.seconds - before

    def _start(self, onto_old: bool | None = None) -> Process:
        overwrite = self.old is not None if onto_old is None else onto_old
        return Process(lambda: self.operation.write(self.target, overwrite) and None, self.scratch, LIMIT, memory=None)

    def _wait_for_a_file(self, process: Process) -> None:
        before = self._files()
        while self._files() == before and process.is_running():
            time.sleep(0.0005)

    def _sleep(self, process: Process, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end and process.is_running():
            time.sleep(0.0005)

    def _files(self) -> set[Path] | None:
        """Those in the output and beside it; None while a folder is being renamed."""
        try:
            return {path for path in self.target.parent.rglob("*") if path.is_file()}
        except FileNotFoundError:
            return None

    def _end(self) -> str:
        if not self.target.exists():
            if self.old is None:
                return "absent"
            beside = [path for path in self.target.parent.glob(".*/**") if path.name == self.target.name]
            return "aside" if any(contents(path) == self.old for path in beside) else "half"
        if contents(self.target) == self.old:
            return "old"
        return "new" if self._is_whole(self.target) else "half"

    def _is_whole(self, path: Path) -> bool:
        return bool(Process(lambda: self.operation.read(path), self.scratch, LIMIT, memory=None).wait().result)

    def _reset(self) -> None:
        """The output as it was before; what is hidden beside it stays."""
        shutil.rmtree(self.target, ignore_errors=True)
        if self.old is not None:
            shutil.copytree(self._spare, self.target)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=("quantize", "save", "export_onnx"))
    parser.add_argument("--model", type=Path, default=DATA / "models" / "stories260K", help="Hugging Face directory")
    arguments = parser.parse_args()
    choose = random.Random(arguments.seed)
    cases = [
        (operation, onto_old)
        for operation in operations(arguments.model)
        for onto_old in (False, True)
        if arguments.only in (None, operation.name)
    ]
    failed = False
    print(f"| killed | onto | kills | {' | '.join(ENDS)} | the run after them |\n|---|{'---|' * (len(ENDS) + 3)}")
    for number, (operation, onto_old) in enumerate(cases):
        count = arguments.kills // len(cases) + (number < arguments.kills % len(cases))
        with tempfile.TemporaryDirectory(prefix="kills.") as folder:
            kills = Kills(operation, onto_old, Path(folder), choose)
            ends = collections.Counter(kills.kill_one() for _ in range(count))
            wrong = kills.last_run()
        failed |= bool(ends["half"] or wrong)
        cells = [operation.name, "an old one" if onto_old else "nothing", count, *(ends[end] for end in ENDS)]
        print(f"| {' | '.join(map(str, cells))} | {wrong or 'whole, nothing left'} |", flush=True)
    sys.exit(failed)


if __name__ == "__main__":
    main()
