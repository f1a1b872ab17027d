"""A recurrent encoder-decoder with or without attention, as a transformers model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.utils import ModelOutput

from .recurrent_stack import RecurrentStack, States, check_tokens, reordered, sequence_lengths, token_loss
from .words import WordConfig, WordModel

ATTENTIONS = ("luong", "bahdanau")


@strict
class RnnSeq2SeqConfig(WordConfig):
    """vocab_size, decoder_vocab_size   tokens of the source and of the target
    cell                             "gru" or "lstm"
    hidden_size                      of each of num_hidden_layers layers of the encoder, and as many of the decoder
    bidirectional                    the encoder reads both ways, with half of the features each
    attention                        None, or how a state s of the decoder scores an output h of the encoder: "luong",
                                     s'Wh (Luong et al. 2015, arXiv:1508.04025), or "bahdanau", v'tanh(Us + Wh)
                                     (Bahdanau et al. 2015, arXiv:1409.0473). Both after the step, as Luong et al. do
    """

    model_type = "seq2seq"

    decoder_vocab_size: int = 30_004
    cell: str = "gru"
    hidden_size: int = 512
    num_hidden_layers: int = 1
    bidirectional: bool = True
    attention: str | None = "luong"
    dropout: float = 0.2
    is_encoder_decoder: bool = True
    bos_token_id: int = 1
    eos_token_id: int = 2
    decoder_start_token_id: int = 1
    tie_word_embeddings: bool = False
    use_cache: bool = True


@dataclass
class RnnEncoderOutput(ModelOutput):
    """last_hidden_state  (B, S, hidden_size), 0 at padding
    state              (B, states, hidden_size) after the last token, which the decoder begins with
    hidden_states      embeddings and the output of each layer, (B, S, F), where wanted
    """

    last_hidden_state: Tensor | None = None
    state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


@dataclass
class RnnSeq2SeqOutput(ModelOutput):
    """loss                   mean cross-entropy (nats) of the labels, where there are any
    logits                 (B, T, decoder_vocab_size)
    state                  of the decoder after the last token, to go on with; (B, hidden_size) each
    cross_attentions       (B, T, S), where wanted and there is attention
    decoder_hidden_states, encoder_hidden_states   embeddings and the output of each layer, where wanted
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    state: States | None = None
    cross_attentions: Tensor | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None


class RnnEncoder(nn.Module):
    """Embeddings and recurrent layers of the source."""

    main_input_name = "input_ids"

    def __init__(self, config: RnnSeq2SeqConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.embedding_size)
        self.rnn = RecurrentStack(
            config.cell,
            config.embedding_size,
            config.hidden_size,
            config.num_hidden_layers,
            config.dropout,
            config.bidirectional,
        )

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> RnnEncoderOutput:
        """input_ids and attention_mask (B, S). Raises ValueError for another shape, or padding on the left."""
        check_tokens("input_ids", input_ids)
        embedded = self.embeddings(input_ids)
        outputs, states = self.rnn(embedded, sequence_lengths(attention_mask))
        return RnnEncoderOutput(
            last_hidden_state=outputs[-1],
            state=torch.stack(states, dim=1),
            hidden_states=(embedded, *outputs) if output_hidden_states else None,
        )


