"""Give linears that are to be quantized a weight of their own."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node

from teq_graph.graph.products import product_nodes, readers_of, replace_weight, weight_node
from teq_graph.graph.tensors import add_tensor, drop_unused, get_tensor
from teq_graph.passes.base import GraphPass, PassResult


class UntieWeights(GraphPass[dict[str, str]]):
    """linear(x, W), embedding(W, i)   becomes   linear(x, W_untied), embedding(W, i)

    for the weights called `names`, so that a tied vocabulary projection can be scaled and quantized while
    the embedding stays as it is. All linears of a weight share its copy. Both names hold one tensor until one of
    them is replaced. The result's value maps old names to new ones.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names

    def call(self, graph_module: GraphModule) -> PassResult[dict[str, str]]:
        readers: dict[Node, list[Node]] = {}
        for linear in product_nodes(graph_module):
            readers.setdefault(weight_node(linear), []).append(linear)
        renamed: dict[str, str] = {}
        for weight, linears in readers.items():
            name = str(weight.target)
            if name not in self.names or set(readers_of(weight)) <= set(linears):
                continue
            owner, _, leaf = name.rpartition(".")
            own_name = f"{owner}_untied.{leaf}" if owner else f"{leaf}_untied"
            copy = add_tensor(graph_module, own_name, get_tensor(graph_module, name))
            with graph_module.graph.inserting_before(weight):
                node = graph_module.graph.create_node("get_attr", copy)
            node.meta = dict(weight.meta)
            for linear in linears:
                replace_weight(linear, node)
            renamed[name] = copy
        if renamed:
            drop_unused(graph_module)
        return PassResult(graph_module, bool(renamed), renamed)
