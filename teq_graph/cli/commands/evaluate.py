"""`teq-graph evaluate`: perplexity on a text, or the scores of tasks."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from teq_graph.cli import console, opening, options
from teq_graph.cli.parameters import Json, Provider, TextFile, Threads, Tokens, Verify
from teq_graph.errors import ConfigError


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
    verify: Verify = True,
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
        _evaluate_tasks(model, names, task_options, context, threads, provider, verify, as_json)
        return
    measured = options.text(text, tokens)
    opened = opening.open_language_model(model, threads, provider, verify)
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
        console.print_json(content)
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
    verify: bool,
    as_json: bool,
) -> None:
    try:
        from teq_graph.evaluation.tasks import HarnessModel, evaluate_tasks, load_tasks
    except ModuleNotFoundError as error:
        raise ConfigError(f"--tasks: {error}") from error

    started = time.perf_counter()
    loaded = load_tasks(names, task_options["task-dir"])
    opened = opening.open_language_model(model, threads, provider, verify)
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
        console.print_json(content)
        return
    console.show_pairs(
        [("model", f"{model}, in {opened.runtime}"), ("context", str(adapter.max_length)), ("time", f"{seconds:.1f} s")]
    )
    rows = [
        (s.task, s.metric, f"{s.value:.4f}", "" if s.stderr is None else f"{s.stderr:.4f}", str(s.samples))
        for s in scores
    ]
    console.show_table(("task", "metric", "value", "stderr", "documents"), rows)
