"""What `compile` and a compiled model refuse, in one line each."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import VOCAB
from support.compiling import (
    LLAMA,
    SMALL,
    TRAINING,
    compile_llama,
    compile_mlp,
    in_one_line,
    mlp,
    tokens,
)
from support.effort import at_once
from support.names import stable
from torch import Tensor, nn

import teq_graph
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.errors import (
    CaptureError,
    ConfigError,
    InputError,
    NumericsError,
    brief,
)


@pytest.mark.parametrize("value", [1, 5, 16, 0, -4, "4", 4.0, None, True])
def test_wrong_bits(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"bits=.*accepted are \(2, 3, 4, 8\)") as caught:
        QuantizationConfig(bits=value)
    assert repr(value) in in_one_line(caught)


@pytest.mark.parametrize("value", [0, 8, 48, 512, -2, "128", 128.0, None])
def test_wrong_group_size(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"group_size=.*256") as caught:
        QuantizationConfig(group_size=value)
    assert repr(value) in in_one_line(caught)


@pytest.mark.parametrize(
    ("option", "value"),
    [("symmetric", "yes"), ("quantize_lm_head", 1), ("quantize_embedding", 1), ("skip", "lm_head"),
     ("overrides", {"*": {"bit": 4}}), ("overrides", {"*": {"bits": 5}})],
)  # fmt: skip
def test_wrong_quantization_options(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match="bits" if value == {"*": {"bits": 5}} else option) as caught:
        QuantizationConfig(**{option: value})
    in_one_line(caught)


@pytest.mark.parametrize(
    ("option", "value"),
    [("objective", "layer"), ("init", "zeros"), ("steps", -1), ("steps", 1.5), ("batch_size", 0), ("samples", 0),
     ("length", 0), ("learning_rate", 0.0), ("learning_rate", 2.0), ("warmup", 1.0), ("warmup", -0.1), ("seed", "a")],
)  # fmt: skip
def test_wrong_training_options(option: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{option}=") as caught:
        TrainingConfig(**{option: value})
    assert repr(value) in in_one_line(caught)


@pytest.mark.parametrize(
    ("function", "value"),
    [(teq_graph.transform, None), (teq_graph.transform, "block"), (teq_graph.compile, {"steps": 5})],
    ids=["none", "name", "dict"],
)
def test_other_training(function: Any, value: Any) -> None:
    with pytest.raises(ConfigError, match=r"training=.*accepted .* a TrainingConfig") as caught:
        function(mlp(), (torch.randn(5, 20),), training=value)
    assert repr(value) in in_one_line(caught)


NOT_A_FUNCTION = [3, "x", [], {}, object()]
ARGUMENTS = [
    *[("quantization", value) for value in ({"bits": 4}, None, 4, "W4g128", TrainingConfig(), QuantizationConfig)],
    *[("training", value) for value in ({"steps": 5}, 0, "block", SMALL, TrainingConfig)],
    *[("tokenizer", value) for value in NOT_A_FUNCTION],
    *[("on_estimate", value) for value in NOT_A_FUNCTION],
    *[("calibration", value) for value in (3, 1.5, True, object(), b"text", torch.nn.Linear, len)],
]


@pytest.mark.parametrize(
    ("name", "value"), ARGUMENTS, ids=[f"{name}-{stable(brief(value))}" for name, value in ARGUMENTS]
)
@pytest.mark.parametrize("function", [teq_graph.compile, teq_graph.transform])
def test_arguments_of_another_type_before_any_work(function: Any, name: str, value: Any) -> None:
    if function is teq_graph.transform and name == "on_estimate":
        return
    model = mlp().train()  # what is found in the model comes later
    with pytest.raises((ConfigError, InputError), match=f"^{name}=.*: accepted") as caught:
        function(model, (torch.randn(5, 20),), **{name: value})
    in_one_line(caught)


def test_calibration_is_looked_at_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "huge.txt").touch()
    os.truncate(tmp_path / "huge.txt", 2**40)
    os.mkfifo(tmp_path / "pipe")
    reasons = {
        tmp_path / "empty.txt": "it is empty",
        str(tmp_path / "empty.txt"): "it is empty",
        tmp_path / "binary.txt": "can't decode",
        tmp_path / "huge.txt": "1,099.5 GB",
        tmp_path / "pipe": "no regular file",
        tmp_path: "it is a directory",
        "/dev/zero": "no regular file",
        "~nobody-of-that-name/x": "home",
        "a\0b": "null byte",
        "\ud800": "characters that no file name has",
        "x" * 5000: "too long",
        "nothing.txt": "no such file",
        ":": "no such file",
    }
    with at_once(5):
        for calibration, reason in reasons.items():
            with pytest.raises(InputError, match=reason) as caught:
                teq_graph.compile(mlp().train(), (torch.randn(5, 20),), calibration=calibration, tokenizer=len)
            assert len(in_one_line(caught)) < 700
        for calibration in (["some text"], tmp_path / "text.txt"):
            (tmp_path / "text.txt").write_text("some text")
            with pytest.raises(InputError, match="no tokenizer"):
                teq_graph.compile(mlp().train(), (torch.randn(5, 20),), calibration=calibration)


@pytest.mark.parametrize(
    "tokenizer",
    [len, lambda text, **_: {}, lambda text, **_: {"input_ids": ["a"]}, lambda text, **_: None],
    ids=["other function", "no ids", "letters", "nothing"],
)
def test_a_tokenizer_that_is_none(tokenizer: Any) -> None:
    with pytest.raises(InputError, match="the tokenizer refuses") as caught:
        compile_llama(calibration=["some text"], training=TRAINING, tokenizer=tokenizer)
    in_one_line(caught)


def test_train_mode() -> None:
    model = mlp()
    model[2].train()
    with pytest.raises(CaptureError, match=r"module '?2'? is in train mode") as caught:
        compile_mlp(model)
    in_one_line(caught)


def test_meta_tensors() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(20, 8)).eval()
    with pytest.raises(CaptureError, match=r"0\.weight is on the meta device") as caught:
        compile_mlp(model)
    in_one_line(caught)


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_other_types(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(20, 8, bias=False)).eval()
    model[0].weight = nn.Parameter(torch.zeros(8, 20, dtype=dtype))
    with pytest.raises(CaptureError, match=r"0\.weight|no floating-point") as caught:
        compile_mlp(model)
    in_one_line(caught)


def test_no_module_at_all() -> None:
    with pytest.raises(CaptureError, match="model=function") as caught:
        teq_graph.compile(lambda x: x)  # type: ignore[arg-type]
    in_one_line(caught)


class Undecided(nn.Module):
    """Control flow that depends on data, inside a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # the line that the error names
            return self.linear(x)
        return self.linear(-x)


