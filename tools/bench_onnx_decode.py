"""Prefill and decoding in onnxruntime on a GPU: a Llama of random weights, exported in float16, in one run.

    python tools/bench_onnx_decode.py llama-1b --json decode.jsonl

MODEL is a shape of `random_llama.py`. Its weights are rounded to nearest, in groups of 128 with zero points: speed does
not depend on how codes are chosen. Method: a prompt of random tokens, and --tokens more, greedily, by `OnnxDecoder`,
whose steps are replayed as a CUDA graph, and once more without that. Prefill lasts until the first token, decoding from
there to the last; medians over --rounds with a fresh prompt each, after one that is not counted. Nodes on the CPU are
what onnxruntime's own profile of a prompt and its continuation has there, or of copies between it and the GPU.
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
from json_lines import append
from markdown_table import table_of
from random_llama import SHAPES, random_llama

import teq_graph
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.onnx.runtime.on_device import CAPTURE, CUDA, captures

import onnxruntime  # isort: skip  after teq_graph.onnx, which keeps it from reporting that it runs

PROVIDERS = {"cuda": CUDA, "cpu": "CPUExecutionProvider"}
GREEDY: dict[str, Any] = {"eos_token_id": (), "do_sample": False}
PROFILED_TOKENS = 4


def export(model: str, layers: int | None, bits: int, directory: Path) -> None:
    spec = teq_graph.QuantizationConfig(bits=bits, group_size=128)
    compiled = teq_graph.compile(random_llama(model, layers), quantization=spec, training=None)
    compiled.export_onnx(directory, dtype="float16")


def opened(directory: Path, provider: str, captured: bool, profile: Path | None = None) -> OnnxDecoder:
    """Raises SystemExit where onnxruntime falls back to another provider, as it does where one lacks its libraries."""
    name, options = PROVIDERS[provider], None
    if profile is not None:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    chosen: Any = name if captured else (name, {CAPTURE: "0"})
    if provider == "cpu":
        chosen = name
    decoder = OnnxDecoder.load(directory, [chosen], session_options=options)
    if (found := decoder.session.get_providers()[0]) != name:
        raise SystemExit(f"error: onnxruntime runs on {found}: its {name} does not load")
    return decoder


def seconds(decoder: OnnxDecoder, length: int, tokens: int) -> tuple[float, float]:
    """Until the first token after a random prompt, and from there through `tokens` more."""
    prompt = torch.randint(1, decoder.shape.vocab_size, (length,)).tolist()
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in decoder.stream(prompt, tokens + 1, **GREEDY)]
    return times[1] - times[0], times[-1] - times[1]


def nodes_on_the_cpu(directory: Path, provider: str, length: int, scratch: Path) -> int:
    """How many nodes run there, or copy to it."""
    decoder = opened(directory, provider, captured=False, profile=scratch / "profile")
    seconds(decoder, length, PROFILED_TOKENS)
    events = json.loads(Path(decoder.session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event for event in events if event.get("cat") == "Node" and "provider" in event.get("args", {})]
    on_cpu = [e for e in runs if e["args"]["provider"] == PROVIDERS["cpu"] or "Memcpy" in e["args"]["op_name"]]
    return len({event["name"] for event in on_cpu})


def measure(decoder: OnnxDecoder, args: argparse.Namespace) -> dict[str, str]:
    rounds = [seconds(decoder, args.prompt, args.tokens) for _ in range(args.rounds + 1)][1:]
    prefill, decode = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {
        "prefill, tokens/s": f"{args.prompt / prefill:.0f}",
        "decode, tokens/s": f"{args.tokens / decode:.0f}",
        "ms a token": f"{decode / args.tokens * 1e3:.3f}",
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=SHAPES)
    parser.add_argument("--layers", type=int, help="instead of all of them")
    parser.add_argument("--bits", type=int, nargs="+", choices=(2, 4, 8), default=[4])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=256, help="that are decoded after the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda")
    parser.add_argument("--json", type=Path, help="where rows go as soon as they are measured, a line each")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if PROVIDERS[args.provider] not in onnxruntime.get_available_providers():
        raise SystemExit(f"error: onnxruntime {onnxruntime.__version__} has no {PROVIDERS[args.provider]}")
    torch.manual_seed(0)
    begun = time.monotonic()
    for bits in args.bits:
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch) / "out"
            export(args.model, args.layers, bits, directory)
            print(f"{bits} bits: exported after {time.monotonic() - begun:.0f} s", flush=True)
            rows = []
            for captured in (True, False) if args.provider == "cuda" else (False,):
                decoder = opened(directory, args.provider, captured)
                how = "CUDA graph" if captures(decoder.session) else "launched"
                rows.append({"model": f"{args.model}, W{bits}g128", "steps": how, **measure(decoder, args)})
                append(args.json, rows[-1])
            counted = nodes_on_the_cpu(directory, args.provider, args.prompt, Path(scratch))
            rows.append({"model": f"{args.model}, W{bits}g128", "nodes on the CPU": str(counted)})
            append(args.json, rows[-1])
            print(table_of(rows), flush=True)


if __name__ == "__main__":
    main()
