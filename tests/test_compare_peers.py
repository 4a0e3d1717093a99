"""The comparison with other packages: its table, what it does with failures and earlier rows, and its measure."""

# ruff: noqa: E402  the tools are no package: their folders must be on the path first
from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import teq_graph
from teq_graph.evaluation import divergence, perplexity
from teq_graph.loading import LoadedModel

TOOLS = Path(__file__).resolve().parents[1] / "tools"
sys.path += [str(TOOLS), str(TOOLS / "peers")]

import compare_peers
import evaluator
import job as job_module
import run_teq_graph
from peers import environments, process, table
from peers.methods import METHODS, Method

from teq_graph.errors import InputError

ROW = {
    "method": "rtn",
    "perplexity": 162.871,
    "kl_divergence": 0.92316,
    "top1_agreement": 0.4004,
    "seconds": 0.04,
    "peak_bytes": 512_400_000,
    "stored_bytes": 239_000,
    "notes": ["one | two", "three"],
}
SETTINGS = {
    "model": "some/model",
    "test": "test.txt",
    "calibration": "valid.txt",
    "bits": 3,
    "group_size": 32,
    "iters": 5,
    "batch_size": 2,
    "seed": 0,
    "context": 64,
    "tokens": 128,
    "calibration_shape": [4, 32],
    "digest": "0",
    "is_encoder": False,
}
COLUMNS = table.columns_of(SETTINGS)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    test, calibration = tmp_path / "test.txt", tmp_path / "valid.txt"
    test.write_text("Once upon a time there was a little dog. " * 20, encoding="utf-8")
    calibration.write_text("Lily went to the park and saw a big tree. " * 20, encoding="utf-8")
    return test, calibration


def command(model: object, files: tuple[Path, Path], output: Path, *more: object) -> list[str]:
    size = ["--bits", 3, "--group-size", 32, "--tokens", 128, "--context", 64]
    training = ["--samples", 4, "--length", 32, "--batch-size", 2, "--iters", 2]
    fixed = [model, "--test", files[0], "--calibration", files[1], "--output", output, *size, *training]
    return [str(part) for part in (*fixed, *more)]


# ---------------------------------------------------------------------------------------------------------- table


def test_row_of_figures() -> None:
    expected = r"| round to nearest | 162.87 | 0.9232 | 40.0% | 0.0 | 512 | 0.24 | one \| two; three |"
    assert table.line(ROW, COLUMNS) == expected


def test_row_of_a_failure_has_its_error_and_as_many_cells() -> None:
    line = table.line({"method": "hqq", "error": "ValueError: no 3 bits", "notes": ["unread"]}, COLUMNS)
    assert "error: ValueError: no 3 bits" in line
    assert "unread" not in line
    whole = table.line({**ROW, "notes": []}, COLUMNS)
    assert line.count("|") == whole.count("|") == table.table([], COLUMNS).splitlines()[0].count("|")


def test_large_perplexity_is_short() -> None:
    assert "| 6.2e+09 |" in table.line({**ROW, "perplexity": 6.15e9}, COLUMNS)


def test_document_says_what_was_measured() -> None:
    text = table.document(SETTINGS, [ROW])
    assert text.count("\n| ") == 2
    for part in ("`some/model`", "W3g32", "128 tokens of `test.txt`", "windows of 64", "4 × 32 tokens of `valid.txt`"):
        assert part in text


def test_plot_is_left_out_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert not table.plot([ROW], tmp_path / "plot.png", SETTINGS)
    assert not (tmp_path / "plot.png").exists()


def test_plot(tmp_path: Path) -> None:
    float_row = {key: value for key, value in ROW.items() if key != "seconds"}
    rows = [float_row, ROW, {**ROW, "perplexity": 1e9}, {"method": "hqq", "error": "no"}]
    assert table.plot(rows, tmp_path / "plot.png", SETTINGS)
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_every_method_has_its_runner_and_requirements() -> None:
    for method in METHODS.values():
        assert not method.runner or (TOOLS / "peers" / method.runner).is_file()
        if method.environment:
            pins = (environments.REQUIREMENTS / f"{method.environment}.txt").read_text(encoding="utf-8").splitlines()
            assert "torch==2.13.0" in pins
            assert all("==" in pin for pin in pins)


# ------------------------------------------------------------------------------------------------------- failures


