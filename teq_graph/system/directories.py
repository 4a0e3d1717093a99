"""Directories that appear whole or not at all, and take the place of nothing but what was written so.

Beside a directory `out` that is being written stands a workshop:

    .out.teq_graph/
        lock     locked while a process works on `out`; the system unlocks it when the process ends, however it ends
        new/     what becomes `out`
        old/     what was `out`, between the two renamings and until it is deleted

At its end a process removes the workshop. What a killed one leaves is settled by the next that writes `out`: the old
content goes back where `out` is missing, otherwise it is deleted, and what is half-written goes.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from teq_graph.errors import ExportError, one_line
from teq_graph.system.files import read_json, shown, write_json
from teq_graph.system.manifest import FILES, entries_of, list_files, walk

EXPORTED, SAVED, CHECKPOINT = "teq_graph.json", "compiled.json", "checkpoint.json"
DESCRIPTIONS = (EXPORTED, SAVED, CHECKPOINT)
"""The files that describe a directory of ours, and list its files: of an exported one, of a saved one, and of one in a
form that other packages read."""

_LOCK, _NEW, _OLD = "lock", "new", "old"

# Of the calls around this one: the directories they write, with their workshops. A second thread has none of them.
_reserved: contextvars.ContextVar[Mapping[Path, Path]] = contextvars.ContextVar("reserved")


@contextlib.contextmanager
def new_directory(target: Path, overwrite: bool, description: str) -> Iterator[Path]:
    """A folder that becomes the directory `target` once the block ends without an exception.

    The block writes the JSON file `description` (of `DESCRIPTIONS`) among others; the list of all the others, with
    sizes and checksums, is added to it as "files".

    Raises ExportError where `target` exists, unless `overwrite` and it is empty or holds nothing but what was written
    so (`check_target`); where another process or thread writes it; and where writing fails (OSError). After an
    exception nothing is left behind, and an old `target` is as it was.
    """
    if description not in DESCRIPTIONS:
        raise ValueError(f"description {description!r}: accepted are {', '.join(DESCRIPTIONS)}")
    target = _absolute(target)
    with reserved(target, overwrite) as workshop, _writing(target):
        staging = workshop / _NEW
        try:
            staging.mkdir()
            yield staging
            content = read_json(staging / description)
            write_json(staging / description, {**content, FILES: list_files(staging, without=description)})
            check_target(target, overwrite)  # again: minutes have passed
            _replace(staging, target, workshop / _OLD)
        finally:
            _settle(target, workshop)


@contextlib.contextmanager
def reserved(target: Path, overwrite: bool) -> Iterator[Path]:
    """Keep `target` from everybody else for the time of the block, which may write it by `new_directory`.

    Gives the workshop beside it. Raises ExportError at once where `new_directory` would later.
    """
    target = _absolute(target)
    with _workshop_of(target, lambda: check_target(target, overwrite)) as workshop:
        yield workshop


def check_target(target: Path, overwrite: bool, option: str = "overwrite=True") -> None:
    """Raise ExportError where a directory `target` cannot be written or must not be replaced.

    What may be replaced, where `overwrite`, is an empty directory, and one that has a description of ours that lists
    every file in it. The files of a folder in it that is such a directory itself belong to it as well. Names decide,
    not contents, so that a damaged directory can be written again. `option` is what the caller calls `overwrite`.
    """
    target = _absolute(target)
    name = shown(target)
    if not os.path.lexists(target):
        return
    with _writing(target):
        if target.is_symlink():
            kind = "a link" if target.exists() else "a link to nothing"
            raise ExportError(f"{name} is {kind}: accepted is a directory")
        if not target.is_dir():
            raise ExportError(f"{name} is a file: accepted is a directory")
        if not overwrite:
            raise ExportError(f"{name} exists: accepted is a new directory, or {option}")
        _check_ours(target, name)


def amend(directory: Path, description: str, content: Mapping[str, Any], texts: Mapping[str, str]) -> None:
    """Write `texts`, by name, over files of a directory that was written, and its description, each in one step.

    `content` is that of the description; its entries of `texts` are brought up to date. A kill between the steps leaves
    a text whose checksum is out of date: accepted are files that are not verified.
    """
    if not set(texts) <= set(content[FILES]):
        raise ValueError(f"texts {sorted(texts)}: accepted are files that {description} lists")
    directory = _absolute(directory)
    with _workshop_of(directory, lambda: None) as workshop, _writing(directory):
        files, staging = dict(content[FILES]), workshop / _NEW
        try:
            staging.mkdir()
            for name, text in texts.items():
                (staging / name).write_text(text, encoding="utf-8", errors="backslashreplace")
            files |= list_files(staging, without=description)
            write_json(staging / description, {**content, FILES: files})
            for name in (*texts, description):
                (staging / name).replace(directory / name)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- pieces


def _absolute(target: Path) -> Path:
    # Not `absolute`, which keeps `..`: of a path through folders that do not exist yet, nothing would exist.
    path = os.path.abspath(target)
    try:
        same = path.encode("utf-8") == os.fsencode(path)
    except UnicodeEncodeError:
        same = False
    if not same or "\0" in path:
        # The libraries that write weights and tokenizers take no other.
        raise ExportError(f"{shown(target)} is no name in UTF-8 here: accepted is one, in a locale that has it")
    if not os.path.basename(path):
        raise ExportError(f"{shown(target)} is the root of all files: accepted is a new directory")
    return Path(path)


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ExportError(f"{shown(target)} cannot be written: {one_line(error)}") from error


@contextlib.contextmanager
def _workshop_of(target: Path, check: Callable[[], None]) -> Iterator[Path]:
    """The workshop of a directory that is this thread's alone while the block runs, and to which `check` agreed."""
    check()
    outer = _reserved.get({})
    for folder in (target, *target.parents):
        if folder in outer:
            yield outer[folder]
            return
    created: list[Path] = []
    try:
        with contextlib.ExitStack() as stack:
            with _writing(target):
                created += [folder for folder in target.parents if not folder.exists()]
                workshop = stack.enter_context(_locked(target))
                _settle(target, workshop)
                check()  # again: what was settled, or was written until now
            token = _reserved.set({**outer, target: workshop})
            stack.callback(_reserved.reset, token)
            yield workshop
    finally:
        for folder in created:
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[Path]:
    """The workshop of `target`, which no other process has."""
    workshop = target.parent / f".{target.name}.teq_graph"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(target.parent)) from None
    lock = None
    while lock is None:  # its last owner may remove it at any moment
        with contextlib.suppress(FileExistsError):
            workshop.mkdir()
        _check_workshop(workshop)
        lock = _lock(workshop / _LOCK, target)
    try:
        yield workshop
    finally:
        with contextlib.suppress(OSError):
            if not (workshop / _OLD).exists():
                # Before it is unlocked: who waits for it then sees that it is gone, and makes a new one.
                (workshop / _LOCK).unlink()
        lock.release()
        with contextlib.suppress(OSError):  # somebody else has it already
            workshop.rmdir()


