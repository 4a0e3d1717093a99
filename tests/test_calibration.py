"""Calibration batches from every kind of source, the sampler's distribution, and refusals."""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.architectures import BY_NAME
from support.graphs import relative_error
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from teq_graph import pipeline
from teq_graph.calibration import TokenInputs, calibration_batches, decoding_step, make_batches
from teq_graph.calibration.self_sampling import StepFn, sample_text
from teq_graph.capture import capture
from teq_graph.config import TrainingConfig
from teq_graph.errors import ConfigError, InputError, NumericsError
from teq_graph.loading import LoadedModel
from teq_graph.passes.grow_caches_in_place import append

VOCAB = 50
DYNAMIC = torch.export.Dim.DYNAMIC


class Words:
    """A tokenizer: words are numbers, and are their own ids."""

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def batches_of(calibration: Any, **options: Any) -> list[Any]:
    tokens = TokenInputs(vocab_size=VOCAB, max_positions=20)
    defaults = dict(samples=8, length=6, batch_size=3, seed=1, tokenizer=Words(), tokens=tokens)
    return make_batches(calibration, **{**defaults, **options})


def rows_of(batches: list[Any]) -> list[list[int]]:
    """The unmasked tokens of every row, after checking the form of the batches."""
    rows = []
    for batch in batches:
        ids, mask = batch["input_ids"], batch["attention_mask"]
        assert list(batch) == ["input_ids", "attention_mask"]
        assert ids.dtype == mask.dtype == torch.int64
        assert ids.shape == mask.shape
        for row, kept in zip(ids, mask, strict=True):
            length = int(kept.sum())
            assert kept.tolist() == [1] * length + [0] * (len(kept) - length)  # padding on the right
            rows.append(row[:length].tolist())
    return rows


def text_of(count: int) -> str:
    return " ".join(str(index % VOCAB) for index in range(count))


def test_text_file(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text(text_of(6 * 30 + 5))
    for source in (path, str(path)):
        batches = batches_of(source)
        assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 2]
        rows = rows_of(batches)
        windows = [[index % VOCAB for index in range(begin, begin + 6)] for begin in range(0, 180, 6)]
        assert all(row in windows for row in rows)
        assert rows != sorted(rows)
    assert rows_of(batches_of(path)) == rows_of(batches_of(path))
    assert rows_of(batches_of(path, seed=2)) != rows_of(batches_of(path, seed=1))
    everything = rows_of(batches_of(path, samples=1000, seed=4))
    assert sorted(everything) == sorted(windows)


def test_short_text_is_used_whole(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(text_of(4))
    assert rows_of(batches_of(tmp_path / "short.txt")) == [[0, 1, 2, 3]]


def test_length_is_bounded_by_the_positions(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(text_of(100))
    assert {len(row) for row in rows_of(batches_of(tmp_path / "corpus.txt", length=64))} == {20}


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_strings_are_cut_one_by_one_and_padded(kind: Callable[[list[str]], Any]) -> None:
    rows = rows_of(batches_of(kind(["1 2 3", text_of(13), "7", ""])))
    assert sorted(rows) == [[0, 1, 2, 3, 4, 5], [1, 2, 3], [6, 7, 8, 9, 10, 11], [7]]


def test_rows_of_a_data_set_are_joined() -> None:
    rows = [{"label": 1, "text": text_of(4)}, {"label": 0, "text": ""}, {"label": 1, "text": text_of(8)}]
    got = rows_of(batches_of(rows))
    assert sorted(got) == [[0, 1, 2, 3, 0, 1], [2, 3, 4, 5, 6, 7]]
    assert sorted(rows_of(batches_of([{"content": text_of(12)}]))) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]


def test_an_endless_data_set_is_read_as_far_as_needed() -> None:
    rows_read = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal rows_read
        while True:
            rows_read += 1
            yield {"text": text_of(5)}

    assert len(rows_of(batches_of(endless()))) == 8
    assert rows_read < 8 * 6 * 32


def test_datasets_objects_and_names(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"text": [text_of(7), text_of(5)]})
    expected = [[0, 1, 2, 3, 4, 5], [6, 0, 1, 2, 3, 4]]
    assert sorted(rows_of(batches_of(data))) == expected
    assert sorted(rows_of(batches_of(data.to_iterable_dataset()))) == expected
    tokens = datasets.Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]})
    assert rows_of(batches_of(tokens)) == [[1, 2, 3], [4, 5, 6]]
    with pytest.raises(InputError, match=r"dict with the keys \['train'\]"):
        batches_of(datasets.DatasetDict({"train": data}))
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "train.txt").write_text(f"{text_of(7)}\n{text_of(5)}\n")
    assert sorted(rows_of(batches_of(f"{folder}:train"))) == expected


