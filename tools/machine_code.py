"""What a compiled kernel is made of: its machine code, by NVIDIA's disassembler."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

from teq_graph.kernels import program
from teq_graph.kernels.plan import Dequantizer, Variant


@functools.cache
def disassembler() -> str | None:
    """cuobjdump, from the path or from where the packages triton and nvidia-cuda-* have it."""
    found = [shutil.which("cuobjdump")]
    for package in ("triton", "nvidia"):
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += map(str, sorted(Path(folder).glob("**/bin/cuobjdump")))
    return next((path for path in found if path), None)


@dataclasses.dataclass(frozen=True)
class MachineCode:
    """Instructions with their addresses, without what guards them."""

    instructions: tuple[tuple[int, str], ...]

    def count(self, name: str) -> int:
        """Instructions that begin so: "LDS" or "LDS.128", say."""
        return sum(text.startswith((f"{name}.", f"{name} ")) for _, text in self.instructions)

    def __len__(self) -> int:
        return len(self.instructions)

    def innermost(self, *names: str) -> MachineCode:
        """The shortest loop with all such instructions. Raises LookupError where there is none."""
        loops = []
        for at, text in self.instructions:
            target = re.match(r"BRA.* 0x([0-9a-f]+)$", text)
            if target and int(target[1], 16) < at:
                inside = tuple(one for one in self.instructions if int(target[1], 16) <= one[0] <= at)
                loops.append(MachineCode(inside))
        loops = [loop for loop in loops if all(map(loop.count, names))]
        if not loops:
            raise LookupError(f"no loop has {' and '.join(names)}")
        return min(loops, key=len)


def machine_code(kind: Variant | Dequantizer, architecture: str, folder: Path) -> MachineCode:
    """Of its first kernel, which is compiled into `folder`. Raises FileNotFoundError where there is no cuobjdump."""
    tool = disassembler()
    if tool is None:
        raise FileNotFoundError("cuobjdump is not installed: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(bytes(program.compile_variant(kind, architecture).code))
    done = subprocess.run([tool, "-sass", "-fun", kind.kernels[0], cubin], capture_output=True, text=True, check=True)
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P[T0-9]+ +)?(.+?) *;", done.stdout, flags=re.MULTILINE)
    return MachineCode(tuple((int(at, 16), text) for at, text in lines))
