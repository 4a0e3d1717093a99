"""fx graphs as data, and back."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.fx.graph import _PyTreeCodeGen, _PyTreeInfo

from teq_graph.errors import ExportError, ModelFileError, one_line
from teq_graph.graph.tensors import node_tensor, set_tensor
from teq_graph.saving import arguments, names, schema, targets, trees
from teq_graph.saving.tensors import TensorFile, TensorStore
from teq_graph.saving.values import declared_sizes


def tree_info(graph_module: GraphModule) -> Any:
    """The names of the arguments of `forward`, and the structures of what it takes and gives."""
    return graph_module.graph._codegen.pytree_info  # type: ignore[attr-defined]


def describe_nodes(graph_module: GraphModule, store: TensorStore) -> list[Any]:
    """The nodes in order, their tensors in `store`. Raises ExportError for what a saved graph cannot hold."""
    described: list[Any] = []
    varying: dict[str, str] = {}
    for node in graph_module.graph.nodes:
        if node.op == "placeholder":
            described.append(
                schema.PlaceholderNode(name=node.name, target=node.target, sizes=declared_sizes(node, varying))
            )
        elif node.op == "get_attr":
            try:
                target = names.check_attribute(node.target)
            except ValueError:
                raise ExportError(f"{node.target!r} is no name of a tensor that can be saved") from None
            key, order = store.add_in_order(f"graph.{target}", node_tensor(node))
            described.append(schema.TensorNode(name=node.name, target=target, tensor=key, order=order))
        elif node.op == "call_function":
            args, kwargs = [arguments.encode(arg) for arg in node.args], arguments.encode(node.kwargs)["dict"]
            name = targets.name_of(node.target)
            _check(node.target, node.args, ExportError)
            described.append(schema.CallNode(name=node.name, target=name, args=args, kwargs=kwargs))
        elif node.op == "output":
            described.append(schema.OutputNode(name=node.name, value=arguments.encode(node.args[0])))
        else:
            raise ExportError(f"{node.name} is a {node.op} node, which cannot be saved")
    return described


def build_graph(described: schema.Graph, tensors: TensorFile, modules: Collection[str]) -> GraphModule:
    """The graph that `described` tells of, with classes and operators of `modules`; what its nodes give is not yet
    known. Raises ModelFileError where it is no whole graph."""
    graph, root = Graph(), nn.Module()
    nodes: dict[str, Node] = {}

    def found(kind: str, name: str) -> Node:
        if kind != "node" or name not in nodes:
            raise ModelFileError(f"the graph reads {kind} {name[:100]!r} before it is there")
        return nodes[name]

    for entry in described.nodes:
        args: Sequence[Any] = ()
        kwargs: Mapping[str, Any] = {}
        target: Any = entry.op
        if isinstance(entry, schema.PlaceholderNode):
            target = entry.target
        elif isinstance(entry, schema.TensorNode):
            target = entry.target
            _store(root, target, tensors.in_order(entry.tensor, entry.order))
        elif isinstance(entry, schema.CallNode):
            target = targets.target_of(entry.target, modules)
            args = [arguments.decode(arg, found) for arg in entry.args]
            kwargs = {name: arguments.decode(value, found) for name, value in entry.kwargs.items()}
            _check(target, args, ModelFileError)
        else:
            args = (arguments.decode(entry.value, found),)
        node = graph.create_node(entry.op, target, tuple(args), dict(kwargs), name=entry.name)
        if node.name != entry.name:
            raise ModelFileError(f"{entry.name[:100]!r} cannot be the name of a node, or is that of another")
        nodes[entry.name] = node
    _set_structures(graph, described, modules)
    graph.lint()
    return GraphModule(root.eval(), graph)


def _store(root: nn.Module, name: str, tensor: Tensor) -> None:
    try:
        # Twice under one name is one tensor; torch refuses the names of what a module has already.
        set_tensor(root, name, tensor)  # type: ignore[arg-type]
    except (KeyError, TypeError) as error:
        raise ModelFileError(f"{name[:100]!r} cannot be the name of a tensor: {one_line(error)}") from error


def _set_structures(graph: Graph, described: schema.Graph, modules: Collection[str]) -> None:
    inputs, outputs = (trees.build(tree, modules) for tree in (described.inputs, described.outputs))
    *body, last = graph.nodes
    placeholders = [node for node in body if node.op == "placeholder"]
    children = inputs.children()
    if inputs.type is not tuple or [child.type for child in children] != [tuple, dict]:
        raise ModelFileError("the structure of the inputs is not that of arguments")
    positional, named = children
    # fx writes both into the source.
    for name in (*described.arguments, *named.context):
        names.check_identifier(str(name))
    count = positional.num_children + named.num_children
    if len(described.arguments) != count or len(set(described.arguments)) != count:
        raise ModelFileError(f"{count} arguments are named {str(described.arguments)[:100]}")
    if last.op != "output" or any(node.op == "output" for node in body) or not isinstance(last.args[0], list | tuple):
        raise ModelFileError("the graph has no one output at its end")
    if inputs.num_leaves != len(placeholders) or outputs.num_leaves != len(last.args[0]):
        raise ModelFileError("the graph has other inputs or results than their structures")
    graph.set_codegen(_PyTreeCodeGen(_PyTreeInfo(list(described.arguments), inputs, outputs)))


def _check(target: Any, args: Sequence[Any], error: type[ExportError | ModelFileError]) -> None:
    try:
        targets.check_call(target, args)
    except ValueError as reason:
        raise error(f"the graph has a call that is not accepted: {reason}") from None
