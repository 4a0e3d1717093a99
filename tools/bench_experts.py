"""Decoding speed and file sizes of a mixture of experts in onnxruntime: its float export, and ours at several bits.

Weights are random: speed and size do not depend on them. All sessions take turns; a ratio is that of one turn to the
float export's beside it.

    python tools/bench_experts.py mixtral
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import teq_graph
from teq_graph.onnx.runtime import load

EIGHT_EXPERTS = dict(
    **dict(vocab_size=1024, hidden_size=1024, intermediate_size=2048, num_hidden_layers=4, num_attention_heads=16),
    **dict(num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=1024),
)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("family", help="a model type of transformers")
    parser.add_argument("--config", type=json.loads, default={}, help="JSON: fields of its configuration")
    parser.add_argument("--bits", type=int, nargs="+", default=[8, 4, 3, 2])
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--tokens", type=int, default=16, help="that are generated in a turn")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    torch.manual_seed(0)
    config = AutoConfig.for_model(args.family, **{**EIGHT_EXPERTS, **args.config})
    model = AutoModelForCausalLM.from_config(config).eval()
    prompt = torch.randint(config.vocab_size, (1, args.prompt))
    with tempfile.TemporaryDirectory() as folder:
        decoders, sizes = {}, {}
        for bits in (32, *args.bits):
            skip = ("*",) if bits == 32 else ()
            quantization = teq_graph.QuantizationConfig(4 if bits == 32 else bits, args.group_size, skip=skip)
            compiled = teq_graph.compile(model, quantization=quantization, training=None)
            directory = compiled.export_onnx(Path(folder) / str(bits))
            sizes[bits] = sum(file.stat().st_size for file in directory.glob("model.onnx*"))
            decoders[bits] = load(directory, threads=args.threads)
        prefills: dict[int, list[float]] = {bits: [] for bits in decoders}
        steps: dict[int, list[float]] = {bits: [] for bits in decoders}
        for turn in range(args.rounds + 1):
            for bits, decoder in decoders.items():
                prefill, step = seconds_of(decoder, prompt, args.tokens)
                if turn:  # the first warms up
                    prefills[bits].append(prefill)
                    steps[bits].append(step)
    print(f"| weights | prefill of {args.prompt}, tokens/s | × float | decode, tokens/s | × float | files, MB |")
    print("|---|---|---|---|---|---|")
    for bits in decoders:
        name = "float32" if bits == 32 else f"W{bits}g{args.group_size}"
        of_prompt, of_step = (
            f"{count / statistics.median(times[bits]):.0f} | {ratio(times[32], times[bits])}"
            for count, times in ((args.prompt, prefills), (1, steps))
        )
        print(f"| {name} | {of_prompt} | {of_step} | {sizes[bits] / 1e6:.0f} |")


def seconds_of(decoder: Any, prompt: torch.Tensor, tokens: int) -> tuple[float, float]:
    """Seconds of a prompt, and of one token after it."""
    started = time.perf_counter()
    arrivals = [time.perf_counter() for _ in decoder.stream(prompt[0].tolist(), max_new_tokens=tokens)]
    return arrivals[0] - started, (arrivals[-1] - arrivals[0]) / (len(arrivals) - 1)


def ratio(of_float: list[float], mine: list[float]) -> str:
    """Median and quartiles of how many times as fast."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(of_float, mine, strict=True)], n=4)
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


if __name__ == "__main__":
    main()
