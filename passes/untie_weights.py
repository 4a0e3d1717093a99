"""Give linears that are to be quantized a weight of their own."""

from __future__ import annotations

from collections.abc import Collection

from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassBase, PassResult

from teq_graph import graph as fx


class UntieWeights(PassBase):
    """linear(x, W), embedding(W, i)   becomes   linear(x, W_untied), embedding(W, i)

    for the weights called `names`, so that a tied vocabulary projection can be scaled and quantized while
    the embedding stays as it is. All linears of a weight share its copy. Both names hold one tensor until one of
    them is replaced; `renamed` maps the old name to the new.
    """

    def __init__(self, names: Collection[str]) -> None:
        self.names = names
        self.renamed: dict[str, str] = {}

    def call(self, graph_module: GraphModule) -> PassResult:
        readers: dict[Node, list[Node]] = {}
        for linear in fx.linears(graph_module):
            readers.setdefault(fx.operand(linear, 1), []).append(linear)
        modified = False
        for weight, linears in readers.items():
            name = str(weight.target)
            if name not in self.names or set(weight.users) <= set(linears):
                continue
            owner, _, leaf = name.rpartition(".")
            own_name = f"{owner}_untied.{leaf}" if owner else f"{leaf}_untied"
            copy = fx.add_tensor(graph_module, own_name, fx.get_tensor(graph_module, name))
            with graph_module.graph.inserting_before(weight):
                node = graph_module.graph.create_node("get_attr", copy)
            node.meta = dict(weight.meta)
            for linear in linears:
                linear.update_arg(1, node)
            self.renamed[name] = copy
            modified = True
        if modified:
            fx.drop_unused(graph_module)
        return PassResult(graph_module, modified)
