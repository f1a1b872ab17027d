"""Layers of nn.LSTM or nn.GRU, each a module of its own, and their states as generate() can reorder them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

States = tuple[Tensor, ...]
"""One (B, F) for each state of each layer: h of a GRU, h and c of an LSTM; both directions side by side."""

CELLS: dict[str, tuple[type[nn.LSTM] | type[nn.GRU], int]] = {"gru": (nn.GRU, 1), "lstm": (nn.LSTM, 2)}
"""Name -> (torch's layer, states of one)."""


class RecurrentStack(nn.Module):
    """`num_layers` layers from `input_size` to `hidden_size` features; with two directions each has half of them.

    Layers are not one nn.LSTM, so that what lies between them can be distilled and pooled. Dropout comes before each
    and after the last. Raises ValueError for an unknown cell, or an odd hidden_size in two directions.
    """

    def __init__(
        self,
        cell: str,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        dropout: float = 0.0,
        bidirectional: bool = False,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"cell: expected one of {', '.join(CELLS)}, got {cell}")
        directions = 2 if bidirectional else 1
        if hidden_size % directions:
            raise ValueError(f"hidden_size: expected an even number for two directions, got {hidden_size}")
        kind, self.states_per_layer = CELLS[cell]
        self.directions = directions
        sizes = [input_size] + [hidden_size] * (num_layers - 1)
        self.layers = nn.ModuleList(
            kind(size, hidden_size // directions, batch_first=True, bidirectional=bidirectional) for size in sizes
        )
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, x: Tensor, lengths: Tensor | None = None, states: States | None = None
    ) -> tuple[list[Tensor], States]:
        """(the outputs (B, T, hidden_size) of each layer, the states after the last step of each sequence).

        x        (B, T, input_size)
        lengths  (B,) int64 on the CPU where sequences end before T; outputs are 0 behind
        states   to begin with; None for zeros
        """
        outputs, after = [], []
        x = self.dropout(x)
        per_layer = self.states_per_layer
        for i, layer in enumerate(self.layers):
            before = None if states is None else self._to_layer(states[i * per_layer : (i + 1) * per_layer])
            if lengths is None:
                x, last = layer(x, before)
            else:
                packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
                packed, last = layer(packed, before)
                x, _ = pad_packed_sequence(packed, batch_first=True, total_length=x.shape[1])
            x = self.dropout(x)
            outputs.append(x)
            after += [state.transpose(0, 1).flatten(1) for state in (last if per_layer > 1 else (last,))]
        return outputs, tuple(after)

    def _to_layer(self, states: States) -> Any:
        split = tuple(state.unflatten(1, (self.directions, -1)).transpose(0, 1).contiguous() for state in states)
        return split if self.states_per_layer > 1 else split[0]


def sequence_lengths(attention_mask: Tensor | None) -> Tensor | None:
    """(B,) int64 on the CPU from a mask (B, T) of 1 and, behind, 0; None where nothing is padded.

    Raises ValueError for padding on the left or in between, and for a row of padding alone.
    """
    if attention_mask is None or bool(attention_mask.all()):
        return None
    mask = attention_mask.bool()
    if not bool(mask[:, 0].all()) or bool((mask[:, 1:] & ~mask[:, :-1]).any()):
        raise ValueError("attention_mask: expected padding on the right of at least one token, got another mask")
    return mask.sum(dim=1).cpu()


def reordered(states: States, order: Tensor) -> States:
    """The states of these sequences (B',), as beam search keeps some, and some twice."""
    return tuple(state.index_select(0, order.to(state.device)) for state in states)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy (nats) of labels (B, T), -100 left out, under logits (B, T, V); 0-d."""
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), labels.to(logits.device).flatten())


def check_tokens(name: str, ids: Tensor) -> None:
    """Raise ValueError unless ids are (B, T) with at least one token."""
    if ids.dim() != 2 or not ids.shape[0] or not ids.shape[1]:
        raise ValueError(f"{name}: expected ids (B, T) of at least one token, got shape {tuple(ids.shape)}")
