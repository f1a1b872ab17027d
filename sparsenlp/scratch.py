"""New models of words: a tokenizer, word vectors, a configuration; for labelled texts `new_classifier`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .data import TextDataset, WordVectors, load_word_vectors, word_tokenizer
from .models.own import OWN, OwnModel

CLASSIFIERS = {name: row for name, row in OWN.items() if not row.predicts_tokens}
"""The rows of the table that label texts."""


@dataclass(frozen=True)
class NewModel:
    """An untrained model in eval mode and what goes with it.

    vectors  None where they start from random numbers
    """

    model: nn.Module
    tokenizer: Any
    vectors: WordVectors | None


def new_classifier(
    name: str,
    texts: TextDataset,
    embeddings: str | Path | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> NewModel:
    """Build the model `name` of CLASSIFIERS for the words and classes of training texts.

    embeddings  text file of word vectors (see `load_word_vectors`), which also says their size
    seed        of the initial weights; torch's random state is left as it was
    options     fields of the model's configuration

    Raises ValueError for an unknown name, single texts where the model takes pairs or the other way round,
    and options that its configuration does not have or take; as `word_tokenizer` and `load_word_vectors` too.
    """
    row = _row(name, texts)
    tokenizer = word_tokenizer([*texts.texts, *(texts.text_pairs or ())], pairs=row.pairs)
    names = dict(enumerate(texts.label_names))
    given = {"id2label": names, "label2id": {label: i for i, label in names.items()}}
    return build(name, tokenizer, ("pad",), given, options, embeddings, seed)


def build(
    name: str,
    tokenizer: Any,
    special: Sequence[str],
    given: Mapping[str, Any],
    options: Mapping[str, Any] | None,
    embeddings: str | Path | None,
    seed: int,
) -> NewModel:
    """Build the model `name` of OWN for the words of a tokenizer.

    special  tokens that its configuration wants to know: "pad", "bos", "eos"
    given    fields of the configuration that follow from the texts; the rest as in `new_classifier`
    """
    config_class, model_class = OWN[name].classes()
    given = {
        **given,
        **{f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in special},
        "vocab_size": len(tokenizer),
    }
    options = {**(options or {})}
    known = [field for field in _fields_of(config_class) if field not in given]
    for field in options:
        if field not in known:
            raise ValueError(f"{name}: expected options among {', '.join(known)}, got {field}")
    vectors = None
    if embeddings is not None:
        vectors = load_word_vectors(embeddings, tokenizer, options.get("embedding_size"), seed)
        options["embedding_size"] = vectors.table.shape[1]
    config = _configure(name, config_class, {**given, **options})
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
    if vectors is not None:
        with torch.no_grad():
            for table in word_tables(model):
                table.weight.copy_(vectors.table)
    return NewModel(model, tokenizer, vectors)


def word_tables(model: Any) -> list[nn.Embedding]:
    """The embeddings of words: of an encoder-decoder both."""
    if not model.config.is_encoder_decoder:
        return [model.get_input_embeddings()]
    return [module for module in model.modules() if isinstance(module, nn.Embedding)]


def _configure(name: str, config_class: Any, settings: Mapping[str, Any]) -> Any:
    from huggingface_hub.errors import StrictDataclassError

    try:
        return config_class(**settings)
    except StrictDataclassError as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from None


def _row(name: str, texts: TextDataset) -> OwnModel:
    if name not in CLASSIFIERS:
        known = "; ".join(f"{other}: {row.summary}" for other, row in CLASSIFIERS.items())
        raise ValueError(f"model: expected one of {', '.join(CLASSIFIERS)}, got {name} ({known})")
    row = CLASSIFIERS[name]
    if row.pairs and texts.text_pairs is None:
        raise ValueError(f"{name}: expected pairs of texts, got single ones")
    if texts.text_pairs is not None and not row.pairs:
        takes = ", ".join(other for other, each in CLASSIFIERS.items() if each.pairs)
        raise ValueError(f"{name}: expected single texts, got pairs; for these there is {takes}")
    return row


def _fields_of(config_class: Any) -> list[str]:
    """Fields of a configuration that are not of every configuration."""
    from transformers import PreTrainedConfig

    others = {field.name for field in fields(PreTrainedConfig)}
    return [field.name for field in fields(config_class) if field.name not in others]
