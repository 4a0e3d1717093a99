"""Decoding by lengths instead of masks, as on a GPU; on the CPU, against decoding as it is there."""

from __future__ import annotations

import dataclasses
import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from support.graphs import relative_error
from support.onnx import export_language_model

from teq_graph.errors import NumericsError
from teq_graph.loading import load_model
from teq_graph.onnx.directory import GENAI_FILE, GENAI_MODEL_FILE, MODEL_FILE
from teq_graph.onnx.padding import LAST_POSITIONS, TOTAL_LENGTH, count_lengths, take_lengths
from teq_graph.onnx.runtime import OnnxDecoder, on_device
from teq_graph.onnx.runtime.generation import decoding
from teq_graph.onnx.runtime.generation.device_decoding import MIN_CAPACITY, Best, DeviceSession, try_step
from teq_graph.onnx.runtime.session import open_directory

PROMPT = "Once upon a time"
PROMPTS = [PROMPT, "Lily and her mom went to the park to play with the", "The dog"]


def open_prepared(directory: Path, finds_best: bool = True) -> onnxruntime.InferenceSession:
    model = ir.load(directory / MODEL_FILE)
    assert on_device.prepare(model, finds_best)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)


def error(actual: Any, expected: Any) -> float:
    return relative_error(torch.from_numpy(actual), torch.from_numpy(expected))


