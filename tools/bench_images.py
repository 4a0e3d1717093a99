"""Images a second and file sizes of an image model in onnxruntime: its float export, and ours at several bits.

Weights are random: speed and size do not depend on them. All sessions take turns on one image; a ratio is that of one
turn to the float export's beside it.

    python tools/bench_images.py resnet --config '{"depths": [2, 2, 2, 2], "layer_type": "basic"}'
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForImageClassification

import teq_graph
from teq_graph.onnx.runtime import load


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="a model type of transformers")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: fields of its configuration")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--size", type=int, default=224, help="height and width of the image")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    model = AutoModelForImageClassification.from_config(AutoConfig.for_model(args.family, **args.config)).eval()
    pixels = torch.randn(1, model.config.num_channels, args.size, args.size)
    with tempfile.TemporaryDirectory() as folder:
        sessions, sizes = {}, {}
        for bits in (32, *args.bits):
            skip = ("*",) if bits == 32 else ()
            quantization = teq_graph.QuantizationConfig(4 if bits == 32 else bits, args.group_size, skip=skip)
            compiled = teq_graph.compile(
                model,
                {"pixel_values": pixels.repeat(2, 1, 1, 1)},
                {"pixel_values": {0: torch.export.Dim.DYNAMIC}},
                quantization=quantization,
                training=None,
            )
            directory = compiled.export_onnx(Path(folder) / str(bits))
            sizes[bits] = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
            sessions[bits] = load(directory, threads=args.threads)
        seconds: dict[int, list[float]] = {bits: [] for bits in sessions}
        for turn in range(args.rounds + 1):
            for bits, session in sessions.items():
                started = time.perf_counter()
                session.run(pixel_values=pixels.numpy())
                if turn:  # the first warms up
                    seconds[bits].append(time.perf_counter() - started)
    print("| weights | ms an image | times as fast as float (quartiles) | files, MB |\n|---|---|---|---|")
    for bits, times in seconds.items():
        ratios = [of_float / mine for of_float, mine in zip(seconds[32], times, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        name = "float32" if bits == 32 else f"W{bits}g{args.group_size}"
        print(
            f"| {name} | {1000 * statistics.median(times):.1f} | {middle:.2f} ({low:.2f}–{high:.2f}) "
            f"| {sizes[bits] / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
