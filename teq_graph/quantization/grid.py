"""Reference mathematics of group-wise quantization: grids, codes, and their straight-through gradient.

Along K, each `block_size` elements of a weight [N, K] share a scale and a zero point, and

    w = (q - zero_point) * scale,    q = clamp(round(w / scale) + zero_point, 0, 2**bits - 1),

which is what com.microsoft::MatMulNBits computes. Where K is no multiple of the block, the last group is
shorter; nothing here sees padding. Grids of two or three `levels` use some of the codes of 2 bits (`Codes`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from teq_graph.config import WeightSpec
from teq_graph.errors import ConfigError, InputError, NumericsError
from teq_graph.quantization.codes import Codes

SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TILE = 2**18
"""Elements that are worked on at once: 1 MiB of float32."""

Gradient = Literal["identity", "range"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that codes stand for.

    scales: float32 [N, nb], finite and not zero; a negative scale is legal.
    zero_points: uint8 [N, nb]; None for symmetric codes, whose zero point is `2**(bits - 1)`.
    levels: how many of the codes are used; None for all of them.
    """

    scales: Tensor
    zero_points: Tensor | None
    bits: int
    block_size: int
    levels: int | None = None

    @property
    def codes(self) -> Codes:
        """The codes that may be used."""
        return Codes.of(self.bits, self.levels)

    @classmethod
    def cat(cls, grids: Sequence[Grid]) -> Grid:
        """The grid of all rows, one after the other, of grids with the same codes and blocks."""
        zeros = [grid.zero_points for grid in grids if grid.zero_points is not None]
        scales = torch.cat([grid.scales for grid in grids])
        return dataclasses.replace(grids[0], scales=scales, zero_points=torch.cat(zeros) if zeros else None)

    def split(self, sizes: Sequence[int]) -> list[Grid]:
        """The grids of runs of so many rows each: `cat` puts them together again."""
        zeros = [None] * len(sizes) if self.zero_points is None else self.zero_points.split(list(sizes))
        scales = self.scales.split(list(sizes))
        return [dataclasses.replace(self, scales=s, zero_points=z) for s, z in zip(scales, zeros, strict=True)]

    def zero_points_as_float(self) -> Tensor:
        """Zero points, float32 [N, nb], also where they are implied."""
        if self.zero_points is None:
            return torch.full_like(self.scales, 2 ** (self.bits - 1))
        return self.zero_points.to(torch.float32)


