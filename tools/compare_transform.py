"""What the trained transformation does for other packages' quantizers: each on a model, and on the transformed model.

    python tools/compare_transform.py smollm2 --test wiki.test.raw --calibration wiki.valid.raw --bits 3 --output out

Trains scales by `teq_graph.transform` for these bits on the calibration tokens, writes the model as `teq-graph
transform` does, and gives both models to the methods of `compare_peers.py`, whose options and environments these are.
Each is measured against the float model that the method was given; the two give the same output up to rounding. Writes
transform.md and transform.json in --output.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import compare_peers
import numpy as np
import torch
from peers.methods import METHODS
from peers.process import measure_method

from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.checkpoints.directory import save_float
from teq_graph.compile import transform_with_sites
from teq_graph.errors import TeqGraphError
from teq_graph.loading import load_model
from teq_graph.system import interruption

DEFAULT = ("rtn", "ort-rtn", "ort-hqq", "ort-k-quant", "auto-round-light")


def transform_and_save(args: argparse.Namespace, calibration: Path, target: Path) -> dict[str, Any]:
    """Write the transformed model of `args.model` to `target`; what it took and found."""
    loaded = load_model(args.model)
    batches = list(torch.from_numpy(np.load(calibration)).split(args.batch_size))
    started = time.perf_counter()
    transformed = transform_with_sites(
        loaded.model,
        calibration=batches,
        quantization=QuantizationConfig(bits=args.bits, group_size=args.group_size),
        training=TrainingConfig(batch_size=args.batch_size, seed=args.seed),
    )
    seconds = time.perf_counter() - started
    save_float(transformed.model, target, loaded.tokenizer)
    return {"seconds": seconds, "scales": transformed.report.describe_scales()}


def compare(args: argparse.Namespace) -> None:
    args.output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        sources = {}
        for kind in ("original", "transformed"):
            folder = Path(scratch) / kind
            folder.mkdir()
            given = copy.copy(args)
            if kind == "transformed":
                given.model = str(Path(scratch) / "model")
                trained = transform_and_save(args, Path(sources["original"]["calibration"]), Path(given.model))
            sources[kind], settings, ragged = compare_peers.prepare(given, folder)
        settings |= {"model": args.model, "transformation": trained, "threads": torch.get_num_threads()}
        for name in args.methods:
            for kind, fields in sources.items():
                logs, venvs = args.output / "logs" / kind, args.venvs.absolute()
                row = measure_method(name, fields, venvs=venvs, logs=logs, timeout=args.timeout, ragged=ragged)
                row["on"] = kind
                rows.append(row)
                write(args.output, settings, rows)
                print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """One line of the table; of a method that failed its error."""
    cells = [METHODS[row["method"]].label, row["on"]]
    if error := row.get("error"):
        cells += [f"error: {error}", "", ""]
    else:
        cells += [f"{row['perplexity']:.2f}", f"{row['kl_divergence']:.4f}", f"{row.get('seconds', 0):.1f}"]
    return f"| {' | '.join(cells)} |"


def write(output: Path, settings: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    (output / "transform.json").write_text(json.dumps({"settings": settings, "rows": rows}, indent=1), encoding="utf-8")
    s, trained = settings, settings["transformation"]
    head = (
        f"`{s['model']}`, W{s['bits']}g{s['group_size']} asymmetric; perplexity and KL divergence from the float model "
        f"on {s['tokens']} tokens of `{s['test']}` in windows of {s['context']}. Calibrated on "
        f"{' × '.join(map(str, s['calibration_shape']))} tokens of `{s['calibration']}`. Scales: {trained['scales']}; "
        f"{trained['seconds']:.0f} s, {s['threads']} thread(s)."
    )
    table = ["| method | on | perplexity | KL | seconds |", "|---|---|---|---|---|", *map(line, rows)]
    (output / "transform.md").write_text("\n".join([head, "", *table]) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = compare_peers.parse_arguments(arguments)
    if "--methods" not in arguments:
        args.methods = list(DEFAULT)
    try:
        compare(args)
    except (TeqGraphError, OSError, UnicodeDecodeError) as error:
        compare_peers.Parser().error(" ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.exit(interruption.exit_code())


if __name__ == "__main__":
    interruption.install()  # what ends this ends the method that runs, too
    main()
