"""Decoding in PyTorch on a GPU: our compiled graph beside the float16 model, both in CUDA graphs, in one run.

    python tools/bench_torch_decode.py smollm2 --markdown decode.md
    python tools/bench_torch_decode.py llama-8b --bits 4

MODEL is as for `teq-graph quantize`, or a shape of `random_llama.py`: a Llama of that size with random weights, or of
so many of its layers as --layers says. Contenders take one token at a time after --past tokens, whose keys and values
every step joins with its own: ours captured in a CUDA graph, the float16 model captured likewise, and as it is. Medians
over --rounds, contenders taking turns. A step over and over is the same step: a cache does not grow.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cuda_timing import capture, median_seconds
from json_lines import append
from markdown_table import table_of
from random_llama import SHAPES, random_llama
from transformers import DynamicCache

import teq_graph
from teq_graph.loading import load_model

STEPS = 32
EAGER, GRAPH = "float16, eager", "float16, CUDA graph"
Step = Callable[[], Any]
Cache = list[tuple[torch.Tensor, torch.Tensor]]


def load(name: str, layers: int | None) -> Any:
    """On the CPU, where it is compiled."""
    if name not in SHAPES:
        return load_model(name).model.half()
    return random_llama(name, layers, torch.float16, "cuda").cpu()


def cache_of(config: Any, past: int) -> Cache:
    """Random keys and values."""
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    shape = (1, heads, past, width)
    return [
        (torch.randn(shape, device="cuda").half(), torch.randn(shape, device="cuda").half())
        for _ in range(config.num_hidden_layers)
    ]


def ours(model: Any, bits: int, token: torch.Tensor, cache: Cache) -> Step:
    spec = teq_graph.QuantizationConfig(bits=bits, group_size=128)
    compiled = teq_graph.compile(model, quantization=spec, training=None).to("cuda")
    mask = torch.ones(1, cache[0][0].shape[2] + 1, dtype=torch.int64, device="cuda")
    return lambda: compiled(input_ids=token, attention_mask=mask, past_key_values=cache)


def floats(model: Any, token: torch.Tensor, cache: Cache) -> Step:
    return lambda: model(input_ids=token, past_key_values=DynamicCache(cache))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--layers", type=int, help="of a random Llama, instead of all of them")
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4, 8), default=[4, 3])
    parser.add_argument("--past", type=int, default=512, help="tokens in the KV cache")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path, help="where the figures go as well, a line a contender")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no NVIDIA GPU")
    torch.manual_seed(0)
    begun = time.monotonic()
    model = load(args.model, args.layers)
    token, cache = torch.ones(1, 1, dtype=torch.int64, device="cuda"), cache_of(model.config, args.past)
    steps: dict[str, Step] = {}
    for bits in args.bits:
        steps[f"teq_graph, {bits} bits, CUDA graph"] = ours(model, bits, token, cache)
        print(f"{bits} bits: compiled after {time.monotonic() - begun:.0f} s", flush=True)
    steps[GRAPH] = floats(model.cuda(), token, cache)
    with torch.inference_mode():
        steps = {name: capture([step]).replay for name, step in steps.items()}
        steps[EAGER] = floats(model, token, cache)
        medians = median_seconds(steps, args.rounds, repeats=STEPS)
    base = medians[GRAPH]
    rows = [
        {
            "contender": name,
            "ms": f"{seconds * 1e3:.3f}",
            "tokens/s": f"{1 / seconds:.0f}",
            f"× {GRAPH}": f"{base / seconds:.2f}",
        }
        for name, seconds in medians.items()
    ]
    described = f"{args.model}, {model.config.num_hidden_layers} layers, {args.past} tokens in the cache"
    lines = [f"{described}; {torch.cuda.get_device_name()}, torch {torch.__version__}.", "", table_of(rows)]
    for row in rows:
        append(args.json, {"model": described, **row})
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
