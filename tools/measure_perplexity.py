"""Perplexity, distance to the float model, seconds and peak memory of this package's methods on one model and text.

Every row is a process of its own, so that its peak memory is its own. All rows read the same tokens of the
test text, in windows of --context that do not overlap; calibration is cut from another text. A method is a preset
(fast, default, best), rtn, or stages joined by +, as for `teq-graph quantize --method`: the table of the stages one by
one is their ablation.

    python tools/measure_perplexity.py smollm2 --test wiki.test.raw --calibration wiki.valid.raw
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from markdown_table import replace_section
from peers.job import peak_bytes

import teq_graph
from teq_graph.cli import options
from teq_graph.config import PRESETS, WeightSpec
from teq_graph.evaluation import divergence, perplexity
from teq_graph.loading import load_model

METHODS = ["rtn", "teq", "gptq", "clip+gptq", "clip+tune", "clip+gptq+tune", "teq+clip+gptq+tune"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--test", type=Path, required=True, help="text that perplexity is measured on")
    parser.add_argument("--calibration", type=Path, help="text to calibrate on; the model's own samples if absent")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--group-size", type=int, default=128)
    parser.add_argument("--symmetric", action="store_true", help="without zero points")
    parser.add_argument("--levels", type=int, help="3 (ternary) or 2 (binary), for --bits 2 --symmetric")
    parser.add_argument("--tokens", type=int, default=16 * 512)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--samples", type=int, help="sequences; the preset's if absent")
    parser.add_argument("--length", type=int, help="tokens of each; the preset's if absent")
    parser.add_argument("--steps", type=int, help="of each block; the preset's if absent")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--update", type=Path, help="Markdown file that takes the table")
    parser.add_argument("--section", default="stages", help="its markers there; what is outside of them stays")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    return parser.parse_args()


def training_of(args: argparse.Namespace, method: str) -> teq_graph.TrainingConfig | None:
    """What a method's name stands for."""
    preset, stages = (method, None) if method in PRESETS else ("default", method)
    changed = {name: getattr(args, name) for name in ("samples", "length", "steps", "seed")}
    return options.training(preset, stages, {} if method == options.RTN else changed)


def spec_of(args: argparse.Namespace, bits: int) -> WeightSpec:
    """How every linear is quantized."""
    return WeightSpec(bits, args.group_size, args.symmetric, args.levels)


def measure(args: argparse.Namespace, method: str, bits: int) -> dict[str, Any]:
    """One row, in this process."""
    loaded = load_model(args.model)
    ids = loaded.tokenizer(args.test.read_text(encoding="utf-8"), verbose=False)["input_ids"][: args.tokens]
    tokens = torch.tensor(ids)
    float_model: Any = loaded.model
    model, size = float_model, sum(p.numel() * p.element_size() for p in float_model.parameters())
    started = time.perf_counter()
    if method != "float":
        model = teq_graph.compile(
            float_model,
            calibration=args.calibration,
            tokenizer=loaded.tokenizer,
            quantization=teq_graph.QuantizationConfig(**dataclasses.asdict(spec_of(args, bits))),
            training=training_of(args, method),
        )
        size = model.report.bytes_after
    seconds = time.perf_counter() - started
    peak = peak_bytes()
    with torch.no_grad():
        logits_fns = [lambda ids, m=m: m(input_ids=ids).logits for m in (float_model, model)]
        value = perplexity(logits_fns[1], tokens, context=args.context).value
        apart = divergence(*logits_fns, tokens, context=args.context)
    return {
        "perplexity": value,
        "kl": apart.kl_divergence,
        "top1": apart.top1_agreement,
        "seconds": seconds,
        "peak": peak,
        "bytes": size,
    }


def line_of(row: dict[str, Any], method: str, weights: str) -> str:
    """A row of the table."""
    cells = [weights, method, f"{row['perplexity']:.2f}"]
    cells += [""] * 3 if method == "float" else [f"{row['kl']:.4f}", f"{row['top1']:.1%}", f"{row['seconds']:.0f}"]
    cells += [f"{row['peak'] / 1e6:.0f}", f"{row['bytes'] / 1e6:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    args = parse_arguments()
    if args.row:
        method, bits = args.row.split(":")
        print(json.dumps(measure(args, method, int(bits))))
        return
    rows = [("float", 32), *((method, bits) for bits in args.bits for method in args.methods)]
    source = f"`{args.calibration.name}`" if args.calibration else "the model's own samples"
    lines = [
        f"`{args.model}`, perplexity and KL divergence from the float model in nats on the first {args.tokens} tokens "
        f"of `{args.test.name}` in windows of {args.context} that do not overlap; calibrated on {source}; vocabulary "
        "projection in float.",
        "",
        "| weights | method | perplexity | KL | top-1 agreement | compile, seconds | peak memory, MB | tensors, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for method, bits in rows:
        command = [sys.executable, *sys.argv, "--row", f"{method}:{bits}"]
        result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        weights = "float32" if method == "float" else str(spec_of(args, bits))
        lines.append(line_of(json.loads(result.stdout.splitlines()[-1]), method, weights))
        print(lines[-1], flush=True)
    table = "\n".join(lines)
    if args.update:
        replace_section(args.update, args.section, table)


if __name__ == "__main__":
    main()
