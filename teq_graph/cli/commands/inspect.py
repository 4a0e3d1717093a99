"""`teq-graph inspect`: what the graph of a model proves."""

from __future__ import annotations

from typing import Any

from teq_graph.cli import console
from teq_graph.cli.parameters import Embedding, Json, LmHead, Model, Skip
from teq_graph.config import QuantizationConfig
from teq_graph.system import progress

# torch and transformers take seconds to import: only inside the command.


def inspect(
    model: Model, lm_head: LmHead = False, embedding: Embedding = False, skip: Skip = None, as_json: Json = False
) -> None:
    """Show equivalences, coverage, and what is left out.

    Analyses the model's graph and trains nothing. Layers that are alike share a row; --json has every one.
    """
    quantization = QuantizationConfig(quantize_lm_head=lm_head, quantize_embedding=embedding, skip=tuple(skip or ()))
    from teq_graph.analysis.blocks import find_blocks
    from teq_graph.compile import analyze
    from teq_graph.graph.tensors import get_tensor
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
        console.print_json(inspection.to_dict())
    else:
        inspection.show()


def _shape(tensor: Any) -> tuple[int, int]:
    rows, columns = tensor.shape
    return rows, columns
