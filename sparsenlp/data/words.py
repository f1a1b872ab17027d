"""A tokenizer of whole words, made from the texts that a model is trained on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

PAD, UNKNOWN = "[PAD]", "[UNK]"
MOST_WORDS, LEAST_COUNT = 30_000, 2


def word_tokenizer(
    texts: Iterable[str],
    most_words: int = MOST_WORDS,
    least_count: int = LEAST_COUNT,
    pairs: bool = False,
    special: Mapping[str, str] | None = None,
) -> Any:
    """A PreTrainedTokenizerFast whose tokens are lower-case words and runs of punctuation.

    texts        give the vocabulary, the same one whatever their order
    most_words   the most frequent ones are kept, of equally frequent ones the first in the alphabet
    least_count  words that occur less often become [UNK], which training so gets to know
    pairs        tell the two texts of a pair apart by token_type_ids
    special      further special tokens by the name transformers has for them, such as {"eos_token": "[EOS]"}

    [PAD] is 0, [UNK] 1, then come `special` and the words.

    Raises ValueError for texts without words, or limits below 1.
    """
    from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors, trainers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    for name, limit in (("most_words", most_words), ("least_count", least_count)):
        if limit < 1:
            raise ValueError(f"word_tokenizer: expected {name} of at least 1, got {limit}")
    names = {"pad_token": PAD, "unk_token": UNKNOWN, **(special or {})}
    tokenizer = Tokenizer(WordLevel(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    trainer = trainers.WordLevelTrainer(
        vocab_size=most_words + len(names),
        min_frequency=least_count,
        special_tokens=[*names.values()],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() == len(names):
        raise ValueError(f"word_tokenizer: expected a word that occurs {least_count} times in the texts, got none")
    columns = ["input_ids", *(["token_type_ids"] if pairs else []), "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=columns, **names)
