"""From a module to a graph of values: what changes in place, what keeps state, and inputs of other sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.architectures import GQA, TOKENS
from support.compiling import DYNAMIC, LLAMA, in_one_line
from support.graphs import apply_random_scales, capture_small, find, leaves, op_names, randomize, relative_error, run
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

from teq_graph.capture import CapturedGraph, capture
from teq_graph.capture import captured as captured_graph
from teq_graph.capture.torch_export import refuse_other_constants
from teq_graph.errors import CaptureError, InputError
from teq_graph.graph.tensors import node_tensor
from teq_graph.passes.remove_no_ops import RemoveNoOps

Forward = Callable[..., Any]
WIDTH = 8


class Small(nn.Module):
    """`forward(self, x)` over a norm, a linear and a buffer."""

    def __init__(self, forward: Forward) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("state", torch.zeros(WIDTH))
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def written_slice(s: Small, x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[:, 1:] = x[:, :-1]
    return s.linear(s.norm(y))


def part_of_a_view(s: Small, x: Tensor) -> Tensor:
    y = s.linear(x)
    y[..., :3].mul_(5)
    return s.norm(y)


def cleared_copy(s: Small, x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = 0
    return s.linear(y) + x


def earlier_view(s: Small, x: Tensor) -> Tensor:
    y = s.linear(x)
    view = y.view(-1, WIDTH)
    y.relu_()
    return s.norm(view.view(y.shape))


def one_of_several_results(s: Small, x: Tensor) -> Tensor:
    values, _ = s.linear(x).topk(3, -1)
    values /= values.sum(-1, keepdim=True)
    return values


IN_PLACE: dict[str, Forward] = {
    "chain": lambda s, x: (x * 2).relu_().add_(1),
    "read later": lambda s, x: (lambda y: (y.mul_(3), y + x)[1])(x * 2),
    "flat view, read later": lambda s, x: (lambda y: (lambda v: (y.add_(1), v * 2)[1])(y.view(-1)))(x * 2),
    "a copy that is no view": lambda s, x: (lambda y: (y.to(torch.float32, copy=True).add_(1), y * 3))(x * 2),
    "a view": lambda s, x: (lambda y: (y[:, 1:].add_(1), y * 3))(x * 2),
    "a clone": lambda s, x: (lambda y: (y.clone().add_(1), y * 3))(x * 2),
    "a wider value": lambda s, x: (x.to(torch.float16) * 2).add_(x),
    "written slice": written_slice,
    "part of a view": part_of_a_view,
    "cleared copy": cleared_copy,
    "earlier view": earlier_view,
    "one of several results": one_of_several_results,
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_changes_in_place_become_values(name: str) -> None:
    model = Small(IN_PLACE[name])
    captured = capture_small(model, torch.randn(2, 4, WIDTH))
    RemoveNoOps()(captured.graph_module)
    assert not any(op.split(".")[1].endswith("_") for op in op_names(captured.graph_module) if op.startswith("aten"))
    inputs = torch.randn(5, 7, WIDTH)
    with torch.no_grad():
        expected = model(inputs.clone())
    assert relative_error(run(captured.graph_module, (inputs,)), expected) <= 1e-6


def with_autocast(s: Small, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return s.linear(x).float()


def with_gradient(s: Small, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return s.norm(x) * 2


def changed_after_dropout(s: Small, x: Tensor) -> tuple[Tensor, Tensor]:
    """In eval mode dropout gives back its very input; torch.export takes it for a copy."""
    y = x * 2
    return functional.dropout(y, 0.1, training=False).add_(1), y * 3


def overwritten_buffer(s: Small, x: Tensor) -> Tensor:
    s.state.copy_(x.mean((0, 1)))
    return s.linear(x) * s.state


def buffer_read_before(s: Small, x: Tensor) -> Tensor:
    before = s.state * 2
    s.state.copy_(x.mean((0, 1)))
    return s.linear(x) * s.state + before


def part_of_a_buffer(s: Small, x: Tensor) -> Tensor:
    s.state[1:].copy_(x.mean((0, 1))[1:])
    return s.linear(x) * s.state


def test_a_buffer_that_is_overwritten_before_it_is_read_is_no_state() -> None:
    model = Small(overwritten_buffer)
    captured = capture_small(model, torch.randn(2, 4, WIDTH))
    for inputs in torch.randn(3, 4, 7, WIDTH):
        with torch.no_grad():
            expected = model(inputs)
        assert relative_error(run(captured.graph_module, (inputs,)), expected) <= 1e-6


REFUSED: dict[str, tuple[Forward, str]] = {
    "a buffer read before": (buffer_read_before, "the model changes state in place"),
    "part of a buffer": (part_of_a_buffer, "the model changes state in place"),
    "the model fails": (lambda s, x: s.linear(x[..., 1:]), "Small fails on its example inputs: mat1 and mat2"),
    "the input": (lambda s, x: s.linear(x.add_(1)), "the model changes x in place"),
    "a buffer": (lambda s, x: (s.state.add_(1), s.linear(x + s.state))[1], "the model changes state in place"),
    "a branch": (lambda s, x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (s.linear(x),)), "the model uses cond"),
    "autocast": (with_autocast, "the model uses wrap_with_autocast"),
    "gradient mode": (with_gradient, "the model uses wrap_with_set_grad_enabled"),
    "random numbers": (lambda s, x: s.linear(x) * torch.randn(WIDTH), "gives other values than the model"),
    "a fixed size": (lambda s, x: s.linear(x) * torch.ones(x.shape[0], int(x.shape[1]), 1).reshape(-1, 4, 1), "size"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_no_graph_of_values_holds_is_refused(name: str) -> None:
    forward, message = REFUSED[name]
    with pytest.raises(CaptureError, match=message) as caught:
        capture_small(Small(forward), torch.randn(2, 4, WIDTH))
    in_one_line(caught)


def test_what_changes_after_dropout_is_refused_or_exact() -> None:
    """Up to torch 2.14 torch.export takes dropout for a copy; later it sees that it gives back its input."""
    model, refused = Small(changed_after_dropout), None
    try:
        captured = capture_small(model, torch.randn(2, 4, WIDTH))
    except CaptureError as error:
        refused = str(error)
    if refused is None:
        x = torch.randn(3, 5, WIDTH)
        assert relative_error(run(captured.graph_module, (x,)), model(x.clone())) == 0
    else:
        assert "gives other values than the model" in refused


# --------------------------------------------------------------------------------------------------------- sizes


class Pair(nn.Module):
    """The second input is as long as twice the first and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        rolled = self.first(x).relu().roll(x.shape[1], -1)
        return self.second(rolled) + (torch.cat([x, x, x[:, :1]], 1).sum(-1) * y).sum(-1)[:, None, None]