def test_data_set_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="the data set cannot be loaded") as caught:
        batches_of(f"{tmp_path / 'nowhere'}:train")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="pip install datasets"):
        batches_of("wikitext:wikitext-2-raw-v1:validation")


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_token_tensors_are_used_whole(dtype: torch.dtype) -> None:
    ids = torch.randint(VOCAB, (10, 7)).to(dtype)
    for given in (ids, ids.numpy(), [ids[:4], ids[4:]], list(ids), ids.tolist(), iter(ids.split(2))):
        batches = batches_of(given)
        assert [len(batch["input_ids"]) for batch in batches] == [3, 3, 3, 1]
        assert rows_of(batches) == ids.tolist()


def test_an_iterator_is_read_for_as_many_elements_as_samples() -> None:
    assert len(rows_of(batches_of(torch.tensor([[1, index % VOCAB]]) for index in itertools.count()))) == 8


def test_dicts_are_passed_through() -> None:
    ids, mask = torch.randint(VOCAB, (2, 5)), torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    first, second = batches_of([{"input_ids": ids, "attention_mask": mask}, {"input_ids": ids.numpy()}])
    assert torch.equal(first["input_ids"], ids)
    assert torch.equal(first["attention_mask"], mask)
    assert torch.equal(second["input_ids"], ids)
    assert torch.equal(second["attention_mask"], torch.ones_like(ids))
    (alone,) = batches_of({"input_ids": ids})
    assert torch.equal(alone["input_ids"], ids)


def test_inputs_of_other_models() -> None:
    x, y = torch.randn(7, 4), torch.randn(7, 2)
    other = dict(tokens=None, tokenizer=None)
    split = batches_of(x, **other)
    assert [len(batch) for batch in split] == [3, 3, 1]
    assert torch.equal(torch.cat(split), x)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=4)
    batches = batches_of(loader, **other)
    assert all(isinstance(batch, tuple) for batch in batches)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), y)
    (named,) = batches_of([{"pixel_values": x.numpy(), "flag": True}], **other)
    assert torch.equal(named["pixel_values"], x)
    assert named["flag"] is True


def test_rows_without_a_mask_are_not_padded() -> None:
    rows = [torch.arange(length) for length in (4, 4, 4, 4, 2, 4)]
    batches = batches_of(rows, tokens=TokenInputs(vocab_size=VOCAB, mask=None))
    assert [list(batch) for batch in batches] == [["input_ids"]] * 4
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 4), (1, 4), (1, 2), (1, 4)]


class Encoder(nn.Module):
    """Takes a mask of bools."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(VOCAB, 16), nn.Linear(16, 16)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        result: Tensor = self.linear(self.embedding(input_ids).masked_fill(~attention_mask[..., None], 0))
        return result


CONFIG = BertConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
LLAMA = LlamaConfig(vocab_size=VOCAB, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
IDS = torch.randint(VOCAB, (2, 5))
MODELS: dict[str, tuple[Callable[[], nn.Module], Any, torch.dtype | None]] = {
    "encoder": (lambda: BertModel(CONFIG), None, torch.int64),
    "decoder with inputs of its user's": (
        lambda: LlamaForCausalLM(LLAMA),
        {"input_ids": IDS, "use_cache": False},
        None,
    ),
    "mask of bools": (Encoder, {"input_ids": IDS, "attention_mask": torch.ones(2, 5, dtype=torch.bool)}, torch.bool),
}


@pytest.mark.parametrize("name", MODELS)
def test_tokens_of_models_that_take_them_by_name(name: str) -> None:
    make, example, mask = MODELS[name]
    shapes = example and {
        key: {0: DYNAMIC, 1: DYNAMIC} if isinstance(x, Tensor) else None for key, x in example.items()
    }
    captured = capture(make().eval(), example, shapes)
    assert captured.decoder is None
    ids = torch.randint(VOCAB, (4, 7))
    for given in (ids, ids.numpy(), [ids[:3], ids[3:]], [{"input_ids": ids[:3]}, {"input_ids": ids[3:]}]):
        batches = calibration_batches(given, captured, TrainingConfig(batch_size=3), None, example)
        assert [len(batch["input_ids"]) for batch in batches] == [3, 1]
        assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids)
        for batch in batches:
            assert ("attention_mask" in batch) == (mask is not None)
            assert mask is None or (batch["attention_mask"].dtype == mask and bool(batch["attention_mask"].all()))
            captured.bind(batch)


def test_a_tensor_of_a_model_that_takes_it_by_name() -> None:
    captured = capture(BY_NAME["ViT"].build())
    images = torch.randn(5, 3, 16, 16)
    batches = calibration_batches(images, captured, TrainingConfig(batch_size=3), None)
    bound = [captured.bind(batch)[1]["pixel_values"] for batch in batches]
    assert [len(x) for x in bound] == [3, 2] and torch.equal(torch.cat(bound), images)


def test_batches_are_where_the_graph_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever they are made from: a graph that was moved to a GPU computes on nothing else."""
    captured = capture(LlamaForCausalLM(LLAMA).eval())
    monkeypatch.setattr(type(captured), "device", torch.device("meta"))
    rows = torch.arange(24).reshape(4, 6)
    for given in (rows, [{"input_ids": row[None], "attention_mask": torch.ones_like(row[None])} for row in rows]):
        batches = calibration_batches(given, captured, TrainingConfig(batch_size=2), None)
        assert {leaf.device.type for leaf in pytree.tree_leaves(batches)} == {"meta"}


