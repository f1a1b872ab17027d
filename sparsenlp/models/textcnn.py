"""TextCNN: convolutions over word vectors, the largest activation of each filter, and a linear classifier.

Source: Kim 2014, arXiv:1408.5882.
"""

from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from .words import WordConfig, WordModel, classes_of, token_mask


@strict
class TextCnnConfig(WordConfig):
    """filters        of each width
    filter_widths  words that a filter spans
    """

    model_type = "textcnn"

    filters: int = 128
    filter_widths: list[int] | tuple[int, ...] = (3, 4, 5)


class TextCnnForSequenceClassification(WordModel):
    """One nn.Conv1d for each width, `convolutions`, and a classifier of their maxima over the text."""

    config_class = TextCnnConfig

    def __init__(self, config: TextCnnConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        size, filters, widths = config.embedding_size, config.filters, config.filter_widths
        self.convolutions = nn.ModuleList(nn.Conv1d(size, filters, width, padding=width // 2) for width in widths)
        self.classifier = nn.Linear(filters * len(widths), classes_of(config))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        **_: Any,
    ) -> SequenceClassifierOutput:
        """logits (B, classes); hidden states: word vectors (B, L, embedding_size), feature maps (B, L, all filters).

        Beyond the text there are zeros, so that padding changes nothing. labels  (B,) int64, for a loss
        """
        mask = token_mask(input_ids, attention_mask, self.config.pad_token_id)[..., None]
        words = self.dropout(self.embeddings(input_ids)) * mask
        columns, length = words.transpose(1, 2), words.shape[1]
        maps = [F.relu(convolution(columns)[..., :length]) for convolution in self.convolutions]
        features = torch.cat(maps, dim=1).transpose(1, 2) * mask  # (B, L, all filters), none negative
        logits = self.classifier(self.dropout(features.amax(dim=1)))
        loss = None if labels is None else self.loss_function(labels, logits, self.config)
        return SequenceClassifierOutput(
            loss=loss, logits=logits, hidden_states=(words, features) if output_hidden_states else None
        )
