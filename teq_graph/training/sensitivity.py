"""Bits for each linear and convolution under a budget of size, by what its rounding costs the loss."""

from __future__ import annotations

import dataclasses
import functools
import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from teq_graph.analysis.blocks import find_blocks
from teq_graph.capture import CapturedGraph
from teq_graph.config import BITS, WeightSpec
from teq_graph.errors import ConfigError
from teq_graph.graph.execution import Values, run
from teq_graph.graph.products import Reading, outputs_for, product_nodes, weight_name_of, weight_node
from teq_graph.graph.tensors import get_tensor, node_tensor
from teq_graph.quantization import Grid, dequantize, find_clipped_grid, quantize
from teq_graph.system.progress import Task, task
from teq_graph.training.reference import batch_named, check_finite

BATCHES = 4
"""Calibration batches that the loss is measured on."""

Curves = dict[str, dict[int, float]]
"""Name of a weight -> bits -> increase of the loss."""


def choose_bits(
    captured: CapturedGraph,
    specs: Mapping[str, WeightSpec],
    free: Collection[str],
    batches: Sequence[Any],
    target: float,
    seed: int = 0,
) -> dict[str, WeightSpec]:
    """`specs` with the bits of the `free` weights chosen for the least loss, on average at most `target`.

    The average is over the elements of all weights of `specs`, those with bits of their own included. Raises
    ConfigError where these leave too little, NumericsError where the model gives NaN or infinity.
    """
    sizes = {name: get_tensor(captured.graph_module, name).numel() for name in specs}
    pinned = sum(spec.bits * sizes[name] for name, spec in specs.items() if name not in free)
    budget = target * sum(sizes.values()) * (1 + 1e-9) - pinned
    least = (pinned + min(BITS) * sum(sizes[name] for name in free)) / sum(sizes.values())
    if least > target * (1 + 1e-9):
        raise ConfigError(f"target_bits={target}: with the bits of overrides, accepted are {least:.3g} and more")
    curves = loss_increases(captured, {name: specs[name] for name in specs if name in free}, batches, seed)
    bits = allocate(curves, sizes, budget)
    return {name: dataclasses.replace(spec, bits=bits[name]) if name in bits else spec for name, spec in specs.items()}


def allocate(curves: Curves, sizes: Mapping[str, int], budget: float) -> dict[str, int]:
    """Bits of least summed loss with `sum of bits * size <= budget`, every weight having the fewest at least.

    Greedy: always the step of one weight that saves most loss per bit. These steps walk along the lower convex hulls
    of the curves, which is the optimum for every budget that is met exactly (Shoham and Gersho, «Efficient bit
    allocation for an arbitrary set of quantizers», 1988); what is left is spent on shorter steps that still fit.
    """
    chosen = {name: min(curve) for name, curve in curves.items()}
    left = budget - sum(bits * sizes[name] for name, bits in chosen.items())
    heap: list[tuple[float, str, int]] = []

    def push_best_step(name: str) -> None:
        now, curve = chosen[name], curves[name]
        steps = [
            (-saved / ((bits - now) * sizes[name]), name, bits)
            for bits, loss in curve.items()
            if bits > now and (saved := curve[now] - loss) > 0 and (bits - now) * sizes[name] <= left
        ]
        if steps:
            heapq.heappush(heap, min(steps))

    for name in curves:
        push_best_step(name)
    while heap:
        _, name, bits = heapq.heappop(heap)
        if (bits - chosen[name]) * sizes[name] <= left:
            left -= (bits - chosen[name]) * sizes[name]
            chosen[name] = bits
        push_best_step(name)
    return chosen


def loss_increases(
    captured: CapturedGraph, specs: Mapping[str, WeightSpec], batches: Sequence[Any], seed: int = 0
) -> Curves:
    """What quantizing one weight of `specs` alone, at each of `BITS`, adds to the loss of the float graph.

    To second order, with x [T, K] what a linear reads, g [T, N] the gradient of the loss with respect to what it gives
    and D = quantized - W:

        increase = 1/2 * sum over tokens of (g . D x)^2

    without the terms between tokens. For a causal language model the loss is the cross-entropy with tokens drawn from
    the model's own predictions, whose squared gradients average to the Fisher matrix, the curvature of
    KL(float || quantized) (Martens, arXiv 1412.1193, section 5): nats per token. For any other model it is the product
    of its outputs with random signs, each output divided by its norm; squares of its gradients average to those of the
    Jacobian (Hutchinson's estimator): half the squared change of the outputs, relative to their square.

    One forward and one backward pass over the first `BATCHES` batches, after a forward pass for the ranges, in
    which each input channel counts by its mean square.
    """
    batches = batches[:BATCHES]
    curves: Curves = {name: dict.fromkeys(BITS, 0.0) for name in specs}
    blocks = find_blocks(captured, ())
    nodes = [node for block in blocks for node in block.nodes]
    generator = torch.Generator().manual_seed(seed)
    total = 0

    def add_in_backward_pass(name: str, weight: Tensor, reading: Reading, x: Sequence[Tensor], output: Tensor) -> None:
        output.requires_grad_()  # an input of the graph has no gradient, nor has what derives from it
        hook = functools.partial(_add_increases, curves[name], grids[name], weight, reading, [v.detach() for v in x])
        output.register_hook(hook)

    with task("measuring sensitivity", 2 * len(batches)) as bar:
        grids = _clipped_grids(captured, nodes, specs, batches, bar)
        for number, batch in enumerate(batches):
            with torch.enable_grad():
                values = _run(captured, nodes, specs, batch, number, add_in_backward_pass)
                outputs = [values[node] for node in blocks[-1].outputs] or _ends(nodes, values)
                check_finite(outputs, number)
                if captured.decoder is not None:
                    loss, count = loss_of_drawn_tokens(outputs[0], batch, generator)
                else:
                    loss, count = _signed_sum(outputs, generator), 1
                del values
                if loss.requires_grad:
                    loss.backward()
            total += count
            bar.advance()
    return {name: {bits: loss / max(total, 1) for bits, loss in curve.items()} for name, curve in curves.items()}


