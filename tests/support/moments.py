"""Inputs of a linear, their second moments, and what quantization costs its outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from teq_graph.quantization import Grid, dequantize
from teq_graph.quantization.gptq import DAMPING


def correlated(rows: int, k: int) -> Tensor:
    """Inputs [rows, k] of a few strong directions and channels of different sizes."""
    mixed = torch.randn(rows, max(1, k // 4)) @ torch.randn(max(1, k // 4), k) + 0.3 * torch.randn(rows, k)
    return mixed * torch.randn(k).exp()


def moments_of(inputs: Tensor) -> Tensor:
    return inputs.T @ inputs / len(inputs)


def columns_of(grid: Grid, k: int) -> tuple[Tensor, Tensor]:
    """Scales and zero points of each column, float64 [N, k]."""
    of = torch.arange(k) // grid.block_size
    return grid.scales.double()[:, of], grid.zero_points_as_float().double()[:, of]


def damped_moments(moments: Tensor) -> Tensor:
    """Moments with what GPTQ adds to their diagonal, float64 [K, K]."""
    exact = moments.double()
    return exact + DAMPING * exact.diagonal().mean() * torch.eye(len(exact), dtype=torch.float64)


def output_error(weight: Tensor, codes: Tensor, grid: Grid, inputs: Tensor) -> float:
    lost = weight.double() - dequantize(codes, grid).double()
    return float((inputs.double() @ lost.T).square().sum())
