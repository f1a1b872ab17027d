"""Pruning in rounds, each judged before the next: evaluate, select, prune, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from ..data import TokenizedDataset
from ..prune import sparsity_of
from ..prune.layers import FilterFn
from .config import RecoveryConfig
from .distill import Teacher
from .gradual import add_masks_
from .recover import recover
from .state import model_tensors, restore_model

Metric = Callable[[nn.Module], float]


@dataclass(frozen=True, kw_only=True)
class IncrementalConfig:
    """The alternation of two phases in each round.

    sparsities     of the rounds, rising
    growing        how the pruned range grows, while what remains is frozen to a small learning rate
    recovering     how the model recovers from it, at a larger one; its masks stay
    least_metric   a round that ends below it is undone, and is the last
    seconds        no round begins after so much time
    patience       rounds in a row without a better metric after which it stops; None: never
    """

    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95)
    growing: RecoveryConfig = field(
        default_factory=lambda: RecoveryConfig(epochs=1, learning_rate=3e-5, ramp_fraction=0.8)
    )
    recovering: RecoveryConfig = field(default_factory=lambda: RecoveryConfig(epochs=1, learning_rate=3e-4))
    least_metric: float | None = None
    seconds: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.sparsities, self.sparsities[1:], strict=False))
        if not self.sparsities or not rising or not self.sparsities[0] > 0 or not self.sparsities[-1] < 1:
            raise ValueError(f"sparsities: expected fractions in (0, 1) that rise, got {tuple(self.sparsities)}")
        if self.growing.layer_targets is not None or self.recovering.layer_targets is not None:
            raise ValueError("layer_targets: expected None, as each round has one sparsity, got some")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"seconds: expected a positive number, got {self.seconds}")
        if self.patience is not None and self.patience < 1:
            raise ValueError(f"patience: expected at least 1, got {self.patience}")


@dataclass(frozen=True)
class Round:
    """What a round came to; `kept` is False for one that was undone.

    sparsity  measured
    metric    after recovery
    seconds   since the first round began
    """

    sparsity: float
    metric: float
    seconds: float
    kept: bool


@dataclass(frozen=True)
class IncrementalLog:
    """dense   metric of the model before the first round
    rounds  in order
    reason  why it ended
    """

    dense: float
    rounds: tuple[Round, ...]
    reason: str

    @property
    def last_kept(self) -> Round | None:
        """The state in which the model is; None: it is dense."""
        return next((r for r in reversed(self.rounds) if r.kept), None)


def prune_incrementally(
    model: nn.Module,
    teacher: nn.Module | Teacher,
    data: TokenizedDataset,
    metric: Metric,
    config: IncrementalConfig | None = None,
    filter_fn: FilterFn | None = None,
    quiet: bool = False,
    on_round: Callable[[Round], None] | None = None,
) -> IncrementalLog:
    """Prune a classifier as far as its metric allows, in place; it ends in its last good state, with masks.

    In each round the pruned range grows at a small learning rate, so that the weights that stay hold still, and
    then the model recovers at a larger one (the alternation of Zhu & Gupta 2017, arXiv:1710.01878, taken in rounds
    as in Han et al. 2015, arXiv:1506.02626). A round that ends below `least_metric` is rolled back.

    model, teacher, data, filter_fn   as in `recover`
    metric   model -> a number, the higher the better, on texts that are not in `data`

    Raises as `recover`; then, and on Ctrl-C, the model is in its last good state, the dense one with masks without
    zeros if there is none.
    """
    config = config or IncrementalConfig()
    started = time.perf_counter()
    dense = metric(model)
    rounds: list[Round] = []
    add_masks_(model, config.growing, filter_fn)
    good = _state(model)
    stale, best = 0, dense
    reason = "all sparsities reached"
    for sparsity in config.sparsities:
        spent = time.perf_counter() - started
        if config.seconds is not None and spent >= config.seconds:
            reason = f"out of time after {spent:.0f} s"
            break
        try:
            _round(model, teacher, data, config, sparsity, filter_fn, quiet)
            value = metric(model)
        except BaseException:
            restore_model(model, good)
            raise
        kept = config.least_metric is None or value >= config.least_metric
        zeros = sparsity_of(model, filter_fn)
        rounds.append(Round(zeros, value, time.perf_counter() - started, kept))
        if on_round is not None:
            on_round(rounds[-1])
        if not kept:
            restore_model(model, good)
            reason = f"{value:.4f} at {zeros:.1%} zeros is below {config.least_metric:.4f}"
            break
        good = _state(model)
        stale, best = (0, value) if value > best else (stale + 1, best)
        if config.patience is not None and stale >= config.patience:
            reason = f"no better metric in {stale} rounds"
            break
    return IncrementalLog(dense, tuple(rounds), reason)


def _round(
    model: nn.Module,
    teacher: nn.Module | Teacher,
    data: TokenizedDataset,
    config: IncrementalConfig,
    sparsity: float,
    filter_fn: FilterFn | None,
    quiet: bool,
) -> None:
    growing = replace(config.growing, sparsity=sparsity)
    recovering = replace(config.recovering, sparsity=sparsity, ramp_fraction=0.0)  # all its zeros are there already
    for phase in (growing, recovering):
        recover(model, teacher, data, phase, filter_fn, quiet=quiet)


def _state(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and masks."""
    return {name: tensor.clone() for name, tensor in model_tensors(model).items()}
