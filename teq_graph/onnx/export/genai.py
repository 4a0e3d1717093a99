"""`genai_config.json`: what onnxruntime-genai must know to drive an exported decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir

from teq_graph.capture import DecoderShape
from teq_graph.onnx.directory import GENAI_FILE, GENAI_MODEL_FILE, MODEL_FILE, Metadata
from teq_graph.onnx.padding import count_lengths
from teq_graph.system.files import write_json

DEFAULT_CONTEXT = 2048
"""Tokens of a sequence where the model names no limit (as with ALiBi): the format asks for one."""


def write_genai_files(directory: Path, metadata: Metadata, bos_token_id: int | None) -> None:
    """Write `genai_config.json` beside the model in `directory`, and where it can be had the graph that suits it."""
    content = genai_config(metadata, bos_token_id)
    if content is None:
        return
    model = ir.load(directory / MODEL_FILE)
    if metadata.shared_buffers and count_lengths(model):
        ir.save(model, directory / GENAI_MODEL_FILE)
        content["model"]["decoder"]["filename"] = GENAI_MODEL_FILE
    write_json(directory / GENAI_FILE, content)


def genai_config(metadata: Metadata, bos_token_id: int | None) -> dict[str, Any] | None:
    """The content of `genai_config.json`; None where the format has no words for the decoder.

    onnxruntime-genai knows one number of KV heads and one head size per model, and needs to know how long a
    sequence may be: `DEFAULT_CONTEXT` where the model does not say. The model type "decoder" is its name for any
    decoder-only model.
    """
    shape = metadata.decoder
    if shape is None or len(set(shape.layers)) != 1 or [one.name for one in shape.layers[0]] != ["key", "value"]:
        return None
    key, value = (one.sizes for one in shape.layers[0])
    if key != value:
        return None
    heads, _, head_size = key
    context = DEFAULT_CONTEXT if shape.max_positions is None else shape.max_positions
    stops = list(metadata.eos_token_ids)
    first_stop = stops[0] if stops else 0
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": first_stop if bos_token_id is None else bos_token_id,
            "eos_token_id": stops,
            "pad_token_id": first_stop if metadata.pad_token_id is None else metadata.pad_token_id,
            "context_length": context,
            "vocab_size": shape.vocab_size,
            "decoder": {
                "filename": MODEL_FILE,
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": head_size,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "num_hidden_layers": len(shape.layers),
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
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


def describe_limits(directory: Path, decoder: DecoderShape) -> list[str]:
    """What onnxruntime-genai makes of an exported directory, where that is not what one expects."""
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
