"""What measures decoding and training on a GPU, as far as it goes without one."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
from support.command_line import ROOT
from torch import Tensor

sys.path.append(str(ROOT / "tools"))

import bench_onnx_decode
import bench_training
import json_lines


def test_as_many_layers_as_there_is_time_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def timed(name: str, layers: int, device: str, most: float) -> dict[str, Any]:
        asked.append(layers)
        if layers * 10 > most:
            raise bench_training.TooLongError(layers * 10)
        return {"layers": layers}

    monkeypatch.setattr(bench_training, "timed", timed)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    assert bench_training.within("smollm2-135m", 30, "cuda", 1000.0 + 400) == {"layers": 30}
    assert bench_training.within("smollm2-135m", 30, "cuda", 1000.0 + 100) == {"layers": 8}
    assert asked == [30, 30, 8]


@pytest.mark.slow
def test_codes_and_seconds_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, compile_on = tmp_path / "figures.jsonl", bench_training.compile_on

    def with_little(device: str, model: Any, tokens: Tensor, *more: Any, **options: Any) -> Any:
        return compile_on(device, model, tokens[:4, :16], *more, **options | {"steps": 2})

    monkeypatch.setattr(bench_training, "compile_on", with_little)
    options = ["--layers", "1", "--device", "cpu", "--json", str(path)]
    monkeypatch.setattr(sys, "argv", ["bench_training.py", "tiny", *options])
    bench_training.main()
    *codes, seconds = json_lines.read(path)
    assert [row["stages"] for row in codes] == ["clip, gptq", "default, 20 steps"]
    for row in codes:
        assert row["codes"] == "294,912" and row["equal"] == "100.000%"
    assert seconds["layers"] == "1 of 2" and float(seconds["seconds"]) > 0


def test_decoding_in_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "figures.jsonl"
    options = [
        "--layers",
        "1",
        "--prompt",
        "8",
        "--tokens",
        "4",
        "--rounds",
        "1",
        "--provider",
        "cpu",
        "--json",
        str(path),
    ]
    monkeypatch.setattr(sys, "argv", ["bench_onnx_decode.py", "tiny", *options])
    bench_onnx_decode.main()
    speeds, nodes = json_lines.read(path)
    assert speeds["model"] == "tiny, W4g128" and speeds["steps"] == "launched"
    assert float(speeds["prefill, tokens/s"]) > 0 and float(speeds["decode, tokens/s"]) > 0
    assert int(nodes["nodes on the CPU"]) > 10


def test_a_provider_that_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_onnx_decode.onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(sys, "argv", ["bench_onnx_decode.py", "tiny"])
    with pytest.raises(SystemExit, match=r"^error: onnxruntime [\d.]+ has no CUDAExecutionProvider$"):
        bench_onnx_decode.main()
