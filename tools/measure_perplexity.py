"""Perplexity, seconds and peak memory of float, round-to-nearest and trained scales, on one model and text.

Every row is a process of its own, so that its peak memory is its own. All rows read the same tokens of the
test text, in windows of --context that do not overlap; calibration is cut from another text.

    python tools/measure_perplexity.py smollm2 --test wiki.test.raw --calibration wiki.valid.raw --update README.md
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from readme_section import replace_section

import teq_graph
from teq_graph.evaluation import perplexity
from teq_graph.loading import load_model


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--test", type=Path, required=True, help="text that perplexity is measured on")
    parser.add_argument(
        "--calibration", type=Path, help="text to train the scales on; the model's own samples if absent"
    )
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16 * 512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--update", type=Path, help="Markdown file whose section «measured» takes the table")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def measure(args: argparse.Namespace, method: str, bits: int) -> dict[str, Any]:
    """One row, in this process."""
    loaded = load_model(args.model)
    ids = loaded.tokenizer(args.test.read_text(encoding="utf-8"), verbose=False)["input_ids"][: args.tokens]
    tokens = torch.tensor(ids)
    started = time.perf_counter()
    model: Any = loaded.model
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    if method != "float":
        training = None
        if method == "TEQ":
            training = teq_graph.TrainingConfig(steps=args.steps, samples=args.samples, length=args.length)
        model = teq_graph.compile(
            model,
            calibration=args.calibration,
            tokenizer=loaded.tokenizer,
            quantization=teq_graph.QuantizationConfig(bits=bits, group_size=args.group_size),
            training=training,
        )
        size = model.report.bytes_after
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with torch.no_grad():
        value = perplexity(lambda ids: model(input_ids=ids).logits, tokens, context=args.context).value
    return {"method": method, "bits": bits, "perplexity": value, "seconds": seconds, "peak": peak, "bytes": size}


def main() -> None:
    args = parse_arguments()
    if args.row:
        method, bits = args.row.split(":")
        print(json.dumps(measure(args, method, int(bits))))
        return
    rows = [("float", 32), *((method, bits) for bits in args.bits for method in ("RTN", "TEQ"))]
    source = f"`{args.calibration.name}`" if args.calibration else "the model's own samples"
    lines = [
        f"`{args.model}`, perplexity on the first {args.tokens} tokens of `{args.test.name}` in windows of "
        f"{args.context}; scales trained on {args.samples} × {args.length} tokens of {source}, {args.steps} steps "
        "per block; vocabulary projection in float.",
        "",
        "| weights | method | perplexity | compile, seconds | peak memory, MB | graph tensors, MB |",
        "|---|---|---|---|---|---|",
    ]
    for method, bits in rows:
        command = [sys.executable, *sys.argv, "--row", f"{method}:{bits}"]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        row = json.loads(result.stdout.splitlines()[-1])
        weights = "float32" if method == "float" else f"W{bits}g{args.group_size}"
        seconds = "" if method == "float" else f"{row['seconds']:.0f}"
        figures = f"{row['perplexity']:.2f} | {seconds} | {row['peak'] / 1e6:.0f} | {row['bytes'] / 1e6:.0f}"
        lines.append(f"| {weights} | {method} | {figures} |")
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    print(table)
    if args.update:
        replace_section(args.update, "measured", "## Measured\n\n" + table)


if __name__ == "__main__":
    main()
