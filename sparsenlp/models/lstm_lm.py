"""An LSTM language model of words or characters (Zaremba et al. 2014, arXiv:1409.2329), as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .recurrent_stack import RecurrentStack, States, check_tokens, reordered, token_loss
from .words import WordConfig, WordModel


@strict
class LstmLmConfig(WordConfig):
    """hidden_size          of each of num_hidden_layers LSTM layers
    dropout              of embeddings and of the outputs of layers, while training
    attention_average    predict from the embeddings and the outputs of all layers, averaged over all tokens so far with
                         softmax weights of a learnt score each (as textgenrnn does), not from the last layer alone
    tie_word_embeddings  the head's matrix is that of the embeddings (Press & Wolf 2017, arXiv:1608.05859), which must
                         then be as wide as what it predicts from
    """

    model_type = "lstm-lm"

    embedding_size: int = 512
    hidden_size: int = 512
    num_hidden_layers: int = 2
    dropout: float = 0.2
    attention_average: bool = False
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    use_cache: bool = True

    @property
    def output_size(self) -> int:
        """Features that the head predicts from."""
        if not self.attention_average:
            return self.hidden_size
        return self.embedding_size + self.num_hidden_layers * self.hidden_size


@dataclass
class LstmLmOutput(ModelOutput):
    """loss           mean cross-entropy (nats) of the labels, where there are any
    logits         (B, T, vocab_size)
    state          after the last token, to go on with; B first in each tensor
    hidden_states  embeddings and the output of each layer, (B, T, F), where wanted
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: States | None = None
    hidden_states: tuple[Tensor, ...] | None = None


class LstmForCausalLM(WordModel, GenerationMixin):
    """Embeddings, LSTM layers and a head; `generate` streams the state, one token a step.

    Raises ValueError for tied embeddings of another width than the head's input.
    """

    config_class = LstmLmConfig
    config: LstmLmConfig
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys = {"lm_head.weight": "embeddings.weight"}  # noqa: RUF012

    def __init__(self, config: LstmLmConfig) -> None:
        super().__init__(config)
        if config.tie_word_embeddings and config.embedding_size != config.output_size:
            raise ValueError(
                f"tie_word_embeddings: expected an embedding_size of {config.output_size}, got {config.embedding_size}"
            )
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.lstm = RecurrentStack(
            "lstm", config.embedding_size, config.hidden_size, config.num_hidden_layers, config.dropout
        )
        self.attention = nn.Parameter(torch.zeros(config.output_size)) if config.attention_average else None
        self.lm_head = nn.Linear(config.output_size, config.vocab_size)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        state: States | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> LstmLmOutput:
        """Logits of the token after each.

        input_ids       (B, T) int64
        attention_mask  (B, T), 0 at padding, which stands on the right: no token sees what is behind it, so it only
                        matters where the state is kept, which is refused
        labels          (B, T) int64, as input_ids (they are shifted here), -100 where none is to be predicted
        state           that an earlier call returned, of the tokens before these
        use_cache       return the state

        Raises ValueError for input_ids of another shape, or padding with use_cache: prompts of a batch must be equally
        long.
        """
        check_tokens("input_ids", input_ids)
        if use_cache and attention_mask is not None and not bool(attention_mask[:, -input_ids.shape[1] :].all()):
            raise ValueError("attention_mask: expected no padding where the state is kept, got some")
        split = 2 * self.config.num_hidden_layers
        embedded = self.embeddings(input_ids)
        outputs, after = self.lstm(embedded, states=None if state is None else state[:split])
        features = outputs[-1]
        if self.attention is not None:
            features, average = causal_average(
                torch.cat([embedded, *outputs], dim=-1), self.attention, None if state is None else state[split:]
            )
            after += average
        logits = self.lm_head(features)
        return LstmLmOutput(
            loss=token_loss(logits[:, :-1], labels[:, 1:]) if labels is not None else None,
            logits=logits,
            state=after if use_cache else None,
            hidden_states=(embedded, *outputs) if output_hidden_states else None,
        )

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then passes on what forward returns as `state`

    @staticmethod
    def _reorder_cache(state: States, beam_idx: Tensor) -> States:
        return reordered(state, beam_idx)


def causal_average(x: Tensor, vector: Tensor, state: States | None = None) -> tuple[Tensor, States]:
    """Averages of x (B, T, F) over all steps up to each, weighted by exp(x . vector): (B, T, F), and the state after.

    The state is (log of the sum of weights (B, 1), the average (B, F)): all that went before is as one step more.
    Memory grows with T * T.
    """
    scores = x @ vector  # (B, T)
    if state is not None:
        scores = torch.cat([state[0], scores], dim=1)
        x = torch.cat([state[1][:, None], x], dim=1)
    later = torch.ones(scores.shape[1], scores.shape[1], dtype=torch.bool, device=x.device).triu(1)
    weights = scores[:, None].masked_fill(later, -torch.inf).softmax(dim=-1)
    averages = weights @ x
    after = scores.logsumexp(dim=1, keepdim=True), averages[:, -1]
    return averages if state is None else averages[:, 1:], after
