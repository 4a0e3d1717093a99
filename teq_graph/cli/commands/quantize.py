"""`teq-graph quantize`: a model in low bits, as ONNX."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import teq_graph
from teq_graph.cli import console, opening, options
from teq_graph.cli.parameters import Embedding, LmHead, Model, Skip, TextFile, Tokens
from teq_graph.config import ACCURACY_LEVELS, BITS, DTYPES, GROUP_SIZES, STAGES, QuantizationConfig, TrainingConfig
from teq_graph.errors import ConfigError, ExportError
from teq_graph.system import progress

# torch, transformers and onnxruntime take seconds to import: only inside the command.
if TYPE_CHECKING:
    from teq_graph.capture import DecoderShape
    from teq_graph.estimate import Estimate

COMPILED_DIRECTORY = "compiled"


def _default(name: str) -> str:
    """What the help says of an option whose default is TrainingConfig's."""
    return f"[default: {getattr(TrainingConfig, name)}]"


def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to write.")],
    bits: Annotated[int, typer.Option(metavar="N", help=f"Bits of a weight: {BITS}.")] = QuantizationConfig.bits,
    target_bits: Annotated[
        float | None,
        typer.Option(metavar="N", help="Instead, bits for each linear by what it does to the loss, N on average."),
    ] = None,
    group_size: Annotated[
        int, typer.Option(metavar="N", help=f"Input channels that share a scale: {GROUP_SIZES}; -1 is all of them.")
    ] = QuantizationConfig.group_size,
    symmetric: Annotated[bool, typer.Option("--symmetric", help="Without zero points.")] = False,
    lm_head: LmHead = False,
    embedding: Embedding = False,
    skip: Skip = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN:…", help="As in '*.mlp.*:bits=8,group_size=32'; repeatable, the last match wins."
        ),
    ] = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How much work to put in: fast, default, or best, which takes tens of times as long."
        ),
    ] = "default",
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"rtn only rounds; else any of {', '.join(STAGES)} joined by +.  [default: the preset's]",
        ),
    ] = None,
    objective: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"block or model.  {_default('objective')}")
    ] = None,
    init: Annotated[
        str | None, typer.Option(metavar="NAME", help=f"ones, weight or activation.  {_default('init')}")
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Training steps of each block.  {_default('steps')}"),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="Text file or data set NAME[:CONFIG]:SPLIT.  [default: the model's own samples]"
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(metavar="N", help=f"Calibration sequences.  {_default('samples')}")
    ] = None,
    length: Annotated[int | None, typer.Option(metavar="N", help=f"Tokens of each.  {_default('length')}")] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help=f"Sequences per step.  {_default('batch_size')}")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(metavar="N", help=f"Seed of sampling and training.  {_default('seed')}")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of what stays in float: float32, float16 or bfloat16."),
    ] = DTYPES[0],
    accuracy_level: Annotated[
        int, typer.Option(metavar="0-4", help="MatMulNBits computes in int8 at 4, in float32 at 1.")
    ] = 4,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if quantize wrote it before.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it will take, as the first block tells, and stop there.")
    ] = False,
    save_compiled: Annotated[
        bool, typer.Option("--save-compiled", help=f"Also write OUT/{COMPILED_DIRECTORY}, for teq_graph.load.")
    ] = False,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after.")] = True,
    text: TextFile = None,
    tokens: Tokens = None,
) -> None:
    """Quantize a model and write it as ONNX.

    Chooses codes block by block, so that each block gives what the float one does; writes what onnxruntime and
    onnxruntime-genai load. Says first how large the result will be, and after the first block how long it will take, in
    how much memory: --dry-run stops there. Prints sizes, and perplexity before and after on a text that was not used
    for calibration.
    """
    quantization = QuantizationConfig(
        bits, group_size, symmetric, lm_head, tuple(skip or ()), options.overrides(override), target_bits, embedding
    )
    trained = {
        "objective": objective,
        "init": init,
        "steps": steps,
        "samples": samples,
        "length": length,
        "batch_size": batch_size,
        "seed": seed,
    }
    options.check_choice("dtype", dtype, DTYPES)
    options.check_choice("accuracy-level", accuracy_level, ACCURACY_LEVELS)
    training = options.training(preset, method, {"calibration": calibration, **trained})
    if training is None and target_bits is not None:
        raise ConfigError(f"--target-bits {target_bits}: no effect with --method {method}, which calibrates nothing")
    output = options.output_directory(output, overwrite)
    options.check_calibration(calibration, text)
    if not evaluate:
        options.check_no_text(text, tokens)
    measured = options.text(text, tokens) if evaluate else None
    watch = console.Stopwatch()
    from teq_graph.loading import load_model

    loaded = load_model(model)
    if training is not None:
        options.check_trainable(loaded, calibration)
    token_ids = None if measured is None or loaded.tokenizer is None else options.tokenize(loaded.tokenizer, measured)
    watch.lap("load")
    estimate = _EstimateOf(loaded.name, training, dry_run)
    try:
        with progress.task("Quantizing"):
            compiled = teq_graph.compile(
                loaded.model,
                calibration=calibration,
                quantization=quantization,
                training=training,
                tokenizer=loaded.tokenizer,
                on_estimate=estimate,
            )
    except _Stop:
        pass
    if dry_run:
        console.show_pairs(estimate.lines)
        return
    watch.lap("quantize")
    with progress.task("Exporting to ONNX"):
        compiled.export_onnx(output, dtype=cast(Any, dtype), accuracy_level=accuracy_level, overwrite=overwrite)
    size = sum(file.stat().st_size for file in output.iterdir())
    watch.lap("export")
    lines = [("model", f"{loaded.name} → {output}"), *console.describe_report(compiled.report)]
    lines.append(("calibration", console.describe_calibration(training, calibration)))
    lines.append(("size", console.describe_sizes(compiled.report.bytes_before, size, loaded.model.dtype)))
    if compiled.captured.decoder is not None:
        lines += _describe_decoder(output, compiled.captured.decoder)
    try:
        if measured is not None and token_ids is not None and compiled.captured.decoder is not None:
            level = None if dtype == "bfloat16" else accuracy_level  # onnxruntime has it on GPUs only
            lines += _perplexities(loaded.model, compiled, output, measured, token_ids, level)
            watch.lap("evaluate")
        elif measured is not None:
            lines.append(("perplexity", "not measured: it needs a causal language model with a tokenizer"))
        if save_compiled:
            lines.append(_save(compiled, output))
            watch.lap("save")
    finally:
        # OUT is complete from the export on, whatever becomes of the rest.
        console.show_pairs([*lines, ("time", str(watch))])