def _lock(path: Path, target: Path) -> BaseFileLock | None:
    """The lock, held; None where its file or folder is gone. A process that has just ended may still have it for a
    moment."""
    there = path.exists()
    lock = FileLock(path, timeout=0.2, poll_interval=0.05)
    try:
        path.open("ab").close()
        file = path.stat()
        lock.acquire()
    except Timeout:
        raise ExportError(
            f"{shown(target)} is being written by another process or thread: accepted is another directory"
        ) from None
    except (FileNotFoundError, FileExistsError):  # the latter where filelock makes a folder that goes just then
        return None
    except (OSError, NotImplementedError) as error:
        if not there:
            with contextlib.suppress(OSError):  # somebody else has it already
                path.unlink()
                path.parent.rmdir()
        reason = f"{one_line(error)}; accepted is a place on a file system with locks"
        raise ExportError(f"{shown(target)} cannot be locked: {reason}") from error
    # The last owner may have removed the file while this process waited for it: others then lock another one.
    try:
        if os.path.samestat(file, path.stat()):
            return lock
    except FileNotFoundError:
        pass
    lock.release()
    return None


def _check_workshop(workshop: Path) -> None:
    """Raise ExportError where what has the workshop's name is none."""
    try:
        names = {entry.name for entry in os.scandir(workshop)}
    except FileNotFoundError:
        return
    except NotADirectoryError:
        names = {""}
    if workshop.is_symlink() or not names <= {_LOCK, _NEW, _OLD} or (names and _LOCK not in names):
        raise ExportError(f"{shown(workshop)} is in the way: accepted is that nothing else has this name")


