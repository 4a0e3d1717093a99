"""Arrays as values of onnxruntime: bfloat16, which numpy does not have, as the bits of its numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from onnxruntime import OrtValue

_ARRAYS = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_BFLOAT16 = 16
"""onnx.TensorProto.BFLOAT16"""


def array_type(dtype: str) -> np.dtype[Any]:
    """The type of an array that holds numbers of `dtype`."""
    return np.dtype(_ARRAYS[dtype])


def element_type(dtype: str) -> Any:
    """`dtype` as onnxruntime's bindings name it."""
    return _BFLOAT16 if dtype == "bfloat16" else _ARRAYS[dtype]


def as_value(array: npt.NDArray[Any], dtype: str, device: str = "cpu", device_id: int = 0) -> OrtValue:
    """A value of `dtype`: on the CPU over the array's own memory, elsewhere a copy."""
    if dtype == "bfloat16":
        value: OrtValue = OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        if device == "cpu":
            return value
        copy: OrtValue = OrtValue.ortvalue_from_shape_and_type(list(array.shape), _BFLOAT16, device, device_id)
        copy.update_inplace(array)
        return copy
    return OrtValue.ortvalue_from_numpy(array, device, device_id)


def of_float32(array: npt.NDArray[np.float32], dtype: str) -> npt.NDArray[Any]:
    """An array of `array_type(dtype)`, rounded to nearest."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint32)
        rounded: npt.NDArray[Any] = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
        return rounded
    return array.astype(array_type(dtype))


def as_float32(array: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """An array of `array_type` in float32."""
    if array.dtype == np.uint16:
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32, copy=False)
