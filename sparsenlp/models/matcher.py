"""Two texts read by the same encoder, compared, and classified: whether one fits, follows from or means the other."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .birnn import BiRnnConfig, TextEncoder
from .words import WordModel, classes_of, gather_tokens, scatter_tokens, token_mask


@strict
class MatcherConfig(BiRnnConfig):
    """comparison   "vectors": of the texts' vectors alone, so that each text can be read once and kept; "words": each
                 word is first compared with those of the other text that are most like it, without `pooling`
    dense_size   of the layer between the comparison and the classes, and of a compared word
    """

    model_type = "matcher"

    comparison: Literal["vectors", "words"] = "vectors"
    dense_size: int = 256


class MatcherForSequenceClassification(WordModel):
    """The vectors u and v of both texts are compared as (u, v, |u - v|, u * v).

    Source: Conneau et al. 2017, arXiv:1705.02364; where words are compared, u and v are what is largest in these
    comparisons: Chen et al. 2017, arXiv:1609.06038, but with one recurrent layer.
    """

    config_class = MatcherConfig

    def __init__(self, config: MatcherConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = TextEncoder(config)
        crossed = config.comparison == "words"
        self.compare = nn.Linear(4 * config.state_size, config.dense_size) if crossed else None
        self.dense = nn.Linear(4 * (config.dense_size if crossed else config.state_size), config.dense_size)
        self.classifier = nn.Linear(config.dense_size, classes_of(config))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """logits (B, classes); hidden states: word vectors (B, L, embedding_size), recurrent states (B, L, state_size).

        token_type_ids  (B, L), 0 in the first text and 1 in the second; without them all is the first, and the
                        second, like any text without words, counts as zeros
        labels          (B,) int64, for a loss
        """
        mask = token_mask(input_ids, attention_mask, self.config.pad_token_id)
        second = torch.zeros_like(mask) if token_type_ids is None else token_type_ids.bool()
        sides = mask & ~second, mask & second
        words = self.dropout(self.embeddings(input_ids))
        (u, first_states), (v, second_states) = (self._encode(words, side) for side in sides)
        states = first_states + second_states
        if self.compare is not None:
            u, v = (self._compared(states, *pair) for pair in (sides, sides[::-1]))
        logits = self.classifier(self.dropout(F.relu(self.dense(self.dropout(_features(u, v))))))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=(words, states) if output_hidden_states else None
        )

    def _encode(self, words: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """As TextEncoder, but over no more positions than the longest text has."""
        front, inside = gather_tokens(words, mask)
        vectors, states = self.encoder(front, inside)
        return vectors, scatter_tokens(states, inside, mask)

    def _compared(self, states: Tensor, own: Tensor, other: Tensor) -> Tensor:
        """(B, dense_size), the largest of each feature over the words of `own` compared with those of `other`.

        states      (B, L, state_size) of the words of both texts
        own, other  (B, L) bool; zeros come out where `own` has no word, and stand for the other's where that has none
        """
        assert self.compare is not None
        words, inside = gather_tokens(states, own)
        others, beside = gather_tokens(states, other)
        scores = words @ others.transpose(1, 2)
        weights = scores.masked_fill(~beside[:, None], torch.finfo(scores.dtype).min).softmax(dim=-1)
        aligned = (weights * beside[:, None]) @ others
        compared = F.relu(self.compare(self.dropout(_features(words, aligned))))  # none negative
        return (compared * inside[..., None]).amax(dim=1)


def _features(u: Tensor, v: Tensor) -> Tensor:
    return torch.cat([u, v, (u - v).abs(), u * v], dim=-1)
