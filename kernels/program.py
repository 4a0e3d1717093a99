"""Compiles a variant of the kernel with NVRTC, once for each kind of GPU: the result is kept on disk."""

from __future__ import annotations

import functools
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from teq_graph.errors import KernelError
from teq_graph.kernels.parameters import MACROS
from teq_graph.kernels.plan import Dequantizer, Device, Variant

if TYPE_CHECKING:
    from cuda.core import Kernel, ObjectCode

FOLDER = Path(__file__).parent
OLDEST = (8, 0)
"""The compute capability from which on there are cp.async and products in bfloat16."""
HOPPER = (9, 0)
"""The one whose tensor cores multiply for warpgroups by `wgmma`."""


def source(name: str) -> str:
    """The text of a source file with the files it includes in their places."""

    def text_of(name: str, seen: set[str]) -> str:
        if name in seen:
            return ""
        seen.add(name)
        text = (FOLDER / name).read_text(encoding="utf-8")
        return re.sub(r'^#include "(.+)"$', lambda match: text_of(match[1], seen), text, flags=re.MULTILINE)

    return text_of(name, set())


def compile_variant(
    variant: Variant | Dequantizer, architecture: str, cache: Any = None, logs: Any = None
) -> ObjectCode:
    """A cubin for `architecture` ("sm_90", say), from `cache` where it is there; what ptxas says goes to `logs`."""
    from cuda.core import Program, ProgramOptions

    options = ProgramOptions(
        name="matmul_nbits",
        std="c++20",
        arch=architecture,
        define_macro=list({**variant.macros, **MACROS}.items()),
        ptxas_options=["-v"] if logs is not None else None,
    )
    return Program(source(variant.file), code_type="c++", options=options).compile("cubin", logs=logs, cache=cache)


def cache_folder() -> Path:
    """Where compiled kernels are kept, for all processes of a user."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "teq_graph" / "kernels"


@functools.cache
def device_of(index: int) -> Device:
    """What plans have to know of the CUDA device of that index."""
    import torch

    properties = torch.cuda.get_device_properties(index)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # torch's stubs lack it
    return Device(
        properties.multi_processor_count, shared, warpgroups=torch.cuda.get_device_capability(index) == HOPPER
    )


def architecture_of(capability: tuple[int, int]) -> str:
    """What to compile for, with what only GPUs of just this kind have where kernels use it."""
    return "sm_{}{}".format(*capability) + ("a" if capability == HOPPER else "")


@functools.cache
def load(variant: Variant | Dequantizer, device: int) -> tuple[Kernel, ...]:
    """Its kernels, in their order, ready for the CUDA device of that index.

    Raises KernelError where the GPU or its driver is too old, or what compiles kernels is not installed.
    """
    import torch

    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST:
        raise KernelError(
            f"cuda:{device} ({torch.cuda.get_device_name(device)}) has compute capability {capability[0]}."
            f"{capability[1]}; accepted are 8.0 and later"
        )
    try:
        from cuda.bindings import driver
        from cuda.core.utils import FileStreamProgramCache
    except ImportError as error:
        raise KernelError(f"CUDA kernels are compiled by cuda-core ({error}); pip install 'teq-graph[cuda]'") from error
    try:
        code = compile_variant(variant, architecture_of(capability), cache=FileStreamProgramCache(cache_folder()))
        kernels = tuple(code.get_kernel(name) for name in variant.kernels)
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        limit = device_of(device).shared_limit
        (status,) = driver.cuKernelSetAttribute(attribute, limit, kernels[0].handle, device)
        if status != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"{limit} bytes of shared memory: {status.name}")
    except Exception as error:  # of the compiler, the driver and the file system
        name, reason = torch.cuda.get_device_name(device), " ".join(str(error).split())[:300]
        raise KernelError(f"CUDA kernel for cuda:{device}, {name}: {reason}") from error
    return kernels
