"""`teq-graph report`: where the page goes, and what is refused."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.compiling import compile_mlp
from support.pages import EVIL, checked, export_llama

from teq_graph.cli import run
from teq_graph.errors import ModelFileError
from teq_graph.reporting.directory import read_directory
from teq_graph.reporting.page import render_page
from teq_graph.system.directories import check_target
from teq_graph.system.manifest import FileEntry


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export_llama(tmp_path_factory.mktemp("exported"))


@pytest.fixture
def out(exported: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(exported, tmp_path / "out")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_mlp(training=None).save(tmp_path_factory.mktemp("saved") / "saved")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs `report`, which exits 2 with one line on stderr; returns that line."""

    def check(*arguments: Any) -> str:
        assert run(["report", *map(str, arguments)]) == 2
        printed, errors = capsys.readouterr()
        assert printed == "" and re.fullmatch(r"error: [^\n]+\n", errors), errors
        return errors

    return check


def test_a_page_beside_the_directory(
    out: Path, refused: Callable[..., str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["report", f"{out}/"]) == 0
    page = out.parent / "out.html"
    printed = capsys.readouterr().out
    assert printed == f"page  {page}, {page.stat().st_size / 1e3:,.0f} kB\n"
    checked(page.read_text(encoding="utf-8"))
    assert sorted(path.name for path in out.parent.iterdir()) == ["out", "out.html"]
    check_target(out, overwrite=True)  # what quantize --overwrite asks
    assert "out.html exists: accepted is a new file, by -o, or --overwrite" in refused(out)
    monkeypatch.chdir(out)
    assert run(["report", ".", "--overwrite"]) == 0


def test_what_is_no_page_of_ours_stays(out: Path, refused: Callable[..., str]) -> None:
    other = out.parent / "mine.html"
    other.write_text("<p>mine</p>")
    assert "mine.html is no page that teq_graph wrote" in refused(out, "-o", other, "--overwrite")
    assert other.read_text() == "<p>mine</p>"
    (out.parent / "link.html").symlink_to(other)
    (out.parent / "folder").mkdir()
    for name in ("link.html", "folder"):
        assert f"{name} is no file" in refused(out, "-o", out.parent / name, "--overwrite")
    assert "which lists its files" in refused(out, "-o", out / "report.html")
    assert "cannot be written: No such file" in refused(out, "-o", out.parent / "none" / "page.html")
    assert "cannot be written: File name too long" in refused(out, "-o", out.parent / f"{'a' * 254}.html")
    assert sorted(path.name for path in out.parent.iterdir()) == ["folder", "link.html", "mine.html", "out"]


def test_a_page_of_a_saved_directory(saved: Path, tmp_path: Path) -> None:
    assert run(["report", str(saved), "-o", str(tmp_path / "page.html")]) == 0
    checked((tmp_path / "page.html").read_text(encoding="utf-8"))


def rewritten(directory: Path, name: str, content: str) -> None:
    """Put `content` into a file as if it had been written so."""
    (directory / name).write_text(content, encoding="utf-8")
    if name == "report.json":
        description = json.loads((directory / "teq_graph.json").read_text(encoding="utf-8"))
        description["files"][name] = dataclasses.asdict(FileEntry.of(directory / name))
        (directory / "teq_graph.json").write_text(json.dumps(description), encoding="utf-8")


def changed(**values: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = json.loads((directory / "report.json").read_text(encoding="utf-8"))
        rewritten(directory, "report.json", json.dumps({**content, **values}))

    return change


def without_report(directory: Path) -> None:
    rewritten(directory, "report.json", json.dumps({"attention": {"fused": 0, "refusals": []}}))


def with_provenance(value: Any) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        content = json.loads((directory / "teq_graph.json").read_text(encoding="utf-8"))
        rewritten(directory, "teq_graph.json", json.dumps({**content, "provenance": value}))

    return change


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "nothing there": (shutil.rmtree, "out is missing"),
    "a file": (lambda d: (shutil.rmtree(d), d.write_text("x")), "out is no directory"),
    "no description": (lambda d: (d / "teq_graph.json").unlink(), "has no teq_graph.json or compiled.json"),
    "description cut": (lambda d: rewritten(d, "teq_graph.json", '{"files": '), "teq_graph.json cannot be read"),
    "description without files": (lambda d: rewritten(d, "teq_graph.json", "{}"), "does not list its files"),
    "provenance of another kind": (with_provenance([1]), "teq_graph.json is damaged: provenance"),
    "perplexity of another kind": (with_provenance({"perplexity": 3}), "teq_graph.json is damaged: provenance.perpl"),
    "no report": (lambda d: (d / "report.json").unlink(), "report.json is missing"),
    "report changed": (lambda d: (d / "report.json").write_text("{}"), "report.json is not what was written"),
    "report a folder": (lambda d: ((d / "report.json").unlink(), (d / "report.json").mkdir()), "report.json"),
    "report cut": (lambda d: rewritten(d, "report.json", '{"weights": ['), "report.json cannot be read"),
    "report with NaN": (lambda d: rewritten(d, "report.json", '{"seconds": NaN}'), "NaN is no number of JSON"),
    "no compilation": (without_report, "report.json holds no report"),
    "weights of another kind": (changed(weights=3), "report.json is damaged: weights"),
    "sites of another kind": (changed(sites=[{"producer": 1}]), "report.json is damaged: sites.0.producer"),
    "an unknown kind": (
        changed(refusals=[{"producer": "a", "kind": "b", "node": "c", "reason": "d"}]),
        "refusals.0.kind",
    ),
    "curves of another kind": (
        changed(blocks=[{"linears": [], "before": 1, "after": 1, "curves": [1]}]),
        "blocks.0.curv",
    ),
    "attention of another kind": (changed(attention={"fused": -1}), "report.json is damaged: attention.fused"),
    "endless numbers": (changed(bytes_before=10**400), "report.json holds what cannot be shown"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_directories_are_refused(kind: str, out: Path, refused: Callable[..., str]) -> None:
    damage, message = DAMAGES[kind]
    damage(out)
    assert message in refused(out)
    assert [path.name for path in out.parent.iterdir() if path != out] == []


HOSTILE = [
    *(None, True, 0, -1, 10**400, 2**70, 1e308, -1e308, 1e-320),
    *("NaN", "Infinity", "", EVIL, "x" * 5000, "\0", "\ud800"),
    *([], {}, [[]], {"a": 1}, [1e308] * 9),
]


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every container in `content` with each of its keys."""
    for key, value in list(content.items() if isinstance(content, dict) else enumerate(content)):
        yield content, key
        if isinstance(value, dict | list):
            yield from places(value)


@given(seed=st.integers(0, 2**32))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_hostile_values_are_shown_or_refused(seed: int, exported: Path, tmp_path: Path) -> None:
    choose = random.Random(seed)
    shutil.copytree(exported, tmp_path / "out", dirs_exist_ok=True)
    name = choose.choice(["report.json", "teq_graph.json"])
    content = json.loads((exported / name).read_text(encoding="utf-8"))
    for _ in range(choose.randint(1, 3)):
        container, key = choose.choice(list(places(content)))
        container[key] = choose.choice(HOSTILE)
    rewritten(tmp_path / "out", name, json.dumps(content))
    with contextlib.suppress(ModelFileError):
        text = render_page(read_directory(tmp_path / "out"))
        checked(text.encode("utf-8", "backslashreplace").decode())


def test_names_that_no_file_has(refused: Callable[..., str]) -> None:
    assert "a\\x00b" in refused("a\0b")


def test_reading_refuses_by_its_own_exception(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="is missing: accepted is a directory"):
        read_directory(tmp_path / "none")


def test_what_evaluate_printed_is_shown(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reference = {"model": "the float one", "kl_divergence": 0.012345, "top1_agreement": 0.9876, "tokens": 90}
    known = {
        "model": "out",
        "runtime": "onnxruntime",
        "text": "t",
        "context": 64,
        "tokens": 91,
        "perplexity": "Infinity",
    }
    (out.parent / "kl.json").write_text(json.dumps({**known, "stride": 64, "reference": reference}))
    assert run(["report", str(out), "--evaluation", str(out.parent / "kl.json")]) == 0
    text = checked((out.parent / "out.html").read_text(encoding="utf-8")).text
    assert "KL divergence 0.01235 nats" in text and "98.76%" in text and "perplexity inf" in text
    capsys.readouterr()
    (out.parent / "kl.json").write_text(json.dumps({**known, "reference": 3}))
    assert run(["report", str(out), "-o", str(out.parent / "b.html"), "--evaluation", str(out.parent / "kl.json")]) == 2
    assert "kl.json is damaged: reference" in capsys.readouterr().err and not (out.parent / "b.html").exists()
