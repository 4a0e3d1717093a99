"""Attention as one op: the reference against torch, what is proven on real architectures, and near misses."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from support.architectures import GQA, TOKENS
from support.graphs import randomize, relative_error
from support.onnx import OnnxModel
from torch import Tensor
from torch.fx import Graph, Node
from torch.nn import functional

import teq_graph
from teq_graph.analysis.attention import find_attentions
from teq_graph.capture import CapturedGraph
from teq_graph.graph.nodes import arguments_of, aten, is_call, operand_of
from teq_graph.graph.tensors import clone_graph
from teq_graph.onnx.export import lower
from teq_graph.onnx.runtime import OnnxDecoder
from teq_graph.ops.group_query_attention import group_query_attention, rotate
from teq_graph.passes.fuse_attention import FuseAttention

WIDE = {**GQA, "hidden_size": 64}
"""Four heads of 16 channels, the least that onnxruntime rotates."""
EAGER = {"attn_implementation": "eager"}
"""Said where it matters: which attention a model takes by itself changes between versions of transformers."""


# ------------------------------------------------------------------------------------------------------ reference


def test_rotation_is_that_of_complex_numbers() -> None:
    x = torch.randn(2, 3, 5, 16, dtype=torch.float64)
    angles = torch.randn(5, 4, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angles), angles)
    for interleaved in (False, True):
        turned = x[..., :8]
        pairs = turned.unflatten(-1, (4, 2)) if interleaved else turned.unflatten(-1, (2, 4)).transpose(-1, -2)
        result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
        expected = torch.cat([(result if interleaved else result.transpose(-1, -2)).flatten(-2), x[..., 8:]], -1)
        torch.testing.assert_close(rotate(x, angles.cos(), angles.sin(), interleaved), expected)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [-1, 3])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_the_reference_is_torchs_attention(packed: bool, window: int, softcap: float) -> None:
    batch, length, past, heads, kv, width = 2, 4, 3, 4, 2, 8
    q, k, v = (torch.randn(batch, length, n * width, dtype=torch.float64) for n in (heads, kv, kv))
    past_key, past_value = (torch.randn(batch, kv, past, width, dtype=torch.float64) for _ in range(2))
    bias = torch.randn(batch, heads, length, past + length, dtype=torch.float64)
    operands = (torch.cat([q, k, v], -1), None, None) if packed else (q, k, v)
    output, keys, values = group_query_attention(
        *operands, past_key, past_value, bias, None, None, heads, kv, 0.3, softcap, window, False
    )
    ahead = torch.arange(past + length) - torch.arange(past, past + length)[:, None]
    mask = bias.masked_fill((ahead > 0) | (ahead <= -window if window > 0 else ahead > 99), -torch.inf)
    split = [x.unflatten(-1, (-1, width)).transpose(1, 2) for x in (q, k, v)]
    torch.testing.assert_close(keys, torch.cat([past_key, split[1]], 2))
    torch.testing.assert_close(values, torch.cat([past_value, split[2]], 2))
    if softcap:
        wide = keys.repeat_interleave(heads // kv, 1), values.repeat_interleave(heads // kv, 1)
        capped = softcap * torch.tanh(0.3 / softcap * torch.einsum("bhsd,bhtd->bhst", split[0], wide[0]))
        expected = torch.einsum("bhst,bhtd->bhsd", (capped + mask).softmax(-1), wide[1])
    else:
        expected = functional.scaled_dot_product_attention(split[0], keys, values, mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(output, expected.transpose(1, 2).flatten(2))


# ---------------------------------------------------------------------------------------------------- architectures


@dataclasses.dataclass(frozen=True)
class Expected:
    """What becomes of a layer: whether one product gives q, k and v, the op rotates, and heads have biases."""

    packed: bool
    rotated: bool
    window: int = -1
    softcap: float = 0.0
    biased: bool = False


FAMILIES: dict[str, tuple[str, dict[str, Any], Expected]] = {
    "MHA": ("llama", {**WIDE, "num_key_value_heads": 4}, Expected(True, True)),
    "GQA": ("llama", WIDE, Expected(True, True)),
    "window": ("mistral", {**WIDE, "sliding_window": 6}, Expected(True, True, 6)),
    "biases": ("qwen2", WIDE, Expected(True, True)),
    "norms of heads": ("qwen3", {**WIDE, "head_dim": 16}, Expected(False, True)),
    "norms of moved heads": ("gemma3_text", {**WIDE, "head_dim": 16, "sliding_window": 6}, Expected(False, True, 6)),
    "no rotation, scaled queries": ("opt", {**WIDE, "ffn_dim": 64, "word_embed_proj_dim": 64}, Expected(True, False)),
    "fused, heads interleaved": ("gpt_neox", {**WIDE, "hidden_size": 128, "rotary_pct": 0.5}, Expected(True, True)),
    "fused, one shared head": ("falcon", WIDE, Expected(True, True)),
    "fused, in groups": (
        "falcon",
        {**WIDE, "num_kv_heads": 2, "new_decoder_architecture": True},
        Expected(True, True),
    ),
    "half of the channels": ("phi", {**WIDE, "hidden_size": 128, "partial_rotary_factor": 0.5}, Expected(True, True)),
    "fused, grouped": ("phi3", WIDE, Expected(True, True)),
    "interleaved pairs": ("cohere", WIDE, Expected(True, True)),
    "norms over all heads": ("olmo2", WIDE, Expected(False, True)),
    "heads too small to rotate": ("llama", GQA, Expected(False, False)),
    "fused, products of rows": ("gpt2", dict(n_embd=64, n_layer=2, n_head=4, n_positions=64), Expected(True, False)),
    "spelled out": (
        "gptj",
        dict(n_embd=128, n_layer=2, n_head=4, n_positions=64, rotary_dim=16, **EAGER),
        Expected(True, True),
    ),
    "spelled out, softcap": (
        "gemma2",
        {**WIDE, "head_dim": 16, "sliding_window": 6, "attn_logit_softcapping": 2.0, **EAGER},
        Expected(True, True, 6, 2.0),
    ),
    "spelled out, biases by position": (
        "bloom",
        dict(hidden_size=64, n_layer=2, n_head=4, **EAGER),
        Expected(True, False, biased=True),
    ),
    "spelled out, biases by distance": (
        "mpt",
        dict(d_model=64, n_layers=2, n_heads=4, max_seq_len=64),
        Expected(True, False, biased=True),
    ),
    "biases in the mask": ("falcon", {**WIDE, "alibi": True}, Expected(True, False, biased=True)),
}


def compiled_decoder(family: str, **config: Any) -> CapturedGraph:
    return compiled_model(family, **config).captured


def compiled_model(family: str, dtype: torch.dtype = torch.float32, **config: Any) -> teq_graph.CompiledModel:
    import transformers

    settings = transformers.AutoConfig.for_model(family, **{**TOKENS, **config})
    model = randomize(transformers.AutoModelForCausalLM.from_config(settings)).to(dtype)
    quantization = teq_graph.QuantizationConfig(bits=4, group_size=16)
    return teq_graph.compile(model, quantization=quantization, training=None)


def fused(captured: CapturedGraph) -> CapturedGraph:
    result = dataclasses.replace(captured, graph_module=clone_graph(captured.graph_module))
    assert FuseAttention(result)(result.graph_module).modified
    assert not FuseAttention(result)(result.graph_module).modified
    return result


def attentions(captured: CapturedGraph) -> list[dict[str, Any]]:
    op = torch.ops.teq_graph.group_query_attention.default
    return [arguments_of(node) for node in captured.graph_module.graph.nodes if is_call(node, op)]


@torch.no_grad()
def same_logits(captured: CapturedGraph, other: CapturedGraph, mask: Tensor) -> float:
    """Largest difference over a prefill and two steps of decoding, where there is no padding."""
    tokens = torch.randint(3, 90, (mask.shape[0], mask.shape[1] + 2))
    pasts: list[Any] = [None, None]
    worst = 0.0
    for start, end in ((0, mask.shape[1]), *((n, n + 1) for n in range(mask.shape[1], tokens.shape[1]))):
        seen = functional.pad(mask, (0, end - mask.shape[1]), value=1)
        logits = []
        for number, graph in enumerate((captured, other)):
            inputs = {"input_ids": tokens[:, start:end], "attention_mask": seen, "past_key_values": pasts[number]}
            args, _ = graph.bind(inputs)
            result, pasts[number] = graph.graph_module(*args)
            logits.append(result[seen[:, start:end].bool()])
        worst = max(worst, relative_error(logits[1], logits[0]))
    return worst


@pytest.mark.parametrize("name", FAMILIES)
def test_every_layer_becomes_one_op(name: str) -> None:
    family, config, expected = FAMILIES[name]
    captured = compiled_decoder(family, **config)
    result = fused(captured)
    found = attentions(result)
    assert len(found) == 2
    for values in found:
        assert (values["key"] is None, values["cos"] is not None) == (expected.packed, expected.rotated)
        assert values["softcap"] == expected.softcap
        assert values["bias"].meta["val"].shape[1] == (values["num_heads"] if expected.biased else 1)
    assert expected.window in [values["window"] for values in found]
    mask = torch.ones(2, 9, dtype=torch.int64)
    assert same_logits(captured, result, mask) <= 1e-5
    mask[0, :3] = 0
    assert same_logits(captured, result, mask) <= 1e-5


def check_padded_batch(
    compiled: teq_graph.CompiledModel, model: OnnxModel, dtype: torch.dtype, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Tokens and logits of a batch with padding, which `model` gives as well in a prefill and two steps of decoding."""
    tokens, mask = torch.randint(3, 90, (2, 11)), torch.ones(2, 11, dtype=torch.int64)
    mask[0, :4] = 0
    expected = compiled(input_ids=tokens, attention_mask=mask).logits
    logits, past = model.step(compiled, tokens[:, :9], None, mask[:, :9])
    parts = [logits]
    for end in (10, 11):
        logits, past = model.step(compiled, tokens[:, end - 1 : end], past, mask[:, :end])
        parts.append(logits)
    actual, seen = torch.cat(parts, 1), mask.bool()
    assert actual.dtype == dtype
    assert relative_error(actual[seen].float(), expected[seen]) <= tolerance
    return tokens, expected


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_onnxruntime_gives_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch with padding, in parts, and in shared buffers that are longer than what they hold."""
    family, config, _ = FAMILIES[name]
    compiled = compiled_model(family, **config)
    # Every op has a translation: torch's decompositions would take most of an export's time.
    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", None)
    model = OnnxModel(compiled.export_onnx(tmp_path / "out", accuracy_level=1))
    assert "GroupQueryAttention" in {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node}
    tokens, expected = check_padded_batch(compiled, model, torch.float32, 1e-4)
    parts, past = [], None
    for start, end in ((0, 5), (5, 9), (9, 11)):
        logits, past = model.step(compiled, tokens[1:, start:end], past)
        parts.append(logits)
    assert relative_error(torch.cat(parts, 1), expected[1:]) <= 1e-4
    decoder = OnnxDecoder.load(tmp_path / "out")
    assert decoder.metadata.shared_buffers
    prompts = [tokens[0, 4:].tolist(), tokens[1].tolist()]
    assert decoder.generate(prompts, 6, eos_token_id=[]) == [greedy(compiled, prompt, 6) for prompt in prompts]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name, (*_, expected) in FAMILIES.items() if expected.biased or expected.softcap]
)
def test_onnxruntime_adds_biases_and_caps_scores_in_half_precision(name: str, tmp_path: Path) -> None:
    family, config, _ = FAMILIES[name]
    compiled = compiled_model(family, **config)
    model = OnnxModel(compiled.export_onnx(tmp_path / "out", dtype="float16", accuracy_level=1))
    check_padded_batch(compiled, model, torch.float16, 5e-3)


def greedy(compiled: teq_graph.CompiledModel, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, each token from a forward over all that is before it."""
    tokens = torch.tensor([prompt])
    for _ in range(count):
        tokens = torch.cat([tokens, compiled(input_ids=tokens).logits[:, -1:].argmax(-1)], 1)
    return tokens[0, len(prompt) :].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_models_in_half_precision_are_proven_in_float32(dtype: torch.dtype) -> None:
    model = lower(compiled_model("llama", dtype, **WIDE).captured, dtype="float16").model
    found = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    assert len(found) == 2
    assert all(node.attributes["do_rotary"].as_int() == 1 and node.inputs[1] is None for node in found)


