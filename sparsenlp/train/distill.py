"""Distillation: the dense model's outputs, cached or computed as needed, and the losses against them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import TokenizedDataset, sorted_batches
from .distributed import ALONE, Processes, current_processes
from .forward import evaluating, forward
from .progress import progress_bar
from .relations import last_projections, recorded

GIB = 2**30


class Teacher(Protocol):
    """Source of the dense model's outputs for examples of one data set."""

    def outputs(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """Logits (B, classes), and states (B, L, H).

        The states are, where wanted, the hidden states of each layer, embeddings left out, and then
        the queries, keys and values of the last layer.
        """


class LiveTeacher:
    """Runs the dense model for each batch."""

    def __init__(
        self, model: nn.Module, data: TokenizedDataset, hidden: bool, bf16: bool = True, relations: bool = False
    ) -> None:
        self.model, self.data, self.hidden, self.bf16 = model, data, hidden, bf16
        self.projections = last_projections(model) if relations else []

    @torch.no_grad()
    def outputs(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        inputs = self.data.batch(indices)
        with evaluating(self.model), recorded(self.projections) as projected:
            output = forward(self.model, inputs, self.hidden, self.bf16)
        if self.hidden:
            states, tokens = output.hidden_states, inputs["input_ids"].shape[1]
            if states is None or any(state.shape[1] != tokens for state in states):
                returned = "no hidden states" if states is None else "hidden states that are not one per token"
                raise ValueError(f"hidden_weight: expected 0 for {type(self.model).__name__}, which returns {returned}")
        return output.logits.float(), [*(output.hidden_states[1:] if self.hidden else ()), *projected]


class CachedTeacher:
    """The dense model's outputs over a data set, computed once; states are kept in bfloat16.

    In a process group all processes create it, each computes a share, and all get the whole.

    logits       (examples, classes) float32
    states       (tokens, H) bfloat16 each, as Teacher.outputs gives them, the examples one after another
                 without padding
    fingerprint  of the data set
    relations    whether the last three states are queries, keys and values
    """

    def __init__(
        self,
        model: nn.Module,
        data: TokenizedDataset,
        hidden: bool = True,
        bf16: bool = True,
        quiet: bool = False,
        relations: bool = False,
    ) -> None:
        self.fingerprint = data.fingerprint()
        self.relations = relations
        self.lengths = torch.tensor(data.lengths)
        self.offsets = self.lengths.cumsum(0) - self.lengths
        tokens = int(self.lengths.sum())
        live = LiveTeacher(model, data, hidden, bf16, relations)
        logits, states = live.outputs([0])
        self.logits = logits.new_zeros(len(data), logits.shape[-1])
        self.states = [s.new_zeros(tokens, s.shape[-1], dtype=torch.bfloat16) for s in states]
        processes = current_processes()
        batches = sorted_batches(data.lengths, batch_size=64)[processes.rank :: processes.count]
        with progress_bar("Teacher", len(batches), quiet=quiet or processes.rank > 0) as advance:
            for indices in batches:
                logits, states = live.outputs(indices)
                self.logits[indices] = logits
                rows, inside = self._rows(indices)
                for cache, state in zip(self.states, states, strict=True):
                    cache[rows[inside]] = state[inside].to(torch.bfloat16)
                advance("")
        processes.sum_([self.logits])
        processes.sum_(self.states)

    def outputs(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        """As Teacher.outputs; padding positions hold another token's state."""
        rows, _ = self._rows(indices)
        return self.logits[list(indices)], [
            cache.index_select(0, rows.flatten().to(cache.device)).unflatten(0, rows.shape) for cache in self.states
        ]

    def _rows(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Row of `states` for each position of a padded batch (B, L), and which positions are no padding."""
        chosen = torch.tensor(list(indices))
        lengths = self.lengths[chosen][:, None]
        position = torch.arange(int(lengths.max()))
        return self.offsets[chosen][:, None] + position.minimum(lengths - 1), position < lengths


def make_teacher(
    model: nn.Module,
    data: TokenizedDataset,
    hidden: bool,
    cache_gib: float,
    bf16: bool = True,
    quiet: bool = False,
    relations: bool = False,
) -> Teacher:
    """A CachedTeacher if its states fit in `cache_gib` GiB, else a LiveTeacher."""
    live = LiveTeacher(model, data, hidden, bf16, relations)
    _, states = live.outputs([0])
    needed = sum(data.lengths) * sum(state.shape[-1] for state in states) * torch.bfloat16.itemsize
    if needed > cache_gib * GIB:
        return live
    return CachedTeacher(model, data, hidden, bf16, quiet, relations)


def soft_target_loss(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher || student) at a temperature, averaged over the batch; Hinton et al. 2015, arXiv:1503.02531.

    Both (B, classes). Its gradient shrinks with the square of the temperature; the caller's weight makes up for it.
    """
    return F.kl_div(
        (logits / temperature).log_softmax(dim=-1), (teacher / temperature).softmax(dim=-1), reduction="batchmean"
    )


def hidden_state_loss(
    states: Sequence[Tensor], teacher: Sequence[Tensor], attention_mask: Tensor, processes: Processes = ALONE
) -> Tensor:
    """Squared error over the teacher's square, per layer, averaged over layers; padding left out.

    states, teacher   one (B, L, H) per layer
    attention_mask    (B, L), 0 at padding
    processes         that have a part of the batch each

    Dividing per layer keeps one with large activations from drowning the others (as in Jiao et al.
    2020, arXiv:1909.10351, where layers are matched one by one). Raises ValueError if shapes differ.
    """
    shapes = [tuple(state.shape) for state in states], [tuple(state.shape) for state in teacher]
    if shapes[0] != shapes[1]:
        raise ValueError(f"hidden_state_loss: expected states like the teacher's {shapes[1]}, got {shapes[0]}")
    weight = attention_mask[..., None].float()
    errors, squares = [], []
    for state, target in zip(states, teacher, strict=True):
        target = target.float()
        errors.append(((state.float() - target).square() * weight).sum())
        squares.append((target.square() * weight).sum())
    return (torch.stack(errors) / processes.normalizer(torch.stack(squares), len(attention_mask))).mean()
