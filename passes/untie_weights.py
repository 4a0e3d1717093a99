"""Give linears that are to be quantized a weight of their own."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from teq_graph import graph as fx


class UntieWeights(PassBase):
    """linear(x, W), embedding(W, i)   becomes   linear(x, W_untied), embedding(W, i)

    for the weights called `names`, so that a tied vocabulary projection can be scaled and quantized while
    the embedding stays as it is. Both names hold one tensor until one of them is replaced; `renamed` maps
    the old name to the new.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.renamed: dict[str, str] = {}

    def call(self, graph_module: GraphModule) -> PassResult:
        modified = False
        for linear in list(fx.linears(graph_module)):
            weight, name = linear.all_input_nodes[1], fx.weight_name(linear)
            if name not in self.names or all(user in set(fx.linears(graph_module)) for user in weight.users):
                continue
            owner, _, leaf = name.rpartition(".")
            own_name = f"{owner}_untied.{leaf}" if owner else f"{leaf}_untied"
            copy = fx.add_tensor(graph_module, own_name, fx.get_tensor(graph_module, name))
            with graph_module.graph.inserting_before(weight):
                node = graph_module.graph.create_node("get_attr", copy)
            node.meta = dict(weight.meta)
            linear.replace_input_with(weight, node)
            self.renamed[name] = copy
            modified = True
        if modified:
            fx.drop_unused(graph_module)
        return PassResult(graph_module, modified)
