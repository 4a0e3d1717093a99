"""Running exported directories with onnxruntime: text generation with a KV cache, and other models."""

from teq_graph.onnx.runtime.decoder import OnnxDecoder, load
from teq_graph.onnx.runtime.encoder_decoder import OnnxEncoderDecoder
from teq_graph.onnx.runtime.generation.options import GenerationOptions
from teq_graph.onnx.runtime.generation.sampling import Sampler
from teq_graph.onnx.runtime.language_model import Stream
from teq_graph.onnx.runtime.model import OnnxModel
from teq_graph.onnx.runtime.speech import Recording, read_wave

__all__ = [
    "GenerationOptions",
    "OnnxDecoder",
    "OnnxEncoderDecoder",
    "OnnxModel",
    "Recording",
    "Sampler",
    "Stream",
    "load",
    "read_wave",
]
