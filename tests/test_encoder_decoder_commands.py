"""The command line of encoder-decoders that read text; those that hear are in test_speech.py."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import QUICK, save_tokenizer
from support.encoder_decoders import KINDS, greedy
from support.sounds import write_wave
from transformers import AutoTokenizer

from teq_graph.cli import run
from teq_graph.loading import load_model
from teq_graph.onnx.directory import CARD_FILE
from teq_graph.onnx.runtime import OnnxEncoderDecoder, load

NEW = 12
FLOAT = ["--skip", "*", "--method", "rtn", "--accuracy-level", "1", "--no-evaluate"]


def save(directory: Path, kind: str) -> Path:
    """A random model with a tokenizer over bytes."""
    torch.manual_seed(5)
    ids = dict(vocab_size=save_tokenizer(directory), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    KINDS[kind](**ids).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("models") / "t5", "T5")


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("exported") / "out"
    assert run(["quantize", str(source), "-o", str(directory), *FLOAT]) == 0
    return directory


def expected(source: Path, prompt: str) -> str:
    """What transformers writes of a prompt."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    inputs = dict(tokenizer(prompt, return_tensors="pt", return_token_type_ids=False))
    (tokens,) = greedy(load_model(source).model, inputs, max_new_tokens=NEW)
    assert tokens
    text: str = tokenizer.decode(tokens, skip_special_tokens=True)
    return text


def test_generate_writes_what_transformers_does(
    source: Path, out: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = ["translate: Hello", "Good night"]
    texts = [expected(source, prompt) for prompt in prompts]
    for prompt, text in zip(prompts, texts, strict=True):
        assert run(["generate", str(out), "--prompt", prompt, "--max-new-tokens", str(NEW)]) == 0
        printed, errors = capsys.readouterr()
        assert printed == f"{text}\n" and f"prompt of {len(prompt)} tokens" in errors
    # Each line by itself.
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\n".join([*prompts, ""])))
    assert run(["generate", str(out), "--max-new-tokens", str(NEW)]) == 0
    assert capsys.readouterr().out == "".join(f"{text}\n" for text in texts)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["BART", "Marian"])
def test_others_that_read_text(kind: str, tmp_path: Path, capsys: Any) -> None:
    source, out = save(tmp_path / kind, kind), tmp_path / "out"
    assert run(["quantize", str(source), "-o", str(out), *FLOAT]) == 0
    capsys.readouterr()
    assert run(["generate", str(out), "--prompt", "Good night", "--max-new-tokens", str(NEW)]) == 0
    assert capsys.readouterr().out == f"{expected(source, 'Good night')}\n"


@pytest.mark.slow
def test_a_text_calibrates_it(source: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text("Some text to calibrate on, longer than a row. " * 4)
    arguments = ["--calibration", str(tmp_path / "text.txt"), "--save-compiled", *QUICK]
    assert run(["quantize", str(source), "-o", str(tmp_path / "out"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "32 of 33 linears: 32 W4g16" in printed
    assert "not measured: it needs a causal language model" in printed
    opened = load(tmp_path / "out")
    assert isinstance(opened, OnnxEncoderDecoder)
    assert isinstance(opened.generate("Hello", max_new_tokens=3), str)


def test_what_it_is_not_asked(source: Path, out: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    no_causal = "it is not a causal language model but an encoder-decoder; accepted is one that generates text"
    for arguments, message in (
        (["generate", out, "--prompt", ""], "source: an empty text; accepted is one of at least one character"),
        (["generate", out, "--prompt", "Hi", "--chat"], f"chat: {out} is an encoder-decoder; accepted is each message"),
        (["generate", out, "--prompt", "Hi", "--system", "Be brief"], "system='Be brief': accepted where the chat"),
        (["generate", out, "--audio", tmp_path / "a.wav"], "a.wav': it is cut short; accepted is a WAV file"),
        (["evaluate", out], f"{out}: {no_causal}"),
        (["serve", out, "--port", "0"], f"{out}: {no_causal}"),
        (["evaluate", source], "is a T5ForConditionalGeneration: accepted are causal language models"),
    ):
        assert run([str(argument) for argument in arguments]) == 2
        printed, errors = capsys.readouterr()
        assert printed == "" and errors.count("\n") == 1
        assert message in errors


def test_a_recording_for_a_model_that_reads(out: Path, tmp_path: Path, capsys: Any) -> None:
    path = write_wave(tmp_path / "a.wav", bytes(200))
    assert run(["generate", str(out), "--audio", str(path)]) == 2
    printed, errors = capsys.readouterr()
    assert (printed, errors) == ("", f"error: --audio: {out} takes text; accepted is --prompt\n")


def test_the_card_says_how_to_run_it(out: Path) -> None:
    card = (out / CARD_FILE).read_text()
    assert "pipeline_tag: text2text-generation" in card
    assert 'teq-graph generate . --prompt "…"' in card and "serve" not in card
