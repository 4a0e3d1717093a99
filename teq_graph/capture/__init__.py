"""From an nn.Module to its graph."""

from teq_graph.capture.captured import CachedTensor, CapturedGraph, DecoderShape
from teq_graph.capture.torch_export import adopt, capture, check_model

__all__ = ["CachedTensor", "CapturedGraph", "DecoderShape", "adopt", "capture", "check_model"]
