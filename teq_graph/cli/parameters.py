"""Arguments and options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from teq_graph.cli import options

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
