"""Every argument of the public functions, given what it does not take: one line of a TeqGraphError, at once."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import save_tiny_llama
from support.compiling import SMALL, TRAINING, compile_llama, compile_mlp, mlp, tokens
from support.effort import at_once

import teq_graph
from teq_graph import TrainingConfig, loading
from teq_graph.analysis.equivalences import find_equivalences
from teq_graph.cli import process
from teq_graph.errors import InputError, TeqGraphError
from teq_graph.evaluation import divergence, perplexity
from teq_graph.loading import load_model


class Opaque:
    """Neither hashable nor comparable, and without a repr."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no comparison")

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


VALUES = {
    "None": None, "-1": -1, "2**70": 2**70, "1.5": 1.5, "nan": float("nan"), "True": True, "text": "x\ny", "empty": "",
    "surrogate": "\udcff", "long": "x" * 5000, "NUL": "a\0b", "bytes": b"x", "list": [], "dict": {}, "tuple": (),
    "object": object(), "opaque": Opaque(), "floats": torch.zeros(2), "scalar": torch.tensor(-3), "array": np.zeros(3),
    "function": id,
}  # fmt: skip
IDS = list(range(3, 40))


@pytest.fixture(scope="module")
def llama() -> teq_graph.CompiledModel:
    return compile_llama()


@pytest.fixture(scope="module")
def plain() -> teq_graph.CompiledModel:
    return compile_mlp(training=None)


def logits(input_ids: torch.Tensor) -> torch.Tensor:
    return torch.randn(*input_ids.shape, 40)


CALLS: dict[str, tuple[Callable[..., Any], set[str]]] = {
    # name -> (a call with the llama, the plain model, a folder and the value; the values that it does take)
    "call": (lambda m, p, d, v: p(v), set()),
    "input_ids": (lambda m, p, d, v: m(input_ids=v), set()),
    "attention_mask": (lambda m, p, d, v: m(input_ids=tokens(1, 5), attention_mask=v), {"None"}),
    "past_key_values": (lambda m, p, d, v: m(input_ids=tokens(1, 5), past_key_values=v), {"None"}),
    "fourth input": (lambda m, p, d, v: m(tokens(1, 5), None, None, v), set()),
    "to": (lambda m, p, d, v: p.to(v), set()),
    "dtype": (lambda m, p, d, v: p.export_onnx(d / "out", dtype=v), set()),
    "accuracy_level": (lambda m, p, d, v: p.export_onnx(d / "out", accuracy_level=v), set()),
    "overwrite": (lambda m, p, d, v: p.export_onnx(d / "out", overwrite=v), {"True"}),
    "save overwrite": (lambda m, p, d, v: p.save(d / "out", overwrite=v), {"True"}),
    "load": (lambda m, p, d, v: teq_graph.load(v), set()),
    "find_equivalences": (lambda m, p, d, v: find_equivalences(v), set()),
    "load_model": (lambda m, p, d, v: load_model(v), set()),
    "load_model dtype": (lambda m, p, d, v: load_model(d, v), set()),
    "compile": (lambda m, p, d, v: teq_graph.compile(v), set()),
    "transform": (lambda m, p, d, v: teq_graph.transform(v), set()),
    "example_inputs": (lambda m, p, d, v: teq_graph.compile(mlp(), v, quantization=SMALL), set()),
    "logits_fn": (lambda m, p, d, v: perplexity(v, IDS, context=8), set()),
    "token_ids": (lambda m, p, d, v: perplexity(logits, v, context=8), set()),
    "context": (lambda m, p, d, v: perplexity(logits, IDS, context=v), {"2**70"}),
    "stride": (lambda m, p, d, v: perplexity(logits, IDS, context=8, stride=v), {"None"}),
    "batch_size": (lambda m, p, d, v: perplexity(logits, IDS, context=8, batch_size=v), {"2**70"}),
    "logits": (lambda m, p, d, v: perplexity(lambda _: v, IDS, context=8), set()),
    "divergence": (lambda m, p, d, v: divergence(logits, v, IDS, context=8), set()),
    "divergence context": (lambda m, p, d, v: divergence(logits, logits, IDS, context=v), {"2**70"}),
}


