"""auto-round: signed gradient descent on rounding and clipping, block by block."""

from __future__ import annotations

from auto_round import AutoRound
from job import Job, block_linears, run


def runner(job: Job) -> None:
    model = job.load_model()
    names = list(block_linears(model))
    rounder = AutoRound(
        model,
        tokenizer=job.load_tokenizer(),
        bits=job.bits,
        group_size=job.group_size,
        sym=False,
        dataset=job.batches(),
        seqlen=job.calibration.shape[1],
        nsamples=len(job.calibration),
        batch_size=job.batch_size,
        seed=job.seed,
        device_map=job.device,
        enable_torch_compile=False,
        **{"iters": job.iters, "amp": False, **job.options},
    )
    with job.timed():
        model, _ = rounder.quantize()
    job.finish({f"{name}.weight": model.get_submodule(name).weight for name in names})


if __name__ == "__main__":
    run(runner)
