"""What is checked on a GPU, the most important first, and what each step needs."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections.abc import Callable

from markdown_table import table_of

from gpu_checking.running import FIGURES, ROOT, SECONDS, Rows, Step

KERNELS = "kernels"
"""The step whose table stands in kernels/README.md, and the name of its section there."""
PYTHON = sys.executable
LARGE = "28672x4096"
SHAPES = f"{LARGE} 4096x4096 4096x14336"
FEW = "1 8 16 64 256"
MANY = "64 256 128 512 32 2048"
SMALL_PRODUCTS = "gpu_checking.small_products"
NO_SANITIZER = "compute-sanitizer is not in PATH or CUDA_HOME"
COMPILES = ("torch", "numpy", "cuda.core", "cuda.bindings", "transformers")
EXPORTS = ("onnx", "onnxscript", "onnx_ir", "onnxruntime", "pydantic", "filelock")


def steps() -> list[Step]:
    sanitizer = find_sanitizer()
    return [
        Step(
            "tests",
            22,
            (PYTHON, "-m", "pytest", "-q", "-m", "gpu", "-n", "8", "-p", "no:benchmark", *gpu_tests()),
            "`pytest -m gpu -n 8 -p no:benchmark`, two threads each.",
            needs(*COMPILES, "pytest", "xdist", "pytest_timeout", "hypothesis"),
            environment={"OMP_NUM_THREADS": "2"},
        ),
        Step(
            KERNELS,
            20,
            measured_by("bench_matmul.py", f"--shapes {SHAPES} --bits 4 3 2 8 --contenders teq_graph --rounds 7"),
            "`tools/bench_matmul.py`: float16, groups of 128, zero points, products checked against float64; "
            "weights are not in the L2 cache; medians of 7 rounds of CUDA graphs in which contenders take turns. Times "
            "as fast as cuBLAS in float16 on the same shape, and µs.",
            needs(*COMPILES),
            kernel_table,
        ),
        Step(
            "tilings",
            10,
            measured_by("tune_matmul.py", f"--shapes {LARGE} --bits 4 --tokens {MANY} --rounds 5 --seconds {SECONDS}"),
            "`tools/tune_matmul.py`: as kernels, all tilings that could serve many tokens at 4 bits, in µs; the table "
            "in `kernels/plan.py` is made of such figures.",
            needs(*COMPILES),
            tiling_table,
        ),
        Step(
            "torch",
            11,
            measured_by("bench_torch_decode.py", "llama-8b --layers 8 --bits 4 3"),
            "`tools/bench_torch_decode.py`: eight layers of a Llama of 8 B random weights, one token after 512.",
            needs(*COMPILES),
        ),
        Step(
            "onnxruntime",
            14,
            measured_by("bench_onnx_decode.py", "llama-1b"),
            "`tools/bench_onnx_decode.py`: a Llama of 1.0 B random weights in float16, by onnxruntime's CUDA "
            "provider; 256 tokens, greedy, after prompts of 512. Nodes on the CPU are of a run that is no CUDA graph.",
            needs(*COMPILES, *EXPORTS, and_then=without_cuda_provider),
        ),
        Step(
            "training",
            9,
            measured_by("bench_training.py", f"smollm2-135m --seconds {SECONDS}"),
            "`tools/bench_training.py`: `compile(model, device='cuda')` at `default`, 3 bits, for random weights of "
            "SmolLM2's shape, in as many layers as there is time for; and codes beside the CPU's, on a small model.",
            needs(*COMPILES),
        ),
        Step(
            "packages",
            6,
            measured_by("bench_matmul.py", f"--shapes {LARGE} --bits 4 --dtype bfloat16 --tokens {FEW} --rounds 7"),
            "As kernels, in bfloat16, beside the kernels of other packages that are installed.",
            needs(*COMPILES),
            kernel_table,
        ),
        *(
            Step(
                checker,
                4,
                (sanitizer or "", "--tool", checker, "--error-exitcode", "1", PYTHON, "-m", SMALL_PRODUCTS),
                f"`compute-sanitizer --tool {checker}` over every tiling, on small products.",
                needs(*COMPILES, and_then=lambda: None if sanitizer else NO_SANITIZER),
                # Every tensor is an allocation of its own, at whose end an access is seen.
                environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            for checker in ("memcheck", "racecheck")
        ),
    ]


def measured_by(tool: str, arguments: str) -> tuple[str, ...]:
    """The command of a tool that writes its figures as JSON lines."""
    return (PYTHON, f"tools/{tool}", *arguments.split(), "--json", FIGURES)


def gpu_tests() -> tuple[str, ...]:
    """The files that hold such tests: others need packages that a machine with a GPU may lack."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return tuple(f"tests/{file.name}" for file in files if "@pytest.mark.gpu" in file.read_text(encoding="utf-8"))


def needs(*modules: str, and_then: Callable[[], str | None] = lambda: None) -> Callable[[], str | None]:
    """The reason why a step cannot be run: modules that are not installed, or else what `and_then` says."""

    def reason() -> str | None:
        absent = [module for module in modules if not is_installed(module)]
        if absent:
            return f"{', '.join(absent)} {'is' if len(absent) == 1 else 'are'} not installed"
        return and_then()

    return reason


def is_installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # of the package that it is in
        return False


def without_cuda_provider() -> str | None:
    """What is wrong with the onnxruntime that is installed, if anything."""
    import teq_graph.onnx  # noqa: F401  before onnxruntime, which would report from every run otherwise

    import onnxruntime  # isort: skip

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        return None
    return f"onnxruntime {onnxruntime.__version__} has no CUDA provider"


def find_sanitizer() -> str | None:
    """The program, in PATH or where CUDA's toolkit has it."""
    home = os.environ.get("CUDA_HOME")
    folders = [None, *([f"{home}/bin", f"{home}/compute-sanitizer"] if home else [])]
    return next(filter(None, (shutil.which("compute-sanitizer", path=folder) for folder in folders)), None)


def kernel_table(rows: Rows) -> str:
    """Of rows of bench_matmul.py: a row a weight, a column a number of tokens; and which packages did not run."""
    from bench_matmul import Row, summary

    measured = [Row.of(dict(row)) for row in rows if "case" in row]
    failures = [f"- {row['contender']}: {row['failed']}" for row in rows if "failed" in row]
    return "\n\n".join(filter(None, [summary(measured) if measured else "", "\n".join(failures)]))


def tiling_table(rows: Rows) -> str:
    """Of rows of tune_matmul.py: a row a number of tokens, a column a kind of kernel with its fastest tiling."""
    kinds = dict.fromkeys(kind_of(name) for row in rows for name in row["us"])
    lines = []
    for row in rows:
        line = {"M": row["m"]}
        for kind in kinds:
            times = [(us, name) for name, us in row["us"].items() if kind_of(name) == kind]
            line[kind] = "{:.1f} {}".format(*min(times)) if times else ""
        lines.append(line)
    return table_of(lines)


def kind_of(contender: str) -> str:
    return contender.partition("(")[0]
