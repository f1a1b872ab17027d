"""Distillation of how tokens relate inside the last self-attention, after MiniLM."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .distributed import ALONE, Processes

PROJECTIONS = (
    frozenset({"query", "q_proj", "q_lin", "query_proj", "q"}),
    frozenset({"key", "k_proj", "k_lin", "key_proj", "k"}),
    frozenset({"value", "v_proj", "v_lin", "value_proj", "v"}),
)
"""What transformers call the linear layers of queries, keys and values."""

RELATIONS = {"attention": (0, 1), "queries": (0, 0), "keys": (1, 1), "values": (2, 2)}
"""Which two of (queries, keys, values) are compared with each other."""


def last_projections(model: nn.Module) -> list[nn.Module]:
    """The modules that make queries, keys and values of the last layer. Raises ValueError for a model without them."""
    found: list[list[nn.Module]] = [[], [], []]
    for name, module in model.named_modules():
        for kind, names in zip(found, PROJECTIONS, strict=True):
            if name.rpartition(".")[2] in names:
                kind.append(module)
    if not all(found):
        raise ValueError(
            "relations: expected a model with separate projections of queries, keys and values, "
            f"got none in {type(model).__name__}"
        )
    return [kind[-1] for kind in found]


@contextmanager
def recorded(modules: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Within the `with` block a forward pass fills the yielded list with the outputs of `modules`, in their order."""
    outputs: list[Tensor] = [torch.empty(0)] * len(modules)

    def keep(index: int) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            outputs[index] = output

        return hook

    handles = [module.register_forward_hook(keep(index)) for index, module in enumerate(modules)]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def relation_loss(
    projections: Sequence[Tensor],
    teacher: Sequence[Tensor],
    attention_mask: Tensor,
    relations: Sequence[str],
    heads: int,
    processes: Processes = ALONE,
) -> Tensor:
    """KL(teacher || student) of the relations between tokens, averaged over heads, tokens and relations.

    projections, teacher   queries, keys and values, each (B, L, heads * d); widths d may differ between
                           the two models
    attention_mask         (B, L), 0 at padding
    relations              of RELATIONS: "attention" and "values" are those of MiniLM (Wang et al. 2020,
                           arXiv:2002.10957), "queries", "keys" and "values" those of MiniLMv2 (Wang et
                           al. 2021, arXiv:2012.15828)
    heads                  relations per token; need not be the models' attention heads
    processes              that have a part of the batch each

    A relation is the softmax over tokens of their scaled dot products; positions that are rotated into
    queries and keys later are not in it. Raises ValueError if `heads` does not divide a width.
    """
    mask = attention_mask.bool()
    ours, theirs = _split_heads(projections, heads), _split_heads(teacher, heads)
    losses = []
    for first, second in (RELATIONS[name] for name in relations):
        student = _relation(ours[first], ours[second], mask)
        target = _relation(theirs[first], theirs[second], mask)
        divergence = F.kl_div(student, target, reduction="none", log_target=True).masked_fill(~mask[:, None, None], 0)
        losses.append((divergence.sum(dim=-1) * mask[:, None]).sum() / heads)
    return torch.stack(losses).mean() / processes.normalizer(mask.sum().float(), len(mask))


def _split_heads(projections: Sequence[Tensor], heads: int) -> list[Tensor]:
    """(B, L, heads * d) -> (B, heads, L, d), float32."""
    for tensor in projections:
        if tensor.shape[-1] % heads:
            raise ValueError(f"relation_loss: expected widths divisible by {heads} heads, got {tensor.shape[-1]}")
    return [tensor.float().unflatten(-1, (heads, -1)).transpose(1, 2) for tensor in projections]


def _relation(first: Tensor, second: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities (B, heads, L, L) over the last dimension; at padding they are finite and mean nothing."""
    scores = first @ second.transpose(-1, -2) / math.sqrt(first.shape[-1])
    return scores.masked_fill(~mask[:, None, None], torch.finfo(scores.dtype).min).log_softmax(dim=-1)