def _settle(target: Path, workshop: Path) -> None:
    """Finish what stopped half-way: afterwards the old content or the new is there, and no third thing."""
    old = workshop / _OLD
    if old.exists():
        if os.path.lexists(target):
            _delete(old)
        else:
            old.rename(target)
    shutil.rmtree(workshop / _NEW, ignore_errors=True)


def _replace(staging: Path, target: Path, old: Path) -> None:
    """Put `staging` in the place of `target`; what this leaves half-way is for `_settle`."""
    if not os.path.lexists(target):
        staging.rename(target)
        return
    target.rename(old)  # from here on nobody adds to it by the name that they know
    _check_ours(old, shown(target))
    staging.rename(target)


def _check_ours(directory: Path, name: str) -> None:
    """Raise ExportError where there is a file that was not written by `new_directory`."""
    found = list(walk(directory))
    if not found:
        return
    try:
        foreign = sorted(set(found) - set(_names_of(directory)))
    except ValueError as error:
        raise ExportError(f"{name} holds other files: {error}; {_REPLACED}") from None
    if foreign:
        raise ExportError(f"{name} holds other files: {shown(foreign[0])!r}; {_REPLACED}")


_REPLACED = "what is replaced holds nothing but what teq_graph wrote; delete or move it yourself"


def _names_of(directory: Path) -> list[str]:
    """The files of a directory of ours, the description after all others; raises ValueError where it is none."""
    description = next((name for name in DESCRIPTIONS if os.path.lexists(directory / name)), None)
    if description is None:
        raise ValueError(f"it has no {' or '.join(DESCRIPTIONS)}")
    try:
        content = read_json(directory / description)
    except (OSError, ValueError) as error:
        raise ValueError(f"its {description} cannot be read: {one_line(error)}") from None
    if type(content.get("format_version")) is not int:
        raise ValueError(f"its {description} is none that teq_graph wrote")
    if FILES not in content:
        raise ValueError(f"its {description} is of an earlier version, which did not list its files")
    try:
        names = list(entries_of(content))
    except ValueError as error:
        raise ValueError(f"its {description} is damaged: {error}") from None
    own = {name.partition("/")[0] for name in names if "/" in name}
    for entry in os.scandir(directory):
        if entry.is_dir(follow_symlinks=False) and entry.name not in own:
            with contextlib.suppress(ValueError):
                names += [f"{entry.name}/{name}" for name in _names_of(directory / entry.name)]
    return [*names, description]


def _delete(directory: Path) -> None:
    """Delete the files that are ours, and the folders that are empty then; raises ExportError where something stays."""
    with contextlib.suppress(ValueError):
        for name in _names_of(directory):
            (directory / name).unlink(missing_ok=True)
    for folder, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):  # it is not empty
            os.rmdir(folder)
    if directory.exists():
        first = next(iter(walk(directory)), "")
        raise ExportError(f"{shown(directory / first)} is no file of teq_graph's: accepted is that you move it away")
