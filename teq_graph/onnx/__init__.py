"""Lowering to ONNX, the directory that is written, and running it with onnxruntime.

Empty on purpose: generating from an exported directory needs neither torch.export nor onnxscript.
"""
