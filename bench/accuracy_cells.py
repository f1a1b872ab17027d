"""The cells of bench/accuracy.py: a dense classifier, or one made from it, trained on a task with a seed and judged.

A seed decides the split into training and test texts, the batches and dropout. Nothing is chosen by the test texts.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsenlp.allocation import allocate_to_target
from sparsenlp.benchmark import Setting, random_inputs
from sparsenlp.classifiers import judge, load_model, load_tokenizer
from sparsenlp.data import (
    TextDataset,
    TokenizedDataset,
    load_table,
    minilm_directory,
    rotten_tomatoes,
    shuffled_batches,
    supersense,
    tokenize,
)
from sparsenlp.measure import cpu_model
from sparsenlp.prune import GradientStatistics, Pattern, finalize_, parse_pattern, prunable, remove_layers_
from sparsenlp.train import CachedTeacher, FinetuneConfig, RecoveryConfig, finetune, predict, recover, training_texts

TASKS = ("rotten_tomatoes", "supersense")

Row = dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """What all cells share.

    texts     of supersense to train on; a quarter as many test texts
    wordnet   data.noun, None where Debian has it
    setting   input that adaptive allocation is to be fast for
    threads   at which its speed counts; training has one
    tiny      directory of a model and texts.csv in place of the real ones
    """

    finetuning: FinetuneConfig = field(default=FinetuneConfig())
    recovery: RecoveryConfig = field(default=RecoveryConfig())
    max_length: int = 128
    texts: int = 5_000
    wordnet: Path | None = None
    setting: Setting = field(default=Setting(16, 64))
    threads: int = 2
    tiny: Path | None = None

    def load(self, task: str, seed: int) -> tuple[TextDataset, TextDataset]:
        """(training texts, test texts). Raises as the loaders do where a package or file is absent."""
        if self.tiny is not None:
            return load_table(self.tiny / "texts.csv").split(test_fraction=0.25, seed=seed)
        if task == "supersense":
            return supersense(seed=seed, count=self.texts, path=self.wordnet)
        return rotten_tomatoes(seed=seed)

    @property
    def model(self) -> str:
        return str(self.tiny or minilm_directory())


class Method(Protocol):
    """A way from a dense model to a cheaper one.

    label    names it in tables and files
    family   the label without how much is removed: a line in the plot
    """

    @property
    def label(self) -> str: ...

    @property
    def family(self) -> str: ...

    def shape_(self, model: nn.Module) -> nn.Module:
        """Give a copy of the dense model the shape of this method's result, in place; returns it."""

    def train(self, dense: nn.Module, data: TokenizedDataset, setup: Setup, seed: int) -> nn.Module:
        """The result: an ordinary float32 model."""


class _SameShape:
    def shape_(self, model: nn.Module) -> nn.Module:
        return model


@dataclass(frozen=True)
class Dense(_SameShape):
    """The encoder fine-tuned on the labels."""

    label = family = "dense"

    def train(self, dense: nn.Module, data: TokenizedDataset, setup: Setup, seed: int) -> nn.Module:
        finetune(dense, data, replace(setup.finetuning, seed=seed), quiet=True)
        return dense


@dataclass(frozen=True)
class Pruned(_SameShape):
    """`recover` to a sparsity; the default recipe but for what is named here."""

    pattern: str
    criterion: str
    scope: str
    sparsity: float

    @property
    def family(self) -> str:
        return f"{self.pattern}-{self.criterion}-{self.scope}"

    @property
    def label(self) -> str:
        return f"{self.family}-{100 * self.sparsity:.0f}"

    def train(self, dense: nn.Module, data: TokenizedDataset, setup: Setup, seed: int) -> nn.Module:
        pattern: Pattern = parse_pattern(self.pattern)
        settings = {"pattern": pattern, "criterion": self.criterion, "scope": self.scope, "sparsity": self.sparsity}
        model = copy.deepcopy(dense)
        recover(model, dense, data, replace(setup.recovery, **settings, seed=seed), quiet=True)
        return finalize_(model)


@dataclass(frozen=True)
class Layers:
    """The first layers of the dense model, then the same distillation (Sajjad et al. 2023, arXiv:2004.03844).

    The dense layers are divided into as many groups of neighbours, and each layer that stays learns the hidden
    states in which its group ends.
    """

    kept: int
    family = "layers"

    @property
    def label(self) -> str:
        return f"layers-{self.kept}"

    def shape_(self, model: nn.Module) -> nn.Module:
        return remove_layers_(model, range(self.kept, layers_of(model)))

    def train(self, dense: nn.Module, data: TokenizedDataset, setup: Setup, seed: int) -> nn.Module:
        model = self.shape_(copy.deepcopy(dense))
        total = layers_of(dense)
        ends = [round((i + 1) * total / self.kept) - 1 for i in range(self.kept)]
        # Sparsity 0: masks without zeros, so that this is the loop that all others go through.
        settings = {"sparsity": 0.0, "criterion": "magnitude", "ramp_fraction": 0.0}
        config = replace(setup.recovery, **settings, seed=seed)
        teacher = GroupTeacher(CachedTeacher(dense, training_texts(data, config), quiet=True), ends)
        recover(model, teacher, data, config, quiet=True)
        return finalize_(model)


