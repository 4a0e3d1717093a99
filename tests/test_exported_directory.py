"""Opening exported directories: providers, session options, other models, and damaged or foreign files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.command_line import start
from support.effort import at_once
from support.graphs import relative_error
from support.names import stable
from support.onnx import export_language_model
from torch import nn

from teq_graph.capture import capture
from teq_graph.cli import run
from teq_graph.errors import InputError, ModelFileError
from teq_graph.loading import LoadedModel
from teq_graph.onnx.export import export_onnx
from teq_graph.onnx.runtime import OnnxDecoder, OnnxModel, load
from teq_graph.onnx.runtime.session import MAX_THREADS

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    captured = capture(model, (torch.randn(3, 8),), ({0: torch.export.Dim.DYNAMIC},))
    return model, export_onnx(captured, tmp_path_factory.mktemp("classifier") / "out")


def test_unknown_providers_are_named(stories_dir: Path) -> None:
    for providers in (["NoSuchExecutionProvider"], [("NoSuchExecutionProvider", {"device_id": 0})]):
        with pytest.raises(InputError, match=r"'NoSuchExecutionProvider'.*CPUExecutionProvider"):
            OnnxDecoder.load(stories_dir, providers=providers)  # type: ignore[arg-type]
    for wrong in ("CPUExecutionProvider", ()):
        with pytest.raises(InputError, match="providers"):
            OnnxDecoder.load(stories_dir, providers=wrong)
    threads: Any
    for threads in (0, -1, 1.5, "2", 99_999_999_999, MAX_THREADS + 1):
        with pytest.raises(InputError, match=f"threads=.*: accepted are None and integers from 1 to {MAX_THREADS}"):
            OnnxDecoder.load(stories_dir, threads=threads)
    for providers in (5, {"CPUExecutionProvider"}, [5], [()], [None]):  # type: ignore[assignment]
        with pytest.raises(InputError, match=r"provider"):
            OnnxDecoder.load(stories_dir, providers=providers)  # type: ignore[arg-type]


def test_session_options_are_the_user_s(stories_dir: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    decoder = OnnxDecoder.load(stories_dir, ["CPUExecutionProvider"], threads=1, session_options=options)
    assert decoder.session.get_session_options().graph_optimization_level == options.graph_optimization_level
    assert decoder.session.get_session_options().intra_op_num_threads == 1
    assert decoder.generate(PROMPT, 10) == OnnxDecoder.load(stories_dir, threads=1).generate(PROMPT, 10)


def remove_everything(path: Path) -> None:
    shutil.rmtree(path)


def drop_description(path: Path) -> None:
    (path / "teq_graph.json").unlink()


def scramble_description(path: Path) -> None:
    (path / "teq_graph.json").write_text("{nonsense")


def empty_description(path: Path) -> None:
    (path / "teq_graph.json").write_text('{"format_version": 2}')


def list_description(path: Path) -> None:
    (path / "teq_graph.json").write_text("[]")


def later_description(path: Path) -> None:
    (path / "teq_graph.json").write_text('{"format_version": 99}')


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((path / "teq_graph.json").read_text())
    change(content)
    (path / "teq_graph.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "bogus"}, "dtype='bogus'"),
        ({"dtype": 5}, "dtype=5"),
        ({"dtype": ["float32"]}, "dtype="),
        ({"opset": "23"}, "opset='23'"),
        ({"opset": 10**18}, "opset=1000000000000000000"),
        ({"accuracy_level": 4.0}, "accuracy_level=4.0"),
        ({"eos_token_ids": [2.5]}, r"eos_token_ids\[0\]=2.5"),
        ({"eos_token_ids": "ab"}, "eos_token_ids='ab'"),
        ({"eos_token_ids": 2}, "eos_token_ids=2"),
        ({"pad_token_id": "x"}, "pad_token_id='x'"),
        ({"weights": []}, r"weights=\[\]"),
        ({"weights": {"3/128": True}}, "weights.3/128=True"),
        ({"shared_buffers": 1}, "shared_buffers=1"),
        ({"unknown": 1}, "unknown=1"),
        ({"provenance": []}, "provenance"),
        ({"decoder": "x"}, "decoder='x'"),
        ({"decoder": {"vocab_size": "x"}}, "vocab_size='x'"),
        ({"decoder": {"vocab_size": True}}, "vocab_size=True"),
        ({"decoder": {"vocab_size": 0}}, "vocab_size=0"),
        ({"decoder": {"max_positions": "many"}}, "max_positions='many'"),
        ({"decoder": {"max_positions": 10**30}}, "max_positions=1000000000000000000000000000000"),
        ({"decoder": {"layers": 5}}, "layers=5"),
        ({"decoder": {"layers": [[{"name": "key"}]]}}, r"layers\[0\]\[0\].sizes is missing"),
        ({"decoder": {"layers": [[{"name": "key", "sizes": [-1, None]}]]}}, r"sizes\[0\]=-1"),
        ({"decoder": {"layers": [[{"name": "key", "sizes": [1e12, None]}]]}}, r"sizes\[0\]=1000000000000.0"),
        ({"decoder": {"layers": [[{"name": "key", "sizes": [None, None]}]]}}, "one size at most is null"),
        ({"decoder": {"layers": [[{"name": "../key", "sizes": [1, None]}]]}}, r"name='\.\./key'"),
    ],
    ids=stable,
)
def test_a_damaged_description(stories_dir: Path, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    directory = shutil.copytree(stories_dir, tmp_path / "out")

    def change(content: dict[str, Any]) -> None:
        for name, value in changes.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) else value

    edit(directory, change)
    with pytest.raises(ModelFileError, match=f"teq_graph.json is damaged: .*{named}") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        '{"a": ' * 50_000,
        "[" * 500_000,
        '{"format_version": 2, "opset": 23, "opset": 24}',
        '{"format_version": 2, "opset": NaN}',
        '{"format_version": 2, "opset": -Infinity}',
        '{"format_version": ' + "9" * 100_000 + "}",
        '{"format_version": 1e999}',
        '{"format_version": true}',
        "\ufeff{}",
    ],
    ids=["deep", "deeper", "twice", "NaN", "infinite", "huge", "overflowing", "bool", "BOM"],
)
def test_json_that_no_reader_should_take(text: str, stories_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(stories_dir, tmp_path / "out")
    (directory / "teq_graph.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"teq_graph.json( cannot be read|: format_version)") as caught:
        load(directory)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def test_a_description_that_never_ends(stories_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(stories_dir, tmp_path / "out")
    with (directory / "teq_graph.json").open("wb") as file:
        file.truncate(2**40)  # a hole, which takes no place on the disk
    with pytest.raises(ModelFileError, match="1099511627776 bytes, accepted are up to"):
        load(directory)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda content: content.update(dtype="float16"), "dtype float16, while the model takes past_key_values.0.key"),
        (lambda content: content["decoder"]["layers"].pop(), "4 layers of 8 caches, while the model has 10 inputs"),
        (
            lambda content: content["decoder"]["layers"].append(content["decoder"]["layers"][0]),
            "6 layers of 12 caches, while",
        ),
        (
            lambda content: content["decoder"].update(layers=content["decoder"]["layers"] * 2_000),
            "10000 layers of 20000 caches",
        ),
        (
            lambda content: content["decoder"]["layers"][2][0]["sizes"].__setitem__(2, 2**31 - 1),
            r"2147483647\] for .*\.2\.key",
        ),
        (
            lambda content: content["decoder"]["layers"][1][1]["sizes"].__setitem__(0, 3),
            r"\[3, None, 8\] for .*\.1\.value",
        ),
        (lambda content: content["decoder"].update(vocab_size=2**31 - 1), "logits of 2147483647 tokens, while"),
    ],
    ids=["dtype", "a layer less", "a layer more", "many layers", "wide keys", "other heads", "vocabulary"],
)
def test_a_description_of_another_model(change: Any, named: str, stories_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(stories_dir, tmp_path / "out")
    edit(directory, change)
    refused = f"teq_graph.json is of another model than model.onnx: .*{named}"
    with at_once(10), pytest.raises(ModelFileError, match=refused) as caught:
        OnnxDecoder.load(directory, threads=1)
    assert "\n" not in str(caught.value)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_is_seen_unless_told_not_to_look(
    stories260k: LoadedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("teq_graph.onnx.export.model_file._EXTERNAL_FROM_BYTES", 0)
    export_language_model(stories260k, tmp_path / "out")
    for name in ("model.onnx", "model.onnx.data"):
        directory = shutil.copytree(tmp_path / "out", tmp_path / name)
        flip(directory / name)
        message = f"{directory / name} is not what was written: SHA-256 "
        for open_directory in (OnnxDecoder.load, OnnxModel.load, load):
            with pytest.raises(ModelFileError, match=message):
                open_directory(directory, threads=1)
        command = ["generate", str(directory), "-p", "x", "--max-new-tokens", "1"]
        assert run(command) == 2
        assert capsys.readouterr().err.startswith(f"error: {message}")
    assert isinstance(load(directory, threads=1, verify=False), OnnxDecoder)
    assert run([*command, "--no-verify"]) == 0


def test_what_people_edit_is_not_verified(stories_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(stories_dir, tmp_path / "out")
    (directory / "generation_config.json").write_text('{"max_new_tokens": 3}')
    (directory / "README.md").unlink(missing_ok=True)
    decoder = load(directory, threads=1)
    assert isinstance(decoder, OnnxDecoder)
    assert len(decoder.generate([1, 2])) <= 3


def test_no_verify_without_anything_to_verify(data_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(data_dir / "models" / "stories260K"), "--no-verify"]) == 2
    assert "--no-verify: no effect in PyTorch" in capsys.readouterr().err


def drop_model(path: Path) -> None:
    (path / "model.onnx").unlink()


def cut_model(path: Path) -> None:
    content = (path / "model.onnx").read_bytes()
    (path / "model.onnx").write_bytes(content[: len(content) // 2])


def scramble_model(path: Path) -> None:
    (path / "model.onnx").write_bytes(bytes(range(256)) * 10)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove_everything, "out"),
        (drop_description, "teq_graph.json is missing"),
        (scramble_description, "teq_graph.json"),
        (empty_description, "teq_graph.json"),
        (list_description, "teq_graph.json"),
        (later_description, "format_version=99"),
        (drop_model, "model.onnx is missing"),
        (cut_model, "model.onnx"),
        (scramble_model, "model.onnx"),
    ],
)
def test_damaged_directories(stories_dir: Path, damage: Any, named: str, tmp_path: Path) -> None:
    shutil.copytree(stories_dir, tmp_path / "out")
    damage(tmp_path / "out")
    for open_directory in (OnnxDecoder.load, load):
        with pytest.raises(ModelFileError, match=named) as caught:
            open_directory(tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_a_directory_without_tokenizer(stories_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(stories_dir, tmp_path / "out")
    for path in (tmp_path / "out").glob("tokenizer*"):
        path.unlink()
    decoder = OnnxDecoder.load(tmp_path / "out", threads=1)
    assert decoder.generate([1, 100], 3)
    with pytest.raises(ModelFileError, match="no usable tokenizer") as caught:
        decoder.generate(PROMPT)
    assert "\n" not in str(caught.value)


def test_other_models_run(classifier_dir: tuple[nn.Module, Path]) -> None:
    model, directory = classifier_dir
    opened = load(directory)
    assert isinstance(opened, OnnxModel)
    (name,) = (item.name for item in opened.session.get_inputs())
    x = torch.randn(5, 8)
    (actual,) = opened.run(**{name: x}).values()
    assert relative_error(torch.from_numpy(actual), model(x)) <= 1e-6
    with pytest.raises(InputError, match="wrong"):
        opened.run(wrong=x)
    with pytest.raises(InputError, match=r"\[5, 7\]") as caught:
        opened.run(**{name: x[:, :7]})
    assert "\n" not in str(caught.value)
    for wrong in ([[1.0], [2.0, 3.0]], [["a"]], None, {"x": 1}):
        with pytest.raises(InputError, match=rf"^{name}: accepted are values of float32") as caught:
            opened.run(**{name: wrong})
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="it is not a causal language model"):
        OnnxDecoder.load(directory)


def test_what_onnxruntime_raises_it_does_not_log_as_well(
    classifier_dir: tuple[nn.Module, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of attributes that its kernels refuse it tells on standard error, too."""
    directory = shutil.copytree(classifier_dir[1], tmp_path / "out")
    model = onnx.load(directory / "model.onnx")
    node = next(node for node in model.graph.node if node.op_type in ("Gemm", "MatMul"))
    attributes = dict(K=8, N=4, bits=5, block_size=16)
    quantized = onnx.helper.make_node(
        "MatMulNBits", [node.input[0], "codes", "scales"], ["x"], domain="com.microsoft", **attributes
    )
    model.graph.node.append(quantized)
    codes, scales = np.zeros((4, 1, 8), np.uint8), np.zeros((4, 1), np.float32)
    model.graph.initializer.extend([onnx.numpy_helper.from_array(codes, "codes")])
    model.graph.initializer.extend([onnx.numpy_helper.from_array(scales, "scales")])
    model.graph.output.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, directory / "model.onnx")
    with pytest.raises(ModelFileError, match=r"cannot be loaded: .*MatMulNBits"):
        load(directory, verify=False)
    assert capfd.readouterr() == ("", "")


def test_load_tells_decoders_from_others(stories_dir: Path) -> None:
    assert isinstance(load(stories_dir), OnnxDecoder)


def test_a_damaged_graph_is_refused_without_noise(stories_dir: Path, tmp_path: Path) -> None:
    """onnx_ir, which reads it first, tells on standard error what it makes up for a name that is nowhere."""
    directory = shutil.copytree(stories_dir, tmp_path / "out")
    model = (directory / "model.onnx").read_bytes()
    (directory / "model.onnx").write_bytes(model.replace(b"attention_mask", b"attention_mesk", 1))
    code = """
import sys
from teq_graph.errors import ModelFileError
from teq_graph.onnx.runtime import load
try:
    load(sys.argv[1])
except ModelFileError:
    print("refused")
"""
    process = start(code, directory)
    assert process.communicate(timeout=120) == ("refused\n", "")
