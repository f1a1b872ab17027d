"""Models that predict tokens, of texts or of pairs of a source and a target: new ones, and how good they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .data import TokenizedDataset, WordVectors, sorted_batches, token_windows, word_tokenizer
from .data.token_labels import predicted_windows, sequence_pairs
from .data.vocabulary import vocabulary_tokenizer
from .models.own import OWN
from .modes import evaluating
from .scratch import build
from .train import perplexity

PREDICTORS = tuple(name for name, row in OWN.items() if row.predicts_tokens)
"""The models of that table that this is about."""
WINDOW = 64
"""Tokens that a language model is trained on, and judged by, at a time."""
BEGIN, END = "[BOS]", "[EOS]"
SPECIAL = {"bos_token": BEGIN, "eos_token": END}
SPECIAL_IDS = ("pad", "bos", "eos")


@dataclass(frozen=True)
class Perplexity:
    """Of a language model on windows of texts (see `train.perplexity`).

    tokens   that were predicted
    unigram  the best that is possible without looking at other tokens: exp of the entropy of how often each occurs
    """

    perplexity: float
    tokens: int
    unigram: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Answers:
    """What an encoder-decoder answers.

    exact      fraction of its answers that are the target, word by word
    majority   of always giving the most frequent target
    agreement  fraction of the answers that another model gives, too; None without one
    """

    examples: int
    exact: float
    majority: float
    agreement: float | None = None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class NewSequenceModel:
    """An untrained model in eval mode, its tokenizer, and its texts as `train_sequences` takes them.

    vectors  None where they start from random numbers
    """

    model: nn.Module
    tokenizer: Any
    data: TokenizedDataset
    vectors: WordVectors | None


def new_language_model(
    texts: Sequence[str],
    characters: bool = False,
    window: int = WINDOW,
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
    new = build("lstm-lm", tokenizer, SPECIAL_IDS, {}, options, embeddings, seed)
    return NewSequenceModel(new.model, tokenizer, data, new.vectors)


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
    new = build("seq2seq", tokenizer, SPECIAL_IDS, given, options, embeddings, seed)
    return NewSequenceModel(new.model, tokenizer, data, new.vectors)


def character_tokenizer(texts: Sequence[str]) -> Any:
    """Each character of the texts is a token. Raises ValueError for texts without any."""
    characters = sorted(set().union(*texts))
    if not characters:
        raise ValueError("character_tokenizer: expected a character in the texts, got none")
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", **SPECIAL}
    vocabulary = {token: i for i, token in enumerate([*names.values(), *characters])}
    return vocabulary_tokenizer(vocabulary, names, characters=True)


def text_windows(texts: Sequence[str], tokenizer: Any, length: int = WINDOW, seed: int = 0) -> Tensor:
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


def judge_windows(model: nn.Module, windows: Tensor, batch_size: int = 4) -> Perplexity:
    """How well a language model predicts windows (W, L) int64. Raises as `train.perplexity`."""
    predicted = windows[:, 1:].flatten()
    shares = predicted.bincount().double() / predicted.numel()
    unigram = exp(-float(shares.xlogy(shares).sum()))
    return Perplexity(perplexity(model, windows, batch_size), predicted.numel(), unigram)


def judge_answers(
    found: Sequence[str], tokenizer: Any, targets: Sequence[str], reference: Sequence[str] | None = None
) -> Answers:
    """Compare what `answers` found with targets, and with what it found for another model."""
    wanted = tokenizer.batch_decode(tokenizer([*targets])["input_ids"], skip_special_tokens=True)  # as it reads them
    count = len(wanted)
    exact = sum(text == target for text, target in zip(found, wanted, strict=True)) / count
    majority = Counter(wanted).most_common(1)[0][1] / count
    if reference is None:
        return Answers(count, exact, majority)
    same = sum(text == other for text, other in zip(found, reference, strict=True))
    return Answers(count, exact, majority, same / count)