@dataclass(frozen=True)
class GroupTeacher:
    """A teacher of whose hidden states only some are learned."""

    teacher: CachedTeacher
    states: Sequence[int]

    def outputs(self, indices: Sequence[int]) -> tuple[Tensor, list[Tensor]]:
        logits, states = self.teacher.outputs(indices)
        return logits, [states[i] for i in self.states]


@dataclass(frozen=True)
class Allocated(_SameShape):
    """A sparsity for each layer by `allocate_to_target`, with Taylor scores of the dense model, then `recover`."""

    target: str
    pattern: str = "8x1"

    @property
    def family(self) -> str:
        return f"{self.pattern}-allocated"

    @property
    def label(self) -> str:
        return f"{self.family}-{self.target.replace(' ', '-')}"

    def train(self, dense: nn.Module, data: TokenizedDataset, setup: Setup, seed: int) -> nn.Module:
        inputs = random_inputs(dense, setup.setting)
        scores = taylor_scores(dense, data, seed)
        patterns = (parse_pattern(self.pattern),)
        chosen = allocate_to_target(
            dense, self.target, inputs, "taylor", scores, patterns=patterns, threads=setup.threads
        )
        model = copy.deepcopy(dense)
        settings = {"layer_targets": chosen.targets, "criterion": "taylor"}
        recover(model, dense, data, replace(setup.recovery, **settings, seed=seed), quiet=True)
        return finalize_(model)


SCORE_BATCHES = 50
"""Batches that Taylor scores for an allocation are taken over."""


def taylor_scores(model: nn.Module, data: TokenizedDataset, seed: int) -> GradientStatistics:
    """Means of |w * dL/dw| of the cross-entropy on some training texts; the model stays as it is."""
    statistics = GradientStatistics(prunable(model), decay=None)
    for indices in shuffled_batches(data.lengths, 32, seed, 0)[:SCORE_BATCHES]:
        F.cross_entropy(model(**data.batch(indices)).logits, data.labels[indices]).backward()
        statistics.update()
        model.zero_grad()
    return statistics


@dataclass(frozen=True)
class Cell:
    """One run; `name` also says where its record is."""

    task: str
    method: Method
    seed: int

    @property
    def name(self) -> str:
        return f"{self.task}/{self.method.label}/{self.seed}"

    @property
    def dense(self) -> Cell:
        """The run whose model this one starts from."""
        return replace(self, method=Dense())

    @property
    def is_dense(self) -> bool:
        return isinstance(self.method, Dense)

    @property
    def is_timed(self) -> bool:
        """Whether it measures time, and so wants the machine for itself."""
        return isinstance(self.method, Allocated)


class Workbench:
    """Texts and untrained model of a task and seed."""

    def __init__(self, cell: Cell, setup: Setup) -> None:
        train, test = setup.load(cell.task, cell.seed)
        tokenizer = load_tokenizer(setup.model)
        self.names = train.label_names
        self.setup = setup
        self.train, self.test = (tokenize(texts, tokenizer, setup.max_length) for texts in (train, test))

    @cached_property
    def fresh(self) -> nn.Module:
        """The encoder with a head for the task, not trained yet."""
        return load_model(self.setup.model, self.names)


def run_cell(cell: Cell, bench: Workbench, dense: nn.Module) -> tuple[nn.Module, Row]:
    """(trained model, what came out): `dense` is the fine-tuned model, or for a dense cell one to fine-tune.

    seconds      of all that makes the model from `dense`: the teacher's outputs, allocation, training
    cpu_seconds  the same on all threads, without waiting for others on a busy machine
    sparsity     share of the dense model's prunable weights that is zero or gone
    """
    total = sum(layer.weight.numel() for layer in prunable(dense).values())
    started = time.perf_counter(), time.process_time()
    model = cell.method.train(dense, bench.train, bench.setup, cell.seed)
    seconds, cpu_seconds = time.perf_counter() - started[0], time.process_time() - started[1]
    left = sum(int(layer.weight.count_nonzero()) for layer in prunable(model).values())
    logits = predict(model, bench.test)
    reference = logits if cell.is_dense else predict(dense, bench.test)
    return model, {
        "task": cell.task,
        "label": cell.method.label,
        "family": cell.method.family,
        "seed": cell.seed,
        "sparsity": 1 - left / total,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "training_threads": torch.get_num_threads(),
        "training_cpu": cpu_model(),
        "training_texts": len(bench.train),
        **judge(logits, bench.test.labels, reference).as_dict(),
    }


def layers_of(model: Any) -> int:
    return int(model.config.num_hidden_layers)
