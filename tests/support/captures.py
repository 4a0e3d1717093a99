"""Captures of Hugging Face models, traced once for each architecture, configuration and dtype of a process.

torch.export takes seconds, and gives the same graph for the same configuration, whatever the weights. What it gave is
cloned, over the tensors of the model at hand.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from torch import nn

from teq_graph.capture import CapturedGraph, capture, check_model
from teq_graph.capture.captured import float_dtype
from teq_graph.capture.pretrained import is_pretrained
from teq_graph.graph.tensors import clone_graph, replace_tensors

_traced: dict[str, CapturedGraph] = {}


def capture_again(model: nn.Module, example_inputs: Any = None, dynamic_shapes: Any = None) -> CapturedGraph:
    """As `capture`; a model with inputs of its own, or none of Hugging Face's, is traced anew."""
    if example_inputs is not None or not isinstance(model, nn.Module) or not is_pretrained(model):
        return capture(model, example_inputs, dynamic_shapes)
    config = json.dumps(model.config.to_dict(), sort_keys=True, default=str)  # type: ignore[union-attr,operator]
    first: dict[int, str] = {}  # tied tensors are one
    tied = [
        first.setdefault(tensor.data_ptr(), name) for name, tensor in model.named_parameters(remove_duplicate=False)
    ]
    key = f"{type(model)} {config} {float_dtype(model)} {next(model.parameters()).device} {tied}"
    if key not in _traced:
        # Kept without the weights of the model that was traced.
        _traced[key] = _clone(capture(model))
    check_model(model)
    result = _clone(_traced[key])
    tensors = dict([*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)])
    read = {str(node.target) for node in result.graph_module.graph.nodes if node.op == "get_attr"}
    replace_tensors(result.graph_module, {name: tensors[name].detach() for name in read & tensors.keys()})
    return result


def _clone(captured: CapturedGraph) -> CapturedGraph:
    return dataclasses.replace(captured, graph_module=clone_graph(captured.graph_module))