class Chooses(Undecided):
    """Sizes that depend on data."""

    def forward(self, x: Tensor) -> Tensor:
        positive = x[x.sum(-1) > 0]
        return self.linear(positive * 2 if positive.shape[0] > 2 else positive)


class Counts(Undecided):
    """Numbers that depend on data."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[: int(x.sum().item())])


class Mismatched(Undecided):
    """Fails by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[:, :7])


class Fixed(Undecided):
    """Takes one size only."""

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.view(5, 20))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Undecided, r"torch\.export refuses Undecided.*depend on tensors' values"),
        (Chooses, r"torch\.export refuses Chooses.*depend on tensors' values"),
        (Counts, r"torch\.export refuses Counts.*depend on tensors' values"),
        (Mismatched, "Mismatched fails on its example inputs: mat1 and mat2"),
        (Fixed, r"torch\.export refuses Fixed.* takes .* = 5 only, which dynamic_shapes says can be any size"),
    ],
)
def test_a_refused_export_says_one_line_and_prints_nothing(
    kind: type[nn.Module], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(CaptureError, match=reason) as caught:
        compile_mlp(kind().eval())
    in_one_line(caught)
    assert capfd.readouterr() == ("", "")


def test_an_export_that_torch_refuses_names_module_and_line() -> None:
    model = nn.Sequential(nn.Identity(), Undecided()).eval()
    with pytest.raises(CaptureError, match=r"torch\.export refuses") as caught:
        compile_mlp(model)
    message = in_one_line(caught)
    assert Path(__file__).name in message and "if x.sum() > 0" in message
    line = Path(__file__).read_text().splitlines().index("        if x.sum() > 0:  # the line that the error names") + 1
    assert f":{line}" in message


def test_no_example_for_a_model_of_ones_own() -> None:
    with pytest.raises(CaptureError, match="example_inputs=None") as caught:
        teq_graph.compile(mlp())
    in_one_line(caught)


@pytest.mark.parametrize("example", [[torch.zeros(1, 20)], torch.zeros(1, 20), "x"])
def test_examples_of_another_kind(example: Any) -> None:
    with pytest.raises(CaptureError, match="example_inputs=") as caught:
        teq_graph.compile(mlp(), example)
    in_one_line(caught)


@pytest.mark.parametrize("size", [0, 1])
@pytest.mark.parametrize("dimension", [torch.export.Dim.DYNAMIC, torch.export.Dim("rows")])
def test_one_example_of_any_number(dimension: Any, size: int, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        CaptureError,
        match=rf"example_inputs(\['input'\] has size {size} on axis 0| have rows = {size}), which .* is 2 or more$",
    ) as caught:
        teq_graph.compile(mlp(), (torch.zeros(size, 20),), ({0: dimension},), training=None)
    in_one_line(caught)
    assert not any(capfd.readouterr())


@pytest.mark.parametrize("as_keyword", [False, True])
def test_an_image_that_is_smaller_than_the_kernel(as_keyword: bool) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 7), nn.ReLU(), nn.Conv2d(4, 4, 5)).eval()
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    images = torch.zeros(2, 3, 40, 48)
    compiled = teq_graph.compile(net, {"input": images} if as_keyword else (images,), {"input": free}, training=None)
    for size in (6, 9):
        small = torch.zeros(1, 3, size, size)
        with pytest.raises(
            InputError, match=rf"inputs \[1, 3, {size}, {size}\] .*[Kk]ernel size.*for example, \[2, 3, 40, 48\]"
        ) as caught:
            compiled(input=small) if as_keyword else compiled(small)
        in_one_line(caught)


