"""A captured graph -> the directory that onnxruntime and onnxruntime-genai load."""

from teq_graph.onnx.export.export import export_onnx
from teq_graph.onnx.export.lower import OPSETS, Lowered, lower

__all__ = ["OPSETS", "Lowered", "export_onnx", "lower"]