def test_layers_with_one_kind_of_rotation_share_its_table() -> None:
    assert len({values["cos"] for values in attentions(fused(compiled_decoder("llama", **WIDE)))}) == 1


def test_nothing_of_masks_and_positions_is_left() -> None:
    graph = fused(compiled_decoder("llama", **WIDE)).graph_module.graph
    ops = {str(node.target) for node in graph.nodes if node.op == "call_function"}
    assert not {op for op in ops if any(part in op for part in ("arange", "cumsum", "le.", "index", "cos", "cat"))}


# ------------------------------------------------------------------------------------------------------ near misses


def test_heads_of_four_channels_stay() -> None:
    check_it_stays(compiled_decoder("llama", **{**GQA, "head_dim": 4}), "heads of 4 channels; .* multiples of 8")


def check_it_stays(captured: CapturedGraph, reason: str) -> None:
    """Both layers, each with its node and the reason."""
    captured.graph_module.graph.lint()
    captured.graph_module.recompile()
    code = captured.graph_module.code
    result = FuseAttention(captured)(captured.graph_module)
    assert not result.modified and result.value.fused == 0
    assert captured.graph_module.code == code
    names = {node.name for node in captured.graph_module.graph.nodes}
    assert len({refusal.node for refusal in result.value.refusals} & names) == 2
    for refusal in result.value.refusals:
        assert re.search(reason, refusal.reason) and not refusal.is_fused


