"""The torch operators of the compiled graph, registered here and nowhere else.

    teq_graph::matmul_nbits      a [..., K] times a quantized weight [N, K], plus bias
    teq_graph::dequantize_nbits  a quantized weight [N, K] as floats
    teq_graph::embedding_nbits   rows of a quantized table [V, D], by indices [...]: [..., D]
    teq_graph::expert_linear        each row [K] times the matrix of its expert, plus its bias
    teq_graph::expert_matmul_nbits  the same with quantized matrices
    teq_graph::expert_mixture_nbits  two of those, an activation between them, and the weighted sum of a token's experts
    teq_graph::linear_attention  attention over a state of one size, see `teq_graph.ops.linear_attention`
    teq_graph::group_query_attention  causal attention over a KV cache, see `teq_graph.ops.group_query_attention`

Storage is that of com.microsoft::MatMulNBits (see `teq_graph.quantization.weight.QuantizedWeight`). All but
`expert_linear` and `linear_attention` are for inference: a backward pass through them raises KernelError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from teq_graph.config import BITS
from teq_graph.errors import InputError, KernelError
from teq_graph.ops.expert_linear import (
    check_expert_linear,
    check_experts,
    expert_linear,
    expert_linear_backward,
    for_each_expert,
    remember,
)
from teq_graph.ops.expert_mixture import activate, expert_mixture
from teq_graph.ops.group_query_attention import group_query_attention
from teq_graph.ops.linear_attention import check_linear_attention, linear_attention, linear_attention_backward
from teq_graph.ops.linear_attention import remember as remember_attention
from teq_graph.quantization.grid import SCALE_DTYPES, num_blocks
from teq_graph.quantization.weight import dequantize_rows

_CHUNK = {"cpu": 2**19, "cuda": 2**24}
"""Weights that are dequantized at once: 2 MiB of float32, which a core's cache holds, and 64 MiB."""

_WEIGHT = "Tensor b, Tensor scales, Tensor? zero_points"
_SIZES = "int K, int N, int bits, int block_size"
_SCHEMAS = {
    "matmul_nbits": f"(Tensor a, {_WEIGHT}, Tensor? bias, {_SIZES}) -> Tensor",
    "dequantize_nbits": f"({_WEIGHT}, {_SIZES}) -> Tensor",
    "embedding_nbits": f"(Tensor indices, {_WEIGHT}, int D, int bits, int block_size) -> Tensor",
    "expert_linear": "(Tensor input, Tensor weight, Tensor? bias, Tensor experts, int num_experts) -> Tensor",
    "expert_matmul_nbits": f"(Tensor a, {_WEIGHT}, Tensor? bias, Tensor experts, {_SIZES}, int num_experts) -> Tensor",
    "expert_mixture_nbits": (
        "(Tensor x, Tensor chosen, Tensor weights, Tensor b1, Tensor scales1, Tensor? zero_points1, Tensor? bias1, "
        "Tensor b2, Tensor scales2, Tensor? zero_points2, Tensor? bias2, int K, int N1, int I, int N, int bits1, "
        "int bits2, int block_size, int num_experts, str activation, float alpha, float beta, float? limit) -> Tensor"
    ),
    "linear_attention": (
        "(Tensor query, Tensor key, Tensor value, Tensor decay, Tensor? beta, Tensor state, float scale) "
        "-> (Tensor, Tensor)"
    ),
    "group_query_attention": (
        "(Tensor query, Tensor? key, Tensor? value, Tensor past_key, Tensor past_value, Tensor bias, Tensor? cos, "
        "Tensor? sin, int num_heads, int kv_num_heads, float scale, float softcap, int window, bool interleaved) "
        "-> (Tensor, Tensor, Tensor)"
    ),
}


