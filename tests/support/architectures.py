"""Tiny models with random weights of every architecture that is held, and what is expected of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim

VOCAB = 97
SIZES = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
TOKENS = dict(vocab_size=VOCAB, bos_token_id=1, eos_token_id=2, pad_token_id=0)
TEXT = {**SIZES, **TOKENS, "max_position_embeddings": 64}
GQA = {**TEXT, "num_key_value_heads": 2}
LATENT = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16)
SCAN = dict(hidden_size=32, num_hidden_layers=2, num_heads=4, head_dim=16, state_size=16, n_groups=1, expand=2)
DELTA = dict(
    **dict(linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8),
    **dict(layer_types=["linear_attention", "full_attention"], shared_expert_intermediate_size=16),
)
HYBRID = dict(
    **dict(mamba_n_heads=8, mamba_d_head=8, mamba_d_state=16, mamba_n_groups=1, mamba_expand=2),
    **dict(num_local_experts=0, num_experts_per_tok=0, shared_intermediate_size=48),
)
JAMBA = dict(
    **dict(mamba_d_state=8, mamba_dt_rank=4, num_experts=4, num_experts_per_tok=2),
    **dict(attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1),
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32)
GROUPED = dict(n_routed_experts=8, n_group=4, topk_group=2, first_k_dense_replace=1, n_shared_experts=1)
BOTH = dict(
    **dict(d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_start_token_id=3),
    **dict(encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
)
SOUND = dict(num_mel_bins=16, max_source_positions=20)
WINDOW = 6  # shorter than the sequences of the tests


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One tiny model. `linears` counts its linears and convolutions, `covered` those whose columns are scaled by some
    equivalence."""

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int, int], Any]
    """Random inputs for a batch and a length: keyword arguments, or a tuple of positional ones."""
    linears: int
    covered: int
    is_decoder: bool = False
    example_inputs: Any = None
    dynamic_shapes: Any = None

    def build(self, std: float = 0.3) -> nn.Module:
        """A model in eval mode, every parameter normal, so that norms and biases are not trivial."""
        model = self.make().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=std)
        return model

    def __str__(self) -> str:
        return self.name


def _tokens(batch: int, length: int) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length))


def _pretrained(family: str, kind: str, **config: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        model: nn.Module = getattr(transformers, kind).from_config(transformers.AutoConfig.for_model(family, **config))
        return model

    return make


def _decoder(name: str, family: str, linears: int, covered: int, **config: Any) -> Architecture:
    make = _pretrained(family, "AutoModelForCausalLM", **config)
    return Architecture(name, make, lambda b, s: {"input_ids": _tokens(b, s)}, linears, covered, is_decoder=True)


def _images(name: str, family: str, products: int, covered: int, **config: Any) -> Architecture:
    make = _pretrained(family, "AutoModelForImageClassification", **config)
    return Architecture(name, make, lambda b, _: {"pixel_values": torch.randn(b, 3, 32, 32)}, products, covered)


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 32), nn.GELU(), nn.Linear(32, 32), nn.Linear(32, 8)
    )


