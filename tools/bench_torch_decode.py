"""Decoding in PyTorch on a GPU: our compiled graph in a CUDA graph beside the float16 model, in one run.

    python tools/bench_torch_decode.py smollm2 --markdown decode.md
    python tools/bench_torch_decode.py llama-8b --bits 4

MODEL is as for `teq-graph quantize`, or `llama-8b`: a Llama of that size with random weights. Contenders take one token
at a time over a KV cache of --past tokens: ours captured in a CUDA graph, the float16 model eager, and the float16
model by torch.compile(mode="reduce-overhead"). Medians over --rounds, contenders taking turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from cuda_timing import capture, median_seconds
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import teq_graph
from teq_graph.loading import load_model

STEPS = 32
LLAMA_8B = dict(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
Step = Callable[[], Any]


def load(name: str) -> Any:
    if name != "llama-8b":
        return load_model(name).model.half()
    with torch.device("cuda"):
        torch.set_default_dtype(torch.float16)
        try:
            return LlamaForCausalLM(LlamaConfig(**LLAMA_8B)).eval().cpu()
        finally:
            torch.set_default_dtype(torch.float32)


def caches(config: Any, past: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    shape = (1, heads, past, width)
    return [
        (torch.randn(shape, device="cuda").half(), torch.randn(shape, device="cuda").half())
        for _ in range(config.num_hidden_layers)
    ]


def ours(model: Any, bits: int, past: int) -> Step:
    compiled = teq_graph.compile(
        model, quantization=teq_graph.QuantizationConfig(bits=bits, group_size=128), training=None
    ).to("cuda")
    token, cache = torch.ones(1, 1, dtype=torch.int64, device="cuda"), caches(model.config, past)
    mask = torch.ones(1, past + 1, dtype=torch.int64, device="cuda")

    def step() -> Any:
        return compiled(input_ids=token, attention_mask=mask, past_key_values=cache)

    with torch.no_grad():
        return capture([step]).replay


def eager(model: Any, past: int) -> Step:
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    filled = caches(model.config, past)

    def step() -> Any:
        return model(input_ids=token, past_key_values=DynamicCache(filled))

    return step


def compiled_by_torch(model: Any, past: int) -> Step:
    token = torch.ones(1, 1, dtype=torch.int64, device="cuda")
    cache = StaticCache(config=model.config, max_cache_len=past + 1)
    position = torch.tensor([past], device="cuda")
    forward = torch.compile(model.forward, mode="reduce-overhead")
    return lambda: forward(input_ids=token, past_key_values=cache, cache_position=position)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 3, 4, 8), default=[4, 3])
    parser.add_argument("--past", type=int, default=512, help="tokens in the KV cache")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--markdown", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no NVIDIA GPU")
    torch.manual_seed(0)
    model = load(args.model)
    steps = {f"teq_graph, {bits} bits, CUDA graph": ours(model, bits, args.past) for bits in args.bits}
    model = model.cuda()
    steps["float16, eager"] = eager(model, args.past)
    steps["float16, torch.compile"] = compiled_by_torch(model, args.past)
    with torch.inference_mode():
        medians = median_seconds(steps, args.rounds, repeats=STEPS)
    base = medians["float16, eager"]
    lines = [
        f"{args.model}, {torch.cuda.get_device_name()}, torch {torch.__version__}, {args.past} tokens in the cache.",
        "",
        "| contender | tokens/s | × float16, eager |",
        "|---|---|---|",
        *(f"| {name} | {1 / value:.0f} | {base / value:.2f} |" for name, value in medians.items()),
    ]
    print("\n".join(lines))
    if args.markdown:
        args.markdown.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
