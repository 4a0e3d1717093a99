"""The commands, and their errors of usage: inspect, quantize and evaluate here, the others in `run_commands`."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

import teq_graph
from teq_graph import console, opening, options, progress, run_commands
from teq_graph.config import ACCURACY_LEVELS, BITS, DTYPES, GROUP_SIZES, QuantizationConfig, TrainingConfig
from teq_graph.errors import ConfigError, ExportError
from teq_graph.run_commands import Provider, Threads

# torch, transformers and onnxruntime take seconds to import: only inside the commands.
if TYPE_CHECKING:
    from teq_graph.capture import DecoderShape

COMPILED_DIRECTORY = "compiled"
# click's base of all errors of usage; typer has it under different names from version to version
UsageError: type[typer.BadParameter] = typer.BadParameter.__base__  # type: ignore[assignment]

app = typer.Typer(
    name="teq-graph",
    add_completion=False,
    rich_markup_mode=None,
    help=teq_graph.__doc__,
    context_settings={"max_content_width": 100},
)


Model = Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, Hugging Face directory, .gguf file, or smollm2.")]
TextFile = Annotated[
    Path | None, typer.Option("--text", metavar="FILE", help="Text for perplexity.  [default: Python's reference]")
]
Tokens = Annotated[
    int | None,
    typer.Option("--tokens", metavar="N", help=f"Tokens of it to measure perplexity on.  [default: {options.TOKENS}]"),
]
Skip = Annotated[
    list[str] | None, typer.Option("--skip", metavar="PATTERN", help="Weights to leave in float; repeatable.")
]
LmHead = Annotated[bool, typer.Option("--lm-head", help="Quantize the projection onto the vocabulary, too.")]
Embedding = Annotated[
    bool,
    typer.Option("--embedding", help="Quantize the token embedding, too; with --lm-head, a tied one is stored once."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def _default(name: str) -> str:
    """What the help says of an option whose default is TrainingConfig's."""
    return f"[default: {getattr(TrainingConfig, name)}]"


