"""The embeddings of an encoder as one op."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .. import native
from ..ops.bsr_linear import NATIVE_DTYPES
from ..ops.embed_layer_norm import call

TABLES = ("word_embeddings", "position_embeddings", "token_type_embeddings")


class FusedEmbeddings(nn.Module):
    """Takes the place of an embeddings module of transformers, and of its arguments and results.

    original     has the tables word_embeddings, position_embeddings and maybe token_type_embeddings, then LayerNorm
                 and dropout
    padding_idx  None: positions are 0, 1, ...; else they are counted as in RoBERTa, see `embed_layer_norm`

    It shares the state of `original`: whatever happens to the tables of one (moved, resized, loaded, hooked) happens
    to the other, and the names in a state dict stay. The op runs in inference, on CPU tensors of float32 or
    bfloat16; whatever is more than that (gradients, dropout, inputs_embeds, hooks on a table, autocast, tables
    that are no plain nn.Embedding any more) runs the forward of `original`. The result is the same to rounding: the
    op keeps sums in float32, and says which id is outside of which table.

    Raises ValueError if `original` lacks a module that it should have.
    """

    original: nn.Module
    counted_from: int | None
    arguments: tuple[str, ...]

    def __init__(self, original: nn.Module, padding_idx: int | None = None) -> None:
        super().__init__()
        for name in ("word_embeddings", "position_embeddings", "LayerNorm", "dropout"):
            if name not in original._modules:
                raise ValueError(f"FusedEmbeddings: expected {name} in {type(original).__name__}, got none")
        self.__dict__.update(original.__dict__)
        self.__dict__["original"] = original  # no submodule: its state is this module's own
        self.counted_from = padding_idx
        self.arguments = tuple(inspect.signature(original.forward).parameters)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given: dict[str, Any] = dict(zip(self.arguments, args, strict=False), **kwargs)
        ids: Any = given.get("input_ids")
        position_ids, token_type_ids = given.get("position_ids"), given.get("token_type_ids")
        tensors = _plain_tensors(self._modules)
        if (
            tensors is None
            or torch.is_grad_enabled()
            or not _is_batch(ids, ids)
            or not (position_ids is None or _is_batch(position_ids, ids))
            or not (token_type_ids is None or _is_batch(token_type_ids, ids))
            or given.get("inputs_embeds") is not None
            or given.get("past_key_values_length")
            or _has_any_global_hook()
            or torch.is_autocast_enabled("cpu")
        ):
            return self.original.forward(*args, **kwargs)
        word, position, token_type, weight, bias = tensors
        if token_type is None:
            token_type_ids = None
        counted_from = self.counted_from if position_ids is None else None
        norm: Any = self._modules["LayerNorm"]
        return call(ids, word, position, token_type, position_ids, token_type_ids, weight, bias, norm.eps, counted_from)


def _is_batch(indices: Any, ids: Any) -> bool:
    """Whether `indices` are plain int64 tensors (B, S) or (1, S) on the CPU, for ids (B, S)."""
    return (
        type(indices) is Tensor
        and indices.dtype == torch.int64
        and indices.is_cpu
        and indices.dim() == 2
        and (indices.shape == ids.shape or indices.shape == (1, ids.shape[1]))
    )


def _plain_tensors(modules: dict[str, Any]) -> list[Any] | None:
    """Tables, weight and bias, where the op computes what these modules would; else None.

    Every call asks, so tensors are taken from their dicts: nn.Module.__getattr__ costs as much as a small kernel.
    """
    norm, dropout = modules["LayerNorm"], modules["dropout"]
    if type(norm) is not nn.LayerNorm or type(dropout) is not nn.Dropout or (dropout.training and dropout.p):
        return None
    if not native.available or _has_hooks(norm) or _has_hooks(dropout):
        return None
    tensors: list[Any] = []
    for name in TABLES:
        table = modules.get(name)
        if table is None and name == "token_type_embeddings":
            tensors.append(None)
            continue
        if type(table) is not nn.Embedding or table.max_norm is not None or _has_hooks(table):
            return None
        tensors.append(table._parameters["weight"])
    tensors += [norm._parameters["weight"], norm._parameters["bias"]]
    weight = tensors[-2]
    if weight is None or weight.dtype not in NATIVE_DTYPES:
        return None
    for t in tensors:
        if t is not None and (t.dtype != weight.dtype or not t.is_cpu):
            return None
    return tensors


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` does more, or something else, than its class says."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