def test_a_rotation_that_the_kernel_does_not_do_is_named() -> None:
    captured = compiled_decoder("llama", **GQA)
    value = FuseAttention(captured)(captured.graph_module).value
    assert value.fused == 2 and len(value.refusals) == 2
    for refusal in value.refusals:
        assert refusal.is_fused and "of 8 channels 8 turn" in refusal.reason


def test_other_softmaxes_are_no_attention() -> None:
    """A router's weights, and the probabilities of classes."""

    def route(graph: Graph) -> None:
        for gate in calls(graph, aten.silu.default):
            put_after(gate, aten.softmax.int, -1)

    captured = compiled_decoder("llama", **WIDE)
    route(captured.graph_module.graph)
    captured.graph_module.recompile()
    value = FuseAttention(captured)(captured.graph_module).value
    assert value.fused == 2 and not value.refusals


def calls(graph: Graph, target: Any) -> list[Node]:
    return [node for node in graph.nodes if is_call(node, target)]


def put_after(source: Node, target: Any, *args: Any) -> Node:
    """Let all readers of `source` read `target(source, *args)`."""
    readers = list(source.users)
    with source.graph.inserting_after(source):
        node = source.graph.call_function(target, (source, *args))
    node.meta = dict(source.meta)
    for reader in readers:
        reader.replace_input_with(source, node)
    return node


