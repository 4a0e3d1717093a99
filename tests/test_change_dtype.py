"""Another floating-point type for a graph: what takes it, what stays float32, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from support.graphs import randomize
from support.onnx import OnnxModel
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from transformers import AutoConfig, AutoModelForCausalLM

import teq_graph
from teq_graph.capture import CapturedGraph, capture
from teq_graph.config import QuantizationConfig, WeightSpec
from teq_graph.errors import NumericsError
from teq_graph.graph.nodes import aten, is_call
from teq_graph.graph.products import product_nodes, weight_name_of
from teq_graph.passes.change_dtype import ChangeDtype
from teq_graph.passes.fold_constants import FoldConstants
from teq_graph.passes.fuse_rms_norm import FuseRMSNorm
from teq_graph.passes.lower_to_matmul_nbits import LowerToMatMulNBits
from teq_graph.passes.normalize_linears import NormalizeLinears
from teq_graph.passes.quantize_linears import QuantizeLinears
from teq_graph.passes.remove_no_ops import RemoveNoOps

HALF, BRAIN, SINGLE = torch.float16, torch.bfloat16, torch.float32
VOCAB = 97

SMALL = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
# Rotary, grouped heads; softcapped scores; ALiBi with baddbmm; learned positions; interleaved rotary; ALiBi bias.
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2},
    "gemma2": {**SMALL, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 16},
    "bloom": {**SMALL, "bos_token_id": 1, "eos_token_id": 2},
    "gpt2": {**SMALL, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2},
    "gptj": {**SMALL, "n_positions": 64, "rotary_dim": 4, "bos_token_id": 1, "eos_token_id": 2},
    "mpt": {**SMALL, "max_seq_len": 64},
}


def decoder(name: str, dtype: torch.dtype = SINGLE) -> CapturedGraph:
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **CONFIGS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3).add_(0.1 * torch.randn_like(parameter))
    captured = capture(model.to(dtype))
    for step in (RemoveNoOps(), NormalizeLinears(), FoldConstants(), FuseRMSNorm()):
        step(captured.graph_module)
    return captured


def inputs(captured: CapturedGraph, dtype: torch.dtype) -> tuple[Any, ...]:
    """Ten tokens in two rows, the first with left padding, after no past."""
    assert captured.decoder is not None
    ids, mask = torch.randint(0, VOCAB, (2, 10)), torch.ones(2, 10, dtype=torch.long)
    mask[0, :4] = 0
    return ids, mask, captured.decoder.empty_past(2, dtype)


def plain(model: Callable[..., Any], *args: Tensor, **kwargs: Tensor) -> GraphModule:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
            return model(self.linear, *args, **kwargs)

    module = capture(Plain().eval(), args).graph_module
    RemoveNoOps()(module)
    return module


def calls(module: GraphModule, *targets: Any) -> list[Node]:
    return [node for node in module.graph.nodes if is_call(node, *targets)]


def types(nodes: list[Node]) -> set[torch.dtype]:
    return {node.meta["val"].dtype for node in nodes}


def check_meta(module: GraphModule, *args: Any) -> None:
    """What the nodes say about their types is so."""

    class Check(torch.fx.Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, Tensor) and isinstance(n.meta.get("val"), Tensor):
                assert n.meta["val"].dtype == result.dtype, n.format_node()
            return result

    Check(module).run(*torch.utils._pytree.tree_leaves(args))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.double() - expected.double()).abs().max() / expected.double().abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_decoders_in_half_precision(name: str) -> None:
    captured = decoder(name)
    module = captured.graph_module
    ids, mask, past = inputs(captured, SINGLE)
    with torch.no_grad():
        expected, cache = module(ids, mask, past)
        assert ChangeDtype(HALF)(module).modified  # type: ignore[union-attr]
        past = captured.decoder.empty_past(2, HALF)  # type: ignore[union-attr]
        actual, half_cache = module(ids, mask, past)
        check_meta(module, ids, mask, past)
    leaves = torch.utils._pytree.tree_leaves((actual, half_cache))
    assert {leaf.dtype for leaf in leaves} == {HALF}
    real = mask.bool()
    assert relative_error(actual[real], expected[real]) <= 4e-3
    assert relative_error(half_cache[0][0][1], cache[0][0][1]) <= 2e-3
    assert types([linear.all_input_nodes[1] for linear in product_nodes(module)]) == {HALF}
    assert all(not p.is_floating_point() or p.dtype == HALF for p in module.parameters())


@pytest.mark.parametrize("name", ["llama", "gemma2"])
@pytest.mark.parametrize("target", [SINGLE, HALF], ids=str)
def test_bfloat16_decoders(name: str, target: torch.dtype) -> None:
    captured = decoder(name, BRAIN)
    module = captured.graph_module
    ids, mask, _ = inputs(captured, BRAIN)
    reference = decoder(name)
    for key, tensor in reference.graph_module.state_dict().items():
        tensor.copy_(tensor.to(BRAIN)) if "inv_freq" not in key else None
    with torch.no_grad():
        expected, _ = reference.graph_module(*inputs_like(reference, ids, mask, SINGLE))
        ChangeDtype(target)(module)
        args = inputs_like(captured, ids, mask, target)
        actual, cache = module(*args)
        check_meta(module, *args)
    assert {leaf.dtype for leaf in torch.utils._pytree.tree_leaves((actual, cache))} == {target}
    assert not any(value == BRAIN for node in module.graph.nodes for value in (*node.args, *node.kwargs.values()))
    real = mask.bool()
    assert relative_error(actual[real], expected[real]) <= (1e-2 if target == SINGLE else 1.5e-2)


def inputs_like(captured: CapturedGraph, ids: Tensor, mask: Tensor, dtype: torch.dtype) -> tuple[Any, ...]:
    assert captured.decoder is not None
    return ids, mask, captured.decoder.empty_past(2, dtype)


def test_quantized_weights_follow() -> None:
    captured = decoder("llama")
    module = captured.graph_module
    names = {weight_name_of(linear) for linear in product_nodes(module)} - {captured.lm_head}
    QuantizeLinears(dict.fromkeys(names, WeightSpec(4, 16)))(module)
    LowerToMatMulNBits()(module)
    ids, mask, past = inputs(captured, SINGLE)
    with torch.no_grad():
        expected, _ = module(ids, mask, past)
        ChangeDtype(HALF)(module)
        actual, _ = module(*inputs_like(captured, ids, mask, HALF))
    products = calls(module, torch.ops.teq_graph.matmul_nbits.default)
    assert len(products) == 7
    assert types([node.args[2] for node in products]) == {HALF}  # type: ignore[misc]
    assert types([node.args[1] for node in products]) == {torch.uint8}  # type: ignore[misc]
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) <= 4e-3


def test_positions_stay_in_single_precision() -> None:
    module = decoder("llama").graph_module
    ChangeDtype(HALF)(module)
    assert types(calls(module, aten.cos.default, aten.sin.default)) == {SINGLE}
    # One cast of each, not one for every reader.
    assert len(calls(module, aten.to.dtype)) <= 3


def test_a_far_position_keeps_its_angle() -> None:
    def rotate(linear: nn.Linear, x: Tensor, positions: Tensor) -> Tensor:
        return linear(x) * torch.cos(positions.float() * 0.5)

    module = plain(rotate, torch.randn(3, 8), torch.arange(8))
    x, positions = torch.randn(3, 8), torch.arange(8) + 20001
    expected = module(x, positions)
    ChangeDtype(HALF)(module)
    assert relative_error(module(x.half(), positions), expected) <= 2e-3


@pytest.mark.parametrize("where", ["full", "masked_fill", "product", "constant"])
def test_mask_bounds_stay_finite(where: str) -> None:
    lowest = torch.finfo(SINGLE).min

    def masked(linear: nn.Linear, x: Tensor, mask: Tensor) -> Tensor:
        scores = linear(x)
        if where == "full":
            scores = scores + torch.where(mask, 0.0, torch.full((), lowest))
        elif where == "masked_fill":
            scores = scores.masked_fill(~mask, lowest)
        elif where == "product":
            scores = scores + (1.0 - mask.float()) * lowest
        else:
            scores = scores + torch.tensor([0.0] * 5 + [lowest] * 3)
        return scores

    module = plain(masked, torch.randn(4, 8), torch.ones(4, 8, dtype=torch.bool))
    x = torch.randn(4, 8) * 50
    mask = torch.rand(4, 8) > 0.4
    mask[0] = False  # as for the padding of a batch
    with torch.no_grad():
        expected = module(x, mask).softmax(-1)
        ChangeDtype(HALF)(module)
        scores = module(x.half(), mask)
        check_meta(module, x.half(), mask)
    assert scores.dtype == HALF
    assert torch.isfinite(scores).all()
    rows = slice(None) if where == "constant" else slice(1, None)
    assert relative_error(scores.softmax(-1)[rows], expected[rows]) <= 3e-2


def test_spelled_out_norms_do_not_overflow() -> None:
    def norm(linear: nn.Linear, x: Tensor) -> Tensor:
        hidden = linear(x)
        hidden = hidden - hidden.mean(-1, keepdim=True)
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)

    module = plain(norm, torch.randn(3, 8))
    x = torch.randn(3, 8) * 3000
    expected = module(x)
    assert module(x).isfinite().all() and (x.half() ** 2).isinf().any()
    ChangeDtype(HALF)(module)
    actual = module(x.half())
    assert actual.dtype == HALF
    assert relative_error(actual, expected) <= 5e-3
    assert types(calls(module, aten.pow.Tensor_Scalar, aten.rsqrt.default)) == {SINGLE}


def test_a_softmax_in_single_precision_stays_so() -> None:
    def attend(linear: nn.Linear, x: Tensor) -> Tensor:
        return nn.functional.softmax(linear(x), dim=-1, dtype=torch.float32) @ x.T

    module = plain(attend, torch.randn(4, 8))
    x = torch.randn(4, 8)
    expected = module(x)
    ChangeDtype(HALF)(module)
    assert types(calls(module, aten.softmax.int)) == {SINGLE}
    assert types(calls(module, aten.matmul.default)) == {HALF}
    assert relative_error(module(x.half()), expected) <= 3e-3


def test_results_that_come_in_several() -> None:
    def halves(linear: nn.Linear, x: Tensor) -> tuple[Tensor, Tensor]:
        left, right = linear(x).chunk(2, dim=-1)
        values, indices = (left * right).max(dim=-1)
        return values, indices

    module = plain(halves, torch.randn(4, 8))
    x = torch.randn(4, 8)
    expected = module(x)
    ChangeDtype(HALF)(module)
    values, indices = module(x.half())
    assert (values.dtype, indices.dtype) == (HALF, torch.int64)
    assert relative_error(values, expected[0]) <= 5e-3


@pytest.mark.parametrize("target", [SINGLE, HALF], ids=str)
def test_no_bfloat16_is_left_inside(target: torch.dtype) -> None:
    slopes = torch.rand(8, dtype=BRAIN)

    def biased(linear: nn.Linear, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        distance = positions[:, None].bfloat16() * slopes + torch.full((8,), 0.5, dtype=torch.bfloat16)
        high, _ = (linear(x).to(torch.bfloat16) * 3).max(-1, keepdim=True)
        return linear(x) + distance.to(x.dtype), high.float()

    module = plain(biased, torch.randn(5, 8), torch.arange(5))
    x, positions = torch.randn(5, 8), torch.arange(5) + 900
    expected = module(x, positions)
    step = ChangeDtype(target)
    assert step(module).modified  # type: ignore[union-attr]
    actual = module(x.to(target), positions)
    check_meta(module, x.to(target), positions)
    assert types([node for node in module.graph.nodes if isinstance(node.meta.get("val"), Tensor)]) <= {
        SINGLE,
        HALF,
        torch.int64,
    }
    assert not any(value == BRAIN for node in module.graph.nodes for value in (*node.args, *node.kwargs.values()))
    # What bfloat16 rounds, four times in a row, float32 does not.
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == target and relative_error(a, e) <= 4 * torch.finfo(BRAIN).eps
    code = str(module.graph)
    assert not step(module).modified  # type: ignore[union-attr]
    assert str(module.graph) == code


@pytest.mark.parametrize("heads", [4, 12])
@pytest.mark.parametrize("target", ["float32", "float16"])
def test_onnxruntime_loads_a_model_that_computes_positions_in_bfloat16(
    heads: int, target: Literal["float32", "float16"], tmp_path: Path
) -> None:
    config = AutoConfig.for_model("falcon", **{**SMALL, "hidden_size": 48, "num_attention_heads": heads}, alibi=True)
    model = randomize(AutoModelForCausalLM.from_config(config))
    quantization = QuantizationConfig(bits=8, group_size=16)
    compiled = teq_graph.compile(model, quantization=quantization, training=None)
    onnx = OnnxModel(compiled.export_onnx(tmp_path / "onnx", dtype=target, accuracy_level=1))
    tokens = torch.randint(0, VOCAB, (2, 40))
    dtype = HALF if target == "float16" else SINGLE
    past = torch.utils._pytree.tree_leaves(compiled.captured.decoder.empty_past(2, dtype))  # type: ignore[union-attr]
    logits, _ = onnx.step(compiled, tokens, past)
    # The slopes of 4 heads are powers of 2, and positions below 256 exact: nothing is rounded to bfloat16. Of 12 heads,
    # half of the slopes are rounded in PyTorch, by up to half of its eps, and not here.
    tolerance = {(4, SINGLE): 1e-5, (12, SINGLE): torch.finfo(BRAIN).eps}.get((heads, dtype), 8e-3)
    assert relative_error(logits, compiled(input_ids=tokens).logits) <= tolerance


def test_a_graph_of_the_type_is_left_alone() -> None:
    module = plain(lambda linear, x: linear(x).relu(), torch.randn(4, 8))
    code = str(module.graph)
    assert not ChangeDtype(SINGLE)(module).modified  # type: ignore[union-attr]
    assert str(module.graph) == code
    assert ChangeDtype(HALF)(module).modified  # type: ignore[union-attr]
    code = str(module.graph)
    assert not ChangeDtype(HALF)(module).modified  # type: ignore[union-attr]
    assert str(module.graph) == code


def test_names_are_kept() -> None:
    module = decoder("gpt2").graph_module
    names = set(module.state_dict())
    ChangeDtype(HALF)(module)
    assert set(module.state_dict()) == names


def test_a_weight_beyond_the_range_is_refused() -> None:
    module = plain(lambda linear, x: linear(x), torch.randn(4, 8))
    with torch.no_grad():
        module.linear.weight[2, 3] = 1e5  # type: ignore[union-attr, index]
    with pytest.raises(NumericsError, match=r"linear\.weight.*1e\+05"):
        ChangeDtype(HALF)(module)


def test_a_large_weight_within_the_range_keeps_its_value() -> None:
    module = plain(lambda linear, x: linear(x), torch.randn(4, 8))
    with torch.no_grad():
        module.linear.weight[2, 3] = 5e4  # type: ignore[union-attr, index]
    ChangeDtype(HALF)(module)
    assert module.linear.weight[2, 3] == torch.tensor(5e4, dtype=HALF)  # type: ignore[union-attr, index]