@pytest.mark.parametrize("call", CALLS)
def test_one_line_at_once(
    call: str, llama: teq_graph.CompiledModel, plain: teq_graph.CompiledModel, tmp_path: Path
) -> None:
    function, accepted = CALLS[call]
    for name, value in VALUES.items():
        if name in accepted:
            continue
        with at_once(8, name), pytest.raises(TeqGraphError) as caught:
            function(llama, plain, tmp_path, value)
        message = str(caught.value)
        assert message and "\n" not in message and len(message) < 1000, (name, message)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, and files that are no text."""
    folder = tmp_path_factory.mktemp("command")
    save_tiny_llama(folder / "model")
    (folder / "empty").touch()
    (folder / "binary").write_bytes(bytes(range(256)) * 8)
    (folder / "surrogate").write_bytes(b"text \xed\xa0\x80")
    (folder / "broken.gguf").write_bytes(b"GGUF" + bytes(range(256)))
    (folder / "text").write_text("The quick brown fox jumps over the lazy dog. " * 30)
    (folder / "huge").touch()
    os.truncate(folder / "huge", 2**40)
    os.mkfifo(folder / "pipe")
    (folder / "directory").mkdir()
    return folder


FILES = (
    "missing", "empty", "binary", "surrogate", "pipe", "directory", "huge", "/dev/zero", "~nobody-0/x", "x" * 5000,
    "\udcff", "",
)  # fmt: skip
MODELS = (*(name for name in FILES if name != "missing"), "a/b/c", "broken.gguf", "model/config.json", "-", "a b")
NUMBERS = ("0", "-1", "9" * 30, "nan", "inf", "x", "", "3.5")
COMMANDS = [
    *(("evaluate", "model", f"--text={name}") for name in FILES),
    *(("quantize", "model", "-o", "out", f"--calibration={name}") for name in FILES),
    *(("quantize", "model", "-o", "out", f"--text={name}") for name in FILES),
    *(("inspect", "--", name) for name in MODELS),
    *(("evaluate", "--", name) for name in MODELS),
    *(("quantize", "-o", "out", "--", name) for name in MODELS),
    *(
        ("evaluate", "model", "--text=text", f"--{option}={number}")
        for option in ("context", "tokens", "stride", "limit", "num-fewshot", "batch-size", "threads")
        for number in NUMBERS
    ),
    *(
        ("quantize", "model", "-o", "out", "--calibration=text", f"--{option}={number}")
        for option in ("bits", "group-size", "samples", "length", "batch-size", "accuracy-level", "tokens")
        for number in NUMBERS
        if (option, number) not in (("group-size", "-1"), ("accuracy-level", "0"))
    ),
    *(("quantize", "model", "-o", "out", f"--{option}={n}") for option in ("steps", "seed") for n in NUMBERS[1:]),
    *(("quantize", "model", "-o", "out", f"--target-bits={number}") for number in NUMBERS if number != "3.5"),
    *(
        ("quantize", "model", "-o", "out", f"--{option}={value}")
        for option in ("override", "preset", "method", "objective", "init", "dtype", "skip")
        for value in ("", "x", "\udcff", "*:", "*:bits", "*:bits=NaN", "*:x=1", "+", f"*:bits={'[' * 5000}")
    ),
    *(("inspect", "model", f"--skip={value}") for value in ("", "x", "[", "\udcff", "x" * 5000)),
    ("unknown",), ("inspect",), ("quantize", "model"), ("inspect", "model", "more"), ("inspect", "model", "--unknown"),
]  # fmt: skip


@pytest.mark.parametrize("first", sorted({command[0] for command in COMMANDS}))
def test_commands_refuse_in_one_line(
    first: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(loading, "hub_answers", lambda _: False)
    for command in COMMANDS:
        if command[0] != first:
            continue
        with at_once(10, command):
            code = process.run(command)
        out, error = capsys.readouterr()
        assert (code, out) == (2, ""), (command, error)
        assert re.fullmatch(r"error: [^\n]{3,1010}\n", error), (command, error)
    assert not (folder / "out").exists()


@pytest.mark.parametrize("where", ["element", "input_ids", "attention_mask"])
@pytest.mark.parametrize("name", VALUES)
def test_calibration_of_another_kind(where: str, name: str) -> None:
    value = VALUES[name]
    calibration = [value if where == "element" else {"input_ids": tokens(1, 4), where: value}]
    with pytest.raises(TeqGraphError) as caught:
        compile_llama(calibration=calibration, training=TRAINING)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 1000


def test_an_exception_of_the_callers_own_stays_his() -> None:
    def rows() -> Any:
        yield tokens(1, 4)
        raise LookupError("of the caller")

    with pytest.raises(LookupError, match="of the caller"):
        compile_llama(calibration=rows(), training=TrainingConfig(stages=("clip",)))
    with pytest.raises(LookupError):
        compile_mlp(on_estimate={}.__getitem__)


def test_a_vocabulary_that_is_too_small_for_the_text() -> None:
    with pytest.raises(InputError, match="token_ids: 40 is one of them; accepted are 0 to 39"):
        perplexity(logits, [3, 40, 3], context=8)
