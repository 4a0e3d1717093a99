"""A tiny model of any class of transformers: its default configuration, made smaller by the names of its numbers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

LAYERS = 2
VOCABULARY = 128
LARGEST = 60_000_000
"""Parameters of a model that is still tiny enough."""

_LAYERS = re.compile(r"(?<!feat_extract)(^layers|_layers?|^depth|_depth|num_blocks)$")
_INDICES = re.compile(r"(index(es)?|indices|ind|idxs?|ids|_layers|attention_blocks)$")
_DEPTHS = re.compile(r"(^|_)(depths?|repeats|num_blocks|numb_of_layers|blocks_per_stage|block_sizes|n_attn_blocks)$")
_SCANS = (("expand", "num_heads", "head_dim", ""), ("mamba_expand", "mamba_n_heads", "mamba_d_head", "mamba_d_ssm"))
"""Of state-space layers: how many times as wide as the stream, in so many heads of such a size; how wide that is."""
_ATTENTION = {"mamba": "attention", "linear_attention": "full_attention"}
"""What a layer of attention is called beside layers that are none."""
_TOKEN = re.compile(r"(token|eos|bos|pad)(_id|_index)$")

COUNTS = (
    (r"vocab_size$|vocab_size_per_layer_input$", VOCABULARY),
    (r"(num|n)_(local_|routed_)?experts$|^moe_num_experts$", 4),
    (r"experts_per_tok(en)?$|^moe_(topk|k)$|^top_?k$", 2),
    (r"^topk_group$", 1),
    (r"(attn|expert)_layer_period$", LAYERS),
    (r"(attn|expert)_layer_offset$", LAYERS - 1),
    (r"^(n_group|num_expert_group)$", 2),
    (r"^(first_k_dense_replace|num_dense_layers|.*shared_layers|.*nextn_predict_layers)$", 0),
    (r"(max|original_max)_position_embeddings$|^(n_positions|n_ctx|max_seq_len|max_sequence_length)$", 128),
    (r"ngram_vocab_size_base$|hash_byte_group_vocab$", 512),
)
"""What the number of a configuration becomes at most, by its name: how many there are of something."""
HEAD_SIZES = (
    (r"qk_rope_head_dim$|rotary_dim$", 8),
    (r"qk_head_dim$", 24),
    (r"head_dim$|^d_kv$|^dim_head$|^d_head$|^kv_channels$|head_size$", 16),
    (r"lora_rank$", 16),
)
"""The same, for how large a head is."""
FIXED_SIZES = (
    (r"intermediate_(size|dim)$|ffn_dim$|^d_ff$|ffn_hidden_size$|mlp_dim$|inner(_dim)?$|feedforward_dim$", 128),
    (r"^dim_feedforward$|linear_units$|intermediate_size_mlp$", 128),
    (r"(image|crop|img)_size$", 32),
    (r"^patch_size$", 8),
    (r"max_source_positions$", 64),
    (r"state_size$|d_state$", 16),
    (r"n_groups$", 1),
)
"""The same, for how large something else is."""
OPEN = (
    (r"^n_shared_experts$", 1),
    (r"^pad_token_id$", 0),
    (r"^mask_token_id$", 4),
    (r"indexer_budget$", 16),
    (r"indexer_compress_ratio$", 4),
)
"""What a number becomes that the default leaves open, beside those of the other tables."""
_HEADS = r"(^|_)(n_)?heads?$"
_WIDTHS = (
    r"hidden_(size|dim)$|^d_model$|^n_embd$|(^|_)embed_dim$|emb(edding)?_(dim|size)$|^width$|hidden_channels$|"
    r"proj(ection)?(ector)?_(dim|size)$|embed_proj_dim$|classifier_proj_size$|^(dim|output_dim|project_dim)$|"
    r"(pooler_)?output_(size|channels)$|_hidden_size_\w+$"
)
Table = tuple[tuple[str, int], ...]


def candidates(config_class: Any, task: str = "") -> Iterator[dict[str, Any]]:
    """Configurations from the smallest to the one that differs least from the default; of decoders for `task` text."""
    defaults = config_class().to_dict()
    if task == "text" and "is_decoder" in defaults:
        defaults["is_decoder"] = True
    sizes = (*COUNTS, *HEAD_SIZES, *FIXED_SIZES)
    yield Shrink(sizes, heads=4, width=64).whole(defaults)
    # Heads as they are, for positions that come in sections of fixed size.
    yield Shrink((*COUNTS, *FIXED_SIZES), heads=2, width=256).whole(defaults)
    yield Shrink((*COUNTS, *FIXED_SIZES), heads=4, width=256).whole(defaults)
    yield Shrink((*sizes, *OPEN), heads=4, width=64, completes=True).whole(defaults)
    yield Shrink(COUNTS).whole(defaults)
    yield Shrink(()).whole(defaults)


def build(model_class: Any, config: Any) -> nn.Module:
    """The model in eval mode, its matrices normal, its vectors moved; raises ValueError where it is too large."""
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in model_class(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model: nn.Module = model_class._from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                fan_in = max(parameter.shape[1:]) if parameter.dim() == 3 else parameter[0].numel()
                nn.init.normal_(parameter, std=fan_in**-0.5)
            elif parameter.is_floating_point():
                parameter += 0.1 * torch.randn_like(parameter)
    return model


class Shrink:
    """`table`: for each pattern of names the largest number; `heads` and `width`: how many heads, how wide a stream.

    With `completes`, what the default leaves open is set, too: numbers, and a layer of attention.
    """

    def __init__(
        self, table: Table, heads: int | None = None, width: int | None = None, completes: bool = False
    ) -> None:
        self.completes = completes
        self.rules = [(re.compile(pattern), size) for pattern, size in table]
        if heads is not None and width is not None:
            self.rules += [(re.compile(_HEADS), heads), (re.compile(_WIDTHS), width)]
        self.counts, self.heads, self.width = bool(table), heads, width
        self.tokens: dict[str, int] = {}
        self.free = itertools.count(VOCABULARY - 40)

    def whole(self, values: dict[str, Any]) -> dict[str, Any]:
        """`values` with smaller numbers, its sub-configurations too."""
        counts = [v for k, v in values.items() if isinstance(v, int) and _LAYERS.search(k)]
        listed = {len(v) for v in values.values() if isinstance(v, list | tuple)}
        layers = max([count for count in counts if count in listed] or counts, default=0)
        # Nothing at all is what the default is made of, too.
        values = {key: value for key, value in values.items() if value != {}}
        if by_number := values.get("per_layer_config"):
            numbered = {int(number): one for number, one in by_number.items()}
            values["per_layer_config"] = [numbered.get(index) for index in range(layers)]
        kinds = [len(set(map(str, v))) for v in values.values() if _is_by_layer(v, layers)]
        # Kinds of layers in turn, as (recurrent, recurrent, attention).
        kinds += [len(v) for k, v in values.items() if k.endswith("_types") and isinstance(v, list | tuple)]
        depth = max([LAYERS, *(kind for kind in kinds if kind <= 4)])
        result = {key: self.one(key, value, layers, depth, values) for key, value in values.items()}
        if by_layer := result.get("per_layer_config"):
            result["per_layer_config"] = {str(index): self.whole(one) for index, one in enumerate(by_layer) if one}
        for expand, heads, size, width in _SCANS:
            if all(isinstance(result.get(name), int) for name in (expand, heads)) and size in result and self.width:
                result[size] = result[expand] * result["hidden_size"] // result[heads]
                if width in result:
                    result[width] = result[size] * result[heads]
        # Both say the same, by name and by number of a stage.
        return {
            key: value for key, value in result.items() if key not in ("out_features", "out_indices", "stage_names")
        }

    def one(self, key: str, value: Any, layers: int, depth: int, values: dict[str, Any]) -> Any:
        """One entry of `values`, which has so many `layers`, and is to have `depth`."""
        if isinstance(value, dict) and key not in ("id2label", "label2id"):
            return self.whole(value)
        if isinstance(value, (list, tuple)):
            return self.several(key, list(value), layers, depth)
        if value is None and self.completes:
            return self.completed(key, depth)
        if isinstance(value, bool) or not isinstance(value, int):
            return value
        if _TOKEN.search(key):
            return self.token(key, value) if self.counts else value
        for rule, size in self.rules:
            if rule.search(key):
                return self.key_heads(key, value, values) if "key_value_heads" in key else min(value, size)
        return depth if _LAYERS.search(key) and value > max(LAYERS, 4) else value

    def completed(self, key: str, depth: int) -> Any:
        """What stands for a None."""
        if key == "layer_types":
            return ["full_attention"] * depth
        if key == "attn_layer_indices":
            return [depth - 1]
        return next((size for rule, size in self.rules if rule.search(key)), None)

    def several(self, key: str, value: list[Any], layers: int, depth: int) -> list[Any]:
        """A list: by layer, of layers, of depths, or of sizes."""
        if _is_by_layer(value, layers):
            kinds = list({str(item): item for item in value}.values())
            if self.completes and len(kinds) == 1 and (attention := _ATTENTION.get(str(kinds[0]))):
                kinds.append(attention)
            return (kinds if len(kinds) <= depth else value)[:depth] + [value[-1]] * (depth - len(kinds))
        numbers = [item for item in value if isinstance(item, int) and not isinstance(item, bool)]
        if not numbers or len(numbers) != len(value):
            return value
        if _DEPTHS.search(key):
            return [min(item, 1 + (index == 0)) for index, item in enumerate(value)]
        if _INDICES.search(key) and layers > LAYERS and not _TOKEN.search(key):
            fewer = [item * depth // layers if item >= 0 else max(item, -depth) for item in value]
            # Of layers of a kind, so few that a layer of another kind is left where there was one.
            kept = max(1, depth * len(value) // layers) if re.search(r"(_layers|_layer_ids)$", key) else 0
            return list(dict.fromkeys(fewer))[-kept:] if kept else fewer
        if _TOKEN.search(key):
            return [self.token(key, item) for item in value] if self.counts else value
        if self.width is None:
            return value
        if re.search(r"image_size$|crop_size$", key):
            return [32] * len(value)
        if re.search(r"num_(attention_)?heads$", key):
            return [max(1, item // min(numbers)) for item in value]
        if re.search(r"mrope_section$", key):
            return [4, 2, 2] if len(value) == 3 and self.heads == 4 else value
        if re.search(r"(dims?|sizes|channels)(_per_stage)?$", key) and min(numbers) > 16:
            return [item * 16 // min(numbers) for item in value]
        return value

    def token(self, key: str, value: int) -> int:
        """A number below the vocabulary for a special token, the same wherever its name appears."""
        if value < VOCABULARY - 40:
            return value
        return self.tokens.setdefault(f"{key} {value}", min(next(self.free), VOCABULARY - 1))

    def key_heads(self, key: str, value: int, values: dict[str, Any]) -> int:
        """Heads of keys and values, fewer than those of queries where they were."""
        assert self.heads is not None
        queries = values.get(key.replace("key_value", "attention"), value)
        return self.heads if queries == value else 1 if value == 1 else max(1, self.heads // 2)


def _is_by_layer(value: Any, layers: int) -> bool:
    return isinstance(value, (list, tuple)) and layers > 4 and len(value) == layers
