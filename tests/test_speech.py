"""Recordings: read from WAV files, made features of, and transcribed as transformers does."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.command_line import save_tokenizer
from support.compiling import in_one_line
from support.encoder_decoders import BINS, t5, whisper
from support.sounds import write_wave
from transformers import AutoTokenizer, WhisperFeatureExtractor

import teq_graph
from teq_graph import QuantizationConfig
from teq_graph.cli import run
from teq_graph.errors import InputError, ModelFileError
from teq_graph.loading import EXTRACTOR_FILE, load_model
from teq_graph.onnx.directory import CARD_FILE, GENERATION_FILE
from teq_graph.onnx.runtime import OnnxEncoderDecoder, Recording, load, read_wave
from teq_graph.system.files import read_json, write_json

RATE = 16000
LANGUAGES = {"<|de|>": 250, "<|en|>": 251, "<|fr|>": 252}
TASKS = {"transcribe": 253, "translate": 254}
NO_TIMES = 255
NEW = 12


def noise(path: Path, seconds: float = 0.6, **options: Any) -> Path:
    samples = torch.randn(int(seconds * RATE)).mul(3000).numpy()
    return write_wave(path, samples.astype("<i2").tobytes(), **options)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Whisper that hears a second, on disk."""
    torch.manual_seed(7)
    directory = tmp_path_factory.mktemp("models") / "whisper"
    ids = dict(vocab_size=save_tokenizer(directory), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    model: Any = whisper(**ids, max_source_positions=50, begin_suppress_tokens=[5, 6], suppress_tokens=[7])
    known = dict(lang_to_id=LANGUAGES, task_to_id=TASKS, no_timestamps_token_id=NO_TIMES, is_multilingual=True)
    for name, value in {**known, "_from_model_config": False}.items():
        setattr(model.generation_config, name, value)
    model.save_pretrained(directory)
    WhisperFeatureExtractor(feature_size=BINS, chunk_length=1).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def out(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported in float by the command line."""
    directory = tmp_path_factory.mktemp("exported") / "out"
    options = ["--skip", "*", "--method", "rtn", "--accuracy-level", "1", "--no-evaluate"]
    assert run(["quantize", str(source), "-o", str(directory), *options]) == 0
    return directory


@pytest.fixture(scope="module")
def runtime(out: Path) -> OnnxEncoderDecoder:
    opened = load(out, threads=1)
    assert isinstance(opened, OnnxEncoderDecoder) and opened.hears
    return opened


def expected_tokens(source: Path, path: Path, **options: Any) -> list[int]:
    """What transformers' Whisper writes, without the tokens that it begins with."""
    model: Any = load_model(source).model
    recording = read_wave(path)
    extractor = WhisperFeatureExtractor.from_pretrained(source)
    inputs = extractor(recording.samples, sampling_rate=RATE, return_tensors="pt")
    (row,) = model.generate(**inputs, do_sample=False, max_new_tokens=NEW, **options).tolist()
    row = row[row.index(NO_TIMES) + 1 :] if NO_TIMES in row else row
    return row[: row.index(1)] if 1 in row else row


@pytest.mark.parametrize("options", [{"language": "fr"}, {"language": "en", "task": "translate"}, {}])
def test_transformers_writes_the_same(
    options: dict[str, str],
    source: Path,
    out: Path,
    runtime: OnnxEncoderDecoder,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = noise(tmp_path / "noise.wav")
    # Told no language, transformers leaves out the task.
    tokens = expected_tokens(source, path, **(options or {"task": "transcribe"}))
    stream = runtime.transcribe(read_wave(path), **options, max_new_tokens=NEW)
    text = "".join(stream)
    assert tokens and stream.tokens == tokens
    assert text == AutoTokenizer.from_pretrained(source).decode(tokens, skip_special_tokens=True)
    given = [f"--{name}={value}" for name, value in options.items()]
    assert run(["generate", str(out), "--audio", str(path), "--max-new-tokens", str(NEW), *given]) == 0
    printed, errors = capsys.readouterr()
    assert printed == f"{text}\n"
    assert re.search(rf"{len(tokens)} tokens.*; 0\.6 s of sound in ", errors)
    assert "teq-graph generate . --audio recording.wav" in (out / CARD_FILE).read_text()


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_samples_of_any_width(width: int, tmp_path: Path) -> None:
    samples = torch.rand(300, 2, dtype=torch.float64).mul(2).sub(1).numpy()
    levels = np.floor(samples * 2 ** (8 * width - 1)).astype(np.int64)
    raw = (levels + 128 if width == 1 else levels).astype("<i8").view(np.uint8).reshape(300, 2, 8)[..., :width]
    recording = read_wave(write_wave(tmp_path / "two.wav", raw.tobytes(), width, channels=2, rate=8000))
    assert (recording.rate, recording.seconds) == (8000, 300 / 8000)
    expected = (levels / 2 ** (8 * width - 1)).mean(axis=1)
    np.testing.assert_allclose(recording.samples, expected, rtol=0, atol=2**-24)


def test_what_is_no_recording(out: Path, runtime: OnnxEncoderDecoder, tmp_path: Path, capsys: Any) -> None:
    text, cut, floats = tmp_path / "text.wav", tmp_path / "cut.wav", tmp_path / "floats.wav"
    text.write_text("no sound")
    cut.write_bytes(noise(tmp_path / "whole.wav").read_bytes()[:30])
    floats.write_bytes((tmp_path / "whole.wav").read_bytes().replace(b"\x01\x00\x01\x00", b"\x03\x00\x01\x00", 1))
    for path, message in (
        (text, "file does not start with RIFF id"),
        (cut, ""),
        (floats, "unknown format"),
        (tmp_path / "missing.wav", "no such file"),
        (tmp_path, "no such file"),
        (write_wave(tmp_path / "empty.wav", b""), "0 samples of 16 bits"),
        (noise(tmp_path / "slow.wav", rate=8000), "recording of 8000 samples a second: accepted are 16000"),
        (noise(tmp_path / "long.wav", seconds=1.5), "recording of 1.5 seconds: accepted are up to 1"),
    ):
        with pytest.raises(InputError) as caught:
            runtime.transcribe(read_wave(path))
        in_one_line(caught)
        assert message in str(caught.value) and "accepted" in str(caught.value)
        assert run(["generate", str(out), "--audio", str(path)]) == 2
        printed, errors = capsys.readouterr()
        assert (printed, errors) == ("", f"error: {caught.value}\n")
    with pytest.raises(InputError, match=r"recording: 'a\.wav'; accepted is a Recording"):
        runtime.transcribe("a.wav")  # type: ignore[arg-type]


def test_what_a_model_that_hears_is_not_told(out: Path, tmp_path: Path, capsys: Any) -> None:
    path = noise(tmp_path / "noise.wav")
    for arguments, message in (
        (["--audio", path, "--language", "xx"], "language 'xx': accepted are de, en, fr"),
        (["--audio", path, "--task", "sing"], "task 'sing': accepted are transcribe, translate"),
        (["--audio", path, "--prompt", "Hello"], "--prompt: no effect with --audio, which is what the model hears"),
        (["--audio", path, "--chat"], "--chat: no effect with --audio, which is what the model hears"),
        (["--prompt", "Hello"], f"--prompt: {out} takes sounds; accepted is --audio"),
        (["--language", "en"], "--language en: no effect without --audio"),
    ):
        assert run(["generate", str(out), *map(str, arguments)]) == 2
        printed, errors = capsys.readouterr()
        assert (printed, errors) == ("", f"error: {message}\n")


@pytest.mark.parametrize(
    ("calibration", "reason"),
    [
        ([], "takes input_features, and only a language model writes text to calibrate on"),
        (["--calibration", "text.txt"], "takes input_features, which the text of --calibration is not"),
    ],
    ids=["none", "text"],
)
def test_a_model_that_hears_is_calibrated_on_recordings_alone(
    calibration: list[str], reason: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("Hello")
    assert run(["quantize", str(source), "-o", "out", *calibration, "--no-evaluate"]) == 2
    printed, errors = capsys.readouterr()
    accepted = "on the command line, accepted for it: --calibration FILE.wav and --method rtn"
    assert (printed, errors) == ("", f"error: model 'whisper' {reason}; {accepted}\n")
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_recordings_calibrate(kind: str, source: Path, tmp_path: Path, capsys: Any) -> None:
    files = [noise(tmp_path / name) for name in ("a.wav", "b.wav")]
    given = str(files[0] if kind == "file" else tmp_path)
    options = ["--calibration", given, "--preset", "fast", "--steps", "5", "--group-size", "16", "--length", "8"]
    assert run(["quantize", str(source), "-o", str(tmp_path / "out"), *options, "--no-evaluate"]) == 0
    printed, _ = capsys.readouterr()
    assert f"sound of {given}" in printed.replace("\n", "")
    assert run(["generate", str(tmp_path / "out"), "--audio", str(files[1]), "--max-new-tokens", "3"]) == 0


def test_a_recording_that_does_not_calibrate_is_named(source: Path, tmp_path: Path, capsys: Any) -> None:
    noise(tmp_path / "a.wav")
    slow = noise(tmp_path / "b.wav", rate=8000)
    options = ["-o", str(tmp_path / "out"), "--calibration", str(tmp_path), "--no-evaluate"]
    assert run(["quantize", str(source), *options]) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1
    assert errors.startswith(f"error: --calibration '{slow}': recording of 8000 samples a second: accepted are 16000")


def test_recordings_are_not_for_a_model_of_texts(tmp_path: Path, capsys: Any) -> None:
    recording = noise(tmp_path / "a.wav")
    model = tmp_path / "model"
    ids = dict(vocab_size=save_tokenizer(model), pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    t5(**ids).save_pretrained(model)
    capsys.readouterr()  # of transformers
    options = ["-o", str(tmp_path / "out"), "--calibration", str(recording), "--no-evaluate"]
    assert run(["quantize", str(model), *options]) == 2
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.count("\n") == 1
    assert "takes input_ids, which the recordings of --calibration are not" in errors


def test_the_feature_extractor_travels_along(source: Path, tmp_path: Path) -> None:
    loaded = load_model(source)
    compiled = teq_graph.compile(
        loaded.model,
        quantization=QuantizationConfig(skip=("*",)),
        training=None,
        tokenizer=loaded.tokenizer,
        feature_extractor=loaded.feature_extractor,
    )
    again = teq_graph.load(compiled.save(tmp_path / "saved"))
    assert again.feature_extractor.to_dict() == loaded.feature_extractor.to_dict()
    (source_copy := tmp_path / "processor").mkdir()
    for file in source.iterdir():
        (source_copy / file.name).write_bytes(file.read_bytes())
    (source_copy / EXTRACTOR_FILE).rename(source_copy / "kept")
    assert load_model(source_copy).feature_extractor is None
    # As processors of transformers are written.
    processor = source_copy / "processor_config.json"
    write_json(processor, {"feature_extractor": read_json(source_copy / "kept")})
    assert load_model(source_copy).feature_extractor.to_dict() == loaded.feature_extractor.to_dict()
    processor.rename(source_copy / EXTRACTOR_FILE).write_text("{]")
    with pytest.raises(ModelFileError, match=r"feature extractor of .* cannot be loaded: ") as caught:
        load_model(source_copy)
    in_one_line(caught)


def test_a_directory_without_what_hearing_needs(out: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in out.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    recording = Recording(np.zeros(100, np.float32), RATE)
    for damage, message in (
        ({"lang_to_id": {"<|en|>": "x"}}, r"generation_config\.json cannot be read: lang_to_id\.<\|en\|>='x'"),
        ({"lang_to_id": {"<|en|>": 9999}}, "token 9999: accepted are 0 to"),
        ({"no_timestamps_token_id": 9999}, "token 9999: accepted are 0 to"),
    ):
        write_json(copy / GENERATION_FILE, read_json(out / GENERATION_FILE) | damage)
        opened = load(copy, threads=1)
        assert isinstance(opened, OnnxEncoderDecoder)
        with pytest.raises((InputError, ModelFileError), match=message) as caught:
            opened.transcribe(recording)
        in_one_line(caught)
    (copy / GENERATION_FILE).unlink()
    opened = load(copy, threads=1)
    assert isinstance(opened, OnnxEncoderDecoder)
    assert len(list(opened.transcribe(recording, max_new_tokens=3))) <= 3
    with pytest.raises(InputError, match="language 'en': the model names no languages"):
        opened.transcribe(recording, language="en")
    (copy / EXTRACTOR_FILE).unlink()
    opened = load(copy, threads=1)
    assert isinstance(opened, OnnxEncoderDecoder)
    with pytest.raises(ModelFileError, match=r"preprocessor_config\.json is missing"):
        opened.transcribe(recording)
