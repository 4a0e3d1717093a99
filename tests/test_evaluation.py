"""Perplexity and divergence against float64 references, and the text that every machine has."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from teq_graph.errors import InputError, NumericsError
from teq_graph.evaluation import builtin_text, divergence, perplexity
from teq_graph.loading import LoadedModel

VOCAB = 31


class Recent:
    """A language model over the tokens of its window: logits depend on the sum so far, so context matters."""

    def __init__(self) -> None:
        self.table = torch.randn(7, VOCAB)
        self.batches: list[tuple[int, int]] = []

    def __call__(self, ids: Tensor) -> Tensor:
        self.batches.append((ids.shape[0], ids.shape[1]))
        return self.table[ids.cumsum(-1) % 7]


def reference(model: Recent, ids: Tensor, context: int, stride: int) -> tuple[float, int]:
    """The definition, token by token in float64."""
    total, count, begin = 0.0, 0, 0
    done = 1
    while done < len(ids):
        end = min(begin + context, len(ids))
        for target in range(max(done, begin + 1), end):
            log_p = model.table.double()[int(ids[begin:target].sum()) % 7].log_softmax(-1)
            total -= float(log_p[ids[target]])
            count += 1
        done = max(done, end)
        begin += stride
    return math.exp(total / count), count


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("n", [2, 16, 17, 64, 65, 71, 300])
@pytest.mark.parametrize(("context", "stride"), [(16, None), (16, 16), (16, 5), (16, 1), (512, None), (2, 1)])
def test_perplexity_equals_its_definition(n: int, context: int, stride: int | None, batch_size: int) -> None:
    model, ids = Recent(), torch.randint(VOCAB, (n,))
    expected, count = reference(model, ids, context, stride or context)
    result = perplexity(model, ids, context=context, stride=stride, batch_size=batch_size)
    assert result.tokens == count
    assert result.value == pytest.approx(expected, rel=1e-5)
    assert max(b for b, _ in model.batches) <= batch_size
    assert max(s for _, s in model.batches) <= context
    assert result.seconds > 0


def test_every_window_predicts_its_tokens_but_the_first() -> None:
    assert perplexity(Recent(), torch.randint(VOCAB, (16 * 8,)), context=16).tokens == 8 * 15
    assert perplexity(Recent(), torch.randint(VOCAB, (16 * 8,)), context=16, stride=4).tokens == 16 * 8 - 1


@pytest.mark.parametrize("kind", ["numpy", "float16", "list"])
def test_kinds_of_logits_and_tokens(kind: str) -> None:
    model, ids = Recent(), torch.randint(VOCAB, (100,))
    expected = perplexity(model, ids, context=20).value
    functions: dict[str, Any] = {
        "numpy": lambda x: model(x).numpy(),
        "float16": lambda x: model(x).half(),
        "list": model,
    }
    given = ids.tolist() if kind == "list" else ids
    assert perplexity(functions[kind], given, context=20).value == pytest.approx(expected, rel=1e-3)


def test_uniform_predictions_over_a_large_vocabulary() -> None:
    ids = torch.randint(50_000, (400,))
    result = perplexity(lambda x: torch.zeros(*x.shape, 50_000), ids, context=200)
    assert result.value == pytest.approx(50_000, rel=1e-4)


def test_perplexity_refusals() -> None:
    ids = torch.randint(VOCAB, (30,))
    with pytest.raises(InputError, match="there are 1 tokens"):
        perplexity(Recent(), ids[:1], context=8)
    for context, stride in ((1, None), (8, 0), (8, 9)):
        with pytest.raises(InputError, match=f"context={context}"):
            perplexity(Recent(), ids, context=context, stride=stride)
    with pytest.raises(NumericsError, match="finite logits"):
        perplexity(lambda x: torch.full((*x.shape, VOCAB), torch.nan), ids, context=8)


def test_divergence_equals_its_definition() -> None:
    first, second, ids = Recent(), Recent(), torch.randint(VOCAB, (333,))
    result = divergence(first, second, ids, context=32, batch_size=3)
    total, agreed = 0.0, 0
    for window in ids.split(32):
        p, q = (model(window[None])[0].double().log_softmax(-1) for model in (first, second))
        total += float((p.exp() * (p - q)).sum())
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    assert result.tokens == 333
    assert result.kl_divergence == pytest.approx(total / 333, rel=1e-5)
    assert result.top1_agreement == agreed / 333
    same = divergence(first, first, ids, context=32)
    assert abs(same.kl_divergence) < 1e-7
    assert same.top1_agreement == 1.0


def test_divergence_refuses_logits_that_are_not_finite() -> None:
    with pytest.raises(NumericsError, match="finite"):
        divergence(Recent(), lambda x: np.full((*x.shape, VOCAB), np.inf, np.float32), [1, 2, 3], context=3)


def test_builtin_text_is_prose() -> None:
    text = builtin_text()
    lines = text.split("\n")
    assert len(text) > 80_000  # some 20 thousand tokens, more than the 16 × 512 of the usual measurement
    assert text == builtin_text()
    assert len(set(lines)) == len(lines)
    assert all(line.endswith(".") and line == line.strip() and "  " not in line for line in lines)
    for mark in ("`", '"', "::=", "+--", "***", "==="):
        assert mark not in text
    letters = sum(character.isalpha() or character == " " for character in text)
    assert letters > 0.9 * len(text)


def test_trained_model_on_builtin_and_own_text(stories260k: LoadedModel) -> None:
    """Its kind of text is far likelier to the model than the language reference, and more context helps."""
    model, tokenizer = stories260k.model, stories260k.tokenizer
    assert tokenizer is not None

    def logits(ids: Tensor) -> Tensor:
        result: Tensor = model(ids).logits
        return result

    story = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    story += "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
    own = tokenizer(story)["input_ids"]
    foreign = tokenizer(builtin_text()[:3000])["input_ids"]
    likely = perplexity(logits, own, context=256).value
    assert likely < 10 < 50 < perplexity(logits, foreign, context=256).value
    assert likely < perplexity(logits, own, context=8).value
    sliding = perplexity(logits, own, context=8, stride=2).value
    assert sliding < perplexity(logits, own, context=8).value


@pytest.mark.slow
def test_float_perplexity_of_the_default_model(smollm2: LoadedModel, wikitext: str) -> None:
    """The first 2 of the 16 windows that give 36.6: equal to the model's own loss, and to what was measured."""
    assert smollm2.tokenizer is not None
    ids = torch.tensor(smollm2.tokenizer(wikitext[:12_000])["input_ids"][:1024])
    result = perplexity(lambda x: smollm2.model(x).logits, ids, context=512)
    assert result.tokens == 2 * 511
    with torch.inference_mode():
        loss = smollm2.model(ids.reshape(2, 512), labels=ids.reshape(2, 512)).loss
    assert result.value == pytest.approx(float(loss.exp()), rel=1e-4)
    assert result.value == pytest.approx(28.233, rel=1e-3)
