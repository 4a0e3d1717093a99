"""What holds for every graph between two passes."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule


def check_graph(graph_module: GraphModule) -> None:
    """Raises AssertionError, naming the node, where a pass left a graph that is not whole.

    - fx's own rules: arguments come before their readers, names are unique;
    - a `get_attr` node reads a tensor;
    - the value that a node is said to give (`meta["val"]`) is there, for those of tensors with the tensor's own shape
      and dtype;
    - the code is that of the graph: it was recompiled.
    """
    graph_module.graph.lint()
    for node in graph_module.graph.nodes:
        if node.op == "get_attr":
            tensor: object = graph_module
            for part in str(node.target).split("."):
                tensor = getattr(tensor, part, None)
            assert isinstance(tensor, Tensor), f"{node.name}: {node.target} is no tensor"
            value = node.meta.get("val")
            same = isinstance(value, Tensor) and value.shape == tensor.shape and value.dtype == tensor.dtype
            assert same, (
                f"{node.name}: its value is said to be {value if not isinstance(value, Tensor) else value.shape}"
            )
        elif node.op == "call_function":
            assert "val" in node.meta, f"{node.name} = {node.target}: nothing says what it gives"
    assert graph_module.code == graph_module.graph.python_code("self").src, "the code is not that of the graph"
