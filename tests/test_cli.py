"""The command line: what it prints, what it writes, and how it refuses."""

from __future__ import annotations

import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import BY_NAME
from support.command_line import LAYERS, POSITIONS, QUICK, ROOT, save_tiny_llama, start
from transformers import BertConfig, BertModel

import teq_graph
from teq_graph import evaluation
from teq_graph.cli import console, run
from teq_graph.compile import analyze
from teq_graph.compiled import CompiledModel
from teq_graph.errors import ExportError, NumericsError
from teq_graph.estimate import DISTILLED, Estimate, Estimator
from teq_graph.evaluation import builtin_text, perplexity
from teq_graph.loading import LoadedModel, load_model
from teq_graph.training import FirstBlock

CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with a tokenizer."""
    return save_tiny_llama(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random encoder without a tokenizer."""
    directory = tmp_path_factory.mktemp("models") / "bert"
    sizes = dict(vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    BertModel(BertConfig(**sizes)).eval().save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def quantized(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An exported directory, and what the command printed."""
    folder = tmp_path_factory.mktemp("quantized")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert run(["quantize", str(tiny), "-o", str(folder / "out"), "--bits", "3", *QUICK]) == 0
        printed = sys.stdout.getvalue()  # type: ignore[attr-defined]
    assert [path.name for path in folder.iterdir()] == ["out"]
    return folder / "out", printed


@pytest.fixture
def out(quantized: tuple[Path, str], tmp_path: Path) -> Path:
    """A copy of the exported directory that a test may damage."""
    return shutil.copytree(quantized[0], tmp_path / "copy")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command that exits 2 with one line on stderr; returns that line."""

    def check(*arguments: Any) -> str:
        assert run([str(argument) for argument in arguments]) == 2
        printed, errors = capsys.readouterr()
        assert printed == ""
        assert re.fullmatch(r"error: [^\n]+\n", errors), errors
        return errors.removeprefix("error: ").rstrip("\n")

    return check


# -------------------------------------------------------------------------------------------------------- startup


def test_help_and_version_import_nothing_heavy() -> None:
    code = """
import sys
from teq_graph.cli import run
assert run([]) == run(["--help"]) == run(["quantize", "--help"]) == run(["--version"]) == 0
print(sorted({"torch", "transformers", "onnx", "onnxruntime", "numpy"} & set(sys.modules)))
"""
    process = start(code)
    printed, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    lines = printed.splitlines()
    assert lines[-2:] == [f"teq-graph {teq_graph.__version__}", "[]"]
    for command in ("inspect", "quantize", "report", "generate", "evaluate"):
        assert any(line.startswith(f"  {command} ") and not line.endswith("...") for line in lines)


def test_the_package_is_whole_although_it_imports_lazily() -> None:
    code = """
import teq_graph
from teq_graph.compile import analyze
from teq_graph import *
import inspect
assert all(name in dir(teq_graph) for name in teq_graph.__all__)
assert inspect.isfunction(teq_graph.compile) and compile is teq_graph.compile
assert inspect.isfunction(teq_graph.load) and inspect.isclass(teq_graph.CompiledModel)
try:
    teq_graph.nothing
except AttributeError as error:
    print(error)
"""
    process = start(code)
    printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed) == (0, "module 'teq_graph' has no attribute 'nothing'\n"), errors


def test_python_dash_m() -> None:
    command = [sys.executable, "-m", "teq_graph", "quantize", "x", "-o", "y", "--bits", "5"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: bits=5: accepted are (2, 3, 4, 8)\n"


# -------------------------------------------------------------------------------------------------------- inspect


def test_inspect_prints_every_name_unbroken(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    assert run(["inspect", str(tiny)]) == 0
    printed, errors = capsys.readouterr()
    assert errors == ""
    lines = printed.splitlines()
    assert not any(line != line.rstrip() for line in lines)
    layers = f"model.layers.0-{LAYERS - 1}"
    (row,) = [line for line in lines if line.startswith(f"{layers}.input_layernorm ")]
    consumers = ", ".join(f"{layers}.self_attn.{name}_proj" for name in "qkv")
    assert re.split(r"\s{2,}", row) == [f"{layers}.input_layernorm", "rms_norm", "32", consumers, str(LAYERS)]
    assert any(re.match(r"lm_head\s+258×32\s+vocabulary projection .*\s1$", line) for line in lines)
    assert f"{layers}.self_attn.o_proj" in next(line for line in lines if "it is added to a value" in line)
    assert any(line.startswith(f"blocks        {LAYERS} × 7 linears: ") for line in lines)


def test_inspect_on_a_narrow_terminal_loses_nothing(
    tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich takes it for a terminal
    monkeypatch.setenv("COLUMNS", "60")
    assert run(["inspect", str(tiny), "--lm-head"]) == 0
    printed = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    lines = printed.splitlines()
    assert max(map(len, lines)) <= 60
    header = next(index for index, line in enumerate(lines) if "kind" in line and "channels" in line)
    starts = [lines[header].index(name) for name in ("producer", "kind", "channels", "consumers", "count")]
    columns = ["".join(line[a:b].strip() for line in lines[header:]) for a, b in itertools.pairwise(starts)]
    assert f"model.layers.0-{LAYERS - 1}.post_attention_layernorm" in columns[0]
    assert "….self_attn.q_proj….self_attn.k_proj….self_attn.v_proj….o_proj" in columns[3]


def test_inspect_json(tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny), "--json", "--skip", "*.layers.0.*gate*"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert [len(content[key]) for key in ("linears", "equivalences", "blocks")] == [7 * LAYERS + 1, 4 * LAYERS + 1, 3]
    kept = {linear["name"]: linear["in_float"] for linear in content["linears"] if linear["in_float"]}
    assert kept["model.layers.0.mlp.gate_proj.weight"] == "skipped by pattern"
    assert "vocabulary projection" in kept["lm_head.weight"]
    assert len(kept) == 2
    up = next(e for e in content["equivalences"] if e["producer"] == "model.layers.1.mlp.up_proj.weight")
    assert (up["channels"], up["consumers"]) == (48, ["model.layers.1.mlp.down_proj.weight"])
    assert all(refusal["reason"] and refusal["node"] for refusal in content["refusals"])


@pytest.mark.parametrize(("name", "other", "note"), [("ViT", None, False), ("T5", None, False)])
def test_inspect_says_what_else_stays_in_float(
    name: str, other: str | None, note: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = LoadedModel(BY_NAME[name].build(), None, name)
    monkeypatch.setattr("teq_graph.loading.load_model", lambda source: loaded)
    assert run(["inspect", name]) == 0
    printed = capsys.readouterr().out
    assert other is None or f"read by {other}" in printed
    assert ("no KV cache" in printed) == note
    assert run(["inspect", name, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    products = [weight["reason"].split()[2].rstrip(",") for weight in content["other_weights"]]
    assert products == [other] * (other is not None)
    assert len(content["notes"]) == note


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (
            [((f"h.{i}.norm.weight", f"h.{i}.a.q.weight", f"h.{i}.a.k.weight"), "r") for i in (0, 1, 2, 5)],
            [(("h.0-2,5.norm", "h.0-2,5.a.q", "h.0-2,5.a.k"), "r", 4)],
        ),
        (  # another rest is another row
            [(("h.0.a",), "r"), (("h.1.a",), "s")],
            [(("h.0.a",), "r", 1), (("h.1.a",), "s", 1)],
        ),
        (  # the consumer's number is no layer that it shares with the producer
            [(("0.weight", "2.weight"), "r"), (("2.weight", "4.weight"), "r")],
            [(("0", "2"), "r", 1), (("2", "4"), "r", 1)],
        ),
        (
            [((f"h.{i}.e.{j}.up", f"h.{i}.e.{j}.down"), "r") for i in range(2) for j in range(3)],
            [(("h.0-1.e.0-2.up", "h.0-1.e.0-2.down"), "r", 6)],
        ),
        (  # not a product of ranges: every row for itself
            [((f"h.{i}.e.{j}.up",), "r") for i, j in ((0, 0), (0, 1), (1, 0))],
            [(("h.0.e.0.up",), "r", 1), (("h.0.e.1.up",), "r", 1), (("h.1.e.0.up",), "r", 1)],
        ),
        ([], []),
    ],
)
def test_layers_that_are_alike_share_a_row(rows: Any, expected: Any) -> None:
    assert console.collapse_layers(rows) == expected


# ------------------------------------------------------------------------------------------- quantize and evaluate


def test_quantize_prints_what_it_did(tiny: Path, quantized: tuple[Path, str]) -> None:
    directory, printed = quantized
    values = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in printed.splitlines() if line[0] != " ")
    assert values["model"] == f"tiny → {directory}"
    assert values["quantized"] == f"{7 * LAYERS} of {7 * LAYERS + 1} linears: {7 * LAYERS} W3g16"
    # The last norm's scale would reach the vocabulary projection alone, which stays in float.
    sites = rf"{4 * LAYERS + 1} found, {4 * LAYERS} trained, (\d+ folded in: scales .*|0 folded in: ones were better)"
    assert re.fullmatch(sites, values["equivalences"])
    assert re.search(r"rounded to nearest → .* teq → .* clip → .* gptq → .* tune → .* as kept", values["block error"])
    assert values["in float"].startswith("lm_head: vocabulary projection")
    assert values["calibration"] == "up to 4 × 16 tokens, text that the model wrote"
    assert values["time"].endswith(")")
    before, after, ratio = map(float, re.findall(r"[\d.]+\d", values["size"].replace("float32", "")))
    parameters = sum(parameter.numel() for parameter in load_model(tiny).model.parameters())
    assert before == pytest.approx(4 * parameters / 1e6, rel=0.01)
    assert after == pytest.approx(sum(file.stat().st_size for file in directory.iterdir()) / 1e6, rel=0.01)
    assert ratio == pytest.approx(before / after, rel=0.02)
    assert "language reference (built in), not calibrated on; context 64" in printed


def test_evaluate_agrees_with_quantize_and_with_the_library(
    tiny: Path, quantized: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    directory, printed = quantized
    results = []
    for source, runtime in ((tiny, "PyTorch"), (directory, "onnxruntime")):
        assert run(["evaluate", str(source), "--tokens", "300", "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert (content["runtime"], content["context"], content["stride"]) == (runtime, POSITIONS, POSITIONS)
        results.append(content["perplexity"])
    line = next(line for line in printed.splitlines() if line.startswith("perplexity"))
    before, _, after = re.findall(r"\d+\.\d+", line)
    assert [f"{value:.2f}" for value in results] == [before, after]
    loaded = load_model(tiny)
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer(builtin_text()[:400])["input_ids"][:300]
    expected = perplexity(lambda x: loaded.model(x).logits, ids, context=POSITIONS)
    assert results[0] == pytest.approx(expected.value, rel=1e-6)


def test_evaluate_on_a_text_with_stride(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 5, encoding="utf-8")
    assert run(["evaluate", str(tiny), "--text", str(text), "--context", "32", "--stride", "16"]) == 0
    printed = capsys.readouterr().out
    loaded = load_model(tiny)
    assert loaded.tokenizer is not None
    ids = loaded.tokenizer(text.read_text(encoding="utf-8"))["input_ids"]
    expected = perplexity(lambda x: loaded.model(x).logits, ids, context=32, stride=16)
    assert re.search(rf"^perplexity +{expected.value:.3f}$", printed, re.MULTILINE)
    assert re.search(rf"^text +{expected.tokens} tokens of text\.txt; context 32$", printed, re.MULTILINE)


def test_overwrite_rtn_float16_overrides_and_the_compiled_model(
    tiny: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--method", "rtn", "--dtype", "float16", "--accuracy-level", "1", "--save-compiled", "--no-evaluate"]
    choices = ["--lm-head", "--skip", "*.0.mlp.up*", "--override", "*.down_proj.*:bits=8,symmetric=true", "--bits", "2"]
    assert run(["quantize", str(tiny), "-o", str(out), "--group-size", "32", *options, *choices, "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert f"{7 * LAYERS} of {7 * LAYERS + 1} linears: {6 * LAYERS} W2g32, {LAYERS} W8g32 sym" in printed
    assert re.search(r"^in float +model\.layers\.0\.mlp\.up_proj: skipped by pattern$", printed, re.MULTILINE)
    assert "perplexity" not in printed
    metadata = json.loads((out / "teq_graph.json").read_text(encoding="utf-8"))
    assert (metadata["dtype"], metadata["accuracy_level"]) == ("float16", 1)
    # stored as one: k and v of each layer, and gate and up where both are quantized
    assert metadata["weights"] == {"2/32": 6 * LAYERS - LAYERS - (LAYERS - 1), "8/32": LAYERS}
    compiled = teq_graph.load(out / "compiled")
    assert len(compiled.report.quantized) == 7 * LAYERS
    assert [path.name for path in out.parent.iterdir()] == [out.name]


def test_the_embedding_is_quantized_where_asked(tiny: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(tiny), "--embedding", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["embeddings"] == [
        {"name": "model.embed_tokens.weight", "shape": [258, 32], "tied": False, "in_float": None}
    ]
    assert run(["inspect", str(tiny), "--embedding", "--skip", "*embed*"]) == 0
    assert re.search(r"^model\.embed_tokens +258×32 +skipped by pattern", capsys.readouterr().out, re.MULTILINE)
    options = ["--method", "rtn", "--group-size", "32", "--no-evaluate", "--embedding"]
    assert run(["quantize", str(tiny), "-o", str(out), *options, "--overwrite"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^embedding +model\.embed_tokens: W4g32, error \d+\.\d%, .* MB$", printed, re.MULTILINE)
    metadata = json.loads((out / "teq_graph.json").read_text(encoding="utf-8"))
    assert metadata["weights"] == {"4/32": 5 * LAYERS + 1}  # per layer k and v are one, and gate and up


def test_ternary_and_binary_where_asked(tiny: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    levels = ["--bits", "2", "--symmetric", "--levels", "3", "--override", "*.down_proj.*:bits=2,levels=2"]
    options = ["--group-size", "32", "--method", "rtn", "--no-evaluate", "--overwrite"]
    assert run(["quantize", str(tiny), "-o", str(out), *levels, *options]) == 0
    assert f"{6 * LAYERS} W2g32 ternary, {LAYERS} W2g32 binary" in capsys.readouterr().out
    assert json.loads((out / "teq_graph.json").read_text(encoding="utf-8"))["provenance"]["quantization"]["levels"] == 3


def test_grids_for_cuda_where_asked(tiny: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--for-cuda", "--group-size", "32", "--method", "rtn", "--no-evaluate", "--overwrite"]
    assert run(["quantize", str(tiny), "-o", str(out), *options]) == 0
    assert f"{7 * LAYERS} W4g32 sym" in capsys.readouterr().out
    metadata = json.loads((out / "teq_graph.json").read_text(encoding="utf-8"))
    assert metadata["dtype"] == "float16" and metadata["provenance"]["quantization"]["symmetric"]


def test_links_and_missing_folders_on_the_way_to_the_output(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inner, target = tmp_path / "inner", tmp_path / "target"
    inner.mkdir()
    target.mkdir()
    (inner / "link").symlink_to(target)
    given = [inner / "link" / "out", inner / "link" / ".." / "beside", tmp_path / "nope" / ".." / "made"]
    options = ["--method", "rtn", "--group-size", "16"]
    for path, written in zip(given, (target / "out", tmp_path / "beside", tmp_path / "made"), strict=True):
        assert run(["quantize", str(bert), "-o", str(path), *options]) == 0
        assert f" → {written}\n" in capsys.readouterr().out
        assert (written / "model.onnx").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["beside", "inner", "made", "target"]


@pytest.mark.parametrize("failing", ["save", "perplexity"])
def test_what_fails_after_the_export_takes_nothing_away(
    failing: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object, **named: object) -> None:
        raise {"save": ExportError, "perplexity": NumericsError}[failing]("no space left")

    monkeypatch.setattr({"save": CompiledModel, "perplexity": evaluation}[failing], failing, fail)
    options = ["--method", "rtn", "--group-size", "16", "--tokens", "100", "--save-compiled"]
    assert run(["quantize", str(tiny), "-o", str(tmp_path / "out"), *options]) == 2
    printed, errors = capsys.readouterr()
    assert f"tiny → {tmp_path / 'out'}\n" in printed and "\nsize " in printed
    assert ("perplexity " in printed) == (failing == "save")
    complete = f"{tmp_path / 'out'} is complete, but without compiled: " if failing == "save" else ""
    assert errors == f"error: {complete}no space left\n"
    assert run(["generate", str(tmp_path / "out"), "-p", "x", "--max-new-tokens", "2"]) == 0


def test_the_report_of_what_quantize_wrote(out: Path, quantized: tuple[Path, str]) -> None:
    assert run(["report", str(out)]) == 0
    page = out.with_name("copy.html").read_text(encoding="utf-8")
    for value in re.findall(r"(\d+\.\d\d) (?:float|quantized)", quantized[1]):
        assert value in page
    assert "teq-graph" in page and "tune" in page


def test_an_encoder_is_quantized_without_perplexity(
    bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    assert run(["quantize", str(bert), "-o", str(tmp_path / "out"), "--method", "rtn", "--group-size", "16"]) == 0
    assert "not measured: it needs a causal language model" in capsys.readouterr().out
    assert "it is not a causal language model" in refused("generate", tmp_path / "out", "-p", "x")
    before_the_work = "BertModel, and only a language model writes text to calibrate on"
    only_rtn = "; on the command line, accepted for it: --method rtn"
    refusal = refused("quantize", bert, "-o", tmp_path / "other")
    assert before_the_work in refusal and refusal.endswith(only_rtn)
    text = tmp_path / "text.txt"
    text.write_text("some text", encoding="utf-8")
    refusal = refused("quantize", bert, "-o", tmp_path / "other", "--calibration", text)
    assert "has no tokenizer to read --calibration with" in refusal and refusal.endswith(only_rtn)
    assert "BertModel: accepted are causal language models" in refused("evaluate", bert)


def test_calibration_file_on_a_trained_model(
    data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, text = data_dir / "models" / "stories260K", data_dir / "tinystories" / "sample.txt"
    source, held_out = tmp_path / "calibration.txt", tmp_path / "held-out.txt"
    story = text.read_text(encoding="utf-8")
    source.write_text(story[: len(story) // 2], encoding="utf-8")
    held_out.write_text(story[len(story) // 2 :], encoding="utf-8")
    texts = ["--calibration", str(source), "--text", str(held_out)]
    options = ["--group-size", "32", "--bits", "4", "--steps", "4", "--length", "64"]
    assert run(["quantize", str(model), "-o", str(tmp_path / "out"), *texts, *options]) == 0
    printed = capsys.readouterr().out
    assert f"text of {source}" in printed
    assert "tokens of held-out.txt, not calibrated on; context 512" in printed
    line = next(s for s in printed.splitlines() if s.startswith("perplexity"))
    assert re.fullmatch(r"perplexity +\S+ float → \S+ quantized → \S+ in onnxruntime at accuracy level 4", line)
    before, quantized, after = map(float, re.findall(r"\d+\.\d+", line))
    assert 1 < before < 10  # it writes such stories
    assert before * 0.99 < quantized < before * 1.15
    assert quantized * 0.98 < after < quantized * 1.02  # activations of 8 bits
    assert run(["generate", str(tmp_path / "out"), "-p", "Once upon a time", "--max-new-tokens", "24"]) == 0
    assert "there was a little" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------- generate


def test_generate_streams_what_the_runtime_generates(
    quantized: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    from teq_graph.onnx.runtime import OnnxDecoder

    directory, _ = quantized
    sampling = dict(temperature=1.5, top_k=200, top_p=0.9, seed=int(torch.randint(1000, ())))
    options = [str(part) for name, value in sampling.items() for part in (f"--{name.replace('_', '-')}", value)]
    arguments = ["generate", str(directory), "--prompt", "Hello", "--max-new-tokens", "20", "--threads", "1", *options]
    assert run(arguments) == 0
    printed, errors = capsys.readouterr()
    expected = OnnxDecoder.load(directory, threads=1).generate("Hello", max_new_tokens=20, **sampling)
    assert printed == expected + "\n"
    assert re.fullmatch(r"\d+ tokens, [\d.]+ tokens/s; prompt of 5 tokens in \d+\.\d\d s\n", errors)


def test_the_chat_template_is_used_where_there_is_one(
    out: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str]
) -> None:
    arguments = ["generate", str(out), "-p", "Hi", "--max-new-tokens", "2"]
    assert run(arguments) == 0
    assert "prompt of 2 tokens" in capsys.readouterr().err
    assert "no chat template" in refused(*arguments, "--chat")
    (out / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    for options, rendered in ((["--chat"], "<user>Hi<bot>"), ([], "<user>Hi<bot>"), (["--raw"], "Hi")):
        assert run([*arguments, *options]) == 0
        assert f"prompt of {len(rendered)} tokens" in capsys.readouterr().err


def test_without_a_prompt_each_line_is_one(
    out: Path, capsys: pytest.CaptureFixture[str], refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from teq_graph.onnx.runtime import OnnxDecoder

    (out / "chat_template.jinja").write_text(CHAT, encoding="utf-8")
    decoder = OnnxDecoder.load(out, threads=1)
    arguments = ["generate", str(out), "--max-new-tokens", "3", "--threads", "1"]

    def replies(text: str, *options: str) -> list[str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        assert run([*arguments, *options]) == 0
        return capsys.readouterr().out.split("\n")[:-1]

    assert replies("Hi\n\n  \nHo\n", "--raw") == [decoder.generate(text, 3) for text in ("Hi", "Ho")]
    start = {"role": "system", "content": "S"}
    messages = [start]
    expected = []
    for text in ("Hi", "Ho"):
        messages.append({"role": "user", "content": text})
        expected.append("".join(decoder.stream(decoder.encode_chat(messages), 3, text=True)))
        messages.append({"role": "assistant", "content": expected[-1]})
    assert replies("Hi\nHo", "--system", "S") == expected
    assert replies("") == []
    # The oldest messages make room: the context is of 64 tokens, one for each byte.
    long = "x" * 40
    assert replies(f"{long}\n{long}\n")[1] == replies(f"{long}\n")[0]
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\n"), encoding="utf-8"))
    assert "standard input: invalid start byte; accepted is text in utf-8" in refused(*arguments)
    assert "system='S'" in refused(*arguments, "--raw", "--system", "S")


def test_stop_strings_end_a_reply(quantized: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["generate", str(quantized[0]), "-p", "Hello", "--max-new-tokens", "20", "--raw"]
    assert run(arguments) == 0
    free = capsys.readouterr().out
    stop = free[6:9]
    assert run([*arguments, "--stop", "never there", "--stop", stop]) == 0
    assert capsys.readouterr().out == free[: free.index(stop)] + "\n"


# ------------------------------------------------------------------------------------------------------ bad input

MISSING = "no/such/model"  # the options are looked at before the model, or its error would be reported


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--bits", "5"], "bits=5: accepted are (2, 3, 4, 8)"),
        (["--bits", "many"], "'--bits'"),
        (["--bits", "2", "--levels", "3"], "levels=3: accepted with bits=2 and symmetric=True"),
        (["--bits", "2", "--symmetric", "--levels", "5"], "levels=5: accepted are None, 3 (ternary) and 2 (binary)"),
        (["--group-size", "100"], "group_size=100: accepted are (16, 32"),
        (["--steps", "-1"], "steps=-1: accepted are integers from 0 to"),
        (["--batch-size", "0"], "--batch-size 0: accepted are 1 to"),
        (["--objective", "layer"], "objective='layer': accepted are block, model"),
        (["--init", "zeros"], "init='zeros': accepted are"),
        (["--method", "teq+x"], "--method teq+x: accepted are rtn, and any of teq, clip, gptq"),
        (["--method", "rtn", "--batch-size", "2"], "--batch-size: no effect with --method rtn"),
        (["--for-cuda", "--bits", "3"], "bits=3: accepted are (2, 4, 8), of which onnxruntime has fused CUDA kernels"),
        (["--for-cuda", "--group-size", "128"], "group_size=128: accepted for CUDA is 32"),
        (["--for-cuda", "--dtype", "bfloat16"], "--dtype bfloat16: accepted are float16"),
        (["--device", "gpu"], "device='gpu': Expected one of cpu, cuda"),
        (["--dtype", "float64"], "--dtype float64: accepted are float32, float16, bfloat16"),
        (["--accuracy-level", "5"], "--accuracy-level 5: accepted are 0, 1, 2, 3, 4"),
        (["--override", "bits=4"], "--override 'bits=4': accepted is PATTERN:"),
        (["--override", "*:bits"], "--override '*:bits': accepted is PATTERN:"),
        (["--override", "*:bits=5"], "bits=5: accepted are"),
        (["--override", "*:size=32"], "overrides={'*': {'size': 32}}: accepted is a mapping of patterns"),
        (["--seed", "-1"], f"--seed -1: accepted are 0 to {2**63 - 1}"),
        (["--seed", str(2**63)], f"--seed {2**63}: accepted are 0 to {2**63 - 1}"),
        (["--samples", str(2**31)], f"--samples {2**31}: accepted are 1 to {2**31 - 1}"),
        (["--length", "0"], f"--length 0: accepted are 1 to {2**31 - 1}"),
        (["--tokens", "1"], f"--tokens 1: accepted are 2 to {2**31 - 1}"),
        (["--tokens", "-5"], f"--tokens -5: accepted are 2 to {2**31 - 1}"),
        (["--no-evaluate", "--text", "nothing.txt"], "--text: no effect with --no-evaluate"),
        (["--no-evaluate", "--tokens", "100"], "--tokens: no effect with --no-evaluate"),
        (["--calibration", "nothing.txt"], "--calibration 'nothing.txt': no such file"),
        (["--text", "nothing.txt"], "--text 'nothing.txt': No such file or directory"),
        (["--unknown"], "No such option: --unknown"),
        ([], "model 'no/such/model': no such file or directory"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options(options: list[str], named: str, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert named in refused("quantize", MISSING, "-o", tmp_path / "out", *options)
    assert not any(tmp_path.iterdir())


def test_bad_usage(refused: Callable[..., str]) -> None:
    assert "'MODEL'" in refused("quantize")
    assert "'--output'" in refused("quantize", MISSING)
    assert "No such command 'export'" in refused("export")


def test_bad_texts(tmp_path: Path, tiny: Path, refused: Callable[..., str]) -> None:
    empty, binary, short = tmp_path / "empty.txt", tmp_path / "binary.txt", tmp_path / "short.txt"
    empty.write_text(" \n", encoding="utf-8")
    binary.write_bytes(b"\xff\xfe\x00")
    short.write_text("x", encoding="utf-8")
    command = ("quantize", MISSING, "-o", tmp_path / "out")
    for option in ("--text", "--calibration"):
        assert f"{option} {str(empty)!r}: it is empty" in refused(*command, option, empty)
        assert "codec can't decode" in refused(*command, option, binary)
    assert "it is a directory" in refused(*command, "--text", tmp_path)
    with (tmp_path / "huge.txt").open("wb") as huge:
        huge.truncate(2**43)  # takes no space
    assert "accepted" in refused(*command, "--text", huge.name)
    assert "it is the calibration file" in refused(*command, "--text", short, "--calibration", short)
    assert "it gives 1 tokens; accepted are two or more" in refused("evaluate", tiny, "--text", short)
    assert "it gives 1 tokens; accepted" in refused("quantize", tiny, "-o", tmp_path / "out", "--text", short)
    assert not (tmp_path / "out").exists()


def test_bad_output_directories(tmp_path: Path, refused: Callable[..., str]) -> None:
    file, full = tmp_path / "file", tmp_path / "full"
    file.touch()
    full.mkdir()
    (full / "precious").touch()
    command = ("quantize", MISSING, "-o")
    assert f"{file} is a file" in refused(*command, file)
    assert f"{full} exists: accepted is a new directory, or --overwrite" in refused(*command, full)
    assert f"{full} holds other files" in refused(*command, full, "--overwrite")
    assert f"{file / 'out'} cannot be written: Not a directory" in refused(*command, file / "out")
    # what the missing folder and the link lead to is there once the folder is made
    assert "file is a file" in refused(*command, tmp_path / "nope" / ".." / "file", "--overwrite")
    assert "full holds other files" in refused(*command, tmp_path / "nope" / ".." / "full", "--overwrite")
    broken = tmp_path / "broken"
    broken.symlink_to(tmp_path / "nothing")
    for link in (broken, tmp_path / "nope" / ".." / "broken"):
        assert "broken is a link to nothing" in refused(*command, link)
    broken.unlink()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "full", "precious"]
    assert "File name too long" in refused(*command, tmp_path / ("x" * 300))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_that_cannot_be_written(tmp_path: Path, refused: Callable[..., str]) -> None:
    tmp_path.chmod(0o500)
    try:
        assert "cannot be written: Permission denied" in refused("quantize", MISSING, "-o", tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_bad_models(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").touch()
    assert "it has no config.json" in refused("inspect", tmp_path / "empty")
    assert "accepted files are .gguf" in refused("inspect", tmp_path / "file.bin")
    assert "it does not exist" in refused("evaluate", tmp_path / "no.gguf")
    written = "accepted is a directory that export_onnx or teq-graph quantize wrote"
    assert f"teq_graph.json is missing: {written}" in refused("generate", tmp_path / "empty", "-p", "x")
    assert f"is no directory: {written}" in refused("generate", tmp_path / "nothing", "-p", "x")


def test_damaged_output(out: Path, refused: Callable[..., str]) -> None:
    model, metadata = out / "model.onnx", out / "teq_graph.json"
    model.write_bytes(model.read_bytes()[:1000])
    for command in (["generate", out, "-p", "x"], ["evaluate", out]):
        assert "model.onnx is not what was written: 1,000 bytes" in refused(*command)
        assert "model.onnx cannot be loaded" in refused(*command, "--no-verify")
    model.unlink()
    assert "model.onnx is missing" in refused("evaluate", out)
    metadata.write_text("{", encoding="utf-8")
    assert "teq_graph.json cannot be read" in refused("generate", out, "-p", "x")


def test_bad_generation(quantized: tuple[Path, str], refused: Callable[..., str]) -> None:
    command = ("generate", quantized[0], "-p")
    assert f"prompt of {POSITIONS + 1} tokens: accepted are up to the model's context of {POSITIONS}" in refused(
        *command, "x" * (POSITIONS + 1)
    )
    assert "at least one token" in refused(*command, "")
    assert "temperature=-1.0" in refused(*command, "x", "--temperature", "-1")
    assert "top_k=-1" in refused(*command, "x", "--top-k", "-1")
    assert "top_p=0.0" in refused(*command, "x", "--top-p", "0")
    assert "max_new_tokens=-1" in refused(*command, "x", "--max-new-tokens", "-1")
    assert "threads=0" in refused(*command, "x", "--threads", "0")
    assert "threads=99999999999: accepted are None and integers from 1 to" in refused(
        *command, "x", "--threads", "99999999999"
    )
    assert "--seed -1: accepted are 0 to" in refused(*command, "x", "--temperature", "1", "--seed", "-1")
    # as a terminal gives bytes that are no UTF-8
    assert r"character 1 is '\udcff'; accepted is Unicode text" in refused(*command, "x\udcff")
    assert "provider 'NoneExecutionProvider'" in refused(*command, "x", "--provider", "NoneExecutionProvider")


def test_bad_evaluation(quantized: tuple[Path, str], refused: Callable[..., str]) -> None:
    command = ("evaluate", quantized[0])
    assert f"--context {POSITIONS + 1}: accepted are up to the model's" in refused(*command, "--context", POSITIONS + 1)
    assert "context=1, stride=1, batch_size=1: accepted are" in refused(*command, "--context", "1")
    assert "stride=65, batch_size=1: accepted are" in refused(*command, "--stride", "65")
    # before anything is loaded
    for few in ("1", "0", "-5"):
        assert f"--tokens {few}: accepted are 2 to" in refused("evaluate", MISSING, "--tokens", few)


def test_options_that_pytorch_does_not_have(tiny: Path, refused: Callable[..., str]) -> None:
    for option, value in (("--threads", "1"), ("--provider", "cpu")):
        assert f"{option}: no effect in PyTorch" in refused("evaluate", tiny, option, value)


def test_a_bug_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("teq_graph.loading.load_model", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(["inspect", "anything"])


# -------------------------------------------------------------------------------------------------------- estimates


def test_a_dry_run_says_what_it_will_take_and_writes_nothing(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["quantize", str(tiny), "-o", str(tmp_path / "out"), "--dry-run", *QUICK]
    assert run(command) == 0
    printed = capsys.readouterr().out
    assert re.search(r"size +\S+ MB → about \S+ MB, [\d.]+ times smaller", printed)
    assert re.search(r"time +about \d+ s\n", printed) and re.search(r"memory +about [\d,.]+ MB", printed)
    assert run([*command[: -len(QUICK)], "--method", "rtn"]) == 0
    printed = capsys.readouterr().out
    assert "size" in printed and "\ntime" not in printed  # nothing is trained: the size is all there is to tell
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_the_estimated_size_is_the_size(bits: int, tied: bool) -> None:
    model = BY_NAME["Llama (GQA)"].build()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    estimates: list[Estimate] = []
    compiled = teq_graph.compile(
        model,
        quantization=teq_graph.QuantizationConfig(bits=bits, group_size=16, quantize_lm_head=True),
        training=teq_graph.TrainingConfig(stages=("clip",), samples=4, length=12),
        on_estimate=estimates.append,
    )
    first, second = estimates
    assert first.seconds is None and second.seconds is not None and second.peak_bytes
    assert {e.bytes_before for e in estimates} == {compiled.report.bytes_before}
    assert {e.bytes_after for e in estimates} == {compiled.report.bytes_after}


@pytest.mark.parametrize(
    ("training", "added", "is_without"),
    [
        (teq_graph.TrainingConfig(steps=80), 0.1, False),
        (teq_graph.TrainingConfig(steps=50, distill_steps=100), 2.0, False),
        (teq_graph.TrainingConfig(stages=("tune",)), 0.0, False),
        (teq_graph.TrainingConfig(stages=("clip", "distill")), 0.0, True),
    ],
)
def test_the_estimated_time_counts_distillation(
    training: teq_graph.TrainingConfig, added: float, is_without: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three blocks of ten seconds each, and of all their steps together as many again as train the whole model."""
    analysis = analyze(BY_NAME["Llama (GQA)"].build(), quantization=teq_graph.QuantizationConfig(bits=3, group_size=16))
    monkeypatch.setattr(time, "monotonic", lambda: 112.0)
    told: list[Estimate] = []
    estimator = Estimator(analysis.captured, analysis.weights, 1, 100.0, told.append, training)
    estimator.after_first_block(FirstBlock(10.0, 1 / 3))
    (estimate,) = told
    assert estimate.without_distillation == is_without
    assert estimate.seconds == pytest.approx(12 + 20 + 30 * DISTILLED * added)
