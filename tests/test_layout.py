"""The house as CONTRIBUTING describes it: folders, the package list, and which way imports point."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "teq_graph"

LAYERS: list[set[str]] = [
    {"errors"},
    {"config"},
    {"kernels"},
    {"system", "plausibility"},
    {"quantization"},
    {"ops"},
    {"graph"},
    {"capture", "loading"},
    {"analysis"},
    {"weight_plan", "passes", "evaluation"},
    {"report", "pipeline", "write_back", "saving"},
    {"calibration", "provenance", "reporting"},
    {"training"},
    {"compiled", "estimate", "onnx"},
    {"checkpoints"},
    {"compile", "serving"},
    {"cli"},
]
"""What may import what: only from layers above in this list, or within a package."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Every module of the package by its dotted name, with those behind the links."""
    for path in sorted(PACKAGE.glob("**/*.py")) + [
        PACKAGE / folder / file.name
        for folder in ("passes", "kernels")
        for file in sorted((ROOT / folder).glob("*.py"))
    ]:
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(part for part in parts if part != "__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imports(module: ast.Module) -> Iterator[str]:
    """What a module imports of the package when it is imported itself: not inside functions, nor for types alone."""
    for statement in module.body:
        if isinstance(statement, ast.Import):
            yield from (alias.name for alias in statement.names)
        elif isinstance(statement, ast.ImportFrom) and statement.module:
            yield from (f"{statement.module}.{alias.name}" for alias in statement.names)


def part_of(name: str) -> str | None:
    """`capture` of `teq_graph.capture.torch_export`; None for other packages and the package itself."""
    package, _, rest = name.partition(".")
    part = rest.partition(".")[0]
    return part if package == "teq_graph" and part in LEVEL else None


def wrong_arrows(name: str, module: ast.Module) -> list[str]:
    """The imports of one module that point up, or to a part beside its own."""
    own = part_of(name)
    if own is None:
        return []
    parts = {part for found in imports(module) if (part := part_of(found)) not in (None, own)}
    return [f"{name} → {part}" for part in sorted(parts) if part and LEVEL[part] >= LEVEL[own]]


def test_imports_point_one_way() -> None:
    assert [arrow for name, module in modules() for arrow in wrong_arrows(name, module)] == []


@pytest.mark.parametrize(
    ("name", "line", "wrong"),
    [
        ("teq_graph.graph.nodes", "from teq_graph.passes.base import GraphPass", True),
        ("teq_graph.pipeline", "from teq_graph import compile", True),
        ("teq_graph.capture.captured", "import teq_graph.onnx.export", True),
        ("teq_graph.calibration.batches", "from teq_graph.training import Trainer", True),
        ("teq_graph.onnx.export.lower", "from teq_graph import pipeline", False),
        ("teq_graph.analysis.blocks", "def f():\n    from teq_graph.cli import run", False),
    ],
)
def test_a_wrong_arrow_is_seen(name: str, line: str, wrong: bool) -> None:
    assert bool(wrong_arrows(name, ast.parse(line))) == wrong


def test_no_circles_within_a_package() -> None:
    graph: dict[str, set[str]] = {}
    names = {name for name, _ in modules()}
    for name, module in modules():
        found = {other for other in imports(module) if other in names} | {
            other.rpartition(".")[0] for other in imports(module) if other.rpartition(".")[0] in names
        }
        # A package's own __init__ is imported with each of its modules.
        graph[name] = {other for other in found if other != name and not name.startswith(f"{other}.")}
    while leaves := [name for name, found in graph.items() if not found & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"circular imports among {sorted(graph)}"


def test_every_part_has_its_place() -> None:
    parts = {name.split(".")[1] for name, _ in modules() if "." in name}
    assert parts - {"__main__"} == LEVEL.keys()


def folders() -> set[str]:
    found = {path.parent for path in PACKAGE.glob("**/*.py")} | {PACKAGE / "passes", PACKAGE / "kernels"}
    return {path.relative_to(ROOT).as_posix() for path in found}


def test_the_wheel_has_every_package() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert {name.replace(".", "/") for name in settings["tool"]["setuptools"]["packages"]} == folders()


def test_contributing_names_every_folder_and_no_other() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `([\w/]+)/` \|", text, re.MULTILINE))
    assert all((ROOT / folder).is_dir() for folder in named)
    assert named == folders() | {"passes", "kernels", "tests", "tools", "docs"}


def test_paths_in_documents_exist() -> None:
    for document in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]:
        text = document.read_text(encoding="utf-8")
        paths = re.findall(r"`((?:teq_graph|passes|kernels|tests|tools|docs)/[\w./]*\w)`", text)
        paths += [link for link in re.findall(r"\]\(([\w./-]+)\)", text) if "://" not in link]
        for path in paths:
            assert any((base / path).exists() for base in (ROOT, document.parent)), f"{document.name}: {path}"


def test_the_folders_of_the_tools_are_described() -> None:
    text = (ROOT / "tools" / "README.md").read_text(encoding="utf-8")
    tools = {path.name for path in (ROOT / "tools").iterdir() if path.is_file() and path.suffix in ("", ".py")}
    assert {name for name in tools if f"`{name}`" not in text} == set()
