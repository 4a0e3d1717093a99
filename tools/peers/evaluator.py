"""The common measure: perplexity, KL to the float model's logits, top-1 agreement, and bytes by one formula.

As a script it measures the weights that a runner left: `evaluator.py job.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from job import Job, block_linears
from safetensors.torch import load_file
from torch import Tensor, nn

from teq_graph.evaluation import LogitsFn, divergence, perplexity


def measure(job: Job, reference: Any, logits_fn: LogitsFn) -> dict[str, float]:
    """On the test tokens of the job, in windows that do not overlap."""
    tokens, context = torch.from_numpy(np.load(job.fields["test"])), job.fields["context"]

    def expected(ids: Tensor) -> Tensor:
        return reference(input_ids=ids, use_cache=False).logits

    value = perplexity(logits_fn, tokens, context=context).value
    apart = divergence(expected, logits_fn, tokens, context=context)
    return {"perplexity": value, "kl_divergence": apart.kl_divergence, "top1_agreement": apart.top1_agreement}


def load_weights(model: nn.Module, path: Path) -> None:
    """Put the tensors of a file into the model; one that shares its memory with another becomes its own."""
    parameters = dict(model.named_parameters())
    for name, tensor in load_file(path).items():
        if name in parameters:
            parameters[name].data.copy_(tensor)
        else:
            parent, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(parent), attribute, nn.Parameter(tensor, requires_grad=False))


def unchanged_linears(model: Any, changed: Any) -> list[str]:
    """Linears that a method left in float."""
    after = block_linears(changed)
    return [name for name, linear in block_linears(model).items() if torch.equal(linear.weight, after[name].weight)]


def stored_bytes(
    model: Any, bits: int, group_size: int, *, zero_point_bits: int, in_float: list[str] = (), extra_bytes: int = 0
) -> int:
    """Codes, a 16-bit scale and a zero point per group; everything else, tied weights once, in float32."""
    total = sum(parameter.numel() * 4 for parameter in model.parameters()) + extra_bytes
    for name, linear in block_linears(model).items():
        if name not in in_float:
            n, k = linear.weight.shape
            groups = n * -(-k // group_size)
            total += (n * k * bits + groups * (16 + zero_point_bits)) // 8 - n * k * 4
    return total


def main() -> None:
    job = Job(Path(sys.argv[1]))
    path = job.folder / "weights.safetensors"
    result = json.loads((job.folder / "result.json").read_text(encoding="utf-8"))
    reference, model = job.load_model(), job.load_model()
    if path.is_file():
        load_weights(model, path)
        left = unchanged_linears(reference, model)
        if left:
            result["notes"] = [*result.get("notes", []), f"{len(left)} of {len(block_linears(model))} linears in float"]
        result["stored_bytes"] = stored_bytes(
            reference,
            job.bits,
            job.group_size,
            zero_point_bits=result.get("zero_point_bits", job.bits),
            in_float=left,
            extra_bytes=result.get("extra_bytes", 0),
        )
    else:
        result["stored_bytes"] = sum(parameter.numel() * 4 for parameter in model.parameters())
    result.update(measure(job, reference, lambda ids: model(input_ids=ids, use_cache=False).logits))
    (job.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
