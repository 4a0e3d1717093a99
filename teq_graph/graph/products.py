"""Products with a constant matrix W[N, K]: linears, those of experts, and convolutions as sums over windows.

    linear(x, W, bias)
    expert_linear(x, W, bias, experts, E)
    conv2d(x, view(W, [N, C / groups, height, width]), bias, stride, padding, dilation, groups)

are their normal forms, and so for one and three dimensions. A convolution multiplies W with the numbers of each window
of its input, K = C / groups * height * width; of several groups, each N / groups rows read their own channels. Of E
experts, each N / E rows read the rows of x that are theirs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

import teq_graph.ops  # noqa: F401  registers the operators
from teq_graph.graph.nodes import arguments_of, aten, is_call, is_tensor_constant, operand_of
from teq_graph.graph.op_sets import TRANSPOSES

CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
PADDED_CONVOLUTIONS: Mapping[Any, Any] = {
    aten.conv1d.padding: aten.conv1d.default,
    aten.conv2d.padding: aten.conv2d.default,
    aten.conv3d.padding: aten.conv3d.default,
}
"""Those that take "same" or "valid" for their padding -> the same with numbers."""
EXPERT_LINEAR = torch.ops.teq_graph.expert_linear.default
ProductKind = Literal["linear", "experts", "convolution"]
PRODUCTS = (aten.linear.default, EXPERT_LINEAR, *CONVOLUTIONS)


def weight_node(product: Node) -> Node:
    """The node that gives the matrix of a product in normal form, whatever computes it."""
    weight = operand_of(product, 1)
    return operand_of(weight) if is_convolution(product) and is_call(weight, aten.reshape.default) else weight


def product_nodes(graph_module: GraphModule) -> Iterator[Node]:
    """The products in normal form, in graph order."""
    return filter(is_product, graph_module.graph.nodes)


def is_product(node: Node) -> bool:
    """Whether `node` is a product in normal form: its matrix is a tensor of the graph."""
    return (
        is_call(node, *PRODUCTS) and is_tensor_constant(weight := weight_node(node)) and weight.meta["val"].dim() == 2
    )


def is_convolution(node: Node) -> bool:
    """Whether `node` is a convolution over one, two or three dimensions."""
    return is_call(node, *CONVOLUTIONS)


def expert_counts(graph_module: GraphModule) -> dict[str, int]:
    """Of how many experts each weight holds the matrices, for those that do, by name."""
    linears = (node for node in product_nodes(graph_module) if is_call(node, EXPERT_LINEAR))
    return {weight_name_of(linear): arguments_of(linear)["num_experts"] for linear in linears}


def kind_of(product: Node) -> ProductKind:
    """What kind of product in normal form `product` is."""
    if is_convolution(product):
        return "convolution"
    return "experts" if is_call(product, EXPERT_LINEAR) else "linear"


def weight_name_of(product: Node) -> str:
    """Name of a product's matrix."""
    return str(weight_node(product).target)


def replace_weight(product: Node, weight: Node) -> None:
    """Let a product read its matrix from `weight`."""
    reader = operand_of(product, 1) if weight_node(product) is not product.args[1] else product
    reader.update_arg(0 if reader is not product else 1, weight)


def before_weight(product: Node) -> Node:
    """The node before which a product's matrix must be there."""
    return product if weight_node(product) is product.args[1] else operand_of(product, 1)


def is_weight_view(node: Node) -> bool:
    """Whether `node` gives a matrix to convolutions, in their shape, and to nothing else."""
    return (
        is_call(node, aten.reshape.default)
        and bool(node.users)
        and all(is_convolution(user) and user.args[1] is node and operand_of(user) is not node for user in node.users)
    )


def readers_of(tensor: Node) -> Iterator[Node]:
    """Who reads a tensor of the graph; a convolution rather than what gives its matrix another shape."""
    for user in tensor.users:
        if is_weight_view(user):
            yield from user.users
        else:
            yield user


def channel_dim(product: Node) -> int:
    """The dimension of a product's channels, in its input and in its output, counted from the last."""
    return -1 if not is_convolution(product) else 1 - operand_of(product, 1).meta["val"].dim()


