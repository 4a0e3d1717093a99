"""`teq-graph inspect`: what the graph of a model proves."""

from __future__ import annotations

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
    import torch

    from teq_graph.analysis.attention import find_attentions
    from teq_graph.analysis.blocks import find_blocks
    from teq_graph.compile import analyze
    from teq_graph.loading import load_model

    loaded = load_model(model)
    with progress.task("Analysing"):
        analysis = analyze(loaded.model, quantization=quantization)
    blocks = find_blocks(analysis.captured, analysis.findings.equivalences)
    # Attention is proven by numbers, which half precision is too coarse for; the export widens the graph for it.
    is_single = analysis.captured.dtype == torch.float32
    attentions = find_attentions(analysis.captured) if is_single else None
    inspection = console.Inspection(loaded.name, analysis, blocks, attentions)
    if as_json:
        console.print_json(inspection.to_dict())
    else:
        inspection.show()