def over_queries(graph: Graph) -> None:
    for softmax in calls(graph, aten.softmax.int):
        softmax.args = (softmax.args[0], -2, *softmax.args[2:])


def with_a_bias_of_tokens(graph: Graph) -> None:
    tokens = next(node for node in graph.nodes if node.op == "placeholder")
    for softmax in calls(graph, aten.softmax.int):
        scores = operand_of(softmax)
        with graph.inserting_before(scores):
            columns = graph.call_function(aten.unsqueeze.default, (tokens, -1))
            rows = graph.call_function(aten.unsqueeze.default, (columns, 1))
        columns.meta["val"] = tokens.meta["val"].unsqueeze(-1)
        rows.meta["val"] = columns.meta["val"].unsqueeze(1)
        put_after(scores, aten.add.Tensor, rows)


def with_a_cap_over_the_mask(graph: Graph) -> None:
    for softmax in calls(graph, aten.softmax.int):
        masked = operand_of(softmax)
        with graph.inserting_before(softmax):
            scaled = graph.call_function(aten.div.Tensor, (masked, 2.0))
            capped = graph.call_function(aten.mul.Tensor, (graph.call_function(aten.tanh.default, (scaled,)), 2.0))
        for node in (scaled, capped.args[0], capped):
            assert isinstance(node, Node)
            node.meta = dict(masked.meta)
        softmax.replace_input_with(masked, capped)