def resolve_block_size(k: int, group_size: int) -> int:
    """Elements per block of a row of `k` elements: `group_size`, or for -1 `k` rounded up to a multiple of 8."""
    if k < 1:
        raise InputError(f"K={k}: accepted are integers >= 1")
    return -(-k // 8) * 8 if group_size == -1 else group_size


def num_blocks(k: int, block: int) -> int:
    """Blocks per row of `k` elements, the last one maybe shorter."""
    return -(-k // block)


def round_scales(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Round scales to values that `dtype` holds, never to zero: float32 of the same shape.

    Zero becomes 1 (an all-zero group), and magnitudes below the normal numbers the smallest normal one; float16,
    whose normal numbers start at 6e-5, keeps subnormals. Where rounding to nearest could move the ends of a group
    by half a code (all of bfloat16, subnormal float16) it is away from zero, so that no group outgrows its codes.
    """
    if dtype not in SCALE_DTYPES:
        raise ConfigError(f"scale_dtype={dtype}: accepted are float32, float16 and bfloat16")
    normal = torch.finfo(dtype).smallest_normal
    magnitude = scales.abs()
    if dtype == torch.float16:
        quantum = normal * torch.finfo(dtype).eps
        magnitude = torch.where(magnitude < normal, (magnitude / quantum).ceil() * quantum, magnitude).to(dtype)
    elif dtype == torch.bfloat16:
        exact = magnitude.clamp(min=normal)
        magnitude = exact.to(dtype)
        above = torch.nextafter(magnitude, torch.full_like(magnitude, torch.inf))
        magnitude = torch.where(magnitude < exact, above, magnitude)
    else:
        magnitude = magnitude.clamp(min=normal)
    return torch.where(scales == 0, 1.0, torch.copysign(magnitude.to(torch.float32), scales))


def find_grid(weight: Tensor, spec: WeightSpec, scale_dtype: torch.dtype = torch.float32, part: float = 1.0) -> Grid:
    """The round-to-nearest grid of a weight [N, K], over the given `part` of each group's range.

    Asymmetric: `scale = (max - min) / (2**bits - 1)` and `zero_point = round(-min / scale)`, where max and min
    include 0. Symmetric: `scale = extreme / -2**(bits - 1)`, where extreme is the signed value of the largest
    magnitude, so that it is exact and the scale may be negative (as in llama.cpp's Q4_0 and onnxruntime).
    Two or three levels: `find_least_squares_grid`.
    Scales are representable in `scale_dtype`, in which they are to be stored.

    Raises InputError for a weight that is not a floating-point matrix, NumericsError for NaN, infinity, scales that
    overflow `scale_dtype`, and codes that would stand for infinity.
    """
    if spec.levels is not None:
        return find_least_squares_grid(weight, spec, scale_dtype)
    _check_weight(weight)
    block = resolve_block_size(weight.shape[1], spec.group_size)
    fits = [
        _fit(groups, spec, scale_dtype, part) for groups, _ in split_groups(weight.detach().to(torch.float32), block)
    ]
    scales = torch.cat([fit.scale for fit in fits], dim=1)
    # A scale that is rounded up can take the outermost code past the largest number.
    outermost = 2 ** (spec.bits - 1) if spec.symmetric else 2**spec.bits - 1
    _check_finite(weight, scales * outermost, scale_dtype)
    zero_points = None if spec.symmetric else torch.cat([fit.zero for fit in fits], dim=1).to(torch.uint8)
    return Grid(scales, zero_points, spec.bits, block)


def find_least_squares_grid(
    weight: Tensor, spec: WeightSpec, scale_dtype: torch.dtype = torch.float32, importance: Tensor | None = None
) -> Grid:
    """The grid of two or three levels of least squared error to a weight [N, K], each column weighted by its
    `importance` [K] or [N, K] >= 0; all count alike where it is None. Raises as `find_grid` does."""
    assert spec.levels is not None
    _check_weight(weight)
    block = resolve_block_size(weight.shape[1], spec.group_size)
    source = weight.detach().to(torch.float32)
    columns = torch.ones_like(source[:1]) if importance is None else torch.atleast_2d(importance).to(source)
    pairs = zip(split_groups(source, block), split_groups(columns, block), strict=True)
    fits = [_least_squares(groups, share, spec.levels, scale_dtype) for (groups, _), (share, _) in pairs]
    scales = torch.cat(fits, dim=1)
    _check_finite(weight, scales, scale_dtype)
    return Grid(scales, None, spec.bits, block, spec.levels)


def _least_squares(groups: Tensor, share: Tensor, levels: int, dtype: torch.dtype) -> Tensor:
    """The scale of groups [N, g, B], of which each element counts by its `share`: [N, g].

    Where S are the elements that get +-scale and the others 0, the best scale is the mean of |w| over S, and takes
    (sum of share |w|)^2 / (sum of share) off the error. Codes are nearest where S are the largest magnitudes, so the
    optimum is the best number of these (arXiv 1605.04711 approximates it). With two levels S is everything (arXiv
    1603.05279).
    """
    sizes, order = groups.abs().sort(dim=-1, descending=True)
    share = share.expand_as(groups).gather(-1, order).clamp_(min=1e-12)
    total = share.cumsum(-1)
    # Sums of squares of the largest numbers would overflow.
    unit = sizes[..., :1].clamp(min=torch.finfo(torch.float32).smallest_normal)
    weighted = (sizes / unit).mul_(share).cumsum(-1)
    if levels == 3:
        best = (weighted / total.sqrt()).argmax(-1, keepdim=True)
        weighted, total = weighted.gather(-1, best), total.gather(-1, best)
    scale = weighted[..., -1] / total[..., -1] * unit[..., 0]
    # Two levels are never 0: in a group of zeros they are as small as can be.
    return round_scales(torch.where(scale == 0, torch.finfo(dtype).smallest_normal, scale), dtype)


def quantize(weight: Tensor, grid: Grid) -> Tensor:
    """The nearest code of each element of a weight [N, K]: uint8 [N, K]."""
    _check_weight(weight)
    _check_grid(weight, grid)
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    zeros = grid.zero_points_as_float()
    source = weight.detach().to(torch.float32)
    for (groups, of), (target, _) in zip(
        split_groups(source, grid.block_size), split_groups(codes, grid.block_size), strict=True
    ):
        target.copy_(grid.codes.nearest(groups / grid.scales[:, of, None], zeros[:, of, None]))
    return codes


def dequantize(codes: Tensor, grid: Grid) -> Tensor:
    """The values of codes uint8 [N, K]: float32 [N, K]."""
    _check_grid(codes, grid)
    weight = codes.to(torch.float32)
    zeros = grid.zero_points_as_float()
    for groups, of in split_groups(weight, grid.block_size):
        groups.sub_(zeros[:, of, None]).mul_(grid.scales[:, of, None])
    return weight


def fake_quantize(
    weight: Tensor,
    spec: WeightSpec,
    gradient: Gradient = "range",
    scale_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """A weight [N, K] rounded to its own round-to-nearest grid, differentiable; the weight's dtype.

    Equals `dequantize(quantize(weight, grid), grid)` with `grid = find_grid(weight, spec, scale_dtype)`. NaN and
    infinity pass through, as in any operation of a training step.

    `gradient`: `"identity"` passes the gradient unchanged, as TEQ does (arXiv 2310.10944, section 3);
    `"range"` is the exact gradient with only rounding taken as the identity, so it also moves the elements
    that set a group's range (shared evenly among equal ones), see `_range_gradient`.
    """
    _check_weight(weight)
    if gradient not in ("identity", "range"):
        raise ConfigError(f'gradient={gradient!r}: accepted are "identity" and "range"')
    if spec.levels is not None:
        return _fake_quantize_few(weight.float(), spec, spec.levels, gradient, scale_dtype).to(weight.dtype)
    # Casts and copies stay outside, so that autograd owns them.
    apply: Callable[..., Tensor] = _FakeQuantize.apply
    rounded = apply(weight.to(torch.float32).contiguous(), spec, gradient, scale_dtype)
    return rounded.to(weight.dtype)


@dataclasses.dataclass(frozen=True)
class _Fit:
    """The grid of some groups and what it comes from; all float32 [N, g]."""

    scale: Tensor
    zero: Tensor
    low: Tensor
    high: Tensor
    slope: Tensor
    """d(scale) / d(high) if asymmetric, d(scale) / d(extreme) if symmetric; 0 where the scale is a bound."""


def _fit(groups: Tensor, spec: WeightSpec, dtype: torch.dtype, part: float = 1.0) -> _Fit:
    # amin and amax are each vectorised along K; aminmax is not (twenty times slower).
    low, high = groups.amin(dim=-1).clamp_(max=0), groups.amax(dim=-1).clamp_(min=0)
    if part != 1:
        low, high = low * part, high * part
    levels = 2**spec.bits - 1
    middle = 2 ** (spec.bits - 1)
    ideal = torch.where(high > -low, high, low) / -middle if spec.symmetric else (high - low) / levels
    scale = round_scales(ideal, dtype)
    zero = torch.full_like(scale, middle) if spec.symmetric else (low / -scale).round_().clamp_(0, levels)
    # Rounding counts as the identity here too, but a bound (1 for an all-zero group, the smallest scale) is constant.
    moves = ideal.abs() >= torch.finfo(dtype).smallest_normal
    slope = torch.where(moves, -1.0 / middle if spec.symmetric else 1.0 / levels, 0.0)
    return _Fit(scale, zero, low, high, slope)


class _FakeQuantize(torch.autograd.Function):
    """Keeps its input and output, which a linear layer keeps anyway, and a few numbers per group."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, spec: WeightSpec, gradient: Gradient, dtype: torch.dtype) -> Tensor:
        block = resolve_block_size(weight.shape[1], spec.group_size)
        rounded = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)
        fits = []
        for groups, target in zip(_tiles(weight, block), _tiles(rounded, block), strict=True):
            fit = _fit(groups, spec, dtype)
            torch.div(groups, fit.scale[..., None], out=target)
            # A group's low end never rounds below code 0; its high end can round past the last code.
            top = (2**spec.bits - 1) - fit.zero
            torch.minimum(target.round_(), top[..., None], out=target)
            target.mul_(fit.scale[..., None])
            fits.append(fit)
        ctx.spec, ctx.block, ctx.gradient = spec, block, gradient
        if gradient == "range":
            ctx.fits = fits
            ctx.save_for_backward(weight, rounded)
        return rounded

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        if ctx.gradient == "identity":
            return grad, None, None, None
        weight, rounded = ctx.saved_tensors
        result = torch.empty(weight.shape, dtype=grad.dtype, device=grad.device)
        tiles = zip(*(_tiles(matrix, ctx.block) for matrix in (grad, weight, rounded, result)), strict=True)
        for (g, w, r, out), fit in zip(tiles, ctx.fits, strict=True):
            _range_gradient(g, w, r, out, fit, ctx.spec)
        return result, None, None, None


def _range_gradient(grad: Tensor, weight: Tensor, rounded: Tensor, out: Tensor, fit: _Fit, spec: WeightSpec) -> None:
    """Write to `out` the gradient of the groups `weight` [N, g, B], given that of their `rounded` values.

    With u = w / s, p = -low / s, r = round(u), z = round(p), top = 2**bits - 1 - z, an element is

        kept      r <= top:   s * r,          d/dw = 1,  d/ds = r - u
        clipped   r >  top:   s * top,        d/dw = 0,  d/ds = top + p,  d/dlow = 1    asymmetric (z moves)
                                                         d/ds = top                     symmetric (z is fixed)

    so that, with g the incoming gradient and c its sum over a group's clipped elements,

        s * dL/ds = sum over kept of g * (s * r - w)  +  c * (s * top - base),   base = low or 0

    and s passes it on to the elements that attain high and low (asymmetric) or the extreme (symmetric).
    """
    scale, low, high = fit.scale, fit.low, fit.high
    top = (2**spec.bits - 1) - fit.zero
    work = torch.sub(rounded, weight)
    clips = (torch.maximum(high / scale, low / scale).round_() > top).any()
    if bool(clips):
        kept = (weight / scale[..., None]).round_()
        torch.mul(grad, kept.le_(top[..., None]), out=out)
        clipped = grad.sum(dim=-1) - out.sum(dim=-1)
        to_scale = work.mul_(out).sum(dim=-1)
        to_scale += clipped * (scale * top if spec.symmetric else scale * top - low)
    else:
        out.copy_(grad)
        clipped = torch.zeros_like(scale)
        to_scale = work.mul_(grad).sum(dim=-1)
    to_range = to_scale / scale * fit.slope
    if spec.symmetric:
        _add_where_equal(out, weight, torch.where(high > -low, high, low), to_range, work)
    else:
        # A bound at 0 is not an element: ends that are set by it get nothing, and zeros elsewhere are no ends.
        _add_where_equal(out, weight, high, to_range * (high > 0), work)
        _add_where_equal(out, weight, low, (clipped * (fit.slope != 0) - to_range) * (low < 0), work)


def _add_where_equal(out: Tensor, weight: Tensor, bound: Tensor, amount: Tensor, work: Tensor) -> None:
    """Share `amount` [N, g] evenly among the elements of each group of `weight` that equal `bound`."""
    # Comparing into floats is vectorised, into booleans it is not (seven times slower); indices are slower still.
    torch.eq(weight, bound[..., None], out=work)
    share = amount / work.sum(dim=-1).clamp_(min=1)
    out.addcmul_(work, share[..., None])


def _fake_quantize_few(weight: Tensor, spec: WeightSpec, levels: int, gradient: Gradient, dtype: torch.dtype) -> Tensor:
    """`fake_quantize` to two or three levels: what is kept passes its gradient on as it is, what is clipped to its
    scale, and that to the elements that it is the mean of."""
    codes, middle = Codes.of(spec.bits, levels), torch.tensor(2.0 ** (spec.bits - 1))
    results = []
    for groups, _ in split_groups(weight, resolve_block_size(weight.shape[1], spec.group_size)):
        with torch.no_grad():
            scale = _least_squares(groups, torch.ones_like(groups[:1, :1]), levels, dtype)[..., None]
            near = codes.round(groups / scale, middle)
            kept = near == near.clamp(codes.first, codes.last)
            signs = near.clamp_(codes.first, codes.last).sub_(middle)
            rounded = signs * scale
            error = torch.where(kept, signs - groups / scale, signs)
        moving = (signs / signs.square().sum(-1, keepdim=True).clamp(min=1) * groups).sum(-1, keepdim=True)
        through = (groups,) if gradient == "identity" else (kept * groups, error * moving)
        results.append(sum((part - part.detach() for part in through), rounded).flatten(1))
    return torch.cat(results, dim=1)


def split_groups(matrix: Tensor, block: int) -> Iterator[tuple[Tensor, slice]]:
    """Views [N, g, B] of [N, K], and the blocks they are: the whole blocks, then the shorter last one."""
    k = matrix.shape[1]
    whole = k // block
    if whole:
        yield matrix[:, : whole * block].view(-1, whole, block), slice(0, whole)
    if k % block:
        yield matrix[:, None, whole * block :], slice(whole, whole + 1)


def _tiles(matrix: Tensor, block: int) -> Iterator[Tensor]:
    """The views of `split_groups` in runs of rows that stay in a core's cache over several elementwise passes."""
    for rows in torch.split(matrix, max(1, TILE // matrix.shape[1])):
        for groups, _ in split_groups(rows, block):
            yield groups


def _check_weight(weight: Tensor) -> None:
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise InputError(f"weight {tuple(weight.shape)} {weight.dtype}: accepted are floating-point [N, K], not empty")


def _check_finite(weight: Tensor, values: Tensor, scale_dtype: torch.dtype) -> None:
    if not bool(values.isfinite().all()):
        raise NumericsError(
            f"weight {tuple(weight.shape)}: NaN or infinity in the weight, its {scale_dtype} scales or the values "
            "of its codes; accepted are finite numbers"
        )


def _check_grid(matrix: Tensor, grid: Grid) -> None:
    expected = (matrix.shape[0], num_blocks(matrix.shape[-1], grid.block_size)) if matrix.ndim == 2 else None
    if tuple(grid.scales.shape) != expected:
        raise InputError(
            f"matrix {tuple(matrix.shape)}, grid scales {tuple(grid.scales.shape)}, block_size={grid.block_size}: "
            "accepted are [N, K] and [N, ceil(K / block_size)]"
        )
