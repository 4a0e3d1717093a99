"""From an nn.Module to its graph."""

from teq_graph.capture.captured import CapturedGraph, usable_device
from teq_graph.capture.shapes import CachedTensor, DecoderShape, EncoderDecoderShape, EncoderShape
from teq_graph.capture.torch_export import adopt, capture, check_model

__all__ = [
    "CachedTensor",
    "CapturedGraph",
    "DecoderShape",
    "EncoderDecoderShape",
    "EncoderShape",
    "adopt",
    "capture",
    "check_model",
    "usable_device",
]