def _run(
    captured: CapturedGraph,
    nodes: Sequence[Node],
    specs: Mapping[str, WeightSpec],
    batch: Any,
    number: int,
    seen: Callable[[str, Tensor, Reading, Sequence[Tensor], Tensor], None],
) -> Values:
    """All values of the float graph for a batch; `seen` gets each product of `specs`: name, weight, how it reads
    its input, the values of that, and its output."""
    products = set(product_nodes(captured.graph_module))
    with batch_named(number):
        values = captured.placeholder_values(batch)
        for node in nodes:
            run([node], values)
            if node in products and (name := weight_name_of(node)) in specs:
                reading = Reading.of(node)
                inputs = [values[source] for source in reading.nodes]
                seen(name, node_tensor(weight_node(node)), reading, inputs, values[node])
    return values


def _clipped_grids(
    captured: CapturedGraph,
    nodes: Sequence[Node],
    specs: Mapping[str, WeightSpec],
    batches: Sequence[Any],
    bar: Task,
) -> dict[str, dict[int, Grid]]:
    """The grids of least error of each weight, for each of `BITS`."""
    squares: dict[str, Tensor] = {}

    def add_squares(name: str, weight: Tensor, reading: Reading, x: Sequence[Tensor], _output: Tensor) -> None:
        value, *experts = x
        parts = reading.parts(value)
        for part in parts:
            of_part = reading.rows(part, *experts).float().square().mean(1) / len(parts)
            if len(of_part) > 1:
                of_part = of_part.repeat_interleave(len(weight) // len(of_part), 0)
            squares[name] = squares[name] + of_part if name in squares else of_part

    with torch.no_grad():
        for number, batch in enumerate(batches):
            _run(captured, nodes, specs, batch, number, add_squares)
            bar.advance()
    grids: dict[str, dict[int, Grid]] = {}
    for name, spec in specs.items():
        weight = get_tensor(captured.graph_module, name)
        grids[name] = {
            bits: find_clipped_grid(weight, dataclasses.replace(spec, bits=bits), weight.dtype, squares[name])
            for bits in BITS
        }
    return grids


def _add_increases(
    curve: dict[int, float],
    grids: Mapping[int, Grid],
    weight: Tensor,
    reading: Reading,
    x: Sequence[Tensor],
    gradient: Tensor,
) -> None:
    """A hook on the gradient of a product's output; x are the values of which `reading` makes rows."""
    lost = {bits: dequantize(quantize(weight, grid), grid).sub_(weight) for bits, grid in grids.items()}
    value, *experts = x
    # One row of several experts holds a token of each.
    tokens = reading.groups if experts else 1
    for part, of_part in zip(reading.parts(value), reading.parts(gradient), strict=True):
        rows, wanted = reading.rows(part, *experts).float(), reading.flat(of_part, *experts).float()
        for bits, change in lost.items():
            changes = outputs_for(rows, change).mul_(wanted).unflatten(-1, (tokens, -1))
            curve[bits] += 0.5 * float(changes.sum(-1).square_().sum())


def loss_of_drawn_tokens(logits: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator) -> tuple[Tensor, int]:
    """Cross-entropy of logits [b, s, vocab] with tokens drawn from them, summed without padding; how many tokens."""
    mask = batch.get("attention_mask")
    logits = (logits if mask is None else logits[mask.bool().to(logits.device)]).float().flatten(0, -2)
    drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
    return torch.nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum"), len(drawn)


def _signed_sum(outputs: Sequence[Tensor], generator: torch.Generator) -> Tensor:
    """The outputs' summed products with random signs, each output divided by its norm."""
    total = torch.zeros(())
    for output in outputs:
        signs = torch.randint(2, output.shape, generator=generator).mul_(2).sub_(1).to(output)
        norm = output.detach().float().norm().clamp(min=1e-30)
        total = total.to(output.device) + (output.float() * signs).sum() / norm
    return total


def _ends(nodes: Sequence[Node], values: Values) -> list[Tensor]:
    """What is differentiable and read by nothing that is, in a graph that ends in an argmax, say."""

    def is_differentiable(node: Node) -> bool:
        return isinstance(values.get(node), Tensor) and values[node].requires_grad

    ends = [node for node in nodes if is_differentiable(node) and not any(map(is_differentiable, node.users))]
    return [values[node] for node in ends]
