"""What a compilation did: which linears were quantized and how well, which were not and why."""

from __future__ import annotations

import dataclasses
import math
import operator
from typing import Any

from teq_graph.analysis.equivalences.equivalence import Refusal
from teq_graph.analysis.other_weights import OtherWeight
from teq_graph.config import WeightSpec


@dataclasses.dataclass(frozen=True)
class LinearReport:
    """One linear of the graph. `spec` is None where it stays in float, for the `reason` given.

    `error` is ‖dequantized − float‖ / ‖float‖ of the weight as it was quantized, scales included.
    """

    name: str
    shape: tuple[int, int]
    spec: WeightSpec | None
    reason: str | None = None
    scaled: bool = False
    error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0


@dataclasses.dataclass(frozen=True)
class EmbeddingReport:
    """One embedding table, as a `LinearReport`. Where a linear is `tied` to it, both read the same codes."""

    name: str
    shape: tuple[int, int]
    spec: WeightSpec | None
    reason: str | None = None
    tied: bool = False
    error: float | None = None
    bytes_before: int = 0
    bytes_after: int = 0


@dataclasses.dataclass(frozen=True)
class BlockReport:
    """Relative output error of a block, rounded to nearest and as its scales and codes were chosen."""

    linears: tuple[str, ...]
    before: float
    after: float


@dataclasses.dataclass(frozen=True)
class Report:
    """The whole compilation. `bytes_before` and `bytes_after` count every tensor of the graph, each once.

    `other_weights` take part in products that are no linears; `notes` say what else a user should know. `embeddings`
    are there where they were to be quantized.
    """

    linears: tuple[LinearReport, ...]
    equivalences: int
    refusals: tuple[Refusal, ...] = ()
    blocks: tuple[BlockReport, ...] = ()
    bytes_before: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    other_weights: tuple[OtherWeight, ...] = ()
    notes: tuple[str, ...] = ()
    embeddings: tuple[EmbeddingReport, ...] = ()

    @property
    def quantized(self) -> tuple[LinearReport, ...]:
        """The linears that were quantized."""
        return tuple(linear for linear in self.linears if linear.spec is not None)

    @property
    def in_float(self) -> tuple[LinearReport | EmbeddingReport | OtherWeight, ...]:
        """What was not quantized, each with its `reason`."""
        return (
            *(linear for linear in self.linears if linear.spec is None),
            *(table for table in self.embeddings if table.spec is None),
            *self.other_weights,
        )

    @property
    def covered(self) -> int:
        """How many linears have at least one equivalence that scales their columns."""
        return sum(linear.scaled for linear in self.linears)

    def describe_bits(self) -> str:
        """Bits of the quantized weights, as in `3.29 on average: 12 × 2, 100 × 3`."""
        bits = [linear.spec.bits for linear in self.quantized if linear.spec]
        sizes = [math.prod(linear.shape) for linear in self.quantized]
        average = sum(map(operator.mul, bits, sizes)) / max(1, sum(sizes))
        return f"{average:.3g} on average: {', '.join(f'{bits.count(b)} × {b}' for b in sorted(set(bits)))}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Report:
        """The inverse of `to_dict`."""
        linears, embeddings = (
            [kind(**{**w, "shape": tuple(w["shape"]), "spec": w["spec"] and WeightSpec(**w["spec"])}) for w in weights]
            for kind, weights in ((LinearReport, data["linears"]), (EmbeddingReport, data.get("embeddings", ())))
        )
        refusals = [Refusal(**refusal) for refusal in data["refusals"]]
        blocks = [BlockReport(tuple(b["linears"]), b["before"], b["after"]) for b in data["blocks"]]
        others = [OtherWeight(**{**o, "shape": tuple(o["shape"])}) for o in data.get("other_weights", ())]
        return cls(
            **{
                **data,
                "linears": tuple(linears),
                "refusals": tuple(refusals),
                "blocks": tuple(blocks),
                "other_weights": tuple(others),
                "notes": tuple(data.get("notes", ())),
                "embeddings": tuple(embeddings),
            }
        )

    def __str__(self) -> str:
        lines = [
            f"linears       {len(self.quantized)} of {len(self.linears)} quantized, {self.covered} with scaled columns",
            f"equivalences  {self.equivalences} found" if self.equivalences else "equivalences  none found",
        ]
        if len({linear.spec.bits for linear in self.quantized if linear.spec}) > 1:
            lines.append(f"bits          {self.describe_bits()}")
        for table in self.embeddings:
            if table.spec is not None:
                tied = ", one with the vocabulary projection" if table.tied else ""
                lines.append(f"embedding     {table.name}: {table.spec}, error {table.error:.1%}{tied}")
        if self.blocks:
            before = sum(block.before for block in self.blocks) / len(self.blocks)
            after = sum(block.after for block in self.blocks) / len(self.blocks)
            lines.append(f"block error   {before:.4g} rounded to nearest, {after:.4g} as chosen (mean)")
        for reason in dict.fromkeys(weight.reason for weight in self.in_float):
            names = [weight.name for weight in self.in_float if weight.reason == reason]
            lines.append(f"in float      {', '.join(names[:3])}{' …' if len(names) > 3 else ''}: {reason}")
        ratio = self.bytes_after / max(1, self.bytes_before)
        lines.append(f"bytes         {self.bytes_before:,} → {self.bytes_after:,} ({ratio:.1%})")
        lines.append(f"time          {self.seconds:.1f} s")
        lines += [f"note          {note}" for note in self.notes]
        return "\n".join(lines)
