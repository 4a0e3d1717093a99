"""The check of a machine with a GPU, as far as it goes without one: steps that stand for others, and its page."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import ROOT, start

sys.path.append(str(ROOT / "tools"))

import json_lines
from bench_matmul import Case, Row
from gpu_checking import command, small_products
from gpu_checking import steps as real
from gpu_checking.device import Device
from gpu_checking.running import FIGURES, SECONDS, Step, limit_of
from markdown_table import table_of

from teq_graph.config import BITS
from teq_graph.kernels import plan
from teq_graph.kernels.plan import Product

DEVICE = Device("A GPU", "80 GiB, driver 1.2", "Python 3.12, torch 2.11", "2026-01-02")
WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1]).write_text"
GREETS = 'print("hello from", "the step")'
Check = Callable[..., tuple[int, str]]


def step(name: str, script: str, *arguments: str, share: float = 1, **more: Any) -> Step:
    return Step(name, share, (sys.executable, "-c", script, *arguments), f"How {name} is measured.", **more)


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Runs steps on a machine that has a GPU: the exit code, and the file that is written."""
    monkeypatch.setattr(command, "find_device", lambda: DEVICE)
    monkeypatch.setattr(command.interruption, "install", lambda: None)

    def run(steps: list[Step], *arguments: str) -> tuple[int, str]:
        output = tmp_path / "check.md"
        with pytest.raises(SystemExit) as caught:
            command.main(["--output", str(output), *arguments], steps)
        return int(caught.value.code or 0), output.read_text(encoding="utf-8")

    return run


def outcomes(page: str) -> dict[str, str]:
    """By step, in the order of the page's first table."""
    rows = re.findall(r"^\| (\w+) \| (.+?) \| ", page, re.MULTILINE)
    return {name: outcome for name, outcome in rows if name != "step"}


def test_steps_run_in_turn_and_their_figures_are_tables(check: Check) -> None:
    figures = '{"contender": "ours", "ms": 1.5}\n{"contender": "theirs", "ms": 3}\n'
    steps = [step("first", GREETS), step("second", f"{WRITES}({figures!r})", FIGURES)]
    code, page = check(steps)
    assert code == 0
    assert outcomes(page) == {"first": "passed: hello from the step", "second": "passed"}
    assert "| contender | ms |\n|---|---|\n| ours | 1.5 |\n| theirs | 3 |" in page
    for said in ("A GPU", "driver 1.2", "torch 2.11", "2026-01-02", "How second is measured."):
        assert said in page
    assert check(steps, "--steps", "second")[1].count("\n## ") == 1


def test_an_overrun_is_ended_with_all_that_it_started(check: Check, tmp_path: Path) -> None:
    beats = tmp_path / "beats"
    child = f"import time\nwhile True: print('.', end='', file=open({str(beats)!r}, 'a')); time.sleep(0.05)"
    script = (
        f"{WRITES}('{{\"tokens\": 1}}' + chr(10) + '{{\"tok')\n"
        f"import subprocess, time; subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "print('still at it'); time.sleep(60)"
    )
    code, page = check([step("long", script, FIGURES), step("short", GREETS, share=2)], "--minutes", "0.11")
    assert code == 1
    assert outcomes(page) == {"long": "cut after 2 s", "short": "passed: hello from the step"}
    assert "| tokens |\n|---|\n| 1 |\n" in page, "what was measured until then"
    assert "still at it" in page
    before = beats.stat().st_size
    time.sleep(0.5)
    assert beats.stat().st_size == before


def test_a_failure_shows_what_it_said(check: Check) -> None:
    script = "import sys; [print('line', i) for i in range(99)]; sys.exit('error: no such thing')"
    killed = "import os; os.kill(os.getpid(), 9)"
    code, page = check([step("broken", script), step("killed", killed), step("last", GREETS)])
    assert code == 1
    assert list(outcomes(page).values())[:2] == ["failed: exit code 1", "failed: signal SIGKILL"]
    assert outcomes(page)["last"].startswith("passed")
    assert "line 98\n" in page and "error: no such thing\n" in page and "line 1\n" not in page
    assert "(it printed nothing)" in page


def test_what_is_missing_is_listed(check: Check) -> None:
    missing = real.needs("torch", "a_package_that_is_absent", "absent.too")
    code, page = check([step("peers", GREETS, missing=missing), step("last", GREETS)])
    assert code == 0
    assert outcomes(page)["peers"] == "not run: a_package_that_is_absent, absent.too are not installed"
    assert real.needs("torch", and_then=lambda: "no reason")() == "no reason"
    assert real.needs("torch")() is None


def test_time_that_is_left_goes_to_the_later_steps(check: Check) -> None:
    steps = [step(name, GREETS, share=share) for name, share in (("a", 1), ("b", 1), ("c", 2))]
    assert limit_of(steps, 400) == 100
    assert limit_of(steps[1:], 390) == 130
    assert limit_of(steps[2:], 380) == 380
    told = step("told", "import sys; print('seconds', sys.argv[1])", SECONDS)
    assert outcomes(check([told], "--minutes", "2")[1]) == {"told": "passed: seconds 120"}
    assert outcomes(check([told], "--minutes", "0.01")[1]) == {"told": "not run: no time was left"}


