"""Running exported decoders: text, sampling, batches, limits."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from support.graphs import relative_error
from support.onnx import export_language_model, genai_tokens
from transformers import GenerationConfig

from teq_graph.errors import InputError, ModelFileError
from teq_graph.loading import LoadedModel, load_model
from teq_graph.onnx.runtime import OnnxDecoder, tensors
from teq_graph.onnx.runtime.generation import decoding

PROMPT = "Once upon a time"


@pytest.fixture(scope="module")
def stories(data_dir: Path) -> LoadedModel:
    return load_model(data_dir / "models" / "stories260K")


@pytest.fixture
def decoder(stories_dir: Path) -> OnnxDecoder:
    return OnnxDecoder.load(stories_dir, threads=1)


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
    assert relative_error(torch.from_numpy(actual)[real], expected[real]) <= 1e-5


@pytest.mark.parametrize("bits", [3, 4])
def test_quantized_logits_of_a_trained_model(babyllama: LoadedModel, bits: int, tmp_path: Path) -> None:
    compiled = export_language_model(babyllama, tmp_path / "out", bits)
    decoder = OnnxDecoder.load(tmp_path / "out", threads=1)
    ids = torch.randint(0, 105, (2, 20))
    expected = compiled(input_ids=ids).logits
    assert relative_error(torch.from_numpy(decoder.logits(ids)), expected) <= 1e-4
    (tokens,) = decoder.generate([ids[0].tolist()], 8)
    replayed = decoder.logits([[*ids[0].tolist(), *tokens]])[0].argmax(-1)
    assert replayed[19:-1].tolist() == tokens


def test_half_precision(stories: LoadedModel, tmp_path: Path) -> None:
    compiled = export_language_model(stories, tmp_path / "out", 8, "float16")
    decoder = OnnxDecoder.load(tmp_path / "out", threads=1)
    assert {item.type for item in decoder.session.get_inputs()} == {"tensor(int64)", "tensor(float16)"}
    ids = torch.randint(0, 512, (2, 20))
    expected = compiled(input_ids=ids).logits
    assert relative_error(torch.from_numpy(decoder.logits(ids)), expected) <= 4e-3
    tokens = decoder.generate(decoder.encode(PROMPT), 20)
    replayed = decoder.logits([[*decoder.encode(PROMPT), *tokens]])[0].argmax(-1)
    assert replayed[4:-1].tolist() == tokens


def test_bfloat16(stories: LoadedModel, tmp_path: Path) -> None:
    """onnxruntime has its kernels on GPUs only: the CPU finds the graph well typed, and itself without them."""
    export_language_model(stories, tmp_path / "out", 4, "bfloat16")
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
    monkeypatch.setitem(decoding.PREFILL_TOKENS, "cpu", 4)
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
    with pytest.warns(UserWarning, match=r"generation_config.json: num_beams=4 is not implemented and has no effect"):
        sampled = decoder.generate(tokens, seed=1)
    assert len(sampled) == 7
    assert sampled == decoder.generate(tokens, 7, do_sample=True, temperature=0.5, seed=1)
    assert decoder.generate(tokens, do_sample=False) == decoder.generate(tokens, temperature=0)
    for damaged in ("{", "[1]", "[" * 2000, json.dumps({"temperature": "hot"})):
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
    empty = [np.zeros(one.shape(1, 0), np.float32) for one in decoder.shape.cached]
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


def test_onnxruntime_genai_gives_the_same_tokens(stories_dir: Path, decoder: OnnxDecoder) -> None:
    genai = pytest.importorskip("onnxruntime_genai", reason="onnxruntime-genai is not installed")
    tokens = decoder.encode(PROMPT)
    assert genai_tokens(stories_dir, tokens, 40) == decoder.generate(tokens, 40)
    # Its tokenizer leaves out the special token in front until it is asked for it, as the README says.
    tokenizer = genai.Tokenizer(genai.Model(str(stories_dir)))
    assert [1, *tokenizer.encode(PROMPT).tolist()] == tokens
    tokenizer.update_options(add_special_tokens="true")
    assert tokenizer.encode(PROMPT).tolist() == tokens
