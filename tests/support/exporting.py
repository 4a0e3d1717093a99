"""The exporter's table of translations, made once for all tests of a process."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
from torch.onnx._internal.exporter._constants import TORCHLIB_OPSET
from torch.onnx._internal.exporter._registration import ONNXRegistry


def build_the_table_once(patch: pytest.MonkeyPatch) -> None:
    """onnxscript translates five hundred functions for each export, whatever is exported."""
    build: Callable[..., ONNXRegistry] = ONNXRegistry.from_torchlib
    tables: dict[int, ONNXRegistry] = {}

    def from_torchlib(opset_version: int = TORCHLIB_OPSET) -> ONNXRegistry:
        if opset_version not in tables:
            tables[opset_version] = build(opset_version)
        table = copy.copy(tables[opset_version])
        table.functions = {target: list(choices) for target, choices in table.functions.items()}
        return table

    patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(from_torchlib))
