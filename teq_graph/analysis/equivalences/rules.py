"""How labels pass through each op: one table, `RULES`.

ATen op -> function(node, Trace) -> label tensor(s), or None for «escapes». Ops that only move data are run on
the labels themselves; ops that commute with a positive scale per channel have a rule of their own; an op that
is not in the table lets its labels escape.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.analysis.equivalences.trace import Labels, Trace
from teq_graph.graph.nodes import arguments_of, aten, is_call, is_tensor_constant, operands_of
from teq_graph.graph.op_sets import CASTS, COPIES, EACH_CHANNEL, FILLS, HOMOGENEOUS, MOVES, SELECTS
from teq_graph.graph.products import CONVOLUTIONS, EXPERT_LINEAR, channel_dim, is_product, weight_node

# ---------------------------------------------------------------------------------------------- data movement


def _move(node: Node, trace: Trace) -> Labels | None:
    """Run the op itself on the labels; only its first argument may be labelled."""
    labels = trace.labels_of(node.args[0])
    if labels is None or any(trace.labels_of(n) is not None for n in node.all_input_nodes if n is not node.args[0]):
        return None
    args, kwargs = trace.values.of((node.args[1:], node.kwargs))
    assert callable(node.target)
    result = node.target(labels.contiguous(), *args, **kwargs)
    return list(result) if isinstance(result, tuple | list) else result


def _keep(node: Node, trace: Trace) -> Labels | None:
    """Copies, casts between floating-point types and functions with f(s x) = s f(x): labels stay as they are."""
    return trace.labels_of(node.args[0]) if trace.values.env[node].is_floating_point() else None


def _index(node: Node, trace: Trace) -> Labels | None:
    """Run on the labels; indices that depend on the inputs may pick only along dimensions that share one scale."""
    values = arguments_of(node)
    labels = trace.labels_of(values["self"])
    if labels is None:
        return None
    dims: list[int] = []
    if "indices" in values:
        dim = 0
        for index in values["indices"]:
            # A mask covers as many dimensions as it has.
            is_mask = isinstance(index, Node) and trace.values.env[index].dtype in (torch.bool, torch.uint8)
            span = trace.values.env[index].dim() if is_mask else 1
            if index is not None and not _is_fixed(index):
                dims += range(dim, dim + span)
            dim += span
    elif not _is_fixed(values["index"]):
        dims.append(values["dim"])
    return None if _collapse(labels, dims) is None else _move(node, trace)


def _is_fixed(node: Node) -> bool:
    """Whether the node's value is the same for all inputs."""
    if node.op == "call_function":
        return all(map(_is_fixed, node.all_input_nodes))
    return node.op == "get_attr"


def _get_item(node: Node, trace: Trace) -> Labels | None:
    """One result of an op that has several."""
    source, index = operands_of(node)
    item = trace.labels[source][index]
    return item if item is not None else torch.full(trace.values.env[node].shape, -1)


def _fill(node: Node, trace: Trace) -> Labels | None:
    """A tensor that takes sizes and dtype alone of another carries no label."""
    return torch.full(trace.values.env[node].shape, -1)


def _pad(node: Node, trace: Trace) -> Labels | None:
    """Padding with zeros, which carry no label."""
    values = arguments_of(node)
    labels = trace.labels_of(values["self"])
    if labels is None or values["value"] not in (0, None) or values.get("mode", "constant") != "constant":
        return None
    return torch.constant_pad_nd(labels, trace.values.of(values["pad"]), -1)


def _concatenate(node: Node, trace: Trace) -> Labels | None:
    """Parts keep their labels; a cached tensor that this very op prolongs takes those of what is appended."""
    parts, dim = arguments_of(node)["tensors"], arguments_of(node)["dim"]
    grown = grown_cache(node, trace)
    result = []
    for part in parts:
        labels = trace.labels_of(part)
        if labels is None:
            shape = trace.values.env[part].shape
            labels = grown.expand(shape) if grown is not None and part in trace.cache_pairs else torch.full(shape, -1)
        result.append(labels)
    assert callable(node.target)
    return node.target(result, dim)


def grown_cache(node: Node, trace: Trace) -> Tensor | None:
    """The labels that cached positions carry, where `node` is cat([cached, new], dim) and goes back to the cache.

    Induction over steps: an empty cache carries nothing, and every later position was written by this very
    op, hence with the same scale, provided that the labels do not depend on the position.
    """
    if not is_call(node, aten.cat.default) or not isinstance(node.args[0], Sequence) or len(node.args[0]) != 2:
        return None
    cached, new = operands_of(node)[0]
    labels = trace.labels_of(new)
    if labels is None or trace.cache_pairs.get(cached) is not node:
        return None
    if any(user is not node and user.target is not aten.sym_size.int for user in cached.users):
        return None
    dim = node.args[1] if len(node.args) > 1 else 0
    return _collapse(labels, dim)


