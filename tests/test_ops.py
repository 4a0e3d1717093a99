"""teq_graph::matmul_nbits and dequantize_nbits: numbers, shapes, and the ways torch traces them."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from teq_graph.config import BITS, WeightSpec
from teq_graph.errors import InputError, KernelError
from teq_graph.ops import registration
from teq_graph.quantization import QuantizedWeight, quantize_weight

matmul_nbits = torch.ops.teq_graph.matmul_nbits.default
dequantize_nbits = torch.ops.teq_graph.dequantize_nbits.default

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = [WeightSpec(*values) for values in itertools.product(BITS, (16, 128, -1), (False, True))]


def weight_arguments(weight: QuantizedWeight) -> tuple[tuple[Tensor, Tensor, Tensor | None], tuple[int, ...]]:
    return (weight.packed, weight.scales, weight.zero_points), (weight.k, weight.n, weight.bits, weight.block_size)


def call(a: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    tensors, sizes = weight_arguments(weight)
    result: Tensor = matmul_nbits(a, *tensors, bias, *sizes)
    return result


class Linear(torch.nn.Module):
    """A quantized linear layer between two others, as the compiled graph has it."""

    def __init__(self, weight: QuantizedWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("b", weight.packed)
        self.register_buffer("scales", weight.scales)
        self.register_buffer("zero_points", weight.zero_points)
        self.register_buffer("bias", bias)
        self.sizes = weight_arguments(weight)[1]

    def forward(self, a: Tensor) -> Tensor:
        result: Tensor = matmul_nbits(a.relu(), self.b, self.scales, self.zero_points, self.bias, *self.sizes)
        return result * 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [256, 300])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_values(spec: WeightSpec, k: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registration._CHUNK, "cpu", 2000)  # several chunks, the last one shorter
    weight = quantize_weight(torch.randn(37, k), spec, dtype)
    exact = weight.dequantize().double()
    tensors, sizes = weight_arguments(weight)
    values = dequantize_nbits(*tensors, *sizes)
    assert values.dtype == dtype
    assert torch.equal(values, weight.dequantize(dtype))
    for shape, bias in (((k,), None), ((1, k), torch.randn(37)), ((2, 3, k), None), ((4, 0, k), torch.randn(37))):
        a = torch.randn(shape).to(dtype)
        bias = None if bias is None else bias.to(dtype)
        result = call(a, weight, bias)
        expected = a.double() @ exact.t() + (0 if bias is None else bias.double())
        assert result.shape == (*shape[:-1], 37)
        assert result.dtype == dtype
        assert result.is_contiguous()
        if expected.numel():
            # float32 accumulation, and one rounding to the result's dtype.
            bound = 1e-5 * expected.abs().max() + torch.finfo(dtype).eps / 2 * expected.abs()
            assert torch.all((result.double() - expected).abs() <= bound)


def test_strided_activations() -> None:
    weight = quantize_weight(torch.randn(8, 64), WeightSpec(4, 32))
    a = torch.randn(64, 5)
    torch.testing.assert_close(call(a.t(), weight), call(a.t().contiguous(), weight), rtol=1e-5, atol=1e-5)


class LargestAllocation(TorchDispatchMode):
    """Bytes of the largest storage that any operator returns."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor) and not any(tensor is x for x in args):
                self.nbytes = max(self.nbytes, tensor.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_scratch_is_bounded(bits: int, dtype: torch.dtype) -> None:
    weight = quantize_weight(torch.randn(3000, 1024), WeightSpec(bits, 128), dtype)
    tensors, sizes = weight_arguments(weight)
    with LargestAllocation() as seen:
        registration._matmul(torch.randn(2, 1024).to(dtype), *tensors, None, *sizes)
    assert weight.packed.nbytes <= 4 * 2**20
    assert 2**20 < seen.nbytes <= 4 * 2**20 < 3000 * 1024 * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_opcheck(bits: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = quantize_weight(torch.randn(12, 40), WeightSpec(bits, 16, symmetric), dtype)
    tensors, sizes = weight_arguments(weight)
    for bias in (None, torch.randn(12).to(dtype)):
        torch.library.opcheck(matmul_nbits, (torch.randn(2, 3, 40).to(dtype), *tensors, bias, *sizes))
    torch.library.opcheck(dequantize_nbits, (*tensors, *sizes))


@pytest.mark.parametrize("bits", BITS)
def test_export_with_dynamic_shapes(bits: int) -> None:
    module = Linear(quantize_weight(torch.randn(12, 40), WeightSpec(bits, 16)), torch.randn(12))
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    program = torch.export.export(module, (torch.randn(2, 3, 40),), dynamic_shapes=dynamic)
    targets = [node.target for node in program.graph.nodes]
    assert targets.count(matmul_nbits) == 1
    again = torch.export.export(program.module(), (torch.randn(2, 3, 40),), dynamic_shapes=dynamic)
    for size in ((5, 7), (1, 1), (3, 2)):
        a = torch.randn(*size, 40)
        assert torch.equal(program.module()(a), module(a))
        assert torch.equal(again.module()(a), module(a))


# torch 2.13 raises it against itself on its first import of inductor.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend: str) -> None:
    if backend == "inductor":
        from torch._inductor.cpp_builder import get_cpp_compiler

        try:
            get_cpp_compiler()
        except Exception as error:  # the class differs between versions of torch
            pytest.skip(f"inductor needs a C++ compiler: {error}")
    module = Linear(quantize_weight(torch.randn(12, 40), WeightSpec(4, 16)), torch.randn(12))
    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    with torch.no_grad():
        for rows in (3, 5):
            a = torch.randn(rows, 40)
            torch.testing.assert_close(compiled(a), module(a), rtol=1e-6, atol=1e-6)


def test_make_fx() -> None:
    tensors, sizes = weight_arguments(quantize_weight(torch.randn(12, 40), WeightSpec(3, 16)))
    bias = torch.randn(12)

    def function(a: Tensor, *tensors: Tensor | None) -> Tensor:
        result: Tensor = matmul_nbits(a.relu(), *tensors, *sizes)
        return result * 2

    for mode in ("real", "fake", "symbolic"):
        graph = make_fx(function, tracing_mode=mode)(torch.randn(3, 40), *tensors, bias)
        assert [node.target for node in graph.graph.nodes].count(matmul_nbits) == 1
        a = torch.randn(3, 40)
        assert torch.equal(graph(a, *tensors, bias), function(a, *tensors, bias))


def test_inference_mode_and_parameters() -> None:
    weight = quantize_weight(torch.randn(12, 40), WeightSpec(4, 16))
    a = torch.randn(3, 40)
    expected = call(a, weight)
    with torch.inference_mode():
        assert torch.equal(call(a, weight), expected)
    assert torch.equal(call(torch.nn.Parameter(a), weight), expected)


def test_backward_is_refused() -> None:
    weight = quantize_weight(torch.randn(12, 40), WeightSpec(4, 16))
    a = torch.randn(3, 40, requires_grad=True)
    with pytest.raises(KernelError, match="for inference"):
        call(a, weight).sum().backward()
    assert a.grad is None


def test_refusals_real_and_fake() -> None:
    weight = quantize_weight(torch.randn(12, 40), WeightSpec(4, 16))
    b, scales, zero_points = weight.packed, weight.scales, weight.zero_points
    assert zero_points is not None
    a, bias = torch.randn(3, 40), torch.randn(12)
    good: dict[str, Any] = {"a": a, "b": b, "scales": scales, "zero_points": zero_points, "bias": bias}
    good |= {"K": 40, "N": 12, "bits": 4, "block_size": 16}
    bad: dict[str, list[Any]] = {
        "a": [torch.randn(3, 41), a.half(), torch.tensor(1.0)],
        "b": [b[:, :2], b.flatten(1), b.float()],
        "scales": [scales[:, :2], scales.double()],
        "zero_points": [zero_points[:, :1], zero_points.float(), torch.zeros(12, 3, dtype=torch.uint8)],
        "bias": [bias[:3], bias.half(), bias[:, None]],
        "K": [39 + 16, 0],
        "N": [11, 0],
        "bits": [5, 3],
        "block_size": [32, 12, 0],
    }
    for device in ("cpu", "meta"):
        place = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in good.items()}
        assert matmul_nbits(**place).shape == (3, 12)
        for key, values in bad.items():
            for value in values:
                changed = {**place, key: value.to(device) if isinstance(value, Tensor) else value}
                with pytest.raises(InputError, match="accepted") as caught:
                    matmul_nbits(**changed)
                assert "\n" not in str(caught.value)
                if key not in ("a", "bias"):
                    del changed["a"], changed["bias"]
                    with pytest.raises(InputError, match="accepted"):
                        dequantize_nbits(**changed)


def test_tensors_on_different_devices() -> None:
    weight = quantize_weight(torch.randn(12, 40), WeightSpec(4, 16))
    tensors, sizes = weight_arguments(weight)
    with pytest.raises(InputError, match="b is on meta: accepted is that of a, cpu"):
        registration._check_matmul(torch.randn(3, 40), tensors[0].to("meta"), *tensors[1:], None, *sizes)


def test_second_import_registers_nothing() -> None:
    weight = quantize_weight(torch.randn(12, 40), WeightSpec(4, 16))
    a = torch.randn(3, 40)
    expected = call(a, weight)
    importlib.reload(registration)
    spec = importlib.util.spec_from_file_location("ops_under_another_name", registration.__file__)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert torch.equal(call(a, weight), expected)
