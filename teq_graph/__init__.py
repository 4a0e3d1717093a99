"""A graph compiler for low-bit inference: trainable equivalent transformations, MatMulNBits, ONNX."""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

from teq_graph.config import QuantizationConfig, TrainingConfig
from teq_graph.errors import (
    CaptureError,
    ConfigError,
    EquivalenceError,
    ExportError,
    InputError,
    KernelError,
    ModelFileError,
    NumericsError,
    PassError,
    TeqGraphError,
)

if TYPE_CHECKING:
    from teq_graph.analysis.equivalences.equivalence import Equivalence
    from teq_graph.compile import compile, transform
    from teq_graph.compiled import CompiledModel, load

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "CompiledModel",
    "ConfigError",
    "Equivalence",
    "EquivalenceError",
    "ExportError",
    "InputError",
    "KernelError",
    "ModelFileError",
    "NumericsError",
    "PassError",
    "QuantizationConfig",
    "TeqGraphError",
    "TrainingConfig",
    "compile",
    "load",
    "transform",
]

# Imported when first asked for: torch takes seconds, and `teq-graph --help` has no use for it.
_LAZY = {
    "CompiledModel": "teq_graph.compiled",
    "Equivalence": "teq_graph.analysis.equivalences.equivalence",
    "compile": "teq_graph.compile",
    "load": "teq_graph.compiled",
    "transform": "teq_graph.compile",
}


class _Package(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name not in _LAZY:
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_LAZY[name]), name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *__all__})

    def __setattr__(self, name: str, value: object) -> None:
        # Importing the submodule `teq_graph.compile` does not hide the function of that name.
        if not (name in _LAZY and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