ARCHITECTURES = (
    _decoder("Llama", "llama", 15, 15, **TEXT, num_key_value_heads=4),
    _decoder("Llama (GQA)", "llama", 15, 15, **GQA),
    _decoder("Mistral", "mistral", 15, 15, **GQA, sliding_window=WINDOW),
    _decoder("Qwen2", "qwen2", 15, 15, **GQA),
    _decoder("Qwen3", "qwen3", 15, 15, **GQA, head_dim=8),
    _decoder("Gemma2", "gemma2", 15, 14, **GQA, head_dim=8, sliding_window=WINDOW),
    _decoder("Gemma3 (text)", "gemma3_text", 15, 14, **GQA, head_dim=8, sliding_window=WINDOW),
    _decoder("OPT", "opt", 13, 12, **TEXT, ffn_dim=64, word_embed_proj_dim=32),
    _decoder("BLOOM", "bloom", 9, 6, **TOKENS, hidden_size=32, n_layer=2, n_head=4),
    _decoder("GPT-2", "gpt2", 9, 6, **TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64),
    _decoder("GPT-J", "gptj", 13, 11, **TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    _decoder("GPT-NeoX", "gpt_neox", 9, 7, **TEXT),
    _decoder("Falcon (MQA)", "falcon", 9, 6, **TEXT),
    _decoder("Falcon (GQA)", "falcon", 9, 6, **TEXT, num_kv_heads=2, new_decoder_architecture=True),
    _decoder("Phi", "phi", 13, 11, **TEXT),
    _decoder("Phi-3", "phi3", 9, 9, **GQA),
    _decoder("MPT", "mpt", 9, 6, **TOKENS, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    _decoder("StableLM", "stablelm", 15, 15, **GQA),
    _decoder("Cohere", "cohere", 15, 14, **GQA),
    _decoder("OLMo2", "olmo2", 15, 5, **GQA),
    _decoder("DeepSeek-V2 (MLA)", "deepseek_v2", 17, 17, **TEXT, **LATENT, first_k_dense_replace=2),
    _decoder("LFM2", "lfm2", 14, 12, **GQA, layer_types=["conv", "full_attention"]),
    _decoder("Mamba2", "mamba2", 7, 5, **TOKENS, **SCAN),
    _decoder("Mamba", "mamba", 11, 4, **TOKENS, hidden_size=32, num_hidden_layers=2, state_size=8),
    _decoder("Jamba", "jamba", 16, 13, **GQA, **JAMBA),
    _decoder("Granite 4 (hybrid)", "granitemoehybrid", 12, 11, **GQA, **HYBRID, layer_types=["mamba", "attention"]),
    _decoder("Qwen3-Next", "qwen3_next", 23, 22, **GQA, **EXPERTS, **DELTA, head_dim=8, num_experts=4),
    _decoder("Mixtral", "mixtral", 15, 15, **GQA, num_experts_per_tok=2, num_local_experts=4),
    _decoder("Qwen3-MoE", "qwen3_moe", 15, 15, **GQA, **EXPERTS, head_dim=8, num_experts=8),
    _decoder("OLMoE", "olmoe", 15, 15, **GQA, num_experts_per_tok=2, num_experts=4),
    _decoder("gpt-oss", "gpt_oss", 15, 13, **GQA, head_dim=8, num_experts_per_tok=2, num_local_experts=4),
    _decoder(
        "DeepSeek-V3",
        "deepseek_v3",
        20,
        20,
        **dict(**TEXT, **LATENT, **EXPERTS, **GROUPED),
    ),
    _decoder(
        "DeepSeek-V3.2 (sparse attention)",
        "deepseek_v32",
        26,
        26,
        **dict(**TEXT, **LATENT, **EXPERTS, **GROUPED),
        # Fewer positions than the tests have, and heads enough that no two positions are equally good.
        **dict(index_topk=6, index_n_heads=16, index_head_dim=16),
    ),
    Architecture(
        "BERT (post-LN)",
        _pretrained("bert", "AutoModel", **{**SIZES, **TOKENS}),
        lambda b, s: {"input_ids": _tokens(b, s), "attention_mask": torch.ones(b, s, dtype=torch.long)},
        linears=13,
        covered=2,
    ),
    Architecture(
        "ViT",
        _pretrained("vit", "AutoModelForImageClassification", **SIZES, image_size=16, patch_size=4),
        lambda b, s: {"pixel_values": torch.randn(b, 3, 16, 16)},
        linears=14,
        covered=11,
    ),
    _images("ResNet", "resnet", 12, 6, embedding_size=16, hidden_sizes=[16, 32], depths=[2, 1]),
    _images("ConvNeXt", "convnext", 20, 9, image_size=32, hidden_sizes=[16, 16, 32, 32], depths=[1, 1, 2, 1]),
    Architecture(
        "XLNet",
        _pretrained("xlnet", "AutoModel", vocab_size=VOCAB, d_model=32, n_layer=2, n_head=4, d_inner=64),
        lambda b, s: {"input_ids": _tokens(b, s), "attention_mask": torch.ones(b, s, dtype=torch.long)},
        linears=4,
        covered=0,
    ),
    Architecture(
        "T5",
        _pretrained("t5", "AutoModelForSeq2SeqLM", **TOKENS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4),
        lambda b, s: {
            "input_ids": _tokens(b, s + 1),
            "attention_mask": torch.ones(b, s + 1, dtype=torch.long),
            "decoder_input_ids": _tokens(b, s),
        },
        linears=33,
        covered=32,
    ),
    Architecture(
        "BART",
        _pretrained("bart", "AutoModelForSeq2SeqLM", **TOKENS, **BOTH, max_position_embeddings=64),
        lambda b, s: {
            "input_ids": _tokens(b, s + 1),
            "attention_mask": torch.ones(b, s + 1, dtype=torch.long),
            "decoder_input_ids": _tokens(b, s),
        },
        linears=33,
        covered=10,
    ),
    Architecture(
        "Whisper",
        _pretrained("whisper", "AutoModelForSpeechSeq2Seq", **TOKENS, **BOTH, **SOUND, max_target_positions=64),
        lambda b, s: {"input_features": torch.randn(b, 16, 40), "decoder_input_ids": _tokens(b, s)},
        linears=35,
        covered=28,
    ),
    Architecture(
        "MLP",
        _mlp,
        lambda b, s: (torch.randn(b, 16),),
        linears=4,
        covered=2,
        example_inputs=(torch.zeros(4, 16),),
        dynamic_shapes=({0: Dim.DYNAMIC},),
    ),
)

BY_NAME = {architecture.name: architecture for architecture in ARCHITECTURES}
