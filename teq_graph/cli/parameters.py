"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teq_graph.cli import options
from teq_graph.config import BITS, GROUP_SIZES, TrainingConfig


def _default(name: str) -> str:
    """What the help says of an option whose default is TrainingConfig's."""
    return f"[default: {getattr(TrainingConfig, name)}]"


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
Verify = Annotated[
    bool, typer.Option("--verify/--no-verify", help="Compare the weights with their checksums, about a second a GB.")
]
Threads = Annotated[
    int | None, typer.Option("--threads", metavar="N", help="CPU threads of onnxruntime.  [default: its own choice]")
]
Provider = Annotated[
    str | None,
    typer.Option("--provider", metavar="NAME", help="Execution provider of onnxruntime: cpu, cuda, …  [default: cpu]"),
]
Bits = Annotated[int, typer.Option("--bits", metavar="N", help=f"Bits of a weight: {BITS}.")]
TargetBits = Annotated[
    float | None,
    typer.Option(
        "--target-bits",
        metavar="N",
        help="Instead, bits for each linear by what it does to the loss, N on average.",
    ),
]
GroupSize = Annotated[
    int,
    typer.Option(
        "--group-size", metavar="N", help=f"Input channels that share a scale: {GROUP_SIZES}; -1 is all of them."
    ),
]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="Without zero points.")]
Override = Annotated[
    list[str] | None,
    typer.Option(
        "--override",
        metavar="PATTERN:…",
        help="As in '*.mlp.*:bits=8,group_size=32'; repeatable, the last match wins.",
    ),
]
Objective = Annotated[
    str | None, typer.Option("--objective", metavar="NAME", help=f"block or model.  {_default('objective')}")
]
Init = Annotated[
    str | None, typer.Option("--init", metavar="NAME", help=f"ones, weight or activation.  {_default('init')}")
]
Steps = Annotated[
    int | None, typer.Option("--steps", metavar="N", help=f"Training steps of each block.  {_default('steps')}")
]
Calibration = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        metavar="FILE",
        help="Text file or data set NAME[:CONFIG]:SPLIT; of a model that hears a WAV file, or a directory of them.  "
        "[default: the model's own samples]",
    ),
]
Samples = Annotated[
    int | None, typer.Option("--samples", metavar="N", help=f"Calibration sequences.  {_default('samples')}")
]
Length = Annotated[int | None, typer.Option("--length", metavar="N", help=f"Tokens of each.  {_default('length')}")]
BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help=f"Sequences per step.  {_default('batch_size')}")
]
Seed = Annotated[
    int | None, typer.Option("--seed", metavar="N", help=f"Seed of sampling and training.  {_default('seed')}")
]
