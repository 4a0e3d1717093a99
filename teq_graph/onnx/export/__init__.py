"""A captured graph -> the directory that onnxruntime and onnxruntime-genai load."""

from teq_graph.onnx.export.export import OPSETS, export_onnx, lower

__all__ = ["OPSETS", "export_onnx", "lower"]
