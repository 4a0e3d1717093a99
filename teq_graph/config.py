"""Frozen configuration values, validated on construction."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import math
import numbers
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal, get_args

from teq_graph.errors import ConfigError, brief

BITS = (2, 3, 4, 8)
LEVELS = {3: "ternary", 2: "binary"}
"""Grids of fewer levels than codes, with their names."""
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
    "fast": {"stages": ("teq", "clip", "gptq")},
    "default": {},
    "best": {
        "stages": ("teq", "clip", "gptq", "tune", "distill"),
        "steps": 200,
        "distill_steps": 200,
        "samples": 256,
    },
}
"""What `TrainingConfig.preset` sets."""


FUSED_GROUP_SIZES = {2: 64, 4: 32, 8: 32}
"""Bits -> group size of symmetric codes that onnxruntime's CUDA provider multiplies in float16 as they are stored, on
tensor cores, whatever the number of tokens (1.31.1, behind `ep.cuda.fpa_intb_gemm`)."""

SCALES_SHARE = 0.2
"""Of the steps that tune a block: as many train its scales before."""
DISTILL_SHARE = 0.1
"""Of the steps that tune a block: as many train the whole model at last."""

MOST = 2**31 - 1
"""Of anything that is counted."""
LAST_SEED = 2**63 - 1
"""torch's generators take no larger one."""


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """How one weight matrix is quantized.

    `group_size` input channels share a scale (and a zero point if not `symmetric`); -1 is one group per
    output channel. Symmetric codes use the fixed zero point `2**(bits - 1)`.

    `levels`, an experiment, keeps symmetric 2-bit codes to those that stand for -1, 0 and 1 (3, ternary: 1.58 bits of
    information) or -1 and 1 (2, binary: 1 bit), times a scale of least squared error; storage stays that of 2 bits.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    levels: int | None = None

    def __post_init__(self) -> None:
        _set(self, "bits", integer_of("bits", self.bits, BITS, f"{BITS}"))
        accepted = f"{GROUP_SIZES} (-1: one group per output channel)"
        _set(self, "group_size", integer_of("group_size", self.group_size, GROUP_SIZES, accepted))
        _check_flag("symmetric", self.symmetric)
        if self.levels is not None:
            levels = integer_of("levels", self.levels, LEVELS, "None, 3 (ternary) and 2 (binary)")
            _set(self, "levels", levels)
            if self.bits != 2 or not self.symmetric:
                raise ConfigError(f"levels={levels}: accepted with bits=2 and symmetric=True")

    def __str__(self) -> str:
        group = "channel" if self.group_size == -1 else f"g{self.group_size}"
        grid = LEVELS[self.levels] if self.levels else "sym" if self.symmetric else ""
        return f"W{self.bits}{group} {grid}".rstrip()


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """Which linears and embeddings are quantized, and how.

    `skip` and `overrides` take shell patterns (`fnmatch`) over the name of a weight in the model, for example
    `"*.mlp.*"`; an override is a mapping with any of `bits`, `group_size`, `symmetric` and `levels`, and the last
    matching one wins. One that sets `bits` takes all their levels where it names none.
    `quantize_lm_head` includes the projection onto the vocabulary; where it is tied to the embedding, it becomes a
    separate, quantized copy, unless `quantize_embedding` lets both read one.

    `quantize_embedding` includes the tables that tokens are looked up in. They are rounded before anything is trained,
    so that the blocks learn to make up for it; so is a tied projection, which no stage changes then. A table whose
    projection stays in float stays in float, too.

    `target_bits`, from 2 to 8, takes the place of `bits`: each linear gets the bits that serve the calibration loss
    best, and the average over all quantized weights is at most this (of codes alone, without scales and zero points).
    Linears whose override sets `bits` keep these, and count; so do embeddings, with `bits` where no override sets them.

    `levels=3` (ternary) or `levels=2` (binary) with `bits=2` and `symmetric=True` is an experiment, see `WeightSpec`.
    """

    bits: int = 4
    group_size: int = 128
    symmetric: bool = False
    quantize_lm_head: bool = False
    skip: tuple[str, ...] = ()
    overrides: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    target_bits: float | None = None
    quantize_embedding: bool = False
    levels: int | None = None

    def __post_init__(self) -> None:
        spec = WeightSpec(self.bits, self.group_size, self.symmetric, self.levels)
        _set(self, "bits", spec.bits)
        _set(self, "group_size", spec.group_size)
        _set(self, "levels", spec.levels)
        least, most = min(BITS), max(BITS)
        accepted = f"None and numbers from {least} to {most}"
        if self.target_bits is not None:
            _set(self, "target_bits", _real("target_bits", self.target_bits, accepted, least, most))
            if self.levels is not None:
                raise ConfigError(f"levels={self.levels}: bits are not chosen for it; accepted is target_bits=None")
        for name in ("quantize_lm_head", "quantize_embedding"):
            _check_flag(name, getattr(self, name))
        _set(self, "skip", _strings("skip", self.skip, "a sequence of patterns, not one string"))
        _set(self, "overrides", self._checked_overrides())

    @classmethod
    def for_cuda(cls, bits: int = 4, **options: Any) -> QuantizationConfig:
        """The grids that onnxruntime's CUDA provider has fused kernels for: symmetric, in groups of 32 (64 at 2 bits).

        For an export in float16; other grids run there, too, and from some tokens on each product dequantizes its
        weight first. `options` are the other fields. Raises ConfigError where there is no such kernel.
        """
        accepted = tuple(FUSED_GROUP_SIZES)
        bits = integer_of("bits", bits, accepted, f"{accepted}, of which onnxruntime has fused CUDA kernels")
        fixed = {"group_size": FUSED_GROUP_SIZES[bits], "symmetric": True}
        for name in (*fixed, "target_bits", "levels"):
            if options.get(name) not in (None, fixed.get(name)):
                raise ConfigError(f"{name}={brief(options[name])}: accepted for CUDA is {fixed.get(name)}")
        return cls(bits=bits, **{**options, **fixed})

    def _checked_overrides(self) -> dict[str, dict[str, Any]]:
        overrides: object = self.overrides
        accepted = "a mapping of patterns to mappings with any of bits, group_size, symmetric and levels"
        if not isinstance(overrides, Mapping):
            raise ConfigError(f"overrides={brief(overrides)}: accepted is {accepted}")
        fields = {field.name for field in dataclasses.fields(WeightSpec)}
        checked = {}
        for pattern, override in overrides.items():
            if not isinstance(pattern, str) or not isinstance(override, Mapping) or not set(override) <= fields:
                raise ConfigError(f"overrides={{{brief(pattern)}: {brief(override)}}}: accepted is {accepted}")
            try:
                spec = self._merge(override)
            except ConfigError as error:
                raise ConfigError(f"overrides[{pattern!r}]: {error}") from None
            checked[pattern] = {name: getattr(spec, name) for name in override}
        return checked

    def _merge(self, override: Mapping[str, Any]) -> WeightSpec:
        values: dict[str, Any] = {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}
        if "bits" not in override:
            values["levels"] = self.levels
        return WeightSpec(**{**values, **override})

    def spec_for(self, weight_name: str) -> WeightSpec | None:
        """The spec of the weight called `weight_name`; None if a `skip` pattern leaves it in float."""
        if any(fnmatch.fnmatchcase(weight_name, pattern) for pattern in self.skip):
            return None
        return self._merge(self._override_for(weight_name))

    def chooses_bits_of(self, weight_name: str) -> bool:
        """Whether the bits of the weight called `weight_name` are chosen to meet `target_bits`."""
        return self.target_bits is not None and not {"bits", "levels"} & set(self._override_for(weight_name))

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
      - `"clip"`: each group's range and zero point are those of least error;
      - `"gptq"`: codes are chosen column by column, later ones make up for the errors of earlier ones, then each code
        and each group's scale twice more;
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
    `steps` counts optimizer steps of each block, or of the whole model where that is the objective.
    `scale_steps` are those of a block's scales: 0 keeps the initial ones, and None takes a fifth of `steps` where
    codes are chosen after them, else all. `distill_steps` are those of `"distill"`, and None takes a tenth of `steps`.
    `learning_rate` is that of the scales; `tuning_rate` that of rounding, in codes per step, with the rates of all else
    that is tuned in proportion.
    `samples` and `length` shape the calibration set where it is cut from text or sampled.
    """

    objective: Objective = "block"
    steps: int = 80
    learning_rate: float | None = None
    tuning_rate: float | None = None
    batch_size: int = 2
    init: Init = "ones"
    warmup: float = 0.05
    samples: int = 64
    length: int = 256
    seed: int = 0
    scale_steps: int | None = None
    distill_steps: int | None = None
    stages: tuple[str, ...] | None = None
    tuned: tuple[str, ...] = TUNED

    def __post_init__(self) -> None:
        if self.stages is not None:
            _set(self, "stages", _some_of("stages", self.stages, STAGES))
        _set(self, "tuned", _some_of("tuned", self.tuned, TUNED))
        for name, choices in (("objective", get_args(Objective)), ("init", get_args(Init))):
            check_choice(name, getattr(self, name), choices)
        for name, least, most in (
            ("steps", 0, MOST),
            ("scale_steps", 0, MOST),
            ("distill_steps", 0, MOST),
            ("batch_size", 1, MOST),
            ("samples", 1, MOST),
            ("length", 1, MOST),
            ("seed", 0, LAST_SEED),
        ):
            if (value := getattr(self, name)) is not None or name not in ("scale_steps", "distill_steps"):
                _set(self, name, _integer(name, value, least, most))
        for name in ("learning_rate", "tuning_rate"):
            if (rate := getattr(self, name)) is not None:
                accepted = "None and numbers between 0 and 1"
                _set(self, name, _real(name, rate, accepted, math.ulp(0), math.nextafter(1, 0)))
        accepted = "numbers from 0 up to, not including, 1"
        _set(self, "warmup", _real("warmup", self.warmup, accepted, 0, math.nextafter(1, 0)))

    @classmethod
    def preset(cls, name: str, **options: Any) -> TrainingConfig:
        """A configuration by what it may cost, changed by `options`.

        `"fast"` trains a block's scales for 16 steps and chooses its codes. `"default"` then trains codes and grids
        for 80, and with codes of 2 or 3 bits the whole model for 8. `"best"` trains each block for 40 and 200 steps on
        four times the text, and then the whole model for as many: several times the time of `"default"`.
        """
        check_choice("preset", name, tuple(PRESETS))
        accepted = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(options.keys() - set(accepted)):
            raise ConfigError(f"option {unknown[0]!r} of a preset: accepted are {', '.join(accepted)}")
        values = {**PRESETS[name], **options}
        if "distill_steps" in PRESETS[name]:
            values["distill_steps"] = options.get("distill_steps", values["steps"])
        return cls(**values)

    @property
    def steps_of_scales(self) -> int:
        """Steps that train the scales of a block."""
        if self.scale_steps is not None:
            return self.scale_steps
        codes_follow = self.stages is None or any(stage in self.stages for stage in ("clip", "gptq", "tune"))
        return math.ceil(SCALES_SHARE * self.steps) if codes_follow else self.steps

    @property
    def steps_of_distillation(self) -> int:
        """Steps that train the whole model."""
        return math.ceil(DISTILL_SHARE * self.steps) if self.distill_steps is None else self.distill_steps

    @property
    def learns_by_block(self) -> bool:
        """Whether anything is learned or chosen block after block."""
        stages = BLOCK_STAGES if self.stages is None else self.stages
        return any(stage in BLOCK_STAGES and (stage != "teq" or self.objective == "block") for stage in stages)

    def stages_for(self, specs: Iterable[WeightSpec]) -> tuple[str, ...]:
        """The stages; by default those that serve the narrowest codes in `specs`."""
        if self.stages is not None:
            return self.stages
        narrowest = min((spec.bits for spec in specs), default=8)
        if narrowest > 4:
            return ("clip", "gptq")
        few = ("distill",) if narrowest < 4 else ()  # with 4 bits a few steps bring nothing
        return ("teq", "clip", "gptq", "tune", *few)


