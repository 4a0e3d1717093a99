"""The exported directory: its files, and what `teq_graph.json` says about the model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teq_graph.capture import DecoderShape, EncoderShape
from teq_graph.errors import ModelFileError, one_line
from teq_graph.system.directories import EXPORTED
from teq_graph.system.files import read_json, shown, write_json

FORMAT_VERSION = 3

MODEL_FILE = "model.onnx"
ENCODER_FILE, DECODER_FILE = "encoder_model.onnx", "decoder_model.onnx"
"""The two graphs of an encoder-decoder, in the place of `MODEL_FILE`."""
DATA_SUFFIX = ".data"
"""The large tensors of a model are in the file of its name and this."""
DATA_FILE = MODEL_FILE + DATA_SUFFIX
METADATA_FILE = EXPORTED
GENAI_FILE = "genai_config.json"
GENAI_MODEL_FILE = "model.genai.onnx"
"""The graph of `MODEL_FILE` over the same data, for padding after the tokens, which is onnxruntime-genai's."""
GENAI_ENCODER_FILE = "encoder_model.genai.onnx"
"""The graph of `ENCODER_FILE` over the same data, with one result more."""
GENAI_AUDIO_FILE = "audio_processor_config.json"
"""What onnxruntime-genai makes features of sounds by."""
GENERATION_FILE = "generation_config.json"
CARD_FILE = "README.md"

VERIFIED = tuple(name + suffix for name in (MODEL_FILE, ENCODER_FILE, DECODER_FILE) for suffix in ("", DATA_SUFFIX))
"""The files whose checksums are compared on opening. The others are for people to edit, as the generation config, and
their readers refuse what is damaged."""

LOGITS_FROM = "logits_from"
"""Input that the runtime adds to a decoder: the position from which on logits are computed; [-1] the last alone."""

WRITTEN = "a directory that export_onnx or teq-graph quantize wrote"


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `teq_graph.json` tells a runtime about the model beside it.

    `dtype` is the floating-point type of inputs and outputs (of `config.DTYPES`). `weights` counts the
    quantized weights by "bits/group_size" as stored in the file; `eos_token_ids` are the stop tokens.
    `encoder`: `decoder` is the step of an encoder-decoder's decoder, which begins with `decoder_start_token_id`.
    `shared_buffers`: past and present of a decoder's cache may be one buffer, as long as the longest sequence.
    `provenance` says where the model comes from; nothing is computed from it.
    """

    dtype: str
    accuracy_level: int
    opset: int
    decoder: DecoderShape | None
    weights: dict[str, int] = dataclasses.field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    shared_buffers: bool = False
    encoder: EncoderShape | None = None
    decoder_start_token_id: int | None = None
    provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def write(self, directory: Path) -> None:
        """Write `teq_graph.json` into `directory`."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_json(directory / METADATA_FILE, content)

    @classmethod
    def read(cls, directory: Path) -> Metadata:
        """Read `teq_graph.json`; raises ModelFileError where it is missing, damaged or of another format."""
        path = directory / METADATA_FILE
        try:
            content = read_json(path)
        except FileNotFoundError:
            raise ModelFileError(f"{shown(path)} is missing: accepted is {WRITTEN}") from None
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{shown(path)} cannot be read: {one_line(error)}") from None
        version = content.get("format_version")
        if version != FORMAT_VERSION or type(version) is not int:
            accepted = f"accepted is {FORMAT_VERSION}: export the model again"
            raise ModelFileError(f"{shown(path)}: format_version={version!r:.40}, {accepted}")
        from teq_graph.onnx.description import validated

        try:
            values = validated(content)
        except ValueError as error:
            raise ModelFileError(f"{shown(path)} is damaged: {error}") from None
        decoder, encoder = values["decoder"], values["encoder"]
        return cls(
            **{
                **values,
                "decoder": None if decoder is None else DecoderShape.from_dict(decoder),
                "encoder": None if encoder is None else EncoderShape.from_dict(encoder),
            }
        )
