"""Ways to damage a file: its bytes, its JSON, what stands in its place, and payloads that would run."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

MARKER = "executed"
"""The file that a payload makes, in the directory where the reading process stands."""

Mutation = Callable[[random.Random, Path], str | None]
"""Damages a file and says how; None where it does not apply to such a file."""


class Payload:
    """Unpickling it makes the marker."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {MARKER}",)


# ------------------------------------------------------------------------------------------------------------- bytes


def flip_bits(choose: random.Random, path: Path) -> str | None:
    content = bytearray(path.read_bytes())
    if not content:
        return None
    count = choose.choice([1, 1, 10, 1000])
    # Headers are at the beginning, and are what makes readers stumble.
    end = choose.choice([len(content), min(len(content), 300)])
    for _ in range(count):
        content[choose.randrange(end)] ^= 1 << choose.randrange(8)
    path.write_bytes(content)
    return f"{count} bits flipped among the first {end} bytes"


def truncate(choose: random.Random, path: Path) -> str | None:
    size = path.stat().st_size
    kept = choose.choice([0, 1, 8, size // 2, size - 1, choose.randrange(size + 1)])
    os.truncate(path, max(0, kept))
    return f"cut to {kept} of {size} bytes"


def change_block(choose: random.Random, path: Path) -> str | None:
    content = path.read_bytes()
    start = choose.randrange(len(content) + 1)
    block = content[start : start + choose.choice([1, 16, 4096])]
    changed = {"zeroed": bytes(len(block)), "doubled": block * 2, "removed": b"", "of ones": b"\xff" * len(block)}
    how = choose.choice(list(changed))
    path.write_bytes(content[:start] + changed[how] + content[start + len(block) :])
    return f"{len(block)} bytes at {start} {how}"


def add_garbage(choose: random.Random, path: Path) -> str | None:
    count = choose.choice([1, 100, 100_000])
    with path.open("ab") as file:
        file.write(choose.randbytes(count))
    return f"{count} random bytes appended"


# -------------------------------------------------------------------------------------------------------------- JSON

NUMBERS = (0, -1, 1, 2**31, 2**63, 10**30, 1e308, -1e308, 1e-308, 0.5, float("nan"), float("inf"))
STRINGS = ("", "\x00", "\x1b[31m\r\n", "../../x", "🦙" * 1000, "x" * 10**6, "\ud800", "{% for i in x %}", "float64")


def edit_json(choose: random.Random, path: Path) -> str | None:
    content = _json_of(path)
    places = _places(content)
    if not places:
        return None
    owner, key = choose.choice(places)
    old = owner[key]
    how = choose.choice(["removed", "of another type", "a number", "a string", "doubled", "a long list"])
    if how == "removed":
        del owner[key]
    elif how == "of another type":
        owner[key] = choose.choice([None, True, [], {}, "x", 3, 2.5, [old], {"x": old}])
    elif how == "a number":
        owner[key] = choose.choice(NUMBERS)
    elif how == "a string":
        owner[key] = choose.choice(STRINGS)
    elif how == "doubled":
        owner[key] = old * 2 if isinstance(old, (int, float, str, list)) else [old, old]
    else:
        owner[key] = [old] * 100_000
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"{str(key)[:60]!r} {how}: {repr(owner.get(key) if isinstance(owner, dict) else None)[:60]}"


def nest_json(choose: random.Random, path: Path) -> str | None:
    content = _json_of(path)
    if content is None:
        return None
    depth = choose.choice([500, 2000, 100_000])
    nested = "[" * depth + "]" * depth
    if choose.random() < 0.5 and isinstance(content, dict):
        nested = json.dumps({**content, "extra": 0}).removesuffix("0}") + nested + "}"
    path.write_text(nested, encoding="utf-8")
    return f"nested {depth} deep"


def add_a_key(choose: random.Random, path: Path) -> str | None:
    content = _json_of(path)
    if not isinstance(content, dict):
        return None
    key = choose.choice(
        ["unknown", "", "\x00", "__class__", "self", "torch_dtype", "quantization_config", "_name_or_path"]
    )
    content[key] = choose.choice([None, 3, "x", {}, []])
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"{key!r} added: {content[key]!r}"


def _json_of(path: Path) -> Any:
    if path.suffix != ".json":
        return None
    with contextlib.suppress(ValueError):
        return json.loads(path.read_bytes())
    return None


def _places(content: Any) -> list[tuple[Any, Any]]:
    """All containers with each of their keys, those of long ones left out but for the first."""
    found: list[tuple[Any, Any]] = []
    open_ones = [content]
    while open_ones:
        container = open_ones.pop()
        if isinstance(container, (dict, list)):
            keys = list(container) if isinstance(container, dict) else list(range(len(container)))
            for key in keys[:50]:
                found.append((container, key))
                open_ones.append(container[key])
    return found


# --------------------------------------------------------------------------------------------- what stands in its place


def replace_file(choose: random.Random, path: Path) -> str | None:
    others = [other for other in path.parent.iterdir() if other.is_file() and other != path]
    size = path.stat().st_size
    ways = ["nothing", "directory", "dangling link", "link to itself", "FIFO", "swapped", "sparse", "/dev/zero"]
    if path.suffix == ".txt":
        ways.remove("FIFO")  # a text may come from another process, and is waited for
    how = choose.choice(ways)
    if how == "swapped" and others:
        other = choose.choice(others)
        mine = path.read_bytes()
        shutil.copyfile(other, path)
        other.write_bytes(mine)
        return f"swapped with {other.name}"
    path.unlink()
    if how == "directory":
        path.mkdir()
    elif how == "dangling link":
        path.symlink_to("nowhere")
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "FIFO":
        os.mkfifo(path)
    elif how == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif how == "/dev/zero":
        path.symlink_to("/dev/zero")
    return f"{how} in its place" if how != "nothing" else f"removed ({size} bytes)"


# ----------------------------------------------------------------------------------------------------------- payloads


def plant_payload(choose: random.Random, path: Path) -> str | None:
    if zipfile.is_zipfile(path):
        return _plant_in_archive(choose, path)
    content = _json_of(path)
    if isinstance(content, dict) and path.name in ("config.json", "tokenizer_config.json"):
        (path.parent / "payload.py").write_text(f"open({MARKER!r}, 'w')\nclass Chosen: pass\n", encoding="utf-8")
        kinds = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoModel")
        content["auto_map"] = dict.fromkeys(kinds, "payload.Chosen")
        if choose.random() < 0.7:
            content["model_type"] = "unheard_of"
        content.pop("tokenizer_class", None)
        path.write_text(json.dumps(content), encoding="utf-8")
        return "custom code beside it"
    if path.name == "tokenizer_config.json" or path.suffix == ".jinja":
        return None
    if choose.random() < 0.5:
        path.write_bytes(pickle.dumps(Payload()))
        return "a pickle in its place"
    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    path.write_bytes(buffer.getvalue())
    return "what torch.save writes in its place"


def _plant_in_archive(choose: random.Random, path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    buffer = io.BytesIO()
    torch.save(Payload(), buffer)
    payload = choose.choice([pickle.dumps(Payload()), buffer.getvalue()])
    # what torch.export and torch.save unpickle, or can be told to
    part = choose.choice(["sample_inputs", "weights/", "data.pkl", ""])
    chosen = sorted(name for name in members if part in name and not name.endswith(".json")) or sorted(members)
    members |= dict.fromkeys(chosen, payload)
    if choose.random() < 0.5:
        members = {
            name: content.replace(b'"use_pickle": false', b'"use_pickle": true') for name, content in members.items()
        }
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return f"a pickle as {chosen[0]} and {len(chosen) - 1} more"


def plant_template(choose: random.Random, path: Path) -> str | None:
    content = _json_of(path)
    if not isinstance(content, dict) or path.name != "tokenizer_config.json":
        return None
    content["chat_template"] = choose.choice(
        [
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ cycler.__init__.__globals__.os.system('touch " + MARKER + "') }}",
            "{% for i in range(10**9) %}{% for j in range(10**9) %}x{% endfor %}{% endfor %}",
            "{{ 'x' * 10**10 }}",
            "{% broken",
            "{{ messages[5].content }}",
        ]
    )
    path.write_text(json.dumps(content), encoding="utf-8")
    return f"chat template {content['chat_template'][:50]!r}"


MUTATIONS: tuple[tuple[Mutation, int], ...] = (
    (flip_bits, 4),
    (truncate, 3),
    (change_block, 3),
    (add_garbage, 1),
    (edit_json, 10),
    (nest_json, 2),
    (add_a_key, 1),
    (replace_file, 3),
    (plant_payload, 2),
    (plant_template, 2),
)


def damage(choose: random.Random, target: Path) -> str:
    """Damage a file, or one in a directory, in a random way; what was done."""
    while True:
        files = sorted(path for path in target.rglob("*") if path.is_file()) if target.is_dir() else [target]
        path = choose.choice(files)
        mutation = choose.choices([m for m, _ in MUTATIONS], [weight for _, weight in MUTATIONS])[0]
        done = mutation(choose, path)
        if done is not None:
            return f"{path.name}: {done}"
