"""Directories that appear whole or not at all: what they replace, who else writes them, and kills at every step."""

from __future__ import annotations

import inspect
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock
from support.command_line import start

from teq_graph.errors import ExportError, ModelFileError
from teq_graph.system.directories import EXPORTED, SAVED, amend, new_directory, reserved
from teq_graph.system.files import read_json, write_json
from teq_graph.system.manifest import FileEntry, verify_files

HELD = "is being written by another process or thread: accepted is another directory"


def write(target: Path, content: str = "new", overwrite: bool = False, description: str = EXPORTED) -> Path:
    """A directory of two files, one of them in a folder, and the description."""
    with new_directory(target, overwrite, description) as staging:
        (staging / "content").write_text(content)
        (staging / "folder").mkdir()
        (staging / "folder" / "inner").write_text(content)
        write_json(staging / description, {"format_version": 1})
    return target


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def refused(target: Path, match: str, overwrite: bool = True) -> str:
    """The one line with which `target` is refused before anything is done; everything stays as it is."""
    before = {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in target.parent.rglob("*")}
    with pytest.raises(ExportError, match=match) as caught, new_directory(target, overwrite, EXPORTED):
        raise AssertionError("not reached")
    assert {path: (path.lstat().st_ino, path.lstat().st_mtime_ns) for path in target.parent.rglob("*")} == before
    assert str(caught.value).isprintable()
    return str(caught.value)


WHOLE = ["out", "out/content", "out/folder", "out/folder/inner", "out/teq_graph.json"]


# ------------------------------------------------------------------------------------------- what may be replaced


def test_the_description_lists_all_other_files(tmp_path: Path) -> None:
    files = read_json(write(tmp_path / "out") / EXPORTED)["files"]
    entry = {"bytes": 3, "sha256": "11507a0e2f5e69d5dfa40a62a1bd7b6ee57e6bcd85c67c9b8431b36fff21c437"}
    assert files == {"content": entry, "folder/inner": entry}
    assert names(tmp_path) == WHOLE


@pytest.mark.parametrize("description", [EXPORTED, SAVED])
def test_what_was_written_is_replaced(description: str, tmp_path: Path) -> None:
    write(tmp_path / "out", "old", description=description)
    (tmp_path / "out" / "content").write_text("edited")  # names decide
    (tmp_path / "out" / "folder" / "inner").unlink()
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == WHOLE
    assert (tmp_path / "out" / "content").read_text() == "new"


def test_an_empty_directory_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "out" / "empty").mkdir(parents=True)
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == WHOLE


def test_nothing_is_replaced_unless_asked(tmp_path: Path) -> None:
    write(tmp_path / "out")
    refused(tmp_path / "out", "exists: accepted is a new directory, or overwrite=True", overwrite=False)


@pytest.mark.parametrize("place", ["precious", "folder/precious", "other/precious", ".hidden"])
def test_a_foreign_file_is_named(place: str, tmp_path: Path) -> None:
    file = write(tmp_path / "out") / place
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    refused(tmp_path / "out", f"out holds other files: '{place}'; what is replaced holds nothing but")


def test_a_foreign_link_is_named_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").write_text("mine")
    (write(tmp_path / "out") / "link").symlink_to(tmp_path / "elsewhere")
    refused(tmp_path / "out", "out holds other files: 'link'")
    (tmp_path / "out" / "link").unlink()
    (tmp_path / "out" / "content").unlink()
    (tmp_path / "out" / "content").symlink_to(tmp_path / "elsewhere" / "precious")
    write(tmp_path / "out", overwrite=True)  # the link goes, and not what it leads to
    assert (tmp_path / "elsewhere" / "precious").read_text() == "mine"


def test_a_directory_of_ours_within_belongs_to_it(tmp_path: Path) -> None:
    inner = write(write(tmp_path / "out") / "compiled", description=SAVED)
    (inner / "precious").write_text("mine")
    refused(tmp_path / "out", "'compiled/precious'")
    (inner / "precious").unlink()
    write(tmp_path / "out", overwrite=True)
    assert names(tmp_path) == WHOLE


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "it has no teq_graph.json or compiled.json"),
        ("", "cannot be read"),
        ("{}", "is none that teq_graph wrote"),
        ('{"format_version": 1}', "is of an earlier version, which did not list its files"),
        ('{"format_version": true, "files": {}}', "is none that teq_graph wrote"),
        ('{"format_version": 1, "files": []}', "does not list its files"),
        ('{"format_version": 1, "files": {"content": 1}}', "accepted are bytes and sha256"),
        ("[" * 100_000, "nested too deeply"),
        ('{"format_version": 1, "format_version": 1}', "'format_version' is there twice"),
        ('{"format_version": NaN}', "NaN is no number"),
        ("[]", "accepted is an object"),
        ('{"format_version": ' + "9" * 5000 + "}", "cannot be read"),
    ],
    ids=range(12),
)
def test_a_description_that_is_none(text: str | None, named: str, tmp_path: Path) -> None:
    write(tmp_path / "out")
    if text is None:
        (tmp_path / "out" / EXPORTED).unlink()
    else:
        (tmp_path / "out" / EXPORTED).write_text(text)
    refused(tmp_path / "out", named)


