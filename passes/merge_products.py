"""Compute quantized products of one value in one."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import CallBuilder, arguments_of, aten, is_call, is_tensor_constant
from teq_graph.graph.tensors import add_tensor, drop_unused, get_attr_node, node_tensor
from teq_graph.passes.base import GraphPass, PassResult

QUANTIZED = torch.ops.teq_graph.matmul_nbits.default
PRODUCTS = (QUANTIZED, aten.linear.default)
ROWS = {"b", "scales", "zero_points", "weight", "bias"}
"""Arguments of a product with one entry, or line of entries, for each of its rows."""


class MergeProducts(GraphPass[None]):
    """matmul_nbits(x, W₁, …), matmul_nbits(x, W₂, …)

    becomes   split(matmul_nbits(x, [W₁; W₂], …))

    for products of one value that are alike but for their weights: gate and up of an MLP; query, key and value where
    no one op does the attention. `x` is rounded once, and fewer, larger products keep all threads busy. They have one
    size, as onnxruntime's `Split` takes it without a tensor of sizes, and each weight has no other reader.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        groups: dict[object, list[Node]] = {}
        for node in graph_module.graph.nodes:
            if not is_call(node, QUANTIZED) or any(len(source.users) > 1 for source in _tensors(node)):
                continue
            if (alike := kind(node)) is not None:
                groups.setdefault((alike, arguments_of(node)["N"]), []).append(node)
        merged = [group for group in groups.values() if len(group) > 1]
        for group in merged:
            _merge(graph_module, group)
        if merged:
            drop_unused(graph_module)
        return PassResult(graph_module, bool(merged))


def _tensors(node: Node) -> list[Node]:
    return [value for name, value in arguments_of(node).items() if name in ROWS and value is not None]


def _merge(graph_module: GraphModule, group: Sequence[Node]) -> None:
    build = CallBuilder(graph_module, group[0])
    sizes = [arguments_of(node)["N"] for node in group]
    split = build(aten.split_with_sizes.default, join_products(build, group, "merged"), sizes, -1)
    outputs = [build(operator.getitem, split, index) for index in range(len(group))]
    for node, output in zip(group, outputs, strict=True):
        output.meta = dict(node.meta)
        node.replace_all_uses_with(output)
        graph_module.graph.erase_node(node)


# ------------------------------------------------------------------------------------- what other passes use as well


def kind(node: Node) -> tuple[object, ...] | None:
    """The same for products of one value that are alike in everything but their rows; None where it is no product."""
    if not is_call(node, *PRODUCTS) or not all(map(is_tensor_constant, _tensors(node))):
        return None
    values = arguments_of(node).items()
    return node.target, *(value is None if name in ROWS else value for name, value in values if name != "N")


def join_products(
    build: CallBuilder, products: Sequence[Node], suffix: str, rows: Sequence[Tensor] | None = None
) -> Node:
    """One product with all rows of `products`, which are of one `kind`, or with those at the indices `rows` of each.

    Its weights are stored under the first one's names and `suffix`.
    """
    values = arguments_of(products[0])
    count = 0
    for name in ROWS.intersection(values):
        if values[name] is not None:
            sources = [arguments_of(product)[name] for product in products]
            tensors = [node_tensor(source) for source in sources]
            if rows is not None:
                tensors = [tensor[chosen.to(tensor.device)] for tensor, chosen in zip(tensors, rows, strict=True)]
            joined = torch.cat(tensors)
            stored = add_tensor(build.graph_module, f"{sources[0].target}_{suffix}", joined)
            values[name], count = get_attr_node(build.graph_module, stored), len(joined)
    if "N" in values:
        values["N"] = count
    return build(products[0].target, *values.values())
