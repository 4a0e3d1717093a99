"""Soundness of the analysis: no random network may change its output when its equivalences are scaled."""

from __future__ import annotations

import random

import pytest
import torch
from support.graphs import apply_random_scales_in_float64, capture_small, find, relative_error, run
from support.random_graphs import RandomNetwork
from support.seeds import BASE

from teq_graph.analysis.equivalences.equivalence import Equivalence
from teq_graph.errors import CaptureError

NETWORKS, MINIMUM, STEPS = 25, 12, (4, 24)


def check_network(seed: int) -> int:
    """Scale every equivalence of one random network; the number of them."""
    torch.manual_seed(seed)
    network = RandomNetwork(seed, random.Random(seed).randint(*STEPS))
    sizes = [(2, 4), (3, 6), (4, 10), (3, 7)]
    try:
        captured = capture_small(network, *network.example(*sizes[0]))
    except CaptureError as error:
        if "Constraints violated" not in str(error.__cause__):  # some ops need a certain length
            raise
        captured, sizes = capture_small(network, *network.example(*sizes[0]), dynamic=False), sizes[:1]
    network.double()
    equivalences = find(captured).equivalences
    graph_module = captured.graph_module.double()
    inputs, expected = [], []
    for size in sizes:
        x = tuple(part.double() for part in network.example(*size))
        try:
            expected.append(run(graph_module, x))
        except RuntimeError:  # torch.export noted that some ops need an even length, say
            assert size != sizes[0]
            continue
        inputs.append(x)
    where = f"seed {seed}\n{network}\n{describe(equivalences)}"
    with torch.no_grad():
        error = relative_error(expected[0], network(*inputs[0]))
    assert error <= 1e-5, f"error {error:.3g} by normalisation: {where}"  # constants are folded in float32
    apply_random_scales_in_float64(graph_module, equivalences)
    for x, outputs in zip(inputs, expected, strict=True):
        error = relative_error(run(graph_module, x), outputs)
        assert error <= 1e-9, f"error {error:.3g} at {tuple(x[0].shape)}: {where}"
    return len(equivalences)


def describe(equivalences: tuple[Equivalence, ...]) -> str:
    return "\n".join(f"{e.producer} ({e.kind}, {e.channels}) -> {', '.join(e.linears)}" for e in equivalences)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(4))
def test_random_networks(part: int) -> None:
    first = (4 * BASE + part) * NETWORKS
    found = sum(check_network(first + number) for number in range(NETWORKS))
    assert found >= MINIMUM, f"seeds from {first}: only {found} equivalences, the test has lost its power"
