"""Makes the configuration of any model of transformers tiny, by rules on the names of its fields."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

VOCABULARY = 128
HIDDEN = 64
HEADS = 4
HEAD_DIM = HIDDEN // HEADS
FFN = 128
PATCH = 8
IMAGE = 32
SPECIAL = 100
"""First of the token ids that stand for images, sounds and the like; the inputs hold smaller ones."""

RULES: tuple[tuple[str, int | None], ...] = (
    (r"kernel|stride|dilation|rope_theta|num_channels|ignore_index|num_labels|position_buckets", None),
    (r"vocab_size$|vocab_size_per_layer_input$|vocab_offset|num_(bpe|wordpiece)_labels", VOCABULARY),
    (r"^(n_group|topk_group|num_expert_group|num_groups_limit)$", 1),
    (r"(experts_per_tok(en)?|top_?k|topk_experts|num_selected_experts|moe_k)$", 2),
    (r"(^|_)(n|num)_(\w+_)?experts$|num_local_experts|moe_num_experts|zero_expert_num", 4),
    (r"n_shared_experts", 1),
    (r"(^|_)expand$", 1),
    (r"upsample_groups", HIDDEN),
    (r"num_groups", 4),
    (r"num_filters|base_channels|upsample_initial_channel", 16),
    (r"num_kv_shared_layers|first_k_dense_replace|num_dense_layers|max_window_layers|decoder_start_layer", 1),
    (r"num_nextn_predict_layers|num_mtp\w*layers", 0),
    (r"(^|_)(layers|n_layers?|depth|num_blocks|num_\w*layers)$", 2),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", HEAD_DIM // 2),
    (r"(head_dim|head_size|head_dims|d_kv|headdim|d_head|dim_head|dim_kv|attention_head_size)$", HEAD_DIM),
    (r"(heads|n_head|num_query_groups|num_\w*heads?)$", HEADS),
    (r"(lora_rank|time_step_rank|laurel_rank|adapter_rank)$", 16),
    (r"(ffn_dim|ffn|d_ff|d_inner|n_inner|mlp_dim|dim_feedforward|dim_ff)$", FFN),
    (r"(intermediate_size|feed_forward_size|ffn_hidden_size|mlp_hidden_size)$", FFN),
    (r"(intermediate_dim|linear_units|intermediate_size_mlp|expert_dim)$", FFN),
    (r"(max\w*position_embeddings|n_positions|max_seq_len|max_sequence_length)$", 64),
    (r"(max_length|n_ctx|max_\w+_positions|max_text_len)$", 64),
    (r"(source_length|target_length|context_length|seq_length)$", 64),
    (r"sliding_window(_size)?$|attention_window_size|local_attention$|attention_chunk_size", 8),
    (r"(image_size|img_size|input_size)$", IMAGE),
    (r"patch_size$", PATCH),
    (r"(d_model|n_embd|width|query_pre_attn_scalar)$", HIDDEN),
    (r"(_channels|_dim|_size|d_latents|^dim|hidden|inner)$", HIDDEN),
    (r"(num_queries|num_query_tokens|num_latents|num_negatives|n_latents)$", 16),
    (r"(codebook_size|num_codevectors_per_group)$", 16),
)
"""(pattern of a field's name, the largest value that it keeps); the first that matches holds, None keeps all."""
SIZE_LISTS = r"(hidden_sizes|embed_dims?|channels?|dims?|_sizes|features)(_per_stage|_list)?$"
COUNT_LISTS = r"depths|num_blocks|blocks_per_stage|block_repeats|layer_config|num_\w*layers"
STAGES = ("depths", "blocks_per_stage", "embed_dim_per_stage")
"""Fields of models whose width grows from stage to stage."""
TOKEN_ID = (
    r"(token|bos|eos|pad|boi|eoi|boa|eoa|start|end|newline|stream)\w*_(id|index)$"
    r"|_token_ids?$|^im_\w+_id$|image_patch_id"
)
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")
LAYER_LISTS = ("layer_types", "mlp_layer_types", "layers_block_type", "block_types", "indexer_types")
HEAD_COUNTS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
ALWAYS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
UNSET = {"vocab_size": VOCABULARY, "head_dim": HEAD_DIM, "num_key_value_heads": 2}
"""Values of fields that are None by default, where some models have no other."""
TIME_SERIES = {"prediction_length": 4, "context_length": 8}
OVERRIDES: dict[str, dict[str, Any]] = {
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "autoformer": TIME_SERIES,
    "informer": TIME_SERIES,
    "time_series_transformer": TIME_SERIES,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cpmant": {"dim_ff": FFN},
}
"""By model type, where rules on names are not enough."""


def tiny_model(name: str) -> PreTrainedModel:
    """A random model of this class of transformers, in eval mode."""
    torch.manual_seed(0)
    return model_class(name)(tiny_config_for(name)).eval()


def model_class(name: str) -> Any:
    return getattr(transformers, name)


def tiny_config_for(name: str) -> PreTrainedConfig:
    config_class = model_class(name).config_class
    return tiny_config(config_class(), OVERRIDES.get(config_class.model_type))


def tiny_config(config: PreTrainedConfig, overrides: Mapping[str, Any] | None = None) -> PreTrainedConfig:
    """A new configuration of the same class with small sizes; `overrides` are fields, dicts for sub-configurations."""
    return _tiny(config, overrides or {}, iter(range(SPECIAL, VOCABULARY)))


def _tiny(config: PreTrainedConfig, overrides: Mapping[str, Any], ids: Iterator[int]) -> PreTrainedConfig:
    values = {name: value for name, value in _fields(config).items() if not name.startswith("_")}
    layers = _layer_count(values)
    staged = any(isinstance(values.get(name), (list, tuple)) for name in STAGES)
    changed: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            changed[name] = _tiny(value, overrides.get(name, {}), ids)
        elif name in overrides:
            changed[name] = overrides[name]
        elif staged and type(value) is int and name in ("embed_dim", "hidden_size", "stem_hidden_channels"):
            changed[name] = 16
        else:
            small = _shrink(name, value, values, layers, ids)
            if small != vars(config).get(config.attribute_map.get(name, name)):
                changed[name] = small
    changed |= {name: value for name, value in overrides.items() if name not in values}
    if values.get("vocab_size") and values.get("pad_token_id") is None:
        changed.setdefault("pad_token_id", 0)  # classifiers look for the last token before the padding
    return type(config)(**changed)


def _fields(config: PreTrainedConfig) -> dict[str, Any]:
    """What may be given to the configuration's class; parts that it makes itself too."""
    common = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    names = [field.name for field in dataclasses.fields(config) if field.name not in common]
    own = vars(config)
    names += [name for name in own if isinstance(own[name], PreTrainedConfig)]
    values = {name: own.get(config.attribute_map.get(name, name)) for name in dict.fromkeys((*names, *ALWAYS))}
    return {name: UNSET.get(name) if value is None else value for name, value in values.items()}


def _layer_count(values: Mapping[str, Any]) -> int:
    """Two layers, or as many as there are kinds of them."""
    kinds = [len(dict.fromkeys(map(str, values[name]))) for name in LAYER_LISTS if isinstance(values.get(name), list)]
    return max([2, *kinds])


def _shrink(name: str, value: Any, values: Mapping[str, Any], layers: int, ids: Iterator[int]) -> Any:
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return _shrink_int(name, value, values, layers, ids)
    if isinstance(value, list) and (name in LAYER_LISTS or len(value) == _first(values, LAYER_COUNTS) != 2):
        return _pick(value, layers)
    if isinstance(value, (list, tuple)) and value and all(type(item) is int for item in value):
        return type(value)(_shrink_ints(name, [*value], ids))
    if isinstance(value, dict) and "mrope_section" in value:
        return value | {"mrope_section": _split(HEAD_DIM // 2, value["mrope_section"])}
    return value


def _shrink_int(name: str, value: int, values: Mapping[str, Any], layers: int, ids: Iterator[int]) -> int:
    if re.search(TOKEN_ID, name):
        return value if value < SPECIAL else next(ids)
    if re.search(r"key_value_heads|kv_heads|num_kv", name):
        return min(value, HEADS if value == _first(values, HEAD_COUNTS) else 2)
    if name in LAYER_COUNTS:
        return min(value, layers)
    limit = next((limit for pattern, limit in RULES if re.search(pattern, name)), None)
    return value if limit is None else min(value, limit)


def _shrink_ints(name: str, values: list[int], ids: Iterator[int]) -> list[int]:
    if re.search(TOKEN_ID, name):
        return [value if 0 <= value < SPECIAL else next(ids) for value in values]
    if name.endswith("mrope_section"):
        return _split(HEAD_DIM // 2, values)
    if re.search(COUNT_LISTS, name):
        return [min(value, 1) for value in values]
    if "heads" in name:
        return [min(value, 2) for value in values]
    if re.search(SIZE_LISTS, name) and not re.search("kernel|stride|dilation", name) and max(values) > HIDDEN:
        factor = 2 ** math.ceil(math.log2(max(values) / HIDDEN))
        return [max(value // factor, min(value, 8)) for value in values]
    return values


def _first(values: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((values[name] for name in names if name in values), None)


def _pick(value: list[Any], count: int) -> list[Any]:
    """One of each kind, in their order, then more of the last."""
    kinds = [*{str(item): item for item in value}.values()][:count]
    return kinds + [kinds[-1]] * (count - len(kinds))


def _split(total: int, parts: list[int]) -> list[int]:
    """Proportional whole numbers with that sum."""
    out = [max(1, part * total // sum(parts)) for part in parts]
    out[0] += total - sum(out)
    return out
