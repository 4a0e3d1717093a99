"""What the analysis refuses, and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.architectures import VOCAB
from support.graphs import find
from support.sites import WIDTH, Net, equivalence, examine, refusal, sites
from torch import Tensor, nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from teq_graph.capture import capture

Forward = Callable[..., Any]

OTHER = "it is added to a value that does not carry its scale"
REFUSED: dict[str, tuple[Forward, str]] = {
    "residual": (lambda s, x: s.second(x + s.first(x)), OTHER),
    "residual subtracted": (lambda s, x: s.second(x - s.first(x)), "it is subtracted"),
    "subtracted from a constant": (lambda s, x: s.second(s.shift - s.first(x)), "it is subtracted"),
    "a computed value added": (lambda s, x: s.second(s.first(x) + x.mean()), OTHER),
    "a scalar added": (lambda s, x: s.second(s.first(x) + 1.0), OTHER),
    "gelu": (lambda s, x: s.second(functional.gelu(s.first(x))), "gelu does not commute"),
    "silu": (lambda s, x: s.second(functional.silu(s.first(x))), "silu does not commute"),
    "softmax": (lambda s, x: s.second(s.first(x).softmax(-1)), "softmax does not commute"),
    "sigmoid gate": (lambda s, x: s.second(x * s.first(x).sigmoid()), "sigmoid does not commute"),
    "squared relu": (lambda s, x: s.second(s.first(x).relu().square()), "square does not commute"),
    "product with itself": (lambda s, x: (lambda y: s.second(y * y))(s.first(x)), "mul does not commute"),
    "divisor": (lambda s, x: s.second(x / s.first(x)), "div does not commute"),
    "graph output": (lambda s, x: (lambda y: (s.second(y), y))(s.first(x)), "it is an output of the graph"),
    "shared with another linear": (lambda s, x: s.second(s.first(x)) + s.first(x * 2).exp()[..., :8], "is shared with"),
    "consumer shared": (lambda s, x: s.second(s.first(x)) + s.second(x), "second.weight is shared with linear"),
    "consumer read otherwise": (
        lambda s, x: s.second(s.first(x)) + s.second.weight[x[..., 0].argmax(-1) % 8][:, None, :8],
        "second.weight is shared with index",
    ),
    "constant shared": (lambda s, x: s.second(s.first(x).relu() + s.shift) + (x * s.shift)[..., :8], "shift is"),
    "integer cast": (lambda s, x: s.second(s.first(x).to(torch.int64).float()), "to does not commute"),
    "clamp": (lambda s, x: s.second(s.first(x).clamp(max=1)), "clamp does not commute"),
    "masked with one": (lambda s, x: s.second(s.first(x).masked_fill(x > 0, 1.0)), "masked_fill does not commute"),
    "own mask": (lambda s, x: (lambda y: s.second(y.masked_fill(y > 0.5, 0.0)))(s.first(x)), "gt does not commute"),
    "where with another value": (lambda s, x: s.second(torch.where(x > 0, s.first(x), x)), "where does not commute"),
    "channels mixed by a mean": (lambda s, x: s.second(s.first(x).mean(-1, keepdim=True) * x), "mean does not commute"),
    "channels mixed by a matrix": (lambda s, x: s.second((s.first(x) @ x.transpose(1, 2)) @ x), "matmul does not"),
    "another norm": (lambda s, x: s.second(functional.layer_norm(s.first(x), (WIDTH,))), "layer_norm does not"),
    "another linear's bias": (
        lambda s, x: (lambda y: functional.linear(y, s.second.weight, y.mean((0, 1))[:8]))(s.first(x)),
        "linear does not commute",
    ),
    "channels chosen by the input": (
        lambda s, x: s.second(s.first(x).gather(-1, x.argsort(-1))),
        "gather does not commute",
    ),
    "channels chosen by one token": (lambda s, x: s.second(s.first(x)[..., x[0, 0].argsort()]), "index does not"),
    "channels rolled by the length": (lambda s, x: s.second(s.first(x).roll(x.shape[1], -1)), "depends on the inputs'"),
    "as many channels as tokens": (
        lambda s, x: s.second(functional.pad(s.first(x), (0, x.shape[1]))[..., x.shape[1] :]),
        "where it goes depends on the inputs' sizes",
    ),
    "maximum": (lambda s, x: s.second(torch.maximum(s.first(x), x)), "maximum does not commute"),
    "no reader": (lambda s, x: (s.first(x)[..., :0], s.second(x)), "no linear or convolution reads it"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    forward, reason = REFUSED[name]
    model = Net(forward, bias=False, first=WIDTH, second=8, shift=nn.Parameter(torch.empty(WIDTH)))
    captured, findings = examine(model)
    assert "first.weight" not in sites(findings)
    refused = [r for r in findings.refusals if r.producer == "first.weight"]
    assert refused and any(reason in r.reason for r in refused), refused
    names = {node.name for node in captured.graph_module.graph.nodes}
    assert all(r.node in names and "\n" not in r.reason for r in refused)


def test_a_shared_bias_is_refused() -> None:
    model = Net(lambda s, x: s.second(s.first(x)) + s.other(x).exp()[..., :8], first=WIDTH, second=8, other=WIDTH)
    model.other.bias = model.first.bias
    _, findings = examine(model)
    assert "is shared with" in refusal(findings, "first.weight").reason


def test_a_norm_whose_gain_is_its_bias_is_divided_once() -> None:
    both = nn.Parameter(torch.empty(WIDTH))
    model = Net(lambda s, x: s.linear(functional.layer_norm(x, (WIDTH,), s.both, s.both)), both=both, linear=8)
    _, findings = examine(model)
    assert [scaled.name for scaled in equivalence(findings, "both").divided] == ["both"]


def test_post_norm_is_a_trap() -> None:
    """The norm's output feeds the next layer and its residual; scaling it would change the residual."""

    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.norm(x + s.attention(x))
        return s.last(y + s.down(functional.gelu(s.up(y))))

    _, findings = examine(Net(forward, norm=nn.LayerNorm(WIDTH), attention=WIDTH, up=WIDTH, down=WIDTH, last=WIDTH))
    assert not findings.equivalences
    assert refusal(findings, "norm.weight").reason == OTHER


def test_a_tied_embedding_is_not_scaled() -> None:
    config = GPT2Config(vocab_size=VOCAB, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    findings = find(capture(GPT2LMHeadModel(config).eval()))
    assert refusal(findings, "transformer.ln_f.weight").reason == "transformer.wte.weight is shared with embedding"
    assert not any("wte" in name for e in findings.equivalences for name in e.linears)
