"""Learn the scales. Knows equivalences and blocks, not architectures.

The captured graph holds scales and fake-quantization as nodes (`insert_scales`); a clone without them is
the float reference. Both advance block by block over the calibration batches, so no more than one block's
activations are alive, and each activation is computed once.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from teq_graph import graph as fx
from teq_graph.analysis.blocks import Block
from teq_graph.capture import CapturedGraph
from teq_graph.config import TrainingConfig, WeightSpec
from teq_graph.errors import InputError, NumericsError
from teq_graph.execution import Values, constant_ancestors, input_values, keep_only, needed_after, run
from teq_graph.files import one_line
from teq_graph.graph import aten
from teq_graph.passes.insert_scales import SMALLEST_SCALE, InsertScales
from teq_graph.progress import Task, task
from teq_graph.report import BlockReport
from teq_graph.training.initialization import initial_scale

TargetOf = Callable[[int], Sequence[Tensor]]
"""Number of a batch -> the float block's outputs for it."""

ROWS = 256
"""Rows of each linear's input that the search for initial scales looks at."""
LOSS_BATCHES = 4
"""Batches on which a block's error is measured before and after."""
BLOCK_LEARNING_RATE = 2e-2
MODEL_LEARNING_RATE = 1e-3  # arXiv 2310.10944, section 4.1, as are the betas
BETAS = (0.9, 0.9)
NO_TOKEN = -100


