"""Recurrences over tokens as one operator: its mathematics, gradients and refusals, and which of a model's functions it
stands for."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import relative_error
from torch import Tensor, nn

from teq_graph.capture.kernels import TRACEABLE, ignores_states, read_state, traceable_kernels
from teq_graph.errors import InputError
from teq_graph.ops.linear_attention import CHUNKS

OP = torch.ops.teq_graph.linear_attention
SCALE = 0.3


def tensors(length: int, of_channels: bool, delta: bool = True, dtype: torch.dtype = torch.float32) -> list[Any]:
    """Query, key, value, decay, beta where there is one and state, with keys as long as models make them."""
    batch, heads, width, channels = 2, 3, 8, 5
    query, key = (torch.randn(batch, length, heads, width, dtype=dtype) for _ in range(2))
    decay = -torch.rand(batch, length, heads, *([width] if of_channels else []), dtype=dtype)
    return [
        query,
        torch.nn.functional.normalize(key, dim=-1),
        torch.randn(batch, length, heads, channels, dtype=dtype),
        decay,
        torch.rand(batch, length, heads, dtype=dtype) if delta else None,
        torch.randn(batch, heads, width, channels, dtype=dtype),
    ]


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(query.shape[1]):
        g = decay[:, t].exp()
        state = state * (g[..., None] if g.dim() == 3 else g[..., None, None])
        added = value[:, t]
        if beta is not None:
            added = beta[:, t, :, None] * (added - torch.einsum("bhkv,bhk->bhv", state, key[:, t]))
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], added)
        outputs.append(SCALE * torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, 1), state


def doubled(given: list[Any]) -> list[Any]:
    return [None if tensor is None else tensor.double() for tensor in given]


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("of_channels", [False, True])
@pytest.mark.parametrize("length", [1, 2, CHUNKS[False], CHUNKS[True] + 1, 200])
def test_chunks_are_the_recurrence(length: int, of_channels: bool, delta: bool) -> None:
    given = tensors(length, of_channels, delta)
    for actual, expected in zip(OP(*given, SCALE), one_by_one(*doubled(given)), strict=True):
        assert actual.dtype == torch.float32 and actual.is_contiguous()
        assert relative_error(actual.double(), expected) <= 2e-6


def learning(given: list[Any], which: tuple[int, ...] = (0, 1, 2, 3, 4, 5)) -> list[Any]:
    """Copies of the tensors, some of which take gradients."""
    copies = [None if tensor is None else tensor.detach().clone() for tensor in given]
    return [None if x is None else x.requires_grad_(index in which) for index, x in enumerate(copies)]


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("of_channels", [False, True])
def test_gradients(of_channels: bool, delta: bool) -> None:
    given = tensors(19, of_channels, delta, torch.float64)
    assert torch.autograd.gradcheck(lambda *x: OP(*x, SCALE), learning(given))
    # Of some tensors alone, and of one of the results.
    only = learning(given, (1, 5))
    OP(*only, SCALE)[0].square().sum().backward()
    expected = learning(given)
    one_by_one(*expected)[0].square().sum().backward()
    for index in (1, 5):
        assert relative_error(only[index].grad, expected[index].grad) <= 1e-12


def test_half_precision_is_rounded_once() -> None:
    given = [tensor.half() for tensor in tensors(70, False)]
    for actual, expected in zip(OP(*given, SCALE), one_by_one(*(x.float() for x in given)), strict=True):
        assert actual.dtype == torch.float16 and relative_error(actual.float(), expected) <= 1e-3
    full = tensors(70, False)
    expected = one_by_one(*full)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(OP(*full, SCALE), expected) <= 2e-6


def test_registration() -> None:
    for of_channels, delta in itertools.product((False, True), repeat=2):
        torch.library.opcheck(OP.default, (*learning(tensors(5, of_channels, delta)), SCALE))


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[:, :-1], r"query \[2, 6, 3, 8\]: accepted is \[2, 7, 3, 8\]"),
        (1, lambda x: x[0], r"key \[7, 3, 8\], value \[2, 7, 3, 5\]: accepted are \[b, t, h, channels\]"),
        (3, lambda x: x[..., :2], r"decay \[2, 7, 2\]: accepted is \[2, 7, 3\] or \[2, 7, 3, 8\]"),
        (5, lambda x: x.transpose(2, 3), r"state \[2, 3, 5, 8\]: accepted is \[2, 3, 8, 5\]"),
    ],
)
def test_bad_input(index: int, change: Any, message: str) -> None:
    given = tensors(7, False)
    given[index] = change(given[index])
    with pytest.raises(InputError, match=f"^{message}$"):
        OP(*given, SCALE)


def kernels_of(family: str) -> dict[str, tuple[Callable[..., Any], Callable[..., Any]]]:
    """The functions of a model that are replaced: what stands for them, and they themselves."""
    model = model_of(family)
    source = importlib.import_module(type(model).__module__)
    before = dict(vars(source))
    with traceable_kernels(model):
        changed = {name: (vars(source)[name], own) for name, own in before.items() if vars(source)[name] is not own}
    assert dict(vars(source)) == before and {kernel for kernel, _ in changed.values()} <= set(TRACEABLE.values())
    return changed


def model_of(family: str) -> nn.Module:
    """A module of the same source as the family's models."""

    class Model(nn.Module):
        pass

    Model.__module__ = importlib.import_module(f"transformers.models.{family}.modeling_{family}").__name__
    return Model()


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"])
def test_delta_rules_are_what_they_stand_for(family: str) -> None:
    """Whatever a model's own functions of these names give, from no state and from one."""
    changed = kernels_of(family)
    assert len(changed) == 2
    query, key, value, decay, beta, state = tensors(75, family == "kimi_linear")
    options: dict[str, Any] = dict(g=decay, beta=beta, output_final_state=True)
    for kernel, function in changed.values():
        for normalize in (True, False):
            for start in (None, state):
                own = dict(options, initial_state=start, use_qk_l2norm_in_kernel=normalize)
                results = [f(query, key, value, **own) for f in (kernel, function)]
                for actual, expected in zip(*results, strict=True):
                    assert relative_error(actual, expected) <= 1e-5
        if family != "kimi_linear":  # whose keys have as many heads as its values
            few = [f(query[:, :, :1], key[:, :, :1], value, **options) for f in (kernel, function)]
            assert relative_error(few[0][0], few[1][0]) <= 1e-5


