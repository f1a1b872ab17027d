"""A bidirectional LSTM or GRU over word vectors, pooled over the text, and a linear classifier."""

from typing import Any, Literal

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from transformers.modeling_outputs import SequenceClassifierOutput

from .words import WordConfig, WordModel, classes_of, gather_tokens, scatter_tokens, token_mask

CELLS = {"lstm": nn.LSTM, "gru": nn.GRU}


@strict
class BiRnnConfig(WordConfig):
    """cell, hidden_size, num_hidden_layers, bidirectional   of the recurrent layer; hidden_size of each direction
    pooling   "max" or "mean" over the words (Conneau et al. 2017, arXiv:1705.02364), "last": the final states, or
              "attention": a mean with learned weights (Lin et al. 2017, arXiv:1703.03130, with one hop)
    """

    model_type = "birnn"

    cell: Literal["lstm", "gru"] = "lstm"
    hidden_size: int = 128
    num_hidden_layers: int = 1
    bidirectional: bool = True
    pooling: Literal["max", "mean", "last", "attention"] = "max"

    @property
    def state_size(self) -> int:
        """Of both directions together."""
        return self.hidden_size * (2 if self.bidirectional else 1)


class TextEncoder(nn.Module):
    """Word vectors -> a state for each word and a vector for the text."""

    def __init__(self, config: BiRnnConfig) -> None:
        super().__init__()
        self.config = config
        self.rnn = CELLS[config.cell](
            config.embedding_size,
            config.hidden_size,
            config.num_hidden_layers,
            batch_first=True,
            dropout=config.dropout if config.num_hidden_layers > 1 else 0.0,
            bidirectional=config.bidirectional,
        )
        if config.pooling == "attention":
            size = config.hidden_size
            self.pooler = nn.Sequential(nn.Linear(config.state_size, size), nn.Tanh(), nn.Linear(size, 1, bias=False))

    def forward(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """(vectors (B, state_size), states (B, L, state_size)).

        words  (B, L, embedding_size)
        mask   (B, L) bool, True for tokens, which may be anywhere; at others states are zero, and of a text without
               tokens the vector
        """
        if bool(mask.all()):
            states, last = self._run(words, None)
        else:
            front, inside = gather_tokens(words, mask)
            packed, last = self._run(front, inside.sum(dim=1))
            states = scatter_tokens(packed, inside, mask)
        return self._pool(states, mask[..., None], last), states

    def _run(self, words: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        """(states, final states (layers * directions, B, hidden_size)) of texts that begin at the first position."""
        if lengths is None:
            states, final = self.rnn(words)
        else:  # a text without words counts as one that is masked later: none of length 0 can be packed
            packed = pack_padded_sequence(words, lengths.clamp(min=1).cpu(), batch_first=True, enforce_sorted=False)
            packed, final = self.rnn(packed)
            states, _ = pad_packed_sequence(packed, batch_first=True, total_length=words.shape[1])
        return states, final[0] if isinstance(final, tuple) else final

    def _pool(self, states: Tensor, mask: Tensor, last: Tensor) -> Tensor:
        pooling, some = self.config.pooling, mask.any(dim=1)
        if pooling == "mean":
            return states.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
        if pooling == "last":
            directions = 2 if self.config.bidirectional else 1
            return last[-directions:].transpose(0, 1).flatten(1) * some
        if pooling == "max":
            return states.masked_fill(~mask, -torch.inf).amax(dim=1).masked_fill(~some, 0)
        scores = self.pooler(states)
        weights = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(dim=1)
        return (weights * states).sum(dim=1)


class BiRnnForSequenceClassification(WordModel):
    config_class = BiRnnConfig

    def __init__(self, config: BiRnnConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = TextEncoder(config)
        self.classifier = nn.Linear(config.state_size, classes_of(config))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """logits (B, classes); hidden states: word vectors (B, L, embedding_size), recurrent states (B, L, state_size).

        Padding changes nothing, on either side. labels  (B,) int64, for a loss
        """
        mask = token_mask(input_ids, attention_mask, self.config.pad_token_id)
        words = self.dropout(self.embeddings(input_ids))
        vectors, states = self.encoder(words, mask)
        logits = self.classifier(self.dropout(vectors))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=(words, states) if output_hidden_states else None
        )
