"""`teq-graph transform`: an equal float model that is easier to quantize, for other packages."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from teq_graph.cli import calibrating, console, options
from teq_graph.cli.parameters import (
    BatchSize,
    Bits,
    Calibration,
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
)
from teq_graph.config import DTYPES, QuantizationConfig
from teq_graph.system import progress
from teq_graph.system.directories import reserved

# torch and transformers take seconds to import: only inside the command.


def transform(
    context: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="Directory to write.")],
    bits: Bits = QuantizationConfig.bits,
    target_bits: TargetBits = None,
    group_size: GroupSize = QuantizationConfig.group_size,
    symmetric: Symmetric = False,
    lm_head: LmHead = False,
    skip: Skip = None,
    override: Override = None,
    objective: Objective = None,
    init: Init = None,
    steps: Steps = None,
    calibration: Calibration = None,
    samples: Samples = None,
    length: Length = None,
    batch_size: BatchSize = None,
    seed: Seed = None,
    dtype: Annotated[
        str | None,
        typer.Option(metavar="NAME", help=f"Of what is written: {', '.join(DTYPES)}.  [default: the model's own]"),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace DIR if transform wrote it before.")] = False,
    as_json: Json = False,
) -> None:
    """Train scales for low bits, and write the float model with them folded in.

    DIR is an ordinary Hugging Face directory with the model's own class, names, dtype and output: input for any
    other quantizer. Bits, groups and patterns say what it is to be quantized to. Nothing is quantized.
    """
    quantization = QuantizationConfig(
        bits, group_size, symmetric, lm_head, tuple(skip or ()), options.overrides(override), target_bits
    )
    given = {"objective": objective, "init": init, "steps": steps, "samples": samples, "length": length}
    given |= {"batch_size": batch_size, "seed": seed, "calibration": calibration}
    training = options.training("default", "teq", given)
    assert training is not None
    if dtype is not None:
        options.check_choice("dtype", dtype, DTYPES)
    output = options.output_directory(output, overwrite)
    calibrating.check_calibration(calibration, None)
    watch = console.Stopwatch()
    with reserved(output, overwrite):
        from teq_graph.checkpoints.directory import save_float
        from teq_graph.compile import transform_with_sites
        from teq_graph.loading import load_model
        from teq_graph.provenance import describe_source, settings

        loaded = load_model(model)
        calibrating.check_trainable(loaded, calibration, "")
        watch.lap("load")
        with progress.task("Training scales"):
            transformed = transform_with_sites(
                loaded.model,
                calibration=calibrating.inputs_of(loaded, calibration),
                quantization=quantization,
                training=training,
                tokenizer=loaded.tokenizer,
            )
        watch.lap("train")
        dtype = dtype or (loaded.stored_dtype if loaded.stored_dtype in DTYPES else None)
        with progress.task("Writing the model"):
            provenance = {
                "source": describe_source(loaded, model),
                **settings(quantization, training, ("teq",), calibration),
                "command": shlex.join(["teq-graph", *context.obj]),
            }
            save_float(transformed.model, output, loaded.tokenizer, dtype, overwrite, provenance)
        watch.lap("write")
    report = transformed.report
    if as_json:
        console.print_json(
            {
                "model": loaded.name,
                "output": str(output),
                "dtype": dtype or "float32",
                "equivalences": len(report.sites) + transformed.left,
                "trained": sum(site.trained for site in report.sites),
                "folded": sum(site.folded for site in report.sites),
                "block_errors": [{"before": block.before, "after": block.after} for block in report.blocks],
                "seconds": watch.to_dict(),
            }
        )
        return
    lines = [("model", f"{loaded.name} → {console.path(output)}"), ("equivalences", report.describe_scales())]
    if transformed.left:
        lines.append(("", f"{transformed.left} more are not over parameters alone, and are left"))
    if report.blocks:
        lines.append(("block error", report.describe_errors()))
    lines.append(("calibration", console.describe_calibration(training, calibration)))
    lines.append(("written", f"{dtype or 'float32'}, an ordinary Hugging Face directory"))
    console.show_pairs([*lines, ("time", str(watch))])
