"""Learn scales and choose codes. Knows equivalences and blocks, not architectures.

    captured ──clone──▶ working ──insert scales──▶ block after block: teq, clip, gptq, bias, tune ──▶ distill
       │                                                                                               │
       └── the float reference ◀── learned scales folded in, tuned gains and biases ◀──────────────────┘

Both graphs advance block by block over the calibration batches. Of each block first the scales are learned, then its
stages choose codes, and the next block sees what they give.
"""

from __future__ import annotations

import collections
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from teq_graph import pipeline
from teq_graph.analysis.blocks import Block, find_blocks
from teq_graph.analysis.equivalences import Equivalence
from teq_graph.capture import CapturedGraph
from teq_graph.config import BLOCK_STAGES, TrainingConfig, WeightSpec
from teq_graph.errors import InputError
from teq_graph.graph.execution import Values, advance, constant_ancestors, needed_after, run, shared
from teq_graph.graph.products import expert_counts
from teq_graph.graph.tensors import clone_graph, get_tensor, replace_tensors, set_tensor
from teq_graph.passes.fold_scales import FoldScales
from teq_graph.passes.insert_scales import SMALLEST_SCALE, InsertScales
from teq_graph.quantization import QuantizedWeight
from teq_graph.report import BlockReport, WeightErrors, errors_of
from teq_graph.system import memory
from teq_graph.system.progress import task
from teq_graph.training.block import BlockTrainer, starting_scale
from teq_graph.training.losses import (
    as_tokens,
    mean_loss,
    next_token_loss,
    next_tokens,
    prediction_divergence,
    relative_error,
)
from teq_graph.training.optimize import Learned, optimize
from teq_graph.training.precision import Precision
from teq_graph.training.reference import FloatReference, batch_named
from teq_graph.training.stages.codes import Choice, rounded_to_nearest
from teq_graph.training.stages.distillation import ValueOf, distill
from teq_graph.training.tensors import StretchTensors

MODEL_LEARNING_RATE = 1e-3  # arXiv 2310.10944, section 4.1, as are the betas
BETAS = (0.9, 0.9)
BLOCKS_PER_TRIM = 8
"""Blocks through which the whole model's step goes before it gives back what their gaps hold."""


@dataclasses.dataclass(frozen=True)
class FirstBlock:
    """What the first block took, from which the rest can be told."""

    seconds: float
    share: float
    """Of the elements of all weights that are trained."""


@dataclasses.dataclass(frozen=True)
class TrainingResult:
    """What was learned.

    `equivalences` are those that were given, each with its learned scale, None where none was trained. `weights` are
    the codes that the stages chose, by name; what is not there is yet to be rounded. `blocks` tells the error of each
    block that was trained, or the loss where scales learned from the whole model; `distillation` that model's loss;
    `errors` tells what each of `weights` is off by.
    """

    equivalences: tuple[Equivalence, ...]
    weights: Mapping[str, QuantizedWeight]
    blocks: tuple[BlockReport, ...]
    distillation: BlockReport | None
    errors: Mapping[str, WeightErrors] = dataclasses.field(default_factory=dict)


