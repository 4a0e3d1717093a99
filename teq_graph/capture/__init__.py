"""From an nn.Module to its graph."""

from teq_graph.capture.captured import CapturedGraph, DecoderShape, LayerCache
from teq_graph.capture.torch_export import adopt, capture, check_model

__all__ = ["CapturedGraph", "DecoderShape", "LayerCache", "adopt", "capture", "check_model"]
