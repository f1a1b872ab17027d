"""Reduce the vocabulary of a model: rows of its embeddings, of what is tied to them, and the tokenizer's tokens."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..layers import FusedEmbeddings
from ..models import is_transformers_model
from ..models.structure import own_config_
from ..report import is_masked
from .checks import check_numbers
from .tokenizer import needed_tokens, reduce_tokenizer

GONE = -1


@dataclass(frozen=True)
class Vocabulary:
    """What `reduce_vocabulary_` left.

    kept        (new size,) int64: the old id of each token, rising
    new_ids     (old size,) int64: the new id of each token, GONE where it has none
    tokenizer   for the new ids, None if none was given
    """

    kept: Tensor
    new_ids: Tensor
    tokenizer: Any = None

    def renumber(self, ids: Tensor, gone: int | None = None) -> Tensor:
        """Old ids -> new ids, of any shape; `gone` is a new id in place of tokens that went.

        Raises ValueError for such a token if `gone` is None.
        """
        new = self.new_ids.to(ids.device)[ids]
        if gone is None and bool((new == GONE).any()):
            raise ValueError(f"renumber: expected ids of tokens that were kept, got {int(ids[new == GONE][0])}")
        return new if gone is None else new.masked_fill(new == GONE, gone)


def reduce_vocabulary_(
    model: nn.Module, kept: Iterable[int], tokenizer: Any = None, embedding: str | None = None
) -> Vocabulary:
    """Keep the embeddings of some tokens alone, in place; their order stays, so ids close ranks.

    kept        ids of the tokens to keep, in any order. The special tokens of configuration and tokenizer stay too, and
                what a tokenizer needs to make the kept ones (the parts of a BPE token, bytes)
    tokenizer   a transformers tokenizer backed by the tokenizers library; it is not modified, the result has its own.
                Texts whose tokens all stay are split as before, others into smaller tokens or the unknown one
    embedding   for a plain module: the name of its nn.Embedding. For a transformers model None: input and output
                embeddings and their bias, tied or not
    returns     old and new ids, and the tokenizer for the new ones

    The scores of tokens that stay are what they were; the configuration (and generation's) gets the new size and ids.
    The embeddings become new Parameters, tied as they were: make the optimizer afterwards.

    Raises ValueError, with the model untouched, for an id out of range or named twice, what is no id, no id at all, an
    embedding that is masked or not an nn.Embedding, one with a padding token whose id the positions depend on and that
    would change (RoBERTa: keep the tokens before it), a tokenizer of another kind or with more tokens than the model,
    and a fused model.
    """
    what = "reduce_vocabulary_"
    table = _table(what, model, embedding)
    host: Any = model if is_transformers_model(model) and embedding is None else None
    old_size = table.num_embeddings
    chosen = [_id(what, i) for i in kept]
    if not chosen:
        raise ValueError(f"{what}: expected at least one token to keep, got none")
    check_numbers(what, "ids to keep", chosen, old_size)
    stay = {*chosen, *(i for _, _, ids in _special_ids(host) for i in ids if i < old_size)}
    if table.padding_idx is not None:
        stay.add(table.padding_idx)
    if tokenizer is not None:
        if len(tokenizer) > old_size:
            raise ValueError(f"{what}: expected a tokenizer of at most {old_size} tokens, got {len(tokenizer)}")
        stay = needed_tokens(tokenizer, stay)
    kept_ids = torch.tensor(sorted(stay))
    new_ids = torch.full((old_size,), GONE)
    new_ids[kept_ids] = torch.arange(kept_ids.numel())
    _check_padding(what, model, table, new_ids)
    smaller = None if tokenizer is None else reduce_tokenizer(tokenizer, new_ids.tolist())

    _select_rows_(model, table, host, kept_ids)
    for module in model.modules():
        if getattr(module, "vocab_size", None) == old_size:
            module.vocab_size = kept_ids.numel()  # type: ignore[assignment]
        if table.padding_idx is not None and getattr(module, "padding_idx", None) == table.padding_idx:
            module.padding_idx = int(new_ids[table.padding_idx])  # type: ignore[assignment]
    if host is not None:
        own_config_(host)
        for config, name, ids in [*_special_ids(host)]:
            new = [int(new_ids[i]) if i < old_size else i for i in ids]
            setattr(config, name, new if isinstance(getattr(config, name), list) else new[0])
        host.config.vocab_size = kept_ids.numel()
    return Vocabulary(kept_ids, new_ids, smaller)


def _id(what: str, value: Any) -> int:
    try:
        return operator.index(value)
    except TypeError:
        raise ValueError(
            f"{what}: expected ids of tokens, got {type(value).__name__}; a tokenizer tells those of texts"
        ) from None


def _table(what: str, model: Any, name: str | None) -> nn.Embedding:
    """The embedding of tokens."""
    if any(isinstance(module, FusedEmbeddings) or "forward" in vars(module) for module in model.modules()):
        raise ValueError(f"{what}: expected a model that is not fused; call unfuse_encoders_ or unfuse_decoder_ first")
    if name is None and not is_transformers_model(model):
        raise ValueError(f"{what}: expected embedding=<name> for a {type(model).__name__}, got None")
    table = model.get_input_embeddings() if name is None else model.get_submodule(name)
    if is_masked(table):
        raise ValueError(f"{what}: expected masks burned in, got a mask on the embedding")
    if type(table) is not nn.Embedding:
        raise ValueError(f"{what}: expected an nn.Embedding of tokens, got {type(table).__name__}")
    return table


def _special_ids(host: Any) -> Iterator[tuple[Any, str, list[int]]]:
    """(configuration, field, ids) of every field that names tokens."""
    configs = [] if host is None else [host.config, getattr(host, "generation_config", None)]
    for config in configs:
        for name in config.to_dict() if config is not None else ():
            value = getattr(config, name, None) if name.endswith("_token_id") else None
            ids: list[Any] = value if isinstance(value, list) else [value]
            if all(isinstance(i, int) and i >= 0 for i in ids):
                yield config, name, ids


def _check_padding(what: str, model: nn.Module, table: nn.Embedding, new_ids: Tensor) -> None:
    """Raise ValueError if positions are counted from the padding token's id and it changes."""
    padding = table.padding_idx
    if padding is None or int(new_ids[padding]) == padding:
        return
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and module is not table and module.padding_idx == padding:
            raise ValueError(
                f"{what}: expected all ids below the padding token's, {padding}, to be kept, since {name} counts "
                f"from it, got {int(new_ids[padding])} of them"
            )


@torch.no_grad()
def _select_rows_(model: Any, table: nn.Embedding, host: Any, kept: Tensor) -> None:
    """Reduce the embedding and what scores its tokens to these rows, wherever their Parameters hang."""
    heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.weight is table.weight]
    output = None if host is None else host.get_output_embeddings()
    if isinstance(output, nn.Linear) and output.out_features == table.num_embeddings and output not in heads:
        heads.append(output)
    parents = [m for m in model.modules() if any(child in heads for child in m.children())]  # some keep the bias
    biases = [getattr(m, "bias", None) for m in (*heads, *parents)]
    old = [table.weight, *(head.weight for head in heads)]
    old += [bias for bias in biases if isinstance(bias, nn.Parameter) and len(bias) == table.num_embeddings]
    new = {id(p): nn.Parameter(p.detach()[kept.to(p.device)], p.requires_grad) for p in old}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if id(parameter) in new:
                setattr(module, name, new[id(parameter)])
    table.num_embeddings = kept.numel()
    for head in heads:
        head.out_features = kept.numel()
