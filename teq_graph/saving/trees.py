"""Structures of inputs and results (torch's pytrees) as data. torch's own reader imports what the data name."""

from __future__ import annotations

import collections
import sys
from collections.abc import Collection
from typing import Any

from torch.utils import _pytree as pytree

from teq_graph.errors import ExportError, ModelFileError
from teq_graph.saving.schema import Tree

_KINDS: dict[str, Any] = {
    "tuple": tuple,
    "list": list,
    "dict": dict,
    "OrderedDict": collections.OrderedDict,
    "deque": collections.deque,
}
_MAPPINGS = ("dict", "OrderedDict")
_NAMED_TUPLE = collections.namedtuple
"""torch's name for all of them."""
_RESULTS = "torch.return_types"


def describe(spec: Any) -> Tree | None:
    """`spec` as data; raises ExportError for what would not come back."""
    if spec.is_leaf():
        return None
    children = [describe(child) for child in spec.children()]
    for kind, type_ in _KINDS.items():
        if spec.type is type_:
            keys = list(spec.context) if kind in _MAPPINGS else None
            if keys is not None and not all(isinstance(key, str | int | bool) for key in keys):
                raise ExportError(f"inputs or results have the keys {keys[:3]}: accepted are text and whole numbers")
            return Tree(kind=kind, children=children, keys=keys, context=None if keys is not None else spec.context)  # type: ignore[arg-type]
    if spec.type is _NAMED_TUPLE:
        return Tree(kind="namedtuple", children=children, type=_name(spec.context))
    if not _is_plain(spec.context):
        raise ExportError(f"inputs or results are of {spec.type.__qualname__}, which cannot be saved")
    return Tree(kind="class", children=children, type=_name(spec.type), context=spec.context)


def build(tree: Tree | None, modules: Collection[str]) -> Any:
    """The inverse of `describe`, with classes of `modules`, which are imported; raises ModelFileError for others."""
    if tree is None:
        return pytree.tree_structure(0)
    children = [build(child, modules) for child in tree.children]
    if tree.kind == "namedtuple":
        found = _class(tree.type, modules)
        if not issubclass(found, tuple) or len(getattr(found, "_fields", ())) != len(children):
            raise ModelFileError(f"{tree.type} is no named tuple of {len(children)}")
        return pytree.TreeSpec(_NAMED_TUPLE, found, children)
    if tree.kind == "class":
        found = _class(tree.type, modules)
        if found not in pytree.SUPPORTED_NODES:
            raise ModelFileError(f"{tree.type} is not known to torch as a structure of inputs or results")
        return pytree.TreeSpec(found, tree.context, children)
    if tree.kind in _MAPPINGS:
        keys = tree.keys or []
        if len(keys) != len(children) or len(set(keys)) != len(keys):
            raise ModelFileError(f"a {tree.kind} has {len(children)} values and the keys {str(keys)[:60]}")
        return pytree.TreeSpec(_KINDS[tree.kind], keys, children)
    context = tree.context if tree.kind == "deque" and isinstance(tree.context, int) else None
    return pytree.TreeSpec(_KINDS[tree.kind], context, children)


def modules_of(spec: Any) -> set[str]:
    """The modules that define the classes in `spec`, but for what is torch's and Python's own."""
    # Of a named tuple, the context is the class.
    found = {kind.__module__ for kind in (spec.type, spec.context) if isinstance(kind, type)}
    found = {module for module in found if module.partition(".")[0] not in ("builtins", "collections", "torch")}
    return found.union(*map(modules_of, spec.children()))


def _name(kind: type) -> str:
    module, name = kind.__module__, kind.__qualname__
    torchs_own = module.partition(".")[0] == "torch" and module != _RESULTS
    if torchs_own or getattr(sys.modules.get(module), name, None) is not kind:
        raise ExportError(f"inputs or results are of {module}.{name}: accepted are classes that a module holds by name")
    return f"{module}:{name}"


def _class(name: str | None, modules: Collection[str]) -> Any:
    module, _, attribute = (name or "").partition(":")
    found = getattr(sys.modules[module], attribute, None) if module in (*modules, _RESULTS) else None
    if not isinstance(found, type) or _name(found) != name:
        raise ModelFileError(f"inputs or results are of {str(name)[:100]!r}: accepted are classes of named modules")
    return found


def _is_plain(context: Any) -> bool:
    """Whether JSON gives back the same."""
    if isinstance(context, list):
        return all(map(_is_plain, context))
    if isinstance(context, dict):
        return all(isinstance(key, str) and _is_plain(value) for key, value in context.items())
    return context is None or type(context) in (bool, int, float, str)
