"""Running exported directories: text, sampling, batches, limits, and damaged or foreign files."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
import torch
from support.onnx import genai_tokens
from torch import nn
from transformers import GenerationConfig

from teq_graph.capture import capture
from teq_graph.config import WeightSpec
from teq_graph.errors import InputError, ModelFileError
from teq_graph.graph import linears, weight_name
from teq_graph.loading import LoadedModel, load_model
from teq_graph.onnx import decoding, tensors
from teq_graph.onnx.export import export_onnx
from teq_graph.onnx.runtime import OnnxDecoder, OnnxModel, load
from teq_graph.onnx.session import MAX_THREADS
from teq_graph.onnx.text import StoppedText, TextStream
from teq_graph.passes.fold_constants import FoldConstants
from teq_graph.passes.fuse_rms_norm import FuseRMSNorm
from teq_graph.passes.lower_to_matmul_nbits import LowerToMatMulNBits
from teq_graph.passes.normalize_linears import NormalizeLinears
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.passes.remove_no_ops import RemoveNoOps

PROMPT = "Once upon a time"


def export_language_model(loaded: LoadedModel, directory: Path, bits: int | None, dtype: str) -> torch.fx.GraphModule:
    captured = capture(loaded.model)
    module = captured.graph_module
    for step in (RemoveNoOps(), NormalizeLinears(), FoldConstants(), FuseRMSNorm()):
        step(module)
    if bits is not None:
        names = {weight_name(linear) for linear in linears(module)} - {captured.lm_head}
        QuantizeLinears(dict.fromkeys(names, WeightSpec(bits, 32)))(module)
        LowerToMatMulNBits()(module)
    export_onnx(
        captured,
        directory,
        dtype=dtype,
        accuracy_level=1,
        tokenizer=loaded.tokenizer,
        config=loaded.model.config,
        generation_config=loaded.model.generation_config,
    )
    return module


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> LoadedModel:
    return load_model(data_dir / "models" / "stories260K")


@pytest.fixture(scope="module")
def stories_dir(stories: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260K as it is, exported in float32; tests copy it before changing it."""
    directory = tmp_path_factory.mktemp("stories") / "out"
    export_language_model(stories, directory, bits=None, dtype="float32")
    return directory


@pytest.fixture
def decoder(stories_dir: Path) -> OnnxDecoder:
    return OnnxDecoder.load(stories_dir, threads=1)


