"""The methods that are compared: which package's environment and runner each has."""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Method:
    label: str
    runner: str
    """Script in this folder; empty where there is nothing to quantize."""
    environment: str = ""
    """Name of its requirements file; empty for the environment that this tool runs in."""
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    note: str = ""
    ragged: str = ""
    """What it does where rows are no whole number of groups, if that is not one shorter last group."""


def _neural_compressor(label: str, note: str, **options: Any) -> Method:
    version = "neural-compressor-pt 3.10"
    ragged = "groups of its weight statistics run over the ends of rows" if options["algorithm"] == "awq" else ""
    return Method(f"{version} {label}", "run_neural_compressor.py", "neural_compressor", options, note, ragged)


def _onnxruntime(label: str, algorithm: str) -> Method:
    ragged = "" if algorithm == "rtn" else "zeros that fill the last group of a row weigh in its fit"
    options = {"algorithm": algorithm}
    return Method(f"onnxruntime 1.31.1 {label}", "run_onnxruntime.py", "onnxruntime", options, ragged=ragged)


def _hqq(label: str, note: str, **options: Any) -> Method:
    ragged = "last groups are given to it apart: its own would straddle rows"
    return Method(f"hqq 0.2.8{label}", "run_hqq.py", "hqq", options, note, ragged)


def _auto_round(label: str, note: str, **options: Any) -> Method:
    return Method(f"auto-round 0.16.1{label}", "run_auto_round.py", "auto_round", options, note)


def _ours(label: str, **options: Any) -> Method:
    return Method(f"ours, {label}", "run_teq_graph.py", options=options)


_DEFECT = "as shipped: where it asks for num_bits it gets 4 bits"

METHODS: dict[str, Method] = {
    "float": Method("float32", ""),
    "rtn": Method("round to nearest", "run_teq_graph.py", options={"training": "rtn"}),
    "ort-rtn": _onnxruntime("default", "rtn"),
    "ort-hqq": _onnxruntime("HQQ", "hqq"),
    "ort-k-quant": _onnxruntime("k_quant", "k_quant"),
    "hqq": _hqq("", "its config for these bits"),
    "hqq-round-zero": _hqq(" round_zero", "as its config has it for 4 bits", round_zero=True),
    "inc-teq": _neural_compressor("TEQ", _DEFECT, algorithm="teq"),
    "inc-teq-mended": _neural_compressor("TEQ, mended", "num_bits mended", algorithm="teq", mended=True),
    "inc-awq": _neural_compressor("AWQ", _DEFECT, algorithm="awq"),
    "inc-awq-mended": _neural_compressor("AWQ, mended", "num_bits mended", algorithm="awq", mended=True),
    "inc-gptq": _neural_compressor("GPTQ", "", algorithm="gptq"),
    "auto-round": _auto_round("", "its default learning rate"),
    "auto-round-light": _auto_round(" light", "learning rate of its light recipe", lr=5e-3),
    "auto-round-light-bf16": _auto_round(
        " light, bfloat16", "its light recipe in its own mixed precision", lr=5e-3, amp=True
    ),
    "auto-round-200": _auto_round(", 200 iterations", "iterations and learning rate of its default recipe", iters=200),
    "auto-round-1000": _auto_round(
        ", 1000 iterations", "those of its best recipe, with its algorithm extension", iters=1000, enable_alg_ext=True
    ),
    "ours-scales": _ours("scales alone", training="stages", stages=["teq"]),
    "ours-all": _ours("scales, clip, gptq, tune", training="stages", stages=["teq", "clip", "gptq", "tune"]),
    "ours-fast": _ours("fast", training="preset", preset="fast"),
    "ours-default": _ours("default", training="preset", preset="default"),
    "ours-best": _ours("best", training="preset", preset="best"),
}