def _describe_decoder(output: Path, decoder: DecoderShape) -> list[tuple[str, str]]:
    """What became of attentions, and what onnxruntime-genai makes of the directory."""
    from teq_graph.analysis.attention import AttentionRefusal
    from teq_graph.onnx.export.genai import describe_limits
    from teq_graph.report import REPORT_FILE

    attention = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))["attention"]
    refusals = [AttentionRefusal(**refusal) for refusal in attention["refusals"]]
    lines = console.describe_attention(f"{attention['fused']} fused", refusals)
    return [*lines, *(("note", note) for note in describe_limits(output, decoder))]


def _perplexities(
    model: Any,
    compiled: teq_graph.CompiledModel,
    output: Path,
    text: options.Text,
    token_ids: list[int],
    accuracy_level: int | None,
) -> list[tuple[str, str]]:
    """Of the float model, the quantized graph, and what was exported with `accuracy_level`, where that can be run."""
    from teq_graph.evaluation import perplexity
    from teq_graph.onnx.runtime import OnnxDecoder

    assert compiled.captured.decoder is not None
    context = options.context_of(None, compiled.captured.decoder.max_positions)
    functions: dict[str, Any] = {
        "float": opening.torch_logits(model),
        "quantized": lambda input_ids: compiled(input_ids=input_ids).logits,
    }
    if accuracy_level is not None:
        # What level 4 costs beside level 1: the graph in PyTorch does not round activations.
        where = f"in onnxruntime at accuracy level {accuracy_level}"
        functions[where] = opening.onnx_logits(OnnxDecoder.load(output))
    results = {name: perplexity(logits, token_ids, context=context) for name, logits in functions.items()}
    values = " → ".join(f"{result.value:.2f} {name}" for name, result in results.items())
    count = results["float"].tokens
    return [
        ("perplexity", values),
        ("", f"on {count:,} tokens of {text.name}, not calibrated on; context {context}"),
    ]


def _save(compiled: teq_graph.CompiledModel, output: Path) -> tuple[str, str]:
    try:
        with progress.task("Saving the compiled model"):
            compiled.save(output / COMPILED_DIRECTORY)
    except ExportError as error:
        raise ExportError(f"{output} is complete, but without {COMPILED_DIRECTORY}: {error}") from error
    return "compiled", f"{output / COMPILED_DIRECTORY}, for teq_graph.load"


class _Stop(Exception):  # noqa: N818  nothing went wrong
    """A dry run knows what it wants to know."""


class _EstimateOf:
    """Shows on standard error what the run will take as soon as that is known; ends a dry run then."""

    def __init__(self, model: str, training: TrainingConfig | None, dry_run: bool) -> None:
        self.lines: list[tuple[str, str]] = [("model", model)]
        self._training = training
        self._dry_run = dry_run

    def __call__(self, estimate: Estimate) -> None:
        described = console.describe_estimate(estimate, self._training)
        new = described[len(self.lines) - 1 :]
        self.lines += new
        if not self._dry_run:
            for label, value in new:
                progress.say(f"{label}: {value}")
        elif estimate.seconds is not None or self._training is None or not self._training.learns_by_block:
            raise _Stop
