"""What a saved graph may call: operators of torch by name, and a table of Python's functions of numbers."""

from __future__ import annotations

import math
import operator
import re
import sys
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload
from torch.fx import Node

import teq_graph.ops  # noqa: F401  registers the operators of that namespace
from teq_graph.errors import ExportError, ModelFileError

OWN_NAMESPACES = ("aten", "teq_graph")
"""Namespaces whose operators are there once this package is."""

NUMBER_FUNCTIONS: dict[str, Any] = {
    **{
        f"operator.{name}": getattr(operator, name)
        for name in (
            *("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs"),
            *("eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_"),
        )
    },
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "trunc", "sqrt")},
    **{
        f"torch.{name}": getattr(torch, name)
        for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum")
    },
}
"""What torch.export traces of computations with sizes. Shifts, whose result may be larger than any memory, are not
among them; of powers only those to a small number."""

OF_NUMBERS = frozenset(NUMBER_FUNCTIONS.values())
FUNCTIONS: dict[str, Any] = {**NUMBER_FUNCTIONS, "operator.getitem": operator.getitem}
LARGEST_POWER = 8

_NAMES = {function: name for name, function in FUNCTIONS.items()}
_OPERATOR = re.compile(r"([A-Za-z_]\w*)::([A-Za-z_]\w*)\.(\w+)", re.ASCII)


def name_of(target: Any) -> str:
    """The name by which `target_of` finds `target`; raises ExportError where nothing would be found."""
    if isinstance(target, OpOverload):
        reason = _reason_against(target)
        if reason is None:
            return f"{target._schema.name}.{target._overloadname}"
    elif target in _NAMES:
        return _NAMES[target]
    else:
        reason = "accepted are operators of torch and functions of sizes"
    raise ExportError(f"the graph calls {target}, which cannot be saved: {reason}")


def target_of(name: str, modules: Collection[str]) -> Any:
    """What `name` means, where `modules` are known to be imported. Raises ModelFileError for all else."""
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    found = None
    if (match := _OPERATOR.fullmatch(name)) is not None:
        namespace, operator_name, overload = match.groups()
        known = {*OWN_NAMESPACES, *modules, *(full.partition("::")[0] for full in OPDEFS)}
        if namespace in known:
            packet = getattr(getattr(torch.ops, namespace), operator_name, None)
            found = getattr(packet, overload, None)
    if not isinstance(found, OpOverload) or f"{found._schema.name}.{found._overloadname}" != name:
        raise ModelFileError(f"the graph calls {name[:100]!r}: accepted are operators of torch and functions of sizes")
    reason = _reason_against(found)
    if reason is None and (module := module_of(found)) is not None and module not in modules:
        reason = f"it is defined by {module}, which the description does not name"
    if reason is not None:
        raise ModelFileError(f"the graph calls {name[:100]!r}: {reason}")
    return found


def check_call(target: Any, args: Sequence[Any]) -> None:
    """Raises ValueError for a call of a function of numbers with something else, or of a large power."""
    if target in OF_NUMBERS:
        numbers = args[0] if target is torch.sym_sum and args else args
        if not all(isinstance(arg, int | float | Node) for arg in numbers):
            raise ValueError(f"{_NAMES[target]} has arguments that are no numbers")
        power = args[1] if target is operator.pow and len(args) > 1 else 0
        if not isinstance(power, int | float) or not abs(power) <= LARGEST_POWER:
            raise ValueError(f"{_NAMES[target]} has the exponent {power}: accepted is a number up to {LARGEST_POWER}")


def module_of(target: OpOverload) -> str | None:
    """The module that defines an operator outside torch and this package, which must be imported before it is known."""
    namespace = target.namespace
    if namespace in OWN_NAMESPACES:
        return None
    definition = OPDEFS.get(target._schema.name)
    return namespace if definition is None else str(definition._init_fn.__module__)


def _reason_against(target: OpOverload) -> str | None:
    """Why an operator is not accepted; None where it computes values from values, and nothing else."""
    schema = target._schema
    overload = f".{schema.overload_name}" if schema.overload_name else ""
    if not torch._C._dispatch_has_kernel(schema.name + overload):
        return "it is none of torch's dispatcher"
    if schema.is_mutable or not schema.returns:
        return "accepted are operators that give values and change none"
    if any(argument.name == "filename" for argument in schema.arguments):
        return "accepted are operators that read and write no files"
    module = module_of(target)
    if module is not None and module not in sys.modules:
        return f"accepted are operators of {', '.join(OWN_NAMESPACES)} and of imported modules"
    return None