@pytest.fixture
def runner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Measures a method whose runner is the given script."""

    def measure(script: str, timeout: float = 60.0) -> dict[str, Any]:
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        method = Method("a peer", str(tmp_path / "script.py"), note="always", ragged="where ragged")
        monkeypatch.setitem(METHODS, "peer", method)
        return process.measure_method(
            "peer", {"seed": 0}, venvs=tmp_path, logs=tmp_path / "logs", timeout=timeout, ragged=True
        )

    return measure


RESULT = "import json, sys, pathlib; result = pathlib.Path(sys.argv[1]).with_name('result.json')\n"


def test_result_of_a_runner(runner: Callable[..., dict[str, Any]]) -> None:
    row = runner(RESULT + "result.write_text(json.dumps({'perplexity': 2.0, 'notes': ['own']}))")
    assert row == {"method": "peer", "perplexity": 2.0, "notes": ["always", "where ragged", "own"]}


@pytest.mark.parametrize(
    ("script", "error"),
    [
        (RESULT + "result.write_text(json.dumps({'error': 'ValueError: no'}))", "ValueError: no"),
        ("import a_package_that_is_absent", "ModuleNotFoundError: No module named 'a_package_that_is_absent'"),
        ("import sys; sys.exit(3)", "exit code 3"),
        ("import os; os.kill(os.getpid(), 9)", "signal SIGKILL"),
    ],
)
def test_failure_is_one_line(runner: Callable[..., dict[str, Any]], script: str, error: str) -> None:
    assert runner(script)["error"] == error


def test_timeout_ends_the_runner_and_what_it_started(runner: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    touched = tmp_path / "touched"
    child = f"import time, pathlib; time.sleep(2); pathlib.Path({str(touched)!r}).touch()"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    assert runner(script, timeout=1.0)["error"] == "it took longer than --timeout"
    time.sleep(2)
    assert not touched.exists()


def test_environment_that_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environments, "REQUIREMENTS", tmp_path)
    (tmp_path / "broken.txt").write_text("no such requirement at all\n", encoding="utf-8")
    monkeypatch.setattr(environments.sys, "executable", "/bin/false")
    with pytest.raises(environments.BuildError, match="environment broken: exit code 1"):
        environments.python_of("broken", tmp_path / "venvs")


def test_finished_environment_is_used_again(tmp_path: Path) -> None:
    folder = tmp_path / "hqq"
    folder.mkdir()
    (folder / "requirements.txt").write_bytes((environments.REQUIREMENTS / "hqq.txt").read_bytes())
    assert environments.python_of("hqq", tmp_path) == folder / "bin" / "python"


def test_error_of_a_runner_reaches_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(job: object) -> None:
        raise ValueError("two\nlines")

    monkeypatch.setattr(job_module, "Job", lambda path: argparse.Namespace(seed=0, result={}, folder=path.parent))
    monkeypatch.setattr(sys, "argv", ["runner", str(tmp_path / "job.json")])
    job_module.run(fail)
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8")) == {"error": "ValueError: two lines"}


# --------------------------------------------------------------------------------------------------------- resume


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Methods in the order in which they were measured, by a stand-in."""
    names: list[str] = []

    def measure(name: str, fields: object, **options: object) -> dict[str, Any]:
        names.append(name)
        return {**ROW, "method": name, **({"error": "no"} if name == "hqq" else {})}

    monkeypatch.setattr(compare_peers, "measure_method", measure)
    return names


