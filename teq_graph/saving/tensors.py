"""The tensors of a saved directory: one file of safetensors, each stored once."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from teq_graph.errors import ExportError, ModelFileError, one_line


class TensorStore:
    """Collects tensors under names for one file; a tensor that is there already keeps its first name."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}
        self._alive: list[Tensor] = []

    def add(self, name: str, tensor: Tensor) -> str:
        """The name under which `tensor` is stored: `name`, or that of the same tensor."""
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ExportError(f"{name} is no dense tensor ({tensor.layout}), which cannot be saved")
        key = (tensor.data_ptr(), tensor.device, tensor.shape, tensor.stride(), tensor.dtype)
        known = self._names.get(key) if tensor.numel() else None
        if known is not None:
            return known
        self._names[key] = name
        self._alive.append(tensor)  # so that no other tensor takes its address
        self.tensors[name] = tensor.detach()
        return name

    def add_in_order(self, name: str, tensor: Tensor) -> tuple[str, list[int] | None]:
        """Like `add`, of a tensor whose dimensions lie in another order, such as a transposed matrix, as it lies."""
        strides = tensor.stride()
        order = sorted(range(tensor.dim()), key=lambda dim: (-strides[dim], dim))
        if tensor.is_contiguous() or not tensor.permute(order).is_contiguous():
            return self.add(name, tensor), None
        return self.add(name, tensor.permute(order)), order

    def write(self, path: Path) -> None:
        """Write the file. Raises OSError where that fails, ExportError for a type that it cannot hold."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        try:
            # Copies: the file cannot hold two tensors of one storage.
            save_file({name: _compact(tensor) for name, tensor in self.tensors.items()}, path)
        except SafetensorError as error:
            raise OSError(one_line(error)) from error
        except KeyError as error:
            raise ExportError(f"tensors of {error}, which cannot be saved") from error
        os.chmod(path, path.parent.stat().st_mode & 0o666)


def _compact(tensor: Tensor) -> Tensor:
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor.cpu() if whole else tensor.cpu().clone(memory_format=torch.contiguous_format)


class TensorFile:
    """The tensors of a file, read when they are asked for; the same one each time."""

    def __init__(self, path: Path, device: torch.device) -> None:
        from safetensors import safe_open

        path.stat()  # says which file is missing, as safetensors does not
        try:
            file: Any = safe_open(path, "pt")
            self._known = frozenset(file.keys())
        except Exception as error:  # of the library's own, and of files that cannot be mapped
            raise ModelFileError(f"{path} is damaged: {one_line(error)}") from error
        self._file, self._path, self._device = file, path, device
        self._read: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._read:
            if name not in self._known:
                raise ModelFileError(f"{self._path} has no tensor {name[:100]!r}")
            # A copy: what is mapped would change, or be gone, with the file.
            self._read[name] = self._file.get_tensor(name).clone().to(self._device)
        return self._read[name]

    def in_order(self, name: str, order: list[int] | None) -> Tensor:
        """The inverse of `TensorStore.add_in_order`."""
        tensor = self[name]
        if order is None:
            return tensor
        if sorted(order) != list(range(tensor.dim())):
            raise ModelFileError(f"{name[:100]}: dimensions in the order {order[:8]} of {tensor.dim()}")
        return tensor.permute([order.index(dim) for dim in range(tensor.dim())])