class CrossAttention(nn.Module):
    """What the decoder reads of the encoder at each step."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        if kind not in ATTENTIONS:
            raise ValueError(f"attention: expected None or one of {', '.join(ATTENTIONS)}, got {kind}")
        self.query = nn.Linear(size, size, bias=False)
        additive = kind == "bahdanau"
        self.key = nn.Linear(size, size, bias=False) if additive else None
        self.score = nn.Parameter(torch.empty(size).normal_(std=size**-0.5)) if additive else None
        self.output = nn.Linear(2 * size, size, bias=False)

    def forward(self, states: Tensor, memory: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """(states with what was read (B, T, H), weights (B, T, S)) of states (B, T, H) and memory (B, S, H).

        mask  (B, S), 0 at padding
        """
        queries = self.query(states)
        if self.key is not None:
            scores = (queries[:, :, None] + self.key(memory)[:, None]).tanh() @ self.score  # (B, T, S)
        else:
            scores = queries @ memory.transpose(1, 2)
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None].bool(), -torch.inf)
        weights = scores.softmax(dim=-1)
        return self.output(torch.cat([weights @ memory, states], dim=-1)).tanh(), weights


class RnnDecoder(nn.Module):
    """Embeddings and recurrent layers of the target."""

    def __init__(self, config: RnnSeq2SeqConfig) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(config.decoder_vocab_size, config.embedding_size)
        self.rnn = RecurrentStack(
            config.cell, config.embedding_size, config.hidden_size, config.num_hidden_layers, config.dropout
        )
        self.attention = CrossAttention(config.attention, config.hidden_size) if config.attention is not None else None


class RnnForConditionalGeneration(WordModel, GenerationMixin):
    """A recurrent encoder, a decoder that begins with its last state, and a head.

    `generate` of transformers decodes greedily, by sampling or, with num_beams and length_penalty, by beam search.
    """

    config_class = RnnSeq2SeqConfig  # type: ignore[assignment]
    config: RnnSeq2SeqConfig
    main_input_name = "input_ids"
    _is_stateful = True

    def __init__(self, config: RnnSeq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = RnnEncoder(config)
        self.decoder = RnnDecoder(config)
        self.lm_head = nn.Linear(config.hidden_size, config.decoder_vocab_size)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.encoder.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.encoder.embeddings = value  # type: ignore[assignment]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        encoder_outputs: RnnEncoderOutput | None = None,
        state: States | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        **kwargs: Any,
    ) -> RnnSeq2SeqOutput:
        """Logits of each target token given the source and the target tokens before it.

        input_ids          (B, S) int64, not needed with encoder_outputs
        attention_mask     (B, S), 0 at padding, which stands on the right
        labels             (B, T) int64, the target with its end token, -100 at padding
        decoder_input_ids  (B, T) int64; by default the labels, shifted behind decoder_start_token_id
        state              that an earlier call returned, of the target tokens before these
        use_cache          return the state

        Raises ValueError where one of these is missing or of another shape, or for padding on the left.
        """
        if encoder_outputs is None:
            if input_ids is None:
                raise ValueError("expected input_ids or encoder_outputs, got neither")
            encoder_outputs = self.encoder(input_ids, attention_mask, output_hidden_states)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("expected decoder_input_ids or labels, got neither")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        check_tokens("decoder_input_ids", decoder_input_ids)
        memory, begin = encoder_outputs.last_hidden_state, encoder_outputs.state
        assert memory is not None
        assert begin is not None
        embedded = self.decoder.embeddings(decoder_input_ids)
        outputs, after = self.decoder.rnn(embedded, states=begin.unbind(1) if state is None else state)
        features, weights = outputs[-1], None
        if self.decoder.attention is not None:
            features, weights = self.decoder.attention(features, memory, attention_mask)
        logits = self.lm_head(features)
        return RnnSeq2SeqOutput(
            loss=token_loss(logits, labels) if labels is not None else None,
            logits=logits,
            state=after if use_cache else None,
            cross_attentions=weights if output_attentions else None,
            decoder_hidden_states=(embedded, *outputs) if output_hidden_states else None,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=encoder_outputs.hidden_states,
        )

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """(B, T): decoder_start_token_id, then all labels but the last, with 0 for -100."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        shifted = torch.cat([start, labels[:, :-1]], dim=1)
        return shifted.masked_fill(shifted == -100, 0)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() then passes on what forward returns as `state`

    @staticmethod
    def _reorder_cache(state: States, beam_idx: Tensor) -> States:
        return reordered(state, beam_idx)
