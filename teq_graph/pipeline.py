"""Every list of passes, in order, with the reason of each order; and the runner that applies one.

capture ─▶ NORMALIZE ─▶ untie ─▶ (analysis) ─▶ insert_scales ─▶ (training) ─▶ fold_scales
        ─▶ quantize ─▶ the compiled graph ─▶ for_onnxruntime ─▶ (translation to ONNX)

`for_sampling` is for a clone that writes its own calibration text.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.fx import GraphModule

from teq_graph.analysis.equivalences import Equivalence
from teq_graph.capture import CapturedGraph
from teq_graph.config import WeightSpec
from teq_graph.errors import PassError, TeqGraphError, one_line
from teq_graph.graph.check import check_graph
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.passes.change_dtype import ChangeDtype
from teq_graph.passes.fold_batch_norms import FoldBatchNorms
from teq_graph.passes.fold_constants import FoldConstants
from teq_graph.passes.fold_scales import FoldScales
from teq_graph.passes.fuse_attention import FuseAttention
from teq_graph.passes.fuse_experts import FuseExperts
from teq_graph.passes.fuse_rms_norm import FuseRMSNorm
from teq_graph.passes.grow_caches_in_place import GrowCachesInPlace
from teq_graph.passes.insert_scales import InsertedScales, InsertScales
from teq_graph.passes.lower_to_matmul_nbits import LowerToMatMulNBits
from teq_graph.passes.make_complex_real import MakeComplexReal
from teq_graph.passes.match_onnxruntime_layout import MatchOnnxruntimeLayout
from teq_graph.passes.merge_products import MergeProducts
from teq_graph.passes.normalize_convolutions import NormalizeConvolutions
from teq_graph.passes.normalize_experts import NormalizeExperts
from teq_graph.passes.normalize_linears import NormalizeLinears
from teq_graph.passes.quantize_embeddings import QuantizeEmbeddings
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.passes.remove_no_ops import RemoveNoOps
from teq_graph.passes.untie_weights import UntieWeights
from teq_graph.quantization import QuantizedWeight

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Phase:
    """Passes that are applied one after the other, under a name for errors."""

    name: str
    passes: tuple[GraphPass[Any], ...]


# ------------------------------------------------------------------------------------------------------------ the lists

NORMALIZE = Phase(
    "normalize",
    (
        # First: casts that do nothing hide products and norms.
        RemoveNoOps(),
        # Before all that reads values: no other pass or rule knows complex numbers.
        MakeComplexReal(),
        # Before constants are folded: `weight.T` must be a linear's operand, not a constant of its own.
        NormalizeLinears(),
        # Likewise: a matrix of experts in another order must stay a product's operand.
        NormalizeExperts(),
        # Before norms: `1 + weight` must be a constant to be a norm's gain.
        FoldConstants(),
        FuseRMSNorm(),
        # After constants are folded: parameters in another dtype or shape are constants then.
        FoldBatchNorms(),
        # Last: a matrix in the shape of a convolution's weight is an expression that constants' folding would undo.
        NormalizeConvolutions(),
    ),
)
"""Of what torch.export gives, what the analysis reads: products, norms and constants each in one form."""


def untie(weights: Collection[str]) -> Phase:
    """Before the analysis: a projection that is tied to an embedding can be scaled only with a weight of its own."""
    return Phase("untie", (UntieWeights(weights),))


def insert_scales(equivalences: Sequence[Equivalence], specs: Mapping[str, WeightSpec]) -> Phase:
    """Before training: scales and fake-quantization as nodes."""
    return Phase("insert scales", (InsertScales(equivalences, specs),))


def fold_scales(inserted: InsertedScales, left: Collection[str]) -> Phase:
    """After training: the same ops as before, over scaled weights, but for those `left` as they are."""
    return Phase("fold scales", (FoldScales(inserted, left),))


def quantize(
    specs: Mapping[str, WeightSpec],
    chosen: Mapping[str, QuantizedWeight],
    tables: Mapping[str, QuantizedWeight],
) -> Phase:
    """Codes in the place of float weights."""
    return Phase(
        "quantize",
        (
            # Before the linears: a projection that is tied to a table reads the table's codes.
            QuantizeEmbeddings(tables),
            QuantizeLinears(specs, chosen),
            # Last: it reads what both put before a linear.
            LowerToMatMulNBits(),
        ),
    )


def for_onnxruntime(captured: CapturedGraph, dtype: torch.dtype, exact: bool = False) -> Phase:
    """A compiled graph as onnxruntime has kernels for it; `captured` is that graph with float32 example inputs.

    `exact`: without kernels that round activations to integers.
    """
    return Phase(
        "for onnxruntime",
        (
            # Before dtypes change: a cast to the dtype that a value has already would come to mean the new one.
            RemoveNoOps(),
            # Attention is proven by numbers, which half precision is too coarse for.
            ChangeDtype(torch.float32),
            FuseAttention(captured),
            # After attention, which finds query, key and value each by a product of its own, and packs them itself.
            MergeProducts(),
            # After products are merged: what is joined is one layout, whichever it becomes.
            MatchOnnxruntimeLayout(),
            # After the layout, which decides whether one op takes the experts; before half precision, as for attention.
            FuseExperts(exact),
            ChangeDtype(dtype),
            # The casts that two changes leave.
            RemoveNoOps(),
        ),
    )


def for_sampling(captured: CapturedGraph) -> Phase:
    """A float decoder that writes text; `captured` is that graph, a clone of what is compiled."""
    # Attention is proven by numbers, which half precision is too coarse for.
    fuse = (FuseAttention(captured),) if captured.dtype == torch.float32 else ()
    # After attention, whose op has caches of its own.
    return Phase("for sampling", (*fuse, GrowCachesInPlace(captured)))


# ----------------------------------------------------------------------------------------------------------- the runner


class PhaseResult:
    """What the passes of one phase returned."""

    def __init__(self, results: Sequence[tuple[GraphPass[Any], PassResult[Any]]]) -> None:
        self._results = results

    @property
    def modified(self) -> bool:
        """Whether any pass changed the graph."""
        return any(result.modified for _, result in self._results)

    def of(self, kind: type[GraphPass[T]]) -> T:
        """The value of the one pass of this class."""
        (value,) = (result.value for step, result in self._results if isinstance(step, kind))
        found: T = value
        return found


checks_every_pass = False
"""Whether the graph is checked after each pass, as tests have it."""


def run(phase: Phase, graph_module: GraphModule) -> PhaseResult:
    """Apply the passes of `phase` in order.

    Raises PassError, which names the pass and those before it, where one fails for another reason than a refusal; a
    refusal (TeqGraphError) is its own.
    """
    results: list[tuple[GraphPass[Any], PassResult[Any]]] = []
    for step in phase.passes:
        try:
            result = step(graph_module)
            if checks_every_pass:
                check_graph(graph_module)
        except (TeqGraphError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise PassError(f"{_place(phase, step, results)}: {type(error).__name__}: {one_line(error)}") from error
        results.append((step, result))
    return PhaseResult(results)


def _place(phase: Phase, failing: GraphPass[Any], done: Sequence[tuple[GraphPass[Any], Any]]) -> str:
    before = ", ".join(type(step).__name__ for step, _ in done)
    return f"pass {type(failing).__name__} of phase {phase.name!r} ({f'after {before}' if before else 'the first'})"
