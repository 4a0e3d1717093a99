"""The comparison with other packages: its table, what it does with failures and earlier rows, and its measure."""

# ruff: noqa: E402  the tools are no package: their folders must be on the path first
from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path += [str(TOOLS), str(TOOLS / "peers")]

import compare_peers
import job as job_module
from peers import environments, process, table
from peers.methods import METHODS, Method

from teq_graph.errors import InputError

ROW = {
    "method": "rtn",
    "perplexity": 162.871,
    "kl_divergence": 0.92316,
    "top1_agreement": 0.4004,
    "seconds": 0.04,
    "peak_bytes": 512_400_000,
    "stored_bytes": 239_000,
    "notes": ["one | two", "three"],
}
SETTINGS = {
    "model": "some/model",
    "test": "test.txt",
    "calibration": "valid.txt",
    "bits": 3,
    "group_size": 32,
    "iters": 5,
    "batch_size": 2,
    "seed": 0,
    "context": 64,
    "tokens": 128,
    "calibration_shape": [4, 32],
    "digest": "0",
    "is_encoder": False,
    "device": "cpu",
}
COLUMNS = table.columns_of(SETTINGS)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    test, calibration = tmp_path / "test.txt", tmp_path / "valid.txt"
    test.write_text("Once upon a time there was a little dog. " * 20, encoding="utf-8")
    calibration.write_text("Lily went to the park and saw a big tree. " * 20, encoding="utf-8")
    return test, calibration


def command(model: object, files: tuple[Path, Path], output: Path, *more: object) -> list[str]:
    size = ["--bits", 3, "--group-size", 32, "--tokens", 128, "--context", 64]
    training = ["--samples", 4, "--length", 32, "--batch-size", 2, "--iters", 2]
    fixed = [model, "--test", files[0], "--calibration", files[1], "--output", output, *size, *training]
    return [str(part) for part in (*fixed, *more)]


# ---------------------------------------------------------------------------------------------------------- table


def test_row_of_figures() -> None:
    expected = r"| round to nearest | 162.87 | 0.9232 | 40.0% | 0.0 | 512 | 0.24 | one \| two; three |"
    assert table.line(ROW, COLUMNS) == expected


def test_row_of_a_failure_has_its_error_and_as_many_cells() -> None:
    line = table.line({"method": "hqq", "error": "ValueError: no 3 bits", "notes": ["unread"]}, COLUMNS)
    assert "error: ValueError: no 3 bits" in line
    assert "unread" not in line
    whole = table.line({**ROW, "notes": []}, COLUMNS)
    assert line.count("|") == whole.count("|") == table.table([], COLUMNS).splitlines()[0].count("|")


def test_large_perplexity_is_short() -> None:
    assert "| 6.2e+09 |" in table.line({**ROW, "perplexity": 6.15e9}, COLUMNS)


def test_document_says_what_was_measured() -> None:
    text = table.document(SETTINGS, [ROW])
    assert text.count("\n| ") == 2
    for part in ("`some/model`", "W3g32", "128 tokens of `test.txt`", "windows of 64", "4 × 32 tokens of `valid.txt`"):
        assert part in text


def test_plot_is_left_out_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not table.plot([ROW], tmp_path / "plot.png", SETTINGS)
    assert not (tmp_path / "plot.png").exists()


def test_plot(tmp_path: Path) -> None:
    float_row = {key: value for key, value in ROW.items() if key != "seconds"}
    rows = [float_row, ROW, {**ROW, "perplexity": 1e9}, {"method": "hqq", "error": "no"}]
    assert table.plot(rows, tmp_path / "plot.png", SETTINGS)
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert table.plot(rows[3:], tmp_path / "empty.png", SETTINGS), "without a warning, too"


def test_every_method_has_its_runner_and_requirements() -> None:
    for method in METHODS.values():
        assert not method.runner or (TOOLS / "peers" / method.runner).is_file()
        if method.environment:
            pins = (environments.REQUIREMENTS / f"{method.environment}.txt").read_text(encoding="utf-8").splitlines()
            assert "torch==2.13.0" in pins
            assert all("==" in pin for pin in pins)


