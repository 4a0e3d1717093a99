"""Runs of ONNX nodes that onnxruntime has one kernel for, in onnxscript's rewriting language."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import RewriteRuleClassBase, RewriteRuleSet

from teq_graph.onnx.translations import CONTRIB_DOMAIN


class SkipRMSNormalization(RewriteRuleClassBase):
    """RMSNormalization(Add(x, y), w)   becomes   SkipSimplifiedLayerNormalization(x, y, w)

    which also gives the sum: it goes on along the residual stream.
    """

    def pattern(self, op: Any, x: Any, y: Any, w: Any, epsilon: Any) -> tuple[Any, Any]:
        total = op.Add(x, y)
        return op.RMSNormalization(total, w, axis=-1, epsilon=epsilon), total

    def check(self, context: Any, x: ir.Value, y: ir.Value, w: ir.Value, **_: Any) -> bool:
        return _is_hidden_state(x) and _is_hidden_state(y) and w.shape is not None and w.shape.rank() == 1

    def rewrite(self, op: Any, x: Any, y: Any, w: Any, epsilon: Any) -> tuple[Any, Any]:
        normalized, _, _, total = op.SkipSimplifiedLayerNormalization(
            x, y, w, epsilon=epsilon, _domain=CONTRIB_DOMAIN, _version=1, _outputs=4
        )
        return normalized, total


class SkipLayerNormalization(RewriteRuleClassBase):
    """LayerNormalization(Add(x, y), w, b)   becomes   SkipLayerNormalization(x, y, w, b)"""

    def pattern(self, op: Any, x: Any, y: Any, w: Any, b: Any, epsilon: Any) -> tuple[Any, Any]:
        total = op.Add(x, y)
        return op.LayerNormalization(total, w, b, axis=-1, epsilon=epsilon), total

    def check(self, context: Any, x: ir.Value, y: ir.Value, w: ir.Value, **_: Any) -> bool:
        return _is_hidden_state(x) and _is_hidden_state(y) and w.shape is not None and w.shape.rank() == 1

    def rewrite(self, op: Any, x: Any, y: Any, w: Any, b: Any, epsilon: Any) -> tuple[Any, Any]:
        normalized, _, _, total = op.SkipLayerNormalization(
            x, y, w, b, epsilon=epsilon, _domain=CONTRIB_DOMAIN, _version=1, _outputs=4
        )
        return normalized, total


class SiLU(RewriteRuleClassBase):
    """Mul(x, Sigmoid(x))   becomes   QuickGelu(x) with alpha 1"""

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, op.Sigmoid(x))

    def rewrite(self, op: Any, x: Any) -> Any:
        return op.QuickGelu(x, alpha=1.0, _domain=CONTRIB_DOMAIN, _version=1)


def _is_hidden_state(value: ir.Value) -> bool:
    """[b, s, n]: the kernels add values of one shape."""
    return value.shape is not None and value.shape.rank() == 3


RULES = RewriteRuleSet([SkipRMSNormalization.rule(), SkipLayerNormalization.rule(), SiLU.rule()], commute=True)
