"""A quantized weight whose codes, scales and zero points are learned by gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teq_graph.quantization.grid import TILE, Grid, round_scales, split_groups

MARGIN = 0.01
"""How far inside a code's interval its latent starts at least, in codes."""


@dataclasses.dataclass
class LearnedWeight:
    """A weight [N, K] as `(clamp(round(latent / e**a) + zero, 0, 2**bits - 1) - zero) * step * e**a`.

    All of `latent`, `log_scale` (a) and `zero` can be trained (`torch.Tensor.requires_grad_`); rounding counts as the
    identity in their gradients, and clamping as it is (LSQ, arXiv 1902.08153; AutoRound, arXiv 2309.05516, learns a
    bounded `latent` and the range; EfficientQAT, arXiv 2407.11062, all three).

    latent: float32 [N, K], in units of `step`, so that one learning rate is as large for every group.
    log_scale: float32 [N, nb], zero at the start.
    zero: float32 [N, nb], rounded where it is used.
    step: float32 [N, nb], the scales at the start.
    """

    latent: Tensor
    log_scale: Tensor
    zero: Tensor
    step: Tensor
    symmetric: bool
    bits: int
    block_size: int
    scale_dtype: torch.dtype

    @classmethod
    def start(cls, weight: Tensor, codes: Tensor, grid: Grid, scale_dtype: torch.dtype) -> LearnedWeight:
        """Begins at `codes` uint8 [N, K] of a weight [N, K]: as near to the weight as leaves them what they are."""
        zero = grid.zero_points_as_float()
        latent = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        parts = (split_groups(tensor, grid.block_size) for tensor in (weight.detach().float(), codes, latent))
        for (groups, of), (code, _), (target, _) in zip(*parts, strict=True):
            value = code.to(torch.float32) - zero[:, of, None]
            torch.div(groups, grid.scales[:, of, None], out=target)
            target.clamp_(value - (0.5 - MARGIN), value + (0.5 - MARGIN))
        return cls(
            latent,
            torch.zeros_like(grid.scales),
            zero,
            grid.scales,
            grid.zero_points is None,
            grid.bits,
            grid.block_size,
            scale_dtype,
        )

    def value(self) -> Tensor:
        """The quantized weight, float32 [N, K], differentiable."""
        # The scales are what storage holds, and their rounding too counts as the identity.
        scale = self.step * self.log_scale.exp()
        scale = scale + (round_scales(scale.detach(), self.scale_dtype) - scale.detach())
        apply: Callable[..., Tensor] = _Quantize.apply
        return apply(self.latent, self.log_scale, scale, self.zero, self)

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Grid]:
        """Codes uint8 [N, K] and their grid: `dequantize` of them is `value`."""
        scales = round_scales(self.step * self.log_scale.exp(), self.scale_dtype)
        zero = self.zero.round().clamp(0, 2**self.bits - 1)
        codes = torch.empty(self.latent.shape, dtype=torch.uint8, device=self.latent.device)
        shrink = torch.exp(-self.log_scale)
        for (groups, of), (target, _) in zip(
            split_groups(self.latent, self.block_size), split_groups(codes, self.block_size), strict=True
        ):
            steps = (groups * shrink[:, of, None]).round_()
            target.copy_(steps.add_(zero[:, of, None]).clamp_(0, 2**self.bits - 1))
        return codes, Grid(scales, None if self.symmetric else zero.to(torch.uint8), self.bits, self.block_size)


class _Quantize(torch.autograd.Function):
    """With t = latent / e**a, z the rounded zero and r = round(t), an element is, per unit of its scale,

        kept      0 <= r + z <= top:   r,           d/dt = 1,  d/dz = 0
        clipped   otherwise:           its end - z, d/dt = 0,  d/dz = -1

    so that, with g the incoming gradient, dL/dlatent = g * scale / e**a where kept, dL/dzero the negative sum of
    g * scale where clipped, dL/dscale the sum of g * (value / scale), and dL/da (through t) minus that of
    g * scale * t where kept.
    """

    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, log_scale: Tensor, scale: Tensor, zero: Tensor, learned: LearnedWeight
    ) -> Tensor:
        shrink, last, block = torch.exp(-log_scale), 2**learned.bits - 1, learned.block_size
        zero = zero.round().clamp_(0, last)
        value = torch.empty_like(latent)
        kept = torch.empty(latent.shape, dtype=torch.bool, device=latent.device)
        for rows in _row_runs(latent):
            for (groups, of), (target, _), (inside, _) in zip(
                *(split_groups(matrix[rows], block) for matrix in (latent, value, kept)), strict=True
            ):
                z = zero[rows, of, None]
                torch.mul(groups, shrink[rows, of, None], out=target)
                target.round_().add_(z)
                codes = target.clamp(0, last)
                torch.eq(codes, target, out=inside)
                torch.mul(codes.sub_(z), scale[rows, of, None], out=target)
        ctx.save_for_backward(latent, shrink, scale, value, kept)
        ctx.block = block
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        latent, shrink, scale, value, kept = ctx.saved_tensors
        to_latent = torch.empty_like(latent)
        to_log, to_scale, to_zero = (torch.empty_like(scale) for _ in range(3))
        for rows in _row_runs(latent):
            for (g, of), (t, _), (v, _), (inside, _), (out, _) in zip(
                *(split_groups(matrix[rows], ctx.block) for matrix in (grad, latent, value, kept, to_latent)),
                strict=True,
            ):
                s, e = scale[rows, of], shrink[rows, of]
                torch.mul(g, inside, out=out)
                to_zero[rows, of] = s * (out.sum(-1) - g.sum(-1))
                to_scale[rows, of] = (g * v).sum(-1) / s
                out.mul_((s * e)[..., None])
                to_log[rows, of] = -(out * t).sum(-1)
        return to_latent, to_log, to_scale, to_zero, None


def _row_runs(matrix: Tensor) -> list[slice]:
    """Runs of rows that stay in a core's cache over several elementwise passes."""
    rows = max(1, TILE // matrix.shape[1])
    return [slice(first, first + rows) for first in range(0, matrix.shape[0], rows)]
