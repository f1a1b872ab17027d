"""What a demonstration is made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

from ..benchmark import Setting
from ..data.demo import CORPUS_PACKAGE, ENCODER_PACKAGE, INSTALL


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides the results.

    targets            sparsities to prune to
    model              directory of a dense encoder; None for the packaged MiniLM-L6
    data               table with the columns text and label; None for the packaged rotten_tomatoes
    train_examples     at most so many are trained on, None for all; test_examples alike
    finetune_epochs    of the dense model, with finetune_rate as peak learning rate
    recover_epochs     of pruning and recovering
    max_length         tokens that a text is cut to
    batches, lengths   latency is measured for each combination
    baselines          dense ways to run the model, names in benchmark.BASELINES; with "compiled fp32" the
                       sparse models are compiled, too
    seconds            of timing for each combination
    measure_seconds    of timing for each layer and token count at conversion
    threads            of evaluation and timing; training divides them among the targets
    """

    targets: tuple[float, ...] = (0.8, 0.9)
    model: str | None = None
    data: str | None = None
    train_examples: int | None = None
    test_examples: int | None = None
    finetune_epochs: int = 3
    finetune_rate: float = 5e-5
    recover_epochs: int = 3
    max_length: int = 128
    batches: tuple[int, ...] = (1, 16)
    lengths: tuple[int, ...] = (16, 128)
    baselines: tuple[str, ...] = ("eager fp32", "eager bf16", "compiled fp32", "dynamic int8")
    seconds: float = 5.0
    measure_seconds: float = 0.1
    threads: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.targets or not all(0.3 <= target < 1 for target in self.targets):
            raise ValueError(f"targets: expected sparsities in [0.3, 1), got {list(self.targets)}")
        if len({percent(target) for target in self.targets}) < len(self.targets):
            raise ValueError(f"targets: expected sparsities that differ by a percent, got {list(self.targets)}")

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Inputs to time, short texts first."""
        return tuple(Setting(batch, tokens) for tokens in self.lengths for batch in self.batches)

    @property
    def token_counts(self) -> tuple[int, ...]:
        """Rows of a layer's input at each setting."""
        return tuple(sorted({setting.batch * setting.tokens for setting in self.settings}))

    @property
    def is_subset(self) -> bool:
        return self.train_examples is not None or self.test_examples is not None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def read(cls, path: Path) -> DemoConfig:
        """From the JSON of `as_dict`."""
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        lists: dict[str, Any] = {name: tuple(value) for name, value in data.items() if isinstance(value, list)}
        return cls(**data | lists)


def full(targets: tuple[float, ...] = (0.8, 0.9), threads: int = 2) -> DemoConfig:
    """All of the data; about a quarter of an hour on two cores."""
    return DemoConfig(targets=targets, threads=threads)


def quick(targets: tuple[float, ...] = (0.8, 0.9), threads: int = 2) -> DemoConfig:
    """A subset and no compiled baselines; about three minutes on two cores."""
    return replace(
        full(targets, threads),
        train_examples=1200,
        test_examples=500,
        finetune_epochs=2,
        baselines=("eager fp32", "eager bf16", "dynamic int8"),
        seconds=3.0,
        measure_seconds=0.02,
    )


def check_packages(config: DemoConfig) -> None:
    """Raise ModuleNotFoundError with the command that helps if the packaged model or data are needed and absent."""
    for needed, package in ((config.model is None, ENCODER_PACKAGE), (config.data is None, CORPUS_PACKAGE)):
        if needed:
            try:
                distribution(package)
            except PackageNotFoundError:
                raise ModuleNotFoundError(f"demo: expected the package {package}, got none; {INSTALL}") from None


def percent(target: float) -> str:
    """0.9 -> "90"; names files and rows."""
    return f"{100 * target:.0f}"
