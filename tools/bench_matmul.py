"""Speed of teq_graph::matmul_nbits on a GPU beside cuBLAS, a device copy and other packages' kernels, in one run.

    python tools/bench_matmul.py --markdown matmul.md --plot matmul.png

Method: every product (but humming's, whose weights are rounded by its own quantizer) is checked against float64 first,
on fresh random data. Then a CUDA graph of calls is replayed,
each call on its own copy of the weights, so many that together they are twice the L2 cache: weights come from memory,
as they do while a model decodes. One figure is the median over --rounds replays, by CUDA events, in which contenders
take turns. GB/s count codes, scales, zero points, activations and results, each once; «of copy» is that beside the
bytes per second, read and written, of a device-to-device copy; «× cuBLAS» is the time of torch's product of the same
shape in the same dtype, with weights as cold, over ours.

Contenders: teq_graph; `torch.ops.aten._weight_int4pack_mm` (4 bits, bfloat16); `gemlite` (2, 4, 8 bits) and
`humming` (humming-kernels), each where it is installed. One that fails says why, once.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from cuda_timing import capture, median_seconds
from json_lines import append
from torch import Tensor

from teq_graph import ops as _ops  # noqa: F401  registers the op
from teq_graph.config import BITS, WeightSpec
from teq_graph.quantization import QuantizedWeight, quantize_weight

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
SHAPES: dict[str, list[tuple[int, int]]] = {
    "Llama-3-8B": [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)],
    "Llama-3-70B": [(10240, 8192), (8192, 8192), (57344, 8192), (8192, 28672)],
    "Llama-2-7B": [(12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)],
    "SmolLM2-135M": [(960, 576), (576, 576), (3072, 576), (576, 1536)],
}
"""[N, K] of the linears of a layer, those that read the same input merged."""
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative error of ours. Other packages round activations, scales or zero points: they may have five times that."""
OTHERS_TOLERANCE = 5
MOST_COPIES = 64
OURS, CUBLAS = "teq_graph", "cuBLAS"
OTHER_WEIGHTS = (CUBLAS, "humming")
"""Those whose weights are not the quantized ones: float, or rounded by a quantizer of their own."""
COLUMNS = ("weights", "N × K", "M", "contender", "µs", "GB/s", "of copy", "TFLOP/s", "× cuBLAS")

