"""Give a graph another floating-point type."""

from __future__ import annotations

import math
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.errors import NumericsError
from teq_graph.graph.nodes import aten, is_call
from teq_graph.graph.op_sets import NAMED_CASTS
from teq_graph.graph.tensors import add_tensor, drop_unused, get_attr_node, has_tensor, node_tensor, set_tensor
from teq_graph.passes.base import GraphPass, PassResult

EMBEDDINGS = (aten.embedding.default, torch.ops.teq_graph.embedding_nbits.default)

# Operators whose kernels accumulate in float32 whatever the type of their operands.
PRODUCTS = (
    aten.linear.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.matmul.default,
    aten.baddbmm.default,
    aten.convolution.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.scaled_dot_product_attention.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.rms_norm.default,
    *EMBEDDINGS,
    torch.ops.teq_graph.matmul_nbits.default,
    torch.ops.teq_graph.expert_linear.default,
    torch.ops.teq_graph.expert_matmul_nbits.default,
    torch.ops.teq_graph.expert_mixture_nbits.default,
)

# Results that leave the range of float16 for ordinary operands: sums of squares, and what is made of them.
WIDE = (
    aten.pow.Tensor_Scalar,
    aten.square.default,
    aten.exp.default,
    aten.cumsum.default,
    aten.var.correction,
    aten.var_mean.correction,
    aten.linalg_vector_norm.default,
)