def test_the_table_of_the_kernels_goes_into_another_file(check: Check, tmp_path: Path) -> None:
    readme, rows = tmp_path / "README.md", tmp_path / "rows.jsonl"
    readme.write_text("before\n<!-- kernels:begin -->\nold\n<!-- kernels:end -->\nafter\n", encoding="utf-8")
    copies = "import sys, shutil; shutil.copy(sys.argv[1], sys.argv[2])"
    kernels = step("kernels", f"{copies}; sys.exit(3)", str(rows), FIGURES, table=real.kernel_table)
    rows.write_text('{"contender": "gemlite", "failed": "no"}\n', encoding="utf-8")
    check([kernels], "--update", str(readme))
    assert "\nold\n" in readme.read_text(encoding="utf-8"), "nothing was measured"
    for m in (1, 16):
        case = Case(4096, 2048, m, 4, 128, torch.float16)
        json_lines.append(rows, Row(case, "teq_graph", m * 1e-6, 1, 4e-6, 1e12).fields())
    assert check([kernels], "--update", str(readme))[0] == 1
    text = readme.read_text(encoding="utf-8")
    begin = "before\n<!-- kernels:begin -->\n"
    assert text.startswith(f"{begin}`tools/gpu_check` on A GPU, 80 GiB, driver 1.2, 2026-01-02. Python 3.12")
    assert text.endswith("<!-- kernels:end -->\nafter\n") and "old" not in text
    assert "| 4096 × 2048, W4g128, teq_graph | 4.00 (1.0) | 0.25 (16.0) |" in text
    assert "- gemlite: no" in text
    assert "How it ended: failed: exit code 3. What has no figure was not measured." in text


def test_no_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as caught:
        command.main(["--output", str(tmp_path / "check.md")], [step("first", GREETS)])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: torch sees no NVIDIA GPU\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--minutes", "0"], "argument --minutes: '0': accepted are numbers above 0, up to 1440"),
        (["--minutes", "nan"], "argument --minutes: 'nan': accepted are numbers above 0, up to 1440"),
        (["--output", "absent/check.md"], "argument --output: absent/check.md: accepted is a file in a folder"),
        (["--update", "absent.md"], "argument --update: absent.md: No such file"),
        (["--update", "tests/conftest.py"], "argument --update: tests/conftest.py: <!-- kernels:begin --> … <!-- "),
        (["--steps", "other"], "argument --steps: invalid choice: 'other' (choose from "),
        (["more"], "unrecognized arguments: more"),
    ],
)
def test_bad_argument_is_one_line(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as caught:
        command.main(arguments, [step("first", GREETS)])
    error = capsys.readouterr().err
    assert caught.value.code == 2
    assert error.startswith(f"error: {said}") and error.count("\n") == 1


def test_a_check_that_is_ended_ends_its_step(tmp_path: Path) -> None:
    pid, page = tmp_path / "pid", tmp_path / "check.md"
    script = "import os, pathlib, sys, time; pathlib.Path(sys.argv[1]).write_text(str(os.getpid())); time.sleep(60)"
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from gpu_checking import command\n"
        "from gpu_checking.running import Step\n"
        "command.find_device = lambda: command.Device('A GPU', '', '', '')\n"
        f"step = Step('long', 1, (sys.executable, '-c', {script!r}, sys.argv[3]), '')\n"
        "command.main(['--output', sys.argv[2]], [step])"
    )
    process = start(code, ROOT / "tools", page, pid)
    while not (pid.exists() and pid.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert "| long | not begun |" in page.read_text(encoding="utf-8")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_the_steps_of_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    steps = real.steps()
    names = [step.name for step in steps]
    assert names == [
        "tests",
        "kernels",
        "tilings",
        "torch",
        "onnxruntime",
        "training",
        "packages",
        "memcheck",
        "racecheck",
    ]
    assert sum(step.share for step in steps) == 100
    for one in steps:
        assert all((ROOT / part).is_file() for part in one.command if part.startswith(("tools/", "tests/")))
    assert "tests/test_cuda_kernels.py" in steps[0].command
    assert steps[-1].missing() == "compute-sanitizer is not in PATH or CUDA_HOME"
    program = tmp_path / "cuda" / "bin" / "compute-sanitizer"
    program.parent.mkdir(parents=True)
    program.touch(mode=0o755)
    assert real.steps()[-1].command[0] == str(program)
    assert real.steps()[-1].missing() is None


@pytest.mark.parametrize("bits", BITS)
def test_small_products_are_of_every_tiling(bits: int) -> None:
    for tiling in plan.tilings_of(bits):
        sizes = (1, small_products.N, small_products.KS[0], bits, small_products.GROUP_SIZE)
        product = Product(small_products.DTYPE, *sizes)
        assert plan.plan_by(product, tiling, plan.Device(132, plan.HOPPER_SHARED_LIMIT, True)) is not None


def test_figures_of_a_process_that_was_ended(tmp_path: Path) -> None:
    path = tmp_path / "figures.jsonl"
    assert json_lines.read(path) == []
    json_lines.append(path, {"a": 1})
    json_lines.append(path, {"b": "×"})
    with path.open("a", encoding="utf-8") as file:
        file.write('{"c": ')
    rows = json_lines.read(path)
    assert rows == [{"a": 1}, {"b": "×"}]
    assert table_of(rows) == "| a |\n|---|\n| 1 |\n\n| b |\n|---|\n| × |"
