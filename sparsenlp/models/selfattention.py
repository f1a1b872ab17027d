"""A small transformer encoder over word vectors, whose words attend to their neighbours, and a linear classifier."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from ..formats import BlockMask
from ..layers.attention import SparseAttention
from .words import WordConfig, WordModel, classes_of, gather_tokens, scatter_tokens, token_mask

BLOCK = (16, 16)
"""Texts are short: blocks as small as kernels take them."""


@strict
class SelfAttentionConfig(WordConfig):
    """embedding_size            is also that of all layers
    num_hidden_layers, num_attention_heads, intermediate_size   of the encoder
    window                       words on either side that a word attends to
    max_position_embeddings      longest text
    """

    model_type = "selfattention"

    embedding_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    intermediate_size: int = 512
    window: int = 32
    max_position_embeddings: int = 512
    dropout: float | int = 0.3


class SelfAttentionLayer(nn.Module):
    """x (B, L, H) -> (B, L, H): attention, then a feed-forward network, each of normalized inputs and added to them."""

    def __init__(self, config: SelfAttentionConfig) -> None:
        super().__init__()
        size = config.embedding_size
        self.attention_norm = nn.LayerNorm(size)
        self.attention = SparseAttention(size, config.num_attention_heads, partial(_window, config.window))
        self.norm = nn.LayerNorm(size)
        self.intermediate = nn.Linear(size, config.intermediate_size)
        self.output = nn.Linear(config.intermediate_size, size)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        attended, _ = self.attention(self.attention_norm(x), mask)
        x = x + self.dropout(attended)
        return x + self.dropout(self.output(F.gelu(self.intermediate(self.norm(x)))))


class SelfAttentionForSequenceClassification(WordModel):
    """Layers as in Vaswani et al. 2017 (arXiv:1706.03762), normalized first (Xiong et al. 2020, arXiv:2002.04745).

    Attention is block-sparse, in a sliding window (Beltagy et al. 2020, arXiv:2004.05150), and the text's vector is the
    mean of its words'.
    """

    config_class = SelfAttentionConfig

    def __init__(self, config: SelfAttentionConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.embedding_size)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(SelfAttentionLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.embedding_size)
        self.classifier = nn.Linear(config.embedding_size, classes_of(config))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """logits (B, classes); hidden states: (B, L, embedding_size), that of the words and each layer's.

        Padding changes nothing, on either side. labels  (B,) int64, for a loss

        Raises ValueError for more than max_position_embeddings tokens.
        """
        mask = token_mask(input_ids, attention_mask, self.config.pad_token_id)
        ids, inside = gather_tokens(input_ids, mask)
        if ids.shape[1] > self.config.max_position_embeddings:
            raise ValueError(
                f"input_ids: expected at most {self.config.max_position_embeddings} tokens, got {ids.shape[1]}"
            )
        positions = torch.arange(ids.shape[1], device=ids.device)
        states = [self.dropout(self.embeddings(ids) + self.position_embeddings(positions))]
        for layer in self.layers:
            states.append(layer(states[-1], inside))
        kept = inside[..., None]
        vectors = (self.norm(states[-1]) * kept).sum(dim=1) / kept.sum(dim=1).clamp(min=1)
        logits = self.classifier(self.dropout(vectors))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        hidden = tuple(scatter_tokens(state, inside, mask) for state in states) if output_hidden_states else None
        return SequenceClassifierOutput(loss=loss, logits=logits, hidden_states=hidden)


def _window(size: int, queries: int, keys: int) -> BlockMask:
    return BlockMask.sliding_window(queries, size, size, keys, BLOCK)