def is_image(node: Node) -> bool:
    """Whether the last dimensions of a node's value are places, as a convolution gives them, and not channels."""
    while node.op == "call_function" and not is_convolution(node):
        sources = [source for source in node.all_input_nodes if source.op == "call_function"]
        alike = [source for source in sources if _rank(source) == _rank(node)]
        if not alike or node.target in TRANSPOSES or is_call(node, aten.linear.default):
            return False
        node = alike[0]
    return is_convolution(node)


def _rank(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.dim() if isinstance(value, Tensor) else None


def outputs_for(rows: Tensor, weight: Tensor) -> Tensor:
    """What a product gives without its bias, [T, N], for `rows` [groups, T, K] that a weight [N, K] reads."""
    by_group: Tensor = rows @ weight.unflatten(0, (len(rows), -1)).mT
    return by_group.transpose(0, 1).flatten(1)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a product's weight is multiplied with: the windows of the value of a node, or its rows (`kernel` None).

    Products whose readings are equal read the same. Of several `groups` of the weight's rows, each reads other
    channels, or the rows that `experts`, a node, says are its own.
    """

    source: Node
    experts: Node | None = None
    kernel: tuple[int, ...] | None = None
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1

    @classmethod
    def of(cls, product: Node) -> Reading:
        """The reading of a product in normal form."""
        source = operand_of(product)
        values = arguments_of(product)
        if is_call(product, EXPERT_LINEAR):
            return cls(source, values["experts"], groups=values["num_experts"])
        if not is_convolution(product):
            return cls(source)
        kernel = tuple(values["weight"].meta["val"].shape[2:])
        stride, padding, dilation = (_for_each(values[name], kernel) for name in ("stride", "padding", "dilation"))
        return cls(source, None, kernel, stride, padding, dilation, values["groups"])

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Those whose values `rows` takes."""
        return (self.source,) if self.experts is None else (self.source, self.experts)

    def rows(self, value: Tensor, experts: Tensor | None = None) -> Tensor:
        """All rows [groups, T, K] that the weight is multiplied with; zeros follow those of an expert with fewer."""
        if experts is not None:
            return by_expert(value, experts, self.groups)
        if self.kernel is None:
            return value.reshape(1, -1, value.shape[-1])
        spatial = len(self.kernel)
        if value.dim() == spatial + 1:
            value = value[None]
        windows = torch.nn.functional.pad(value, [amount for size in reversed(self.padding) for amount in (size, size)])
        for dim, (size, step, gap) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True), 2):
            windows = windows.unfold(dim, gap * (size - 1) + 1, step)[..., ::gap]
        # [b, channels, positions…, kernel…] to [groups, b, positions…, channels of a group, kernel…]
        windows = windows.unflatten(1, (self.groups, -1)).movedim(1, 0).movedim(2, 2 + spatial)
        rows: Tensor = windows.reshape(self.groups, -1, windows.shape[2 + spatial] * math.prod(self.kernel))
        return rows

    def parts(self, value: Tensor) -> Sequence[Tensor]:
        """`value` in parts for `rows`, one after the other: windows overlap, and take several times the memory."""
        if self.kernel is None or value.dim() == len(self.kernel) + 1:
            return [value]
        examples: Sequence[Tensor] = value.split(1)
        return examples

    def flat(self, result: Tensor, experts: Tensor | None = None) -> Tensor:
        """A product's result, or its gradient, in the order of `rows`: [T, N]."""
        if experts is not None:
            return by_expert(result, experts, self.groups).transpose(0, 1).flatten(1)
        dim = -1 if self.kernel is None else -1 - len(self.kernel)
        rows: Tensor = result.movedim(dim, -1).flatten(0, -2)
        return rows


def by_expert(rows: Tensor, experts: Tensor, count: int) -> Tensor:
    """Of rows [T, K] those of each of `count` experts, in order, with zeros up to the most of one: [count, t, K]."""
    chosen, order = experts.sort(stable=True)
    counts = torch.bincount(experts, minlength=count)
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[chosen]
    result = rows.new_zeros(count, int(counts.max()), rows.shape[-1])
    result[chosen, place] = rows[order]
    return result


def _for_each(size: int | list[int], kernel: tuple[int, ...]) -> tuple[int, ...]:
    sizes = (size,) if isinstance(size, int) else tuple(size)
    return sizes * len(kernel) if len(sizes) == 1 else sizes
