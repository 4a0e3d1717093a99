"""onnxruntime reports to nobody unless the user wants it to."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

ROOT = Path(__file__).resolve().parents[1]
RUN = """
import os, sys
{first}
import onnxruntime
onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(os.environ.get("ORT_DISABLE_TELEMETRY"))
"""


def run(tmp_path: Path, first: str, **environment: str | None) -> tuple[str, str, list[str]]:
    """Standard output and error of a session in a process of its own, and the files below its home directory."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"])], "g", [value("x", TensorProto.FLOAT, [1])], [value("y", 1, [1])]
    )
    model = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), model)
    home = tmp_path / "home"
    home.mkdir()
    settings = {"HOME": str(home), "XDG_CACHE_HOME": None, "ORT_DISABLE_TELEMETRY": None, **environment}
    inherited = {name: text for name, text in os.environ.items() if name not in settings}
    given = {name: text for name, text in settings.items() if text is not None}
    result = subprocess.run(
        [sys.executable, "-c", RUN.format(first=first), model],
        env={**inherited, "PYTHONPATH": str(ROOT), **given},
        capture_output=True,
        text=True,
        check=True,
    )
    return result.stdout.strip(), result.stderr, [path.name for path in home.rglob("*") if path.is_file()]


@pytest.mark.parametrize("first", ["import teq_graph.onnx.runtime", "import teq_graph.onnx.export"])
def test_nothing_is_written_below_the_home_directory(tmp_path: Path, first: str) -> None:
    assert run(tmp_path, first) == ("1", "", [])


def test_without_a_home_directory(tmp_path: Path) -> None:
    assert run(tmp_path, "import teq_graph.onnx.runtime", HOME=None) == ("1", "", [])


def test_what_the_user_says_stays(tmp_path: Path) -> None:
    value, _, files = run(tmp_path, "import teq_graph.onnx.runtime", ORT_DISABLE_TELEMETRY="0")
    (tmp_path / "home").rename(tmp_path / "before")
    alone = run(tmp_path, "", ORT_DISABLE_TELEMETRY="0")[2]
    assert value == "0" and sorted(files) == sorted(alone)


def test_onnxruntime_is_imported_behind_the_switch() -> None:
    for path in [*ROOT.glob("teq_graph/**/*.py"), *ROOT.glob("passes/*.py"), *ROOT.glob("kernels/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.partition(".")[0] in ("onnxruntime", "onnxruntime_genai") for name in names):
                assert ROOT / "teq_graph" / "onnx" in path.parents, path