def _collapse(labels: Tensor, dim: Any) -> Tensor | None:
    """`labels` with size 1 along `dim` (or several), where they do not vary along it; otherwise None."""
    for d in [dim] if isinstance(dim, int) else dim:
        first = labels.narrow(d, 0, 1)
        if not bool((labels == first).all()):
            return None
        labels = first
    return labels


# ------------------------------------------------------------------------------- commuting with a positive scale


def _multiply(node: Node, trace: Trace) -> Labels | None:
    """A labelled factor times an unlabelled one."""
    a, b = (trace.labels_of(arg) for arg in operands_of(node)[:2])
    if a is not None and b is not None:
        return None
    labels = a if a is not None else b
    assert labels is not None
    return labels.expand(trace.values.env[node].shape)


def _divide(node: Node, trace: Trace) -> Labels | None:
    """A labelled numerator over an unlabelled divisor."""
    numerator = trace.labels_of(node.args[0])
    if numerator is None or trace.labels_of(node.args[1]) is not None:
        return None
    return numerator.expand(trace.values.env[node].shape)


def _add(node: Node, trace: Trace) -> Labels | None:
    """Two values with the same labels; or a labelled one and a constant, which is then divided along."""
    shape = trace.values.env[node].shape
    a, b = operands_of(node)[:2]
    labels_a, labels_b = trace.labels_of(a), trace.labels_of(b)
    if labels_a is not None and labels_b is not None:
        labels_a, labels_b = labels_a.expand(shape), labels_b.expand(shape)
        return labels_a if torch.equal(labels_a, labels_b) else None
    labels, other = (labels_a, b) if labels_a is not None else (labels_b, a)
    assert labels is not None
    if other == 0:
        return labels
    if not is_tensor_constant(other) or not trace.values.env[other].is_floating_point():
        return None
    shared = _reduce_to(labels.expand(shape), trace.values.env[other].shape)
    if shared is None or other in trace.constants:
        return None
    trace.constants[other] = shared
    return labels.expand(shape)


def _subtract(node: Node, trace: Trace) -> Labels | None:
    """As adding, but for a constant that is subtracted from."""
    return None if is_tensor_constant(node.args[0]) else _add(node, trace)


def _reduce_to(labels: Tensor, shape: torch.Size) -> Tensor | None:
    """The labels of a tensor of `shape` that broadcasts to `labels`, where they agree over the broadcast."""
    lead = labels.dim() - len(shape)
    dims = [*range(lead), *(lead + d for d, size in enumerate(shape) if size == 1)]
    collapsed = _collapse(labels, dims)
    return None if collapsed is None else collapsed.reshape(shape)


def _masked_fill(node: Node, trace: Trace) -> Labels | None:
    """A labelled value filled with zeros, where an unlabelled mask says."""
    labels = trace.labels_of(node.args[0])
    if labels is None or node.args[2] != 0 or trace.labels_of(node.args[1]) is not None:
        return None
    return labels.expand(trace.values.env[node].shape)


def _where(node: Node, trace: Trace) -> Labels | None:
    """Two branches with the same labels, or one and zeros, chosen by an unlabelled condition."""
    condition, *branches = operands_of(node)
    if trace.labels_of(condition) is not None:
        return None
    shape = trace.values.env[node].shape
    found = []
    for branch in branches:
        labels = trace.labels_of(branch)
        value = trace.values.env[branch] if isinstance(branch, Node) else branch
        if labels is not None:
            found.append(labels.expand(shape))
        elif not (is_tensor_constant(branch) or not isinstance(branch, Node)) or torch.as_tensor(value).any():
            return None
    return found[0] if all(torch.equal(found[0], other) for other in found) else None


def _reduce(node: Node, trace: Trace) -> Labels | None:
    """Sums and means over dimensions along which the scale does not vary."""
    values = arguments_of(node)
    labels = trace.labels_of(values["self"])
    if labels is None or not values["dim"] or not trace.values.env[node].is_floating_point():
        return None
    kept = _collapse(labels, values["dim"])
    return None if kept is None else kept.expand(kept.shape).reshape(trace.values.env[node].shape)


# ------------------------------------------------------------------------------------------------- contractions