# ------------------------------------------------------------------------------------------------------- failures


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Measures a method whose runner is the given script."""

    def measure(script: str, timeout: float = 60.0) -> dict[str, Any]:
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        method = Method("a peer", str(tmp_path / "script.py"), note="always", ragged="where ragged")
        monkeypatch.setitem(METHODS, "peer", method)
        return process.measure_method(
            "peer", {"seed": 0}, venvs=tmp_path, logs=tmp_path / "logs", timeout=timeout, ragged=True
        )

    return measure


RESULT = "import json, sys, pathlib; result = pathlib.Path(sys.argv[1]).with_name('result.json')\n"


def test_result_of_a_runner(runner: Callable[..., dict[str, Any]]) -> None:
    row = runner(RESULT + "result.write_text(json.dumps({'perplexity': 2.0, 'notes': ['own']}))")
    assert row == {"method": "peer", "perplexity": 2.0, "notes": ["always", "where ragged", "own"]}


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (RESULT + "result.write_text(json.dumps({'error': 'ValueError: no'}))", "ValueError: no"),
        ("import a_package_that_is_absent", "ModuleNotFoundError: No module named 'a_package_that_is_absent'"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "signal SIGKILL"),
    ],
)
def test_failure_is_one_line(runner: Callable[..., dict[str, Any]], script: str, error: str) -> None:
    assert runner(script)["error"] == error


def test_timeout_ends_the_runner_and_what_it_started(runner: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(touched)!r}).touch()"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert runner(script, timeout=1.0)["error"] == "it took longer than --timeout"
    time.sleep(2)
    assert not touched.exists()


def test_a_run_that_is_ended_ends_its_method(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, pathlib, time; pathlib.Path({str(pid)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    code = (
        "import pathlib, sys; sys.path.insert(0, sys.argv[1]); folder = pathlib.Path(sys.argv[2])\n"
        "import compare_peers\n"
        "from peers import methods, process\n"
        "from teq_graph.system import interruption\n"
        "methods.METHODS['peer'] = methods.Method('a peer', str(folder / 'script.py'))\n"
        "common = dict(venvs=folder, logs=folder / 'logs', timeout=60, ragged=False)\n"
        "compare_peers.compare = lambda args: process.measure_method('peer', {}, **common)\n"
        "interruption.install()\n"
        "compare_peers.main(['model', '--test', sys.argv[3], '--calibration', sys.argv[3], '--output', sys.argv[2]])"
    )
    run = subprocess.Popen([sys.executable, "-c", code, TOOLS, tmp_path, script])
    while not (pid.exists() and pid.read_text()):
        assert run.poll() is None
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(30) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


def test_environment_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    (tmp_path / "broken.txt").write_text("no such requirement at all\n", encoding="utf-8")
    monkeypatch.setattr(environments.sys, "executable", "/bin/false")
    with pytest.raises(environments.BuildError, match="environment broken: exit code 1"):
        environments.python_of("broken", tmp_path / "venvs")


def test_finished_environment_is_used_again(tmp_path: Path) -> None:
    folder = tmp_path / "hqq"
    folder.mkdir()
    (folder / "requirements.txt").write_bytes((environments.REQUIREMENTS / "hqq.txt").read_bytes())
    assert environments.python_of("hqq", tmp_path) == folder / "bin" / "python"


def test_error_of_a_runner_reaches_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(job_module, "Job", lambda path: argparse.Namespace(seed=0, result={}, folder=path.parent))
    monkeypatch.setattr(sys, "argv", ["runner", str(tmp_path / "job.json")])
    job_module.run(fail)
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"error": "ValueError: two lines"}


# --------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods in the order in which they were measured, by a stand-in."""
    names: list[str] = []

    def measure(name: str, fields: object, **options: object) -> dict[str, Any]:
        names.append(name)
        return {**ROW, "method": name, **({"error": "no"} if name == "hqq" else {})}

    monkeypatch.setattr(compare_peers, "measure_method", measure)
    return names


def test_resume_keeps_good_rows_of_the_same_settings(
    data_dir: Path, files: tuple[Path, Path], tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = command(data_dir / "models" / "stories260K", files, tmp_path / "out")
    compare_peers.main([*start, "--methods", "rtn", "float", "hqq"])
    assert measured == ["rtn", "float", "hqq"]
    written = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in written["rows"]] == ["float", "rtn", "hqq"]

    compare_peers.main([*start, "--resume", "--methods", "rtn", "hqq", "ours-fast"])
    assert measured[3:] == ["hqq", "ours-fast"]
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    labels = [METHODS[name].label for name in ("float", "rtn", "hqq", "ours-fast")]
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][1:] == labels

    with pytest.raises(SystemExit) as caught:
        compare_peers.main([*start, "--resume", "--seed", "1"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "its rows are of other settings (seed" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["no json", "[]", '{"settings": {}, "rows": [{}]}'])
def test_resume_from_another_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "compare.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="not written by this tool"):
        compare_peers.kept_rows(path, SETTINGS)


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--bits", "5"], "--bits"),
        (["--group-size", "-1"], "--group-size"),
        (["--group-size", "48"], "--group-size"),
        (["--tokens", "1"], "integers >= 2"),
        (["--iters", "many"], "integers >= 1"),
        (["--methods", "rtn", "nothing"], "'nothing'"),
        (["--device", "tpu"], "accepted are cpu and cuda"),
        (["--device", "cuda:99"], "accepted are cpu and cuda"),
        (["--test", "absent.txt"], "absent.txt is no file"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_argument_is_one_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], part: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_peers.main(command("model", files, tmp_path / "out", *more))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_model_that_is_absent(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_peers.main(command(tmp_path / "no_model.gguf", files, tmp_path / "out"))
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not measured


def test_context_beyond_the_positions(
    data_dir: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_peers.main(command(data_dir / "models" / "stories260K", files, tmp_path / "out", "--context", 513))
    assert caught.value.code == 2
    assert "has 512 positions" in capsys.readouterr().err
    assert not measured
