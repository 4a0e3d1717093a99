"""Learn scales and choose codes. Knows equivalences and blocks, not architectures.

The captured graph holds scales and fake-quantization as nodes (`insert_scales`); a clone without them is
the float reference. Both advance block by block over the calibration batches. Of each block first the scales are
learned, then its stages choose codes, and the next block sees what they give.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils.checkpoint import checkpoint

from teq_graph.analysis.blocks import Block
from teq_graph.capture import CapturedGraph
from teq_graph.config import BLOCK_STAGES, TrainingConfig, WeightSpec
from teq_graph.errors import InputError
from teq_graph.graph.execution import Values, advance, constant_ancestors, needed_after, run, shared
from teq_graph.graph.tensors import get_tensor, set_tensor
from teq_graph.passes.insert_scales import SMALLEST_SCALE, InsertScales
from teq_graph.quantization import QuantizedWeight
from teq_graph.report import BlockReport
from teq_graph.system import memory
from teq_graph.system.progress import task
from teq_graph.training.block import BlockTrainer, starting_scale
from teq_graph.training.distillation import ValueOf, distill
from teq_graph.training.losses import next_token_loss, next_tokens, prediction_divergence, relative_error
from teq_graph.training.optimize import Learned, optimize
from teq_graph.training.reference import FloatReference, batch_named
from teq_graph.training.stages import Choice, fast_products, rounded_to_nearest
from teq_graph.training.tensors import StretchTensors

MODEL_LEARNING_RATE = 1e-3  # arXiv 2310.10944, section 4.1, as are the betas
BETAS = (0.9, 0.9)


@dataclasses.dataclass
class Trainer:
    """One training run over one graph.

    `tables` are the embedding tables that are quantized already, by name: while the blocks train, they read these.
    `reports` is filled as it goes, one entry for each trained block, or one with the loss of the whole model;
    `weights` and `floats` are what the stages chose, by name of the weight, and of the gain or bias.
    """

    captured: CapturedGraph
    inserted_pass: InsertScales
    blocks: Sequence[Block]
    batches: Sequence[Any]
    config: TrainingConfig
    tables: Mapping[str, QuantizedWeight] = dataclasses.field(default_factory=dict)
    reports: list[BlockReport] = dataclasses.field(default_factory=list)
    weights: dict[str, QuantizedWeight] = dataclasses.field(default_factory=dict)
    floats: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        # All are taken before the scales go in.
        self.blocks = [_with_outputs(block) for block in self.blocks]
        read = [_read_tensors(block) for block in self.blocks]
        self.block_of = {name: index for index, names in enumerate(read) for name in names}
        times = collections.Counter(name for names in read for name in names)
        self.own = [{name for name in names if times[name] == 1} for names in read]
        self.generator = torch.Generator().manual_seed(self.config.seed)
        self.reference = FloatReference(self.captured, self.batches, self.generator)
        # The reference keeps the float tables.
        for name, table in self.tables.items():
            dtype = get_tensor(self.captured.graph_module, name).dtype
            set_tensor(self.captured.graph_module, name, table.dequantize(dtype))
        self.inserted = self.inserted_pass(self.captured.graph_module).value
        self.specs: Mapping[str, WeightSpec] = self.inserted_pass.specs
        self.stages = self.config.stages_for(self.specs.values())

    def run(self) -> None:
        """Every stage, the scales by the configured objective."""
        memory.trim()  # of what capture and analysis used
        by_model = self.config.objective == "model"
        if "scales" in self.stages and by_model:
            self._train_model()
        by_block = [stage for stage in self.stages if stage in BLOCK_STAGES and not (stage == "scales" and by_model)]
        if by_block:
            self._train_blocks(by_block)
        if "distill" in self.stages and self.config.steps:
            self._distill()

    # ------------------------------------------------------------------------------------------------ objectives

    def _train_blocks(self, by_block: Sequence[str]) -> None:
        """Each block in turn, with the quantized blocks before it as its input."""
        values = [self.reference.inputs(number) for number in range(len(self.batches))]
        kept = needed_after([block.nodes for block in self.blocks])
        indices = range(len(self.blocks))
        scales = [self._scales_of(index) if "scales" in by_block else [] for index in indices]
        chooses = any(stage != "scales" for stage in by_block)
        weights = [self._weights_of(index) if chooses else [] for index in indices]
        steps = sum(map(bool, scales)) * self.config.steps_of_scales
        if "tune" in by_block:
            steps += sum(map(bool, weights)) * self.config.steps
        last = max((index for index in indices if scales[index] or weights[index]), default=-1)
        with task("training blocks", steps or None) as bar:
            # What follows the last scales and codes (the vocabulary projection, mostly) is not run at all.
            for index, (samples, target_of) in zip(range(last + 1), self.reference.walk(self.blocks), strict=False):
                block = self.blocks[index]
                trainer = BlockTrainer(
                    self.captured.graph_module,
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
                    before = error = trainer.error()
                    if scales[index]:
                        error = trainer.learn_scales(scales[index], samples, self.reference, error)
                    if weights[index]:
                        floats = [name for name in trainer.tensors.gains_and_biases() if name in self.own[index]]
                        choice, error = trainer.choose_codes(weights[index], floats, by_block, error)
                        self._keep(choice)
                    self.reports.append(BlockReport(block.linears, before, error))
                constants = trainer.tensors.constants()
                with torch.no_grad():
                    for number in range(len(values)):
                        after = advance(block.nodes, {**values[number], **constants}, kept[index])
                        values[number] = shared(after, values[0])
                del trainer, constants
                memory.trim()

    def _train_model(self) -> None:
        """The paper's recipe: one loss over the whole model, here for all scales at once."""
        nodes = [node for block in self.blocks for node in block.nodes]
        weight_nodes = constant_ancestors(nodes)
        outputs = self.blocks[-1].outputs
        if self.captured.decoder is not None:
            for number, batch in enumerate(self.batches):
                if not bool((next_tokens(batch) >= 0).any()):
                    raise InputError(
                        f"calibration batch {number}: no token follows another in its {list(batch['input_ids'].shape)} "
                        'input_ids; objective="model" needs rows of at least two tokens'
                    )

        def loss_of(number: int) -> Tensor:
            env = self.reference.inputs(number)
            with batch_named(number):
                run([*weight_nodes, *nodes], env)
            if self.captured.decoder is not None:
                return next_token_loss(env[outputs[0]], self.batches[number])
            return relative_error([env[n] for n in outputs], self.reference.outputs(nodes, outputs, number))

        def mean_loss() -> float:
            with torch.no_grad():
                return sum(float(loss_of(number)) for number in range(len(self.batches))) / len(self.batches)

        learned = [get_tensor(self.captured.graph_module, name) for name in self.inserted.scales]
        if learned:
            before = mean_loss()
            if self.config.init != "ones":
                for index, (samples, _) in enumerate(self.reference.walk(self.blocks)):
                    for number in self._scales_of(index):
                        start = starting_scale(self.inserted, number, self.config, samples, self.reference, self.specs)
                        learned[number].data.copy_(start)
            rate = self.config.learning_rate or MODEL_LEARNING_RATE
            with task("training scales", self.config.steps) as bar:
                optimize(
                    [Learned(learned, rate)],
                    loss_of,
                    len(self.batches),
                    self.config,
                    self.generator,
                    bar,
                    betas=BETAS,
                    smallest=SMALLEST_SCALE,
                )
            self.reports.append(BlockReport(tuple(self.specs), before, mean_loss()))

    def _distill(self) -> None:
        """The whole model once more, for the floats that are left."""
        nodes = [node for block in self.blocks for node in block.nodes]
        outputs = self.blocks[-1].outputs
        tensors = StretchTensors(self.inserted, nodes)
        constants = tensors.constants()
        weights = {name: tensors.scaled(name, constants) for name in self.specs}
        floats = {name: tensors.scaled(name, constants) for name in tensors.gains_and_biases()}
        codes = {
            name: self.weights[name].to_codes() if name in self.weights else rounded_to_nearest(weights[name], spec)
            for name, spec in self.specs.items()
        }
        start = Choice(codes, {**floats, **self.floats})

        stretches = [StretchTensors(self.inserted, block.nodes) for block in self.blocks]
        kept = needed_after([block.nodes for block in self.blocks])
        kept[-1] = set(outputs)

        def through(stretch: StretchTensors, values: Values, needed: set[Node], value_of: ValueOf) -> Values:
            changed = {name: value_of(name) for name in stretch.nodes_of if name in start.codes or name in start.floats}
            return advance(stretch.nodes, {**values, **constants, **stretch.by_node(changed)}, needed)

        def loss_of(number: int, value_of: ValueOf) -> Tensor:
            values = self.reference.inputs(number)
            with fast_products(weights.values(), self.specs.values()):
                target = self.reference.outputs(nodes, outputs, number)
                # The backward pass computes each block once more, so that no more than one block's values are alive.
                for stretch, needed in zip(stretches, kept, strict=True):
                    values = checkpoint(through, stretch, values, needed, value_of, use_reentrant=False)
            if self.captured.decoder is not None:
                return prediction_divergence(values[outputs[0]], target[0], self.batches[number])
            return relative_error([values[node] for node in outputs], target)

        dtypes = {name: weight.dtype for name, weight in weights.items()}
        self._keep(distill(start, dtypes, loss_of, len(self.batches), self.config, self.generator))

    # ---------------------------------------------------------------------------------------------------- pieces

    def _keep(self, choice: Choice) -> None:
        """In storage's layout: a code for each byte would be the largest of what training keeps."""
        for name, chosen in choice.codes.items():
            dtype = get_tensor(self.captured.graph_module, name).dtype
            self.weights[name] = QuantizedWeight.from_codes(*chosen, dtype)
        self.floats.update(choice.floats)

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


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _read_tensors(block: Block) -> set[str]:
    return {str(source.target) for node in block.nodes for source in node.all_input_nodes if source.op == "get_attr"}