@pytest.mark.parametrize("family", ["mamba2", "bamba", "granitemoehybrid", "nemotron_h", "falcon_h1", "zamba2"])
def test_scans_by_head_are_what_they_stand_for(family: str) -> None:
    ((kernel, function),) = kernels_of(family).values()
    batch, length, heads, width, groups, n = 2, 75, 4, 6, 2, 8
    values, b, c = (torch.randn(batch, length, *sizes) for sizes in ((heads, width), (groups, n), (groups, n)))
    dt, a, d, bias = torch.randn(batch, length, heads), -torch.rand(heads) - 0.1, torch.randn(heads), torch.randn(heads)
    for options in ({}, dict(D=d, dt_bias=bias, dt_softplus=True, dt_limit=(0.1, 0.9))):
        for start in (None, torch.randn(batch, heads, width, n)):
            given = dict(options, initial_states=start, return_final_states=True)
            steps = dt if options else dt.abs()
            results = [f(values, steps, a, b, c, chunk_size=16, **given) for f in (kernel, function)]
            for actual, expected in zip(*results, strict=True):
                assert relative_error(actual, expected) <= 1e-5
    assert relative_error(kernel(values, dt.abs(), a, b, c, 16), function(values, dt.abs(), a, b, c, 16)) <= 1e-5


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba", "jamba", "zamba"])
def test_scans_by_channel_are_what_they_stand_for(family: str) -> None:
    """From no state what the model's own gives, and from one what its steps of one token give."""
    assert ignores_states(model_of(family)) and not ignores_states(model_of("mamba2"))
    ((kernel, function),) = kernels_of(family).values()
    step = vars(importlib.import_module(function.__module__))["mamba_selective_state_update"]
    batch, length, channels, n = 2, 21, 6, 4
    values, dt, z = (torch.randn(batch, channels, length) for _ in range(3))
    b, c = (torch.randn(batch, n, length) for _ in range(2))
    a, d, bias = -torch.rand(channels, n) - 0.1, torch.randn(channels), torch.randn(channels)
    with traceable_kernels(model_of(family)):
        for options in (dict(delta_softplus=True), dict(D=d, z=z, delta_bias=bias, delta_softplus=True)):
            results = [f(values, dt, a, b, c, **options, return_last_state=True) for f in (kernel, function)]
            for actual, expected in zip(*results, strict=True):
                assert relative_error(actual, expected) <= 1e-5
            assert relative_error(kernel(values, dt, a, b, c, **options), results[1][0]) <= 1e-5
        states = torch.randn(batch, 2, channels, n)
        expected = states.clone()
        tokens = [tuple(tensor[..., t] for tensor in (values, dt, b, c)) for t in range(length)]
        outputs = [[step(expected[:, h], x, y, a, u, w, dt_softplus=True) for h in (0, 1)] for x, y, u, w in tokens]
        read_state(states)
        for head in (0, 1):
            actual, last = kernel(values, dt, a, b, c, delta_softplus=True, return_last_state=True)
            assert relative_error(actual, torch.stack([output[head] for output in outputs], -1)) <= 1e-5
            assert relative_error(last, expected[:, head]) <= 1e-5
    read_state(torch.full_like(states, float("nan")))  # while nothing is traced
    with traceable_kernels(model_of(family)):
        assert not kernel(values, dt, a, b, c, return_last_state=True)[1].isnan().any()
