"""One block while it is trained: its constants, its error, and the stages on it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph.analysis.blocks import Block
from teq_graph.config import TrainingConfig, WeightSpec
from teq_graph.graph.execution import Values, advance, run
from teq_graph.graph.nodes import arguments_of
from teq_graph.graph.products import Reading
from teq_graph.graph.tensors import get_tensor
from teq_graph.passes.insert_scales import SMALLEST_SCALE, InsertedScales
from teq_graph.report import Curve
from teq_graph.system import memory
from teq_graph.system.progress import Task
from teq_graph.training.linear_errors import LinearErrors, factors_of
from teq_graph.training.losses import LOSS_BATCHES, as_tokens, mean_loss, relative_error
from teq_graph.training.moments import Moments
from teq_graph.training.optimize import Learned, optimize
from teq_graph.training.precision import Precision
from teq_graph.training.reference import FloatReference, TargetOf
from teq_graph.training.stages.codes import CHOOSING, BlockProblem, Choice, round_to_nearest, tune
from teq_graph.training.stages.scales import initial_scale
from teq_graph.training.tensors import StretchTensors

LEARNING_RATE = 2e-2
"""Of scales."""


@dataclasses.dataclass
class BlockTrainer:
    """A block of `graph_module`, with the values that earlier blocks give it and the float block's outputs."""

    graph_module: GraphModule
    inserted: InsertedScales
    specs: Mapping[str, WeightSpec]
    block: Block
    values: Sequence[Values]
    target_of: TargetOf
    config: TrainingConfig
    generator: torch.Generator
    bar: Task

    def __post_init__(self) -> None:
        self.tensors = StretchTensors(self.inserted, self.block.nodes)
        names = set(self.tensors.linears.values())
        weights = (get_tensor(self.graph_module, name) for name in names)
        self.precision = Precision.for_codes(weights, [self.specs[name] for name in names])
        self.curves: dict[str, Curve] = {}
        self.linear_errors: dict[str, dict[str, float]] = {}
        self.weights: Mapping[str, Tensor] = {}
        self.rows: dict[str, tuple[int, ...]] = {}

    def error(self) -> float:
        """The block's error as it is now, on a few batches."""
        return self._error(self.tensors.constants())

    def learn_scales(
        self, numbers: Sequence[int], samples: Mapping[str, Tensor], reference: FloatReference, before: float
    ) -> float:
        """Learn the scales of the equivalences `numbers`, with weights rounded to nearest; ones where that is worse.

        Returns the block's error, which was `before`.
        """
        learned = [get_tensor(self.graph_module, self.inserted.scales[number]) for number in numbers]
        for number, parameter in zip(numbers, learned, strict=True):
            parameter.data.copy_(starting_scale(self.inserted, number, self.config, samples, reference, self.specs))
        nodes = [*self.tensors.weight_nodes, *self.block.nodes]
        self.curves["teq"] = optimize(
            [Learned(learned, self.config.learning_rate or LEARNING_RATE)],
            functools.partial(self._loss, nodes, {}),
            len(self.values),
            self.config,
            self.generator,
            self.bar,
            steps=self.config.steps_of_scales,
            smallest=SMALLEST_SCALE,
        )
        error = self.error()
        if self.config.steps_of_scales and error > before:
            for parameter in learned:
                parameter.data.fill_(1)
            return before
        return error

    def choose_codes(
        self,
        names: Sequence[str],
        floats: Sequence[str],
        stages: Sequence[str],
        before: float,
        samples: Mapping[str, Tensor],
    ) -> tuple[Choice, dict[str, float], float]:
        """Codes for the weights `names` by the stages: of the results on the way the one with the least error, the
        error after each stage, and the least. Rounded to nearest it is `before`.

        The gains and biases `floats` may change, too. `samples` are inputs of the linears, for the report.
        """
        problem = self._problem(names, floats)
        self.weights = problem.weights
        best = choice = round_to_nearest(problem)
        least, errors = before, dict[str, float]()
        linear_errors = self._linear_errors(problem, choice, samples)

        def measure(stage: str) -> None:
            nonlocal best, least
            memory.trim()
            linear_errors.measure(stage, choice)
            self._use(choice, problem)
            errors[stage] = self.error()
            if errors[stage] < least:
                best, least = choice, errors[stage]

        for name in (name for name in CHOOSING if name in stages):
            choice = CHOOSING[name](problem, choice)
            measure(name)
        # Tuning does not read the moments: their memory is free for its activations.
        problem = dataclasses.replace(problem, moments={}, means={})
        if "tune" in stages and self.config.steps:
            choice, self.curves["tune"] = tune(problem, choice, self.config, self.generator, self.bar)
            measure("tune")
        self._use(best, problem)
        self.linear_errors = linear_errors.by_name
        return best, errors, least

    # ---------------------------------------------------------------------------------------------------- pieces

    def _use(self, choice: Choice, problem: BlockProblem) -> None:
        self.tensors.chosen.update(self.tensors.by_node(choice.tensors(problem)))

    def _error(self, constants: Values) -> float:
        loss_of = functools.partial(self._loss, self.block.nodes, constants)
        return mean_loss(loss_of, min(LOSS_BATCHES, len(self.values)))

    def _loss(self, nodes: Sequence[Node], constants: Mapping[Node, object], number: int) -> Tensor:
        env = {**self.values[number], **constants}
        with self.precision.products():
            run(nodes, env)
        outputs = self.block.outputs
        given, wanted = [env[node] for node in outputs], self.target_of(number)
        return relative_error(as_tokens(outputs, given), as_tokens(outputs, wanted))

    def _problem(self, names: Sequence[str], floats: Sequence[str]) -> BlockProblem:
        constants = self.tensors.constants()
        weights = {name: self.tensors.scaled(name, constants) for name in names}
        vectors = {name: self.tensors.scaled(name, constants) for name in floats}
        for name, weight in weights.items():
            constants[self.inserted.quantized[name]] = weight
        moments, means = self._moments(weights, constants)

        def loss_of(number: int, tensors: Mapping[str, Tensor]) -> Tensor:
            return self._loss(self.block.nodes, {**constants, **self.tensors.by_node(tensors)}, number)

        return BlockProblem(
            weights,
            {name: self.specs[name] for name in names},
            moments,
            means,
            vectors,
            self._bias_of(names, floats),
            loss_of,
            len(self.values),
            self.precision,
        )

    def _linear_errors(self, problem: BlockProblem, rounded: Choice, samples: Mapping[str, Tensor]) -> LinearErrors:
        weights = {name: get_tensor(self.graph_module, name) for name in problem.weights}
        scales = {name: get_tensor(self.graph_module, name) for name in self.inserted.scales}
        factors = factors_of(self.inserted, scales, list(weights))
        return LinearErrors(problem, weights, factors, samples, rounded)

    def _moments(self, weights: Mapping[str, Tensor], constants: Values) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Second moments [groups, K, K] and means [groups, K] of what each weight is multiplied with, float32, over all
        batches; those that read the same share them."""
        reading_of = {name: Reading.of(product) for product, name in self.tensors.linears.items() if name in weights}
        readings = set(reading_of.values())
        sources = {node for reading in readings for node in reading.nodes}
        # Nothing reads what comes after them, the block's last product mostly.
        inside = [index for index, node in enumerate(self.block.nodes) if node in sources]
        nodes = self.block.nodes[: max(inside, default=-1) + 1]
        moments = {reading: Moments() for reading in readings}
        for values in self.values:
            with torch.no_grad(), self.precision.products():
                env = advance(nodes, {**values, **constants}, sources)
            for reading in readings:
                moments[reading].add(reading, *(env[node] for node in reading.nodes))
        self.rows = {name: moments[reading].rows() for name, reading in reading_of.items() if reading.experts}
        second, first = {}, {}
        for reading in readings:
            second[reading], first[reading] = moments[reading].result()
        return (
            {name: second[reading] for name, reading in reading_of.items()},
            {name: first[reading] for name, reading in reading_of.items()},
        )

    def _bias_of(self, names: Sequence[str], floats: Sequence[str]) -> dict[str, str]:
        reads = {node: name for name in floats for node in self.tensors.nodes_of[name]}
        biases = {name: arguments_of(linear)["bias"] for linear, name in self.tensors.linears.items() if name in names}
        return {name: reads[bias] for name, bias in biases.items() if bias in reads}


def starting_scale(
    inserted: InsertedScales,
    number: int,
    config: TrainingConfig,
    samples: Mapping[str, Tensor],
    reference: FloatReference,
    specs: Mapping[str, WeightSpec],
) -> Tensor:
    """Where the scale of equivalence `number` begins."""
    equivalence = inserted.equivalences[number]
    weights = {name: reference.tensor(name) for name in equivalence.linears}
    return initial_scale(equivalence, config.init, weights, samples, specs)
