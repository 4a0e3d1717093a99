"""Operators of onnxruntime that the export writes, with their schemas."""

from __future__ import annotations

import onnx
from onnxscript import values

CONTRIB_DOMAIN = "com.microsoft"

_Schema = onnx.defs.OpSchema
_OPTIONAL = _Schema.FormalParameterOption.Optional
_INTEGER = _Schema.AttrType.INT

# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MatMulNBits
MATMUL_NBITS = values.Op(
    values.Opset(CONTRIB_DOMAIN, 1),
    "MatMulNBits",
    _Schema(
        "MatMulNBits",
        CONTRIB_DOMAIN,
        1,
        inputs=[
            _Schema.FormalParameter("A", "T1"),
            _Schema.FormalParameter("B", "T2"),
            _Schema.FormalParameter("scales", "T1"),
            _Schema.FormalParameter("zero_points", "T2", param_option=_OPTIONAL),
            _Schema.FormalParameter("g_idx", "T3", param_option=_OPTIONAL),
            _Schema.FormalParameter("bias", "T1", param_option=_OPTIONAL),
        ],
        outputs=[_Schema.FormalParameter("Y", "T1")],
        type_constraints=[
            ("T1", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("T2", ["tensor(uint8)"], ""),
            ("T3", ["tensor(int32)"], ""),
        ],
        attributes=[
            *(_Schema.Attribute(name, _INTEGER, "") for name in ("K", "N", "block_size")),
            *(_Schema.Attribute(name, _INTEGER, "", required=False) for name in ("bits", "accuracy_level")),
        ],
    ),
)


def _parameter(name: str, kind: str, optional: bool = False) -> onnx.defs.OpSchema.FormalParameter:
    if optional:
        return _Schema.FormalParameter(name, kind, param_option=_OPTIONAL)
    return _Schema.FormalParameter(name, kind)


# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GroupQueryAttention
GROUP_QUERY_ATTENTION = values.Op(
    values.Opset(CONTRIB_DOMAIN, 1),
    "GroupQueryAttention",
    _Schema(
        "GroupQueryAttention",
        CONTRIB_DOMAIN,
        1,
        inputs=[
            _parameter("query", "T"),
            _parameter("key", "T", optional=True),
            _parameter("value", "T", optional=True),
            _parameter("past_key", "T", optional=True),
            _parameter("past_value", "T", optional=True),
            _parameter("seqlens_k", "M"),
            _parameter("total_sequence_length", "M"),
            _parameter("cos_cache", "T", optional=True),
            _parameter("sin_cache", "T", optional=True),
            _parameter("position_ids", "P", optional=True),
            _parameter("attention_bias", "T", optional=True),
        ],
        outputs=[_parameter(name, "T") for name in ("output", "present_key", "present_value")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("M", ["tensor(int32)"], ""),
            ("P", ["tensor(int64)"], ""),
        ],
        attributes=[
            *(_Schema.Attribute(name, _INTEGER, "") for name in ("num_heads", "kv_num_heads")),
            *(
                _Schema.Attribute(name, _INTEGER, "", required=False)
                for name in ("do_rotary", "rotary_interleaved", "local_window_size")
            ),
            *(_Schema.Attribute(name, _Schema.AttrType.FLOAT, "", required=False) for name in ("scale", "softcap")),
        ],
    ),
)


# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.GatherBlockQuantized
GATHER_BLOCK_QUANTIZED = values.Op(
    values.Opset(CONTRIB_DOMAIN, 1),
    "GatherBlockQuantized",
    _Schema(
        "GatherBlockQuantized",
        CONTRIB_DOMAIN,
        1,
        inputs=[
            _parameter("data", "T1"),
            _parameter("indices", "Tind"),
            _parameter("scales", "T2"),
            _parameter("zero_points", "T1", optional=True),
        ],
        outputs=[_parameter("output", "T2")],
        type_constraints=[
            ("T1", ["tensor(uint8)"], ""),
            ("T2", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("Tind", ["tensor(int32)", "tensor(int64)"], ""),
        ],
        attributes=[
            _Schema.Attribute(name, _INTEGER, "", required=False)
            for name in ("gather_axis", "quantize_axis", "block_size", "bits")
        ],
    ),
)


# https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.QMoE
QMOE = values.Op(
    values.Opset(CONTRIB_DOMAIN, 1),
    "QMoE",
    _Schema(
        "QMoE",
        CONTRIB_DOMAIN,
        1,
        inputs=[
            _parameter("input", "T"),
            _parameter("router_probs", "T"),
            _parameter("fc1_experts_weights", "T1"),
            _parameter("fc1_scales", "T", optional=True),
            _parameter("fc1_experts_bias", "T", optional=True),
            _parameter("fc2_experts_weights", "T1"),
            _parameter("fc2_scales", "T", optional=True),
            _parameter("fc2_experts_bias", "T", optional=True),
            _parameter("fc3_experts_weights", "T1", optional=True),
            _parameter("fc3_scales", "T", optional=True),
            _parameter("fc3_experts_bias", "T", optional=True),
            _parameter("fc1_zero_points", "T1", optional=True),
            _parameter("fc2_zero_points", "T1", optional=True),
            _parameter("fc3_zero_points", "T1", optional=True),
            _parameter("router_weights", "T", optional=True),
        ],
        outputs=[_parameter("output", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("T1", ["tensor(uint8)"], ""),
        ],
        attributes=[
            *(
                _Schema.Attribute(name, _INTEGER, "", required=False)
                for name in (
                    *("k", "block_size", "expert_weight_bits", "fc1_expert_weight_bits", "fc2_expert_weight_bits"),
                    *("swiglu_fusion", "normalize_routing_weights", "weights_prepacked", "accuracy_level"),
                )
            ),
            *(
                _Schema.Attribute(name, _Schema.AttrType.FLOAT, "", required=False)
                for name in ("activation_alpha", "activation_beta", "swiglu_limit")
            ),
            _Schema.Attribute("activation_type", _Schema.AttrType.STRING, "", required=False),
        ],
    ),
)

EXPERT_LINEAR = values.Op(
    values.Opset("teq_graph", 1),
    "ExpertLinear",
    _Schema(
        "ExpertLinear",
        "teq_graph",
        1,
        inputs=[
            _parameter("a", "T"),
            _parameter("experts", "I"),
            _parameter("weight", "T"),
            _parameter("bias", "T", optional=True),
        ],
        outputs=[_parameter("y", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("I", ["tensor(int64)"], ""),
        ],
        attributes=[_Schema.Attribute("num_experts", _INTEGER, "")],
    ),
)
EXPERT_MATMUL_NBITS = values.Op(
    values.Opset("teq_graph", 1),
    "ExpertMatMulNBits",
    _Schema(
        "ExpertMatMulNBits",
        "teq_graph",
        1,
        inputs=[
            _parameter("a", "T"),
            _parameter("experts", "I"),
            _parameter("b", "T1"),
            _parameter("scales", "T"),
            _parameter("zero_points", "T1", optional=True),
            _parameter("bias", "T", optional=True),
        ],
        outputs=[_parameter("y", "T")],
        type_constraints=[
            ("T", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
            ("T1", ["tensor(uint8)"], ""),
            ("I", ["tensor(int64)"], ""),
        ],
        attributes=[
            _Schema.Attribute(name, _INTEGER, "")
            for name in ("num_experts", "K", "N", "bits", "block_size", "accuracy_level")
        ],
    ),
)
"""Products of rows with the weights of their experts: what stands for them until each expert has its own product, see
`experts`; no model that is written has them."""

DEQUANTIZE_NBITS = values.Op(
    values.Opset("teq_graph", 1),
    "DequantizeNBits",
    _Schema(
        "DequantizeNBits",
        "teq_graph",
        1,
        inputs=[_parameter("data", "T1"), _parameter("scales", "T2"), _parameter("zero_points", "T1", optional=True)],
        outputs=[_parameter("output", "T2")],
        type_constraints=[
            ("T1", ["tensor(uint8)"], ""),
            ("T2", ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"], ""),
        ],
        attributes=[_Schema.Attribute(name, _INTEGER, "") for name in ("K", "N", "bits", "block_size")],
    ),
)
"""Codes in the layout of MatMulNBits as a matrix [N, K]: what stands for them until their numbers are there, see
`dequantized`; no model that is written has it."""
