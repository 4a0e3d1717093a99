"""Run an exported directory in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from teq_graph.compiled import CompiledModel


class OnnxModel:
    """`model.onnx` of a directory, on the CPU, with tensors in and out."""

    def __init__(self, directory: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        path = str(directory / "model.onnx")
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(self, inputs: Any) -> Tensor:
        """The first output for the arguments of any model."""
        names = [item.name for item in self.session.get_inputs()]
        tensors = dict(zip(names, pytree.tree_leaves(inputs), strict=True))
        if isinstance(inputs, dict):
            tensors = {name: inputs[name] for name in names}
        return torch.from_numpy(self.session.run(None, {name: x.numpy() for name, x in tensors.items()})[0])

    def step(
        self, compiled: CompiledModel, tokens: Tensor, past: list[Tensor] | None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits and KV cache of one step of a decoder; nothing masked without a mask."""
        decoder = compiled.captured.decoder
        assert decoder is not None
        if past is None:
            past = pytree.tree_leaves(decoder.empty_past(tokens.shape[0], torch.float32))
        if mask is None:
            mask = torch.ones(tokens.shape[0], past[0].shape[2] + tokens.shape[1], dtype=torch.long)
        names = [item.name for item in self.session.get_inputs()]
        values = [tokens, mask, *past]
        feeds = {name: value.contiguous().numpy() for name, value in zip(names, values, strict=True)}
        logits, *present = map(torch.from_numpy, self.session.run(None, feeds))
        return logits, present
