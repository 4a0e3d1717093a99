"""The list of its files that a written directory's description holds: sizes and checksums."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from teq_graph.errors import ModelFileError, one_line
from teq_graph.system.files import read_json, shown

FILES = "files"
"""The entry of a description: name, relative to the directory, -> {"bytes": size, "sha256": hexadecimal digest}."""

_SHA256 = re.compile("[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class FileEntry:
    """Size in bytes and SHA-256 (64 hexadecimal digits) of a file."""

    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileEntry:
        """Of a file as it is; it is read in pieces."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return cls(os.fstat(file.fileno()).st_size, digest)


def list_files(directory: Path, without: str) -> dict[str, dict[str, Any]]:
    """The entries of all files in `directory` and the folders in it, but for the description `without`."""
    return {name: dataclasses.asdict(FileEntry.of(directory / name)) for name in walk(directory) if name != without}


def walk(directory: Path) -> list[str]:
    """The names of everything in `directory` and the folders in it that is no folder, links included, in order."""
    found, folders = [], [""]
    while folders:
        folder = folders.pop()
        for entry in os.scandir(directory / folder):
            if entry.is_dir(follow_symlinks=False):
                folders.append(f"{folder}{entry.name}/")
            else:
                found.append(f"{folder}{entry.name}")
    return sorted(found)


def entries_of(content: Mapping[str, Any]) -> dict[str, FileEntry]:
    """The entries of a description; raises ValueError where it has none, or names what is outside of its directory."""
    files = content.get(FILES)
    if not isinstance(files, dict):
        raise ValueError("it does not list its files")
    return {name: _entry(name, value) for name, value in files.items()}


def verify_files(directory: Path, description: str, names: Sequence[str]) -> None:
    """Compare files with what the description in `directory` says of them.

    Of `names`, those that are there or listed are compared. Other files are for people to edit, or have readers that
    see for themselves. Raises ModelFileError for a file that is missing or was changed since it was written.
    """
    path = directory / description
    try:
        entries = entries_of(read_json(path))
    except FileNotFoundError:
        raise ModelFileError(f"{shown(path)} is missing") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{shown(path)} cannot be read: {one_line(error)}") from None
    for name in names:
        file, wanted = directory / name, entries.get(name)
        if wanted is None and not os.path.lexists(file):
            continue
        if wanted is None:
            raise ModelFileError(f"{shown(file)} is none of the files that {description} lists")
        if not file.is_file():
            raise ModelFileError(f"{shown(file)} is missing: {description} lists it with {wanted.bytes:,} bytes")
        try:
            _compare(file, wanted, description)
        except OSError as error:
            raise ModelFileError(f"{shown(file)} cannot be read: {one_line(error)}") from None


def _compare(file: Path, wanted: FileEntry, description: str) -> None:
    size = file.stat().st_size  # the sizes tell at once of most of what goes wrong
    if size != wanted.bytes:
        difference = f"{size:,} bytes, {wanted.bytes:,}"
    elif (found := FileEntry.of(file).sha256) != wanted.sha256:
        difference = f"SHA-256 {found[:12]}…, {wanted.sha256[:12]}…"
    else:
        return
    raise ModelFileError(f"{shown(file)} is not what was written: {difference} in {description}")


def _entry(name: str, value: Any) -> FileEntry:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "/".join(parts) != name or ".." in parts or not name.isprintable():
        raise ValueError(f"its files name {shown(name)!r}, accepted are files in the directory")
    match value:
        case {"bytes": int(size), "sha256": str(digest), **rest} if (
            not rest and type(size) is int and size >= 0 and _SHA256.fullmatch(digest)
        ):
            return FileEntry(size, digest)
    raise ValueError(f"its files say {value!r:.80} of {name!r}, accepted are bytes and sha256")