def with_half_of_the_bias(graph: Graph) -> None:
    for product in calls(graph, aten.baddbmm.default):
        product.kwargs = {**product.kwargs, "beta": 0.5}


def with_other_heads_scores(graph: Graph) -> None:
    for softmax in calls(graph, aten.softmax.int):
        put_after(operand_of(softmax), aten.flip.default, [1])


def with_other_heads_weights(graph: Graph) -> None:
    for softmax in calls(graph, aten.softmax.int):
        put_after(softmax, aten.flip.default, [1])


def with_scores_in_bounds(graph: Graph) -> None:
    for softmax in calls(graph, aten.softmax.int):
        put_after(operand_of(softmax), aten.clamp.default, None, 1e3)


def with_weights_that_are_read(graph: Graph) -> None:
    for softmax in calls(graph, aten.softmax.int):
        with graph.inserting_after(softmax):
            graph.call_function(aten.mean.default, (softmax,))


def with_a_mask_that_lets_some_through(graph: Graph) -> None:
    for mask in calls(graph, aten.where.ScalarOther):
        mask.args = (*mask.args[:2], -5.0)


MISSES: list[tuple[str, Callable[[Graph], None], str]] = [
    ("spelled out", over_queries, "over dimension -2"),
    ("spelled out", with_a_bias_of_tokens, "biases depend on the tokens; accepted"),
    ("spelled out", with_other_heads_scores, "scores"),
    ("spelled out", with_other_heads_weights, "weights|heads"),
    ("spelled out", with_scores_in_bounds, "scores go through aten.clamp"),
    ("spelled out", with_weights_that_are_read, "read by more than one op"),
    ("spelled out", with_a_mask_that_lets_some_through, "mask|sees"),
    ("spelled out, softcap", with_a_cap_over_the_mask, "scores|mask|sees"),
    ("spelled out, biases by position", with_half_of_the_bias, "scores"),
]


@pytest.mark.parametrize(("name", "change", "reason"), MISSES, ids=lambda value: getattr(value, "__name__", None))
def test_what_is_not_proven_stays(name: str, change: Callable[[Graph], None], reason: str) -> None:
    family, config, _ = FAMILIES[name]
    captured = compiled_decoder(family, **config)
    found = find_attentions(captured)
    assert len(found.proven) == 2 and not found.refusals
    change(captured.graph_module.graph)
    check_it_stays(captured, reason)


def test_angles_that_depend_on_the_length_stay_in_the_graph() -> None:
    """Rotated by the last position's angle times its own, say: no table holds that."""
    captured = compiled_decoder("llama", **WIDE)
    graph = captured.graph_module.graph
    (cos,) = [node for node in graph.nodes if is_call(node, aten.cos.default)]
    with graph.inserting_before(cos):
        length = graph.call_function(aten.sym_size.int, (operand_of(cos), 1))
        wrong = graph.call_function(aten.mul.Tensor, (operand_of(cos), length))
    wrong.meta["val"] = cos.meta["val"]
    cos.args = (wrong,)
    captured.graph_module.recompile()
    assert all(
        part is None or part.rotation is None for site in find_attentions(captured).proven for part in site.heads
    )


def test_a_mask_of_another_kind_stays() -> None:
    captured = compiled_decoder("llama", **WIDE)
    graph = captured.graph_module.graph
    (later,) = [node for node in graph.nodes if is_call(node, aten.le.Tensor)]
    later.target = aten.lt.Tensor
    captured.graph_module.recompile()
    found = find_attentions(captured)
    assert not found.proven and len(found.refusals) == 2
    assert all("single token with itself" in refusal.reason for refusal in found.refusals)