class Trainer:
    """One training run over one normalised graph.

    specs: the weights whose codes are chosen. tables: embedding tables that are quantized already, by name, which the
    blocks read while they train. `after_first_block` is told what that took.

    Everything happens on a clone of the graph, so that an exception leaves `captured` as it was. At the end `captured`
    has the learned scales folded in, and the gains and biases that were tuned. Weights are in float; those whose codes
    were chosen are as they were, as nothing reads them any more.
    """

    def __init__(
        self,
        captured: CapturedGraph,
        equivalences: Sequence[Equivalence],
        specs: Mapping[str, WeightSpec],
        batches: Sequence[Any],
        config: TrainingConfig,
        tables: Mapping[str, QuantizedWeight] | None = None,
        after_first_block: Callable[[FirstBlock], None] | None = None,
    ) -> None:
        self.captured = captured
        self.equivalences = tuple(equivalences)
        self.specs = specs
        self.batches = batches
        self.config = config
        self.tables = tables or {}
        self.after_first_block = after_first_block
        self.stages = config.stages_for(specs.values())
        self.experts = expert_counts(captured.graph_module)
        self.generator = torch.Generator().manual_seed(config.seed)
        weights = [get_tensor(captured.graph_module, name) for name in specs]
        self.precision = Precision.for_codes(weights, specs.values())
        self.reference = FloatReference(captured, batches, self.generator, self.precision)
        self.working = clone_graph(captured.graph_module)
        # Blocks are found, and their tensors told apart, before the scales go in.
        found = find_blocks(dataclasses.replace(captured, graph_module=self.working), self.equivalences)
        self.blocks = [_with_outputs(block) for block in found]
        read = [_read_tensors(block) for block in self.blocks]
        self.block_of = {name: index for index, names in enumerate(read) for name in names}
        times = collections.Counter(name for names in read for name in names)
        self.own = [{name for name in names if times[name] == 1} for names in read]
        for name, table in self.tables.items():
            dtype = get_tensor(self.working, name).dtype
            set_tensor(self.working, name, table.dequantize(dtype))
        used = self.equivalences if "teq" in self.stages else ()
        self.inserted = pipeline.run(pipeline.insert_scales(used, specs), self.working).of(InsertScales)
        self.trained: set[int] = set()
        self.reports: list[BlockReport] = []
        self.distillation: BlockReport | None = None
        self.weights: dict[str, QuantizedWeight] = {}
        self.errors: dict[str, WeightErrors] = {}
        self.floats: dict[str, Tensor] = {}

    def run(self) -> TrainingResult:
        """Every stage, the scales by the configured objective; then the learned scales are folded in."""
        memory.trim()  # of what capture and analysis used
        by_model = self.config.objective == "model"
        if "teq" in self.stages and by_model:
            self._train_model()
        by_block = [stage for stage in self.stages if stage in BLOCK_STAGES and not (stage == "teq" and by_model)]
        if by_block:
            self._train_blocks(by_block)
        if "distill" in self.stages and self.config.steps_of_distillation:
            self._distill()
        return TrainingResult(
            self._fold(),
            self.weights,
            tuple(self.reports),
            self.distillation,
            self.errors,
        )

    # ------------------------------------------------------------------------------------------------ objectives

    def _train_blocks(self, by_block: Sequence[str]) -> None:
        """Each block in turn, with the quantized blocks before it as its input."""
        values = [self._inputs(number) for number in range(len(self.batches))]
        kept = needed_after([block.nodes for block in self.blocks])
        indices = range(len(self.blocks))
        scales = [self._scales_of(index) if "teq" in by_block else [] for index in indices]
        chooses = any(stage != "teq" for stage in by_block)
        weights = [self._weights_of(index) if chooses else [] for index in indices]
        steps = sum(map(bool, scales)) * self.config.steps_of_scales
        if "tune" in by_block:
            steps += sum(map(bool, weights)) * self.config.steps
        last = max((index for index in indices if scales[index] or weights[index]), default=-1)
        started = time.monotonic()
        with task("training blocks", steps or None) as bar:
            # What follows the last scales and codes (the vocabulary projection, mostly) is not run at all.
            for index, (samples, target_of) in zip(range(last + 1), self.reference.walk(self.blocks), strict=False):
                block = self.blocks[index]
                trainer = BlockTrainer(
                    self.working,
                    self.inserted,
                    self.specs,
                    block,
                    values,
                    target_of,
                    self.config,
                    self.generator,
                    bar,
                )
                if scales[index] or weights[index]:
                    report = self._train_block(trainer, scales[index], weights[index], index, by_block, samples)
                    self.reports.append(report)
                constants = trainer.tensors.constants()
                with torch.no_grad(), trainer.precision.products():
                    for number in range(len(values)):
                        after = advance(block.nodes, {**values[number], **constants}, kept[index])
                        values[number] = shared(_in_own_dtypes(after), values[0])
                del trainer, constants
                memory.trim()
                if len(self.reports) == 1 and self.after_first_block is not None:
                    self.after_first_block(FirstBlock(time.monotonic() - started, self._share(block)))
                    self.after_first_block = None

    def _train_block(
        self,
        trainer: BlockTrainer,
        scales: Sequence[int],
        weights: Sequence[str],
        index: int,
        by_block: Sequence[str],
        samples: Mapping[str, Tensor],
    ) -> BlockReport:
        before = error = trainer.error()
        stages: dict[str, float] = {}
        if scales:
            stages["teq"] = error = trainer.learn_scales(scales, samples, self.reference, error)
            self.trained.update(scales)
        if weights:
            floats = [name for name in trainer.tensors.gains_and_biases() if name in self.own[index]]
            choice, errors, error = trainer.choose_codes(weights, floats, by_block, error, samples)
            self._keep(choice, trainer.weights.__getitem__)
            stages |= errors
            for name in weights:
                of_stages, rows = trainer.linear_errors.get(name, {}), trainer.rows.get(name, ())
                self.errors[name] = dataclasses.replace(self.errors[name], stages=of_stages, rows=rows)
        return BlockReport(trainer.block.linears, before, error, stages, trainer.curves)

    def _train_model(self) -> None:
        """The paper's recipe: one loss over the whole model, here for all scales at once."""
        nodes = [node for block in self.blocks for node in block.nodes]
        weight_nodes = constant_ancestors(nodes)
        outputs = self.blocks[-1].outputs
        target_of = self.reference.targets(self.blocks)
        if self.captured.decoder is not None:
            for number, batch in enumerate(self.batches):
                if not bool((next_tokens(batch) >= 0).any()):
                    raise InputError(
                        f"calibration batch {number}: no token follows another in its {list(batch['input_ids'].shape)} "
                        'input_ids; objective="model" needs rows of at least two tokens'
                    )

        def loss_of(number: int) -> Tensor:
            env = self._inputs(number)
            with batch_named(number):
                run([*weight_nodes, *nodes], env)
            if self.captured.decoder is not None:
                return next_token_loss(env[outputs[0]], self.batches[number])
            target = target_of(number)
            return relative_error(as_tokens(outputs, [env[n] for n in outputs]), as_tokens(outputs, target))

        learned = [get_tensor(self.working, name) for name in self.inserted.scales]
        if not learned:
            return
        before = mean_loss(loss_of, len(self.batches))
        if self.config.init != "ones":
            for index, (samples, _) in enumerate(self.reference.walk(self.blocks)):
                for number in self._scales_of(index):
                    start = starting_scale(self.inserted, number, self.config, samples, self.reference, self.specs)
                    learned[number].data.copy_(start)
        rate = self.config.learning_rate or MODEL_LEARNING_RATE
        with task("training scales", self.config.steps) as bar:
            curve = optimize(
                [Learned(learned, rate)],
                loss_of,
                len(self.batches),
                self.config,
                self.generator,
                bar,
                betas=BETAS,
                smallest=SMALLEST_SCALE,
            )
        after = mean_loss(loss_of, len(self.batches))
        self.trained.update(range(len(learned)))
        self.reports.append(BlockReport(tuple(self.specs), before, after, {"teq": after}, {"teq": curve}))

    def _distill(self) -> None:
        """The whole model once more, for the floats that are left."""
        memory.trim()  # of what the blocks left
        nodes = [node for block in self.blocks for node in block.nodes]
        outputs = self.blocks[-1].outputs
        tensors = StretchTensors(self.inserted, nodes)
        floats = {name: tensors.scaled(name) for name in tensors.gains_and_biases()}
        codes = {
            name: self.weights[name].to_codes() if name in self.weights else rounded_to_nearest(tensors.scaled(name), s)
            for name, s in self.specs.items()
        }
        start = Choice(codes, {**floats, **self.floats})
        # Never a float copy of more than one block's weights.
        constants = tensors.constants(without=[*start.codes, *start.floats])
        stretches = [StretchTensors(self.inserted, block.nodes) for block in self.blocks]
        kept = needed_after([block.nodes for block in self.blocks])
        kept[-1] = set(outputs)
        target_of = self.reference.targets(self.blocks)

        def through(index: int, values: Values, value_of: ValueOf) -> Values:
            stretch = stretches[index]
            if index % BLOCKS_PER_TRIM == 0:
                memory.trim()
            changed = {name: value_of(name) for name in stretch.nodes_of if name in start.codes or name in start.floats}
            return advance(stretch.nodes, {**values, **constants, **stretch.by_node(changed)}, kept[index])

        def loss_of(number: int, value_of: ValueOf) -> Tensor:
            values = self._inputs(number)
            with self.precision.products():
                target = target_of(number)
                # The backward pass computes each block once more, so that no more than one block's values are alive.
                for index in range(len(stretches)):
                    values = checkpoint(through, index, values, value_of, use_reentrant=False)
            if self.captured.decoder is not None:
                return prediction_divergence(values[outputs[0]], target[0], self.batches[number])
            return relative_error(as_tokens(outputs, [values[node] for node in outputs]), as_tokens(outputs, target))

        dtypes = {name: get_tensor(self.working, name).dtype for name in self.specs}
        choice, before, after, curve = distill(
            start, dtypes, self.precision, loss_of, len(self.batches), self.config, self.generator
        )
        self._keep(choice, tensors.scaled)
        self.distillation = BlockReport(tuple(self.specs), before, after, {"distill": after}, {"distill": curve})

    # ---------------------------------------------------------------------------------------------------- pieces

    def _inputs(self, number: int) -> Values:
        return self.reference.inputs(number, self.working)

    def _keep(self, choice: Choice, weight_of: Callable[[str], Tensor]) -> None:
        """In storage's layout: a code for each byte would be the largest of what training keeps. `weight_of` gives
        what the codes stand for."""
        for name, chosen in choice.codes.items():
            weight = weight_of(name)
            kept = QuantizedWeight.from_codes(*chosen, weight.dtype)
            found = errors_of(kept, weight, self.experts.get(name, 0))
            before = self.errors.get(name, found)
            self.weights[name] = kept
            self.errors[name] = dataclasses.replace(found, stages=before.stages, rows=before.rows)
        self.floats.update(choice.floats)

    def _fold(self) -> tuple[Equivalence, ...]:
        """Gives `captured` what was learned; the equivalences with their scales."""
        phase = pipeline.fold_scales(self.inserted, self.weights.keys())
        scales = pipeline.run(phase, self.working).of(FoldScales)
        taken = {*self.tables, *self.weights}
        folded = {name: get_tensor(self.working, name) for name in self.inserted.scaled if name not in taken}
        replace_tensors(self.captured.graph_module, {**folded, **self.floats})
        return tuple(
            dataclasses.replace(equivalence, scale=scales[number] if number in self.trained else None)
            for number, equivalence in enumerate(self.equivalences)
        )

    def _share(self, block: Block) -> float:
        sizes = {name: get_tensor(self.captured.graph_module, name).numel() for name in self.specs}
        return sum(sizes.get(name, 0) for name in dict.fromkeys(block.linears)) / max(1, sum(sizes.values()))

    def _scales_of(self, block: int) -> list[int]:
        """The equivalences that lie within one block and reach a linear that is quantized."""
        found = []
        for number, equivalence in enumerate(self.inserted.equivalences):
            blocks = {self.block_of[s.name] for s in (*equivalence.divided, *equivalence.multiplied)}
            if blocks == {block} and any(name in self.specs for name in equivalence.linears):
                found.append(number)
        return found

    def _weights_of(self, block: int) -> list[str]:
        """The weights whose codes are chosen in the block: those that no later block reads."""
        names = dict.fromkeys(name for name in self.blocks[block].linears if name in self.specs)
        return [name for name in names if self.block_of[name] == block]


def _with_outputs(block: Block) -> Block:
    """`block` with floating-point outputs; where none leaves it (the model ends in an argmax), those inside from
    which no other derives."""
    if block.outputs:
        return block
    floats = [node for node in block.nodes if _is_float(node)]
    read = {source for node in floats for source in node.all_input_nodes}
    return dataclasses.replace(block, outputs=tuple(node for node in floats if node not in read))


def _in_own_dtypes(values: Values) -> Values:
    """Values as the next block reads them, whatever this one's products were computed in."""
    return {node: value.to(node.meta["val"].dtype) if _is_float(node) else value for node, value in values.items()}


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _read_tensors(block: Block) -> set[str]:
    return {str(source.target) for node in block.nodes for source in node.all_input_nodes if source.op == "get_attr"}
