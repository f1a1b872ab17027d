"""What a recipe says. Its sections are the configurations that training and conversion have anyway, and a few more.

A recipe is plain data (`content`: mappings, lists, text, numbers) from which `Recipe.of` builds these dataclasses.
What it leaves out keeps the default of the dataclass; no default is written down twice.
"""

from __future__ import annotations

import hashlib
import json
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import nn

from .. import convert as conversion
from ..allocation import Target
from ..prune import CRITERIA, Block, LayerTarget, Pattern, default_filter, parse_pattern, prunable
from ..prune.layers import FilterFn
from ..prune.masks import SCOPES, check_sparsity
from ..train import FinetuneConfig, IncrementalConfig, PruningConfig, RecoveryConfig, SequenceRecoveryConfig

PRUNING = ("pattern", "sparsity", "criterion", "scope", "layer_targets")
"""Fields of RecoveryConfig that the section `prune` has, for all ways of pruning."""

HIDDEN: dict[type, tuple[str, ...]] = {
    FinetuneConfig: ("seed",),
    RecoveryConfig: (*PRUNING, "seed"),
    conversion.SparsifyConfig: ("threads", "cost_model", "inputs", "evaluate"),
}
"""Fields that a recipe does not give in the section of that class (or of one derived from it)."""


_WORDNET = ("supersense", "word_definitions", "sibling_definitions")
LABELLED_TASKS = ("rotten_tomatoes", *_WORDNET)
PAIR_TASKS = ("pronunciations",)
"""Of sources and targets, for encoder-decoders."""
_ONLY_FOR = {"path": _WORDNET, "count": (*LABELLED_TASKS, *PAIR_TASKS)}


@dataclass(frozen=True, kw_only=True)
class Data:
    """Texts to train on and to judge by: a packaged task, or tables.

    task           instead of tables; "news_articles" is for language models, "pronunciations" (letters of words and
                   phonemes) for encoder-decoders, the others are classes to tell apart
    count          training texts of the task to draw, and test texts in proportion; None for all
    test_fraction  of the task's texts; None for the task's own default
    path           of WordNet's data.noun; None for where Debian has it
    train, test    .csv, .tsv or .jsonl files, relative to the current directory; without `test` a tenth of `train`
                   is held out
    text_column, label_column, text_pair_column   of the tables; None for the defaults of `load_table`. A language
                   model reads only the first, an encoder-decoder answers the first with the last
    max_length     longer texts are cut to this many tokens
    """

    task: (
        Literal[
            "rotten_tomatoes",
            "supersense",
            "word_definitions",
            "sibling_definitions",
            "news_articles",
            "pronunciations",
        ]
        | None
    ) = None
    count: int | None = None
    test_fraction: float | None = None
    path: str | None = None
    train: str | None = None
    test: str | None = None
    text_column: str | None = None
    label_column: str | None = None
    text_pair_column: str | None = None
    max_length: int = 256

    def __post_init__(self) -> None:
        if (self.task is None) == (self.train is None):
            raise ValueError(f"expected either task or train, got {'neither' if self.task is None else 'both'}")
        of_task = ("count", "test_fraction", "path")
        of_table = ("test", "text_column", "label_column", "text_pair_column")
        for name in of_table if self.train is None else of_task:
            if getattr(self, name) is not None:
                raise ValueError(f"{name}: expected none beside {'task' if self.train is None else 'train'}, got one")
        for name, tasks in _ONLY_FOR.items():
            if getattr(self, name) is not None and self.task not in tasks:
                raise ValueError(f"{name}: expected none beside task {self.task}, got one")
        for name, least in (("count", 1), ("max_length", 2)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        if self.test_fraction is not None and not 0 < self.test_fraction < 1:
            raise ValueError(f"test_fraction: expected a fraction between 0 and 1, got {self.test_fraction}")

    @property
    def columns(self) -> dict[str, str]:
        """Arguments of `load_table` for those that were named."""
        names = ("text_column", "label_column", "text_pair_column")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class FinetuneStage(FinetuneConfig):
    """Training of the dense model on the labels (see FinetuneConfig for the rest).

    when   "needed": where the model has no trained head for these classes; "always"; "never"
    """

    when: Literal["needed", "always", "never"] = "needed"


@dataclass(frozen=True, kw_only=True)
class Structured:
    """Heads, neurons or layers that are removed before weights are pruned.

    fraction   of them, those that score lowest; the rest as in `prune_structures_`, whose defaults None stands for
    layers     instead of a fraction, for kind "layers": which, by number
    """

    kind: Literal["heads", "neurons", "layers"]
    fraction: float | None = None
    layers: tuple[int, ...] | None = None
    scope: str | None = None
    criterion: str | None = None
    reduction: str | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.layers is None):
            raise ValueError(f"expected either fraction or layers, got {'neither' if self.layers is None else 'both'}")
        if self.layers is not None and self.kind != "layers":
            raise ValueError(f"layers: expected kind layers beside it, got {self.kind}")
        if self.fraction is not None and not 0 < self.fraction < 1:
            raise ValueError(f"fraction: expected a fraction between 0 and 1, got {self.fraction}")
        if self.criterion is not None and self.criterion not in CRITERIA:
            raise ValueError(f"criterion: expected one of {', '.join(CRITERIA)}, got {self.criterion}")


