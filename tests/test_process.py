"""The process of the command line: signals, and streams that do not take what is written."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support.command_line import QUICK, ROOT, save_tiny_llama, start

from teq_graph.cli import run
from teq_graph.system.directories import EXPORTED, new_directory
from teq_graph.system.files import write_json

# a shell starts background jobs with SIGINT ignored, nohup with SIGHUP, which children inherit
MAIN = """
import os, signal
from teq_graph.cli import process as cli
from teq_graph.system import progress
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
progress.SHOW_AFTER = progress.LINE_EVERY = 0.0
{}
cli.main()
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


# -------------------------------------------------------------------------------------------------------- signals


def test_interrupted_export_leaves_things_as_they_were(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(model: object, path: Path) -> None:
        path.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr("teq_graph.onnx.export.export.save_model", interrupt)
    old = tmp_path / "old"
    with new_directory(old, False, EXPORTED) as staging:
        write_json(staging / EXPORTED, {"format_version": 1})

    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_ino, path.stat().st_mtime_ns) for path in tmp_path.rglob("*")}

    before = state()
    for target in (old, tmp_path / "new"):
        assert run(["quantize", str(tiny), "-o", str(target), "--method", "rtn", "--overwrite"]) == 130
        assert state() == before
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_signals(sent: signal.Signals, code: int, tiny: Path, tmp_path: Path) -> None:
    process = start(MAIN.format(""), "quantize", tiny, "-o", tmp_path / "out", *QUICK, "--steps", "1000000")
    assert process.stderr is not None
    lines = []
    while not (lines and lines[-1].startswith("training blocks")):
        lines.append(process.stderr.readline())
        assert lines[-1], "".join(lines)
    time.sleep(0.2)
    process.send_signal(sent)
    printed, errors = process.communicate(timeout=30)
    assert process.returncode == code
    assert printed == ""
    assert "Traceback" not in errors
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "afterwards",
    ["return load(*arguments)", "raise RuntimeError('half imported')"],
    ids=["goes on", "fails otherwise"],
)
def test_a_library_that_swallows_ctrl_c(afterwards: str, tiny: Path, tmp_path: Path) -> None:
    swallow = f"""
from teq_graph import loading
load = loading._load_weights
def swallow(*arguments):
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        pass
    {afterwards}
loading._load_weights = swallow
"""
    process = start(MAIN.format(swallow), "quantize", tiny, "-o", tmp_path / "out")
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed == ""
    assert [line.split(" [")[0] for line in errors.splitlines()] == ["Loading tiny"] * 2  # began, and stopped
    assert not any(tmp_path.iterdir())


def test_ctrl_c_while_the_command_line_is_imported() -> None:
    early = """
import sys
class Finder:
    def find_spec(self, name, *rest):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""
    process = start(MAIN.format(early), "--help")
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 130


def test_a_signal_that_the_caller_ignores_stays_ignored() -> None:
    code = """
import os, signal
from teq_graph.system import interruption
signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
interruption.install()
os.kill(os.getpid(), signal.SIGHUP)
"""
    process = start(code)
    assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


# -------------------------------------------------------------------------------------------------------- streams


def test_a_full_disk_behind_standard_output(tiny: Path) -> None:
    with open("/dev/full", "w") as full:
        process = start(MAIN.format("progress.SHOW_AFTER = 60"), "inspect", tiny, stdout=full.fileno())
        _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (2, "error: input or output: No space left on device\n")


@pytest.mark.parametrize("arguments", [["inspect"], ["evaluate", "--tokens", "100"]], ids=lambda words: words[0])
def test_a_reader_that_has_gone(arguments: list[str], tiny: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command, *options = arguments
    process = start(MAIN.format("progress.SHOW_AFTER = 60"), command, tiny, *options, stdout=writing)
    os.close(writing)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (128 + signal.SIGPIPE, "")


def test_progress_that_nobody_reads_stops_nothing(tiny: Path) -> None:
    process = start(MAIN.format(""), "evaluate", tiny, "--tokens", "100")
    assert process.stdout is not None and process.stderr is not None
    process.stderr.close()
    with process.stdout as stream:
        assert "perplexity" in stream.read()
    assert process.wait(timeout=60) == 0


def test_standard_error_on_a_full_disk(tiny: Path) -> None:
    code = "import os; os.dup2(os.open('/dev/full', os.O_WRONLY), 2)\n" + MAIN.format("")
    process = start(code, "evaluate", tiny, "--tokens", "100")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "perplexity" in printed


@pytest.mark.parametrize("number", [1, 2])
def test_closed_streams(number: int, tiny: Path) -> None:
    code = MAIN.format("progress.SHOW_AFTER = 60")
    command = f"exec {shlex.join([sys.executable, '-c', code, 'evaluate', str(tiny), '--tokens', '100'])} {number}>&-"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(["sh", "-c", command], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert ("perplexity" in result.stdout) == (number == 2)


def test_a_terminal_without_the_characters(tiny: Path) -> None:
    process = start(MAIN.format("progress.SHOW_AFTER = 60"), "inspect", tiny, PYTHONIOENCODING="ascii")
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "")
    assert "258?32" in printed


def test_a_bug_shows_its_traceback() -> None:
    bug = """
from teq_graph import loading
def broken(source): raise RuntimeError("a bug")
loading.load_model = broken
"""
    process = start(MAIN.format(bug), "inspect", "anything")
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (1, "")
    assert errors.startswith("Traceback") and errors.endswith("RuntimeError: a bug\n")
