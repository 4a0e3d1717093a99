"""The model card: `README.md` of an exported directory, in the form of the Hugging Face hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from teq_graph.onnx.directory import CARD_FILE, GENAI_FILE, METADATA_FILE, VERIFIED
from teq_graph.report import REPORT_FILE, Report
from teq_graph.system.directories import amend
from teq_graph.system.files import read_json, shown

CONTINUES, HEARS = "text-generation", "automatic-speech-recognition"
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def record(directory: Path, **measured: Any) -> None:
    """Add what was measured of an exported model to its provenance, and to its card; each changes in one step."""
    content = read_json(directory / METADATA_FILE)
    content["provenance"] = {**content["provenance"], **measured}
    amend(directory, METADATA_FILE, content, {CARD_FILE: model_card(directory, content)})


def model_card(directory: Path, content: Mapping[str, Any]) -> str:
    """The card of what stands in `directory`, of which `content` is the description."""
    provenance, found = content["provenance"], json.loads((directory / REPORT_FILE).read_text(encoding="utf-8"))
    report = Report.from_dict(found) if "weights" in found else None
    task = _task(content)
    paragraphs = [
        f"---\n{_front_matter(provenance, task)}\n---",
        f"# {shown(provenance['source']['name'])}, quantized",
        "An ONNX model for onnxruntime with weights in low bits, written by teq_graph.",
        *([f"```\n{report}\n```"] if report is not None else []),
        _size(directory, report),
        *_perplexities(provenance.get("perplexity")),
        "## How it was made",
        *([f"```\n{shown(provenance['command'])}\n```"] if "command" in provenance else []),
        "\n".join(_facts(provenance)),
        f"All of it, with checksums, stands in `{METADATA_FILE}`, and layer by layer in `{REPORT_FILE}`.",
        "## How to run it",
        _usage(directory, task),
    ]
    return "\n\n".join(paragraphs) + "\n"


def _task(content: Mapping[str, Any]) -> str | None:
    """What the hub calls what the model does, as far as its inputs tell."""
    if content["decoder"] is None:
        return None
    if (encoder := content.get("encoder")) is None:
        return CONTINUES
    return "text2text-generation" if "input_ids" in encoder["inputs"] else HEARS


def _front_matter(provenance: Mapping[str, Any], task: str | None) -> str:
    from huggingface_hub import ModelCardData

    source = provenance["source"]
    given = str(source.get("given", ""))
    data = ModelCardData(
        # The hub takes its own ids only.
        base_model=given if _HUB_ID.fullmatch(given) and not Path(given).exists() else None,
        library_name="onnx",
        license=source.get("license"),
        pipeline_tag=task,
        tags=["onnx", "onnxruntime", "quantized", "teq_graph"],
    )
    return data.to_yaml()


def _size(directory: Path, report: Report | None) -> str:
    size = sum(file.stat().st_size for file in map(directory.joinpath, VERIFIED) if file.exists())
    before = "" if report is None else f", {report.bytes_before / 1e6:,.1f} MB before"
    return f"Size: {size / 1e6:,.1f} MB{before}."


def _perplexities(measured: Mapping[str, Any] | None) -> list[str]:
    if measured is None:
        return []
    rows = "\n".join(f"| {name} | {value:.2f} |" for name, value in measured["values"].items())
    where = f"On {measured['tokens']:,} tokens of {measured['text']}, not calibrated on; context {measured['context']}."
    return ["## Perplexity", f"{where}\n\n| model | perplexity |\n|---|---|\n{rows}"]


def _facts(provenance: Mapping[str, Any]) -> list[str]:
    lines = []
    for name in ("created", "source", "preset", "quantization", "stages", "training", "calibration", "seed"):
        value = provenance.get(name)
        if value not in (None, []):
            lines.append(
                f"- {name}: {value if isinstance(value, str) else f'`{json.dumps(value, ensure_ascii=False)}`'}"
            )
    versions = ", ".join(f"{name} {version}" for name, version in provenance["versions"].items())
    return [*lines, f"- versions: {versions}"]


def _usage(directory: Path, task: str | None) -> str:
    if task is None:
        return '```python\nfrom teq_graph.onnx.runtime import load\n\noutputs = load(".").run(...)\n```'
    source = "--audio recording.wav" if task == HEARS else '--prompt "…"'
    commands, notes = ["pip install teq-graph", f"teq-graph generate . {source}"], []
    if task == CONTINUES:
        commands.append("teq-graph serve .")
        notes.append("`teq-graph serve` speaks OpenAI's API.")
    if (directory / GENAI_FILE).is_file():
        notes.append("onnxruntime-genai loads it as well.")
    return "\n\n".join(["\n".join(["```", *commands, "```"]), *([" ".join(notes)] if notes else [])])