@dataclass(frozen=True, kw_only=True)
class PruneRule:
    """Which weights go, in whatever way of pruning.

    pattern, sparsity, criterion, scope, layer_targets   as in PruningConfig, whose defaults None stands for; but
                 without a scope that of the criterion, and without data the criterion "magnitude"; sparsity 0
                 for a model that only loses whole structures
    layers       names of the layers to prune, with * and ?; None for all. Heads, poolers and embeddings only by their
                 full names
    """

    pattern: Pattern = PruningConfig.pattern
    sparsity: float | None = None
    criterion: str | None = None
    scope: str | None = None
    layers: tuple[str, ...] | None = None
    layer_targets: Mapping[str, LayerTarget] | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity: expected a fraction from 0 to below 1, got {self.sparsity}")
        for name, known in (("criterion", CRITERIA), ("scope", SCOPES)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value}")
        if self.layer_targets is not None and (self.sparsity, self.layers) != (None, None):
            raise ValueError("layer_targets: expected neither sparsity nor layers beside it, got one of them")

    def filter_fn(self, model: nn.Module) -> FilterFn | None:
        """What `layers` selects of the model, as `prune_` takes it. Raises ValueError for a name that it has not."""
        wanted = self.layers
        if wanted is None:
            return None
        names, every = [*prunable(model)], {*prunable(model, lambda module, name: True)}
        for name in wanted:
            if name not in every and not any(fnmatchcase(each, name) for each in names):
                raise ValueError(f"prune.layers: expected layers of {type(model).__name__}, as {names[0]}, got {name}")
        return lambda module, name: (
            name in wanted or (default_filter(module, name) and any(fnmatchcase(name, each) for each in wanted))
        )


