"""Decoders whose caches are states of fixed shapes, alone or beside attention."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.architectures import GQA, TEXT, TOKENS
from support.compiling import in_one_line, tokens
from support.graphs import randomize, relative_error
from support.onnx import OnnxModel
from torch import Tensor, nn

import teq_graph
from teq_graph import QuantizationConfig, TrainingConfig
from teq_graph.capture import capture
from teq_graph.errors import CaptureError, InputError
from teq_graph.estimate import Estimate
from teq_graph.onnx.runtime import load

IN_FLOAT = QuantizationConfig(skip=("*",))
LONG, NEW = 150, 8  # more than one part of a prompt, and several chunks of a scan
CONV, RECURRENT, ATTENTION = ["conv_state"], ["conv_state", "recurrent_state"], ["key", "value"]


def convolutions() -> nn.Module:
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes = {**GQA, "num_hidden_layers": 3, "max_position_embeddings": 256}
    return randomize(Lfm2ForCausalLM(Lfm2Config(**sizes, layer_types=["conv", "full_attention", "conv"])))


def state_spaces() -> nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    sizes = dict(hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, n_groups=1)
    # A chunk that holds the longest of these texts.
    return randomize(Mamba2ForCausalLM(Mamba2Config(**TOKENS, **sizes, expand=2, chunk_size=256)), std=0.2)


def state_spaces_and_attention() -> nn.Module:
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    scan = dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2)
    experts = dict(num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=48)
    sizes = {**GQA, "max_position_embeddings": 256}
    config = GraniteMoeHybridConfig(**sizes, **scan, **experts, layer_types=["mamba", "attention"])
    return randomize(GraniteMoeHybridForCausalLM(config), std=0.2)


def delta_rule() -> nn.Module:
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    heads = dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=6)
    sizes = {**GQA, "max_position_embeddings": 256, "head_dim": 8, "mlp_only_layers": [0, 1]}
    config = Qwen3NextConfig(**sizes, **heads, layer_types=["linear_attention", "full_attention"])
    return randomize(Qwen3NextForCausalLM(config), std=0.2)


def delta_rule_of_channels() -> nn.Module:
    from transformers import KimiLinearConfig, KimiLinearForCausalLM

    latent = dict(kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    sizes = {**TEXT, "max_position_embeddings": 256, "linear_head_dim": 8, "linear_num_heads": 4}
    kinds = dict(layer_types=["linear_attention", "full_attention"], mlp_layer_types=["dense", "dense"])
    config = KimiLinearConfig(**sizes, **latent, **kinds)
    return randomize(KimiLinearForCausalLM(config), std=0.2)


def layers_without_caches() -> nn.Module:
    from transformers import NemotronHConfig, NemotronHForCausalLM

    scan = dict(mamba_num_heads=4, mamba_head_dim=16, ssm_state_size=16, n_groups=1, conv_kernel=4, chunk_size=256)
    sizes = {**GQA, "num_hidden_layers": 4, "max_position_embeddings": 256, "head_dim": 8}
    config = NemotronHConfig(**sizes, **scan, layers_block_type=["mamba", "mlp", "attention", "mlp"])
    return randomize(NemotronHForCausalLM(config), std=0.2)


def selective_scan() -> nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8)
    return randomize(MambaForCausalLM(config), std=0.2)


def selective_scan_and_attention() -> nn.Module:
    from transformers import JambaConfig, JambaForCausalLM

    layers = dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1)
    sizes = {**GQA, "max_position_embeddings": 256, "mamba_d_state": 8, "mamba_dt_rank": 4}
    return randomize(JambaForCausalLM(JambaConfig(**sizes, **layers, num_experts=1, num_experts_per_tok=1)), std=0.2)


def selective_scans_of_heads() -> nn.Module:
    from transformers import ZambaConfig, ZambaForCausalLM

    layers = dict(num_hidden_layers=6, attn_layer_period=2, attn_layer_offset=1)
    sizes = {**GQA, "max_position_embeddings": 256, "mamba_d_state": 8, "mamba_dt_rank": 4, "n_mamba_heads": 2}
    return randomize(ZambaForCausalLM(ZambaConfig(**{**sizes, **layers})), std=0.1)


KINDS: dict[str, tuple[Callable[[], nn.Module], list[list[str]]]] = {
    "convolutions": (convolutions, [CONV, ATTENTION, CONV]),
    "state spaces": (state_spaces, [RECURRENT, RECURRENT]),
    "state spaces and attention": (state_spaces_and_attention, [RECURRENT, ATTENTION]),
    "delta rule": (delta_rule, [RECURRENT, ATTENTION]),
    "layers without caches": (layers_without_caches, [RECURRENT, [], ATTENTION, []]),
    "delta rule of channels": (delta_rule_of_channels, [RECURRENT, ATTENTION]),
    "selective scan": (selective_scan, [RECURRENT, RECURRENT]),
    "selective scan and attention": (selective_scan_and_attention, [RECURRENT, ATTENTION]),
    "selective scans of heads": (selective_scans_of_heads, [RECURRENT] * 2 + [[*ATTENTION, *RECURRENT], RECURRENT] * 2),
}


@pytest.fixture(scope="module", params=KINDS)
def built(request: pytest.FixtureRequest) -> tuple[nn.Module, teq_graph.CompiledModel, list[list[str]]]:
    build, names = KINDS[request.param]
    torch.manual_seed(1)
    model = build()
    return model, teq_graph.compile(model, quantization=IN_FLOAT, training=None), names


@pytest.fixture(scope="module")
def exported(built: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("states") / "onnx"
    result: Path = built[1].export_onnx(directory, accuracy_level=1)
    return result


@torch.no_grad()
def test_prefill_steps_and_parts_are_one_forward(built: Any) -> None:
    model, compiled, names = built
    decoder = compiled.captured.decoder
    assert decoder is not None and [[one.name for one in layer] for layer in decoder.layers] == names
    ids = tokens(2, LONG)
    expected = model(input_ids=ids).logits
    assert relative_error(compiled(input_ids=ids).logits, expected) <= 1e-5
    ends = (5, 6, 7, 40, LONG)
    past, logits = None, []
    for start, end in zip((0, *ends), ends, strict=False):
        step = compiled(input_ids=ids[:, start:end], past_key_values=past)
        past = step.past_key_values
        logits.append(step.logits)
    assert relative_error(torch.cat(logits, 1), expected) <= 1e-5
    # A state stays as large as it is.
    states = [
        (one.sizes, held.shape[1:])
        for one, held in zip(decoder.cached, [x for layer in past or () for x in layer], strict=True)
        if one.growing_axis is None
    ]
    assert states and all(tuple(shape) == sizes for sizes, shape in states)


@torch.no_grad()
def test_left_padding_leaves_states_alone(built: Any) -> None:
    model, compiled, _ = built
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :8] = 0
    padded = compiled(input_ids=ids, attention_mask=mask).logits
    assert relative_error(padded[:1, 8:], model(input_ids=ids[:1, 8:]).logits) <= 1e-5
    assert relative_error(padded[1:], model(input_ids=ids[1:]).logits) <= 1e-5


@torch.no_grad()
def test_onnx_and_what_it_generates_are_the_models(built: Any, exported: Path) -> None:
    model, compiled, _ = built
    session, runtime = OnnxModel(exported), load(exported)
    for length in (1, 2, 37, LONG):
        ids = tokens(2, length)
        expected = model(input_ids=ids).logits
        assert relative_error(session.step(compiled, ids, None)[0], expected) <= 1e-4
        # In parts, where it is longer than one, from empty states.
        assert relative_error(torch.from_numpy(runtime.logits(ids.numpy())), expected) <= 1e-4
    prompts = [tokens(1, length)[0].tolist() for length in (1, 9, LONG)]
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW}
    continued = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        result: Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), eos_token_id=None, pad_token_id=0, **options
        )
        continued.append(result[0, len(prompt) :].tolist())
    assert [runtime.generate(prompt, eos_token_id=[], **options) for prompt in prompts] == continued
    # Padded on the left, and guesses, which a state could not take back.
    assert runtime.generate(prompts, eos_token_id=[], **options) == continued
    assert runtime.generate(prompts[2], eos_token_id=[], prompt_lookup_num_tokens=4, **options) == continued[2]


def test_a_step_computes_a_short_chunk(built: Any) -> None:
    """Whatever the model's own chunks are: in chunks of 256 tokens, a step of one would compute all."""
    _, compiled, _ = built
    largest = 0

    class Largest(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            nonlocal largest
            result = super().run_node(n)
            largest = max(largest, result.numel() if isinstance(result, Tensor) and n.op == "call_function" else 0)
            return result

    args, _ = compiled.captured.bind({"input_ids": tokens(1, 1)})
    with torch.no_grad():
        Largest(compiled.graph_module).run(*torch.utils._pytree.tree_leaves(args), enable_io_processing=False)
    assert largest <= 2**16


def test_states_are_saved_and_loaded(built: Any, tmp_path: Path) -> None:
    _, compiled, _ = built
    compiled.save(tmp_path / "saved")
    loaded = teq_graph.load(tmp_path / "saved")
    assert loaded.captured.decoder == compiled.captured.decoder
    ids = tokens(2, 12)
    step = loaded(input_ids=ids[:, :7])
    last = loaded(input_ids=ids[:, 7:], past_key_values=step.past_key_values).logits
    assert relative_error(last, compiled(input_ids=ids).logits[:, 7:]) <= 1e-5


def test_other_states_are_refused(built: Any) -> None:
    _, compiled, _ = built
    past = compiled(input_ids=tokens(2, 3)).past_key_values
    for wrong in (past[:-1], [layer[:1] * 3 for layer in past], [tuple(x[0] for x in layer) for layer in past]):
        with pytest.raises(
            InputError, match=r"past_key_values=.*: accepted is a list of \d, as a step returns"
        ) as caught:
            compiled(input_ids=tokens(2, 1), past_key_values=wrong)
        in_one_line(caught)


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_and_trained_it_computes_nearly_the_same(kind: str) -> None:
    model = KINDS[kind][0]()
    training = TrainingConfig(steps=2, samples=4, length=20, batch_size=2)  # on text that it writes itself
    compiled = teq_graph.compile(model, quantization=QuantizationConfig(bits=8, group_size=16), training=training)
    ids = tokens(2, 40)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    actual = compiled(input_ids=ids).logits
    assert float((actual - expected).norm() / expected.norm()) <= 0.05


@torch.no_grad()
@pytest.mark.parametrize("build", [state_spaces, selective_scan, selective_scans_of_heads])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scans_of_models_in_half_precision(build: Callable[[], nn.Module], dtype: torch.dtype) -> None:
    wide = build()
    ids = tokens(2, 40)
    expected = wide(input_ids=ids).logits
    compiled = teq_graph.compile(wide.to(dtype), quantization=IN_FLOAT, training=None)
    first = compiled(input_ids=ids[:, :19])
    rest = compiled(input_ids=ids[:, 19:], past_key_values=first.past_key_values)
    assert all(held.dtype == dtype for layer in rest.past_key_values for held in layer)
    # As far as rounding of every value to 11 and 8 bits goes, through two layers.
    bound = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert relative_error(torch.cat([first.logits, rest.logits], 1).float(), expected) <= bound


# ------------------------------------------------------------------------------------------ what keeps no cache


def test_a_loop_over_tokens_is_refused_in_one_line() -> None:
    from transformers import RwkvConfig, RwkvForCausalLM

    model = RwkvForCausalLM(RwkvConfig(**TOKENS, hidden_size=32, num_hidden_layers=2, context_length=64))
    with pytest.raises(CaptureError, match="its Python depends on the number of tokens") as caught:
        capture(randomize(model))
    in_one_line(caught)


@torch.no_grad()
def test_without_a_cache_a_scan_begins_from_nothing() -> None:
    """Also after a model that reads states and passes them to its own scans."""
    capture(state_spaces())
    model, ids = selective_scan(), tokens(2, 9)
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    graph = capture(model, {"input_ids": ids}, {"input_ids": free})
    longer = tokens(3, 21)
    result = graph.graph_module(input_ids=longer)
    assert relative_error(result.logits, model(input_ids=longer).logits) <= 1e-5


def test_a_graph_of_one_block_of_tokens_is_refused() -> None:
    """A graph that is right for a few tokens alone was taken for the model, and failed or lied for more."""
    from transformers import MiniMaxConfig, MiniMaxForCausalLM

    sizes = {**GQA, "max_position_embeddings": 256, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    config = MiniMaxConfig(**sizes, block_size=16, layer_types=["linear_attention", "full_attention"])
    with pytest.raises(
        CaptureError, match=r"made of MiniMaxForCausalLM holds for few tokens alone: accepted"
    ) as caught:
        capture(randomize(MiniMaxForCausalLM(config)))
    in_one_line(caught)


def test_that_there_is_no_cache_is_told_before_the_work() -> None:
    from transformers import XLMConfig, XLMWithLMHeadModel

    config = XLMConfig(**TOKENS, emb_dim=32, n_layers=1, n_heads=4, max_position_embeddings=64)
    told: list[Estimate] = []
    teq_graph.compile(
        randomize(XLMWithLMHeadModel(config)), quantization=IN_FLOAT, training=None, on_estimate=told.append
    )
    assert [note for note in told[0].notes if note.startswith("the graph keeps no KV cache (each token changes")]
