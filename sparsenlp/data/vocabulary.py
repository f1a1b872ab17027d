"""A tokenizer with a given vocabulary, of characters or of what spaces separate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def vocabulary_tokenizer(
    vocabulary: Mapping[str, int],
    special: Mapping[str, str],
    characters: bool = False,
    begin: str | None = None,
    end: str | None = None,
) -> Any:
    """A PreTrainedTokenizerFast with these tokens and ids.

    special     tokens by the name transformers has for them; "unk_token" stands for what the vocabulary lacks
    characters  each character is a token; else what spaces separate
    begin, end  tokens put before and after each text

    Raises ValueError for a special token that the vocabulary lacks, or no unk_token.
    """
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    if "unk_token" not in special:
        raise ValueError(f"vocabulary_tokenizer: expected an unk_token among the special tokens, got {dict(special)}")
    added = {*special.values(), *(token for token in (begin, end) if token is not None)}
    if missing := sorted(added - vocabulary.keys()):
        raise ValueError(f"vocabulary_tokenizer: expected {missing[0]} in the vocabulary, got {len(vocabulary)} others")
    tokenizer = Tokenizer(WordLevel(dict(vocabulary), unk_token=special["unk_token"]))
    if characters:
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
        tokenizer.decoder = decoders.Fuse()
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = " ".join(part for part in (begin, "$A", end) if part is not None)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=[(token, vocabulary[token]) for token in (begin, end) if token is not None]
    )
    columns = ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=columns, **special)
