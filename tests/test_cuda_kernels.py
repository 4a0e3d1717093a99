"""The CUDA kernel of matmul_nbits: emulated on the CPU, compiled for every GPU, and run where there is one."""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import io
import itertools
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import cuda_emulation
from torch import Tensor

import teq_graph
from teq_graph import ops as _ops  # noqa: F401  registers the op
from teq_graph.config import BITS, QuantizationConfig, WeightSpec
from teq_graph.errors import InputError, KernelError
from teq_graph.kernels import cuda, plan, program, tilings
from teq_graph.kernels.plan import Dequantizer, Device, Plan, Product, Variant, variants
from teq_graph.kernels.tilings import AnyTiling, StreamTiling, Tiling
from teq_graph.loading import LoadedModel
from teq_graph.quantization import QuantizedWeight, quantize_weight

matmul_nbits = torch.ops.teq_graph.matmul_nbits.default
dequantize_nbits = torch.ops.teq_graph.dequantize_nbits.default
GROUPS = (32, 64, 128, 256, -1)
ARCHITECTURES = ("sm_80", "sm_90a", "sm_120")


def name_of(variant: Variant) -> str:
    return cuda_emulation.function_of(variant).removeprefix("run_")


def check(result: Tensor, a: Tensor, weight: QuantizedWeight, bias: Tensor | None, exact_weight: bool) -> None:
    """Against float64, as near as float32 sums and one rounding of the result are, and of weights unless exact."""
    values = weight.dequantize() if exact_weight else weight.dequantize(a.dtype)
    expected = a.double() @ values.double().t() + (0 if bias is None else bias.double())
    bound = 2e-6 * (a.double().abs() @ values.double().abs().t()).max()
    bound = bound + torch.finfo(a.dtype).eps / 2 * expected.abs()
    error = (result.double() - expected).abs()
    assert bool((error <= bound).all()), f"{float((error / bound).max())} times the bound"


# ----------------------------------------------------------------------------------------------------- emulated


@pytest.fixture(scope="session")
def gcc() -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")