def _check_weight(b: Tensor, scales: Tensor, zero_points: Tensor | None, k: int, n: int, bits: int, block: int) -> None:
    if bits not in BITS:
        raise InputError(f"bits={bits}: accepted are {BITS}")
    if block < 8 or block % 8 or k < 1 or n < 1:
        raise InputError(f"K={k}, N={n}, block_size={block}: accepted are K, N >= 1 and multiples of 8")
    blocks = num_blocks(k, block)
    _check("b", b, (n, blocks, block * bits // 8), (torch.uint8,))
    _check("scales", scales, (n, blocks), SCALE_DTYPES)
    if zero_points is not None:
        _check("zero_points", zero_points, (n, -(-blocks * bits // 8)), (torch.uint8,))


def _check_matmul(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    k: int,
    n: int,
    bits: int,
    block: int,
) -> None:
    _check_weight(b, scales, zero_points, k, n, bits, block)
    if a.ndim < 1 or a.shape[-1] != k or a.dtype != scales.dtype:
        raise InputError(f"a {_describe(a)}: accepted is [..., {k}] of the dtype of scales, {scales.dtype}")
    if bias is not None:
        _check("bias", bias, (n,), (a.dtype,))
    for name, tensor in (("b", b), ("scales", scales), ("zero_points", zero_points), ("bias", bias)):
        if tensor is not None and tensor.device != a.device:
            raise InputError(f"{name} is on {tensor.device}: accepted is that of a, {a.device}")


def _check_embedding(
    indices: Tensor, b: Tensor, scales: Tensor, zero_points: Tensor | None, d: int, bits: int, block: int
) -> None:
    _check_weight(b, scales, zero_points, d, b.shape[0], bits, block)
    if indices.dtype not in (torch.int64, torch.int32):
        raise InputError(f"indices {_describe(indices)}: accepted are int64 and int32")


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.shape != shape or tensor.dtype not in dtypes:
        accepted = " or ".join(str(dtype) for dtype in dtypes)
        raise InputError(f"{name} {_describe(tensor)}: accepted is {list(shape)} {accepted}")


def _describe(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"


def _matmul_fake(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    k: int,
    n: int,
    bits: int,
    block: int,
) -> Tensor:
    _check_matmul(a, b, scales, zero_points, bias, k, n, bits, block)
    return a.new_empty((*a.shape[:-1], n))


def _dequantize_fake(
    b: Tensor, scales: Tensor, zero_points: Tensor | None, k: int, n: int, bits: int, block: int
) -> Tensor:
    _check_weight(b, scales, zero_points, k, n, bits, block)
    return scales.new_empty((n, k))


def _embedding_fake(
    indices: Tensor, b: Tensor, scales: Tensor, zero_points: Tensor | None, d: int, bits: int, block: int
) -> Tensor:
    _check_embedding(indices, b, scales, zero_points, d, bits, block)
    return scales.new_empty((*indices.shape, d))


def _expert_linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None, experts: Tensor, num_experts: int) -> Tensor:
    check_expert_linear(x, weight, bias, experts, num_experts)
    return x.new_empty((x.shape[0], weight.shape[0] // num_experts))


def _expert_matmul_fake(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    experts: Tensor,
    k: int,
    n: int,
    bits: int,
    block: int,
    num_experts: int,
) -> Tensor:
    check_experts(a, experts, num_experts)
    _check_matmul(a, b, scales, zero_points, bias, k, num_experts * n, bits, block)
    return a.new_empty((a.shape[0], n))


def _expert_mixture_fake(x: Tensor, *rest: Any) -> Tensor:
    n = rest[13]  # after what is chosen, the weights, and the sizes before it
    return x.new_empty((x.shape[0], n))


def _attention_fake(
    query: Tensor,
    _key: Tensor | None,
    _value: Tensor | None,
    past_key: Tensor,
    _past_value: Tensor,
    _bias: Tensor,
    _cos: Tensor | None,
    _sin: Tensor | None,
    num_heads: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, past, width = past_key.shape
    length = query.shape[1]
    present = past_key.new_empty((batch, heads, past + length, width))
    return query.new_empty((batch, length, num_heads * width)), present, torch.empty_like(present)


def _linear_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, beta: Tensor | None, state: Tensor, _scale: float
) -> tuple[Tensor, Tensor]:
    check_linear_attention(query, key, value, decay, beta, state)
    return value.new_empty(value.shape), state.new_empty(state.shape)


def _matmul(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    k: int,
    n: int,
    bits: int,
    block: int,
) -> Tensor:
    _check_matmul(a, b, scales, zero_points, bias, k, n, bits, block)
    if a.is_cuda and (fused := _cuda_kernel(a.dtype, k, block)) is not None:
        return fused(a, b, scales, zero_points, bias, k, n, bits, block)
    rows = a.reshape(-1, k).to(torch.float32)
    result = a.new_empty((*a.shape[:-1], n))
    target = result.view(-1, n)
    # Half precision is accumulated in float32 and rounded once, after the bias.
    exact = target if target.dtype == torch.float32 else target.new_empty(target.shape, dtype=torch.float32)
    for start, weight in _dequantized_chunks(b, scales, zero_points, bits):
        torch.mm(rows, weight[:, :k].t(), out=exact[:, start : start + weight.shape[0]])
    if bias is not None:
        exact += bias
    if exact is not target:
        target.copy_(exact)
    return result


def _dequantize(b: Tensor, scales: Tensor, zero_points: Tensor | None, k: int, n: int, bits: int, block: int) -> Tensor:
    _check_weight(b, scales, zero_points, k, n, bits, block)
    result = scales.new_empty((n, k))
    for start, weight in _dequantized_chunks(b, scales, zero_points, bits):
        result[start : start + weight.shape[0]] = weight[:, :k]
    return result


def _embedding(
    indices: Tensor, b: Tensor, scales: Tensor, zero_points: Tensor | None, d: int, bits: int, block: int
) -> Tensor:
    _check_embedding(indices, b, scales, zero_points, d, bits, block)
    # As for a float table, torch refuses an index outside it.
    rows = indices.reshape(-1)
    zeros = None if zero_points is None else zero_points.index_select(0, rows)
    values = dequantize_rows(b.index_select(0, rows), scales.index_select(0, rows), zeros, bits)
    result = scales.new_empty((*indices.shape, d))
    result.view(-1, d).copy_(values[:, :d])
    return result


def _expert_matmul(
    a: Tensor,
    b: Tensor,
    scales: Tensor,
    zero_points: Tensor | None,
    bias: Tensor | None,
    experts: Tensor,
    k: int,
    n: int,
    bits: int,
    block: int,
    num_experts: int,
) -> Tensor:
    check_experts(a, experts, num_experts)
    _check_matmul(a, b, scales, zero_points, bias, k, num_experts * n, bits, block)

    def product(rows: Tensor, expert: int) -> Tensor:
        own = slice(expert * n, (expert + 1) * n)
        zeros, offsets = (None if tensor is None else tensor[own] for tensor in (zero_points, bias))
        return _matmul(rows, b[own], scales[own], zeros, offsets, k, n, bits, block)

    return for_each_expert(a, experts, num_experts, n, product)


def _expert_mixture(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    b1: Tensor,
    scales1: Tensor,
    zero_points1: Tensor | None,
    bias1: Tensor | None,
    b2: Tensor,
    scales2: Tensor,
    zero_points2: Tensor | None,
    bias2: Tensor | None,
    k: int,
    n1: int,
    i: int,
    n: int,
    bits1: int,
    bits2: int,
    block: int,
    num_experts: int,
    activation: str,
    alpha: float,
    beta: float,
    limit: float | None,
) -> Tensor:
    def first(rows: Tensor, experts: Tensor) -> Tensor:
        return _expert_matmul(rows, b1, scales1, zero_points1, bias1, experts, k, n1, bits1, block, num_experts)

    def second(rows: Tensor, experts: Tensor) -> Tensor:
        return _expert_matmul(rows, b2, scales2, zero_points2, bias2, experts, i, n, bits2, block, num_experts)

    return expert_mixture(x, chosen, weights, first, second, lambda h: activate(h, activation, alpha, beta, limit))


def _dequantized_chunks(
    b: Tensor, scales: Tensor, zero_points: Tensor | None, bits: int
) -> Iterator[tuple[int, Tensor]]:
    """Runs of rows as float32 [rows, nb * block_size], each with the index of its first; they share one buffer."""
    n, blocks, width = b.shape
    columns = blocks * width * 8 // bits
    rows = min(n, max(1, _CHUNK[b.device.type] // columns))
    scratch = torch.empty(rows, columns, dtype=torch.float32, device=b.device)
    for start in range(0, n, rows):
        of = slice(start, min(start + rows, n))
        zeros = None if zero_points is None else zero_points[of]
        yield start, dequantize_rows(b[of], scales[of], zeros, bits, out=scratch[: of.stop - start])


def _cuda_kernel(dtype: torch.dtype, k: int, block: int) -> Callable[..., Tensor] | None:
    """The fused product, or None where there is none for these: they are dequantized, a run of rows at a time."""
    from teq_graph.kernels import cuda

    return cuda.matmul_nbits if cuda.takes(dtype, k, block) else None


def _refuse_backward(_ctx: Any, *_grads: Tensor) -> None:
    raise KernelError(
        "backward through a teq_graph quantized operator: it is for inference; accepted are calls under "
        "torch.no_grad(), or outputs that are not differentiated"
    )


def _register() -> None:
    # torch keeps these registrations for as long as the process lives, also when this module is loaded again.
    for name, schema in _SCHEMAS.items():
        torch.library.define(f"teq_graph::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
        if name not in ("expert_linear", "linear_attention"):
            torch.library.register_autograd(f"teq_graph::{name}", _refuse_backward)
    torch.library.register_autograd("teq_graph::expert_linear", expert_linear_backward, setup_context=remember)
    torch.library.register_autograd(
        "teq_graph::linear_attention", linear_attention_backward, setup_context=remember_attention
    )
    torch.library.register_fake("teq_graph::matmul_nbits", _matmul_fake)
    torch.library.register_fake("teq_graph::dequantize_nbits", _dequantize_fake)
    torch.library.register_fake("teq_graph::embedding_nbits", _embedding_fake)
    torch.library.register_fake("teq_graph::group_query_attention", _attention_fake)
    torch.library.register_fake("teq_graph::linear_attention", _linear_attention_fake)
    torch.library.register_fake("teq_graph::expert_linear", _expert_linear_fake)
    torch.library.register_fake("teq_graph::expert_matmul_nbits", _expert_matmul_fake)
    torch.library.register_fake("teq_graph::expert_mixture_nbits", _expert_mixture_fake)
    torch.library.impl("teq_graph::expert_mixture_nbits", ("cpu", "cuda"), _expert_mixture)
    torch.library.impl("teq_graph::expert_linear", "CompositeExplicitAutograd", expert_linear)
    torch.library.impl("teq_graph::linear_attention", "CompositeExplicitAutograd", linear_attention)
    torch.library.impl("teq_graph::expert_matmul_nbits", ("cpu", "cuda"), _expert_matmul)
    for device in ("cpu", "cuda"):
        # As torch has it for linear.
        torch.library.register_autocast("teq_graph::expert_linear", device, torch.bfloat16)
        # What is added up over a text is so in full.
        torch.library.register_autocast("teq_graph::linear_attention", device, torch.float32)
    torch.library.impl("teq_graph::matmul_nbits", ("cpu", "cuda"), _matmul)
    torch.library.impl("teq_graph::dequantize_nbits", ("cpu", "cuda"), _dequantize)
    torch.library.impl("teq_graph::embedding_nbits", ("cpu", "cuda"), _embedding)
    torch.library.impl("teq_graph::group_query_attention", "CompositeExplicitAutograd", group_query_attention)


if not hasattr(torch.ops.teq_graph, "matmul_nbits"):
    _register()