def test_own_samples() -> None:
    calls = []

    def sample(samples: int, length: int, seed: int) -> Tensor:
        calls.append((samples, length, seed))
        return torch.randint(VOCAB, (samples, length))

    assert len(rows_of(batches_of(None, sample_fn=sample, length=64))) == 8
    assert calls == [(8, 20, 1)]


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (None, "only a causal language model"),
        ([], "empty"),
        (iter(()), "empty"),
        ([""], "empty"),
        (torch.empty(0, 4, dtype=torch.int64), "empty"),
        ([torch.empty(2, 0, dtype=torch.int64)], r"empty, \[2, 0\]"),
        (torch.tensor([[1, VOCAB]]), f"token id {VOCAB} in batch 0; accepted are 0 to {VOCAB - 1}"),
        (torch.tensor([[1, -1]]), "token id -1"),
        (torch.zeros(2, 21, dtype=torch.int64), "21 tokens; accepted are up to 20"),
        (torch.randn(2, 4), "float32"),
        ([torch.zeros(1, 2, 3, dtype=torch.int64)], "integer tensors"),
        (["1 2", 3], "element 1 is int"),
        ([object()], "object"),
        (7, "calibration=7"),
        ([{"attention_mask": torch.ones(1, 2)}], "input_ids is missing"),
        ([{"input_ids": torch.ones(1, 2).long(), "attention_mask": torch.ones(1, 3)}], "equal shapes"),
        ("no-such-file.txt", "no such file"),
        ([{"text": "1 2"}, {"label": 1}], r"columns \['label'\]"),
    ],
)
def test_refusals(calibration: Any, words: str) -> None:
    with pytest.raises(InputError, match=words) as caught:
        batches_of(calibration)
    assert "\n" not in str(caught.value)


def test_text_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer"):
        batches_of(["1 2 3"], tokenizer=None)


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    with pytest.raises(InputError, match="accepted is a text file in UTF-8"):
        batches_of(tmp_path / "binary")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_finite(bad: float) -> None:
    x = torch.randn(3, 4)
    y = x.clone()
    y[1, 2] = bad
    with pytest.raises(NumericsError, match=r"input \['pixels'\] of batch 1 holds NaN or infinity"):
        batches_of([{"pixels": x}, {"pixels": y}], tokens=None)


def test_numpy_scalars_of_other_types_are_kept() -> None:
    x = torch.from_numpy(np.random.default_rng(0).integers(0, 9, (4, 2)))
    (batch,) = batches_of([(x, 3)], tokens=None)
    assert torch.equal(batch[0], x)
    assert batch[1] == 3


def markov_step(table: Tensor) -> Callable[[Tensor, Any], tuple[Tensor, Any]]:
    """A language model whose next token depends on the last one; its past counts tokens, to see that it is passed."""

    def step(input_ids: Tensor, past: int | None) -> tuple[Tensor, int]:
        return table[input_ids], (past or 0) + input_ids.shape[1]

    return step


def test_sampler_draws_from_the_model() -> None:
    table = torch.randn(6, 6) * 1.5
    table[:, 5] = -torch.inf
    text = sample_text(markov_step(table), samples=500, length=120, seed=0, vocab_size=6, batch_size=200)
    assert text.shape == (500, 120)
    assert text.dtype == torch.int64
    assert set(text[:, 0].tolist()) == set(range(6))
    pairs = text[:, :-1] * 6 + text[:, 1:]
    counts = pairs.flatten().bincount(minlength=36).reshape(6, 6)[:5].double()
    expected = table[:5].double().softmax(-1)
    visits = counts.sum(-1, keepdim=True)
    assert visits.min() > 1000
    deviation = (counts / visits - expected).abs() / (expected * (1 - expected) / visits).sqrt().clamp(min=1e-9)
    assert deviation[:, :5].max() < 5  # standard deviations
    assert counts[:, 5].sum() == 0


