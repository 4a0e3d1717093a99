"""A quantized weight whose codes, scales and zero points are learned by gradient."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from teq_graph.quantization.codes import Codes
from teq_graph.quantization.grid import TILE, Grid, dequantize, round_scales, split_groups

MARGIN = 0.02
"""How far inside a code's interval its latent starts at least, in codes."""


@dataclasses.dataclass
class LearnedWeight:
    """A weight [N, K] as `(clamp(round(latent / e**a) + zero, 0, 2**bits - 1) - zero) * step * e**a`.

    All of `latent`, `log_scale` (a) and `zero` can be trained (`torch.Tensor.requires_grad_`); rounding counts as the
    identity in their gradients, and clamping as it is (LSQ, arXiv 1902.08153; AutoRound, arXiv 2309.05516, learns a
    bounded `latent` and the range; EfficientQAT, arXiv 2407.11062, all three).

    latent: float32 [N, nb, block_size], in units of `step`, so that one learning rate is as large for every group;
        zeros past K.
    log_scale: float32 [N, nb], zero at the start.
    zero: float32 [N, nb], rounded where it is used.
    step: float32 [N, nb], the scales at the start.
    """

    latent: Tensor
    log_scale: Tensor
    zero: Tensor
    step: Tensor
    k: int
    symmetric: bool
    bits: int
    block_size: int
    scale_dtype: torch.dtype
    levels: int | None = None

    @classmethod
    def start(cls, weight: Tensor, codes: Tensor, grid: Grid, scale_dtype: torch.dtype) -> LearnedWeight:
        """Begins at `codes` uint8 [N, K] of a weight [N, K]: as near to the weight as leaves them what they are."""
        zero = grid.zero_points_as_float()
        value = _grouped(codes.to(torch.float32), grid.block_size) - zero[..., None]
        latent = _grouped(weight.detach().to(torch.float32), grid.block_size) / grid.scales[..., None]
        reach = grid.codes.step / 2 - MARGIN
        latent = latent.clamp(value - reach, value + reach)
        latent.view(len(weight), -1)[:, weight.shape[1] :] = 0
        return cls(
            latent,
            torch.zeros_like(grid.scales),
            zero,
            grid.scales,
            weight.shape[1],
            grid.zero_points is None,
            grid.bits,
            grid.block_size,
            scale_dtype,
            grid.levels,
        )

    def value(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The quantized weight [N, K], rounded to `dtype`, differentiable."""
        apply: Callable[..., Tensor] = _Quantize.apply
        codes, dtypes = Codes.of(self.bits, self.levels), (self.scale_dtype, dtype)
        return apply(self.latent, self.log_scale, self.zero, self.step, codes, dtypes, self.k)

    @torch.no_grad()
    def result(self) -> tuple[Tensor, Grid]:
        """Codes uint8 [N, K] and their grid: `dequantize` of them is `value`."""
        scales = round_scales(self.step * self.log_scale.exp(), self.scale_dtype)
        codes = Codes.of(self.bits, self.levels)
        zero = self.zero.round().clamp(codes.first, codes.last)
        nearest = codes.nearest(self.latent * torch.exp(-self.log_scale)[..., None], zero[..., None])
        zero_points = None if self.symmetric else zero.to(torch.uint8)
        grid = Grid(scales, zero_points, self.bits, self.block_size, self.levels)
        return nearest.flatten(1)[:, : self.k].to(torch.uint8), grid


class ScaledCodes:
    """Codes uint8 [N, K] that stay, on a grid whose scales learn: `(code - zero) * scale * e**a`.

    log_scale: float32 [N, nb] (a), zero at the start.
    """

    def __init__(self, codes: Tensor, grid: Grid, scale_dtype: torch.dtype) -> None:
        self.codes, self.grid, self.scale_dtype = codes, grid, scale_dtype
        self.log_scale = torch.zeros_like(grid.scales)

    def value(self, dtype: torch.dtype) -> Tensor:
        """The weight [N, K], rounded to `dtype`, differentiable in `log_scale`."""
        apply: Callable[..., Tensor] = _Scale.apply
        return apply(self.log_scale, self.codes, self.grid, dtype)

    def result(self) -> tuple[Tensor, Grid]:
        """Codes and grid as they are now; scales rounded to their dtype."""
        scales = round_scales(self.grid.scales * self.log_scale.exp(), self.scale_dtype)
        return self.codes, dataclasses.replace(self.grid, scales=scales)


def _grouped(matrix: Tensor, block: int) -> Tensor:
    """A matrix [N, K] as [N, nb, block], zeros past K."""
    return torch.nn.functional.pad(matrix, (0, -matrix.shape[1] % block)).view(len(matrix), -1, block)


class _Scale(torch.autograd.Function):
    """The derivative of a weight by its group's a is the weight."""

    @staticmethod
    def forward(ctx: Any, log_scale: Tensor, codes: Tensor, grid: Grid, dtype: torch.dtype) -> Tensor:
        value = dequantize(codes, dataclasses.replace(grid, scales=grid.scales * log_scale.exp()))
        ctx.save_for_backward(value)
        ctx.block_size = grid.block_size
        return value.to(dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (value,) = ctx.saved_tensors
        groups = split_groups(grad.float() * value, ctx.block_size)
        return torch.cat([terms.sum(-1) for terms, _ in groups], 1), None, None, None


class _Quantize(torch.autograd.Function):
    """With t = latent / e**a, z the rounded zero and r = round(t), an element is, per unit of its scale step * e**a,

        kept      0 <= r + z <= top:   r,           d/dt = 1,  d/dz = 0
        clipped   otherwise:           its end - z, d/dt = 0,  d/dz = -1

    so that, with g the incoming gradient, dL/dlatent = g * scale / e**a where kept, dL/dzero the negative sum of
    g * scale where clipped, and dL/da the sum of g * value, less that of g * scale * t where kept. The scale is
    rounded to what storage holds, which counts as the identity too. `dtypes` are those of the scale and the value.
    """

    @staticmethod
    def forward(
        ctx: Any,
        latent: Tensor,
        log_scale: Tensor,
        zero: Tensor,
        step: Tensor,
        codes: Codes,
        dtypes: tuple[torch.dtype, torch.dtype],
        k: int,
    ) -> Tensor:
        exact = step * log_scale.exp()
        scale, shrink = round_scales(exact, dtypes[0]), torch.exp(-log_scale)
        zero = zero.round().clamp_(codes.first, codes.last)
        value = latent.new_empty(len(latent), k, dtype=dtypes[1])
        (scratch,) = _scratch(latent, 1)
        for rows in _row_runs(latent):
            x, z = scratch[: rows.stop - rows.start], zero[rows, :, None]
            codes.nearest(torch.mul(latent[rows], shrink[rows, :, None], out=x), z)
            value[rows] = x.sub_(z).mul_(scale[rows, :, None]).flatten(1)[:, :k]
        ctx.save_for_backward(latent, shrink, zero, exact, scale)
        ctx.codes = codes
        return value

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None, None]:
        latent, shrink, zero, exact, scale = ctx.saved_tensors
        codes = ctx.codes
        # Beyond the ends of the codes by half a step at most: what lies further is clipped.
        ends = (codes.first - codes.step / 2, codes.last + codes.step / 2)
        to_latent = torch.empty_like(latent)
        to_log, to_zero = torch.empty_like(scale), torch.empty_like(scale)
        scratch = _scratch(latent, 2)
        for rows in _row_runs(latent):
            (g, x), s, z, out = scratch[:, : rows.stop - rows.start], scale[rows], zero[rows], to_latent[rows]
            g.flatten(1)[:, : grad.shape[1]] = grad[rows]
            # Rounded once more: reading it from memory is slower than that.
            codes.round(torch.mul(latent[rows], shrink[rows, :, None], out=x), z[..., None])
            whole = g.sum(-1)
            torch.ops.aten.hardtanh_backward.grad_input(g, x, *ends, grad_input=out)
            to_zero[rows] = s * (out.sum(-1) - whole)
            of_value = x.clamp_(codes.first, codes.last).mul_(g).sum(-1) - z * whole
            of_latent = torch.mul(out, latent[rows], out=x).sum(-1)
            to_log[rows] = exact[rows] * of_value - of_latent * (s * shrink[rows])
            out.mul_((s * shrink[rows])[..., None])
        return to_latent, to_log, to_zero, None, None, None, None


def _row_runs(matrix: Tensor) -> list[slice]:
    """Runs of rows that stay in a core's cache over several elementwise passes."""
    rows = max(1, TILE // matrix[0].numel())
    return [slice(first, min(first + rows, len(matrix))) for first in range(0, len(matrix), rows)]


def _scratch(matrix: Tensor, count: int) -> Tensor:
    """So many arrays, zero at first, for the longest of its row runs."""
    return matrix.new_zeros(count, *matrix[_row_runs(matrix)[0]].shape)