@pytest.fixture(scope="module")
def classifier_dir(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    captured = capture(model, (torch.randn(3, 8),), ({0: torch.export.Dim.DYNAMIC},))
    return model, export_onnx(captured, tmp_path_factory.mktemp("classifier") / "out")


def relative_error(actual: npt.NDArray[Any], expected: npt.NDArray[Any]) -> float:
    return float(np.abs(actual.astype(np.float64) - expected).max() / np.abs(expected).max())


def greedy(stories: LoadedModel, tokens: list[int], count: int) -> list[int]:
    """What transformers generates."""
    ids = torch.tensor([tokens])
    output: Any = stories.model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    new: list[int] = output[0, len(tokens) :].tolist()
    return new


def test_greedy_text_is_that_of_transformers(stories: LoadedModel, decoder: OnnxDecoder) -> None:
    tokens = decoder.encode(PROMPT)
    expected = greedy(stories, tokens, 60)
    assert decoder.generate(tokens, 60) == expected
    text = decoder.generate(PROMPT, 60)
    assert stories.tokenizer is not None
    assert stories.tokenizer.decode(tokens + expected, skip_special_tokens=True) == PROMPT + text


def test_stream_gives_the_same_text_in_whole_words(decoder: OnnxDecoder) -> None:
    pieces = list(decoder.stream(PROMPT, 60))
    assert len(pieces) > 30
    assert pieces[1] == " there"
    assert "".join(pieces) == decoder.generate(PROMPT, 60)
    tokens = decoder.encode(PROMPT)
    assert list(decoder.stream(tokens, 20)) == decoder.generate(tokens, 20)
    assert "".join(decoder.stream(tokens, 20, text=True)) == decoder.generate(PROMPT, 20)


def test_a_batch_gives_what_its_rows_give(decoder: OnnxDecoder) -> None:
    prompts = [PROMPT, "Lily and her mom went to the", "Tom"]
    alone = [decoder.generate(prompt, 25) for prompt in prompts]
    assert decoder.generate(prompts, 25) == alone
    tokens = [decoder.encode(prompt) for prompt in prompts]
    told: list[tuple[int, int]] = []
    batch = decoder.generate(tokens, 25, callback=lambda row, token: told.append((row, token)))
    assert batch == [decoder.generate(row, 25) for row in tokens]
    assert [[token for row, token in told if row == index] for index in range(3)] == batch


def test_a_row_that_stops_leaves_the_others_running(decoder: OnnxDecoder) -> None:
    tokens = [decoder.encode(PROMPT), decoder.encode("Lily and her mom went to the")]
    free = decoder.generate(tokens, 25, eos_token_id=())
    stop = next(token for token in free[0][:10] if token not in free[1])
    first = free[0].index(stop)
    assert decoder.generate(tokens, 25, eos_token_id=[stop]) == [free[0][:first], free[1]]
    assert decoder.generate(tokens[0], 25, eos_token_id=[stop]) == free[0][:first]


def test_the_model_s_own_stop_tokens(stories_dir: Path, decoder: OnnxDecoder, tmp_path: Path) -> None:
    free = decoder.generate(decoder.encode(PROMPT), 20)
    shutil.copytree(stories_dir, tmp_path / "out")
    description = json.loads((tmp_path / "out" / "teq_graph.json").read_text())
    assert description["eos_token_ids"] == [2]
    (tmp_path / "out" / "teq_graph.json").write_text(json.dumps({**description, "eos_token_ids": [free[7]]}))
    stopped = OnnxDecoder.load(tmp_path / "out", threads=1).generate(decoder.encode(PROMPT), 20)
    assert stopped == free[: free.index(free[7])]


def test_logits_equal_pytorch(stories: LoadedModel, decoder: OnnxDecoder) -> None:
    ids = torch.randint(0, 512, (2, 30))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = stories.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits
    actual = decoder.logits(ids, mask)
    assert actual.dtype == np.float32
    real = mask.bool()
    assert relative_error(actual[real.numpy()], expected[real].double().numpy()) <= 1e-5


@pytest.mark.parametrize("bits", [3, 4])
def test_quantized_logits_of_a_trained_model(babyllama: LoadedModel, bits: int, tmp_path: Path) -> None:
    module = export_language_model(babyllama, tmp_path / "out", bits, "float32")
    decoder = OnnxDecoder.load(tmp_path / "out", threads=1)
    ids = torch.randint(0, 105, (2, 20))
    empty = decoder.shape.empty_past(2, torch.float32)
    expected, _ = module(ids, torch.ones_like(ids), empty)
    assert relative_error(decoder.logits(ids), expected.detach().double().numpy()) <= 1e-4
    (tokens,) = decoder.generate([ids[0].tolist()], 8)
    replayed = decoder.logits([[*ids[0].tolist(), *tokens]])[0].argmax(-1)
    assert replayed[19:-1].tolist() == tokens


def test_half_precision(stories: LoadedModel, tmp_path: Path) -> None:
    module = export_language_model(stories, tmp_path / "out", 8, "float16")
    decoder = OnnxDecoder.load(tmp_path / "out", threads=1)
    assert {item.type for item in decoder.session.get_inputs()} == {"tensor(int64)", "tensor(float16)"}
    ids = torch.randint(0, 512, (2, 20))
    expected, _ = module(ids, torch.ones_like(ids), decoder.shape.empty_past(2, torch.float32))
    assert relative_error(decoder.logits(ids), expected.detach().double().numpy()) <= 4e-3
    tokens = decoder.generate(decoder.encode(PROMPT), 20)
    replayed = decoder.logits([[*decoder.encode(PROMPT), *tokens]])[0].argmax(-1)
    assert replayed[4:-1].tolist() == tokens


def test_bfloat16(stories: LoadedModel, tmp_path: Path) -> None:
    """onnxruntime has its kernels on GPUs only: the CPU finds the graph well typed, and itself without them."""
    export_language_model(stories, tmp_path / "out", bits=4, dtype="bfloat16")
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    types = {item.name: item.type.tensor_type.elem_type for item in (*proto.graph.input, *proto.graph.output)}
    cached = [kind for name, kind in types.items() if name.startswith(("past", "present"))]
    assert {*cached, types["logits"]} == {onnx.TensorProto.BFLOAT16} and len(cached) == 20
    kinds = {tensor.data_type for tensor in proto.graph.initializer}
    assert onnx.TensorProto.FLOAT16 not in kinds and onnx.TensorProto.BFLOAT16 in kinds
    with pytest.raises(ModelFileError, match=r"NOT_IMPLEMENTED.*Could not find an implementation for"):
        OnnxDecoder.load(tmp_path / "out")
    values = torch.randn(1000).bfloat16()
    array = values.view(torch.uint16).numpy()
    assert tensors.as_value(array, "bfloat16").data_type() == "tensor(bfloat16)"
    assert np.array_equal(tensors.as_float32(array), values.float().numpy())


def test_prefill_in_parts_changes_nothing(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [PROMPT, "Lily and her mom went to the park to play with the"]
    expected = [*decoder.generate(prompts, 12), decoder.generate(prompts[1], 12)]
    monkeypatch.setattr(decoding, "PREFILL_TOKENS", 4)
    assert [*decoder.generate(prompts, 12), decoder.generate(prompts[1], 12)] == expected


def test_shared_buffers_change_nothing(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder.metadata.shared_buffers
    expected = decoder.generate(PROMPT, 40)
    grown = dataclasses.replace(decoder.metadata, shared_buffers=False)
    monkeypatch.setattr(decoder._decoding, "metadata", grown)
    assert decoder._decoding._new_cache(1, 40).values[0].shape()[2] == 0
    assert decoder.generate(PROMPT, 40) == expected


def test_sampling_is_repeatable_and_bounded(decoder: OnnxDecoder) -> None:
    first = decoder.generate(PROMPT, 30, temperature=1.0, seed=5)
    assert decoder.generate(PROMPT, 30, temperature=1.0, seed=5) == first
    assert decoder.generate(PROMPT, 30, temperature=1.0, seed=6) != first
    assert decoder.generate(PROMPT, 30, temperature=1.0, top_k=1) == decoder.generate(PROMPT, 30)
    assert decoder.generate(PROMPT, 30, temperature=1.0, top_p=1e-6) == decoder.generate(PROMPT, 30)


def test_numbers_of_numpy_are_numbers(decoder: OnnxDecoder) -> None:
    tokens = decoder.encode(PROMPT)
    plain = decoder.generate(tokens, 8, temperature=0.5, top_k=5, top_p=0.5, seed=3, eos_token_id=2)
    given: dict[str, Any] = dict(
        temperature=np.float32(0.5), top_k=np.int64(5), top_p=np.float64(0.5), seed=np.int32(3)
    )
    stops: Any
    for prompt in (np.array(tokens), np.array(tokens, np.int32), torch.tensor(tokens), [*np.array(tokens)]):
        for stops in (np.array([2]), {2}, (np.uint8(2),), np.int64(2)):
            assert decoder.generate(prompt, np.int16(8), eos_token_id=stops, **given) == plain
    batch = torch.tensor([tokens, tokens])
    assert decoder.generate(batch, 8, **given, eos_token_id=[2])[0] == plain  # type: ignore[arg-type]


class Bytes:
    """A tokenizer whose tokens are the bytes of UTF-8."""

    def decode(self, tokens: list[int], **_: Any) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def test_text_waits_for_whole_characters() -> None:
    stream = TextStream(Bytes(), list(b"before "))
    pieces = [stream.push(byte) for byte in "aé€🙂b".encode()]
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "🙂", "b"]
    assert stream.push("é".encode()[0]) == ""
    assert stream.finish() == "�"
    assert stream.finish() == ""


def test_text_of_random_characters() -> None:
    generator = np.random.default_rng(torch.randint(0, 2**31, ()).item())
    text = "".join(chr(code) for code in generator.integers(32, 0x2FFF, 200) if chr(code).isprintable())
    stream = TextStream(Bytes())
    assert "".join(stream.push(byte) for byte in text.encode()) + stream.finish() == text


def test_stop_strings_across_pieces() -> None:
    text = "one two three, two"
    for stops, expected in ((("two",), "one "), (("ee,", "three"), "one two "), (("four",), text), (("o", "e tw"), "")):
        stopped = StoppedText(TextStream(Bytes()), stops)
        pieces = [stopped.push(byte) for byte in text.encode()]
        assert "".join(pieces) + stopped.finish() == expected
        assert stopped.stopped == (expected != text)
    waiting = StoppedText(TextStream(Bytes()), ["abc"])
    assert [waiting.push(byte) for byte in b"xababd"] == ["x", "", "", "ab", "", "abd"]


def test_stop_strings_end_text_and_tokens(decoder: OnnxDecoder) -> None:
    free = decoder.generate(PROMPT, 40)
    stop = free[20:26]
    cut = free[: free.index(stop)]
    assert decoder.generate(PROMPT, 40, stop_strings=stop) == cut
    assert "".join(decoder.stream(PROMPT, 40, stop_strings=["never there", stop])) == cut
    tokens = decoder.encode(PROMPT)
    ended = decoder.generate(tokens, 40, stop_strings=stop)
    assert stop in decoder.decode(ended, after=tokens)
    assert stop not in decoder.decode(ended[:-1], after=tokens)
    batch = decoder.generate([PROMPT, "Tom"], 40, stop_strings=stop)
    assert batch == [cut, decoder.generate("Tom", 40, stop_strings=stop)]


def test_a_stream_knows_its_end(decoder: OnnxDecoder) -> None:
    tokens = decoder.encode(PROMPT)
    stream = decoder.stream(tokens, 5)
    assert stream.finish_reason is None and stream.tokens == []
    assert [next(stream)] == stream.tokens
    assert stream.finish_reason is None
    assert len([*stream]) == 4 and stream.finish_reason == "length"
    ended = decoder.stream(tokens, 20, eos_token_id=stream.tokens[3])
    assert [*ended] == stream.tokens[:3] == ended.tokens and ended.finish_reason == "stop"
    text = decoder.stream(PROMPT, 40, stop_strings=decoder.decode(stream.tokens, after=tokens))
    assert [*text] == [] and text.finish_reason == "stop"


def test_generation_configs(stories: LoadedModel, decoder: OnnxDecoder) -> None:
    """Token for token what transformers gives, for what is no matter of chance."""
    tokens = decoder.encode(PROMPT)
    ids = torch.tensor([tokens])
    configs: list[dict[str, Any]] = [
        dict(max_new_tokens=40, repetition_penalty=1.3),
        dict(max_length=30, no_repeat_ngram_size=2),
        dict(max_new_tokens=40, suppress_tokens=[decoder.generate(tokens, 1)[0]]),
        dict(max_new_tokens=60, repetition_penalty=0.8, no_repeat_ngram_size=3, temperature=0.5, do_sample=False),
    ]
    free = decoder.generate(tokens, 40)
    for options in configs:
        config = GenerationConfig(**options)
        output: Any = stories.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        expected = output[0, len(tokens) :].tolist()
        assert decoder.generate(tokens, generation_config=config) == expected != free
        assert decoder.generate(tokens, generation_config=options) == expected
    late = GenerationConfig(max_new_tokens=30, min_new_tokens=10, eos_token_id=free[4], pad_token_id=0)
    output = stories.model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=late)
    assert decoder.generate(tokens, generation_config=late) == [
        token for token in output[0, len(tokens) :].tolist() if token != free[4]
    ]


def test_an_exported_generation_config_is_the_default(stories_dir: Path, tmp_path: Path) -> None:
    directory = tmp_path / "out"
    shutil.copytree(stories_dir, directory)
    file = directory / "generation_config.json"
    file.write_text(json.dumps({"do_sample": True, "temperature": 0.5, "max_new_tokens": 7, "num_beams": 4}))
    decoder = OnnxDecoder.load(directory, threads=1)
    tokens = decoder.encode(PROMPT)
    sampled = decoder.generate(tokens, seed=1)
    assert len(sampled) == 7
    assert sampled == decoder.generate(tokens, 7, do_sample=True, temperature=0.5, seed=1)
    assert decoder.generate(tokens, do_sample=False) == decoder.generate(tokens, temperature=0)
    for damaged in ("{", "[1]", json.dumps({"temperature": "hot"})):
        file.write_text(damaged)
        with pytest.raises(ModelFileError, match=r"generation_config.json cannot be read: [^\n]*$"):
            OnnxDecoder.load(directory, threads=1).generate(tokens)
    file.unlink()
    assert len(OnnxDecoder.load(directory, threads=1).generate(tokens, eos_token_id=())) == 128


def test_prefill_gives_the_last_logits_alone(decoder: OnnxDecoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a graph that the runtime changes as it opens it; the file gives all logits to anyone."""
    tokens = decoder.encode(PROMPT)
    expected, shapes = decoder.generate(tokens, 3), []
    step = decoding.DecoderSession._step

    def watched(self: Any, *args: Any, **options: Any) -> Any:
        logits = step(self, *args, **options)
        shapes.append(logits.shape)
        return logits

    monkeypatch.setattr(decoding.DecoderSession, "_step", watched)
    assert decoder.generate(tokens, 3) == expected
    assert shapes == [(1, 1, 512)] * 3
    assert decoder.logits([tokens]).shape == (1, len(tokens), 512)
    empty = [np.zeros((1, c.key_heads, 0, c.key_dim), np.float32) for c in decoder.shape.layers for _ in range(2)]
    session = onnxruntime.InferenceSession(decoder.directory / "model.onnx", providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    feeds = dict(zip(names, [np.array([tokens]), np.ones((1, len(tokens)), np.int64), *empty], strict=True))
    logits = session.run(["logits"], feeds)[0]
    np.testing.assert_allclose(logits, decoder.logits([tokens]), rtol=0, atol=1e-5 * np.abs(logits).max())


def test_the_context_is_a_limit(decoder: OnnxDecoder) -> None:
    limit = decoder.shape.max_positions
    assert limit == 512
    tokens = np.random.default_rng(0).integers(3, 512, limit + 1).tolist()
    with pytest.raises(InputError, match=r"513 tokens.* 512"):
        decoder.generate(tokens)
    with pytest.raises(InputError, match=r"513 tokens.* 512"):
        decoder.stream(tokens)
    assert len(decoder.generate(tokens[:512], eos_token_id=())) == 1
    assert len(decoder.generate(tokens[:510], eos_token_id=())) == 3


WRONG_PROMPTS = [
    *([], [[1], []], [512], [-1], [2**70], [1.5, "a"], [[[1]]], [1, [2]], ["a", [1]], ["a", 1]),
    *(5, None, 2.5, b"ab", {"input_ids": [1]}, {1, 2}, range(0), iter([1]), [True], [1.0], [[1, 2], [3.5]], [None]),
    *(np.array([1.0, 2.0]), np.array(3), np.ones((1, 2, 2), int), torch.tensor([1.5]), torch.tensor(7)),
    *("\udcff", "a\ud800", ["a", "\udcff"]),
]


@pytest.mark.parametrize("prompt", WRONG_PROMPTS, ids=range(len(WRONG_PROMPTS)))
def test_wrong_prompts(decoder: OnnxDecoder, prompt: Any) -> None:
    for refused in (decoder.generate, decoder.stream):
        with pytest.raises(InputError) as caught:
            refused(prompt)
        assert "\n" not in str(caught.value)
        str(caught.value).encode()


def test_a_mapping_is_no_prompt(decoder: OnnxDecoder) -> None:
    """What the tokenizer returns is the likely mistake, of which only the names would be read."""
    with pytest.raises(InputError, match=r"prompt: .*input_ids.*accepted are a string, token ids, or a list"):
        decoder.generate(decoder.tokenizer(PROMPT))


def test_other_wrong_arguments(decoder: OnnxDecoder) -> None:
    with pytest.raises(InputError, match="max_new_tokens"):
        decoder.generate([1], -1)
    with pytest.raises(InputError, match="single"):
        decoder.stream([[1], [2]])  # type: ignore[list-item]
    with pytest.raises(InputError, match="attention_mask"):
        decoder.logits([[1, 2]], [[1]])
    with pytest.raises(InputError, match="chat template"):
        decoder.encode_chat("hello")
    wrong: Any
    for wrong in (2.5, "3", [1]):
        with pytest.raises(InputError, match=r"^max_new_tokens="):
            decoder.generate([1], wrong)
    for wrong in (True, "x", ["x"], [2.0], {2: 3}, 2.5, [512], 512, -1):
        with pytest.raises(InputError, match=r"^eos_token_id(: |=)"):
            decoder.generate([1], 2, eos_token_id=wrong)
    for wrong in ([[1, 2], [3]], [[1.5]], {"input_ids": [[1]]}, "x", [["a"]], None, np.array([[0.5]])):
        with pytest.raises(InputError, match=r"^input_ids[:=].*accepted are integers \[batch, sequence\]$"):
            decoder.logits(wrong)
    with pytest.raises(InputError, match=r"^attention_mask"):
        decoder.logits([[1, 2]], [[0.5, 1.0]])
    for wrong in (5, None, "\udcff"):
        with pytest.raises(InputError, match=r"^prompt"):
            decoder.encode(wrong)
    for wrong in ("x", [1.5], 3, [-1], [2**70], {1: 2}):
        with pytest.raises(InputError):
            decoder.decode(wrong)
    assert decoder.decode([]) == ""
    assert decoder.generate([1], 0) == []


def test_chat_prompts(decoder: OnnxDecoder) -> None:
    decoder.tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}reply:"
    expected = decoder.tokenizer("user: hi\nreply:", add_special_tokens=False)["input_ids"]
    assert decoder.encode_chat("hi") == decoder.encode_chat([{"role": "user", "content": "hi"}]) == expected
    decoder.tokenizer.chat_template += (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    )
    wrong: Any
    for wrong in (5, None, [5], [{"role": "system", "content": "x"}]):
        with pytest.raises(InputError, match="messages: the chat template refuses them: ") as caught:
            decoder.encode_chat(wrong)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"prompt: character 6 is .* accepted is Unicode text"):
        decoder.encode_chat("\udcff")


def test_unknown_providers_are_named(stories_dir: Path) -> None:
    for providers in (["NoSuchExecutionProvider"], [("NoSuchExecutionProvider", {"device_id": 0})]):
        with pytest.raises(InputError, match=r"'NoSuchExecutionProvider'.*CPUExecutionProvider"):
            OnnxDecoder.load(stories_dir, providers=providers)  # type: ignore[arg-type]
    for wrong in ("CPUExecutionProvider", ()):
        with pytest.raises(InputError, match="providers"):
            OnnxDecoder.load(stories_dir, providers=wrong)
    threads: Any
    for threads in (0, -1, 1.5, "2", 99_999_999_999, MAX_THREADS + 1):
        with pytest.raises(InputError, match=f"threads=.*: accepted are None and integers from 1 to {MAX_THREADS}"):
            OnnxDecoder.load(stories_dir, threads=threads)
    for providers in (5, {"CPUExecutionProvider"}, [5], [()], [None]):  # type: ignore[assignment]
        with pytest.raises(InputError, match=r"provider"):
            OnnxDecoder.load(stories_dir, providers=providers)  # type: ignore[arg-type]


def test_session_options_are_the_user_s(stories_dir: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    decoder = OnnxDecoder.load(stories_dir, ["CPUExecutionProvider"], threads=1, session_options=options)
    assert decoder.session.get_session_options().graph_optimization_level == options.graph_optimization_level
    assert decoder.session.get_session_options().intra_op_num_threads == 1
    assert decoder.generate(PROMPT, 10) == OnnxDecoder.load(stories_dir, threads=1).generate(PROMPT, 10)


def remove_everything(path: Path) -> None:
    shutil.rmtree(path)


def drop_description(path: Path) -> None:
    (path / "teq_graph.json").unlink()


def scramble_description(path: Path) -> None:
    (path / "teq_graph.json").write_text("{nonsense")


def empty_description(path: Path) -> None:
    (path / "teq_graph.json").write_text('{"format_version": 1}')


def list_description(path: Path) -> None:
    (path / "teq_graph.json").write_text("[]")


def later_description(path: Path) -> None:
    (path / "teq_graph.json").write_text('{"format_version": 99}')


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((path / "teq_graph.json").read_text())
    change(content)
    (path / "teq_graph.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"dtype": "bogus"}, "dtype='bogus'"),
        ({"dtype": 5}, "dtype=5"),
        ({"dtype": ["float32"]}, "dtype="),
        ({"opset": "23"}, "opset='23'"),
        ({"accuracy_level": 4.0}, "accuracy_level=4.0"),
        ({"eos_token_ids": [2.5]}, "eos_token_ids=2.5"),
        ({"eos_token_ids": "ab"}, "eos_token_ids='a'"),
        ({"eos_token_ids": 2}, "int"),
        ({"pad_token_id": "x"}, "pad_token_id='x'"),
        ({"weights": []}, ""),
        ({"unknown": 1}, "unknown"),
        ({"decoder": "x"}, ""),
        ({"decoder": {"vocab_size": "x"}}, "vocab_size='x'"),
        ({"decoder": {"vocab_size": True}}, "vocab_size=True"),
        ({"decoder": {"vocab_size": 0}}, "vocab_size=0"),
        ({"decoder": {"max_positions": "many"}}, "max_positions='many'"),
        ({"decoder": {"layers": 5}}, ""),
        ({"decoder": {"layers": [{"key_heads": 1}]}}, "key_dim"),
        (
            {"decoder": {"layers": [dict.fromkeys(("key_heads", "key_dim", "value_heads", "value_dim"), -1)]}},
            "key_heads",
        ),
    ],
    ids=repr,
)
def test_a_damaged_description(stories_dir: Path, changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    directory = shutil.copytree(stories_dir, tmp_path / "out")

    def change(content: dict[str, Any]) -> None:
        for name, value in changes.items():
            content[name] = {**content[name], **value} if isinstance(value, dict) else value

    edit(directory, change)
    with pytest.raises(ModelFileError, match=f"teq_graph.json is damaged: .*{named}") as caught:
        load(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", None])
def test_a_description_of_another_model(dtype: str | None, stories_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(stories_dir, tmp_path / "out")
    edit(directory, lambda content: content.update(dtype=dtype) if dtype else content["decoder"]["layers"].pop())
    with pytest.raises(InputError, match="onnxruntime refuses input_ids") as caught:
        OnnxDecoder.load(directory, threads=1).generate([1, 2], 2)
    assert "\n" not in str(caught.value)


def drop_model(path: Path) -> None:
    (path / "model.onnx").unlink()


def cut_model(path: Path) -> None:
    content = (path / "model.onnx").read_bytes()
    (path / "model.onnx").write_bytes(content[: len(content) // 2])


def scramble_model(path: Path) -> None:
    (path / "model.onnx").write_bytes(bytes(range(256)) * 10)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (remove_everything, "out"),
        (drop_description, "teq_graph.json is missing"),
        (scramble_description, "teq_graph.json"),
        (empty_description, "teq_graph.json"),
        (list_description, "teq_graph.json"),
        (later_description, "format_version=99"),
        (drop_model, "model.onnx is missing"),
        (cut_model, "model.onnx"),
        (scramble_model, "model.onnx"),
    ],
)
def test_damaged_directories(stories_dir: Path, damage: Any, named: str, tmp_path: Path) -> None:
    shutil.copytree(stories_dir, tmp_path / "out")
    damage(tmp_path / "out")
    for open_directory in (OnnxDecoder.load, load):
        with pytest.raises(ModelFileError, match=named) as caught:
            open_directory(tmp_path / "out")
        assert "\n" not in str(caught.value)


def test_a_directory_without_tokenizer(stories_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(stories_dir, tmp_path / "out")
    for path in (tmp_path / "out").glob("tokenizer*"):
        path.unlink()
    decoder = OnnxDecoder.load(tmp_path / "out", threads=1)
    assert decoder.generate([1, 100], 3)
    with pytest.raises(ModelFileError, match="no usable tokenizer") as caught:
        decoder.generate(PROMPT)
    assert "\n" not in str(caught.value)


def test_other_models_run(classifier_dir: tuple[nn.Module, Path]) -> None:
    model, directory = classifier_dir
    opened = load(directory)
    assert isinstance(opened, OnnxModel)
    (name,) = (item.name for item in opened.session.get_inputs())
    x = torch.randn(5, 8)
    (actual,) = opened.run(**{name: x}).values()
    assert relative_error(actual, model(x).detach().double().numpy()) <= 1e-6
    with pytest.raises(InputError, match="wrong"):
        opened.run(wrong=x)
    with pytest.raises(InputError, match=r"\[5, 7\]") as caught:
        opened.run(**{name: x[:, :7]})
    assert "\n" not in str(caught.value)
    for wrong in ([[1.0], [2.0, 3.0]], [["a"]], None, {"x": 1}):
        with pytest.raises(InputError, match=rf"^{name}: accepted are values of float32") as caught:
            opened.run(**{name: wrong})
        assert "\n" not in str(caught.value)
    with pytest.raises(ModelFileError, match="it is not a causal language model"):
        OnnxDecoder.load(directory)


def test_what_onnxruntime_raises_it_does_not_log_as_well(
    classifier_dir: tuple[nn.Module, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of attributes that its kernels refuse it tells on standard error, too."""
    directory = shutil.copytree(classifier_dir[1], tmp_path / "out")
    model = onnx.load(directory / "model.onnx")
    node = next(node for node in model.graph.node if node.op_type in ("Gemm", "MatMul"))
    attributes = dict(K=8, N=4, bits=5, block_size=16)
    quantized = onnx.helper.make_node(
        "MatMulNBits", [node.input[0], "codes", "scales"], ["x"], domain="com.microsoft", **attributes
    )
    model.graph.node.append(quantized)
    codes, scales = np.zeros((4, 1, 8), np.uint8), np.zeros((4, 1), np.float32)
    model.graph.initializer.extend([onnx.numpy_helper.from_array(codes, "codes")])
    model.graph.initializer.extend([onnx.numpy_helper.from_array(scales, "scales")])
    model.graph.output.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, None))
    model.opset_import.append(onnx.helper.make_opsetid("com.microsoft", 1))
    onnx.save(model, directory / "model.onnx")
    with pytest.raises(ModelFileError, match=r"cannot be loaded: .*MatMulNBits"):
        load(directory)
    assert capfd.readouterr() == ("", "")


def test_load_tells_decoders_from_others(stories_dir: Path) -> None:
    assert isinstance(load(stories_dir), OnnxDecoder)


def test_onnxruntime_genai_gives_the_same_tokens(stories_dir: Path, decoder: OnnxDecoder) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokens = decoder.encode(PROMPT)
    assert genai_tokens(stories_dir, tokens, 40) == decoder.generate(tokens, 40)
    # Its tokenizer leaves out the special token in front until it is asked for it, as the README says.
    tokenizer = genai.Tokenizer(genai.Model(str(stories_dir)))
    assert [1, *tokenizer.encode(PROMPT).tolist()] == tokens
    tokenizer.update_options(add_special_tokens="true")
    assert tokenizer.encode(PROMPT).tolist() == tokens
