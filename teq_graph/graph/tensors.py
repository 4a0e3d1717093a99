"""Tensors of a graph module: behind `get_attr` nodes, by their dotted names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node


def get_tensor(graph_module: GraphModule, name: str) -> Tensor:
    """The tensor called `name` (dotted path) in `graph_module`."""
    owner_name, _, leaf = name.rpartition(".")
    tensor = getattr(graph_module.get_submodule(owner_name), leaf)
    assert isinstance(tensor, Tensor), name
    return tensor


def node_tensor(node: Node) -> Tensor:
    """The tensor that the `get_attr` node reads."""
    graph_module = node.graph.owning_module
    assert graph_module is not None and isinstance(node.target, str)
    return get_tensor(graph_module, node.target)


def has_tensor(graph_module: GraphModule, name: str) -> bool:
    """Whether `name` is taken."""
    owner: Any = graph_module
    for part in name.split("."):
        owner = getattr(owner, part, None)
        if owner is None:
            return False
    return True


def set_tensor(graph_module: GraphModule, name: str, tensor: Tensor) -> None:
    """Store `tensor` under `name` (dotted path), in place of what was there; modules on the way are made."""
    owner_name, _, leaf = name.rpartition(".")
    owner: nn.Module = graph_module
    for part in filter(None, owner_name.split(".")):
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        child = owner._modules[part]
        assert child is not None
        owner = child
    if leaf in owner._parameters:
        del owner._parameters[leaf]
    elif leaf in owner._buffers:
        del owner._buffers[leaf]
    elif leaf in owner.__dict__:
        del owner.__dict__[leaf]
    if isinstance(tensor, nn.Parameter):
        owner.register_parameter(leaf, tensor)
    else:
        owner.register_buffer(leaf, tensor)


def replace_tensors(graph_module: GraphModule, tensors: Mapping[str, Tensor]) -> None:
    """Let the nodes that read a name of `tensors` read that tensor; the graph stays as it is."""
    for name, tensor in tensors.items():
        set_tensor(graph_module, name, tensor)
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target in tensors:
            node.meta["val"] = tensors[node.target]


def add_tensor(graph_module: GraphModule, name: str, tensor: Tensor) -> str:
    """Store `tensor` under `name`, or `name_1`, `name_2`… where that is taken; returns the name used."""
    candidate, count = name, 0
    while has_tensor(graph_module, candidate):
        count += 1
        candidate = f"{name}_{count}"
    set_tensor(graph_module, candidate, tensor)
    return candidate


def tensor_bytes(graph_module: GraphModule, without: Collection[str] = ()) -> int:
    """Bytes of all tensors that the graph reads, but for those named in `without`; shared ones counted once."""
    seen: dict[int, int] = {}
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target not in without:
            tensor = node_tensor(node)
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = max(seen.get(storage.data_ptr(), 0), tensor.numel() * tensor.element_size())
    return sum(seen.values())


def get_attr_node(graph_module: GraphModule, name: str) -> Node:
    """The node that reads `name`: the existing one, or a new one before everything that computes."""
    anchor = None
    for node in graph_module.graph.nodes:
        if node.op == "get_attr" and node.target == name:
            return node  # type: ignore[no-any-return]
        if anchor is None and node.op not in ("placeholder", "get_attr"):
            anchor = node
    with graph_module.graph.inserting_before(anchor):
        node = graph_module.graph.create_node("get_attr", name)
    node.meta["val"] = get_tensor(graph_module, name)
    return node


def clone_graph(graph_module: GraphModule) -> GraphModule:
    """A second graph over the same tensors, with the same node names."""
    graph = torch.fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, val_map={}))
    graph.set_codegen(graph_module.graph._codegen)
    # A GraphModule takes the tensors that its graph names from another module by reference.
    twin = GraphModule(graph_module, graph)
    twin.meta.update(graph_module.meta)
    return twin


def drop_unused(graph_module: GraphModule) -> None:
    """Remove nodes without effect, and tensors and modules that no node reads; recompile."""
    graph = graph_module.graph
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "get_attr") and not node.users:
            graph.erase_node(node)
    used = {node.target for node in graph.nodes if node.op == "get_attr"}
    for module_name, module in list(graph_module.named_modules()):
        prefix = f"{module_name}." if module_name else ""
        for store in (module._parameters, module._buffers):
            for leaf in [leaf for leaf in store if prefix + leaf not in used]:
                del store[leaf]
        for leaf in [key for key, value in module.__dict__.items() if isinstance(value, Tensor)]:
            if prefix + leaf not in used:
                del module.__dict__[leaf]
    _drop_empty_modules(graph_module)
    graph.lint()
    graph_module.recompile()


def _drop_empty_modules(module: nn.Module) -> None:
    for name, child in list(module._modules.items()):
        assert child is not None
        _drop_empty_modules(child)
        if not (child._modules or child._parameters or child._buffers or _plain_tensors(child)):
            del module._modules[name]


def _plain_tensors(module: nn.Module) -> bool:
    return any(isinstance(value, Tensor) for value in module.__dict__.values())
