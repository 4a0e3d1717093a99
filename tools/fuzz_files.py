"""Damaged and hostile files of every kind that is read: each must be refused in one line, or be harmless.

python tools/fuzz_files.py --inputs 500 --seed 0

Each input is a sound file or directory with one thing wrong: bits flipped, blocks zeroed, doubled or cut off, JSON
edited, another thing in a file's place (a directory, a link, a FIFO), or a payload that makes a file where it runs. It
is read and run in a process of its own, forked from one that has the libraries loaded, with a limit of time and of
memory. Good ends are a refusal (TeqGraphError) in one line, and finite numbers. Input I of a kind is the same for a
seed: `--only KIND --input I` repeats it, and shows all that it said. Exits 1 where any input ends otherwise.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from fuzzing.mutations import MARKER, damage
from fuzzing.processes import Outcome, Process
from fuzzing.subjects import SUBJECTS, example, make_all

from teq_graph.errors import TeqGraphError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LONGEST = 600
"""Characters of a refusal."""
ENDS = ("refused", "loaded", "not finite", "long refusal", "noise", "raw exception", "crash", "hang", "executed")
GOOD = ENDS[:2]


@dataclasses.dataclass(frozen=True)
class Input:
    """Number `index` of a kind; `seed` is that of the whole run."""

    kind: str
    index: int
    seed: int

    def make(self, sound: Path, folder: Path) -> str:
        """A damaged copy of what is `sound`, in `folder`; what was done to it."""
        shutil.copytree(sound / self.kind, folder / self.kind)
        return damage(random.Random(f"{self.seed}:{self.kind}:{self.index}"), example(folder, self.kind))

    def read(self, folder: Path) -> dict[str, object]:
        """In a process of its own: what the reader says."""
        try:
            return {"finite": SUBJECTS[self.kind].read(example(folder, self.kind))}
        except TeqGraphError as error:
            return {"refusal": str(error)}


def end_of(outcome: Outcome, folder: Path) -> tuple[str, str]:
    """Which of `ENDS`, and what was said."""
    said = outcome.result or {}
    refusal = said.get("refusal")
    if any(folder.rglob(MARKER)):
        return "executed", outcome.error or str(said)
    if outcome.timed_out:
        return "hang", f"after {outcome.seconds:.0f} s"
    if outcome.error is not None:
        return "raw exception", outcome.error
    if outcome.result is None:
        return (
            "crash",
            f"{signal.Signals(outcome.signal).name if outcome.signal else 'it ended itself'} {outcome.output}",
        )
    if outcome.output.strip():
        return "noise", f"{said} {outcome.output}"
    if refusal is not None and ("\n" in refusal or not 0 < len(refusal) <= LONGEST):
        return "long refusal", f"{len(refusal)} characters: {refusal}"
    if refusal is not None:
        return "refused", refusal
    return ("loaded" if said["finite"] else "not finite"), ""


def choose_inputs(count: int, only: str | None, seed: int) -> list[Input]:
    """As many of each kind as its share says."""
    kinds = [only] if only else list(SUBJECTS)
    whole = sum(SUBJECTS[kind].share for kind in kinds)
    return [
        Input(kind, index, seed)
        for kind in kinds
        for index in range(max(1, round(count * SUBJECTS[kind].share / whole)))
    ]


def run_all(
    inputs: list[Input], sound: Path, jobs: int, timeout: float, verbose: bool
) -> collections.Counter[tuple[str, str]]:
    """Runs `jobs` at a time; prints those that end badly, or all; counts of (kind, end)."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    waiting, running = list(reversed(inputs)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            one = waiting.pop()
            folder = Path(tempfile.mkdtemp(prefix="fuzz."))
            done = one.make(sound, folder)
            process = Process(lambda one=one, folder=folder: one.read(folder), folder, timeout)
            running[process] = one, folder, done
        for process, (one, folder, done) in list(running.items()):
            if (outcome := process.poll()) is None:
                continue
            del running[process]
            end, said = end_of(outcome, folder)
            counts[one.kind, end] += 1
            if verbose or end not in GOOD:
                lines = [line for line in said.strip().splitlines() if line.strip()] or [""]
                shown = (
                    said
                    if verbose
                    else " … ".join([*lines[:1], *lines[-1:]][-1 if end == "raw exception" else 0 :])[:400]
                )
                print(f"{one.kind} {one.index}: {end}: {done}: {shown}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.005)
    return counts


def show(counts: collections.Counter[tuple[str, str]]) -> None:
    """A row per kind, a column per end."""
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    print(f"\n| kind | inputs | {' | '.join(ENDS)} |\n|---|{'---|' * (len(ENDS) + 1)}")
    for name, rows in (*((kind, [kind]) for kind in kinds), ("all", kinds)):
        cells = [sum(counts[kind, end] for kind in rows) for end in ENDS]
        print(f"| {name} | {sum(cells)} | {' | '.join(map(str, cells))} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=SUBJECTS, help="inputs of one kind")
    parser.add_argument("--input", type=int, help="number of the one to repeat, with --only")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--timeout", type=float, default=60, help="seconds for each")
    parser.add_argument("--model", type=Path, default=DATA / "models" / "stories260K", help="Hugging Face directory")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        sound = Path(directory) / "sound"
        sound.mkdir()
        made = Process(lambda: make_all(arguments.model, sound), sound, timeout=600, memory=None).wait()
        if made.error or made.signal:
            sys.exit(f"error: no sound files: {made.error or made.output}")
        if arguments.input is not None:
            inputs = [Input(arguments.only, arguments.input, arguments.seed)]
        else:
            inputs = choose_inputs(arguments.inputs, arguments.only, arguments.seed)
        counts = run_all(inputs, sound, arguments.jobs, arguments.timeout, verbose=arguments.input is not None)
    show(counts)
    sys.exit(any(end not in GOOD for _, end in counts))


if __name__ == "__main__":
    main()
