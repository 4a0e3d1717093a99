"""Compute quantized products of one value in one."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from teq_graph import graph as fx
from teq_graph import ops as _ops  # noqa: F401  registers the op
from teq_graph.graph import aten

PRODUCT = torch.ops.teq_graph.matmul_nbits.default
WEIGHTS = ("b", "scales", "zero_points", "bias")
"""Arguments with one entry, or line of entries, for each output channel."""


class MergeProducts(PassBase):
    """matmul_nbits(x, W₁, …), matmul_nbits(x, W₂, …)

    becomes   split(matmul_nbits(x, [W₁; W₂], …))

    for products of one value that are alike but for their weights: gate and up of an MLP; query, key and value where
    no one op does the attention. `x` is rounded once, and fewer, larger products keep all threads busy. They have one
    size, as onnxruntime's `Split` takes it without a tensor of sizes, and each weight has no other reader.
    """

    def call(self, graph_module: GraphModule) -> PassResult:
        groups: dict[tuple[object, ...], list[Node]] = {}
        for node in graph_module.graph.nodes:
            if fx.is_call(node, PRODUCT) and all(len(source.users) == 1 for source in _weights(node)):
                groups.setdefault(_kind(node), []).append(node)
        merged = [group for group in groups.values() if len(group) > 1]
        for group in merged:
            _merge(graph_module, group)
        if merged:
            fx.drop_unused(graph_module)
        return PassResult(graph_module, bool(merged))


def _weights(node: Node) -> list[Node]:
    return [source for name in WEIGHTS if (source := fx.arguments(node)[name]) is not None]


def _kind(node: Node) -> tuple[object, ...]:
    """The same for products that can be one."""
    values = fx.arguments(node)
    tensors = (values["zero_points"] is None, values["bias"] is None)
    return (values["a"], *tensors, *(values[name] for name in ("K", "N", "bits", "block_size")))


def _merge(graph_module: GraphModule, group: Sequence[Node]) -> None:
    graph, values = graph_module.graph, fx.arguments(group[0])
    parts = [fx.arguments(node) for node in group]
    size = values["N"]
    for name in WEIGHTS:
        if values[name] is not None:
            rows = torch.cat([fx.node_tensor(part[name]) for part in parts])
            values[name] = fx.get_attr_node(
                graph_module, fx.add_tensor(graph_module, f"{values[name].target}_merged", rows)
            )
    values["N"] = size * len(group)
    with graph.inserting_before(group[0]):
        product = graph.call_function(PRODUCT, tuple(values.values()))
        split = graph.call_function(aten.split_with_sizes.default, (product, [size] * len(group), -1))
        outputs = [graph.call_function(operator.getitem, (split, index)) for index in range(len(group))]
    value = group[0].meta["val"]
    product.meta["val"] = torch.cat([value] * len(group), dim=-1)
    split.meta["val"] = [node.meta["val"] for node in group]
    for node, output in zip(group, outputs, strict=True):
        output.meta = dict(node.meta)
        node.replace_all_uses_with(output)
        graph.erase_node(node)
