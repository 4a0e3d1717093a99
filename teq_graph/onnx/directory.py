"""The exported directory: its files, and what `teq_graph.json` says about the model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from teq_graph.capture import DecoderShape
from teq_graph.config import DTYPES
from teq_graph.errors import ModelFileError, one_line
from teq_graph.system.files import write_json

FORMAT_VERSION = 1

MODEL_FILE = "model.onnx"
DATA_FILE = "model.onnx.data"
METADATA_FILE = "teq_graph.json"
GENAI_FILE = "genai_config.json"
GENAI_MODEL_FILE = "model.genai.onnx"
"""The graph of `MODEL_FILE` over the same data, for padding after the tokens, which is onnxruntime-genai's."""
GENERATION_FILE = "generation_config.json"

LOGITS_FROM = "logits_from"
"""Input that the runtime adds to a decoder: the position from which on logits are computed; [-1] the last alone."""

WRITTEN = "a directory that export_onnx or teq-graph quantize wrote"


@dataclasses.dataclass(frozen=True)
class Metadata:
    """What `teq_graph.json` tells a runtime about the model beside it.

    `dtype` is the floating-point type of inputs and outputs (of `config.DTYPES`). `weights` counts the
    quantized weights by "bits/group_size" as stored in the file; `eos_token_ids` are the stop tokens.
    `shared_buffers`: past and present of a decoder's cache may be one buffer, as long as the longest sequence.
    """

    dtype: str
    accuracy_level: int
    opset: int
    decoder: DecoderShape | None
    weights: dict[str, int] = dataclasses.field(default_factory=dict)
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    shared_buffers: bool = False

    def write(self, directory: Path) -> None:
        """Write `teq_graph.json` into `directory`."""
        content = {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}
        write_json(directory / METADATA_FILE, content)

    @classmethod
    def read(cls, directory: Path) -> Metadata:
        """Read `teq_graph.json`; raises ModelFileError where it is missing, damaged or of another format."""
        path = directory / METADATA_FILE
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelFileError(f"{path} is missing: accepted is {WRITTEN}") from None
        except (OSError, ValueError) as error:
            raise ModelFileError(f"{path} cannot be read: {one_line(error)}") from None
        version = content.get("format_version") if isinstance(content, dict) else None
        if version != FORMAT_VERSION:
            raise ModelFileError(f"{path}: format_version={version!r}, accepted is {FORMAT_VERSION}")
        try:
            del content["format_version"]
            if content["decoder"] is not None:
                content["decoder"] = DecoderShape.from_dict(content["decoder"])
            content["eos_token_ids"] = tuple(content["eos_token_ids"])
            metadata = cls(**content)
            damaged = next(metadata._damaged(), None)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelFileError(f"{path} is damaged: {one_line(error)}") from None
        if damaged is not None:
            name, value = damaged
            raise ModelFileError(f"{path} is damaged: {name}={value!r}")
        return metadata

    def _damaged(self) -> Iterator[tuple[str, object]]:
        """The values that no export writes."""
        counts = [("accuracy_level", self.accuracy_level, 0), ("opset", self.opset, 1)]
        counts += [(f"weights[{kind!r}]", count, 1) for kind, count in self.weights.items()]
        counts += [("eos_token_ids", token, 0) for token in self.eos_token_ids]
        if self.pad_token_id is not None:
            counts.append(("pad_token_id", self.pad_token_id, 0))
        if self.decoder is not None:
            counts.append(("vocab_size", self.decoder.vocab_size, 1))
            if self.decoder.max_positions is not None:
                counts.append(("max_positions", self.decoder.max_positions, 1))
            counts += [
                (f"layers[{index}]: {name}", value, 1)
                for index, layer in enumerate(self.decoder.layers)
                for name, value in dataclasses.asdict(layer).items()
            ]
        if self.dtype not in DTYPES:
            yield "dtype", self.dtype
        shared: object = self.shared_buffers
        if not isinstance(shared, bool):
            yield "shared_buffers", shared
        for name, value, least in counts:
            if type(value) is not int or value < least:
                yield name, value
