"""What `quantize` says at its end: labelled lines, or one JSON object."""

from __future__ import annotations

import collections
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq_graph.cli import console
from teq_graph.system.manifest import walk

if TYPE_CHECKING:
    import teq_graph
    from teq_graph.config import TrainingConfig


@dataclasses.dataclass
class Quantized:
    """A directory that was written, and what is known of it so far.

    `perplexity`: {"values": {of what: value}, "text", "tokens", "context"}, why there is none, or None where none was
    asked for. `saved`: where the compiled model was saved as well. `formats`: where the codes were, by format.
    """

    model: str
    dtype: str
    output: Path
    compiled: teq_graph.CompiledModel
    training: TrainingConfig | None
    calibration: str | None
    watch: console.Stopwatch
    perplexity: dict[str, Any] | str | None = None
    saved: Path | None = None
    formats: dict[str, Path] = dataclasses.field(default_factory=dict)

    def show(self, as_json: bool) -> None:
        """Print it."""
        if as_json:
            console.print_json(self.to_dict())
        else:
            console.show_pairs(self._lines())

    def _sizes(self) -> dict[str, int]:
        """Bytes of each exported file; the compiled model beside them is not counted."""
        names = (name for name in walk(self.output) if "/" not in name)
        return {name: (self.output / name).stat().st_size for name in names}

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; sizes in bytes, times in seconds."""
        report, sizes = self.compiled.report, self._sizes()
        return {
            "model": self.model,
            "output": str(self.output),
            "compiled": None if self.saved is None else str(self.saved),
            "formats": {name: str(path) for name, path in self.formats.items()},
            "bytes_before": report.bytes_before,
            "bytes_on_disk": sum(sizes.values()),
            "files": sizes,
            "linears": len(report.linears),
            "quantized": len(report.quantized),
            "specs": collections.Counter(str(linear.spec) for linear in report.quantized),
            "equivalences": len(report.sites),
            "block_errors": [{"before": block.before, "after": block.after} for block in report.blocks],
            "in_float": {weight.name: weight.reason for weight in report.in_float},
            "notes": [*report.notes, *self._limits()],
            "attention": self._attention(),
            **report.settings,
            "perplexity": self.perplexity if isinstance(self.perplexity, dict) else None,
            "seconds": self.watch.to_dict(),
        }

    def _lines(self) -> list[tuple[str, str]]:
        report = self.compiled.report
        lines = [("model", f"{self.model} → {console.path(self.output)}"), *console.describe_report(report)]
        lines.append(("calibration", console.describe_calibration(self.training, self.calibration)))
        lines.append(("size", console.describe_sizes(report.bytes_before, sum(self._sizes().values()), self.dtype)))
        if (attention := self._attention()) is not None:
            from teq_graph.analysis.attention import AttentionRefusal

            refusals = [AttentionRefusal(**refusal) for refusal in attention["refusals"]]
            lines += console.describe_attention(f"{attention['fused']} fused", refusals)
        lines += [("note", note) for note in self._limits()]
        if isinstance(self.perplexity, str):
            lines.append(("perplexity", self.perplexity))
        elif self.perplexity is not None:
            values = " → ".join(f"{value:.2f} {name}" for name, value in self.perplexity["values"].items())
            where = f"on {self.perplexity['tokens']:,} tokens of {self.perplexity['text']}, not calibrated on"
            lines += [("perplexity", values), ("", f"{where}; context {self.perplexity['context']}")]
        if self.saved is not None:
            lines.append(("compiled", f"{console.path(self.saved)}, for teq_graph.load"))
        lines += [(name, f"{console.path(path)}, for transformers") for name, path in self.formats.items()]
        return [*lines, ("time", str(self.watch))]

    def _attention(self) -> dict[str, Any] | None:
        """What became of a decoder's attentions."""
        if self.compiled.captured.decoder is None:
            return None
        from teq_graph.report import REPORT_FILE

        found: dict[str, Any] = json.loads((self.output / REPORT_FILE).read_text(encoding="utf-8"))["attention"]
        return found

    def _limits(self) -> list[str]:
        """What onnxruntime-genai makes of the directory of a model that writes text."""
        captured = self.compiled.captured
        both = captured.encoder_decoder
        decoder = captured.decoder if both is None else both.decoder
        if decoder is None:
            return []
        from teq_graph.onnx.export.genai import describe_limits

        return describe_limits(self.output, decoder, both is not None)
