"""Second moments that are computed by panels of columns."""

from __future__ import annotations

import pytest
import torch
from support.graphs import capture_small
from torch import nn

from teq_graph.graph.products import Reading, product_nodes
from teq_graph.training.moments import PANELS, Moments


@pytest.mark.parametrize("width", [1, PANELS - 1, PANELS, 4 * PANELS, 4 * PANELS + 3])
def test_moments_are_those_of_all_rows(width: int) -> None:
    captured = capture_small(nn.Linear(width, 3), torch.randn(2, 5, width))
    (reading,) = [Reading.of(node) for node in product_nodes(captured.graph_module)]
    moments, parts = Moments(), [torch.randn(2, 5, width) + 1 for _ in range(3)]
    for part in parts:
        moments.add(reading, part)
    second, first = moments.result()
    rows = torch.cat(parts).flatten(0, 1).double()
    torch.testing.assert_close(second[0].double(), rows.T @ rows / len(rows), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(first[0].double(), rows.mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(second, second.mT)
    assert moments.rows() == (30,)