@dataclass(frozen=True, kw_only=True)
class OneShot:
    """Pruning at once, without training.

    solver    "prune": by the criterion alone; the others a block of the model at a time, on calibration texts
    dampening of `sparsegpt_` and `exact_obs_`, whose defaults None stands for
    block_size, refine_steps   of `sparsegpt_`, likewise
    windows, test_windows, length   for a language model: how many to calibrate on and to judge by; tokens of each
    examples  for a classifier: training texts to calibrate on
    """

    solver: Literal["prune", "sparsegpt", "exact_obs", "wanda"] = "prune"
    dampening: float | None = None
    block_size: int | None = None
    refine_steps: int | None = None
    windows: int = 128
    test_windows: int = 32
    length: int = 256
    examples: int = 512

    def __post_init__(self) -> None:
        taken = {"sparsegpt": ("dampening", "block_size", "refine_steps"), "exact_obs": ("dampening",)}
        for name in ("dampening", "block_size", "refine_steps"):
            if getattr(self, name) is not None and name not in taken.get(self.solver, ()):
                raise ValueError(f"{name}: expected none beside solver {self.solver}, got one")
        for name in ("windows", "test_windows", "length", "examples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A model, and what is done to it, in this order: finetune, structured, one way to prune, convert.

    model      dense: a directory, a hub id, or "minilm" for the packaged one
    data       None prunes at once by the weights alone
    seed       of the split, the batches and random pruning
    structured what is removed whole
    prune      which weights go
    recover    gradual pruning in one pass of training with distillation; what is done where none of the three is said
    rounds     or in rounds, each judged on a tenth of the training texts that is kept out
    one_shot   or at once
    target     "sparsity 0.9", "2x faster", "latency <= 8 ms" (on this machine, for an input of the first of
               convert.token_counts), or "accuracy drop <= 1 point", for which there are rounds
    convert    how layers become sparse
    content    what all this was built from

    Raises ValueError for sections that exclude each other.
    """

    model: str
    data: Data | None = None
    seed: int = FinetuneConfig.seed
    finetune: FinetuneStage = FinetuneStage()
    structured: tuple[Structured, ...] = ()
    prune: PruneRule = PruneRule()
    recover: RecoveryConfig | None = None
    rounds: IncrementalConfig | None = None
    one_shot: OneShot | None = None
    target: str | None = None
    convert: conversion.SparsifyConfig = field(default_factory=lambda: conversion.SparsifyConfig())
    content: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, content: Mapping[str, Any]) -> Recipe:
        """From plain data. Raises ValueError for values out of range; `schema.validate` also checks types and keys."""
        return build(cls, {**content, "content": content})

    @property
    def sha256(self) -> str:
        """Of the content as JSON with sorted keys: comments, order and layout of the file do not change it.

        What is left out is not hashed, so a default that is written out gives another digest.
        """
        text = json.dumps(self.content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def with_defaults(self, sections: Mapping[str, Any]) -> Recipe:
        """This recipe for a model that has defaults of its own; `content` stays what was said.

        sections  `prune` and `recover` as a recipe has them; what this one says goes before them

        One that was not built by `of` stays as it is: what it leaves open cannot be told.
        """
        if not self.content:
            return self
        content = dict(self.content)
        rule = dict(sections.get("prune", {}))
        if self.target is not None or self.rounds is not None or self.prune.layer_targets is not None:
            rule.pop("sparsity", None)
        content["prune"] = rule | (content.get("prune") or {})
        if self.trains and not self.in_rounds:
            content["recover"] = dict(sections.get("recover", {})) | (content.get("recover") or {})
        return replace(Recipe.of(content), content=self.content)

    def __post_init__(self) -> None:
        ways = [name for name in ("recover", "rounds", "one_shot") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"{ways[0]}: expected one of recover, rounds and one_shot, got {' and '.join(ways)}")
        if self.data is None and ways != ["one_shot"]:
            raise ValueError(f"data: expected some for {ways[0] if ways else 'recover'}, got none")
        if self.trains and self.language:
            raise ValueError("one_shot: expected it for a language model, which is not trained, got none")
        if self.language and (self.finetune.when == "always" or any(_needs(s.criterion) for s in self.structured)):
            raise ValueError("data.task: expected labelled texts for finetune and gradients, got news_articles")
        if self.prune.sparsity == 0 and not self.structured:
            raise ValueError("prune.sparsity: expected more than 0 where nothing is removed whole, got 0")
        self._check_target()
        self._check_criteria()
        if self.in_rounds:
            self.incremental()
        elif self.trains:
            self.recovery()
        else:
            check_sparsity(self.prune.pattern, self.sparsity)

    def _check_target(self) -> None:
        if self.target is None:
            if self.rounds is not None and self.prune.sparsity is not None:
                raise ValueError("prune.sparsity: expected none beside rounds, which have sparsities, got one")
            return
        kind = Target.parse(self.target).kind
        if self.prune.sparsity is not None:
            raise ValueError("prune.sparsity: expected none beside target, got one")
        if self.prune.layer_targets is not None:
            raise ValueError("prune.layer_targets: expected none beside target, got some")
        if kind == "drop" and (self.recover is not None or self.one_shot is not None):
            raise ValueError("target: expected a drop with rounds alone, got recover or one_shot")
        if kind != "drop" and self.rounds is not None:
            raise ValueError(f"target: expected a drop with rounds, got {self.target}")
        if kind == "speedup" and self.structured:
            raise ValueError(f"target: expected a latency or sparsity beside structured, got {self.target}")
        if self.allocates and self.one_shot is not None:
            raise ValueError(f"target: expected a sparsity with one_shot, got {self.target}")

    def _check_criteria(self) -> None:
        solver = self.one_shot.solver if self.one_shot else ""
        if solver not in ("", "prune"):
            if self.data is None:
                raise ValueError(f"data: expected some for {solver}, got none")
            if self.prune.criterion or self.prune.scope or self.prune.layer_targets:
                raise ValueError(f"prune: expected no criterion, scope or layer_targets beside solver {solver}")
            if solver == "exact_obs" and not isinstance(self.prune.pattern, Block):
                raise ValueError(f"prune.pattern: expected blocks such as 8x1 for exact_obs, got {self.prune.pattern}")
        elif (self.data is None or self.language) and _needs(self.criterion):
            raise ValueError(f"prune.criterion: expected labelled texts for {self.criterion}, got none")
        if self.data is None and any(_needs(stage.criterion) for stage in self.structured):
            raise ValueError("structured: expected labelled texts for its criterion, got none")
        loses_layers = any(stage.kind == "layers" for stage in self.structured)
        weight = max((phase.hidden_weight for phase in self.training_phases), default=0.0)
        if loses_layers and weight > 0:
            raise ValueError(
                f"{'rounds' if self.in_rounds else 'recover'}: expected hidden_weight 0 where layers are removed, "
                f"as hidden states do not correspond then, got {weight}"
            )

    @property
    def language(self) -> bool:
        """Whether the model is a language model, not a classifier."""
        return self.data is not None and self.data.task == "news_articles"

    @property
    def trains(self) -> bool:
        """Whether weights go while the model trains."""
        return self.one_shot is None

    @property
    def criterion(self) -> str:
        return self.prune.criterion or ("magnitude" if self.data is None or self.language else PruningConfig.criterion)

    @property
    def scope(self) -> str:
        return self.prune.scope or CRITERIA[self.criterion].scope

    @property
    def wanted(self) -> Target | None:
        return None if self.target is None else Target.parse(self.target)

    @property
    def sparsity(self) -> float:
        """Where one is said, or nothing else."""
        wanted = self.wanted
        if wanted is not None and wanted.kind == "sparsity":
            return wanted.value
        return PruningConfig.sparsity if self.prune.sparsity is None else self.prune.sparsity

    @property
    def allocates(self) -> bool:
        """Whether each layer gets a sparsity of its own, so that the model meets a time."""
        wanted = self.wanted
        return wanted is not None and wanted.kind in ("speedup", "latency")

    @property
    def in_rounds(self) -> bool:
        return self.rounds is not None or (self.wanted is not None and self.wanted.kind == "drop")

    @property
    def training_phases(self) -> tuple[RecoveryConfig, ...]:
        if self.in_rounds:
            rounds = self.rounds or IncrementalConfig()
            return rounds.growing, rounds.recovering
        return (self.recover or RecoveryConfig(),) if self.trains else ()

    def recovery(self, layer_targets: Mapping[str, LayerTarget] | None = None) -> RecoveryConfig:
        """What `recover` takes; with layer_targets, such as an allocation's, these instead of one sparsity."""
        targets = layer_targets or self.prune.layer_targets
        sparsity = 0.0 if targets is not None or self.allocates else self.sparsity
        return self._phase(self.recover or RecoveryConfig(), sparsity, targets)

    @property
    def token_recovery(self) -> SequenceRecoveryConfig:
        """What `recover_sequences` takes. Raises ValueError for what that cannot do."""
        given, without = self.recovery(), RecoveryConfig()
        shared = {f.name for f in fields(SequenceRecoveryConfig)}
        for name in (f.name for f in fields(RecoveryConfig) if f.name not in shared):
            neutral = 0.0 if name in ("hidden_weight", "spliced") else getattr(without, name)
            if getattr(given, name) != neutral:
                raise ValueError(
                    f"recover.{name}: expected {neutral} for a model that predicts tokens, got {getattr(given, name)}"
                )
        return SequenceRecoveryConfig(**{name: getattr(given, name) for name in shared})

    def incremental(self, least_metric: float | None = None) -> IncrementalConfig:
        """What `prune_incrementally` takes."""
        rounds = self.rounds or IncrementalConfig()
        growing, recovering = (
            self._phase(phase, rounds.sparsities[-1]) for phase in (rounds.growing, rounds.recovering)
        )
        least = rounds.least_metric if least_metric is None else least_metric
        return replace(rounds, growing=growing, recovering=recovering, least_metric=least)

    def _phase(
        self, phase: RecoveryConfig, sparsity: float, layer_targets: Mapping[str, LayerTarget] | None = None
    ) -> RecoveryConfig:
        rule: dict[str, Any] = {"pattern": self.prune.pattern, "criterion": self.criterion, "scope": self.scope}
        return replace(phase, **rule, sparsity=sparsity, layer_targets=layer_targets, seed=self.seed)


def build(cls: type, content: Mapping[str, Any], default: Any = None) -> Any:
    """A dataclass from plain data, the sections inside it too; what is left out is as in `default` or the class."""
    hints = typing.get_type_hints(cls)
    defaults = {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(cls)}
    values = {name: _value(hints[name], value, defaults[name]) for name, value in content.items()}
    return cls(**values) if default is None else replace(default, **values)


def hidden(cls: type) -> set[str]:
    """Names of the fields that recipes do not give."""
    return {name for base, names in HIDDEN.items() if issubclass(cls, base) for name in names}


def unwrapped(hint: Any) -> Any:
    """X of `X | None`, other hints as they are."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _value(hint: Any, value: Any, default: Any) -> Any:
    hint = unwrapped(hint)
    arguments, origin = typing.get_args(hint), typing.get_origin(hint)
    if value is None:
        return None
    if hint is Pattern:
        return parse_pattern(value)
    if is_dataclass(hint):
        return build(typing.cast(type, hint), value, default if isinstance(default, hint) else None)  # type: ignore[arg-type]
    if origin in (tuple, Sequence):
        return tuple(_value(arguments[0], each, None) for each in value)
    if origin is Mapping and is_dataclass(arguments[1]):
        return {name: _value(arguments[1], each, None) for name, each in value.items()}
    return value


def _needs(criterion: str | None) -> bool:
    """Whether it needs statistics."""
    return criterion is not None and bool(CRITERIA[criterion].needs)
