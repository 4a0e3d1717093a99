"""`teq-graph quantize`: a model in low bits, as ONNX."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import teq_graph
from teq_graph.checkpoints import FORMATS
from teq_graph.cli import calibrating, console, opening, options
from teq_graph.cli.outcome import Quantized
from teq_graph.cli.parameters import (
    BatchSize,
    Bits,
    Calibration,
    Embedding,
    GroupSize,
    Init,
    Json,
    Length,
    LmHead,
    Model,
    Objective,
    Override,
    Samples,
    Seed,
    Skip,
    Steps,
    Symmetric,
    TargetBits,
    TextFile,
    Tokens,
)
from teq_graph.config import ACCURACY_LEVELS, DTYPES, STAGES, QuantizationConfig, TrainingConfig
from teq_graph.errors import ConfigError, ExportError
from teq_graph.system import progress
from teq_graph.system.directories import reserved

# torch, transformers and onnxruntime take seconds to import: only inside the command.
if TYPE_CHECKING:
    from teq_graph.estimate import Estimate

COMPILED_DIRECTORY = "compiled"


def quantize(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to write.")],
    bits: Bits = QuantizationConfig.bits,
    target_bits: TargetBits = None,
    group_size: GroupSize = QuantizationConfig.group_size,
    symmetric: Symmetric = False,
    levels: Annotated[
        int | None,
        typer.Option(metavar="N", help="Experimental: 3 (ternary) or 2 (binary), for --bits 2 --symmetric."),
    ] = None,
    for_cuda: Annotated[
        bool,
        typer.Option(
            "--for-cuda",
            help="For onnxruntime's fused CUDA kernels: symmetric, groups of 32 (64 at 2 bits), float16.",
        ),
    ] = False,
    lm_head: LmHead = False,
    embedding: Embedding = False,
    skip: Skip = None,
    override: Override = None,
    preset: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="How much work to put in: fast, default, or best, which takes several times as long."
        ),
    ] = "default",
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"rtn only rounds; else any of {', '.join(STAGES)} joined by +.  [default: the preset's]",
        ),
    ] = None,
    objective: Objective = None,
    init: Init = None,
    steps: Steps = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    device: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Where codes are trained: cpu or cuda.  [default: cpu]"),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(metavar="NAME", help="Of what stays in float: float32, float16 or bfloat16."),
    ] = DTYPES[0],
    accuracy_level: Annotated[
        int, typer.Option(metavar="0-4", help="MatMulNBits computes in int8 at 4, in float32 at 1.")
    ] = 4,
    formats: Annotated[
        list[str] | None,
        typer.Option(
            "--format",
            metavar="NAME",
            help=f"Also write OUT/NAME, safetensors for transformers: {' or '.join(FORMATS)}; repeatable.",
        ),
    ] = None,
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
    as_json: Json = False,
) -> None:
    """Quantize a model and write it as ONNX.

    Chooses codes block by block, so that each block gives what the float one does; writes what onnxruntime and
    onnxruntime-genai load. Says first how large the result will be, and after the first block how long it will take, in
    how much memory: --dry-run stops there. Prints sizes, and perplexity before and after on a text that was not used
    for calibration.
    """
    grids: dict[str, Any] = {
        "group_size": group_size,
        "symmetric": symmetric,
        "target_bits": target_bits,
        "levels": levels,
    }
    make: Callable[..., QuantizationConfig] = QuantizationConfig
    if for_cuda:
        make = QuantizationConfig.for_cuda
        grids = {name: value for name, value in grids.items() if options.was_given(context, name)}
        if options.was_given(context, "dtype"):
            options.check_choice("dtype", dtype, ("float16",))
        dtype = "float16"
    quantization = make(
        bits=bits,
        **grids,
        quantize_lm_head=lm_head,
        skip=tuple(skip or ()),
        overrides=options.overrides(override),
        quantize_embedding=embedding,
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
    formats = list(dict.fromkeys(formats or ()))
    for name in formats:
        options.check_choice("format", name, FORMATS)
    training = options.training(preset, method, {"calibration": calibration, **trained})
    if training is None and target_bits is not None:
        raise ConfigError(f"--target-bits {target_bits}: no effect with --method {method}, which calibrates nothing")
    output = options.output_directory(output, overwrite)
    calibrating.check_calibration(calibration, text)
    if not evaluate:
        options.check_no_text(text, tokens)
    measured = options.text(text, tokens) if evaluate else None
    watch = console.Stopwatch()
    with reserved(output, overwrite):
        from teq_graph.capture import usable_device
        from teq_graph.checkpoints.formats import check_linears, check_quantization
        from teq_graph.loading import load_model

        check_quantization(formats, quantization)
        if device is not None:
            usable_device(device)
        loaded = load_model(model)
        check_linears(formats, loaded.model, quantization)
        if training is not None:
            calibrating.check_trainable(loaded, calibration)
        ids = None if measured is None or loaded.tokenizer is None else options.tokenize(loaded.tokenizer, measured)
        watch.lap("load")
        estimate = _EstimateOf(loaded.name, training, dry_run)
        try:
            with progress.task("Quantizing"):
                compiled = teq_graph.compile(
                    loaded.model,
                    calibration=calibrating.inputs_of(loaded, calibration),
                    quantization=quantization,
                    training=training,
                    tokenizer=loaded.tokenizer,
                    feature_extractor=loaded.feature_extractor,
                    on_estimate=estimate,
                    device=device,
                )
        except _Stop:
            pass
        if dry_run:
            estimate.show(output, as_json)
            return
        if "gptq" in formats:
            from teq_graph.checkpoints.quantized import round_scales

            round_scales(compiled)  # before anything is written: all formats hold the same values
        watch.lap("quantize")
        with progress.task("Exporting to ONNX"):
            from teq_graph.provenance import describe_source

            provenance = {
                "source": describe_source(loaded, model),
                "command": shlex.join(["teq-graph", *context.obj]),
                "preset": None if training is None else preset,
            }
            compiled.export_onnx(
                output,
                dtype=cast(Any, dtype),
                accuracy_level=accuracy_level,
                overwrite=overwrite,
                provenance=provenance,
            )
        watch.lap("export")
        result = Quantized(loaded.name, str(loaded.model.dtype), output, compiled, training, calibration, watch)
        try:
            for name in formats:
                from teq_graph.checkpoints.quantized import save_codes

                with _beside(output, name, f"Writing {name}"):
                    result.formats[name] = save_codes(
                        compiled, loaded.model, output / name, name, provenance=provenance
                    )
            if formats:
                watch.lap("formats")
            if measured is not None and ids is not None and compiled.captured.decoder is not None:
                level = None if dtype == "bfloat16" else accuracy_level  # onnxruntime has it on GPUs only
                result.perplexity = _perplexities(loaded.model, compiled, output, measured, ids, level)
                watch.lap("evaluate")
            elif measured is not None:
                result.perplexity = "not measured: it needs a causal language model with a tokenizer"
            if save_compiled:
                with _beside(output, COMPILED_DIRECTORY, "Saving the compiled model"):
                    result.saved = compiled.save(output / COMPILED_DIRECTORY)
                watch.lap("save")
        finally:
            # OUT is complete from the export on, whatever becomes of the rest.
            result.show(as_json)


def _perplexities(
    model: Any,
    compiled: teq_graph.CompiledModel,
    output: Path,
    text: options.Text,
    token_ids: list[int],
    accuracy_level: int | None,
) -> dict[str, Any]:
    """Of the float model, the quantized graph, and what was exported with `accuracy_level`, where that can be run.

    OUT's description and card tell of it, too.
    """
    from teq_graph.evaluation import perplexity
    from teq_graph.onnx.export.card import record
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
        functions[where] = opening.onnx_logits(OnnxDecoder.load(output, verify=False))  # written a moment ago
    results = {name: perplexity(logits, token_ids, context=context) for name, logits in functions.items()}
    measured = {
        "values": {name: result.value for name, result in results.items()},
        "text": text.name,
        "text_sha256": hashlib.sha256(text.content.encode("utf-8", "backslashreplace")).hexdigest(),
        "tokens": results["float"].tokens,
        "context": context,
    }
    record(output, perplexity=measured)
    return measured


@contextlib.contextmanager
def _beside(output: Path, name: str, doing: str) -> Iterator[None]:
    """Says of what fails to be written inside a complete OUT that OUT is."""
    try:
        with progress.task(doing):
            yield
    except (ConfigError, ExportError) as error:
        raise ExportError(f"{output} is complete, but without {name}: {error}") from error


class _Stop(Exception):  # noqa: N818  nothing went wrong
    """A dry run knows what it wants to know."""


class _EstimateOf:
    """Shows on standard error what the run will take as soon as that is known; ends a dry run then."""

    def __init__(self, model: str, training: TrainingConfig | None, dry_run: bool) -> None:
        self._model = model
        self._lines: list[tuple[str, str]] = []
        self._estimate: Estimate | None = None
        self._training = training
        self._dry_run = dry_run

    def __call__(self, estimate: Estimate) -> None:
        described = console.describe_estimate(estimate)
        new = described[len(self._lines) :]
        self._lines, self._estimate = described, estimate
        if not self._dry_run:
            for label, value in new:
                progress.say(f"{label}: {value}")
        elif estimate.seconds is not None or self._training is None or not self._training.learns_by_block:
            raise _Stop

    def show(self, output: Path, as_json: bool) -> None:
        """Print what is known at the end of a dry run."""
        if as_json:
            found = None if self._estimate is None else dataclasses.asdict(self._estimate)
            console.print_json({"model": self._model, "output": str(output), "estimate": found})
        else:
            console.show_pairs([("model", self._model), *self._lines])
