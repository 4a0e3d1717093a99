"""Codes as the tensors of other packages' formats, and what each format cannot hold.

Both formats pack unsigned codes as bit streams of 32-bit words, lowest bits first; a weight is
`(code - zero_point) * scale` with one scale for each group of input channels.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

import teq_graph
from teq_graph.config import QuantizationConfig, WeightSpec
from teq_graph.errors import ConfigError
from teq_graph.quantization import QuantizedWeight
from teq_graph.quantization.packing import pack_words

_UNIFORM = "the same bits, group_size and symmetric for all linears"


class Format(abc.ABC):
    """One format. `scale_dtype`: what it stores scales in, None the dtype of the model's weights."""

    name: str
    scale_dtype: torch.dtype | None = None

    @abc.abstractmethod
    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        """What takes the place of a linear's weight, by the names of the linear's own tensors."""

    @abc.abstractmethod
    def configuration(self, specs: Mapping[str, WeightSpec], in_float: Iterable[str]) -> dict[str, Any]:
        """`quantization_config` of config.json, for the linears that are quantized and those that are not."""

    def check_specs(self, specs: Iterable[WeightSpec]) -> None:  # noqa: B027  most formats hold any side by side
        """Raise ConfigError for weights that the format cannot hold side by side."""

    def check_shape(self, name: str, n: int, k: int, spec: WeightSpec) -> None:  # noqa: ARG002
        """Raise ConfigError for a linear [n, k] that the format cannot hold."""
        if spec.group_size > 0 and k % spec.group_size:
            accepted = f"rows of whole groups, here group_size -1 or one that divides {k}"
            raise self.refusal(f"{name} has a short group, {k} columns of group_size {spec.group_size}", accepted)

    def refusal(self, what: str, accepted: str) -> ConfigError:
        """The error that says what the format does not hold."""
        return ConfigError(f"format {self.name}: {what}; accepted are {accepted}")


class GPTQ(Format):
    """qweight int32 [K * bits / 32, N], qzeros int32 [groups, N * bits / 32], scales float16 [groups, N], g_idx [K].

    Version 1 stores zero points less one, which a zero point of 0 wraps around in: symmetric weights, whose zero point
    is in the middle, are written in it, as more readers have it; others in version 2, which stores them as they are.
    """

    name = "gptq"
    scale_dtype = torch.float16

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        codes, grid = weight.to_codes()
        zero_points = grid.zero_points
        if zero_points is None:
            zero_points = torch.full(weight.scales.shape, 2 ** (weight.bits - 1) - 1, dtype=torch.uint8)
        return {
            "qweight": pack_words(codes, weight.bits).t().contiguous(),
            "qzeros": pack_words(zero_points.t().contiguous(), weight.bits),
            "scales": weight.scales.t().to(torch.float16).contiguous(),
            "g_idx": (torch.arange(weight.k) // weight.block_size).to(torch.int32),
        }

    def configuration(self, specs: Mapping[str, WeightSpec], in_float: Iterable[str]) -> dict[str, Any]:  # noqa: ARG002
        spec = next(iter(specs.values()))
        return {
            "quant_method": self.name,
            "bits": spec.bits,
            "group_size": spec.group_size,
            "sym": spec.symmetric,
            "desc_act": False,
            "lm_head": False,
            "checkpoint_format": "gptq" if spec.symmetric else "gptq_v2",
            "meta": {"quantizer": [f"teq_graph:{teq_graph.__version__}"]},
        }

    def check_specs(self, specs: Iterable[WeightSpec]) -> None:
        found = list(dict.fromkeys(map(str, specs)))
        if len(found) > 1:
            raise self.refusal(f"{' and '.join(found[:2])} are mixed", _UNIFORM)

    def check_shape(self, name: str, n: int, k: int, spec: WeightSpec) -> None:
        super().check_shape(name, n, k, spec)
        if n % 32 or k % 32:
            raise self.refusal(f"{name} is {n} × {k}", "rows and columns in multiples of 32")


class CompressedTensors(Format):
    """`pack-quantized`: weight_packed int32 [N, ceil(K * bits / 32)], weight_scale [N, groups], weight_shape [2] and,
    unless symmetric, weight_zero_point int32 [ceil(N * bits / 32), groups]."""

    name = "compressed-tensors"

    def tensors(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        codes, grid = weight.to_codes()
        tensors = {
            "weight_packed": pack_words(codes, weight.bits),
            "weight_scale": weight.scales.contiguous(),
            "weight_shape": torch.tensor([weight.n, weight.k]),
        }
        if grid.zero_points is not None:
            zero_points = pack_words(grid.zero_points.t().contiguous(), weight.bits)
            tensors["weight_zero_point"] = zero_points.t().contiguous()
        return tensors

    def configuration(self, specs: Mapping[str, WeightSpec], in_float: Iterable[str]) -> dict[str, Any]:
        kinds = list(dict.fromkeys(specs.values()))
        groups = {}
        for number, kind in enumerate(kinds):
            # Of one kind: all linears, as readers that join projections into one know best.
            names = [f"re:^{re.escape(name)}$" for name, spec in specs.items() if spec == kind]
            per_channel = kind.group_size == -1
            groups[f"group_{number}"] = {
                "targets": ["Linear"] if len(kinds) == 1 else names,
                "weights": {
                    "num_bits": kind.bits,
                    "type": "int",
                    "symmetric": kind.symmetric,
                    "strategy": "channel" if per_channel else "group",
                    "group_size": None if per_channel else kind.group_size,
                    "dynamic": False,
                },
            }
        return {
            "quant_method": self.name,
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": list(in_float),
        }


BY_NAME: Mapping[str, Format] = {format_.name: format_ for format_ in (GPTQ(), CompressedTensors())}


def check_quantization(names: Iterable[str], quantization: QuantizationConfig) -> None:
    """Raise ConfigError where no model that is quantized so fits the formats."""
    for name in names:
        format_ = BY_NAME[name]
        if quantization.quantize_embedding:
            raise format_.refusal("quantize_embedding is set", "linears")
        if isinstance(format_, GPTQ) and quantization.quantize_lm_head:
            raise format_.refusal("quantize_lm_head is set", "the linears of blocks")
        if isinstance(format_, GPTQ) and quantization.target_bits is not None:
            raise format_.refusal(f"target_bits={quantization.target_bits:g} mixes bits", _UNIFORM)


def check_linears(names: Iterable[str], model: Any, quantization: QuantizationConfig) -> None:
    """Raise ConfigError for a linear of a Hugging Face model that a format cannot hold as `quantization` has it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for format_ in (BY_NAME[name] for name in names):
        specs = []
        for name, module in model.named_modules():
            if isinstance(module, Conv1D):
                raise format_.refusal(f"{name} is a Conv1D of transformers", "torch.nn.Linear")
            if not isinstance(module, nn.Linear) or (module is head and not quantization.quantize_lm_head):
                continue
            if module is head and module.weight is model.get_input_embeddings().weight:
                raise format_.refusal(f"{name} is tied to the embedding", "a projection of its own, or one in float")
            spec = quantization.spec_for(f"{name}.weight")
            if spec is None and isinstance(format_, GPTQ):
                raise format_.refusal(f"{name} is left in float", "all linears of blocks")
            if spec is not None:
                n, k = module.weight.shape
                format_.check_shape(name, n, k, spec)
                specs.append(spec)
        format_.check_specs(specs)
