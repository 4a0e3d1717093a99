"""neural-compressor-pt: TEQ, AWQ and GPTQ through its own prepare, calibrate and convert.

`mended` passes `num_bits` on to `quant_tensor`, which ignores it (and `data_type`) and takes 4 bits for it.
What it imports asks whether transformers is loaded; `job`, which comes before, loads it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from job import Job, block_linears, run
from neural_compressor.torch.algorithms.weight_only import teq, utility
from neural_compressor.torch.quantization import AWQConfig, GPTQConfig, TEQConfig, convert, prepare
from torch import Tensor
from transformers import get_scheduler


def mend(quant_tensor: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(quant_tensor)
    def mended(*args: Any, num_bits: int | None = None, data_type: str | None = None, **options: Any) -> Any:
        if num_bits is not None:
            options["bits"] = num_bits
        if data_type is not None:
            options["dtype"] = data_type
        return quant_tensor(*args, **options)

    return mended


def make_traceable(model: Any) -> Any:
    """It traces with `config.return_dict=False`, which transformers 5 passes on to the decoder and then fails."""
    decoder = model.base_model
    decoder.forward = functools.partial(decoder.forward, return_dict=True)
    model.config.use_cache = False
    return model


def train_scales(model: Any, batches: list[Tensor], steps: int) -> None:
    """TEQ's recipe over the whole model: Adam, linear decay with warm-up, the loss of the next token."""
    scales = list(model._trained_alphas.values())
    optimizer = torch.optim.Adam(scales, lr=1e-3, betas=(0.9, 0.9), weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=int(0.05 * steps), num_training_steps=steps)
    order = torch.cat([torch.randperm(len(batches)) for _ in range(-(-steps // len(batches)))])
    for index in order[:steps].tolist():
        model(input_ids=batches[index], labels=batches[index]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def calibrate(model: Any, batches: list[Tensor], steps: int) -> None:
    for batch in batches:
        model(batch)


def recovered(model: Any, has_bias: dict[str, bool]) -> tuple[dict[str, Tensor], int]:
    """All parameters, those of linears dequantized, and the bytes of input scales that were not absorbed."""
    weights, extra = {}, 0
    for name, biased in has_bias.items():
        module = model.get_submodule(name)
        linear = getattr(module, "linear", module)
        weight = linear.recover().float() if hasattr(linear, "recover") else linear.weight
        if linear is not module:  # MulLinear scales its input
            weight = weight * module.input_scale
            extra += module.input_scale.numel() * 4
        weights[f"{name}.weight"] = weight
        if biased:
            weights[f"{name}.bias"] = linear.bias
    others = {name: parameter for name, parameter in model.named_parameters() if ".linear." not in name}
    return {**others, **weights}, extra


def runner(job: Job) -> None:
    algorithm = job.options["algorithm"]
    if job.options.get("mended"):
        teq.quant_tensor = utility.quant_tensor = mend(utility.quant_tensor)
    model = make_traceable(job.load_model())
    has_bias = {name: linear.bias is not None for name, linear in block_linears(model).items()}
    common = dict(bits=job.bits, group_size=job.group_size, use_sym=False)
    config, drive = {
        "teq": (TEQConfig, train_scales),
        "awq": (AWQConfig, calibrate),
        "gptq": (GPTQConfig, calibrate),
    }[algorithm]
    with job.timed():
        model = prepare(model, config(**common), example_inputs=job.calibration[:1])
        drive(model, job.batches(), job.iters)
        model = convert(model)
    weights, extra = recovered(model, has_bias)
    notes = [f"{job.iters} steps over the whole model"] if algorithm == "teq" else []
    job.finish(weights, extra_bytes=extra, notes=notes)


if __name__ == "__main__":
    run(runner)
