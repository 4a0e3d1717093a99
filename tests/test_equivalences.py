"""What the analysis finds, and that it is exact."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.graphs import apply_random_scales, capture_small, find, normalize, relative_error, run
from support.sites import WIDTH, Net, equivalence, examine, refusal, sites
from torch import Tensor, nn
from torch.nn import functional

from teq_graph.analysis.equivalences.equivalence import Equivalence, ScaledTensor
from teq_graph.analysis.equivalences.find import find_equivalences
from teq_graph.capture import CapturedGraph
from teq_graph.errors import EquivalenceError
from teq_graph.graph.tensors import set_tensor

HEADS, DIM = 4, 4
Forward = Callable[..., Any]


# ------------------------------------------------------------------------------------------------------------ norms


class Gained(nn.Module):
    """RMSNorm as models spell it, multiplied by `offset + weight`."""

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(WIDTH))
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        normalized = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
        gain = self.weight if self.offset == 0 else self.offset + self.weight.float()
        return (normalized * gain).type_as(x)


@pytest.mark.parametrize(
    ("norm", "kind", "tensors"),
    [
        (nn.LayerNorm(WIDTH), "layer_norm", ["norm.weight", "norm.bias"]),
        (nn.LayerNorm(WIDTH, bias=False), "layer_norm", ["norm.weight"]),
        (nn.RMSNorm(WIDTH), "rms_norm", ["norm.weight"]),
        (Gained(0.0), "rms_norm", ["norm.weight"]),
        (Gained(1.0), "rms_norm", ["norm.weight"]),
    ],
    ids=["LayerNorm", "LayerNorm without bias", "RMSNorm", "spelled out", "1 + weight"],
)
def test_norm_to_linear(norm: nn.Module, kind: str, tensors: list[str]) -> None:
    _, findings = examine(Net(lambda s, x: s.linear(s.norm(x)), norm=norm, linear=8))
    (found,) = findings.equivalences
    assert (found.kind, found.channels, found.linears) == (kind, WIDTH, ("linear.weight",))
    assert [scaled.name for scaled in found.divided] == tensors
    assert torch.equal(found.multiplied[0].index, torch.arange(WIDTH)[None])
    assert all(torch.equal(scaled.index, torch.arange(WIDTH)) for scaled in found.divided)
    assert refusal(findings, "linear.weight").reason == "it is an output of the graph"


def test_norm_feeds_parallel_attention_and_mlp() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.norm(x)
        attended = functional.scaled_dot_product_attention(s.q(y), s.k(y), s.v(y), is_causal=True)
        return x + s.o(attended) + s.down(functional.gelu(s.up(y)))

    layers: dict[str, Any] = dict(norm=nn.LayerNorm(WIDTH), q=WIDTH, k=WIDTH, v=WIDTH, o=WIDTH, up=WIDTH, down=WIDTH)
    _, findings = examine(Net(forward, **layers))
    assert sites(findings) == {
        "norm.weight": ("q.weight", "k.weight", "v.weight", "up.weight"),
        "v.weight": ("o.weight",),
    }
    assert "gelu" in refusal(findings, "up.weight").reason
    assert refusal(findings, "q.weight").reason == "it is the query of a softmax"
    assert refusal(findings, "k.weight").reason == "it is the key of a softmax"


def test_a_norm_without_weight_is_no_producer() -> None:
    _, findings = examine(Net(lambda s, x: s.linear(functional.layer_norm(x, (WIDTH,))), linear=8))
    assert not findings.equivalences and [r.producer for r in findings.refusals] == ["linear.weight"]


def test_a_plain_gain() -> None:
    gain = nn.Parameter(torch.empty(1, 1, WIDTH))
    _, findings = examine(Net(lambda s, x: s.linear(torch.tanh(x) * s.gain), gain=gain, linear=8))
    (found,) = findings.equivalences
    assert (found.producer, found.kind, found.channels) == ("gain", "gain", WIDTH)
    assert found.divided[0].index.shape == (1, 1, WIDTH)


# -------------------------------------------------------------------------------------------------------- attention


def heads(x: Tensor, count: int) -> Tensor:
    return x.view(x.shape[0], x.shape[1], count, DIM).transpose(1, 2)


def merge(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def by_sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def by_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2) * 0.5).softmax(-1).to(v.dtype) @ v


def by_bmm(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    b, h, s, d = q.shape
    q, k, v = (x.reshape(b * h, s, d) for x in (q, k, v))
    scores = torch.baddbmm(torch.zeros(1), q, k.transpose(1, 2))
    return torch.bmm(functional.dropout(scores.softmax(-1), 0.1, training=False), v).view(b, h, s, d)


def by_transposed_matmul(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return (v.transpose(-1, -2) @ weights.transpose(-1, -2)).transpose(-1, -2)


@pytest.mark.parametrize("attend", [by_sdpa, by_matmul, by_bmm, by_transposed_matmul])
def test_value_to_output(attend: Callable[..., Tensor]) -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        return s.o(merge(attend(heads(s.q(x), HEADS), heads(s.k(x), HEADS), heads(s.v(x), HEADS))))

    _, findings = examine(Net(forward, q=WIDTH, k=WIDTH, v=WIDTH, o=WIDTH))
    assert sites(findings) == {"v.weight": ("o.weight",)}
    found = equivalence(findings, "v.weight")
    assert [scaled.name for scaled in found.divided] == ["v.weight", "v.bias"]
    assert found.divided[0].index.shape == (WIDTH, 1)
    assert torch.equal(found.multiplied[0].index, torch.arange(WIDTH)[None])


def repeat(x: Tensor, times: int) -> Tensor:
    b, h, s, d = x.shape
    return x[:, :, None].expand(b, h, times, s, d).reshape(b, h * times, s, d)


@pytest.mark.parametrize("style", ["expand", "repeat_interleave", "enable_gqa"])
def test_grouped_queries_tie_columns(style: str) -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        q, k, v = heads(s.q(x), HEADS), heads(s.k(x), 2), heads(s.v(x), 2)
        if style == "enable_gqa":
            return s.o(merge(functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
        if style == "expand":
            k, v = repeat(k, 2), repeat(v, 2)
        else:
            k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        return s.o(merge(by_sdpa(q, k, v)))

    _, findings = examine(Net(forward, q=WIDTH, k=2 * DIM, v=2 * DIM, o=WIDTH))
    found = equivalence(findings, "v.weight")
    assert found.channels == 2 * DIM and found.linears == ("o.weight",)
    first, second = torch.arange(DIM), torch.arange(DIM, 2 * DIM)
    assert torch.equal(found.multiplied[0].index, torch.cat([first, first, second, second])[None])


@pytest.mark.parametrize("layout", ["halves", "interleaved per head"])
def test_fused_projection_moves_its_value_rows_alone(layout: str) -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.qkv(x)
        if layout == "halves":
            q, k, v = (heads(part, HEADS) for part in y.split(WIDTH, -1))
        else:
            q, k, v = y.view(y.shape[0], y.shape[1], HEADS, 3 * DIM).transpose(1, 2).chunk(3, -1)
        return s.o(merge(by_sdpa(q, k, v)))

    _, findings = examine(Net(forward, qkv=3 * WIDTH, o=WIDTH))
    found = equivalence(findings, "qkv.weight")
    assert found.channels == WIDTH and found.linears == ("o.weight",)
    rows = found.divided[0].index.flatten()
    if layout == "halves":
        expected = torch.cat([torch.full((2 * WIDTH,), -1), torch.arange(WIDTH)])
    else:
        values = torch.arange(WIDTH).view(HEADS, DIM)
        expected = torch.cat([torch.full((HEADS, 2 * DIM), -1), values], 1).flatten()
    assert torch.equal(rows, expected)


# ------------------------------------------------------------------------------------------------------------- MLPs


def test_up_to_down_through_a_gate() -> None:
    forward = lambda s, x: s.down(functional.silu(s.gate(x)) * s.up(x))  # noqa: E731
    _, findings = examine(Net(forward, bias=False, gate=WIDTH, up=WIDTH, down=WIDTH))
    assert sites(findings) == {"up.weight": ("down.weight",)}
    assert "silu" in refusal(findings, "gate.weight").reason


def test_fused_gate_moves_its_second_half() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        gate, up = s.gate_up(x).chunk(2, -1)
        return s.down(up * functional.silu(gate))

    _, findings = examine(Net(forward, gate_up=2 * WIDTH, down=WIDTH))
    found = equivalence(findings, "gate_up.weight")
    assert found.channels == WIDTH
    assert torch.equal(found.divided[0].index.flatten()[:WIDTH], torch.full((WIDTH,), -1))


HOMOGENEOUS: dict[str, Forward] = {
    "nothing": lambda s, x: x,
    "relu": lambda s, x: x.relu(),
    "leaky_relu": lambda s, x: functional.leaky_relu(x, 0.2),
    "abs": lambda s, x: x.abs(),
    "negative": lambda s, x: -x,
    "scalar": lambda s, x: x * 3 / 2,
    "cast": lambda s, x: x.double().float(),
    "masked": lambda s, x: x.masked_fill(torch.ones(WIDTH) < 0, 0.0),
    "zeroed": lambda s, x: torch.where(torch.arange(WIDTH) > 3, x, 0.0),
    "mean over tokens": lambda s, x: x.mean(1, keepdim=True),
    "sum over tokens": lambda s, x: x.sum(1),
    "constant added": lambda s, x: x + s.shift,
    "constant subtracted": lambda s, x: x - s.shift,
    "constant that broadcasts": lambda s, x: x + s.shift[None, None],
    "flipped": lambda s, x: x.flip(-1),
    "permuted": lambda s, x: x[..., torch.arange(WIDTH).flip(0)],
    "rolled tokens": lambda s, x: x.roll(1, 1),
    "twice the same": lambda s, x: x.relu() + x.abs(),
    "last token": lambda s, x: x[:, -1],
    "token chosen by the input": lambda s, x: x.select(1, 0),
    "gate of its own input": lambda s, x: x * s.gate.sigmoid(),
}


@pytest.mark.parametrize("name", HOMOGENEOUS)
def test_linear_to_linear_through(name: str) -> None:
    between = HOMOGENEOUS[name]
    shift, gate = nn.Parameter(torch.empty(WIDTH)), nn.Parameter(torch.empty(WIDTH))
    model = Net(lambda s, x: s.second(between(s, s.first(x))), first=WIDTH, second=8, shift=shift, gate=gate)
    _, findings = examine(model)
    found = equivalence(findings, "first.weight")
    assert found.channels == WIDTH and found.linears == ("second.weight",)
    assert ("shift" in {scaled.name for scaled in found.divided}) == ("constant" in name)
    if name in ("flipped", "permuted"):
        assert torch.equal(found.multiplied[0].index, torch.arange(WIDTH).flip(0)[None])


def test_a_constant_between_is_absorbed_or_scaled_along() -> None:
    shift = nn.Parameter(torch.empty(WIDTH))
    forward = lambda s, x: s.second((s.first(x).relu() + s.shift).relu())  # noqa: E731
    _, findings = examine(Net(forward, first=WIDTH, second=8, shift=shift))
    assert [scaled.name for scaled in equivalence(findings, "first.weight").divided] == [
        "first.weight",
        "first.bias",
        "shift",
    ]


def test_slices_splits_and_concatenations() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        a, b = s.first(x), s.second(x)
        left, right = a.split([6, WIDTH - 6], -1)
        return s.third(torch.cat([right[..., 2:], x[..., :3], b[..., ::2], left], -1))

    width = WIDTH - 8 + 3 + 8 + 6
    model = Net(forward, first=WIDTH, second=WIDTH, third=nn.Linear(width, 8))
    _, findings = examine(model)
    first, second = equivalence(findings, "first.weight"), equivalence(findings, "second.weight")
    assert (first.channels, second.channels) == (WIDTH - 2, 8)
    used = [*range(6), *range(8, WIDTH)]  # two channels go nowhere
    rows = torch.full((WIDTH,), -1)
    rows[used] = torch.arange(len(used))
    assert torch.equal(first.divided[0].index.flatten(), rows)
    columns = torch.cat([rows[8:], torch.full((3 + 8,), -1), rows[:6]])
    assert torch.equal(first.multiplied[0].index.flatten(), columns)


def test_channels_that_escape_leave_the_others() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.first(x)
        return s.second(torch.cat([y[..., :10], functional.gelu(y[..., 10:])], -1))

    _, findings = examine(Net(forward, first=WIDTH, second=8))
    found = equivalence(findings, "first.weight")
    assert found.channels == 10
    assert torch.equal(found.multiplied[0].index.flatten()[10:], torch.full((WIDTH - 10,), -1))


def test_a_weight_that_is_consumer_and_producer() -> None:
    forward = lambda s, x: s.third(s.second(s.first(x)).relu())  # noqa: E731
    _, findings = examine(Net(forward, first=WIDTH, second=WIDTH, third=8))
    assert sites(findings) == {"first.weight": ("second.weight",), "second.weight": ("third.weight",)}


def test_of_another_tensor_sizes_alone_are_read() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.first(x)
        beside = y.new_empty(y.shape)
        beside[..., :5].copy_(functional.gelu(y[..., :5]))
        beside[..., 5:].copy_(x[..., 5:])
        return s.second(y) + s.third(beside + torch.ones_like(y))

    _, findings = examine(Net(forward, first=WIDTH, second=8, third=8))
    found = equivalence(findings, "first.weight")
    assert found.linears == ("second.weight",) and found.channels == WIDTH - 5
    assert found.multiplied[0].index.flatten()[:5].tolist() == [-1] * 5


def test_channels_padded_with_zeros() -> None:
    forward = lambda s, x: s.second(functional.pad(s.first(x), (2, 1)))  # noqa: E731
    _, findings = examine(Net(forward, first=WIDTH, second=nn.Linear(WIDTH + 3, 8)))
    columns = equivalence(findings, "first.weight").multiplied[0].index.flatten()
    assert columns.tolist() == [-1, -1, *range(WIDTH), -1]


@pytest.mark.parametrize("mode", ["replicate", "circular", "one"])
def test_other_padding_is_refused(mode: str) -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        if mode == "one":
            return s.second(functional.pad(s.first(x), (2, 1), value=1.0))
        return s.second(functional.pad(s.first(x), (2, 1), mode=mode))

    _, findings = examine(Net(forward, first=WIDTH, second=nn.Linear(WIDTH + 3, 8)))
    assert "first.weight" not in sites(findings)


def test_tokens_chosen_by_the_input_keep_their_channels() -> None:
    forward = lambda s, x: s.second(s.first(x)[torch.arange(x.shape[0]), x[:, :, 0].argmax(-1)])  # noqa: E731
    _, findings = examine(Net(forward, first=WIDTH, second=8))
    assert sites(findings) == {"first.weight": ("second.weight",)}


def test_one_consumer_used_twice() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.norm(x)
        return s.linear(y).sigmoid() + s.linear(y.roll(1, 1))

    _, findings = examine(Net(forward, norm=nn.LayerNorm(WIDTH), linear=8))
    assert sites(findings) == {"norm.weight": ("linear.weight",)}


# ------------------------------------------------------------------------------------------------------------ cache


class Cached(nn.Module):
    """A value projection over a cache of earlier values, as a captured decoder keeps it."""

    def __init__(self, variant: str) -> None:
        super().__init__()
        self.v, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 8)
        self.variant = variant

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        new = self.v(x)
        if self.variant == "prepended":
            values = torch.cat([new, cache], 1)
        elif self.variant == "halved":
            values = torch.cat([cache * 0.5, new], 1)
        else:
            values = torch.cat([cache, new], 1)
        mixed = (x @ values[:, : x.shape[1]].transpose(1, 2)).softmax(-1) if self.variant == "keys" else None
        out = self.o(values if mixed is None else mixed @ values[:, : x.shape[1]])
        if self.variant == "read elsewhere":
            out = out + cache.sum()
        return out, values * 2 if self.variant == "stored otherwise" else values


@pytest.mark.parametrize("variant", ["appended", "prepended", "halved", "read elsewhere", "stored otherwise", "keys"])
def test_only_a_cache_that_is_appended_to_carries_scales(variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture_small(Cached(variant), torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH))
    nodes = list(captured.graph_module.graph.nodes)
    cache = next(node for node in nodes if node.name == "cache")
    pairs = {cache: nodes[-1].args[0][1]}
    monkeypatch.setattr(CapturedGraph, "cache_pairs", lambda _: pairs)
    found = {e.producer for e in find(captured).equivalences}
    assert found == ({"v.weight"} if variant == "appended" else set())
    steps = [torch.randn(2, 4, WIDTH), torch.randn(2, 1, WIDTH), torch.randn(2, 2, WIDTH)]

    def outputs() -> list[Tensor]:
        state, results = torch.empty(2, 0, WIDTH), []
        for x in steps[: 1 if variant == "keys" else 3]:
            out, state = run(captured.graph_module, (x, state))
            results.append(out)
        return results

    expected = outputs()
    apply_random_scales(captured.graph_module, find_equivalences(captured).equivalences)
    assert relative_error(outputs(), expected) <= 1e-5


# ---------------------------------------------------------------------------------------------- pass and its algebra


def test_powers_of_two_change_no_bit() -> None:
    def forward(s: Net, x: Tensor) -> Tensor:
        y = s.norm(x)
        x = x + s.o(merge(by_sdpa(heads(s.q(y), HEADS), heads(s.k(y), HEADS), heads(s.v(y), HEADS))))
        return x + s.down(functional.silu(s.gate(y)) * s.up(y).relu())

    layers = dict.fromkeys(("q", "k", "v", "o", "gate", "up", "down"), WIDTH)
    captured = capture_small(Net(forward, norm=nn.LayerNorm(WIDTH), **layers), torch.randn(2, 5, WIDTH))
    found = find(captured).equivalences
    assert len(found) == 3
    graph_module, inputs = captured.graph_module, (torch.randn(3, 7, WIDTH),)
    expected = run(graph_module, inputs)
    for site in found:
        scale = 2.0 ** torch.randint(-3, 4, (site.channels,))
        for name, value in site.apply(graph_module.state_dict(), scale).items():
            set_tensor(graph_module, name, value)
    assert torch.equal(run(graph_module, inputs), expected)


def test_the_analysis_leaves_the_graph_alone() -> None:
    captured = capture_small(Net(lambda s, x: s.second(s.first(x).relu()), first=8, second=nn.Linear(8, 4)),
                             torch.randn(2, 5, WIDTH))  # fmt: skip
    normalize(captured)
    graph_module, inputs = captured.graph_module, (torch.randn(3, 6, WIDTH),)
    code, expected = graph_module.code, run(graph_module, inputs)
    weights = {name: tensor.clone() for name, tensor in graph_module.state_dict().items()}
    first, second = (find_equivalences(captured) for _ in range(2))
    assert first.equivalences and [e.linears for e in first.equivalences] == [e.linears for e in second.equivalences]
    assert graph_module.code == code and relative_error(run(graph_module, inputs), expected) == 0
    assert all(torch.equal(graph_module.state_dict()[name], weight) for name, weight in weights.items())


def ones() -> Equivalence:
    divided = (ScaledTensor("p", torch.tensor([[0], [1], [-1]])),)
    multiplied = (ScaledTensor("c", torch.tensor([[-1, 1, 0, 1]])),)
    return Equivalence("p", "linear", 2, divided, multiplied)


def test_apply_divides_rows_and_multiplies_columns() -> None:
    tensors = {"p": torch.randn(3, 5), "c": torch.randn(2, 4), "other": torch.randn(1)}
    changed = ones().apply(tensors, torch.tensor([2.0, 0.5]))
    assert changed.keys() == {"p", "c"}
    assert torch.equal(changed["p"], tensors["p"] / torch.tensor([[2.0], [0.5], [1.0]]))
    assert torch.equal(changed["c"], tensors["c"] * torch.tensor([1.0, 0.5, 2.0, 0.5]))


def test_apply_to_one_tensor_in_both_roles() -> None:
    divided = (ScaledTensor("w", torch.tensor([[0], [1]])),)
    multiplied = (ScaledTensor("w", torch.tensor([[0, 1]])),)
    weight = torch.randn(2, 2)
    changed = Equivalence("w", "linear", 2, divided, multiplied).apply({"w": weight}, torch.tensor([4.0, 0.25]))
    scale = torch.tensor([4.0, 0.25])
    assert torch.equal(changed["w"], weight / scale[:, None] * scale[None])


def test_apply_rounds_once_to_the_tensors_type() -> None:
    tensors = {"p": torch.randn(3, 5).half(), "c": torch.randn(2, 4).half()}
    changed = ones().apply(tensors, torch.tensor([3.0, 0.7]))
    expected = (tensors["p"].double() / torch.tensor([[3.0], [0.7], [1.0]]).double()).half()
    assert changed["p"].dtype == torch.float16
    assert float((changed["p"].double() - expected.double()).abs().max()) <= torch.finfo(torch.float16).eps


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        (torch.ones(3), r"shape \(3,\): accepted is \(2,\)"),
        (torch.tensor([1.0, 0.0]), "s > 0"),
        (torch.tensor([1.0, -1.0]), "s > 0"),
        (torch.tensor([1.0, float("nan")]), "s > 0"),
        (torch.tensor([1.0, float("inf")]), "s > 0"),
    ],
)
def test_apply_refuses_other_scales(scale: Tensor, message: str) -> None:
    with pytest.raises(EquivalenceError, match=message) as caught:
        ones().apply({"p": torch.ones(3, 5), "c": torch.ones(2, 4)}, scale)
    assert "\n" not in str(caught.value) and " p " in str(caught.value)