def _attention(node: Node, trace: Trace) -> Labels | None:
    """Attention is linear in its values: each output is a mean over positions, per head and channel.

    What reaches the softmax escapes; a fused projection still moves the channels of its value rows.
    """
    values = arguments_of(node)
    for name in ("query", "key", "attn_mask"):
        trace.escape(trace.labels_of(values[name]), node, f"it is the {name} of a softmax")
    labels = trace.labels_of(values["value"])
    if labels is None:
        return None
    per_head = _collapse(labels, -2)
    if per_head is None:
        return None
    shape = trace.values.env[node].shape
    if values.get("enable_gqa"):
        per_head = per_head.repeat_interleave(shape[-3] // per_head.shape[-3], -3)
    return per_head.expand(shape)


def _matmul(node: Node, trace: Trace) -> Labels | None:
    """One labelled side whose labels do not vary along the contracted dimension."""
    a, b = (trace.labels_of(arg) for arg in operands_of(node)[:2])
    shape = trace.values.env[node].shape
    if (a is None) == (b is None) or any(trace.values.env[arg].dim() < 2 for arg in operands_of(node)[:2]):
        return None
    if a is not None:
        rows = _collapse(a, -1)
        return None if rows is None else rows.expand(shape)
    assert b is not None
    columns = _collapse(b, -2)
    return None if columns is None else columns.expand(shape)


def _consume(node: Node, trace: Trace) -> Labels | None:
    """A linear takes its columns' labels and ends the trace."""
    values = arguments_of(node)
    labels = trace.labels_of(values["input"])
    if labels is None or not is_tensor_constant(values["weight"]) or trace.labels_of(values["bias"]) is not None:
        return None
    columns = _collapse(labels, range(labels.dim() - 1))
    if columns is not None:
        trace.columns[node] = columns.reshape(1, -1)
    return None


def _consume_of_expert(node: Node, trace: Trace) -> Labels | None:
    """Each expert takes its columns' labels, and the trace ends.

    They are the same for all experts; or, of channels that an expert gave, those of the same expert: each row must come
    from the row of the same number, and both ops choose by one node.
    """
    values = arguments_of(node)
    labels = trace.labels_of(values["input"])
    if labels is None or not is_product(node):
        return None
    if trace.rows is not None:
        if values["experts"] is not trace.rows:
            return None
        own = torch.arange(len(labels))[:, None]
        if not bool(((labels < 0) | (labels // trace.channels == own)).all()):
            return None
        labels = labels.where(labels < 0, labels % trace.channels)
    columns = _collapse(labels, 0)
    if columns is not None:
        trace.columns[node] = columns
    return None


def _convolve(node: Node, trace: Trace) -> Labels | None:
    """A convolution takes the labels of its channels, in all of which a window has one, and ends the trace."""
    values = arguments_of(node)
    labels = trace.labels_of(values["input"])
    if labels is None or not is_product(node) or trace.labels_of(values["bias"]) is not None:
        return None
    channels = _channels(labels, channel_dim(node))
    if channels is not None:
        n, k = weight_node(node).meta["val"].shape
        groups = values["groups"]
        # The channels of each group, each for its elements of a window; then for each row of the group.
        columns = channels.reshape(groups, -1).repeat_interleave(k * groups // len(channels), 1)
        trace.columns[node] = columns if groups == 1 else columns.repeat_interleave(n // groups, 0)
    return None


def _each_channel(node: Node, trace: Trace) -> Labels | None:
    """Maxima, means and interpolations within a channel of an image, of whatever size."""
    labels = trace.labels_of(node.args[0])
    shape = trace.values.env[node].shape
    spatial = EACH_CHANNEL[node.target]
    channels = None if labels is None else _channels(labels, -1 - spatial)
    return None if channels is None else channels.reshape(-1, *[1] * spatial).expand(shape)


def _channels(labels: Tensor, dim: int) -> Tensor | None:
    """The label of each channel, in the dimension `dim` < 0, where it is the same for all examples and places."""
    others = [d for d in range(labels.dim()) if d != labels.dim() + dim]
    channels = _collapse(labels, others)
    return None if channels is None else channels.reshape(-1)


Rule = Callable[[Node, Trace], Labels | None]


RULES: dict[Any, Rule] = {
    **dict.fromkeys(MOVES, _move),
    **dict.fromkeys(SELECTS, _index),
    **dict.fromkeys((*COPIES, *CASTS, *HOMOGENEOUS), _keep),
    operator.getitem: _get_item,
    **dict.fromkeys(FILLS, _fill),
    aten.cat.default: _concatenate,
    aten.stack.default: _concatenate,
    aten.constant_pad_nd.default: _pad,
    aten.pad.default: _pad,
    aten.mul.Tensor: _multiply,
    aten.mul.Scalar: _multiply,
    aten.div.Tensor: _divide,
    aten.div.Scalar: _divide,
    aten.add.Tensor: _add,
    aten.sub.Tensor: _subtract,
    aten.masked_fill.Scalar: _masked_fill,
    aten.where.self: _where,
    aten.where.ScalarOther: _where,
    aten.sum.dim_IntList: _reduce,
    aten.mean.dim: _reduce,
    aten.scaled_dot_product_attention.default: _attention,
    aten.matmul.default: _matmul,
    aten.bmm.default: _matmul,
    aten.linear.default: _consume,
    EXPERT_LINEAR: _consume_of_expert,
    **dict.fromkeys(CONVOLUTIONS, _convolve),
    **dict.fromkeys(EACH_CHANNEL, _each_channel),
}