@pytest.mark.parametrize(
    "name", ["../precious", "/precious", "a/../../precious", "", ".", "a//b", "a\nb", "a\0b", "\ud800"]
)
def test_names_that_lead_out_of_the_directory(name: str, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    content = read_json(write(tmp_path / "out") / EXPORTED)
    content["files"][name] = content["files"]["content"]
    (tmp_path / "out" / EXPORTED).write_text(json.dumps(content))
    refused(tmp_path / "out", "accepted are files in the directory")
    with pytest.raises(ModelFileError, match="accepted are files in the directory"):
        verify_files(tmp_path / "out", EXPORTED, ["content"])


def test_what_appears_in_the_meantime_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the block runs, and between the check and the renaming."""
    out = write(tmp_path / "out", "old")

    def meanwhile() -> None:
        with new_directory(out, True, EXPORTED) as staging:
            shutil.copytree(out, staging, dirs_exist_ok=True)
            (out / "precious").write_text("mine")

    with pytest.raises(ExportError, match="'precious'"):
        meanwhile()
    assert names(tmp_path) == sorted([*WHOLE, "out/precious"])
    (out / "precious").unlink()
    rename = Path.rename

    def late(self: Path, other: Path) -> Path:
        if self == out:
            (out / "folder" / "precious").write_text("mine")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(ExportError, match="'folder/precious'"):
        write(out, overwrite=True)
    assert names(tmp_path) == sorted([*WHOLE, "out/folder/precious"])
    assert (out / "content").read_text() == "old"


def test_what_is_written_into_the_old_directory_at_the_last_moment_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process whose working directory it is: after the last check it has another name."""
    out, rename = write(tmp_path / "out", "old"), Path.rename

    def late(self: Path, other: Path) -> Path:
        if other == out:
            (tmp_path / ".out.teq_graph" / "old" / "precious").write_text("mine")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", late)
    with pytest.raises(ExportError, match="old/precious is no file of teq_graph's: accepted is that you move it away"):
        write(out, overwrite=True)
    kept = tmp_path / ".out.teq_graph" / "old" / "precious"
    assert (kept.read_text(), (out / "content").read_text()) == ("mine", "new")
    monkeypatch.undo()
    with pytest.raises(ExportError, match="move it away"):
        write(out, overwrite=True)
    kept.unlink()
    write(out, overwrite=True)
    assert names(tmp_path) == WHOLE


def test_links_and_files_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "nowhere").symlink_to(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(write(tmp_path / "out"))
    refused(tmp_path / "file", "file is a file: accepted is a directory")
    refused(tmp_path / "nowhere", "is a link to nothing")
    refused(tmp_path / "link", "is a link: accepted is a directory")
    (tmp_path / ".new.teq_graph").mkdir()
    (tmp_path / ".new.teq_graph" / "precious").write_text("mine")
    refused(tmp_path / "new", "new.teq_graph is in the way")


@pytest.mark.parametrize("content", ["a file", "a folder of another's files"])
def test_nothing_that_exists_is_replaced_by_way_of_a_missing_folder(content: str, tmp_path: Path) -> None:
    """`missing/..` is no directory until `missing` is made."""
    target = tmp_path / "target"
    if content == "a file":
        target.write_text("precious")
    else:
        target.mkdir()
        (target / "file").write_text("precious")
    way = tmp_path / "missing" / ".." / "target"
    with pytest.raises(ExportError, match=r"target (exists|is a file)"), new_directory(way, False, EXPORTED):
        raise AssertionError("not reached")
    assert (target if target.is_file() else target / "file").read_text() == "precious"
    assert not (tmp_path / "missing").exists()


def test_folders_made_on_the_way_go_after_a_failure(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "a" / "b" / "out", False, EXPORTED):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    write(tmp_path / "a" / "b" / "out")
    assert names(tmp_path / "a" / "b") == WHOLE


@pytest.mark.parametrize("name", ["out\udcff", "x" * 250, "new\nline\udcff", "a\0b"])
def test_names_that_cannot_be_written_are_refused_at_the_start(name: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"is no name in UTF-8 here|File name too long") as caught:
        write(tmp_path / name)
    assert str(caught.value).isprintable()
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- several at a time


def test_a_second_thread_is_refused_at_its_start(tmp_path: Path) -> None:
    errors: list[Exception] = []

    def second() -> None:
        try:
            write(tmp_path / "out", "second")
        except ExportError as error:
            errors.append(error)

    with new_directory(tmp_path / "out", False, EXPORTED) as staging:
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        write_json(staging / EXPORTED, {"format_version": 1})
    assert len(errors) == 1 and str(errors[0]).endswith(HELD)
    assert names(tmp_path) == ["out", "out/teq_graph.json"]


def test_a_second_process_is_refused_at_its_start(tmp_path: Path) -> None:
    code = "write(Path(sys.argv[1]))"
    with reserved(tmp_path / "out", False):
        done = child(code, tmp_path / "out")
        assert done.returncode == 1 and HELD in done.stderr.splitlines()[-1]
        write(tmp_path / "out", "first")  # within its own reservation
    assert names(tmp_path) == WHOLE
    assert (tmp_path / "out" / "content").read_text() == "first"


def test_many_processes_at_once(tmp_path: Path) -> None:
    """Each writes or is refused; what is there in the end is of one of them, whole."""
    code = "write(Path(sys.argv[1]), sys.argv[2], overwrite=True)"
    running = [popen(code, tmp_path / "out", number) for number in range(6)]
    errors = [process.communicate(timeout=60)[1] for process in running]
    done = [process.returncode for process in running]
    assert 0 in done and set(done) <= {0, 1}
    assert [error for error, code in zip(errors, done, strict=True) if code and HELD not in error] == []
    assert names(tmp_path) == WHOLE
    assert (tmp_path / "out" / "content").read_text() == (tmp_path / "out" / "folder" / "inner").read_text()


def test_the_last_owner_removes_its_lock_while_another_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who then holds the lock of a file that is gone holds nothing, and tries again."""
    acquire, times = FileLock.acquire, itertools.count()

    def after_its_removal(self: FileLock) -> object:
        held = acquire(self)
        if next(times) == 0:
            shutil.rmtree(Path(self.lock_file).parent)
        return held

    monkeypatch.setattr(FileLock, "acquire", after_its_removal)
    write(tmp_path / "out")
    assert names(tmp_path) == WHOLE
    assert next(times) == 2


def test_a_place_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", none)
    refused(tmp_path / "out", "out cannot be locked: Operation not supported; accepted is a place on a file system")


# ------------------------------------------------------------------------------------------- signals at every step


@pytest.mark.parametrize("moment", range(4))
def test_ctrl_c_while_a_directory_is_replaced(moment: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before or after either renaming: the old content is there or the new one, and no third thing is left."""
    target = write(tmp_path / "out", "old")
    rename, moments = Path.rename, itertools.count()

    def tick() -> None:
        if next(moments) == moment:
            raise KeyboardInterrupt

    def interrupted(self: Path, other: Path) -> Path:
        tick()
        result = rename(self, other)
        tick()
        return result

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(target, overwrite=True)
    assert names(tmp_path) == WHOLE
    assert (target / "content").read_text() == ("new" if moment == 3 else "old")


KILLED = """
import os, signal
from teq_graph.system.directories import amend
from teq_graph.system.files import read_json
left = int(sys.argv[2])
def kills(name):
    function = getattr(Path, name)
    def counted(*arguments, **named):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **named)
    setattr(Path, name, counted)
for name in ("rename", "replace", "unlink", "mkdir", "rmdir", "open", "write_text"):
    kills(name)
"""
WRITES = 'write(Path(sys.argv[1]), "new", overwrite=True)'
AMENDS = """
out = Path(sys.argv[1])
content = read_json(out / EXPORTED)
amend(out, EXPORTED, {**content, "figure": 1}, {"content": "the figure is 1"})
"""


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_sigkill_at_every_step(there: bool, tmp_path: Path) -> None:
    """The directory is the old one, the new one or (between the two renamings) missing, never half of one; the next
    run for it restores what is missing, and leaves nothing beside it."""
    seen = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        out = folder / "out"
        folder.mkdir()
        if there:
            write(out, "old")
        done = child(KILLED + WRITES, out, step)
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        beside = set(names(folder)) - set(WHOLE)
        assert all(name.startswith(".out.teq_graph") for name in beside)
        found = (out / "content").read_text() if out.exists() else "missing"
        seen.add(found)
        if found != "missing":
            assert [name for name in names(folder) if not name.startswith(".")] == WHOLE
            assert (out / "folder" / "inner").read_text() == found
            verify_files(out, EXPORTED, ["content", "folder/inner"])
        with pytest.raises(ZeroDivisionError), new_directory(out, True, EXPORTED):
            raise ZeroDivisionError
        wanted = found if found != "missing" else "old" if there else None
        assert names(folder) == ([] if wanted is None else WHOLE)
        assert wanted is None or (out / "content").read_text() == wanted
        shutil.rmtree(folder)
    assert step > 10
    assert seen == ({"old", "new", "missing"} if there else {"new", "missing"})
    assert names(folder) == WHOLE


def test_sigkill_while_figures_are_added(tmp_path: Path) -> None:
    """The description is the old one or the new one, and so is the text."""
    figures = set()
    for step in itertools.count():
        folder = tmp_path / str(step)
        folder.mkdir()
        out = write(folder / "out")
        done = child(KILLED + AMENDS, out, step)
        content = read_json(out / EXPORTED)
        figures.add(content.get("figure"))
        verify_files(out, EXPORTED, ["folder/inner"])
        assert (out / "content").read_text() in ("new", "the figure is 1")
        if done.returncode == 0:
            break
        assert done.returncode == -signal.SIGKILL, done.stderr
        with reserved(out, True):
            pass
        assert [path.name for path in folder.iterdir()] == ["out"]
    assert step > 3 and figures == {None, 1}


# -------------------------------------------------------------------------------------------- checks when reading


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda file: file.write_text("xyz"), r"is not what was written: SHA-256 \w{12}…, \w{12}… in teq_graph.json"),
        (lambda file: file.write_text("long"), "is not what was written: 4 bytes, 3 in teq_graph.json"),
        (lambda file: file.unlink(), "is missing: teq_graph.json lists it with 3 bytes"),
        (lambda file: (file.unlink(), os.mkfifo(file)), "is missing"),
        (lambda file: (file.unlink(), file.mkdir()), "is missing"),
    ],
    ids=["other", "longer", "gone", "a pipe", "a folder"],
)
def test_files_are_verified(damage: Callable[[Path], object], named: str, tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    verify_files(out, EXPORTED, ["content", "folder/inner", "absent"])
    damage(out / "content")
    verify_files(out, EXPORTED, ["folder/inner"])
    with pytest.raises(ModelFileError, match=f"out/content {named}"):
        verify_files(out, EXPORTED, ["content"])


def test_a_file_that_is_not_listed(tmp_path: Path) -> None:
    (write(tmp_path / "out") / "more").write_text("x")
    with pytest.raises(ModelFileError, match=r"out/more is none of the files that teq_graph.json lists"):
        verify_files(tmp_path / "out", EXPORTED, ["more"])


def test_what_is_amended_is_listed_as_it_is(tmp_path: Path) -> None:
    out = write(tmp_path / "out")
    content = read_json(out / EXPORTED)
    (out / "precious").write_text("what lies there meanwhile is no reason to lose figures")
    amend(out, EXPORTED, {**content, "more": 1}, {"content": "é\udcff"})
    amended = read_json(out / EXPORTED)
    assert amended["more"] == 1 and set(amended["files"]) == {"content", "folder/inner"}
    verify_files(out, EXPORTED, list(amended["files"]))
    assert amended["files"]["content"]["bytes"] == 8 == FileEntry.of(out / "content").bytes
    assert names(tmp_path) == sorted([*WHOLE, "out/precious"])
    with pytest.raises(ValueError, match=r"accepted are files that teq_graph\.json lists"):
        amend(out, EXPORTED, amended, {"precious": "not mine"})


# ---------------------------------------------------------------------------------------------------------- pieces


PRELUDE = f"""
import sys
from pathlib import Path
from teq_graph.system.directories import EXPORTED, new_directory
from teq_graph.system.files import write_json
{inspect.getsource(write)}
"""


def popen(code: str, *arguments: object) -> subprocess.Popen[str]:
    return start(PRELUDE + code, *arguments)


def child(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    process = popen(code, *arguments)
    output, errors = process.communicate(timeout=60)
    assert process.returncode is not None
    return subprocess.CompletedProcess([sys.executable], process.returncode, output, errors)
