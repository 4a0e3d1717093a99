"""What a quantized model says of itself: description, model card, `quantize --json`; and the output that is written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import signal
import sys
import threading
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from support.command_line import QUICK, save_tiny_llama, start
from support.compiling import compile_llama
from torch import nn

import teq_graph
from teq_graph.cli import run
from teq_graph.loading import load_model
from teq_graph.provenance import describe_source, provenance
from teq_graph.system.directories import EXPORTED, SAVED, reserved
from teq_graph.system.files import read_json
from teq_graph.system.manifest import verify_files

RTN = ["--method", "rtn", "--group-size", "16", "--tokens", "100"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer, whose card names a licence."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")
    (directory / "README.md").write_text("---\nlicense: mit\nbase_model: somebody/else\n---\nText\n")
    return directory


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What `quantize --json` wrote and printed."""
    folder = tmp_path_factory.mktemp("quantized")
    text = folder / "calibration.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    out = folder / "é out"
    options = [*QUICK, "--calibration", str(text), "--seed", "7", "--preset", "fast", "--save-compiled", "--json"]
    with pytest.MonkeyPatch.context() as patch:
        printed: list[str] = []
        patch.setattr("sys.stdout", types.SimpleNamespace(write=printed.append, encoding="utf-8", flush=lambda: None))
        assert run(["quantize", str(tiny), "-o", str(out), *options]) == 0
    return out, json.loads("".join(printed))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_json_of_quantize(quantized: tuple[Path, dict[str, Any]]) -> None:
    out, content = quantized
    assert (content["model"], content["output"], content["compiled"]) == ("tiny", str(out), str(out / "compiled"))
    assert (content["quantized"], content["linears"], content["specs"]) == (14, 15, {"W4g16": 14})
    assert content["files"] == {path.name: path.stat().st_size for path in out.iterdir() if path.is_file()}
    assert content["bytes_on_disk"] == sum(content["files"].values())
    assert content["stages"] == ["teq", "clip", "gptq"]
    assert set(content["seconds"]) == {"load", "quantize", "export", "evaluate", "save"}
    assert all(before >= 0 for before in content["block_errors"][0].values())
    assert set(content["perplexity"]["values"]) == {"float", "quantized", "in onnxruntime at accuracy level 4"}
    assert all(value > 1 for value in content["perplexity"]["values"].values())


