"""New models that predict tokens, of texts or of pairs of a source and a target, with their tokenizers and data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .data import TokenizedDataset, sorted_batches, token_windows, word_tokenizer
from .data.token_labels import predicted_windows, sequence_pairs
from .data.vocabulary import vocabulary_tokenizer
from .modes import evaluating
from .scratch import build

BEGIN, END = "[BOS]", "[EOS]"
SPECIAL = {"bos_token": BEGIN, "eos_token": END}
SPECIAL_IDS = ("pad", "bos", "eos")


@dataclass(frozen=True)
class NewSequenceModel:
    """An untrained model in eval mode, its tokenizer, and its texts as `train_sequences` takes them."""

    model: nn.Module
    tokenizer: Any
    data: TokenizedDataset


def new_language_model(
    texts: Sequence[str],
    characters: bool = False,
    window: int = 64,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    embeddings: str | Path | None = None,
) -> NewSequenceModel:
    """An LstmForCausalLM for the words of texts, or their characters.

    window      tokens that it is trained on at a time; texts stand one after another, an end token between them
    seed        of the initial weights and the order of the texts
    options     fields of LstmLmConfig
    embeddings  text file of word vectors (see `load_word_vectors`), which also says their size

    Raises ValueError for texts of fewer than `window` tokens, and as `word_tokenizer` and `load_word_vectors`.
    """
    tokenizer = character_tokenizer(texts) if characters else word_tokenizer(texts, special=SPECIAL)
    data = predicted_windows(text_windows(texts, tokenizer, window, seed))
    model = build("lstm-lm", tokenizer, SPECIAL_IDS, {}, options, embeddings, seed).model
    return NewSequenceModel(model, tokenizer, data)


def new_encoder_decoder(
    sources: Sequence[str],
    targets: Sequence[str],
    max_length: int = 128,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    embeddings: str | Path | None = None,
) -> NewSequenceModel:
    """An RnnForConditionalGeneration with one vocabulary for the words of sources and targets.

    max_length  tokens that are kept of each
    seed        of the initial weights
    options     fields of RnnSeq2SeqConfig
    embeddings  text file of word vectors (see `load_word_vectors`), which also says their size

    Raises ValueError for no pairs, numbers of sources and targets that differ, and as `word_tokenizer` and
    `load_word_vectors`.
    """
    from tokenizers.processors import TemplateProcessing

    tokenizer = word_tokenizer([*sources, *targets], special=SPECIAL)
    ends = [(END, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=ends)
    data = sequence_pairs(sources, targets, tokenizer, tokenizer, max_length)
    given = {"decoder_vocab_size": len(tokenizer), "decoder_start_token_id": tokenizer.bos_token_id}
    model = build("seq2seq", tokenizer, SPECIAL_IDS, given, options, embeddings, seed).model
    return NewSequenceModel(model, tokenizer, data)


def character_tokenizer(texts: Sequence[str]) -> Any:
    """Each character of the texts is a token. Raises ValueError for texts without any."""
    characters = sorted(set().union(*texts))
    if not characters:
        raise ValueError("character_tokenizer: expected a character in the texts, got none")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", **SPECIAL}
    vocabulary = {token: i for i, token in enumerate([*names.values(), *characters])}
    return vocabulary_tokenizer(vocabulary, names, characters=True)


def text_windows(texts: Sequence[str], tokenizer: Any, length: int, seed: int = 0) -> Tensor:
    """As many windows (W, length) as there are in texts (see `token_windows`)."""
    used = [text for text in texts if text.strip()]
    tokens = sum(len(ids) + 1 for ids in tokenizer(used, add_special_tokens=False)["input_ids"]) if used else 0
    return token_windows(used, tokenizer, length, max(tokens // length, 1), seed)


def answers(model: Any, tokenizer: Any, sources: Sequence[str], batch_size: int = 64, **options: Any) -> list[str]:
    """What an encoder-decoder generates for each source; options are those of generate(), such as num_beams=4."""
    found = [""] * len(sources)
    with evaluating(model):
        for indices in sorted_batches([len(source) for source in sources], batch_size):
            inputs = tokenizer([sources[i] for i in indices], padding=True, return_tensors="pt").to(model.device)
            generated = model.generate(**inputs, **options)
            for i, text in zip(indices, tokenizer.batch_decode(generated, skip_special_tokens=True), strict=True):
                found[i] = text
    return found