@pytest.fixture(scope="session")
def library(gcc: None, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels for the CPU; processes share the compiled library."""
    shared = tmp_path_factory.getbasetemp()
    folder: Path = (shared.parent if shared.name.startswith("popen-") else shared) / "cuda_emulation"
    folder.mkdir(exist_ok=True)
    return cuda_emulation.build(folder)


@pytest.fixture(scope="session")
def emulate(library: ctypes.CDLL) -> Callable[..., Tensor]:
    """Runs a plan on the CPU."""

    def run(made: Plan, a: Tensor, weight: QuantizedWeight, bias: Tensor | None) -> Tensor:
        return cuda_emulation.run(library, made, a, weight.packed, weight.scales, weight.zero_points, bias)

    return run


def plan_of(tiling: AnyTiling, a: Tensor, weight: QuantizedWeight) -> Plan:
    """On a GPU of one multiprocessor that is otherwise an H100's."""
    product = Product(a.dtype, len(a), weight.n, weight.k, weight.bits, weight.block_size)
    made = plan.plan_by(product, tiling, Device(1, plan.HOPPER_SHARED_LIMIT, warpgroups=True))
    assert made is not None
    return made


@pytest.mark.parametrize("variant", list(variants()), ids=name_of)
def test_emulated_tiling(variant: Variant, emulate: Callable[..., Tensor]) -> None:
    """Every variant on a product that ends inside a tile in M, N and K, in several slices, and split over blocks."""
    dtype, tiling = variant.dtype, variant.tiling
    if isinstance(tiling, Tiling):
        m, n, k = tiling.tokens - 3 if tiling.tokens < 64 else 69, tiling.rows + 5, tiling.round * 2 + 72
        parts, unit = 3, tiling.round
    elif isinstance(tiling, StreamTiling):  # a block goes through three tiles
        m, n, k = tiling.tokens - 3, tiling.rows * 2 + 5, tiling.round * 2 - 24
        parts, unit = 2, tiling.round
    else:
        m, n, k = tiling.tokens + 3 if tiling.tokens < 32 else tiling.tokens - 5, tiling.rows - 5, 4 * 128 - 24
        parts, unit = 2, 256
    weight = quantize_weight(torch.randn(n, k), WeightSpec(variant.bits, 128 if variant.scale_sums else 32), dtype)
    a, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    made = plan_of(tiling, a, weight)
    assert made.variant == variant and made.grid[2] == 1
    whole = emulate(made, a, weight, bias)
    check(whole, a, weight, bias, variant.scale_sums)
    if isinstance(tiling, Tiling):
        made = dataclasses.replace(made, slice=unit)
        assert torch.equal(emulate(made, a, weight, bias), whole)
    else:
        made = dataclasses.replace(made, slice=unit)
    split = dataclasses.replace(made, split=unit, grid=(*made.grid[:2], parts))
    if isinstance(tiling, StreamTiling):
        split = dataclasses.replace(split, ahead=tiling.ahead(unit))
    check(emulate(split, a, weight, bias), a, weight, bias, variant.scale_sums)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", plan.DTYPES, ids=str)
def test_emulated_codes(
    bits: int, group_size: int, symmetric: bool, dtype: torch.dtype, emulate: Callable[..., Tensor]
) -> None:
    """Each code in its place: a product with the identity is the dequantized weight, to the last bit."""
    n, k = 19, 288
    weight = quantize_weight(torch.randn(n, k), WeightSpec(bits, group_size, symmetric), dtype)
    rows = torch.eye(k, dtype=dtype)[:: 5 if group_size == 32 else 7]
    general = torch.cat([emulate(plan_of(plan.GENERAL[2], part, weight), part, weight, None) for part in rows.split(2)])
    expected = weight.dequantize(dtype).t()[:: 5 if group_size == 32 else 7]
    assert torch.equal(general, expected)
    if plan.refusal(k, weight.block_size) is None and weight.packed[0].numel() * 8 // bits % tilings.STEP == 0:
        for tiling in (plan.TILE_16, plan.GROUPS_32):
            assert torch.equal(emulate(plan_of(tiling, rows, weight), rows, weight, None), expected)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", plan.DTYPES, ids=str)
def test_emulated_dequantizing(bits: int, group_size: int, dtype: torch.dtype, library: ctypes.CDLL) -> None:
    for (n, k), symmetric in itertools.product([(23, 288), (8, 2080)], (False, True)):
        weight = quantize_weight(torch.randn(n, k), WeightSpec(bits, group_size, symmetric), dtype)
        floats = torch.full((n, k), float("nan"), dtype=dtype)
        of = cuda.Weight(weight.packed, weight.scales, weight.zero_points, bits, weight.block_size)
        cuda_emulation.dequantize(library, of, floats)
        assert torch.equal(floats, weight.dequantize(dtype))


@pytest.mark.parametrize("tiling", [*plan.GENERAL.values(), plan.STREAM_8, plan.STREAM_16], ids=str)
def test_shared_memory_is_just_enough(tiling: AnyTiling, emulate: Callable[..., Tensor]) -> None:
    """A block writes to the last byte that the plan has for what is staged, and to none after it."""
    weight = quantize_weight(torch.randn(16, 2048), WeightSpec(4, 128), torch.float16)
    a = torch.randn(tiling.tokens, 2048).half()
    made = plan_of(tiling, a, weight)
    emulate(made, a, weight, None)
    # After what is staged of the last token there is room that parts rows and nobody writes to.
    apart = 64 if isinstance(tiling, StreamTiling) else 0
    small = dataclasses.replace(made, shared_bytes=made.shared_bytes - apart - 1)
    with pytest.raises(AssertionError, match="past its end"):
        emulate(small, a, weight, None)


def test_sources_and_plans_compute_the_same(gcc: None, tmp_path: Path) -> None:
    """The constants that plan.py and cuda.py have in common with the sources, for every tiling and width of codes."""
    expected = {
        "LANES": tilings.LANES,
        "STEP": tilings.STEP,
        "CHUNK": tilings.CHUNK,
        "sizeof(Vector)": cuda.VECTOR,
        "EIGHT": cuda.DEQUANTIZE_COLUMNS,
        "ROWS_OF_THREAD": cuda.ROWS_OF_THREAD,
    }
    for variant in variants():
        tiling, bits, tile = variant.tiling, variant.bits, variant.macros["VARIANT_TILING"]
        sizes = {"BITS": bits, "ROWS": tiling.rows, "THREADS": tiling.threads}
        sizes |= {name.upper(): value for name, value in dataclasses.asdict(tiling).items()}
        if isinstance(tiling, Tiling | StreamTiling):
            sizes |= {"ROUND": tiling.round, "RING": tiling.ring_bytes(bits), "SUMS": tiling.sums_bytes}
        else:
            sizes |= {"RING": tiling.shared_bytes(bits)}
        expected |= {f"{tile}::{name}": value for name, value in sizes.items()}
    values = cuda_emulation.constants(list(expected), tmp_path)
    assert dict(zip(expected, values, strict=True)) == expected


# ----------------------------------------------------------------------------------------------------- compiled


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("dtype", plan.DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_compiles_without_spills(bits: int, dtype: torch.dtype, architecture: str) -> None:
    """ptxas reports neither stack nor spills, and a block's registers are there."""
    kinds = [kind for kind in variants() if (kind.bits, kind.dtype) == (bits, dtype)]
    kinds = [kind for kind in kinds if kind.compiles_for(architecture)]
    for variant in (*kinds, Dequantizer(dtype, bits)):
        log = io.StringIO()
        program.compile_variant(variant, architecture, logs=log)
        text = log.getvalue()
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", text)
        registers = re.findall(r"Used (\d+) registers", text)
        assert len(frames) == len(registers) == len(variant.kernels), text
        assert all(frame == ("0", "0", "0") for frame in frames), text
        assert "serialized" not in text, "products of warpgroups wait for each other"
        threads = cuda.DEQUANTIZE_THREADS if isinstance(variant, Dequantizer) else variant.tiling.threads
        assert max(map(int, registers)) * threads <= 65536, text


VARIANT = Variant(torch.float16, 4, plan.GENERAL[2], True)


def test_compiled_kernels_are_kept_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cuda.core.utils import FileStreamProgramCache

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert program.cache_folder() == tmp_path / "teq_graph" / "kernels"

    def compile_for(architecture: str, variant: Variant = VARIANT) -> bytes:
        cache = FileStreamProgramCache(program.cache_folder())  # as every process opens it
        return bytes(program.compile_variant(variant, architecture, cache=cache).code)

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in program.cache_folder().rglob("*") if path.is_file()}

    first = compile_for("sm_80")
    kept = files()
    assert kept and compile_for("sm_80") == first and files() == kept
    # Another architecture, another variant and another source are other entries.
    assert compile_for("sm_90") != first
    compile_for("sm_80", dataclasses.replace(VARIANT, bits=2))
    text = program.source(VARIANT.file)
    monkeypatch.setattr(program, "source", lambda name: text + "// changed\n")
    compile_for("sm_80")
    assert len(files()) == 4 * len(kept)


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Any]:
    """Loads a kernel for a GPU that is only said to be there."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    program.load.cache_clear()
    return lambda: program.load(VARIANT, 0)


def test_gpu_that_is_too_old(load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    with pytest.raises(KernelError, match=r"^cuda:0 \(a GPU\) has compute capability 7.5; accepted are 8.0 and later$"):
        load()


def test_compiler_that_is_not_installed(load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core.utils", None)
    with pytest.raises(KernelError, match=r"compiled by cuda-core .*pip install 'teq-graph\[cuda\]'$"):
        load()


def test_kernel_that_does_not_compile(load: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "source", lambda name: "int broken")
    with pytest.raises(KernelError, match=r"^CUDA kernel for cuda:0, a GPU: ") as caught:
        load()
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


# ----------------------------------------------------------------------------------------------------- on a GPU


def call(a: Tensor, weight: QuantizedWeight, bias: Tensor | None = None) -> Tensor:
    tensors = [None if t is None else t.to(a.device) for t in (weight.packed, weight.scales, weight.zero_points)]
    sizes = (weight.k, weight.n, weight.bits, weight.block_size)
    result: Tensor = matmul_nbits(a, *tensors, bias, *sizes)
    return result


def on_gpu(weight: QuantizedWeight) -> cuda.Weight:
    tensors = [None if t is None else t.cuda() for t in (weight.packed, weight.scales, weight.zero_points)]
    return cuda.Weight(*tensors, weight.bits, weight.block_size)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", plan.DTYPES, ids=str)
def test_gpu_values(bits: int, group_size: int, symmetric: bool, dtype: torch.dtype) -> None:
    for (n, k), m in itertools.product([(1000, 1096), (257, 4096)], (1, 2, 7, 16, 31, 64, 200)):
        weight = quantize_weight(torch.randn(n, k), WeightSpec(bits, group_size, symmetric), dtype)
        a, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
        made = plan.make_plan(dtype, m, n, k, bits, weight.block_size, program.device_of(0))
        result = call(a.cuda(), weight, bias.cuda()).cpu()
        exact = plan.refusal(k, weight.block_size) is not None or (made is not None and made.variant.scale_sums)
        check(result, a, weight, bias, exact)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", plan.DTYPES, ids=str)
def test_gpu_every_tiling(bits: int, dtype: torch.dtype) -> None:
    """Also where no table takes it, on a product that ends inside a tile in M and N."""
    n, k = 517, 1216
    for group_size, symmetric in itertools.product((32, 128), (False, True)):
        weight = quantize_weight(torch.randn(n, k), WeightSpec(bits, group_size, symmetric), dtype)
        moved = on_gpu(weight)
        for tiling in plan.tilings_of(bits):
            for m in {1, tiling.tokens - 3, tiling.tokens * 2 + 5}:
                product = Product(dtype, m, n, k, bits, group_size)
                if (made := plan.plan_by(product, tiling, program.device_of(0))) is None:
                    continue
                a, y = torch.randn(m, k).to(dtype), torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
                cuda.multiply(made, a.cuda(), moved, None, y)
                check(y.cpu(), a, weight, None, made.variant.scale_sums)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("dtype", plan.DTYPES, ids=str)
def test_gpu_dequantized(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """The product is torch's, in one stretch of rows and in several."""
    for (n, k), symmetric in itertools.product([(1000, 1088), (257, 4096)], (False, True)):
        weight = quantize_weight(torch.randn(n, k), WeightSpec(bits, group_size, symmetric), dtype)
        moved = on_gpu(weight)
        floats = torch.full((n, k), float("nan"), dtype=dtype, device="cuda")
        cuda.dequantize(moved, floats)
        assert torch.equal(floats.cpu(), weight.dequantize(dtype))
        a, bias = torch.randn(700, k).to(dtype), torch.randn(n).to(dtype)
        for of, stretch in itertools.product((None, bias), (128, n)):
            y = torch.full((700, n), float("nan"), dtype=dtype, device="cuda")
            cuda.multiply_dequantized(a.cuda(), moved, None if of is None else of.cuda(), y, floats[:stretch].nbytes)
            check(y.cpu(), a, weight, of, False)
        check(call(a.cuda(), weight, bias.cuda()).cpu(), a, weight, bias, False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, *plan.DTYPES], ids=str)