def test_json_of_a_dry_run(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["quantize", str(tiny), "-o", str(tmp_path / "out"), *QUICK, "--dry-run", "--json"]
    assert run(command) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["output"] == str(tmp_path / "out")
    named = {"bytes_before", "bytes_after", "seconds", "peak_bytes", "without_distillation", "notes"}
    assert set(content["estimate"]) == named
    assert content["estimate"]["bytes_before"] > content["estimate"]["bytes_after"]
    assert content["estimate"]["seconds"] > 0
    assert not list(tmp_path.iterdir())


def test_the_description_says_where_the_model_comes_from(quantized: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    out, printed = quantized
    found = read_json(out / EXPORTED)["provenance"]
    text = out.parent / "calibration.txt"
    assert found["source"] == {
        "name": "tiny",
        "given": str(tiny),
        "license": "mit",
        "sha256": {name: sha256(tiny / name) for name in ("config.json", "model.safetensors")},
    }
    assert found["command"].startswith(f"teq-graph quantize {tiny} -o '{out}' --group-size 16 ")
    assert (found["preset"], found["seed"], found["stages"]) == ("fast", 7, ["teq", "clip", "gptq"])
    assert found["calibration"] == {"kind": "file", "name": text.name, "sha256": sha256(text)}
    assert (found["quantization"]["bits"], found["training"]["samples"]) == (4, 4)
    assert found["versions"]["python"] == platform.python_version()
    assert found["versions"]["torch"] == torch.__version__
    assert found["perplexity"] == printed["perplexity"]
    assert found["created"].endswith("+00:00")
    saved = read_json(out / "compiled" / SAVED)["provenance"]
    assert saved["quantization"] == found["quantization"]
    assert saved["calibration"] == found["calibration"]


def test_the_card_is_the_hub_s(quantized: tuple[Path, dict[str, Any]]) -> None:
    out, printed = quantized
    card = huggingface_hub.ModelCard((out / "README.md").read_text(encoding="utf-8"))
    assert (card.data.license, card.data.pipeline_tag, card.data.library_name) == ("mit", "text-generation", "onnx")
    assert card.data.base_model is None  # a directory is none
    assert {"onnx", "quantized"} <= set(card.data.tags or ())
    for name, value in printed["perplexity"]["values"].items():
        assert f"| {name} | {value:.2f} |" in card.text
    assert "14 of 15 quantized" in card.text and f"teq-graph quantize {out.parent.parent}"[:18] in card.text


def test_checksums_are_right_after_the_figures_came_in(quantized: tuple[Path, dict[str, Any]]) -> None:
    out, _ = quantized
    for directory, description in ((out, EXPORTED), (out / "compiled", SAVED)):
        listed = read_json(directory / description)["files"]
        assert set(listed) == {path.name for path in directory.iterdir() if path.is_file()} - {description}
        verify_files(directory, description, list(listed))


def test_what_was_written_is_written_again(quantized: tuple[Path, dict[str, Any]], tiny: Path) -> None:
    """Over the compiled model within; then the user's own file stands in the way, before anything is loaded."""
    out, _ = quantized
    command = ["quantize", str(tiny), "-o", str(out), *RTN, "--no-evaluate", "--overwrite"]
    command.remove("--tokens")
    command.remove("100")
    assert run(command) == 0
    assert not (out / "compiled").exists()
    (out / "precious").write_text("mine")
    command[1] = "no/such/model"
    assert run(command) == 2
    assert (out / "precious").read_text() == "mine"


def test_a_second_process_is_refused_before_it_loads_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes: list[int] = []
    command = ["quantize", "no/such/model", "-o", str(tmp_path / "out"), "--method", "rtn"]
    with reserved(tmp_path / "out", False):
        thread = threading.Thread(target=lambda: codes.append(run(command)))
        thread.start()
        thread.join()
    assert codes == [2]
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'out'} is being written by another process")


@pytest.mark.parametrize("name", [b"bad\xff", b"x" * 250])
def test_names_that_cannot_be_written_are_refused_before_the_work(name: bytes, tmp_path: Path) -> None:
    target = f"{tmp_path}/{name.decode('utf-8', 'surrogateescape')}"
    process = start("from teq_graph.cli import main; main()", "quantize", "no/such/model", "-o", target)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (2, "")
    assert "is no name in UTF-8" in errors or "File name too long" in errors
    assert len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_terminal_that_cannot_say_the_path(tiny: Path, tmp_path: Path) -> None:
    arguments = ["quantize", tiny, "-o", tmp_path / "é", *RTN]
    process = start("from teq_graph.cli import main; main()", *arguments, PYTHONIOENCODING="ascii")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    assert f"{tmp_path}/\\xe9\n" in printed
    assert (tmp_path / "é" / "model.onnx").is_file()
    process = start(
        "from teq_graph.cli import main; main()", *arguments, "--overwrite", "--json", PYTHONIOENCODING="ascii"
    )
    printed, _ = process.communicate(timeout=120)
    assert json.loads(printed)["output"] == str(tmp_path / "é")


KILLED = """
import os, signal
import {module} as module
module.{name} = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
from teq_graph.cli import main
main()
"""


@pytest.mark.parametrize(
    ("module", "name", "whole"),
    [
        ("teq_graph.onnx.export.export", "model_card", False),
        ("teq_graph.evaluation", "perplexity", True),
        ("teq_graph.onnx.export.card", "amend", True),
    ],
    ids=["while exporting", "while evaluating", "before figures are added"],
)
def test_a_killed_quantize_leaves_all_or_nothing(
    module: str, name: str, whole: bool, tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    process = start(KILLED.format(module=module, name=name), "quantize", tiny, "-o", out, *RTN)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL, errors
    assert out.exists() == whole
    if whole:
        verify_files(out, EXPORTED, list(read_json(out / EXPORTED)["files"]))
    assert (tmp_path / ".out.teq_graph").is_dir()
    with reserved(out, overwrite=True):  # as the next run begins
        assert out.exists() == whole
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if whole else [])


# --------------------------------------------------------------------------------------------------- from the API


def test_what_is_known_from_the_api(stories260k: Any, tmp_path: Path) -> None:
    compiled = compile_llama(stories260k.model, tokenizer=stories260k.tokenizer)
    out = compiled.export_onnx(tmp_path / "out")
    found = read_json(out / EXPORTED)["provenance"]
    assert found["source"] == {"name": "stories260K"}  # no path of this machine
    assert found["quantization"]["bits"] == compiled.report.settings["quantization"]["bits"]
    assert "command" not in found
    assert huggingface_hub.ModelCard((out / "README.md").read_text(encoding="utf-8")).data.license is None


def test_a_model_without_a_config(tmp_path: Path) -> None:
    compiled = teq_graph.compile(nn.Sequential(nn.Linear(16, 16)).eval(), (torch.randn(2, 16),), training=None)
    out = compiled.export_onnx(tmp_path / "out")
    assert read_json(out / EXPORTED)["provenance"]["source"] == {"name": "unknown"}
    assert "pipeline_tag" not in (out / "README.md").read_text(encoding="utf-8")
    assert provenance(None)["source"] == {"name": "unknown"}


def test_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    """From its cache: files of the revision that was loaded."""
    snapshot = tmp_path / "models--org--model" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for name in ("config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        (snapshot / name).write_text(name)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    loaded = load_model(tiny)
    loaded.model.config._commit_hash = "abc123"
    source = describe_source(dataclasses.replace(loaded, name="model"), "org/model")
    assert (source["revision"], source["license"], len(source["sha256"])) == ("abc123", "apache-2.0", 3)
    assert source["sha256"]["config.json"] == hashlib.sha256(b"config.json").hexdigest()


def test_what_was_asked_for_needs_no_other_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Machines with a GPU have torch and little else: to compile takes no pydantic."""
    for name in ("pydantic", "pydantic_core"):
        monkeypatch.setitem(sys.modules, name, None)
    quantization = teq_graph.QuantizationConfig(bits=3, overrides={"0.*": {"bits": 8}}, skip=("1.*",))
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).eval()
    compiled = teq_graph.compile(model, (torch.zeros(1, 32),), quantization=quantization, training=None)
    asked = compiled.report.settings
    assert asked["quantization"]["overrides"] == {"0.*": {"bits": 8}} and asked["quantization"]["skip"] == ["1.*"]
    assert asked["training"] is None and asked["stages"] == []
    assert json.loads(json.dumps(asked)) == asked
