"""The stages that choose a block's codes: each takes what the one before chose, and gives something better.

    nothing chosen --clip--> grids of least error --gptq--> codes of least output error --tune--> codes and grids
    that give the float block's output

`round_to_nearest` starts every chain; any of the others can be left out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from teq_graph import quantization
from teq_graph.config import TrainingConfig, WeightSpec
from teq_graph.graph.products import outputs_for
from teq_graph.quantization import Grid, LearnedWeight, dequantize, descend, find_clipped_grid, find_grid, quantize
from teq_graph.report import Curve
from teq_graph.system.progress import Task
from teq_graph.training.optimize import Learned, optimize
from teq_graph.training.precision import Precision

LATENT_RATE = 6e-3
"""Of rounding, in codes per step."""
ZERO_RATE = 5e-3
"""Of zero points, in codes per step."""
GROUP_SCALE_RATE = 5e-4
"""Of the logarithm of group scales."""
FLOAT_RATE = 5e-4
"""Of gains and biases, relative to their root mean square."""


@dataclasses.dataclass(frozen=True)
class BlockProblem:
    """What a block's stages go by.

    weights: float [N, K] by name, scales folded in; `specs` likewise.
    moments: for each weight the second moments [groups, K, K] of what it is multiplied with, in the model whose earlier
        blocks are quantized; each group has N / groups rows, one after the other.
    means: for each weight the mean [groups, K] of those.
    floats: the block's other parameters that may change, by name: gains and biases [n].
    bias_of: weight name -> name of its linear's bias among `floats`.
    loss_of: number of a batch and the block's tensors, by name -> error of the block's outputs, its products computed
        with `precision`.
    """

    weights: Mapping[str, Tensor]
    specs: Mapping[str, WeightSpec]
    moments: Mapping[str, Tensor]
    means: Mapping[str, Tensor]
    floats: Mapping[str, Tensor]
    bias_of: Mapping[str, str]
    loss_of: Callable[[int, Mapping[str, Tensor]], Tensor]
    batches: int
    precision: Precision

    def scale_dtype(self, name: str) -> torch.dtype:
        """The dtype in which the scales of a weight are stored."""
        return self.weights[name].dtype


@dataclasses.dataclass(frozen=True)
class Choice:
    """Codes uint8 [N, K] and grid of each weight, and those of the block's other parameters that changed."""

    codes: Mapping[str, tuple[Tensor, Grid]]
    floats: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def tensors(self, problem: BlockProblem) -> dict[str, Tensor]:
        """The block's tensors, by name, as this choice has them."""
        quantized = {name: dequantize(*chosen).to(problem.scale_dtype(name)) for name, chosen in self.codes.items()}
        return {**quantized, **problem.floats, **self.floats}


def rounded_to_nearest(weight: Tensor, spec: WeightSpec) -> tuple[Tensor, Grid]:
    """Codes and grid over the whole range of each group; scales are stored in the weight's dtype."""
    grid = find_grid(weight, spec, weight.dtype)
    return quantize(weight, grid), grid


def round_to_nearest(problem: BlockProblem) -> Choice:
    """Each weight on the whole range of its groups."""
    return Choice({name: rounded_to_nearest(w, problem.specs[name]) for name, w in problem.weights.items()})