def test_no_linears_at_all() -> None:
    model = nn.Sequential(nn.LayerNorm(20), nn.ReLU()).eval()
    with pytest.raises(CaptureError, match="no linears and no convolutions") as caught:
        compile_mlp(model)
    in_one_line(caught)


@pytest.mark.parametrize("option", [{"skip": ("*.nowhere.*",)}, {"overrides": {"*.nowhere.*": {"bits": 8}}}])
def test_a_pattern_that_matches_nothing(option: dict[str, Any]) -> None:
    """A typo must not quantize what was to stay in float."""
    with pytest.raises(
        ConfigError, match=r"='\*.nowhere.\*': it matches no linear or convolution; their weights are 0.weight"
    ) as caught:
        compile_mlp(quantization=QuantizationConfig(group_size=16, **option))
    in_one_line(caught)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 1] = value
    with pytest.raises(NumericsError, match=r"2\.weight") as caught:
        compile_mlp(model)
    in_one_line(caught)


@pytest.mark.parametrize("value", [3e38, -3e38, 1e19])
@pytest.mark.parametrize("name", ["mlp.up_proj", "input_layernorm"])
def test_weights_that_are_too_large(name: str, value: float) -> None:
    """Found at once, not after the hours that lead to the first sum of their squares."""
    model = LLAMA.build()
    with torch.no_grad():
        model.get_submodule(f"model.layers.1.{name}").weight.view(-1)[7] = value
    accepted = r"squares overflow in sums: accepted are up to 1e\+18"
    with pytest.raises(NumericsError, match=rf"layers\.1\.{name}\.weight has values up to .*{accepted}") as caught:
        compile_llama(model)
    in_one_line(caught)


@pytest.mark.parametrize("value", [1e18, -1e18])
def test_the_largest_weights_compile(value: float) -> None:
    model = mlp()
    with torch.no_grad():
        model[2].weight[3, 1] = value
    assert all(torch.tensor(weight.error or 0).isfinite() for weight in compile_mlp(model).report.weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_calibration_that_is_not_finite(value: float) -> None:
    with pytest.raises(NumericsError, match="calibration") as caught:
        compile_mlp(calibration=[(torch.randn(5, 20),), (torch.full((5, 20), value),)])
    in_one_line(caught)


@pytest.mark.parametrize("calibration", [[], (), iter([]), torch.empty(0, 12, dtype=torch.long)])
def test_empty_calibration(calibration: Any) -> None:
    with pytest.raises(InputError, match="calibration") as caught:
        compile_llama(calibration=calibration, training=TRAINING)
    in_one_line(caught)


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (torch.randint(0, VOCAB, (2, 65)), "65.*64"),
        (torch.full((2, 8), VOCAB), str(VOCAB)),
        (torch.full((2, 8), -1), "-1"),
        (["some text"], "tokenizer"),
        ("no such file", "no such file"),
        (3, "calibration"),
        ([{"tokens": torch.zeros(1, 4, dtype=torch.long)}], "tokens"),
    ],
    ids=["too long", "outside the vocabulary", "negative", "text", "no file", "number", "other name"],
)
def test_calibration_that_the_model_cannot_take(calibration: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        compile_llama(calibration=calibration, training=TRAINING)
    in_one_line(caught)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(1, 65, dtype=torch.long)}, "65 positions: the model has 64"),
        ({"input_ids": torch.zeros(4, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(1, 4)}, "input_ids"),
        ({"input_ids": torch.zeros(1, 0, dtype=torch.long)}, "input_ids"),
        ({"input_ids": torch.zeros(1, 4, dtype=torch.long), "attention_mask": torch.ones(1, 3)}, "attention_mask"),
        ({}, "input_ids"),
        ({"ids": torch.zeros(1, 4, dtype=torch.long)}, "ids"),
    ],
    ids=["too long", "one dimension", "floats", "empty", "other mask", "none", "other name"],
)
def test_inputs_that_a_decoder_cannot_take(inputs: dict[str, Any], message: str, shared_llama: Any) -> None:
    with pytest.raises(InputError, match=message) as caught:
        shared_llama(**inputs)
    in_one_line(caught)


@pytest.fixture(scope="module")
def shared_llama() -> teq_graph.CompiledModel:
    return compile_llama()


def test_a_cache_that_is_too_long(shared_llama: teq_graph.CompiledModel) -> None:
    step = shared_llama(input_ids=tokens(1, 60))
    shared_llama(input_ids=tokens(1, 4), past_key_values=step.past_key_values)
    with pytest.raises(InputError, match="65 positions: the model has 64") as caught:
        shared_llama(input_ids=tokens(1, 5), past_key_values=step.past_key_values)
    in_one_line(caught)


def test_copies_are_independent() -> None:
    """Two compilations of one model share nothing that either changes."""
    model = LLAMA.build()
    ids = tokens()
    first = compile_llama(model)
    expected = first(input_ids=ids).logits
    compile_llama(copy.copy(model), training=TRAINING)
    assert torch.equal(first(input_ids=ids).logits, expected)
