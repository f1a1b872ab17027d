"""What our models of words share: configuration, initialization, and sequences of different lengths."""

from __future__ import annotations

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers import initialization as init


@strict
class WordConfig(PreTrainedConfig):
    """vocab_size, pad_token_id   of the tokenizer
    embedding_size   numbers that a word vector has
    dropout          of word vectors, and of what the classifier is given
    """

    vocab_size: int = 30_002
    pad_token_id: int | None = 0
    embedding_size: int = 300
    dropout: float = 0.5


class WordModel(PreTrainedModel):
    """Base of models whose first module is called `embeddings`, an nn.Embedding."""

    config_class = WordConfig
    base_model_prefix = ""
    embeddings: nn.Embedding
    num_labels: int

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value  # type: ignore[assignment]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Word vectors N(0, 0.1), recurrent matrices orthogonal, others Glorot, biases 0, of forget gates 1."""
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.1)
            if module.padding_idx is not None and not getattr(module.weight, "_is_hf_initialized", False):
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.Linear | nn.Conv1d):
            init.xavier_uniform_(module.weight)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.RNNBase):
            for name, parameter in module.named_parameters():
                if name.startswith("weight_hh"):
                    for gate in parameter.chunk(len(parameter) // module.hidden_size):
                        init.orthogonal_(gate)
                elif name.startswith("weight"):
                    init.xavier_uniform_(parameter)
                else:
                    init.zeros_(parameter)
                    if isinstance(module, nn.LSTM) and name.startswith("bias_ih"):
                        init.ones_(parameter.chunk(4)[1])
        elif isinstance(module, nn.LayerNorm):
            init.ones_(module.weight)
            init.zeros_(module.bias)


def token_mask(input_ids: Tensor, attention_mask: Tensor | None, pad_token_id: int | None) -> Tensor:
    """(B, L) bool, True for tokens; without an attention_mask those that are not padding."""
    if attention_mask is not None:
        return attention_mask.bool()
    return torch.ones_like(input_ids, dtype=torch.bool) if pad_token_id is None else input_ids != pad_token_id
