"""`genai_config.json`: what onnxruntime-genai must know to drive an exported decoder, or a Whisper."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from teq_graph.capture import DecoderShape
from teq_graph.capture.shapes import PAST, PRESENT, LayerCache
from teq_graph.onnx.directory import (
    DECODER_FILE,
    ENCODER_FILE,
    GENAI_AUDIO_FILE,
    GENAI_ENCODER_FILE,
    GENAI_FILE,
    GENAI_MODEL_FILE,
    MODEL_FILE,
    Metadata,
)
from teq_graph.onnx.fused_products import FUSED_PRODUCTS, has_fused_products
from teq_graph.onnx.padding import count_lengths
from teq_graph.system.files import write_json

DEFAULT_CONTEXT = 2048
"""Tokens of a sequence where the model names no limit (as with ALiBi): the format asks for one."""
FRAMES = 3000
"""Of every sound that onnxruntime-genai hears: 30 seconds, of which an encoder makes half as many positions."""
HEARD = (16000, FRAMES)
"""Samples a second, and frames, that its features are made of."""
HIDDEN_STATES = "hidden_states"


def write_genai_files(
    directory: Path, metadata: Metadata, bos_token_id: int | None, feature_extractor: Any = None
) -> None:
    """Write `genai_config.json` beside the model in `directory`, and where it can be had the graph that suits it."""
    if metadata.encoder is not None:
        _write_speech_files(directory, metadata, bos_token_id, feature_extractor)
        return
    content = genai_config(metadata, bos_token_id)
    if content is None:
        return
    model = ir.load(directory / MODEL_FILE)
    if metadata.shared_buffers and count_lengths(model):
        ir.save(model, directory / GENAI_MODEL_FILE)
        content["model"]["decoder"]["filename"] = GENAI_MODEL_FILE
    if has_fused_products(model):
        content["model"]["decoder"]["session_options"][FUSED_PRODUCTS] = "1"
    write_json(directory / GENAI_FILE, content)


def genai_config(metadata: Metadata, bos_token_id: int | None) -> dict[str, Any] | None:
    """The content of `genai_config.json` for a decoder; None where the format has no words for it.

    onnxruntime-genai knows one number of KV heads and one head size per model, and needs to know how long a
    sequence may be: `DEFAULT_CONTEXT` where the model does not say. The model type "decoder" is its name for any
    decoder-only model.
    """
    shape = metadata.decoder
    if shape is None or (sizes := _common_sizes(shape.layers, "")) is None:
        return None
    inputs = {"input_ids": "input_ids", "attention_mask": "attention_mask", **_names("past", PAST)}
    outputs = {"logits": "logits", **_names("present", PRESENT)}
    decoder = _part(MODEL_FILE, sizes, len(shape.layers), inputs, outputs)
    return _config("decoder", metadata, bos_token_id, {"decoder": decoder})


def speech_config(metadata: Metadata, bos_token_id: int | None) -> dict[str, Any] | None:
    """The content of `genai_config.json` for an encoder-decoder that hears `FRAMES`; None for any other.

    The model type "whisper" is onnxruntime-genai's name for these.
    """
    shape, encoder = metadata.decoder, metadata.encoder
    if shape is None or encoder is None or len(encoder.inputs) != 1:
        return None
    sizes, encoded = _common_sizes(shape.layers, "decoder."), _common_sizes(encoder.layers, "encoder.")
    if sizes is None or encoded != (sizes[0], FRAMES // 2, sizes[2]):
        return None
    heads, _, head_size = sizes
    inputs = {"input_ids": "input_ids", **_names("past", PAST, "decoder."), **_names("cross_past", PAST, "encoder.")}
    outputs = {"logits": "logits", **_names("present", PRESENT, "decoder.")}
    decoder = _part(DECODER_FILE, sizes, len(shape.layers), inputs, outputs)
    inputs = {"audio_features": encoder.inputs[0]}
    outputs = {"encoder_hidden_states": HIDDEN_STATES, **_names("cross_present", PRESENT, "encoder.")}
    other = _part(GENAI_ENCODER_FILE, sizes, len(shape.layers), inputs, outputs)
    parts = {"encoder": {**other, "hidden_size": heads * head_size}, "decoder": decoder}
    return _config("whisper", metadata, bos_token_id, parts)


Sizes = tuple[int, int | None, int]
"""Heads, positions (None: any number) and size of a head of keys and values."""


def _common_sizes(layers: Sequence[LayerCache], part: str) -> Sizes | None:
    """Those of all cached tensors, where each layer has a key and a value, all alike; `part` begins their names."""
    sizes = {tensor.sizes for layer in layers for tensor in layer}
    names = {tuple(tensor.name for tensor in layer) for layer in layers}
    if len(sizes) != 1 or names != {(f"{part}key", f"{part}value")}:
        return None
    heads, positions, head_size = sizes.pop()
    return None if heads is None or head_size is None else (heads, positions, head_size)


def _names(kind: str, prefix: str, part: str = "") -> dict[str, str]:
    """The templates of the names of keys and values."""
    return {f"{kind}_{tensor}_names": f"{prefix}.%d.{part}{tensor}" for tensor in ("key", "value")}


def _part(
    file: str, sizes: Sizes, layers: int, inputs: Mapping[str, str], outputs: Mapping[str, str]
) -> dict[str, Any]:
    heads, _, head_size = sizes
    return {
        "filename": file,
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "head_size": head_size,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "inputs": dict(inputs),
        "outputs": dict(outputs),
    }


def _config(
    kind: str, metadata: Metadata, bos_token_id: int | None, parts: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    shape = metadata.decoder
    assert shape is not None
    context = DEFAULT_CONTEXT if shape.max_positions is None else shape.max_positions
    stops = list(metadata.eos_token_ids)
    first_stop = stops[0] if stops else 0
    return {
        "model": {
            "type": kind,
            "bos_token_id": first_stop if bos_token_id is None else bos_token_id,
            "eos_token_id": stops,
            "pad_token_id": first_stop if metadata.pad_token_id is None else metadata.pad_token_id,
            "context_length": context,
            "vocab_size": shape.vocab_size,
            **parts,
        },
        "search": {
            "do_sample": False,
            "early_stopping": True,
            "max_length": context,
            "min_length": 0,
            "num_beams": 1,
            "num_return_sequences": 1,
            "past_present_share_buffer": metadata.shared_buffers,
            "repetition_penalty": 1.0,
            "temperature": 1.0,
            "top_k": 50,
            "top_p": 1.0,
        },
    }


def _write_speech_files(directory: Path, metadata: Metadata, bos_token_id: int | None, feature_extractor: Any) -> None:
    audio = _audio_config(feature_extractor)
    content = speech_config(metadata, bos_token_id)
    if content is None or audio is None:
        return
    model = ir.load(directory / ENCODER_FILE)
    if model.graph.inputs[0].shape is None or model.graph.inputs[0].shape[-1] != FRAMES:
        return
    _add_hidden_states(model, content["model"]["encoder"]["hidden_size"])
    ir.save(model, directory / GENAI_ENCODER_FILE)
    write_json(directory / GENAI_AUDIO_FILE, audio)
    write_json(directory / GENAI_FILE, content)


def _add_hidden_states(model: ir.Model, width: int) -> None:
    """A result of zeros [b, positions, width].

    onnxruntime-genai binds the encoder's own result, and reads it only of an encoder that gives no keys and values.
    """
    graph = model.graph
    features, dtype = graph.inputs[0], graph.inputs[0].dtype
    assert dtype is not None
    sizes = ir.node("Constant", [], {"value": ir.tensor([FRAMES // 2, width], ir.DataType.INT64)})
    batch = ir.node("Shape", [features], {"start": 0, "end": 1})
    shape = ir.node("Concat", [batch.outputs[0], sizes.outputs[0]], {"axis": 0})
    zeros = ir.node("ConstantOfShape", [shape.outputs[0]], {"value": ir.tensor([0.0], dtype)})
    for node in (sizes, batch, shape, zeros):
        graph.append(node)
    (value,) = zeros.outputs
    value.name, value.type = HIDDEN_STATES, ir.TensorType(dtype)
    value.shape = ir.Shape(["batch_size", FRAMES // 2, width])
    graph.outputs.append(value)


def _audio_config(feature_extractor: Any) -> dict[str, Any] | None:
    """How onnxruntime-genai makes the features of `feature_extractor`; None where it makes other ones."""
    found = feature_extractor
    if type(found).__name__ != "WhisperFeatureExtractor" or (found.sampling_rate, found.nb_max_frames) != HEARD:
        return None
    window = {"n_fft": found.n_fft, "hop_length": found.hop_length}
    spectrum = {**window, "chunk_size": found.chunk_length, "n_mel": found.feature_size}
    steps = [
        ("audio_decoder", "AudioDecoder", {}),
        ("STFT", "STFTNorm", {**window, "frame_length": found.n_fft}),
        ("log_mel_spectrogram", "LogMelSpectrum", spectrum),
    ]
    sequence = [
        {"operation": {"name": name, "type": kind, **({"attrs": attributes} if attributes else {})}}
        for name, kind, attributes in steps
    ]
    return {"feature_extraction": {"sequence": sequence}}


def describe_limits(directory: Path, decoder: DecoderShape, encodes: bool = False) -> list[str]:
    """What onnxruntime-genai makes of an exported directory, where that is not what one expects.

    `encodes`: it is that of an encoder-decoder.
    """
    if encodes:
        if (directory / GENAI_FILE).is_file():
            return ["onnxruntime-genai does not leave out suppress_tokens, and is told language and task in its prompt"]
        reason = f"of encoder-decoders onnxruntime-genai runs those that hear {FRAMES} frames of Whisper's features"
        return [f"without {GENAI_FILE}: {reason}"]
    if not (directory / GENAI_FILE).is_file():
        reason = "onnxruntime-genai has one number of KV heads and one head size for all layers, keys and values"
        if decoder.states:
            reason = "its configuration says nothing of the states that this model keeps"
        return [f"without {GENAI_FILE}: {reason}"]
    limits = []
    if decoder.max_positions is None:
        limits.append(f"the model names no greatest length; {GENAI_FILE} says {DEFAULT_CONTEXT} tokens")
    if (switch := decoder.recompute_after) is not None:
        limits.append(f"past {switch} tokens, onnxruntime-genai goes on from what it computed for a shorter sequence")
    return limits
