"""Write every convolution with a constant weight as one over a matrix."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from teq_graph.graph.nodes import CallBuilder, arguments_of, aten, is_call
from teq_graph.graph.products import CONVOLUTIONS, PADDED_CONVOLUTIONS
from teq_graph.graph.tensors import drop_unused, node_tensor, replace_tensors
from teq_graph.passes.base import GraphPass, PassResult
from teq_graph.passes.fold_constants import Origin


class NormalizeConvolutions(GraphPass[None]):
    """1. conv2d(x, W[N, C, h, w], b, stride, "same")   →  conv2d(pad(x), W, b, stride, [p, q])
    2. conv2d(x, W[N, C, h, w], b, …)                   →  conv2d(x, view(M[N, C h w], [N, C, h, w]), b, …)

    and so for one and three dimensions. M is W in another shape, under its name; its elements are in the order of W.
    In case 1 zeros go around x only where both sides take different numbers of them. Case 2 needs a weight that nothing
    but convolutions reads.
    """

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        modified = False
        for node in list(graph_module.graph.nodes):
            if is_call(node, *PADDED_CONVOLUTIONS):
                _count_padding(graph_module, node)
                modified = True
        for node in list(graph_module.graph.nodes):
            if node.op == "get_attr" and node.users and all(_reads_weight(user, node) for user in node.users):
                _flatten(graph_module, node)
                modified = True
        if modified:
            drop_unused(graph_module)
        return PassResult(graph_module, modified)


def _count_padding(graph_module: GraphModule, node: Node) -> None:
    values = arguments_of(node)
    x, kernel = values["input"], values["weight"].meta["val"].shape[2:]
    sizes, around = [0] * len(kernel), [0] * (2 * len(kernel))
    if values["padding"] == "same":
        dilation = values["dilation"] if len(values["dilation"]) == len(kernel) else values["dilation"] * len(kernel)
        for dim, (size, gap) in enumerate(zip(kernel, dilation, strict=True)):
            total = gap * (size - 1)
            # torch puts the odd one at the end.
            sizes[dim], at_end = total // 2, 2 * (len(kernel) - 1 - dim) + 1
            around[at_end] = total % 2
    call = CallBuilder(graph_module, node)
    if any(around):
        # Both sides get the same afterwards, so that what is missing at the end goes there before.
        x = call(aten.constant_pad_nd.default, x, around)
    node.target = PADDED_CONVOLUTIONS[node.target]
    names = ("weight", "bias", "stride")
    node.args = (x, *(values[name] for name in names), sizes, values["dilation"], values["groups"])
    node.kwargs = {}


def _reads_weight(user: Node, weight: Node) -> bool:
    values = arguments_of(user) if is_call(user, *CONVOLUTIONS) else {}
    return values.get("weight") is weight and values["input"] is not weight and values["bias"] is not weight


def _flatten(graph_module: GraphModule, weight: Node) -> None:
    name, tensor = str(weight.target), node_tensor(weight)
    shape = list(tensor.shape)
    matrix = tensor.reshape(shape[0], -1)
    origin = Origin.of(graph_module, name)
    steps = None if origin.steps is None else (*origin.steps, (aten.reshape.default, (None, list(matrix.shape)), {}))
    graph_module.meta.setdefault("origins", {})[name] = Origin(origin.sources, steps)
    users = list(weight.users)
    replace_tensors(graph_module, {name: matrix})
    for user in users:
        view = CallBuilder(graph_module, user)(aten.reshape.default, weight, shape)
        user.args, user.kwargs = tuple({**arguments_of(user), "weight": view}.values()), {}
