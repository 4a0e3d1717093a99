"""Progress: silent by default, plain lines off a terminal, a bar on one."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from teq_graph.system import progress


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.02)
    monkeypatch.setattr(progress, "LINE_EVERY", 0.0)
    progress.enable()
    yield
    progress.enable(False)


def work(seconds: float = 0.05) -> list[int]:
    return [time.sleep(seconds) or index for index in progress.track(range(4), "Counting")]


def test_silent_by_default(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SHOW_AFTER", 0.02)
    assert work() == [0, 1, 2, 3]
    assert capsys.readouterr() == ("", "")


@pytest.mark.usefixtures("shown")
def test_plain_lines_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert work() == [0, 1, 2, 3]
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert out == ""
    assert lines[0].startswith("Counting 0/4 [")
    assert lines[-1].startswith("Counting 4/4 [")
    assert lines[-1].endswith(" done")
    assert all(lines)
    assert "\x1b" not in err


@pytest.mark.usefixtures("shown")
def test_quick_work_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "SHOW_AFTER", 30.0)
    work(0.0)
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("shown")
def test_one_long_step_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    with progress.task("Waiting") as task:
        time.sleep(0.1)
        task.advance(note="loss 0.5 [x]")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Waiting [0 s]")
    assert lines[-1].endswith("loss 0.5 [x] done")


@pytest.mark.usefixtures("shown")
def test_work_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with progress.task("Failing"):
            time.sleep(0.1)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert capsys.readouterr().err.splitlines()[-1].endswith("stopped")


@pytest.mark.usefixtures("shown")
def test_a_loop_that_is_left_early_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    steps = progress.track(iter(range(9)), "Leaving")
    for step in steps:
        time.sleep(0.05)
        if step == 2:
            break
    steps.close()  # type: ignore[attr-defined]
    assert capsys.readouterr().err.splitlines()[-1].endswith("stopped")


@pytest.mark.usefixtures("shown")
def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress._console, "_force_terminal", True)
    with progress.task("Outer", total=2) as outer:
        work(0.1)  # a bar within a bar
        outer.advance()
    err = capsys.readouterr().err
    assert "\x1b[" in err
    assert "Counting" in err
    assert "4/4" in err
    assert "Outer" in err
