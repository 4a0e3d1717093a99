"""Encoder-decoders: captured with their caches, cut in two for ONNX, and generating what transformers does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import VOCAB
from support.compiling import SMALL, TRAINING, in_one_line
from support.encoder_decoders import BINS, END, FRAMES, KINDS, PAD, START, bart, greedy, t5, whisper
from support.graphs import randomize, relative_error
from torch import Tensor, nn

import teq_graph
from teq_graph import QuantizationConfig
from teq_graph.calibration import calibration_batches
from teq_graph.capture import CapturedGraph, capture
from teq_graph.capture.cutting import cut
from teq_graph.compile import analyze
from teq_graph.errors import InputError, ModelFileError
from teq_graph.onnx.runtime import OnnxDecoder, OnnxEncoderDecoder, load

LENGTHS = (9, 5, 7)
NEW = 16


def sources(kind: str) -> tuple[dict[str, Tensor], Any]:
    """Random inputs of the encoder, texts padded on the right; as the model and as the runtime take them."""
    if kind == "Whisper":
        features = torch.randn(len(LENGTHS), BINS, FRAMES)
        return {"input_features": features}, features.numpy()
    rows = [torch.randint(4, VOCAB, (length,)) for length in LENGTHS]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    return {"input_ids": ids, "attention_mask": mask.long()}, [row.tolist() for row in rows]


def written(length: int = 6) -> Tensor:
    return torch.randint(4, VOCAB, (len(LENGTHS), length))


def in_steps(captured: CapturedGraph, inputs: dict[str, Tensor], tokens: Tensor, *lengths: int) -> Tensor:
    """Logits of `tokens`, which are given in parts of these lengths."""
    parts, past = [], None
    for part in tokens.split(list(lengths), 1):
        args, kwargs = captured.bind({**inputs, "decoder_input_ids": part, "past_key_values": past})
        logits, past, _ = captured.graph_module(*args, **kwargs)
        parts.append(logits)
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_the_model_with_a_cache_of_any_length(kind: str) -> None:
    model = KINDS[kind]()
    inputs, _ = sources(kind)
    tokens = written()
    captured = capture(model)
    with torch.no_grad():
        expected = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits
        assert relative_error(in_steps(captured, inputs, tokens, 6), expected) < 2e-6
        assert relative_error(in_steps(captured, inputs, tokens, 1, 1, 3, 1), expected) < 2e-6


@pytest.mark.parametrize("kind", KINDS)
def test_cut_in_two_the_graph_gives_the_same(kind: str) -> None:
    captured = analyze(KINDS[kind]()).captured
    encoder, decoder = cut(captured)
    inputs, _ = sources(kind)
    args, _ = captured.bind({**inputs, "decoder_input_ids": written()})
    with torch.no_grad():
        logits, present, encoded = captured.graph_module(*args)
        layers = encoder.graph_module(**args[0])["present"]
        for layer, (key, value) in zip(layers, encoded, strict=True):
            torch.testing.assert_close(layer["encoder"], {"key": key, "value": value}, rtol=0, atol=0)
        past = [
            {"decoder": {"key": key, "value": value}, **layer}
            for (key, value), layer in zip(args[2], layers, strict=True)
        ]
        mask = {} if kind == "Whisper" else {"encoder_attention_mask": inputs["attention_mask"]}
        result = decoder.graph_module(input_ids=args[1], past_key_values=past, **mask)
    assert list(decoder.example_kwargs) == ["input_ids", "past_key_values", *mask]
    torch.testing.assert_close(result["logits"], logits, rtol=0, atol=0)
    for layer, (key, value) in zip(result["present"], present, strict=True):
        torch.testing.assert_close(layer["decoder"], {"key": key, "value": value}, rtol=0, atol=0)
    # Neither reads what is the other's alone.
    names = [
        {str(node.target) for node in part.graph_module.graph.nodes if node.op == "get_attr"}
        for part in (encoder, decoder)
    ]
    whole = {str(node.target) for node in captured.graph_module.graph.nodes if node.op == "get_attr"}
    assert set.union(*names) == whole and len(set.intersection(*names)) < len(whole) / 4


@pytest.mark.parametrize("kind", KINDS)
def test_onnxruntime_writes_what_transformers_does(kind: str, tmp_path: Path) -> None:
    model = KINDS[kind]()
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(skip=("*",)), training=None)
    assert not compiled.report.notes
    runtime = load(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    assert isinstance(runtime, OnnxEncoderDecoder)
    for _ in range(3):
        inputs, source = sources(kind)
        expected = greedy(model, inputs, max_new_tokens=NEW)
        assert runtime.generate(source, max_new_tokens=NEW) == expected
        assert list(runtime.stream(source[1], max_new_tokens=NEW)) == expected[1]


@pytest.mark.parametrize("kind", KINDS)
def test_low_bits_are_the_same_in_onnxruntime_and_after_loading(kind: str, tmp_path: Path) -> None:
    compiled = teq_graph.compile(KINDS[kind](), quantization=SMALL, training=None)
    loaded = teq_graph.load(compiled.save(tmp_path / "saved"))
    assert loaded.captured.encoder_decoder == compiled.captured.encoder_decoder
    (inputs, source), tokens = sources(kind), written()
    expected = compiled(**inputs, decoder_input_ids=tokens)
    again = loaded(
        **inputs, decoder_input_ids=tokens[:, 3:], past_key_values=loaded(**inputs, decoder_input_ids=tokens[:, :3])[1]
    )
    assert relative_error(again.logits, expected.logits[:, 3:]) < 2e-6
    runtime = load(loaded.export_onnx(tmp_path / "out", accuracy_level=1))
    assert isinstance(runtime, OnnxEncoderDecoder)
    assert relative_error(torch.tensor(runtime.logits(source, tokens)), expected.logits) < 1e-5
    assert sum(runtime.metadata.weights.values()) > 15


def test_scales_pass_from_the_encoder_to_what_the_decoder_makes_of_it() -> None:
    findings = analyze(t5()).findings
    ahead = next(site for site in findings.equivalences if site.producer == "encoder.final_layer_norm.weight")
    assert {name.rpartition("EncDecAttention.")[2] for name in ahead.linears} == {"k.weight", "v.weight"}
    assert len(ahead.linears) == 4
    assert any("EncDecAttention.v" in site.producer for site in findings.equivalences)


OPTIONS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.7},
    {"no_repeat_ngram_size": 2, "min_length": 9},
    {"repetition_penalty": 1.5, "forced_bos_token_id": 11, "forced_eos_token_id": 12},
    {"forced_bos_token_id": 11, "begin_suppress_tokens": list(range(20, 60))},
    {
        "no_repeat_ngram_size": 1,
        "bad_words_ids": [[token] for token in range(30, 70)],
        "begin_suppress_tokens": [70, 71],
    },
    {"max_length": 7, "forced_eos_token_id": 12, "min_new_tokens": 3},
]


def test_options_choose_the_tokens_that_transformers_chooses(tmp_path: Path) -> None:
    model = bart(forced_eos_token_id=None)
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(skip=("*",)), training=None)
    runtime = load(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    assert isinstance(runtime, OnnxEncoderDecoder)
    for options in OPTIONS:
        inputs, source = sources("BART")
        whole = options if "max_length" in options else {"max_new_tokens": NEW, **options}
        assert runtime.generate(source, **whole) == greedy(model, inputs, **whole), options
    # After tokens that are given, as Whisper's language and task are.
    start = [START, 20, 21]
    expected = greedy(model, inputs, max_new_tokens=5, decoder_input_ids=torch.tensor([start] * len(LENGTHS)))
    assert runtime.generate(source, max_new_tokens=5, decoder_input_ids=start) == [row[2:] for row in expected]


@pytest.mark.parametrize("kind", ["BART", "Whisper"])
def test_it_calibrates_itself(kind: str) -> None:
    model = KINDS[kind]()
    (inputs, _), tokens = sources(kind), written()
    compiled = teq_graph.compile(model, quantization=SMALL, training=TRAINING)
    expected = model(**inputs, decoder_input_ids=tokens, use_cache=False).logits
    assert relative_error(compiled(**inputs, decoder_input_ids=tokens).logits, expected) < 0.15
    assert len(compiled.report.blocks) > 2


def test_sources_of_the_user_are_completed_by_what_the_model_writes() -> None:
    captured = analyze(bart()).captured
    given = [{"input_ids": torch.randint(4, VOCAB, (3, 8))}, {"input_ids": torch.randint(4, VOCAB, (1, 5))}]
    own = {**given[1], "decoder_input_ids": torch.tensor([[START, 9]])}
    made = calibration_batches([given[0], own], captured, TRAINING, None)
    assert [batch["decoder_input_ids"].shape for batch in made] == [(2, 12), (1, 12), (1, 2)]
    assert torch.equal(torch.cat([batch["input_ids"] for batch in made[:2]]), given[0]["input_ids"])
    assert all((batch["decoder_input_ids"][:, 0] == START).all() for batch in made)
    assert len({tuple(row) for batch in made[:2] for row in batch["decoder_input_ids"].tolist()}) == 3


def test_inputs_that_are_refused(tmp_path: Path) -> None:
    compiled = teq_graph.compile(bart(), quantization=SMALL, training=None)
    inputs, _ = sources("BART")
    assert compiled(**inputs).logits.shape == (3, 1, VOCAB)  # of the start token
    for wrong, message in (
        ({"decoder_input_ids": written()}, r"missing are \['input_ids', 'attention_mask'\]"),
        (
            {**inputs, "labels": written()},
            r"inputs \['labels'\]: accepted are \['input_ids', 'attention_mask', 'decoder_",
        ),
        ({**inputs, "decoder_input_ids": written(65)}, "sequence of 65 positions: the model has 64"),
        ({**inputs, "past_key_values": 3}, "past_key_values=3: accepted is a list of 2"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            compiled(**wrong)
        in_one_line(caught)
    out = compiled.export_onnx(tmp_path / "out", accuracy_level=1)
    runtime = load(out)
    assert isinstance(runtime, OnnxEncoderDecoder)
    for source, options, message in (
        ([[5, VOCAB]], {}, f"source: token {VOCAB}; accepted are 0 to {VOCAB - 1}"),
        ([[5], []], {}, "source: it is empty"),
        ([[5] * 65], {}, "source of 65 tokens: accepted are up to 64"),
        ([[5]], {"decoder_input_ids": [[3]]}, "decoder_input_ids: .* is no token id"),
        ([[5]], {"forced_bos_token_id": VOCAB}, f"forced_bos_token_id: token {VOCAB}; accepted are 0 to"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            runtime.generate(source, **options)
        in_one_line(caught)
    with pytest.raises(ModelFileError, match="it is not a causal language model"):
        OnnxDecoder.load(out)
    (out / "encoder_model.onnx").unlink()
    with pytest.raises(ModelFileError, match=r"encoder_model\.onnx is missing"):
        load(out, verify=False)


def test_features_of_another_size_are_refused(tmp_path: Path) -> None:
    compiled = teq_graph.compile(whisper(), quantization=SMALL, training=None)
    runtime = load(compiled.export_onnx(tmp_path / "out"))
    assert isinstance(runtime, OnnxEncoderDecoder)
    features = torch.randn(BINS, FRAMES).numpy()
    assert runtime.generate([features], max_new_tokens=3) == [runtime.generate(features, max_new_tokens=3)]
    for wrong in (features[:, 1:], "a text", features[None, None]):
        with pytest.raises(InputError, match=r"^source.*accepted are numbers \[batch_size, 16, 40\]") as caught:
            runtime.generate(wrong)
        in_one_line(caught)


@torch.no_grad()
def test_a_decoder_that_takes_images_beside_its_text(tmp_path: Path) -> None:
    """A model of captions returns no cache, and computed its image and its text anew for each token."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    words = dict(vocab_size=VOCAB, bos_token_id=START, eos_token_id=END, sep_token_id=END, pad_token_id=PAD)
    text = {**sizes, **words, "encoder_hidden_size": 32, "max_position_embeddings": 64}
    config = BlipConfig(text_config=text, vision_config={**sizes, "image_size": 16, "patch_size": 8})
    model: Any = randomize(BlipForConditionalGeneration(config))
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(skip=("*",)), training=None)
    images, ids = torch.randn(3, 3, 16, 16), written()
    expected = model(pixel_values=images, input_ids=ids).logits
    assert relative_error(in_steps(compiled.captured, {"pixel_values": images}, ids, 6), expected) < 2e-6
    assert relative_error(in_steps(compiled.captured, {"pixel_values": images}, ids, 1, 1, 3, 1), expected) < 2e-6
    runtime = load(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    assert isinstance(runtime, OnnxEncoderDecoder)
    logits = torch.from_numpy(runtime.logits(images.numpy(), ids.numpy()))
    assert relative_error(logits, expected) < 1e-4
    begun = torch.full((3, 1), START)
    for _ in range(NEW):
        begun = torch.cat([begun, model(pixel_values=images, input_ids=begun).logits[:, -1:].argmax(-1)], 1)
    rows = [row[: row.index(END)] if END in row else row for row in begun[:, 1:].tolist()]
    assert runtime.generate(images.numpy(), max_new_tokens=NEW) == rows
