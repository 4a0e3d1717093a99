"""A step over a cache, from the graph of a whole text: for models that look back alone and keep no cache themselves."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from teq_graph.capture.captured import CapturedGraph
from teq_graph.capture.shapes import MASK, POSITIONS, CachedTensor, LayerCache, counted
from teq_graph.errors import CaptureError
from teq_graph.graph.nodes import arguments_of, aten, is_call, is_tensor_constant, placeholder_nodes
from teq_graph.graph.sizes import symbol
from teq_graph.graph.tensors import node_tensor

NEW, ALL = "new", "all"
"""What an axis of positions holds: those of the new tokens, or those of the cached ones, too. Other axes have None."""
Kinds = tuple[str | None, ...]


class NoStepError(CaptureError):
    """The graph of a text is no step over a cache."""

    def __init__(self, why: str = "it attends in a way that no cache is known for") -> None:
        super().__init__(why)


class _Length(NamedTuple):
    """A number that follows from the length of the text: of the new tokens, and of all."""

    new: Any
    all: Any


class ProlongedStep(nn.Module):
    """The graph of a whole text as one step that prolongs it.

    y = softmax(f(q kᵀ)) v   becomes   k', v' = past ++ k, v;   y = softmax(f(q k'ᵀ)) v'

    where q, k and v are of the new tokens. What follows from the length and the mask alone (positions, causal masks) is
    computed for all positions, and cut to the new ones where it meets them. Where tokens look ahead, this is another
    function than the graph's: whoever builds it compares the two.
    """

    def __init__(self, model: GraphModule) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, past: Sequence[tuple[Tensor, ...]]
    ) -> tuple[Tensor, list[tuple[Tensor, ...]]]:
        held = iter([tensor for layer in past for tensor in layer])
        run = _Run(self.model, input_ids, attention_mask, lambda x, _: torch.cat([next(held), x], dim=-2))
        present = iter(run.cached)
        return run.logits, [tuple(next(present) for _ in layer) for layer in past]


def cached_layers(captured: CapturedGraph) -> tuple[LayerCache, ...]:
    """What a `ProlongedStep` of this graph of texts caches; raises NoStepError where it cannot be told."""
    given = captured.example_kwargs
    layers: list[list[CachedTensor]] = []
    names = {name for name, x in given.items() if isinstance(x, Tensor)}
    if not {"input_ids"} <= names <= {"input_ids", MASK, POSITIONS}:
        raise NoStepError

    def note(x: Tensor, name: str) -> Tensor:
        if x.dim() != 4 or x.shape[0] != len(given["input_ids"]):
            raise NoStepError
        if not layers or any(one.name == name for one in layers[-1]):
            layers.append([])
        layers[-1].append(CachedTensor(name, (x.shape[1], None, x.shape[3])))
        return x

    try:
        _Run(captured.graph_module, given["input_ids"], torch.ones_like(given["input_ids"]), note)
    except Exception as error:  # whatever an op raises that does not take a part of the positions
        raise NoStepError from error
    if not layers or any([one.name for one in layer] != ["key", "value"] for layer in layers):
        raise NoStepError
    return tuple(map(tuple, layers))


class _Run:
    """One run of the graph of a text on its last tokens; `prolong` gives keys or values with those before them."""

    def __init__(
        self, model: GraphModule, input_ids: Tensor, mask: Tensor, prolong: Callable[[Tensor, str], Tensor]
    ) -> None:
        self.prolong = prolong
        self.length = _Length(input_ids.shape[1], mask.shape[1])
        self.cached: list[Tensor] = []
        self.values: dict[Node, Any] = {}
        self.kinds: dict[Node, Any] = {}
        (ids,) = (node for node in placeholder_nodes(model) if node.name == "input_ids")
        self.symbol = symbol(ids.meta["val"].shape[1])
        given = {
            "input_ids": (input_ids, (None, NEW)),
            MASK: (mask, (None, ALL)),
            POSITIONS: (counted(mask), (None, ALL)),
        }
        for node in model.graph.nodes:
            if node.op == "placeholder":
                self.values[node], self.kinds[node] = given.get(node.name, (node.meta["val"], ()))
            elif is_tensor_constant(node):
                self.values[node] = node_tensor(node)
                self.kinds[node] = (None,) * self.values[node].dim()
            elif node.op == "output":
                logits = pytree.tree_leaves(node.args[0])[0]
                if self.kinds[logits] != (None, NEW, None):
                    raise NoStepError
                self.logits: Tensor = self.values[logits]
            elif isinstance(node.meta["val"], torch.SymInt | torch.SymBool | torch.SymFloat | int | float):
                self.values[node] = self._number(node)
            elif is_call(node, aten.matmul.default):
                self._product(node)
            elif is_call(node, aten.scaled_dot_product_attention.default):
                self._attention(node)
            else:
                self._other(node)

    def _number(self, node: Node) -> Any:
        if is_call(node, aten.sym_size.int):
            source, axis = node.args
            assert isinstance(source, Node) and isinstance(axis, int)
            of_text = symbol(source.meta["val"].shape[axis]) == self.symbol
            return self.length if of_text else self.values[source].shape[axis]
        args, kwargs = self._arguments(node)
        if not any(isinstance(value, _Length) for value in pytree.tree_leaves((args, kwargs), is_leaf=_is_length)):
            return node.target(*args, **kwargs)  # type: ignore[operator]
        both = (_resolved((args, kwargs), kind) for kind in (NEW, ALL))
        return _Length(*(node.target(*a, **k) for a, k in both))  # type: ignore[operator]

    def _product(self, node: Node) -> None:
        """queries @ keysᵀ, or weights @ values; any other product with a matrix as it is."""
        left, right = node.args
        assert isinstance(left, Node) and isinstance(right, Node)
        (_, *rows, inner), (*_, summed, columns) = self.kinds[left], self.kinds[right]
        x = self.values[right]
        if summed == NEW and inner == ALL:
            x = self._prolonged(x, "value")
        elif columns == NEW and summed is None:
            x, columns = self._prolonged(x.transpose(-1, -2), "key").transpose(-1, -2), ALL
        elif summed is not None or columns is not None:
            raise NoStepError
        self.values[node] = torch.matmul(self.values[left], x)
        self.kinds[node] = (None, *rows, columns)

    def _attention(self, node: Node) -> None:
        given = arguments_of(node)
        query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
        keys, values = self._prolonged(self.values[key], "key"), self._prolonged(self.values[value], "value")
        allowed = None if mask is None else self._cut(mask, (None, *self.kinds[query][-2:-1], None))
        if given["is_causal"]:
            positions = torch.arange(self.length.all, device=keys.device)
            allowed = positions <= positions[-self.length.new :, None]
        self.values[node] = aten.scaled_dot_product_attention(
            self.values[query], keys, values, allowed, scale=given["scale"], enable_gqa=given["enable_gqa"]
        )
        self.kinds[node] = self.kinds[query]

    def _prolonged(self, x: Tensor, name: str) -> Tensor:
        self.cached.append(self.prolong(x, name))
        return self.cached[-1]

    def _other(self, node: Node) -> None:
        """What holds for each position by itself: of the new ones, or of all, as its operands are."""
        operands = [one for one in node.all_input_nodes if one in self.kinds]
        if is_call(node, operator.getitem):
            (source,), index = operands, node.args[1]
            self.values[node], self.kinds[node] = self.values[source][index], self.kinds[source][index]
            return
        merged = self._merged(operands)
        found = {kind for one in operands for kind in pytree.tree_leaves(self.kinds[one]) if kind}
        uniform = ALL if not found else next(iter(found)) if len(found) == 1 else None
        if NEW in found and len(found) == 2 and NEW in merged and ALL not in merged:
            uniform = NEW  # cut to them
        kinds = pytree.tree_map(lambda value: self._kinds_of(node, value, uniform, merged), node.meta["val"])
        args, kwargs = self._arguments(node, lambda one: self._cut(one, merged) if one in operands else None)

        def sizes(value: Any) -> Any:
            if isinstance(value, list) and isinstance(node.meta["val"], Tensor) and len(value) == len(kinds):
                return [_resolved(one, kind or uniform or ALL) for one, kind in zip(value, kinds, strict=True)]
            return _resolved(value, uniform or ALL)

        args, kwargs = tuple(map(sizes, args)), {name: sizes(value) for name, value in kwargs.items()}
        self.values[node], self.kinds[node] = node.target(*args, **kwargs), kinds  # type: ignore[operator]

    def _merged(self, operands: Sequence[Node]) -> Kinds:
        """Kinds of the axes that operands have in common, counted from the last: of the new positions where one is."""
        kinds = [self.kinds[one] for one in operands]
        rank = max(map(len, kinds), default=0)
        padded = [(None,) * (rank - len(one)) + tuple(one) for one in kinds]
        return tuple(NEW if NEW in axis else ALL if ALL in axis else None for axis in zip(*padded, strict=True))

    def _cut(self, node: Node, wanted: Kinds) -> Tensor:
        """The value of `node`, of the new positions alone along the axes where that is `wanted`."""
        value: Tensor = self.values[node]
        for axis, (kind, other) in enumerate(zip(reversed(self.kinds[node]), reversed(wanted), strict=False), 1):
            if kind == ALL and other == NEW:
                value = aten.slice.Tensor(value, value.dim() - axis, -self.length.new)
        return value

    def _kinds_of(self, node: Node, value: Any, uniform: str | None, merged: Kinds) -> Kinds:
        """Kinds of the axes of a result whose sizes the graph knows as `value`."""
        has_positions = [
            isinstance(size, torch.SymInt) and self.symbol in size.node.expr.free_symbols for size in value.shape
        ]
        if uniform is not None:
            return tuple(uniform if one else None for one in has_positions)
        if is_call(node, aten.transpose.int, aten.permute.default):
            # The op itself says where the axes go.
            places = node.target(torch.empty(range(2, 2 + len(merged)), device="meta"), *node.args[1:])  # type: ignore[operator]
            return tuple(merged[size - 2] for size in places.shape)
        known = iter([kind for kind in merged if kind])
        return tuple(next(known, ALL) if one else None for one in has_positions)

    def _arguments(self, node: Node, tensor: Callable[[Node], Any] = lambda _: None) -> tuple[Any, Any]:
        """The arguments of a call, as values; tensors as `tensor` gives them."""

        def value(one: Node) -> Any:
            found = tensor(one)
            return self.values[one] if found is None else found

        args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), value)
        return args, kwargs


def _is_length(value: Any) -> bool:
    return isinstance(value, _Length)


def _resolved(value: Any, kind: str) -> Any:
    return pytree.tree_map(lambda one: getattr(one, kind) if _is_length(one) else one, value, is_leaf=_is_length)
