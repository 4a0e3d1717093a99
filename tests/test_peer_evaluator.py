"""The common measure of the comparison with other packages: what it gives, and of what it is taken."""

# ruff: noqa: E402  the tools are no package: their folders must be on the path first
from __future__ import annotations

import json
import sys
from pathlib import Path

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
from peers import table


@pytest.fixture
def rtn_job(stories260k: LoadedModel, wikitext: str, tmp_path: Path) -> job_module.Job:
    """A job of stories260K in 3 bits, whose rows of 172 are no whole number of groups of 32."""
    stories260k.model.float().save_pretrained(tmp_path / "model")
    (tmp_path / "test.json").write_text(json.dumps(stories260k.tokenizer(wikitext[:3000])["input_ids"][:300]))
    np.save(tmp_path / "calibration.npy", np.zeros((2, 8), dtype=np.int64))
    fields = dict(model=str(tmp_path / "model"), test=str(tmp_path / "test.json"), context=128, bits=3, group_size=32)
    more = dict(calibration=str(tmp_path / "calibration.npy"), iters=1, batch_size=2, seed=0, device="cpu")
    path = tmp_path / "job.json"
    text = json.dumps({**fields, **more, "is_encoder": False, "options": {"training": "rtn"}})
    path.write_text(text, encoding="utf-8")
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