Product = Callable[[Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Case:
    n: int
    k: int
    m: int
    bits: int
    group_size: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Row:
    case: Case
    contender: str
    seconds: float
    moved: int
    cublas: float
    copy_rate: float

    def fields(self) -> dict[str, Any]:
        """Plain data for JSON."""
        case = {**dataclasses.asdict(self.case), "dtype": name_of(self.case.dtype)}
        return {**dataclasses.asdict(self), "case": case}

    @classmethod
    def of(cls, fields: dict[str, Any]) -> Row:
        """The row that has these `fields`."""
        case = Case(**{**fields["case"], "dtype": getattr(torch, fields["case"]["dtype"])})
        return cls(**{**fields, "case": case})

    def cells(self) -> list[str]:
        case, rate = self.case, self.moved / self.seconds
        flops = 2 * case.m * case.n * case.k / self.seconds
        return [
            f"W{case.bits}g{case.group_size}",
            f"{case.n} × {case.k}",
            str(case.m),
            self.contender,
            f"{self.seconds * 1e6:.1f}",
            f"{rate / 1e9:.0f}",
            f"{rate / self.copy_rate:.0%}",
            f"{flops / 1e12:.2f}",
            f"{self.cublas / self.seconds:.2f}",
        ]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def ours(weight: QuantizedWeight, dtype: torch.dtype) -> Product:
    parts = [None if part is None else part.cuda() for part in (weight.packed, weight.scales, weight.zero_points)]
    sizes = (weight.k, weight.n, weight.bits, weight.block_size)
    return lambda a: torch.ops.teq_graph.matmul_nbits(a, *parts, None, *sizes)


def int4pack(weight: QuantizedWeight, dtype: torch.dtype) -> Product:
    """w = (code - 8) * scale + zero, in bfloat16."""
    if weight.bits != 4 or dtype != torch.bfloat16:
        raise ValueError("4 bits and bfloat16 only")
    codes, grid = weight.to_codes()
    pairs = codes.cuda().view(weight.n, -1, 2).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack((pairs[..., 0] << 4 | pairs[..., 1]).to(torch.uint8), 8)
    zeros = (8 - grid.zero_points_as_float()) * grid.scales
    scales_and_zeros = torch.stack([grid.scales, zeros], -1).transpose(0, 1).contiguous().to("cuda", dtype)
    return lambda a: torch.ops.aten._weight_int4pack_mm(a, packed, weight.block_size, scales_and_zeros)


def gemlite(weight: QuantizedWeight, dtype: torch.dtype) -> Product:
    from gemlite.core import DType, GemLiteLinear

    kind = {torch.float16: DType.FP16, torch.bfloat16: DType.BF16}[dtype]
    sizes = dict(group_size=weight.block_size, in_features=weight.k, out_features=weight.n)
    layer = GemLiteLinear(weight.bits, **sizes, input_dtype=kind, output_dtype=kind)
    codes, grid = weight.to_codes()
    layer.pack(codes.cuda(), grid.scales.to("cuda", dtype), grid.zero_points_as_float().to("cuda", dtype), None)
    return layer


def humming(weight: QuantizedWeight, dtype: torch.dtype) -> Product:
    """With weights of its own quantizer, of the same bits and groups."""
    from humming.layer import HummingLayer

    config = {"dtype": f"uint{weight.bits}", "group_size": weight.block_size, "has_zero_point": True}
    layer = HummingLayer(shape_n=weight.n, shape_k=weight.k, weight_config=config, torch_dtype=dtype).cuda()
    layer.load_from_unquantized(weight.dequantize(dtype).cuda())
    layer.transform()
    if hasattr(layer, "prepare_default_kernel_configs"):  # absent from humming-kernels 0.1.19
        layer.prepare_default_kernel_configs()
    return layer


CONTENDERS: dict[str, Callable[[QuantizedWeight, torch.dtype], Product]] = {
    OURS: ours,
    "int4pack": int4pack,
    "gemlite": gemlite,
    "humming": humming,
}


def copy_rate(rounds: int) -> float:
    """Bytes per second, read and written, of a copy of 1 GiB."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    graph = capture([lambda: target.copy_(source)])
    return 2 * source.nbytes / median_seconds({"copy": graph.replay}, rounds)["copy"]


class Bench:
    """The contenders on one weight, each with as many copies as fill twice the L2 cache, up to `MOST_COPIES`."""

    def __init__(
        self, weight: QuantizedWeight, float_weight: Tensor, contenders: list[str], dtype: torch.dtype
    ) -> None:
        wanted = -(-2 * torch.cuda.get_device_properties(0).L2_cache_size // weight.nbytes)
        self.copies = min(max(2, wanted), MOST_COPIES)
        self.weight, self.dtype = weight, dtype
        self.exact = weight.dequantize().cuda().double().t()
        dense = [float_weight.to("cuda", dtype) for _ in range(self.copies)]
        self.products: dict[str, list[Product]] = {CUBLAS: [lambda a, w=w: a @ w.t() for w in dense]}
        self.failures: dict[str, str] = {}
        for name in contenders:
            with self._noting(name):
                self.products[name] = [CONTENDERS[name](weight, dtype) for _ in range(self.copies)]

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """A package's failure, once; ours is an error."""
        try:
            yield
        except Exception as error:
            if name in (OURS, CUBLAS):
                raise
            self.failures.setdefault(name, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")

    def measure(self, case: Case, rounds: int, rate: float) -> list[Row]:
        """Every contender that has not failed, on one number of tokens."""
        a = torch.randn(case.m, case.k, device="cuda", dtype=self.dtype)
        expected = a.double() @ self.exact
        replays = {}
        for name, products in self.products.items():
            with self._noting(name):
                error = float((products[0](a).double() - expected).norm() / expected.norm())
                most = TOLERANCE[self.dtype] * (1 if name == OURS else OTHERS_TOLERANCE)
                if error > most and name not in OTHER_WEIGHTS:
                    raise ValueError(f"relative error {error:.1e}")
                replays[name] = capture([functools.partial(product, a) for product in products]).replay
        seconds = {name: value / self.copies for name, value in median_seconds(replays, rounds).items()}
        moved = self.weight.nbytes + (case.m * (case.n + case.k)) * a.element_size()
        cublas = seconds.pop(CUBLAS)
        return [Row(case, name, value, moved, cublas, rate) for name, value in seconds.items()]


def table(rows: list[Row]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
    return "\n".join([*lines, *(f"| {' | '.join(row.cells())} |" for row in rows)])


def summary(rows: list[Row]) -> str:
    """A row per weight and contender: how many times as fast as cuBLAS with M tokens, and its time in µs."""
    tokens = sorted({row.case.m for row in rows})
    lines = [f"| × cuBLAS (µs) | {' | '.join(f'M={m}' for m in tokens)} |", "|---" * (len(tokens) + 1) + "|"]
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        weights, shape = row.cells()[:2]
        of_m = {row.contender: row.seconds, CUBLAS: row.cublas}
        for name, seconds in of_m.items():
            label = f"{shape}, {name}" if name == CUBLAS else f"{shape}, {weights}, {name}"
            times = f"{row.cublas / seconds:.2f} ({seconds * 1e6:.1f})"
            cells.setdefault(label, {})[row.case.m] = times
    lines += [f"| {label} | {' | '.join(of.get(m, '–') for m in tokens)} |" for label, of in cells.items()]
    return "\n".join(lines)


def plot(rows: list[Row], path: Path) -> None:
    """Times as fast as cuBLAS over M, the geometric mean over shapes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 5))
    for kind in dict.fromkeys((row.contender, row.case.bits) for row in rows):
        of_kind = [row for row in rows if (row.contender, row.case.bits) == kind]
        tokens = sorted({row.case.m for row in of_kind})
        means = [
            statistics.geometric_mean(row.cublas / row.seconds for row in of_kind if row.case.m == m) for m in tokens
        ]
        axes.plot(tokens, means, marker="o", label=f"{kind[0]}, {kind[1]} bits")
    axes.axhline(1.0, color="gray", linestyle="--")
    axes.set(xscale="log", xlabel="M, rows of activations", ylabel="times as fast as cuBLAS")
    axes.legend()
    axes.grid(visible=True, alpha=0.3)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    pyplot.close(figure)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--shapes", nargs="+", metavar="NxK", help="instead of those of models")
    parser.add_argument("--bits", type=int, nargs="+", choices=BITS, default=list(BITS))
    parser.add_argument("--group-size", type=int, choices=(32, 64, 128, 256), default=128)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--json", type=Path, help="where rows go as soon as they are measured, a line each")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if not torch.cuda.is_available():
        raise SystemExit("error: torch sees no NVIDIA GPU")
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    failures: dict[str, str] = {}
    rate, rows = copy_rate(args.rounds), []
    shapes = [shape for model in args.models for shape in SHAPES[model]]
    if args.shapes:
        shapes = [(int(n), int(k)) for n, _, k in (shape.partition("x") for shape in args.shapes)]
    for n, k in dict.fromkeys(shapes):
        float_weight = torch.randn(n, k) / k**0.5
        for bits in args.bits:
            weight = quantize_weight(float_weight, WeightSpec(bits, args.group_size), dtype)
            bench = Bench(weight, float_weight, args.contenders, dtype)
            for m in args.tokens:
                measured = bench.measure(Case(n, k, m, bits, args.group_size, dtype), args.rounds, rate)
                rows += measured
                for row in measured:
                    append(args.json, row.fields())
            print(f"{n} × {k}, {bits} bits: measured", flush=True)
            for contender in bench.failures.keys() - failures.keys():
                failures[contender] = bench.failures[contender]
                append(args.json, {"contender": contender, "failed": failures[contender]})
    name = torch.cuda.get_device_name()
    head = f"{name}, torch {torch.__version__}, {args.dtype}; copy {rate / 1e9:.0f} GB/s; {args.rounds} rounds."
    notes = [f"- {contender}: {reason}" for contender, reason in failures.items()]
    text = "\n\n".join([head, summary(rows), table(rows), *(["\n".join(notes)] if notes else [])])
    print(text)
    if args.markdown:
        args.markdown.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