@pytest.fixture(scope="module")
def directory(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained model whose heads onnxruntime rotates."""
    path = tmp_path_factory.mktemp("babyllama") / "out"
    export_language_model(load_model(data_dir / "models" / "babyllama-1m"), path)
    return path


@pytest.fixture
def masked(directory: Path) -> OnnxDecoder:
    return OnnxDecoder.load(directory, threads=1)


@pytest.fixture
def decoder(directory: Path, masked: OnnxDecoder) -> OnnxDecoder:
    return OnnxDecoder(open_prepared(directory), masked.metadata, directory)


def test_a_step_has_nothing_but_layers(directory: Path) -> None:
    model = ir.load(directory / MODEL_FILE)
    assert take_lengths(model)
    names = [value.name for value in model.graph.inputs if "past" not in str(value.name)]
    assert names == ["input_ids", LAST_POSITIONS, TOTAL_LENGTH]
    kinds = {node.op_type for node in model.graph}
    assert not kinds & {"Shape", "Squeeze", "Unsqueeze", "Reshape", "Concat", "Cast", "Sub", "Expand", "Range"}
    assert not take_lengths(model) and not count_lengths(model)


@pytest.mark.parametrize("finds_best", [True, False], ids=["best", "logits"])
@pytest.mark.parametrize(
    "options",
    [
        dict(do_sample=False),
        dict(do_sample=False, repetition_penalty=1.3),
        dict(do_sample=True, temperature=0.8, top_k=20, seed=3),
        dict(do_sample=False, prompt_lookup_num_tokens=4),
    ],
    ids=str,
)
def test_tokens_are_the_same(
    directory: Path, masked: OnnxDecoder, finds_best: bool, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = OnnxDecoder(open_prepared(directory, finds_best), masked.metadata, directory)
    assert isinstance(decoder._decoding, DeviceSession)
    monkeypatch.setitem(decoding.PREFILL_TOKENS, "cpu", 6)
    for prompt in (*PROMPTS, PROMPTS):
        assert decoder.generate(prompt, 40, **options) == masked.generate(prompt, 40, **options)


def test_logits_are_the_same_but_of_padding(decoder: OnnxDecoder, masked: OnnxDecoder) -> None:
    ids = np.random.randint(0, masked.shape.vocab_size, (3, 11))
    assert error(decoder.logits(ids), masked.logits(ids)) < 1e-5
    mask = np.arange(11) >= np.array([[0], [4], [10]])
    actual, expected = decoder.logits(ids, mask), masked.logits(ids, mask)
    assert error(actual[mask], expected[mask]) < 1e-5
    assert not actual[~mask].any()


def test_what_a_step_gives_where_the_best_token_is_all_that_is_asked_for(decoder: OnnxDecoder) -> None:
    session = decoder._decoding
    cache = session._new_cache(1, 8)
    ids = np.array([[5, 6, 7]])
    session._step(ids, np.ones_like(ids), cache, 1)
    logits = session._step(ids[:, :1], np.ones((1, 4), np.int64), cache, 1)
    cache.best_only = True
    best = session._step(ids[:, :1], np.ones((1, 4), np.int64), cache, 1)
    assert isinstance(best, Best)
    assert best.tokens == logits[0, 0].argmax() and best.logits == logits.max()


def test_an_infinite_logit_is_refused(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DeviceSession._decode_one

    def infinite(self: DeviceSession, *args: Any) -> Any:
        best = step(self, *args)
        assert isinstance(best, Best)
        return Best(best.tokens, np.full_like(best.logits, np.inf))

    monkeypatch.setattr(DeviceSession, "_decode_one", infinite)
    with pytest.raises(NumericsError, match="NaN or infinite"):
        decoder.generate(PROMPT, 4)


def test_caches_are_kept_for_one_sequence_after_the_other(
    decoder: OnnxDecoder, masked: OnnxDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where steps are captured: two sequences at once have each their own, one after the other the same."""
    session = decoder._decoding
    assert isinstance(session, DeviceSession)
    monkeypatch.setattr(session, "_captures", True)
    monkeypatch.setattr(on_device, "run_options", lambda graph: onnxruntime.RunOptions())
    expected = [masked.generate(masked.encode(prompt), 20) for prompt in PROMPTS[:2]]
    streams = [decoder.stream(decoder.encode(prompt), 20) for prompt in PROMPTS[:2]]
    first, second = zip(*zip(*streams, strict=False), strict=True)
    assert [*first] == expected[0][: len(first)] and [*second] == expected[1][: len(second)]
    del streams
    gc.collect()
    (kept,) = session._free.values()
    assert kept.capacity == MIN_CAPACITY and kept.step is not None
    assert decoder.generate(decoder.encode(PROMPT), 20) == expected[0]
    gc.collect()
    assert [*session._free.values()] == [kept]
    monkeypatch.setattr(session, "shape", dataclasses.replace(session.shape, max_positions=700))
    assert [session._capacity(length) for length in (300, 512, 513, 701)] == [512, 512, 700, 701]


def test_lengths_that_the_mask_counts(directory: Path, masked: OnnxDecoder) -> None:
    """Padding after the tokens, and a mask as long as a buffer, give each row what it has by itself."""
    model = ir.load(directory / MODEL_FILE)
    assert count_lengths(model)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    ids = np.random.randint(0, masked.shape.vocab_size, (1, 7))
    past = {
        item.name: np.zeros((1, item.shape[1], 16, item.shape[3]), np.float32)
        for item in session.get_inputs()
        if item.name.startswith("past")
    }
    mask = (np.arange(16) < 7).astype(np.int64)[None]
    (logits,) = session.run(["logits"], {"input_ids": ids, "attention_mask": mask, **past})
    assert error(logits, masked.logits(ids)) < 1e-5


def test_other_providers_run_the_graph_as_it_is(directory: Path) -> None:
    session, _ = open_directory(directory)
    assert not on_device.takes_lengths(session) and not on_device.captures(session)


def test_what_the_provider_cannot_replay_runs_without(
    directory: Path, masked: OnnxDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sessions are asked for with capture first, then without; an option that is given stays."""
    asked: list[tuple[bool, Any]] = []

    def refuse(content: bytes, sess_options: Any, providers: Any) -> None:
        model = ir.from_proto(ir.serde.onnx.ModelProto.FromString(content))
        asked.append((len(model.graph.outputs) > 11, providers[0][1].get(on_device.CAPTURE)))
        raise RuntimeError("not all nodes have been assigned")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    path, options = directory / MODEL_FILE, onnxruntime.SessionOptions()
    assert on_device.open_on_device(path, masked.metadata, options, [on_device.CUDA], try_step) is None
    assert asked == [(True, "1"), (False, "1"), (True, None), (False, None)]
    asked.clear()
    chosen = [(on_device.CUDA, {on_device.CAPTURE: "0"})]
    assert on_device.open_on_device(path, masked.metadata, options, chosen, try_step) is None
    assert asked == [(True, "0"), (False, "0")]


def test_a_session_is_taken_only_if_a_step_runs(
    directory: Path, masked: OnnxDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here on the CPU: a capture that fails, fails in the first step."""
    steps = []

    def fails_twice(session: onnxruntime.InferenceSession, metadata: Any) -> None:
        try_step(session, metadata)
        steps.append(len(session.get_outputs()))
        if len(steps) <= 2:
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(on_device, "CUDA", "CPUExecutionProvider")
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(directory))
    arguments = (directory / MODEL_FILE, masked.metadata, options, ["CPUExecutionProvider"])
    session = on_device.open_on_device(*arguments, fails_twice)
    assert session is not None and steps == [13, 11, 13] and len(session.get_outputs()) == 13
    decoder = OnnxDecoder(session, masked.metadata, directory)
    assert decoder.generate(PROMPT, 20) == masked.generate(PROMPT, 20)


def test_genai_gives_each_row_of_a_batch_what_it_has_alone(directory: Path, masked: OnnxDecoder) -> None:
    """It pads after the tokens, and goes on after the padding."""
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    content = json.loads((directory / GENAI_FILE).read_text())
    assert content["model"]["decoder"]["filename"] == GENAI_MODEL_FILE
    # No weight is in two files.
    assert (directory / GENAI_MODEL_FILE).stat().st_size < 2 * (directory / MODEL_FILE).stat().st_size < 2**20
    rows = [masked.encode(prompt) for prompt in PROMPTS]
    length = max(map(len, rows))
    model = genai.Model(str(directory))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=length + 12, batch_size=len(rows))
    generator = genai.Generator(model, params)
    pad = content["model"]["pad_token_id"]
    generator.append_tokens(np.array([row + [pad] * (length - len(row)) for row in rows], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    for index, row in enumerate(rows):
        found = generator.get_sequence(index)[length:].tolist()
        assert found == masked.generate(row, 12, eos_token_id=[])
