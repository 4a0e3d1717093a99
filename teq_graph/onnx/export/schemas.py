"""Operators of onnxruntime that the export writes, with their schemas.

Those of the domain `com.microsoft` are described in
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnxscript import values

CONTRIB_DOMAIN = "com.microsoft"
OWN_DOMAIN = "teq_graph"
"""Of what stands for something else until the export ends; no model that is written has it."""

_Schema = onnx.defs.OpSchema
_Kind = _Schema.AttrType
_TYPES = {
    "float": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"],
    "state": ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"],
    "codes": ["tensor(uint8)"],
    "int32": ["tensor(int32)"],
    "int64": ["tensor(int64)"],
    "index": ["tensor(int32)", "tensor(int64)"],
}


def _operator(
    domain: str,
    name: str,
    inputs: str,
    outputs: str,
    required: Sequence[str] = (),
    integers: Sequence[str] = (),
    floats: Sequence[str] = (),
    strings: Sequence[str] = (),
) -> values.Op:
    """An operator of version 1.

    `inputs` and `outputs` are `name:type`, with a type of `_TYPES`, and a `?` after what can be left out. `required`
    are integer attributes that each node has; the others can be left out.
    """
    parameters = [[_parameter(one) for one in described.split()] for described in (inputs, outputs)]
    types = dict.fromkeys(parameter.type_str for part in parameters for parameter in part)
    attributes = [_Schema.Attribute(one, _Kind.INT, "") for one in required]
    for names, kind in ((integers, _Kind.INT), (floats, _Kind.FLOAT), (strings, _Kind.STRING)):
        attributes += [_Schema.Attribute(one, kind, "", required=False) for one in names]
    constraints = [(one, _TYPES[one], "") for one in types]
    schema = _Schema(
        name,
        domain,
        1,
        inputs=parameters[0],
        outputs=parameters[1],
        type_constraints=constraints,
        attributes=attributes,
    )
    return values.Op(values.Opset(domain, 1), name, schema)


def _parameter(described: str) -> onnx.defs.OpSchema.FormalParameter:
    name, kind = described.removesuffix("?").split(":")
    options = _Schema.FormalParameterOption
    return _Schema.FormalParameter(
        name, kind, param_option=options.Optional if described.endswith("?") else options.Single
    )


MATMUL_NBITS = _operator(
    CONTRIB_DOMAIN,
    "MatMulNBits",
    "A:float B:codes scales:float zero_points:codes? g_idx:int32? bias:float?",
    "Y:float",
    required=("K", "N", "block_size"),
    integers=("bits", "accuracy_level"),
)

GROUP_QUERY_ATTENTION = _operator(
    CONTRIB_DOMAIN,
    "GroupQueryAttention",
    "query:float key:float? value:float? past_key:float? past_value:float? seqlens_k:int32 "
    "total_sequence_length:int32 cos_cache:float? sin_cache:float? position_ids:int64? attention_bias:float?",
    "output:float present_key:float present_value:float",
    required=("num_heads", "kv_num_heads"),
    integers=("do_rotary", "rotary_interleaved", "local_window_size"),
    floats=("scale", "softcap"),
)

GATHER_BLOCK_QUANTIZED = _operator(
    CONTRIB_DOMAIN,
    "GatherBlockQuantized",
    "data:codes indices:index scales:float zero_points:codes?",
    "output:float",
    integers=("gather_axis", "quantize_axis", "block_size", "bits"),
)

QMOE = _operator(
    CONTRIB_DOMAIN,
    "QMoE",
    "input:float router_probs:float "
    "fc1_experts_weights:codes fc1_scales:float? fc1_experts_bias:float? "
    "fc2_experts_weights:codes fc2_scales:float? fc2_experts_bias:float? "
    "fc3_experts_weights:codes? fc3_scales:float? fc3_experts_bias:float? "
    "fc1_zero_points:codes? fc2_zero_points:codes? fc3_zero_points:codes? router_weights:float?",
    "output:float",
    integers=(
        *("k", "block_size", "expert_weight_bits", "fc1_expert_weight_bits", "fc2_expert_weight_bits"),
        *("swiglu_fusion", "normalize_routing_weights", "weights_prepacked", "accuracy_level"),
    ),
    floats=("activation_alpha", "activation_beta", "swiglu_limit"),
    strings=("activation_type",),
)

LINEAR_ATTENTION = _operator(
    CONTRIB_DOMAIN,
    "LinearAttention",
    "query:float key:float value:float past_state:state? decay:float? beta:float?",
    "output:float present_state:state",
    required=("q_num_heads", "kv_num_heads"),
    floats=("scale",),
    strings=("update_rule",),
)

EXPERT_LINEAR = _operator(
    OWN_DOMAIN,
    "ExpertLinear",
    "a:float experts:int64 weight:float bias:float?",
    "y:float",
    required=("num_experts",),
)
EXPERT_MATMUL_NBITS = _operator(
    OWN_DOMAIN,
    "ExpertMatMulNBits",
    "a:float experts:int64 b:codes scales:float zero_points:codes? bias:float?",
    "y:float",
    required=("num_experts", "K", "N", "bits", "block_size", "accuracy_level"),
)
"""Products of rows with the weights of their experts: what stands for them until each expert has its own product, see
`experts`."""

DEQUANTIZE_NBITS = _operator(
    OWN_DOMAIN,
    "DequantizeNBits",
    "data:codes scales:float zero_points:codes?",
    "output:float",
    required=("K", "N", "bits", "block_size"),
)
"""Codes in the layout of MatMulNBits as a matrix [N, K]: what stands for them until their numbers are there, see
`dequantized`."""


def given(*inputs: Any) -> list[Any]:
    """Inputs of a node, without those at the end that are None."""
    kept = list(inputs)
    while kept and kept[-1] is None:
        kept.pop()
    return kept