def captured_pair() -> CapturedGraph:
    length = torch.export.Dim("length", min=2, max=100)
    example = (torch.randn(2, 3, WIDTH), torch.randn(2, 7))
    return capture(randomize(Pair()), example, ({0: DYNAMIC, 1: length}, {0: DYNAMIC, 1: 2 * length + 1}))


def test_a_second_size_keeps_relations_between_sizes() -> None:
    """Rolled by the length, channels go elsewhere at each length: an analysis at one size would find them."""
    captured = captured_pair()
    findings = find(captured)
    inputs = (torch.randn(3, 5, WIDTH), torch.randn(3, 11))
    expected = run(captured.graph_module, inputs)
    apply_random_scales(captured.graph_module, findings.equivalences)
    assert relative_error(run(captured.graph_module, inputs), expected) <= 1e-6
    assert any("depends on the inputs' sizes" in refusal.reason for refusal in findings.refusals)


def test_nothing_is_proven_where_no_second_size_runs() -> None:
    def forward(s: Small, x: Tensor) -> Tensor:
        index = torch.zeros(1, dtype=torch.int64) + 100 * (x.shape[1] - 4) ** 2  # out of range but for length 4
        return s.linear(s.norm(x)) + s.linear.weight.detach()[index].sum()

    findings = find(capture_small(Small(forward), torch.randn(2, 4, WIDTH)))
    assert not findings.equivalences
    assert any("the example's sizes alone" in refusal.reason for refusal in findings.refusals)


WRONG_INPUTS: dict[str, tuple[Tensor, str]] = {
    "rank": (torch.randn(2, WIDTH), r"x \[2, 8\] torch.float32: accepted is x \[any, 4, 8\] torch.float32"),
    "type": (torch.zeros(2, 4, WIDTH, dtype=torch.int64), r"x \[2, 4, 8\] torch.int64: accepted is x"),
    "width": (torch.randn(2, 4, WIDTH + 1), r"x \[2, 4, 9\] torch.float32: accepted is x"),
    "a length that broadcasts": (torch.randn(2, 1, WIDTH), "other sizes need example_inputs with dynamic_shapes"),
}