@pytest.mark.parametrize("group_size", [16, 128])
def test_gpu_what_the_kernel_does_not_take(dtype: torch.dtype, group_size: int) -> None:
    weight = quantize_weight(torch.randn(70, 100), WeightSpec(3, group_size), dtype)
    a = torch.randn(2, 3, 100).to(dtype)
    result = call(a.cuda(), weight).cpu()
    check(result.flatten(0, 1), a.flatten(0, 1), weight, None, True)
    tensors = [None if t is None else t.cuda() for t in (weight.packed, weight.scales, weight.zero_points)]
    values = dequantize_nbits(*tensors, weight.k, weight.n, weight.bits, weight.block_size)
    assert torch.equal(values.cpu(), weight.dequantize(dtype))


@pytest.mark.gpu
def test_gpu_shapes_strides_and_alignment() -> None:
    weight = quantize_weight(torch.randn(72, 256), WeightSpec(4, 64), torch.float16)
    a = torch.randn(256, 9, device="cuda", dtype=torch.float16).t()
    expected = call(a.contiguous(), weight)
    assert torch.equal(call(a, weight), expected)
    assert call(a[:0], weight).shape == (0, 72)
    shifted = torch.empty(9 * 256 + 1, device="cuda", dtype=torch.float16)[1:].view(9, 256).copy_(a)
    assert torch.equal(call(shifted, weight), expected)
    assert torch.equal(call(a.reshape(3, 3, 256), weight).flatten(0, 1), expected)
    with pytest.raises(InputError, match="accepted is that of a"):
        matmul_nbits(a, weight.packed, weight.scales.cuda(), weight.zero_points.cuda(), None, 256, 72, 4, 64)


