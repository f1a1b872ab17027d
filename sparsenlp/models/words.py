"""What our models of words share: configuration, initialization, and sequences of different lengths.

No file with a configuration postpones the evaluation of annotations: `strict` does not check types that are text.
"""

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
    embedding_size: int = 128
    dropout: float | int = 0.5


class WordModel(PreTrainedModel):
    """Base of models whose first module is called `embeddings`, an nn.Embedding."""

    config_class = WordConfig
    base_model_prefix = ""
    embeddings: nn.Embedding

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
                if getattr(parameter, "_is_hf_initialized", False):  # its chunks do not tell
                    continue
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


def classes_of(config: PreTrainedConfig) -> int:
    return len(config.id2label or ())


def gather_tokens(x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(the chosen positions of x (B, L, ...) moved to the front in their order, which of those are chosen (B, M)).

    mask  (B, L) bool; M is the largest number of True in a row, at least 1

    What follows them is other positions of x.
    """
    lengths = mask.sum(dim=1)
    longest = max(int(lengths.max()), 1)
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, :longest]
    index = order.view(*order.shape, *[1] * (x.dim() - 2)).expand(*order.shape, *x.shape[2:])
    return x.gather(1, index), torch.arange(longest, device=x.device) < lengths[:, None]


def scatter_tokens(x: Tensor, chosen: Tensor, mask: Tensor) -> Tensor:
    """Undo `gather_tokens`: (B, M, H) -> (B, L, H), zeros where `mask` is False."""
    spread = x.new_zeros(*mask.shape, x.shape[-1])
    spread[mask] = x[chosen]
    return spread
