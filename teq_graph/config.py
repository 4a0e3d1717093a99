"""Frozen configuration values, validated on construction."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from teq_graph.errors import ConfigError

BITS = (2, 3, 4, 8)
GROUP_SIZES = (16, 32, 64, 128, 256, -1)
DTYPES = ("float32", "float16", "bfloat16")
"""Of floats, as users name them."""
ACCURACY_LEVELS = (0, 1, 2, 3, 4)
"""Of MatMulNBits in onnxruntime."""

Objective = Literal["block", "model"]
Init = Literal["ones", "weight", "activation"]

BLOCK_STAGES = ("teq", "clip", "gptq", "bias", "tune")
STAGES = (*BLOCK_STAGES, "distill")
TUNED = ("rounding", "group_scales", "zero_points", "floats")

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "fast": {"stages": ("clip", "gptq")},
    "default": {},
    "best": {
        "stages": ("teq", "clip", "gptq", "tune", "distill"),
        "steps": 200,
        "scale_steps": 50,
        "samples": 128,
        "length": 512,
    },
}
"""What `TrainingConfig.preset` sets."""


def _require(condition: bool, name: str, value: object, accepted: str) -> None:
    if not condition:
        raise ConfigError(f"{name}={value!r}: accepted are {accepted}")


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """How one weight matrix is quantized.

    `group_size` input channels share a scale (and a zero point if not `symmetric`); -1 is one group per
    output channel. Symmetric codes use the fixed zero point `2**(bits - 1)`.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.bits) and self.bits in BITS, "bits", self.bits, f"{BITS}")
        _require(
            _is_int(self.group_size) and self.group_size in GROUP_SIZES,
            "group_size",
            self.group_size,
            f"{GROUP_SIZES} (-1: one group per output channel)",
        )
        _require(isinstance(self.symmetric, bool), "symmetric", self.symmetric, "True or False")

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        return f"W{self.bits}{group}{' sym' if self.symmetric else ''}"


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Which linears and embeddings are quantized, and how.

    `skip` and `overrides` take shell patterns (`fnmatch`) over the name of a weight in the model, for example
    `"*.mlp.*"`; an override is a mapping with any of `bits`, `group_size`, `symmetric`, and the last matching one wins.
    `quantize_lm_head` includes the projection onto the vocabulary; where it is tied to the embedding, it becomes a
    separate, quantized copy, unless `quantize_embedding` lets both read one.

    `quantize_embedding` includes the tables that tokens are looked up in. They are rounded before anything is trained,
    so that the blocks learn to make up for it; so is a tied projection, which no stage changes then. A table whose
    projection stays in float stays in float, too.

    `target_bits`, from 2 to 8, takes the place of `bits`: each linear gets the bits that serve the calibration loss
    best, and the average over all quantized weights is at most this (of codes alone, without scales and zero points).
    Linears whose override sets `bits` keep these, and count; so do embeddings, with `bits` where no override sets them.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    quantize_lm_head: bool = False
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    target_bits: float | None = None
    quantize_embedding: bool = False

    def __post_init__(self) -> None:
        WeightSpec(self.bits, self.group_size, self.symmetric)
        target = self.target_bits
        is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
        _require(
            target is None or (is_number and min(BITS) <= target <= max(BITS)),
            "target_bits",
            target,
            f"None and numbers from {min(BITS)} to {max(BITS)}",
        )
        for name in ("quantize_lm_head", "quantize_embedding"):
            _require(isinstance(getattr(self, name), bool), name, getattr(self, name), "True or False")
        patterns: object = self.skip
        if isinstance(patterns, str):
            raise ConfigError(f"skip={patterns!r}: accepted is a sequence of patterns, not one string")
        object.__setattr__(self, "skip", tuple(self.skip))
        for pattern, override in self.overrides.items():
            unknown = set(override) - {"bits", "group_size", "symmetric"}
            _require(not unknown, f"overrides[{pattern!r}]", override, "bits, group_size and symmetric")
            self._merge(override)

    def _merge(self, override: Mapping[str, Any]) -> WeightSpec:
        values = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        return WeightSpec(**{**values, **override})

    def spec_for(self, weight_name: str) -> WeightSpec | None:
        """The spec of the weight called `weight_name`; None if a `skip` pattern leaves it in float."""
        if any(fnmatch.fnmatchcase(weight_name, pattern) for pattern in self.skip):
            return None
        return self._merge(self._override_for(weight_name))

    def chooses_bits_of(self, weight_name: str) -> bool:
        """Whether the bits of the weight called `weight_name` are chosen to meet `target_bits`."""
        return self.target_bits is not None and "bits" not in self._override_for(weight_name)

    def _override_for(self, weight_name: str) -> Mapping[str, Any]:
        override: Mapping[str, Any] = {}
        for pattern, candidate in self.overrides.items():
            if fnmatch.fnmatchcase(weight_name, pattern):
                override = candidate
        return override


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """How scales are learned and codes are chosen.

    `stages`, of which any can be left out; None takes what serves the bits best:
      - `"teq"`: the equivalences' scales are trained (arXiv 2310.10944), by `objective` from `init`;
      - `"clip"`: each group's range is narrowed to the least error;
      - `"gptq"`: codes are chosen column by column, later ones make up for the errors of earlier ones;
      - `"bias"`: biases take in the mean error of their linear;
      - `"tune"`: block by block, what `tuned` names (rounding, group scales, zero points, and the floats: gains and
        biases) is trained together to give the float block's output;
      - `"distill"`: at last, group scales and floats of the whole model are trained on the float model's logits.

    `objective`:
      - `"block"`: each repeating block of the graph in turn learns to give the float block's output, with
        the already quantized blocks as its input.
      - `"model"`: the paper's recipe (arXiv 2310.10944, section 3): one loss over the whole model, Adam,
        linear decay with warm-up. The loss is that of the next token for a causal language model, and the
        distance to the float model's outputs for any other.
    `init`: `"ones"`, `"weight"` (1/sqrt of each input channel's largest weight, as in the paper) or
    `"activation"` (a search over powers of the mean activation magnitude, as AWQ does).
    `steps` counts optimizer steps of each stage that trains (per block, but for the model objective and `"distill"`);
    0 keeps the initial scales. `scale_steps` are those of the scales where they differ. `learning_rate` is that of the
    scales; `tuning_rate` that of rounding, in codes per step, with the rates of all else that is tuned in proportion.
    `samples` and `length` shape the calibration set where it is cut from text or sampled.
    """

    objective: Objective = "block"
    steps: int = 50
    learning_rate: float | None = None
    tuning_rate: float | None = None
    batch_size: int = 4
    init: Init = "ones"
    warmup: float = 0.05
    samples: int = 64
    length: int = 256
    seed: int = 0
    scale_steps: int | None = None
    stages: tuple[str, ...] | None = None
    tuned: tuple[str, ...] = TUNED

    def __post_init__(self) -> None:
        for name, accepted in (("stages", STAGES), ("tuned", TUNED)):
            value = getattr(self, name)
            if value is not None:
                _require(not isinstance(value, str) and set(value) <= set(accepted), name, value, f"some of {accepted}")
                object.__setattr__(self, name, tuple(part for part in accepted if part in value))
        _require(self.objective in ("block", "model"), "objective", self.objective, '"block" and "model"')
        _require(self.init in ("ones", "weight", "activation"), "init", self.init, '"ones", "weight" and "activation"')
        for name in ("steps", "scale_steps"):
            value = getattr(self, name)
            _require(
                (_is_int(value) and value >= 0) or (name, value) == ("scale_steps", None), name, value, "integers >= 0"
            )
        for name in ("batch_size", "samples", "length"):
            value = getattr(self, name)
            _require(_is_int(value) and value >= 1, name, value, "integers >= 1")
        for name in ("learning_rate", "tuning_rate"):
            rate = getattr(self, name)
            _require(rate is None or 0.0 < rate < 1.0, name, rate, "None or numbers between 0 and 1")
        _require(0.0 <= self.warmup < 1.0, "warmup", self.warmup, "numbers from 0 up to, not including, 1")
        _require(_is_int(self.seed), "seed", self.seed, "integers")

    @classmethod
    def preset(cls, name: str, **options: Any) -> TrainingConfig:
        """A configuration by what it may cost, changed by `options`.

        `"fast"` trains nothing: some two forward passes per calibration token and one Cholesky factor per linear.
        `"default"` trains each block for 50 steps. `"best"` trains each block for 200 steps on four times the text and
        then the whole model, which has to fit in memory with its gradients: tens of times the time of `"default"`, and
        5 GB for a model of 135 million parameters on 4 rows of 256 tokens at a time.
        """
        _require(name in PRESETS, "preset", name, f"{tuple(PRESETS)}")
        return cls(**{**PRESETS[name], **options})

    @property
    def steps_of_scales(self) -> int:
        """Steps that train the scales of a block."""
        return self.steps if self.scale_steps is None else self.scale_steps

    @property
    def learns_by_block(self) -> bool:
        """Whether anything is learned or chosen block after block."""
        stages = BLOCK_STAGES if self.stages is None else self.stages
        return any(stage in BLOCK_STAGES and (stage != "teq" or self.objective == "block") for stage in stages)

    def stages_for(self, specs: Iterable[WeightSpec]) -> tuple[str, ...]:
        """The stages, those of the widest codes in `specs` being the default."""
        if self.stages is not None:
            return self.stages
        return ("clip", "gptq", "tune") if any(spec.bits <= 4 for spec in specs) else ("clip", "gptq")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
