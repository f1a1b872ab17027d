"""Block-sparse attention for transformers models, through transformers' own AttentionInterface.

transformers is imported when a model is given, as this file is part of `import sparsenlp`.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..formats import BlockMask, MaskRule
from ..layers import SparseEncoder
from ..layers.attention import MaskOf
from ..ops.block_sparse_attention import block_sparse_attention
from . import has_fused_decoder, is_transformers_model
from .families import BLOCK_SPARSE

CONFIG_FIELD = "block_sparse_attention"
"""Of config.json: the numbers of a MaskRule."""
CHANGES = ("position_bias", "s_aux", "softcap", "sliding_window", "head_mask")
"""Arguments by which a model changes scores or the keys that are attended to."""


def use_block_sparse_attention_(model: Any, mask_of: MaskRule | MaskOf | BlockMask) -> Any:
    """Give a transformers encoder or decoder attention that computes only the blocks of a mask, on this instance only.

    model    its attention goes through transformers' AttentionInterface, and all of it is self-attention: BERT,
             RoBERTa, Llama, GPT-2, ...
    mask_of  a MaskRule, such as MaskRule(window=128, global_tokens=1); a function (number of queries, number of keys)
             -> BlockMask; or one BlockMask, for sequences of its length. Decoders stay causal, whatever it says.
             Masks of the last lengths are kept
    returns  `model`

    Everything else stays: weights, padding from attention_mask, grouped heads, training, `generate` with its cache. A
    query without any key, such as padding on the left, gives zeros. Attention probabilities are not returned, and not
    dropped in training, of which a warning tells. A MaskRule is saved in the config, and `sparsenlp.from_pretrained`
    takes it up; plain transformers attends densely until this is called again.

    Raises TypeError for anything but a transformers model, ValueError where attention cannot be replaced; the model is
    then as it was. What only a forward pass can tell (a mask of four dimensions, a static cache, packed sequences)
    raises ValueError there.
    """
    if not is_transformers_model(model):
        raise TypeError(f"use_block_sparse_attention_: expected a transformers model, got {type(model).__name__}")
    if reason := _why_not(model):
        raise ValueError(f"use_block_sparse_attention_: expected {reason} in {type(model).__name__}")
    from transformers import AttentionInterface, AttentionMaskInterface

    from .hf_saving import give_own_config

    AttentionInterface.register(BLOCK_SPARSE, _attend)
    AttentionMaskInterface.register(BLOCK_SPARSE, _padding)
    give_own_config(model)
    model.set_attn_implementation(BLOCK_SPARSE)
    vars(model.config).pop(CONFIG_FIELD, None)
    if isinstance(mask_of, MaskRule):
        setattr(model.config, CONFIG_FIELD, asdict(mask_of))
    for module in _readers(model):
        vars(module)["mask_of"] = mask_of
    return model


def use_dense_attention_(model: Any) -> Any:
    """Undo `use_block_sparse_attention_`: torch's attention, or transformers' where that is not possible."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != BLOCK_SPARSE:
        raise ValueError(f"use_dense_attention_: expected block-sparse attention in {type(model).__name__}, got none")
    model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    vars(model.config).pop(CONFIG_FIELD, None)
    for module in _readers(model):
        vars(module).pop("mask_of", None)
    return model


def restore_(model: Any) -> None:
    """Attend as the config says that `model` was loaded with. Raises ValueError for a field that is no MaskRule."""
    fields = getattr(model.config, CONFIG_FIELD, None)
    if fields is None:
        return
    try:
        rule = MaskRule(**fields)
    except TypeError:
        raise ValueError(f"{CONFIG_FIELD}: expected the fields of a MaskRule, got {fields!r}") from None
    use_block_sparse_attention_(model, rule)


def _readers(model: nn.Module) -> list[Any]:
    """The modules that read the config, attention among them."""
    return [module for module in model.modules() if getattr(module, "config", None) is not None]


def _why_not(model: Any) -> str:
    """What a model lacks, as "..., got ...", or nothing."""
    config, parts = model.config, [*model.modules()]
    if any(isinstance(part, SparseEncoder) for part in parts) or has_fused_decoder(model):
        return "layers that are not fused, got fused ones"
    if not all(part._can_set_attn_implementation() for part in parts if is_transformers_model(part)):
        return "attention that can be replaced, got a forward of its own"
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        return "self-attention alone, got cross-attention"
    if config.sub_configs:
        return f"one stack of layers, got several: {', '.join(config.sub_configs)}"
    if any(name.endswith("relative_attention_bias") for name, _ in model.named_modules()):
        return "scores without a position bias, got one"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "plain scores, got attn_logit_softcapping"
    kinds = {*(getattr(config, "layer_types", None) or ["full_attention"])}
    if kinds != {"full_attention"}:
        return f"full attention in all layers, got {', '.join(sorted(kinds))}"
    if getattr(config, "sliding_window", None) is not None:
        return f"full attention (sliding_window=None), got sliding_window={config.sliding_window}"
    return ""


def _padding(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor | None:
    """In place of a mask of queries and keys: which keys are no padding, (B, keys) bool, or None for all of them."""
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function

    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError("block_sparse_attention: expected one sequence in a row, and no mask beside the block mask")
    if isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length:
        raise ValueError("block_sparse_attention: expected a dynamic cache, got one with room for keys to come")
    if attention_mask is None or bool(attention_mask.all()):
        return None
    return attention_mask[:, -kv_length:]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Of query (B, H, Lq, D), key and value (B, Hkv, Lk, D), and what `_padding` gave: (B, Lq, H, D)."""
    for name in CHANGES:
        if kwargs.get(name) is not None:
            raise ValueError(f"block_sparse_attention: expected no {name}, got one from {type(module).__name__}")
    if attention_mask is not None and attention_mask.dim() != 2:
        shape = tuple(attention_mask.shape)
        raise ValueError(f"block_sparse_attention: expected an attention_mask (batch, keys), got shape {shape}")
    if dropout:
        warnings.warn("block-sparse attention drops no probabilities in training", stacklevel=2)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    mask = _mask(module.mask_of, query.shape[2], key.shape[2], causal, query.device)
    y = block_sparse_attention(query, key, value, mask, attention_mask, scaling)
    assert isinstance(y, Tensor)  # no log-sum-exp was asked for
    return y.transpose(1, 2).contiguous(), None


@lru_cache(maxsize=16)
def _mask(mask_of: Any, queries: int, keys: int, causal: bool, device: torch.device) -> BlockMask:
    if isinstance(mask_of, MaskRule):
        mask = (replace(mask_of, causal=True) if causal else mask_of)(queries, keys)
    else:
        mask = mask_of if isinstance(mask_of, BlockMask) else mask_of(queries, keys)
        if tuple(mask.shape) != (queries, keys):
            raise ValueError(
                f"block_sparse_attention: expected a mask of {queries} queries x {keys} keys, got {mask.shape}"
            )
        if causal:
            mask = mask & BlockMask.causal(queries, keys, mask.block)
    return mask.to(device)
