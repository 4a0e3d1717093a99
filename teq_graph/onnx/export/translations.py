"""How ops that torch.onnx does not know become ONNX nodes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import values

import teq_graph.ops  # noqa: F401  (registers the operators)
from teq_graph.graph.nodes import aten
from teq_graph.onnx.export.schemas import (
    CONTRIB_DOMAIN,
    DEQUANTIZE_NBITS,
    EXPERT_LINEAR,
    EXPERT_MATMUL_NBITS,
    GATHER_BLOCK_QUANTIZED,
    GROUP_QUERY_ATTENTION,
    LINEAR_ATTENTION,
    MATMUL_NBITS,
    QMOE,
    given,
)
from teq_graph.onnx.fused_products import has_fused_kernel
from teq_graph.ops.expert_mixture import GATED

CODES_OF: Mapping[str, Mapping[int, str]] = {
    "MatMulNBits": {1: "bits"},
    "GatherBlockQuantized": {0: "bits"},
    "DequantizeLinear": {0: "bits"},
    "QMoE": {2: "expert_weight_bits", 5: "fc2_expert_weight_bits"},
}
"""Operators over quantized weights -> which of their inputs are codes, and the attribute that has their bits, where it
is not their type."""


def translation_table(opset: int, accuracy_level: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Translations for `torch.onnx.export(custom_translation_table=…)`.

    The quantized product becomes com.microsoft::MatMulNBits, the quantized table com.microsoft::GatherBlockQuantized,
    which takes the same codes as a matrix of whole rows: one initializer serves both. Casts and the like are here
    because a graph in which every op has a translation need not go through torch's decompositions, most of the
    exporter's time.
    """
    op = values.Opset("", opset)

    def matmul_nbits(
        a: Any, b: Any, scales: Any, zero_points: Any, bias: Any, K: int, N: int, bits: int, block_size: int
    ) -> Any:
        # onnxruntime refuses a bias whose length it cannot infer, and has no fused kernel with one: added apart.
        computed = bias is not None and bias.producer() is not None
        apart = computed or has_fused_kernel(a.dtype, bits, block_size, N, zero_points is not None)
        inputs = given(a, b, scales, zero_points, None, None if apart else bias)
        product = MATMUL_NBITS(*inputs, K=K, N=N, bits=bits, block_size=block_size, accuracy_level=accuracy_level)
        return op.Add(product, bias) if apart and bias is not None else product

    def dequantize_nbits(b: Any, scales: Any, zero_points: Any, K: int, N: int, bits: int, block_size: int) -> Any:
        return DEQUANTIZE_NBITS(*given(b, scales, zero_points), K=K, N=N, bits=bits, block_size=block_size)

    def expert_linear(input: Any, weight: Any, bias: Any, experts: Any, num_experts: int) -> Any:  # noqa: A002
        return EXPERT_LINEAR(*given(input, experts, weight, bias), num_experts=num_experts)

    def expert_matmul_nbits(
        a: Any,
        b: Any,
        scales: Any,
        zero_points: Any,
        bias: Any,
        experts: Any,
        K: int,
        N: int,
        bits: int,
        block_size: int,
        num_experts: int,
    ) -> Any:
        inputs = given(a, experts, b, scales, zero_points, bias)
        sizes = {"K": K, "N": N, "bits": bits, "block_size": block_size, "accuracy_level": accuracy_level}
        return EXPERT_MATMUL_NBITS(*inputs, num_experts=num_experts, **sizes)

    def expert_mixture_nbits(
        x: Any,
        chosen: Any,
        weights: Any,
        b1: Any,
        scales1: Any,
        zero_points1: Any,
        bias1: Any,
        b2: Any,
        scales2: Any,
        zero_points2: Any,
        bias2: Any,
        _K: int,
        N1: int,
        _I: int,
        N: int,
        bits1: int,
        bits2: int,
        block_size: int,
        num_experts: int,
        activation: str,
        alpha: float,
        beta: float,
        limit: float | None,
    ) -> Any:
        # The operator takes the experts of the k largest numbers of a row: ones where they are chosen.
        tokens = op.Shape(chosen, start=0, end=1)
        all_experts = op.Concat(tokens, op.Constant(value_ints=[num_experts]), axis=0)
        none, one = (op.CastLike(op.Constant(value_float=number), x) for number in (0.0, 1.0))
        empty = op.Expand(none, all_experts)
        choice = op.ScatterElements(empty, chosen, op.Expand(one, op.Shape(chosen)), axis=1)
        shares = op.ScatterElements(empty, chosen, op.CastLike(weights, x), axis=1)

        def of_each(tensor: Any, rows: int) -> Any:
            if tensor is None:
                return None
            # In numbers, by which the file names the bytes of the whole weight once more: no copy of them is made.
            row = [math.prod(tensor.shape[1:])] if len(tensor.shape) > 1 else []
            return op.Reshape(tensor, op.Constant(value_ints=[num_experts, rows, *row]))

        limits = {} if limit is None else {"swiglu_limit": limit}
        gated = activation == GATED
        return QMOE(
            *(x, choice, of_each(b1, N1), of_each(scales1, N1), of_each(bias1, N1)),
            *(of_each(b2, N), of_each(scales2, N), of_each(bias2, N), None, None, None),
            *(of_each(zero_points1, N1), of_each(zero_points2, N), None, shares),
            k=chosen.shape[1],
            block_size=block_size,
            expert_weight_bits=bits1,
            fc2_expert_weight_bits=bits2,
            activation_type=activation,
            swiglu_fusion=int(gated),
            activation_alpha=alpha,
            activation_beta=beta,
            weights_prepacked=0,
            accuracy_level=accuracy_level,
            **limits,
        )

    def embedding_nbits(indices: Any, b: Any, scales: Any, zero_points: Any, D: int, bits: int, block_size: int) -> Any:
        count, *row = b.shape
        rows = op.Reshape(b, op.Constant(value_ints=[count, math.prod(row)]))
        inputs = given(rows, indices, scales, zero_points)
        gathered = GATHER_BLOCK_QUANTIZED(*inputs, gather_axis=0, quantize_axis=1, block_size=block_size, bits=bits)
        if D % block_size == 0:
            return gathered
        start, end, axis = (op.Constant(value_ints=[value]) for value in (0, D, -1))
        return op.Slice(gathered, start, end, axis)

    def attention(
        query: Any,
        key: Any,
        value: Any,
        attn_mask: Any = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Any:
        # Attention lets several query heads share a key head; torch also broadcasts a single one.
        heads, shared = query.shape[1], key.shape[1]
        if len(query.shape) != 4 or dropout_p or not (heads == shared or enable_gqa or shared == 1):
            raise ValueError(f"attention of {query.shape} over {key.shape}: accepted are 4-D without dropout")
        if attn_mask is not None and attn_mask.shape[-2] == 1 and query.shape[-2] != 1:
            # onnxruntime broadcasts a mask over batch and heads alone.
            one = op.Constant(value_ints=[1])
            attn_mask = op.Expand(attn_mask, op.Concat(one, one, op.Shape(query, start=2, end=3), one, axis=0))
        result, *_ = op.Attention(query, key, value, attn_mask, scale=scale, is_causal=is_causal)
        return result

    def group_query_attention(
        query: Any,
        key: Any,
        value: Any,
        past_key: Any,
        past_value: Any,
        bias: Any,
        cos: Any,
        sin: Any,
        num_heads: int,
        kv_num_heads: int,
        scale: float,
        softcap: float,
        window: int,
        interleaved: bool,
    ) -> Any:
        # The bias is as long as past and present together, whatever the size of the buffers that hold the cache.
        total = op.Squeeze(op.Cast(op.Shape(bias, start=3, end=4), to=ir.DataType.INT32))
        one = op.Cast(op.Constant(value_int=1), to=ir.DataType.INT32)
        # On a GPU a shape is in the host's memory, and Range the one operator that makes of it a number on the device
        # without a copy, which a CUDA graph cannot have.
        last = op.Expand(op.Range(op.Sub(total, one), total, one), op.Shape(bias, start=0, end=1))
        return GROUP_QUERY_ATTENTION(
            query,
            key,
            value,
            past_key,
            past_value,
            last,
            total,
            cos,
            sin,
            None,
            bias,
            num_heads=num_heads,
            kv_num_heads=kv_num_heads,
            scale=scale,
            softcap=softcap,
            local_window_size=window,
            do_rotary=int(cos is not None),
            rotary_interleaved=int(interleaved),
        )

    def linear_attention(
        query: Any, key: Any, value: Any, decay: Any, beta: Any, state: Any, scale: float
    ) -> tuple[Any, Any]:
        heads = query.shape[2]

        def packed(tensor: Any) -> Any:
            return op.Reshape(tensor, op.Constant(value_ints=[0, 0, -1])) if len(tensor.shape) == 4 else tensor

        output, present = LINEAR_ATTENTION(
            *map(packed, (query, key, value)),
            state,
            packed(decay),
            beta,
            q_num_heads=heads,
            kv_num_heads=heads,
            scale=scale,
            update_rule="gated" if beta is None else "gated_delta",
        )
        return op.Reshape(output, op.Constant(value_ints=[0, 0, heads, -1])), present

    def cast(self: Any, dtype: int, *_: Any, **__: Any) -> Any:
        return op.Cast(self, to=dtype) if self.dtype != ir.DataType(dtype) else op.Identity(self)

    def cast_on_device(self: Any, _device: str, dtype: int, *_: Any, **__: Any) -> Any:
        return cast(self, dtype)

    def cast_layout(self: Any, *, dtype: int | None = None, **_: Any) -> Any:
        return op.Identity(self) if dtype is None or dtype == -1 else cast(self, dtype)

    def split(self: Any, split_sizes: Sequence[int], dim: int = 0) -> Any:
        are_known = all(isinstance(size, int) for size in split_sizes)
        if are_known and len(split_sizes) > 1 and len(set(split_sizes)) == 1:
            return op.Split(self, axis=dim, num_outputs=len(split_sizes))
        axis, one = op.Constant(value_ints=[dim]), op.Constant(value_ints=[1])
        if are_known:
            ends = [op.Constant(value_ints=[end]) for end in itertools.accumulate(split_sizes)]
        else:
            sizes = [op.Constant(value_ints=[s]) if isinstance(s, int) else op.Reshape(s, one) for s in split_sizes]
            ends = list(itertools.accumulate(sizes, op.Add))
        starts = [op.Constant(value_ints=[0]), *ends]
        return [op.Slice(self, start, end, axis) for start, end in zip(starts, ends, strict=False)]

    def transpose(self: Any) -> Any:
        return op.Transpose(self)

    def bitwise_or(self: Any, other: Any) -> Any:
        return op.Or(self, other) if self.dtype == ir.DataType.BOOL else op.BitwiseOr(self, other)

    def bitwise_and(self: Any, other: Any) -> Any:
        return op.And(self, other) if self.dtype == ir.DataType.BOOL else op.BitwiseAnd(self, other)

    def indices_where(condition: Any) -> Any:
        # One tensor for each dimension.
        found, row = op.NonZero(condition), op.Constant(value_ints=[-1])
        count = len(condition.shape)
        rows = op.Split(found, axis=0, num_outputs=count) if count > 1 else [found]
        return [op.Reshape(indices, row) for indices in rows]

    def index_add(self: Any, dim: int, index: Any, source: Any, alpha: float = 1) -> Any:
        if dim % len(self.shape) or alpha != 1:
            raise ValueError(f"index_add along {dim} with alpha={alpha}: accepted are 0 and 1")
        places = op.Unsqueeze(index, op.Constant(value_ints=[-1]))
        return op.ScatterND(self, places, source, reduction="add")

    def item(self: Any) -> Any:
        return op.Reshape(self, op.Constant(value=ir.tensor([], dtype=ir.DataType.INT64)))

    def conv3d(
        self: Any,
        weight: Any,
        bias: Any = None,
        stride: Sequence[int] = (1,),
        padding: Sequence[int] = (0,),
        dilation: Sequence[int] = (1,),
        groups: int = 1,
    ) -> Any:
        # torch's own gives a convolution without a bias one of a shape that onnxruntime refuses.
        stride, padding, dilation = ([*sizes] * (3 // len(sizes)) for sizes in (stride, padding, dilation))
        first = op.Constant(value_ints=[0])
        is_batch = len(self.shape) == 5
        inputs = given(self if is_batch else op.Unsqueeze(self, first), weight, bias)
        result = op.Conv(*inputs, strides=stride, pads=padding * 2, dilations=dilation, group=groups)
        return result if is_batch else op.Squeeze(result, first)

    def square(self: Any) -> Any:
        return op.Mul(self, self)

    def nan_to_num(
        self: Any, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
    ) -> Any:
        if not self.dtype.is_floating_point():
            return op.Identity(self)

        def constant(number: float) -> Any:
            return op.Constant(value=ir.tensor(number, dtype=self.dtype))

        result = op.Where(op.IsNaN(self), constant(nan or 0.0), self)
        for infinity, number, last in ((math.inf, posinf, self.dtype.max), (-math.inf, neginf, self.dtype.min)):
            chosen = constant(float(last) if number is None else number)
            result = op.Where(op.Equal(result, constant(infinity)), chosen, result)
        return result

    def subtract_from(self: Any, other: float, alpha: float = 1) -> Any:
        # torch's decomposition is a difference whose first operand is a number, which no operator takes.
        if isinstance(other, float) and not self.dtype.is_floating_point():
            self = op.Cast(self, to=ir.DataType.FLOAT)
            self.dtype = ir.DataType.FLOAT

        def constant(number: float) -> Any:
            return op.Constant(value=ir.tensor(number, dtype=self.dtype))

        return op.Sub(constant(other), self if alpha == 1 else op.Mul(self, constant(alpha)))

    return {
        torch.ops.teq_graph.matmul_nbits.default: matmul_nbits,
        torch.ops.teq_graph.dequantize_nbits.default: dequantize_nbits,
        torch.ops.teq_graph.expert_linear.default: expert_linear,
        torch.ops.teq_graph.expert_matmul_nbits.default: expert_matmul_nbits,
        torch.ops.teq_graph.expert_mixture_nbits.default: expert_mixture_nbits,
        torch.ops.teq_graph.embedding_nbits.default: embedding_nbits,
        torch.ops.teq_graph.group_query_attention.default: group_query_attention,
        torch.ops.teq_graph.linear_attention.default: linear_attention,
        aten.scaled_dot_product_attention.default: attention,
        aten.to.dtype: cast,
        aten.to.device: cast_on_device,
        aten.to.dtype_layout: cast_layout,
        aten.numpy_T.default: transpose,
        aten.split_with_sizes.default: split,
        aten.conv3d.default: conv3d,
        aten.where.default: indices_where,
        aten.index_add.default: index_add,
        aten.item.default: item,
        aten.square.default: square,
        aten.nan_to_num.default: nan_to_num,
        aten.rsub.Scalar: subtract_from,
        aten.__and__.Tensor: bitwise_and,
        aten.__or__.Tensor: bitwise_or,
    }


def foreign_operators(model: ir.Model) -> Mapping[str, ir.Node]:
    """Operators that are neither standard ONNX nor contrib ops of onnxruntime, each with a node that uses it."""
    return {
        f"{node.domain}::{node.op_type}": node
        for node in model.graph.all_nodes()
        if node.domain not in ("", "ai.onnx", CONTRIB_DOMAIN)
    }
