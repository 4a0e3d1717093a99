"""What is read: a sound example of each kind of file or directory, and how it is read and run."""

from __future__ import annotations

import dataclasses
import io
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import teq_graph
from teq_graph.cli import run as run_command
from teq_graph.cli.opening import onnx_logits, torch_logits
from teq_graph.errors import InputError
from teq_graph.evaluation import perplexity
from teq_graph.loading import load_model, load_tokenizer

IDS = torch.arange(3, 10)
PROMPT = "Once upon a time"
TEXT = "Once upon a time, there was a little girl. She had a ball, and the ball was red.\n" * 8


@dataclasses.dataclass(frozen=True)
class Subject:
    """A kind of input.

    `make(model, path)` writes a sound one from the Hugging Face directory `model`; `read(path)` opens and runs it as
    the package does, and gives whether all numbers are finite. `share` is the part of the inputs that are of this kind.
    """

    share: float
    make: Callable[[Path, Path], None]
    read: Callable[[Path], bool]
    is_directory: bool = True


def _quantized(model: Path) -> teq_graph.CompiledModel:
    loaded = load_model(model)
    quantization = teq_graph.QuantizationConfig(bits=4, group_size=32)
    return teq_graph.compile(loaded.model, tokenizer=loaded.tokenizer, quantization=quantization, training=None)


# ---------------------------------------------------------------------------------------------------------- exported


def make_exported(model: Path, path: Path) -> None:
    _quantized(model).export_onnx(path)


def read_exported(path: Path) -> bool:
    from teq_graph.onnx.runtime import OnnxDecoder

    decoder = OnnxDecoder.load(path, threads=1)
    decoder.generate(PROMPT, 6)
    if getattr(decoder.tokenizer, "chat_template", None):
        decoder.encode_chat([{"role": "user", "content": PROMPT}])
    perplexity(onnx_logits(decoder), IDS, context=len(IDS))
    return bool(np.isfinite(decoder.logits(IDS[None].numpy())).all())


# ------------------------------------------------------------------------------------------------------------- saved


def make_saved(model: Path, path: Path) -> None:
    _quantized(model).save(path)


def read_saved(path: Path) -> bool:
    compiled = teq_graph.load(path)
    if compiled.tokenizer is not None:
        compiled.tokenizer(PROMPT)
    str(compiled.report)
    perplexity(lambda input_ids: compiled(input_ids=input_ids).logits, IDS, context=len(IDS))
    return bool(compiled(input_ids=IDS[None]).logits.isfinite().all())


# ------------------------------------------------------------------------------------------- Hugging Face's and GGUF


def make_pretrained(model: Path, path: Path) -> None:
    loaded = load_model(model)
    loaded.model.save_pretrained(path)
    assert loaded.tokenizer is not None
    loaded.tokenizer.save_pretrained(path)


def read_model(path: Path) -> bool:
    loaded = load_model(path)
    if loaded.tokenizer is not None:
        loaded.tokenizer(PROMPT)
    perplexity(torch_logits(loaded.model), IDS, context=len(IDS))
    with torch.no_grad():
        return bool(loaded.model(input_ids=IDS[None]).logits.isfinite().all())


def make_gguf(_model: Path, path: Path) -> None:
    vocabulary = ["<s>", "</s>", *(chr(code) for code in range(ord("a"), ord("z") + 1)), "Ġ", "on", "ce"]
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_dimension_count(8)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(vocabulary))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["o n", "c e"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, tensor in model.state_dict().items():
        stem, _, ending = name.rpartition(".")
        writer.add_tensor(f"{names.get_name(stem)}.{ending}", tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ------------------------------------------------------------------------------------------------------------- texts


def make_text(_model: Path, path: Path) -> None:
    path.write_text(TEXT, encoding="utf-8")


def read_calibration(path: Path) -> bool:
    """As calibration of a tiny model, up to the batches."""
    from teq_graph.calibration.sources import WindowChooser, text_of

    tokenizer = load_tokenizer("companion", str(path.parent / "companion"))
    windows = WindowChooser(tokenizer, samples=4, length=16, seed=0).from_texts([text_of(path, 64)])
    if not windows:
        raise InputError("calibration: it is empty; accepted is at least one input")
    return True


def read_evaluation(path: Path) -> bool:
    """As the text of `teq-graph evaluate`."""
    errors = io.StringIO()
    with redirect_stderr(errors), redirect_stdout(io.StringIO()):
        code = run_command(["evaluate", str(path.parent / "companion"), "--text", str(path), "--tokens", "40"])
    said = errors.getvalue()
    if code == 2 and said.startswith("error: "):
        raise InputError(said.removeprefix("error: ").removesuffix("\n"))
    sys.stderr.write(said)
    if code:
        raise AssertionError(f"exit code {code}")
    return True


SUBJECTS = {
    "exported": Subject(0.32, make_exported, read_exported),
    "saved": Subject(0.22, make_saved, read_saved),
    "pretrained": Subject(0.2, make_pretrained, read_model),
    "gguf": Subject(0.14, make_gguf, read_model, is_directory=False),
    "calibration": Subject(0.06, make_text, read_calibration, is_directory=False),
    "evaluation": Subject(0.06, make_text, read_evaluation, is_directory=False),
}


def make_all(model: Path, folder: Path) -> None:
    """A sound example of every kind in `folder`, each in a folder called after the kind."""
    for kind, subject in SUBJECTS.items():
        (folder / kind).mkdir(parents=True)
        subject.make(model, example(folder, kind))
    for kind in ("calibration", "evaluation"):
        shutil.copytree(example(folder, "exported"), folder / kind / "companion")


def example(folder: Path, kind: str) -> Path:
    """The file or directory that is read, of a kind in `folder`."""
    endings: dict[str, Any] = {"gguf": ".gguf", "calibration": ".txt", "evaluation": ".txt"}
    return folder / kind / f"input{endings.get(kind, '')}"
