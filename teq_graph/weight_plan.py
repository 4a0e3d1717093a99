"""What becomes of each weight of a graph: quantized, and how, or left in float, and why."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping

from teq_graph.analysis.weights import GraphWeight, WeightKind, find_weights
from teq_graph.capture import CapturedGraph
from teq_graph.config import QuantizationConfig, WeightSpec
from teq_graph.errors import CaptureError, ConfigError, brief

SKIPPED = "skipped by pattern"


@dataclasses.dataclass(frozen=True)
class PlannedWeight:
    """What becomes of one weight. `spec` is None where it stays in float, for the `reason` given.

    `is_tied`: an embedding table that a linear reads, too; both read one weight. `bits_are_free`: its bits are chosen
    on calibration data, those of `spec` until then. `experts`: of how many it holds the matrices, 0 where of none.
    """

    name: str
    kind: WeightKind
    shape: tuple[int, ...]
    spec: WeightSpec | None
    reason: str | None = None
    is_tied: bool = False
    bits_are_free: bool = False
    experts: int = 0

    @property
    def is_linear(self) -> bool:
        """Whether a linear reads it."""
        return self.kind == "linear" or self.is_tied

    @property
    def is_product(self) -> bool:
        """Whether a linear, a convolution or experts read it as a matrix."""
        return self.is_linear or self.kind in ("convolution", "experts")


WeightPlan = tuple[PlannedWeight, ...]
"""One entry for each weight: those of linears, experts, convolutions, tables, others; the quantized ones first."""


def plan_weights(captured: CapturedGraph, quantization: QuantizationConfig) -> WeightPlan:
    """What `quantization` makes of the weights of a normalised graph.

    An embedding table whose tied projection alone is quantized has two entries: the projection gets a weight of its
    own (`UntieWeights`). Raises CaptureError where the graph has neither linears nor convolutions, ConfigError for a
    pattern that no weight matches.
    """
    plan: list[PlannedWeight] = []
    for weight in find_weights(captured.graph_module):
        plan += _plan_one(weight, captured, quantization)
    if not any(weight.is_product for weight in plan):
        raise CaptureError("the graph has no linears and no convolutions: there is nothing to quantize")
    order = ("linear", "experts", "convolution", "embedding")
    plan.sort(key=lambda weight: (*(weight.kind != kind for kind in order), weight.spec is None))
    _check_patterns(quantization, plan)
    return tuple(plan)


def specs_of(plan: Iterable[PlannedWeight]) -> dict[str, WeightSpec]:
    """The specs of the weights that are quantized, by name."""
    return {weight.name: weight.spec for weight in plan if weight.spec is not None}


def with_specs(plan: WeightPlan, specs: Mapping[str, WeightSpec]) -> WeightPlan:
    """`plan` with other specs for the weights that are quantized."""
    return tuple(dataclasses.replace(w, spec=specs[w.name]) if w.spec is not None else w for w in plan)


def with_names(plan: WeightPlan, renamed: Mapping[str, str]) -> WeightPlan:
    """`plan` with the linears that were untied under their new names."""
    return tuple(dataclasses.replace(w, name=renamed.get(w.name, w.name)) if w.kind == "linear" else w for w in plan)


def _plan_one(weight: GraphWeight, captured: CapturedGraph, quantization: QuantizationConfig) -> list[PlannedWeight]:
    planned = PlannedWeight(
        weight.name, weight.kind, weight.shape, None, weight.reason, weight.is_tied, experts=weight.experts
    )
    is_product = weight.kind in ("linear", "convolution", "experts")
    if weight.kind != "embedding" and (not is_product or weight.reason is not None):
        return [planned]
    spec = quantization.spec_for(weight.name)
    linear_reason = SKIPPED if spec is None else None
    if spec is not None and weight.name == captured.lm_head and not quantization.quantize_lm_head:
        linear_reason = "vocabulary projection (quantize_lm_head=False)"
    linear = dataclasses.replace(
        planned,
        kind=weight.kind if is_product else "linear",
        spec=None if linear_reason else spec,
        reason=linear_reason,
        is_tied=False,
        bits_are_free=linear_reason is None and quantization.chooses_bits_of(weight.name),
    )
    if weight.kind != "embedding":
        return [linear]
    table_reason = _reason_of_table(weight, spec, linear_reason, quantization)
    table = dataclasses.replace(planned, spec=None if table_reason else spec, reason=table_reason)
    if not weight.is_tied or table_reason is None:
        return [table]
    if linear_reason is None:
        return [linear, dataclasses.replace(table, is_tied=False)]
    return [table if quantization.quantize_embedding else dataclasses.replace(table, reason=linear_reason)]


def _reason_of_table(
    weight: GraphWeight, spec: WeightSpec | None, linear_reason: str | None, quantization: QuantizationConfig
) -> str | None:
    """Why an embedding table stays in float."""
    if weight.reason is not None:
        return f"embedding: {weight.reason}"
    if not quantization.quantize_embedding:
        return "embedding (quantize_embedding=False)"
    if spec is None:
        return SKIPPED
    if weight.is_tied and linear_reason is not None:
        return "embedding: tied to a projection that stays in float"
    return None


def _check_patterns(quantization: QuantizationConfig, plan: Iterable[PlannedWeight]) -> None:
    """Raises ConfigError for a pattern that matches none of the weights that could be quantized."""
    takes_tables = quantization.quantize_embedding
    names = list(dict.fromkeys(w.name for w in plan if w.is_product or (takes_tables and w.kind == "embedding")))
    what = "linear, convolution or embedding" if takes_tables else "linear or convolution"
    for option, patterns in (("skip", quantization.skip), ("overrides", tuple(quantization.overrides))):
        for pattern in patterns:
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                some = ", ".join(names[:2]) + (f" … {names[-1]}" if len(names) > 2 else "")
                raise ConfigError(f"{option}={brief(pattern)}: it matches no {what}; their weights are {some}")
