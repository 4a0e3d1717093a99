"""Writing an ONNX model: a graph, and beside it a file for the tensors of all but the smallest."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from teq_graph.onnx.directory import DATA_SUFFIX

# Models above this size keep their tensors in model.onnx.data.
_EXTERNAL_FROM_BYTES = 2**20
# Smaller tensors (shapes, scalars) stay in model.onnx, so that shape inference sees them.
_EXTERNAL_TENSOR_BYTES = 1024


def save_model(model: ir.Model, path: Path) -> None:
    """Write `model` to `path`, and its tensors beside it in `path`.data where they exceed 1 MiB."""
    tensors = [value.const_value for value in model.graph.initializers.values() if value.const_value is not None]
    if sum(tensor.nbytes for tensor in tensors) <= _EXTERNAL_FROM_BYTES:
        ir.save(model, path)
        return
    ir.save(model, path, external_data=path.name + DATA_SUFFIX, size_threshold_bytes=_EXTERNAL_TENSOR_BYTES)
    written = ir.load(path)
    if _name_reshaped(written):
        ir.save(written, path)


def _name_reshaped(model: ir.Model) -> bool:
    """Reshape(W, shape)   becomes   a tensor of its own, of the bytes in the file that W has

    onnxruntime would make a copy in memory of the codes that an embedding and a projection share, and could no longer
    let go of what is mapped. Returns whether there was one.
    """
    graph = model.graph
    changed = False
    for node in [node for node in graph if node.op_type == "Reshape"]:
        source, shape = (value.const_value if value is not None else None for value in node.inputs)
        (view,) = node.outputs
        if not isinstance(source, ir.ExternalTensor) or shape is None or view.is_graph_output():
            continue
        if (shape.numpy() <= 0).any():  # 0 and -1 stand for sizes that follow from others
            continue
        name, dims = str(view.name), ir.Shape(shape.numpy().tolist())
        value = ir.Value(name=name, shape=dims, type=ir.TensorType(source.dtype))
        place = (source.location, source.offset, source.length, source.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=dims, name=name, base_dir=source.base_dir)
        view.replace_all_uses_with(value)
        graph.remove(node, safe=True)
        graph.register_initializer(value)
        changed = True
    if changed:  # a source that nothing else reads
        common.RemoveUnusedNodesPass()(model)
    return changed