def test_sampler_starts_as_told_and_repeats() -> None:
    step = markov_step(torch.randn(VOCAB, VOCAB))
    options = dict(samples=40, length=9, vocab_size=VOCAB, bos_token_id=1, special_ids=range(40), batch_size=16)
    text = sample_text(step, seed=3, **options)
    assert set(text[:, 0].tolist()) == {1}
    assert text[:, 1].min() >= 40
    assert torch.equal(text, sample_text(step, seed=3, **options))
    assert not torch.equal(text, sample_text(step, seed=4, **options))
    assert not text.is_inference()


def test_sampler_of_one_token() -> None:
    text = sample_text(markov_step(torch.randn(9, 9)), samples=3, length=1, seed=0, vocab_size=9, bos_token_id=2)
    assert text.tolist() == [[2], [2], [2]]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sampler_refuses_logits_that_are_not_finite(bad: float) -> None:
    with pytest.raises(NumericsError, match="NaN or infinity"):
        sample_text(markov_step(torch.full((9, 9), bad)), samples=3, length=8, seed=0, vocab_size=9)


def cached_step(model: PreTrainedModel) -> StepFn:
    def step(input_ids: Tensor, past: Any) -> tuple[Tensor, Any]:
        name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
        output = model(input_ids=input_ids, use_cache=True, **{name: past})
        return output.logits, output[name]

    return step


def test_a_trained_model_writes_text_it_finds_likely(stories260k: LoadedModel) -> None:
    model, tokenizer = stories260k.model, stories260k.tokenizer
    assert tokenizer is not None
    special = tokenizer.all_special_ids
    text = sample_text(
        cached_step(model), samples=8, length=96, seed=0, vocab_size=512, bos_token_id=1, special_ids=special
    )
    with torch.inference_mode():
        log_p = model(text[:, :-1]).logits.log_softmax(-1)
    nll = -log_p.gather(-1, text[:, 1:, None]).squeeze(-1)[:, 1:]
    entropy = -(log_p.exp() * log_p).sum(-1)[:, 1:]
    assert abs(nll.mean() - entropy.mean()) < 0.15  # equal in expectation where text is drawn from the model
    assert nll.mean() < 2.5 < torch.tensor(512.0).log()


def test_real_tokenizer_and_text(stories260k: LoadedModel, wikitext_validation: Path) -> None:
    batches = make_batches(
        wikitext_validation,
        samples=6,
        length=128,
        batch_size=4,
        tokenizer=stories260k.tokenizer,
        tokens=TokenInputs(
            vocab_size=stories260k.model.config.vocab_size,
            max_positions=stories260k.model.config.max_position_embeddings,
        ),
    )
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 128), (2, 128)]  # type: ignore[call-overload]


WORDS = 97  # of the small architectures


# ------------------------------------------------------------------------------------------------- single rows, steps


def test_rows_given_one_at_a_time_train_in_batches() -> None:
    captured = capture(BY_NAME["Llama (GQA)"].build())
    config = TrainingConfig(batch_size=3)
    rows = torch.randint(3, WORDS, (8, 9))
    singles = [{"input_ids": row[None]} for row in rows[:7]] + [{"input_ids": rows[7:, :5]}]
    for elements in (singles, [{**row, "attention_mask": torch.ones_like(row["input_ids"])} for row in singles]):
        batches = calibration_batches(elements, captured, config, None)
        assert [tuple(batch["input_ids"].shape) for batch in batches] == [(3, 9), (3, 9), (1, 9), (1, 5)]  # type: ignore[call-overload]
        assert torch.equal(torch.cat([batch["input_ids"] for batch in batches[:3]]), rows[:7])  # type: ignore[call-overload]
        assert all(bool((batch["attention_mask"] == 1).all()) for batch in batches)  # type: ignore[call-overload]
    pairs = [{"input_ids": rows[:2]}, {"input_ids": rows[2:3]}, {"input_ids": rows[3:4]}]
    assert [len(batch["input_ids"]) for batch in calibration_batches(pairs, captured, config, None)] == [2, 2]  # type: ignore[call-overload]


