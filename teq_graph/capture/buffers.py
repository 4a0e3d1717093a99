"""What a model writes into its buffers: a value of the call alone, or a state, which a graph cannot keep."""

from __future__ import annotations

from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node

from teq_graph.errors import CaptureError
from teq_graph.graph.nodes import arguments_of, aten, is_call, is_tensor_constant
from teq_graph.graph.tensors import node_tensor


def keep_no_state(program: ExportedProgram, graph_module: GraphModule) -> None:
    """Take the writes to buffers out of `graph_module`, which is `program`'s.

    buffer ← f(x);  y = g(buffer)   becomes   y = g(f(x))

    where the buffer is overwritten as a whole before anything reads it, so that nothing of one call is left for the
    next. Raises CaptureError for other writes: a graph of values cannot write back to the model's buffers or to its
    caller's tensors.
    """
    signature = program.graph_signature
    inputs = list(signature.user_inputs_to_mutate.values())
    buffers = set(signature.buffers_to_mutate.values())
    for node in list(graph_module.graph.nodes):
        if node.op == "get_attr" and node.target in buffers:
            if not all(_overwrites(user, node) for user in node.users):
                inputs.append(str(node.target))
                continue
            for write in list(node.users):
                write.replace_all_uses_with(write.args[1])
                graph_module.graph.erase_node(write)
    if inputs:
        raise CaptureError(f"the model changes {inputs[0]} in place: accepted are models that keep no state")
    graph_module.recompile()


def _overwrites(write: Node, buffer: Node) -> bool:
    """Whether `write` puts a value of the buffer's own shape and type into it, and reads nothing of it."""
    if not is_call(write, aten.copy.default, aten.copy_.default) or write.args[0] is not buffer:
        return False
    value, held = write.args[1], node_tensor(buffer)
    if not isinstance(value, Node) or value is buffer:
        return False
    given = node_tensor(value) if is_tensor_constant(value) else value.meta.get("val")
    return isinstance(given, Tensor) and given.shape == held.shape and given.dtype == held.dtype


def table_switch(graph_module: GraphModule) -> int | None:
    """The length past which the model computes with other constants: the `n` of `where(length > n, table, other)`.

    None where it always computes with the same. The tables that a sequence's tokens were computed with then depend on
    the length at that time: past the switch the whole sequence is computed anew.
    """
    for node in graph_module.graph.nodes:
        if is_call(node, aten.where.self):
            condition, *tables = node.args
            if is_call(condition, aten.gt.Scalar) and all(map(_is_constant, tables)):
                limit = arguments_of(condition)["other"]
                if isinstance(limit, int) and condition.meta["val"].dim() == 0:
                    return limit
    return None


def _is_constant(value: object) -> bool:
    """Whether `value` is a tensor of the model, or a copy of one."""
    while isinstance(value, Node) and value.op == "call_function" and len(value.all_input_nodes) == 1:
        value = value.args[0]
    return is_tensor_constant(value)
