"""The float model, block by block: what the quantized one is trained to give."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.analysis.blocks import Block
from teq_graph.capture import CapturedGraph
from teq_graph.errors import InputError, NumericsError, one_line
from teq_graph.graph.execution import Values, advance, keep_only, needed_after, run, shared
from teq_graph.graph.products import Reading, is_product, weight_name_of
from teq_graph.graph.tensors import get_tensor
from teq_graph.training.precision import Precision

TargetOf = Callable[[int], Sequence[Tensor]]
"""Number of a batch -> the float block's outputs for it."""

ROWS = 256
"""Rows of each linear's input that the search for initial scales looks at."""


@dataclasses.dataclass
class FloatReference:
    """The captured graph, as it is, and the calibration batches.

    Nodes of a clone are known by their names. No more than one block's activations are alive, each computed once.
    `precision` is that of the products of `walk`, but for those that are computed again.
    """

    captured: CapturedGraph
    batches: Sequence[object]
    generator: torch.Generator
    precision: Precision

    def __post_init__(self) -> None:
        self.graph_module = self.captured.graph_module
        self.twin = {node.name: node for node in self.graph_module.graph.nodes}

    def inputs(self, number: int, graph_module: GraphModule | None = None) -> Values:
        """The placeholders' values for a batch, those of `graph_module`, a clone, if given.

        Raises InputError where it is none of the model's.
        """
        with batch_named(number):
            return self.captured.placeholder_values(self.batches[number], graph_module)

    def tensor(self, name: str) -> Tensor:
        """A tensor as it was."""
        return get_tensor(self.graph_module, name).detach()

    def targets(self, blocks: Sequence[Block]) -> TargetOf:
        """The model's outputs per batch; `blocks` are the whole model.

        What the last block reads is kept for each batch; its outputs (logits) are computed again when asked for.
        """
        *before, last = ([self.twin[node.name] for node in block.nodes] for block in blocks)
        needed = needed_after([*before, last])
        outputs = [self.twin[node.name] for node in blocks[-1].outputs]
        inputs: dict[int, Values] = {}

        def target_of(number: int) -> list[Tensor]:
            with torch.no_grad(), batch_named(number):
                if number not in inputs:
                    values = self.inputs(number, self.graph_module)
                    for nodes, read_later in zip(before, needed, strict=False):
                        values = advance(nodes, values, read_later)
                    inputs[number] = shared(values, next(iter(inputs.values()), {}))
                return _computed_again(last, outputs, inputs, number)

        return target_of

    def walk(self, blocks: Sequence[Block]) -> Iterator[tuple[dict[str, Tensor], TargetOf]]:
        """For each block, samples [groups, T, K] of what its products read, by weight name, and its outputs per batch.

        The last block's outputs (logits) are far larger than its inputs, and computed again when asked for.
        """
        values = [self.inputs(number, self.graph_module) for number in range(len(self.batches))]
        stretches = [[self.twin[node.name] for node in block.nodes] for block in blocks]
        kept = needed_after(stretches)
        for index, nodes in enumerate(stretches):
            samples: dict[str, list[Tensor]] = {}
            targets: list[list[Tensor]] = []
            output_nodes = [self.twin[node.name] for node in blocks[index].outputs]
            is_last = index == len(stretches) - 1
            inputs = dict(enumerate(values)) if is_last else {}
            for number in range(len(values)):
                env, reads = self._pass_batch(nodes, values[number], kept[index].union(output_nodes), number)
                for name, read in reads.items():
                    samples.setdefault(name, []).append(read)
                outputs = [env[node] for node in output_nodes]
                check_finite(outputs, number)
                if not is_last:
                    targets.append(outputs)
                values[number] = shared(keep_only(env, kept[index]), values[0])
            joined = {name: torch.cat(parts, 1) for name, parts in samples.items()}
            again = functools.partial(_computed_again, nodes, output_nodes, inputs)
            yield joined, again if is_last else targets.__getitem__

    def _pass_batch(
        self, nodes: Sequence[Node], values: Values, needed: set[Node], number: int
    ) -> tuple[Values, dict[str, Tensor]]:
        """What a block makes of a batch, as far as it is `needed`, and some rows that its weights read, by name.

        All else that it computes on the way is freed.
        """
        env = dict(values)
        with torch.no_grad(), batch_named(number), self.precision.inputs():
            run(nodes, env)
        reads = {weight_name_of(node): self._some_rows(Reading.of(node), env) for node in nodes if is_product(node)}
        return keep_only(env, needed), reads

    def _some_rows(self, reading: Reading, env: Values) -> Tensor:
        """So many that all batches together give `ROWS`, from each part alike; as many of each expert, at most."""
        parts = reading.parts(env[reading.source])
        rows = -(-ROWS // (len(self.batches) * len(parts)))
        if reading.experts is not None:
            value, experts = (env[node] for node in reading.nodes)
            order = torch.randperm(len(value), generator=self.generator).to(value.device)
            chosen = reading.rows(value[order], experts[order])[:, :rows]
            return torch.nn.functional.pad(chosen, (0, 0, 0, rows - chosen.shape[1]))
        found = []
        for part in parts:
            read = reading.rows(part)
            chosen = torch.randperm(read.shape[1], generator=self.generator)[:rows].to(read.device)
            found.append(read[:, chosen])
        return torch.cat(found, 1)


@contextlib.contextmanager
def batch_named(number: int) -> Iterator[None]:
    """Errors of the block, as those of the calibration batch that the model cannot take."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except InputError as error:
        raise InputError(f"calibration batch {number}: {error}") from error
    except (RuntimeError, IndexError, TypeError, ValueError) as error:  # what torch's operators raise
        raise InputError(f"calibration batch {number}: the model cannot take it: {one_line(error)}") from error


def check_finite(outputs: Sequence[Tensor], number: int) -> None:
    """Raises NumericsError where what the float model gives for a batch is not finite."""
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise NumericsError(f"calibration batch {number}: the float model gives NaN or infinity")


def _computed_again(
    nodes: Sequence[Node], outputs: Sequence[Node], values: Mapping[int, Values], number: int
) -> list[Tensor]:
    with torch.no_grad():
        results = advance(nodes, values[number], set(outputs))
    return [results[node] for node in outputs]
