"""Training on a GPU: the time of `compile` at `default` for a Llama of random weights, and its codes beside the CPU's.

    python tools/bench_training.py smollm2-135m --seconds 120 --json training.jsonl

MODEL is a shape of `random_llama.py`. Codes first: a tiny one is compiled on the CPU and on the GPU from the same
random tokens, once choosing codes without training (clip, gptq), once at `default`; the share of codes that are equal.
Then MODEL, on 64 × 256 random tokens, in 3 bits: where the time that the first block tells does not fit into --seconds,
it is begun anew with as many of its layers as do, all else being `default`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from json_lines import append
from markdown_table import table_of
from random_llama import SHAPES, random_llama
from torch import Tensor

import teq_graph
from teq_graph.estimate import Estimate
from teq_graph.graph.nodes import arguments_of, is_call
from teq_graph.graph.tensors import node_tensor
from teq_graph.quantization.packing import unpack_codes

MARGIN = 0.85
"""Of the time: estimates are no measurements, and what follows the last block takes its own."""


class TooLongError(Exception):
    """The whole takes more than there is."""

    def __init__(self, seconds: float) -> None:
        super().__init__(seconds)
        self.seconds = seconds


def tokens_for(model: Any, samples: int, length: int) -> Tensor:
    return torch.randint(1, model.config.vocab_size, (samples, length))


def compile_on(
    device: str,
    model: Any,
    tokens: Tensor,
    group_size: int,
    on_estimate: Callable[[Estimate], None] | None = None,
    **options: Any,
) -> Any:
    return teq_graph.compile(
        model,
        calibration=tokens,
        quantization=teq_graph.QuantizationConfig(bits=3, group_size=group_size),
        training=teq_graph.TrainingConfig.preset("default", **options),
        on_estimate=on_estimate,
        device=device,
    )


def codes_of(compiled: Any) -> Tensor:
    """All of them, one after the other."""
    found = []
    for node in compiled.graph_module.graph.nodes:
        if is_call(node, torch.ops.teq_graph.matmul_nbits.default):
            values = arguments_of(node)
            found.append(unpack_codes(node_tensor(values["b"]).cpu(), values["bits"], values["K"]).flatten())
    return torch.cat(found)


def equal_codes(device: str, stages: tuple[str, ...] | None) -> dict[str, Any]:
    torch.manual_seed(0)
    model = random_llama("tiny")
    tokens = tokens_for(model, 16, 64)
    theirs, ours = (codes_of(compile_on(d, model, tokens, 32, steps=20, stages=stages)) for d in ("cpu", device))
    return {
        "a tiny Llama on": f"cpu and {device}",
        "stages": ", ".join(stages) if stages else "default, 20 steps",
        "codes": f"{ours.numel():,}",
        "equal": f"{float((ours == theirs).double().mean()):.3%}",
    }


def timed(name: str, layers: int, device: str, most: float) -> dict[str, Any]:
    """Raises TooLongError, after the first block, where it would take more than `most` seconds."""

    def stop_where_too_long(estimate: Estimate) -> None:
        if estimate.seconds is not None and layers > 1 and estimate.seconds > most:
            raise TooLongError(estimate.seconds)

    torch.manual_seed(0)
    model = random_llama(name, layers)
    tokens = tokens_for(model, 64, 256)
    begun = time.monotonic()
    compile_on(device, model, tokens, 128, stop_where_too_long)
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.monotonic() - begun
    row = {
        "model": name,
        "layers": f"{layers} of {SHAPES[name]['num_hidden_layers']}",
        "seconds": f"{seconds:.1f}",
        "seconds a layer": f"{seconds / layers:.2f}",
    }
    if device == "cuda":
        row["GPU memory, GB"] = f"{torch.cuda.max_memory_allocated() / 1e9:.2f}"
    return row


def within(name: str, layers: int, device: str, deadline: float) -> dict[str, Any]:
    """The figures of as many layers as there is time for."""
    try:
        return timed(name, layers, device, MARGIN * (deadline - time.monotonic()))
    except TooLongError as error:
        left = MARGIN * (deadline - time.monotonic())
        fewer = max(1, min(layers - 1, int(layers * left / error.seconds)))
        print(f"{layers} layers would take {error.seconds:.0f} s: {fewer} instead", flush=True)
        return timed(name, fewer, device, float("inf"))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="instead of all of them")
    parser.add_argument("--seconds", type=float, default=600, help="what the whole may take")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--json", type=Path, help="where rows go as soon as they are measured, a line each")
    return parser.parse_args()


def main() -> None:
    deadline = time.monotonic()
    args = parse_arguments()
    deadline += args.seconds
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: torch sees no NVIDIA GPU")
    rows = []
    for stages in (("clip", "gptq"), None):
        rows.append(equal_codes(args.device, stages))
        append(args.json, rows[-1])
    layers = args.layers or SHAPES[args.model]["num_hidden_layers"]
    rows.append(within(args.model, layers, args.device, deadline))
    append(args.json, rows[-1])
    print(table_of(rows))


if __name__ == "__main__":
    main()