class ChangeDtype(GraphPass[None]):
    """x → linear(x, w: float32) → y      becomes      x → linear(x, w: float16) → y      for float16, say

    Parameters, activations, floating-point inputs and outputs (hence the KV cache) of the graph's type take the
    type `dtype`. Kept in float32, and cast where they meet an activation:
      - position values: what derives from integers, shapes and constants alone (rotary angles, masks, ALiBi);
      - wide values: squares, sums and exponentials where they are spelled out, and results of nothing but them
        (`pow → mean → add eps → rsqrt` of a norm);
      - what the model itself asks to be float32 (`softmax(dtype=float32)`).
    Finite bounds beyond the new type's range (`finfo(float32).min` in a mask) become half of its largest value:
    the same to softmax, and still finite after a score is added.

    What a graph of another type computes in bfloat16 (the ALiBi of some) is computed in float32, unless bfloat16 is
    asked for: onnxruntime has no bfloat16 on the CPU, and float32 holds every bfloat16 value.

    Run `RemoveNoOps` first: a cast to the type that a value already has is taken to mean the new type. Raises
    NumericsError for a weight that the new type cannot hold.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def call(self, graph_module: GraphModule) -> PassResult[None]:
        old = _graph_dtype(graph_module)
        if old is None:
            return PassResult(graph_module, False)
        widened = torch.bfloat16 not in (old, self.dtype) and _widen(graph_module)
        if old != self.dtype:
            _Conversion(graph_module, old, self.dtype).run()
        return PassResult(graph_module, widened or old != self.dtype)


class _Conversion:
    """One run over one graph. Every floating-point node has the type it `was` of, and the type it is of `now`."""

    def __init__(self, graph_module: GraphModule, old: torch.dtype, new: torch.dtype) -> None:
        self.graph_module = graph_module
        self.graph = graph_module.graph
        self.old, self.new = old, new
        narrower = torch.finfo(new).max < torch.finfo(old).max
        self.limit = torch.finfo(new).max / 2 if narrower else torch.inf
        self.was = {node: dtype for node in self.graph.nodes if (dtype := _float_dtype(node)) is not None}
        self.now: dict[Node, torch.dtype] = {}
        self.activations: set[Node] = set()
        self.beyond: set[Node] = set()  # values that may exceed `limit`
        self.casts: dict[tuple[Node, torch.dtype], Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node in self.was:
                self.activations.add(node)
                self._set(node, self.new if self.was[node] == self.old else self.was[node])
            elif node.op == "get_attr" and node in self.was:
                self._constant(node)
            elif node.op == "call_function":
                if is_call(node, *EMBEDDINGS) or self.activations.intersection(node.all_input_nodes):
                    self.activations.add(node)
                    self._activation(node)
                else:
                    self._position(node)
            elif node.op == "output":
                node.args = (torch.fx.map_arg(node.args[0], self._output),)
        drop_unused(self.graph_module)
        self._restore_names()

    def _constant(self, node: Node) -> None:
        """A constant keeps its type until something reads it in another."""
        self.now[node] = self.was[node]
        tensor = node_tensor(node)
        if tensor.numel() and bool(tensor.detach().abs().max() > self.limit):
            self.beyond.add(node)

    def _position(self, node: Node) -> None:
        """Position values stay float32; those of another old type follow it."""
        if self.old != torch.float32:
            _rename_dtype(node, self.old, self.new)
            for source in node.all_input_nodes:
                if self.was.get(source) == self.old:
                    node.replace_input_with(source, self._cast(source, self.new))
        if node in self.was:
            was = self.was[node]
            self._set(node, self.new if was == self.old != torch.float32 else was)
            self._note_beyond(node)

    def _activation(self, node: Node) -> None:
        if node.target in NAMED_CASTS:
            _rename_dtype(node, self.old, self.new)
            if node in self.was:
                self._set(node, self.new if self.was[node] == self.old else self.was[node])
                self._note_beyond(node)
            return
        operands = self._operand_dtype(node)
        if node.target in PRODUCTS:
            self._check_weights(node)
        for source in node.all_input_nodes:
            node.replace_input_with(source, self._cast(source, operands))
        if operands == self.new:
            node.args, node.kwargs = self._bounded(node.args), self._bounded(node.kwargs)
        if self.old != torch.float32:
            _rename_dtype(node, self.old, self.new)
        if node in self.was:
            self._set(node, _named_dtype(node) or operands)
            self._note_beyond(node)

    def _check_weights(self, node: Node) -> None:
        # A bound is not meant to the digit, a weight is.
        largest = torch.finfo(self.new).max
        for source in self.beyond.intersection(node.all_input_nodes):
            if source.op == "get_attr" and (magnitude := float(node_tensor(source).detach().abs().max())) > largest:
                raise NumericsError(
                    f"{source.target} has a value of magnitude {magnitude:.3g}: accepted for {self.new} are "
                    f"magnitudes up to {largest:.5g}"
                )

    def _operand_dtype(self, node: Node) -> torch.dtype:
        if node.target in PRODUCTS:
            return self.new
        if node.target in WIDE or (is_call(node, aten.mul.Tensor) and node.args[0] is node.args[1]):
            return torch.float32
        kinds = {self.now[source] for source in self.activations.intersection(node.all_input_nodes, self.now)}
        return torch.float32 if kinds == {torch.float32} else self.new

    def _cast(self, source: Node, dtype: torch.dtype) -> Node:
        """`source` in `dtype`: a constant is stored in it, another value is cast, once for all readers."""
        if self.now.get(source, dtype) == dtype or not isinstance(source.meta["val"], Tensor):
            return source
        if (source, dtype) not in self.casts:
            make = self._stored if source.op == "get_attr" else self._inserted
            self.casts[source, dtype] = make(source, dtype)
        return self.casts[source, dtype]

    def _stored(self, source: Node, dtype: torch.dtype) -> Node:
        tensor = node_tensor(source).detach()
        if source in self.beyond and bool(tensor.abs().max() > torch.finfo(dtype).max):
            tensor = tensor.clamp(-self.limit, self.limit)
        name = add_tensor(self.graph_module, str(source.target), tensor.to(dtype))
        node = get_attr_node(self.graph_module, name)
        self.now[node] = dtype
        return node

    def _inserted(self, source: Node, dtype: torch.dtype) -> Node:
        value = source
        if source in self.beyond and dtype == self.new:
            with self.graph.inserting_after(source):
                value = self.graph.call_function(aten.clamp.default, (source, -self.limit, self.limit))
            value.meta["val"] = source.meta["val"]
        with self.graph.inserting_after(value):
            cast = self.graph.call_function(aten.to.dtype, (value, dtype))
        cast.meta["val"] = source.meta["val"]
        self._set(cast, dtype)
        if source in self.activations:
            self.activations.add(cast)
        return cast

    def _output(self, source: Node) -> Node:
        return self._cast(source, self.new) if self.was.get(source) == self.old else source

    def _set(self, node: Node, dtype: torch.dtype) -> None:
        self.now[node] = dtype
        node.meta["val"] = _cast_value(node.meta["val"], dtype)

    def _note_beyond(self, node: Node) -> None:
        """Remember float32 values that are, or derive from, bounds which the new type cannot hold."""
        if self.now[node] != self.new and (
            self.beyond.intersection(node.all_input_nodes)
            or any(_is_bound(value, self.limit) for value in (*node.args, *node.kwargs.values()))
        ):
            self.beyond.add(node)

    def _bounded(self, values: Any) -> Any:
        """Arguments with every finite number beyond `limit` drawn in to it."""
        return torch.fx.node.map_aggregate(
            values, lambda value: math.copysign(self.limit, value) if _is_bound(value, self.limit) else value
        )

    def _restore_names(self) -> None:
        """Give converted constants the names of those that they replaced altogether."""
        for (source, _), node in self.casts.items():
            if source.op == "get_attr" and not has_tensor(self.graph_module, str(source.target)):
                set_tensor(self.graph_module, str(source.target), node_tensor(node))
                node.target = source.target
        drop_unused(self.graph_module)


def _widen(graph_module: GraphModule) -> bool:
    """Let float32 take the place of bfloat16 everywhere; whether there was any."""
    narrow = [node for node in graph_module.graph.nodes if _float_dtype(node) == torch.bfloat16]
    for node in narrow:
        if node.op == "get_attr":
            set_tensor(graph_module, str(node.target), node_tensor(node).detach().float())
        _rename_dtype(node, torch.bfloat16, torch.float32)
        node.meta["val"] = _cast_value(node.meta["val"], torch.float32)
    if narrow:
        graph_module.recompile()
    return bool(narrow)


def _rename_dtype(node: Node, old: torch.dtype, new: torch.dtype) -> None:
    """Let type arguments that name the old type name the new one."""
    node.args = tuple(new if value == old else value for value in node.args)
    node.kwargs = {name: new if value == old else value for name, value in node.kwargs.items()}


def _cast_value(value: Any, dtype: torch.dtype) -> Any:
    """What a node's metadata says of its value, in another floating-point type."""
    if isinstance(value, Tensor):
        return value.to(dtype)
    return type(value)(v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for v in value)


def _graph_dtype(graph_module: GraphModule) -> torch.dtype | None:
    """The type of most of the graph's floating-point constants."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in (*graph_module.parameters(), *graph_module.buffers()):
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    return max(sizes, key=lambda dtype: sizes[dtype]) if sizes else None


def _float_dtype(node: Node) -> torch.dtype | None:
    """The type of a node's floating-point value (of the first such, where it gives several)."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = node.meta["val"] = node_tensor(node)
    for item in value if isinstance(value, tuple | list) else (value,):
        if isinstance(item, Tensor) and item.is_floating_point():
            return item.dtype
    return None


def _named_dtype(node: Node) -> torch.dtype | None:
    """The floating-point type that an argument of `node` asks for."""
    for value in (*node.args, *node.kwargs.values()):
        if isinstance(value, torch.dtype) and value.is_floating_point:
            return value
    return None


def _is_bound(value: Any, limit: float) -> TypeGuard[float]:
    return isinstance(value, float) and limit < abs(value) < torch.inf
