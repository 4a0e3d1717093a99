"""Runs of ONNX nodes that onnxruntime has one kernel for, in onnxscript's rewriting language; and one that it fuses
wrongly, which is kept from it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet

from teq_graph.onnx.export.initializers import add_initializer
from teq_graph.onnx.export.schemas import CONTRIB_DOMAIN


class _SkipNormalization(RewriteRuleClassBase):
    """norm(Add(x, y), …)   becomes   `fused`(x, y, …), which also gives the sum: it goes on along the residual."""

    fused: str

    def check(self, _context: Any, *_: Any, **values: Any) -> MatchResult:  # type: ignore[override]  # values by name
        # [b, s, n] both: the kernels add values of one shape.
        ranks = [value.shape.rank() if value.shape is not None else 0 for value in (values[name] for name in "xyw")]
        result = MatchResult()
        return result if ranks == [3, 3, 1] else result.fail(f"ranks {ranks}")

    def rewrite(self, op: Any, *_: Any, epsilon: Any, **values: Any) -> tuple[Any, Any]:
        options = dict(epsilon=epsilon, _domain=CONTRIB_DOMAIN, _version=1, _outputs=4)
        normalized, _, _, total = getattr(op, self.fused)(
            *(values[name] for name in "xywb" if name in values), **options
        )
        return normalized, total


class SkipRMSNormalization(_SkipNormalization):
    """RMSNormalization(Add(x, y), w)   becomes   SkipSimplifiedLayerNormalization(x, y, w)"""

    fused = "SkipSimplifiedLayerNormalization"

    def pattern(self, op: Any, x: Any, y: Any, w: Any, epsilon: Any) -> tuple[Any, Any]:
        total = op.Add(x, y)
        return op.RMSNormalization(total, w, axis=-1, epsilon=epsilon), total


class SkipLayerNormalization(_SkipNormalization):
    """LayerNormalization(Add(x, y), w, b)   becomes   SkipLayerNormalization(x, y, w, b)"""

    fused = "SkipLayerNormalization"

    def pattern(self, op: Any, x: Any, y: Any, w: Any, b: Any, epsilon: Any) -> tuple[Any, Any]:
        total = op.Add(x, y)
        return op.LayerNormalization(total, w, b, axis=-1, epsilon=epsilon), total


class SiLU(RewriteRuleClassBase):
    """Mul(x, Sigmoid(x))   becomes   QuickGelu(x) with alpha 1"""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.QuickGelu(x, alpha=1.0, _domain=CONTRIB_DOMAIN, _version=1)


FUSIONS = RewriteRuleSet(
    [rule.rule() for rule in (SkipRMSNormalization, SkipLayerNormalization, SiLU)],  # type: ignore[no-untyped-call]
    commute=True,
)


def keep_padding(model: ir.Model) -> None:
    """Pad(x, zeros) that a MaxPool reads   becomes   Pad(x, zeros, -0.0)

    onnxruntime takes padding by 0 into the MaxPool, which pads by less than every number (1.31.1 and before): of
    negative values it gives others then. By -0.0, which is the same number, it leaves the Pad alone.
    """
    for node in model.graph:
        if node.op_type != "Pad" or all(user.op_type != "MaxPool" for user, _ in node.outputs[0].uses()):
            continue
        value = node.inputs[2] if len(node.inputs) > 2 else None
        by = None if value is None else ir.convenience.get_const_tensor(value)
        if value is not None and (by is None or by.numpy() != 0):
            continue
        x = node.inputs[0]
        assert x is not None and x.dtype is not None
        zero = add_initializer(model, f"{x.dtype.name.lower()}_negative_zero", np.array(-0.0, x.dtype.numpy()))
        node.resize_inputs(max(3, len(node.inputs)))
        node.replace_input_with(2, zero)


def fuse(model: ir.Model) -> None:
    """Apply every rule of this module to `model`."""
    keep_padding(model)
    FUSIONS.apply_to_model(model)
    for node in model.graph:
        if node.op_type in (SkipRMSNormalization.fused, SkipLayerNormalization.fused):
            for value in node.outputs[1:]:
                if not value.uses() and not value.is_graph_output():
                    value.name = ""  # onnxruntime makes a tensor of every output that has a name
