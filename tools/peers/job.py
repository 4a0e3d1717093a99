"""What every runner shares: the job file it is given, the clock, and the result it leaves.

Runs inside a peer's environment, so it imports nothing but torch, numpy, safetensors and transformers.
"""

from __future__ import annotations

import contextlib
import json
import re
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer


class Job:
    """One method on one model. The folder of the job file takes `result.json` and `weights.safetensors`."""

    def __init__(self, path: Path) -> None:
        fields = json.loads(path.read_text(encoding="utf-8"))
        self.folder = path.parent
        self.fields: dict[str, Any] = fields
        self.model_dir: str = fields["model"]
        self.bits: int = fields["bits"]
        self.group_size: int = fields["group_size"]
        self.iters: int = fields["iters"]
        self.batch_size: int = fields["batch_size"]
        self.seed: int = fields["seed"]
        self.is_encoder: bool = fields["is_encoder"]
        self.device: str = fields["device"]
        self.options: dict[str, Any] = fields["options"]
        self.result: dict[str, Any] = {}
        self.calibration: Tensor = torch.from_numpy(np.load(fields["calibration"]))
        """int64 [samples, length]"""

    def load_model(self) -> Any:
        kind = AutoModel if self.is_encoder else AutoModelForCausalLM
        return kind.from_pretrained(self.model_dir, dtype=torch.float32).eval()

    def load_test(self) -> Any:
        """Token ids of a text, of an encoder's test those of sentences."""
        return json.loads(Path(self.fields["test"]).read_text(encoding="utf-8"))

    def load_tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.model_dir)

    def batches(self) -> list[Tensor]:
        return list(self.calibration.split(self.batch_size))

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Around what turns a loaded model and the calibration tokens into codes, and nothing else."""
        started = time.perf_counter()
        yield
        self.result["seconds"] = time.perf_counter() - started
        self.result["peak_bytes"] = peak_bytes()

    def finish(self, weights: Mapping[str, Tensor] | None = None, **fields: Any) -> None:
        """Leave the dequantized weights and all else that changed, by parameter name, and figures for the table."""
        if weights is not None:
            tensors = {name: tensor.detach().float().contiguous().clone() for name, tensor in weights.items()}
            save_file(tensors, self.folder / "weights.safetensors")
        self.result.update(fields)


def peak_bytes() -> int:
    """The largest resident memory of this process. What getrusage gives includes that of the process it came from."""
    return _status_bytes("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def resident_bytes() -> int:
    """The resident memory of this process as it is now; 0 where the system does not tell."""
    return _status_bytes("VmRSS")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status")
    found = re.search(rf"{field}:\s*(\d+)", status.read_text(encoding="utf-8")) if status.is_file() else None
    return int(found[1]) * 1024 if found else 0


def block_linears(model: Any) -> dict[str, nn.Linear]:
    """The linears that are quantized: all but the projection onto the vocabulary."""
    head = model.get_output_embeddings()
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head
    }


def quantize_each(job: Job, quantize: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """For methods without calibration: `quantize` gives the dequantized weight of each weight [N, K]."""
    model = job.load_model()
    weights = {f"{name}.weight": linear.weight.detach() for name, linear in block_linears(model).items()}
    with job.timed(), torch.no_grad():
        return {name: quantize(weight) for name, weight in weights.items()}


def run(runner: Callable[[Job], None]) -> None:
    """Entry of a runner script. An error becomes one line of the result; its traceback goes to the log."""
    job = Job(Path(sys.argv[1]))
    torch.manual_seed(job.seed)
    try:
        runner(job)
    except Exception as error:
        traceback.print_exc()
        job.result["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    (job.folder / "result.json").write_text(json.dumps(job.result), encoding="utf-8")
