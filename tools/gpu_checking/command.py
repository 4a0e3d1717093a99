"""Everything that needs a GPU, tested and measured by one command, without a network, in a given time.

    tools/gpu_check --minutes 8 --output gpu_check.md --update kernels/README.md

Steps, in this order:

    {steps}

Each is a process that has its share of the time and of what those before it left; one that takes longer is ended, and
the file says so. A step that lacks something is listed with the reason. The file has device, driver, versions, and the
method, outcome and figures of each step; it is written after each of them, so that an interrupted check leaves what it
has found. --update puts the table of the kernels between the markers of another file.

Exits 1 where a step failed or was ended, 2 for wrong arguments and where torch sees no NVIDIA GPU.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from markdown_table import read_table, replace_section

from gpu_checking.device import Device, find_device
from gpu_checking.page import kernel_section, page
from gpu_checking.running import Outcome, Step, limit_of, run
from gpu_checking.steps import KERNELS
from gpu_checking.steps import steps as all_steps
from teq_graph.system import interruption
from teq_graph.system.files import write_whole

MOST_MINUTES = 1440


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {' '.join(message.split())}\n")


def parse_arguments(arguments: Sequence[str] | None, names: Sequence[str]) -> argparse.Namespace:
    description = (__doc__ or "").format(steps=", ".join(names))
    parser = Parser("gpu_check", description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=_output, default=Path("gpu_check.md"), help="the file to write")
    parser.add_argument("--minutes", type=_minutes, default=8.0, help="that all steps take together")
    parser.add_argument("--update", type=_marked, metavar="FILE", help="takes the table of the kernels")
    parser.add_argument("--steps", nargs="+", choices=names, default=list(names), metavar="STEP", help="only these")
    return parser.parse_args(arguments)


def _output(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text}: accepted is a file in a folder that is there")
    return path


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not 0 < minutes <= MOST_MINUTES:
        raise argparse.ArgumentTypeError(f"{text!r}: accepted are numbers above 0, up to {MOST_MINUTES}")
    return minutes


def _marked(text: str) -> Path:
    path = Path(text)
    try:
        read_table(path, KERNELS)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error.strerror}") from None
    except (SystemExit, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return path


def check(args: argparse.Namespace, device: Device, steps: Sequence[Step]) -> list[Outcome]:
    """Run the steps in turn; what is known is on disk after each."""
    deadline = time.monotonic() + args.minutes * 60
    outcomes: list[Outcome] = []
    write_whole(args.output, page(device, args.minutes, outcomes, steps))
    for number, step in enumerate(steps):
        outcome = run(step, limit_of(steps[number:], deadline - time.monotonic()))
        outcomes.append(outcome)
        print(f"{step.name}: {outcome.said}, {outcome.seconds:.0f} s", flush=True)
        write_whole(args.output, page(device, args.minutes, outcomes, steps[number + 1 :]))
        if args.update and step.name == KERNELS and any("case" in row for row in outcome.rows):
            replace_section(args.update, KERNELS, kernel_section(device, outcome))
    return outcomes


def main(arguments: Sequence[str] | None = None, steps: Sequence[Step] | None = None) -> NoReturn:
    steps = all_steps() if steps is None else steps
    args = parse_arguments(arguments, [step.name for step in steps])
    interruption.install()  # what ends this ends the step that runs, too
    device = find_device()
    if device is None:
        Parser().error("torch sees no NVIDIA GPU")
    try:
        outcomes = check(args, device, [step for step in steps if step.name in args.steps])
    except OSError as error:
        Parser().error(str(error))
    except KeyboardInterrupt:
        sys.exit(interruption.exit_code())
    print(f"written: {args.output}")
    sys.exit(not all(outcome.is_good for outcome in outcomes))
