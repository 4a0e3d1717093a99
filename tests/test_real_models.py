"""Real, trained models from compile to onnxruntime."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.onnx import genai_tokens
from torch.nn import functional

import teq_graph
from teq_graph.evaluation import perplexity
from teq_graph.loading import LoadedModel
from teq_graph.onnx.runtime import OnnxDecoder, OnnxModel

SENTENCES = [
    "The cat sits on the windowsill and watches the birds.",
    "A kitten looks at sparrows through the glass.",
    "Interest rates rose by half a percentage point in March.",
    "The central bank made borrowing more expensive this spring.",
    "She tuned the violin before the concert began.",
    "The orchestra warmed up backstage.",
]


def test_trained_scales_beat_rounding_to_nearest(stories260k: LoadedModel, data_dir: Path) -> None:
    """A tiny trained Llama in 3 bits, calibrated on text that it writes itself."""
    text = (data_dir / "tinystories" / "sample.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(stories260k.tokenizer(text)["input_ids"])
    quantization = teq_graph.QuantizationConfig(bits=3, group_size=32)

    def perplexity_of(training: teq_graph.TrainingConfig | None) -> float:
        compiled = teq_graph.compile(
            stories260k.model, quantization=quantization, training=training, tokenizer=stories260k.tokenizer
        )
        assert all(block.after <= block.before for block in compiled.report.blocks)
        return perplexity(lambda ids: compiled(input_ids=ids).logits, tokens, context=256).value

    with torch.no_grad():
        reference = perplexity(lambda ids: stories260k.model(ids).logits, tokens, context=256).value
    nearest = perplexity_of(None)
    trained = perplexity_of(teq_graph.TrainingConfig(stages=("teq",), steps=40, samples=32, length=128))
    assert reference < trained < nearest
    # Over choices of initial scales, learning rate and samples, 22 to 38 % of what rounding loses came back.
    assert trained - reference < (nearest - reference) * 0.85


@pytest.mark.slow
def test_smollm2_from_weights_to_text(smollm2: LoadedModel, wikitext: str, tmp_path: Path) -> None:
    compiled = teq_graph.compile(
        smollm2.model,
        tokenizer=smollm2.tokenizer,
        quantization=teq_graph.QuantizationConfig(bits=4, group_size=32),
        training=teq_graph.TrainingConfig(stages=("teq",), steps=2, samples=8, length=64),
    )
    assert len(compiled.report.quantized) == compiled.report.covered == 210
    assert len(compiled.report.blocks) == 30

    tokens = torch.tensor(smollm2.tokenizer(wikitext[:8000])["input_ids"][:1024])
    with torch.no_grad():
        reference = perplexity(lambda ids: smollm2.model(ids).logits, tokens, context=512).value
    assert perplexity(lambda ids: compiled(input_ids=ids).logits, tokens, context=512).value < reference * 1.35

    directory = compiled.export_onnx(tmp_path / "out", accuracy_level=1)
    size = sum(file.stat().st_size for file in directory.iterdir())
    assert size < 0.4 * compiled.report.bytes_before
    decoder = OnnxDecoder.load(directory)
    ids = tokens[None, :64]
    expected = compiled(input_ids=ids).logits.numpy()
    np.testing.assert_allclose(decoder.logits(ids.numpy()), expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    chat = decoder.encode_chat("What is the capital of France?")
    reply = decoder.generate(chat, max_new_tokens=24)
    assert "Paris" in decoder.decode(reply)

    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokenizer = genai.Tokenizer(genai.Model(str(directory)))
    messages = json.dumps([{"role": "user", "content": "What is the capital of France?"}])
    rendered = tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
    assert tokenizer.encode(rendered).tolist() == chat
    for prompt in (chat, tokens[:100].tolist(), decoder.encode("Once upon a time")):
        assert genai_tokens(directory, prompt, 32) == decoder.generate(prompt, max_new_tokens=32)


@pytest.mark.slow
def test_minilm_embeddings_keep_their_neighbours(minilm: LoadedModel, tmp_path: Path) -> None:
    """BERT is post-LN: its norms feed the residual as well, so only v → o moves; the embeddings still hold."""

    def embed(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        weights = mask[..., None].float()
        return functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)

    inputs = dict(minilm.tokenizer(SENTENCES, padding=True, return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    compiled = teq_graph.compile(
        minilm.model,
        tokenizer=minilm.tokenizer,
        calibration=SENTENCES,
        quantization=teq_graph.QuantizationConfig(bits=4, group_size=32),
        training=teq_graph.TrainingConfig(steps=5, length=16),
    )
    kinds = {e.kind for e in compiled.equivalences}
    assert kinds == {"linear"}
    assert len(compiled.equivalences) == 6
    with torch.no_grad():
        reference = embed(minilm.model(**inputs).last_hidden_state, inputs["attention_mask"])
    hidden = compiled(**inputs).last_hidden_state
    quantized = embed(hidden, inputs["attention_mask"])
    assert (reference * quantized).sum(-1).min() > 0.97
    similar = quantized @ quantized.T - 2 * torch.eye(len(SENTENCES))
    assert similar.argmax(-1).tolist() == [1, 0, 3, 2, 5, 4]

    model = OnnxModel.load(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    result = model.run(**{name: value.numpy() for name, value in inputs.items()})["last_hidden_state"]
    np.testing.assert_allclose(result, hidden.numpy(), rtol=0, atol=1e-4 * float(hidden.abs().max()))
