"""Constants of an ONNX model in memory."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def add_initializer(model: ir.Model, name: str, array: np.ndarray) -> ir.Value:
    """The initializer called `name`; it is made of `array` where there is none yet."""
    if name in model.graph.initializers:
        return model.graph.initializers[name]
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value
