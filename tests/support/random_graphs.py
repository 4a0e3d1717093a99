"""Random small networks from a pool of ops, as counterexamples that sound analysis and passes must not fall for."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Collection
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional

from support.seeds import BASE

Apply = Callable[..., Tensor]
WIDTHS = (4, 8, 12)
JUMPS = {
    "floor", "sign", "where", "where self", "masked_fill", "masked_fill 1", "gather channels", "index channels",
    "index tokens", "select tokens", "select channels", "first tokens",
}  # fmt: skip
"""Ops that make any difference of one of rounding."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One op: which earlier values it reads, and what it computes of them."""

    name: str
    reads: tuple[int, ...]
    apply: Apply


class RandomNetwork(nn.Module):
    """`steps` random ops over values `[batch, sequence, width]`; a few values are the outputs; no op of `without`."""

    def __init__(self, choices: random.Random, steps: int, without: Collection[str] = ()) -> None:
        super().__init__()
        self.random = choices
        self.without = without
        self.weights = nn.ParameterList()
        self.steps: list[Step] = []
        self.widths = [self.random.choice(WIDTHS) for _ in range(2)]
        self.shared: dict[tuple[int, ...], list[int]] = {}
        self._linear_step()
        while len(self.steps) < steps:
            self._add_random()
        read = {index for step in self.steps for index in step.reads}
        ends = [index for index in range(2, len(self.widths)) if index not in read]
        extra = self.random.sample(range(2, len(self.widths)), k=self.random.choice([0, 0, 1]))
        self.ends = sorted({*ends, *extra})

    def example(self, batch: int, sequence: int) -> tuple[Tensor, ...]:
        """Random inputs."""
        return tuple(torch.randn(batch, sequence, width) for width in self.widths[:2])

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        values = [a, b]
        for step in self.steps:
            values.append(step.apply(*(values[index] for index in step.reads)))
        return tuple(values[index] for index in self.ends)

    def __repr__(self) -> str:
        lines = [f"v{index} = {s.name}{s.reads} [{self.widths[index]}]" for index, s in enumerate(self.steps, 2)]
        return "\n".join([*lines, f"outputs {self.ends}"])

    # ------------------------------------------------------------------------------------------------- building

    def _weight(self, *shape: int, share: float = 0.1) -> Callable[[], Tensor]:
        known = self.shared.setdefault(shape, [])
        if known and self.random.random() < share:
            index = self.random.choice(known)
        else:
            index = len(self.weights)
            self.weights.append(nn.Parameter(torch.randn(shape) * 0.5))
            known.append(index)
        return lambda: self.weights[index]

    def _push(self, name: str, reads: tuple[int, ...], width: int, apply: Apply) -> int:
        self.steps.append(Step(name, reads, apply))
        self.widths.append(width)
        return len(self.widths) - 1

    def _pick(self, width: int | None = None) -> int:
        """A value, recent ones preferred; of `width`, made by a linear where there is none yet."""
        fitting = [index for index, w in enumerate(self.widths) if width in (None, w)]
        if not fitting:
            return self._linear(self._pick(), width)
        return self.random.choice(fitting[-3:] if self.random.random() < 0.8 else fitting)

    def _choose(self, names: list[str]) -> str:
        return self.random.choice([name for name in names if name not in self.without])

    def _linear(self, source: int, width: int | None = None) -> int:
        out = width or self.random.choice(WIDTHS)
        weight = self._weight(out, self.widths[source])
        style = self.random.choice(["linear", "linear", "linear", "matmul", "addmm", "computed bias"])
        bias = self._weight(out) if self.random.random() < 0.5 else None
        if style == "matmul":
            matrix = self._weight(self.widths[source], out)
            return self._push("matmul", (source,), out, lambda x: x @ matrix())
        if style == "addmm":
            matrix, row = self._weight(self.widths[source], out), self._weight(out)

            def addmm(x: Tensor) -> Tensor:
                return torch.addmm(row(), x.reshape(-1, x.shape[-1]), matrix()).view(*x.shape[:-1], out)

            return self._push("addmm", (source,), out, addmm)
        if style == "computed bias" and self.random.random() < 0.3:
            other = self._pick(out)
            return self._push(
                "linear, computed bias",
                (source, other),
                out,
                lambda x, y: functional.linear(x, weight(), y.mean((0, 1))),
            )
        return self._push("linear", (source,), out, lambda x: functional.linear(x, weight(), bias() if bias else None))

    def _norm(self, source: int) -> int:
        width = self.widths[source]
        weight, bias = self._weight(width), self._weight(width)
        apply = self.random.choice(
            [
                lambda x: functional.layer_norm(x, (width,), weight(), bias()),
                lambda x: functional.layer_norm(x, (width,), weight()),
                lambda x: functional.rms_norm(x, (width,), weight()),
                lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight(),
                lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + weight()),
                lambda x: x * weight(),
                lambda x: weight()[None, None] * x,
            ]
        )
        return self._push("norm or gain", (source,), width, apply)

    def _add_random(self) -> None:
        kind = self.random.choices(
            [self._linear_step, self._norm_step, self._function, self._elementwise, self._constant, self._move,
             self._join, self._attention, self._reduction, self._dynamic],
            weights=[10, 5, 5, 5, 3, 8, 4, 3, 1, 2],
        )[0]  # fmt: skip
        kind()

    def _linear_step(self) -> None:
        self._linear(self._pick())

    def _norm_step(self) -> None:
        self._norm(self._pick())

    def _function(self) -> None:
        source = self._pick()
        functions: dict[str, Apply] = {
            "relu": functional.relu, "abs": torch.abs, "neg": torch.neg, "leaky_relu": functional.leaky_relu,
            "gelu": functional.gelu,
            "silu": functional.silu, "sigmoid": torch.sigmoid, "softmax": lambda x: x.softmax(-1), "tanh": torch.tanh,
            "square": torch.square, "relu6": functional.relu6, "cumsum": lambda x: x.cumsum(1),
            "sort": lambda x: x.sort(-1)[0],
            "clamp": lambda x: x.clamp(min=0), "floor": lambda x: (4 * x).floor(),
            "sign": torch.sign, "contiguous": lambda x: x.contiguous(), "clone": lambda x: x.clone(),
            "unfused norm": lambda x: x / (1e-3 + x.norm(dim=-1, keepdim=True)),
        }  # fmt: skip
        name = self._choose([*functions, "relu", "relu", "abs"])
        self._push(name, (source,), self.widths[source], functions[name])

    def _elementwise(self) -> None:
        a = self._pick()
        b = self._pick(self.widths[a])
        functions: dict[str, Apply] = {
            "add": torch.add, "sub": torch.sub, "mul": torch.mul, "add twice": lambda x, y: torch.add(x, y, alpha=2),
            "div": lambda x, y: x / (y.abs() + 1), "gate": lambda x, y: x * functional.silu(y),
            "where": lambda x, y: torch.where(y > 0, x, 0.0), "where self": lambda x, y: torch.where(x > 0, x, y),
            "masked_fill": lambda x, y: x.masked_fill(y > 0, 0), "masked_fill 1": lambda x, y: x.masked_fill(y > 0, 1),
            "maximum": torch.maximum, "lerp": lambda x, y: torch.lerp(x, y, 0.3),
        }  # fmt: skip
        name = self._choose([*functions, "add", "mul", "gate"])
        self._push(name, (a, b), self.widths[a], functions[name])

    def _constant(self) -> None:
        source = self._pick()
        width = self.widths[source]
        value = self._weight(*self.random.choice([(width,), (1, 1, width), (1,), (1, 1, 1)]), share=0.2)
        scalar = self.random.choice([0.5, -2.0, 3.0])
        functions: dict[str, Apply] = {
            "add constant": lambda x: x + value(), "subtract constant": lambda x: x - value(),
            "subtract from constant": lambda x: value() - x, "multiply scalar": lambda x: x * scalar,
            "add scalar": lambda x: x + scalar, "divide scalar": lambda x: x / scalar,
            "divide by constant": lambda x: x / (value().abs() + 1), "reciprocal": lambda x: scalar / (x.abs() + 1),
            "bias twice": lambda x: x + value() + value(),
        }  # fmt: skip
        name = self._choose([*functions, "add constant", "multiply scalar"])
        self._push(name, (source,), width, functions[name])

    def _move(self) -> None:
        source = self._pick()
        width = self.widths[source]
        order = torch.tensor(self.random.sample(range(width), width))
        half, heads, dim = width // 2, 2, width // 2
        shift = self.random.randrange(1, 3)
        moves: dict[str, tuple[int, Apply]] = {
            "flip": (width, lambda x: x.flip(-1)),
            "flip sequence": (width, lambda x: x.flip(1)),
            "roll": (width, lambda x: x.roll(shift, -1)),
            "roll sequence": (width, lambda x: x.roll(1, 1)),
            "permute": (width, lambda x: x[..., order]),
            "slice": (half, lambda x: x[..., shift : shift + half]),
            "stride": (half, lambda x: x[..., ::2]),
            "chunk": (half, lambda x: x.chunk(2, -1)[1]),
            "split": (half, lambda x: x.split(half, -1)[0]),
            "swap halves": (width, lambda x: torch.cat([x[..., half:], x[..., :half]], -1)),
            "rotate": (width, lambda x: torch.cat([-x[..., half:], x[..., :half]], -1)),
            "interleave": (width, lambda x: torch.stack([x[..., :half], x[..., half:]], -1).flatten(-2)),
            "repeat": (2 * half, lambda x: x[..., :half].repeat(1, 1, 2)),
            "repeat_interleave": (2 * half, lambda x: x[..., :half].repeat_interleave(2, -1)),
            "expand heads": (
                2 * half,
                lambda x: x[..., :half].unsqueeze(2).expand(-1, -1, 2, -1).reshape(x.shape[0], x.shape[1], 2 * half),
            ),
            "head round trip": (
                width,
                lambda x: x.reshape(x.shape[0], -1, heads, dim).transpose(1, 2).transpose(1, 2).reshape(x.shape),
            ),
            "mixed heads": (width, lambda x: x.reshape(x.shape[0], -1, heads, dim).transpose(2, 3).reshape(x.shape)),
            "scramble": (width, lambda x: x.transpose(1, 2).reshape(x.shape)),
            "heads over sequence": (
                width,
                lambda x: x.reshape(x.shape[0], heads, -1, dim).transpose(1, 2).reshape(x.shape),
            ),
            "pad": (width, lambda x: functional.pad(x[..., :half], (0, width - half))),
            "pad with ones": (width, lambda x: functional.pad(x[..., :half], (width - half, 0), value=1.0)),
            "shift tokens": (width, lambda x: functional.pad(x, (0, 0, 1, 0))[:, :-1]),
            "last token": (width, lambda x: x[:, -1:].expand(x.shape)),
        }
        name = self._choose(list(moves))
        self._push(name, (source,), *moves[name])

    def _join(self) -> None:
        a = self._pick()
        b = self._pick()
        total = self.widths[a] + self.widths[b]
        joined = self._push("cat", (a, b), total, lambda x, y: torch.cat([x, y], -1))
        if self.random.random() < 0.3:
            same = self._pick(self.widths[a])
            self._push("cat tokens", (a, same), self.widths[a], lambda x, y: torch.cat([x, y], 1)[:, : x.shape[1]])
        if self.random.random() < 0.7:
            self._linear(joined)

    def _attention(self) -> None:
        width = self.random.choice([4, 8])
        heads, groups = 2, self.random.choice([1, 2])
        if self.random.random() < 0.4:
            fused = self._linear(self._pick(), width * 2 + width)
            parts = [
                self._push("q of qkv", (fused,), width, lambda x: x[..., :width]),
                self._push("k of qkv", (fused,), width, lambda x: x[..., width : 2 * width]),
                self._push("v of qkv", (fused,), width, lambda x: x[..., 2 * width :]),
            ]
        else:
            parts = [self._pick(width) for _ in range(3)]
        style = self.random.choice(["sdpa", "matmul", "bmm"])

        def split(x: Tensor) -> Tensor:
            x = x.reshape(x.shape[0], -1, heads, width // heads).transpose(1, 2)
            return x[:, :1].expand(-1, heads, -1, -1) if groups == 1 else x

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            shape = q.shape
            q, k, v = split(q), split(k), split(v)
            if style == "sdpa":
                out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            elif style == "matmul":
                out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
            else:
                q, k, v = (x.reshape(-1, x.shape[2], x.shape[3]) for x in (q, k, v))
                out = torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(shape[0], heads, shape[1], -1)
            return out.transpose(1, 2).reshape(shape)

        self._push(f"attention {style} {groups}", tuple(parts), width, attend)

    def _reduction(self) -> None:
        source = self._pick()
        functions: dict[str, Apply] = {
            "mean over tokens": lambda x: x.mean(1, keepdim=True).expand(x.shape),
            "sum over tokens": lambda x: x - x.sum(1, keepdim=True),
            "mean over channels": lambda x: x - x.mean(-1, keepdim=True),
            "max over tokens": lambda x: x.amax(1, keepdim=True).expand(x.shape),
            "pooled gate": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
        }
        name = self._choose(list(functions))
        self._push(name, (source,), self.widths[source], functions[name])

    def _dynamic(self) -> None:
        """Movement that depends on the inputs or on their sizes."""
        source = self._pick()
        width = self.widths[source]
        other = self._pick(width)
        functions: dict[str, Any] = {
            "gather channels": lambda x, y: x.gather(-1, y.argsort(-1)),
            "index channels": lambda x, y: x[:, :, y[0, 0].argsort()],
            "index tokens": lambda x, y: x[:, y[0, :, 0].argsort()],
            "select tokens": lambda x, y: x.index_select(1, y[0, :, 0].argsort()),
            "select channels": lambda x, y: x.index_select(2, y[0, 0].argsort()),
            "roll by length": lambda x, y: x.roll(y.shape[1], -1),
            "pad by length": lambda x, y: functional.pad(x, (y.shape[1], 0))[..., :width],
            "slice by length": lambda x, y: functional.pad(x, (0, y.shape[1]))[..., y.shape[1] :][..., :width],
            "first tokens": lambda x, y: x[torch.arange(x.shape[0]), y[:, :, 0].argmax(-1)][:, None].expand(x.shape),
        }
        name = self._choose(list(functions))
        self._push(name, (source, other), width, functions[name])


@st.composite
def random_networks(draw: st.DrawFn, steps: tuple[int, int] = (4, 24), without: Collection[str] = ()) -> RandomNetwork:
    """Networks of a number of `steps`, every choice in them hypothesis', so that a failing one shrinks."""
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)) + BASE)
    return RandomNetwork(draw(st.randoms(use_true_random=False)), draw(st.integers(*steps)), without)