# -------------------------------------------------------------------------------------------------------------- checks


def check_type(name: str, value: object, kind: Any, accepted: str) -> None:
    """Raises ConfigError where an argument is of no class of `kind`; `accepted` says what is, as in `a number`."""
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={brief(value)}: accepted is {accepted}")


def check_choice(name: str, value: object, accepted: Collection[str]) -> None:
    """Raises ConfigError where `value` is none of the accepted names."""
    if not isinstance(value, str) or value not in accepted:
        raise ConfigError(f"{name}={brief(value)}: accepted are {', '.join(accepted)}")


def _set(config: object, name: str, value: object) -> None:
    object.__setattr__(config, name, value)


def _integer(name: str, value: object, least: int, most: int) -> int:
    """`value` as Python's own integer, which numpy's becomes."""
    number = _as_int(value)
    if number is None or not least <= number <= most:
        raise ConfigError(f"{name}={brief(value)}: accepted are integers from {least} to {most}")
    return number


def integer_of(name: str, value: object, choices: Collection[int], accepted: str) -> int:
    """`value` as Python's own integer, which numpy's becomes; raises ConfigError where it is none of `choices`."""
    number = _as_int(value)
    if number is None or number not in choices:
        raise ConfigError(f"{name}={brief(value)}: accepted are {accepted}")
    return number