@pytest.mark.gpu
def test_gpu_graph_and_streams() -> None:
    weight = quantize_weight(torch.randn(512, 1024), WeightSpec(3, 128), torch.float16)
    a = torch.randn(1, 1024, device="cuda", dtype=torch.float16)
    parts = [None if t is None else t.cuda() for t in (weight.packed, weight.scales, weight.zero_points)]
    sizes = (weight.k, weight.n, weight.bits, weight.block_size)
    expected = matmul_nbits(a, *parts, None, *sizes)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = matmul_nbits(a, *parts, None, *sizes)
    a.copy_(torch.randn_like(a))
    graph.replay()
    assert torch.equal(captured, matmul_nbits(a, *parts, None, *sizes))
    assert not torch.equal(captured, expected)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = matmul_nbits(a, *parts, None, *sizes)
    stream.synchronize()
    assert torch.equal(result, captured)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", BITS)
def test_gpu_compiled_model(bits: int, stories260k: LoadedModel) -> None:
    model = copy.deepcopy(stories260k.model).half()
    config = QuantizationConfig(bits=bits, group_size=32)
    compiled = teq_graph.compile(model, quantization=config, training=None)
    ids = torch.randint(1, 500, (2, 40))
    expected = compiled(input_ids=ids).logits.float()
    result = compiled.to("cuda")(input_ids=ids.cuda()).logits.float().cpu()
    assert float((result - expected).norm() / expected.norm()) < 5e-3


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")  # torch's own
def test_gpu_compiled_by_torch() -> None:
    weight = quantize_weight(torch.randn(512, 1024), WeightSpec(4, 128), torch.bfloat16)
    a = torch.randn(5, 1024, device="cuda", dtype=torch.bfloat16)

    def model(x: Tensor) -> Any:
        return call(x.relu(), weight) * 2

    torch.testing.assert_close(torch.compile(model, fullgraph=True)(a), model(a))
