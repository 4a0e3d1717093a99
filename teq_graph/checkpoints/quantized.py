"""Writes the codes of a compiled model as safetensors that transformers loads, where the format's package is there."""

from __future__ import annotations

import collections
import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from teq_graph.capture.captured import CapturedGraph, magnitude
from teq_graph.capture.torch_export import AGREEMENT
from teq_graph.checkpoints import FORMATS
from teq_graph.checkpoints.directory import check_pretrained, write_directory
from teq_graph.checkpoints.formats import BY_NAME, Format
from teq_graph.compiled import CompiledModel
from teq_graph.config import WeightSpec, check_choice, check_type
from teq_graph.errors import ExportError
from teq_graph.graph.nodes import arguments_of, is_call, operand_of
from teq_graph.graph.tensors import get_tensor, node_tensor, replace_tensors
from teq_graph.quantization import QuantizedWeight
from teq_graph.write_back import write_back_all


def save_codes(
    compiled: CompiledModel,
    model: Any,
    directory: str | os.PathLike[str],
    format: str,  # noqa: A002  what --format is, too
    overwrite: bool = False,
    provenance: Mapping[str, Any] | None = None,
) -> Path:
    """Write the codes of `compiled` as a Hugging Face directory in a format of `FORMATS`.

    model: the model of transformers that was compiled; it is left as it is. What is written has its class, names and
    configuration; gains and biases are as they were learned. Weights have the values of `compiled`, bit for bit:
    gptq stores scales in float16, so they must be such numbers (`round_scales`).

    Raises ConfigError for weights that the format cannot hold, ExportError where the graph's tensors cannot be told
    from the model's or the directory cannot be written; nothing is left behind then.
    """
    check_type("compiled", compiled, CompiledModel, "a CompiledModel")
    check_choice("format", format, FORMATS)
    check_pretrained(model)
    form = BY_NAME[format]
    quantized = _quantized_linears(compiled, model, form)
    specs = {name: spec for name, (_, spec) in quantized.items()}
    form.check_specs(specs.values())
    result = copy.deepcopy(model)
    write_back_all(compiled.graph_module, result)
    for name, (weight, _) in quantized.items():
        parameter = result.get_submodule(name).weight
        with torch.no_grad():
            parameter.copy_(weight.dequantize(parameter.dtype))
    _check_agreement(compiled.captured, result)
    state = result.state_dict()
    for name, (weight, _) in quantized.items():
        del state[f"{name}.weight"]
        state |= {f"{name}.{part}": tensor for part, tensor in form.tensors(weight).items()}
    in_float = [n for n, module in model.named_modules() if isinstance(module, nn.Linear) and n not in specs]
    result.config.quantization_config = form.configuration(specs, in_float)
    return write_directory(result, state, directory, compiled.tokenizer, overwrite, {"format": format}, provenance)


def round_scales(compiled: CompiledModel, dtype: torch.dtype = torch.float16) -> None:
    """Round the scales of all linears to numbers of `dtype`; they stay in the dtype that they have.

    Float16 moves a scale by a 2048th of itself at most, little beside what rounding to codes does to a weight. Raises
    ExportError for a scale that `dtype` does not hold; `compiled` is as it was then.
    """
    rounded: dict[str, Tensor] = {}
    for node in _products(compiled.graph_module):
        name = str(operand_of(node, 2).target)
        scales = get_tensor(compiled.graph_module, name)
        rounded[name] = scales.to(dtype).to(scales.dtype)
        if not torch.isfinite(rounded[name]).all() or bool(((rounded[name] == 0) & (scales != 0)).any()):
            raise ExportError(f"{name}: {float(scales.min()):.3g} to {float(scales.max()):.3g} is outside of {dtype}")
    replace_tensors(compiled.graph_module, rounded)


# ------------------------------------------------------------------------------------------------------------- pieces


def _products(graph_module: GraphModule) -> list[Node]:
    return [node for node in graph_module.graph.nodes if is_call(node, torch.ops.teq_graph.matmul_nbits.default)]


def _quantized_linears(
    compiled: CompiledModel, model: Any, form: Format
) -> dict[str, tuple[QuantizedWeight, WeightSpec]]:
    """The quantized weights by the names of the modules of `model` that hold them; raises where that holds them not."""
    convolution = next((weight.name for weight in compiled.report.convolutions if weight.spec is not None), None)
    if convolution is not None:
        raise form.refusal(f"{convolution} is a convolution's", "models whose convolutions are skipped")
    specs = {weight.name: weight.spec for weight in compiled.report.linears if weight.spec is not None}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    shared = collections.Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    found = {}
    for node in _products(compiled.graph_module):
        values = arguments_of(node)
        name = str(values["b"].target).rpartition(".")[0]
        module, spec = linears.get(name), specs.get(f"{name}.weight")
        if module is None or spec is None or shared[id(module.weight)] > 1:
            raise form.refusal(f"{name} is no weight of one torch.nn.Linear", "models in which each has its own")
        codes, scales, zero_points = (
            None if values[part] is None else node_tensor(values[part]).cpu() for part in ("b", "scales", "zero_points")
        )
        assert codes is not None and scales is not None
        weight = QuantizedWeight(
            codes, scales, zero_points, *(values[part] for part in ("N", "K", "bits", "block_size"))
        )
        form.check_shape(name, weight.n, weight.k, spec)
        if form.scale_dtype is not None and not torch.equal(
            weight.scales.to(form.scale_dtype).to(weight.scales.dtype), weight.scales
        ):
            accepted = "those that round_scales gives, or a model in float16"
            raise form.refusal(f"scales of {name} are no {form.scale_dtype} numbers", accepted)
        found[name] = (weight, spec)
    if not found:
        raise form.refusal("no linear is quantized", "models with quantized linears")
    return found


def _check_agreement(captured: CapturedGraph, model: Any) -> None:
    """Raise ExportError where `model` does not compute what the compiled graph does, on the inputs of the capture."""
    with torch.no_grad():
        if captured.decoder is not None:
            tokens = {"input_ids": captured.example_args[0]}
            args, kwargs = captured.bind(tokens)
            given, wanted = captured.graph_module(*args, **kwargs)[0], model(**tokens, use_cache=False).logits
        elif captured.encoder_decoder is not None:
            source, written, _ = captured.example_args
            inputs = {**source, "decoder_input_ids": written}
            args, kwargs = captured.bind(inputs)
            given, wanted = captured.graph_module(*args, **kwargs)[0], model(**inputs, use_cache=False).logits
        else:
            given, wanted = (
                call(*captured.example_args, **captured.example_kwargs) for call in (captured.graph_module, model)
            )
    for own, other in zip(pytree.tree_leaves(given), pytree.tree_leaves(wanted), strict=True):
        if isinstance(own, Tensor) and own.is_floating_point():
            difference = magnitude(own.double() - other.double())
            if difference > 10 * AGREEMENT[own.dtype] * magnitude(own):
                raise ExportError(
                    f"{type(model).__name__}: with its weights replaced it gives other values than the compiled graph: "
                    "accepted are models whose parameters stand in the graph, each by itself"
                )