@app.callback(invoke_without_command=True)
def _top(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        typer.echo(f"teq-graph {teq_graph.__version__}")
        raise typer.Exit


@app.command()
def inspect(
    model: Model, lm_head: LmHead = False, embedding: Embedding = False, skip: Skip = None, as_json: Json = False
) -> None:
    """Show equivalences, coverage, and what is left out.

    Analyses the model's graph and trains nothing. Layers that are alike share a row; --json has every one.
    """
    quantization = QuantizationConfig(quantize_lm_head=lm_head, quantize_embedding=embedding, skip=tuple(skip or ()))
    from teq_graph.analysis.blocks import find_blocks
    from teq_graph.compile import analyze
    from teq_graph.graph import get_tensor
    from teq_graph.loading import load_model
    from teq_graph.report import EmbeddingReport, LinearReport

    loaded = load_model(model)
    with progress.task("Analysing"):
        analysis = analyze(loaded.model, quantization=quantization)
    found = analysis.findings
    covered = {name for equivalence in found.equivalences for name in equivalence.linears}
    shapes = {
        name: _shape(get_tensor(analysis.captured.graph_module, name))
        for name, *_ in (*analysis.linears, *analysis.embeddings)
    }
    linears = tuple(
        LinearReport(name, shapes[name], spec, reason, name in covered) for name, spec, reason in analysis.linears
    )
    embeddings = tuple(
        EmbeddingReport(name, shapes[name], spec, reason, name in analysis.specs)
        for name, spec, reason in analysis.embeddings
    )
    blocks = find_blocks(analysis.captured, found.equivalences)
    inspection = console.Inspection(
        loaded.name,
        linears,
        found.equivalences,
        found.refusals,
        blocks,
        analysis.other_weights,
        analysis.notes,
        embeddings,
    )
    if as_json:
        _print_json(inspection.to_dict())
    else:
        inspection.show()


@app.command()
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
            help=f"rtn only rounds; else any of {', '.join(options.METHODS)} joined by +.  [default: the preset's]",
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
    save_compiled: Annotated[
        bool, typer.Option("--save-compiled", help=f"Also write OUT/{COMPILED_DIRECTORY}, for teq_graph.load.")
    ] = False,
    evaluate: Annotated[bool, typer.Option(help="Measure perplexity before and after.")] = True,
    text: TextFile = None,
    tokens: Tokens = None,
) -> None:
    """Quantize a model and write it as ONNX.

    Chooses codes block by block, so that each block gives what the float one does; writes what onnxruntime and
    onnxruntime-genai load. Prints sizes, and perplexity before and after on a text that was not used for
    calibration.
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
    with progress.task("Quantizing"):
        compiled = teq_graph.compile(
            loaded.model,
            calibration=calibration,
            quantization=quantization,
            training=training,
            tokenizer=loaded.tokenizer,
        )
    watch.lap("quantize")
    with progress.task("Exporting to ONNX"):
        compiled.export_onnx(output, dtype=cast(Any, dtype), accuracy_level=accuracy_level, overwrite=overwrite)
    size = sum(file.stat().st_size for file in output.iterdir())
    watch.lap("export")
    lines = [("model", f"{loaded.name} → {output}"), *console.describe_report(compiled.report, training is not None)]
    lines.append(("calibration", console.describe_calibration(training, calibration)))
    lines.append(("size", console.describe_sizes(compiled.report.bytes_before, size, loaded.model.dtype)))
    decoder = compiled.captured.decoder
    if decoder is not None:
        lines += _genai_notes(output, decoder)
    try:
        if measured is not None and decoder is not None and token_ids is not None:
            from teq_graph.evaluation import perplexity
            from teq_graph.onnx.runtime import OnnxDecoder

            context = options.context_of(None, decoder.max_positions)
            functions = {
                "float": opening.torch_logits(loaded.model),
                "quantized": lambda input_ids: compiled(input_ids=input_ids).logits,
            }
            if dtype != "bfloat16":  # which onnxruntime has on GPUs only
                # What level 4 costs beside level 1: the graph in PyTorch does not round activations.
                where = f"in onnxruntime at accuracy level {accuracy_level}"
                functions[where] = opening.onnx_logits(OnnxDecoder.load(output))
            results = {name: perplexity(logits, token_ids, context=context) for name, logits in functions.items()}
            values = " → ".join(f"{result.value:.2f} {name}" for name, result in results.items())
            lines.append(("perplexity", values))
            count = results["float"].tokens
            lines.append(("", f"on {count:,} tokens of {measured.name}, not calibrated on; context {context}"))
            watch.lap("evaluate")
        elif measured is not None:
            lines.append(("perplexity", "not measured: it needs a causal language model with a tokenizer"))
        if save_compiled:
            try:
                with progress.task("Saving the compiled model"):
                    compiled.save(output / COMPILED_DIRECTORY)
            except ExportError as error:
                raise ExportError(f"{output} is complete, but without {COMPILED_DIRECTORY}: {error}") from error
            lines.append(("compiled", f"{output / COMPILED_DIRECTORY}, for teq_graph.load"))
            watch.lap("save")
    finally:
        # OUT is complete from the export on, whatever becomes of the rest.
        console.show_pairs([*lines, ("time", str(watch))])


app.command()(run_commands.generate)
app.command()(run_commands.serve)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_OUT", help="As for inspect, or what quantize wrote.")],
    text: TextFile = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens of a window.  [default: {options.CONTEXT}, or what fits; with --tasks the model's positions]",
        ),
    ] = None,
    tokens: Tokens = None,
    stride: Annotated[
        int | None, typer.Option(metavar="N", help="Tokens between windows.  [default: the context]")
    ] = None,
    reference: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="Also compare predictions with it: KL divergence, top-1 agreement."),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…",
            help="Instead of a text, tasks of lm-evaluation-harness, which pip install teq-graph[tasks] brings; "
            f"in TEQ's paper: {','.join(options.PAPER_TASKS)}.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", help="Documents of each task.  [default: all]")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(metavar="N", help="Examples before each question.  [default: the task's own number]")
    ] = None,
    task_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Further tasks, as the harness's YAML files.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences of a task at a time.  [default: 8]")
    ] = None,
    threads: Threads = None,
    provider: Provider = None,
    as_json: Json = False,
) -> None:
    """Measure perplexity on a text, or the scores of tasks.

    In PyTorch; for a directory that quantize wrote, in onnxruntime.
    """
    task_options = {"limit": limit, "num-fewshot": num_fewshot, "task-dir": task_dir, "batch-size": batch_size}
    text_options = {"text": text, "tokens": tokens, "stride": stride, "reference": reference}
    names = options.tasks(tasks, task_options, text_options)
    if names:
        options.check_range("context", context, 2)
        _evaluate_tasks(model, names, task_options, context, threads, provider, as_json)
        return
    measured = options.text(text, tokens)
    opened = opening.open_language_model(model, threads, provider)
    other = None if reference is None else opening.open_language_model(reference, None, None)
    from teq_graph.evaluation import divergence, perplexity

    limits = [one.max_positions for one in (opened, other) if one is not None and one.max_positions is not None]
    context = options.context_of(context, min(limits, default=None))
    ids = options.tokenize(opened.tokenizer, measured)
    if other is not None:
        options.check_reference(other, opened, measured, ids)
    result = perplexity(opened.logits_fn, ids, context=context, stride=stride)
    stride = stride or context
    apart = None if other is None else divergence(other.logits_fn, opened.logits_fn, ids, context=context)
    if as_json:
        content = {
            "model": model,
            "runtime": opened.runtime,
            "text": measured.name,
            "context": context,
            "stride": stride,
            "tokens": result.tokens,
            "perplexity": result.value,
            "seconds": result.seconds,
        }
        if apart is not None:
            content["reference"] = {"model": reference, **dataclasses.asdict(apart)}
        _print_json(content)
        return
    windows = "do not overlap" if stride == context else f"stride {stride}: each predicts what the one before did not"
    lines = [
        ("model", f"{model}, in {opened.runtime}"),
        ("text", f"{result.tokens:,} tokens of {measured.name}; context {context}"),
        ("windows", windows),
        ("perplexity", f"{result.value:.3f}"),
        ("time", f"{result.seconds:.1f} s"),
    ]
    if apart is not None and other is not None:
        lines += [
            ("reference", f"{reference}, in {other.runtime}; {apart.tokens:,} tokens, windows that do not overlap"),
            ("KL divergence", f"{apart.kl_divergence:.5f} nats, of reference || model"),
            ("top-1 agreement", f"{apart.top1_agreement:.2%}"),
        ]
    console.show_pairs(lines)


def _evaluate_tasks(
    model: str,
    names: Sequence[str],
    task_options: dict[str, Any],
    context: int | None,
    threads: int | None,
    provider: str | None,
    as_json: bool,
) -> None:
    try:
        from teq_graph.evaluation_tasks import HarnessModel, evaluate_tasks, load_tasks
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks: {error}") from error

    started = time.perf_counter()
    loaded = load_tasks(names, task_options["task-dir"])
    opened = opening.open_language_model(model, threads, provider)
    # None: all the model's positions
    context = opened.max_positions if context is None else options.context_of(context, opened.max_positions)
    adapter = HarnessModel(opened.logits_fn, opened.tokenizer, context, task_options["batch-size"] or 8)
    scores = evaluate_tasks(adapter, loaded, limit=task_options["limit"], num_fewshot=task_options["num-fewshot"])
    seconds = time.perf_counter() - started
    if as_json:
        content = {
            "model": model,
            "runtime": opened.runtime,
            "context": adapter.max_length,
            "tasks": [dataclasses.asdict(score) for score in scores],
            "seconds": seconds,
        }
        _print_json(content)
        return
    console.show_pairs(
        [("model", f"{model}, in {opened.runtime}"), ("context", str(adapter.max_length)), ("time", f"{seconds:.1f} s")]
    )
    rows = [
        (s.task, s.metric, f"{s.value:.4f}", "" if s.stderr is None else f"{s.stderr:.4f}", str(s.samples))
        for s in scores
    ]
    console.show_table(("task", "metric", "value", "stderr", "documents"), rows)


def _shape(tensor: Any) -> tuple[int, int]:
    rows, columns = tensor.shape
    return rows, columns


def _genai_notes(output: Path, decoder: DecoderShape) -> list[tuple[str, str]]:
    """What onnxruntime-genai makes of a directory, where that is not what one expects."""
    from teq_graph.onnx.directory import GENAI_FILE
    from teq_graph.onnx.genai import DEFAULT_CONTEXT

    if not (output / GENAI_FILE).is_file():
        reason = "onnxruntime-genai has one number of KV heads and one head size for all layers, keys and values"
        return [("note", f"without {GENAI_FILE}: {reason}")]
    if decoder.max_positions is None:
        return [("note", f"the model names no greatest length; {GENAI_FILE} says {DEFAULT_CONTEXT} tokens")]
    return []


def _print_json(content: Any) -> None:
    typer.echo(json.dumps(content, indent=2, ensure_ascii=False))


# -------------------------------------------------------------------------------------------------------- invoke


def invoke(arguments: Sequence[str]) -> int:
    """Runs one command, and lets every exception through: `Typer.__call__` has its own ideas about some."""
    command = typer.main.get_command(app)
    try:
        with command.make_context("teq-graph", list(arguments) or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as error:
        return error.exit_code
    return 0
