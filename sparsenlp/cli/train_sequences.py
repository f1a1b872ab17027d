"""sparsenlp train for models that predict tokens."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .console import note, print_table, say
from .evaluate import quality_cells, quality_title

if TYPE_CHECKING:
    from ..recipe import Data
    from ..train import FinetuneConfig


def train_sequence_model(
    name: str,
    source: Data,
    output: Path,
    config: FinetuneConfig,
    options: Mapping[str, Any],
    embeddings: Path | None,
) -> None:
    """Train the model `name` of sequences.PREDICTORS, save it, and say how well it predicts the test texts."""
    from ..classifiers import save_model
    from ..recipe.tasks import token_prediction, token_texts
    from ..sequences import new_encoder_decoder, new_language_model
    from ..train import train_sequences

    training, testing, held_out = token_texts(source, name == "seq2seq", config.seed)
    texts, targets = training.texts, training.targets
    if targets is not None:
        new = new_encoder_decoder(texts, targets, source.max_length, config.seed, options, embeddings)
    else:
        new = new_language_model(texts, seed=config.seed, options=options, embeddings=embeddings)
    if held_out is not None:
        note(f"no --test: {held_out[0]} of the {held_out[1]} rows are held out for testing")
    note(f"vocabulary: {len(new.tokenizer)} words and special tokens of {len(texts)} texts")
    state = output / "work" / "train.safetensors"
    train_sequences(new.model, new.data, config, state)
    task = token_prediction(new.tokenizer, training, testing, held_out, source.max_length, config.seed)
    quality = task.judge(task.outputs(new.model))
    save_model(new.model, output, new.tokenizer)
    state.unlink(missing_ok=True)
    state.parent.rmdir()
    print_table(quality_cells({name: quality}), quality_title(quality))
    say(f"saved: {output}")
