"""What a recipe's model is for: its texts, how it is loaded for them, and how it is judged."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from .. import data as corpora
from .. import train as training
from ..classifiers import (
    Quality,
    judge,
    load_config,
    load_language_model,
    load_model,
    load_tokenizer,
    match_padding_,
    max_tokens,
)
from ..data import TextDataset, TokenizedDataset, check_split, load_table, tokenize
from ..data.pronunciations import pronunciations, spelled
from ..data.tables import load_columns
from ..data.token_labels import predicted_windows, sequence_pairs
from ..heads import Head, check_head, choose_head
from ..prune import LayerTarget
from ..prune.layers import FilterFn
from ..sequences import PREDICTORS, Answers, Perplexity, answers, judge_answers, judge_windows, text_windows
from ..train import FinetuneConfig
from ..trained_texts import Split, hashes_of
from .config import LABELLED_TASKS, PAIR_TASKS, Data, OneShot, Recipe

HELD_OUT = 0.1
"""Share of the texts that is kept for testing where there are no test texts, and of the rest for judging rounds."""
CALIBRATION_BATCH = 32


HeldOut = tuple[int, int] | None
Judgement = Quality | Perplexity | Answers


@dataclass(frozen=True)
class TokenTexts:
    """Texts whose tokens are predicted, or with `targets` that answer them the tokens of these."""

    texts: list[str]
    targets: list[str] | None = None

    def select(self, rows: Sequence[int]) -> TokenTexts:
        targets = None if self.targets is None else [self.targets[row] for row in rows]
        return TokenTexts([self.texts[row] for row in rows], targets)


class UntrainedHead(ValueError):
    """A model that needs fine-tuning for these classes, and a recipe that forbids it; `why` it does."""

    def __init__(self, why: str) -> None:
        super().__init__(f"finetune.when: expected needed or always, as {why}, got never")
        self.why = why


@dataclass(frozen=True)
class Task:
    """Without texts: what is done looks at the weights alone, and nothing is judged.

    The model is what its config.json names, whatever that is for.
    """

    tokenizer: Any

    @property
    def remarks(self) -> list[str]:
        """What is to be said about the texts, a line each."""
        return []

    def load(self, name: str) -> nn.Module:
        """The dense model."""
        return load_model(name)

    def outputs(self, model: nn.Module) -> Any:
        """Of a model on the test texts, for `judge`."""
        return None

    def judge(self, outputs: Any, reference: Any = None) -> Judgement | None:
        """How good a model's outputs are, and how close to a reference's; None without texts."""
        return None

    def calibration(self, stage: OneShot) -> list[dict[str, Tensor]]:
        """Arguments of the model for solvers, from training texts."""
        return []


@dataclass(frozen=True)
class Trained(Task):
    """Texts to train on and texts to judge by.

    held_out   rows kept for testing, of how many, where there were no test texts
    split      which texts are on either side
    """

    train: TokenizedDataset
    held_out: HeldOut
    split: Split | None = field(default=None, kw_only=True)

    def judge(self, outputs: Any, reference: Any = None) -> Judgement:
        raise NotImplementedError

    def finetune(self, model: nn.Module, config: FinetuneConfig, state: Path) -> None:
        """Train the dense model; `state` is where an interrupted run waits."""
        training.finetune(model, self.train, config, state)

    def recover(
        self,
        model: nn.Module,
        dense: nn.Module,
        recipe: Recipe,
        filter_fn: FilterFn | None,
        state: Path,
        layer_targets: Mapping[str, LayerTarget] | None = None,
    ) -> None:
        """Prune the model while the dense one teaches it.

        state          where an interrupted run waits
        layer_targets  chosen for a target of time
        """
        training.recover(model, dense, self.train, recipe.recovery(layer_targets), filter_fn, state)

    def calibration(self, stage: OneShot) -> list[dict[str, Tensor]]:
        rows = range(min(stage.examples, len(self.train)))
        return [self.train.batch(rows[i : i + CALIBRATION_BATCH]) for i in rows[::CALIBRATION_BATCH]]


@dataclass(frozen=True)
class Classification(Trained):
    """validation   None but for rounds"""

    head: Head
    validation: TokenizedDataset | None
    test: TokenizedDataset

    def load(self, name: str) -> nn.Module:
        model = load_model(name, self.head.names, self.head.trained)
        match_padding_(model, self.tokenizer)
        return model

    @property
    def remarks(self) -> list[str]:
        sides = {"training": self.train, "validation": self.validation, "test": self.test}
        cut = [cut_texts(side, f"{name} texts") for name, side in sides.items() if side is not None]
        return [remark for remark in (self.head.remarks, *cut) if remark]

    def outputs(self, model: nn.Module) -> Tensor:
        return training.predict(model, self.test)

    def judge(self, outputs: Tensor, reference: Tensor | None = None) -> Quality:
        return judge(outputs, self.test.labels, reference)


@dataclass(frozen=True)
class TokenPrediction(Trained):
    """Of one of our models that predict tokens; `train` has them as labels."""

    @property
    def remarks(self) -> list[str]:
        cut = cut_texts(self.train, "training texts, or what answers them,")
        return [cut] if cut else []

    def outputs(self, model: nn.Module, batch_size: int = 4) -> Any:
        """As of any task, so many windows or sources at a time."""
        raise NotImplementedError

    def finetune(self, model: nn.Module, config: FinetuneConfig, state: Path) -> None:
        training.train_sequences(model, self.train, config, state)

    def recover(
        self,
        model: nn.Module,
        dense: nn.Module,
        recipe: Recipe,
        filter_fn: FilterFn | None,
        state: Path,
        layer_targets: Mapping[str, LayerTarget] | None = None,
    ) -> None:
        training.recover_sequences(model, dense, self.train, recipe.token_recovery, filter_fn, state)


@dataclass(frozen=True)
class NextToken(TokenPrediction):
    """test   windows of tokens, (windows, length) int64"""

    test: Tensor

    def outputs(self, model: nn.Module, batch_size: int = 4) -> Perplexity:
        return judge_windows(model, self.test, batch_size)

    def judge(self, outputs: Perplexity, reference: Perplexity | None = None) -> Perplexity:
        return outputs


@dataclass(frozen=True)
class Answering(TokenPrediction):
    """sources, targets   to judge by
    longest    tokens of an answer
    """

    sources: list[str]
    targets: list[str]
    longest: int

    def outputs(self, model: nn.Module, batch_size: int = 64) -> list[str]:
        return answers(model, self.tokenizer, self.sources, batch_size, max_new_tokens=self.longest)

    def judge(self, outputs: list[str], reference: list[str] | None = None) -> Answers:
        return judge_answers(outputs, self.tokenizer, self.targets, reference)


@dataclass(frozen=True)
class LanguageModelling(Task):
    """train, test   windows of tokens, (windows, length) int64"""

    train: Tensor
    test: Tensor

    def load(self, name: str) -> nn.Module:
        return load_language_model(name)

    def outputs(self, model: nn.Module) -> Perplexity:
        return judge_windows(model, self.test)

    def judge(self, outputs: Perplexity, reference: Perplexity | None = None) -> Perplexity:
        return outputs

    def calibration(self, stage: OneShot) -> list[dict[str, Tensor]]:
        return [{"input_ids": windows} for windows in self.train.split(CALIBRATION_BATCH)]


def cut_texts(data: TokenizedDataset, name: str) -> str:
    """How many texts are cut, as a line for the user; "" for none."""
    return f"{data.cut} of the {len(data)} {name} are cut to {max(data.lengths)} tokens" if data.cut else ""


def read_task(recipe: Recipe, name: str) -> Task:
    """The texts of a recipe, tokenized for the model of that name.

    Raises ValueError for labels that are not the model's, a class without training texts, what `recover_sequences`
    cannot do for a model that predicts tokens, and as `load_table`; ModuleNotFoundError and FileNotFoundError for a
    packaged task that is not there.
    """
    config, tokenizer = load_config(name), load_tokenizer(name)
    if recipe.data is None:
        return Task(tokenizer)
    if recipe.language:
        stage = recipe.one_shot or OneShot()
        fraction = {} if recipe.data.test_fraction is None else {"test_fraction": recipe.data.test_fraction}
        sides = corpora.news_articles(seed=recipe.seed, **fraction)
        train, test = (
            corpora.token_windows(side, tokenizer, stage.length, count, recipe.seed)
            for side, count in zip(sides, (stage.windows, stage.test_windows), strict=True)
        )
        return LanguageModelling(tokenizer, train, test)
    if config.model_type in PREDICTORS:
        return _read_token_task(recipe, config, tokenizer)
    head, training, testing, held_out = _labelled(recipe, config)
    split = split_of(recipe.data, recipe.seed, training, testing)
    if not head.trained and recipe.finetune.when == "never":
        raise UntrainedHead(head.why)
    validation = None
    if recipe.in_rounds:
        training, validation = training.split(HELD_OUT, recipe.seed)
    longest = min(recipe.data.max_length, max_tokens(config, tokenizer) or recipe.data.max_length)
    judging = None if validation is None else tokenize(validation, tokenizer, longest)
    learning, final = (tokenize(side, tokenizer, longest) for side in (training, testing))
    return Classification(tokenizer, learning, held_out, head, judging, final, split=split)


def _read_token_task(recipe: Recipe, config: Any, tokenizer: Any) -> TokenPrediction:
    assert recipe.data is not None
    if recipe.finetune.when == "always":
        raise ValueError("finetune.when: expected needed or never for a model that predicts tokens, got always")
    if recipe.in_rounds or recipe.allocates:
        raise ValueError(
            f"target: expected a sparsity for a model that predicts tokens, got {recipe.target or 'rounds'}"
        )
    if recipe.trains:
        recipe.token_recovery  # noqa: B018 (raises)
    texts = token_texts(recipe.data, config.is_encoder_decoder, recipe.seed)
    task = token_prediction(tokenizer, *texts, recipe.data.max_length, recipe.seed)
    return replace(task, split=split_of(recipe.data, recipe.seed, *texts[:2]))


def split_of(source: Data, seed: int, *sides: TextDataset | TokenTexts) -> Split:
    """What `trained_texts` keeps of training and test texts."""
    train, test = (
        hashes_of(side.texts, side.targets if isinstance(side, TokenTexts) else side.text_pairs) for side in sides
    )
    facts = {name: value for name in ("task", "count", "test_fraction") if (value := getattr(source, name)) is not None}
    facts |= {name: Path(value).name for name in ("train", "test") if (value := getattr(source, name)) is not None}
    facts |= source.columns | {"seed": seed, "training_texts": len(train), "test_texts": len(test)}
    return Split(train, test, source.test is not None, facts)


def token_prediction(
    tokenizer: Any, training: TokenTexts, testing: TokenTexts, held_out: HeldOut, longest: int, seed: int
) -> TokenPrediction:
    """The task of what `token_texts` returns; longest: tokens of a text that has a target, and of the target."""
    if training.targets is None or testing.targets is None:
        learning, final = (text_windows(side.texts, tokenizer, seed=seed) for side in (training, testing))
        return NextToken(tokenizer, predicted_windows(learning), held_out, final)
    pairs = sequence_pairs(training.texts, training.targets, tokenizer, tokenizer, longest)
    return Answering(tokenizer, pairs, held_out, testing.texts, testing.targets, longest)


def token_texts(source: Data, pairs: bool, seed: int) -> tuple[TokenTexts, TokenTexts, HeldOut]:
    """(training texts, test texts, as `labelled_texts`), with targets if `pairs` says so.

    Raises ValueError for a task of the other kind, or tables without text_pair_column where pairs are wanted; as
    `read_task` for the texts.
    """
    if source.train is None:
        if pairs != (source.task in PAIR_TASKS):
            raise ValueError(f"data: expected {'texts and targets' if pairs else 'texts'}, got {source.task}")
        if pairs:
            return *_pronunciations(source, seed), None
        train, test, held_out = labelled_texts(source, seed)
        return TokenTexts(train.texts), TokenTexts(test.texts), held_out
    if pairs and source.text_pair_column is None:
        raise ValueError("text_pair_column: expected that of the targets for an encoder-decoder, got none")
    columns = [source.text_column or "text", *([source.text_pair_column or ""] if pairs else [])]
    table = TokenTexts(*load_columns(source.train, columns))
    if source.test is not None:
        return table, TokenTexts(*load_columns(source.test, columns)), None
    rows = list(range(len(table.texts)))
    random.Random(seed).shuffle(rows)
    count = round(HELD_OUT * len(rows))
    if not 0 < count < len(rows):
        raise ValueError(f"data: expected at least 5 rows, of which some are held out, got {len(rows)}")
    return table.select(rows[count:]), table.select(rows[:count]), (count, len(rows))


def _pronunciations(source: Data, seed: int) -> tuple[TokenTexts, TokenTexts]:
    fraction = HELD_OUT if source.test_fraction is None else source.test_fraction
    train, test = (TokenTexts(*spelled(side)) for side in pronunciations(fraction, seed))
    if source.count is None:
        return train, test
    drawn = round(source.count * fraction / (1 - fraction))
    return train.select(range(min(source.count, len(train.texts)))), test.select(range(min(drawn, len(test.texts))))


def labelled_texts(source: Data, seed: int) -> tuple[TextDataset, TextDataset, HeldOut]:
    """(training texts, test texts, rows held out for testing of how many, where there were no test texts).

    Raises as `read_task` for the texts.
    """
    if source.train is None:
        return *_packaged(source, seed), None
    train = load_table(source.train, **source.columns)
    if source.test is None:
        rows = len(train)
        _check_several(train, source.train)
        if len(train.label_names) == rows:
            raise ValueError(f"labels: expected classes of several texts in {source.train}, got another in every row")
        train, test = train.split(HELD_OUT, seed)
        return train, test, (len(test), rows)
    test = load_table(source.test, **source.columns, label_names=train.label_names)
    _check_several(train, source.train)
    check_split(train, test)
    return train, test, None


def _check_several(train: TextDataset, path: str) -> None:
    if len(train.label_names) < 2:
        raise ValueError(f"labels: expected at least 2 classes in {path}, got only {train.label_names[0]}")


def _labelled(recipe: Recipe, config: Any) -> tuple[Head, TextDataset, TextDataset, HeldOut]:
    """(classes, training texts, test texts, held out), labels indexing the classes."""
    assert recipe.data is not None
    check_head(config)
    train, test, held_out = labelled_texts(recipe.data, recipe.seed)
    head = choose_head(config, train.label_names, recipe.finetune.when == "always")
    return head, train.with_classes(head.names), test.with_classes(head.names), held_out


def _packaged(source: Data, seed: int) -> tuple[TextDataset, TextDataset]:
    fraction = {} if source.test_fraction is None else {"test_fraction": source.test_fraction}
    if source.task == "rotten_tomatoes":
        train, test = corpora.rotten_tomatoes(seed=seed, **fraction)
        if source.count is not None:
            test = test.sample(round(len(test) * source.count / len(train)), seed)
            train = train.sample(source.count, seed)
        return train, test
    if source.task not in LABELLED_TASKS:
        raise ValueError(f"data.task: expected labelled texts, got {source.task}")
    return getattr(corpora, source.task)(seed=seed, count=source.count, path=source.path, **fraction)
