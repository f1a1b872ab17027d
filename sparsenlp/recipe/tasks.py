"""What a recipe's model is for: its texts, how it is loaded for them, and how it is judged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from .. import data as corpora
from ..classifiers import (
    Head,
    Quality,
    choose_head,
    judge,
    load_config,
    load_language_model,
    load_model,
    load_tokenizer,
    max_tokens,
)
from ..data import TextDataset, TokenizedDataset, check_split, load_table, tokenize
from ..train import perplexity, predict
from .config import Data, OneShot, Recipe

HELD_OUT = 0.1
"""Share of the texts that is kept for testing where there are no test texts, and of the rest for judging rounds."""
CALIBRATION_BATCH = 32


class UntrainedHead(ValueError):
    """A model that needs fine-tuning for these classes, and a recipe that forbids it; `why` it does."""

    def __init__(self, why: str) -> None:
        super().__init__(f"finetune.when: expected needed or always, as {why}, got never")
        self.why = why


@dataclass(frozen=True)
class Perplexity:
    """Of a language model on windows of test texts (see `perplexity`)."""

    perplexity: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """Without texts: what is done looks at the weights alone, and nothing is judged."""

    tokenizer: Any

    def load(self, name: str) -> nn.Module:
        """The dense model."""
        return load_model(name)

    def outputs(self, model: nn.Module) -> Any:
        """Of a model on the test texts, for `judge`."""
        return None

    def judge(self, outputs: Any, reference: Any = None) -> Quality | Perplexity | None:
        """How good a model's outputs are, and how close to a reference's."""
        return None

    def calibration(self, stage: OneShot) -> list[dict[str, Tensor]]:
        """Arguments of the model for solvers, from training texts."""
        return []


@dataclass(frozen=True)
class Classification(Task):
    """train, validation, test   validation is None but for rounds
    held_out   rows kept for testing, of how many, where there were no test texts
    """

    head: Head
    train: TokenizedDataset
    validation: TokenizedDataset | None
    test: TokenizedDataset
    held_out: tuple[int, int] | None

    def load(self, name: str) -> nn.Module:
        return load_model(name, self.head.names)

    def outputs(self, model: nn.Module) -> Tensor:
        return predict(model, self.test)

    def judge(self, outputs: Tensor, reference: Tensor | None = None) -> Quality:
        return judge(outputs, self.test.labels, reference)

    def calibration(self, stage: OneShot) -> list[dict[str, Tensor]]:
        rows = range(min(stage.examples, len(self.train)))
        return [self.train.batch(rows[i : i + CALIBRATION_BATCH]) for i in rows[::CALIBRATION_BATCH]]


@dataclass(frozen=True)
class LanguageModelling(Task):
    """train, test   windows of tokens, (windows, length) int64"""

    train: Tensor
    test: Tensor

    def load(self, name: str) -> nn.Module:
        return load_language_model(name)

    def outputs(self, model: nn.Module) -> float:
        return perplexity(model, self.test)

    def judge(self, outputs: float, reference: float | None = None) -> Perplexity:
        return Perplexity(outputs)

    def calibration(self, stage: OneShot) -> list[dict[str, Tensor]]:
        return [{"input_ids": windows} for windows in self.train.split(CALIBRATION_BATCH)]


def read_task(recipe: Recipe, name: str) -> Task:
    """The texts of a recipe, tokenized for the model of that name.

    Raises ValueError for labels that are not the model's, a class without training texts, and as `load_table`;
    ModuleNotFoundError and FileNotFoundError for a packaged task that is not there.
    """
    config, tokenizer = load_config(name), load_tokenizer(name)
    if recipe.data is None:
        return Task(tokenizer)
    if recipe.language:
        stage = recipe.one_shot or OneShot()
        fraction = {} if recipe.data.test_fraction is None else {"test_fraction": recipe.data.test_fraction}
        sides = corpora.news_articles(seed=recipe.seed, **fraction)
        train, test = (
            corpora.token_windows(side, tokenizer, stage.length, stage.windows, recipe.seed) for side in sides
        )
        return LanguageModelling(tokenizer, train, test)
    head, training, testing, held_out = _labelled(recipe, config)
    if not head.trained and recipe.finetune.when == "never":
        raise UntrainedHead(head.why)
    validation = None
    if recipe.in_rounds:
        training, validation = training.split(HELD_OUT, recipe.seed)
    longest = min(recipe.data.max_length, max_tokens(config, tokenizer) or recipe.data.max_length)
    judging = None if validation is None else tokenize(validation, tokenizer, longest)
    learning, final = (tokenize(side, tokenizer, longest) for side in (training, testing))
    return Classification(tokenizer, head, learning, judging, final, held_out)


def labelled_texts(source: Data, seed: int) -> tuple[TextDataset, TextDataset, tuple[int, int] | None]:
    """(training texts, test texts, rows held out for testing of how many, where there were no test texts).

    Raises as `read_task` for the texts.
    """
    if source.train is None:
        return *_packaged(source, seed), None
    train = load_table(source.train, **source.columns)
    if source.test is None:
        rows = len(train)
        train, test = train.split(HELD_OUT, seed)
        return train, test, (len(test), rows)
    test = load_table(source.test, **source.columns, label_names=train.label_names)
    check_split(train, test)
    return train, test, None


def _labelled(recipe: Recipe, config: Any) -> tuple[Head, TextDataset, TextDataset, tuple[int, int] | None]:
    """(classes, training texts, test texts, held out), labels indexing the classes."""
    assert recipe.data is not None
    train, test, held_out = labelled_texts(recipe.data, recipe.seed)
    head = choose_head(config, train.label_names, recipe.finetune.when == "always")
    return head, _encoded(train, head.names), _encoded(test, head.names), held_out


def _packaged(source: Data, seed: int) -> tuple[TextDataset, TextDataset]:
    fraction = {} if source.test_fraction is None else {"test_fraction": source.test_fraction}
    if source.task == "rotten_tomatoes":
        train, test = corpora.rotten_tomatoes(seed=seed, **fraction)
        if source.count is not None:
            test = test.sample(round(len(test) * source.count / len(train)), seed)
            train = train.sample(source.count, seed)
        return train, test
    task = {"supersense": corpora.supersense, "word_definitions": corpora.word_definitions}[str(source.task)]
    return task(seed=seed, count=source.count, path=source.path, **fraction)


def _encoded(dataset: TextDataset, names: Sequence[str]) -> TextDataset:
    """With labels that index `names`, among which all of its own are."""
    places = [names.index(name) for name in dataset.label_names]
    return replace(dataset, labels=[places[label] for label in dataset.labels], label_names=[*names])
