"""The one vocabulary of op sets: what an ATen op does to the numbers of its first argument."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from teq_graph.graph.nodes import aten

NAMED_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default)
"""Casts whose dtype or device is an argument."""

CASTS = (*NAMED_CASTS, aten.to.other, aten.type_as.default)
"""The same numbers in another dtype or on another device."""

ALIASES = (aten.alias.default, aten.detach.default, aten.lift_fresh.default, aten.lift_fresh_copy.default)
"""Their first argument itself."""

COPIES = (*ALIASES, aten.contiguous.default, aten.clone.default, aten.dropout.default)
"""The same numbers in the same place, shape and dtype; dropout is captured in eval mode."""

RESHAPES = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
TRANSPOSES = (aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default, aten.mT.default)

MOVES = (
    *RESHAPES,
    *TRANSPOSES,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.swapaxes.default,
    aten.swapdims.default,
    aten.unsqueeze.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.expand.default,
    aten.expand_as.default,
    aten.broadcast_to.default,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.select.int,
    aten.slice.Tensor,
    aten.narrow.default,
    aten.unfold.default,
    aten.diagonal.default,
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.roll.default,
    aten.flip.default,
)
"""Numbers in another place or shape, some repeated or left out, as sizes say."""

SELECTS = (aten.index.Tensor, aten.index_select.default, aten.gather.default)
"""Numbers chosen by the values of indices."""

HOMOGENEOUS = (aten.neg.default, aten.relu.default, aten.leaky_relu.default, aten.abs.default)
"""f(s x) = s f(x) for every s > 0, element by element."""

EACH_CHANNEL: Mapping[Any, int] = {
    aten.max_pool1d.default: 1,
    aten.max_pool2d.default: 2,
    aten.max_pool3d.default: 3,
    aten.avg_pool1d.default: 1,
    aten.avg_pool2d.default: 2,
    aten.avg_pool3d.default: 3,
    aten.adaptive_avg_pool1d.default: 1,
    aten.adaptive_avg_pool2d.default: 2,
    aten.adaptive_avg_pool3d.default: 3,
    aten.upsample_nearest1d.vec: 1,
    aten.upsample_nearest2d.vec: 2,
    aten.upsample_nearest3d.vec: 3,
    aten.upsample_linear1d.vec: 1,
    aten.upsample_bilinear2d.vec: 2,
    aten.upsample_bicubic2d.vec: 2,
}
"""Of each channel by itself, over so many last dimensions: f(s x) = s f(x) for every s > 0."""

UNCHANGED = frozenset({*MOVES, *CASTS, *COPIES})
"""Numbers stay what they are, wherever they go."""

LINEAR = UNCHANGED | {
    operator.getitem,
    aten.neg.default,
    aten.cat.default,
    aten.stack.default,
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.index.Tensor,
    aten.index_select.default,
}
"""Linear in one operand, where the others are fixed."""

PARAMETERIZED = (
    aten.embedding.default,
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.layer_norm.default,
    aten.rms_norm.default,
)
"""What the layers of a network begin with: ops with weights of their own."""

SOFTMAX = (aten.softmax.int, aten._softmax.default)
SHAPE_QUERIES = (aten.sym_size.int, aten.sym_numel.default, aten.sym_stride.int)
FILLS = (
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.empty_like.default,
)
"""What both give follows from sizes alone: numbers, and tensors of one number."""

PRODUCTS = ("linear", "mm", "addmm", "bmm", "baddbmm", "addbmm", "matmul", "mv", "addmv", "einsum", "tensordot")
"""Names of products with a matrix, whatever their overload."""
CONVOLUTIONS = ("conv",)
RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")
EXPERTS = ("grouped_mm",)
OTHER_PRODUCTS = ("bilinear",)
"""Parts of the names of products: what comes before and after differs, as in `conv2d` and `conv_transpose1d`."""


def passes_on(node: Node) -> bool:
    """Whether `node` gives numbers of its first argument as they are: all or some, anywhere, in any dtype."""
    return node.target in UNCHANGED or node.target in SELECTS or node.target is operator.getitem


def op_name(node: Node) -> str:
    """What `node` calls, without its overload: `aten.linear`."""
    name = str(node.target)
    if isinstance(node.target, torch._ops.OpOverload):
        return name.rpartition(".")[0]
    return str(getattr(node.target, "__name__", name))
