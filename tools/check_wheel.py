"""Builds the wheel and checks that it is whole: everything in it, nothing beside it, importable from anywhere."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KERNEL_SUFFIXES = {".py", ".md", ".cu", ".cuh", ".cpp", ".h"}
MODULES = """
import pathlib, pkgutil, sys
sys.path[:0] = sys.argv[1:2]
import teq_graph
assert pathlib.Path(teq_graph.__file__).is_relative_to(sys.argv[1]), teq_graph.__file__
heavy = sorted({"transformers", "onnx", "onnxruntime", "fastapi"} & set(sys.modules))
assert not heavy, f"import teq_graph imports {heavy}"
for module in pkgutil.walk_packages(teq_graph.__path__, "teq_graph."):
    __import__(module.name)
"""


def expected_files() -> set[str]:
    """What the wheel is to hold, from the folders of the checkout."""
    package = {path for path in (ROOT / "teq_graph").rglob("*") if path.suffix in {".py", ".typed", ".html", ".css"}}
    files = {path.relative_to(ROOT).as_posix() for path in package}
    for folder, suffixes in (("passes", {".py"}), ("kernels", KERNEL_SUFFIXES)):
        found = {path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes}
        files |= {f"teq_graph/{path.relative_to(ROOT).as_posix()}" for path in found}
    return {file for file in files if "__pycache__" not in file}


def run(*command: str, cwd: Path) -> None:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # by way of the source distribution, so that a stale build/ of the checkout cannot leak into the wheel
        run(sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT), cwd=folder)
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            names = {name for name in archive.namelist() if not name.endswith("/")}
        contents = {name for name in names if ".dist-info/" not in name}
        if contents != expected_files():
            missing, extra = sorted(expected_files() - contents), sorted(contents - expected_files())
            sys.exit(f"{wheel.name}: missing {missing}, unexpected {extra}")
        target = folder / "installed"
        pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(wheel))
        run(*pip, cwd=folder)
        run(sys.executable, "-I", "-c", MODULES, str(target), cwd=folder)
        print(f"{wheel.name}: {len(contents)} files, all modules import")


if __name__ == "__main__":
    main()
