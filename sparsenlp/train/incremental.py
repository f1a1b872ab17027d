"""Pruning in rounds, each judged before the next: evaluate, select, prune, evaluate."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..data import TokenizedDataset
from ..prune import sparsity_of
from ..prune.layers import FilterFn, prunable
from .config import RecoveryConfig
from .distill import Teacher
from .gradual import add_masks_
from .recover import recover
from .state import (
    MODEL,
    SavedState,
    check_state,
    check_tensors,
    identity_of,
    model_tensors,
    read_state,
    restore_model,
    write_state,
)

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
    seconds   since the first round began, not counting pauses
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
    state_path: str | Path | None = None,
) -> IncrementalLog:
    """Prune a classifier as far as its metric allows, in place; it ends in its last good state, with masks.

    In each round the pruned range grows at a small learning rate, so that the weights that stay hold still, and
    then the model recovers at a larger one (the alternation of Zhu & Gupta 2017, arXiv:1710.01878, taken in rounds
    as in Han et al. 2015, arXiv:1506.02626). A round that ends below `least_metric` is rolled back.

    model, teacher, data, filter_fn   as in `recover`
    metric   model -> a number, the higher the better, on texts that are not in `data`
    on_round   called after each round
    state_path   file to resume from if it exists, written after each round: the rounds in it are not done
                 again, and the result is that of a run without a pause. The caller deletes it when the result is safe

    Raises as `recover`; then, and on Ctrl-C, the model is in its last good state, the dense one with masks
    without zeros if there is none. Raises ValueError, with the model untouched, for a state file of another run.
    """
    config = config or IncrementalConfig()
    path = None if state_path is None else Path(state_path)
    identity = identity_of((config, tuple(prunable(model, filter_fn))), data, model)
    if path is not None:
        check_state(path, identity)
    add_masks_(model, config.growing, filter_fn)
    saved = None if path is None else read_state(path, identity)
    rounds: list[Round] = []
    if saved is None:
        dense = metric(model)
    else:
        dense, rounds = _history(saved)
        restore_model(model, saved.tensors)
    started = time.perf_counter() - (rounds[-1].seconds if rounds else 0.0)
    good = _state(model)
    while (reason := _ended(config, dense, rounds, time.perf_counter() - started)) is None:
        try:
            _round(model, teacher, data, config, config.sparsities[len(rounds)], filter_fn, quiet)
            value = metric(model)
        except BaseException:
            restore_model(model, good)
            raise
        kept = config.least_metric is None or value >= config.least_metric
        rounds.append(Round(sparsity_of(model, filter_fn), value, time.perf_counter() - started, kept))
        if not kept:
            restore_model(model, good)
        good = _state(model)
        if path is not None:
            write_state(path, identity, SavedState(len(rounds), good | _record(dense, rounds)))
        if on_round is not None:
            on_round(rounds[-1])
    return IncrementalLog(dense, tuple(rounds), reason)


def _ended(config: IncrementalConfig, dense: float, rounds: Sequence[Round], seconds: float) -> str | None:
    """Why there is no further round; None if there is one."""
    metrics = [dense, *(each.metric for each in rounds)]
    if rounds and not rounds[-1].kept:
        return f"{metrics[-1]:.4f} at {rounds[-1].sparsity:.1%} zeros is below {config.least_metric:.4f}"
    stale = len(rounds) - metrics.index(max(metrics))
    if config.patience is not None and stale >= config.patience:
        return f"no better metric in {stale} rounds"
    if len(rounds) == len(config.sparsities):
        return "all sparsities reached"
    if config.seconds is not None and seconds >= config.seconds:
        return f"out of time after {seconds:.0f} s"
    return None


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


_DENSE, _ROUNDS = "dense", "rounds"


def _record(dense: float, rounds: Sequence[Round]) -> dict[str, Tensor]:
    """What `_history` reads."""
    return {
        _DENSE: torch.tensor(dense, dtype=torch.float64),
        _ROUNDS: torch.tensor([astuple(each) for each in rounds], dtype=torch.float64),
    }


def _history(saved: SavedState) -> tuple[float, list[Round]]:
    """(dense metric, rounds). Raises ValueError for a state that is not one of rounds."""
    none = torch.empty(saved.step, len(fields(Round)), dtype=torch.float64, device="meta")
    expected = {_DENSE: none.new_empty(()), _ROUNDS: none}
    check_tensors(expected, {name: t for name, t in saved.tensors.items() if not name.startswith(MODEL)})
    rows = saved.tensors[_ROUNDS].tolist()
    rounds = [Round(sparsity, metric, seconds, bool(kept)) for sparsity, metric, seconds, kept in rows]
    return saved.tensors[_DENSE].item(), rounds