@pytest.mark.parametrize("dynamic", [True, False])
def test_rows_of_other_models_are_joined_where_their_number_is_free(dynamic: bool) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(16, 8)

        def forward(self, x: Tensor, gate: Tensor, scale: float = 1.0) -> Tensor:
            result: Tensor = self.linear(x) * gate * scale
            return result

    example = {"x": torch.randn(4, 16), "gate": torch.randn(4, 8), "scale": 2.0}
    batch = torch.export.Dim("batch")
    shapes = {"x": {0: batch}, "gate": {0: batch}, "scale": None} if dynamic else None
    captured = capture(Gated().eval(), example, shapes)
    rows = [{"x": torch.randn(1, 16), "gate": torch.randn(1, 8), "scale": 2.0} for _ in range(5)]
    batches = calibration_batches(rows, captured, TrainingConfig(batch_size=4), None)
    assert [len(batch["x"]) for batch in batches] == ([4, 1] if dynamic else [1] * 5)  # type: ignore[call-overload]
    if dynamic:
        assert torch.equal(batches[0]["gate"], torch.cat([row["gate"] for row in rows[:4]]))  # type: ignore[call-overload,arg-type]
        assert all(batch["scale"] == 2.0 for batch in batches)  # type: ignore[call-overload]


@pytest.mark.parametrize(
    "name", ["Llama (GQA)", "Mistral", "Gemma2", "BLOOM", "MPT", "GPT-2", "GPT-J", "Falcon (MQA)", "OPT", "OLMo2"]
)
def test_a_decoding_step_gives_what_the_graph_gives(name: str) -> None:
    """Over caches that grow in place, beyond their room, and beside one another."""
    captured = capture(BY_NAME[name].build())
    pipeline.run(pipeline.NORMALIZE, captured.graph_module)
    code = captured.graph_module.code
    tokens = torch.randint(3, WORDS, (3, 14))
    step = decoding_step(captured, 11)
    with torch.inference_mode():
        past = None
        for start, end in ((0, 5), (5, 6), (6, 10), (10, 11), (11, 12), (12, 14)):
            logits, past = step(tokens[:, start:end], past)
            args, _ = captured.bind({"input_ids": tokens[:, :end]})
            expected, _ = captured.graph_module(*args)
            assert relative_error(logits, expected[:, start:]) <= 1e-5
        other, _ = step(tokens[:2, :4], None)
        assert relative_error(other, expected[:2, :4]) <= 1e-5
    assert captured.graph_module.code == code


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_decoding_step_in_half_precision(dtype: torch.dtype) -> None:
    captured = capture(BY_NAME["Llama (GQA)"].build().to(dtype))
    tokens = torch.randint(3, WORDS, (2, 9))
    step = decoding_step(captured, 9)
    with torch.inference_mode():
        _, past = step(tokens[:, :8], None)
        logits, _ = step(tokens[:, 8:], past)
        expected, _ = captured.graph_module(*captured.bind({"input_ids": tokens})[0])
        _, present = step(tokens[:, 8:], past)
    assert relative_error(logits, expected[:, 8:]) <= 8 * torch.finfo(dtype).eps
    # The cache is written in place: what a step is given and what it gives are one buffer.
    assert past[0][0].untyped_storage().data_ptr() == present[0][0].untyped_storage().data_ptr()


def test_a_past_without_room_is_copied() -> None:
    no_room = (torch.empty(2, 3, 0, 8), torch.randn(2, 3, 4, 8), torch.randn(3, 2, 9, 8)[:, :, :4].transpose(0, 1))
    for past in no_room:
        new = torch.randn(2, 3, 1, 8)
        assert torch.equal(append(past, new), torch.cat([past, new], 2))
    buffer = torch.randn(2, 3, 6, 8)
    expected = torch.cat([buffer[:, :, :4], new], 2)
    grown = append(buffer[:, :, :4], new)
    assert torch.equal(grown, expected) and grown.data_ptr() == buffer.data_ptr()


@pytest.mark.parametrize(("option", "value"), [("samples", 2**31 - 1), ("length", 2**31 - 1)])
def test_own_text_that_no_memory_holds(option: str, value: int) -> None:
    """Refused before anything is allocated; BLOOM names no limit of positions."""
    training = TrainingConfig(**{"samples": 4, "length": 2**20, option: value})
    captured = capture(BY_NAME["BLOOM"].build())
    with pytest.raises(ConfigError, match=rf"{option}={value}.* GB of memory; accepted is what fits") as caught:
        calibration_batches(None, captured, training, None)
    assert "\n" not in str(caught.value)
