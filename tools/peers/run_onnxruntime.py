"""onnxruntime's weight quantizers: what `MatMulNBitsQuantizer` calls for each weight, without the graph around it."""

from __future__ import annotations

import numpy as np
import torch
from job import Job, quantize_each, run
from onnxruntime.quantization import matmul_nbits_quantizer as nbits
from onnxruntime.quantization.neural_compressor.weight_only import quant_tensor_k_quant_cpu
from torch import Tensor


def unpack(packed: np.ndarray, bits: int, count: int) -> np.ndarray:
    """Codes of `bits` bits, lowest first, of a byte array [N, ...]: [N, count]."""
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    codes = (packed.reshape(len(packed), -1, 1) >> shifts) & (2**bits - 1)
    return codes.reshape(len(packed), -1)[:, :count]


def dequantize(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray, k: int) -> Tensor:
    """[N, K] of codes [N, blocks * size], and scales and zero points [N, blocks]."""
    n, blocks = scales.shape
    values = (codes.reshape(n, blocks, -1).astype(np.float32) - zeros[..., None]) * scales[..., None]
    return torch.from_numpy(np.ascontiguousarray(values.reshape(n, -1)[:, :k].astype(np.float32)))


def runner(job: Job) -> None:
    bits, size, algorithm = job.bits, job.group_size, job.options["algorithm"]
    if algorithm == "rtn" and bits not in (2, 4, 8):
        raise ValueError("MatMulNBitsQuantizer: only 2, 4 or 8 bits")

    def rtn(weight: Tensor) -> Tensor:
        config = nbits.DefaultWeightOnlyQuantConfig(block_size=size, bits=bits)
        packed, scales, zeros = nbits.DefaultWeightOnlyQuantizer(config).qbits_block_quant(
            np.ascontiguousarray(weight.numpy().T)
        )
        blocks = scales.shape[1]
        return dequantize(
            unpack(packed, bits, blocks * size), scales, unpack(zeros, bits, blocks).astype(np.float32), weight.shape[1]
        )

    def hqq(weight: Tensor) -> Tensor:
        quantizer = nbits.HQQWeightOnlyQuantizer(nbits.HQQWeightOnlyQuantConfig(block_size=size, bits=bits))
        codes, scales, zeros = quantizer.quantize_internal(weight, bits=bits, group_size=size)
        return dequantize(codes.numpy(), scales.numpy(), zeros.numpy(), weight.shape[1])

    def k_quant(weight: Tensor) -> Tensor:
        n, k = weight.shape
        padded = torch.nn.functional.pad(weight, (0, -k % size)).numpy()
        codes, scales, zeros = quant_tensor_k_quant_cpu(padded, bits, size)
        return dequantize(codes, scales.reshape(n, -1), zeros.reshape(n, -1).astype(np.float32), k)

    weights = quantize_each(job, {"rtn": rtn, "hqq": hqq, "k_quant": k_quant}[algorithm])
    notes = []
    odd = any(-(-weight.shape[1] // size) % 2 for weight in weights.values())
    if algorithm == "k_quant" and (bits not in (4, 8) or (bits == 4 and odd)):  # 4-bit zero points are packed in pairs
        notes.append("its search called directly: its quantizer takes 8 bits, or 4 and an even number of groups")
    if algorithm == "hqq" and bits not in (2, 4, 8):
        notes.append("its solver called directly: its quantizer has it for 2, 4 and 8 bits only")
    if algorithm == "hqq":
        notes.append("zero points in float16")
    job.finish(weights, notes=notes, zero_point_bits=16 if algorithm == "hqq" else bits)


if __name__ == "__main__":
    run(runner)