def _as_int(value: object) -> int | None:
    return None if isinstance(value, bool) or not isinstance(value, numbers.Integral) else int(value)


def _real(name: str, value: object, accepted: str, least: float, most: float) -> float:
    """`value` as Python's own number, which numpy's becomes; NaN is none."""
    if not isinstance(value, bool) and isinstance(value, numbers.Real):
        with contextlib.suppress(OverflowError):  # of an integer that no float holds
            if least <= (number := float(value)) <= most:
                return number
    raise ConfigError(f"{name}={brief(value)}: accepted are {accepted}")


def _check_flag(name: str, value: object) -> None:
    check_type(name, value, bool, "True or False")


def _strings(name: str, value: object, accepted: str) -> tuple[str, ...]:
    """The strings of any iterable but a string, whose letters are none."""
    if isinstance(value, Iterable) and not isinstance(value, (str, bytes)):
        with contextlib.suppress(TypeError):  # of an array without dimensions
            strings = tuple(value)
            if all(isinstance(string, str) for string in strings):
                return strings
    raise ConfigError(f"{name}={brief(value)}: accepted is {accepted}")


def _some_of(name: str, value: object, choices: tuple[str, ...]) -> tuple[str, ...]:
    """Those of `choices` that `value` names, in their order."""
    given = _strings(name, value, f"a sequence of {choices}")
    if not set(given) <= set(choices):
        raise ConfigError(f"{name}={brief(given)}: accepted are some of {choices}")
    return tuple(choice for choice in choices if choice in given)