def test_resume_keeps_good_rows_of_the_same_settings(
    data_dir: Path, files: tuple[Path, Path], tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    start = command(data_dir / "models" / "stories260K", files, tmp_path / "out")
    compare_peers.main([*start, "--methods", "rtn", "float", "hqq"])
    assert measured == ["rtn", "float", "hqq"]
    written = json.loads((tmp_path / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [row["method"] for row in written["rows"]] == ["float", "rtn", "hqq"]

    compare_peers.main([*start, "--resume", "--methods", "rtn", "hqq", "ours-fast"])
    assert measured[3:] == ["hqq", "ours-fast"]
    text = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
    labels = [METHODS[name].label for name in ("float", "rtn", "hqq", "ours-fast")]
    assert [line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")][1:] == labels

    with pytest.raises(SystemExit) as caught:
        compare_peers.main([*start, "--resume", "--seed", "1"])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert "its rows are of other settings (seed" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("text", ["no json", "[]", '{"settings": {}, "rows": [{}]}'])
def test_resume_from_another_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "compare.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="not written by this tool"):
        compare_peers.kept_rows(path, SETTINGS)


# ------------------------------------------------------------------------------------------------------ arguments


@pytest.mark.parametrize(
    ("more", "part"),
    [
        (["--bits", "5"], "--bits"),
        (["--group-size", "-1"], "--group-size"),
        (["--group-size", "48"], "--group-size"),
        (["--tokens", "1"], "integers >= 2"),
        (["--iters", "many"], "integers >= 1"),
        (["--methods", "rtn", "nothing"], "'nothing'"),
        (["--test", "absent.txt"], "absent.txt is no file"),
        (["--unknown"], "--unknown"),
    ],
)
def test_bad_argument_is_one_line(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], part: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_peers.main(command("model", files, tmp_path / "out", *more))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert part in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_model_that_is_absent(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_peers.main(command(tmp_path / "no_model.gguf", files, tmp_path / "out"))
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not measured


def test_context_beyond_the_positions(
    data_dir: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], measured: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        compare_peers.main(command(data_dir / "models" / "stories260K", files, tmp_path / "out", "--context", 513))
    assert caught.value.code == 2
    assert "has 512 positions" in capsys.readouterr().err
    assert not measured


# -------------------------------------------------------------------------------------------------------- measure


@pytest.fixture
def rtn_job(stories260k: LoadedModel, wikitext: str, tmp_path: Path) -> job_module.Job:
    """A job of stories260K in 3 bits, whose rows of 172 are no whole number of groups of 32."""
    stories260k.model.float().save_pretrained(tmp_path / "model")
    (tmp_path / "test.json").write_text(json.dumps(stories260k.tokenizer(wikitext[:3000])["input_ids"][:300]))
    np.save(tmp_path / "calibration.npy", np.zeros((2, 8), dtype=np.int64))
    fields = dict(model=str(tmp_path / "model"), test=str(tmp_path / "test.json"), context=128, bits=3, group_size=32)
    paths = dict(calibration=str(tmp_path / "calibration.npy"), iters=1, batch_size=2, seed=0, is_encoder=False)
    path = tmp_path / "job.json"
    path.write_text(json.dumps({**fields, **paths, "options": {"training": "rtn"}}), encoding="utf-8")
    return job_module.Job(path)


def test_evaluator_agrees_with_the_compiled_graph(rtn_job: job_module.Job, monkeypatch: pytest.MonkeyPatch) -> None:
    run_teq_graph.runner(rtn_job)
    (rtn_job.folder / "result.json").write_text(json.dumps(rtn_job.result), encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["evaluator.py", str(rtn_job.folder / "job.json")])
    evaluator.main()
    result = json.loads((rtn_job.folder / "result.json").read_text(encoding="utf-8"))

    model = rtn_job.load_model()
    config = teq_graph.QuantizationConfig(bits=3, group_size=32)
    compiled = teq_graph.compile(model, quantization=config, training=None)
    tokens = rtn_job.load_test()

    def ours(ids: torch.Tensor) -> torch.Tensor:
        return compiled(input_ids=ids).logits

    value = perplexity(ours, tokens, context=128).value
    apart = divergence(lambda ids: model(input_ids=ids).logits, ours, tokens, context=128)
    assert result["perplexity"] == pytest.approx(value, rel=1e-5)
    assert result["kl_divergence"] == pytest.approx(apart.kl_divergence, rel=1e-4)
    assert result["top1_agreement"] == pytest.approx(apart.top1_agreement, abs=0.01)
    assert result["seconds"] > 0
    assert result["peak_bytes"] > 1e8
    assert "notes" not in result


def test_bytes_are_those_of_the_formula(rtn_job: job_module.Job) -> None:
    model = rtn_job.load_model()
    linears = evaluator.block_linears(model)
    assert len(linears) == 35
    floats = sum(parameter.numel() for parameter in model.parameters())
    expected = 4 * floats
    for linear in linears.values():
        n, k = linear.weight.shape
        expected += n * k * 3 / 8 + n * np.ceil(k / 32) * (2 + 3 / 8) - 4 * n * k
    assert evaluator.stored_bytes(model, 3, 32, zero_point_bits=3) == pytest.approx(expected, abs=len(linears))
    everything = evaluator.stored_bytes(model, 3, 32, zero_point_bits=3, in_float=list(linears), extra_bytes=7)
    assert everything == 4 * floats + 7


def test_linears_left_in_float_are_found(rtn_job: job_module.Job) -> None:
    model, changed = rtn_job.load_model(), rtn_job.load_model()
    kept = "model.layers.0.mlp.up_proj"
    weights = {
        f"{name}.weight": linear.weight * 1.01
        for name, linear in evaluator.block_linears(model).items()
        if name != kept
    }
    rtn_job.finish(weights)
    evaluator.load_weights(changed, rtn_job.folder / "weights.safetensors")
    assert evaluator.unchanged_linears(model, changed) == [kept]


def test_tensor_of_a_tied_weight_becomes_its_own(rtn_job: job_module.Job) -> None:
    model = rtn_job.load_model()
    embedding = model.get_input_embeddings().weight
    assert model.lm_head.weight is embedding
    before = embedding.clone()
    rtn_job.finish({"lm_head.weight": torch.zeros_like(embedding)})
    evaluator.load_weights(model, rtn_job.folder / "weights.safetensors")
    assert torch.equal(embedding, before)
    assert not model.lm_head.weight.any()


def test_embeddings_are_compared_by_angle_and_by_neighbours() -> None:
    expected = torch.nn.functional.normalize(torch.randn(5, 8, dtype=torch.float64), dim=-1)
    same = evaluator.compare_embeddings(expected, expected)
    assert same["cosine_distance"] == pytest.approx(0.0, abs=1e-12)
    assert same["neighbour_agreement"] == 1.0
    angle = torch.tensor(0.3, dtype=torch.float64)
    rotation = torch.eye(8, dtype=torch.float64)
    rotation[:2, :2] = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()]).view(2, 2)
    plane = torch.nn.functional.normalize(torch.randn(5, 2, dtype=torch.float64), dim=-1)
    flat = torch.nn.functional.pad(plane, (0, 6))
    turned = evaluator.compare_embeddings(flat, flat @ rotation.T)
    assert turned["cosine_distance"] == pytest.approx(1 - float(angle.cos()))
    assert turned["largest_distance"] == pytest.approx(1 - float(angle.cos()))
    assert turned["neighbour_agreement"] == 1.0
    # 0 and 1 are nearest to each other, and so are 2 and 3, until 1 and 2 change places.
    pairs = torch.eye(4, dtype=torch.float64)[:2].repeat_interleave(2, 0) + 0.1 * torch.randn(4, 4, dtype=torch.float64)
    pairs = torch.nn.functional.normalize(pairs, dim=-1)
    assert evaluator.compare_embeddings(pairs, pairs[[0, 2, 1, 3]])["neighbour_agreement"] == 0.0


def test_encoder_is_measured_by_sentences(
    minilm: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_dir: Path
) -> None:
    minilm.model.save_pretrained(tmp_path / "model")
    assert minilm.tokenizer is not None
    minilm.tokenizer.save_pretrained(tmp_path / "model")
    folder = tmp_path / "job"
    folder.mkdir()
    text = data_dir / "wikitext-2" / "test.raw.txt"
    fixed = ["--test", text, "--calibration", text, "--output", tmp_path / "out", "--bits", 8, "--tokens", 300]
    size = ["--samples", 2, "--length", 16, "--batch-size", 2, "--group-size", 64]
    arguments = [str(part) for part in (tmp_path / "model", *fixed, *size)]
    fields, settings, ragged = compare_peers.prepare(compare_peers.parse_arguments(arguments), folder)
    assert fields["is_encoder"] and settings["is_encoder"] and not ragged
    assert settings["tokens"] >= 300
    sentences = json.loads(Path(fields["test"]).read_text(encoding="utf-8"))
    first = minilm.tokenizer.decode(sentences[0], skip_special_tokens=True)
    assert first.startswith("robert boulter is an english film") and first.endswith(".")

    for training in ({"training": "rtn"}, {"training": "stages", "stages": ["clip"]}):
        path = folder / "job.json"
        path.write_text(json.dumps({**fields, "options": training}), encoding="utf-8")
        task = job_module.Job(path)
        run_teq_graph.runner(task)
        if training["training"] == "rtn":
            (folder / "result.json").write_text(json.dumps(task.result), encoding="utf-8")
            monkeypatch.setattr(sys, "argv", ["evaluator.py", str(path)])
            evaluator.main()
            result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        else:
            result = task.result
        assert 0 < result["cosine_distance"] < 1e-3
        assert result["cosine_distance"] <= result["largest_distance"] < 1e-2
        assert result["neighbour_agreement"] > 0.8
        line = table.line({"method": "rtn", **result}, table.columns_of(settings))
        assert f"| {result['cosine_distance']:.6f} |" in line