@pytest.mark.parametrize("name", WRONG_INPUTS)
def test_inputs_of_other_types_and_sizes(name: str) -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.linear = nn.Parameter(torch.randn(4, WIDTH)), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x + self.positions[: x.shape[1]])

    captured = capture(Positions().eval(), (torch.randn(2, 4, WIDTH),), ({0: DYNAMIC},))
    captured.bind((torch.randn(7, 4, WIDTH),))
    inputs, message = WRONG_INPUTS[name]
    with pytest.raises(InputError, match=message) as caught:
        captured.bind((inputs,))
    in_one_line(caught)


def test_sizes_that_do_not_fit_each_other() -> None:
    captured = captured_pair()
    captured.bind((torch.randn(3, 5, WIDTH), torch.randn(3, 11)))
    with pytest.raises(InputError, match=r"y \[3, 10\]"):
        captured.bind((torch.randn(3, 5, WIDTH), torch.randn(3, 10)))


# ---------------------------------------------------------------------------------------------- Hugging Face models


@pytest.mark.parametrize("family", ["roberta", "xlm-roberta", "llama"])
def test_positions_are_counted_as_the_model_counts_them(family: str) -> None:
    """Some families begin at the padding token's number plus one."""
    import transformers

    config = transformers.AutoConfig.for_model(family, **{**GQA, **TOKENS, "is_decoder": True})
    model = randomize(transformers.AutoModelForCausalLM.from_config(config))
    captured = capture(model)
    assert captured.decoder is not None
    tokens = torch.randint(3, 90, (2, 9))
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        args, _ = captured.bind({"input_ids": tokens})
        actual = leaves(captured.graph_module(*args))[0]
    assert relative_error(actual, expected) <= 1e-5


def test_an_image_model_without_an_image_size_takes_any(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
    model = randomize(transformers.ResNetForImageClassification(config))
    captured = capture(model)
    pixels = torch.randn(3, 3, 97, 130)
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        actual = captured.graph_module(pixel_values=pixels).logits
    assert relative_error(actual, expected) <= 1e-5
    # Nor the channels: images have three colours.
    del config.num_channels
    monkeypatch.delattr(type(config), "num_channels", raising=False)
    assert capture(model).example_kwargs["pixel_values"].shape[1] == 3


def test_features_of_an_unknown_size_are_refused() -> None:
    from transformers import PretrainedConfig, PreTrainedModel

    class OfFeatures(PreTrainedModel):  # type: ignore[misc]  # transformers has no types here
        config_class, main_input_name = PretrainedConfig, "input_features"

        def __init__(self, config: PretrainedConfig) -> None:
            super().__init__(config)
            self.linear = nn.Linear(8, 8)

        def forward(self, input_features: Tensor) -> Tensor:
            result: Tensor = self.linear(input_features)
            return result

    with pytest.raises(CaptureError, match=r"how large they are\); accepted is a tuple or dict") as caught:
        capture(OfFeatures(PretrainedConfig()).eval())
    in_one_line(caught)


def test_frames_of_videos_under_the_name_of_images() -> None:
    import transformers

    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, num_labels=3)
    config = transformers.VideoMAEConfig(**sizes, image_size=16, patch_size=8, num_frames=4, tubelet_size=2)
    model = randomize(transformers.VideoMAEForVideoClassification(config))
    pixels = torch.randn(3, 4, 3, 16, 16)
    with torch.no_grad():
        expected = model(pixel_values=pixels).logits
        actual = capture(model).graph_module(pixel_values=pixels).logits
    assert relative_error(actual, expected) <= 1e-5


def test_sounds_of_one_channel() -> None:
    import transformers

    config = transformers.DacConfig(encoder_hidden_size=8, downsampling_ratios=[2, 2], decoder_hidden_size=16)
    model = randomize(transformers.DacModel(config), std=0.1)
    sound = torch.randn(2, 1, 400)
    with torch.no_grad():
        expected = model(input_values=sound).audio_values
        actual = capture(model).graph_module(input_values=sound).audio_values
    assert relative_error(actual, expected) <= 1e-5


# --------------------------------------------------------------------------------------------- Hugging Face models


def base_model(**config: Any) -> nn.Module:
    from transformers import LlamaConfig, LlamaModel

    return randomize(LlamaModel(LlamaConfig(**{**GQA, **config})))


def test_a_base_model_given_inputs_has_no_cache_in_its_result() -> None:
    model = base_model()
    tokens = torch.randint(0, TOKENS["vocab_size"], (2, 7))
    captured = capture(model, {"input_ids": tokens}, {"input_ids": {0: DYNAMIC, 1: DYNAMIC}})
    assert model.config.use_cache is True  # type: ignore[union-attr]  # as it was
    other = torch.randint(0, TOKENS["vocab_size"], (3, 11))
    args, kwargs = captured.bind({"input_ids": other})
    with torch.no_grad():
        result, expected = captured.graph_module(*args, **kwargs), model(other, use_cache=False)
    assert list(result.keys()) == ["last_hidden_state"]
    assert relative_error(result.last_hidden_state, expected.last_hidden_state) <= 1e-5


