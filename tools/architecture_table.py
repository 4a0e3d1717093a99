"""The table of README: every architecture of the tests, tiny and random, through analysis, folding and ONNX.

python tools/architecture_table.py --update README.md
"""

from __future__ import annotations

import argparse
import collections
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from markdown_table import replace_section
from support.architectures import ARCHITECTURES, Architecture
from support.graphs import apply_random_scales, leaves, relative_error
from support.onnx import OnnxModel

import teq_graph
from teq_graph.analysis.equivalences.equivalence import Equivalence
from teq_graph.compile import analyze
from teq_graph.graph.products import product_nodes, weight_name_of

HEADER = """\
| architecture | linears, convs | with scaled columns | equivalences | error after folding | ONNX against PyTorch |
|---|---|---|---|---|---|"""
LEGEND = """\
Equivalences by producer. Error after folding: of the float output, scales random from 0.1 to 10. ONNX: 4-bit model in
onnxruntime at accuracy_level 1 against the PyTorch graph. Both are the largest difference over the largest value."""


def describe(equivalences: tuple[Equivalence, ...]) -> str:
    """Counts by kind of producer."""
    counts = collections.Counter(equivalence.kind for equivalence in equivalences)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items()) or "none"


@torch.no_grad()
def row(architecture: Architecture) -> str:
    """One line of the table, on fresh random weights and inputs."""
    model = architecture.build()
    shapes = (architecture.example_inputs, architecture.dynamic_shapes)
    captured, findings = (analysis := analyze(model, *shapes)).captured, analysis.findings
    inputs = architecture.inputs(3, 9)
    args, kwargs = captured.bind(inputs)
    before = leaves(captured.graph_module(*args, **kwargs))[0]
    linears = [weight_name_of(linear) for linear in product_nodes(captured.graph_module)]
    scaled = {name for equivalence in findings.equivalences for name in equivalence.linears}
    apply_random_scales(captured.graph_module, findings.equivalences)
    folding = relative_error(leaves(captured.graph_module(*args, **kwargs))[0], before)

    quantization = teq_graph.QuantizationConfig(bits=4, group_size=16)
    compiled = teq_graph.compile(model, *shapes, quantization=quantization, training=None)
    expected = leaves(compiled(**inputs) if isinstance(inputs, dict) else compiled(*inputs))[0]
    with tempfile.TemporaryDirectory() as directory:
        onnx_model = OnnxModel(compiled.export_onnx(Path(directory) / "out", accuracy_level=1))
        if architecture.is_decoder:
            actual, _ = onnx_model.step(compiled, inputs["input_ids"], None)
        else:
            actual = onnx_model.run(inputs)
    covered = sum(name in scaled for name in linears)
    kinds = describe(findings.equivalences)
    parity = relative_error(actual, expected)
    return f"| {architecture} | {len(linears)} | {covered} | {kinds} | {folding:.0e} | {parity:.0e} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--update", type=Path, help="Markdown file whose section «coverage» takes the table")
    arguments = parser.parse_args()
    lines = [HEADER]
    print(HEADER)
    for architecture in ARCHITECTURES:
        lines.append(row(architecture))
        print(lines[-1], flush=True)
    if arguments.update:
        replace_section(arguments.update, "coverage", "\n".join(lines) + "\n\n" + LEGEND)


if __name__ == "__main__":
    main()
