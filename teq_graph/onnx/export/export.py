"""The directory that is written: the model, and what runtimes and people want to know of it."""

from __future__ import annotations

import collections
import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from teq_graph.capture import CapturedGraph
from teq_graph.capture.cutting import cut
from teq_graph.onnx.directory import CARD_FILE, DECODER_FILE, ENCODER_FILE, METADATA_FILE, MODEL_FILE, Metadata
from teq_graph.onnx.export.card import model_card
from teq_graph.onnx.export.genai import write_genai_files
from teq_graph.onnx.export.lower import Lowered, check_options, lower
from teq_graph.onnx.export.model_file import save_model
from teq_graph.onnx.export.names import name_sizes
from teq_graph.onnx.export.translations import CODES_OF
from teq_graph.provenance import provenance as known
from teq_graph.report import REPORT_FILE, Report
from teq_graph.system.directories import new_directory
from teq_graph.system.files import write_json


def export_onnx(
    captured: CapturedGraph,
    directory: str | os.PathLike[str],
    *,
    dtype: str = "float32",
    accuracy_level: int = 4,
    tokenizer: Any = None,
    feature_extractor: Any = None,
    config: Any = None,
    generation_config: Any = None,
    opset: int = 23,
    report: Report | None = None,
    provenance: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write `captured` as `directory`/model.onnx with its neighbours; returns the directory.

    An encoder-decoder becomes encoder_model.onnx and decoder_model.onnx in the place of model.onnx.

    `dtype` is that of weights, activations and KV cache: "float32", "float16" or "bfloat16" (which onnxruntime has on
    GPUs only). `accuracy_level` is MatMulNBits': 4 computes in int8 (fast), 1 in float32. `tokenizer`,
    `feature_extractor`, `config` and `generation_config` are Hugging Face objects, saved beside the model where given.
    `report.json` has the compilation's `report`, and what became of attentions. `provenance`, plain data, goes into the
    description and the model card before what is known without it. `captured` is left as it is. Raises ConfigError for
    options outside what is accepted, ExportError where the model has no ONNX form or the directory cannot be written;
    then nothing is left behind.
    """
    check_options(dtype, accuracy_level, opset)
    both = captured.encoder_decoder
    with new_directory(Path(directory), overwrite, METADATA_FILE) as staging:
        files = _lower_parts(captured, dtype=dtype, accuracy_level=accuracy_level, opset=opset)
        models = [lowered.model for lowered in files.values()]
        for name, lowered in files.items():
            save_model(lowered.model, staging / name)
        for saved in (tokenizer, feature_extractor, config, generation_config):
            if saved is not None:
                saved.save_pretrained(staging)
        metadata = Metadata(
            dtype=dtype,
            accuracy_level=accuracy_level,
            opset=opset,
            decoder=captured.decoder if both is None else both.decoder,
            weights=_count_weights(models),
            eos_token_ids=_eos_token_ids(generation_config, config, tokenizer),
            pad_token_id=_first_of("pad_token_id", generation_config, config, tokenizer),
            shared_buffers=_shares_buffers(models[-1]),
            encoder=None if both is None else both.encoder,
            decoder_start_token_id=_first_of("decoder_start_token_id", generation_config, both),
            provenance={**known(report, config), **(provenance or {})},
        )
        metadata.write(staging)
        attention = {
            "fused": sum(one.attention.fused for one in files.values()),
            "refusals": [dataclasses.asdict(one) for file in files.values() for one in file.attention.refusals],
        }
        write_json(staging / REPORT_FILE, {**(report.to_dict() if report else {}), "attention": attention})
        bos_token_id = _first_of("bos_token_id", generation_config, config, tokenizer)
        write_genai_files(staging, metadata, bos_token_id, feature_extractor)
        card = model_card(staging, dataclasses.asdict(metadata))
        (staging / CARD_FILE).write_text(card, encoding="utf-8", errors="backslashreplace")
    return Path(directory)


def _lower_parts(captured: CapturedGraph, **options: Any) -> dict[str, Lowered]:
    """The ONNX models that `captured` becomes, by the names of their files."""
    if captured.encoder_decoder is None:
        return {MODEL_FILE: lower(captured, **options)}
    lowered = {}
    for name, part in zip((ENCODER_FILE, DECODER_FILE), cut(captured), strict=True):
        lowered[name] = lower(part, **options)
        name_sizes(lowered[name].model, part)
    return lowered


def _count_weights(models: Sequence[ir.Model]) -> dict[str, int]:
    kinds: dict[ir.Value | None, str] = {}
    for node in (node for model in models for node in model.graph.all_nodes()):
        for place, attribute in CODES_OF.get(node.op_type, {}).items():
            codes = node.inputs[place]
            view = codes.producer() if codes is not None else None
            group = node.attributes["block_size"].as_int()
            if attribute in node.attributes:
                bits = node.attributes[attribute].as_int()
            else:
                assert codes is not None and codes.dtype is not None
                bits = int(8 * codes.dtype.itemsize)
            kinds[codes if view is None else view.inputs[0]] = f"{bits}/{group}"
    return dict(collections.Counter(kinds.values()))


def _shares_buffers(model: ir.Model) -> bool:
    """Whether one operator writes every cached tensor, and nothing else looks at the past but for its batch size.

    Nor does anything look at what is written: past and present are as long as their buffer.
    """
    cached = [value for value in model.graph.inputs if (value.name or "").startswith("past_key_values.")]
    readers = {use.node for value in cached for use in value.uses()}
    others = {node for node in readers if node.op_type != "GroupQueryAttention"}
    written = [value for value in model.graph.outputs if (value.name or "").startswith("present.")]
    return others < readers and all(map(_is_batch_size, others)) and not any(value.uses() for value in written)


def _is_batch_size(node: ir.Node) -> bool:
    bounds = [node.attributes[name].as_int() if name in node.attributes else None for name in ("start", "end")]
    return node.op_type == "Shape" and bounds in ([0, 1], [None, 1])


def _first_of(name: str, *sources: Any) -> Any:
    return next((value for value in (getattr(source, name, None) for source in sources) if value is not None), None)


def _eos_token_ids(*sources: Any) -> tuple[int, ...]:
    value = _first_of("eos_token_id", *sources)
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)
