"""sparsenlp train for models that predict tokens."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import note, say

if TYPE_CHECKING:
    from ..train import FinetuneConfig

SEQUENCE_MODELS = ("lstm-lm", "seq2seq")
HELD_OUT = 0.1


@dataclass(frozen=True)
class TextSource:
    """Where texts come from: a section `data` of a recipe, test texts, and the columns of files."""

    section: Mapping[str, Any]
    test: Path | None
    text_column: str
    text_pair_column: str | None
    seed: int

    def read(self) -> tuple[list[list[str]], list[list[str]]]:
        """(training, test) columns: texts, and what goes with them if there is a text_pair_column.

        Raises as `load_columns`, and ValueError for a packaged task where pairs are wanted.
        """
        from ..data.text import load_columns
        from ..recipe import Data
        from ..recipe.tasks import labelled_texts

        columns = [self.text_column] + ([self.text_pair_column] if self.text_pair_column else [])
        if "train" not in self.section:
            if self.text_pair_column:
                raise ValueError(f"data: expected a file of sources and targets, got {self.section['task']}")
            training, testing, _ = labelled_texts(Data(**self.section), self.seed)
            return [training.texts], [testing.texts]
        values = load_columns(self.section["train"], columns)
        if self.test is not None:
            return values, load_columns(self.test, columns)
        rows = list(range(len(values[0])))
        random.Random(self.seed).shuffle(rows)
        count = round(HELD_OUT * len(rows))
        if not 0 < count < len(rows):
            raise ValueError(f"data: expected at least 5 rows, of which some are held out, got {len(rows)}")
        note(f"no --test: {count} of the {len(rows)} rows are held out for testing")
        sides = ([[column[row] for row in side] for column in values] for side in (rows[count:], rows[:count]))
        return next(sides), next(sides)


def train_sequence_model(
    name: str,
    source: TextSource,
    output: Path,
    config: FinetuneConfig,
    max_length: int,
    options: Mapping[str, Any],
    embeddings: Path | None,
) -> None:
    """Train the model `name` of SEQUENCE_MODELS, save it, and say how well it predicts the test texts.

    max_length  tokens of a text of an encoder-decoder; a language model sees windows of 64
    """
    from ..classifiers import save_model
    from ..sequences import answers, new_encoder_decoder, new_language_model, text_windows
    from ..train import perplexity
    from ..train.sequences import train_sequences

    if name == "seq2seq" and source.text_pair_column is None:
        raise ValueError("seq2seq: expected --text-pair-column, the column of the targets, got none")
    training, testing = source.read()
    if name == "seq2seq":
        new = new_encoder_decoder(training[0], training[1], max_length, source.seed, options, embeddings)
    else:
        new = new_language_model(training[0], seed=source.seed, options=options, embeddings=embeddings)
    note(f"vocabulary: {len(new.tokenizer)} words and special tokens of {len(training[0])} texts")
    state = output / "work" / "train.safetensors"
    train_sequences(new.model, new.data, config, state)
    if name == "seq2seq":
        found = answers(new.model, new.tokenizer, testing[0], max_new_tokens=max_length)
        exact = sum(text == wanted for text, wanted in zip(found, _as_read(new.tokenizer, testing[1]), strict=True))
        say(f"answers exact: {exact / len(found):.1%} of {len(found)} test texts")
    else:
        windows = text_windows(testing[0], new.tokenizer, 64, source.seed)
        say(f"perplexity: {perplexity(new.model, windows):.1f} of {windows.numel()} test tokens")
    save_model(new.model, output, new.tokenizer)
    state.unlink(missing_ok=True)
    state.parent.rmdir()
    say(f"saved: {output}")


def _as_read(tokenizer: Any, texts: list[str]) -> list[str]:
    """Texts as the tokenizer's words make them."""
    return tokenizer.batch_decode(tokenizer(texts)["input_ids"], skip_special_tokens=True)
