"""An exported model that is no decoder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self, cast

import numpy as np
import numpy.typing as npt
import onnxruntime

from teq_graph.errors import InputError, ModelFileError, one_line
from teq_graph.onnx.directory import Metadata
from teq_graph.onnx.runtime.session import CPU, Provider, open_directory

_NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(double)": np.float64,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(bool)": np.bool_,
    "tensor(uint8)": np.uint8,
}


class OnnxModel:
    """An exported model that is no decoder."""

    def __init__(self, session: onnxruntime.InferenceSession, metadata: Metadata) -> None:
        if metadata.dtype not in ("float32", "float16"):
            raise ModelFileError(f"dtype {metadata.dtype}: numpy has none; accepted are float32 and float16")
        self.session = session
        self.metadata = metadata

    @classmethod
    def load(
        cls,
        directory: str | os.PathLike[str],
        providers: Sequence[Provider] = CPU,
        threads: int | None = None,
        session_options: onnxruntime.SessionOptions | None = None,
        verify: bool = True,
    ) -> Self:
        """Open an exported directory; arguments and errors as for `OnnxDecoder.load`."""
        return cls(*open_directory(directory, providers, threads, session_options, verify))

    def run(self, **inputs: Any) -> dict[str, npt.NDArray[Any]]:
        """The model's outputs by name. Inputs are arrays or what numpy makes arrays of, cast to the model's types.

        Raises InputError for missing or unknown names, and for shapes that the model does not take.
        """
        expected = {item.name: item.type for item in self.session.get_inputs()}
        if set(inputs) != set(expected):
            raise InputError(f"inputs {sorted(inputs)}: accepted are {sorted(expected)}")
        feeds = {name: _as_array(name, value, _NUMPY_TYPES[expected[name]]) for name, value in inputs.items()}
        try:
            outputs = self.session.run(None, feeds)
        except Exception as error:  # onnxruntime has a dozen exception types, with no base of their own
            shapes = ", ".join(f"{name} {list(value.shape)}" for name, value in feeds.items())
            raise InputError(f"onnxruntime refuses {shapes}: {one_line(error)}") from error
        return {item.name: cast(Any, value) for item, value in zip(self.session.get_outputs(), outputs, strict=True)}


def _as_array(name: str, value: Any, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "biuf":
            raise TypeError(f"{array.dtype} of shape {list(array.shape)}")
        # A float where the model takes integers would be cut off.
        return array.astype(dtype, casting="same_kind" if array.dtype.kind == "f" else "unsafe")
    except (TypeError, ValueError) as error:
        raise InputError(f"{name}: accepted are values of {np.dtype(dtype)}, not {one_line(error)}") from error
