"""What onnxruntime-genai is told, and what the command line says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import save_tokenizer
from support.encoder_decoders import BINS, greedy, whisper
from support.sounds import write_wave

import teq_graph
from teq_graph import QuantizationConfig
from teq_graph.capture import DecoderShape, EncoderShape
from teq_graph.capture.shapes import CachedTensor, LayerCache, attention_cache
from teq_graph.onnx.directory import ENCODER_FILE, GENAI_AUDIO_FILE, GENAI_ENCODER_FILE, GENAI_FILE, Metadata
from teq_graph.onnx.export.genai import DEFAULT_CONTEXT, FRAMES, describe_limits, genai_config, speech_config
from teq_graph.onnx.runtime import OnnxEncoderDecoder, load, read_wave

LAYER = attention_cache(2, 16, 2, 16)


def metadata(*layers: LayerCache, max_positions: int | None = 64) -> Metadata:
    return Metadata("float32", 4, 23, DecoderShape(layers, 100, max_positions), eos_token_ids=(7, 8))


@pytest.mark.parametrize("max_positions", [64, None])
def test_a_sequence_has_a_greatest_length(max_positions: int | None, tmp_path: Path) -> None:
    described = metadata(LAYER, LAYER, max_positions=max_positions)
    config = genai_config(described, bos_token_id=None)
    assert config is not None
    expected = max_positions or DEFAULT_CONTEXT
    assert config["model"]["context_length"] == config["search"]["max_length"] == expected
    assert (config["model"]["bos_token_id"], config["model"]["eos_token_id"]) == (7, [7, 8])
    (tmp_path / GENAI_FILE).touch()
    assert described.decoder is not None
    notes = describe_limits(tmp_path, described.decoder)
    assert len(notes) == (max_positions is None)
    assert all(f"{GENAI_FILE} says {DEFAULT_CONTEXT} tokens" in note for note in notes)


@pytest.mark.parametrize(
    "layers",
    [
        (LAYER, attention_cache(1, 16, 1, 16)),
        (attention_cache(2, 16, 2, 8),),
        (attention_cache(2, 16, 1, 16),),
        ((CachedTensor("conv_state", (32, 3)),),),
    ],
    ids=["layers differ", "sizes differ", "heads differ", "states"],
)
def test_what_the_format_has_no_words_for(layers: tuple[LayerCache, ...], tmp_path: Path) -> None:
    described = metadata(*layers)
    assert genai_config(described, bos_token_id=1) is None
    assert described.decoder is not None
    (note,) = describe_limits(tmp_path, described.decoder)
    assert note.startswith(f"without {GENAI_FILE}: ")


def both(positions: int | None = FRAMES // 2, heads: int = 2, *inputs: str) -> Metadata:
    """Of an encoder-decoder of two layers."""
    own, encoded = (
        tuple(CachedTensor(f"{part}.{name}", (count, length, 16)) for name in ("key", "value"))
        for part, count, length in (("decoder", 2, None), ("encoder", heads, positions))
    )
    decoder, encoder = (
        DecoderShape((own, own), 100, 64),
        EncoderShape(inputs or ("input_features",), (encoded, encoded)),
    )
    return Metadata("float32", 4, 23, decoder, eos_token_ids=(7,), encoder=encoder)


def test_an_encoder_decoder_that_hears_what_the_format_has_words_for() -> None:
    config = speech_config(both(), bos_token_id=None)
    assert config is not None and config["model"]["type"] == "whisper"
    encoder, decoder = (config["model"][part] for part in ("encoder", "decoder"))
    assert encoder["hidden_size"] == 32
    assert encoder["outputs"]["cross_present_key_names"] == "present.%d.encoder.key"
    assert decoder["inputs"]["cross_past_value_names"] == "past_key_values.%d.encoder.value"
    assert genai_config(both(), bos_token_id=None) is None


@pytest.mark.parametrize(
    "described",
    [both(None), both(20), both(heads=4), both(FRAMES // 2, 2, "input_ids", "attention_mask"), metadata(LAYER)],
    ids=["texts", "shorter", "heads differ", "a mask", "no encoder"],
)
def test_other_encoder_decoders(described: Metadata, tmp_path: Path) -> None:
    assert speech_config(described, bos_token_id=1) is None
    assert described.decoder is not None
    (note,) = describe_limits(tmp_path, described.decoder, encodes=True)
    assert note.startswith(f"without {GENAI_FILE}: of encoder-decoders")


def random_whisper(directory: Path) -> tuple[Any, Any, Any]:
    """One that hears 30 seconds, with a tokenizer and a feature extractor."""
    from transformers import AutoTokenizer, WhisperFeatureExtractor

    ids = dict(vocab_size=save_tokenizer(directory), pad_token_id=0, bos_token_id=0, eos_token_id=1)
    quiet: dict[str, Any] = dict(begin_suppress_tokens=None, suppress_tokens=None)
    model = whisper(**ids, **quiet, decoder_start_token_id=0, max_source_positions=FRAMES // 2)
    return model, AutoTokenizer.from_pretrained(directory), WhisperFeatureExtractor(feature_size=BINS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_onnxruntime_genai_transcribes_as_transformers_does(dtype: Any, tmp_path: Path) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    model, tokenizer, extractor = random_whisper(tmp_path)
    compiled = teq_graph.compile(
        model,
        quantization=QuantizationConfig(skip=("*",)),
        training=None,
        tokenizer=tokenizer,
        feature_extractor=extractor,
    )
    out = compiled.export_onnx(tmp_path / "out", dtype=dtype, accuracy_level=1)
    path = write_wave(tmp_path / "noise.wav", torch.randn(20000).mul(3000).numpy().astype("<i2").tobytes())
    inputs = extractor(read_wave(path).samples, sampling_rate=16000, return_tensors="pt")
    runtime = load(out, threads=1)
    assert isinstance(runtime, OnnxEncoderDecoder)
    (expected,) = runtime.generate(inputs["input_features"].numpy(), max_new_tokens=12)
    assert dtype != "float32" or [expected] == greedy(model, inputs, max_new_tokens=12)

    opened = genai.Model(str(out))
    given = opened.create_multimodal_processor()("<s>", audios=genai.Audios.open(str(path)))
    params = genai.GeneratorParams(opened)
    params.set_search_options(max_length=13)
    generator = genai.Generator(opened, params)
    generator.set_inputs(given)
    while not generator.is_done():
        generator.generate_next_token()
    tokens = generator.get_sequence(0).tolist()
    assert expected and tokens == [0, *expected, *([1] if len(expected) < 12 else [])]
    # The encoder's two graphs are over the same data.
    assert (out / GENAI_ENCODER_FILE).stat().st_size < (out / ENCODER_FILE).stat().st_size + 2000


@pytest.mark.slow
def test_without_a_feature_extractor_nothing_is_told(tmp_path: Path) -> None:
    model, tokenizer, _ = random_whisper(tmp_path)
    skip = QuantizationConfig(skip=("*",))
    compiled = teq_graph.compile(model, quantization=skip, training=None, tokenizer=tokenizer)
    out = compiled.export_onnx(tmp_path / "out")
    assert not any((out / name).exists() for name in (GENAI_FILE, GENAI_AUDIO_FILE, GENAI_ENCODER_FILE))
