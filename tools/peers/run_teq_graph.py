"""This package: round-to-nearest as weights for the common evaluator, all else as the compiled graph itself."""

from __future__ import annotations

from evaluator import measure, predictions, stored_bytes
from job import Job, block_linears, quantize_each, run
from torch import Tensor

import teq_graph
from teq_graph.config import WeightSpec
from teq_graph.quantization import quantize_weight


def training_of(job: Job) -> teq_graph.TrainingConfig:
    samples, length = job.calibration.shape
    common = dict(samples=samples, length=length, seed=job.seed)
    if job.options["training"] == "preset":
        return teq_graph.TrainingConfig.preset(job.options["preset"], **common)
    stages = tuple(job.options["stages"])
    return teq_graph.TrainingConfig(steps=job.iters, batch_size=job.batch_size, stages=stages, **common)


def round_to_nearest(job: Job) -> None:
    spec = WeightSpec(job.bits, job.group_size)

    def quantize(weight: Tensor) -> Tensor:
        return quantize_weight(weight, spec).dequantize()

    job.finish(quantize_each(job, quantize))


def compile_and_measure(job: Job) -> None:
    model, training = job.load_model(), training_of(job)
    with job.timed():
        compiled = teq_graph.compile(
            model,
            calibration=job.batches(),
            quantization=teq_graph.QuantizationConfig(bits=job.bits, group_size=job.group_size),
            training=training,
            device=job.device,
        )
    quantized = [linear for linear in compiled.report.linears if linear.spec is not None]
    assert len(quantized) == len(block_linears(model)), "the graph and the model have other linears"
    size = stored_bytes(model, job.bits, job.group_size, zero_point_bits=job.bits)
    job.finish(stored_bytes=size, **measure(job, predictions(job, model), predictions(job, compiled)))


def runner(job: Job) -> None:
    if job.options["training"] == "rtn":
        round_to_nearest(job)
    else:
        compile_and_measure(job)


if __name__ == "__main__":
    run(runner)
