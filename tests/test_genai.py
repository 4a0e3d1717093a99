"""What onnxruntime-genai is told, and what the command line says of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from teq_graph.capture import DecoderShape
from teq_graph.capture.shapes import CachedTensor, LayerCache, attention_cache
from teq_graph.onnx.directory import GENAI_FILE, Metadata
from teq_graph.onnx.export.genai import DEFAULT_CONTEXT, describe_limits, genai_config

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
