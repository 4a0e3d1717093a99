"""Arguments of a graph's calls as JSON, and back.

None, bools, ints, finite floats, strings and lists are themselves; all else is an object with one key, which says what
it is: {"node": name}, {"tuple": [...]}, {"dict": {...}}, {"slice": [start, stop, step]}, {"dtype": "float16"},
{"device": "cpu"}, {"layout": "strided"}, {"memory_format": "contiguous_format"}, {"float": "inf"}, {"tensor": name}.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.errors import ExportError, ModelFileError

_CONSTANTS: dict[str, dict[str, Any]] = {
    kind: {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, of)}
    for kind, of in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format))
}
_FLOATS = ("inf", "-inf", "nan")
_DEVICE = re.compile(r"(cpu|cuda|xpu|mps|meta)(:\d{1,3})?", re.ASCII)


def device_of(name: Any) -> torch.device:
    """The device called `name`; raises ModelFileError for all else."""
    if not isinstance(name, str) or not _DEVICE.fullmatch(name):
        raise ModelFileError(f"device {str(name)[:60]!r}: accepted are names such as cpu and cuda:0")
    return torch.device(name)


def encode(value: Any, name_of: Callable[[Tensor], str] | None = None) -> Any:
    """`value` as JSON; `name_of` stores a tensor. Raises ExportError for what cannot be saved."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**63:
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": str(float(value))}
    if isinstance(value, Node):
        return {"node": value.name}
    if isinstance(value, slice):
        return {"slice": [encode(part, name_of) for part in (value.start, value.stop, value.step)]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if isinstance(value, list):
        return [encode(part, name_of) for part in value]
    if isinstance(value, tuple):
        return {"tuple": [encode(part, name_of) for part in value]}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(part, name_of) for key, part in value.items()}}
    if isinstance(value, Tensor) and name_of is not None:
        return {"tensor": name_of(value)}
    for kind, constants in _CONSTANTS.items():
        for name, constant in constants.items():
            if value is constant:
                return {kind: name}
    raise ExportError(f"{str(value)[:100]!r} ({type(value).__name__}) is an argument that cannot be saved")


def decode(data: Any, found: Callable[[str, str], Any]) -> Any:
    """The inverse of `encode`; `found(kind, name)` gives nodes and tensors, or raises ModelFileError."""
    if data is None or isinstance(data, bool | str):
        return data
    if isinstance(data, int) and -(2**63) <= data < 2**63:
        return data
    if isinstance(data, float) and math.isfinite(data):
        return data
    if isinstance(data, list):
        return [decode(part, found) for part in data]
    if isinstance(data, dict) and len(data) == 1:
        ((kind, content),) = data.items()
        if isinstance(content, list) and kind == "tuple":
            return tuple(decode(part, found) for part in content)
        if isinstance(content, list) and kind == "slice" and len(content) == 3:
            return slice(*(decode(part, found) for part in content))
        if isinstance(content, dict) and kind == "dict":
            return {key: decode(part, found) for key, part in content.items()}
        if isinstance(content, str):
            if kind in ("node", "tensor"):
                return found(kind, content)
            if kind == "device":
                return device_of(content)
            if kind == "float" and content in _FLOATS:
                return float(content)
            if content in _CONSTANTS.get(kind, ()):
                return _CONSTANTS[kind][content]
    raise ModelFileError(f"{str(data)[:100]!r} is no argument that a saved graph can hold")