def test_a_base_model_that_passes_its_options_on_has_no_cache_in_its_result() -> None:
    from transformers import LlamaConfig, LlamaModel

    class PassesOn(LlamaModel):  # type: ignore[misc]
        def forward(self, input_ids: Tensor, **options: Any) -> Any:
            return super().forward(input_ids, **options)

    model = randomize(PassesOn(LlamaConfig(**GQA)))
    captured = capture(model)
    ids = torch.randint(3, 97, (3, 9))
    result = captured.graph_module(input_ids=ids)
    assert list(result) == ["last_hidden_state"] and model.config.use_cache
    assert relative_error(result.last_hidden_state, model(ids, use_cache=False).last_hidden_state) <= 1e-5


def test_an_image_model_whose_class_names_no_main_input() -> None:
    """It is that of texts then, which the model does not take."""
    from transformers import SmolVLMVisionConfig, SmolVLMVisionTransformer

    sizes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    model = randomize(SmolVLMVisionTransformer(SmolVLMVisionConfig(**sizes, image_size=16, patch_size=8)))
    captured = capture(model)
    assert list(captured.example_kwargs) == ["pixel_values"]
    images = torch.randn(3, 3, 16, 16)
    result = captured.graph_module(pixel_values=images).last_hidden_state
    assert relative_error(result, model(images).last_hidden_state) <= 1e-5


def test_a_cache_that_is_asked_for_is_refused_in_one_line() -> None:
    tokens = torch.randint(0, TOKENS["vocab_size"], (2, 7))
    with pytest.raises(CaptureError, match=r"its result has a DynamicCache, .* accepted is use_cache=False") as caught:
        capture(base_model(), {"input_ids": tokens, "use_cache": True})
    in_one_line(caught)


@torch.no_grad()
def test_a_layer_that_texts_alone_do_not_reach_holds_nothing() -> None:
    """Attention over images is left out where there is none, and its cache is never filled."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    text = {**GQA, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    eyes = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_global_layers=1, attention_heads=2)
    vision = {**eyes, "image_size": 16, "patch_size": 8, "vision_output_dim": 32, "intermediate_layers_indices": [0]}
    model = randomize(MllamaForConditionalGeneration(MllamaConfig(vision_config=vision, text_config=text)))
    captured = capture(model)
    assert captured.decoder is not None
    assert [[one.name for one in layer] for layer in captured.decoder.layers] == [
        ["key", "value"],
        [],
        ["key", "value"],
    ]
    ids = torch.randint(3, 97, (2, 9))
    expected = model(input_ids=ids).logits
    past, logits = None, []
    for part in ids.split([4, 1, 4], 1):
        args, _ = captured.bind({"input_ids": part, "past_key_values": past})
        step, past = captured.graph_module(*args)
        logits.append(step)
    assert relative_error(torch.cat(logits, 1), expected) <= 1e-5


def test_a_constant_that_is_no_tensor_is_refused() -> None:
    program = torch.export.export(nn.Linear(3, 3), (torch.randn(2, 3),))
    program.graph_module.mapped = object()
    (linear,) = (node for node in program.graph.nodes if node.op == "call_function")
    with program.graph.inserting_before(linear):
        constant = program.graph.create_node("get_attr", "mapped")
        program.graph.call_function(torch.ops.aten.alias.default, (constant,))
    with pytest.raises(CaptureError, match="functions as values") as caught:
        refuse_other_constants(program)
    assert "aten.alias.default" in str(caught.value)


def test_what_nodes_are_said_to_give_moves_with_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes that run there would find operands of two devices otherwise."""
    captured = capture(LLAMA.build())
    monkeypatch.setattr(captured_graph, "usable_device", torch.device)
    nodes = captured.graph_module.graph.nodes
    before = {node.name: [(x.shape, x.dtype) for x in tensors_of(node)] for node in nodes}
    captured.move_to("meta")
    assert {x.device.type for node in nodes for x in tensors_of(node)} == {"meta"}
    assert before == {node.name: [(x.shape, x.dtype) for x in tensors_of(node)] for node in nodes}
    constants = [node for node in nodes if node.op == "get_attr"]
    assert all(node.meta["val"] is node_tensor(node) for node in constants) and constants


def tensors_of(node: torch.fx.Node) -> list[Tensor]:
    return [x for x in pytree.tree_leaves(node.meta.get("val")) if isinstance(x, Tensor)]
