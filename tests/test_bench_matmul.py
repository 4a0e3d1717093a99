"""The kernel's benchmark, as far as it goes without a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools"))

import bench_matmul
from bench_matmul import Case, Row

CASE = Case(4096, 2048, 16, 4, 128, torch.float16)


def test_row() -> None:
    """Bytes per second beside the copy's, operations per second, and times as fast as cuBLAS."""
    row = Row(CASE, "teq_graph", seconds=2e-6, moved=5_000_000, cublas=6e-6, copy_rate=4e12)
    assert row.cells() == ["W4g128", "4096 × 2048", "16", "teq_graph", "2.0", "2500", "62%", "134.22", "3.00"]
    assert bench_matmul.table([row]).count("\n") == 2


def test_row_as_json() -> None:
    row = Row(CASE, "teq_graph", seconds=2e-6, moved=5_000_000, cublas=6e-6, copy_rate=4e12)
    assert Row.of(json.loads(json.dumps(row.fields()))) == row


def test_summary() -> None:
    """A row per weight, a column per number of tokens, and cuBLAS once for a shape."""
    cases = [(Case(4096, 2048, m, bits, 128, torch.float16), bits * 1e-6) for bits in (4, 3) for m in (1, 16)]
    lines = bench_matmul.summary([Row(case, "teq_graph", s, 1, 6e-6, 1e12) for case, s in cases]).splitlines()
    assert lines == [
        "| × cuBLAS (µs) | M=1 | M=16 |",
        "|---|---|---|",
        "| 4096 × 2048, W4g128, teq_graph | 1.50 (4.0) | 1.50 (4.0) |",
        "| 4096 × 2048, cuBLAS | 1.00 (6.0) | 1.00 (6.0) |",
        "| 4096 × 2048, W3g128, teq_graph | 2.00 (3.0) | 2.00 (3.0) |",
    ]


def test_plot(tmp_path: Path) -> None:
    rows = [
        Row(Case(4096, 2048, m, bits, 128, torch.float16), name, 1e-6 * m, 10**6, 3e-6 * m, 4e12)
        for m in (1, 16)
        for bits in (3, 4)
        for name in ("teq_graph", "gemlite")
    ]
    bench_matmul.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_matmul.py"])
    with pytest.raises(SystemExit, match="error: torch sees no NVIDIA GPU"):
        bench_matmul.main()
