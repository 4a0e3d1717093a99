"""Write an exported directory, and run it in onnxruntime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import teq_graph
from teq_graph.compiled import CompiledModel
from teq_graph.loading import LoadedModel
from teq_graph.onnx.directory import Metadata


class OnnxModel:
    """`model.onnx` of a directory, or its two parts, on the CPU, with tensors in and out."""

    def __init__(self, directory: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        parts = directory / "encoder_model.onnx", directory / "decoder_model.onnx"
        paths = parts if parts[0].exists() else (directory / "model.onnx",)
        *encoder, self.session = (
            onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]) for path in paths
        )
        self.encoder = next(iter(encoder), None)

    def run(self, inputs: Any) -> Tensor:
        """The first output for the arguments of any model."""
        return self.outputs(inputs)[0]

    def outputs(self, inputs: Any) -> list[Tensor]:
        """The outputs for the arguments of any model."""
        if self.encoder is not None:
            return self._decoded(inputs)
        names = [item.name for item in self.session.get_inputs()]
        tensors = dict(zip(names, pytree.tree_leaves(inputs), strict=True))
        if isinstance(inputs, dict):
            tensors = {name: inputs[name] for name in names}
        results = self.session.run(None, {name: x.numpy() for name, x in tensors.items()})
        return [torch.from_numpy(result) for result in results]

    def _decoded(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        assert self.encoder is not None
        given = {item.name: inputs[item.name].numpy() for item in self.encoder.get_inputs()}
        names = [item.name.replace("present", "past_key_values") for item in self.encoder.get_outputs()]
        feeds = dict(zip(names, self.encoder.run(None, given), strict=True))
        feeds |= {"input_ids": inputs["decoder_input_ids"].numpy()}
        for item in self.session.get_inputs():
            if item.name.startswith("encoder_"):
                feeds[item.name] = given[item.name.removeprefix("encoder_")]
            elif item.name not in feeds:
                _, heads, _, width = item.shape
                feeds[item.name] = np.zeros((len(feeds["input_ids"]), heads, 0, width), dtype=np.float32)
        return [torch.from_numpy(result) for result in self.session.run(None, feeds)]

    def step(
        self, compiled: CompiledModel, tokens: Tensor, past: list[Tensor] | None, mask: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits and KV cache of one step of a decoder; nothing masked without a mask."""
        decoder = compiled.captured.decoder
        assert decoder is not None
        if past is None:
            in_half = any(item.type == "tensor(float16)" for item in self.session.get_inputs())
            dtype = torch.float16 if in_half else torch.float32
            past = pytree.tree_leaves(decoder.empty_past(tokens.shape[0], dtype))
        if mask is None:
            seen = decoder.past_length(decoder.by_layer(past)) or 0
            mask = torch.ones(tokens.shape[0], seen + tokens.shape[1], dtype=torch.long)
        names = [item.name for item in self.session.get_inputs()]
        values = [tokens, mask, *past]
        feeds = {name: value.contiguous().numpy() for name, value in zip(names, values, strict=True)}
        logits, *present = map(torch.from_numpy, self.session.run(None, feeds))
        return logits, present


def export_language_model(
    loaded: LoadedModel, directory: Path, bits: int | None = None, dtype: str = "float32"
) -> CompiledModel:
    """`loaded`, rounded to nearest or with `bits=None` in float, in a directory that computes in `dtype`."""
    quantization = teq_graph.QuantizationConfig(bits or 4, 32, skip=() if bits else ("*",))
    compiled = teq_graph.compile(loaded.model, tokenizer=loaded.tokenizer, quantization=quantization, training=None)
    compiled.export_onnx(directory, dtype=dtype, accuracy_level=1)  # type: ignore[arg-type]
    return compiled


def genai_tokens(directory: Path, prompt: list[int], count: int) -> list[int]:
    """What onnxruntime-genai generates after a prompt, greedily: up to `count` tokens, the end token left out."""
    import onnxruntime_genai as genai

    model = genai.Model(str(directory))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + count)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array(prompt, dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    tokens: list[int] = generator.get_sequence(0)[len(prompt) :].tolist()
    stops = Metadata.read(directory).eos_token_ids
    return tokens[:-1] if tokens[-1] in stops else tokens
