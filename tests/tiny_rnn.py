"""A tiny recurrent classifier as transformers build models, of torch's own layers; for tests."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

transformers = pytest.importorskip("transformers", reason="the model is built as transformers build theirs")
from transformers.modeling_outputs import SequenceClassifierOutput  # noqa: E402

VOCABULARY = 50


class TinyRnnConfig(transformers.PretrainedConfig):
    model_type = "tiny_rnn"

    def __init__(self, cell="LSTM", hidden_size=16, packed=True, **kwargs):
        super().__init__(**kwargs)
        self.cell, self.hidden_size, self.packed, self.vocab_size = cell, hidden_size, packed, VOCABULARY


class TinyRnn(transformers.PreTrainedModel):
    """Two layers, both directions; the classifier reads the mean of what they give for the tokens."""

    config_class = TinyRnnConfig

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = nn.Embedding(VOCABULARY, 16)
        kind = getattr(nn, config.cell)
        self.rnn = kind(16, config.hidden_size, num_layers=2, bidirectional=True, batch_first=True)
        self.classifier = nn.Linear(2 * config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, attention_mask=None, labels=None, **_):
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embeddings(input_ids)
        if self.config.packed:
            lengths = mask.sum(1).cpu()
            packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
            y, _ = nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0], True, total_length=x.shape[1])
        else:
            y, _ = self.rnn(x)
        kept = mask[..., None]
        logits = self.classifier((y * kept).sum(1) / kept.sum(1))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


def tiny_rnn(seed=0, **options):
    torch.manual_seed(seed)
    return TinyRnn(TinyRnnConfig(**options)).eval()
