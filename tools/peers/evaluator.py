"""The common measure, and bytes by one formula.

Of a language model perplexity, KL to the float model's logits and top-1 agreement; of an encoder how far the embeddings
of sentences are from the float model's, and how many have the same nearest neighbour.

As a script it measures the weights that a runner left: `evaluator.py job.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from job import Job, block_linears
from safetensors.torch import load_file
from torch import Tensor, nn

from teq_graph.evaluation import LogitsFn, divergence, perplexity


def predictions(job: Job, model: Any, **options: Any) -> LogitsFn:
    """`input_ids` [b, s] -> logits [b, s, vocab] of a language model, last hidden states [b, s, h] of an encoder."""
    if job.is_encoder:
        return lambda ids: model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).last_hidden_state
    return lambda ids: model(input_ids=ids, **options).logits


def measure(job: Job, reference_fn: LogitsFn, predict_fn: LogitsFn) -> dict[str, float]:
    """On the test tokens of the job, which are a text, or for an encoder one sentence after the other."""
    if job.is_encoder:
        return compare_embeddings(*(embeddings(job, function) for function in (reference_fn, predict_fn)))
    tokens, context = job.load_test(), job.fields["context"]
    value = perplexity(predict_fn, tokens, context=context).value
    apart = divergence(reference_fn, predict_fn, tokens, context=context)
    return {"perplexity": value, "kl_divergence": apart.kl_divergence, "top1_agreement": apart.top1_agreement}


def embeddings(job: Job, hidden_fn: LogitsFn) -> Tensor:
    """The mean of each sentence's last hidden states, of length one: [sentences, h] float64."""
    with torch.inference_mode():
        rows = [hidden_fn(torch.tensor([ids])).double().mean(1) for ids in job.load_test()]
    return nn.functional.normalize(torch.cat(rows), dim=-1)


def compare_embeddings(expected: Tensor, actual: Tensor) -> dict[str, float]:
    """Of rows of length one: one minus the cosine of each pair, mean and largest, and how often the other row that is
    nearest is the same."""
    distances = 1.0 - (expected * actual).sum(1)
    nearest = [(rows @ rows.T).fill_diagonal_(-2.0).argmax(1) for rows in (expected, actual)]
    agreement = (nearest[0] == nearest[1]).double().mean().item()
    return {
        "cosine_distance": distances.mean().item(),
        "largest_distance": distances.max().item(),
        "neighbour_agreement": agreement,
    }


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
    options = {} if job.is_encoder else {"use_cache": False}
    result.update(measure(job, *(predictions(job, each, **options) for each in (reference, model))))
    (job.folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main()