@dataclasses.dataclass
class Trainer:
    """One training run over one graph; `reports` is filled as it goes, one entry for each trained block, or
    one with the loss of the whole model."""

    captured: CapturedGraph
    inserted_pass: InsertScales
    blocks: Sequence[Block]
    batches: Sequence[Any]
    config: TrainingConfig
    reports: list[BlockReport] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        # All are taken before the scales go in.
        self.blocks = [_with_outputs(block) for block in self.blocks]
        self.block_of = {name: index for index, block in enumerate(self.blocks) for name in _read_tensors(block)}
        self.reference = fx.clone(self.captured.graph_module)
        self.twin = {node.name: node for node in self.reference.graph.nodes}
        self.inserted_pass(self.captured.graph_module)
        assert self.inserted_pass.inserted is not None
        self.inserted = self.inserted_pass.inserted
        self.specs: Mapping[str, WeightSpec] = self.inserted_pass.specs
        self.generator = torch.Generator().manual_seed(self.config.seed)

    def run(self) -> None:
        """Learn the scales by the configured objective."""
        if self.config.objective == "block":
            self._train_blocks()
        else:
            self._train_model()

    # ------------------------------------------------------------------------------------------------ objectives

    def _train_blocks(self) -> None:
        """Each block in turn, with the quantized blocks before it as its input."""
        values = [self._inputs(number) for number in range(len(self.batches))]
        kept = needed_after([block.nodes for block in self.blocks])
        trained = [index for index in range(len(self.blocks)) if self._scales_of(index)]
        with task("training scales", len(trained) * self.config.steps or None) as bar:
            # What follows the last scales (the vocabulary projection, mostly) is not run at all.
            until_last = range(max(trained, default=-1) + 1)
            for index, block, (samples, target_of) in zip(until_last, self.blocks, self._walk_float(), strict=False):
                scales = self._scales_of(index)
                weight_nodes = constant_ancestors(block.nodes)
                if scales:
                    learned = [self._parameter(number) for number in scales]
                    before = self._mean_loss(block, weight_nodes, values, target_of)
                    self._initialize(scales, samples)
                    nodes = [*weight_nodes, *block.nodes]
                    loss_of = functools.partial(_block_error, nodes, block.outputs, values, target_of)
                    self._optimize(learned, loss_of, BLOCK_LEARNING_RATE, (0.9, 0.999), bar)
                    after = self._mean_loss(block, weight_nodes, values, target_of)
                    if self.config.steps and after > before:
                        for parameter in learned:
                            parameter.data.fill_(1)
                        after = before
                    self.reports.append(BlockReport(block.linears, before, after))
                with torch.no_grad():
                    weights: Values = {}
                    run(weight_nodes, weights)
                    for number, env in enumerate(values):
                        env.update(weights)
                        run(block.nodes, env)
                        values[number] = keep_only(env, kept[index])

    def _train_model(self) -> None:
        """The paper's recipe: one loss over the whole model, here for all scales at once."""
        nodes = [node for block in self.blocks for node in block.nodes]
        weight_nodes = constant_ancestors(nodes)
        outputs = self.blocks[-1].outputs
        float_nodes = [self.twin[node.name] for node in nodes]
        if self.captured.decoder is not None:
            for number, batch in enumerate(self.batches):
                if not bool((next_tokens(batch) >= 0).any()):
                    raise InputError(
                        f"calibration batch {number}: no token follows another in its {list(batch['input_ids'].shape)} "
                        'input_ids; objective="model" needs rows of at least two tokens'
                    )

        def loss_of(number: int) -> Tensor:
            env = self._inputs(number)
            if self.captured.decoder is not None:
                run([*weight_nodes, *nodes], env)
                return next_token_loss(env[outputs[0]], self.batches[number])
            target = self._inputs(number, self.reference)
            _run_float(float_nodes, target, number)
            run([*weight_nodes, *nodes], env)
            return relative_error([env[n] for n in outputs], [target[self.twin[n.name]] for n in outputs])

        def mean_loss() -> float:
            with torch.no_grad():
                return sum(float(loss_of(number)) for number in range(len(self.batches))) / len(self.batches)

        learned = [self._parameter(number) for number in range(len(self.inserted.scales))]
        if learned:
            before = mean_loss()
            if self.config.init != "ones":
                for index, (samples, _) in enumerate(self._walk_float()):
                    self._initialize(self._scales_of(index), samples)
            with task("training scales", self.config.steps) as bar:
                self._optimize(learned, loss_of, MODEL_LEARNING_RATE, BETAS, bar)
            self.reports.append(BlockReport(tuple(self.specs), before, mean_loss()))

    # ---------------------------------------------------------------------------------------------------- pieces

    def _scales_of(self, block: int) -> list[int]:
        """The equivalences that lie within one block and reach a linear that is quantized."""
        found = []
        for number, equivalence in enumerate(self.inserted.equivalences):
            blocks = {self.block_of[s.name] for s in (*equivalence.divided, *equivalence.multiplied)}
            if blocks == {block} and any(name in self.specs for name in equivalence.linears):
                found.append(number)
        return found

    def _parameter(self, number: int) -> Tensor:
        return fx.get_tensor(self.captured.graph_module, self.inserted.scales[number])

    def _inputs(self, number: int, graph_module: GraphModule | None = None) -> Values:
        with _batch_named(number):
            return input_values(self.captured, self.batches[number], graph_module)

    def _initialize(self, scales: Iterable[int], samples: Mapping[str, Tensor]) -> None:
        for number in scales:
            equivalence = self.inserted.equivalences[number]
            weights = {name: fx.get_tensor(self.reference, name).detach() for name in equivalence.linears}
            scale = initial_scale(equivalence, self.config.init, weights, samples, self.specs)
            self._parameter(number).data.copy_(scale)

    def _walk_float(self) -> Iterator[tuple[dict[str, Tensor], TargetOf]]:
        """Advance the float reference: for each block, samples of its linears' inputs and its output per batch.

        The last block's outputs (logits) are far larger than its inputs, and computed again when asked for.
        """
        values = [self._inputs(number, self.reference) for number in range(len(self.batches))]
        stretches = [[self.twin[node.name] for node in block.nodes] for block in self.blocks]
        kept = needed_after(stretches)
        rows = -(-ROWS // len(self.batches))
        for index, nodes in enumerate(stretches):
            samples: dict[str, list[Tensor]] = {}
            targets: list[list[Tensor]] = []
            output_nodes = [self.twin[node.name] for node in self.blocks[index].outputs]
            is_last = index == len(stretches) - 1
            inputs = [dict(env) for env in values] if is_last else []
            for number, env in enumerate(values):
                _run_float(nodes, env, number)
                for node in nodes:
                    if fx.is_call(node, aten.linear.default) and fx.is_tensor_constant(node.args[1]):
                        read = env[fx.operand(node)]
                        samples.setdefault(fx.weight_name(node), []).append(self._some_rows(read, rows))
                outputs = [env[node] for node in output_nodes]
                if not all(bool(torch.isfinite(output).all()) for output in outputs):
                    raise NumericsError(f"calibration batch {number}: the float model gives NaN or infinity")
                if not is_last:
                    targets.append(outputs)
                values[number] = keep_only(env, kept[index])
            joined = {name: torch.cat(parts) for name, parts in samples.items()}
            again = functools.partial(_computed_again, nodes, output_nodes, inputs)
            yield joined, again if is_last else targets.__getitem__

    def _some_rows(self, read: Tensor, rows: int) -> Tensor:
        flat = read.reshape(-1, read.shape[-1])
        return flat[torch.randperm(flat.shape[0], generator=self.generator)[:rows].to(flat.device)]

    def _mean_loss(self, block: Block, weight_nodes: list[Node], values: list[Values], target_of: TargetOf) -> float:
        with torch.no_grad():
            weights: Values = {}
            run(weight_nodes, weights)
            inputs = [{**env, **weights} for env in values[:LOSS_BATCHES]]
            losses = [
                float(_block_error(block.nodes, block.outputs, inputs, target_of, number))
                for number in range(len(inputs))
            ]
        return sum(losses) / len(losses)

    def _optimize(
        self,
        learned: list[Tensor],
        loss_of: Callable[[int], Tensor],
        rate: float,
        betas: tuple[float, float],
        bar: Task,
    ) -> None:
        steps = self.config.steps
        optimizer = torch.optim.Adam(learned, lr=self.config.learning_rate or rate, betas=betas)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: decay(step, steps, self.config.warmup))
        order: list[int] = []
        for _ in range(steps):
            order = order or torch.randperm(len(self.batches), generator=self.generator).tolist()
            loss = loss_of(order.pop())
            value = float(loss.detach())
            if not math.isfinite(value):
                raise NumericsError(f"training loss is {value}: accepted are finite losses; lower learning_rate")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for parameter in learned:
                    parameter.clamp_(min=SMALLEST_SCALE)
            bar.advance(1, note=f"loss {value:.3g}")