def clip(problem: BlockProblem, choice: Choice) -> Choice:
    """Ranges of least error, where each input channel counts by its mean square."""
    codes = {}
    for name, weight in problem.weights.items():
        squares = problem.moments[name].diagonal(dim1=1, dim2=2)
        importance = squares.repeat_interleave(len(weight) // len(squares), 0) if len(squares) > 1 else squares[0]
        grid = find_clipped_grid(weight, problem.specs[name], problem.scale_dtype(name), importance)
        codes[name] = (quantize(weight, grid), grid)
    return dataclasses.replace(choice, codes=codes)


def gptq(problem: BlockProblem, choice: Choice) -> Choice:
    """GPTQ on the chosen grids, and sweeps of coordinate descent; of all weights at once that read the same and have
    groups alike."""
    alike: dict[tuple[int, WeightSpec, torch.dtype], list[str]] = {}
    for name in problem.weights:
        key = (id(problem.moments[name]), problem.specs[name], problem.scale_dtype(name))
        alike.setdefault(key, []).append(name)
    codes: dict[str, tuple[Tensor, Grid]] = {}
    for (_, _, dtype), names in alike.items():
        moments = problem.moments[names[0]]
        weights = [problem.weights[name].chunk(len(moments)) for name in names]
        sizes = [len(groups[0]) for groups in weights]
        grids = [choice.codes[n][1].split([size] * len(moments)) for n, size in zip(names, sizes, strict=True)]
        found = []
        # Of each group the rows of all weights.
        for rows, of_group, grid in zip(zip(*weights, strict=True), moments, zip(*grids, strict=True), strict=True):
            joined, start = torch.cat(rows), Grid.cat(grid)
            chosen, fitted = descend(joined, of_group, quantization.gptq(joined, of_group, start), start, dtype)
            found.append(zip(chosen.split(sizes), fitted.split(sizes), strict=True))
        for name, parts in zip(names, zip(*found, strict=True), strict=True):
            of_groups, fitted_grids = zip(*parts, strict=True)
            codes[name] = (torch.cat(of_groups), Grid.cat(fitted_grids))
    return dataclasses.replace(choice, codes=codes)


def bias(problem: BlockProblem, choice: Choice) -> Choice:
    """Biases that take in the mean error of their linear's output (arXiv 1906.04721, section 4.2)."""
    floats = dict(choice.floats)
    for name, bias_name in problem.bias_of.items():
        lost = problem.weights[name].float() - dequantize(*choice.codes[name])
        present = floats.get(bias_name, problem.floats[bias_name])
        mean = outputs_for(problem.means[name][:, None], lost)[0]
        floats[bias_name] = (present.float() + mean).to(present.dtype)
    return dataclasses.replace(choice, floats=floats)


CHOOSING: Mapping[str, Callable[[BlockProblem, Choice], Choice]] = {"clip": clip, "gptq": gptq, "bias": bias}
"""The stages that choose without training, in order."""


def tune(
    problem: BlockProblem, choice: Choice, config: TrainingConfig, generator: torch.Generator, bar: Task
) -> tuple[Choice, Curve]:
    """Codes, scales, zero points, gains and biases together learn to give the float block's output; and the losses."""
    weights = {
        name: LearnedWeight.start(problem.weights[name], *chosen, problem.scale_dtype(name))
        for name, chosen in choice.codes.items()
    }
    floats = {name: LearnedVector(choice.floats.get(name, start)) for name, start in problem.floats.items()}

    dtypes = {name: problem.precision.weight_dtype(problem.scale_dtype(name)) for name in weights}

    def tensors() -> dict[str, Tensor]:
        values = {name: weight.value(dtypes[name]) for name, weight in weights.items()}
        return {**values, **{name: vector.value() for name, vector in floats.items()}}

    def loss_of(number: int) -> Tensor:
        return problem.loss_of(number, tensors())

    pace = (config.tuning_rate or LATENT_RATE) / LATENT_RATE
    learned = {
        "rounding": Learned([w.latent for w in weights.values()], LATENT_RATE * pace),
        "group_scales": Learned([w.log_scale for w in weights.values()], GROUP_SCALE_RATE * pace),
        "zero_points": Learned([w.zero for w in weights.values() if not w.symmetric], ZERO_RATE * pace),
        "floats": Learned([vector.change for vector in floats.values()], FLOAT_RATE * pace),
    }
    groups = [learned[name] for name in config.tuned]
    curve = Curve.of(())
    # Symmetric weights have no zero points to tune, and not every block has floats.
    if any(group.tensors for group in groups):
        curve = optimize(groups, loss_of, problem.batches, config, generator, bar)
    codes = {name: weight.result() for name, weight in weights.items()}
    return Choice(codes, {name: vector.value().detach() for name, vector in floats.items()}), curve


class LearnedVector:
    """A gain or bias that changes in units of its root mean square; one of zeros stays so."""

    def __init__(self, start: Tensor) -> None:
        self.start = start.detach()
        self.unit = self.start.float().square().mean().sqrt()
        self.change = torch.zeros_like(self.start, dtype=torch.float32)

    def value(self) -> Tensor:
        """The vector as it is now, in its own dtype."""
        return (self.start + self.unit * self.change).to(self.start.dtype)
