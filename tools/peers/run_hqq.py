"""The package hqq: half-quadratic quantization, without calibration."""

from __future__ import annotations

import torch
from hqq.core.quantize import BaseQuantizeConfig, Quantizer
from job import Job, quantize_each, run
from torch import Tensor


def runner(job: Job) -> None:
    options = BaseQuantizeConfig(nbits=job.bits, group_size=job.group_size, axis=1)["weight_quant_params"]
    options.update(job.options, device="cpu", compute_dtype=torch.float32)

    def quantize(part: Tensor, group_size: int) -> Tensor:
        codes, meta = Quantizer.quantize(part, **{**options, "group_size": group_size})
        return Quantizer.dequantize(codes, {**meta, "compute_dtype": torch.float32})

    def by_row(weight: Tensor) -> Tensor:
        # It groups the flattened matrix, so that a shorter last group would run on into the next row.
        whole = weight.shape[1] // job.group_size * job.group_size
        parts = [(weight[:, :whole], job.group_size), (weight[:, whole:], weight.shape[1] - whole)]
        return torch.cat([quantize(part.contiguous(), size) for part, size in parts if part.shape[1]], dim=1)

    weights = quantize_each(job, by_row)
    job.finish(weights, notes=["zero points in float16"], zero_point_bits=16)


if __name__ == "__main__":
    run(runner)