def decay(step: int, steps: int, warmup: float) -> float:
    """Linear warm-up over the first part of the steps, then linear decay to zero."""
    rising = max(1, round(steps * warmup))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising))


def relative_error(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """Squared error over the last dimension, each token relative to its own mean square.

    A few tokens are hundreds of times larger than the others in trained decoders; an absolute error would
    be about them alone.
    """
    losses = []
    for output, target in zip(outputs, targets, strict=True):
        target = target.float()
        error = (output.float() - target).square().mean(-1)
        losses.append((error / target.square().mean(-1).clamp(min=1e-12)).mean())
    return torch.stack(losses).mean()


def next_token_loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Cross-entropy of each next token in nats, padding left out; logits [b, s, vocab]."""
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), next_tokens(batch).flatten(), ignore_index=NO_TOKEN
    )


def next_tokens(batch: Mapping[str, Tensor]) -> Tensor:
    """What follows each token but the last [b, s - 1]; NO_TOKEN where that is padding."""
    labels = batch["input_ids"][:, 1:]
    mask = batch.get("attention_mask")
    return labels if mask is None else labels.masked_fill(mask[:, 1:] == 0, NO_TOKEN)


@contextlib.contextmanager
def _batch_named(number: int) -> Iterator[None]:
    """Errors of the block, as those of the calibration batch that the model cannot take."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except InputError as error:
        raise InputError(f"calibration batch {number}: {error}") from error
    except (RuntimeError, IndexError, TypeError, ValueError) as error:  # what torch's operators raise
        raise InputError(f"calibration batch {number}: the model cannot take it: {one_line(error)}") from error


def _run_float(nodes: Sequence[Node], values: Values, number: int) -> None:
    """Compute `nodes` of the float graph for the calibration batch `number`."""
    with torch.no_grad(), _batch_named(number):
        run(nodes, values)


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


def _block_error(
    nodes: Sequence[Node], outputs: Sequence[Node], values: Sequence[Values], target_of: TargetOf, number: int
) -> Tensor:
    """Error of a block's outputs for one batch, computed by `nodes` from `values[number]`."""
    env = dict(values[number])
    run(nodes, env)
    return relative_error([env[node] for node in outputs], target_of(number))


def _computed_again(
    nodes: Sequence[Node], outputs: Sequence[Node], values: Sequence[Values], number: int
) -> list[Tensor]:
    env = dict(values[number])
    with torch.no_grad():
        run(nodes, env)
    return [env[node] for node in outputs]


def _read_tensors(block: Block) -> set[str]:
    return {str(source.target) for node in block.nodes for source in node.all_input_nodes if source.op == "get_attr"}
