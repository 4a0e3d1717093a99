"""The gated delta rule as one operator: its mathematics, gradients and refusals, and which of a model's functions it
stands for."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from support.graphs import relative_error
from torch import Tensor, nn

from teq_graph.capture.kernels import TRACEABLE, traceable_kernels
from teq_graph.errors import InputError
from teq_graph.ops.linear_attention import CHUNKS

OP = torch.ops.teq_graph.linear_attention
SCALE = 0.3


def tensors(length: int, of_channels: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Query, key, value, decay, beta and state, with keys as long as models make them."""
    batch, heads, width, channels = 2, 3, 8, 5
    query, key = (torch.randn(batch, length, heads, width, dtype=dtype) for _ in range(2))
    decay = -torch.rand(batch, length, heads, *([width] if of_channels else []), dtype=dtype)
    return [
        query,
        torch.nn.functional.normalize(key, dim=-1),
        torch.randn(batch, length, heads, channels, dtype=dtype),
        decay,
        torch.rand(batch, length, heads, dtype=dtype),
        torch.randn(batch, heads, width, channels, dtype=dtype),
    ]


def one_by_one(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(query.shape[1]):
        g = decay[:, t].exp()
        state = state * (g[..., None] if g.dim() == 3 else g[..., None, None])
        known = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], beta[:, t, :, None] * (value[:, t] - known))
        outputs.append(SCALE * torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, 1), state


@pytest.mark.parametrize("of_channels", [False, True])
@pytest.mark.parametrize("length", [1, 2, CHUNKS[False], CHUNKS[True] + 1, 200])
def test_chunks_are_the_recurrence(length: int, of_channels: bool) -> None:
    given = tensors(length, of_channels)
    for actual, expected in zip(OP(*given, SCALE), one_by_one(*(x.double() for x in given)), strict=True):
        assert actual.dtype == torch.float32 and actual.is_contiguous()
        assert relative_error(actual.double(), expected) <= 2e-6


@pytest.mark.parametrize("of_channels", [False, True])
def test_gradients(of_channels: bool) -> None:
    given = [tensor.requires_grad_() for tensor in tensors(19, of_channels, torch.float64)]
    assert torch.autograd.gradcheck(lambda *x: OP(*x, SCALE), given)
    # Of some tensors alone, and of one of the results.
    only = [tensor.detach().requires_grad_(index in (1, 5)) for index, tensor in enumerate(given)]
    OP(*only, SCALE)[0].square().sum().backward()
    expected = [tensor.detach().clone().requires_grad_() for tensor in given]
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
    for of_channels in (False, True):
        given = [tensor.requires_grad_() for tensor in tensors(5, of_channels)]
        torch.library.opcheck(OP.default, (*given, SCALE))


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


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"])
def test_kernels_are_what_they_stand_for(family: str) -> None:
    """Whatever a model's own functions of these names give, from no state and from one."""
    source = importlib.import_module(f"transformers.models.{family}.modeling_{family}")

    class Model(nn.Module):
        pass

    Model.__module__ = source.__name__
    before = dict(vars(source))
    with traceable_kernels(Model()):
        changed = {name: function for name, function in before.items() if vars(source)[name] is not function}
        kernels = {name: vars(source)[name] for name in changed}
    assert dict(vars(source)) == before and len(changed) == 2
    query, key, value, decay, beta, state = tensors(75, family == "kimi_linear")
    options: dict[str, Any] = dict(g=decay, beta=beta, output_final_state=True)
    for name, function in changed.items():
        assert kernels[name] in TRACEABLE.values()
        for normalize in (True, False):
            for start in (None, state):
                own = dict(options, initial_state=start, use_qk_l2norm_in_kernel=normalize)
                results = [f(query, key, value, **own) for f in (kernels[name], function)]
                for actual, expected in zip(*results, strict=True):
                    assert relative_error(actual, expected) <= 1e-5
        if family != "kimi_linear":  # whose keys have as many heads as its values
            few = [f(query[:, :, :1], key[:, :, :1], value, **options) for f in (kernels[name], function)]
            assert relative_error(few[0][0], few[1][0]) <= 1e-5
